"""Wide: has the processes of an executor read the parts of a window that holds much.

A partition is some successive spans or compacted hours of one hour of the clock, or the hours of a
day that are read from its rollups. A worker reads it as this process would, with a cache of its
own, from the store. What a window is read from is decided here, for the whole of it: partitions are
lists of objects and of hours with their manifests, no windows. So the answer is the same to the
last row, and an object that is compacted meanwhile counts once.

Columns come back merged, other kinds of values part by part, packed as the cache keeps them; and
they are kept here in that form. What a worker could not read for a reason that may pass is read
here, as the reason may be the worker's: its network, its credentials, its memory. So is what no
worker is there for, or has killed workers.
"""

import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from storage.columns import Columns, Times
from storage.merging import merge_columns, without_stacks
from storage.objects.keys import StoreError, hour_of
from storage.objects.tenant import TenantStore
from storage.query.cache import pack, unpack
from storage.query.compacted import Compacted, each_without_day
from storage.query.coverage import Kept, Part, Skipped, has_host, merging_early
from storage.query.function_totals import FunctionTotals
from storage.query.naming import Naming
from storage.query.parts import Parts, open_parts
from storage.query.readers import Asked, Reader, Source, Span
from storage.query.resolve import LocationNames
from storage.query.self_samples import ObjectSelfSamples
from storage.query.workers import NoWorkersError, Place
from storage.selector import EMPTY, Selector

LEAST_OBJECTS = 240
"""Objects to be read below which none are handed out: two seconds' work."""
_MOST_OBJECTS = 600
"""Of a partition: four seconds' work, some 10 MB that come back. An hour of more hosts is several
partitions."""
_OBJECTS_OF_COMPACTED = 6
"""Compacted objects that are read in the time of one that is not."""
_AHEAD = 32
"""Partitions handed out at a time. Merging them takes this process a twentieth of what reading them
takes workers, so more workers than that would wait for it."""
_LOOK_S = 0.1
"""How often a wait looks whether it is still wanted."""
_READ_HERE = (BrokenExecutor, NoWorkersError, CancelledError, MemoryError, StoreError, TypeError)
"""What workers raise where this process may fare better. TypeError: sums that cannot be packed."""

_log = logging.getLogger(__name__)


class Packed(NamedTuple):
    """A part as it travels: its value as the cache keeps it, empty if there is none."""

    keys: tuple[str, ...]
    content: bytes
    skipped: tuple[Skipped, ...]
    is_lasting: bool

    @classmethod
    def of(cls, part: Part[Kept]) -> "Packed":
        content = b"" if part.value is None else pack(part.value, part.skipped)
        return cls(part.keys, content, part.skipped, part.is_lasting)

    def part(self, kind: type[Kept]) -> Part[Kept]:
        value = unpack(kind, self.content)[0] if self.content else None
        return Part(self.keys, value, self.skipped, self.is_lasting)


def read_sources(place: Place, asked: Asked, sources: Sequence[Span | Compacted]) -> list[Packed]:
    """Read a partition: what a worker does.

    Raises:
        StoreError: the tenant's key cannot be read.
        TypeError: sums are beyond what can be packed.
    """
    parts = replace(_parts_at(place), hosts=asked.hosts)
    read: Iterable[Part[Any]] = parts.read_here(_reader_of(parts, asked), sources)
    if asked.is_merged:
        read = _merge(read, asked.hosts)
    elif not asked.has_stacks:
        read = (part.derive(without_stacks) for part in read)
    return list(map(Packed.of, read))


def read_hours(
    place: Place, hours: Sequence[Compacted], selector: Selector, rolls_up: bool
) -> list[Packed]:
    """Read the profile of successive large hours as one: what a worker does."""
    part = _parts_at(place).blocks.samples(hours, selector, rolls_up=rolls_up)
    return [Packed.of(part)]


