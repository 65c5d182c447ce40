"""Parts: reads a window part by part, from what is kept on disk, compacted hours or objects.

A part is a compacted hour (`storage.query.blocks`), an object that is in none, or a span of a host
(`storage.query.listing`) whose objects are merged. Spans that lie wholly in a window are kept
merged once they are old enough that no more objects are expected, and so are compacted hours. Each
kind of value (Columns, FunctionTotals, LocationNames, Times, ObjectSelfSamples) is
kept in a file of its own, named by what it was made from: a late object changes the name of its
span, so that no file is ever out of date. FunctionTotals of a part some of whose locations have
better names in other parts are made with these names, and named by a digest of them as well.
"""

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from storage.blocks.block import DROPPED_LABELS, ROLLUP_LABELS
from storage.blocks.times import Lines
from storage.columns import Columns, Times
from storage.objects.copies import Copies
from storage.objects.keys import NS_PER_S
from storage.objects.tenant import TenantStore
from storage.objects.tenant_key import read_tenant_key
from storage.profile import Window
from storage.query.blocks import Blocks
from storage.query.cache import DEFAULT_LIMIT_BYTES, DecodedCache
from storage.query.compacted import Compacted, has_detail, is_aligned
from storage.query.coverage import Derived, Kept, ListedObject, Part, Skipped
from storage.query.decoding import FETCHES, Decoder, Progress, join_parts
from storage.query.function_totals import FunctionTotals
from storage.query.listing import HOUR_NS, SPAN_NS, Listing, is_inside, overlap, split_spans, union
from storage.query.readers import Asked, Reader, ReadsElsewhere, Source, Span
from storage.query.resolve import LocationNames
from storage.query.self_samples import ObjectSelfSamples
from storage.query.threads import Turns, map_ahead
from storage.query.workers import Workers
from storage.selector import EMPTY, Selector

