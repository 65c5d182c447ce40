"""Decode call frame programs: where their instructions begin, and the traits of each opcode.

Programs (DWARF 5, section 6.4.2) are concatenated in one array and decoded all at once: for every
byte, compute how long an instruction would be if one began there; then follow the instructions
through each program.
"""

from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np

from symbolizer.integers import MAX_LEB_BYTES, PADDING_BYTES, Bytes, Flags, Ints, read_uleb, view
from symbolizer.unwind.cie import RBP, RBX, RETURN_ADDRESS


class Programs(NamedTuple):
    """Programs, concatenated, each followed by one `END`.

    Attributes:
        code: the bytes, followed by padding.
        starts: where each program begins; `ends` are the positions of `END`.
        code_alignments: one per program, as are `data_alignments`.
        register: the one whose saving is followed, RBP or RBX.
    """

    code: Bytes
    starts: Ints
    ends: Ints
    code_alignments: Ints
    data_alignments: Ints
    register: int

    @classmethod
    def gather(
        cls,
        content: Bytes,
        starts: Ints,
        ends: Ints,
        code_alignments: Ints,
        data_alignments: Ints,
        *,
        register: int,
    ) -> "Programs":
        """Copy the programs between `starts` and `ends` out of `content`."""
        sizes = ends - starts + 1
        after = np.cumsum(sizes)
        size = int(after[-1])
        places = np.repeat(starts - (after - sizes), sizes)
        places += np.arange(size)
        code = np.zeros(size + PADDING_BYTES, dtype=np.uint8)
        np.take(content, places, out=code[:size], mode="clip")
        code[after - 1] = END
        return cls(code, after - sizes, after - 1, code_alignments, data_alignments, register)


# Opcodes: DWARF 5, section 7.24, and GNU's.
_NOP, _ADVANCE_1, _ADVANCE_2, _ADVANCE_4 = 0x00, 0x02, 0x03, 0x04
OFFSET_EXTENDED, RESTORE_EXTENDED, UNDEFINED_REGISTER = 0x05, 0x06, 0x07
SAME_VALUE, REGISTER, REMEMBER_STATE, RESTORE_STATE = 0x08, 0x09, 0x0A, 0x0B
DEF_CFA, DEF_CFA_REGISTER, DEF_CFA_OFFSET, DEF_CFA_EXPRESSION = 0x0C, 0x0D, 0x0E, 0x0F
EXPRESSION, OFFSET_EXTENDED_SF, DEF_CFA_SF, DEF_CFA_OFFSET_SF = 0x10, 0x11, 0x12, 0x13
_VAL_OFFSET, _VAL_OFFSET_SF, _VAL_EXPRESSION = 0x14, 0x15, 0x16
_GNU_ARGS_SIZE, GNU_NEGATIVE_OFFSET = 0x2E, 0x2F
END = 0x3F  # DW_CFA_hi_user: inside a program it is an unknown opcode
_ADVANCE, OFFSET, RESTORE = 0x40, 0x80, 0xC0

_OF_REGISTERS = (
    *(OFFSET_EXTENDED, RESTORE_EXTENDED, UNDEFINED_REGISTER, SAME_VALUE, REGISTER),
    *(EXPRESSION, OFFSET_EXTENDED_SF, _VAL_OFFSET, _VAL_OFFSET_SF, _VAL_EXPRESSION),
    GNU_NEGATIVE_OFFSET,
)
_WITH_BLOCK = (DEF_CFA_EXPRESSION, EXPRESSION, _VAL_EXPRESSION)
_WITH_TWO_NUMBERS = (
    *(OFFSET_EXTENDED, REGISTER, DEF_CFA, OFFSET_EXTENDED_SF, DEF_CFA_SF),
    *(_VAL_OFFSET, _VAL_OFFSET_SF, GNU_NEGATIVE_OFFSET, EXPRESSION, _VAL_EXPRESSION),
)
_WITH_NUMBERS = (
    *(RESTORE_EXTENDED, UNDEFINED_REGISTER, SAME_VALUE, DEF_CFA_REGISTER, DEF_CFA_OFFSET),
    *(DEF_CFA_EXPRESSION, DEF_CFA_OFFSET_SF, _GNU_ARGS_SIZE, *range(OFFSET, RESTORE)),
    *_WITH_TWO_NUMBERS,
)
_ADVANCES = (_ADVANCE_1, _ADVANCE_2, _ADVANCE_4, *range(_ADVANCE, OFFSET))
_WITHOUT_NUMBERS = (_NOP, REMEMBER_STATE, RESTORE_STATE, *_ADVANCES, *range(RESTORE, 256))

