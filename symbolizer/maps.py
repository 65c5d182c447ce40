"""The executable mappings of a process, from /proc/PID/maps or from perf's MMAP2 records.

Both sources yield the same Mapping. A MappingTable is one state of one address space, sorted for
look-up; when a process maps more, it gets a new table.

Anybody may map 65,000 pieces of a file: what is read of one process is bounded, and whoever has
more than MAX_MAPPINGS executable ones gets no table of them.
"""

import ctypes
import fcntl
import os
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

MAX_MAPPINGS = 4_096
"""Executable ones of one process. Browsers and JVMs have a few hundred."""

_DELETED = b" (deleted)"
_SHORT_BYTES = 256 << 10
"""Of /proc/PID/maps: 2,500 mappings. What is longer is asked for piece by piece."""
_LONGEST_BYTES = 16 << 20
"""65,530 mappings (vm.max_map_count) with paths of 160 bytes."""
_EXECUTABLE_LINE = re.compile(rb"^[0-9a-f]+-[0-9a-f]+ ..x[^\n]*\n", re.MULTILINE)

_PROCMAP_QUERY = 0xC068_6611  # include/uapi/linux/fs.h, from Linux 6.11 on
_EXECUTABLE, _COVERING_OR_NEXT = 0x04, 0x10
_PATH_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Mapping:
    """Executable memory of a process.

    Attributes:
        path: as the kernel writes it: followed by ` (deleted)` if the file is deleted; relative to
            the root of the process (MMAP2) or of the reader (/proc/PID/maps); empty or `//anon` for
            anonymous memory; in brackets for the kernel's own (`[vdso]`).
        device: major and minor number, as the kernel prints them. On file systems with devices of
            their own (overlayfs, btrfs) stat(2) returns others.
        build_id: hex if the record carried one, else empty.
    """

    start: int
    end: int
    file_offset: int
    path: bytes
    device: tuple[int, int] = (0, 0)
    inode: int = 0
    build_id: str = ""

    @property
    def file_path(self) -> bytes:
        """The path without ` (deleted)`."""
        return self.path.removesuffix(_DELETED)

    def is_same_file(self, other: "Mapping") -> bool:
        """Return whether both mappings are of one file, even if it was deleted in between."""
        return (self.device, self.inode, self.file_path) == (
            other.device,
            other.inode,
            other.file_path,
        )


def parse_maps(text: bytes) -> list[Mapping]:
    r"""Read the executable mappings of /proc/PID/maps (proc_pid_maps(5)).

    Anonymous memory that a program has put in place of its own code, to have it on huge pages, is a
    mapping of the program's file. What is mapped before and after it shows that, also if it is not
    executable.

    The kernel writes a newline in a path as `\012` and escapes nothing else, so a path that
    contains these four characters is ambiguous. Lines that cannot be parsed are left out: if the
    process exits, the file may end in the middle of one.
    """
    mappings = []
    lines = text.split(b"\n")  # a path may contain a carriage return
    for number, line in enumerate(lines):
        parsed = _parse_line(line) if b"x" in line[:_PERMISSIONS_END] else None
        if parsed is None or not parsed.is_executable:
            continue
        mapping = parsed.mapping
        if is_anonymous(mapping.path):
            before = map(_parse_line, lines[max(0, number - _NEIGHBOURS) : number][::-1])
            after = map(_parse_line, lines[number + 1 : number + 1 + _NEIGHBOURS])
            mapping = _as_text(mapping, _file_beside(before), _file_beside(after))
        mappings.append(mapping)
    return mappings


# Two addresses of at most 16 digits each, a dash, a blank, and the permissions.
_PERMISSIONS_END = 38
# A program may have moved its code in several parts.
_NEIGHBOURS = 8


class _Line(NamedTuple):
    mapping: Mapping
    is_executable: bool


def _parse_line(line: bytes) -> _Line | None:
    fields = line.split(maxsplit=5)
    if len(fields) < 5:
        return None
    try:
        return _Line(_parse_fields(fields), fields[1][2:3] == b"x")
    except ValueError:
        return None


def _file_beside(lines: Iterable[_Line | None]) -> _Line | None:
    """Return the nearest mapping of a file, beyond other anonymous memory that is executable."""
    for line in lines:
        if line is None or not is_anonymous(line.mapping.path):
            return line
        if not line.is_executable:
            return None
    return None