_opened: dict[tuple[str, str, bytes, Path], Parts] = {}
"""Of stores that work was done for, as long as this process lives: they remember what is known."""


def _parts_at(place: Place) -> Parts:
    name = (str(place.store), place.tenant, place.key, place.folder)
    if name not in _opened:
        _opened[name] = open_parts(TenantStore(place.store, place.tenant), place.folder)
    return _opened[name]


def _reader_of(parts: Parts, asked: Asked) -> Reader[Any]:
    if asked.names:
        return Naming.by_table(parts, unpack(Columns, asked.names)[0]).function_totals()
    readers: dict[type[Any], Callable[[], Reader[Any]]] = {
        Columns: lambda: parts.selected_columns(asked.selector),
        FunctionTotals: lambda: parts.function_totals,
        LocationNames: lambda: parts.location_names,
        Times: lambda: parts.times_by(asked.lines),
        ObjectSelfSamples: lambda: parts.self_samples,
    }
    return readers[asked.kind]()


def _merge(parts: Iterable[Part[Columns]], hosts: Selector) -> list[Part[Columns]]:
    """Merge parts that measure the same; leave out those without any of some hosts.

    All rows are kept, selected or not: a location may have its name from any of them.
    """
    merge_early = merging_early(merge_columns, EMPTY)
    alike: dict[tuple[str, str], tuple[list[str], list[Columns]]] = {}
    skipped: list[Skipped] = []
    is_lasting = True
    for part in parts:
        skipped += part.skipped
        is_lasting &= part.is_lasting
        value = part.value
        if value is not None and has_host(value, hosts):
            keys, values = alike.setdefault((value.type, value.unit), ([], []))
            keys += part.keys
            values[:] = merge_early([*values, value])
    merged = [
        Part(tuple(keys), values[0] if len(values) == 1 else merge_columns(values))
        for keys, values in alike.values()
    ]
    first = merged[0] if merged else Part[Columns]((), None)
    return [replace(first, skipped=tuple(skipped), is_lasting=is_lasting), *merged[1:]]


@dataclass(frozen=True, slots=True)
class _Partition:
    """Some successive sources of one hour, all of them kept here or none."""

    sources: list[Span | Compacted]
    hour: str
    objects: int
    """As many of them as take the time that reading takes; 0 if what is read is kept."""
    name: str
    """The name by which the merged part is kept, empty if parts are not merged."""
    has_merged: bool
    """Whether it is kept."""

    @property
    def home(self) -> str:
        """Name what is read alike whatever the window: the hour, and the first host in it."""
        first = self.sources[0]
        host_id = "" if isinstance(first, Compacted) else first[0][0].key.host_id
        return f"{self.hour} {host_id}"


_Handed = TypeVar("_Handed")


