"""Stacks of blocks as a tree: what begins alike is there once.

500,000 stacks of 30 locations are 15 million words as lists, and a million nodes as a tree. Nodes
stand in order of depth, those of a level by their parent and their location. So a parent stands
before its children, and equal sets of stacks are equal trees. A stack without locations has no
node, and no tree says whether it is there.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from storage.blocks.rollup import Stacks, rest_id, shared_before
from storage.grouping import HashIndex, ranges
from storage.hashing import Hasher, Hashes
from storage.profile import Indices, Integers, ProfileError

_LISTED_WORDS = 1 << 20
"""Locations of stacks that are listed at a time: each takes some 30 bytes meanwhile."""
_STACKS_AT_ONCE = 122_880
"""Those of a row group, 30 MB, and four times as much until they are a tree. Whoever fetches fewer
at a time decodes each row group more than once."""

Flags = npt.NDArray[np.bool_]


class _Nodes(NamedTuple):
    """Nodes in any order in which parents stand before their children; some may be there twice."""

    depths: Integers
    parents: Integers
    frame_ids: Hashes
    stack_ids: Hashes
    is_stack: Flags


@dataclass(frozen=True, slots=True, eq=False)
class FrameTree:
    """Node i is the location `frame_ids[i]`, called from node `parents[i]`, which is -1 at roots.

    The nodes of depth d are those from `levels[d]` to `levels[d + 1]`. Where `is_stack`, the stack
    `stack_ids[i]` ends; elsewhere that is 0.
    """

    levels: Integers
    parents: Indices
    frame_ids: Hashes
    stack_ids: Hashes
    is_stack: Flags

    @classmethod
    def empty(cls) -> "FrameTree":
        nothing = np.zeros(0, np.uint64)
        return cls(
            np.zeros(1, np.int64), np.zeros(0, np.int32), nothing, nothing, np.zeros(0, np.bool_)
        )

    @classmethod
    def of(cls, stacks: Stacks) -> "FrameTree":
        """Return the tree of stacks in any order; if it is that of their frames it takes less."""
        return _distinct_tree(_nodes_of(stacks))

    @classmethod
    def checked(
        cls, parents: Indices, frame_ids: Hashes, stack_ids: Hashes, is_stack: Flags
    ) -> "FrameTree":
        """Return a tree whose nodes have been read.

        Raises:
            ProfileError: they are not in order, or a stack is there twice.
        """
        steps = np.diff(parents)
        # Parents ascend over all levels.
        is_next = (steps > 0) | ((steps == 0) & (frame_ids[1:] > frame_ids[:-1]))
        levels = [0]
        while (end := int(np.searchsorted(parents, levels[-1]))) > levels[-1]:
            levels.append(end)
        ids = np.sort(stack_ids[is_stack])
        if (
            levels[-1] != len(parents)
            or parents.min(initial=-1) < -1
            or not is_next.all()
            or (ids[1:] == ids[:-1]).any()
            or stack_ids[~is_stack].any()
        ):
            raise ProfileError("the nodes of its tree are not in order")
        return cls(np.array(levels, dtype=np.int64), parents, frame_ids, stack_ids, is_stack)

    @classmethod
    def joined(cls, trees: "Sequence[FrameTree]") -> "FrameTree":
        """Return the tree of all stacks of some trees."""
        if len(trees) == 1:
            return trees[0]
        firsts = np.cumsum([0, *(len(tree) for tree in trees)]).tolist()
        parts = [
            _Nodes(
                tree.depths(),
                np.where(tree.parents < 0, -1, tree.parents + np.int64(first)),
                tree.frame_ids,
                tree.stack_ids,
                tree.is_stack,
            )
            for first, tree in zip(firsts, trees, strict=False)
        ]
        return _distinct_tree(_Nodes(*map(np.concatenate, zip(*parts, strict=True))))

    def __len__(self) -> int:
        return len(self.parents)

    def equals(self, other: "FrameTree") -> bool:
        names = ("parents", "frame_ids", "stack_ids", "is_stack")
        return all(np.array_equal(getattr(self, name), getattr(other, name)) for name in names)

    def depths(self) -> Integers:
        """Return the depth of each node, 0 at roots."""
        depths: Integers = np.repeat(np.arange(len(self.levels) - 1), np.diff(self.levels))
        return depths

    def nodes_of(self, stack_ids: Hashes) -> Integers:
        """Return the nodes where stacks end, -1 for those that are not there."""
        ends = np.flatnonzero(self.is_stack)
        ids = self.stack_ids[ends]
        order = np.argsort(ids)
        found = HashIndex(ids[order]).find(stack_ids)
        if not len(ends):
            return found
        nodes: Integers = np.where(found < 0, -1, ends[order[found]])
        return nodes

    def on_paths(self, nodes: Integers) -> Flags:
        """Return by node whether it is one of some nodes or leads to one."""
        is_on = np.zeros(len(self), dtype=bool)
        is_on[nodes] = True
        for first, end in self._levels_up():
            is_on[self.parents[first:end][is_on[first:end]]] = True
        return is_on

    def only(self, nodes: Integers) -> "FrameTree":
        """Return the tree of the stacks that end at some nodes."""
        is_on = self.on_paths(nodes)
        is_end = np.zeros(len(self), dtype=bool)
        is_end[nodes] = True
        is_end &= self.is_stack
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(is_on)])
        parents = self.parents[is_on]
        levels = before[self.levels]
        return FrameTree(
            levels[: int(np.count_nonzero(np.diff(levels))) + 1],
            np.where(parents < 0, -1, before.take(parents)).astype(np.int32),
            self.frame_ids[is_on],
            np.where(is_end, self.stack_ids, np.uint64(0))[is_on],
            is_end[is_on],
        )

    def stacks_at(self, nodes: Integers) -> Stacks:
        """Return the paths to some nodes, with the ids of the stacks that end there."""
        depths = np.searchsorted(self.levels, nodes, side="right") - 1
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(depths + 1)])
        words = np.empty(int(offsets[-1]), dtype=np.uint64)
        at, places = nodes, offsets[1:] - 1
        while len(at):
            words[places] = self.frame_ids.take(at)
            at = self.parents.take(at).astype(np.int64)
            is_open = at >= 0
            at, places = at[is_open], places[is_open] - 1
        return Stacks(self.stack_ids.take(nodes), offsets, words)

    def lists(self) -> Iterator[Stacks]:
        """Return all stacks as lists, in the order of their frames, some at a time."""
        ends = np.flatnonzero(self.is_stack)
        ends = ends[np.argsort(self._places().take(ends))]
        words = np.cumsum(np.searchsorted(self.levels, ends, side="right"))
        first = 0
        while first < len(ends):
            before = words[first - 1] if first else 0
            some = int(np.searchsorted(words, before + _LISTED_WORDS, side="right"))
            yield self.stacks_at(ends[first : max(some, first + 1)])
            first = max(some, first + 1)

    def _places(self) -> Integers:
        """Return by node how many come before it if each is followed by all below it."""
        sizes = np.ones(len(self), dtype=np.int64)
        for first, end in self._levels_up():
            starts = _starts(self.parents[first:end])
            sizes[self.parents[first:end][starts]] += np.add.reduceat(sizes[first:end], starts)
        places = np.zeros(len(self), dtype=np.int64)
        for depth in range(len(self.levels) - 1):
            first, end = self.levels[depth : depth + 2].tolist()
            before = np.cumsum(sizes[first:end]) - sizes[first:end]
            if depth:
                parents = self.parents[first:end]
                starts = _starts(parents)
                before -= np.repeat(before[starts], np.diff(np.append(starts, end - first)))
                before += places.take(parents) + 1
            places[first:end] = before
        return places

    def _levels_up(self) -> Iterator[tuple[int, int]]:
        """Return where each level begins and ends, the deepest first, without the roots."""
        bounds = self.levels.tolist()
        return zip(bounds[-2:0:-1], bounds[:1:-1], strict=True)


class FoldedTree(NamedTuple):
    """A tree without rare stacks; stack `rare[i]` is counted as its stack `folded[i]`."""

    rare: Hashes
    folded: Hashes
    tree: FrameTree


def fold_tree(tree: FrameTree, kept: Hashes, hasher: Hasher) -> FoldedTree:
    """Fold the stacks that are not among `kept`, as `storage.blocks.rollup.fold` does.

    What is folded already is folded further if no kept stack begins with what it was folded into.
    """
    rest = rest_id(hasher)
    is_kept = np.zeros(len(tree), dtype=bool)
    is_kept[tree.nodes_of(kept)] = True
    is_rare = tree.is_stack & ~is_kept
    # The nearest node from each to the root on the way to a kept stack, -1 if there is none.
    nearest = np.where(tree.on_paths(np.flatnonzero(is_kept)), np.arange(len(tree)), -1)
    for first, end in zip(tree.levels[1:-1].tolist(), tree.levels[2:].tolist(), strict=True):
        mine = nearest[first:end]
        above = nearest.take(tree.parents[first:end])
        mine[mine < 0] = above[mine < 0]
    rare = np.flatnonzero(is_rare)
    # Not all of a stack: what is left of it is the rest.
    parents = tree.parents.take(rare)
    ends = np.where(parents < 0, -1, nearest.take(parents))
    places, of_rare = np.unique(ends, return_inverse=True)
    rests = tree.stacks_at(places[places >= 0])
    lengths = np.diff(rests.offsets)
    lengths = np.concatenate([np.zeros(int((places < 0).sum()), np.int64), lengths])
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths + 1)])
    words = np.full(int(offsets[-1]), rest, dtype=np.uint64)
    words[ranges(offsets[:-1], lengths)] = rests.frame_ids
    ids = hasher.stacks(words, offsets, np.arange(len(words)))
    left = [tree.only(np.flatnonzero(is_kept)), FrameTree.of(Stacks(ids, offsets, words))]
    return FoldedTree(tree.stack_ids[rare], ids[of_rare], FrameTree.joined(left))


def _starts(parents: Indices) -> Integers:
    """Return where in a level each node's children begin."""
    is_first = np.ones(len(parents), dtype=bool)
    is_first[1:] = parents[1:] != parents[:-1]
    return np.flatnonzero(is_first)


