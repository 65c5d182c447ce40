"""A comparison: two sides of costs, what has changed between them, and how certain that is.

A side is a window of a service in a store, or some files. Of a store the service's own past tells
how far costs stray when nothing has changed: the same two windows, as long and as far apart, are
compared at earlier positions, on the same hosts, wherever the service ran one and the same version;
on other days at the same hours where there are days enough. Where there are too few such positions
hosts are compared with each other, and of files replicates of one side. Where there is none of
these nothing is called changed.

Two sides without a common host, as a canary and the rest, are compared as a whole; what they always
differ by is taken from their past.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from profiler.comparison import verdict
from profiler.comparison.verdict import Change, Contrast, Costs, Floats, Judgement, Noise, Source
from profiler.text import counted, listed
from profiler.times import length_text, rfc3339
from storage.columns import Columns, key_starts_ns
from storage.hashing import Hasher
from storage.profile import Profile, Window
from storage.query.coverage import Coverage
from storage.query.function_totals import FunctionTotals, SelfSamples, merge_function_totals
from storage.query.presence import ServicePresence
from storage.query.query import Query
from storage.selector import Selector
from symbolizer.location import Frame

_SECOND_NS = 10**9
MINUTE_NS = 60 * _SECOND_NS
_DAY_NS = 24 * 3600 * _SECOND_NS
GRIDS_NS = (
    (60 * MINUTE_NS, 10 * MINUTE_NS),
    (2 * MINUTE_NS, MINUTE_NS),
    (0, 5 * _SECOND_NS),
)
"""Positions of spans that are so long lie multiples of this back: objects begin at multiples of
their length, and ten minutes of them are kept merged."""
HISTORY_NS = _DAY_NS
"""How far back earlier positions are looked for that follow each other."""
_MOST_POSITIONS = 24
_MOST_DAYS = 14
_SERVICE_LABELS = frozenset({"service", "version", "host", "container", "pod", "namespace", "unit"})
"""Labels that `present_ns` is known by."""
_UNEVEN = 0.1
"""Sides of which one is covered better than the other by more than this part are said aloud."""
_LOST = 0.02
_LOAD = 0.2
_ALIKE = 3
"""So many functions in common make two modules look like one."""
_SMALL = 0.01
"""Of the total: the function whose smallest visible change tells how little data there are."""


class ComparisonError(ValueError):
    """There is nothing to compare; the message says on which side."""


class EmptySideError(ComparisonError):
    """A side of a store has no samples."""

    def __init__(self, name: str, operand: "Operand") -> None:
        super().__init__(f"nothing to compare: the {name} side {operand} has no samples")
        self.name = name
        self.operand = operand


class Operand(NamedTuple):
    """What one side is taken from in a store."""

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
    """Self samples: a row per host, a column per function."""
    self_values: Floats
    total_values: Floats
    present_s: Floats
    """For how long the service was there, by host."""
    versions: tuple[str, ...] = ()
    coverage: Coverage | None = None
    """None for files."""

    @property
    def total(self) -> float:
        return float(self.self_values.sum())

    @property
    def cores(self) -> float:
        """Mean cores while the service was there, a host; 0 for files that know no time."""
        if self.window.end_ns <= self.window.start_ns:
            return 0.0
        return self.total / _SECOND_NS / max(1e-9, float(self.present_s.sum()))

    @property
    def costs(self) -> Costs:
        return Costs(self.samples, self.present_s)


class Function(NamedTuple):
    """One line of the answer. Triples are an estimate and its 95 % interval."""

    frame: Frame
    self: tuple[float, float]
    total: tuple[float, float]
    cores: tuple[float, float, float]
    """Cores a host that the after side has more, not less the common change."""
    share: tuple[float, float, float]
    """Points of the total (0.01 is one per cent) that the after side has more."""
    relative: tuple[float, float, float]
    """Growth less the common change: 0.5 is half as much again."""
    p: float
    q: float
    change: Change
    because: str


class CommonChange(NamedTuple):
    relative: float
    low: float
    high: float
    change: Change


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    before: Side
    after: Side
    source: Source
    positions: int
    df: float
    common: CommonChange
    functions: tuple[Function, ...]
    """By how much they matter: what changed first, then by cost."""
    warnings: tuple[str, ...]


def of_store(
    query: Query, before: Operand, after: Operand, changes_ns: Sequence[int] = ()
) -> Comparison:
    """Compare two windows of a store.

    Nothing that straddles one of the times `changes_ns` is taken for the service's unchanged past,
    nor what straddles a version change that its labels tell of.

    Raises:
        EmptySideError: a side has no samples.
    """
    pair = _Pair.read(query, before, after)
    sides = pair.sides()
    past = _Past(query, pair, changes_ns)
    contrasts = [pair.contrast(*costs) for costs in past.costs()]
    now, noise = _noise(pair, sides[0], sides[1], contrasts)
    warnings = pair.warnings()
    if noise is None:
        warnings.append(_too_little(past, sides, len(contrasts)))
    return _judged(sides[0], sides[1], now, noise, warnings)


class Calibration(NamedTuple):
    """Of how many unchanged pairs of windows any function was called changed, and their rate."""

    pairs: int
    alarms: int
    low: float
    high: float
    """The ends of the rate's 95 % interval."""


