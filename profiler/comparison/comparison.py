"""A comparison: two sides, what has changed between them, and how certain that is.

A side is a window of a service in a store, or some files. What changed is decided by the noise:
`profiler.comparison.noise` estimates it for a store, and for files it is the difference between the
files of one side. Without an estimate nothing is called changed.

Two sides without a common host, as a canary and the other hosts, are compared as a whole; the
difference that they always had is subtracted.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from profiler.comparison import verdict
from profiler.comparison.distributions import rate_interval
from profiler.comparison.names import Names, stack_warnings
from profiler.comparison.noise import Past, estimate_noise, of_past, too_little, visible_change
from profiler.comparison.sides import ComparisonError, Operand, Side, WindowPair, sides_of_profiles
from profiler.comparison.stretches import read_neighbours, read_stretches
from profiler.comparison.uncertain import largest_uncertain
from profiler.comparison.verdict import (
    AnyNoise,
    Change,
    Contrast,
    Costs,
    Judgement,
    NoiseSource,
)
from profiler.text import counted
from storage.columns import Columns
from storage.query.query import Query
from symbolizer.location import Frame

_LOAD = 0.2
"""If the load certainly changed by more than this part, a warning says so."""
_LISTED_S = 60.0
"""What a window holds is listed once for a comparison, which asks several questions about it."""
_ALIKE = 3
"""So many functions in common make two modules look like one."""


class Function(NamedTuple):
    """A function in a comparison. Triples are an estimate and its 95 % interval."""

    frame: Frame
    self: tuple[float, float]
    total: tuple[float, float]
    cores: tuple[float, float, float]
    """Additional cores per host; the common change is not subtracted."""
    share: tuple[float, float, float]
    """The additional part of the total: 0.01 is one percentage point."""
    relative: tuple[float, float, float]
    """Growth, with the common change subtracted: 0.5 is 50 % more."""
    p: float
    q: float
    change: Change
    because: str
    needs: str = ""
    """What makes it certain, if it is one of the largest differences that are no findings."""


class CommonChange(NamedTuple):
    relative: float
    low: float
    high: float
    change: Change

    @property
    def is_certain(self) -> bool:
        return self.change in (Change.MORE, Change.LESS)


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    before: Side
    after: Side
    source: NoiseSource
    positions: int
    df: float
    common: CommonChange
    functions: tuple[Function, ...]
    """Changed functions first, then the largest differences that are not certain, each by their
    change of the total; then the others by cost."""
    warnings: tuple[str, ...]
    is_provisional: bool = False
    """The noise is known by little: what was found becomes final or is withdrawn with more data."""


def of_store(
    query: Query,
    before: Operand,
    after: Operand,
    changes_ns: Sequence[int] | Callable[[], Sequence[int]] = (),
) -> Comparison:
    """Compare two windows of a store.

    An earlier position counts as unchanged past only if neither one of the times `changes_ns` nor
    a change of the label version lies inside it. A function that returns these times is called
    once both windows are read, so that a caller can find them out meanwhile.

    Raises:
        EmptySideError: a side has no samples.
    """
    query = query.resolving((before.window, after.window)).believing(_LISTED_S)
    pair = WindowPair.read(query, before, after)
    sides = pair.sides()
    past = Past(query, pair, changes_ns() if callable(changes_ns) else changes_ns)
    contrasts = [pair.contrast(*costs) for costs in past.costs()]
    now, noise = estimate_noise(
        pair,
        sides,
        contrasts,
        functools.partial(read_stretches, query, pair, past.changes_ns),
        functools.partial(read_neighbours, query, pair),
    )
    warnings = pair.warnings()
    if noise is None:
        warnings.append(too_little(pair, sides))
    return _judged(sides[0], sides[1], now, noise, warnings)


class Calibration(NamedTuple):
    """The rate of false alarms: of unchanged pairs in which a function is called changed."""

    pairs: int
    alarms: int
    low: float
    high: float
    """The ends of the rate's 95 % interval."""


def calibrate(
    query: Query, before: Operand, after: Operand, changes_ns: Sequence[int] = ()
) -> Calibration:
    """Test each earlier position of two windows with the noise of the other positions.

    Raises:
        ComparisonError: there are too few of them.
    """
    query = query.resolving((before.window, after.window)).believing(_LISTED_S)
    pair = WindowPair.read(query, before, after)
    past = list(Past(query, pair, changes_ns).costs())
    if len(past) <= verdict.MIN_POSITIONS:
        raise ComparisonError(
            f"cannot calibrate: {verdict.MIN_POSITIONS + 1} earlier positions of the same length,"
            f" on the same hosts and of one version are needed, and there are {len(past)}"
        )
    contrasts = [pair.contrast(*costs) for costs in past]
    alarms = 0
    for i, costs in enumerate(past):
        others = [*contrasts[:i], *contrasts[i + 1 :]]
        now, noise = of_past(pair, contrasts[i], others)
        alarms += _is_alarm(pair.table.frames, costs, now, noise)
    return Calibration(len(past), alarms, *rate_interval(alarms, len(past), verdict.LEVEL))


