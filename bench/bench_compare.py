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

Short pasts: how often a verdict is wrong that is provisional, and what it finds within minutes of a
deployment (`provisional_fleets`). `--only provisional` prints that table alone.

With `--store FOLDER` the pairs are real: every service of a store that was recorded while nothing
changed (such as an `everflame agent` beside the ten programs of load.py) is judged in windows of a
minute, each pair by the others; and in spans of seven minutes as if it was deployed in the middle
of each and had no other past. `--record MINUTES` makes such a store first; it takes root.

Run: `python bench/bench_compare.py [--pairs 1000] [--only provisional]`, or with `--record 31` or
`--store FOLDER`.
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
import provisional_fleets
from load import ten_programs
from serving import EVERFLAME
from simulated_fleets import (
    DEVIATIONS,
    Line,
    Table,
    by_proportions,
    by_ratio,
    expected_minutes,
    function_of,
    interval,
    is_too_often,
    shares,
)

from profiler.comparison import comparison, verdict
from profiler.comparison.sides import ComparisonError, Operand
from profiler.comparison.verdict import Change, Contrast, Costs, Floats
from storage.objects.directory import DirectoryStore
from storage.objects.tenant import TenantStore
from storage.profile import Window
from storage.query.query import Query
from storage.selector import Matcher, Operator, Selector

GAP = 10
"""Minutes between the sides."""
POSITIONS = 6
FLEETS = ((1, 200), (3, 200), (10, 200), (50, 60))
"""Hosts and functions."""
HOURS = (1, 4)
GROWTHS = (1.1, 1.3, 1.5)
GOALS = ((3, 0.02, 1.3), (10, 0.05, 1.1))
"""Hosts, share of the function, factor: those that must be found in 90 % of pairs at 0.10, 1 h."""
TABLE_SHARE = 0.02
TABLE_PART = 10
"""The tables of what is found, and of short pasts, take a tenth of the pairs."""
LEAST_SAMPLES = 300
"""A minute: services with fewer are not looked at."""
LEAST_PAIRS = 100
"""Real pairs with two minutes of past; with fewer, their rate says little."""
MINUTE_NS = 60_000_000_000


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
        length = 60 * hours
        span = 2 * length + GAP
        minutes = span * (POSITIONS + 1)
        rates, cost = expected_minutes(rng, fleet, sd, minutes)
        present_s = np.full(fleet[0], 60.0 * length)
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