def calibrate(
    query: Query, before: Operand, after: Operand, changes_ns: Sequence[int] = ()
) -> Calibration:
    """Judge each earlier position of two windows by the others, by the same rule as ever.

    Raises:
        ComparisonError: there are too few of them.
    """
    pair = _Pair.read(query, before, after)
    past = list(_Past(query, pair, changes_ns).costs())
    if len(past) <= verdict.MIN_POSITIONS:
        raise ComparisonError(
            f"nothing to calibrate with: {counted(len(past), 'earlier position')} of the same"
            f" length, on the same hosts and of one version, and it takes"
            f" {verdict.MIN_POSITIONS + 1}"
        )
    contrasts = [pair.contrast(*costs) for costs in past]
    alarms = 0
    for i, costs in enumerate(past):
        others = [*contrasts[:i], *contrasts[i + 1 :]]
        now, noise = pair.against(contrasts[i], others)
        samples = costs[0].samples.sum(axis=0), costs[1].samples.sum(axis=0)
        alarms += set(verdict.judge(now, samples, noise).changes) != {Change.UNCHANGED}
    return Calibration(len(past), alarms, *verdict.rate_interval(alarms, len(past)))


def of_profiles(before: Sequence[Profile], after: Sequence[Profile], name: str = "") -> Comparison:
    """Compare files. Several a side are replicates: what differs between them is the noise.

    Raises:
        ComparisonError: a side is empty.
    """
    hasher = Hasher(b"comparison")
    sums = [
        [FunctionTotals.of(Columns.of(profile, hasher), hasher).by(()) for profile in profiles]
        for profiles in (before, after)
    ]
    for which, side in zip(("before", "after"), sums, strict=True):
        if not any(each.counts[:, 2].any() for each in side):
            raise ComparisonError(f"nothing to compare: the {which} side has no samples")
    table = _Table.of([*sums[0], *sums[1]])
    sides = []
    for profiles, side in zip((before, after), sums, strict=True):
        windows = [profile.window for profile in profiles]
        counts = np.concatenate([table.counts(each, {"": 0}) for each in side])
        sides.append(
            Side(
                name,
                Window(min(w.start_ns for w in windows), max(w.end_ns for w in windows)),
                tuple(f"file {i + 1}" for i in range(len(profiles))),
                table.frames,
                counts[:, :, 2],
                counts[:, :, 0],
                counts[:, :, 1],
                np.array([max(1, w.end_ns - w.start_ns) / _SECOND_NS for w in windows]),
            )
        )
    warnings: list[str] = []
    if min(len(before), len(after)) >= verdict.MIN_REPLICATES:
        now, noise = verdict.contrast_of_replicates(sides[0].costs, sides[1].costs)
        return _judged(sides[0], sides[1], now, noise, warnings)
    warnings.append(
        f"too little data for a verdict: {len(before)} and {len(after)} files;"
        f" {verdict.MIN_REPLICATES} or more a side tell how far they stray{_visible(sides)}"
    )
    pooled = [Costs(side.samples.sum(axis=0)[None], np.ones(1)) for side in sides]
    return _judged(sides[0], sides[1], verdict.contrast(*pooled), None, warnings)


