"""Compacted hours: what compaction has made of level-0 objects, and is read in place of them.

The data of an hour are the parts that its manifest names (`storage.blocks.manifest`), and the
level-0 objects that are in none of them. Both are taken from one reading of the manifests, made
before the objects are listed: so an object that is compacted meanwhile counts once.
"""

import contextlib
import copy
import itertools
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import numpy as np

from storage.blocks import reading
from storage.blocks.block import ROLLUP_LABELS, labels_id
from storage.blocks.dictionary import (
    choose_among,
    choose_ids,
    read_label_pairs,
    read_label_sets,
)
from storage.blocks.hosts import (
    HostObjects,
    read_contents,
    read_edges,
    read_hosts,
    read_services,
)
from storage.blocks.manifest import (
    File,
    Manifests,
)
from storage.blocks.manifest import Part as CompactedPart
from storage.blocks.scans import LocalFile
from storage.blocks.schema import DETAIL, DICTIONARY, HEADS, HEADS_10M
from storage.blocks.scratch import ScratchFolder
from storage.blocks.slices import Slice, files_in, seconds_of
from storage.blocks.times import Lines, having_hosts, read_times
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
from storage.profile import Labels, ProfileError, Window
from storage.query.compacted import (
    Chosen,
    Compacted,
    CompactedDay,
    CompactedHour,
    CompactedHours,
    check_heads,
    check_named,
    check_whole,
    each_without_day,
    files_of,
    has_detail,
    plan_heads,
    plan_samples,
    rows_of_detail,
    slices_of,
)
from storage.query.compacted_samples import read_self_samples
from storage.query.coverage import Part, Skipped
from storage.query.function_totals import FunctionTotals
from storage.query.self_samples import ObjectSelfSamples
from storage.selector import Selector

_SETTLED_AFTER_NS = 1800 * NS_PER_S
_MANY_OBJECTS = 5000
"""An hour with more compacted objects than this is not listed any more, once a compactor has listed
it half an hour after its end: 60,000 keys take 60 requests. What comes later shows when that is
compacted."""
_CONTENTS_KEPT = 300_000
"""Objects of parts that are remembered by their content, some 100 bytes each."""
_MANY_ROWS = 4_000_000
"""Rows of detail in the whole hours of a window beyond which rollups are read: a second's work."""
_OF_HEADS = frozenset({*HEADS, *HEADS_10M, "label_sets"})
_MANY_HEADS = 20_000
"""Objects of a window beyond which heads of ten minutes are read where these are enough."""

_Read = TypeVar("_Read", Columns, FunctionTotals, Times, ObjectSelfSamples)

_log = logging.getLogger(__name__)


