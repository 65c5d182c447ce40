"""Read FDE ranges: the addresses that FDEs cover, which say where functions begin and end.

This is done for every file whose symbols are read, so it has to be cheap: the linker's index in
.eh_frame_hdr leads to each FDE, of which only the head is read, one piece of the section at a time.
"""

import struct

import numpy as np
import numpy.typing as npt

from symbolizer.integers import Ints, Wide, distinct, view
from symbolizer.location import Miss, Segment
from symbolizer.symbols.elf import Elf, UnreadableElf
from symbolizer.unwind.cfi import are_code, find_eh_frame, read_eh_frame_sections
from symbolizer.unwind.cie import (
    DW_EH_PE_DATAREL,
    DW_EH_PE_PCREL,
    DW_EH_PE_SDATA4,
    DW_EH_PE_UDATA4,
    POINTER_FORMATS,
    parse_cie,
)

# Reading takes 8 MB for libLLVM's 95,000 ranges and 77 MB for a million; files with more are
# TOO_LARGE. An .eh_frame without an index has to be walked record by record, which takes 40 MB for
# 2 MB of it; a larger one is TOO_LARGE, too.
_MAX_FDE_RANGES = 1 << 20
_MAX_INDEXED_CIES = 1 << 14
_MAX_UNINDEXED_BYTES = 2 << 20
_INDEXED_CHUNK_BYTES = 1 << 20
_MAX_CIE_HEAD_BYTES = 256
_FDE_HEAD_BYTES = 24
_HEADER_BYTES = 12


def read_fde_ranges(elf: Elf) -> tuple[Wide, Wide]:
    """Return the first addresses and the ends of all FDE ranges.

    They are inside executable segments, in any order, and overlap in damaged files. They are read
    from the FDEs in .eh_frame_hdr's table, where table and FDE agree on the first address; if the
    table does not have the usual form, from all of .eh_frame.

    Raises:
        UnreadableElf: not an x86-64 file, damaged, or too large: the limits are lower than
            those of `read_eh_frame`.
    """
    if not elf.is_x86_64 or elf.bits != 64:
        raise UnreadableElf(Miss.UNSUPPORTED)
    starts, ends = _read_indexed(elf)
    if not len(starts):
        sections = [s for s in elf.sections if s.name == b".eh_frame"]
        if sum(section.size for section in sections) > _MAX_UNINDEXED_BYTES:
            raise UnreadableElf(Miss.TOO_LARGE)
        frames = read_eh_frame_sections(elf)
        return frames.starts, frames.ends
    is_code = are_code(elf, starts, ends)
    return starts[is_code], ends[is_code]


def _read_indexed(elf: Elf) -> tuple[Wide, Wide]:
    """Read the FDEs of .eh_frame_hdr's table (LSB, "Exception Frames"), chunk by chunk."""
    place, index = find_eh_frame(elf), _read_index(elf)
    if place is None or elf.eh_frame_hdr is None or not len(index):
        nothing = np.zeros(0, dtype=np.uint64)
        return nothing, nothing
    to_position = elf.eh_frame_hdr.p_vaddr - place.p_vaddr
    starts = index[:, 0].astype(np.int64)
    starts += elf.eh_frame_hdr.p_vaddr
    sizes = np.zeros(len(index), dtype=np.uint32)
    order = np.argsort(index[:, 1])
    cies = _CieEncodings(elf, place)
    for first in range(0, place.p_filesz, _INDEXED_CHUNK_BYTES):
        limits = np.array([first, first + _INDEXED_CHUNK_BYTES]) - to_position
        rows = order[slice(*np.searchsorted(index[:, 1], limits, sorter=order).tolist())]
        if len(rows):
            positions = index[rows, 1].astype(np.int64) + to_position
            sizes[rows] = _read_sizes(cies, first, positions, starts[rows].view(np.uint64))
    is_found = (sizes > 0) & (starts >= 0)
    starts = starts[is_found]
    return starts.view(np.uint64), starts.view(np.uint64) + sizes[is_found]


