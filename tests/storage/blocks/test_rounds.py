"""Rounds: what is looked at how often, and that one bad hour stops no other."""

import os
import time

import pytest

from storage.blocks.retention import Keep
from storage.blocks.rounds import Rounds
from storage.objects.directory import DirectoryStore
from storage.objects.keys import StoreUnavailable
from storage.objects.tenant import TenantStore
from tests.support.compaction import (
    DAY_S,
    HOUR_S,
    Clock,
    Expected,
    compactor_of,
    hour_manifests,
    hour_name,
    profile,
    read_store,
)

NOW_S = int(time.time()) // DAY_S * DAY_S + 12 * HOUR_S + 1800
"""Today at half past twelve: ages are measured by the store's clock as well."""


class Listing(DirectoryStore):
    """Notes the listings of level 0, and may be away."""

    def __init__(self, root):
        super().__init__(root)
        self.listed = []
        self.is_away = False

    def list(self, prefix, start_after=""):
        if self.is_away:
            raise StoreUnavailable("it is away")
        if "/l0/" in prefix:
            self.listed.append(prefix)
        return super().list(prefix, start_after)


@pytest.fixture
def store(tmp_path):
    return Listing(tmp_path / "store")


@pytest.fixture
def expected(store):
    return Expected(store)


def rounds_of(store, folder, clock, patience_s=600.0):
    def make(type_):
        compactor = compactor_of(store, folder, 0, type_=type_, patience_s=patience_s)
        compactor.now_ns = clock
        return compactor

    return Rounds(TenantStore(store), folder, make, Keep.of({}))


def test_all_hours_are_compacted_newest_first_and_days_after_them(expected, store, tmp_path):
    """Of the past, of today and of the future."""
    offsets = (-2 * DAY_S, -DAY_S, -DAY_S + HOUR_S, -2 * HOUR_S, 0, 5 * HOUR_S)
    for offset in offsets:
        expected.put(profile(NOW_S - 1800 + offset))

    report = rounds_of(store, tmp_path, Clock(NOW_S), 0.0).run_once()

    assert report["objects"] == len(offsets)
    assert report["hourly"] == 4
    assert report["daily"] == 3
    assert set(hour_manifests(store)) == {hour_name(NOW_S - 1800 + each) for each in offsets}
    assert read_store(expected) == expected.total
    again = rounds_of(store, tmp_path, Clock(NOW_S), 0.0).run_once()
    assert not +again.counts


def test_types_are_compacted_apart(expected, store, tmp_path):
    """Also one whose level-0 objects are gone by now."""
    import dataclasses

    made = dataclasses.replace(profile(NOW_S - 3 * HOUR_S), type="heap", unit="bytes")
    key = expected.put(made)
    expected.put(profile(NOW_S - 3 * HOUR_S))
    rounds_of(store, tmp_path, Clock(NOW_S), 0.0).run_once()
    store.delete(key.text)
    rounds_of(store, tmp_path, Clock(NOW_S), 0.0).run_once()

    (heap,) = hour_manifests(store, "heap").values()
    (cpu,) = hour_manifests(store).values()
    assert (heap["unit"], cpu["unit"]) == ("bytes", "nanoseconds")
    assert [len(each["parts"]) for each in (heap, cpu)] == [1, 1]
    assert [each["hourly"] is not None for each in (heap, cpu)] == [True, True]


def test_older_hours_are_listed_less_and_less_often(expected, store, tmp_path):
    """A late object is found after an eighth of the hour's age, and one of the current hour at
    once."""
    late_s = NOW_S - 1800 - 16 * HOUR_S
    expected.put(profile(late_s))
    clock = Clock(NOW_S)
    rounds = rounds_of(store, tmp_path, clock, 1.0)
    rounds.run_once()
    expected.put(profile(late_s + 60))
    clock.now_s += 60
    expected.put(profile(NOW_S - 60))
    clock_ns = clock()
    for each in store.list("v1/default/l0/"):  # uploaded a while ago, by this clock
        os.utime(store.root / each.key, ns=(clock_ns - 10**11, clock_ns - 10**11))
    store.listed.clear()
    assert rounds.run_once()["objects"] == 1, "the one of this hour"
    assert not any(hour_name(late_s) in prefix for prefix in store.listed)

    clock.now_s += 3 * HOUR_S
    assert rounds.run_once()["objects"] == 1, "the late one"

    assert read_store(expected) == expected.total


