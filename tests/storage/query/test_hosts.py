"""Hosts: found by listing, named by one object of each, a part at a time where there are many."""

import dataclasses

import pytest

from storage.formats import pprof
from storage.objects.directory import DirectoryStore
from storage.objects.keys import ObjectKey
from storage.objects.tenant import TenantStore
from storage.profile import Host
from storage.query.hosts import HostSearch
from storage.query.query import Query
from tests.support import profiles as some
from tests.support.compacted import compact, delete, level0
from tests.support.live import wait_for
from tests.support.stores import CountingStore, at, directory, minutes, put

LONG_S = 60


def host_id(number: int) -> str:
    return f"{number:016x}"


def of_host(number: int, minute: int):
    return at(some.sample_profile(), minute, f"web-{number}", host_id(number))


def find(search: HostSearch, first: int, last: int, within_s: float = LONG_S):
    return search.find(*minutes(first, last), within_s)


def test_only_the_newest_object_of_each_host_is_read(tmp_path):
    """Of two hours, whatever they hold; a name is then known until the hour ends."""
    directory(tmp_path, *(of_host(n, minute) for n in range(3) for minute in (58, 59, 61, 62)))
    directory(tmp_path, of_host(3, 10), of_host(4, 59))  # one before the window, one stopped in it
    store = CountingStore(tmp_path)
    search = HostSearch(TenantStore(store))

    found = find(search, 30, 90)

    assert found.names == ["web-0", "web-1", "web-2", "web-4"]
    assert (found.is_complete, found.hosts, found.hours) == (True, (4, 4), (2, 2))
    keys = [ObjectKey.parse(key) for key in store.read]
    starts = sorted((key.host_id, key.start_ns) for key in keys)
    newest = [(0, 62), (1, 62), (2, 62), (4, 59)]
    assert starts == [(host_id(n), minutes(m, m + 1).start_ns) for n, m in newest]
    put(store, of_host(0, 63))
    assert find(search, 30, 90).names == found.names
    assert len(store.read) == 4


def test_a_search_continues_where_the_last_one_ended(tmp_path):
    """Without any time for it, each lists one key more; what is missing is said."""
    store = directory(tmp_path, *(of_host(n, minute) for n in range(3) for minute in (59, 61)))
    search = HostSearch(TenantStore(store))

    first = find(search, 30, 90, within_s=0)

    assert not first.is_complete
    assert (first.hosts[1], first.hours) == (1, (0, 2))
    assert first.names in ([host_id(0)], ["web-0"])
    wait_for(lambda: find(search, 30, 90, within_s=0).is_complete)
    assert find(search, 30, 90, within_s=0).names[-1] == "web-2"
    wait_for(lambda: find(search, 30, 90, within_s=0).names == ["web-0", "web-1", "web-2"])


def test_a_host_without_a_readable_name_is_there_by_its_id(tmp_path):
    """Its newest object is damaged, or names no host; an earlier name stays."""
    nameless = at(some.sample_profile(), 61)
    nameless = dataclasses.replace(
        nameless, accounting=dataclasses.replace(nameless.accounting, hosts=(Host("", host_id(7)),))
    )
    store = directory(tmp_path, of_host(0, 59), nameless)
    search = HostSearch(TenantStore(store))
    assert find(search, 30, 90).names == [host_id(7), "web-0"]
    damaged = TenantStore(store).put_profile(of_host(0, 61), b"damaged")[0]
    TenantStore(store).put_profile(of_host(1, 61), b"damaged")
    assert damaged.start_ns == minutes(61, 62).start_ns

    found = find(search, 30, 90)

    assert found.is_complete
    assert found.names == [host_id(1), host_id(7), "web-0"]


def test_a_host_is_forgotten_when_its_objects_are(tmp_path):
    """What a complete search did not see is not there."""
    store = directory(tmp_path, of_host(0, 61), of_host(1, 61))
    search = HostSearch(TenantStore(store))
    assert find(search, 30, 90).names == ["web-0", "web-1"]
    key, _ = TenantStore(store).put_profile(of_host(1, 61), pprof.encode(of_host(1, 61)))

    store.delete(key.text)

    assert find(search, 30, 90).names == ["web-0"]


def test_hosts_of_keys_without_a_type_are_found(tmp_path):
    """As all were until November 2026."""
    store = DirectoryStore(tmp_path)
    profile = of_host(0, 61)
    content = pprof.encode(profile)
    typed, _ = TenantStore(store).put_profile(profile, content)
    store.delete(typed.text)
    store.put(typed._replace(has_type=False).text, content)

    assert find(HostSearch(TenantStore(store)), 30, 90).names == ["web-0"]


def test_an_object_that_cannot_be_read_is_read_once(tmp_path):
    """It may cost a second each time; the next one of its host is read."""
    directory(tmp_path, of_host(0, 60))
    store = CountingStore(tmp_path)
    key = ObjectKey("default", host_id(0), minutes(61, 62).start_ns // 10**9, 60, "0" * 16)
    store.put(key.text, b"damaged")
    search = HostSearch(TenantStore(store))

    for _ in range(3):
        assert find(search, 30, 90).names == [host_id(0)]
    assert len(store.read) == 1
    put(store, of_host(0, 62))
    assert find(search, 30, 90).names == ["web-0"]


def of_query(store: DirectoryStore, folder) -> HostSearch:
    query = Query(TenantStore(store), folder)
    return HostSearch(TenantStore(store), blocks=query.blocks)


@pytest.mark.parametrize("gone", ["none", "half", "all"])
def test_hosts_of_compacted_hours_are_found(tmp_path, gone):
    """By name, with those that are not compacted; no object of theirs is read."""
    store = directory(
        tmp_path / "store",
        *(of_host(n, minute) for n in range(3) for minute in (10 + 20 * n, 61)),
        of_host(3, 10),
        of_host(4, 59),
    )
    compact(store, tmp_path / "work")
    keys = level0(store)
    delete(store, {"none": [], "half": keys[::2], "all": keys}[gone])
    put(store, of_host(5, 62))
    counting = CountingStore(store.root)
    search = of_query(counting, tmp_path / "cache")

    found = find(search, 30, 90)

    assert found.names == ["web-0", "web-1", "web-2", "web-4", "web-5"]
    assert (found.is_complete, found.hosts, found.hours) == (True, (5, 5), (2, 2))
    assert [ObjectKey.parse(key).host_id for key in counting.read if "/l0/" in key] == [host_id(5)]


def test_a_search_of_compacted_hours_continues(tmp_path):
    """Without any time for it, what is missing is said, and known the next time."""
    store = directory(tmp_path / "store", of_host(0, 10), of_host(1, 61))
    compact(store, tmp_path / "work")
    delete(store, level0(store))
    search = of_query(store, tmp_path / "cache")

    wait_for(lambda: find(search, 0, 90, within_s=0).is_complete)
    assert find(search, 0, 90, within_s=0).names == ["web-0", "web-1"]


def test_compacted_hours_that_cannot_be_read_hide_no_other(tmp_path):
    """The objects of theirs that are left are found all the same."""
    store = directory(tmp_path / "store", of_host(0, 10), of_host(1, 61))
    compact(store, tmp_path / "work")
    for path in store.root.rglob("*-objects-*"):
        path.write_bytes(b"?")

    found = find(of_query(store, tmp_path / "cache"), 0, 90)

    assert (found.is_complete, found.names) == (True, ["web-0", "web-1"])
