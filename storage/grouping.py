"""Grouping: find equal numbers of arrays by sorting, which is what merging consists of."""

from typing import Literal

import numpy as np

from storage.hashing import Hashes, Numbers
from storage.profile import Indices, Integers

_STEPS = 16
"""Of n evenly spread hashes hardly ever have more one beginning of log2(n) bits."""
_CACHED_BITS = 20
_MOST_PLACES = 8
"""Keys are found in a table of all possible ones, five bytes each, if those are at most so many
times as many: to sort keys takes longer."""
_AT_ONCE = 1 << 15
"""What is looked up at a time fits into the processor's cache."""


def group_keys(
    keys: Numbers, kind: Literal["quicksort", "stable"] = "quicksort"
) -> tuple[Integers, Integers]:
    """Return an order in which equal keys stand together, and where in it each group starts.

    Where most keys ascend already, `stable` takes half the time.
    """
    order = np.argsort(keys, kind=kind)
    ordered = keys[order]
    is_first = np.ones(len(keys), dtype=bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    return np.flatnonzero(is_first), order


def number_groups(firsts: Integers, order: Integers) -> Integers:
    """Return by key the number of its group; the arguments are what `group_keys` returns."""
    numbers = np.empty(len(order), dtype=np.int64)
    numbers[order] = np.repeat(np.arange(len(firsts)), np.diff(np.append(firsts, len(order))))
    return numbers


def add_groups(counts: Numbers, firsts: Integers) -> Integers:
    """Add up lines of counts from each of `firsts` to the next."""
    counts = counts.astype(np.int64, copy=False)
    return np.add.reduceat(counts, firsts, axis=0) if len(firsts) else counts[:0]


def agree(numbers: Integers, firsts: Integers) -> Integers:
    """Return by group the number that all of its lines agree on which have one.

    A line without one has a negative number, and a group -2; -1 is a group whose numbers differ.
    Groups start at `firsts`.
    """
    if not len(firsts):
        return numbers[:0]
    largest = np.maximum.reduceat(numbers, firsts)
    known = np.where(numbers < 0, np.iinfo(np.int64).max, numbers)
    is_one = largest == np.minimum.reduceat(known, firsts)
    agreed: Integers = np.where(largest < 0, -2, np.where(is_one, largest, -1))
    return agreed


def distinct(numbers: Numbers, limit: int) -> tuple[Integers, Integers]:
    """Return the numbers below a limit that occur, and for each place its index there."""
    wide = numbers.astype(np.int64, copy=False)
    is_used = np.zeros(limit, dtype=bool)
    is_used[wide] = True
    return np.flatnonzero(is_used), (np.cumsum(is_used) - 1)[wide]


def find_firsts(keys: Integers, limit: int) -> tuple[Integers, Integers]:
    """Return where each key below a limit is first, and by place which of the distinct ones it is.

    The distinct ones ascend.
    """
    if limit > _MOST_PLACES * len(keys):
        _, firsts, which = np.unique(keys, return_index=True, return_inverse=True)
        return firsts, which
    is_used = np.zeros(limit, dtype=bool)
    is_used[keys] = True
    which = (np.cumsum(is_used, dtype=np.int32) - np.int32(1))[keys].astype(np.int64)
    firsts = np.empty(int(is_used.sum()), dtype=np.int64)
    firsts[which[::-1]] = np.arange(len(keys))[::-1]  # of several, the one written last stays
    return firsts, which


def ranges(starts: Numbers, lengths: Numbers) -> Integers:
    """Return the numbers of several ranges, one after the other."""
    lengths = lengths.astype(np.int64)
    ends = np.cumsum(lengths)
    shift = starts.astype(np.int64) - (ends - lengths)
    numbers: Integers = np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(shift, lengths)
    return numbers


def sort_distinct(hashes: Hashes) -> Hashes:
    """Return hashes in their order, each once.

    `np.unique` looks for them in a hash table since numpy 2.3, which takes five times as long where
    most are distinct.
    """
    ordered = np.sort(hashes)
    is_first = np.ones(len(ordered), dtype=bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    distinct_ones: Hashes = ordered[is_first]
    return distinct_ones


class HashIndex:
    """Finds hashes among others that ascend, at most 2^31.

    As hashes are spread evenly, their first bits say nearly where they are: that is five times as
    fast as a binary search among half a million. With some more bits hardly any has to be looked
    for: three times as fast again, as long as the table fits into the processor's cache.
    """

    def __init__(self, hashes: Hashes) -> None:
        bits = len(hashes).bit_length()
        bits = min(bits + 4, max(bits + 1, _CACHED_BITS))
        self._shift = np.uint64(64 - bits)
        self._hashes = hashes
        counts = np.bincount((hashes >> self._shift).astype(np.int64), minlength=1 << bits)
        firsts = np.cumsum(counts) - counts
        self._firsts: Indices = firsts.astype(np.int32)
        # What is looked for is never behind the last one.
        self._ended = np.append(hashes, np.uint64(np.iinfo(np.uint64).max))

    def find(self, wanted: Hashes) -> Integers:
        """Return where each wanted hash is, -1 for those that are not there."""
        found = np.empty(len(wanted), dtype=np.int64)
        for first in range(0, len(wanted), _AT_ONCE):
            found[first : first + _AT_ONCE] = self._find(wanted[first : first + _AT_ONCE])
        return found

    def _find(self, wanted: Hashes) -> Indices:
        ended = self._ended
        at: Indices = self._firsts.take((wanted >> self._shift).view(np.int64))
        behind = np.flatnonzero(ended.take(at) < wanted)
        for _ in range(_STEPS):
            if not len(behind):
                break
            at[behind] += 1
            behind = behind[ended.take(at[behind]) < wanted[behind]]
        at[behind] = np.searchsorted(self._hashes, wanted[behind])
        at[(ended.take(at) != wanted) | (at == len(self._hashes))] = -1
        return at


def find_hashes(hashes: Hashes, wanted: Hashes) -> Integers:
    """Return where each wanted hash is among others in any order, -1 for those that are not."""
    order = np.argsort(hashes)
    found = HashIndex(hashes[order]).find(wanted)
    if not len(order):
        return found
    places: Integers = np.where(found < 0, -1, order[found])
    return places
