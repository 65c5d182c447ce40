"""Retention: what goes when, and that nothing goes which nothing coarser has."""

import os
import time

import orjson
import pytest

from storage.blocks.retention import (
    Keep,
    KeepError,
    collect_garbage,
    expire,
    lifecycle,
)
from storage.blocks.rounds import Rounds
from storage.objects.keys import NS_PER_S
from storage.objects.pins import Pins
from storage.objects.tenant import TenantStore
from tests.support.compaction import (
    DAY_S,
    HOUR_S,
    Expected,
    compactor_of,
    day_manifest,
    files_in,
    files_of,
    hour_manifests,
    hour_name,
    named_files,
    profile,
    read_store,
    sums_of,
)

KEPT = Keep.of({})


@pytest.fixture
def expected(store):
    return Expected(store)


def days_ago(days):
    """Return the start of the ninth hour of a day; ages are measured by the store's own clock."""
    return int(time.time() - days * DAY_S) // DAY_S * DAY_S + 9 * HOUR_S


def compact(store, folder, keep=KEPT, **options):
    """Do all that is due, now."""
    rounds = Rounds(
        TenantStore(store),
        folder,
        lambda type_: compactor_of(store, folder, time.time(), type_=type_, **options),
        keep,
    )
    return rounds.run_once()


def age(store, prefix, by_s):
    """Let files of a directory seem older."""
    for each in store.list(prefix):
        then_ns = each.modified_ns - round(by_s * NS_PER_S)
        os.utime(store.root / each.key, ns=(then_ns, then_ns))


def tables_of(store, hour):
    return {
        file["table"] for part in hour_manifests(store)[hour]["parts"] for file in part["files"]
    }


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        ({}, (2, 14, 30, 90, 400)),
        ({"detail": 20}, (2, 20, 30, 90, 400)),
        ({"detail": 100}, (2, 100, 100, 100, 400)),
        ({"level0": 500, "1d": 90}, (500, 14, 30, 90, 90)),
        ({"detail": 1, "10m": 1, "1h": 1, "1d": 1}, (2, 1, 1, 1, 1)),
    ],
)
def test_coarser_levels_are_kept_at_least_as_long(asked, kept):
    """In days; what was not asked for has its default."""
    keep = Keep.of({level: days * DAY_S for level, days in asked.items()})

    assert keep == Keep(*(days * DAY_S for days in kept))


@pytest.mark.parametrize("asked", [{"10m": 3}, {"detail": 40, "10m": 30}, {"2h": 5}])
def test_what_contradicts_itself_is_refused(asked):
    """A coarser level for a shorter time than a finer one, or a level that there is not."""
    with pytest.raises(KeepError):
        Keep.of({level: days * DAY_S for level, days in asked.items()})


def test_levels_expire_one_after_the_other(expected, store, tmp_path):
    """Details, then ten minutes, then the hour; the day has all samples to the end."""
    hours = {days: hour_name(days_ago(days)) for days in (1, 20, 40, 100, 500)}
    for days in hours:
        for minute in range(3):
            expected.put(profile(days_ago(days) + 60 * minute, 1, days))
    compact(store, tmp_path)
    days_left = {each.key[-15:-5] for each in store.list("v1/default/manifests/cpu/")} - {
        name[2:] for name in hours.values()
    }

    found = hour_manifests(store)
    assert set(found) == {hours[1], hours[20], hours[40]}
    assert {"samples_detail", "samples_10m"} <= tables_of(store, hours[1])
    assert tables_of(store, hours[20]) & {"samples_detail", "samples_10m"} == {"samples_10m"}
    assert tables_of(store, hours[40]) & {"samples_detail", "samples_10m"} == set()
    for table in ("samples_1h", "times_10m"):
        assert sums_of(store, files_of([found[hours[40]]["hourly"]], table)) == tuple(
            found[hours[40]]["parts"][0][name] for name in ("samples", "value")
        )
    assert files_of([day_manifest(store, hours[40][:10])], "samples_1h")
    gone = day_manifest(store, hours[100][:10])
    assert not files_of([gone], "samples_1h")
    assert files_of([gone], "stack_tree")
    for table in ("samples_1d", "times_10m"):
        assert sums_of(store, files_of([gone], table)) == (gone["samples"], gone["value"])
    assert gone["samples"] == profile(days_ago(100), 1, 100).total_samples + sum(
        profile(days_ago(100) + 60 * minute, 1, 100).total_samples for minute in (1, 2)
    )
    assert hours[500][:10] not in days_left
    again = compact(store, tmp_path)
    assert not any(again.counts[level] for level in ("detail", "10m", "1h", "1d")), again


