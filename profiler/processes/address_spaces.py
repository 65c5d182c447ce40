"""What a process had mapped at a moment that has passed, also when it is gone by now.

Samples come late: by the time they are drained most short processes have exited, and others have
started another program. So the kernel's records (`bpf.records`) are kept for a few seconds in a log
for each process, undecoded, since most processes are never sampled. A sampled one is asked for by
pid and time, and only then the records are read.

A life is one use of a pid, from its birth (FORK) to its next use. What it has mapped at a time
follows from the last of these before it, and the MMAP2 records since:

- its exec, which begins with nothing mapped;
- its base: what its parent had at its birth, or /proc/PID/maps for a process that is older than
  the rings, or an older state that the log was folded into.

The kernel does not tell of munmap. A mapping stays in the table until another takes its range, and
as no code runs in a range that is not mapped, no sample is named wrongly by it. Lives after a gap
in the records start anew. Where the truth is not known the table is empty and says `[exited]`.
"""

import logging
import os
import time
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from bpf.records import (
    PERF_RECORD_COMM,
    PERF_RECORD_EXIT,
    PERF_RECORD_FORK,
    PERF_RECORD_MMAP2,
    Record,
    Rings,
    decode_mmap2,
    decode_task,
)
from symbolizer.maps import Mapping, MappingTable, parse_maps

log = logging.getLogger(__name__)

RETENTION_NS = 4_000_000_000
"""How long an ended life is kept. Samples are drained every second or two, after their records."""

MAX_LOG_BYTES = 16 << 20
"""All logs together; 1,000 execs a second need a third of it. Beyond it the oldest logs go, their
processes need a snapshot, and `dropped_logs` says how many they were."""

_FOLD_RECORDS = 64  # JIT compilers may map without end: longer logs are folded into the base
_MAX_TABLES = 8  # of one life; two or three are in use within one drain
_RECORD_BYTES = 170  # what a Record occupies besides its raw bytes
_TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
_NEVER_NS = 1 << 63

_UNKNOWN = MappingTable.of(())
_EXITED = MappingTable.of((), "[exited]")
_LATER = b"\0later"  # no path holds a NUL
_time_of = itemgetter(0)


