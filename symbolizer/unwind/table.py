"""Build, store and load unwind tables: for each code address of a file, an unwind rule.

A table is an array of 8-byte rows sorted by address, which the walk in the kernel bisects. The
rules come from call frame information (cfi.py, cfa.py); where that has holes, from known
handwritten code and from Go's table (handwritten.py, go.py).

The rows are cut into pages of 4 KiB of addresses, so that a row needs only the low bits of its
address, and a look-up touches few cache lines. The rule in force at the start of a page is repeated
there; pages without rows are holes.
"""

import contextlib
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from symbolizer import digest
from symbolizer.file_cache import FileCache
from symbolizer.integers import Wide
from symbolizer.location import Miss
from symbolizer.symbols.elf import SHT_NOBITS, Elf, Source, UnreadableElf, read_elf
from symbolizer.unwind.cfa import run_programs
from symbolizer.unwind.cfi import read_debug_frame, read_eh_frame
from symbolizer.unwind.go import read_go_rules
from symbolizer.unwind.handwritten import find_handwritten_rules
from symbolizer.unwind.rules import ROW, CfaKind, Rules, rule

PAGE_BITS = 12
PAGE = np.dtype([("number", "<u4"), ("first", "<u4"), ("count", "<u4")])
"""A page: its number (ELF address >> PAGE_BITS), its first row and how many it has."""

# libLLVM has 820,000 rows, ClickHouse about 2.8 million. A larger table than this (64 MB) would
# exceed the budget for memory in the kernel.
_MAX_ROWS = 1 << 23
_MAX_ADDRESS = 1 << (32 + PAGE_BITS)
_MAX_SPAN = 1 << 32

_MAGIC = b"EFLUNWD\n"
# Raise this when the layout changes, or the rule that any address gets.
_VERSION = 1
# magic, version, CRC-32 of all that follows it, key (NUL-padded), pages, rows
_HEADER = struct.Struct("<8sII136sQQ")
_CHECKED_FROM = 16
_KEYED = (b".eh_frame", b".debug_frame", b".gopclntab", b".plt")
"""Sections whose content determines rules; the headers of all sections do, too."""
_MAX_KEYED_BYTES = 1 << 28
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class UnwindTable:
    """The rows of one file.

    Attributes:
        key: the file's build id, or the result of `key_of`.
        pages: of dtype PAGE, sorted by number.
        rows: of dtype ROW, page after page.
    """

    key: str
    pages: npt.NDArray[np.void]
    rows: npt.NDArray[np.void]

    @property
    def memory_bytes(self) -> int:
        return self.pages.nbytes + self.rows.nbytes

    def find(self, elf_addresses: Wide) -> npt.NDArray[np.void]:
        """Return the row in force at each address, as the walk does; a HOLE if there is none."""
        found = np.zeros(len(elf_addresses), dtype=ROW)
        if not len(self.pages):
            return found
        numbers = self.pages["number"].astype(np.uint64)
        pages = np.minimum(
            np.searchsorted(numbers, elf_addresses >> np.uint64(PAGE_BITS)), len(numbers) - 1
        )
        is_known = numbers[pages] == elf_addresses >> np.uint64(PAGE_BITS)
        owners = np.repeat(numbers, self.pages["count"])
        keys = owners << np.uint64(PAGE_BITS) | self.rows["pc_low"].astype(np.uint64)
        # Every page has a row at its start, so an address in a known page finds a row of that page.
        places = np.searchsorted(keys, elf_addresses[is_known], side="right") - 1
        found[is_known] = self.rows[places]
        return found

    def write(self, file: BinaryIO) -> None:
        """Write the table to a file.

        Raises:
            OSError: it cannot be written.
        """
        counts = (self.key.encode(), len(self.pages), len(self.rows))
        checksum = zlib.crc32(_HEADER.pack(_MAGIC, _VERSION, 0, *counts)[_CHECKED_FROM:])
        checksum = zlib.crc32(self.pages.view(np.uint8).data, checksum)
        checksum = zlib.crc32(self.rows.view(np.uint8).data, checksum)
        file.write(_HEADER.pack(_MAGIC, _VERSION, checksum, *counts))
        file.write(self.pages.view(np.uint8).data)
        file.write(self.rows.view(np.uint8).data)

    @classmethod
    def read(cls, content: bytes, key: str) -> "UnwindTable | None":
        """Read a written table; None if it is damaged or another file's."""
        if len(content) < _HEADER.size:
            return None
        magic, version, checksum, held, page_count, row_count = _HEADER.unpack_from(content)
        rows_at = _HEADER.size + page_count * PAGE.itemsize
        is_whole = (
            (magic, version, held.rstrip(b"\0")) == (_MAGIC, _VERSION, key.encode())
            and len(content) == rows_at + row_count * ROW.itemsize
            and zlib.crc32(memoryview(content)[_CHECKED_FROM:]) == checksum
        )
        if not is_whole:
            return None
        pages = np.frombuffer(content, PAGE, page_count, _HEADER.size)
        return cls(key, pages, np.frombuffer(content, ROW, row_count, rows_at))


