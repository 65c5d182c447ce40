"""Profile: counts of stacks over a window, and an accounting that proves nothing was lost.

A profile is a value made of tables. Each location, stack and label set is stored once; a row counts
how often a stack was seen with a label set. Stacks are root first. Names are kept next to the
locations and are part of no key, so a better name changes no count.

Law of conservation, an equality of integers for every profile of type `cpu`:

    ticks = stored + idle + filtered + sum(lost)

Profiles of other types (allocations, lock waits, page faults) count events instead of ticks of a
clock. An event happens only when something runs, so none is idle, and their law is

    events = stored + filtered + sum(lost)

in the same fields: `ticks` are the events and `idle` is 0. If the kernel or the program samples
events, say one of n, the events that were not sampled are not part of the law: a row's `samples`
are the events seen, and its `value` is what they stand for, as bytes or nanoseconds.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum, StrEnum
from typing import NamedTuple, TypedDict, TypeVar

import numpy as np
import numpy.typing as npt

from symbolizer.location import (
    Frame,
    Kind,
    Location,
    Module,
    NamedLocation,
    is_bounded,
    unnamed,
)

Integers = npt.NDArray[np.int64]
Indices = npt.NDArray[np.int32]

Labels = tuple[tuple[str, str], ...]
"""Label names and values, sorted by name; names are unique."""

Stack = tuple[Location, ...]
"""Root first."""

Key = TypeVar("Key", str, Labels)

_STACKS_AT_ONCE = 1024
"""Their locations are replaced together; all of a window would take megabytes."""


class ProfileError(ValueError):
    """Bytes that are not a profile, or are a damaged one; the message says what is wrong.

    ProfileError
    └── SchemaError
    """


class SchemaError(ProfileError):
    """A profile in a schema that this version does not know; readers skip it."""


class Loss(StrEnum):
    """Every way in which a tick or event can be lost. A closed list: a new way needs a new name."""

    MAP_FULL = "map_full"
    """A kernel map had no room left in this drain."""
    MAP_BUSY = "map_busy"
    """A kernel map's bucket was locked by the code that the tick interrupted."""
    OTHER_TRACER = "other_tracer"
    """Another BPF program was active on the CPU, as those of tracers are, or somebody else was
    reading BPF maps there: the kernel then skips the profiler's. No estimate: these are the timers
    that expired without a tick."""
    DRAINING = "draining"
    """As above, while the profiler itself was emptying its maps on that CPU."""
    FAULT = "fault"
    """The profiler itself failed while processing a drain; its log says why."""
    SPOOL_FULL = "spool_full"
    """The store was unavailable for so long that the oldest stacks were given up."""


def make_labels(labels: Mapping[str, str]) -> Labels:
    return tuple(sorted(labels.items()))


class Window(NamedTuple):
    """A half-open interval of UTC, in ns since 1970."""

    start_ns: int
    end_ns: int

    def union(self, other: "Window") -> "Window":
        return Window(min(self.start_ns, other.start_ns), max(self.end_ns, other.end_ns))


ALWAYS = Window(0, 2**63 - 1)
"""The window that contains every object."""


class Host(NamedTuple):
    name: str
    host_id: str
    """16 hex digits of a hash; restarts do not change it."""


GOOD_STOPS = frozenset({"root", "kernel_thread", "no_program"})
"""Reasons why a complete user stack ends: at its outermost frame, or because there is none: of a
kernel thread, and of a program that has ended or is just being loaded. A stack with any other
reason is incomplete."""


_RUNTIME = "runtime"


def runtime_counts(runtime: str, counts: Mapping[str, int]) -> dict[str, int]:
    """Return what was counted of a runtime's frames as it stands among `Accounting.misses`."""
    return {f"{_RUNTIME}/{runtime}/{what}": number for what, number in counts.items() if number}


