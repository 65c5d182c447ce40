"""Parse one CIE: how to read the FDEs that refer to it, and where its instructions are.

The formats are those of the LSB ("Exception Frames", .eh_frame) and of DWARF 5, section 6.4
(.debug_frame).
"""

from typing import NamedTuple

import numpy as np

from symbolizer.integers import MAX_LEB_BYTES

# Numbers of registers in DWARF (x86-64 psABI, "DWARF Register Number Mapping").
RBX, RBP, RSP, RETURN_ADDRESS = 3, 6, 7, 16

DW_EH_PE_ABSPTR, DW_EH_PE_PCREL, DW_EH_PE_DATAREL, DW_EH_PE_OMIT = 0x00, 0x10, 0x30, 0xFF
DW_EH_PE_UDATA4, DW_EH_PE_SDATA4 = 0x03, 0x0B
POINTER_FORMATS = {
    0x00: "<u8",
    0x02: "<u2",
    0x03: "<u4",
    0x04: "<u8",
    0x0A: "<i2",
    0x0B: "<i4",
    0x0C: "<i8",
}


class Cie(NamedTuple):
    """What many FDEs have in common.

    Attributes:
        program: position of the initial instructions in `CallFrames.content`.
        encoding: DW_EH_PE_* of the addresses in its FDEs.
        has_augmentation_data: so have its FDEs, between their addresses and their program.
        is_signal_frame: the pc of these frames is where a signal interrupted the code, not a return
            address.
    """

    program: int = 0
    program_end: int = 0
    encoding: int = DW_EH_PE_ABSPTR
    has_augmentation_data: bool = False
    is_signal_frame: bool = False
    code_alignment: int = 1
    data_alignment: int = -8


WITHOUT_RULES = Cie()
"""Replaces a CIE whose rules are not supported. Its initial instructions define nothing."""


def parse_cie(content: bytes) -> Cie | None:
    """Parse what follows a CIE's id; positions count from there.

    Returns None if FDEs of this CIE cannot be read.
    """
    cursor = _Cursor(content)
    try:
        cie = _read_augmentation(cursor, *_read_cie_header(cursor))
    except (IndexError, ValueError):
        return None
    is_known = cie.encoding & 0x0F in POINTER_FORMATS
    is_known &= cie.encoding & 0xF0 in (DW_EH_PE_ABSPTR, DW_EH_PE_PCREL)
    if not is_known or cursor.position > len(content):
        return None
    return cie._replace(program=cursor.position, program_end=len(content))


def _read_cie_header(cursor: "_Cursor") -> tuple[Cie, bytes]:
    """Read the fields before the augmentation's data; return them and the augmentation."""
    version = cursor.byte()
    augmentation = cursor.string()
    if version not in (1, 3, 4):
        raise ValueError("unknown version")
    if version == 4 and (cursor.byte(), cursor.byte()) != (8, 0):
        raise ValueError("addresses are not of 8 bytes, or have segments")
    code_alignment, data_alignment = cursor.uleb(), cursor.sleb()
    return_register = cursor.byte() if version == 1 else cursor.uleb()
    # An alignment of 0 is refused later: rules for another return address cannot be used.
    code_alignment *= return_register == RETURN_ADDRESS
    return Cie(code_alignment=code_alignment, data_alignment=data_alignment), augmentation


def _read_augmentation(cursor: "_Cursor", cie: Cie, augmentation: bytes) -> Cie:
    """Read the augmentation's data by its letters, and skip the rest.

    The letters are those of the LSB ("CIE"); S and B are GNU's.
    """
    if not augmentation:
        return cie
    if augmentation[:1] != b"z":  # "eh" of compilers before 2000, or unknown
        raise ValueError("augmentation of unknown size")
    size = cursor.uleb()
    end = cursor.position + size
    cie = cie._replace(has_augmentation_data=True)
    for letter in augmentation[1:].decode("latin-1"):
        if letter == "R":
            cie = cie._replace(encoding=cursor.byte())
        elif letter == "L":
            cursor.byte()
        elif letter == "P":
            cursor.skip_pointer(cursor.byte())
        elif letter == "S":
            cie = cie._replace(is_signal_frame=True)
        elif letter != "B":  # B is about keys of aarch64
            raise ValueError("unknown augmentation")
    cursor.position = end
    return cie


class _Cursor:
    """Reads a record byte by byte; raises IndexError beyond its end."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.position = 0

    def byte(self) -> int:
        self.position += 1
        return self.content[self.position - 1]

    def string(self) -> bytes:
        end = self.content.index(b"\0", self.position)
        start, self.position = self.position, end + 1
        return self.content[start:end]

    def uleb(self) -> int:
        return self._leb()[0]

    def sleb(self) -> int:
        value, bits = self._leb()
        return value - (1 << bits) if value >> (bits - 1) else value

    def skip_pointer(self, encoding: int) -> None:
        if encoding != DW_EH_PE_OMIT:
            form = POINTER_FORMATS.get(encoding & 0x0F)
            if form is None:
                raise ValueError("pointer of unknown width")
            self.position += np.dtype(form).itemsize

    def _leb(self) -> tuple[int, int]:
        value = bits = 0
        for _ in range(MAX_LEB_BYTES):
            byte = self.byte()
            value |= (byte & 0x7F) << bits
            bits += 7
            if byte < 0x80:
                return value, bits
        raise ValueError("number of more than 64 bits")
