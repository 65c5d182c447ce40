"""File cache: a folder of files within a byte budget; the longest unused are evicted first.

Whatever is cached can be made again, so a file that is gone or cannot be read is a miss, never an
error. A file appears complete or not at all: it is written under another name and renamed. Several
processes may share a folder. A file's time of access is the time of its last use, to the minute: it
is set, since file systems may not record reads (mount(8), noatime).

Pins keep files from being evicted. They are shared locks on bytes of one file, a byte per name, so
the kernel removes them when their process ends (fcntl(2), "Open file description locks"); whoever
evicts a file must get the exclusive lock first.
"""

import contextlib
import fcntl
import os
import stat
import struct
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from symbolizer.digest import blake2b

_MEASURED_EVERY_BYTES = 32 << 20
"""The folder is measured after so much was written, or an eighth of a smaller budget."""
_USED_TO_NS = 60 * 1_000_000_000
_PARTIAL = ".part"
_PARTIAL_LASTS_NS = 3600 * 1_000_000_000
"""A partial file that is older belongs to a process that crashed: no write takes so long."""
_PINS = ".pins"
_FLOCK = struct.Struct("hhqqi4x")  # fcntl.h's struct flock on 64-bit machines

_File = tuple[int, int, Path]
"""Time of the last use, size, path."""


class UnwrittenError(OSError):
    """A file cannot be written to the cache just now: its disk is full, for example."""


class Pins:
    """Keeps files from being evicted, by any process, as long as it exists."""

    def __init__(self, fd: int) -> None:
        weakref.finalize(self, os.close, fd)


class FileCache:
    """Files below `folder` by name; names are relative paths of at most two segments.

    `files` is a glob pattern of what counts against the budget, which may take in what other
    versions of this program left in neighbouring folders.

    Safe to use from several threads.
    """

    def __init__(self, folder: Path, limit_bytes: int, *, files: str = "*") -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self._pattern = files
        self._lock = threading.Lock()
        self._unmeasured_bytes = _MEASURED_EVERY_BYTES  # what was there before is not known

    def pin(self, names: Iterable[str]) -> Pins:
        """Keep files from being evicted as long as the result exists, and no longer.

        Whether they are there is to be asked afterwards. Takes one file descriptor.

        Raises:
            OSError: the folder cannot be written to, or its file system has no such locks.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(self.folder / _PINS, os.O_RDWR | os.O_CREAT, 0o600)
        pins = Pins(fd)
        for name in names:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLKW, _lock_of(name, fcntl.F_RDLCK))
        return pins

    def open(self, name: str) -> BinaryIO | None:
        """Return a cached file, open for reading, and mark it as used; None if there is none."""
        path = self.folder / name
        try:
            file = path.open("rb")
        except OSError:
            return None
        with contextlib.suppress(OSError):
            status, now_ns = os.fstat(file.fileno()), time.time_ns()
            if status.st_atime_ns < now_ns - _USED_TO_NS:
                os.utime(file.fileno(), ns=(now_ns, status.st_mtime_ns))
        return file

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        """Write a file within the block; if the block raises, there is no such file.

        Raises:
            UnwrittenError: the file cannot be written.
        """
        path = self.folder / name
        partial = path.with_name(f".{os.urandom(8).hex()}{_PARTIAL}")
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "w+b") as file:
                yield file
                file.flush()
                written_bytes = os.fstat(file.fileno()).st_size
            partial.replace(path)
        except OSError as error:
            raise UnwrittenError(error.errno, error.strerror, str(path)) from error
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()
        self._count(written_bytes)

    def touch(self, name: str) -> int:
        """Mark a file as used without reading it; return its size, 0 if there is none."""
        path = self.folder / name
        try:
            status = path.stat()
            os.utime(path, ns=(time.time_ns(), status.st_mtime_ns))
        except OSError:
            return 0
        return status.st_size

    def remove(self, name: str) -> None:
        with contextlib.suppress(OSError):
            (self.folder / name).unlink()

    def size_bytes(self) -> int:
        return sum(size for _, size, _ in self._files())

    def _count(self, written_bytes: int) -> None:
        with self._lock:
            self._unmeasured_bytes += written_bytes
            is_due = self._unmeasured_bytes >= min(_MEASURED_EVERY_BYTES, self.limit_bytes // 8)
            if is_due:
                self._unmeasured_bytes = 0
        if is_due:
            self._evict()

    def _files(self) -> list[_File]:
        found = []
        for path in self.folder.glob(self._pattern):
            with contextlib.suppress(OSError):
                status = path.stat(follow_symlinks=False)
                if stat.S_ISREG(status.st_mode) and not path.name.endswith(_PARTIAL):
                    found.append((status.st_atime_ns, status.st_size, path))
        return found

    def _evict(self) -> None:
        """Remove the longest unused files down to nine tenths of the budget, if it is exceeded.

        Those that are pinned stay.
        """
        self._remove_partial()
        files = sorted(self._files())
        excess_bytes = sum(size for _, size, _ in files) - self.limit_bytes
        if excess_bytes <= 0:
            return
        excess_bytes += self.limit_bytes // 10  # so that not every write has to make room
        with self._evicting() as pins_fd:
            for _, size, path in files:
                if excess_bytes <= 0:
                    break
                with contextlib.suppress(OSError):
                    if pins_fd is not None:  # raises if it is pinned
                        name = path.relative_to(self.folder).as_posix()
                        fcntl.fcntl(pins_fd, fcntl.F_OFD_SETLK, _lock_of(name, fcntl.F_WRLCK))
                    path.unlink()
                    excess_bytes -= size

    @contextlib.contextmanager
    def _evicting(self) -> Iterator[int | None]:
        """Return the file of locks, which are released when the block ends; None: no pin exists."""
        try:
            fd = os.open(self.folder / _PINS, os.O_RDWR)
        except OSError:
            yield None
            return
        try:
            yield fd
        finally:
            os.close(fd)

    def _remove_partial(self) -> None:
        oldest_ns = time.time_ns() - _PARTIAL_LASTS_NS
        for folder in {self.folder, *(path.parent for _, _, path in self._files())}:
            for path in folder.glob(f".*{_PARTIAL}"):
                with contextlib.suppress(OSError):
                    if path.stat(follow_symlinks=False).st_mtime_ns < oldest_ns:
                        path.unlink()


def _lock_of(name: str, kind: int) -> bytes:
    """Return a lock of the byte that stands for a file; two names with one byte do no harm."""
    digest = blake2b(name.encode(), digest_size=8).digest()
    place = int.from_bytes(digest, "big") >> 2  # within off_t
    return _FLOCK.pack(kind, os.SEEK_SET, place, 1, 0)
