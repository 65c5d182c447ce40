"""Find where CPython keeps a thread's state, from the code of its exported one-line functions.

From 3.12 on it is in the thread-local variable `_Py_tss_tstate` while the thread holds the lock (or
is attached, in a free-threaded interpreter). That is not exported, but these functions return it.
How they address it is one of the forms of "ELF Handling For Thread-Local Storage", 4.4 and 4.5, as
the linker has relaxed them. Up to 3.11 `_PyRuntime` has the state of whoever holds the lock. The
state that PyGILState keeps is there without the lock, too: up to 3.14 it is the value of a pthread
key, later another such variable. It is another one where a thread runs several interpreters, as
those of uWSGI and mod_wsgi do.
"""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from symbolizer.integers import Wide
from symbolizer.location import Miss
from symbolizer.runtimes.image import Refusal, StateKind
from symbolizer.symbols.elf import SHT_DYNSYM, SHT_RELA, Elf, UnreadableElf
from symbolizer.symbols.named import Symbol, has_string

GETTERS = (
    *(b"PyThreadState_GetUnchecked", b"_PyThreadState_UncheckedGet"),
    *(b"_PyThreadState_GetCurrent", b"PyThreadState_Get"),
)
GILSTATE_GETTER = b"PyGILState_GetThisThreadState"
RUNTIME = b"_PyRuntime"

_GETTER_BYTES = 64
_KEY_IN_TSS = 4
"""Py_tss_t._key."""
_MAX_RELOCATIONS_BYTES = 32 << 20
"""Of all sections; libpython has 500 KB."""
_CHUNK_BYTES = 1 << 20
_RELA = np.dtype([("r_offset", "<u8"), ("r_info", "<u8"), ("r_addend", "<i8")])
R_X86_64_RELATIVE = 8
R_X86_64_DTPMOD64, R_X86_64_DTPOFF64, R_X86_64_TPOFF64, R_X86_64_TLSDESC = 16, 17, 18, 36


ADDRESS_LIMIT = 1 << 47
_OFFSET_LIMIT = 1 << 31


class ThreadState(NamedTuple):
    """Where it is, as in an Image."""

    kind: StateKind
    address: int
    offset: int = 0

    @property
    def is_bounded(self) -> bool:
        is_address = 0 <= self.address < ADDRESS_LIMIT
        return is_address and -_OFFSET_LIMIT <= self.offset < _OFFSET_LIMIT


Symbols = Mapping[bytes, Symbol]
"""By name: those of GETTERS, GILSTATE_GETTER and RUNTIME, as far as the file has them."""


def find_in_tls(elf: Elf, symbols: Symbols) -> ThreadState | Refusal:
    """Return where `_Py_tss_tstate` is.

    Raises:
        UnreadableElf: damaged, or too large.
    """
    for name in GETTERS:
        found = _find_returned(elf, symbols.get(name))
        if found is not None:
            return found
    return Refusal.NO_THREAD_STATE


def find_key(elf: Elf, symbols: Symbols, at: int | None = None) -> ThreadState | Refusal:
    """Return where the pthread key of PyGILState is, from the function that looks it up.

    `at` is the place of the Py_tss_t in `_PyRuntime`, if it is known: it has to be that.
    """
    runtime, getter = symbols[RUNTIME], symbols.get(GILSTATE_GETTER)
    code = b"" if getter is None else read_code(elf, getter, _GETTER_BYTES)
    found = set() if getter is None else set(_addresses_in(getter, code, runtime))
    keys = {address - runtime.address for address in found}
    keys = {key for key in keys if 0 < key < runtime.size and at in (None, key)}
    if len(keys) != 1:
        return Refusal.NO_THREAD_STATE
    state = ThreadState(StateKind.KEY, runtime.address + keys.pop() + _KEY_IN_TSS)
    return _checked(elf, state) or Refusal.NO_THREAD_STATE


def find_detached(elf: Elf, symbols: Symbols) -> ThreadState | Refusal:
    """Return where the state of PyGILState is: from 3.15 on in `_Py_tss_gilstate`."""
    return _find_returned(elf, symbols.get(GILSTATE_GETTER)) or find_key(elf, symbols)


def _find_returned(elf: Elf, function: Symbol | None) -> ThreadState | Refusal | None:
    """Return where the variable is that a function returns; None if that cannot be decoded."""
    if function is None:
        return None
    state = _decode(elf, function.address, read_code(elf, function, _GETTER_BYTES))
    return None if state is None else _checked(elf, state)


def _checked(elf: Elf, state: ThreadState) -> ThreadState | Refusal | None:
    """Return a state that can be found in processes; None if it is where nothing can be."""
    if not state.is_bounded:
        return None
    needs_glibc = state.kind in (StateKind.KEY, StateKind.DYNAMIC_TLS)
    return Refusal.UNSUPPORTED_LIBC if needs_glibc and not has_glibc(elf) else state


