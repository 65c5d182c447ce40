"""Compactor: turns the level-0 objects of an hour into few files, and keeps rollups of them.

Any number of compactors may run on a store, and each may be killed at any moment: no sample is lost
or counted twice. That rests on a few rules, with `storage.blocks.manifest`:

- Everything that is written is new: no file has a name that was there before. It counts from the
  moment on at which a manifest names it, and a manifest is replaced only by those who have seen its
  last content.
- A part is added to a manifest only if none of its objects is in another part there. Otherwise
  somebody else was faster: the part's files become garbage, and what is left is folded again.
- Parts are replaced by their merged one only if the manifest still names all of them.
- Rollups name the parts that they are made of, and count only as long as these are the parts.
- Garbage is what no manifest names and is older than a grace by the store's own clock
  (`storage.blocks.retention`). Nobody names files that took half as long to make.
- Level-0 objects are deleted only after a part has contained them for a while.

The work on data (`storage.blocks.work`) is handed to an executor, which is the caller's. An object
that kills its worker is found by halves.
"""

import functools
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from msgspec.structs import replace

from storage.blocks.budget import FOLD_BYTES, MemoryBudget, expected_bytes
from storage.blocks.hosts import read_contents
from storage.blocks.manifest import (
    File,
    HourManifest,
    Manifests,
    Part,
    Unreadable,
    content_of,
    end_ns_of,
    producer,
    start_s_of,
)
from storage.blocks.parquet import DEFAULT_MEMORY_BYTES
from storage.blocks.work import (
    Folded,
    NewPart,
    copies_in,
    fold_alone,
    fold_objects,
    local_files,
)
from storage.objects.keys import CPU, NS_PER_S, ObjectKey, StoredObject, hour_of
from storage.objects.tenant import HOUR_NS, TenantStore
from storage.objects.tenant_key import make_tenant_key, read_tenant_key
from storage.query.workers import HasLoneWorker, LoneWorker, NoWorkersError, Place

GRACE_S = 3600.0
"""What no manifest names is deleted once it is so old: it may be about to be named, and readers may
still use what a manifest named until a moment ago."""
SETTLED_NS = 300 * NS_PER_S
"""An hour is over so long after its end: uploads are jittered, and hosts' clocks differ."""
_AGAIN_AFTER = 8
"""What has been over for some time is looked at again after an eighth of that: some 60 times in the
week in which objects may be late."""

_BATCH_OBJECTS, _BATCH_BYTES = 240, 24 << 20
"""What one piece of work folds, as stored: some seconds of decoding."""
_IN_FLIGHT = 8
"""Batches of an hour that are handed to the executor at a time."""
_CHANGE_AFTER_S = 20.0
"""A fold that takes longer names what it has by then."""
_FOLD_ATTEMPTS = 5
_FEW_OBJECTS, _FEW_BYTES = 64, 8 << 20
"""Fewer than these of an hour that goes on wait for more, if the compactor is patient: each part
costs a reader some requests."""
_UNREADABLE_LIMIT = 1000
"""Objects that a manifest names as unreadable. Further ones are tried at each listing."""
_RETRY_NS = 24 * HOUR_NS
"""An unreadable object is tried again: memory may have been short."""
_REMEMBERED_CONTENTS = 2_000_000

_Made = TypeVar("_Made")