@dataclass(frozen=True, slots=True)
class Wide:
    """Hands partitions of a store to an executor.

    What the executor raises ends the reading, but for _READ_HERE.
    """

    executor: Executor
    place: Callable[[], Place]
    """Where workers read; called when the first partition is handed out."""

    def read(
        self, parts: Parts, reader: Reader[Kept], sources: Sequence[Span | Compacted]
    ) -> Iterator[Part[Kept]]:
        """Return the parts of sources in their order."""
        asked = reader.asked
        assert asked is not None
        partitions = list(_cut(parts, reader, asked, sources))
        is_wide = sum(each.objects for each in partitions) >= LEAST_OBJECTS
        if not is_wide and not any(each.has_merged for each in partitions):
            yield from parts.read_here(reader, sources)
            return

        def submit(each: _Partition) -> "Future[list[Packed]] | None":
            if not is_wide or not each.objects:
                return None
            return self._submit(each.home, read_sources, asked, each.sources)

        for each, future in self._ahead(partitions, submit):
            found = None
            if each.has_merged:
                found = _load(parts, reader, each)
            elif future is not None:
                packed = self._wait(parts, future)
                if packed is not None:
                    found = [every.part(reader.kind) for every in packed]
                    _save(parts, reader, asked, each, packed)
                    parts.progress.report(each.objects)
            yield from parts.read_here(reader, each.sources) if found is None else found
        parts.progress.report(0)

    def profile(
        self, parts: Parts, hours: Sequence[Compacted], selector: Selector, *, rolls_up: bool
    ) -> list[Part[Columns]]:
        """Return what `Blocks.profile` does of large hours."""
        length = len("2026-11-30" if rolls_up else "2026-11-30T09")
        groups = [list(some) for _, some in itertools.groupby(hours, lambda h: h.name[:length])]
        if len(groups) == 1:
            return parts.blocks.profile(hours, selector, rolls_up=rolls_up)
        read = self._profiles(parts, groups, selector, rolls_up=rolls_up)
        alone = each_without_day(hours)
        if alone and any(part.value is None and part.skipped for part in read):
            each_alone = [[hour] for hour in alone]
            return self._profiles(parts, each_alone, selector, rolls_up=rolls_up)
        values = [part.value for part in read if part.value is not None]
        if len({(value.type, value.unit) for value in values}) != 1:
            return read
        keys = itertools.chain.from_iterable(part.keys for part in read)
        skipped = itertools.chain.from_iterable(part.skipped for part in read)
        is_lasting = all(part.is_lasting for part in read)
        return [Part(tuple(keys), merge_columns(values), tuple(skipped), is_lasting)]

    def _profiles(
        self,
        parts: Parts,
        groups: Sequence[Sequence[Compacted]],
        selector: Selector,
        *,
        rolls_up: bool,
    ) -> list[Part[Columns]]:
        def submit(hours: Sequence[Compacted]) -> "Future[list[Packed]] | None":
            return self._submit(hours[0].name, read_hours, hours, selector, rolls_up)

        read: list[Part[Columns]] = []
        for hours, future in self._ahead(groups, submit):
            packed = None if future is None else self._wait(parts, future)
            if packed is None:
                read.append(parts.blocks.samples(hours, selector, rolls_up=rolls_up))
            else:
                read += [each.part(Columns) for each in packed]
        return read

    def _submit(
        self, home: str, act: Callable[..., list[Packed]], *things: Any
    ) -> "Future[list[Packed]] | None":
        try:
            return self.executor.submit(act, self.place()._replace(home=home), *things)
        except RuntimeError:  # there are no workers at the moment, or they are shut down
            return None

    def _ahead(
        self,
        things: Iterable[_Handed],
        submit: Callable[[_Handed], "Future[list[Packed]] | None"],
    ) -> Iterator[tuple[_Handed, "Future[list[Packed]] | None"]]:
        """Return things with their futures, in order; those that nobody takes are cancelled."""
        waiting: deque[tuple[_Handed, Future[list[Packed]] | None]] = deque()
        try:
            for thing in things:
                waiting.append((thing, submit(thing)))
                if len(waiting) > _AHEAD:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            for _, future in waiting:
                if future is not None:
                    future.cancel()

    def _wait(self, parts: Parts, future: "Future[list[Packed]]") -> list[Packed] | None:
        """Return what a worker has read; None if this process is to read it."""
        try:
            while not future.done():
                parts.progress.check()
                wait([future], timeout=_LOOK_S)
        finally:
            future.cancel()
        try:
            packed = future.result()
        except _READ_HERE as error:
            if not isinstance(error, NoWorkersError):  # whoever has no workers has said so
                _log.warning("read here what a worker cannot error=%r", error)
            return None
        if all(part.is_lasting for part in packed):
            return packed
        reasons = (each for part in packed if not part.is_lasting for each in part.skipped)
        _log.warning("read here what a worker cannot skipped=%s", next(reasons, None))
        return None


