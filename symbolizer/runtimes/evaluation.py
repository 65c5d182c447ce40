"""Find the code of CPython's evaluation loop, `_PyEval_EvalFrameDefault`.

Compilers move what they take for rare out of a function, and with profiles of a training run that
may be most of it: of Debian's python3.14, 1,184 bytes of the loop are in the function and 84,423 in
`_PyEval_EvalFrameDefault.cold`. .symtab names such parts. In a stripped file they are found without
names: a part that is jumped to, and that jumps back, has an FDE of its own, whose first rule is not
that of a function's entry, and at each jump the same rule is in force as at its target.

An interpreter whose handlers of instructions are functions (tail_calls.py) has two kinds of code:
what calls the first of them, whose frames are evaluations, and the handlers, in which the time of a
Python function is spent.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from symbolizer.runtimes.image import MAX_RANGES
from symbolizer.runtimes.jumps import (
    AT_ENTRY,
    MAX_CODE_BYTES,
    Range,
    Ranges,
    find_jumps,
    number_of,
    take,
)
from symbolizer.runtimes.tail_calls import find_evaluating, find_handlers
from symbolizer.symbols.elf import Elf
from symbolizer.symbols.named import Symbol
from symbolizer.unwind.fde_ranges import read_fde_ranges
from symbolizer.unwind.rules import CfaKind, Rules, rule

EVALUATION_LOOP = b"_PyEval_EvalFrameDefault"

_MAX_LOOP_BYTES = MAX_CODE_BYTES
"""Of all parts. The largest have 90 KB, in builds without optimization 300 KB."""
_MAX_EXAMINED_BYTES = 16 << 20
"""Of code that may be a part."""


class Loop(NamedTuple):
    """First addresses and ends of code, sorted; they are none if there is no loop.

    Attributes:
        evaluating: that whose frames are evaluations. There may be more of it: to take another
            frame of the interpreter for one does no harm where evaluations have addresses, as they
            do in all versions whose loop may be split into functions.
        parts: that in which functions of Python spend their time.
    """

    evaluating: tuple[Range, ...]
    parts: tuple[Range, ...]

    @property
    def is_split(self) -> bool:
        """Whether it is split into functions: then more than evaluations may be in `evaluating`."""
        return self.evaluating != self.parts


def find_evaluation_loop(elf: Elf, rules: Rules, symbols: Sequence[Symbol]) -> Loop:
    """Return the code of the loop.

    Args:
        elf: the interpreter's file.
        rules: its unwind rules, by ELF address.
        symbols: those whose names begin with that of the loop.

    Raises:
        UnreadableElf: damaged.
    """
    parts = {(s.address, s.address + s.size) for s in symbols if s.size and _is_code(elf, s)}
    if not any(s.name == EVALUATION_LOOP and s.size for s in symbols):
        return Loop((), ())
    ranges = _read_ranges(elf)
    if len(parts) <= MAX_RANGES and _size_of(parts) <= _MAX_LOOP_BYTES:
        parts = _with_jumped_to(elf, rules, parts, _find_others(ranges, rules))
    joined = _join(parts)
    if len(joined) > MAX_RANGES or _size_of(parts) > _MAX_LOOP_BYTES:
        return Loop((), ())
    handlers = find_handlers(elf, rules, ranges, joined)
    if handlers is None:
        return Loop(joined, joined)
    evaluating = _join({*parts, *find_evaluating(elf, ranges, handlers)})
    return Loop(_with_fewer_gaps(evaluating), _join({*parts, *handlers.code}))


def _read_ranges(elf: Elf) -> Ranges:
    starts, ends = read_fde_ranges(elf)
    order = np.argsort(starts, kind="stable")
    return starts[order], ends[order]


def _with_jumped_to(elf: Elf, rules: Rules, parts: set[Range], others: Ranges) -> set[Range]:
    """Add the parts that these jump to and that jump back."""
    found, unread = set(parts), sorted(parts)
    examined = 0
    while unread and len(found) <= MAX_RANGES and examined < _MAX_EXAMINED_BYTES:
        for part in _find_targets(elf, rules, unread.pop(), others):
            examined += part[1] - part[0]
            is_known = any(start <= part[0] and part[1] <= end for start, end in found)
            if is_known or examined > _MAX_EXAMINED_BYTES:
                continue
            starts, ends = np.array(_join(found), dtype=np.uint64).T
            if _find_targets(elf, rules, part, (starts, ends)):
                found.add(part)
                unread.append(part)
    return found


def _is_code(elf: Elf, symbol: Symbol) -> bool:
    start, end = symbol.address, symbol.address + symbol.size
    return any(s.p_vaddr <= start <= end <= s.p_vaddr + s.p_filesz for s in elf.segments)


def _size_of(parts: set[Range]) -> int:
    return sum(end - start for start, end in parts)


def _find_others(ranges: Ranges, rules: Rules) -> Ranges:
    """Return the FDE ranges that do not begin as functions do."""
    starts, ends = ranges
    at_start = rules.at(starts)
    is_part = (at_start != AT_ENTRY) & (at_start != rule(CfaKind.HOLE))
    return starts[is_part], ends[is_part]


def _find_targets(elf: Elf, rules: Rules, code: Range, parts: Ranges) -> list[Range]:
    """Return those parts that code jumps to, with the same rule in force at both ends."""
    sources, targets = find_jumps(elf, [code])
    numbers = number_of(parts, targets)
    is_inside = numbers >= 0
    is_inside[is_inside] = rules.at(sources[is_inside]) == rules.at(targets[is_inside])
    return take(parts, np.unique(numbers[is_inside]))


def _join(parts: Iterable[Range]) -> tuple[Range, ...]:
    """Return the union of the parts."""
    joined: list[Range] = []
    for start, end in sorted(parts):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return tuple(joined)


def _with_fewer_gaps(ranges: tuple[Range, ...]) -> tuple[Range, ...]:
    """Return MAX_RANGES at most: the smallest gaps between the ranges are filled."""
    ends, starts = [end for _, end in ranges[:-1]], [start for start, _ in ranges[1:]]
    gaps = sorted(zip(ends, starts, strict=True), key=lambda gap: gap[1] - gap[0])
    return _join([*ranges, *gaps[: max(0, len(ranges) - MAX_RANGES)]])
