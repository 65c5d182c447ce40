"""Jitdump: `jit-PID.dump`, where just-in-time compilers write their code, its names and its lines.

The format is that of tools/perf/Documentation/jitdump-specification.txt of Linux: a header, then
records with a size each, appended as code is made. A writer maps the file executable, so that it
stands among the mappings of its process. Only names and lines are read here, not the code itself.
"""

import struct
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple

from symbolizer.runtimes.code_map import MAX_RANGES, CodeMap
from symbolizer.runtimes.code_names import is_v8

ReadAt = Callable[[int, int], bytes]
"""Returns up to so many bytes at an offset of a file."""

_MAGIC = 0x4A695444  # "JiTD"
_CODE_LOAD, _CODE_MOVE, _DEBUG_INFO, _CODE_CLOSE = 0, 1, 2, 3
_HEADER_BYTES, _PREFIX_BYTES = 40, 16
_NAME_BYTES = 8192
_BLOCK_BYTES = 256 << 10
_MAX_DEBUG_BYTES = 1 << 20
"""Of one function. Larger ones have no lines."""
_SAME_FILE = b"\xff"
"""A name that says: as the line before."""
_V8_SHIFT = 0x40
"""V8 counts an ELF header to the addresses of lines, for what perf makes of them."""


class DamagedDump(Exception):  # noqa: N818 - states what the file is
    """It is not a jitdump, or not one of a known version."""


class Line(NamedTuple):
    """From an address on, code is of a line of a file."""

    address: int
    file: bytes
    line: int


class JitCode(NamedTuple):
    """A function. `lines` are in the order of their addresses."""

    name: bytes
    lines: tuple[Line, ...] = ()


