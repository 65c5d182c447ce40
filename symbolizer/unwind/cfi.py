"""Call frame information of an ELF file: which addresses have unwind rules, and in which program.

The formats are those of the LSB ("Exception Frames", .eh_frame) and of DWARF 5, section 6.4
(.debug_frame). A record is a CIE, which holds what many functions have in common, or an FDE, which
holds the addresses of one function and the program that describes its frame.

Records are found by walking the section from length to length, which needs no .eh_frame_hdr and
believes none: that index is the linker's second copy, may be missing, and leaves out what the
linker could not parse. What is damaged costs the records it damages: they have no rules.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from symbolizer.location import ElfAddress, FileOffset, Miss, Segment
from symbolizer.symbols.elf import SHF_COMPRESSED, SHT_NOBITS, Elf, Section, UnreadableElf

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]
Wide = npt.NDArray[np.uint64]
Flags = npt.NDArray[np.bool_]

# libLLVM has 5 MB in 95,000 FDEs, rustc's driver 6 MB; the largest program of one FDE in either, in
# cc1plus and in node has 20 KB. What is beyond the first three limits is TOO_LARGE; a longer
# program is left unread, and its function is UNSUPPORTED.
_MAX_SECTION_BYTES = 64 << 20
_MAX_FDES = 1 << 21
_MAX_CIES = 1 << 16
MAX_PROGRAM_BYTES = 1 << 17
_MAX_SECTIONS = 16

# Extents are read inside the sampling process, which needs 8 MB meanwhile for libLLVM's 95,000 and
# 77 MB for a million; what is beyond is TOO_LARGE. So is an .eh_frame beyond that size without an
# index: it has to be walked record by record, for which 2 MB of it need 40.
_MAX_FDE_RANGES = 1 << 20
_MAX_INDEXED_CIES = 1 << 14
_MAX_UNINDEXED_BYTES = 2 << 20
_INDEXED_CHUNK_BYTES = 1 << 20
_MAX_CIE_HEAD_BYTES = 256
_FDE_HEAD_BYTES = 24
_HEADER_BYTES = 12

PADDING_BYTES = 64
"""Zeros behind the content, so that an operand may be read before it is known to be there."""

RETURN_ADDRESS = 16
_MAX_ALIGNMENT = 255
MAX_LEB_BYTES = 10

_DW_EH_PE_ABSPTR, _DW_EH_PE_PCREL, _DW_EH_PE_DATAREL, _DW_EH_PE_OMIT = 0x00, 0x10, 0x30, 0xFF
_DW_EH_PE_UDATA4, _DW_EH_PE_SDATA4 = 0x03, 0x0B
_POINTER_FORMATS = {
    0x00: "<u8",
    0x02: "<u2",
    0x03: "<u4",
    0x04: "<u8",
    0x0A: "<i2",
    0x0B: "<i4",
    0x0C: "<i8",
}
_DEBUG_FRAME_CIE = 0xFFFFFFFF
_EXTENDED_LENGTH = 0xFFFFFFFF
_NOT_ZERO = re.compile(rb"[^\0]")
_WORD, _EXTENDED_WORD = struct.Struct("<I"), struct.Struct("<Q")
_CHDR = struct.Struct("<IIQQ")
_ELFCOMPRESS_ZLIB = 1


class Cie(NamedTuple):
    """What FDEs have in common.

    Attributes:
        program: position of the initial instructions in `CallFrames.content`.
        encoding: DW_EH_PE_* of the addresses in its FDEs.
        has_augmentation_data: so have its FDEs, between their addresses and their program.
        is_signal_frame: the frame's pc is where the interrupted code stopped, not a return address.
    """

    program: int = 0
    program_end: int = 0
    encoding: int = _DW_EH_PE_ABSPTR
    has_augmentation_data: bool = False
    is_signal_frame: bool = False
    code_alignment: int = 1
    data_alignment: int = -8


WITHOUT_RULES = Cie()
"""Stands for a CIE whose rules are beyond us. Its initial instructions define nothing."""


@dataclass(frozen=True, slots=True)
class CallFrames:
    """The FDEs of a file by address: sorted, disjoint, inside executable segments.

    Attributes:
        content: the section, with PADDING_BYTES behind it.
        cies: number 0 is WITHOUT_RULES.
        starts: first address of each FDE; `ends` are exclusive.
        programs: where each FDE's instructions begin in `content`; `program_ends` are exclusive.
        cie_numbers: index into `cies` of each FDE.
    """

    content: Bytes
    cies: tuple[Cie, ...]
    starts: Wide
    ends: Wide
    programs: Ints
    program_ends: Ints
    cie_numbers: Ints

    def __len__(self) -> int:
        return len(self.starts)


def read_eh_frame(elf: Elf) -> CallFrames:
    """Read .eh_frame, all of it if there are several. May be empty.

    Where two FDEs overlap the later start wins, as in the binary search of the C++ runtime; of
    several with one start the longest. FDEs of functions that the linker has thrown away lie at
    address 0 or outside of code, and are left out.

    Raises:
        UnreadableElf: not an x86-64 file, or damaged or too large beyond use.
    """
    return _read_parts(elf, list(_eh_frame_parts(elf)))


def read_debug_frame(elf: Elf) -> CallFrames:
    """Read .debug_frame: the same for debuggers, in files built without tables for exceptions.

    Raises:
        UnreadableElf: as above.
    """
    return _read_parts(elf, list(_debug_frame_parts(elf)))


def read_fde_ranges(elf: Elf) -> tuple[Wide, Wide]:
    """Return the first addresses and the ends of functions that have an FDE, whatever its program.

    They lie inside executable segments, in any order, and overlap in damaged files. The FDEs are
    those in .eh_frame_hdr's table if it has the usual form, as far as each says of itself what the
    table says of it; else all of .eh_frame.

    Raises:
        UnreadableElf: as above, with lower limits.
    """
    if not elf.is_x86_64 or elf.bits != 64:
        raise UnreadableElf(Miss.UNSUPPORTED)
    starts, ends = _read_indexed(elf)
    if not len(starts):
        sections = [s for s in elf.sections if s.name == b".eh_frame"]
        if sum(section.size for section in sections) > _MAX_UNINDEXED_BYTES:
            raise UnreadableElf(Miss.TOO_LARGE)
        frames = _read_parts(elf, list(_eh_frame_sections(elf)))
        return frames.starts, frames.ends
    is_code = _are_code(elf, starts, ends)
    return starts[is_code], ends[is_code]


def _read_indexed(elf: Elf) -> tuple[Wide, Wide]:
    """Read the FDEs in .eh_frame_hdr's table (LSB, "Exception Frames"), chunk by chunk."""
    place, index = _find_behind_header(elf), _read_index(elf)
    if place is None or elf.eh_frame_hdr is None or not len(index):
        return _NO_FDES.starts, _NO_FDES.ends
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
    """Return pairs of first address and FDE, both counted from .eh_frame_hdr on."""
    header = elf.eh_frame_hdr
    nothing = np.zeros((0, 2), dtype=np.int32)
    if header is None or header.p_filesz < _HEADER_BYTES:
        return nothing
    _, _, count_encoding, encoding, _, count = struct.unpack(
        "<4BiI", elf.source.read_at(header.p_offset, _HEADER_BYTES)
    )
    # What every linker writes.
    is_usual = count_encoding == _DW_EH_PE_UDATA4
    is_usual &= encoding == _DW_EH_PE_DATAREL | _DW_EH_PE_SDATA4
    if not is_usual or count > (header.p_filesz - _HEADER_BYTES) // 8:
        return nothing
    if count > _MAX_FDE_RANGES:
        raise UnreadableElf(Miss.TOO_LARGE)
    table = elf.source.read_at(header.p_offset + _HEADER_BYTES, 8 * count)
    return np.frombuffer(table, "<i4").reshape(-1, 2)