# Reading.


@dataclass(frozen=True, slots=True, eq=False)
class _Table:
    """The functions of both sides, each with its column; what the past had besides is left out."""

    frames: tuple[Frame, ...]
    """By name: hashes are keyed, and sums must not depend on their order."""
    hashes: npt.NDArray[np.uint64]
    columns: npt.NDArray[np.int64]
    """Of each hash."""

    @classmethod
    def of(cls, parts: Sequence[FunctionTotals]) -> "_Table":
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
        counts = np.zeros((len(hosts), len(self.hashes), 4))
        if sums is not None:
            cells, known = self._cells(sums.self_samples(), hosts)
            np.add.at(counts.reshape(-1, 4), cells, sums.counts[known])
        return counts

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
        """Return the place of lines, row by row, and which lines have one."""
        rows = [hosts.get(dict(each).get("host", ""), -1) for each in part.service_sets]
        found = np.searchsorted(self.hashes, part.function_hashes)
        found = np.minimum(found, len(self.hashes) - 1)
        is_known = self.hashes[found] == part.function_hashes
        columns = np.where(is_known, self.columns[found], -1)
        row = np.array(rows, np.int64)[part.lines[:, 0]]
        column = columns[part.lines[:, 1]]
        known = (row >= 0) & (column >= 0)
        return row[known] * len(self.hashes) + column[known], known


class _Lives:
    """Which services were where and when, from what every object says of it."""

    def __init__(self, presence: ServicePresence) -> None:
        labels = [dict(each) for each in presence.label_sets]
        self._labels = labels
        number, self._set, self._present_ns = presence.rows.T
        self._start_ns = key_starts_ns(presence.objects)[number]
        self._is_there = self._present_ns > 0

    def seconds(
        self, selector: Selector, window: Window, hosts: Iterable[str] = ()
    ) -> dict[str, float]:
        """Return for how long what is asked for was there, by host.

        Profiles of other producers do not say it: then these hosts had it all the time.
        """
        if not len(self._set):
            return dict.fromkeys(hosts, (window.end_ns - window.start_ns) / _SECOND_NS)
        chosen = self._chosen(selector, window)
        sums = np.zeros(len(self._labels))
        np.add.at(sums, self._set[chosen], self._present_ns[chosen] / _SECOND_NS)
        found: dict[str, float] = {}
        for labels, seconds in zip(self._labels, sums.tolist(), strict=True):
            if seconds:
                host = labels.get("host", "")
                found[host] = found.get(host, 0.0) + seconds
        return found

    def versions(self, selector: Selector, window: Window, hosts: set[str]) -> set[tuple[str, str]]:
        """Return the services and versions that were there on some hosts."""
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


def _known(selector: Selector, but: frozenset[str] = frozenset()) -> Selector:
    """Return what a selector says of labels that presence is known by."""
    names = _SERVICE_LABELS - but
    return Selector(tuple(each for each in selector.matchers if each.name in names))


class _Read(NamedTuple):
    """What one side's window holds."""

    operand: Operand
    sums: FunctionTotals | None
    seconds: dict[str, float]
    versions: tuple[str, ...]
    coverage: Coverage

    @classmethod
    def of(cls, query: Query, operand: Operand) -> "_Read":
        selector, window = operand
        sums, coverage = query.function_totals(window, selector, by=("host",))
        known = _known(selector)
        lives = _Lives(query.presence(window, known))
        sampled = sums.service_sets if sums is not None else ()
        hosts = [dict(labels).get("host", "") for labels in sampled]
        seconds = lives.seconds(known, window, hosts)
        versions = {each for _, each in lives.versions(known, window, set(seconds))} - {""}
        return cls(operand, sums, seconds, tuple(sorted(versions)), coverage)


