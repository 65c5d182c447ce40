"""What the programs of call frame information say, for all functions at once.

A program (DWARF 5, section 6.4.2) is a list of instructions that move forward through a function
and change rules: how the canonical frame address (CFA) is computed, where the caller's registers
were saved. Of these, three matter for walking a stack: the CFA's, rbp's and the return address's.

No instruction is executed. All are found first; then what each one writes into a rule is spread
over the instructions up to the next that writes it, in numpy: some 200 calls for a chunk of many
programs, whatever they hold. So time and memory grow with the bytes alone, also for programs that
are made to hurt.
"""

import enum
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from symbolizer.integers import (
    MAX_LEB_BYTES,
    PADDING_BYTES,
    Bytes,
    Flags,
    Ints,
    Wide,
    read_sleb,
    read_uleb,
    view,
)
from symbolizer.location import Miss
from symbolizer.symbols.elf import UnreadableElf
from symbolizer.unwind.cfi import CallFrames
from symbolizer.unwind.cie import RETURN_ADDRESS

# Arrays of this many elements stay in the processor's second cache; larger chunks are slower, and
# smaller ones pay numpy's price of a call too often (bench/bench_unwind_tables.py).
_CHUNK_BYTES = 1 << 17

# libLLVM's programs have 860,000 states between their advances. With more than 20 times that, a
# file was made to take long.
_MAX_STEPS = 1 << 24


class CfaKind(enum.IntEnum):
    """How a frame's CFA is computed. Offsets are in units of 8 bytes, below called `cfa`."""

    HOLE = 0
    """No FDE covers the address."""
    RSP = 1
    """rsp + 8 * cfa."""
    RBP = 2
    """rbp + 8 * cfa."""
    PLT = 3
    """rsp + 8, and 8 more from byte `cfa` of the 16 of a stub on, behind its push: from 11 on."""
    PLT_LAZY = 4
    """The same in stubs that begin with a landing pad: from 9 on, 10 in those of old linkers."""
    DEREF_RBP = 5
    """*(rbp + 8 * low byte of cfa, signed) + 8 * high byte: functions that align the stack."""
    DEREF_RSP = 6
    """The same from rsp: hand-written assembly of OpenSSL."""
    SIGNAL = 7
    """The registers are in the ucontext that rt_sigreturn takes from rsp."""
    STOP = 8
    """There is no caller."""
    UNSUPPORTED = 9
    """There are rules, but not among these."""
    FRAME_POINTER = 10
    """The file has no rules here, but its compiler keeps frame pointers."""
    CLONE = 11
    """rsp + 8, behind the system call that makes a thread; in the thread, where rax is 0, STOP."""
    REGISTER = 16
    """And above: register number (DWARF's) + 8 * cfa. Known at the leaf and behind signals only."""
    RETURN_REGISTER = 32
    """And above: rsp + 8 * cfa, and the return address is in that register: glibc's vfork()."""


class RbpKind(enum.IntEnum):
    """Where the caller's rbp is. Offsets are in units of 8 bytes, below called `rbp`."""

    SAME = 0
    AT_CFA = 1
    """At CFA + 8 * rbp."""
    DEREF_RBP = 2
    """At rbp + 8 * rbp."""
    UNDEFINED = 3
    """Lost, or beyond us."""
    DEREF_RSP = 4
    """At rsp + 8 * rbp."""


ROW = np.dtype(
    [("pc_low", "<u2"), ("cfa", "<u2"), ("cfa_kind", "u1"), ("rbp_kind", "u1"), ("rbp", "<i2")]
)
"""A rule and the low 16 bits of the ELF address from which on it holds."""


def rule(kind: CfaKind, cfa: int = 0) -> int:
    """Return a row as one number, first field 0 and rbp the SAME, as rules are built."""
    return int(kind) << 32 | cfa << 16


