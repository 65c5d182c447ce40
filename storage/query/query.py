"""Query: any window and selection of a store, as one profile, a timeline or a table of functions.

A window is half-open. An object counts as a whole when its start lies inside: objects are aligned
to their length, so a window that is too loses and doubles nothing. Only objects that the window
asks for are fetched, each is decoded once, and what was decoded is kept in a cache on disk.

The objects of one host and one hour (else of ten minutes) that lies wholly in the window, and is
past for long enough that nothing more is expected, are kept merged as well: 24 hours of a host are
then 24 files and not 1,440. A late object gives another name to that file, so it is never out of
date.

The label `host` comes from the object's accounting where its rows have none. An object that is
damaged, of a later schema or of another type is named in the answer and never stops it.
"""

import contextlib
import copy
import ctypes
import functools
import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import (
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
)
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from storage.columns import OBJECT_FIELDS, Columns, Times, key_starts_ns
from storage.formats import pprof_arrays
from storage.hashing import Hasher
from storage.merging import join_lines, merge_columns, merge_label_sets
from storage.objects.open import (
    DEFAULT_TENANT,
    NS_PER_S,
    ObjectKey,
    ObjectStore,
    StoredObject,
    StoreError,
    content16,
    list_window,
)
from storage.profile import (
    ALWAYS,
    Accounting,
    Host,
    Integers,
    Labels,
    Profile,
    ProfileBuilder,
    ProfileError,
    Window,
)
from storage.query.cache import DEFAULT_LIMIT_BYTES, DecodedCache, pack, unpack
from storage.query.function_totals import (
    PROCESS_LABELS,
    FunctionTotal,
    FunctionTotals,
    SelfSamples,
    merge_function_totals,
)
from storage.query.self_samples import ObjectSelfSamples, join_self_samples
from storage.selector import Selector

