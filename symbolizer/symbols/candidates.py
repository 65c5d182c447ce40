"""Choose one name for each address: turn overlapping symbols into disjoint functions.

A function inside another one owns its bytes, and the outer function those before and after it. Of
several names for one address the best is chosen: global before weak before local, not an alias of
glibc's own, few leading underscores, short.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint32]

AT_PLT = np.uint32(1 << 31)
"""Set in a name's position: the function is a PLT stub, shown with the suffix `@plt`."""

IN_FDE_RANGE = np.uint32(1 << 30)
"""Set instead of a name's position: the function is known only by its FDE range and has no name.
The other bits are the number of its first part; it has several if a name covers its middle."""

NO_FILE = np.uint32(0xFFFFFFFF)
"""Instead of a file's position: it is not known where the function is defined."""

# 400,000 functions take 22 MB while they are sorted and 5 MB afterwards (bench/bench_symbolize.py
# --library). Files beyond the largest programs (browsers, databases) are TOO_LARGE, so that the
# cost of a crafted file is bounded.
MAX_FUNCTIONS = 1 << 20

MAX_NAME_BYTES = 1 << 16
"""Longer names are cut."""

# Longer names count as this long when the best of several is chosen.
COMPARED_NAME_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Functions:
    """Disjoint ranges, sorted.

    Attributes:
        base: the file offset that `starts` and `ends` count from, so that 32 bits are enough.
        names: where each name begins in the concatenated strings, with AT_PLT; or IN_FDE_RANGE.
        files: where the name of the file begins in which each is defined, or NO_FILE; empty if no
            function has one.
        lines: and at which line, 0 if that is not known; as many as `files`.
    """

    base: int
    starts: Words
    ends: Words
    names: Words
    files: Words = field(default_factory=lambda: np.zeros(0, dtype=np.uint32))
    lines: Words = field(default_factory=lambda: np.zeros(0, dtype=np.uint32))


