"""Write files made to be expensive, misleading or broken for whoever reads them as ELF files.

`KINDS` names them; each is a function that writes one file. Most are a small program of which one
part is hostile. Large parts are holes in sparse files where zeros do the harm, so that the corpus
takes little room and time to write. `measure` reads them in processes with limits, as an agent's
readers do, and returns what each cost.
"""

import json
import os
import resource
import struct
import subprocess
import sys
import tempfile
import traceback
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from symbolizer.identify import Identifier, OpenedMapping
from symbolizer.symbols.elf import FileSource, UnreadableElf, read_elf
from symbolizer.symbols.functions import read_functions
from symbolizer.symbols.gobuild import read_go_build
from symbolizer.symbols.table import SymbolCache
from symbolizer.unwind.build import build
from tests.support.frame_files import block, cie, record, uleb

CODE, CODE_BYTES = 0x401000, 0x3000
DATA = 0x10000000
"""Where sections that are loaded lie, one after the other."""
MB = 1 << 20

PROGBITS, SYMTAB, STRTAB, RELA, NOTE, NOBITS, DYNSYM = 1, 2, 3, 4, 7, 8, 11
ALLOC, EXEC, COMPRESSED = 2, 4, 0x800

_SYM = np.dtype("<u4,u1,u1,<u2,<u8,<u8")
_SYM.names = ("st_name", "st_info", "st_other", "st_shndx", "st_value", "st_size")
_RELA = np.dtype([("r_offset", "<u8"), ("r_info", "<u8"), ("r_addend", "<u8")])


class Part(NamedTuple):
    """A section. `size` and `offset` are what its header claims, if that is not the truth.

    Attributes:
        hole: zeros after the content, which take no room on disk.
        link: name of the section that sh_link refers to.
    """

    name: bytes
    content: bytes = b""
    type: int = PROGBITS
    flags: int = ALLOC
    hole: int = 0
    link: bytes = b""
    address: int | None = None
    size: int | None = None
    offset: int | None = None


Phdr = tuple[int, int, int, int, int]
"""p_type, p_flags, p_offset, p_vaddr, p_filesz."""

TEXT = Part(b".text", flags=ALLOC | EXEC, address=CODE, size=CODE_BYTES, offset=0x1000)


def write_elf(
    path: Path,
    parts: Sequence[Part] = (),
    *,
    code: bytes = b"",
    code_bytes: int = CODE_BYTES,
    phdrs: Sequence[Phdr] | None = None,
    eh_frame_hdr: bool = False,
    patches: Sequence[tuple[int, bytes]] = (),
    entry: int = 0,
    has_sections: bool = True,
) -> None:
    """Write a program with code at CODE and these sections; `patches` change its first bytes."""
    text = TEXT._replace(size=code_bytes)
    names = b"\0" + b"\0".join({text.name, b".shstrtab", *(p.name for p in parts)}) + b"\0"
    every = [text, *parts, Part(b".shstrtab", names, STRTAB, 0)]
    numbers = {part.name: number for number, part in enumerate(every, 1)}
    with path.open("wb") as file:
        file.seek(0x1000)
        file.write(code)
        position, address = 0x1000 + code_bytes, DATA
        rows, loaded = [(0,) * 10], []
        for part in every:
            size, offset, at = part.size, part.offset, part.address
            if part is not text:
                file.seek(position)
                file.write(part.content)
                own = len(part.content) + part.hole
                offset = position if offset is None else offset
                at = address if at is None else at
                size = own if size is None else size
                position += own + -own % 16
                address += own + -own % 16
                loaded.append((part.name, offset, at, size))
            name = names.index(b"\0" + part.name + b"\0") + 1 if part.name else 0
            link = numbers.get(part.link, 0)
            rows.append((name, part.type, part.flags, at, offset, size, link, 0, 1, 0))
        headers = b"".join(struct.pack("<IIQQQQIIQQ", *row) for row in rows)
        file.seek(position)
        file.write(headers if has_sections else b"")
        file.truncate(position + len(headers))
        if phdrs is None:
            phdrs = [(1, 5, 0x1000, CODE, code_bytes)]
            phdrs += [(1, 4, o, a, s) for _, o, a, s in loaded if s][:64]
            if eh_frame_hdr:
                phdrs += [
                    (0x6474E550, 4, o, a, s) for name, o, a, s in loaded if name == b".eh_frame_hdr"
                ]
        counts = (64, 56, len(phdrs), 64, len(rows), len(rows) - 1)
        if len(rows) >= 0xFF00:  # the first header says how many there are
            counts = (64, 56, len(phdrs), 64, 0, 0xFFFF)
            file.seek(position + 32)
            file.write(struct.pack("<QI", len(rows), len(rows) - 1))
        if not has_sections:
            position, counts = 0, (64, 56, len(phdrs), 64, 0, 0)
        ident = b"\x7fELF\2\1\1" + bytes(9)
        head = ident + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, entry, 64, position, 0, *counts)
        for kind, flags, offset, at, size in phdrs:
            head += struct.pack("<IIQQQQQQ", kind, flags, offset, at, at, size, size, 0x1000)
        image = bytearray(head)
        for at, replacement in patches:
            image[at : at + len(replacement)] = replacement
        file.seek(0)
        file.write(image)


