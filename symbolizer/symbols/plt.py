"""Find PLT stubs: the jumps through which a module calls functions of other modules.

They have no symbols. But every stub of every layout (lazy, IBT's .plt.sec, -z now's .plt.got, lld)
contains `jmp *slot(%rip)`: bytes ff 25 and a displacement. A relocation says which symbol's address
fills the slot. Bytes that merely look like such a jump do not lead to a relocated slot.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from symbolizer.integers import Wide
from symbolizer.location import Miss
from symbolizer.symbols.elf import SHT_DYNSYM, SHT_PROGBITS, SHT_RELA, Elf, Section, UnreadableElf

R_X86_64_GLOB_DAT, R_X86_64_JUMP_SLOT, R_X86_64_IRELATIVE = 6, 7, 37

_PLT_NAMES = (b".plt", b".plt.sec", b".plt.got", b".plt.bnd", b".iplt")
# libLLVM has 8.5 MB of relocations in all, and 477 stubs. The limits are for crafted files.
_MAX_PLT_BYTES = 4 << 20
_MAX_RELOCATIONS_BYTES = 128 << 20
_MAX_RELOCATION_SECTIONS = 1 << 10
_MAX_SLOTS = 1 << 18
_MAX_SYMBOLS_BYTES = 24 << 22
_CHUNK_BYTES = 24 << 15
_LONGEST_STUB_BYTES = 16
_ENDBR64 = b"\xf3\x0f\x1e\xfa"

_RELA = np.dtype([("r_offset", "<u8"), ("r_info", "<u8"), ("r_addend", "<u8")])
_NO_RELA = np.zeros(0, dtype=_RELA)


@dataclass(frozen=True, slots=True)
class PltStubs:
    """Half-open ranges of addresses as linked.

    Attributes:
        symbols: numbers in .dynsym, 0 for a stub of the file's own indirect function.
        resolvers: address of that function, if the symbol is 0.
    """

    starts: Wide
    ends: Wide
    symbols: npt.NDArray[np.int64]
    resolvers: Wide


def find_plt_stubs(elf: Elf) -> PltStubs:
    """Return the stubs of an x86-64 file; none for other machines.

    Raises:
        UnreadableElf: with the reason.
    """
    sections = [s for s in elf.sections if s.name in _PLT_NAMES and s.type == SHT_PROGBITS]
    decoded: list[tuple[Wide, Wide, Wide]] = []
    if elf.is_x86_64 and elf.bits == 64:
        decoded = [_decode(elf, section) for section in sections[: len(_PLT_NAMES)]]
    if not decoded:
        nothing = np.zeros(0, dtype=np.uint64)
        return PltStubs(nothing, nothing, np.zeros(0, dtype=np.int64), nothing)
    starts, ends, slots = (np.concatenate(columns) for columns in zip(*decoded, strict=True))
    return _match(starts, ends, slots, _relocations(elf))


def read_symbol_names(elf: Elf, symbols: npt.NDArray[np.int64]) -> npt.NDArray[np.uint32]:
    """Return st_name of symbols by their number in .dynsym, 0 for numbers beyond its end."""
    names = np.zeros(len(symbols), dtype=np.uint32)
    tables = [section for section in elf.sections if section.type == SHT_DYNSYM]
    for table in tables[:1]:
        first = 0
        for chunk in elf.chunks(table, _CHUNK_BYTES, _MAX_SYMBOLS_BYTES):
            st_names = np.frombuffer(chunk, "<u4", len(chunk) // 24 * 6)[::6]
            here = (symbols >= first) & (symbols < first + len(st_names))
            names[here] = st_names[symbols[here] - first]
            first += len(st_names)
    return names


def _decode(elf: Elf, section: Section) -> tuple[Wide, Wide, Wide]:
    content = elf.read(section, _MAX_PLT_BYTES)
    code = np.frombuffer(content, dtype=np.uint8)
    # A jump has 6 bytes, so it begins before the last 5.
    jumps = np.flatnonzero((code[:-5] == 0xFF) & (code[1:-4] == 0x25))
    displacements = np.zeros(len(jumps), dtype=np.int64)
    for k in range(4):
        displacements |= code[jumps + 2 + k].astype(np.int64) << (8 * k)
    displacements = displacements.astype(np.uint32).astype(np.int32).astype(np.int64)
    address = np.uint64(section.address)
    slots = address + (jumps + 6 + displacements).astype(np.uint64)
    starts = _stub_starts(code, jumps)
    ends = np.minimum(starts + _LONGEST_STUB_BYTES, len(code))
    ends[:-1] = np.minimum(ends[:-1], starts[1:])
    return address + starts.astype(np.uint64), address + ends.astype(np.uint64), slots


def _stub_starts(
    code: npt.NDArray[np.uint8], jumps: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Return where stubs begin: before the jump there may be a bnd prefix and endbr64."""
    starts = jumps.copy()
    starts -= (starts >= 1) & (code[starts - 1] == 0xF2)
    has_endbr = starts >= 4
    for k, byte in enumerate(_ENDBR64):
        has_endbr &= code[starts - 4 + k] == byte
    return starts - 4 * has_endbr


def _relocations(elf: Elf) -> npt.NDArray[np.void]:
    """Return the relocations that fill a slot with a function's address, sorted by slot."""
    parts = [_NO_RELA]
    slots = 0
    sections = [section for section in elf.sections if section.type == SHT_RELA]
    if len(sections) > _MAX_RELOCATION_SECTIONS:
        raise UnreadableElf(Miss.TOO_LARGE)
    if sum(section.size for section in sections) > _MAX_RELOCATIONS_BYTES:
        raise UnreadableElf(Miss.TOO_LARGE)
    for section in sections:
        for chunk in elf.chunks(section, _CHUNK_BYTES, _MAX_RELOCATIONS_BYTES):
            rows = np.frombuffer(chunk, _RELA, len(chunk) // _RELA.itemsize)
            types = rows["r_info"] & np.uint64(0xFFFFFFFF)
            parts.append(
                rows[
                    (types == R_X86_64_GLOB_DAT)
                    | (types == R_X86_64_JUMP_SLOT)
                    | (types == R_X86_64_IRELATIVE)
                ]
            )
            slots += len(parts[-1])
            if slots > _MAX_SLOTS:
                raise UnreadableElf(Miss.TOO_LARGE)
    rows = np.concatenate(parts)
    return rows[np.argsort(rows["r_offset"], kind="stable")]


def _match(starts: Wide, ends: Wide, slots: Wide, relocations: npt.NDArray[np.void]) -> PltStubs:
    found = np.searchsorted(relocations["r_offset"], slots)
    is_slot = found < len(relocations)
    found[~is_slot] = 0
    if len(relocations):
        is_slot &= relocations["r_offset"][found] == slots
    rows = relocations[found[is_slot]]
    symbols = (rows["r_info"] >> np.uint64(32)).astype(np.int64)
    symbols[rows["r_info"] & np.uint64(0xFFFFFFFF) == R_X86_64_IRELATIVE] = 0
    return PltStubs(starts[is_slot], ends[is_slot], symbols, rows["r_addend"])
