"""What an unwind rule is: how a frame's CFA and its caller's rbp are found from the registers.

A rule fits into 8 bytes with the low bits of the address from which on it holds: the rows that the
walk in the kernel bisects.
"""

import enum
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from symbolizer.integers import Wide


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


Range = tuple[int, int, int]
"""First address, end, rule."""


class Rules(NamedTuple):
    """Rows before they are cut into pages: an address and a number whose low 16 bits are free.

    Sorted by address. A rule holds up to the next, which is another; before the first is a HOLE.
    """

    addresses: Wide
    rules: Wide

    @classmethod
    def of_ranges(cls, ranges: Iterable[Range]) -> "Rules":
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
