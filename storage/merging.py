"""Merge Columns: add up the counts of equal stacks and labels of several profiles.

Equal locations and stacks are found by their hashes, so merging is sorting. Only what the rows use
is taken over: a selection of rows merges to the tables that it needs. What is kept of profiles
without their stacks is merged likewise, with what stands here for all kinds: `add_heads`,
`merge_label_sets`, `join_lines`, `adopt_texts`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np

from storage.columns import LARGEST_NAME_KEY, Columns, Texts, name_keys
from storage.grouping import HashIndex, add_groups, distinct, group_keys, number_groups, ranges
from storage.hashing import Hashes, Numbers
from storage.profile import Accounting, Integers, Labels, NameRank, Window, adopt_module
from storage.stack_tree import StackLists, Stacks, join_stacks
from symbolizer.location import Module


def merge_columns(parts: Sequence[Columns]) -> Columns:
    """Return the sum of profiles: associative and commutative in counts, window and accounting.

    Tables keep only what rows use.

    Raises:
        ValueError: there is none, or they measure different things.
    """
    head = add_heads(parts)
    label_sets, label_numbers = merge_label_sets(
        [part.label_sets for part in parts], [part.rows[:, 0] for part in parts]
    )
    present_sets, present_numbers = merge_label_sets(
        [part.present_sets for part in parts], [part.presence[:, 1] for part in parts]
    )
    rows, counts, stacks = _merge_rows(parts, label_numbers)
    chosen = [part.stacks.take(stacks.number[stacks.of_part(i)]) for i, part in enumerate(parts)]
    used = [used_locations(part) for part in parts]
    joined, places = _join_stacks(parts, chosen, used)
    return Columns(
        **head._asdict(),
        **_gather_locations(parts, places)._asdict(),
        period_ns=min(part.period_ns for part in parts),
        modules=merge_modules(parts, used),
        label_sets=label_sets,
        stack_hashes=stacks.hashes,
        stacks=joined,
        rows=rows,
        counts=counts,
        times=join_lines(parts, [part.times for part in parts], label_numbers),
        time_counts=np.concatenate([part.time_counts for part in parts]).astype(np.int64),
        present_sets=present_sets,
        presence=join_lines(parts, [part.presence for part in parts], present_numbers),
    )


def merge_stacks(parts: Sequence[Columns], stacks: Sequence[Integers]) -> Columns:
    """Return some stacks of each part, all of them different, with locations as `merge_columns`.

    There are no modules, rows or objects.
    """
    chosen = [part.stacks.take(numbers) for part, numbers in zip(parts, stacks, strict=True)]
    used = [
        distinct(each.words, len(part.locations))[0]
        for part, each in zip(parts, chosen, strict=True)
    ]
    joined, places = _join_stacks(parts, chosen, used)
    hashes = [part.stack_hashes.take(each) for part, each in zip(parts, stacks, strict=True)]
    return replace(_tables_of(parts, places), stack_hashes=np.concatenate(hashes), stacks=joined)


def take_locations(parts: Sequence[Columns], locations: Sequence[Integers]) -> Columns:
    """Return some locations of each part, all of them different, with their names alone."""
    hashes = [part.location_hashes[mine] for part, mine in zip(parts, locations, strict=True)]
    number = np.concatenate(locations)
    part = np.repeat(np.arange(len(parts)), [len(mine) for mine in locations])
    return _tables_of(parts, _Chosen(np.concatenate(hashes), part, number, np.arange(len(number))))


def _tables_of(parts: Sequence[Columns], places: "_Chosen") -> Columns:
    """Return the chosen locations of parts, without stacks, modules, rows and objects."""
    first = parts[0]
    return replace(
        without_stacks(first),
        **_gather_locations(parts, places)._asdict(),
        modules={},
        label_sets=(),
        objects=first.objects[:0],
        times=first.times[:0],
        time_counts=first.time_counts[:0],
        present_sets=(),
        presence=first.presence[:0],
    )


class _HasHead(Protocol):
    @property
    def type(self) -> str: ...
    @property
    def unit(self) -> str: ...
    @property
    def window(self) -> Window: ...
    @property
    def accounting(self) -> Accounting: ...
    @property
    def objects(self) -> Numbers: ...


class Head(NamedTuple):
    """What all that is kept of profiles begins with; the fields are those of Columns."""

    type: str
    unit: str
    window: Window
    accounting: Accounting
    objects: Integers


def add_heads(parts: Sequence[_HasHead]) -> Head:
    """Return what parts measure, the window around theirs, all accountings, and their objects.

    Raises:
        ValueError: there is none, or they measure different things.
    """
    if not parts:
        raise ValueError("cannot merge: nothing given")
    first = parts[0]
    if any((part.type, part.unit) != (first.type, first.unit) for part in parts):
        raise ValueError("cannot merge: the profiles are of different types or units")
    window, accounting = first.window, Accounting()
    for part in parts:
        window = window.union(part.window)
        accounting = accounting.merge(part.accounting)
    objects = np.concatenate([part.objects for part in parts]).astype(np.int64)
    return Head(first.type, first.unit, window, accounting, objects)


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


def join_lines(
    parts: Sequence[_HasHead], lines: Sequence[Numbers], label_numbers: Sequence[Integers]
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
    """Distinct rows of several parts: the hash, part and number of each one to take."""

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
        firsts, order = group_keys(joined)
        preference = order + rank[order] * len(joined) if len(rank) else order
        best = np.minimum.reduceat(preference, firsts) % len(joined)
        by_place = np.argsort(best)
        position = np.empty(len(best), dtype=np.int64)
        position[by_place] = np.arange(len(best))
        best = best[by_place]
        chosen = position[number_groups(firsts, order)]
        return cls(joined[best], part[best], number[best], chosen)

    def of_part(self, part: int) -> Integers:
        return np.flatnonzero(self.part == part)


def _merge_rows(
    parts: Sequence[Columns], label_numbers: Sequence[Integers]
) -> tuple[Integers, Integers, _Chosen]:
    hashes = [part.stack_hashes.take(part.rows[:, 1]) for part in parts]
    stacks = _Chosen.among(hashes, [part.rows[:, 1] for part in parts], np.zeros(0, np.int64))
    labels = [mine.take(part.rows[:, 0]) for part, mine in zip(parts, label_numbers, strict=True)]
    counts = np.concatenate([part.counts for part in parts])
    key = np.concatenate(labels) * max(1, len(stacks.hashes)) + stacks.chosen
    firsts, by_key = group_keys(key)
    rows = np.stack(np.divmod(key[by_key[firsts]], max(1, len(stacks.hashes))), axis=1)
    return rows, add_groups(counts[by_key], firsts), stacks


def _join_stacks(
    parts: Sequence[Columns], chosen: Sequence[Stacks], used: Sequence[Integers]
) -> tuple[Stacks, _Chosen]:
    """Return the chosen stacks, and the locations to take for them.

    `used` are by part the numbers of the locations that are needed.
    """
    hashes, ranks = [], []
    for part, numbers in zip(parts, used, strict=True):
        hashes.append(part.location_hashes[numbers])
        ranks.append(LARGEST_NAME_KEY - name_keys(part.name_ranks, part.named_s)[numbers])
    places = _Chosen.among(hashes, used, np.concatenate(ranks))
    places = _prefer_names(places, parts, used)
    number_of, at = [], 0
    for part, numbers in zip(parts, used, strict=True):
        mine = np.zeros(len(part.locations), dtype=np.int32)
        mine[numbers] = places.chosen[at : at + len(numbers)]
        number_of.append(mine)
        at += len(numbers)
    # Stacks are in the order of their parts.
    return join_stacks(chosen, number_of), places


def _prefer_names(places: _Chosen, parts: Sequence[Columns], used: Sequence[Integers]) -> _Chosen:
    """Choose better names from the locations that no row of their part uses.

    So a selection of rows has the names that the whole would have.
    """
    is_whole = all(len(mine) == len(part.locations) for part, mine in zip(parts, used, strict=True))
    if is_whole or not len(places.hashes):
        return places
    order = np.argsort(places.hashes)
    hashes = places.hashes[order]
    owner, number = places.part.copy(), places.number.copy()
    best = np.zeros(len(hashes), dtype=np.int64)
    for i, part in enumerate(parts):
        mine = places.of_part(i)
        best[mine] = name_keys(part.name_ranks, part.named_s)[number[mine]]
    index = HashIndex(hashes)
    for i, (part, mine) in enumerate(zip(parts, used, strict=True)):
        is_unused = part.name_ranks > NameRank.NONE
        is_unused[mine] = False
        unused = np.flatnonzero(is_unused)
        theirs = part.location_hashes[unused]
        found = index.find(theirs)
        is_there = found >= 0
        at, unused = order[found[is_there]], unused[is_there]
        keys = name_keys(part.name_ranks[unused], part.named_s[unused])
        is_better = keys > best[at]
        at = at[is_better]
        best[at], owner[at], number[at] = keys[is_better], i, unused[is_better]
    # Tables are put together in the order of parts.
    order = np.argsort(owner, kind="stable")
    position = np.empty(len(order), dtype=np.int64)
    position[order] = np.arange(len(order))
    return _Chosen(places.hashes[order], owner[order], number[order], position[places.chosen])


def used_locations(part: Columns) -> Integers:
    """Return the numbers of the locations that are on a stack of any row."""
    is_used = np.zeros(len(part.locations), dtype=bool)
    # Narrow numbers are slow as an index; `take` and a wide copy are not.
    is_used[_used_words(part).astype(np.int64, copy=False)] = True
    return np.flatnonzero(is_used)


def _used_words(part: Columns) -> Numbers:
    """Return the locations of the stacks that rows still point to, some of them several times."""
    is_used = np.zeros(len(part.stack_hashes), dtype=bool)
    is_used[part.rows[:, 1]] = True
    return (part.stacks if is_used.all() else part.stacks.take(np.flatnonzero(is_used))).words


class _LocationTables(NamedTuple):
    """The tables of locations of a merge; the fields are those of Columns."""

    texts: Texts
    location_hashes: Hashes
    locations: Integers
    named: Integers
    frame_offsets: Integers
    frames: Integers
    name_ranks: Integers
    named_s: Integers


def _gather_locations(parts: Sequence[Columns], chosen: _Chosen) -> _LocationTables:
    numbers: dict[bytes, int] = {}
    locations, named, frames, frame_counts = [], [], [], []
    name_ranks, named_s = [], []
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
        name_ranks.append(part.name_ranks[theirs])
        named_s.append(part.named_s[theirs])
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(frame_counts))])
    return _LocationTables(
        texts=Texts.of(list(numbers)),
        location_hashes=chosen.hashes,
        locations=np.concatenate(locations),
        named=np.concatenate(named),
        frame_offsets=offsets,
        frames=np.concatenate(frames),
        name_ranks=np.concatenate(name_ranks).astype(np.int64),
        named_s=np.concatenate(named_s).astype(np.int64),
    )


def adopt_names(columns: Columns, others: Sequence[Columns], wanted: Hashes) -> Columns:
    """Return a profile some of whose locations have the best names that others have for them.

    Of equally good names the first is taken, and its own are not looked at.
    """
    is_wanted = np.isin(columns.location_hashes, wanted)
    by_hash = np.flatnonzero(is_wanted)
    by_hash = by_hash[np.argsort(columns.location_hashes[by_hash])]
    hashes = columns.location_hashes[by_hash]
    if not len(hashes):
        return columns
    offsets = columns.frame_offsets.astype(np.int64)
    starts, counts = offsets[:-1].copy(), np.diff(offsets)
    ranks, named_s = columns.name_ranks.copy(), columns.named_s.copy()
    keys = name_keys(ranks, named_s)
    keys[by_hash] = -1
    numbers: dict[bytes, int] = {}
    every = np.arange(len(columns.texts))
    renumbered = adopt_texts(numbers, columns.texts, [every])  # it may have a text twice
    locations, named = columns.locations.copy(), columns.named.astype(np.int64)
    locations[:, 0] = renumbered[columns.locations[:, 0].astype(np.int64)]
    named[:, :3] = renumbered[named[:, :3]]
    own = columns.frames.astype(np.int64)
    own[:, :4] = renumbered[own[:, :4]]
    frames = [own]
    for other in others:
        at = np.minimum(np.searchsorted(hashes, other.location_hashes), len(hashes) - 1)
        theirs = np.flatnonzero(hashes[at] == other.location_hashes)
        mine = by_hash[at[theirs]]
        their_keys = name_keys(other.name_ranks[theirs], other.named_s[theirs])
        is_better = their_keys > keys[mine]
        mine, theirs = mine[is_better], theirs[is_better]
        keys[mine] = their_keys[is_better]
        their_starts = other.frame_offsets[theirs].astype(np.int64)
        their_counts = other.frame_offsets[theirs + 1] - their_starts
        table = other.frames[ranges(their_starts, their_counts)].astype(np.int64)
        table[:, :4] = adopt_texts(numbers, other.texts, [table[:, :4]])[table[:, :4]]
        starts[mine] = sum(map(len, frames)) + np.cumsum(their_counts) - their_counts
        counts[mine] = their_counts
        ranks[mine], named_s[mine] = other.name_ranks[theirs], other.named_s[theirs]
        frames.append(table)
    return replace(
        columns,
        texts=Texts.of(list(numbers)),
        locations=locations,
        named=named,
        frame_offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]),
        frames=np.concatenate(frames)[ranges(starts, counts)],
        name_ranks=ranks,
        named_s=named_s,
    )


def without_stacks(columns: Columns) -> Columns:
    """Return a profile's locations and their names without its stacks and rows."""
    return replace(
        columns,
        stack_hashes=columns.stack_hashes[:0],
        stacks=StackLists(np.zeros(1, np.int64), np.zeros(0, np.int32)),
        rows=columns.rows[:0],
        counts=columns.counts[:0],
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


def merge_modules(parts: Sequence[Columns], used: Sequence[Integers]) -> dict[str, Module]:
    """Return the modules of the locations that are used of each part."""
    modules: dict[str, Module] = {}
    for part, theirs in zip(parts, used, strict=True):
        places = part.locations[theirs]
        is_used = np.zeros(len(part.texts), dtype=bool)
        is_used[places[places[:, 2] == 0, 0]] = True
        for text in part.texts.take(np.flatnonzero(is_used)):
            module = part.modules.get(text.decode())
            if module is not None:
                adopt_module(modules, module)
    return modules
