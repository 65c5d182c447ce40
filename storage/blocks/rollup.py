"""Rollups fold rare stacks, so that an hour of a fleet has not many more stacks than matter.

The stacks with 99 % of a block's samples are kept, and those with 99 % of its value: few
allocations may have most of the bytes. Each other one is counted as its longest prefix
that a kept stack begins with, and the location `[rest]` below it, as the agent does with what is
beyond its budgets. Totals stay exact. Blocks with few stacks keep them all.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from storage.columns import Columns
from storage.grouping import HashIndex, ranges, sort_distinct
from storage.hashing import Hasher, Hashes, Numbers, hash_locations
from storage.profile import Integers
from symbolizer.location import REST_LOCATION

FOLDED_ABOVE = 20_000
"""Stacks that a block keeps in any case."""
_KEPT_PERCENT = 99
_AT_ONCE = 1 << 21
"""Words whose prefixes are hashed at a time: each takes some 50 bytes meanwhile."""


@dataclass(frozen=True, slots=True, eq=False)
class Stacks:
    """Stacks by id, root first: stack i is `frame_ids[offsets[i]:offsets[i + 1]]`."""

    ids: Hashes
    offsets: Integers
    frame_ids: Hashes

    @classmethod
    def of(cls, columns: Columns) -> "Stacks":
        return cls(
            columns.stack_hashes,
            columns.stack_offsets.astype(np.int64),
            columns.location_hashes.take(columns.stack_words),
        )

    @classmethod
    def joined(cls, parts: Sequence["Stacks"]) -> "Stacks":
        if len(parts) == 1:
            return parts[0]
        lengths = [np.zeros(1, np.int64), *(np.diff(part.offsets) for part in parts)]
        nothing = np.zeros(0, np.uint64)
        return cls(
            np.concatenate([nothing, *(part.ids for part in parts)]),
            np.cumsum(np.concatenate(lengths)),
            np.concatenate([nothing, *(part.frame_ids for part in parts)]),
        )

    def take(self, numbers: Integers) -> "Stacks":
        starts = self.offsets[numbers]
        lengths = self.offsets[numbers + 1] - starts
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        return Stacks(self.ids[numbers], offsets, self.frame_ids[ranges(starts, lengths)])

    def chunks(self) -> "list[Integers]":
        """Return the numbers of all stacks in pieces of at most _AT_ONCE words, or of one stack."""
        bounds = np.searchsorted(
            self.offsets, np.arange(0, int(self.offsets[-1]) + _AT_ONCE, _AT_ONCE)
        )
        bounds = np.unique(np.concatenate([[0], bounds, [len(self.ids)]]))
        numbers = np.arange(len(self.ids))
        pieces = np.split(numbers, bounds[1:-1])
        return [each for each in pieces if len(each)]


@dataclass(frozen=True, slots=True, eq=False)
class Folded:
    """Stack `rare[i]` is counted as stack `folded[i]`; `stacks` are all that rare ones become."""

    rare: Hashes
    folded: Hashes
    stacks: Stacks


def rest_id(hasher: Hasher) -> int:
    """Return the id of the location `[rest]`."""
    texts = hasher.texts([REST_LOCATION.build_id.encode()])
    place = np.array([[0, REST_LOCATION.offset, 0]], dtype=np.uint64)
    return int(hash_locations(texts, place, np.zeros((0, 5), np.int64))[0])


def keep_common(ids: Hashes, *counts: Numbers) -> Hashes:
    """Return the stacks with the most of each count that have 99 % of it, sorted by id.

    Of equal counts the smaller ids come first.
    """
    kept = [np.zeros(0, np.uint64)]
    for each in counts:
        order = np.lexsort((ids, -each.astype(np.int64)))
        # Floats are close enough to choose by, and do not overflow.
        reached = np.cumsum(each[order].astype(np.float64))
        wanted = reached[-1] * (_KEPT_PERCENT / 100) if len(reached) else 0.0
        kept.append(ids[order[: int(np.searchsorted(reached, wanted)) + 1]])
    return np.unique(np.concatenate(kept))


def fold(stacks: Stacks, kept: Hashes, hasher: Hasher) -> Folded:
    """Fold the stacks that are not among the sorted `kept`."""
    is_kept = HashIndex(kept).find(stacks.ids) >= 0
    common = stacks.take(np.flatnonzero(is_kept))
    prefixes = [sort_distinct(_prefixes(common.take(piece), hasher)) for piece in common.chunks()]
    known = HashIndex(sort_distinct(np.concatenate([np.zeros(0, np.uint64), *prefixes])))
    rare = stacks.take(np.flatnonzero(~is_kept))
    folded = Stacks.joined([_fold_some(rare.take(piece), known, hasher) for piece in rare.chunks()])
    _, firsts = np.unique(folded.ids, return_index=True)
    return Folded(rare.ids, folded.ids, folded.take(firsts))


def _prefixes(stacks: Stacks, hasher: Hasher) -> Hashes:
    return hasher.prefixes(stacks.frame_ids.copy(), stacks.offsets)


def _fold_some(stacks: Stacks, known: HashIndex, hasher: Hasher) -> Stacks:
    """Return by stack what it is counted as; `known` are the prefixes of kept stacks."""
    prefixes = _prefixes(stacks, hasher)
    starts, lengths = stacks.offsets[:-1], np.diff(stacks.offsets)
    # Not all of a stack: what is left of it is the rest. A prefix of a known one is known as well.
    low, high = np.zeros_like(lengths), np.maximum(lengths - 1, 0)
    while len(open_ := np.flatnonzero(low < high)):
        middle = (low[open_] + high[open_] + 1) // 2
        wanted = prefixes[starts[open_] + middle - 1]
        is_known = known.find(wanted) >= 0
        low[open_] = np.where(is_known, middle, low[open_])
        high[open_] = np.where(is_known, high[open_], middle - 1)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(low + 1)])
    words = np.full(int(offsets[-1]), rest_id(hasher), dtype=np.uint64)
    words[ranges(offsets[:-1], low)] = stacks.frame_ids[ranges(starts, low)]
    numbers = np.arange(len(words))
    return Stacks(hasher.stacks(words, offsets, numbers), offsets, words)
