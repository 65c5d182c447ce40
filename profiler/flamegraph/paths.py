"""Paths: the stacks of a profile as boxes, to be turned, cut and searched before they are drawn.

A box is (function, module, kind), or a line, file or module (`Group`). A path is a row of the
profile: its labels' frames, then its stack, root first. Views of a flame graph (only what is below
a box, only stacks with a function, its callers, the inverted graph) are made by changing paths.
Paths are drawn (`profiler.flamegraph.flamegraph`) or added up (`functions`).
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from storage.profile import Indices, Integers, Profile, label_frames
from symbolizer.location import Frame, Kind

ROOT = Frame("all", "", Kind.LABEL)

_PART_BOXES = 1 << 17
"""Boxes processed together: their temporary arrays fit a CPU's cache, and an hour of a fleet does
not take ten times its own memory."""


class Group(StrEnum):
    """What a box stands for. File and module boxes that follow each other directly become one."""

    FUNCTION = "function"
    LINE = "line"
    FILE = "file"
    MODULE = "module"


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
    def of(cls, profile: Profile, by: Sequence[str] = (), group: Group = Group.FUNCTION) -> "Paths":
        """Return the paths of a profile, the labels in `by` as their first frames."""
        return cls.of_stacks(Stacks.of(profile, group), profile, by)

    @classmethod
    def of_stacks(cls, stacks: "Stacks", profile: Profile, by: Sequence[str]) -> "Paths":
        rows = Rows(profile.row_stacks, profile.row_labels, profile.row_values, profile.row_samples)
        return cls.of_rows(stacks, label_frames(profile.label_sets, by), rows, profile.unit)

    @classmethod
    def of_rows(
        cls, stacks: "Stacks", heads: Sequence[Sequence[Frame]], rows: "Rows", unit: str
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
            for part in _parts(starts, ends):
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

        def turn(part: _Part) -> Integers:
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

        def turn(part: _Part) -> Integers:
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

    def _distinct(self, part: "_Part") -> tuple[Integers, Integers]:
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

    def _parts(self) -> "Iterator[_Part]":
        return _parts(self.starts, self.ends)

    def _turned(self, turn: "Callable[[_Part], Integers]") -> "Paths":
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

    stacks: Indices | Integers
    labels: Indices | Integers
    values: Integers
    samples: Integers


class _Part(NamedTuple):
    """Some of the paths. By box of them: its path, counted within `rows`, and its depth."""

    rows: slice
    owner: Integers
    within: Integers
    place: Integers
    """The index of the box in `boxes`."""


def _parts(starts: Integers, ends: Integers) -> Iterator[_Part]:
    """Go through all paths, so many at a time that memory is bounded (but for one long path)."""
    lengths = ends - starts
    past = np.cumsum(lengths)
    first = 0
    while first < len(lengths):
        limit = past[first] - lengths[first] + _PART_BOXES
        rows = slice(first, max(first + 1, int(np.searchsorted(past, limit, "right"))))
        mine = lengths[rows]
        owner = np.repeat(np.arange(len(mine)), mine)
        within = np.arange(len(owner)) - np.repeat(np.cumsum(mine) - mine, mine)
        yield _Part(rows, owner, within, starts[rows][owner] + within)
        first = rows.stop


@dataclass(frozen=True, slots=True)
class Stacks:
    """A profile's stacks as boxes, root first; boxes are numbered in the order of their names."""

    frames: tuple[Frame, ...]
    offsets: Integers
    boxes: Indices

    @classmethod
    def of(cls, profile: Profile, group: Group) -> "Stacks":
        table = _BoxTable(group)
        for number in range(len(profile.locations)):
            table.add(profile.frames(number))
        per_location = np.array(table.counts, dtype=np.int64)
        first = np.cumsum(per_location) - per_location
        frames, rank = table.sorted_frames()
        flat = rank[np.array(table.numbers, dtype=np.int64)]
        if len(flat) == len(first):
            return cls._joined(group, frames, profile.stack_offsets, flat[profile.stack_locations])
        # Each word of a stack becomes the boxes of its location: one, or several when inlined.
        counts = per_location[profile.stack_locations]
        ends = np.cumsum(counts)
        within = np.arange(int(counts.sum())) - np.repeat(ends - counts, counts)
        words = flat[np.repeat(first[profile.stack_locations], counts) + within]
        offsets = np.concatenate([np.zeros(1, np.int64), ends])[profile.stack_offsets]
        return cls._joined(group, frames, offsets, words)

    def with_others(self, others: "Stacks", group: Group) -> "Stacks":
        """Return both as one: these stacks, then the others, over one table of boxes."""
        known: dict[Frame, Frame] = {}
        keys = []
        for frame in (*self.frames, *others.frames):
            # The file of a function does not tell it apart; it is shown where both agree on it.
            key = frame._replace(file="") if group is Group.FUNCTION else frame
            keys.append(key)
            before = known.setdefault(key, frame)
            if before.file != frame.file:
                either = "" if before.file and frame.file else before.file or frame.file
                known[key] = frame._replace(file=either)
        order = {key: i for i, key in enumerate(sorted(known))}
        rank = np.array([order[key] for key in keys], dtype=np.int32)
        mine, theirs = rank[: len(self.frames)], rank[len(self.frames) :]
        return Stacks(
            tuple(known[key] for key in order),
            np.concatenate([self.offsets, others.offsets[1:] + self.offsets[-1]]),
            np.concatenate([mine[self.boxes], theirs[others.boxes]]),
        )

    def fingerprints(self) -> npt.NDArray[np.uint64]:
        """Return a number by stack, the same for the same boxes in the same order.

        The numbers are drawn anew each time, so that nobody can craft two stacks with the same one.
        """
        random = np.random.default_rng()
        words = random.integers(2**64, size=len(self.frames), dtype=np.uint64)
        starts, ends = self.offsets[:-1], self.offsets[1:]
        longest = int((ends - starts).max(initial=0))
        base = random.integers(2**63, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        powers = np.full(longest, base, dtype=np.uint64).cumprod(dtype=np.uint64)
        found = np.zeros(len(starts), dtype=np.uint64)
        for part in _parts(starts, ends):
            terms = words[self.boxes.take(part.place)] * powers[part.within]
            sums = np.concatenate([np.zeros(1, np.uint64), terms.cumsum(dtype=np.uint64)])
            last = (ends - starts)[part.rows].cumsum()
            found[part.rows] = np.diff(sums[np.concatenate([np.zeros(1, np.int64), last])])
        return found

    @classmethod
    def _joined(
        cls, group: Group, frames: tuple[Frame, ...], offsets: Integers, words: Indices
    ) -> "Stacks":
        if group in {Group.FILE, Group.MODULE} and len(words):
            differs = np.concatenate([[True], words[1:] != words[:-1]])
            differs[offsets[:-1][np.diff(offsets) > 0]] = True
            offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(differs)])[offsets]
            words = words[differs]
        return cls(frames, offsets, words)