def build(source: Source, *, by_file_offset: bool = False) -> UnwindTable:
    """Build the table of an ELF file. It is empty if no rules are known.

    With `by_file_offset`, addresses are offsets of the code in the file, which can be computed from
    a mapping without reading the file.

    Raises:
        UnreadableElf: with the reason; also for files of machines other than x86-64.
    """
    elf = read_elf(source)
    rules = _read_rules(elf)
    if by_file_offset:
        rules = _as_file_offsets(rules, elf)
    return UnwindTable(elf.build_id, *_cut_into_pages(rules))


def _read_rules(elf: Elf) -> Rules:
    go = read_go_rules(elf)
    rules = _collect(run_programs(read_eh_frame(elf)))
    if go is None:  # musl describes its assembly in .debug_frame only
        rules = rules.over(_collect(run_programs(read_debug_frame(elf))))
    rules = rules.over(find_handwritten_rules(elf, rules))
    return rules if go is None else rules.over(go)


def _collect(pieces: Iterator[Rules]) -> Rules:
    """Join pieces, freeing each when it is copied: memory use is highest here."""
    collected: list[Rules] = []
    rows = 0
    last_rule = rule(CfaKind.HOLE)
    for piece in pieces:
        repeats = int(len(piece.rules) > 0 and int(piece.rules[0]) == last_rule)
        collected.append(Rules(piece.addresses[repeats:], piece.rules[repeats:]))
        last_rule = int(piece.rules[-1]) if len(piece.rules) else last_rule
        rows += len(collected[-1].rules)
        if rows > _MAX_ROWS:
            raise UnreadableElf(Miss.TOO_LARGE)
    joined = Rules(np.empty(rows, dtype=np.uint64), np.empty(rows, dtype=np.uint64))
    while collected:
        piece = collected.pop()
        here = slice(rows - len(piece.rules), rows)
        joined.addresses[here], joined.rules[here] = piece
        rows = here.start
    return joined


def _cut_into_pages(rules: Rules) -> tuple[npt.NDArray[np.void], npt.NDArray[np.void]]:
    if not len(rules.addresses):
        return np.zeros(0, dtype=PAGE), np.zeros(0, dtype=ROW)
    lowest, highest = int(rules.addresses[0]), int(rules.addresses[-1])
    if highest >= _MAX_ADDRESS or highest - lowest >= _MAX_SPAN:
        raise UnreadableElf(Miss.TOO_LARGE)
    numbers = np.arange(lowest >> PAGE_BITS, (highest >> PAGE_BITS) + 1, dtype=np.uint64)
    page_starts = numbers << np.uint64(PAGE_BITS)
    firsts = np.searchsorted(rules.addresses, page_starts)
    counts = np.diff(firsts, append=len(rules.addresses))
    in_force = np.append(np.uint64(rule(CfaKind.HOLE)), rules.rules)[firsts]
    needs_head = page_starts != rules.addresses[np.minimum(firsts, len(rules.rules) - 1)]
    is_kept = (counts > 0) | (in_force != rule(CfaKind.HOLE))

    pages = np.zeros(int(is_kept.sum()), dtype=PAGE)
    pages["number"] = numbers[is_kept]
    pages["count"] = (counts + needs_head)[is_kept]
    pages["first"] = np.cumsum(pages["count"]) - pages["count"]
    rows = np.empty(int(pages["count"].sum()), dtype=np.uint64)
    is_head = np.zeros(len(rows), dtype=np.bool_)
    is_head[pages["first"][needs_head[is_kept]]] = True
    rows[is_head] = in_force[is_kept & needs_head]
    rows[~is_head] = rules.rules | rules.addresses & np.uint64((1 << PAGE_BITS) - 1)
    return pages, rows.view(ROW)


