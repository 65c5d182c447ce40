"""Paths: the stacks of a profile as boxes, to be turned, cut and searched before they are drawn.

A box is (function, module, kind), or a line, file or module (`Group`). A path is a row of the
profile: its labels' frames, then its stack, root first. What a person asks of a flame graph (only
what stands below a box, only stacks with a function, its callers, the inverted graph) gives other
paths, and these are drawn (`profiler.flamegraph`) or added up (`functions`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from storage.profile import Indices, Integers, Profile, label_frames
from symbolizer.location import Frame, Kind

ROOT = Frame("all", "", Kind.LABEL)


class Group(StrEnum):
    """What a box stands for. File and module boxes that follow each other directly become one."""

    FUNCTION = "function"
    LINE = "line"
    FILE = "file"
    MODULE = "module"


class FunctionTotal(NamedTuple):
    """A row of the table: `self` where the function is the leaf, `total` where it is anywhere."""

    frame: Frame
    self: int
    total: int
    self_samples: int
    total_samples: int


class Found(NamedTuple):
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
    """So many of the frames are no labels."""
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
        """Give the paths of a profile, the labels in `by` as their first frames."""
        return cls.of_stacks(Stacks.of(profile, group), profile, by)

    @classmethod
    def of_stacks(cls, stacks: "Stacks", profile: Profile, by: Sequence[str]) -> "Paths":
        heads = label_frames(profile.label_sets, by)
        labels = sorted({frame for head in heads for frame in head})
        first = len(stacks.frames)
        number = {frame: first + i for i, frame in enumerate(labels)}
        depth = len(heads[0]) if heads else 0
        rows = profile.row_stacks.astype(np.int64)
        starts, ends = stacks.offsets[rows], stacks.offsets[rows + 1]
        boxes = stacks.boxes
        if depth:
            lengths = ends - starts + depth
            table = np.array([[number[frame] for frame in head] for head in heads], np.int32)
            path_ends = np.cumsum(lengths)
            path_starts = path_ends - lengths
            # Every place takes from its stack; the first ones of each path are then labels.
            shift = np.repeat(starts - path_starts - depth, lengths)
            taken = np.maximum(np.arange(len(shift)) + shift, 0)
            boxes = stacks.boxes[taken] if len(stacks.boxes) else np.zeros(len(taken), np.int32)
            for i in range(depth):
                boxes[path_starts + i] = table[profile.row_labels, i]
            starts, ends = path_starts, path_ends
        return cls(
            unit=profile.unit,
            frames=(*stacks.frames, *labels),
            functions_count=first,
            root=ROOT,
            boxes=boxes,
            starts=starts,
            ends=ends,
            heads=depth,
            values=profile.row_values,
            samples=profile.row_samples,
        )

    @property
    def total(self) -> int:
        return int(self.values.sum())

    @property
    def total_samples(self) -> int:
        return int(self.samples.sum())

    def inverted(self) -> "Paths":
        """Give the paths leaf first; their labels stay where they are."""
        starts, lengths, owner, within = self.places()
        turned = starts[owner] + self.heads + (lengths[owner] - 1 - within)
        place = np.where(within < self.heads, starts[owner] + within, turned)
        return self._taken(place, lengths)

    def callers(self, function: str) -> "Paths":
        """Give what called a function, nearest first; it is the root itself.

        A stack counts once, from the innermost call of it.
        """
        wanted = self._boxes_of(function)
        last = self._last_with(wanted)
        kept = np.flatnonzero(last >= 0)
        chosen = replace(self._only(kept), ends=last[kept])
        _, lengths, owner, within = chosen.places()
        numbers = np.flatnonzero(wanted)
        root = self.frames[numbers[0]] if len(numbers) else Frame(function, "", Kind.NATIVE)
        return replace(
            chosen,
            boxes=self.boxes[chosen.ends[owner] - 1 - within],
            starts=np.cumsum(lengths) - lengths,
            ends=np.cumsum(lengths),
            root=root,
            heads=0,
        )

    def focus(self, function: str) -> "Paths":
        """Keep the paths that have a function."""
        return self._only(np.flatnonzero(self._last_with(self._boxes_of(function)) >= 0))

    def hide(self, function: str) -> "Paths":
        """Take a function out of all paths; what it called stands where it stood."""
        starts, _, owner, within = self.places()
        place = starts[owner] + within
        kept = ~self._boxes_of(function)[self.boxes[place]]
        lengths = np.zeros(len(self.starts), dtype=np.int64)
        np.add.at(lengths, owner[kept], 1)
        return self._taken(place[kept], lengths)

    def through(self, path: Sequence[int]) -> "Paths":
        """Give the paths that begin with these boxes, from the last of them on."""
        alive = np.arange(len(self.starts))
        for i, box in enumerate(path):
            alive = alive[self.ends[alive] - self.starts[alive] > i]
            alive = alive[self.boxes[self.starts[alive] + i] == box]
        chosen = self._only(alive)
        above = max(0, len(path) - 1)
        return replace(chosen, starts=chosen.starts + above, heads=max(0, self.heads - above))

    def below(self, path: Sequence[int]) -> "Paths":
        """Give what stands on the box that these boxes lead to, which becomes the root."""
        if not path:
            return self
        chosen = self.through(path)
        root = self.frames[path[-1]]
        return replace(chosen, starts=chosen.starts + 1, root=root, heads=max(0, chosen.heads - 1))

    def search(self, text: str) -> Found:
        """Count the paths with a function or module that has `text` in it, in any case.

        The root is one of the functions too: what stands below a match is found.
        """
        wanted = text.casefold()

        def matches(frame: Frame) -> bool:
            return wanted in frame.function.casefold() or wanted in frame.module.casefold()

        is_match = np.fromiter(map(matches, self.frames), bool, len(self.frames))
        if self.root is not ROOT and matches(self.root):
            found = np.arange(len(self.starts))
        else:
            found = np.flatnonzero(self._last_with(is_match) >= 0)
        starts, _, owner, within = self._only(found).places()
        used = np.unique(self.boxes[starts[owner] + within])
        count = int(is_match[used].sum())
        return Found(int(self.values[found].sum()), int(self.samples[found].sum()), count)

    def functions(self) -> list[FunctionTotal]:
        """Give the table of functions, largest self first. Recursion is counted once in the total.

        Labels are none, and neither is the root.
        """
        count, size = self.functions_count, len(self.starts)
        starts, _, owner, within = self.places()
        boxes = self.boxes[starts[owner] + within].astype(np.int64)
        is_function = boxes < count
        words = np.sort(owner[is_function] * max(count, 1) + boxes[is_function])
        once = words[np.diff(words, prepend=-1) > 0]
        owner, box = np.divmod(once, max(count, 1))
        columns = (self.values, self.samples)
        totals = [sum_by(box, column[owner], count) for column in columns]
        filled = np.flatnonzero(self.ends > self.starts) if size else np.zeros(0, np.int64)
        leaves = self.boxes[self.ends[filled] - 1].astype(np.int64)
        filled, leaves = filled[leaves < count], leaves[leaves < count]
        selves = [sum_by(leaves, column[filled], count) for column in columns]
        order = np.lexsort((np.arange(count), -totals[0], -selves[0]))
        table = (selves[0], totals[0], selves[1], totals[1])
        rows = zip(*(column[order].tolist() for column in table), strict=True)
        return [
            FunctionTotal(self.frames[number], *row)
            for number, row in zip(order.tolist(), rows, strict=True)
        ]

    def _boxes_of(self, function: str) -> npt.NDArray[np.bool_]:
        # A service may be called as a function is, and is none.
        named = (
            frame.function == function and frame.kind is not Kind.LABEL for frame in self.frames
        )
        return np.fromiter(named, bool, len(self.frames))

    def places(self) -> tuple[Integers, Integers, Integers, Integers]:
        """Give starts and lengths of the paths; by box of a path, its path and its depth."""
        lengths = (self.ends - self.starts).astype(np.int64)
        ends = np.cumsum(lengths)
        owner = np.repeat(np.arange(len(lengths)), lengths)
        within = np.arange(len(owner)) - np.repeat(ends - lengths, lengths)
        return self.starts, lengths, owner, within

    def _taken(self, place: Integers, lengths: Integers) -> "Paths":
        """Give paths of these lengths, whose boxes are those at `place`."""
        ends = np.cumsum(lengths)
        return replace(self, boxes=self.boxes[place], starts=ends - lengths, ends=ends)

    def _only(self, rows: Integers) -> "Paths":
        return replace(
            self,
            starts=self.starts[rows],
            ends=self.ends[rows],
            values=self.values[rows],
            samples=self.samples[rows],
        )

    def _last_with(self, wanted: npt.NDArray[np.bool_]) -> Integers:
        """Give where in `boxes` each path has one of the wanted for the last time, or -1."""
        starts, _, owner, within = self.places()
        place = starts[owner] + within
        last = np.full(len(self.starts), -1, dtype=np.int64)
        hits = np.flatnonzero(wanted[self.boxes[place]])
        last[owner[hits]] = place[hits]  # of several, the last one assigned stays
        return last


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
        """Give the frames of the boxes in the order of their names, and each number's place."""
        keys = sorted(self._numbers)
        numbers = [self._numbers[key] for key in keys]
        rank = np.empty(len(keys), dtype=np.int32)
        rank[numbers] = np.arange(len(keys), dtype=np.int32)
        if self._group is not Group.FUNCTION:
            return tuple(Frame(*key) for key in keys), rank
        files = (self._files[number] or "" for number in numbers)
        return tuple(Frame(*k[:3], file) for k, file in zip(keys, files, strict=True)), rank


def _box(frame: Frame, outer_kind: Kind, group: Group) -> tuple[str, str, Kind, str, int]:
    """Give what tells one box from another, as a tuple like Frame.

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
