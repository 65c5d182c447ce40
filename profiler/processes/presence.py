"""When at least one process of a service ran: a union of intervals, in integer ns of one clock."""

from array import array
from itertools import pairwise

_MAX_INTERVALS = 131_072
"""Of one instance: two minutes of a thousand processes a second. Beyond it those that overlap
become one, and then those that are nearest to one another."""


class Presence:
    """Past intervals, which may overlap, and one that goes on while any process runs."""

    __slots__ = ("_ends_ns", "_open", "_since_ns", "_starts_ns")

    def __init__(self) -> None:
        self._starts_ns = array("q")
        self._ends_ns = array("q")
        self._open = 0
        self._since_ns = 0

    def __len__(self) -> int:
        return len(self._starts_ns)

    @property
    def is_empty(self) -> bool:
        return not self._open and not self._starts_ns

    @property
    def intervals(self) -> list[tuple[int, int]]:
        """The past intervals, in any order."""
        return list(zip(self._starts_ns, self._ends_ns, strict=True))

    def open(self, at_ns: int) -> None:
        self._since_ns = min(self._since_ns, at_ns) if self._open else at_ns
        self._open += 1

    def close(self, at_ns: int) -> None:
        self._open -= 1
        if not self._open:
            self.add(self._since_ns, at_ns)

    def add(self, start_ns: int, end_ns: int) -> None:
        """Count an interval."""
        if self._starts_ns and self._starts_ns[-1] <= start_ns <= self._ends_ns[-1]:
            self._ends_ns[-1] = max(self._ends_ns[-1], end_ns)
            return
        if len(self._starts_ns) >= _MAX_INTERVALS:
            self._keep(_shortened(self.intervals, _MAX_INTERVALS // 2))
        self._starts_ns.append(start_ns)
        self._ends_ns.append(end_ns)

    def within(self, start_ns: int, end_ns: int) -> int:
        """Return how much of a window is covered."""
        parts = self.intervals
        if self._open:
            parts.append((self._since_ns, end_ns))
        covered_ns, reached_ns = 0, start_ns
        for part_start_ns, part_end_ns in sorted(parts):
            until_ns = min(part_end_ns, end_ns)
            covered_ns += max(0, until_ns - max(part_start_ns, reached_ns))
            reached_ns = max(reached_ns, until_ns)
        return covered_ns

    def forget(self, before_ns: int) -> None:
        if self._ends_ns and min(self._ends_ns) <= before_ns:
            self._keep([part for part in self.intervals if part[1] > before_ns])

    def _keep(self, parts: list[tuple[int, int]]) -> None:
        self._starts_ns = array("q", [start_ns for start_ns, _ in parts])
        self._ends_ns = array("q", [end_ns for _, end_ns in parts])


def _shortened(parts: list[tuple[int, int]], limit: int) -> list[tuple[int, int]]:
    """Join intervals that overlap, and then over the shortest gaps, until few enough are left."""
    joined = _joined(parts, 0)
    if len(joined) <= limit:
        return joined
    gaps_ns = sorted(after[0] - before[1] for before, after in pairwise(joined))
    return _joined(joined, gaps_ns[len(joined) - limit - 1])


def _joined(parts: list[tuple[int, int]], gap_ns: int) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for start_ns, end_ns in sorted(parts):
        if joined and start_ns <= joined[-1][1] + gap_ns:
            joined[-1] = joined[-1][0], max(joined[-1][1], end_ns)
        else:
            joined.append((start_ns, end_ns))
    return joined