def test_level0_goes_two_days_after_it_was_compacted_and_only_then(expected, store, tmp_path):
    """Not after it was uploaded: what no part contains stays."""
    start_s = days_ago(5)
    keys = [expected.put(profile(start_s + 60 * minute)).text for minute in range(3)]
    bad = keys[0][: -len("0123456789abcdef.pb.gz")] + "0" * 16 + ".pb.gz"
    store.put(bad, b"unreadable")
    compactor = compactor_of(store, tmp_path, time.time())
    hour = hour_name(start_s)
    compactor.fold(hour)
    late = expected.put(profile(start_s + 300)).text

    expire(compactor, KEPT)
    assert compactor.report["level0"] == 0
    expire(compactor, Keep.of({"level0": 0.0}))

    left = {each.key for each in store.list("v1/default/l0/")}
    assert left == {late, bad}
    assert compactor.report["level0"] == 3
    assert read_store(expected) == expected.total
    compactor.fold(hour)
    assert read_store(expected) == expected.total


def test_unreadable_objects_are_kept_as_long_as_details(expected, store, tmp_path):
    """A later version may read them."""
    start_s = days_ago(5)
    key = expected.put(profile(start_s))
    bad = key._replace(content16="0" * 16).text
    store.put(bad, b"unreadable")
    compactor = compactor_of(store, tmp_path, time.time())
    compactor.fold(hour_name(start_s))

    expire(compactor, Keep.of({"level0": 0.0}))
    assert [each.key for each in store.list("v1/default/l0/")] == [bad]
    expire(compactor, Keep.of({"level0": 0.0, "detail": 3.0 * DAY_S}))

    assert list(store.list("v1/default/l0/")) == []


def test_a_clock_that_is_ahead_deletes_nothing(expected, store, tmp_path):
    """Ages are measured by the store's clock."""
    start_s = days_ago(3)
    expected.put(profile(start_s))
    compact(store, tmp_path)
    before = files_in(store)
    ahead = compactor_of(store, tmp_path, time.time() + 1000 * DAY_S)

    expire(ahead, Keep.of({"level0": 30.0 * DAY_S}))
    collect_garbage(ahead)

    assert files_in(store) == before
    assert read_store(expected) == expected.total


def test_an_hour_stays_until_the_rollup_of_its_day_contains_it(expected, store, tmp_path):
    """However old it is: it would be the only one to have its samples."""
    start_s = days_ago(100)
    expected.put(profile(start_s))
    compactor = compactor_of(store, tmp_path, time.time())
    compactor.fold(hour_name(start_s))

    expire(compactor, KEPT)

    assert hour_name(start_s) in hour_manifests(store)
    assert "samples_10m" in tables_of(store, hour_name(start_s)), "there is no hourly rollup yet"


def test_an_hour_that_is_only_in_the_rollup_of_its_day_is_not_begun_again(
    expected, store, tmp_path
):
    """What comes months late would make the day's rollup invalid, and lose all others."""
    start_s = days_ago(100)
    expected.put(profile(start_s))
    compact(store, tmp_path)
    late = expected.put(profile(start_s + 60)).text
    day = day_manifest(store, hour_name(start_s)[:10])

    compact(store, tmp_path)

    assert hour_manifests(store) == {}
    assert day_manifest(store, hour_name(start_s)[:10]) == day
    assert store.list(late) is not None


