"""A comparison: two sides of costs, what has changed between them, and how certain that is.

A side is a window of a service in a store, or some files. Of a store the service's own past tells
how far costs stray when nothing has changed: the same two windows, as long and as far apart, are
compared at earlier positions, on the same hosts, wherever the service ran one and the same version.
Where there are too few such positions hosts are compared with each other, and of files replicates
of one side. Where there is none of these nothing is called changed.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from profiler import verdict
from profiler.verdict import Change, Contrast, Costs, Floats, Judgement, Noise, Source
from storage.columns import Columns, Hasher
from storage.profile import Profile, Window
from storage.query import Query
from storage.selector import Selector
from storage.sums import Sums
from symbolizer.location import Frame

HISTORY_NS = 24 * 3600 * 10**9
"""How far back earlier positions are looked for."""
MAX_POSITIONS = 24
_SERVICE_LABELS = frozenset({"service", "version", "host", "container", "pod", "namespace", "unit"})
"""Labels that `present_ns` is known by."""
_SECOND_NS = 10**9


class ComparisonError(ValueError):
    """There is nothing to compare; the message says on which side."""


class Operand(NamedTuple):
    """What one side is taken from in a store."""

    selector: Selector
    window: Window

    def __str__(self) -> str:
        return f"{self.selector}@{self.window.start_ns}..{self.window.end_ns}"


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """One side: costs by host (or replicate) and function."""

    query: str
    window: Window
    hosts: tuple[str, ...]
    frames: tuple[Frame, ...]
    samples: Floats
    """Self samples: a row per host, a column per function."""
    self_values: Floats
    total_values: Floats
    present_s: Floats
    """For how long the service was there, by host."""
    versions: tuple[str, ...] = ()

    @property
    def total(self) -> float:
        return float(self.self_values.sum())

    @property
    def cores(self) -> float:
        """Mean cores while the service was there, a host."""
        return self.total / 1e9 / max(1e-9, float(self.present_s.sum()))


class Function(NamedTuple):
    """One line of the answer. Triples are an estimate and its 95 % interval."""

    frame: Frame
    self: tuple[float, float]
    total: tuple[float, float]
    cores: tuple[float, float, float]
    """Cores a host that the after side has more, not less the common change."""
    share: tuple[float, float, float]
    """Points of the total (0.01 is one per cent) that the after side has more."""
    relative: tuple[float, float, float]
    """Growth less the common change: 0.5 is half as much again."""
    p: float
    q: float
    change: Change
    because: str


class CommonChange(NamedTuple):
    relative: float
    low: float
    high: float
    change: Change


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    before: Side
    after: Side
    source: Source
    positions: int
    df: float
    common: CommonChange
    functions: tuple[Function, ...]
    """By how much they matter: what changed first, then by cost."""
    warnings: tuple[str, ...]


def of_store(query: Query, before: Operand, after: Operand) -> Comparison:
    """Compare two windows of a store.

    Raises:
        ComparisonError: a side is empty, or no host is on both.
    """
    table = _Functions()
    sides = [_read(query, operand, table) for operand in (before, after)]
    hosts = sorted(set(sides[0].hosts) & set(sides[1].hosts))
    for name, side, operand in zip(("before", "after"), sides, (before, after), strict=True):
        if not side.samples.sum():
            raise ComparisonError(f"nothing to compare: the {name} side {operand} has no samples")
    if not hosts:
        raise ComparisonError("nothing to compare: no host has the service on both sides")
    warnings = _one_sided(sides[0], sides[1])
    past = list(_past(query, before, after, hosts, table))
    sides = [_align(side, hosts, table) for side in sides]
    now = verdict.contrast(_costs(sides[0]), _costs(sides[1]))
    contrasts = [
        verdict.contrast(*(_costs(_align(side, hosts, table)) for side in pair)) for pair in past
    ]
    noise = None
    if len(contrasts) >= verdict.MIN_POSITIONS:
        noise = verdict.noise_of_history(contrasts, len(contrasts))
    elif len(hosts) >= verdict.MIN_HOSTS:
        noise = verdict.noise_of_hosts(now)
    else:
        warnings.append(
            f"too little data for a verdict: {len(contrasts)} earlier positions of the same length"
            f" (of {verdict.MIN_POSITIONS}) and {len(hosts)} hosts (of {verdict.MIN_HOSTS})"
        )
    return _judged(sides[0], sides[1], now, noise, warnings)


class Calibration(NamedTuple):
    """Of how many unchanged pairs of windows any function was called changed, and their rate."""

    pairs: int
    alarms: int
    low: float
    high: float
    """The ends of the rate's 95 % interval."""