class JitDump:
    """What a jitdump says, read on from where it was left.

    Attributes:
        position: where the next record begins.
        records: how many were read.
        is_closed: whether the writer said that no more will come.
    """

    def __init__(self) -> None:
        self.position = self.records = self.read_bytes = 0
        self.is_closed = False
        self._code: CodeMap[JitCode] = CodeMap()
        self._at_start: dict[int, JitCode] = {}
        self._order = ""
        self._lines: tuple[int, tuple[Line, ...]] = (0, ())
        self._block, self._block_at = b"", 0

    @property
    def size_bytes(self) -> int:
        return self._code.size_bytes

    @property
    def dropped(self) -> int:
        return self._code.dropped

    def read(self, read_at: ReadAt, size: int, is_enough: Callable[[], bool]) -> bool:
        """Read on to the last whole record of a file of this size; return whether it is reached.

        `is_enough` is asked before each record.

        Raises:
            DamagedDump: it is no jitdump; what was read before still holds.
        """
        self._block = b""  # the file may have grown
        if not self.position and not self._read_header(read_at):
            return True
        while not is_enough():
            prefix = self._at(read_at, self.position, _PREFIX_BYTES)
            if len(prefix) < _PREFIX_BYTES:
                return True
            kind, length, _ = struct.unpack(f"{self._order}IIQ", prefix)
            if not length or self.position + length > size:  # still being written
                return True
            if length < _PREFIX_BYTES:
                raise DamagedDump("a record shorter than its head")
            self._take(read_at, kind, length)
            self.position += length
            self.records += 1
        return False

    def find(self, addresses: Sequence[int]) -> list[tuple[int, int, bytes, bytes, int]]:
        """Return the ranges that hold any of these: start, end, name, file and line.

        File and line are empty and 0 if they are unknown. A range ends where another line begins.
        """
        wanted, found = sorted(addresses), []
        for start, end, code in self._code.find(addresses):
            if not code.lines:
                found.append((start, end, code.name, b"", 0))
                continue
            begins = [line.address for line in code.lines]
            places = {
                bisect_right(begins, address) - 1
                for address in wanted[bisect_right(wanted, start - 1) : bisect_right(wanted, end)]
                if address < end
            }
            for place in sorted(places):
                first = max(start, begins[place]) if place >= 0 else start
                last = min(end, begins[place + 1]) if place + 1 < len(begins) else end
                _, file, line = code.lines[place] if place >= 0 else Line(0, b"", 0)
                found.append((first, last, code.name, file, line))
        return found

    def _read_header(self, read_at: ReadAt) -> bool:
        header = self._at(read_at, 0, _HEADER_BYTES)
        if len(header) < _HEADER_BYTES:
            return False
        for order in "<>":
            magic, version, size = struct.unpack_from(f"{order}III", header)
            if magic == _MAGIC and version == 1 and size >= _HEADER_BYTES:
                self._order, self.position = order, size
                return True
        raise DamagedDump("no header")

    def _take(self, read_at: ReadAt, kind: int, size: int) -> None:
        at, left = self.position + _PREFIX_BYTES, size - _PREFIX_BYTES
        if kind == _CODE_LOAD and left >= 40:
            content = self._at(read_at, at, min(left, 40 + _NAME_BYTES))
            _, _, _, address, length, _ = struct.unpack_from(f"{self._order}IIQQQQ", content)
            name, end, _ = content[40:].partition(b"\0")
            self._load(address, length, name if end else b"")
        elif kind == _CODE_MOVE and left >= 48:
            content = self._at(read_at, at, 48)
            _, _, _, old, new, length, _ = struct.unpack(f"{self._order}IIQQQQQ", content)
            self._move(old, new, length)
        elif kind == _DEBUG_INFO and 16 <= left <= _MAX_DEBUG_BYTES:
            self._lines = self._parse_lines(self._at(read_at, at, left))
        elif kind == _CODE_CLOSE:
            self.is_closed = True

    def _load(self, address: int, length: int, name: bytes) -> None:
        (of, lines), self._lines = self._lines, (0, ())
        if not name:
            return
        if of != address:
            lines = ()
        elif is_v8(name):
            lines = tuple(line._replace(address=line.address - _V8_SHIFT) for line in lines)
        self._add(address, length, JitCode(name, lines))

    def _move(self, old: int, new: int, length: int) -> None:
        code = self._at_start.pop(old, None)
        if code is not None:
            by = new - old
            lines = tuple(line._replace(address=line.address + by) for line in code.lines)
            self._add(new, length, JitCode(code.name, lines))

    def _add(self, address: int, length: int, code: JitCode) -> None:
        taken = len(code.name) + sum(64 + len(line.file) for line in code.lines)
        self._code.add(address, length, code, taken)
        if len(self._at_start) >= MAX_RANGES:  # what is moved was mostly made a while ago
            self._at_start.clear()
        self._at_start[address] = code

    def _parse_lines(self, content: bytes) -> tuple[int, tuple[Line, ...]]:
        """Return the address of the function that they are of, and its lines."""
        function, count = struct.unpack_from(f"{self._order}QQ", content)
        lines: list[Line] = []
        at, file = 16, b""
        for _ in range(min(count, len(content) // 17)):
            end = content.find(b"\0", at + 16)
            if end < 0:
                break
            address, line, _ = struct.unpack_from(f"{self._order}QiI", content, at)
            name = content[at + 16 : end]
            file = file if name == _SAME_FILE else name[:_NAME_BYTES]
            lines.append(Line(address, file, max(0, line)))
            at = end + 1
        return function, tuple(sorted(lines, key=lambda line: line.address))

    def _at(self, read_at: ReadAt, offset: int, size: int) -> bytes:
        """Return bytes of the file, which is read in blocks; fewer at its end."""
        if not self._block_at <= offset <= offset + size <= self._block_at + len(self._block):
            self._block = read_at(offset, max(size, _BLOCK_BYTES))
            self._block_at = offset
            self.read_bytes += len(self._block)
        begin = offset - self._block_at
        return self._block[begin : begin + size]