@dataclass(frozen=True, slots=True, eq=False)
class _Pair:
    """Two windows of a store, and the hosts on which they are compared."""

    reads: tuple[_Read, _Read]
    hosts: tuple[tuple[str, ...], tuple[str, ...]]
    is_paired: bool
    """Each host is compared with itself; else the sides have different ones."""
    table: _Table

    @classmethod
    def read(cls, query: Query, before: Operand, after: Operand) -> "_Pair":
        reads = (_Read.of(query, before), _Read.of(query, after))
        for name, each in zip(("before", "after"), reads, strict=True):
            if each.sums is None or not each.sums.counts[:, 2].any():
                raise EmptySideError(name, each.operand)
        common = sorted(reads[0].seconds.keys() & reads[1].seconds.keys())
        alone = tuple(tuple(sorted(each.seconds)) for each in reads)
        hosts = (tuple(common), tuple(common)) if common else (alone[0], alone[1])
        table = _Table.of([each.sums for each in reads if each.sums is not None])
        return cls(reads, hosts, bool(common), table)

    def sides(self) -> tuple[Side, Side]:
        before, after = (
            self._side(read, hosts) for read, hosts in zip(self.reads, self.hosts, strict=True)
        )
        return before, after

    def _side(self, read: _Read, hosts: tuple[str, ...]) -> Side:
        counts = self.table.counts(read.sums, {host: i for i, host in enumerate(hosts)})
        return Side(
            query=str(read.operand.selector),
            window=read.operand.window,
            hosts=hosts,
            frames=self.table.frames,
            samples=counts[:, :, 2],
            self_values=counts[:, :, 0],
            total_values=counts[:, :, 1],
            present_s=np.array([read.seconds[host] for host in hosts]),
            versions=read.versions,
            coverage=read.coverage,
        )

    def contrast(self, before: Costs, after: Costs) -> Contrast:
        if self.is_paired:
            return verdict.contrast(before, after)
        return verdict.contrast_of_replicates(before, after)[0]

    def against(self, now: Contrast, past: Sequence[Contrast]) -> tuple[Contrast, Noise]:
        if self.is_paired:
            return now, verdict.noise_of_history(past, len(past))
        return verdict.against_history(now, past)

    def warnings(self) -> list[str]:
        """Say which hosts are left out, and what of the sides is unequal."""
        found = []
        for name, read, hosts in zip(("before", "after"), self.reads, self.hosts, strict=True):
            alone = sorted(set(read.seconds) - set(hosts))
            if alone:
                found.append(f"left out, only on the {name} side: {listed(alone, 5)}")
        if not self.is_paired:
            found.append("no host is on both sides: they are compared as a whole")
        parts = []
        for read, hosts in zip(self.reads, self.hosts, strict=True):
            window = read.operand.window
            length_ns = (window.end_ns - window.start_ns) * max(1, len(read.coverage.hosts))
            parts.append(read.coverage.accounting.profiled_ns / length_ns if hosts else 0.0)
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