def _as_text(mapping: Mapping, before: _Line | None, after: _Line | None) -> Mapping:
    """Return anonymous memory as a mapping of the file around it, if it is in place of its code.

    Both neighbours have to be of one file. If they are executable, they are parts of the same
    segment, and say where the memory between belongs; segments of data have to agree.
    """
    if before is None or after is None or not after.mapping.inode:
        return mapping
    if not before.mapping.is_same_file(after.mapping):
        return mapping
    code = [line.mapping for line in (before, after) if line.is_executable]
    shifts = {each.start - each.file_offset for each in code or (before.mapping, after.mapping)}
    if len(shifts) != 1:
        return mapping
    file_offset = mapping.start - shifts.pop()
    if file_offset < 0:
        return mapping
    return replace(after.mapping, start=mapping.start, end=mapping.end, file_offset=file_offset)


class TooManyMappings(Exception):  # noqa: N818 - not a fault
    """The process has more than MAX_MAPPINGS executable mappings."""


def read_maps(fd: int) -> list[Mapping]:
    """Read the executable mappings of a process from its open /proc/PID/maps, in bounded time.

    Raises:
        TooManyMappings
        OSError: the process has exited.
    """
    text = _read(fd, _SHORT_BYTES)
    if len(text) < _SHORT_BYTES:
        return parse_maps(text)
    try:
        return _query_maps(fd)
    except OSError:  # an older kernel
        lines = _executable_lines(fd, text)
    if len(lines) > MAX_MAPPINGS:
        raise TooManyMappings
    return parse_maps(b"".join(lines))


def _read(fd: int, limit_bytes: int) -> bytes:
    parts = []
    while limit_bytes > 0 and (part := os.read(fd, limit_bytes)):  # the kernel gives a page at once
        parts.append(part)
        limit_bytes -= len(part)
    return b"".join(parts)


def _executable_lines(fd: int, text: bytes) -> list[bytes]:
    """Return the lines of executable mappings of `text` and of what follows it."""
    lines: list[bytes] = []
    left_bytes = _LONGEST_BYTES
    while text and left_bytes > 0 and len(lines) <= MAX_MAPPINGS:
        end = text.rfind(b"\n") + 1
        lines += _EXECUTABLE_LINE.findall(text, 0, end)
        more = _read(fd, _SHORT_BYTES)
        left_bytes -= len(more)
        text = text[end:] + more if more else b""
    return lines


