"""Functions of fleets: read from series, they are what the stacks of all objects say."""

import dataclasses
from collections import Counter
from pathlib import Path

import pytest

from storage.blocks.functions import FUNCTIONS_1D, FUNCTIONS_1H, FUNCTIONS_10M, GROUPS_1D, GROUPS_1H
from storage.blocks.schema import FUNCTIONS
from storage.objects.directory import DirectoryStore
from storage.objects.keys import DEFAULT_TENANT, NS_PER_S
from storage.objects.tenant import TenantStore
from storage.objects.tenant_key import KEY_BYTES
from storage.profile import Profile, Window
from storage.query import function_series
from storage.query.function_series import plan_self, plan_totals
from storage.query.function_totals import FunctionTotals, SelfSamples
from storage.query.query import Query
from storage.selector import EMPTY, Selector
from tests.support.compacted import compact, delete, level0
from tests.support.compaction import Expected, profile
from tests.support.python_profiles import LOOP, STACKS, profile_of

DAY_S = 20_000 * 86_400
START_S = DAY_S + 22 * 3600
MINUTES = [*range(0, 240, 10), 5, 64, 118, 119, 121]
"""From 22:00 to 2:00; the last hour is not compacted."""


def window(first: float, last: float) -> Window:
    return Window(int((START_S + 60 * first) * NS_PER_S), int((START_S + 60 * last) * NS_PER_S))


