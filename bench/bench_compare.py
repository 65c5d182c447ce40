"""How often a comparison is wrong: false alarms and found changes, in simulated fleets.

A fleet is a service of 200 functions (60 with 50 hosts) on one busy core a host, sampled at 99 Hz.
Rates have log-normal noise with a correlation time of 5 minutes, by host and function (`sd`), and
0.005 of noise that the whole fleet shares; hosts differ by 0.15; the daily load swings by half. A
window is compared with the one ten minutes before it, by what the same did at six earlier
positions.

Unchanged: how many pairs alarm, that is have any function called changed, with the 95 % interval of
that rate (Clopper and Pearson 1934). Beside it two other rules on the same data: any function whose
share differs by more than 0.1 % of itself, as Parca colours, and a two-proportion test of pooled
samples with the same correction. Power: how often a function that became slower is found.

With `--store FOLDER` the pairs are real: every service of a store that was recorded while nothing
changed (such as an `everflame agent` beside the ten programs of load.py) is judged in windows of a
minute, each pair by the others. `--record MINUTES` makes such a store first; it takes root.

Run: `python bench/bench_compare.py [--pairs 1000] [--record 31 | --store FOLDER]`.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from load import ten_programs
from scipy import stats
from scipy.signal import lfilter
from serving import EVERFLAME

from profiler.comparison import comparison, verdict
from profiler.comparison.distributions import rate_interval
from profiler.comparison.sides import ComparisonError, Operand
from profiler.comparison.verdict import Change, Contrast, Costs, Floats
from storage.objects.directory import DirectoryStore
from storage.objects.tenant import TenantStore
from storage.profile import Window
from storage.query.query import Query
from storage.selector import Matcher, Operator, Selector

HZ = 99
GAP = 10
"""Minutes between the sides."""
POSITIONS = 6
CORRELATION_MIN = 5.0
FLEET_SD, HOST_SD, SWING = 0.005, 0.15, 0.5
FLEETS = ((1, 200), (3, 200), (10, 200), (50, 60))
"""Hosts and functions."""
DEVIATIONS = (0.05, 0.10, 0.20)
HOURS = (1, 4)
GROWTHS = (1.1, 1.3, 1.5)
GOALS = ((3, 0.02, 1.3), (10, 0.05, 1.1))
"""Hosts, share of the function, factor: those that must be found in 90 % of pairs at 0.10, 1 h."""
TABLE_SHARE = 0.02
TABLE_PART = 10
"""The table of what is found takes a tenth of the pairs."""
LEAST_SAMPLES = 300
"""A minute: services with fewer are not looked at."""
MINUTE_NS = 60_000_000_000


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


@dataclass
class Pair:
    """Two windows of a simulated fleet, in which nothing has changed, and their past."""

    past: list[Contrast]
    before: Floats
    expected: Floats
    """Samples of the side after, by host and function, were they not counted."""
    present_s: Floats

    @classmethod
    def simulate(
        cls, rng: np.random.Generator, fleet: tuple[int, int], sd: float, hours: int = 1
    ) -> "Pair":
        hosts, functions = fleet
        length = 60 * hours
        span = 2 * length + GAP
        minutes = span * (POSITIONS + 1)
        day = 1 + SWING * np.sin(2 * np.pi * (np.arange(minutes) / 1440 + rng.uniform()))
        rates = shares(functions) * np.exp(rng.normal(0, HOST_SD, fleet)) * 60 * HZ
        noise = strayed(rng, (hosts, functions, minutes))
        noise *= np.float32(sd)
        noise += np.float32(FLEET_SD) * strayed(rng, (1, functions, minutes))
        cost = np.exp(noise, out=noise)
        cost *= day.astype(np.float32)
        present_s = np.full(hosts, 60.0 * length)
        windows = [
            # What is counted in an hour are the counts of its minutes, added up.
            rates * cost[:, :, at : at + length].sum(axis=2)
            for end in range(span, minutes + 1, span)
            for at in (end - span, end - length)
        ]
        counted = [rng.poisson(each).astype(float) for each in windows[:-1]]
        sides = zip(counted[:-1:2], counted[1::2], strict=True)
        past = [verdict.contrast(*(Costs(side, present_s) for side in pair)) for pair in sides]
        return cls(past, counted[-1], windows[-1], present_s)

    def after(self, rng: np.random.Generator, which: int = 0, factor: float = 1.0) -> Floats:
        expected = self.expected.copy()
        expected[:, which] *= factor
        return rng.poisson(expected).astype(float)

    def judge(self, after: Floats) -> list[Change]:
        sides = [Costs(side, self.present_s) for side in (self.before, after)]
        samples = self.before.sum(axis=0), after.sum(axis=0)
        noise = verdict.noise_of_history(self.past, POSITIONS)
        return verdict.judge(verdict.contrast(*sides), samples, noise).changes


def by_ratio(before: Floats, after: Floats) -> bool:
    """Return whether any share differs by more than 0.1 % of itself."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = (after / after.sum()) / (before / before.sum()) - 1
    return bool((np.abs(ratio) > 0.001).any())


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
    return f"{hits / pairs:6.1%} ({low:.1%} to {high:.1%})"