def _nodes_of(stacks: Stacks) -> _Nodes:
    """Return what stacks have that the one before each does not begin with."""
    lengths = np.diff(stacks.offsets)
    depth = np.arange(len(stacks.frame_ids)) - np.repeat(stacks.offsets[:-1], lengths)
    shared = shared_before(stacks)
    at = np.flatnonzero(depth >= np.repeat(shared, lengths))
    depths = depth[at]
    # Of the nodes of a depth, the last one before is that of the stack.
    by_depth = np.argsort(depths, kind="stable")
    bounds = np.searchsorted(depths[by_depth], np.arange(int(lengths.max(initial=0)) + 1))
    bounds = np.append(bounds, len(at))
    parents = np.full(len(at), -1, dtype=np.int64)
    after = np.cumsum(lengths - shared)
    by_length = np.argsort(lengths, kind="stable")
    of_length = np.searchsorted(lengths[by_length], np.arange(len(bounds) + 1))
    stack_ids, is_stack = np.zeros(len(at), np.uint64), np.zeros(len(at), np.bool_)
    above = by_depth[:0]
    for each in range(len(bounds) - 1):
        mine = by_depth[bounds[each] : bounds[each + 1]]
        if each:
            parents[mine] = above[np.searchsorted(above, mine) - 1]
        ending = by_length[of_length[each + 1] : of_length[each + 2]]
        if len(ending):
            ends = mine[np.searchsorted(mine, after[ending]) - 1]
            stack_ids[ends], is_stack[ends] = stacks.ids[ending], True
        above = mine
    return _Nodes(depths, parents, stacks.frame_ids[at], stack_ids, is_stack)


