"""Grouping: find equal numbers of arrays by sorting, which is what merging consists of."""

import numpy as np

from storage.hashing import Numbers
from storage.profile import Integers


def group_keys(keys: Numbers) -> tuple[Integers, Integers]:
    """Return an order in which equal keys stand together, and where in it each group starts."""
    order = np.argsort(keys)
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


def agree_on_files(files: Integers, firsts: Integers) -> Integers:
    """Return by group the file that all of its lines agree on which have one.

    Without a file a line has a negative number, and a group -2; -1 is a group whose files differ.
    Groups start at `firsts`.
    """
    if not len(firsts):
        return files[:0]
    largest = np.maximum.reduceat(files, firsts)
    known = np.where(files < 0, np.iinfo(np.int64).max, files)
    is_one = largest == np.minimum.reduceat(known, firsts)
    agreed: Integers = np.where(largest < 0, -2, np.where(is_one, largest, -1))
    return agreed


def distinct(numbers: Numbers, limit: int) -> tuple[Integers, Integers]:
    """Return the numbers below a limit that occur, and for each place its index there."""
    wide = numbers.astype(np.int64, copy=False)
    is_used = np.zeros(limit, dtype=bool)
    is_used[wide] = True
    return np.flatnonzero(is_used), (np.cumsum(is_used) - 1)[wide]


def ranges(starts: Numbers, lengths: Numbers) -> Integers:
    """Return the numbers of several ranges, one after the other."""
    lengths = lengths.astype(np.int64)
    ends = np.cumsum(lengths)
    shift = starts.astype(np.int64) - (ends - lengths)
    numbers: Integers = np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(shift, lengths)
    return numbers
