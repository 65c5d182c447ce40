"""Provisional verdicts: the noise of a comparison whose own past is too short to measure it.

Each *evidence* is the same contrast where nothing had changed: between parts of the time before, or
of the time after; at earlier positions, of which there are too few; between hosts. Of one function
each says little, so that they are taken together, with what is usual for functions of services: of
other services on the host, or by experience (`Usual`). The log ratio x of a function is modelled as

    x ~ N(0, counting + factor * s * theta),   nu / theta ~ chi2(nu)

`counting` is known, `s` is the variance that functions have over the two windows that are compared,
and `theta` is by how much a single function differs from that (Smyth 2004, "Linear models and
empirical Bayes methods"). `s` and `nu` have priors, their posterior is computed on a grid, and a
p-value is the mean of those of Student's t over it: so not knowing the noise well makes p larger.
The degrees of freedom are those of a sum of which one part is known (Satterthwaite 1946, "An
approximate distribution of estimates of variance components"): of a function with few samples
little depends on how much it may vary.

Parts of a few minutes lie nearer to each other than the two windows do, and noise grows with the
distance. `variogram` says by how much, for noise with a correlation time of 6 minutes; with more
data the distances become equal, and this assumption means nothing any more.

bench/bench_compare.py says how often such a verdict is wrong.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from profiler.comparison.distributions import Floats, log_student, student_p, student_quantile
from profiler.comparison.verdict import (
    LEVEL,
    MIN_POSITIONS,
    Contrast,
    Costs,
    NoiseSource,
    Tested,
    contrast,
)

FALSE_DISCOVERIES, OF_A_MINUTE = 0.025, 0.015
"""The rate of false discoveries, less than with many earlier positions: the noise is modelled.
The second is that of windows below two minutes, where one minute's burst looks like a change."""
_TWO_MINUTES_S = 120.0
MIN_SHARE = 0.01
"""Of the total, the mean of both sides: smaller functions have to wait for more data."""
MIN_SAMPLES = 100
"""On a host and side, on average; with fewer, counting alone says too little."""
MIN_LENGTH_S, SHORT_S = 60.0, 300.0
"""Windows from the one to the other are judged in this way even with six earlier positions, which
alone find too many changes in them."""
_MIN_SAMPLES = 20
"""The same of a function that says something about the noise."""
_CORRELATION_S = 360.0
_USUAL_SD, _USUAL_LOG_SD = 0.10, 1.1
"""How much the cost of a function usually varies, and how certain that is: as the standard
deviation of its logarithm, and that of the variance's logarithm."""
_SERVICES_LOG_SD = 0.8
"""The part of the latter by which services of one host differ."""
_USUAL_COMMON_SD, _USUAL_COMMON_DF = 0.2, 4.0
"""The same of the load, as so many degrees of freedom."""
_VARIANCES = np.exp(np.linspace(math.log(1e-5), math.log(3.0), 40))
_LEAST_SAID = 0.1
"""In units of what experience says: a service that says less does not count."""
_FREEDOMS = np.array([4.0, 6.0, 10.0, 16.0, 30.0, 100.0])
_MOST_DF = 1e4
_LEAST_WEIGHT = 1e-9
"""Of a variance and a freedom that are looked at."""
_FREEDOM_WEIGHTS = np.array([1.0, 2.0, 3.0, 3.0, 2.0, 1.0])
_SAME = 1.05
"""Up to this factor a contrast is the same as that of the windows, which makes it a position."""


class Shape(NamedTuple):
    """Two windows: how long each is, and how far their centres are apart."""

    length_s: float
    distance_s: float


def variogram(shape: Shape) -> float:
    """Return the variance of the difference of two windows' means, for noise of variance 1.

    The noise is an Ornstein-Uhlenbeck process; its covariance is integrated over the windows.
    """
    length, distance = shape.length_s / _CORRELATION_S, shape.distance_s / _CORRELATION_S
    within = 2 / length**2 * (length - 1 + math.exp(-length))
    across = math.exp(length - distance) * ((1 - math.exp(-length)) / length) ** 2
    return 2 * (within - across)


class Stretch(NamedTuple):
    """A time without a change, in parts of equal length that follow each other.

    `samples` have a row per part, then per host, then a column per function; `present_s` is how
    long the service ran, by part and host.
    """

    samples: Floats
    present_s: Floats
    part_s: float


