"""Function series: functions of fleets, from the series that compaction wrote instead of stacks.

Totals are of all hosts: from `functions_1h`. Self samples are by host, or by group of hosts: from
the table with the fewest rows that tells them apart and begins and ends with the window, which is
that of the day, of the hour or of ten minutes. What has no series is read from the samples: the
edges of a window that begin inside of ten minutes, and the hour that goes on.

Functions have the names that were known when their hour was rolled up. A location whose name became
known later is another function in earlier hours; in stores that are read stack by stack it is one.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from storage.blocks.block import ROLLUP_LABELS, labels_id
from storage.blocks.dictionary import choose_ids, read_label_sets
from storage.blocks.function_sums import (
    FunctionSums,
    KnownFunctions,
    read_functions,
    read_leaves,
    read_self,
    read_totals,
)
from storage.blocks.functions import (
    FUNCTIONS_1D,
    FUNCTIONS_1H,
    FUNCTIONS_10M,
    GROUPS_1D,
    GROUPS_1H,
    HOST_GROUPS,
)
from storage.blocks.manifest import HOUR_S, DayManifest, File, start_s_of
from storage.blocks.scans import LocalFile
from storage.blocks.schema import DETAIL, DICTIONARY, FUNCTIONS
from storage.blocks.slices import Spans, join_spans, seconds_of
from storage.blocks.times import Lines, read_times
from storage.columns import OBJECT_FIELDS, Times
from storage.hashing import Hasher, Hashes
from storage.location_functions import LocationFunctions
from storage.objects.keys import NS_PER_S
from storage.profile import Accounting, Labels, ProfileError, Window
from storage.query.blocks import Blocks
from storage.query.compacted import (
    Chosen,
    Compacted,
    CompactedDay,
    CompactedHour,
    files_of,
    plan_heads,
    rows_of_detail,
    slices_of,
)
from storage.query.coverage import Part
from storage.query.function_totals import FunctionTotals, fold
from storage.query.listing import Listed
from storage.query.parts import Parts, skipped_parts
from storage.selector import Selector

_TEN_MINUTES_NS = 600 * NS_PER_S
_HOST = "host"
_MANY_ROWS = 4_000_000
"""Rows of detail in a window beyond which series are read: with fewer, stacks are as fast, and all
have the best names that are known now."""


class HostGroups:
    """Names of the groups that hosts are in, and which group a host is in."""

    def __init__(self, hasher: Hasher) -> None:
        self._hasher = hasher
        self._known: dict[str, str] = {}

    def of(self, host: str) -> str:
        known = self._known.get(host)
        if known is None:
            labels = ((_HOST, host),) if host else ()
            known = self._known[host] = group_name(labels_id(labels, self._hasher) % HOST_GROUPS)
        return known

    def grouped(self, totals: FunctionTotals) -> FunctionTotals:
        """Return function totals by host as totals by group."""
        numbers: dict[Labels, int] = {}
        mine = np.array(
            [
                numbers.setdefault(((_HOST, self.of(dict(labels).get(_HOST, ""))),), len(numbers))
                for labels in totals.service_sets
            ],
            dtype=np.int64,
        )
        rows, counts = fold(mine[totals.rows[:, 0]], totals.rows[:, 1], totals.counts)
        return replace(totals, service_sets=tuple(numbers), rows=rows, counts=counts)


def group_name(number: int) -> str:
    return f"group {number + 1} of {HOST_GROUPS}"


class SeriesPlan(NamedTuple):
    """What is read from series, and what of the hours has none."""

    hours: list[Compacted]
    """Those that are read from series, as far as they are."""
    chosen: list[Chosen]
    meanings: list[File]
    """Tables of functions."""
    rest: list[Compacted]

    @classmethod
    def empty(cls) -> "SeriesPlan":
        return cls([], [], [], [])

    def add(self, hour: Compacted, files: Sequence[File], spans: Spans) -> None:
        self.hours.append(hour)
        hourly = hour.manifest.hourly if isinstance(hour, CompactedHour) else None
        if hourly and hourly.files_of(files[0].table)[:1] == files[:1]:  # they number functions
            files = (*files, *hourly.files_of(FUNCTIONS))
        if self.chosen and self.chosen[-1].files == tuple(files):  # that of a day, read once
            spans = join_spans([*self.chosen.pop().spans, *spans])
        self.chosen.append(Chosen(tuple(files), spans))
        self.meanings.extend(_meanings(hour))


def plan_totals(hours: Iterable[Compacted]) -> SeriesPlan:
    """Choose the files with the totals of hours: whole hours have series."""
    plan = SeriesPlan.empty()
    for hour in hours:
        for piece in _pieces(hour, HOUR_S * NS_PER_S):
            files = _rollups_of(piece, FUNCTIONS_1H) if _is_aligned(piece, HOUR_S) else ()
            if files:
                plan.add(piece, files, _spans_of(piece))
            else:
                plan.rest.append(piece)
    return plan


def plan_self(hours: Iterable[Compacted], *, has_groups: bool) -> SeriesPlan:
    """Choose the files with the self samples of hours by host, or by group if there are groups."""
    plan = SeriesPlan.empty()
    daily = GROUPS_1D if has_groups else FUNCTIONS_1D
    for _, group in itertools.groupby(hours, lambda hour: hour.name[:10]):
        theirs = list(group)
        day = _whole_day(theirs)
        files = day.files_of(daily) if day is not None else ()
        if day is not None and files:
            start_s = start_s_of(day.day)
            plan.hours.extend(theirs)
            plan.chosen.append(Chosen(files, ((start_s, start_s + 1),)))
            plan.meanings.extend(day.files_of(FUNCTIONS))
            continue
        for hour in theirs:
            _plan_hour(plan, hour, has_groups=has_groups)
    return plan


def _plan_hour(plan: SeriesPlan, hour: Compacted, *, has_groups: bool) -> None:
    if isinstance(hour, CompactedDay):
        plan.rest.append(hour)
        return
    hourly = hour.manifest.hourly if hour.manifest.has_hourly else None
    by_group = hourly.files_of(GROUPS_1H) if hourly and has_groups and hour.is_whole else ()
    if by_group:
        plan.add(hour, by_group, (seconds_of(hour.window),))
        return
    finest = hourly.files_of(FUNCTIONS_10M) if hourly else ()
    for piece in _pieces(hour, _TEN_MINUTES_NS):
        if finest and _is_aligned(piece, 600):
            plan.add(piece, finest, (seconds_of(piece.window),))
        else:
            plan.rest.append(piece)


def _whole_day(hours: Sequence[Compacted]) -> DayManifest | None:
    """Return the rollup of a day, if some hours are all that it holds."""
    first = hours[0]
    day = first.manifest if isinstance(first, CompactedDay) else first.day
    if day is None:
        return None
    spans: list[tuple[int, int]] = []
    for hour in hours:
        mine = hour.manifest if isinstance(hour, CompactedDay) else hour.day
        if mine is not day:
            return None
        spans += _spans_of(hour)
    is_all = sum(end - start for start, end in join_spans(spans)) == HOUR_S * len(day.hours)
    return day if is_all else None


def _spans_of(hour: Compacted) -> Spans:
    windows = hour.held if isinstance(hour, CompactedDay) else (hour.window,)
    return join_spans(map(seconds_of, windows))


def _rollups_of(hour: Compacted, table: str) -> tuple[File, ...]:
    """Return the files of a table from the day of an hour, or from the hour."""
    if isinstance(hour, CompactedDay):
        return hour.manifest.files_of(table)
    files = hour.day.files_of(table) if hour.day is not None else ()
    hourly = hour.manifest.hourly if hour.manifest.has_hourly else None
    return files or (hourly.files_of(table) if hourly else ())


def _meanings(hour: Compacted) -> tuple[File, ...]:
    return _rollups_of(hour, FUNCTIONS)


def _pieces(hour: Compacted, step_ns: int) -> Iterable[Compacted]:
    """Cut an hour into what begins and ends with steps, and what is before and after that."""
    start_ns = -(-hour.window.start_ns // step_ns) * step_ns
    end_ns = hour.window.end_ns // step_ns * step_ns
    if start_ns >= end_ns:
        yield hour
        return
    edges = (hour.window.start_ns, start_ns, end_ns, hour.window.end_ns)
    for window in itertools.starmap(Window, itertools.pairwise(edges)):
        piece = hour.cut(window) if window.start_ns < window.end_ns else None
        if piece is not None:
            yield piece


def _is_aligned(hour: Compacted, step_s: int) -> bool:
    step_ns = step_s * NS_PER_S
    return hour.window.start_ns % step_ns == 0 and hour.window.end_ns % step_ns == 0


@dataclass(frozen=True, slots=True)
class FunctionSeries:
    """Reads functions of windows; of objects that are not compacted, from their own totals."""

    parts: Parts

    @property
    def blocks(self) -> Blocks:
        return self.parts.blocks

    @property
    def hasher(self) -> Hasher:
        return self.parts.decoder.hasher

    def is_used(self, window: Window, labels: Iterable[str]) -> bool:
        """Return whether a window has so much that it is read from series; they have few labels."""
        if not {*ROLLUP_LABELS, _HOST}.issuperset(labels):
            return False
        hours = self.parts.listing.at(window).hours
        if any(isinstance(hour, CompactedDay) for hour in hours):
            return True
        return sum(map(_rows_inside, hours)) > _MANY_ROWS

    def read_totals(
        self, window: Window, selector: Selector, *, has_heads: bool = True
    ) -> Iterator[Part[FunctionTotals]]:
        """Return self and total of the functions of a window by the labels that rollups keep.

        The selector has no other labels, and not `host`. Without heads, parts that are read from
        series say nothing of their objects.
        """
        listed = self.parts.listing.at(window)
        yield from skipped_parts(listed.skipped)
        yield from self._totals(listed.hours, selector, has_heads=has_heads)
        yield from self._of_objects(listed, window)

    def read_self(
        self,
        window: Window,
        selector: Selector,
        groups: HostGroups | None,
        *,
        has_names: bool = True,
    ) -> Iterator[Part[FunctionTotals]]:
        """Return the self samples of functions by host, or by group of hosts. Totals are 0.

        Without names, series tell functions by their hashes alone.
        """
        listed = self.parts.listing.at(window)
        yield from skipped_parts(listed.skipped)
        yield from self._self_samples(listed.hours, selector, groups, has_names=has_names)
        for part in self._of_objects(listed, window):
            yield part.derive(lambda totals: _without_totals(totals.filter(selector), groups))

    def _of_objects(self, listed: Listed, window: Window) -> Iterator[Part[FunctionTotals]]:
        spans = self.parts.spans(listed.objects, window)
        return self.parts.read_spans(self.parts.function_totals, spans)

    def _totals(
        self, hours: Sequence[Compacted], selector: Selector, *, has_heads: bool
    ) -> list[Part[FunctionTotals]]:
        plan = plan_totals(hours)
        parts = [self._totals_of(plan, selector, has_heads=has_heads)] if plan.hours else []
        hasher = self.hasher
        for hour in plan.rest:
            part = self.blocks.rolled_up(hour, selector)
            parts.append(part.derive(lambda columns: FunctionTotals.of(columns, hasher)))
        return parts

    def _totals_of(
        self, plan: SeriesPlan, selector: Selector, *, has_heads: bool
    ) -> Part[FunctionTotals]:
        heads = plan_heads(plan.hours, is_coarse=True) if has_heads else []
        labels = _label_files(plan.hours)
        files = [file for each in (*plan.chosen, *heads) for file in each.files]

        def read(local: "_Local") -> FunctionTotals | None:
            labelled = [local[file] for file in labels]
            sets, _ = choose_ids(labelled, selector)
            check = self.blocks.check
            times: Times | None = _head_of(plan.hours)
            if has_heads:
                slices = slices_of(heads, local)
                times = read_times(slices, Lines.SECOND, sets=sets, check=check)
            if times is None:
                return None
            sums = read_totals(slices_of(plan.chosen, local), sets=sets, check=check)
            known = _read_meanings(plan, local, sums, check)
            return _of_sums(times, sums, known, _names_of(sums.sets, read_label_sets(labelled)))

        return self.blocks.read(plan.hours, [*files, *labels, *plan.meanings], read)

    def _self_samples(
        self,
        hours: Sequence[Compacted],
        selector: Selector,
        groups: HostGroups | None,
        *,
        has_names: bool,
    ) -> list[Part[FunctionTotals]]:
        chooses_hosts = any(each.name == _HOST for each in selector.matchers)
        plan = plan_self(hours, has_groups=groups is not None and not chooses_hosts)
        if not has_names:
            plan.meanings.clear()
        parts = [self._self_of(plan, selector, groups, has_names=has_names)] if plan.hours else []
        return [*parts, *(self._leaves_of(hour, selector, groups) for hour in plan.rest)]

    def _self_of(
        self,
        plan: SeriesPlan,
        selector: Selector,
        groups: HostGroups | None,
        *,
        has_names: bool,
    ) -> Part[FunctionTotals]:
        labels = _label_files(plan.hours)
        files = [file for each in plan.chosen for file in each.files]

        def read(local: "_Local") -> FunctionTotals:
            labelled = [local[file] for file in labels]
            sets, hosts = choose_ids(labelled, selector)
            sums = read_self(
                slices_of(plan.chosen, local),
                is_grouped=groups is not None,
                sets=sets,
                hosts=hosts,
                check=self.blocks.check,
            )
            known = KnownFunctions.nameless(sums.functions)
            if has_names:
                known = _read_meanings(plan, local, sums, self.blocks.check)
            if groups is None:
                names = _names_of(sums.units, read_label_sets(labelled))
            else:
                units = np.unique(sums.units).tolist()
                names = {unit: ((_HOST, group_name(unit)),) for unit in units}
            return _of_sums(_head_of(plan.hours), sums, known, names, is_by_unit=True)

        return self.blocks.read(plan.hours, [*files, *labels, *plan.meanings], read)

    def _leaves_of(
        self, hour: Compacted, selector: Selector, groups: HostGroups | None
    ) -> Part[FunctionTotals]:
        detail, dictionary = files_of(hour, DETAIL), files_of(hour, *DICTIONARY)

        def read(local: "_Local") -> FunctionTotals:
            if not detail:
                raise ProfileError("its samples by host have expired")
            meanings = [local[file] for file in dictionary]
            sets, hosts = choose_ids(meanings, selector)
            leaves = read_leaves(
                list(local.values()),
                seconds_of(hour.window),
                sets=sets,
                hosts=hosts,
                check=self.blocks.check,
            )
            functions = LocationFunctions.of(leaves.locations, self.hasher)
            units, of_line = np.unique(leaves.hosts, return_inverse=True)
            rows, counts = fold(of_line, functions.innermost[leaves.leaves], leaves.counts)
            sums = FunctionSums(
                units[rows[:, 0]],
                np.zeros(len(rows), np.uint64),
                functions.hashes[rows[:, 1]],
                counts,
            )
            known = KnownFunctions(functions.texts, functions.hashes, functions.table)
            names = _names_of(units, read_label_sets(meanings))
            found = _of_sums(_head_of([hour]), sums, known, names, is_by_unit=True)
            return found if groups is None else groups.grouped(found)

        return self.blocks.read([hour], [*detail, *dictionary], read)


_Local = Mapping[File, LocalFile]


def _rows_inside(hour: Compacted) -> int:
    """Return about how many rows of detail an hour has in its window."""
    length_ns = hour.window.end_ns - hour.window.start_ns
    return rows_of_detail(hour) * length_ns // (HOUR_S * NS_PER_S)


def _without_totals(totals: FunctionTotals, groups: HostGroups | None) -> FunctionTotals:
    """Return self samples by host or group."""
    by_unit = groups.grouped(totals) if groups is not None else totals.by((_HOST,))
    counts = by_unit.counts.astype(np.int64) * np.array([1, 0, 1, 0])
    return replace(by_unit, counts=counts)


def _label_files(hours: Sequence[Compacted]) -> list[File]:
    """Return files with the label sets and hosts of hours."""
    heads = plan_heads(hours, is_coarse=True)
    files = (file for each in heads for file in each.files if file.table == "label_sets")
    return list(dict.fromkeys(files))


def _read_meanings(
    plan: SeriesPlan,
    local: "_Local",
    sums: FunctionSums,
    check: Callable[[], None] | None,
) -> KnownFunctions:
    files = [local[file] for file in dict.fromkeys(plan.meanings)]
    return read_functions(files, sums.functions, check)


def _names_of(ids: Hashes, label_sets: dict[int, Labels]) -> dict[int, Labels]:
    """Return the label sets of some ids.

    Raises:
        ProfileError: one is missing.
    """
    try:
        return {number: label_sets[number] for number in np.unique(ids).tolist()}
    except KeyError:
        raise ProfileError("cannot read blocks: a label set is missing") from None


def _head_of(hours: Sequence[Compacted]) -> Times:
    """Return what hours measure and when; nothing of their objects."""
    nothing = np.zeros((0, 2), np.int64)
    return Times(
        type=hours[0].manifest.type,
        unit=next((hour.manifest.unit for hour in hours if hour.manifest.unit), ""),
        window=Window(hours[0].window.start_ns, hours[-1].window.end_ns),
        accounting=Accounting(),
        objects=np.zeros((0, len(OBJECT_FIELDS)), np.int64),
        label_sets=(),
        times=nothing,
        time_counts=nothing,
        present_sets=(),
        presence=np.zeros((0, 3), np.int64),
    )


def _of_sums(
    head: Times,
    sums: FunctionSums,
    known: KnownFunctions,
    names: dict[int, Labels],
    *,
    is_by_unit: bool = False,
) -> FunctionTotals:
    """Return sums by label set, or by unit, as function totals. `names` are those of the keys."""
    keys = sums.units if is_by_unit else sums.sets
    ids = np.array(list(names), dtype=np.uint64)
    order = np.argsort(ids)
    counts = np.zeros((len(keys), 4), dtype=np.int64)
    counts[:, 0], counts[:, 2] = sums.counts[:, 1], sums.counts[:, 0]
    if sums.counts.shape[1] == 4:
        counts[:, 1], counts[:, 3] = sums.counts[:, 3], sums.counts[:, 2]
    rows = np.stack(
        [
            order[np.searchsorted(ids[order], keys)],
            np.searchsorted(known.hashes, sums.functions),
        ],
        axis=1,
    )
    return FunctionTotals(
        type=head.type,
        unit=head.unit,
        window=head.window,
        accounting=head.accounting,
        objects=head.objects,
        label_sets=head.label_sets,
        times=head.times,
        time_counts=head.time_counts,
        service_sets=tuple(names.values()),
        texts=known.texts,
        function_hashes=known.hashes,
        functions=known.table,
        rows=rows,
        counts=counts,
    )
