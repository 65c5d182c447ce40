"""The two sides of a comparison: what a store or files say of each, by host and function.

Of a store, a side is a window of a service; of files, each file is a row of its side. Both sides
have the same functions in the same order.

In a fleet the rows of a side are groups of hosts. Which group a host is in is decided by its name
alone, so a group is the same hosts on both sides and at all earlier positions, but for those that
came and went. The verdict needs no single hosts: its statistic is the mean over rows of the log
ratio of CPU seconds per second of service time, and the noise is that of the same mean, over the
same rows, at earlier positions or between the rows. 32 rows tell the variance between rows nearly
as well as 1,000 (with 31 degrees of freedom intervals are 4 % wider), a row of 30 hosts has 30
times the samples, so that fewer functions are too small to be tested, and hosts that differ much
from others weigh less in it. What is given up is the host: who compares single hosts names them.
Likewise the resolution that series are read in (`storage.query.function_series`) does not matter:
buckets that lie wholly inside of a window add up to the samples of that window, to the last one.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from profiler.comparison import verdict
from profiler.comparison.names import Names, incomplete_part
from profiler.comparison.verdict import Contrast, Costs, Flags, Floats, Noise
from profiler.text import counted, listed
from profiler.times import NS_PER_S, rfc3339
from storage.columns import Columns, key_starts_ns
from storage.hashing import process_hasher
from storage.profile import Window, add_counts
from storage.query.coverage import Coverage
from storage.query.function_series import HostGroups
from storage.query.function_totals import FunctionTotals, SelfSamples, merge_function_totals
from storage.query.presence import ServicePresence
from storage.query.query import Query
from storage.query.resolve import resolve_columns
from storage.query.threads import run_both
from storage.selector import Selector
from symbolizer.location import Frame

_SERVICE_LABELS = frozenset({"service", "version", "host", "container", "pod", "namespace", "unit"})
"""Labels that `present_ns` is known by."""
_UNEVEN = 0.1
"""If the coverage of the sides differs by more than this part, a warning says so."""
_MOST_ALONE = 64
"""Hosts of a side beyond which they are grouped, if there is so much that series are read."""
_MOSTLY = 0.8
"""Hosts are grouped only if so many of those of any side are on both."""
_LOST = 0.02
"""If more than this part of a side's ticks is lost, a warning says so."""


class ComparisonError(ValueError):
    """There is nothing to compare. The message says on which side."""


class EmptySideError(ComparisonError):
    """A side of a store has no samples."""

    def __init__(self, name: str, operand: "Operand") -> None:
        super().__init__(f"nothing to compare: the {name} side {operand} has no samples")
        self.name = name
        self.operand = operand


class Operand(NamedTuple):
    """A window of a store, and the selector of a side in it."""

    selector: Selector
    window: Window

    def __str__(self) -> str:
        return f"{self.selector}@{rfc3339(self.window.start_ns)}..{rfc3339(self.window.end_ns)}"


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """One side: costs by host (or replicate) and function."""

    query: str
    window: Window
    hosts: tuple[str, ...]
    frames: tuple[Frame, ...]
    samples: Floats
    """Self samples: a row per host or group of hosts, a column per function."""
    self_values: Floats
    total_values: Floats
    """A row per host, or one for all hosts."""
    present_s: Floats
    """How long the service ran, by row."""
    versions: tuple[str, ...] = ()
    coverage: Coverage | None = None
    """None for files."""
    has_all_hosts: bool = True
    """Whether no host of the selection was left out."""
    is_grouped: bool = False
    names: Names | None = None
    """What has a name on both sides."""
    incomplete: float | None = None
    """The part of stacks that ended too early, of all services on these hosts; None: unknown."""

    @property
    def rows(self) -> int:
        return len(self.present_s)

    @property
    def is_of_files(self) -> bool:
        return self.hosts[:1] == ("file 1",)

    @property
    def total(self) -> float:
        return float(self.self_values.sum())

    @property
    def cores(self) -> float:
        """Mean cores per host while the service ran; 0 for files without times."""
        if self.window.end_ns <= self.window.start_ns:
            return 0.0
        return self.total / NS_PER_S / max(1e-9, float(self.present_s.sum()))

    @property
    def costs(self) -> Costs:
        return Costs(self.samples, self.present_s, self.steady)

    @property
    def steady(self) -> Flags:
        """Which functions may count for the common change."""
        return self.names.steady if self.names else np.ones(len(self.frames), np.bool_)