class _CieEncodings:
    """How FDEs of an .eh_frame have their addresses, by the position of their CIE."""

    def __init__(self, elf: Elf, place: Segment) -> None:
        self.source = elf.source
        self.place = place
        self._known: dict[int, int] = {}

    def find(self, positions: Ints) -> Ints:
        """Return DW_EH_PE_* for each position, -1 where there is no CIE of use."""
        # Neighbours mostly share theirs.
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
        cie = _parse_cie(content[8 : 4 + length]) if number == 0 else None
        return -1 if cie is None else cie.encoding


def _read_sizes(
    cies: _CieEncodings, first: int, positions: Ints, starts: Wide
) -> npt.NDArray[np.uint32]:
    """Read the sizes of functions from FDEs that begin in the chunk at `first`.

    It is 0 where there is no FDE of a function with that start.
    """
    place = cies.place
    wanted = _INDEXED_CHUNK_BYTES + _FDE_HEAD_BYTES
    chunk = cies.source.read_at(place.p_offset + first, min(wanted, place.p_filesz - first))
    content = np.frombuffer(chunk.ljust(wanted, b"\0"), np.uint8)
    words = view(content, "<u4")
    encodings = cies.find(positions + 4 - words[positions - first + 4])
    sizes = np.zeros(len(positions), dtype=np.uint32)
    for encoding in _distinct(encodings[encodings >= 0]):
        chosen = np.flatnonzero(encodings == encoding)
        at = positions[chosen] - first
        form = _POINTER_FORMATS[encoding & 0x0F]
        width = np.dtype(form).itemsize
        begins = view(content, form)[at + 8].astype(np.uint64)
        if encoding & 0x70 == _DW_EH_PE_PCREL:
            begins += (at + 8).astype(np.uint64) + np.uint64(place.p_vaddr + first)
        lengths = view(content, form)[at + 8 + width].astype(np.uint64)
        is_good = (begins == starts[chosen]) & (words[at] >= 4 + 2 * width)
        # Beyond 32 bits it is none, which a negative one is too.
        is_good &= lengths < 1 << 32
        sizes[chosen[is_good]] = lengths[is_good]
    return sizes


