"""Store and load unwind tables: for each code address of a file, an unwind rule.

A table is an array of 8-byte rows sorted by address, which the walk in the kernel bisects. They are
made by build.py, which alone reads object files.

The rows are cut into pages of 4 KiB of addresses, so that a row needs only the low bits of its
address, and a look-up touches few cache lines. The rule in force at the start of a page is repeated
there; pages without rows are holes.

If the file is an interpreter, what is known of it stands behind the rows (runtimes/image.py).
"""

import contextlib
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from symbolizer.file_cache import FileCache
from symbolizer.integers import Wide
from symbolizer.runtimes.image import MAX_IMAGE_BYTES, Image
from symbolizer.unwind.rules import ROW

PAGE_BITS = 12
PAGE = np.dtype([("number", "<u4"), ("first", "<u4"), ("count", "<u4")])
"""A page: its number (ELF address >> PAGE_BITS), its first row and how many it has."""

_MAGIC = b"EFLUNWD\n"
# Raise this when the layout changes, or the rule that any address gets, or what an image says.
_VERSION = 7
# magic, version, CRC-32 of all that follows it, key (NUL-padded), pages, rows, bytes of the image
_HEADER = struct.Struct("<8sII136sQQQ")
_CHECKED_FROM = 16
_CHECKED_AT_ONCE = 32 << 10


class PagedRows(Protocol):
    """A table of which single pages are looked at."""

    @property
    def key(self) -> str: ...

    @property
    def pages(self) -> npt.NDArray[np.void]: ...

    @property
    def row_count(self) -> int: ...

    @property
    def image(self) -> Image | None: ...

    def rows_of(self, place: int) -> npt.NDArray[np.void]:
        """Return the rows of `pages[place]`."""


@dataclass(frozen=True, slots=True)
class UnwindTable:
    """The rows of one file.

    Attributes:
        key: the file's build id, or what the table was stored by.
        pages: of dtype PAGE, sorted by number.
        rows: of dtype ROW, page after page.
        image: of an interpreter's file.
    """

    key: str
    pages: npt.NDArray[np.void]
    rows: npt.NDArray[np.void]
    image: Image | None = None

    @property
    def row_count(self) -> int:
        return len(self.rows)

    def rows_of(self, place: int) -> npt.NDArray[np.void]:
        """Return the rows of `pages[place]`."""
        _, first, count = self.pages[place].tolist()
        return self.rows[first : first + count]

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
        image = b"" if self.image is None else self.image.pack()
        counts = (self.key.encode(), len(self.pages), len(self.rows), len(image))
        checksum = zlib.crc32(_HEADER.pack(_MAGIC, _VERSION, 0, *counts)[_CHECKED_FROM:])
        checksum = zlib.crc32(self.pages.view(np.uint8).data, checksum)
        checksum = zlib.crc32(self.rows.view(np.uint8).data, checksum)
        checksum = zlib.crc32(image, checksum)
        file.write(_HEADER.pack(_MAGIC, _VERSION, checksum, *counts))
        file.write(self.pages.view(np.uint8).data)
        file.write(self.rows.view(np.uint8).data)
        file.write(image)

    @classmethod
    def read(cls, content: bytes, key: str) -> "UnwindTable | None":
        """Read a written table; None if it is damaged or another file's."""
        counts = _read_header(content, len(content), key)
        if counts is None or zlib.crc32(memoryview(content)[_CHECKED_FROM:]) != counts.checksum:
            return None
        image = Image.unpack(content[counts.image_at :])
        if image is None and counts.image_bytes:
            return None
        pages = np.frombuffer(content, PAGE, counts.pages, _HEADER.size)
        return cls(key, pages, np.frombuffer(content, ROW, counts.rows, counts.rows_at), image)


class StoredTable:
    """A table on disk whose rows are read page by page, as they are needed.

    The largest have seven megabytes, of which a walk looks at a few hundred bytes. The file stays
    open for as long as this object lives, so that its eviction does not matter.

    Attributes:
        key, pages, image: as of an UnwindTable.
        row_count: how many rows there are.
    """

    def __init__(
        self,
        fd: int,
        key: str,
        pages: npt.NDArray[np.void],
        image: Image | None,
        counts: "_Counts",
    ) -> None:
        """Take over the descriptor of a file that `open` has checked."""
        self._fd = fd
        self._rows_at = counts.rows_at
        self.key = key
        self.pages = pages
        self.image = image
        self.row_count = counts.rows

    def __del__(self) -> None:
        os.close(self._fd)

    @classmethod
    def open(cls, file: BinaryIO, key: str) -> "StoredTable | None":
        """Check a written table; None if it is damaged or another file's. `file` may be closed."""
        fd, size = file.fileno(), os.fstat(file.fileno()).st_size
        counts = _read_header(os.pread(fd, _HEADER.size, 0), size, key)
        if counts is None:
            return None
        checksum = 0
        for at in range(_CHECKED_FROM, size, _CHECKED_AT_ONCE):
            checksum = zlib.crc32(os.pread(fd, _CHECKED_AT_ONCE, at), checksum)
        if checksum != counts.checksum:
            return None
        content = os.pread(fd, counts.pages * PAGE.itemsize, _HEADER.size)
        pages = np.frombuffer(content, PAGE)
        image = Image.unpack(os.pread(fd, counts.image_bytes, counts.image_at))
        if image is None and counts.image_bytes:
            return None
        return cls(os.dup(fd), key, pages, image, counts)

    def rows_of(self, place: int) -> npt.NDArray[np.void]:
        """Return the rows of `pages[place]`; none if they cannot be read any more."""
        _, first, count = self.pages[place].tolist()
        size = count * ROW.itemsize
        try:
            content = os.pread(self._fd, size, self._rows_at + first * ROW.itemsize)
        except OSError:
            content = b""
        return np.frombuffer(content if len(content) == size else b"", ROW)


class _Counts(NamedTuple):
    """What the header of a table says."""

    checksum: int
    pages: int
    rows: int
    image_bytes: int

    @property
    def rows_at(self) -> int:
        return _HEADER.size + self.pages * PAGE.itemsize

    @property
    def image_at(self) -> int:
        return self.rows_at + self.rows * ROW.itemsize


def _read_header(head: bytes, size: int, key: str) -> _Counts | None:
    """Read the header of a file of this size; None if it is no table, or another file's."""
    if len(head) < _HEADER.size:
        return None
    magic, version, checksum, held, *sizes = _HEADER.unpack_from(head)
    counts = _Counts(checksum, *sizes)
    is_whole = (magic, version, held.rstrip(b"\0")) == (_MAGIC, _VERSION, key.encode())
    is_whole &= counts.image_bytes <= MAX_IMAGE_BYTES
    return counts if is_whole and size == counts.image_at + counts.image_bytes else None


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

    def open(self, key: str) -> StoredTable | None:
        """Return the table of a key, to be read in parts; None if it has to be built."""
        file = self._files.open(key)
        if file is None:
            return None
        with file, contextlib.suppress(OSError):
            return StoredTable.open(file, key)
        return None

    def holds(self, key: str) -> bool:
        """Return whether there is a table of a key, by its header, and mark it as used."""
        file = self._files.open(key)
        if file is None:
            return False
        with file, contextlib.suppress(OSError):
            size = os.fstat(file.fileno()).st_size
            return _read_header(file.read(_HEADER.size), size, key) is not None
        return False

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
