"""Look up addresses of a Go program as Go's runtime does: functions, lines and inlined calls.

All of it stands in the table of functions (`gopclntab`) since Go 1.20, except the trees of inlined
calls. A record of a function is followed by the positions of further tables by address, of which
one says for each address which inlined call it belongs to, and by the positions of other data, of
which one is the function's tree. A tree is an array of calls: the name and the first line of the
function that was inlined, and an address in the function around it that has the line of the call
and belongs, if that was inlined as well, to the next call further out (runtime/symtabinl.go).

Positions of trees count from an address that only the runtime's description of the program holds
(`moduledata`, runtime/symtab.go). It begins with the address of the table and that of its names, by
which it is found.
"""

import itertools
import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from symbolizer.integers import Wide
from symbolizer.location import FileOffset, Miss
from symbolizer.symbols.elf import SHT_RELA, Elf, UnreadableElf
from symbolizer.symbols.gopclntab import GoTable

# runtime/runtime2.go, type _func: entry, name, args, deferreturn, pcsp, pcfile, pcln, npcdata,
# compilation unit, first line, id, flags, padding, nfuncdata.
_RECORD = struct.Struct("<IiiIIIIIIiBBBB")
_RECORD_ID_AT = 40
# runtime/symtabinl.go, type inlinedCall: id, name, address of the call, first line.
_CALL = struct.Struct("<B3xiii")
# internal/abi/symtab.go
_PCDATA_INL_TREE_INDEX, _FUNCDATA_INL_TREE = 2, 3
_NO_FUNCDATA = 0xFFFF_FFFF

_MODULE_WORDS = 56
_TREES_WORD = 40
"""Where moduledata has what trees count from, in Go 1.20 to 1.26. Words near it are tried, too."""
_LIKELY_WORDS = (_TREES_WORD, *range(34, _MODULE_WORDS))
_PROVED_BY = 64
"""Trees that must make sense before a word is believed."""
_CHUNK_BYTES = 1 << 20
_MAX_RELOCATIONS_BYTES = 1 << 28

# Programs of 150 MB had five levels at most.
_MAX_INLINED = 1_000
_MAX_RANGES = 1 << 20
_MAX_NUMBER_BYTES = 5


class GoCall(NamedTuple):
    """A function at a line, as the program has it: not made readable yet.

    Attributes:
        function: the linker's name of it.
        first_line: where the function begins.
        line: what is executed, or the call of the function before it in a list.
        is_wrapper: whether the compiler made it, to call another one: a method of a value by its
            address, or what is deferred. Go's own profiles and tracebacks have no such calls.
    """

    function: bytes
    file: bytes
    first_line: int
    line: int
    is_wrapper: bool


class _Function(NamedTuple):
    """A function's record; positions of tables are 0 if it has none, `kind` is its id."""

    start: int
    size: int
    name: int
    first_line: int
    kind: int
    depths: int
    unit: int
    files: int
    lines: int
    inlined: int
    tree: int | None
    """Position of its tree."""


class _Ranges(NamedTuple):
    """A value by address, counted from a function's start: the ends of ranges, and their values."""

    ends: list[int]
    values: list[int]

    def at(self, offset: int) -> int:
        place = bisect_right(self.ends, offset)
        return self.values[place] if place < len(self.values) else -1