class Evidence(NamedTuple):
    """Contrasts between times, or hosts, that only noise tells apart: a row each.

    Attributes:
        ratios: a column per function; the common change is subtracted.
        commons: the common changes.
        counting: the variances that come from counting samples.
        factor: how much of `s` they have.
        weight: as how many independent ones each counts.
        is_of_times: they are of different times, not of different hosts.
    """

    ratios: Floats
    commons: Floats
    counting: Floats
    factor: float
    weight: float
    is_of_times: bool = True

    @property
    def positions(self) -> float:
        return self.weight * len(self.ratios)


def of_positions(past: Sequence[Contrast], factor: float = 1.0, weight: float = 1.0) -> Evidence:
    """Return what the contrasts of times of equal length and distance say."""
    return Evidence(
        np.array([each.mean for each in past]),
        np.array([each.common for each in past]),
        np.array([each.counting for each in past]),
        factor,
        weight,
    )


def of_stretch(stretch: Stretch, target: Shape) -> list[Evidence]:
    """Return what a time without a change says, by windows as far apart as there is room for."""
    parts, part_s = len(stretch.samples), stretch.part_s
    if parts < 2:
        return []
    length = max(1, min(round(target.length_s / part_s), parts // 2))
    distance = max(length, min(round(target.distance_s / part_s), parts - length))
    samples = np.concatenate([np.zeros_like(stretch.samples[:1]), stretch.samples.cumsum(axis=0)])
    present = np.concatenate(
        [np.zeros_like(stretch.present_s[:1]), stretch.present_s.cumsum(axis=0)]
    )

    def costs(start: int) -> Costs:
        end = start + length
        return Costs(samples[end] - samples[start], present[end] - present[start])

    starts = range(parts - length - distance + 1)
    shape = Shape(length * part_s, distance * part_s)
    factor = variogram(shape) / variogram(target)
    # Positions that overlap say the same in part.
    weight = min(1.0, max(1.0, parts / (length + distance)) / len(starts))
    past = [contrast(costs(start), costs(start + distance)) for start in starts]
    return [of_positions(past, factor, weight)]


def of_hosts(now: Contrast) -> list[Evidence]:
    """Return what the differences between hosts say: one fewer than there are hosts."""
    hosts = len(now.ratios)
    if hosts < 2:
        return []
    # Helmert's contrasts: of equal variance and uncorrelated, if hosts are.
    helmert = np.array(
        [[1.0] * row + [-float(row)] + [0.0] * (hosts - row - 1) for row in range(1, hosts)]
    )
    helmert /= np.sqrt((helmert**2).sum(axis=1) * hosts)[:, None]
    own = now.ratios - (now.hosts_common - now.common)[:, None]
    counting = np.repeat((now.counting - now.common_spread)[None], hosts - 1, axis=0)
    return [Evidence(helmert @ own, helmert @ now.hosts_common, counting, 1.0, 1.0, False)]


class Usual(NamedTuple):
    """What is usual of `s`: the mean and the standard deviation of its logarithm, on one host.

    `services` is how many others it is known from; of none it is what experience says.
    """

    mean: float
    sd: float
    services: int = 0

    @classmethod
    def of_experience(cls, target: Shape) -> "Usual":
        return cls(math.log(_USUAL_SD**2 * variogram(target)), _USUAL_LOG_SD)

    @classmethod
    def of_services(cls, stretches: Sequence[Stretch], target: Shape) -> "Usual":
        """Return it by what other services do, each on one host.

        Their variances are log-normal about a mean, which is one of those that experience expects
        (a hierarchical normal model: Gelman et al. 2013, "Bayesian data analysis", 5.4).
        """
        start = cls.of_experience(target)
        known = [said for each in stretches if (said := _said_by(each, target, start))]
        between = _SERVICES_LOG_SD**2
        weights = [1 / (start.sd**2 - between), *(1 / (between + each.sd**2) for each in known)]
        means = [start.mean, *(each.mean for each in known)]
        mean = float(np.average(means, weights=weights))
        return cls(mean, math.sqrt(between + 1 / sum(weights)), len(known))


@dataclass(frozen=True, slots=True, eq=False)
class ProvisionalNoise:
    """The noise of a contrast by all evidence there is, which may be none."""

    evidence: tuple[Evidence, ...]
    target: Shape
    hosts: int
    usual: Usual | None = None
    """None: by experience."""

    @property
    def source(self) -> NoiseSource:
        if not self.evidence:
            return NoiseSource.FLEET if self.services else NoiseSource.PRIOR
        return NoiseSource.WITHIN if self.is_provisional else NoiseSource.HISTORY

    @property
    def is_provisional(self) -> bool:
        same = (e for e in self.evidence if e.is_of_times and 1 / _SAME <= e.factor <= _SAME)
        return sum(each.positions for each in same) < MIN_POSITIONS

    @property
    def services(self) -> int:
        """How many other services say what is usual."""
        return self.usual.services if self.usual else 0

    @property
    def positions(self) -> int:
        return round(self._positions) if self.evidence else self.services

    @property
    def df(self) -> float:
        return float(_FREEDOMS[0]) + self._positions

    @property
    def common_variance(self) -> float:
        squares = sum(
            float((each.commons**2).sum()) / each.factor * each.weight for each in self.evidence
        )
        total = _USUAL_COMMON_DF + self._positions
        return (_USUAL_COMMON_DF * _USUAL_COMMON_SD**2 + squares) / total

    @property
    def level(self) -> float:
        return FALSE_DISCOVERIES if self.target.length_s >= _TWO_MINUTES_S else OF_A_MINUTE

    def test(self, now: Contrast, samples: tuple[Floats, Floats]) -> Tested:
        """Return p-values and how far the log ratios of functions reach."""
        before, after = samples
        share = (before / max(1.0, before.sum()) + after / max(1.0, after.sum())) / 2
        tested = (share >= MIN_SHARE) & (before + after >= MIN_SAMPLES * now.cells)
        posterior, squares = self.posterior(before + after >= _MIN_SAMPLES * now.cells)
        count = self._positions
        means, p = np.zeros(len(tested)), np.zeros(int(tested.sum()))
        known = now.counting + now.unequal(self.common_variance)
        for i, freedom in enumerate(_FREEDOMS.tolist()):
            own = _VARIANCES[:, None] * (freedom + squares) / (freedom + count)
            variances = known + own
            means += posterior[:, i] @ variances
            cells = np.ix_(posterior[:, i] > _LEAST_WEIGHT, tested)
            t = np.abs(now.mean[tested]) / np.sqrt(variances[cells])
            of_sum = (freedom + count) * (variances[cells] / own[cells]) ** 2
            found = student_p(t.ravel(), np.minimum(of_sum, _MOST_DF).ravel()).reshape(t.shape)
            p += posterior[:, i][cells[0].ravel()] @ found
        all_p = np.ones(len(tested))
        all_p[tested] = np.minimum(p, 1.0)
        df = float(posterior.sum(axis=0) @ _FREEDOMS) + count
        return Tested(tested, all_p, student_quantile(LEVEL, df) * np.sqrt(means))

    @property
    def _positions(self) -> float:
        return sum(each.positions for each in self.evidence)

    def posterior(self, known: npt.NDArray[np.bool_]) -> tuple[Floats, Floats]:
        """Return the weight of each variance and freedom, and functions' squares by variance.

        A square is one where the variance is as expected. Of functions that are not `known` it is:
        they have too few samples to say anything.
        """
        usual = self.usual or Usual.of_experience(self.target)
        logs = -0.5 * ((np.log(_VARIANCES * self.hosts) - usual.mean) / usual.sd) ** 2
        weights = logs[:, None] + np.log(_FREEDOM_WEIGHTS)
        squares = np.full((len(_VARIANCES), len(known)), self._positions)
        squares[:, known] = 0.0
        for each in self.evidence:
            expected = each.counting[:, known] + each.factor * _VARIANCES[:, None, None]
            normed = each.ratios[:, known] ** 2 / expected
            squares[:, known] += each.weight * normed.sum(axis=1)
            for i, freedom in enumerate(_FREEDOMS.tolist()):
                density = log_student(normed, freedom) - np.log(expected) / 2
                weights[:, i] += each.weight * density.sum(axis=(1, 2))
        posterior = np.exp(weights - weights.max())
        return posterior / posterior.sum(), squares


def _said_by(stretch: Stretch, target: Shape, start: Usual) -> Usual | None:
    """Return what a service on one host says by itself, None if next to nothing."""
    evidence = of_stretch(stretch, target)
    if not evidence:
        return None
    known = stretch.samples.mean(axis=(0, 1)) * target.length_s / stretch.part_s >= _MIN_SAMPLES
    noise = ProvisionalNoise(tuple(evidence), target, 1, start)
    weights, logs = noise.posterior(known)[0].sum(axis=1), np.log(_VARIANCES)
    mean = float(weights @ logs)
    variance = float(weights @ (logs - mean) ** 2) + (logs[1] - logs[0]) ** 2 / 12
    # Both are normal, nearly: precisions add up, and the prior's is taken off again.
    precision = 1 / variance - 1 / start.sd**2
    if precision * start.sd**2 < _LEAST_SAID:
        return None
    said = (mean / variance - start.mean / start.sd**2) / precision
    return Usual(said, 1 / math.sqrt(precision))
