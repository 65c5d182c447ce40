"""Unwind tables in the kernel: what the walk needs to leave frames that keep no frame pointer.

The owner says which process has what mapped where, loads the rows of the executables that are
requested, and unloads them again; `requests` returns what a walk needed and did not find. All of it
is plain integers and arrays: who made them, and from what, is not known here. Layouts and the
meaning of rows are those of tables.bpf.h and frame.bpf.h.
"""

import mmap
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bpf import syscalls
from bpf.errors import BpfError, SyscallError
from bpf.interpreters import NO_RUNTIME, RUNTIME, Runtime, runtime_words
from bpf.ring import RingBuffer
from bpf.room import Extent, Room
from bpf.samples import ProcessGeneration

Rows = npt.NDArray[np.void]


class CfaKind(IntEnum):
    """How the canonical frame address is found; the last two: plus a DWARF register number."""

    HOLE = 0
    RSP = 1
    RBP = 2
    PLT = 3
    PLT_LAZY = 4
    DEREF_RBP = 5
    DEREF_RSP = 6
    SIGNAL = 7
    STOP = 8
    UNSUPPORTED = 9
    FRAME_POINTER = 10
    CLONE = 11
    OTHER_STACK = 12
    REGISTER = 16
    RETURN_REGISTER = 32


EVALUATES = 0x80
"""Added to the kind of a row in CPython's evaluation loop, whose frame is left as the kind says."""


class RbpKind(IntEnum):
    """Where the caller's frame pointer is."""

    SAME = 0
    AT_CFA = 1
    DEREF_RBP = 2
    UNDEFINED = 3
    DEREF_RSP = 4


RBX_UNKNOWN, RBX_SAME = 0, 1
"""Where the caller's rbx is, in the bits of a row's `rbp_kind` above RbpKind; by further numbers so
many words below the CFA."""


class TableState(IntEnum):
    """Whether an executable has a table: nobody looked yet, it has, it has none, it has no room."""

    UNKNOWN = 0
    LOADED = 1
    NONE = 2
    NO_ROOM = 3


PROCESS = np.dtype(
    [
        *(("version", "u8"), ("start_ns", "u8"), ("exec_id", "u8"), ("pid", "u4")),
        *(("space", "u4"), ("first", "u4"), ("count", "u4"), ("runtime", RUNTIME)),
        ("unused", "u8"),
    ]
)
MAPPING = np.dtype(
    [("start", "u8"), ("end", "u8"), ("file_offset", "u8"), ("executable", "u4"), ("unused", "u4")]
)
TABLE = np.dtype([("state", "u4"), ("low", "u4"), ("count", "u4"), ("first", "u4")])
PAGE = np.dtype([("first", "u4"), ("count", "u2"), ("unused", "u2")])
ROW = np.dtype(
    [("pc_low", "u2"), ("cfa", "u2"), ("cfa_kind", "u1"), ("rbp_kind", "u1"), ("rbp", "i2")]
)
REQUEST = np.dtype([("start_ns", "u8"), ("exec_id", "u8"), ("pid", "u4"), ("executable", "u4")])

PAGE_BITS = 12
SHARD_ROWS = 262_144
SHARD_BYTES = SHARD_ROWS * ROW.itemsize
PROCESSES_CAPACITY, PROCESS_PLACES = 16_384, 4
MAPPINGS_CAPACITY = 1 << 16
EXECUTABLES_CAPACITY = 16_384
PAGES_CAPACITY = 1 << 19
SHARDS_CAPACITY = 1_024
BLOCK_BITS = 6
KNOWN_SPACES, KNOWN_RULES, KNOWN_FRAMES = 32, 256, 64
"""Of each CPU: rules that were found, by address space, and those of the last walk there."""
KNOWN_SPACE_SIZE = KNOWN_FRAMES + KNOWN_RULES * 2 * ROW.itemsize
REQUEST_PAGES = 16
WAKE_PERIOD_NS = 100_000_000
DEFAULT_LIMIT_BYTES = 48_000_000
FIXED_BYTES = (
    PROCESSES_CAPACITY * PROCESS.itemsize
    + MAPPINGS_CAPACITY * MAPPING.itemsize
    + PAGES_CAPACITY * PAGE.itemsize
)
BYTES_PER_CPU = KNOWN_SPACES * KNOWN_SPACE_SIZE

