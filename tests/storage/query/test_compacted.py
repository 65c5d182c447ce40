"""Queries of compacted hours: every answer is that of the objects they were made of."""

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage.blocks.compactor import Compactor
from storage.blocks.merges import merge, roll_up
from storage.blocks.retention import collect_garbage
from storage.columns import Columns
from storage.objects.directory import DirectoryStore
from storage.objects.keys import DEFAULT_TENANT, ObjectKey, hour_of
from storage.objects.tenant import TenantStore
from storage.objects.tenant_key import KEY_BYTES
from storage.profile import Profile, Window
from storage.query import blocks
from storage.query.query import Query
from storage.selector import EMPTY, Selector
from tests.support import profiles as some
from tests.support.stores import MINUTE_NS, MemoryStore, at, minutes, put

SELECTORS = [
    EMPTY,
    *map(Selector.parse, ('{service="api"}', '{host="web-1"}', '{version!="1.1",comm=~"a.*"}')),
]
WINDOWS = [minutes(0, 60), minutes(0, 180), minutes(7, 133), minutes(61, 62), minutes(200, 300)]


def small(number: int) -> Profile:
    """A profile that shares most of its stacks with the others, and has one of its own."""
    return some.build(
        [
            ({"service": "api", "version": f"1.{number % 3}", "comm": "api", "pid": "7"},
             [some.MAIN, some.WORK], number + 1),
            ({"service": "jobs", "comm": "python3", "pid": str(number)},
             [some.HANDLER, some.named(f"job_{number}")], 2),
        ],
        some.NAMES if number % 4 else {},
    )  # fmt: skip


