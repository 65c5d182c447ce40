"""Read the table of functions that Go's linker writes into every program, even a stripped one.

Go's runtime finds its functions and frames with it (.gopclntab; Go's package debug/gosym,
internal/abi/symtab.go, runtime/symtab.go). A header says where the parts are. One part lists the
functions by address, each with the position of its record. A record says where the function's name
is, and where its tables are: of stack depths, of files, of lines. A table is pairs of numbers: the
change of a value, which begins at -1, zigzag-encoded; and for how many bytes that value holds. The
positions of parts count from the section's start.
"""

import re
import struct
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from symbolizer.integers import PADDING_BYTES, Ints, read_uleb, view
from symbolizer.location import Miss
from symbolizer.symbols.elf import SHT_PROGBITS, Elf, Section, UnreadableElf

# kubectl has 67,000 functions; the limit is for crafted files.
_MAX_FUNCTIONS = 1 << 20
_CHUNK_BYTES = 1 << 20
_MAX_TABLE_BYTES = 1 << 28  # kubectl's has 20 MB

_HEADER_BYTES = 72
_POINTER_BYTES = 8

_MAX_ADDRESS = 1 << 47
_MAX_SAME_NAMES = 4
_DEPTHS_BYTES = 4096
_LENGTH_BYTES = 4
_MAX_DEPTH = 1 << 16

_FLAG_WRITES_SP = 2

# A program without section headers, or whose sections were renamed, is searched for the beginning
# of a header: the ends of all magic numbers, two zeros, instructions of 1 byte, pointers of 8.
_HEADER_END = b"\xff\xff\xff\0\0\1\x08"
_MAX_SEARCHED_BYTES = 64 << 20
_MAX_HEADERS_TRIED = 64
_GO_SECTIONS = (b".go.", b".note.go.")

_GOEXIT, _GOEXIT_CALLEE = b"runtime.goexit", b"runtime.goexit1"


class _Layout(NamedTuple):
    """Where the fields are in one version of the table.

    Attributes:
        entry_bytes: 8 for addresses, 4 for distances from where Go's code begins.
        header_words: numbers of the header's words for: names, files by compilation unit, names of
            files, tables, functions. Empty in the oldest version, which has no such words.
        record: position, in a function's record, of its numbers.
        first_line: position of the line at which the function is defined; -1: not there.
        flags: position of its flags; -1: not there.
    """

    entry_bytes: int
    header_words: tuple[int, ...]
    record: int
    first_line: int
    flags: int

    # Numbers of 4 bytes in each record: the name; then, after two others, the positions of tables;
    # and, after another one, where the files of its compilation unit are.
    @property
    def name(self) -> int:
        return self.record

    @property
    def pcsp(self) -> int:
        return self.record + 12

    @property
    def pcfile(self) -> int:
        return self.record + 16

    @property
    def pcln(self) -> int:
        return self.record + 20

    @property
    def unit(self) -> int:
        return self.record + 28


# By the first four bytes: those of Go 1.20, 1.18, 1.16 and 1.2. Records before 1.17 do not say
# which functions switch the stack, so neither do those of the third.
_LAYOUTS = {
    0xFFFFFFF1: _Layout(4, (3, 4, 5, 6, 7), record=4, first_line=36, flags=41),
    0xFFFFFFF0: _Layout(4, (3, 4, 5, 6, 7), record=4, first_line=-1, flags=37),
    0xFFFFFFFA: _Layout(8, (2, 3, 4, 5, 6), record=8, first_line=-1, flags=-1),
    0xFFFFFFFB: _Layout(8, (), record=8, first_line=-1, flags=-1),
}
# The oldest version: after 8 bytes the number of functions, and they follow.
_OLDEST_FUNCTIONS_AT = 16


class GoFunctions(NamedTuple):
    """Go's functions by address, without gaps between them.

    Attributes:
        starts: first addresses, counted from the start of Go's code; the last is the end of all.
        names: positions of their names in `GoTable.strings`.
        records: positions of their records in the section.
    """

    starts: Ints
    names: Ints
    records: Ints


class GoPlaces(NamedTuple):
    """Where functions are defined.

    Attributes:
        files: positions of names in `GoTable.files_area`, -1 if unknown.
        lines: 0 if unknown.
    """

    files: Ints
    lines: Ints


class GoParts(NamedTuple):
    """The whole section, and the positions in it at which its parts begin.

    Attributes:
        units: files by compilation unit, numbers of 4 bytes.
        tables: changes of values by address; they end where the functions begin.
    """

    content: bytes
    names: int
    units: int
    files: int
    tables: int
    functions: int


class Depth(NamedTuple):
    """How many bytes the stack pointer is below the frame's top, in a range within a function."""

    start: int
    end: int
    size_bytes: int


