"""Read the functions of an ELF file from .symtab, .dynsym, the PLT, the entry point and FDEs.

Functions are placed by file offset, as locations are, so a look-up needs no segments. An address
gets a name only from a symbol that covers it. A symbol's size says where it ends. A symbol without
a size (hand-written assembly) ends at the next symbol or with its section, but only in files with a
.symtab: in stripped files the next symbol left may be far away. It may be far away even in a file
with a .symtab, from which strip(1) was told to keep a few symbols; so a symbol without a size also
ends where another function begins: at an FDE, or at an address that is called.

The FDEs in .eh_frame say where functions begin and end, even in stripped files: their FDE ranges.
In files without .symtab, a symbol without type and size at the start of an FDE range ends with it.
A function symbol of size 0 names nothing there: compilers emit unreachable functions empty, and the
next function begins at the same address. The parts of an FDE range that no name covers form an
unnamed function.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from symbolizer.integers import Wide
from symbolizer.location import Miss
from symbolizer.symbols.candidates import (
    AT_PLT,
    IN_FDE_RANGE,
    MAX_FUNCTIONS,
    NO_CANDIDATES,
    NO_FILE,
    Candidates,
    Functions,
    Words,
    arrange,
    drop_aliases,
)
from symbolizer.symbols.elf import (
    SHT_DYNSYM,
    SHT_SYMTAB,
    Elf,
    Section,
    UnreadableElf,
)
from symbolizer.symbols.gopclntab import GoTable, open_go_table
from symbolizer.symbols.labels import bound_labels
from symbolizer.symbols.plt import PltStubs, find_plt_stubs, read_symbol_names
from symbolizer.symbols.strings import Strings
from symbolizer.unwind.fde_ranges import read_fde_ranges

STT_NOTYPE, STT_FUNC, STT_GNU_IFUNC = 0, 2, 10
STB_LOCAL, STB_GLOBAL, STB_WEAK, STB_GNU_UNIQUE = 0, 1, 2, 10

_MAX_SYMBOLS_BYTES = 24 << 22
_SYMBOLS_PER_CHUNK = 1 << 15

# glibc's _start has 34 to 38 bytes, musl's fewer.
_START_BYTES = 48
_START_WITHOUT_HLT_BYTES = 32
_ENTRY_NAME = b"_start"

_SYM = {
    64: np.dtype("<u4,u1,u1,<u2,<u8,<u8"),
    32: np.dtype("<u4,<u4,<u4,u1,u1,<u2"),
}
_SYM[64].names = ("st_name", "st_info", "st_other", "st_shndx", "st_value", "st_size")
_SYM[32].names = ("st_name", "st_value", "st_size", "st_info", "st_other", "st_shndx")


def read_functions(
    elf: Elf, parts: Sequence[tuple[int, int]] = (), name_of_parts: bytes = b""
) -> tuple[Functions, Iterator[bytes]]:
    """Return the functions, and pieces of the strings that hold their names, NUL-terminated.

    The strings are those of the functions only. Go's functions have a file and a line. `parts` are
    ranges of addresses, sorted, of which is known what they are though no symbol says so.

    Raises:
        UnreadableElf: with the reason; also while the strings are read.
    """
    space = _OffsetSpace(elf)
    strings = Strings(elf)
    go = _read_go(elf, space, strings)
    fde_ranges = _read_fde_ranges(elf, space)
    # .symtab first: it holds what .dynsym holds, and more.
    tables = [section for section in elf.sections if section.type == SHT_SYMTAB][:1]
    tables += [section for section in elf.sections if section.type == SHT_DYNSYM][:1]
    symbols = NO_CANDIDATES
    for table in tables:
        found = _read_symbols(
            elf, space, table, strings.add_table(table), symbols.starts, fde_ranges=fde_ranges
        )
        symbols = drop_aliases(Candidates.join([symbols, *found]), strings)
    symbols = bound_labels(elf, space.base, symbols, (fde_ranges.starts, fde_ranges.ends))
    stubs = _read_stubs(elf, space, strings, symbols)
    go_symbols = go.candidates.take(~np.isin(go.candidates.starts, symbols.starts))
    functions = arrange(Candidates.join([symbols, stubs, go_symbols]), strings, space.base)
    entry_name = strings.add_text(_ENTRY_NAME)
    functions = _add_entry(elf, space, functions, entry_name, fde_ranges)
    functions = _add_unnamed(functions, fde_ranges)
    if parts:
        functions = _name_parts(space, functions, parts, strings.add_text(name_of_parts))
    return _keep_strings(go.add_places(functions), strings)


def _keep_strings(functions: Functions, strings: Strings) -> tuple[Functions, Iterator[bytes]]:
    """Return the functions with positions in those strings that they need, and these."""
    is_named = functions.names & IN_FDE_RANGE == 0
    names = functions.names[is_named] & ~AT_PLT
    has_file = functions.files != NO_FILE
    files = functions.files[has_file]
    kept, pieces = strings.keep(np.concatenate([names, files]))
    new_names, new_files = functions.names.copy(), functions.files.copy()
    new_names[is_named] = kept.moved(names) | functions.names[is_named] & AT_PLT
    new_files[has_file] = kept.moved(files)
    return replace(functions, names=new_names, files=new_files), pieces


class _GoFunctions(NamedTuple):
    """Go's functions, sorted; `files` and `lines` are where each is defined."""

    candidates: Candidates = NO_CANDIDATES
    files: Words = NO_CANDIDATES.names
    lines: Words = NO_CANDIDATES.names

    def add_places(self, functions: Functions) -> Functions:
        """Return the functions with the files and lines of those that are Go's."""
        if not len(self.files):
            return functions
        starts, ends = self.candidates.starts, self.candidates.ends
        found = np.maximum(np.searchsorted(starts, functions.starts, side="right") - 1, 0)
        is_go = (starts[found] <= functions.starts) & (functions.starts < ends[found])
        files = np.where(is_go, self.files[found], NO_FILE)
        return replace(functions, files=files, lines=np.where(is_go, self.lines[found], 0))


