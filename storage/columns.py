"""Columns: profiles as arrays alone, to add up and draw them without a Python object per frame.

A Profile's locations, frames and labels are Python values, which take a microsecond each to make.
Columns keep them as numbers into one table of texts, and recognize equal locations and stacks of
different objects by their hashes (`storage.hashing`). `storage.merging` adds them up, and
`profiler.flamegraph` draws them. A Profile is made of them only to be written as pprof.

What a location resolves to is that of `Profile.frames`; tests hold both to it.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from storage.grouping import add_groups, group_keys, ranges
from storage.hashing import Hasher, Hashes, Numbers, hash_locations, process_hasher
from storage.profile import (
    Accounting,
    Integers,
    Labels,
    NameRank,
    Profile,
    Window,
    frame_of_module,
    make_labels,
    named_second,
)
from storage.selector import Selector
from storage.stack_tree import StackLists, Stacks, lists_of
from symbolizer.location import (
    AddressLocation,
    FileOffset,
    Frame,
    Kind,
    Location,
    Module,
    NamedLocation,
)


@dataclass(frozen=True, slots=True, eq=False)
class Texts:
    """A table of UTF-8 texts: text i is `blob[offsets[i]:offsets[i + 1]]`."""

    blob: bytes
    offsets: Numbers

    @classmethod
    def of(cls, texts: Sequence[bytes]) -> "Texts":
        lengths = np.fromiter(map(len, texts), np.int64, len(texts))
        return cls(b"".join(texts), np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def joined(self, more: "Texts") -> "Texts":
        """Return these texts, then some others."""
        ends = more.offsets[1:].astype(np.int64) + len(self.blob)
        offsets = np.concatenate([self.offsets.astype(np.int64), ends])
        return Texts(self.blob + more.blob, offsets)

    def take(self, numbers: Numbers) -> list[bytes]:
        starts, ends = self.offsets[numbers].tolist(), self.offsets[numbers + 1].tolist()
        blob = self.blob
        return [blob[start:end] for start, end in zip(starts, ends, strict=True)]


class TextNumbers(dict[str, int]):
    """Numbers texts in the order in which they are looked up."""

    def __missing__(self, text: str) -> int:
        number = self[text] = len(self)
        return number

    def numbers(self, texts: Sequence[str]) -> Integers:
        return np.fromiter(map(self.__getitem__, texts), np.int64, len(texts))

    def table(self, lines: Sequence[tuple[str | int, ...]], texts: int) -> Integers:
        """Return lines of five: the numbers of the texts that they begin with, then integers."""
        table = np.zeros((len(lines), 5), dtype=np.int64)
        for i, column in enumerate(zip(*lines, strict=True)):
            # A kind hashes slowly, and not as its text does, which is what `str` returns.
            table[:, i] = self.numbers(list(map(str, column))) if i < texts else column
        return table

    def contents(self) -> list[bytes]:
        return [text.encode() for text in self]


@dataclass(frozen=True, slots=True, eq=False)
class ShownFrames:
    """How locations are shown: location i as `table[offsets[i]:offsets[i + 1]]`, innermost first.

    A line of `table` is (function, module, kind, file: texts; line, the function's first line). Two
    numbers may have one text; a line that is not known is 0.
    """

    texts: Texts
    offsets: Integers
    table: Integers

    @classmethod
    def joined(cls, parts: Sequence["ShownFrames"]) -> "ShownFrames":
        """Return the locations of parts, those of one after those of another."""
        whole = parts[0]
        for part in parts[1:]:
            table = part.table.copy()
            table[:, :4] += len(whole.texts)
            whole = cls(
                whole.texts.joined(part.texts),
                np.concatenate([whole.offsets, part.offsets[1:] + whole.offsets[-1]]),
                np.concatenate([whole.table, table]),
            )
        return whole


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """A Profile as arrays. Numbers of texts, locations, stacks and label sets are indices.

    `locations` has a line (text, offset, named) per location: for an address the build id's text,
    its offset, and 0; for a named one the function's text, 0, and 1 + its line in `named` (module,
    kind, file, first line, line). `frames[frame_offsets[i]:frame_offsets[i + 1]]` are location i's
    frames (function, module, kind, file, line), innermost inlined call first; named ones have none.
    `name_ranks` and `named_s` say how good each location's frames are (`storage.profile.NameRank`)
    and when they were known (`named_second`). `rows` has a line (label set, stack) per row,
    `counts` its samples and value.

    Merging keeps for each object what a timeline needs: `objects` has a line of OBJECT_FIELDS per
    object, or per some objects that are added up, `times` a line (object, label set) with
    `time_counts` (samples, value). And what a comparison needs: `presence` has a line (object,
    present set, present_ns) per service that was there, sampled or not, and `present_sets` are
    their labels.
    """

    type: str
    unit: str
    period_ns: int
    window: Window
    accounting: Accounting
    modules: Mapping[str, Module]
    label_sets: tuple[Labels, ...]
    texts: Texts
    location_hashes: Hashes
    locations: Numbers
    named: Numbers
    frame_offsets: Numbers
    frames: Numbers
    name_ranks: Numbers
    named_s: Numbers
    stack_hashes: Hashes
    stacks: Stacks
    rows: Numbers
    counts: Numbers
    objects: Numbers
    times: Numbers
    time_counts: Numbers
    present_sets: tuple[Labels, ...]
    presence: Numbers

    @classmethod
    def of(cls, profile: Profile, hasher: Hasher | None = None) -> "Columns":
        """Turn a profile into arrays, one location after the other.

        Without a hasher it is that of this process: then they may be merged with what else was
        made so here, but not with decoded objects.
        """
        hasher = hasher or process_hasher()
        texts = TextNumbers()
        is_named = np.array([isinstance(each, NamedLocation) for each in profile.locations], bool)
        addresses = [each for each in profile.locations if isinstance(each, AddressLocation)]
        named = [each for each in profile.locations if isinstance(each, NamedLocation)]
        names = list(itertools.compress(profile.names, ~is_named))
        location_table = np.zeros((len(is_named), 3), dtype=np.uint64)
        location_table[~is_named, 0] = texts.numbers([each.build_id for each in addresses])
        location_table[~is_named, 1] = np.array([each.offset for each in addresses], np.uint64)
        location_table[is_named, 0] = texts.numbers([each.function for each in named])
        location_table[is_named, 2] = np.arange(1, len(named) + 1)
        named_table = texts.table([each[1:] for each in named], texts=3)
        frame_table = texts.table(list(itertools.chain.from_iterable(names)), texts=4)
        frame_counts = np.zeros(len(is_named) + 1, dtype=np.int64)
        frame_counts[1:][~is_named] = [len(each) for each in names]
        hashes = hash_locations(hasher.texts(texts.contents()), location_table, named_table)
        rows = np.stack([profile.row_labels, profile.row_stacks], axis=1).astype(np.int64)
        counts = np.stack([profile.row_samples, profile.row_values], axis=1)
        times, time_counts = times_of(rows, counts)
        present_sets, presence = presence_of(profile.accounting)
        text_table = Texts.of(texts.contents())
        frame_offsets = np.cumsum(frame_counts)
        ranks, named_s = rank_names(text_table, frame_offsets, frame_table, profile.window)
        return cls(
            type=profile.type,
            unit=profile.unit,
            period_ns=profile.period_ns,
            window=profile.window,
            accounting=profile.accounting,
            modules=profile.modules,
            label_sets=profile.label_sets,
            texts=text_table,
            location_hashes=hashes,
            locations=location_table,
            named=named_table,
            frame_offsets=frame_offsets,
            frames=frame_table,
            name_ranks=ranks,
            named_s=named_s,
            stack_hashes=hasher.stacks(hashes, profile.stack_offsets, profile.stack_locations),
            stacks=StackLists(profile.stack_offsets, profile.stack_locations),
            rows=rows,
            counts=counts,
            objects=object_of(profile.window, profile.accounting),
            times=times,
            time_counts=time_counts,
            present_sets=present_sets,
            presence=presence,
        )

    @property
    def stack_offsets(self) -> Numbers:
        """Where stacks begin and end in `stack_words`."""
        return lists_of(self.stacks).offsets

    @property
    def stack_words(self) -> Numbers:
        """The locations of all stacks, root first."""
        return lists_of(self.stacks).words

    @property
    def total_samples(self) -> int:
        return int(self.counts[:, 0].sum())

    @property
    def total_value(self) -> int:
        return int(self.counts[:, 1].sum())

    def shown_frames(self, places: Integers | None = None) -> "ShownFrames":
        """Return the frames shown for some locations, by default for all, as `Profile.frames`."""
        if places is None:
            places = np.arange(len(self.locations))
        starts = self.frame_offsets[places].astype(np.int64)
        counts = self.frame_offsets[places + 1].astype(np.int64) - starts
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.maximum(counts, 1))])
        table = np.zeros((int(offsets[-1]), 6), dtype=np.int64)
        framed = np.flatnonzero(counts)
        at = ranges(offsets[framed], counts[framed])
        table[at, :5] = self.frames[ranges(starts[framed], counts[framed])]
        of_place = self.locations[places].astype(np.int64)
        named = np.flatnonzero(of_place[:, 2])
        lines = self.named[of_place[named, 2] - 1]
        table[offsets[named], 0] = of_place[named, 0]
        table[offsets[named], 1:4] = lines[:, :3]
        table[offsets[named], 4:] = lines[:, [4, 3]]
        bare = np.flatnonzero((counts == 0) & (of_place[:, 2] == 0))
        if not len(bare):
            return ShownFrames(self.texts, offsets, table)
        numbers, which = np.unique(of_place[bare, 0], return_inverse=True)
        build_ids = [build_id.decode() for build_id in self.texts.take(numbers)]
        frames = [frame_of_module(self.modules, build_id) for build_id in build_ids]
        # A text that the table has already gets a second number: only these few are looked at.
        added: dict[bytes, int] = {}
        shown = np.zeros((len(frames), 6), dtype=np.int64)
        for i, frame in enumerate(frames):
            shown[i, :4] = [
                added.setdefault(text.encode(), len(self.texts) + len(added)) for text in frame[:4]
            ]
        table[offsets[bare]] = shown[which]
        return ShownFrames(self.texts.joined(Texts.of(list(added))), offsets, table)

    def with_label(self, name: str, value: str) -> "Columns":
        """Return every label set that lacks the label this value of it."""

        def labelled(label_sets: tuple[Labels, ...]) -> tuple[Labels, ...]:
            return tuple(make_labels({name: value, **dict(labels)}) for labels in label_sets)

        return replace(
            self,
            label_sets=labelled(self.label_sets),
            present_sets=labelled(self.present_sets),
        )

    def filter(self, selector: Selector) -> "Columns":
        """Return the selected rows. The accounting stays that of the whole."""
        if not selector.matchers:
            return self
        chosen = self.with_label_sets(selector.choose(map(dict, self.label_sets)))
        return replace(chosen, presence=_present(self.presence, self.present_sets, selector))

    def with_label_sets(self, is_wanted: Sequence[bool]) -> "Columns":
        """Return the rows with the wanted ones of the label sets, and these rows' times."""
        wanted = np.array(is_wanted, dtype=bool)
        kept = wanted[self.rows[:, 0]]
        kept_times = wanted[self.times[:, 1]]
        return replace(
            self,
            rows=self.rows[kept],
            counts=self.counts[kept],
            times=self.times[kept_times],
            time_counts=self.time_counts[kept_times],
        )

    def with_rows(self, rows: Integers) -> "Columns":
        """Return some of the rows, without times: nobody knows in which objects these occurred."""
        return replace(
            self,
            rows=self.rows[rows],
            counts=self.counts[rows],
            times=self.times[:0],
            time_counts=self.time_counts[:0],
        )

    def to_profile(self) -> Profile:
        """Return what the arrays stand for, as Python values."""
        texts = [text.decode() for text in self.texts.take(np.arange(len(self.texts)))]
        locations, names = self._locations_and_names(texts)
        return Profile(
            type=self.type,
            unit=self.unit,
            period_ns=self.period_ns,
            window=self.window,
            accounting=self.accounting,
            modules=self.modules,
            locations=locations,
            names=names,
            label_sets=self.label_sets,
            stack_offsets=self.stack_offsets.astype(np.int64),
            stack_locations=self.stack_words.astype(np.int32),
            row_labels=self.rows[:, 0].astype(np.int32),
            row_stacks=self.rows[:, 1].astype(np.int32),
            row_samples=self.counts[:, 0].astype(np.int64),
            row_values=self.counts[:, 1].astype(np.int64),
        )

    def _locations_and_names(
        self, texts: Sequence[str]
    ) -> tuple[tuple[Location, ...], tuple[tuple[Frame, ...], ...]]:
        kinds = {text: Kind(text) for text in Kind}
        frames = [
            Frame(texts[function], texts[module], kinds[texts[kind]], texts[file], line)
            for function, module, kind, file, line in self.frames.tolist()
        ]
        locations: list[Location] = []
        names: list[tuple[Frame, ...]] = []
        named = self.named.tolist()
        bounds = itertools.pairwise(self.frame_offsets.tolist())
        for (text, offset, number), (start, end) in zip(
            self.locations.tolist(), bounds, strict=True
        ):
            if number == 0:
                locations.append(AddressLocation(texts[text], FileOffset(offset)))
                names.append(tuple(frames[start:end]))
                continue
            module, kind, file, first_line, line = named[number - 1]
            place = (texts[text], texts[module], kinds[texts[kind]], texts[file])
            locations.append(NamedLocation(*place, first_line, line))
            names.append((Frame(*place, line),))
        return tuple(locations), tuple(names)


