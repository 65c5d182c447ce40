"""Find jumps and references in code, without decoding its instructions.

They are looked for at each byte, as if an instruction, or its operand, began there. What is found
has to be checked: a jump does not move the CFA, so the unwind rules of both its ends give the same.
"""

from collections.abc import Iterable

import numpy as np

from symbolizer.integers import Ints, Wide, view
from symbolizer.symbols.elf import Elf
from symbolizer.unwind.rules import CfaKind, rule

Range = tuple[int, int]
"""First address, end."""
Ranges = tuple[Wide, Wide]
"""First addresses and ends, sorted."""

AT_ENTRY = np.uint64(rule(CfaKind.RSP, 1))
"""The rule at a function's first instruction."""

MAX_CODE_BYTES = 4 << 20
"""Of one piece of code; a larger one has no jumps."""

# Jumps with a displacement of 32 bits: jmp, and jcc with its prefix.
_JUMP = 0xE9
_PREFIX, _CONDITIONAL = 0x0F, 0x80
_JUMP_BYTES = 5
WORD_BYTES = 4


def find_jumps(elf: Elf, codes: Iterable[Range]) -> tuple[Wide, Wide]:
    """Return where jumps that leave their piece of code are, and their targets.

    Raises:
        UnreadableElf: the file was truncated meanwhile.
    """
    sources, targets = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint64)]
    for start, end in codes:
        content = np.frombuffer(read_code(elf, (start, end)), np.uint8)
        if len(content) < _JUMP_BYTES:
            continue
        opcodes = content[: len(content) - WORD_BYTES]
        is_jump = opcodes == _JUMP
        is_jump[1:] |= (opcodes[:-1] == _PREFIX) & (opcodes[1:] & 0xF0 == _CONDITIONAL)
        places = np.flatnonzero(is_jump)
        found = (start + places + _JUMP_BYTES + view(content, "<i4")[places + 1]).astype(np.uint64)
        leaves = (found < np.uint64(start)) | (found >= np.uint64(end))
        sources.append((start + places[leaves]).astype(np.uint64))
        targets.append(found[leaves])
    return np.concatenate(sources), np.concatenate(targets)


def find_words(content: bytes, start: int, address: int) -> Ints:
    """Return where operands of code at `start` have an address: itself, or as a distance."""
    if len(content) < WORD_BYTES:
        return np.zeros(0, np.int64)
    words = view(np.frombuffer(content, np.uint8), "<i4").astype(np.int64)
    is_found = words == address
    words += np.arange(start + WORD_BYTES, start + WORD_BYTES + len(words))
    places: Ints = np.flatnonzero(is_found | (words == address))
    return places


def number_of(ranges: Ranges, addresses: Wide) -> Ints:
    """Return the number of the range that each address is in, -1 if it is in none."""
    starts, ends = ranges
    if not len(starts):
        return np.full(len(addresses), -1)
    numbers = np.searchsorted(starts, addresses, side="right") - 1
    numbers[addresses >= ends[numbers]] = -1
    return numbers


def read_code(elf: Elf, code: Range) -> bytes:
    """Return the bytes of code; none if it is too large, or not in one executable segment."""
    start, end = code
    if not 0 < end - start <= MAX_CODE_BYTES:
        return b""
    for p_vaddr, p_offset, p_filesz in elf.segments:
        if p_vaddr <= start and end <= p_vaddr + p_filesz:
            return elf.source.read_at(start - p_vaddr + p_offset, end - start)
    return b""


def take(ranges: Ranges, numbers: Ints) -> list[Range]:
    starts, ends = ranges
    return list(zip(starts[numbers].tolist(), ends[numbers].tolist(), strict=True))
