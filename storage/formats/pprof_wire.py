"""protobuf's wire format by numpy: the integers of thousands of messages read at once.

A message is a row of tags, each with a variable-length integer or a length and bytes (protobuf's
"Encoding"). Whatever is not as our encoder writes it raises UnusualError.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from storage.hashing import Hashes, Numbers
from storage.profile import Integers

Bytes = npt.NDArray[np.uint8]
Unsigned = npt.NDArray[np.uint32] | Hashes

_LONGEST = 10
"""Bytes of a number of 64 bits."""


class UnusualError(Exception):
    """The message is not in the form that our encoder writes."""


def require(condition: object) -> None:
    if not condition:
        raise UnusualError


def require_tags(tags: Unsigned, allowed: tuple[int, ...]) -> None:
    is_allowed = np.zeros(256, dtype=bool)
    is_allowed[list(allowed)] = True
    require((tags < 256).all() and is_allowed[tags].all())


class Varints(NamedTuple):
    """All variable-length integers of bytes that hold nothing else."""

    values: Unsigned
    """32 bits wide if all fit, else 64."""
    ends: Integers
    """Position of each one's last byte."""

    @classmethod
    def of(cls, content: Bytes) -> "Varints":
        if len(content) == 0:
            return cls(np.zeros(0, np.uint64), np.zeros(0, np.int64))
        require(content[-1] < 0x80)
        ends = np.flatnonzero(content < 0x80)
        return cls(numbers_at(content, ends), ends)


def numbers_at(content: Bytes, ends: Integers) -> Unsigned:
    """Return the variable-length integers that end at these bytes.

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


def numbers_from(content: Bytes, starts: Integers) -> tuple[Hashes, Integers]:
    """Return the variable-length integers that begin at these bytes, and their ends.

    One that goes past the end of `content` ends there or raises UnusualError.
    """
    values = np.zeros(len(starts), dtype=np.uint64)
    at, left = starts.copy(), np.arange(len(starts))
    for i in range(_LONGEST):
        byte = content.take(at[left], mode="clip")
        values[left] |= (byte & np.uint64(0x7F)) << np.uint64(7 * i)
        at[left] += 1
        left = left[byte >= 0x80]
        if len(left) == 0:
            return values, at
    raise UnusualError


class Pairs(NamedTuple):
    """Messages whose fields are all a tag and a number, as one list of pairs."""

    owner: Integers
    """Number of the message."""
    tags: Unsigned
    values: Unsigned
    starts: Integers
    """Position of the tag; one more at the end."""
    message_ends: Integers

    @classmethod
    def of(cls, messages: Sequence[bytes]) -> "Pairs":
        content = b"".join(messages)
        lengths = np.fromiter(map(len, messages), np.int64, len(messages))
        ends = np.cumsum(lengths)
        values, number_ends = Varints.of(np.frombuffer(content, np.uint8))
        require(len(values) % 2 == 0)
        starts = np.append([0], number_ends[1::2] + 1)
        # Every message must end where a pair does.
        past = np.searchsorted(starts, ends)
        require(np.array_equal(starts[past], ends))
        owner = np.repeat(np.arange(len(messages)), np.diff(past, prepend=0))
        return cls(owner, values[::2], values[1::2], starts, ends)


def is_ascending(major: Numbers, minor: Unsigned) -> bool:
    key = major * 256 + np.minimum(minor, 255).astype(np.int64)
    return bool((key[1:] > key[:-1]).all())
