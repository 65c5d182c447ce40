"""Trees of boxes: what changing stacks does to the tree that they are the branches of.

They are `storage.stack_tree.StackTree`s whose words are numbers of boxes. Other than those of
locations they may have siblings of one box: several locations are one function. Drawing joins
these, and only where it gets to them.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from storage.grouping import group_keys, number_groups, ranges
from storage.profile import Indices, Integers
from storage.stack_tree import DEEPEST, ROOT, StackLists, StackTree


def expand(
    tree: StackTree, firsts: Integers, counts: Integers, numbers: Indices
) -> StackTree | None:
    """Return the tree with the boxes of each word in its place, one below the other.

    Word i stands for `numbers[firsts[i]:][:counts[i]]`, at least one. None if a stack becomes
    longer than DEEPEST.
    """
    if int(counts.max(initial=1)) == 1:
        return StackTree(tree.parents, numbers.take(firsts).take(tree.words), tree.ends)
    lengths = counts.take(tree.words)
    words = numbers.take(ranges(firsts.take(tree.words), lengths))
    depths = np.zeros(len(lengths) + 1, dtype=np.int64)  # that of ROOT is the last one
    for level in tree.levels:
        depths[level] = depths.take(tree.parents[level]) + lengths[level]
    if int(depths.max()) > DEEPEST:
        return None
    lasts = np.append(np.cumsum(lengths) - 1, ROOT)
    parents = np.arange(len(words)) - 1
    parents[lasts[:-1] - lengths + 1] = lasts.take(tree.parents)
    depth = np.repeat(depths[:-1] - lasts[:-1], lengths) + np.arange(len(words))
    return _in_order(parents, words, depth, lasts.take(tree.ends))


def contract(tree: StackTree, is_dropped: npt.NDArray[np.bool_]) -> StackTree:
    """Return the tree without some nodes; what was below these is below their parents."""
    if not is_dropped.any():
        return tree
    depths = np.zeros(len(is_dropped) + 1, dtype=np.int64)
    for level in tree.levels:
        depths[level] = depths.take(tree.parents[level]) + ~is_dropped[level]
    kept = np.flatnonzero(~is_dropped)
    numbers = np.full(len(depths), ROOT, dtype=np.int32)
    numbers[kept] = np.arange(len(kept), dtype=np.int32)
    above = nearest(tree, ~is_dropped)
    parents = numbers.take(above.take(tree.parents[kept]))
    ends = numbers.take(above.take(tree.ends))
    return _in_order(parents, tree.words[kept], depths[kept], ends)


def nearest(tree: StackTree, is_wanted: npt.NDArray[np.bool_]) -> Indices:
    """Return for each node the first wanted one from it upwards; the last number is for ROOT."""
    found = np.arange(len(is_wanted) + 1, dtype=np.int32)
    found[ROOT] = ROOT
    for level in tree.levels:
        above = found.take(tree.parents[level])
        found[level] = np.where(is_wanted[level], found[level], above)
    return found


def branch(
    tree: StackTree, nodes: Integers, depth: int, with_them: bool
) -> tuple[StackTree, Integers]:
    """Return the tree of the stacks that go through nodes of a depth, and which stacks these are.

    Stacks begin at the nodes, or below them.
    """
    numbers = np.full(len(tree.parents) + 1, ROOT - 1, dtype=np.int32)
    if not with_them:
        numbers[nodes] = ROOT
        nodes, _ = children(tree, nodes, depth)
        depth += 1
    taken, parents, first = [nodes[:0]], [np.zeros(0, np.int32)], 0
    above = np.full(len(nodes), ROOT, dtype=np.int32)
    while len(nodes):
        taken.append(nodes)
        parents.append(above)
        numbers[nodes] = np.arange(first, first + len(nodes), dtype=np.int32)
        first += len(nodes)
        nodes, _ = children(tree, nodes, depth)
        depth += 1
        above = numbers.take(tree.parents[nodes])
    ends = numbers.take(tree.ends)
    stacks = np.flatnonzero(ends >= ROOT)
    words = tree.words.take(np.concatenate(taken))
    return StackTree(np.concatenate(parents), words, ends[stacks]), stacks


def children(tree: StackTree, nodes: Integers, depth: int) -> tuple[Integers, Integers]:
    """Return the nodes below some of one depth, in ascending order, and which one each is below."""
    if depth + 1 >= len(tree.levels):
        return nodes[:0], nodes[:0]
    level = tree.levels[depth + 1]
    # Of one type, or all parents would be converted.
    wanted = nodes.astype(tree.parents.dtype, copy=False)
    firsts = np.searchsorted(tree.parents[level], wanted, "left")
    counts = np.searchsorted(tree.parents[level], wanted, "right") - firsts
    return ranges(firsts + level.start, counts), np.repeat(np.arange(len(nodes)), counts)


def below_labels(tree: StackTree, heads: Indices, labels: Integers) -> StackTree | None:
    """Return the tree with the boxes of labels above it; stack i begins with `heads[labels[i]]`.

    Each head has those nodes below it that its stacks go through. None if there are more than
    DEEPEST labels.
    """
    offsets = np.arange(len(heads) + 1) * heads.shape[1]
    whole = StackTree.of(StackLists(offsets, heads.reshape(-1)))
    if whole is None:
        return None
    above = whole.take(labels)
    last = above.levels[-1] if len(labels) else slice(0, 0)
    head = above.ends.astype(np.int64) - last.start
    size = max(1, len(tree.parents))
    # By level, head and node: so the pairs of head and node at which stacks end.
    has_frames = np.flatnonzero(tree.ends >= 0)
    node = tree.ends[has_frames].astype(np.int64)
    starts = np.array([level.start for level in tree.levels], dtype=np.int64)
    level_of = np.searchsorted(starts, node, "right") - 1
    width = max(1, last.stop - last.start) * size
    firsts, order = group_keys(level_of * width + head[has_frames] * size + node)
    end_keys = (head[has_frames] * size + node)[order[firsts]]
    bounds = np.searchsorted(level_of[order[firsts]], np.arange(len(starts) + 1))
    # From the deepest level upwards: pairs at which stacks end, and parents of those below.
    places = np.zeros(len(end_keys), dtype=np.int64)
    found: list[tuple[Indices, Indices]] = []
    parent_keys, which = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for i in range(len(starts) - 1, -1, -1):
        ending = slice(bounds[i], bounds[i + 1])
        keys, of_parents, places[ending] = _merge(parent_keys, end_keys[ending])
        if found:
            found[-1] = (found[-1][0], of_parents.take(which).astype(np.int32))
        heads_here = keys // size
        nodes_here = keys - heads_here * size
        found.append((tree.words.take(nodes_here), heads_here.astype(np.int32)))
        pair_parents: Integers = heads_here * size + tree.parents.take(nodes_here)
        is_first = _is_first(pair_parents)
        parent_keys, which = pair_parents[is_first], np.cumsum(is_first) - 1
    found.reverse()
    parents, words, first, before = [above.parents], [above.words], last.stop, last.start
    for i, (word, parent) in enumerate(found):
        parents.append(parent + np.int32(before))
        words.append(word)
        places[bounds[i] : bounds[i + 1]] += first
        before, first = first, first + len(word)
    ends = above.ends.copy()
    ends[has_frames] = places.take(number_groups(firsts, order))
    return StackTree(np.concatenate(parents), np.concatenate(words), ends)


def _merge(some: Integers, more: Integers) -> tuple[Integers, Integers, Integers]:
    """Return numbers that are in one of two ascending arrays, and where those of each are then."""
    at = np.searchsorted(some, more)
    is_new = np.append(some, -1).take(at) != more
    added = at[is_new]
    places = np.arange(len(some)) + np.cumsum(np.bincount(added, minlength=len(some) + 1))[:-1]
    return np.insert(some, added, more[is_new]), places, at + np.cumsum(is_new) - is_new


class Ranges(NamedTuple):
    """Stacks in such an order that those that go through a node stand together.

    Through node i go the stacks `order[firsts[i]:pasts[i]]`.
    """

    order: Indices
    firsts: Indices
    pasts: Indices


def ranges_of(tree: StackTree) -> Ranges:
    """Return the stacks of a tree in the order of a walk over it."""
    count = len(tree.parents)
    # How many end at each node; those at ROOT stand last.
    own = np.roll(np.bincount(tree.ends + 1, minlength=count + 1), -1).astype(np.int32)
    sizes = own.copy()

    def families(level: slice) -> tuple[Integers, Indices, Indices]:
        """Return where nodes of one parent begin and end, the parents, and the sizes added up."""
        heads = np.flatnonzero(_is_first(tree.parents[level]))
        before = np.zeros(level.stop - level.start + 1, dtype=np.int32)
        np.cumsum(sizes[level], out=before[1:])
        return np.append(heads, len(before) - 1), tree.parents[level].take(heads), before

    for level in reversed(tree.levels):
        bounds, above, before = families(level)
        sizes[above] += np.diff(before.take(bounds))
    firsts = np.zeros(count + 1, dtype=np.int32)
    for level in tree.levels:
        # Behind the stacks that end at the parent, and those of the siblings before.
        bounds, above, before = families(level)
        shift = firsts.take(above) + own.take(above) - before.take(bounds[:-1])
        firsts[level] = before[:-1] + np.repeat(shift, np.diff(bounds))
    order = np.argsort(firsts.take(tree.ends), kind="stable")
    return Ranges(order.astype(np.int32), firsts[:-1], firsts[:-1] + sizes[:-1])


def _is_first(parents: Indices | Integers) -> npt.NDArray[np.bool_]:
    """Return which of nodes that stand together by parent is the first of its parent."""
    is_first = np.ones(len(parents), dtype=bool)
    is_first[1:] = parents[1:] != parents[:-1]
    return is_first


def _in_order(
    parents: Indices | Integers, words: Indices, depths: Integers, ends: Indices | Integers
) -> StackTree:
    """Number nodes anew as a StackTree has them; each stands behind its parent already."""
    # Sorting 16 bits takes a tenth of the time.
    order = np.argsort(depths.astype(np.uint16), kind="stable")
    numbers = np.full(len(parents) + 1, ROOT, dtype=np.int32)
    first = 0
    for past in np.cumsum(np.bincount(depths)).tolist():
        nodes = order[first:past]
        nodes = nodes[np.argsort(numbers.take(parents[nodes]), kind="stable")]
        order[first:past] = nodes
        numbers[nodes] = np.arange(first, past, dtype=np.int32)
        first = past
    above = numbers.take(parents[order])
    return StackTree(above, words.take(order), numbers.take(ends).astype(np.int32))