class Rules(NamedTuple):
    """Rows before they are cut into pages: an address and a number whose low 16 bits are free.

    Sorted by address. A rule holds up to the next, which is another; before the first is a HOLE.
    """

    addresses: Wide
    rules: Wide

    @classmethod
    def of_ranges(cls, ranges: Iterable[tuple[int, int, int]]) -> "Rules":
        """Return a rule for each (start, end, rule), none overlapping, and HOLEs between."""
        edges: dict[int, int] = {}
        for start, end, number in sorted(ranges):
            edges[start] = number
            edges[end] = rule(CfaKind.HOLE)
        in_order = sorted(edges.items())
        columns = np.array(in_order, dtype=np.uint64).reshape(-1, 2)
        return cls(columns[:, 0], columns[:, 1])

    def over(self, lower: "Rules") -> "Rules":
        """Return these rules, and the lower ones where these have a HOLE."""
        if not len(self.rules) or not len(lower.rules):
            return self if len(self.rules) else lower
        addresses = np.concatenate([self.addresses, lower.addresses])
        addresses.sort(kind="stable")  # which merges the two; numpy's unique takes 30 times as long
        addresses = addresses[np.append(True, addresses[1:] != addresses[:-1])]
        own = self.at(addresses)
        rules = np.where(own == rule(CfaKind.HOLE), lower.at(addresses), own)
        return Rules(addresses, rules).without_repetitions()

    def without_repetitions(self) -> "Rules":
        is_new = np.ones(len(self.rules), dtype=np.bool_)
        is_new[1:] = self.rules[1:] != self.rules[:-1]
        return Rules(self.addresses[is_new], self.rules[is_new])

    def at(self, addresses: Wide) -> Wide:
        """Return the rule at each address."""
        places = np.searchsorted(self.addresses, addresses, side="right")
        return np.append(np.uint64(rule(CfaKind.HOLE)), self.rules)[places]


def run_programs(frames: CallFrames) -> Iterator[Rules]:
    """Return the rows of all FDEs, sorted, in pieces. Behind an FDE a HOLE begins, or the next FDE.

    What fills up to the next multiple of 16 between two FDEs is padding that nobody executes: it
    gets no row, which saves one row per function.
    """
    cies = _run_cies(frames)
    steps = 0
    for here in _chunks(frames.program_ends - frames.programs):
        rows, steps_of_chunk = _run_fdes(frames, cies, here)
        yield rows
        steps += steps_of_chunk
        if steps > _MAX_STEPS:
            raise UnreadableElf(Miss.TOO_LARGE)


def _chunks(sizes: Ints) -> Iterator[slice]:
    """Cut programs into runs of about _CHUNK_BYTES; a longer program is one by itself."""
    after = np.cumsum(sizes + 1)
    first = 0
    while first < len(sizes):
        done = int(after[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(after, done + _CHUNK_BYTES, side="right")))
        yield slice(first, last)
        first = last


class _State(NamedTuple):
    """The rules that matter, one column each.

    Attributes:
        base: a register's number, or `_READY` and the high and low half of a finished rule.
        offset: what is added to the register, in bytes.
        rbp: RbpKind, and from bit 8 on the offset as 16 bits.
        return_address: one of the numbers below.
    """

    base: Ints
    offset: Ints
    rbp: Ints
    return_address: Ints

    def take(self, chosen: Ints | Flags | slice) -> "_State":
        return _State(*(column[chosen] for column in self))


_READY = 1 << 30
_NO_BASE = 31
_RSP, _RBP = 7, 6

_AT_CFA_MINUS_8, _UNDEFINED, _IN_UCONTEXT, _ELSEWHERE = range(4)
_IN_REGISTER = 16
"""And above: the register's number."""

# A ucontext on x86-64: after 40 bytes r8-r15, rdi, rsi, rbp, rbx, rdx, rax, rcx, rsp, rip.
_UCONTEXT_RBP, _UCONTEXT_RSP, _UCONTEXT_RIP = 120, 160, 168


class _Cies(NamedTuple):
    """What FDEs take from their CIEs, one row per CIE: alignments, and the state they begin in."""

    code_alignments: Ints
    data_alignments: Ints
    is_signal: Flags
    initial: _State

    def take(self, chosen: Ints | slice) -> "_Cies":
        return _Cies(
            self.code_alignments[chosen],
            self.data_alignments[chosen],
            self.is_signal[chosen],
            self.initial.take(chosen),
        )


def _run_cies(frames: CallFrames) -> _Cies:
    nothing = np.zeros(len(frames.cies), dtype=np.int64)
    cies = _Cies(
        np.array([cie.code_alignment for cie in frames.cies]),
        np.array([cie.data_alignment for cie in frames.cies]),
        np.array([cie.is_signal_frame for cie in frames.cies]),
        _State(nothing + _NO_BASE, nothing, nothing, nothing + _ELSEWHERE),
    )
    programs = np.array([cie.program for cie in frames.cies])
    program_ends = np.array([cie.program_end for cie in frames.cies])
    finals = []
    for here in _chunks(program_ends - programs):
        own = cies.take(here)
        steps = _find_steps(_gather(frames, programs[here], program_ends[here], own), own.initial)
        finals.append(steps.states.take(steps.is_last))
    return cies._replace(
        initial=_State(*(np.concatenate(columns) for columns in zip(*finals, strict=True)))
    )


