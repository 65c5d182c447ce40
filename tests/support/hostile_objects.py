"""Objects that cost a reader far more than they weigh: one of each kind, by name.

Each is a profile of ours with something in large numbers, in kilobytes of gzip. Callers say how
many bytes it fills.
"""

import gzip
import itertools
from collections.abc import Callable

import orjson

from storage.formats import pprof
from storage.formats.pprof_message import decompress
from tests.support import profiles as some

ROOM_BYTES = 20 << 20
"""What most kinds fill to exceed the limits of an object."""


def varint(number: int) -> bytes:
    """Return a number as protobuf writes it."""
    parts = bytearray()
    while number >= 0x80:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*parts, number])


def field(number: int, content: bytes) -> bytes:
    """Return a field that has a length: bytes, a message, or packed numbers."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def _real() -> bytes:
    return decompress(pprof.encode(some.sample_profile()))


def _filled(piece: bytes, room: int) -> bytes:
    return piece * (room // len(piece))


def _with(more: bytes) -> bytes:
    return gzip.compress(_real() + more, 1)


def _numbered(make: Callable[[int], bytes], count: int) -> bytes:
    return b"".join(map(make, range(1, count + 1)))


def _distinct_samples(count: int) -> bytes:
    """Samples whose stacks differ."""
    places = [varint(1 + i % 5) for i in range(5)]
    stacks = itertools.islice(itertools.product(places, repeat=10), count)
    return b"".join(b"\x12\x10\x0a\x0a" + b"".join(stack) + b"\x12\x02\x01\x01" for stack in stacks)


def _commented(comment: bytes) -> bytes:
    """Return a profile whose first comment is this one."""
    return gzip.compress(b"\x0a\x00" * 2 + field(6, b"") + field(6, comment) + b"\x68\x01", 1)


def _comment_again_and_again() -> bytes:
    """One comment of a megabyte, which is named again and again."""
    comment = pprof_comment(services=[{"labels": {"service": str(i)}} for i in range(30_000)])
    return _commented(comment) + gzip.compress(field(13, b"\x01" * 1_000_000))


def pprof_comment(**fields: object) -> bytes:
    record = {"schema": 1, "type": "cpu", "window": [0, 60], **fields}
    return b"everflame " + orjson.dumps(record)


KINDS: dict[str, Callable[[int], bytes]] = {
    "empty samples": lambda room: _with(_filled(b"\x12\x00", room)),
    "small samples": lambda room: _with(_filled(b"\x12\x07\x0a\x01\x01\x12\x02\x01\x01", room)),
    "distinct samples": lambda room: _with(_distinct_samples(room // 20)),
    "one sample of many locations": lambda room: _with(field(2, field(1, _filled(b"\x01", room)))),
    "one sample of many unpacked locations": lambda room: _with(
        field(2, _filled(b"\x08\x01", room))
    ),
    "samples of many locations": lambda room: _with(
        _filled(field(2, field(1, b"\x01" * 1000) + b"\x12\x02\x01\x01"), room)
    ),
    "one sample of many values": lambda room: _with(field(2, field(2, _filled(b"\x01", room)))),
    "one sample of many labels": lambda room: _with(field(2, _filled(b"\x1a\x00", room))),
    "samples of many labels": lambda room: _with(
        _filled(field(2, b"\x0a\x01\x01\x12\x02\x01\x01" + b"\x1a\x04\x08\x01\x10\x02" * 500), room)
    ),
    "empty mappings": lambda room: _with(_filled(b"\x1a\x00", room)),
    "numbered mappings": lambda room: _with(
        _numbered(lambda i: field(3, b"\x08" + varint(i)), room // 20)
    ),
    "empty locations": lambda room: _with(_filled(b"\x22\x00", room)),
    "numbered locations": lambda room: _with(
        _numbered(lambda i: field(4, b"\x08" + varint(100 + i) + b"\x10\x01"), room // 20)
    ),
    "one location of many lines": lambda room: _with(
        field(4, b"\x08\x7f" + _filled(b"\x22\x00", room))
    ),
    "one location of many long lines": lambda room: _with(
        field(4, b"\x08\x7f" + _filled(b"\x22\x04\x08\x01\x10\x01", room))
    ),
    "locations of many unknown numbers": lambda room: _with(field(4, _filled(b"\x38\x01", room))),
    "empty functions": lambda room: _with(_filled(b"\x2a\x00", room)),
    "numbered functions": lambda room: _with(
        _numbered(lambda i: field(5, b"\x08" + varint(100 + i)), room // 20)
    ),
    "empty strings": lambda room: _with(_filled(b"\x32\x00", room)),
    "strings of control characters": lambda room: _with(
        _filled(field(6, b"\x01" * 1023), 3 * room)
    ),
    "strings of astral characters": lambda room: _with(
        _filled(field(6, "\U0010ffff".encode() * 1024), 3 * room)
    ),
    "one long string": lambda room: _with(field(6, _filled(b"\x80", 3 * room))),
    "sample types": lambda room: _with(_filled(b"\x0a\x00", room)),
    "period types": lambda room: _with(_filled(b"\x5a\x00", room)),
    "packed comments": lambda room: _with(field(13, _filled(b"\x01", room))),
    "unpacked comments": lambda room: _with(_filled(b"\x68\x01", room)),
    "a comment named again and again": lambda _room: _comment_again_and_again(),
    "unknown numbers": lambda room: _with(_filled(b"\x98\x06\x01", room)),
    "unknown numbers between strings": lambda room: _with(_filled(b"\x98\x06\x01\x32\x00", room)),
    "unknown bytes": lambda room: _with(_filled(b"\xa2\x06\x00", room)),
    "empty groups": lambda room: _with(_filled(b"\xa3\x06\xa4\x06", room)),
    "nested groups": lambda room: _with(b"\xa3\x06" * (room // 4) + b"\xa4\x06" * (room // 4)),
    "unended groups": lambda room: _with(_filled(b"\xa3\x06", room)),
    "a comment of empty lists": lambda room: _commented(
        b'everflame {"services":[' + _filled(b"[],", 3 * room) + b"[]]}"
    ),
    "a comment of objects": lambda room: _commented(
        b'everflame {"services":[' + _filled(b'{"a":1},', 3 * room) + b"{}]}"
    ),
    "a deep comment": lambda room: _commented(
        b"everflame " + b"[" * (3 * room // 2) + b"]" * (3 * room // 2)
    ),
    "a comment of deep objects": lambda room: _commented(
        b"everflame " + _filled(b'{"a":', 3 * room)
    ),
    "a comment of a long number": lambda room: _commented(
        b'everflame {"ticks":' + _filled(b"9", 3 * room) + b"}"
    ),
    "a comment of many modules": lambda room: _commented(
        b"everflame-modules {" + b",".join(b'"%d":{}' % i for i in range(room // 5)) + b"}"
    ),
    "a comment of many segments": lambda room: _commented(
        b'everflame-modules {"a":{"segments":[' + _filled(b"[0,0,0],", 3 * room) + b"[0,0,0]]}}"
    ),
    "empty gzip members": lambda room: gzip.compress(_real()) + gzip.compress(b"") * (room // 130),
    "a gzip of three megabytes of empty members": lambda room: gzip.compress(b"") * (room // 20),
    "gzip of zeros": lambda room: gzip.compress(bytes(10 * room), 1),
    "zeros behind gzip": lambda room: gzip.compress(_real()) + bytes(room),
    "plain zeros": bytes,
    "gzip in gzip": lambda room: gzip.compress(gzip.compress(_filled(b"\x12\x00", room))),
    "stored blocks of nothing": lambda room: (
        gzip.compress(b"")[:10] + b"\x00\x00\x00\xff\xff" * (room // 5)
    ),
}
