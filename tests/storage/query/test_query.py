"""Queries: any window and selection of a real store, exact, whatever the cache holds."""

import dataclasses
import itertools
import multiprocessing
import os
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from profiler.flamegraph import flamegraph
from storage.columns import Columns, Times
from storage.formats import pprof, pprof_arrays, pprof_comments
from storage.formats.pprof_message import ProfileMessage, decompress
from storage.hashing import Hasher
from storage.merging import merge_columns
from storage.objects.directory import DirectoryStore
from storage.objects.keys import (
    DEFAULT_TENANT,
    LARGEST_OBJECT_BYTES,
    StoreUnavailable,
    object_key,
)
from storage.objects.tenant import TenantStore
from storage.profile import (
    Profile,
    ProfileError,
    SchemaError,
    Window,
    make_labels,
)
from storage.query import cache as cache_module
from storage.query import function_totals
from storage.query.cache import DecodedCache
from storage.query.function_totals import FunctionTotals, merge_function_totals
from storage.query.listing import HOUR_NS
from storage.query.query import Query
from storage.query.resolve import resolve_columns
from storage.query.self_samples import ObjectSelfSamples, join_self_samples
from storage.query.threads import Turns
from storage.selector import Matcher, Operator, Selector
from tests.support import profiles as some
from tests.support.live import wait_for
from tests.support.stores import MINUTE_NS, START_NS, at, minutes, put

DAY = Window(START_NS, START_NS + 24 * HOUR_NS)
KEY = b"test"
HASHER = Hasher(KEY)


class CountingStore(DirectoryStore):
    """A directory that remembers which profiles were fetched, and may refuse to return them."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.fetched: Counter[str] = Counter()
        self.is_away = False
        self._lock = threading.Lock()

    def get(self, key: str) -> bytes:
        if key.endswith("/key"):
            return super().get(key)
        with self._lock:
            self.fetched[key] += 1
        if self.is_away:
            raise StoreUnavailable("away")
        return super().get(key)


@pytest.fixture
def store(tmp_path):
    return CountingStore(tmp_path / "store")


@pytest.fixture
def query(store, tmp_path):
    return Query(TenantStore(store), tmp_path / "cache")


def with_host(profile: Profile) -> Profile:
    name = profile.accounting.hosts[0].name
    sets = tuple(make_labels({"host": name, **dict(labels)}) for labels in profile.label_sets)
    return dataclasses.replace(profile, label_sets=sets)


def small(number: int) -> Profile:
    """A profile that shares most of its stacks with the others, and has one of its own."""
    return some.build(
        [
            ({"service": "api", "version": f"1.{number % 3}", "comm": "api", "pid": "7"},
             [some.MAIN, some.WORK], number + 1),
            ({"service": "jobs", "comm": "python3", "pid": str(number)},
             [some.HANDLER, some.named(f"job_{number}")], 2),
        ],
        some.NAMES,
    )  # fmt: skip


def names_of(profile: Profile):
    return some.named_locations(profile)


def by_function(rows):
    return {
        (row.frame.function, row.frame.module, row.frame.kind): (
            row.self, row.total, row.self_samples, row.total_samples
        )
        for row in rows
        if row.total_samples
    }  # fmt: skip


@given(some.profiles())
def test_the_fast_reader_gives_what_the_thorough_one_gives(profile):
    """Counts, labels, accounting and names, for anything our encoder writes."""
    content = pprof.encode(profile)

    fast = pprof_arrays.decode(content, HASHER).to_profile()
    thorough = pprof.decode(content)

    assert fast == thorough
    assert names_of(fast) == names_of(thorough)
    assert fast.modules == thorough.modules


def test_our_own_objects_take_the_fast_way():
    """Hostile names and every kind of frame included; only odd files take the long one."""
    for profile in (some.sample_profile(), some.hostile_profile(), some.build([])):
        plain = decompress(pprof.encode(profile))
        assert pprof_arrays._decode_ours(plain, HASHER).to_profile() == profile


def test_numbers_of_three_bytes_are_read_fast_too():
    """An object with more than 2^14 locations: its stacks' words are longer than most."""
    profile = some.synthetic(300, 20, 40_000)
    plain = decompress(pprof.encode(profile))

    assert pprof_arrays._decode_ours(plain, HASHER).to_profile() == profile


def test_a_string_that_is_not_there_is_refused_where_nobody_looks_at_it():
    """A mapping with a build id needs no file name; a damaged one still damages the file."""
    plain = decompress(pprof.encode(some.sample_profile()))
    damaged = ProfileMessage()
    damaged.ParseFromString(plain)
    damaged.mapping[1].filename = 99

    for read in (pprof.decode, lambda content: pprof_arrays.decode(content, HASHER)):
        with pytest.raises(ProfileError, match="no string number 99"):
            read(damaged.SerializeToString())


