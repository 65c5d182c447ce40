"""Find where symbols without a size (labels of hand-written assembly) end at the latest.

The next symbol may be far away if a file is partly stripped. But functions that have lost their
symbols are known by their FDEs, and by the code that calls them or takes their address.
"""

from dataclasses import replace

import numpy as np

from symbolizer.integers import Bytes, Ints
from symbolizer.symbols.candidates import Candidates, Words
from symbolizer.symbols.elf import Elf

# Two instructions are not worth reading all code for. Larger code is not searched to its end: the
# limits are for crafted files, since labels are rare in programs of compilers.
_SHORT_BYTES = 16
_MAX_SEARCHED_BYTES = 64 << 20
_MAX_UNALIGNED = 1 << 16
_PIECE_BYTES = 1 << 20

_CALL = 0xE8
_LEA, _RIP_RELATIVE = 0x8D, 0x05  # `lea distance(%rip), %register`: the second is of its ModRM
_DISTANCE_BYTES = 4
_LONGEST_BYTES = 6
_ALIGNMENT = 16
_RETURN, _JUMP, _SHORT_JUMP = 0xC3, 0xE9, 0xEB
_FILLERS = (0x00, 0x90, 0xCC)  # the last bytes of the nops that assemblers write, and int3


def bound_labels(
    elf: Elf, base: int, symbols: Candidates, fde_ranges: tuple[Words, Words]
) -> Candidates:
    """Return sorted symbols of which those without a size end before the next known function.

    Offsets count from `base`, and FDE ranges are sorted.
    """
    labels = np.flatnonzero(~symbols.is_sized)
    if not len(labels):
        return symbols
    starts, ends = symbols.starts[labels], symbols.ends[labels].copy()
    # The start of the next symbol that is not at the same place.
    after = np.searchsorted(symbols.starts, starts, side="right")
    ends = np.minimum(ends, _at(symbols.starts, after))
    natural = ends.copy()
    fde_starts, fde_ends = fde_ranges
    following = np.searchsorted(fde_starts, starts, side="right")
    ends = np.minimum(ends, _at(fde_starts, following))
    around = np.maximum(following - 1, 0)
    if len(fde_starts):
        is_within = (fde_starts[around] <= starts) & (starts < fde_ends[around])
        ends[is_within] = np.minimum(ends, fde_ends[around])[is_within]
    is_open = (ends == natural) & (ends - starts > _SHORT_BYTES) & (after < len(symbols.starts))
    is_open |= (ends == natural) & (after == len(symbols.starts)) & (ends > starts + _SHORT_BYTES)
    if is_open.any():
        called = _find_called(elf, base, int(starts[is_open].min()), int(ends[is_open].max()))
        next_called = _at(called, np.searchsorted(called, starts, side="right"))
        ends[is_open] = np.minimum(ends, next_called)[is_open]
    bounded = symbols.ends.copy()
    bounded[labels] = ends
    return replace(symbols, ends=bounded)


def _at(numbers: Words, places: Ints) -> Words:
    """Return the number at each place, the largest possible one beyond the last."""
    found: Words = np.append(numbers, np.uint32(0xFFFFFFFF))[places]
    return found


def _find_called(elf: Elf, base: int, first: int, end: int) -> Words:
    """Return the offsets between two where functions begin that code of the file refers to, sorted.

    Code is not decoded one instruction after the other, so what looks like a call may be something
    else. Only what is aligned, or follows the end of a function, counts as the start of one.
    """
    found = [np.zeros(0, dtype=np.int64)]
    left = _MAX_SEARCHED_BYTES
    for _, p_offset, p_filesz in elf.segments:
        size = min(p_filesz, left)
        left -= size
        for start in range(0, size, _PIECE_BYTES):
            length = min(_PIECE_BYTES + _LONGEST_BYTES - 1, size - start)
            code = np.frombuffer(elf.source.read_at(p_offset + start, length), dtype=np.uint8)
            targets = _targets(code) + (p_offset + start - base)
            found.append(targets[(targets > first) & (targets < end)])
    targets = np.sort(np.concatenate(found))  # np.unique takes 30 times as long
    targets = targets[np.append(True, targets[1:] != targets[:-1])[: len(targets)]]
    is_start = (targets + base) % _ALIGNMENT == 0
    unaligned = np.flatnonzero(~is_start)[:_MAX_UNALIGNED]
    is_start[unaligned] = [_follows_end(elf, at + base) for at in targets[unaligned].tolist()]
    starts: Words = targets[is_start].astype(np.uint32)
    return starts


def _targets(code: Bytes) -> Ints:
    """Return what calls and `lea` refer to, counted from the start of the code."""
    calls = np.flatnonzero(code[: -_DISTANCE_BYTES - 1] == _CALL) + 1
    leas = np.flatnonzero((code[:-5] == _LEA) & (code[1:-4] & 0xC7 == _RIP_RELATIVE)) + 2
    at = np.concatenate([calls, leas])
    distances = np.zeros(len(at), dtype=np.uint32)
    for k in range(_DISTANCE_BYTES):
        distances |= code[at + k].astype(np.uint32) << np.uint32(8 * k)
    targets: Ints = at + _DISTANCE_BYTES + distances.view(np.int32)
    return targets


def _follows_end(elf: Elf, offset: int) -> bool:
    """Return whether the bytes before a file offset return, jump or fill a gap."""
    if offset < _LONGEST_BYTES:
        return False
    before = elf.source.read_at(offset - 5, 5)
    is_jump = before[0] == _JUMP or before[3] == _SHORT_JUMP
    return before[4] == _RETURN or before[4] in _FILLERS or is_jump
