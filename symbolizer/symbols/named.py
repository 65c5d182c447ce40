"""Find single symbols of an ELF file by their names, data and thread-local ones included."""

from collections.abc import Collection, Iterator
from typing import NamedTuple

import numpy as np

from symbolizer.symbols.elf import SHT_DYNSYM, SHT_SYMTAB, Elf, Section

_MAX_STRINGS_BYTES = 64 << 20
_MAX_SYMBOLS_BYTES = 96 << 20
_CHUNK_BYTES = 1 << 20
_MAX_NAME_BYTES = 96
_MAX_PLACES = 1 << 12

SYMBOL = np.dtype(
    [
        *(("st_name", "<u4"), ("st_info", "u1"), ("st_other", "u1")),
        *(("st_shndx", "<u2"), ("st_value", "<u8"), ("st_size", "<u8")),
    ]
)
"""Elf64_Sym."""


class Symbol(NamedTuple):
    """A symbol that is defined in the file; `address` is st_value, whatever that means."""

    name: bytes
    address: int
    size: int


def find_symbols(elf: Elf, beginnings: Collection[bytes]) -> Iterator[Symbol]:
    """Return symbols of a 64-bit file whose name is one of `beginnings`, or is one and a dot.

    Those of .symtab come first; most of .dynsym repeats them. A table that is too large is left
    out.

    Raises:
        UnreadableElf: a table is damaged.
    """
    for kind in (SHT_SYMTAB, SHT_DYNSYM):
        table, strings = _find_table(elf, kind)
        if table is None or strings is None or table.size > _MAX_SYMBOLS_BYTES:
            continue
        names = dict(_find_names(elf, strings, beginnings))
        if names:
            yield from _find_named(elf, table, names)


def has_string(elf: Elf, kind: int, string: bytes) -> bool:
    """Return whether a symbol table's strings hold this one, or one that ends with it."""
    _, strings = _find_table(elf, kind)
    return strings is not None and any(string in text for _, text in _read_strings(elf, strings))


def _find_table(elf: Elf, kind: int) -> tuple[Section | None, Section | None]:
    """Return the symbol table of a kind and its strings; no strings if they are too large."""
    table = next((section for section in elf.sections if section.type == kind), None)
    if table is None or table.link >= len(elf.sections):
        return table, None
    strings = elf.sections[table.link]
    return table, strings if strings.size <= _MAX_STRINGS_BYTES else None


def _find_names(
    elf: Elf, strings: Section, beginnings: Collection[bytes]
) -> Iterator[tuple[int, bytes]]:
    """Return where names begin; linkers store a name as the end of a longer one."""
    left = _MAX_PLACES
    for first, text in _read_strings(elf, strings):
        for beginning in beginnings:
            place = text.find(beginning)
            while place >= 0 and left:
                left -= 1
                end = text.find(b"\0", place, place + _MAX_NAME_BYTES)
                name = text[place:end]
                if end >= 0 and name[len(beginning) :][:1] in (b"", b"."):
                    yield first + place, name
                place = text.find(beginning, place + 1)


def _read_strings(elf: Elf, strings: Section) -> Iterator[tuple[int, bytes]]:
    """Return pieces that overlap by the longest name, and where they begin."""
    before = b""
    first = 0
    for piece in elf.chunks(strings, _CHUNK_BYTES, _MAX_STRINGS_BYTES):
        yield first - len(before), before + piece
        first += len(piece)
        before = piece[-_MAX_NAME_BYTES:]


def _find_named(elf: Elf, table: Section, names: dict[int, bytes]) -> Iterator[Symbol]:
    wanted = np.fromiter(names, np.uint32)
    chunk_bytes = _CHUNK_BYTES // SYMBOL.itemsize * SYMBOL.itemsize
    for chunk in elf.chunks(table, chunk_bytes, _MAX_SYMBOLS_BYTES):
        rows = np.frombuffer(chunk, SYMBOL, len(chunk) // SYMBOL.itemsize)
        rows = rows[np.isin(rows["st_name"], wanted) & (rows["st_shndx"] > 0)]
        for row in rows[:_MAX_PLACES]:
            yield Symbol(names[int(row["st_name"])], int(row["st_value"]), int(row["st_size"]))
