"""Find out whether a file is CPython's interpreter, and how its frames are read.

Files are those of any user: a symbol's name is no proof. What is found is checked where it can be,
all offsets are bounded, and what is not known for sure is a Refusal.
"""

import re
from collections.abc import Iterable

import numpy as np

from symbolizer.runtimes.evaluation import EVALUATION_LOOP, Loop, find_evaluation_loop
from symbolizer.runtimes.image import NONE, Image, Layout, Refusal, StateKind, Style
from symbolizer.runtimes.jumps import Range
from symbolizer.runtimes.layouts import (
    DEBUG_OFFSETS_BYTES,
    FIRST_WITH_DEBUG_OFFSETS,
    HOLDERS,
    KEYS,
    LAYOUTS,
    is_final,
    minor_of,
    read_debug_offsets,
)
from symbolizer.runtimes.thread_state import (
    ADDRESS_LIMIT,
    GETTERS,
    GILSTATE_GETTER,
    RUNTIME,
    Symbols,
    ThreadState,
    find_detached,
    find_in_tls,
    find_key,
    read_bytes,
    read_code,
    read_word,
)
from symbolizer.symbols.elf import SHT_DYNSYM, Elf
from symbolizer.symbols.named import Symbol, find_symbols, has_string
from symbolizer.unwind.cfa import run_programs
from symbolizer.unwind.cfi import read_eh_frame
from symbolizer.unwind.cie import RBP
from symbolizer.unwind.rules import Rules

__all__ = ["NONE", "Image", "Layout", "Refusal", "StateKind", "Style", "read_image"]

_CODE_TYPE, _VERSION = b"PyCode_Type", b"Py_Version"
_GET_VERSION, _TRACED_REFERENCES = b"Py_GetVersion", b"_Py_PrintReferences"
_NAMES = (
    *(EVALUATION_LOOP, RUNTIME, _CODE_TYPE, _VERSION, _GET_VERSION, _TRACED_REFERENCES),
    *(*GETTERS, GILSTATE_GETTER),
)
_LAST_WITH_KEY = max(KEYS)


def read_image(elf: Elf, rules: Rules | None = None) -> Image | None:
    """Return what is known of an interpreter; None if the file is not one.

    Args:
        elf: a file for x86-64.
        rules: its unwind rules, by ELF address, if they are at hand.

    Raises:
        UnreadableElf: damaged, or too large.
    """
    if not _may_be_interpreter(elf):
        return None
    found = list(find_symbols(elf, _NAMES))
    symbols = {symbol.name: symbol for symbol in found if symbol.size}
    if RUNTIME not in symbols or EVALUATION_LOOP not in symbols:
        return None
    version = _read_version(elf, symbols)
    known = _read_layout(elf, symbols, version)
    if isinstance(known, Refusal):
        return Image(version, False, None, known)
    is_free_threaded, layout = known
    loop = _find_loop(elf, found, rules)
    evaluating = loop.evaluating
    state, detached = _find_thread_state(elf, symbols, minor_of(version))
    if isinstance(state, Refusal):
        return Image(version, is_free_threaded, None, state)
    if not evaluating or not _has_code_type(symbols):
        refusal = Refusal.NO_CODE_TYPE if evaluating else Refusal.NO_EVALUATION_LOOP
        return Image(version, is_free_threaded, None, refusal)
    return Image(
        version,
        is_free_threaded,
        layout,
        Refusal.NONE,
        evaluating,
        symbols[_CODE_TYPE].address,
        state.kind,
        state.address,
        state.offset,
        _shift_of(elf, evaluating[0][0]),
        *detached,
        is_split=loop.is_split,
        runtime=symbols[RUNTIME].address,
    )


def find_loop(elf: Elf) -> tuple[Range, ...]:
    """Return the parts of an interpreter's evaluation loop; none if the file is not one.

    Raises:
        UnreadableElf: damaged, or too large.
    """
    if not _may_be_interpreter(elf):
        return ()
    return _find_loop(elf, list(find_symbols(elf, (EVALUATION_LOOP,)))).parts


def _find_loop(elf: Elf, symbols: Iterable[Symbol], rules: Rules | None = None) -> Loop:
    parts = [symbol for symbol in symbols if symbol.name.startswith(EVALUATION_LOOP)]
    return find_evaluation_loop(elf, _read_rules(elf) if rules is None else rules, parts)


