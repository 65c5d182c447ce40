"""Verdict: a test for each function whether it costs more or less than before.

The test compares CPU seconds per second of service time, per function and host. Its statistic is
the logarithm of the ratio of after to before, less the *common change*, which is what most of the
large functions do: a busier service raises all functions alike, which is not a change of the code.
Its interval covers the noise between positions and the spread between the functions of now. It
raises them not quite alike: caches hit more often, queues grow. So each function may differ by 15 %
of a common change that is larger than those of the past.

The common change is that of the work done, not that of the CPU time of the service. If a function
grows from 6 to 28 % on a full core, the others do less work in the same CPU time: the common
change is log(72 / 94), -23 %, and each call of the function costs 6.1 times as much. Simulated
with counting and a noise of 10 % (20,000 samples of functions of different sizes, nine positions,
2,000 pairs each), the common change is wrong by (root mean square), and its interval of 95 % holds
the truth in:

    12 functions, 3 of them +50 %              0.079   99 %
     6 functions, 1 of them six-fold           0.070   99 %
     6 functions, the same, on a full core     0.069   99 %
     5 functions, 2 of them +50 %              0.159   92 %
    60 functions, 15 of them +50 %             0.067   91 %
    12 functions, 6 of them +50 %              0.215   79 %

If half of the functions change alike, nobody can tell which half it was. So the spread widens the
interval of each function as well: with a noise of 5 % and 400 pairs each, another function than
those that changed was called changed in 7 % of the pairs in which 6 of 12 did, in 10 % if 3 of 12
did, and in 3 % if one of 6 did on a full core.

The noise of such a ratio is measured, not assumed: from the same contrast at earlier positions of
the same service, or between hosts. The variance of a single function is poorly known from so few
positions, so it is shrunk towards that of functions of its size (Smyth 2004, "Linear models and
empirical Bayes methods", section 6.2). The false discovery rate over all functions is kept at 5 %
(Benjamini and Hochberg 1995).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from profiler.comparison.distributions import (
    digamma,
    inverse_trigamma,
    student_p,
    student_quantile,
    trigamma,
)

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

LEVEL = 0.05
"""The rate of false discoveries among changed functions; intervals have the level 1 - LEVEL."""
MIN_POINTS = 0.001
"""Of the total: a smaller change is called unchanged. Of 200 functions that only vary, most of
those that vary much are small, and nobody acts on them."""
MIN_SHARE = 0.002
"""Of the total: smaller functions do not count for the common change."""
MIN_COMMON = 5
"""The common change needs so many large functions: of fewer, two that change decide the median.
With 10, a load of +30 % made functions of a service with six cost more in each of 400 pairs."""
_UNEQUAL = 0.15
"""The standard deviation of functions' log ratios by a change of the load, as a part of the common
change. It is assumed: the past says nothing of a change of the load that it has not seen."""
_SEEN = 4.0
"""So many times the usual variance of the common change have been seen: a day's swing has twice."""
_OF_MAD, _OF_MEAN = 1.4826, 1.2533
"""The standard deviation of normal values is the first times their median absolute deviation, and
the standard error of `location` at most the second times that of their mean."""
_ALIKE = 1e-9
"""Values that deviate by less are the same."""
_BIWEIGHT, _STEPS = 3.0, 5
"""In standard deviations: what is farther away does not count. So many steps settle it."""
MIN_POSITIONS = 6
MIN_HOSTS = 8
MIN_REPLICATES = 3
_MIN_SAMPLES = 20
"""On a host and side, on average: the logarithm of fewer says little, and a single burst can cause
them. Functions with fewer are not tested, so they do not raise the q-values of others."""
_GUARD = 0.5
"""Samples added to each count, so that none is zero."""


class Change(StrEnum):
    MORE = "more"
    LESS = "less"
    NEW = "new"
    GONE = "gone"
    UNCHANGED = "unchanged"
    TOO_LITTLE = "too little data"


class NoiseSource(StrEnum):
    """What the noise is estimated from."""

    HISTORY = "history"
    WITHIN = "within"
    """Parts of both windows and of the times around them; provisional."""
    FLEET = "fleet"
    """What is usual for functions of other services on the host; provisional."""
    PRIOR = "prior"
    """What is usual for functions of services; provisional."""
    HOSTS = "hosts"
    GROUPS = "groups"
    """Of hosts."""
    REPLICATES = "replicates"
    NONE = "none"


