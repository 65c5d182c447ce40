"""Folding: every sample is in one part, whatever comes late, twice, damaged or meanwhile."""

import gzip
import multiprocessing
import threading
from concurrent.futures import ProcessPoolExecutor

import orjson
import pytest

from storage.blocks import work
from storage.blocks.compactor import Compactor
from storage.formats import pprof
from storage.formats.pprof_message import ProfileMessage, decompress
from storage.objects.keys import object_key
from storage.objects.tenant import TenantStore
from storage.query.workers import Workers
from tests.support.compaction import (
    DAY_S,
    DAY_START_S,
    HOUR_S,
    Expected,
    Inline,
    Sums,
    compactor_of,
    files_in,
    files_of,
    hour_manifests,
    hour_name,
    profile,
    queried,
    read_store,
    tombstone,
)
from tests.support.deadly import DeadlyWorkers

START_S = DAY_START_S + 9 * HOUR_S
HOUR = hour_name(START_S)
GOES_ON_S = START_S + 1800
IS_OVER_S = START_S + HOUR_S + 600


@pytest.fixture
def expected(store):
    return Expected(store)


def manifest_of(store, hour=HOUR):
    return hour_manifests(store)[hour]


def test_objects_are_folded_into_one_part_with_all_their_samples(either_store, tmp_path):
    """Three hosts, five minutes: one part, whose tables say what the objects said."""
    expected = Expected(either_store)
    for minute in range(5):
        for host in range(3):
            expected.put(profile(START_S + 60 * minute, host))
    compactor = compactor_of(either_store, tmp_path / "work", GOES_ON_S)

    folded = compactor.fold(HOUR)

    (part,) = manifest_of(either_store)["parts"]
    assert folded == part["objects"] == 15
    assert (part["start_s"], part["end_s"]) == (START_S, START_S + 300)
    assert manifest_of(either_store)["unit"] == "nanoseconds"
    assert read_store(expected) == expected.total
    assert compactor.fold(HOUR) == 0


def test_what_comes_later_is_folded_into_a_part_of_its_own(expected, store, tmp_path):
    """Also what comes a week late: parts are added, and none is made anew."""
    expected.put(profile(START_S))
    compactor_of(store, tmp_path, GOES_ON_S).fold(HOUR)
    (before,) = manifest_of(store)["parts"]
    expected.put(profile(START_S + 60))

    compactor_of(store, tmp_path, IS_OVER_S + 6 * DAY_S).fold(HOUR)

    parts = manifest_of(store)["parts"]
    assert len(parts) == 2
    assert before in parts
    assert read_store(expected) == expected.total


def test_content_that_is_stored_under_two_keys_counts_once(expected, store, tmp_path):
    """With and without the type in the key, and under another host's id."""
    key = expected.put(profile(START_S))
    content = store.get(key.text)
    store.put(key._replace(has_type=False).text, content)
    store.put(key._replace(host_id="f" * 16).text, content)

    compactor_of(store, tmp_path, GOES_ON_S).fold(HOUR)

    assert read_store(expected) == expected.total == Sums(1, *expected.sums[key.content16])


def test_a_damaged_object_of_the_same_name_does_not_hide_the_whole_one(expected, store, tmp_path):
    """Somebody has stored something else with its content16, under other hosts' ids."""
    key = expected.put(profile(START_S))
    for host_id in ("0" * 16, "f" * 16):
        store.put(key._replace(host_id=host_id).text, b"nonsense")
    compactor = compactor_of(store, tmp_path, GOES_ON_S)

    assert compactor.fold(HOUR) == 1

    assert compactor.report.unreadable.keys() <= {
        key._replace(host_id="0" * 16).text, key._replace(host_id="f" * 16).text,
    }  # fmt: skip
    assert read_store(expected) == expected.total


@pytest.mark.parametrize("offset_s", [-90 * DAY_S, 3 * HOUR_S, 40 * DAY_S, 6_000 * DAY_S])
def test_hosts_whose_clock_is_wrong_are_folded_as_all_others(expected, store, tmp_path, offset_s):
    """Objects of the past and of the future."""
    start_s = START_S + offset_s
    expected.put(profile(start_s))

    compactor_of(store, tmp_path, GOES_ON_S).fold(hour_name(start_s))

    assert len(manifest_of(store, hour_name(start_s))["parts"]) == 1
    assert read_store(expected) == expected.total


def test_windows_without_stacks_keep_their_losses(expected, store, tmp_path):
    """Of a spool that was full only the accounting is left."""
    expected.put(tombstone(START_S, lost=77))
    expected.put(tombstone(START_S + 60, lost=5))
    expected.put(profile(START_S + 120))

    compactor_of(store, tmp_path, GOES_ON_S).fold(HOUR)

    lost = queried(
        store,
        files_of(manifest_of(store)["parts"], "objects"),
        "SELECT ticks, coalesce(lost['spool_full'], 0) FROM files ORDER BY start_s",
    )
    assert lost[:2] == [(77, 77), (5, 5)]
    assert read_store(expected) == expected.total