def shop(start_s: int) -> Profile:
    """Return a window of a fourth host, which runs a Python program."""
    head = profile(start_s, host=4)
    stacks = [(names, samples + start_s // 60 % 7) for names, samples in STACKS]
    made = profile_of(stacks, service="s1", comm="python3")
    return dataclasses.replace(made, window=head.window, accounting=head.accounting)


WINDOWS = {
    "all": window(0, 240),
    "a whole day, so far": window(0, 120),
    "hours": window(60, 180),
    "ten minutes": window(20, 150),
    "ragged": window(3, 179),
    "inside of ten minutes": window(61, 66),
    "inside of a second": window(63.999, 64.5),
    "not compacted": window(185, 230),
}
SELECTORS = [EMPTY, Selector.parse('{service="s1"}'), Selector.parse('{service!="jobs"}')]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[DirectoryStore, DirectoryStore]:
    """Return a store without compaction, and one in which all but the last hour is compacted."""
    folder = tmp_path_factory.mktemp("stores")
    plain, compacted = DirectoryStore(folder / "plain"), DirectoryStore(folder / "compacted")
    for store in (plain, compacted):
        store.put(f"v1/{DEFAULT_TENANT}/key", b"k" * KEY_BYTES)
    made = [
        profile(START_S + 60 * minute, host, seed=minute % 4)
        for minute in MINUTES
        for host in (1, 2, 3)
    ]
    made += [shop(START_S + 60 * minute) for minute in MINUTES]
    for each in made:
        Expected(plain).put(each)
    for each in made:
        if each.window.start_ns < window(180, 240).start_ns:
            Expected(compacted).put(each)
    compact(compacted, folder / "work", has_rollups=True)
    delete(compacted, level0(compacted))
    for each in made:
        if each.window.start_ns >= window(180, 240).start_ns:
            Expected(compacted).put(each)
    return plain, compacted


@pytest.fixture
def queries(
    stores: tuple[DirectoryStore, DirectoryStore],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[Query, Query]:
    """Return queries of both; of the compacted one series are read, as of a fleet."""
    monkeypatch.setattr(function_series, "_MANY_ROWS", -1)
    plain, compacted = (Query(TenantStore(each), tmp_path / each.root.name) for each in stores)
    return plain, compacted


def self_counts(totals: FunctionTotals | None) -> Counter[tuple[object, ...]]:
    found: Counter[tuple[object, ...]] = Counter()
    for row in totals.function_totals() if totals is not None else ():
        host = dict(row.labels).get("host", "")
        found[host, row.frame, "value"] += row.self
        found[host, row.frame, "samples"] += row.self_samples
    return +found


def by_hash(parts: list[SelfSamples]) -> Counter[tuple[object, ...]]:
    found: Counter[tuple[object, ...]] = Counter()
    for part in parts:
        for (labels, function), samples in zip(part.lines, part.samples, strict=True):
            found[part.service_sets[labels], int(part.function_hashes[function])] += int(samples)
    return +found


@pytest.mark.parametrize("name", WINDOWS)
def test_series_say_what_stacks_say(queries, name):
    """Self and total by service, and self by host, of any window and selection."""
    plain, compacted = queries
    for selector in SELECTORS:
        for by in ((), ("service",), ("service", "version")):
            expected = plain.functions(WINDOWS[name], selector, by)
            found = compacted.functions(WINDOWS[name], selector, by)
            assert sorted(found.rows) == sorted(expected.rows)
            assert (found.total, found.samples) == (expected.total, expected.samples)
            assert found.coverage.accounting == expected.coverage.accounting
        by_host, _ = plain.function_totals(WINDOWS[name], selector, ("host",))
        theirs, _ = compacted.self_by_host(WINDOWS[name], selector)
        assert self_counts(theirs) == self_counts(by_host)


@pytest.mark.parametrize("name", WINDOWS)
def test_the_time_of_the_loop_is_that_of_python_functions(queries, name):
    """No function that an interpreter adds to stacks has samples, however they are read."""
    plain, compacted = queries
    asked = WINDOWS[name]
    for query in (plain, compacted):
        rows = {row.frame.function: row for row in query.functions(asked, by=()).rows}
        if "Shop.price" not in rows:
            continue
        assert rows["Shop.price"].self_samples > rows["PyDict_GetItem"].self_samples > 0
        assert {LOOP, "_PyObject_MakeTpCall", "list_sort"}.isdisjoint(rows)
        by_host, _ = query.self_by_host(asked, EMPTY)
        selves = self_counts(by_host)
        functions = {frame.function for _, frame, _ in selves}
        assert "Shop.price" in functions
        assert LOOP not in functions


@pytest.mark.parametrize("name", WINDOWS)
def test_groups_have_the_sums_of_their_hosts(queries, name):
    """A host is in one group, whatever its samples are read from."""
    plain, compacted = queries
    groups = compacted.host_groups()
    for selector in (*SELECTORS, Selector.parse('{host="host-2"}')):
        expected: Counter[tuple[object, ...]] = Counter()
        by_host, _ = plain.function_totals(WINDOWS[name], selector, ("host",))
        for (host, *key), count in self_counts(by_host).items():
            expected[groups.of(str(host)), *key] += count

        found, _ = compacted.self_by_host(WINDOWS[name], selector, groups)

        assert self_counts(found) == expected
        parts = compacted.self_samples_from_series(WINDOWS[name], selector, groups)
        assert by_hash(parts) == (by_hash([found.self_samples()]) if found is not None else {})


NUMBERS = {FUNCTIONS}
"""Series of hours number functions; their table says which these are."""


def tables_of(query: Query, asked: Window) -> list[tuple[set[str], int]]:
    """Return the tables that series of a window are read from, and how many pieces have none."""
    hours = query.blocks.hours(asked).hours
    return [
        ({file.table for each in plan.chosen for file in each.files} - NUMBERS, len(plan.rest))
        for plan in (
            plan_totals(hours),
            plan_self(hours, has_groups=False),
            plan_self(hours, has_groups=True),
        )
    ]


def test_the_fewest_rows_are_read_that_fit_a_window(queries):
    """A day where all of it is asked for, then hours, then ten minutes, then the samples."""
    _, query = queries

    found = {name: tables_of(query, asked) for name, asked in WINDOWS.items()}

    assert found == {
        "all": [({FUNCTIONS_1H}, 0), ({FUNCTIONS_1D}, 0), ({GROUPS_1D}, 0)],
        "a whole day, so far": [({FUNCTIONS_1H}, 0), ({FUNCTIONS_1D}, 0), ({GROUPS_1D}, 0)],
        "hours": [
            ({FUNCTIONS_1H}, 0),
            ({FUNCTIONS_1D, FUNCTIONS_10M}, 0),
            ({GROUPS_1D, GROUPS_1H}, 0),
        ],
        "ten minutes": [
            ({FUNCTIONS_1H}, 2),
            ({FUNCTIONS_10M}, 0),
            ({GROUPS_1H, FUNCTIONS_10M}, 0),
        ],
        "ragged": [
            ({FUNCTIONS_1H}, 2),
            ({FUNCTIONS_10M}, 2),
            ({GROUPS_1H, FUNCTIONS_10M}, 2),
        ],
        "inside of ten minutes": [(set(), 1), (set(), 1), (set(), 1)],
        "inside of a second": [(set(), 1), (set(), 1), (set(), 1)],
        "not compacted": [(set(), 0), (set(), 0), (set(), 0)],
    }