class Processes:
    """The lives of all processes of the host.

    The owner drains the samples, calls `poll`, asks for the `mappings` of each sampled process and
    then calls `expire`, each about once a second. Not thread-safe.

    Attributes:
        snapshots: how often /proc/PID/maps was read.
        gaps: how often records were lost, so that all lives had to start anew.
        dropped_logs: logs given up because all of them together were too large.
        log_bytes: what the logs occupy now.
    """

    def __init__(self, rings: Rings, proc: Path = Path("/proc")) -> None:
        self.snapshots = 0
        self.gaps = 0
        self.dropped_logs = 0
        self.log_bytes = 0
        self._rings = rings
        self._proc = str(proc)
        self._trusted_ns = self._newest_ns = rings.opened_ns
        self._lives: dict[int, _Life] = {}
        self._past: dict[int, list[_Life]] = {}
        self._ended: deque[_Life] = deque()
        self._long: set[_Life] = set()

    def poll(self) -> None:
        """Append what the kernel has recorded to the logs."""
        self._read_rings()
        if self.log_bytes > MAX_LOG_BYTES:
            self._drop_oldest_logs()

    def mappings(self, pid: int, at_ns: int, start_ns: int | None = None) -> MappingTable:
        """Return what the process had mapped executable at `at_ns`, a time before the last `poll`.

        Times are CLOCK_MONOTONIC. The same object comes back as long as nothing has changed. With
        `start_ns`, the start of the process in time since boot, /proc is not believed when a later
        process has got the pid.
        """
        life = self._lives.get(pid)
        if life is None:
            life = self._add(_Life(pid, self._trusted_ns))
        if at_ns >= life.begin_ns:
            return self._table(life, at_ns, start_ns)
        newer = life
        for older in reversed(self._past.get(pid, ())):
            if older.begin_ns <= at_ns <= older.end_ns:
                return self._table(older, at_ns, start_ns)
            if older.begin_ns <= at_ns:
                return self._table_in_gap(older, newer, start_ns)
            newer = older
        return _EXITED

    def parent_of(self, pid: int) -> int | None:
        """Return who bore a process, also one that is gone; None where no record told."""
        past = self._past.get(pid)
        life = self._lives.get(pid) or (past[-1] if past else None)
        return life.parent_pid if life and life.parent_pid else None

    def expire(self, now_ns: int) -> None:
        """Drop what ended a while before `now_ns`. Call it after the `mappings` of a drain."""
        until_ns = now_ns - RETENTION_NS
        while self._ended and self._ended[0].ended_ns <= until_ns:
            life = self._ended.popleft()
            if self._lives.get(life.pid) is life:
                if not life.exit_ns:
                    continue
                if self._other_threads(life.pid):
                    life.exit_ns = now_ns
                    self._ended.append(life)
                    continue
            self._settle_children(life)
            self._drop(life)
        for life in list(self._long):
            self._fold(life, until_ns)

    def _read_rings(self) -> None:
        records, gaps = self._rings.read()
        if gaps:
            start_ns = min(gap.start_ns for gap in gaps)
            before = bisect_right(records, start_ns, key=_time_of)
            self._append(records[:before])
            self._cut(start_ns, max(gap.end_ns for gap in gaps))
            records = records[before:]
        self._append(records)

    def _append(self, records: Sequence[Record]) -> None:  # noqa: C901 - runs for every record
        lives, trusted_ns = self._lives, self._trusted_ns
        for record in records:
            time_ns, type_, _, pid, raw = record
            if time_ns <= trusted_ns:
                continue
            life = lives.get(pid)
            if type_ == PERF_RECORD_FORK:
                self._bear(record, life)
            elif type_ == PERF_RECORD_EXIT:
                if life is not None:
                    life.exit_ns = time_ns
                    self._ended.append(life)
            else:
                if life is None:
                    life = self._add(_Life(pid, trusted_ns))
                life.exit_ns = 0  # only its first thread had exited
                if type_ == PERF_RECORD_MMAP2:
                    life.append(record)
                    self.log_bytes += len(raw) + _RECORD_BYTES
                elif type_ == PERF_RECORD_COMM:
                    life.execs += (time_ns,)
                if len(life.records) + len(life.execs) > _FOLD_RECORDS:
                    self._long.add(life)
        if records:
            self._newest_ns = records[-1].time_ns

    def _add(self, life: "_Life") -> "_Life":
        self._lives[life.pid] = life
        return life

    def _bear(self, fork: Record, old: "_Life | None") -> None:
        parent_pid = decode_task(fork).parent_pid
        parent = self._lives.get(parent_pid) or self._add(_Life(parent_pid, self._trusted_ns))
        if old is not None:
            del self._lives[fork.pid]
            self._retire(old, fork.time_ns - 1)
        self._add(_Life(fork.pid, fork.time_ns, parent))

    def _retire(self, life: "_Life", end_ns: int) -> None:
        life.end_ns = end_ns
        self._past.setdefault(life.pid, []).append(life)
        self._ended.append(life)

    def _cut(self, start_ns: int, end_ns: int) -> None:
        """End all lives where the records end. What lives on after the gap is a new life."""
        self.gaps += 1
        log.warning("lost records gap_ns=%d total=%d", end_ns - start_ns, self._rings.lost)
        for life in list(self._lives.values()):
            if life.begin_ns <= start_ns:
                self._retire(life, start_ns)
            else:
                self._drop(life)
        self._lives.clear()
        self._long.clear()
        self._trusted_ns = max(self._trusted_ns, end_ns)

    def _drop_oldest_logs(self) -> None:
        for life in [*self._ended, *self._lives.values()]:
            if self.log_bytes <= MAX_LOG_BYTES:
                break
            if life.records:
                self.dropped_logs += 1
                is_current = self._lives.get(life.pid) is life
                self._drop(life)
                if is_current:
                    again = self._add(_Life(life.pid, self._newest_ns))
                    again.exit_ns = life.exit_ns
                    self._ended.append(again)
        log.warning("dropped logs total=%d", self.dropped_logs)

    def _settle_children(self, life: "_Life") -> None:
        """Work out what its children have from it, while that can still be known.

        Only for those that live on it, or have children themselves that may.
        """
        for child in list(life.children):
            lives_on_it = (
                self._lives.get(child.pid) is child and not child.exit_ns and not child.execs
            )
            if child.base is None and (lives_on_it or child.children):
                self._table(child, child.begin_ns)

    def _drop(self, life: "_Life") -> None:
        self.log_bytes -= life.clear()
        self._long.discard(life)
        if self._lives.get(life.pid) is life:
            del self._lives[life.pid]
        past = self._past.get(life.pid, [])
        if life in past:
            past.remove(life)
            if not past:
                del self._past[life.pid]

    def _fold(self, life: "_Life", until_ns: int) -> None:
        """Replace the records up to a time by the state they lead to."""
        changes_ns = [*life.execs, *(record.time_ns for record in life.records)]
        moment_ns = max((t for t in changes_ns if t <= until_ns), default=0)
        if not moment_ns or (life.base is not None and life.base.end_ns > moment_ns):
            return
        table = None
        if life.base or life.parent or min(life.execs, default=_NEVER_NS) <= moment_ns:
            table = self._table(life, moment_ns)
        self.log_bytes -= life.fold(moment_ns, table)
        if len(life.records) + len(life.execs) <= _FOLD_RECORDS:
            self._long.discard(life)

    def _table(self, life: "_Life", at_ns: int, start_ns: int | None = None) -> MappingTable:
        """Return a life's table, working out its base if need be.

        The oldest ancestor that it depends on comes first: its snapshot serves all its children,
        of which most are gone by now.
        """
        chain: list[tuple[_Life, int]] = []
        ancestor, moment_ns = life, at_ns
        while (table := ancestor.table_at(moment_ns)) is None:
            chain.append((ancestor, moment_ns))
            if ancestor.parent is None:
                break
            moment_ns, ancestor = ancestor.begin_ns, ancestor.parent
        for descendant, moment_ns in reversed(chain):
            base = table and _Base(table, descendant.begin_ns, descendant.begin_ns)
            if table is None or table.missing == _EXITED.missing:
                asked_start_ns = start_ns if descendant is life else None
                base = self._snapshot(descendant, moment_ns, asked_start_ns) or base
            descendant.settle(base or _Base(_EXITED, 0, 0))
            table = descendant.table_at(moment_ns)
        assert table is not None
        return table

    def _table_in_gap(self, older: "_Life", newer: "_Life", start_ns: int | None) -> MappingTable:
        """Return what was mapped both before and after the gap, so most likely also within it."""
        if newer.was_forked:
            return _EXITED
        if older.bridge is None:
            before = self._table(older, older.end_ns, start_ns)
            after = self._table(newer, newer.begin_ns, start_ns)
            older.bridge = _common(before, after)
        return older.bridge

    def _snapshot(self, life: "_Life", at_ns: int, start_ns: int | None) -> "_Base | None":
        """Read /proc/PID/maps, if that can still tell what the life had mapped at `at_ns`.

        The rings are read again afterwards: only so it is known whether the process started
        another program, or another process got the pid, before or while the file was read.
        """
        if self._lives.get(life.pid) is not life or any(t > at_ns for t in life.execs):
            return None
        self.snapshots += 1
        begin_ns = time.monotonic_ns()
        start_ticks = self._start_ticks(life.pid)
        mappings = self._read_maps(life) if start_ticks else None
        is_same = start_ticks == self._start_ticks(life.pid)
        end_ns = time.monotonic_ns()
        self._read_rings()
        if start_ticks is None and not life.exit_ns:
            life.exit_ns = end_ns
            self._ended.append(life)
        if mappings is None or not is_same or self._lives.get(life.pid) is not life:
            return None
        if start_ns is not None and start_ns // _TICK_NS != start_ticks:
            return None
        return _Base(MappingTable.of(mappings), begin_ns, end_ns)

    def _start_ticks(self, pid: int) -> int | None:
        """Return starttime, field 22 of /proc/PID/stat, unique to a pid (proc_pid_stat(5))."""
        try:
            stat = Path(f"{self._proc}/{pid}/stat").read_bytes()
        except OSError:
            return None
        return int(stat.rpartition(b")")[2].split()[19])

    def _read_maps(self, life: "_Life") -> list[Mapping] | None:
        """Read the mappings, from another thread when the first one has exited.

        There are none where the kernel forbids it (ptrace(2), "access mode checking"). Paths are
        made relative to the root of the process, as they are in records.
        """
        pids = [f"{life.pid}"]
        if life.exit_ns:
            pids = [f"{life.pid}/task/{tid}" for tid in self._other_threads(life.pid)]
        for pid in pids:
            try:
                root = os.fsencode(Path(f"{self._proc}/{pid}/root").readlink())
                mappings = parse_maps(Path(f"{self._proc}/{pid}/maps").read_bytes())
            except PermissionError:
                return []
            except OSError:  # it has exited
                continue
            return mappings if root == b"/" else [_inside(root, m) for m in mappings]
        return None

    def _other_threads(self, pid: int) -> list[str]:
        try:  # a thousand times a second, so without pathlib
            tids = os.listdir(f"{self._proc}/{pid}/task")  # noqa: PTH208
            return [tid for tid in tids if tid != str(pid)]
        except OSError:
            return []