def _distinct_tree(nodes: _Nodes) -> FrameTree:
    """Return the tree of nodes, each once and in order."""
    by_depth = np.argsort(nodes.depths, kind="stable")
    deepest = int(nodes.depths.max(initial=-1))
    bounds = np.searchsorted(nodes.depths[by_depth], np.arange(deepest + 2)).tolist()
    numbers = np.full(len(by_depth), -1, dtype=np.int32)
    levels = [0]
    parents: list[Indices] = [np.zeros(0, np.int32)]
    frame_ids: list[Hashes] = [np.zeros(0, np.uint64)]
    for first, end in itertools.pairwise(bounds):
        mine = by_depth[first:end]
        above = nodes.parents.take(mine)
        above = np.where(above < 0, np.int32(-1), numbers.take(above)).astype(np.int32)
        frames = nodes.frame_ids.take(mine)
        order = np.lexsort((frames, above))
        above, frames = above[order], frames[order]
        is_first = np.ones(len(order), dtype=bool)
        is_first[1:] = (above[1:] != above[:-1]) | (frames[1:] != frames[:-1])
        numbers[mine[order]] = levels[-1] + np.cumsum(is_first) - 1
        parents.append(above[is_first])
        frame_ids.append(frames[is_first])
        levels.append(levels[-1] + int(is_first.sum()))
    stack_ids, is_stack = np.zeros(levels[-1], np.uint64), np.zeros(levels[-1], np.bool_)
    ends = numbers[nodes.is_stack]
    stack_ids[ends], is_stack[ends] = nodes.stack_ids[nodes.is_stack], True
    return FrameTree(
        np.array(levels, dtype=np.int64),
        np.concatenate(parents),
        np.concatenate(frame_ids),
        stack_ids,
        is_stack,
    )
