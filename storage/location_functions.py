"""Functions of locations: which functions each location stands for, and what is known of them.

Functions are told apart as boxes of the flame graph are: by (function, module, kind). Their ids are
hashes of these under the tenant's key, so they are equal wherever profiles of a tenant are read.
"""

from typing import NamedTuple

import numpy as np

from storage.columns import Columns, ShownFrames, Texts
from storage.grouping import agree, distinct, group_keys, number_groups, ranges
from storage.hashing import Hasher, Hashes, Numbers, chain
from storage.merging import adopt_texts
from storage.profile import Integers

NO_FILE, FILES_DIFFER = 0, 1
"""The file of a function where it is not 2 + the number of its text."""


class LocationFunctions(NamedTuple):
    """The functions of some profiles, and those that each location stands for."""

    texts: Texts
    hashes: Hashes
    table: Integers
    """A line (function, module, kind: texts; file: see NO_FILE) per function."""
    offsets: Integers
    """Location i stands for `numbers[offsets[i]:offsets[i + 1]]`, innermost first."""
    numbers: Integers

    @classmethod
    def of(cls, columns: Columns, hasher: Hasher) -> "LocationFunctions":
        shown = columns.shown_frames()
        texts, flat = shown.texts, shown.table
        hashes = hash_functions(shown, hasher)
        firsts, order = group_keys(hashes)
        which = number_groups(firsts, order)
        table = flat[order[firsts], :4]
        # A function's file, if all of its frames that have one agree on it.
        is_empty = np.diff(texts.offsets) == 0
        files = np.where(is_empty[flat[:, 3]], -1, flat[:, 3])
        table[:, 3] = agree(files[order], firsts) + 2
        numbers: dict[bytes, int] = {}
        table = adopt_functions(numbers, texts, table, np.ones(len(table), dtype=bool))
        return cls(Texts.of(list(numbers)), hashes[order[firsts]], table, shown.offsets, which)

    @property
    def innermost(self) -> Integers:
        """Return by location the number of the function that its samples are of."""
        return self.numbers[self.offsets[:-1]]


def hash_functions(shown: ShownFrames, hasher: Hasher) -> Hashes:
    """Return the hash of each shown frame's (function, module, kind)."""
    used, which = distinct(shown.table[:, :3], len(shown.texts))
    by_text = hasher.texts(shown.texts.take(used))
    return chain(*(by_text[which[:, i]] for i in range(3)))


def adopt_functions(
    texts: dict[bytes, int], theirs: Texts, table: Integers, is_new: Numbers
) -> Integers:
    """Return a table of functions by the numbers of my texts; names only of those that are new."""
    has_file = table[:, 3] > FILES_DIFFER
    files = table[has_file, 3] - 2
    mine = adopt_texts(texts, theirs, [table[is_new, :3], files])
    adopted = table.copy()
    adopted[is_new, :3] = mine[table[is_new, :3]]
    adopted[has_file, 3] = mine[files] + 2
    return adopted


def functions_of_stacks(
    stack_offsets: Integers, words: Numbers, functions: LocationFunctions
) -> tuple[Integers, Integers]:
    """Return which functions are on each stack, each once.

    `words` are the locations of stacks, one stack after the other. Those of stack i are
    `numbers[offsets[i]:offsets[i + 1]]` of what is returned, sorted.
    """
    bits = len(functions.hashes).bit_length()
    depths = np.diff(stack_offsets)
    per_word = np.diff(functions.offsets)[words]
    owner = np.repeat(np.repeat(np.arange(len(depths)), depths), per_word)
    pairs = (owner << bits) | functions.numbers[ranges(functions.offsets[words], per_word)]
    if len(depths).bit_length() + bits <= 32:  # half as wide, they are sorted in half the time
        pairs = pairs.astype(np.uint32)
    pairs.sort()
    is_first = np.ones(len(pairs), dtype=bool)
    is_first[1:] = pairs[1:] != pairs[:-1]
    pairs = pairs[is_first].astype(np.int64)
    owner, numbers = pairs >> bits, pairs & ((1 << bits) - 1)
    sizes = np.bincount(owner, minlength=len(depths))
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)]), numbers
