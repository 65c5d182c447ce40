"""Prefetching: objects are decoded before they are asked for, within bounds."""

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from profiler.service import prefetch
from profiler.service.prefetch import Pace, Prefetcher
from storage.objects.tenant import TenantStore
from storage.profile import Profile, Window
from storage.query.listing import HOUR_NS
from storage.query.query import Query
from tests.commands.test_up import descendants_of, is_running
from tests.storage.query.test_query import CountingStore, small
from tests.support.live import wait_for
from tests.support.services import profile_of, service
from tests.support.stores import START_NS, at, directory, minutes, put

NOW_NS = START_NS + 5 * HOUR_NS + 37 * 60 * 10**9
DAY = Window(START_NS, NOW_NS + HOUR_NS)


def fill(folder: Path) -> CountingStore:
    """Store two hosts' objects, every five minutes for five hours and a half."""
    store = CountingStore(folder)
    for minute in range(0, 337, 5):
        put(store, at(small(minute), minute))
        put(store, at(small(minute), minute, "web-2", "00112233445566bb"))
    return store


@pytest.fixture
def store(tmp_path):
    return fill(tmp_path / "store")


def make_query(store, folder: Path, **options) -> Query:
    return Query(TenantStore(store), folder, now_ns=lambda: NOW_NS, **options)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A folder with a store and a cache in which its day is prepared."""
    folder = tmp_path_factory.mktemp("prepared")
    list(make_query(fill(folder / "store"), folder / "cache").prepare(DAY))
    return folder


@pytest.mark.parametrize(
    "window", [DAY, minutes(60, 300), minutes(270, 338), minutes(280, 333), minutes(330, 360)]
)
def test_what_was_prepared_is_fetched_no_more(prepared, tmp_path, window) -> None:
    """Whole hours, windows that begin at ten minutes of the latest hours, and the last minutes."""
    store = CountingStore(prepared / "store")
    # Of its own: what is asked for is kept, too.
    query = make_query(store, shutil.copytree(prepared / "cache", tmp_path / "cache"))

    profile = query.profile(window).profile.to_profile()
    timeline, functions = query.timeline(window), query.functions(window)
    assert not store.fetched

    plain = make_query(store, tmp_path / "other")
    assert profile == plain.profile(window).profile.to_profile()
    assert set(functions.rows) == set(plain.functions(window).rows)
    assert timeline.coverage == plain.timeline(window).coverage
    assert profile.total_samples > 0


def test_each_object_is_fetched_once_and_the_latest_first(store, tmp_path) -> None:
    """Shorter spans are made of objects, longer ones of shorter ones; what is left is reported."""
    query = make_query(store, tmp_path / "cache")
    parts = query.prepare(DAY)

    first = next(parts)
    latest = set(store.fetched)
    rest = list(parts)

    assert {int(key.rpartition("/")[2].partition("-")[0]) for key in latest} == {
        minutes(335, 336).start_ns // 10**9
    }
    assert set(store.fetched.values()) == {1}
    assert [first.left, *(each.left for each in rest)] == sorted(
        (each.left for each in (first, *rest)), reverse=True
    )
    assert rest[-1].left == 0
    assert list(query.prepare(DAY)) == []


def test_a_late_object_is_prepared_as_well(store, tmp_path) -> None:
    query = make_query(store, tmp_path / "cache")
    list(query.prepare(DAY))
    put(store, at(small(1), 61))
    store.fetched.clear()

    parts = list(query.prepare(DAY))

    assert len(parts) == 1
    assert parts[0].left == 0
    assert (
        query.profile(minutes(60, 120)).profile.total_samples
        == sum(small(minute).total_samples * 2 for minute in range(60, 120, 5))
        + small(1).total_samples
    )


def test_most_of_the_cache_is_taken_and_not_more(store, tmp_path) -> None:
    """The latest part of the day stays prepared; what has no room is not made again and again."""
    list(make_query(store, tmp_path / "whole").prepare(DAY))
    whole_bytes = sum(path.stat().st_size for path in (tmp_path / "whole").rglob("*.*"))
    query = make_query(store, tmp_path / "cache", cache_bytes=whole_bytes)
    made = list(query.prepare(DAY))
    taken_bytes = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.*"))
    store.fetched.clear()

    again = list(query.prepare(DAY))
    query.profile(minutes(280, 338))

    assert 0.5 * whole_bytes < taken_bytes < 0.9 * whole_bytes
    assert made[-1].left > 0
    assert again == []
    assert not store.fetched


def test_what_cannot_be_kept_as_one_is_not_tried_for_ever(store, tmp_path) -> None:
    """An hour of two types; a damaged object."""
    other = at(replace(small(1), type="wall"), 1)
    put(store, other)
    damaged = put(store, at(small(2), 123))
    (store.root / damaged.text).write_bytes(b"damaged")
    query = make_query(store, tmp_path / "cache")
    list(query.prepare(DAY))
    store.fetched.clear()

    assert list(query.prepare(DAY)) == []
    assert not store.fetched


def test_work_is_followed_by_rest() -> None:
    rests: list[float] = []
    begun_s = time.process_time()
    pace = Pace(0.1, rests.append)
    while time.process_time() < begun_s + 0.05:
        pass

    pace.rest()
    pace.rest()

    assert rests[0] >= 9 * 0.04
    assert rests[1] < rests[0] / 2


def recent(minutes_ago: int) -> Profile:
    start_ns = time.time_ns() // (60 * 10**9) * (60 * 10**9) - minutes_ago * 60 * 10**9
    return replace(profile_of(minutes_ago), window=Window(start_ns, start_ns + 60 * 10**9))


def progress(client) -> dict[str, int]:
    return client.json("status")["ahead"] or {"decoded": 0, "waiting": 1}


def test_a_process_that_cannot_be_started_is_started_later(tmp_path, monkeypatch, caplog) -> None:
    """A machine may have no process or no memory left for a while."""
    monkeypatch.setattr(prefetch, "_FIRST_AFTER_S", 0.0)
    monkeypatch.setattr(prefetch, "_RESTART_S", 0.05)
    program = tmp_path / "program"
    prefetcher = Prefetcher("store", "", "default", tmp_path, 10)
    monkeypatch.setattr(prefetcher, "_command", [str(program)])

    prefetcher.start()
    wait_for(lambda: "cannot decode in advance: No such file" in caplog.text)
    (tmp_path / "written").write_text("#!/bin/sh\necho '{\"decoded\":1}'\n")
    (tmp_path / "written").chmod(0o755)
    (tmp_path / "written").rename(program)
    wait_for(prefetcher.progress)

    prefetcher.end()
    assert prefetcher.progress() == {"decoded": 1}


def test_the_service_decodes_what_nobody_has_asked_for(tmp_path) -> None:
    """Then the store's objects may be anything: they are decoded already."""
    store = directory(tmp_path / "store", *map(recent, range(1, 200, 7)))
    expected = sum(recent(minute).total_samples for minute in range(1, 200, 7))
    with service(tmp_path, "--decode-ahead=100") as (process, client):
        # On a busy machine a process of SCHED_IDLE gets little of it.
        wait_for(lambda: progress(client)["decoded"] and progress(client)["waiting"] == 0, 60)
        (helper,) = [
            pid
            for pid in descendants_of(process.pid)
            if b"profiler.service.prefetch" in command(pid)
        ]
        for stored in list(store.list("v1/default/l0/")):
            path = store.root / stored.key
            path.write_bytes(bytes(stored.size_bytes))
            os.utime(path, ns=(stored.modified_ns, stored.modified_ns))
        graph = client.json("flamegraph", **{"from": "now-1d"})
        metrics = client.get("/metrics")[2].decode()

        assert os.sched_getscheduler(helper) == os.SCHED_IDLE

    assert graph["samples"] == expected
    assert graph["coverage"]["skipped"] == []
    assert "everflame_service_decode_ahead_waiting 0\n" in metrics
    assert "everflame_service_decoded_ahead_total " in metrics
    wait_for(lambda: not is_running(helper))


def test_a_service_may_be_told_not_to(tmp_path) -> None:
    directory(tmp_path / "store", recent(5))
    with service(tmp_path, "--decode-ahead=0") as (process, client):
        assert client.json("status")["ahead"] is None
        assert not [
            pid
            for pid in descendants_of(process.pid)
            if b"profiler.service.prefetch" in command(pid)
        ]
        assert "ahead" not in client.get("/metrics")[2].decode()


def command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()
