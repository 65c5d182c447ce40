"""Tenant: the profiles of one tenant in an object store, found by their keys alone."""

import calendar
import heapq
import itertools
import re
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
    is_tenant,
    is_type,
    object_key,
    profiles_prefix,
    type_in_key,
)
from storage.objects.pins import Held

if TYPE_CHECKING:  # the uploader needs no numpy, which is a third of its memory
    from storage.profile import Profile, Window

HOUR_S, DAY_S = LONGEST_WINDOW_S, 24 * LONGEST_WINDOW_S
HOUR_NS = HOUR_S * NS_PER_S

_FOREVER_NS = 2**63
_UNTYPED_SLASHES = 2
"""In what follows the prefix in a key without a type: hour, host, name."""
_COMPACTED_SETTLED_NS = 2 * HOUR_NS
_WHOLE_DAY = "dd"
_TIME = r"(?P<type>[^/]+)/(?P<day>\d{4}-[01]\d-[0-3]\d)"
_MANIFEST = re.compile(_TIME + r"(?:T(?P<hour>[012]\d))?\.json", re.ASCII)
_BLOCK = re.compile(_TIME + r"/(?P<hour>[012]\d|dd)-[a-z0-9_]+-[0-9a-f]{16}\.parquet", re.ASCII)
"""Keys of what is compacted, without what those of all begin with."""
_NEWEST_LISTED = 1000  # S3 lists as many with one request


class _Listed(NamedTuple):
    place: str
    """The key from its hour on: what two layouts' keys of a profile have in common."""
    key: ObjectKey
    stored: StoredObject


class _Expirable(NamedTuple):
    """What is deleted at once: a profile, or a compacted hour or day."""

    start_ns: int
    end_ns: int
    is_profile: bool
    type: str
    objects: tuple[StoredObject, ...]

    @property
    def size_bytes(self) -> int:
        return sum(stored.size_bytes for stored in self.objects)

    @property
    def modified_ns(self) -> int:
        return max(stored.modified_ns for stored in self.objects)