HOUR_NS = 3600 * NS_PER_S
_SPANS_NS = (HOUR_NS, HOUR_NS // 6)
"""What is kept merged, of one host: whole hours, and of others their parts. The last hour begins
and ends inside one, and is what most people ask for."""
_SETTLED_AFTER_NS = 300 * NS_PER_S
"""After its end, so long does a span wait for late objects before it is kept merged."""
_RECENT_NS = HOUR_NS * 5 // 2
"""Windows of the last hour begin inside of ten minutes, as does one before it that it is compared
with."""
_PREPARED_SHARE = 0.75
"""Of the cache, for what nobody has asked for yet."""
_FETCHES = 4
"""Objects fetched at a time; so many are also decoded one by one, or wait as chunks."""
_CHUNK = 10
"""Objects that one worker decodes and merges: ten minutes at once are then merged only there."""
_LATE_AFTER = 6
"""Chunks that are decoded before workers are started: a second's work."""
_REST_S = 2.0
"""A worker that does nothing for so long gives memory back."""
_FOLDED_ROWS = 600_000
"""Parts of so many rows are merged before more are read: else a day of 3 hosts took 810 MB at once,
and takes 280."""
_FAILURES_REMEMBERED = 10_000
_ENDING = {signal.SIGINT, signal.SIGTERM}
EMPTY = Selector()

_Done = TypeVar("_Done")
_KINDS = (Columns, FunctionTotals, Times, ObjectSelfSamples)
_Kept = TypeVar("_Kept", Columns, FunctionTotals, Times, ObjectSelfSamples)
_Made = TypeVar("_Made", Columns, FunctionTotals, Times)
_Rows = TypeVar("_Rows", Columns, FunctionTotals)


class Skipped(NamedTuple):
    """An object that is not in the answer, and why."""

    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class Coverage:
    """What an answer is made of. The accounting is that of whole objects, whatever the selector."""

    window: Window
    objects: int
    accounting: Accounting
    skipped: tuple[Skipped, ...]
    is_lasting: bool = True
    """Asking again gives the same: nothing was skipped for a reason that may pass."""

    @property
    def hosts(self) -> tuple[Host, ...]:
        return self.accounting.hosts


@dataclass(frozen=True, slots=True)
class Answer:
    profile: Profile
    coverage: Coverage


class Series(NamedTuple):
    """One line of a timeline; what lies between two steps is in the earlier one."""

    labels: Labels
    samples: Integers
    values: Integers


@dataclass(frozen=True, slots=True)
class Timeline:
    """Sums per step. Step i begins at `start_ns + i * step_ns`; the largest series comes first."""

    type: str
    unit: str
    start_ns: int
    step_ns: int
    series: tuple[Series, ...]
    totals: dict[str, Integers]
    """OBJECT_FIELDS from `nonidle_ns` on, added up over the objects of each step."""
    covered_ns: Integers
    """For how long of each step at least one host was profiled: what makes values a rate."""
    coverage: Coverage


@dataclass(frozen=True, slots=True)
class ServicePresence:
    """Which services were there, object by object, sampled or not.

    `objects` has a line (start_ns, end_ns) per object, `rows` a line (object, label set,
    present_ns) for each of its services, labelled as in `Accounting.services` and with `host`.
    """

    objects: Integers
    label_sets: tuple[Labels, ...]
    rows: Integers
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


class Prepared(NamedTuple):
    """A part of a window that was decoded and kept, and how many objects are left to decode."""

    objects: int
    left: int


_LOOK_AROUND_S = (3600, 86_400, 30 * 86_400)
"""How far to look for the nearest data, step by step, before the whole store is listed."""


class Query:
    """Reads a store. Safe to use from several threads; several may share a cache folder.

    With `workers` (see `start_workers`) objects are decoded in these processes, else in threads of
    this one, which Python runs one at a time.
    """

    def __init__(
        self,
        store: ObjectStore,
        cache_folder: Path,
        *,
        cache_bytes: int = DEFAULT_LIMIT_BYTES,
        tenant: str = DEFAULT_TENANT,
        now_ns: Callable[[], int] = time.time_ns,
        workers: Executor | None = None,
    ) -> None:
        self._store = store
        self._workers = workers
        self._tenant = tenant
        self._now_ns = now_ns
        self._cache = DecodedCache(cache_folder, cache_bytes)
        self._secret = self._cache.secret
        self._hasher = Hasher(self._secret)
        self._failures: dict[StoredObject, str] = {}
        self._turns = Turns()
        self._fetcher = ThreadPoolExecutor(_FETCHES, "fetch")
        self._believed_s = 0.0
        self._listings: dict[Window, tuple[float, list[tuple[ObjectKey, StoredObject]]]] = {}
        self._listed: tuple[Window, list[tuple[ObjectKey, StoredObject]]] | None = None
        self._unkept: dict[str, int] = {}
        self._check: Callable[[], None] = _go_on
        self._watch: Callable[[int], None] = _tell_nobody

    def interruptible(self, check: Callable[[], None]) -> "Query":
        """Return this same query, which calls `check` between objects: what it raises ends it."""
        other = copy.copy(self)
        other._check = check  # noqa: SLF001 - a copy of this very object
        return other

    def watched(self, watch: Callable[[int], None]) -> "Query":
        """Return a copy of this query that reports how many objects each decoded part has.

        Of none at the end of each reading. `watch` is called from several threads.
        """
        other = copy.copy(self)
        other._watch = watch  # noqa: SLF001 - a copy of this very object
        return other

    def believing(self, listing_s: float) -> "Query":
        """Return this same query, which lists a window again only after so many seconds.

        The panels of a page ask for one window at once, and a listing takes an object store longer
        than an answer that is kept.
        """
        other = copy.copy(self)
        other._believed_s = listing_s  # noqa: SLF001 - a copy of this very object
        return other

    def listing(self, window: Window) -> "Query":
        """Return a copy of this query that lists the hours of a window once."""
        other = copy.copy(self)
        (hours,) = _union([window], HOUR_NS)
        other._listed = (hours, list(self.objects(hours)))  # noqa: SLF001 - a copy of this very object
        return other

    def fingerprint(self, window: Window) -> str:
        """Name the objects of a window: as long as it is the same, so is every answer."""
        return self._name([_Object(key, stored) for key, stored in self.objects(window)])

    def profile(self, window: Window, selector: Selector = EMPTY, type: str = "cpu") -> Answer:  # noqa: A002 - the field's word
        """Merge what was sampled in a window and is asked for."""
        fold = _folding(merge_columns, selector)
        read = self._read(self._stacks, window)
        parts, coverage = _chosen(read, window, selector, type, fold)
        chosen = [part.filter(selector) for part in parts]
        if not chosen:
            unit = "nanoseconds" if type == "cpu" else "count"
            empty = ProfileBuilder(period_ns=1, type=type, unit=unit)
            return Answer(empty.build(window, Accounting()), coverage)
        # What is merged already holds nothing that its rows do not need.
        is_merged = len(chosen) == 1 and not selector.matchers
        merged = chosen[0] if is_merged else merge_columns(chosen)
        return Answer(merged.profile(), coverage)

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

        All of an object counts in the step in which it begins. A function for `step_ns` is told how
        long the longest object is, 0 where there is none. Steps begin with the window, or aligned:
        at multiples of their length.

        Raises:
            ValueError: the step is not positive.
        """
        parts, coverage = _chosen(self._read(self._times, window), window, selector, type)
        if callable(step_ns):
            lengths = [part.objects[:, 1] - part.objects[:, 0] for part in parts]
            step_ns = step_ns(max((int(each.max(initial=0)) for each in lengths), default=0))
        if step_ns <= 0:
            raise ValueError(f"cannot make a timeline of steps of {step_ns} ns")
        origin_ns = window.start_ns - (window.start_ns % step_ns if is_aligned else 0)
        count = -(-(window.end_ns - origin_ns) // step_ns)
        totals = {name: np.zeros(count, np.int64) for name in OBJECT_FIELDS[3:]}
        sums: dict[Labels, Integers] = {}
        intervals: list[tuple[int, int, int]] = []
        for part in parts:
            # An object may begin a fraction of a second before the whole second of its key.
            step = (part.objects[:, 0] - origin_ns) // step_ns
            step = np.clip(step, 0, count - 1)
            for i, name in enumerate(OBJECT_FIELDS[3:], start=3):
                np.add.at(totals[name], step, part.objects[:, i])
            intervals.extend(zip(step.tolist(), *part.objects[:, :2].T.tolist(), strict=True))
            _add_series(sums, part.filter(selector), step, by, count)
        series = [Series(labels, *sum_.T) for labels, sum_ in sums.items()]
        series.sort(key=lambda each: (-int(each.values.sum()), each.labels))
        unit = parts[0].unit if parts else "nanoseconds"
        covered = _covered_ns(intervals, count)
        return Timeline(type, unit, origin_ns, step_ns, tuple(series), totals, covered, coverage)

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
        """Return the same as arrays, and nothing where nothing is."""
        parts, coverage = self.parts(window, selector, by, type)
        return (merge_function_totals(parts).by(by) if parts else None), coverage

    def parts(
        self,
        window: Window,
        selector: Selector = EMPTY,
        by: Sequence[str] = ("service",),
        type: str = "cpu",  # noqa: A002
    ) -> tuple[list[FunctionTotals], Coverage]:
        """Return sums of parts of a window: who needs them under known names need not merge them.

        Stacks are read only for labels of single processes (PROCESS_LABELS), which sums leave out.
        """
        if PROCESS_LABELS & {*selector.names, *by}:
            read = self._read(self._stacks, window)
            stacks, coverage = _chosen(read, window, selector, type)
            left_out = PROCESS_LABELS.difference(by)
            parts = [
                FunctionTotals.of(part.filter(selector), self._hasher, left_out) for part in stacks
            ]
        else:
            fold = _folding(merge_function_totals, selector)
            sums, coverage = _chosen(
                self._read(self._function_totals, window), window, selector, type, fold
            )
            parts = [part.filter(selector) for part in sums]
        return parts, coverage

    def self_samples(
        self, windows: Sequence[Window], selector: Selector = EMPTY
    ) -> Iterator[tuple[int, SelfSamples]]:
        """Return what each function cost itself in each of some windows, part by part.

        Whatever hours they begin in, what is kept of whole hours answers them. Each part comes with
        the number of its window; whoever knows the functions by their hashes needs no name.
        """
        if PROCESS_LABELS & {*selector.names}:
            for i, window in enumerate(windows):
                for part in self.parts(window, selector, ("host",))[0]:
                    yield i, part.self_samples()
            return
        for loaded in self._read_around(ObjectSelfSamples, self._self_samples, windows):
            self_samples = loaded.value
            if (
                self_samples is None
                or self_samples.type != "cpu"
                or not _has_host(self_samples.accounting, selector)
            ):
                continue
            for i, window in enumerate(windows):
                if _overlap(window, self_samples.window):
                    yield i, self_samples.inside(window, selector)

    def presence(self, window: Window, selector: Selector = EMPTY) -> ServicePresence:
        """Return for how long each service that is asked for was there in each object."""
        read = self._read_around(Times, self._times, [window])
        parts, coverage = _chosen(read, window, selector, "cpu")
        if not parts:
            return ServicePresence(
                np.zeros((0, 2), np.int64), (), np.zeros((0, 3), np.int64), coverage
            )
        is_inside, lines = [], []
        for part in parts:
            starts_ns = key_starts_ns(part.objects)
            is_inside.append((window.start_ns <= starts_ns) & (starts_ns < window.end_ns))
            presence = part.filter(selector).presence
            lines.append(presence[is_inside[-1][presence[:, 0]]])
        label_sets, numbers = merge_label_sets(
            [part.present_sets for part in parts], [each[:, 1] for each in lines]
        )
        rows = join_lines(parts, lines, numbers)
        chosen = np.concatenate(is_inside)
        rows[:, 0] = (np.cumsum(chosen) - 1)[rows[:, 0]]
        objects = np.concatenate([part.objects[:, :2] for part in parts])[chosen]
        return ServicePresence(objects.astype(np.int64), label_sets, rows, coverage)

    def labels(self, window: Window, selector: Selector = EMPTY) -> dict[str, dict[str, int]]:
        """Return the names of labels, their values, and the samples each value has."""
        found: dict[str, dict[str, int]] = {}
        for loaded in self._read(self._times, window):
            if loaded.value is None:
                continue
            chosen = loaded.value.filter(selector)
            samples = np.zeros(len(chosen.label_sets), dtype=np.int64)
            np.add.at(samples, chosen.times[:, 1], chosen.time_counts[:, 0])
            for labels, count in zip(chosen.label_sets, samples.tolist(), strict=True):
                for name, value in labels if count else ():
                    values = found.setdefault(name, {})
                    values[value] = values.get(value, 0) + count
        return found

    def label_values(self, window: Window, name: str, selector: Selector = EMPTY) -> dict[str, int]:
        """Return the values of one label and the samples each has, most first."""
        values = self.labels(window, selector).get(name, {})
        return dict(sorted(values.items(), key=lambda pair: (-pair[1], pair[0])))

    def objects(self, window: Window) -> Iterator[tuple[ObjectKey, StoredObject]]:
        """Return the objects that start inside a window, by hour, host and start; none is read."""
        if self._listed is not None:
            whole, listed = self._listed
            if whole.start_ns <= window.start_ns and window.end_ns <= whole.end_ns:
                for key, stored in listed:
                    if window.start_ns <= key.start_ns < window.end_ns:
                        yield key, stored
                return
        if not self._believed_s:
            yield from self._list(window)
            return
        oldest_s = time.monotonic() - self._believed_s
        known = self._listings.get(window)
        if known is None or known[0] < oldest_s:
            known = (time.monotonic(), list(self._list(window)))
            for other in [w for w, (at_s, _) in list(self._listings.items()) if at_s < oldest_s]:
                self._listings.pop(other, None)
            self._listings[window] = known
        yield from known[1]

    def _list(self, window: Window) -> Iterator[tuple[ObjectKey, StoredObject]]:
        for key, stored in list_window(self._store, window, self._tenant):
            self._check()
            if window.start_ns <= key.start_ns < window.end_ns:
                yield key, stored

    def prepare(self, window: Window) -> Iterator["Prepared"]:
        """Decode and keep what will be asked about a window, its latest part first.

        Gives what was not kept before, part by part: whoever stops asking ends it. What is kept is
        marked as used. It goes back no further than most of the cache reaches.
        """
        settled_ns = self._now_ns() - _SETTLED_AFTER_NS
        objects = [_Object(key, stored) for key, stored in self.objects(window)]
        recent = [each for each in objects if each.key.start_ns >= self._now_ns() - _RECENT_NS]
        # The latest hours by the parts of which they are made, then whole hours.
        parts = [
            (listed, is_whole)
            for some, spans_ns in ((recent, _SPANS_NS[1:]), (objects, _SPANS_NS))
            for listed, is_whole in sorted(
                _split(some, window.start_ns, settled_ns, spans_ns),
                key=lambda part: -part[0][-1].key.end_ns,
            )
        ]
        groups = {
            self._name(group): group
            for listed, is_whole in parts
            for group in ([listed] if is_whole else [[each] for each in reversed(listed)])
        }
        reach_bytes = int(self._cache.limit_bytes * _PREPARED_SHARE)
        kept_bytes: dict[str, int] = {}
        left_bytes = reach_bytes
        for name in groups:
            if left_bytes < 0:
                break
            kept_bytes[name] = self._touch(name)
            left_bytes -= kept_bytes[name]
        missing = {
            name
            for name, size in kept_bytes.items()
            if size == 0 and self._unkept.get(name, 0) < settled_ns
        }
        left = sum(len(groups[name]) for name in missing)
        for name, size_bytes in kept_bytes.items():
            reach_bytes -= size_bytes
            if name in missing:
                self._read_group(groups[name])
                made_bytes = self._touch(name)
                if made_bytes == 0:  # it cannot be kept, as where types differ
                    self._unkept[name] = self._now_ns()
                reach_bytes -= made_bytes
                left -= len(groups[name])
                yield Prepared(len(groups[name]), left)
            if reach_bytes < 0:
                return

    def _touch(self, name: str) -> int:
        """Mark what is kept under a name as used; return its size, 0 if some is missing."""
        sizes = [self._cache.touch(kind, name) for kind in _KINDS]
        return sum(sizes) if all(sizes) else 0

    def _read_group(self, group: Sequence["_Object"]) -> None:
        for reader in (self._stacks, self._function_totals, self._times, self._self_samples):
            if len(group) > 1:
                reader.of_span(group)
            else:
                reader.of_object(group[0])

    def _read(self, reader: "_Reader[_Kept]", window: Window) -> Iterator["_Loaded[_Kept]"]:
        """Return the parts of a window in the order of their keys, decoding what is not cached."""
        yield from self._read_parts(reader, self._parts(self.objects(window), window, _SPANS_NS))

    def _read_around(
        self,
        kind: type[_Kept],
        reader: "_Reader[_Kept]",
        windows: Sequence[Window],
    ) -> Iterator["_Loaded[_Kept]"]:
        """Return the parts of windows, of whole hours around them where these are kept."""
        joined = _union(windows, 1)

        def parts() -> Iterator[tuple[list[_Object], bool]]:
            for hours in _union(windows, HOUR_NS):
                for listed, is_whole in self._parts(self.objects(hours), hours, _SPANS_NS[:1]):
                    number = listed[0].key.start_ns // HOUR_NS
                    hour = Window(number * HOUR_NS, (number + 1) * HOUR_NS)
                    asked = [
                        (window, [each for each in listed if _is_inside(each.key, window)])
                        for window in joined
                        if _overlap(window, hour)
                    ]
                    count = sum(len(some) for _, some in asked)
                    is_all = count == len(listed)
                    if count == 0:
                        continue
                    if is_whole and (is_all or self._cache.touch(kind, self._name(listed))):
                        yield listed, True
                        continue
                    for window, some in asked:
                        yield from self._parts(some, window, _SPANS_NS)

        yield from self._read_parts(reader, parts())

    def _parts(
        self,
        objects: Iterable[tuple[ObjectKey, StoredObject]],
        window: Window,
        spans_ns: Sequence[int],
    ) -> Iterator[tuple[list["_Object"], bool]]:
        """Cut what a window holds into what may be kept merged, and what may not."""
        end_ns = min(window.end_ns, self._now_ns() - _SETTLED_AFTER_NS)
        yield from _split(itertools.starmap(_Object, objects), window.start_ns, end_ns, spans_ns)

    def _read_parts(
        self, reader: "_Reader[_Kept]", parts: Iterable[tuple[list["_Object"], bool]]
    ) -> Iterator["_Loaded[_Kept]"]:
        with ThreadPoolExecutor(_FETCHES, "one") as ones, ThreadPoolExecutor(3, "span") as spans:

            def read(part: tuple[list[_Object], bool]) -> list[_Loaded[_Kept]]:
                listed, is_whole = part
                if is_whole:
                    return reader.of_span(listed)
                return list(map_ahead(ones, reader.of_object, listed))

            # Three spans at a time: while two are decoded, the next is fetched.
            try:
                for loaded in map_ahead(spans, read, parts, ahead=3):
                    self._check()
                    yield from loaded
            finally:
                self._watch(0)

    @property
    def _stacks(self) -> "_Reader[Columns]":
        return _Reader(self._columns_of_object, self._columns_of_span)

    @property
    def _function_totals(self) -> "_Reader[FunctionTotals]":
        return self._made(FunctionTotals, lambda columns: FunctionTotals.of(columns, self._hasher))

    @property
    def _times(self) -> "_Reader[Times]":
        return self._made(Times, Times.of)

    @property
    def _self_samples(self) -> "_Reader[ObjectSelfSamples]":
        return _Reader(self._self_samples_of_object, self._self_samples_of_span)

    def _made(self, kind: type[_Made], make: Callable[[Columns], _Made]) -> "_Reader[_Made]":
        """Return a reader of what is made of the columns, and kept beside them."""

        def of_object(object_: "_Object") -> _Loaded[_Made]:
            name = self._name([object_])
            known = self._cache.load(kind, name)
            if known is not None:
                return _Loaded((object_.stored.key,), known[0])
            made = self._columns_of_object(object_).made(make)
            if made.value is not None:
                self._cache.save(made.value, name)
            return made

        def of_span(objects: Sequence["_Object"]) -> list[_Loaded[_Made]]:
            known = self._known_span(kind, objects)
            if known is not None:
                return [known]
            keys = tuple(each.stored.key for each in objects)
            read = [loaded.made(make) for loaded in self._columns_of_span(objects)]
            for each in read:
                if each.value is not None and each.is_lasting and each.keys == keys:
                    self._cache.save(each.value, self._name(objects), each.skipped)
            return read

        return _Reader(of_object, of_span)

    def _columns_of_object(self, object_: "_Object") -> "_Loaded[Columns]":
        name = self._name([object_])
        known = self._cache.load(Columns, name)
        if known is None:
            with self._turns.of(name, self._check):
                known = self._cache.load(Columns, name)
                if known is None:
                    (loaded,) = self._decode([object_])
                    self._keep(loaded, name)
                    return loaded
        return _Loaded((object_.stored.key,), known[0])

    def _self_samples_of_object(self, object_: "_Object") -> "_Loaded[ObjectSelfSamples]":
        (loaded,) = self._self_samples_of_span([object_])
        return loaded

    def _self_samples_of_span(
        self, objects: Sequence["_Object"]
    ) -> list["_Loaded[ObjectSelfSamples]"]:
        known = self._known_span(ObjectSelfSamples, objects)
        if known is not None:
            return [known]
        name = self._name(objects)
        with self._turns.of(name, self._check):
            known = self._known_span(ObjectSelfSamples, objects)
            if known is not None:
                return [known]
            read = self._merge_span(objects)
            if any(each.value is not None and each.self_samples is None for each in read):
                read = self._merge_span(objects, anew=True)  # some part's stacks alone were kept
        return [
            _Loaded(each.keys, each.self_samples, each.skipped, each.is_lasting) for each in read
        ]

    def _columns_of_span(self, objects: Sequence["_Object"]) -> list["_Loaded[Columns]"]:
        """Return a host's span as one, or its objects one by one where they do not add up."""
        known = self._known_span(Columns, objects)
        if known is not None:
            return [known]
        with self._turns.of(self._name(objects), self._check):
            known = self._known_span(Columns, objects)
            return [known] if known is not None else self._merge_span(objects)

    def _known_span(
        self, kind: type[_Kept], objects: Sequence["_Object"]
    ) -> "_Loaded[_Kept] | None":
        known = self._cache.load(kind, self._name(objects))
        if known is None:
            return None
        keys = tuple(each.stored.key for each in objects)
        # One object is a span of its own, too, and then has no note of what was skipped.
        return _Loaded(keys, known[0], tuple(Skipped(*each) for each in known[1] or ()))

    def _merge_span(
        self, objects: Sequence["_Object"], *, anew: bool = False
    ) -> list["_Loaded[Columns]"]:
        """Decode and merge what is not kept of a span; anew: all of it."""
        read, missing = ([], objects) if anew else self._cached_parts(objects)
        read += self._decode(missing)
        columns = [loaded.value for loaded in read if loaded.value is not None]
        if len({(each.type, each.unit) for each in columns}) != 1:
            return read
        skipped = tuple(itertools.chain.from_iterable(loaded.skipped for loaded in read))
        keys = tuple(each.stored.key for each in objects)
        if len(read) == 1:
            whole = replace(read[0], keys=keys)
        else:
            is_lasting = all(loaded.is_lasting for loaded in read)
            self_samples = _join_parts_self_samples(read)
            whole = _Loaded(
                keys, merge_columns(columns), skipped, is_lasting, self_samples=self_samples
            )
        if whole.is_lasting:
            self._keep(whole, self._name(objects))
        return [whole]

    def _keep(self, loaded: "_Loaded[Columns]", name: str) -> None:
        if loaded.packed:
            self._cache.save_packed(Columns, loaded.packed, name)
        elif loaded.value is not None:
            self._cache.save(loaded.value, name, loaded.skipped)
        if loaded.self_samples is not None:
            self._cache.save(loaded.self_samples, name, loaded.skipped)

    def _cached_parts(
        self, objects: Sequence["_Object"]
    ) -> tuple[list["_Loaded[Columns]"], list["_Object"]]:
        """Return what is cached of a span's shorter spans and of its objects, and what is not."""
        read: list[_Loaded[Columns]] = []
        missing: list[_Object] = []
        for part, _ in _split(objects, 0, 0, _SPANS_NS[1:]):
            if len(part) < len(objects):
                known = self._known_part(part)
                more, rest = ([known], []) if known is not None else self._cached_parts(part)
            else:
                found = [(each, self._known_part([each])) for each in part]
                rest = [each for each, known in found if known is None]
                more = _join([known for _, known in found if known is not None])
            read += more
            missing += rest
        return read, missing

    def _known_part(self, objects: Sequence["_Object"]) -> "_Loaded[Columns] | None":
        """Return what is kept of a part to be merged, with its self samples if they are kept."""
        known = self._known_span(Columns, objects)
        if known is None:
            return None
        self_samples = self._cache.load(ObjectSelfSamples, self._name(objects))
        return replace(known, self_samples=self_samples[0] if self_samples else None)

    def _name(self, objects: Sequence["_Object"]) -> str:
        """Name what is decoded from objects. Time and size tell a repaired one from a damaged."""
        listed = (f"{s.key} {s.size_bytes} {s.modified_ns}" for _, s in objects)
        return self._cache.name([str(self._store), *listed])

    def _decode(self, objects: Sequence["_Object"]) -> list["_Loaded[Columns]"]:
        """Fetch and decode objects. Those of a chunk are merged, as far as they add up."""
        read: list[_Loaded[Columns]] = []
        waiting: deque[Callable[[], _Decoded]] = deque()
        stored_of = {key.text: stored for key, stored in objects}

        def take() -> None:
            self._check()
            decoded, failures = waiting.popleft()()
            self._watch(sum(len(each.keys) for each in decoded) + len(failures))
            read.extend(decoded)
            for text, reason in failures:
                if len(self._failures) < _FAILURES_REMEMBERED:
                    self._failures[stored_of[text]] = reason
                read.append(_failed(text, reason))

        chunk: list[tuple[ObjectKey, bytes]] = []
        for (key, _), fetched in zip(
            objects, map_ahead(self._fetcher, self._fetch, objects), strict=True
        ):
            if isinstance(fetched, bytes):
                chunk.append((key, fetched))
            else:
                read.append(fetched)
            if len(chunk) == _CHUNK:
                waiting.append(self._start_decoding(chunk))
                chunk = []
            if len(waiting) > _FETCHES:
                take()
        if chunk:
            waiting.append(self._start_decoding(chunk))
        while waiting:
            take()
        return read

    def _fetch(self, object_: "_Object") -> "bytes | _Loaded[Columns]":
        key, stored = object_
        if stored in self._failures:
            return _failed(key.text, self._failures[stored])
        try:
            return self._store.get(stored.key)
        except StoreError as error:
            return _failed(stored.key, str(error), is_lasting=False)

    def _start_decoding(self, fetched: list[tuple[ObjectKey, bytes]]) -> "Callable[[], _Decoded]":
        """Have a worker decode, if there is one; return what waits for the result."""
        if self._workers is None:
            return functools.partial(decode_objects, fetched, self._hasher)
        try:
            future = self._workers.submit(_work, fetched, self._secret)
        except (BrokenExecutor, RuntimeError):  # a worker was killed, or all are shut down
            return functools.partial(decode_objects, fetched, self._hasher)

        def wait() -> _Decoded:
            try:
                parts, failures = future.result()
            except (BrokenExecutor, CancelledError, TypeError):
                # Also when sums are beyond what can be packed.
                return decode_objects(fetched, self._hasher)
            unpacked = [
                _Loaded(
                    keys,
                    unpack(Columns, packed)[0],
                    packed=packed,
                    self_samples=unpack(ObjectSelfSamples, packed_self_samples)[0],
                )
                for keys, packed, packed_self_samples in parts
            ]
            return _Decoded(unpacked, failures)

        return wait


class _Object(NamedTuple):
    key: ObjectKey
    stored: StoredObject


@dataclass(frozen=True, slots=True)
class _Loaded(Generic[_Kept]):
    """A part of a window: what it holds, or nothing, and what is missing from it."""

    keys: tuple[str, ...]
    value: _Kept | None
    skipped: tuple[Skipped, ...] = ()
    is_lasting: bool = True
    """Asking again gives the same: nothing was missing for a reason that may pass."""
    packed: bytes = b""
    """The value as the cache keeps it, where a worker has made that."""
    self_samples: ObjectSelfSamples | None = None
    """Of columns: those of each object. Nothing tells them of objects that are merged."""

    def made(self: "_Loaded[Columns]", make: Callable[[Columns], _Made]) -> "_Loaded[_Made]":
        value = None if self.value is None else make(self.value)
        return _Loaded(self.keys, value, self.skipped, self.is_lasting)


@dataclass(frozen=True, slots=True)
class _Reader(Generic[_Kept]):
    """How to get one kind of value, of an object and of all objects of a host and hour."""

    of_object: Callable[[_Object], _Loaded[_Kept]]
    of_span: Callable[[Sequence[_Object]], list[_Loaded[_Kept]]]


def _chosen(
    read: Iterable[_Loaded[_Kept]],
    window: Window,
    selector: Selector,
    type_: str,
    fold: Callable[[list[_Kept]], list[_Kept]] = list,
) -> tuple[list[_Kept], Coverage]:
    """Return the parts of a window that may hold what is asked for, and what they cover.

    `fold` makes fewer of them, once they have become large: a day is not held at once.
    """
    parts: list[_Kept] = []
    skipped: list[Skipped] = []
    accounting, objects, is_lasting = Accounting(), 0, True
    for loaded in read:
        skipped += loaded.skipped
        is_lasting &= loaded.is_lasting
        value = loaded.value
        if value is None or not _has_host(value.accounting, selector):
            continue
        if value.type != type_:
            reason = f"it is of the type {value.type}, not {type_}"
            skipped += [Skipped(key, reason) for key in loaded.keys]
            continue
        objects += len(value.objects)
        accounting = accounting.merge(value.accounting)
        parts.append(value)
        parts = fold(parts)
    return parts, Coverage(window, objects, accounting, tuple(skipped), is_lasting)


def _folding(
    merge: Callable[[Sequence[_Rows]], _Rows], selector: Selector
) -> Callable[[list[_Rows]], list[_Rows]]:
    """Return what merges the parts of an answer once they have become large."""

    def fold(parts: list[_Rows]) -> list[_Rows]:
        if sum(len(part.rows) for part in parts) < _FOLDED_ROWS:
            return parts
        return [merge([part.filter(selector) for part in parts])]

    return fold


def _go_on() -> None:
    """Interrupt nothing."""


def _tell_nobody(_decoded: int) -> None:
    """Watch nothing."""


def _join(loaded: Sequence[_Loaded[Columns]]) -> list[_Loaded[Columns]]:
    """Merge what is of one type and unit, so that fewer arrays are held at a time."""
    columns = [each.value for each in loaded if each.value is not None]
    if len(columns) < 2 or len({(each.type, each.unit) for each in columns}) != 1:
        return list(loaded)
    keys = tuple(itertools.chain.from_iterable(each.keys for each in loaded))
    skipped = tuple(itertools.chain.from_iterable(each.skipped for each in loaded))
    is_lasting = all(each.is_lasting for each in loaded)
    merged = merge_columns(columns)
    return [
        _Loaded(keys, merged, skipped, is_lasting, self_samples=_join_parts_self_samples(loaded))
    ]


def _join_parts_self_samples(loaded: Sequence[_Loaded[Columns]]) -> ObjectSelfSamples | None:
    """Put the self samples of parts together, if those of each are known."""
    self_samples = [each.self_samples for each in loaded if each.value is not None]
    known = [each for each in self_samples if each is not None]
    return join_self_samples(known) if known and len(known) == len(self_samples) else None


def _failed(key: str, reason: str, is_lasting: bool = True) -> _Loaded[Columns]:
    return _Loaded((key,), None, (Skipped(key, reason),), is_lasting)


class _Decoded(NamedTuple):
    """Some objects decoded, those that add up merged; and which could not be, and why."""

    parts: list[_Loaded[Columns]]
    failures: list[tuple[str, str]]


def start_workers(count: int) -> Executor:
    """Start processes that decode objects. They are ready when this returns.

    What they are sent is data, what they send back are arrays; a worker that dies costs only time.
    """
    context = multiprocessing.get_context("spawn")
    # A Ctrl-C reaches all processes of a terminal; these end with their parent, and only so. The
    # tracker is started first: whoever starts it finds both signals unblocked (Python 3.11).
    resource_tracker.ensure_running()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    workers = ProcessPoolExecutor(count, context, initializer=_settle_in)
    try:
        for started in [workers.submit(os.getpid) for _ in range(count)]:
            started.result()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)  # what came meanwhile is raised here
    except BaseException:
        workers.shutdown()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        raise
    return workers


