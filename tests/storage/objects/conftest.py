"""The stores that a test of the contract runs with."""

import pytest

from storage.objects.keys import ObjectStore


@pytest.fixture
def store(either_store: ObjectStore) -> ObjectStore:
    return either_store
