"""Store and load unwind tables: for each code address of a file, an unwind rule.

A table is an array of 8-byte rows sorted by address, which the walk in the kernel bisects. They are
made by build.py, which alone reads object files.

The rows are cut into pages of 4 KiB of addresses, so that a row needs only the low bits of its
address, and a look-up touches few cache lines. The rule in force at the start of a page is repeated
there; pages without rows are holes.
"""

import contextlib
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from symbolizer.file_cache import FileCache
from symbolizer.integers import Wide
from symbolizer.unwind.rules import ROW

PAGE_BITS = 12
PAGE = np.dtype([("number", "<u4"), ("first", "<u4"), ("count", "<u4")])
"""A page: its number (ELF address >> PAGE_BITS), its first row and how many it has."""

_MAGIC = b"EFLUNWD\n"
# Raise this when the layout changes, or the rule that any address gets.
_VERSION = 2
# magic, version, CRC-32 of all that follows it, key (NUL-padded), pages, rows
_HEADER = struct.Struct("<8sII136sQQ")
_CHECKED_FROM = 16


@dataclass(frozen=True, slots=True)
class UnwindTable:
    """The rows of one file.

    Attributes:
        key: the file's build id, or what the table was stored by.
        pages: of dtype PAGE, sorted by number.
        rows: of dtype ROW, page after page.
    """

    key: str
    pages: npt.NDArray[np.void]
    rows: npt.NDArray[np.void]

    @property
    def memory_bytes(self) -> int:
        return self.pages.nbytes + self.rows.nbytes

    def find(self, elf_addresses: Wide) -> npt.NDArray[np.void]:
        """Return the row in force at each address, as the walk does; a HOLE if there is none."""
        found = np.zeros(len(elf_addresses), dtype=ROW)
        if not len(self.pages):
            return found
        numbers = self.pages["number"].astype(np.uint64)
        pages = np.minimum(
            np.searchsorted(numbers, elf_addresses >> np.uint64(PAGE_BITS)), len(numbers) - 1
        )
        is_known = numbers[pages] == elf_addresses >> np.uint64(PAGE_BITS)
        owners = np.repeat(numbers, self.pages["count"])
        keys = owners << np.uint64(PAGE_BITS) | self.rows["pc_low"].astype(np.uint64)
        # Every page has a row at its start, so an address in a known page finds a row of that page.
        places = np.searchsorted(keys, elf_addresses[is_known], side="right") - 1
        found[is_known] = self.rows[places]
        return found

    def write(self, file: BinaryIO) -> None:
        """Write the table to a file.

        Raises:
            OSError: it cannot be written.
        """
        counts = (self.key.encode(), len(self.pages), len(self.rows))
        checksum = zlib.crc32(_HEADER.pack(_MAGIC, _VERSION, 0, *counts)[_CHECKED_FROM:])
        checksum = zlib.crc32(self.pages.view(np.uint8).data, checksum)
        checksum = zlib.crc32(self.rows.view(np.uint8).data, checksum)
        file.write(_HEADER.pack(_MAGIC, _VERSION, checksum, *counts))
        file.write(self.pages.view(np.uint8).data)
        file.write(self.rows.view(np.uint8).data)

    @classmethod
    def read(cls, content: bytes, key: str) -> "UnwindTable | None":
        """Read a written table; None if it is damaged or another file's."""
        if len(content) < _HEADER.size:
            return None
        magic, version, checksum, held, page_count, row_count = _HEADER.unpack_from(content)
        rows_at = _HEADER.size + page_count * PAGE.itemsize
        is_whole = (
            (magic, version, held.rstrip(b"\0")) == (_MAGIC, _VERSION, key.encode())
            and len(content) == rows_at + row_count * ROW.itemsize
            and zlib.crc32(memoryview(content)[_CHECKED_FROM:]) == checksum
        )
        if not is_whole:
            return None
        pages = np.frombuffer(content, PAGE, page_count, _HEADER.size)
        return cls(key, pages, np.frombuffer(content, ROW, row_count, rows_at))


class UnwindCache:
    """A directory of unwind tables by a key of what they are built from, bounded in bytes.

    A file without known rules has a table without rows.
    """

    def __init__(self, directory: Path, limit_bytes: int = 256 << 20) -> None:
        self._files = FileCache(directory, limit_bytes)

    def load(self, key: str) -> UnwindTable | None:
        """Read the table of a key; None if it has to be built."""
        file = self._files.open(key)
        if file is None:
            return None
        with file, contextlib.suppress(OSError):
            return UnwindTable.read(file.read(), key)
        return None

    def holds(self, key: str) -> bool:
        """Return whether there is a table of a key, and mark it as used."""
        return self._files.touch(key) > 0

    def remove(self, key: str) -> None:
        """Remove a table that cannot be read, so that it is built again."""
        self._files.remove(key)

    def store(self, table: UnwindTable) -> None:
        """Write a table by its key.

        Raises:
            OSError: it cannot be written.
        """
        with self._files.create(table.key) as file:
            table.write(file)
