"""Identify the file behind a mapping by its content. This opens and parses what belongs to others.

A build id is only claimed: anybody can write any id into a file. So three keys say what a file
holds, each a hash:

- `code_key`: code and what unwinds it. Variants of one build that are more or less stripped have
  the same, so whatever is known of the code of one holds for the others.
- `table_key`: what an unwind table is built from, that is the code and .debug_frame.
- `content_key`: all that frames are named by.

The large parts of a file are sampled: hashing a whole program would take seconds.
"""

import base64
import contextlib
import ctypes
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from symbolizer import maps
from symbolizer.digest import blake2b
from symbolizer.files import OpenedFile, ProcessFiles, close_file, mount_of
from symbolizer.identities import Identities, Identity
from symbolizer.location import Miss
from symbolizer.symbols.elf import (
    SHF_ALLOC,
    SHT_NOBITS,
    SHT_SYMTAB,
    Elf,
    FileSource,
    MemorySource,
    Section,
    Source,
    UnreadableElf,
    hash_content,
    read_elf,
)
from symbolizer.symbols.variants import NOBODY
from symbolizer.unwind.build import build
from symbolizer.unwind.rules import ROW
from symbolizer.unwind.table import PAGE, UnwindCache, UnwindTable

_CODE_SECTIONS = (b".eh_frame", b".gopclntab", b".plt", b".dynsym", b".dynstr")
"""Loaded sections whose content is hashed; the headers of all loaded sections are, too."""
_NAME_SECTIONS = (b".symtab", b".strtab", b".gnu_debugdata")
_WHOLE_BYTES = 32 << 20
"""Parts up to this size are hashed as a whole, larger ones by blocks."""
_Blocks = tuple[int, int]
"""How many, and of how many bytes."""
_BLOCKS: _Blocks = (256, 65_536)
_CODE_BLOCKS: _Blocks = (64, 4096)
_HASHED_SECTIONS = 256
_CHUNK_BYTES = 1 << 20
_ELF_HEADER_BYTES = 64
"""It says where the section headers are, which differs between variants of one build."""

_SYMBOL = np.dtype(
    [
        *(("st_name", "<u4"), ("st_info", "u1"), ("st_other", "u1"), ("st_shndx", "<u2")),
        *(("st_value", "<u8"), ("st_size", "<u8")),
    ]
)
_COMPARED_SYMBOLS = 1 << 20
_COMPARED_ADDRESSES = 256
_COMPARED_NAME_BYTES = 256
_STT_NOTYPE, _STT_FUNC, _STT_GNU_IFUNC = 0, 2, 10
_SCATTER = np.uint64(0x9E3779B97F4A7C15)

_FUSE_SUPER_MAGIC = 0x65735546  # include/uapi/linux/magic.h
_STATFS_BYTES = 256
"""More than struct statfs has, of which `f_type` comes first."""
_libc = ctypes.CDLL(None, use_errno=True)

_SMALL_FRAME_BYTES = 1 << 20
"""Tables from so much are built within a twentieth of a second or so."""


class OpenedMapping:
    """The file behind a mapping. Its headers are read when they are first asked for.

    Attributes:
        source: what it holds.
        identity: what it is, if that was known when it was opened.
        file: its descriptor and its status from when it was opened; None for the vDSO.
        has_true_owner: whether the kernel keeps the owner, rather than believing a file system that
            any user may serve.
    """

    def __init__(
        self,
        source: Source,
        file: tuple[int, os.stat_result] | None = None,
        identity: Identity | None = None,
        *,
        has_true_owner: bool = True,
    ) -> None:
        self.source, self.file, self.identity = source, file, identity
        self.has_true_owner = has_true_owner
        self._elf: Elf | None = None

    @property
    def elf(self) -> Elf:
        """Return its headers.

        Raises:
            UnreadableElf: with the reason.
        """
        if self._elf is None:
            self._elf = read_elf(self.source)
        return self._elf

    @property
    def build_id(self) -> str:
        """Return its build id, or `hash_content` if it has none.

        Raises:
            UnreadableElf: with the reason.
        """
        return self.identity.build_id if self.identity else self.elf.build_id


class NotOpened(Exception):  # noqa: N818 - states what became of it, as the reason does
    """The file cannot be opened or is not an ELF file; `build_id` is what is known of it."""

    def __init__(self, reason: Miss, build_id: str) -> None:
        super().__init__(str(reason))
        self.reason = reason
        self.build_id = build_id