# One bit for each part of a rule: the CFA's register, its offset, where the register that is
# followed was saved, the return address.
_WRITES_BASE, _WRITES_OFFSET, WRITES_SAVED, WRITES_RETURN_ADDRESS = 1, 2, 4, 8
COLUMNS = (_WRITES_BASE, _WRITES_OFFSET, WRITES_SAVED, WRITES_RETURN_ADDRESS)
_WRITERS = {
    _WRITES_BASE: (DEF_CFA, DEF_CFA_SF, DEF_CFA_REGISTER, DEF_CFA_EXPRESSION, RESTORE_STATE),
    _WRITES_OFFSET: (DEF_CFA, DEF_CFA_SF, DEF_CFA_OFFSET, DEF_CFA_OFFSET_SF, RESTORE_STATE),
    WRITES_SAVED: (RESTORE_STATE,),
    WRITES_RETURN_ADDRESS: (OFFSET + RETURN_ADDRESS, RESTORE + RETURN_ADDRESS, RESTORE_STATE),
}

IS_ADVANCE, IS_OF_REGISTER, _IS_UNKNOWN, _MATTERS = 1, 2, 4, 8
_HAS_NUMBER, _HAS_SECOND, _HAS_BLOCK = 16, 32, 64
_TRAITS = {
    IS_ADVANCE: _ADVANCES,
    IS_OF_REGISTER: _OF_REGISTERS,
    _IS_UNKNOWN: set(range(256)) - {*_WITH_NUMBERS, *_WITHOUT_NUMBERS},
    # Most instructions save other registers and can be skipped, unless that register is followed.
    _MATTERS: {
        *range(OFFSET),
        *(opcode for writers in _WRITERS.values() for opcode in writers),
    }
    - {_NOP, _GNU_ARGS_SIZE},
    _HAS_NUMBER: _WITH_NUMBERS,
    _HAS_SECOND: _WITH_TWO_NUMBERS,
    _HAS_BLOCK: _WITH_BLOCK,
}


def _tabulate(bits: Mapping[int, Collection[int]]) -> bytes:
    """Return for each opcode the sum of the bits whose lists contain it."""
    return bytes(sum(bit for bit, opcodes in bits.items() if n in opcodes) for n in range(256))


def _tabulate_for(bits: Mapping[int, Collection[int]], bit: int) -> Mapping[int, bytes]:
    """Return the table by the register that is followed: its two opcodes have `bit`, too."""
    return {
        register: _tabulate({**bits, bit: {*bits[bit], OFFSET + register, RESTORE + register}})
        for register in (RBP, RBX)
    }


_TRAITS_TABLES = _tabulate_for(_TRAITS, _MATTERS)
WRITES_TABLES = _tabulate_for(_WRITERS, WRITES_SAVED)
_FIXED_WIDTHS_TABLE = bytes(
    {_ADVANCE_1: 2, _ADVANCE_2: 3, _ADVANCE_4: 5}.get(n, 1) for n in range(256)
)
_SHORT_ADVANCES_TABLE = bytes(n & 63 if n >> 6 == _ADVANCE >> 6 else 0 for n in range(256))


def look_up(table: bytes, opcodes: Bytes) -> Bytes:
    """Return the table's byte for each opcode; several times as fast as indexing an array."""
    return np.frombuffer(opcodes.tobytes().translate(table), np.uint8)


