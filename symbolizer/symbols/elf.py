"""Read the headers of an ELF file: build id, executable segments, sections.

Files belong to other users and may be damaged, hostile, or changing while they are read. So nothing
is mapped into memory (a truncation would raise SIGBUS), every size is checked against a limit
before memory is allocated, and every fault is raised as UnreadableElf with a counted reason.
Layouts and names are those of the ELF gABI and the x86-64 psABI.
"""

import io
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from elftools.elf.elffile import ELFFile

from symbolizer.digest import blake2b
from symbolizer.location import NOT_DYNAMIC, Dynamic, ElfAddress, FileOffset, Miss, Segment
from symbolizer.symbols.notes import parse_build_id

PT_LOAD, PT_DYNAMIC, PT_INTERP, PT_NOTE, PT_GNU_EH_FRAME = 1, 2, 3, 4, 0x6474E550
PF_X = 0x1
SHT_PROGBITS, SHT_SYMTAB, SHT_STRTAB, SHT_RELA, SHT_NOTE, SHT_DYNSYM = 1, 2, 3, 4, 7, 11
SHT_NOBITS = 8
SHF_ALLOC, SHF_EXECINSTR, SHF_COMPRESSED = 0x2, 0x4, 0x800
DT_SONAME, DT_DEBUG, DT_FLAGS_1, DF_1_PIE = 14, 21, 0x6FFFFFFB, 0x08000000

# The largest real files (browsers, databases) have about 50 sections, 15 segments, and notes of 200
# bytes. Files beyond these limits are not programs.
_MAX_SECTIONS = 16_384
_MAX_SEGMENTS = 4_096
_MAX_EXECUTABLE_SEGMENTS = 64
_MAX_NOTE_BYTES = 65_536
_MAX_NOTE_PARTS = 64
_MAX_DYNAMIC_BYTES = 65_536
_MAX_PATH_BYTES = 4_096
_MAX_SECTION_NAME_BYTES = 1 << 20
_MAX_HEADER_READS_BYTES = 1 << 16
_EHDR_BYTES = 64

_HASHED_BLOCK_BYTES = 4096
_HASHED_BLOCKS = 64

_PHDR_FIELDS_64 = ("p_type", "p_flags", "p_offset", "p_vaddr", "p_paddr", "p_filesz")
_PHDR = {
    64: np.dtype(
        [(name, "<u4" if i < 2 else "<u8") for i, name in enumerate(_PHDR_FIELDS_64)]
        + [("p_memsz", "<u8"), ("p_align", "<u8")]
    ),
    32: np.dtype(
        [
            (name, "<u4")
            for name in ("p_type", "p_offset", "p_vaddr", "p_paddr", "p_filesz", "p_memsz")
        ]
        + [("p_flags", "<u4"), ("p_align", "<u4")]
    ),
}
_SHDR_FIELDS = (
    *("sh_name", "sh_type", "sh_flags", "sh_addr", "sh_offset"),
    *("sh_size", "sh_link", "sh_info", "sh_addralign", "sh_entsize"),
)
_WORDS_64 = {"sh_name", "sh_type", "sh_link", "sh_info"}
_SHDR = {
    64: np.dtype([(name, "<u4" if name in _WORDS_64 else "<u8") for name in _SHDR_FIELDS]),
    32: np.dtype([(name, "<u4") for name in _SHDR_FIELDS]),
}


class SymbolizerError(Exception):
    """Base class of this package's exceptions. Its only subclass is UnreadableElf."""


class UnreadableElf(SymbolizerError):  # noqa: N818 - states what the file is, as the reason does
    """The file cannot be used; `reason` says why."""

    def __init__(self, reason: Miss) -> None:
        super().__init__(str(reason))
        self.reason = reason


class Source(Protocol):
    """The bytes of an object file, on disk or in memory."""

    size: int

    def read_at(self, offset: int, size: int) -> bytes:
        """Return exactly `size` bytes.

        Raises:
            UnreadableElf: the file has fewer.
        """


