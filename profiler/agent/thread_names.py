"""Names of Python's threads, which the kernel is not told before 3.14.

There a thread has the name of its process. So when one is sampled that is not known yet, a reader
is asked how Python calls the threads of that process. Until its window closes what stands for the
name is provisional. A thread with a name of its own in the kernel keeps that, and the first thread
of a process keeps its program's: Python calls each of them MainThread.
"""

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import NamedTuple

from bpf.samples import ProcessGeneration, RawSample
from profiler.agent.allowance import Allowance
from profiler.agent.python_code import Interpreter
from profiler.agent.reader_budget import Owners
from profiler.agent.reader_child import Answer, Failure
from profiler.agent.readers import Readers
from profiler.processes.generations import TICK_NS, owner_of
from storage.profile import Labels
from symbolizer.maps import MappingTable
from symbolizer.runtimes.layouts import minor_of
from symbolizer.runtimes.object_layouts import LAST_WITHOUT_NAMES
from symbolizer.runtimes.thread_names import MAX_THREADS, Outcome
from symbolizer.text import readable

THREAD_NAMES = "thread_names"
"""What is asked for, and what its counts are called."""
_THREAD = "thread"
_PROVISIONAL = "\0"
"""No readable name has a NUL."""
_LAST_TURN = 2
_OF_PROCESS, _OF_ALL = (6, 0.1), (100, 2.0)
"""Questions at once and per second: a program may start ever new threads. Each costs a reader some
3 ms of CPU time (bench/bench_python.py --only threads)."""
_RENEWED_S = 600.0
"""After so long a sampled process is looked at again: threads may have got other names."""
_MAX_AWAITED, _MAX_AWAITED_OF_ALL = 64, 2048
"""Threads of a process, and of all, that have provisional names in a window, each with a label set
of its own. Others have the name of the process until their own is read."""
_MAX_PROCESSES, _MAX_NAMES = 1024, 16_384
"""Beyond it those go that were sampled longest ago."""
_RETRIED = {Outcome.UNREADABLE}
"""It changed while it was read."""


class Placed(NamedTuple):
    """An interpreter in a process, and what its addresses are higher than as linked."""

    interpreter: Interpreter
    bias: int


class _Process:
    """One generation: which of its threads have names, and which are to be asked for."""

    __slots__ = (
        "awaited",
        "generation",
        "is_asked",
        "is_gone",
        "is_late",
        "named",
        "nameless",
        "new",
        "placed",
        "renewed_s",
    )

    def __init__(self, generation: ProcessGeneration, placed: Placed, now_s: float) -> None:
        self.generation, self.placed = generation, placed
        self.named: dict[int, str] = {}
        self.nameless: set[int] = set()
        """Asked for, without a name."""
        self.new: set[int] = set()
        self.awaited: dict[int, str] = {}
        """Provisional names of this window."""
        self.is_asked = self.is_late = self.is_gone = False
        self.renewed_s = now_s

    def note(self, tid: int) -> None:
        is_known = tid in self.named or tid in self.nameless
        if not is_known and len(self.new) < MAX_THREADS:
            self.new.add(tid)

    def learn(self, asked: set[int], named: dict[int, str]) -> None:
        """Take the names of all threads that there are, in place of those from before."""
        if len(self.nameless) > MAX_THREADS:
            self.nameless.clear()
        self.named = named
        self.nameless = (self.nameless | asked) - named.keys()
        self.new -= named.keys() | self.nameless

    def renew(self, now_s: float) -> None:
        self.nameless.clear()
        self.new.update(self.named)
        self.renewed_s = now_s


