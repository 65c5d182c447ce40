"""Paths: the rows of a profile as boxes, to be turned, cut and searched before they are drawn.

A path is a row: its labels' frames, then its stack (`profiler.flamegraph.stacks`), root first.
Views of a flame graph (only what is below a box, only stacks with a function, its callers, the
inverted graph) are made by changing paths. Paths are drawn (`profiler.flamegraph.flamegraph`) or
added up (`functions`).
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from profiler.flamegraph.stacks import Group, Part, Stacks, split_parts
from storage.columns import Columns
from storage.profile import Indices, Integers, label_frames
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
    """Path i is `boxes[starts[i]:ends[i]]`, numbers of `frames`; it counts `values[i]`."""

    unit: str
    frames: tuple[Frame, ...]
    """In the order of their names; frames of labels stand last."""
    functions_count: int
    """How many of the frames are not labels."""
    root: Frame
    boxes: Indices
    starts: Integers
    ends: Integers
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
        numbers = rows.stacks.astype(np.int64)
        starts, ends = stacks.offsets[numbers], stacks.offsets[numbers + 1]
        boxes = stacks.boxes
        if depth:
            lengths = ends - starts + depth
            path_ends = np.cumsum(lengths)
            path_starts = path_ends - lengths
            boxes = np.empty(int(lengths.sum()), dtype=np.int32)
            table = np.array([[number[frame] for frame in head] for head in heads], np.int32)
            for i in range(depth):
                boxes[path_starts + i] = table[rows.labels, i]
            for part in split_parts(starts, ends):
                to = (path_starts[part.rows] + depth)[part.owner] + part.within
                boxes[to] = stacks.boxes.take(part.place)
            starts, ends = path_starts, path_ends
        return cls(
            unit=unit,
            frames=(*stacks.frames, *labels),
            functions_count=first,
            root=ROOT,
            boxes=boxes,
            starts=starts,
            ends=ends,
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

        def turn(part: Part) -> Integers:
            last = self.ends[part.rows] - 1 + self.heads
            return np.where(part.within < self.heads, part.place, last[part.owner] - part.within)

        return self._turned(turn)

    def callers(self, function: str) -> "Paths":
        """Return what called a function, nearest first; it is the root itself.

        A stack counts once, from the innermost call of it.
        """
        wanted = self._boxes_of(function)
        last = self._last_with(wanted)
        kept = np.flatnonzero(last >= 0)
        chosen = replace(self._only(kept), ends=last[kept], heads=0)
        numbers = np.flatnonzero(wanted)
        root = self.frames[numbers[0]] if len(numbers) else Frame(function, "", Kind.NATIVE)

        def turn(part: Part) -> Integers:
            return (chosen.ends[part.rows] - 1)[part.owner] - part.within

        return replace(chosen._turned(turn), root=root)  # noqa: SLF001 - paths like these

    def focus(self, function: str) -> "Paths":
        """Keep the paths that have a function."""
        return self._only(np.flatnonzero(self._last_with(self._boxes_of(function)) >= 0))

    def hide(self, function: str) -> "Paths":
        """Take a function out of all paths; its callees take its place."""
        hidden = self._boxes_of(function)
        lengths = np.zeros(len(self.starts), dtype=np.int64)
        pieces = [np.zeros(0, dtype=np.int32)]
        for part in self._parts():
            boxes = self.boxes.take(part.place)
            kept = ~hidden.take(boxes)
            pieces.append(boxes[kept])
            counts = lengths[part.rows]
            counts += np.bincount(part.owner[kept], minlength=len(counts))
        ends = np.cumsum(lengths)
        return replace(self, boxes=np.concatenate(pieces), starts=ends - lengths, ends=ends)

    def through(self, path: Sequence[int]) -> "Paths":
        """Return the paths that begin with these boxes, from the last of them on."""
        chosen = self._only(deque(self._along(path), maxlen=1)[0])
        above = max(0, len(path) - 1)
        return replace(chosen, starts=chosen.starts + above, heads=max(0, self.heads - above))

    def sums_along(self, path: Sequence[int]) -> list[tuple[int, int]]:
        """Return the total value and samples of each of these boxes, from the first one on."""
        rows = itertools.islice(self._along(path), 1, None)
        return [(int(self.values[each].sum()), int(self.samples[each].sum())) for each in rows]

    def _along(self, path: Sequence[int]) -> Iterator[Integers]:
        """Return all rows, then those that begin with the first box, the first two, and so on."""
        alive = np.arange(len(self.starts))
        yield alive
        for i, box in enumerate(path):
            alive = alive[self.ends[alive] - self.starts[alive] > i]
            alive = alive[self.boxes[self.starts[alive] + i] == box]
            yield alive

    def below(self, path: Sequence[int]) -> "Paths":
        """Return the paths below the box that these boxes lead to, which becomes the root."""
        if not path:
            return self
        chosen = self.through(path)
        root = self.frames[path[-1]]
        return replace(chosen, starts=chosen.starts + 1, root=root, heads=max(0, chosen.heads - 1))

    def search(self, text: str) -> Matches:
        """Count the paths with a function or module that has `text` in it, in any case.

        The root is one of the functions too: everything below a match is found.
        """
        wanted = text.casefold()

        def matches(frame: Frame) -> bool:
            return wanted in frame.function.casefold() or wanted in frame.module.casefold()

        is_match = np.fromiter(map(matches, self.frames), bool, len(self.frames))
        is_found = np.zeros(len(self.starts), dtype=bool)
        is_used = np.zeros(len(self.frames), dtype=bool)
        for part in self._parts():
            boxes = self.boxes.take(part.place)
            hits = np.flatnonzero(is_match.take(boxes))
            is_used[boxes[hits]] = True
            is_found[part.rows][part.owner[hits]] = True
        if self.root is not ROOT and matches(self.root):
            is_found[:] = True
        samples = int(self.samples[is_found].sum())
        return Matches(int(self.values[is_found].sum()), samples, int(is_used.sum()))

    def pairs(self) -> tuple[Integers, Integers]:
        """Return which function is in which path: numbers of paths, and of their boxes."""
        found = [(np.zeros(0, np.int64), np.zeros(0, np.int64))]
        for part in self._parts():
            owner, box = self._distinct(part)
            found.append((owner + part.rows.start, box))
        rows, boxes = zip(*found, strict=True)
        return np.concatenate(rows), np.concatenate(boxes)

    def _distinct(self, part: Part) -> tuple[Integers, Integers]:
        """Return the functions of some paths, once by path: its path in the part, its number."""
        count = max(self.functions_count, 1)
        boxes = self.boxes.take(part.place).astype(np.int64)
        is_function = boxes < self.functions_count
        words = np.sort(part.owner[is_function] * count + boxes[is_function])
        owner, box = np.divmod(words[np.diff(words, prepend=-1) > 0], count)
        return owner, box

    def functions(self) -> list[FunctionRow]:
        """Return the table of functions, largest self first; recursion counts once in the total.

        Labels are not functions, and neither is the root.
        """
        count, size = self.functions_count, len(self.starts)
        columns = (self.values, self.samples)
        totals = [np.zeros(count, dtype=np.int64) for _ in columns]
        for part in self._parts():
            owner, box = self._distinct(part)
            for total, column in zip(totals, columns, strict=True):
                np.add.at(total, box, column[part.rows][owner])
        filled = np.flatnonzero(self.ends > self.starts) if size else np.zeros(0, np.int64)
        leaves = self.boxes[self.ends[filled] - 1].astype(np.int64)
        filled, leaves = filled[leaves < count], leaves[leaves < count]
        self_totals = [sum_by(leaves, column[filled], count) for column in columns]
        order = np.lexsort((np.arange(count), -totals[0], -self_totals[0]))
        table = (self_totals[0], totals[0], self_totals[1], totals[1])
        rows = zip(*(column[order].tolist() for column in table), strict=True)
        return [
            FunctionRow(self.frames[number], *row)
            for number, row in zip(order.tolist(), rows, strict=True)
        ]

    def _boxes_of(self, function: str) -> npt.NDArray[np.bool_]:
        # Labels come last: a service with the name of a function is not one.
        named = np.zeros(len(self.frames), dtype=bool)
        for i, frame in enumerate(self.frames[: self.functions_count]):
            named[i] = frame.function == function
        return named

    def _parts(self) -> Iterator[Part]:
        return split_parts(self.starts, self.ends)

    def _turned(self, turn: Callable[[Part], Integers]) -> "Paths":
        """Return paths as long as these, with the boxes that `turn` returns for each part."""
        ends = np.cumsum(self.ends - self.starts)
        starts = ends - (self.ends - self.starts)
        boxes = np.empty(int(ends[-1]) if len(ends) else 0, dtype=np.int32)
        for part in self._parts():
            boxes[starts[part.rows][0] :][: len(part.owner)] = self.boxes.take(turn(part))
        return replace(self, boxes=boxes, starts=starts, ends=ends)

    def _only(self, rows: Integers) -> "Paths":
        return replace(
            self,
            starts=self.starts[rows],
            ends=self.ends[rows],
            values=self.values[rows],
            samples=self.samples[rows],
        )

    def _last_with(self, wanted: npt.NDArray[np.bool_]) -> Integers:
        """Return where in `boxes` each path has one of the wanted for the last time, or -1."""
        last = np.full(len(self.starts), -1, dtype=np.int64)
        for part in self._parts():
            hits = np.flatnonzero(wanted.take(self.boxes.take(part.place)))
            last[part.rows][part.owner[hits]] = part.place[hits]  # of several, the last one stays
        return last


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
