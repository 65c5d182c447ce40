"""Write ELF files with call frame information byte by byte."""

import struct

CODE = 0x401000
FRAMES = 0x800000
_ALIGNED = b"\0" * 8


def uleb(number: int) -> bytes:
    encoded = bytearray()
    while True:
        number, low = number >> 7, number & 0x7F
        encoded.append(low | (0x80 if number else 0))
        if not number:
            return bytes(encoded)


def sleb(number: int) -> bytes:
    encoded = bytearray()
    while True:
        number, low = number >> 7, number & 0x7F
        is_last = number in (0, -1) and (low >> 6 == 1) == (number == -1)
        encoded.append(low if is_last else low | 0x80)
        if is_last:
            return bytes(encoded)


def block(content: bytes) -> bytes:
    return uleb(len(content)) + content


def cie(
    program: bytes = b"\x0c\x07\x08\x90\x01",
    *,
    augmentation: bytes = b"zR",
    data: bytes = b"\x1b",
    code_alignment: int = 1,
    data_alignment: int = -8,
    return_register: int = 16,
    version: int = 1,
    identity: int = 0,
) -> bytes:
    """Encode a CIE; by default as compilers do: pc-relative addresses, the CFA is rsp + 8."""
    body = bytes([version]) + augmentation + b"\0"
    if version == 4:
        body += bytes([8, 0])
    body += uleb(code_alignment) + sleb(data_alignment)
    body += bytes([return_register]) if version == 1 else uleb(return_register)
    if augmentation.startswith(b"z"):
        body += block(data)
    return record(struct.pack("<I", identity) + body + program)


def record(body: bytes) -> bytes:
    """Prepend the length; fill with DW_CFA_nop to a multiple of 8, as assemblers do."""
    body += _ALIGNED[: -(len(body) + 4) % 8]
    return struct.pack("<I", len(body)) + body


class FrameSection:
    """An .eh_frame that records are added to, loaded at FRAMES."""

    def __init__(self, address: int = FRAMES) -> None:
        self.content = bytearray()
        self._address = address
        self._cie = 0

    def add_cie(self, encoded: bytes | None = None) -> None:
        self._cie = len(self.content)
        self.content += cie() if encoded is None else encoded

    def add_fde(
        self,
        start: int,
        size: int,
        program: bytes = b"",
        *,
        form: str = "<i",
        is_relative: bool = True,
        data: bytes = b"\0",
    ) -> None:
        """Add an FDE of the last CIE; `form` is the format of its address and size."""
        at = len(self.content)
        value = start - (self._address + at + 8) if is_relative else start
        body = struct.pack("<I", at + 4 - self._cie)
        body += struct.pack(form, value) + struct.pack(form, size) + data + program
        self.content += record(body)

    def add_null_fde(self) -> None:
        """Add an FDE of a function that the linker discarded: its address is zero."""
        at = len(self.content)
        self.content += record(struct.pack("<Iii", at + 4 - self._cie, 0, 64) + b"\0")


def make_elf(
    sections: dict[bytes, bytes],
    *,
    code: bytes = b"\x90" * 0x3000,
    code_addresses: tuple[int, ...] = (CODE,),
    flags: dict[bytes, int] | None = None,
    entry: int = 0,
) -> bytes:
    """Return an executable with code at each of these addresses and sections from FRAMES on."""
    names = b"\0" + b"\0".join([*sections, b".shstrtab"]) + b"\0"
    offset = 0x1000 + len(code)
    headers = [struct.pack("<IIQQQQIIQQ", *[0] * 10)]
    body = b""
    address = FRAMES
    for name, content in {**sections, b".shstrtab": names}.items():
        is_strings = name == b".shstrtab"
        fields = (
            *(names.index(b"\0" + name + b"\0") + 1, 3 if is_strings else 1),
            *((flags or {}).get(name, 2), 0 if is_strings else address),
            *(offset + len(body), len(content), 0, 0, 1, 0),
        )
        headers.append(struct.pack("<IIQQQQIIQQ", *fields))
        body += content
        address += len(content)
    segments = [
        struct.pack("<IIQQQQQQ", 1, 5, 0x1000, start, start, len(code), len(code), 0x1000)
        for start in code_addresses
    ]
    shoff = offset + len(body)
    ident = b"\x7fELF\2\1\1" + b"\0" * 9
    counts = (64, 56, len(segments), 64, len(headers), len(headers) - 1)
    ehdr = ident + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, entry, 64, shoff, 0, *counts)
    return (ehdr + b"".join(segments)).ljust(0x1000, b"\0") + code + body + b"".join(headers)
