"""Keeps the kernel's unwind tables fit for what is on CPU, so that stacks are whole.

The walk in the kernel requests what it misses: first a process, that is what it has mapped where;
then the table of a file that it came across. Only what was requested is loaded.
A table is built from the file once, by a child process, as files are others' and large ones take
memory; it is kept on disk, by what it was built from, and shared by all processes. When the
kernel's memory for tables is full, those go that no sample has used for a while; if there is none,
the new one waits.

`AddressSpaces` says at each drain what a sampled process has mapped: a process that mapped more has
another MappingTable, and so gets another address space in the kernel. The kernel itself tells
process generations apart: a process that started another program, and a pid that is used again.
"""

import contextlib
import os
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from bpf.sampler import Sampler
from bpf.samples import ProcessGeneration, RawSample
from bpf.tables import (
    EXECUTABLES_CAPACITY,
    MAPPINGS_CAPACITY,
    PROCESSES_CAPACITY,
    MappingRow,
    NoRoomError,
    TableState,
    UnwindRequest,
)
from profiler.agent.table_builder import (
    BuildOutcome,
    BuildRequest,
    Executable,
    MappedFile,
    TableBuilder,
    opened,
)
from profiler.processes.address_spaces import AddressSpaces
from symbolizer.maps import MappingTable, is_anonymous
from symbolizer.symbolizer import Symbolizer
from symbolizer.symbols.elf import UnreadableElf
from symbolizer.unwind.table import UnwindCache, UnwindTable, key_of

_YOUNG_NS = 50_000_000
"""Younger processes are likely to be gone before it pays; those that stay are followed then."""
_SWEEP_S = 5.0
_UNUSED_S = 3 * _SWEEP_S
"""A table that no sample has used for so long may go when another needs the room."""
_WAIT_S = 30.0
"""After so long a table is tried again for which there was no room, or whose child was killed."""
_MAX_TRIES = 3
"""A table whose child was killed so often in a row is given up: it may take too much itself."""
_MAX_RECENT = 1024
_MAX_MAPPINGS = MAPPINGS_CAPACITY // 8
"""Of one process. One with more, which no ordinary one has, would take the room of all others again
and again. It is left by frame pointers alone, and its stacks say `no_process_yet`."""


class _Followed(NamedTuple):
    """A process that the kernel knows: its current generation and what that has mapped."""

    generation: ProcessGeneration
    mappings: MappingTable


class _LoadedTable(NamedTuple):
    number: int
    used_s: float


class _Space(NamedTuple):
    """An address space in the kernel, the processes that have it, and its executables."""

    number: int
    pids: set[int]
    executables: list[int]


