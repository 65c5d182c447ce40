"""Find the rules for addresses of many processes at once, for walks of copied stacks.

An address lies in a mapping of its process, and that in a file with an unwind table. Of a table
only the pages that walks have come across are kept here: hot code is a small part of it.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from symbolizer.integers import Wide
from symbolizer.maps import MappingTable
from symbolizer.unwind.rules import ROW, CfaKind
from symbolizer.unwind.table import PAGE_BITS, UnwindTable
from symbolizer.unwind.walk import FOUND, PENDING, FoundRules, Places, Stop

Rows = npt.NDArray[np.void]

_MAX_ROWS = 1 << 18
"""Of kept pages. Beyond it all of them go: those in use are read again."""
_PAGE_BITS = np.uint64(PAGE_BITS)
_IN_PAGE = np.uint64((1 << PAGE_BITS) - 1)
_MAX_PAGE = np.uint64(1 << 32)
_SPACE_BITS = np.uint64(47)
_LAST = np.uint64((1 << 47) - 1)
_ANONYMOUS = np.zeros(1, ROW)
_ANONYMOUS["cfa_kind"] = CfaKind.FRAME_POINTER

ANONYMOUS = -1
"""In place of a table's number: memory without a file, whose code a runtime has compiled."""


def missing(why: int) -> int:
    """Return what stands in place of a table's number: a Stop or PENDING says why."""
    return -2 - why


TableOf = Callable[[MappingTable, int], int]
"""The number of the table of a mapping, ANONYMOUS, or `missing`."""


class RulePages:
    """Pages of tables, by the tables' numbers. `load` returns a table whose pages are needed."""

    def __init__(self, load: Callable[[int], UnwindTable], max_rows: int = _MAX_ROWS) -> None:
        self._load = load
        self._max_rows = max_rows
        self._clear()

    def _clear(self) -> None:
        self._keys = np.zeros(0, np.uint64)
        self._slots = np.zeros(0, np.uint64)
        self._places = np.zeros(0, np.uint64)  # of each row: its page's slot, and where in the page
        self._rows = np.zeros(0, ROW)

    @property
    def memory_bytes(self) -> int:
        return sum(each.nbytes for each in (self._keys, self._slots, self._places, self._rows))

    def find(self, tables: npt.NDArray[np.int64], offsets: Wide) -> Rows:
        """Return the row in force at each offset in a table's file; a HOLE if there is none."""
        found = np.zeros(len(offsets), ROW)
        numbers = offsets >> _PAGE_BITS
        inside = np.flatnonzero(numbers < _MAX_PAGE)
        keys = tables[inside].astype(np.uint64) << np.uint64(32) | numbers[inside]
        places = self._find_pages(keys)
        wanted = self._slots[places] << _PAGE_BITS | offsets[inside] & _IN_PAGE
        rows = np.searchsorted(self._places, wanted, side="right") - 1
        is_there = rows >= 0
        is_there[is_there] = (
            self._places[rows[is_there]] >> _PAGE_BITS == wanted[is_there] >> _PAGE_BITS
        )
        found[inside[is_there]] = self._rows[rows[is_there]]
        return found

    def _find_pages(self, keys: Wide) -> Places:
        places = np.searchsorted(self._keys, keys)
        if len(self._keys):
            is_known = self._keys[np.minimum(places, len(self._keys) - 1)] == keys
            if is_known.all():
                return places
            new = np.unique(keys[~is_known])
        else:
            new = np.unique(keys)
        if len(self._rows) > self._max_rows:
            self._clear()
            new = np.unique(keys)
        self._add(new)
        return np.searchsorted(self._keys, keys)

    def _add(self, keys: Wide) -> None:
        """Read pages from their tables, sorted by table."""
        rows, places = [self._rows], [self._places]
        slot = len(self._slots)
        tables = (keys >> np.uint64(32)).tolist()
        for number in dict.fromkeys(tables):
            table = self._load(number)
            pages = table.pages["number"].astype(np.uint64)
            for key in keys[np.array(tables) == number] & (_MAX_PAGE - np.uint64(1)):
                at = int(np.searchsorted(pages, key))
                if at < len(pages) and pages[at] == key:
                    first, count = table.pages["first"][at], table.pages["count"][at]
                    rows.append(table.rows[first : first + count])
                    lows = rows[-1]["pc_low"].astype(np.uint64)
                    places.append(np.uint64(slot) << _PAGE_BITS | lows)
                slot += 1
        self._rows, self._places = np.concatenate(rows), np.concatenate(places)
        slots = np.arange(len(self._slots), slot, dtype=np.uint64)
        order = np.argsort(all_keys := np.concatenate([self._keys, keys]), kind="stable")
        self._keys = all_keys[order]
        self._slots = np.concatenate([self._slots, slots])[order]


