"""Objects of CPython 3.11 that are written into the memory of this process, sound or not."""

import ctypes
import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from symbolizer.runtimes.object_layouts import OBJECT_LAYOUTS
from symbolizer.runtimes.python_objects import DICT, INT, TEXT

VERSION = 0x030B07F0
LAYOUT = OBJECT_LAYOUTS[11]
_TYPE_BYTES = 1024


class Runtime(NamedTuple):
    """Where an interpreter's objects are."""

    runtime: int
    interpreter: int
    modules: int
    active: int
    thread: int
    name: int
    number: int


class Heap:
    """Memory that is filled from its beginning on."""

    def __init__(self, size_bytes: int = 1 << 16) -> None:
        self._memory = ctypes.create_string_buffer(size_bytes)
        self._start = ctypes.addressof(self._memory)
        self._next = self._start + 64
        self._types = {flags: self.put(self._type(flags)) for flags in (0, DICT, INT, TEXT)}

    @property
    def size_bytes(self) -> int:
        """How much of it was filled."""
        return self._next - self._start

    def flip(self, offset: int, bits: int) -> None:
        """Change a byte of what was filled."""
        self._memory[offset] = bytes([self._memory[offset][0] ^ bits])

    def content(self, address: int, size: int) -> bytes:
        return ctypes.string_at(address, size)

    def put(self, content: bytes) -> int:
        address = self._next
        self.write(address, content)
        self._next += -(-len(content) // 16) * 16 + 64
        return address

    def write(self, address: int, content: bytes) -> None:
        assert self._start <= address
        assert address + len(content) <= self._start + len(self._memory)
        ctypes.memmove(address, content, len(content))

    def write_word(self, address: int, word: int) -> None:
        self.write(address, struct.pack("<Q", word))

    def _type(self, flags: int, dict_offset: int = 0) -> bytes:
        content = bytearray(_TYPE_BYTES)
        struct.pack_into("<Q", content, LAYOUT.type_flags, flags)
        struct.pack_into("<q", content, LAYOUT.type_dict_offset, dict_offset)
        return bytes(content)

    def _object(self, flags: int, *words: int) -> bytes:
        return struct.pack(f"<{2 + len(words)}Q", 1, self._types[flags], *words)

    def text(self, text: str, length: int | None = None) -> int:
        content = text.encode("ascii")
        size = len(content) if length is None else length
        state = 1 << 2 | 8 << 2 | 16 << 2  # of one byte a character, compact, ASCII
        return self.put(self._object(TEXT, size, 0, state, 0) + content + b"\0")

    def number(self, number: int) -> int:
        return self.put(self._object(INT, 1) + struct.pack("<I", number))

    def keys(self, entries: Sequence[tuple[int, int]], count: int | None = None) -> int:
        """Return keys of a dictionary, with a hash in each entry."""
        log2_size = max(3, (2 * len(entries)).bit_length())
        log2_bytes = log2_size + (0 if log2_size < 8 else 1 if log2_size < 16 else 2)
        number = len(entries) if count is None else count
        head = struct.pack("<QBBBxIQQ", 1, log2_size, log2_bytes, 0, 0, 0, number)
        body = b"".join(struct.pack("<QQQ", 0, key, value) for key, value in entries)
        return self.put(head + bytes(1 << log2_bytes) + body)

    def dictionary(self, entries: Sequence[tuple[int, int]], count: int | None = None) -> int:
        return self.dictionary_of(self.keys(entries, count))

    def dictionary_of(self, keys: int) -> int:
        return self.put(self._object(DICT, 0, 0, keys, 0))

    def instance(self, attributes: Mapping[str, int]) -> int:
        """Return an object with a dictionary, at an offset that its type says."""
        own = self.dictionary([(self.text(key), value) for key, value in attributes.items()])
        of_class = self.put(self._type(0, dict_offset=16))
        return self.put(struct.pack("<QQQ", 1, of_class, own))

    def runtime(self, name: str, number: int, threads: Sequence[int] = ()) -> Runtime:
        """Return the runtime of a program with one thread, and others after it."""
        text, ident = self.text(name), self.number(number)
        thread = self.instance({"_name": text, "_native_id": ident})
        active = self.dictionary([(self.number(1), each) for each in (thread, *threads)])
        own = self.dictionary([(self.text("_active"), active)])
        module = self.put(self._object(0, own))
        modules = self.dictionary([(self.text("sys"), module), (self.text("threading"), module)])
        interpreter = self.put(bytes(LAYOUT.modules) + struct.pack("<Q", modules))
        at = self.put(bytes(LAYOUT.interpreters) + struct.pack("<QQ", interpreter, interpreter))
        return Runtime(at, interpreter, modules, active, thread, text, ident)