def _read_go(elf: Elf, space: "_OffsetSpace", strings: Strings) -> _GoFunctions:
    """Read the functions of Go's own table; there are none if it is unreadable."""
    try:
        table = open_go_table(elf)
        text = None if table is None else table.find_text()
        if table is None or text is None:
            return _GoFunctions()
        return _place_go_functions(table, text, space, strings)
    except UnreadableElf:
        return _GoFunctions()


def _place_go_functions(
    table: GoTable, text: int, space: "_OffsetSpace", strings: Strings
) -> _GoFunctions:
    addresses = (table.functions.starts + text).astype(np.uint64)
    offsets, limits = space.offsets(addresses[:-1])
    ends = np.minimum(offsets + (addresses[1:] - addresses[:-1]), limits)
    names, sizes = table.functions.names, table.names_bytes
    keep = (limits > 0) & (ends > offsets) & (names >= 0) & (names < sizes)
    places = table.read_places()
    file_start, file_bytes = table.files_area
    first_name = strings.add(table.names_area, sizes)
    first_file = strings.add(file_start, file_bytes)
    files = np.where(places.files >= 0, places.files + first_file, int(NO_FILE))[keep]
    count = int(keep.sum())
    return _GoFunctions(
        Candidates(
            offsets[keep].astype(np.uint32),
            ends[keep].astype(np.uint32),
            (names[keep] + first_name).astype(np.uint32),
            np.zeros(count, dtype=np.uint8),
            np.ones(count, dtype=np.bool_),
        ),
        files.astype(np.uint32),
        places.lines[keep].astype(np.uint32),
    )