def has_glibc(elf: Elf) -> bool:
    """Return whether a file needs glibc, by its DT_NEEDED."""
    return has_string(elf, SHT_DYNSYM, b"\0libc.so.6\0")


def read_code(elf: Elf, symbol: Symbol, limit: int) -> bytes:
    """Return the first bytes of a function, none if it is not in an executable segment."""
    size = min(symbol.size, limit)
    for p_vaddr, p_offset, p_filesz in elf.segments:
        if p_vaddr <= symbol.address and symbol.address + size <= p_vaddr + p_filesz:
            return elf.source.read_at(symbol.address - p_vaddr + p_offset, size)
    return b""


def _compile(code: str) -> re.Pattern[bytes]:
    """Compile a regular expression of code: bytes are hexadecimal, WORD is one of 32 bits."""
    text = re.sub("[0-9a-f]{2}", r"\\x\g<0>", code.replace(" ", ""))
    text = re.sub("([A-Z]+)_WORD", r"(?P<\1>.{4})", text).replace("WORD", ".{4}")
    return re.compile(text.encode(), re.DOTALL)


# endbr64; push %rbp; mov %rsp, %rbp, or another way to align the stack.
_BEGIN = "(?: f30f1efa)? (?: 55 (?: 4889e5)? | 50 | 4883ec08)?"
_END = "(?: 5d | 58 | 59 | 5a | 4883c408)?"
# ret, or test %rax, %rax of PyThreadState_Get.
_DONE = f"{_END} (?: c3 | 4885c0)"
# mov (%rax), %rax; mov x(%rax), %rax
_LOAD = "488b (?: 00 | 40 (?P<BYTE>.) | 80 (?P<DISP>.{4}))"
_LOAD_FS = "64 488b (?: 00 | 40 (?P<BYTE>.) | 80 (?P<DISP>.{4}))"
_FS_0 = "(?: 66)* 64 488b 0425 00000000"
_CALL = "(?: 66 | 67 | 48)* (?: e8 WORD | ff15 WORD)"

_LOCAL_EXEC = tuple(
    _compile(f"{_BEGIN} {code} {_DONE}")
    for code in (
        "64 488b 0425 IMM_WORD",  # mov %fs:x, %rax
        f"{_FS_0} {_END} {_LOAD}",  # mov %fs:0, %rax; mov x(%rax), %rax
        f"{_FS_0} 488d80 IMM_WORD {_END} {_LOAD}",  # lea x(%rax), %rax between them
        f"48c7c0 IMM_WORD (?: 6690)? {_END} {_LOAD_FS}",  # mov $x, %rax; mov %fs:(%rax), %rax
    )
)
_INITIAL_EXEC = tuple(
    _compile(f"{_BEGIN} {code} {_DONE}")
    for code in (
        f"488b05 SLOT_WORD (?P<AFTER>) (?: 6690)? {_END} {_LOAD_FS}",
        f"{_FS_0} 480305 SLOT_WORD (?P<AFTER>) {_END} {_LOAD}",
    )
)
_DYNAMIC = _compile(
    f"{_BEGIN} (?: 66)? 488d3d SLOT_WORD (?P<AFTER>) {_CALL} (?: 90)? {_END} {_LOAD} {_DONE}"
)
_DESCRIPTOR = _compile(f"{_BEGIN} 488d05 SLOT_WORD (?P<AFTER>) ff10 {_END} {_LOAD_FS} {_DONE}")


def _decode(elf: Elf, address: int, code: bytes) -> ThreadState | None:
    """Decode a function that returns a thread-local variable; None if it has no known form."""
    for pattern in _LOCAL_EXEC:
        found = pattern.match(code)
        if found:
            return ThreadState(StateKind.STATIC_TLS, 0, _displacement(found) + _word(found, "IMM"))
    for pattern in _INITIAL_EXEC:
        found = pattern.match(code)
        if found:
            slot = _slot(found, address)
            is_filled = _relocation_at(elf, slot) == R_X86_64_TPOFF64
            state = ThreadState(StateKind.GOT_TLS, slot, _displacement(found))
            return state if is_filled else None
    found = _DYNAMIC.match(code)
    if found:
        return _decode_dynamic(elf, _slot(found, address), _displacement(found))
    found = _DESCRIPTOR.match(code)
    if found and _relocation_at(elf, _slot(found, address)) == R_X86_64_TLSDESC:
        # glibc puts the offset from the fs base behind the function if the module's block is
        # static, as it is in all that is loaded with the program; else an address.
        slot = _slot(found, address) + 8
        return ThreadState(StateKind.GOT_TLS, slot, _displacement(found))
    return None


