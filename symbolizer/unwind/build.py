"""Build the unwind table of an object file.

The rules come from call frame information (cfi.py, cfa.py); where that has holes, from known
handwritten code and from Go's table (handwritten.py, go.py). Those of CPython's evaluation loop are
marked (runtimes/cpython.py).
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import numpy.typing as npt

from symbolizer.integers import Wide
from symbolizer.location import Miss
from symbolizer.runtimes.cpython import Image, read_image
from symbolizer.symbols.elf import Elf, Source, UnreadableElf, read_elf
from symbolizer.unwind.cfa import run_programs
from symbolizer.unwind.cfi import CallFrames, read_debug_frame, read_eh_frame
from symbolizer.unwind.cie import RBP, RBX
from symbolizer.unwind.go import read_go_rules
from symbolizer.unwind.handwritten import find_handwritten_rules
from symbolizer.unwind.rules import (
    RBX_MAX,
    RBX_SAME,
    RBX_SHIFT,
    RBX_UNKNOWN,
    ROW,
    CfaKind,
    RbpKind,
    Rules,
    rule,
)
from symbolizer.unwind.table import PAGE, PAGE_BITS, UnwindTable

# libLLVM has 820,000 rows, ClickHouse about 2.8 million. A larger table than this (64 MB) would
# exceed the budget for memory in the kernel.
_MAX_ROWS = 1 << 23
# To find rbx takes as much time again. Of 1,600 real files, three have CFAs based on it: ld.so with
# 2,000 rows, libtsan with 21,000, and a Python interpreter with 130,000, in leaf functions.
_MAX_ROWS_WITH_RBX = 1 << 16
_BY_RBX = CfaKind.REGISTER + RBX
_MAX_ADDRESS = 1 << (32 + PAGE_BITS)
_MAX_SPAN = 1 << 32


def build(source: Source, *, by_file_offset: bool = False) -> UnwindTable:
    """Build the table of an ELF file, whose key is its build id. It is empty if no rules are known.

    With `by_file_offset`, addresses are offsets of the code in the file, which can be computed from
    a mapping without reading the file.

    Raises:
        UnreadableElf: with the reason; also for files of machines other than x86-64.
    """
    elf = read_elf(source)
    rules = _read_rules(elf)
    image = _read_image(elf, rules)
    if image is not None and image.evaluation:
        rules = rules.marked(image.evaluation)
    if by_file_offset:
        rules = _as_file_offsets(rules, elf)
    return UnwindTable(elf.build_id, *_cut_into_pages(rules), image)


def _read_image(elf: Elf, rules: Rules) -> Image | None:
    """Return an interpreter's image; None also if the symbols of a file are damaged."""
    try:
        return read_image(elf, rules)
    except UnreadableElf:
        return None


def _read_rules(elf: Elf) -> Rules:
    go = read_go_rules(elf)
    # musl describes its assembly in .debug_frame only.
    read_all = (read_eh_frame,) if go is not None else (read_eh_frame, read_debug_frame)
    rules = _read_frames(elf, read_all, RBP)
    if len(rules.rules) <= _MAX_ROWS_WITH_RBX and (_kinds_of(rules.rules) == _BY_RBX).any():
        rules = _with_rbx(rules, _read_frames(elf, read_all, RBX))
    rules = rules.over(find_handwritten_rules(elf, rules))
    return rules if go is None else rules.over(go)


def _read_frames(elf: Elf, read_all: Iterable[Callable[[Elf], CallFrames]], register: int) -> Rules:
    """Return the rules of all sections; those of an earlier one go first."""
    rules = Rules.of_ranges([])
    for read in read_all:
        rules = rules.over(_collect(run_programs(read(elf), register)))
    return rules


def _kinds_of(rules: Wide) -> Wide:
    kinds: Wide = rules >> np.uint64(32) & np.uint64(0xFF)
    return kinds


_WITH_RBX = np.zeros(256, dtype=np.bool_)
_WITH_RBX[CfaKind.RSP : CfaKind.SIGNAL] = True
_WITH_RBX[CfaKind.REGISTER : CfaKind.RETURN_REGISTER] = True
"""By CfaKind: frames that are left by their CFA."""


