"""Whatever is uploaded, compacted, merged and deleted in whatever order: answers are level 0's.

Also those that are read from rollups and heads, as those of a fleet are, and from detail in
several files.

EVERFLAME_EXAMPLES=1000 tries as many stores, which takes an hour.
"""

import dataclasses
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import msgspec
import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from storage.blocks import tables
from storage.blocks.compactor import Compactor
from storage.blocks.day import renew_day
from storage.blocks.manifest import DayManifest, Manifests, start_s_of
from storage.blocks.merges import merge, roll_up
from storage.columns import Columns
from storage.formats import pprof
from storage.objects.directory import DirectoryStore
from storage.objects.keys import DEFAULT_TENANT, NS_PER_S, ObjectKey
from storage.objects.tenant import TenantStore
from storage.objects.tenant_key import KEY_BYTES
from storage.profile import Accounting, Host, Profile, ProfileBuilder, Window, make_labels
from storage.query import blocks
from storage.query.hosts import HostSearch
from storage.query.query import Query
from storage.selector import EMPTY, Selector
from symbolizer.location import AddressLocation, Frame, Kind, Location
from symbolizer.text import readable
from tests.support import profiles as some
from tests.support.stores import MINUTE_NS, START_NS, minutes

EXAMPLES = int(os.environ.get("EVERFLAME_EXAMPLES", "5"))
TYPES = ("cpu", "alloc-space")
HOSTS = [
    ("web-1", "1" * 16),
    ("web-2", "2" * 16),
    (readable(b"\xff;<b>\n"), "3" * 16),
    ("", "4" * 16),
]
PLACES: list[Location] = [
    some.MAIN, some.WORK, some.MEMCPY, some.STRIPPED, some.READ, some.HANDLER, some.SQUARE,
    *(some.named(readable(name), Kind.JIT, readable(name)) for name in some.HOSTILE_NAMES),
]  # fmt: skip
VALUES = ["api", "jobs", "", "007", "web-1", "db-7", readable(b'\x1b[31m"}'), "漢字"]
DROPPED = ("pid", "tid")
ALL = minutes(-61, 300)
DAY_NS = 86400 * NS_PER_S

labels = st.dictionaries(
    st.sampled_from(["service", "version", "comm", "pid", "tid", "host", "empty"]),
    st.sampled_from(VALUES),
    max_size=4,
)
counts = st.sampled_from([0, 1, 7, 2**40])


class Upload(NamedTuple):
    profile: Profile
    type: str


