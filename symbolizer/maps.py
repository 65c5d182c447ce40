"""The executable mappings of a process, from /proc/PID/maps or from perf's MMAP2 records.

Both sources yield the same Mapping. A MappingTable is one state of one address space, sorted for
look-up; when a process maps more, it gets a new table.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

_DELETED = b" (deleted)"


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

    The kernel writes a newline in a path as `\012` and escapes nothing else, so a path that
    contains these four characters is ambiguous. Lines that cannot be parsed are left out: if the
    process exits, the file may end in the middle of one.
    """
    mappings = []
    for line in text.split(b"\n"):  # a path may contain a carriage return
        fields = line.split(maxsplit=5)
        if len(fields) < 5 or fields[1][2:3] != b"x":
            continue
        try:
            mappings.append(_parse_fields(fields))
        except ValueError:
            continue
    return mappings


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
        missing: the module of an address outside all mappings: `[unknown]`, or `[exited]` for a
            process that exited before its mappings were read.
    """

    mappings: tuple[Mapping, ...]
    starts: npt.NDArray[np.uint64]
    ends: npt.NDArray[np.uint64]
    missing: str = "[unknown]"

    @classmethod
    def of(cls, mappings: Iterable[Mapping], missing: str = "[unknown]") -> "MappingTable":
        """Build the table. A later mapping replaces earlier ones in its range, as mmap does."""
        kept: list[Mapping] = []
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
    first = bisect_right(kept, mapping.start, key=lambda m: m.end)
    last = bisect_left(kept, mapping.end, key=lambda m: m.start)
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


def is_anonymous(path: bytes) -> bool:
    """Return whether a mapping's path stands for memory without a file."""
    return (
        not path.startswith((b"/", b"["))
        or path.startswith((b"//anon", b"/dev/zero", b"/SYSV", b"/anon_hugepage", b"[anon"))
        or path in (b"[heap]", b"[stack]")
    )
