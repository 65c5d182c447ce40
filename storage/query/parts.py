"""Parts: reads a window part by part, from what is kept on disk or from the objects.

A part is an object, or a span of a host (`storage.query.listing`) whose objects are merged. Spans
that lie wholly in a window are kept merged once they are old enough that no more objects are
expected. Each kind of value (Columns, FunctionTotals, LocationNames, Times, ObjectSelfSamples) is
kept in a file of its own, named by what it was made from: a late object changes the name of its
span, so that no file is ever out of date. FunctionTotals of a part some of whose locations have
better names in other parts are made with these names, and named by a digest of them as well.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Generic, NamedTuple

import numpy as np

from storage.columns import Columns, Times
from storage.merging import adopt_names, without_stacks
from storage.objects.keys import NS_PER_S
from storage.profile import Window
from storage.query.cache import DecodedCache
from storage.query.coverage import Derived, Kept, Part, Skipped
from storage.query.decoding import FETCHES, Decoder, Progress, join_parts
from storage.query.function_totals import FunctionTotals
from storage.query.listing import (
    HOUR_NS,
    SPANS_NS,
    ListedObject,
    Listing,
    is_inside,
    overlap,
    split_spans,
    union,
)
from storage.query.resolve import KnownNames, LocationNames
from storage.query.self_samples import ObjectSelfSamples
from storage.query.threads import Turns, map_ahead

_SETTLED_AFTER_NS = 300 * NS_PER_S
"""How long after its end a span waits for late objects before it is kept merged."""
_RECENT_NS = HOUR_NS * 5 // 2
"""Windows of the last hour begin inside of ten minutes, as does one before it that it is compared
with."""
_PREPARED_SHARE = 0.75
"""How much of the cache objects that nobody has asked for may take."""
_KINDS = (Columns, FunctionTotals, LocationNames, Times, ObjectSelfSamples)

_Span = tuple[list[ListedObject], bool]
"""Objects of one host, and whether they are all of a span that may be kept merged."""


class Prepared(NamedTuple):
    """A part of a window that was decoded and kept, and how many objects are left to decode."""

    objects: int
    left: int


@dataclass(frozen=True, slots=True)
class Reader(Generic[Kept]):
    """How to read one kind of value: of an object, and of all objects of a span."""

    kind: type[Kept]
    of_object: Callable[[ListedObject], Part[Kept]]
    of_span: Callable[[Sequence[ListedObject]], list[Part[Kept]]]


@dataclass(frozen=True, slots=True)
class Naming:
    """The names that the parts of some windows have for their locations."""

    known: KnownNames = field(default_factory=KnownNames)
    sources: list[list[ListedObject]] = field(default_factory=list)
    """The objects of each part, in the order in which their names were added."""
    tables: dict[int, list[Columns]] = field(default_factory=dict)
    """The location tables of parts that were needed, by part."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Reads the parts of windows. Safe to use from several threads."""

    listing: Listing
    cache: DecodedCache
    decoder: Decoder
    now_ns: Callable[[], int]
    progress: Progress = field(default_factory=Progress)
    _turns: Turns = field(default_factory=Turns)
    _unkept: dict[str, int] = field(default_factory=dict)
    """When a part was prepared that could not be kept, by name."""

    def interruptible(self, check: Callable[[], None]) -> "Parts":
        """Return parts like these that call `check` between objects: what it raises ends it."""
        listing, progress = replace(self.listing, check=check), replace(self.progress, check=check)
        return replace(self, listing=listing, progress=progress)

    def name(self, objects: Sequence[ListedObject]) -> str:
        """Name what is decoded from objects. Time and size tell a repaired one from a damaged."""
        listed = (f"{s.key} {s.size_bytes} {s.modified_ns}" for _, s in objects)
        return self.cache.name([str(self.listing.store), *listed])

    @property
    def columns(self) -> Reader[Columns]:
        return Reader(Columns, self._columns_of_object, self._columns_of_span)

    @property
    def function_totals(self) -> Reader[FunctionTotals]:
        return self._derived(
            FunctionTotals, lambda columns: FunctionTotals.of(columns, self.decoder.hasher)
        )

    @property
    def location_names(self) -> Reader[LocationNames]:
        return self._derived(
            LocationNames, lambda columns: LocationNames.of(columns, self.decoder.hasher)
        )

    def naming(self, windows: Sequence[Window]) -> "Naming":
        """Read the names of all locations in windows."""
        naming = Naming()
        for window in union(windows, 1):
            objects = list(self.listing.objects(window))
            listed = {each.stored.key: each for each in objects}
            spans = self._spans(objects, window, SPANS_NS)
            for part in self._read_spans(self.location_names, spans):
                if part.value is not None:
                    naming.known.add(part.value)
                    naming.sources.append([listed[key] for key in part.keys])
        return naming

    def function_totals_with(self, naming: "Naming") -> Reader[FunctionTotals]:
        """Return a reader of function totals with the best names of those that were read."""
        if not naming.known.is_disputed:
            return self.function_totals

        def of_span(objects: Sequence[ListedObject]) -> list[Part[FunctionTotals]]:
            names = self._read_one(self.location_names, objects)
            better = [naming.known.better(each.value) for each in names if each.value is not None]
            if not any(len(each.sources) for each in better):
                return self._read_one(self.function_totals, objects)
            prints = [each.fingerprint for each in better]
            name = self.cache.name([self.name(objects), *prints])
            keys = tuple(each.stored.key for each in objects)
            known = self.cache.load(FunctionTotals, name)
            if known is not None:
                return [Part(keys, known[0], tuple(Skipped(*each) for each in known[1] or ()))]

            def make(columns: Columns) -> FunctionTotals:
                return FunctionTotals.of(self.named(columns, naming), self.decoder.hasher)

            parts = [each.derive(make) for each in self._read_one(self.columns, objects)]
            for each in parts:
                if each.value is not None and each.is_lasting and each.keys == keys:
                    self.cache.save(each.value, name, each.skipped)
            return parts

        return Reader(FunctionTotals, lambda listed: of_span([listed])[0], of_span)

    def named(self, columns: Columns, naming: "Naming") -> Columns:
        """Return a profile with the best names of those that were read."""
        if not naming.known.is_disputed:
            return columns
        better = naming.known.better(LocationNames.of(columns, self.decoder.hasher))
        sources = np.unique(better.sources).tolist()
        others = [each for number in sources for each in self._named_by(naming, number)]
        return adopt_names(columns, others, better.location_hashes)

    def _named_by(self, naming: "Naming", number: int) -> list[Columns]:
        """Return the location tables of a part, without its stacks."""
        known = naming.tables.get(number)
        if known is None:
            parts = self._read_one(self.columns, naming.sources[number])
            known = [without_stacks(each.value) for each in parts if each.value is not None]
            naming.tables[number] = known
        return known

    def _read_one(self, reader: Reader[Kept], objects: Sequence[ListedObject]) -> list[Part[Kept]]:
        return reader.of_span(objects) if len(objects) > 1 else [reader.of_object(objects[0])]

    @property
    def times(self) -> Reader[Times]:
        return self._derived(Times, Times.of)

    @property
    def self_samples(self) -> Reader[ObjectSelfSamples]:
        return Reader(
            ObjectSelfSamples,
            lambda listed: self._self_samples_of_span([listed])[0],
            self._self_samples_of_span,
        )

    def read(self, reader: Reader[Kept], window: Window) -> Iterator[Part[Kept]]:
        """Return the parts of a window in the order of their keys."""
        spans = self._spans(self.listing.objects(window), window, SPANS_NS)
        yield from self._read_spans(reader, spans)

    def read_around(self, reader: Reader[Kept], windows: Sequence[Window]) -> Iterator[Part[Kept]]:
        """Return the parts of windows; the whole hours around them where these are kept.

        For kinds of values that hold each object on its own: the caller leaves out the others.
        """
        joined = union(windows, 1)

        def spans() -> Iterator[_Span]:
            for hours in union(windows, HOUR_NS):
                objects = self.listing.objects(hours)
                for listed, is_whole in self._spans(objects, hours, SPANS_NS[:1]):
                    number = listed[0].key.start_ns // HOUR_NS
                    hour = Window(number * HOUR_NS, (number + 1) * HOUR_NS)
                    asked = [
                        (window, [each for each in listed if is_inside(each.key, window)])
                        for window in joined
                        if overlap(window, hour)
                    ]
                    count = sum(len(some) for _, some in asked)
                    if count == 0:
                        continue
                    is_all = count == len(listed)
                    if is_whole and (is_all or self.cache.touch(reader.kind, self.name(listed))):
                        yield listed, True
                        continue
                    for window, some in asked:
                        yield from self._spans(some, window, SPANS_NS)

        yield from self._read_spans(reader, spans())

    def prepare(self, window: Window) -> Iterator[Prepared]:
        """Decode and keep what will be asked about a window, its latest part first.

        Yields each part that was not kept before; a caller that stops iterating ends it. What is
        kept is marked as used. It goes back no further than most of the cache reaches.
        """
        settled_ns = self.now_ns() - _SETTLED_AFTER_NS
        groups = self._groups_to_prepare(window, settled_ns)
        reach_bytes = int(self.cache.limit_bytes * _PREPARED_SHARE)
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
                    self._unkept[name] = self.now_ns()
                reach_bytes -= made_bytes
                left -= len(groups[name])
                yield Prepared(len(groups[name]), left)
            if reach_bytes < 0:
                return

    def _groups_to_prepare(
        self, window: Window, settled_ns: int
    ) -> dict[str, Sequence[ListedObject]]:
        """Return by name the latest hours by the spans of which they are made, then whole hours."""
        objects = list(self.listing.objects(window))
        recent = [each for each in objects if each.key.start_ns >= self.now_ns() - _RECENT_NS]
        spans = [
            (listed, is_whole)
            for some, spans_ns in ((recent, SPANS_NS[1:]), (objects, SPANS_NS))
            for listed, is_whole in sorted(
                split_spans(some, window.start_ns, settled_ns, spans_ns),
                key=lambda part: -part[0][-1].key.end_ns,
            )
        ]
        return {
            self.name(group): group
            for listed, is_whole in spans
            for group in ([listed] if is_whole else [[each] for each in reversed(listed)])
        }

    def _touch(self, name: str) -> int:
        """Mark what is kept under a name as used; return its size, 0 if a kind is missing."""
        sizes = [self.cache.touch(kind, name) for kind in _KINDS]
        return sum(sizes) if all(sizes) else 0

    def _read_group(self, group: Sequence[ListedObject]) -> None:
        self._read_one(self.columns, group)
        self._read_one(self.function_totals, group)
        self._read_one(self.location_names, group)
        self._read_one(self.times, group)
        self._read_one(self.self_samples, group)

    def _spans(
        self, objects: Iterable[ListedObject], window: Window, spans_ns: Sequence[int]
    ) -> Iterator[_Span]:
        """Cut the objects of a window into spans that may be kept merged, and others."""
        end_ns = min(window.end_ns, self.now_ns() - _SETTLED_AFTER_NS)
        yield from split_spans(objects, window.start_ns, end_ns, spans_ns)

    def _read_spans(self, reader: Reader[Kept], spans: Iterable[_Span]) -> Iterator[Part[Kept]]:
        with ThreadPoolExecutor(FETCHES, "one") as ones, ThreadPoolExecutor(3, "span") as pool:

            def read(span: _Span) -> list[Part[Kept]]:
                listed, is_whole = span
                if is_whole:
                    return reader.of_span(listed)
                return list(map_ahead(ones, reader.of_object, listed))

            # Three spans at a time: while two are decoded, the next is fetched.
            try:
                for parts in map_ahead(pool, read, spans, ahead=3):
                    self.progress.check()
                    yield from parts
            finally:
                self.progress.report(0)

    def _derived(self, kind: type[Derived], make: Callable[[Columns], Derived]) -> Reader[Derived]:
        """Return a reader of values that are made of the columns, and kept as well as these."""

        def of_object(listed: ListedObject) -> Part[Derived]:
            name = self.name([listed])
            known = self.cache.load(kind, name)
            if known is not None:
                return Part((listed.stored.key,), known[0])
            made = self._columns_of_object(listed).derive(make)
            if made.value is not None:
                self.cache.save(made.value, name)
            return made

        def of_span(objects: Sequence[ListedObject]) -> list[Part[Derived]]:
            known = self._kept_span(kind, objects)
            if known is not None:
                return [known]
            keys = tuple(each.stored.key for each in objects)
            parts = [part.derive(make) for part in self._columns_of_span(objects)]
            for each in parts:
                if each.value is not None and each.is_lasting and each.keys == keys:
                    self.cache.save(each.value, self.name(objects), each.skipped)
            return parts

        return Reader(kind, of_object, of_span)

    def _columns_of_object(self, listed: ListedObject) -> Part[Columns]:
        name = self.name([listed])
        known = self.cache.load(Columns, name)
        if known is None:
            with self._turns.of(name, self.progress.check):
                known = self.cache.load(Columns, name)
                if known is None:
                    (part,) = self.decoder.decode([listed], self.progress)
                    self._keep(part, name)
                    return part
        return Part((listed.stored.key,), known[0])

    def _self_samples_of_span(
        self, objects: Sequence[ListedObject]
    ) -> list[Part[ObjectSelfSamples]]:
        known = self._kept_span(ObjectSelfSamples, objects)
        if known is not None:
            return [known]
        with self._turns.of(self.name(objects), self.progress.check):
            known = self._kept_span(ObjectSelfSamples, objects)
            if known is not None:
                return [known]
            parts = self._merge_span(objects)
            if any(each.value is not None and each.self_samples is None for each in parts):
                # Only the stacks of some object were kept.
                parts = self._merge_span(objects, anew=True)
        return [Part(each.keys, each.self_samples, each.skipped, each.is_lasting) for each in parts]

    def _columns_of_span(self, objects: Sequence[ListedObject]) -> list[Part[Columns]]:
        """Return a host's span as one, or its objects one by one where they do not add up."""
        known = self._kept_span(Columns, objects)
        if known is not None:
            return [known]
        with self._turns.of(self.name(objects), self.progress.check):
            known = self._kept_span(Columns, objects)
            return [known] if known is not None else self._merge_span(objects)

    def _kept_span(self, kind: type[Kept], objects: Sequence[ListedObject]) -> Part[Kept] | None:
        known = self.cache.load(kind, self.name(objects))
        if known is None:
            return None
        keys = tuple(each.stored.key for each in objects)
        # One object is a span of its own, too, and then has no note of what was skipped.
        return Part(keys, known[0], tuple(Skipped(*each) for each in known[1] or ()))

    def _merge_span(
        self, objects: Sequence[ListedObject], *, anew: bool = False
    ) -> list[Part[Columns]]:
        """Decode and merge what is not kept of a span; anew: all of it."""
        read, missing = ([], objects) if anew else self._kept_parts(objects)
        listed = {each.stored.key: each for each in objects}

        def keep(part: Part[Columns]) -> None:
            if part.value is not None and part.is_lasting:
                self._keep(part, self.name([listed[key] for key in part.keys]))

        parts = join_parts([*read, *self.decoder.decode(missing, self.progress, keep)])
        if len(parts) != 1 or parts[0].value is None:
            return parts
        whole = replace(parts[0], keys=tuple(each.stored.key for each in objects))
        if whole.is_lasting:
            self._keep(whole, self.name(objects))
        return [whole]

    def _keep(self, part: Part[Columns], name: str) -> None:
        if part.packed:
            self.cache.save_packed(Columns, part.packed, name)
        elif part.value is not None:
            self.cache.save(part.value, name, part.skipped)
        if part.self_samples is not None:
            self.cache.save(part.self_samples, name, part.skipped)

    def _kept_parts(
        self, objects: Sequence[ListedObject]
    ) -> tuple[list[Part[Columns]], list[ListedObject]]:
        """Return what is kept of a span's shorter spans and objects, and the objects left over."""
        read: list[Part[Columns]] = []
        missing: list[ListedObject] = []
        for span, _ in split_spans(objects, 0, 0, SPANS_NS[1:]):
            if len(span) < len(objects):
                known = self._kept_part(span)
                more, rest = ([known], []) if known is not None else self._kept_parts(span)
            else:
                found = [(each, self._kept_part([each])) for each in span]
                rest = [each for each, known in found if known is None]
                more = join_parts([known for _, known in found if known is not None])
            read += more
            missing += rest
        return read, missing

    def _kept_part(self, objects: Sequence[ListedObject]) -> Part[Columns] | None:
        """Return what is kept of a part to be merged, with its self samples if they are kept."""
        known = self._kept_span(Columns, objects)
        if known is None:
            return None
        self_samples = self.cache.load(ObjectSelfSamples, self.name(objects))
        return replace(known, self_samples=self_samples[0] if self_samples else None)