class _Query(ctypes.Structure):
    """struct procmap_query."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("size", "query_flags", "query_addr")),
        *((name, ctypes.c_uint64) for name in ("vma_start", "vma_end", "vma_flags")),
        *((name, ctypes.c_uint64) for name in ("vma_page_size", "vma_offset", "inode")),
        *((name, ctypes.c_uint32) for name in ("dev_major", "dev_minor")),
        *((name, ctypes.c_uint32) for name in ("vma_name_size", "build_id_size")),
        *((name, ctypes.c_uint64) for name in ("vma_name_addr", "build_id_addr")),
    )


def _query_maps(fd: int) -> list[Mapping]:
    """Ask for the executable mappings alone: some databases have 65,000 others.

    No build ids: for those the kernel reads the files, which may be on a file system that hangs.
    """
    mappings: list[Mapping] = []
    address = 0
    while len(mappings) <= MAX_MAPPINGS:
        line = _query(fd, address, _EXECUTABLE | _COVERING_OR_NEXT)
        if line is None:
            return mappings
        mapping = line.mapping
        address = mapping.end
        if is_anonymous(mapping.path):
            before, after = _query_before(fd, mapping.start), _query_after(fd, mapping.end)
            mapping = _as_text(mapping, _file_beside(before), _file_beside(after))
        mappings.append(mapping)
    raise TooManyMappings


_path = ctypes.create_string_buffer(_PATH_BYTES)  # making one takes longer than the query


def _query(fd: int, address: int, flags: int) -> _Line | None:
    """Return the mapping at an address, or what else `flags` ask for; None if there is none."""
    path = _path
    query = _Query(size=ctypes.sizeof(_Query), query_flags=flags, query_addr=address)
    query.vma_name_addr, query.vma_name_size = ctypes.addressof(path), _PATH_BYTES
    try:
        fcntl.ioctl(fd, _PROCMAP_QUERY, query)
    except FileNotFoundError:
        return None
    mapping = Mapping(
        start=query.vma_start,
        end=query.vma_end,
        file_offset=query.vma_offset,
        path=path.value if query.vma_name_size else b"",
        device=(query.dev_major, query.dev_minor),
        inode=query.inode,
    )
    return _Line(mapping, bool(query.vma_flags & _EXECUTABLE))


def _query_before(fd: int, start: int) -> Iterator[_Line | None]:
    """Return the mappings that end at an address, at the start of that one, and so on."""
    for _ in range(_NEIGHBOURS):
        line = _query(fd, start - 1, 0) if start else None
        yield line
        if line is None:
            return
        start = line.mapping.start


def _query_after(fd: int, end: int) -> Iterator[_Line | None]:
    for _ in range(_NEIGHBOURS):
        line = _query(fd, end, _COVERING_OR_NEXT)
        yield line
        if line is None:
            return
        end = line.mapping.end


def _parse_fields(fields: list[bytes]) -> Mapping:
    start, _, end = fields[0].partition(b"-")
    major, _, minor = fields[3].partition(b":")
    return Mapping(
        start=int(start, 16),
        end=int(end, 16),
        file_offset=int(fields[2], 16),
        path=fields[5].replace(rb"\012", b"\n") if len(fields) > 5 else b"",
        device=(int(major, 16), int(minor, 16)),
        inode=int(fields[4]),
    )


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class MappingTable:
    """The executable mappings of one process, sorted and without overlaps. Equal only to itself.

    Attributes:
        missing: the module of an address outside all mappings: `[unknown]`, `[exited]` for a
            process that exited before its mappings were read, or `[too many mappings]`.
    """

    mappings: tuple[Mapping, ...]
    starts: npt.NDArray[np.uint64]
    ends: npt.NDArray[np.uint64]
    missing: str = "[unknown]"

    @classmethod
    def of(cls, mappings: Iterable[Mapping], missing: str = "[unknown]") -> "MappingTable":
        """Build the table. A later mapping replaces earlier ones in its range, as mmap does."""
        return cls._of([], mappings, missing)

    def after(self, mappings: Iterable[Mapping]) -> "MappingTable":
        """Return the table after further mappings; this one, if it has all of them already."""
        more = list(mappings)
        if all(self._has(mapping) for mapping in more):
            return self
        table = self._of(list(self.mappings), more, self.missing)
        return self if table.mappings == self.mappings else table

    def _has(self, mapping: Mapping) -> bool:
        place = int(np.searchsorted(self.starts, np.uint64(mapping.start), side="right")) - 1
        return place >= 0 and self.mappings[place] == mapping

    @classmethod
    def _of(cls, kept: list[Mapping], mappings: Iterable[Mapping], missing: str) -> "MappingTable":
        for mapping in mappings:
            _map_over(kept, mapping)
        return cls(
            tuple(kept),
            np.array([mapping.start for mapping in kept], dtype=np.uint64),
            np.array([mapping.end for mapping in kept], dtype=np.uint64),
            missing,
        )

    def find(self, addresses: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """Return the index of the mapping that holds each address, -1 if there is none."""
        if not self.mappings:
            return np.full(len(addresses), -1, dtype=np.int64)
        found = np.searchsorted(self.starts, addresses, side="right").astype(np.int64) - 1
        found[(found >= 0) & (addresses >= self.ends[found])] = -1
        return found


def _map_over(kept: list[Mapping], mapping: Mapping) -> None:
    if mapping.start >= mapping.end:
        return
    if not kept or kept[-1].end <= mapping.start:  # as most come by address
        kept.append(mapping)
        return
    first = bisect_right(kept, mapping.start, key=lambda m: m.end)
    last = bisect_left(kept, mapping.end, key=lambda m: m.start)
    if first + 1 == last and _is_text_of(kept[first], mapping):
        return
    rest = []
    if first < last:
        before, after = kept[first], kept[last - 1]
        if before.start < mapping.start:
            rest.append(replace(before, end=mapping.start))
        rest.append(mapping)
        if after.end > mapping.end:
            moved = mapping.end - after.start
            rest.append(replace(after, start=mapping.end, file_offset=after.file_offset + moved))
    else:
        rest.append(mapping)
    kept[first:last] = rest


# Programs are loaded below, libraries above this address, unless a program has no interpreter.
_LIBRARIES_FROM = 0x7000_0000_0000


def _is_text_of(file: Mapping, mapping: Mapping) -> bool:
    """Return whether anonymous memory is in place of a file's code, to have that on huge pages.

    No record tells that a library was unmapped, and other code may be mapped in its place later. So
    there, a part of the library has to be left on both sides.
    """
    if not file.inode or not is_anonymous(mapping.path) or mapping.path.startswith(b"\0"):
        return False
    if file.start >= _LIBRARIES_FROM:
        return file.start < mapping.start and mapping.end < file.end
    return file.start <= mapping.start and mapping.end <= file.end


def is_anonymous(path: bytes) -> bool:
    """Return whether a mapping's path stands for memory without a file."""
    return (
        not path.startswith((b"/", b"["))
        or path.startswith((b"//anon", b"/dev/zero", b"/SYSV", b"/anon_hugepage", b"[anon"))
        or path in (b"[heap]", b"[stack]")
    )


def is_of_compiler(path: bytes) -> bool:
    """Return whether code in a mapping may be a just-in-time compiler's.

    It is in memory without a file; .NET maps a file in memory twice, to write and to run it.
    """
    return is_anonymous(path) or path.startswith(b"/memfd:doublemapper")
