"""Keeps the kernel's unwind tables fit for what is on CPU, so that stacks are whole.

The walk in the kernel requests what it misses: first a process, that is what it has mapped where;
then the table of a file that it came across. Only what was requested is loaded.

`AddressSpaces` says at each drain what a sampled process has mapped: a process that mapped more has
another MappingTable, and so gets another address space in the kernel. The kernel itself tells
process generations apart: a process that started another program, and a pid that is used again.
`MappedFiles` knows the files behind the mappings, and readers build their tables: what is not known
yet is loaded as soon as it is.
"""

import os
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakSet

import numpy as np

from bpf.interpreters import NO_RUNTIME, Runtime
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
from profiler.agent.mapped_files import MappedFile, MappedFiles, State
from profiler.agent.readers import Readers
from profiler.agent.runtimes import Runtimes
from profiler.agent.table_loading import TableLoader
from profiler.agent.thread_names import Placed
from profiler.processes.address_spaces import AddressSpaces
from symbolizer.location import Miss
from symbolizer.maps import MappingTable
from symbolizer.unwind.table import PagedRows, UnwindCache

_YOUNG_NS = 50_000_000
"""Younger processes are likely to be gone before it pays; those that stay are followed then."""
_SWEEP_S = 5.0
_MAX_MAPPINGS = MAPPINGS_CAPACITY // 8
"""Of one process. One with more, which no ordinary one has, would take the room of all others again
and again. It is left by frame pointers alone, and its stacks say `no_process_yet`."""


class _Followed(NamedTuple):
    """A process that the kernel knows: its current generation and what that has mapped."""

    generation: ProcessGeneration
    mappings: MappingTable


class _Space(NamedTuple):
    """An address space in the kernel, the processes that have it, and its executables."""

    number: int
    pids: set[int]
    executables: list[int]


@dataclass(slots=True)
class _Executable:
    """A file under one number in the kernel, in how many spaces it is, and by which table.

    `is_requested`: a walk has come across it, so its table is loaded when the file is identified.
    """

    file: MappedFile
    uses: int = 0
    key: str = ""
    is_requested: bool = False


