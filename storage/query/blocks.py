"""Compacted hours: what compaction has made of level-0 objects, and is read in place of them.

The data of an hour are the parts that its manifest names (`storage.blocks.manifest`), and the
level-0 objects that are in none of them. Both are taken from one reading of the manifests, made
before the objects are listed: so an object that is compacted meanwhile counts once.
"""

import contextlib
import itertools
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from storage.blocks import reading
from storage.blocks.block import ROLLUP_LABELS, labels_id
from storage.blocks.dictionary import read_label_pairs, read_label_sets
from storage.blocks.hosts import HostObjects, read_edges, read_hosts, read_services
from storage.blocks.manifest import (
    File,
    Manifests,
    is_known,
    manifests_prefix,
    start_s_of,
)
from storage.blocks.manifest import Part as CompactedPart
from storage.blocks.parquet import DETAIL, DICTIONARY, ROLLUPS, LocalFile
from storage.blocks.scratch import ScratchFolder
from storage.columns import Columns, Times
from storage.hashing import Hasher, Hashes
from storage.objects.copies import Copies
from storage.objects.keys import (
    CPU,
    NS_PER_S,
    StoreError,
    StoreRefused,
    hour_of,
    type_in_key,
)
from storage.objects.tenant import HOUR_NS, TenantStore
from storage.profile import ALWAYS, Labels, ProfileError, Window
from storage.query.compacted import (
    HEADS,
    CompactedHour,
    CompactedHours,
    check_named,
    check_whole,
    files_of,
    is_aligned,
    samples_of,
)
from storage.query.compacted_samples import read_self_samples
from storage.query.coverage import Part, Skipped
from storage.query.self_samples import ObjectSelfSamples
from storage.selector import Selector

_SETTLED_AFTER_NS = 1800 * NS_PER_S
_MANY_OBJECTS = 5000
"""An hour with more compacted objects than this is not listed any more, once a compactor has listed
it half an hour after its end: 60,000 keys take 60 requests. What comes later shows when that is
compacted."""
_CONTENTS_KEPT = 300_000
"""Objects of parts that are remembered by their content, some 100 bytes each."""
_NAMES_KEPT_S = 30.0
_SAMPLES = (DETAIL, *ROLLUPS.values())
_MANY_ROWS = 4_000_000
"""Rows of detail in the whole hours of a window beyond which rollups are read: a second's work."""
_BUCKETS_S = {table: seconds for seconds, table in ROLLUPS.items()}
_STEPS = (
    "its samples are kept in steps of {} minutes: those count that begin in the window"
    " (choose one that begins and ends with a step)"
)

_Read = TypeVar("_Read", Columns, Times, ObjectSelfSamples)


_log = logging.getLogger(__name__)


