"""Unwind rules of Go code, which has no call frame information of use.

The table that Go's runtime finds its own functions and frames by, .gopclntab, is in every program,
also in a stripped one (Go's package debug/gosym, internal/abi/symtab.go, runtime/symtab.go). For
each function it says how far the stack pointer is below the frame's top at each pc.

Go keeps frame pointers, but functions without a frame do not set them up, and others have not yet
in their first instructions: there the table's word is taken, and the frame pointer's for the rest.
The last instruction or two before a return stay wrong: their rows would outnumber all others.
.debug_frame, where a program has one, does not tell when the stack is switched, and is not read.
"""

import itertools
import re
import struct
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from symbolizer.integers import PADDING_BYTES, Ints, read_uleb, view
from symbolizer.location import Miss
from symbolizer.symbols.elf import Elf, Section, UnreadableElf
from symbolizer.unwind.rules import CfaKind, Rules, rule

# kubectl has 67,000 functions; the limit is for made-up files.
_MAX_FUNCTIONS = 1 << 20
_CHUNK_BYTES = 1 << 20

_HEADER_BYTES = 72
_POINTER_BYTES = 8

# Where a stack begins: goroutines, threads, the program. runtime.sigtramp, which Go's own walk ends
# at too, is left out: below it lies what the signal has interrupted.
_FIRST_FUNCTIONS = (
    *(b"runtime.goexit", b"runtime.mstart", b"runtime.rt0_go"),
    *(b"_rt0_amd64", b"_rt0_amd64_linux", b"_rt0_amd64_lib", b"_rt0_amd64_linux_lib"),
)
# They take the thread's own stack, and begin it anew: Go's walk ends at them, too. Until then they
# are on the goroutine's. The instruction is `mov 56(%r), %rsp`, from its saved registers.
_SWITCHES = (b"runtime.mcall", b"runtime.morestack")
_TAKE_STACK = re.compile(rb"[\x48\x49]\x8b[\x60-\x67]\x38")
_SWITCH_BYTES = 256
_SIGNAL_HANDLER = b"runtime.sigtramp"
_GOEXIT, _GOEXIT_CALLEE = b"runtime.goexit", b"runtime.goexit1"

_FLAG_WRITES_SP = 2


class _Layout(NamedTuple):
    """Where things are in one version of the table.

    Attributes:
        entry_bytes: 8 for addresses, 4 for distances from where Go's code begins.
        header_words: numbers of the header's words for names, tables of pcs and functions.
        pcsp: position in a function's record of its table of stack depths; -1: not used.
        flags: position of its flags.
    """

    entry_bytes: int
    header_words: tuple[int, int, int]
    pcsp: int
    flags: int


# By the first four bytes, which stand for Go 1.20, 1.18 and 1.16. The records of 1.16 do not say
# yet which functions switch the stack.
_LAYOUTS = {
    0xFFFFFFF1: _Layout(4, (3, 6, 7), pcsp=16, flags=41),
    0xFFFFFFF0: _Layout(4, (3, 6, 7), pcsp=16, flags=37),
    0xFFFFFFFA: _Layout(8, (2, 5, 6), pcsp=-1, flags=-1),
}


class _Functions(NamedTuple):
    """Go's functions by address, without holes between them.

    Attributes:
        starts: from where Go's code begins; one more than there are functions, for the end.
        records: positions of their records in the section.
        names: positions of their names in the section.
    """

    starts: Ints
    records: Ints
    names: Ints


def read_go_rules(elf: Elf) -> Rules | None:
    """Return rules for all of Go's code; None if there is none, or not of a known version.

    Raises:
        UnreadableElf: damaged, or too large.
    """
    section = next((s for s in elf.sections if s.name.endswith(b".gopclntab")), None)
    if section is None or section.size < _HEADER_BYTES:
        return None
    header = elf.source.read_at(section.offset, _HEADER_BYTES)
    layout = _LAYOUTS.get(int.from_bytes(header[:4], "little"))
    if layout is None or header[4:8] != bytes([0, 0, 1, _POINTER_BYTES]):
        return None
    table = _Table(elf, section, layout, struct.unpack_from("<8Q", header, 8))
    functions = table.read_functions()
    named = table.find_named(functions)
    text = 0 if layout.entry_bytes == _POINTER_BYTES else _find_text(elf, functions, named)
    if text is None:
        return None
    frames = table.read_frames(functions, named)
    rules = Rules(frames.addresses + np.uint64(text), frames.rules)
    first = [
        (text + int(functions.starts[n]), text + int(functions.starts[n + 1]), rule(CfaKind.STOP))
        for name in _FIRST_FUNCTIONS
        for n in named.get(name, ())
    ]
    first += _find_switches(elf, functions, named, text)
    return Rules.of_ranges(first).over(rules)


