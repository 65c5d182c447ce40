"""When at least one process of a service ran: a union of intervals, in integer ns of one clock."""

_MAX_INTERVALS = 16_384
"""Of one instance. Beyond it those that overlap become one; of so many apart the older half is
forgotten."""
_CLOSED_GAP_NS = 1_000_000  # intervals so close to one another are counted as one


class Interval:
    __slots__ = ("end_ns", "start_ns")

    def __init__(self, start_ns: int, end_ns: int) -> None:
        self.start_ns = start_ns
        self.end_ns = end_ns


class Presence:
    """Past intervals, which may overlap, and one that goes on while any process runs."""

    __slots__ = ("_intervals", "_open", "_since_ns")

    def __init__(self) -> None:
        self._intervals: list[Interval] = []
        self._open = 0
        self._since_ns = 0

    @property
    def is_empty(self) -> bool:
        return not self._open and not self._intervals

    def open(self, at_ns: int) -> None:
        self._since_ns = min(self._since_ns, at_ns) if self._open else at_ns
        self._open += 1

    def close(self, at_ns: int) -> None:
        self._open -= 1
        if not self._open:
            self.add(self._since_ns, at_ns)

    def add(self, start_ns: int, end_ns: int) -> Interval:
        """Count an interval and return the one that holds it from now on."""
        last = self._intervals[-1] if self._intervals else None
        if last and last.start_ns <= start_ns <= last.end_ns + _CLOSED_GAP_NS:
            last.end_ns = max(last.end_ns, end_ns)
            return last
        if len(self._intervals) >= _MAX_INTERVALS:
            self._join()
        interval = Interval(start_ns, end_ns)
        self._intervals.append(interval)
        return interval

    def _join(self) -> None:
        """Join intervals that overlap, as those of short processes on many CPUs do."""
        joined: list[Interval] = []
        for part in sorted(self._intervals, key=lambda each: each.start_ns):
            if joined and part.start_ns <= joined[-1].end_ns + _CLOSED_GAP_NS:
                joined[-1].end_ns = max(joined[-1].end_ns, part.end_ns)
            else:
                joined.append(part)
        self._intervals = joined[-(_MAX_INTERVALS // 2) :]

    def within(self, start_ns: int, end_ns: int) -> int:
        """Return how much of a window is covered."""
        parts = [(part.start_ns, part.end_ns) for part in self._intervals]
        if self._open:
            parts.append((self._since_ns, end_ns))
        covered_ns, reached_ns = 0, start_ns
        for part_start_ns, part_end_ns in sorted(parts):
            until_ns = min(part_end_ns, end_ns)
            covered_ns += max(0, until_ns - max(part_start_ns, reached_ns))
            reached_ns = max(reached_ns, until_ns)
        return covered_ns

    def forget(self, before_ns: int) -> None:
        self._intervals = [part for part in self._intervals if part.end_ns > before_ns]
