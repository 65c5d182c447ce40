"""Noise: how far the costs of functions vary while nothing changes.

The noise is estimated from the same pair of windows at earlier times, while the version did not
change: as long and as far apart, on the same hosts; on other days at the same hours if there are
enough days. If there are too few such positions, it is estimated from the differences between
hosts.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from profiler.comparison import provisional, verdict
from profiler.comparison.provisional import Evidence, ProvisionalNoise, Shape, Stretch, Usual
from profiler.comparison.sides import (
    Side,
    WindowPair,
    by_row,
    read_presence,
    service_selector,
)
from profiler.comparison.verdict import AnyNoise, Contrast, Costs, Floats, NoiseSource
from profiler.text import counted
from profiler.times import NS_PER_S, length_text
from storage.profile import Window
from storage.query.query import Query
from storage.query.threads import map_ahead
from storage.selector import Selector

MINUTE_NS = 60 * NS_PER_S
_DAY_NS = 24 * 3600 * NS_PER_S
GRIDS_NS = (
    (60 * MINUTE_NS, 10 * MINUTE_NS),
    (2 * MINUTE_NS, MINUTE_NS),
    (0, 5 * NS_PER_S),
)
"""For spans of at least this length, positions are multiples of this apart: objects begin at
multiples of their length, and ten minutes of them are kept merged."""
HISTORY_NS = _DAY_NS
"""How far back to look for positions that follow each other."""
_MOST_POSITIONS = 24
_AT_ONCE = 2
"""Positions read at a time: while one waits for the store, another is added up."""
_MOST_DAYS = 14
_SMALL = 0.01
"""Of the total: a warning names the smallest change that shows in a function of this size."""


def history(before: Window, after: Window) -> Window:
    """Return the time in which the earlier positions of two windows lie."""
    start_ns, end_ns = min(before.start_ns, after.start_ns), max(before.end_ns, after.end_ns)
    return Window(max(0, start_ns - _MOST_DAYS * _DAY_NS), end_ns)


class Past:
    """The same two windows at earlier positions that do not overlap, the latest first."""

    def __init__(self, query: Query, pair: WindowPair, changes_ns: Sequence[int]) -> None:
        self._query = query
        self._pair = pair
        self.changes_ns = changes_ns
        windows = [read.operand.window for read in pair.reads]
        self.span = Window(min(w.start_ns for w in windows), max(w.end_ns for w in windows))
        self.length_ns = max(w.end_ns - w.start_ns for w in windows)
        overlap = max(w.start_ns for w in windows) < min(w.end_ns for w in windows)
        has_common = set(pair.rows[0]) & set(pair.rows[1])
        self.is_possible = not (overlap and has_common)
        """Otherwise both sides are the same at all earlier positions."""
        span_ns = self.span.end_ns - self.span.start_ns
        grid_ns = next(grid_ns for least_ns, grid_ns in GRIDS_NS if span_ns >= least_ns)
        self.step_ns = -(-span_ns // grid_ns) * grid_ns
        self._selectors = [
            Selector(tuple(m for m in read.operand.selector.matchers if m.name != "version"))
            for read in pair.reads
        ]

    def costs(self) -> Iterator[tuple[Costs, Costs]]:
        """Return the costs of both sides at each position that has samples on both."""
        if not self.is_possible:
            return
        query, positions = self._positions()
        read = self._samples(query, [each.back_ns for each in positions])
        for (_, seconds), samples in zip(positions, read, strict=True):
            before, after = (
                Costs(samples[side], np.array([seconds[side][row] for row in rows]))
                for side, rows in enumerate(self._pair.rows)
            )
            if before.samples.any() and after.samples.any():
                yield before, after

    def _samples(self, query: Query, backs: Sequence[int]) -> Iterator[tuple[Floats, Floats]]:
        """Return for each position the self samples of both sides by row and function."""
        if self._pair.is_from_series:
            with ThreadPoolExecutor(_AT_ONCE, "position") as pool:
                yield from map_ahead(pool, functools.partial(self._read_position, query), backs)
            return
        table, sides = self._pair.table, range(len(self._selectors))
        found = [np.zeros((len(backs), len(h), len(table.frames))) for h in self._pair.rows]
        numbers = [{host: j for j, host in enumerate(hosts)} for hosts in self._pair.rows]
        # All positions are read at once: they share the hours that they lie in.
        for selector in dict.fromkeys(self._selectors):
            asked = [side for side in sides if self._selectors[side] == selector]
            places = [(side, number) for side in asked for number in range(len(backs))]
            windows = [self._window(side, backs[number]) for side, number in places]
            for i, part in query.self_samples(windows, selector):
                side, number = places[i]
                found[side][number] += table.samples(part, numbers[side])
        yield from zip(*found, strict=True)

    def _read_position(self, query: Query, back_ns: int) -> tuple[Floats, Floats]:
        table, groups, found = self._pair.table, self._pair.groups, []
        for side, (selector, names) in enumerate(
            zip(self._selectors, self._pair.rows, strict=True)
        ):
            rows = {row: i for i, row in enumerate(names)}
            samples = np.zeros((len(rows), len(table.frames)))
            window = self._window(side, back_ns)
            for part in query.self_samples_from_series(window, selector, groups):
                samples += table.samples(part, rows)
            found.append(samples)
        return found[0], found[1]

    def _positions(self) -> tuple[Query, list["Position"]]:
        """Return the positions on other days at the same hours, or those that follow each other."""
        span_ns = self.span.end_ns - self.span.start_ns
        days_ns = -(-span_ns // _DAY_NS) * _DAY_NS
        daily = [
            back_ns
            for back_ns in range(days_ns, _MOST_DAYS * _DAY_NS + 1, days_ns)
            if back_ns < self.span.start_ns
        ]
        if len(daily) >= verdict.MIN_POSITIONS and self._has_data(daily[verdict.MIN_POSITIONS - 1]):
            with ThreadPoolExecutor(_AT_ONCE, "position") as pool:
                read = map_ahead(pool, lambda back_ns: self._valid(self._query, [back_ns]), daily)
                found = list(itertools.chain.from_iterable(read))
            if len(found) >= verdict.MIN_POSITIONS:
                return self._query, found
        backs = [self.step_ns * (i + 1) for i in range(_MOST_POSITIONS)]
        backs = [each for each in backs if each <= min(HISTORY_NS, self.span.start_ns)]
        if not backs:
            return self._query, []
        query = self._query.listing(self._back(self.span, backs[-1], 0))
        return query, self._valid(query, backs)

    def _has_data(self, back_ns: int) -> bool:
        window = self._back(self.span, back_ns, back_ns)
        return self._query.has_data(window)

    def _valid(self, query: Query, backs: Sequence[int]) -> list["Position"]:
        """Return the positions at which the service ran on the same hosts, in one version."""
        window = self._back(self.span, backs[-1], backs[0])
        knowns = [service_selector(each) for each in self._selectors]
        edges_ns = {
            edge_ns
            for back_ns in backs
            for each in (self.span, *(read.operand.window for read in self._pair.reads))
            for edge_ns in self._back(each, back_ns, back_ns)
        }
        presences = [
            read_presence(query, window, known, edges_ns) for known in dict.fromkeys(knowns)
        ]
        of_side = [presences[0], presences[-1]]
        hosts = {
            host
            for read, rows in zip(self._pair.reads, self._pair.rows, strict=True)
            for host in (rows if self._pair.groups is None else read.hosts)
        }
        found = []
        for back_ns in backs:
            span = self._back(self.span, back_ns, back_ns)
            if any(span.start_ns < at_ns < span.end_ns for at_ns in self.changes_ns):
                continue
            versions = set()
            for known, presence in zip(knowns, of_side, strict=True):
                versions |= presence.versions(known, span, hosts)
            # Among many services some version always changes.
            if len({service for service, _ in versions}) == 1 and len(versions) > 1:
                continue
            seconds = tuple(
                by_row(presence.seconds(known, self._window(i, back_ns), hosts), self._pair.groups)
                for i, (known, presence) in enumerate(zip(knowns, of_side, strict=True))
            )
            if all(
                set(rows) <= each.keys()
                for rows, each in zip(self._pair.rows, seconds, strict=True)
            ):
                found.append(Position(back_ns, seconds))
        return found

    def _window(self, side: int, back_ns: int) -> Window:
        return self._back(self._pair.reads[side].operand.window, back_ns, back_ns)

    @staticmethod
    def _back(window: Window, start_ns: int, end_ns: int) -> Window:
        return Window(window.start_ns - start_ns, window.end_ns - end_ns)


class Position(NamedTuple):
    back_ns: int
    seconds: tuple[dict[str, float], ...]
    """By side: how long the service ran, by row."""


def estimate_noise(
    pair: WindowPair,
    sides: tuple[Side, Side],
    past: Sequence[Contrast],
    stretches: Callable[[], Sequence[Stretch]],
    neighbours: Callable[[], Sequence[Stretch]],
) -> tuple[Contrast, AnyNoise | None]:
    """Return the contrast of both sides and its noise, None if there is too little data.

    `stretches` reads the times around both windows, and `neighbours` those of other services. They
    are needed where the past is short.
    """
    before, after = sides
    now = pair.contrast(before.costs, after.costs)
    target = _shape(before.window, after.window)
    if len(past) >= verdict.MIN_POSITIONS:
        return of_past(pair, now, past)
    hosts = before.rows, after.rows
    if pair.is_paired and hosts[0] >= verdict.MIN_HOSTS:
        noise = verdict.noise_of_hosts(now)
        source = NoiseSource.GROUPS if before.is_grouped else noise.source
        return now, replace(noise, source=source)
    is_enough = min(hosts) >= verdict.MIN_REPLICATES and sum(hosts) >= verdict.MIN_HOSTS
    if not pair.is_paired and is_enough:
        return verdict.contrast_of_replicates(before.costs, after.costs, NoiseSource.HOSTS)
    is_possible = pair.is_paired and target.distance_s >= target.length_s
    if is_possible and target.length_s >= provisional.MIN_LENGTH_S:
        evidence = [e for stretch in stretches() for e in provisional.of_stretch(stretch, target)]
        # Positions that follow each other lie in the stretch before already.
        if past and not evidence:
            evidence.append(provisional.of_positions(past))
        usual = Usual.of_services(neighbours(), target)
        return now, _of_evidence(now, target, before.rows, evidence, usual)
    return now, None


def of_past(pair: WindowPair, now: Contrast, past: Sequence[Contrast]) -> tuple[Contrast, AnyNoise]:
    """Return a contrast of the pair's windows and its noise by enough earlier positions."""
    target = _shape(*(read.operand.window for read in pair.reads))
    if pair.is_paired and provisional.MIN_LENGTH_S <= target.length_s < provisional.SHORT_S:
        evidence = [provisional.of_positions(past)]
        return now, _of_evidence(now, target, len(pair.rows[0]), evidence)
    return pair.against(now, past)


