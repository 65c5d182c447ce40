"""The door: addresses of processes and of the kernel -> Locations -> Frames.

`locate` works while the process lives and keeps what naming needs; `names` works at any time after.
Both take what there is: an address that cannot be placed or named is a value with a counted reason.
"""

import contextlib
import os
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    bounded,
)
from symbolizer.maps import MappingTable, is_anonymous, parse_maps
from symbolizer.symbols.candidates import Functions
from symbolizer.symbols.demangle import Demangler
from symbolizer.symbols.elf import (
    FileSource,
    MemorySource,
    Source,
    UnreadableElf,
    hash_content,
    read_elf,
)
from symbolizer.symbols.functions import read_functions
from symbolizer.symbols.kernel import KERNEL_NAME, Image, KernelMap, parse_modules, read_kernel_map
from symbolizer.symbols.table import SymbolCache, SymbolTable
from symbolizer.text import readable

Addresses = npt.NDArray[np.uint64]

_JIT = "[jit]"
_VDSO = "[vdso]"
_UNKNOWN_KERNEL = "[kernel]"

_CACHE_BYTES = 512 << 20
_TABLES_BYTES = 8 << 20
_MAX_TABLES = 128
_MAX_MODULES = 8192
_MAX_IDENTIFIED = 8192
_SLOWEST = 5
# Resolved names, some 300 bytes each with their text: 5 MB.
_MAX_NAMES = 16_384

# Modules and BPF programs come and go; reading kallsyms again takes 0.1 s.
_KERNEL_REFRESH_NS = 60 * 10**9

_PSEUDO_MISSES = {
    "[exited]": Miss.EXITED,
    "[unknown]": Miss.NO_MAPPING,
    _JIT: Miss.ANONYMOUS,
}


class _File(NamedTuple):
    """What stands behind a mapping."""

    build_id: str
    is_pseudo: bool = False
    """Without a file: places in it are addresses of the process."""