@dataclass(frozen=True, slots=True, eq=False)
class Costs:
    """The self CPU time of a service's functions in one window.

    `samples` has a row per host and a column per function; it may contain fractions. `present_s` is
    how long the service ran on each host; a host with 0 is left out. `steady` says which functions
    may count for the common change; None: all.
    """

    samples: Floats
    present_s: Floats
    steady: Flags | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Contrast:
    """Log ratios of after to before.

    `ratios` has a row per host that is on both sides and a column per function; the `common` change
    is subtracted; `common_spread` is its variance by the spread of the functions. `counting` is the
    variance of a column's mean if nothing changed: 2 / n for two counts of n, and `common_spread`.
    `cells` is the number of counts in a column.
    """

    ratios: Floats
    common: float
    hosts_common: Floats
    counting: Floats
    cells: int
    common_spread: float = 0.0

    @property
    def mean(self) -> Floats:
        mean: Floats = self.ratios.mean(axis=0)
        return mean

    def unequal(self, usual: float) -> float:
        """Return the variance by a load that the past has not seen, which has a usual variance."""
        return _UNEQUAL**2 * max(0.0, self.common**2 - _SEEN * usual)


def contrast(before: Costs, after: Costs) -> Contrast:
    """Compare two windows of the same hosts and functions.

    Raises:
        ValueError: no host has the service on both sides.
    """
    is_there = (before.present_s > 0) & (after.present_s > 0)
    if not is_there.any():
        raise ValueError("cannot compare: no host has the service on both sides")
    counts = [side.samples[is_there] for side in (before, after)]
    spans = [side.present_s[is_there, None] for side in (before, after)]
    rates = [np.log((count + _GUARD) / span) for count, span in zip(counts, spans, strict=True)]
    ratios = rates[1] - rates[0]
    cells = 2 * len(ratios)
    large = large_functions(counts[0].sum(axis=0) + counts[1].sum(axis=0), cells)
    large &= _steady(before, after)
    hosts_common = (
        np.median(ratios[:, large], axis=1) if large.sum() >= MIN_COMMON else np.zeros(len(ratios))
    )
    common, spread = _common(ratios.mean(axis=0)[large])
    # If nothing changed, each side is expected to have its part of the samples of both.
    both, total = counts[0] + counts[1], spans[0] + spans[1]
    expected = [both * span / total + _GUARD for span in spans]
    counting = (1 / expected[0] + 1 / expected[1]).sum(axis=0) / len(ratios) ** 2
    return Contrast(ratios - common, common, hosts_common, counting + spread, cells, spread)


def _steady(*sides: Costs) -> Flags:
    """Return the functions that may count for the common change on both sides."""
    steady = np.ones(sides[0].samples.shape[1], np.bool_)
    for side in sides:
        if side.steady is not None:
            steady &= side.steady
    return steady


def _common(ratios: Floats) -> tuple[float, float]:
    """Return what most of the log ratios are about, and its variance by their spread.

    Both are zero if there are too few.
    """
    if len(ratios) < MIN_COMMON:
        return 0.0, 0.0
    common = location(ratios)
    return common, (_OF_MEAN * _deviation(ratios, common)) ** 2 / len(ratios)


def location(values: Floats) -> float:
    """Return where most of the values lie, whatever the others are.

    It is Tukey's biweight mean, which begins at the mean of the shortest half (Andrews et al. 1972,
    "Robust estimates of location"). If a quarter of the values lie higher they pull the median up
    by 0.43 of the deviation of the others, and this a third as far.
    """
    middle = _shortest_half(values)
    deviation = _deviation(values, middle)
    if deviation < _ALIKE:
        return middle
    for _ in range(_STEPS):
        far = (values - middle) / (_BIWEIGHT * deviation)
        weights = np.maximum(0.0, 1 - far**2) ** 2
        middle = float((weights @ values) / weights.sum())
    return middle


def _shortest_half(values: Floats) -> float:
    """Return the mean of the shortest interval that holds half of the values.

    Of several equally short ones it is that of all: values of opposite sign have the opposite one.
    """
    ordered = np.sort(values)
    half = len(ordered) // 2 + 1
    lengths = ordered[half - 1 :] - ordered[: len(ordered) - half + 1]
    means = np.convolve(ordered, np.full(half, 1 / half), "valid")
    return float(means[lengths <= lengths.min() * (1 + 1e-9) + 1e-12].mean())


def _deviation(values: Floats, middle: float) -> float:
    return _OF_MAD * float(np.median(np.abs(values - middle)))


def large_functions(samples: Floats, cells: int) -> Flags:
    """Return which functions are large enough to count for the common change."""
    least = max(MIN_SHARE * samples.sum(), _MIN_SAMPLES * cells)
    is_large: Flags = samples >= least
    return is_large


