"""Walk copied stacks: the registers of many threads and their stack memory in, addresses out.

The rules are those of the walk in the kernel (bpf/unwind.bpf.h), which a test holds to the same
answers. Here they are executed in lock-step: at each step every stack leaves one frame, so that the
cost of a step is shared by all stacks of a drain. Addresses are leaf first; those of callers are
one byte before their return address.
"""

import enum
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from symbolizer.integers import Wide
from symbolizer.unwind.rules import CfaKind, RbpKind

Places = npt.NDArray[np.intp]
Flags = npt.NDArray[np.bool_]

_WORD = np.uint64(8)
_LIMIT = np.uint64(1 << 47)
_LOWEST_CODE = np.uint64(4096)
_PAGE_BITS = np.uint64(12)
_REGISTERS = 16
_RAX, _RBP, _RSP = 0, 6, 7
# struct rt_sigframe at rsp when a handler has returned: the registers of its ucontext begin at 40.
_SIGNAL_REGISTERS_OFFSET = 40
_SIGNAL_ORDER = (8, 9, 10, 11, 12, 13, 14, 15, 5, 4, 6, 3, 1, 0, 2, 7)
"""DWARF numbers of the saved registers; the last word after them is rip."""


class Stop(enum.IntEnum):
    """Why a walk ends where it does, by the names and numbers that the kernel's walk has."""

    ROOT = 0
    NO_TABLE_YET = 4
    NO_TABLE = 5
    NO_MAPPING = 6
    HOLE = 7
    UNSUPPORTED_RULE = 8
    REGISTER_LOST = 9
    BAD_FRAME_POINTER = 10
    BAD_STACK_POINTER = 11
    CHAIN_END = 12
    UNREADABLE = 13
    TRUNCATED = 14
    NO_ROOM = 16


PENDING = 1000
"""In place of a Stop: what the walk needs may be there later."""
_GO_ON = 1001


class StackCopy(NamedTuple):
    """The registers of a thread and a part of its stack.

    Attributes:
        registers: by DWARF number.
        is_return_address: `pc` is that of the instruction after a call.
        start: the address of the first word of `memory`.
        unreadable: which pages of `memory` could not be read: a bit for each, the lowest first.
        is_cut: the stack may go on beyond `memory`.
    """

    registers: Wide
    pc: int
    is_return_address: bool
    start: int
    memory: Wide
    unreadable: int = 0
    is_cut: bool = False


class FoundRules(NamedTuple):
    """For each address the rule in force, and where there is none, why (or PENDING)."""

    rows: npt.NDArray[np.void]
    whys: npt.NDArray[np.int32]


FOUND = -1
"""In `whys`: there is a rule."""

FindRules = Callable[[Places, Wide], FoundRules]
"""Find rules: the number of a stack and an address of its process, for each."""


class WalkedStack(NamedTuple):
    """Addresses, leaf first, and a Stop or PENDING."""

    addresses: Wide
    stop: int


def walk(stacks: Sequence[StackCopy], find: FindRules, max_frames: int) -> list[WalkedStack]:
    """Walk all stacks; a stack whose rules are PENDING ends there."""
    if not stacks:
        return []
    state = _Walk(stacks)
    addresses = np.empty((len(stacks), max_frames), np.uint64)
    lengths = np.zeros(len(stacks), np.intp)
    active: Places = np.arange(len(stacks))
    for depth in range(max_frames):
        here = state.pc[active] - state.is_return[active]
        addresses[active, depth] = here
        lengths[active] += 1
        active = state.leave_frames(active, find(active, here))
        if not len(active):
            break
    state.stops[active] = Stop.TRUNCATED
    stops = state.final_stops().tolist()
    return [
        WalkedStack(addresses[i, :length].copy(), stop)
        for i, (length, stop) in enumerate(zip(lengths.tolist(), stops, strict=True))
    ]


