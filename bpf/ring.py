"""The consumer's side of BPF_MAP_TYPE_RINGBUF (Documentation/bpf/ringbuf.rst)."""

import mmap
import sys
from collections.abc import Iterator

_BUSY, _DISCARD, _HEADER = 1 << 31, 1 << 30, 8


class RingBuffer:
    """A ring buffer in memory shared with the kernel. The descriptor stays the caller's.

    Attributes:
        size_bytes: of its records together.
    """

    def __init__(self, fd: int, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._consumer = mmap.mmap(fd, mmap.PAGESIZE)
        self._producer = mmap.mmap(
            fd, mmap.PAGESIZE + 2 * self.size_bytes, prot=mmap.PROT_READ, offset=mmap.PAGESIZE
        )
        self._consumed = memoryview(self._consumer).cast("Q")
        self._produced = memoryview(self._producer).cast("Q")

    @property
    def produced(self) -> int:
        """Return the position up to which records have been begun since the buffer was made."""
        return self._produced[0]

    @property
    def consumed(self) -> int:
        """Return the position up to which records were taken."""
        return self._consumed[0]

    def take(self) -> Iterator[bytes]:
        """Return the complete records, up to the first one that is still being written."""
        position, end = self._consumed[0], self._produced[0]
        while position < end:
            # The data are mapped twice in a row, so that no record is cut at the end.
            at = mmap.PAGESIZE + position % self.size_bytes
            header = int.from_bytes(self._producer[at : at + 4], sys.byteorder)
            if header & _BUSY:
                break
            length = header & ~(_BUSY | _DISCARD)
            if not header & _DISCARD:
                yield self._producer[at + _HEADER : at + _HEADER + length]
            position += (_HEADER + length + 7) & ~7
            self._consumed[0] = position

    def close(self) -> None:
        self._consumed.release()
        self._produced.release()
        self._consumer.close()
        self._producer.close()