_SECONDS_BITS = 33
LARGEST_NAME_KEY = ((NameRank.REAL + 1) << _SECONDS_BITS) - 1


def name_keys(ranks: Numbers, named_s: Numbers) -> Integers:
    """Return numbers of which the largest belongs to the best names, as `NameRank` describes."""
    seconds: Integers = np.minimum(named_s.astype(np.int64), (1 << _SECONDS_BITS) - 1)
    return (ranks.astype(np.int64) << _SECONDS_BITS) | seconds


_BOUND = re.compile(rb"\+0x")


def rank_names(
    texts: Texts, frame_offsets: Numbers, frames: Numbers, window: Window
) -> tuple[Integers, Integers]:
    """Return `name_ranks` and `named_s` of the locations of a single profile.

    Ranks are those of `NameRank.of`, found without a Python text for each name.
    """
    starts = frame_offsets[:-1].astype(np.int64)
    is_named = frame_offsets[1:] > starts
    ranks = np.where(is_named, NameRank.REAL, NameRank.NONE).astype(np.int64)
    marks = np.zeros(len(texts.blob) + 1, dtype=bool)
    marks[[match.start() for match in _BOUND.finditer(texts.blob)]] = True
    named = np.flatnonzero(is_named)
    functions, modules = frames[starts[named], :2].T.astype(np.int64)
    module_lengths = np.diff(texts.offsets)[modules].astype(np.int64)
    bounds = texts.offsets[functions].astype(np.int64) + module_lengths
    fits = bounds + 3 <= texts.offsets[functions + 1]
    fits[fits] = marks[bounds[fits]]
    blob = np.frombuffer(texts.blob, np.uint8)
    candidates = np.flatnonzero(fits)
    for module in np.unique(modules[candidates]).tolist():
        mine = candidates[modules[candidates] == module]
        name = blob[int(texts.offsets[module]) : int(texts.offsets[module + 1])]
        begins = texts.offsets[functions[mine]].astype(np.int64)
        is_equal = (blob[begins[:, None] + np.arange(len(name))] == name).all(axis=1)
        ranks[named[mine[is_equal]]] = NameRank.BOUNDED
    return ranks, np.where(is_named, named_second(window), 0)


