"""Names that are known on one side only: they are no change, and hide none of another module."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from profiler.comparison import comparison
from profiler.comparison.comparison import Comparison
from profiler.comparison.names import Names, stack_warnings
from profiler.comparison.sides import Operand
from profiler.comparison.verdict import Change, NoiseSource
from storage.columns import Columns
from storage.objects.tenant import TenantStore
from storage.profile import Profile
from storage.query.query import Query
from storage.selector import Selector
from symbolizer.location import (
    REST_FRAME,
    AddressLocation,
    ElfAddress,
    FileOffset,
    Frame,
    Kind,
    Location,
    Module,
    NamedLocation,
    bounded,
    is_nameless,
    unnamed,
)
from tests.support import profiles as some
from tests.support.stores import at, directory, minutes

OLD, NEW = Module("c0", "/srv/catalog"), Module("c1", "/srv/catalog")
LIBRARY = Module("f0", "/lib/libfoo.so")
FUNCTIONS = 16
OF_SERVICE = 10
"""Of the functions, the first are the service's own, the others the library's."""
RATES = 4000 / np.arange(1, FUNCTIONS + 1)
RUNS = 6
Name = Callable[[int], bool]
"""Whether a function has a name in a run: of functions by number."""


def function_location(i: int, is_after: bool, is_named: bool) -> tuple[Location, tuple[Frame, ...]]:
    """Return where a function is, in its side's build, and what is known of it."""
    own = NEW if is_after else OLD
    module = own if i < OF_SERVICE else LIBRARY
    place = AddressLocation(module.build_id, FileOffset(0x1000 + 16 * i + is_after))
    return place, (Frame(f"f{i}", module.name, Kind.NATIVE),) if is_named else ()


def run(
    rng: np.random.Generator, is_after: bool, named: Name, factors: dict[int, float]
) -> Profile:
    """Return a run of a service whose functions vary by 3 %, some of which have no name.

    Of a function that has a name by half, half of the samples have it.
    """
    rates = RATES * np.exp(rng.normal(0, 0.03, FUNCTIONS))
    names: dict[Location, tuple[Frame, ...]] = {}
    stacks: list[tuple[dict[str, str], list[Location], int]] = []
    for i, rate in enumerate(rates):
        place, frames = function_location(i, is_after, named(i))
        names[place] = frames
        samples = int(rng.poisson(rate * factors.get(i, 1.0)))
        stacks.append(({"service": "catalog", "version": str(int(is_after))}, [place], samples))
    return some.build([each for each in stacks if each[2]], names, (OLD, NEW, LIBRARY))


def everything(_: int) -> bool:
    return True


def compared(named: tuple[Name, Name], factors: dict[int, float] | None = None) -> Comparison:
    rng = np.random.default_rng(23)
    sides = [
        [
            Columns.of(run(rng, bool(side), named[side], (factors or {}) if side else {}))
            for _ in range(RUNS)
        ]
        for side in (0, 1)
    ]
    return comparison.of_profiles(*sides)


def changes(found: Comparison) -> dict[str, Change]:
    return {each.frame.function: each.change for each in comparison.changed(found.functions)}


LOST: dict[str, Name] = {
    "of one module": lambda i: i >= OF_SERVICE,
    "of the library": lambda i: i < OF_SERVICE,
    "of all": lambda _: False,
    "of each second function": lambda i: i % 2 == 1,
    "of one function": lambda i: i != 1,
}


@pytest.mark.parametrize("named", LOST.values(), ids=LOST.keys())
@pytest.mark.parametrize("is_lost", [True, False], ids=["lost", "gained"])
def test_names_known_on_one_side_only_are_no_change(named, is_lost):
    found = compared((everything, named) if is_lost else (named, everything))

    assert found.source == NoiseSource.REPLICATES
    assert changes(found) == {}
    assert found.common.change == Change.UNCHANGED
    because = {each.frame.function: each.because for each in found.functions}
    without = next(i for i in range(FUNCTIONS) if not named(i))
    assert f"missing on the {'after' if is_lost else 'before'} side" in because[f"f{without}"]
    side, other = ("after", "before") if is_lost else ("before", "after")
    said = " ".join(found.warnings)
    assert f"of the {side} side's samples have no function name, 0 % of the {other} side's" in said


