"""Room in arrays of the kernel: extents, free again only when nobody can read them any more."""

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, order=True)
class Extent:
    shard: int
    first: int
    count: int

    @property
    def end(self) -> int:
        return self.first + self.count


class Room:
    """Places that are free, as extents that are as large as can be."""

    def __init__(self) -> None:
        self._free: list[Extent] = []
        self._left: list[Extent] = []

    def add(self, shard: int, count: int) -> None:
        self.put_back([Extent(shard, 0, count)])

    def take(self, count: int) -> Extent | None:
        """Take the first extent that is large enough, and put back what is over."""
        for extent in self._free:
            if extent.count >= count:
                self._free.remove(extent)
                return self.cut(extent, count)
        return None

    def take_largest(self, least: int) -> Extent | None:
        largest = max(self._free, key=lambda each: each.count, default=None)
        if largest is None or largest.count < least:
            return None
        self._free.remove(largest)
        return largest

    def cut(self, extent: Extent, count: int) -> Extent:
        rest = Extent(extent.shard, extent.first + count, extent.count - count)
        self.put_back([rest])
        return replace(extent, count=count)

    def leave(self, extents: Sequence[Extent]) -> None:
        """Take these back, to be used again after `settle`."""
        self._left.extend(extents)

    def settle(self) -> None:
        if self._left:
            self.put_back(self._left)
            self._left.clear()

    def put_back(self, extents: Sequence[Extent]) -> None:
        merged: list[Extent] = []
        for each in sorted(each for each in (*self._free, *extents) if each.count):
            last = merged[-1] if merged else None
            if last and (last.shard, last.end) == (each.shard, each.first):
                merged[-1] = replace(last, count=last.count + each.count)
            else:
                merged.append(each)
        self._free = merged
