"""What a process had mapped at a moment that has passed, also when it is gone by now.

Samples come late: by the time they are drained most short processes have exited, and others have
started another program. So the kernel's records (`bpf.records`) are kept for a few seconds in a log
for each process, undecoded, since most processes are never sampled. A sampled one is asked for by
pid and time, and only then the records are read.

A process is one use of a pid, from its FORK record to the next use of the pid. Each of its execs
begins a new process generation. What it has mapped at a time follows from the last of these before
that time, and the MMAP2 records since:

- its exec, which begins with nothing mapped;
- its base: what its parent had when it forked, or /proc/PID/maps for a process that is older than
  the rings, or an older state that the log was folded into.

The kernel does not report munmap. A mapping stays in the table until another takes its range, and
as no code runs in a range that is not mapped, no sample is named wrongly by it. After a gap in the
records every process starts anew. If the mappings are not known, the table is empty and says
`[exited]`.

A process with too many mappings is degraded: its records are left out by the rings, and its maps
are not read again, also after a gap, for as long as it runs the same program.
"""

import logging
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from weakref import WeakKeyDictionary

from bpf.records import (
    PERF_RECORD_COMM,
    PERF_RECORD_EXIT,
    PERF_RECORD_FORK,
    PERF_RECORD_MMAP2,
    Record,
    Rings,
    decode_task,
)
from profiler.processes.generations import TICK_NS, other_threads, read_stat
from profiler.processes.lifetimes import Lifetimes
from profiler.processes.mapping_log import (
    EXITED,
    MAX_RECORDS,
    NEVER_NS,
    RECORD_BYTES,
    TOO_MANY,
    Base,
    MappingLog,
    time_of,
)
from profiler.processes.snapshots import Doubts, maps_of
from symbolizer.maps import MAX_MAPPINGS, Mapping, MappingTable, TooManyMappings

log = logging.getLogger(__name__)

RETENTION_NS = 4_000_000_000
"""How long an ended process is kept. Samples are drained a second or two after their records."""
MAX_LOG_BYTES = 8 << 20
"""All logs together; 1,000 execs a second need two thirds of it. Beyond it the oldest logs go,
their processes need a snapshot, and `dropped_logs` says how many they were."""

_MAX_USERS = 16  # of one table: forked workers, the latest
_MAX_ANCESTORS = 4
_WARN_EVERY_NS = 10_000_000_000
_MAX_DEGRADED = 1024
"""So many are known again after a gap."""
_FOLD_RECORDS = 64  # JIT compilers may map without end: longer logs are folded into the base