class Blocks:
    """Reads the compacted hours of one tenant. Safe to use from several threads."""

    def __init__(
        self, store: TenantStore, copies: Copies, hasher: Callable[[], Hasher] | None = None
    ) -> None:
        self.store = store
        self._copies = copies
        self._hasher = hasher
        self._manifests: dict[str, Manifests] = {}
        self._contents: OrderedDict[str, frozenset[str]] = OrderedDict()
        self.known_starts: dict[str, tuple[float, list[int]]] = {}
        """When hours start, by type, and when that was listed (`storage.query.extent`)."""
        self._of_our_key: set[str] = set()
        self._lock = threading.Lock()
        self.check: Callable[[], None] | None = None

    def interruptible(self, check: Callable[[], None]) -> "Blocks":
        """Return the same blocks; what `check` raises ends what they read."""
        other = copy.copy(self)
        other.check = check
        return other

    def hours(self, window: Window, type_: str = CPU) -> CompactedHours:
        """Return what is compacted of a window, in order."""
        first, last = (hour_of(at // NS_PER_S) for at in (window.start_ns, window.end_ns - 1))
        manifests = self._manifests_of(type_)
        listed = manifests.list(first, last, with_day=True)
        found: list[Compacted] = []
        problems = {name: str(why) for name, why in listed.problems.items()}
        for name, manifest in listed.hours.items():
            day = listed.days.get(name[:10])
            is_held = day is not None and day.holds(manifest)
            hour = CompactedHour.of(manifest, day if is_held else None)
            cut = hour.cut(window) if manifest.parts else None
            found += [cut] if cut is not None else []
        for name, day in listed.days.items():
            inside = {each for hour in day.hours if first <= (each := f"{name}T{hour}") <= last}
            if inside - listed.hours.keys() - problems.keys():
                # Whether all hours of the day have expired, or only the first ones.
                known = manifests.list(name, f"{name}T23")
                kept = {other[-2:] for other in (*known.hours, *known.problems) if "T" in other}
                alone = CompactedDay.of(day, frozenset(day.hours.keys() - kept)).cut(window)
                found += [alone] if alone is not None else []
        found.sort(key=lambda each: each.window.start_ns)
        skipped = tuple(Skipped(*each) for each in sorted(problems.items()))
        return CompactedHours(found, skipped)

    def is_settled(self, hour: Compacted) -> bool:
        """Return whether level 0 of the hour need not be listed."""
        if isinstance(hour, CompactedDay):
            return True
        is_large = sum(part.objects for part in hour.manifest.parts) > _MANY_OBJECTS
        settled_ns = hour.start_ns + HOUR_NS + _SETTLED_AFTER_NS
        return is_large and hour.manifest.listed_ns >= settled_ns

    def contents(self, hour: Compacted) -> list[frozenset[str]]:
        """Return the content16 of the objects of each part of an hour.

        Raises:
            ProfileError, StoreError: one cannot be read.
        """
        return [self._contents_of(part) for part in hour.parts]

    def is_empty(self, hour: Compacted) -> bool:
        """Return whether no compacted object starts in what is asked for of an hour.

        What cannot be read is not empty.
        """
        if hour.is_whole:
            return False
        try:
            return self.edges(hour) is None
        except (ProfileError, StoreError, OSError):
            return False

    def hosts(self, hour: Compacted, *, is_coarse: bool = False) -> list[HostObjects]:
        """Return the hosts with compacted objects in an hour, by id.

        If coarse, their latest object is known by ten minutes.

        Raises:
            ProfileError, StoreError: they cannot be read.
        """
        with self._sliced(plan_heads([hour], is_coarse=is_coarse)) as slices:
            return read_hosts(slices)

    def services(
        self, hour: Compacted, object_ids: Iterable[int]
    ) -> dict[int, list[tuple[Labels, int]]]:
        """Return what was sampled in compacted objects: their label sets without host, and samples.

        Raises:
            ProfileError, StoreError: they cannot be read.
        """
        with self._fetched(files_of(hour, "times", "label_sets")) as files:
            return read_services(files, object_ids)

    def profile(
        self, hours: Sequence[Compacted], selector: Selector, *, rolls_up: bool
    ) -> list[Part[Columns]]:
        """Read the profile of successive hours as one, or one by one if any cannot be read.

        Rows have the labels that detail keeps, and `host`. If they are rolled up, they have only
        those that rollups keep, and it is not known in which objects they occurred.
        """
        whole = self.samples(hours, selector, rolls_up=rolls_up)
        alone = each_without_day(hours)
        if whole.value is not None or not alone or not whole.skipped:
            return [whole]
        return [self.samples([hour], selector, rolls_up=rolls_up) for hour in alone]

    def is_large(self, hours: Sequence[Compacted]) -> bool:
        """Return whether the whole ones of some hours have more rows than are kept and merged.

        Hours that only their day has are not kept either.
        """
        if any(isinstance(hour, CompactedDay) for hour in hours):
            return True
        return sum(map(rows_of_detail, (hour for hour in hours if hour.is_whole))) > _MANY_ROWS

    def uses_rollups(self, hours: Sequence[Compacted], labels: frozenset[str] | None) -> bool:
        """Return whether hours have so many rows that rollups of whole ones are to be read.

        Not if there are other `labels` than these keep; None stands for all that there are.
        """
        are_enough = labels is not None and labels.issubset(ROLLUP_LABELS)
        return are_enough and self.is_large(hours)

    def columns(self, hour: Compacted, selector: Selector) -> Part[Columns]:
        """Read the profile of an hour with all labels; only selected rows."""
        return self.samples([hour], selector, rolls_up=False)

    def rolled_up(self, hour: Compacted, selector: Selector) -> Part[Columns]:
        """Read the profile of all hosts of an hour together, with the labels that rollups keep."""
        return self.samples([hour], selector, rolls_up=True)

    def samples(
        self, hours: Sequence[Compacted], selector: Selector, *, rolls_up: bool
    ) -> Part[Columns]:
        """Read the profile of successive hours as one; see `profile`."""
        plan = plan_samples(hours, rolls_up=rolls_up)
        heads = plan_heads(hours, is_coarse=rolls_up)
        lines = Lines.ALL if rolls_up else Lines.EACH
        other_labels = selector.names - {*ROLLUP_LABELS, "host"}
        # One host is only read from detail, whatever there is of parts without it.
        chooses_hosts = any(each.name == "host" for each in selector.matchers)
        notes = () if chooses_hosts else tuple(plan.notes)

        def read(local: Mapping[File, LocalFile]) -> Columns | None:
            check_heads(hours, heads)
            if plan.missing:
                raise ProfileError("its samples have expired")
            if plan.has_rollups and other_labels:
                names = ", ".join(sorted(other_labels))
                raise ProfileError(f"cannot choose by {names}: the detail has expired")
            labelled = [file for file in local if file.table == "label_sets"]
            label_sets = read_label_sets([local[file] for file in labelled])
            sets, hosts = choose_among(label_sets, selector)
            if hosts is None:
                chosen = plan.of_all()
            else:
                chosen = plan.of_hosts(hosts, parts_without(hours, local, hosts, self.check))
            with self._fetching(file for file in chosen.files if file not in local) as rest:

                def fetch() -> reading.Stored:
                    known = {**local, **rest()}
                    dictionary = [known[file] for file in chosen.dictionary]
                    return reading.Stored(slices_of(chosen.samples, known), dictionary)

                columns = reading.read_columns(
                    slices_of(heads, local),
                    label_sets,
                    fetch,
                    lines,
                    sets=sets,
                    hosts=hosts,
                    check=self.check,
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

        first = [*(file for each in heads for file in each.files), *plan.files]
        if chooses_hosts:
            # Most bytes are in files that are chosen once it is known what the hosts' ids are, and
            # fetched while heads are read.
            first = [file for file in first if file.table in _OF_HEADS]
        part = self.read(hours, first, read)
        return replace(part, skipped=(*part.skipped, *notes)) if part.value is not None else part

    def has_many(self, hours: Sequence[Compacted]) -> bool:
        """Return whether hours have so many objects that not each of them is looked at."""
        return sum(part.objects for hour in hours for part in hour.parts) > _MANY_HEADS or any(
            isinstance(hour, CompactedDay) for hour in hours
        )

    def times(
        self,
        hours: Sequence[Compacted],
        selector: Selector,
        lines: Lines = Lines.EACH,
        *,
        is_coarse: bool = False,
        edges_s: Sequence[int] = (),
    ) -> list[Part[Times]]:
        """Read what timelines need of some hours as one, or one by one if any cannot be read.

        Only selected lines. If coarse, from heads of ten minutes where there are some: with the
        labels that rollups keep, and the host. `edges_s` are those of Lines.HOST.
        """

        def read(some: Sequence[Compacted]) -> Part[Times]:
            return self._times(some, selector, lines, is_coarse=is_coarse, edges_s=edges_s)

        whole = read(hours)
        alone = each_without_day(hours)
        if whole.value is not None or not alone or not whole.skipped:
            return [whole]
        return [read([hour]) for hour in alone]

    def _times(
        self,
        hours: Sequence[Compacted],
        selector: Selector,
        lines: Lines,
        *,
        is_coarse: bool,
        edges_s: Sequence[int],
    ) -> Part[Times]:
        heads = plan_heads(hours, is_coarse=is_coarse)

        def read(local: Mapping[File, LocalFile]) -> Times | None:
            check_heads(hours, heads)
            slices = slices_of(heads, local)
            sets, hosts = choose_ids(files_in(slices, "label_sets"), selector)
            times = read_times(
                slices, lines, sets=sets, hosts=hosts, edges_s=edges_s, check=self.check
            )
            if not selector.matchers and lines is not Lines.LABELS:
                check_whole(hours, times)
            return times

        return self.read(hours, [file for each in heads for file in each.files], read)

    def self_samples(self, hour: Compacted, hasher: Hasher) -> Part[ObjectSelfSamples]:
        """Read the self samples of an hour by location, for each second in which objects begin."""

        def read(local: Mapping[File, LocalFile]) -> ObjectSelfSamples | None:
            if not has_detail(hour):
                raise ProfileError("its samples by object have expired")
            return read_self_samples(list(local.values()), *seconds_of(hour.window), hasher)

        return self.read([hour], files_of(hour, DETAIL, *DICTIONARY, *HEADS), read)

    def read(
        self,
        hours: Sequence[Compacted],
        files: Sequence[File],
        read: Callable[[Mapping[File, LocalFile]], _Read | None],
    ) -> Part[_Read]:
        """Read files of successive hours; what cannot be read is named, and when it is from."""
        keys = tuple(hour.key for hour in hours)
        unique = list(dict.fromkeys(files))
        try:
            check_named(hours)
            with self._fetched(unique) as local:
                self._check_key(unique, local)
                return Part(keys, read(dict(zip(unique, local, strict=True))))
        except (ProfileError, StoreError, OSError) as error:
            skipped = tuple(Skipped(hour.name, str(error)) for hour in hours)
            return Part(keys, None, skipped, isinstance(error, ProfileError))
        except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
            # Files that were not made by this program may hold anything.
            _log.warning("cannot read compacted hours: %r", error)
            reason = f"its files are damaged: {error}"
            return Part(keys, None, tuple(Skipped(hour.name, reason) for hour in hours))

    @contextlib.contextmanager
    def _sliced(self, chosen: Sequence[Chosen]) -> Iterator[list[Slice]]:
        """Fetch chosen files, as `_fetched` does."""
        files = [file for each in chosen for file in each.files]
        with self._fetched(files) as local:
            yield slices_of(chosen, dict(zip(files, local, strict=True)))

    @contextlib.contextmanager
    def _fetching(self, files: Iterable[File]) -> Iterator[Callable[[], Mapping[File, LocalFile]]]:
        """Fetch files in another thread; what is returned waits for them, and returns them."""
        unique = list(dict.fromkeys(files))
        if not unique:
            yield dict
            return
        with contextlib.ExitStack() as stack, ThreadPoolExecutor(1, "ahead") as pool:
            fetching = pool.submit(stack.enter_context, self._fetched(unique))
            yield lambda: dict(zip(unique, fetching.result(), strict=True))

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
                paths = Copies(self.store.store, folder, size_bytes).fetch(keys)
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
            contents = frozenset(read_contents(files))
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
                known = Manifests(self.store.store, self.store.tenant, type_in_key(type_))
                self._manifests[type_] = known
            return known

    def edges(self, hour: Compacted) -> tuple[Window, Window] | None:
        """Return the windows of the first and the last object of an hour; None if it has none.

        Raises:
            ProfileError, StoreError: they cannot be read.
        """
        with self._sliced(plan_heads([hour], is_coarse=False)) as slices:
            return read_edges(slices)


def parts_without(
    hours: Sequence[Compacted],
    local: Mapping[File, LocalFile],
    hosts: Hashes,
    check: Callable[[], None] | None,
) -> set[str]:
    """Return the ids of the parts that have no samples of some hosts: their heads say so.

    What was compacted at once when its hour was over has each host in one part.
    """
    heads = {
        part.id: [local[file] for file in part.files_of("times") if file in local]
        for hour in hours
        for part in hour.parts_inside
    }
    known = list(itertools.chain.from_iterable(heads.values()))
    having = having_hosts(known, hosts, check)
    return {part for part, files in heads.items() if files and having.isdisjoint(files)}