@dataclass(frozen=True, slots=True, eq=False)
class Noise:
    """Variances of a contrast's means, each with the same degrees of freedom.

    `counting` is the part of `variances` that comes from counting samples.
    """

    source: NoiseSource
    positions: int
    df: float
    variances: Floats
    counting: Floats
    common_variance: float
    is_provisional: bool = False
    level: float = LEVEL
    """The rate of false discoveries."""

    def test(self, now: Contrast, samples: tuple[Floats, Floats]) -> "Tested":
        """Return p-values and how far the log ratios of functions reach."""
        before, after = samples
        tested = before + after >= _MIN_SAMPLES * now.cells
        variances, df = moderate(self, now.counting, tested)
        deviations = np.sqrt(variances + now.unequal(self.common_variance))
        p = np.ones_like(now.mean)
        p[tested] = student_p(now.mean[tested] / deviations[tested], np.full(tested.sum(), df))
        return Tested(tested, p, student_quantile(LEVEL, df) * deviations)


class Tested(NamedTuple):
    """Which functions were tested, and of each its p-value and half of its interval."""

    functions: npt.NDArray[np.bool_]
    p: Floats
    reach: Floats


class AnyNoise(Protocol):
    """The noise of a contrast, however it is known."""

    @property
    def source(self) -> NoiseSource: ...
    @property
    def positions(self) -> int: ...
    @property
    def df(self) -> float: ...
    @property
    def common_variance(self) -> float: ...
    @property
    def is_provisional(self) -> bool: ...
    @property
    def level(self) -> float: ...
    def test(self, now: Contrast, samples: tuple[Floats, Floats]) -> Tested: ...


def noise_of_history(past: Sequence[Contrast], independent: int) -> Noise:
    """Estimate the noise from the same contrast at earlier positions that do not overlap."""
    means = np.array([each.mean for each in past])
    return Noise(
        source=NoiseSource.HISTORY,
        positions=independent,
        df=float(independent),
        variances=(means**2).mean(axis=0),
        counting=np.mean([each.counting for each in past], axis=0),
        common_variance=float(np.mean([each.common**2 for each in past])),
    )


def against_history(now: Contrast, past: Sequence[Contrast]) -> tuple[Contrast, Noise]:
    """Subtract from a contrast of different hosts the difference that they had in the past."""
    means = np.array([each.mean for each in past])
    commons = np.array([each.common for each in past])
    ratios, common = now.ratios - means.mean(axis=0), now.common - float(commons.mean())
    of_mean = 1 + 1 / len(past)
    noise = Noise(
        source=NoiseSource.HISTORY,
        positions=len(past),
        df=float(len(past) - 1),
        variances=means.var(axis=0, ddof=1) * of_mean,
        counting=np.mean([each.counting for each in past], axis=0) * of_mean,
        common_variance=float(commons.var(ddof=1)) * of_mean,
    )
    return replace(now, ratios=ratios, common=common), noise


def noise_of_hosts(now: Contrast) -> Noise:
    """Estimate the noise from the differences between hosts."""
    hosts = len(now.ratios)
    own = now.ratios - (now.hosts_common - now.common)[:, None]
    return Noise(
        source=NoiseSource.HOSTS,
        positions=hosts,
        df=float(hosts - 1),
        variances=own.var(axis=0, ddof=1) / hosts,
        counting=now.counting,
        common_variance=float(now.hosts_common.var(ddof=1) / hosts),
    )


def contrast_of_replicates(
    before: Costs, after: Costs, source: NoiseSource = NoiseSource.REPLICATES
) -> tuple[Contrast, Noise]:
    """Compare two sets of runs or of different hosts, each a row.

    The noise is the variance between the rows of a side; it has no meaning if both have one row.
    """
    sides = [before, after]
    cells = len(before.samples) + len(after.samples)
    both = before.samples.sum(axis=0) + after.samples.sum(axis=0)
    large = large_functions(both, cells) & _steady(before, after)
    rates = [np.log((each.samples + _GUARD) / each.present_s[:, None]) for each in sides]
    has_common = large.sum() >= MIN_COMMON
    means = [each.mean(axis=0) for each in rates]
    common, spread = _common((means[1] - means[0])[large])
    squares, runs_common, weight = np.zeros(len(both)), 0.0, 0.0
    for each, mean in zip(rates, means, strict=True):
        residuals = each - mean
        own = np.median(residuals[:, large], axis=1) if has_common else np.zeros(len(each))
        squares += ((residuals - own[:, None]) ** 2).sum(axis=0)
        runs_common += float((own**2).sum())
        weight += 1 / len(each)
    df = max(1, sum(len(each) - 1 for each in rates))
    spans = [each.present_s for each in sides]
    total = float(sum(span.sum() for span in spans))
    counting = sum(
        (1 / (np.outer(span, both) / total + _GUARD)).sum(axis=0) / len(span) ** 2 for span in spans
    )
    ratios = (means[1] - means[0] - common)[None]
    noise = Noise(
        source=source,
        positions=sum(len(each) for each in rates),
        df=float(df),
        variances=squares / df * weight,
        counting=np.asarray(counting),
        common_variance=runs_common / df * weight,
    )
    now = Contrast(ratios, common, np.array([common]), np.asarray(counting) + spread, cells, spread)
    return now, noise


