"""Find the code of CPython's evaluation loop, `_PyEval_EvalFrameDefault`.

Compilers move what they take for rare out of a function, and with profiles of a training run that
may be most of it: of Debian's python3.14, 1,184 bytes of the loop are in the function and 84,423 in
`_PyEval_EvalFrameDefault.cold`. .symtab names such parts. In a stripped file they are found without
names: a part that is jumped to, and that jumps back, has an FDE of its own, whose first rule is not
that of a function's entry, and at each jump the same rule is in force as at its target.

An interpreter whose handlers are functions that call each other in tail position
(--with-tail-call-interp) needs nothing more: the handlers are called by
`_PyEval_EvalFrameDefault`, whose frame lies below theirs for the whole evaluation.
"""

from collections.abc import Sequence

import numpy as np

from symbolizer.integers import Wide
from symbolizer.runtimes.image import MAX_RANGES
from symbolizer.symbols.elf import Elf
from symbolizer.symbols.named import Symbol
from symbolizer.unwind.fde_ranges import read_fde_ranges
from symbolizer.unwind.rules import CfaKind, Rules, rule

EVALUATION_LOOP = b"_PyEval_EvalFrameDefault"

_MAX_LOOP_BYTES = 4 << 20
"""Of all parts. The largest have 90 KB, in builds without optimization 300 KB."""
_MAX_EXAMINED_BYTES = 16 << 20
"""Of code that may be a part."""
_AT_ENTRY = np.uint64(rule(CfaKind.RSP, 1))

Range = tuple[int, int]


def find_evaluation_loop(elf: Elf, rules: Rules, symbols: Sequence[Symbol]) -> tuple[Range, ...]:
    """Return the first addresses and ends of the loop's parts, sorted; none if there is no loop.

    Args:
        elf: the interpreter's file.
        rules: its unwind rules, by ELF address.
        symbols: those whose names begin with that of the loop.

    Raises:
        UnreadableElf: damaged.
    """
    parts = {(s.address, s.address + s.size) for s in symbols if s.size and _is_code(elf, s)}
    if not any(s.name == EVALUATION_LOOP and s.size for s in symbols):
        return ()
    if len(parts) <= MAX_RANGES and _size_of(parts) <= _MAX_LOOP_BYTES:
        parts = _with_jumped_to(elf, rules, parts)
    joined = _join(parts)
    return joined if len(joined) <= MAX_RANGES and _size_of(parts) <= _MAX_LOOP_BYTES else ()


def _with_jumped_to(elf: Elf, rules: Rules, parts: set[Range]) -> set[Range]:
    """Add the parts that these jump to and that jump back."""
    others = _find_others(elf, rules)
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


def _find_others(elf: Elf, rules: Rules) -> tuple[Wide, Wide]:
    """Return the FDE ranges that do not begin as functions do, sorted."""
    starts, ends = read_fde_ranges(elf)
    at_start = rules.at(starts)
    is_part = (at_start != _AT_ENTRY) & (at_start != rule(CfaKind.HOLE))
    order = np.argsort(starts[is_part], kind="stable")
    return starts[is_part][order], ends[is_part][order]


# Jumps with a displacement of 32 bits: jmp, and jcc with its prefix. They are looked for at each
# byte, as if an instruction began there: the rules at both ends tell which are jumps.
_JUMP = 0xE9
_PREFIX, _CONDITIONAL = 0x0F, 0x80
_JUMP_BYTES = 5


def _find_targets(elf: Elf, rules: Rules, code: Range, parts: tuple[Wide, Wide]) -> list[Range]:
    """Return those parts, given by their starts and ends, that code jumps to."""
    starts, ends = parts
    start, end = code
    segment = next((s for s in elf.segments if 0 <= start - s.p_vaddr < s.p_filesz), None)
    if segment is None or end > segment.p_vaddr + segment.p_filesz:
        return []
    if end - start <= _JUMP_BYTES or end - start > _MAX_LOOP_BYTES or not len(starts):
        return []
    content = elf.source.read_at(start - segment.p_vaddr + segment.p_offset, end - start)
    opcodes = np.frombuffer(content, np.uint8)[: 1 - _JUMP_BYTES]
    is_jump = opcodes == _JUMP
    is_jump[1:] |= (opcodes[:-1] == _PREFIX) & (opcodes[1:] & 0xF0 == _CONDITIONAL)
    places = np.flatnonzero(is_jump)
    words = np.ndarray((len(content) - 3,), "<i4", content, strides=(1,))
    sources = (start + places).astype(np.uint64)
    targets = (start + places + _JUMP_BYTES + words[places + 1]).astype(np.uint64)
    numbers = np.searchsorted(starts, targets, side="right") - 1
    is_inside = (numbers >= 0) & (targets < ends[numbers])
    is_inside &= (targets < np.uint64(start)) | (targets >= np.uint64(end))
    is_inside[is_inside] = rules.at(sources[is_inside]) == rules.at(targets[is_inside])
    return [(int(starts[n]), int(ends[n])) for n in np.unique(numbers[is_inside]).tolist()]


def _join(parts: set[Range]) -> tuple[Range, ...]:
    """Return the union of the parts."""
    joined: list[Range] = []
    for start, end in sorted(parts):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return tuple(joined)
