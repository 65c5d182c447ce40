"""Extent: when compacted objects begin and end, and which are nearest to a window."""

import itertools
import time
from collections.abc import Collection, Iterator

from storage.blocks.manifest import is_known, manifests_prefix, start_s_of
from storage.objects.keys import NS_PER_S, StoreError, type_in_key
from storage.objects.tenant import HOUR_NS
from storage.profile import ALWAYS, ProfileError, Window
from storage.query.blocks import Blocks
from storage.query.compacted import CompactedDay

_NAMES_KEPT_S = 30.0


def span_of(blocks: Blocks, type_: str) -> Window | None:
    """Return when compacted objects begin and end; None if there are none."""
    starts_ns = _hour_starts_ns(blocks, type_)
    spans = (_span_of_hour(blocks, at_ns, type_) for at_ns in starts_ns)
    first = next((span for span in spans if span is not None), None)
    spans = (_span_of_hour(blocks, at_ns, type_) for at_ns in reversed(starts_ns))
    last = next((span for span in spans if span is not None), None)
    return first.union(last) if first is not None and last is not None else None


def nearest_to(blocks: Blocks, window: Window, type_: str) -> list[Window]:
    """Return when the last compacted object before a window is from, and the first after it."""
    starts_ns = _hour_starts_ns(blocks, type_)
    before = Window(0, window.start_ns)
    after = Window(window.end_ns, ALWAYS.end_ns)
    earlier = (at_ns for at_ns in reversed(starts_ns) if at_ns < before.end_ns)
    later = (at_ns for at_ns in starts_ns if at_ns + HOUR_NS > after.start_ns)
    last = (_edges_of(blocks, at_ns, before, type_) for at_ns in earlier)
    first = (_edges_of(blocks, at_ns, after, type_) for at_ns in later)
    near = [edges[1] for edges in itertools.islice(filter(None, last), 1)]
    near += [edges[0] for edges in itertools.islice(filter(None, first), 1)]
    return near


def _span_of_hour(blocks: Blocks, start_ns: int, type_: str) -> Window | None:
    """Return when the compacted objects of an hour begin and end, all of it if in doubt."""
    whole = Window(start_ns, start_ns + HOUR_NS)
    hours, skipped = blocks.hours(whole, type_)
    if any(isinstance(hour, CompactedDay) for hour in hours):
        return whole
    parts = [part for hour in hours for part in hour.parts]
    if not parts:
        return whole if skipped else None
    start_s = min(part.start_s for part in parts)
    return Window(start_s * NS_PER_S, max(part.end_s for part in parts) * NS_PER_S)


def _edges_of(
    blocks: Blocks, start_ns: int, window: Window, type_: str
) -> tuple[Window, Window] | None:
    """Return the first and the last compacted object of an hour that start in a window."""
    for hour in blocks.hours(Window(start_ns, start_ns + HOUR_NS), type_).hours:
        cut = hour.cut(window)
        if cut is None:
            continue
        try:
            return blocks.edges(cut)
        except (ProfileError, StoreError, OSError):
            return cut.window, cut.window
    return None


def _hour_starts_ns(blocks: Blocks, type_: str) -> list[int]:
    """Return when the hours that may have something start, sorted, as known for half a minute."""
    read_s, starts_ns = blocks.known_starts.get(type_, (-_NAMES_KEPT_S, []))
    if time.monotonic() - read_s > _NAMES_KEPT_S:
        prefix = manifests_prefix(blocks.store.tenant, type_in_key(type_))
        names = (
            stored.key.removeprefix(prefix).removesuffix(".json")
            for stored in blocks.store.store.list(prefix)
        )
        starts_ns = sorted(_starts_of({name for name in names if is_known(name)}))
        blocks.known_starts[type_] = (time.monotonic(), starts_ns)
    return starts_ns


def _starts_of(names: Collection[str]) -> Iterator[int]:
    """Return when the hours of some manifests start, and all hours of days that have none left."""
    have_hours = {name[:10] for name in names if "T" in name}
    for name in names:
        if "T" in name:
            yield start_s_of(name) * NS_PER_S
        elif name not in have_hours:
            first_ns = start_s_of(name) * NS_PER_S
            yield from range(first_ns, first_ns + 24 * HOUR_NS, HOUR_NS)