class Symbolizer:
    """Not to be used from several threads at once."""

    def __init__(
        self,
        cache_dir: Path | None,
        cache_bytes: int = _CACHE_BYTES,
        tables_bytes: int = _TABLES_BYTES,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """Prepare; nothing is read yet.

        Args:
            cache_dir: where symbol tables are kept, made if missing; None for temporary files.
            cache_bytes: what the tables in `cache_dir` may take.
            tables_bytes: what the tables in memory may take. Others are read from the cache again,
                so without a `cache_dir` their names are gone (Miss.NOT_KEPT).
            monotonic_ns: the clock for reading the kernel's symbols again.
        """
        self.misses: Counter[str] = Counter()
        """Locations that `names` could not name, by Miss; each once per call. Yours to clear.
        Those that are shown by the extent of their function are among them."""
        self._modules: OrderedDict[str, Module] = OrderedDict()
        self._absent: dict[str, Miss] = {}
        self._cache = SymbolCache(cache_dir, cache_bytes)
        self._tables: OrderedDict[str, SymbolTable] = OrderedDict()
        self._tables_bytes = tables_bytes
        self._identified: OrderedDict[tuple[int, ...], str] = OrderedDict()
        self._files: WeakKeyDictionary[MappingTable, dict[int, _File]] = WeakKeyDictionary()
        self._frames: dict[str, dict[int, tuple[Frame, ...]]] = {}
        self._named = 0
        self._slowest: list[tuple[float, str]] = []
        self._demangler = Demangler()
        self._kernel: KernelMap | None = None
        self._kernel_modules: dict[str, tuple[int, int]] = {}
        self._kernel_read_ns = 0
        self._monotonic_ns = monotonic_ns
        self._vdso: tuple[str, int] | None = None

    @property
    def modules(self) -> Mapping[str, Module]:
        """By build id, what was located so far: the last 8192."""
        return self._modules

    def locate(self, pid: int, mappings: MappingTable, addresses: Addresses) -> list[Location]:
        """Return one Location per user address.

        An address is that of the instruction to look up: for a caller, its return address - 1. A
        file is opened and its symbols are kept when it is first seen; if it cannot be opened,
        module and offset remain, with the build id if the mapping carries one.
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
        """Open the file of a build id, which a process has mapped; None if out of reach."""
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
        kernel, numbers = self._find_images(addresses)
        locations: list[Location] = []
        unknown = KERNEL_NAME if kernel.is_hidden else _UNKNOWN_KERNEL
        for address, number in zip(addresses.tolist(), numbers.tolist(), strict=True):
            if number < 0:
                reason = Miss.KERNEL_HIDDEN if kernel.is_hidden else Miss.KERNEL_UNKNOWN
                self._add_module(Module(unknown, unknown, Kind.KERNEL), reason)
                locations.append(AddressLocation(unknown, FileOffset(address)))
                continue
            image = kernel.images[number]
            if image.program:
                location = NamedLocation(image.program, image.name, Kind.KERNEL, "", 0, 0)
                locations.append(location)
            else:
                self._modules.setdefault(
                    image.build_id, Module(image.build_id, image.name, Kind.KERNEL)
                )
                locations.append(AddressLocation(image.build_id, FileOffset(address - image.start)))
        return locations

    def names(self, locations: Sequence[Location]) -> list[tuple[Frame, ...]]:
        """Return the frames of each location, innermost first; () where there is no name.

        An address in a function that has no name, but whose extent is known, has the frame of that
        function, named after its first address: `module+0x…`, as linked.
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
            for i, named in zip(where, self._name_offsets(build_id, offsets), strict=True):
                frames[i] = named
        return frames

    def slowest(self) -> list[dict[str, str | float]]:
        """Return the files whose symbols took longest to read, `path` and `ms`, slowest first."""
        return [{"path": path, "ms": ms} for ms, path in sorted(self._slowest, reverse=True)]

    def close(self) -> None:
        self._demangler.close()
        while self._tables:
            self._tables.popitem()[1].close()
        self._frames.clear()

    # Modules and tables.

    def _add_module(self, module: Module, absent: Miss | None = None) -> None:
        known = self._modules.get(module.build_id)
        is_better = known is None or not known.segments
        if is_better:
            self._modules[module.build_id] = module
        if absent is None:
            self._absent.pop(module.build_id, None)
        elif is_better:
            self._absent[module.build_id] = absent
        self._modules.move_to_end(module.build_id)
        while len(self._modules) > _MAX_MODULES:
            forgotten, _ = self._modules.popitem(last=False)
            self._absent.pop(forgotten, None)

    def _pseudo(self, name: str, reason: Miss | None = None) -> _File:
        reason = reason or _PSEUDO_MISSES.get(name, Miss.NO_CODE_KNOWN)
        kind = Kind.JIT if name == _JIT else Kind.NATIVE
        self._add_module(Module(name, name, kind), reason)
        return _File(name, is_pseudo=True)

    def _table(self, build_id: str) -> SymbolTable | None:
        table = self._tables.get(build_id)
        if table is not None:
            self._tables.move_to_end(build_id)
            return table
        table = self._cache.load(build_id)
        if table is not None:
            self._keep_table(build_id, table)
        return table

    def _keep_table(self, build_id: str, table: SymbolTable) -> None:
        old = self._tables.pop(build_id, None)
        if old is not None:
            old.close()
        self._tables[build_id] = table
        used = sum(table.memory_bytes for table in self._tables.values())
        while len(self._tables) > 1 and (
            used > self._tables_bytes or len(self._tables) > _MAX_TABLES
        ):
            _, oldest = self._tables.popitem(last=False)
            used -= oldest.memory_bytes
            oldest.close()

    # From mappings to files.

    def _place(self, files: ProcessFiles, mappings: MappingTable, number: int) -> tuple[str, int]:
        """Return a mapping's build id, and what to subtract from addresses for file offsets."""
        if number < 0:
            return self._pseudo(mappings.missing).build_id, 0
        build_id, is_pseudo = self._file(files, mappings, number)
        mapping = mappings.mappings[number]
        return build_id, 0 if is_pseudo else mapping.start - mapping.file_offset

    def _file(self, files: ProcessFiles, mappings: MappingTable, number: int) -> _File:
        known = self._files.setdefault(mappings, {})
        file = known.get(number)
        if file is None or file.build_id not in self._modules:
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
        """Return whether a build id's file was read before, by this process or an earlier one."""
        build_id = mapping.build_id
        module = self._modules.get(build_id)
        if module is not None and module.segments and self._is_kept(build_id):
            self._modules.move_to_end(build_id)
            return True
        table = self._table(build_id)
        if table is None:
            return False
        self._add_module(Module(build_id, readable(mapping.file_path), segments=table.segments))
        return True

    def _is_kept(self, build_id: str) -> bool:
        """Return whether to read the file once more would bring nothing."""
        absent = self._absent.get(build_id, Miss.NOT_KEPT)
        return absent != Miss.NOT_KEPT or self._table(build_id) is not None

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
        """Identify an open file and keep its symbols; None if it is not the mapped one."""
        identity = (
            *(status.st_dev, status.st_ino, status.st_size),
            *(status.st_mtime_ns, status.st_ctime_ns),
        )
        known = self._identified.get(identity)
        is_known = known in self._modules and mapping.build_id in ("", known)
        if known is not None and is_known and self._is_kept(known):
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
        if self._table(elf.build_id) is None:
            begun_ns = time.thread_time_ns()
            try:
                functions, strings = read_functions(elf)
                table = self._cache.store(elf.build_id, functions, elf.segments, strings)
            except UnreadableElf as error:
                absent = error.reason
            except OSError:  # no space left for the table
                absent = Miss.NOT_KEPT
            else:
                self._keep_table(elf.build_id, table)
            self._slowest.append(((time.thread_time_ns() - begun_ns) / 1e6, path))
            self._slowest = sorted(self._slowest, reverse=True)[:_SLOWEST]
        self._add_module(module, absent)
        return elf.build_id

    def _unreadable(self, source: Source, mapping: maps.Mapping, reason: Miss) -> str:
        build_id = mapping.build_id
        if not build_id:
            try:
                build_id = hash_content(source)
            except UnreadableElf:  # it shrinks while it is read
                build_id = f"[{readable(mapping.file_path)}]"
        self._add_module(Module(build_id, readable(mapping.file_path)), reason)
        return build_id

    def _unopened(self, mapping: maps.Mapping, reason: Miss) -> _File:
        if mapping.path.startswith(b"/memfd:"):
            return self._pseudo(_JIT)
        path = readable(mapping.file_path)
        build_id = mapping.build_id or f"[{path}]"
        self._add_module(Module(build_id, path), reason)
        return _File(build_id)

    def _find_vdso(self, mapping: maps.Mapping) -> _File:
        """Take this process's own vDSO, which is that of every 64-bit process of the host."""
        if self._vdso is None or self._vdso[0] not in self._modules:
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

    # The kernel.

    def _find_images(self, addresses: Addresses) -> tuple[KernelMap, npt.NDArray[np.int64]]:
        """Find each address's image; read the kernel's map again where it may have changed."""
        kernel = self._kernel or self._read_kernel()
        numbers = kernel.find(addresses)
        images = [kernel.images[n] for n in np.unique(numbers[numbers >= 0]).tolist()]
        if any(image.name != KERNEL_NAME for image in images) or (numbers < 0).any():
            is_passing = (numbers < 0).any() or any(image.program for image in images)
            is_old = self._monotonic_ns() - self._kernel_read_ns > _KERNEL_REFRESH_NS
            if (is_passing and is_old) or _read_modules() != self._kernel_modules:
                kernel = self._read_kernel()
                numbers = kernel.find(addresses)
        return kernel, numbers

    def _read_kernel(self) -> KernelMap:
        self._kernel_modules = _read_modules()
        self._kernel_read_ns = self._monotonic_ns()
        self._kernel = read_kernel_map(self._keep_image)
        return self._kernel

    def _keep_image(self, image: Image, functions: Functions, strings: bytes) -> None:
        if self._table(image.build_id) is None:
            with contextlib.suppress(OSError):  # no space left: Miss.NOT_KEPT
                table = self._cache.store(image.build_id, functions, (), [strings])
                self._keep_table(image.build_id, table)

    # Names.

    def _name_offsets(self, build_id: str, offsets: Addresses) -> list[tuple[Frame, ...]]:
        module = self._modules.get(build_id)
        table = self._table(build_id) if module and build_id not in self._absent else None
        if module is None or table is None:
            reason = self._absent.get(build_id, Miss.NOT_KEPT)
            self.misses[reason.value] += len(np.unique(offsets))
            return [()] * len(offsets)
        numbers = table.find(offsets)
        missing = numbers < 0
        # A function that is known by its extent has a box, but no name.
        missing[~missing] = table.unnamed_starts(numbers[~missing]) >= 0
        if missing.any():
            reason = Miss.NO_SYMBOL if table.has_names else Miss.STRIPPED
            self.misses[reason.value] += len(set(offsets[missing].tolist()))
        wanted = numbers.tolist()
        frames = self._resolve(module, table, wanted)
        return [frames[number] for number in wanted]

    def _resolve(
        self, module: Module, table: SymbolTable, numbers: list[int]
    ) -> dict[int, tuple[Frame, ...]]:
        """Read and demangle the names of functions that are met for the first time."""
        new = set(numbers) - self._frames.get(module.build_id, {-1: ()}).keys()
        if self._named + len(new) > _MAX_NAMES:
            self._frames.clear()
            self._named = 0
            new = set(numbers)
        frames = self._frames.setdefault(module.build_id, {-1: ()})
        order = sorted(new - {-1})
        starts = table.unnamed_starts(np.array(order, dtype=np.int64)).tolist()
        names = self._demangler.demangle([table.name(number) for number in order])
        for number, name, start in zip(order, names, starts, strict=True):
            frame = Frame(readable(name), module.name, module.kind)
            frames[number] = (frame,) if name else ()
            if start >= 0:
                address = module.elf_address(FileOffset(start))
                frames[number] = (bounded(module.name, module.kind, address),)
        self._named += len(order)
        return frames


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


def _read_modules() -> dict[str, tuple[int, int]]:
    try:
        return parse_modules(Path("/proc/modules").read_bytes())
    except OSError:  # a kernel without modules
        return {}