class _Base(NamedTuple):
    """A state that does not come from the log. It was seen at some moment of the interval."""

    table: MappingTable
    begin_ns: int
    end_ns: int


class _Life:
    """One use of a pid, with its log.

    Attributes:
        begin_ns: its birth, or the time from which on its records are complete.
        end_ns: the last moment that its log tells about.
        exit_ns: when its first thread exited; 0 while that lives or when others turned up later.
        parent: whose mappings it was born with; None when there is no need to know any more.
        parent_pid: who bore it; 0 where that was before the records.
        children: those whose `parent` it is.
        records: MMAP2 records by time.
        execs: when it started another program.
        bridge: its table within the gap that ended it.
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
        "parent",
        "parent_pid",
        "pid",
        "records",
        "was_forked",
    )

    def __init__(self, pid: int, begin_ns: int, parent: "_Life | None" = None) -> None:
        self.pid = pid
        self.begin_ns = begin_ns
        self.end_ns = _NEVER_NS
        self.exit_ns = 0
        self.was_forked = parent is not None
        self.parent = parent
        self.parent_pid = parent.pid if parent else 0
        self.children: set[_Life] = set()
        self.base: _Base | None = None
        self.bridge: MappingTable | None = None
        self.records: list[Record] = []
        self.execs: tuple[int, ...] = ()
        self._tables: dict[int, MappingTable] = {}
        if parent is not None:
            parent.children.add(self)

    @property
    def ended_ns(self) -> int:
        return self.end_ns if self.end_ns != _NEVER_NS else self.exit_ns

    def append(self, record: Record) -> None:
        if self.records and record.time_ns < self.records[-1].time_ns:
            insort(self.records, record, key=_time_of)  # two threads of it mapped at once
            self._tables.clear()
        else:
            self.records.append(record)

    def settle(self, base: _Base) -> None:
        self.base = base
        self._leave_parent()

    def fold(self, moment_ns: int, table: MappingTable | None) -> int:
        """Forget what happened up to a moment at which `table` was the state.

        Gives the bytes that were freed. Without a table nothing is known of the time before.
        """
        if table is None:
            self.begin_ns = moment_ns
        else:
            self.settle(_Base(table, moment_ns, moment_ns))
        count = bisect_right(self.records, moment_ns, key=_time_of)
        freed = _bytes_of(self.records[:count])
        del self.records[:count]
        self.execs = tuple(t for t in self.execs if t > moment_ns)
        return freed

    def clear(self) -> int:
        """Untie it from its relatives and forget its log. Gives the bytes that were freed."""
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
        from_ns = max((t for t in self.execs if t <= at_ns), default=0)
        first = _UNKNOWN
        if not from_ns:
            if self.base is None:
                return None
            if at_ns < self.base.end_ns:
                return self._table_before(self.base, at_ns)
            first, from_ns, _ = self.base
        start = bisect_right(self.records, from_ns, key=_time_of)
        end = bisect_right(self.records, at_ns, key=_time_of)
        if start >= end:
            return first
        key = self.records[end - 1].time_ns
        table = self._tables.get(key)
        if table is None:
            nearest_ns = max((t for t in self._tables if from_ns < t < key), default=0)
            if nearest_ns:
                first = self._tables[nearest_ns]
                start = bisect_right(self.records, nearest_ns, key=_time_of)
            changed = (*first.mappings, *_mappings_of(self.records[start:end]))
            table = MappingTable.of(changed, first.missing)
            if table.mappings == first.mappings:
                table = first
            self._keep(key, table)
        return table

    def _table_before(self, base: _Base, at_ns: int) -> MappingTable:
        """Return the table at a time before the base was seen: what has not been mapped since."""
        if any(at_ns < t <= base.end_ns for t in self.execs):
            return _EXITED
        start = bisect_right(self.records, at_ns, key=_time_of)
        end = bisect_right(self.records, base.end_ns, key=_time_of)
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


def _inside(root: bytes, mapping: Mapping) -> Mapping:
    if mapping.path.startswith(root + b"/"):
        return replace(mapping, path=mapping.path.removeprefix(root))
    return mapping


def _bytes_of(records: Sequence[Record]) -> int:
    return sum(len(record.raw) for record in records) + len(records) * _RECORD_BYTES


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


def _common(before: MappingTable, after: MappingTable) -> MappingTable:
    """Return the mappings of `before` that `after` has too, though one may know less of them."""
    places = {(m.start, m.end, m.file_offset, m.file_path) for m in after.mappings}
    both = (m for m in before.mappings if (m.start, m.end, m.file_offset, m.file_path) in places)
    return MappingTable.of(both, "[exited]" if after.missing == "[exited]" else before.missing)