class _Part(NamedTuple):
    """One contribution: its bytes and where they are loaded."""

    content: bytes
    address: int
    is_debug_frame: bool = False
    ends_at_zero: bool = False
    """Its size is not known, so the terminator of the LSB, a length of 0, must be believed."""


def _eh_frame_parts(elf: Elf) -> Iterator[_Part]:
    parts = list(_eh_frame_sections(elf))
    yield from parts or _part_behind_header(elf)


def _eh_frame_sections(elf: Elf) -> Iterator[_Part]:
    sections = [s for s in elf.sections if s.name == b".eh_frame" and s.type != SHT_NOBITS]
    for section in sections[:_MAX_SECTIONS]:
        yield _Part(elf.read(section, _MAX_SECTION_BYTES), section.address)


def _part_behind_header(elf: Elf) -> Iterator[_Part]:
    """Read .eh_frame in a file without section headers."""
    place = _find_behind_header(elf)
    if place is not None:
        content = elf.source.read_at(place.p_offset, place.p_filesz)
        yield _Part(content, place.p_vaddr, ends_at_zero=True)


def _find_behind_header(elf: Elf) -> Segment | None:
    """Find .eh_frame through its .eh_frame_hdr; where it ends is not said there."""
    header = elf.eh_frame_hdr
    if header is None or header.p_filesz < 8:
        return None
    version, encoding, _, _, distance = struct.unpack(
        "<4Bi", elf.source.read_at(header.p_offset, 8)
    )
    # What every linker writes.
    if (version, encoding) != (1, _DW_EH_PE_PCREL | _DW_EH_PE_SDATA4):
        return None
    address = header.p_vaddr + 4 + distance
    for segment in elf.loaded:
        within = address - segment.p_vaddr
        if 0 <= within < segment.p_filesz:
            size = min(segment.p_filesz - within, _MAX_SECTION_BYTES)
            offset = FileOffset(segment.p_offset + within)
            return Segment(ElfAddress(address), offset, size)
    return None


