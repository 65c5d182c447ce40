"""Listing: what is nearest to a window, found with few keys."""

from storage.objects.keys import ObjectKey
from storage.objects.tenant import TenantStore
from storage.profile import ALWAYS, Window
from storage.query.listing import nearest_objects
from tests.support.stores import START_NS, MemoryStore, minutes


def test_the_nearest_objects_are_the_last_before_and_the_first_after_a_window() -> None:
    """Of 20,000 objects, a few keys and an hour are listed."""
    store = MemoryStore()
    stored = [
        ObjectKey("default", "0" * 16, START_NS // 10**9 + 60 * minute, 60, "0" * 16)
        for minute in range(20_000)
        if not 5_000 <= minute < 9_000
    ]
    for key in stored:
        store.put(key.text, b"")
    profiles = TenantStore(store)

    assert nearest_objects(profiles, minutes(6_000, 6_010)) == stored[4_999:5_001]
    assert nearest_objects(profiles, minutes(-9, 0)) == stored[:1]
    assert nearest_objects(profiles, Window(2**62, 2**62 + 1)) == stored[-1:]
    assert nearest_objects(profiles, Window(0, 1)) == stored[:1]
    assert nearest_objects(profiles, ALWAYS) == []

    assert store.listed < 250
