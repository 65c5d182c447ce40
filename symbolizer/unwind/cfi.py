"""Read the call frame information of an ELF file: which FDE covers an address, and its program.

The formats are those of the LSB ("Exception Frames", .eh_frame) and of DWARF 5, section 6.4
(.debug_frame). A record is a CIE, which holds what many functions have in common, or an FDE, which
holds the addresses of one function and the program that describes its frame.

Records are found by walking the section from length to length. The index in .eh_frame_hdr is not
used: it may be missing, and it omits what the linker could not parse. Damaged records are skipped,
and their functions have no rules.
"""

import re
import struct
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from symbolizer.integers import (
    PADDING_BYTES,
    Bytes,
    Flags,
    Ints,
    Wide,
    distinct,
    read_uleb,
    view,
)
from symbolizer.location import ElfAddress, FileOffset, Miss, Segment
from symbolizer.symbols.elf import (
    SHF_COMPRESSED,
    SHT_NOBITS,
    Elf,
    Section,
    UnreadableElf,
    check_size,
)
from symbolizer.unwind.cie import (
    DW_EH_PE_PCREL,
    DW_EH_PE_SDATA4,
    POINTER_FORMATS,
    WITHOUT_RULES,
    Cie,
    parse_cie,
)

# libLLVM has 5 MB in 95,000 FDEs with 2 CIEs, rustc's driver 6 MB; the largest program of one FDE
# in these, in cc1plus and in node has 20 KB. Files beyond the first four limits are TOO_LARGE; a
# longer program is not read, and its function is UNSUPPORTED.
_MAX_SECTION_BYTES = 64 << 20
_MAX_FDES = 1 << 20
_MAX_CIES = 1 << 13
_MAX_CIE_RECORDS = 1 << 17
"""Linkers keep equal CIEs once; those that do not have one for each file they were given."""
_MAX_PROGRAM_BYTES = 1 << 16
# Programs cost time by their bytes. They have 20 to 110 bytes on average in 2,000 real files, and
# 20 to 44 in the large ones. A file beyond this is TOO_LARGE.
_PROGRAM_BYTES_FREE = 1 << 20
_PROGRAM_BYTES_PER_FDE = 128
_MAX_SECTIONS = 16
_MAX_ALIGNMENT = 255
_DEBUG_FRAME_CIE = 0xFFFFFFFF
_EXTENDED_LENGTH = 0xFFFFFFFF
_PIECE_BYTES = 1 << 20
_FDES_PER_PIECE = 1 << 16
_NOT_ZERO = re.compile(rb"[^\0]")
_WORD, _EXTENDED_WORD = struct.Struct("<I"), struct.Struct("<Q")
_CHDR = struct.Struct("<IIQQ")
_ELFCOMPRESS_ZLIB = 1


