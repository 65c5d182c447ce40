"""A better name changes no history: one function for a location in everything that is shown."""

import dataclasses
import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiler.comparison import comparison
from profiler.comparison.comparison import Operand
from profiler.comparison.verdict import NoiseSource
from profiler.flamegraph import flamegraph
from profiler.flamegraph.differential import Pair
from profiler.flamegraph.stacks import Group
from storage.columns import Columns
from storage.hashing import Hasher
from storage.merging import adopt_names, merge_columns
from storage.objects.directory import DirectoryStore
from storage.objects.tenant import TenantStore
from storage.profile import NameRank, Profile, Window
from storage.query.query import Query
from storage.query.resolve import resolve_columns
from storage.selector import Selector
from symbolizer.location import AddressLocation, ElfAddress, Frame, Kind, bounded
from symbolizer.text import readable
from tests.support import profiles as some
from tests.support.stores import START_NS, at, minutes, put

HASHER = Hasher(b"test")
PLACES = [some.native(some.API, 0x1800 + 16 * i) for i in range(24)]
RATES = 3000 / np.arange(1, len(PLACES) + 1)
BOUNDED = {
    place: (bounded("api", Kind.NATIVE, ElfAddress(0x401800 + 16 * i)),)
    for i, place in enumerate(PLACES)
}
NAMED = {
    place: (Frame(f"parse_{i}", "api", Kind.NATIVE, "parse.c", i + 1),)
    for i, place in enumerate(PLACES)
}
API = Selector.parse('{service="api"}')
PROCESS = Selector.parse('{pid="7"}')
JOBS = {"service": "jobs", "comm": "jobs"}
LABELS = {"service": "api", "version": "1", "comm": "api", "pid": "7"}


def one(names, place=some.WORK, labels=LABELS) -> Profile:
    return some.build([(labels, [some.MAIN, place], 1)], {**some.NAMES, place: names})


def minute(number: int, host: int, names, labels=LABELS) -> Profile:
    """Make a minute of a service whose 24 functions vary by 5 %."""
    rng = np.random.default_rng(number * 10 + host)
    rates = RATES * np.exp(rng.normal(0, 0.05, len(PLACES)))
    stacks = [
        (labels, [some.MAIN, place], max(1, int(samples)))
        for place, samples in zip(PLACES, rng.poisson(rates), strict=True)
    ]
    profile = some.build(stacks, {some.MAIN: some.NAMES[some.MAIN], **names})
    present = {some.make_labels({"service": labels["service"], "version": "1"}): 60_000_000_000}
    accounting = dataclasses.replace(profile.accounting, services=present)
    profile = dataclasses.replace(profile, accounting=accounting)
    return at(profile, number, f"web-{host}", f"{host:016x}")


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_a_merge_keeps_the_best_name_whatever_the_order(order):
    """A real name beats a bound, a bound beats none, and of two real names the later one stays."""
    bound = (bounded("api", Kind.NATIVE, ElfAddress(0x401200)),)
    old, new = (Frame("old", "api", Kind.NATIVE),), (Frame("new", "api", Kind.NATIVE),)
    every = [at(one(names), i) for i, names in enumerate([old, new, bound, ()])]
    ranks = [NameRank.of(each.names[each.locations.index(some.WORK)]) for each in every]
    assert ranks == [NameRank.REAL, NameRank.REAL, NameRank.BOUNDED, NameRank.NONE]
    profiles = [every[i] for i in order]

    for count in range(1, 5):
        chosen = profiles[:count]
        best = max(chosen, key=lambda p: (ranks[every.index(p)], p.window))
        columns = [Columns.of(each, HASHER) for each in chosen]
        nested = columns[0]
        for each in columns[1:]:
            nested = merge_columns([nested, each])
        for merged in (merge_columns(columns), nested):
            names = some.named_locations(merged.to_profile())
            assert names == some.named_locations(some.merge(chosen))
            assert names[some.WORK] == some.named_locations(best)[some.WORK]


