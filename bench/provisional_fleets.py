"""Provisional verdicts in simulated fleets: false alarms and found changes soon after a deployment.

The fleets are those of `bench_compare`, but minutes are counted one by one. The past is as short as
the line says, the sides are three minutes apart, and windows are as long as for a deployment
(`profiler.comparison.matching`): two minutes or a third of the past, at most the time after it.
Where the past has six earlier positions of such windows, the verdict is final, as it always was. In
the last lines other services run beside, whose past of twenty minutes says what is usual.

Beside it on the same data: the rule that gives no verdict without six earlier positions, with the
past that it takes; two rules of `simulated_fleets`; and the bands in which CPython 3.15 colours the
functions of a differential flame graph: none below 15 %, then 30, 50 and 100 %
(`getDiffColorForNode` in Lib/profiling/sampling/_flamegraph_assets/flamegraph.js; the baseline is
scaled to the same total). A band alarms here if a function of at least 1 % of the total is in it.
"""

from collections import Counter
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
from simulated_fleets import (
    DEVIATIONS,
    Line,
    Table,
    by_proportions,
    by_ratio,
    expected_minutes,
    function_of,
    growths,
    interval,
    is_too_often,
)

from profiler.comparison import provisional, verdict
from profiler.comparison.provisional import ProvisionalNoise, Shape, Stretch, Usual
from profiler.comparison.verdict import Change, Contrast, Costs, Floats


class Case(NamedTuple):
    past_min: int
    after_min: int
    hosts: int
    sd: float
    others: int = 0
    """Other services on the host, which vary about as much."""


FUNCTIONS = 200
GAP_MIN = 3
"""A window in which the version changes, and two until it has settled."""
LEAST_MIN, PARTS_OF_PAST = 2, 3
MOST_PARTS = 30
HOSTS = (1, 3)
PASTS_MIN = (2, 5, 20, 60)
AFTERS_MIN = (1, 2, 5)
SHARE = 0.06
GROWTHS = (2.0, 1.5)
GOAL = Case(2, 2, 1, 0.10)
"""Where the first growth must be found."""
GOAL_FOUND = 0.9
OTHERS, OTHER_FUNCTIONS, OTHER_MIN, OTHER_LOG_SD = 8, 60, 20, 0.3
"""Services beside it, on half a core each; how differently they vary is the deviation of the
logarithm of theirs."""
BANDS = (0.15, 0.30, 0.50, 1.00)
BAND_SHARE = 0.01
POWER_PART = 2
"""Growth is measured with half of the pairs."""