@dataclass(slots=True)
class Report:
    """What a run has done, or would do. Several threads may add to it."""

    counts: Counter[str] = field(default_factory=Counter)
    """objects: folded into parts; parts: made of them; conflicts: work dropped because another
    compactor was faster; merged: parts merged into others; hourly, daily: rollups made; deleted
    objects: level0, garbage; hours or days of which a level has expired: detail, 10m, 1h, 1d;
    pinned: hours that pins keep from expiring."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Reasons by key, of those found in this run."""
    problems: dict[str, str] = field(default_factory=dict)
    """Why something could not be done, by the hour or day."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, **counts: int) -> None:
        with self._lock:
            for name, count in counts.items():
                self.counts[name] += int(count)

    def __getitem__(self, name: str) -> int:
        return self.counts[name]


def _tell_nothing(_line: str) -> None:
    """Say nothing, where nobody listens."""


class Compactor:
    """Compacts the profiles of one type of a tenant. Several threads may call its methods.

    With `patience_s` few new objects of an hour that goes on wait for others, at most so long;
    without, all that is there is folded. `memory_bytes` is what DuckDB may take at most for
    a piece of work, which waits for its share of `budget`. `is_dry` changes nothing, and the report
    counts what would be done.

    Attributes:
        manifests: of this type.
        report: what was done since it was last replaced.
        now_ns: this machine's clock.
    """

    def __init__(
        self,
        store: TenantStore,
        folder: Path,
        executor: Executor,
        *,
        type_: str = CPU,
        now_ns: Callable[[], int] = time.time_ns,
        grace_s: float = GRACE_S,
        patience_s: float = 0.0,
        memory_bytes: int = DEFAULT_MEMORY_BYTES,
        budget: MemoryBudget | None = None,
        is_dry: bool = False,
        tell: Callable[[str], None] = _tell_nothing,
    ) -> None:
        self.tenant = store
        self.store = store.store
        self.type = type_
        self.manifests = Manifests(store.store, store.tenant, type_)
        self.report = Report()
        self.now_ns = now_ns
        self.grace_s = grace_s
        self.patience_s = patience_s
        self.memory_bytes = memory_bytes
        self._budget = budget or MemoryBudget()
        self.is_dry = is_dry
        self.tell = tell
        self._folder = folder
        self._executor = executor
        self._copies = copies_in(store.store, folder)
        self._contents: dict[str, frozenset[str]] = {}
        self._lock = threading.Lock()

    @functools.cached_property
    def _key(self) -> bytes:
        if not self.is_dry:
            # Ids under the one that follows from the tenant's name would mean nothing once there is
            # another: readers refuse them.
            make_tenant_key(self.store, self.tenant.tenant)
        return read_tenant_key(self.store, self.tenant.tenant)

    def end(self) -> None:
        """Let no further work begin, here and where the budget is shared: it raises CancelledError.

        What has been done is kept.
        """
        self._budget.end()

    def is_over(self, name: str) -> bool:
        """Return whether an hour or a day is over, and what belongs to it has been uploaded."""
        return self.now_ns() >= end_ns_of(name) + SETTLED_NS

    def is_time_again(self, name: str, last_ns: int) -> bool:
        """Return whether an hour or a day that is over is to be looked at again."""
        settled_ns = end_ns_of(name) + SETTLED_NS
        over_for_ns = self.now_ns() - settled_ns
        is_first = last_ns < settled_ns
        return over_for_ns >= 0 and (
            is_first or self.now_ns() >= last_ns + over_for_ns // _AGAIN_AFTER
        )

    def level0(self, hour: str) -> Iterator[tuple[ObjectKey, StoredObject]]:
        """Return the level-0 objects of an hour."""
        return self.tenant.list_hour(start_s_of(hour) * NS_PER_S, self.type)

    def occupied_hours(self, start_ns: int = 0) -> Iterator[str]:
        """Return the hours from a time on that have level-0 objects, with a short listing each."""
        while (key := self.tenant.first_object(max(0, start_ns), self.type)) is not None:
            hour_ns = key.start_ns // HOUR_NS * HOUR_NS
            yield hour_of(hour_ns // NS_PER_S)
            start_ns = hour_ns + HOUR_NS

    def fold(self, hour: str) -> int:
        """Fold the level-0 objects of an hour that no part contains; return how many.

        Raises:
            StoreError: the store cannot be reached or refuses, or a part's file is missing.
            ProfileError: the manifest or the table of a part's objects is damaged.
        """
        listed_ns = self.now_ns()
        left = list(self.level0(hour))
        folded = 0
        for _ in range(_FOLD_ATTEMPTS):
            manifest = self.manifests.hour(hour)
            named = self.contents_of(manifest.parts)
            set_aside = self._set_aside(manifest) | self.report.unreadable.keys()
            left = [
                (key, stored)
                for key, stored in left
                if key.content16 not in named and key.text not in set_aside
            ]
            # Content that is stored under several keys counts once.
            distinct = list({key.content16: (key, stored) for key, stored in left}.values())
            if not left:
                self._note_listing(manifest, listed_ns)
                break
            if self._waits_for_more(hour, distinct):
                break
            if self.is_dry:
                self.report.add(objects=len(distinct))
                return len(distinct)
            folded += self._fold_batches(hour, distinct)
        if folded:
            self.tell(f"{hour}: objects folded: {folded:,}")
        return folded

    def _set_aside(self, manifest: HourManifest) -> set[str]:
        """Return the keys of the objects that this version could not read a short while ago."""
        oldest_ns = self.now_ns() - _RETRY_NS
        return {
            each.key
            for each in manifest.unreadable
            if each.producer == producer() and each.tried_ns > oldest_ns
        }

    def _note_listing(self, manifest: HourManifest, listed_ns: int) -> None:
        """Note that nothing is left of an hour that is over, if that is news.

        Not each time: garbage is collected only where the manifest has not changed for a while.
        """
        is_there = bool(manifest.parts or manifest.unreadable)
        if is_there and not self.is_dry and self.is_time_again(manifest.hour, manifest.listed_ns):
            self.manifests.change_hour(
                manifest.hour,
                lambda current: replace(current, listed_ns=max(current.listed_ns, listed_ns)),
            )

    def _waits_for_more(self, hour: str, left: Collection[tuple[ObjectKey, StoredObject]]) -> bool:
        if not self.patience_s or self.is_over(hour):
            return False
        size_bytes = sum(stored.size_bytes for _, stored in left)
        if len(left) >= _FEW_OBJECTS or size_bytes >= _FEW_BYTES:
            return False
        oldest_ns = min(stored.modified_ns for _, stored in left)
        return oldest_ns > self.now_ns() - self.patience_s * NS_PER_S

    def _fold_batches(self, hour: str, objects: Sequence[tuple[ObjectKey, StoredObject]]) -> int:
        """Fold objects in batches; return how many are in parts now."""
        place = self._place(hour)
        waiting: deque[tuple[float, list[ObjectKey], Future[Folded] | None]] = deque()
        done: list[tuple[float, Folded]] = []
        folded = 0
        changed_s = time.monotonic()
        try:
            for batch in (*_batches(objects), None):
                if batch is not None:
                    waiting.append((awake_s(), batch, self._submit_fold(place, batch)))
                while waiting and (batch is None or len(waiting) >= _IN_FLIGHT):
                    begun_s, keys, future = waiting.popleft()
                    done.append((begun_s, self._result_of(place, keys, future)))
                    if time.monotonic() > changed_s + _CHANGE_AFTER_S:
                        folded += self._name_parts(hour, done)
                        done.clear()
                        changed_s = time.monotonic()
        finally:
            for _, _, future in waiting:
                if future is not None:
                    future.cancel()
            # Also after an error: these parts are whole, and their work need not be done again.
            if done:
                folded += self._name_parts(hour, done)
        return folded

    def _result_of(
        self, place: Place, keys: Sequence[ObjectKey], future: "Future[Folded] | None"
    ) -> Folded:
        """Return what a batch was folded into; if that killed its worker, find out what did."""
        try:
            if future is not None:
                return future.result()
        except (BrokenExecutor, MemoryError):
            pass
        with self._budget.taking(FOLD_BYTES), self._lone_worker() as worker:
            return fold_alone(worker, place, keys)

    def _submit_fold(self, place: Place, keys: Sequence[ObjectKey]) -> "Future[Folded] | None":
        """Wait for memory, and hand a batch to the executor as `_submit` does."""
        taken_bytes = self._budget.take(FOLD_BYTES)
        future = None
        try:
            future = self._submit(fold_objects, place, keys)
        finally:
            if future is None:
                self._budget.give_back(taken_bytes)
        if future is not None:
            future.add_done_callback(lambda _: self._budget.give_back(taken_bytes))
        return future

    def _name_parts(self, hour: str, done: Sequence[tuple[float, Folded]]) -> int:
        """Name new parts in the manifest, those of which no object is in another part there.

        Returns how many objects the named ones have.
        """
        made = [(begun_s, part) for begun_s, folded in done for part in folded.parts]
        new = {part.part.id: part for begun_s, part in made if self.is_in_time(begun_s)}
        unreadable = [each for _, folded in done for each in folded.unreadable]
        for each in unreadable:
            self.report.unreadable[each.key] = each.reason
        named: list[NewPart] = []

        def add(manifest: HourManifest) -> HourManifest:
            named.clear()
            others = [part for part in manifest.parts if part.id not in new]
            taken = self.contents_of(others)
            # One that is there already was added by an attempt whose response was lost, or by
            # another compactor that has made the same.
            parts = {part.id: part for part in manifest.parts}
            unit = manifest.unit if manifest.parts else ""
            aside = {each.key: each for each in manifest.unreadable}
            misfits: list[Unreadable] = []
            for each in new.values():
                unit = unit or each.unit
                if each.unit != unit:
                    misfits += _misfits(each, unit)
                elif taken.isdisjoint(each.contents):
                    taken |= each.contents
                    parts.setdefault(each.part.id, each.part)
                    named.append(each)
            for found in (*unreadable, *misfits):
                if found.key in aside or len(aside) < _UNREADABLE_LIMIT:
                    aside[found.key] = found
            kept = tuple(each for each in aside.values() if content_of(each.key) not in taken)
            return replace(manifest, unit=unit, parts=tuple(parts.values()), unreadable=kept)

        if new or unreadable:
            self.manifests.change_hour(hour, add)
        for part in named:
            self.remember_contents(part.part.id, part.contents)
        objects = sum(part.part.objects for part in named)
        self.report.add(objects=objects, parts=len(named), conflicts=len(made) - len(named))
        return objects

    def is_in_time(self, begun_s: float) -> bool:
        """Return whether files that were begun at a time of `awake_s` may still be named."""
        return awake_s() < begun_s + self.grace_s / 2

    def contents_of(self, parts: Iterable[Part]) -> set[str]:
        """Return the content16 of all objects in some parts.

        Raises:
            StoreError: a part's file is missing, or the store cannot be reached.
            ProfileError: a part's file is damaged.
        """
        contents: set[str] = set()
        for part in parts:
            known = self._contents.get(part.id)
            if known is None:
                files = part.files_of("objects")
                paths = self._copies.fetch([file.key for file in files])
                known = frozenset(read_contents(local_files(files, paths)))
                self.remember_contents(part.id, known)
            contents |= known
        return contents

    def remember_contents(self, id_: str, contents: frozenset[str]) -> None:
        with self._lock:
            self._contents[id_] = contents
            while sum(map(len, self._contents.values())) > _REMEMBERED_CONTENTS:
                del self._contents[next(iter(self._contents))]

    def work(
        self, name: str, act: Callable[..., _Made], *things: object, reads: Iterable[File]
    ) -> _Made:
        """Have `act(place, *things, memory_bytes)` done for an hour or a day, which reads files.

        It is done once there is memory for it, by the executor, or by a process of its own if it is
        large or the executor has just lost a worker.

        Raises:
            BrokenExecutor: that one was killed, too.
            MemoryError: there is too little.
        """
        read_bytes = sum(file.bytes for file in reads)
        memory_bytes = self._budget.engine_bytes(read_bytes, self.memory_bytes)
        all_things = (self._place(name), *things, memory_bytes)
        with self._budget.taking(expected_bytes(read_bytes, memory_bytes)):
            is_apart = self._budget.is_apart(read_bytes)
            future = None if is_apart else self._submit(act, *all_things)
            try:
                if future is not None:
                    return future.result()
            except BrokenExecutor:
                pass
            with self._lone_worker() as worker:
                return worker.run(act, *all_things)

    def _submit(self, act: Callable[..., _Made], *things: object) -> "Future[_Made] | None":
        """Hand work to the executor; None if it takes none now, because it has lost a worker."""
        try:
            return self._executor.submit(act, *things)
        except (BrokenExecutor, NoWorkersError):
            return None

    def _lone_worker(self) -> LoneWorker:
        executor = self._executor
        return executor.lone_worker() if isinstance(executor, HasLoneWorker) else LoneWorker()

    def _place(self, name: str) -> Place:
        return Place(self.store, self.tenant.tenant, self._key, self._folder, self.type, name)


def awake_s() -> float:
    """Return a time that goes on while the machine sleeps, as the age of files in a store does."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _misfits(new: NewPart, unit: str) -> list[Unreadable]:
    reason = f"it is measured in {new.unit!r}, other objects of its hour in {unit!r}"
    return [Unreadable(key, reason, producer(), time.time_ns()) for key in new.keys]


def _batches(
    objects: Iterable[tuple[ObjectKey, StoredObject]],
) -> Iterator[list[ObjectKey]]:
    """Cut objects into batches. Those of a host follow each other: their stacks are alike."""
    batch: list[ObjectKey] = []
    size_bytes = 0
    for key, stored in objects:
        size_bytes += stored.size_bytes
        if batch and (len(batch) >= _BATCH_OBJECTS or size_bytes > _BATCH_BYTES):
            yield batch
            batch, size_bytes = [], stored.size_bytes
        batch.append(key)
    if batch:
        yield batch