class ThreadNames:
    """Not to be used from several threads at once."""

    def __init__(
        self,
        readers: Readers,
        interpreter_in: Callable[[MappingTable], Placed | None],
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """`interpreter_in` returns the interpreter of the processes that have mapped this."""
        self._readers = readers
        self._interpreter_in = interpreter_in
        self._monotonic_s = monotonic_s
        self._owners = Owners()
        self._processes: OrderedDict[ProcessGeneration, _Process] = OrderedDict()
        self._awaited: list[tuple[_Process, RawSample]] = []
        self._of_process, self._of_all = Allowance(*_OF_PROCESS), Allowance(*_OF_ALL)
        self._counts: Counter[str] = Counter()

    def status(self) -> dict[str, int]:
        """Return how many threads have names, and what came of the questions, by Outcome.

        `failed` are questions that readers could not answer.
        """
        processes = self._processes.values()
        return {
            "processes": len(processes),
            "threads": sum(len(process.named) for process in processes),
            "asked": sum(self._counts.values()),
            **self._counts,
        }

    def note(self, groups: Mapping[MappingTable, Iterable[RawSample]]) -> None:
        """Ask for the names of the sampled threads that are not known yet."""
        sampled: set[_Process] = set()
        for mappings, samples in groups.items():
            placed = self._interpreter_in(mappings)
            if placed is None or minor_of(placed.interpreter.version) > LAST_WITHOUT_NAMES:
                continue
            for sample in samples:
                if _has_no_name(sample):
                    process = self._process(sample.generation, placed)
                    process.note(sample.tid)
                    sampled.add(process)
        if not sampled:
            return
        now_s = self._monotonic_s()
        self._of_process.refill()
        self._of_all.refill()
        for process in sampled:
            if now_s >= process.renewed_s + _RENEWED_S:
                process.renew(now_s)
            if process.new and not process.is_asked and not process.is_gone:
                self._ask(process)

    def label(self, sample: RawSample) -> str | None:
        """Return a thread's name, which may be provisional; None if it is the kernel's."""
        if not self._processes or not _has_no_name(sample):
            return None
        process = self._processes.get(sample.generation)
        if process is None or sample.tid in process.nameless:
            return None
        named = process.named.get(sample.tid) or process.awaited.get(sample.tid)
        has_room = len(process.awaited) < _MAX_AWAITED and len(self._awaited) < _MAX_AWAITED_OF_ALL
        if named is None and has_room:
            named = process.awaited[sample.tid] = f"{_PROVISIONAL}{len(self._awaited)}"
            self._awaited.append((process, sample))
        return named

    def with_names(self, labels: Labels) -> Labels:
        """Return labels with a thread's name in place of a provisional one."""
        return tuple(
            (name, self._resolve(value))
            if name == _THREAD and value.startswith(_PROVISIONAL)
            else (name, value)
            for name, value in labels
        )

    def is_complete(self) -> bool:
        """Return whether nothing is asked for, but where an answer was late before."""
        return not any(each.is_asked and not each.is_late for each, _ in self._awaited)

    def end_window(self) -> None:
        """Forget what was provisional in the window, and what is too much."""
        for process, _ in self._awaited:
            process.awaited.clear()
            process.is_late = process.is_asked
        self._awaited.clear()
        kept = sum(len(process.named) for process in self._processes.values())
        while len(self._processes) > _MAX_PROCESSES or kept > _MAX_NAMES:
            _, oldest = self._processes.popitem(last=False)
            kept -= len(oldest.named)

    def _resolve(self, provisional: str) -> str:
        process, sample = self._awaited[int(provisional.removeprefix(_PROVISIONAL))]
        return process.named.get(sample.tid) or readable(sample.comm)

    def _process(self, generation: ProcessGeneration, placed: Placed) -> _Process:
        process = self._processes.get(generation)
        if process is None:
            process = _Process(generation, placed, self._monotonic_s())
            self._processes[generation] = process
        self._processes.move_to_end(generation)
        return process

    def _ask(self, process: _Process) -> None:
        generation, (interpreter, bias) = process.generation, process.placed
        if not (self._of_process.has(generation, 1) and self._of_all.has("", 1)):
            return
        self._of_process.spend(generation, 1)
        self._of_all.spend("", 1)
        process.is_asked = True
        asked, process.new = process.new, set()
        self._readers.ask(
            THREAD_NAMES,
            {
                "pid": generation.pid,
                "start_ticks": generation.start_ns // TICK_NS,
                "version": interpreter.version,
                "runtime": interpreter.runtime + bias,
            },
            partial(self._take, process, asked),
            turn=_LAST_TURN,
            group=f"threads of {owner_of(generation.pid)}",
            owner=self._owners.of_process(generation.pid),
        )

    def _take(self, process: _Process, asked: set[int], answer: Answer) -> None:
        process.is_asked = process.is_late = False
        if answer.failure is None and answer.result is None:
            process.is_gone = True
            self._counts["exited"] += 1
            return
        try:
            outcome, named = _read_answer(answer)
        except (ValueError, KeyError, TypeError):
            self._counts[f"failed_{answer.failure or Failure.ERROR}"] += 1
            process.new |= asked
            return
        self._counts[str(outcome)] += 1
        if outcome in _RETRIED:
            process.new |= asked
        else:
            process.learn(asked, named)


def _has_no_name(sample: RawSample) -> bool:
    """Return whether a thread has the name of its process, and is not that process's first one."""
    return sample.tid != sample.pid and sample.comm == sample.leader_comm


def _read_answer(answer: Answer) -> tuple[Outcome, dict[int, str]]:
    """Return what an answer says; the process may have taken over the reader.

    Raises:
        ValueError, KeyError, TypeError: it is none.
    """
    outcome, pairs = Outcome(answer.result["outcome"]), answer.result["names"][:MAX_THREADS]
    names = {int(tid): readable(str(name).encode()) for tid, name in pairs}
    return outcome, {tid: name for tid, name in names.items() if name}
