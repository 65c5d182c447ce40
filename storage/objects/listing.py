"""Listing: the profiles of a window, found by their keys alone, and the oldest ones removed."""

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
)

if TYPE_CHECKING:  # the uploader needs no numpy, which is a third of its memory
    from storage.profile import Window

_FOREVER_NS = 2**63


def list_window(
    store: ObjectStore, window: "Window", tenant: str = DEFAULT_TENANT
) -> Iterator[tuple[ObjectKey, StoredObject]]:
    """Return the profiles whose windows overlap `window`, by hour, host and start.

    Lists exactly the hours in question, and the one before for a window that reaches across.
    What is not a profile of ours is passed over.
    """
    yield from _list_between(store, window.start_ns, window.end_ns, tenant)


def _list_between(
    store: ObjectStore, start_ns: int, end_ns: int, tenant: str
) -> Iterator[tuple[ObjectKey, StoredObject]]:
    prefix = hours_prefix(tenant)
    first = hour_of(start_ns // NS_PER_S - LONGEST_WINDOW_S)
    last = hour_of((end_ns - 1) // NS_PER_S)
    # Behind the name of a folder SeaweedFS goes on behind the folder; with the slash, in it.
    for stored in store.list(prefix, start_after=f"{prefix}{first}/"):
        if stored.key[len(prefix) : len(prefix) + len(last)] > last:
            return
        key = ObjectKey.parse(stored.key)
        if key is not None and key.start_ns < end_ns and key.end_ns > start_ns:
            yield key, stored


def expire(
    store: ObjectStore, now_s: int, keep_s: int, keep_bytes: int, tenant: str = DEFAULT_TENANT
) -> Iterator[StoredObject]:
    """Delete the oldest profiles, and return each of them.

    Deletes those that ended `keep_s` ago, then as many as exceed `keep_bytes`; a limit of 0 is
    none. Whatever else lies in the store stays.
    """
    excess_bytes = 0
    if keep_bytes:
        every = _list_between(store, 0, _FOREVER_NS, tenant)
        excess_bytes = sum(stored.size_bytes for _, stored in every) - keep_bytes
    oldest_ns = (now_s - keep_s) * NS_PER_S if keep_s else 0
    by_hour = itertools.groupby(
        _list_between(store, 0, _FOREVER_NS, tenant),
        lambda pair: pair[0].start_s // LONGEST_WINDOW_S,
    )
    for _, hour in by_hour:
        for key, stored in sorted(hour, key=lambda pair: pair[0].start_s):
            if excess_bytes <= 0 and key.end_ns > oldest_ns:
                return
            store.delete(stored.key)
            excess_bytes -= stored.size_bytes
            yield stored
