"""Symbol tables for look-up, and the bounded directory of files that stores them.

Tables are stored by a hash of the content that names come from, as anybody can write any build id
into a file. A table is a file: a header, the sorted arrays, the strings. The arrays are held in
memory (12 bytes per function); names are read from the file one by one, so that libLLVM costs
0.4 MB instead of 4. A file is written under another name and renamed. Its checksum covers all of
it; if that is wrong, the table is built again. Files are read, never mapped, so damage cannot raise
a signal.
"""

import os
import re
import struct
import tempfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from symbolizer.file_cache import FileCache
from symbolizer.location import ElfAddress, FileOffset, Segment
from symbolizer.symbols.candidates import (
    AT_PLT,
    IN_FDE_RANGE,
    MAX_FUNCTIONS,
    MAX_NAME_BYTES,
    NO_FILE,
    Functions,
)

_MAGIC = b"EFLSYMS\n"
# Raise this when the layout changes, or the name that any address gets.
_VERSION = 5
# magic, version, CRC-32 of all that follows it, key (NUL-padded), base, functions, string bytes,
# segments, functions with files: all or none
_HEADER = struct.Struct("<8sII136sQQQQQ")
_CHECKED_FROM = 16
_MAX_SEGMENTS = 64
# Three per symbol: it may split one around it in two; and the entry point. One more for unnamed
# functions.
_MAX_FUNCTIONS = 4 * MAX_FUNCTIONS
_COPY_BYTES = 1 << 18

_FIRST_READ_BYTES = 256
_MAX_FILE_BYTES = 1 << 12

_MAX_COMPARED = 1 << 15
"""A table with more names is a good one, whatever else is known."""

_KEY = re.compile(r"[0-9a-f]{2,128}")