@st.composite
def uploads(draw: st.DrawFn) -> Upload:
    """A profile of up to two minutes in three hours, of a host, of none or of two."""
    type_ = draw(st.sampled_from((*TYPES[:1] * 3, *TYPES[1:])))
    start_ns = (
        START_NS
        + draw(st.integers(0, 179)) * MINUTE_NS
        + draw(st.sampled_from([0, 0, 1, NS_PER_S - 1, 59 * NS_PER_S]))
    )
    window = Window(start_ns, start_ns + draw(st.sampled_from([1, MINUTE_NS, 2 * MINUTE_NS])))
    second = -(-window.end_ns // NS_PER_S)
    builder = ProfileBuilder(draw(st.sampled_from([1, 7, some.PERIOD_NS])), type_,
                             "nanoseconds" if type_ == "cpu" else "bytes")  # fmt: skip
    builder.modules.update({each.build_id: each for each in some.MODULES})
    for row in draw(
        st.lists(st.tuples(labels, st.lists(st.sampled_from(PLACES), max_size=4)), max_size=6)
    ):
        numbers = [builder.location(place, named_at(place, second)) for place in row[1]]
        samples = draw(st.integers(1, 9))
        value = None if type_ == "cpu" else draw(st.sampled_from([0, 1, 2**41]))
        builder.add(make_labels(row[0]), numbers, samples, value)
    hosts = draw(st.lists(st.sampled_from(HOSTS), max_size=2, unique=True))
    accounting = Accounting(
        hosts=tuple(sorted(Host(*each) for each in hosts)),
        **{name: draw(counts) for name in ("cpus", "nonidle_ns", "profiled_ns", "ticks", "idle")},
        lost={name: draw(counts) for name in draw(st.lists(st.sampled_from(VALUES), max_size=2))},
        misses={name: draw(counts) for name in draw(st.lists(st.sampled_from(VALUES), max_size=2))},
        services={
            make_labels(each): draw(counts)
            for each in draw(
                st.lists(labels, max_size=2, unique_by=lambda e: tuple(sorted(e.items())))
            )
        },
    )
    return Upload(builder.build(window, accounting), type_)


def named_at(place: Location, second: int) -> tuple[Frame, ...]:
    """Return what a location is called in a second: another name now and then, or none."""
    names = some.NAMES.get(place, ())
    if not names or second % 3 == 0:
        return ()
    return (*names[:-1], names[-1]._replace(function=f"v{second % 2}"))


@st.composite
def selectors(draw: st.DrawFn) -> Selector:
    names = st.sampled_from(["service", "version", "comm", "host", "empty", "nothing"])
    one = st.tuples(names, st.sampled_from(["=", "!=", "=~", "!~"]), st.sampled_from(VALUES))
    text = ",".join(
        f'{name}{op}"{escaped(value, is_regex="~" in op)}"'
        for name, op, value in draw(st.lists(one, max_size=2))
    )
    return Selector.parse(f"{{{text}}}") if text else EMPTY


def escaped(value: str, *, is_regex: bool) -> str:
    if is_regex:
        return value[:1] + ".*" if value[:1].isalnum() else ".*"
    return value.replace("\\", "\\\\").replace('"', '\\"')


def windows() -> st.SearchStrategy[Window]:
    edge = st.one_of(
        st.integers(-10, 200).map(lambda minute: START_NS + minute * MINUTE_NS),
        st.tuples(st.integers(-1, 181), st.sampled_from([1, -1, NS_PER_S, 123_456_789_123])).map(
            lambda pair: START_NS + pair[0] * MINUTE_NS + pair[1]
        ),
    )
    some_window = st.tuples(edge, edge).map(lambda pair: Window(min(pair), max(pair) + 1))
    return st.one_of(st.just(ALL), st.just(minutes(60, 120)), some_window)


steps = st.lists(
    st.one_of(uploads(), st.sampled_from(["fold", "fold", "merge", "delete", "roll up"])),
    min_size=1,
    max_size=12,
)


class Stores:
    """A store in which things happen, and one with the same objects that nobody touches."""

    def __init__(self, folder: Path, random: object) -> None:
        self.plain = DirectoryStore(folder / "plain")
        self.store = DirectoryStore(folder / "store")
        self._work = folder / "work"
        self._random = random
        self._keys: list[ObjectKey] = []
        for store in (self.plain, self.store):
            store.put(f"v1/{DEFAULT_TENANT}/key", b"k" * KEY_BYTES)

    def do(self, step: Upload | str) -> None:
        if isinstance(step, Upload):
            content = pprof.encode(step.profile)
            TenantStore(self.plain).put_profile(step.profile, content)
            self._keys.append(TenantStore(self.store).put_profile(step.profile, content)[0])
            return
        with ThreadPoolExecutor(1) as executor, mock.patch.object(tables, "_DETAIL_BYTES", 512):
            for type_ in TYPES:
                compactor = Compactor(
                    TenantStore(self.store), self._work, executor, type_=type_.replace("-", "_")
                )
                self._compact(compactor, step)

    def _compact(self, compactor: Compactor, step: str) -> None:
        hours = list(compactor.occupied_hours())
        if step == "fold":
            for hour in hours[:: self._random.choice([1, -1])]:
                compactor.fold(hour)
                assert not compactor.report.unreadable
        for hour, manifest in compactor.manifests.list().hours.items():
            if step == "merge":
                merge(compactor, hour)
            elif step == "roll up":
                roll_up(compactor, hour)
                renew_day(compactor, hour[:10])
            elif step == "delete":
                gone = compactor.contents_of(manifest.parts)
                for key, _ in list(compactor.level0(hour)):
                    if key.content16 in gone and self._random.random() < 0.6:
                        self.store.delete(key.text)

    def expire(self, *, by_hour: bool) -> None:
        """Compact everything; let all hours expire that their day has, then what it has by hour."""
        for step in ("fold", "roll up"):
            self.do(step)
        for type_ in TYPES:
            manifests = Manifests(self.store, DEFAULT_TENANT, type_.replace("-", "_"))
            listed = manifests.list()
            for name, hour in listed.hours.items():
                day = listed.days.get(name[:10])
                if day is not None and day.holds(hour):
                    for key, _ in TenantStore(self.store).list_hour(
                        start_s_of(name) * NS_PER_S, manifests.type
                    ):
                        self.store.delete(key.text)
                    manifests.delete(name)
            for name in listed.days if by_hour else ():
                manifests.change_day(name, without_hours)


def without_hours(day: DayManifest) -> DayManifest:
    kept = tuple(file for file in day.files if file.table not in {"samples_1h", "functions_1d"})
    return msgspec.structs.replace(day, files=kept)


def check_equal(
    plain: Query, compacted: Query, window: Window, selector: Selector, type_: str
) -> None:
    """Compare all kinds of answers; names only where every object's are known to both."""
    is_all = window == ALL and not selector.matchers
    one, other = (each.profile(window, selector, type_) for each in (plain, compacted))
    assert other.coverage == one.coverage
    assert counts_of(other.profile) == counts_of(one.profile)
    assert other.profile.period_ns == one.profile.period_ns
    if is_all:
        shown = [each.profile.to_profile() for each in (one, other)]
        assert some.named_locations(shown[1]) == some.named_locations(shown[0])
        used = {each.build_id for each in shown[0].locations if isinstance(each, AddressLocation)}
        assert all(shown[1].modules[name] == shown[0].modules[name] for name in used)
    for by in (("service", "host"), ("empty", "comm")):
        lines = [
            each.timeline(window, selector, 10 * MINUTE_NS, by=by, type=type_)
            for each in (plain, compacted)
        ]
        for left, right in zip(lines[0].series, lines[1].series, strict=True):
            assert left.labels == right.labels
            assert np.array_equal(left.samples, right.samples)
            assert np.array_equal(left.values, right.values)
        assert lines[0].totals.keys() == lines[1].totals.keys()
        for name, total in lines[0].totals.items():
            assert np.array_equal(total, lines[1].totals[name]), name
        assert lines[0].coverage == lines[1].coverage
        tables = [each.functions(window, selector, by, type_) for each in (plain, compacted)]
        assert (tables[0].total, tables[0].samples) == (tables[1].total, tables[1].samples)
        assert tables[0].coverage == tables[1].coverage
        if is_all:
            assert sorted(tables[0].rows) == sorted(tables[1].rows)
    if type_ != "cpu":
        return
    known = [each.labels(window, selector) for each in (plain, compacted)]
    for each in known:
        for name in DROPPED:
            each.pop(name, None)
    assert known[0] == known[1]
    presences = [seconds_of(each.presence(window, selector)) for each in (plain, compacted)]
    assert presences[0] == presences[1]
    asked = [window, Window(window.start_ns, window.start_ns + 20 * MINUTE_NS)]
    selves = [self_samples_of(each, asked, selector, by_name=is_all) for each in (plain, compacted)]
    assert selves[0] == selves[1]
    assert compacted.has_data(window) == plain.has_data(window)


def check_rolled_up(
    plain: Query, rolled: Query, window: Window, selector: Selector, type_: str
) -> None:
    """Compare all that rollups answer: by the labels that they keep, and hosts by ten minutes."""
    names = ("service", "version")
    one, other = (
        each.profile(window, selector, type_, frozenset(names)) for each in (plain, rolled)
    )
    assert not other.coverage.skipped
    assert other.coverage.objects == one.coverage.objects
    assert without_services(other.coverage.accounting) == without_services(one.coverage.accounting)
    assert counts_of(other.profile, names) == counts_of(one.profile, names)
    for by in (names, ("service", "host"), ()):
        lines = [
            each.timeline(window, selector, 10 * MINUTE_NS, by, type=type_, is_aligned=True)
            for each in (plain, rolled)
        ]
        assert [each.labels for each in lines[1].series] == [
            each.labels for each in lines[0].series
        ]
        for left, right in zip(lines[0].series, lines[1].series, strict=True):
            assert np.array_equal(left.samples, right.samples)
            assert np.array_equal(left.values, right.values)
        for name, total in lines[0].totals.items():
            assert np.array_equal(total, lines[1].totals[name]), name
        assert lines[1].coverage.objects == lines[0].coverage.objects
    if type_ != "cpu":
        return
    known = [each.labels(window, selector) for each in (plain, rolled)]
    for name in (*names, "host"):
        assert known[1].get(name) == known[0].get(name)
    edge_ns = START_NS + 40 * MINUTE_NS
    presences = [each.presence_by_host(window, selector, [edge_ns]) for each in (plain, rolled)]
    sums = [seconds_by_labels(each, names, edge_ns) for each in presences]
    assert sums[1] == sums[0]
    hosts = [
        HostSearch(each.blocks.store, blocks=each.blocks).find(*window, within_s=30).names
        for each in (plain, rolled)
    ]
    assert hosts[1] == hosts[0]


def without_services(accounting: Accounting) -> Accounting:
    return dataclasses.replace(accounting, services={})


def seconds_by_labels(presence: object, names: Sequence[str], edge_ns: int) -> dict[object, int]:
    """Return presence by labels before and after an edge."""
    found: dict[object, int] = {}
    for number, of_labels, present_ns in presence.rows.tolist():
        labels = tuple(pair for pair in presence.label_sets[of_labels] if pair[0] in names)
        key = (labels, presence.objects[number][0] >= edge_ns)
        found[key] = found.get(key, 0) + present_ns
    return {key: present_ns for key, present_ns in found.items() if present_ns}


def counts_of(
    columns: Columns, names: Sequence[str] | None = None
) -> dict[object, tuple[int, int]]:
    """Return samples and value by labels and stack, with processes and threads added up.

    With `names` only these labels tell rows apart.
    """
    found: dict[object, tuple[int, int]] = {}
    for row in columns.to_profile().rows():
        kept = (
            pair
            for pair in row.labels
            if pair[0] not in DROPPED and (not names or pair[0] in names)
        )
        key = (tuple(kept), row.stack)
        samples, value = found.get(key, (0, 0))
        found[key] = (samples + row.samples, value + row.value)
    return found


def seconds_of(presence: object) -> dict[object, int]:
    found: dict[object, int] = {}
    for number, of_labels, present_ns in presence.rows.tolist():
        labels = tuple(p for p in presence.label_sets[of_labels] if p[0] not in DROPPED)
        key = (tuple(presence.objects[number].tolist()), labels)
        found[key] = found.get(key, 0) + present_ns
    return found


def self_samples_of(
    query: Query, asked: Sequence[Window], selector: Selector, *, by_name: bool
) -> dict[object, int]:
    found: dict[object, int] = {}
    for window, part in query.resolving(asked).self_samples(asked, selector):
        for (of_labels, function), samples in zip(part.lines.tolist(), part.samples, strict=True):
            name = int(part.function_hashes[function]) if by_name else 0
            key = (window, part.service_sets[of_labels], name)
            found[key] = found.get(key, 0) + int(samples)
    return found


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate] if EXAMPLES < 50 else list(Phase),
)
@given(
    st.lists(uploads(), min_size=1, max_size=4),
    steps,
    st.lists(st.tuples(windows(), selectors()), min_size=2, max_size=4),
    st.randoms(use_true_random=False),
)
def test_any_store_answers_as_level_0(first, steps, asked, random):
    """Windows with odd edges, selectors, hostile names, hosts of rows, several types and units."""
    with tempfile.TemporaryDirectory() as name:
        stores = Stores(Path(name), random)
        for step in (*first, "fold", *steps):
            stores.do(step)
        plain, query = (
            Query(TenantStore(store), Path(name) / "cache" / store.root.name)
            for store in (stores.plain, stores.store)
        )
        for _ in range(2):  # read, then kept
            for window, selector in [(ALL, EMPTY), *asked]:
                for type_ in TYPES:
                    check_equal(plain, query, window, selector, type_)