def _read_index(elf: Elf) -> npt.NDArray[np.int32]:
    """Return .eh_frame_hdr's table: pairs of first address and FDE, both relative to the header."""
    header = elf.eh_frame_hdr
    nothing = np.zeros((0, 2), dtype=np.int32)
    if header is None or header.p_filesz < _HEADER_BYTES:
        return nothing
    _, _, count_encoding, encoding, _, count = struct.unpack(
        "<4BiI", elf.source.read_at(header.p_offset, _HEADER_BYTES)
    )
    # All linkers write these.
    is_usual = count_encoding == DW_EH_PE_UDATA4
    is_usual &= encoding == DW_EH_PE_DATAREL | DW_EH_PE_SDATA4
    if not is_usual or count > (header.p_filesz - _HEADER_BYTES) // 8:
        return nothing
    if count > _MAX_FDE_RANGES:
        raise UnreadableElf(Miss.TOO_LARGE)
    table = elf.source.read_at(header.p_offset + _HEADER_BYTES, 8 * count)
    return np.frombuffer(table, "<i4").reshape(-1, 2)


class _CieEncodings:
    """How the addresses in FDEs are encoded, by the position of their CIE."""

    def __init__(self, elf: Elf, place: Segment) -> None:
        self.source = elf.source
        self.place = place
        self._known: dict[int, int] = {}

    def find(self, positions: Ints) -> Ints:
        """Return DW_EH_PE_* for each position, -1 if there is no usable CIE."""
        # Neighbouring FDEs mostly share a CIE.
        firsts = np.flatnonzero(np.append(True, positions[1:] != positions[:-1]))
        found = [self._find_one(position) for position in positions[firsts].tolist()]
        return np.repeat(np.array(found), np.diff(firsts, append=len(positions)))

    def _find_one(self, position: int) -> int:
        encoding = self._known.get(position)
        if encoding is None:
            encoding = self._known[position] = self._read(position)
            if len(self._known) > _MAX_INDEXED_CIES:
                raise UnreadableElf(Miss.TOO_LARGE)
        return encoding

    def _read(self, position: int) -> int:
        if not 0 <= position <= self.place.p_filesz - 8:
            return -1
        size = min(_MAX_CIE_HEAD_BYTES, self.place.p_filesz - position)
        content = self.source.read_at(self.place.p_offset + position, size)
        length, number = struct.unpack_from("<II", content)
        cie = parse_cie(content[8 : 4 + length]) if number == 0 else None
        return -1 if cie is None else cie.encoding


def _read_sizes(
    cies: _CieEncodings, first: int, positions: Ints, starts: Wide
) -> npt.NDArray[np.uint32]:
    """Read the sizes of functions from the FDEs that begin in the chunk at `first`.

    A size is 0 if there is no FDE of a function with that start.
    """
    place = cies.place
    wanted = _INDEXED_CHUNK_BYTES + _FDE_HEAD_BYTES
    chunk = cies.source.read_at(place.p_offset + first, min(wanted, place.p_filesz - first))
    content = np.frombuffer(chunk.ljust(wanted, b"\0"), np.uint8)
    words = view(content, "<u4")
    encodings = cies.find(positions + 4 - words[positions - first + 4])
    sizes = np.zeros(len(positions), dtype=np.uint32)
    for encoding in distinct(encodings[encodings >= 0]):
        chosen = np.flatnonzero(encodings == encoding)
        at = positions[chosen] - first
        form = POINTER_FORMATS[encoding & 0x0F]
        width = np.dtype(form).itemsize
        begins = view(content, form)[at + 8].astype(np.uint64)
        if encoding & 0x70 == DW_EH_PE_PCREL:
            begins += (at + 8).astype(np.uint64) + np.uint64(place.p_vaddr + first)
        lengths = view(content, form)[at + 8 + width].astype(np.uint64)
        is_good = (begins == starts[chosen]) & (words[at] >= 4 + 2 * width)
        # Sizes beyond 32 bits are invalid, and so are negative ones.
        is_good &= lengths < 1 << 32
        sizes[chosen[is_good]] = lengths[is_good]
    return sizes