class FileSource:
    """An open regular file; the caller keeps the descriptor and closes it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.size = os.fstat(fd).st_size

    def read_at(self, offset: int, size: int) -> bytes:
        _check_range(offset, size, self.size)
        try:
            content = os.pread(self._fd, size, offset)
        except OSError as error:  # a bad block, a network file system that is unreachable
            raise UnreadableElf(Miss.DAMAGED) from error
        if len(content) != size:  # truncated meanwhile
            raise UnreadableElf(Miss.DAMAGED)
        return content


class MemorySource:
    def __init__(self, content: bytes) -> None:
        self._content = content
        self.size = len(content)

    def read_at(self, offset: int, size: int) -> bytes:
        _check_range(offset, size, self.size)
        return self._content[offset : offset + size]


def _check_range(offset: int, size: int, available: int) -> None:
    if offset < 0 or size < 0 or offset + size > available:
        raise UnreadableElf(Miss.DAMAGED)


class Section(NamedTuple):
    name: bytes
    type: int
    flags: int
    address: int
    offset: int
    size: int
    link: int

    @property
    def is_code(self) -> bool:
        return bool(self.flags & SHF_EXECINSTR)


@dataclass(frozen=True, slots=True)
class Elf:
    """The headers of one file, validated.

    Attributes:
        build_id: hex of the GNU build id, or `hash_content` if there is none.
        segments: executable PT_LOADs in the order of the program headers.
        entry: e_entry if the file is a program; None for a shared library, which may have one, too.
        entry_point: e_entry as it is in the header, 0 for none.
        loaded: all PT_LOADs, whatever their permissions.
        eh_frame_hdr: PT_GNU_EH_FRAME.
        dynamic: NOT_DYNAMIC if it is linked statically, or has 32 bits.
    """

    source: Source
    bits: int
    is_x86_64: bool
    build_id: str
    segments: tuple[Segment, ...]
    sections: tuple[Section, ...]
    entry: ElfAddress | None
    entry_point: ElfAddress
    loaded: tuple[Segment, ...]
    eh_frame_hdr: Segment | None
    dynamic: Dynamic

    def read(self, section: Section, limit_bytes: int) -> bytes:
        """Read a whole section. Compressed ones are refused: they could expand to any size."""
        check_size(section, limit_bytes)
        return self.source.read_at(section.offset, section.size)

    def chunks(self, section: Section, chunk_bytes: int, limit_bytes: int) -> Iterator[bytes]:
        check_size(section, limit_bytes)
        for start in range(0, section.size, chunk_bytes):
            size = min(chunk_bytes, section.size - start)
            yield self.source.read_at(section.offset + start, size)


def check_size(section: Section, limit_bytes: int) -> None:
    if section.flags & SHF_COMPRESSED:
        raise UnreadableElf(Miss.UNSUPPORTED)
    if section.size > limit_bytes:
        raise UnreadableElf(Miss.TOO_LARGE)


def read_elf(source: Source) -> Elf:
    """Read and validate the headers.

    Raises:
        UnreadableElf: with the reason.
    """
    header, phdrs = _read_program_headers(source)
    shdrs = _read_table(source, header.shoff, header.shnum, _SHDR[header.bits], _MAX_SECTIONS)
    sections = _read_sections(source, shdrs, header.shstrndx)
    is_loaded = phdrs["p_type"] == PT_LOAD
    is_code = is_loaded & (phdrs["p_flags"] & PF_X != 0)
    if is_code.sum() > _MAX_EXECUTABLE_SEGMENTS:
        raise UnreadableElf(Miss.DAMAGED)
    return Elf(
        source=source,
        bits=header.bits,
        is_x86_64=header.is_x86_64,
        build_id=_find_build_id(source, phdrs, sections) or hash_content(source),
        segments=_find_segments(phdrs[is_code]),
        sections=sections,
        entry=_find_entry(source, header, phdrs),
        entry_point=ElfAddress(header.entry),
        loaded=_find_segments(phdrs[is_loaded]),
        eh_frame_hdr=next(iter(_find_segments(phdrs[phdrs["p_type"] == PT_GNU_EH_FRAME])), None),
        dynamic=_find_dynamic(source, header, phdrs),
    )


def read_loader(source: Source) -> bytes:
    """Return the path of the program that loads this one (PT_INTERP); empty if none does.

    Raises:
        UnreadableElf: with the reason.
    """
    _, phdrs = _read_program_headers(source)
    for row in phdrs[phdrs["p_type"] == PT_INTERP]:
        size = min(int(row["p_filesz"]), _MAX_PATH_BYTES)
        return source.read_at(int(row["p_offset"]), size).partition(b"\0")[0]
    return b""


def hash_content(source: Source) -> str:
    """Return an identity for a file without a build id: a hash of its size and of some blocks.

    Hashing only its two ends would not do: a rebuilt program often keeps its size and both ends.
    """
    digest = blake2b(source.size.to_bytes(8, "little"), digest_size=32)
    last = max(0, source.size - _HASHED_BLOCK_BYTES)
    step = max(_HASHED_BLOCK_BYTES, -(-last // (_HASHED_BLOCKS - 1)))
    for start in [*range(0, last, step), last]:
        digest.update(source.read_at(start, min(_HASHED_BLOCK_BYTES, source.size)))
    return "hash-" + digest.hexdigest()[:40]


class _Header(NamedTuple):
    bits: int
    is_x86_64: bool
    is_shared: bool
    entry: int
    phoff: int
    phnum: int
    shoff: int
    shnum: int
    shstrndx: int


class _Stream(io.RawIOBase):
    """A source as a stream for pyelftools, which may read a limited number of bytes from it."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._header = _without_lost_sections(source)
        self._position = 0
        self._left = _MAX_HEADER_READS_BYTES

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origins = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._source.size}
        self._position = origins[whence] + offset
        return self._position

    def readinto(self, buffer: Any) -> int:  # typeshed's WriteableBuffer is for stubs only
        size = max(0, min(len(buffer), self._left, self._source.size - self._position))
        self._left -= size
        content = self._source.read_at(self._position, size)
        buffer[:size] = (
            self._header[self._position : self._position + size]
            + content[max(0, len(self._header) - self._position) :]
        )
        self._position += size
        return size