def _as_file_offsets(rules: Rules, elf: Elf) -> Rules:
    moved = [Rules.of_ranges([])]
    for segment in sorted(elf.segments, key=lambda each: each.p_offset):
        start, end = segment.p_vaddr, segment.p_vaddr + segment.p_filesz
        first, last = np.searchsorted(rules.addresses, np.array([start, end], np.uint64)).tolist()
        addresses, words = rules.addresses[first:last], rules.rules[first:last]
        # Only in a damaged file does a rule begin before its segment; a hole is good enough there.
        shift = np.uint64((segment.p_offset - start) % (1 << 64))
        moved.append(Rules(addresses + shift, words))
        moved.append(Rules(np.array([segment.p_offset + segment.p_filesz], np.uint64), _HOLE))
    return Rules(*(np.concatenate(columns) for columns in zip(*moved, strict=True)))


_HOLE = np.array([rule(CfaKind.HOLE)], np.uint64)


def key_of(source: Source) -> str:
    """Return a hash of everything a table is built from: files with the same key have equal tables.

    By build id alone, a hostile file could claim another file's id and have its own table used.

    Raises:
        UnreadableElf: with the reason.
    """
    elf = read_elf(source)
    described = (elf.build_id, elf.is_x86_64, elf.entry_point, elf.segments, elf.loaded)
    named = repr((*described, elf.eh_frame_hdr, elf.sections)).encode()
    key = digest.blake2b(named, digest_size=20)
    ranges = [
        (section.offset, section.size)
        for section in elf.sections
        if section.type != SHT_NOBITS and section.name.endswith(_KEYED)
    ]
    if not ranges and elf.eh_frame_hdr:
        header_at = elf.eh_frame_hdr.p_offset
        ranges = [
            (each.p_offset, each.p_filesz)
            for each in elf.loaded
            if each.p_offset <= header_at < each.p_offset + each.p_filesz
        ]
    if sum(size for _, size in ranges) > _MAX_KEYED_BYTES:
        raise UnreadableElf(Miss.TOO_LARGE)
    for start, size in ranges:
        for at in range(start, start + size, _CHUNK_BYTES):
            key.update(source.read_at(at, min(_CHUNK_BYTES, start + size - at)))
    return key.hexdigest()


class UnwindCache:
    """A directory of unwind tables by `key_of`, bounded in bytes.

    A file without known rules has a table without rows.
    """

    def __init__(self, directory: Path, limit_bytes: int = 256 << 20) -> None:
        self._files = FileCache(directory, limit_bytes)

    def load(self, key: str) -> UnwindTable | None:
        """Read the table of a key; None if it has to be built."""
        file = self._files.open(key)
        if file is None:
            return None
        with file, contextlib.suppress(OSError):
            return UnwindTable.read(file.read(), key)
        return None

    def build(self, source: Source) -> None:
        """Build and store a table.

        Raises:
            UnreadableElf: with the reason.
            OSError: it cannot be written.
        """
        key = key_of(source)
        try:
            table = build(source, by_file_offset=True)
        except UnreadableElf:
            table = UnwindTable(key, np.zeros(0, PAGE), np.zeros(0, ROW))
        with self._files.create(key) as file:
            replace(table, key=key).write(file)