class Unwinding:
    """Not to be used from several threads at once.

    Attributes:
        runtimes: the interpreters that the kernel knows.
    """

    def __init__(
        self,
        sampler: Sampler,
        address_spaces: AddressSpaces,
        files: MappedFiles,
        readers: Readers,
        cache: UnwindCache,
    ) -> None:
        self._tables = sampler.tables
        self._address_spaces = address_spaces
        self._files = files
        self._readers = readers
        self._loader = TableLoader(sampler, readers, files, cache)
        self.runtimes = Runtimes(sampler, self._interpreters_in_use)
        self._known: dict[int, _Followed] = {}
        self._spaces: dict[MappingTable, _Space] = {}
        self._runtime: dict[MappingTable, Runtime] = {}
        """Of those in `_spaces`."""
        self._next_space = 1
        self._numbers: dict[MappedFile, int] = {}
        self._executables: dict[int, _Executable] = {}
        self._free = deque(range(1, EXECUTABLES_CAPACITY))
        self._prepared: set[MappedFile] = set()
        self._with_library: WeakSet[MappingTable] = WeakSet()
        """Those whose program was noted."""
        self._young: list[UnwindRequest] = []
        self._next_sweep_s = 0.0
        self._unnumbered = 0

    def fileno(self) -> int:
        return self._tables.fileno()

    def status(self) -> dict[str, int]:
        """Return what `everflame status` shows of it."""
        return {
            "processes": len(self._known),
            "tables": self._loader.loaded,
            "tables_waiting": self._loader.waiting,
            "tables_evicted": self._loader.evicted,
            "builds_interrupted": self._loader.interrupted + self._files.interrupted,
            "mappings_without_number": self._unnumbered + self._files.unnumbered,
            "kernel_bytes": self._tables.memory_bytes,
        }

    def catch_up(self) -> None:
        """Answer the walks' requests. The records of processes must have been polled before."""
        now_ns = time.monotonic_ns()
        boot_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        self._readers.poll()
        for file in self._files.changed():
            self._bring_up_to_date(file)
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
            if request.executable in self._executables:
                self._request(request.executable)
        for key, image in self._loader.take_images():
            self.runtimes.take(key, image)
            self._renew(key)

    def note(self, groups: Mapping[MappingTable, Sequence[RawSample]]) -> None:
        """Follow the sampled processes: those that have mapped more get another address space.

        Samples may be of a time when less was mapped, so they only tell whom to look at.
        """
        now_ns = time.monotonic_ns()
        for mappings, samples in groups.items():
            for pid in {sample.pid for sample in samples}:
                self._files.note(mappings, pid)
            for sample in samples:
                known = self._known.get(sample.pid)
                if known is None or known.mappings is mappings:
                    continue
                if known.generation == sample.generation:
                    self._follow(sample.generation, now_ns)
        self._files.ask_again()
        now_s = time.monotonic()
        if now_s >= self._next_sweep_s:
            self._next_sweep_s = now_s + _SWEEP_S
            self._sweep()
            self._note_use(groups)
        self._loader.try_again()

    def table_of(self, mappings: MappingTable, place: int, pid: int) -> PagedRows | Miss:
        """Return the unwind table of a mapping's file, by file offsets; or why there is none.

        Works for processes that are gone as well. NOT_READ: it has been asked for, and may be there
        at a later drain. A table without rows says that the file has no rules.
        """
        file = self._files.file(mappings, place, pid)
        if file is None:
            return Miss.ANONYMOUS
        self._files.want(file)
        number = self._numbers.get(file)
        if number is not None:
            self._request(number)
        table = self._read(file)
        if not isinstance(table, Miss) and table.image is not None and not file.is_program:
            self._note_library(mappings, file, pid)
        return table

    def prepare(self, pids: Iterable[int]) -> None:
        """Have the tables of processes that run built, and load them when these are followed."""
        self._prepared = self._files.ask_for_all(pids)
        for file in self._prepared:
            self._loader.prepare(file)

    def learn_interpreters(self, pids: Iterable[int]) -> None:
        """Let the kernel know the interpreters in these processes before they are sampled."""
        own = self._files.ask_for_all([os.getpid()])
        for pid in pids:
            files = self._files.ask_for_all([pid])
            # A child that waits to exec has what we have, and what its program is going to have.
            for some in (files & own, files - own):
                self._learn(file for file in some if file.state == State.IDENTIFIED)

    def _learn(self, files: Iterable[MappedFile]) -> None:
        """Take note of the interpreters among the files of a process."""
        tables = {file: self._read(file) for file in files}
        programs = [file for file in tables if file.is_program]
        for file, table in tables.items():
            if not isinstance(table, Miss) and table.image is not None:
                self._add_programs(file.table_key, file, programs)

    def _add_programs(
        self, key: str, interpreter: MappedFile, programs: Sequence[MappedFile]
    ) -> None:
        """Let the interpreter of these programs be known before their processes are."""
        for program in [interpreter] if interpreter.is_program else programs:
            self.runtimes.add_program(key, interpreter, program)

    def is_loop_certain(self, mappings: MappingTable) -> bool:
        """Return whether all frames in an interpreter's loop are known to evaluate something."""
        placed = self.interpreter_in(mappings)
        return placed is not None and not placed.interpreter.is_split

    def interpreter_in(self, mappings: MappingTable) -> Placed | None:
        """Return the interpreter of the processes that have mapped this, and where it is."""
        runtime = self._runtime.get(mappings)
        interpreter = self.runtimes.interpreters.get(runtime.interpreter) if runtime else None
        return Placed(interpreter, runtime.bias) if runtime and interpreter else None

    def is_prepared(self) -> bool:
        """Return whether all that `prepare` asked for has been answered."""
        pending = any(file.state == State.PENDING for file in self._prepared)
        return not pending and self._loader.is_idle

    def follows(self, pids: Iterable[int]) -> bool:
        """Return whether the kernel knows all of these processes that still run."""
        unknown = [pid for pid in pids if pid not in self._known]
        return not any(os.path.exists(f"/proc/{pid}") for pid in unknown)  # noqa: PTH110

    def _note_library(self, mappings: MappingTable, interpreter: MappedFile, pid: int) -> None:
        """Take note of a program with its interpreter in a library: it may never run for longer."""
        if mappings in self._with_library:
            return
        files = [self._files.file(mappings, n, pid) for n in range(len(mappings.mappings))]
        programs = [file for file in files if file is not None and file.dynamic.debug]
        if programs:
            self._with_library.add(mappings)
            self._add_programs(interpreter.table_key, interpreter, programs)

    # Processes and their address spaces.

    def _follow(self, generation: ProcessGeneration, now_ns: int) -> None:
        pid, start_ns, _ = generation
        if not os.path.exists(f"/proc/{pid}"):  # noqa: PTH110 - a thousand times a second
            return
        mappings = self._address_spaces.mappings(pid, now_ns, start_ns)
        known = self._known.get(pid)
        if mappings.mappings and known != _Followed(generation, mappings):
            self._set(generation, mappings)

    def _set(self, generation: ProcessGeneration, mappings: MappingTable) -> None:
        pid = generation.pid
        if len(mappings.mappings) > _MAX_MAPPINGS:
            return
        try:
            if pid not in self._known and len(self._known) >= PROCESSES_CAPACITY:
                raise NoRoomError("cannot take in a process: there are too many")
            space = self._spaces.get(mappings) or self._add_space(mappings, pid)
        except NoRoomError:
            self._forget_oldest()
            return  # its next sample asks again
        self._tables.set_process(generation, space.number, self._runtime_of(mappings, space))
        space.pids.add(pid)
        before = self._known.pop(pid, None)  # to the end: the oldest come first
        self._known[pid] = _Followed(generation, mappings)
        if before and before.mappings is not mappings:
            self._leave(pid, before.mappings)

    def _runtime_of(self, mappings: MappingTable, space: "_Space") -> Runtime:
        """Return the interpreter that is mapped in an address space, as far as it is known."""
        for mapping, number in zip(mappings.mappings, space.executables, strict=True):
            executable = self._executables.get(number)
            runtime = self.runtimes.runtime(executable.key, mapping) if executable else None
            if executable and runtime is not None:
                self._runtime[mappings] = runtime
                files = [self._executables[each].file for each in {*space.executables} - {0}]
                programs = [each for each in files if each.dynamic.debug]
                self._add_programs(executable.key, executable.file, programs)
                return runtime
        return NO_RUNTIME

    def _interpreters_in_use(self) -> set[int]:
        return {runtime.interpreter for runtime in self._runtime.values()}

    def _renew(self, key: str) -> None:
        """Let the kernel know which processes have an interpreter that has become known."""
        numbers = {n for n, executable in self._executables.items() if executable.key == key}
        for mappings, space in self._spaces.items():
            if numbers.intersection(space.executables):
                runtime = self._runtime_of(mappings, space)
                for pid in space.pids:
                    self._tables.set_process(self._known[pid].generation, space.number, runtime)

    def _add_space(self, mappings: MappingTable, pid: int) -> "_Space":
        executables = [
            self._number(mappings, place, pid) for place in range(len(mappings.mappings))
        ]
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

    def _number(self, mappings: MappingTable, place: int, pid: int) -> int:
        """Return the number that a mapping's file has in the kernel; 0 for memory without one.

        When there is no number left, it is left by frame pointers alone, and counted.
        """
        file = self._files.file(mappings, place, pid)
        if file is None:
            return 0
        number = self._numbers.get(file)
        if number is None:
            if not self._free:
                self._unnumbered += 1
                return 0
            number = self._numbers[file] = self._free.popleft()
            self._executables[number] = _Executable(file, is_requested=file in self._prepared)
            self._bring_up_to_date(file)
        self._executables[number].uses += 1
        return number

    def _release(self, executables: Iterable[int]) -> None:
        """Release the numbers that a space has used; those that nobody uses are free again."""
        for number in filter(None, executables):
            executable = self._executables[number]
            executable.uses -= 1
            if not executable.uses:
                del self._numbers[executable.file], self._executables[number]
                self._loader.remove(number, executable.key)
                self._free.append(number)  # the longest unused one is used first

    def _leave(self, pid: int, mappings: MappingTable) -> None:
        space = self._spaces[mappings]
        space.pids.discard(pid)
        if not space.pids:
            del self._spaces[mappings]
            self._runtime.pop(mappings, None)
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

    def _read(self, file: MappedFile) -> PagedRows | Miss:
        """Return the table of a file, and take note of the interpreter that it may be of."""
        table = self._loader.read(file)
        if not isinstance(table, Miss) and table.image is not None:
            self.runtimes.take(file.table_key, table.image)
            if file.is_program:
                self.runtimes.add_program(file.table_key, file)
        return table

    def _bring_up_to_date(self, file: MappedFile) -> None:
        """Let the kernel know what is known of a file by now."""
        if file in self._prepared:
            self._loader.prepare(file)
        number = self._numbers.get(file)
        if number is None:
            return
        executable = self._executables[number]
        if executable.key and executable.key != file.table_key:
            self._loader.remove(number, executable.key)
            executable.key = ""
        if file.state == State.IDENTIFIED and not executable.key:
            executable.key = file.table_key
            self._loader.add(number, file)
            if self.runtimes.knows(executable.key):  # by another file with the same content
                self._renew(executable.key)
        if executable.is_requested:
            self._request(number)

    def _request(self, number: int) -> None:
        """Load the table of an executable, or let it wait until its file is known."""
        executable = self._executables[number]
        executable.is_requested = True
        self._files.want(executable.file)
        if executable.file.state == State.IDENTIFIED:
            self._loader.load(executable.file)
        elif executable.file.state == State.FAILED:
            self._tables.set_state(number, TableState.NONE)

    def _note_use(self, groups: Mapping[MappingTable, Sequence[RawSample]]) -> None:
        """Remember which files these samples have used: one second of every few is enough."""
        used: set[int] = set()
        for mappings, samples in groups.items():
            space = self._spaces.get(mappings)
            if space is not None:
                places = mappings.find(np.concatenate([sample.user for sample in samples]))
                used.update(space.executables[i] for i in set(places[places >= 0].tolist()))
        executables = [self._executables[number] for number in used - {0}]
        self._loader.note_use(executable.key for executable in executables)
        self._files.note_use(executable.file for executable in executables)
