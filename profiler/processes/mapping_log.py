"""What one process had mapped at any time of the last seconds, from the kernel's records of it."""

from bisect import bisect_right, insort
from collections.abc import Sequence
from dataclasses import replace
from operator import itemgetter
from typing import NamedTuple

from bpf.records import START, Record, decode_mmap2
from symbolizer.maps import MAX_MAPPINGS, Mapping, MappingTable

NEVER_NS = 1 << 63
RECORD_BYTES = 170
"""What a Record occupies besides its raw bytes."""
EXITED = MappingTable.of((), "[exited]")
TOO_MANY = MappingTable.of((), "[too many mappings]")
MAX_RECORDS = MAX_MAPPINGS
"""Of one process before they are folded: what it has mapped over and over counts once."""

_MAX_TABLES = 8  # of one process; two or three are in use within one drain
_UNKNOWN = MappingTable.of(())
_LATER = b"\0later"  # no path holds a NUL
time_of = itemgetter(0)


class Base(NamedTuple):
    """A state that does not come from the log. It was seen at some moment of the interval."""

    table: MappingTable
    begin_ns: int
    end_ns: int


class MappingLog:
    """One use of a pid, with its log: all generations of a process.

    Attributes:
        begin_ns: its fork, or the time from which on its records are complete.
        end_ns: the last moment that its log covers.
        exit_ns: when its first thread exited; 0 while that runs, or if others turned up later.
        parent: whose mappings it began with; None when that is no longer needed.
        parent_pid: who forked it; 0 if that was before the records.
        children: those whose `parent` it is.
        records: MMAP2 records by time.
        execs: when it started another program.
        bridge: its table within the gap that ended it.
        is_degraded: it has more than MAX_MAPPINGS, and no table of them until its next exec.
    """

    __slots__ = (
        "_tables",
        "base",
        "begin_ns",
        "bridge",
        "children",
        "end_ns",
        "execs",
        "exit_ns",
        "is_degraded",
        "parent",
        "parent_pid",
        "pid",
        "records",
        "was_forked",
    )

    def __init__(self, pid: int, begin_ns: int, parent: "MappingLog | None" = None) -> None:
        self.pid = pid
        self.begin_ns = begin_ns
        self.end_ns = NEVER_NS
        self.exit_ns = 0
        self.is_degraded = False
        self.was_forked = parent is not None
        self.parent = parent
        self.parent_pid = parent.pid if parent else 0
        self.children: set[MappingLog] = set()
        self.base: Base | None = None
        self.bridge: MappingTable | None = None
        self.records: list[Record] = []
        self.execs: tuple[int, ...] = ()
        self._tables: dict[int, MappingTable] = {}
        if parent is not None:
            parent.children.add(self)

    @property
    def ended_ns(self) -> int:
        return self.end_ns if self.end_ns != NEVER_NS else self.exit_ns

    def append(self, record: Record) -> None:
        if self.records and record.time_ns < self.records[-1].time_ns:
            insort(self.records, record, key=time_of)  # two threads of it mapped at once
            self._tables.clear()
        else:
            self.records.append(record)

    def count_starts(self) -> int:
        """Return how many places it has mapped something to."""
        return len({record.raw[START] for record in self.records})

    def settle(self, base: Base) -> None:
        self.base = base
        self._leave_parent()

    def fold(self, moment_ns: int, table: MappingTable | None) -> int:
        """Forget what happened up to a moment at which `table` was the state.

        Returns the bytes that were freed. Without a table nothing is known of the time before.
        """
        if table is None:
            self.begin_ns = moment_ns
        else:
            self.settle(Base(table, moment_ns, moment_ns))
        count = bisect_right(self.records, moment_ns, key=time_of)
        freed = _bytes_of(self.records[:count])
        del self.records[:count]
        self.execs = tuple(t for t in self.execs if t > moment_ns)
        return freed

    def degrade(self) -> int:
        """Forget what it has mapped, which is too much. Returns the bytes that were freed."""
        self.is_degraded = True
        self.settle(Base(TOO_MANY, 0, 0))
        self.execs = ()
        self._tables.clear()
        freed = _bytes_of(self.records)
        self.records.clear()
        return freed

    def exec(self, time_ns: int) -> None:
        self.execs += (time_ns,)
        self.is_degraded = False

    def clear(self) -> int:
        """Untie it from its relatives and forget its log. Returns the bytes that were freed."""
        self._leave_parent()
        for child in self.children:
            child.parent = None
        self.children.clear()
        freed = _bytes_of(self.records)
        self.records.clear()
        return freed

    def _leave_parent(self) -> None:
        if self.parent is not None:
            self.parent.children.discard(self)
            self.parent = None

    def table_at(self, at_ns: int) -> MappingTable | None:
        """Return the table at a time; None when that depends on a base that is not known yet."""
        from_ns = self._exec_before(at_ns)
        first = _UNKNOWN
        if not from_ns:
            if self.base is None:
                return None
            if at_ns < self.base.end_ns:
                return self._table_before(self.base, at_ns)
            first, from_ns, _ = self.base
        end = len(self.records)
        if end and self.records[-1].time_ns > at_ns:
            end = bisect_right(self.records, at_ns, key=time_of)
        if not end or self.records[end - 1].time_ns <= from_ns:
            return first
        key = self.records[end - 1].time_ns
        table = self._tables.get(key)
        if table is None:
            start = bisect_right(self.records, from_ns, key=time_of)
            nearest_ns = max((t for t in self._tables if from_ns < t < key), default=0)
            if nearest_ns:
                first = self._tables[nearest_ns]
                start = bisect_right(self.records, nearest_ns, key=time_of)
            table = first.after(_mappings_of(self.records[start:end]))
            self._keep(key, table)
        return table

    def _exec_before(self, at_ns: int) -> int:
        """Return when it exec'd last before a time; 0 if no record tells."""
        if not self.execs or self.execs[-1] <= at_ns:
            return self.execs[-1] if self.execs else 0
        return max((t for t in self.execs if t <= at_ns), default=0)

    def _table_before(self, base: Base, at_ns: int) -> MappingTable:
        """Return the table at a time before the base was seen: what has not been mapped since."""
        if any(at_ns < t <= base.end_ns for t in self.execs):
            return EXITED
        start = bisect_right(self.records, at_ns, key=time_of)
        end = bisect_right(self.records, base.end_ns, key=time_of)
        if start >= end:
            return base.table
        key = -self.records[start].time_ns
        table = self._tables.get(key)
        if table is None:
            later = [replace(m, path=_LATER) for m in _mappings_of(self.records[start:end])]
            both = MappingTable.of((*base.table.mappings, *later))
            earlier = (m for m in both.mappings if m.path != _LATER)
            table = MappingTable.of(earlier, base.table.missing)
            self._keep(key, table)
        return table

    def _keep(self, key: int, table: MappingTable) -> None:
        if len(self._tables) >= _MAX_TABLES:
            del self._tables[min(self._tables, key=abs)]
        self._tables[key] = table


def _bytes_of(records: Sequence[Record]) -> int:
    return sum(len(record.raw) for record in records) + len(records) * RECORD_BYTES


def _mappings_of(records: Sequence[Record]) -> list[Mapping]:
    """Decode records, each different one once: JIT compilers write the same ones all the time."""
    latest: dict[bytes, Record] = {}
    for record in records:
        content = record.raw[16:-8]
        latest.pop(content, None)
        latest[content] = record
    mappings = []
    for record in latest.values():
        mmap2 = decode_mmap2(record)
        mappings.append(
            Mapping(
                mmap2.start,
                mmap2.start + mmap2.size,
                mmap2.file_offset,
                mmap2.path,
                mmap2.device,
                mmap2.inode,
                mmap2.build_id,
            )
        )
    return mappings
