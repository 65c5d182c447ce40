"""Offsets of struct members in the running kernel, read from its BTF.

Format: the kernel's Documentation/bpf/btf.rst. Only what is needed to find a member is decoded;
all other types are stepped over.
"""

import struct
from collections.abc import Iterable
from pathlib import Path

from bpf.errors import BtfError

VMLINUX = Path("/sys/kernel/btf/vmlinux")

_MAGIC = 0xEB9F
_KIND_ARRAY, _KIND_STRUCT, _KIND_UNION = 3, 4, 5
# Bytes that follow a btf_type: a fixed part by kind, and a part for each of its vlen members.
_FIXED = {1: 4, _KIND_ARRAY: 12, 14: 4, 17: 4}
_PER_MEMBER = {_KIND_STRUCT: 12, _KIND_UNION: 12, 6: 8, 13: 8, 15: 12, 19: 12}
_TYPE = struct.Struct("<III")


class Btf:
    """The types of one BTF blob.

    Raises:
        BtfError: the blob is not BTF or is cut short.
    """

    def __init__(self, blob: bytes) -> None:
        try:
            magic, _, _, header, type_off, type_len, str_off, _ = struct.unpack_from(
                "<HBBIIIII", blob
            )
            if magic != _MAGIC:
                raise BtfError("cannot read kernel types: this is not BTF")
            self._blob = blob
            self._strings = header + str_off
            self._offsets = self._index(header + type_off, header + type_off + type_len)
        except (struct.error, IndexError) as error:
            raise BtfError("cannot read kernel types: the BTF is cut short") from error

    @classmethod
    def of_kernel(cls) -> "Btf":
        try:
            return cls(VMLINUX.read_bytes())
        except OSError as error:
            raise BtfError(
                f"cannot read kernel types: {error.strerror}: {VMLINUX}"
                " (the kernel must be built with CONFIG_DEBUG_INFO_BTF)"
            ) from error

    def _index(self, position: int, end: int) -> list[int]:
        offsets = [0]  # type 0 is void
        blob, unpack = self._blob, _TYPE.unpack_from
        while position < end:
            offsets.append(position)
            info = unpack(blob, position)[1]
            kind, vlen = info >> 24 & 0x1F, info & 0xFFFF
            position += 12 + _FIXED.get(kind, 0) + _PER_MEMBER.get(kind, 0) * vlen
        return offsets

    def _string(self, offset: int) -> bytes:
        start = self._strings + offset
        return self._blob[start : self._blob.index(b"\0", start)]

    def member_offsets(self, struct_name: str, members: Iterable[str]) -> dict[str, int]:
        """Return the byte offset of each member, looking through anonymous structs and unions.

        Raises:
            BtfError: the kernel has no such struct, or the struct lacks one of the members.
        """
        wanted = {name.encode() for name in members}
        found: dict[str, int] = {}
        pending = [(self._find_struct(struct_name), 0)]
        while pending:
            position, base = pending.pop()
            _, info, _ = _TYPE.unpack_from(self._blob, position)
            for i in range(info & 0xFFFF):
                name, type_id, offset = _TYPE.unpack_from(self._blob, position + 12 + 12 * i)
                bits = offset & 0xFFFFFF if info >> 31 else offset
                if name == 0:
                    pending.append((self._offsets[type_id], base + bits // 8))
                elif (text := self._string(name)) in wanted:
                    found[text.decode()] = base + bits // 8
        if missing := sorted(wanted - {name.encode() for name in found}):
            names = ", ".join(name.decode() for name in missing)
            raise BtfError(f"cannot find {names} in struct {struct_name} of this kernel")
        return found

    def _find_struct(self, name: str) -> int:
        wanted = name.encode()
        for position in self._offsets[1:]:
            name_off, info, _ = _TYPE.unpack_from(self._blob, position)
            if info >> 24 & 0x1F == _KIND_STRUCT and self._string(name_off) == wanted:
                return position
        raise BtfError(f"cannot find struct {name} in the types of this kernel")
