"""Run the programs of call frame information, for all functions at once.

A program (DWARF 5, section 6.4.2) is a list of instructions that move forward through a function
and change rules: how the canonical frame address (CFA) is computed, and where the caller's
registers are saved. Three rules are needed to walk a stack: the CFA's, rbp's and the return
address's; in few files rbx's, too, for which the programs are run again.

Instructions are not executed one by one. All are decoded first (instructions.py); then each value
that an instruction writes is repeated up to the next instruction that writes the same rule. In
numpy this takes about 200 calls for a chunk of many programs, whatever they contain. So time and
memory depend only on the number of bytes, even for crafted programs.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from symbolizer.integers import (
    PADDING_BYTES,
    Bytes,
    Flags,
    Ints,
    Wide,
    read_sleb,
    read_uleb,
)
from symbolizer.location import Miss
from symbolizer.symbols.elf import UnreadableElf
from symbolizer.unwind import instructions as op
from symbolizer.unwind.cfi import CallFrames
from symbolizer.unwind.cie import RBP, RETURN_ADDRESS, RSP
from symbolizer.unwind.instructions import (
    Instructions,
    Programs,
    block_at,
    look_up,
)
from symbolizer.unwind.rules import CfaKind, RbpKind, Rules, rule

# Arrays of this many elements stay in the processor's L2 cache. Larger chunks are slower; with
# smaller ones the calls of numpy cost too much (bench/bench_unwind_tables.py).
_CHUNK_BYTES = 1 << 17

# libLLVM's programs have 860,000 states between their advances, ClickHouse's some 3 million. Few of
# them are restored. A file with more was crafted to take long.
_MAX_STEPS = 1 << 22
_MAX_RESTORES = 1 << 20


def run_programs(frames: CallFrames, register: int = RBP) -> Iterator[Rules]:
    """Return the rules of all FDEs in pieces, sorted. After an FDE comes a HOLE or the next FDE.

    With RBX as the `register`, what the rules say of rbp is true of rbx.

    Bytes between an FDE and the next multiple of 16 are padding that is never executed: they get no
    row, which saves one row per function.
    """
    cies = _run_cies(frames, register)
    steps = restores = 0
    for here in _chunks(frames.program_ends - frames.programs):
        rows, steps_here, restores_here = _run_fdes(frames, cies, here)
        yield rows
        steps += steps_here
        restores += restores_here
        if steps > _MAX_STEPS or restores > _MAX_RESTORES:
            raise UnreadableElf(Miss.TOO_LARGE)


def _chunks(sizes: Ints) -> Iterator[slice]:
    """Cut programs into runs of about _CHUNK_BYTES; a longer program is its own run."""
    after = np.cumsum(sizes + 1)
    first = 0
    while first < len(sizes):
        done = int(after[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(after, done + _CHUNK_BYTES, side="right")))
        yield slice(first, last)
        first = last


class _State(NamedTuple):
    """The rules needed to walk a stack, one column for each part.

    Attributes:
        base: the CFA's register; or `_READY`, then kind and operand of a finished rule.
        offset: added to that register, in bytes.
        saved: where rbp is, or the register that is followed: RbpKind; from bit 8 on, the offset.
        return_address: one of the numbers below.
    """

    base: Ints
    offset: Ints
    saved: Ints
    return_address: Ints

    def take(self, chosen: Ints | Flags | slice) -> "_State":
        return _State(*(column[chosen] for column in self))


_READY = 1 << 30
_NO_BASE = 31

_AT_CFA_MINUS_8, _UNDEFINED, _IN_UCONTEXT, _ELSEWHERE = range(4)
_IN_REGISTER = 16
"""And above: the register's number."""

# A ucontext on x86-64: after 40 bytes r8-r15, rdi, rsi, rbp, rbx, rdx, rax, rcx, rsp, rip.
_UCONTEXT_RBP, _UCONTEXT_RSP, _UCONTEXT_RIP = 120, 160, 168


class _Cies(NamedTuple):
    """What FDEs take from their CIEs, one row per CIE: alignments and the initial state."""

    code_alignments: Ints
    data_alignments: Ints
    is_signal: Flags
    initial: _State
    register: int

    def take(self, chosen: Ints | slice) -> "_Cies":
        return _Cies(
            self.code_alignments[chosen],
            self.data_alignments[chosen],
            self.is_signal[chosen],
            self.initial.take(chosen),
            self.register,
        )


