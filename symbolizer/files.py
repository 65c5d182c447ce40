"""Open the files of a process without trusting it.

A path proves nothing: the process may have another root, the file may be deleted or replaced, and
a hostile process may have put a FIFO, a device or a link out of its container there. So a file is
first opened with O_PATH, which has no effect on it, and only regular files are opened for reading.
"""

import contextlib
import ctypes
import errno
import os
import re
import stat
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple, Self

from symbolizer.location import Miss
from symbolizer.maps import Mapping, TooManyMappings, read_maps

# openat2(2), from Linux 5.6 on; the C library has no wrapper.
_SYS_OPENAT2 = 437
_RESOLVE_NO_MAGICLINKS, _RESOLVE_IN_ROOT = 0x02, 0x10
_OPEN_HOW = struct.Struct("QQQ")
_libc = ctypes.CDLL(None, use_errno=True)

_READ_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


_MAX_MOUNTINFO_BYTES = 4 << 20


class OpenedFile(NamedTuple):
    """A regular file, open for reading; the caller closes it.

    `is_certain`: the kernel says that this is the mapped file.
    """

    fd: int
    is_certain: bool


def close_file(fd: int) -> None:
    """Close a file of somebody else, whatever its file system says: that of FUSE is asked."""
    with contextlib.suppress(OSError):  # the descriptor is closed all the same (close(2))
        os.close(fd)


class ProcessFiles:
    """The files of one process, to be used briefly. Close it, or use it in a `with`.

    Everything is opened relative to one descriptor of /proc/PID, so it stays the same process even
    if that exits and its pid is reused meanwhile. It is that of another thread when the first one
    has exited, after which /proc/PID shows no memory and no files.
    """

    def __init__(self, pid: int) -> None:
        self._maps: list[Mapping] | None = None
        self._root = -1
        self.failure = Miss.NO_FILE
        """Why the last candidate could not be opened."""
        self._process = _open_process(pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for fd in (self._process, self._root):
            if fd >= 0:
                os.close(fd)
        self._process = self._root = -1

    def candidates(self, mapping: Mapping) -> Iterator[OpenedFile]:
        """Open files that may be the mapped one, the likeliest first, each when it is asked for.

        They are the mapped file itself through map_files, the path in the process's root, and the
        path in ours. The caller compares identities and closes each.
        """
        yield from self.candidates_inside(mapping)
        yield from self.candidates_of_host(mapping)

    def candidates_inside(self, mapping: Mapping) -> Iterator[OpenedFile]:
        """Open the mapped file through map_files, then the path in the root of the process."""
        self.failure = Miss.NO_FILE
        if self._process >= 0:
            yield from self._open_map_file(mapping)
            yield from self._reopen(self._open_in_root(mapping.file_path), is_certain=False)

    def candidates_of_host(self, mapping: Mapping) -> Iterator[OpenedFile]:
        """Open the path in our own root, where a process that is gone may have had it."""
        root = _try_open("/", None, os.O_PATH | os.O_DIRECTORY)
        try:
            path_fd = self._open_below(root, mapping.file_path)
        finally:
            if root >= 0:
                os.close(root)
        yield from self._reopen(path_fd, is_certain=False)

    def read(self, name: str, limit_bytes: int) -> bytes | None:
        """Read up to `limit_bytes` of /proc/PID/`name`; None if the process has exited."""
        fd = _try_open(name, self._process, _READ_FLAGS) if self._process >= 0 else -1
        if fd < 0:
            return None
        parts = []
        try:
            while limit_bytes > 0 and (part := os.read(fd, limit_bytes)):
                parts.append(part)
                limit_bytes -= len(part)
        except OSError:  # exited meanwhile
            return None
        finally:
            os.close(fd)
        return b"".join(parts)

    def link(self, name: str) -> bytes:
        """Return the target of the link /proc/PID/`name` in the root of the process, or b""."""
        if self._process < 0:
            return b""
        try:
            target = os.readlink(os.fsencode(name), dir_fd=self._process)
            root = os.readlink(b"root", dir_fd=self._process)
        except OSError:
            return b""
        return _inside(root, target)

    def open_executable(self) -> OpenedFile | None:
        """Open the program that the process runs, even if it was deleted."""
        if self._process < 0:
            return None
        return next(self._reopen(_try_open("exe", self._process), is_certain=True), None)

    def open_file(self, path: bytes, *, may_be_link: bool = True) -> OpenedFile | None:
        """Open a regular file by its path in the process's root; links cannot leave that root.

        Unless it `may_be_link` the file itself may not be a link; the folders that it is in may be.
        """
        if self._process < 0:
            return None
        flags = 0 if may_be_link else os.O_NOFOLLOW
        return next(self._reopen(self._open_in_root(path, flags), is_certain=False), None)

    def resolve(self, path: bytes) -> bytes:
        """Return a path in the root of the process with all links resolved; b"" if not found."""
        fd = self._open_in_root(path) if self._process >= 0 else -1
        if fd < 0:
            return b""
        try:
            resolved, root = _path_of(fd), _path_of(self._root)
        except OSError:
            return b""
        finally:
            os.close(fd)
        return _inside(root, resolved)

    def _open_map_file(self, mapping: Mapping) -> Iterator[OpenedFile]:
        # Its build id or inode proves the file, so the maps need not be read.
        yield from self._open_range(mapping.start, mapping.end, is_certain=False)
        maps = self._current_maps()
        first = bisect_right(maps, mapping.start, key=attrgetter("end"))
        last = bisect_left(maps, mapping.end, key=attrgetter("start"))
        for current in maps[first:last]:
            if current.is_same_file(mapping):
                yield from self._open_range(current.start, current.end, is_certain=True)
                return

    def _open_range(self, start: int, end: int, *, is_certain: bool) -> Iterator[OpenedFile]:
        link = f"map_files/{start:x}-{end:x}"
        yield from self._reopen(_try_open(link, self._process), is_certain=is_certain)

    def _current_maps(self) -> list[Mapping]:
        if self._maps is None:
            self._maps = []
            fd = _try_open("maps", self._process, _READ_FLAGS)
            if fd >= 0:
                with contextlib.suppress(OSError, TooManyMappings), os.fdopen(fd, "rb"):
                    self._maps = read_maps(fd)
        return self._maps

    def _open_in_root(self, path: bytes, flags: int = 0) -> int:
        if self._root < 0:
            self._root = _try_open("root", self._process, os.O_PATH | os.O_DIRECTORY)
        return self._open_below(self._root, path, flags)

    def _open_below(self, root: int, path: bytes, flags: int = 0) -> int:
        if root < 0 or not path.startswith(b"/") or b"\0" in path:
            return -1
        flags |= os.O_PATH | os.O_CLOEXEC
        how = _OPEN_HOW.pack(flags, 0, _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS)
        fd: int = _libc.syscall(
            ctypes.c_long(_SYS_OPENAT2),
            ctypes.c_int(root),
            ctypes.c_char_p(path),
            ctypes.c_char_p(how),
            ctypes.c_size_t(_OPEN_HOW.size),
        )
        if fd < 0:
            self._note(ctypes.get_errno())
        return fd

    def _reopen(self, path_fd: int, *, is_certain: bool) -> Iterator[OpenedFile]:
        """Open a file for reading by its O_PATH descriptor, which is closed."""
        if path_fd < 0:
            return
        try:
            if not stat.S_ISREG(os.fstat(path_fd).st_mode):
                self.failure = Miss.NOT_REGULAR
                return
            fd = os.open(f"/proc/self/fd/{path_fd}", _READ_FLAGS)
        except OSError as error:
            self._note(error.errno)
            return
        finally:
            os.close(path_fd)
        yield OpenedFile(fd, is_certain)

    def _note(self, number: int | None) -> None:
        if number in (errno.EACCES, errno.EPERM):
            self.failure = Miss.NOT_PERMITTED


def mount_of(pids: Iterable[int], path: bytes) -> bytes:
    """Return where the file system of a path is mounted, as the first living process sees it.

    This only reads /proc/PID/mountinfo, and waits for no file system (proc_pid_mountinfo(5)).
    """
    for pid in (*pids, os.getpid()):
        with ProcessFiles(pid) as files:
            content = files.read("mountinfo", _MAX_MOUNTINFO_BYTES)
        if content is None:
            continue
        points = (
            _unescaped(line.split()[4]) for line in content.splitlines() if line.count(b" ") > 4
        )
        return max(
            (p for p in points if (path + b"/").startswith(p.rstrip(b"/") + b"/")),
            key=len,
            default=b"",
        )
    return b""


def _unescaped(path: bytes) -> bytes:
    return re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8) & 255]), path)