def put_content(store, content, minute, **changes):
    key = object_key(profile(START_S + 60 * minute), content, "default")._replace(**changes)
    store.put(key.text, content)
    return key.text


def future_schema(minute):
    message = ProfileMessage()
    message.ParseFromString(decompress(pprof.encode(profile(START_S + 60 * minute))))
    number = message.comment[0]
    record = orjson.loads(message.string_table[number].removeprefix(b"everflame "))
    message.string_table[number] = b"everflame " + orjson.dumps(record | {"schema": 99})
    return gzip.compress(message.SerializeToString())


def test_objects_that_cannot_be_read_are_named_and_stop_no_others(expected, store, tmp_path):
    """Damaged, cut short, of a later version, of another type, too large, of another window."""
    whole = pprof.encode(profile(START_S + 60))
    reasons = {
        put_content(store, b"nonsense", 2): "",
        put_content(store, whole[: len(whole) // 2], 3): "",
        put_content(store, future_schema(4), 4): "schema",
        put_content(store, whole, 5): "window",
        put_content(store, whole, 1, type="heap"): "type",
        put_content(store, whole[:-1], 6, content16="0" * 16): "damaged",
        put_content(store, bytes((64 << 20) + 1), 7): "bytes",
    }
    expected.put(profile(START_S, 2))
    compactor = compactor_of(store, tmp_path, GOES_ON_S)

    assert compactor.fold(HOUR) == 1
    heap = compactor_of(store, tmp_path, GOES_ON_S, type_="heap")
    assert heap.fold(HOUR) == 0

    named = {
        each["key"]: each["reason"]
        for type_ in ("cpu", "heap")
        for each in hour_manifests(store, type_)[HOUR]["unreadable"]
    }
    assert named.keys() == reasons.keys()
    assert all(reason in named[key] for key, reason in reasons.items())
    assert compactor.report.unreadable.keys() < reasons.keys()
    assert read_store(expected) == expected.total


def test_an_unreadable_object_is_tried_again_after_a_day_or_by_another_version(
    expected, store, tmp_path, monkeypatch
):
    """Not at each listing: each try reads it."""
    put_content(store, b"nonsense", 2)

    def tries(now_s):
        compactor = compactor_of(store, tmp_path, now_s)
        compactor.fold(HOUR)
        return len(compactor.report.unreadable)

    import time

    now_s = time.time()  # of which the tries are
    assert tries(now_s) == 1
    assert tries(now_s + 3600) == 0
    assert tries(now_s + DAY_S + 3600) == 1
    monkeypatch.setattr("storage.blocks.compactor.producer", lambda: "everflame 99")
    assert tries(now_s) == 1


def test_an_object_that_was_named_as_unreadable_is_folded_once_it_can_be_read(
    expected, store, tmp_path, monkeypatch
):
    """It then counts, and is named no longer."""
    expected.put(profile(START_S))
    with monkeypatch.context() as context:
        context.setattr(work, "_TYPE_UNITS", {"cpu": "furlongs"})
        compactor_of(store, tmp_path, GOES_ON_S).fold(HOUR)
    assert len(manifest_of(store)["unreadable"]) == 1
    monkeypatch.setattr("storage.blocks.compactor.producer", lambda: "everflame 99")

    compactor_of(store, tmp_path, GOES_ON_S).fold(HOUR)

    assert manifest_of(store)["unreadable"] == []
    assert read_store(expected) == expected.total


def test_of_several_compactors_each_object_is_counted_by_one(either_store, tmp_path):
    """Four at once, while more objects arrive."""
    expected = Expected(either_store)
    for minute in range(10):
        expected.put(profile(START_S + 60 * minute))
    ready = threading.Barrier(5)
    reports = []

    def compact(number):
        compactor = compactor_of(either_store, tmp_path / str(number), GOES_ON_S)
        ready.wait()
        for _ in range(3):
            compactor.fold(HOUR)
        reports.append(compactor.report)

    threads = [threading.Thread(target=compact, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    ready.wait()
    for minute in range(10, 20):
        expected.put(profile(START_S + 60 * minute))
    for thread in threads:
        thread.join()
    compactor_of(either_store, tmp_path / "last", GOES_ON_S).fold(HOUR)

    assert len(reports) == 4
    assert sum(part["objects"] for part in manifest_of(either_store)["parts"]) == 20
    assert read_store(expected) == expected.total


def test_a_part_that_another_compactor_was_faster_with_is_dropped(expected, store, tmp_path):
    """The other one folds some of the same objects between the work and the change."""
    first = expected.put(profile(START_S))

    class Slow(Inline):
        def submit(self, act, /, *things, **more):
            future = super().submit(act, *things, **more)
            if not compactor.report["parts"] and not compactor.report["conflicts"]:
                store.delete(second.text)  # so that the other part is of the first object alone
                compactor_of(store, tmp_path / "other", GOES_ON_S).fold(HOUR)
                store.put(second.text, content)
            return future

    second = expected.put(profile(START_S + 60))
    content = store.get(second.text)
    compactor = Compactor(TenantStore(store), tmp_path / "slow", Slow())

    folded = compactor.fold(HOUR)

    assert folded == 1, "the second object, in the second attempt"
    assert compactor.report["conflicts"] == 1
    assert sorted(part["objects"] for part in manifest_of(store)["parts"]) == [1, 1]
    assert read_store(expected) == expected.total
    assert first.content16 != second.content16


def test_a_part_that_took_too_long_is_not_named(expected, store, tmp_path):
    """Its files may be deleted as garbage at any moment."""
    expected.put(profile(START_S))
    compactor = compactor_of(store, tmp_path, GOES_ON_S, grace_s=0.0)

    assert compactor.fold(HOUR) == 0

    assert hour_manifests(store) == {}
    assert read_store(expected) == expected.total


def test_files_of_equal_content_have_names_of_their_own(expected, store, tmp_path):
    """A name that was there before may be that of garbage which is just being deleted."""
    expected.put(profile(START_S))
    compactor_of(store, tmp_path, GOES_ON_S).fold(HOUR)
    first = files_in(store)
    store.delete(f"v1/default/manifests/cpu/{HOUR}.json")

    compactor_of(store, tmp_path, GOES_ON_S).fold(HOUR)

    (part,) = manifest_of(store)["parts"]
    second = {file["key"] for file in part["files"]}
    assert second.isdisjoint(first)
    assert files_in(store) == first | second
    assert read_store(expected) == expected.total


def test_objects_that_are_deleted_meanwhile_are_left_out(expected, store, tmp_path):
    """Whoever deletes one knows that it is in a part, or does not want it."""
    gone = expected.put(profile(START_S))
    expected.put(profile(START_S + 60))

    class Slow(Inline):
        def submit(self, act, /, *things, **more):
            store.delete(gone.text)
            return super().submit(act, *things, **more)

    assert Compactor(TenantStore(store), tmp_path, Slow()).fold(HOUR) == 1

    del expected.sums[gone.content16]
    assert read_store(expected) == expected.total


def test_few_new_objects_of_an_hour_that_goes_on_wait_for_more(expected, store, tmp_path):
    """A patient compactor waits ten minutes, but not for an hour that is over."""
    import time

    start_s = int(time.time()) // HOUR_S * HOUR_S
    hour = hour_name(start_s)
    expected.put(profile(start_s))
    patient = compactor_of(store, tmp_path, time.time(), patience_s=600.0)

    assert patient.fold(hour) == 0
    patient.now_ns.now_s += 700
    assert patient.fold(hour) == 1
    expected.put(profile(start_s + 60))
    patient.now_ns.now_s = start_s + HOUR_S + 400
    assert patient.fold(hour) == 1


def test_batches_are_bounded_and_so_are_parts(expected, store, tmp_path, monkeypatch):
    """Many objects are several pieces of work, and many rows several parts."""
    monkeypatch.setattr("storage.blocks.compactor._BATCH_OBJECTS", 4)
    monkeypatch.setattr(work, "_PART_BYTES", 1)
    for minute in range(10):
        expected.put(profile(START_S + 60 * minute))
    handed: list[int] = []

    class Noting(Inline):
        def submit(self, act, /, *things, **more):
            handed.append(len(things[1]))
            return super().submit(act, *things, **more)

    Compactor(TenantStore(store), tmp_path, Noting()).fold(HOUR)

    assert handed == [4, 4, 2]
    assert len(manifest_of(store)["parts"]) == 10
    assert read_store(expected) == expected.total


def test_work_is_done_by_any_executor(either_store, tmp_path):
    """A pool of processes, ours, and one that has no worker left: then in a process apart."""
    expected = Expected(either_store)
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    none = Workers(1)
    for number, executor in enumerate((pool, none)):
        expected.put(profile(START_S + 60 * number))
        with executor:
            compactor = Compactor(TenantStore(either_store), tmp_path, executor)
            assert compactor.fold(HOUR) == 1

    assert read_store(expected) == expected.total


def test_what_kills_its_worker_is_found_and_named(expected, store, tmp_path):
    """By halves, in a process apart; the others are folded."""
    for minute in range(5):
        expected.put(profile(START_S + 60 * minute))
    deadly = put_content(store, b"deadly", 9)
    with DeadlyWorkers(2, START_S + 540) as executor:
        executor.start()
        compactor = Compactor(TenantStore(store), tmp_path, executor)
        compactor.fold(HOUR)

    (named,) = manifest_of(store)["unreadable"]
    assert named["key"] == deadly
    assert "killed" in named["reason"]
    assert sum(part["objects"] for part in manifest_of(store)["parts"]) == 5
    assert read_store(expected) == expected.total