def _candidates(pids: Iterable[int], mapping: maps.Mapping) -> Iterator[OpenedFile]:
    failure = Miss.NO_FILE
    for pid in pids:
        with ProcessFiles(pid) as files:
            yield from files.candidates_inside(mapping)
            failure = files.failure if files.failure != Miss.NO_FILE else failure
    with ProcessFiles(0) as files:
        yield from files.candidates_of_host(mapping)
        failure = files.failure if files.failure != Miss.NO_FILE else failure
    if failure != Miss.NO_FILE:
        raise NotOpened(failure, mapping.build_id)


def _keeps_owners(fd: int) -> bool:
    """Return whether an open file is on another file system than FUSE (fstatfs(2))."""
    found = (ctypes.c_long * (_STATFS_BYTES // ctypes.sizeof(ctypes.c_long)))()
    return not _libc.fstatfs(fd, found) and found[0] != _FUSE_SUPER_MAGIC


def _own_vdso(mapping: maps.Mapping) -> OpenedMapping:
    """Read this process's own vDSO: all 64-bit processes of a host share one image."""
    for own in maps.parse_maps(Path("/proc/self/maps").read_bytes()):
        is_alike = own.end - own.start == mapping.end - mapping.start and mapping.start >= 1 << 32
        if own.path != b"[vdso]" or not is_alike:
            continue
        fd = os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)
        try:
            source = MemorySource(os.pread(fd, own.end - own.start, own.start))
            found = OpenedMapping(source)
            found.elf  # noqa: B018 - it raises if there is none
            return found
        except (OSError, UnreadableElf):  # a hardened kernel
            break
        finally:
            os.close(fd)
    raise NotOpened(Miss.NO_CODE_KNOWN, "")


class Identifier:
    """Opens files and identifies them, each once as long as it does not change."""

    def __init__(self, identities: Identities | None = None) -> None:
        """Read nothing yet; without `identities` they are kept in memory."""
        self._identities = identities or Identities()

    @contextlib.contextmanager
    def opened(self, values: Mapping[str, Any]) -> Iterator[OpenedMapping]:
        """Open the file of a mapping, once it is proved by inode or build id.

        `values` are `pids` that have the mapping, the likeliest first, and the mapping's `start`,
        `end`, `offset`, `path` (as of os.fsdecode), `device`, `inode` and `build_id`. Paths are
        opened in the root of each process, and at last in our own.

        Raises:
            NotOpened: with the reason.
        """
        mapping = maps.Mapping(
            start=values["start"],
            end=values["end"],
            file_offset=values["offset"],
            path=os.fsencode(values["path"]),
            device=(values["device"][0], values["device"][1]),
            inode=values["inode"],
            build_id=values["build_id"],
        )
        if mapping.path == b"[vdso]":
            yield _own_vdso(mapping)
            return
        failure = Miss.NO_FILE
        for fd, is_certain in _candidates(values["pids"], mapping):
            try:
                found, failure = self._as_mapped(fd, mapping, is_certain, before=failure)
                if found is not None:
                    yield found
                    return
            finally:
                close_file(fd)
        raise NotOpened(failure, mapping.build_id)

    def identify(self, found: OpenedMapping) -> Identity:
        """Return what an opened file is.

        Raises:
            UnreadableElf: with the reason.
        """
        if found.identity is None:
            if found.file is None:
                found.identity = _identify(found.elf, owner=0)
            elif not found.has_true_owner:  # then all else may be made up, too
                found.identity = _identify(found.elf, NOBODY)
            else:
                fd, status = found.file
                found.identity = _identify(found.elf, status.st_uid)
                self._identities.add(fd, status, found.identity)
        return found.identity

    def _as_mapped(
        self, fd: int, mapping: maps.Mapping, is_certain: bool, before: Miss
    ) -> tuple[OpenedMapping | None, Miss]:
        """Return an open file if it is the mapped one, else the reason to report if no other is."""
        try:
            status, source = os.fstat(fd), FileSource(fd)
        except OSError:  # its file system has ended
            return None, Miss.DAMAGED if before == Miss.NO_FILE else before
        device = (os.major(status.st_dev), os.minor(status.st_dev))
        is_same = is_certain or (device, status.st_ino) == (mapping.device, mapping.inode)
        if not mapping.build_id and not is_same:
            return None, Miss.FILE_REPLACED
        is_true = _keeps_owners(fd)
        known = self._identities.find(fd, status) if is_true else None
        found = OpenedMapping(source, (fd, status), known, has_true_owner=is_true)
        try:
            build_id = found.build_id
        except UnreadableElf as error:
            if is_same:
                with contextlib.suppress(UnreadableElf):
                    raise NotOpened(
                        error.reason, mapping.build_id or hash_content(source)
                    ) from error
                raise NotOpened(error.reason, mapping.build_id) from error
            return None, error.reason if before == Miss.NO_FILE else before
        if mapping.build_id not in ("", build_id):
            return None, Miss.FILE_REPLACED
        return found, before


def _identify(elf: Elf, owner: int) -> Identity:
    loaded = [s for s in elf.sections if s.flags & SHF_ALLOC]
    described = (elf.build_id, elf.is_x86_64, elf.entry_point, elf.segments, elf.loaded)
    headers = [section._replace(link=0) for section in loaded]
    code = blake2b(repr((*described, elf.eh_frame_hdr, headers)).encode(), digest_size=20)
    hashed = [s for s in loaded if s.name.endswith(_CODE_SECTIONS) and s.type != SHT_NOBITS]
    _hash_sections(code, elf, hashed)
    if not any(section.name == b".eh_frame" for section in hashed):
        _hash_frames_without_sections(code, elf)
    for segment in elf.segments:
        first = max(segment.p_offset, _ELF_HEADER_BYTES)
        end = min(segment.p_offset + segment.p_filesz, elf.source.size)
        _hash_blocks(code, elf.source, (first, end - first), _CODE_BLOCKS)
    code_key = code.hexdigest()
    frames = [s for s in elf.sections if s.name == b".debug_frame" and s.type != SHT_NOBITS]
    table_key = _extended(code_key, elf, frames)
    if owner == NOBODY:  # what was hashed need not be what is read next: nobody else's has this key
        table_key = blake2b(table_key.encode(), digest_size=20, key=b"nobody").hexdigest()
    names = [s for s in elf.sections if s.name in _NAME_SECTIONS and s.type != SHT_NOBITS]
    symbols = next((s for s in elf.sections if s.type == SHT_SYMTAB), None)
    return Identity(
        build_id=elf.build_id,
        code_key=code_key,
        table_key=table_key,
        content_key=_extended(table_key, elf, names),
        segments=[list(segment) for segment in elf.segments],
        functions=_sample_functions(elf, symbols) if symbols else "",
        has_symbols=symbols is not None,
        owner=owner,
        frame_bytes=sum(s.size for s in (*hashed, *frames) if s.name.endswith(_FRAME_SECTIONS)),
        dynamic=[*elf.dynamic],
    )


_FRAME_SECTIONS = (b".eh_frame", b".debug_frame", b".gopclntab")


def _extended(key: str, elf: Elf, sections: list[Section]) -> str:
    if not sections:
        return key
    extended = blake2b(key.encode(), digest_size=20)
    _hash_sections(extended, elf, sections)
    return extended.hexdigest()


def _hash_sections(key: Any, elf: Elf, sections: Iterable[Section]) -> None:
    for section in list(sections)[:_HASHED_SECTIONS]:
        key.update(repr((section.name, section.type, section.size)).encode())
        if section.size <= _WHOLE_BYTES:
            for at in range(0, section.size, _CHUNK_BYTES):
                size = min(_CHUNK_BYTES, section.size - at)
                key.update(elf.source.read_at(section.offset + at, size))
        else:
            _hash_blocks(key, elf.source, (section.offset, section.size), _BLOCKS)


def _hash_frames_without_sections(key: Any, elf: Elf) -> None:
    """Hash the segment in which .eh_frame_hdr says that .eh_frame is."""
    if elf.eh_frame_hdr is None:
        return
    header_at = elf.eh_frame_hdr.p_offset
    for _, start, size in elf.loaded:
        if start <= header_at < start + size:
            _hash_blocks(key, elf.source, (start, size), _BLOCKS)


def _hash_blocks(key: Any, source: Source, part: tuple[int, int], blocks: _Blocks) -> None:
    """Hash blocks spread evenly over a part of a file, always its first and last bytes."""
    (start, size), (count, length) = part, blocks
    last = max(0, size - length)
    step = max(length, -(-last // (count - 1)))
    for at in [*range(0, last, step), last]:
        key.update(source.read_at(start + at, max(0, min(length, size - at))))


def _sample_functions(elf: Elf, symbols: Section) -> str:
    """Return hashes of functions in .symtab, by which variants of one build can be compared."""
    if elf.bits != 64 or symbols.link >= len(elf.sections):
        return ""
    strings = elf.sections[symbols.link]
    count = min(symbols.size // _SYMBOL.itemsize, _COMPARED_SYMBOLS)
    rows = np.frombuffer(elf.source.read_at(symbols.offset, count * _SYMBOL.itemsize), _SYMBOL)
    types = rows["st_info"] & 15
    is_function = np.isin(types, (_STT_NOTYPE, _STT_FUNC, _STT_GNU_IFUNC))
    rows = rows[is_function & (rows["st_shndx"] != 0) & (rows["st_value"] != 0)]
    hashes = (rows["st_value"] * _SCATTER >> np.uint64(32)).astype(np.uint32)
    if not len(hashes):
        return ""
    in_order = np.sort(hashes)  # np.unique takes ten times as long
    in_order = in_order[np.append(True, in_order[1:] != in_order[:-1])]
    chosen = in_order[:_COMPARED_ADDRESSES]
    places = np.flatnonzero(hashes <= chosen[-1])[: 4 * _COMPARED_ADDRESSES]
    pairs = np.empty((len(places), 2), "<u4")
    pairs[:, 0] = hashes[places]
    for i, at in enumerate(rows["st_name"][places].tolist()):
        size = max(0, min(_COMPARED_NAME_BYTES, strings.size - at))
        name = elf.source.read_at(strings.offset + at, size).partition(b"\0")[0]
        pairs[i, 1] = zlib.crc32(name)
    return base64.b64encode(pairs.tobytes()).decode()


class FileReader:
    """Answers requests for files; tables go into a cache."""

    def __init__(self, cache: UnwindCache, identifier: Identifier | None = None) -> None:
        self._cache = cache
        self._identifier = identifier or Identifier()

    def identify(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the Identity of a mapping's file; build its unwind table too, if that is small.

        `has_table` says whether it is in the cache, `inode` is its device and inode, zeros for the
        vDSO. If the file cannot be identified, the answer has `miss` and the build id, if that is
        known.
        """
        try:
            with self._identifier.opened(values) as found:
                identity = self._identifier.identify(found)
                has_table = self._cache.holds(identity.table_key)
                if not has_table and identity.frame_bytes <= _SMALL_FRAME_BYTES:
                    with contextlib.suppress(OSError):
                        has_table = self._build(identity, found.source)
        except NotOpened as error:
            return {"miss": error.reason, "build_id": error.build_id}
        except UnreadableElf as error:
            return {"miss": error.reason, "build_id": values["build_id"]}
        status = found.file[1] if found.file else None
        inode = (status.st_dev, status.st_ino) if status else (0, 0)
        return {**identity._asdict(), "has_table": has_table, "inode": inode}

    def build_table(self, values: Mapping[str, Any]) -> str:
        """Build the unwind table of a mapping's file; return its key, or "" if it gets none.

        Raises:
            OSError: it cannot be written.
        """
        try:
            with self._identifier.opened(values) as found:
                identity = self._identifier.identify(found)
                is_kept = self._cache.open(identity.table_key) is not None  # and not damaged
                is_kept = is_kept or self._build(identity, found.source)
                return identity.table_key if is_kept else ""
        except (NotOpened, UnreadableElf):
            return ""

    def find_mount(self, values: Mapping[str, Any]) -> str:
        """Return where the file system of a `path` is mounted in the namespace of `pids`."""
        return os.fsdecode(mount_of(values["pids"], os.fsencode(values["path"])))

    def _build(self, identity: Identity, source: Source) -> bool:
        """Build and store a table, which all files of one content share; return whether it was.

        It is not if the file has changed since it was identified, or cannot be read any more.
        """
        is_doubtful = identity.owner != 0
        try:
            table = build(source, by_file_offset=True)
        except UnreadableElf:
            table, is_doubtful = UnwindTable("", np.zeros(0, PAGE), np.zeros(0, ROW)), True
        if is_doubtful and not is_still(identity, source):
            return False
        self._cache.store(replace(table, key=identity.table_key))
        return True


def is_still(identity: Identity, source: Source) -> bool:
    """Return whether a file holds what it was identified by; its times do not prove it.

    Who may write to it can do so through a mapping, which changes them only at its first write.
    """
    try:
        return _identify(read_elf(source), identity.owner) == identity
    except UnreadableElf:
        return False
