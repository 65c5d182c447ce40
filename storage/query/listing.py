"""Listing: which objects a window holds, and into which spans of a host they are cut.

A span is an hour of one host, or ten minutes of it. Spans that lie wholly in a window are kept
merged (`storage.query.parts`), so that 24 hours of a host are 24 files and not 1,440.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from storage.objects.keys import CPU, NS_PER_S, ObjectKey, StoredObject
from storage.objects.tenant import TenantStore
from storage.profile import Window

HOUR_NS = 3600 * NS_PER_S
SPANS_NS = (HOUR_NS, HOUR_NS // 6)
"""Lengths of the spans that are kept merged: whole hours, and ten minutes of the hours in which a
window begins and ends. The last hour begins and ends inside an hour, and is what most people ask
for."""


class ListedObject(NamedTuple):
    key: ObjectKey
    stored: StoredObject


def never_interrupt() -> None:
    """Do nothing, where a caller wants to interrupt nothing."""


@dataclass(frozen=True, slots=True)
class Listing:
    """Lists the objects of a store. Safe to use from several threads."""

    store: TenantStore
    type: str = CPU
    check: Callable[[], None] = never_interrupt
    """Called between objects; what it raises ends the listing."""
    reuse_s: float = 0.0
    """For how long the listing of a window is used again."""
    _recent: dict[tuple[str, Window], tuple[float, list[ListedObject]]] = field(
        default_factory=dict
    )
    _whole: tuple[Window, list[ListedObject]] | None = None

    def of_type(self, type_: str) -> "Listing":
        """Return a listing of the profiles of another type."""
        return self if type_ == self.type else replace(self, type=type_, _whole=None)

    def once(self, window: Window) -> "Listing":
        """Return a listing that lists the hours of a window now, and answers from that."""
        (hours,) = union([window], HOUR_NS)
        return replace(self, _whole=(hours, list(self.objects(hours))))

    def held(self, window: Window) -> "Listing":
        """Return a listing that lists a window once, however often it is read."""
        if self.reuse_s:
            return self
        return replace(self, _whole=(window, list(self.objects(window))))

    def objects(self, window: Window) -> Iterator[ListedObject]:
        """Return the objects that start inside a window, by hour, host and start."""
        if self._whole is not None:
            hours, listed = self._whole
            if hours.start_ns <= window.start_ns and window.end_ns <= hours.end_ns:
                yield from (each for each in listed if is_inside(each.key, window))
                return
        if not self.reuse_s:
            yield from self._list(window)
            return
        oldest_s = time.monotonic() - self.reuse_s
        known = self._recent.get((self.type, window))
        if known is None or known[0] < oldest_s:
            known = (time.monotonic(), list(self._list(window)))
            for other in [key for key, (at_s, _) in list(self._recent.items()) if at_s < oldest_s]:
                self._recent.pop(other, None)
            self._recent[self.type, window] = known
        yield from known[1]

    def _list(self, window: Window) -> Iterator[ListedObject]:
        for key, stored in self._interruptible.list_window(window, self.type):
            if is_inside(key, window):
                yield ListedObject(key, stored)

    def nearest(self, window: Window) -> list[ObjectKey]:
        """Return the last object before a window and the first one after it, if there are any."""
        return nearest_objects(self._interruptible, window, self.type)

    def span(self) -> Window | None:
        """Return when the data of the store begin and end; None if there are none."""
        profiles = self._interruptible
        first, newest = profiles.first_object(0, self.type), profiles.newest_object(type_=self.type)
        if first is None or newest is None:
            return None
        return Window(first.start_ns, newest.end_ns)

    @property
    def _interruptible(self) -> TenantStore:
        return self.store.interruptible(self.check)


def nearest_objects(store: TenantStore, window: Window, type_: str = CPU) -> list[ObjectKey]:
    """Return the last object before a window and the first one after it, if there are any."""
    nearest = (
        store.newest_object(window.start_ns, type_),
        store.first_object(window.end_ns, type_),
    )
    return [key for key in nearest if key is not None]


def split_spans(
    objects: Iterable[ListedObject], start_ns: int, end_ns: int, spans_ns: Sequence[int]
) -> Iterator[tuple[list[ListedObject], bool]]:
    """Cut objects into spans of a host; return with each whether it lies wholly between two times.

    Spans that do not are cut into the shorter ones of `spans_ns`, if there are any.
    """

    def span_of(each: ListedObject) -> tuple[int, str]:
        return each.key.start_ns // spans_ns[0], each.key.host_id

    for (number, _), group in itertools.groupby(objects, span_of):
        part = list(group)
        if start_ns <= number * spans_ns[0] and (number + 1) * spans_ns[0] <= end_ns:
            yield part, True
        elif spans_ns[1:]:
            yield from split_spans(part, start_ns, end_ns, spans_ns[1:])
        else:
            yield part, False


def union(windows: Iterable[Window], grid_ns: int) -> list[Window]:
    """Return windows widened to multiples of a length, and joined where they meet; latest first."""
    joined: list[Window] = []
    for window in sorted(windows, reverse=True):
        start_ns = window.start_ns // grid_ns * grid_ns
        end_ns = -(-window.end_ns // grid_ns) * grid_ns
        if joined and joined[-1].start_ns <= end_ns:
            end_ns = max(end_ns, joined.pop().end_ns)
        joined.append(Window(start_ns, end_ns))
    return joined


def is_inside(key: ObjectKey, window: Window) -> bool:
    return window.start_ns <= key.start_ns < window.end_ns


def overlap(one: Window, other: Window) -> bool:
    return one.start_ns < other.end_ns and other.start_ns < one.end_ns
