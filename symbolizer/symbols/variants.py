"""Choose the table that names a file: its own, or the best that is known for the same code.

A program is often deployed without the symbols that another copy of it has. Both have the same code
(`identify.Identity.code_key`), so a stripped file takes the names of the best table that was ever
built for its code, also by an earlier run.

A table is believed if it was read from a file of root or of the same owner. Others could have
written any name into a copy, and into a file that was identified a moment before: a mapping writes
without a trace in the file's times.
"""

import contextlib
import json
import os
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from fcntl import LOCK_EX, flock
from pathlib import Path
from typing import NamedTuple

from symbolizer.file_cache import FileCache
from symbolizer.location import Segment
from symbolizer.symbols.candidates import Functions
from symbolizer.symbols.table import SymbolCache, SymbolTable

NOBODY = -1
"""The owner of a file whose owner cannot be known. No other file takes its names."""

_MAX_TABLES = 128
_MAX_OWNERS = 16
"""Of which the best table for one code is known; root is always among them."""
_MAX_COMPARED = 1024
_INDEX_BYTES = 8 << 20
_MAX_ENTRY_BYTES = 16 << 10
_CODE = re.compile(r"[0-9a-f]{2,128}")


class CodeFile(NamedTuple):
    """A file that has code.

    Attributes:
        content: the hash of what its frames are named by.
        code: the hash of its code, the same for all variants of one build; empty if unknown.
        owner: the user id of its owner, or NOBODY.
        has_symbols: whether it has a .symtab.
    """

    content: str
    code: str = ""
    owner: int = 0
    has_symbols: bool = True


class Variants:
    """Symbol tables by content, those used last in memory, and which are best for which code."""

    def __init__(self, folder: Path, limit_bytes: int, memory_bytes: int) -> None:
        """Create the folder.

        Args:
            folder: where tables and what is known of them are kept.
            limit_bytes: limit for the tables in `folder`.
            memory_bytes: limit for the tables in memory. Evicted ones are read from `folder` again.
        """
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._cache = SymbolCache(folder, limit_bytes)
        self._index = _Index(folder)
        self._tables: OrderedDict[str, SymbolTable] = OrderedDict()
        self._memory_bytes = memory_bytes
        self._compared: dict[tuple[str, str], bool] = {}

    def own(self, file: CodeFile) -> SymbolTable | None:
        """Return the table of a file's content, from memory or the folder; None: build it."""
        return self._find(file.content, file.owner)

    def _find(self, content: str, owner: int) -> SymbolTable | None:
        for key in dict.fromkeys((_key(content, 0), _key(content, owner))):
            table = self._tables.get(key)
            if table is not None:
                self._tables.move_to_end(key)
                return table
            table = self._cache.load(key)
            if table is not None:
                return self._keep(key, table)
        return None

    def store(
        self,
        file: CodeFile,
        functions: Functions,
        segments: tuple[Segment, ...],
        strings: Iterable[bytes],
    ) -> SymbolTable:
        """Write the table of a file, and return it.

        Raises:
            OSError: it cannot be written.
            UnreadableElf: `strings` raised it.
        """
        key = _key(file.content, file.owner)
        return self._keep(key, self._cache.store(key, functions, segments, strings))

    def remove(self, file: CodeFile) -> None:
        """Remove the table that `store` wrote for a file."""
        key = _key(file.content, file.owner)
        self._tables.pop(key).close()
        self._cache.remove(key)

    def best(self, file: CodeFile, own: SymbolTable | None) -> SymbolTable | None:
        """Return the table that names a file, and remember its own one for other files."""
        if not _CODE.fullmatch(file.code):
            return own
        best = own
        for owner, (content, named) in self._index.known(file).items():
            if content == file.content or (best is not None and named <= best.named_code):
                continue
            table = self._find(content, owner)
            if table is None:  # evicted; it is built again when its file is sampled
                self._index.forget(file.code, owner, content)
                continue
            keys = _key(content, owner), _key(file.content, file.owner)
            if own is None or not file.has_symbols or self._extends(keys, table, own):
                best = table
        if own is not None and file.owner != NOBODY:
            self._index.offer(file, own.named_code)
        return best

    def _extends(self, keys: tuple[str, str], table: SymbolTable, own: SymbolTable) -> bool:
        if keys not in self._compared:
            if len(self._compared) >= _MAX_COMPARED:
                self._compared.clear()
            self._compared[keys] = table.extends(own)
        return self._compared[keys]

    def close(self) -> None:
        while self._tables:
            self._tables.popitem()[1].close()

    def _keep(self, key: str, table: SymbolTable) -> SymbolTable:
        old = self._tables.pop(key, None)
        if old is not None:
            old.close()
        self._tables[key] = table
        used = sum(table.memory_bytes for table in self._tables.values())
        # Two are in use at a time.
        while len(self._tables) > 2 and (
            used > self._memory_bytes or len(self._tables) > _MAX_TABLES
        ):
            _, oldest = self._tables.popitem(last=False)
            used -= oldest.memory_bytes
            oldest.close()
        return table


def _key(content: str, owner: int) -> str:
    """Return by what a table is kept that was read from a file of this owner."""
    return f"{content}{owner % (1 << 32):08x}" if owner else content


class _Index:
    """For each code and owner the best table, in a small file by code. Several processes share it.

    An entry is `[content, named functions]` by owner, in JSON.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = FileCache(folder, _INDEX_BYTES, files="*.variants")

    def known(self, file: CodeFile) -> dict[int, tuple[str, int]]:
        """Return by owner the tables that may name a file and how many functions they name."""
        entries = self._read(file.code)
        return {owner: entries[owner] for owner in (0, file.owner) if owner in entries}

    def offer(self, file: CodeFile, named: int) -> None:
        """Remember a file's own table if it is the best of its owner's for this code."""
        if not self._is_better(self._read(file.code), file, named):
            return
        with self._locked(file.code) as entries:
            if self._is_better(entries, file, named):
                entries.pop(file.owner, None)
                while len(entries) >= _MAX_OWNERS:
                    del entries[next(owner for owner in entries if owner)]
                entries[file.owner] = file.content, named

    def forget(self, code: str, owner: int, content: str) -> None:
        """Forget a table that is not kept any more."""
        with self._locked(code) as entries:
            if entries.get(owner, ("", 0))[0] == content:
                del entries[owner]

    @staticmethod
    def _is_better(entries: dict[int, tuple[str, int]], file: CodeFile, named: int) -> bool:
        before = entries.get(file.owner)
        return named > 0 and (before is None or named > before[1])

    def _read(self, code: str) -> dict[int, tuple[str, int]]:
        opened = self._files.open(f"{code}.variants")
        if opened is None:
            return {}
        with opened:
            try:
                read = json.loads(opened.read(_MAX_ENTRY_BYTES))
                return {int(k): (str(content), int(n)) for k, (content, n) in read.items()}
            except (OSError, ValueError, TypeError, AttributeError, RecursionError):
                return {}

    @contextlib.contextmanager
    def _locked(self, code: str) -> Iterator[dict[int, tuple[str, int]]]:
        """Return the entries of a code to be changed: they are written after the block."""
        try:
            fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            yield {}
            return
        try:
            flock(fd, LOCK_EX)
            entries = self._read(code)
            before = dict(entries)
            yield entries
            if entries != before:
                with contextlib.suppress(OSError), self._files.create(f"{code}.variants") as file:
                    file.write(json.dumps({str(k): v for k, v in entries.items()}).encode())
        finally:
            os.close(fd)