def test_names_lost_in_half_of_the_runs_are_no_change():
    """Each function keeps half of its samples: neither is it less, nor are the others more."""
    rng = np.random.default_rng(29)

    def side(is_after: bool) -> list[Columns]:
        found = []
        for number in range(RUNS):
            keeps = not is_after or number % 2 == 0
            found.append(
                Columns.of(run(rng, is_after, lambda i, keeps=keeps: i >= OF_SERVICE or keeps, {}))
            )
        return found

    assert changes(comparison.of_profiles(side(False), side(True))) == {}


def halved(rng: np.random.Generator, is_after: bool, factors: dict[int, float]) -> Columns:
    """Return a run in which each function of the service has its name in half of its samples.

    So it is where some hosts find the symbols of a build and others do not.
    """
    whole = run(rng, is_after, everything, factors)
    bare = run(rng, is_after, lambda i: i >= OF_SERVICE, factors)
    frames = some.named_locations(whole)
    named = [
        (dict(row.labels), [NamedLocation(*frames[place][0][:4], 0, 0) for place in row.stack])
        for row in whole.rows()
    ]
    others = [(dict(row.labels), list(row.stack)) for row in bare.rows()]
    samples = [row.samples for profile in (whole, bare) for row in profile.rows()]
    stacks = [(*stack, count) for stack, count in zip([*named, *others], samples, strict=True)]
    library = {place: names for place, names in some.named_locations(bare).items() if names}
    return Columns.of(some.build(stacks, library, (OLD, NEW, LIBRARY)))


@pytest.mark.parametrize("is_lost", [True, False], ids=["lost", "gained"])
def test_half_of_each_functions_samples_without_a_name_are_no_change(is_lost):
    rng = np.random.default_rng(31)
    full = [Columns.of(run(rng, not is_lost, everything, {})) for _ in range(RUNS)]
    half = [halved(rng, is_lost, {}) for _ in range(RUNS)]

    found = comparison.of_profiles(*((full, half) if is_lost else (half, full)))

    assert changes(found) == {}


def test_a_change_is_found_beside_a_module_that_lost_its_names():
    grown, shrunk = OF_SERVICE + 1, OF_SERVICE + 2
    found = compared((everything, LOST["of one module"]), {grown: 1.6, shrunk: 0.5})

    assert changes(found) == {f"f{grown}": Change.MORE, f"f{shrunk}": Change.LESS}


def test_a_function_that_grows_while_names_are_lost_is_found():
    found = compared((everything, LOST["of each second function"]), {3: 1.8})

    assert changes(found) == {"f3": Change.MORE}


def test_a_function_that_shrinks_by_more_than_names_were_lost_is_found():
    found = compared((everything, lambda i: i != 9), {0: 0.5})

    assert changes(found) == {"f0": Change.LESS}


def test_a_box_without_a_name_is_never_a_finding():
    """It grows ten-fold on its own; the functions beside it have their names."""

    def named(i: int) -> bool:
        return i != 12

    found = compared((named, named), {12: 10.0})
    box = next(each for each in found.functions if each.frame.function == "[libfoo.so]")

    assert box.change == Change.TOO_LITTLE
    assert "no name" in box.because
    assert changes(found) == {}


subset = st.frozensets(st.integers(0, FUNCTIONS - 1), max_size=FUNCTIONS)


@settings(max_examples=25, deadline=None)
@given(subset, subset)
@example(frozenset({0, 2, 4}), frozenset({1, 2, 3, 5, 6, 7, *range(10, 16)}))
def test_whatever_names_each_side_lacks_nothing_changed_and_swapping_mirrors(one, other):
    named = (lambda i: i not in one, lambda i: i not in other)
    rng = np.random.default_rng(37)
    sides = [
        [Columns.of(run(rng, bool(side), named[side], {})) for _ in range(RUNS)] for side in (0, 1)
    ]

    there, back = comparison.of_profiles(*sides), comparison.of_profiles(*sides[::-1])

    assert changes(there) == changes(back) == {}
    reasons = {each.frame.function: bool(each.because) for each in there.functions}
    assert reasons == {each.frame.function: bool(each.because) for each in back.functions}
    assert {e.frame: e.change for e in there.functions} == {
        e.frame: e.change for e in back.functions
    }


