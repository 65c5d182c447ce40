"""Object store: where profiles are kept, a directory or a bucket behind one small interface.

An object is written once and never changed: `put` does nothing when the key exists, so a retry can
neither lose nor double anything. Keys are paths of plain segments, sorted by their bytes.

The key of a profile says when and where it was taken, so a window is found by listing alone:

    v1/{tenant}/l0/{hour}/{host_id}/{start_s}-{length_s}-{content16}.pb.gz

`hour` is that of the window's start (UTC, `2026-01-31T09`); hours sort as time does. Windows are at
most one hour long. `content16` is the start of the content's SHA-256: it tells two profiles of one
window apart, and a whole file from a damaged one.
"""

import contextlib
import errno
import hashlib
import itertools
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:  # the uploader needs no numpy, which is a third of its memory
    from storage.profile import Profile, Window

NS_PER_S = 1_000_000_000
LONGEST_WINDOW_S = 3600
"""An object belongs to the hour of its start, so a reader looks one hour back and no further."""

DEFAULT_TENANT = "default"

_FOREVER_NS = 2**63
_KEY_LIMIT_BYTES = 1024  # S3's own limit
_SEGMENT_LIMIT_BYTES = 255  # NAME_MAX of Linux file systems
_PARTIAL = ".partial"
_LINK_ATTEMPTS = 100
_PARTIAL_LIFE_S = 3600
"""A temporary file older than this is a crash's: no put takes so long."""


class StoreError(Exception):
    """An object store did not do what it was asked for.

    StoreError
    ├── StoreUnavailable
    ├── StoreRefused
    └── ObjectMissing
    """


class StoreUnavailable(StoreError):  # noqa: N818 - says what happened, as the two below do
    """It cannot be reached or has no room or time now: the same request may succeed later."""


class StoreRefused(StoreError):  # noqa: N818
    """It will go on refusing until somebody does what `remedy` says."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem} ({remedy})")
        self.problem = problem
        self.remedy = remedy


class ObjectMissing(StoreError):  # noqa: N818
    """There is no object of this key."""


class StoredObject(NamedTuple):
    key: str
    size_bytes: int
    modified_ns: int
    """When the store wrote it, by the store's clock; S3 rounds to seconds."""


class ObjectStore(Protocol):
    """Objects by key. Every method may raise StoreUnavailable or StoreRefused.

    Safe to use from several threads. A key that `check_key` refuses raises ValueError.
    """

    def put(self, key: str, content: bytes) -> bool:
        """Write an object durably; return False and change nothing if the key exists."""

    def get(self, key: str) -> bytes:
        """Return an object's content.

        Raises:
            ObjectMissing: there is no such object.
        """

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Return `length` bytes from byte `start` on, fewer where the object ends, maybe none.

        Raises:
            ObjectMissing: there is no such object.
        """

    def list(self, prefix: str, start_after: str = "") -> Iterator[StoredObject]:
        """Return the objects whose keys begin with `prefix`, sorted by key, lazily.

        With `start_after` only those behind that key. Servers differ in one case: SeaweedFS puts
        all of `a/` before `a-b`. Where the names in a folder are of one length, there is none.
        """

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is as good as removed."""


class ObjectKey(NamedTuple):
    """Where a profile is kept. `start_s` and `length_s` are whole seconds around its window."""

    tenant: str
    host_id: str
    start_s: int
    length_s: int
    content16: str
    ending: str = "pb.gz"

    @classmethod
    def parse(cls, text: str) -> "ObjectKey | None":
        """Read a key; None for one that is not a level-0 profile's. Others may share the store."""
        match = _KEY_PATTERN.fullmatch(text)
        if match is None:
            return None
        key = cls(
            match["tenant"],
            match["host_id"],
            int(match["start_s"]),
            int(match["length_s"]),
            match["content16"],
            match["ending"],
        )
        # The hour must be that of the start: the window would otherwise not be found by its time.
        is_consistent = key.length_s <= LONGEST_WINDOW_S and key.text == text
        return key if is_consistent else None

    @property
    def text(self) -> str:
        return (
            f"{_hours_prefix(self.tenant)}{_hour(self.start_s)}/{self.host_id}/"
            f"{self.start_s}-{self.length_s}-{self.content16}.{self.ending}"
        )

    @property
    def start_ns(self) -> int:
        return self.start_s * NS_PER_S

    @property
    def end_ns(self) -> int:
        return (self.start_s + self.length_s) * NS_PER_S


_KEY_PATTERN = re.compile(
    r"v1/(?P<tenant>[A-Za-z0-9][A-Za-z0-9._-]{0,63})/l0/\d{4}-\d\d-\d\dT\d\d/"
    r"(?P<host_id>[0-9a-f]{16})/"
    r"(?P<start_s>\d{1,11})-(?P<length_s>\d{1,4})-(?P<content16>[0-9a-f]{16})"
    r"\.(?P<ending>pb\.gz|folded\.zst)",
    re.ASCII,
)
_HOST_ID_PATTERN = re.compile(r"[0-9a-f]{16}")