def _run_fdes(frames: CallFrames, cies: _Cies, here: slice) -> tuple[Rules, int]:
    """Return the rows of a run of FDEs, and how many states there were before some were dropped."""
    own = cies.take(frames.cie_numbers[here])
    lanes = _gather(frames, frames.programs[here], frames.program_ends[here], own)
    steps = _find_steps(lanes, own.initial)
    rules = _pack(steps.states, own.is_signal[steps.lanes])
    addresses = frames.starts[here][steps.lanes] + steps.locations.astype(np.uint64)

    # A row that begins where the next one does, or behind its function, holds nowhere.
    ends = frames.ends[here]
    holds = addresses < ends[steps.lanes]
    holds[:-1] &= (addresses[:-1] != addresses[1:]) | steps.is_last[:-1]
    next_starts = np.append(frames.starts[here.start + 1 : here.stop + 1], _BEHIND_ALL)
    begins_hole = (ends + np.uint64(15) & ~np.uint64(15)) < next_starts[: len(ends)]
    hole_follows = steps.is_last & begins_hole[steps.lanes]
    rows = _with_holes(Rules(addresses, rules), holds, hole_follows, ends[begins_hole])
    return rows, len(rules)


_BEHIND_ALL = np.uint64((1 << 64) - 1)


def _with_holes(rows: Rules, holds: Flags, hole_follows: Flags, holes_at: Wide) -> Rules:
    """Keep the rows that hold, put HOLEs behind those they follow; drop what changes nothing."""
    copies = holds.astype(np.int64) + hole_follows
    addresses, rules = (np.repeat(column, copies) for column in rows)
    holes = np.cumsum(copies)[hole_follows] - 1
    addresses[holes] = holes_at
    rules[holes] = rule(CfaKind.HOLE)
    return Rules(addresses, rules).without_repetitions()


