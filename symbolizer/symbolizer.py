"""Turn addresses of processes and of the kernel into Locations, and Locations into Frames.

This is the door of the package. `locate` works while the process runs and keeps what `names` needs,
which works at any later time. Neither fails: an address that cannot be located or named becomes a
value with a counted reason.
"""

import contextlib
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from symbolizer import maps
from symbolizer.files import ProcessFiles
from symbolizer.location import (
    AddressLocation,
    FileOffset,
    Frame,
    Kind,
    Location,
    Miss,
    Module,
    NamedLocation,
)
from symbolizer.maps import MappingTable, is_anonymous, parse_maps
from symbolizer.symbols.candidates import Functions
from symbolizer.symbols.elf import (
    FileSource,
    MemorySource,
    Source,
    UnreadableElf,
    hash_content,
    read_elf,
)
from symbolizer.symbols.functions import read_functions
from symbolizer.symbols.kernel import KERNEL_NAME, Image, Program, RunningKernel
from symbolizer.symbols.modules import Modules
from symbolizer.symbols.names import Names
from symbolizer.symbols.table import SymbolCache
from symbolizer.text import readable

Addresses = npt.NDArray[np.uint64]

_JIT = "[jit]"
_VDSO = "[vdso]"
_UNKNOWN_KERNEL = "[kernel]"

_CACHE_BYTES = 512 << 20
_TABLES_BYTES = 8 << 20
_MAX_IDENTIFIED = 8192
_SLOWEST = 5

_PSEUDO_MISSES = {
    "[exited]": Miss.EXITED,
    "[unknown]": Miss.NO_MAPPING,
    _JIT: Miss.ANONYMOUS,
}


class _File(NamedTuple):
    """The file behind a mapping."""

    build_id: str
    is_pseudo: bool = False
    """There is no file: its offsets are addresses of the process."""


