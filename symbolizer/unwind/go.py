"""Unwind rules of Go code, which has no usable call frame information.

Go keeps frame pointers, but functions without a frame do not set them up, and others have not done
so yet in their first instructions. For these, the rules come from Go's own table
(symbols/gopclntab.py); all other code is unwound by frame pointer. The last one or two instructions
before a return stay wrong: rows for them would outnumber all others. A program's .debug_frame is
not read, because it does not say where the stack is switched.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from symbolizer.symbols.elf import Elf
from symbolizer.symbols.gopclntab import GoTable, open_go_table
from symbolizer.unwind.rules import CfaKind, Range, Rules, rule

# The first functions of goroutines, threads and the program. runtime.sigtramp, at which Go's own
# walk also ends, is not one of them: its caller is the code that the signal interrupted.
_FIRST_FUNCTIONS = (
    *(b"runtime.goexit", b"runtime.mstart", b"runtime.rt0_go"),
    *(b"_rt0_amd64", b"_rt0_amd64_linux", b"_rt0_amd64_lib", b"_rt0_amd64_linux_lib"),
)
# They switch from the goroutine's stack to the beginning of the thread's own: Go's walk ends at
# them, too. The instruction is `mov 56(%r), %rsp`, from the saved registers.
_SWITCHES = (b"runtime.mcall", b"runtime.morestack")
_TAKE_STACK = re.compile(rb"[\x48\x49]\x8b[\x60-\x67]\x38")
_SWITCH_BYTES = 256
# They call a function on the thread's own stack, where it finds the frame pointer of their frame,
# which is on the goroutine's. Before Go 1.21 they had none.
_CALL_ELSEWHERE = (b"runtime.systemstack", b"runtime.asmcgocall")
_SET_UP_FRAME = bytes.fromhex("554889e5")  # push %rbp; mov %rsp, %rbp
_SIGNAL_HANDLER = b"runtime.sigtramp"

_WITHOUT_FRAME = rule(CfaKind.RSP, 1)


def read_go_rules(elf: Elf) -> Rules | None:
    """Return rules for all of Go's code; None if there is none, or its version is unknown.

    Raises:
        UnreadableElf: damaged, or too large.
    """
    table = open_go_table(elf)
    text = None if table is None else table.find_text()
    if table is None or text is None:
        return None
    starts = table.functions.starts
    named = table.find_named((*_FIRST_FUNCTIONS, *_SWITCHES, *_CALL_ELSEWHERE, _SIGNAL_HANDLER))
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
    def numbers(names: Iterable[bytes]) -> Iterator[int]:
        return itertools.chain.from_iterable(named.get(name, ()) for name in names)

    for start, end, code in _read_functions(elf, table, numbers(_SWITCHES), text):
        taken = _TAKE_STACK.search(code)
        if taken:
            yield start + taken.end(), end, rule(CfaKind.STOP)
    for start, end, code in _read_functions(elf, table, numbers(_CALL_ELSEWHERE), text):
        if code.startswith(_SET_UP_FRAME):
            yield start + len(_SET_UP_FRAME), end, rule(CfaKind.OTHER_STACK)


def _read_functions(
    elf: Elf, table: GoTable, numbers: Iterable[int], text: int
) -> Iterator[tuple[int, int, bytes]]:
    """Return where functions begin and end, and the beginning of their code."""
    for number in numbers:
        start, end = (text + int(table.functions.starts[n]) for n in (number, number + 1))
        size = min(end - start, _SWITCH_BYTES)
        for p_vaddr, p_offset, p_filesz in elf.segments:
            if p_vaddr <= start and start + size <= p_vaddr + p_filesz:
                yield start, end, elf.source.read_at(start - p_vaddr + p_offset, size)


def _read_frames(table: GoTable, handlers: list[int]) -> Rules:
    """Return rules; their addresses count from the start of Go's code."""
    starts, ends = table.functions.starts[:-1], table.functions.starts[1:]
    frame_pointer = rule(CfaKind.FRAME_POINTER)
    if not table.has_depths:
        return Rules.of_ranges([(int(starts[0]), int(ends[-1]), frame_pointer)])
    framed = starts + table.read_frameless()
    addresses = np.append(np.stack([starts, framed], axis=1), ends[-1]).astype(np.uint64)
    rules = np.tile(np.array([_WITHOUT_FRAME, frame_pointer], dtype=np.uint64), len(starts))
    rules = np.append(rules, np.uint64(rule(CfaKind.HOLE)))
    is_kept = np.append(addresses[1:] != addresses[:-1], True)
    # The kernel's signal frame follows the handler's: its rules come from the table throughout.
    followed = [
        (int(starts[n]) + start, int(starts[n]) + end, _WITHOUT_FRAME + (depth >> 3 << 16))
        for n in handlers
        for start, end, depth in table.read_depths(n)
    ]
    return Rules.of_ranges(followed).over(Rules(addresses[is_kept], rules[is_kept]))
