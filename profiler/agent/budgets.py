"""Budgets: what one window may take in memory and in its object, whatever processes do.

A process can make each of its samples differ from all others: by return addresses that it writes
on its stack, by names of threads, by processes that it starts. So locations, rows (a stack with a
label set) and label sets are charged to their process, to its cgroup and to all together. What is
beyond a budget is still counted, to the last sample, in less detail:

- a location becomes `[rest]`, and the stack ends with it;
- a stack ends after the longest prefix that is kept of that process, in `[rest]`;
- a label set has `[rest]` for its thread, then also for its comm; or for its thread and its pid, in
  common with others of its cgroup and comm;
- a name that is too much is left out: its location is shown as `[module]`.

So a process that exceeds its budget changes nothing in the stacks of others, and an object stays
below what readers accept (`storage.formats.limits.SIZE_LIMIT_BYTES`).
"""

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from bpf.samples import ProcessGeneration, RawSample
from storage.profile import Labels, ProfileBuilder
from symbolizer.location import (
    REST,
    REST_FRAME,
    REST_LOCATION,
    AddressLocation,
    FileOffset,
    Frame,
    Location,
    Module,
    NamedLocation,
)

_LOCATION_BYTES = 400
_ROW_BYTES, _ROW_FRAME_BYTES = 500, 12
_LABELS_BYTES = 800
_LETTER_BYTES = 2
_NAME_BYTES = 64
_MODULE_BYTES, _SEGMENT_BYTES = 64, 64
"""Without its letters. These are what Python and numpy need for one of each
(bench/bench_budgets.py); in an object each takes less than half of it."""

_SLACK = 1.25
"""What is folded costs as well, though little: it may exceed a budget by so much."""
_WIDEST_SCALE = 3.0
_OF_THREADS = ("comm", "pid", "thread")
"""The labels that are not of a service instance."""


class Limit(NamedTuple):
    """What one process, one cgroup and all together may take, in bytes."""

    process: int
    cgroup: int
    all: int


class Limits(NamedTuple):
    """What a window of a minute may take on one or two CPUs.

    At 99 Hz these are more samples than there are. Longer windows and more CPUs have up to three
    times as much, and then an object still takes less than readers accept of one.
    """

    locations: Limit = Limit(6 << 20, 12 << 20, 20 << 20)
    rows: Limit = Limit(4 << 20, 14 << 20, 20 << 20)
    label_sets: Limit = Limit(512 << 10, 6 << 20, 8 << 20)
    module_names_bytes: int = 4 << 20
    names_bytes: int = 12 << 20
    modules_bytes: int = 2 << 20
    """Of the modules' paths and segments."""


class Owner(NamedTuple):
    """Who is charged."""

    generation: ProcessGeneration
    cgroup_id: int

    @classmethod
    def of(cls, sample: RawSample) -> "Owner":
        return cls(sample.generation, sample.cgroup_id)


class Budget:
    """Bytes of one kind, and who has taken them."""

    def __init__(self, limit: Limit) -> None:
        self.scale = 1.0
        self._limit = limit
        self._processes: dict[ProcessGeneration, int] = {}
        self._cgroups: dict[int, int] = {}
        self._all = 0

    def left(self, owner: Owner) -> int:
        """Return how many bytes the process may still take; below 0 if it has taken more."""
        share = self.scale
        return round(
            min(
                self._limit.process * share - self._processes.get(owner.generation, 0),
                self._limit.cgroup * share - self._cgroups.get(owner.cgroup_id, 0),
                self._limit.all * share - self._all,
            )
        )

    def is_exhausted_by(self, owner: Owner, size_bytes: int) -> bool:
        """Return whether so much would be too much for the process alone."""
        taken = self._processes.get(owner.generation, 0) + size_bytes
        return taken > self._limit.process * self.scale

    def take(self, owner: Owner, size_bytes: int, slack: float = 1.0) -> bool:
        """Charge them, and return True; nothing is charged if they are more than is left."""
        generation, cgroup_id = owner
        of_process = self._processes.get(generation, 0) + size_bytes
        of_cgroup = self._cgroups.get(cgroup_id, 0) + size_bytes
        of_all = self._all + size_bytes
        share = self.scale * slack
        process, cgroup, everyone = self._limit
        if of_process > process * share or of_cgroup > cgroup * share or of_all > everyone * share:
            return False
        self._processes[generation], self._cgroups[cgroup_id] = of_process, of_cgroup
        self._all = of_all
        return True


