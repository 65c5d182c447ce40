"""Self samples of each object, without names: the noise of a comparison is estimated from them.

They hold how many self samples each function had under each service, both told apart as by
`storage.query.function_totals`. They take a sixth of the size of the stacks. Each object is kept
on its own, because windows of comparisons do not begin with an hour: so whole hours answer them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from storage.columns import Columns, group, key_starts_ns, ranges
from storage.hashing import Hasher, Hashes, Numbers, chain
from storage.profile import Accounting, Integers, Labels, Window, frame_of_module
from storage.query.function_totals import (
    PROCESS_LABELS,
    SelfSamples,
    fold,
    service_sets_of,
)
from storage.selector import Selector


@dataclass(frozen=True, slots=True, eq=False)
class ObjectSelfSamples:
    """Self samples of some profiles.

    `objects` has a line (start_ns, end_ns) per object, and
    `lines[line_offsets[i]:line_offsets[i + 1]]` (service set, function) are those of object i, with
    their `line_samples`. Functions are hashes alone, those of `FunctionTotals.function_hashes`.
    """

    type: str
    unit: str
    window: Window
    accounting: Accounting
    objects: Numbers
    service_sets: tuple[Labels, ...]
    function_hashes: Hashes
    line_offsets: Numbers
    lines: Numbers
    line_samples: Numbers

    @classmethod
    def of(cls, columns: Columns, hasher: Hasher) -> "ObjectSelfSamples":
        """Add up the leaves of one object's stacks, by the labels of its services."""
        of_label, service_sets = service_sets_of(columns.label_sets, PROCESS_LABELS)
        stack_offsets = columns.stack_offsets.astype(np.int64)
        stack = columns.rows[:, 1].astype(np.int64)
        has_leaf = stack_offsets[stack + 1] > stack_offsets[stack]
        ends = stack_offsets[stack[has_leaf] + 1]
        places, which = _distinct(columns.stack_words[ends - 1], len(columns.locations))
        hashes = _hash_functions(columns, places, hasher)
        firsts, order = group(hashes)
        of_place = np.empty(len(hashes), dtype=np.int64)
        of_place[order] = np.repeat(np.arange(len(firsts)), np.diff([*firsts, len(hashes)]))
        lines, counts = fold(
            of_label[columns.rows[has_leaf, 0]] if len(of_label) else np.zeros(0, np.int64),
            of_place[which],
            columns.counts[has_leaf, :1],
        )
        return cls(
            type=columns.type,
            unit=columns.unit,
            window=columns.window,
            accounting=columns.accounting,
            objects=columns.objects[:, :2],
            service_sets=service_sets,
            function_hashes=hashes[order[firsts]],
            line_offsets=np.array([0, len(lines)]),
            lines=lines,
            line_samples=counts[:, 0],
        )

    def inside(self, window: Window, selector: Selector) -> SelfSamples:
        """Return the selected lines of the objects that start in a window."""
        starts_ns = key_starts_ns(self.objects)
        chosen = np.flatnonzero((window.start_ns <= starts_ns) & (starts_ns < window.end_ns))
        offsets = self.line_offsets.astype(np.int64)
        at = ranges(offsets[chosen], offsets[chosen + 1] - offsets[chosen])
        lines, samples = self.lines[at].astype(np.int64), self.line_samples[at].astype(np.int64)
        if selector.matchers:
            is_asked = np.array(selector.choose(map(dict, self.service_sets)), dtype=bool)
            kept = is_asked[lines[:, 0]]
            lines, samples = lines[kept], samples[kept]
        return SelfSamples(self.service_sets, self.function_hashes, lines, samples)


def join_self_samples(parts: Sequence[ObjectSelfSamples]) -> ObjectSelfSamples:
    """Put the objects of parts one after the other.

    Raises:
        ValueError: there is none.
    """
    if not parts:
        raise ValueError("cannot join: no self samples given")
    if len(parts) == 1:
        return parts[0]
    window, accounting = parts[0].window, Accounting()
    for part in parts:
        window = window.union(part.window)
        accounting = accounting.merge(part.accounting)
    numbers: dict[Labels, int] = {}
    hashes, of_function = np.unique(
        np.concatenate([part.function_hashes for part in parts]), return_inverse=True
    )
    lines, at = [], 0
    for part in parts:
        of_set = [numbers.setdefault(labels, len(numbers)) for labels in part.service_sets]
        of_hash = of_function[at : at + len(part.function_hashes)]
        at += len(part.function_hashes)
        sets = np.array(of_set, dtype=np.int64)
        mine = part.lines.astype(np.int64)
        lines.append(np.stack([sets[mine[:, 0]], of_hash[mine[:, 1]]], axis=1))
    lengths = [np.diff(part.line_offsets.astype(np.int64)) for part in parts]
    return ObjectSelfSamples(
        type=parts[0].type,
        unit=parts[0].unit,
        window=window,
        accounting=accounting,
        objects=np.concatenate([part.objects for part in parts]).astype(np.int64),
        service_sets=tuple(numbers),
        function_hashes=hashes,
        line_offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(lengths))]),
        lines=np.concatenate(lines),
        line_samples=np.concatenate([part.line_samples for part in parts]).astype(np.int64),
    )


def _hash_functions(columns: Columns, places: Integers, hasher: Hasher) -> Hashes:
    """Return the hash of the innermost frame of each location."""
    table = np.zeros((len(places), 3), dtype=np.int64)
    starts = columns.frame_offsets[places].astype(np.int64)
    is_framed = columns.frame_offsets[places + 1] > starts
    table[is_framed] = columns.frames[starts[is_framed], :3]
    of_place = columns.locations[places].astype(np.int64)
    is_named = of_place[:, 2] > 0
    table[is_named, 0] = of_place[is_named, 0]
    table[is_named, 1:] = columns.named[of_place[is_named, 2] - 1, :2]
    is_bare = ~is_framed & ~is_named
    table[is_bare] = of_place[is_bare, :1]
    used, numbers = _distinct(table, len(columns.texts))
    texts = columns.texts.take(used)
    by_text = hasher.texts(texts)
    hashes = chain(*(by_text[numbers[:, i]] for i in range(3)))
    for number in np.unique(numbers[is_bare, 0]).tolist():
        names = frame_of_module(columns.modules, texts[number].decode())[:3]
        parts = hasher.texts([name.encode() for name in names])
        hashes[is_bare & (numbers[:, 0] == number)] = chain(*parts.reshape(3, 1))
    return hashes


def _distinct(numbers: Numbers, limit: int) -> tuple[Integers, Integers]:
    """Return the numbers below a limit that occur, and for each place its index there."""
    wide = numbers.astype(np.int64, copy=False)
    is_used = np.zeros(limit, dtype=bool)
    is_used[wide] = True
    return np.flatnonzero(is_used), (np.cumsum(is_used) - 1)[wide]