def _run_cies(frames: CallFrames, register: int) -> _Cies:
    nothing = np.zeros(len(frames.cies), dtype=np.int64)
    cies = _Cies(
        np.array([cie.code_alignment for cie in frames.cies]),
        np.array([cie.data_alignment for cie in frames.cies]),
        np.array([cie.is_signal_frame for cie in frames.cies]),
        _State(nothing + _NO_BASE, nothing, nothing, nothing + _ELSEWHERE),
        register,
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


def _run_fdes(frames: CallFrames, cies: _Cies, here: slice) -> tuple[Rules, int, int]:
    """Return the rules of a run of FDEs; how many states their programs had and restored."""
    own = cies.take(frames.cie_numbers[here])
    programs = _gather(frames, frames.programs[here], frames.program_ends[here], own)
    steps = _find_steps(programs, own.initial)
    rules = _pack(steps.states, own.is_signal[steps.owners])
    addresses = frames.starts[here][steps.owners] + steps.locations.astype(np.uint64)

    # A row that begins where the next one does, or after its function, covers nothing.
    ends = frames.ends[here]
    holds = addresses < ends[steps.owners]
    holds[:-1] &= (addresses[:-1] != addresses[1:]) | steps.is_last[:-1]
    next_starts = np.append(frames.starts[here.start + 1 : here.stop + 1], _BEHIND_ALL)
    begins_hole = (ends + np.uint64(15) & ~np.uint64(15)) < next_starts[: len(ends)]
    hole_follows = steps.is_last & begins_hole[steps.owners]
    rows = _with_holes(Rules(addresses, rules), holds, hole_follows, ends[begins_hole])
    return rows, len(rules), steps.restores


_BEHIND_ALL = np.uint64((1 << 64) - 1)


def _with_holes(rows: Rules, holds: Flags, hole_follows: Flags, holes_at: Wide) -> Rules:
    """Keep the rows that hold, insert HOLEs after rows that need one, and drop repetitions."""
    copies = holds.astype(np.int64) + hole_follows
    addresses, rules = (np.repeat(column, copies) for column in rows)
    holes = np.cumsum(copies)[hole_follows] - 1
    addresses[holes] = holes_at
    rules[holes] = rule(CfaKind.HOLE)
    return Rules(addresses, rules).without_repetitions()


def _pack(states: _State, is_signal: Flags) -> Wide:
    """Encode states as rules."""
    base, offset = states.base, states.offset
    is_ready = base >= _READY
    is_plain = (base < RETURN_ADDRESS) & (offset & 7 == 0) & (offset >= 0) & (offset <= 8 * 0xFFFF)
    cfa = np.where(is_ready, base & 0xFFFFFF, _KINDS[base & 31] | offset >> 3)
    rules = cfa << 16 | states.saved << 40
    is_signal_frame = (
        is_signal
        & (base == _ready(CfaKind.DEREF_RSP, _UCONTEXT_RSP // 8))
        & (states.saved == _saved(RbpKind.DEREF_RSP, _UCONTEXT_RBP))
        & (states.return_address == _IN_UCONTEXT)
    )
    is_supported = (is_plain | is_ready) & (states.return_address == _AT_CFA_MINUS_8)
    rules[~is_supported] = rule(CfaKind.UNSUPPORTED)
    in_register = states.return_address - _IN_REGISTER
    at = np.flatnonzero(is_plain & (base == RSP) & (in_register >= 0))
    kinds = int(CfaKind.RETURN_REGISTER) + in_register[at]
    rules[at] = kinds << 32 | offset[at] >> 3 << 16 | states.saved[at] << 40
    rules[is_signal_frame] = rule(CfaKind.SIGNAL)
    rules[states.return_address == _UNDEFINED] = rule(CfaKind.STOP)
    return rules.view(np.uint64)


def _ready(kind: CfaKind, cfa: int) -> int:
    return _READY | int(kind) << 16 | cfa


_KINDS = np.arange(CfaKind.REGISTER, CfaKind.REGISTER + 32, dtype=np.int64)
_KINDS[[RSP, RBP]] = CfaKind.RSP, CfaKind.RBP
_KINDS <<= 16


def _gather(frames: CallFrames, starts: Ints, ends: Ints, cies: _Cies) -> Programs:
    alignments = (cies.code_alignments, cies.data_alignments)
    return Programs.gather(frames.content, starts, ends, *alignments, register=cies.register)


class _Steps(NamedTuple):
    """The states of programs between their advances, program after program.

    Attributes:
        owners: the number of the program.
        locations: from how many bytes after its function's start the state holds.
        is_last: whether it is the last state of its program.
        restores: how many times all of the programs remember a state, or restore one.
    """

    owners: Ints
    locations: Ints
    is_last: Flags
    states: _State
    restores: int


def _find_steps(programs: Programs, initial: _State) -> _Steps:
    instructions = Instructions.decode(programs)
    is_last = np.zeros(len(instructions.opcodes), dtype=np.bool_)
    is_last[instructions.lasts] = True
    places = np.flatnonzero((instructions.traits & op.IS_ADVANCE > 0) | is_last)
    states = _states_at(instructions, places, initial)
    own, opcodes = instructions.owners[places], instructions.opcodes
    restores = np.isin(opcodes, (op.REMEMBER_STATE, op.RESTORE_STATE)).sum()
    locations = instructions.locations()[places]
    return _Steps(own, locations, is_last[places], states, int(restores))


def _states_at(instructions: Instructions, places: Ints, initial: _State) -> _State:
    """Return the state in force at each instruction of `places`."""
    writes, values = _find_writes(instructions, initial)
    # Until an instruction of a program writes a column, its initial value holds.
    is_first = np.zeros(len(writes), dtype=np.bool_)
    is_first[instructions.firsts] = True
    restores = _Restores.match(instructions)
    columns = []
    for bit, written, before in zip(op.COLUMNS, values, initial, strict=True):
        is_written = writes & bit > 0
        unwritten = ~is_written[instructions.firsts]
        written[instructions.firsts[unwritten]] = before[unwritten]
        writers = np.flatnonzero(is_written | is_first)
        column = restores.resolve(writers, written[writers])
        lengths = np.diff(writers, append=len(writes))
        columns.append(np.repeat(column, lengths)[places])
    is_broken = instructions.is_broken[instructions.owners[places]]
    columns[0][is_broken] = _NO_BASE
    columns[3][is_broken] = _ELSEWHERE
    return _State(*columns)


class _Restores(NamedTuple):
    """Which state each DW_CFA_restore_state restores.

    Attributes:
        numbers: instructions that restore; `origins` are those that remembered the state.
    """

    numbers: Ints
    origins: Ints

    @classmethod
    def match(cls, instructions: Instructions) -> "_Restores":
        """Match them like brackets. A program that restores more than it remembered is broken."""
        is_restore = instructions.opcodes == op.RESTORE_STATE
        both = np.flatnonzero(is_restore | (instructions.opcodes == op.REMEMBER_STATE))
        owners, is_restore = instructions.owners[both], is_restore[both]
        depth = np.cumsum(np.where(is_restore, -1, 1))
        before = np.append(0, depth)[np.searchsorted(owners, owners)]
        # The two instructions of a pair have the same level.
        levels = depth - before + is_restore
        instructions.is_broken[owners[levels <= 0]] = True
        order = np.lexsort((levels, owners))
        at = np.flatnonzero(is_restore[order])
        origins = np.empty(len(both), dtype=np.int64)
        origins[order[at]] = both[order[np.maximum(at - 1, 0)]]
        return cls(both[is_restore], origins[is_restore])

    def resolve(self, writers: Ints, written: Ints) -> Ints:
        """Return the values of one column by writer, after replacing those of restoring writers."""
        if not len(self.numbers):
            return written
        own = np.searchsorted(writers, self.numbers)
        sources = np.searchsorted(writers, self.origins, side="right") - 1
        ordinals = np.full(len(writers), -1, dtype=np.int64)
        ordinals[own] = np.arange(len(own))
        # The source of a restore may itself be a restore; each round doubles the length of the
        # chains that are resolved.
        for _ in range(len(own).bit_length() + 1):
            through = ordinals[sources]
            again = np.flatnonzero(through >= 0)
            if not len(again):
                break
            sources[again] = sources[through[again]]
        written[own] = written[sources]
        return written


def _find_writes(instructions: Instructions, initial: _State) -> tuple[Bytes, _State]:
    """Return which columns each instruction writes, and the values it writes."""
    code, opcodes = instructions.code, instructions.opcodes
    followed = instructions.programs.register
    writes = look_up(op.WRITES_TABLES[followed], opcodes).copy()
    values = _State(*(np.zeros(len(opcodes), dtype=np.int64) for _ in op.COLUMNS))
    _write_cfa(instructions, values)
    extended = np.flatnonzero(instructions.traits & op.IS_OF_REGISTER)
    registers = read_uleb(code, instructions.positions[extended] + 1)[0]
    writes[extended[registers == followed]] = op.WRITES_SAVED
    writes[extended[registers == RETURN_ADDRESS]] = op.WRITES_RETURN_ADDRESS
    _write_saved(instructions, np.flatnonzero(writes == op.WRITES_SAVED), initial, values.saved)
    found = np.flatnonzero(writes == op.WRITES_RETURN_ADDRESS)
    if len(found):
        _write_return_address(instructions, found, initial, values.return_address)
    return writes, values


def _write_cfa(instructions: Instructions, values: _State) -> None:
    code, positions, opcodes = (
        instructions.code,
        instructions.positions,
        instructions.opcodes,
    )
    found = np.flatnonzero(opcodes == op.DEF_CFA_OFFSET)
    values.offset[found] = read_uleb(code, positions[found] + 1)[0]
    found = np.flatnonzero(opcodes == op.DEF_CFA_OFFSET_SF)
    values.offset[found] = read_sleb(code, positions[found] + 1)[0] * _factors(instructions, found)
    found = np.flatnonzero(opcodes == op.DEF_CFA_REGISTER)
    registers = read_uleb(code, positions[found] + 1)[0]
    values.base[found] = np.minimum(registers, _NO_BASE)
    found = np.flatnonzero(opcodes == op.DEF_CFA)
    registers, widths = read_uleb(code, positions[found] + 1)
    values.base[found] = np.minimum(registers, _NO_BASE)
    values.offset[found] = read_uleb(code, positions[found] + 1 + widths)[0]
    found = np.flatnonzero(opcodes == op.DEF_CFA_SF)
    registers, widths = read_uleb(code, positions[found] + 1)
    values.base[found] = np.minimum(registers, _NO_BASE)
    offsets = read_sleb(code, positions[found] + 1 + widths)[0]
    values.offset[found] = offsets * _factors(instructions, found)
    found = np.flatnonzero(opcodes == op.DEF_CFA_EXPRESSION)
    if len(found):
        values.base[found] = _read_cfa_expressions(code, *_blocks(instructions, found))


def _factors(instructions: Instructions, found: Ints) -> Ints:
    return instructions.programs.data_alignments[instructions.owners[found]]


def _saved_at(instructions: Instructions, found: Ints) -> tuple[Flags, Ints]:
    """Return which instructions save a register relative to the CFA, and that offset in bytes."""
    code, positions, opcodes = (
        instructions.code,
        instructions.positions,
        instructions.opcodes,
    )
    is_saved = np.zeros(len(found), dtype=np.bool_)
    offsets = np.zeros(len(found), dtype=np.int64)
    own = opcodes[found]
    here = np.flatnonzero(own >> 6 == op.OFFSET >> 6)
    is_saved[here] = True
    offsets[here] = read_uleb(code, positions[found[here]] + 1)[0]
    for opcode, read, sign in (
        (op.OFFSET_EXTENDED, read_uleb, 1),
        (op.OFFSET_EXTENDED_SF, read_sleb, 1),
        (op.GNU_NEGATIVE_OFFSET, read_uleb, -1),
    ):
        here = np.flatnonzero(own == opcode)
        is_saved[here] = True
        second = positions[found[here]] + 1
        second = second + read_uleb(code, second)[1]
        offsets[here] = sign * read(code, second)[0]
    return is_saved, offsets * _factors(instructions, found)


def _write_saved(instructions: Instructions, found: Ints, initial: _State, saved: Ints) -> None:
    opcodes = instructions.opcodes[found]
    values = np.full(len(found), RbpKind.UNDEFINED, dtype=np.int64)
    is_saved, offsets = _saved_at(instructions, found)
    fits = _is_short(offsets)
    values[is_saved & fits] = _saved(RbpKind.AT_CFA, offsets[is_saved & fits])
    values[opcodes == op.SAME_VALUE] = RbpKind.SAME
    restore = op.RESTORE + instructions.programs.register
    is_restored = (opcodes == op.RESTORE_EXTENDED) | (opcodes == restore)
    values[is_restored] = initial.saved[instructions.owners[found[is_restored]]]
    here = np.flatnonzero(opcodes == op.EXPRESSION)
    registers, offsets = _read_sums(instructions.code, *_blocks(instructions, found[here]))
    fits = _is_short(offsets)
    for register, kind in ((RBP, RbpKind.DEREF_RBP), (RSP, RbpKind.DEREF_RSP)):
        chosen = fits & (registers == register)
        values[here[chosen]] = _saved(kind, offsets[chosen])
    saved[found] = values


def _is_short(offsets: Ints) -> Flags:
    is_short: Flags = (offsets & 7 == 0) & (offsets >= -(8 << 15)) & (offsets < 8 << 15)
    return is_short


def _saved(kind: RbpKind, offset: Ints | int) -> Ints | int:
    return int(kind) | (offset >> 3 & 0xFFFF) << 8


def _write_return_address(
    instructions: Instructions, found: Ints, initial: _State, values: Ints
) -> None:
    opcodes = instructions.opcodes[found]
    states = np.full(len(found), _ELSEWHERE, dtype=np.int64)
    is_saved, offsets = _saved_at(instructions, found)
    states[is_saved & (offsets == -8)] = _AT_CFA_MINUS_8
    states[opcodes == op.UNDEFINED_REGISTER] = _UNDEFINED
    is_restored = (opcodes == op.RESTORE_EXTENDED) | (opcodes == op.RESTORE + RETURN_ADDRESS)
    states[is_restored] = initial.return_address[instructions.owners[found[is_restored]]]
    here = np.flatnonzero(opcodes == op.EXPRESSION)
    registers, offsets = _read_sums(instructions.code, *_blocks(instructions, found[here]))
    states[here[(registers == RSP) & (offsets == _UCONTEXT_RIP)]] = _IN_UCONTEXT
    here = np.flatnonzero(opcodes == op.REGISTER)
    second = instructions.positions[found[here]] + 1
    second = second + read_uleb(instructions.code, second)[1]
    registers = read_uleb(instructions.code, second)[0]
    is_general = registers < RETURN_ADDRESS
    states[here[is_general]] = _IN_REGISTER + registers[is_general]
    values[found] = states


# Operations of expressions: DWARF 5, section 7.7.1.
_DW_OP_DEREF, _DW_OP_PLUS_UCONST, _DW_OP_LIT0, _DW_OP_BREG = 0x06, 0x23, 0x30, 0x70


def _blocks(instructions: Instructions, found: Ints) -> tuple[Ints, Ints]:
    """Return where the expressions of instructions begin and end."""
    code = instructions.code
    sizes_at, starts = block_at(code, instructions.positions[found])
    ends = starts + read_uleb(code, sizes_at)[0]
    # Those that extend beyond their program are broken: their result is not used.
    limit = len(code) - PADDING_BYTES
    return np.minimum(starts, limit), np.minimum(ends, limit)


def _read_sum(code: Bytes, at: Ints) -> tuple[Ints, Ints, Ints]:
    """Read `DW_OP_bregN offset`: return N, the offset and its end; N is -1 for other operations."""
    offsets, widths = read_sleb(code, at + 1)
    registers = code[at].astype(np.int64) - _DW_OP_BREG
    registers[(registers < 0) | (registers > RETURN_ADDRESS)] = -1
    return registers, offsets, at + 1 + widths


def _read_sums(code: Bytes, starts: Ints, ends: Ints) -> tuple[Ints, Ints]:
    registers, offsets, after = _read_sum(code, starts)
    registers[after != ends] = -1
    return registers, offsets


def _read_cfa_expressions(code: Bytes, starts: Ints, ends: Ints) -> Ints:
    """Return finished rules for the expressions that compilers and linkers use, else `_NO_BASE`."""
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
    for register, kind in ((RBP, CfaKind.DEREF_RBP), (RSP, CfaKind.DEREF_RSP)):
        chosen = is_deref & (registers == register)
        low, high = offsets[chosen] >> 3 & 0xFF, addends[chosen] >> 3
        bases[chosen] = _ready(kind, 0) | low | high << 8
    return bases


# breg7 8; breg16 0; lit15; and; litN; ge; lit3; shl; plus (binutils' elfxx-x86.c).
_PLT_EXPRESSION = bytes.fromhex("770880003f1a002a332422")
_PLT_LIT_AT = 6
_PLT_KINDS = {11: CfaKind.PLT, 10: CfaKind.PLT_LAZY, 9: CfaKind.PLT_LAZY}