def is_too_often(alarms: int, pairs: int) -> bool:
    """Return whether chance alone cannot explain so many, were it one pair in twenty."""
    return bool(stats.binomtest(alarms, pairs, 0.05, alternative="greater").pvalue < 0.025)


Line = tuple[str, bool]
"""What is printed, and whether it misses what was to be reached."""


def measure_unchanged(seed: list[int], pairs: int, fleet: tuple[int, int], sd: float) -> Line:
    rng = np.random.default_rng(seed)
    alarms, ratios, proportions = 0, 0, 0
    for _ in range(pairs):
        pair = Pair.simulate(rng, fleet, sd)
        after = pair.after(rng)
        sums = pair.before.sum(axis=0), after.sum(axis=0)
        alarms += set(pair.judge(after)) != {Change.UNCHANGED}
        ratios += by_ratio(*sums)
        proportions += by_proportions(*sums)
    is_missed = is_too_often(alarms, pairs)
    word = "MISSED" if is_missed else "ok"
    return (
        f"{fleet[0]:5} {sd:5.2f}  {interval(alarms, pairs):26} {ratios / pairs:13.0%}"
        f" {proportions / pairs:12.0%}  (at most 5 %: {word})"
    ), is_missed


def measure_goal(seed: list[int], pairs: int, hosts: int, share: float, factor: float) -> Line:
    rng = np.random.default_rng(seed)
    functions = 200
    which = function_of(share, functions)
    found = others = 0
    for _ in range(pairs):
        pair = Pair.simulate(rng, (hosts, functions), 0.10)
        changes = pair.judge(pair.after(rng, which, factor))
        found += changes.pop(which) == Change.MORE
        others += set(changes) != {Change.UNCHANGED}
    is_missed = found < 0.9 * pairs
    return (
        f"{hosts:5} hosts, {factor - 1:+.0%} of {shares(functions)[which]:.1%} self:"
        f" {interval(found, pairs)} (at least 90 %: {'MISSED' if is_missed else 'ok'});"
        f" others called changed: {others / pairs:.1%}"
    ), is_missed


def measure_power(seed: list[int], pairs: int, fleet: tuple[int, int], hours: int) -> Line:
    rng = np.random.default_rng(seed)
    which = function_of(TABLE_SHARE, fleet[1])
    cells = []
    for sd in DEVIATIONS:
        found = dict.fromkeys(GROWTHS, 0)
        for _ in range(pairs):
            pair = Pair.simulate(rng, fleet, sd, hours)
            for growth in GROWTHS:
                changes = pair.judge(pair.after(rng, which, growth))
                found[growth] += changes[which] == Change.MORE
        cells += [f"{hits / pairs:12.0%}" for hits in found.values()]
    return f"{fleet[0]:5} {hours:5}  " + " ".join(cells), False


