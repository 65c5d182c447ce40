"""Uncertain: the largest differences that are not certain yet, and what would make them so.

They are shown whatever the verdict: that nothing is certain does not mean that nothing happened.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from profiler.comparison.distributions import student_quantile
from profiler.comparison.sides import Side
from profiler.comparison.verdict import (
    LEVEL,
    MIN_POINTS,
    AnyNoise,
    Change,
    Contrast,
    Judgement,
    points_of,
)
from profiler.text import counted
from profiler.times import NS_PER_S, length_text
from symbolizer.location import Frame, is_nameless

_MOST = 5
_WITHIN = 50.0
"""A difference that needs more than so many times the data is no more than the normal variation."""
_MOSTLY = 0.5
"""Of the variance: if counting is a smaller part, more samples alone do not help."""
_NORMAL = NormalDist()


class _Evidence(NamedTuple):
    """What is known of one function: the log ratio, and how far it varies."""

    frame: Frame
    ratio: float
    reach: float
    p: float
    q: float
    counting: float
    """The variance that comes from counting samples."""


def largest_uncertain(
    found: Judgement,
    now: Contrast,
    noise: AnyNoise | None,
    sides: tuple[Side, Side],
    withheld: Mapping[int, str],
) -> dict[int, str]:
    """Return the largest differences that are no findings, and what each needs to be one.

    Differences that names explain (`withheld`) are left out, but for those of boxes without a name.
    """
    before, after = (side.samples.sum(axis=0) for side in sides)
    points = points_of(found.ratios, before, after)
    frames, counting = sides[0].frames, now.counting - now.common_spread
    largest: dict[int, str] = {}
    for i in np.argsort(-points, kind="stable").tolist():
        if points[i] < MIN_POINTS or len(largest) == _MOST:
            break
        is_found = found.changes[i] not in (Change.UNCHANGED, Change.TOO_LITTLE)
        if is_found or (i in withheld and not is_nameless(frames[i])):
            continue
        reach = float(found.high[i] - found.low[i]) / 2
        numbers = (found.ratios[i], reach, found.p[i], found.q[i], counting[i])
        largest[i] = _needs(_Evidence(frames[i], *map(float, numbers)), noise, sides)
    return largest


def _needs(function: _Evidence, noise: AnyNoise | None, sides: Sequence[Side]) -> str:
    """Say what it takes until a difference is certain."""
    if is_nameless(function.frame):
        return f"needs the symbols of {function.frame.module or 'its file'}: it has no name"
    history = "runs on each side" if sides[0].is_of_files else "history"
    if noise is None:
        return _without_noise(function, history, sides)
    if function.p >= 1:
        return f"too few samples to test; needs {_longer(1.0, sides)} or more"
    # What the p-value must fall to if the functions that are more certain stay as they are.
    wanted = _normal(noise.level * function.p / function.q)
    times = (wanted / max(_normal(function.p), 1e-9)) ** 2 - 1
    least = function.reach * wanted / _normal(LEVEL)  # the level of the interval
    if times > _WITHIN:
        return f"within the normal variation ({_size(least)})"
    deviation = function.reach / student_quantile(LEVEL, noise.df)
    is_counting = function.counting >= _MOSTLY * deviation**2
    more = _longer(times, sides) if is_counting else f"more {history}"
    return f"would be certain at {_size(least)}; needs {more}"


def _without_noise(function: _Evidence, history: str, sides: Sequence[Side]) -> str:
    """Say what it takes if only the noise of counting is known."""
    least = _normal(LEVEL) * math.sqrt(function.counting)
    if abs(function.ratio) > least:
        return f"more than counting explains ({_size(least)}); needs more {history}"
    times = (least / max(abs(function.ratio), 1e-9)) ** 2 - 1
    if times > _WITHIN:
        return f"no more than counting explains ({_size(least)})"
    return f"needs {_longer(times, sides)} and more {history}"


def _normal(p: float) -> float:
    """Return the standard deviations that are exceeded with this probability."""
    return _NORMAL.inv_cdf(1 - min(max(p, 1e-12), 1 - 1e-12) / 2)


def _size(reach: float) -> str:
    return f"±{100 * math.expm1(min(reach, 20.0)):,.0f} %"


def _longer(times: float, sides: Sequence[Side]) -> str:
    """Return how much more data that is: so many times what there is."""
    if sides[0].is_of_files:
        runs = math.ceil(times * min(side.rows for side in sides))
        return f"about {counted(max(1, runs), 'more run')} on each side"
    spans = [side.window.end_ns - side.window.start_ns for side in sides]
    more_ns = times * max(spans)
    unit_ns = 60 * NS_PER_S if more_ns >= 60 * NS_PER_S else NS_PER_S
    return f"about {length_text(max(1, round(more_ns / unit_ns)) * unit_ns)} more on each side"