class Unwinding:
    """Not to be used from several threads at once."""

    def __init__(
        self,
        sampler: Sampler,
        address_spaces: AddressSpaces,
        symbolizer: Symbolizer,
        cache: UnwindCache,
    ) -> None:
        self._sampler = sampler
        self._tables = sampler.tables
        self._address_spaces = address_spaces
        self._symbolizer = symbolizer
        self._cache = cache
        self._known: dict[int, _Followed] = {}
        self._spaces: dict[MappingTable, _Space] = {}
        self._next_space = 1
        self._numbers: dict[MappedFile, int] = {}
        self._executables: dict[int, Executable] = {}
        self._free = deque(range(1, EXECUTABLES_CAPACITY))
        self._keys: dict[int, str] = {}
        self._recent: dict[MappedFile, str] = {}  # of files that have no number now: their keys
        self._loaded: dict[str, _LoadedTable] = {}
        self._young: list[UnwindRequest] = []
        self._waiting: set[str] = set()
        self._tries: dict[str, int] = {}  # how often in a row a table's child was killed
        self._paused: set[str] = set()  # those of these tables that are not to be built now
        self._unreachable: set[int] = set()
        self._next_table = 1
        self._builder = TableBuilder()
        self._next_sweep_s = self._next_try_s = 0.0
        self._evicted = 0
        self._interrupted = 0
        self._unnumbered = 0

    def fileno(self) -> int:
        return self._tables.fileno()

    def close(self) -> None:
        self._builder.close()

    def status(self) -> dict[str, int]:
        """Return what `everflame status` shows of it."""
        return {
            "processes": len(self._known),
            "tables": len(self._loaded),
            "tables_waiting": len(self._waiting),
            "tables_evicted": self._evicted,
            "builds_interrupted": self._interrupted,
            "mappings_without_number": self._unnumbered,
            "kernel_bytes": self._tables.memory_bytes,
        }

    def catch_up(self) -> None:
        """Answer the walks' requests. The records of processes must have been polled before."""
        now_ns = time.monotonic_ns()
        boot_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        built = self._builder.finished()
        if built:
            self._offer(built)
        requests = self._tables.requests()
        # A process that was too young may sleep by now, and would not ask again for long.
        waiting = dict.fromkeys(
            (*self._young, *(request for request in requests if not request.executable))
        )
        self._young.clear()
        for request in waiting:
            if boot_ns - request.generation.start_ns >= _YOUNG_NS:
                self._follow(request.generation, now_ns)
            else:
                self._young.append(request)
        for request in requests:
            if request.executable:
                self._answer(request)

    def note(self, groups: Mapping[MappingTable, Sequence[RawSample]]) -> None:
        """Follow the sampled processes: those that have mapped more get another address space."""
        for mappings, samples in groups.items():
            for sample in samples:
                known = self._known.get(sample.pid)
                if known is None or known.mappings is mappings:
                    continue
                if known.generation == sample.generation:
                    self._set(sample.generation, mappings)
        now_s = time.monotonic()
        if now_s >= self._next_sweep_s:
            self._next_sweep_s = now_s + _SWEEP_S
            self._sweep()
            self._note_use(groups, now_s)
            for number in self._unreachable & self._executables.keys():
                self._tables.set_state(number, TableState.UNKNOWN)
            self._unreachable.clear()
        if (self._waiting or self._tries) and now_s >= self._next_try_s:
            self._next_try_s = now_s + _WAIT_S
            self._tries = {key: n for key, n in self._tries.items() if self._executables_of(key)}
            given_up = {key for key, tries in self._tries.items() if tries >= _MAX_TRIES}
            for key in self._waiting | (self._paused - given_up):
                self._set_state(key, TableState.UNKNOWN)
            self._waiting.clear()
            self._paused &= given_up

    # Processes and their address spaces.

    def _follow(self, generation: ProcessGeneration, now_ns: int) -> None:
        pid, start_ns, _ = generation
        if not os.path.exists(f"/proc/{pid}"):  # noqa: PTH110 - a thousand times a second
            return
        mappings = self._address_spaces.mappings(pid, now_ns, start_ns)
        if mappings.mappings:
            self._set(generation, mappings)

    def _set(self, generation: ProcessGeneration, mappings: MappingTable) -> None:
        pid = generation.pid
        if len(mappings.mappings) > _MAX_MAPPINGS:
            return
        try:
            if pid not in self._known and len(self._known) >= PROCESSES_CAPACITY:
                raise NoRoomError("cannot take in a process: there are too many")
            space = self._spaces.get(mappings) or self._add_space(mappings)
        except NoRoomError:
            self._forget_oldest()
            return  # its next sample asks again
        self._tables.set_process(generation, space.number)
        space.pids.add(pid)
        before = self._known.pop(pid, None)  # to the end: the oldest come first
        self._known[pid] = _Followed(generation, mappings)
        if before and before.mappings is not mappings:
            self._leave(pid, before.mappings)

    def _add_space(self, mappings: MappingTable) -> "_Space":
        executables = [self._number(mappings, place) for place in range(len(mappings.mappings))]
        rows = [
            MappingRow(each.start, each.end, each.file_offset, number)
            for each, number in zip(mappings.mappings, executables, strict=True)
        ]
        space = _Space(self._next_space, set(), executables)
        try:
            self._tables.add_space(space.number, rows)
        except NoRoomError:
            self._release(executables)
            raise
        self._next_space += 1
        self._spaces[mappings] = space
        return space

    def _number(self, mappings: MappingTable, place: int) -> int:
        """Return the number that a mapping's file has in the kernel; 0 for memory without one.

        When there is no number left, it is left by frame pointers alone, and counted.
        """
        mapping = mappings.mappings[place]
        if is_anonymous(mapping.path):
            return 0
        is_known = mapping.build_id or mapping.path.startswith(b"[")  # or the kernel's own
        space = 0 if is_known else self._next_space
        file = MappedFile(mapping.device, mapping.inode, mapping.build_id, mapping.path, space)
        number = self._numbers.get(file)
        if number is None:
            if not self._free:
                self._unnumbered += 1
                return 0
            number = self._numbers[file] = self._free.popleft()
            self._executables[number] = Executable(file, mappings, place)
            key = self._recent.pop(file, None)
            if key is not None:
                self._keys[number] = key
            if key in self._loaded:
                self._tables.set_table(number, self._loaded[key].number)
            else:
                self._tables.set_state(number, TableState.UNKNOWN)
        executable = self._executables[number]
        executable.uses += 1
        executable.mappings, executable.place = mappings, place
        return number

    def _release(self, executables: Iterable[int]) -> None:
        """Release the numbers that a space has used; those that nobody uses are free again."""
        for number in filter(None, executables):
            executable = self._executables[number]
            executable.uses -= 1
            if not executable.uses:
                del self._numbers[executable.file], self._executables[number]
                key = self._keys.pop(number, None)
                if key is not None and not executable.file.space:
                    self._recent[executable.file] = key
                    if len(self._recent) > _MAX_RECENT:
                        del self._recent[next(iter(self._recent))]
                self._tables.set_state(number, TableState.UNKNOWN)
                self._free.append(number)  # the longest unused one is used first

    def _leave(self, pid: int, mappings: MappingTable) -> None:
        space = self._spaces[mappings]
        space.pids.discard(pid)
        if not space.pids:
            del self._spaces[mappings]
            self._tables.remove_space(space.number)
            self._release(space.executables)

    def _sweep(self) -> None:
        """Forget the processes that are gone."""
        for pid in [p for p in self._known if not os.path.exists(f"/proc/{p}")]:  # noqa: PTH110
            self._forget(pid)

    def _forget_oldest(self) -> None:
        """Make room for others; those that still run are sampled again, and ask again."""
        for pid in list(self._known)[: 1 + len(self._known) // 8]:
            self._forget(pid)

    def _forget(self, pid: int) -> None:
        self._tables.remove_process(pid)
        self._leave(pid, self._known.pop(pid).mappings)

    # Tables.

    def _answer(self, request: UnwindRequest) -> None:
        executable = self._executables.get(request.executable)
        if executable is None:
            return
        key = self._keys.get(request.executable)
        if key is None:
            with opened(self._symbolizer, request.generation.pid, executable) as source:
                if source is None:  # the process may be gone: another one will ask again
                    self._tables.set_state(request.executable, TableState.NONE)
                    self._unreachable.add(request.executable)
                    return
                with contextlib.suppress(UnreadableElf):
                    key = key_of(source)
            self._keys[request.executable] = key = key or ""
        if not key:
            self._tables.set_state(request.executable, TableState.NONE)
        elif key in self._loaded:
            self._tables.set_table(request.executable, self._loaded[key].number)
        elif key in self._paused:  # the request may be older than the pause
            self._tables.set_state(request.executable, TableState.NONE)
        elif not self._load(key):
            self._builder.ask(
                BuildRequest(key, request.generation.pid, executable, self._symbolizer, self._cache)
            )

    def _load(self, key: str) -> bool:
        """Load a table from the cache; False where it has to be built."""
        table = self._cache.load(key)
        if table is None:
            return False
        if len(table.rows):
            self._take_in(key, table)
        else:
            self._set_state(key, TableState.NONE)
        return True

    def _take_in(self, key: str, table: UnwindTable) -> None:
        """Load a table into the kernel, if there is room or can be."""
        number = self._next_table
        self._next_table += 1
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
                for executable in self._executables_of(key):
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
        self._evicted += 1
        return True

    def _note_use(self, groups: Mapping[MappingTable, Sequence[RawSample]], now_s: float) -> None:
        """Remember which tables these samples have used: one second of every few is enough."""
        used: set[str] = set()
        for mappings, samples in groups.items():
            space = self._spaces.get(mappings)
            if space is not None:
                places = mappings.find(np.concatenate([sample.user for sample in samples]))
                numbers = [space.executables[i] for i in np.unique(places[places >= 0]).tolist()]
                used.update(self._keys.get(number, "") for number in numbers)
        for key in used & self._loaded.keys():
            self._loaded[key] = self._loaded[key]._replace(used_s=now_s)

    def _set_state(self, key: str, state: TableState) -> None:
        for executable in self._executables_of(key):
            self._tables.set_state(executable, state)

    def _executables_of(self, key: str) -> list[int]:
        """Return all numbers that a file goes by."""
        return [number for number, its_key in self._keys.items() if its_key == key]

    def _offer(self, built: Iterable[tuple[str, BuildOutcome]]) -> None:
        for key, outcome in built:
            if outcome == BuildOutcome.INTERRUPTED:
                self._interrupted += 1
                self._tries[key] = self._tries.get(key, 0) + 1
                self._paused.add(key)
            elif outcome != BuildOutcome.UNREACHABLE:
                self._tries.pop(key, None)
            is_there = outcome == BuildOutcome.BUILT and self._load(key)
            if not is_there and outcome != BuildOutcome.UNREACHABLE:
                self._set_state(key, TableState.NONE)
