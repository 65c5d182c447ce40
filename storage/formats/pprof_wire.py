"""protobuf's wire format by numpy: the integers of thousands of messages read at once.

A message is a row of tags, each with a variable-length integer or a length and bytes (protobuf's
"Encoding"). Whatever is not as our encoder writes it raises UnusualError.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from storage.hashing import Hashes
from storage.profile import Integers

Bytes = npt.NDArray[np.uint8]
Flags = npt.NDArray[np.bool_]
Unsigned = npt.NDArray[np.uint32] | Hashes

_LONGEST = 10
"""Bytes of a number of 64 bits."""


class UnusualError(Exception):
    """The message is not in the form that our encoder writes."""


def require(condition: object) -> None:
    if not condition:
        raise UnusualError


def numbers_in(content: Bytes) -> tuple[Unsigned, Integers]:
    """Return all variable-length integers of bytes that hold nothing else, and their last bytes."""
    require(len(content) == 0 or content[-1] < 0x80)
    is_last = content < 0x80
    ends = np.flatnonzero(is_last)
    if not (is_last[1:] | is_last[:-1]).all():
        return numbers_at(content, ends), ends
    # All have one byte or two, as nearly always: to multiply all bytes is faster than look-ups.
    numbers = content.astype(np.uint16)
    has_more = content[:-1] >> 7
    numbers[1:] *= has_more * np.uint8(127) + np.uint8(1)
    numbers[1:] += (content[:-1] & 0x7F) * has_more
    return numbers.take(ends).astype(np.uint32), ends


def numbers_at(content: Bytes, ends: Integers) -> Unsigned:
    """Return the variable-length integers that end at these bytes, 32 bits wide, or 64 if needed.

    The first of them must begin right after the end of another number, or at byte 0.
    """
    # The last byte holds the highest bits. Nearly all numbers have one byte or two.
    values = content.take(ends).astype(np.uint32)
    before = content.take(ends - 1, mode="wrap")
    if len(ends) and ends[0] == 0:
        before[0] = 0
    has_more = before >> 7
    values <<= has_more * np.uint8(7)
    values |= (before & 0x7F) * has_more
    long = np.flatnonzero(has_more)
    long = long[(content.take(ends[long] - 2, mode="wrap") >= 0x80) & (ends[long] > 1)]
    if len(long) == 0:
        return values
    numbers = values[long].astype(np.uint64)
    at, left = ends[long] - 2, np.arange(len(long))
    for _ in range(2, _LONGEST):
        numbers[left] = (numbers[left] << np.uint64(7)) | (content[at[left]] & 0x7F)
        left = left[at[left] > 0]
        at -= 1
        left = left[content[at[left]] >= 0x80]
        if len(left) == 0:
            break
    else:
        raise UnusualError
    if numbers.max() >= 1 << 32:
        values = values.astype(np.uint64)
    values[long] = numbers
    return values


def numbers_from(content: Bytes, starts: Integers, present: Flags) -> tuple[Hashes, Integers]:
    """Return the variable-length integers that begin at these bytes, and their ends.

    Where none is present it is 0, and ends where it starts. One that goes past the end of `content`
    ends there or raises UnusualError.
    """
    values, ends = np.zeros(len(starts), dtype=np.uint64), starts.copy()
    # All at once, also those that have ended: choosing takes longer than reading.
    has_more = present.astype(np.uint8)
    for i in range(_LONGEST):
        byte = content.take(ends, mode="clip")
        values |= ((byte & 0x7F) * has_more).astype(np.uint64) << np.uint64(7 * i)
        ends += has_more
        has_more &= byte >> 7
        if not has_more.any():
            return values, ends
    raise UnusualError


class Messages:
    """Messages of one type. Their fields are read in the order of their tags, of all at once.

    `at` is where each one's next field begins, `ends` where the message does.
    """

    def __init__(self, content: Bytes, at: Integers, ends: Integers) -> None:
        self._content = content
        self._ends = ends
        self._at = at

    @classmethod
    def of(cls, messages: Sequence[bytes]) -> "Messages":
        lengths = np.fromiter(map(len, messages), np.int64, len(messages))
        require((lengths > 0).all())
        ends = np.cumsum(lengths)
        return cls(np.frombuffer(b"".join(messages), np.uint8), ends - lengths, ends)

    def __len__(self) -> int:
        return len(self._ends)

    def number(self, tag: int) -> Hashes:
        """Read a field with a number; it is 0 in messages that lack it."""
        is_there = (self._content.take(self._at, mode="clip") == tag) & (self._at < self._ends)
        values, self._at = numbers_from(self._content, self._at + is_there, is_there)
        return values

    def unread(self) -> Integers:
        """Return which messages have more fields, by their position."""
        return np.flatnonzero(self._at < self._ends)

    def inner(self, tag: int, which: Integers) -> "Messages":
        """Read a field of some messages that is a message itself, of less than 128 bytes."""
        at = self._at[which]
        lengths = self._content.take(at + 1, mode="clip")
        ends = at + 2 + lengths
        require((self._content[at] == tag).all() and (lengths < 0x80).all())
        require((ends <= self._ends[which]).all())
        self._at[which] = ends
        return Messages(self._content, at + 2, ends)

    def require_read(self) -> None:
        """Require that the fields that were read are all, and end where their messages do."""
        require(np.array_equal(self._at, self._ends))
