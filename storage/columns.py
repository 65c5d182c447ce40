"""Columns: profiles as arrays alone, to add up hundreds of them without a Python object per frame.

A Profile's locations, frames and labels are Python values, which take a microsecond each to make.
Columns keep them as numbers into one table of texts, and recognize equal locations and stacks of
different objects by their hashes (`storage.hashing`). `storage.merging` adds them up.

What a location resolves to, and how boxes are told apart, is that of `Profile.frames` and of
`profiler.flamegraph.flamegraph` (group by function); tests hold both to it.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from storage.hashing import Hasher, Hashes, Numbers, hash_locations
from storage.profile import (
    Accounting,
    Integers,
    Labels,
    Profile,
    Window,
    make_labels,
)
from storage.selector import Selector
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

    def take(self, numbers: Numbers) -> list[bytes]:
        starts, ends = self.offsets[numbers].tolist(), self.offsets[numbers + 1].tolist()
        blob = self.blob
        return [blob[start:end] for start, end in zip(starts, ends, strict=True)]


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """A Profile as arrays. Numbers of texts, locations, stacks and label sets are indices.

    `locations` has a line (text, offset, named) per location: for an address the build id's text,
    its offset, and 0; for a named one the function's text, 0, and 1 + its line in `named` (module,
    kind, file, first line, line). `frames[frame_offsets[i]:frame_offsets[i + 1]]` are location i's
    frames (function, module, kind, file, line), innermost inlined call first; named ones have none.
    `rows` has a line (label set, stack) per row, `counts` its samples and value.

    Merging keeps for each object what a timeline needs: `objects` has a
    line of OBJECT_FIELDS per object, `times` a line (object, label set) with `time_counts`
    (samples, value). And what a comparison needs: `presence` has a line (object, present set,
    present_ns) per service that was there, sampled or not, and `present_sets` are their labels.
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
    stack_hashes: Hashes
    stack_offsets: Numbers
    stack_words: Numbers
    rows: Numbers
    counts: Numbers
    objects: Numbers
    times: Numbers
    time_counts: Numbers
    present_sets: tuple[Labels, ...]
    presence: Numbers

    @classmethod
    def of(cls, profile: Profile, hasher: Hasher) -> "Columns":
        """Turn a profile into arrays, one location after the other."""
        numbers: dict[bytes, int] = {}

        def text(content: str) -> int:
            return numbers.setdefault(content.encode(), len(numbers))

        locations, named, frames, frame_counts = [], [], [], [0]
        for location, names in zip(profile.locations, profile.names, strict=True):
            if isinstance(location, NamedLocation):
                named.append([*map(text, location[1:4]), location.first_line, location.line])
                locations.append([text(location.function), 0, len(named)])
                frame_counts.append(0)
                continue
            locations.append([text(location.build_id), int(location.offset), 0])
            frames += [[*map(text, frame[:4]), frame.line] for frame in names]
            frame_counts.append(len(names))
        texts = list(numbers)
        location_table = np.array(locations, dtype=np.uint64).reshape(-1, 3)
        named_table = np.array(named, dtype=np.int64).reshape(-1, 5)
        hashes = hash_locations(hasher.texts(texts), location_table, named_table)
        rows = np.stack([profile.row_labels, profile.row_stacks], axis=1).astype(np.int64)
        counts = np.stack([profile.row_samples, profile.row_values], axis=1)
        times, time_counts = times_of(rows, counts)
        present_sets, presence = presence_of(profile.accounting)
        return cls(
            type=profile.type,
            unit=profile.unit,
            period_ns=profile.period_ns,
            window=profile.window,
            accounting=profile.accounting,
            modules=profile.modules,
            label_sets=profile.label_sets,
            texts=Texts.of(texts),
            location_hashes=hashes,
            locations=location_table,
            named=named_table,
            frame_offsets=np.cumsum(frame_counts),
            frames=np.array(frames, dtype=np.int64).reshape(-1, 5),
            stack_hashes=hasher.stacks(hashes, profile.stack_offsets, profile.stack_locations),
            stack_offsets=profile.stack_offsets,
            stack_words=profile.stack_locations,
            rows=rows,
            counts=counts,
            objects=object_of(profile.window, profile.accounting),
            times=times,
            time_counts=time_counts,
            present_sets=present_sets,
            presence=presence,
        )

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
        chosen = np.array(selector.choose(map(dict, self.label_sets)), dtype=bool)
        kept = chosen[self.rows[:, 0]]
        kept_times = chosen[self.times[:, 1]]
        return replace(
            self,
            rows=self.rows[kept],
            counts=self.counts[kept],
            times=self.times[kept_times],
            time_counts=self.time_counts[kept_times],
            presence=_present(self.presence, self.present_sets, selector),
        )

    def profile(self) -> Profile:
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
)
"""Columns of `Columns.objects`."""


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
    counts = [getattr(accounting, name) for name in OBJECT_FIELDS[2:-1]]
    return np.array([[*window, *counts, lost]], dtype=np.int64)


def key_starts_ns(objects: Numbers) -> Integers:
    """Return when objects start by their keys: whole seconds, rounded down as `object_key` does."""
    starts_ns: Integers = objects[:, 0].astype(np.int64)
    return starts_ns - starts_ns % NS_PER_S


def times_of(rows: Numbers, counts: Numbers) -> tuple[Integers, Integers]:
    """Return `times` and `time_counts` of a single profile."""
    firsts, order = group(rows[:, 0])
    labels = rows[order[firsts], 0].astype(np.int64)
    return np.stack([np.zeros_like(labels), labels], axis=1), add_groups(counts[order], firsts)


def presence_of(accounting: Accounting) -> tuple[tuple[Labels, ...], Integers]:
    """Return `present_sets` and `presence` of a single profile."""
    lines = [[0, i, min(ns, 2**62)] for i, ns in enumerate(accounting.services.values())]
    return tuple(accounting.services), np.array(lines, dtype=np.int64).reshape(-1, 3)


def add_groups(counts: Numbers, firsts: Integers) -> Integers:
    """Add up lines of counts from each of `firsts` to the next."""
    counts = counts.astype(np.int64, copy=False)
    return np.add.reduceat(counts, firsts, axis=0) if len(firsts) else counts[:0]


def group(keys: Numbers) -> tuple[Integers, Integers]:
    """Return an order in which equal keys stand together, and where in it each group starts."""
    order = np.argsort(keys)
    ordered = keys[order]
    is_first = np.ones(len(keys), dtype=bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    return np.flatnonzero(is_first), order


def ranges(starts: Numbers, lengths: Numbers) -> Integers:
    """Return the numbers of several ranges, one after the other."""
    lengths = lengths.astype(np.int64)
    ends = np.cumsum(lengths)
    shift = starts.astype(np.int64) - (ends - lengths)
    numbers: Integers = np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(shift, lengths)
    return numbers
