"""Window: when it ends, what is counted until then, and whether its ticks are as expected."""

import math
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from bpf import perf_event
from bpf.sampler import SamplerConfig
from bpf.samples import CopiedStack, Drain, RawSample
from profiler.agent.budgets import BoundedProfile, Owner
from profiler.agent.cost import rss_bytes
from profiler.agent.frames import Numbers
from profiler.processes.generations import TICK_NS
from storage.profile import GOOD_STOPS, Accounting, Host, Labels, Loss, ProfileBuilder, Window

SHORTEST_DRAIN_PERIOD_S, _DRAIN_PERIOD_S, _LONGEST_DRAIN_PERIOD_S = 0.25, 1.0, 2.0
_TURN_S = 0.05
"""How much CPU time one drain should take: for as long, no request of the kernel is answered."""
_LATE_NS = 2_000_000_000
"""A window that is closed so late does not end at its edge: the ticks since then are in it."""
_FIRST_NS = 60_000_000_000
"""For how long windows are as short as the first one was asked to be."""
_MINUTE_NS = 60_000_000_000
_STAT = Path("/proc/stat")
_IDLE_SLACK_NS = 100_000_000
"""By how much idle time may exceed the time that passed: both are rounded to ticks of 10 ms."""
_STEP_NS = 500_000_000
"""A larger difference between the wall clock and the monotonic one is a step, not a drift."""


class Edge(NamedTuple):
    """A moment at which one window ends and the next begins."""

    utc_ns: int
    monotonic_ns: int