def calibrate(query: Query, before: Operand, after: Operand) -> Calibration:
    """Judge each earlier position of two windows by the others, by the same rule as ever.

    Raises:
        ComparisonError: there are too few of them.
    """
    table = _Functions()
    ends = [_read(query, operand, table) for operand in (before, after)]
    hosts = sorted(set(ends[0].hosts) & set(ends[1].hosts))
    found = list(_past(query, before, after, hosts, table))
    if len(found) <= verdict.MIN_POSITIONS:
        raise ComparisonError(
            f"nothing to calibrate with: {len(found)} earlier positions of the same length, on the"
            f" same hosts and of one version, and it takes {verdict.MIN_POSITIONS + 1}"
        )
    past = [[_align(side, hosts, table) for side in pair] for pair in found]
    contrasts = [verdict.contrast(*map(_costs, pair)) for pair in past]
    alarms = 0
    for i, (now, pair) in enumerate(zip(contrasts, past, strict=True)):
        others = [*contrasts[:i], *contrasts[i + 1 :]]
        noise = verdict.noise_of_history(others, len(others))
        samples = pair[0].samples.sum(axis=0), pair[1].samples.sum(axis=0)
        alarms += set(verdict.judge(now, samples, noise).changes) != {Change.UNCHANGED}
    return Calibration(len(past), alarms, *verdict.rate_interval(alarms, len(past)))


def of_profiles(before: Sequence[Profile], after: Sequence[Profile], name: str = "") -> Comparison:
    """Compare files. Several a side are replicates: what differs between them is the noise.

    Raises:
        ComparisonError: a side is empty.
    """
    table = _Functions()
    sides = [_of_profiles(profiles, table, name) for profiles in (before, after)]
    for which, side in zip(("before", "after"), sides, strict=True):
        if not side.samples.sum():
            raise ComparisonError(f"nothing to compare: the {which} side has no samples")
    sides = [_align(side, side.hosts, table) for side in sides]
    warnings: list[str] = []
    if min(len(before), len(after)) >= verdict.MIN_REPLICATES:
        now, noise = verdict.contrast_of_replicates(_costs(sides[0]), _costs(sides[1]))
        return _judged(sides[0], sides[1], now, noise, warnings)
    warnings.append(
        f"too little data for a verdict: {len(before)} and {len(after)} files;"
        f" {verdict.MIN_REPLICATES} or more a side tell how far they stray"
    )
    pooled = [Costs(side.samples.sum(axis=0)[None], np.ones(1)) for side in sides]
    return _judged(sides[0], sides[1], verdict.contrast(*pooled), None, warnings)


# Reading.


class _Functions:
    """The functions of all sides and positions, each with its column."""

    def __init__(self) -> None:
        self.numbers: dict[tuple[str, str, str], int] = {}
        self.frames: list[Frame] = []

    def number(self, frame: Frame) -> int:
        key = (frame.function, frame.module, frame.kind)
        if key not in self.numbers:
            self.numbers[key] = len(self.frames)
            self.frames.append(frame)
        return self.numbers[key]


