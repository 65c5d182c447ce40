"""Walk copied stacks: the registers of a thread and its stack memory in, addresses out.

The steps are those of the walk in the kernel (bpf/frame.bpf.h), which a test holds to the same
answers; what they are called there, they are called here. Addresses are leaf first; those of
callers are one byte before their return address.

A stack is walked by itself, at 2 us a frame. Letting all stacks of a drain leave one frame at a
time, with numpy, took ten times as long for 200 of them and twice as long for 2,000.
"""

import enum
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from symbolizer.integers import Wide
from symbolizer.unwind.rules import RBX_SAME, RBX_UNKNOWN, CfaKind, RbpKind

_WORD = 8
_ALL_BITS = (1 << 64) - 1
_LIMIT = 1 << 47
_LOWEST_CODE = 4096
_PAGE_BITS = 12
_REGISTERS = 16
_RAX, _RBX, _RBP, _RSP = 0, 3, 6, 7
# struct rt_sigframe at rsp when a handler has returned: the registers of its ucontext begin at 40.
_SIGNAL_REGISTERS_OFFSET = 40
_SIGNAL_ORDER = (8, 9, 10, 11, 12, 13, 14, 15, 5, 4, 6, 3, 1, 0, 2, 7)
"""DWARF numbers of the saved registers; the last word after them is rip."""

_ONE, _TWO = struct.Struct("<Q"), struct.Struct("<2Q")
_SIGNAL = struct.Struct(f"<{len(_SIGNAL_ORDER) + 1}Q")

# As locals of the module: an attribute of an enumeration is looked up at each frame otherwise.
_BY_RSP, _BY_RBP = int(CfaKind.RSP), int(CfaKind.RBP)
_BY_RBX = CfaKind.REGISTER + _RBX
_RBP_SAME, _RBP_AT_CFA = int(RbpKind.SAME), int(RbpKind.AT_CFA)


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


class Rule(NamedTuple):
    """A row of an unwind table, as rules.py defines its kinds and operands.

    `rbx` and EVALUATES are apart: whether the row is in CPython's evaluation loop.
    """

    cfa_kind: int
    cfa: int
    rbp_kind: int
    rbp: int
    rbx: int
    is_evaluation: bool = False


FindRule = Callable[[int, int], Rule | int]
"""Find the rule in force for the number of a stack and an address; a Stop or PENDING if none is."""


class WalkedStack(NamedTuple):
    """Addresses, leaf first, and a Stop or PENDING.

    Attributes:
        loops: places of frames of an interpreter's loop, each with its CFA.
    """

    addresses: Wide
    stop: int
    loops: tuple[tuple[int, int], ...] = ()


def walk(stacks: Sequence[StackCopy], find: FindRule, max_words: int) -> list[WalkedStack]:
    """Walk all stacks; a stack whose rules are PENDING ends there.

    A frame is a word, as in the kernel, and one of an interpreter's loop is two.
    """
    return [_walk(stack, number, find, max_words) for number, stack in enumerate(stacks)]


def _walk(stack: StackCopy, number: int, find: FindRule, max_words: int) -> WalkedStack:
    state = _Walk(stack)
    addresses: list[int] = []
    loops: list[tuple[int, int]] = []
    stop = _GO_ON
    while stop == _GO_ON:
        if len(addresses) + len(loops) >= max_words:
            stop = Stop.TRUNCATED
            break
        address = state.pc - state.is_return
        addresses.append(address)
        rule = find(number, address)
        if isinstance(rule, int):
            stop = PENDING if rule == PENDING else state.leave_by_frame_pointer(rule)
        elif rule[0] == _BY_RSP or rule[0] == _BY_RBP:
            stop = state.leave_by_rule(rule)
        else:
            stop = state.leave_by_rare_rule(rule)
        if stop == _GO_ON and not isinstance(rule, int) and rule.is_evaluation:
            loops.append((len(addresses) - 1, state.sp))
    if stop == Stop.UNREADABLE and state.is_beyond and stack.is_cut:
        stop = Stop.TRUNCATED  # it was copied in part
    return WalkedStack(np.array(addresses, np.uint64), int(stop), tuple(loops))


def _is_user_code(address: int) -> bool:
    return _LOWEST_CODE <= address < _LIMIT