@settings(max_examples=300)
@given(st.data())
def test_a_changed_byte_is_read_as_the_thorough_reader_reads_it(data):
    """Whatever a damaged file says, both say the same, or both refuse it."""
    plain = bytearray(decompress(pprof.encode(some.sample_profile())))
    for _ in range(data.draw(st.integers(1, 3))):
        plain[data.draw(st.integers(0, len(plain) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(plain[: data.draw(st.integers(0, len(plain)))])

    for content in (bytes(plain), cut):
        try:
            thorough = pprof.decode(content)
        except ProfileError:
            with pytest.raises(ProfileError):
                pprof_arrays.decode(content, HASHER)
            continue
        fast = pprof_arrays.decode(content, HASHER).to_profile()
        assert fast == thorough
        assert names_of(fast) == names_of(thorough)


@given(st.lists(some.profiles(), min_size=1, max_size=4))
def test_columns_merge_as_profiles_do(profiles):
    """Counts, window, accounting, and the names of locations that only some profiles name."""
    merged = merge_columns([Columns.of(profile, HASHER) for profile in profiles]).to_profile()

    expected = some.merge(profiles)
    assert merged == expected
    assert names_of(merged) == names_of(expected)


@given(st.lists(some.profiles(), min_size=1, max_size=3))
def test_sums_of_functions_are_those_of_the_stacks(profiles):
    """Self and total, recursion counted once, as the flame graph's own table counts them."""
    for profile in profiles:
        expected = flamegraph.top_functions(Columns.of(profile))
        # Without the line on which a function begins, which sums do not have.
        files = {row.frame[:4] for row in expected if row.total_samples}
        for columns in (
            Columns.of(profile, HASHER),
            pprof_arrays.decode(pprof.encode(profile), HASHER),
        ):
            totals = FunctionTotals.of(columns, HASHER).by(())
            assert by_function(totals.function_totals()) == by_function(expected)
            found = totals.function_totals()
            assert {row.frame[:4] for row in found if row.total_samples} == files


@given(st.lists(some.profiles(), min_size=1, max_size=4))
def test_sums_add_up_over_objects(profiles):
    """The sum of what each object's functions cost, whatever the order of the objects."""
    totals = [FunctionTotals.of(Columns.of(profile, HASHER), HASHER) for profile in profiles]
    expected: Counter[tuple[object, ...]] = Counter()
    for profile in profiles:
        for row in flamegraph.top_functions(Columns.of(profile)):
            expected[row.frame[:3]] += row.self_samples

    for parts in (totals, totals[::-1]):
        merged = merge_function_totals(parts).by(())
        found = {row.frame[:3]: row.self_samples for row in merged.function_totals()}
        assert +Counter(found) == +expected


@pytest.mark.parametrize("frames", [1, 7, 100, 5000])
def test_sums_of_many_frames_are_made_in_pieces(monkeypatch, frames):
    """A fleet's hour has a hundred million frames, which are not laid out at once."""
    columns = Columns.of(some.synthetic(200, 12, functions=40), HASHER)
    whole = FunctionTotals.of(columns, HASHER)
    monkeypatch.setattr(function_totals, "_FRAMES_AT_ONCE", frames)

    pieces = FunctionTotals.of(columns, HASHER)

    assert np.array_equal(pieces.rows, whole.rows)
    assert np.array_equal(pieces.counts, whole.counts)


@given(st.lists(some.profiles(), min_size=1, max_size=4))
def test_self_samples_are_those_of_the_sums(profiles):
    """Of every service and function, of one object and of several, by the best names of all."""
    for some_of_them in (profiles[:1], profiles):
        # A module has one name in all, else its addresses without names have several.
        alike = [dataclasses.replace(profile, modules={}) for profile in some_of_them]
        columns = [pprof_arrays.decode(pprof.encode(profile), HASHER) for profile in alike]
        joined = join_self_samples([ObjectSelfSamples.of(each, HASHER) for each in columns])
        inside = joined.inside(Window(0, 2**63 - 1), Selector())
        everything = inside.of_functions(inside.names.function_hashes)
        named = resolve_columns(columns)
        totals = merge_function_totals([FunctionTotals.of(each, HASHER) for each in named])

        assert counted(*everything) == counted(*totals.self_samples())


def counted(label_sets, hashes, lines, samples) -> Counter[tuple[object, ...]]:
    found: Counter[tuple[object, ...]] = Counter()
    for (number, function), count in zip(lines.tolist(), samples.tolist(), strict=True):
        found[label_sets[number], int(hashes[function])] += count
    return +found


def self_samples_of(query: Query, window: Window, text: str = "{}") -> Counter[tuple[object, ...]]:
    """Count self samples by labels of the service and function's hash, as comparisons do."""
    found: Counter[tuple[object, ...]] = Counter()
    for number, part in query.self_samples([window], Selector.parse(text)):
        assert number == 0
        found += counted(*part)
    return by_host(found)


def functions_of(query: Query, window: Window, text: str = "{}") -> Counter[tuple[object, ...]]:
    """Count the same from the totals of functions."""
    parts, _ = query.function_totals_by_part(window, Selector.parse(text))
    return by_host(sum((counted(*part.self_samples()) for part in parts), Counter()))


def by_host(found: Counter[tuple[object, ...]]) -> Counter[tuple[object, ...]]:
    totals: Counter[tuple[object, ...]] = Counter()
    for (labels, function), samples in found.items():
        totals[dict(labels)["host"], function] += samples
    return totals


@pytest.mark.parametrize(
    "text", ["{}", '{service="api",host="web-1"}', '{comm="api"}', '{service="no"}']
)
def test_self_samples_of_any_window_need_no_object_where_hours_are_kept(store, tmp_path, text):
    """Windows begin where they like, on either side of an hour, and may be asked for together."""
    for minute in range(0, 180, 4):
        put(store, at(small(minute), minute, f"web-{minute % 3}", f"{minute % 3:016x}"))
    asked = [
        minutes(10, 55),
        minutes(55, 61),
        minutes(100, 179),
        minutes(61, 62),
        minutes(300, 360),
    ]
    # In the same folder, which makes it faster.
    never_settled = Query(TenantStore(store), tmp_path / "cache", now_ns=lambda: START_NS)
    expected = [functions_of(never_settled, window, text) for window in asked]
    query = Query(TenantStore(store), tmp_path / "cache")
    list(query.self_samples([minutes(0, 180)]))
    store.fetched.clear()

    together: list[Counter[tuple[object, ...]]] = [Counter() for _ in asked]
    for number, part in query.self_samples(asked, Selector.parse(text)):
        together[number] += counted(*part)

    assert [self_samples_of(query, window, text) for window in asked] == expected
    assert list(map(by_host, together)) == expected
    assert sum(map(len, expected[:4])) > 0 or "no" in text
    # Which process a sample is of is known to stacks alone.
    assert not store.fetched or "comm" in text


def test_where_no_hour_is_kept_only_what_a_window_holds_is_fetched(store, query):
    for minute in range(0, 180, 4):
        put(store, at(small(minute), minute))

    assert self_samples_of(query, minutes(10, 20)) != Counter()
    assert len(query.presence(minutes(100, 110)).objects) == 3
    assert len(store.fetched) == 2 + 3
    assert self_samples_of(query, minutes(50, 130)) == functions_of(query, minutes(50, 130))
    assert len(store.fetched) == 2 + 20


def test_self_samples_are_made_again_where_only_stacks_were_kept(store, tmp_path):
    for minute in range(0, 120, 7):
        put(store, at(small(minute), minute))
    query = Query(TenantStore(store), tmp_path / "cache")
    list(query.self_samples([minutes(0, 120)]))
    for path in (tmp_path / "cache").rglob("*.objectselfsamples"):
        path.unlink()

    window = minutes(20, 90)

    assert self_samples_of(query, window) == functions_of(query, window) != Counter()


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(some.profiles(), min_size=1, max_size=6), st.integers(0, 6))
def test_a_partition_of_a_window_merges_to_the_whole(tmp_path_factory, profiles, cut):
    """The parts of a window, asked for one by one, add up to it; so do cold and warm answers."""
    folder = tmp_path_factory.mktemp("partition")
    store = DirectoryStore(folder / "store")
    placed = [at(profile, 30 * i) for i, profile in enumerate(profiles)]
    for profile in placed:
        put(store, profile)
    query = Query(TenantStore(store), folder / "cache")
    expected = some.merge([with_host(profile) for profile in placed])

    whole = query.profile(DAY).profile.to_profile()
    middle = START_NS + cut * 30 * MINUTE_NS
    parts = [Window(START_NS, middle), Window(middle, DAY.end_ns)]
    answers = [query.profile(part) for part in parts if part.start_ns < part.end_ns]
    found = some.merge(each.profile.to_profile() for each in answers if each.coverage.objects)

    assert whole == expected
    assert found == expected
    assert query.profile(DAY).profile.to_profile() == expected


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(some.profiles(), st.sampled_from(["service", "comm", "pid", "host"]), some.texts)
def test_a_selector_filters_rows_as_by_hand(tmp_path_factory, profile, name, value):
    """Hostile label values included; also for what has the value that is asked for."""
    folder = tmp_path_factory.mktemp("filter")
    store = DirectoryStore(folder / "store")
    placed = at(profile, 0)
    put(store, placed)
    values = {value, *(dict(labels).get(name, "") for labels in placed.label_sets)}
    query = Query(TenantStore(store), folder / "cache")

    for wanted in sorted(values):
        selector = Selector((Matcher(name, Operator.EQUAL, wanted),))
        answer = query.profile(minutes(0, 60), selector)
        rows = some.having(with_host(placed), lambda labels, w=wanted: labels.get(name, "") == w)
        if name == "host" and wanted != "web-1" and not _has_own_host(placed):
            assert answer.coverage.objects == 0
            continue
        assert answer.profile.to_profile().counts() == rows.counts()
        assert answer.profile.accounting == placed.accounting
        table = query.functions(minutes(0, 60), selector, by=())
        assert by_function(table.rows) == by_function(flamegraph.top_functions(Columns.of(rows)))
        assert table.samples == rows.total_samples


def _has_own_host(profile: Profile) -> bool:
    return any("host" in dict(labels) for labels in profile.label_sets)


def test_whoever_asks_again_after_an_interrupt_gets_further(store, query):
    """An hour that takes longer than a request may is answered in the end."""
    for minute in range(60):
        put(store, at(small(minute), minute))
    decoded = []

    def check():
        if sum(decoded) >= 30:
            raise TimeoutError

    with pytest.raises(TimeoutError):
        query.watched(decoded.append).interruptible(check).profile(minutes(0, 60))
    store.fetched.clear()
    answer = query.profile(minutes(0, 60))

    assert answer.coverage.objects == 60
    assert len(store.fetched) <= 30


def test_objects_outside_the_window_are_never_fetched(store, query):
    """Nor is any fetched twice: the second answer comes from the cache alone."""
    keys = [put(store, at(small(i), i)).text for i in range(0, 180, 10)]

    answer = query.profile(minutes(55, 95))
    again = query.profile(minutes(55, 95))

    assert store.fetched == Counter(keys[6:10])
    assert answer.coverage.objects == 4
    assert again.profile.to_profile() == answer.profile.to_profile()


def test_an_object_belongs_to_the_window_that_holds_its_start(store, query):
    """Half-open: the start counts, the end does not, and an object counts as a whole."""
    put(store, at(small(0), 5))
    inside = Window(START_NS + 5 * MINUTE_NS, START_NS + 5 * MINUTE_NS + 1)

    assert query.profile(inside).profile.total_samples == small(0).total_samples
    assert query.profile(minutes(4, 5)).coverage.objects == 0
    assert query.profile(minutes(6, 7)).coverage.objects == 0


def test_whole_hours_answer_as_their_objects_do(store, query, tmp_path):
    """Merged hours are an optimisation: every kind of answer is equal without them."""
    for host in range(2):
        for minute in range(0, 180, 20):
            put(store, at(small(minute + host), minute, f"web-{host}", f"{host:016x}"))
    never_settled = Query(TenantStore(store), tmp_path / "other", now_ns=lambda: START_NS)
    selector = Selector.parse('{version=~"1.[01]"}')
    step = 10 * MINUTE_NS

    for window in (minutes(0, 180), minutes(0, 180), minutes(10, 170)):
        hours, objects = (
            (
                each.profile(window).profile.to_profile(),
                each.profile(window, selector).profile.to_profile().counts(),
                each.functions(window, selector),
                [
                    (series.labels, series.samples.tolist(), series.values.tolist())
                    for series in each.timeline(window, selector, step, ("host", "comm")).series
                ],
                each.labels(window),
            )
            for each in (query, never_settled)
        )
        assert hours[:2] == objects[:2]
        assert sorted(hours[2].rows) == sorted(objects[2].rows)
        assert hours[2].coverage == objects[2].coverage
        assert hours[3:] == objects[3:]


def test_a_lone_object_answers_for_its_hour_and_for_itself(store, query):
    """Asked for a part of its hour first, it is cached as what the whole hour holds as well."""
    put(store, at(small(0), 7))

    for window in (minutes(5, 9), minutes(0, 60), minutes(5, 9)):
        assert query.profile(window).profile.total_samples == small(0).total_samples
        assert query.labels(window)["host"] == {"web-1": small(0).total_samples}


def test_a_late_object_is_found_in_an_hour_that_was_merged_already(store, query):
    """The name of what is kept says what it was made from."""
    put(store, at(small(1), 1))
    first = query.profile(minutes(0, 60)).profile.total_samples

    put(store, at(small(2), 2))

    second = query.profile(minutes(0, 60)).profile.total_samples
    assert second == first + small(2).total_samples


def test_a_timeline_adds_up_each_step(store, query):
    """Per label, largest first, with the accounting of each step beside it."""
    for i in range(4):
        put(store, at(small(i), i))

    timeline = query.timeline(minutes(0, 5), Selector(), 2 * MINUTE_NS, ("service",))

    assert [(dict(s.labels)["service"], s.samples.tolist()) for s in timeline.series] == [
        ("api", [3, 7, 0]),
        ("jobs", [4, 4, 0]),
    ]
    assert timeline.totals["stored"].tolist() == [7, 11, 0]
    assert timeline.totals["lost"].tolist() == [4, 4, 0]
    assert timeline.totals["profiled_ns"].tolist() == [2 * MINUTE_NS, 2 * MINUTE_NS, 0]
    with pytest.raises(ValueError, match="steps of 0 ns"):
        query.timeline(minutes(0, 5), step_ns=0)


def test_a_timeline_says_for_how_long_each_step_was_profiled(store, query):
    """Hosts at the same time count once; a step may have only begun."""
    other = at(small(2), 0, host="web-2", host_id="66")
    for profile in (at(small(1), 0), other, at(small(3), 1), at(small(4), 3)):
        put(store, profile)

    timeline = query.timeline(minutes(0, 6), Selector(), 2 * MINUTE_NS)

    assert timeline.covered_ns.tolist() == [2 * MINUTE_NS, MINUTE_NS, 0]


def test_services_that_were_there_are_known_object_by_object(store, query, tmp_path):
    """Sampled or not; merged hours tell the same as their objects."""
    idle = make_labels({"service": "mail", "version": "2"})
    for host in range(2):
        for minute in range(0, 150, 30):
            profile = small(minute)
            services = {idle: 1000 + minute, make_labels({"service": "api"}): 7}
            accounting = dataclasses.replace(profile.accounting, services=services)
            profile = dataclasses.replace(profile, accounting=accounting)
            put(store, at(profile, minute, f"web-{host}", f"{host:016x}"))
    never_settled = Query(TenantStore(store), tmp_path / "other", now_ns=lambda: START_NS)
    selector = Selector.parse('{service="mail",host="web-1"}')

    for each in (query, never_settled):
        found = each.presence(minutes(0, 180), selector)
        starts = ((found.objects[found.rows[:, 0], 0] - START_NS) // MINUTE_NS).tolist()
        labels = {found.label_sets[number] for number in found.rows[:, 1].tolist()}

        assert labels == {make_labels({**dict(idle), "host": "web-1"})}
        assert dict(zip(starts, found.rows[:, 2].tolist(), strict=True)) == {
            minute: 1000 + minute for minute in range(0, 150, 30)
        }
        part = each.presence(minutes(31, 91), selector)
        starts = ((part.objects[:, 0] - START_NS) // MINUTE_NS).tolist()
        assert sorted(starts) == [60, 90]
        assert sorted(part.rows[:, 2].tolist()) == [1060, 1090]
    assert not len(query.presence(minutes(400, 500)).rows)
    query.timeline(minutes(0, 180))
    store.fetched.clear()
    assert len(query.presence(minutes(31, 91), selector).rows) == 2
    assert not store.fetched


@pytest.mark.parametrize("offset_ns", [0, 1, 499_999_999, 500_000_000, 999_999_999])
def test_an_object_belongs_to_the_second_in_which_it_begins(store, query, offset_ns):
    """In presence and self samples as in the listing, whatever part of a second it begins at."""
    profile = at(small(5), 10)
    start_ns, end_ns = profile.window
    services = {make_labels({"service": "api"}): 7}
    profile = dataclasses.replace(
        profile,
        window=Window(start_ns + offset_ns, end_ns + offset_ns),
        accounting=dataclasses.replace(profile.accounting, services=services),
    )
    put(store, profile)
    second = Window(start_ns, start_ns + 10**9)
    around = [Window(start_ns - 10**9, start_ns), Window(second.end_ns, second.end_ns + 10**9)]
    assert query.has_data(second)

    assert query.presence(second).rows[:, 2].tolist() == [7]
    assert self_samples_of(query, second) == functions_of(query, second) != Counter()
    for window in around:
        assert not len(query.presence(window).rows)
        assert self_samples_of(query, window) == Counter()
    part = Window(start_ns, start_ns + 250_000_000)
    assert query.timeline(part).series[0].samples.tolist() == [profile.total_samples]


def test_functions_may_be_told_apart_by_thread(store, query):
    """Labels of single processes are read from stacks, all others from totals."""
    for i in range(3):
        put(store, at(small(i), i))

    table = query.functions(minutes(0, 9), Selector.parse('{pid="1"}'), by=("pid", "service"))

    assert [(dict(row.labels), row.frame.function, row.self_samples) for row in table.rows] == [
        ({"pid": "1", "service": "jobs"}, "job_1", 2),
        ({"pid": "1", "service": "jobs"}, "handler", 0),
    ]
    assert table.samples == 2


def test_labels_and_their_values_are_counted_in_samples(store, query):
    """Values of one label, most samples first; the host comes from the accounting."""
    for i in range(3):
        put(store, at(small(i), i, f"web-{i}", f"{i:016x}"))

    assert query.labels(minutes(0, 9))["service"] == {"api": 6, "jobs": 6}
    assert query.label_values(minutes(0, 9), "version") == {"1.2": 3, "1.1": 2, "1.0": 1}
    assert list(query.label_values(minutes(0, 9), "host")) == ["web-2", "web-1", "web-0"]
    assert query.label_values(minutes(0, 9), "nothing") == {}


def test_an_empty_window_gives_an_empty_answer(query):
    """Of every kind, without an error."""
    assert query.profile(DAY).profile.total_samples == 0
    assert query.profile(DAY).profile.window == DAY
    assert query.functions(DAY).rows == ()
    assert query.timeline(DAY, step_ns=HOUR_NS).series == ()
    assert query.labels(DAY) == {}


def test_what_cannot_be_read_is_named_and_stops_nothing(store, query):
    """Damaged, cut short, of a later schema, no profile at all: named with the reason."""
    good = put(store, at(small(1), 1))
    content = pprof.encode(at(small(2), 2))
    key = object_key(at(small(2), 2), content, DEFAULT_TENANT)
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    foreign = b"not a profile"
    later = make_later(at(small(4), 4))
    broken = {
        key.text: bytes(flipped),
        key._replace(start_s=key.start_s + 60).text: content[: len(content) // 2],
        key._replace(start_s=key.start_s + 120).text: b"",
        object_key(at(small(4), 4), later, DEFAULT_TENANT).text: later,
        object_key(at(small(5), 5), foreign, DEFAULT_TENANT).text: foreign,
    }
    for broken_key, bytes_ in broken.items():
        store.put(broken_key, bytes_)
    store.put("v1/default/l0/README", b"?")
    store.put(good.text.replace("pb.gz", "txt"), b"?")

    for window in (minutes(0, 9), minutes(0, 60), minutes(0, 60)):
        answer = query.profile(window)
        assert answer.profile.total_samples == small(1).total_samples
        assert {each.key for each in answer.coverage.skipped} == set(broken)
        reasons = " ".join(each.reason for each in answer.coverage.skipped)
        assert "damaged" in reasons
        assert "schema 99" in reasons
        assert query.functions(window).coverage.skipped == answer.coverage.skipped
    assert max(store.fetched[each] for each in broken) == 1


def test_a_huge_object_is_named_and_not_fetched(store, query):
    """Whoever may write to the store cannot fill the memory of those who read it."""
    key = put(store, at(small(1), 1)).text
    os.truncate(store.root / key, LARGEST_OBJECT_BYTES + 1)

    (skipped,) = query.profile(minutes(0, 60)).coverage.skipped

    assert skipped.key == key
    assert f"more than {LARGEST_OBJECT_BYTES} bytes" in skipped.reason
    assert not store.fetched[key]


def make_later(profile: Profile) -> bytes:
    """Return the profile as a later version of this program would write it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pprof_comments, "SCHEMA", 99)
        content = pprof.encode(profile)
    with pytest.raises(SchemaError):
        pprof.decode(content)
    return content


def test_a_damaged_object_that_was_repaired_is_read(store, query):
    """Failures are remembered for the bytes they were found in, not for the key."""
    content = pprof.encode(at(small(1), 1))
    key = object_key(at(small(1), 1), content, DEFAULT_TENANT).text
    store.put(key, content[:-5])
    assert query.profile(minutes(0, 60)).coverage.skipped

    store.delete(key)
    store.put(key, content)

    assert query.profile(minutes(0, 60)).profile.total_samples == small(1).total_samples


def test_a_store_that_is_away_spoils_no_later_answer(store, query):
    """What could not be fetched is named now, and there again when the store is."""
    put(store, at(small(1), 1))
    store.is_away = True
    assert [each.reason for each in query.profile(minutes(0, 60)).coverage.skipped] == ["away"]
    assert query.functions(minutes(0, 60)).rows == ()

    store.is_away = False

    assert query.profile(minutes(0, 60)).profile.total_samples == small(1).total_samples
    assert query.functions(minutes(0, 60)).samples == small(1).total_samples


def test_objects_of_another_type_are_named(store, query):
    """As earlier versions stored them, without a type in the key: they are never added up."""
    put(store, at(small(1), 1))
    content = pprof.encode(at(some.samples_only(small(2)), 2))
    key = object_key(at(small(2), 2), content, DEFAULT_TENANT)._replace(has_type=False).text
    store.put(key, content)

    for window in (minutes(0, 60), minutes(0, 5)):
        answer = query.profile(window)
        assert answer.profile.total_samples == small(1).total_samples
        assert [each.key for each in answer.coverage.skipped] == [key]


def test_profiles_of_another_type_are_read_apart(store, query):
    """Their keys name the type: queries of cpu neither read nor skip them."""
    put(store, at(small(1), 1))
    other = put(store, at(some.samples_only(small(2)), 2))
    reused = query.believing(60).listing(minutes(0, 60))

    for window, asked in itertools.product((minutes(0, 60), minutes(0, 5)), (query, reused)):
        cpu, samples = asked.profile(window), asked.profile(window, type="samples")
        assert cpu.profile.total_samples == small(1).total_samples
        assert samples.profile.total_samples == small(2).total_samples
        assert cpu.coverage.skipped == samples.coverage.skipped == ()
        assert asked.functions(window, type="samples").samples == small(2).total_samples
        assert asked.timeline(window, type="samples").coverage.objects == 1
        assert asked.fingerprint(window) != asked.fingerprint(window, "samples")
    assert store.fetched[other.text] == 1


def test_a_type_is_found_by_its_own_name(store, query):
    """Keys spell some types in another way: those of other programs may be called `alloc-space`."""
    profile = dataclasses.replace(some.samples_only(small(1)), type="alloc-space")
    put(store, at(profile, 1))

    answer = query.profile(minutes(0, 60), type="alloc-space")

    assert answer.profile.total_samples == profile.total_samples
    assert query.profile(minutes(0, 60), type="alloc_space").coverage.skipped


def test_damaged_cache_files_are_made_again(store, query, tmp_path):
    """Any flipped bit, any cut: the answer is the same, and the file is whole again."""
    for i in range(3):
        put(store, at(small(i), i))
    expected = query.profile(minutes(0, 60)).profile.to_profile()
    query.profile(minutes(0, 5))
    query.functions(minutes(0, 60))
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    kept = {path: path.read_bytes() for path in files}
    # Three objects and an hour with their self samples, its totals and names.
    assert len(kept) == 10

    for damage in (lambda c: c[: len(c) // 2], lambda c: c[:0], flip_last_bit, flip_middle_bit):
        for path, content in kept.items():
            path.write_bytes(damage(content))
        fresh = Query(TenantStore(store), tmp_path / "cache")
        assert fresh.profile(minutes(0, 60)).profile.to_profile() == expected
        assert fresh.profile(minutes(0, 5)).profile.to_profile() == expected
        assert fresh.functions(minutes(0, 60)).samples == expected.total_samples
        assert self_samples_of(fresh, minutes(0, 60)) == functions_of(fresh, minutes(0, 60))


def flip_last_bit(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def flip_middle_bit(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :]


def test_a_cache_that_cannot_be_written_only_costs_time(store, tmp_path):
    """A file stands where the folder should be: every answer is right all the same."""
    (tmp_path / "cache").write_text("in the way")
    put(store, at(small(1), 1))
    query = Query(TenantStore(store), tmp_path / "cache")

    assert query.profile(minutes(0, 60)).profile.total_samples == small(1).total_samples
    assert query.functions(minutes(0, 60)).samples == small(1).total_samples


def test_the_cache_keeps_to_its_size_and_to_what_was_used_last(tmp_path):
    """Beyond the limit the longest unused go first."""
    cache = DecodedCache(tmp_path / "cache", lambda: KEY, limit_bytes=200_000)
    columns = Columns.of(some.synthetic(200, 10, 500), Hasher(KEY))

    for i in range(40):
        cache.save(columns, f"{i:040x}")

    assert cache.size_bytes() <= 200_000
    assert cache.load(Columns, f"{39:040x}") is not None
    assert cache.load(Columns, f"{0:040x}") is None


def test_what_is_kept_comes_back_as_it_was(tmp_path):
    """Columns, totals and times, with accounting, modules and labels of any content."""
    cache = DecodedCache(tmp_path / "cache", lambda: KEY)
    for i, profile in enumerate((some.sample_profile(), some.hostile_profile(), some.build([]))):
        columns = Columns.of(profile, Hasher(KEY))
        totals = FunctionTotals.of(columns, Hasher(KEY))
        cache.save(columns, f"c{i}")
        cache.save(totals, f"s{i}", [["key", "reason"]])

        kept, note = cache.load(Columns, f"c{i}")
        kept_totals, totals_note = cache.load(FunctionTotals, f"s{i}")

        assert kept.to_profile() == profile
        assert kept.modules == profile.modules
        assert names_of(kept.to_profile()) == names_of(profile)
        assert (note, totals_note) == (None, [["key", "reason"]])
        assert list(kept_totals.function_totals()) == list(totals.function_totals())
        assert np.array_equal(kept_totals.objects, totals.objects)
        cache.save(Times.of(columns), f"t{i}")
        kept_times, _ = cache.load(Times, f"t{i}")
        assert kept_times.label_sets == columns.label_sets
        assert np.array_equal(kept_times.time_counts, columns.time_counts)
        assert kept_times.accounting == profile.accounting


def test_what_is_kept_later_is_kept_at_once_where_no_thread_can_be_started(tmp_path, monkeypatch):
    """The answer is there anyway; and what comes after it is kept later again."""
    cache = DecodedCache(tmp_path / "cache", lambda: KEY)
    columns = Columns.of(some.sample_profile(), Hasher(KEY))
    with monkeypatch.context() as full:

        def refuse(_: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        full.setattr(threading.Thread, "start", refuse)
        for name in ("one", "other"):
            cache.save_later(columns, name)
            assert cache.load(Columns, name) is not None
    started = []
    start = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda each: started.append(each) or start(each))
    cache.save_later(columns, "later")
    (saving,) = started
    saving.join()
    assert cache.load(Columns, "later") is not None


def test_what_a_version_kept_that_knew_fewer_counts_is_made_again(tmp_path, monkeypatch):
    """It left them out of what it read: their sums would be too small."""
    cache = DecodedCache(tmp_path / "cache", lambda: KEY)
    columns = Columns.of(some.sample_profile(), Hasher(KEY))
    record = cache_module._accounting_record(columns.accounting)
    del record["uncounted"]
    with monkeypatch.context() as earlier:
        earlier.setattr(cache_module, "_accounting_record", lambda _: record)
        cache.save(columns, "earlier")
    cache.save(columns, "now")

    assert cache.load(Columns, "earlier") is None
    assert cache.load(Columns, "now") is not None


def test_two_processes_share_a_cache(store, tmp_path):
    """Both start with nothing, at once, and both are right; so is a third that finds it full."""
    for i in range(30):
        put(store, at(small(i), 4 * i))
    expected = sum(small(i).total_samples for i in range(30))
    context = multiprocessing.get_context("spawn")
    arguments = (str(store.root), str(tmp_path / "cache"))

    with context.Pool(2) as pool:
        found = pool.starmap(ask, [arguments] * 6, chunksize=1)

    assert found == [(expected, expected)] * 6
    assert (
        Query(TenantStore(store), tmp_path / "cache").profile(DAY).profile.total_samples == expected
    )
    assert not store.fetched


def ask(root: str, cache: str) -> tuple[int, int]:
    query = Query(TenantStore(DirectoryStore(Path(root))), Path(cache))
    return query.profile(DAY).profile.total_samples, query.functions(DAY).samples


def test_what_is_merged_bit_by_bit_is_the_whole(store, query, monkeypatch):
    """However much is held at once, stacks, functions and coverage are the same."""
    for minute in range(0, 240, 5):
        put(store, at(small(minute), minute, f"web-{minute % 2}", f"{minute % 2:016x}"))
    asked = [
        (query.profile, ()),
        (query.profile, (Selector.parse('{service="api",host="web-1"}'),)),
        (query.functions, ()),
        (query.functions, (Selector.parse('{service="jobs"}'), ("version",))),
    ]
    expected = [ask(minutes(0, 230), *more) for ask, more in asked]

    monkeypatch.setattr("storage.query.coverage._MERGED_EARLY_ROWS", 10)

    for (ask, more), before in zip(asked, expected, strict=True):
        again = ask(minutes(0, 230), *more)
        assert again.coverage == before.coverage
        if ask == query.profile:
            assert again.profile.to_profile() == before.profile.to_profile()
        else:
            assert by_function(again.rows) == by_function(before.rows)


def test_a_listing_is_believed_for_a_while(store, query):
    """Who asks again at once is answered from the same objects; others list the store."""
    put(store, at(small(0), 0))
    believing, soon = query.believing(3600), query.believing(0.01)
    assert believing.profile(minutes(0, 9)).coverage.objects == 1
    assert soon.profile(minutes(0, 9)).coverage.objects == 1

    put(store, at(small(1), 1))

    assert believing.profile(minutes(0, 9)).coverage.objects == 1
    assert believing.profile(minutes(0, 8)).coverage.objects == 2
    assert query.profile(minutes(0, 9)).coverage.objects == 2
    wait_for(lambda: soon.profile(minutes(0, 9)).coverage.objects == 2)


def test_those_who_ask_at_once_decode_an_object_once(store, query):
    """What one question decodes, others wait for: hours kept merged, and objects one by one."""
    for minute in range(0, 90, 5):
        put(store, at(small(minute), minute))
    asked = [query.profile, query.timeline, query.functions, query.labels] * 2

    with ThreadPoolExecutor(len(asked)) as pool:
        for answer in [pool.submit(ask, minutes(0, 80)) for ask in asked]:
            answer.result()

    assert set(store.fetched.values()) == {1}
    assert len(store.fetched) == 16


def test_who_waits_for_another_question_can_be_ended(tmp_path):
    """The turn is not his, and stays with whom it belongs."""

    class HereToStayError(Exception):
        pass

    def end() -> None:
        raise HereToStayError

    turns = Turns()
    with turns.of("object", end):
        with ThreadPoolExecutor(1) as pool:

            def wait() -> None:
                with turns.of("object", end):
                    raise AssertionError("two have the turn")

            with pytest.raises(HereToStayError):
                pool.submit(wait).result()
        with turns.of("other object", end):
            pass
    with turns.of("object", end):
        pass


def test_a_timeline_is_kept_without_its_stacks(store, query, tmp_path):
    """Asked again, it needs neither the store nor what else was decoded."""
    for minute in range(0, 90, 5):
        put(store, at(small(minute), minute))
    first = query.timeline(minutes(0, 80), by=("service",))
    labels = query.labels(minutes(0, 80))
    for path in [
        *(tmp_path / "cache").rglob("*.columns"),
        *(tmp_path / "cache").rglob("*.functiontotals"),
    ]:
        path.unlink()
    store.fetched.clear()

    again = query.timeline(minutes(0, 80), by=("service",))

    assert not store.fetched
    assert [(each.labels, each.values.tolist()) for each in again.series] == [
        (each.labels, each.values.tolist()) for each in first.series
    ]
    assert again.coverage == first.coverage
    assert query.labels(minutes(0, 80)) == labels


def test_hashes_depend_on_the_key():
    """Who does not know it cannot make stacks that collide."""
    texts = [b"main", b"work"]

    assert not np.array_equal(Hasher(b"1" * 32).texts(texts), Hasher(b"2" * 32).texts(texts))
    assert np.array_equal(Hasher(b"1" * 32).texts(texts), Hasher(b"1" * 32).texts(texts))


def test_the_accounting_covers_only_hosts_that_are_asked_for(store, query):
    """A selector of hosts leaves out the other hosts' objects, ticks included."""
    for i in range(3):
        put(store, at(small(i), i, f"web-{i}", f"{i:016x}"))

    answer = query.profile(minutes(0, 60), Selector.parse('{host=~"web-[01]"}'))

    assert [host.name for host in answer.coverage.hosts] == ["web-0", "web-1"]
    assert answer.profile.accounting.ticks == sum(small(i).accounting.ticks for i in range(2))


def test_threads_hash_stacks_of_different_depths_at_once():
    """One makes the factors of few depths while another needs those of many."""
    location_hashes = np.arange(5, dtype=np.uint64)
    depths = (4_000, 30, 2_500, 10)

    def hash_one(hasher: Hasher, depth: int) -> int:
        (number,) = hasher.stacks(location_hashes, np.array([0, depth]), np.ones(depth, np.int64))
        return int(number)

    expected = [hash_one(Hasher(b"secret"), depth) for depth in depths]
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(len(depths)) as pool:
            for _ in range(500):
                hashed = pool.map(hash_one, [Hasher(b"secret")] * len(depths), depths)
                assert list(hashed) == expected
    finally:
        sys.setswitchinterval(interval_s)
