"""Tenant: the profiles of one tenant in an object store, found by their keys alone."""

import heapq
import itertools
import time
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, NamedTuple

from storage.objects.keys import (
    CPU,
    DEFAULT_TENANT,
    LONGEST_WINDOW_S,
    NS_PER_S,
    ObjectKey,
    ObjectStore,
    StoredObject,
    StoreRefused,
    hour_of,
    hours_prefix,
    is_type,
    object_key,
    profiles_prefix,
    type_in_key,
)

if TYPE_CHECKING:  # the uploader needs no numpy, which is a third of its memory
    from storage.profile import Profile, Window

HOUR_NS = LONGEST_WINDOW_S * NS_PER_S

_FOREVER_NS = 2**63
_UNTYPED_SLASHES = 2
"""In what follows the prefix in a key without a type: hour, host, name."""
_NEWEST_LISTED = 1000  # S3 lists as many with one request


class _Listed(NamedTuple):
    place: str
    """The key from its hour on: what two layouts' keys of a profile have in common."""
    key: ObjectKey
    stored: StoredObject


class TenantStore:
    """The profiles of one tenant in an object store: what readers and writers of profiles take.

    Safe to use from several threads, as the store is. `check` is called before each listing and
    for each of its keys; what it raises ends the listing.
    """

    def __init__(
        self,
        store: ObjectStore,
        tenant: str = DEFAULT_TENANT,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.store = store
        self.tenant = tenant
        self._check = check

    def __str__(self) -> str:
        return str(self.store)

    def interruptible(self, check: Callable[[], None]) -> "TenantStore":
        """Return the same profiles, whose listings end with what `check` raises."""
        return TenantStore(self.store, self.tenant, check)

    def put_profile(self, profile: "Profile", content: bytes) -> tuple[ObjectKey, bool]:
        """Write an encoded profile; return its key, and False if it was stored before.

        Raises:
            ValueError: the window is longer than an hour.
        """
        key = object_key(profile, content, self.tenant)
        return key, self.store.put(key.text, content)

    def list_window(
        self, window: "Window", type_: str = CPU
    ) -> Iterator[tuple[ObjectKey, StoredObject]]:
        """Return the profiles whose windows overlap `window`, by hour, host and start, lazily.

        Lists exactly the hours in question, and the hour before, whose windows may reach into it.
        A profile that is stored under both of its keys, with and without the type, is returned
        once. Objects that are not profiles are ignored.
        """
        start_ns, end_ns = window
        previous = ""
        for place, key, stored in self._list_hours(start_ns - HOUR_NS, end_ns, {type_}):
            if key.start_ns < end_ns and key.end_ns > start_ns and place != previous:
                yield key, stored
            previous = place

    def first_object(self, after_ns: int = 0, type_: str = CPU) -> ObjectKey | None:
        """Return the first profile in the order of listing that starts at `after_ns` or later.

        None if there is none. Its hour is the first with a profile; that hour is in the order of
        host ids, so another host's profile may start earlier in it. One key is listed.
        """
        return next(self.list_starts(after_ns, _FOREVER_NS, type_), None)

    def newest_object(self, before_ns: int = _FOREVER_NS, type_: str = CPU) -> ObjectKey | None:
        """Return the profile that starts last, before `before_ns`; None if there is none.

        Stores list forwards only, so the last hour with a profile is searched from now on in
        growing steps: each step lists one key. Then that hour is listed, but no more than
        1,000 profiles, which is one request to S3: of a fleet with more, the host that is last
        by its id may have a profile that is newer by as much as uploads are late.
        """
        newest = self._find_last_hour(
            min(time.time_ns(), before_ns - 1) // HOUR_NS, before_ns, type_
        )
        if newest is None:
            return None
        listed = self.list_starts(newest * HOUR_NS, before_ns, type_)
        return max(
            itertools.islice(listed, _NEWEST_LISTED), key=lambda key: (key.start_s, key.length_s)
        )

    def list_starts(self, start_ns: int, end_ns: int, type_: str = CPU) -> Iterator[ObjectKey]:
        """Return the profiles that start inside an interval, by hour, host and start, lazily."""
        for _, key, _ in self._list_hours(start_ns, end_ns, {type_}):
            if start_ns <= key.start_ns < end_ns:
                yield key

    def list_all(self) -> Iterator[tuple[ObjectKey | None, StoredObject]]:
        """Return every object stored where profiles are, by key; its key is None for no profile.

        A profile that is stored under both of its keys is returned once.
        """
        prefix = profiles_prefix(self.tenant)
        untyped: set[str] = set()  # hours sort before the names of types
        for stored in self.store.list(prefix):
            key = ObjectKey.parse(stored.key)
            place = stored.key.removeprefix(prefix)
            if key is not None and place.count("/") == _UNTYPED_SLASHES:
                untyped.add(place)
            elif key is not None and place.removeprefix(f"{CPU}/") in untyped:
                continue
            yield key, stored

    def expire(self, now_s: int, keep_s: int, keep_bytes: int) -> Iterator[StoredObject]:
        """Delete the oldest profiles of all types, and return each of them.

        Deletes those that ended `keep_s` ago, then as many as exceed `keep_bytes`; a limit of 0 is
        none. Other objects are kept.

        Raises:
            StoreRefused: some may not be deleted; all others were.
        """
        refusal: StoreRefused | None = None
        types = {CPU, *self._types()}
        excess_bytes = 0
        if keep_bytes:
            every = self._list_hours(0, _FOREVER_NS, types)
            excess_bytes = sum(stored.size_bytes for _, _, stored in every) - keep_bytes
        oldest_ns = (now_s - keep_s) * NS_PER_S if keep_s else 0
        every = self._list_hours(0, _FOREVER_NS, types)
        by_hour = itertools.groupby(every, lambda listed: listed[1].start_s // LONGEST_WINDOW_S)
        oldest_first = (
            each
            for _, hour in by_hour
            for each in sorted(hour, key=lambda listed: listed[1].start_s)
        )
        for _, key, stored in oldest_first:
            if excess_bytes <= 0 and key.end_ns > oldest_ns:
                break
            try:
                self.store.delete(stored.key)
            except StoreRefused as error:
                refusal = error
            else:
                excess_bytes -= stored.size_bytes
                yield stored
        if refusal is not None:
            raise refusal

    def _find_last_hour(self, hour: int, before_ns: int, type_: str) -> int | None:
        """Return the last hour since 1970 with a profile that starts before `before_ns`.

        Searches outwards from `hour`: profiles may also be from the future of this clock.
        """

        def find_from(hour: int) -> int | None:
            key = next(self.list_starts(hour * HOUR_NS, before_ns, type_), None)
            return None if key is None else key.start_ns // HOUR_NS

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

    def _list_hours(
        self, start_ns: int, end_ns: int, types: Collection[str]
    ) -> Iterator["_Listed"]:
        """Return the profiles of all hours that overlap the interval, by hour, host and start."""
        first, last = (hour_of(at_ns // NS_PER_S) for at_ns in (start_ns, end_ns - 1))
        layouts = [*map(type_in_key, types), *([None] if CPU in types else [])]
        listings = [self._list_layout(layout, first, last) for layout in layouts]
        return heapq.merge(*listings, key=lambda listed: listed.place)

    def _list_layout(self, type_: str | None, first: str, last: str) -> Iterator["_Listed"]:
        """Return the profiles of a type from hour `first` to `last`; None: keys without a type.

        Hours begin with a digit and types with a letter, so a listing of keys without a type ends
        at the first key with one.
        """
        prefix = hours_prefix(self.tenant, type_)
        # Both hours begin with it: S3 then returns no page of keys behind them.
        common = prefix + _common_start(first, last)
        # SeaweedFS skips a folder if `start_after` is its name; with the slash, it lists it.
        self._check()
        for stored in self.store.list(common, start_after=f"{prefix}{first}/"):
            self._check()
            place = stored.key[len(prefix) :]
            if place[: len(last)] > last:
                return
            key = ObjectKey.parse(stored.key)
            if key is not None:
                yield _Listed(place, key, stored)

    def _types(self) -> Iterator[str]:
        """Return the types that have a profile, listing one key of each."""
        prefix = profiles_prefix(self.tenant)
        start_after = f"{prefix}:"  # after all digits, before all letters
        names: set[str] = set()
        while (stored := next(self.store.list(prefix, start_after), None)) is not None:
            name = stored.key[len(prefix) :].partition("/")[0]
            if name in names:
                return
            names.add(name)
            if is_type(name):
                yield name
            start_after = f"{prefix}{name}/~"  # after all hours of the type


def _common_start(one: str, other: str) -> str:
    differing = (i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
    return one[: next(differing, len(one))]