def _debug_frame_parts(elf: Elf) -> Iterator[_Part]:
    for section in [s for s in elf.sections if s.name == b".debug_frame"][:_MAX_SECTIONS]:
        if section.type == SHT_NOBITS:
            continue
        if section.flags & SHF_COMPRESSED:
            yield _Part(_decompress(elf, section), 0, is_debug_frame=True)
        else:
            yield _Part(elf.read(section, _MAX_SECTION_BYTES), 0, is_debug_frame=True)


def _decompress(elf: Elf, section: Section) -> bytes:
    """Expand a compressed section (gABI, "Section Compression"), never beyond the limit."""
    if section.size > _MAX_SECTION_BYTES:
        raise UnreadableElf(Miss.TOO_LARGE)
    content = elf.source.read_at(section.offset, section.size)
    if len(content) < _CHDR.size:
        raise UnreadableElf(Miss.DAMAGED)
    kind, _, size, _ = _CHDR.unpack_from(content)
    if kind != _ELFCOMPRESS_ZLIB:
        raise UnreadableElf(Miss.UNSUPPORTED)
    if size > _MAX_SECTION_BYTES:
        raise UnreadableElf(Miss.TOO_LARGE)
    try:
        return zlib.decompressobj().decompress(memoryview(content)[_CHDR.size :], max(size, 1))
    except zlib.error as error:
        raise UnreadableElf(Miss.DAMAGED) from error


def _read_parts(elf: Elf, parts: list[_Part]) -> CallFrames:
    if not elf.is_x86_64 or elf.bits != 64:
        raise UnreadableElf(Miss.UNSUPPORTED)
    size = sum(len(part.content) for part in parts)
    if size > _MAX_SECTION_BYTES:
        raise UnreadableElf(Miss.TOO_LARGE)
    content = np.zeros(size + PADDING_BYTES, dtype=np.uint8)
    cies = _CieTable(content)
    found = [_NO_FDES]
    first = 0
    while parts:
        part = parts.pop(0)
        content[first : first + len(part.content)] = np.frombuffer(part.content, np.uint8)
        found.append(_read_fdes(cies, part, first))
        first += len(part.content)
    fdes = _Fdes.join(found)
    is_long = fdes.program_ends - fdes.programs > MAX_PROGRAM_BYTES
    fdes.programs[is_long] = fdes.program_ends[is_long]
    fdes.cie_numbers[is_long] = 0
    fdes = _make_disjoint(fdes.take(_are_code(elf, fdes.starts, fdes.ends)))
    return CallFrames(content, tuple(cies.cies), *fdes)


class _Fdes(NamedTuple):
    starts: Wide
    ends: Wide
    programs: Ints
    program_ends: Ints
    cie_numbers: Ints

    @classmethod
    def join(cls, parts: list["_Fdes"]) -> "_Fdes":
        return cls(
            np.concatenate([part.starts for part in parts]),
            np.concatenate([part.ends for part in parts]),
            np.concatenate([part.programs for part in parts]),
            np.concatenate([part.program_ends for part in parts]),
            np.concatenate([part.cie_numbers for part in parts]),
        )

    def take(self, chosen: Ints | Flags) -> "_Fdes":
        return _Fdes(
            self.starts[chosen],
            self.ends[chosen],
            self.programs[chosen],
            self.program_ends[chosen],
            self.cie_numbers[chosen],
        )


_NO_FDES = _Fdes(
    np.zeros(0, dtype=np.uint64),
    np.zeros(0, dtype=np.uint64),
    np.zeros(0, dtype=np.int64),
    np.zeros(0, dtype=np.int64),
    np.zeros(0, dtype=np.int64),
)