def length_of(past_min: int, after_min: int) -> int:
    return min(after_min, max(LEAST_MIN, past_min // PARTS_OF_PAST), past_min)


def past_needed(length_min: int) -> int:
    """Return the past that has six earlier positions, in minutes."""
    return verdict.MIN_POSITIONS * (2 * length_min + GAP_MIN) + length_min


@dataclass
class Deployed:
    """The minutes around a deployment that changed nothing, by minute, host and function."""

    before: Floats
    expected: Floats
    """Samples of the minutes after, were they not counted."""
    others: list[Stretch]
    """Of other services, on the first host."""

    @classmethod
    def simulate(cls, rng: np.random.Generator, case: Case) -> "Deployed":
        past_min, after_min, hosts, sd, others = case
        minutes = past_min + GAP_MIN + after_min
        rates, cost = expected_minutes(rng, (hosts, FUNCTIONS), sd, minutes)
        expected = np.moveaxis(rates[:, :, None] * cost, 2, 0)
        before = rng.poisson(expected[:past_min]).astype(float)
        beside = [_beside(rng, sd) for _ in range(others)]
        return cls(before, expected[past_min + GAP_MIN :], beside)

    def after(self, rng: np.random.Generator, which: int = 0, factor: float = 1.0) -> Floats:
        expected = self.expected.copy()
        expected[:, :, which] *= factor
        return rng.poisson(expected).astype(float)

    @property
    def length_min(self) -> int:
        return length_of(len(self.before), len(self.expected))

    def sides(self, after: Floats) -> tuple[Floats, Floats]:
        """Return the samples of both windows, by host and function."""
        length = self.length_min
        return self.before[-length:].sum(axis=0), after[:length].sum(axis=0)

    def judge(self, after: Floats) -> list[Change]:
        sides = self.sides(after)
        now = verdict.contrast(*map(self._costs, sides))
        past = self.positions()
        length_s = 60.0 * self.length_min
        target = Shape(length_s, length_s + 60.0 * GAP_MIN)
        noise: verdict.AnyNoise
        if len(past) >= verdict.MIN_POSITIONS and length_s >= provisional.SHORT_S:
            noise = verdict.noise_of_history(past, len(past))
        elif len(past) >= verdict.MIN_POSITIONS:
            evidence = [provisional.of_positions(past), *provisional.of_hosts(now)]
            noise = ProvisionalNoise(tuple(evidence), target, len(now.ratios))
        else:
            known = [self.before[-MOST_PARTS:], after[:MOST_PARTS]]
            stretches = [Stretch(each, np.full(each.shape[:2], 60.0), 60.0) for each in known]
            evidence = [
                each for stretch in stretches for each in provisional.of_stretch(stretch, target)
            ]
            evidence += provisional.of_hosts(now)
            usual = Usual.of_services(self.others, target)
            noise = ProvisionalNoise(tuple(evidence), target, len(now.ratios), usual)
        return verdict.judge(now, (sides[0].sum(axis=0), sides[1].sum(axis=0)), noise).changes

    def alarms_by_history(self, after: Floats) -> bool:
        """Return whether six earlier positions alone find a change."""
        past, sides = self.positions(), self.sides(after)
        if len(past) < verdict.MIN_POSITIONS:
            return False
        now, noise = (
            verdict.contrast(*map(self._costs, sides)),
            verdict.noise_of_history(past, len(past)),
        )
        samples = sides[0].sum(axis=0), sides[1].sum(axis=0)
        return set(verdict.judge(now, samples, noise).changes) != {Change.UNCHANGED}

    def positions(self) -> list[Contrast]:
        """Return the same contrast at earlier positions that do not overlap."""
        length, span = self.length_min, 2 * self.length_min + GAP_MIN
        found = []
        for begin in range(len(self.before) - length - span, -1, -span):
            sides = (
                self.before[at : at + length].sum(axis=0) for at in (begin, begin + span - length)
            )
            found.append(verdict.contrast(*map(self._costs, sides)))
        return found

    def _costs(self, samples: Floats) -> Costs:
        return Costs(samples, np.full(len(samples), 60.0 * self.length_min))


def _beside(rng: np.random.Generator, sd: float) -> Stretch:
    """Return the minutes of another service before the deployment."""
    own_sd = sd * float(np.exp(rng.normal(0, OTHER_LOG_SD)))
    rates, cost = expected_minutes(rng, (1, OTHER_FUNCTIONS), own_sd, OTHER_MIN)
    samples = rng.poisson(np.moveaxis(rates[:, :, None] * cost / 2, 2, 0)).astype(float)
    return Stretch(samples, np.full((OTHER_MIN, 1), 60.0), 60.0)


def band_of(before: Floats, after: Floats) -> int:
    """Return in how many of the bands the function is that changed the most; 0 is no colour."""
    large = before / before.sum() + after / after.sum() >= 2 * BAND_SHARE
    most = np.abs(growths(before, after)[large]).max(initial=0.0)
    return sum(bool(most >= least) for least in BANDS)


def measure(seed: list[int], pairs: int, case: Case) -> Line:
    rng = np.random.default_rng(seed)
    past_min, after_min, hosts, sd, others = case
    alarms = by_history = ratios = proportions = 0
    bands: Counter[int] = Counter()
    for _ in range(pairs):
        pair = Deployed.simulate(rng, case)
        after = pair.after(rng)
        alarms += set(pair.judge(after)) != {Change.UNCHANGED}
        by_history += pair.alarms_by_history(after)
        sums = [side.sum(axis=0) for side in pair.sides(after)]
        ratios += by_ratio(*sums)
        proportions += by_proportions(*sums)
        bands.update(range(band_of(*sums)))
    few = max(1, pairs // POWER_PART)
    found, wrong = _found(rng, few, case)
    is_goal = case == GOAL
    is_lost = is_goal and found[0] < GOAL_FOUND * few
    is_often = is_too_often(alarms, pairs)
    needed = past_needed(length_of(past_min, after_min))
    today = f"none below {needed} min" if past_min < needed else f"{by_history / pairs:.1%}"
    in_bands = "/".join(f"{bands[i] / pairs:.0%}" for i in range(len(BANDS)))
    aim = f"  (at least 90 %: {'MISSED' if is_lost else 'ok'})" if is_goal else ""
    return (
        f"{past_min:4} {after_min:5} {hosts:5} {others:6} {sd:4.2f}  {interval(alarms, pairs):24}"
        f" {found[0] / few:5.0%} {found[1] / few:5.0%} {wrong / few:6.1%}"
        f"  {today:17} {ratios / pairs:5.0%} {proportions / pairs:5.0%}  {in_bands:18}"
        f" (at most 5 %: {'MISSED' if is_often else 'ok'}){aim}"
    ), is_often or is_lost


def _found(rng: np.random.Generator, pairs: int, case: Case) -> tuple[list[int], int]:
    """Return how often each growth is found, and others beside the first one are."""
    which = function_of(SHARE, FUNCTIONS)
    found, others = [0] * len(GROWTHS), 0
    for _ in range(pairs):
        pair = Deployed.simulate(rng, case)
        for i, growth in enumerate(GROWTHS):
            changes = pair.judge(pair.after(rng, which, growth))
            found[i] += changes.pop(which) == Change.MORE
            others += i == 0 and set(changes) != {Change.UNCHANGED}
    return found, others


def table(pairs: int) -> Table:
    few = max(1, pairs // POWER_PART)
    bands = ", ".join(f"{band:.0%}" for band in BANDS)
    head = (
        f"short pasts, nothing changed, {pairs:,} pairs each: pairs with any alarm (95 % interval)."
        f" A function of {SHARE:.0%} self\nthat grows, {few:,} pairs each: found, and with x2"
        " others called changed. Beside it the rule of six positions,\n"
        f"ratio > 0.1 %, proportions, and CPython's bands from {bands}\n"
        f"past after hosts beside   sd  {'everflame':24} {'x2':>5} {'+50%':>5} {'wrong':>6}"
        f"  {'six positions':17} {'ratio':>5} {'prop.':>5}  bands"
    )
    lines = [
        (pairs, Case(past_min, after_min, hosts, sd))
        for hosts, past_min, after_min, sd in product(HOSTS, PASTS_MIN, AFTERS_MIN, DEVIATIONS)
    ]
    lines += [
        (pairs, Case(2, after_min, 1, sd, OTHERS)) for after_min in (1, 2) for sd in DEVIATIONS
    ]
    return Table(head, measure, lines)