def without_pid(labels: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    return tuple(pair for pair in labels if pair[0] != "pid")


class Compacted:
    """A store of which some is compacted, and one with the same objects."""

    def __init__(self, folder: Path) -> None:
        self.plain = DirectoryStore(folder / "plain")
        self.store = DirectoryStore(folder / "store")
        self._folder = folder / "work"
        for store in (self.plain, self.store):
            store.put(f"v1/{DEFAULT_TENANT}/key", b"k" * KEY_BYTES)

    def put(self, profile: Profile) -> ObjectKey:
        put(self.plain, profile)
        return put(self.store, profile)

    def compact(self) -> None:
        """Compact all that is there by now."""
        with ThreadPoolExecutor(1) as executor:
            compactor = Compactor(TenantStore(self.store), self._folder, executor)
            for hour in list(compactor.occupied_hours()):
                compactor.fold(hour)

    def expire(self, keys: Sequence[ObjectKey]) -> None:
        for key in keys:
            self.store.delete(key.text)

    def queries(self, folder: Path) -> tuple[Query, Query]:
        one, other = (Query(TenantStore(s), folder / s.root.name) for s in (self.plain, self.store))
        return one, other


def counts_of(columns: Columns) -> dict[object, tuple[int, int]]:
    """Return samples and value by labels and stack, with pids added up."""
    found: dict[object, tuple[int, int]] = {}
    for row in columns.to_profile().rows():
        key = (without_pid(row.labels), row.stack)
        samples, value = found.get(key, (0, 0))
        found[key] = (samples + row.samples, value + row.value)
    return found


def names_of(columns: Columns) -> object:
    return some.named_locations(columns.to_profile())


def check_equal(plain: Query, compacted: Query, window: Window, selector: Selector) -> None:
    """Compare all kinds of answers."""
    one, other = plain.profile(window, selector), compacted.profile(window, selector)
    assert counts_of(other.profile) == counts_of(one.profile)
    assert names_of(other.profile) == names_of(one.profile)
    assert other.coverage == one.coverage
    timelines = [
        each.timeline(window, selector, 10 * MINUTE_NS, by=("service", "host"))
        for each in (plain, compacted)
    ]
    for left, right in zip(timelines[0].series, timelines[1].series, strict=True):
        assert left.labels == right.labels
        assert np.array_equal(left.samples, right.samples)
        assert np.array_equal(left.values, right.values)
    for name, total in timelines[0].totals.items():
        assert np.array_equal(total, timelines[1].totals[name]), name
    by = ("service", "host")
    assert sorted(compacted.functions(window, selector, by).rows) == sorted(
        plain.functions(window, selector, by).rows
    )
    labels = [each.labels(window, selector) for each in (plain, compacted)]
    for each in labels:
        each.pop("pid", None)
    assert labels[0] == labels[1]
    presences = [each.presence(window, selector) for each in (plain, compacted)]
    assert seconds_by_service(presences[1]) == seconds_by_service(presences[0])
    windows = [window, Window(window.start_ns, window.start_ns + 20 * MINUTE_NS)]
    assert self_samples_of(compacted, windows, selector) == self_samples_of(
        plain, windows, selector
    )
    assert compacted.has_data(window) == plain.has_data(window)


def by_service(columns: Columns) -> dict[object, tuple[int, int]]:
    found: dict[object, tuple[int, int]] = {}
    for (labels, stack), (samples, value) in counts_of(columns).items():
        key = (dict(labels)["service"], stack)
        before = found.get(key, (0, 0))
        found[key] = (before[0] + samples, before[1] + value)
    return found


def seconds_by_service(presence) -> dict[object, int]:
    found: dict[object, int] = {}
    for number, labels, present_ns in presence.rows.tolist():
        key = (presence.objects[number, 0], presence.label_sets[labels])
        found[key] = found.get(key, 0) + present_ns
    return found


def self_samples_of(
    query: Query, windows: Sequence[Window], selector: Selector
) -> dict[object, int]:
    found: dict[object, int] = {}
    for window, part in query.resolving(windows).self_samples(windows, selector):
        for (labels, function), samples in zip(part.lines.tolist(), part.samples, strict=True):
            key = (window, part.service_sets[labels], int(part.function_hashes[function]))
            found[key] = found.get(key, 0) + int(samples)
    return found


def test_answers_are_those_of_the_objects(tmp_path):
    """With late objects, in parts of several compactions, and with level 0 there or gone."""
    both = Compacted(tmp_path)
    compacted = []
    for host in (1, 2):
        for minute in range(0, 180, 20):
            profile = at(small(minute + host), minute, f"web-{host}", f"{host:016x}")
            compacted.append(both.put(profile))
    both.compact()
    late = [at(small(minute), minute, "web-1", f"{1:016x}") for minute in (3, 70, 175)]
    compacted.extend(map(both.put, late))
    both.compact()
    both.expire(compacted[::2])
    for minute in (5, 64, 179, 190):
        both.put(at(small(minute), minute, "web-3", f"{3:016x}"))

    plain, query = both.queries(tmp_path / "cache")
    for selector in reversed(SELECTORS):  # whole hours are kept of the last alone
        for window in WINDOWS:
            check_equal(plain, query, window, selector)
    for window, selector in zip(WINDOWS, itertools.cycle(SELECTORS[1:]), strict=False):
        check_equal(plain, query, window, EMPTY)
        check_equal(plain, query, window, selector)


def test_rollups_answer_where_their_labels_are_enough(tmp_path, monkeypatch):
    """Whole hours from them, the others from detail; for other labels all from detail."""
    both = Compacted(tmp_path)
    for minute in range(0, 240, 10):
        both.put(at(small(minute), minute))
    both.compact()
    plain, query = both.queries(tmp_path / "cache")
    monkeypatch.setattr(blocks, "_MANY_ROWS", 0)

    for labels, are_enough in ((frozenset({"service"}), True), (frozenset({"comm"}), False)):
        answer = query.profile(minutes(15, 235), labels=labels)
        expected = plain.profile(minutes(15, 235))
        assert by_service(answer.profile) == by_service(expected.profile)
        assert answer.coverage == expected.coverage
        without = [each for each in answer.profile.label_sets if "comm" not in dict(each)]
        assert bool(without) == are_enough


def test_a_damaged_file_costs_its_hour_only(tmp_path):
    """It is named, and all other hours are there."""
    both = Compacted(tmp_path)
    keys = [both.put(at(small(minute), minute)) for minute in (0, 60, 120)]
    both.compact()
    both.expire(keys)
    files = sorted((tmp_path / "store").rglob("*-samples_detail-*.parquet"))
    files[1].write_bytes(files[1].read_bytes()[:-20])
    plain, query = both.queries(tmp_path / "cache")

    for _ in range(2):
        answer = query.profile(minutes(0, 180))
        left = [plain.profile(window).profile for window in (minutes(0, 60), minutes(120, 180))]
        assert answer.profile.total_samples == sum(each.total_samples for each in left)
        assert [skipped.key for skipped in answer.coverage.skipped] == [hour_of(keys[1].start_s)]


MADE = (0, 20, 60, 90)
"""The minutes of the objects of two hours."""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The folder of two compacted hours, whose objects are there as well."""
    folder = tmp_path_factory.mktemp("hours")
    both = Compacted(folder)
    for minute in MADE:
        both.put(at(small(minute), minute))
    both.compact()
    return folder


@pytest.fixture
def hours(made, tmp_path) -> "Hours":
    for name in ("plain", "store"):
        shutil.copytree(made / name, tmp_path / name)
    return Hours(tmp_path)


class Hours:
    """Two compacted hours, of which the first may be damaged in some way."""

    def __init__(self, folder: Path) -> None:
        self.both = Compacted(folder)
        self.folder = folder
        self.keys = [put(self.both.plain, at(small(minute), minute)) for minute in MADE]
        self.plain = [
            Query(TenantStore(self.both.plain), folder / "cache").profile(window).profile
            for window in (minutes(0, 60), minutes(60, 120))
        ]

    def file(self, table: str) -> Path:
        return sorted(self.both.store.root.rglob(f"*-{table}-*.parquet"))[0]

    def manifest(self, change: Callable[[dict[str, Any]], None]) -> None:
        path = sorted(self.both.store.root.rglob("manifests/*/*.json"))[0]
        content = json.loads(path.read_bytes())
        change(content)
        path.write_bytes(json.dumps(content).encode())

    def query(self) -> Query:
        return Query(TenantStore(self.both.store), self.folder / "cache-of-others")


def leave_out(*tables: str) -> Callable[[Hours], None]:
    def change(manifest: dict[str, Any]) -> None:
        for part in manifest["parts"]:
            part["files"] = [file for file in part["files"] if file["table"] not in tables]

    return lambda hours: hours.manifest(change)


def name_twice(hours: Hours) -> None:
    def change(manifest: dict[str, Any]) -> None:
        (part,) = manifest["parts"]
        part["files"] += [file for file in part["files"] if file["table"] == "samples_detail"]

    hours.manifest(change)


def name_other_samples(hours: Hours) -> None:
    """A file that is not damaged, but of the other hour."""
    other = sorted(hours.both.store.root.rglob("*-samples_detail-*.parquet"))[1]
    key = str(other.relative_to(hours.both.store.root))
    rows = {}

    def find(manifest: dict[str, Any]) -> None:
        rows.update({f["key"]: f["rows"] for part in manifest["parts"] for f in part["files"]})

    def change(manifest: dict[str, Any]) -> None:
        for file in manifest["parts"][0]["files"]:
            if file["table"] == "samples_detail":
                file.update(key=key, rows=rows[key])

    path = sorted(hours.both.store.root.rglob("manifests/*/*.json"))[1]
    find(json.loads(path.read_bytes()))
    hours.manifest(change)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda hours: hours.file("objects").unlink(), "there is no object"),
        (lambda hours: hours.file("objects").write_bytes(b""), "damaged"),
        (lambda hours: hours.file("samples_detail").unlink(), "there is no object"),
        (lambda hours: hours.file("times").write_bytes(b"x" * 99), "damaged"),
        (lambda hours: hours.file("stacks").unlink(), "there is no object"),
        (leave_out("objects"), "objects"),
        (leave_out("times"), "names no times"),
        (leave_out("label_sets"), "names no label_sets"),
        (leave_out("presence"), "names no presence"),
        (leave_out("samples_detail", "samples_10m"), "expired"),
        (name_twice, "twice"),
        (name_other_samples, "contradict"),
    ],
)
def test_what_is_wrong_with_an_hour_is_named_and_costs_no_other(hours, damage, reason):
    """Whatever is asked. An hour whose objects are not known is read from those that are left."""
    hours.both.expire(hours.keys[1:])
    damage(hours)
    query, window = hours.query(), minutes(0, 120)

    for _ in range(2):
        answer = query.profile(window)
        (skipped,) = answer.coverage.skipped
        assert (skipped.key, reason in skipped.reason) == (hour_of(hours.keys[0].start_s), True)
        lost = hours.plain[0].total_samples + hours.plain[1].total_samples
        assert 0 < answer.profile.total_samples < lost
        query.timeline(window)
        query.functions(window)
        query.presence(window)
        query.labels(window)
        query.has_data(minutes(5, 50))
        list(query.self_samples([window]))
    if "object" in reason:
        at_level_0 = at(small(0), 0).total_samples if "samples" not in skipped.reason else 0
        is_read = "-objects-" in skipped.reason or "objects" in reason
        expected = hours.plain[1].total_samples + (at_level_0 if is_read else 0)
        assert answer.profile.total_samples == expected


def test_ids_of_another_key_are_refused(hours):
    """They mean nothing beside those that a reader makes of objects."""
    hours.both.expire(hours.keys)
    path = hours.both.store.root / f"v1/{DEFAULT_TENANT}/key"
    path.write_bytes(b"z" * KEY_BYTES)
    answer = hours.query().profile(minutes(0, 120))

    assert answer.profile.total_samples == 0
    assert {"another key" in each.reason for each in answer.coverage.skipped} == {True}
    assert len(answer.coverage.skipped) == 2


def test_a_compactor_makes_the_key_of_a_tenant_that_has_none(tmp_path):
    """As those that upload do: else its ids would mean nothing once somebody makes it."""
    both = Compacted(tmp_path)
    path = both.store.root / f"v1/{DEFAULT_TENANT}/key"
    path.unlink()
    keys = [both.put(at(small(minute), minute)) for minute in (0, 30)]
    both.compact()
    both.expire(keys)
    plain, query = both.queries(tmp_path / "cache")

    assert len(path.read_bytes()) == KEY_BYTES
    assert counts_of(query.profile(minutes(0, 60)).profile) == counts_of(
        plain.profile(minutes(0, 60)).profile
    )


def test_names_that_are_no_hours_stop_nothing(hours):
    """A manifest of hour 29 of a day that is not there is none."""
    path = sorted(hours.both.store.root.rglob("manifests/*/*.json"))[0]
    for name in ("2026-19-39T29", "2026-02-30T05", f"{path.name[:11]}29", "0"):
        path.with_name(f"{name}.json").write_bytes(b"{}")
    query = hours.query()

    assert query.span() == minutes(0, 91)
    assert query.nearest(minutes(30, 40))[-1].start_ns == minutes(60, 61).start_ns
    assert query.profile(minutes(0, 120)).profile.total_samples > 0


def test_what_expired_detail_cannot_answer_is_said(hours):
    """Rollups answer whole steps by their labels; other labels and hosts are refused by name."""
    hours.both.expire(hours.keys)
    leave_out("samples_detail")(hours)
    query, window = hours.query(), minutes(0, 60)
    whole = query.profile(window)
    steps = query.profile(minutes(15, 60))
    of_service = query.profile(window, Selector.parse('{service="api"}'))

    assert by_service(whole.profile) == by_service(hours.plain[0])
    assert whole.coverage.skipped == ()
    assert steps.profile.total_samples == at(small(20), 20).total_samples
    assert "steps of 10 minutes" in steps.coverage.skipped[0].reason
    assert of_service.profile.total_samples < whole.profile.total_samples
    for selector in ('{comm="api"}', '{comm!="api"}', '{host="web-1"}'):
        answer = query.profile(window, Selector.parse(selector))
        assert answer.profile.total_samples == 0
        assert "detail has expired" in answer.coverage.skipped[0].reason


def test_late_objects_of_an_hour_that_has_expired_are_added_to_its_rollup(tmp_path, hours):
    """The hourly rollup has those before it, late ones have parts, which are merged apart."""
    hour = hour_of(hours.keys[0].start_s)
    with ThreadPoolExecutor(1) as executor:
        compactor = Compactor(TenantStore(hours.both.store), tmp_path / "work", executor)
        assert roll_up(compactor, hour)
        leave_out("samples_detail", "samples_10m")(hours)
        hours.both.expire(hours.keys)
        before = hours.query().profile(minutes(0, 60))
        late = 0
        for minute in (30, 40):
            hours.both.put(at(small(minute), minute))
            compactor.fold(hour)
            late += small(minute).total_samples
        answers = [hours.query().profile(minutes(0, 60))]
        assert merge(compactor, hour) == 1
        collect_garbage(compactor)
        answers.append(hours.query().profile(minutes(0, 60)))

    assert by_service(before.profile) == by_service(hours.plain[0])
    for after in answers:
        assert after.profile.total_samples == before.profile.total_samples + late
        assert after.coverage.skipped == before.coverage.skipped == ()


@pytest.mark.parametrize("store", ["directory", "memory"])
def test_a_cache_that_cannot_be_written_makes_queries_slower_only(tmp_path, hours, store):
    """What is read is fetched anew each time."""
    hours.both.expire(hours.keys)
    copy = MemoryStore()
    for stored in hours.both.store.list(""):
        copy.put(stored.key, hours.both.store.get(stored.key))
    (tmp_path / "file").write_bytes(b"")
    chosen = copy if store == "memory" else hours.both.store
    query = Query(TenantStore(chosen), tmp_path / "file/cache")

    for _ in range(2):
        answer = query.profile(minutes(0, 120))
        assert answer.coverage.skipped == ()
        assert answer.profile.total_samples == sum(each.total_samples for each in hours.plain)
        assert query.functions(minutes(0, 120)).samples == answer.profile.total_samples


def test_files_that_are_deleted_meanwhile_are_named(hours):
    """Garbage collection may delete what a manifest named when it was listed."""
    hours.both.expire(hours.keys)
    query = hours.query().listing(minutes(0, 120))
    hours.file("samples_detail").unlink()
    answer = query.profile(minutes(0, 120))

    assert [skipped.key for skipped in answer.coverage.skipped] == [hour_of(hours.keys[0].start_s)]
    assert not answer.coverage.is_lasting
    assert answer.profile.total_samples == hours.plain[1].total_samples


def test_labels_of_processes_are_answered_by_the_objects_or_not_at_all(hours):
    """Compaction drops them: the objects are read as long as they are there, and named if not."""
    query, window = hours.query(), minutes(0, 120)
    selector = Selector.parse('{pid="7"}')
    whole = query.profile(window, selector)

    assert whole.profile.total_samples == sum(minute + 1 for minute in (0, 20, 60, 90))
    assert whole.coverage.skipped == ()
    assert query.labels(window, selector)["pid"].keys() == {"7"}
    assert {row.labels for row in query.functions(window, by=("pid",)).rows} >= {(("pid", "7"),)}
    lines = query.timeline(window, by=("pid",)).series
    assert {line.labels for line in lines} >= {(("pid", "7"),), (("pid", "60"),)}

    hours.both.expire(hours.keys[:1])
    for chosen in (selector, Selector.parse('{pid!="7"}')):
        coverage = query.profile(window, chosen).coverage
        assert [each.key for each in coverage.skipped] == [hour_of(hours.keys[0].start_s)]
        assert "1 of its objects are only there compacted" in coverage.skipped[0].reason
    assert query.profile(window, selector).profile.total_samples == 21 + 61 + 91
    assert query.profile(window).coverage.skipped == ()


def test_rows_are_chosen_by_the_host_that_they_name_themselves(tmp_path):
    """As those of imported profiles do: the object's own host is another."""
    both = Compacted(tmp_path)
    rows = [({"host": "db-7"}, [some.MAIN], 3), ({}, [some.MAIN], 4)]
    keys = [both.put(at(some.build(rows, some.NAMES), minute)) for minute in (0, 1)]
    both.put(at(small(5), 5, "web-2", "2" * 16))
    both.compact()
    both.expire(keys)
    plain, query = both.queries(tmp_path / "cache")
    for text, samples in (('{host="db-7"}', 6), ('{host="web-1"}', 8), ('{host="nobody"}', 0)):
        check_equal(plain, query, minutes(0, 60), Selector.parse(text))
        answer = query.profile(minutes(0, 60), Selector.parse(text))
        assert answer.profile.total_samples == samples
        assert answer.coverage.objects == (2 if samples else 0)


def test_a_type_is_found_by_its_own_name(tmp_path):
    """Its key spells it with fewer characters; parts in another unit are named."""
    both = Compacted(tmp_path)
    keys = []
    for minute, unit in ((0, "bytes"), (70, "count")):
        profile = dataclasses.replace(at(small(minute), minute), type="alloc-space", unit=unit)
        keys.append(both.put(profile))
    with ThreadPoolExecutor(1) as executor:
        compactor = Compactor(
            TenantStore(both.store), tmp_path / "work", executor, type_="alloc_space"
        )
        assert [compactor.fold(hour_of(key.start_s)) for key in keys] == [1, 1]
    both.expire(keys)
    plain, query = both.queries(tmp_path / "cache")

    for each in (plain, query):
        answer = each.profile(minutes(0, 120), type="alloc-space")
        assert answer.profile.total_samples == small(0).total_samples
        assert "measured in count" in answer.coverage.skipped[0].reason
        assert each.functions(minutes(0, 120), type="alloc-space").samples == (
            answer.profile.total_samples
        )


def test_where_data_are_is_the_same_once_they_are_compacted(tmp_path):
    """To the second, also inside of an hour; of a store of which some is compacted as well."""
    both = Compacted(tmp_path)
    keys = [both.put(at(small(minute), minute)) for minute in (5, 50, 130)]
    both.compact()
    windows = [minutes(*each) for each in ((10, 20), (0, 3), (60, 100), (130, 190), (140, 150))]
    for gone in (keys[:1], keys):
        both.expire(gone)
        plain, query = both.queries(tmp_path / "cache")
        assert query.span() == plain.span() == minutes(5, 131)
        for window in windows:
            assert query.nearest(window) == plain.nearest(window)
            assert query.has_data(window) == plain.has_data(window)


@pytest.mark.parametrize("edit", [Path.unlink, lambda path: path.write_bytes(b"?")])
def test_objects_answer_where_their_compacted_hour_cannot_be_read(tmp_path, edit):
    """Which of them are compacted is not known then; it is said, and other hours are as before."""
    both = Compacted(tmp_path)
    keys = [both.put(at(small(minute), minute)) for minute in (0, 30, 60)]
    both.compact()
    both.expire(keys[2:])
    edit(min((tmp_path / "store").rglob("*-objects-*.parquet")))
    plain, query = both.queries(tmp_path / "cache")

    answer = query.profile(minutes(0, 120))

    assert counts_of(answer.profile) == counts_of(plain.profile(minutes(0, 120)).profile)
    assert [skipped.key for skipped in answer.coverage.skipped] == [hour_of(keys[0].start_s)]


@pytest.mark.parametrize("text", ['{pid="7"}', '{pid!="7",service="api"}', '{tid="1"}'])
def test_compacted_hours_are_skipped_for_labels_that_they_lack(tmp_path, text):
    """And named: what is left in level 0 is not all that there was."""
    both = Compacted(tmp_path)
    keys = [both.put(at(small(minute), minute)) for minute in (0, 30)]
    both.compact()
    both.expire(keys)
    for minute in (40, 70):
        put(both.store, at(small(minute), minute))
    _, query = both.queries(tmp_path / "cache")
    expected = [(hour_of(keys[0].start_s), "2 of its objects are only there c")]
    window, selector = minutes(0, 120), Selector.parse(text)

    answers = [
        query.profile(window, selector),
        query.timeline(window, selector),
        query.functions(window, selector),
    ]

    for answer in answers:
        found = [(each.key, each.reason[:33]) for each in answer.coverage.skipped]
        assert found == expected
        assert answer.coverage.objects == 2
    assert (
        answers[0].profile.total_samples
        == query.profile(minutes(40, 120), selector).profile.total_samples
    )
