"""PathTree: paths as the branches of a tree of boxes. It answers what `PathLists` answers.

And PathClimbs: the same paths leaf first, which are walks up the tree. So are those of callers.

The work is about its nodes, of which there are far fewer than boxes in lists: counts of paths are
added up by node once, and drawing goes from a node to those below it.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from profiler.flamegraph import trees
from profiler.flamegraph.path_lists import Flags, PathLists
from storage.grouping import ranges
from storage.profile import Indices, Integers
from storage.stack_tree import ROOT, StackTree

_NODE_BITS = 32
_NODES = (1 << _NODE_BITS) - 1


@dataclass(frozen=True, eq=False)
class PathTree:
    """Path i ends at node `tree.ends[i]`, and each node is on one of the paths.

    Drawing walks over the nodes.
    """

    tree: StackTree

    @property
    def lists(self) -> PathLists:
        lists = self.tree.lists
        return PathLists(lists.words, lists.offsets[:-1], lists.offsets[1:])

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return self.tree.size

    @property
    def slots(self) -> int:
        """How many numbers `slots_of` returns."""
        return len(self.tree.parents)

    def slots_of(self, places: Integers) -> Integers:
        """Return where something is kept of each place."""
        return places

    def is_walkable(self, depth: int) -> bool:
        """Return whether a walk may stop at a depth, where a node is of several paths."""
        return len(self.tree.levels) <= depth

    def first(self) -> Integers:
        """Return the places at the first boxes."""
        return np.arange(self.tree.levels[0].stop if self.tree.levels else 0)

    def boxes_at(self, places: Integers, depth: int) -> Indices:  # noqa: ARG002 - that of the nodes
        return self.tree.words.take(places)

    def next(self, places: Integers, depth: int) -> tuple[Integers, Integers]:
        """Return the places one deeper than some of a depth, and below which of them each is."""
        return trees.children(self.tree, places, depth)

    @functools.cached_property
    def ranges(self) -> trees.Ranges:
        """The paths in an order in which those through a node stand together."""
        return trees.ranges_of(self.tree)

    def counter(self, column: Integers) -> Callable[[Indices | Integers], Integers]:
        """Return what gives for some places the sums of a count by path."""
        order, firsts, pasts = self.ranges
        sums = np.zeros(len(order) + 1, dtype=np.int64)
        np.cumsum(column.take(order), out=sums[1:])
        return lambda places: sums.take(pasts.take(places)) - sums.take(firsts.take(places))

    def by_path(self, values: Indices, of_empty: int) -> Integers:
        """Return for each path the value in the slot of the place at which it ends."""
        return np.append(values, of_empty).take(self.tree.ends)

    def branch(self, places: Integers, depth: int, with_them: bool) -> tuple["PathTree", Integers]:
        """Return the paths that go through places of a depth, and which paths these are.

        They begin with the boxes there, or just below these.
        """
        tree, paths = trees.branch(self.tree, places, depth, with_them)
        return PathTree(tree), paths

    def only(self, paths: Integers) -> "PathTree":
        """Return some of the paths, in this order."""
        return PathTree(self.tree.take(paths))

    def leaves(self, of_empty: int) -> Integers:
        """Return the last box of each path."""
        return self.by_path(self.tree.words, of_empty)

    def find(self, wanted: Flags) -> tuple[Flags, Flags]:
        """Return which paths have one of the wanted boxes, and which of these boxes occur."""
        tree = self.tree
        is_hit = wanted.take(tree.words)
        is_used = np.zeros(len(wanted), dtype=bool)
        is_used[tree.words[is_hit]] = True
        is_found = np.append(is_hit, False)  # the last one is that of ROOT
        for level in tree.levels[1:]:
            is_found[level] |= is_found.take(tree.parents[level])
        return is_found.take(tree.ends), is_used

    def pairs(self, wanted: Flags) -> tuple[Integers, Integers]:
        """Return which wanted boxes are in which path, each once: numbers of paths and boxes."""
        tree = self.tree
        is_asked = np.zeros(len(tree.parents), dtype=bool)
        is_asked[self._outermost(wanted)] = True
        nearest = trees.nearest(tree, is_asked)
        paths, nodes = np.arange(len(tree.ends)), nearest.take(tree.ends)
        found = [(paths[:0], tree.words[:0])]
        while len(paths):
            is_one = nodes != ROOT
            paths, nodes = paths[is_one], nodes[is_one]
            found.append((paths, tree.words.take(nodes)))
            nodes = nearest.take(tree.parents.take(nodes))
        of_paths, boxes = zip(*found, strict=True)
        return np.concatenate(of_paths), np.concatenate(boxes).astype(np.int64)

    def totals(self, columns: Sequence[Integers], wanted: Flags) -> list[Integers]:
        """Return by box the counts of the paths that have it, if it is wanted."""
        nodes = self._outermost(wanted)
        words = self.tree.words.take(nodes)
        totals = [np.zeros(len(wanted), dtype=np.int64) for _ in columns]
        for total, column in zip(totals, columns, strict=True):
            np.add.at(total, words, self.counter(column)(nodes))
        return totals

    def without(self, hidden: Flags) -> "PathTree":
        """Return the paths without some boxes."""
        return PathTree(trees.contract(self.tree, hidden.take(self.tree.words)))

    def inverted(self, heads: int) -> "PathClimbs":
        """Return the paths leaf first, but for so many boxes that each begins with."""
        tree = self.tree
        first = tree.levels[heads].start if heads < len(tree.levels) else len(tree.parents)
        # Nodes of labels stand first; where is the last one above each node?
        labels = np.arange(len(tree.parents) + 1, dtype=np.int32)
        for level in tree.levels[heads:]:
            labels[level] = labels.take(tree.parents[level])
        boxes = np.empty((len(tree.ends), heads), dtype=np.int32)
        label = labels.take(tree.ends)
        for i in range(heads - 1, -1, -1):
            boxes[:, i] = tree.words.take(label)
            label = tree.parents.take(label)
        parents, ends = (
            np.maximum(nodes, first + ROOT) - np.int32(first)
            for nodes in (tree.parents[first:], tree.ends)
        )
        return PathClimbs(PathTree(StackTree(parents, tree.words[first:], ends)), boxes)

    def above_last(self, wanted: Flags) -> tuple["PathClimbs", Integers]:
        """Return what stands above the last wanted box, nearest first, and of which paths."""
        last = trees.nearest(self.tree, wanted.take(self.tree.words)).take(self.tree.ends)
        kept = np.flatnonzero(last >= 0)
        heads = np.empty((len(kept), 0), dtype=np.int32)
        return PathClimbs(self.up_from(self.tree.parents.take(last[kept])), heads), kept

    def up_from(self, nodes: Indices) -> "PathTree":
        """Return paths that end at other nodes."""
        tree = StackTree(self.tree.parents, self.tree.words, nodes)
        return PathTree(tree.take(np.arange(len(nodes))))

    def _outermost(self, wanted: Flags) -> Indices:
        """Return the nodes of wanted boxes that are below none of the same box."""
        _, firsts, pasts = self.ranges
        # By box, by the paths through them, the upper ones first. Sorted by 16 bits at a time,
        # which takes a tenth of the time.
        nodes = np.flatnonzero(wanted.take(self.tree.words)).astype(np.int32)
        for keys, shift in itertools.product((firsts, self.tree.words), (0, 16)):
            bits = (keys.take(nodes) >> shift).astype(np.uint16)
            nodes = nodes[np.argsort(bits, kind="stable")]
        box = self.tree.words.take(nodes) * np.int64(len(self.tree.ends) + 1)
        # A node of the same box above it has its paths, and one that is not has none of them.
        reach = np.maximum.accumulate(box + pasts.take(nodes))
        is_below = np.zeros(len(nodes), dtype=bool)
        is_below[1:] = reach[:-1] > (box + firsts.take(nodes))[1:]
        return nodes[~is_below]


@dataclass(frozen=True, eq=False)
class PathClimbs:
    """Path i has the boxes `heads[i]`, those of labels, then those up from its end in a tree.

    Drawing walks over the paths. A place is a path and a node, in the halves of a number.
    """

    tree: PathTree
    """Without labels."""
    heads: Indices

    @property
    def lists(self) -> PathLists:
        rest, labels = self.tree.lists.inverted(0), self.heads.shape[1]
        lengths = rest.ends - rest.starts
        ends = np.cumsum(lengths + labels)
        starts = ends - lengths
        boxes = np.empty(int(ends[-1]) if len(ends) else 0, dtype=np.int32)
        boxes[ranges(starts, lengths)] = rest.boxes
        for i in range(labels):
            boxes[starts - labels + i] = self.heads[:, i]
        return PathLists(boxes, starts - labels, ends)

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return self.tree.size + self.heads.size

    @property
    def slots(self) -> int:
        """How many numbers `slots_of` returns."""
        return len(self.heads)

    def slots_of(self, places: Integers) -> Integers:
        """Return where something is kept of each place: of those of a path, the last one's."""
        return places >> _NODE_BITS

    def is_walkable(self, depth: int) -> bool:  # noqa: ARG002 - a place is of one path
        """Return whether a walk may stop at a depth."""
        return True

    def first(self) -> Integers:
        """Return the places at the first boxes."""
        return self._places(np.arange(len(self.heads)), 0, np.zeros(0, np.int64))[0]

    def boxes_at(self, places: Integers, depth: int) -> Indices:
        if depth < self.heads.shape[1]:
            return self.heads[:, depth].take(places >> _NODE_BITS)
        return self.tree.tree.words.take(places & _NODES)

    def next(self, places: Integers, depth: int) -> tuple[Integers, Integers]:
        """Return the places one deeper than some of a depth, and below which of them each is."""
        return self._places(places >> _NODE_BITS, depth + 1, places & _NODES)

    def counter(self, column: Integers) -> Callable[[Integers], Integers]:
        """Return what gives for some places the counts of their paths."""
        return lambda places: column.take(places >> _NODE_BITS)

    def by_path(self, values: Indices, of_empty: int) -> Integers:
        """Return for each path the value in the slot of the place at which it ends."""
        is_empty = (self.tree.tree.ends == ROOT) & (self.heads.shape[1] == 0)
        return np.where(is_empty, of_empty, values.astype(np.int64))

    def branch(
        self, places: Integers, depth: int, with_them: bool
    ) -> tuple["PathClimbs", Integers]:
        """Return the paths that go through places of a depth, and which paths these are.

        They begin with the boxes there, or just below these.
        """
        paths = places >> _NODE_BITS
        if depth < self.heads.shape[1]:
            ends = self.tree.tree.ends.take(paths)
        else:
            ends = (places & _NODES).astype(np.int32)
            ends = ends if with_them else self.tree.tree.parents.take(ends)
        heads = self.heads[paths, depth + (not with_them) :]
        return PathClimbs(self.tree.up_from(ends), heads), paths

    def only(self, paths: Integers) -> "PathClimbs":
        """Return some of the paths, in this order."""
        return PathClimbs(self.tree.only(paths), self.heads[paths])

    def leaves(self, of_empty: int) -> Integers:
        """Return the last box of each path."""
        tree = self.tree.tree
        uppermost = np.append(tree.words, np.int32(-1))
        for level in tree.levels[1:]:
            uppermost[level] = uppermost.take(tree.parents[level])
        boxes = uppermost.take(tree.ends)
        last = self.heads[:, -1] if self.heads.shape[1] else of_empty
        return np.where(boxes < 0, last, boxes)

    def find(self, wanted: Flags) -> tuple[Flags, Flags]:
        """Return which paths have one of the wanted boxes, and which of these boxes occur."""
        is_found, is_used = self.tree.find(wanted)
        is_hit = wanted.take(self.heads)
        is_used[self.heads[is_hit]] = True
        return is_found | is_hit.any(axis=1), is_used

    def pairs(self, wanted: Flags) -> tuple[Integers, Integers]:
        """Return which wanted boxes are in which path, as PathTree; no labels are wanted."""
        return self.tree.pairs(wanted)

    def totals(self, columns: Sequence[Integers], wanted: Flags) -> list[Integers]:
        """Return by box the counts of the paths that have it; no labels are wanted."""
        return self.tree.totals(columns, wanted)

    def without(self, hidden: Flags) -> "PathClimbs":
        """Return the paths without some boxes; none of labels."""
        return PathClimbs(self.tree.without(hidden), self.heads)

    def inverted(self, heads: int) -> PathLists:
        """Return the paths in the other direction, but for so many boxes that each begins with."""
        return self.lists.inverted(heads)

    def above_last(self, wanted: Flags) -> tuple[PathLists, Integers]:
        """Return what stands before the last wanted box, nearest first, and of which paths."""
        return self.lists.above_last(wanted)

    def _places(self, paths: Integers, depth: int, below: Integers) -> tuple[Integers, Integers]:
        """Return the places of a depth of some paths, and which of these there are.

        `below` are the nodes at which they were one step before.
        """
        labels = self.heads.shape[1]
        if depth < labels:
            return paths << _NODE_BITS, np.arange(len(paths))
        if depth == labels:
            nodes = self.tree.tree.ends.take(paths)
        else:
            nodes = self.tree.tree.parents.take(below)
        which = np.flatnonzero(nodes != ROOT)
        return paths[which] << _NODE_BITS | nodes[which], which
