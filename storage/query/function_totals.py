"""Function totals: what timelines and tables of functions need of profiles, without their stacks.

Computed once per decoded object or hour; a fiftieth of the size of its stacks. Functions are told
apart as boxes of the flame graph are: by (function, module, kind). Recursion counts once in the
total. They are added up per label set, without the labels of single processes (PROCESS_LABELS).
What interpreters add to stacks is left out (`storage.interpreters`).

Totals of functions do not follow from totals of locations, because of recursion and inlined calls.
So they are made of stacks whose names are resolved (`storage.query.resolve`), and those of a part
whose names are better elsewhere are kept under a name of their own (`storage.query.parts`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from storage.columns import Columns, Texts
from storage.grouping import add_groups, group_keys, number_groups, ranges
from storage.hashing import Hasher, Hashes, Numbers
from storage.interpreters import fold_stacks
from storage.location_functions import (
    FILES_DIFFER,
    NO_FILE,
    LocationFunctions,
    adopt_functions,
    functions_of_stacks,
)
from storage.merging import add_heads, join_lines, merge_label_sets
from storage.profile import Accounting, Integers, Labels, Window
from storage.selector import Selector
from storage.stack_tree import Stacks, lists_of
from symbolizer.location import Frame, Kind

PROCESS_LABELS = frozenset({"comm", "pid", "thread", "tid"})
"""Labels that tell the processes and threads of one service apart."""

_FRAMES_AT_ONCE = 1 << 21
"""Frames of rows whose functions are added up at a time: each takes some 100 bytes meanwhile. A
fleet's hour has a hundred million: its totals took 1.4 GB at once."""
_DENSE_LIMIT = 1 << 16
"""FunctionTotals that are cheap to lay out in full, however few lines there are."""


class FunctionTotal(NamedTuple):
    """What one function cost under one label set: `self` as the leaf, `total` anywhere."""

    labels: Labels
    frame: Frame
    self: int
    total: int
    self_samples: int
    total_samples: int


class SelfSamples(NamedTuple):
    """Lines (service set, function), and the self samples of each."""

    service_sets: tuple[Labels, ...]
    function_hashes: Hashes
    lines: Numbers
    samples: Numbers


@dataclass(frozen=True, slots=True, eq=False)
class FunctionTotals:
    """Per-object times and per-service functions of some profiles.

    `times` and `objects` are those of Columns and refer to `label_sets`. `functions` has a line
    (function, module, kind: texts; file: see NO_FILE) per function. `rows` has a line (service set,
    function), `counts` its (self, total, self samples, total samples); only the functions that
    occur under a set have a row there.
    """

    type: str
    unit: str
    window: Window
    accounting: Accounting
    objects: Numbers
    label_sets: tuple[Labels, ...]
    times: Numbers
    time_counts: Numbers
    service_sets: tuple[Labels, ...]
    texts: Texts
    function_hashes: Hashes
    functions: Numbers
    rows: Numbers
    counts: Numbers

    @classmethod
    def of(
        cls, columns: Columns, hasher: Hasher, left_out: frozenset[str] = PROCESS_LABELS
    ) -> "FunctionTotals":
        """Add up the functions of every stack, by the labels that are not left out."""
        boxes = LocationFunctions.of(columns, hasher)
        of_label, service_sets = service_sets_of(columns.label_sets, left_out)
        rows, counts = _sum_functions(columns, fold_stacks(columns), boxes, of_label)
        return cls(
            type=columns.type,
            unit=columns.unit,
            window=columns.window,
            accounting=columns.accounting,
            objects=columns.objects,
            label_sets=columns.label_sets,
            times=columns.times,
            time_counts=columns.time_counts,
            service_sets=service_sets,
            texts=boxes.texts,
            function_hashes=boxes.hashes,
            functions=boxes.table,
            rows=rows,
            counts=counts,
        )

    def filter(self, selector: Selector) -> "FunctionTotals":
        """Return the selected rows. Functions are kept without PROCESS_LABELS."""
        if not selector.matchers:
            return self
        by_time = np.array(selector.choose(map(dict, self.label_sets)), dtype=bool)
        by_service = np.array(selector.choose(map(dict, self.service_sets)), dtype=bool)
        kept_times = by_time[self.times[:, 1]]
        kept = by_service[self.rows[:, 0]]
        return replace(
            self,
            times=self.times[kept_times],
            time_counts=self.time_counts[kept_times],
            rows=self.rows[kept],
            counts=self.counts[kept],
        )

    def self_samples(self) -> SelfSamples:
        return SelfSamples(self.service_sets, self.function_hashes, self.rows, self.counts[:, 2])

    def function_totals(self, limit: int | None = None) -> Iterator[FunctionTotal]:
        """Return the table, largest self first, then largest total."""
        order = np.lexsort((-self.counts[:, 1], -self.counts[:, 0]))[:limit]
        used = np.unique(self.rows[order, 1])
        frames = dict(zip(used.tolist(), self.frames(used), strict=True))
        rows, counts = self.rows[order].tolist(), self.counts[order].tolist()
        for (labels, function), numbers in zip(rows, counts, strict=True):
            yield FunctionTotal(self.service_sets[labels], frames[function], *numbers)

    def frames(self, numbers: Integers) -> list[Frame]:
        """Return some lines of `functions` as frames."""
        table = self.functions[numbers].astype(np.int64)
        has_file = table[:, 3] > FILES_DIFFER
        table[:, 3] -= 2
        texts = [self.texts.take(table[:, i]) for i in range(3)]
        files = self.texts.take(np.where(has_file, table[:, 3], 0))
        shown = zip(*texts, files, has_file.tolist(), strict=True)
        return [
            Frame(
                function.decode(),
                module.decode(),
                Kind(kind.decode()),
                file.decode() if known else "",
            )
            for function, module, kind, file, known in shown
        ]

    def by(self, names: Sequence[str]) -> "FunctionTotals":
        """Add up the functions of the service sets that agree on these labels."""
        wanted = set(names)
        reduced = [
            tuple((name, value) for name, value in labels if name in wanted)
            for labels in self.service_sets
        ]
        numbers: dict[Labels, int] = {}
        mine = np.array(
            [numbers.setdefault(labels, len(numbers)) for labels in reduced], dtype=np.int64
        )
        rows, counts = fold(mine[self.rows[:, 0]], self.rows[:, 1], self.counts)
        return replace(self, service_sets=tuple(numbers), rows=rows, counts=counts)