_BPF_F_MMAPABLE = 1 << 10

MAPS = ("processes", "mappings", "executables", "pages", "shard", "shards", "requests")


class NoRoomError(BpfError):
    """The tables would take more memory than they may."""


class UnwindRequest(NamedTuple):
    """What a sample needed and did not find: an executable's rows, or (0) all about a process."""

    generation: ProcessGeneration
    executable: int


class MappingRow(NamedTuple):
    """One executable mapping, [start, end); memory without a file is executable 0."""

    start: int
    end: int
    file_offset: int
    executable: int


def constants() -> dict[str, int]:
    """Return what the programs are compiled with."""
    return {
        "PROCESS_SIZE": PROCESS.itemsize,
        "MAPPING_SIZE": MAPPING.itemsize,
        "TABLE_SIZE": TABLE.itemsize,
        "PAGE_SIZE_IN_MAP": PAGE.itemsize,
        "ROW_SIZE": ROW.itemsize,
        "REQUEST_SIZE": REQUEST.itemsize,
        "PAGE_BITS": PAGE_BITS,
        "SHARD_ROWS": SHARD_ROWS,
        "MMAPABLE": _BPF_F_MMAPABLE,
        "PROCESSES_CAPACITY": PROCESSES_CAPACITY,
        "PROCESS_PLACES": PROCESS_PLACES,
        "MAPPINGS_CAPACITY": MAPPINGS_CAPACITY,
        "EXECUTABLES_CAPACITY": EXECUTABLES_CAPACITY,
        "PAGES_CAPACITY": PAGES_CAPACITY,
        "SHARDS_CAPACITY": SHARDS_CAPACITY,
        "KNOWN_SPACES": KNOWN_SPACES,
        "KNOWN_RULES": KNOWN_RULES,
        "KNOWN_FRAMES": KNOWN_FRAMES,
        "KNOWN_SPACE_SIZE": KNOWN_SPACE_SIZE,
        "BLOCK_BITS": BLOCK_BITS,
        "REQUEST_PAGES": REQUEST_PAGES,
        "WAKE_PERIOD_NS": WAKE_PERIOD_NS,
        **{f"CFA_{kind.name}": kind.value for kind in CfaKind},
        **{f"RBP_{kind.name}": kind.value for kind in RbpKind},
        "EVALUATES": EVALUATES,
        "RBX_UNKNOWN": RBX_UNKNOWN,
        "RBX_SAME": RBX_SAME,
        **{f"TABLE_{state.name}": state.value for state in TableState},
    }


