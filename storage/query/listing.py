"""Listing: what a window holds: objects, and hours that are compacted. Cuts objects into spans.

A span is ten minutes of one host, the longest that objects wait for a compactor that runs as often.
Spans that lie wholly in a window are kept merged (`storage.query.parts`): a tenth of the files.
"""

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from storage.objects.keys import (
    CPU,
    NS_PER_S,
    DamagedObject,
    ObjectKey,
    ObjectMissing,
)
from storage.objects.tenant import TenantStore
from storage.profile import ProfileError, Window
from storage.query.blocks import Blocks
from storage.query.compacted import Compacted, CompactedDay, CompactedHour
from storage.query.coverage import ListedObject, Skipped
from storage.query.extent import nearest_to, span_of
from storage.query.threads import never_interrupt

HOUR_NS = 3600 * NS_PER_S
SPAN_NS = HOUR_NS // 6

_GONE = (
    "{:,} of its objects are only there compacted, without labels of single processes (pid, tid)"
)


class Listed(NamedTuple):
    """What a window holds: compacted hours, and the level-0 objects that are in none of them.

    The objects are in the order of hour, host and start. `skipped` are manifests that cannot be
    read: of their hours only the objects are there that are left.
    """

    objects: list[ListedObject]
    hours: list[Compacted]
    skipped: tuple[Skipped, ...] = ()

    def inside(self, window: Window) -> "Listed":
        """Return what of it starts in a window as well."""
        cuts = (hour.cut(window) for hour in self.hours)
        return Listed(
            [each for each in self.objects if is_inside(each.key, window)],
            [cut for cut in cuts if cut is not None],
            self.skipped,
        )


@dataclass(frozen=True, slots=True)
class Listing:
    """Lists what a store holds. Safe to use from several threads."""

    store: TenantStore
    blocks: Blocks
    type: str = CPU
    check: Callable[[], None] = never_interrupt
    """Called between objects; what it raises ends the listing."""
    reuse_s: float = 0.0
    """For how long the listing of a window is used again."""
    is_level0: bool = False
    """Lists all objects, and no compacted hours; names those of which some objects are gone."""
    _recent: dict[tuple[str, bool, Window], tuple[float, Listed]] = field(default_factory=dict)
    _whole: tuple[Window, Listed] | None = None

    def of_type(self, type_: str) -> "Listing":
        """Return a listing of the profiles of another type."""
        return self if type_ == self.type else replace(self, type=type_, _whole=None)

    def of_level0(self) -> "Listing":
        """Return a listing of level-0 objects, which have labels that compacted ones do not."""
        return self if self.is_level0 else replace(self, is_level0=True, _whole=None)

    def once(self, window: Window) -> "Listing":
        """Return a listing that lists the hours of a window now, and answers from that."""
        (hours,) = union([window], HOUR_NS)
        return replace(self, _whole=(hours, self.at(hours)))

    def held(self, window: Window) -> "Listing":
        """Return a listing that lists a window once, however often it is read."""
        if self.reuse_s:
            return self
        return replace(self, _whole=(window, self.at(window)))

    def at(self, window: Window) -> Listed:
        """Return what starts inside a window."""
        if self._whole is not None:
            hours, listed = self._whole
            if hours.start_ns <= window.start_ns and window.end_ns <= hours.end_ns:
                return listed.inside(window)
        if not self.reuse_s:
            return self._list(window)
        oldest_s = time.monotonic() - self.reuse_s
        name = (self.type, self.is_level0, window)
        known = self._recent.get(name)
        if known is None or known[0] < oldest_s:
            known = (time.monotonic(), self._list(window))
            for other in [key for key, (at_s, _) in list(self._recent.items()) if at_s < oldest_s]:
                self._recent.pop(other, None)
            self._recent[name] = known
        return known[1]

    def _list(self, window: Window) -> Listed:
        if self.is_level0:
            return self._list_level0(window)
        listed, is_known = self._list_once(window)
        # Files may have been replaced and deleted since their manifest was read.
        return listed if is_known else self._list_once(window)[0]

    def _list_level0(self, window: Window) -> Listed:
        hours, skipped = self.blocks.hours(window, self.type)
        there = self._interruptible.list_window(window, self.type)
        objects = [ListedObject(*each) for each in there if is_inside(each[0], window)]
        contents = CompactedContents(self.blocks, hours)
        gone = (contents.gone(hour, self._interruptible, self.type) for hour in hours)
        return Listed(objects, [], (*skipped, *(each for each in gone if each is not None)))

    def _list_once(self, window: Window) -> tuple[Listed, bool]:
        """List a window; return also whether it is known of all hours what of them is compacted."""
        # The manifests first: what is compacted meanwhile is still an object here.
        compacted = self.blocks.hours(window, self.type)
        contents = CompactedContents(self.blocks, compacted.hours)
        objects = [
            ListedObject(key, stored)
            for piece in self._unsettled(window, compacted.hours)
            for key, stored in self._interruptible.list_window(piece, self.type)
            if is_inside(key, piece) and not contents.has(key)
        ]
        hours = [hour for hour in compacted.hours if hour.start_ns not in contents.problems]
        unlisted = [hour for hour in hours if self.blocks.is_settled(hour)]
        unreadable = [
            each
            for hour in unlisted
            if isinstance(hour, CompactedHour)
            for each in hour.manifest.unreadable
        ]
        quarantined = (Skipped(each.key, each.reason) for each in unreadable)
        problems = (*compacted.skipped, *contents.problems.values())
        return Listed(objects, hours, (*problems, *quarantined)), not contents.problems

    def _unsettled(self, window: Window, hours: Iterable[Compacted]) -> Iterator[Window]:
        """Return the pieces of a window whose objects are to be listed, in order."""
        start_ns = window.start_ns
        settled = (
            piece
            for hour in hours
            if self.blocks.is_settled(hour)
            for piece in (hour.held if isinstance(hour, CompactedDay) else (hour.window,))
        )
        for piece in sorted(settled):
            if start_ns < piece.start_ns:
                yield Window(start_ns, piece.start_ns)
            start_ns = piece.end_ns
        if start_ns < window.end_ns:
            yield Window(start_ns, window.end_ns)

    def nearest(self, window: Window) -> list[Window]:
        """Return when the last data before a window are from, and the first ones after it."""
        objects = nearest_objects(self._interruptible, window, self.type)
        near = [Window(key.start_ns, key.end_ns) for key in objects]
        near += nearest_to(self.blocks, window, self.type)
        before = [each for each in near if each.start_ns < window.start_ns]
        after = [each for each in near if each.start_ns >= window.end_ns]
        return [*sorted(before, key=lambda each: each.end_ns)[-1:], *sorted(after)[:1]]

    def span(self) -> Window | None:
        """Return when the data of the store begin and end; None if there are none."""
        profiles = self._interruptible
        first, newest = profiles.first_object(0, self.type), profiles.newest_object(type_=self.type)
        spans = [span_of(self.blocks, self.type)]
        if first is not None and newest is not None:
            spans.append(Window(first.start_ns, newest.end_ns))
        known = [span for span in spans if span is not None]
        return functools.reduce(Window.union, known) if known else None

    @property
    def _interruptible(self) -> TenantStore:
        return self.store.interruptible(self.check)


