"""A tenant's profiles in a store: listing a window, the first and the newest, and expiry."""

import itertools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.objects.directory import DirectoryStore
from storage.objects.keys import NS_PER_S, ObjectKey, ObjectStore, StoreRefused, hour_of
from storage.objects.tenant import TenantStore, list_tenants
from storage.profile import Window
from tests.support.stores import START_NS, MemoryStore

HOUR_S = 3600
START_S = START_NS // NS_PER_S


def keys(store: ObjectStore) -> list[str]:
    return [stored.key for stored in store.list("")]


def window_key(
    start_s: int, length_s: int = 60, host: int = 1, content: int = 0, type_: str = "cpu"
) -> ObjectKey:
    """Return a key; of type "" without a type, as all keys until November 2026."""
    key = ObjectKey("default", f"{host:016x}", start_s, length_s, f"{content:016x}")
    return key._replace(type=type_) if type_ else key._replace(has_type=False)


windows = st.tuples(st.integers(0, 4 * HOUR_S), st.integers(1, HOUR_S))


kept = st.lists(st.tuples(windows, st.integers(1, 3), st.sampled_from(["", "cpu", "cpu0", "wall"])))


def expected(keys: set[ObjectKey], window: Window, type_: str) -> list[tuple[str, int, int, int]]:
    """Return host, start, length of the keys of a type that overlap a window, as listed."""
    return sorted(
        {
            (key.start_s // HOUR_S, key.host_id, str(key.start_s), str(key.length_s))
            for key in keys
            if key.type == type_ and key.start_ns < window.end_ns and key.end_ns > window.start_ns
        }
    )


@settings(max_examples=50)  # each makes a folder of its own
@given(kept, windows)
def test_a_window_finds_exactly_the_profiles_of_its_type_that_overlap_it(
    tmp_path_factory: pytest.TempPathFactory,
    kept: list[tuple[tuple[int, int], int, str]],
    asked: tuple[int, int],
) -> None:
    """By hour, host and start, whichever layout their keys have; foreign objects are ignored."""
    directory = DirectoryStore(tmp_path_factory.mktemp("store"))
    memory = MemoryStore()
    stored = {
        window_key(START_S + start, length, host, type_=type_)
        for (start, length), host, type_ in kept
    }
    names = [key.text for key in stored]
    for store in (directory, memory):
        for name in (*names, "v1/default/l0/2026-05-28T20/notes.txt", "v1/default/l0/notes.txt"):
            store.put(name, b"")
    window = Window((START_S + asked[0]) * NS_PER_S, (START_S + sum(asked)) * NS_PER_S)

    for store, type_ in itertools.product((directory, memory), ("cpu", "cpu0", "wall", "alloc")):
        found = [key for key, _ in TenantStore(store).list_window(window, type_)]

        assert {key.type for key in found} <= {type_}
        assert [
            (key.start_s // HOUR_S, key.host_id, str(key.start_s), str(key.length_s))
            for key in found
        ] == expected(stored, window, type_)


def test_a_window_of_a_real_store_finds_both_layouts(store: ObjectStore) -> None:
    """S3 servers list in different ways; pages of other layouts and types are not read."""
    hours = range(0, 30, 3)
    stored = [
        window_key(START_S + hour * HOUR_S + 60 * minute, host=host, type_=type_)
        for hour, minute, host, type_ in itertools.product(
            hours, (0, 59), (1, 2), ("", "cpu", "cpu0", "wall")
        )
        if (hour + host) % 2 or type_ != "cpu"
    ]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda key: store.put(key.text, b""), stored))
    profiles = TenantStore(store)

    for first, last in ((0, 30), (9, 10), (9, 13), (10, 11), (29, 40), (-5, 1), (-9, -5)):
        window = Window((START_S + first * HOUR_S) * NS_PER_S, (START_S + last * HOUR_S) * NS_PER_S)
        for type_ in ("cpu", "cpu0", "wall", "alloc"):
            found = [key for key, _ in profiles.list_window(window, type_)]
            assert [
                (key.start_s // HOUR_S, key.host_id, str(key.start_s), str(key.length_s))
                for key in found
            ] == expected(set(stored), window, type_)


def test_a_window_of_one_layout_lists_nothing_of_the_other() -> None:
    """Nor of other types: at most the key at which a listing ends."""
    store = MemoryStore()
    for type_, hour in itertools.product(("", "cpu", "cpu0", "wall"), range(100)):
        store.put(window_key(START_S + hour * HOUR_S, type_=type_).text, b"")
    profiles = TenantStore(store)
    start_ns = (START_S + 50 * HOUR_S) * NS_PER_S

    for type_, found in (("cpu", 1), ("wall", 1), ("alloc", 0)):
        store.listed = 0
        assert len(list(profiles.list_window(Window(start_ns, start_ns + 1), type_))) == found
        assert store.listed <= 6


def test_a_profile_stored_under_both_of_its_keys_is_listed_once() -> None:
    """As when a file is imported that an earlier version has imported already."""
    store = MemoryStore()
    for type_ in ("", "cpu"):
        store.put(window_key(START_S, type_=type_).text, b"")

    listed = list(TenantStore(store).list_window(Window(0, 2**62)))

    assert [key for key, _ in listed] == [window_key(START_S)]


def test_a_window_finds_what_began_in_the_hour_before(store: ObjectStore) -> None:
    """Each server has its own way with a listing that starts behind the name of a folder."""
    key = window_key(START_S + HOUR_S // 2, HOUR_S)
    store.put(key.text, b"")
    asked = Window((START_S + HOUR_S) * NS_PER_S, (START_S + HOUR_S + 60) * NS_PER_S)

    assert [found for found, _ in TenantStore(store).list_window(asked)] == [key]


def test_listing_a_window_reads_no_hours_outside_it(store: ObjectStore, monkeypatch) -> None:
    """A day of objects behind the window costs nothing: listing stops at its end."""
    for hour in range(24):
        store.put(window_key(START_S + hour * HOUR_S).text, b"")
    seen: list[str] = []
    listing = store.list

    def watched(prefix: str, start_after: str = "") -> Iterator[object]:
        for stored in listing(prefix, start_after):
            seen.append(stored.key)
            yield stored

    monkeypatch.setattr(store, "list", watched)
    start_ns = (START_S + 10 * HOUR_S) * NS_PER_S

    found = list(TenantStore(store).list_window(Window(start_ns, start_ns + 1)))

    assert [key.start_ns for key, _ in found] == [start_ns]
    assert len(seen) <= 3


def test_old_profiles_expire_oldest_first(store: ObjectStore) -> None:
    """By age at the end of the window, of all types and layouts; other objects are kept."""
    store.put("v1/default/l0/1999-01-01T00/notes.txt", b"mine")
    types = itertools.cycle(("", "cpu", "wall", "cpu0"))
    stored = [
        window_key(START_S + 60 * minute, type_=type_)
        for minute, type_ in zip(range(100), types, strict=False)
    ]
    for key in stored:
        store.put(key.text, b"x" * 10)

    removed = list(TenantStore(store).expire(START_S + 100 * 60, keep_s=30 * 60, keep_bytes=0))

    assert [each.key for each in removed] == [key.text for key in stored[:70]]
    assert len(keys(store)) == 31


def test_a_profile_that_may_not_be_deleted_keeps_no_other(tmp_path) -> None:
    """It is told at the end: retention must not stop at a file that somebody made immutable."""

    class Guarded(DirectoryStore):
        def delete(self, key: str) -> None:
            if key == kept:
                raise StoreRefused("cannot delete", "allow it")
            super().delete(key)

    store = Guarded(tmp_path)
    kept, *others = (window_key(START_S + 60 * minute).text for minute in range(3))
    for key in (kept, *others):
        store.put(key, b"x")
    removed = TenantStore(store).expire(START_S + 9999, keep_s=60, keep_bytes=0)

    assert [next(removed).key for _ in others] == others
    with pytest.raises(StoreRefused):
        next(removed)
    assert keys(store) == [kept]


def test_profiles_beyond_the_size_expire_oldest_first(store: ObjectStore) -> None:
    """Of all hosts, types and layouts, by the start of the window."""
    for minute in range(10):
        for host, type_ in ((2, "cpu"), (1, "" if minute % 2 else "wall")):
            store.put(window_key(START_S + 60 * minute, host=host, type_=type_).text, b"x" * 10)
    profiles = TenantStore(store)

    removed = list(profiles.expire(START_S, keep_s=0, keep_bytes=95))

    assert sum(stored.size_bytes for stored in removed) == 110
    left = [key.start_s for key, _ in profiles.list_all() if key]
    assert min(left) == START_S + 60 * 5
    assert list(profiles.expire(START_S, keep_s=0, keep_bytes=95)) == []


NOW_S = int(time.time()) + 3 * HOUR_S
"""Later than what a test writes counts as young."""
FIRST_S = NOW_S // HOUR_S * HOUR_S - 20 * HOUR_S


def compacted(name: str, type_: str) -> list[str]:
    """Return the keys of an hour or a day as a compactor makes them: the manifest, then files."""
    day, _, hour = name.partition("T")
    stem = f"v1/default/blocks/{type_}/{day}/{hour or 'dd'}"
    files = [f"{stem}-{table}-{'0' * 16}.parquet" for table in ("objects", "samples_1h")]
    return [f"v1/default/manifests/{type_}/{name}.json", *files]


PROFILES = [window_key(FIRST_S + HOUR_S * hour).text for hour in (0, 1, 2)]
IN_ORDER = [
    key
    for hour, type_ in enumerate(("cpu", "wall", "cpu"))
    for key in (PROFILES[hour], *compacted(hour_of(FIRST_S + HOUR_S * hour), type_))
]
OTHERS = [
    "v1/default/key",
    "v1/default/manifests/cpu/2026-02-31T09.json",
    "v1/default/manifests/cpu/later.json",
    "v1/default/blocks/cpu/2026-01-01/00-later",
    "v1/other/manifests/cpu/2026-01-01T00.json",
]


@pytest.mark.parametrize(
    ("limits", "deleted"),
    [
        ((0, 0, 0), []),
        ((0, 96, 0), []),
        ((0, 95, 0), IN_ORDER[:1]),
        ((0, 87, 0), IN_ORDER[:4]),
        ((0, 64, 0), IN_ORDER[:4]),
        ((0, 63, 0), IN_ORDER[:5]),
        ((NOW_S - FIRST_S - HOUR_S - 60, 0, 0), PROFILES[:2]),
        ((0, 0, NOW_S - FIRST_S - 2 * HOUR_S), [*IN_ORDER[1:4], *IN_ORDER[5:8]]),
        ((NOW_S - FIRST_S - HOUR_S - 60, 64, NOW_S - FIRST_S - 2 * HOUR_S), IN_ORDER[:8]),
    ],
)
def test_what_is_compacted_expires_as_profiles_do(tmp_path, limits, deleted) -> None:
    """In one size with them, hour by hour: profiles, then the manifest, then its files."""
    store = DirectoryStore(tmp_path)
    for key in (*IN_ORDER, *OTHERS):
        store.put(key, b"x" * 8)

    removed = TenantStore(store).expire(NOW_S, *limits)

    assert [each.key for each in removed] == deleted
    assert keys(store) == sorted({*IN_ORDER, *OTHERS} - {*deleted})


def test_the_rollup_of_a_day_expires_after_its_hours(tmp_path) -> None:
    """What a compactor has just written stays, as it may be about to name it."""
    store = DirectoryStore(tmp_path)
    day = hour_of(FIRST_S)[:10]
    every = [*compacted(f"{day}T23", "cpu"), *compacted(day, "cpu")]
    for key in every:
        store.put(key, b"x" * 8)
    tenant = TenantStore(store)

    assert list(tenant.expire(int(time.time()), 0, 1, 1)) == []
    assert [each.key for each in tenant.expire(NOW_S + 48 * HOUR_S, 0, 0, HOUR_S)] == every


starts_s = st.lists(
    st.tuples(
        st.one_of(st.integers(0, 3_000_000_000), st.integers(START_S, START_S + 9 * HOUR_S)),
        st.integers(1, 3),
        st.sampled_from(["", "cpu", "wall"]),
    ),
    max_size=8,
).map(set)


@given(starts_s, st.integers(0, 3_000_000_000))
def test_the_newest_object_is_the_last_to_start_before_a_time(
    starts: set[tuple[int, int, str]], before_s: int
) -> None:
    store = MemoryStore()
    every = [window_key(start_s, host=host, type_=type_) for start_s, host, type_ in starts]
    for key in every:
        store.put(key.text, b"")
    stored = [key for key in every if key.type == "cpu"]
    profiles = TenantStore(store)

    newest, earlier = profiles.newest_object(), profiles.newest_object(before_s * NS_PER_S)

    assert (newest and newest.start_s) == max((key.start_s for key in stored), default=None)
    assert (earlier and earlier.start_s) == max(
        (key.start_s for key in stored if key.start_s < before_s), default=None
    )


@given(starts_s, st.integers(0, 3_000_000_000))
def test_the_first_object_is_the_first_listed_at_or_after_a_time(
    starts: set[tuple[int, int, str]], after_s: int
) -> None:
    store = MemoryStore()
    for start_s, host, type_ in starts:
        store.put(window_key(start_s, host=host, type_=type_).text, b"")
    profiles = TenantStore(store)
    listed = [key for key, _ in profiles.list_window(Window(0, 2**62))]

    assert profiles.first_object() == next(iter(listed), None)
    assert profiles.first_object(after_s * NS_PER_S) == next(
        (key for key in listed if key.start_s >= after_s), None
    )


@pytest.mark.parametrize("age_s", [0, 100 * 24 * HOUR_S], ids=["live", "ended long ago"])
def test_the_first_and_the_newest_object_of_many_take_few_keys(age_s: int) -> None:
    """Two weeks of a host's minutes: 20,000 objects."""
    store = MemoryStore()
    last_s = (int(time.time()) - age_s) // 60 * 60
    stored = [window_key(last_s - 60 * minute) for minute in range(20_000)]
    for key in stored:
        store.put(key.text, b"")
    profiles = TenantStore(store)

    assert profiles.newest_object() == stored[0]
    assert profiles.first_object() == stored[-1]

    assert store.listed < 100


def test_the_newest_object_of_a_large_fleet_takes_one_request() -> None:
    """An hour of 400 hosts has 24,000 objects, of which S3 lists 1,000 at once."""
    store = MemoryStore()
    hosts, minutes_of_hour = range(400), range(60)
    for host, minute in itertools.product(hosts, minutes_of_hour):
        store.put(window_key(START_S + 60 * minute, host=host).text, b"")

    newest = TenantStore(store).newest_object()

    assert newest is not None
    assert newest.start_s == START_S + 59 * 60
    assert store.listed < 1_050


def test_the_first_and_the_newest_object_of_a_real_store(store: ObjectStore) -> None:
    profiles = TenantStore(store)
    assert profiles.first_object() is None
    assert profiles.newest_object() is None
    stored = [window_key(START_S + 7 * HOUR_S * number) for number in range(20)]
    for key in stored:
        store.put(key.text, b"")

    assert profiles.first_object() == stored[0]
    assert profiles.newest_object() == stored[-1]
    assert profiles.newest_object(stored[9].start_ns) == stored[8]
    assert profiles.first_object(stored[9].start_ns) == stored[9]


def test_every_tenant_of_a_store_is_found(store: ObjectStore) -> None:
    """Servers differ in how they sort a folder and names that begin with its name."""
    names = ["a", "a-b", "a.b", "a_b", "ab", "A", "default", "x" * 64]
    for name in names:
        store.put(f"v1/{name}/key", b"")
        store.put(f"v1/{name}/l0/cpu/~", b"")
    store.put("v1/.up/probe", b"")

    assert sorted(list_tenants(store)) == sorted(names)
