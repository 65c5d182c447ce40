"""The tenant's key: one for all who read a tenant, made by those who write."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from storage.objects.directory import DirectoryStore
from storage.objects.keys import StoreRefused, StoreUnavailable
from storage.objects.tenant import TenantStore
from storage.objects.tenant_key import fallback_key, make_tenant_key, read_tenant_key
from storage.query.query import Query
from storage.selector import Selector
from tests.support import profiles as some
from tests.support.stores import MemoryStore, at, minutes, put


class RefusingStore(DirectoryStore):
    """A store whose policy allows its user to read profiles only."""

    def get(self, key: str) -> bytes:
        if "/l0/" not in key:
            raise StoreRefused("cannot read", "ask for the right")
        return super().get(key)


def function_hashes(store: DirectoryStore, cache: Path) -> set[int]:
    query = Query(TenantStore(store), cache)
    parts = query.self_samples([minutes(0, 60)], Selector())
    return {number for _, part in parts for number in part.function_hashes.tolist()}


def test_of_all_who_make_a_key_at_the_same_time_one_makes_it(tmp_path):
    store = DirectoryStore(tmp_path)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: make_tenant_key(store, "acme"), range(8)))
        keys = set(pool.map(lambda _: read_tenant_key(store, "acme"), range(8)))

    assert len(keys) == 1
    assert len(keys.pop()) == 32
    assert [each.key for each in store.list("")] == ["v1/acme/key"]


def test_tenants_have_different_keys_also_without_one():
    store = MemoryStore()
    assert read_tenant_key(store, "a") == fallback_key("a") != fallback_key("b")

    for tenant in "ab":
        make_tenant_key(store, tenant)

    assert len({*(read_tenant_key(store, each) for each in "ab"), fallback_key("a")}) == 3


def test_machines_that_read_one_tenant_make_the_same_ids(tmp_path):
    """And others ids as soon as it has a key: nothing of the guessable one is used again."""
    store = DirectoryStore(tmp_path / "store")
    put(store, at(some.sample_profile(), 1))
    guessable = function_hashes(store, tmp_path / "one")
    assert guessable == function_hashes(store, tmp_path / "other")
    before = Query(TenantStore(store), tmp_path / "one").profile(minutes(0, 60)).profile

    make_tenant_key(store, "default")

    keyed = function_hashes(store, tmp_path / "one")
    assert keyed == function_hashes(store, tmp_path / "third")
    assert len(keyed) == len(guessable) > 1
    assert not keyed & guessable
    after = Query(TenantStore(store), tmp_path / "one").profile(minutes(0, 60)).profile
    assert after.to_profile() == before.to_profile()


def test_who_may_not_read_the_key_reads_profiles_all_the_same(tmp_path):
    store = DirectoryStore(tmp_path / "store")
    put(store, at(some.sample_profile(), 1))
    without = function_hashes(store, tmp_path / "cache")
    make_tenant_key(store, "default")

    assert function_hashes(RefusingStore(tmp_path / "store"), tmp_path / "cache") == without


def test_a_damaged_key_is_as_good_as_none():
    store = MemoryStore()
    store.put("v1/acme/key", b"short")

    assert read_tenant_key(store, "acme") == fallback_key("acme")


def test_a_key_that_cannot_be_read_now_is_not_taken_for_none(tmp_path):
    class AwayStore(MemoryStore):
        def get(self, key: str) -> bytes:
            raise StoreUnavailable(f"away: {key}")

    with pytest.raises(StoreUnavailable):
        read_tenant_key(AwayStore(), "acme")


def test_readers_find_the_key_that_the_first_profile_came_with(tmp_path):
    """A service that started with an empty store, and has looked at it already."""
    store = DirectoryStore(tmp_path / "store")
    query = Query(TenantStore(store), tmp_path / "cache")
    assert query.profile(minutes(0, 60)).profile.total_samples == 0
    assert query.functions(minutes(0, 60)).rows == ()
    assert list(query.self_samples([minutes(0, 60)])) == []
    assert not list(store.list(""))
    make_tenant_key(store, "default")
    put(store, at(some.sample_profile(), 1))

    parts = list(query.self_samples([minutes(0, 60)]))

    found = {number for _, part in parts for number in part.function_hashes.tolist()}
    assert found == function_hashes(store, tmp_path / "other")


def test_a_key_is_no_profile_and_does_not_expire(tmp_path):
    store = DirectoryStore(tmp_path / "store")
    make_tenant_key(store, "default")
    key = put(store, at(some.sample_profile(), 1))
    tenant = TenantStore(store)

    assert [stored.key for _, stored in tenant.list_all()] == [key.text]
    assert [stored.key for stored in tenant.expire(2**33, 1, 1)] == [key.text]
    assert [each.key for each in store.list("")] == ["v1/default/key"]
