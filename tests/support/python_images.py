"""Images of CPython's interpreters, and what a process has where they say.

`imitation` is the source of a file with the symbols of an interpreter of 3.14, and a thread-local
variable of its own for the state of a thread.
"""

import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from symbolizer.runtimes.cpython import Image, Layout, Refusal, StateKind, read_image
from symbolizer.runtimes.layouts import DEBUG_OFFSETS_BYTES, DEBUG_OFFSETS_COOKIE, DEBUG_WORDS
from symbolizer.symbols.elf import FileSource, read_elf

VERSION = 0x030E02F0
_OFFSETS = {
    "free_threaded": 0,
    "thread_state.current_frame": 72,
    "thread_state.thread_id": 152,
    "interpreter_frame.previous": 8,
    "interpreter_frame.executable": 0,
    "interpreter_frame.instr_ptr": 56,
    "interpreter_frame.owner": 74,
    "interpreter_frame.tlbc_index": 0,
    "code_object.co_tlbc": 0,
    "code_object.filename": 112,
    "code_object.qualname": 128,
    "code_object.linetable": 136,
    "code_object.firstlineno": 68,
    "code_object.co_code_adaptive": 208,
    "pyobject.size": 16,
    "pyobject.ob_type": 8,
    "bytes_object.ob_size": 16,
    "bytes_object.ob_sval": 32,
    "unicode_object.state": 32,
    "unicode_object.length": 16,
    "unicode_object.asciiobject_size": 40,
}
_IMITATION = """
#include <stdint.h>
#include <stdio.h>
uint64_t _PyRuntime[2048] __attribute__((section(".PyRuntime"), used)) = {%(words)s};
const unsigned long Py_Version = %(version)d;
char PyCode_Type[416];
__attribute__((noinline)) int _PyEval_EvalFrameDefault(int n) { return printf("%%d", n) + n; }
static __thread long before[3];
%(storage)s __thread void *state;
void *PyThreadState_GetUnchecked(void) { return state; }
void set_state(void *new_state) { state = new_state; before[0]++; }
"""


def image_of(path: Path) -> Image | None:
    with path.open("rb") as file:
        return read_image(read_elf(FileSource(file.fileno())))


def known_image_of(path: Path) -> tuple[Image, Layout]:
    image = image_of(path)
    assert image is not None
    assert image.refusal == Refusal.NONE
    assert image.layout is not None
    return image, image.layout


def debug_offsets(version: int = VERSION, changes: Mapping[str, int] | None = None) -> bytes:
    """Return debug offsets of 3.14 as those of a real build, but for the changes."""
    content = bytearray(DEBUG_OFFSETS_BYTES)
    content[:8] = DEBUG_OFFSETS_COOKIE
    for name, number in {"version": version, **_OFFSETS, **(changes or {})}.items():
        at = 8 * DEBUG_WORDS[name][1]
        content[at : at + 8] = number.to_bytes(8, "little")
    return bytes(content)


def imitation(storage: str = "static", version: int = VERSION, offsets: bytes = b"") -> str:
    """Return C code; `storage` declares the variable, `offsets` are its debug offsets."""
    words = struct.unpack(f"<{DEBUG_OFFSETS_BYTES // 8}Q", offsets or debug_offsets(version))
    text = ", ".join(f"{word}u" for word in words)
    return _IMITATION % {"words": text, "version": version, "storage": storage}


class Process(NamedTuple):
    """A thread of a process; `thread_id` is its pthread_self(), which is the fs base."""

    pid: int
    thread_id: int

    def read(self, address: int, size: int) -> bytes:
        with Path(f"/proc/{self.pid}/mem").open("rb", buffering=0) as memory:
            return os.pread(memory.fileno(), size, address)

    def word(self, address: int, form: str = "Q") -> int:
        (number,) = struct.unpack(f"<{form}", self.read(address, struct.calcsize(form)))
        return int(number)

    def bias(self, file: Path, code_shift: int) -> int:
        """Return what is added to a file's addresses, from the mapping of its code."""
        inode = file.stat().st_ino
        for line in Path(f"/proc/{self.pid}/maps").read_text().splitlines():
            addresses, flags, offset, _, number, *_ = line.split()
            if int(number) == inode and "x" in flags:
                return int(addresses.partition("-")[0], 16) - int(offset, 16) - code_shift
        raise AssertionError(f"{file} is not mapped")

    def thread_state(self, image: Image, bias: int) -> int:
        """Return the state that the thread has when it holds the lock, else 0."""
        state = self._read(image.state_kind, image.state_address + bias, image.state_offset)
        if image.state_kind == StateKind.HOLDER and state and image.layout is not None:
            is_own = self.word(state + image.layout.state_thread_id) == self.thread_id
            return state if is_own else 0
        return state

    def detached_state(self, image: Image, bias: int) -> int:
        """Return the state that the thread has when it does not hold the lock."""
        address = image.detached_address + bias
        return self._read(image.detached_kind, address, image.detached_offset)

    def _read(self, kind: StateKind, address: int, offset: int) -> int:
        base = self.thread_id
        if kind == StateKind.NONE:
            return 0
        if kind == StateKind.HOLDER:
            return self.word(address)
        if kind == StateKind.KEY:
            return self.word(base + 0x310 + 16 * self.word(address, "I") + 8)
        if kind == StateKind.DYNAMIC_TLS:
            block = self.word(self.word(base + 8) + 16 * self.word(address))
            return self.word(block + offset)
        if kind == StateKind.GOT_TLS:
            return self.word(base + self.word(address, "q") + offset)
        return self.word(base + offset)
