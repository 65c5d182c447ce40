"""Preparing: decode and keep what will be asked about a window before it is asked for."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from storage.columns import Columns, Times
from storage.profile import Window
from storage.query.coverage import ListedObject
from storage.query.function_totals import FunctionTotals
from storage.query.listing import HOUR_NS, SPANS_NS, split_spans
from storage.query.parts import SETTLED_AFTER_NS, Parts
from storage.query.resolve import LocationNames
from storage.query.self_samples import ObjectSelfSamples

_RECENT_NS = HOUR_NS * 5 // 2
"""Windows of the last hour begin inside of ten minutes, as does one before it that it is compared
with."""
_PREPARED_SHARE = 0.75
"""How much of the cache objects that nobody has asked for may take."""
_KINDS = (Columns, FunctionTotals, LocationNames, Times, ObjectSelfSamples)


class Prepared(NamedTuple):
    """A part of a window that was decoded and kept, and how many objects are left to decode."""

    objects: int
    left: int


def prepare(parts: Parts, window: Window) -> Iterator[Prepared]:
    """Decode and keep what will be asked about a window, its latest part first.

    Yields each part that was not kept before; a caller that stops iterating ends it. What is
    kept is marked as used. It goes back no further than most of the cache reaches.
    """
    settled_ns = parts.now_ns() - SETTLED_AFTER_NS
    groups = _groups_to_prepare(parts, window, settled_ns)
    reach_bytes = int(parts.cache.limit_bytes * _PREPARED_SHARE)
    kept_bytes: dict[str, int] = {}
    left_bytes = reach_bytes
    for name in groups:
        if left_bytes < 0:
            break
        kept_bytes[name] = _touch(parts, name)
        left_bytes -= kept_bytes[name]
    missing = {
        name
        for name, size in kept_bytes.items()
        if size == 0 and parts.unkept.get(name, 0) < settled_ns
    }
    left = sum(len(groups[name]) for name in missing)
    for name, size_bytes in kept_bytes.items():
        reach_bytes -= size_bytes
        if name in missing:
            _read_group(parts, groups[name])
            made_bytes = _touch(parts, name)
            if made_bytes == 0:  # it cannot be kept, as where types differ
                parts.unkept[name] = parts.now_ns()
            reach_bytes -= made_bytes
            left -= len(groups[name])
            yield Prepared(len(groups[name]), left)
        if reach_bytes < 0:
            return


def _groups_to_prepare(
    parts: Parts, window: Window, settled_ns: int
) -> dict[str, Sequence[ListedObject]]:
    """Return by name the latest hours by the spans of which they are made, then whole hours."""
    objects = parts.listing.at(window).objects
    recent = [each for each in objects if each.key.start_ns >= parts.now_ns() - _RECENT_NS]
    spans = [
        (listed, is_whole)
        for some, spans_ns in ((recent, SPANS_NS[1:]), (objects, SPANS_NS))
        for listed, is_whole in sorted(
            split_spans(some, window.start_ns, settled_ns, spans_ns),
            key=lambda part: -part[0][-1].key.end_ns,
        )
    ]
    return {
        parts.name(group): group
        for listed, is_whole in spans
        for group in ([listed] if is_whole else [[each] for each in reversed(listed)])
    }


def _touch(parts: Parts, name: str) -> int:
    """Mark what is kept under a name as used; return its size, 0 if a kind is missing."""
    sizes = [parts.cache.touch(kind, name) for kind in _KINDS]
    return sum(sizes) if all(sizes) else 0


def _read_group(parts: Parts, group: Sequence[ListedObject]) -> None:
    parts.columns.of(group)
    parts.function_totals.of(group)
    parts.location_names.of(group)
    parts.times.of(group)
    parts.self_samples.of(group)