def _read_fdes(cies: "_CieTable", part: _Part, first: int) -> _Fdes:
    """Decode the FDEs of a part that stands at `first` in the content, in its order."""
    content = cies.content
    positions = _find_records(content, first, first + len(part.content), part.ends_at_zero)
    lengths = view(content, "<u4")[positions].astype(np.int64)
    ids = view(content, "<u4")[positions + 4].astype(np.int64)
    ends = positions + 4 + lengths
    is_cie = ids == (_DEBUG_FRAME_CIE if part.is_debug_frame else 0)
    fdes, fde_ends, distances = positions[~is_cie], ends[~is_cie], ids[~is_cie]
    wanted = first + distances if part.is_debug_frame else fdes + 4 - distances
    numbers = cies.find(wanted, positions[is_cie], ends[is_cie])
    loaded_at = np.uint64((part.address - first) % (1 << 64))
    groups = [_NO_FDES]
    for number in _distinct(numbers[numbers >= 0]):
        chosen = numbers == number
        group = _decode_fdes(
            content, fdes[chosen] + 8, fde_ends[chosen], cies.cies[number], loaded_at
        )
        group.cie_numbers[:] = cies.rules[number]
        groups.append(group)
    return _Fdes.join(groups)


def _find_records(content: Bytes, first: int, end: int, ends_at_zero: bool) -> Ints:
    """Return the positions of the records that lie whole between `first` and `end`.

    A length of 0 ends the section for the C++ runtime, but linkers leave such terminators in the
    middle when they join files (crtend.o), so the walk goes on behind them.
    """
    view_of_all = content.data
    unpack = _WORD.unpack_from
    positions: list[int] = []
    position = first
    while position + 8 <= end:
        (length,) = unpack(view_of_all, position)
        if length == 0:
            found = None if ends_at_zero else _NOT_ZERO.search(view_of_all, position, end)
            if found is None:
                break
            position += (found.start() - position) // 4 * 4
        elif length == _EXTENDED_LENGTH:  # nobody writes those; skipped
            position += 12 + _EXTENDED_WORD.unpack_from(view_of_all, position + 4)[0]
        else:
            positions.append(position)
            position += 4 + length
            if len(positions) > _MAX_FDES:
                raise UnreadableElf(Miss.TOO_LARGE)
    if positions and position > end and position - 4 == positions[-1] + length:
        positions.pop()  # cut short
    return np.array(positions, dtype=np.int64)


def _decode_fdes(content: Bytes, at: Ints, fde_ends: Ints, cie: Cie, loaded_at: np.uint64) -> _Fdes:
    """Decode FDEs of one CIE from behind their ids on. Their `cie_numbers` are left at 0.

    `loaded_at` leads from positions to the addresses they are loaded at. An address whose bytes are
    zero is the null pointer, whatever it would be relative to.
    """
    form = _POINTER_FORMATS[cie.encoding & 0x0F]
    width = np.dtype(form).itemsize
    starts = view(content, form)[at].astype(np.uint64)
    if cie.encoding & 0x70 == _DW_EH_PE_PCREL:
        starts[starts != 0] += (at.astype(np.uint64) + loaded_at)[starts != 0]
    sizes = view(content, form)[at + width].astype(np.uint64)
    programs = at + 2 * width
    is_good = programs <= fde_ends
    if cie.has_augmentation_data:
        data_sizes, widths = read_uleb(content, np.minimum(programs, len(content) - PADDING_BYTES))
        programs = programs + widths + data_sizes
        is_good &= programs <= fde_ends
    # A size beyond 32 bits is none, and so is one that runs over the end of the address space.
    is_good &= (starts != 0) & (sizes != 0) & (sizes < 1 << 32) & (starts < 1 << 63)
    numbers = np.zeros(len(at), dtype=np.int64)
    return _Fdes(starts, starts + sizes, programs, fde_ends, numbers).take(is_good)


def _are_code(elf: Elf, starts: Wide, ends: Wide) -> Flags:
    is_code = np.zeros(len(starts), dtype=np.bool_)
    for p_vaddr, _, p_filesz in elf.segments:
        end = np.uint64(p_vaddr + p_filesz)
        is_code |= (starts >= np.uint64(p_vaddr)) & (ends <= end)
    return is_code


