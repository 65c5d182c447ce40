"""Read integers at many positions of a byte array at once.

They are of fixed width, or LEB128 (DWARF 5, section 7.6).
"""

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]
Wide = npt.NDArray[np.uint64]
Flags = npt.NDArray[np.bool_]

PADDING_BYTES = 64
"""Zeros that follow the content, so that an operand can be read before its end is checked."""
MAX_LEB_BYTES = 10


def distinct(numbers: Ints) -> list[int]:
    distinct: list[int] = np.flatnonzero(np.bincount(numbers)).tolist()
    return distinct


def view(content: Bytes, form: str) -> npt.NDArray[np.int64]:
    """Return a view with a number of the format `form` at each position that has room for one."""
    dtype = np.dtype(form)
    return np.ndarray((len(content) - dtype.itemsize + 1,), dtype, content, strides=(1,))


# Numbers of more than 8 bytes are read as this one, which is not an offset of any real frame. So
# sums and products stay within 64 bits.
_TOO_LARGE = 1 << 40
_LEB_BYTES_READ = 8


def read_uleb(content: Bytes, at: Ints) -> tuple[Ints, Ints]:
    """Return the numbers at positions before the padding, and their widths in bytes."""
    values, widths = _read_leb(content, at)
    return np.minimum(values, _TOO_LARGE), widths


def read_sleb(content: Bytes, at: Ints) -> tuple[Ints, Ints]:
    values, widths = _read_leb(content, at)
    bits = 7 * np.minimum(widths, _LEB_BYTES_READ)
    values -= (values >> (bits - 1)) << bits
    values[widths > _LEB_BYTES_READ] = _TOO_LARGE
    return np.clip(values, -_TOO_LARGE, _TOO_LARGE), widths


def _read_leb(content: Bytes, at: Ints) -> tuple[Ints, Ints]:
    byte = content[at]
    values = (byte & 0x7F).astype(np.int64)
    widths = np.ones(len(at), dtype=np.int64)
    longer = np.flatnonzero(byte >= 0x80)
    for k in range(1, MAX_LEB_BYTES):
        if not len(longer):
            break
        byte = content[np.minimum(at[longer] + k, len(content) - 1)]
        if k < _LEB_BYTES_READ:
            values[longer] |= (byte & 0x7F).astype(np.int64) << (7 * k)
        else:
            values[longer] = _TOO_LARGE
        widths[longer] += 1
        longer = longer[byte >= 0x80]
    return values, widths
