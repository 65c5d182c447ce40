"""Unwind rules of Go code, which has no call frame information of use.

Go keeps frame pointers, but functions without a frame do not set them up, and others have not yet
in their first instructions: there the word of Go's own table is taken (symbols/gopclntab.py), and
the frame pointer's for the rest. The last instruction or two before a return stay wrong: their rows
would outnumber all others. .debug_frame, where a program has one, does not tell when the stack is
switched, and is not read.
"""

import itertools
import re
from collections.abc import Iterator, Mapping

import numpy as np

from symbolizer.symbols.elf import Elf
from symbolizer.symbols.gopclntab import GoTable, open_go_table
from symbolizer.unwind.rules import CfaKind, Range, Rules, rule

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

_WITHOUT_FRAME = rule(CfaKind.RSP, 1)


def read_go_rules(elf: Elf) -> Rules | None:
    """Return rules for all of Go's code; None if there is none, or not of a known version.

    Raises:
        UnreadableElf: damaged, or too large.
    """
    table = open_go_table(elf)
    text = None if table is None else table.find_text()
    if table is None or text is None:
        return None
    starts = table.functions.starts
    named = table.find_named((*_FIRST_FUNCTIONS, *_SWITCHES, _SIGNAL_HANDLER))
    frames = _read_frames(table, named.get(_SIGNAL_HANDLER, []))
    rules = Rules(frames.addresses + np.uint64(text), frames.rules)
    first = [
        (text + int(starts[n]), text + int(starts[n + 1]), rule(CfaKind.STOP))
        for name in _FIRST_FUNCTIONS
        for n in named.get(name, ())
    ]
    first += _find_switches(elf, table, named, text)
    return Rules.of_ranges(first).over(rules)


def _find_switches(
    elf: Elf, table: GoTable, named: Mapping[bytes, list[int]], text: int
) -> Iterator[Range]:
    for number in itertools.chain.from_iterable(named.get(name, ()) for name in _SWITCHES):
        start, end = (text + int(table.functions.starts[n]) for n in (number, number + 1))
        size = min(end - start, _SWITCH_BYTES)
        for p_vaddr, p_offset, p_filesz in elf.segments:
            if p_vaddr <= start and start + size <= p_vaddr + p_filesz:
                code = elf.source.read_at(start - p_vaddr + p_offset, size)
                taken = _TAKE_STACK.search(code)
                if taken:
                    yield start + taken.end(), end, rule(CfaKind.STOP)


def _read_frames(table: GoTable, handlers: list[int]) -> Rules:
    """Return rules, whose addresses count from where Go's code begins."""
    starts, ends = table.functions.starts[:-1], table.functions.starts[1:]
    frame_pointer = rule(CfaKind.FRAME_POINTER)
    if not table.has_depths:
        return Rules.of_ranges([(int(starts[0]), int(ends[-1]), frame_pointer)])
    framed = starts + table.read_frameless()
    addresses = np.append(np.stack([starts, framed], axis=1), ends[-1]).astype(np.uint64)
    rules = np.tile(np.array([_WITHOUT_FRAME, frame_pointer], dtype=np.uint64), len(starts))
    rules = np.append(rules, np.uint64(rule(CfaKind.HOLE)))
    is_kept = np.append(addresses[1:] != addresses[:-1], True)
    # The handler lies on the kernel's signal frame, and is followed all the way by its depth.
    followed = [
        (int(starts[n]) + start, int(starts[n]) + end, _WITHOUT_FRAME + (depth >> 3 << 16))
        for n in handlers
        for start, end, depth in table.read_depths(n)
    ]
    return Rules.of_ranges(followed).over(Rules(addresses[is_kept], rules[is_kept]))