Write = Callable[[Path], None]


def elf(*parts: Part, **options: object) -> Write:
    """Return a function that writes such a file. Options are those of `write_elf`."""
    return lambda path: write_elf(path, parts, **options)  # type: ignore[arg-type]


def patched(at: int, form: str, *values: int) -> Write:
    """Return a small program with other bytes somewhere in its headers."""
    return elf(
        *symbols(row_count=3, strings=b"\0one\0two\0"), patches=[(at, struct.pack(form, *values))]
    )


# --- symbols ---------------------------------------------------------------------------------


def rows_of(count: int, *, spread: bool = True, size: int = 2, name_step: int = 4) -> np.ndarray:
    rows = np.zeros(count, dtype=_SYM)
    numbers = np.arange(count, dtype=np.uint64)
    rows["st_name"] = 1 + numbers * np.uint64(name_step)
    rows["st_info"], rows["st_shndx"] = 0x12, 1
    rows["st_value"] = CODE + (numbers if spread else 0)
    rows["st_size"] = size
    return rows


def symbols(
    rows: np.ndarray | None = None,
    *,
    row_count: int = 1 << 20,
    strings: bytes = b"\0",
    strings_hole: int = 0,
    table: bytes = b".symtab",
    **strings_header: int,
) -> tuple[Part, Part]:
    rows = rows_of(row_count) if rows is None else rows
    names = b".strtab" if table == b".symtab" else b".dynstr"
    kind = SYMTAB if table == b".symtab" else DYNSYM
    return (
        Part(table, rows.tobytes(), kind, 0, link=names),
        Part(names, strings, STRTAB, 0, hole=strings_hole)._replace(**strings_header),
    )


def _many_long_names(path: Path) -> None:
    """Write 1 M symbols, each with a name of 255 bytes: 256 MB of strings."""
    count = 1 << 20
    names = np.full((count, 256), ord("n"), dtype=np.uint8)
    for k in range(6):
        names[:, k] = ord("a") + (np.arange(count) >> (4 * k) & 15)
    names[:, 255] = 0
    with_code = {"code_bytes": 2 << 20}
    rows = rows_of(count, name_step=256)
    rows["st_name"] -= 1
    rows["st_name"][0] = 1
    write_elf(path, symbols(rows, strings=names.tobytes()), **with_code)  # type: ignore[arg-type]


def _nested(count: int) -> np.ndarray:
    rows = rows_of(count)
    rows["st_size"] = (2 * count - 2 * np.arange(count)).astype(np.uint64)
    return rows


