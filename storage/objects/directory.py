"""Directory store: objects as files below a folder, and the durable writing of files."""

import contextlib
import errno
import fcntl
import itertools
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

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
_LOCK = ".lock"
_LOCK_PAUSE_S = 0.002
_LOCK_WAIT_S = 30.0
"""The lock is held for a few milliseconds, unless its holder is stopped or its disk hangs."""


class DirectoryStore:
    """Objects as files below a folder that only its owner may read.

    A new object is written to a temporary file, synced, then linked to its name: the link fails if
    the name exists, and no reader sees half a file. Temporary files are in a folder of their own
    that is never listed; those of a crash are removed by the first put an hour later.

    An object is replaced by renaming a synced temporary file, under a lock that all processes
    share; the kernel releases it when its holder ends, however that happens. The tag of an object
    is its file's time of modification, inode and size: no file is written to after it has its name,
    and a replacement's time is always later than that of the file before. Once a store has a lock,
    objects are deleted under it too.
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
                _check_file(path)
                sync_folder(path.parent)  # its writer may have died before syncing
                return False
            partial = self._new_partial()
            try:
                write_synced(partial, content)
                return self._link(partial, path)
            finally:
                partial.unlink(missing_ok=True)

    def replace(self, key: str, content: bytes, tag: str | None) -> str | None:
        path = self._path(key)
        with self._explaining("write", key):
            before = _status(path)
            if not _has_tag(path, before, tag):
                return None
            partial = self._new_partial()
            try:
                later_than_ns = 0 if before is None else before.st_mtime_ns
                written = _write_synced_later(partial, content, later_than_ns)
                with self._locked():
                    # The same tag as above means the same file, so that the time is later still.
                    before = _status(path)
                    if not _has_tag(path, before, tag):
                        return None
                    if before is not None:
                        partial.replace(path)
                        sync_folder(path.parent)
                    elif not self._link(partial, path):
                        return None
                return _tag(written)
            finally:
                partial.unlink(missing_ok=True)

    def get(self, key: str) -> bytes:
        return self.get_tagged(key)[0]

    def get_tagged(self, key: str) -> tuple[bytes, str]:
        with self._explaining("read", key), _open_file(self._path(key)) as file:
            content = file.read(LARGEST_OBJECT_BYTES + 1)
            tag = _tag(os.fstat(file.fileno()))
        if len(content) > LARGEST_OBJECT_BYTES:
            raise ObjectTooLarge(key)
        return content, tag

    def get_range(self, key: str, start: int, length: int) -> bytes:
        check_range(start, length)
        with self._explaining("read", key), _open_file(self._path(key)) as file:
            file.seek(start)
            return file.read(length)

    @contextlib.contextmanager
    def open(self, key: str) -> Iterator[BinaryIO]:
        """Return an object's own file, `root / key`, open for reading within the block.

        Raises:
            ObjectMissing: there is no such object.
        """
        with self._explaining("read", key), _open_file(self._path(key)) as file:
            yield file

    def list(self, prefix: str, start_after: str = "") -> Iterator[StoredObject]:
        with self._explaining("list", prefix):
            self._check_root()
            yield from self._walk(prefix, start_after)

    def delete(self, key: str) -> None:
        path = self._path(key)
        with contextlib.suppress(ObjectMissing), self._explaining("delete", key):
            has_lock = (self.root / _LOCK).exists()
            with self._locked() if has_lock else contextlib.nullcontext():
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

    def _new_partial(self) -> Path:
        """Return the name of a new temporary file, in its folder."""
        self._clean()
        partial = self.root / _PARTIAL / f"{os.getpid()}-{os.urandom(8).hex()}"
        make_folder(partial.parent)
        return partial

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other threads and processes from changing objects, for the length of the block.

        Raises:
            StoreUnavailable: another one held the lock all the time.
        """
        fd = os.open(self.root / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            deadline = time.monotonic() + _LOCK_WAIT_S
            while not _try_lock(fd):
                if time.monotonic() > deadline:
                    raise StoreUnavailable(
                        f"another process has held {self.root / _LOCK} for {_LOCK_WAIT_S:.0f} s"
                    )
                time.sleep(_LOCK_PAUSE_S)
            yield
        finally:
            # A process that was forked meanwhile has the descriptor too, and closes it later.
            fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)

    def _link(self, partial: Path, path: Path) -> bool:
        for attempts_left in reversed(range(_LINK_ATTEMPTS)):
            try:
                make_folder(path.parent)
                os.link(partial, path)
            except FileExistsError:
                _check_file(path)
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
        entered = [iter(_sorted_keys(self.root, "", prefix, start_after))]
        while entered:
            key = next(entered[-1], None)
            if key is None:
                entered.pop()
            elif key.endswith("/"):
                # Below a folder whose name is too long there is no key.
                if not problem_of(key.rstrip("/")):
                    below = _sorted_keys(self.root / key, key, prefix, start_after)
                    entered.append(iter(below))
            elif not problem_of(key):
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    status = (self.root / key).stat(follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode):
                        yield StoredObject(key, status.st_size, status.st_mtime_ns, _tag(status))

    def _clean(self) -> None:
        """Remove temporary files of crashes, once per store object."""
        if self._has_cleaned:
            return
        self._has_cleaned = True
        oldest_s = time.time() - _PARTIAL_LIFE_S
        with contextlib.suppress(FileNotFoundError), os.scandir(self.root / _PARTIAL) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError, IsADirectoryError):
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


