"""The store that compactors are tested with, unless a test asks for either."""

from pathlib import Path

import pytest

from storage.objects.keys import ObjectStore
from storage.objects.open import open_store


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store(f"file://{tmp_path}/store")