@given(st.lists(some.profiles(), min_size=1, max_size=4), some.texts, some.texts)
def test_names_are_ranked_by_arrays_as_by_frames(profiles, function, module):
    """Also where names only look like bounds, or hold any text."""
    odd = [f"{module}+0x{function}", f"{module}+0x", f"+0x{module}", function]
    for name in odd:
        frame = Frame(readable(name.encode()), module, Kind.NATIVE)
        profiles.append(some.build([({}, [some.WORK], 1)], {some.WORK: (frame,)}))
    for profile in profiles:
        ranks = Columns.of(profile, HASHER).name_ranks.tolist()
        expected = [
            NameRank.of(names) if isinstance(place, AddressLocation) else NameRank.NONE
            for place, names in zip(profile.locations, profile.names, strict=True)
        ]
        assert ranks == expected


@given(st.lists(some.profiles(), min_size=1, max_size=4))
def test_adopted_names_are_those_of_the_merge(profiles):
    """Of every location, inlined calls and files included."""
    columns = [Columns.of(profile, HASHER) for profile in profiles]
    merged = some.merge(profiles)
    expected = {
        place: names
        for place, names in zip(merged.locations, merged.names, strict=True)
        if names and isinstance(place, AddressLocation)
    }

    every = np.concatenate([each.location_hashes for each in columns])
    for resolved, mine in zip(resolve_columns(columns), columns, strict=True):
        adopted = adopt_names(mine, columns, every).to_profile()
        assert adopted == mine.to_profile()
        for place, names in some.named_locations(adopted).items():
            assert names == expected.get(place, names)
        for place, names in some.named_locations(resolved.to_profile()).items():
            assert [each[:3] for each in names] == [each[:3] for each in expected.get(place, names)]


def test_a_line_that_became_known_is_no_change():
    """As after the debug files were found: the function is the same, and so is every box of it."""
    old = (Frame("work", "api", Kind.NATIVE),)
    new = (Frame("work", "api", Kind.NATIVE, "api.c", 22),)
    sides = [Columns.of(at(one(names), i)) for i, names in enumerate((old, new))]

    for order in (sides, sides[::-1]):
        for resolved in resolve_columns(order):
            assert some.named_locations(resolved.to_profile())[some.WORK] == new


def test_a_selection_has_the_names_that_only_other_rows_of_its_objects_know(tmp_path):
    """A name is a property of the location, not of the service that was sampled there."""
    store = DirectoryStore(tmp_path / "store")
    bound = (bounded("api", Kind.NATIVE, ElfAddress(0x401200)),)
    put(store, at(one(bound), 1))
    put(store, at(one(some.NAMES[some.WORK], labels=JOBS), 2, "web-2", "00112233445566bb"))
    query = Query(TenantStore(store), tmp_path / "cache")

    profile = query.profile(minutes(0, 60), API).profile.to_profile()

    assert some.named_locations(profile)[some.WORK] == some.NAMES[some.WORK]
    functions = {row.frame.function for row in query.functions(minutes(0, 60), API).rows}
    assert functions == {"main", "clamp", "work"}


def test_a_location_is_one_function_in_all_that_is_shown_of_a_window(tmp_path):
    """Graph, table, self samples, by service or by process; whatever was kept before."""
    store = DirectoryStore(tmp_path / "store")
    for number in range(0, 60, 10):
        put(store, minute(number, 0, BOUNDED))
    query = Query(TenantStore(store), tmp_path / "cache")
    query.profile(minutes(0, 60))
    list(query.self_samples([minutes(0, 60)]))
    before = query.functions(minutes(0, 60), API)
    assert {row.frame.function for row in before.rows} == {
        "main",
        *(name.function for (name,) in BOUNDED.values()),
    }
    for number in range(60, 120, 10):
        put(store, minute(number, 0, NAMED))
    expected: Counter[str] = Counter()
    for number in range(0, 120, 10):
        for row in flamegraph.top_functions(Columns.of(minute(number, 0, NAMED))):
            expected[row.frame.function] += row.self_samples

    for _ in range(2):  # the second time all of it is kept
        query = Query(TenantStore(store), tmp_path / "cache")
        assert agreed_functions(query, minutes(0, 120)) == expected
        assert "+0x" not in "".join(agreed_functions(query, minutes(5, 115)))
    # The old hour by itself has the names that it knows, and its totals were not replaced.
    again = query.functions(minutes(0, 60), API)
    assert sorted(again.rows) == sorted(before.rows)


