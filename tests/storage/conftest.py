"""The stores that tests run with."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.objects.keys import ObjectStore
from storage.objects.open import open_store
from tests.support.weed import BUCKET, Weed, using_keys


@pytest.fixture(params=["directory", "s3"])
def either_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ObjectStore]:
    """Return an empty store, once as a directory and once as a bucket."""
    if request.param == "directory":
        yield open_store(f"file://{tmp_path}/store")
    else:
        weed: Weed = request.getfixturevalue("weed")
        with using_keys():
            yield open_store(f"s3://{BUCKET}/{tmp_path.name}", weed.endpoint)