def test_garbage_is_what_no_manifest_names_and_is_old_enough(expected, store, tmp_path):
    """Of a compactor that was killed, and of parts that were merged. Other objects stay."""
    start_s = days_ago(1)
    for minute in range(3):
        expected.put(profile(start_s + 60 * minute))
        compactor_of(store, tmp_path, time.time()).fold(hour_name(start_s))
    old = next(iter(files_in(store)))
    garbage = old[: -len("0123456789abcdef.parquet")] + "0" * 16 + ".parquet"
    store.put(garbage, b"of a killed one")
    foreign = "v1/default/blocks/cpu/note"
    store.put(foreign, b"not ours")
    compact(store, tmp_path)
    merged = files_in(store) - named_files(store)
    assert len(merged) > 10

    compactor = compactor_of(store, tmp_path, time.time())
    assert collect_garbage(compactor) == 0, "all of it is young"
    age(store, "v1/default/blocks/", 2 * HOUR_S)
    assert collect_garbage(compactor) == 0, "readers may have the manifest from before the merge"
    age(store, "v1/default/manifests/", 2 * HOUR_S)
    assert collect_garbage(compactor) == len(merged) - 1

    assert files_in(store) == named_files(store) | {foreign}
    assert read_store(expected) == expected.total


@pytest.mark.parametrize("manifest", [b'{"schema":9}', b"damaged"])
def test_files_of_an_hour_whose_manifest_cannot_be_read_are_not_garbage(
    expected, store, tmp_path, manifest
):
    """A later version may name them; other hours are collected all the same."""
    start_s = days_ago(1)
    for hour in (0, 1):
        expected.put(profile(start_s + hour * HOUR_S))
        compactor_of(store, tmp_path, time.time()).fold(hour_name(start_s + hour * HOUR_S))
    for hour in (0, 1):
        store.delete(f"v1/default/manifests/cpu/{hour_name(start_s + hour * HOUR_S)}.json")
    store.put(f"v1/default/manifests/cpu/{hour_name(start_s)}.json", manifest)
    files = files_in(store)
    age(store, "v1/", 2 * HOUR_S)

    deleted = collect_garbage(compactor_of(store, tmp_path, time.time()))

    assert 0 < deleted < len(files)
    assert {key[-60:] for key in files_in(store)}.isdisjoint(set())
    assert len(files_in(store)) == len(files) - deleted == len(files) // 2
    report = compact(store, tmp_path)
    assert list(report.problems) == [hour_name(start_s)]


def test_parts_whose_files_are_missing_are_taken_back_and_made_again(expected, store, tmp_path):
    """If level 0 still has their objects; else the loss is named."""
    start_s = days_ago(1)
    hour = hour_name(start_s)
    expected.put(profile(start_s))
    compact(store, tmp_path)
    (detail,) = files_of(hour_manifests(store)[hour]["parts"], "samples_detail")
    store.delete(detail["key"])

    report = compact(store, tmp_path)
    assert "missing" in report.problems[hour]
    compact(store, tmp_path)
    assert read_store(expected) == expected.total

    (detail,) = files_of(hour_manifests(store)[hour]["parts"], "samples_detail")
    store.delete(detail["key"])
    for each in list(store.list("v1/default/l0/")):
        store.delete(each.key)
    report = compact(store, tmp_path)
    assert "missing" in report.problems[hour]
    assert len(hour_manifests(store)[hour]["parts"]) == 1