class Tables:
    """The maps that the walk reads. Descriptors stay the caller's.

    What is unloaded may still be read by a walk that has begun: its room is used again only after
    `settle`, which the caller calls when no such walk can run any more.
    """

    def __init__(self, fds: Mapping[str, int], limit_bytes: int, cpus: int) -> None:
        self._fds = fds
        self._fixed_bytes = FIXED_BYTES + cpus * BYTES_PER_CPU
        self._limit_bytes = limit_bytes
        self._shards: list[_Shard] = []
        self._rows = Room()
        self._pages = Room()
        self._pages.add(0, PAGES_CAPACITY)
        self._loaded: dict[int, _LoadedTable] = {}
        self._mappings = Room()
        self._mappings.add(0, MAPPINGS_CAPACITY)
        self._spaces: dict[int, Extent] = {}
        self._processes = _ProcessPlaces(fds["processes"])
        self._requests = RingBuffer(fds["requests"], REQUEST_PAGES * mmap.PAGESIZE)
        self._add_shard(fds["shard"])

    def fileno(self) -> int:
        """Return a descriptor that becomes readable when there are requests, now and then."""
        return self._fds["requests"]

    def close(self) -> None:
        self._requests.close()
        self._processes.close()
        for shard in self._shards:
            shard.close()
        self._shards.clear()

    @property
    def memory_bytes(self) -> int:
        """What rows, pages and address spaces take in the kernel, used or free."""
        return self._fixed_bytes + len(self._shards) * SHARD_BYTES

    def requests(self) -> list[UnwindRequest]:
        """Return what was requested since the last call, each once."""
        found = np.frombuffer(b"".join(self._requests.take()), REQUEST)
        return [
            UnwindRequest(ProcessGeneration(pid, start_ns, exec_id), executable)
            for start_ns, exec_id, pid, executable in dict.fromkeys(found.tolist())
        ]

    # Tables.

    def load(self, table: int, pages: Rows, rows: Rows) -> None:
        """Take in a table's rows.

        Args:
            table: a number that no other has.
            pages: `number` of each page of the file, ascending, and the `count` of its rows.
            rows: of dtype ROW, page after page, sorted by address within each.

        Raises:
            NoRoomError: they do not fit. Nothing has changed.
        """
        low = int(pages["number"][0])
        span = int(pages["number"][-1]) - low + 1
        counts = pages["count"].astype(np.int64)
        extents = self._take_rows(int(counts.sum()), int(counts.max()))
        place = self._pages.take(span)
        if place is None:
            self._rows.put_back(extents)
            raise NoRoomError("cannot load an unwind table: there are too many pages")
        entries = np.zeros(span, PAGE)
        used = self._fill(extents, pages, rows, entries, low)
        syscalls.update_batch(
            self._fds["pages"], np.arange(place.first, place.first + span, dtype=np.uint32), entries
        )
        value = np.array([(TableState.LOADED, low, span, place.first)], TABLE)
        self._loaded[table] = _LoadedTable(used, place, value.tobytes())

    def unload(self, table: int) -> None:
        """Unload a table's rows. No executable may refer to it any more."""
        loaded = self._loaded.pop(table)
        self._rows.leave(loaded.rows)
        self._pages.leave([loaded.pages])

    def set_table(self, executable: int, table: int) -> None:
        """Let an executable use a table that is loaded."""
        syscalls.update(self._fds["executables"], executable, self._loaded[table].value)

    def set_state(self, executable: int, state: TableState) -> None:
        """Say that an executable has no table: none that is known, or none at all."""
        value = np.array([(state, 0, 0, 0)], TABLE)
        syscalls.update(self._fds["executables"], executable, value.tobytes())

    def settle(self) -> None:
        """Free the room of what was unloaded: no walk of that time runs any more."""
        for room in (self._rows, self._pages, self._mappings):
            room.settle()

    # Processes.

    def add_space(self, space: int, mappings: Sequence[MappingRow]) -> None:
        """Describe an address space, by a number that no other has.

        Args:
            space: the number.
            mappings: at least one, sorted, without overlaps.

        Raises:
            NoRoomError: there is no room for it. Nothing has changed.
        """
        place = self._mappings.take(len(mappings))
        if place is None:
            raise NoRoomError("cannot take in an address space: others take all the memory")
        values = np.array([(*row, 0) for row in mappings], MAPPING)
        numbers = np.arange(place.first, place.end, dtype=np.uint32)
        syscalls.update_batch(self._fds["mappings"], numbers, values)
        self._spaces[space] = place

    def remove_space(self, space: int) -> None:
        """Remove an address space. No process may have it any more."""
        self._mappings.leave([self._spaces.pop(space)])

    def set_process(
        self, generation: ProcessGeneration, space: int, runtime: Runtime = NO_RUNTIME
    ) -> None:
        """Say which address space and runtime a process has in its current generation."""
        self._processes.put(generation, space, self._spaces[space], runtime)

    def remove_process(self, pid: int) -> None:
        self._processes.remove(pid)

    # Room for rows.

    def _take_rows(self, needed: int, largest: int) -> list[Extent]:
        """Take extents that hold so many rows, even when each wastes most of a page at its end."""
        taken: list[Extent] = []
        room = 0
        while room < needed:
            extent = self._rows.take_largest(largest)
            if extent:
                taken.append(extent)
                room += extent.count if extent.count >= needed - room else extent.count - largest
            elif not (self._may_grow() and largest <= SHARD_ROWS):
                self._rows.put_back(taken)
                raise NoRoomError("cannot load an unwind table: others take all the memory")
            else:
                try:
                    shard = syscalls.create_map(
                        syscalls.MAP_TYPE_ARRAY, 4, ROW.itemsize, SHARD_ROWS, flags=_BPF_F_MMAPABLE
                    )
                except SyscallError as error:  # a memory limit below ours, above all
                    self._rows.put_back(taken)
                    raise NoRoomError(f"cannot load an unwind table: {error}") from error
                self._add_shard(shard, is_ours=True)
        return taken

    def _may_grow(self) -> bool:
        is_within = self.memory_bytes + SHARD_BYTES <= self._limit_bytes
        return is_within and len(self._shards) < SHARDS_CAPACITY

    def _fill(
        self, extents: list[Extent], pages: Rows, rows: Rows, entries: Rows, low: int
    ) -> list[Extent]:
        """Put whole pages into one extent after the other; return those parts that were used."""
        used: list[Extent] = []
        left = list(reversed(extents))
        ends = np.cumsum(pages["count"].astype(np.int64))
        done = begun = 0
        while begun < len(pages):
            extent = left.pop()
            end = int(np.searchsorted(ends, done + extent.count, side="right"))
            size = int(ends[end - 1]) - done if end > begun else 0
            self._shards[extent.shard].write(extent.first, rows[done : done + size])
            here = entries[pages["number"][begun:end].astype(np.int64) - low]
            here["count"] = pages["count"][begun:end]
            here["first"] = (
                ends[begun:end] - here["count"] - done + extent.shard * SHARD_ROWS + extent.first
            )
            entries[pages["number"][begun:end].astype(np.int64) - low] = here
            used.append(self._rows.cut(extent, size))
            done, begun = done + size, end
        self._rows.put_back(left)
        return used

    def _add_shard(self, fd: int, *, is_ours: bool = False) -> None:
        number = len(self._shards)
        self._shards.append(_Shard(fd, is_ours))
        syscalls.update(self._fds["shards"], number, fd.to_bytes(4, sys.byteorder))
        self._rows.add(number, SHARD_ROWS)


