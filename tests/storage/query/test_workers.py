"""Workers: decode what this process would, are started late, and are replaced when killed."""

import gzip
import logging
import math
import multiprocessing
import os
import signal
import threading
import time

import pytest

from storage.formats import pprof
from storage.formats.pprof_message import decompress
from storage.objects.directory import DirectoryStore
from storage.objects.keys import object_key
from storage.objects.tenant import TenantStore
from storage.query.decoding import _decode_packed
from storage.query.query import Query
from storage.query.workers import NoWorkersError, Workers, start_workers
from tests.storage.query.test_query import small
from tests.support import hostile_objects
from tests.support.deadly import DeadlyWorkers
from tests.support.live import wait_for
from tests.support.stores import at, minutes, put


@pytest.fixture
def store(tmp_path):
    return DirectoryStore(tmp_path / "store")


def is_working(workers: Workers) -> bool:
    try:
        workers.submit(os.getpid)
    except NoWorkersError:
        return False
    return True


def test_workers_decode_what_this_process_would(store, tmp_path):
    """Whole hours and single objects, damaged ones included; killed workers cost only time."""
    for minute in range(0, 120, 4):
        put(store, at(small(minute), minute))
    key = put(store, at(small(3), 3))
    store.delete(key.text)
    store.put(key.text, b"damaged")
    here = Query(TenantStore(store), tmp_path / "here").profile(minutes(0, 90))
    workers = start_workers(2)
    try:
        query = Query(TenantStore(store), tmp_path / "there", workers=workers)
        there = query.profile(minutes(0, 90))
        assert there.profile.to_profile() == here.profile.to_profile()
        assert there.coverage == here.coverage
        assert len(there.coverage.skipped) == 1

        for process in multiprocessing.active_children():
            process.kill()

        assert query.profile(minutes(0, 120)).profile.total_samples > here.profile.total_samples
        assert query.profile(minutes(60, 120)).coverage.skipped == ()
    finally:
        workers.shutdown()


def test_workers_import_nothing_out_of_the_working_folder(tmp_path, monkeypatch):
    """It may be another user's: a Python that is given no script would look there first."""
    tmp_path.joinpath("multiprocessing.py").write_text("raise SystemExit('of another user')")
    monkeypatch.chdir(tmp_path)

    workers = start_workers(1)
    try:
        assert is_working(workers)
    finally:
        workers.shutdown()


def test_workers_are_started_where_there_is_much_to_decode(store, tmp_path):
    """Asking for little starts none; what was asked before they are ready is answered as well."""
    for minute in range(90):
        put(store, at(small(minute), minute))
    with Workers(2) as workers:
        query = Query(TenantStore(store), tmp_path / "cache", workers=workers)

        query.profile(minutes(0, 2))
        with pytest.raises(NoWorkersError, match="no workers yet"):
            workers.submit(os.getpid)
        first = query.profile(minutes(0, 90)).profile

        wait_for(lambda: is_working(workers))
        again = (
            Query(TenantStore(store), tmp_path / "other", workers=workers)
            .profile(minutes(0, 90))
            .profile
        )
        assert again.to_profile() == first.to_profile()
        assert workers.submit(os.getpid).result() != os.getpid()


def test_a_pool_that_loses_a_worker_is_replaced(store, tmp_path, caplog):
    """One worker killed while it rests: others decode soon, and the loss is counted and logged."""
    caplog.set_level(logging.WARNING)
    for minute in range(20):
        put(store, at(small(minute), minute))
    workers = start_workers(2)
    try:
        query = Query(TenantStore(store), tmp_path / "cache", workers=workers)
        assert (query.counts.pools_lost, query.counts.pools_started) == (0, 1)
        killed = workers.submit(os.getpid).result()

        os.kill(killed, signal.SIGKILL)

        wait_for(lambda: not is_working(workers))
        wait_for(lambda: is_working(workers))
        assert workers.submit(os.getpid).result() not in {killed, os.getpid()}
        assert (query.counts.pools_lost, query.counts.pools_started) == (1, 2)
        assert "lost a worker" in caplog.text
        whole = Query(TenantStore(store), tmp_path / "here").profile(minutes(0, 20)).profile
        assert query.profile(minutes(0, 20)).profile.to_profile() == whole.to_profile()
    finally:
        workers.shutdown()


@pytest.fixture
def no_threads():
    """Make the start of every thread fail, as the limit of a container does."""
    before = threading.stack_size(1 << 46)
    yield
    threading.stack_size(before)


