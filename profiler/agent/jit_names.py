"""Names of code in anonymous memory: what just-in-time compilers have written down about it.

Such code belongs to one process generation. When its addresses are sampled, a reader is asked for
what the process's perf map and jitdump say of them, and again every few seconds as long as there
are new ones; seldom where there is no such file. Until its window closes an address is provisional,
as those in files are (`names`). Answers are ranges, and what is asked in a later window replaces
them: compilers use memory again.
"""

import os
import re
import time
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from bpf.samples import ProcessGeneration
from profiler.agent.reader_budget import Owners
from profiler.agent.reader_child import Answer, Failure
from profiler.agent.readers import Readers
from profiler.processes.generations import TICK_NS, owner_of
from symbolizer import maps
from symbolizer.location import (
    AddressLocation,
    Kind,
    Miss,
    Module,
    NamedLocation,
)
from symbolizer.maps import MappingTable
from symbolizer.runtimes.written_code import MAX_ANSWERED, Outcome
from symbolizer.text import readable

JIT = Module("[jit]", "[jit]", Kind.JIT)
PROVISIONAL = "jit "
_PAUSE_S, _LONGEST_PAUSE_S = 3.0, 60.0
"""From an answer to the next question about its process; longer if it told nothing new."""
_LAST_TURN = 2
_MAX_PROCESSES = 1024
_MAX_RANGES, _MAX_RANGES_OF_PROCESS = 16_384, 4096
"""Some 400 bytes each. Beyond it those of the processes that were sampled longest ago go."""
_MAX_DUMPS = 4
_DUMP = re.compile(rb".*/jit-(\d+-)?\d+\.dump( \(deleted\))?", re.DOTALL)
_KINDS = ("perf_map", "jitdump")
_REFUSED = {Outcome.OTHER_OWNER, Outcome.NOT_REGULAR, Outcome.OUTDATED, Outcome.NOT_PERMITTED}
_FAILURES = {
    Failure.HUNG: Miss.NO_ANSWER,
    Failure.SET_ASIDE: Miss.NO_ANSWER,
    Failure.ERROR: Miss.DAMAGED,
}


