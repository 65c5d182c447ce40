"""The strings that hold the names in an object file, without keeping them in memory.

A string is named by a position: where it begins, if all areas of strings were concatenated, each
followed by a NUL. Areas are read piece by piece, and only the pieces that contain something wanted.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from symbolizer.integers import Ints
from symbolizer.location import Miss
from symbolizer.symbols.candidates import (
    COMPARED_NAME_BYTES,
    MAX_NAME_BYTES,
    Words,
    name_preferences,
)
from symbolizer.symbols.elf import (
    SHT_STRTAB,
    Elf,
    MemorySource,
    Section,
    Source,
    UnreadableElf,
    check_size,
)

# Browsers and databases have 100 to 200 MB. Nothing of it is read that no symbol needs.
_MAX_SECTION_BYTES = 1 << 29
# A quarter of the cache: a million names of 127 bytes. A file whose functions need more is
# TOO_LARGE, so that its strings do not evict all other files' tables.
_MAX_KEPT_BYTES = 128 << 20
_PIECE_BYTES = 1 << 20


class _Area(NamedTuple):
    start: int
    source: Source
    offset: int
    size: int

    @property
    def end(self) -> int:
        """The position of the NUL that follows."""
        return self.start + self.size

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Return first position and size of each piece."""
        for within in range(0, self.size, _PIECE_BYTES):
            yield self.start + within, min(_PIECE_BYTES, self.size - within)

    def read(self, position: int, size: int) -> bytes:
        within = position - self.start
        return self.source.read_at(self.offset + within, min(size, self.size - within))


class Strings:
    """Areas of strings: string tables and others. All methods raise UnreadableElf."""

    def __init__(self, elf: Elf) -> None:
        self._elf = elf
        self._areas: list[_Area] = []
        self._tables: dict[Section, int] = {}
        self._size = 0

    def add_table(self, symbols: Section) -> tuple[int, int]:
        """Add the strings of a symbol table; return their start and size."""
        sections = self._elf.sections
        section = sections[symbols.link] if symbols.link < len(sections) else None
        if section is None or section.type != SHT_STRTAB:
            return 0, 0
        if section not in self._tables:
            check_size(section, _MAX_SECTION_BYTES)
            self._tables[section] = self.add(section.offset, section.size)
        return self._tables[section], section.size

    def add(self, offset: int, size: int) -> int:
        """Add a part of the file; return its start."""
        return self._add(self._elf.source, offset, size)

    def add_text(self, text: bytes) -> int:
        """Add a string that the file does not contain; return its position."""
        return self._add(MemorySource(text), 0, len(text))

    def _add(self, source: Source, offset: int, size: int) -> int:
        if self._size + size + 1 > 1 << 30:  # positions have 30 bits
            raise UnreadableElf(Miss.TOO_LARGE)
        start = self._size
        self._areas.append(_Area(start, source, offset, size))
        self._size += size + 1
        return start

    def preferences(self, positions: Words) -> npt.NDArray[np.int64]:
        """Return a number per name, lower for better ones; `positions` are sorted."""
        numbers = np.zeros(len(positions), dtype=np.int64)
        for area in self._areas:
            for start, size in area.pieces():
                here = slice(*np.searchsorted(positions, [start, start + size]).tolist())
                if here.start < here.stop:
                    piece = area.read(start, size + COMPARED_NAME_BYTES)
                    within = positions[here].astype(np.int64) - start
                    numbers[here] = name_preferences(piece, within)
        return numbers

    def keep(self, positions: Words) -> tuple["KeptStrings", Iterator[bytes]]:
        """Return where these strings are among those kept, and the text of these in pieces.

        They are NUL-terminated, and cut to MAX_NAME_BYTES. A string that is the end of another is
        kept once.

        Raises:
            UnreadableElf: also while the pieces are read.
        """
        wanted = np.sort(positions).astype(np.int64)
        wanted = wanted[np.append(True, wanted[1:] != wanted[:-1])[: len(wanted)]]
        ends = self._find_ends(wanted)
        # One run of bytes for a string and those at its end, and for strings without gaps between
        # them in the same area.
        is_first = np.append(True, wanted[1:] > ends[:-1] + 1)[: len(wanted)]
        area_starts = np.searchsorted(wanted, [area.start for area in self._areas])
        is_first[area_starts[area_starts < len(wanted)]] = True
        is_last = np.append(is_first[1:], True)[: len(wanted)]
        starts, ends = wanted[is_first], ends[is_last]
        after = np.cumsum(ends - starts + 1)
        if len(after) and int(after[-1]) > _MAX_KEPT_BYTES:
            raise UnreadableElf(Miss.TOO_LARGE)
        return KeptStrings(starts, after - (ends - starts + 1)), self._copy(starts, ends)

    def _find_ends(self, wanted: Ints) -> Ints:
        """Return where each string ends; positions are sorted."""
        ends = np.minimum(wanted + MAX_NAME_BYTES, self._size)
        for area in self._areas:
            first, last = np.searchsorted(wanted, [area.start, area.end + 1]).tolist()
            ends[first:last] = np.minimum(ends[first:last], area.end)
            open_from = first
            for start, size in area.pieces():
                here = int(np.searchsorted(wanted, start + size))
                if here <= open_from:
                    continue
                content = area.read(start, size)
                last_nul = content.rfind(b"\0")
                if last_nul < 0:
                    continue
                closed = int(np.searchsorted(wanted, start + last_nul, side="right"))
                found = _nuls_after(content, wanted[open_from:closed] - start) + start
                ends[open_from:closed] = np.minimum(ends[open_from:closed], found)
                open_from = max(open_from, closed)
        return ends

    def _copy(self, starts: Ints, ends: Ints) -> Iterator[bytes]:
        for area in self._areas:
            first, last = np.searchsorted(starts, [area.start, area.end + 1]).tolist()
            while first < last:
                start, end = int(starts[first]), int(ends[first])
                if end - start >= _PIECE_BYTES:
                    for at in range(start, end, _PIECE_BYTES):
                        yield area.read(at, min(_PIECE_BYTES, end - at))
                    yield b"\0"
                    first += 1
                    continue
                # As many as lie in one piece.
                beyond = int(np.searchsorted(ends, start + _PIECE_BYTES, side="right"))
                beyond = min(max(beyond, first + 1), last)
                piece = area.read(start, int(ends[beyond - 1]) - start)
                within = zip(
                    (starts[first:beyond] - start).tolist(),
                    (ends[first:beyond] - start).tolist(),
                    strict=True,
                )
                yield b"".join([piece[here:after] + b"\0" for here, after in within])
                first = beyond


def _nuls_after(content: bytes, positions: Ints) -> Ints:
    """Return the first NUL at or after each position, which may lie before the content."""
    text = np.frombuffer(content, dtype=np.uint8)
    found = positions.copy()
    is_open = (positions < 0) | (text[np.maximum(positions, 0)] != 0)
    if is_open.any():  # not in a hole
        nuls = np.flatnonzero(text == 0)
        found[is_open] = nuls[np.searchsorted(nuls, positions[is_open])]
    return found


class KeptStrings(NamedTuple):
    """Where strings were, sorted, and where they are among those kept."""

    old: Ints
    new: Ints

    def moved(self, positions: Words) -> Words:
        """Return the new position of each string, which may begin within another one."""
        if not len(self.old):
            return positions
        found = np.searchsorted(self.old, positions.astype(np.int64), side="right") - 1
        return (positions - self.old[found] + self.new[found]).astype(np.uint32)