class LateWorkers(Executor):
    """Workers for who may have little to decode: they are started once it is much.

    A start takes half a second and each of them 60 MB. Until they are ready what is submitted is
    refused, and a Query decodes it itself.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._refused = 0
        self._lock = threading.Lock()
        self._workers: Executor | None = None

    def submit(self, act: Callable[..., _Done], /, *things: Any, **more: Any) -> "Future[_Done]":
        """Have a worker act.

        Raises:
            RuntimeError: there are none yet.
        """
        if self._workers is not None:
            return self._workers.submit(act, *things, **more)
        with self._lock:
            self._refused += 1
            if self._refused == _LATE_AFTER and self._count > 1:
                threading.Thread(target=self._start, name="workers", daemon=True).start()
        raise RuntimeError("there are no workers yet")

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        if self._workers is not None:
            self._workers.shutdown(wait, cancel_futures=cancel_futures)

    def _start(self) -> None:
        self._workers = start_workers(self._count)
        threading.Event().wait()  # they end with the thread that started them


def _settle_in() -> None:
    """Make this process a worker, which ends with its parent, however that ends.

    malloc keeps what is freed, as a third of decoding was the kernel's zeroing of pages, until
    there has been nothing to decode for a while: that is 25 MB.
    """
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # forgets one that came to all
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # with which the executor ends it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    libc = ctypes.CDLL(None)
    pr_set_pdeathsig = 1  # prctl(2)
    libc.prctl(pr_set_pdeathsig, int(signal.SIGKILL), 0, 0, 0)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:
        os._exit(0)  # it has died before this line
    if hasattr(libc, "mallopt"):  # musl has none
        mmap_threshold, trim_threshold = -3, -1
        libc.mallopt(mmap_threshold, 1 << 28)
        libc.mallopt(trim_threshold, 1 << 28)
        threading.Thread(target=_give_back, args=(libc.malloc_trim,), daemon=True).start()


def _give_back(trim: Callable[[int], int]) -> None:
    used_s = given_s = time.process_time()
    while True:
        time.sleep(_REST_S)
        before_s, used_s = used_s, time.process_time()
        is_resting = used_s - before_s < _REST_S / 100
        if is_resting and used_s - given_s > _REST_S / 100:
            trim(0)
            given_s = time.process_time()


_hasher_of = functools.lru_cache(maxsize=1)(Hasher)


def _work(
    fetched: list[tuple[ObjectKey, bytes]], secret: bytes
) -> tuple[list[tuple[tuple[str, ...], bytes, bytes]], list[tuple[str, str]]]:
    """Decode in a worker; what it answers is packed, as in the cache."""
    parts, failures = decode_objects(fetched, _hasher_of(secret))
    packed = [
        (part.keys, pack(part.value), pack(part.self_samples))
        for part in parts
        if part.value is not None and part.self_samples is not None
    ]
    return packed, failures


def decode_objects(fetched: Iterable[tuple[ObjectKey, bytes]], hasher: Hasher) -> _Decoded:
    """Read some objects and merge those of one type and unit."""
    alike: dict[tuple[str, str], list[tuple[str, Columns]]] = {}
    failures: list[tuple[str, str]] = []
    for key, content in fetched:
        try:
            columns = decode_object(key, content, hasher)
        except ProfileError as error:
            failures.append((key.text, str(error)))
            continue
        alike.setdefault((columns.type, columns.unit), []).append((key.text, columns))
    parts = []
    for group in alike.values():
        some = [columns for _, columns in group]
        merged = some[0] if len(some) == 1 else merge_columns(some)
        self_samples = join_self_samples(
            [ObjectSelfSamples.of(columns, hasher) for columns in some]
        )
        parts.append(_Loaded(tuple(key for key, _ in group), merged, self_samples=self_samples))
    return _Decoded(parts, failures)


def decode_object(key: ObjectKey, content: bytes, hasher: Hasher) -> Columns:
    """Read an object, with the label `host` of its accounting.

    Raises:
        ProfileError: it is damaged; also when its content is not what its key says.
        SchemaError: a later version of this program wrote it.
    """
    if content16(content) != key.content16:
        raise ProfileError("its content is not what its key says: it is damaged or cut short")
    if key.ending != "pb.gz":
        raise ProfileError(f"this version cannot read .{key.ending}")
    columns = pprof_arrays.decode(content, hasher)
    if len(columns.accounting.hosts) == 1 and columns.accounting.hosts[0].name:
        columns = columns.with_label("host", columns.accounting.hosts[0].name)
    return columns


def _split(
    objects: Iterable[_Object], start_ns: int, end_ns: int, spans_ns: Sequence[int]
) -> Iterator[tuple[list[_Object], bool]]:
    """Cut objects into spans of a host, and tell which of them lie wholly between two times.

    Those that do not are cut into shorter spans, as far as there are any.
    """

    def span_of(each: _Object) -> tuple[int, str]:
        return each.key.start_ns // spans_ns[0], each.key.host_id

    for (number, _), group in itertools.groupby(objects, span_of):
        part = list(group)
        if start_ns <= number * spans_ns[0] and (number + 1) * spans_ns[0] <= end_ns:
            yield part, True
        elif spans_ns[1:]:
            yield from _split(part, start_ns, end_ns, spans_ns[1:])
        else:
            yield part, False


def _union(windows: Iterable[Window], grid_ns: int) -> list[Window]:
    """Return windows widened to multiples of a length, and joined where they meet; latest first."""
    joined: list[Window] = []
    for window in sorted(windows, reverse=True):
        start_ns = window.start_ns // grid_ns * grid_ns
        end_ns = -(-window.end_ns // grid_ns) * grid_ns
        if joined and joined[-1].start_ns <= end_ns:
            end_ns = max(end_ns, joined.pop().end_ns)
        joined.append(Window(start_ns, end_ns))
    return joined


def _is_inside(key: ObjectKey, window: Window) -> bool:
    return window.start_ns <= key.start_ns < window.end_ns


def _overlap(one: Window, other: Window) -> bool:
    return one.start_ns < other.end_ns and other.start_ns < one.end_ns


def _has_host(accounting: Accounting, selector: Selector) -> bool:
    """Return whether the selector's matchers of `host` accept any of the object's hosts."""
    matchers = tuple(each for each in selector.matchers if each.name == "host")
    if not matchers or len(accounting.hosts) != 1:
        return True
    return Selector(matchers).accepts({"host": accounting.hosts[0].name})


def nearest_objects(store: ObjectStore, window: Window) -> list[ObjectKey]:
    """Return the last object before a window and the first behind it, as far as there are any."""
    found: list[ObjectKey] = []
    for seconds in (*_LOOK_AROUND_S, None):
        start_ns = 0 if seconds is None else max(0, window.start_ns - seconds * NS_PER_S)
        if start_ns >= window.start_ns:
            break
        last = deque(list_window(store, Window(start_ns, window.start_ns)), maxlen=1)
        if last:
            found.append(max(key for key, _ in last))
            break
    if window.end_ns < ALWAYS.end_ns:
        behind = list_window(store, Window(window.end_ns, ALWAYS.end_ns))
        found += [key for key, _ in [next(behind, (None, None))] if key is not None]
    return found


class Turns:
    """Lets one thread at a time do what has a name; who comes later finds it done."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._turns: dict[str, tuple[threading.Lock, list[None]]] = {}

    @contextlib.contextmanager
    def of(self, name: str, check: Callable[[], None]) -> Iterator[None]:
        """Wait for the turn, for as long as `check` raises nothing, and have it for the block."""
        with self._lock:
            turn, waiting = self._turns.setdefault(name, (threading.Lock(), []))
            waiting.append(None)
        try:
            while not turn.acquire(timeout=0.1):
                check()
            try:
                yield
            finally:
                turn.release()
        finally:
            with self._lock:
                waiting.pop()
                if not waiting:
                    del self._turns[name]