class _Ranges:
    """Locations by ranges of addresses. A range replaces those that it overlaps."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ranges: list[tuple[int, NamedLocation]] = []

    def __len__(self) -> int:
        return len(self._starts)

    def find(self, address: int) -> NamedLocation | None:
        place = bisect_right(self._starts, address) - 1
        if place < 0 or address >= self._ranges[place][0]:
            return None
        return self._ranges[place][1]

    def put(self, start: int, end: int, location: NamedLocation) -> None:
        first = bisect_right(self._starts, start)
        last = bisect_right(self._starts, end - 1)
        starts, ranges = [start], [(end, location)]
        if first and self._ranges[first - 1][0] > start:
            first -= 1
            if self._starts[first] < start:
                starts.insert(0, self._starts[first])
                ranges.insert(0, (start, self._ranges[first][1]))
        if first < last and self._ranges[last - 1][0] > end:
            starts.append(end)
            ranges.append(self._ranges[last - 1])
        self._starts[first:last] = starts
        self._ranges[first:last] = ranges


class _Process:
    """One generation: its addresses of this window, and what is known of them."""

    __slots__ = (
        "answered_s",
        "asked",
        "begin_ns",
        "dumps",
        "generation",
        "is_asked",
        "is_gone",
        "is_late",
        "is_partial",
        "miss",
        "new",
        "pause_s",
        "ranges",
        "unknown",
    )

    def __init__(self, generation: ProcessGeneration, begin_ns: int) -> None:
        self.generation, self.begin_ns = generation, begin_ns
        self.dumps: tuple[maps.Mapping, ...] = ()
        self.new: set[int] = set()
        """Not asked for in this window."""
        self.asked: tuple[int, ...] = ()
        self.unknown: set[int] = set()
        """Asked for in this window, without an answer that holds them."""
        self.ranges = _Ranges()
        self.miss = Miss.NOT_READ
        self.is_asked = self.is_late = self.is_gone = self.is_partial = False
        self.answered_s, self.pause_s = -_LONGEST_PAUSE_S, _PAUSE_S

    def is_due(self, now_s: float, *, is_last: bool) -> bool:
        """Return whether to ask for its addresses; `is_last`: before its window ends."""
        if self.is_asked or self.is_gone or not (self.new or self.unknown):
            return False
        if self.is_partial or now_s >= self.answered_s + self.pause_s:
            return True
        if self.miss != Miss.NOT_IN_MAP or not self.new:
            return False
        if is_last:
            return True
        is_new = any(self.ranges.find(address) is None for address in self.new)
        return is_new and now_s >= self.answered_s + _PAUSE_S

    def next_question(self) -> list[int]:
        """Return the addresses to ask for: those that are new, and some that had no answer."""
        asked = sorted(self.new)[:MAX_ANSWERED]
        self.new.difference_update(asked)
        asked += sorted(self.unknown)[: MAX_ANSWERED - len(asked)]
        self.asked = tuple(asked)
        return asked


class JitNames:
    """Knows what code in anonymous memory is called. Not thread-safe.

    `begin_ns` returns when a process began what it runs (CLOCK_BOOTTIME): an exec makes what it
    wrote before a matter of the past.
    """

    def __init__(
        self,
        readers: Readers,
        begin_ns: Callable[[ProcessGeneration], int],
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._readers = readers
        self._begin_ns = begin_ns
        self._monotonic_s = monotonic_s
        self._owners = Owners()
        self._processes: OrderedDict[ProcessGeneration, _Process] = OrderedDict()
        self._numbers: dict[ProcessGeneration, int] = {}
        self._numbered: list[_Process] = []
        self._dumps: WeakKeyDictionary[MappingTable, tuple[maps.Mapping, ...]] = WeakKeyDictionary()
        self._counts: dict[str, Counter[str]] = {kind: Counter() for kind in _KINDS}
        self._named = self._unnamed = 0
        self._next_s = 0.0

    def status(self) -> dict[str, dict[str, int]]:
        """Return what came of each kind of file, by Outcome, and how many locations have names.

        `failed` are questions that readers could not answer.
        """
        counts: dict[str, dict[str, int]] = {
            kind: {"asked": sum(self._counts[kind].values()), **self._counts[kind]}
            for kind in _KINDS
        }
        return {
            **counts,
            "jit_locations": {
                "processes": len(self._processes),
                "ranges": sum(len(process.ranges) for process in self._processes.values()),
                "named": self._named,
                "unnamed": self._unnamed,
            },
        }

    def place(self, generation: ProcessGeneration, mappings: MappingTable) -> tuple[str, set[int]]:
        """Return what stands for the module of its anonymous memory, and where to note addresses.

        The module is a number, which holds until the window ends.
        """
        number = self._numbers.get(generation)
        if number is None:
            number = self._numbers[generation] = len(self._numbered)
            self._numbered.append(self._process(generation))
        process = self._numbered[number]
        dumps = self._dumps_in(mappings)
        if dumps != process.dumps:
            process.dumps = dumps
            process.answered_s, process.pause_s = -_LONGEST_PAUSE_S, _PAUSE_S
        return f"{PROVISIONAL}{number}", process.new

    def ask(self, *, is_due: bool = False) -> None:
        """Ask for what is new, and not too often; `is_due`: now, as the window ends.

        Where there was no file lately it is not asked for sooner even then.
        """
        now_s = self._monotonic_s()
        if not is_due and now_s < self._next_s:
            return
        self._next_s = now_s + _PAUSE_S / 10
        for process in self._numbered:
            if process.is_due(now_s, is_last=is_due):
                self._ask(process)

    def is_complete(self) -> bool:
        """Return whether nothing is asked for, but where an answer was late before."""
        return not any(each.is_asked and not each.is_late for each in self._numbered)

    def find(self, place: AddressLocation) -> NamedLocation | None:
        """Return what a provisional location is; None if it has no name, or is no such one."""
        process = self._process_of(place.build_id)
        found = process.ranges.find(place.offset) if process else None
        if process is not None:
            self._named += found is not None
            self._unnamed += found is None
        return found

    def miss_of(self, build_id: str) -> Miss | None:
        """Return why locations of a provisional module have no name; None if it is no such one."""
        process = self._process_of(build_id)
        return process.miss if process else None

    def end_window(self) -> None:
        """Forget the addresses of the window, and what is too much."""
        for process in self._numbered:
            process.is_late = process.is_asked
            process.new, process.unknown = set(), set()
            if process.is_gone:
                self._processes.pop(process.generation, None)
        self._numbers, self._numbered = {}, []
        kept = sum(len(process.ranges) for process in self._processes.values())
        while len(self._processes) > _MAX_PROCESSES or kept > _MAX_RANGES:
            _, oldest = self._processes.popitem(last=False)
            kept -= len(oldest.ranges)

    def _process(self, generation: ProcessGeneration) -> _Process:
        process = self._processes.get(generation)
        if process is None:
            begin_ns = self._begin_ns(generation)
            process = self._processes[generation] = _Process(generation, begin_ns)
        self._processes.move_to_end(generation)
        return process

    def _process_of(self, build_id: str) -> _Process | None:
        if not build_id.startswith(PROVISIONAL):
            return None
        return self._numbered[int(build_id.removeprefix(PROVISIONAL))]

    def _dumps_in(self, mappings: MappingTable) -> tuple[maps.Mapping, ...]:
        dumps = self._dumps.get(mappings)
        if dumps is None:
            found = [each for each in mappings.mappings if _DUMP.fullmatch(each.path)]
            dumps = self._dumps[mappings] = tuple(found[:_MAX_DUMPS])
        return dumps

    def _ask(self, process: _Process) -> None:
        generation = process.generation
        if self._begin_ns(generation) != process.begin_ns:  # it has exec'd since
            process.is_gone = True
            return
        process.is_asked = True
        values = {
            "pid": generation.pid,
            "start_ticks": generation.start_ns // TICK_NS,
            "begin_ns": process.begin_ns,
            "addresses": process.next_question(),
            "dumps": [_as_request(dump) for dump in process.dumps],
        }
        self._readers.ask(
            "written_code",
            values,
            partial(self._take, process, process.new),
            turn=_LAST_TURN,
            group=f"code of {owner_of(generation.pid)}",
            owner=self._owners.of_process(generation.pid),
        )

    def _take(self, process: _Process, window: set[int], answer: Answer) -> None:
        process.is_asked = process.is_late = process.is_partial = False
        process.answered_s = self._monotonic_s()
        told = 0
        if answer.failure is not None:
            process.miss = _FAILURES.get(answer.failure, Miss.TOO_COSTLY)
            self._counts["perf_map"][f"failed_{answer.failure}"] += 1
        elif answer.result is None:
            process.is_gone = True
            process.miss = Miss.EXITED if process.miss == Miss.NOT_READ else process.miss
        else:
            try:
                told = self._take_in(process, answer.result)
            except (ArithmeticError, KeyError, TypeError, ValueError):
                process.miss = Miss.DAMAGED  # a reader that a file has taken over
        if process.new is window:  # else its window has ended
            unknown = [each for each in process.asked if process.ranges.find(each) is None]
            process.unknown.difference_update(process.asked)
            process.unknown.update(unknown)
        process.pause_s = _PAUSE_S if told else min(2 * process.pause_s, _LONGEST_PAUSE_S)

    def _take_in(self, process: _Process, result: Mapping[str, Any]) -> int:
        """Keep what an answer says; return how many of the addresses have got a name."""
        outcomes = {kind: Outcome(result[kind]) for kind in _KINDS}
        for kind, outcome in outcomes.items():
            if kind == "perf_map" or process.dumps:
                self._counts[kind][str(outcome)] += 1
        before = {each for each in process.asked if process.ranges.find(each) is not None}
        if len(process.ranges) > _MAX_RANGES_OF_PROCESS:
            process.ranges = _Ranges()
        for start, end, *named in result["ranges"][:MAX_ANSWERED]:
            if int(start) < int(end):
                process.ranges.put(int(start), int(end), _location(named))
        process.miss = _miss_of(outcomes.values())
        process.is_partial = bool(result["is_partial"])
        return sum(
            each not in before and process.ranges.find(each) is not None for each in process.asked
        )


def _miss_of(outcomes: Iterable[Outcome]) -> Miss:
    """Return why an address has no name where these came of the files of its process."""
    some = set(outcomes)
    if some & {Outcome.READ, Outcome.TOO_LARGE, Outcome.DAMAGED}:
        return Miss.NOT_IN_MAP
    return Miss.MAP_REFUSED if some & _REFUSED else Miss.ANONYMOUS


def _location(named: Sequence[Any]) -> NamedLocation:
    """Return a location of an answer; a file may have taken over the reader."""
    function, module, kind, file, first_line, line = named
    texts = [readable(str(each).encode()) for each in (function, module, file)]
    lines = [max(0, min(int(each), 2**31 - 1)) for each in (first_line, line)]
    return NamedLocation(texts[0], texts[1], Kind(kind), texts[2], lines[0], lines[1])


def _as_request(mapping: maps.Mapping) -> dict[str, Any]:
    return {
        "start": mapping.start,
        "end": mapping.end,
        "offset": mapping.file_offset,
        "path": os.fsdecode(mapping.path),
        "device": list(mapping.device),
        "inode": mapping.inode,
    }