def _with_rbx(rules: Rules, of_rbx: Rules) -> Rules:
    """Return the rules with where rbx is; `of_rbx` says it as rules do for rbp."""
    addresses = np.union1d(rules.addresses, of_rbx.addresses)
    own, others = rules.at(addresses), of_rbx.at(addresses)
    kinds, words = others >> np.uint64(40) & np.uint64(0xFF), others.view(np.int64) >> 48
    places = np.full(len(addresses), RBX_UNKNOWN, dtype=np.uint64)
    places[kinds == RbpKind.SAME] = RBX_SAME
    is_saved = (kinds == RbpKind.AT_CFA) & (words < -RBX_SAME) & (words >= -RBX_MAX)
    places[is_saved] = -words[is_saved]
    places[~_WITH_RBX[_kinds_of(own)]] = RBX_UNKNOWN
    return Rules(addresses, own | places << np.uint64(40 + RBX_SHIFT)).without_repetitions()


def _collect(pieces: Iterator[Rules]) -> Rules:
    """Join pieces, freeing each when it is copied: memory use is highest here."""
    collected: list[Rules] = []
    rows = 0
    last_rule = rule(CfaKind.HOLE)
    for piece in pieces:
        repeats = int(len(piece.rules) > 0 and int(piece.rules[0]) == last_rule)
        collected.append(Rules(piece.addresses[repeats:], piece.rules[repeats:]))
        last_rule = int(piece.rules[-1]) if len(piece.rules) else last_rule
        rows += len(collected[-1].rules)
        if rows > _MAX_ROWS:
            raise UnreadableElf(Miss.TOO_LARGE)
    joined = Rules(np.empty(rows, dtype=np.uint64), np.empty(rows, dtype=np.uint64))
    while collected:
        piece = collected.pop()
        here = slice(rows - len(piece.rules), rows)
        joined.addresses[here], joined.rules[here] = piece
        rows = here.start
    return joined


def _cut_into_pages(rules: Rules) -> tuple[npt.NDArray[np.void], npt.NDArray[np.void]]:
    if not len(rules.addresses):
        return np.zeros(0, dtype=PAGE), np.zeros(0, dtype=ROW)
    lowest, highest = int(rules.addresses[0]), int(rules.addresses[-1])
    if highest >= _MAX_ADDRESS or highest - lowest >= _MAX_SPAN:
        raise UnreadableElf(Miss.TOO_LARGE)
    numbers = np.arange(lowest >> PAGE_BITS, (highest >> PAGE_BITS) + 1, dtype=np.uint64)
    page_starts = numbers << np.uint64(PAGE_BITS)
    firsts = np.searchsorted(rules.addresses, page_starts)
    counts = np.diff(firsts, append=len(rules.addresses))
    in_force = np.append(np.uint64(rule(CfaKind.HOLE)), rules.rules)[firsts]
    needs_head = page_starts != rules.addresses[np.minimum(firsts, len(rules.rules) - 1)]
    is_kept = (counts > 0) | (in_force != rule(CfaKind.HOLE))

    pages = np.zeros(int(is_kept.sum()), dtype=PAGE)
    pages["number"] = numbers[is_kept]
    pages["count"] = (counts + needs_head)[is_kept]
    pages["first"] = np.cumsum(pages["count"]) - pages["count"]
    rows = np.empty(int(pages["count"].sum()), dtype=np.uint64)
    is_head = np.zeros(len(rows), dtype=np.bool_)
    is_head[pages["first"][needs_head[is_kept]]] = True
    rows[is_head] = in_force[is_kept & needs_head]
    rows[~is_head] = rules.rules | rules.addresses & np.uint64((1 << PAGE_BITS) - 1)
    return pages, rows.view(ROW)


def _as_file_offsets(rules: Rules, elf: Elf) -> Rules:
    moved = [Rules.of_ranges([])]
    for segment in sorted(elf.segments, key=lambda each: each.p_offset):
        start, end = segment.p_vaddr, segment.p_vaddr + segment.p_filesz
        first, last = np.searchsorted(rules.addresses, np.array([start, end], np.uint64)).tolist()
        addresses, words = rules.addresses[first:last], rules.rules[first:last]
        # Only in a damaged file does a rule begin before its segment; a hole is good enough there.
        shift = np.uint64((segment.p_offset - start) % (1 << 64))
        moved.append(Rules(addresses + shift, words))
        moved.append(Rules(np.array([segment.p_offset + segment.p_filesz], np.uint64), _HOLE))
    return Rules(*(np.concatenate(columns) for columns in zip(*moved, strict=True)))


_HOLE = np.array([rule(CfaKind.HOLE)], np.uint64)