def _sorted_keys(folder: Path, base: str, prefix: str, start_after: str) -> list[str]:
    """Return the keys of a folder's entries that may be asked for, sorted; a folder's ends in /.

    Only texts are kept: a folder may have a million entries.
    """
    found = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                is_folder = entry.is_dir(follow_symlinks=False)
                key = f"{base}{entry.name}/" if is_folder else base + entry.name
                if not base and key.startswith("."):
                    continue
                is_inside = key.startswith(prefix) or (is_folder and prefix.startswith(key))
                is_after = key > start_after or (is_folder and start_after.startswith(key))
                if is_inside and is_after:
                    found.append(key)
    except FileNotFoundError:
        return []
    except NotADirectoryError:
        if not base:
            raise
        return []  # it was replaced meanwhile
    found.sort()
    return found


@contextlib.contextmanager
def _open_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file to read it; whatever else has its name does not exist, and is not waited for.

    Raises:
        FileNotFoundError: there is no such file.
    """
    # A named pipe would be waited for until somebody writes to it.
    with open(path, "rb", opener=_open_at_once) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise FileNotFoundError(errno.ENOENT, "it is not a file", str(path))
        yield file


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def _check_file(path: Path) -> os.stat_result:
    """Return the status of an object's file.

    Raises:
        FileNotFoundError: there is no object.
        FileExistsError: something else than a file has its name.
    """
    status = path.stat(follow_symlinks=False)
    if not stat.S_ISREG(status.st_mode):
        raise FileExistsError(errno.EPERM, "something else than a file has its name", str(path))
    return status


def _status(path: Path) -> os.stat_result | None:
    try:
        return _check_file(path)
    except FileNotFoundError:
        return None


def _tag(status: os.stat_result) -> str:
    return f"{status.st_mtime_ns:x}-{status.st_ino:x}-{status.st_size:x}"


def _has_tag(path: Path, status: os.stat_result | None, tag: str | None) -> bool:
    if status is None:
        return tag is None
    if _tag(status) == tag:
        return True
    sync_folder(path.parent)  # the writer who was first may have died before syncing
    return False


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


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


def _write_synced_later(path: Path, content: bytes, than_ns: int) -> os.stat_result:
    """Write a new file as `write_synced` does, modified after a time; return its status.

    The kernel's own times only change every few milliseconds.
    """
    with open(path, "xb", opener=_open_private) as file:
        file.write(content)
        file.flush()
        at_ns, step_ns = max(time.time_ns(), than_ns + 1), 1
        while True:
            os.utime(file.fileno(), ns=(at_ns, at_ns))
            status = os.fstat(file.fileno())
            if status.st_mtime_ns > than_ns:
                break
            # The file system keeps whole microseconds or seconds: see ext4(5) on inodes of 128
            # bytes.
            step_ns *= 1000
            at_ns = than_ns + step_ns
        os.fsync(file.fileno())
    return status


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
