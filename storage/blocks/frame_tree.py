"""Stacks of blocks as a tree, with their ids: the stacks of a day are added up and folded as one.

Nodes of a depth stand in the order of their parents and locations, so equal sets of stacks are
equal trees. A stack without locations has no node, and no tree says whether it is there: rows refer
to it as EMPTY_STACK under any key. Stacks of more than DEEPEST locations are in no tree either.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from storage.blocks.parquet import VALUE_LIMIT, Engine
from storage.blocks.rollup import Stacks
from storage.blocks.scans import LocalFile, numbered_scan_of, of_table
from storage.blocks.tables import fetch_stacks
from storage.grouping import HashIndex, find_hashes, sort_distinct
from storage.hashing import Hasher, Hashes, chain
from storage.profile import Indices, Integers, ProfileError
from storage.stack_tree import DEEPEST, ROOT, StackLists, StackTree, merge_trees

EMPTY_STACK = int(chain(np.zeros(1, np.uint64), np.zeros(1, np.int64))[0])
"""The id of the stack without locations (`storage.hashing.Hasher.stacks`)."""

_LISTED_WORDS = 1 << 20
"""Locations of stacks that are listed at a time: each takes some 30 bytes meanwhile."""
_STACKS_AT_ONCE = 122_880
"""Those of a row group, 30 MB, and four times as much until they are a tree. Whoever fetches fewer
at a time decodes each row group more than once."""

NODE_LIMIT = 1 << 25
"""Nodes of a file: each takes some 30 bytes while it is read, and may be one bit there."""

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Locations:
    """The ids of locations, ascending; trees that are joined have the same."""

    ids: Hashes
    _index: HashIndex

    @classmethod
    def of(cls, ids: Hashes) -> "Locations":
        return cls(ids, HashIndex(ids))

    def find(self, wanted: Hashes) -> Indices:
        """Return the numbers of some locations.

        Raises:
            ProfileError: one is missing.
        """
        words: Indices = self._index.find(wanted).astype(np.int32)
        if words.min(initial=0) < 0:
            raise ProfileError("locations of stacks are missing")
        return words


@dataclass(frozen=True, slots=True, eq=False)
class FrameTree:
    """The stacks `tree`, whose ids are `ids` and whose words are numbers of `locations`."""

    locations: Locations
    tree: StackTree
    ids: Hashes

    @classmethod
    def of(cls, stacks: Stacks, locations: Locations) -> "FrameTree":
        """Return the tree of stacks of which each has 1 to DEEPEST locations.

        Raises:
            ProfileError: a location is missing.
        """
        tree = StackTree.of(StackLists(stacks.offsets, locations.find(stacks.frame_ids)))
        assert tree is not None, f"a stack has more than {DEEPEST} locations"
        return cls(locations, tree, stacks.ids)

    @classmethod
    def joined(cls, locations: Locations, trees: "Sequence[FrameTree]") -> "FrameTree":
        """Return the tree of all stacks of some trees, none of which two of them have."""
        nothing, no_ids = np.zeros(0, np.int32), np.zeros(0, np.uint64)
        if not trees:
            return cls(locations, StackTree(nothing, nothing, nothing), no_ids)
        same = np.arange(len(locations.ids), dtype=np.int32)
        tree = merge_trees([each.tree for each in trees], [same] * len(trees))
        return cls(locations, tree, np.concatenate([no_ids, *(each.ids for each in trees)]))

    def equals(self, other: "FrameTree") -> bool:
        """Return whether the same stacks are in both, whose locations are the same."""
        mine, others = self.by_node(), other.by_node()
        pairs = [*zip(mine, others, strict=True), (self.tree.parents, other.tree.parents)]
        return all(np.array_equal(*pair) for pair in [*pairs, (self.tree.words, other.tree.words)])

    @property
    def is_readable(self) -> bool:
        """Return whether readers accept it: some want lists of all its stacks."""
        return len(self.tree.parents) <= NODE_LIMIT and self.tree.listed_words <= VALUE_LIMIT

    def only(self, stacks: Integers) -> "FrameTree":
        """Return the tree of some of the stacks."""
        return FrameTree(self.locations, self.tree.take(stacks), self.ids[stacks])

    def by_node(self) -> tuple[Hashes, Flags]:
        """Return the id of the stack that ends at each node, 0 if there is none, and if there is.

        Raises:
            ProfileError: two stacks end at one node, or one at two nodes.
        """
        is_stack = np.zeros(len(self.tree.parents), dtype=bool)
        is_stack[self.tree.ends] = True
        ids = np.zeros(len(is_stack), dtype=np.uint64)
        ids[self.tree.ends] = self.ids
        ordered = np.sort(self.ids)
        is_repeated = bool((ordered[1:] == ordered[:-1]).any())
        if np.count_nonzero(is_stack) < len(self.ids) or is_repeated:
            raise ProfileError("a stack is there twice")
        return ids, is_stack

    def used_locations(self) -> Hashes:
        """Return the ids of its locations, ascending."""
        is_used = np.zeros(len(self.locations.ids), dtype=bool)
        is_used[self.tree.words] = True
        return self.locations.ids[is_used]

    def lists(self) -> Iterator[Stacks]:
        """Return all stacks as lists, in the order of their locations, some at a time."""
        order = np.argsort(_places(self.tree).take(self.tree.ends))
        for some in _some(self.tree, self.tree.ends[order]):
            lists = StackTree(self.tree.parents, self.tree.words, self.tree.ends[order[some]]).lists
            yield Stacks(self.ids[order[some]], lists.offsets, self.locations.ids.take(lists.words))

    def ends_in(self, location: int) -> Flags:
        """Return by stack whether its last location is one with this id."""
        last = self.tree.words.take(self.tree.ends)
        is_it: Flags = (self.locations.ids == np.uint64(location)).take(last)
        return is_it

    def fold(
        self, kept: Hashes, rest: int, hasher: Hasher, counts: Integers, least: Sequence[int]
    ) -> "Folded":
        """Fold the stacks that are not among `kept`, as `storage.blocks.rollup.fold` does.

        But a rest is counted further up the tree until it has `least` of one of the counts, with
        others that are counted there. So there are not more rests than matter, and no node loses
        as much. `counts` has a line for each stack. What was folded before is folded again. `rest`
        is the id of the location `[rest]`, which must be among the locations.
        """
        tree, locations = self.tree, self.locations
        is_kept = np.zeros(len(self.ids), dtype=bool)
        found = find_hashes(self.ids, kept)
        is_kept[found[found >= 0]] = True
        # The nearest node from each to the root that is on the way to a stack that is kept.
        nearest = np.full(len(tree.parents), ROOT, dtype=np.int32)
        nearest[tree.ends[is_kept]] = tree.ends[is_kept]
        for level in reversed(tree.levels[1:]):
            above = tree.parents[level][nearest[level] >= 0]
            nearest[above] = above
        _fill_down(tree, nearest)
        # Not all of a stack: what is left of it is the rest.
        parents = tree.parents.take(tree.ends[~is_kept])
        nodes = np.where(parents < 0, np.int32(ROOT), nearest.take(parents))
        nodes = _large_enough(tree, nodes, counts[~is_kept], least).take(nodes)
        nodes, of_rare = np.unique(nodes, return_inverse=True)
        word = locations.find(np.array([rest], dtype=np.uint64))
        left = [self.only(np.flatnonzero(is_kept))]
        for some in _some(tree, nodes):
            lists = StackTree(tree.parents, tree.words, nodes[some]).lists
            words = np.insert(lists.words, lists.offsets[1:], word)
            offsets = lists.offsets + np.arange(len(lists.offsets))
            ids = hasher.stacks(locations.ids, offsets, words)
            with_rest = StackTree.of(StackLists(offsets, words))
            assert with_rest is not None
            left.append(FrameTree(locations, with_rest, ids))
        folded = FrameTree.joined(locations, left)
        ids_of_rests = folded.ids[len(left[0].ids) :]
        return Folded(self.ids[~is_kept], ids_of_rests[of_rare], folded)


class Folded(NamedTuple):
    """A tree without rare stacks; stack `rare[i]` is counted as its stack `folded[i]`."""

    rare: Hashes
    folded: Hashes
    tree: FrameTree


def _fill_down(tree: StackTree, numbers: Indices) -> None:
    """Give each node whose number is ROOT that of its parent."""
    for level in tree.levels[1:]:
        mine, above = numbers[level], numbers.take(tree.parents[level])
        numbers[level] = np.where(mine < 0, above, mine)


def _large_enough(
    tree: StackTree, nodes: Indices, counts: Integers, least: Sequence[int]
) -> Indices:
    """Return by node where rests are counted whose nodes these are; the last one is for ROOT."""
    sums = np.zeros((len(tree.parents), len(least)), dtype=np.float64)
    enough = np.maximum(least, 1)
    has_node = nodes >= 0
    np.add.at(sums, nodes[has_node], counts[has_node])
    chosen = np.full(len(sums) + 1, ROOT, dtype=np.int32)
    for level in reversed(tree.levels):
        is_enough = (sums[level] >= enough).any(axis=1)
        chosen[:-1][level] = np.where(is_enough, np.arange(level.start, level.stop), ROOT)
        if level.start:
            sums[level][is_enough] = 0
            starts = np.flatnonzero(np.diff(tree.parents[level], prepend=ROOT))
            above = tree.parents[level][starts]
            sums[above] += np.add.reduceat(sums[level], starts)
    _fill_down(tree, chosen)
    return chosen


def read_locations(opened: Engine, files: Sequence[LocalFile], *more: int) -> Locations:
    """Return the locations in the files of `frames`, and some more.

    Raises:
        ProfileError: one is damaged or not one of ours.
        SchemaError: a later version wrote one.
    """
    chosen = of_table(files, "frames")
    opened.check(chosen)
    ids = [np.array(more, dtype=np.uint64)]
    if chosen:
        ids.append(opened.arrays_of("SELECT frame_id FROM {files}", chosen)["frame_id"])
    return Locations.of(sort_distinct(np.concatenate(ids)))


def read_tree(opened: Engine, file: LocalFile, locations: Locations) -> FrameTree:
    """Return the tree of a file of STACK_TREE.

    Raises:
        ProfileError: it is damaged or not one of ours, or lacks a location.
        SchemaError: a later version wrote it.
    """
    opened.check([file])
    if file.rows > NODE_LIMIT:
        raise ProfileError(f"cannot read {file.path}: it has more than {NODE_LIMIT:,} nodes")
    nodes = opened.arrays_of("SELECT parent, frame_id FROM {files}", [file])
    query = (
        "SELECT CAST(file_row_number AS INTEGER) AS node, stack_id"
        f" FROM {numbered_scan_of(file)} WHERE is_stack"
    )
    stacks = opened.arrays_of(query, [file])
    try:
        # As a number with a sign NO_PARENT is ROOT.
        parents, words = nodes["parent"].view(np.int32), locations.find(nodes["frame_id"])
        tree = StackTree(parents, words, stacks["node"])
        tree.check()
    except (ProfileError, ValueError) as error:
        raise ProfileError(f"cannot read {file.path}: {error}") from error
    read = FrameTree(locations, tree, stacks["stack_id"])
    if not read.is_readable:
        raise ProfileError(f"cannot read {file.path}: its stacks have too many locations")
    return read


def read_lists(
    opened: Engine, file: LocalFile, locations: Locations, wanted: Hashes | None = None
) -> tuple[FrameTree, Stacks]:
    """Return the stacks of a file of `stacks` as a tree, and those that can be in none.

    With `wanted` only these, as far as they are there.

    Raises:
        ProfileError: it is damaged or not one of ours, or lacks a location.
        SchemaError: a later version wrote it.
    """
    opened.check([file])
    needed = ""
    if wanted is not None:
        opened.register("wanted", {"stack_id": wanted})
        needed = "SEMI JOIN wanted USING (stack_id)"
    trees: list[FrameTree] = []
    others = [Stacks.joined([])]
    for first in range(0, file.rows, _STACKS_AT_ONCE):
        query = (
            f"SELECT stack_id, frame_ids FROM {numbered_scan_of(file)} {needed}"
            f" WHERE file_row_number >= {first} AND file_row_number < {first + _STACKS_AT_ONCE}"
        )
        opened.load("fetched", query, [file])
        stacks = fetch_stacks(opened)
        lengths = np.diff(stacks.offsets)
        is_branch = (lengths > 0) & (lengths <= DEEPEST)
        if not is_branch.all():
            others.append(stacks.take(np.flatnonzero(~is_branch)))
            stacks = stacks.take(np.flatnonzero(is_branch))
        try:
            trees.append(FrameTree.of(stacks, locations))
        except ProfileError as error:
            raise ProfileError(f"cannot read {file.path}: {error}") from error
    return FrameTree.joined(locations, trees), Stacks.joined(others)


def _some(tree: StackTree, ends: Indices) -> Iterator[slice]:
    """Cut stacks that end at some nodes into pieces that have some words."""
    firsts = np.array([level.start for level in tree.levels], dtype=np.int64)
    words = np.cumsum(np.searchsorted(firsts, ends, side="right") + 1)
    first = 0
    while first < len(ends):
        before = words[first - 1] if first else 0
        end = int(np.searchsorted(words, before + _LISTED_WORDS, side="right"))
        yield slice(first, max(end, first + 1))
        first = max(end, first + 1)


def _places(tree: StackTree) -> Indices:
    """Return by node how many come before it if each is followed by all below it."""
    sizes = np.ones(len(tree.parents), dtype=np.int32)
    for level in reversed(tree.levels[1:]):
        parents = tree.parents[level]
        starts = np.flatnonzero(np.diff(parents, prepend=ROOT))
        sizes[parents[starts]] += np.add.reduceat(sizes[level], starts)
    places = np.zeros(len(sizes), dtype=np.int32)
    for level in tree.levels:
        before = np.cumsum(sizes[level]) - sizes[level]
        if level.start:
            parents = tree.parents[level]
            starts = np.flatnonzero(np.diff(parents, prepend=ROOT))
            before -= np.repeat(before[starts], np.diff(np.append(starts, len(parents))))
            before += places.take(parents) + 1
        places[level] = before
    return places