def _cut(
    parts: Parts, reader: Reader[Any], asked: Asked, sources: Sequence[Span | Compacted]
) -> Iterator[_Partition]:
    """Cut sources into partitions, in their order."""
    described = ((each, *_describe(parts, reader, asked, each)) for each in sources)
    for _, group in itertools.groupby(described, lambda each: (each[1], each[2] > 0)):
        some: list[Span | Compacted] = []
        before = 0
        for source, hour, objects in group:
            if some and before + objects > _MOST_OBJECTS:
                yield _partition(parts, asked, some, hour, before)
                some, before = [], 0
            some.append(source)
            before += objects
        yield _partition(parts, asked, some, hour, before)


def _partition(
    parts: Parts, asked: Asked, sources: list[Span | Compacted], hour: str, objects: int
) -> _Partition:
    if not asked.is_merged or not objects:
        return _Partition(sources, hour, objects, "", False)
    names = [parts.name(_source(each)) for each in sources]
    name = parts.cache.name(["partition", str(asked.hosts), str(asked.selector), *names])
    has_merged = parts.cache.touch(Columns, name) > 0
    return _Partition(sources, hour, 0 if has_merged else objects, name, has_merged)


def _describe(
    parts: Parts, reader: Reader[Any], asked: Asked, source: Span | Compacted
) -> tuple[str, int]:
    """Return the hour of a source, and how many objects are not kept."""

    def is_kept(some: Source) -> bool:
        name = _name_of(parts, reader, asked, some)
        kept = parts.cache.touch(reader.kind, name) if asked.has_stacks else 0
        # What is made of columns that are here takes less time than to ask for it.
        return bool(kept or parts.cache.touch(Columns, parts.name(some)))

    if isinstance(source, Compacted):
        objects = sum(part.objects for part in source.parts_inside) // _OBJECTS_OF_COMPACTED
        return source.name, 0 if source.is_whole and is_kept(source) else objects
    listed, is_whole = source
    hour = hour_of(listed[0].key.start_s)
    if is_whole:
        return hour, 0 if is_kept(listed) else len(listed)
    return hour, sum(not is_kept([each]) for each in listed)


def _name_of(parts: Parts, reader: Reader[Any], asked: Asked, source: Source) -> str:
    """Return the name by which what a reader returns of a source is kept."""
    if reader.name_of is not None:
        return reader.name_of(source)
    return parts.name(source) + (asked.mark if isinstance(source, Compacted) else "")


def _source(source: Span | Compacted) -> Source:
    return source if isinstance(source, Compacted) else source[0]


def _load(parts: Parts, reader: Reader[Kept], partition: _Partition) -> list[Part[Kept]] | None:
    """Return what is kept merged of a partition; None if it is gone meanwhile."""
    known = parts.cache.load(reader.kind, partition.name)
    if known is None:
        return None
    keys: list[str] = []
    for each in map(_source, partition.sources):
        keys += [each.key] if isinstance(each, Compacted) else [one.stored.key for one in each]
    return [Part(tuple(keys), known[0], tuple(Skipped(*each) for each in known[1] or ()))]


def _save(
    parts: Parts,
    reader: Reader[Any],
    asked: Asked,
    partition: _Partition,
    packed: Sequence[Packed],
) -> None:
    """Keep what a worker has read as if it had been read here; what is merged, as one."""
    if not asked.has_stacks:
        return
    if asked.is_merged:
        if len(packed) == 1 and packed[0].content:
            parts.cache.save_packed(Columns, packed[0].content, partition.name)
        return
    named: dict[tuple[str, ...], Source] = {}
    for source in partition.sources:
        if isinstance(source, Compacted):
            named |= {(source.key,): source} if source.is_whole else {}
        elif source[1]:
            named[tuple(each.stored.key for each in source[0])] = source[0]
        else:
            named |= {(each.stored.key,): [each] for each in source[0]}
    for part in packed:
        if part.content and part.keys in named:
            name = _name_of(parts, reader, asked, named[part.keys])
            parts.cache.save_packed(reader.kind, part.content, name)
