"""Tenant: the profiles of one tenant in an object store, found by their keys alone."""

import itertools
import time
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
_NEWEST_LISTED = 1000  # S3 lists as many with one request


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

        Lists exactly the hours in question, and the hour before, whose windows may reach into it.
        Objects that are not profiles are ignored.
        """
        start_ns, end_ns = window
        for key, stored in self._list_hours(start_ns - LONGEST_WINDOW_S * NS_PER_S, end_ns):
            if key.start_ns < end_ns and key.end_ns > start_ns:
                yield key, stored

    def first_object(self, after_ns: int = 0) -> ObjectKey | None:
        """Return the first profile in the order of listing that starts at `after_ns` or later.

        None if there is none. Its hour is the first with a profile; that hour is in the order of
        host ids, so another host's profile may start earlier in it. One key is listed.
        """
        return next(self._list_starts(after_ns, _FOREVER_NS), None)

    def newest_object(self, before_ns: int = _FOREVER_NS) -> ObjectKey | None:
        """Return the profile that starts last, before `before_ns`; None if there is none.

        Stores list forwards only, so the last hour with a profile is searched from now on in
        growing steps: each step lists one key. Then that hour is listed, but no more than
        1,000 profiles, which is one request to S3: of a fleet with more, the host that is last
        by its id may have a profile that is newer by as much as uploads are late.
        """
        hour_ns = LONGEST_WINDOW_S * NS_PER_S
        newest = self._find_last_hour(min(time.time_ns(), before_ns - 1) // hour_ns, before_ns)
        if newest is None:
            return None
        listed = self._list_starts(newest * hour_ns, before_ns)
        return max(
            itertools.islice(listed, _NEWEST_LISTED), key=lambda key: (key.start_s, key.length_s)
        )

    def _find_last_hour(self, hour: int, before_ns: int) -> int | None:
        """Return the last hour since 1970 with a profile that starts before `before_ns`.

        Searches outwards from `hour`: profiles may also be from the future of this clock.
        """
        hour_ns = LONGEST_WINDOW_S * NS_PER_S

        def find_from(hour: int) -> int | None:
            key = next(self._list_starts(hour * hour_ns, before_ns), None)
            return None if key is None else key.start_ns // hour_ns

        found, step = find_from(hour), 1
        empty = hour
        if found is None:
            while found is None:
                if hour <= 0:
                    return None
                empty, hour = hour, max(0, hour - step)
                found, step = find_from(hour), step * 2
        else:
            while (later := find_from(found + step)) is not None:
                found, step = later, step * 2
            empty = found + step
        # A profile is in hour `found`; none is in hour `empty` or later.
        while found + 1 < empty:
            middle = (found + 1 + empty) // 2
            later = find_from(middle)
            if later is None:
                empty = middle
            else:
                found = later
        return found

    def _list_starts(self, start_ns: int, end_ns: int) -> Iterator[ObjectKey]:
        for key, _ in self._list_hours(start_ns, end_ns):
            if start_ns <= key.start_ns < end_ns:
                yield key

    def _list_hours(self, start_ns: int, end_ns: int) -> Iterator[tuple[ObjectKey, StoredObject]]:
        """Return the profiles of all hours that overlap the interval, by hour, host and start."""
        prefix = hours_prefix(self.tenant)
        first, last = (hour_of(at_ns // NS_PER_S) for at_ns in (start_ns, end_ns - 1))
        # SeaweedFS skips a folder if `start_after` is its name; with the slash, it lists it.
        for stored in self.store.list(prefix, start_after=f"{prefix}{first}/"):
            if stored.key[len(prefix) : len(prefix) + len(last)] > last:
                return
            key = ObjectKey.parse(stored.key)
            if key is not None:
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
