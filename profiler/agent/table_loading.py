"""Loads unwind tables into the kernel, within its budget, and reads them for user space.

A table belongs to a content, so files with the same share it. It is read from the cache on disk; if
it is not there, or not any more, a reader builds it again. When the kernel's memory for tables is
full, those go that no sample has used for a while; if there is none, the new one waits.
"""

import time
from collections import OrderedDict, defaultdict
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

from bpf.sampler import Sampler
from bpf.tables import NoRoomError, TableState
from profiler.agent.mapped_files import MappedFile, MappedFiles, State
from profiler.agent.reader_child import Answer, Failure
from profiler.agent.readers import Readers
from symbolizer.location import Miss
from symbolizer.runtimes.image import Image
from symbolizer.unwind.table import PagedRows, StoredTable, UnwindCache, UnwindTable

_UNUSED_S = 15.0
"""A table that no sample has used for so long may go when another needs the room."""
_WAIT_S = 30.0
"""After so long a table is tried again for which there was no room, or whose reader failed."""
_MAX_TRIES = 3
"""A table whose reader failed so often in a row is given up: it may take too much itself."""
_KEPT_TABLES, _KEPT_BYTES, _KEPT_S = 64, 4 << 20, 60.0
"""Tables that are kept open for stacks that are unwound here, what their pages may take, and how
long one is kept that no stack needs."""

_INTERRUPTIONS = {Failure.MEMORY, Failure.TIME, Failure.HUNG, Failure.CRASHED}
_NOT_ITS_FAULT = {Failure.BUDGET, Failure.UNWRITTEN}
"""Failures that say nothing of what the table takes: it is tried for as long as it is in use."""


class _LoadedTable(NamedTuple):
    number: int
    used_s: float


class _KeptTable(NamedTuple):
    table: StoredTable
    used_s: float


