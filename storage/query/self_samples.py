"""Self samples of each object by location: the noise of a comparison is estimated from them.

They count how many self samples each location had under each service, without what interpreters
add to stacks (`storage.interpreters`). The functions of the
locations, as they were known when the object was decoded, are in a table of their own, so that a
better name changes no count (`storage.query.resolve`). They take at most a third of the size of
the stacks. Each object is kept on its own, because windows of comparisons do not begin with an
hour: so whole hours answer them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from storage.columns import Columns, key_starts_ns, name_keys
from storage.grouping import distinct, ranges
from storage.hashing import Hasher, Hashes, Numbers
from storage.interpreters import fold_stacks
from storage.location_functions import hash_functions
from storage.merging import add_heads, merge_label_sets
from storage.profile import Accounting, Integers, Labels, Window
from storage.query.function_totals import (
    PROCESS_LABELS,
    SelfSamples,
    fold,
    service_sets_of,
)
from storage.query.resolve import LocationNames
from storage.selector import Selector
from storage.stack_tree import lists_of


class LocationSamples(NamedTuple):
    """Lines (service set, location), the self samples of each, and what the locations are named."""

    service_sets: tuple[Labels, ...]
    names: LocationNames
    lines: Integers
    samples: Integers

    def of_functions(self, function_hashes: Hashes) -> SelfSamples:
        """Return the same by function; there is a hash for each of the locations."""
        return SelfSamples(self.service_sets, function_hashes, self.lines, self.samples)


@dataclass(frozen=True, slots=True, eq=False)
class ObjectSelfSamples:
    """Self samples of some profiles.

    `objects` has a line (start_ns, end_ns) per object, and
    `lines[line_offsets[i]:line_offsets[i + 1]]` (service set, location) are those of object i, with
    their `line_samples`. Location j is `location_hashes[j]`; the function of its innermost frame is
    `function_hashes[functions[j]]`, as known then, and how well is in `name_ranks` and `named_s`,
    as in Columns. Functions are hashes alone, those of `FunctionTotals.function_hashes`.
    """

    type: str
    unit: str
    window: Window
    accounting: Accounting
    objects: Numbers
    service_sets: tuple[Labels, ...]
    location_hashes: Hashes
    functions: Numbers
    name_ranks: Numbers
    named_s: Numbers
    function_hashes: Hashes
    line_offsets: Numbers
    lines: Numbers
    line_samples: Numbers

    @classmethod
    def of(cls, columns: Columns, hasher: Hasher) -> "ObjectSelfSamples":
        """Add up the leaves of one object's stacks, by the labels of its services."""
        of_label, service_sets = service_sets_of(columns.label_sets, PROCESS_LABELS)
        stacks = lists_of(fold_stacks(columns))
        stack_offsets = stacks.offsets.astype(np.int64)
        stack = columns.rows[:, 1].astype(np.int64)
        has_leaf = stack_offsets[stack + 1] > stack_offsets[stack]
        ends = stack_offsets[stack[has_leaf] + 1]
        places, which = distinct(stacks.words[ends - 1], len(columns.locations))
        shown = columns.shown_frames(places)
        function_hashes, functions = np.unique(
            hash_functions(shown, hasher)[shown.offsets[:-1]], return_inverse=True
        )
        lines, counts = fold(
            of_label[columns.rows[has_leaf, 0]] if len(of_label) else np.zeros(0, np.int64),
            which,
            columns.counts[has_leaf, :1],
        )
        return cls(
            type=columns.type,
            unit=columns.unit,
            window=columns.window,
            accounting=columns.accounting,
            objects=columns.objects[:, :2],
            service_sets=service_sets,
            location_hashes=columns.location_hashes[places],
            functions=functions,
            name_ranks=columns.name_ranks[places],
            named_s=columns.named_s[places],
            function_hashes=function_hashes,
            line_offsets=np.array([0, len(lines)]),
            lines=lines,
            line_samples=counts[:, 0],
        )

    def inside(self, window: Window, selector: Selector) -> LocationSamples:
        """Return the selected lines of the objects that start in a window, added up."""
        starts_ns = key_starts_ns(self.objects)
        chosen = np.flatnonzero((window.start_ns <= starts_ns) & (starts_ns < window.end_ns))
        offsets = self.line_offsets.astype(np.int64)
        at = ranges(offsets[chosen], offsets[chosen + 1] - offsets[chosen])
        lines, samples = self.lines[at].astype(np.int64), self.line_samples[at].astype(np.int64)
        if selector.matchers:
            is_asked = np.array(selector.choose(map(dict, self.service_sets)), dtype=bool)
            kept = is_asked[lines[:, 0]]
            lines, samples = lines[kept], samples[kept]
        used, which = distinct(lines[:, 1], len(self.location_hashes))
        lines, counts = fold(lines[:, 0], which, samples[:, None])
        function_hashes = self.function_hashes[self.functions[used]]
        names = LocationNames(
            location_hashes=self.location_hashes[used],
            name_hashes=function_hashes,
            function_hashes=function_hashes,
            name_ranks=self.name_ranks[used],
            named_s=self.named_s[used],
        )
        return LocationSamples(self.service_sets, names, lines, counts[:, 0])