def _is_alarm(
    frames: Sequence[Frame], costs: tuple[Costs, Costs], now: Contrast, noise: AnyNoise
) -> bool:
    """Return whether a function is called changed that has a name on both sides."""
    samples = costs[0].samples.sum(axis=0), costs[1].samples.sum(axis=0)
    found = verdict.judge(now, samples, noise)
    scale = _scale(now, *(float(side.present_s.sum()) for side in costs))
    found, _ = Names.of(frames, *samples).withhold(found, samples, scale, now.cells)
    return not {Change.UNCHANGED, Change.TOO_LITTLE} >= {*found.changes}


def _scale(now: Contrast, before_s: float, after_s: float) -> float:
    """Return how many times the samples of before there are after, but for changes."""
    return math.exp(now.common) * after_s / before_s


def of_profiles(before: Sequence[Columns], after: Sequence[Columns], name: str = "") -> Comparison:
    """Compare files. Several on a side are replicates: their differences are the noise.

    Raises:
        ComparisonError: a side is empty.
    """
    sides = sides_of_profiles(before, after, name)
    warnings: list[str] = []
    if min(len(before), len(after)) >= verdict.MIN_REPLICATES:
        now, noise = verdict.contrast_of_replicates(sides[0].costs, sides[1].costs)
        return _judged(sides[0], sides[1], now, noise, warnings)
    warnings.append(
        f"too little data for a verdict: {counted(len(before), 'file')} before and"
        f" {len(after)} after; the noise is"
        f" estimated from {verdict.MIN_REPLICATES} or more on each side{visible_change(sides)}"
    )
    pooled = [Costs(side.samples.sum(axis=0)[None], np.ones(1)) for side in sides]
    return _judged(sides[0], sides[1], verdict.contrast(*pooled), None, warnings)


def _judged(
    before: Side, after: Side, now: Contrast, noise: AnyNoise | None, warnings: list[str]
) -> Comparison:
    sides = before.samples.sum(axis=0), after.samples.sum(axis=0)
    found = verdict.judge(now, sides, noise) if noise else _undecided(now)
    found, unnamed = _withheld(before, after, now, found)
    needs = largest_uncertain(found, now, noise, (before, after), unnamed)
    common = verdict.judge_common(now, noise)
    costs = before.self_values.sum(axis=0), after.self_values.sum(axis=0)
    wholes = [max(1.0, float(part.sum())) for part in costs]
    totals = before.total_values.sum(axis=0), after.total_values.sum(axis=0)
    present = float(before.present_s.sum()), float(after.present_s.sum())
    # Python's numbers: taken one by one out of arrays, those of a fleet take twice as long.
    costs_of, totals_of = (
        list(zip(*(part.tolist() for part in parts), strict=True)) for parts in (costs, totals)
    )
    ratios, lows, highs = found.ratios.tolist(), found.low.tolist(), found.high.tolist()
    p, q = found.p.tolist(), found.q.tolist()
    functions = []
    for i, frame in enumerate(before.frames):
        own, total = costs_of[i], totals_of[i]
        if not total[0] and not total[1]:
            continue
        ratio, low, high = ratios[i], lows[i], highs[i]
        cores = [part / 1e9 / span for part, span in zip(own, present, strict=True)]
        shares = [part / whole for part, whole in zip(own, wholes, strict=True)]
        functions.append(
            Function(
                frame=frame,
                self=own,
                total=total,
                cores=_spread(cores[0], cores[1], ratio, low, high),
                share=_spread(shares[0], shares[1], ratio, low, high),
                relative=(math.expm1(ratio), math.expm1(low), math.expm1(high)),
                p=p[i],
                q=q[i],
                change=found.changes[i],
                because=unnamed.get(i) or _because(found, i, noise),
                needs=needs.get(i, ""),
            )
        )
    functions.sort(key=_by_weight)
    warnings += _renamed(functions)
    warnings += before.names.warnings() if before.names else []
    warnings += stack_warnings([before.incomplete, after.incomplete])
    load = CommonChange(
        math.expm1(now.common), math.expm1(common.low), math.expm1(common.high), common.change
    )
    if noise:
        large = verdict.large_functions(sides[0] + sides[1], now.cells)
        warnings += _load_warnings(load, int((large & before.steady).sum()), before, after)
    return Comparison(
        before=before,
        after=after,
        source=noise.source if noise else NoiseSource.NONE,
        positions=noise.positions if noise else 0,
        df=noise.df if noise else 0.0,
        common=load,
        functions=tuple(functions),
        warnings=tuple(warnings),
        is_provisional=noise is not None and noise.is_provisional,
    )


