"""pprof's message: its protobuf classes, made from a table, the gzip around it, and its limits."""

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory
from isal import isal_zlib

from storage.formats.limits import OBJECT, Limits
from storage.profile import ProfileError

_GZIP = b"\x1f\x8b"
_PIECE_BYTES = 1 << 16
"""The inflater copies what follows a member, which it gets in pieces: otherwise the time for a file
of empty members would grow with the square of its size."""

_SMALL_BYTES = 1 << 18
"""A message of so few costs little, whatever they are."""

# Field numbers of google/pprof's profile.proto, in order from 1. A capital is a message type; `*`
# marks a repeated field. The string table is declared as bytes, which is the same on the wire:
# protobuf refuses a whole file for one string that is not UTF-8, and writers in Go and C++ do not
# check theirs.
_SCHEMA = {
    "Profile": "*sample_type:ValueType *sample:Sample *mapping:Mapping *location:Location"
    " *function:Function *string_table:bytes drop_frames:int64 keep_frames:int64 time_nanos:int64"
    " duration_nanos:int64 period_type:ValueType period:int64 *comment:int64"
    " default_sample_type:int64",
    "ValueType": "type:int64 unit:int64",
    "Sample": "*location_id:uint64 *value:int64 *label:Label",
    "Label": "key:int64 str:int64 num:int64 num_unit:int64",
    "Mapping": "id:uint64 memory_start:uint64 memory_limit:uint64 file_offset:uint64"
    " filename:int64 build_id:int64 has_functions:bool has_filenames:bool has_line_numbers:bool"
    " has_inline_frames:bool",
    "Location": "id:uint64 mapping_id:uint64 address:uint64 *line:Line is_folded:bool",
    "Line": "function_id:uint64 line:int64",
    "Function": "id:uint64 name:int64 system_name:int64 filename:int64 start_line:int64",
}


# protobuf makes classes at run time, so they have no types: Any.
def message_class(package: str, unread: frozenset[str] = frozenset()) -> Any:
    """Return a new class of Profile messages, made from the table above.

    Generated code would be tied to one version of protobuf. Messages of the types in `unread`, and
    fields of these names, stay bytes: for readers that decode thousands of them at once.
    """
    types = descriptor_pb2.FieldDescriptorProto
    scalars = {
        "int64": types.TYPE_INT64,
        "uint64": types.TYPE_UINT64,
        "bool": types.TYPE_BOOL,
        "bytes": types.TYPE_BYTES,
    }
    file = descriptor_pb2.FileDescriptorProto(
        name=f"{package}.proto", package=package, syntax="proto3"
    )
    for name, fields in _SCHEMA.items():
        described = file.message_type.add(name=name)
        for number, declared in enumerate(fields.split(), start=1):
            field_name, kind = declared.lstrip("*").split(":")
            added = described.field.add(name=field_name, number=number)
            repeated = declared.startswith("*")
            added.label = types.LABEL_REPEATED if repeated else types.LABEL_OPTIONAL
            is_unread = not unread.isdisjoint({kind, field_name})
            added.type = scalars.get("bytes" if is_unread else kind, types.TYPE_MESSAGE)
            if added.type == types.TYPE_MESSAGE:
                added.type_name = f".{package}.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.Profile"))


ProfileMessage: Any = message_class("everflame.pprof")
"""The class of whole profiles. protobuf makes classes at run time, so they have no types: Any."""


def decompress(content: bytes, limits: Limits = OBJECT) -> bytes:
    """Return the content of gzip data, or the bytes themselves if they are not gzip.

    Raises:
        ProfileError: the gzip data are damaged, or exceed a limit.
    """
    limit_bytes = limits.size_bytes
    parts: list[bytes] = []
    members, room, rest = 0, limit_bytes, memoryview(content)
    while rest[:2] == _GZIP:  # a gzip file may have several members (RFC 1952)
        members += 1
        if members > limits.members:
            raise ProfileError(f"cannot read pprof: {_exceeded(limits.members, 'gzip members')}")
        inflater, at = isal_zlib.decompressobj(wbits=31), 0
        while not inflater.eof and room >= 0:
            if at == len(rest):
                raise ProfileError("cannot read pprof: the gzip data end too early")
            piece = rest[at : at + _PIECE_BYTES]
            at += len(piece)
            try:
                parts.append(inflater.decompress(piece, room + 1))
            except isal_zlib.error:  # type: ignore[misc] # its stub has the class as a value
                raise ProfileError("cannot read pprof: damaged gzip") from None
            room -= len(parts[-1])
        if room < 0:
            break
        rest = rest[at - len(inflater.unused_data) :]
    if room < 0 or (not parts and len(content) > limit_bytes):
        raise ProfileError(f"cannot read pprof: {_exceeded(limit_bytes, 'bytes')}")
    if parts and rest:
        raise ProfileError("cannot read pprof: unexpected bytes after the gzip data")
    return b"".join(parts) if parts else content


