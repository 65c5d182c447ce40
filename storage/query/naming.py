"""Naming: the best names that the parts of some windows have for their locations.

So a function has one name in all of them: see `storage.query.resolve`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from storage.columns import Columns
from storage.merging import adopt_names, take_locations, without_stacks
from storage.profile import Window
from storage.query.cache import pack
from storage.query.compacted import Compacted
from storage.query.coverage import ListedObject, Part, Skipped
from storage.query.function_totals import FunctionTotals
from storage.query.listing import union
from storage.query.parts import Parts
from storage.query.readers import Asked, Reader, Source, Span
from storage.query.resolve import Better, KnownNames, LocationNames


@dataclass(frozen=True, slots=True)
class Naming:
    """The names of some windows."""

    parts: Parts
    known: KnownNames = field(default_factory=KnownNames)
    sources: list[Source] = field(default_factory=list)
    """What each part was read from, in the order in which their names were added."""
    tables: dict[int, list[Columns]] = field(default_factory=dict)
    """The location tables of parts that were needed, by part."""

    @classmethod
    def of(cls, parts: Parts, windows: Sequence[Window]) -> "Naming":
        """Read the names of all locations in windows."""
        naming = cls(parts)
        for window in union(windows, 1):
            found = parts.listing.at(window)
            listed: dict[str, ListedObject | Compacted] = {
                each.stored.key: each for each in found.objects
            }
            listed |= {hour.key: hour for hour in found.hours}
            spans = parts.spans(found.objects, window)
            every: list[Span | Compacted] = [*found.hours, *spans]
            for part in parts.read_spans(parts.location_names, every):
                if part.value is not None:
                    naming.known.add(part.value)
                    naming.sources.append(_source_of([listed[key] for key in part.keys]))
        return naming

    @classmethod
    def by_table(cls, parts: Parts, table: Columns) -> "Naming":
        """Return names that another process knows better: those of a table of locations."""
        naming = cls(parts)
        naming.known.add(LocationNames.of(table, parts.decoder.hasher))
        naming.known.is_disputed = True
        naming.tables[0] = [table]
        return naming

    def function_totals(self) -> Reader[FunctionTotals]:
        """Return a reader of function totals with the best names."""
        parts = self.parts
        if not self.known.is_disputed:
            return parts.function_totals

        def of(source: Source) -> list[Part[FunctionTotals]]:
            name = name_of(source)
            if name == parts.name(source):
                return parts.function_totals.of(source)
            keys = _keys_of(source)
            known = parts.cache.load(FunctionTotals, name)
            if known is not None:
                return [Part(keys, known[0], tuple(Skipped(*each) for each in known[1] or ()))]

            def make(columns: Columns) -> FunctionTotals:
                return FunctionTotals.of(self.named(columns), parts.decoder.hasher)

            made = [each.derive(make) for each in parts.columns.of(source)]
            for each in made:
                if each.value is not None and each.is_lasting and each.keys == keys:
                    parts.cache.save(each.value, name, each.skipped)
            return made

        def name_of(source: Source) -> str:
            better = self._better(source)
            if not any(len(each.sources) for each in better):
                return parts.name(source)
            return parts.cache.name([parts.name(source), *(each.fingerprint for each in better)])

        return Reader(
            FunctionTotals,
            lambda listed: of([listed])[0],
            of,
            lambda hour: of(hour)[0],
            self._asked() if parts.elsewhere is not None else None,
            name_of,
        )

    def _better(self, source: Source) -> list[Better]:
        """Return by part of a source the names that other parts know better."""
        names = self.parts.location_names.of(source)
        return [self.known.better(each.value) for each in names if each.value is not None]

    def _asked(self) -> Asked | None:
        """Return what another process needs to read function totals with the best names."""
        better = [each for source in self.sources for each in self._better(source)]
        if not sum(len(each.sources) for each in better):
            return None
        every = np.concatenate([each.location_hashes for each in better])
        hashes, firsts = np.unique(every, return_index=True)
        owners = np.concatenate([each.sources for each in better])[firsts]
        self._read_tables(np.unique(owners).tolist())
        tables, chosen = [], []
        for number in np.unique(owners).tolist():
            left = hashes[owners == number]
            for table in self._named_by(number):
                tables.append(table)
                chosen.append(np.flatnonzero(np.isin(table.location_hashes, left)))
                left = np.setdiff1d(left, table.location_hashes)
        names = pack(take_locations(tables, chosen))
        return Asked(FunctionTotals, self.parts.hosts, names=names)

    def _read_tables(self, numbers: Sequence[int]) -> None:
        """Read the location tables of parts, where others may read them."""
        number_of = {_keys_of(self.sources[number]): number for number in numbers}
        asked = Asked(Columns, self.parts.hosts, has_stacks=False)
        sources: list[Span | Compacted] = [
            source if isinstance(source, Compacted) else (list(source), True)
            for source in map(self.sources.__getitem__, numbers)
        ]
        for part in self.parts.read_spans(replace(self.parts.columns, asked=asked), sources):
            if part.value is not None and part.keys in number_of:
                self.tables[number_of[part.keys]] = [without_stacks(part.value)]

    def named(self, columns: Columns) -> Columns:
        """Return a profile with the best names."""
        if not self.known.is_disputed:
            return columns
        better = self.known.better(LocationNames.of(columns, self.parts.decoder.hasher))
        sources = np.unique(better.sources).tolist()
        others = [each for number in sources for each in self._named_by(number)]
        return adopt_names(columns, others, better.location_hashes)

    def _named_by(self, number: int) -> list[Columns]:
        """Return the location tables of a part, without its stacks."""
        known = self.tables.get(number)
        if known is None:
            parts = self.parts.columns.of(self.sources[number])
            known = [without_stacks(each.value) for each in parts if each.value is not None]
            self.tables[number] = known
        return known


def _source_of(listed: Sequence[ListedObject | Compacted]) -> Source:
    """Return what the keys of a part stand for: an hour is a part of its own."""
    first = listed[0]
    if isinstance(first, Compacted):
        return first
    return [each for each in listed if isinstance(each, ListedObject)]


def _keys_of(source: Source) -> tuple[str, ...]:
    if isinstance(source, Compacted):
        return (source.key,)
    return tuple(each.stored.key for each in source)