def open_go_table(elf: Elf) -> "GoTable | None":
    """Return the table of a Go program; None if there is none, or its version is unknown.

    Raises:
        UnreadableElf: damaged, or too large.
    """
    section = next((s for s in elf.sections if s.name.endswith(b".gopclntab")), None)
    if section is None:
        return _search_table(elf)
    return _open_table(elf, section)


def _open_table(elf: Elf, section: Section) -> "GoTable | None":
    if section.size < _HEADER_BYTES:
        return None
    header = elf.source.read_at(section.offset, _HEADER_BYTES)
    layout = _LAYOUTS.get(int.from_bytes(header[:4], "little"))
    if layout is None or header[4:8] != bytes([0, 0, 1, _POINTER_BYTES]):
        return None
    return GoTable(elf, section, layout, struct.unpack_from("<8Q", header, 8))


def _search_table(elf: Elf) -> "GoTable | None":
    """Find a table that no section header leads to."""
    names = {section.name for section in elf.sections}
    if any(names) and not any(name.startswith(_GO_SECTIONS) for name in names):
        return None
    left, tried = _MAX_SEARCHED_BYTES, 0
    for p_vaddr, p_offset, p_filesz in elf.loaded:
        end = min(p_filesz, left)
        left -= end
        for start in range(0, end, _CHUNK_BYTES):
            size = min(_CHUNK_BYTES + len(_HEADER_END), end - start)
            content = elf.source.read_at(p_offset + start, size)
            place = content.find(_HEADER_END)
            while place >= 0 and tried < _MAX_HEADERS_TRIED:
                tried += 1
                within = start + place - 1
                section = Section(
                    *(b"", SHT_PROGBITS, 0, p_vaddr + within),
                    *(p_offset + within, p_filesz - within, 0),
                )
                table = _try_table(elf, section) if within % _POINTER_BYTES == 0 else None
                if table is not None:
                    return table
                place = content.find(_HEADER_END, place + 1)
    return None


def _try_table(elf: Elf, section: Section) -> "GoTable | None":
    """Return the table that begins at a place that looks like one, if it is one."""
    try:
        table = _open_table(elf, section)
        return table if table is not None and table.find_text() is not None else None
    except UnreadableElf:
        return None


