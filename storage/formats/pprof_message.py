"""pprof's message: its protobuf classes, made from a table, and the gzip around it."""

import zlib
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from storage.profile import ProfileError

SIZE_LIMIT_BYTES = 64 * 1024 * 1024
"""Decompressed size of a profile. 200,000 stacks of 30 frames take 16 MB. A larger one is refused:
a few hundred kilobytes of gzip could otherwise fill the memory, because a file of empty samples
takes 25 times its size once protobuf has parsed it."""

COUNT_LIMIT = 2**62
"""Sum of a file's samples or values. A larger one is refused: the columns are 64 bits wide."""

_GZIP = b"\x1f\x8b"
_PIECE_BYTES = 1 << 16
"""The inflater copies what follows a member, which it gets in pieces: otherwise the time for a file
of empty members would grow with the square of its size."""

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

    Generated code would be tied to one version of protobuf. Messages of the types in `unread` stay
    bytes, for readers that decode thousands of them at once.
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
            added.type = scalars.get("bytes" if kind in unread else kind, types.TYPE_MESSAGE)
            if added.type == types.TYPE_MESSAGE:
                added.type_name = f".{package}.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.Profile"))


def decompress(content: bytes, limit_bytes: int) -> bytes:
    """Return the content of gzip data, or the bytes themselves if they are not gzip.

    Raises:
        ProfileError: the gzip data are damaged, or hold more than `limit_bytes`.
    """
    parts: list[bytes] = []
    room, rest = limit_bytes, memoryview(content)
    while rest[:2] == _GZIP:  # a gzip file may have several members (RFC 1952)
        inflater, at = zlib.decompressobj(wbits=31), 0
        while not inflater.eof and room >= 0:
            if at == len(rest):
                raise ProfileError("cannot read pprof: the gzip data end too early")
            piece = rest[at : at + _PIECE_BYTES]
            at += len(piece)
            try:
                parts.append(inflater.decompress(piece, room + 1))
            except zlib.error as error:
                raise ProfileError(f"cannot read pprof: damaged gzip ({error})") from error
            room -= len(parts[-1])
        if room < 0:
            break
        rest = rest[at - len(inflater.unused_data) :]
    if room < 0 or (not parts and len(content) > limit_bytes):
        raise ProfileError(f"cannot read pprof: it holds more than {limit_bytes} bytes")
    if parts and rest:
        raise ProfileError("cannot read pprof: unexpected bytes after the gzip data")
    return b"".join(parts) if parts else content
