"""Simulated fleets: sizes and noise of their functions, rules to compare with, and their lines."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats
from scipy.signal import lfilter

from profiler.comparison import verdict
from profiler.comparison.distributions import rate_interval
from profiler.comparison.verdict import Floats

HZ = 99
CORRELATION_MIN = 5.0
FLEET_SD, HOST_SD, SWING = 0.005, 0.15, 0.5
DEVIATIONS = (0.05, 0.10, 0.20)


def shares(functions: int) -> Floats:
    sizes = 1 / np.arange(1, functions + 1) ** 1.1
    return sizes / sizes.sum()


def function_of(share: float, functions: int) -> int:
    return int(np.abs(shares(functions) - share).argmin())


def strayed(rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    """Return first-order autoregressive noise of variance 1 along the last axis, in minutes."""
    keep = np.exp(-1 / CORRELATION_MIN)
    steps = rng.standard_normal(shape, dtype=np.float32)
    steps *= np.float32(np.sqrt(1 - keep**2))
    steps[..., 0] /= np.sqrt(1 - keep**2)
    return lfilter(np.float32([1]), np.float32([1, -keep]), steps, axis=-1)


def expected_minutes(
    rng: np.random.Generator, fleet: tuple[int, int], sd: float, minutes: int
) -> tuple[Floats, Floats]:
    """Return what a minute costs: on average, by host and function, and how it varies by minute."""
    hosts, functions = fleet
    day = 1 + SWING * np.sin(2 * np.pi * (np.arange(minutes) / 1440 + rng.uniform()))
    rates = shares(functions) * np.exp(rng.normal(0, HOST_SD, fleet)) * 60 * HZ
    noise = strayed(rng, (hosts, functions, minutes))
    noise *= np.float32(sd)
    noise += np.float32(FLEET_SD) * strayed(rng, (1, functions, minutes))
    cost = np.exp(noise, out=noise)
    cost *= day.astype(np.float32)
    return rates, cost


def growths(before: Floats, after: Floats) -> Floats:
    """Return by which part of itself each function's share of the total grew."""
    with np.errstate(divide="ignore", invalid="ignore"):
        growth: Floats = (after / after.sum()) / (before / before.sum()) - 1
    return growth


def by_ratio(before: Floats, after: Floats) -> bool:
    """Return whether any share differs by more than 0.1 % of itself."""
    return bool((np.abs(growths(before, after)) > 0.001).any())


def by_proportions(before: Floats, after: Floats) -> bool:
    """Return whether a test of two proportions of all samples finds any difference."""
    totals = before.sum(), after.sum()
    pooled = (before + after) / sum(totals)
    deviation = np.sqrt(pooled * (1 - pooled) * (1 / totals[0] + 1 / totals[1]))
    is_there = deviation > 0
    z = (after / totals[1] - before / totals[0])[is_there] / deviation[is_there]
    return bool((verdict.adjust(2 * stats.norm.sf(np.abs(z))) <= verdict.LEVEL).any())


def interval(hits: int, pairs: int) -> str:
    low, high = rate_interval(hits, pairs, verdict.LEVEL)
    return f"{hits / max(1, pairs):6.1%} ({low:.1%} to {high:.1%})"


def is_too_often(alarms: int, pairs: int) -> bool:
    """Return whether chance alone cannot explain so many, were it one pair in twenty."""
    return pairs > 0 and bool(
        stats.binomtest(alarms, pairs, 0.05, alternative="greater").pvalue < 0.025
    )


Line = tuple[str, bool]
"""What is printed, and whether it misses what was to be reached."""


class Table(NamedTuple):
    """A table whose lines are measured side by side, each from its arguments after the seed."""

    head: str
    measure: Callable[..., Line]
    lines: Sequence[tuple[object, ...]]