def _pack(states: _State, is_signal: Flags) -> Wide:
    """Turn states into rules."""
    base, offset = states.base, states.offset
    is_ready = base >= _READY
    is_plain = (base < RETURN_ADDRESS) & (offset & 7 == 0) & (offset >= 0) & (offset <= 8 * 0xFFFF)
    cfa = np.where(is_ready, base & 0xFFFFFF, _KINDS[base & 31] | offset >> 3)
    rules = cfa << 16 | states.rbp << 40
    is_signal_frame = (
        is_signal
        & (base == _ready(CfaKind.DEREF_RSP, _UCONTEXT_RSP // 8))
        & (states.rbp == _saved_rbp(RbpKind.DEREF_RSP, _UCONTEXT_RBP // 8))
        & (states.return_address == _IN_UCONTEXT)
    )
    is_supported = (is_plain | is_ready) & (states.return_address == _AT_CFA_MINUS_8)
    rules[~is_supported] = rule(CfaKind.UNSUPPORTED)
    in_register = states.return_address - _IN_REGISTER
    at = np.flatnonzero(is_plain & (base == _RSP) & (in_register >= 0))
    kinds = int(CfaKind.RETURN_REGISTER) + in_register[at]
    rules[at] = kinds << 32 | offset[at] >> 3 << 16 | states.rbp[at] << 40
    rules[is_signal_frame] = rule(CfaKind.SIGNAL)
    rules[states.return_address == _UNDEFINED] = rule(CfaKind.STOP)
    return rules.view(np.uint64)


def _ready(kind: CfaKind, cfa: int) -> int:
    return _READY | int(kind) << 16 | cfa


def _saved_rbp(kind: RbpKind, offset: int) -> int:
    return int(kind) | (offset & 0xFFFF) << 8


_KINDS = np.arange(CfaKind.REGISTER, CfaKind.REGISTER + 32, dtype=np.int64)
_KINDS[[_RSP, _RBP]] = CfaKind.RSP, CfaKind.RBP
_KINDS <<= 16


class _Lanes(NamedTuple):
    """Programs side by side, each followed by one `_END`.

    Attributes:
        code: the bytes, with padding behind them.
        starts: where each program begins; `ends` are the places of `_END`.
        code_alignments: per program, as `data_alignments`.
    """

    code: Bytes
    starts: Ints
    ends: Ints
    code_alignments: Ints
    data_alignments: Ints


def _gather(frames: CallFrames, programs: Ints, program_ends: Ints, cies: _Cies) -> _Lanes:
    sizes = program_ends - programs + 1
    after = np.cumsum(sizes)
    size = int(after[-1])
    places = np.repeat(programs - (after - sizes), sizes)
    places += np.arange(size)
    code = np.zeros(size + PADDING_BYTES, dtype=np.uint8)
    np.take(frames.content, places, out=code[:size], mode="clip")
    code[after - 1] = _END
    return _Lanes(code, after - sizes, after - 1, cies.code_alignments, cies.data_alignments)


# Instructions by their number: DWARF 5, section 7.24, and the GNU ones.
_NOP, _ADVANCE_1, _ADVANCE_2, _ADVANCE_4 = 0x00, 0x02, 0x03, 0x04
_OFFSET_EXTENDED, _RESTORE_EXTENDED, _UNDEFINED_REGISTER = 0x05, 0x06, 0x07
_SAME_VALUE, _REGISTER, _REMEMBER_STATE, _RESTORE_STATE = 0x08, 0x09, 0x0A, 0x0B
_DEF_CFA, _DEF_CFA_REGISTER, _DEF_CFA_OFFSET, _DEF_CFA_EXPRESSION = 0x0C, 0x0D, 0x0E, 0x0F
_EXPRESSION, _OFFSET_EXTENDED_SF, _DEF_CFA_SF, _DEF_CFA_OFFSET_SF = 0x10, 0x11, 0x12, 0x13
_VAL_OFFSET, _VAL_OFFSET_SF, _VAL_EXPRESSION = 0x14, 0x15, 0x16
_GNU_ARGS_SIZE, _GNU_NEGATIVE_OFFSET = 0x2E, 0x2F
_END = 0x3F  # DW_CFA_hi_user: in a program it is as unknown as any other
_ADVANCE, _OFFSET, _RESTORE = 0x40, 0x80, 0xC0

_OF_REGISTERS = (
    *(_OFFSET_EXTENDED, _RESTORE_EXTENDED, _UNDEFINED_REGISTER, _SAME_VALUE, _REGISTER),
    *(_EXPRESSION, _OFFSET_EXTENDED_SF, _VAL_OFFSET, _VAL_OFFSET_SF, _VAL_EXPRESSION),
    _GNU_NEGATIVE_OFFSET,
)
_WITH_BLOCK = (_DEF_CFA_EXPRESSION, _EXPRESSION, _VAL_EXPRESSION)
_WITH_TWO_NUMBERS = (
    *(_OFFSET_EXTENDED, _REGISTER, _DEF_CFA, _OFFSET_EXTENDED_SF, _DEF_CFA_SF),
    *(_VAL_OFFSET, _VAL_OFFSET_SF, _GNU_NEGATIVE_OFFSET, _EXPRESSION, _VAL_EXPRESSION),
)
_WITH_NUMBERS = (
    *(_RESTORE_EXTENDED, _UNDEFINED_REGISTER, _SAME_VALUE, _DEF_CFA_REGISTER, _DEF_CFA_OFFSET),
    *(_DEF_CFA_EXPRESSION, _DEF_CFA_OFFSET_SF, _GNU_ARGS_SIZE, *range(_OFFSET, _RESTORE)),
    *_WITH_TWO_NUMBERS,
)
_ADVANCES = (_ADVANCE_1, _ADVANCE_2, _ADVANCE_4, *range(_ADVANCE, _OFFSET))
_WITHOUT_NUMBERS = (_NOP, _REMEMBER_STATE, _RESTORE_STATE, *_ADVANCES, *range(_RESTORE, 256))

# One bit per column of _State.
_WRITES_BASE, _WRITES_OFFSET, _WRITES_RBP, _WRITES_RETURN_ADDRESS = 1, 2, 4, 8
_COLUMNS = (_WRITES_BASE, _WRITES_OFFSET, _WRITES_RBP, _WRITES_RETURN_ADDRESS)
_WRITERS = {
    _WRITES_BASE: (_DEF_CFA, _DEF_CFA_SF, _DEF_CFA_REGISTER, _DEF_CFA_EXPRESSION, _RESTORE_STATE),
    _WRITES_OFFSET: (_DEF_CFA, _DEF_CFA_SF, _DEF_CFA_OFFSET, _DEF_CFA_OFFSET_SF, _RESTORE_STATE),
    _WRITES_RBP: (_OFFSET + _RBP, _RESTORE + _RBP, _RESTORE_STATE),
    _WRITES_RETURN_ADDRESS: (_OFFSET + RETURN_ADDRESS, _RESTORE + RETURN_ADDRESS, _RESTORE_STATE),
}

_IS_ADVANCE, _IS_OF_REGISTER, _IS_UNKNOWN, _MATTERS = 1, 2, 4, 8
_HAS_NUMBER, _HAS_SECOND, _HAS_BLOCK = 16, 32, 64
_TRAITS = {
    _IS_ADVANCE: _ADVANCES,
    _IS_OF_REGISTER: _OF_REGISTERS,
    _IS_UNKNOWN: set(range(256)) - {*_WITH_NUMBERS, *_WITHOUT_NUMBERS},
    # Most instructions are about registers that do not matter.
    _MATTERS: {
        *range(_OFFSET),
        *(opcode for writers in _WRITERS.values() for opcode in writers),
    }
    - {_NOP, _GNU_ARGS_SIZE},
    _HAS_NUMBER: _WITH_NUMBERS,
    _HAS_SECOND: _WITH_TWO_NUMBERS,
    _HAS_BLOCK: _WITH_BLOCK,
}


def _tabulate(bits: Mapping[int, Collection[int]]) -> bytes:
    """Return for each opcode the sum of the bits that name it."""
    return bytes(sum(bit for bit, opcodes in bits.items() if n in opcodes) for n in range(256))


_TRAITS_TABLE = _tabulate(_TRAITS)
_WRITES_TABLE = _tabulate(_WRITERS)
_FIXED_WIDTHS_TABLE = bytes(
    {_ADVANCE_1: 2, _ADVANCE_2: 3, _ADVANCE_4: 5}.get(n, 1) for n in range(256)
)
_SHORT_ADVANCES_TABLE = bytes(n & 63 if n >> 6 == _ADVANCE >> 6 else 0 for n in range(256))


def _look_up(table: bytes, opcodes: Bytes) -> Bytes:
    """Return a table's byte for each byte; several times as fast as an array indexed by one."""
    return np.frombuffer(opcodes.tobytes().translate(table), np.uint8)


class _Steps(NamedTuple):
    """The states of programs between their advances, program after program.

    Attributes:
        lanes: the number of the program.
        locations: how far from the beginning of its function the state begins to hold.
        is_last: the last one of its program.
    """

    lanes: Ints
    locations: Ints
    is_last: Flags
    states: _State


def _find_steps(lanes: _Lanes, initial: _State) -> _Steps:
    program = _Program.decode(lanes)
    is_last = np.zeros(len(program.opcodes), dtype=np.bool_)
    is_last[program.lasts] = True
    places = np.flatnonzero((program.traits & _IS_ADVANCE > 0) | is_last)
    states = _states_at(program, places, initial)
    return _Steps(program.lanes[places], _locations(program)[places], is_last[places], states)


class _Program(NamedTuple):
    """The instructions that matter, of all lanes, in order.

    Attributes:
        source: what they were found in.
        positions: of their first bytes in the code.
        opcodes: their first bytes.
        traits: what is known of these, as bits.
        lanes: the number of the program each is in.
        firsts: per lane, the number of its first instruction; `lasts` are those of `_END`.
        is_broken: per lane, whether it holds what cannot be understood.
    """

    source: _Lanes
    positions: Ints
    opcodes: Bytes
    traits: Bytes
    lanes: Ints
    firsts: Ints
    lasts: Ints
    is_broken: Flags

    @classmethod
    def decode(cls, source: _Lanes) -> "_Program":
        code, ends = source.code, source.ends
        code_traits = _look_up(_TRAITS_TABLE, code)
        widths = _find_widths(code, code_traits)
        is_start = _mark_starts(widths, source.starts, ends)
        positions = np.flatnonzero(is_start & (code_traits[: len(is_start)] & _MATTERS > 0))
        opcodes, traits = code[positions], code_traits[positions]
        lasts = np.searchsorted(positions, ends)
        counts = np.diff(lasts, prepend=-1)
        lanes = np.repeat(np.arange(len(ends)), counts)
        is_wrong = (traits & _IS_UNKNOWN > 0) | (positions + widths[positions] > ends[lanes])
        is_wrong[lasts] = False
        is_broken = np.zeros(len(ends), dtype=np.bool_)
        is_broken[lanes[is_wrong]] = True
        return cls(source, positions, opcodes, traits, lanes, lasts - counts + 1, lasts, is_broken)


def _find_widths(code: Bytes, traits: Bytes) -> Ints:
    """Return for each byte how long the instruction would be, if one began there."""
    number_widths = np.ones(len(code), dtype=np.uint8)
    goes_on = code >= 0x80
    for _ in range(1, MAX_LEB_BYTES):
        number_widths[: len(goes_on)] += goes_on
        goes_on = goes_on[:-1] & goes_on[1:]
        if not goes_on.any():
            break
    narrow = _look_up(_FIXED_WIDTHS_TABLE, code).copy()
    narrow[:-1] += number_widths[1:] * (traits[:-1] & _HAS_NUMBER > 0)
    last = len(code) - 1
    two = np.flatnonzero(traits & _HAS_SECOND)
    narrow[two] += number_widths[np.minimum(two + narrow[two], last)]
    widths = narrow.astype(np.int64)
    blocks = np.flatnonzero(traits & _HAS_BLOCK)
    sizes, _ = read_uleb(code, _block_at(code, blocks)[0])
    widths[blocks] += np.minimum(sizes, len(code))
    return widths


def _block_at(code: Bytes, at: Ints) -> tuple[Ints, Ints]:
    """Return for instructions that end in a block where its size and its content stand."""
    sizes_at = at + 1
    has_register = np.flatnonzero(code[at] != _DEF_CFA_EXPRESSION)
    last = len(code) - 1
    sizes_at[has_register] += read_uleb(code, np.minimum(sizes_at[has_register], last))[1]
    sizes_at = np.minimum(sizes_at, last)
    return sizes_at, sizes_at + read_uleb(code, sizes_at)[1]


# With fewer programs left, a loop over their instructions is quicker than calls of numpy for one
# each; after so many steps the finished ones are taken out.
_FEW = 48
_STEPS_BETWEEN = 8


def _mark_starts(widths: Ints, starts: Ints, ends: Ints) -> Flags:
    """Mark where the instructions of all programs begin, and their `_END`s."""
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


def _locations(program: _Program) -> Ints:
    """Return for each instruction how far its program has advanced before it."""
    code, positions, opcodes = program.source.code, program.positions, program.opcodes
    advances = _look_up(_SHORT_ADVANCES_TABLE, opcodes).astype(np.int64)
    for opcode, form in ((_ADVANCE_1, "u1"), (_ADVANCE_2, "<u2"), (_ADVANCE_4, "<u4")):
        found = np.flatnonzero(opcodes == opcode)
        advances[found] = view(code, form)[positions[found] + 1]
    if (program.source.code_alignments != 1).any():
        advances = advances * program.source.code_alignments[program.lanes]
    before = np.cumsum(advances)
    before -= advances
    locations: Ints = before - before[program.firsts][program.lanes]
    return locations


def _states_at(program: _Program, places: Ints, initial: _State) -> _State:
    """Return the state in force at each instruction of `places`."""
    writes, values = _find_writes(program, initial)
    # What no instruction of a program has written yet is as the first one found it.
    is_first = np.zeros(len(writes), dtype=np.bool_)
    is_first[program.firsts] = True
    restores = _Restores.match(program)
    columns = []
    for bit, written, before in zip(_COLUMNS, values, initial, strict=True):
        is_written = writes & bit > 0
        unwritten = ~is_written[program.firsts]
        written[program.firsts[unwritten]] = before[unwritten]
        writers = np.flatnonzero(is_written | is_first)
        column = restores.resolve(writers, written[writers])
        lengths = np.diff(writers, append=len(writes))
        columns.append(np.repeat(column, lengths)[places])
    is_broken = program.is_broken[program.lanes[places]]
    columns[0][is_broken] = _NO_BASE
    columns[3][is_broken] = _ELSEWHERE
    return _State(*columns)


class _Restores(NamedTuple):
    """Which state each DW_CFA_restore_state brings back.

    Attributes:
        numbers: instructions that restore; `origins` are those that remembered their state.
    """

    numbers: Ints
    origins: Ints

    @classmethod
    def match(cls, program: _Program) -> "_Restores":
        """Pair them like brackets. A program that restores what it did not remember is broken."""
        is_restore = program.opcodes == _RESTORE_STATE
        both = np.flatnonzero(is_restore | (program.opcodes == _REMEMBER_STATE))
        lanes, is_restore = program.lanes[both], is_restore[both]
        depth = np.cumsum(np.where(is_restore, -1, 1))
        before = np.append(0, depth)[np.searchsorted(lanes, lanes)]
        # A pair shares the level that the one opens and the other closes.
        levels = depth - before + is_restore
        program.is_broken[lanes[levels <= 0]] = True
        order = np.lexsort((levels, lanes))
        at = np.flatnonzero(is_restore[order])
        origins = np.empty(len(both), dtype=np.int64)
        origins[order[at]] = both[order[np.maximum(at - 1, 0)]]
        return cls(both[is_restore], origins[is_restore])

    def resolve(self, writers: Ints, written: Ints) -> Ints:
        """Return what each writer of one column has written, the restoring ones included."""
        if not len(self.numbers):
            return written
        own = np.searchsorted(writers, self.numbers)
        sources = np.searchsorted(writers, self.origins, side="right") - 1
        ordinals = np.full(len(writers), -1, dtype=np.int64)
        ordinals[own] = np.arange(len(own))
        # The source of a restore may be a restore again; each round doubles the way seen through.
        for _ in range(len(own).bit_length() + 1):
            through = ordinals[sources]
            again = np.flatnonzero(through >= 0)
            if not len(again):
                break
            sources[again] = sources[through[again]]
        written[own] = written[sources]
        return written


def _find_writes(program: _Program, initial: _State) -> tuple[Bytes, _State]:
    """Return which columns each instruction writes, and what it writes into them."""
    code, opcodes = program.source.code, program.opcodes
    writes = _look_up(_WRITES_TABLE, opcodes).copy()
    values = _State(*(np.zeros(len(opcodes), dtype=np.int64) for _ in _COLUMNS))
    _write_cfa(program, values)
    extended = np.flatnonzero(program.traits & _IS_OF_REGISTER)
    registers = read_uleb(code, program.positions[extended] + 1)[0]
    writes[extended[registers == _RBP]] = _WRITES_RBP
    writes[extended[registers == RETURN_ADDRESS]] = _WRITES_RETURN_ADDRESS
    _write_rbp(program, np.flatnonzero(writes == _WRITES_RBP), initial, values.rbp)
    found = np.flatnonzero(writes == _WRITES_RETURN_ADDRESS)
    if len(found):
        _write_return_address(program, found, initial, values.return_address)
    return writes, values


def _write_cfa(program: _Program, values: _State) -> None:
    code, positions, opcodes = program.source.code, program.positions, program.opcodes
    found = np.flatnonzero(opcodes == _DEF_CFA_OFFSET)
    values.offset[found] = read_uleb(code, positions[found] + 1)[0]
    found = np.flatnonzero(opcodes == _DEF_CFA_OFFSET_SF)
    values.offset[found] = read_sleb(code, positions[found] + 1)[0] * _factors(program, found)
    found = np.flatnonzero(opcodes == _DEF_CFA_REGISTER)
    registers = read_uleb(code, positions[found] + 1)[0]
    values.base[found] = np.minimum(registers, _NO_BASE)
    found = np.flatnonzero(opcodes == _DEF_CFA)
    registers, widths = read_uleb(code, positions[found] + 1)
    values.base[found] = np.minimum(registers, _NO_BASE)
    values.offset[found] = read_uleb(code, positions[found] + 1 + widths)[0]
    found = np.flatnonzero(opcodes == _DEF_CFA_SF)
    registers, widths = read_uleb(code, positions[found] + 1)
    values.base[found] = np.minimum(registers, _NO_BASE)
    offsets = read_sleb(code, positions[found] + 1 + widths)[0]
    values.offset[found] = offsets * _factors(program, found)
    found = np.flatnonzero(opcodes == _DEF_CFA_EXPRESSION)
    if len(found):
        values.base[found] = _read_cfa_expressions(code, *_blocks(program, found))


def _factors(program: _Program, found: Ints) -> Ints:
    return program.source.data_alignments[program.lanes[found]]


def _saved_at(program: _Program, found: Ints) -> tuple[Flags, Ints]:
    """Return which instructions save at an offset from the CFA, and return that offset in bytes."""
    code, positions, opcodes = program.source.code, program.positions, program.opcodes
    is_saved = np.zeros(len(found), dtype=np.bool_)
    offsets = np.zeros(len(found), dtype=np.int64)
    own = opcodes[found]
    here = np.flatnonzero(own >> 6 == _OFFSET >> 6)
    is_saved[here] = True
    offsets[here] = read_uleb(code, positions[found[here]] + 1)[0]
    for opcode, read, sign in (
        (_OFFSET_EXTENDED, read_uleb, 1),
        (_OFFSET_EXTENDED_SF, read_sleb, 1),
        (_GNU_NEGATIVE_OFFSET, read_uleb, -1),
    ):
        here = np.flatnonzero(own == opcode)
        is_saved[here] = True
        second = positions[found[here]] + 1
        second = second + read_uleb(code, second)[1]
        offsets[here] = sign * read(code, second)[0]
    return is_saved, offsets * _factors(program, found)


def _write_rbp(program: _Program, found: Ints, initial: _State, rbp: Ints) -> None:
    opcodes = program.opcodes[found]
    values = np.full(len(found), RbpKind.UNDEFINED, dtype=np.int64)
    is_saved, offsets = _saved_at(program, found)
    fits = _is_short(offsets)
    values[is_saved & fits] = _save_rbp(RbpKind.AT_CFA, offsets[is_saved & fits])
    values[opcodes == _SAME_VALUE] = RbpKind.SAME
    is_restored = (opcodes == _RESTORE_EXTENDED) | (opcodes == _RESTORE + _RBP)
    values[is_restored] = initial.rbp[program.lanes[found[is_restored]]]
    here = np.flatnonzero(opcodes == _EXPRESSION)
    registers, offsets = _read_sums(program.source.code, *_blocks(program, found[here]))
    fits = _is_short(offsets)
    for register, kind in ((_RBP, RbpKind.DEREF_RBP), (_RSP, RbpKind.DEREF_RSP)):
        chosen = fits & (registers == register)
        values[here[chosen]] = _save_rbp(kind, offsets[chosen])
    rbp[found] = values


def _is_short(offsets: Ints) -> Flags:
    is_short: Flags = (offsets & 7 == 0) & (offsets >= -(8 << 15)) & (offsets < 8 << 15)
    return is_short


def _save_rbp(kind: RbpKind, offsets: Ints) -> Ints:
    return int(kind) | (offsets >> 3 & 0xFFFF) << 8


def _write_return_address(program: _Program, found: Ints, initial: _State, values: Ints) -> None:
    opcodes = program.opcodes[found]
    states = np.full(len(found), _ELSEWHERE, dtype=np.int64)
    is_saved, offsets = _saved_at(program, found)
    states[is_saved & (offsets == -8)] = _AT_CFA_MINUS_8
    states[opcodes == _UNDEFINED_REGISTER] = _UNDEFINED
    is_restored = (opcodes == _RESTORE_EXTENDED) | (opcodes == _RESTORE + RETURN_ADDRESS)
    states[is_restored] = initial.return_address[program.lanes[found[is_restored]]]
    here = np.flatnonzero(opcodes == _EXPRESSION)
    registers, offsets = _read_sums(program.source.code, *_blocks(program, found[here]))
    states[here[(registers == _RSP) & (offsets == _UCONTEXT_RIP)]] = _IN_UCONTEXT
    here = np.flatnonzero(opcodes == _REGISTER)
    second = program.positions[found[here]] + 1
    second = second + read_uleb(program.source.code, second)[1]
    registers = read_uleb(program.source.code, second)[0]
    is_general = registers < RETURN_ADDRESS
    states[here[is_general]] = _IN_REGISTER + registers[is_general]
    values[found] = states


# Operations of expressions: DWARF 5, section 7.7.1.
_DW_OP_DEREF, _DW_OP_PLUS_UCONST, _DW_OP_LIT0, _DW_OP_BREG = 0x06, 0x23, 0x30, 0x70


def _blocks(program: _Program, found: Ints) -> tuple[Ints, Ints]:
    """Return where the expressions of instructions begin and end."""
    code = program.source.code
    sizes_at, starts = _block_at(code, program.positions[found])
    ends = starts + read_uleb(code, sizes_at)[0]
    # Those that run over the end of their program are broken, and only have to be readable.
    limit = len(code) - PADDING_BYTES
    return np.minimum(starts, limit), np.minimum(ends, limit)


def _read_sum(code: Bytes, at: Ints) -> tuple[Ints, Ints, Ints]:
    """Read `DW_OP_bregN offset`: give N, the offset, and where it ends; N is -1 for others."""
    offsets, widths = read_sleb(code, at + 1)
    registers = code[at].astype(np.int64) - _DW_OP_BREG
    registers[(registers < 0) | (registers > RETURN_ADDRESS)] = -1
    return registers, offsets, at + 1 + widths


def _read_sums(code: Bytes, starts: Ints, ends: Ints) -> tuple[Ints, Ints]:
    registers, offsets, after = _read_sum(code, starts)
    registers[after != ends] = -1
    return registers, offsets


def _read_cfa_expressions(code: Bytes, starts: Ints, ends: Ints) -> Ints:
    """Recognise the expressions that occur, as finished rules; `_NO_BASE` for others."""
    bases = np.full(len(starts), _NO_BASE, dtype=np.int64)
    is_plt = ends - starts == len(_PLT_EXPRESSION)
    for k, byte in enumerate(_PLT_EXPRESSION):
        is_plt &= (code[starts + k] == byte) | (k == _PLT_LIT_AT)
    for at, kind in _PLT_KINDS.items():
        chosen = is_plt & (code[starts + _PLT_LIT_AT] == _DW_OP_LIT0 + at)
        bases[chosen] = _ready(kind, at)
    registers, offsets, after = _read_sum(code, starts)
    is_deref = code[after] == _DW_OP_DEREF
    after = after + 1
    has_addend = (after < ends) & (code[after] == _DW_OP_PLUS_UCONST)
    addends, widths = read_uleb(code, after + 1)
    addends[~has_addend] = 0
    after = np.where(has_addend, after + 1 + widths, after)
    is_deref &= (after == ends) & (offsets & 7 == 0) & (addends & 7 == 0)
    is_deref &= (offsets >= -(8 << 7)) & (offsets < 8 << 7) & (addends <= 8 * 0xFF)
    for register, kind in ((_RBP, CfaKind.DEREF_RBP), (_RSP, CfaKind.DEREF_RSP)):
        chosen = is_deref & (registers == register)
        low, high = offsets[chosen] >> 3 & 0xFF, addends[chosen] >> 3
        bases[chosen] = _ready(kind, 0) | low | high << 8
    return bases


# breg7 8; breg16 0; lit15; and; litN; ge; lit3; shl; plus (binutils' elfxx-x86.c).
_PLT_EXPRESSION = bytes.fromhex("770880003f1a002a332422")
_PLT_LIT_AT = 6
_PLT_KINDS = {11: CfaKind.PLT, 10: CfaKind.PLT_LAZY, 9: CfaKind.PLT_LAZY}