def test_a_dry_run_changes_nothing_and_counts_what_would_be_done(expected, store, tmp_path):
    """Neither files nor manifests, and no probe of the clock."""
    for minute in range(3):
        expected.put(profile(days_ago(1) + 60 * minute))
        expected.put(profile(days_ago(20) + 60 * minute))
    before = sorted(each.key for each in store.list(""))

    report = compact(store, tmp_path, is_dry=True)

    assert report["objects"] == 6
    assert sorted(each.key for each in store.list("")) == before
    compact(store, tmp_path)
    age(store, "v1/", 2 * HOUR_S)
    before = sorted(each.key for each in store.list(""))
    report = compact(store, tmp_path, Keep.of({"level0": 0.0, "detail": DAY_S / 24}), is_dry=True)
    assert report["level0"] == 6
    assert report["detail"] == 1, "the other hour's details have expired already"
    assert report["garbage"] > 0
    assert sorted(each.key for each in store.list("")) == before


def test_what_is_pinned_stays_in_all_its_detail(expected, store, tmp_path):
    """Level 0, the hour and its day; other hours of that day expire, and once it is not pinned any
    more, so does what was."""
    start_s = days_ago(500)
    kept = [expected.put(profile(start_s + 60 * minute)).text for minute in range(3)]
    expected.put(profile(start_s + 5 * HOUR_S))
    pins = Pins(store, "default")
    pins.add(pins.checked("cpu", start_s * NS_PER_S + 1, start_s * NS_PER_S + 2, "incident"))
    compact(store, tmp_path)
    hour = hour_name(start_s)
    compact(store, tmp_path, Keep.of({"level0": 0.0}))
    report = compact(store, tmp_path, Keep.of({"level0": 0.0}), is_dry=True)

    assert set(hour_manifests(store)) == {hour}
    assert {"samples_detail", "samples_10m"} <= tables_of(store, hour)
    assert day_manifest(store, hour[:10])["hours"].keys() == {hour[-2:], "14"}
    assert [each.key for each in store.list("v1/default/l0/")] == kept[:1]
    assert (report["pinned"], report["1h"], report["1d"], report["level0"]) == (1, 0, 0, 0)
    pins.remove("incident")
    compact(store, tmp_path, Keep.of({"level0": 0.0}))
    assert list(store.list("v1/default/manifests/")) == []
    assert list(store.list("v1/default/l0/")) == []


def test_a_pin_of_a_type_or_a_tenant_holds_nothing_of_others(expected, store, tmp_path):
    start_s = days_ago(20)
    expected.put(profile(start_s))
    for tenant, type_ in (("default", "heap"), ("other", "cpu")):
        pins = Pins(store, tenant)
        pins.add(pins.checked(type_, start_s * NS_PER_S, (start_s + 60) * NS_PER_S, "x"))

    report = compact(store, tmp_path)

    assert (report["detail"], report["pinned"]) == (1, 0)


def test_lifecycle_rules_are_what_s3_takes(weed, tmp_path):
    """A real server accepts them, and returns them."""
    import boto3

    from tests.support.weed import BUCKET, using_keys

    rules = lifecycle("fleet/", Keep.of({"1d": 500.0 * DAY_S}))

    prefixes = {rule["Filter"]["Prefix"]: rule["Expiration"]["Days"] for rule in rules["Rules"]}
    assert prefixes == {
        "fleet/v1/default/l0/": 14,
        "fleet/v1/default/blocks/": 508,
        "fleet/v1/default/manifests/": 508,
    }
    with using_keys():
        client = boto3.session.Session().client(
            "s3", endpoint_url=weed.endpoint, region_name="us-east-1"
        )
        client.put_bucket_lifecycle_configuration(
            Bucket=BUCKET, LifecycleConfiguration=orjson.loads(orjson.dumps(rules))
        )
        found = client.get_bucket_lifecycle_configuration(Bucket=BUCKET)["Rules"]
        client.delete_bucket_lifecycle(Bucket=BUCKET)
    assert {rule["Filter"]["Prefix"] for rule in found} == set(prefixes)
