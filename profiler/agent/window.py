"""Window: when the windows of an agent end, and whether the ticks in one are as expected."""

import math
import time
from collections.abc import Callable

from bpf.sampler import SamplerConfig
from storage.profile import Accounting

_FIRST_NS = 60_000_000_000
"""For how long windows are as short as the first one was asked to be."""
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


def deviation(counts: Accounting, config: SamplerConfig) -> str:
    """Compare busy ticks with the kernel's own account of busy time; empty when they agree."""
    if config.hardware:
        return ""
    expected = config.frequency_hz * counts.nonidle_ns / 1e9
    busy = counts.ticks - counts.idle
    if expected < 1 or abs(busy - expected) <= expected * max(0.02, 4 / math.sqrt(expected)):
        return ""
    return f"warning: {busy:,} busy ticks, but the kernel's CPU times predict {expected:,.0f}"