class GoTable:
    """The section, read piece by piece. All methods raise UnreadableElf if it is damaged.

    Attributes:
        functions: all of them.
        has_depths: whether it says how deep the stack is in each function.
        has_first_lines: whether records say at which line a function begins, as since Go 1.20.
        address: where the section is, as linked.
        names_area: position in the file of the functions' names; `names_bytes` is their size.
        files_area: position in the file of the names of files, and their size.
    """

    def __init__(self, elf: Elf, section: Section, layout: _Layout, words: tuple[int, ...]) -> None:
        self._elf = elf
        self._section = section
        self._layout = layout
        self._count = words[0]
        self._words = words
        self._units_at = 0
        if layout.header_words:
            names, units, files, pcs, functions = (words[n] for n in layout.header_words)
            self._names = (names, units)
            self._files = (files, pcs)
            self._units_at = units
            self._pcs = (pcs, functions)
            self._functions_at = functions
        else:
            self._names = self._files = self._pcs = (0, section.size)
            self._functions_at = _OLDEST_FUNCTIONS_AT
        if not 0 < self._count <= _MAX_FUNCTIONS:
            raise UnreadableElf(Miss.TOO_LARGE)
        parts = (*self._names, *self._files, *self._pcs, self._functions_at)
        if max(parts) > section.size:
            raise UnreadableElf(Miss.DAMAGED)
        self.functions = self._read_functions()
        self.has_depths = layout.flags >= 0
        self.has_first_lines = layout.first_line >= 0
        self.address = section.address
        self.names_area = section.offset + self._names[0]
        self.names_bytes = max(0, self._names[1] - self._names[0])
        self.files_area = (
            section.offset + self._files[0],
            max(0, self._files[1] - self._files[0]),
        )

    def _read_functions(self) -> GoFunctions:
        form = f"<u{self._layout.entry_bytes}"
        size = (2 * self._count + 1) * self._layout.entry_bytes
        pairs = np.frombuffer(self._read(self._functions_at, size), form)
        starts = pairs[::2].astype(np.int64)
        records = pairs[1::2].astype(np.int64)
        if self._layout.header_words:
            records += self._functions_at
        is_sorted = (starts[1:] >= starts[:-1]).all() and (starts >= 0).all()
        if not is_sorted or (starts > _MAX_ADDRESS).any():
            raise UnreadableElf(Miss.DAMAGED)
        return GoFunctions(starts, self._gather(records + self._layout.name, "<i4"), records)

    def read_parts(self) -> GoParts:
        """Return all of it, for those who look up addresses. Needs `has_first_lines`."""
        if self._section.size > _MAX_TABLE_BYTES:
            raise UnreadableElf(Miss.TOO_LARGE)
        content = self._read(0, self._section.size)
        starts = (self._names[0], self._units_at, self._files[0], self._pcs[0])
        return GoParts(content, *starts, self._functions_at)

    def strings(self) -> Iterator[bytes]:
        """Return pieces of the strings that hold the functions' names, NUL-terminated."""
        first, end = self._names
        for start in range(first, end, _CHUNK_BYTES):
            yield self._read(start, min(_CHUNK_BYTES, end - start))

    def find_named(self, names: Sequence[bytes]) -> dict[bytes, list[int]]:
        """Return the numbers of the functions with one of these names, by name.

        Two functions share a name if one is a wrapper that moves arguments for another ABI.
        """
        found: dict[bytes, set[int]] = defaultdict(set)
        # A name follows the NUL of the one before it, and may be split between two pieces.
        overlap = max(map(len, names)) + 2
        content, position = b"\0", -1
        for piece in self.strings():
            content += piece
            for name in names:
                place = -1
                for _ in range(_MAX_SAME_NAMES):
                    place = content.find(b"\0" + name + b"\0", place + 1)
                    if place < 0:
                        break
                    numbers = np.flatnonzero(self.functions.names == position + place + 1)
                    found[name].update(numbers.tolist())
            position += max(0, len(content) - overlap)
            content = content[-overlap:]
        return {name: sorted(numbers) for name, numbers in found.items()}

    def find_text(self) -> int | None:
        """Return the address that `functions.starts` count from; None if it is not found.

        Some versions of the table do not say where Go's code begins. But runtime.goexit is a nop, a
        call and a nop in all of them, and the distance of the call is known.
        """
        if self._layout.entry_bytes == _POINTER_BYTES:
            return 0
        starts = self.functions.starts
        named = self.find_named((_GOEXIT, _GOEXIT_CALLEE))
        distances = {
            int(starts[callee]) - int(starts[caller]) - 6
            for caller in named.get(_GOEXIT, ())
            for callee in named.get(_GOEXIT_CALLEE, ())
        }
        codes = [
            b"\x90\xe8" + struct.pack("<i", distance) + b"\x90"
            for distance in distances
            if abs(distance) < 1 << 31
        ]
        if not codes:
            return None
        (caller, *_) = named[_GOEXIT]
        distance = int(starts[caller])
        found = next(
            (text for text in self._likely_texts() if self._has(text + distance, codes)), None
        )
        return found if found is not None else self._search_text(codes, distance)

    def _likely_texts(self) -> Iterator[int]:
        """Return where Go's code begins if the header says it, and where the section .text does."""
        yield self._words[2]
        for section in self._elf.sections:
            if section.name == b".text":
                yield section.address

    def _has(self, address: int, codes: Sequence[bytes]) -> bool:
        size = len(codes[0])
        for p_vaddr, p_offset, p_filesz in self._elf.segments:
            if p_vaddr <= address and address + size <= p_vaddr + p_filesz:
                return self._elf.source.read_at(address - p_vaddr + p_offset, size) in codes
        return False

    def _search_text(self, codes: Sequence[bytes], distance: int) -> int | None:
        """Search the code for runtime.goexit, and return what is `distance` bytes before it."""
        pattern = re.compile(b"|".join(map(re.escape, codes)))
        left = _MAX_SEARCHED_BYTES
        for p_vaddr, p_offset, p_filesz in self._elf.segments:
            end = min(p_filesz, left)
            left -= end
            for start in range(0, end, _CHUNK_BYTES):
                size = min(_CHUNK_BYTES + 8, end - start)
                found = pattern.search(self._elf.source.read_at(p_offset + start, size))
                if found:
                    text = p_vaddr + start + found.start() - distance
                    if text < 0:
                        raise UnreadableElf(Miss.DAMAGED)
                    return text
        return None

    def read_places(self) -> GoPlaces:
        """Return the file and the line in which each function is defined."""
        layout, records = self._layout, self.functions.records
        numbers = self._first_values(layout.pcfile)
        if layout.header_words:
            units = self._gather(records + layout.unit, "<u4")
            files = self._gather_bounded(self._units_at + 4 * (units + numbers), self._files[0])
        else:
            files = self._oldest_files(numbers)
        files[(numbers < 0) | (files >= self.files_area[1])] = -1
        if layout.first_line >= 0:
            lines = self._gather(records + layout.first_line, "<i4")
        else:
            lines = self._first_values(layout.pcln)
        return GoPlaces(files, np.maximum(lines, 0))

    def _oldest_files(self, numbers: Ints) -> Ints:
        """Return positions of the names of files from their list, which the functions precede."""
        at = self._functions_at + (2 * self._count + 1) * self._layout.entry_bytes
        files_at = int(self._gather(np.array([at]), "<u4")[0])
        return self._gather_bounded(files_at + 4 * numbers, self._section.size)

    def _gather_bounded(self, positions: Ints, end: int) -> Ints:
        """Read numbers of 4 bytes; -1 for positions that are not before `end`."""
        values = np.full(len(positions), -1, dtype=np.int64)
        is_inside = (positions >= 0) & (positions + 4 <= end)
        values[is_inside] = self._gather(positions[is_inside], "<u4")
        return values

    def _first_values(self, field: int) -> Ints:
        """Return the first value of each function's table whose position is in that field.

        It is -1 for functions without that table.
        """
        tables = self._gather(self.functions.records + field, "<u4")
        changes = np.zeros(len(tables), dtype=np.int64)
        has_table = (tables > 0) & (tables < self._pcs[1] - self._pcs[0] - _LENGTH_BYTES)
        changes[has_table] = self._gather_uleb(tables[has_table] + self._pcs[0])
        return (changes >> 1 ^ -(changes & 1)) - 1

    def read_frameless(self) -> Ints:
        """Return how many bytes each function runs before it has a frame. Needs `has_depths`.

        It is 0 for functions that write to the stack pointer.
        """
        tables, flags = self._depths_at(), self._gather(self._flags_at(), "u1")
        has_none = (self._gather(tables, "u1") == 2) & (flags & _FLAG_WRITES_SP == 0)
        sizes = self.functions.starts[1:] - self.functions.starts[:-1]
        lengths = np.where(has_none, self._gather_uleb(tables + 1), 0)
        frameless: Ints = np.minimum(lengths, sizes)
        return frameless

    def read_depths(self, number: int) -> Iterator[Depth]:
        """Return how deep the stack is in the ranges of one function. Needs `has_depths`."""
        record = self.functions.records[number : number + 1]
        start = int(self._gather(record + self._layout.pcsp, "<u4")[0]) + self._pcs[0]
        content = self._read(start, min(_DEPTHS_BYTES, self._pcs[1] - start))
        padded = np.zeros(len(content) + PADDING_BYTES, dtype=np.uint8)
        padded[: len(content)] = np.frombuffer(content, np.uint8)
        size = int(self.functions.starts[number + 1] - self.functions.starts[number])
        at, pc, depth = np.zeros(1, dtype=np.int64), 0, -1
        while pc < size and at[0] < len(content):
            changes, widths = read_uleb(padded, at)
            lengths, more_widths = read_uleb(padded, at + widths)
            at = at + widths + more_widths
            depth += int(changes[0] >> 1 ^ -(changes[0] & 1))
            end = min(pc + int(lengths[0]), size)
            if depth & 7 == 0 and 0 <= depth < _MAX_DEPTH and pc < end:
                yield Depth(pc, end, depth)
            pc = end

    def _depths_at(self) -> Ints:
        tables = self._gather(self.functions.records + self._layout.pcsp, "<u4")
        return tables.astype(np.int64) + self._pcs[0]

    def _flags_at(self) -> Ints:
        return self.functions.records + self._layout.flags

    def _gather_uleb(self, positions: Ints) -> Ints:
        values = np.zeros(len(positions), dtype=np.int64)
        goes_on = np.ones(len(positions), dtype=np.bool_)
        for k in range(_LENGTH_BYTES):
            byte = self._gather(positions + k, "u1")
            values |= np.where(goes_on, byte & 0x7F, 0).astype(np.int64) << (7 * k)
            goes_on &= byte >= 0x80
            if not goes_on.any():
                break
        return values

    def _gather(self, positions: Ints, form: str) -> npt.NDArray[np.int64]:
        """Read a number at each position, one chunk of the section at a time."""
        width = np.dtype(form).itemsize
        order = np.argsort(positions, kind="stable")
        in_order = positions[order]
        values = np.zeros(len(positions), dtype=np.int64)
        place = 0
        while place < len(order):
            start = int(in_order[place])
            content = self._read(start, min(_CHUNK_BYTES, self._section.size - start))
            end = int(np.searchsorted(in_order, start + len(content) - width, side="right"))
            if end == place:
                raise UnreadableElf(Miss.DAMAGED)
            numbers = view(np.frombuffer(content, np.uint8), form)
            values[order[place:end]] = numbers[in_order[place:end] - start]
            place = end
        return values

    def _read(self, start: int, size: int) -> bytes:
        if start < 0 or size < 0 or start + size > self._section.size:
            raise UnreadableElf(Miss.DAMAGED)
        return self._elf.source.read_at(self._section.offset + start, size)