NS_PER_S = 1_000_000_000

OBJECT_FIELDS = (
    "start_ns",
    "end_ns",
    "cpus",
    "nonidle_ns",
    "profiled_ns",
    "ticks",
    "idle",
    "filtered",
    "stored",
    "lost",
    "objects",
    "length_ns",
)
"""Columns of `Columns.objects`: when objects start and end, their counts added up, how many objects
a line stands for, and how long the longest of them is, 0 if that is not known."""
OBJECT_COUNT = OBJECT_FIELDS.index("objects")


@dataclass(frozen=True, slots=True, eq=False)
class Times:
    """What timelines and deployments need of some profiles: a hundredth of the size of Columns.

    The fields are those of Columns.
    """

    type: str
    unit: str
    window: Window
    accounting: Accounting
    objects: Numbers
    label_sets: tuple[Labels, ...]
    times: Numbers
    time_counts: Numbers
    present_sets: tuple[Labels, ...]
    presence: Numbers

    @classmethod
    def of(cls, columns: Columns) -> "Times":
        return cls(**{field.name: getattr(columns, field.name) for field in fields(cls)})

    def filter(self, selector: Selector) -> "Times":
        """Return the selected lines. The accounting stays that of the whole."""
        if not selector.matchers:
            return self
        chosen = np.array(selector.choose(map(dict, self.label_sets)), dtype=bool)
        kept = chosen[self.times[:, 1]]
        return replace(
            self,
            times=self.times[kept],
            time_counts=self.time_counts[kept],
            presence=_present(self.presence, self.present_sets, selector),
        )