class _Walk:
    """Where a stack is by now, and the steps that leave a frame: _GO_ON, or a Stop."""

    __slots__ = (
        *("_memory", "_registers", "_size", "_start", "_unreadable"),
        *("bp", "is_beyond", "is_return", "knows_bp", "knows_others", "knows_rbx", "pc", "sp"),
    )

    def __init__(self, stack: StackCopy) -> None:
        self._registers: list[int] = stack.registers.tolist()
        self.pc = stack.pc
        self.sp, self.bp = self._registers[_RSP], self._registers[_RBP]
        self.is_return = int(stack.is_return_address)
        self.knows_bp = self.knows_rbx = self.knows_others = True
        self.is_beyond = False
        self._start = stack.start
        self._memory = stack.memory.data
        self._size = stack.memory.nbytes
        self._unreadable = stack.unreadable

    def leave_by_frame_pointer(self, why: int) -> int:
        """Leave a frame by [bp], the caller's, and [bp + 8], the return address.

        `why` says why there is no better way; it is the reason when this one fails.
        """
        bp = self.bp
        is_only_way = why == Stop.BAD_FRAME_POINTER
        if bp == 0:
            return Stop.CHAIN_END if is_only_way else why
        if not self.knows_bp or bp < self.sp or bp >= _LIMIT or bp & 7:
            return why
        saved = self._read(bp, _TWO)
        if saved is None:
            return Stop.UNREADABLE if is_only_way else why
        if saved[1] == 0:
            return Stop.CHAIN_END if is_only_way else why
        if not _is_user_code(saved[1]):
            return why
        self.bp, self.pc = saved
        self.sp = bp + 2 * _WORD
        self.is_return, self.knows_rbx, self.knows_others = 1, False, False
        return _GO_ON

    def leave_by_rule(self, rule: Rule) -> int:  # noqa: C901, PLR0911 - runs for every frame
        cfa_kind, operand, rbp_kind, rbp, rbx, _ = rule
        if cfa_kind == _BY_RSP:
            cfa = self.sp + operand * _WORD & _ALL_BITS
        elif cfa_kind == _BY_RBP:
            if not self.knows_bp:
                return Stop.REGISTER_LOST
            cfa = self.bp + operand * _WORD & _ALL_BITS
        else:
            cfa, error = self._rare_frame_address(cfa_kind, operand)
            if error != _GO_ON:
                return error
        # A caller's frame lies higher, so that the walk ends whatever the memory holds.
        if not self.sp < cfa < _LIMIT:
            return Stop.BAD_STACK_POINTER
        saved = self._read(cfa - 2 * _WORD, _TWO)
        if saved is None:
            return Stop.UNREADABLE
        if rbp_kind == _RBP_SAME:
            pass
        elif rbp_kind == _RBP_AT_CFA and rbp == -2:
            self.bp, self.knows_bp = saved[0], True
        elif not self._restore_bp(rbp_kind, rbp, cfa):
            return Stop.UNREADABLE
        self.knows_rbx = rbx != RBX_UNKNOWN and self._restore_rbx(rbx, cfa)
        self.sp = cfa
        self.pc = pc = saved[1]
        self.is_return, self.knows_others = 1, False
        if pc == 0:
            return Stop.CHAIN_END
        return _GO_ON if _is_user_code(pc) else Stop.BAD_STACK_POINTER

    def leave_by_rare_rule(self, rule: Rule) -> int:  # noqa: PLR0911 - one for each kind
        kind = rule.cfa_kind
        if kind == CfaKind.STOP:
            return Stop.ROOT
        if kind == CfaKind.SIGNAL:
            return self._leave_signal_frame()
        if kind == CfaKind.HOLE:
            return self.leave_by_frame_pointer(Stop.HOLE)
        if kind == CfaKind.FRAME_POINTER:
            return self.leave_by_frame_pointer(Stop.BAD_FRAME_POINTER)
        if kind == CfaKind.OTHER_STACK:
            self.sp = 0  # wherever the caller's frame is, it may be
            return self.leave_by_frame_pointer(Stop.BAD_FRAME_POINTER)
        if kind == CfaKind.CLONE and self.knows_others and self._registers[_RAX] == 0:
            return Stop.ROOT  # the thread that has just been made
        if kind >= CfaKind.RETURN_REGISTER:
            return self._leave_by_register(rule)
        return self.leave_by_rule(rule)

    def _leave_signal_frame(self) -> int:
        """Restore all registers that the kernel put on the stack for the handler's return."""
        saved = self._read(self.sp + _SIGNAL_REGISTERS_OFFSET & _ALL_BITS, _SIGNAL)
        if saved is None:
            return Stop.UNREADABLE
        if not _is_user_code(saved[-1]):
            return Stop.BAD_STACK_POINTER
        for register, value in zip(_SIGNAL_ORDER, saved, strict=False):
            self._registers[register] = value
        self.sp, self.bp = self._registers[_RSP], self._registers[_RBP]
        self.pc, self.is_return = saved[-1], 0
        self.knows_bp = self.knows_rbx = self.knows_others = True
        return _GO_ON

    def _leave_by_register(self, rule: Rule) -> int:
        """Leave a frame whose return address is in a register."""
        if not self.knows_others:
            return Stop.REGISTER_LOST
        self.pc = self._value_of(rule.cfa_kind)
        self.sp = self.sp + rule.cfa * _WORD & _ALL_BITS
        self.is_return, self.knows_rbx, self.knows_others = 1, False, False
        return _GO_ON if _is_user_code(self.pc) else Stop.BAD_STACK_POINTER

    def _value_of(self, kind: int) -> int:
        return self._registers[kind & (_REGISTERS - 1)]

    def _restore_bp(self, kind: int, words: int, cfa: int) -> bool:
        """Restore the caller's rbp; False if it cannot be read."""
        if kind == RbpKind.AT_CFA:
            base = cfa
        elif kind == RbpKind.DEREF_RBP:
            base = self.bp
        elif kind == RbpKind.DEREF_RSP:
            base = self.sp
        else:
            self.knows_bp = False
            return True
        saved = self._read(base + words * _WORD & _ALL_BITS, _ONE)
        if saved is None:
            return False
        self.bp = saved[0]
        if kind != RbpKind.DEREF_RBP:
            self.knows_bp = True
        return True

    def _restore_rbx(self, place: int, cfa: int) -> bool:
        """Restore the caller's rbx; False if it is not known."""
        if place == RBX_SAME:
            return self.knows_rbx
        saved = self._read(cfa - place * _WORD & _ALL_BITS, _ONE)
        if saved is None:
            return False
        self._registers[_RBX] = saved[0]
        return True

    def _rare_frame_address(  # noqa: PLR0911 - one for each kind
        self, kind: int, operand: int
    ) -> tuple[int, int]:
        """Return the canonical frame address, and _GO_ON or why there is none."""
        after_call = self.sp + _WORD & _ALL_BITS
        if kind == CfaKind.CLONE:
            return after_call, _GO_ON
        if kind in (CfaKind.PLT, CfaKind.PLT_LAZY):
            has_pushed = self.pc & 15 >= operand
            return after_call + (_WORD if has_pushed else 0) & _ALL_BITS, _GO_ON
        if kind in (CfaKind.DEREF_RBP, CfaKind.DEREF_RSP):
            if kind == CfaKind.DEREF_RBP and not self.knows_bp:
                return 0, Stop.REGISTER_LOST
            base = self.bp if kind == CfaKind.DEREF_RBP else self.sp
            words = (operand & 0xFF ^ 0x80) - 0x80
            read = self._read(base + words * _WORD & _ALL_BITS, _ONE)
            if read is None:
                return 0, Stop.UNREADABLE
            return read[0] + (operand >> 8) * _WORD & _ALL_BITS, _GO_ON
        if kind < CfaKind.REGISTER:
            return 0, Stop.UNSUPPORTED_RULE
        if not (self.knows_rbx if kind == _BY_RBX else self.knows_others):
            return 0, Stop.REGISTER_LOST
        return self._value_of(kind) + operand * _WORD & _ALL_BITS, _GO_ON

    def _read(self, address: int, words: struct.Struct) -> tuple[int, ...] | None:
        """Return words of the stack; None if they were not copied."""
        offset = address - self._start
        if offset < 0 or offset + words.size > self._size:
            self.is_beyond = 0 <= offset < _LIMIT
            return None
        if self._unreadable and self._is_in_hole(address, words.size):
            return None
        return words.unpack_from(self._memory, offset)

    def _is_in_hole(self, address: int, size: int) -> bool:
        """Return whether words touch a page that could not be read."""
        page = self._start >> _PAGE_BITS
        first = (address >> _PAGE_BITS) - page
        last = (address + size - 1 >> _PAGE_BITS) - page
        return bool((self._unreadable >> first | self._unreadable >> last) & 1)
