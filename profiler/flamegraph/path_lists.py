"""PathLists: paths as lists of boxes, root first. `PathTree` answers the same questions."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from profiler.flamegraph.stacks import Part, split_parts
from storage.profile import Indices, Integers

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class PathLists:
    """Path i is `boxes[starts[i]:ends[i]]`. Drawing walks over the paths themselves."""

    boxes: Indices
    starts: Integers
    ends: Integers

    @property
    def lists(self) -> "PathLists":
        return self

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return len(self.boxes) + 2 * len(self.starts)

    @property
    def slots(self) -> int:
        """How many numbers `slots_of` returns."""
        return len(self.starts)

    def slots_of(self, places: Integers) -> Integers:
        """Return where something is kept of each place: of those of a path, the last one's."""
        return places

    def is_walkable(self, depth: int) -> bool:  # noqa: ARG002 - a place is of one path
        """Return whether a walk may stop at a depth."""
        return True

    def first(self) -> Integers:
        """Return the places at the first boxes."""
        return np.flatnonzero(self.ends > self.starts)

    def boxes_at(self, places: Integers, depth: int) -> Indices:
        return self.boxes.take(self.starts[places] + depth)

    def next(self, places: Integers, depth: int) -> tuple[Integers, Integers]:
        """Return the places one deeper than some of a depth, and below which of them each is."""
        which = np.flatnonzero(self.ends[places] - self.starts[places] > depth + 1)
        return places[which], which

    def counter(self, column: Integers) -> Callable[[Integers], Integers]:
        """Return what gives for some places the sums of a count by path."""
        return column.take

    def by_path(self, values: Indices, of_empty: int) -> Integers:
        """Return for each path the value in the slot of the place at which it ends."""
        return np.where(self.ends > self.starts, values.astype(np.int64), of_empty)

    def branch(self, places: Integers, depth: int, with_them: bool) -> tuple["PathLists", Integers]:
        """Return the paths that go through places of a depth, and which paths these are.

        They begin with the boxes there, or just below these.
        """
        starts = self.starts[places] + depth + (not with_them)
        return PathLists(self.boxes, starts, self.ends[places]), places

    def only(self, paths: Integers) -> "PathLists":
        """Return some of the paths, in this order."""
        return PathLists(self.boxes, self.starts[paths], self.ends[paths])

    def leaves(self, of_empty: int) -> Integers:
        """Return the last box of each path."""
        found = np.full(len(self.starts), of_empty, dtype=np.int64)
        filled = np.flatnonzero(self.ends > self.starts)
        found[filled] = self.boxes[self.ends[filled] - 1]
        return found

    def find(self, wanted: Flags) -> tuple[Flags, Flags]:
        """Return which paths have one of the wanted boxes, and which of these boxes occur."""
        is_found = np.zeros(len(self.starts), dtype=bool)
        is_used = np.zeros(len(wanted), dtype=bool)
        for part in self._parts():
            boxes = self.boxes.take(part.place)
            hits = np.flatnonzero(wanted.take(boxes))
            is_used[boxes[hits]] = True
            is_found[part.rows][part.owner[hits]] = True
        return is_found, is_used

    def pairs(self, wanted: Flags) -> tuple[Integers, Integers]:
        """Return which wanted boxes are in which path, each once: numbers of paths and boxes."""
        found = [(np.zeros(0, np.int64), np.zeros(0, np.int64))]
        for part in self._parts():
            owner, box = self._distinct(part, wanted)
            found.append((owner + part.rows.start, box))
        paths, boxes = zip(*found, strict=True)
        return np.concatenate(paths), np.concatenate(boxes)

    def totals(self, columns: Sequence[Integers], wanted: Flags) -> list[Integers]:
        """Return by box the counts of the paths that have it, if it is wanted."""
        totals = [np.zeros(len(wanted), dtype=np.int64) for _ in columns]
        for part in self._parts():
            owner, box = self._distinct(part, wanted)
            for total, column in zip(totals, columns, strict=True):
                np.add.at(total, box, column[part.rows][owner])
        return totals

    def without(self, hidden: Flags) -> "PathLists":
        """Return the paths without some boxes."""
        lengths = np.zeros(len(self.starts), dtype=np.int64)
        pieces = [np.zeros(0, dtype=np.int32)]
        for part in self._parts():
            boxes = self.boxes.take(part.place)
            kept = ~hidden.take(boxes)
            pieces.append(boxes[kept])
            counts = lengths[part.rows]
            counts += np.bincount(part.owner[kept], minlength=len(counts))
        ends = np.cumsum(lengths)
        return PathLists(np.concatenate(pieces), ends - lengths, ends)

    def inverted(self, heads: int) -> "PathLists":
        """Return the paths leaf first, but for so many boxes that each begins with."""

        def turn(part: Part) -> Integers:
            last = self.ends[part.rows] - 1 + heads
            return np.where(part.within < heads, part.place, last[part.owner] - part.within)

        return self._turned(turn)

    def above_last(self, wanted: Flags) -> tuple["PathLists", Integers]:
        """Return what stands above the last wanted box, nearest first, and of which paths."""
        last = np.full(len(self.starts), -1, dtype=np.int64)
        for part in self._parts():
            hits = np.flatnonzero(wanted.take(self.boxes.take(part.place)))
            last[part.rows][part.owner[hits]] = part.place[hits]  # of several, the last one stays
        kept = np.flatnonzero(last >= 0)
        return PathLists(self.boxes, self.starts[kept], last[kept]).inverted(0), kept

    def _distinct(self, part: Part, wanted: Flags) -> tuple[Integers, Integers]:
        count = max(len(wanted), 1)
        boxes = self.boxes.take(part.place).astype(np.int64)
        is_wanted = wanted.take(boxes)
        words = np.sort(part.owner[is_wanted] * count + boxes[is_wanted])
        owner, box = np.divmod(words[np.diff(words, prepend=-1) > 0], count)
        return owner, box

    def _parts(self) -> Iterator[Part]:
        return split_parts(self.starts, self.ends)

    def _turned(self, turn: Callable[[Part], Integers]) -> "PathLists":
        """Return paths as long as these, with the boxes that `turn` returns for each part."""
        ends = np.cumsum(self.ends - self.starts)
        starts = ends - (self.ends - self.starts)
        boxes = np.empty(int(ends[-1]) if len(ends) else 0, dtype=np.int32)
        for part in self._parts():
            boxes[starts[part.rows][0] :][: len(part.owner)] = self.boxes.take(turn(part))
        return PathLists(boxes, starts, ends)