class Symbolizer:
    """Locates and names addresses. Not thread-safe."""

    def __init__(
        self,
        cache_dir: Path | None,
        cache_bytes: int = _CACHE_BYTES,
        tables_bytes: int = _TABLES_BYTES,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """Create the cache directory; read no symbols yet.

        Args:
            cache_dir: where symbol tables are stored, created if missing; None for temporary files.
            cache_bytes: limit for the tables in `cache_dir`.
            tables_bytes: limit for the tables in memory. Evicted tables are read from the cache
                again; without a `cache_dir` their names are lost (Miss.NOT_KEPT).
            monotonic_ns: the clock that says when to read the kernel's symbols again.
        """
        self._modules = Modules(SymbolCache(cache_dir, cache_bytes), tables_bytes)
        self._names = Names(self._modules)
        self.misses = self._names.misses
        """How many locations `names` could not name, by Miss, each once per call; the caller clears
        it. Locations in functions that are known only by their FDE range count as misses, too."""
        self._identified: OrderedDict[tuple[int, ...], str] = OrderedDict()
        self._files: WeakKeyDictionary[MappingTable, dict[int, _File]] = WeakKeyDictionary()
        self._slowest: list[tuple[float, str]] = []
        self._kernel = RunningKernel(partial(_keep_image, self._modules), monotonic_ns)
        self._vdso: tuple[str, int] | None = None

    @property
    def modules(self) -> Mapping[str, Module]:
        """The modules located so far by build id; the last 8192 of them."""
        return self._modules.known

    def locate(self, pid: int, mappings: MappingTable, addresses: Addresses) -> list[Location]:
        """Return one Location per user address.

        Pass the address of the instruction to look up: for a caller, its return address - 1. A file
        is opened when it is first seen, and its symbols are stored. If it cannot be opened, the
        location still has module and offset, and the build id if the mapping carries one.
        """
        addresses = np.asarray(addresses, dtype=np.uint64)
        numbers = mappings.find(addresses).tolist()
        places: dict[int, tuple[str, int]] = {}
        locations: list[Location] = []
        with ProcessFiles(pid) as files:
            for address, number in zip(addresses.tolist(), numbers, strict=True):
                place = places.get(number)
                if place is None:
                    place = places[number] = self._place(files, mappings, number)
                build_id, start = place
                locations.append(AddressLocation(build_id, FileOffset(address - start)))
        return locations

    def identify(self, pid: int, mappings: MappingTable, number: int) -> str:
        """Return the build id of a mapping's file; empty for memory without a file."""
        with ProcessFiles(pid) as files:
            build_id, is_pseudo = self._file(files, mappings, number)
        return "" if is_pseudo else build_id

    @contextlib.contextmanager
    def opened(self, pid: int, mapping: maps.Mapping, build_id: str) -> Iterator[Source | None]:
        """Open the file that a process has mapped; None if no file with that build id is found."""
        if mapping.path == b"[vdso]":
            yield _own_vdso()[1]
            return
        with ProcessFiles(pid) as files:
            for fd, _ in files.candidates(mapping):
                try:
                    source = FileSource(fd)
                    if _is_of(source, build_id):
                        yield source
                        return
                finally:
                    os.close(fd)
        yield None

    def locate_kernel(self, addresses: Addresses) -> list[Location]:
        """Return one Location per kernel address."""
        addresses = np.asarray(addresses, dtype=np.uint64)
        if not len(addresses):
            return []
        kernel, numbers = self._kernel.find(addresses)
        locations: list[Location] = []
        unknown = KERNEL_NAME if kernel.is_hidden else _UNKNOWN_KERNEL
        for address, number in zip(addresses.tolist(), numbers.tolist(), strict=True):
            if number < 0:
                reason = Miss.KERNEL_HIDDEN if kernel.is_hidden else Miss.KERNEL_UNKNOWN
                self._modules.add(Module(unknown, unknown, Kind.KERNEL), reason)
                locations.append(AddressLocation(unknown, FileOffset(address)))
                continue
            image = kernel.images[number]
            if image.program:
                location = NamedLocation(image.program, image.name, Kind.KERNEL, "", 0, 0)
                locations.append(location)
            else:
                self._modules.known.setdefault(
                    image.build_id, Module(image.build_id, image.name, Kind.KERNEL)
                )
                locations.append(AddressLocation(image.build_id, FileOffset(address - image.start)))
        return locations

    def add_kernel_programs(self, programs: Sequence[Program]) -> None:
        """Take in code that the kernel has made since the last call."""
        self._kernel.add_programs(programs)

    def names(self, locations: Sequence[Location]) -> list[tuple[Frame, ...]]:
        """Return the frames of each location, innermost first; () if it has no name.

        A function that is known only by its FDE range has a frame named after its first address:
        `module+0x…`, as linked.
        """
        frames: list[tuple[Frame, ...]] = [()] * len(locations)
        by_module: dict[str, list[int]] = {}
        for i, location in enumerate(locations):
            if isinstance(location, NamedLocation):
                frames[i] = (_named_frame(location),)
            else:
                by_module.setdefault(location.build_id, []).append(i)
        for build_id, where in by_module.items():
            offsets = np.array([locations[i][1] for i in where], dtype=np.uint64)
            for i, named in zip(where, self._names.find(build_id, offsets), strict=True):
                frames[i] = named
        return frames

    def slowest(self) -> list[dict[str, str | float]]:
        """Return the files whose symbols took longest to read: `path` and `ms`, slowest first."""
        return [{"path": path, "ms": ms} for ms, path in sorted(self._slowest, reverse=True)]

    def close(self) -> None:
        self._names.close()
        self._modules.close()

    def _pseudo(self, name: str, reason: Miss | None = None) -> _File:
        reason = reason or _PSEUDO_MISSES.get(name, Miss.NO_CODE_KNOWN)
        kind = Kind.JIT if name == _JIT else Kind.NATIVE
        self._modules.add(Module(name, name, kind), reason)
        return _File(name, is_pseudo=True)

    def _place(self, files: ProcessFiles, mappings: MappingTable, number: int) -> tuple[str, int]:
        """Return a mapping's build id, and what to subtract from an address for its file offset."""
        if number < 0:
            return self._pseudo(mappings.missing).build_id, 0
        build_id, is_pseudo = self._file(files, mappings, number)
        mapping = mappings.mappings[number]
        return build_id, 0 if is_pseudo else mapping.start - mapping.file_offset

    def _file(self, files: ProcessFiles, mappings: MappingTable, number: int) -> _File:
        known = self._files.setdefault(mappings, {})
        file = known.get(number)
        if file is None or file.build_id not in self._modules.known:
            file = known[number] = self._find_file(files, mappings.mappings[number])
        return file

    def _find_file(self, files: ProcessFiles, mapping: maps.Mapping) -> _File:
        path = mapping.path
        if path == b"[vdso]":
            return self._find_vdso(mapping)
        if is_anonymous(path):
            return self._pseudo(_JIT)
        if path.startswith(b"["):
            return self._pseudo(readable(path))
        if mapping.build_id and self._is_known(mapping):
            return _File(mapping.build_id)
        return self._open_file(files, mapping)

    def _is_known(self, mapping: maps.Mapping) -> bool:
        """Return whether the mapping's file was read before, by this process or an earlier one."""
        build_id = mapping.build_id
        if self._modules.use(build_id):
            return True
        table = self._modules.table(build_id)
        if table is None:
            return False
        self._modules.add(Module(build_id, readable(mapping.file_path), segments=table.segments))
        return True

    def _open_file(self, files: ProcessFiles, mapping: maps.Mapping) -> _File:
        is_replaced = False
        for fd, is_certain in files.candidates(mapping):
            try:
                status = os.fstat(fd)
                device = (os.major(status.st_dev), os.minor(status.st_dev))
                is_same = is_certain or (device, status.st_ino) == (mapping.device, mapping.inode)
                if not mapping.build_id and not is_same:
                    is_replaced = True
                    continue
                file = self._read_file(fd, status, mapping, is_same)
            finally:
                os.close(fd)
            if file is not None:
                return file
            is_replaced = True
        return self._unopened(mapping, Miss.FILE_REPLACED if is_replaced else files.failure)

    def _read_file(
        self, fd: int, status: os.stat_result, mapping: maps.Mapping, is_same: bool
    ) -> _File | None:
        """Identify an open file and store its symbols; None if it is not the mapped file."""
        identity = (
            *(status.st_dev, status.st_ino, status.st_size),
            *(status.st_mtime_ns, status.st_ctime_ns),
        )
        known = self._identified.get(identity)
        is_known = known in self._modules.known and mapping.build_id in ("", known)
        if known is not None and is_known and self._modules.is_kept(known):
            self._identified.move_to_end(identity)
            return _File(known)
        build_id = self._read_source(FileSource(fd), mapping, is_same)
        if build_id is None:
            return None
        if build_id != _JIT:
            self._identified[identity] = build_id
            if len(self._identified) > _MAX_IDENTIFIED:
                self._identified.popitem(last=False)
        return _File(build_id, is_pseudo=build_id == _JIT)

    def _read_source(self, source: Source, mapping: maps.Mapping, is_same: bool) -> str | None:
        path = readable(mapping.file_path)
        try:
            elf = read_elf(source)
        except UnreadableElf as error:
            if mapping.build_id and not is_same:
                return None
            if error.reason == Miss.NOT_ELF and mapping.path.startswith(b"/memfd:"):
                return self._pseudo(_JIT).build_id
            return self._unreadable(source, mapping, error.reason)
        if mapping.build_id and elf.build_id != mapping.build_id:
            return None
        module = Module(elf.build_id, path, segments=elf.segments)
        absent = None
        if self._modules.table(elf.build_id) is None:
            begun_ns = time.thread_time_ns()
            try:
                functions, strings = read_functions(elf)
                self._modules.store(elf.build_id, functions, elf.segments, strings)
            except UnreadableElf as error:
                absent = error.reason
            except OSError:  # no space left for the table
                absent = Miss.NOT_KEPT
            self._slowest.append(((time.thread_time_ns() - begun_ns) / 1e6, path))
            self._slowest = sorted(self._slowest, reverse=True)[:_SLOWEST]
        self._modules.add(module, absent)
        return elf.build_id

    def _unreadable(self, source: Source, mapping: maps.Mapping, reason: Miss) -> str:
        build_id = mapping.build_id
        if not build_id:
            try:
                build_id = hash_content(source)
            except UnreadableElf:  # truncated meanwhile
                build_id = f"[{readable(mapping.file_path)}]"
        self._modules.add(Module(build_id, readable(mapping.file_path)), reason)
        return build_id

    def _unopened(self, mapping: maps.Mapping, reason: Miss) -> _File:
        if mapping.path.startswith(b"/memfd:"):
            return self._pseudo(_JIT)
        path = readable(mapping.file_path)
        build_id = mapping.build_id or f"[{path}]"
        self._modules.add(Module(build_id, path), reason)
        return _File(build_id)

    def _find_vdso(self, mapping: maps.Mapping) -> _File:
        """Read this process's own vDSO: all 64-bit processes of a host share one image."""
        if self._vdso is None or self._vdso[0] not in self._modules.known:
            self._vdso = self._read_own_vdso()
        build_id, size = self._vdso
        if not build_id or mapping.end - mapping.start != size or mapping.start < 1 << 32:
            return self._pseudo(_VDSO)
        return _File(build_id)

    def _read_own_vdso(self) -> tuple[str, int]:
        mapping, source = _own_vdso()
        if source is None:
            return "", 0
        return self._read_source(source, mapping, is_same=True) or "", source.size


def _keep_image(modules: Modules, image: Image, functions: Functions, strings: bytes) -> None:
    if modules.table(image.build_id) is None:
        with contextlib.suppress(OSError):  # no space left: Miss.NOT_KEPT
            modules.store(image.build_id, functions, (), [strings])


def _is_of(source: Source, build_id: str) -> bool:
    try:
        return read_elf(source).build_id == build_id
    except UnreadableElf:
        return False


def _own_vdso() -> tuple[maps.Mapping, Source | None]:
    for mapping in parse_maps(Path("/proc/self/maps").read_bytes()):
        if mapping.path == b"[vdso]":
            fd = os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)
            try:
                content = os.pread(fd, mapping.end - mapping.start, mapping.start)
            except OSError:  # a hardened kernel
                continue
            finally:
                os.close(fd)
            return mapping, MemorySource(content)
    return maps.Mapping(0, 0, 0, b"[vdso]"), None


def _named_frame(location: NamedLocation) -> Frame:
    return Frame(location.function, location.module, location.kind, location.file, location.line)
