"""Stores for tests: directories with profiles at chosen minutes."""

import dataclasses
import hashlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from storage.formats import pprof
from storage.objects.directory import DirectoryStore
from storage.objects.keys import ObjectKey, ObjectMissing, StoredObject, check_key, check_range
from storage.objects.tenant import TenantStore
from storage.profile import Host, Profile, Window

START_NS = 1_780_000_000_000_000_000 // 3_600_000_000_000 * 3_600_000_000_000
MINUTE_NS = 60_000_000_000


def minutes(first: int, last: int) -> Window:
    return Window(START_NS + first * MINUTE_NS, START_NS + last * MINUTE_NS)


def at(
    profile: Profile, minute: int, host: str = "web-1", host_id: str = "00112233445566aa"
) -> Profile:
    """Move a profile to a minute after START_NS, on some host."""
    accounting = dataclasses.replace(profile.accounting, hosts=(Host(host, host_id),))
    return dataclasses.replace(profile, window=minutes(minute, minute + 1), accounting=accounting)


def put(store: DirectoryStore, profile: Profile) -> ObjectKey:
    content = pprof.encode(profile)
    return TenantStore(store).put_profile(profile, content)[0]


def directory(folder: Path, *profiles: Profile) -> DirectoryStore:
    store = DirectoryStore(folder)
    for profile in profiles:
        put(store, profile)
    return store


class CountingStore(DirectoryStore):
    """A directory that notes which objects are read, and how many keys are listed."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.read: list[str] = []
        self.listed = 0

    def get(self, key: str) -> bytes:
        self.read.append(key)
        return super().get(key)

    def list(self, prefix: str, start_after: str = "") -> Iterator[StoredObject]:
        for stored in super().list(prefix, start_after):
            self.listed += 1
            yield stored


class MemoryStore:
    """Objects in memory; `listed` counts the keys that its listings have returned."""

    def __init__(self) -> None:
        self._objects: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self.listed = 0

    def put(self, key: str, content: bytes) -> bool:
        check_key(key)
        is_new = key not in self._objects
        self._objects.setdefault(key, content)
        return is_new

    def replace(self, key: str, content: bytes, tag: str | None) -> str | None:
        check_key(key)
        with self._lock:
            if (self._tag(key) if key in self._objects else None) != tag:
                return None
            self._objects[key] = content
            return self._tag(key)

    def get_tagged(self, key: str) -> tuple[bytes, str]:
        return self.get(key), self._tag(key)

    def _tag(self, key: str) -> str:
        return hashlib.md5(self._objects[key]).hexdigest()

    def get(self, key: str) -> bytes:
        if key not in self._objects:
            raise ObjectMissing(f"there is no object {key!r}")
        return self._objects[key]

    def get_range(self, key: str, start: int, length: int) -> bytes:
        check_range(start, length)
        return self.get(key)[start : start + length]

    def list(self, prefix: str, start_after: str = "") -> Iterator[StoredObject]:
        for key in sorted(self._objects):
            if key.startswith(prefix) and key > start_after:
                self.listed += 1
                content = self._objects[key]
                yield StoredObject(key, len(content), time.time_ns(), self._tag(key))

    def delete(self, key: str) -> None:
        self._objects.pop(key, None)