def _present(presence: Numbers, label_sets: Sequence[Labels], selector: Selector) -> Numbers:
    is_chosen: Numbers = np.array(selector.choose(map(dict, label_sets)), dtype=bool)
    kept: Numbers = presence[is_chosen[presence[:, 1]]]
    return kept


def object_of(window: Window, accounting: Accounting) -> Integers:
    """Return the one line of `objects` that a single profile has."""
    lost = min(sum(accounting.lost.values()), 2**62)
    counts = [getattr(accounting, name) for name in OBJECT_FIELDS[2:-3]]
    length_ns = window.end_ns - window.start_ns
    return np.array([[*window, *counts, lost, 1, length_ns]], dtype=np.int64)


def count_objects(objects: Numbers) -> int:
    """Return how many objects the lines of `objects` stand for."""
    return int(objects[:, OBJECT_COUNT].sum())


def key_starts_ns(objects: Numbers) -> Integers:
    """Return when objects start by their keys: whole seconds, rounded down as `object_key` does."""
    starts_ns: Integers = objects[:, 0].astype(np.int64)
    return starts_ns - starts_ns % NS_PER_S


def times_of(rows: Numbers, counts: Numbers) -> tuple[Integers, Integers]:
    """Return `times` and `time_counts` of a single profile."""
    firsts, order = group_keys(rows[:, 0])
    labels = rows[order[firsts], 0].astype(np.int64)
    return np.stack([np.zeros_like(labels), labels], axis=1), add_groups(counts[order], firsts)


def presence_of(accounting: Accounting) -> tuple[tuple[Labels, ...], Integers]:
    """Return `present_sets` and `presence` of a single profile."""
    lines = [[0, i, min(ns, 2**62)] for i, ns in enumerate(accounting.services.values())]
    return tuple(accounting.services), np.array(lines, dtype=np.int64).reshape(-1, 3)
