"""Stretches: the times around a comparison's windows in which the service did not change.

One ends with the earlier window, one begins with the later one. Each is cut into parts of a
minute or more; how much these differ is what a provisional verdict rests on
(`profiler.comparison.provisional`).
"""

from collections.abc import Iterator, Sequence

import numpy as np

from profiler.comparison.provisional import Stretch
from profiler.comparison.sides import PresenceByHost, SideData, WindowPair, service_selector
from profiler.times import NS_PER_S
from storage.profile import Window
from storage.query.query import Query

_PART_NS = 60 * NS_PER_S
_MOST_PARTS = 60
"""Of each stretch."""
_PARTS_OF_WINDOW = 5
"""A long window is cut into so many."""


def read_stretches(query: Query, pair: WindowPair, changes_ns: Sequence[int]) -> list[Stretch]:
    """Return both stretches; none of a fleet, as the differences between its hosts say more.

    A stretch ends at `changes_ns`, where the version changes, or where a host did not run the
    service.
    """
    if pair.is_from_series or not pair.is_paired:
        return []
    earlier, later = sorted(pair.reads, key=lambda read: read.operand.window.start_ns)
    hosts = pair.rows[0]
    edges = (earlier, earlier.operand.window.end_ns, -1), (later, later.operand.window.start_ns, 1)
    return [
        _Reader(query, pair, read, hosts).read(edge_ns, direction, changes_ns)
        for read, edge_ns, direction in edges
    ]


class _Reader:
    """Reads the stretch of one side."""

    def __init__(
        self, query: Query, pair: WindowPair, read: SideData, hosts: Sequence[str]
    ) -> None:
        self._query = query
        self._table = pair.table
        self._selector = read.operand.selector
        self._known = service_selector(self._selector)
        self._hosts = hosts
        window = read.operand.window
        self._part_ns = max(_PART_NS, (window.end_ns - window.start_ns) // _PARTS_OF_WINDOW)

    def read(self, edge_ns: int, direction: int, changes_ns: Sequence[int]) -> Stretch:
        """Return the stretch that begins at an edge, in a direction of time."""
        reach_ns = edge_ns + direction * self._part_ns * (_MOST_PARTS + 1)
        whole = Window(max(0, min(edge_ns, reach_ns)), max(edge_ns, reach_ns))
        found = self._query.presence(whole, self._known)
        presence = PresenceByHost(found)
        if not len(found.objects):
            return self._stretch([], [], _PART_NS)
        # A part has whole objects.
        lengths_ns = found.objects[:, 1] - found.objects[:, 0]
        object_ns = max(1, int(np.median(lengths_ns)))
        part_ns = -(-self._part_ns // object_ns) * object_ns
        parts = []
        for number in range(_MOST_PARTS):
            ends_ns = (edge_ns + direction * part_ns * n for n in (number, number + 1))
            part = Window(*sorted(ends_ns))
            so_far = Window(min(edge_ns, part.start_ns), max(edge_ns, part.end_ns))
            if part.start_ns < 0 or any(so_far.start_ns < at < so_far.end_ns for at in changes_ns):
                break
            parts.append(part)
        kept = list(self._unchanged(presence, parts))[::direction]
        return self._stretch([part for part, _ in kept], [each for _, each in kept], part_ns)

    def _unchanged(
        self, presence: PresenceByHost, parts: Sequence[Window]
    ) -> Iterator[tuple[Window, list[float]]]:
        """Return the first parts in which all hosts ran one version, and how long each did."""
        hosts = set(self._hosts)
        versions: set[tuple[str, str]] = set()
        for part in parts:
            versions |= presence.versions(self._known, part, hosts)
            seconds = presence.seconds(self._known, part, hosts)
            is_one = len(versions) == 1 or len({service for service, _ in versions}) > 1
            if not is_one or not hosts <= seconds.keys():
                return
            yield part, [seconds[host] for host in self._hosts]

    def _stretch(
        self, parts: Sequence[Window], present_s: Sequence[Sequence[float]], part_ns: int
    ) -> Stretch:
        shape = len(parts), len(self._hosts)
        samples = np.zeros((*shape, len(self._table.frames)))
        numbers = {host: i for i, host in enumerate(self._hosts)}
        for i, found in self._query.self_samples(parts, self._selector) if parts else ():
            samples[i] += self._table.samples(found, numbers)
        present = np.array(present_s, np.float64).reshape(shape)
        # An object that is late, or an agent that was away, leaves an empty part.
        is_there = samples.any(axis=(1, 2))
        return Stretch(samples[is_there], present[is_there], part_ns / NS_PER_S)
