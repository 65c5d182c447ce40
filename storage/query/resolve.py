"""Resolve: find the functions of locations, by the best names that are known of them.

What is kept of objects and hours counts by location, and has their names, as they were known when
it was decoded, in a table of its own. A name may become known later, or on another host only. So
names are chosen when parts are read together (`storage.profile.NameRank`): the best name that any
part has holds for the location in all of them. The graph, tables and comparisons of one window
therefore show one function, also where its older objects have an address only.

A location keeps its hash whatever its names are (`storage.hashing`), so the parts need not agree.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from storage.columns import Columns, ShownFrames, name_keys
from storage.grouping import distinct
from storage.hashing import Hasher, Hashes, Numbers, chain, process_hasher
from storage.location_functions import hash_functions
from storage.merging import adopt_names
from storage.profile import Integers

_Chosen = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class LocationNames:
    """What some profiles know of the names of their locations, a line per location.

    `name_hashes` are of all frames of a location, `function_hashes` of its innermost one, as
    `FunctionTotals.function_hashes`; `name_ranks` and `named_s` are those of Columns.
    """

    location_hashes: Hashes
    name_hashes: Hashes
    function_hashes: Hashes
    name_ranks: Numbers
    named_s: Numbers

    @classmethod
    def of(cls, columns: Columns, hasher: Hasher) -> "LocationNames":
        """Return the names of all locations, by hash."""
        order = np.argsort(columns.location_hashes)
        shown = columns.shown_frames(order)
        hashes = hash_functions(shown, hasher)
        return cls(
            location_hashes=columns.location_hashes[order],
            name_hashes=hasher.stacks(hashes, shown.offsets, np.arange(len(hashes))),
            function_hashes=hashes[shown.offsets[:-1]],
            name_ranks=columns.name_ranks[order],
            named_s=columns.named_s[order],
        )

    @property
    def keys(self) -> Integers:
        return name_keys(self.name_ranks, self.named_s)


class Better(NamedTuple):
    """Locations of a part that others name better, and which of the others do."""

    location_hashes: Hashes
    name_hashes: Hashes
    sources: Integers

    @property
    def fingerprint(self) -> str:
        """Return a digest of the locations and their names: the same names make the same totals."""
        content = self.location_hashes.tobytes() + self.name_hashes.tobytes()
        return hashlib.blake2b(content, digest_size=16).hexdigest()


class KnownNames:
    """The best names of the locations of several parts. Parts are numbered as they are added."""

    def __init__(self) -> None:
        self._hashes: Hashes = np.zeros(0, np.uint64)  # sorted
        self._names: Hashes = np.zeros(0, np.uint64)
        self._functions: Hashes = np.zeros(0, np.uint64)
        self._keys: Integers = np.zeros(0, np.int64)
        self._sources: Integers = np.zeros(0, np.int64)
        self._parts = 0
        self.is_disputed = False
        """Whether two parts have different names for a location."""

    def add(self, names: LocationNames) -> None:
        """Take over the names of locations that are new, and those that are better."""
        keys = names.keys
        at, is_known = self._find(names.location_hashes)
        known = np.flatnonzero(is_known)
        at = at[known]
        differs = self._names[at] != names.name_hashes[known]
        has_name = np.maximum(self._keys[at], keys[known]) > 0
        self.is_disputed |= bool((differs & has_name).any())
        is_better = keys[known] > self._keys[at]
        at, better = at[is_better], known[is_better]
        self._names[at] = names.name_hashes[better]
        self._functions[at] = names.function_hashes[better]
        self._keys[at] = keys[better]
        self._sources[at] = self._parts
        new = np.flatnonzero(~is_known)
        if len(new):
            hashes = np.concatenate([self._hashes, names.location_hashes[new]])
            order = np.argsort(hashes, kind="stable")
            self._hashes = hashes[order]
            self._names = np.concatenate([self._names, names.name_hashes[new]])[order]
            self._functions = np.concatenate([self._functions, names.function_hashes[new]])[order]
            self._keys = np.concatenate([self._keys, keys[new]])[order]
            sources = np.full(len(new), self._parts)
            self._sources = np.concatenate([self._sources, sources])[order]
        self._parts += 1

    def better(self, names: LocationNames) -> Better:
        """Return the locations of a part that have a better name elsewhere."""
        at, is_known = self._find(names.location_hashes)
        known = np.flatnonzero(is_known)
        at = at[known]
        at = at[(self._names[at] != names.name_hashes[known]) & (self._keys[at] > 0)]
        return Better(self._hashes[at], self._names[at], self._sources[at])

    def functions(self, location_hashes: Hashes) -> tuple[Hashes, _Chosen]:
        """Return the hash of each location's function, and which of the locations are known."""
        at, is_known = self._find(location_hashes)
        functions = np.zeros(len(location_hashes), np.uint64)
        functions[is_known] = self._functions[at[is_known]]
        return functions, is_known

    def _find(self, location_hashes: Hashes) -> tuple[Integers, _Chosen]:
        if not len(self._hashes):
            return np.zeros(len(location_hashes), np.int64), np.zeros(len(location_hashes), bool)
        at = np.minimum(np.searchsorted(self._hashes, location_hashes), len(self._hashes) - 1)
        return at, self._hashes[at] == location_hashes


def resolve_columns(parts: Sequence[Columns]) -> list[Columns]:
    """Return profiles in which equal locations have the same names, the best that any has.

    Of equally good names those of the first part are taken.
    """
    hasher = process_hasher()
    locations = np.concatenate([part.location_hashes for part in parts])
    names = np.concatenate([_hash_names(part.shown_frames(), hasher) for part in parts])
    order = np.argsort(locations)
    locations, names = locations[order], names[order]
    is_disputed = (locations[1:] == locations[:-1]) & (names[1:] != names[:-1])
    if not is_disputed.any():
        return list(parts)
    disputed = locations[1:][is_disputed]
    return [adopt_names(part, parts, disputed) for part in parts]


def _hash_names(shown: ShownFrames, hasher: Hasher) -> Hashes:
    """Return the hash of all frames of each location, files and lines included."""
    used, which = distinct(shown.table[:, 3], len(shown.texts))
    files = hasher.texts(shown.texts.take(used))[which]
    frames = chain(hash_functions(shown, hasher), files, shown.table[:, 4])
    return hasher.stacks(frames, shown.offsets, np.arange(len(frames)))