@dataclass(frozen=True, slots=True)
class Accounting:
    """Where every tick or event of a profile went, and what profiling cost.

    Counts add up over windows and hosts; `hosts` is their union. Times are ns: `nonidle_ns` is how
    long the CPUs were busy by the kernel's own count, `profiled_ns` the window's length times the
    number of hosts.
    """

    hosts: tuple[Host, ...] = ()
    cpus: int = 0
    nonidle_ns: int = 0
    profiled_ns: int = 0
    ticks: int = 0
    idle: int = 0
    filtered: int = 0
    stored: int = 0
    lost: Mapping[str, int] = field(default_factory=dict)
    stops: Mapping[str, int] = field(default_factory=dict)
    """Stored samples by the reason their user stack ended."""
    uncounted: int = 0
    """In how many windows the kernel may have skipped ticks that it did not let one count."""
    misses: Mapping[str, int] = field(default_factory=dict)
    """Distinct locations without a name, by the reason; and what `runtimes` returns."""
    services: Mapping[Labels, int] = field(default_factory=dict)
    """For how many ns each service instance had at least one process, sampled or not."""
    agent_cpu_ns: int = 0
    agent_rss_bytes: int = 0

    @property
    def runtimes(self) -> dict[str, dict[str, int]]:
        """Return of each runtime what was counted of reading its frames.

        `attempts` are samples, `frames` those of all of them; other counts are samples whose frames
        are not all there, by the reason.
        """
        found: dict[str, dict[str, int]] = {}
        for key, number in self.misses.items():
            prefix, _, rest = key.partition("/")
            runtime, _, what = rest.partition("/")
            if prefix == _RUNTIME and what:
                found.setdefault(runtime, {})[what] = number
        return found

    @property
    def mismatch(self) -> int:
        """Ticks or events that are not accounted for: zero, by the law of conservation."""
        return self.ticks - self.stored - self.idle - self.filtered - sum(self.lost.values())

    def merge(self, other: "Accounting") -> "Accounting":
        return Accounting(
            hosts=tuple(sorted({*self.hosts, *other.hosts})),
            cpus=max(self.cpus, other.cpus),
            nonidle_ns=self.nonidle_ns + other.nonidle_ns,
            profiled_ns=self.profiled_ns + other.profiled_ns,
            ticks=self.ticks + other.ticks,
            idle=self.idle + other.idle,
            filtered=self.filtered + other.filtered,
            stored=self.stored + other.stored,
            lost=add_counts(self.lost, other.lost),
            stops=add_counts(self.stops, other.stops),
            uncounted=self.uncounted + other.uncounted,
            misses=add_counts(self.misses, other.misses),
            services=add_counts(self.services, other.services),
            agent_cpu_ns=self.agent_cpu_ns + other.agent_cpu_ns,
            agent_rss_bytes=max(self.agent_rss_bytes, other.agent_rss_bytes),
        )


def add_counts(one: Mapping[Key, int], other: Mapping[Key, int]) -> dict[Key, int]:
    counts = dict(one)
    for name, count in other.items():
        counts[name] = counts.get(name, 0) + count
    return counts


class Row(NamedTuple):
    """One row of a profile, for readers that do not need the speed of its columns."""

    labels: Labels
    stack: Stack
    samples: int
    value: int


@dataclass(frozen=True, slots=True, eq=False)
class Profile:
    """Rows of (label set, stack, samples, value), with the tables they point into.

    `type` and `unit` describe `value`: of `cpu`, nanoseconds, which are samples times the period,
    so that profiles of different rates merge. Stack number s is
    `stack_locations[stack_offsets[s]:stack_offsets[s + 1]]`, root first. A (label set, stack) pair
    occurs in one row at most. `names[i]` are the frames of `locations[i]`, innermost inlined call
    first, empty for a location nobody could name.
    """

    type: str
    unit: str
    period_ns: int
    window: Window
    accounting: Accounting
    modules: Mapping[str, Module]
    """By build id."""
    locations: tuple[Location, ...]
    names: tuple[tuple[Frame, ...], ...]
    label_sets: tuple[Labels, ...]
    stack_offsets: Integers
    stack_locations: Indices
    row_labels: Indices
    row_stacks: Indices
    row_samples: Integers
    row_values: Integers

    @property
    def total_samples(self) -> int:
        return int(self.row_samples.sum())

    @property
    def total_value(self) -> int:
        return int(self.row_values.sum())

    def stack(self, number: int) -> Stack:
        start, end = self.stack_offsets[number : number + 2]
        return tuple(self.locations[i] for i in self.stack_locations[start:end].tolist())

    def frames(self, number: int) -> tuple[Frame, ...]:
        """Return the frames shown for a location: at least one, innermost inlined call first.

        A named location is its own frame. All addresses of a module that have no name share one
        frame, so they are one box.
        """
        location = self.locations[number]
        if isinstance(location, NamedLocation):
            return (Frame(*location[:4], location.line),)
        if self.names[number]:
            return self.names[number]
        return (frame_of_module(self.modules, location.build_id),)

    def rows(self) -> Iterator[Row]:
        columns = (self.row_labels, self.row_stacks, self.row_samples, self.row_values)
        for labels, stack, samples, value in zip(*(c.tolist() for c in columns), strict=True):
            yield Row(self.label_sets[labels], self.stack(stack), samples, value)

    def counts(self) -> dict[tuple[Labels, Stack], tuple[int, int]]:
        """Return (samples, value) by (labels, stack); equal profiles have equal counts."""
        return {(row.labels, row.stack): (row.samples, row.value) for row in self.rows()}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Profile):
            return NotImplemented
        mine = (self.type, self.unit, self.window, self.accounting)
        theirs = (other.type, other.unit, other.window, other.accounting)
        return mine == theirs and self.counts() == other.counts()

    __hash__ = None  # type: ignore[assignment]  # equal by content, and the content is arrays

    def group_by(self, names: Sequence[str]) -> "Profile":
        """Return the profile with only the labels in `names`; equal rows are added up."""
        wanted = set(names)
        label_sets: dict[Labels, int] = {}
        numbers = [
            label_sets.setdefault(
                tuple(pair for pair in labels if pair[0] in wanted), len(label_sets)
            )
            for labels in self.label_sets
        ]
        row_labels = np.array(numbers, dtype=np.int64)[self.row_labels]
        columns = np.stack([row_labels, self.row_stacks, self.row_samples, self.row_values])
        rows = _fold(columns, len(self.stack_offsets))
        return replace(self, label_sets=tuple(label_sets), **rows)