class _OffsetSpace:
    """Translates addresses as linked into file offsets, counted from the first executable one."""

    def __init__(self, elf: Elf) -> None:
        self.segments = elf.segments
        self.base = min((segment.p_offset for segment in elf.segments), default=0)

    def offsets(self, addresses: Wide) -> tuple[Wide, Wide]:
        """Return each address's offset and its segment's end; 0 outside executable segments."""
        offsets = np.zeros(len(addresses), dtype=np.uint64)
        limits = np.zeros(len(addresses), dtype=np.uint64)
        for p_vaddr, p_offset, p_filesz in reversed(self.segments):
            # Unsigned: an address below p_vaddr wraps and is larger than any size.
            within = addresses - np.uint64(p_vaddr)
            start = p_offset - self.base
            inside = within < np.uint64(max(0, min(p_filesz, (1 << 32) - 1 - start)))
            offsets[inside] = within[inside] + np.uint64(start)
            limits[inside] = start + p_filesz
        return offsets, np.minimum(limits, np.uint64((1 << 32) - 1))


class _FdeRanges(NamedTuple):
    """Ranges in the space of `_OffsetSpace`, disjoint, sorted."""

    starts: Words
    ends: Words

    def ends_of(self, starts: Words) -> Words:
        """Return the end of the FDE range that begins at each offset, 0 if none does."""
        if not len(self.starts):
            return np.zeros(len(starts), dtype=np.uint32)
        places = np.minimum(np.searchsorted(self.starts, starts), len(self.starts) - 1)
        ends: Words = np.where(self.starts[places] == starts, self.ends[places], np.uint32(0))
        return ends


_NO_FDE_RANGES = _FdeRanges(np.zeros(0, dtype=np.uint32), np.zeros(0, dtype=np.uint32))


def _has_symtab(elf: Elf) -> bool:
    return any(section.type == SHT_SYMTAB for section in elf.sections)


def _read_fde_ranges(elf: Elf, space: _OffsetSpace) -> _FdeRanges:
    """Read the FDE ranges of a file; there are none if its FDEs are unreadable.

    If two overlap, the later start wins; of several with one start, the longest.
    """
    try:
        first_addresses, end_addresses = read_fde_ranges(elf)
    except UnreadableElf:
        return _NO_FDE_RANGES
    offsets, limits = space.offsets(first_addresses)
    is_code = limits > offsets
    starts = offsets[is_code].astype(np.uint32)
    offsets += end_addresses - first_addresses
    ends = np.minimum(offsets, limits)[is_code].astype(np.uint32)
    if (starts[1:] <= starts[:-1]).any():
        order = np.lexsort((~ends, starts))
        order = order[np.append(True, starts[order[1:]] != starts[order[:-1]])]
        starts, ends = starts[order], ends[order]
    ends[:-1] = np.minimum(ends[:-1], starts[1:])
    return _FdeRanges(starts, ends)


