"""A tenant's profiles in a store: listing a window, the first and the newest, and expiry."""

import itertools
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.objects.directory import DirectoryStore
from storage.objects.keys import NS_PER_S, ObjectKey, ObjectStore
from storage.objects.tenant import TenantStore
from storage.profile import Window
from tests.support.stores import START_NS, MemoryStore

HOUR_S = 3600
START_S = START_NS // NS_PER_S


def keys(store: ObjectStore) -> list[str]:
    return [stored.key for stored in store.list("")]


def window_key(start_s: int, length_s: int = 60, host: int = 1, content: int = 0) -> ObjectKey:
    return ObjectKey("default", f"{host:016x}", start_s, length_s, f"{content:016x}")


windows = st.tuples(st.integers(0, 4 * HOUR_S), st.integers(1, HOUR_S))


@settings(max_examples=30)  # each makes a folder of its own
@given(st.lists(windows, max_size=12), windows)
def test_a_window_finds_exactly_the_objects_that_overlap_it(
    tmp_path_factory: pytest.TempPathFactory, kept: list[tuple[int, int]], asked: tuple[int, int]
) -> None:
    """Foreign objects among them are passed over."""
    store = DirectoryStore(tmp_path_factory.mktemp("store"))
    store.put("v1/default/l0/2026-05-28T20/notes.txt", b"")
    all_keys = {window_key(START_S + start, length) for start, length in kept}
    for key in all_keys:
        store.put(key.text, b"")
    window = Window((START_S + asked[0]) * NS_PER_S, (START_S + sum(asked)) * NS_PER_S)

    found = [key for key, _ in TenantStore(store).list_window(window)]

    assert sorted(found) == sorted(
        key for key in all_keys if key.start_ns < window.end_ns and key.end_ns > window.start_ns
    )


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
    """By age, the end of the window counting; other objects of any age stay."""
    store.put("v1/default/l0/1999-01-01T00/notes.txt", b"mine")
    for minute in range(100):
        store.put(window_key(START_S + 60 * minute).text, b"x" * 10)

    removed = list(TenantStore(store).expire(START_S + 100 * 60, keep_s=30 * 60, keep_bytes=0))

    assert [stored.key for stored in removed] == [
        window_key(START_S + 60 * minute).text for minute in range(70)
    ]
    assert len(keys(store)) == 31


def test_profiles_beyond_the_size_expire_oldest_first(store: ObjectStore) -> None:
    """Over all hosts, by the start of the window."""
    for minute in range(10):
        for host in (2, 1):
            store.put(window_key(START_S + 60 * minute, host=host).text, b"x" * 10)

    removed = list(TenantStore(store).expire(START_S, keep_s=0, keep_bytes=95))

    assert sum(stored.size_bytes for stored in removed) == 110
    left = [key.start_s for key, _ in TenantStore(store).list_window(Window(0, 2**62))]
    assert min(left) == START_S + 60 * 5
    assert list(TenantStore(store).expire(START_S, keep_s=0, keep_bytes=95)) == []


starts_s = st.lists(
    st.tuples(st.integers(0, 3_000_000_000), st.integers(0, 3 * HOUR_S), st.integers(1, 3)),
    max_size=8,
).map(lambda triples: {(base + offset, host) for base, offset, host in triples})


@given(starts_s, st.integers(0, 3_000_000_000))
def test_the_newest_object_is_the_last_to_start_before_a_time(
    starts: set[tuple[int, int]], before_s: int
) -> None:
    store = MemoryStore()
    stored = [window_key(start_s, host=host) for start_s, host in starts]
    for key in stored:
        store.put(key.text, b"")
    profiles = TenantStore(store)

    newest, earlier = profiles.newest_object(), profiles.newest_object(before_s * NS_PER_S)

    assert (newest and newest.start_s) == max((key.start_s for key in stored), default=None)
    assert (earlier and earlier.start_s) == max(
        (key.start_s for key in stored if key.start_s < before_s), default=None
    )


@given(starts_s, st.integers(0, 3_000_000_000))
def test_the_first_object_is_the_first_listed_at_or_after_a_time(
    starts: set[tuple[int, int]], after_s: int
) -> None:
    store = MemoryStore()
    for start_s, host in starts:
        store.put(window_key(start_s, host=host).text, b"")
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
