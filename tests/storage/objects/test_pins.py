"""Pins: what they hold, and that they do so however damaged they are."""

import itertools

import pytest

from storage.objects.directory import DirectoryStore
from storage.objects.keys import NS_PER_S, ObjectStore, StoreUnavailable, hour_of
from storage.objects.pins import Held, Pin, PinError, Pins
from storage.objects.tenant import TenantStore
from tests.storage.objects.test_tenant import FIRST_S, HOUR_S, NOW_S, compacted, window_key
from tests.support.stores import MemoryStore


def add(store: ObjectStore, start_s: float, end_s: float, name: str, type_: str = "cpu") -> Pin:
    pins = Pins(store, "default")
    pin = pins.checked(type_, round(start_s * NS_PER_S), round(end_s * NS_PER_S), name, "why")
    pins.add(pin)
    return pin


def test_pins_are_kept_by_type_and_start_and_removed_by_name(store: ObjectStore) -> None:
    """Windows are widened to whole seconds; repeating a pin is harmless; tenants are apart."""
    later = add(store, 2000, 3000.5, "later")
    first = add(store, 99.5, 1000, "first")
    wall = add(store, 5, 6, "wall", "wall")
    again = Pins(store, "default").checked("cpu", 2000 * NS_PER_S, 3001 * NS_PER_S, "later", "new")
    Pins(store, "default").add(again)
    pins = Pins(store, "default")

    assert list(pins.every()) == [first, later, wall]
    assert (first.start_s, later.end_s, later.note) == (99, 3001, "why")
    assert list(Pins(store, "other").every()) == []
    assert pins.remove("first") == first
    assert pins.remove(wall.key) == wall
    assert list(pins.every()) == [later]
    with pytest.raises(PinError, match="there are: later"):
        pins.remove("first")


@pytest.mark.parametrize(
    ("type_", "start_s", "end_s", "name", "note"),
    [
        ("CPU/", 1, 2, "x", ""),
        ("cpu", 2, 2, "x", ""),
        ("cpu", 1, 2, "", ""),
        ("cpu", 1, 2, "x" * 101, ""),
        ("cpu", 1, 2, "\x1b[31m", ""),
        ("cpu", 1, 2, "x", "two\nlines"),
    ],
)
def test_what_cannot_be_a_pin_is_refused(type_, start_s, end_s, name, note) -> None:
    with pytest.raises(PinError):
        Pins(MemoryStore(), "default").checked(
            type_, start_s * NS_PER_S, end_s * NS_PER_S, name, note
        )


def test_a_name_stands_for_one_window(store: ObjectStore) -> None:
    add(store, 1, 2, "x")

    with pytest.raises(PinError, match="of another window or type"):
        add(store, 1, 3, "x")


@pytest.mark.parametrize("content", [b"", b"[]", b'{"name":7}', b'{"name":"x","note":[]}'])
def test_a_damaged_pin_holds_all_the_same(store: ObjectStore, content: bytes) -> None:
    """Its window stands in its key. What is no pin's key is named, and holds nothing."""
    key = "v1/default/pins/cpu/00000000010-00000000020-0123456789abcdef.json"
    store.put(key, content)
    store.put("v1/default/pins/cpu/note.json", b"{}")

    (pin,) = Pins(store, "default").every()

    assert (pin.name, pin.start_s, pin.end_s) == (key, 10, 20)
    assert "damaged" in pin.problem
    assert Held(store, "default").holds("cpu", 19 * NS_PER_S, 30 * NS_PER_S)
    assert Pins(store, "default").strangers() == ["v1/default/pins/cpu/note.json"]


def test_names_of_others_control_no_terminal(store: ObjectStore) -> None:
    key = "v1/default/pins/cpu/00000000010-00000000020-0123456789abcdef.json"
    store.put(key, b'{"name":"a\\u001b[2Jb","note":"\\u202e"}')

    (pin,) = Pins(store, "default").every()

    assert (pin.name, pin.note) == ("a\\x1b[2Jb", "\\u202e")


def test_what_deletes_soon_learns_of_new_pins(tmp_path) -> None:
    """And asks the store no more than every few seconds. Windows that only touch are not held."""
    store, clock = DirectoryStore(tmp_path), [0.0]
    held = Held(store, "default", lambda: clock[0])
    window = (100 * NS_PER_S, 200 * NS_PER_S)
    assert not held.holds("cpu", *window)
    add(store, 100, 101, "x")

    clock[0] = 6.0

    assert held.holds("cpu", *window)
    assert not held.holds("wall", *window)
    assert not held.holds("cpu", 101 * NS_PER_S, 200 * NS_PER_S)
    assert not held.holds("cpu", 0, 100 * NS_PER_S)


def test_directories_that_expire_keep_what_is_pinned(tmp_path) -> None:
    """From its age and from the size of all: level 0 and compacted hours, of one type and tenant.

    What is pinned counts towards the size, so more of the rest goes.
    """
    store = DirectoryStore(tmp_path)
    hours = [hour_of(FIRST_S + HOUR_S * hour) for hour in range(3)]
    profiles = [window_key(FIRST_S + HOUR_S * hour).text for hour in range(3)]
    by_hour = [[key, *compacted(hour, "cpu")] for key, hour in zip(profiles, hours, strict=True)]
    other = window_key(FIRST_S)._replace(tenant="other").text
    wall = window_key(FIRST_S, type_="wall").text
    for key in (*itertools.chain(*by_hour), other, wall):
        store.put(key, b"x" * 8)
    add(store, FIRST_S + 10, FIRST_S + 11, "x")

    removed = [each.key for each in TenantStore(store).expire(NOW_S, 0, 40)]

    assert removed == [wall, *by_hour[1], *by_hour[2]]
    assert list(TenantStore(store).expire(NOW_S, 1, 1, 1)) == []
    assert store.get(other) == b"x" * 8


def test_nothing_expires_while_the_pins_cannot_be_listed(tmp_path) -> None:
    class Away(DirectoryStore):
        def list(self, prefix, start_after=""):
            if "/pins/" in prefix:
                raise StoreUnavailable("it is away")
            return super().list(prefix, start_after)

    store = Away(tmp_path)
    store.put(window_key(FIRST_S).text, b"x")

    with pytest.raises(StoreUnavailable):
        list(TenantStore(store).expire(NOW_S, 1, 0))

    assert store.get(window_key(FIRST_S).text) == b"x"
