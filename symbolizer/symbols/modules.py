"""The modules located so far, and their symbol tables within a memory budget."""

from collections import OrderedDict
from collections.abc import Iterable

from symbolizer.location import Miss, Module, Segment
from symbolizer.symbols.candidates import Functions
from symbolizer.symbols.table import SymbolCache, SymbolTable

_MAX_TABLES = 128
_MAX_MODULES = 8192


class Modules:
    """Modules and tables by build id, bounded in number; the least recently used are evicted first.

    A module without segments is replaced by one that has them.

    Attributes:
        known: modules by build id, the least recently used first.
    """

    def __init__(self, cache: SymbolCache, tables_bytes: int) -> None:
        self.known: OrderedDict[str, Module] = OrderedDict()
        self._absent: dict[str, Miss] = {}
        self._cache = cache
        self._tables: OrderedDict[str, SymbolTable] = OrderedDict()
        self._tables_bytes = tables_bytes

    def add(self, module: Module, absent: Miss | None = None) -> None:
        """Add a module, or mark it as used. `absent` is why it has no symbols."""
        known = self.known.get(module.build_id)
        is_better = known is None or not known.segments
        if is_better:
            self.known[module.build_id] = module
        if absent is None:
            self._absent.pop(module.build_id, None)
        elif is_better:
            self._absent[module.build_id] = absent
        self.known.move_to_end(module.build_id)
        while len(self.known) > _MAX_MODULES:
            forgotten, _ = self.known.popitem(last=False)
            self._absent.pop(forgotten, None)

    def use(self, build_id: str) -> bool:
        """Mark a module as used; return False if its file has to be read (again)."""
        module = self.known.get(build_id)
        if module is None or not module.segments or not self.is_kept(build_id):
            return False
        self.known.move_to_end(build_id)
        return True

    def is_kept(self, build_id: str) -> bool:
        """Return whether its symbols are stored, or reading the file again would not find any."""
        absent = self._absent.get(build_id, Miss.NOT_KEPT)
        return absent != Miss.NOT_KEPT or self.table(build_id) is not None

    def why_absent(self, build_id: str) -> Miss:
        """Return why a build id has no table."""
        return self._absent.get(build_id, Miss.NOT_KEPT)

    def named(self, build_id: str) -> tuple[Module, SymbolTable] | None:
        """Return a module and its table, or None: `why_absent` says why."""
        module = self.known.get(build_id)
        if module is None or build_id in self._absent:
            return None
        table = self.table(build_id)
        return None if table is None else (module, table)

    def table(self, build_id: str) -> SymbolTable | None:
        """Return the table of a build id, from memory or from the cache."""
        table = self._tables.get(build_id)
        if table is not None:
            self._tables.move_to_end(build_id)
            return table
        table = self._cache.load(build_id)
        if table is not None:
            self._keep(build_id, table)
        return table

    def store(
        self,
        build_id: str,
        functions: Functions,
        segments: tuple[Segment, ...],
        strings: Iterable[bytes],
    ) -> None:
        """Write a table to the cache, and keep it open.

        Raises:
            OSError: it cannot be written.
            UnreadableElf: `strings` raised it.
        """
        self._keep(build_id, self._cache.store(build_id, functions, segments, strings))

    def close(self) -> None:
        while self._tables:
            self._tables.popitem()[1].close()

    def _keep(self, build_id: str, table: SymbolTable) -> None:
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
