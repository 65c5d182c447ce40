"""Columns: profiles as arrays alone, to add up hundreds of them without a Python object a frame.

A Profile's locations, frames and labels are Python values, which take a microsecond each to make.
Columns keep them as numbers into one table of texts, and tell equal locations and stacks of
different objects apart by 64-bit hashes, so that merging is sorting. The hashes are keyed with a
secret (`Hasher`): whoever chooses the names of functions cannot choose which stacks collide. A
chance collision among a million stacks has a probability of 3e-8; it would move counts from one
stack to another and change no sum.

What a location resolves to, and how boxes are told apart, is that of `Profile.frames` and of
`profiler.flamegraph.flamegraph` (group by function); tests hold both to it.
"""

import hashlib
import itertools
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

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

Hashes = npt.NDArray[np.uint64]
Numbers = npt.NDArray[Any]
"""Whole numbers of any width: arrays that come from a file are as narrow as they can be."""

_HASHED_LIMIT = 1 << 20
"""Texts a Hasher remembers. Beyond it forgets them all: the next ones are hashed again."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


class Hasher:
    """Gives texts and what is made of them 64-bit hashes, keyed with a secret."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret[:64]
        self._known: dict[bytes, int] = {}
        self._lock = threading.Lock()
        self._seed = np.uint64(self._learn([b"\0depths"])[0])
        self._factors = np.zeros(0, np.uint64)

    def stacks(self, location_hashes: Hashes, offsets: Numbers, words: Numbers) -> Hashes:
        """Return each stack's hash: the sum of its locations' hashes, each times one of its depth.

        That is multilinear hashing (Carter and Wegman, 1979), with secret factors.
        """
        offsets = offsets.astype(np.int64, copy=False)
        lengths: Integers = offsets[1:] - offsets[:-1]
        deepest = int(lengths.max(initial=0))
        factors = self._factors  # another thread may put fewer of them there meanwhile
        if len(factors) < deepest:
            depths = np.arange(1, 2 * deepest + 1, dtype=np.uint64)
            self._factors = factors = mix(depths * _GOLDEN + self._seed) | np.uint64(1)
        depth = np.arange(len(words))
        depth -= np.repeat(offsets[:-1], lengths)
        products = location_hashes.take(words)
        products *= factors.take(depth)
        sums = np.zeros(len(words) + 1, dtype=np.uint64)
        np.cumsum(products, out=sums[1:])
        return chain(sums[offsets[1:]] - sums[offsets[:-1]], lengths)

    def texts(self, texts: Sequence[bytes]) -> Hashes:
        known = self._known
        try:
            return np.fromiter(map(known.__getitem__, texts), np.uint64, len(texts))
        except KeyError:
            return np.array(self._learn(texts), dtype=np.uint64)

    def _learn(self, texts: Sequence[bytes]) -> list[int]:
        hashes = []
        for text in texts:
            number = self._known.get(text)
            if number is None:
                digest = hashlib.blake2b(text, digest_size=8, key=self._secret).digest()
                number = int.from_bytes(digest, "little")
                with self._lock:
                    if len(self._known) >= _HASHED_LIMIT:
                        self._known = {}
                    self._known[text] = number
            hashes.append(number)
        return hashes


def mix(values: Hashes) -> Hashes:
    """Spread the bits of each value (the finalizer of SplitMix64, a bijection)."""
    shifted = values >> np.uint64(30)
    mixed = values ^ shifted
    # In place: half of the time goes into memory that is new each time.
    mixed *= _MIX_1
    mixed ^= np.right_shift(mixed, np.uint64(27), out=shifted)
    mixed *= _MIX_2
    mixed ^= np.right_shift(mixed, np.uint64(31), out=shifted)
    return mixed