class _Rows(TypedDict):
    """The columns of a profile's rows."""

    row_labels: Indices
    row_stacks: Indices
    row_samples: Integers
    row_values: Integers


def _fold(columns: Integers, stacks: int) -> _Rows:
    """Add up rows of (label set, stack, samples, value), sorted by the first two."""
    key = columns[0] * stacks + columns[1]
    order = np.argsort(key, kind="stable")
    key = key[order]
    firsts = np.flatnonzero(np.append(True, key[1:] != key[:-1])[: len(key)])
    counts = columns[2:, order]
    counts = np.add.reduceat(counts, firsts, axis=1) if len(firsts) else counts
    labels, stack_numbers = columns[:2, order[firsts]].astype(np.int32)
    return _Rows(
        row_labels=labels, row_stacks=stack_numbers, row_samples=counts[0], row_values=counts[1]
    )


class ProfileBuilder:
    """Collects counts of stacks and builds a Profile; the only place where stacks are folded."""

    def __init__(self, period_ns: int, type: str = "cpu", unit: str = "nanoseconds") -> None:  # noqa: A002 - the field's word
        self.period_ns = period_ns
        self.type = type
        self.unit = unit
        self.modules: dict[str, Module] = {}
        self._locations: dict[Location, int] = {}
        self._names: list[tuple[Frame, ...]] = []
        self._label_sets: dict[Labels, int] = {}
        self._stacks: dict[bytes, int] = {}
        self._samples: Counter[tuple[int, int]] = Counter()
        self._values: Counter[tuple[int, int]] = Counter()

    @classmethod
    def like(cls, profile: Profile) -> "ProfileBuilder":
        return cls(profile.period_ns, profile.type, profile.unit)

    def location(self, location: Location, names: tuple[Frame, ...] = ()) -> int:
        """Return the number of a location; the best names are kept, see `NameRank`."""
        number = self._locations.setdefault(location, len(self._names))
        if number == len(self._names):
            self._names.append(names)
        elif names and NameRank.of(names) > NameRank.of(self._names[number]):
            self._names[number] = names
        return number

    def knows(self, location: Location) -> bool:
        """Return whether a location has a number."""
        return location in self._locations

    def unnamed_locations(self) -> list[Location]:
        return [place for place, number in self._locations.items() if not self._names[number]]

    def replace_locations(self, replaced: Mapping[Location, Location]) -> None:
        """Let locations be others; counts of stacks that become equal are added up."""
        before = zip(self._locations, self._names, strict=True)
        self._locations, self._names = {}, []
        moved = [self.location(replaced.get(each, each), names) for each, names in before]
        if len(self._locations) == len(moved):
            return
        numbers = np.array(moved, np.int32)
        stacks: dict[bytes, int] = {}
        new: list[int] = []
        before_words = list(self._stacks)
        for begin in range(0, len(before_words), _STACKS_AT_ONCE):
            some = before_words[begin : begin + _STACKS_AT_ONCE]
            words = numbers[np.frombuffer(b"".join(some), np.int32)].tobytes()
            end = 0
            for stack in some:
                start, end = end, end + len(stack)
                new.append(stacks.setdefault(words[start:end], len(stacks)))
        self._stacks = stacks
        if len(stacks) == len(new):  # each has the number that it had
            return
        self._samples, self._values = (
            _sum_by_key(((labels, new[stack]), count) for (labels, stack), count in counts.items())
            for counts in (self._samples, self._values)
        )

    def add(
        self, labels: Labels, root_first: npt.ArrayLike, samples: int, value: int | None = None
    ) -> None:
        """Count a stack given as location numbers, root first; `value` defaults to its CPU time."""
        self.add_words(labels, np.asarray(root_first, dtype=np.int32).tobytes(), samples, value)

    def add_words(
        self, labels: Labels, words: bytes, samples: int, value: int | None = None
    ) -> None:
        """Count a stack as `add` does, given as the bytes of its location numbers (int32)."""
        key = (self._label_set(labels), self._stacks.setdefault(words, len(self._stacks)))
        self._samples[key] += samples
        self._values[key] += samples * self.period_ns if value is None else value

    def has_labels(self, labels: Labels) -> bool:
        """Return whether something was added with this label set."""
        return labels in self._label_sets

    def has_row(self, labels: Labels, words: bytes) -> bool:
        """Return whether `add_words` has counted this stack with this label set."""
        label_set, stack = self._label_sets.get(labels), self._stacks.get(words)
        return (label_set, stack) in self._samples

    def relabel(self, replace: Callable[[Labels], Labels]) -> None:
        """Replace all label sets; those that become equal count as one."""
        before, self._label_sets = self._label_sets, {}
        numbers = [self._label_set(replace(each)) for each in before]
        if len(self._label_sets) == len(before):  # each has the number that it had
            return
        for counts in (self._samples, self._values):
            old = list(counts.items())
            counts.clear()
            for (label_set, stack), number in old:
                counts[numbers[label_set], stack] += number

    def build(self, window: Window, accounting: Accounting) -> Profile:
        words = list(self._stacks)
        lengths = np.fromiter((len(stack) // 4 for stack in words), np.int64, len(words))
        rows = [(*key, samples, self._values[key]) for key, samples in self._samples.items()]
        return Profile(
            type=self.type,
            unit=self.unit,
            period_ns=self.period_ns,
            window=window,
            accounting=accounting,
            modules=dict(self.modules),
            locations=tuple(self._locations),
            names=tuple(self._names),
            label_sets=tuple(self._label_sets),
            stack_offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
            stack_locations=np.frombuffer(b"".join(words), dtype=np.int32),
            **_fold(np.array(rows, dtype=np.int64).reshape(-1, 4).T, len(words)),
        )

    def _label_set(self, labels: Labels) -> int:
        return self._label_sets.setdefault(labels, len(self._label_sets))


def _sum_by_key(counts: Iterable[tuple[tuple[int, int], int]]) -> Counter[tuple[int, int]]:
    sums: Counter[tuple[int, int]] = Counter()
    for key, count in counts:
        sums[key] += count
    return sums


class NameRank(IntEnum):
    """How good the names of a location are. They hold for all of its history.

    Of names for one location the best rank is kept, wherever profiles are put together; of equal
    ranks the later ones (`named_second`), and of these the first that are merged. So a location
    that gets its name tomorrow has it in what was recorded today, too.
    """

    NONE = 0
    BOUNDED = 1
    """Only where the function begins is known (`symbolizer.location.bounded`)."""
    REAL = 2

    @classmethod
    def of(cls, names: Sequence[Frame]) -> "NameRank":
        if not names:
            return cls.NONE
        return cls.BOUNDED if is_bounded(names[0]) else cls.REAL


def named_second(window: Window) -> int:
    """Return when a profile's names were known: the second in which its window ended."""
    return -(-max(0, window.end_ns) // 1_000_000_000)


def frame_of_module(modules: Mapping[str, Module], build_id: str) -> Frame:
    """Return the frame that is shown for all addresses of a module that have no name."""
    module = modules.get(build_id)
    if module is None:
        return unnamed(build_id, Kind.NATIVE)
    return unnamed(module.name, module.kind)


def adopt_module(modules: dict[str, Module], module: Module) -> None:
    """Add a module. Of two with one build id, one that has segments is kept, then the smaller path.

    So the result of a merge does not depend on its order.
    """
    mine = modules.setdefault(module.build_id, module)
    if (not mine.segments, mine.path) > (not module.segments, module.path):
        modules[module.build_id] = module


def label_frames(label_sets: Iterable[Labels], by: Sequence[str]) -> list[tuple[Frame, ...]]:
    """Return, for each label set, the frames drawn above its stacks, in the order of `by`.

    A label that no set has makes no frame; if only some lack it, their frame is `[no LABEL]`.
    """
    sets = [dict(labels) for labels in label_sets]
    present = [name for name in by if any(name in labels for labels in sets)]
    return [
        tuple(Frame(labels.get(name) or f"[no {name}]", "", Kind.LABEL) for name in present)
        for labels in sets
    ]
