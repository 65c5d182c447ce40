"""Pins: windows of a tenant's profiles that nothing deletes, however old or large they are.

    v1/{tenant}/pins/{type}/{start_s}-{end_s}-{name16}.json

`start_s` and `end_s` have 11 digits, `name16` is the start of the SHA-256 of the pin's name. The
window stands in the key, so a listing says what is kept, and a pin whose content is damaged keeps
it all the same. The content is JSON: schema, name, note, created_ms.

Whatever overlaps a pinned window is kept: level-0 objects, all files of its compacted hours, and
the rollups of its days. What deletes asks `Held` before each deletion. Lifecycle rules of a bucket
know nothing of pins, and neither do versions older than them.
"""

import re
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import orjson

from storage.objects.keys import (
    NS_PER_S,
    ObjectMissing,
    ObjectStore,
    StoredObject,
    content16,
    is_type,
)
from symbolizer.text import readable

SCHEMA = 1
LONGEST_NAME, LONGEST_NOTE = 100, 1000
_LAST_S = 99_999_999_999
"""As many digits as keys have; it is the year 5138."""
_BELIEVED_S = 5.0
"""How long a listing of the pins is believed by what deletes."""
_KEY = re.compile(
    r"(?P<type>[^/]+)/(?P<start_s>\d{11})-(?P<end_s>\d{11})-[0-9a-f]{16}\.json", re.ASCII
)


class PinError(ValueError):
    """A pin that cannot be made or found; the message says why."""


class Pin(NamedTuple):
    """A window that is kept; half-open, in whole seconds."""

    key: str
    type: str
    start_s: int
    end_s: int
    name: str
    note: str = ""
    created_ms: int = 0
    problem: str = ""
    """Why its content cannot be read. Its name is then its key."""

    @property
    def start_ns(self) -> int:
        return self.start_s * NS_PER_S

    @property
    def end_ns(self) -> int:
        return self.end_s * NS_PER_S

    def overlaps(self, start_ns: int, end_ns: int) -> bool:
        return self.start_ns < end_ns and start_ns < self.end_ns


class Pins:
    """The pins of a tenant."""

    def __init__(self, store: ObjectStore, tenant: str) -> None:
        self._store = store
        self._prefix = f"v1/{tenant}/pins/"

    def checked(self, type_: str, start_ns: int, end_ns: int, name: str, note: str = "") -> Pin:
        """Return a pin of a window, widened to whole seconds, that `add` can make.

        Raises:
            PinError: the type, the window, the name or the note cannot be one.
        """
        start_s, end_s = max(0, start_ns // NS_PER_S), min(-(-end_ns // NS_PER_S), _LAST_S)
        if not is_type(type_):
            raise PinError(f"{type_!r} is not a type of profiles (try cpu)")
        if start_s >= end_s:
            raise PinError("cannot pin this window: it must end after it starts")
        if not (name and _is_plain(name) and len(name) <= LONGEST_NAME):
            raise PinError(
                f"{name[:LONGEST_NAME]!r} cannot be the name of a pin: use 1 to {LONGEST_NAME}"
                " printable characters"
            )
        if len(note) > LONGEST_NOTE or not _is_plain(note):
            raise PinError(f"a note has at most {LONGEST_NOTE} printable characters, on one line")
        name16 = content16(name.encode())
        key = f"{self._prefix}{type_}/{start_s:011d}-{end_s:011d}-{name16}.json"
        return Pin(key, type_, start_s, end_s, name, note, time.time_ns() // 1_000_000)

    def add(self, pin: Pin) -> None:
        """Keep a window from now on. Adding an equal pin again is harmless: the first one stays.

        Raises:
            PinError: there is a pin of this name for another window or type.
        """
        if any(other.name == pin.name and other.key != pin.key for other in self.every()):
            raise PinError(
                f"there is a pin {pin.name!r} of another window or type: give another --name, or"
                " remove that one first"
            )
        content = {
            "schema": SCHEMA, "name": pin.name, "note": pin.note, "created_ms": pin.created_ms,
        }  # fmt: skip
        self._store.put(pin.key, orjson.dumps(content))

    def remove(self, name: str) -> Pin:
        """Remove the pin of this name, or of this key; return it.

        Raises:
            PinError: there is none.
        """
        every = list(self.every())
        for pin in every:
            if name in {pin.name, pin.key}:
                self._store.delete(pin.key)
                return pin
        names = ", ".join(pin.name for pin in every) or "none"
        raise PinError(f"there is no pin {name!r} (there are: {names})")

    def every(self) -> Iterator[Pin]:
        """Return all pins by type and start, each with its content."""
        for pin, _ in self._listed():
            try:
                yield _with_content(pin, self._store.get(pin.key))
            except ObjectMissing:
                continue  # it has just been removed

    def windows(self) -> list[Pin]:
        """Return all pins without their contents, which takes a listing alone."""
        return [pin for pin, _ in self._listed()]

    def strangers(self) -> list[str]:
        """Return the keys among the pins that are not a pin's, and keep nothing."""
        every = self._store.list(self._prefix)
        return [stored.key for stored in every if _parse(stored.key, self._prefix) is None]

    def _listed(self) -> Iterator[tuple[Pin, StoredObject]]:
        for stored in self._store.list(self._prefix):
            pin = _parse(stored.key, self._prefix)
            if pin is not None:
                yield pin, stored


class Held:
    """Says what the pins of a tenant hold, for what deletes. A pin holds 5 s after it was made."""

    def __init__(
        self, store: ObjectStore, tenant: str, now_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._pins = Pins(store, tenant)
        self._now_s = now_s
        self._listed_s = float("-inf")
        self._windows: list[Pin] = []

    def holds(self, type_: str, start_ns: int, end_ns: int) -> bool:
        """Return whether a pin holds what was measured in a window.

        Raises:
            StoreError: the pins cannot be listed. Nothing may be deleted then.
        """
        now_s = self._now_s()
        if now_s >= self._listed_s + _BELIEVED_S:
            self._windows = self._pins.windows()
            self._listed_s = now_s
        return any(pin.type == type_ and pin.overlaps(start_ns, end_ns) for pin in self._windows)


def _is_plain(text: str) -> bool:
    """Return whether a reader gets the text back as it is."""
    return readable(text.encode(errors="replace")) == text


def _parse(key: str, prefix: str) -> Pin | None:
    match = _KEY.fullmatch(key.removeprefix(prefix))
    if match is None or not is_type(match["type"]):
        return None
    return Pin(key, match["type"], int(match["start_s"]), int(match["end_s"]), key)


def _with_content(pin: Pin, content: bytes) -> Pin:
    try:
        read = orjson.loads(content)
        name, note, created_ms = read["name"], read.get("note", ""), read.get("created_ms", 0)
        if not (isinstance(name, str) and isinstance(note, str) and isinstance(created_ms, int)):
            raise TypeError("a field has another type")
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        return pin._replace(problem=f"it is damaged: {error}")
    name, note = (readable(text.encode(errors="replace")) for text in (name, note))
    return pin._replace(name=name, note=note, created_ms=created_ms)