def _read(query: Query, operand: Operand, table: _Functions) -> Side:
    """Read one window of a store, by host."""
    selector, window = operand
    found = query.functions(window, selector, by=("host",))
    lines = [(dict(row.labels).get("host", ""), table.number(row.frame), row) for row in found.rows]
    present, versions = _presence(query, operand)
    hosts = sorted({host for host, _, _ in lines} | present.keys())
    places = {host: i for i, host in enumerate(hosts)}
    samples, selfs, totals = np.zeros((3, len(hosts), len(table.frames)))
    for host, column, row in lines:
        samples[places[host], column] += row.self_samples
        selfs[places[host], column] += row.self
        totals[places[host], column] += row.total
    present_s = np.array([present.get(host, 0.0) for host in hosts])
    return Side(
        str(selector),
        window,
        tuple(hosts),
        tuple(table.frames),
        samples,
        selfs,
        totals,
        present_s,
        versions,
    )


def _presence(query: Query, operand: Operand) -> tuple[dict[str, float], tuple[str, ...]]:
    """Give for how long the service was there, by host in s, and in which versions."""
    selector, window = operand
    known = Selector(tuple(each for each in selector.matchers if each.name in _SERVICE_LABELS))
    found = query.presence(window, known)
    seconds: dict[str, float] = {}
    versions = set()
    for _, number, present_ns in found.rows.tolist():
        labels = dict(found.label_sets[number])
        host = labels.get("host", "")
        seconds[host] = seconds.get(host, 0.0) + present_ns / _SECOND_NS
        versions.add(labels.get("version", ""))
    return seconds, tuple(sorted(versions - {""}))


def _past(
    query: Query, before: Operand, after: Operand, hosts: Sequence[str], table: _Functions
) -> Iterator[tuple[Side, Side]]:
    """Give the same pair of windows at earlier positions that do not overlap, the latest first."""
    start_ns = min(before.window.start_ns, after.window.start_ns)
    span_ns = max(before.window.end_ns, after.window.end_ns) - start_ns
    for number in range(1, MAX_POSITIONS + 1):
        back_ns = number * span_ns
        if back_ns > HISTORY_NS:
            return
        pair = [
            Operand(before.selector, Window(*(at - back_ns for at in operand.window)))
            for operand in (before, after)
        ]
        if pair[0].window.start_ns < 0:
            return
        sides = [_read(query, operand, table) for operand in pair]
        is_one_version = len({*sides[0].versions, *sides[1].versions}) <= 1
        is_complete = all(set(hosts) <= set(side.hosts) for side in sides)
        if is_complete and is_one_version and all(side.samples.sum() for side in sides):
            yield sides[0], sides[1]


def _of_profiles(profiles: Sequence[Profile], table: _Functions, name: str) -> Side:
    hasher = Hasher(b"comparison")
    lines = []
    windows = [profile.window for profile in profiles]
    for i, profile in enumerate(profiles):
        sums = Sums.of(Columns.of(profile, hasher), hasher)
        lines += [(i, table.number(row.frame), row) for row in sums.function_sums()]
    samples, selfs, totals = np.zeros((3, len(profiles), len(table.frames)))
    for i, column, row in lines:
        samples[i, column] += row.self_samples
        selfs[i, column] += row.self
        totals[i, column] += row.total
    window = Window(min(w.start_ns for w in windows), max(w.end_ns for w in windows))
    present_s = np.array([max(1, w.end_ns - w.start_ns) / _SECOND_NS for w in windows])
    names = tuple(f"file {i + 1}" for i in range(len(profiles)))
    return Side(name, window, names, tuple(table.frames), samples, selfs, totals, present_s)


def _align(side: Side, hosts: Sequence[str], table: _Functions) -> Side:
    """Give the side with these hosts as rows and all functions as columns."""
    rows = [side.hosts.index(host) for host in hosts]
    missing = len(table.frames) - side.samples.shape[1]

    def aligned(values: Floats) -> Floats:
        return np.pad(values[rows], ((0, 0), (0, missing)))

    return replace(
        side,
        hosts=tuple(hosts),
        frames=tuple(table.frames),
        samples=aligned(side.samples),
        self_values=aligned(side.self_values),
        total_values=aligned(side.total_values),
        present_s=side.present_s[rows],
    )