@dataclass(frozen=True, slots=True)
class Candidates:
    """Symbols as they are read: unsorted, several for an address, with and without a size.

    `ranks` are lower for better names: 0 global, 1 weak, 2 local, 3 PLT stub.
    """

    starts: Words
    ends: Words
    names: Words
    ranks: npt.NDArray[np.uint8]
    is_sized: npt.NDArray[np.bool_]

    @classmethod
    def join(cls, parts: Iterable["Candidates"]) -> "Candidates":
        parts = [NO_CANDIDATES, *parts]
        return cls(
            np.concatenate([part.starts for part in parts]),
            np.concatenate([part.ends for part in parts]),
            np.concatenate([part.names for part in parts]),
            np.concatenate([part.ranks for part in parts]),
            np.concatenate([part.is_sized for part in parts]),
        )

    def take(self, chosen: npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> "Candidates":
        return Candidates(
            self.starts[chosen],
            self.ends[chosen],
            self.names[chosen],
            self.ranks[chosen],
            self.is_sized[chosen],
        )


NO_CANDIDATES = Candidates(
    starts=np.zeros(0, dtype=np.uint32),
    ends=np.zeros(0, dtype=np.uint32),
    names=np.zeros(0, dtype=np.uint32),
    ranks=np.zeros(0, dtype=np.uint8),
    is_sized=np.zeros(0, dtype=np.bool_),
)


def name_preferences(strings: bytes, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return a number per name, lower for better ones.

    Worst are names in `__GI_` (glibc's own aliases), then those with more leading underscores, then
    longer ones.
    """
    text = np.frombuffer(strings + b"\0" * 6, dtype=np.uint8)
    terminators = np.flatnonzero(text == 0)
    lengths = terminators[np.searchsorted(terminators, positions)] - positions
    underscores = np.zeros(len(positions), dtype=np.int64)
    is_underscore = np.ones(len(positions), dtype=np.bool_)
    for k in range(5):
        is_underscore &= text[positions + k] == ord("_")
        underscores += is_underscore
    is_internal = np.ones(len(positions), dtype=np.bool_)
    for k, character in enumerate(b"__GI_"):
        is_internal &= text[positions + k] == character
    costs: npt.NDArray[np.int64] = np.minimum(lengths, COMPARED_NAME_BYTES)
    costs += (is_internal.astype(np.int64) << 20) + (underscores << 16)
    return costs


class Strings(Protocol):
    def preferences(self, positions: Words) -> npt.NDArray[np.int64]:
        """Return a number per name, lower for better ones; `positions` are sorted."""


def arrange(symbols: Candidates, strings: Strings, base: int) -> Functions:
    """Choose one name per address and make the ranges disjoint."""
    if not len(symbols.starts):
        return Functions(base, symbols.starts, symbols.ends, symbols.names)
    symbols = drop_aliases(symbols, strings)
    ends = symbols.ends
    # A label without a size inside a function is a jump target, not a function.
    covered = np.maximum.accumulate(np.where(symbols.is_sized, ends, np.uint32(0)))
    is_label = np.zeros(len(ends), dtype=np.bool_)
    is_label[1:] = ~symbols.is_sized[1:] & (covered[:-1] > symbols.starts[1:])
    symbols = symbols.take(~is_label)
    ends = symbols.ends.copy()
    unsized = np.flatnonzero(~symbols.is_sized[:-1])
    ends[unsized] = np.minimum(ends[unsized], symbols.starts[unsized + 1])
    starts, ends, names = _make_disjoint(symbols.starts, ends, symbols.names)
    return Functions(base, starts, ends, names)


def drop_aliases(symbols: Candidates, strings: Strings) -> Candidates:
    """Sort; keep the best name of each address, and before it the longest range if it is longer."""
    symbols = symbols.take(np.argsort(symbols.starts, kind="stable"))
    is_again = symbols.starts[1:] == symbols.starts[:-1]
    if not is_again.any():
        return symbols
    is_alias = np.append(is_again, False) | np.insert(is_again, 0, False)
    aliases = np.flatnonzero(is_alias)
    names = symbols.names[aliases] & ~AT_PLT
    by_name = np.argsort(names)
    costs = np.zeros(len(aliases), dtype=np.int64)
    costs[by_name] = strings.preferences(names[by_name])
    costs += symbols.ranks[aliases].astype(np.int64) << 32
    costs += (~symbols.is_sized[aliases]).astype(np.int64) << 40
    starts, ends = symbols.starts[aliases], symbols.ends[aliases]
    best = _first_of_each(starts, np.lexsort((costs, starts)))
    longest = _first_of_each(starts, np.lexsort((costs, -ends.astype(np.int64), starts)))
    reaches_further = symbols.is_sized[aliases[longest]] & (ends[longest] > ends[best])
    # In this order, the best name covers the start of the longer one.
    chosen = np.concatenate([np.flatnonzero(~is_alias), aliases[longest[reaches_further]]])
    chosen = np.concatenate([chosen, aliases[best]])
    return symbols.take(chosen[np.argsort(symbols.starts[chosen], kind="stable")])


def _first_of_each(starts: Words, order: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    in_order = starts[order]
    first: npt.NDArray[np.int64] = order[np.insert(in_order[1:] != in_order[:-1], 0, True)]
    return first


# Real files have a few dozen nested ranges. In a file crafted to have more than this many, the
# outer ranges are cut, which leaves addresses without a name but takes no time.
_MAX_NESTED = 100_000


def _make_disjoint(starts: Words, ends: Words, names: Words) -> tuple[Words, Words, Words]:
    """Assign each address to the range that starts last before it, else to the one around that."""
    reach = np.maximum.accumulate(ends)
    is_nested = starts[1:] < reach[:-1]
    if not is_nested.any():
        return starts, ends, names
    in_cluster = np.append(is_nested, False) | np.insert(is_nested, 0, False)
    nested = np.flatnonzero(in_cluster)
    if len(nested) > _MAX_NESTED:
        cut = np.minimum(ends[:-1], starts[1:])
        ends = np.append(cut, ends[-1:])
        keep = starts < ends
        return starts[keep], ends[keep], names[keep]
    pieces = np.array(
        _sweep(zip(*(c[nested].tolist() for c in (starts, ends, names)), strict=True)),
        dtype=np.uint32,
    ).reshape(-1, 3)
    apart = ~in_cluster
    starts, ends, names = (
        np.concatenate([column[apart], pieces[:, k]])
        for k, column in enumerate((starts, ends, names))
    )
    order = np.argsort(starts, kind="stable")
    return starts[order], ends[order], names[order]


def _sweep(ranges: Iterable[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    pieces: list[tuple[int, int, int]] = []
    around: list[tuple[int, int]] = []
    position = 0

    def close_until(limit: int) -> None:
        nonlocal position
        while around and position < limit:
            end, name = around[-1]
            if end <= limit:
                around.pop()
            if position < min(end, limit):
                pieces.append((position, min(end, limit), name))
                position = min(end, limit)
        position = limit

    for start, end, name in ranges:
        close_until(start)
        around.append((end, name))
    close_until(1 << 32)
    return pieces