class GoLines:
    """The code of a Go program by address. What it needs of the file is read as it is needed."""

    def __init__(self, elf: Elf, table: GoTable) -> None:
        """Read the table, which must have first lines, and find the trees.

        Raises:
            UnreadableElf: the table is damaged, or trees of its version are not known.
        """
        text = table.find_text()
        if text is None:
            raise UnreadableElf(Miss.DAMAGED)
        self._elf = elf
        self._parts = table.read_parts()
        self._starts: list[int] = (table.functions.starts + text).tolist()
        self._records: list[int] = table.functions.records.tolist()
        self._ranges: dict[int, _Ranges] = {}
        self._wrappers = self._find_wrappers()
        self._trees_at = self._find_trees(table)

    def address(self, offset: FileOffset) -> int | None:
        """Return the address of a position in the file; None if no code is there."""
        for segment in self._elf.segments:
            if 0 <= offset - segment.p_offset < segment.p_filesz:
                return offset - segment.p_offset + segment.p_vaddr
        return None

    def calls(self, address: int) -> tuple[GoCall, ...]:
        """Return the function at an address and those that it was inlined into, innermost first.

        Pass the address of an instruction: for a caller, its return address - 1. There is nothing
        at addresses outside Go's code.

        Raises:
            UnreadableElf: the table is damaged.
        """
        function = self._function_at(address)
        if function is None or not function.lines:  # C code that Go's linker has linked
            return ()
        offset = address - function.start
        calls: list[GoCall] = []
        for _ in range(_MAX_INLINED):
            index, parent = self._tree_index(function, offset), -1
            kind, name, first_line = function.kind, function.name, function.first_line
            if index >= 0:
                kind, name, parent, first_line = self._tree_call(function, index)
            call = GoCall(
                function=self._text(self._parts.names + name),
                file=self._file(function, offset),
                first_line=first_line,
                line=max(0, self._table(function.lines).at(offset)),
                is_wrapper=kind == self._wrappers,
            )
            calls.append(call)
            if index < 0:
                return tuple(calls)
            offset = parent
        raise UnreadableElf(Miss.DAMAGED)

    def lacks_frame(self, address: int) -> bool:
        """Return whether a function has no frame there, though it had one: at its return.

        By frame pointers it seems to be called by what has called its caller. So it does in what is
        behind the return, which lets the stack grow before there is a frame.

        Raises:
            UnreadableElf: the table is damaged.
        """
        function = self._function_at(address)
        if function is None:
            return False
        ends, depths = self._table(function.depths)
        place = bisect_right(ends, address - function.start)
        return 0 < place < len(depths) and depths[place] == 0

    def _function_at(self, address: int) -> _Function | None:
        number = bisect_right(self._starts, address) - 1
        return self._function(number) if 0 <= number < len(self._records) else None

    def _function(self, number: int) -> _Function:
        at = self._records[number]
        try:
            fields = _RECORD.unpack_from(self._parts.content, at)
            _, name, _, _, depths, files, lines, pcdata, unit, first_line, kind, _, _, funcdata = (
                fields
            )
            at += _RECORD.size
            tree, inlined = _NO_FUNCDATA, 0
            if pcdata > _PCDATA_INL_TREE_INDEX and funcdata > _FUNCDATA_INL_TREE:
                inlined = self._word(at + 4 * _PCDATA_INL_TREE_INDEX)
                tree = self._word(at + 4 * (pcdata + _FUNCDATA_INL_TREE))
        except struct.error:
            raise UnreadableElf(Miss.DAMAGED) from None
        start = self._starts[number]
        return _Function(
            *(start, self._starts[number + 1] - start, name, first_line, kind, depths, unit, files),
            *(lines, inlined, None if tree == _NO_FUNCDATA else tree),
        )

    def _word(self, at: int) -> int:
        (word,) = struct.unpack_from("<I", self._parts.content, at)
        return int(word)

    def _text(self, at: int) -> bytes:
        content = self._parts.content
        end = content.find(b"\0", at) if at >= 0 else -1
        if end < 0:
            raise UnreadableElf(Miss.DAMAGED)
        return content[at:end]

    def _file(self, function: _Function, offset: int) -> bytes:
        number = self._table(function.files).at(offset)
        at = self._parts.units + 4 * (function.unit + number)
        if number < 0 or at + 4 > self._parts.files:
            return b""
        return self._text(self._parts.files + self._word(at))

    def _tree_index(self, function: _Function, offset: int) -> int:
        """Return which inlined call an address belongs to, -1 for the function itself."""
        if function.tree is None or not function.inlined:
            return -1
        return self._table(function.inlined).at(offset)

    def _tree_call(self, function: _Function, index: int) -> tuple[int, int, int, int]:
        """Return an inlined function's id and name, the address of the call, its first line."""
        assert function.tree is not None
        at = self._trees_at + function.tree + _CALL.size * index
        kind, name, parent, first_line = _CALL.unpack(_read_address(self._elf, at, _CALL.size))
        if name < 0 or not 0 <= parent < function.size:
            raise UnreadableElf(Miss.DAMAGED)
        return kind, name, parent, first_line

    def _table(self, position: int) -> _Ranges:
        """Return the values of the table at a position; none for 0, which stands for no table."""
        ranges = self._ranges.get(position)
        if ranges is None:
            ranges = self._ranges[position] = self._read_ranges(position) if position else _NOWHERE
        return ranges

    def _read_ranges(self, position: int) -> _Ranges:
        content = self._parts.content
        at, value, end = self._parts.tables + position, -1, 0
        ranges = _Ranges([], [])
        for _ in range(_MAX_RANGES):
            change, at = _read_number(content, at)
            if not change and end:
                return ranges
            length, at = _read_number(content, at)
            value += change >> 1 ^ -(change & 1)
            end += length
            ranges.ends.append(end)
            ranges.values.append(value)
        raise UnreadableElf(Miss.DAMAGED)

    def _find_wrappers(self) -> int:
        """Return the id of wrappers, which changes from version to version.

        Normal functions have 0, and each other id is that of one function of the runtime.
        """
        content = np.frombuffer(self._parts.content, np.uint8)
        places = np.array(self._records) + _RECORD_ID_AT
        ids = content[places[places < len(content)]]
        return int(np.bincount(ids, minlength=2)[1:].argmax()) + 1

    def _find_trees(self, table: GoTable) -> int:
        """Return the address that positions of trees count from."""
        functions = map(self._function, range(len(self._records)))
        with_trees = list(itertools.islice(_having_trees(functions), _PROVED_BY))
        if not with_trees:
            return 0
        for words in _module_data(self._elf, table.address, table.address + self._parts.names):
            for word in _LIKELY_WORDS:
                self._trees_at = int(words[word])
                if all(map(self._has_tree, with_trees)):
                    return self._trees_at
        raise UnreadableElf(Miss.UNSUPPORTED)

    def _has_tree(self, function: _Function) -> bool:
        """Return whether a function's tree begins with a call that makes sense."""
        parts = self._parts
        try:
            _, name, _, first_line = self._tree_call(function, 0)
        except UnreadableElf:
            return False
        at = parts.names + name
        starts_name = at < parts.units and parts.content[at - 1 : at] == b"\0"
        return first_line > 0 and (starts_name or not name)