_Parts: Any = message_class(
    "everflame.parts",
    unread=frozenset({"ValueType", "Sample", "Mapping", "Location", "Function", "comment"}),
)


def split(plain: bytes) -> Any:
    """Return a message whose own fields are parsed, and all messages in it are left as bytes.

    Raises:
        DecodeError: of google.protobuf.message: this is not a profile, or a damaged one.
    """
    parts = _Parts()
    parts.ParseFromString(plain)
    return parts


def check_parts(plain: bytes, limits: Limits = OBJECT) -> Any:
    """Count the parts of a message before it is parsed, which takes many times its size.

    Return what `split` does, or None for a small message, of which nothing is counted.

    Raises:
        ProfileError: it is damaged, or exceeds a limit.
    """
    if len(plain) <= _SMALL_BYTES:
        return None
    # A number ends in a byte below 0x80, and every field and message begins with one.
    ends = _count_numbers([plain])
    if ends > limits.fields:
        _check_fields(plain, limits.fields)
    try:
        parts = split(plain)
    except message.DecodeError:
        raise ProfileError("cannot read pprof: this is not a profile, or a damaged one") from None
    for name, found, limit in (
        ("samples", parts.sample, limits.samples),
        ("locations", parts.location, limits.locations),
        ("functions", parts.function, limits.functions),
        ("mappings", parts.mapping, limits.mappings),
        ("sample types", parts.sample_type, limits.sample_types),
        ("strings", parts.string_table, limits.strings),
    ):
        if len(found) > limit:
            raise ProfileError(f"cannot read pprof: {_exceeded(limit, name)}")
    for name, found, limit in (
        ("numbers in samples", parts.sample, limits.sample_numbers),
        ("numbers in locations", parts.location, limits.location_numbers),
        ("numbers in functions", parts.function, limits.function_numbers),
        ("numbers in mappings", parts.mapping, limits.mapping_numbers),
        ("numbers in sample types", parts.sample_type, 100 * limits.sample_types),
        ("comments", parts.comment, limits.comments),
    ):
        if ends > limit and _count_numbers(found) > limit:
            raise ProfileError(f"cannot read pprof: {_exceeded(limit, name)}")
    limit_bytes = limits.string_bytes + limits.comment_bytes
    if len(plain) > limit_bytes and sum(map(len, parts.string_table)) > limit_bytes:
        raise ProfileError(
            f"cannot read pprof: {_exceeded(limits.string_bytes, 'bytes in strings')}"
        )
    return parts


def _exceeded(limit: int, what: str) -> str:
    return f"it holds more than {limit:,} {what}"


def _count_numbers(messages: Sequence[bytes]) -> int:
    """Return how many variable-length integers messages hold at most."""
    content = messages[0] if len(messages) == 1 else b"".join(messages)
    return int(np.count_nonzero(np.frombuffer(content, np.int8) >= 0))


def _check_fields(plain: bytes, limit: int) -> None:
    """Count the fields of a message, those inside of it left out, up to a limit.

    Damage is left to the parser. It is one loop without calls: a field takes 0.2 us.
    """
    at, end, left = 0, len(plain), limit
    with contextlib.suppress(IndexError):
        while at < end and left:
            left -= 1
            wire_type = plain[at] & 7
            while plain[at] >= 0x80:
                at += 1
            at += 1
            if wire_type == 2:
                length = shift = 0
                while (byte := plain[at]) >= 0x80:
                    length |= (byte & 0x7F) << shift
                    shift += 7
                    at += 1
                at += 1 + (length | byte << shift)
            elif wire_type == 0:
                while plain[at] >= 0x80:
                    at += 1
                at += 1
            else:
                at += _FIXED_BYTES.get(wire_type, 0)
    if at < end and not left:
        raise ProfileError(f"cannot read pprof: {_exceeded(limit, 'fields')}")


_FIXED_BYTES = {1: 8, 5: 4}
"""By wire type; those of groups, which begin and end without a length, have none."""