class Instructions(NamedTuple):
    """The instructions that matter, of all programs, in order.

    Attributes:
        programs: what they were found in.
        positions: of their first bytes in the code.
        opcodes: their first bytes.
        traits: bits of their opcodes, as in `_TRAITS`.
        owners: the number of the program each is in.
        firsts: per program, the number of its first instruction; `lasts` are those of `END`.
        is_broken: per program, whether it contains an invalid instruction.
    """

    programs: Programs
    positions: Ints
    opcodes: Bytes
    traits: Bytes
    owners: Ints
    firsts: Ints
    lasts: Ints
    is_broken: Flags

    @classmethod
    def decode(cls, programs: Programs) -> "Instructions":
        code, ends = programs.code, programs.ends
        code_traits = look_up(_TRAITS_TABLES[programs.register], code)
        widths = _find_widths(code, code_traits)
        is_start = _mark_starts(widths, programs.starts, ends)
        positions = np.flatnonzero(is_start & (code_traits[: len(is_start)] & _MATTERS > 0))
        opcodes, traits = code[positions], code_traits[positions]
        lasts = np.searchsorted(positions, ends)
        counts = np.diff(lasts, prepend=-1)
        owners = np.repeat(np.arange(len(ends)), counts)
        is_wrong = (traits & _IS_UNKNOWN > 0) | (positions + widths[positions] > ends[owners])
        is_wrong[lasts] = False
        is_broken = np.zeros(len(ends), dtype=np.bool_)
        is_broken[owners[is_wrong]] = True
        firsts = lasts - counts + 1
        return cls(programs, positions, opcodes, traits, owners, firsts, lasts, is_broken)

    @property
    def code(self) -> Bytes:
        return self.programs.code

    def locations(self) -> Ints:
        """Return for each instruction how many bytes of code its program has advanced before it."""
        code, positions, opcodes = self.code, self.positions, self.opcodes
        advances = look_up(_SHORT_ADVANCES_TABLE, opcodes).astype(np.int64)
        for opcode, form in ((_ADVANCE_1, "u1"), (_ADVANCE_2, "<u2"), (_ADVANCE_4, "<u4")):
            found = np.flatnonzero(opcodes == opcode)
            advances[found] = view(code, form)[positions[found] + 1]
        if (self.programs.code_alignments != 1).any():
            advances = advances * self.programs.code_alignments[self.owners]
        before = np.cumsum(advances)
        before -= advances
        locations: Ints = before - before[self.firsts][self.owners]
        return locations


def _find_widths(code: Bytes, traits: Bytes) -> Ints:
    """Return for each byte how long an instruction that begins there would be."""
    number_widths = np.ones(len(code), dtype=np.uint8)
    goes_on = code >= 0x80
    for _ in range(1, MAX_LEB_BYTES):
        number_widths[: len(goes_on)] += goes_on
        goes_on = goes_on[:-1] & goes_on[1:]
        if not goes_on.any():
            break
    narrow = look_up(_FIXED_WIDTHS_TABLE, code).copy()
    narrow[:-1] += number_widths[1:] * (traits[:-1] & _HAS_NUMBER > 0)
    last = len(code) - 1
    two = np.flatnonzero(traits & _HAS_SECOND)
    narrow[two] += number_widths[np.minimum(two + narrow[two], last)]
    widths = narrow.astype(np.int64)
    blocks = np.flatnonzero(traits & _HAS_BLOCK)
    sizes, _ = read_uleb(code, block_at(code, blocks)[0])
    widths[blocks] += np.minimum(sizes, len(code))
    return widths


def block_at(code: Bytes, at: Ints) -> tuple[Ints, Ints]:
    """Return the positions of the size and of the content of the blocks that end instructions."""
    sizes_at = at + 1
    has_register = np.flatnonzero(code[at] != DEF_CFA_EXPRESSION)
    last = len(code) - 1
    sizes_at[has_register] += read_uleb(code, np.minimum(sizes_at[has_register], last))[1]
    sizes_at = np.minimum(sizes_at, last)
    return sizes_at, sizes_at + read_uleb(code, sizes_at)[1]


# With fewer programs left, a loop over their instructions is faster than a call of numpy for one of
# each. Finished programs are removed after this many steps.
_FEW = 48
_STEPS_BETWEEN = 8


def _mark_starts(widths: Ints, starts: Ints, ends: Ints) -> Flags:
    """Mark where the instructions of all programs begin, and their `END`s."""
    is_start = np.zeros(int(ends[-1]) + 1, dtype=np.bool_)
    is_start[ends] = True
    positions = starts
    while len(positions) > _FEW:
        for _ in range(_STEPS_BETWEEN):
            is_start[positions] = True
            positions = np.minimum(positions + widths[positions], ends)
        is_left = positions < ends
        positions, ends = positions[is_left], ends[is_left]
    marks = is_start.data
    steps = widths.data
    for position, end in zip(positions.tolist(), ends.tolist(), strict=True):
        at = position
        while at < end:
            marks[at] = True
            at += steps[at]
    return is_start
