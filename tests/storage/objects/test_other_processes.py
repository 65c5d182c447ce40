"""Stores in other processes: a piece of work takes its store with it, and brings errors back."""

import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor

import pytest

from storage.objects.keys import (
    DamagedObject,
    ObjectMissing,
    ObjectStore,
    ObjectTooLarge,
    StoreError,
    StoreRefused,
    StoreUnavailable,
)


def test_another_process_uses_the_same_store(store: ObjectStore) -> None:
    """With a connection of its own."""
    store.put("v1/here", b"content")

    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(store.get, "v1/here").result() == b"content"
        assert pool.submit(store.put, "v1/there", b"more").result()
        with pytest.raises(ObjectMissing, match="v1/nowhere"):
            pool.submit(store.get, "v1/nowhere").result()

    assert store.get("v1/there") == b"more"


@pytest.mark.parametrize(
    "error",
    [
        StoreUnavailable("it is gone"),
        StoreRefused("it cannot", "do this"),
        ObjectMissing("there is none"),
        ObjectTooLarge("v1/key"),
        DamagedObject("v1/key"),
    ],
)
def test_errors_of_another_process_are_the_same(error: StoreError) -> None:
    """An exception whose constructor takes something else would end the pool."""
    again = pickle.loads(pickle.dumps(error))

    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))
