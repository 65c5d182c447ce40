"""The day, so far: rollups of a day that are renewed with each hour that is over."""

import pytest

from storage.blocks.day import renew_day
from storage.blocks.merges import roll_up
from storage.objects.open import open_store
from storage.objects.tenant_key import KEY_BYTES
from tests.support.compaction import (
    DAY_S,
    DAY_START_S,
    HOUR_S,
    Expected,
    compactor_of,
    day_manifest,
    files_of,
    hour_manifests,
    hour_name,
    profile,
    queried,
    sums_of,
    tombstone,
)

DAY = hour_name(DAY_START_S)[:10]
DAY_IS_OVER_S = DAY_START_S + DAY_S + 600
SAMPLES = ("samples_1h", "samples_1d", "times_10m")


@pytest.fixture
def expected(store):
    return Expected(store)


def put_hour(expected, folder, hour, *, count=2, first=0):
    """Put some objects of an hour, fold them as a part and roll the hour up."""
    start_s = DAY_START_S + hour * HOUR_S
    for number in range(first, first + count):
        expected.put(profile(start_s + 420 * (number % 8), 1 + number % 3, number))
    expected.put(tombstone(start_s + 60 * first, 2, 5 + first))
    compactor = compactor_of(expected.store, folder, start_s + HOUR_S + 600)
    compactor.fold(hour_name(start_s))
    roll_up(compactor, hour_name(start_s))
    return compactor


def check_day(expected, *, is_exact=True):
    """Check the sums of each table of samples of a day, and that nothing is missing in it."""
    day = day_manifest(expected.store, DAY)
    for table in SAMPLES:
        assert sums_of(expected.store, files_of([day], table)) == (day["samples"], day["value"])
    if is_exact:
        assert (day["samples"], day["value"]) == expected.total[1:]
    stacks = set(queried(expected.store, files_of([day], "stacks"), "SELECT stack_id FROM files"))
    samples = files_of([day], "samples_1d")
    wanted = set(queried(expected.store, samples, "SELECT DISTINCT stack_id FROM files"))
    assert stacks == wanted
    query = "SELECT DISTINCT unnest(frame_ids) FROM files"
    frames = set(queried(expected.store, files_of([day], "stacks"), query))
    query = "SELECT frame_id FROM files"
    assert frames == set(queried(expected.store, files_of([day], "frames"), query))
    return day


def rows_of(store, day):
    """Return all rows of a day by table, however many files they are in."""
    query = "SELECT CAST(COLUMNS(* EXCLUDE filename) AS VARCHAR) FROM files"
    tables = sorted({file["table"] for file in day["files"]})
    return {table: sorted(queried(store, files_of([day], table), query)) for table in tables}


def test_a_day_that_goes_on_is_renewed_with_each_hour_that_is_over(expected, store, tmp_path):
    """All hours that are over and rolled up are in it, and its files have all their samples."""
    for number, hour in enumerate((3, 4, 9)):
        compactor = put_hour(expected, tmp_path, hour, first=number)

        assert renew_day(compactor, DAY)
        assert not renew_day(compactor, DAY)

        day = check_day(expected)
        assert sorted(day["hours"])[-1] == f"{hour:02}"
        ids = {
            h[11:]: sorted(p["id"] for p in m["parts"]) for h, m in hour_manifests(store).items()
        }
        assert day["hours"] == ids
    starts = queried(
        store, files_of([day], "samples_1h"), "SELECT DISTINCT ts FROM files ORDER BY 1"
    )
    assert starts == [(DAY_START_S + hour * HOUR_S,) for hour in (3, 4, 9)]
    starts = queried(store, files_of([day], "samples_1d"), "SELECT DISTINCT ts FROM files")
    assert starts == [(DAY_START_S,)]


def test_an_hour_that_goes_on_or_has_no_rollup_yet_is_not_in_the_day(expected, store, tmp_path):
    """It comes with the next renewal, whatever hours have come meanwhile."""
    put_hour(expected, tmp_path, 3)
    goes_on_s = DAY_START_S + 5 * HOUR_S + 1800
    expected.put(profile(DAY_START_S + 4 * HOUR_S, 1, 8))
    expected.put(profile(DAY_START_S + 5 * HOUR_S, 1, 9))
    compactor = compactor_of(store, tmp_path, goes_on_s)
    for hour in (4, 5):
        compactor.fold(hour_name(DAY_START_S + hour * HOUR_S))
    assert not roll_up(compactor, hour_name(DAY_START_S + 5 * HOUR_S))

    assert renew_day(compactor, DAY)
    day = check_day(expected, is_exact=False)
    assert sorted(day["hours"]) == ["03"]
    compactor = compactor_of(store, tmp_path, DAY_IS_OVER_S)
    roll_up(compactor, hour_name(DAY_START_S + 5 * HOUR_S))
    assert renew_day(compactor, DAY)
    assert sorted(day_manifest(store, DAY)["hours"]) == ["03", "05"]
    roll_up(compactor, hour_name(DAY_START_S + 4 * HOUR_S))
    assert renew_day(compactor, DAY)

    assert sorted(check_day(expected)["hours"]) == ["03", "04", "05"]


@pytest.mark.parametrize("order", [(3, 4, 9), (9, 3, 4)])
def test_the_order_of_renewals_does_not_show(order, tmp_path):
    """A day made hour by hour has the rows of one that was made at once."""
    rows = []
    for name, renewals in (("one-by-one", order), ("at-once", order[-1:])):
        expected = Expected(open_store(f"file://{tmp_path}/{name}"))
        expected.store.put("v1/default/key", b"k" * KEY_BYTES)
        for hour in order:
            compactor = put_hour(expected, tmp_path / "work", hour, first=hour)
            if hour in renewals:
                assert renew_day(compactor, DAY)
        rows.append(rows_of(expected.store, check_day(expected)))

    assert rows[0] == rows[1]