def test_a_store_compares_names_first(tmp_path):
    """An hour of minutes; in the last four the new build of the service has no symbols."""
    rng = np.random.default_rng(41)
    found = []
    for number in range(60):
        is_new = number >= 56
        made = run(rng, is_new, (lambda i: i >= OF_SERVICE) if is_new else everything, {})
        labels = some.make_labels({"service": "catalog", "version": str(int(is_new))})
        ends = {"root": 50, "no_table": 50} if is_new else {"root": 99, "no_table": 1}
        accounting = dataclasses.replace(
            made.accounting, services={labels: 60_000_000_000}, stops=ends
        )
        found.append(at(dataclasses.replace(made, accounting=accounting), number))
    store = directory(tmp_path / "store", *found)
    service = Selector.parse('{service="catalog"}')
    sides = (Operand(service, minutes(i, i + 4)) for i in (52, 56))
    seen = comparison.of_store(Query(TenantStore(store), Path(tmp_path / "cache")), *sides)

    assert seen.source == NoiseSource.HISTORY
    assert changes(seen) == {}
    said = " ".join(seen.warnings)
    assert "of the after side's samples have no function name, 0 % of the before side's" in said
    assert "(catalog)" in said
    assert "50 % of the after side's stacks are incomplete, 1 % of the before side's" in said


def test_what_has_no_name_is_told_by_its_frame():
    nameless = [
        unnamed("libfoo.so", Kind.NATIVE),
        unnamed("[exited]", Kind.NATIVE),
        unnamed("", Kind.NATIVE),
        bounded("libfoo.so", Kind.NATIVE, ElfAddress(0x1234)),
        REST_FRAME,
        Frame("[truncated]", "[python]", Kind.PYTHON),
        Frame("[libfoo.so]", "", Kind.NATIVE),
    ]
    named = [
        Frame("main", "api", Kind.NATIVE),
        Frame("f", "[jit]", Kind.JIT),
        Frame("<module>", "[python]", Kind.PYTHON),
        Frame("[special]", "api", Kind.NATIVE),
        Frame("", "", Kind.NATIVE),
    ]

    assert [is_nameless(frame) for frame in nameless] == [True] * len(nameless)
    assert [is_nameless(frame) for frame in named] == [False] * len(named)


def test_small_differences_of_names_and_stacks_are_not_said():
    frames = [Frame("main", "api", Kind.NATIVE), unnamed("api", Kind.NATIVE)]

    def warned(before: float, after: float) -> list[str]:
        parts = (np.array([100 - part, part]) for part in (before, after))
        return Names.of(frames, *parts).warnings()

    assert warned(1, 3) == []
    assert "12 % of the after side's samples have no function name" in warned(1, 12)[0]
    assert "12 % of the before side's samples have no function name" in warned(12, 1)[0]
    assert stack_warnings([0.01, 0.03]) == stack_warnings([None, 0.5]) == []
    assert "20 % of the before side's stacks are incomplete" in stack_warnings([0.2, 0.01])[0]


def test_python_functions_that_become_code_without_names_are_not_gone():
    """As if the version after ran in an interpreter that cannot be unwound."""
    rng = np.random.default_rng(43)

    def side(is_after: bool) -> list[Columns]:
        found = []
        for _ in range(RUNS):
            stacks = [
                (
                    {"service": "api", "comm": "api"},
                    [some.STRIPPED if is_after else some.named(f"function_{i}")],
                    int(samples),
                )
                for i, samples in enumerate(rng.poisson(RATES))
            ]
            found.append(Columns.of(some.build(stacks)))
        return found

    there = comparison.of_profiles(side(False), side(True))
    back = comparison.of_profiles(side(True), side(False))

    assert changes(there) == changes(back) == {}