def test_an_expired_hour_is_not_begun_again_in_any_round(expected, store, tmp_path):
    """A round that looks at the last week alone does not know the older days."""
    old_s = NOW_S - 1800 - 100 * DAY_S
    expected.put(profile(old_s))
    rounds = rounds_of(store, tmp_path, Clock(NOW_S))
    rounds.run_once()
    assert hour_manifests(store) == {}
    late = expected.put(profile(old_s + 60))
    rounds = rounds_of(store, tmp_path / "another", Clock(NOW_S))

    counts = [rounds.run_once().counts for _ in range(3)]

    assert [each["objects"] for each in counts] == [0, 0, 0]
    assert hour_manifests(store) == {}
    assert [each["level0"] for each in counts] == [2, 0, 0], "both are older than details"
    assert late.text not in {each.key for each in store.list("v1/")}


def test_what_has_expired_is_deleted_once_an_hour_whatever_process_does_it(
    expected, store, tmp_path
):
    """`everflame up` starts a process for each round."""
    expected.put(profile(NOW_S - 1800 - 20 * DAY_S))
    first = rounds_of(store, tmp_path, Clock(NOW_S)).run_once()
    expected.put(profile(NOW_S - 1800 - 21 * DAY_S))
    second = rounds_of(store, tmp_path, Clock(NOW_S)).run_once()
    then_s = time.time() - 2 * HOUR_S
    (cleaned,) = tmp_path.glob("cleaned-*")
    os.utime(cleaned, (then_s, then_s))
    third = rounds_of(store, tmp_path, Clock(NOW_S)).run_once()

    assert [each["detail"] for each in (first, second, third)] == [1, 0, 1]
    assert second["objects"] == 1
    assert second["daily"] == 1


def test_a_bad_hour_is_named_and_the_others_go_on(expected, store, tmp_path):
    """Its manifest is a later version's, or a file of it is damaged."""
    first_s, second_s, third_s = (NOW_S - 1800 - each * HOUR_S for each in (2, 3, 4))
    for each in (first_s, second_s, third_s):
        expected.put(profile(each))
    rounds_of(store, tmp_path, Clock(NOW_S), 0.0).run_once()
    key = f"v1/default/manifests/cpu/{hour_name(first_s)}.json"
    store.delete(key)
    store.put(key, b'{"schema":3}')
    files = hour_manifests(store)[hour_name(second_s)]["parts"][0]["files"]
    (damaged,) = [each["key"] for each in files if each["table"] == "objects"]
    content = store.get(damaged)
    store.delete(damaged)
    store.put(damaged, content[:-1])
    for each in (first_s, second_s, third_s):
        expected.put(profile(each + 60))

    report = rounds_of(store, tmp_path, Clock(NOW_S), 0.0).run_once()

    assert report["objects"] == 1
    assert report.problems.keys() == {hour_name(first_s), hour_name(second_s)}
    assert damaged in report.problems[hour_name(second_s)]


def test_a_store_that_is_away_ends_the_round_and_not_the_next(expected, store, tmp_path):
    """Nothing is concluded from it."""
    expected.put(profile(NOW_S - 3 * HOUR_S))
    rounds = rounds_of(store, tmp_path, Clock(NOW_S), 0.0)
    store.is_away = True
    with pytest.raises(StoreUnavailable):
        rounds.run_once()
    store.is_away = False

    assert rounds.run_once()["objects"] == 1
    assert read_store(expected) == expected.total