def _without_lost_sections(source: Source) -> bytes:
    """Return the file's header, without a table of sections that is not in the file.

    Tools that shrink or pack programs leave it behind or cut it off with the end of the file. The
    kernel does not look at it, and such a program runs.
    """
    header = bytearray(source.read_at(0, min(_EHDR_BYTES, source.size)))
    if len(header) < _EHDR_BYTES:
        return bytes(header)
    form, at, counts_at = ("<Q", 0x28, 0x3A) if header[4] == 2 else ("<I", 0x20, 0x2E)
    (offset,) = struct.unpack_from(form, header, at)
    size, count = struct.unpack_from("<HH", header, counts_at)
    if offset + size * max(count, 1) > source.size:
        struct.pack_into(form, header, at, 0)
        struct.pack_into("<HHH", header, counts_at, size, 0, 0)
    return bytes(header)


def _read_header(source: Source) -> _Header:
    try:
        elf = ELFFile(io.BufferedReader(_Stream(source), 1024))
        header = _Header(
            bits=elf.elfclass,
            is_x86_64=elf.header["e_machine"] == "EM_X86_64",
            is_shared=elf.header["e_type"] == "ET_DYN",
            entry=elf.header["e_entry"],
            phoff=elf.header["e_phoff"],
            phnum=elf.num_segments(),
            shoff=elf.header["e_shoff"],
            shnum=elf.num_sections(),
            shstrndx=elf.get_shstrndx(),
        )
        little_endian = elf.little_endian
    # pyelftools documents ELFError, but damaged headers also raise construct's errors, KeyError,
    # AttributeError, TypeError, UnicodeDecodeError and more (3.7 % of 5,000 damaged files).
    except Exception as error:
        raise UnreadableElf(Miss.DAMAGED) from error
    if not little_endian:
        raise UnreadableElf(Miss.UNSUPPORTED)
    return header


def _read_program_headers(source: Source) -> tuple[_Header, npt.NDArray[np.void]]:
    if source.size < 4 or source.read_at(0, 4) != b"\x7fELF":
        raise UnreadableElf(Miss.NOT_ELF)
    header = _read_header(source)
    phdrs = _read_table(source, header.phoff, header.phnum, _PHDR[header.bits], _MAX_SEGMENTS)
    return header, phdrs


def _read_table(
    source: Source, offset: int, count: int, dtype: np.dtype[np.void], limit: int
) -> npt.NDArray[np.void]:
    if offset == 0 or count == 0:
        return np.zeros(0, dtype=dtype)
    if count > limit:
        raise UnreadableElf(Miss.DAMAGED)
    return np.frombuffer(source.read_at(offset, count * dtype.itemsize), dtype=dtype)