def rollup_selectors() -> st.SearchStrategy[Selector]:
    one = st.tuples(
        st.sampled_from(["service", "version"]),
        st.sampled_from(["=", "!=", "=~", "!~"]),
        st.sampled_from(VALUES),
    )
    texts = st.lists(one, max_size=2).map(
        lambda all_: ",".join(
            f'{name}{op}"{escaped(value, is_regex="~" in op)}"' for name, op, value in all_
        )
    )
    return texts.map(lambda text: Selector.parse(f"{{{text}}}") if text else EMPTY)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate] if EXAMPLES < 50 else list(Phase),
)
@given(
    st.lists(uploads(), min_size=2, max_size=5),
    steps,
    st.lists(st.tuples(windows(), rollup_selectors()), min_size=2, max_size=3),
    st.sampled_from(["", "hours", "all by hour"]),
    st.randoms(use_true_random=False),
)
def test_rollups_answer_as_level_0(first, steps, asked, expired, random):
    """As if all hours were large: of days, hours and ten minutes, with late objects and edges."""
    day = Window(START_NS // DAY_NS * DAY_NS, (START_NS // DAY_NS + 1) * DAY_NS)
    with (
        tempfile.TemporaryDirectory() as name,
        mock.patch.object(blocks, "_MANY_ROWS", -1),
        mock.patch.object(blocks, "_MANY_HEADS", -1),
    ):
        stores = Stores(Path(name), random)
        for step in (*first, "fold", "roll up", *steps):
            stores.do(step)
        plain, query = (
            Query(TenantStore(store), Path(name) / "cache" / store.root.name)
            for store in (stores.plain, stores.store)
        )
        for window, selector in [(ALL, EMPTY), (day, EMPTY), *asked]:
            for type_ in TYPES:
                check_rolled_up(plain, query, window, selector, type_)
        if expired:
            stores.expire(by_hour=expired == "all by hour")
            for _ in range(2):  # read, then kept
                for selector in (EMPTY, *(selector for _, selector in asked)):
                    for type_ in TYPES:
                        check_rolled_up(plain, query, day, selector, type_)