class Edges:
    """When windows end: at multiples of the interval on the wall clock, by the monotonic one.

    Those that begin in the first minute end at multiples of `first_interval_s` too.
    """

    def __init__(
        self,
        interval_s: int,
        wall_ns: Callable[[], int] = time.time_ns,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
        first_interval_s: int = 0,
    ) -> None:
        self._interval_ns = interval_s * 1_000_000_000
        self._first_interval_ns = first_interval_s * 1_000_000_000 or self._interval_ns
        self._wall_ns, self._monotonic_ns = wall_ns, monotonic_ns
        self._first_until_ns = monotonic_ns() + _FIRST_NS
        self.begin()

    def begin(self) -> None:
        """Find the next edge; one that is less than a second away is skipped."""
        self._begun_ns, self._begun_monotonic_ns = self._wall_ns(), self._monotonic_ns()
        self.edge_ns = self._next_multiple(self._interval_ns)
        if self._begun_monotonic_ns < self._first_until_ns:
            self.edge_ns = min(self.edge_ns, self._next_multiple(self._first_interval_ns))

    def _next_multiple(self, interval_ns: int) -> int:
        soonest_ns = self._begun_ns + min(1_000_000_000, interval_ns // 10)
        return -(-soonest_ns // interval_ns) * interval_ns

    @property
    def edge_monotonic_s(self) -> float:
        return self.edge.monotonic_ns / 1e9

    @property
    def is_reached(self) -> bool:
        return self._monotonic_ns() >= self.edge.monotonic_ns

    @property
    def edge(self) -> Edge:
        """The edge at which the window that is open now should end."""
        return Edge(self.edge_ns, self._begun_monotonic_ns + self.edge_ns - self._begun_ns)

    @property
    def true_edge(self) -> Edge | None:
        """The edge, if the window that is closed now ended there; None if it goes on to now.

        The process may have been stopped or frozen for hours.
        """
        late_ns = self._monotonic_ns() - self.edge.monotonic_ns
        return self.edge if 0 <= late_ns < _LATE_NS and not self.is_stepped else None

    @property
    def is_stepped(self) -> bool:
        """Return whether somebody has set the wall clock since the window began."""
        passed_ns = self._monotonic_ns() - self._begun_monotonic_ns
        return abs(self._wall_ns() - self._begun_ns - passed_ns) > _STEP_NS


@dataclass(frozen=True, slots=True)
class Clocks:
    """What all clocks said at one moment."""

    wall_ns: int
    monotonic_ns: int
    boottime_ns: int
    nonidle_ns: int
    own_cpu_ns: int

    @classmethod
    def now(cls, nonidle_ns: int, children_cpu_ns: int = 0) -> "Clocks":
        """Read all clocks; `children_cpu_ns` is what this process's readers have used so far."""
        return cls(
            wall_ns=time.time_ns(),
            monotonic_ns=time.monotonic_ns(),
            boottime_ns=time.clock_gettime_ns(time.CLOCK_BOOTTIME),
            nonidle_ns=nonidle_ns,
            own_cpu_ns=time.process_time_ns() + children_cpu_ns,
        )

    def at(self, later: "Clocks", monotonic_ns: int) -> "Clocks":
        """Return what the clocks said at a moment between two readings, which is interpolated.

        The wall clock's is that of the later setting, as somebody may have set it in between.
        """
        span_ns = later.monotonic_ns - self.monotonic_ns
        passed_ns = min(max(0, monotonic_ns - self.monotonic_ns), span_ns)
        if not span_ns:
            return later

        def between(begun_ns: int, ended_ns: int) -> int:
            return begun_ns + (ended_ns - begun_ns) * passed_ns // span_ns

        return Clocks(
            wall_ns=later.wall_ns - span_ns + passed_ns,
            monotonic_ns=self.monotonic_ns + passed_ns,
            boottime_ns=between(self.boottime_ns, later.boottime_ns),
            nonidle_ns=between(self.nonidle_ns, later.nonidle_ns),
            own_cpu_ns=between(self.own_cpu_ns, later.own_cpu_ns),
        )

    def since(self, earlier: "Clocks") -> int:
        """Return the ns between two readings; the wall clock may have been set in between."""
        return self.monotonic_ns - earlier.monotonic_ns

    def nonidle_since(self, earlier: "Clocks") -> int:
        """Return how long CPUs were not idle in between; idle time is rounded, so not below 0."""
        return max(0, self.nonidle_ns - earlier.nonidle_ns)

    def cuts(self, later: "Clocks", longest_ns: int) -> list["Clocks"]:
        """Return the moments that cut the time up to a later one into equal parts, not too long.

        What the clocks said at them is interpolated.
        """
        span_ns = later.since(self)
        parts = max(1, -(-span_ns // longest_ns))
        return [
            self.at(later, self.monotonic_ns + span_ns * part // parts) for part in range(1, parts)
        ]


class OpenWindow:
    """What has been counted since a moment, and what the clocks said at that moment."""

    def __init__(
        self,
        period_ns: int,
        now: Callable[[], Clocks],
        *,
        begun: Clocks | None = None,
        edge_ns: int | None = None,
    ) -> None:
        """Begin now, or when the clocks were `begun`; `edge_ns` is the start's name in UTC."""
        self.builder = ProfileBuilder(period_ns)
        self.bounded = BoundedProfile(self.builder, len(perf_event.online_cpus()))
        self.begun = begun or now()
        self.start_ns = edge_ns or self.begun.wall_ns
        self._now = now
        self._end_ns: int | None = None
        self._ended: Clocks | None = None
        self._ticks = self._idle = self._filtered = self._pending = 0
        self._lost: Counter[str] = Counter()
        self._is_exact = True
        self._stops: Counter[str] = Counter()

    def count(self, drain: Drain) -> None:
        """Take a drain's counts; its samples are still to be added.

        Those of its copies count when they are released.
        """
        self._ticks += drain.ticks - len(drain.copies)
        self._idle += drain.idle
        self._filtered += drain.filtered
        self._lost.update(drain.lost)
        self._is_exact &= drain.counts_skipped
        self._pending = sum(sample.samples for sample in drain.samples)
        if drain.samples:
            latest_ns = max(sample.last_ns for sample in drain.samples)
            self.bounded.grow((latest_ns - self.begun.monotonic_ns) / _MINUTE_NS)

    def release(self, ticks: int) -> None:
        """Count ticks whose stacks have waited; they are still to be added."""
        self._ticks += ticks
        self._pending += ticks

    def add(self, sample: RawSample, root_first: Numbers, labels: Labels) -> None:
        self.bounded.add(Owner.of(sample), labels, root_first, sample.samples)
        # One reason for each sample: the user's part, unless only the kernel's is not whole.
        is_whole = sample.stop in GOOD_STOPS
        stop = sample.kernel_stop if is_whole and sample.kernel_stop else sample.stop
        self._stops[stop] += sample.samples
        self._pending -= sample.samples

    def settle(self) -> None:
        """Count what was announced and did not come: something failed on the way."""
        if self._pending:
            self._lost[Loss.FAULT] += self._pending
            self._pending = 0

    def take_lost(self, counts: Accounting) -> None:
        """Take over the ticks of an earlier window that could not be stored: its stacks are lost.

        So they stand in the next object, which is not longer for that.
        """
        self._ticks += counts.ticks
        self._idle += counts.idle
        self._filtered += counts.filtered
        self._lost.update(counts.lost)
        if counts.stored:
            self._lost[Loss.FAULT] += counts.stored

    def end(self, successor: "OpenWindow | None" = None, edge_ns: int | None = None) -> None:
        """Stop the clocks, at the moment the next window begins; a second call changes nothing."""
        self._ended = self._ended or (successor.begun if successor else self._now())
        self._end_ns = edge_ns

    @property
    def window(self) -> Window:
        """From edge to edge if there are edges, otherwise by the monotonic clock."""
        ended = self._ended or self._now()
        return Window(self.start_ns, self._end_ns or self.start_ns + ended.since(self.begun))

    @property
    def boottime_ns(self) -> tuple[int, int]:
        ended = self._ended or self._now()
        return self.begun.boottime_ns, ended.boottime_ns

    @property
    def counts(self) -> Accounting:
        """Where its ticks have gone, and no more: no file has to be read for it."""
        return Accounting(
            ticks=self._ticks,
            idle=self._idle,
            filtered=self._filtered,
            stored=self._stops.total(),
            lost={str(cause): number for cause, number in self._lost.items()},
            stops=dict(self._stops),
            uncounted=0 if self._is_exact else 1,
        )

    def accounting(self, host: Host, misses: Mapping[str, int]) -> Accounting:
        ended = self._ended or self._now()
        return replace(
            self.counts,
            hosts=(host,),
            cpus=len(perf_event.online_cpus()),
            nonidle_ns=ended.nonidle_since(self.begun),
            # Less than the window where a drain failed; more only by how far the wall clock drifts.
            profiled_ns=min(ended.since(self.begun), self.window.end_ns - self.start_ns),
            misses=misses,
            agent_cpu_ns=ended.own_cpu_ns - self.begun.own_cpu_ns,
            agent_rss_bytes=rss_bytes(),
        )


def drain_period_s(lasts_s: float, late_s: float, work: float = 0.0) -> float:
    """Return how long to wait between two drains.

    `lasts_s` is when the maps are half full at the earliest, `late_s` how late drains have come,
    `work` how many CPU seconds it takes to count the samples of one second.
    """
    longest_s = min(_LONGEST_DRAIN_PERIOD_S, max(_DRAIN_PERIOD_S, lasts_s))
    if work * longest_s > _TURN_S:
        longest_s = _TURN_S / work
    return max(SHORTEST_DRAIN_PERIOD_S, min(longest_s, lasts_s - late_s))


def split_drain(drain: Drain, edges_ns: Sequence[int]) -> list[Drain]:
    """Cut a drain that comes late into parts: one between each two edges (CLOCK_MONOTONIC).

    A stack that was seen once belongs where it was seen; the samples of one that was seen more
    often are spread from its first to its last. All other ticks fill up what then lacks, as ticks
    come evenly: when a map was full, those that came last were lost. All counts are integers and
    add up to those of the drain.
    """
    latest_ns = max((sample.last_ns for sample in drain.samples), default=0)
    parts = list(pairwise((*edges_ns[:-1], max(edges_ns[-1], latest_ns + 1))))
    whole = [max(0, end_ns - start_ns) for start_ns, end_ns in parts]
    samples: list[list[RawSample]] = [[] for _ in parts]
    for sample in drain.samples:
        overlaps = [
            (max(start_ns, sample.first_ns), min(end_ns, sample.last_ns + 1))
            for start_ns, end_ns in parts
        ]
        numbers = _share(sample.samples, [max(0, end - start) for start, end in overlaps])
        for place, number in enumerate(numbers):
            if number:
                first_ns, last_ns = overlaps[place][0], overlaps[place][1] - 1
                samples[place].append(
                    sample._replace(samples=number, first_ns=first_ns, last_ns=last_ns)
                )
    copies: list[list[CopiedStack]] = [[] for _ in parts]
    for copy in drain.copies:
        place = bisect_right(parts, copy.walked.first_ns, key=lambda part: part[0]) - 1
        copies[max(0, place)].append(copy)
    stored = [
        sum(sample.samples for sample in kept) + len(copied)
        for kept, copied in zip(samples, copies, strict=True)
    ]
    ticks = _share(drain.ticks, whole)
    rest = [max(0, all_ticks - number) for all_ticks, number in zip(ticks, stored, strict=True)]
    idle, filtered = _share(drain.idle, rest), _share(drain.filtered, rest)
    lost = {cause: _share(number, rest) for cause, number in drain.lost.items()}
    drains = []
    for place, kept in enumerate(samples):
        causes = {cause: numbers[place] for cause, numbers in lost.items() if numbers[place]}
        ended = idle[place] + filtered[place] + sum(causes.values())
        ticks_here, copied = stored[place] + ended, copies[place]
        counts = (ticks_here, idle[place], filtered[place], causes)
        drains.append(Drain(kept, *counts, copies=copied, counts_skipped=drain.counts_skipped))
    return drains


def _share(number: int, weights: Sequence[int]) -> list[int]:
    """Divide a number by weights into integers; all to the last one if no weight is positive."""
    total, reached, given = sum(weights), 0, 0
    if not total:
        return [*[0] * (len(weights) - 1), number]
    shares = []
    for weight in weights:
        reached += weight
        upto = number * reached // total
        shares.append(upto - given)
        given = upto
    return shares


class BusyTime:
    """How long all online CPUs together were not idle, from one reading to the next.

    For each CPU, the time that passed less what /proc/stat calls idle, waiting or stolen
    (proc_stat(5)): those are measured, while its busy times are guessed at the timer's ticks, which
    miss whatever a timer starts: of a thousand short processes a second they saw a tenth.

    A CPU that comes online counts from its first reading on, one that goes offline up to its last;
    so take a reading every second or two.
    """

    def __init__(self) -> None:
        self.nonidle_ns = 0
        self._before_ns = 0
        self._idle_ns: dict[int, int] = {}

    def read(self) -> int:
        """Take a reading now; return the ns since the first one."""
        return self.add(time.monotonic_ns(), _STAT.read_text())

    def add(self, now_ns: int, stat: str) -> int:
        """Take in what /proc/stat says at a time (CLOCK_MONOTONIC)."""
        passed_ns = now_ns - self._before_ns
        idle_ns = parse_idle(stat)
        for cpu in idle_ns.keys() & self._idle_ns.keys():
            rested_ns = idle_ns[cpu] - self._idle_ns[cpu]
            # Some kernels begin anew when a CPU comes back, or count the time that it was away.
            if -_IDLE_SLACK_NS <= rested_ns <= passed_ns + passed_ns // 100 + _IDLE_SLACK_NS:
                self.nonidle_ns += passed_ns - rested_ns
        self._before_ns, self._idle_ns = now_ns, idle_ns
        return self.nonidle_ns


def parse_idle(stat: str) -> dict[int, int]:
    """Return for each online CPU the ns that it was idle, waiting or stolen since the boot."""
    idle_ns = {}
    for line in stat.splitlines():
        name, *fields = line.split()
        if name.startswith("cpu") and name != "cpu":
            idle, iowait, steal = int(fields[3]), int(fields[4]), int(fields[7])
            idle_ns[int(name[3:])] = (idle + iowait + steal) * TICK_NS
    return idle_ns


def deviation(counts: Accounting, config: SamplerConfig) -> str:
    """Compare busy ticks with the kernel's own account of busy time; empty when they agree."""
    if config.hardware:
        return ""
    expected = config.frequency_hz * counts.nonidle_ns / 1e9
    busy = counts.ticks - counts.idle
    if expected < 1 or abs(busy - expected) <= expected * max(0.02, 4 / math.sqrt(expected)):
        return ""
    return f"warning: {busy:,} busy ticks, but the kernel's CPU times predict {expected:,.0f}"