class RuleFinder:
    """Rules for the stacks of one walk, each with the mappings of its process.

    Attributes:
        pending: by stack, the place of the mapping whose table is PENDING.
    """

    def __init__(
        self, mappings: Sequence[MappingTable], table_of: TableOf, pages: RulePages
    ) -> None:
        """Take the mappings of each stack; `table_of` is asked for those that a walk comes to."""
        self.pending: dict[int, int] = {}
        self._table_of = table_of
        self._pages = pages
        self._spaces = list(dict.fromkeys(mappings))
        numbers = {table: number for number, table in enumerate(self._spaces)}
        self._space_of = np.array([numbers[table] for table in mappings], np.uint64)
        sizes = [len(table.mappings) for table in self._spaces]
        self._firsts = np.cumsum([0, *sizes[:-1]])
        base = np.repeat(np.arange(len(sizes), dtype=np.uint64) << _SPACE_BITS, sizes)
        none = np.zeros(0, np.uint64)
        starts = np.concatenate([none, *(table.starts for table in self._spaces)])
        ends = np.concatenate([none, *(table.ends for table in self._spaces)])
        # What lies beyond, as [vsyscall] does, is empty: no walk comes there.
        self._starts = base | np.minimum(starts, _LAST)
        self._ends = base | np.minimum(ends, _LAST)
        self._offsets = np.array(
            [each.file_offset for table in self._spaces for each in table.mappings], np.uint64
        )
        self._tables = np.zeros(len(self._starts), np.int64)
        self._is_asked = np.zeros(len(self._starts), np.bool_)

    def __call__(self, stacks: Places, addresses: Wide) -> FoundRules:
        rows = np.zeros(len(stacks), ROW)
        whys = np.full(len(stacks), int(Stop.NO_MAPPING), np.int32)
        keys = self._space_of[stacks] << _SPACE_BITS | addresses
        places = np.searchsorted(self._starts, keys, side="right") - 1
        mapped = np.flatnonzero(places >= 0)
        mapped = mapped[keys[mapped] < self._ends[places[mapped]]]
        places = places[mapped]
        new = np.unique(places[~self._is_asked[places]])
        for place in new.tolist():
            space = int(self._starts[place] >> _SPACE_BITS)
            self._tables[place] = self._table_of(
                self._spaces[space], place - int(self._firsts[space])
            )
        self._is_asked[new] = True
        tables = self._tables[places]
        whys[mapped] = np.where(tables < ANONYMOUS, -2 - tables, FOUND)
        rows[mapped[tables == ANONYMOUS]] = _ANONYMOUS[0]
        for i in np.flatnonzero(tables == missing(PENDING)).tolist():
            stack = int(stacks[mapped[i]])
            self.pending[stack] = int(places[i] - self._firsts[int(self._space_of[stack])])
        has_table = tables >= 0
        here, places = mapped[has_table], places[has_table]
        starts = self._starts[places] & _LAST
        offsets = addresses[here] - starts + self._offsets[places]
        rows[here] = self._pages.find(tables[has_table], offsets)
        return FoundRules(rows, whys)
