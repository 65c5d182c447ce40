"""Find the code of CPython's evaluation loop, `_PyEval_EvalFrameDefault`.

Compilers move what they take for rare out of a function, and with profiles of a training run that
may be most of it: of Debian's python3.14, 1,184 bytes of the loop are in the function and 84,423 in
`_PyEval_EvalFrameDefault.cold`. .symtab names such parts. In a stripped file they are found without
names: a part that is jumped to has an FDE of its own, whose first rule is not that of a function's
entry, and at the jump the same rule is in force as at its target.

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
    starts, ends = _find_parts(elf, rules)
    found = set(parts)
    while found and len(parts) < MAX_RANGES and _size_of(parts) < _MAX_LOOP_BYTES:
        code = found.pop()
        for number in _find_jumps(elf, rules, code, (starts, ends)):
            part = int(starts[number]), int(ends[number])
            if not any(start <= part[0] and part[1] <= end for start, end in parts):
                parts.add(part)
                found.add(part)
    return _join(parts) if _size_of(parts) < _MAX_LOOP_BYTES else ()


def _is_code(elf: Elf, symbol: Symbol) -> bool:
    start, end = symbol.address, symbol.address + symbol.size
    return any(s.p_vaddr <= start <= end <= s.p_vaddr + s.p_filesz for s in elf.segments)


def _size_of(parts: set[Range]) -> int:
    return sum(end - start for start, end in parts)


def _find_parts(elf: Elf, rules: Rules) -> tuple[Wide, Wide]:
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
_DISPLACEMENT_BYTES = 4


def _find_jumps(elf: Elf, rules: Rules, code: Range, parts: tuple[Wide, Wide]) -> list[int]:
    """Return the numbers of the parts that the code between two addresses jumps to."""
    starts, ends = parts
    start, end = code
    segment = next((s for s in elf.segments if 0 <= start - s.p_vaddr < s.p_filesz), None)
    if segment is None or end > segment.p_vaddr + segment.p_filesz or not len(starts):
        return []
    content = elf.source.read_at(start - segment.p_vaddr + segment.p_offset, end - start)
    opcodes = np.frombuffer(content[:-_DISPLACEMENT_BYTES], np.uint8)
    is_jump = opcodes == _JUMP
    is_jump[1:] |= (opcodes[:-1] == _PREFIX) & (opcodes[1:] & 0xF0 == _CONDITIONAL)
    places = np.flatnonzero(is_jump)
    words = np.ndarray((len(content) - 3,), "<i4", content, strides=(1,))
    sources = (start + places).astype(np.uint64)
    targets = (start + places + 5 + words[places + 1]).astype(np.uint64)
    numbers = np.searchsorted(starts, targets, side="right") - 1
    is_inside = (numbers >= 0) & (targets < ends[numbers])
    is_inside &= (targets < np.uint64(start)) | (targets >= np.uint64(end))
    is_inside[is_inside] = rules.at(sources[is_inside]) == rules.at(targets[is_inside])
    found: list[int] = np.unique(numbers[is_inside]).tolist()
    return found


def _join(parts: set[Range]) -> tuple[Range, ...]:
    """Return the union of the parts."""
    joined: list[Range] = []
    for start, end in sorted(parts):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return tuple(joined)