def _age(each: _Expirable) -> tuple[int, bool, int]:
    """Return what sorts by hour: profiles by start, the compacted hour, the day if it ends then."""
    if each.is_profile:
        return (each.start_ns // HOUR_NS, False, each.start_ns)
    return ((each.end_ns - 1) // HOUR_NS, True, -each.start_ns)


def _by_hour(profiles: Iterator[_Listed]) -> Iterator[_Expirable]:
    """Return profiles that come by hour in the order of their starts."""
    for _, hour in itertools.groupby(profiles, lambda listed: listed.key.start_s // HOUR_S):
        for _, key, stored in sorted(hour, key=lambda listed: listed.key.start_s):
            yield _Expirable(key.start_ns, key.end_ns, True, key.type, (stored,))


def _window_of(name: str) -> tuple[int, int] | None:
    """Return when an hour (`2026-11-30T09`) or a day (`2026-11-30`) starts and ends, if it does."""
    is_hour = "T" in name
    try:
        start_s = calendar.timegm(time.strptime(name, "%Y-%m-%dT%H" if is_hour else "%Y-%m-%d"))
    except ValueError:
        return None
    return start_s * NS_PER_S, (start_s + (HOUR_S if is_hour else DAY_S)) * NS_PER_S


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
        """Return the store's name and, unless it is the default one, the tenant's."""
        if self.tenant == DEFAULT_TENANT:
            return str(self.store)
        return f"{self.store} (tenant {self.tenant})"

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

    def list_hour(
        self, start_ns: int, type_: str = CPU
    ) -> Iterator[tuple[ObjectKey, StoredObject]]:
        """Return the profiles that start in an hour, each once, by host and start, lazily."""
        previous = ""
        for place, key, stored in self._list_hours(start_ns, start_ns + HOUR_NS, {type_}):
            if place != previous:
                yield key, stored
            previous = place

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

    def expire(
        self, now_s: int, keep_s: int, keep_bytes: int, keep_compacted_s: int = 0
    ) -> Iterator[StoredObject]:
        """Delete the oldest profiles of all types and what is compacted; return what is deleted.

        Deletes profiles that ended `keep_s` ago, compacted hours and days that ended
        `keep_compacted_s` ago, then as much as exceeds `keep_bytes` in all; a limit of 0 is none.
        Other objects are kept, and so is a compacted hour or day that was written to within two
        hours: a compactor may be about to name a new file of it. What a pin holds is kept, too
        (`storage.objects.pins`), and its size counts towards `keep_bytes`.

        Raises:
            StoreRefused: some may not be deleted; all others were.
        """
        refusal: StoreRefused | None = None
        held = Held(self.store, self.tenant)
        types = {CPU, *self.types()}
        compacted = self._list_compacted() if keep_bytes or keep_compacted_s else []
        excess_bytes = self._size_bytes(types, compacted) - keep_bytes if keep_bytes else 0
        limits_ns = {
            True: (now_s - keep_compacted_s) * NS_PER_S if keep_compacted_s else 0,
            False: (now_s - keep_s) * NS_PER_S if keep_s else 0,
        }
        settled_ns = now_s * NS_PER_S - _COMPACTED_SETTLED_NS
        profiles = self._list_hours(0, _FOREVER_NS, types)
        for each in heapq.merge(_by_hour(profiles), compacted, key=_age):
            if not limits_ns:
                break
            is_compacted = not each.is_profile
            if is_compacted not in limits_ns:
                continue
            if excess_bytes <= 0 and each.end_ns > limits_ns[is_compacted]:
                del limits_ns[is_compacted]  # what follows of its kind is younger
                continue
            is_changing = is_compacted and each.modified_ns > settled_ns
            if is_changing or held.holds(each.type, each.start_ns, each.end_ns):
                continue
            for stored in each.objects:
                try:
                    self.store.delete(stored.key)
                except StoreRefused as error:
                    refusal = error
                else:
                    excess_bytes -= stored.size_bytes
                    yield stored
        if refusal is not None:
            raise refusal

    def _size_bytes(self, types: Collection[str], compacted: Collection["_Expirable"]) -> int:
        every = self._list_hours(0, _FOREVER_NS, types)
        profiles_bytes = sum(stored.size_bytes for _, _, stored in every)
        return profiles_bytes + sum(each.size_bytes for each in compacted)

    def _list_compacted(self) -> list["_Expirable"]:
        """Return the compacted hours and days by age, each with its manifest before its files.

        They are known by their keys alone: see `storage.blocks.manifest`.
        """
        found: dict[tuple[str, str], list[StoredObject]] = {}
        for folder, pattern in (("manifests", _MANIFEST), ("blocks", _BLOCK)):
            prefix = f"v1/{self.tenant}/{folder}/"
            for stored in self.store.list(prefix):
                match = pattern.fullmatch(stored.key.removeprefix(prefix))
                if match is None:
                    continue
                name = match["day"]
                if match["hour"] not in {None, _WHOLE_DAY}:
                    name = f"{name}T{match['hour']}"
                found.setdefault((match["type"], name), []).append(stored)
        every = [
            _Expirable(*window, is_profile=False, type=type_, objects=tuple(objects))
            for (type_, name), objects in found.items()
            if (window := _window_of(name)) is not None
        ]
        return sorted(every, key=_age)

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

    def types(self) -> Iterator[str]:
        """Return the types whose keys have one and that have a profile, listing one key of each."""
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


def list_tenants(store: ObjectStore) -> Iterator[str]:
    """Return the tenants that have an object in a store, listing one key of each."""
    start_after = "v1/"
    names: set[str] = set()
    while (stored := next(iter(store.list("v1/", start_after)), None)) is not None:
        name = stored.key.split("/")[1]
        if name in names:
            return
        names.add(name)
        if is_tenant(name):
            yield name
        start_after = f"v1/{name}/~"  # after all names in its folder


def _common_start(one: str, other: str) -> str:
    differing = (i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
    return one[: next(differing, len(one))]
