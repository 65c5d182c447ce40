"""Read the memory of a process, many pieces at once, within limits.

The process runs on meanwhile, and may have put anything there: what is read is material to check.
A page may be one that its owner never lets arrive (userfaultfd(2), FUSE), so a reader child does
this, which can be given up.
"""

import ctypes
import errno
import os
from collections.abc import Sequence

import numpy as np

_PIECES_OF_CALL = 1024
"""UIO_MAXIOV: what one process_vm_readv(2) takes."""
_MAX_CALLS = 400
_MAX_BYTES = 8 << 20
"""Read in all. The interpreter of a program with 4,000 modules and 50 threads takes 0.5 MB."""
_ADDRESS_LIMIT = 1 << 47

_libc = ctypes.CDLL(None, use_errno=True)
_libc.process_vm_readv.restype = ctypes.c_ssize_t


class UnreadableMemoryError(Exception):
    """Nothing of a process can be read."""


class NotPermittedError(UnreadableMemoryError):
    """The kernel forbids it (ptrace(2), "access mode checking")."""


class TooMuchError(UnreadableMemoryError):
    """More was asked for than may be read of one process."""


class ProcessMemory:
    """The memory of a process, by any thread of it that still runs. Not thread-safe."""

    def __init__(self, tid: int) -> None:
        self._tid = tid
        self._calls_left, self._bytes_left = _MAX_CALLS, _MAX_BYTES

    def read(self, addresses: Sequence[int], size: int) -> list[bytes]:
        """Return what is at each address, as many bytes of each; b"" where that is not there."""
        return self.read_pieces([(address, size) for address in addresses])

    def read_pieces(self, pieces: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return the pieces given by address and size; b"" for one that is not there as a whole.

        Raises:
            UnreadableMemoryError: of nothing more, see its kinds.
        """
        found = [b""] * len(pieces)
        wanted = [
            number
            for number, (address, size) in enumerate(pieces)
            if 0 < address < _ADDRESS_LIMIT and size > 0
        ]
        self._bytes_left -= sum(pieces[number][1] for number in wanted)
        if self._bytes_left < 0:
            raise TooMuchError
        start = 0
        while start < len(wanted):
            some = wanted[start : start + _PIECES_OF_CALL]
            content = self._call([pieces[number] for number in some])
            end, whole = 0, 0
            for number in some:
                size = pieces[number][1]
                if end + size > len(content):
                    break
                found[number] = content[end : end + size]
                end, whole = end + size, whole + 1
            # The kernel stops at the first piece that is not there.
            start += whole + (whole < len(some))
        return found

    def _call(self, pieces: Sequence[tuple[int, int]]) -> bytes:
        self._calls_left -= 1
        if self._calls_left < 0:
            raise TooMuchError
        remote = np.array(pieces, np.uint64)
        content = np.empty(sum(size for _, size in pieces), np.uint8)
        local = np.array([(content.ctypes.data, len(content))], np.uint64)
        read = _libc.process_vm_readv(
            *(ctypes.c_int(self._tid), ctypes.c_void_p(local.ctypes.data), ctypes.c_ulong(1)),
            *(ctypes.c_void_p(remote.ctypes.data), ctypes.c_ulong(len(pieces)), ctypes.c_ulong(0)),
        )
        if read >= 0:
            return content[:read].tobytes()
        error = ctypes.get_errno()
        if error == errno.EFAULT:
            return b""
        if error == errno.EPERM:
            raise NotPermittedError
        raise UnreadableMemoryError(os.strerror(error))