def chain(*parts: Numbers) -> Hashes:
    """Return one hash for each tuple of numbers, with their order."""
    state = np.full(len(parts[0]), _GOLDEN)
    for part in parts:
        state = mix(state * _MIX_2 + part.astype(np.uint64, copy=False) + _GOLDEN)
    return state


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

    What a timeline needs stands apart, because merging keeps it for each object: `objects` has a
    line of OBJECT_FIELDS per object, `times` a line (object, label set) with `time_counts`
    (samples, value). So does what a comparison needs: `presence` has a line (object, present set,
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
        """Return the rows whose labels are asked for. The accounting stays that of the whole."""
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
        locations, names = self._places(texts)
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

    def _places(
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
    """What timelines and deployments need of some profiles, a hundredth: fields as of Columns."""

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
        """Return what is asked for. The accounting stays that of the whole."""
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
    """Return when objects start by their keys, to a second before or after their content."""
    starts_ns: Integers = objects[:, 0].astype(np.int64) + 10**9 // 2
    return starts_ns - starts_ns % 10**9


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


def hash_locations(text_hashes: Hashes, locations: Numbers, named: Numbers) -> Hashes:
    """Return each location's hash; what stands in the tables is said at Columns."""
    hashes = chain(text_hashes[locations[:, 0]], locations[:, 1])
    at = np.flatnonzero(locations[:, 2])
    if len(at):
        lines = named[locations[at, 2].astype(np.int64) - 1]
        parts = [text_hashes[lines[:, i]] for i in range(3)]
        hashes[at] = chain(hashes[at], *parts, lines[:, 3], lines[:, 4])
    return hashes


def merge_columns(parts: Sequence[Columns]) -> Columns:
    """Add up, as `storage.profile.merge` does; what no row needs is left out.

    Raises:
        ValueError: there is none, or they measure different things.
    """
    if not parts:
        raise ValueError("cannot merge: no profile given")
    first = parts[0]
    if any((part.type, part.unit) != (first.type, first.unit) for part in parts):
        raise ValueError("cannot merge: the profiles are of different types or units")
    window, accounting = first.window, Accounting()
    for part in parts:
        window = window.union(part.window)
        accounting = accounting.merge(part.accounting)
    label_sets, label_numbers = merge_label_sets(
        [part.label_sets for part in parts], [part.rows[:, 0] for part in parts]
    )
    present_sets, present_numbers = merge_label_sets(
        [part.present_sets for part in parts], [part.presence[:, 1] for part in parts]
    )
    rows, counts, stacks = _merge_rows(parts, label_numbers)
    words, offsets, places, used = _gather_stacks(parts, stacks)
    tables = _gather_locations(parts, places)
    return Columns(
        type=first.type,
        unit=first.unit,
        period_ns=min(part.period_ns for part in parts),
        window=window,
        accounting=accounting,
        modules=_merge_modules(parts, used),
        label_sets=label_sets,
        texts=tables.texts,
        location_hashes=tables.hashes,
        locations=tables.locations,
        named=tables.named,
        frame_offsets=tables.frame_offsets,
        frames=tables.frames,
        stack_hashes=stacks.hashes,
        stack_offsets=offsets,
        stack_words=words,
        rows=rows,
        counts=counts,
        objects=np.concatenate([part.objects for part in parts]).astype(np.int64),
        times=join_lines(parts, [part.times for part in parts], label_numbers),
        time_counts=np.concatenate([part.time_counts for part in parts]).astype(np.int64),
        present_sets=present_sets,
        presence=join_lines(parts, [part.presence for part in parts], present_numbers),
    )


def merge_label_sets(
    label_sets: Sequence[tuple[Labels, ...]], used: Sequence[Numbers]
) -> tuple[tuple[Labels, ...], list[Integers]]:
    """Return the label sets in use, each once, and by part the new number of each old one."""
    numbers: dict[Labels, int] = {}
    by_part = []
    for sets, theirs in zip(label_sets, used, strict=True):
        mine = np.zeros(len(sets), dtype=np.int64)
        for i in np.flatnonzero(np.bincount(theirs.astype(np.int64))).tolist():
            mine[i] = numbers.setdefault(sets[i], len(numbers))
        by_part.append(mine)
    return tuple(numbers), by_part


class _HasObjects(Protocol):
    @property
    def objects(self) -> Numbers: ...


def join_lines(
    parts: Sequence[_HasObjects], lines: Sequence[Numbers], label_numbers: Sequence[Integers]
) -> Integers:
    """Put lines (object, label set, …) of parts, each with its own objects, one after the other."""
    counts = [len(part.objects) for part in parts]
    befores = np.cumsum([0, *counts[:-1]])
    joined = []
    for theirs, before, mine in zip(lines, befores, label_numbers, strict=True):
        ours = theirs.astype(np.int64)
        ours[:, 0] += before
        ours[:, 1] = mine[theirs[:, 1]]
        joined.append(ours)
    return np.concatenate(joined)


@dataclass(frozen=True, slots=True)
class _Chosen:
    """Distinct things of several parts: each one's hash, and where the one to take stands."""

    hashes: Hashes
    part: Integers
    number: Integers
    chosen: Integers
    """For each of the things given, which of the distinct ones it is."""

    @classmethod
    def among(
        cls, hashes: Sequence[Hashes], numbers: Sequence[Numbers], rank: Numbers
    ) -> "_Chosen":
        """Take, of those with equal hashes, the one of the least rank, and of these the first."""
        joined = np.concatenate(hashes)
        part = np.repeat(np.arange(len(hashes)), [len(each) for each in hashes])
        number = np.concatenate(numbers).astype(np.int64)
        if len(joined) == 0:
            return cls(joined, part, number, number)
        firsts, order = group(joined)
        preference = order + rank[order] * len(joined) if len(rank) else order
        best = np.minimum.reduceat(preference, firsts) % len(joined)
        by_place = np.argsort(best)
        position = np.empty(len(best), dtype=np.int64)
        position[by_place] = np.arange(len(best))
        best = best[by_place]
        chosen = np.empty(len(joined), dtype=np.int64)
        chosen[order] = np.repeat(position, np.diff(np.append(firsts, len(joined))))
        return cls(joined[best], part[best], number[best], chosen)

    def of_part(self, part: int) -> Integers:
        return np.flatnonzero(self.part == part)


def group(keys: Numbers) -> tuple[Integers, Integers]:
    """Return an order in which equal keys stand together, and where in it each group starts."""
    order = np.argsort(keys)
    ordered = keys[order]
    is_first = np.ones(len(keys), dtype=bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    return np.flatnonzero(is_first), order


def _merge_rows(
    parts: Sequence[Columns], label_numbers: Sequence[Integers]
) -> tuple[Integers, Integers, _Chosen]:
    hashes = [part.stack_hashes.take(part.rows[:, 1]) for part in parts]
    stacks = _Chosen.among(hashes, [part.rows[:, 1] for part in parts], np.zeros(0, np.int64))
    labels = [mine.take(part.rows[:, 0]) for part, mine in zip(parts, label_numbers, strict=True)]
    counts = np.concatenate([part.counts for part in parts])
    key = np.concatenate(labels) * max(1, len(stacks.hashes)) + stacks.chosen
    firsts, by_key = group(key)
    rows = np.stack(np.divmod(key[by_key[firsts]], max(1, len(stacks.hashes))), axis=1)
    return rows, add_groups(counts[by_key], firsts), stacks


def ranges(starts: Numbers, lengths: Numbers) -> Integers:
    """Return the numbers of several ranges, one after the other."""
    lengths = lengths.astype(np.int64)
    ends = np.cumsum(lengths)
    shift = starts.astype(np.int64) - (ends - lengths)
    numbers: Integers = np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(shift, lengths)
    return numbers


def _gather_stacks(
    parts: Sequence[Columns], stacks: _Chosen
) -> tuple[Integers, Integers, _Chosen, list[Integers]]:
    """Return the words and offsets of the chosen stacks, and the locations to take for them.

    Also, by part, the numbers of the locations that its rows use.
    """
    lengths = np.zeros(len(stacks.hashes), dtype=np.int64)
    words, hashes, used, ranks = [], [], [], []
    for i, part in enumerate(parts):
        mine = stacks.of_part(i)
        numbers = stacks.number[mine]
        starts = part.stack_offsets[numbers].astype(np.int64)
        lengths[mine] = part.stack_offsets[numbers + 1] - starts
        words.append(part.stack_words.take(ranges(starts, lengths[mine])))
        is_used = np.zeros(len(part.locations), dtype=bool)
        # Narrow numbers are slow as an index; `take` and a wide copy are not.
        is_used[_used_words(part).astype(np.int64, copy=False)] = True
        numbers = np.flatnonzero(is_used)
        used.append(numbers)
        hashes.append(part.location_hashes[numbers])
        bare = part.frame_offsets[numbers + 1] == part.frame_offsets[numbers]
        ranks.append(bare.astype(np.int64))
    places = _Chosen.among(hashes, used, np.concatenate(ranks))
    flat, at = [], 0
    for part, numbers, mine in zip(parts, used, words, strict=True):
        number_of = np.zeros(len(part.locations), dtype=np.int32)
        number_of[numbers] = places.chosen[at : at + len(numbers)]
        at += len(numbers)
        flat.append(number_of.take(mine))
    # Stacks are in the order of their parts, so the words of one part follow those of another.
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    return np.concatenate(flat), offsets, places, used


def _used_words(part: Columns) -> Numbers:
    """Return the words of the stacks that rows still point to."""
    is_used = np.zeros(len(part.stack_hashes), dtype=bool)
    is_used[part.rows[:, 1]] = True
    if is_used.all():
        return part.stack_words
    numbers = np.flatnonzero(is_used)
    starts = part.stack_offsets[numbers].astype(np.int64)
    used: Numbers = part.stack_words.take(ranges(starts, part.stack_offsets[numbers + 1] - starts))
    return used


@dataclass(frozen=True, slots=True)
class _Places:
    """The tables of locations of a merge; the fields are those of Columns."""

    texts: Texts
    hashes: Hashes
    locations: Integers
    named: Integers
    frame_offsets: Integers
    frames: Integers


def _gather_locations(parts: Sequence[Columns], chosen: _Chosen) -> _Places:
    numbers: dict[bytes, int] = {}
    locations, named, frames, frame_counts = [], [], [], []
    named_count = 0
    for i, part in enumerate(parts):
        theirs = chosen.number[chosen.of_part(i)]
        table = part.locations[theirs].astype(np.uint64)
        at = np.flatnonzero(table[:, 2])
        their_named = part.named[table[at, 2].astype(np.int64) - 1].astype(np.int64)
        table[at, 2] = named_count + 1 + np.arange(len(at))
        named_count += len(at)
        starts = part.frame_offsets[theirs].astype(np.int64)
        counts = part.frame_offsets[theirs + 1] - starts
        their_frames = part.frames[ranges(starts, counts)].astype(np.int64)
        mine = adopt_texts(
            numbers, part.texts, [table[:, 0], their_named[:, :3], their_frames[:, :4]]
        )
        table[:, 0] = mine[table[:, 0]]
        their_named[:, :3] = mine[their_named[:, :3]]
        their_frames[:, :4] = mine[their_frames[:, :4]]
        locations.append(table)
        named.append(their_named)
        frames.append(their_frames)
        frame_counts.append(counts)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(frame_counts))])
    return _Places(
        texts=Texts.of(list(numbers)),
        hashes=chosen.hashes,
        locations=np.concatenate(locations),
        named=np.concatenate(named),
        frame_offsets=offsets,
        frames=np.concatenate(frames),
    )


def adopt_texts(numbers: dict[bytes, int], texts: Texts, used: Iterable[Numbers]) -> Integers:
    """Return my number for each text in use, taking over those that are new."""
    is_used = np.zeros(len(texts), dtype=bool)
    for each in used:
        is_used[each] = True
    at = np.flatnonzero(is_used)
    mine = np.zeros(len(texts), dtype=np.int64)
    mine[at] = [numbers.setdefault(text, len(numbers)) for text in texts.take(at)]
    return mine


def _merge_modules(parts: Sequence[Columns], used: Sequence[Integers]) -> dict[str, Module]:
    modules: dict[str, Module] = {}
    for part, theirs in zip(parts, used, strict=True):
        places = part.locations[theirs]
        is_used = np.zeros(len(part.texts), dtype=bool)
        is_used[places[places[:, 2] == 0, 0]] = True
        for text in part.texts.take(np.flatnonzero(is_used)):
            module = part.modules.get(text.decode())
            if module is None:
                continue
            mine = modules.setdefault(module.build_id, module)
            # The smaller path wins, so that the order of a merge does not show in its result.
            if (not mine.segments, mine.path) > (not module.segments, module.path):
                modules[module.build_id] = module
    return modules