@dataclass(frozen=True, slots=True)
class CallFrames:
    """The FDEs of a file by address: sorted, disjoint, inside executable segments.

    Attributes:
        content: the section, followed by PADDING_BYTES zeros.
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
    """Read all sections named .eh_frame. The result may be empty.

    If two FDEs overlap, the later start wins, as in the binary search of the C++ runtime; of
    several with one start, the longest. FDEs of functions that the linker discarded are at address
    0 or outside code, and are left out.

    Raises:
        UnreadableElf: not an x86-64 file, damaged, or too large.
    """
    return _read_parts(elf, list(_eh_frame_parts(elf)))


def read_eh_frame_sections(elf: Elf) -> CallFrames:
    """Read .eh_frame by section headers only; without these the result is empty.

    Raises:
        UnreadableElf: as above.
    """
    return _read_parts(elf, list(_eh_frame_sections(elf)))


def read_debug_frame(elf: Elf) -> CallFrames:
    """Read .debug_frame: the same information for debuggers, in files built without .eh_frame.

    Raises:
        UnreadableElf: as above.
    """
    return _read_parts(elf, list(_debug_frame_parts(elf)))


class _Part(NamedTuple):
    """One section: where its bytes are, and the address they are loaded at.

    Attributes:
        size: of the content, when it is no longer compressed.
        ends_at_zero: the size is unknown, so a length of 0 (the LSB's terminator) ends it.
    """

    place: Segment
    size: int
    is_debug_frame: bool = False
    is_compressed: bool = False
    ends_at_zero: bool = False

    @property
    def address(self) -> int:
        return 0 if self.is_debug_frame else self.place.p_vaddr

    def pieces(self, elf: Elf) -> Iterator[bytes]:
        """Return the content; of a compressed section up to its size."""
        _, offset, stored = self.place
        skipped = _CHDR.size if self.is_compressed else 0
        packer = zlib.decompressobj()
        left = self.size
        for start in range(offset + skipped, offset + stored, _PIECE_BYTES):
            piece = elf.source.read_at(start, min(_PIECE_BYTES, offset + stored - start))
            if not self.is_compressed:
                yield piece
                continue
            while piece and left > 0:
                try:
                    content = packer.decompress(piece, min(left, _PIECE_BYTES))
                except zlib.error as error:
                    raise UnreadableElf(Miss.DAMAGED) from error
                left -= len(content)
                yield content
                piece = packer.unconsumed_tail


def _part_of(section: Section, size: int, **kind: bool) -> _Part:
    place = Segment(ElfAddress(section.address), FileOffset(section.offset), section.size)
    return _Part(place, size, **kind)


def _eh_frame_parts(elf: Elf) -> list[_Part]:
    return _eh_frame_sections(elf) or _part_by_header(elf)


def _eh_frame_sections(elf: Elf) -> list[_Part]:
    sections = [s for s in elf.sections if s.name == b".eh_frame" and s.type != SHT_NOBITS]
    for section in sections[:_MAX_SECTIONS]:
        check_size(section, _MAX_SECTION_BYTES)
    return [_part_of(section, section.size) for section in sections[:_MAX_SECTIONS]]


def _part_by_header(elf: Elf) -> list[_Part]:
    """Read .eh_frame of a file without section headers."""
    place = find_eh_frame(elf)
    return [] if place is None else [_Part(place, place.p_filesz, ends_at_zero=True)]


def find_eh_frame(elf: Elf) -> Segment | None:
    """Find .eh_frame through .eh_frame_hdr, which does not say where it ends."""
    header = elf.eh_frame_hdr
    if header is None or header.p_filesz < 8:
        return None
    version, encoding, _, _, distance = struct.unpack(
        "<4Bi", elf.source.read_at(header.p_offset, 8)
    )
    # All linkers write these.
    if (version, encoding) != (1, DW_EH_PE_PCREL | DW_EH_PE_SDATA4):
        return None
    address = header.p_vaddr + 4 + distance
    for segment in elf.loaded:
        within = address - segment.p_vaddr
        if 0 <= within < segment.p_filesz:
            size = min(segment.p_filesz - within, _MAX_SECTION_BYTES)
            offset = FileOffset(segment.p_offset + within)
            return Segment(ElfAddress(address), offset, size)
    return None


def _debug_frame_parts(elf: Elf) -> list[_Part]:
    parts = []
    for section in [s for s in elf.sections if s.name == b".debug_frame"][:_MAX_SECTIONS]:
        if section.type == SHT_NOBITS:
            continue
        if section.flags & SHF_COMPRESSED:
            size = _uncompressed_size(elf, section)
            parts.append(_part_of(section, size, is_debug_frame=True, is_compressed=True))
        else:
            check_size(section, _MAX_SECTION_BYTES)
            parts.append(_part_of(section, section.size, is_debug_frame=True))
    return parts


def _uncompressed_size(elf: Elf, section: Section) -> int:
    """Return what a compressed section says its size is (gABI, "Section Compression")."""
    if section.size > _MAX_SECTION_BYTES:
        raise UnreadableElf(Miss.TOO_LARGE)
    if section.size < _CHDR.size:
        raise UnreadableElf(Miss.DAMAGED)
    kind, _, size, _ = _CHDR.unpack(elf.source.read_at(section.offset, _CHDR.size))
    if kind != _ELFCOMPRESS_ZLIB:
        raise UnreadableElf(Miss.UNSUPPORTED)
    return int(size)


def _read_parts(elf: Elf, parts: list[_Part]) -> CallFrames:
    if not elf.is_x86_64 or elf.bits != 64:
        raise UnreadableElf(Miss.UNSUPPORTED)
    size = sum(part.size for part in parts)
    if size > _MAX_SECTION_BYTES:  # before anything is read
        raise UnreadableElf(Miss.TOO_LARGE)
    content = np.zeros(size + PADDING_BYTES, dtype=np.uint8)
    cies = _CieTable(content)
    found = [_NO_FDES]
    first = 0
    for part in parts:
        end = first
        for piece in part.pieces(elf):
            content[end : end + len(piece)] = np.frombuffer(piece, np.uint8)
            end += len(piece)
        found += _read_fdes(cies, part, first, end)
        first += part.size
    fdes = _Fdes.join(found)
    found.clear()
    lengths = fdes.program_ends - fdes.programs
    if int(lengths.sum()) > _PROGRAM_BYTES_FREE + _PROGRAM_BYTES_PER_FDE * len(lengths):
        raise UnreadableElf(Miss.TOO_LARGE)
    is_long = lengths > _MAX_PROGRAM_BYTES
    fdes.programs[is_long] = fdes.program_ends[is_long]
    fdes.cie_numbers[is_long] = 0
    fdes = _make_disjoint(fdes.take(are_code(elf, fdes.starts, fdes.ends)))
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


def _read_fdes(cies: "_CieTable", part: _Part, first: int, end: int) -> Iterator[_Fdes]:
    """Decode the FDEs of a part that lies between `first` and `end` in the content."""
    content = cies.content
    words = view(content, "<u4")
    positions = _find_records(content, first, end, part.ends_at_zero)
    is_cie = words[positions + 4] == (_DEBUG_FRAME_CIE if part.is_debug_frame else 0)
    cies.add(positions[is_cie])
    fdes = positions[~is_cie]
    loaded_at = np.uint64((part.address - first) % (1 << 64))
    for start in range(0, len(fdes), _FDES_PER_PIECE):
        here = fdes[start : start + _FDES_PER_PIECE]
        ends = here + 4 + words[here].astype(np.int64)
        distances = words[here + 4].astype(np.int64)
        numbers = cies.find(first + distances if part.is_debug_frame else here + 4 - distances)
        # CIEs differ in many ways, but few matter for how their FDEs are read.
        kinds = np.array([(cie.encoding, cie.has_augmentation_data) for cie in cies.cies])
        kinds = kinds[:, 0] << 1 | kinds[:, 1]
        for kind in distinct(kinds):
            chosen = np.flatnonzero((numbers >= 0) & (kinds[numbers] == kind))
            if len(chosen):
                cie = cies.cies[int(numbers[chosen[0]])]
                rules = np.array(cies.rules)[numbers[chosen]]
                at = here[chosen] + 8
                yield _decode_fdes(content, at, ends[chosen], cie, loaded_at=loaded_at, rules=rules)


def _find_records(content: Bytes, first: int, end: int, ends_at_zero: bool) -> Ints:
    """Return the positions of the complete records between `first` and `end`.

    For the C++ runtime a length of 0 ends the section, but linkers leave such terminators in the
    middle when they join files (crtend.o), so the walk continues after them.
    """
    view_of_all = content.data
    unpack = _WORD.unpack_from
    positions = array("q")
    position = first
    while position + 8 <= end:
        (length,) = unpack(view_of_all, position)
        if length == 0:
            found = None if ends_at_zero else _NOT_ZERO.search(view_of_all, position, end)
            if found is None:
                break
            position += (found.start() - position) // 4 * 4
        elif length == _EXTENDED_LENGTH:  # not written by any known linker: skip
            position += 12 + _EXTENDED_WORD.unpack_from(view_of_all, position + 4)[0]
        else:
            positions.append(position)
            position += 4 + length
            if len(positions) > _MAX_FDES:
                raise UnreadableElf(Miss.TOO_LARGE)
    if positions and position > end and position - 4 == positions[-1] + length:
        positions.pop()  # cut short
    return np.frombuffer(positions, dtype=np.int64) if positions else np.zeros(0, dtype=np.int64)


def _decode_fdes(
    content: Bytes, at: Ints, fde_ends: Ints, cie: Cie, *, loaded_at: np.uint64, rules: Ints
) -> _Fdes:
    """Decode FDEs, given the positions after their ids, which are to be read as those of `cie` are.

    `rules` become their `cie_numbers`. `loaded_at` is added to a position to get the address it is
    loaded at. An address whose bytes are zero is the null pointer, even if it would be relative.
    """
    form = POINTER_FORMATS[cie.encoding & 0x0F]
    width = np.dtype(form).itemsize
    starts = view(content, form)[at].astype(np.uint64)
    if cie.encoding & 0x70 == DW_EH_PE_PCREL:
        starts[starts != 0] += (at.astype(np.uint64) + loaded_at)[starts != 0]
    sizes = view(content, form)[at + width].astype(np.uint64)
    programs = at + 2 * width
    is_good = programs <= fde_ends
    if cie.has_augmentation_data:
        data_sizes, widths = read_uleb(content, np.minimum(programs, len(content) - PADDING_BYTES))
        programs = programs + widths + data_sizes
        is_good &= programs <= fde_ends
    # Sizes beyond 32 bits are invalid, and so are ranges beyond the end of the address space.
    is_good &= (starts != 0) & (sizes != 0) & (sizes < 1 << 32) & (starts < 1 << 63)
    return _Fdes(starts, starts + sizes, programs, fde_ends, rules).take(is_good)


def are_code(elf: Elf, starts: Wide, ends: Wide) -> Flags:
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


_NOT_READ = -2


class _CieTable:
    """The CIEs in use. Equal ones, which linkers leave when they join files, are kept once.

    Attributes:
        cies: how to read FDEs; number 0 is WITHOUT_RULES.
        rules: per CIE, the number of the CIE whose rules apply: itself or 0.
    """

    def __init__(self, content: Bytes) -> None:
        self.content = content
        self.cies = [WITHOUT_RULES]
        self.rules = [0]
        self._numbers: dict[bytes, int] = {}
        self._read = 0
        self._positions = np.zeros(0, dtype=np.int64)
        self._by_position = np.zeros(0, dtype=np.int64)

    def add(self, positions: Ints) -> None:
        """Set where CIEs are; each is read when it is first wanted."""
        self._positions = positions
        self._by_position = np.full(len(positions), _NOT_READ, dtype=np.int64)

    def find(self, wanted: Ints) -> Ints:
        """Return the number of the CIE at each wanted position, -1 if there is no usable one."""
        if not len(self._positions):
            return np.full(len(wanted), -1, dtype=np.int64)
        places = np.minimum(np.searchsorted(self._positions, wanted), len(self._positions) - 1)
        is_found = self._positions[places] == wanted
        found_at = places[is_found]
        unread = set(found_at[self._by_position[found_at] == _NOT_READ].tolist())
        for place in sorted(unread):
            self._read += 1
            if self._read > _MAX_CIE_RECORDS:
                raise UnreadableElf(Miss.TOO_LARGE)
            position = int(self._positions[place])
            (length,) = _WORD.unpack_from(self.content.data, position)
            self._by_position[place] = self._add(position, position + 4 + length)
        found: Ints = np.where(is_found, self._by_position[places], -1)
        return found

    def _add(self, position: int, end: int) -> int:
        content = self.content[position + 8 : end].tobytes()
        number = self._numbers.get(content)
        if number is None:
            number = -1
            cie = parse_cie(content)
            if cie is not None:
                has_rules = cie.program_end - cie.program <= _MAX_PROGRAM_BYTES
                has_rules &= 0 < cie.code_alignment <= _MAX_ALIGNMENT
                has_rules &= -_MAX_ALIGNMENT <= cie.data_alignment <= _MAX_ALIGNMENT
                number = len(self.cies)
                start = position + 8
                if has_rules:
                    cie = cie._replace(
                        program=start + cie.program, program_end=start + cie.program_end
                    )
                else:  # its alignments may be larger than any column
                    cie = WITHOUT_RULES._replace(
                        encoding=cie.encoding, has_augmentation_data=cie.has_augmentation_data
                    )
                self.cies.append(cie)
                self.rules.append(number if has_rules else 0)
            self._numbers[content] = number
            if len(self._numbers) > _MAX_CIES:
                raise UnreadableElf(Miss.TOO_LARGE)
        return number