def _costs(side: Side) -> Costs:
    return Costs(side.samples, side.present_s)


def _one_sided(before: Side, after: Side) -> list[str]:
    """Say which hosts are left out."""
    found = []
    for name, one, other in (("before", before, after), ("after", after, before)):
        alone = sorted(set(one.hosts) - set(other.hosts))
        if alone:
            shown = ", ".join(alone[:5]) + (f" and {len(alone) - 5} more" if alone[5:] else "")
            found.append(f"left out, only on the {name} side: {shown}")
    return found


# Judging.


def _judged(
    before: Side, after: Side, now: Contrast, noise: Noise | None, warnings: list[str]
) -> Comparison:
    sides = before.samples.sum(axis=0), after.samples.sum(axis=0)
    found = verdict.judge(now, sides, noise) if noise else _undecided(now)
    common = verdict.judge_common(now, noise)
    selfs = before.self_values.sum(axis=0), after.self_values.sum(axis=0)
    totals = before.total_values.sum(axis=0), after.total_values.sum(axis=0)
    present = float(before.present_s.sum()), float(after.present_s.sum())
    functions = []
    for i, frame in enumerate(before.frames):
        if not totals[0][i] and not totals[1][i]:
            continue
        ratio, low, high = (float(each[i]) for each in (found.ratios, found.low, found.high))
        cores = [float(part[i]) / 1e9 / span for part, span in zip(selfs, present, strict=True)]
        shares = [float(part[i] / max(1.0, part.sum())) for part in selfs]
        functions.append(
            Function(
                frame=frame,
                self=(float(selfs[0][i]), float(selfs[1][i])),
                total=(float(totals[0][i]), float(totals[1][i])),
                cores=_spread(cores[0], cores[1], ratio, low, high),
                share=_spread(shares[0], shares[1], ratio, low, high),
                relative=(math.expm1(ratio), math.expm1(low), math.expm1(high)),
                p=float(found.p[i]),
                q=float(found.q[i]),
                change=found.changes[i],
                because=_because(found, i, noise),
            )
        )
    functions.sort(key=_by_weight)
    growth = math.expm1(now.common)
    if abs(growth) > 0.2:
        warnings.append(f"the load changed: all functions by {growth:+.0%} in common")
    return Comparison(
        before=before,
        after=after,
        source=noise.source if noise else Source.NONE,
        positions=noise.positions if noise else 0,
        df=noise.df if noise else 0.0,
        common=CommonChange(growth, math.expm1(common.low), math.expm1(common.high), common.change),
        functions=tuple(functions),
        warnings=tuple(warnings),
    )


def _undecided(now: Contrast) -> Judgement:
    ratios = now.mean
    without = np.full_like(ratios, np.inf)
    ones = np.ones_like(ratios)
    return Judgement(ratios, -without, without, ones, ones, [Change.TOO_LITTLE] * len(ratios))


def _spread(
    before: float, after: float, ratio: float, low: float, high: float
) -> tuple[float, float, float]:
    """Give a difference with an interval as wide as that of the log ratio makes it."""
    middle = (before + after) / 2
    change = after - before
    if not middle:
        return change, change, change
    return change, change - middle * (ratio - low), change + middle * (high - ratio)


def _because(found: Judgement, i: int, noise: Noise | None) -> str:
    if noise is None:
        return "nothing tells how far it strays when nothing has changed"
    reach = float(found.high[i] - found.low[i]) / 2
    if found.changes[i] == Change.UNCHANGED:
        return f"changes below {math.expm1(reach):.0%} would not show"
    return f"strays by {math.expm1(reach):.0%} when nothing has changed"


def _by_weight(function: Function) -> tuple[bool, float]:
    is_changed = function.change not in (Change.UNCHANGED, Change.TOO_LITTLE)
    weight = abs(function.share[0]) if is_changed else max(function.self)
    return not is_changed, -weight


def changed(functions: Iterable[Function]) -> list[Function]:
    return [f for f in functions if f.change not in (Change.UNCHANGED, Change.TOO_LITTLE)]
