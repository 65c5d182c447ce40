"""Rollups fold rare stacks, so that an hour of a fleet has not many more stacks than matter.

The stacks with 99 % of the samples are kept, and those with 99 % of the value: few allocations may
have most of the bytes. Each other one is counted as its longest prefix that a kept stack begins
with, and the location `[rest]` below it, as the agent does with what is beyond its budgets. Totals
stay exact. Blocks with few stacks keep them all.

A block is folded, and so is all that is merged of it. What was folded before, by the agent too,
counts against the 1 %, and each time half of what is left of it may be folded: so however often
blocks are merged, 99 % are kept. A day folds again (`storage.blocks.daily`), and all that is left.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from storage.columns import Columns
from storage.grouping import HashIndex, group_keys, ranges
from storage.hashing import Hasher, Hashes, Numbers, hash_locations
from storage.profile import Integers
from symbolizer.location import REST_LOCATION

FOLDED_ABOVE = 20_000
"""Stacks that a block keeps in any case."""
_FOLDED_SHARE = 0.01
_SHARE_AT_ONCE = 0.5
"""Of what may be folded yet: what is merged may be folded again."""
_WORDS_AT_ONCE = 31
"""Frames by which stacks are sorted at once: 128 bytes each with the number of their group."""

_STACKS_AT_ONCE = 1 << 13
"""Stacks whose frames are looked at at once: each takes 1 kB meanwhile."""

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Stacks:
    """Stacks by id, root first: stack i is `frame_ids[offsets[i]:offsets[i + 1]]`."""

    ids: Hashes
    offsets: Integers
    frame_ids: Hashes

    @classmethod
    def of(cls, columns: Columns) -> "Stacks":
        """Return all stacks of a profile, sorted by the ids of their locations (`sort_stacks`)."""
        ranks = np.empty(len(columns.location_hashes), dtype=np.uint32)
        ranks[np.argsort(columns.location_hashes)] = np.arange(len(ranks), dtype=np.uint32)
        offsets = columns.stack_offsets.astype(np.int64)
        order = sort_stacks(offsets, ranks.take(columns.stack_words))
        starts, lengths = offsets[order], np.diff(offsets)[order]
        words = columns.stack_words.take(ranges(starts, lengths))
        return cls(
            columns.stack_hashes[order],
            np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
            columns.location_hashes.take(words),
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

    def end_with(self, frame_id: int) -> Flags:
        """Return whether a location is the last one, by stack."""
        is_last = np.zeros(len(self.ids), dtype=bool)
        has_frames = np.flatnonzero(np.diff(self.offsets))
        is_last[has_frames] = self.frame_ids[self.offsets[1:][has_frames] - 1] == frame_id
        return is_last

    def take(self, numbers: Integers) -> "Stacks":
        starts = self.offsets[numbers]
        lengths = self.offsets[numbers + 1] - starts
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        return Stacks(self.ids[numbers], offsets, self.frame_ids[ranges(starts, lengths)])


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


@dataclass(frozen=True, slots=True, eq=False)
class Common:
    """The stacks to keep, sorted by id, and by count the least that one has which is kept for it.

    That is 0 if none is.
    """

    ids: Hashes
    least: tuple[int, ...]


def keep_common(
    ids: Hashes, is_folded: Flags, *counts: Numbers, share: float = _SHARE_AT_ONCE
) -> Common:
    """Return the stacks to keep: those with the most of each count.

    What the other ones have, and those that are folded already, is 1 % of each count at most, or
    only the folded ones are left out. Of what may be folded yet a share is. Of equal counts the
    smaller ids come first.
    """
    by_id = np.argsort(ids)
    is_kept = np.zeros(len(ids), dtype=bool)
    least = []
    for each in counts:
        ordered, folded = each[by_id].astype(np.int64), is_folded[by_id]
        order = np.argsort(-ordered, kind="stable")
        order = order[~folded[order]]
        # Floats are close enough to choose by, and do not overflow.
        reached = np.cumsum(ordered[order].astype(np.float64))
        already = float(ordered[folded].sum(dtype=np.float64))
        whole = float(reached[-1]) if len(reached) else 0.0
        spare = max(0.0, (whole + already) * _FOLDED_SHARE - already) * share
        order = order[: int(np.searchsorted(reached, whole - spare)) + 1]
        is_kept[order] = True
        least.append(int(ordered[order].min()) if len(order) else 0)
    return Common(ids[by_id[is_kept]], tuple(least))


def sort_stacks(offsets: Integers, words: Numbers) -> Integers:
    """Return an order of stacks in which those that begin alike are neighbours.

    They are sorted by their words, which are below 2^32 - 1, root first.
    """
    starts, lengths = offsets[:-1], np.diff(offsets)
    order = np.arange(len(lengths))
    # Places in the order whose stacks are not told apart by their first words yet, and the number
    # of the group that is equal so far. The next words of all are sorted at once, as texts.
    places, groups, depth = order.copy(), np.zeros(len(order), np.uint32), 0
    while len(places):
        mine = order[places]
        counts = np.clip(lengths[mine] - depth, 0, _WORDS_AT_ONCE)
        keys = np.zeros((len(mine), 1 + _WORDS_AT_ONCE), dtype=">u4")
        keys[:, 0] = groups
        for first in range(0, len(mine), _STACKS_AT_ONCE):
            some = slice(first, first + _STACKS_AT_ONCE)
            row = np.repeat(np.arange(len(keys))[some], counts[some])
            column = 1 + ranges(np.zeros_like(counts[some]), counts[some])
            keys[row, column] = words[ranges(starts[mine[some]] + depth, counts[some])] + 1
        texts = keys.view(f"S{keys.itemsize * keys.shape[1]}")[:, 0]
        by_text = np.argsort(texts, kind="stable")
        mine, texts = mine[by_text], texts[by_text]
        order[places] = mine
        depth += _WORDS_AT_ONCE
        is_first = np.ones(len(texts), dtype=bool)
        is_first[1:] = texts[1:] != texts[:-1]
        group = np.cumsum(is_first) - 1
        goes_on = np.bincount(group, weights=lengths[mine] > depth) > 0
        is_open = (goes_on & (np.bincount(group) > 1))[group]
        places, groups = places[is_open], group[is_open].astype(np.uint32)
    return order


def fold(stacks: Stacks, kept: Hashes, hasher: Hasher) -> Folded:
    """Fold the stacks that are not among `kept`, which ascend. Stacks are sorted by their frames.

    So the kept one with the longest equal beginning is the nearest before or after.
    """
    is_kept = HashIndex(kept).find(stacks.ids) >= 0
    shared = shared_before(stacks)
    after = np.append(shared[1:], 0)
    longest = np.maximum(
        _least_since(shared, is_kept), _least_since(after[::-1], is_kept[::-1])[::-1]
    )
    rare = np.flatnonzero(~is_kept)
    starts, lengths = stacks.offsets[rare], stacks.offsets[rare + 1] - stacks.offsets[rare]
    # Not all of a stack: what is left of it is the rest.
    longest = np.minimum(longest[rare], np.maximum(lengths - 1, 0))
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(longest + 1)])
    words = np.full(int(offsets[-1]), rest_id(hasher), dtype=np.uint64)
    words[ranges(offsets[:-1], longest)] = stacks.frame_ids[ranges(starts, longest)]
    ids = hasher.stacks(words, offsets, np.arange(len(words)))
    firsts, order = group_keys(ids)
    # In their order, which is nearly sorted.
    distinct = np.sort(order[firsts])
    return Folded(stacks.ids[rare], ids, Stacks(ids, offsets, words).take(distinct))


def shared_before(stacks: Stacks) -> Integers:
    """Return by stack how many of its first frames are those of the stack before it."""
    shared = np.zeros(len(stacks.ids), dtype=np.int64)
    for first in range(0, len(shared), _STACKS_AT_ONCE):
        # The first of these is compared with the last of those before.
        some = np.arange(max(0, first - 1), min(first + _STACKS_AT_ONCE, len(shared)))
        shared[some[1:]] = _shared_of(stacks.take(some))[1:]
    return shared


def _shared_of(stacks: Stacks) -> Integers:
    lengths = np.diff(stacks.offsets)
    before = np.concatenate([np.zeros(1, np.int64), lengths[:-1]])
    numbers = np.arange(len(stacks.frame_ids))
    depth = numbers - np.repeat(stacks.offsets[:-1], lengths)
    back = np.repeat(before, lengths)
    differs = depth >= back
    differs |= stacks.frame_ids.take(numbers - back) != stacks.frame_ids
    depth[~differs] = len(numbers)
    shared = lengths.copy()
    has_frames = np.flatnonzero(lengths)
    if len(has_frames):
        first = np.minimum.reduceat(depth, stacks.offsets[:-1][has_frames])
        shared[has_frames] = np.minimum(first, lengths[has_frames])
    return shared


def _least_since(numbers: Integers, is_mark: Flags) -> Integers:
    """Return by place the least number since the last mark, which is after the marked place.

    Before the first mark it is 0.
    """
    marks: Integers = np.cumsum(is_mark) - is_mark
    # Numbers after a mark are all below those before it.
    step = np.int64(1) << 40
    least: Integers = np.minimum.accumulate(numbers - marks * step) + marks * step
    least[marks == 0] = 0
    return least
