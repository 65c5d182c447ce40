"""Window: when it ends, what is counted until then, and whether its ticks are as expected."""

import math
import os
import resource
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bpf import perf_event
from bpf.sampler import SamplerConfig
from bpf.samples import Drain, RawSample
from profiler.agent.frames import Numbers
from storage.profile import Accounting, Host, Labels, Loss, ProfileBuilder, Window

_FIRST_NS = 60_000_000_000
"""For how long windows are as short as the first one was asked to be."""
_TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
_STEP_NS = 500_000_000
"""A larger difference between the wall clock and the monotonic one is a step, not a drift."""


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
        """Look for the next edge; one that is less than a second away is left to the window."""
        self._begun_ns, self._begun_monotonic_ns = self._wall_ns(), self._monotonic_ns()
        self.edge_ns = self._next_multiple(self._interval_ns)
        if self._begun_monotonic_ns < self._first_until_ns:
            self.edge_ns = min(self.edge_ns, self._next_multiple(self._first_interval_ns))

    def _next_multiple(self, interval_ns: int) -> int:
        soonest_ns = self._begun_ns + min(1_000_000_000, interval_ns // 10)
        return -(-soonest_ns // interval_ns) * interval_ns

    @property
    def edge_monotonic_s(self) -> float:
        return (self._begun_monotonic_ns + self.edge_ns - self._begun_ns) / 1e9

    @property
    def is_reached(self) -> bool:
        return self._monotonic_ns() / 1e9 >= self.edge_monotonic_s

    @property
    def is_stepped(self) -> bool:
        """Return whether somebody has set the wall clock since the window began."""
        passed_ns = self._monotonic_ns() - self._begun_monotonic_ns
        return abs(self._wall_ns() - self._begun_ns - passed_ns) > _STEP_NS


class OpenWindow:
    """What has been counted since a moment, and what the clocks said at that moment."""

    def __init__(self, period_ns: int, edge_ns: int | None = None) -> None:
        self.builder = ProfileBuilder(period_ns)
        self.begun = Clocks.now()
        self._start_ns = edge_ns or self.begun.wall_ns
        self._end_ns: int | None = None
        self._ended: Clocks | None = None
        self._ticks = self._idle = self._filtered = self._pending = 0
        self._lost: Counter[str] = Counter()
        self._stops: Counter[str] = Counter()

    def count(self, drain: Drain) -> None:
        """Take a drain's counts; its samples are still to be added."""
        self._ticks += drain.ticks
        self._idle += drain.idle
        self._filtered += drain.filtered
        self._lost.update(drain.lost)
        self._pending = sum(sample.samples for sample in drain.samples)

    def add(self, sample: RawSample, root_first: Numbers, labels: Labels) -> None:
        self.builder.add(labels, root_first, sample.samples)
        self._stops[sample.stop] += sample.samples
        self._pending -= sample.samples

    def settle(self) -> None:
        """Count what was announced and did not come: something failed on the way."""
        if self._pending:
            self._lost[Loss.FAULT] += self._pending
            self._pending = 0

    def end(self, successor: "OpenWindow | None" = None, edge_ns: int | None = None) -> None:
        """Stop the clocks, at the moment the next window begins; a second call changes nothing."""
        self._ended = self._ended or (successor.begun if successor else Clocks.now())
        self._end_ns = edge_ns

    @property
    def window(self) -> Window:
        """From edge to edge, where there are any; else by the clock that nobody can set."""
        ended = self._ended or Clocks.now()
        return Window(self._start_ns, self._end_ns or self._start_ns + ended.since(self.begun))

    @property
    def boottime_ns(self) -> tuple[int, int]:
        ended = self._ended or Clocks.now()
        return self.begun.boottime_ns, ended.boottime_ns

    def accounting(self, host: Host, misses: Mapping[str, int]) -> Accounting:
        ended = self._ended or Clocks.now()
        return Accounting(
            hosts=(host,),
            cpus=len(perf_event.online_cpus()),
            nonidle_ns=ended.nonidle_since(self.begun),
            profiled_ns=ended.since(self.begun),
            ticks=self._ticks,
            idle=self._idle,
            filtered=self._filtered,
            stored=self._stops.total(),
            lost={str(cause): number for cause, number in self._lost.items()},
            stops=dict(self._stops),
            misses=misses,
            agent_cpu_ns=ended.own_cpu_ns - self.begun.own_cpu_ns,
            agent_rss_bytes=rss_bytes(),
        )


@dataclass(frozen=True, slots=True)
class Clocks:
    wall_ns: int
    monotonic_ns: int
    boottime_ns: int
    nonidle_ns: int
    own_cpu_ns: int

    @classmethod
    def now(cls) -> "Clocks":
        return cls(
            wall_ns=time.time_ns(),
            monotonic_ns=time.monotonic_ns(),
            boottime_ns=time.clock_gettime_ns(time.CLOCK_BOOTTIME),
            nonidle_ns=nonidle_ns(),
            own_cpu_ns=time.process_time_ns(),
        )

    def since(self, earlier: "Clocks") -> int:
        """Return the ns between two readings; the wall clock may have been set in between."""
        return self.monotonic_ns - earlier.monotonic_ns

    def nonidle_since(self, earlier: "Clocks") -> int:
        """Return how long CPUs were not idle in between; idle time is rounded, so not below 0."""
        return max(0, self.nonidle_ns - earlier.nonidle_ns)


def nonidle_ns() -> int:
    """Return how long all online CPUs together were not idle, in ns from an arbitrary start.

    The time there was, less what /proc/stat calls idle, waiting or stolen (proc_stat(5)): those are
    measured, while its busy times are guessed at the timer's ticks, which miss whatever a timer
    starts: of a thousand short processes a second they saw a tenth.
    """
    there_was = time.monotonic_ns() * len(perf_event.online_cpus())
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    idle, iowait, steal = int(fields[4]), int(fields[5]), int(fields[8])
    return there_was - (idle + iowait + steal) * _TICK_NS


def rss_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def deviation(counts: Accounting, config: SamplerConfig) -> str:
    """Compare busy ticks with the kernel's own account of busy time; empty when they agree."""
    if config.hardware:
        return ""
    expected = config.frequency_hz * counts.nonidle_ns / 1e9
    busy = counts.ticks - counts.idle
    if expected < 1 or abs(busy - expected) <= expected * max(0.02, 4 / math.sqrt(expected)):
        return ""
    return f"warning: {busy:,} busy ticks, but the kernel's CPU times predict {expected:,.0f}"
