"""Objects that claim what cannot be: each is named, and its window is answered without it."""

import gzip
import os

import orjson
import pytest

from profiler.commands.verify import verify_store
from storage.formats import pprof
from storage.formats.pprof_message import ProfileMessage, decompress
from storage.objects.directory import DirectoryStore
from storage.objects.keys import object_key
from storage.objects.tenant import TenantStore
from storage.profile import ALWAYS
from storage.query.query import Query
from tests.storage.query.test_query import small
from tests.support import hostile_objects
from tests.support.stores import at, minutes, put

HUGE = 2**62


@pytest.fixture
def store(tmp_path):
    return DirectoryStore(tmp_path / "store")


def put_content(store, minute, content):
    key = object_key(at(small(minute), minute), content, "default")
    store.put(key.text, content)
    return key.text


def claiming(minute, values=None, **claims):
    """Return an object whose accounting claims this, and whose samples have these values."""
    message = ProfileMessage()
    message.ParseFromString(decompress(pprof.encode(at(small(minute), minute))))
    number = message.comment[0]
    record = orjson.loads(message.string_table[number].removeprefix(b"everflame "))
    message.string_table[number] = b"everflame " + orjson.dumps(record | claims)
    for sample in message.sample if values else ():
        sample.value[:] = values
    return gzip.compress(message.SerializeToString())


@pytest.mark.parametrize(
    "claims",
    [
        {"ticks": HUGE, "stored": HUGE},
        {"ticks": 1.5},
        {"ticks": -1},
        {"ticks": 1e30},
        {"ticks": True},
        {"ticks": None},
        {"ticks": "1"},
        {"lost": {"a": HUGE, "b": HUGE}},
        {"lost": [1]},
        {"services": [{"labels": {"service": "a"}, "present_ns": HUGE}] * 5},
        {"services": [{"labels": {"service": 1}, "present_ns": 1}]},
        {"services": {"a": 1}},
        {"nonidle_ns": HUGE},
        {"cpus": HUGE},
        {"agent": {"cpu_ns": HUGE}},
        {"period_ns": HUGE},
        {"window": [0, HUGE]},
        {"window": [60, 0]},
        {"window": [0]},
        {"hosts": [["a"]]},
        {"stops": {"root": HUGE}},
        {"values": [2**60, 2**60]},
        {"values": [1, 2**60]},
    ],
    ids=str,
)
def test_an_object_of_absurd_numbers_is_skipped(store, tmp_path, claims):
    """Eight of them overflow no sum of their window."""
    real = put(store, at(small(9), 9))
    claimed = {put_content(store, minute, claiming(minute, **claims)) for minute in range(8)}
    query = Query(TenantStore(store), tmp_path / "cache")

    answer = query.profile(minutes(0, 10))
    alone = Query(TenantStore(store), tmp_path / "alone").profile(minutes(9, 10))

    assert real.text not in claimed
    assert {key for key, _ in answer.coverage.skipped} == claimed
    assert answer.coverage.accounting == alone.coverage.accounting
    assert answer.profile.total_samples == alone.profile.total_samples
    for ask in (query.timeline, query.functions, query.presence):
        assert {key for key, _ in ask(minutes(0, 10)).coverage.skipped} == claimed


def test_verify_names_what_is_beyond_the_limits(store):
    """Text and JSON say what there is too much of; the others are checked."""
    put(store, at(small(0), 0))
    kinds = ("empty samples", "empty gzip members", "a deep comment")
    hostile = {
        put_content(store, minute, hostile_objects.KINDS[kind](hostile_objects.ROOM_BYTES))
        for minute, kind in enumerate(kinds, start=1)
    }

    found = verify_store(TenantStore(store), minutes(0, 10))

    assert found.objects == 1
    assert {each["key"] for each in found.unreadable} == hostile
    assert all("it holds more than" in each["reason"] for each in found.unreadable)
    assert orjson.loads(found.as_json())["unreadable"] == found.unreadable


def nest(folder, levels):
    """Make folders within folders, deeper than a path may be long."""
    fd = os.open(folder, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir("a", dir_fd=fd)
        below = os.open("a", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)


def unnest(folder):
    outer, inner = folder / "a", folder / "b"
    while (outer / "a").is_dir():
        (outer / "a").rename(inner)
        outer.rmdir()
        inner.rename(outer)


def test_folders_that_others_made_in_a_store_are_passed_over(tmp_path):
    """Nested deeply, links in circles, pipes, names that are no text: at every level of keys."""
    folder = tmp_path / "store"
    store = DirectoryStore(folder)
    text = put(store, at(small(0), 0)).text
    expected = Query(TenantStore(store), tmp_path / "before").profile(minutes(0, 10))
    for level in [path for path in (folder / text).parents if path.is_relative_to(folder)]:
        (level / "0deep").mkdir()
        nest(level / "0deep", 1200 if level.name == "l0" else 20)
        (level / "circle").symlink_to(level)
        os.mkfifo(level / "pipe")
        (level / os.fsdecode(b"\xff")).mkdir()
        (level / "zero").symlink_to("/dev/zero")
    tenant = TenantStore(store)
    try:
        assert verify_store(tenant, ALWAYS).objects == 1
        query = Query(tenant, tmp_path / "cache")
        assert query.profile(minutes(0, 10)).profile.total_samples == (
            expected.profile.total_samples
        )
        assert query.span() == Query(tenant, tmp_path / "before").span()
        assert [each.key for each in tenant.expire(2**40, keep_s=1, keep_bytes=0)] == [text]
    finally:
        unnest(folder / "v1/default/l0/0deep")  # pytest's way to remove it recurses
