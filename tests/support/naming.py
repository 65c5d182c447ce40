"""Name addresses of processes in this process, by what readers run in theirs."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from symbolizer.identify import FileReader
from symbolizer.location import FileOffset, Frame, Miss, Module, Segment
from symbolizer.maps import Mapping, MappingTable, parse_maps
from symbolizer.symbolizer import CACHE_BYTES, FileNames, Symbolizer
from symbolizer.symbols.variants import CodeFile
from symbolizer.unwind.table import UnwindCache


class NamedAddress(NamedTuple):
    """Where an address lies, and what it is called; `miss` is why it has no name."""

    module: Module
    offset: FileOffset
    frames: tuple[Frame, ...]
    miss: Miss | None

    @property
    def function(self) -> str | None:
        return self.frames[0].function if self.frames else None


class Naming:
    """Identifies files and names what is in them."""

    def __init__(
        self, cache: Path, cache_bytes: int = CACHE_BYTES, tables_bytes: int = 8 << 20
    ) -> None:
        self._files = FileReader(UnwindCache(cache / "unwind"))
        self.symbolizer = Symbolizer(cache, cache_bytes, tables_bytes)

    def close(self) -> None:
        self.symbolizer.close()

    def identify(self, pid: int, mapping: Mapping) -> dict[str, Any]:
        return self._files.identify(request(pid, mapping))

    def names(self, pid: int, mapping: Mapping, offsets: Sequence[int]) -> FileNames:
        """Return what is in the file of a mapping."""
        asked = request(pid, mapping)
        return self.symbolizer.names(code_file(self._files.identify(asked)), offsets, asked)

    def addresses(
        self, pid: int, addresses: Sequence[int], mappings: MappingTable | None = None
    ) -> list[NamedAddress]:
        """Return what the addresses of a process are called; all must be in mapped files."""
        table = mappings or mappings_of(pid)
        words = np.array(addresses, dtype=np.uint64)
        numbers = table.find(words)
        found: dict[int, NamedAddress] = {}
        for number in np.unique(numbers).tolist():
            mapping = table.mappings[number]
            here = words[numbers == number].tolist()
            offsets = [address - mapping.start + mapping.file_offset for address in here]
            named = self._mapped(pid, mapping, offsets)
            found.update(zip(here, named, strict=True))
        return [found[address] for address in words.tolist()]

    def _mapped(self, pid: int, mapping: Mapping, offsets: Sequence[int]) -> list[NamedAddress]:
        identity = self.identify(pid, mapping)
        path = mapping.file_path.decode(errors="backslashreplace")
        if "miss" in identity:
            module, miss = Module(identity["build_id"], path), Miss(identity["miss"])
            return [NamedAddress(module, FileOffset(offset), (), miss) for offset in offsets]
        segments = tuple(Segment(*each) for each in identity["segments"])
        module = Module(identity["build_id"], path, segments=segments)
        return [
            NamedAddress(module, FileOffset(offset), place.frames(module), place.miss)
            for offset, place in zip(offsets, self.names(pid, mapping, offsets).places, strict=True)
        ]

    def name(self, pid: int, address: int, mappings: MappingTable | None = None) -> NamedAddress:
        return self.addresses(pid, [address], mappings)[0]


def code_file(identity: dict[str, Any]) -> CodeFile:
    return CodeFile(
        content=identity["content_key"],
        code=identity["code_key"],
        owner=identity["owner"],
        has_symbols=identity["has_symbols"],
    )


def request(pid: int, mapping: Mapping) -> dict[str, Any]:
    """Return what a reader needs to open the file of a mapping."""
    return {
        "pids": [pid],
        "start": mapping.start,
        "end": mapping.end,
        "offset": mapping.file_offset,
        "path": os.fsdecode(mapping.path),
        "device": list(mapping.device),
        "inode": mapping.inode,
        "build_id": mapping.build_id,
    }


def mapping_of_file(path: Path, start: int = 0x7F0000000000) -> Mapping:
    """Return a mapping of a whole file, as if a process that cannot exist had it."""
    status = path.stat()
    device = (os.major(status.st_dev), os.minor(status.st_dev))
    return Mapping(start, start + status.st_size, 0, os.fsencode(path), device, status.st_ino)


def mappings_of(pid: int) -> MappingTable:
    return MappingTable.of(parse_maps(Path(f"/proc/{pid}/maps").read_bytes()))


NO_PROCESS = 2**22 + 1
"""A pid that cannot exist."""