def tables_of(pairs: int) -> list[Table]:
    few = max(1, pairs // TABLE_PART)
    heads = [f"sd {sd:.2f} {growth - 1:+.0%}" for sd in DEVIATIONS for growth in GROWTHS]
    return [
        Table(
            (
                f"nothing changed, {pairs:,} pairs each: pairs with any alarm (95 % interval)\n"
                f"hosts    sd  {'everflame':26} {'ratio > 0.1 %':>13} {'proportions':>12}"
            ),
            measure_unchanged,
            [(pairs, fleet, sd) for fleet in FLEETS for sd in DEVIATIONS],
        ),
        Table(
            f"a function became slower, sd 0.10, an hour, {pairs:,} pairs each: found",
            measure_goal,
            [(pairs, *goal) for goal in GOALS],
        ),
        Table(
            (
                f"found, of {few:,} pairs each, for a function of {TABLE_SHARE:.0%} self that"
                f" grows\nhosts hours  {' '.join(f'{head:>12}' for head in heads)}"
            ),
            measure_power,
            [(few, fleet, hours) for fleet in FLEETS for hours in HOURS],
        ),
        provisional_fleets.table(few),
    ]


def measure_simulated(tables: dict[int, Table], seed: int) -> int:
    """Print the tables of these numbers, a line as soon as it and those before it are measured."""
    missed = 0
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        started = [
            [
                pool.submit(table.measure, [seed, number, i], *arguments)
                for i, arguments in enumerate(table.lines)
            ]
            for number, table in tables.items()
        ]
        for table, lines in zip(tables.values(), started, strict=True):
            print(table.head, flush=True)
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
    """Judge real pairs of each service: by all the others, and with two minutes of past each."""
    store = DirectoryStore(folder)
    keys = [key for key, _ in TenantStore(store).list_window(Window(0, 2**62))]
    whole = [key for key in keys if key.length_s == 60]
    everything = Window(min(k.start_ns for k in whole), max(k.end_ns for k in whole))
    with tempfile.TemporaryDirectory() as cache:
        query = Query(TenantStore(store), Path(cache))
        samples = query.label_values(everything, "service")
        large = {
            service: number / len(whole)
            for service, number in samples.items()
            if number >= LEAST_SAMPLES * len(whole)
        }
        print(f"real pairs of minutes, {len(whole)} minutes: pairs with any alarm")
        missed = measure_by_others(query, everything, large)
        missed += measure_provisional(query, everything, large)
    return missed


def measure_by_others(query: Query, everything: Window, services: dict[str, float]) -> bool:
    """Judge the disjoint pairs of minutes of each service by all the others."""
    before, after = (
        Window(everything.end_ns - n * MINUTE_NS, everything.end_ns - n * MINUTE_NS + MINUTE_NS)
        for n in (2, 1)
    )
    pairs = alarms = 0
    for service, minutely in services.items():
        selector = Selector((Matcher("service", Operator.EQUAL, service),))
        try:
            found = comparison.calibrate(query, Operand(selector, before), Operand(selector, after))
        except ComparisonError as error:
            print(f"  {service:24} {error}")
            continue
        pairs += found.pairs
        alarms += found.alarms
        print(f"  {service:24} {found.alarms} of {found.pairs}, {minutely:,.0f} samples a minute")
    word = "MISSED" if is_too_often(alarms, pairs) or pairs < 50 else "ok"
    print(f"  all: {alarms} of {pairs}: {interval(alarms, pairs)} (at most 5 %: {word})")
    return word == "MISSED"


def measure_provisional(query: Query, everything: Window, services: dict[str, float]) -> bool:
    """Judge disjoint spans of each service as if it was deployed in them, after two minutes."""
    length_ns = provisional_fleets.LEAST_MIN * MINUTE_NS
    span_ns = 2 * length_ns + provisional_fleets.GAP_MIN * MINUTE_NS
    begins_ns = range(everything.start_ns, everything.end_ns - span_ns + 1, span_ns)
    # The past begins, and the time after ends, with other deployments. They lie beside the spans:
    # what is cut into parts ends at one that lies inside of a part.
    changes_ns = [at_ns for each in begins_ns for at_ns in (each - 1, each + span_ns + 1)]
    print(f"the same, {provisional_fleets.LEAST_MIN} minutes on each side and no more past:")
    pairs = alarms = 0
    for service in services:
        selector = Selector((Matcher("service", Operator.EQUAL, service),))
        judged = []
        for begin_ns in begins_ns:
            end_ns = begin_ns + span_ns
            sides = Window(begin_ns, begin_ns + length_ns), Window(end_ns - length_ns, end_ns)
            try:
                judged.append(
                    comparison.of_store(
                        query, *(Operand(selector, side) for side in sides), changes_ns
                    )
                )
            except ComparisonError:  # it did not run then
                continue
        provisional = [each for each in judged if each.is_provisional]
        changed = [
            {each.frame.function for each in comparison.changed(found.functions)}
            for found in provisional
        ]
        named = [", ".join(sorted(names)) for names in changed if names]
        print(f"  {service:24} {len(named)} of {len(provisional)}{': ' * any(named)}{named or ''}")
        pairs += len(provisional)
        alarms += len(named)
    is_missed = is_too_often(alarms, pairs)
    few = "" if pairs >= LEAST_PAIRS else f"; fewer than {LEAST_PAIRS} pairs"
    word = "MISSED" if is_missed else "ok"
    print(f"  all: {alarms} of {pairs}: {interval(alarms, pairs)} (at most 5 %: {word}{few})")
    return is_missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--store", type=Path, metavar="FOLDER")
    parser.add_argument("--record", type=int, metavar="MINUTES")
    parser.add_argument("--only", choices=["provisional"], help="print only this table")
    options = parser.parse_args()
    if options.store:
        return measure_real(options.store)
    if options.record:
        with tempfile.TemporaryDirectory() as folder:
            record(Path(folder), options.record)
            return measure_real(Path(folder) / "store")
    begun_s = time.monotonic()
    tables = dict(enumerate(tables_of(options.pairs)))
    if options.only:
        tables = dict([tables.popitem()])
    missed = measure_simulated(tables, options.seed)
    print(f"took {time.monotonic() - begun_s:.0f} s")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