class Blocks:
    """Reads the compacted hours of one tenant. Safe to use from several threads."""

    def __init__(
        self, store: TenantStore, copies: Copies, hasher: Callable[[], Hasher] | None = None
    ) -> None:
        self._store = store
        self._copies = copies
        self._hasher = hasher
        self._manifests: dict[str, Manifests] = {}
        self._contents: OrderedDict[str, frozenset[str]] = OrderedDict()
        self._starts_ns: dict[str, tuple[float, list[int]]] = {}
        self._of_our_key: set[str] = set()
        self._lock = threading.Lock()

    def hours(self, window: Window, type_: str = CPU) -> CompactedHours:
        """Return the hours of a window that have compacted objects, in order."""
        first, last = (hour_of(at // NS_PER_S) for at in (window.start_ns, window.end_ns - 1))
        listed = self._manifests_of(type_).list(first, last)
        hours = []
        for _, manifest in sorted(listed.hours.items()):
            cut = CompactedHour.of(manifest).cut(window) if manifest.parts else None
            if cut is not None:
                hours.append(cut)
        problems = sorted(listed.problems.items())
        return CompactedHours(hours, tuple(Skipped(name, str(why)) for name, why in problems))

    def is_settled(self, hour: CompactedHour) -> bool:
        """Return whether level 0 of the hour need not be listed."""
        is_large = sum(part.objects for part in hour.manifest.parts) > _MANY_OBJECTS
        settled_ns = hour.start_ns + HOUR_NS + _SETTLED_AFTER_NS
        return is_large and hour.manifest.listed_ns >= settled_ns

    def contents(self, hour: CompactedHour) -> list[frozenset[str]]:
        """Return the content16 of the objects of each part of an hour.

        Raises:
            ProfileError, StoreError: one cannot be read.
        """
        return [self._contents_of(part) for part in hour.manifest.parts]

    def is_empty(self, hour: CompactedHour) -> bool:
        """Return whether no compacted object starts in what is asked for of an hour.

        What cannot be read is not empty.
        """
        if hour.is_whole:
            return False
        try:
            with self._fetched(files_of(hour, "objects")) as files:
                start_s, end_s = reading.seconds_of(hour.window)
                return read_edges(files, start_s=start_s, end_s=end_s) is None
        except (ProfileError, StoreError, OSError):
            return False

    def span(self, type_: str = CPU) -> Window | None:
        """Return when compacted objects begin and end; None if there are none."""
        starts_ns = self._hour_starts_ns(type_)
        spans = (self._span_of(at_ns, type_) for at_ns in starts_ns)
        first = next((span for span in spans if span is not None), None)
        spans = (self._span_of(at_ns, type_) for at_ns in reversed(starts_ns))
        last = next((span for span in spans if span is not None), None)
        return first.union(last) if first is not None and last is not None else None

    def nearest(self, window: Window, type_: str = CPU) -> list[Window]:
        """Return when the last compacted object before a window is from, and the first after it."""
        starts_ns = self._hour_starts_ns(type_)
        before = Window(0, window.start_ns)
        after = Window(window.end_ns, ALWAYS.end_ns)
        earlier = (at_ns for at_ns in reversed(starts_ns) if at_ns < before.end_ns)
        later = (at_ns for at_ns in starts_ns if at_ns + HOUR_NS > after.start_ns)
        last = (self._edges_of(at_ns, before, type_) for at_ns in earlier)
        first = (self._edges_of(at_ns, after, type_) for at_ns in later)
        near = [edges[1] for edges in itertools.islice(filter(None, last), 1)]
        near += [edges[0] for edges in itertools.islice(filter(None, first), 1)]
        return near

    def hosts(self, hour: CompactedHour) -> list[HostObjects]:
        """Return the hosts with compacted objects in an hour, by id.

        Raises:
            ProfileError, StoreError: they cannot be read.
        """
        with self._fetched(files_of(hour, "objects")) as files:
            start_s, end_s = reading.seconds_of(hour.window)
            return read_hosts(files, start_s=start_s, end_s=end_s)

    def services(
        self, hour: CompactedHour, object_ids: Iterable[int]
    ) -> dict[int, list[tuple[Labels, int]]]:
        """Return what was sampled in compacted objects: their label sets without host, and samples.

        Raises:
            ProfileError, StoreError: they cannot be read.
        """
        with self._fetched(files_of(hour, "times", "label_sets")) as files:
            return read_services(files, object_ids)

    def profile(
        self, hours: Sequence[CompactedHour], selector: Selector, labels: frozenset[str] | None
    ) -> list[Part[Columns]]:
        """Read the profile of successive hours as one, or one by one if any cannot be read.

        Rows have the labels that detail keeps, and `host`. If these hours have so many that reading
        takes long, rows of whole hours have only those of `labels` that rollups keep, unless there
        are others; None stands for all that there are.
        """
        uses_rollups = self.uses_rollups(hours, labels)
        whole = self._columns(hours, selector, uses_rollups=uses_rollups)
        if whole.value is not None or len(hours) < 2 or not whole.skipped:
            return [whole]
        return [self._columns([hour], selector, uses_rollups=uses_rollups) for hour in hours]

    def is_large(self, hours: Sequence[CompactedHour]) -> bool:
        """Return whether the whole ones of some hours have more rows than are kept and merged."""
        files = (file for hour in hours if hour.is_whole for file in files_of(hour, DETAIL))
        return sum(file.rows for file in files) > _MANY_ROWS

    def uses_rollups(self, hours: Sequence[CompactedHour], labels: frozenset[str] | None) -> bool:
        """Return whether `profile` reads rollups of whole hours, though there is detail."""
        are_enough = labels is not None and labels.issubset(ROLLUP_LABELS)
        return are_enough and self.is_large(hours)

    def columns(self, hour: CompactedHour, selector: Selector) -> Part[Columns]:
        """Read the profile of an hour with all labels; only selected rows."""
        return self._columns([hour], selector, uses_rollups=False)

    def _columns(
        self, hours: Sequence[CompactedHour], selector: Selector, *, uses_rollups: bool
    ) -> Part[Columns]:
        samples, notes = [], []
        for hour in hours:
            some = samples_of(hour, prefers_rollup=uses_rollups and hour.is_whole)
            samples += some
            longest_s = max(_BUCKETS_S.get(file.table, 1) for file in some) if some else 0
            if not hour.is_whole and longest_s > 1 and not is_aligned(hour.window, longest_s):
                notes.append(Skipped(hour.manifest.hour, _STEPS.format(longest_s // 60)))
        other_labels = selector.names - {*ROLLUP_LABELS, "host"}
        has_rollups = any(file.table in _BUCKETS_S for file in samples)

        def read(files: list[LocalFile], start_s: int, end_s: int) -> Columns | None:
            if not all(samples_of(hour, prefers_rollup=False) for hour in hours):
                raise ProfileError("its samples have expired")
            if has_rollups and other_labels:
                names = ", ".join(sorted(other_labels))
                raise ProfileError(f"cannot choose by {names}: the detail has expired")
            sets, hosts = _choose(files, selector)
            columns = reading.read_columns(
                files,
                start_s=start_s,
                end_s=end_s,
                sets=sets,
                hosts=hosts,
                samples_of=[file for file in files if file.table in _SAMPLES],
            )
            if not selector.matchers:
                check_whole(hours, columns)
            # Both tables have all samples: one of other files than these does not go unseen.
            if columns is not None and not notes:
                sums = columns.counts.sum(axis=0), columns.time_counts.sum(axis=0)
                if not np.array_equal(*sums):
                    raise ProfileError(
                        f"its files contradict each other: samples and value are {sums[0].tolist()}"
                        f" by stack, and {sums[1].tolist()} by time"
                    )
            return columns

        others = [file for hour in hours for file in files_of(hour, *DICTIONARY, *HEADS)]
        part = self._read(hours, [*samples, *others], read)
        return replace(part, skipped=(*part.skipped, *notes)) if part.value is not None else part

    def times(self, hour: CompactedHour, selector: Selector) -> Part[Times]:
        """Read what timelines need of an hour, without its stacks; only selected lines."""

        def read(files: list[LocalFile], start_s: int, end_s: int) -> Times | None:
            sets, hosts = _choose(files, selector)
            times = reading.read_times(files, start_s=start_s, end_s=end_s, sets=sets, hosts=hosts)
            if not selector.matchers:
                check_whole([hour], times)
            return times

        return self._read([hour], files_of(hour, "label_sets", *HEADS), read)

    def self_samples(self, hour: CompactedHour, hasher: Hasher) -> Part[ObjectSelfSamples]:
        """Read the self samples of an hour by location, for each second in which objects begin."""

        def read(files: list[LocalFile], start_s: int, end_s: int) -> ObjectSelfSamples | None:
            if not all(part.files_of(DETAIL) for part in hour.manifest.parts):
                raise ProfileError("its samples by object have expired")
            return read_self_samples(files, start_s, end_s, hasher)

        return self._read([hour], files_of(hour, DETAIL, *DICTIONARY, *HEADS), read)

    def _read(
        self,
        hours: Sequence[CompactedHour],
        files: Sequence[File],
        read: Callable[[list[LocalFile], int, int], _Read | None],
    ) -> Part[_Read]:
        """Read files of successive hours; what cannot be read is named, and when it is from."""
        keys = tuple(hour.key for hour in hours)
        window = Window(hours[0].window.start_ns, hours[-1].window.end_ns)
        try:
            check_named(hours, files)
            with self._fetched(files) as local:
                self._check_key(files, local)
                return Part(keys, read(local, *reading.seconds_of(window)))
        except (ProfileError, StoreError, OSError) as error:
            skipped = tuple(Skipped(hour.manifest.hour, str(error)) for hour in hours)
            return Part(keys, None, skipped, isinstance(error, ProfileError))
        except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
            # Files that were not made by this program may hold anything.
            _log.warning("cannot read compacted hours: %r", error)
            reason = f"its files are damaged: {error}"
            return Part(keys, None, tuple(Skipped(hour.manifest.hour, reason) for hour in hours))

    @contextlib.contextmanager
    def _fetched(self, files: Sequence[File]) -> Iterator[list[LocalFile]]:
        """Fetch files, which stay for as long as the block takes.

        Where no copies can be kept, as in a folder that is full or may not be written to, they are
        fetched into a folder of their own each time.
        """
        keys = [file.key for file in files]
        with contextlib.ExitStack() as stack:
            try:
                paths = self._copies.fetch(keys)
            except StoreRefused:
                folder = stack.enter_context(contextlib.closing(ScratchFolder())).path
                size_bytes = max(1, sum(file.bytes for file in files))
                paths = Copies(self._store.store, folder, size_bytes).fetch(keys)
            yield [
                LocalFile(file.table, path, file.rows)
                for file, path in zip(files, paths, strict=True)
            ]

    def _check_key(self, files: Sequence[File], local: Sequence[LocalFile]) -> None:
        """Check that ids were made with our key of the tenant: they mean nothing beside others.

        Each label set proves it: its id is its hash.

        Raises:
            ProfileError: they were not.
        """
        unchecked = {
            file.key: copy
            for file, copy in zip(files, local, strict=True)
            if file.table == "label_sets" and file.key not in self._of_our_key
        }
        if self._hasher is None or not unchecked:
            return
        hasher = self._hasher()
        for number, labels in read_label_pairs(list(unchecked.values())):
            if labels_id(labels, hasher) != number:
                raise ProfileError(
                    "its ids were made with another key of the tenant than this process uses"
                    " (if the tenant had no key until a while ago, restart this process)"
                )
        self._of_our_key.update(unchecked)

    def _contents_of(self, part: CompactedPart) -> frozenset[str]:
        with self._lock:
            known = self._contents.get(part.id)
            if known is not None:
                self._contents.move_to_end(part.id)
                return known
        with self._fetched(part.files_of("objects")) as files:
            contents = frozenset(reading.read_contents(files))
        if len(contents) != part.objects:
            raise ProfileError(f"its part has {len(contents)} objects, not {part.objects}")
        with self._lock:
            self._contents[part.id] = contents
            kept = sum(map(len, self._contents.values()))
            while kept > _CONTENTS_KEPT and len(self._contents) > 1:
                kept -= len(self._contents.popitem(last=False)[1])
        return contents

    def _manifests_of(self, type_: str) -> Manifests:
        with self._lock:
            known = self._manifests.get(type_)
            if known is None:
                known = Manifests(self._store.store, self._store.tenant, type_in_key(type_))
                self._manifests[type_] = known
            return known

    def _span_of(self, start_ns: int, type_: str) -> Window | None:
        """Return when the compacted objects of an hour begin and end, all of it if in doubt."""
        whole = Window(start_ns, start_ns + HOUR_NS)
        hours, skipped = self.hours(whole, type_)
        parts = [part for hour in hours for part in hour.manifest.parts]
        if not parts:
            return whole if skipped else None
        start_s = min(part.start_s for part in parts)
        return Window(start_s * NS_PER_S, max(part.end_s for part in parts) * NS_PER_S)

    def _edges_of(self, start_ns: int, window: Window, type_: str) -> tuple[Window, Window] | None:
        """Return the first and the last compacted object of an hour that start in a window."""
        for hour in self.hours(Window(start_ns, start_ns + HOUR_NS), type_).hours:
            cut = hour.cut(window)
            if cut is None:
                continue
            start_s, end_s = reading.seconds_of(cut.window)
            try:
                with self._fetched(files_of(hour, "objects")) as files:
                    return read_edges(files, start_s=start_s, end_s=end_s)
            except (ProfileError, StoreError, OSError):
                return cut.window, cut.window
        return None

    def _hour_starts_ns(self, type_: str) -> list[int]:
        """Return when the hours that have a manifest start, sorted, as known for half a minute."""
        read_s, starts_ns = self._starts_ns.get(type_, (-_NAMES_KEPT_S, []))
        if time.monotonic() - read_s > _NAMES_KEPT_S:
            prefix = manifests_prefix(self._store.tenant, type_in_key(type_))
            names = (
                stored.key.removeprefix(prefix).removesuffix(".json")
                for stored in self._store.store.list(prefix)
            )
            hours = (name for name in names if "T" in name and is_known(name))
            starts_ns = [start_s_of(name) * NS_PER_S for name in hours]
            self._starts_ns[type_] = (time.monotonic(), starts_ns)
        return starts_ns


def _choose(files: Sequence[LocalFile], selector: Selector) -> tuple[Hashes | None, Hashes | None]:
    """Return the ids of the label sets and of the hosts that a selector accepts; None: of all."""
    if not selector.matchers:
        return None, None
    label_sets = read_label_sets(files)
    of_hosts = Selector(tuple(each for each in selector.matchers if each.name == "host"))
    of_sets = Selector(tuple(each for each in selector.matchers if each.name != "host"))

    def ids(selector: Selector) -> Hashes | None:
        if not selector.matchers:
            return None
        numbers, sets = list(label_sets), list(label_sets.values())
        chosen = selector.choose(map(dict, sets))
        return np.array(list(itertools.compress(numbers, chosen)), np.uint64)

    return ids(of_sets), ids(of_hosts)