def merge_function_totals(parts: Sequence[FunctionTotals]) -> FunctionTotals:
    """Add up the function totals of different objects. The accounting is added up as well.

    Raises:
        ValueError: there is none, or they measure different things.
    """
    head = add_heads(parts)
    label_sets, label_numbers = merge_label_sets(
        [part.label_sets for part in parts], [part.times[:, 1] for part in parts]
    )
    service_sets, service_numbers = merge_label_sets(
        [part.service_sets for part in parts], [part.rows[:, 0] for part in parts]
    )
    functions = _MergedFunctions.of(parts)
    rows, counts = fold(
        np.concatenate(
            [mine[p.rows[:, 0]] for p, mine in zip(parts, service_numbers, strict=True)]
        ),
        np.concatenate(
            [mine[p.rows[:, 1]] for p, mine in zip(parts, functions.numbers, strict=True)]
        ),
        np.concatenate([part.counts for part in parts]),
    )
    return FunctionTotals(
        **head._asdict(),
        label_sets=label_sets,
        times=join_lines(parts, [part.times for part in parts], label_numbers),
        time_counts=np.concatenate([part.time_counts for part in parts]).astype(np.int64),
        service_sets=service_sets,
        texts=functions.texts,
        function_hashes=functions.hashes,
        functions=functions.table,
        rows=rows,
        counts=counts,
    )


class _MergedFunctions(NamedTuple):
    texts: Texts
    hashes: Hashes
    table: Integers
    numbers: list[Integers]
    """By part, the new number of each old function."""

    @classmethod
    def of(cls, parts: Sequence[FunctionTotals]) -> "_MergedFunctions":
        texts: dict[bytes, int] = {}
        tables = []
        hashes = np.concatenate([part.function_hashes for part in parts])
        firsts, order = group_keys(hashes)
        which = number_groups(firsts, order)
        at = 0
        numbers = []
        for part in parts:
            numbers.append(which[at : at + len(part.functions)])
            at += len(part.functions)
        # Only the first part that knows a function, and a file that no one before it knew, is read.
        chosen = np.zeros((len(firsts), 4), dtype=np.int64)
        is_known = np.zeros(len(firsts), dtype=bool)
        for part, mine in zip(parts, numbers, strict=True):
            table = part.functions.astype(np.int64)
            tables.append(adopt_functions(texts, part.texts, table, ~is_known[mine]))
            new = ~is_known[mine]
            chosen[mine[new]] = tables[-1][new]
            is_known[mine] = True
            old = np.flatnonzero(~new)
            chosen[mine[old], 3] = _join_files(chosen[mine[old], 3], tables[-1][old, 3])
        unique_hashes = hashes[order[firsts]]
        return cls(Texts.of(list(texts)), unique_hashes, chosen, numbers)


def _join_files(one: Integers, other: Integers) -> Integers:
    agreed = np.where((one == other) | (other == NO_FILE), one, FILES_DIFFER)
    return np.where(one == NO_FILE, other, agreed)


