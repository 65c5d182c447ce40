"""Find an evaluation loop that is split into functions (CPython's --with-tail-call-interp).

Each kind of instruction is done by a function, its handler, which ends with a jump to that of the
next instruction, through a table of pointers to all of them. An evaluation is the frame of what
calls the first one. That is `_PyEval_EvalFrameDefault`, but compilers copy it into its callers, and
then these are what stacks have: in the builds of python-build-standalone, hardly ever itself.

The table is known by code of `_PyEval_EvalFrameDefault` that has its address: 256 pointers to where
functions begin. Handlers jump to more functions, such as those for errors, and to rare code that
was moved out of them; all these come back to a handler, or to the table. What else has the address
of the table, or calls a handler, is what evaluates.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from symbolizer.integers import Ints, Wide, view
from symbolizer.runtimes.jumps import (
    AT_ENTRY,
    WORD_BYTES,
    Range,
    Ranges,
    find_jumps,
    find_words,
    number_of,
    read_code,
    take,
)
from symbolizer.runtimes.thread_state import read_bytes, read_pointers
from symbolizer.symbols.elf import Elf
from symbolizer.unwind.rules import Rules

_MAX_CALLER_BYTES = 16 << 10
"""Of a loop that may be only what calls the first handler. It has some 600 bytes, and whole loops
have 40,000 and more."""
_ENTRIES = 256
_POINTER_BYTES = 8
_TABLE_BYTES = _ENTRIES * _POINTER_BYTES
_LEAST_HANDLERS = 64
"""CPython 3.14 has 228: numbers without an instruction share one."""
_MAX_HANDLERS = 1 << 12
"""With what they jump to; 3.14 of python-build-standalone has 483, of 199 KB."""
_MAX_HANDLER_BYTES = 2 << 20
_MAX_JUMPS = 16
"""From what handlers jump to until the table, or a handler, is reached; in 3.14 it is 2."""
_MAX_TABLES = 1 << 12
"""Addresses that may be that of the table. So many can be in code that is so small."""
_MAX_SEARCHED_BYTES = 128 << 20
"""Of code that is searched for what evaluates; python-build-standalone has 22 MB."""
_PIECE_BYTES = 1 << 20
_CFA = np.uint64(0xFF_FFFF_0000)
"""The bits of a rule that say where the CFA is. Where rbp is saved stays in force behind a pop."""
_CALL = 0xE8
# jmp *(%base,%index,8) and call *(%base,%index,8). The third byte names the registers: a base of 5
# stands for a constant address.
_REGISTERS = re.escape(bytes(byte for byte in range(0xC0, 0x100) if byte & 7 != 5))
_INDEXED_JUMP = re.compile(rb"\xff\x24[%b]" % _REGISTERS)
_INDEXED_CALL = re.compile(rb"\xff\x14[%b]" % _REGISTERS)
# jmp *table(,%index,8)
_JUMP_OPCODE, _JUMP_OPERANDS = 0xFF, 0x24
_JUMP_BYTES = 3
"""Before the address of the table."""


class Handlers(NamedTuple):
    """The handlers of a loop.

    Attributes:
        table: the address of the table of pointers to them.
        code: first addresses and ends of all of them, with what they jump to, sorted.
    """

    table: int
    code: tuple[Range, ...]


def find_handlers(elf: Elf, rules: Rules, ranges: Ranges, loop: Sequence[Range]) -> Handlers | None:
    """Return the handlers that a loop calls; None if it is not of this kind.

    Args:
        elf: the interpreter's file.
        rules: its unwind rules, by ELF address.
        ranges: its FDE ranges.
        loop: the parts of `_PyEval_EvalFrameDefault`.

    Raises:
        UnreadableElf: damaged, or too large.
    """
    if sum(end - start for start, end in loop) > _MAX_CALLER_BYTES or not len(ranges[0]):
        return None
    is_function = rules.at(ranges[0]) == AT_ENTRY
    for table, targets in _read_tables(elf, _find_operands(elf, loop)):
        found = number_of(ranges, targets)
        is_entry = (found >= 0) & (ranges[0][found] == targets) & is_function[found]
        handlers = np.unique(found)
        if is_entry.all() and len(handlers) >= _LEAST_HANDLERS:
            numbers = _with_jumped_to(elf, rules, ranges, handlers, table)
            return Handlers(table, tuple(take(ranges, numbers)))
    return None


def _find_operands(elf: Elf, loop: Sequence[Range]) -> Wide:
    """Return addresses of pointers that operands of code may have, sorted."""
    found = [np.zeros(0, np.int64)]
    for start, end in loop:
        content = np.frombuffer(read_code(elf, (start, end)), np.uint8)
        if len(content) >= WORD_BYTES:
            words = view(content, "<i4").astype(np.int64)
            found += [words, words + np.arange(start, start + len(words)) + WORD_BYTES]
    addresses = np.unique(np.concatenate(found))
    addresses = addresses[(addresses > 0) & (addresses % _POINTER_BYTES == 0)]
    is_loaded = np.zeros(len(addresses), dtype=np.bool_)
    for p_vaddr, _, p_filesz in elf.loaded:
        is_loaded |= (addresses >= p_vaddr) & (addresses + _TABLE_BYTES <= p_vaddr + p_filesz)
    operands: Wide = addresses[is_loaded][:_MAX_TABLES].astype(np.uint64)
    return operands


def _read_tables(elf: Elf, addresses: Wide) -> Iterator[tuple[int, Wide]]:
    """Return the pointers at each of some addresses, as the loader relocates them."""
    if not len(addresses):
        return
    places, pointers = read_pointers(elf, addresses, _TABLE_BYTES)
    for address in addresses.tolist():
        words = np.frombuffer(read_bytes(elf, address, _TABLE_BYTES), "<u8").copy()
        first, last = np.searchsorted(places, [address, address + _TABLE_BYTES]).tolist()
        words[(places[first:last] - np.uint64(address)) // _POINTER_BYTES] = pointers[first:last]
        yield address, words


def _with_jumped_to(elf: Elf, rules: Rules, ranges: Ranges, handlers: Ints, table: int) -> Ints:
    """Add the ranges that handlers jump to and that come back, sorted.

    A function is entered where it begins, and a part of one anywhere.
    """
    starts, ends = ranges
    is_part = rules.at(starts) != AT_ENTRY
    seen = set(handlers.tolist())
    edges = [np.zeros((2, 0), np.int64)]
    unread, size = handlers, 0
    while len(unread):
        size += int((ends[unread] - starts[unread]).sum())
        if len(seen) + len(unread) > _MAX_HANDLERS or size > _MAX_HANDLER_BYTES:
            break
        seen.update(unread.tolist())
        sources, targets = find_jumps(elf, take(ranges, unread))
        both = np.stack([number_of(ranges, sources), number_of(ranges, targets)])
        is_jump = (rules.at(sources) ^ rules.at(targets)) & _CFA == 0
        is_jump &= (both >= 0).all(axis=0)
        edges.append(np.unique(both[:, is_jump], axis=1))
        enters = is_jump & (is_part[both[1]] | (starts[both[1]] == targets))
        unread = np.array(sorted(set(both[1, enters].tolist()) - seen), np.int64)
    others = np.array(sorted(seen - set(handlers.tolist())), np.int64)
    is_last = [_jumps_through(elf, code, table) for code in take(ranges, others)]
    known = np.append(handlers, others[np.array(is_last, np.bool_)])
    return _find_leading(np.concatenate(edges, axis=1), known)


def _jumps_through(elf: Elf, code: Range, table: int) -> bool:
    """Return whether code may end with a jump through this table."""
    content = read_code(elf, code)
    return len(find_words(content, code[0], table)) > 0 or bool(_INDEXED_JUMP.search(content))


def _find_leading(edges: Ints, known: Ints) -> Ints:
    """Return the known ends of edges, and what leads to them, sorted."""
    before = 0
    for _ in range(_MAX_JUMPS):
        if before == len(known):
            break
        before = len(known)
        known = np.union1d(known, edges[0, np.isin(edges[1], known)])
    return known


def find_evaluating(elf: Elf, ranges: Ranges, handlers: Handlers) -> list[Range]:
    """Return the functions that call a handler.

    Some may be among them that do not: they have the address of the table for another purpose.

    Raises:
        UnreadableElf: the file was truncated meanwhile.
    """
    found: set[int] = set()
    left = _MAX_SEARCHED_BYTES
    starts = np.array([start for start, _ in handlers.code], np.uint64)
    for p_vaddr, p_offset, p_filesz in elf.segments:
        size = min(p_filesz, left)
        left -= size
        for first in range(0, size, _PIECE_BYTES):
            length = min(_PIECE_BYTES + _JUMP_BYTES + WORD_BYTES, size - first)
            content = elf.source.read_at(p_offset + first, length)
            address = p_vaddr + first
            places = [
                _find_uses(content, address, handlers.table),
                _find_calls(content, address, starts),
            ]
            at = (np.concatenate(places) + address).astype(np.uint64)
            found.update(number_of(ranges, at).tolist())
    handling = set(handlers.code)
    codes = take(ranges, np.array(sorted(found - {-1}), np.int64))
    return [
        code for code in codes if code not in handling or _INDEXED_CALL.search(read_code(elf, code))
    ]


def _find_uses(content: bytes, address: int, table: int) -> Ints:
    """Return where code has the address of a table, except for jumps through it."""
    opcodes = np.frombuffer(content, np.uint8)
    places = find_words(content, address, table)
    places = places[places >= _JUMP_BYTES]
    opcode, operands = opcodes[places - _JUMP_BYTES], opcodes[places - _JUMP_BYTES + 1]
    uses: Ints = places[(opcode != _JUMP_OPCODE) | (operands != _JUMP_OPERANDS)]
    return uses


def _find_calls(content: bytes, address: int, starts: Wide) -> Ints:
    """Return where code calls one of some functions, which are sorted."""
    opcodes = np.frombuffer(content, np.uint8)
    places = np.flatnonzero(opcodes[: max(0, len(opcodes) - WORD_BYTES)] == _CALL)
    if not len(places):
        return places
    words = view(opcodes, "<i4")
    targets = (address + places + 1 + WORD_BYTES + words[places + 1]).astype(np.uint64)
    nearest = starts[np.minimum(np.searchsorted(starts, targets), len(starts) - 1)]
    calls: Ints = places[nearest == targets]
    return calls