def _find_switches(
    elf: Elf, functions: _Functions, named: dict[bytes, list[int]], text: int
) -> Iterator[tuple[int, int, int]]:
    for number in itertools.chain.from_iterable(named.get(name, ()) for name in _SWITCHES):
        start, end = (text + int(functions.starts[n]) for n in (number, number + 1))
        size = min(end - start, _SWITCH_BYTES)
        for p_vaddr, p_offset, p_filesz in elf.segments:
            if p_vaddr <= start and start + size <= p_vaddr + p_filesz:
                code = elf.source.read_at(start - p_vaddr + p_offset, size)
                taken = _TAKE_STACK.search(code)
                if taken:
                    yield start + taken.end(), end, rule(CfaKind.STOP)


class _Table:
    """The section, read piece by piece."""

    def __init__(self, elf: Elf, section: Section, layout: _Layout, words: tuple[int, ...]) -> None:
        self._elf = elf
        self._section = section
        self._layout = layout
        self._count = words[0]
        names, pcs, functions = layout.header_words
        self._names = (words[names], words[names + 1])
        self._pcs = (words[pcs], words[pcs + 1])
        self._functions_at = words[functions]
        if not 0 < self._count <= _MAX_FUNCTIONS:
            raise UnreadableElf(Miss.TOO_LARGE)

    def read_functions(self) -> _Functions:
        form = f"<u{self._layout.entry_bytes}"
        size = (2 * self._count + 1) * self._layout.entry_bytes
        pairs = np.frombuffer(self._read(self._functions_at, size), form)
        starts = pairs[::2].astype(np.int64)
        records = pairs[1::2].astype(np.int64) + self._functions_at
        is_sorted = (starts[1:] >= starts[:-1]).all() and (starts >= 0).all()
        if not is_sorted or (starts > _MAX_ADDRESS).any():
            raise UnreadableElf(Miss.DAMAGED)
        names = self._gather(records + self._layout.entry_bytes, "<i4") + self._names[0]
        return _Functions(starts, records, names)

    def find_named(self, functions: _Functions) -> dict[bytes, list[int]]:
        """Return the numbers of the functions that have a meaning here, by name.

        Two have the same name where one calls the other with arguments moved (ABI wrappers).
        """
        named: dict[bytes, set[int]] = defaultdict(set)
        first, end = self._names
        for start in range(first - 1, end, _CHUNK_BYTES):
            content = self._read(start, min(_CHUNK_BYTES + _NAME_BYTES, end - start))
            for name in (*_FIRST_FUNCTIONS, *_SWITCHES, _SIGNAL_HANDLER, _GOEXIT_CALLEE):
                place = -1
                for _ in range(_MAX_SAME_NAMES):
                    place = content.find(b"\0" + name + b"\0", place + 1)
                    if place < 0:
                        break
                    numbers = np.flatnonzero(functions.names == start + place + 1)
                    named[name].update(numbers.tolist())
        return {name: sorted(numbers) for name, numbers in named.items()}

    def read_frames(self, functions: _Functions, named: dict[bytes, list[int]]) -> Rules:
        """Return rules, whose addresses count from where Go's code begins."""
        starts, ends = functions.starts[:-1], functions.starts[1:]
        frame_pointer = rule(CfaKind.FRAME_POINTER)
        if self._layout.pcsp < 0:
            return Rules.of_ranges([(int(starts[0]), int(ends[-1]), frame_pointer)])
        tables = self._gather(functions.records + self._layout.pcsp, "<u4") + self._pcs[0]
        flags = self._gather(functions.records + self._layout.flags, "u1")
        # A table is pairs of numbers: by how much the depth changes from -1 on, zigzag, and for how
        # many bytes it holds.
        begins_without_frame = (self._gather(tables, "u1") == 2) & (flags & _FLAG_WRITES_SP == 0)
        lengths = np.where(begins_without_frame, self._gather_uleb(tables + 1), 0)
        framed = starts + np.minimum(lengths, ends - starts)
        addresses = np.append(np.stack([starts, framed], axis=1), ends[-1]).astype(np.uint64)
        rules = np.tile(np.array([_WITHOUT_FRAME, frame_pointer], dtype=np.uint64), len(starts))
        rules = np.append(rules, np.uint64(rule(CfaKind.HOLE)))
        is_kept = np.append(addresses[1:] != addresses[:-1], True)
        handlers = [
            (int(starts[n]) + at, int(starts[n]) + end, _WITHOUT_FRAME + (depth >> 3 << 16))
            for n in named.get(_SIGNAL_HANDLER, ())
            for at, end, depth in self._read_depths(int(tables[n]), int(ends[n] - starts[n]))
        ]
        return Rules.of_ranges(handlers).over(Rules(addresses[is_kept], rules[is_kept]))

    def _read_depths(self, position: int, size: int) -> Iterator[tuple[int, int, int]]:
        """Return the depths of one function: from where in it, to where, how many bytes."""
        content = self._read(position, min(_DEPTHS_BYTES, self._pcs[1] - position))
        padded = np.zeros(len(content) + PADDING_BYTES, dtype=np.uint8)
        padded[: len(content)] = np.frombuffer(content, np.uint8)
        at, pc, depth = np.zeros(1, dtype=np.int64), 0, -1
        while pc < size and at[0] < len(content):
            changes, widths = read_uleb(padded, at)
            lengths, more_widths = read_uleb(padded, at + widths)
            at = at + widths + more_widths
            depth += int(changes[0] >> 1 ^ -(changes[0] & 1))
            end = min(pc + int(lengths[0]), size)
            if depth & 7 == 0 and 0 <= depth < _MAX_DEPTH and pc < end:
                yield pc, end, depth
            pc = end

    def _gather_uleb(self, positions: Ints) -> Ints:
        values = np.zeros(len(positions), dtype=np.int64)
        goes_on = np.ones(len(positions), dtype=np.bool_)
        for k in range(_LENGTH_BYTES):
            byte = self._gather(positions + k, "u1")
            values |= np.where(goes_on, byte & 0x7F, 0).astype(np.int64) << (7 * k)
            goes_on &= byte >= 0x80
            if not goes_on.any():
                break
        return values

    def _gather(self, positions: Ints, form: str) -> npt.NDArray[np.int64]:
        """Read a number at each of many positions, a chunk of the section at a time."""
        width = np.dtype(form).itemsize
        order = np.argsort(positions, kind="stable")
        in_order = positions[order]
        values = np.zeros(len(positions), dtype=form)
        place = 0
        while place < len(order):
            start = int(in_order[place])
            content = self._read(start, min(_CHUNK_BYTES, self._section.size - start))
            end = int(np.searchsorted(in_order, start + len(content) - width, side="right"))
            if end == place:
                raise UnreadableElf(Miss.DAMAGED)
            numbers = view(np.frombuffer(content, np.uint8), form)
            values[order[place:end]] = numbers[in_order[place:end] - start]
            place = end
        return values

    def _read(self, start: int, size: int) -> bytes:
        if start < 0 or size < 0 or start + size > self._section.size:
            raise UnreadableElf(Miss.DAMAGED)
        return self._elf.source.read_at(self._section.offset + start, size)


