"""Name code of files: from file offsets to functions. This reads what belongs to others.

This is the door of the package, and what the agent's reader children run. A file is known by what
it holds, see `identify`; its symbol table is built when it is first asked for, and kept on disk. It
never fails: what cannot be named gets a reason.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from symbolizer.identify import Identifier, NotOpened, OpenedMapping, is_still
from symbolizer.integers import Wide
from symbolizer.location import Call, Miss, Place
from symbolizer.runtimes.cpython import find_loop
from symbolizer.runtimes.evaluation import EVALUATION_LOOP
from symbolizer.symbols.candidates import Functions
from symbolizer.symbols.demangle import Demangler
from symbolizer.symbols.elf import Elf, UnreadableElf
from symbolizer.symbols.functions import read_functions
from symbolizer.symbols.table import SymbolTable
from symbolizer.symbols.variants import CodeFile, Variants
from symbolizer.text import readable

CACHE_BYTES = 512 << 20
_TABLES_BYTES = 8 << 20
_MAX_OFFSET = 1 << 63


class FileNames(NamedTuple):
    """The places of the offsets that were asked for.

    Attributes:
        named: how many functions the table names. More names of one code are better names.
        build_ms: CPU time it took to read the file's symbols, 0 if they were there.
        failure: why the file has no table; then all places have this miss.
    """

    places: list[Place]
    named: int = 0
    build_ms: float = 0.0
    failure: Miss | None = None


def _read_functions(elf: Elf) -> tuple[Functions, Iterator[bytes]]:
    """Return a file's functions; an interpreter's loop has its name in all its parts."""
    try:
        parts = find_loop(elf)
    except UnreadableElf:
        parts = ()
    return read_functions(elf, parts, EVALUATION_LOOP)


class Symbolizer:
    """Names offsets in files. Not thread-safe."""

    def __init__(
        self,
        cache_dir: Path,
        cache_bytes: int = CACHE_BYTES,
        tables_bytes: int = _TABLES_BYTES,
        identifier: Identifier | None = None,
    ) -> None:
        """Create the folder; read no symbols yet.

        Args:
            cache_dir: where symbol tables are stored.
            cache_bytes: limit for the tables in `cache_dir`.
            tables_bytes: limit for the tables in memory.
            identifier: opens files, and knows them.
        """
        self._identifier = identifier or Identifier()
        self._variants = Variants(cache_dir, cache_bytes, tables_bytes)
        self._demangler = Demangler()

    def names(
        self, file: CodeFile, offsets: Sequence[int], mapping: Mapping[str, Any] | None = None
    ) -> FileNames:
        """Return what is at each offset of a file.

        If its table is not kept, the file is opened by `mapping`, see `Identifier.opened`, and
        read. Nothing is read without: the kernel's tables are stored by who can read them.
        """
        begun_ns = time.thread_time_ns()
        failure, is_built = None, False
        table = self._variants.own(file)
        if table is None:
            failure = Miss.NOT_KEPT
            if mapping is not None:
                table, failure = self._build(file, mapping)
                is_built = True
        build_ms = (time.thread_time_ns() - begun_ns) / 1e6 if is_built else 0.0
        table = self._variants.best(file, table)
        if table is None:
            places = [Place(offset, offset + 1, (), failure) for offset in offsets]
            return FileNames(places, 0, build_ms, failure)
        wanted = np.array([min(max(0, o), _MAX_OFFSET) for o in offsets], dtype=np.uint64)
        return FileNames(self._find(table, wanted), table.named, build_ms)

    def close(self) -> None:
        self._demangler.close()
        self._variants.close()

    def _build(
        self, file: CodeFile, mapping: Mapping[str, Any]
    ) -> tuple[SymbolTable | None, Miss | None]:
        """Read the symbols of a file that is proved to have the content, and the owner."""
        try:
            with self._reopened(file, mapping) as found:
                functions, strings = _read_functions(found.elf)
                table = self._variants.store(file, functions, found.elf.segments, strings)
                if file.owner and not is_still(self._identifier.identify(found), found.source):
                    self._variants.remove(file)
                    return None, Miss.FILE_REPLACED
                return table, None
        except (NotOpened, UnreadableElf) as error:
            return None, error.reason
        except OSError:  # no space left for the table
            return None, Miss.NOT_KEPT

    @contextlib.contextmanager
    def _reopened(self, file: CodeFile, mapping: Mapping[str, Any]) -> Iterator[OpenedMapping]:
        with self._identifier.opened(mapping) as found:
            identity = self._identifier.identify(found)
            if (identity.content_key, identity.owner) != (file.content, file.owner):
                raise NotOpened(Miss.FILE_REPLACED, found.build_id)
            yield found

    def _find(self, table: SymbolTable, offsets: Wide) -> list[Place]:
        numbers = table.find(offsets)
        # np.unique would import numpy.ma: 2 MB, 8 ms.
        known = np.array(sorted(set(numbers[numbers >= 0].tolist())), dtype=np.int64)
        names = self._demangler.demangle([table.name(number) for number in known.tolist()])
        miss = Miss.NO_SYMBOL if table.named else Miss.STRIPPED
        places = {}
        for number, name, start, (first, end) in zip(
            known.tolist(),
            names,
            table.unnamed_starts(known).tolist(),
            table.ranges(known).tolist(),
            strict=True,
        ):
            file, line = table.place(number)
            call = Call(readable(name), start, readable(file), line)
            calls = (call,) if name or start >= 0 else ()
            places[number] = Place(first, end, calls, miss if start >= 0 else None)
        return [
            places[number] if number >= 0 else Place(offset, offset + 1, (), miss)
            for number, offset in zip(numbers.tolist(), offsets.tolist(), strict=True)
        ]
