"""Find the rules for addresses of many processes, for walks of copied stacks.

An address lies in a mapping of its process, and that in a file with an unwind table. Of a table
only the pages that walks have come across are kept here: hot code is a small part of it.
"""

import struct
from array import array
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from symbolizer.maps import MappingTable
from symbolizer.unwind.rules import EVALUATES, RBX_SHIFT, RBX_UNKNOWN, ROW, CfaKind
from symbolizer.unwind.table import PAGE_BITS, PagedRows
from symbolizer.unwind.walk import PENDING, Rule, Stop

_MAX_ROWS = 1 << 17
"""Of kept pages. Half of them go at a time, those that were not looked at for longest."""
_PAGE_ROWS = 16
"""What a page takes besides its rows, counted as rows."""
_IN_PAGE = (1 << PAGE_BITS) - 1
_MAX_PAGE = 1 << 32
_ROW = struct.Struct("<2xHBBh")
_RBP_KINDS = (1 << RBX_SHIFT) - 1
_HOLE = Rule(CfaKind.HOLE, 0, 0, 0, RBX_UNKNOWN)
_ANONYMOUS = Rule(CfaKind.FRAME_POINTER, 0, 0, 0, RBX_UNKNOWN)

ANONYMOUS = -1
"""In place of a table's number: memory without a file, whose code a runtime has compiled."""


def missing(why: int) -> int:
    """Return what stands in place of a table's number: a Stop or PENDING says why."""
    return -2 - why


TableOf = Callable[[MappingTable, int], int]
"""The number of the table of a mapping, ANONYMOUS, or `missing`."""


class _Page(NamedTuple):
    """The rows of a page: where they begin in it, and all of them as they stand in the table."""

    lows: "array[int]"
    rows: bytes


_NO_ROWS = _Page(array("H"), b"")


class RulePages:
    """Pages of tables, by the tables' numbers. `load` returns a table whose pages are needed."""

    def __init__(self, load: Callable[[int], PagedRows], max_rows: int = _MAX_ROWS) -> None:
        self._load = load
        self._max_rows = max_rows
        self._pages: dict[int, _Page] = {}
        self._before: dict[int, _Page] = {}
        self._rules: dict[bytes, Rule] = {}  # few differ
        self._kept = 0

    def find(self, table: int, offset: int) -> Rule:
        """Return the rule in force at an offset in a table's file; a HOLE if there is none."""
        number = offset >> PAGE_BITS
        if number >= _MAX_PAGE:
            return _HOLE
        key = table << 32 | number
        page = self._pages.get(key) or self._add(key)
        place = bisect_right(page.lows, offset & _IN_PAGE) - 1
        if place < 0:
            return _HOLE
        row = page.rows[place * ROW.itemsize : (place + 1) * ROW.itemsize]
        rule = self._rules.get(row[2:])
        if rule is None:
            rule = self._rules[row[2:]] = _rule_of(row)
        return rule

    def _add(self, key: int) -> _Page:
        """Keep a page that is looked at again, or for the first time."""
        if self._kept > self._max_rows // 2:
            self._before, self._pages, self._rules, self._kept = self._pages, {}, {}, 0
        page = self._before.pop(key, None) or self._load_page(key)
        self._pages[key] = page
        self._kept += len(page.lows) + _PAGE_ROWS
        return page

    def _load_page(self, key: int) -> _Page:
        table = self._load(key >> 32)
        number = key & (_MAX_PAGE - 1)
        at = int(np.searchsorted(table.pages["number"], np.uint32(number)))
        if at == len(table.pages) or int(table.pages["number"][at]) != number:
            return _NO_ROWS
        rows = table.rows_of(at)
        return _Page(array("H", rows["pc_low"].tolist()), rows.tobytes())


def _rule_of(row: bytes) -> Rule:
    cfa, cfa_kind, kinds, rbp = _ROW.unpack(row)
    is_evaluation = cfa_kind >= EVALUATES
    kind = cfa_kind & ~EVALUATES
    return Rule(kind, cfa, kinds & _RBP_KINDS, rbp, kinds >> RBX_SHIFT, is_evaluation)


class _Space:
    """What a process has mapped, and by what number each mapping's table is found."""

    __slots__ = ("ends", "mappings", "starts", "tables")

    def __init__(self, mappings: MappingTable) -> None:
        self.mappings = mappings
        self.starts: list[int] = mappings.starts.tolist()
        self.ends: list[int] = mappings.ends.tolist()
        self.tables: list[int | None] = [None] * len(self.starts)


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
        spaces = {table: _Space(table) for table in dict.fromkeys(mappings)}
        self._spaces = [spaces[table] for table in mappings]

    def __call__(self, stack: int, address: int) -> Rule | int:
        space = self._spaces[stack]
        place = bisect_right(space.starts, address) - 1
        if place < 0 or address >= space.ends[place]:
            return Stop.NO_MAPPING
        table = space.tables[place]
        if table is None:
            table = space.tables[place] = self._table_of(space.mappings, place)
        if table >= 0:
            mapping = space.mappings.mappings[place]
            return self._pages.find(table, address - mapping.start + mapping.file_offset)
        if table == ANONYMOUS:
            return _ANONYMOUS
        why = -2 - table
        if why == PENDING:
            self.pending[stack] = place
        return why
