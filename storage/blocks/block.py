"""Block: level-0 objects of one type and unit as arrays, before they are written as tables.

A row counts samples and value of a stack, a label set and a host in one object. Stacks, locations
and label sets are known by their hashes under the tenant's key: equal ones have equal ids on all
machines. The label `host` is a column of its own, because there are a thousand times as many label
sets with it; labels of single processes (DROPPED_LABELS) are left out.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from storage.columns import Columns
from storage.grouping import add_groups, distinct, group_keys
from storage.hashing import Hasher, Hashes, Numbers
from storage.merging import merge_modules, merge_stacks
from storage.objects.keys import ObjectKey
from storage.profile import (
    Accounting,
    Integers,
    Labels,
    ProfileError,
    Window,
    adopt_module,
)

DROPPED_LABELS = frozenset({"pid", "tid"})
"""Labels that only level-0 objects have: nearly each process would have label sets of its own."""
ROLLUP_LABELS = ("service", "version", "namespace")
"""Labels that rollups keep."""
_HOST = "host"
_LAST_SECOND = (1 << 32) - 1
_BATCH = 64
"""Objects whose stacks and locations are held until they are merged, some megabytes each."""


def labels_id(labels: Labels, hasher: Hasher) -> int:
    """Return the id of a label set. A host's is that of the set of its label alone."""
    # Names from outside hold no NUL (`symbolizer.text.readable`), so no location's text is this.
    text = "\0".join(["\0labels", *(part for pair in labels for part in pair)])
    return int(hasher.texts([text.encode()])[0])


