"""Query: any window and selection of a store, as one profile, a timeline or a table of functions.

A window is half-open. An object counts as a whole when its start lies inside. Objects are aligned
to their length, so aligned windows neither lose nor double any. What is compacted is read from the
files of its hour; other objects of the window are fetched, each is decoded once, and the result is
kept in a cache on disk.

The label `host` comes from the object's accounting where its rows have none. An object that is
damaged, of a later schema or of another type is named in the answer and never stops it.
"""

import copy
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from storage.blocks.block import ROLLUP_LABELS
from storage.blocks.times import Lines
from storage.columns import Columns
from storage.merging import merge_columns
from storage.objects.keys import CPU, NS_PER_S
from storage.objects.tenant import TenantStore
from storage.profile import Accounting, ProfileBuilder, Window
from storage.query.cache import DEFAULT_LIMIT_BYTES
from storage.query.coverage import Coverage, choose_parts, has_host, merging_early
from storage.query.decoding import DecodeCounts
from storage.query.function_series import FunctionSeries, HostGroups
from storage.query.function_totals import (
    PROCESS_LABELS,
    FunctionTotal,
    FunctionTotals,
    SelfSamples,
    merge_function_totals,
)
from storage.query.listing import Listing, overlap
from storage.query.naming import Naming
from storage.query.parts import Parts, open_parts
from storage.query.presence import ServicePresence, make_presence
from storage.query.resolve import KnownNames
from storage.query.timeline import (
    Timeline,
    choose_lines,
    choose_step,
    is_coarse,
    make_timeline,
)
from storage.query.wide import Wide
from storage.query.workers import Place, Workers
from storage.selector import EMPTY, Selector


@dataclass(frozen=True, slots=True)
class Answer:
    profile: Columns
    coverage: Coverage


@dataclass(frozen=True, slots=True)
class Functions:
    """A table of functions by label set, largest self first."""

    type: str
    unit: str
    rows: tuple[FunctionTotal, ...]
    total: int
    samples: int
    coverage: Coverage


class _Resolved:
    """The names of some windows, read once."""

    def __init__(self, windows: tuple[Window, ...]) -> None:
        self.windows = windows
        self._by_type: dict[str, Naming] = {}
        self._lock = threading.Lock()

    def read(self, parts: Parts) -> Naming:
        type_ = parts.listing.type
        with self._lock:
            if type_ not in self._by_type:
                self._by_type[type_] = Naming.of(parts, self.windows)
            return self._by_type[type_]