_SETTLED_AFTER_NS = 300 * NS_PER_S
"""How long after its end a span waits for late objects before it is kept merged."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Reads the parts of windows. Safe to use from several threads."""

    listing: Listing
    blocks: Blocks
    cache: DecodedCache
    decoder: Decoder
    now_ns: Callable[[], int]
    progress: Progress = field(default_factory=Progress)
    hosts: Selector = EMPTY
    """Matchers of the label `host`: objects of other hosts may be left out."""
    elsewhere: ReadsElsewhere | None = None
    """What has other processes read much of a window."""
    _turns: Turns = field(default_factory=Turns)

    def interruptible(self, check: Callable[[], None]) -> "Parts":
        """Return parts like these that call `check` between objects: what it raises ends it."""
        blocks = self.blocks.interruptible(check)
        listing = replace(self.listing, blocks=blocks, check=check)
        progress = replace(self.progress, check=check)
        return replace(self, listing=listing, blocks=blocks, progress=progress)

    def of_hosts(self, selector: Selector, names: Iterable[str] = ()) -> "Parts":
        """Return parts like these that may leave out the objects of hosts not selected.

        Selectors of labels that compaction drops, and answers by these `names`, take level 0.
        """
        matchers = tuple(each for each in selector.matchers if each.name == "host")
        is_level0 = not DROPPED_LABELS.isdisjoint((*selector.names, *names))
        listing = self.listing.of_level0() if is_level0 else self.listing
        return replace(self, listing=listing, hosts=Selector(matchers))

    def name(self, source: Source) -> str:
        """Name what is read from objects. Time and size tell a repaired one from a damaged."""
        if isinstance(source, Compacted):
            return self.cache.name([str(self.listing.store), source.key, str(self.hosts)])
        listed = (f"{s.key} {s.size_bytes} {s.modified_ns}" for _, s in source)
        return self.cache.name([str(self.listing.store), *listed])

    def name_of_window(self, window: Window, labels: frozenset[str] | None) -> str:
        """Name what a window holds: as long as the name is the same, so is every answer."""
        listed = self.listing.at(window)
        hours = (hour.key for hour in listed.hours)
        kind = "rollups" if self.blocks.uses_rollups(listed.hours, labels) else "detail"
        return self.cache.name([self.name(listed.objects), kind, *hours])

    @property
    def columns(self) -> Reader[Columns]:
        return self.selected_columns(EMPTY)

    def selected_columns(self, selector: Selector) -> Reader[Columns]:
        """Return a reader that may leave out, of compacted hours, what is not selected."""

        def of_hour(hour: Compacted) -> Part[Columns]:
            return self._columns_of_hour(hour, selector)

        asked = Asked(Columns, self.hosts, selector)
        return Reader(Columns, self._columns_of_object, self._columns_of_span, of_hour, asked)

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

    @property
    def times(self) -> Reader[Times]:
        return self.times_by(Lines.EACH)

    def times_by(self, lines: Lines) -> Reader[Times]:
        """Return a reader of Times that adds up lines of compacted hours."""

        def read(hour: Compacted) -> Part[Times]:
            return self.blocks.times([hour], self.hosts, lines)[0]

        def of_hour(hour: Compacted) -> Part[Times]:
            return self._of_hour(Times, hour, read, asked.mark)

        asked = Asked(Times, self.hosts, lines=lines)
        return replace(self._derived(Times, Times.of), of_hour=of_hour, asked=asked)

    @property
    def self_samples(self) -> Reader[ObjectSelfSamples]:
        return Reader(
            ObjectSelfSamples,
            lambda listed: self._self_samples_of_span([listed])[0],
            self._self_samples_of_span,
            lambda hour: self._of_hour(ObjectSelfSamples, hour, self._self_samples_of_hour),
            Asked(ObjectSelfSamples, self.hosts),
        )

    def read(self, reader: Reader[Kept], window: Window) -> Iterator[Part[Kept]]:
        """Return the parts of a window in the order of their keys."""
        listed = self.listing.at(window)
        yield from skipped_parts(listed.skipped)
        spans = self.spans(listed.objects, window)
        yield from self.read_spans(reader, itertools.chain(listed.hours, spans))

    def read_profile(
        self, window: Window, selector: Selector, labels: frozenset[str] | None
    ) -> Iterator[Part[Columns]]:
        """Return the profiles of a window.

        Compacted hours are kept one by one and merged, or if they are large, read together, and
        what is read of rollups is kept as a whole: see `Blocks.profile`.
        """
        listed = self.listing.at(window)
        yield from skipped_parts(listed.skipped)
        if self.blocks.is_large(listed.hours):
            yield from self._read_together(
                listed.hours, lambda: self._profile_of(listed.hours, selector, labels)
            )
        else:
            yield from self.read_spans(self.selected_columns(selector), listed.hours)
        spans = self.spans(listed.objects, window)
        yield from self.read_spans(self.columns, spans)

    def _profile_of(
        self, hours: Sequence[Compacted], selector: Selector, labels: frozenset[str] | None
    ) -> list[Part[Columns]]:
        """Read the profile of large hours. It is kept if it may be asked for again: once rolled up.

        A day of a fleet takes 45 MB. Windows that end now are others each time.
        """
        rolls_up = self.blocks.uses_rollups(hours, labels)
        if not rolls_up or not all(map(is_aligned, hours)):
            return self._read_large(hours, selector, rolls_up=rolls_up)
        keys = tuple(hour.key for hour in hours)
        name = self.cache.name([str(self.listing.store), "rolled up", str(selector), *keys])
        with self._turns.of(name, self.progress.check):
            known = self.cache.load(Columns, name)
            if known is not None:
                return [Part(keys, known[0], tuple(Skipped(*each) for each in known[1] or ()))]
            parts = self._read_large(hours, selector, rolls_up=rolls_up)
            for each in parts:
                if each.value is not None and each.is_lasting and each.keys == keys:
                    self.cache.save_later(each.value, name, each.skipped)
            return parts

    def _read_large(
        self, hours: Sequence[Compacted], selector: Selector, *, rolls_up: bool
    ) -> list[Part[Columns]]:
        if self.elsewhere is None:
            return self.blocks.profile(hours, selector, rolls_up=rolls_up)
        return self.elsewhere.profile(self, hours, selector, rolls_up=rolls_up)

    def read_times(
        self,
        window: Window,
        selector: Selector,
        labels: frozenset[str],
        lines: Lines,
        *,
        is_coarse: bool,
        edges_s: Sequence[int] = (),
    ) -> Iterator[Part[Times]]:
        """Return the selected Times of a window for a reader that needs only some labels and lines.

        Of hours with many objects lines are added up, and if ten minutes are fine enough, heads are
        read in place of objects if they have these labels. `edges_s` are those of Lines.HOST, whose
        reader takes lines of single objects as well.
        """
        listed = self.listing.at(window)
        yield from skipped_parts(listed.skipped)
        others: list[Compacted] = []
        if not self.blocks.has_many(listed.hours):
            others, reader = listed.hours, self.times
        elif lines is Lines.LABELS or (is_coarse and labels <= {*ROLLUP_LABELS, "host"}):
            reader = self.times
            yield from self._read_together(
                listed.hours,
                lambda: self.blocks.times(
                    listed.hours, selector, lines, is_coarse=is_coarse, edges_s=edges_s
                ),
            )
        else:
            others = listed.hours
            reader = self.times if lines is Lines.HOST else self.times_by(lines)
        spans = self.spans(listed.objects, window)
        for part in self.read_spans(reader, itertools.chain(others, spans)):
            yield part.derive(lambda value: value.filter(selector))

    def _read_together(
        self, hours: Sequence[Compacted], read: Callable[[], list[Part[Kept]]]
    ) -> Iterator[Part[Kept]]:
        """Return what is read of several hours at once."""
        self.progress.check()
        parts = read()
        self.progress.report(sum(part.objects for hour in hours for part in hour.parts))
        self.progress.report(0)
        yield from parts

    def read_around(self, reader: Reader[Kept], windows: Sequence[Window]) -> Iterator[Part[Kept]]:
        """Return the parts of windows; what is kept of the whole hours and spans around them.

        For kinds of values that hold each object on its own: the caller leaves out the others.
        """
        joined = union(windows, 1)

        def spans() -> Iterator[Span | Compacted]:
            for hours in union(windows, HOUR_NS):
                found = self.listing.at(hours)
                for compacted in found.hours:
                    if any(overlap(window, compacted.window) for window in joined):
                        yield compacted
                objects = found.objects
                for listed, is_whole in self.spans(objects, hours):
                    number = listed[0].key.start_ns // SPAN_NS
                    span = Window(number * SPAN_NS, (number + 1) * SPAN_NS)
                    asked = [
                        some
                        for window in joined
                        if overlap(window, span)
                        and (some := [each for each in listed if is_inside(each.key, window)])
                    ]
                    is_all = sum(map(len, asked)) == len(listed)
                    if not asked:
                        continue
                    if is_whole and (is_all or self.cache.touch(reader.kind, self.name(listed))):
                        yield listed, True
                    else:
                        yield from ((some, False) for some in asked)

        yield from self.read_spans(reader, spans())

    def spans(self, objects: Iterable[ListedObject], window: Window) -> Iterator[Span]:
        """Cut the objects of a window into spans that may be kept merged, and others."""
        end_ns = min(window.end_ns, self.now_ns() - _SETTLED_AFTER_NS)
        yield from split_spans(objects, window.start_ns, end_ns)

    def read_spans(
        self, reader: Reader[Kept], spans: Iterable[Span | Compacted]
    ) -> Iterator[Part[Kept]]:
        """Return the parts of spans and hours in their order; other processes may read some."""
        if self.elsewhere is None or reader.asked is None:
            return self.read_here(reader, spans)
        return self.elsewhere.read(self, reader, list(spans))

    def read_here(
        self, reader: Reader[Kept], spans: Iterable[Span | Compacted]
    ) -> Iterator[Part[Kept]]:
        with ThreadPoolExecutor(FETCHES, "one") as ones, ThreadPoolExecutor(3, "span") as pool:

            def read(span: Span | Compacted) -> list[Part[Kept]]:
                if isinstance(span, Compacted):
                    return [reader.of_hour(span)]
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

        def of_hour(hour: Compacted) -> Part[Derived]:
            def read(hour: Compacted) -> Part[Derived]:
                return self._columns_of_hour(hour, EMPTY).derive(make)

            return self._of_hour(kind, hour, read)

        return Reader(kind, of_object, of_span, of_hour, Asked(kind, self.hosts))

    def _of_hour(
        self,
        kind: type[Kept],
        hour: Compacted,
        read: Callable[[Compacted], Part[Kept]],
        mark: str = "",
    ) -> Part[Kept]:
        """Read a compacted hour; a whole one is kept, as all that is made of it.

        `mark` tells values of one kind apart.
        """
        name = self.name(hour) + mark
        known = self._kept_hour(kind, hour, name)
        if known is not None:
            return known
        with self._turns.of(f"{kind.__name__} {name}", self.progress.check):
            known = self._kept_hour(kind, hour, name)
            if known is not None:
                return known
            part = read(hour)
            if part.value is not None and part.is_lasting and hour.is_whole:
                self.cache.save(part.value, name, part.skipped)
            return part

    def _kept_hour(self, kind: type[Kept], hour: Compacted, name: str) -> Part[Kept] | None:
        known = self.cache.load(kind, name) if hour.is_whole else None
        if known is None:
            return None
        return Part((hour.key,), known[0], tuple(Skipped(*each) for each in known[1] or ()))

    def _columns_of_hour(self, hour: Compacted, selector: Selector) -> Part[Columns]:
        """Read an hour; if it is not kept, without what is not selected."""
        if selector.matchers:
            # Of expired detail not all labels are left, which reading it says.
            name = self.name(hour)
            known = self._kept_hour(Columns, hour, name) if has_detail(hour) else None
            return known or self.blocks.columns(hour, selector)
        return self._of_hour(Columns, hour, lambda hour: self.blocks.columns(hour, self.hosts))

    def _self_samples_of_hour(self, hour: Compacted) -> Part[ObjectSelfSamples]:
        return self.blocks.self_samples(hour, self.decoder.hasher)

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
        parts = join_parts([*read, *self.decoder.decode(missing, self.progress)])
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
        """Return what is kept of a span's objects, and the objects left over."""
        found = [(each, self._kept_part(each)) for each in objects]
        kept = [known for _, known in found if known is not None]
        return join_parts(kept), [each for each, known in found if known is None]

    def _kept_part(self, listed: ListedObject) -> Part[Columns] | None:
        """Return what is kept of an object, with its self samples if they are kept."""
        known = self._kept_span(Columns, [listed])
        if known is None:
            return None
        self_samples = self.cache.load(ObjectSelfSamples, self.name([listed]))
        return replace(known, self_samples=self_samples[0] if self_samples else None)


def open_parts(
    store: TenantStore,
    cache_folder: Path,
    cache_bytes: int = DEFAULT_LIMIT_BYTES,
    now_ns: Callable[[], int] = time.time_ns,
    workers: Workers | None = None,
) -> Parts:
    """Return the parts of a store; `storage.query.query.Query` says what the arguments are."""
    # Read when there is an object to be decoded: whoever stored it has made the key before.
    key = functools.cache(lambda: read_tenant_key(store.store, store.tenant))
    cache = DecodedCache(cache_folder, key, cache_bytes)
    decoder = Decoder(store.store, key, workers)
    # Both are bounded by the same number; which of the two fills depends on what is compacted.
    copies = Copies(store.store, cache_folder / "blocks", cache_bytes)
    blocks = Blocks(store, copies, lambda: decoder.hasher)
    return Parts(Listing(store, blocks), blocks, cache, decoder, now_ns)


def skipped_parts(skipped: tuple[Skipped, ...]) -> Iterator[Part[Any]]:
    if skipped:
        yield Part((), None, skipped, is_lasting=False)