def _of_evidence(
    now: Contrast,
    target: Shape,
    hosts: int,
    evidence: Sequence[Evidence],
    usual: Usual | None = None,
) -> ProvisionalNoise:
    return ProvisionalNoise((*evidence, *provisional.of_hosts(now)), target, hosts, usual)


def _shape(*windows: Window) -> Shape:
    middles_ns = [(window.start_ns + window.end_ns) / 2 for window in windows]
    length_ns = min(window.end_ns - window.start_ns for window in windows)
    return Shape(length_ns / NS_PER_S, abs(middles_ns[1] - middles_ns[0]) / NS_PER_S)


def too_little(pair: WindowPair, sides: tuple[Side, Side]) -> str:
    """Return a warning that says what a verdict needs, and what could show then."""
    if not pair.is_paired:
        needs = (
            f"the sides have {counted(sides[0].rows, 'host')} and"
            f" {counted(sides[1].rows, 'host')}, and none in common: it takes"
            f" {verdict.MIN_REPLICATES} on each side and {verdict.MIN_HOSTS} in all, or"
            f" {verdict.MIN_POSITIONS} earlier pairs of windows of the same length"
        )
    elif (shape := _shape(*(side.window for side in sides))).distance_s < shape.length_s:
        needs = "the windows overlap"
    else:
        least = length_text(round(provisional.MIN_LENGTH_S) * NS_PER_S)
        needs = f"it takes windows of {least} or more"
    return f"too little data for a verdict: {needs}{visible_change(sides)}"


def visible_change(sides: Sequence[Side]) -> str:
    """Return the end of a warning: the smallest change that so many samples can show."""
    samples = [max(1.0, _SMALL * float(side.samples.sum())) for side in sides]
    reach = NormalDist().inv_cdf(1 - verdict.LEVEL / 2)  # the deviation of counts is known
    least = math.expm1(reach * math.sqrt(sum(1 / each for each in samples)))
    if least > 1:
        return f"; with so few samples no change of a function of {_SMALL:.0%} can show"
    return f"; with so many samples a function of {_SMALL:.0%} must change by {least:.0%} to show"