class _LoadedTable(NamedTuple):
    rows: list[Extent]
    pages: Extent
    value: bytes


class _Shard(NamedTuple):
    """One map of rows."""

    fd: int
    is_ours: bool

    def write(self, first: int, rows: Rows) -> None:
        """Write through memory shared with the kernel, which is ours for as long as this takes."""
        with mmap.mmap(self.fd, SHARD_BYTES) as memory:
            start = first * ROW.itemsize
            memory[start : start + rows.nbytes] = rows.tobytes()

    def close(self) -> None:
        if self.is_ours:
            os.close(self.fd)


class _ProcessPlaces:
    """Places for processes, in memory shared with the kernel.

    A walk may read a place while it is written: `version` is odd for as long, and another one
    afterwards. Each assignment is one store of 8 bytes, which x86 keeps in order.
    """

    def __init__(self, fd: int) -> None:
        self._memory = mmap.mmap(fd, PROCESSES_CAPACITY * PROCESS.itemsize)
        self._words = memoryview(self._memory).cast("Q")
        self._next = 0

    def put(
        self, generation: ProcessGeneration, space: int, mappings: Extent, runtime: Runtime
    ) -> None:
        """Put it into a place. If all are taken, another process loses its own and asks again."""
        pid, start_ns, exec_id = generation
        places = list(self._places(pid))
        pids = [self._pid_at(place) for place in places]
        if pid in pids:
            place = places[pids.index(pid)]
        elif 0 in pids:
            place = places[pids.index(0)]
        else:
            self._next += 1
            place = places[self._next % PROCESS_PLACES]
        values = (start_ns, exec_id, pid | space << 32, mappings.first | mappings.count << 32)
        self._write(place, (*values, *runtime_words(runtime)))

    def remove(self, pid: int) -> None:
        for place in self._places(pid):
            if self._pid_at(place) == pid:
                self._write(place, (0,) * 6)

    def close(self) -> None:
        self._words.release()
        self._memory.close()

    def _places(self, pid: int) -> Iterator[int]:
        for nth in range(PROCESS_PLACES):
            yield (pid ^ nth) % PROCESSES_CAPACITY * (PROCESS.itemsize // 8)

    def _pid_at(self, place: int) -> int:
        return self._words[place + 3] & 0xFFFFFFFF

    def _write(self, place: int, values: Sequence[int]) -> None:
        self._words[place] += 1
        for i, value in enumerate(values, start=1):
            self._words[place + i] = value
        self._words[place] += 1