def _is_user_code(addresses: Wide) -> Flags:
    result: Flags = (addresses >= _LOWEST_CODE) & (addresses < _LIMIT)
    return result


def _times_word(operands: npt.NDArray[np.generic]) -> Wide:
    """Return operands, which may be negative, in bytes."""
    return operands.astype(np.int64).astype(np.uint64) * _WORD


class _Walk:
    """Where each stack is by now. `at` are numbers of stacks, all arrays beside it as long."""

    def __init__(self, stacks: Sequence[StackCopy]) -> None:
        self.registers = np.array([stack.registers for stack in stacks], np.uint64)
        self.pc = np.array([stack.pc for stack in stacks], np.uint64)
        self.sp = self.registers[:, _RSP].copy()
        self.bp = self.registers[:, _RBP].copy()
        self.is_return = np.array([stack.is_return_address for stack in stacks], np.uint64)
        self.knows_bp = np.ones(len(stacks), np.bool_)
        self.knows_others = np.ones(len(stacks), np.bool_)
        self.stops = np.zeros(len(stacks), np.int32)
        self._starts = np.array([stack.start for stack in stacks], np.uint64)
        sizes = [len(stack.memory) for stack in stacks]
        self._sizes = np.array(sizes, np.uint64) * _WORD
        self._firsts = np.cumsum([0, *sizes[:-1]]).astype(np.uint64)
        # One word more, so that an unaligned one at the end has a neighbour.
        self._memory = np.concatenate([*(stack.memory for stack in stacks), np.zeros(1, np.uint64)])
        self._unreadable = np.array([stack.unreadable for stack in stacks], np.uint64)
        self._is_cut = np.array([stack.is_cut for stack in stacks], np.bool_)
        self._is_beyond = np.zeros(len(stacks), np.bool_)

    def final_stops(self) -> npt.NDArray[np.int32]:
        """Return why each ends; a stack that was copied in part is truncated."""
        is_part = (self.stops == Stop.UNREADABLE) & self._is_beyond & self._is_cut
        return np.where(is_part, np.int32(Stop.TRUNCATED), self.stops)

    def leave_frames(self, at: Places, found: FoundRules) -> Places:
        """Leave a frame of each stack; return the stacks that go on."""
        rows, whys = found
        kinds = rows["cfa_kind"]
        is_found = whys == FOUND
        is_common = is_found & ((kinds == CfaKind.RSP) | (kinds == CfaKind.RBP))
        if is_common.all():
            stops = self._leave_by_rules(at, rows)
        else:
            stops = np.empty(len(at), np.int32)
            for leave, chosen in (
                (self._leave_by_rules, is_common),
                (self._leave_by_rare_rules, is_found & ~is_common),
            ):
                if chosen.any():
                    stops[chosen] = leave(at[chosen], rows[chosen])
            is_missed = ~is_found
            if is_missed.any():
                stops[is_missed] = self._leave_without_rules(at[is_missed], whys[is_missed])
        goes_on = stops == _GO_ON
        if goes_on.all():
            return at
        self.stops[at] = stops
        left: Places = at[goes_on]
        return left

    def _leave_without_rules(
        self, at: Places, whys: npt.NDArray[np.int32]
    ) -> npt.NDArray[np.int32]:
        stops = np.full(len(at), PENDING, np.int32)
        chosen = whys != PENDING
        stops[chosen] = self._leave_by_frame_pointers(at[chosen], whys[chosen])
        return stops

    def _leave_by_rare_rules(self, at: Places, rows: npt.NDArray[np.void]) -> npt.NDArray[np.int32]:
        kinds = rows["cfa_kind"]
        stops = np.full(len(at), Stop.ROOT, np.int32)
        is_hole, is_signal = kinds == CfaKind.HOLE, kinds == CfaKind.SIGNAL
        without = is_hole | (kinds == CfaKind.FRAME_POINTER)
        is_root = (kinds == CfaKind.STOP) | (
            (kinds == CfaKind.CLONE)
            & self.knows_others[at]
            & (self.registers[at, _RAX] == 0)  # the thread that has just been made
        )
        by_register = kinds >= CfaKind.RETURN_REGISTER
        if without.any():
            whys = np.where(is_hole, Stop.HOLE, Stop.BAD_FRAME_POINTER).astype(np.int32)
            stops[without] = self._leave_by_frame_pointers(at[without], whys[without])
        for leave, chosen in (
            (self._leave_signal_frames, is_signal),
            (self._leave_by_registers, by_register),
            (self._leave_by_rules, ~(without | is_signal | is_root | by_register)),
        ):
            if chosen.any():
                stops[chosen] = leave(at[chosen], rows[chosen])
        return stops

    def _leave_by_frame_pointers(
        self, at: Places, whys: npt.NDArray[np.int32]
    ) -> npt.NDArray[np.int32]:
        """Leave frames by [bp], the caller's, and [bp + 8], the return address.

        `whys` say why there is no better way; they are the reasons when this one fails.
        """
        bp, is_only_way = self.bp[at], whys == Stop.BAD_FRAME_POINTER
        stops = whys.copy()
        stops[is_only_way & (bp == 0)] = Stop.CHAIN_END
        is_usable = self.knows_bp[at] & (bp >= self.sp[at]) & (bp < _LIMIT)
        is_usable &= (bp & np.uint64(7) == 0) & (bp != 0)
        saved, is_read = self._read(at, bp, 2)
        stops[is_usable & ~is_read & is_only_way] = Stop.UNREADABLE
        is_usable &= is_read
        pc = saved[:, 1]
        stops[is_usable & (pc == 0) & is_only_way] = Stop.CHAIN_END
        is_usable &= _is_user_code(pc)
        left = at[is_usable]
        self.pc[left] = pc[is_usable]
        self.sp[left] = bp[is_usable] + np.uint64(16)
        self.bp[left] = saved[is_usable, 0]
        self.is_return[left] = 1
        self.knows_others[left] = False
        stops[is_usable] = _GO_ON
        return stops

    def _leave_signal_frames(self, at: Places, _: npt.NDArray[np.void]) -> npt.NDArray[np.int32]:
        """Restore all registers that the kernel put on the stack for the handler's return."""
        words = len(_SIGNAL_ORDER) + 1
        saved, is_read = self._read(at, self.sp[at] + np.uint64(_SIGNAL_REGISTERS_OFFSET), words)
        is_code = _is_user_code(saved[:, -1])
        left, saved_there = at[is_read & is_code], saved[is_read & is_code]
        for place, register in enumerate(_SIGNAL_ORDER):
            self.registers[left, register] = saved_there[:, place]
        self.sp[left] = self.registers[left, _RSP]
        self.bp[left] = self.registers[left, _RBP]
        self.pc[left] = saved_there[:, -1]
        self.is_return[left] = 0
        self.knows_others[left] = True
        self.knows_bp[left] = True
        failed = np.where(is_read, Stop.BAD_STACK_POINTER, Stop.UNREADABLE)
        return np.where(is_read & is_code, _GO_ON, failed).astype(np.int32)

    def _leave_by_registers(self, at: Places, rows: npt.NDArray[np.void]) -> npt.NDArray[np.int32]:
        """Leave frames whose return address is in a register."""
        is_known = self.knows_others[at]
        left = at[is_known]
        numbers = rows["cfa_kind"][is_known] & (_REGISTERS - 1)
        self.pc[left] = self.registers[left, numbers]
        self.sp[left] += rows["cfa"][is_known].astype(np.uint64) * _WORD
        self.is_return[left] = 1
        self.knows_others[left] = False
        stops = np.full(len(at), Stop.REGISTER_LOST, np.int32)
        stops[is_known] = np.where(_is_user_code(self.pc[left]), _GO_ON, Stop.BAD_STACK_POINTER)
        return stops

    def _leave_by_rules(self, at: Places, rows: npt.NDArray[np.void]) -> npt.NDArray[np.int32]:
        cfa, stops = self._frame_addresses(at, rows)
        # A caller's frame lies higher, so that the walk ends whatever the memory holds.
        is_bad = (stops == _GO_ON) & ((cfa <= self.sp[at]) | (cfa >= _LIMIT))
        stops[is_bad] = Stop.BAD_STACK_POINTER
        saved, is_read = self._read(at, cfa - np.uint64(16), 2, stops == _GO_ON)
        stops[(stops == _GO_ON) & ~is_read] = Stop.UNREADABLE
        if not is_read.all():
            at, rows, cfa, saved = at[is_read], rows[is_read], cfa[is_read], saved[is_read]
        go_on = self._restore_rbp(at, rows, cfa, saved[:, 0])
        self.sp[at] = cfa
        self.pc[at] = pc = saved[:, 1]
        self.is_return[at] = 1
        self.knows_others[at] = False
        go_on[(go_on == _GO_ON) & ~_is_user_code(pc)] = Stop.BAD_STACK_POINTER
        go_on[(go_on == Stop.BAD_STACK_POINTER) & (pc == 0)] = Stop.CHAIN_END
        if is_read.all():
            return go_on
        stops[is_read] = go_on
        return stops

    def _restore_rbp(
        self, at: Places, rows: npt.NDArray[np.void], cfa: Wide, beside: Wide
    ) -> npt.NDArray[np.int32]:
        """Restore the callers' rbp; `beside` are the words below their return addresses."""
        stops = np.full(len(at), _GO_ON, np.int32)
        kinds, operands = rows["rbp_kind"], rows["rbp"]
        is_same = kinds == RbpKind.SAME
        if is_same.all():
            return stops
        is_beside = (kinds == RbpKind.AT_CFA) & (operands == -2)
        left = at[is_beside]
        self.bp[left] = beside[is_beside]
        self.knows_bp[left] = True
        others = np.flatnonzero(~(is_same | is_beside))
        if not len(others):
            return stops
        at, kinds = at[others], kinds[others]
        base = np.select(
            [kinds == RbpKind.AT_CFA, kinds == RbpKind.DEREF_RBP, kinds == RbpKind.DEREF_RSP],
            [cfa[others], self.bp[at], self.sp[at]],
            np.uint64(0),
        )
        is_saved = kinds != RbpKind.UNDEFINED
        is_saved &= kinds <= RbpKind.DEREF_RSP
        words, is_read = self._read(at, base + _times_word(operands[others]), 1, is_saved)
        stops[others[is_saved & ~is_read]] = Stop.UNREADABLE
        left = at[is_read]
        self.bp[left] = words[is_read, 0]
        self.knows_bp[left] |= kinds[is_read] != RbpKind.DEREF_RBP
        self.knows_bp[at[~is_saved]] = False
        return stops

    def _frame_addresses(
        self, at: Places, rows: npt.NDArray[np.void]
    ) -> tuple[Wide, npt.NDArray[np.int32]]:
        """Return the canonical frame addresses, from which all else is counted."""
        kinds, operands = rows["cfa_kind"], rows["cfa"].astype(np.uint64)
        stops = np.full(len(at), _GO_ON, np.int32)
        is_by_rbp = kinds == CfaKind.RBP
        cfa: Wide = np.where(is_by_rbp, self.bp[at], self.sp[at]) + operands * _WORD
        stops[is_by_rbp & ~self.knows_bp[at]] = Stop.REGISTER_LOST
        rare = np.flatnonzero(~is_by_rbp & (kinds != CfaKind.RSP))
        if len(rare):
            cfa[rare], stops[rare] = self._rare_frame_addresses(
                at[rare], kinds[rare], operands[rare]
            )
        return cfa, stops

    def _rare_frame_addresses(
        self, at: Places, kinds: npt.NDArray[np.uint8], operands: Wide
    ) -> tuple[Wide, npt.NDArray[np.int32]]:
        stops = np.full(len(at), _GO_ON, np.int32)
        cfa = self.sp[at] + _WORD  # as after the system call that makes a thread
        is_plt = (kinds == CfaKind.PLT) | (kinds == CfaKind.PLT_LAZY)
        has_pushed = is_plt & (self.pc[at] & np.uint64(15) >= operands)
        cfa[has_pushed] += _WORD
        by_rbp = kinds == CfaKind.DEREF_RBP
        is_read_from = by_rbp | (kinds == CfaKind.DEREF_RSP)
        base = np.where(by_rbp, self.bp[at], self.sp[at])
        offsets = _times_word((operands & np.uint64(0xFF)).astype(np.uint8).view(np.int8))
        is_lost = by_rbp & ~self.knows_bp[at]
        words, is_read = self._read(at, base + offsets, 1, is_read_from & ~is_lost)
        cfa[is_read] = words[is_read, 0] + (operands[is_read] >> np.uint64(8)) * _WORD
        stops[is_read_from & ~is_read] = Stop.UNREADABLE
        by_register = kinds >= CfaKind.REGISTER
        registers = self.registers[at, kinds & (_REGISTERS - 1)]
        cfa[by_register] = registers[by_register] + operands[by_register] * _WORD
        is_lost |= by_register & ~self.knows_others[at]
        stops[is_lost] = Stop.REGISTER_LOST
        is_followed = is_plt | is_read_from | by_register | (kinds == CfaKind.CLONE)
        stops[~is_followed] = Stop.UNSUPPORTED_RULE
        return cfa, stops

    def _read(
        self, at: Places, addresses: Wide, words: int, wanted: Flags | None = None
    ) -> tuple[Wide, Flags]:
        """Read words of each stack: values, a row each, and whether all of them could be read."""
        offsets = addresses - self._starts[at]
        size = np.uint64(words) * _WORD
        sizes = self._sizes[at]
        is_inside: Flags = (offsets < sizes) & (size <= sizes - offsets)
        if wanted is not None:
            is_inside &= wanted
        failed = ~is_inside if wanted is None else wanted & ~is_inside
        if failed.any():
            # `offsets` wraps around below the copy, so that this is so above it only.
            self._is_beyond[at[failed]] = offsets[failed] + size < _LIMIT
        if self._unreadable[at].any():
            is_inside &= ~self._is_in_hole(at, addresses, size)
        indices = self._firsts[at] + (offsets >> np.uint64(3))
        indices[~is_inside] = 0
        taken = indices[:, None] + np.arange(words, dtype=np.uint64)
        values = self._memory[np.minimum(taken, np.uint64(len(self._memory) - 1))]
        bits = (offsets & np.uint64(7)) << np.uint64(3)
        if bits[is_inside].any():
            after = np.minimum(taken + np.uint64(1), np.uint64(len(self._memory) - 1))
            shift = bits[:, None]
            high = self._memory[after] << (np.uint64(63) - shift) << np.uint64(1)
            values = np.where(shift == 0, values, values >> shift | high)
        return values, is_inside

    def _is_in_hole(self, at: Places, addresses: Wide, size: np.uint64) -> Flags:
        """Return whether words that lie inside a copy touch a page that could not be read."""
        pages = self._starts[at] >> _PAGE_BITS
        first = (addresses >> _PAGE_BITS) - pages
        last = ((addresses + size - np.uint64(1)) >> _PAGE_BITS) - pages
        masks = self._unreadable[at]
        most = np.uint64(63)
        touched = masks >> np.minimum(first, most) | masks >> np.minimum(last, most)
        result: Flags = touched & np.uint64(1) != 0
        return result