def _make_disjoint(fdes: _Fdes) -> _Fdes:
    if not len(fdes.starts):
        return fdes
    if (fdes.starts[1:] < fdes.starts[:-1]).any():
        fdes = fdes.take(np.argsort(fdes.starts, kind="stable"))
    if (fdes.starts[1:] == fdes.starts[:-1]).any():
        fdes = fdes.take(np.lexsort((~(fdes.ends - fdes.starts), fdes.starts)))
        fdes = fdes.take(np.append(True, fdes.starts[1:] != fdes.starts[:-1]))
    next_starts = np.append(fdes.starts[1:], np.uint64((1 << 64) - 1))
    return fdes._replace(ends=np.minimum(fdes.ends, next_starts))


class _CieTable:
    """The CIEs in use, each different one once: linkers that join files leave equal ones behind.

    Attributes:
        cies: how to read FDEs; number 0 is WITHOUT_RULES.
        rules: per CIE, the number of the one whose rules hold: itself or 0.
    """

    def __init__(self, content: Bytes) -> None:
        self.content = content
        self.cies = [WITHOUT_RULES]
        self.rules = [0]
        self._numbers: dict[bytes, int] = {}

    def find(self, wanted: Ints, positions: Ints, ends: Ints) -> Ints:
        """Return the number of the CIE at each wanted position, -1 where there is none of use."""
        if not len(positions):
            return np.full(len(wanted), -1, dtype=np.int64)
        places = np.minimum(np.searchsorted(positions, wanted), len(positions) - 1)
        is_found = positions[places] == wanted
        numbers = np.full(len(positions), -1, dtype=np.int64)
        for place in _distinct(places[is_found]):
            numbers[place] = self._add(int(positions[place]), int(ends[place]))
        found: Ints = np.where(is_found, numbers[places], -1)
        return found

    def _add(self, position: int, end: int) -> int:
        content = self.content[position + 8 : end].tobytes()
        number = self._numbers.get(content)
        if number is None:
            number = -1
            cie = _parse_cie(content)
            if cie is not None:
                has_rules = cie.program_end - cie.program <= MAX_PROGRAM_BYTES
                has_rules &= 0 < cie.code_alignment <= _MAX_ALIGNMENT
                has_rules &= -_MAX_ALIGNMENT <= cie.data_alignment <= _MAX_ALIGNMENT
                number = len(self.cies)
                start = position + 8
                self.cies.append(
                    cie._replace(program=start + cie.program, program_end=start + cie.program_end)
                )
                self.rules.append(number if has_rules else 0)
            self._numbers[content] = number
            if len(self._numbers) > _MAX_CIES:
                raise UnreadableElf(Miss.TOO_LARGE)
        return number


def _parse_cie(content: bytes) -> Cie | None:
    """Parse what follows a CIE's id; positions count from there. None if FDEs cannot be read."""
    cursor = _Cursor(content)
    try:
        cie = _read_augmentation(cursor, *_read_cie_header(cursor))
    except (IndexError, ValueError):
        return None
    is_known = cie.encoding & 0x0F in _POINTER_FORMATS
    is_known &= cie.encoding & 0xF0 in (_DW_EH_PE_ABSPTR, _DW_EH_PE_PCREL)
    if not is_known or cursor.position > len(content):
        return None
    return cie._replace(program=cursor.position, program_end=len(content))


def _read_cie_header(cursor: "_Cursor") -> tuple[Cie, bytes]:
    """Return what stands before the augmentation's data, and the augmentation."""
    version = cursor.byte()
    augmentation = cursor.string()
    if version not in (1, 3, 4):
        raise ValueError("a version we do not know")
    if version == 4 and (cursor.byte(), cursor.byte()) != (8, 0):
        raise ValueError("addresses that are not of 8 bytes, or segments")
    code_alignment, data_alignment = cursor.uleb(), cursor.sleb()
    return_register = cursor.byte() if version == 1 else cursor.uleb()
    # An alignment of 0 is refused later on: rules for another return address are none for us.
    code_alignment *= return_register == RETURN_ADDRESS
    return Cie(code_alignment=code_alignment, data_alignment=data_alignment), augmentation