_NOWHERE = _Ranges([], [])


def _having_trees(functions: Iterator[_Function]) -> Iterator[_Function]:
    return (function for function in functions if function.tree is not None and function.inlined)


def _read_number(content: bytes, at: int) -> tuple[int, int]:
    """Return an unsigned LEB128 number, and the position after it."""
    number = shift = 0
    for byte in content[at : at + _MAX_NUMBER_BYTES]:
        number |= (byte & 0x7F) << shift
        shift += 7
        at += 1
        if byte < 0x80:
            return number & 0xFFFF_FFFF, at
    raise UnreadableElf(Miss.DAMAGED)


def _read_address(elf: Elf, address: int, size: int) -> bytes:
    for p_vaddr, p_offset, p_filesz in elf.loaded:
        if p_vaddr <= address and address + size <= p_vaddr + p_filesz:
            return elf.source.read_at(address - p_vaddr + p_offset, size)
    raise UnreadableElf(Miss.DAMAGED)


def _module_data(elf: Elf, *begins: int) -> Iterator[Sequence[int]]:
    """Return the words of what may be the program's moduledata: of what begins with those words.

    In position-independent programs that another linker has linked, the words are relocations.
    """
    size = 8 * _MODULE_WORDS
    for p_vaddr, p_offset, p_filesz in reversed(elf.loaded):  # it is in data, which come last
        for start in range(-p_vaddr % 8, p_filesz, _CHUNK_BYTES):
            content = elf.source.read_at(p_offset + start, min(_CHUNK_BYTES, p_filesz - start))
            words = np.frombuffer(content, "<u8", len(content) // 8)
            for place in np.flatnonzero(words == begins[0]).tolist():
                within = start + 8 * place
                if within + size <= p_filesz:
                    found = struct.unpack(
                        f"<{_MODULE_WORDS}Q", elf.source.read_at(p_offset + within, size)
                    )
                    if found[: len(begins)] == begins:
                        yield found
    for section in elf.sections:
        if section.type == SHT_RELA:
            content = elf.read(section, _MAX_RELOCATIONS_BYTES)
            rows = np.frombuffer(content[: len(content) // 24 * 24], "<u8").reshape(-1, 3)
            slots, addends = rows[:, 0], rows[:, 2]
            for slot in slots[addends == begins[0]]:
                found = _relocated(slots - slot, addends)
                if found[: len(begins)] == begins:
                    yield found


def _relocated(within: Wide, addends: Wide) -> tuple[int, ...]:
    """Return the words that relocations write, by their distances from the first of these."""
    words = np.zeros(_MODULE_WORDS, dtype=np.uint64)
    is_mine = (within < np.uint64(8 * _MODULE_WORDS)) & (within % np.uint64(8) == 0)
    words[(within[is_mine] // np.uint64(8)).astype(np.int64)] = addends[is_mine]
    return tuple(words.tolist())
