"""Compacted hours in a bucket: files are copied, and queries work where they cannot be."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from storage.blocks.compactor import Compactor
from storage.objects.directory import DirectoryStore
from storage.objects.keys import DEFAULT_TENANT, ObjectStore
from storage.objects.open import open_store
from storage.objects.tenant import TenantStore
from storage.objects.tenant_key import KEY_BYTES
from storage.query.query import Query
from storage.selector import EMPTY
from tests.storage.query.test_compacted import check_equal, small
from tests.support.stores import at, minutes, put
from tests.support.weed import BUCKET, Weed, using_keys

WINDOW = minutes(0, 120)


@pytest.fixture
def bucket(weed: Weed, tmp_path: Path) -> Iterator[ObjectStore]:
    with using_keys():
        yield open_store(f"s3://{BUCKET}/{tmp_path.name}", weed.endpoint)


@pytest.fixture
def plain(bucket: ObjectStore, tmp_path: Path) -> Query:
    """The objects of a bucket in a directory; in the bucket most of them are compacted only."""
    directory = DirectoryStore(tmp_path / "plain")
    keys = [put(directory, at(small(minute), minute)) for minute in range(0, 120, 20)]
    for key in keys:
        bucket.put(key.text, directory.get(key.text))
    for store in (directory, bucket):
        store.put(f"v1/{DEFAULT_TENANT}/key", b"k" * KEY_BYTES)
    with ThreadPoolExecutor(1) as executor:
        compactor = Compactor(TenantStore(bucket), tmp_path / "work", executor)
        for hour in list(compactor.occupied_hours()):
            compactor.fold(hour)
    for key in keys[1:]:
        bucket.delete(key.text)
    late = at(small(30), 30)
    bucket.put(put(directory, late).text, directory.get(put(directory, late).text))
    return Query(TenantStore(directory), tmp_path / "plain-cache")


def test_a_bucket_answers_as_its_objects_do(bucket, plain, tmp_path):
    """Two queries may share a cache."""
    one, other = (Query(TenantStore(bucket), tmp_path / "cache") for _ in range(2))
    for query in (one, other, one):
        check_equal(plain, query, WINDOW, EMPTY)


def test_a_cache_that_is_too_small_or_cannot_be_written_costs_time_only(bucket, plain, tmp_path):
    """Files are fetched each time."""
    small_cache = Query(TenantStore(bucket), tmp_path / "small", cache_bytes=1)
    (tmp_path / "file").write_bytes(b"")
    no_cache = Query(TenantStore(bucket), tmp_path / "file/cache")
    for query in (small_cache, no_cache, small_cache, no_cache):
        answer = query.profile(WINDOW)
        assert answer.coverage.skipped == ()
        assert answer.profile.total_samples == plain.profile(WINDOW).profile.total_samples
        assert query.functions(WINDOW).samples == answer.profile.total_samples