def _decode_dynamic(elf: Elf, slot: int, displacement: int) -> ThreadState | None:
    """Read a tls_index in the GOT: the module's number, which the loader sets, and an offset."""
    is_filled = _relocation_at(elf, slot) == R_X86_64_DTPMOD64
    offset = read_word(elf, slot + 8)
    if not is_filled or offset is None or _relocation_at(elf, slot + 8) is not None:
        return None
    return ThreadState(StateKind.DYNAMIC_TLS, slot, offset + displacement)


def _word(found: re.Match[bytes], name: str) -> int:
    word = found.groupdict().get(name)
    return 0 if word is None else int.from_bytes(word, "little", signed=True)


def _displacement(found: re.Match[bytes]) -> int:
    return _word(found, "BYTE") + _word(found, "DISP")


def _slot(found: re.Match[bytes], address: int) -> int:
    return address + found.end("AFTER") + _word(found, "SLOT")


def _relocation_at(elf: Elf, address: int) -> int | None:
    """Return r_info of an address's relocation, its type if it has no symbol; None if none is."""
    for rows in _read_relocations(elf):
        found = rows["r_info"][rows["r_offset"] == address]
        if len(found):
            return int(found[0])
    return None


def read_pointers(elf: Elf, areas: Wide, area_bytes: int) -> tuple[Wide, Wide]:
    """Return the places in some areas of memory to which relocations write addresses, and these.

    Areas are given by their first addresses, sorted; they may overlap. The places are sorted, too.
    Pointers without a relocation, or packed ones (DT_RELR), are in the file as they will be.

    Raises:
        UnreadableElf: damaged, or too large.
    """
    pieces = [np.zeros((2, 0), np.uint64)]
    for relocations in _read_relocations(elf):
        rows = relocations[relocations["r_info"] == R_X86_64_RELATIVE]
        places = rows["r_offset"]
        area = np.searchsorted(areas, places, side="right") - 1
        is_inside = (area >= 0) & (places - areas[area] < area_bytes)
        pieces.append(np.stack([places, rows["r_addend"].view(np.uint64)])[:, is_inside])
    found = np.concatenate(pieces, axis=1)
    places, pointers = found[:, np.argsort(found[0], kind="stable")]
    return places, pointers


def _read_relocations(elf: Elf) -> Iterator[npt.NDArray[np.void]]:
    sections = [section for section in elf.sections if section.type == SHT_RELA]
    if sum(section.size for section in sections) > _MAX_RELOCATIONS_BYTES:
        raise UnreadableElf(Miss.TOO_LARGE)
    chunk_bytes = _CHUNK_BYTES // _RELA.itemsize * _RELA.itemsize
    for section in sections:
        for chunk in elf.chunks(section, chunk_bytes, _MAX_RELOCATIONS_BYTES):
            yield np.frombuffer(chunk, _RELA, len(chunk) // _RELA.itemsize)


def read_word(elf: Elf, address: int, size: int = 8) -> int | None:
    """Return the word that the file has at an address; None if there is none."""
    content = read_bytes(elf, address, size)
    return int.from_bytes(content, "little") if len(content) == size else None


def read_bytes(elf: Elf, address: int, size: int) -> bytes:
    """Return up to `size` bytes of what is loaded at an address."""
    for p_vaddr, p_offset, p_filesz in elf.loaded:
        if p_vaddr <= address < p_vaddr + p_filesz:
            end = min(address + size, p_vaddr + p_filesz)
            return elf.source.read_at(address - p_vaddr + p_offset, end - address)
    return b""


# lea x(%r), %r; lea x(%rip), %rdi; mov x(%r), %edi; mov x(%rip), %edi; mov $x, %edi
_OPERAND = re.compile(
    rb"[\x48\x49]\x8d(?:(?P<BASED>[\x80-\xbf])|(?P<NEAR>\x3d))"
    rb"|\x8b(?:(?P<BASED_KEY>[\xb8-\xbf])|(?P<KEY>\x3d))|(?P<AT>\xbf)"
)


def _addresses_in(function: Symbol, code: bytes, runtime: Symbol) -> Iterator[int]:
    """Return addresses of a Py_tss_t that code may compute, or whose key it may read."""
    for place in range(len(code)):  # an operand may look like an instruction
        found = _OPERAND.match(code, place)
        operand = b"" if found is None else code[found.end() : found.end() + 4]
        if found is None or len(operand) < 4:
            continue
        word = int.from_bytes(operand, "little", signed=True)
        after = function.address + found.end() + 4
        if found["BASED"]:
            yield runtime.address + word
        elif found["NEAR"]:
            yield after + word
        elif found["BASED_KEY"]:
            yield runtime.address + word - _KEY_IN_TSS
        elif found["KEY"]:
            yield after + word - _KEY_IN_TSS
        else:
            yield word
