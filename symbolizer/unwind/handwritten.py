"""Find unwind rules of handwritten and linker-made code that has no call frame information.

Such code is recognised by its bytes, which are the same in every file: a program's entry point, the
return from a signal handler, the creation of threads, what runs as a file is loaded and unloaded,
and lld's PLT stubs.
"""

import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from symbolizer.integers import Wide
from symbolizer.symbols.elf import SHT_PROGBITS, Elf, UnreadableElf
from symbolizer.symbols.functions import read_functions
from symbolizer.unwind.rules import CfaKind, Range, RbpKind, Rules, rule


def find_handwritten_rules(elf: Elf, rules: Rules) -> Rules:
    """Return rules of handwritten code; except for stubs, only where `rules` have holes.

    Raises:
        UnreadableElf: the code cannot be read.
    """
    holes = _Holes.of(rules)
    found = [*_find_plt(elf), *_find_signal_returns(elf, holes), *_find_entry(elf, holes)]
    found += _find_callers_of_main(elf, holes)
    found += _find_clones(elf, holes)
    found += _find_start_files(elf, holes)
    return Rules.of_ranges(found)


class _Holes(NamedTuple):
    """Ranges of addresses without rules, sorted."""

    starts: Wide
    ends: Wide

    @classmethod
    def of(cls, rules: Rules) -> "_Holes":
        places = np.append(-1, np.flatnonzero(rules.rules == rule(CfaKind.HOLE)))
        starts = np.append(np.uint64(0), rules.addresses)[places + 1]
        ends = np.append(rules.addresses, np.uint64((1 << 64) - 1))[places + 1]
        return cls(starts, ends)

    def within(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Return the parts of holes between two addresses."""
        first = int(np.searchsorted(self.ends, np.uint64(start), side="right"))
        last = int(np.searchsorted(self.starts, np.uint64(end)))
        for place in range(first, last):
            yield max(start, int(self.starts[place])), min(end, int(self.ends[place]))


# A stub has 16 bytes: a jump of 6 and, for lazy binding, a push of 5 and another jump. If indirect
# jumps need a landing pad, a stub is the pad, the push and the jump. The first stub of a section
# pushes with 6 bytes, after the others have pushed, too.
_STUB_BYTES, _PUSH_BYTES = 16, 6
_FIRST_STUB = b"\xff\x35"  # push slot(%rip)
_ENDBR64 = b"\xf3\x0f\x1e\xfa"
_PLAIN_STUBS = (b".plt.sec", b".plt.got", b".iplt")


def _find_plt(elf: Elf) -> Iterator[Range]:
    """Return rules of PLT stubs, for which lld writes no call frame information."""
    for section in elf.sections:
        start, end = section.address, section.address + section.size
        if section.type != SHT_PROGBITS or not _is_code(elf, start, end) or start % _STUB_BYTES:
            continue
        if section.name in _PLAIN_STUBS:
            yield start, end, rule(CfaKind.RSP, 1)
        if section.name == b".plt" and section.size >= 2 * _STUB_BYTES:
            code = elf.source.read_at(section.offset, _STUB_BYTES + len(_ENDBR64))
            if code.startswith(_FIRST_STUB):
                has_pad = code.endswith(_ENDBR64)
                yield start, start + _PUSH_BYTES, rule(CfaKind.RSP, 2)
                yield start + _PUSH_BYTES, start + _STUB_BYTES, rule(CfaKind.RSP, 3)
                others = rule(CfaKind.PLT_LAZY, 9) if has_pad else rule(CfaKind.PLT, 11)
                yield start + _STUB_BYTES, end, others


def _is_code(elf: Elf, start: int, end: int) -> bool:
    return any(s.p_vaddr <= start <= end <= s.p_vaddr + s.p_filesz for s in elf.segments)


# `mov $15, %rax; syscall`, the call of rt_sigreturn in musl, in Go, and in all code that debuggers
# should recognise: libgcc and gdb search for these bytes.
_SIGNAL_RETURN = bytes.fromhex("48c7c00f0000000f05")
_MAX_SEARCHED_BYTES = 64 << 20
"""Compilers write rules for all they compile; holes that are as large are a crafted file's."""
_MAX_SEARCHED_HOLES = 1 << 16
_MAX_CODE_SECTIONS = 64
_MAX_SIGNAL_RETURNS = 64
_SEARCHED_CHUNK_BYTES = 1 << 20


def _find_signal_returns(elf: Elf, holes: _Holes) -> Iterator[Range]:
    """Find the code that signal handlers return to.

    The range begins one byte early, as glibc's FDE does: a handler's return address is the first
    instruction, and a caller is looked up one byte before it. musl puts a nop there.
    """
    found = 0
    left = _MAX_SEARCHED_BYTES
    for start, end in itertools.islice(_in_code_sections(elf, holes), _MAX_SEARCHED_HOLES):
        for address, content in _read_code(elf, start, min(end, start + left)):
            left -= len(content)
            place = content.find(_SIGNAL_RETURN)
            while place >= 0 and found < _MAX_SIGNAL_RETURNS:
                found += 1
                at = address + place
                yield max(at - 1, start), at + len(_SIGNAL_RETURN), rule(CfaKind.SIGNAL)
                place = content.find(_SIGNAL_RETURN, place + len(_SIGNAL_RETURN))


# `syscall; test %rax, %rax`: glibc ends clone()'s rules before it, because they do not hold in the
# new thread. In musl, two instructions that put the thread's function on its stack precede it.
_GLIBC_CLONE = bytes.fromhex("0f054885c0")
_MUSL_CLONE = bytes.fromhex("4883ee0848890e0f0585c0")
_MUSL_CLONE_SYSCALL = 7
_CLONE_BYTES = 16


def _find_clones(elf: Elf, holes: _Holes) -> Iterator[Range]:
    """Find where threads are created. There, the creating thread's return address is at rsp."""
    left = _MAX_SEARCHED_BYTES
    for start, end in itertools.islice(_in_code_sections(elf, holes), _MAX_SEARCHED_HOLES):
        is_short = end - start <= _CLONE_BYTES
        for address, content in _read_code(elf, start, min(end, start + left)):
            left -= len(content)
            if is_short and content.startswith(_GLIBC_CLONE):
                yield start, end, rule(CfaKind.CLONE)
            place = content.find(_MUSL_CLONE)
            if place >= 0:
                at = address + place
                yield at + _MUSL_CLONE_SYSCALL, at + len(_MUSL_CLONE) + 2, rule(CfaKind.CLONE)


def _compile(code: str) -> re.Pattern[bytes]:
    """Compile a regular expression of code: bytes are hexadecimal, NOPS and BODY any number."""
    text = re.sub("[0-9a-f]{2}", r"\\x\g<0>", code.replace(" ", ""))
    nops = r"[\x00\x0f\x1f\x2e\x40\x44\x66\x80\x84\x90]{0,15}"
    return re.compile(text.replace("NOPS", nops).replace("BODY", ".{0,64}?").encode(), re.DOTALL)


# Every program and library has some code of object files without call frame information: _init and
# _fini of the C library (crti.o), and from GCC (crtbegin.o) register_tm_clones, its counterpart,
# __do_global_dtors_aux, and frame_dummy, a jump to the first.
_INIT = _compile(
    "((?:f30f1efa)? 4883ec08)((?:(?:488b05|48c7c0).... 4885c0 74. ffd0)? (?:e8....)* 4883c408)(c3)"
)
_MUSL_INIT = _compile("NOPS (50)(58)(c3)")
_HALVE = "4889f0 48c1ee3f 48c1f803 4801c6 48d1fe 74."
_JUMP, _JUMP_AT = "488b05.... 4885c0 74. ffe0", "b8.... 4885c0 74. bf.... ffe0"
_CLONES = _compile(
    f"((?: 488d3d.... 488d05.... 4839f8 74. {_JUMP}"
    f"| 488d3d.... 488d35.... 4829fe {_HALVE} {_JUMP}"
    f"| b8.... 483d.... 74. {_JUMP_AT}"
    f"| be.... 4881ee.... {_HALVE} {_JUMP_AT}) NOPS c3)"
)
_DESTRUCTORS = _compile(
    "((?:f30f1efa)? 803d....00 75. 55)"
    "((?:48833d....00)? 4889e5)"
    "(BODY c605....01 5d)"
    "(c3 NOPS c3 (?:NOPS (?:f30f1efa)? (?:eb. | e9....))?)"
)
_MAX_START_HOLES = 1 << 10
_MAX_START_BYTES = 1 << 10
_CALLED, _PUSHED = rule(CfaKind.RSP, 1), rule(CfaKind.RSP, 2)
_RBP_IS_PUSHED = int(RbpKind.AT_CFA) << 40 | (-2 & 0xFFFF) << 48
_PUSHED_RBP, _FRAMED = _PUSHED | _RBP_IS_PUSHED, rule(CfaKind.RBP, 2) | _RBP_IS_PUSHED


def _find_start_files(elf: Elf, holes: _Holes) -> Iterator[Range]:
    """Return rules of what runs as a file is loaded and unloaded, the first code in some hole.

    Page faults are often there: nothing of the file was needed before.
    """
    for start, end in itertools.islice(_in_code_sections(elf, holes), _MAX_START_HOLES):
        for address, content in _read_code(elf, start, min(end, start + _MAX_START_BYTES), 1):
            for found in filter(None, [*_INIT.finditer(content), _MUSL_INIT.match(content)]):
                yield from _ranges(address, found, _CALLED, _PUSHED, _CALLED)
            for found in _CLONES.finditer(content):
                yield from _ranges(address, found, _CALLED)
            for found in _DESTRUCTORS.finditer(content):
                yield from _ranges(address, found, _CALLED, _PUSHED_RBP, _FRAMED, _CALLED)


def _ranges(address: int, found: re.Match[bytes], *rules: int) -> Iterator[Range]:
    """Return the place of each group of a match in code at an address, with its rule."""
    for group, number in enumerate(rules, start=1):
        yield address + found.start(group), address + found.end(group), number


# call *%rbx or another register; mov %eax, %edi; call.
_CALL_AND_EXIT = re.compile(rb"\xff[\xd0-\xd7]\x89\xc7\xe8(....)", re.DOTALL)


def _find_callers_of_main(elf: Elf, holes: _Holes) -> Iterator[Range]:
    """Find calls of main(), whose caller has no rules in musl: its result is passed to exit().

    They are recognised only if symbols say that the function called next is exit().
    """
    calls: dict[int, int] = {}
    left = _MAX_SEARCHED_BYTES
    for start, end in itertools.islice(_in_code_sections(elf, holes), _MAX_SEARCHED_HOLES):
        for address, content in _read_code(elf, start, min(end, start + left)):
            left -= len(content)
            for match in _CALL_AND_EXIT.finditer(content):
                if len(calls) >= _MAX_SIGNAL_RETURNS:
                    return
                distance = int.from_bytes(match[1], "little", signed=True)
                calls[address + match.start()] = address + match.end() + distance
    if not 0 < len(calls) < _MAX_SIGNAL_RETURNS:
        return
    exits = _addresses_of(elf, b"exit")
    for address, target in calls.items():
        if target in exits:
            yield address, address + _CALL_BYTES, rule(CfaKind.STOP)


_CALL_BYTES = 2


def _addresses_of(elf: Elf, name: bytes) -> set[int]:
    """Return the first addresses of the functions with a name."""
    try:
        functions, strings = read_functions(elf)
        text = b"".join(itertools.islice(strings, _MAX_STRING_PIECES))
    except UnreadableElf:
        return set()
    # Linkers store a name as the end of a longer one.
    places = [match.start() for match in re.finditer(re.escape(name) + b"\0", text)]
    is_named = np.isin(functions.names, np.array(places, dtype=np.uint32))
    offsets = functions.starts[is_named].astype(np.int64) + functions.base
    return {
        offset - segment.p_offset + segment.p_vaddr
        for offset in offsets.tolist()
        for segment in elf.segments
        if segment.p_offset <= offset < segment.p_offset + segment.p_filesz
    }


_MAX_STRING_PIECES = 64
"""A piece is 1 MiB. Only C libraries and programs linked statically with one get this far."""


def _in_code_sections(elf: Elf, holes: _Holes) -> Iterator[tuple[int, int]]:
    """Return holes in code sections. Code segments also hold data: libLLVM has 26 MB of tables."""
    parts = [(s.address, s.address + s.size) for s in elf.sections if s.is_code]
    parts = [part for part in parts if _is_code(elf, *part)]
    parts = parts or [(s.p_vaddr, s.p_vaddr + s.p_filesz) for s in elf.segments]
    for start, end in parts[:_MAX_CODE_SECTIONS]:
        yield from holes.within(start, end)


def _read_code(
    elf: Elf, start: int, end: int, shortest: int = len(_SIGNAL_RETURN)
) -> Iterator[tuple[int, bytes]]:
    """Return code in pieces with their addresses; they overlap by less than the pattern."""
    for p_vaddr, p_offset, p_filesz in elf.segments:
        first, last = max(start, p_vaddr), min(end, p_vaddr + p_filesz)
        for address in range(first, last, _SEARCHED_CHUNK_BYTES):
            size = min(_SEARCHED_CHUNK_BYTES + len(_SIGNAL_RETURN) - 1, last - address)
            if size >= shortest:
                yield address, elf.source.read_at(address - p_vaddr + p_offset, size)


# musl's _start has 22 bytes, and glibc's has an FDE.
_ENTRY_BYTES = 64
_BEGINNING_BYTES = 16
_TAKE_STACK = bytes.fromhex("4889e7")  # mov %rsp, %rdi


def _find_entry(elf: Elf, holes: _Holes) -> Iterator[Range]:
    """Find a program's entry point, which has no caller, if it has no rules.

    A shared library's entry point may be any address, unless the library is the loader, which calls
    constructors from there. That is recognised by its beginning: it takes the stack pointer.
    """
    start = elf.entry_point
    if not _is_code(elf, start, start + 1) or not any(holes.within(start, start + 1)):
        return
    beginning = b"".join(code for _, code in _read_code(elf, start, start + _BEGINNING_BYTES))
    if elf.entry is not None or _TAKE_STACK in beginning:
        end = _end_of_function(elf, start)
        yield start, min(end, start + _ENTRY_BYTES), rule(CfaKind.STOP)


def _end_of_function(elf: Elf, address: int) -> int:
    try:
        named, _ = read_functions(elf)
    except UnreadableElf:
        return address + _ENTRY_BYTES
    for p_vaddr, p_offset, p_filesz in elf.segments:
        if p_vaddr <= address < p_vaddr + p_filesz:
            offset = address - p_vaddr + p_offset - named.base
            place = int(np.searchsorted(named.ends, offset, side="right"))
            if place < len(named.ends) and named.starts[place] <= offset:
                return address + int(named.ends[place]) - offset
    return address + _ENTRY_BYTES
