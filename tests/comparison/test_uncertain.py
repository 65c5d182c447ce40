"""The largest differences are shown whatever the verdict, with what it takes to be certain."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import orjson
import pytest

from profiler.comparison import comparison, report, verdict
from profiler.comparison.comparison import Comparison
from profiler.comparison.gate import DEFAULT_GATE, Gate, verdict_of
from profiler.comparison.sides import Operand, Side
from profiler.comparison.uncertain import largest_uncertain
from profiler.comparison.verdict import Change, Noise, NoiseSource
from profiler.times import NS_PER_S
from storage.columns import Columns
from storage.objects.tenant import TenantStore
from storage.profile import Profile, Window
from storage.query.query import Query
from storage.selector import Selector
from symbolizer.location import Frame, Kind
from tests.support import profiles as some
from tests.support.stores import at, directory, minutes

API = Selector.parse('{service="api"}')
STEPS = 12
GROWN = "apply_discounts"
LENGTH = 4


def minute(rng: np.random.Generator, number: int, share: float, sd: float = 0.03) -> Profile:
    """Return a minute of a full core, in which one function takes a share of the time."""
    shares = 1 / np.arange(2, STEPS + 2)
    shares = np.append(share, (1 - share) * shares / shares.sum())
    samples = rng.poisson(1500 * shares * np.exp(rng.normal(0, sd, STEPS + 1)))
    names = [GROWN, *(f"step_{i:02}" for i in range(STEPS))]
    labels = {"service": "api", "version": "1"}
    stacks = [
        (labels, [some.named("main"), some.named(name)], int(count))
        for name, count in zip(names, samples, strict=True)
    ]
    made = some.build([each for each in stacks if each[2]])
    present = {some.make_labels(labels): 60_000_000_000}
    accounting = dataclasses.replace(made.accounting, services=present)
    return at(dataclasses.replace(made, accounting=accounting), number)


def compared(tmp_path: Path, number: int, *, moves: bool = False) -> Comparison:
    """Compare the last minutes of so many, in which a function takes 28 % in place of 6.

    If the service `moves` to another host with them, nothing tells the noise.
    """
    rng = np.random.default_rng(43)
    made = [minute(rng, i, 0.28 if i >= number - LENGTH else 0.06) for i in range(number)]
    if moves:
        made[-LENGTH:] = [
            at(each, number - LENGTH + i, "web-2", "00112233445566bb")
            for i, each in enumerate(made[-LENGTH:])
        ]
    store = directory(tmp_path / "store", *made)
    sides = (Operand(API, minutes(i, i + LENGTH)) for i in (number - 2 * LENGTH, number - LENGTH))
    return comparison.of_store(Query(TenantStore(store), tmp_path / "cache"), *sides)


def test_what_grew_most_is_first_though_nothing_is_certain(tmp_path):
    found = compared(tmp_path, 14, moves=True)

    assert found.source == NoiseSource.NONE
    first = found.functions[0]
    assert (first.frame.function, first.change) == (GROWN, Change.TOO_LITTLE)
    assert re.fullmatch(r"more than counting explains \(±\d+ %\); needs more history", first.needs)
    assert len(comparison.uncertain(found.functions)) <= 5
    gate = Gate.parse(DEFAULT_GATE)
    said = verdict_of(found, gate)
    text = report.as_text(found, said, gate)
    assert "largest differences, not certain yet\n? +" in text
    assert re.search(rf"\? \+\d+ %  [56]\.\d+ → 2\d\.\d+ % +{GROWN} .*needs more history", text)
    markdown = report.as_markdown(found, said, gate)
    assert re.search(
        r"\| \? \+\d+ % \| [56]\.\d+ → 2\d\.\d+ % \| apply\\_discounts .*history", markdown
    )
    (grown, *others) = orjson.loads(report.as_json(found, said, gate))["functions"]
    assert (grown["function"], grown["needs"]) == (GROWN, first.needs)
    assert not others[-1]["needs"]


def test_a_finding_is_not_among_the_differences_that_are_uncertain(tmp_path):
    """On the full core the others lose time: their common change is no difference of each."""
    found = compared(tmp_path, 60)

    assert [each.frame.function for each in comparison.changed(found.functions)] == [GROWN]
    assert not found.functions[0].needs
    open_ones = comparison.uncertain(found.functions)
    assert found.functions[1 : 1 + len(open_ones)] == tuple(open_ones)
    assert found.common.relative == pytest.approx(0.72 / 0.94 - 1, abs=0.05)
    said = " ".join(found.warnings)
    assert "the service used about as much CPU time as before" in said
    assert "the load changed" not in said
    gate = Gate.parse(DEFAULT_GATE)
    text = report.as_text(found, verdict_of(found, gate), gate)
    assert re.match(rf"regression: {GROWN} \+\d\d\d %; service [+-]\d\.\d % CPU\n", text)


def test_with_itself_nothing_is_even_uncertain():
    profile = Columns.of(minute(np.random.default_rng(44), 0, 0.06))
    for runs in (1, 3):
        found = comparison.of_profiles([profile] * runs, [profile] * runs)
        assert comparison.uncertain(found.functions) == []


def test_swapping_the_sides_keeps_what_is_uncertain():
    rng = np.random.default_rng(45)
    sides = [[Columns.of(minute(rng, 0, 0.06, 0.2)) for _ in range(4)] for _ in range(2)]
    there, back = comparison.of_profiles(*sides), comparison.of_profiles(*sides[::-1])

    def open_ones(found: Comparison) -> dict[str, str]:
        return {each.frame.function: each.needs for each in comparison.uncertain(found.functions)}

    assert open_ones(there) == open_ones(back)
    assert len(open_ones(there)) == 5
    assert all("runs on each side" in needs for needs in open_ones(there).values())


def side(samples: npt.NDArray[np.float64], length_s: float) -> Side:
    frames = tuple(Frame(f"f{i:02}", "api", Kind.NATIVE) for i in range(samples.shape[1]))
    window = Window(NS_PER_S, NS_PER_S + round(length_s) * NS_PER_S)
    spans = np.array([length_s])
    return Side("", window, ("web",), frames, samples, samples, samples, spans)


def judged(
    samples: npt.NDArray[np.float64], times: float
) -> tuple[verdict.Judgement, dict[int, str]]:
    """Judge windows `times` as long as four minutes, of which only counting is the noise."""
    sides = tuple(side(each[None] * times, 240 * times) for each in samples)
    now = verdict.contrast(sides[0].costs, sides[1].costs)
    noise = Noise(NoiseSource.HISTORY, 24, 24.0, now.counting, now.counting, 0.0)
    counts = (sides[0].samples[0], sides[1].samples[0])
    found = verdict.judge(now, counts, noise)
    return found, largest_uncertain(found, now, noise, (sides[0], sides[1]), {})


def test_so_much_more_data_make_it_certain():
    """Where counting is the noise: with less than was said it is uncertain, with more it is not."""
    samples = np.full((2, 20), 400.0)
    samples[1, 7] = 480.0

    found, needs = judged(samples, 1.0)
    assert found.changes[7] == Change.UNCHANGED
    said = re.search(r"would be certain at ±\d+ %; needs about (\d+) min more", needs[7])
    assert said is not None
    times = int(said[1]) / 4
    assert judged(samples, 1 + 1.5 * times)[0].changes[7] == Change.MORE
    assert judged(samples, 1 + 0.4 * times)[0].changes[7] == Change.UNCHANGED


def test_a_difference_without_a_name_needs_symbols():
    samples = np.full((2, 20), 400.0)
    samples[1, 7] = 480.0
    both = side(samples[:1], 240.0), side(samples[1:], 240.0)
    frames = list(both[0].frames)
    frames[7] = Frame("[catalog]", "catalog", Kind.NATIVE)
    named = tuple(dataclasses.replace(each, frames=tuple(frames)) for each in both)
    now = verdict.contrast(named[0].costs, named[1].costs)
    found = comparison._undecided(now)

    needs = largest_uncertain(found, now, None, (named[0], named[1]), {7: "it has no name"})

    assert needs == {7: "needs the symbols of catalog: it has no name"}
    assert largest_uncertain(found, now, None, both, {7: "names are missing"}) == {}