class _BoxTable:
    """Numbers the boxes of locations, in the order in which they come."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._numbers: dict[tuple[str, str, Kind, str, int], int] = {}
        self._files: list[str | None] = []
        self.counts: list[int] = []
        """How many boxes each location stands for."""
        self.numbers: list[int] = []
        """The boxes of all locations, outermost first."""

    def add(self, frames: Sequence[Frame]) -> None:
        """Add a location. Its frames come innermost inlined call first."""
        self.counts.append(len(frames))
        for frame in reversed(frames):
            key = _box(frame, frames[-1].kind, self._group)
            number = self._numbers.setdefault(key, len(self._files))
            if number == len(self._files):
                self._files.append(frame.file)
            elif frame.file and frame.file != self._files[number]:
                # The file of a function is shown if all of its frames that have one agree on it.
                self._files[number] = None if self._files[number] != "" else frame.file
            self.numbers.append(number)

    def sorted_frames(self) -> tuple[tuple[Frame, ...], Indices]:
        """Return the frames of the boxes in the order of their names, and each number's place."""
        keys = sorted(self._numbers)
        numbers = [self._numbers[key] for key in keys]
        rank = np.empty(len(keys), dtype=np.int32)
        rank[numbers] = np.arange(len(keys), dtype=np.int32)
        if self._group is not Group.FUNCTION:
            return tuple(Frame(*key) for key in keys), rank
        files = (self._files[number] or "" for number in numbers)
        return tuple(Frame(*k[:3], file) for k, file in zip(keys, files, strict=True)), rank


def _box(frame: Frame, outer_kind: Kind, group: Group) -> tuple[str, str, Kind, str, int]:
    """Return what tells one box from another, as a tuple like Frame.

    In boxes of files and modules an inlined call counts as the code it was inlined into.
    """
    function, module, kind, file, line = frame
    if group is Group.FUNCTION:
        return (function, module, kind, "", 0)
    if group is Group.LINE:
        return (function, module, kind, file, line)
    if group is Group.FILE and file:
        return (file, module, outer_kind, file, 0)
    return (module or "[unknown]", module, outer_kind, "", 0)


def sum_by(which: Indices | Integers, values: Integers, count: int) -> Integers:
    """Add up integers by group, exactly: bincount's weights are floats, exact to 2^53 only."""
    sums = np.zeros(count, dtype=np.int64)
    np.add.at(sums, which, values)
    return sums