def _open_process(pid: int) -> int:
    process = _try_open(f"/proc/{pid}", None, os.O_PATH | os.O_DIRECTORY)
    if process < 0 or _has_files(process):
        return process
    try:
        tids = [int(name) for name in os.listdir(f"/proc/{pid}/task") if name != str(pid)]  # noqa: PTH208 - for each process
    except OSError:
        tids = []
    for tid in tids:
        thread = _try_open(f"/proc/{tid}", None, os.O_PATH | os.O_DIRECTORY)
        if thread >= 0 and _has_files(thread):
            os.close(process)
            return thread
        if thread >= 0:
            os.close(thread)
    return process


def _has_files(task: int) -> bool:
    """Return whether a thread still has an executable; the kernel's own never have one."""
    try:
        os.readlink(b"exe", dir_fd=task)
    except FileNotFoundError:
        return False
    except OSError:  # it may not be looked at
        return True
    return True


def _inside(root: bytes, path: bytes) -> bytes:
    """Return a path relative to a root; both are given as seen from outside."""
    if root == b"/" or not (path + b"/").startswith(root + b"/"):
        return path
    return path[len(root) :] or b"/"


def _path_of(fd: int) -> bytes:
    return os.fsencode(Path(f"/proc/self/fd/{fd}").readlink())


def _try_open(path: str | bytes, directory: int | None, flags: int = os.O_PATH) -> int:
    try:
        return os.open(path, flags | os.O_CLOEXEC, dir_fd=directory)
    except OSError:
        return -1
