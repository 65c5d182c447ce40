"""Source: the bytes of a foreign file, decompressed on the way and bounded.

A file is read once from its start, so a pipe will do. gzip is undone whatever the file is called,
also where gzip was applied twice. A few kilobytes of gzip inside gzip can stand for gigabytes, so
memory is bounded by the size on disk. Text is read line by line: however repetitive, it may be as
long as a single gzip can make it, and its reader reports what it keeps to `keep`. What is held as
a whole may only grow in step with what was read.
"""

import itertools
import re
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from storage.profile import ProfileError

HEAD_BYTES = 64 * 1024
"""The bytes from which the format is detected."""

LINE_LIMIT_BYTES = 1024 * 1024
"""A line of text is cut here: a thousand frames with long names fit into it."""

HELD_LIMIT_BYTES = 512 * 1024 * 1024
"""The largest file that is read as a whole (pprof, JSON)."""

_CHUNK_BYTES = 64 * 1024
_GZIP = b"\x1f\x8b"
_NESTED_LIMIT = 3
_LINE_END = re.compile(rb"\r+\n|\r")
"""`\\r\\r\\n` is what text mode on Windows makes of a line end that was one already."""
_HALF_LINE_END = re.compile(rb"\r{1,2}\Z")
_BOM = b"\xef\xbb\xbf"

_Limit = tuple[int, int]
"""So many bytes, plus so many for each byte on disk."""

_TEXT_GROWTH: _Limit = (32 * 1024 * 1024, 1032)
"""Decompressed text. Deflate packs at most 1,032 times, so only gzip inside gzip exceeds it."""
_KEPT: _Limit = (64 * 1024 * 1024, 300)
"""Memory for what a reader keeps of compressed text: its distinct stacks and names."""
HELD_GROWTH: _Limit = (8 * 1024 * 1024, 25)
"""What is held as a whole. pprof is packed 3 to 10 times, and protobuf makes 25 times as much of a
file that is nothing but empty samples."""
JSON_GROWTH: _Limit = (32 * 1024 * 1024, 25)
"""The same for JSON, whose parsed size is bounded before it is parsed."""


class Source:
    """The decompressed bytes of a stream; `head` can be looked at before they are read."""

    def __init__(self, stream: BinaryIO) -> None:
        self.is_compressed = False
        self._read_bytes = 0
        """Bytes taken from the stream, as they are on disk."""
        self._kept_bytes = 0
        chunks = self._chunks(stream)
        for _ in range(_NESTED_LIMIT):
            head, chunks = _peek(chunks)
            if not head.startswith(_GZIP):
                break
            self.is_compressed = True
            chunks = _inflate(chunks)
        else:
            head, chunks = _peek(chunks)
        self.head = head
        """The first bytes, at most HEAD_BYTES; shorter only if the file is."""
        self._rest = chunks

    def lines(self) -> Iterator[bytes]:
        r"""Return the lines without their ends, which are `\n`, `\r\n` or `\r`.

        A line is cut after LINE_LIMIT_BYTES.

        Raises:
            ProfileError: the compressed bytes are damaged or grow too much.
        """
        start: list[bytes] = []
        length = 0
        held = b""  # the beginning of a line end that may go on in the next chunk
        for read in itertools.chain(self._bounded(_TEXT_GROWTH), [b""]):
            chunk = held + read
            half = _HALF_LINE_END.search(chunk, max(0, len(chunk) - 2)) if read else None
            held = half[0] if half else b""
            chunk = chunk.removesuffix(held)
            if b"\r" in chunk:
                chunk = _LINE_END.sub(b"\n", chunk)
            first, *others = chunk.split(b"\n")
            start.append(first[: LINE_LIMIT_BYTES + 1 - length])
            length += len(start[-1])
            if not others:
                continue
            yield b"".join(start)
            yield from others[:-1]
            start, length = [others[-1]], len(others[-1])
        if length:
            yield b"".join(start)

    def keep(self, size_bytes: int) -> None:
        """Count memory that a reader of lines keeps until its end.

        Raises:
            ProfileError: it is far more than compressed text of this size needs.
        """
        self._kept_bytes += size_bytes
        if self.is_compressed and self._kept_bytes > self._allowed(_KEPT):
            raise ProfileError(
                f"cannot read it: the stacks and names in {self._read_bytes:,} bytes of gzip take"
                f" more than {self._kept_bytes >> 20:,} MiB of memory"
                " (gunzip it first if it is to be trusted)"
            )

    def content(self, growth: _Limit = HELD_GROWTH) -> bytes:
        """Return all bytes.

        Raises:
            ProfileError: they are damaged, grow too much, or are more than HELD_LIMIT_BYTES.
        """
        parts: list[bytes] = []
        size_bytes = 0
        for chunk in self._bounded(growth):
            size_bytes += len(chunk)
            if size_bytes > HELD_LIMIT_BYTES:
                limit_mib = HELD_LIMIT_BYTES >> 20
                raise ProfileError(f"cannot read it: it holds more than {limit_mib} MiB")
            parts.append(chunk)
        return b"".join(parts)

    @property
    def read_bytes(self) -> int:
        """Return how many bytes were read so far, as they are on disk."""
        return self._read_bytes

    def _chunks(self, stream: BinaryIO) -> Iterator[bytes]:
        while chunk := stream.read(_CHUNK_BYTES):
            self._read_bytes += len(chunk)
            yield chunk

    def _allowed(self, limit: _Limit) -> int:
        base_bytes, per_byte = limit
        return base_bytes + per_byte * self._read_bytes

    def _bounded(self, growth: _Limit) -> Iterator[bytes]:
        size_bytes = 0
        is_first = True
        for chunk in self._rest:
            size_bytes += len(chunk)
            if self.is_compressed and size_bytes > self._allowed(growth):
                raise ProfileError(
                    f"cannot read it: {self._read_bytes:,} bytes of gzip grow to more than"
                    f" {size_bytes >> 20:,} MiB, which no profile does"
                    " (gunzip it first if it is to be trusted)"
                )
            yield chunk.removeprefix(_BOM) if is_first else chunk
            is_first = False


def _peek(chunks: Iterator[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """Return the first HEAD_BYTES, and all chunks once more."""
    parts: list[bytes] = []
    length = 0
    for chunk in chunks:
        parts.append(chunk)
        length += len(chunk)
        if length >= HEAD_BYTES:
            break
    head = b"".join(parts)
    return head[:HEAD_BYTES], itertools.chain([head] if head else [], chunks)


def _inflate(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Decompress gzip of one or several members (RFC 1952), at most a chunk at once."""
    inflater = zlib.decompressobj(wbits=31)
    for chunk in chunks:
        pending = chunk
        while pending:
            if inflater.eof:
                if not pending.strip(b"\0"):  # tape blocks are filled with zeros
                    break
                if not _GZIP.startswith(pending[:2]):
                    raise ProfileError("cannot read it: something else follows the gzip data")
                inflater = zlib.decompressobj(wbits=31)
            yield from _pieces(inflater, pending)
            pending = inflater.unused_data
    if not inflater.eof:
        raise ProfileError("cannot read it: the gzip data end too early")


def _pieces(inflater: "zlib._Decompress", pending: bytes) -> Iterator[bytes]:
    while True:
        try:
            piece = inflater.decompress(pending, _CHUNK_BYTES)
        except zlib.error:
            raise ProfileError("cannot read it: damaged gzip data") from None
        if piece:
            yield piece
        pending = inflater.unconsumed_tail
        if inflater.eof or (not pending and len(piece) < _CHUNK_BYTES):
            return
