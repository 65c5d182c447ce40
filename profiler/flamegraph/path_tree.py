"""PathTree: paths as the branches of a tree of boxes. It answers what `PathLists` answers.

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
from storage.profile import Indices, Integers
from storage.stack_tree import ROOT, StackTree


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
    def depth(self) -> int:
        return len(self.tree.levels)

    @property
    def places(self) -> int:
        """How many places there are to walk over."""
        return len(self.tree.parents)

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

    def by_path(self, values: Indices | Integers, of_empty: int) -> Integers:
        """Return for each path the value of the place at which it ends."""
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
        tree, count = self.tree, max(len(wanted), 1)
        is_wanted = wanted.take(tree.words)
        nearest = np.arange(len(is_wanted) + 1, dtype=np.int32)  # wanted node, itself or above
        nearest[ROOT] = ROOT
        for level in tree.levels:
            above = nearest.take(tree.parents[level])
            nearest[level] = np.where(is_wanted[level], nearest[level], above)
        paths = np.arange(len(tree.ends))
        node = nearest.take(tree.ends)
        found = [paths[:0]]
        while len(paths):
            is_one = node >= 0
            paths, node = paths[is_one], node[is_one]
            found.append(paths * count + tree.words.take(node))
            node = nearest.take(tree.parents.take(node))
        keys = np.sort(np.concatenate(found))
        path, box = np.divmod(keys[np.diff(keys, prepend=-1) > 0], count)
        return path, box

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

    def inverted(self, heads: int) -> PathLists:
        """Return the paths leaf first, but for so many boxes that each begins with."""
        return self.lists.inverted(heads)

    def above_last(self, wanted: Flags) -> tuple[PathLists, Integers]:
        """Return what stands above the last wanted box, nearest first, and of which paths."""
        return self.lists.above_last(wanted)

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