_One = TypeVar("_One")
_Other = TypeVar("_Other")


def map_ahead(
    pool: ThreadPoolExecutor,
    act: Callable[[_One], _Other],
    things: Iterable[_One],
    ahead: int = 2 * _FETCHES,
) -> Iterator[_Other]:
    """Return `act` of each in order, with no more than a few waiting to be taken."""
    waiting: deque[Future[_Other]] = deque()
    try:
        for thing in things:
            waiting.append(pool.submit(act, thing))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _covered_ns(intervals: list[tuple[int, int, int]], steps: int) -> Integers:
    """Return per step how long its objects, (step, start, end), last together, overlaps once."""
    covered = np.zeros(steps, np.int64)
    reached = (-1, 0)
    for step, start, end in sorted(intervals):
        begun = max(start, reached[1]) if step == reached[0] else start
        covered[step] += max(0, end - begun)
        reached = (step, max(begun, end))
    return covered


def _add_series(
    series: dict[Labels, Integers], part: Times, step: Integers, by: Sequence[str], count: int
) -> None:
    wanted = set(by)
    chosen = [
        tuple((name, value) for name, value in labels if name in wanted)
        for labels in part.label_sets
    ]
    numbers: dict[Labels, int] = {}
    mine = np.array([numbers.setdefault(each, len(numbers)) for each in chosen], dtype=np.int64)
    cells = np.zeros((len(numbers), count, 2), dtype=np.int64)
    np.add.at(cells, (mine[part.times[:, 1]], step[part.times[:, 0]]), part.time_counts)
    is_present = np.zeros(len(numbers), dtype=bool)
    is_present[mine[part.times[:, 1]]] = True
    for labels, number in numbers.items():
        if is_present[number]:
            known = series.get(labels)
            series[labels] = cells[number] if known is None else known + cells[number]