class CompactedContents:
    """Which level-0 objects are compacted.

    Where that cannot be read, the hour cannot be read either, and its objects are what is left.
    """

    def __init__(self, blocks: Blocks, hours: Iterable[Compacted]) -> None:
        self.problems: dict[int, Skipped] = {}
        """By when an hour starts."""
        self._blocks = blocks
        self._hours = {hour.start_ns: hour for hour in hours if hour.parts}
        self._known: dict[int, list[frozenset[str]]] = {}

    def has(self, key: ObjectKey) -> bool:
        """Return whether an object is compacted.

        Raises:
            StoreError: the store cannot be read.
        """
        hour = self._hours.get(key.start_ns // HOUR_NS * HOUR_NS)
        return hour is not None and any(key.content16 in each for each in self._of(hour))

    def gone(self, hour: Compacted, store: TenantStore, type_: str) -> Skipped | None:
        """Return how many objects of a whole hour are only there compacted; None if none is."""
        left = set[str]().union(*self._of(hour))
        left.difference_update(key.content16 for key, _ in store.list_hour(hour.start_ns, type_))
        if left:
            return Skipped(hour.name, _GONE.format(len(left)))
        return self.problems.get(hour.start_ns)

    def _of(self, hour: Compacted) -> list[frozenset[str]]:
        if hour.start_ns not in self._known:
            try:
                self._known[hour.start_ns] = self._blocks.contents(hour)
            except (ProfileError, ObjectMissing, DamagedObject, OSError) as error:
                self._known[hour.start_ns] = []
                self.problems[hour.start_ns] = Skipped(hour.name, str(error))
        return self._known[hour.start_ns]


def nearest_objects(store: TenantStore, window: Window, type_: str = CPU) -> list[ObjectKey]:
    """Return the last object before a window and the first one after it, if there are any."""
    nearest = (
        store.newest_object(window.start_ns, type_),
        store.first_object(window.end_ns, type_),
    )
    return [key for key in nearest if key is not None]


def split_spans(
    objects: Iterable[ListedObject], start_ns: int, end_ns: int
) -> Iterator[tuple[list[ListedObject], bool]]:
    """Cut objects into spans; return with each whether it lies wholly between two times."""

    def span_of(each: ListedObject) -> tuple[int, str]:
        return each.key.start_ns // SPAN_NS, each.key.host_id

    for (number, _), group in itertools.groupby(objects, span_of):
        yield list(group), start_ns <= number * SPAN_NS and (number + 1) * SPAN_NS <= end_ns


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
