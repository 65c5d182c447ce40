"""Paths: the rows of a profile as boxes, to be turned, cut and searched before they are drawn.

A path is a row: its labels' frames, then its stack (`profiler.flamegraph.stacks`), root first.
Views of a flame graph (only what is below a box, only stacks with a function, its callers, the
inverted graph) are made by changing paths. Paths are drawn (`profiler.flamegraph.flamegraph`) or
added up (`functions`).

They have a shape, which answers for them: lists of boxes, the branches of a tree, or walks up one.
Drawing walks over places of a shape, from each to those one deeper. A place of a tree is a node, of
all paths through it; of other shapes it is one of a path.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from profiler.flamegraph import trees
from profiler.flamegraph.path_lists import Flags, PathLists
from profiler.flamegraph.path_tree import PathClimbs, PathTree
from profiler.flamegraph.stacks import Group, Stacks, split_parts
from storage.columns import Columns
from storage.profile import Indices, Integers, label_frames
from storage.stack_tree import StackTree
from symbolizer.location import Frame, Kind

ROOT = Frame("all", "", Kind.LABEL)


class FunctionRow(NamedTuple):
    """A row of the table: `self` where the function is the leaf, `total` where it is anywhere."""

    frame: Frame
    self: int
    total: int
    self_samples: int
    total_samples: int


class Matches(NamedTuple):
    """What a search has found: the paths with a match, and how many functions match."""

    total: int
    samples: int
    functions: int


@dataclass(frozen=True, slots=True, eq=False)
class Paths:
    """Path i is that of `shape`, in numbers of `frames`; it counts `values[i]`."""

    unit: str
    frames: tuple[Frame, ...]
    """In the order of their names; frames of labels stand last."""
    functions_count: int
    """How many of the frames are not labels."""
    root: Frame
    shape: PathLists | PathTree | PathClimbs
    heads: int
    """How many labels each path begins with."""
    values: Integers
    samples: Integers

    @classmethod
    def of(cls, profile: Columns, by: Sequence[str] = (), group: Group = Group.FUNCTION) -> "Paths":
        """Return the paths of a profile, the labels in `by` as their first frames."""
        return cls.of_stacks(Stacks.of([profile], group), profile, by)

    @classmethod
    def of_stacks(cls, stacks: Stacks, profile: Columns, by: Sequence[str]) -> "Paths":
        heads = label_frames(profile.label_sets, by)
        return cls.of_rows(stacks, heads, Rows.of(profile), profile.unit)

    @classmethod
    def of_rows(
        cls, stacks: Stacks, heads: Sequence[Sequence[Frame]], rows: "Rows", unit: str
    ) -> "Paths":
        """Return a path by row: the frames that its labels have in `heads`, then its stack."""
        labels = sorted({frame for head in heads for frame in head})
        first = len(stacks.frames)
        number = {frame: first + i for i, frame in enumerate(labels)}
        depth = len(heads[0]) if heads else 0
        table = np.array([[number[frame] for frame in head] for head in heads], np.int32)
        return cls(
            unit=unit,
            frames=(*stacks.frames, *labels),
            functions_count=first,
            root=ROOT,
            shape=_shape_of(stacks, table.reshape(len(heads), depth), rows),
            heads=depth,
            values=rows.values,
            samples=rows.samples,
        )

    @property
    def total(self) -> int:
        return int(self.values.sum())

    @property
    def total_samples(self) -> int:
        return int(self.samples.sum())

    def inverted(self) -> "Paths":
        """Return the paths leaf first; their labels stay where they are."""
        return replace(self, shape=self.shape.inverted(self.heads))

    def callers(self, function: str) -> "Paths":
        """Return what called a function, nearest first; it is the root itself.

        A stack counts once, from the innermost call of it.
        """
        wanted = self._boxes_of(function)
        numbers = np.flatnonzero(wanted)
        root = self.frames[numbers[0]] if len(numbers) else Frame(function, "", Kind.NATIVE)
        return replace(self._with(*self.shape.above_last(wanted)), root=root, heads=0)

    def focus(self, function: str) -> "Paths":
        """Keep the paths that have a function."""
        is_found, _ = self.shape.find(self._boxes_of(function))
        kept = np.flatnonzero(is_found)
        return self._with(self.shape.only(kept), kept)

    def hide(self, function: str) -> "Paths":
        """Take a function out of all paths; its callees take its place."""
        return replace(self, shape=self.shape.without(self._boxes_of(function)))

    def through(self, path: Sequence[int]) -> "Paths":
        """Return the paths that begin with these boxes, from the last of them on."""
        return self._behind(path, with_last=True) if path else self

    def below(self, path: Sequence[int]) -> "Paths":
        """Return the paths below the box that these boxes lead to, which becomes the root."""
        if not path:
            return self
        return replace(self._behind(path, with_last=False), root=self.frames[path[-1]])

    def sums_along(
        self, path: Sequence[int], columns: Sequence[Integers] = ()
    ) -> list[tuple[int, ...]]:
        """Return the totals of each of these boxes, from the first one on.

        Those of columns of counts by path, by default of values and samples.
        """
        columns = columns or (self.values, self.samples)
        counters = [self.shape.counter(column) for column in columns] if path else []
        return [
            tuple(int(count(places).sum()) for count in counters) for places in self._along(path)
        ]

    def search(self, text: str) -> Matches:
        """Count the paths with a function or module that has `text` in it, in any case.

        Functions are searched for by the longest of their names. The root is one of the functions
        too: everything below a match is found.
        """
        wanted = text.casefold()

        is_match = np.array([frame.matches(wanted) for frame in self.frames], dtype=bool)
        is_found, is_used = self.shape.find(is_match)
        if self.root is not ROOT and self.root.matches(wanted):
            is_found[:] = True
        samples = int(self.samples[is_found].sum())
        return Matches(int(self.values[is_found].sum()), samples, int(is_used.sum()))

    def functions(self) -> list[FunctionRow]:
        """Return the table of functions, largest self first; recursion counts once in the total.

        Labels are not functions, and neither is the root.
        """
        count = self.functions_count
        columns = (self.values, self.samples)
        is_function = np.arange(len(self.frames)) < count
        totals = [total[:count] for total in self.shape.totals(columns, is_function)]
        leaves = self.shape.leaves(of_empty=count)
        ending = np.flatnonzero(leaves < count)
        self_totals = [sum_by(leaves[ending], column[ending], count) for column in columns]
        order = np.lexsort((np.arange(count), -totals[0], -self_totals[0]))
        table = (self_totals[0], totals[0], self_totals[1], totals[1])
        rows = zip(*(column[order].tolist() for column in table), strict=True)
        return [
            FunctionRow(self.frames[number], *row)
            for number, row in zip(order.tolist(), rows, strict=True)
        ]

    def _boxes_of(self, function: str) -> Flags:
        # Labels come last: a service with the name of a function is not one.
        named = np.zeros(len(self.frames), dtype=bool)
        for i, frame in enumerate(self.frames[: self.functions_count]):
            named[i] = frame.has_name(function)
        return named

    def _along(self, path: Sequence[int]) -> Iterator[Integers]:
        """Return the places where the first of these boxes is, the second below it, and so on."""
        shape, places = self.shape, self.shape.first()
        for depth, box in enumerate(path):
            if depth:
                places, _ = shape.next(places, depth - 1)
            places = places[shape.boxes_at(places, depth) == box]
            yield places

    def _behind(self, path: Sequence[int], with_last: bool) -> "Paths":
        (places,) = deque(self._along(path), maxlen=1)
        depth = len(path) - 1
        chosen = self._with(*self.shape.branch(places, depth, with_last))
        return replace(chosen, heads=max(0, self.heads - depth - (not with_last)))

    def _with(self, shape: PathLists | PathTree | PathClimbs, kept: Integers) -> "Paths":
        """Return some of the paths, changed to those of a shape."""
        return replace(self, shape=shape, values=self.values[kept], samples=self.samples[kept])


def _shape_of(stacks: Stacks, heads: Indices, rows: "Rows") -> PathLists | PathTree:
    """Return a path by row: its line of `heads`, then its stack."""
    if isinstance(stacks.stacks, StackTree):
        tree = stacks.stacks.take(rows.stacks)
        if not heads.shape[1]:
            return PathTree(tree)
        labelled = trees.below_labels(tree, heads, rows.labels)
        if labelled is not None:
            return PathTree(labelled)
    lists, depth = stacks.lists, heads.shape[1]
    starts, ends = lists.offsets[rows.stacks], lists.offsets[rows.stacks + 1]
    if not depth:
        return PathLists(lists.words, starts, ends)
    lengths = ends - starts + depth
    path_ends = np.cumsum(lengths)
    path_starts = path_ends - lengths
    boxes = np.empty(int(lengths.sum()), dtype=np.int32)
    for i in range(depth):
        boxes[path_starts + i] = heads[rows.labels, i]
    for part in split_parts(starts, ends):
        to = (path_starts[part.rows] + depth)[part.owner] + part.within
        boxes[to] = lists.words.take(part.place)
    return PathLists(boxes, path_starts, path_ends)


class Rows(NamedTuple):
    """Rows of a profile: numbers of stacks and of label sets, and what each counts."""

    stacks: Integers
    labels: Integers
    values: Integers
    samples: Integers

    @classmethod
    def of(cls, profile: Columns) -> "Rows":
        labels, stacks = np.array(profile.rows.T, dtype=np.int64, order="C")
        samples, values = np.array(profile.counts.T, dtype=np.int64, order="C")
        return cls(stacks, labels, values, samples)


def sum_by(which: Indices | Integers, values: Integers, count: int) -> Integers:
    """Add up integers by group, exactly: bincount's weights are floats, exact to 2^53 only."""
    sums = np.zeros(count, dtype=np.int64)
    np.add.at(sums, which, values)
    return sums