_MAX_ADDRESS = 1 << 47
_NAME_BYTES = 64
_MAX_SAME_NAMES = 4
_DEPTHS_BYTES = 4096
_LENGTH_BYTES = 4
_MAX_DEPTH = 1 << 16
_WITHOUT_FRAME = rule(CfaKind.RSP, 1)


def _find_text(elf: Elf, functions: _Functions, named: dict[bytes, list[int]]) -> int | None:
    """Find where Go's code begins, which the table does not say in every version.

    runtime.goexit is a nop, a call and a nop in all of them, and the distance of the call is known.
    """
    distances = {
        int(functions.starts[callee]) - int(functions.starts[caller]) - 6
        for caller in named.get(_GOEXIT, ())
        for callee in named.get(_GOEXIT_CALLEE, ())
    }
    codes = [
        b"\x90\xe8" + struct.pack("<i", distance) + b"\x90"
        for distance in distances
        if abs(distance) < 1 << 31
    ]
    if not codes:
        return None
    pattern = re.compile(b"|".join(map(re.escape, codes)))
    for p_vaddr, p_offset, p_filesz in elf.segments:
        for start in range(0, p_filesz, _CHUNK_BYTES):
            size = min(_CHUNK_BYTES + 8, p_filesz - start)
            found = pattern.search(elf.source.read_at(p_offset + start, size))
            if found:
                (caller, *_) = named[_GOEXIT]
                return p_vaddr + start + found.start() - int(functions.starts[caller])
    return None
