"""The day, so far: rollups of a day that are renewed with each hour that is over."""

import pytest
from msgspec.structs import replace

from storage.blocks import day as day_module
from storage.blocks import tables
from storage.blocks.day import renew_day
from storage.blocks.merges import roll_up
from storage.blocks.schema import DICTIONARY, NAMES
from storage.objects.open import open_store
from storage.objects.tenant import TenantStore
from storage.objects.tenant_key import KEY_BYTES
from tests.support.compaction import (
    DAY_S,
    DAY_START_S,
    HOUR_S,
    NS,
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


def renew(compactor):
    """Renew the day; return the tables that were read of each hour, and of the day (`dd`)."""
    read = {}
    work = compactor.work

    def work_watched(name, act, source, *things, **more):
        for file in (*source.previous, *source.rollups, *source.dictionary):
            read.setdefault(file.key.rpartition("/")[2][:2], set()).add(file.table)
        return work(name, act, source, *things, **more)

    compactor.work = work_watched
    assert renew_day(compactor, DAY)
    return read


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
    """Return all rows of a day by table, however many files they are in.

    The number of a stack in its file is left out: no detail refers to it.
    """
    shown = "lambda name: name NOT IN ('filename', 'part', 'stack')"
    query = f"SELECT CAST(COLUMNS({shown}) AS VARCHAR) FROM files"
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


def test_a_renewal_reads_the_day_and_the_new_hour_and_nothing_else(expected, store, tmp_path):
    """So its cost does not grow with the detail of the hours before."""
    for number, hour in enumerate((3, 4, 9)):
        read = renew(put_hour(expected, tmp_path, hour, first=number))

        assert sorted(read) == [f"{hour:02}", *(["dd"] if number else [])]
        assert "samples_detail" not in read[f"{hour:02}"]


def test_a_day_that_is_over_folds_the_samples_of_all_hours_at_once(
    expected, store, tmp_path, monkeypatch
):
    """So how often it was renewed does not show; all else of its hours is not read again."""
    monkeypatch.setattr(day_module, "FOLDED_ABOVE", 0)
    for hour in (3, 4):
        read = renew(put_hour(expected, tmp_path, hour, first=hour))
    assert sorted(read) == ["04", "dd"]

    read = renew(put_hour(expected, tmp_path, 23, first=23))

    assert sorted(read) == ["03", "04", "23", "dd"]
    assert read["03"] == {"samples_1h", *DICTIONARY} - {NAMES}
    assert not read["dd"] & {"samples_1h", "samples_1d", "stacks", "stack_tree"}
    assert {"times_10m", "functions_1h"} <= read["dd"]
    check_day(expected)


def test_an_hour_that_has_changed_is_made_anew_in_its_day(expected, store, tmp_path):
    """Until then the day is valid but for this hour; no sample of it counts twice."""
    for hour in (3, 4, 9):
        renew_day(put_hour(expected, tmp_path, hour, first=hour), DAY)
    changed = hour_name(DAY_START_S + 4 * HOUR_S)
    expected.put(profile(DAY_START_S + 4 * HOUR_S + 1200, 2, 77))
    compactor = compactor_of(store, tmp_path, DAY_IS_OVER_S)
    compactor.fold(changed)
    manifests = compactor.manifests.list(DAY, DAY)
    held = [name for name, hour in manifests.hours.items() if manifests.days[DAY].holds(hour)]
    assert sorted(held) == [hour_name(DAY_START_S + hour * HOUR_S) for hour in (3, 9)]
    assert not renew_day(compactor, DAY), "it has no rollup yet"
    check_day(expected, is_exact=False)
    roll_up(compactor, changed)

    read = renew(compactor)

    day = check_day(expected)
    manifests = compactor.manifests.list(DAY, DAY)
    assert all(manifests.days[DAY].holds(hour) for hour in manifests.hours.values())
    assert len(manifests.hours) == len(day["hours"]) == 3
    assert {hour for hour, tables in read.items() if "frames" in tables} == {"04", "dd"}


def test_a_changed_hour_waits_for_the_next_one_if_compactors_are_patient(expected, store, tmp_path):
    """Each late object may have a whole day made again."""
    renew_day(put_hour(expected, tmp_path, 3), DAY)
    expected.put(profile(DAY_START_S + 3 * HOUR_S + 1200, 2, 77))
    changed = hour_name(DAY_START_S + 3 * HOUR_S)
    patient = compactor_of(store, tmp_path, DAY_START_S + 5 * HOUR_S, patience_s=60.0)
    patient.fold(changed)
    roll_up(patient, changed)
    assert not renew_day(patient, DAY)
    put_hour(expected, tmp_path, 4)

    assert renew_day(patient, DAY)

    check_day(expected)


def test_a_renewal_is_dropped_if_another_compactor_was_faster(expected, store, tmp_path):
    """Whatever that one has made of the day; the next round finds what is left."""
    renew_day(put_hour(expected, tmp_path, 3), DAY)
    compactor = put_hour(expected, tmp_path, 4)
    work = compactor.work

    def work_late(*things, **more):
        done = work(*things, **more)
        compactor.work = work
        other = put_hour(expected, tmp_path / "other", 9)
        assert renew_day(other, DAY)
        return done

    compactor.work = work_late
    assert not renew_day(compactor, DAY)

    assert compactor.report["conflicts"] == 1
    assert sorted(check_day(expected)["hours"]) == ["03", "04", "09"]
    assert not renew_day(compactor, DAY)


def test_a_renewal_that_took_too_long_is_dropped(expected, store, tmp_path):
    """Its files may be garbage by now."""
    put_hour(expected, tmp_path, 3)
    hasty = compactor_of(store, tmp_path, DAY_IS_OVER_S, grace_s=0.001)

    assert not renew_day(hasty, DAY)

    assert hasty.report["conflicts"] == 1
    assert hasty.manifests.day(DAY) is None


@pytest.mark.parametrize("table", ["samples_1h", "samples_1d", "stack_tree", "times_10m"])
def test_a_day_whose_files_are_damaged_is_made_of_its_hours(table, expected, store, tmp_path):
    """With the next hour, as long as all hours are there."""
    renew_day(put_hour(expected, tmp_path, 3), DAY)
    (file,) = files_of([day_manifest(store, DAY)], table)
    compactor = put_hour(expected, tmp_path, 4)
    content = store.get(file["key"])
    store.delete(file["key"])
    store.put(file["key"], content[:-9])

    assert renew_day(compactor, DAY)

    check_day(expected)


def test_expired_hours_stay_in_their_day(expected, store, tmp_path):
    """More hours are added, and none is taken back: what is there is all there is of them."""
    for hour in (3, 4):
        renew_day(put_hour(expected, tmp_path, hour, first=hour), DAY)
    gone = hour_name(DAY_START_S + 3 * HOUR_S)
    store.delete(f"v1/default/manifests/cpu/{gone}.json")
    for key, stored in TenantStore(store).list_hour((DAY_START_S + 3 * HOUR_S) * NS):
        assert key.content16 in expected.sums
        store.delete(stored.key)

    assert renew_day(put_hour(expected, tmp_path, 9, first=9), DAY)
    assert sorted(check_day(expected)["hours"]) == ["03", "04", "09"]
    expected.put(profile(DAY_START_S + 4 * HOUR_S + 1200, 2, 77))
    compactor = compactor_of(store, tmp_path, DAY_IS_OVER_S)
    compactor.fold(hour_name(DAY_START_S + 4 * HOUR_S))
    roll_up(compactor, hour_name(DAY_START_S + 4 * HOUR_S))

    assert not renew_day(compactor, DAY), "the other hour could not be made again"
    check_day(expected, is_exact=False)


def test_a_day_of_an_older_version_is_made_again(expected, store, tmp_path):
    """It has no samples by hour and no heads."""
    compactor = put_hour(expected, tmp_path, 3)
    renew_day(compactor, DAY)
    older = ("samples_1d", *DICTIONARY)
    compactor.manifests.change_day(DAY, lambda day: replace(day, files=day.files_of(*older)))

    assert renew_day(compactor, DAY)

    check_day(expected)


def test_a_day_without_a_tree_gets_one_with_its_next_hour(expected, store, tmp_path):
    """An older version made it; then its stacks are read as lists."""
    compactor = put_hour(expected, tmp_path, 3)
    renew_day(compactor, DAY)
    compactor.manifests.change_day(
        DAY,
        lambda day: replace(day, files=tuple(f for f in day.files if f.table != "stack_tree")),
    )
    assert not renew_day(compactor, DAY)

    read = renew(put_hour(expected, tmp_path, 4, first=4))

    assert "stacks" in read["dd"]
    assert files_of([check_day(expected)], "stack_tree")
    assert "stacks" not in renew(put_hour(expected, tmp_path, 9, first=9))["dd"]


def test_large_tables_are_several_files(expected, store, tmp_path, monkeypatch):
    """No object may have more than 64 MB; what is in them is the same."""
    for hour in (3, 4):
        put_hour(expected, tmp_path, hour, first=hour)
    compactor = compactor_of(store, tmp_path, DAY_IS_OVER_S)
    renew_day(compactor, DAY)
    whole = rows_of(store, check_day(expected))
    monkeypatch.setattr(tables, "PIECE_BYTES", 400)
    compactor.manifests.delete(DAY)

    assert renew_day(compactor, DAY)

    day = check_day(expected)
    for table in ("samples_1h", "stacks", "frames", "objects_10m"):
        assert len(files_of([day], table)) > 1, table
    assert rows_of(store, day) == whole
    put_hour(expected, tmp_path, 9)
    assert renew_day(compactor, DAY)
    check_day(expected)