class TableLoader:
    """Tables by the content they belong to, and the executables in the kernel that have them.

    Not to be used from several threads at once.

    Attributes:
        evicted: how many tables had to go for others.
        interrupted: how many times a reader failed at a table, because it was killed or crashed.
    """

    def __init__(
        self, sampler: Sampler, readers: Readers, files: MappedFiles, cache: UnwindCache
    ) -> None:
        self.evicted = 0
        self.interrupted = 0
        self._sampler = sampler
        self._tables = sampler.tables
        self._readers = readers
        self._files = files
        self._cache = cache
        self._executables: defaultdict[str, set[int]] = defaultdict(set)
        self._loaded: dict[str, _LoadedTable] = {}
        self._next_number = 1
        self._empty: set[str] = set()  # of those in use, the ones without rows
        self._asked: set[str] = set()
        self._waiting: set[str] = set()  # for room
        self._tries: dict[str, int] = {}  # how often in a row a table's reader failed
        self._paused: set[str] = set()  # those of these tables that are not to be built now
        self._next_try_s = 0.0
        self._kept: OrderedDict[str, _KeptTable] = OrderedDict()  # the longest unused first
        self._new_images: list[tuple[str, Image]] = []

    @property
    def loaded(self) -> int:
        return len(self._loaded)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def is_idle(self) -> bool:
        """Whether no table is being built."""
        return not self._asked

    def add(self, executable: int, file: MappedFile) -> None:
        """Let an executable in the kernel have the table of a file, if that is loaded by now."""
        key = file.table_key
        self._executables[key].add(executable)
        if key in self._loaded:
            self._tables.set_table(executable, self._loaded[key].number)
        else:
            state = TableState.NONE if key in self._empty else TableState.UNKNOWN
            self._tables.set_state(executable, state)

    def remove(self, executable: int, key: str) -> None:
        """Forget an executable; its number may mean another file from now on."""
        self._executables[key].discard(executable)
        if not self._executables[key]:
            del self._executables[key]
            self._empty.discard(key)
            self._tries.pop(key, None)
            self._paused.discard(key)
            self._waiting.discard(key)
        self._tables.set_state(executable, TableState.UNKNOWN)

    def prepare(self, file: MappedFile) -> None:
        """Have the table of a file built, if that is identified and has none in the cache."""
        if file.state == State.IDENTIFIED and not file.has_table:
            file.has_table = True
            self._ask(file)

    def load(self, file: MappedFile) -> None:
        """Load the table of an identified file, now or when a reader has built it."""
        key = file.table_key
        if key in self._loaded or key in self._waiting or key in self._asked:
            return
        if key in self._paused or key in self._empty:
            self._set_state(key, TableState.NONE)
            return
        table = self._cache.load(key)
        if table is not None:
            self._take_in(key, table)
        else:
            self._ask(file)

    def read(self, file: MappedFile) -> PagedRows | Miss:
        """Return the table of a file, also one without rows; NOT_READ if it may come later."""
        if file.state != State.IDENTIFIED:
            return file.miss or Miss.NOT_READ
        key = file.table_key
        kept = self._kept.pop(key, None)
        table = kept.table if kept else None
        if table is None:
            table = self._cache.open(key) if key not in self._asked else None
            if table is None:
                if key in self._paused:
                    return Miss.TOO_COSTLY
                self._ask(file)
                return Miss.NOT_READ
        self._kept[key] = _KeptTable(table, time.monotonic())
        if kept is None:
            self._bound_kept()
        return table

    def note_use(self, keys: Iterable[str]) -> None:
        """Remember that samples have used these tables just now. To be called now and then."""
        now_s = time.monotonic()
        for key in self._loaded.keys() & set(keys):
            self._loaded[key] = self._loaded[key]._replace(used_s=now_s)
        while self._kept and next(iter(self._kept.values())).used_s < now_s - _KEPT_S:
            self._kept.popitem(last=False)

    def try_again(self) -> None:
        """Let those be requested again that waited long enough. To be called now and then."""
        now_s = time.monotonic()
        if not (self._waiting or self._tries) or now_s < self._next_try_s:
            return
        self._next_try_s = now_s + _WAIT_S
        self._tries = {key: n for key, n in self._tries.items() if key in self._executables}
        given_up = {key for key, tries in self._tries.items() if tries >= _MAX_TRIES}
        for key in self._waiting | (self._paused - given_up):
            self._set_state(key, TableState.UNKNOWN)
        self._waiting.clear()
        self._paused &= given_up

    def take_images(self) -> list[tuple[str, Image]]:
        """Return what is known of interpreters that were loaded since the last call, by key."""
        new, self._new_images = self._new_images, []
        return new

    def _bound_kept(self) -> None:
        kept_bytes = sum(each.table.pages.nbytes for each in self._kept.values())
        while len(self._kept) > 1 and (len(self._kept) > _KEPT_TABLES or kept_bytes > _KEPT_BYTES):
            kept_bytes -= self._kept.popitem(last=False)[1].table.pages.nbytes

    def _ask(self, file: MappedFile) -> None:
        key = file.table_key
        if key in self._asked:
            return
        self._asked.add(key)
        take = partial(self._take, key)
        self._readers.ask(
            *("table", self._files.request(file), take),
            turn=0,
            group=self._files.group(file),
            owner=self._files.owner(file),
            is_long=True,
        )

    def _take(self, key: str, answer: Answer) -> None:
        self._asked.discard(key)
        if answer.failure in _INTERRUPTIONS:
            self.interrupted += 1
        is_used = key in self._executables
        is_stored = answer.result == key and self._cache.holds(key)
        table = self._cache.load(key) if is_stored and is_used else None
        if table is not None:
            self._take_in(key, table)
        if table is not None or (is_stored and not is_used):
            self._tries.pop(key, None)
            return
        # Its reader failed, or it cannot be reached just now, or the cache cannot be written.
        self._tries[key] = self._tries.get(key, 0) + (answer.failure not in _NOT_ITS_FAULT)
        self._paused.add(key)
        self._next_try_s = max(self._next_try_s, time.monotonic() + _WAIT_S)
        self._set_state(key, TableState.NONE)

    def _take_in(self, key: str, table: UnwindTable) -> None:
        """Load a table into the kernel, if there is room or can be."""
        if table.image is not None:
            self._new_images.append((key, table.image))
        if not len(table.rows):
            self._empty.add(key)
            self._set_state(key, TableState.NONE)
            return
        number = self._next_number
        self._next_number += 1
        while True:
            try:
                self._tables.load(number, table.pages, table.rows)
            except NoRoomError:
                if not self._evict():
                    self._waiting.add(key)
                    self._set_state(key, TableState.NO_ROOM)
                    return
            else:
                self._loaded[key] = _LoadedTable(number, time.monotonic())
                for executable in self._executables.get(key, ()):
                    self._tables.set_table(executable, number)
                return

    def _evict(self) -> bool:
        """Unload the table that was not used for longest, if that is long enough."""
        key = min(self._loaded, key=lambda each: self._loaded[each].used_s, default=None)
        if key is None or self._loaded[key].used_s > time.monotonic() - _UNUSED_S:
            return False
        self._set_state(key, TableState.UNKNOWN)
        self._tables.unload(self._loaded.pop(key).number)
        self._sampler.wait_for_programs()
        self.evicted += 1
        return True

    def _set_state(self, key: str, state: TableState) -> None:
        for executable in self._executables.get(key, ()):
            self._tables.set_state(executable, state)