class CommonJudgement(NamedTuple):
    low: float
    high: float
    change: Change


def judge_common(now: Contrast, noise: AnyNoise | None) -> CommonJudgement:
    """Return whether all functions together changed, and the interval of the log ratio."""
    if noise is None:
        return CommonJudgement(-math.inf, math.inf, Change.TOO_LITTLE)
    variance = noise.common_variance + now.common_spread
    reach = student_quantile(LEVEL, noise.df) * math.sqrt(variance)
    low, high = now.common - reach, now.common + reach
    change = Change.MORE if low > 0 else Change.LESS if high < 0 else Change.UNCHANGED
    return CommonJudgement(low, high, change)


class Judgement(NamedTuple):
    """Of each function: the log ratio, its interval, p-value, q-value and the change."""

    ratios: Floats
    low: Floats
    high: Floats
    p: Floats
    q: Floats
    changes: list[Change]


def judge(now: Contrast, samples: tuple[Floats, Floats], noise: AnyNoise) -> Judgement:
    """Test every function. `samples` are those of each function before and after, of all hosts."""
    ratios = now.mean
    before, after = samples
    tested, p, reach = noise.test(now, samples)
    q = np.ones_like(ratios)
    q[tested] = adjust(p[tested])
    changes = [Change.UNCHANGED] * len(ratios)
    matters = points_of(ratios, before, after) >= MIN_POINTS
    for i in np.flatnonzero((q <= noise.level) & matters).tolist():
        if not before[i]:
            changes[i] = Change.NEW
        elif not after[i]:
            changes[i] = Change.GONE
        else:
            changes[i] = Change.MORE if ratios[i] > 0 else Change.LESS
    return Judgement(ratios, ratios - reach, ratios + reach, p, q, changes)


def points_of(ratios: Floats, before: Floats, after: Floats) -> Floats:
    """Return changes as parts of the total, the mean of both sides.

    A cost m (1 - x) before and m (1 + x) after has the log ratio 2 atanh(x).
    """
    shares = (before / max(1.0, before.sum()) + after / max(1.0, after.sum())) / 2
    points: Floats = 2 * shares * np.tanh(np.abs(ratios) / 2)
    return points


def moderate(noise: Noise, counting: Floats, tested: npt.NDArray[np.bool_]) -> tuple[Floats, float]:
    """Shrink variances towards those of functions of the same size; return them and their df.

    The expected variance of a function is that of counting its samples plus one that all functions
    share. The deviations of single functions from it are fitted as limma does (Smyth 2004, 6.2).
    """
    if not tested.any():
        return counting + 1.0, noise.df
    over = noise.variances[tested] - noise.counting[tested]
    weights = 1 / noise.counting[tested]
    shared = max(0.0, _weighted_median(over, weights))
    expected = noise.counting + shared
    excess = np.maximum(noise.variances / expected, 1e-6)
    prior_df, prior = fit_variances(excess[tested], noise.df)
    if math.isinf(prior_df):
        factors, df = np.full_like(excess, prior), noise.df * tested.sum()
    else:
        factors = (prior_df * prior + noise.df * excess) / (prior_df + noise.df)
        df = min(prior_df + noise.df, noise.df * tested.sum())
    return np.maximum(factors * (counting + shared), counting), float(df)


def fit_variances(variances: Floats, df: float) -> tuple[float, float]:
    """Fit a scaled F; return the prior's degrees of freedom (maybe infinite) and scale."""
    half = np.array([df / 2])
    logs = np.log(variances) - float(digamma(half)[0]) + math.log(df / 2)
    spread = float(logs.var(ddof=1)) - float(trigamma(half)[0]) if len(logs) > 1 else 0.0
    if spread <= 0:
        return math.inf, math.exp(float(logs.mean()))
    prior_df = 2 * inverse_trigamma(spread)
    shift = float(digamma(np.array([prior_df / 2]))[0]) - math.log(prior_df / 2)
    return prior_df, math.exp(float(logs.mean()) + shift)


def adjust(p: Floats) -> Floats:
    """Return q-values: Benjamini and Hochberg's adjusted p-values."""
    order = np.argsort(p)[::-1]
    ranks = np.arange(len(p), 0, -1)
    q = np.empty_like(p)
    q[order] = np.minimum.accumulate(np.minimum(p[order] * len(p) / ranks, 1.0))
    return q


def _weighted_median(values: Floats, weights: Floats) -> float:
    order = np.argsort(values)
    so_far = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(so_far, so_far[-1] / 2)])