def _read_sections(
    source: Source, shdrs: npt.NDArray[np.void], shstrndx: int
) -> tuple[Section, ...]:
    names = b""
    if 0 < shstrndx < len(shdrs):
        header = shdrs[shstrndx]
        size = int(header["sh_size"])
        if size <= _MAX_SECTION_NAME_BYTES and not int(header["sh_flags"]) & SHF_COMPRESSED:
            names = source.read_at(int(header["sh_offset"]), size)
    return tuple(
        Section(_c_string(names, name), type_, flags, address, offset, size, link)
        for name, type_, flags, address, offset, size, link, *_ in shdrs.tolist()
    )


def _c_string(strings: bytes, position: int, limit: int = 64) -> bytes:
    return strings[position : position + limit].partition(b"\0")[0]


def _find_segments(phdrs: npt.NDArray[np.void]) -> tuple[Segment, ...]:
    segments = []
    for row in phdrs:
        vaddr, offset, size = int(row["p_vaddr"]), int(row["p_offset"]), int(row["p_filesz"])
        if max(vaddr, offset) + size >= 1 << 63:
            raise UnreadableElf(Miss.DAMAGED)
        segments.append(Segment(ElfAddress(vaddr), FileOffset(offset), size))
    return tuple(segments)


def _find_build_id(
    source: Source, phdrs: npt.NDArray[np.void], sections: tuple[Section, ...]
) -> str:
    """Look in PT_NOTE, then in SHT_NOTE: Go's linker puts its note outside the segments."""
    notes = phdrs[phdrs["p_type"] == PT_NOTE]
    parts = [(int(row["p_offset"]), int(row["p_filesz"])) for row in notes]
    parts += [(s.offset, s.size) for s in sections if s.type == SHT_NOTE]
    for offset, size in parts[:_MAX_NOTE_PARTS]:
        if size <= _MAX_NOTE_BYTES and offset + size <= source.size:
            build_id = parse_build_id(source.read_at(offset, size))
            if build_id:
                return build_id
    return ""


def _find_entry(source: Source, header: _Header, phdrs: npt.NDArray[np.void]) -> ElfAddress | None:
    """Return a program's entry; None for shared libraries, which are ET_DYN and may have one, too.

    A program has DF_1_PIE set, or has an interpreter and no DT_SONAME (libc.so.6 has both).
    """
    if not header.entry:
        return None
    is_program = True
    if header.is_shared:
        tags = dict(_read_dynamic(source, header, phdrs))
        has_interpreter = bool((phdrs["p_type"] == PT_INTERP).any())
        is_program = bool(tags.get(DT_FLAGS_1, 0) & DF_1_PIE) or (
            has_interpreter and DT_SONAME not in tags
        )
    return ElfAddress(header.entry) if is_program else None


def _find_dynamic(source: Source, header: _Header, phdrs: npt.NDArray[np.void]) -> Dynamic:
    rows = phdrs[phdrs["p_type"] == PT_DYNAMIC]
    if header.bits != 64 or not len(rows):
        return NOT_DYNAMIC
    address = int(rows[0]["p_vaddr"])
    tags = [tag for tag, _ in _read_dynamic(source, header, phdrs)]
    debug = address + 16 * tags.index(DT_DEBUG) + 8 if DT_DEBUG in tags else 0
    return Dynamic(address, debug) if max(address, debug) < 1 << 63 else NOT_DYNAMIC


def _read_dynamic(
    source: Source, header: _Header, phdrs: npt.NDArray[np.void]
) -> list[tuple[int, int]]:
    """Return the entries of the dynamic section: tags and values."""
    for row in phdrs[phdrs["p_type"] == PT_DYNAMIC]:
        size = min(int(row["p_filesz"]), _MAX_DYNAMIC_BYTES) // 16 * 16
        content = source.read_at(int(row["p_offset"]), size)
        pairs = np.frombuffer(content, "<u8" if header.bits == 64 else "<u4").reshape(-1, 2)
        end = np.flatnonzero(pairs[:, 0] == 0)
        return [*map(tuple, pairs[: int(end[0]) if len(end) else len(pairs)].tolist())]
    return []