class LabelIds:
    """Ids of label sets, and the sets by id."""

    def __init__(self, hasher: Hasher) -> None:
        self.sets: dict[int, Labels] = {}
        self._hasher = hasher
        self._ids: dict[Labels, int] = {}
        self._split: dict[Labels, tuple[int, int]] = {}

    def id(self, labels: Labels) -> int:
        number = self._ids.get(labels)
        if number is None:
            number = self._ids[labels] = labels_id(labels, self._hasher)
            self.sets[number] = labels
        return number

    def split(self, label_sets: Iterable[Labels]) -> tuple[Hashes, Hashes, Integers]:
        """Return pairs of a host and what else is kept of label sets, and by label set its pair."""
        pairs: dict[tuple[int, int], int] = {}
        numbers = []
        for labels in label_sets:
            known = self._split.get(labels)
            if known is None:
                host = tuple(pair for pair in labels if pair[0] == _HOST)
                left_out = DROPPED_LABELS | {_HOST}
                other = tuple(pair for pair in labels if pair[0] not in left_out)
                known = self._split[labels] = self.id(host), self.id(other)
            numbers.append(pairs.setdefault(known, len(pairs)))
        ids = np.array(list(pairs), dtype=np.uint64).reshape(-1, 2)
        return ids[:, 0], ids[:, 1], np.array(numbers, dtype=np.int64)

    def roll_up(self, ids: Hashes) -> Hashes:
        """Return by label set the id of what rollups keep of it."""
        return np.array(
            [
                self.id(tuple(pair for pair in self.sets[number] if pair[0] in ROLLUP_LABELS))
                for number in ids.tolist()
            ],
            dtype=np.uint64,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """Counts of stacks, a row in each array.

    `ts` is in seconds; `hosts`, `sets` and `stacks` are ids. What was added up over all times or
    hosts has zeros there.
    """

    ts: Numbers
    hosts: Hashes
    sets: Hashes
    stacks: Hashes
    samples: Integers
    values: Integers

    def __len__(self) -> int:
        return len(self.stacks)


class BlockObject(NamedTuple):
    """What a block says of one of its objects."""

    key: ObjectKey
    period_ns: int
    window: Window
    accounting: Accounting

    @property
    def object_id(self) -> int:
        return int(self.key.content16, 16)

    @property
    def host(self) -> str:
        """The name that its rows have as label `host`; empty if there is none."""
        hosts = self.accounting.hosts
        return hosts[0].name if len(hosts) == 1 else ""


class ObjectTimes(NamedTuple):
    """Samples and value of each label set in each object, a row in each array."""

    objects: Hashes
    hosts: Hashes
    sets: Hashes
    samples: Integers
    values: Integers


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Some objects of one type and unit, each row of each of them once."""

    type: str
    unit: str
    objects: tuple[BlockObject, ...]
    samples: Samples
    times: ObjectTimes
    dictionary: Columns
    """All stacks, their locations, names and modules, without rows."""
    labels: LabelIds
    hasher: Hasher

    @classmethod
    def of(cls, profiles: Iterable[tuple[ObjectKey, Columns]], hasher: Hasher) -> "Block":
        """Make a block of objects, each as `storage.query.decoding.decode_object` returns it.

        They are taken one after the other and not held: of each stays what is new in it, and 60 kB
        for its rows. Content that occurs twice counts once.

        Raises:
            ValueError: there is none, or they are of different types or units.
            ProfileError: one begins later than 32 bits of seconds reach, in 2106.
        """
        builder = BlockBuilder(hasher)
        for key, columns in profiles:
            builder.add(key, columns)
        return builder.build()


class BlockBuilder:
    """Adds objects of one type and unit to a block, one after the other, as `Block.of` takes them.

    Attributes:
        size_bytes: what is held, nearly.
    """

    def __init__(self, hasher: Hasher) -> None:
        self.size_bytes = 0
        self._hasher = hasher
        self._labels = LabelIds(hasher)
        self._objects: dict[str, BlockObject] = {}
        self._kinds: set[tuple[str, str]] = set()
        self._samples: list[tuple[Numbers, Hashes, Hashes, Hashes, Integers, Integers]] = []
        self._times: list[tuple[Hashes, Hashes, Hashes, Integers, Integers]] = []
        self._batch: list[Columns] = []
        self._dictionaries: list[Columns] = []

    def add(self, key: ObjectKey, columns: Columns) -> None:
        """Add an object, unless its content is there.

        Raises:
            ValueError: it is of another type or unit than those before.
            ProfileError: it begins later than 32 bits of seconds reach, in 2106.
        """
        self._kinds.add((columns.type, columns.unit))
        if len(self._kinds) > 1:
            raise ValueError("cannot make a block of different types or units")
        if key.start_s > _LAST_SECOND:
            raise ProfileError(f"cannot compact {key.text}: it begins after 2106")
        if key.content16 in self._objects:
            return
        self._objects[key.content16] = BlockObject(
            key, columns.period_ns, columns.window, columns.accounting
        )
        hosts, sets, of_label_set = self._labels.split(columns.label_sets)
        rows = _samples_of(key, columns, hosts, sets, of_label_set)
        self._samples.append(rows)
        self._times.append(_times_of(key, columns, hosts, sets, of_label_set))
        self._batch.append(columns)
        self.size_bytes += sum(each.nbytes for each in rows) + _size_of(columns)
        if len(self._batch) == _BATCH:
            self._merge_batch()

    def _merge_batch(self) -> None:
        self.size_bytes -= sum(map(_size_of, self._batch))
        self._dictionaries.append(_merge_dictionaries(self._batch))
        self.size_bytes += _size_of(self._dictionaries[-1])
        self._batch.clear()

    def build(self) -> Block:
        """Return the block; nothing may be added after that.

        Raises:
            ValueError: it has no objects.
        """
        if not self._objects:
            raise ValueError("cannot make a block of no objects")
        if self._batch:
            self._merge_batch()
        ((type_, unit),) = self._kinds
        is_whole = len(self._dictionaries) == 1
        return Block(
            type=type_,
            unit=unit,
            objects=tuple(self._objects.values()),
            samples=Samples(*map(np.concatenate, zip(*self._samples, strict=True))),
            times=ObjectTimes(*map(np.concatenate, zip(*self._times, strict=True))),
            dictionary=self._dictionaries[0]
            if is_whole
            else _merge_dictionaries(self._dictionaries),
            labels=self._labels,
            hasher=self._hasher,
        )


def _size_of(columns: Columns) -> int:
    """Return how many bytes a profile has without its rows."""
    tables = columns.locations, columns.named, columns.frames, columns.location_hashes
    stacks = columns.stack_words, columns.stack_hashes, columns.stack_offsets
    return sum(each.nbytes for each in (*tables, *stacks)) + len(columns.texts.blob)


def _samples_of(
    key: ObjectKey, columns: Columns, hosts: Hashes, sets: Hashes, of_label_set: Integers
) -> tuple[Numbers, Hashes, Hashes, Hashes, Integers, Integers]:
    rows = columns.rows.astype(np.int64, copy=False)
    label_set, stack = of_label_set.take(rows[:, 0]), rows[:, 1]
    counts = columns.counts
    if len(sets) < len(of_label_set):  # rows of several processes have become equal
        firsts, order = group_keys(label_set * len(columns.stack_hashes) + stack)
        label_set, stack = label_set[order[firsts]], stack[order[firsts]]
        counts = add_groups(counts[order], firsts)
    return (
        np.full(len(stack), key.start_s, dtype=np.uint32),
        hosts.take(label_set),
        sets.take(label_set),
        columns.stack_hashes.take(stack),
        counts[:, 0].astype(np.int64),
        counts[:, 1].astype(np.int64),
    )


def _times_of(
    key: ObjectKey, columns: Columns, hosts: Hashes, sets: Hashes, of_label_set: Integers
) -> tuple[Hashes, Hashes, Hashes, Integers, Integers]:
    label_set = of_label_set.take(columns.times[:, 1].astype(np.int64, copy=False))
    firsts, order = group_keys(label_set)
    label_set = label_set[order[firsts]]
    counts = add_groups(columns.time_counts[order], firsts)
    return (
        np.full(len(label_set), int(key.content16, 16), dtype=np.uint64),
        hosts.take(label_set),
        sets.take(label_set),
        counts[:, 0],
        counts[:, 1],
    )


def _merge_dictionaries(parts: Sequence[Columns]) -> Columns:
    """Return all of their stacks, with locations and modules as `merge_columns` has them.

    A stack is taken from the first object that has it: most objects add few new ones.
    """
    hashes = np.concatenate([part.stack_hashes for part in parts])
    firsts, order = group_keys(hashes)
    is_first = np.zeros(len(hashes), dtype=bool)
    if len(hashes):
        is_first[np.minimum.reduceat(order, firsts)] = True
    by_part = np.split(is_first, np.cumsum([len(part.stack_hashes) for part in parts])[:-1])
    merged = merge_stacks(parts, [np.flatnonzero(is_new) for is_new in by_part])
    modules = merge_modules([], [])
    for part in parts:
        if any(modules.get(each.build_id) != each for each in part.modules.values()):
            used = distinct(part.stacks.words, len(part.locations))[0]
            for module in merge_modules([part], [used]).values():
                adopt_module(modules, module)
    return replace(merged, modules=modules)