@dataclass(frozen=True, slots=True, eq=False)
class FunctionTable:
    """The functions of both sides, each with its column; others of the past are left out."""

    frames: tuple[Frame, ...]
    """Ordered by name: hashes are keyed, and sums must not depend on their order."""
    hashes: npt.NDArray[np.uint64]
    columns: npt.NDArray[np.int64]
    """Of each hash."""

    @classmethod
    def of(cls, parts: Sequence[FunctionTotals]) -> "FunctionTable":
        merged = merge_function_totals(parts)
        used = np.unique(merged.rows[:, 1])  # a selection keeps the names of all functions
        hashes = merged.function_hashes[used]
        order = np.argsort(hashes)
        frames = merged.frames(used[order])
        by_name = np.array(sorted(range(len(frames)), key=lambda i: frames[i][:3]), np.int64)
        columns = np.empty_like(by_name)
        columns[by_name] = np.arange(len(frames))
        named = tuple(frames[i] for i in by_name.tolist())
        return cls(named, hashes[order], columns)

    def counts(self, sums: FunctionTotals | None, hosts: dict[str, int]) -> Floats:
        """Return (self, total, both in samples) by host and function."""
        counts = np.zeros((len(hosts) * len(self.hashes), 4))
        if sums is not None:
            cells, known = self._cells(sums.self_samples(), hosts)
            for i, column in enumerate(sums.counts[known].T):
                counts[:, i] = np.bincount(cells, column, len(counts))
        return counts.reshape(len(hosts), len(self.hashes), 4)

    def samples(self, part: SelfSamples, hosts: dict[str, int]) -> Floats:
        """Return the self samples by host and function."""
        cells, known = self._cells(part, hosts)
        size = len(hosts) * len(self.hashes)
        weights = part.samples[known].astype(np.float64)
        counts = np.bincount(cells, weights, size).astype(np.float64, copy=False)
        return counts.reshape(len(hosts), len(self.hashes))

    def _cells(
        self, part: SelfSamples, hosts: dict[str, int]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Return the cell of each line that has one, and which lines have one."""
        rows = [hosts.get(dict(each).get("host", ""), -1) for each in part.service_sets]
        found = np.searchsorted(self.hashes, part.function_hashes)
        found = np.minimum(found, len(self.hashes) - 1)
        is_known = self.hashes[found] == part.function_hashes
        columns = np.where(is_known, self.columns[found], -1)
        row = np.array(rows, np.int64)[part.lines[:, 0]]
        column = columns[part.lines[:, 1]]
        known = (row >= 0) & (column >= 0)
        return row[known] * len(self.hashes) + column[known], known


def sides_of_profiles(
    before: Sequence[Columns], after: Sequence[Columns], name: str
) -> tuple[Side, Side]:
    """Return the sides of a comparison of files, a row for each file.

    Raises:
        ComparisonError: a side is empty.
    """
    hasher = process_hasher()
    named = resolve_columns([*before, *after])
    every = [FunctionTotals.of(each, hasher).by(()) for each in named]
    sums = [every[: len(before)], every[len(before) :]]
    for which, side in zip(("before", "after"), sums, strict=True):
        if not any(each.counts[:, 2].any() for each in side):
            raise ComparisonError(f"nothing to compare: the {which} side has no samples")
    table = FunctionTable.of([*sums[0], *sums[1]])
    sides: list[Side] = []
    for profiles, side in zip((before, after), sums, strict=True):
        windows = [profile.window for profile in profiles]
        counts = np.concatenate([table.counts(each, {"": 0}) for each in side])
        stops = [profile.accounting.stops for profile in profiles]
        sides.append(
            Side(
                name,
                Window(min(w.start_ns for w in windows), max(w.end_ns for w in windows)),
                tuple(f"file {i + 1}" for i in range(len(profiles))),
                table.frames,
                counts[:, :, 2],
                counts[:, :, 0],
                counts[:, :, 1],
                np.array([max(1, w.end_ns - w.start_ns) / NS_PER_S for w in windows]),
                incomplete=incomplete_part(functools.reduce(add_counts, stops)),
            )
        )
    names = Names.of(table.frames, *(side.samples.sum(axis=0) for side in sides))
    return replace(sides[0], names=names), replace(sides[1], names=names)


class PresenceByHost:
    """When services ran on which hosts, as every object says in its head."""

    def __init__(self, presence: ServicePresence) -> None:
        self.coverage = presence.coverage
        labels = [dict(each) for each in presence.label_sets]
        self._labels = labels
        number, self._set, self._present_ns = presence.rows.T
        self._start_ns = key_starts_ns(presence.objects)[number]
        self._is_there = self._present_ns > 0

    def seconds(
        self, selector: Selector, window: Window, hosts: Iterable[str] = ()
    ) -> dict[str, float]:
        """Return how long the selected services ran, by host.

        Profiles of other tools do not say it: then it is the whole window on these hosts.
        """
        if not len(self._set):
            return dict.fromkeys(hosts, (window.end_ns - window.start_ns) / NS_PER_S)
        chosen = self._chosen(selector, window)
        sums = np.zeros(len(self._labels))
        np.add.at(sums, self._set[chosen], self._present_ns[chosen] / NS_PER_S)
        found: dict[str, float] = {}
        for labels, seconds in zip(self._labels, sums.tolist(), strict=True):
            if seconds:
                host = labels.get("host", "")
                found[host] = found.get(host, 0.0) + seconds
        return found

    def versions(self, selector: Selector, window: Window, hosts: set[str]) -> set[tuple[str, str]]:
        """Return the services and versions that ran on these hosts."""
        there = np.unique(self._set[self._chosen(selector, window)]).tolist()
        return {
            (labels.get("service", ""), labels.get("version", ""))
            for labels in (self._labels[i] for i in there)
            if labels.get("host", "") in hosts
        }

    def _chosen(self, selector: Selector, window: Window) -> npt.NDArray[np.bool_]:
        is_asked = np.array(selector.choose(self._labels), dtype=bool)
        is_inside = (window.start_ns <= self._start_ns) & (self._start_ns < window.end_ns)
        chosen: npt.NDArray[np.bool_] = self._is_there & is_inside & is_asked[self._set]
        return chosen


def service_selector(selector: Selector, but: frozenset[str] = frozenset()) -> Selector:
    """Return the part of a selector that presence is known by."""
    names = _SERVICE_LABELS - but
    return Selector(tuple(each for each in selector.matchers if each.name in names))


class SideData(NamedTuple):
    """What the store has in the window of one side."""

    operand: Operand
    sums: FunctionTotals | None
    totals: FunctionTotals | None
    """Of all hosts together; None where `sums` has totals by host."""
    seconds: dict[str, float]
    """How long the service ran, by row."""
    hosts: tuple[str, ...]
    versions: tuple[str, ...]
    coverage: Coverage

    @property
    def is_empty(self) -> bool:
        return self.sums is None or not self.sums.counts[:, 2].any()

    @classmethod
    def of(
        cls,
        query: Query,
        operand: Operand,
        presence: "PresenceByHost",
        groups: HostGroups | None,
        *,
        is_from_series: bool,
    ) -> "SideData":
        selector, window = operand
        known, totals = service_selector(selector), None
        if is_from_series:
            sums, of_sums = query.self_by_host(window, selector, groups)
            totals, of_totals = query.totals_of_hosts(window, selector)
            coverage = presence.coverage.lacking(of_sums, of_totals)
        else:
            sums, coverage = query.function_totals(window, selector, by=("host",))
        sampled = sums.service_sets if sums is not None and groups is None else ()
        hosts = [dict(labels).get("host", "") for labels in sampled]
        seconds = presence.seconds(known, window, hosts)
        versions = {each for _, each in presence.versions(known, window, set(seconds))} - {""}
        return cls(
            operand,
            sums,
            totals,
            by_row(seconds, groups),
            tuple(sorted(seconds)),
            tuple(sorted(versions)),
            coverage,
        )


def reads_series(query: Query, *operands: Operand) -> bool:
    """Return whether functions are read from series: not if a side chooses hosts.

    If there is much on any side both are, so that functions are named alike.
    """
    names = frozenset[str]().union(*(each.selector.names for each in operands))
    return "host" not in names and any(
        query.is_read_from_series(each.window, names) for each in operands
    )


def read_presence(
    query: Query, window: Window, selector: Selector, edges_ns: Iterable[int] = ()
) -> "PresenceByHost":
    """Return when services ran; of a fleet ten minutes count in the window in which they begin.

    Windows inside of this one may begin and end at `edges_ns`.
    """
    if query.is_read_from_series(window, selector.names):
        return PresenceByHost(query.presence_by_host(window, selector, edges_ns))
    return PresenceByHost(query.presence(window, selector))


def by_row(seconds: dict[str, float], groups: HostGroups | None) -> dict[str, float]:
    """Add up the seconds of hosts by group, if hosts are grouped."""
    if groups is None:
        return seconds
    found: dict[str, float] = {}
    for host, each in seconds.items():
        group = groups.of(host)
        found[group] = found.get(group, 0.0) + each
    return found


def _numbered(
    reads: Iterable[SideData], rows: Iterable[tuple[str, ...]]
) -> Iterator[tuple[FunctionTotals | None, dict[str, int]]]:
    """Return what was read of each side, and the numbers of its rows."""
    for read, names in zip(reads, rows, strict=True):
        yield read.sums, {row: i for i, row in enumerate(names)}


@dataclass(frozen=True, slots=True, eq=False)
class WindowPair:
    """Two windows of a store, and the hosts on which they are compared."""

    reads: tuple[SideData, SideData]
    rows: tuple[tuple[str, ...], tuple[str, ...]]
    """Hosts, or groups of hosts."""
    is_paired: bool
    """Each host is compared with itself; otherwise the sides have different hosts."""
    table: FunctionTable
    groups: HostGroups | None
    is_from_series: bool
    names: Names

    @classmethod
    def read(cls, query: Query, before: Operand, after: Operand) -> "WindowPair":
        operands = (before, after)
        knowns = [service_selector(each.selector) for each in operands]
        presences = run_both(
            *(
                functools.partial(read_presence, query, each.window, known)
                for each, known in zip(operands, knowns, strict=True)
            )
        )
        hosts = [
            set(presence.seconds(known, each.window))
            for each, known, presence in zip(operands, knowns, presences, strict=True)
        ]
        most = max(map(len, hosts))
        is_fleet = most > _MOST_ALONE and len(hosts[0] & hosts[1]) >= _MOSTLY * most
        is_large = reads_series(query, before, after)
        groups = query.host_groups() if is_fleet and is_large else None
        reads = run_both(
            *(
                functools.partial(
                    SideData.of, query, each, presence, groups, is_from_series=is_large
                )
                for each, presence in zip(operands, presences, strict=True)
            )
        )
        for name, read in zip(("before", "after"), reads, strict=True):
            if read.is_empty:
                raise EmptySideError(name, read.operand)
        common = sorted(reads[0].seconds.keys() & reads[1].seconds.keys())
        alone = tuple(tuple(sorted(each.seconds)) for each in reads)
        rows = (tuple(common), tuple(common)) if common else (alone[0], alone[1])
        sums = (part for each in reads for part in (each.sums, each.totals) if part is not None)
        table = FunctionTable.of(list(sums))
        counts = (table.counts(*each) for each in _numbered(reads, rows))
        names = Names.of(table.frames, *(each[:, :, 2].sum(axis=0) for each in counts))
        return cls(reads, rows, bool(common), table, groups, is_large, names)

    def sides(self) -> tuple[Side, Side]:
        before, after = (
            self._side(read, rows) for read, rows in zip(self.reads, self.rows, strict=True)
        )
        return before, after

    def _side(self, read: SideData, rows: tuple[str, ...]) -> Side:
        counts = self.table.counts(read.sums, {row: i for i, row in enumerate(rows)})
        totals = counts if read.totals is None else self.table.counts(read.totals, {"": 0})
        hosts = rows if self.groups is None else read.hosts
        return Side(
            query=str(read.operand.selector),
            window=read.operand.window,
            hosts=hosts,
            frames=self.table.frames,
            samples=counts[:, :, 2],
            self_values=counts[:, :, 0],
            total_values=totals[:, :, 1],
            present_s=np.array([read.seconds[row] for row in rows]),
            versions=read.versions,
            coverage=read.coverage,
            has_all_hosts=hosts == read.hosts,
            is_grouped=self.groups is not None,
            names=self.names,
            incomplete=incomplete_part(read.coverage.accounting.stops),
        )

    def contrast(self, before: Costs, after: Costs) -> Contrast:
        before = replace(before, steady=self.names.steady)
        if self.is_paired:
            return verdict.contrast(before, after)
        return verdict.contrast_of_replicates(before, after)[0]

    def against(self, now: Contrast, past: Sequence[Contrast]) -> tuple[Contrast, Noise]:
        if self.is_paired:
            return now, verdict.noise_of_history(past, len(past))
        return verdict.against_history(now, past)

    def warnings(self) -> list[str]:
        """Return warnings: which hosts are left out, and how the sides differ."""
        found = []
        for name, read, rows in zip(("before", "after"), self.reads, self.rows, strict=True):
            alone = sorted(set(read.seconds) - set(rows))
            if alone:
                found.append(f"left out, only on the {name} side: {listed(alone, 5)}")
        if not self.is_paired:
            found.append("no host is on both sides: they are compared as a whole")
        parts = []
        for read, rows in zip(self.reads, self.rows, strict=True):
            window = read.operand.window
            length_ns = (window.end_ns - window.start_ns) * max(1, len(read.coverage.hosts))
            parts.append(read.coverage.accounting.profiled_ns / length_ns if rows else 0.0)
        if abs(parts[0] - parts[1]) > _UNEVEN:
            found.append(
                f"unequal coverage: {parts[0]:.0%} of the before side's time was profiled,"
                f" {parts[1]:.0%} of the after side's"
            )
        for name, read in zip(("before", "after"), self.reads, strict=True):
            accounting = read.coverage.accounting
            lost = sum(accounting.lost.values()) / max(1, accounting.ticks)
            if lost > _LOST:
                found.append(f"{lost:.1%} of the {name} side's ticks were lost")
            if read.coverage.skipped:
                skipped = counted(len(read.coverage.skipped), "object")
                found.append(f"{skipped} of the {name} side cannot be read")
        return found