def _read_symbols(
    elf: Elf,
    space: _OffsetSpace,
    table: Section,
    strings: tuple[int, int],
    known: Words,
    *,
    fde_ranges: _FdeRanges,
) -> Iterator[Candidates]:
    """Read the code symbols of a table, except those that start where a known one does."""
    dtype = _SYM[elf.bits]
    names_start, names_size = strings
    is_complete = _has_symtab(elf)
    code_starts = np.array([s.address if s.is_code else 0 for s in elf.sections], dtype=np.uint64)
    code_sizes = np.array([s.size if s.is_code else 0 for s in elf.sections], dtype=np.uint64)
    kept = 0
    for chunk in elf.chunks(table, _SYMBOLS_PER_CHUNK * dtype.itemsize, _MAX_SYMBOLS_BYTES):
        rows = np.frombuffer(chunk, dtype, len(chunk) // dtype.itemsize)
        types, sections = rows["st_info"] & 15, rows["st_shndx"]
        rows = rows[
            ((types == STT_FUNC) | (types == STT_NOTYPE) | (types == STT_GNU_IFUNC))
            & (sections > 0)
            & (sections < len(code_sizes))
            & (rows["st_name"] > 0)
            & (rows["st_name"] < names_size)
        ]
        values = rows["st_value"].astype(np.uint64)
        within = values - code_starts[rows["st_shndx"]]
        space_left = code_sizes[rows["st_shndx"]] - within
        in_section = within < code_sizes[rows["st_shndx"]]
        offsets, limits = space.offsets(values)
        keep = in_section & (limits > 0)
        if len(known):
            place = np.minimum(np.searchsorted(known, offsets.astype(np.uint32)), len(known) - 1)
            keep &= known[place] != offsets
        sizes = rows["st_size"].astype(np.uint64)
        if not is_complete:
            is_label = (sizes == 0) & (rows["st_info"] & 15 == STT_NOTYPE) & (limits > 0)
            labels = offsets[is_label].astype(np.uint32)
            own_ends = fde_ranges.ends_of(labels)
            sizes[is_label] = np.where(own_ends > 0, own_ends - labels, np.uint32(0))
            keep &= sizes > 0
        rows, sizes, offsets, limits, space_left = (
            column[keep] for column in (rows, sizes, offsets, limits, space_left)
        )
        room = np.minimum(limits - offsets, space_left)
        lengths = np.where(sizes > 0, np.minimum(sizes, room), room)
        kept += len(rows)
        if kept > MAX_FUNCTIONS:
            raise UnreadableElf(Miss.TOO_LARGE)
        yield Candidates(
            offsets.astype(np.uint32),
            (offsets + lengths).astype(np.uint32),
            rows["st_name"] + np.uint32(names_start),
            _rank_bindings(rows["st_info"] >> 4),
            sizes > 0,
        )


def _rank_bindings(bindings: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    ranks = np.full(16, 2, dtype=np.uint8)
    ranks[[STB_GLOBAL, STB_GNU_UNIQUE, STB_WEAK]] = 0, 0, 1
    return ranks[bindings]


def _read_stubs(elf: Elf, space: _OffsetSpace, strings: Strings, symbols: Candidates) -> Candidates:
    stubs = find_plt_stubs(elf)
    tables = [section for section in elf.sections if section.type == SHT_DYNSYM]
    names_start, names_size = strings.add_table(tables[0]) if tables else (0, 0)
    names = read_symbol_names(elf, stubs.symbols)
    is_named = (names > 0) & (names < names_size)
    names = names + np.uint32(names_start)
    _name_resolvers(space, symbols, stubs, names, is_named)
    starts, limits = space.offsets(stubs.starts)
    keep = is_named & (limits > 0)
    starts, sizes = starts[keep], (stubs.ends - stubs.starts)[keep]
    return Candidates(
        starts.astype(np.uint32),
        np.minimum(starts + sizes, limits[keep]).astype(np.uint32),
        names[keep] | AT_PLT,
        np.full(len(starts), 3, dtype=np.uint8),
        np.ones(len(starts), dtype=np.bool_),
    )


def _name_resolvers(
    space: _OffsetSpace,
    symbols: Candidates,
    stubs: PltStubs,
    names: Words,
    is_named: npt.NDArray[np.bool_],
) -> None:
    """Give stubs of the file's own indirect functions the name of the symbol at their resolver."""
    indirect = np.flatnonzero(stubs.symbols == 0)
    if not len(indirect) or not len(symbols.starts):
        return
    offsets, limits = space.offsets(stubs.resolvers[indirect])
    # The last at an address is the best name there.
    found = np.searchsorted(symbols.starts, offsets, side="right") - 1
    hit = (found >= 0) & (symbols.starts[found] == offsets) & (limits > 0)
    names[indirect[hit]] = symbols.names[found[hit]]
    is_named[indirect[hit]] = True


def _add_entry(
    elf: Elf, space: _OffsetSpace, functions: Functions, name: int, fde_ranges: _FdeRanges
) -> Functions:
    """Add `_start` at a program's entry point if no symbol is there."""
    if elf.entry is None:
        return functions
    offsets, limits = space.offsets(np.array([elf.entry], dtype=np.uint64))
    start, limit = int(offsets[0]), int(limits[0])
    place = int(np.searchsorted(functions.starts, start, side="right"))
    is_named = place > 0 and start < int(functions.ends[place - 1])
    if is_named or not limit:
        return functions
    for starts in (functions.starts, fde_ranges.starts):
        later = starts[np.searchsorted(starts, start, side="right") :][:1]
        limit = min([limit, *later.tolist()])
    own_end = int(fde_ranges.ends_of(offsets.astype(np.uint32))[0])
    end = min(limit, own_end or start + _start_size(elf, start + space.base))
    return Functions(
        functions.base,
        np.insert(functions.starts, place, np.uint32(start)),
        np.insert(functions.ends, place, np.uint32(end)),
        np.insert(functions.names, place, np.uint32(name)),
    )


def _start_size(elf: Elf, offset: int) -> int:
    """Return the size of _start: it ends with the `hlt` after its call of __libc_start_main."""
    size = min(_START_BYTES, elf.source.size - offset)
    code = elf.source.read_at(offset, size) if size > 0 else b""
    for call, length in ((b"\xff\x15", 6), (b"\xe8", 5)):
        place = code.find(call)
        if place >= 0 and code[place + length : place + length + 1] == b"\xf4":
            return place + length + 1
    return _START_WITHOUT_HLT_BYTES


def _add_unnamed(functions: Functions, fde_ranges: _FdeRanges) -> Functions:
    """Add the parts of each FDE range that no name covers; all point to the first of them."""
    if not len(fde_ranges.starts):
        return functions
    starts, ends, owners = _uncovered(functions, fde_ranges)
    if not len(starts) or len(starts) > MAX_FUNCTIONS:
        return functions
    # Each new range moves back by the number of those inserted before it.
    numbers = np.searchsorted(functions.starts, starts) + np.arange(len(starts))
    is_old = np.ones(len(functions.starts) + len(starts), dtype=np.bool_)
    is_old[numbers] = False

    def insert(old: Words, new: Words) -> Words:
        both = np.empty(len(is_old), dtype=np.uint32)
        both[is_old], both[numbers] = old, new
        return both

    is_first = np.append(True, owners[1:] != owners[:-1])
    names = numbers[is_first].astype(np.uint32)[np.cumsum(is_first) - 1] | IN_FDE_RANGE
    return Functions(
        functions.base,
        insert(functions.starts, starts),
        insert(functions.ends, ends),
        insert(functions.names, names),
    )


def _name_parts(
    space: _OffsetSpace, functions: Functions, parts: Sequence[tuple[int, int]], name: int
) -> Functions:
    """Name the unnamed functions inside some ranges of addresses."""
    bounds = np.array(parts, dtype=np.uint64)
    starts, _ = space.offsets(bounds[:, 0])
    lasts, _ = space.offsets(bounds[:, 1] - np.uint64(1))
    part = np.searchsorted(starts, functions.starts, side="right") - 1
    is_inside = (part >= 0) & (functions.starts <= lasts[part])
    is_unnamed = functions.names & IN_FDE_RANGE != 0
    names = np.where(is_inside & is_unnamed, np.uint32(name), functions.names)
    return replace(functions, names=names)


def _uncovered(
    functions: Functions, fde_ranges: _FdeRanges
) -> tuple[Words, Words, npt.NDArray[np.int32]]:
    """Return the parts of FDE ranges outside functions, sorted, and the FDE range of each."""
    columns = (fde_ranges.starts, fde_ranges.ends, functions.starts, functions.ends)
    bounds = np.concatenate(columns)
    order = np.argsort(bounds, kind="stable")
    bounds = bounds[order]
    counts = [len(column) for column in columns]
    # Both are 0 or 1 after the last of several equal bounds, and only those begin a part.
    fde_ranges_around = np.cumsum(np.repeat(_BEGIN_AND_END, counts)[order], dtype=np.int8)
    functions_around = np.cumsum(
        np.repeat(np.roll(_BEGIN_AND_END, 2), counts)[order], dtype=np.int8
    )
    owners = np.cumsum(order < counts[0], dtype=np.int32) - 1
    is_part = (fde_ranges_around[:-1] == 1) & (functions_around[:-1] == 0)
    is_part &= bounds[:-1] < bounds[1:]
    parts = np.flatnonzero(is_part)
    return bounds[parts], bounds[parts + 1], owners[parts]


_BEGIN_AND_END = np.array([1, -1, 0, 0], dtype=np.int8)