class AddressSpaces:
    """What every process of the host has mapped, and had a few seconds ago.

    The owner drains the samples, calls `poll`, asks for the `mappings` of each sampled process and
    then calls `expire`, each about once a second. Not thread-safe.

    Attributes:
        snapshots: how often /proc/PID/maps was read.
        gaps: how often records were lost, so that all processes had to start anew.
        degraded: processes that had too many mappings to be followed.
        dropped_logs: logs dropped because all of them together were too large.
        doubted: how often a table lacked code that its process was running.
        log_bytes: what the logs occupy now.
    """

    def __init__(
        self, rings: Rings, proc: Path = Path("/proc"), lifetimes: Lifetimes | None = None
    ) -> None:
        """Read the rings; `lifetimes` takes all that is read of them too."""
        self.snapshots = 0
        self.gaps = 0
        self.degraded = 0
        self.dropped_logs = 0
        self.doubted = 0
        self.log_bytes = 0
        self._rings = rings
        self._proc = str(proc)
        self._lifetimes = lifetimes
        self._trusted_ns = self._newest_ns = rings.opened_ns
        self._current: dict[int, MappingLog] = {}
        self._past: dict[int, list[MappingLog]] = {}
        self._ended: deque[MappingLog] = deque()
        self._long: set[MappingLog] = set()
        self._too_many: dict[int, tuple[int, int]] = {}
        self._doubts = Doubts()
        self._next_warning_ns: dict[str, int] = {}
        self._users: WeakKeyDictionary[MappingTable, dict[int, None]] = WeakKeyDictionary()

    def poll(self) -> None:
        """Append what the kernel has recorded to the logs."""
        self._read_rings()
        for process in [each for each in self._long if len(each.records) > MAX_RECORDS]:
            self._shorten(process)
        if self.log_bytes > MAX_LOG_BYTES:
            self._drop_oldest_logs()

    def mappings(self, pid: int, at_ns: int, start_ns: int | None = None) -> MappingTable:
        """Return what the process had mapped executable at `at_ns`, a time before the last `poll`.

        Times are CLOCK_MONOTONIC. The same object comes back as long as nothing has changed. With
        `start_ns`, the start of the process in time since boot, /proc is not believed when a later
        process has got the pid.
        """
        table = self._mappings(pid, at_ns, start_ns)
        users = self._users.setdefault(table, {})
        if pid not in users:
            if len(users) >= _MAX_USERS:
                del users[next(iter(users))]
            users[pid] = None
        return table

    def _mappings(self, pid: int, at_ns: int, start_ns: int | None) -> MappingTable:
        # Added only to be read: no record will ever end one that had exited by then.
        process = self._current.get(pid) or MappingLog(pid, self._trusted_ns)
        if at_ns >= process.begin_ns:
            return self._table(self._add(process), at_ns, start_ns)
        newer = process
        for older in reversed(self._past.get(pid, ())):
            if older.begin_ns <= at_ns <= older.end_ns:
                return self._table(older, at_ns, start_ns)
            if older.begin_ns <= at_ns:
                if newer is process:
                    self._add(process)
                return self._table_in_gap(older, newer, start_ns)
            newer = older
        return EXITED

    def doubt(self, pid: int, start_ns: int) -> None:
        """Read again what a process has mapped: it ran code that its table does not have.

        The kernel writes no record of mremap, and on a busy host it was seen to write none of an
        exec.
        """
        if not self._doubts.is_due(pid, start_ns, time.monotonic_ns()):
            return
        process = self._current.get(pid)
        if process is None or process.exit_ns or process.is_degraded:
            return
        if self._start_ticks(pid) == start_ns // TICK_NS:
            self.doubted += 1
            self._begin_anew(process)

    def parent_of(self, pid: int) -> int | None:
        """Return the parent of a process, also one that has exited; None if no record names it."""
        past = self._past.get(pid)
        process = self._current.get(pid) or (past[-1] if past else None)
        return process.parent_pid if process and process.parent_pid else None

    def status(self) -> dict[str, int]:
        """Return what the agent's status shows of it."""
        return {
            "snapshots": self.snapshots,
            "gaps": self.gaps,
            "degraded": self.degraded,
            "dropped_logs": self.dropped_logs,
            "doubted": self.doubted,
            "log_bytes": self.log_bytes,
        }

    def living(self, mappings: MappingTable) -> list[int]:
        """Return processes that run and can be asked for the files of a table, a few at most.

        They have been sampled with this table, or have forked one that was. Each may have exited
        since the last `poll`, so the next one has to be tried then.
        """
        pids = dict(self._users.get(mappings, {}))
        for user in list(pids):
            pid = self.parent_of(user)
            for _ in range(_MAX_ANCESTORS):
                if not pid or pid in pids:
                    break
                pids[pid] = None
                pid = self.parent_of(pid)
        return [pid for pid in pids if self._is_of(pid, mappings)]

    def _is_of(self, pid: int, mappings: MappingTable) -> bool:
        """Return whether a process still runs the program that a table is of."""
        process = self._current.get(pid)
        if process is None or (process.exit_ns and not other_threads(pid, self._proc)):
            return False
        table = process.table_at(max(self._newest_ns, process.begin_ns))
        if table is None or table is mappings:
            return table is mappings
        # Addresses are random, so another program's are not the same.
        return bool(table.mappings) and _places(table.mappings[:1]) == _places(
            mappings.mappings[:1]
        )

    def expire(self, now_ns: int) -> None:
        """Drop what ended a while before `now_ns`. Call it after the `mappings` of a drain."""
        until_ns = now_ns - RETENTION_NS
        while self._ended and self._ended[0].ended_ns <= until_ns:
            process = self._ended.popleft()
            if self._current.get(process.pid) is process:
                if not process.exit_ns:
                    continue
                if other_threads(process.pid, self._proc):
                    process.exit_ns = now_ns
                    self._ended.append(process)
                    continue
            self._settle_children(process)
            self._drop(process)
        for process in list(self._long):
            self._fold(process, until_ns)

    def _read_rings(self) -> None:
        records, gaps = self._rings.read()
        if self._lifetimes is not None:
            self._lifetimes.take(records, self._rings.last_exits)
        self._rings.last_exits.clear()
        if gaps:
            start_ns = min(gap.start_ns for gap in gaps)
            before = bisect_right(records, start_ns, key=time_of)
            self._append(records[:before])
            self._cut(start_ns, max(gap.end_ns for gap in gaps))
            records = records[before:]
        self._append(records)
        for pid in self._rings.take_doubtful():
            if pid in self._current:
                self._begin_anew(self._current[pid])

    def _append(self, records: Sequence[Record]) -> None:  # noqa: C901 - runs for every record
        current, trusted_ns = self._current, self._trusted_ns
        for record in records:
            time_ns, type_, _, pid, raw = record
            if time_ns <= trusted_ns:
                continue
            process = current.get(pid)
            if type_ == PERF_RECORD_FORK:
                self._add_child(record, process)
            elif type_ == PERF_RECORD_EXIT:
                if process is not None:
                    process.exit_ns = time_ns
                    self._ended.append(process)
            else:
                if process is None:
                    process = self._add(MappingLog(pid, trusted_ns))
                process.exit_ns = 0  # only its first thread had exited
                if type_ == PERF_RECORD_COMM:
                    process.exec(time_ns)
                elif type_ == PERF_RECORD_MMAP2 and not process.is_degraded:
                    process.append(record)
                    self.log_bytes += len(raw) + RECORD_BYTES
                if len(process.records) + len(process.execs) > _FOLD_RECORDS:
                    self._long.add(process)
        if records:
            self._newest_ns = records[-1].time_ns

    def _add(self, process: "MappingLog") -> "MappingLog":
        self._current[process.pid] = process
        return process

    def _add_child(self, fork: Record, old: "MappingLog | None") -> None:
        parent_pid = decode_task(fork).parent_pid
        parent = self._current.get(parent_pid) or self._add(
            MappingLog(parent_pid, self._trusted_ns)
        )
        if old is not None:
            del self._current[fork.pid]
            self._retire(old, fork.time_ns - 1)
        self._add(MappingLog(fork.pid, fork.time_ns, parent))

    def _retire(self, process: "MappingLog", end_ns: int) -> None:
        process.end_ns = end_ns
        self._past.setdefault(process.pid, []).append(process)
        self._ended.append(process)

    def _cut(self, start_ns: int, end_ns: int) -> None:
        """End all processes where the records end. What runs on after the gap starts anew."""
        self.gaps += 1
        self._warn("lost records gap_ns=%d total=%d", end_ns - start_ns, self._rings.lost)
        for process in list(self._current.values()):
            if process.begin_ns <= start_ns:
                self._retire(process, start_ns)
            else:
                self._drop(process)
        self._current.clear()
        self._long.clear()
        self._rings.muted.clear()  # an exec may be among what was lost
        self._trusted_ns = max(self._trusted_ns, end_ns)

    def _drop_oldest_logs(self) -> None:
        for process in [*self._ended, *self._current.values()]:
            if self.log_bytes <= MAX_LOG_BYTES:
                break
            if process.records:
                self.dropped_logs += 1
                self._begin_anew(process)
        self._warn("dropped logs total=%d", self.dropped_logs)

    def _warn(self, message: str, *values: int) -> None:
        """Log what any process may bring about as often as it likes, each message now and then."""
        now_ns = time.monotonic_ns()
        if now_ns >= self._next_warning_ns.get(message, 0):
            self._next_warning_ns[message] = now_ns + _WARN_EVERY_NS
            log.warning(message, *values)

    def _begin_anew(self, process: "MappingLog") -> None:
        """Drop a log. If the process still runs, /proc tells what it has from here on."""
        is_current = self._current.get(process.pid) is process
        self._drop(process)
        if is_current:
            again = self._add(MappingLog(process.pid, self._newest_ns))
            again.exit_ns = process.exit_ns
            if again.exit_ns:
                self._ended.append(again)

    def _settle_children(self, process: "MappingLog") -> None:
        """Work out what its children have from it, while that can still be known.

        Only for children that still use it, or have children themselves that may.
        """
        for child in list(process.children):
            runs_on_it = (
                self._current.get(child.pid) is child and not child.exit_ns and not child.execs
            )
            if child.base is None and (runs_on_it or child.children):
                self._table(child, child.begin_ns)

    def _drop(self, process: "MappingLog") -> None:
        self.log_bytes -= process.clear()
        self._long.discard(process)
        if self._current.get(process.pid) is process:
            del self._current[process.pid]
        past = self._past.get(process.pid, [])
        if process in past:
            past.remove(process)
            if not past:
                del self._past[process.pid]

    def _fold(self, process: "MappingLog", until_ns: int) -> None:
        """Replace the records up to a time by the state they lead to."""
        changes_ns = [*process.execs, *(record.time_ns for record in process.records)]
        moment_ns = max((t for t in changes_ns if t <= until_ns), default=0)
        if not moment_ns or (process.base is not None and process.base.end_ns > moment_ns):
            return
        table = None
        if process.base or process.parent or min(process.execs, default=NEVER_NS) <= moment_ns:
            table = self._table(process, moment_ns)
        self.log_bytes -= process.fold(moment_ns, table)
        if len(process.records) + len(process.execs) <= _FOLD_RECORDS:
            self._long.discard(process)

    def _shorten(self, process: "MappingLog") -> None:
        """Fold the whole log of a process; one that has too much mapped is degraded."""
        if process.base is None and process.parent is None and not process.execs:
            self._begin_anew(process)  # never sampled: /proc can tell when it is
            return
        if process.count_starts() > MAX_MAPPINGS:  # much cheaper than its table
            self._degrade(process)
            return
        moment_ns = process.records[-1].time_ns
        table = self._table(process, moment_ns)
        if len(table.mappings) > MAX_MAPPINGS or table.missing == TOO_MANY.missing:
            self._degrade(process)
        elif self._current.get(process.pid) is process:
            # The newer half stays: samples of its time are still to come.
            moment_ns = process.records[len(process.records) // 2].time_ns
            self.log_bytes -= process.fold(moment_ns, self._table(process, moment_ns))

    def _degrade(self, process: "MappingLog") -> None:
        self.degraded += 1
        self._warn("too many mappings pid=%d total=%d", process.pid, self.degraded)
        self.log_bytes -= process.degrade()
        self._long.discard(process)
        if self._current.get(process.pid) is process:
            self._rings.muted.add(process.pid)
            self._remember_too_many(process.pid, self._program(process.pid))

    def _remember_too_many(self, pid: int, program: tuple[int, int] | None) -> None:
        self._too_many.pop(pid, None)
        if program is not None:
            self._too_many[pid] = program
            if len(self._too_many) > _MAX_DEGRADED:
                del self._too_many[next(iter(self._too_many))]

    def _program(self, pid: int) -> tuple[int, int] | None:
        """Return what another program in a process does not share: its start and its stack."""
        stat = read_stat(pid, self._proc)
        return (stat.start_ticks, stat.stack) if stat and stat.stack else None

    def _table(
        self, process: "MappingLog", at_ns: int, start_ns: int | None = None
    ) -> MappingTable:
        """Return a process's table, working out its base if need be.

        The oldest ancestor that it depends on comes first: its snapshot serves all its children,
        of which most are gone by now.
        """
        chain: list[tuple[MappingLog, int]] = []
        ancestor, moment_ns = process, at_ns
        while (table := ancestor.table_at(moment_ns)) is None:
            chain.append((ancestor, moment_ns))
            if ancestor.parent is None:
                break
            moment_ns, ancestor = ancestor.begin_ns, ancestor.parent
        for descendant, moment_ns in reversed(chain):
            base = table and Base(table, descendant.begin_ns, descendant.begin_ns)
            if table is None or table.missing == EXITED.missing:
                asked_start_ns = start_ns if descendant is process else None
                base = self._snapshot(descendant, moment_ns, asked_start_ns) or base
            descendant.settle(base or Base(EXITED, 0, 0))
            table = descendant.table_at(moment_ns)
        assert table is not None
        return table

    def _table_in_gap(
        self, older: "MappingLog", newer: "MappingLog", start_ns: int | None
    ) -> MappingTable:
        """Return what was mapped both before and after the gap, so most likely also within it."""
        if newer.was_forked:
            return EXITED
        if older.bridge is None:
            before = self._table(older, older.end_ns, start_ns)
            after = self._table(newer, newer.begin_ns, start_ns)
            older.bridge = _common(before, after)
        return older.bridge

    def _snapshot(self, process: "MappingLog", at_ns: int, start_ns: int | None) -> "Base | None":
        """Read /proc/PID/maps, if that still shows what the process had mapped at `at_ns`.

        The rings are read again afterwards: only so it is known whether the process started
        another program, or another process got the pid, before or while the file was read.
        """
        if self._current.get(process.pid) is not process or any(t > at_ns for t in process.execs):
            return None
        self.snapshots += 1
        begin_ns = time.monotonic_ns()
        start_ticks = self._start_ticks(process.pid)
        program = self._program(process.pid)
        try:
            if program is not None and program == self._too_many.get(process.pid):
                raise TooManyMappings
            mappings = maps_of(process.pid, self._proc) if start_ticks else []
        except TooManyMappings:
            mappings = None
            self._remember_too_many(process.pid, program)
        except ProcessLookupError:
            start_ticks = None
        is_same = start_ticks == self._start_ticks(process.pid)
        end_ns = time.monotonic_ns()
        self._read_rings()
        if start_ticks is None and not process.exit_ns:
            process.exit_ns = end_ns
            self._ended.append(process)
        if start_ticks is None or not is_same or self._current.get(process.pid) is not process:
            return None
        if start_ns is not None and start_ns // TICK_NS != start_ticks:
            return None
        if mappings is None:
            self._degrade(process)
            return Base(TOO_MANY, begin_ns, end_ns)
        return Base(self._same_as_before(process, mappings), begin_ns, end_ns)

    def _same_as_before(self, process: "MappingLog", mappings: list[Mapping]) -> MappingTable:
        """Return the table from before a gap if it still holds: much is kept for each table."""
        for older in self._past.get(process.pid, ())[-1:]:
            known = older.table_at(older.end_ns)
            if known is not None and _places(known.mappings) == _places(mappings):
                return known
        return MappingTable.of(mappings)

    def _start_ticks(self, pid: int) -> int | None:
        """Return when it started, which is unique to a pid."""
        stat = read_stat(pid, self._proc)
        return stat.start_ticks if stat else None


def _places(mappings: Iterable[Mapping]) -> list[tuple[int, int, int, bytes]]:
    # The vsyscall page is the same everywhere; no record tells of it.
    return [(m.start, m.end, m.file_offset, m.path) for m in mappings if m.path != b"[vsyscall]"]


def _common(before: MappingTable, after: MappingTable) -> MappingTable:
    """Return the mappings of `before` that `after` has too, though one may know less of them."""
    places = {(m.start, m.end, m.file_offset, m.file_path) for m in after.mappings}
    both = (m for m in before.mappings if (m.start, m.end, m.file_offset, m.file_path) in places)
    return MappingTable.of(both, "[exited]" if after.missing == "[exited]" else before.missing)
