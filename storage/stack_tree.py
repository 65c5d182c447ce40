"""Stacks of locations: as lists, or as the tree that they are the branches of.

Stacks that begin alike share nodes: half a million stacks have 15 million frames, and a tree of
them a million nodes. So large profiles are read, added up and drawn as trees; what needs whole
stacks makes lists of them.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from storage.grouping import ranges
from storage.hashing import Numbers
from storage.profile import Indices, Integers

DEEPEST = 4096
"""Levels of a tree. Each takes some calls of numpy, and a foreign file may hold a single stack of a
million frames: such stacks stay lists."""
ROOT = -1


@dataclass(frozen=True, slots=True, eq=False)
class StackLists:
    """Stack i is `words[offsets[i]:offsets[i + 1]]`, root first: numbers of locations."""

    offsets: Numbers
    words: Numbers

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def size(self) -> int:
        """How many numbers of locations it has."""
        return len(self.words)

    def take(self, stacks: Integers) -> "StackLists":
        """Return some of the stacks, in this order."""
        starts = self.offsets[stacks].astype(np.int64)
        lengths = self.offsets[stacks + 1].astype(np.int64) - starts
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        return StackLists(offsets, self.words.take(ranges(starts, lengths)))


@dataclass(frozen=True, eq=False)
class StackTree:
    """Node i is the location `words[i]`, called from node `parents[i]`; ROOT has no caller.

    Parents ascend. So each stands before its children, and all nodes of one depth stand together.
    Siblings are different locations. Stack i ends at node `ends[i]`, an empty one at ROOT.
    """

    parents: Indices
    words: Indices
    ends: Indices

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def size(self) -> int:
        """How many numbers it has, with those of lists if they were made of it."""
        lists = vars(self).get("lists")
        return 2 * len(self.words) + len(self.ends) + (lists.size if lists else 0)

    @classmethod
    def of(cls, stacks: StackLists) -> "StackTree | None":
        """Return the tree of stacks; None if there are some of more than DEEPEST frames."""
        starts, past = (each.astype(np.int64) for each in (stacks.offsets[:-1], stacks.offsets[1:]))
        if int((past - starts).max(initial=0)) > DEEPEST:
            return None
        ends = np.full(len(starts), ROOT, dtype=np.int32)
        alive = np.flatnonzero(past > starts)
        parents, words, first, depth = [], [], 0, 0
        while len(alive):
            mine = stacks.words.take(starts[alive] + depth)
            parent, word, number = _distinct(ends[alive], mine)
            parents.append(parent)
            words.append(word)
            ends[alive] = first + number
            first, depth = first + len(word), depth + 1
            alive = alive[past[alive] - starts[alive] > depth]
        return cls(_joined(parents), _joined(words), ends)

    @functools.cached_property
    def levels(self) -> list[slice]:
        """The nodes of each depth."""
        return list(_levels_of(self.parents))

    @property
    def listed_words(self) -> int:
        """How many words its stacks have as lists."""
        firsts = np.array([level.start for level in self.levels], dtype=np.int64)
        return int(np.searchsorted(firsts, self.ends, side="right").sum())

    def check(self) -> None:
        """Check that nodes are sorted by their parent and their location, and none is there twice.

        Raises:
            ValueError: it is not so.
        """
        parents, words = self.parents, self.words
        is_next = parents[1:] > parents[:-1]
        is_next |= (parents[1:] == parents[:-1]) & (words[1:] > words[:-1])
        is_sorted = bool(is_next.all()) and int(parents[:1].max(initial=ROOT)) == ROOT
        if not is_sorted or bool((parents >= np.arange(len(parents))).any()):
            raise ValueError("nodes of a tree are not in their order")
        # A file of some kilobytes may hold a stack of 100 million: its levels are not all listed.
        if next(itertools.islice(_levels_of(parents), DEEPEST, None), None) is not None:
            raise ValueError("a tree of stacks is too deep")

    def take(self, stacks: Integers) -> "StackTree":
        """Return the tree of some of the stacks, in this order, with the nodes they need."""
        ends = self.ends.take(stacks)
        is_used = np.zeros(len(self.parents), dtype=bool)
        is_used[ends[ends >= 0]] = True
        for level in reversed(self.levels[1:]):
            is_used[self.parents[level][is_used[level]]] = True
        if is_used.all():
            return StackTree(self.parents, self.words, ends)
        numbers = np.append(np.cumsum(is_used, dtype=np.int32) - 1, np.int32(ROOT))
        parents = numbers.take(self.parents[is_used])  # that of ROOT is the last one
        return StackTree(parents, self.words[is_used], numbers.take(ends))

    @functools.cached_property
    def lists(self) -> StackLists:
        """The same stacks as lists."""
        depths = np.zeros(len(self.parents) + 1, dtype=np.int64)  # that of ROOT is the last one
        for depth, level in enumerate(self.levels, 1):
            depths[level] = depth
        lengths = depths.take(self.ends)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        words = np.empty(int(offsets[-1]), dtype=self.words.dtype)
        alive = np.flatnonzero(lengths)
        node, at = self.ends[alive], offsets[alive + 1] - 1
        starts = offsets[alive]
        while len(node):
            words[at] = self.words.take(node)
            goes_on = at > starts
            node, at, starts = self.parents.take(node)[goes_on], at[goes_on] - 1, starts[goes_on]
        return StackLists(offsets, words)


Stacks = StackLists | StackTree


def lists_of(stacks: Stacks) -> StackLists:
    return stacks if isinstance(stacks, StackLists) else stacks.lists


def join_stacks(parts: Sequence[Stacks], numbers: Sequence[Numbers]) -> Stacks:
    """Return the stacks of one part after those of another; a tree if one of them is.

    `numbers` say by part which location each of its words is.
    """
    if not all(isinstance(part, StackLists) for part in parts):
        trees = [StackTree.of(part) if isinstance(part, StackLists) else part for part in parts]
        found = [tree for tree in trees if tree is not None]
        if len(found) == len(parts):
            return merge_trees(found, numbers)
    lists = [lists_of(part) for part in parts]
    lengths = [np.diff(each.offsets).astype(np.int64) for each in lists]
    offsets = np.cumsum(np.concatenate([np.zeros(1, np.int64), *lengths]))
    words = [number.take(each.words) for number, each in zip(numbers, lists, strict=True)]
    return StackLists(offsets, np.concatenate(words))


def merge_trees(trees: Sequence[StackTree], numbers: Sequence[Numbers]) -> StackTree:
    """Return a tree of all stacks, those of one tree after those of another.

    `numbers` say by tree which location each of its words is. Different locations of a tree stay
    different.
    """
    if len(trees) == 1:
        only = trees[0]
        return StackTree(only.parents, numbers[0].take(only.words), only.ends)
    places = [np.empty(len(tree.parents) + 1, dtype=np.int32) for tree in trees]
    for place in places:
        place[ROOT] = ROOT
    parents, words, first = [], [], 0
    for depth in range(max((len(tree.levels) for tree in trees), default=0)):
        levels = [tree.levels[depth] if depth < len(tree.levels) else slice(0, 0) for tree in trees]
        above = [
            place.take(tree.parents[level])
            for place, tree, level in zip(places, trees, levels, strict=True)
        ]
        mine = [
            number.take(tree.words[level])
            for number, tree, level in zip(numbers, trees, levels, strict=True)
        ]
        parent, word, number_of = _distinct(np.concatenate(above), np.concatenate(mine))
        parents.append(parent)
        words.append(word)
        ends = np.cumsum([level.stop - level.start for level in levels])
        for place, level, end in zip(places, levels, ends.tolist(), strict=True):
            place[level] = first + number_of[end - (level.stop - level.start) : end]
        first += len(word)
    ends_of = [place.take(tree.ends) for place, tree in zip(places, trees, strict=True)]
    return StackTree(_joined(parents), _joined(words), np.concatenate(ends_of))


def tree_of_nodes(
    parents: Indices, words: Indices, depths: Integers | Indices, ends: Indices
) -> StackTree:
    """Return the tree of nodes in any order; equal siblings become one. Roots are of depth 0."""
    # Sorting 16 bits takes a tenth of the time.
    order = np.argsort(depths.astype(np.uint16), kind="stable")
    places = np.full(len(parents) + 1, ROOT, dtype=np.int32)
    above, below, first, past = [], [], 0, 0
    for count in np.bincount(depths).tolist():
        nodes = order[past : past + count]
        parent, word, number = _distinct(places.take(parents[nodes]), words[nodes])
        places[nodes] = first + number
        above.append(parent)
        below.append(word)
        first, past = first + len(word), past + count
    return StackTree(_joined(above), _joined(below), places.take(ends))


def _levels_of(parents: Indices) -> Iterator[slice]:
    """Go through the nodes of each depth; parents ascend."""
    kind = parents.dtype.type  # a number of another type would have all of them converted
    first, past = 0, int(np.searchsorted(parents, kind(0)))
    while past > first:
        yield slice(first, past)
        first, past = past, int(np.searchsorted(parents, kind(past)))


def _distinct(parents: Indices, words: Numbers) -> tuple[Indices, Indices, Indices]:
    """Return the distinct pairs, sorted, and by given pair which of them it is."""
    key = ((parents.astype(np.int64) + 1) << 32) | words
    order = np.argsort(key, kind="stable")  # pieces that ascend are only merged
    ordered = key[order]
    is_first = np.ones(len(key), dtype=bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    found = ordered[is_first]
    numbers = np.empty(len(key), dtype=np.int32)
    numbers[order] = np.cumsum(is_first, dtype=np.int32) - 1
    return ((found >> 32) - 1).astype(np.int32), found.astype(np.int32), numbers


def _joined(pieces: Sequence[npt.NDArray[np.int32]]) -> Indices:
    return np.concatenate([np.zeros(0, np.int32), *pieces])