class _Past:
    """The same two windows at earlier positions that do not overlap, the latest first."""

    def __init__(self, query: Query, pair: _Pair, changes_ns: Sequence[int]) -> None:
        self._query = query
        self._pair = pair
        self._changes_ns = changes_ns
        windows = [read.operand.window for read in pair.reads]
        self.span = Window(min(w.start_ns for w in windows), max(w.end_ns for w in windows))
        self.length_ns = max(w.end_ns - w.start_ns for w in windows)
        overlap = max(w.start_ns for w in windows) < min(w.end_ns for w in windows)
        has_common = set(pair.hosts[0]) & set(pair.hosts[1])
        self.is_possible = not (overlap and has_common)
        """Else both sides are the same wherever versions do not tell them apart."""
        span_ns = self.span.end_ns - self.span.start_ns
        grid_ns = next(grid_ns for least_ns, grid_ns in GRIDS_NS if span_ns >= least_ns)
        self.step_ns = -(-span_ns // grid_ns) * grid_ns
        self._selectors = [
            Selector(tuple(m for m in read.operand.selector.matchers if m.name != "version"))
            for read in pair.reads
        ]

    def costs(self) -> Iterator[tuple[Costs, Costs]]:
        if not self.is_possible:
            return
        query, positions = self._positions()
        samples = self._samples(query, [back_ns for back_ns, _ in positions])
        for number, (_, seconds) in enumerate(positions):
            before, after = (
                Costs(samples[side][number], np.array([seconds[side][host] for host in hosts]))
                for side, hosts in enumerate(self._pair.hosts)
            )
            if before.samples.any() and after.samples.any():
                yield before, after

    def _samples(self, query: Query, backs: Sequence[int]) -> list[Floats]:
        """Return for each side the self samples by position, host and function, read once."""
        table, sides = self._pair.table, range(len(self._selectors))
        found = [np.zeros((len(backs), len(h), len(table.frames))) for h in self._pair.hosts]
        numbers = [{host: j for j, host in enumerate(hosts)} for hosts in self._pair.hosts]
        for selector in dict.fromkeys(self._selectors):
            asked = [side for side in sides if self._selectors[side] == selector]
            places = [(side, number) for side in asked for number in range(len(backs))]
            windows = [self._window(side, backs[number]) for side, number in places]
            for i, part in query.self_samples(windows, selector):
                side, number = places[i]
                found[side][number] += table.samples(part, numbers[side])
        return found

    def _positions(self) -> tuple[Query, list["_Position"]]:
        """Return the positions on other days at the same hours, or those that follow each other."""
        span_ns = self.span.end_ns - self.span.start_ns
        days_ns = -(-span_ns // _DAY_NS) * _DAY_NS
        daily = [
            back_ns
            for back_ns in range(days_ns, _MOST_DAYS * _DAY_NS + 1, days_ns)
            if back_ns < self.span.start_ns
        ]
        if len(daily) >= verdict.MIN_POSITIONS and self._has_data(daily[verdict.MIN_POSITIONS - 1]):
            found = []
            for back_ns in daily:
                found += self._valid(self._query, [back_ns])
            if len(found) >= verdict.MIN_POSITIONS:
                return self._query, found
        backs = [self.step_ns * (i + 1) for i in range(_MOST_POSITIONS)]
        backs = [each for each in backs if each <= min(HISTORY_NS, self.span.start_ns)]
        if not backs:
            return self._query, []
        query = self._query.listing(self._back(self.span, backs[-1], 0))
        return query, self._valid(query, backs)

    def _has_data(self, back_ns: int) -> bool:
        window = self._back(self.span, back_ns, back_ns)
        return any(True for _ in self._query.objects(window))

    def _valid(self, query: Query, backs: Sequence[int]) -> list["_Position"]:
        """Return those at which the service was there as it is now, in one version."""
        window = self._back(self.span, backs[-1], backs[0])
        knowns = [_known(each) for each in self._selectors]
        lives = [_Lives(query.presence(window, known)) for known in dict.fromkeys(knowns)]
        of_side = [lives[0], lives[-1]]
        hosts = {*self._pair.hosts[0], *self._pair.hosts[1]}
        found = []
        for back_ns in backs:
            span = self._back(self.span, back_ns, back_ns)
            if any(span.start_ns < at_ns < span.end_ns for at_ns in self._changes_ns):
                continue
            versions = set()
            for known, life in zip(knowns, of_side, strict=True):
                versions |= life.versions(known, span, hosts)
            # Of many services some program is always a new one.
            if len({service for service, _ in versions}) == 1 and len(versions) > 1:
                continue
            seconds = tuple(
                life.seconds(known, self._window(i, back_ns), hosts)
                for i, (known, life) in enumerate(zip(knowns, of_side, strict=True))
            )
            if all(
                set(hosts) <= each.keys()
                for hosts, each in zip(self._pair.hosts, seconds, strict=True)
            ):
                found.append(_Position(back_ns, seconds))
        return found

    def _window(self, side: int, back_ns: int) -> Window:
        return self._back(self._pair.reads[side].operand.window, back_ns, back_ns)

    @staticmethod
    def _back(window: Window, start_ns: int, end_ns: int) -> Window:
        return Window(window.start_ns - start_ns, window.end_ns - end_ns)


class _Position(NamedTuple):
    back_ns: int
    seconds: tuple[dict[str, float], ...]
    """By side: for how long the service was there, by host."""


# Judging.


def _noise(
    pair: _Pair, before: Side, after: Side, past: Sequence[Contrast]
) -> tuple[Contrast, Noise | None]:
    now = pair.contrast(before.costs, after.costs)
    if len(past) >= verdict.MIN_POSITIONS:
        return pair.against(now, past)
    hosts = len(before.hosts), len(after.hosts)
    if pair.is_paired and hosts[0] >= verdict.MIN_HOSTS:
        return now, verdict.noise_of_hosts(now)
    is_enough = min(hosts) >= verdict.MIN_REPLICATES and sum(hosts) >= verdict.MIN_HOSTS
    if not pair.is_paired and is_enough:
        return verdict.contrast_of_replicates(before.costs, after.costs, Source.HOSTS)
    return now, None


def _too_little(past: _Past, sides: Sequence[Side], positions: int) -> str:
    """Say what a verdict would take, and what could show with as many samples."""
    hosts = len(sides[0].hosts)
    text = (
        f"too little data for a verdict: {counted(positions, 'earlier position')} of the same"
        f" length (it takes {verdict.MIN_POSITIONS}), {counted(hosts, 'host')} (or"
        f" {verdict.MIN_HOSTS})"
    )
    missing = verdict.MIN_POSITIONS - positions
    if past.is_possible:
        text += f"; profile {length_text(missing * past.step_ns)} more without a change"
        gap_ns = past.span.end_ns - past.span.start_ns - 2 * past.length_ns
        length_ns = (positions * past.step_ns // verdict.MIN_POSITIONS - max(0, gap_ns)) // 2
        if length_ns >= MINUTE_NS:
            text += f", or compare windows of {length_text(length_ns - length_ns % MINUTE_NS)}"
    return text + _visible(sides)


def _visible(sides: Sequence[Side]) -> str:
    samples = [max(1.0, _SMALL * float(side.samples.sum())) for side in sides]
    reach = verdict.student_quantile(verdict.LEVEL, 1e6)
    least = math.expm1(reach * math.sqrt(sum(1 / each for each in samples)))
    if least > 1:
        return f"; so few samples show nothing of a function of {_SMALL:.0%}"
    return f"; so many samples show changes from {least:.0%} on in a function of {_SMALL:.0%}"


def _judged(
    before: Side, after: Side, now: Contrast, noise: Noise | None, warnings: list[str]
) -> Comparison:
    sides = before.samples.sum(axis=0), after.samples.sum(axis=0)
    found = verdict.judge(now, sides, noise) if noise else _undecided(now)
    common = verdict.judge_common(now, noise)
    selfs = before.self_values.sum(axis=0), after.self_values.sum(axis=0)
    totals = before.total_values.sum(axis=0), after.total_values.sum(axis=0)
    present = float(before.present_s.sum()), float(after.present_s.sum())
    functions = []
    for i, frame in enumerate(before.frames):
        if not totals[0][i] and not totals[1][i]:
            continue
        ratio, low, high = (float(each[i]) for each in (found.ratios, found.low, found.high))
        cores = [float(part[i]) / 1e9 / span for part, span in zip(selfs, present, strict=True)]
        shares = [float(part[i] / max(1.0, part.sum())) for part in selfs]
        functions.append(
            Function(
                frame=frame,
                self=(float(selfs[0][i]), float(selfs[1][i])),
                total=(float(totals[0][i]), float(totals[1][i])),
                cores=_spread(cores[0], cores[1], ratio, low, high),
                share=_spread(shares[0], shares[1], ratio, low, high),
                relative=(math.expm1(ratio), math.expm1(low), math.expm1(high)),
                p=float(found.p[i]),
                q=float(found.q[i]),
                change=found.changes[i],
                because=_because(found, i, noise),
            )
        )
    functions.sort(key=_by_weight)
    warnings += _renamed(functions)
    large = verdict.large_functions(sides[0] + sides[1], now.cells)
    if noise and large.sum() < verdict.MIN_COMMON:
        warnings.append(
            "too few functions are large enough to tell a change of the load from one of theirs:"
            " growth is read with care"
        )
    growth = math.expm1(now.common)
    if abs(growth) > _LOAD:
        warnings.append(f"the load changed: all functions by {growth:+.0%} in common")
    return Comparison(
        before=before,
        after=after,
        source=noise.source if noise else Source.NONE,
        positions=noise.positions if noise else 0,
        df=noise.df if noise else 0.0,
        common=CommonChange(growth, math.expm1(common.low), math.expm1(common.high), common.change),
        functions=tuple(functions),
        warnings=tuple(warnings),
    )


def _renamed(functions: Sequence[Function]) -> list[str]:
    """Say which modules of one side look like one of the other under another name."""
    names: list[dict[str, set[str]]] = [{}, {}]
    for function in functions:
        for side, total in zip(names, function.total, strict=True):
            if total:
                side.setdefault(function.frame.module, set()).add(function.frame.function)
    before, after = names
    found = []
    for old in sorted(before.keys() - after.keys()):
        for new in sorted(after.keys() - before.keys()):
            smaller = min(len(before[old]), len(after[new]))
            if len(before[old] & after[new]) >= max(_ALIKE, smaller / 2):
                found.append(
                    f"{old} and {new} have the same functions, which are compared by file name:"
                    " give both builds the same one, in folders of their own"
                )
    return found[:_ALIKE]


def _undecided(now: Contrast) -> Judgement:
    ratios = now.mean
    without = np.full_like(ratios, np.inf)
    ones = np.ones_like(ratios)
    return Judgement(ratios, -without, without, ones, ones, [Change.TOO_LITTLE] * len(ratios))


def _spread(
    before: float, after: float, ratio: float, low: float, high: float
) -> tuple[float, float, float]:
    """Return a difference with an interval as wide as that of the log ratio makes it."""
    middle = (before + after) / 2
    change = after - before
    if not middle:
        return change, change, change
    return change, change - middle * (ratio - low), change + middle * (high - ratio)


def _because(found: Judgement, i: int, noise: Noise | None) -> str:
    if noise is None:
        return "nothing tells how far it strays when nothing has changed"
    reach = float(found.high[i] - found.low[i]) / 2
    if found.changes[i] == Change.UNCHANGED and found.q[i] <= verdict.LEVEL:
        return f"changed by less than {verdict.MIN_POINTS:.1%} of the total"
    if found.changes[i] == Change.UNCHANGED:
        return f"changes below {math.expm1(reach):.0%} would not show"
    return f"strays by {math.expm1(reach):.0%} when nothing has changed"


def _by_weight(function: Function) -> tuple[bool, float]:
    is_changed = function.change not in (Change.UNCHANGED, Change.TOO_LITTLE)
    weight = abs(function.share[0]) if is_changed else max(function.self)
    return not is_changed, -weight


def changed(functions: Iterable[Function]) -> list[Function]:
    return [f for f in functions if f.change not in (Change.UNCHANGED, Change.TOO_LITTLE)]
