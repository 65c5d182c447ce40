"""ELF notes, which files and the running kernel have alike (ELF gABI, "Note Section")."""

import struct

NT_GNU_BUILD_ID = 3
_MAX_BUILD_ID_BYTES = 64
_HEADER = struct.Struct("<III")


def parse_build_id(notes: bytes) -> str:
    """Return the GNU build id among ELF notes in hex, or an empty string."""
    position = 0
    while position + 12 <= len(notes):
        name_size, desc_size, note_type = _HEADER.unpack_from(notes, position)
        desc = position + 12 + (name_size + 3 & ~3)
        if desc + desc_size > len(notes):
            return ""
        is_gnu = notes[position + 12 : position + 12 + name_size] == b"GNU\0"
        if is_gnu and note_type == NT_GNU_BUILD_ID and 0 < desc_size <= _MAX_BUILD_ID_BYTES:
            return notes[desc : desc + desc_size].hex()
        position = desc + (desc_size + 3 & ~3)
    return ""
