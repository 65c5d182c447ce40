"""When processes ran, what they executed and who started them, from the kernel's own records.

/proc shows only what still runs; most short processes are gone before anybody looks. FORK, exec
and EXIT records tell of all of them, to the microsecond. A **lifetime** is a process from its fork
or an exec to its next exec or its end, as in `generations`; those that share one exec, as forked
workers do, share an `Execution`.

Records are on CLOCK_MONOTONIC, all times here on CLOCK_BOOTTIME, as starts in /proc and in samples.
If the machine was suspended, records of the last second before that cannot be told from those after
it, and are taken to be after it.

An EXIT record tells that the first thread has exited. Whether others run on is asked of /proc, and
their last exit is what counts then.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

from bpf.records import (
    PERF_RECORD_COMM,
    PERF_RECORD_EXIT,
    PERF_RECORD_FORK,
    PERF_RECORD_MMAP2,
    Record,
    decode_comm,
    decode_mmap2,
    decode_task,
)
from bpf.samples import ProcessGeneration
from profiler.processes.generations import boottime_ns, is_running

_KEPT_NS = 5_000_000_000
"""For how long what has ended is kept: samples are drained a second or two later."""
_MAX_ENDED = 16_384
"""Lifetimes that have ended and were not taken yet. Beyond it the oldest go, and are counted."""
_NEVER_NS = 1 << 63


class Execution:
    """What an exec has begun. All is empty for what is older than the records.

    `comm` is what the kernel called it: the first 15 bytes of the name of the file that was
    executed, of a script that names its interpreter the script's.
    """

    __slots__ = ("_mapped", "_program", "comm", "is_known")

    def __init__(self, comm: bytes = b"", *, is_known: bool = False) -> None:
        self.comm = comm
        self.is_known = is_known
        self._mapped: Record | None = None
        self._program: tuple[bytes, str] | None = None

    def map(self, record: Record) -> None:
        """Take what it maps; the first file is the executable."""
        if self._mapped is None:
            self._mapped = record

    @property
    def program(self) -> tuple[bytes, str]:
        """Return the path of its executable, as the process saw it, and the build id, if known."""
        if self._program is None:
            if self._mapped is None:
                return b"", ""
            mmap2 = decode_mmap2(self._mapped)
            self._program = mmap2.path, mmap2.build_id
        return self._program


class Lifetime:
    """One lifetime. Times are 0 for a begin before the records, far away while it goes on.

    Attributes:
        start_ns: when the process was forked; `begin_ns` may be a later exec.
        cgroup_id: that of its samples; 0 if it has had none.
        is_read: /proc has told of it, so it is counted there.
        kin: what is known of it by its relatives, worked out once.
    """

    __slots__ = (
        "begin_ns",
        "cgroup_id",
        "end_ns",
        "execution",
        "exit_ns",
        "is_read",
        "kin",
        "parent_pid",
        "pid",
        "start_ns",
    )

    def __init__(
        self, pid: int, parent_pid: int, start_ns: int, begin_ns: int, execution: Execution
    ) -> None:
        self.pid = pid
        self.parent_pid = parent_pid
        self.start_ns = start_ns
        self.begin_ns = begin_ns
        self.end_ns = _NEVER_NS
        self.exit_ns = 0
        self.execution = execution
        self.cgroup_id = 0
        self.is_read = False
        self.kin: object = None

    def holds(self, at_ns: int) -> bool:
        return self.begin_ns <= at_ns < self.end_ns


class Lifetimes:
    """The lifetimes of all processes of the host since the records began. Not thread-safe.

    Attributes:
        uncounted: how many were forgotten because too many had ended at once.
    """

    def __init__(
        self,
        is_running: Callable[[int], bool] = is_running,
        clocks_ns: Callable[[], tuple[int, int]] = lambda: (time.monotonic_ns(), boottime_ns()),
    ) -> None:
        self.uncounted = 0
        self._is_running = is_running
        self._clocks_ns = clocks_ns
        self._current: dict[int, Lifetime] = {}
        self._past: dict[int, list[Lifetime]] = {}
        self._kept: deque[Lifetime] = deque()
        self._ended: deque[Lifetime] = deque()
        self._headless: set[int] = set()

    def take(
        self,
        records: Sequence[Record],
        last_exits: Mapping[int, int] | None = None,
    ) -> None:
        """Take records in the order of their times.

        `last_exits` says when a thread that is not its process's first one exited last.
        """
        monotonic_ns, now_ns = self._clocks_ns()
        asleep_ns = now_ns - monotonic_ns
        exited = self._append(records, asleep_ns)
        last_exits = last_exits or {}
        for pid in self._headless & last_exits.keys():
            exited[pid] = self._current[pid]
        for pid, life in exited.items():
            if self._current.get(pid) is not life:
                continue
            if pid in last_exits:
                life.exit_ns = max(life.exit_ns, last_exits[pid] + asleep_ns)
            if self._is_running(pid):
                self._headless.add(pid)
            else:
                self._end(life, life.exit_ns)
        self._forget(now_ns - _KEPT_NS)

    def _append(self, records: Sequence[Record], asleep_ns: int) -> dict[int, Lifetime]:
        """Take records, and return those whose first thread has exited."""
        exited: dict[int, Lifetime] = {}
        current = self._current
        for record in records:
            type_ = record.type
            if type_ == PERF_RECORD_MMAP2:
                life = current.get(record.pid)
                if life is not None and life.execution.is_known:
                    life.execution.map(record)
            elif type_ == PERF_RECORD_FORK:
                self._fork(record, asleep_ns)
            elif type_ == PERF_RECORD_COMM:
                self._exec(record, asleep_ns)
            elif type_ == PERF_RECORD_EXIT:
                life = current.get(record.pid) or self._add_old(record.pid)
                life.exit_ns = record.time_ns + asleep_ns
                exited[record.pid] = life
        return exited

    def find(self, pid: int, at_ns: int) -> Lifetime | None:
        """Return the lifetime of a pid that holds a time."""
        life = self._current.get(pid)
        if life is not None and life.holds(at_ns):
            return life
        return next((life for life in self._past.get(pid, ()) if life.holds(at_ns)), None)

    def begin_of(self, generation: ProcessGeneration) -> int:
        """Return when a process that still runs began what it runs: its start or its last exec."""
        life = self._current.get(generation.pid)
        has_execed = life is not None and life.begin_ns > life.start_ns
        return max(generation.start_ns, life.begin_ns if life and has_execed else 0)

    def is_of(self, pid: int, execution: Execution) -> bool:
        """Return whether a process runs what an exec has begun."""
        life = self._current.get(pid)
        return life is not None and life.execution is execution

    def take_ended(self) -> list[Lifetime]:
        """Return what has ended since the last call."""
        ended, self._ended = list(self._ended), deque()
        return ended

    def sweep(self, running: Iterable[int], before_ns: int, at_ns: int) -> None:
        """End what began before a time and does not run any more: its end was not recorded."""
        for pid in self._current.keys() - running:
            life = self._current[pid]
            if life.begin_ns < before_ns:
                self._end(life, life.exit_ns or at_ns)

    def _fork(self, record: Record, asleep_ns: int) -> None:
        parent_pid = decode_task(record).parent_pid
        at_ns = record.time_ns + asleep_ns
        parent = self._current.get(parent_pid) or self._add_old(parent_pid)
        old = self._current.get(record.pid)
        if old is not None and old is not parent:
            self._end(old, old.exit_ns or at_ns)
        life = Lifetime(record.pid, parent_pid, at_ns, at_ns, parent.execution)
        self._current[record.pid] = life

    def _exec(self, record: Record, asleep_ns: int) -> None:
        before = self._current.get(record.pid) or self._add_old(record.pid)
        at_ns = record.time_ns + asleep_ns
        self._end(before, at_ns)
        execution = Execution(decode_comm(record).comm, is_known=True)
        life = Lifetime(record.pid, before.parent_pid, before.start_ns, at_ns, execution)
        life.cgroup_id = before.cgroup_id
        self._current[record.pid] = life

    def _add_old(self, pid: int) -> Lifetime:
        life = self._current[pid] = Lifetime(pid, 0, 0, 0, Execution())
        return life

    def _end(self, life: Lifetime, at_ns: int) -> None:
        life.end_ns = at_ns
        if self._current.get(life.pid) is life:
            del self._current[life.pid]
        self._headless.discard(life.pid)
        self._past.setdefault(life.pid, []).append(life)
        self._kept.append(life)
        if len(self._ended) >= _MAX_ENDED:
            self._ended.popleft()
            self.uncounted += 1
        self._ended.append(life)

    def _forget(self, before_ns: int) -> None:
        while self._kept and (self._kept[0].end_ns < before_ns or len(self._kept) > 2 * _MAX_ENDED):
            life = self._kept.popleft()
            past = self._past[life.pid]
            past.remove(life)
            if not past:
                del self._past[life.pid]
