"""Merges and rollups: fewer parts, longer buckets, the same sums."""

import pytest

from storage.blocks import merges
from storage.blocks.manifest import File, Part
from storage.blocks.merges import choose_parts, merge, roll_up
from tests.support.compaction import (
    DAY_START_S,
    HOUR_S,
    Expected,
    compactor_of,
    files_of,
    hour_manifests,
    hour_name,
    profile,
    queried,
    read_store,
    sums_of,
)

START_S = DAY_START_S + 9 * HOUR_S
HOUR = hour_name(START_S)
GOES_ON_S = START_S + 1800
IS_OVER_S = START_S + HOUR_S + 600


@pytest.fixture
def expected(store):
    return Expected(store)


def fold_parts(expected, folder, count, start_s=START_S):
    """Make so many parts of an hour."""
    for number in range(count):
        expected.put(profile(start_s + 60 * (number % 60), 1 + number % 3, number))
        compactor_of(expected.store, folder, GOES_ON_S).fold(hour_name(start_s))


def parts_of(store, hour=HOUR):
    return hour_manifests(store)[hour]["parts"]


def sized(size_bytes, id_="", tables=("samples_detail",)):
    files = tuple(File(table, "k", size_bytes // len(tables), 1) for table in tables)
    return Part(id_ or str(size_bytes), 1, 1, 1, 0, 1, files)


@pytest.mark.parametrize(
    ("sizes", "is_over", "chosen"),
    [
        ([5], True, []),
        ([5] * 8, False, []),
        ([5] * 9, False, [5] * 9),
        ([5] * 2, True, [5] * 2),
        ([40] + [5] * 8, False, [5] * 8 + [40]),
        ([1000] + [5] * 8, False, [5] * 8),
        ([1000, 5], True, []),
        ([15, 5], True, [5, 15]),
        ([4**i for i in range(9)], False, [4**i for i in range(9)]),
        ([40 << 20, 30 << 20], True, []),
        ([10 << 20] * 9, True, [10 << 20] * 5),
        ([50 << 20] * 9, False, []),
    ],
)
def test_the_smallest_parts_are_merged_and_none_much_larger(sizes, is_over, chosen):
    """Not before there are more than eight or the hour is over; nothing beyond 56 MB."""
    parts = [sized(size, str(i)) for i, size in enumerate(sizes)]

    assert [part.size_bytes for part in choose_parts(parts, is_over=is_over)] == chosen


def test_whole_parts_are_not_merged_with_those_whose_tables_have_expired():
    """The merged one would have half of the details."""
    whole = [sized(10, "a", ("samples_detail", "stacks")), sized(10, "b", ("stacks",))]

    assert choose_parts(whole, is_over=True) == []


def test_merged_parts_have_the_sums_and_objects_of_all(either_store, tmp_path):
    """Ten parts of an hour that goes on become one, and nothing is read twice."""
    expected = Expected(either_store)
    fold_parts(expected, tmp_path, 10)
    compactor = compactor_of(either_store, tmp_path, GOES_ON_S)

    assert merge(compactor, HOUR) == 9

    (part,) = parts_of(either_store)
    assert part["objects"] == 10
    assert read_store(expected) == expected.total
    assert compactor.fold(HOUR) == 0
    stacks = queried(either_store, files_of([part], "stacks"), "SELECT stack_id FROM files")
    assert len(stacks) == len(set(stacks))


def test_a_merge_is_dropped_if_a_part_of_it_is_no_longer_there(expected, store, tmp_path):
    """Another compactor has merged it meanwhile, or it was taken back."""
    fold_parts(expected, tmp_path, 3)
    compactor = compactor_of(store, tmp_path, IS_OVER_S)
    work = compactor.work

    def work_and_lose(*things, **more):
        done = work(*things, **more)
        compactor.work = work
        merge(compactor_of(store, tmp_path / "other", IS_OVER_S), HOUR)
        expected.put(profile(START_S + 1800, 7))
        compactor.fold(HOUR)
        merge(compactor_of(store, tmp_path / "third", IS_OVER_S), HOUR)
        return done

    compactor.work = work_and_lose
    merge(compactor, HOUR)

    assert compactor.report["conflicts"] == 1
    assert sum(part["objects"] for part in parts_of(store)) == 4
    assert read_store(expected) == expected.total


def test_the_hourly_rollup_is_made_when_the_hour_is_over(expected, store, tmp_path):
    """Buckets of an hour, no hosts, three labels; made again when a part has come."""
    fold_parts(expected, tmp_path, 3)
    assert not roll_up(compactor_of(store, tmp_path, GOES_ON_S), HOUR)
    compactor = compactor_of(store, tmp_path, IS_OVER_S)

    assert roll_up(compactor, HOUR)
    assert not roll_up(compactor, HOUR)

    hourly = hour_manifests(store)[HOUR]["hourly"]
    samples = files_of([hourly], "samples_1h")
    assert queried(store, samples, "SELECT DISTINCT ts FROM files") == [(START_S,)]
    assert sums_of(store, samples) == expected.total[1:]
    fold_parts(expected, tmp_path, 1, START_S + 600)
    assert not compactor.manifests.hour(HOUR).has_hourly
    assert roll_up(compactor, HOUR)
    samples = files_of([hour_manifests(store)[HOUR]["hourly"]], "samples_1h")
    assert sums_of(store, samples) == expected.total[1:]


def test_a_rollup_of_other_parts_is_dropped(expected, store, tmp_path):
    """A part has come while the rollup was made."""
    fold_parts(expected, tmp_path, 2)
    compactor = compactor_of(store, tmp_path, IS_OVER_S)
    work = compactor.work

    def work_and_fold(*things, **more):
        done = work(*things, **more)
        compactor.work = work
        fold_parts(expected, tmp_path, 1, START_S + 900)
        return done

    compactor.work = work_and_fold
    assert not roll_up(compactor, HOUR)

    assert hour_manifests(store)[HOUR]["hourly"] is None
    assert compactor.report["conflicts"] == 1


def test_a_merge_that_would_lose_samples_is_refused(expected, store, tmp_path, monkeypatch):
    """Whatever the reason, the parts stay as they are."""
    fold_parts(expected, tmp_path, 2)
    compactor = compactor_of(store, tmp_path, IS_OVER_S)
    before = parts_of(store)

    def claim(manifest):
        from msgspec.structs import replace

        return replace(
            manifest, parts=tuple(replace(p, samples=p.samples + 1) for p in manifest.parts)
        )

    compactor.manifests.change_hour(HOUR, claim)
    with pytest.raises(merges.ProfileError, match="would have"):
        merge(compactor, HOUR)

    assert [each["id"] for each in parts_of(store)] == [each["id"] for each in before]
