"""Stacks: those of profiles as numbers of boxes, which is all that is drawn of them.

A box is (function, module, kind), or a line, file or module (`Group`). Boxes are told apart by
arrays of numbers; only those that differ become a `Frame`, in the order of their names. The line of
a function is the one on which it begins, as far as that is known.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from profiler.flamegraph import trees
from storage.columns import Columns, ShownFrames
from storage.grouping import agree, distinct, group_keys, number_groups, ranges
from storage.interpreters import fold_interpreters
from storage.profile import Indices, Integers
from storage.query.resolve import resolve_columns
from storage.stack_tree import StackLists, StackTree, lists_of, merge_trees
from symbolizer.location import Frame, Kind

_PART_BOXES = 1 << 17
"""Boxes processed together: their temporary arrays fit a CPU's cache, and an hour of a fleet does
not take ten times its own memory."""

_EMPTY = 0
"""The number of the empty text, which is the first of all."""
_UNKNOWN = "[unknown]"
"""How the module is shown of frames that have none, if modules or files are shown."""


class Group(StrEnum):
    """What a box stands for. File and module boxes that follow each other directly become one."""

    FUNCTION = "function"
    LINE = "line"
    FILE = "file"
    MODULE = "module"


class Part(NamedTuple):
    """Some of the stacks. By box of them: its stack, counted within `rows`, and its depth."""

    rows: slice
    owner: Integers
    within: Integers
    place: Integers
    """The index of the box in the array that all of them are in."""


def split_parts(starts: Integers, ends: Integers) -> Iterator[Part]:
    """Go through stacks, so many at a time that memory is bounded (but for one long stack)."""
    lengths = ends - starts
    past = np.cumsum(lengths)
    first = 0
    while first < len(lengths):
        limit = past[first] - lengths[first] + _PART_BOXES
        rows = slice(first, max(first + 1, int(np.searchsorted(past, limit, "right"))))
        mine = lengths[rows]
        owner = np.repeat(np.arange(len(mine)), mine)
        within = np.arange(len(owner)) - np.repeat(np.cumsum(mine) - mine, mine)
        yield Part(rows, owner, within, starts[rows][owner] + within)
        first = rows.stop


@dataclass(frozen=True, slots=True, eq=False)
class Stacks:
    """Stacks of boxes: `stacks` has numbers of `frames`.

    They are a tree if those of one of the profiles are. In that of several profiles equal stacks
    end at the same node.
    """

    frames: tuple[Frame, ...]
    """In the order of their names."""
    stacks: StackLists | StackTree

    @classmethod
    def of(cls, profiles: Sequence[Columns], group: Group) -> "Stacks":
        """Return the stacks of all profiles, those of one after those of another."""
        shown = ShownFrames.joined([each.shown_frames() for each in profiles])
        frames, numbers = _number_boxes(shown, group)
        joins = group in {Group.FILE, Group.MODULE}
        boxes = _Boxes(shown.offsets[:-1], np.diff(shown.offsets), numbers)
        locations = np.cumsum([0, *(len(each.locations) for each in profiles)]).tolist()
        parts = [boxes.part(*bounds) for bounds in itertools.pairwise(locations)]
        tree = _tree_of(profiles, parts, joins)
        if tree is not None:
            return cls(frames, tree)
        lists = _lists_of(profiles, parts)
        return cls(frames, _without_repeats(lists) if joins else lists)

    def __len__(self) -> int:
        return len(self.stacks)

    @property
    def lists(self) -> StackLists:
        return lists_of(self.stacks)

    def leaves(self, of_empty: int) -> Integers:
        """Return the last box of each stack."""
        if isinstance(self.stacks, StackTree):
            return np.append(self.stacks.words, of_empty).take(self.stacks.ends)
        starts, ends = self.stacks.offsets[:-1], self.stacks.offsets[1:]
        leaves = np.full(len(starts), of_empty, dtype=np.int64)
        filled = np.flatnonzero(ends > starts)
        leaves[filled] = self.stacks.words[ends[filled] - 1]
        return leaves

    def numbered(self) -> tuple[Integers, int]:
        """Return a number by stack, the same for the same boxes in the same order, and a limit."""
        if isinstance(self.stacks, StackTree):
            return self.stacks.ends.astype(np.int64) + 1, len(self.stacks.parents) + 1
        prints = _fingerprints(self.stacks, len(self.frames))
        known, numbers = np.unique(prints, return_inverse=True)
        return numbers, len(known)


class NumberedStacks(NamedTuple):
    """Stacks, a number of each, which equal ones share, and a limit of these numbers."""

    stacks: Stacks
    numbers: Integers
    limit: int


class PairStacks:
    """The stacks of two profiles, those of the after side numbered after the others.

    Locations of both are named as well as one of them can: a better name is no change.
    """

    def __init__(self, before: Columns, after: Columns) -> None:
        self.before, self.after = resolve_columns([before, after])
        self._known: dict[tuple[Group, bool], NumberedStacks] = {}

    def of_group(self, group: Group, *, python_native: bool = False) -> NumberedStacks:
        """Return them with a group's boxes, and with what interpreters add to them if asked for.

        Verdicts are of functions without that, which are kept; of all others, the last ones asked
        for.
        """
        key = (group, python_native)
        if key not in self._known:
            sides = [self.before, self.after]
            if not python_native:
                sides = [fold_interpreters(each) for each in sides]
            stacks = Stacks.of(sides, group)
            kept = [each for each in self._known.items() if each[0] == (Group.FUNCTION, False)]
            self._known = dict([*kept, (key, NumberedStacks(stacks, *stacks.numbered()))])
        return self._known[key]


def _fingerprints(lists: StackLists, boxes: int) -> npt.NDArray[np.uint64]:
    """Return a number by stack, the same for the same boxes in the same order.

    The numbers are drawn anew each time, so that nobody can craft two stacks with the same one.
    """
    random = np.random.default_rng()
    words = random.integers(2**64, size=boxes, dtype=np.uint64)
    starts, ends = lists.offsets[:-1], lists.offsets[1:]
    longest = int((ends - starts).max(initial=0))
    base = random.integers(2**63, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    powers = np.full(longest, base, dtype=np.uint64).cumprod(dtype=np.uint64)
    found = np.zeros(len(starts), dtype=np.uint64)
    for part in split_parts(starts, ends):
        terms = words[lists.words.take(part.place)] * powers[part.within]
        sums = np.concatenate([np.zeros(1, np.uint64), terms.cumsum(dtype=np.uint64)])
        last = (ends - starts)[part.rows].cumsum()
        found[part.rows] = np.diff(sums[np.concatenate([np.zeros(1, np.int64), last])])
    return found


class _Boxes(NamedTuple):
    """Location i is shown as `numbers[firsts[i]:][:counts[i]]`, outermost first."""

    firsts: Integers
    counts: Integers
    numbers: Indices

    def part(self, first: int, past: int) -> "_Boxes":
        return _Boxes(self.firsts[first:past], self.counts[first:past], self.numbers)


def _lists_of(profiles: Sequence[Columns], parts: Sequence[_Boxes]) -> StackLists:
    lengths, boxes = [np.zeros(1, np.int64)], []
    for each, (firsts, counts, numbers) in zip(profiles, parts, strict=True):
        words, ends = each.stack_words, each.stack_offsets.astype(np.int64)
        if int(counts.max(initial=1)) == 1:
            of_location = numbers.take(firsts)
            mine = np.empty(len(words), dtype=numbers.dtype)
            for at in range(0, len(words), _PART_BOXES):  # indices are widened meanwhile
                of_location.take(words[at : at + _PART_BOXES], out=mine[at : at + _PART_BOXES])
        else:
            # Each word becomes the boxes of its location: one, or several when inlined.
            lengths_of = counts.take(words)
            mine = numbers.take(ranges(firsts.take(words), lengths_of))
            ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths_of)])[ends]
        lengths.append(np.diff(ends))
        boxes.append(mine)
    return StackLists(np.concatenate(lengths).cumsum(), np.concatenate(boxes))


def _tree_of(profiles: Sequence[Columns], parts: Sequence[_Boxes], joins: bool) -> StackTree | None:
    """Return the stacks as a tree; None if all are lists, or if some are too long for a tree.

    `joins` says to make one of boxes that follow each other directly.
    """
    if not any(isinstance(each.stacks, StackTree) for each in profiles):
        return None
    found = []
    for each, boxes in zip(profiles, parts, strict=True):
        tree = StackTree.of(each.stacks) if isinstance(each.stacks, StackLists) else each.stacks
        expanded = None if tree is None else trees.expand(tree, *boxes)
        if expanded is None:
            return None
        if joins:
            above = np.append(expanded.words, np.int32(-1)).take(expanded.parents)
            expanded = trees.contract(expanded, expanded.words == above)
        found.append(expanded)
    if len(found) == 1:
        return found[0]
    count = max(int(tree.words.max(initial=-1)) for tree in found) + 1
    return merge_trees(found, [np.arange(count)] * len(found))


def _without_repeats(lists: StackLists) -> StackLists:
    """Return stacks with boxes that follow each other directly as one."""
    if not len(lists.words):
        return lists
    differs = np.concatenate([[True], lists.words[1:] != lists.words[:-1]])
    differs[lists.offsets[:-1][np.diff(lists.offsets) > 0]] = True
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(differs)])[lists.offsets]
    return StackLists(offsets, lists.words[differs])


def _number_boxes(shown: ShownFrames, group: Group) -> tuple[tuple[Frame, ...], Indices]:
    """Return the boxes in the order of their names, and the number of each shown frame's box.

    The frames of each location come outermost first.
    """
    texts, numbers = _sort_texts(shown)
    keys = _keys_of(shown, numbers, group, unknown=texts.index(_UNKNOWN))
    firsts, order = group_keys(_combine(keys))
    at = order[firsts]
    boxes = [key[at] for key in keys]
    if group is Group.LINE:
        boxes[4] = shown.table[at, 4]
    elif group is Group.FUNCTION:  # file and first line are shown, but tell no box apart
        files, lines = numbers[order, 3], shown.table[order, 5]
        boxes[3] = np.maximum(agree(np.where(files == _EMPTY, -1, files), firsts), _EMPTY)
        begins = agree(np.where(lines == 0, -1, lines), firsts)
        boxes[4] = np.where(boxes[3] == _EMPTY, 0, np.maximum(begins, 0))
    kinds = {i: Kind(texts[i]) for i in np.unique(boxes[2]).tolist()}
    function, module, kind, file, line = (box.tolist() for box in boxes)
    text = texts.__getitem__
    fields = map(text, function), map(text, module), map(kinds.__getitem__, kind), map(text, file)
    frames = tuple(map(Frame._make, zip(*fields, line, strict=True)))
    of_frame = number_groups(firsts, order).astype(np.int32)
    ends = np.repeat(shown.offsets[:-1] + shown.offsets[1:] - 1, np.diff(shown.offsets))
    return frames, of_frame[ends - np.arange(len(ends))]


def _sort_texts(shown: ShownFrames) -> tuple[list[str], Integers]:
    """Return the texts in use, each once and sorted, and the numbers of those of each frame.

    The empty text and that of unknown modules are among them.
    """
    used, which = distinct(shown.table[:, :4], len(shown.texts))
    texts = [*shown.texts.take(used), b"", _UNKNOWN.encode()]
    order = sorted(range(len(texts)), key=texts.__getitem__)  # UTF-8 sorts as the text does
    is_new = [True, *(texts[i] != texts[j] for i, j in itertools.pairwise(order))]
    numbers = np.empty(len(texts), dtype=np.int64)
    numbers[order] = np.cumsum(is_new) - 1
    return [texts[i].decode() for i in itertools.compress(order, is_new)], numbers[which]


def _keys_of(
    shown: ShownFrames, numbers: Integers, group: Group, unknown: int
) -> tuple[Integers, ...]:
    """Return what tells the box of each shown frame from others, in columns like those of Frame.

    In boxes of files and modules an inlined call counts as the code it was inlined into.
    """
    function, module, kind, file = numbers.T
    nothing = np.zeros_like(function)
    if group is Group.FUNCTION:
        return (function, module, kind, nothing, nothing)
    if group is Group.LINE:
        lines = np.unique(shown.table[:, 4], return_inverse=True)[1]
        return (function, module, kind, file, lines)
    outer = np.repeat(kind[shown.offsets[1:] - 1], np.diff(shown.offsets))
    name = np.where(module == _EMPTY, unknown, module)
    if group is Group.MODULE:
        return (name, module, outer, nothing, nothing)
    return (np.where(file == _EMPTY, name, file), module, outer, file, nothing)


def _combine(columns: Sequence[Integers]) -> Integers:
    """Return a number by line of these columns of 31 bits, in the same order as the lines."""
    key = columns[0]
    for column in columns[1:]:
        width = int(column.max(initial=0)) + 1
        if int(key.max(initial=0)) >= (1 << 62) // width:
            key = np.unique(key, return_inverse=True)[1]
        key = key * width + column
    return key
