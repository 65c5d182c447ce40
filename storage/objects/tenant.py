"""Tenant: the profiles of one tenant in an object store, found by their keys alone."""

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from storage.objects.keys import (
    DEFAULT_TENANT,
    LONGEST_WINDOW_S,
    NS_PER_S,
    ObjectKey,
    ObjectStore,
    StoredObject,
    hour_of,
    hours_prefix,
    object_key,
)

if TYPE_CHECKING:  # the uploader needs no numpy, which is a third of its memory
    from storage.profile import Profile, Window

_FOREVER_NS = 2**63


class TenantStore:
    """An object store and whose profiles of it are meant: what readers and writers of them take.

    As safe to use from several threads as the store is.
    """

    def __init__(self, store: ObjectStore, tenant: str = DEFAULT_TENANT) -> None:
        self.store = store
        self.tenant = tenant

    def __str__(self) -> str:
        return str(self.store)

    def put_profile(self, profile: "Profile", content: bytes) -> tuple[ObjectKey, bool]:
        """Write an encoded profile; return its key, and False if it was stored before.

        Raises:
            ValueError: the window is longer than an hour.
        """
        key = object_key(profile, content, self.tenant)
        return key, self.store.put(key.text, content)

    def list_window(self, window: "Window") -> Iterator[tuple[ObjectKey, StoredObject]]:
        """Return the profiles whose windows overlap `window`, by hour, host and start, lazily.

        Lists exactly the hours in question, and the one before for a window that reaches across.
        Objects that are not profiles are ignored.
        """
        start_ns, end_ns = window
        prefix = hours_prefix(self.tenant)
        first = hour_of(start_ns // NS_PER_S - LONGEST_WINDOW_S)
        last = hour_of((end_ns - 1) // NS_PER_S)
        # Behind the name of a folder SeaweedFS goes on behind the folder; with the slash, in it.
        for stored in self.store.list(prefix, start_after=f"{prefix}{first}/"):
            if stored.key[len(prefix) : len(prefix) + len(last)] > last:
                return
            key = ObjectKey.parse(stored.key)
            if key is not None and key.start_ns < end_ns and key.end_ns > start_ns:
                yield key, stored

    def list_all(self) -> Iterator[tuple[ObjectKey | None, StoredObject]]:
        """Return every object stored among the profiles, by key; None for one that is none."""
        for stored in self.store.list(hours_prefix(self.tenant)):
            yield ObjectKey.parse(stored.key), stored

    def expire(self, now_s: int, keep_s: int, keep_bytes: int) -> Iterator[StoredObject]:
        """Delete the oldest profiles, and return each of them.

        Deletes those that ended `keep_s` ago, then as many as exceed `keep_bytes`; a limit of 0 is
        none. Other objects are kept.
        """
        excess_bytes = 0
        if keep_bytes:
            excess_bytes = sum(stored.size_bytes for _, stored in self._profiles()) - keep_bytes
        oldest_ns = (now_s - keep_s) * NS_PER_S if keep_s else 0
        by_hour = itertools.groupby(
            self._profiles(), lambda pair: pair[0].start_s // LONGEST_WINDOW_S
        )
        for _, hour in by_hour:
            for key, stored in sorted(hour, key=lambda pair: pair[0].start_s):
                if excess_bytes <= 0 and key.end_ns > oldest_ns:
                    return
                self.store.delete(stored.key)
                excess_bytes -= stored.size_bytes
                yield stored

    def _profiles(self) -> Iterator[tuple[ObjectKey, StoredObject]]:
        for key, stored in self.list_all():
            if key is not None:
                yield key, stored