def service_sets_of(
    label_sets: Sequence[Labels], left_out: frozenset[str]
) -> tuple[Integers, tuple[Labels, ...]]:
    """Return the sets without some labels, and by label set the number of its own."""
    numbers: dict[Labels, int] = {}
    of_label = [
        numbers.setdefault(tuple(pair for pair in labels if pair[0] not in left_out), len(numbers))
        for labels in label_sets
    ]
    return np.array(of_label, dtype=np.int64), tuple(numbers)


def _sum_functions(
    columns: Columns, stacks: Stacks, boxes: LocationFunctions, of_label: Integers
) -> tuple[Integers, Integers]:
    count = len(boxes.hashes)
    lists = lists_of(stacks)
    stack_offsets = lists.offsets.astype(np.int64)
    words = lists.words.astype(np.int64, copy=False)
    services = of_label[columns.rows[:, 0]] if len(of_label) else np.zeros(0, np.int64)
    rows, counts = fold(services, columns.rows[:, 1], columns.counts)
    service, stack = rows.T
    # Counts of every function on the stacks of some rows, by (service set, function).
    parts = [
        _sum_totals(rows[some], counts[some], stack_offsets, words, boxes)
        for some in _pieces(stack, stack_offsets)
    ]
    totals, total_counts = parts[0] if len(parts) == 1 else _join_totals(parts)
    filled = np.flatnonzero(stack_offsets[stack + 1] > stack_offsets[stack])
    leaf = words[stack_offsets[stack[filled] + 1] - 1]
    selves, self_counts = fold(service[filled], boxes.numbers[boxes.offsets[leaf]], counts[filled])
    result = np.zeros((len(totals), 4), dtype=np.int64)
    result[:, 1], result[:, 3] = total_counts[:, 1], total_counts[:, 0]
    # Both are sorted by (service set, function), and every leaf is on its stack.
    at = np.searchsorted(totals @ (count + 1, 1), selves @ (count + 1, 1))
    result[at, 0], result[at, 2] = self_counts[:, 1], self_counts[:, 0]
    return totals, result


def _pieces(stack: Integers, stack_offsets: Integers) -> list[Integers]:
    """Cut rows of stacks into pieces with so few frames that these can be laid out at once."""
    order = np.argsort(stack, kind="stable")
    ordered = stack[order]
    depths = stack_offsets[ordered + 1] - stack_offsets[ordered]
    frames = stack_offsets[ordered] + np.cumsum(depths)  # those of rows, and of stacks passed over
    limits = np.arange(_FRAMES_AT_ONCE, int(frames[-1]) if len(frames) else 0, _FRAMES_AT_ONCE)
    return [each for each in np.split(order, np.searchsorted(frames, limits)) if len(each)] or [
        order
    ]


def _sum_totals(
    rows: Integers,
    counts: Integers,
    stack_offsets: Integers,
    words: Integers,
    boxes: LocationFunctions,
) -> tuple[Integers, Integers]:
    """Add up the counts of rows (service set, stack) by each function on their stacks."""
    service, stack = rows.T
    first, last = (int(stack.min()), int(stack.max()) + 1) if len(stack) else (0, 0)
    own = stack_offsets[first : last + 1]
    offsets, box = functions_of_stacks(own - own[0], words[own[0] : own[-1]], boxes)
    length = np.diff(offsets)[stack - first]
    return fold(
        np.repeat(service, length),
        box[ranges(offsets[stack - first], length)],
        np.repeat(counts, length, axis=0),
    )


def _join_totals(parts: Sequence[tuple[Integers, Integers]]) -> tuple[Integers, Integers]:
    rows = np.concatenate([rows for rows, _ in parts])
    return fold(rows[:, 0], rows[:, 1], np.concatenate([counts for _, counts in parts]))


def fold(major: Numbers, minor: Numbers, counts: Numbers) -> tuple[Integers, Integers]:
    """Add up the lines of counts whose two keys agree; the result is sorted by both."""
    width = int(minor.max()) + 1 if len(minor) else 1
    key = major.astype(np.int64) * width + minor
    span = int(key.max()) + 1 if len(key) else 1
    if span > 4 * len(key) + _DENSE_LIMIT:
        firsts, order = group_keys(key)
        keys = np.stack(np.divmod(key[order[firsts]], width), axis=1)
        return keys, add_groups(counts[order], firsts)
    # Few keys and many lines, as for a day of a few services: a place for every key, no sorting.
    is_used = np.zeros(span, dtype=bool)
    is_used[key] = True
    used = np.flatnonzero(is_used)
    sums = np.zeros((span, counts.shape[1]), dtype=np.int64)
    for i in range(counts.shape[1]):
        np.add.at(sums[:, i], key, counts[:, i].astype(np.int64, copy=False))
    return np.stack(np.divmod(used, width), axis=1), sums[used]