def _read_augmentation(cursor: "_Cursor", cie: Cie, augmentation: bytes) -> Cie:
    """Read what the letters announce, and skip what is left. Letters: LSB, "CIE"; S and B: GNU."""
    if not augmentation:
        return cie
    if augmentation[:1] != b"z":  # "eh" of compilers before 2000, or newer than us
        raise ValueError("an augmentation of unknown size")
    size = cursor.uleb()
    end = cursor.position + size
    cie = cie._replace(has_augmentation_data=True)
    for letter in augmentation[1:].decode("latin-1"):
        if letter == "R":
            cie = cie._replace(encoding=cursor.byte())
        elif letter == "L":
            cursor.byte()
        elif letter == "P":
            cursor.skip_pointer(cursor.byte())
        elif letter == "S":
            cie = cie._replace(is_signal_frame=True)
        elif letter != "B":  # B is about keys of aarch64
            raise ValueError("an augmentation that we do not know")
    cursor.position = end
    return cie


class _Cursor:
    """Reads a record byte by byte; an IndexError beyond its end."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.position = 0

    def byte(self) -> int:
        self.position += 1
        return self.content[self.position - 1]

    def string(self) -> bytes:
        end = self.content.index(b"\0", self.position)
        start, self.position = self.position, end + 1
        return self.content[start:end]

    def uleb(self) -> int:
        return self._leb()[0]

    def sleb(self) -> int:
        value, bits = self._leb()
        return value - (1 << bits) if value >> (bits - 1) else value

    def skip_pointer(self, encoding: int) -> None:
        if encoding != _DW_EH_PE_OMIT:
            form = _POINTER_FORMATS.get(encoding & 0x0F)
            if form is None:
                raise ValueError("a pointer of unknown width")
            self.position += np.dtype(form).itemsize

    def _leb(self) -> tuple[int, int]:
        value = bits = 0
        for _ in range(MAX_LEB_BYTES):
            byte = self.byte()
            value |= (byte & 0x7F) << bits
            bits += 7
            if byte < 0x80:
                return value, bits
        raise ValueError("a number of more than 64 bits")


def _distinct(numbers: Ints) -> list[int]:
    distinct: list[int] = np.flatnonzero(np.bincount(numbers)).tolist()
    return distinct


def view(content: Bytes, form: str) -> npt.NDArray[np.int64]:
    """See a number of the format `form` at every position; those at the end are missing."""
    dtype = np.dtype(form)
    return np.ndarray((len(content) - dtype.itemsize + 1,), dtype, content, strides=(1,))


# A number that is longer counts as this large, which is no offset of any frame. So sums and
# products stay within 64 bits.
_TOO_LARGE = 1 << 40
_LEB_BYTES_READ = 8


def read_uleb(content: Bytes, at: Ints) -> tuple[Ints, Ints]:
    """Return numbers and their widths in bytes at positions that lie before the padding."""
    values, widths = _read_leb(content, at)
    return np.minimum(values, _TOO_LARGE), widths


def read_sleb(content: Bytes, at: Ints) -> tuple[Ints, Ints]:
    values, widths = _read_leb(content, at)
    bits = 7 * np.minimum(widths, _LEB_BYTES_READ)
    values -= (values >> (bits - 1)) << bits
    values[widths > _LEB_BYTES_READ] = _TOO_LARGE
    return np.clip(values, -_TOO_LARGE, _TOO_LARGE), widths


def _read_leb(content: Bytes, at: Ints) -> tuple[Ints, Ints]:
    byte = content[at]
    values = (byte & 0x7F).astype(np.int64)
    widths = np.ones(len(at), dtype=np.int64)
    longer = np.flatnonzero(byte >= 0x80)
    for k in range(1, MAX_LEB_BYTES):
        if not len(longer):
            break
        byte = content[np.minimum(at[longer] + k, len(content) - 1)]
        if k < _LEB_BYTES_READ:
            values[longer] |= (byte & 0x7F).astype(np.int64) << (7 * k)
        else:
            values[longer] = _TOO_LARGE
        widths[longer] += 1
        longer = longer[byte >= 0x80]
    return values, widths
