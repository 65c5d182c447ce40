"""Define unwind rules: how a frame's CFA and its caller's rbp are computed from the registers.

A rule and the low bits of its first address fit into 8 bytes. Such rows are bisected by the walk in
the kernel.

A file's rules also say where the caller's rbx is, if some of its CFAs are based on rbx: glibc's
lazy binding (`_dl_runtime_resolve`) aligns the stack and keeps the old stack pointer there. The
functions that it calls, and that save rbx, are in the same file: no other file's table grows.
"""

import enum
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from symbolizer.integers import Wide


class CfaKind(enum.IntEnum):
    """How a frame's CFA is computed. Below, `cfa` is the row's operand, in units of 8 bytes."""

    HOLE = 0
    """No FDE covers the address."""
    RSP = 1
    """rsp + 8 * cfa."""
    RBP = 2
    """rbp + 8 * cfa."""
    PLT = 3
    """rsp + 8, and 8 more from byte `cfa` (11) of the stub's 16 bytes on: after its push."""
    PLT_LAZY = 4
    """The same in stubs that begin with a landing pad: from byte 9 on, or 10 from old linkers."""
    DEREF_RBP = 5
    """*(rbp + 8 * low byte of cfa, signed) + 8 * high byte: functions that align the stack."""
    DEREF_RSP = 6
    """The same from rsp: hand-written assembly of OpenSSL."""
    SIGNAL = 7
    """The registers are in the ucontext at rsp, from which rt_sigreturn restores them."""
    STOP = 8
    """There is no caller."""
    UNSUPPORTED = 9
    """There is a rule, but none of these kinds."""
    FRAME_POINTER = 10
    """The file has no rule here, but its compiler keeps frame pointers."""
    CLONE = 11
    """After the system call that creates a thread: rsp + 8; in the new thread (rax is 0), STOP."""
    OTHER_STACK = 12
    """As FRAME_POINTER, and rbp may be lower than rsp: the caller is on another stack."""
    REGISTER = 16
    """And above: this plus DWARF's number of a register; the CFA is that register + 8 * cfa. Such
    registers are known only in the leaf and in frames that a signal interrupted; rbx also where all
    frames below say where it is."""
    RETURN_REGISTER = 32
    """And above: this plus the number of the register that holds the return address; the CFA is
    rsp + 8 * cfa. glibc's vfork() needs it."""


EVALUATES = 0x80
"""Added to the CfaKind of a row in CPython's evaluation loop: where a walk leaves such a frame, a
chain of Python frames belongs. How it is left is the same."""


class RbpKind(enum.IntEnum):
    """Where the caller's rbp is. Below, `rbp` is the row's operand, in units of 8 bytes."""

    SAME = 0
    AT_CFA = 1
    """At CFA + 8 * rbp."""
    DEREF_RBP = 2
    """At rbp + 8 * rbp."""
    UNDEFINED = 3
    """Lost, or saved in a way that is not supported."""
    DEREF_RSP = 4
    """At rsp + 8 * rbp."""


RBX_SHIFT = 3
RBX_UNKNOWN, RBX_SAME, RBX_MAX = 0, 1, 31
"""The bits of `rbp_kind` above RbpKind say where the caller's rbx is: not known, where it was, or
so many words below the CFA, from 2 on (at CFA - 8 is the return address)."""


ROW = np.dtype(
    [("pc_low", "<u2"), ("cfa", "<u2"), ("cfa_kind", "u1"), ("rbp_kind", "u1"), ("rbp", "<i2")]
)
"""A rule, and the low 16 bits of the first ELF address it applies to. In `cfa_kind` the low 7 bits
are CfaKind, the highest is EVALUATES. In `rbp_kind` the low 3 bits are RbpKind, those above say
where rbx is."""


def rule(kind: CfaKind, cfa: int = 0) -> int:
    """Return a rule as one number: a row's bits with `pc_low` 0 and rbp the SAME."""
    return int(kind) << 32 | cfa << 16


Range = tuple[int, int, int]
"""First address, end, rule."""


class Rules(NamedTuple):
    """Rules before they are cut into pages: addresses, and rules as numbers.

    Sorted by address. A rule holds up to the next one, which differs; before the first is a HOLE.
    """

    addresses: Wide
    rules: Wide

    @classmethod
    def of_ranges(cls, ranges: Iterable[Range]) -> "Rules":
        """Return the rules of disjoint ranges, with HOLEs between them."""
        edges: dict[int, int] = {}
        for start, end, number in sorted(ranges):
            edges[start] = number
            edges[end] = rule(CfaKind.HOLE)
        in_order = sorted(edges.items())
        columns = np.array(in_order, dtype=np.uint64).reshape(-1, 2)
        return cls(columns[:, 0], columns[:, 1])

    def over(self, lower: "Rules") -> "Rules":
        """Return these rules, and where they have a HOLE, those of `lower`."""
        if not len(self.rules) or not len(lower.rules):
            return self if len(self.rules) else lower
        addresses = np.concatenate([self.addresses, lower.addresses])
        addresses.sort(kind="stable")  # merges the two; np.unique takes 30 times as long
        addresses = addresses[np.append(True, addresses[1:] != addresses[:-1])]
        own = self.at(addresses)
        rules = np.where(own == rule(CfaKind.HOLE), lower.at(addresses), own)
        return Rules(addresses, rules).without_repetitions()

    def marked(self, ranges: Iterable[tuple[int, int]]) -> "Rules":
        """Return the rules with EVALUATES in disjoint, sorted ranges, except in HOLEs."""
        edges = np.array(list(ranges), dtype=np.uint64).reshape(-1)
        addresses = np.union1d(self.addresses, edges)
        rules = self.at(addresses)
        is_marked = np.searchsorted(edges, addresses, side="right") % 2 == 1
        rules[is_marked & (rules != rule(CfaKind.HOLE))] |= np.uint64(EVALUATES << 32)
        return Rules(addresses, rules).without_repetitions()

    def without_repetitions(self) -> "Rules":
        is_new = np.ones(len(self.rules), dtype=np.bool_)
        is_new[1:] = self.rules[1:] != self.rules[:-1]
        return Rules(self.addresses[is_new], self.rules[is_new])

    def at(self, addresses: Wide) -> Wide:
        """Return the rule at each address."""
        places = np.searchsorted(self.addresses, addresses, side="right")
        return np.append(np.uint64(rule(CfaKind.HOLE)), self.rules)[places]