def _renamed(functions: Sequence[Function]) -> list[str]:
    """Return warnings about modules that look alike but have another name on each side."""
    names: list[dict[str, set[str]]] = [{}, {}]
    for function in functions:
        for side, total in zip(names, function.total, strict=True):
            if total:
                side.setdefault(function.frame.module, set()).add(function.frame.function)
    before, after = names
    found = []
    for old in sorted(before.keys() - after.keys()):
        for new in sorted(after.keys() - before.keys()):
            smaller = min(len(before[old]), len(after[new]))
            if len(before[old] & after[new]) >= max(_ALIKE, smaller / 2):
                found.append(
                    f"{old} and {new} have the same functions but are compared by file name: give"
                    " both builds the same file name, in different folders"
                )
    return found[:_ALIKE]


def _load_warnings(load: CommonChange, functions: int, before: Side, after: Side) -> list[str]:
    """Say if the load changed, or why that is not known."""
    if functions < verdict.MIN_COMMON:
        text = (
            "a change of the load cannot be told from a change of functions: fewer than"
            f" {verdict.MIN_COMMON} of them are large and have names on both sides"
        )
        return [text]
    reach = (load.high - load.low) / 2
    if not load.is_certain or abs(load.relative) <= _LOAD:
        return [f"the load change is known to ±{100 * reach:.0f} % only"] if reach > _LOAD else []
    changed_by = f"changed by {100 * load.relative:+.0f} %, which is subtracted from each"
    whole = after.cores / before.cores - 1 if before.cores and after.cores else load.relative
    if abs(whole) >= abs(load.relative) / 2 or before.is_of_files:
        return [f"the load changed: most functions together {changed_by}"]
    work = "less work, as if its CPUs were full" if load.relative < 0 else "more work"
    text = (
        f"most functions together {changed_by}, but the service used about as much CPU time as"
        f" before ({100 * whole:+.0f} %): it probably did {work}"
    )
    return [text]


def _withheld(
    before: Side, after: Side, now: Contrast, found: Judgement
) -> tuple[Judgement, dict[int, str]]:
    """Return the judgement without what names cannot decide, and for these functions why not."""
    if before.names is None:
        return found, {}
    scale = _scale(now, *(float(side.present_s.sum()) for side in (before, after)))
    samples = before.samples.sum(axis=0), after.samples.sum(axis=0)
    return before.names.withhold(found, samples, scale, now.cells)


def _undecided(now: Contrast) -> Judgement:
    ratios = now.mean
    without = np.full_like(ratios, np.inf)
    ones = np.ones_like(ratios)
    return Judgement(ratios, -without, without, ones, ones, [Change.TOO_LITTLE] * len(ratios))


def _spread(
    before: float, after: float, ratio: float, low: float, high: float
) -> tuple[float, float, float]:
    """Return a difference, with its interval scaled from that of the log ratio."""
    middle = (before + after) / 2
    change = after - before
    if not middle:
        return change, change, change
    return change, change - middle * (ratio - low), change + middle * (high - ratio)


def _because(found: Judgement, i: int, noise: AnyNoise | None) -> str:
    if noise is None:
        return "normal variation not known"
    if found.changes[i] == Change.UNCHANGED and found.q[i] <= verdict.LEVEL:
        return f"changed by less than {100 * verdict.MIN_POINTS:.1f} % of the total"
    reach = float(found.high[i] - found.low[i]) / 2
    return f"normal variation ±{100 * math.expm1(reach):.0f} %"


def _by_weight(function: Function) -> tuple[int, float]:
    if function.change not in (Change.UNCHANGED, Change.TOO_LITTLE):
        return 0, -abs(function.share[0])
    if function.needs:  # as `verdict.points_of`
        return 1, -sum(function.self) * math.tanh(abs(math.log1p(function.relative[0])) / 2)
    return 2, -max(function.self)


def changed(functions: Iterable[Function]) -> list[Function]:
    return [f for f in functions if f.change not in (Change.UNCHANGED, Change.TOO_LITTLE)]


def uncertain(functions: Iterable[Function]) -> list[Function]:
    """Return the largest differences that are not certain yet."""
    return [f for f in functions if f.needs]