class SymbolTable:
    """The functions of one file by file offset. It holds a file descriptor until it is closed."""

    def __init__(
        self,
        file: BinaryIO,
        functions: Functions,
        segments: tuple[Segment, ...],
        strings_at: int,
        strings_bytes: int,
    ) -> None:
        self._fd = os.dup(file.fileno())
        self._functions = functions
        self._strings_at = strings_at
        self._strings_bytes = strings_bytes
        self.segments = segments
        self.memory_bytes = 12 * len(functions.starts) + 8 * len(functions.files)
        is_stub = functions.names & (AT_PLT | IN_FDE_RANGE) == AT_PLT
        self.named = int((functions.names & IN_FDE_RANGE == 0).sum())
        """How many functions have a name; those known only by their FDE range do not."""
        self.named_code = self.named - int(is_stub.sum())
        """How many of these are no PLT stubs: the more, the better the table."""

    def __len__(self) -> int:
        return len(self._functions.starts)

    def find(self, offsets: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """Return the number of the function around each file offset, -1 if there is none."""
        functions = self._functions
        if not len(functions.starts):
            return np.full(len(offsets), -1, dtype=np.int64)
        found: npt.NDArray[np.int64]
        # Unsigned: an offset below the base wraps around and lies after all functions, as wanted.
        within = np.minimum(offsets - np.uint64(functions.base), np.uint64((1 << 32) - 1))
        narrow = within.astype(np.uint32)
        found = np.searchsorted(functions.starts, narrow, side="right").astype(np.int64) - 1
        found[(found >= 0) & (narrow >= functions.ends[found])] = -1
        return found

    def ranges(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the first file offset of each function and the first beyond it, one row each."""
        starts, ends = self._functions.starts[numbers], self._functions.ends[numbers]
        return np.stack([starts, ends], axis=1).astype(np.int64) + self._functions.base

    def extends(self, other: "SymbolTable") -> bool:
        """Return whether a table names all that another one names, and nothing differently."""
        theirs = np.flatnonzero(other._functions.names & (AT_PLT | IN_FDE_RANGE) == 0)  # noqa: SLF001 - of the same class
        if len(theirs) > _MAX_COMPARED:
            return False
        starts = other.ranges(theirs)[:, 0]
        mine = self.find(starts.astype(np.uint64))
        if (mine < 0).any() or (self.ranges(mine)[:, 0] != starts).any():
            return False
        pairs = zip(mine.tolist(), theirs.tolist(), strict=True)
        return all(self.name(number) == other.name(their) for number, their in pairs)

    def unnamed_starts(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the first file offset of each function that is unnamed, -1 for named ones."""
        functions = self._functions
        names = functions.names[numbers]
        is_in_fde_range = names & IN_FDE_RANGE != 0
        first = np.where(is_in_fde_range, names & ~IN_FDE_RANGE, np.uint32(0))
        starts = functions.starts[first].astype(np.int64) + functions.base
        return np.where(is_in_fde_range, starts, -1)

    def name(self, number: int) -> bytes:
        """Return a function's name as the file has it, without a symbol version; PLT: `name@plt`.

        It is empty for a function that is known only by its FDE range.
        """
        position = int(self._functions.names[number])
        if position & int(IN_FDE_RANGE):
            return b""
        is_plt = bool(position & int(AT_PLT))
        position &= ~int(AT_PLT)
        name = self._read_string(position, _FIRST_READ_BYTES)
        if len(name) == _FIRST_READ_BYTES:
            name = self._read_string(position, MAX_NAME_BYTES)
        # .symtab of a library has `name@@VERSION`; names do not begin with an @.
        at = name.find(b"@", 1)
        name = name[:at] if at > 0 else name
        return name + b"@plt" if is_plt and name else name

    def place(self, number: int) -> tuple[bytes, int]:
        """Return the file and the line at which a function is defined, if known."""
        if not len(self._functions.files) or self._functions.files[number] == NO_FILE:
            return b"", 0
        file = self._read_string(int(self._functions.files[number]), _MAX_FILE_BYTES)
        return file, int(self._functions.lines[number])

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    __del__ = close

    def _read_string(self, position: int, size: int) -> bytes:
        size = min(size, self._strings_bytes - position)
        if size <= 0:
            return b""
        text = os.pread(self._fd, size, self._strings_at + position)
        return text.partition(b"\0")[0]


class SymbolCache:
    """A directory of symbol tables, bounded in bytes.

    Without a directory a table lives in an unnamed temporary file, until it is closed.
    """

    def __init__(self, directory: Path | None, limit_bytes: int) -> None:
        self._files: FileCache | None = None
        if directory is not None:
            self._files = FileCache(directory, limit_bytes, files="*.symbols")

    def load(self, key: str) -> SymbolTable | None:
        """Open the table of a key. A damaged one is removed and counts as absent."""
        file = self._files.open(f"{key}.symbols") if self._files and _KEY.fullmatch(key) else None
        if self._files is None or file is None:
            return None
        with file:
            table = _read_table(file, key)
        if table is None:
            self.remove(key)
        return table

    def holds(self, key: str) -> bool:
        """Return whether there is a table of a key, and mark it as used."""
        return self._files is not None and self._files.touch(f"{key}.symbols") > 0

    def remove(self, key: str) -> None:
        if self._files is not None:
            self._files.remove(f"{key}.symbols")

    def store(
        self,
        key: str,
        functions: Functions,
        segments: tuple[Segment, ...],
        strings: Iterable[bytes],
    ) -> SymbolTable:
        """Write a table and return it, opened.

        Raises:
            OSError: it cannot be written.
            UnreadableElf: `strings` raised it.
        """
        if self._files is None or not _KEY.fullmatch(key):
            with tempfile.TemporaryFile() as unnamed:
                return _write_table(unnamed, key, functions, segments, strings)
        with self._files.create(f"{key}.symbols") as file:
            return _write_table(file, key, functions, segments, strings)


def _write_table(
    file: BinaryIO,
    key: str,
    functions: Functions,
    segments: tuple[Segment, ...],
    strings: Iterable[bytes],
) -> SymbolTable:
    file.write(bytes(_HEADER.size))
    body = [np.array(segments, dtype="<u8").tobytes()]
    columns = (functions.starts, functions.ends, functions.names, functions.files, functions.lines)
    body += [column.astype("<u4").tobytes() for column in columns]
    checksum = 0
    for part in body:
        file.write(part)
        checksum = zlib.crc32(part, checksum)
    strings_at = file.tell()
    for chunk in strings:
        file.write(chunk)
        checksum = zlib.crc32(chunk, checksum)
    strings_bytes = file.tell() - strings_at
    counts = (
        functions.base,
        len(functions.starts),
        strings_bytes,
        len(segments),
        len(functions.files),
    )
    header = _HEADER.pack(_MAGIC, _VERSION, 0, key.encode(), *counts)
    checksum = zlib.crc32(header[_CHECKED_FROM:], checksum)
    file.seek(0)
    file.write(_HEADER.pack(_MAGIC, _VERSION, checksum, key.encode(), *counts))
    file.flush()
    return SymbolTable(file, functions, segments, strings_at, strings_bytes)


def _read_table(file: BinaryIO, key: str) -> SymbolTable | None:
    """Return the table in a file; None if it is damaged or another module's."""
    try:
        head = file.read(_HEADER.size)
        if len(head) < _HEADER.size:
            return None
        fields = _HEADER.unpack(head)
        magic, version, checksum, name, base, count, strings_bytes, segment_count, placed = fields
        strings_at = _HEADER.size + 24 * segment_count + 12 * count + 8 * placed
        is_plausible = (
            (magic, version, name.rstrip(b"\0")) == (_MAGIC, _VERSION, key.encode())
            and count <= _MAX_FUNCTIONS
            and segment_count <= _MAX_SEGMENTS
            and placed in (0, count)
            and os.fstat(file.fileno()).st_size == strings_at + strings_bytes
        )
        body = file.read(strings_at - _HEADER.size) if is_plausible else b""
        if not is_plausible or _checksum(file, body, head) != checksum:
            return None
    except OSError:
        return None
    segments = np.frombuffer(body, "<u8", 3 * segment_count).reshape(-1, 3).tolist()
    columns = np.frombuffer(body, "<u4", 3 * count, 24 * segment_count).reshape(3, -1)
    places = np.frombuffer(body, "<u4", 2 * placed, 24 * segment_count + 12 * count).reshape(2, -1)
    return SymbolTable(
        file,
        Functions(base, *columns, *places),
        tuple(Segment(ElfAddress(v), FileOffset(o), s) for v, o, s in segments),
        strings_at,
        strings_bytes,
    )


def _checksum(file: BinaryIO, body: bytes, head: bytes) -> int:
    checksum = zlib.crc32(body)
    while chunk := file.read(_COPY_BYTES):
        checksum = zlib.crc32(chunk, checksum)
    return zlib.crc32(head[_CHECKED_FROM:], checksum)