def agreed_functions(query: Query, window: Window) -> Counter[str]:
    """Return self samples by function, which all ways to ask for them agree on."""
    profile = query.profile(window, API).profile
    rows = flamegraph.top_functions(profile)
    graph = Counter({row.frame.function: row.self_samples for row in rows})
    for selector in (API, PROCESS):
        table = query.functions(window, selector)
        assert graph == Counter({row.frame.function: row.self_samples for row in table.rows})
        samples: Counter[int] = Counter()
        for _, part in query.self_samples([window], selector):
            hashes = part.function_hashes[part.lines[:, 1]].tolist()
            for function, count in zip(hashes, part.samples.tolist(), strict=True):
                samples[function] += count
        assert sorted((+samples).values()) == sorted((+graph).values())
    return graph


def test_of_names_that_became_known_together_one_is_taken_everywhere(tmp_path):
    """As where one of two hosts has the debug file that tells of inlined calls."""
    store = DirectoryStore(tmp_path / "store")
    other = {
        place: (Frame("inlined", "api", Kind.INLINED), *names) for place, names in NAMED.items()
    }
    for number in range(3):
        put(store, minute(number, 0, NAMED))
        put(store, minute(number, 1, other))

    for window in (minutes(0, 60), minutes(0, 2)):
        found = agreed_functions(Query(TenantStore(store), tmp_path / "cache"), window)
        assert (found["inlined"] == 0) or +found == Counter({"inlined": found.total()})


@pytest.mark.parametrize("selector", [API, PROCESS], ids=["service", "process"])
@pytest.mark.parametrize("first_named", [72, 76], ids=["both sides named", "after side named"])
def test_a_name_that_became_known_is_no_change(tmp_path, first_named, selector):
    """Neither new nor gone: the history and the sides are compared by location."""
    store = DirectoryStore(tmp_path / "store")
    for number in range(80):
        for host in range(2):
            put(store, minute(number, host, NAMED if number >= first_named else BOUNDED))
    sides = Operand(selector, minutes(72, 76)), Operand(selector, minutes(76, 80))

    for _ in range(2):
        query = Query(TenantStore(store), tmp_path / "cache", now_ns=lambda: START_NS + 10**15)
        found = comparison.of_store(query, *sides)

        assert found.source == NoiseSource.HISTORY
        assert found.positions >= 6
        assert comparison.changed(found.functions) == []
        assert {each.frame.function for each in found.functions} == {
            "main",
            *(name.function for (name,) in NAMED.values()),
        }
        pair = Pair(found, *(query.profile(side.window, API).profile for side in sides))
        names = {frame.function for frame in pair.stacks.of_group(Group.FUNCTION).stacks.frames}
        assert not any("+0x" in name for name in names)


def test_a_name_that_became_known_between_files_is_no_change():
    """Replicates recorded before a program's symbols were found, and after."""
    before = [Columns.of(minute(number, 0, BOUNDED)) for number in range(4)]
    after = [Columns.of(minute(number, 0, NAMED)) for number in range(4, 8)]

    found = comparison.of_profiles(before, after)

    assert comparison.changed(found.functions) == []
    assert {each.frame.function for each in found.functions} == {
        "main",
        *(name.function for (name,) in NAMED.values()),
    }
