"""Stretches: times around a comparison's windows in which a service did not change.

One ends with the earlier window, one begins with the later one. Each is cut into parts of a
minute or more; how much these differ is what a provisional verdict rests on
(`profiler.comparison.provisional`). Those of other services on a host say how much the cost of
functions varies there.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from profiler.comparison.provisional import Stretch
from profiler.comparison.sides import PresenceByHost, SideData, WindowPair, service_selector
from profiler.comparison.verdict import Floats
from profiler.times import NS_PER_S
from storage.profile import Window
from storage.query.function_totals import SelfSamples
from storage.query.presence import ServicePresence
from storage.query.query import Query
from storage.selector import Matcher, Operator, Selector

_PART_NS = 60 * NS_PER_S
_MOST_PARTS = 60
"""Of each stretch."""
_PARTS_OF_WINDOW = 5
"""A long window is cut into so many."""
_NEIGHBOURS, _NEIGHBOUR_PARTS, _NEIGHBOUR_FUNCTIONS = 16, 20, 64
"""So many other services are looked at, in so many parts and functions each: the largest ones."""


class _Edge(NamedTuple):
    """Where a stretch begins, and in which direction of time it goes on."""

    at_ns: int
    direction: int
    part_ns: int

    @classmethod
    def of(cls, window: Window, direction: int) -> "_Edge":
        """Return the end of the earlier window, or the start of the later one."""
        part_ns = max(_PART_NS, (window.end_ns - window.start_ns) // _PARTS_OF_WINDOW)
        return cls(window.end_ns if direction < 0 else window.start_ns, direction, part_ns)

    def parts(self, parts: int, changes_ns: Sequence[int] = ()) -> list[Window]:
        """Return the parts from the edge on that no change lies in or before."""
        found: list[Window] = []
        for number in range(parts):
            ends_ns = (self.at_ns + self.direction * self.part_ns * n for n in (number, number + 1))
            part = Window(*sorted(ends_ns))
            so_far = Window(min(self.at_ns, part.start_ns), max(self.at_ns, part.end_ns))
            if part.start_ns < 0 or any(so_far.start_ns < at < so_far.end_ns for at in changes_ns):
                break
            found.append(part)
        return found

    def whole(self, parts: int) -> Window:
        far_ns = self.at_ns + self.direction * self.part_ns * (parts + 1)
        return Window(max(0, min(self.at_ns, far_ns)), max(self.at_ns, far_ns))

    def of_whole_objects(self, presence: ServicePresence) -> "_Edge":
        lengths_ns = presence.objects[:, 1] - presence.objects[:, 0]
        object_ns = max(1, int(np.median(lengths_ns)))
        return self._replace(part_ns=-(-self.part_ns // object_ns) * object_ns)


class _Present(NamedTuple):
    """The parts in which a service was on all hosts in one version, in order of time."""

    parts: list[Window]
    seconds: list[list[float]]
    """How long it was there, by part and host."""

    @classmethod
    def of(
        cls,
        presence: PresenceByHost,
        known: Selector,
        hosts: Sequence[str],
        parts: Sequence[Window],
    ) -> "_Present":
        """`parts` begin at the edge: the first one with a change ends them."""
        found: list[tuple[Window, list[float]]] = []
        wanted = set(hosts)
        versions: set[tuple[str, str]] = set()
        for part in parts:
            versions |= presence.versions(known, part, wanted)
            seconds = presence.seconds(known, part, wanted)
            is_one = len(versions) == 1 or len({service for service, _ in versions}) > 1
            if not is_one or not wanted <= seconds.keys():
                break
            found.append((part, [seconds[host] for host in hosts]))
        found.sort()
        return cls([part for part, _ in found], [each for _, each in found])

    def stretch(self, samples: Floats, part_ns: int) -> Stretch:
        """Return it with samples by part, host and function."""
        present = np.array(self.seconds, np.float64).reshape(samples.shape[:2])
        # An object that is late, or an agent that was away, leaves an empty part.
        is_there = samples.any(axis=(1, 2))
        return Stretch(samples[is_there], present[is_there], part_ns / NS_PER_S)


def read_stretches(query: Query, pair: WindowPair, changes_ns: Sequence[int]) -> list[Stretch]:
    """Return both stretches; none of a fleet, as the differences between its hosts say more.

    A stretch ends at `changes_ns`, where the version changes, or where a host did not run the
    service.
    """
    if pair.is_from_series or not pair.is_paired:
        return []
    earlier, later = sorted(pair.reads, key=_start_ns)
    return [_read(query, pair, read, way, changes_ns) for read, way in ((earlier, -1), (later, 1))]


def _start_ns(read: SideData) -> int:
    return read.operand.window.start_ns


def _read(
    query: Query, pair: WindowPair, read: SideData, direction: int, changes_ns: Sequence[int]
) -> Stretch:
    selector, hosts = read.operand.selector, pair.rows[0]
    known = service_selector(selector)
    edge = _Edge.of(read.operand.window, direction)
    presence = query.presence(edge.whole(_MOST_PARTS), known)
    parts = []
    if len(presence.objects):
        edge = edge.of_whole_objects(presence)
        parts = edge.parts(_MOST_PARTS, changes_ns)
    found = _Present.of(PresenceByHost(presence), known, hosts, parts)
    samples = np.zeros((len(found.parts), len(hosts), len(pair.table.frames)))
    numbers = {host: i for i, host in enumerate(hosts)}
    for i, each in query.self_samples(found.parts, selector) if found.parts else ():
        samples[i] += pair.table.samples(each, numbers)
    return found.stretch(samples, edge.part_ns)


def read_neighbours(query: Query, pair: WindowPair) -> list[Stretch]:
    """Return the stretches of other services before the earlier window, on one of the hosts.

    There are none if the sides do not name their service.
    """
    own = {_service_of(read) for read in pair.reads}
    if pair.is_from_series or not pair.is_paired or "" in own:
        return []
    host = pair.rows[0][0]
    on_host = Selector((Matcher("host", Operator.EQUAL, host),))
    edge = _Edge.of(min(pair.reads, key=_start_ns).operand.window, -1)
    presence = query.presence(edge.whole(_NEIGHBOUR_PARTS), on_host)
    if not len(presence.objects):
        return []
    edge = edge.of_whole_objects(presence)
    parts = edge.parts(_NEIGHBOUR_PARTS)[::-1]
    services = _Services(query.self_samples(parts, on_host))
    by_host, found = PresenceByHost(presence), []
    for service in services.largest(_NEIGHBOURS, own):
        known = Selector((Matcher("service", Operator.EQUAL, service), *on_host.matchers))
        present = _Present.of(by_host, known, [host], parts[::-1])
        # They end with the last part.
        samples = services.samples(service, len(parts))[len(parts) - len(present.parts) :]
        found.append(present.stretch(samples[:, None], edge.part_ns))
    return found


def _service_of(read: SideData) -> str:
    """Return the service that a side names, if it names one."""
    named = (
        each.value
        for each in read.operand.selector.matchers
        if each.name == "service" and each.operator == Operator.EQUAL
    )
    return next(named, "")


class _Services:
    """The self samples of services by part and function."""

    def __init__(self, found: Iterable[tuple[int, SelfSamples]]) -> None:
        self._numbers: dict[str, int] = {}
        columns: list[tuple[npt.NDArray[np.int64], ...]] = []
        hashes = [np.zeros(0, np.uint64)]
        for part, each in found:
            services = [
                self._numbers.setdefault(dict(labels).get("service", ""), len(self._numbers))
                for labels in each.service_sets
            ]
            of_line = np.array(services, np.int64)[each.lines[:, 0]]
            columns.append((of_line, np.full(len(of_line), part), each.samples))
            hashes.append(each.function_hashes[each.lines[:, 1]])
        joined = zip(*columns, strict=True) if columns else [[np.zeros(0, np.int64)]] * 3
        self._service, self._part, self._samples = (np.concatenate(each) for each in joined)
        self._hashes = np.concatenate(hashes)

    def largest(self, most: int, but: set[str]) -> list[str]:
        sums = np.bincount(self._service, self._samples, len(self._numbers))
        names = [name for name in self._numbers if name and name not in but]
        return sorted(names, key=lambda name: -sums[self._numbers[name]])[:most]

    def samples(self, service: str, parts: int) -> Floats:
        """Return the samples of its largest functions: a row per part, a column per function."""
        chosen = self._service == self._numbers[service]
        functions, column = np.unique(self._hashes[chosen], return_inverse=True)
        cells = self._part[chosen] * len(functions) + column
        counts = np.bincount(cells, self._samples[chosen], parts * len(functions))
        table = counts.reshape(parts, len(functions)).astype(np.float64, copy=False)
        largest = np.argsort(-table.sum(axis=0), kind="stable")[:_NEIGHBOUR_FUNCTIONS]
        return table[:, largest]