def _interleaved(count: int) -> np.ndarray:
    """Return ranges in which each third overlaps with many."""
    rows = rows_of(count)
    rows["st_size"] = np.tile([5000, 3, 70], count // 3 + 1)[:count]
    return rows


def _with(rows: np.ndarray, **columns: int) -> np.ndarray:
    for name, value in columns.items():
        rows[name] = value
    return rows


def short_names() -> bytes:
    return b"\0" + b"abc\0" * (1 << 20)


_WIDE = {"code_bytes": 4 << 20}

_SYMBOLS: dict[str, Callable[[], Write]] = {
    "1 M symbols with 256 MB of strings": lambda: _many_long_names,
    "1 M symbols at one address": lambda: elf(
        *symbols(rows_of(1 << 20, spread=False), strings=short_names()), **_WIDE
    ),
    "1 M aliases in one long name": lambda: elf(
        *symbols(rows_of(1 << 20, spread=False, name_step=60), strings=b"_" * (60 << 20)), **_WIDE
    ),
    "1 M names in one string without an end": lambda: elf(
        *symbols(rows_of(1 << 20, name_step=200), strings=b"n" * (200 << 20)), **_WIDE
    ),
    "1 M nested symbols": lambda: elf(*symbols(_nested(1 << 20), strings=short_names()), **_WIDE),
    "100,000 nested symbols": lambda: elf(
        *symbols(_nested(99_000), strings=short_names()), **_WIDE
    ),
    "1 M interleaved symbols": lambda: elf(
        *symbols(_interleaved(1 << 20), strings=short_names()), **_WIDE
    ),
    "3 M symbols": lambda: elf(
        *symbols(rows_of(3 << 20), strings=b"\0" + b"abc\0" * (3 << 20)), **_WIDE
    ),
    "4 M symbols in a hole": lambda: elf(
        Part(b".symtab", hole=24 << 22, type=SYMTAB, flags=0, link=b".strtab"),
        Part(b".strtab", b"\0a\0", STRTAB, 0),
    ),
    "a symbol table of 2^62 bytes": lambda: elf(
        Part(b".symtab", type=SYMTAB, flags=0, size=1 << 62, link=b".strtab"),
        Part(b".strtab", b"\0a\0", STRTAB, 0),
    ),
    "both tables with 1 M symbols": lambda: elf(
        *symbols(strings=short_names()),
        *symbols(strings=short_names(), table=b".dynsym"),
        **_WIDE,
    ),
    "1 M symbols in .dynsym": lambda: elf(
        *symbols(strings=short_names(), table=b".dynsym"), **_WIDE
    ),
    "1 M labels in .dynsym": lambda: elf(
        *symbols(
            _with(rows_of(1 << 20), st_size=0, st_info=0x10),
            strings=short_names(),
            table=b".dynsym",
        ),
        **_WIDE,
    ),
    "1 M labels without sizes": lambda: elf(
        *symbols(_with(rows_of(1 << 20), st_size=0, st_info=0x10), strings=short_names()), **_WIDE
    ),
    "sizes of 2^64 - 1": lambda: elf(
        *symbols(_with(rows_of(3), st_size=(1 << 64) - 1), strings=b"\0abc\0abc\0abc\0")
    ),
    "values of 2^64 - 1": lambda: elf(
        *symbols(_with(rows_of(3), st_value=(1 << 64) - 1), strings=b"\0abc\0abc\0abc\0")
    ),
    "sections of symbols beyond the last": lambda: elf(
        *symbols(_with(rows_of(3), st_shndx=0xFFF1), strings=b"\0abc\0abc\0abc\0")
    ),
    "a symbol table of an odd size": lambda: elf(
        Part(b".symtab", rows_of(3).tobytes()[:-5], SYMTAB, 0, link=b".strtab"),
        Part(b".strtab", b"\0abc\0abc\0", STRTAB, 0),
    ),
    "a sparse string table of 256 MB": lambda: elf(
        *symbols(rows_of(1 << 20, name_step=255), strings_hole=256 << 20, strings=b""), **_WIDE
    ),
    "one name in a sparse string table of 256 MB": lambda: elf(
        *symbols(rows_of(1), strings_hole=256 << 20)
    ),
    "strings beyond the file": lambda: elf(*symbols(rows_of(3), size=1 << 40)),
    "a string table at 2^63": lambda: elf(*symbols(rows_of(3), offset=1 << 63, strings=b"\0abc\0")),
    "a symbol table that is its own string table": lambda: elf(
        Part(b".symtab", rows_of(1 << 16).tobytes(), SYMTAB, 0, link=b".symtab")
    ),
    "a string table that is the symbol table": lambda: elf(
        Part(b".symtab", rows_of(1 << 16).tobytes(), SYMTAB, 0, link=b".strtab"),
        Part(b".strtab", type=STRTAB, flags=0, offset=0x1000 + CODE_BYTES, size=24 << 16),
    ),
    "compressed strings": lambda: elf(
        *symbols(
            rows_of(3), strings=struct.pack("<IIQQ", 1, 0, 1 << 40, 1) + b"x", flags=COMPRESSED
        )
    ),
    "names of hostile bytes": lambda: elf(
        *symbols(rows_of(3), strings=b"\0\x1b[\0\n\r\0\xff\xfe\0\xed\xa0\x80\0")
    ),
    "symbols without strings": lambda: elf(Part(b".symtab", rows_of(1 << 16).tobytes(), SYMTAB, 0)),
}


# --- headers and notes -----------------------------------------------------------------------


def raw(content: bytes, *, size: int | None = None) -> Write:
    def write(path: Path) -> None:
        path.write_bytes(content)
        os.truncate(path, len(content) if size is None else size)

    return write


def _note(kind: int, name: bytes, desc: bytes) -> bytes:
    sizes = struct.pack("<III", len(name), len(desc), kind)
    return sizes + name + bytes(-len(name) % 4) + desc + bytes(-len(desc) % 4)


def _notes(content: bytes) -> Write:
    return elf(Part(b".note", content, NOTE))


def _many_sections(count: int, template: Part, *others: Part) -> Write:
    """Return a file with so many equal section headers."""
    return elf(*others, *[template] * count)


_BASE_PHDR: Phdr = (1, 5, 0x1000, CODE, CODE_BYTES)
_TINY = symbols(rows_of(3), strings=b"\0abc\0abc\0abc\0")

_HEADERS: dict[str, Callable[[], Write]] = {
    "an empty file": lambda: raw(b""),
    "the magic alone": lambda: raw(b"\x7fELF"),
    "a header cut short": lambda: raw(b"\x7fELF\2\1\1" + bytes(33)),
    "a header of zeros": lambda: raw(b"\x7fELF" + bytes(60)),
    "a header of ones": lambda: raw(b"\x7fELF\2\1\1" + b"\xff" * 200),
    "text": lambda: raw(b"#!/bin/sh\n" * 1000),
    "a hole of 1 TB": lambda: raw(b"", size=1 << 40),
    "a magic before a hole of 1 TB": lambda: raw(b"\x7fELF\2\1\1", size=1 << 40),
    "section headers at 2^63": lambda: patched(40, "<Q", 1 << 63),
    "program headers at 2^63": lambda: patched(32, "<Q", 1 << 63),
    "section headers that are the program headers": lambda: patched(40, "<Q", 64),
    "65,535 program headers": lambda: patched(56, "<H", 0xFFFF),
    "65,535 section headers": lambda: patched(60, "<H", 0xFFFF),
    "no section header but a place for them": lambda: patched(60, "<H", 0),
    "names in no section": lambda: patched(62, "<H", 0xFFFE),
    "names in the reserved section": lambda: patched(62, "<H", 0xFFFF),
    "section headers of size 0": lambda: patched(58, "<H", 0),
    "program headers of size 0": lambda: patched(54, "<H", 0),
    "big-endian": lambda: patched(5, "<B", 2),
    "32 bits": lambda: patched(4, "<B", 1),
    "a class that does not exist": lambda: patched(4, "<B", 9),
    "another machine": lambda: patched(18, "<H", 183),
    "an entry at 2^64 - 1": lambda: patched(24, "<Q", (1 << 64) - 1),
    "65,000 section headers": lambda: _many_sections(65_000, Part(b".x", b"")),
    "65,536 section headers with large claims": lambda: _many_sections(
        65_533, Part(b".x", size=1 << 30, offset=0)
    ),
    "16,000 code sections": lambda: _many_sections(
        16_000,
        Part(b".x", flags=ALLOC | EXEC, address=CODE, size=CODE_BYTES, offset=0x1000),
        *_TINY,
    ),
    "1 M symbols in 16,000 sections": lambda: _many_sections(
        16_000,
        Part(b".x", flags=ALLOC | EXEC, address=CODE, size=4 << 20, offset=0x1000),
        *symbols(_with(rows_of(1 << 20), st_shndx=15_000), strings=short_names()),
    ),
    "30,000 note sections": lambda: _many_sections(
        30_000, Part(b".n", type=NOTE, size=65_536, offset=0)
    ),
    "names without an end": lambda: elf(
        *[Part(b"n" * 1000, b"")] * 60_000,
    ),
    "64 executable segments in one place": lambda: elf(*_TINY, phdrs=[_BASE_PHDR] * 64),
    "4,000 executable segments": lambda: elf(
        *_TINY, phdrs=[_BASE_PHDR] * 63 + [(4, 4, 0, 0, 0)] * 4
    ),
    "overlapping segments": lambda: elf(
        *_TINY,
        phdrs=[(1, 5, 0x1000 + 16 * n, CODE + 8 * n, CODE_BYTES - 16 * n) for n in range(60)],
    ),
    "a segment beyond the file": lambda: elf(*_TINY, phdrs=[(1, 5, 0x1000, CODE, 1 << 62)]),
    "a segment at 2^63": lambda: elf(*_TINY, phdrs=[(1, 5, 1 << 63, CODE, CODE_BYTES)]),
    "a segment of addresses from 2^63 on": lambda: elf(
        *_TINY, phdrs=[(1, 5, 0x1000, 1 << 63, CODE_BYTES)]
    ),
    "a dynamic section of 2^40 bytes": lambda: elf(
        phdrs=[_BASE_PHDR, (2, 4, 0x1000, CODE, 1 << 40)], patches=[(16, b"\3\0")], entry=CODE
    ),
    "a note larger than its section": lambda: _notes(
        struct.pack("<III", 4, 0xFFFFFFFF, 3) + b"GNU\0"
    ),
    "a note with a name of 4 GB": lambda: _notes(struct.pack("<III", 0xFFFFFFFF, 20, 3) + b"GNU\0"),
    "5,000 notes before the build id": lambda: _notes(
        _note(9, b"", b"") * 5000 + _note(3, b"GNU\0", b"b" * 20)
    ),
    "a build id of 4 KB": lambda: _notes(_note(3, b"GNU\0", b"b" * 4096)),
    "a build id of one byte": lambda: _notes(_note(3, b"GNU\0", b"b")),
    "Go's build information of 2 GB": lambda: elf(
        Part(b".go.buildinfo", b"\xff Go buildinf:\x08\2" + bytes(16) + b"\xff" * 5, hole=900_000)
    ),
}


# --- the PLT ---------------------------------------------------------------------------------


def jumps() -> Part:
    return Part(b".plt", b"\xff\x25\0\0\0\0" * (4 * MB // 6), flags=ALLOC | EXEC)


def _slots(count: int) -> bytes:
    rows = np.zeros(count, dtype=_RELA)
    rows["r_offset"] = DATA + np.arange(count, dtype=np.uint64)
    rows["r_info"] = 7 | 0xFFFFFFFF << 32
    return rows.tobytes()


_PLT: dict[str, Callable[[], Write]] = {
    "4 MB of jumps": lambda: elf(jumps(), *symbols(rows_of(3), strings=b"\0a\0", table=b".dynsym")),
    "relocations of 120 MB": lambda: elf(
        jumps(), Part(b".rela", hole=120 * MB, type=RELA), *symbols(rows_of(3), table=b".dynsym")
    ),
    "16,000 sections of the same relocations": lambda: _many_sections(
        16_000, Part(b".rela", type=RELA, size=1900, offset=0), jumps()
    ),
    "260,000 slots of symbols beyond the table": lambda: elf(
        jumps(), Part(b".rela", _slots(260_000), RELA), *symbols(rows_of(3), table=b".dynsym")
    ),
    "1 M slots": lambda: elf(
        jumps(), Part(b".rela", _slots(1 << 20), RELA), *symbols(rows_of(3), table=b".dynsym")
    ),
    "a PLT of 3 bytes": lambda: elf(Part(b".plt", b"\xff\x25\0", flags=ALLOC | EXEC)),
}


# --- call frame information ------------------------------------------------------------------

_FDE = np.dtype(
    [("length", "<u4"), ("cie", "<u4"), ("start", "<i4"), ("size", "<u4"), ("rest", "<u4")]
)


def fde_rows(count: int, first: int, *, size: int = 1, step: int = 1) -> np.ndarray:
    """Return FDEs of the CIE at the start of the section, whose first is at `first` in it."""
    rows = np.zeros(count, dtype=_FDE)
    at = first + _FDE.itemsize * np.arange(count)
    rows["length"] = _FDE.itemsize - 4
    rows["cie"] = at + 4
    rows["start"] = CODE + step * np.arange(count) - (DATA + at + 8)
    rows["size"] = size
    return rows


def frames(content: bytes, hole: int = 0, **options: object) -> Write:
    return elf(Part(b".eh_frame", content, hole=hole), **{"code_bytes": 4 << 20, **options})


def _fdes(count: int, **options: int) -> bytes:
    head = cie()
    return head + fde_rows(count, len(head), **options).tobytes()


def _program(program: bytes, count: int = 1, size: int = 0x1000) -> bytes:
    section = bytearray(cie())
    for number in range(count):
        at = len(section)
        start = CODE + number * size - (DATA + at + 8)
        section += record(struct.pack("<IiI", at + 4, start, size) + b"\0" + program)
    return bytes(section)


def indexed(
    pairs: np.ndarray, content: bytes, hole: int = 0, encodings: bytes = b"\x1b\3\x3b"
) -> Write:
    """Return a file with an index of these pairs: FDEs' first addresses and positions."""
    size = 12 + 8 * len(pairs)
    frames_at = DATA + size + -size % 16
    table = np.zeros((len(pairs), 2), dtype="<i4")
    table[:, 0], table[:, 1] = pairs[:, 0] - DATA, pairs[:, 1] + frames_at - DATA
    head = b"\1" + encodings + struct.pack("<iI", frames_at - DATA - 4, len(pairs))
    return elf(
        Part(b".eh_frame_hdr", head + table.tobytes()),
        Part(b".eh_frame", content, hole=hole),
        code_bytes=4 << 20,
        eh_frame_hdr=True,
    )


def _indexed_fdes(count: int) -> tuple[np.ndarray, bytes]:
    head = cie()
    size = 12 + 8 * count
    rows = fde_rows(count, len(head))
    rows["start"] -= size + -size % 16
    at = len(head) + _FDE.itemsize * np.arange(count)
    return np.stack([CODE + np.arange(count), at], axis=1), head + rows.tobytes()


def _own_cies(count: int) -> tuple[np.ndarray, bytes]:
    """Return FDEs each with a CIE of its own."""
    head = cie(b"\x0c\x07\x08\x90\x01")
    step = len(head) + _FDE.itemsize
    size = 12 + 8 * count
    shift = size + -size % 16
    rows = np.zeros((count, step), dtype=np.uint8)
    rows[:, : len(head)] = np.frombuffer(head, np.uint8)
    fdes = np.zeros(count, dtype=_FDE)
    at = step * np.arange(count) + len(head)
    fdes["length"], fdes["cie"], fdes["size"] = _FDE.itemsize - 4, len(head) + 4, 1
    fdes["start"] = CODE + np.arange(count) - (DATA + shift + at + 8)
    rows[:, len(head) :] = fdes.view(np.uint8).reshape(count, -1)
    return np.stack([CODE + np.arange(count), at], axis=1), rows.tobytes()


def equal_rows(count: int) -> np.ndarray:
    return np.tile([[CODE, len(cie())]], (count, 1))


def random_numbers(limit: int, shape: int | tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(7).integers(0, limit, shape)


_FRAMES: dict[str, Callable[[], Write]] = {
    "1 M equal rows in .eh_frame_hdr": lambda: indexed(equal_rows(1 << 20), _fdes(1)),
    "1 M random rows in .eh_frame_hdr": lambda: indexed(
        random_numbers(1 << 28, (1 << 20, 2)), _fdes(1), hole=60 * MB
    ),
    "1 M rows of 1 M FDEs": lambda: indexed(*_indexed_fdes(1 << 20)),
    "60,000 FDEs with CIEs of their own": lambda: indexed(*_own_cies(60_000)),
    "1 M FDEs with CIEs of their own": lambda: indexed(*_own_cies(1 << 20)),
    "1 M FDEs without an index": lambda: frames(_fdes(1 << 20)),
    "3 M FDEs": lambda: frames(_fdes(3 << 20)),
    "1 M FDEs that overlap": lambda: frames(_fdes(1 << 20, size=1 << 20)),
    "1 M FDEs at one address": lambda: frames(_fdes(1 << 20, size=1 << 20, step=0)),
    "1 M FDEs of size 0": lambda: frames(_fdes(1 << 20, size=0)),
    "4 M records without content": lambda: frames(struct.pack("<II", 4, 0) * (4 << 20)),
    "a sparse .eh_frame of 64 MB": lambda: frames(b"", hole=64 * MB),
    "a sparse .eh_frame of 16 GB": lambda: frames(b"", hole=16 << 30),
    "16 sparse sections of 60 MB": lambda: elf(*[Part(b".eh_frame", hole=60 * MB)] * 16),
    "16,000 sections that are one .eh_frame": lambda: _many_sections(
        16_000, Part(b".eh_frame", offset=0x1000, size=4096)
    ),
    "an .eh_frame found by its index only": lambda: (
        lambda path: write_elf(
            path,
            [
                Part(b".eh_frame_hdr", b"\1\x1b\3\x3b" + struct.pack("<iI", 12, 0) + bytes(4)),
                Part(b".eh_frame", _fdes(1 << 20), hole=16 * MB),
            ],
            code_bytes=4 << 20,
            eh_frame_hdr=True,
            has_sections=False,
        )
    ),
    "an index with 2^32 - 1 rows": lambda: elf(
        Part(b".eh_frame_hdr", b"\1\x1b\3\x3b" + struct.pack("<iI", 12, 0xFFFFFFFF)),
        eh_frame_hdr=True,
    ),
    "an index of indirect pointers": lambda: indexed(
        equal_rows(9), _fdes(1), encodings=b"\x9b\x83\xbb"
    ),
    "a CIE that is its own CIE": lambda: frames(
        record(struct.pack("<I", 4) + b"\1zR\0\1\x78\x10\1\x1b")
    ),
    "FDEs that are each other's CIE": lambda: frames(
        record(struct.pack("<IiI", 4, 1, 1)) + record(struct.pack("<IiI", 20, 1, 1)) * 4
    ),
    "CIEs beyond the section": lambda: frames(record(struct.pack("<IiI", 0xFFFFFFF0, 1, 1)) * 1000),
    "500,000 CIEs": lambda: frames(cie() * 500_000),
    "60,000 different CIEs": lambda: frames(
        b"".join(
            (head := cie(uleb(n) + b"\x0c\x07\x08"))
            + record(struct.pack("<IiI", len(head) + 4, 1, 1))
            for n in range(60_000)
        )
    ),
    "an augmentation of 1 MB": lambda: frames(
        record(bytes(4) + b"\1z" + b"R" * MB + b"\0\1\x78\x10" + block(b"\x1b" * MB))
        + record(struct.pack("<IiI", 0, 1, 1))
    ),
    "an augmentation of 100 pointers": lambda: frames(
        record(bytes(4) + b"\1z" + b"P" * 100 + b"\0\1\x78\x10" + block(b"\x9b" * 500))
    ),
    "numbers of 30 MB": lambda: frames(record(bytes(4) + b"\1zR\0" + b"\x80" * (30 * MB))),
    "operands of 120,000 bytes": lambda: frames(_program(b"\x0e" + b"\x80" * 120_000, 200)),
    "10 M advances": lambda: frames(_program(b"\x41" * 120_000, 84)),
    "10 M advances with a change after each": lambda: frames(
        _program(b"\x41\x0e\x10\x41\x0e\x18" * 20_000, 250)
    ),
    "advances beyond the function": lambda: frames(_program(b"\x04\xff\xff\xff\xff" * 20_000, 20)),
    "a program of 40 MB": lambda: frames(_program(b"\x41" * (40 * MB))),
    "states nested 60,000 deep": lambda: frames(_program(b"\x0a" * 60_000 + b"\x0b" * 60_000, 100)),
    "states restored that were never kept": lambda: frames(_program(b"\x0b\x41" * 60_000, 100)),
    "chains of states": lambda: frames(_program(b"\x0a\x41\x0b" * 40_000, 100)),
    "expressions of 4 GB": lambda: frames(_program(b"\x0f\xff\xff\xff\xff\x0f" * 20_000, 100)),
    "expressions that jump to themselves": lambda: frames(
        _program((b"\x0f" + block(b"\x77\x08\x2f\xfd\xff")) * 16_000, 100)
    ),
    "expressions of 1,000 dereferences": lambda: frames(
        _program((b"\x0f" + block(b"\x77\x08" + b"\x06" * 1000)) * 120, 100)
    ),
    "FDEs at the end of the address space": lambda: elf(
        Part(b".eh_frame", cie(data=b"\0") + record(struct.pack("<IQQ", 28, (1 << 64) - 16, 64))),
    ),
    "FDEs at 2^63": lambda: frames(
        _fdes(1000), phdrs=[(1, 5, 0x1000, (1 << 63) - 0x400000, 0x3FFFFF)]
    ),
    "lengths of 64 bits": lambda: frames(struct.pack("<IQ", 0xFFFFFFFF, 1 << 63) * 1000),
    "a length of 64 bits that leads back": lambda: frames(
        struct.pack("<IQI", 0xFFFFFFFF, (1 << 64) - 12, 0) * 1000
    ),
    "a last record cut short": lambda: frames(_fdes(3)[:-7]),
    "code of 300 MB without rules": lambda: elf(code=b"\x90", code_bytes=300 * MB, entry=CODE),
    "code of 300 MB of calls": lambda: elf(
        code=b"\xff\xd0\x89\xc7\xe8\0\0\0\0" * 1_000_000, code_bytes=300 * MB, entry=CODE
    ),
    "signal returns only": lambda: elf(
        code=bytes.fromhex("48c7c00f0000000f05") * 1000, code_bytes=4 << 20, entry=CODE
    ),
}


def _compressed(size: int, claimed: int | None = None, kind: int = 1) -> bytes:
    packer = zlib.compressobj(1)
    pieces = [packer.compress(bytes(MB)) for _ in range(size // MB)] + [packer.flush()]
    head = struct.pack("<IIQQ", kind, 0, size if claimed is None else claimed, 1)
    return head + b"".join(pieces)


def debug_frames(*contents: bytes, flags: int = COMPRESSED, hole: int = 0) -> Write:
    return elf(*(Part(b".debug_frame", content, flags=flags, hole=hole) for content in contents))


_DEBUG_FRAMES: dict[str, Callable[[], Write]] = {
    "15 compressed sections of 64 MB": lambda: debug_frames(*[_compressed(64 * MB)] * 15),
    "a compressed section of 64 MB": lambda: debug_frames(_compressed(64 * MB)),
    "a compressed section of 2^63 bytes": lambda: debug_frames(_compressed(MB, 1 << 63)),
    "a compressed section larger than it says": lambda: debug_frames(_compressed(32 * MB, 16)),
    "a compressed section smaller than it says": lambda: debug_frames(_compressed(MB, 60 * MB)),
    "a section compressed in an unknown way": lambda: debug_frames(_compressed(MB, kind=77)),
    "a section that is not compressed but says so": lambda: debug_frames(b"x" * 1000),
    "a sparse .debug_frame of 64 MB": lambda: debug_frames(b"", flags=0, hole=64 * MB),
    "a .debug_frame of 4 M records": lambda: debug_frames(
        struct.pack("<II", 4, 0xFFFFFFFF) * (4 << 20), flags=0
    ),
}


# --- Go's table ------------------------------------------------------------------------------


def go_table(
    count: int,
    *,
    claimed: int | None = None,
    starts: np.ndarray | None = None,
    records: np.ndarray | None = None,
    names: bytes = b"\0runtime.goexit\0runtime.goexit1\0",
    name_at: int = 1,
    pcs: bytes = b"\2\x10\0",
    magic: int = 0xFFFFFFF1,
    record: bytes | None = None,
) -> bytes:
    """Return a .gopclntab of functions of one byte each."""
    words_at, names_at = 72, 72
    pcs_at = names_at + len(names)
    functions_at = pcs_at + len(pcs) + -(pcs_at + len(pcs)) % 8
    size = 4 * (2 * count + 1)
    pairs = np.zeros(2 * count + 1, dtype="<u4")
    pairs[::2] = np.arange(count + 1) if starts is None else starts
    pairs[1::2] = size + 48 * np.arange(count) if records is None else records
    words = (count if claimed is None else claimed, 1, CODE, names_at, names_at, names_at)
    head = struct.pack("<IBBBB", magic, 0, 0, 1, 8) + struct.pack(
        "<8Q", *words, pcs_at, functions_at
    )
    if record is None:
        record = struct.pack("<Ii8IBBxB", 0, name_at, *[0] * 8, 0, 0, 0)
    content = head + names + pcs
    content = content.ljust(functions_at, b"\0") + pairs.tobytes()
    assert words_at == len(head)
    return content + record.ljust(48, b"\0") * (count if records is None else 1)


def go(content: bytes, hole: int = 0, **options: object) -> Write:
    options = {"code_bytes": 4 << 20, "entry": CODE, **options}
    return elf(Part(b".gopclntab", content, hole=hole), **options)


_GO: dict[str, Callable[[], Write]] = {
    "a table of 1 M functions": lambda: go(go_table((1 << 20) - 1)),
    "a table of 2^63 functions": lambda: go(go_table(4, claimed=1 << 63)),
    "a table of 0 functions": lambda: go(go_table(4, claimed=0)),
    "functions in disorder": lambda: go(go_table(1000, starts=random_numbers(1 << 31, 1001))),
    "functions of 4 GB": lambda: go(go_table(1000, starts=np.linspace(0, (1 << 32) - 1, 1001))),
    "records beyond the table": lambda: go(go_table(1000, records=np.full(1000, 0xFFFFFFF0))),
    "one record for 1 M functions": lambda: go(
        go_table((1 << 20) - 1, records=np.full((1 << 20) - 1, 8 * (1 << 20) - 4))
    ),
    "names at -1": lambda: go(go_table(1000, name_at=-1)),
    "names at 2^31 - 1": lambda: go(go_table(1000, name_at=(1 << 31) - 1)),
    "names without an end": lambda: go(go_table(100_000, names=b"n" * (30 * MB))),
    "names in a hole": lambda: go(go_table(1000), hole=200 * MB),
    "numbers without an end": lambda: go(go_table(100_000, pcs=b"\x80" * MB)),
    "a text of 300 MB without goexit": lambda: go(go_table(1000), code_bytes=300 * MB),
    "a table of an unknown version": lambda: go(go_table(10, magic=0xFFFFFF00)),
    "a table of Go 1.2": lambda: go(go_table(10, magic=0xFFFFFFFB)),
    "a table of Go 1.16": lambda: go(go_table(1000, magic=0xFFFFFFFA)),
    "16,000 sections that are one table": lambda: _many_sections(
        16_000, Part(b".gopclntab", offset=0x1000, size=4096)
    ),
    "200 MB of headers of such tables": lambda: elf(
        Part(b".rodata", go_table(2)[:16] * (200 * MB // 16)), entry=CODE
    ),
}


def _kinds() -> dict[str, Callable[[], Write]]:
    groups = {
        "headers": _HEADERS,
        "symbols": _SYMBOLS,
        "PLT": _PLT,
        "frames": _FRAMES,
        ".debug_frame": _DEBUG_FRAMES,
        "Go": _GO,
    }
    return {
        f"{group}: {kind}": write
        for group, kinds in groups.items()
        for kind, write in kinds.items()
    }


KINDS = _kinds()
"""What makes each file, by the name of its kind."""


def write_kind(kind: str, path: Path) -> None:
    """Write the file of a kind, in a child process: some take 1 GB to make."""
    path.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        try:
            KINDS[kind]()(path)
            os._exit(0)
        except BaseException:  # noqa: BLE001 - the parent asserts that it did not happen
            traceback.print_exc()
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0, f"{kind} cannot be written"


class Cost(NamedTuple):
    """What reading one file took.

    Attributes:
        outcome: what each step found, or why it refused; of a child that died, what is known of it.
        is_read: whether the child survived.
        cpu_s: of the child, user and system.
        peak_bytes: of the child's memory; `grown_bytes` is without what it had at its start.
        stored_bytes: size of its symbol table in the cache.
    """

    outcome: str
    is_read: bool
    cpu_s: float
    peak_bytes: int
    grown_bytes: int
    stored_bytes: int


def measure(
    kinds: Sequence[str], folder: Path, *, memory_bytes: int = 1 << 30, cpu_s: int = 20
) -> Iterator[tuple[str, Cost]]:
    """Write each file and read it as the agent does (identity, unwind table, symbols).

    Each is read in a process of its own with limits, which a small process forks.
    """
    command = [sys.executable, "-P", "-c", _FORKING, str(_ROOT), str(folder)]
    command += [str(memory_bytes), str(cpu_s), *kinds]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for kind, line in zip(kinds, process.stdout, strict=True):
            yield kind, Cost(*json.loads(line))


_ROOT = Path(__file__).resolve().parent.parent.parent
_FORKING = """
import sys
sys.path.insert(0, sys.argv[1])
from tests.support.hostile_files import main
main(*sys.argv[2:])
"""


def main(folder: str, memory_bytes: str, cpu_s: str, *kinds: str) -> None:
    """Print the cost of each kind."""
    path = Path(folder) / "hostile"
    for kind in kinds:
        write_kind(kind, path)
        print(json.dumps(_measure(path, int(memory_bytes), int(cpu_s))), flush=True)
    path.unlink(missing_ok=True)


def _measure(path: Path, memory_bytes: int, cpu_s: int) -> Cost:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))
        status = 1
        with os.fdopen(writing, "wb") as pipe:
            try:
                pipe.write(json.dumps(_read_all(path)).encode())
                status = 0
            except BaseException:  # noqa: BLE001 - it is part of the result
                pipe.write(json.dumps([traceback.format_exc(limit=-3), 0, 0]).encode())
        os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    _, status, usage = os.wait4(pid, 0)
    outcome, grown_bytes, stored_bytes = json.loads(said or b'["killed", 0, 0]')
    cpu = usage.ru_utime + usage.ru_stime
    return Cost(outcome, status == 0, cpu, usage.ru_maxrss << 10, grown_bytes, stored_bytes)


def _read_all(path: Path) -> tuple[str, int, int]:
    """Return what each step says, how much the process grew, and the size of the symbol table."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome, stored_bytes = _read(FileSource(os.open(path, os.O_RDONLY)))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return outcome, grown << 10, stored_bytes


def _read(source: FileSource) -> tuple[str, int]:
    """Return what each step says, and the size of the symbol table."""
    said: list[str] = []
    stored = 0

    def attempt(name: str, step: Callable[[], str]) -> None:
        try:
            said.append(f"{name}: {step()}")
        except UnreadableElf as error:
            said.append(f"{name}: {error.reason.value}")

    def store_symbols() -> str:
        nonlocal stored
        headers = read_elf(source)
        functions, strings = read_functions(headers)
        with tempfile.TemporaryDirectory() as folder:
            cache = SymbolCache(Path(folder), 1 << 30)
            cache.store("ab", functions, headers.segments, strings).close()
            stored = sum(path.stat().st_size for path in Path(folder).iterdir())
        return f"{len(functions.starts)} functions"

    def identify() -> str:
        found = OpenedMapping(source)
        return f"build id of {len(Identifier().identify(found).build_id)}"

    attempt("identity", identify)
    attempt("unwind", lambda: f"{len(build(source, by_file_offset=True).rows)} rows")
    attempt("symbols", store_symbols)
    attempt("Go", lambda: str(read_go_build(read_elf(source)) is not None))
    return "; ".join(said), stored
