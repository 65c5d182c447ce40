"""How often a comparison is wrong: false alarms and found changes, in simulated fleets.

A fleet is a service of 200 functions (60 with 50 hosts) on one busy core a host, sampled at 99 Hz.
Rates stray by log-normal noise with a correlation time of 5 minutes, by host and function (`sd`);
0.005 more are common to the fleet; hosts differ by 0.15; the daily load swings by half. An hour is
compared with the one ten minutes before it, by what the same did at earlier positions.

Unchanged: how many pairs alarm, that is have any function called changed, with the 95 % interval of
that rate (Clopper and Pearson 1934). Beside it two other rules on the same data: any function whose
share differs by more than 0.1 % of itself, as Parca colours, and a two-proportion test of pooled
samples with the same correction. Power: how often a function that became slower is found.
"""

import argparse
import sys
import time

import numpy as np
from scipy import stats
from scipy.signal import lfilter

from profiler import verdict
from profiler.verdict import Change, Contrast, Costs, Floats

HZ = 99
LENGTH, GAP = 60, 10
"""Minutes of a side, and between the sides."""
SPAN = 2 * LENGTH + GAP
POSITIONS = 6
CORRELATION_MIN = 5.0
FLEET_SD, HOST_SD, SWING = 0.005, 0.15, 0.5
FLEETS = ((1, 200), (3, 200), (10, 200), (50, 60))
"""Hosts and functions."""
DEVIATIONS = (0.05, 0.10, 0.20)
EFFECTS = ((3, 0.02, 1.3), (10, 0.05, 1.1))
"""Hosts, share of the function, factor: those that must be found in 90 % of pairs at 0.10."""


def shares(functions: int) -> Floats:
    sizes = 1 / np.arange(1, functions + 1) ** 1.1
    return sizes / sizes.sum()


def strayed(rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    """Give first-order autoregressive noise of variance 1 along the last axis, in minutes."""
    keep = np.exp(-1 / CORRELATION_MIN)
    steps = rng.standard_normal(shape, dtype=np.float32) * np.sqrt(1 - keep**2)
    steps[..., 0] /= np.sqrt(1 - keep**2)
    return lfilter([1], [1, -keep], steps, axis=-1)


def simulate(
    rng: np.random.Generator,
    hosts: int,
    functions: int,
    sd: float,
    effect: tuple[int, float] | None = None,
) -> tuple[list[Contrast], tuple[Floats, Floats]]:
    """Give the contrasts, the one to judge last, and the samples of its sides."""
    minutes = SPAN * (POSITIONS + 1)
    day = 1 + SWING * np.sin(2 * np.pi * (np.arange(minutes) / 1440 + rng.uniform()))
    rates = shares(functions) * np.exp(rng.normal(0, HOST_SD, (hosts, functions)))
    noise = sd * strayed(rng, (hosts, functions, minutes))
    noise += FLEET_SD * strayed(rng, (1, functions, minutes))
    expected = np.exp(noise, out=noise)
    expected *= day.astype(np.float32)
    present_s = np.full(hosts, 60.0 * LENGTH)
    contrasts = []
    for end in range(SPAN, minutes + 1, SPAN):
        # What is counted in an hour are the counts of its minutes, added up.
        first, second = (
            rates * expected[:, :, at : at + LENGTH].sum(axis=2) * 60 * HZ
            for at in (end - SPAN, end - LENGTH)
        )
        if effect and end == minutes:
            second[:, effect[0]] *= effect[1]
        first, second = (rng.poisson(each).astype(float) for each in (first, second))
        contrasts.append(verdict.contrast(Costs(first, present_s), Costs(second, present_s)))
    return contrasts, (first.sum(axis=0), second.sum(axis=0))


def judged(contrasts: list[Contrast], sides: tuple[Floats, Floats]) -> list[Change]:
    noise = verdict.noise_of_history(contrasts[:-1], POSITIONS)
    return verdict.judge(contrasts[-1], sides, noise).changes


def by_ratio(before: Floats, after: Floats) -> bool:
    """Tell whether any share differs by more than 0.1 % of itself."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = (after / after.sum()) / (before / before.sum()) - 1
    return bool((np.abs(ratio) > 0.001).any())


def by_proportions(before: Floats, after: Floats) -> bool:
    """Tell whether a test of two proportions of all samples finds any difference."""
    totals = before.sum(), after.sum()
    pooled = (before + after) / sum(totals)
    deviation = np.sqrt(pooled * (1 - pooled) * (1 / totals[0] + 1 / totals[1]))
    is_there = deviation > 0
    z = (after / totals[1] - before / totals[0])[is_there] / deviation[is_there]
    return bool((verdict.adjust(2 * stats.norm.sf(np.abs(z))) <= verdict.LEVEL).any())


def interval(hits: int, pairs: int) -> str:
    found = stats.binomtest(hits, pairs).proportion_ci(0.95, method="exact")
    return f"{hits / pairs:6.1%} ({found.low:.1%} to {found.high:.1%})"


def measure_unchanged(rng: np.random.Generator, pairs: int) -> int:
    missed = 0
    print(f"nothing changed, {pairs:,} pairs each: pairs with any alarm (95 % interval)")
    print(f"{'hosts':>5} {'sd':>5}  {'everflame':26} {'ratio > 0.1 %':>13} {'proportions':>12}")
    for hosts, functions in FLEETS:
        for sd in DEVIATIONS:
            alarms, ratios, proportions = 0, 0, 0
            for _ in range(pairs):
                contrasts, sides = simulate(rng, hosts, functions, sd)
                alarms += set(judged(contrasts, sides)) != {Change.UNCHANGED}
                ratios += by_ratio(*sides)
                proportions += by_proportions(*sides)
            # Reached unless chance alone cannot explain how many there are.
            is_missed = stats.binomtest(alarms, pairs, 0.05, alternative="greater").pvalue < 0.025
            missed += is_missed
            word = "MISSED" if is_missed else "ok"
            print(
                f"{hosts:5} {sd:5.2f}  {interval(alarms, pairs):26} {ratios / pairs:13.0%}"
                f" {proportions / pairs:12.0%}  (at most 5 %: {word})",
                flush=True,
            )
    return missed


def measure_power(rng: np.random.Generator, pairs: int) -> int:
    missed = 0
    print(f"a function became slower, sd 0.10, {pairs:,} pairs each: found (95 % interval)")
    for hosts, share, factor in EFFECTS:
        functions = 200
        which = int(np.abs(shares(functions) - share).argmin())
        found = others = 0
        for _ in range(pairs):
            changes = judged(*simulate(rng, hosts, functions, 0.10, (which, factor)))
            found += changes.pop(which) == Change.MORE
            others += set(changes) != {Change.UNCHANGED}
        word = "ok" if found >= 0.9 * pairs else "MISSED"
        missed += word == "MISSED"
        print(
            f"{hosts:5} hosts, {factor - 1:+.0%} of {shares(functions)[which]:.1%} self:"
            f" {interval(found, pairs)} (at least 90 %: {word}); others called changed:"
            f" {others / pairs:.1%}",
            flush=True,
        )
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    begun_s = time.monotonic()
    missed = measure_unchanged(rng, options.pairs) + measure_power(rng, options.pairs)
    print(f"took {time.monotonic() - begun_s:.0f} s")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
