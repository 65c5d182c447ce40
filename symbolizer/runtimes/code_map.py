"""Which code is at an address, as a just-in-time compiler has written it down entry by entry.

A compiler reuses memory, so entries overlap, and the later one holds. Their number is bounded: what
a process writes about itself may be anything.
"""

from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

Value = TypeVar("Value")
Integers = npt.NDArray[np.int64]

MAX_RANGES = 200_000
"""Of one map. Large programs have some ten thousand functions."""
MAX_VALUE_BYTES = 32 << 20
_UNUSED_VALUES = 1024
_END_OF_ADDRESSES = 1 << 63


class _Entries(NamedTuple):
    """Ranges in the order in which they were written, and which value each has."""

    starts: Integers
    ends: Integers
    values: Integers


class CodeMap(Generic[Value]):
    """Values by ranges of addresses. `size_bytes` is what they take, about.

    Attributes:
        dropped: how many ranges were beyond a limit; the oldest ones go.
    """

    def __init__(
        self, max_ranges: int = MAX_RANGES, max_value_bytes: int = MAX_VALUE_BYTES
    ) -> None:
        self.dropped = 0
        self._max_ranges, self._max_value_bytes = max_ranges, max_value_bytes
        self._new: list[tuple[int, int, Value, int]] = []
        self._new_bytes = self._kept_bytes = 0
        self._values: list[Value] = []
        self._sizes = np.zeros(0, np.int64)
        none = np.zeros(0, np.int64)
        self._kept = _Entries(none, none, none)
        """Without overlaps, by address."""

    @property
    def size_bytes(self) -> int:
        return self._kept_bytes + self._new_bytes + 64 * (len(self._values) + len(self._new))

    def add(self, start: int, size: int, value: Value, value_bytes: int) -> None:
        """Add a range, which replaces what was there; one that cannot be is left out."""
        end = start + size
        if start < 0 or size <= 0 or end > _END_OF_ADDRESSES:
            return
        self._new.append((start, min(end, _END_OF_ADDRESSES - 1), value, value_bytes))
        self._new_bytes += value_bytes
        if len(self._new) >= self._max_ranges or self._new_bytes >= self._max_value_bytes:
            self._settle()

    def find(self, addresses: Sequence[int]) -> list[tuple[int, int, Value]]:
        """Return the ranges that hold any of these addresses, each once: start, end, value.

        Such a range ends where a later entry begins.
        """
        self._settle()
        starts, ends, values = self._kept
        if not len(starts):
            return []
        wanted = np.array([a for a in addresses if 0 <= a < _END_OF_ADDRESSES], np.int64)
        places = np.unique(np.searchsorted(starts, wanted, side="right") - 1)
        asked = np.sort(wanted)
        # The last address before the end of a range has to be in it.
        last = np.searchsorted(asked, ends[places]) - 1
        places, last = places[places >= 0], last[places >= 0]
        places = places[(last >= 0) & (asked[last] >= starts[places])]
        return [
            (start, end, self._values[value])
            for start, end, value in zip(
                *(column[places].tolist() for column in (starts, ends, values)), strict=True
            )
        ]

    def _settle(self) -> None:
        """Put what is new into place. This touches only what it overlaps: most is left as it is."""
        if not self._new:
            return
        new, self._new, count = self._new, [], len(self._values)
        self._kept_bytes, self._new_bytes = self._kept_bytes + self._new_bytes, 0
        entries = _Entries(
            np.array([each[0] for each in new], np.int64),
            np.array([each[1] for each in new], np.int64),
            np.arange(count, count + len(new)),
        )
        self._values += [each[2] for each in new]
        self._sizes = np.append(self._sizes, np.array([each[3] for each in new], np.int64))
        is_hit = _overlapped(self._kept, entries)
        hit, rest = (
            _Entries(*(column[places] for column in self._kept)) for places in (is_hit, ~is_hit)
        )
        by_age = np.argsort(hit.values, kind="stable")  # values are numbered as they were added
        every = (np.append(h[by_age], e) for h, e in zip(hit, entries, strict=True))
        flat = _flatten(_Entries(*every))
        places = np.searchsorted(rest.starts, flat.starts)
        self._kept = _Entries(
            *(np.insert(one, places, other) for one, other in zip(rest, flat, strict=True))
        )
        is_much = len(self._kept.starts) > self._max_ranges
        is_much |= self._kept_bytes > self._max_value_bytes
        if is_much or len(self._values) > 2 * len(self._kept.starts) + _UNUSED_VALUES:
            self._compact()

    def _compact(self) -> None:
        """Drop values that no address has any more, then the oldest ones up to the limits."""
        kept, sizes, values = self._kept, self._sizes, self._values
        used, ranges = np.unique(kept.values, return_counts=True)
        from_youngest = np.cumsum(ranges[::-1])
        bytes_from_youngest = np.cumsum(sizes[used][::-1])
        fits = (from_youngest <= self._max_ranges) & (bytes_from_youngest <= self._max_value_bytes)
        count = int(np.count_nonzero(fits))
        self.dropped += int(ranges[: len(used) - count].sum())
        used = used[len(used) - count :]
        is_kept = np.isin(kept.values, used)
        self._values = [values[number] for number in used.tolist()]
        self._sizes = sizes[used]
        self._kept_bytes = int(self._sizes.sum())
        self._kept = _Entries(
            kept.starts[is_kept],
            kept.ends[is_kept],
            np.searchsorted(used, kept.values[is_kept]).astype(np.int64),
        )


def _overlapped(kept: _Entries, entries: _Entries) -> npt.NDArray[np.bool_]:
    """Return which of the kept ranges any entry overlaps."""
    changes = np.zeros(len(kept.starts) + 1, np.int64)
    np.add.at(changes, np.searchsorted(kept.ends, entries.starts, side="right"), 1)
    np.add.at(changes, np.searchsorted(kept.starts, entries.ends, side="left"), -1)
    return np.cumsum(changes)[:-1] > 0


def _flatten(entries: _Entries) -> _Entries:
    """Return ranges without overlaps, by address: where several entries are, the last one is."""
    bounds = np.unique(np.concatenate([entries.starts, entries.ends]))
    first = np.searchsorted(bounds, entries.starts)
    last = np.searchsorted(bounds, entries.ends)
    latest = _latest(first, last, max(0, len(bounds) - 1))
    is_used = latest >= 0
    starts, ends = bounds[:-1][is_used], bounds[1:][is_used]
    values = entries.values[latest[is_used]]
    begins = np.append(True, (values[1:] != values[:-1]) | (starts[1:] != ends[:-1]))[: len(values)]
    stops = np.append(begins[1:], True)[: len(values)]
    return _Entries(starts[begins], ends[stops], values[begins])


def _latest(first: Integers, last: Integers, count: int) -> Integers:
    """Return for each of `count` places the number of the last interval [first, last) there, or -1.

    Each interval is the union of two of a power of two, which may overlap. So the numbers are noted
    for the largest powers first, and handed down to the two halves of each: n log n for all.
    """
    levels = np.frexp((last - first).astype(np.float64))[1].astype(np.int64) - 1
    noted = np.full(count, -1, np.int64)
    numbers = np.arange(len(first))
    for level in range(int(levels.max(initial=0)), -1, -1):
        here = levels == level
        for places in (first[here], last[here] - (1 << level)):
            np.maximum.at(noted, places, numbers[here])
        if level:
            half = 1 << (level - 1)
            upper = noted[:-half].copy()
            np.maximum(noted[half:], upper, out=noted[half:])
    return noted