def object_key(profile: "Profile", content: bytes, tenant: str = DEFAULT_TENANT) -> ObjectKey:
    """Return the key under which `content`, the encoded profile, is kept.

    A profile of several hosts, or of one without an id of 16 hex digits, gets a hash of them all.

    Raises:
        ValueError: the window is longer than an hour.
    """
    start_s = profile.window.start_ns // NS_PER_S
    length_s = max(1, -(-profile.window.end_ns // NS_PER_S) - start_s)
    if length_s > LONGEST_WINDOW_S:
        raise ValueError(f"cannot keep a window of {length_s} s: it is longer than an hour")
    host_ids = [host.host_id for host in profile.accounting.hosts]
    host_id = host_ids[0] if len(host_ids) == 1 else ""
    if not _HOST_ID_PATTERN.fullmatch(host_id):
        host_id = hashlib.sha256("\0".join(host_ids).encode()).hexdigest()[:16]
    return ObjectKey(tenant, host_id, start_s, length_s, content16(content))


def content16(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def list_window(
    store: ObjectStore, window: "Window", tenant: str = DEFAULT_TENANT
) -> Iterator[tuple[ObjectKey, StoredObject]]:
    """Return the profiles whose windows overlap `window`, by hour, host and start.

    Lists exactly the hours in question, and the one before for a window that reaches across.
    What is not a profile of ours is passed over.
    """
    yield from _list_between(store, window.start_ns, window.end_ns, tenant)


def _list_between(
    store: ObjectStore, start_ns: int, end_ns: int, tenant: str
) -> Iterator[tuple[ObjectKey, StoredObject]]:
    prefix = _hours_prefix(tenant)
    first = _hour(start_ns // NS_PER_S - LONGEST_WINDOW_S)
    last = _hour((end_ns - 1) // NS_PER_S)
    # Behind the name of a folder SeaweedFS goes on behind the folder; with the slash, in it.
    for stored in store.list(prefix, start_after=f"{prefix}{first}/"):
        if stored.key[len(prefix) : len(prefix) + len(last)] > last:
            return
        key = ObjectKey.parse(stored.key)
        if key is not None and key.start_ns < end_ns and key.end_ns > start_ns:
            yield key, stored


def expire(
    store: ObjectStore, now_s: int, keep_s: int, keep_bytes: int, tenant: str = DEFAULT_TENANT
) -> Iterator[StoredObject]:
    """Delete the oldest profiles, and return each of them.

    Deletes those that ended `keep_s` ago, then as many as exceed `keep_bytes`; a limit of 0 is
    none. Whatever else lies in the store stays.
    """
    excess_bytes = 0
    if keep_bytes:
        every = _list_between(store, 0, _FOREVER_NS, tenant)
        excess_bytes = sum(stored.size_bytes for _, stored in every) - keep_bytes
    oldest_ns = (now_s - keep_s) * NS_PER_S if keep_s else 0
    by_hour = itertools.groupby(
        _list_between(store, 0, _FOREVER_NS, tenant),
        lambda pair: pair[0].start_s // LONGEST_WINDOW_S,
    )
    for _, hour in by_hour:
        for key, stored in sorted(hour, key=lambda pair: pair[0].start_s):
            if excess_bytes <= 0 and key.end_ns > oldest_ns:
                return
            store.delete(stored.key)
            excess_bytes -= stored.size_bytes
            yield stored


def _hours_prefix(tenant: str) -> str:
    return f"v1/{tenant}/l0/"


def _hour(at_s: int) -> str:
    """Return the hour of a time; all before 1970 and after 9999 are the first and the last one."""
    return time.strftime("%Y-%m-%dT%H", time.gmtime(min(max(at_s, 0), 253_402_300_799)))


def default_store_url() -> str:
    """Return EVERFLAME_STORE, else the place that the user may write to."""
    place = "/var/lib/everflame" if os.geteuid() == 0 else "~/.local/share/everflame"
    return os.environ.get("EVERFLAME_STORE") or str(Path(place).expanduser())


def open_store(url: str = "", endpoint: str | None = None) -> ObjectStore:
    """Open `file:///path`, a plain path or `s3://bucket/prefix`; by default the user's own store.

    `endpoint` is the URL of an S3 server other than Amazon's. Nothing is asked of the store yet.

    Raises:
        StoreRefused: the URL names no store, or no credentials are to be found.
    """
    url = url or default_store_url()
    scheme, has_scheme, rest = url.partition("://")
    if scheme == "s3" and has_scheme:
        # The sampler opens no bucket, and boto3 is 40 MB: it is imported where one is opened.
        from storage.objects.s3 import S3Store  # noqa: PLC0415

        bucket, _, prefix = rest.partition("/")
        return S3Store(bucket, prefix, endpoint)
    path = rest if has_scheme and scheme == "file" else url
    if has_scheme and (scheme != "file" or not path.startswith("/")):
        raise StoreRefused(
            f"cannot open the store {url!r}", "give file:///path, a path or s3://bucket/prefix"
        )
    return DirectoryStore(Path(path).expanduser().absolute())


def check_key(key: str) -> None:
    """Refuse what is not a relative path of plain segments, the same on every store.

    Raises:
        ValueError: names the key and what is wrong with it.
    """
    problem = _problem_of(key)
    if problem:
        raise ValueError(f"cannot use the key {key!r}: {problem}")


def _problem_of(key: str) -> str:
    segments = key.split("/")
    try:
        sizes = [len(segment.encode()) for segment in segments]
    except UnicodeEncodeError:
        return "it is not Unicode"
    if any(segment in {"", ".", ".."} for segment in segments):
        return "a segment is empty, . or .."
    if not key.isprintable() or "\\" in key:
        return "it has control characters or backslashes"
    if key.startswith("."):
        return "the first segment begins with a dot"
    if max(sizes) > _SEGMENT_LIMIT_BYTES or sum(sizes) + len(sizes) - 1 > _KEY_LIMIT_BYTES:
        return "it is too long"
    return ""


class DirectoryStore:
    """Objects as files below a folder that only its owner may read.

    A new object is a temporary file, synced, then linked to its name: the link fails when the name
    exists, and no reader ever sees half a file. Temporary files of a crash lie apart, are never
    listed and go with the first put an hour later.
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
                sync_folder(path.parent)  # whoever linked it may have died before this
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
            return file.read()

    def get_range(self, key: str, start: int, length: int) -> bytes:
        check_range(start, length)
        with self._explaining("read", key), self._path(key).open("rb") as file:
            file.seek(start)
            return file.read(length)

    def list(self, prefix: str, start_after: str = "") -> Iterator[StoredObject]:
        with self._explaining("list", prefix):
            self._check_root()
            yield from self._walk(self.root, "", prefix, start_after)

    def delete(self, key: str) -> None:
        path = self._path(key)
        with contextlib.suppress(ObjectMissing), self._explaining("delete", key):
            path.unlink()
            with contextlib.suppress(OSError):  # others are in it, or it is gone already
                while path.parent != self.root:
                    path = path.parent
                    path.rmdir()

    def _path(self, key: str) -> Path:
        check_key(key)
        return self.root / key

    def _check_root(self) -> None:
        """Tell a folder that was taken away from one that nobody has put anything into yet."""
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
            except FileNotFoundError:  # a delete has just removed a folder as empty
                if not attempts_left:
                    raise
            else:
                sync_folder(path.parent)
                return True
        sync_folder(path.parent)
        return False

    def _walk(
        self, folder: Path, base: str, prefix: str, start_after: str
    ) -> Iterator[StoredObject]:
        for key, entry in _sorted_entries(folder, base):
            if not (key.startswith(prefix) or prefix.startswith(key)):
                continue
            if key.endswith("/"):
                if key > start_after or start_after.startswith(key):
                    yield from self._walk(Path(entry), key, prefix, start_after)
            elif key > start_after and key.startswith(prefix) and not _problem_of(key):
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode):
                        yield StoredObject(key, status.st_size, status.st_mtime_ns)

    def _clean(self) -> None:
        """Remove what crashes left behind, once in the life of this store."""
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
"""ENOENT: of a file system whose folders nobody can make, as /proc. That a folder disappears while
it is written to is met before."""


def _sorted_entries(folder: Path, base: str) -> list[tuple[str, os.DirEntry[str]]]:
    """Return what is in a folder with its key, a folder's ending in /, sorted as keys are."""
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


def check_range(start: int, length: int) -> None:
    if start < 0 or length < 1:
        raise ValueError(f"cannot read {length} bytes from byte {start} on")


def make_folder(folder: Path) -> None:
    """Create a folder for the owner alone, and those above it, durably.

    Raises:
        OSError: that is not possible there, or somebody removes one of them meanwhile.
    """
    missing = itertools.takewhile(lambda each: not each.exists(), (folder, *folder.parents))
    for each in reversed(list(missing)):
        with contextlib.suppress(FileExistsError):
            each.mkdir(mode=0o700)
            sync_folder(each.parent)


def write_synced(path: Path, content: bytes) -> None:
    """Write a new file for the owner alone and wait until the disk has it (fsync(2)).

    Its name is not durable yet: that needs `sync_folder`.
    """
    with open(path, "xb", opener=_open_private) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def sync_folder(folder: Path) -> None:
    """Wait until the disk has a folder's names."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