def measure_simulated(pairs: int, seed: int) -> int:
    """Print all of it, a line as soon as it and those before it are measured."""
    few = max(1, pairs // TABLE_PART)
    heads = [f"sd {sd:.2f} {growth - 1:+.0%}" for sd in DEVIATIONS for growth in GROWTHS]
    tables = [
        (
            (
                f"nothing changed, {pairs:,} pairs each: pairs with any alarm (95 % interval)\n"
                f"hosts    sd  {'everflame':26} {'ratio > 0.1 %':>13} {'proportions':>12}"
            ),
            measure_unchanged,
            [(pairs, fleet, sd) for fleet in FLEETS for sd in DEVIATIONS],
        ),
        (
            f"a function became slower, sd 0.10, an hour, {pairs:,} pairs each: found",
            measure_goal,
            [(pairs, *goal) for goal in GOALS],
        ),
        (
            (
                f"found, of {few:,} pairs each, for a function of {TABLE_SHARE:.0%} self that"
                f" grows\nhosts hours  {' '.join(f'{head:>12}' for head in heads)}"
            ),
            measure_power,
            [(few, fleet, hours) for fleet in FLEETS for hours in HOURS],
        ),
    ]
    missed = 0
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        started = [
            [
                pool.submit(measure, [seed, number, i], *arguments)
                for i, arguments in enumerate(lines)
            ]
            for number, (_, measure, lines) in enumerate(tables)
        ]
        for (head, _, _), lines in zip(tables, started, strict=True):
            print(head, flush=True)
            for line in lines:
                text, is_missed = line.result()
                missed += is_missed
                print(text, flush=True)
    return missed


def record(folder: Path, minutes: int) -> None:
    """Profile ten programs for so long, in windows of a minute."""
    environment = {**os.environ, "EVERFLAME_RUN": str(folder / "run")}
    command = [EVERFLAME, "agent", f"--store={folder / 'store'}", f"--spool={folder / 'spool'}"]
    with (
        ten_programs(),
        subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as agent,
    ):
        try:
            time.sleep(60 * minutes)
        finally:
            agent.terminate()


def measure_real(folder: Path) -> int:
    """Judge the disjoint pairs of minutes of each service by all the others."""
    store = DirectoryStore(folder)
    keys = [key for key, _ in TenantStore(store).list_window(Window(0, 2**62))]
    whole = [key for key in keys if key.length_s == 60]
    last_ns = max(key.end_ns for key in whole)
    before, after = (
        Window(last_ns - n * MINUTE_NS, last_ns - n * MINUTE_NS + MINUTE_NS) for n in (2, 1)
    )
    pairs = alarms = 0
    with tempfile.TemporaryDirectory() as cache:
        query = Query(TenantStore(store), Path(cache))
        everything = Window(min(key.start_ns for key in whole), last_ns)
        samples = query.label_values(everything, "service")
        print(f"real pairs of minutes, {len(whole)} minutes: pairs with any alarm")
        for service, number in samples.items():
            selector = Selector((Matcher("service", Operator.EQUAL, service),))
            if number < LEAST_SAMPLES * len(whole):
                continue
            try:
                found = comparison.calibrate(
                    query, Operand(selector, before), Operand(selector, after)
                )
            except ComparisonError as error:
                print(f"  {service:24} {error}")
                continue
            pairs += found.pairs
            alarms += found.alarms
            print(
                f"  {service:24} {found.alarms} of {found.pairs},"
                f" {number / len(whole):,.0f} samples a minute"
            )
    word = "MISSED" if is_too_often(alarms, pairs) or pairs < 50 else "ok"
    print(f"  all: {alarms} of {pairs}: {interval(alarms, pairs)} (at most 5 %: {word})")
    return word == "MISSED"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--store", type=Path, metavar="FOLDER")
    parser.add_argument("--record", type=int, metavar="MINUTES")
    options = parser.parse_args()
    if options.store:
        return measure_real(options.store)
    if options.record:
        with tempfile.TemporaryDirectory() as folder:
            record(Path(folder), options.record)
            return measure_real(Path(folder) / "store")
    begun_s = time.monotonic()
    missed = measure_simulated(options.pairs, options.seed)
    print(f"took {time.monotonic() - begun_s:.0f} s")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
