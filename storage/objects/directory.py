"""Directory store: objects as files below a folder, and the durable writing of files."""

import contextlib
import errno
import itertools
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from storage.objects.keys import (
    LARGEST_OBJECT_BYTES,
    ObjectMissing,
    ObjectTooLarge,
    StoredObject,
    StoreRefused,
    StoreUnavailable,
    check_key,
    check_range,
    problem_of,
)

_PARTIAL = ".partial"
_LINK_ATTEMPTS = 100
_PARTIAL_LIFE_S = 3600
"""An older temporary file is from a crash: no put takes this long."""


class DirectoryStore:
    """Objects as files below a folder that only its owner may read.

    A new object is written to a temporary file, synced, then linked to its name: the link fails if
    the name exists, and no reader sees half a file. Temporary files are in a folder of their own
    that is never listed; those of a crash are removed by the first put an hour later.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._has_cleaned = False
        self._was_there = False

    def __str__(self) -> str:
        return str(self.root)

    def put(self, key: str, content: bytes) -> bool:
        path = self._path(key)
        with self._explaining("write", key):
            if path.exists():
                sync_folder(path.parent)  # its writer may have died before syncing
                return False
            self._clean()
            partial = self.root / _PARTIAL / f"{os.getpid()}-{os.urandom(8).hex()}"
            make_folder(partial.parent)
            try:
                write_synced(partial, content)
                return self._link(partial, path)
            finally:
                partial.unlink(missing_ok=True)

    def get(self, key: str) -> bytes:
        with self._explaining("read", key), self._path(key).open("rb") as file:
            content = file.read(LARGEST_OBJECT_BYTES + 1)
        if len(content) > LARGEST_OBJECT_BYTES:
            raise ObjectTooLarge(key)
        return content

    def get_range(self, key: str, start: int, length: int) -> bytes:
        check_range(start, length)
        with self._explaining("read", key), self._path(key).open("rb") as file:
            file.seek(start)
            return file.read(length)

    def list(self, prefix: str, start_after: str = "") -> Iterator[StoredObject]:
        with self._explaining("list", prefix):
            self._check_root()
            yield from self._walk(prefix, start_after)

    def delete(self, key: str) -> None:
        path = self._path(key)
        with contextlib.suppress(ObjectMissing), self._explaining("delete", key):
            path.unlink()
            with contextlib.suppress(OSError):  # it is not empty, or was removed already
                while path.parent != self.root:
                    path = path.parent
                    path.rmdir()

    def _path(self, key: str) -> Path:
        check_key(key)
        return self.root / key

    def _check_root(self) -> None:
        """Raise StoreUnavailable if the folder has disappeared; one not yet created is empty."""
        is_there = self.root.is_dir()
        if self._was_there and not is_there:
            raise StoreUnavailable(f"the folder {self.root} of the store is not there any more")
        self._was_there |= is_there

    def _link(self, partial: Path, path: Path) -> bool:
        for attempts_left in reversed(range(_LINK_ATTEMPTS)):
            try:
                make_folder(path.parent)
                os.link(partial, path)
            except FileExistsError:
                break
            except FileNotFoundError:  # a delete has just removed an empty folder
                if not attempts_left:
                    raise
            else:
                sync_folder(path.parent)
                return True
        sync_folder(path.parent)
        return False

    def _walk(self, prefix: str, start_after: str) -> Iterator[StoredObject]:
        # A stack of its own: others' folders may be nested deeper than Python's calls.
        entered = [iter(_sorted_entries(self.root, ""))]
        while entered:
            key, entry = next(entered[-1], (None, None))
            if key is None or entry is None:
                entered.pop()
            elif not (key.startswith(prefix) or prefix.startswith(key)):
                continue
            elif key.endswith("/"):
                is_after = key > start_after or start_after.startswith(key)
                # Below a folder whose name is too long there is no key.
                if is_after and not problem_of(key.rstrip("/")):
                    entered.append(iter(_sorted_entries(Path(entry), key)))
            elif key > start_after and key.startswith(prefix) and not problem_of(key):
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode):
                        yield StoredObject(key, status.st_size, status.st_mtime_ns)

    def _clean(self) -> None:
        """Remove temporary files of crashes, once per store object."""
        if self._has_cleaned:
            return
        self._has_cleaned = True
        oldest_s = time.time() - _PARTIAL_LIFE_S
        for _, entry in _sorted_entries(self.root / _PARTIAL, ""):
            with contextlib.suppress(FileNotFoundError):
                if entry.stat(follow_symlinks=False).st_mtime < oldest_s:
                    Path(entry).unlink()

    @contextlib.contextmanager
    def _explaining(self, verb: str, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in _ABSENCES and verb in {"read", "delete"}:
                raise ObjectMissing(f"there is no object {key!r} in {self.root}") from error
            reason = f"cannot {verb} {key!r} in the store {self.root}: {error.strerror}"
            if error.errno in _REFUSALS:
                is_place = error.errno in {errno.ENOTDIR, errno.ENOENT}
                right = "" if is_place else f"give the user {os.geteuid()} the right to it, or "
                remedy = f"{right}use another --store"
                raise StoreRefused(reason, remedy) from error
            raise StoreUnavailable(reason) from error


_ABSENCES = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR})
_REFUSALS = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ELOOP, errno.ENOENT}
)
"""ENOENT comes from file systems in which no folder can be made, as /proc: a folder that disappears
during a write is handled earlier."""


def _sorted_entries(folder: Path, base: str) -> list[tuple[str, os.DirEntry[str]]]:
    """Return the entries of a folder with their keys, sorted by key; a folder's ends in /."""
    try:
        with os.scandir(folder) as entries:
            found = [
                (f"{base}{entry.name}{'/' if entry.is_dir(follow_symlinks=False) else ''}", entry)
                for entry in entries
                if base or not entry.name.startswith(".")
            ]
    except FileNotFoundError:
        return []
    found.sort(key=lambda pair: pair[0])
    return found


def make_folder(folder: Path) -> None:
    """Create a folder and its parents durably; only the owner may use them.

    Raises:
        OSError: it cannot be created, or somebody removes one of them meanwhile.
    """
    missing = itertools.takewhile(lambda each: not each.exists(), (folder, *folder.parents))
    for each in reversed(list(missing)):
        with contextlib.suppress(FileExistsError):
            each.mkdir(mode=0o700)
            sync_folder(each.parent)


def write_synced(path: Path, content: bytes) -> None:
    """Write a new file that only the owner may read, and wait until it is on the disk (fsync(2)).

    Its name is durable only after `sync_folder`.
    """
    with open(path, "xb", opener=_open_private) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