class LocationBudget:
    """How many more locations a process may have."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget

    def take(self, owner: Owner, wanted: int) -> int:
        """Charge as many locations as are left, up to those wanted; return how many these are."""
        granted = max(0, min(wanted, self._budget.left(owner) // _LOCATION_BYTES))
        if granted:
            self._budget.take(owner, granted * _LOCATION_BYTES)
        return granted


class BoundedProfile:
    """Adds to a ProfileBuilder what the budgets allow, and folds the rest. Not thread-safe.

    Attributes:
        locations: the budget of locations, which are charged before they are numbered.
        folded: how many samples lost detail.
    """

    def __init__(self, builder: ProfileBuilder, cpus: int, limits: Limits | None = None) -> None:
        limits = limits or Limits()
        self.folded = 0
        self._builder = builder
        self._cpus = cpus
        self._rows = Budget(limits.rows)
        self._label_sets = Budget(limits.label_sets)
        places = Budget(limits.locations)
        self.locations = LocationBudget(places)
        self._budgets = (places, self._rows, self._label_sets)
        self._kin: dict[tuple[int, str], Labels] = {}
        """By cgroup and comm: what the first label set says of its instance."""
        self._kept: dict[ProcessGeneration, list[bytes]] = {}
        """The stacks of each process that are kept whole, as they are added."""
        self._full: dict[ProcessGeneration, list[bytes]] = {}
        """The same of processes that get no more of them, sorted."""
        self._names = _NameBudget(limits)
        self._limits = limits
        self._modules_bytes = 0
        self.grow(1.0)

    def grow(self, minutes: float) -> None:
        """Allow what a window of this length may take."""
        scale = min(max(1.0, self._cpus / 2 * minutes), _WIDEST_SCALE)
        if scale > self._budgets[0].scale:
            for budget in self._budgets:
                budget.scale = scale
            self._full.clear()

    def rest(self) -> int:
        """Return the number of the location that stands for what is beyond a budget."""
        self._builder.modules.setdefault(REST, Module(REST, REST))
        return self._builder.location(REST_LOCATION, (REST_FRAME,))

    def add(self, owner: Owner, labels: Labels, root_first: Iterable[int], samples: int) -> None:
        """Count a stack of a process, given as numbers of locations."""
        words = array("i", root_first).tobytes()
        fitting = self._fit_labels(owner, labels)
        kept = words
        if not self._builder.has_row(fitting, words):
            size_bytes = _ROW_BYTES + _ROW_FRAME_BYTES * (len(words) // 4)
            if owner.generation not in self._full and self._rows.take(owner, size_bytes):
                self._kept.setdefault(owner.generation, []).append(words)
            else:
                kept = self._fold(owner, fitting, words)
        if kept is not words or fitting is not labels:
            self.folded += samples
        self._builder.add_words(fitting, kept, samples)

    def name(self, location: Location, frames: tuple[Frame, ...]) -> None:
        """Name a location, unless its module has too many or too long names."""
        if self._names.take(location, frames):
            self._builder.location(location, frames)

    def affordable(self, locations: Mapping[Location, Location]) -> dict[Location, Location]:
        """Return locations by those that they replace; names that are too much are left out.

        A location that is known by its name alone is then only known by its module.
        """
        return {
            place: AddressLocation(named.module, FileOffset(0))
            if isinstance(named, NamedLocation)
            and not self._names.take(named, (Frame(*named[:4], named.line),))
            else named
            for place, named in locations.items()
        }

    def add_modules(self, modules: Mapping[str, Module]) -> None:
        """Add modules; one whose path is too much is shown by its build id."""
        for build_id, module in modules.items():
            size_bytes = _MODULE_BYTES + len(module.path.encode("utf-8", "replace"))
            size_bytes += len(build_id) + _SEGMENT_BYTES * len(module.segments)
            if self._modules_bytes + size_bytes <= self._limits.modules_bytes:
                self._modules_bytes += size_bytes
                self._builder.modules[build_id] = module

    def _fit_labels(self, owner: Owner, labels: Labels) -> Labels:
        """Return these labels, or others in their place if the budget has no room for them.

        Of a process with too many threads, those without their names; of too many processes, the
        labels of the first one in the same cgroup with the same comm, without its pid.
        """
        if self._builder.has_labels(labels):
            return labels
        own = tuple(pair for pair in labels if pair[0] not in _OF_THREADS)
        kin = (owner.cgroup_id, dict(labels).get("comm", ""))
        if self._charge_labels(owner, labels, 1.0):
            self._kin.setdefault(kin, own)
            return labels
        folded = [_without(labels, ("thread", "pid"), self._kin.get(kin, own))]
        if self._label_sets.is_exhausted_by(owner, _LABELS_BYTES):
            folded = [_without(labels, names, own) for names in (("thread",), ("thread", "comm"))]
        for each in folded:
            if self._builder.has_labels(each) or self._charge_labels(owner, each, _SLACK):
                return each
        return (("service", REST),)

    def _charge_labels(self, owner: Owner, labels: Labels, slack: float) -> bool:
        letters = sum(len(value.encode("utf-8", "replace")) for _, value in labels)
        return self._label_sets.take(owner, _LABELS_BYTES + _LETTER_BYTES * letters, slack)

    def _fold(self, owner: Owner, labels: Labels, words: bytes) -> bytes:
        """Return the stack cut after its longest kept prefix, or after a part of that.

        Those that are cut are charged as well. When nothing is left for them, they are cut at a
        half, a quarter and so on, until such a stack is there; `[rest]` alone always is.
        """
        kept = self._full.get(owner.generation)
        if kept is None:
            kept = self._full[owner.generation] = sorted(self._kept.get(owner.generation, ()))
        rest = np.int32(self.rest()).tobytes()
        length = longest_prefix(kept, words)
        folded = words[: 4 * length] + rest
        if self._builder.has_row(labels, folded):
            return folded
        if self._rows.take(owner, _ROW_BYTES + _ROW_FRAME_BYTES * (length + 1), _SLACK):
            return folded
        while length:
            length //= 2
            folded = words[: 4 * length] + rest
            if self._builder.has_row(labels, folded):
                return folded
        return rest


class _NameBudget:
    """Letters of names in a window, by module and in all. Each name counts once."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._seen: set[str] = set()
        self._modules: dict[str, int] = {}
        self._all = 0

    def take(self, location: Location, frames: Sequence[Frame]) -> bool:
        module = location.build_id if isinstance(location, AddressLocation) else location.module
        texts = [text for frame in frames for text in (frame.function, frame.file)]
        new = {text for text in texts if text not in self._seen}
        size_bytes = sum(_NAME_BYTES + len(text.encode("utf-8", "replace")) for text in new)
        taken = self._modules.get(module, 0) + size_bytes
        if taken > self._limits.module_names_bytes:
            return False
        if self._all + size_bytes > self._limits.names_bytes:
            return False
        self._modules[module] = taken
        self._all += size_bytes
        self._seen |= new
        return True


def _without(labels: Labels, names: Sequence[str], own: Labels) -> Labels:
    """Return the labels with `[rest]` for some of the thread's, and `own` for the instance's."""
    thread = [(n, REST if n in names else value) for n, value in labels if n in _OF_THREADS]
    return tuple(sorted((*own, *thread)))


def longest_prefix(kept: Sequence[bytes], words: bytes) -> int:
    """Return how many words, but not all, the stack begins with as one of the sorted `kept` does.

    Of all kept ones, a neighbour in their order has the longest prefix in common.
    """
    at = bisect_left(kept, words)
    mine = np.frombuffer(words, np.int32)
    longest = 0
    for neighbour in kept[max(0, at - 1) : at + 1]:
        theirs = np.frombuffer(neighbour, np.int32)
        length = min(len(mine), len(theirs))
        different = np.flatnonzero(mine[:length] != theirs[:length])
        longest = max(longest, int(different[0]) if len(different) else length)
    return min(longest, max(0, len(mine) - 1))