def join_self_samples(parts: Sequence[ObjectSelfSamples]) -> ObjectSelfSamples:
    """Put the objects of parts one after the other.

    Raises:
        ValueError: there is none, or they measure different things.
    """
    if len(parts) == 1:
        return parts[0]
    head = add_heads(parts)
    service_sets, set_numbers = merge_label_sets(
        [part.service_sets for part in parts], [part.lines[:, 0] for part in parts]
    )
    locations = _JoinedLocations.of(parts)
    lines = [
        np.stack([of_set.take(part.lines[:, 0]), of_location.take(part.lines[:, 1])], axis=1)
        for part, of_set, of_location in zip(parts, set_numbers, locations.numbers, strict=True)
    ]
    lengths = [np.diff(part.line_offsets.astype(np.int64)) for part in parts]
    return ObjectSelfSamples(
        **head._asdict(),
        service_sets=service_sets,
        location_hashes=locations.hashes,
        functions=locations.functions,
        name_ranks=locations.name_ranks,
        named_s=locations.named_s,
        function_hashes=locations.function_hashes,
        line_offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(lengths))]),
        lines=np.concatenate(lines),
        line_samples=np.concatenate([part.line_samples for part in parts]).astype(np.int64),
    )


class _JoinedLocations(NamedTuple):
    """The locations of some parts, each with the best name that it has in one of them."""

    hashes: Hashes
    functions: Integers
    name_ranks: Integers
    named_s: Integers
    function_hashes: Hashes
    numbers: list[Integers]
    """By part, the new number of each old location."""

    @classmethod
    def of(cls, parts: Sequence[ObjectSelfSamples]) -> "_JoinedLocations":
        hashes, of_location = np.unique(
            np.concatenate([part.location_hashes for part in parts]), return_inverse=True
        )
        ranks = np.concatenate([part.name_ranks for part in parts])
        named_s = np.concatenate([part.named_s for part in parts])
        count = max(1, len(of_location))
        # Of equally good names the first stays.
        preference = name_keys(ranks, named_s) * count + np.arange(count - 1, -1, -1)[: len(ranks)]
        best = np.zeros(len(hashes), dtype=np.int64)
        np.maximum.at(best, of_location, preference)
        best = count - 1 - best % count
        by_location = [part.function_hashes[part.functions] for part in parts]
        function_hashes, functions = np.unique(
            np.concatenate(by_location)[best], return_inverse=True
        )
        ends = np.cumsum([len(part.location_hashes) for part in parts])
        return cls(
            hashes=hashes,
            functions=functions,
            name_ranks=ranks[best].astype(np.int64),
            named_s=named_s[best].astype(np.int64),
            function_hashes=function_hashes,
            numbers=np.split(of_location, ends[:-1]),
        )