class Query:
    """Reads a store. Safe to use from several threads; several may share a cache folder.

    With `workers` (see `storage.query.workers`) objects are decoded in these processes, else in
    threads of this one, which Python runs one at a time. With `executor`, its workers read the
    parts of wide windows (see `storage.query.wide`), with the same result.

    Attributes:
        blocks: the compacted hours, for what is asked of them alone.
    """

    def __init__(
        self,
        store: TenantStore,
        cache_folder: Path,
        *,
        cache_bytes: int = DEFAULT_LIMIT_BYTES,
        now_ns: Callable[[], int] = time.time_ns,
        workers: Workers | None = None,
        executor: Executor | None = None,
    ) -> None:
        parts = open_parts(store, cache_folder, cache_bytes, now_ns, workers)
        self._decoder, self.blocks = parts.decoder, parts.blocks
        if executor is not None:

            def place() -> Place:
                return Place(store.store, store.tenant, parts.decoder.key(), cache_folder)

            parts = replace(parts, elsewhere=Wide(executor, place))
        self._parts = parts
        self._resolved = _Resolved(())

    def interruptible(self, check: Callable[[], None]) -> "Query":
        """Return a copy of this query that calls `check` between objects: what it raises ends it.

        Copies share the cache and what they know of the store.
        """
        return self._reading(self._parts.interruptible(check))

    def watched(self, watch: Callable[[int], None]) -> "Query":
        """Return a copy of this query that reports how many objects each decoded part has.

        `watch` is called with 0 at the end of each reading. Several threads call it.
        """
        progress = replace(self._parts.progress, report=watch)
        return self._reading(replace(self._parts, progress=progress))

    def believing(self, listing_s: float) -> "Query":
        """Return a copy of this query that lists a window again only after so many seconds.

        The panels of a page ask for one window at once, and listing an object store takes longer
        than an answer that is kept.
        """
        return self._listing_as(replace(self._parts.listing, reuse_s=listing_s))

    def listing(self, window: Window) -> "Query":
        """Return a copy of this query that lists the hours of a window once."""
        return self._listing_as(self._parts.listing.once(window))

    def resolving(self, windows: Sequence[Window]) -> "Query":
        """Return a copy of this query that names locations as all of some windows know them.

        So tables of functions of several windows can be compared: a location that only one of them
        has a name for is the same function in all. Else each window is named by itself.
        """
        other = copy.copy(self)
        other._resolved = _Resolved(tuple(windows))  # noqa: SLF001 - a copy of this very object
        return other

    def _naming(self, parts: Parts, window: Window) -> Naming:
        windows = self._resolved.windows
        if any(w.start_ns <= window.start_ns and window.end_ns <= w.end_ns for w in windows):
            return self._resolved.read(parts)
        return Naming.of(parts, (*windows, window))

    def _parts_of(self, type_: str) -> Parts:
        return replace(self._parts, listing=self._parts.listing.of_type(type_))

    def _listing_as(self, listing: Listing) -> "Query":
        return self._reading(replace(self._parts, listing=listing))

    def _reading(self, parts: Parts) -> "Query":
        other = copy.copy(self)
        other._parts = parts  # noqa: SLF001 - a copy of this very object
        return other

    @property
    def counts(self) -> DecodeCounts:
        """What happened to workers since this query was made; its copies count together."""
        return self._decoder.counts

    def has_data(self, window: Window) -> bool:
        """Return whether any data start inside a window; none are read."""
        listed = self._parts.listing.at(window)
        blocks = self._parts.blocks
        return bool(listed.objects) or not all(map(blocks.is_empty, listed.hours))

    def nearest(self, window: Window) -> list[Window]:
        """Return when the last data before a window and the first ones after it are from."""
        return self._parts.listing.nearest(window)

    def span(self) -> Window | None:
        """Return when the data of the store begin and end; None if there are none."""
        return self._parts.listing.span()

    def fingerprint(
        self,
        window: Window,
        type: str = CPU,  # noqa: A002
        labels: frozenset[str] | None = None,
    ) -> str:
        """Name the data of a window: as long as the name is the same, so is every answer.

        `labels` are those that `profile` is asked for.
        """
        return self._parts_of(type).name_of_window(window, labels)

    def profile(
        self,
        window: Window,
        selector: Selector = EMPTY,
        type: str = "cpu",  # noqa: A002 - the field's word
        labels: frozenset[str] | None = None,
    ) -> Answer:
        """Merge what was sampled in a window under the selected labels.

        `labels` are those of the rows that the caller looks at, None: all. With few of them a long
        window of a large fleet may be read from rollups, which fold rare stacks into `[rest]`.
        """
        early = merging_early(merge_columns, selector)
        parts = self._parts_of(type).of_hosts(selector, labels or ())
        wanted = None if labels is None else labels.union(selector.names)
        read = parts.read_profile(window, selector, wanted)
        columns, coverage = choose_parts(read, window, selector, type, early)
        chosen = [each.filter(selector) for each in columns]
        if not chosen:
            unit = "nanoseconds" if type == "cpu" else "count"
            empty = ProfileBuilder(period_ns=1, type=type, unit=unit)
            return Answer(Columns.of(empty.build(window, Accounting())), coverage)
        # What is merged already holds nothing that its rows do not need.
        is_merged = len(chosen) == 1 and len(chosen[0].rows) == len(columns[0].rows)
        return Answer(chosen[0] if is_merged else merge_columns(chosen), coverage)

    def timeline(
        self,
        window: Window,
        selector: Selector = EMPTY,
        step_ns: int | Callable[[int], int] = 60 * NS_PER_S,
        by: Sequence[str] = (),
        *,
        type: str = "cpu",  # noqa: A002
        is_aligned: bool = False,
    ) -> Timeline:
        """Add up samples and values per step, one series for each combination of `by`.

        All of an object counts in the step in which it begins. If `step_ns` is a function, it is
        called with the length of the longest object, 0 if there is none. Steps begin with the
        window, or aligned: at multiples of their length.

        Raises:
            ValueError: the step is not positive.
        """
        labels = frozenset((*by, *selector.names))
        of_type = self._parts_of(type).of_hosts(selector, by)
        length_ns = choose_step(step_ns)
        for may_be_coarse in (True, False):
            coarse = may_be_coarse and is_coarse(window, length_ns, is_aligned=is_aligned)
            lines = choose_lines(window, length_ns, labels, is_aligned=is_aligned)
            read = of_type.read_times(window, selector, labels, lines, is_coarse=coarse)
            parts, coverage = choose_parts(read, window, selector, type)
            length_ns = choose_step(step_ns, parts)
            fits = choose_lines(window, length_ns, labels, is_aligned=is_aligned) is lines
            if fits and (not coarse or is_coarse(window, length_ns, is_aligned=is_aligned)):
                break
        return make_timeline(
            parts,
            coverage,
            selector,
            step_ns=length_ns,
            by=by,
            type_=type,
            is_aligned=is_aligned,
        )

    def functions(
        self,
        window: Window,
        selector: Selector = EMPTY,
        by: Sequence[str] = ("service",),
        type: str = "cpu",  # noqa: A002
        limit: int | None = None,
    ) -> Functions:
        """Return what each function cost under each combination of `by`, at most `limit` rows."""
        merged, coverage = self.function_totals(window, selector, by, type)
        if merged is None:
            return Functions(type, "nanoseconds" if type == "cpu" else "count", (), 0, 0, coverage)
        samples, total = merged.time_counts.sum(axis=0).tolist()
        rows = tuple(merged.function_totals(limit))
        return Functions(type, merged.unit, rows, total, samples, coverage)

    def function_totals(
        self,
        window: Window,
        selector: Selector = EMPTY,
        by: Sequence[str] = ("service",),
        type: str = "cpu",  # noqa: A002
    ) -> tuple[FunctionTotals | None, Coverage]:
        """Return the same as arrays; None if the window holds nothing."""
        parts, coverage = self.function_totals_by_part(window, selector, by, type)
        return (merge_function_totals(parts).by(by) if parts else None), coverage

    def function_totals_by_part(
        self,
        window: Window,
        selector: Selector = EMPTY,
        by: Sequence[str] = ("service",),
        type: str = "cpu",  # noqa: A002
    ) -> tuple[list[FunctionTotals], Coverage]:
        """Return the function totals of the parts of a window.

        Stacks are read only for labels of single processes (PROCESS_LABELS), which kept function
        totals leave out.
        """
        parts = self._parts_of(type).of_hosts(selector, by)
        parts = replace(parts, listing=parts.listing.held(window))
        if PROCESS_LABELS & {*selector.names, *by}:
            read = parts.read(parts.selected_columns(selector), window)
            stacks, coverage = choose_parts(read, window, selector, type)
            if not stacks:
                return [], coverage
            left_out, hasher = PROCESS_LABELS.difference(by), self._decoder.hasher
            naming = self._naming(parts, window)
            chosen = (naming.named(each.filter(selector)) for each in stacks)
            return [FunctionTotals.of(each, hasher, left_out) for each in chosen], coverage
        early = merging_early(merge_function_totals, selector)
        series = FunctionSeries(parts)
        if "host" not in {*selector.names, *by} and series.is_used(
            window, selector.names.union(by)
        ):
            kept = series.read_totals(window, selector)
        else:
            kept = parts.read(self._naming(parts, window).function_totals(), window)
        totals, coverage = choose_parts(kept, window, selector, type, early)
        return [each.filter(selector) for each in totals], coverage

    def is_read_from_series(self, window: Window, labels: Iterable[str] = ()) -> bool:
        """Return whether functions of a window are read from what compaction has added up.

        That is so if there is much of it, and only if series have the labels.
        """
        return FunctionSeries(self._parts).is_used(window, labels)

    def host_groups(self) -> HostGroups:
        """Return the groups of hosts that `self_by_host` can add hosts up to."""
        return HostGroups(self._decoder.hasher)

    def self_by_host(
        self, window: Window, selector: Selector, groups: HostGroups | None = None
    ) -> tuple[FunctionTotals | None, Coverage]:
        """Return the self samples of each function by host, or by group of hosts, from series.

        Totals are 0. The selector has labels that series have. None if the window holds nothing.
        """
        parts = self._parts.of_hosts(selector)
        parts = replace(parts, listing=parts.listing.held(window))
        early = merging_early(merge_function_totals, EMPTY)
        read = FunctionSeries(parts).read_self(window, selector, groups)
        found, coverage = choose_parts(read, window, EMPTY, CPU, early)
        return (merge_function_totals(found) if found else None), coverage

    def self_samples_from_series(
        self, window: Window, selector: Selector, groups: HostGroups | None = None
    ) -> list[SelfSamples]:
        """Return what `self_by_host` does, part by part: functions are known by their hashes alone.

        So they need not be looked up, as for windows that are compared with one whose functions are
        known.
        """
        parts = self._parts.of_hosts(selector)
        read = FunctionSeries(parts).read_self(window, selector, groups, has_names=False)
        found, _ = choose_parts(read, window, EMPTY, CPU)
        return [each.self_samples() for each in found]

    def totals_of_hosts(
        self, window: Window, selector: Selector
    ) -> tuple[FunctionTotals | None, Coverage]:
        """Return self and total of each function of all hosts together, from series.

        The selector has labels that series have, and not `host`. None if the window holds nothing.
        What is known of objects is not read: neither it nor the coverage says anything of them.
        """
        parts = self._parts
        parts = replace(parts, listing=parts.listing.held(window))
        early = merging_early(merge_function_totals, selector)
        read = FunctionSeries(parts).read_totals(window, selector, has_heads=False)
        found, coverage = choose_parts(read, window, selector, CPU, early)
        chosen = [each.filter(selector) for each in found]
        return (merge_function_totals(chosen).by(()) if chosen else None), coverage

    def self_samples(
        self, windows: Sequence[Window], selector: Selector = EMPTY
    ) -> Iterator[tuple[int, SelfSamples]]:
        """Return the self samples of each function in each of some windows, part by part.

        Each comes with the number of its window. Functions are known by their hashes alone. Windows
        that begin inside an hour are answered from the whole hours that are kept. A location has
        the name it has in the windows of `resolving`, else the best that these windows know.
        """
        if PROCESS_LABELS & {*selector.names}:
            query = self.resolving((*self._resolved.windows, *windows))
            for i, window in enumerate(windows):
                for totals in query.function_totals_by_part(window, selector, ("host",))[0]:
                    yield i, totals.self_samples()
            return
        known, found = KnownNames(), []
        for part in self._parts.read_around(self._parts.self_samples, windows):
            value = part.value
            if value is None or value.type != "cpu" or not has_host(value, selector):
                continue
            for i, window in enumerate(windows):
                if overlap(window, value.window):
                    inside = value.inside(window, selector)
                    known.add(inside.names)
                    found.append((i, inside))
        shown = self._resolved.read(self._parts).known
        for i, samples in found:
            functions, _ = known.functions(samples.names.location_hashes)
            theirs, is_shown = shown.functions(samples.names.location_hashes)
            yield i, samples.of_functions(np.where(is_shown, theirs, functions))

    def presence(self, window: Window, selector: Selector = EMPTY) -> ServicePresence:
        """Return for how long each selected service was there in each object."""
        of_hosts = self._parts.of_hosts(selector)
        read = of_hosts.read_around(of_hosts.times, [window])
        parts, coverage = choose_parts(read, window, selector, "cpu")
        return make_presence(parts, coverage, selector)

    def presence_by_host(
        self, window: Window, selector: Selector = EMPTY, edges_ns: Iterable[int] = ()
    ) -> ServicePresence:
        """Return the same with a line for each host where there are many objects.

        There is one for each time between `edges_ns` in which the host has objects. Ten minutes
        count as a whole for the time in which their first object begins.
        """
        of_hosts, labels = self._parts.of_hosts(selector), selector.names
        edges_s = sorted({-(-edge // NS_PER_S) for edge in edges_ns})
        read = of_hosts.read_times(
            window, selector, labels, Lines.HOST, is_coarse=True, edges_s=edges_s
        )
        parts, coverage = choose_parts(read, window, selector, "cpu")
        return make_presence(parts, coverage, selector)

    def labels(
        self,
        window: Window,
        selector: Selector = EMPTY,
        names: Iterable[str] = ROLLUP_LABELS,
    ) -> dict[str, dict[str, int]]:
        """Return the names of labels, their values, and the samples each value has.

        If a window has many objects, only the labels that rollups keep and the host need be among
        them, and these `names`.
        """
        found: dict[str, dict[str, int]] = {}
        parts = self._parts.of_hosts(selector)
        asked = selector.names.union(names)
        is_coarse = asked <= {*ROLLUP_LABELS, "host"}
        read = parts.read_times(window, selector, asked, Lines.LABELS, is_coarse=is_coarse)
        for part in read:
            if part.value is None:
                continue
            chosen = part.value
            samples = np.zeros(len(chosen.label_sets), dtype=np.int64)
            np.add.at(samples, chosen.times[:, 1], chosen.time_counts[:, 0])
            for labels, count in zip(chosen.label_sets, samples.tolist(), strict=True):
                for name, value in labels if count else ():
                    values = found.setdefault(name, {})
                    values[value] = values.get(value, 0) + count
        return found

    def label_values(self, window: Window, name: str, selector: Selector = EMPTY) -> dict[str, int]:
        """Return the values of one label and the samples each has, most first."""
        values = self.labels(window, selector, (name,)).get(name, {})
        return dict(sorted(values.items(), key=lambda pair: (-pair[1], pair[0])))