def test_where_no_thread_can_be_started_there_are_no_workers(no_threads, caplog):
    """That is logged, and nobody waits for them without end."""
    workers = Workers(1)
    workers.shutdown()  # ends after one attempt

    workers._keep_pool()
    workers.start()

    assert "cannot start workers" in caplog.text
    assert "start new thread" in caplog.text
    with pytest.raises(NoWorkersError, match="start new thread"):
        workers.lone_worker().run(os.getpid)


def test_an_object_that_kills_two_workers_is_skipped_and_no_other(store, tmp_path):
    """The objects that a lost pool had are decoded again; the deadly one is named and counted."""
    keys = [put(store, at(small(minute), minute)) for minute in range(25)]
    deadly = keys[7]
    workers = DeadlyWorkers(2, deadly.start_s)
    workers.start()
    try:
        query = Query(TenantStore(store), tmp_path / "cache", workers=workers)

        answer = query.profile(minutes(0, 60))

        assert [each.key for each in answer.coverage.skipped] == [deadly.text]
        assert "two workers were killed" in answer.coverage.skipped[0].reason
        assert answer.coverage.objects == 24
        assert not answer.coverage.is_lasting
        assert query.counts.objects_skipped == 1
        assert query.counts.objects_decoded_again >= 10

        again = query.profile(minutes(0, 60))

        assert again.coverage.skipped == answer.coverage.skipped
        assert query.counts.objects_skipped == 1
        healthy = Query(TenantStore(store), tmp_path / "cache").profile(minutes(0, 60))
        assert healthy.coverage.objects == 25
    finally:
        workers.shutdown()


def test_a_pool_that_loses_workers_while_they_start_is_replaced():
    """All killed at any moment, again and again: others are soon there."""
    workers = start_workers(2)
    try:
        for round_ in range(6):
            time.sleep(0.05 * round_)
            for process in multiprocessing.active_children():
                process.kill()
            wait_for(lambda: is_working(workers), 30)
    finally:
        workers.shutdown()


def many_samples(minute):
    """Return the key and content of an object within the limits, which takes 170 MB to decode."""
    sample = hostile_objects.field(2, b"\x0a\x01\x01\x12\x02\x01\x01")
    content = gzip.compress(decompress(pprof.encode(at(small(minute), minute))) + sample * 490_000)
    key = object_key(at(small(minute), minute), content, "default")
    return key, content


def test_an_object_that_takes_too_much_memory_is_skipped(store, tmp_path):
    """Workers have a limit; the other objects of its chunk are decoded, and it costs once."""
    for minute in (0, 2):
        put(store, at(small(minute), minute))
    key, content = many_samples(1)
    store.put(key.text, content)
    with Workers(1, memory_bytes=150 << 20) as workers:
        workers.start()
        query = Query(TenantStore(store), tmp_path / "cache", workers=workers)

        coverage = query.profile(minutes(0, 3)).coverage

        assert coverage.objects == 2
        ((skipped, reason),) = coverage.skipped
        assert skipped == key.text
        assert "more memory than a worker may have" in reason
        again = query.counts.objects_decoded_again
        assert query.profile(minutes(0, 3)).coverage == coverage
        assert query.counts.objects_decoded_again == again


def test_an_object_that_takes_too_much_time_is_skipped():
    """A worker that is busy with it for too long ends it, and names it."""
    key, content = many_samples(1)

    parts, failures = _decode_packed([(key, content)], b"k" * 32, cpu_limit_s=0.2)

    assert parts == []
    assert [failure.key for failure in failures] == [key.text]
    assert "s of CPU time" in failures[0].reason
    assert 0 < failures[0].retry_s < math.inf


def test_an_object_beyond_the_limits_is_named_and_the_others_are_answered(store, tmp_path):
    """31 million empty samples in 61 kB: its window is answered without it."""
    put(store, at(small(0), 0))
    content = hostile_objects.KINDS["empty samples"](hostile_objects.ROOM_BYTES)
    key = object_key(at(small(1), 1), content, "default")
    store.put(key.text, content)

    coverage = Query(TenantStore(store), tmp_path / "cache").profile(minutes(0, 3)).coverage

    assert coverage.objects == 1
    assert [skipped for skipped, _ in coverage.skipped] == [key.text]
    assert "it holds more than" in coverage.skipped[0].reason
    assert coverage.is_lasting
