"""Stores that kill their process at a chosen change, before it is done.

What a store has is all that is left of a killed compactor, and only three requests change it. So
killing before each of these in turn is killing at every step that anybody else can tell from
another: to be killed after a change is to be killed before the next one.
"""

import os
import signal
from pathlib import Path
from typing import Any

from storage.objects.directory import DirectoryStore
from storage.objects.keys import ObjectStore
from storage.objects.s3 import S3Store
from tests.support.weed import BUCKET


class Deadly:
    """Kills the process instead of change number `dies_at` of a store; 0 for never."""

    dies_at = 0
    changes = 0

    def put(self, *what: Any) -> Any:
        self._die_or_count()
        return super().put(*what)

    def replace(self, *what: Any) -> Any:
        self._die_or_count()
        return super().replace(*what)

    def delete(self, *what: Any) -> Any:
        self._die_or_count()
        return super().delete(*what)

    def _die_or_count(self) -> None:
        self.changes += 1
        if self.changes == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)


class DeadlyDirectory(Deadly, DirectoryStore):
    pass


class DeadlyBucket(Deadly, S3Store):
    pass


def open_deadly(url: str, endpoint: str, dies_at: int) -> ObjectStore:
    """Return the store at `s3://BUCKET/prefix` or a path."""
    store: DeadlyDirectory | DeadlyBucket
    if url.startswith("s3://"):
        store = DeadlyBucket(BUCKET, url.removeprefix(f"s3://{BUCKET}/"), endpoint)
    else:
        store = DeadlyDirectory(Path(url))
    store.dies_at = dies_at
    return store
