"""Copied stacks: ticks that the kernel's walk could not follow yet, unwound when that is possible.

The first ticks of a process fall before its mappings and tables are in the kernel. Their registers
and stacks were copied; they wait here for the tables that their walks come to, also when the
process is gone by then. All that are ready are walked at once. A stack whose tables do not come
until its window ends is counted as it was walked at the tick, with the reason of that time.
"""

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from bpf.frames import with_native
from bpf.samples import MAX_NATIVE_WORDS, CopiedStack, Drain, RawSample, StopReason
from storage.profile import GOOD_STOPS
from symbolizer.location import Miss
from symbolizer.maps import MappingTable
from symbolizer.unwind.lookup import ANONYMOUS, RuleFinder, RulePages, missing
from symbolizer.unwind.table import PagedRows
from symbolizer.unwind.walk import PENDING, StackCopy, Stop, WalkedStack, walk

_MAX_HELD_BYTES = 16 << 20
"""Of stacks that wait. Beyond it the oldest are counted as they were walked at the tick."""
_MAX_TABLES = 4096
"""Tables that have a number. Beyond it all of them get new ones."""
_PENDING = missing(PENDING)
MappingsOf = Callable[[int, int, int], MappingTable]
"""What a process had mapped: pid, when (CLOCK_MONOTONIC), its start."""


class Tables(Protocol):
    def table_of(self, mappings: MappingTable, place: int, pid: int) -> PagedRows | Miss:
        """Return the table of a mapping's file, by file offsets; NOT_READ if it may come later."""


ByMappings = dict[MappingTable, list[RawSample]]
"""Samples that wait no more, by what their processes had mapped at the tick."""


@dataclass(slots=True)
class _Held:
    """A copy, what its process had mapped, and which of these mappings it waits for."""

    copy: CopiedStack
    mappings: MappingTable
    place: int = -1


class CopiedStacks:
    """Not to be used from several threads at once.

    `hold` what was drained; `advance` when processes or tables have come; `take` what is done.
    """

    def __init__(self, tables: Tables, mappings_of: MappingsOf) -> None:
        self._tables = tables
        self._mappings_of = mappings_of
        self._new: list[CopiedStack] = []
        self._held: list[_Held] = []
        self._done: ByMappings = defaultdict(list)
        self._counts: Counter[str] = Counter()
        self._forget_tables()

    def _forget_tables(self) -> None:
        self._numbers: dict[str, int] = {}
        self._at_hand: dict[int, PagedRows] = {}
        self._pages = RulePages(self._at_hand.__getitem__)

    def status(self) -> dict[str, int]:
        """Return how many stacks were copied and what became of them.

        `uncopied` were beyond the budget.
        """
        return {
            "copied": self._counts["copied"],
            "uncopied": self._counts["uncopied"],
            "unwound": self._counts["unwound"],
            "given_up": self._counts["given_up"],
            "waiting": len(self._new) + len(self._held),
        }

    @property
    def is_waiting(self) -> bool:
        """Return whether there are stacks whose tables have not come."""
        return bool(self._held)

    @property
    def waiting(self) -> list[RawSample]:
        """Return the samples of these stacks, as they were walked at the tick."""
        return [held.copy.walked for held in self._held]

    def hold(self, drain: Drain) -> None:
        """Take a drain's copies; the records of processes may not have been read yet."""
        self._new += drain.copies
        self._counts["copied"] += len(drain.copies)
        self._counts["uncopied"] += drain.uncopied

    def advance(self) -> None:
        """Walk the stacks whose tables may be there by now. The records must have been read."""
        new, self._new = self._new, []
        ready = []
        for copy in new:
            sample = copy.walked
            mappings = self._mappings_of(sample.pid, sample.last_ns, sample.start_ns)
            held = _Held(copy, mappings)
            if mappings.mappings:
                ready.append(held)
            else:
                self._give_up(held)
        is_pending: dict[tuple[MappingTable, int], bool] = {}  # thousands wait for a few tables
        waiting: list[_Held] = []
        for held in self._held:
            asked = (held.mappings, held.place)
            if asked not in is_pending:
                is_pending[asked] = self._table_of(*asked, held.copy.walked.pid) == _PENDING
            (waiting if is_pending[asked] else ready).append(held)
        self._held = waiting
        if ready:
            self._walk(ready)
        self._bound()

    def take(self) -> ByMappings:
        """Return the samples that wait no more, each once."""
        done, self._done = self._done, defaultdict(list)
        return done

    def take_all(self) -> ByMappings:
        """Return all samples; those whose tables have not come, as they were walked at the tick."""
        self.advance()
        held, self._held = self._held, []
        for each in held:
            self._give_up(each)
        return self.take()

    def _walk(self, ready: list[_Held]) -> None:
        pids = {held.mappings: held.copy.walked.pid for held in ready}
        finder = RuleFinder(
            [held.mappings for held in ready],
            lambda mappings, place: self._table_of(mappings, place, pids[mappings]),
            self._pages,
        )
        walked = walk([_as_stack(held.copy) for held in ready], finder, MAX_NATIVE_WORDS)
        for number, (held, result) in enumerate(zip(ready, walked, strict=True)):
            if result.stop == PENDING:
                held.place = finder.pending[number]
                self._held.append(held)
            else:
                self._counts["unwound"] += 1
                self._done[held.mappings].append(_better(held.copy.walked, result))
        self._at_hand.clear()
        if len(self._numbers) > _MAX_TABLES:
            self._forget_tables()

    def _table_of(self, mappings: MappingTable, place: int, pid: int) -> int:
        table = self._tables.table_of(mappings, place, pid)
        if isinstance(table, Miss):
            if table == Miss.ANONYMOUS:
                return ANONYMOUS
            return _PENDING if table == Miss.NOT_READ else missing(Stop.NO_TABLE)
        if not table.row_count:
            return missing(Stop.NO_TABLE)
        number = self._numbers.setdefault(table.key, len(self._numbers))
        self._at_hand[number] = table
        return number

    def _give_up(self, held: _Held) -> None:
        self._counts["given_up"] += 1
        self._done[held.mappings].append(held.copy.walked)

    def _bound(self) -> None:
        held_bytes = 0
        for place in range(len(self._held) - 1, -1, -1):
            held_bytes += self._held[place].copy.memory.nbytes
            if held_bytes > _MAX_HELD_BYTES:
                for each in self._held[: place + 1]:
                    self._give_up(each)
                del self._held[: place + 1]
                return


def _as_stack(copy: CopiedStack) -> StackCopy:
    return StackCopy(
        registers=copy.registers,
        pc=copy.pc,
        is_return_address=copy.is_return_address,
        start=copy.start,
        memory=copy.memory,
        unreadable=copy.unreadable,
        is_cut=copy.is_cut,
    )


def _better(at_tick: RawSample, late: WalkedStack) -> RawSample:
    """Return the later result, unless it is not whole and shorter than that of the tick.

    A stack that goes on in other memory, as Go's and those of signal handlers may, was copied only
    in part.
    """
    stop = StopReason(late.stop).label
    words = with_native(at_tick.user, late.addresses, late.loops)
    if stop not in GOOD_STOPS and len(words) < len(at_tick.user):
        return at_tick
    return at_tick._replace(user=words, stop=stop)