def _has_code_type(symbols: Symbols) -> bool:
    return _CODE_TYPE in symbols and symbols[_CODE_TYPE].address < ADDRESS_LIMIT


def _read_rules(elf: Elf) -> Rules:
    pieces = [Rules.of_ranges([]), *run_programs(read_eh_frame(elf), RBP)]
    return Rules(*(np.concatenate(columns) for columns in zip(*pieces, strict=True)))


def _may_be_interpreter(elf: Elf) -> bool:
    """Return whether to look for its symbols: this is all that is done for other files."""
    if elf.bits != 64 or not elf.is_x86_64:
        return False
    if any(section.name == b".PyRuntime" for section in elf.sections):  # from 3.10 on
        return True
    return has_string(elf, SHT_DYNSYM, b"\0_PyRuntime\0")


def _read_version(elf: Elf, symbols: Symbols) -> int:
    """Return PY_VERSION_HEX; 0 if it is not known."""
    if _VERSION in symbols:  # from 3.11 on
        return read_word(elf, symbols[_VERSION].address, 4) or 0
    function = symbols.get(_GET_VERSION)
    if function is None:
        return 0
    code = read_code(elf, function, _GET_VERSION_BYTES)
    found = {_parse_version(text) for text in _strings_of(elf, function.address, code)} - {0}
    return found.pop() if len(found) == 1 else 0


_GET_VERSION_BYTES = 512
# lea x(%rip), %r; mov $x, %r of 32 bits
_ADDRESS = re.compile(
    rb"[\x48\x4c]\x8d[\x05\x0d\x15\x1d\x25\x2d\x35\x3d](?P<DISTANCE>....)|[\xb8-\xbf](?P<AT>....)",
    re.DOTALL,
)
_RELEASE = re.compile(rb"3\.([0-9]{1,2})\.([0-9]{1,2})\+?\0")


def _strings_of(elf: Elf, address: int, code: bytes) -> list[bytes]:
    """Return the beginnings of what code has the addresses of."""
    strings = []
    for start in range(len(code)):  # an operand may look like an instruction
        found = _ADDRESS.match(code, start)
        if found is not None:
            word = int.from_bytes(found["DISTANCE"] or found["AT"], "little", signed=True)
            at = address + found.end() + word if found["DISTANCE"] else word
            strings.append(read_bytes(elf, at, 16))
    return strings


def _parse_version(text: bytes) -> int:
    """Return PY_VERSION_HEX of a final release's PY_VERSION, else 0."""
    found = _RELEASE.match(text)
    return 0 if found is None else 3 << 24 | int(found[1]) << 16 | int(found[2]) << 8 | 0xF0


def _read_layout(elf: Elf, symbols: Symbols, version: int) -> tuple[bool, Layout] | Refusal:
    """Return whether the interpreter is free-threaded, and its layout."""
    if not is_final(version):
        return Refusal.UNKNOWN_VERSION
    if minor_of(version) >= FIRST_WITH_DEBUG_OFFSETS:
        content = read_bytes(elf, symbols[RUNTIME].address, DEBUG_OFFSETS_BYTES)
        return read_debug_offsets(content, version)
    if _TRACED_REFERENCES in symbols:  # --with-trace-refs: objects have two words more
        return Refusal.UNKNOWN_BUILD
    layout = LAYOUTS.get(minor_of(version))
    return Refusal.UNKNOWN_VERSION if layout is None else (False, layout)


_NOT_THERE = ThreadState(StateKind.NONE, 0)


def _find_thread_state(
    elf: Elf, symbols: Symbols, minor: int
) -> tuple[ThreadState | Refusal, ThreadState]:
    """Return where it is, and where it is if it is not there, without the lock."""
    if minor <= _LAST_WITH_KEY:
        own = find_key(elf, symbols, KEYS[minor])
        if isinstance(own, Refusal):
            return own, _NOT_THERE
        return ThreadState(StateKind.HOLDER, symbols[RUNTIME].address + HOLDERS[minor]), own
    detached = find_detached(elf, symbols)
    if isinstance(detached, Refusal):
        detached = _NOT_THERE
    return find_in_tls(elf, symbols), detached


def _shift_of(elf: Elf, address: int) -> int:
    return next(
        s.p_vaddr - s.p_offset for s in elf.segments if 0 <= address - s.p_vaddr < s.p_filesz
    )
