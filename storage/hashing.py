"""Hash texts, locations and stacks to 64 bits, keyed with the tenant's key.

Equal locations and stacks of different objects are recognized by these hashes, so that merging is
sorting. The key is one for all who read a tenant (`storage.objects.tenant_key`), so its ids are
the same on every machine, and what one machine made of an object means the same on another.

Two different locations or stacks may get one hash; their counts would be added up under the names
of one of them, and the total would not change. How likely is that?

- By chance: n hashes of 64 bits collide with a probability of about n^2 / 2^65. Of a million
  distinct stacks, which a day of a few services has, that is 3e-8; of 100 million, which a fleet of
  thousands of hosts may have in a month, 3e-4 for all of them together, and then two stacks of 100
  million are confused. Locations are fewer by a factor of ten to a hundred.
- By intent: whoever chooses the names of functions on a host, but cannot read the store, does not
  know the key. Texts are hashed by BLAKE2b with the key, so it is not known which texts collide.
  Stacks are hashed by a sum of products of their locations' hashes with factors (multilinear
  hashing, Carter and Wegman 1979), neither of which are known without the key. Whoever may read
  the tenant knows the key, sees its profiles anyway, and could only confuse counts in them.

Hashes of 128 bits without a key would need no such argument, and twice the memory and time in
sorting, which is what merging consists of.
"""

import contextlib
import functools
import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from symbolizer.digest import blake2b

Hashes = npt.NDArray[np.uint64]
Numbers = npt.NDArray[Any]
"""Whole numbers of any width: arrays that come from a file are as narrow as they can be."""

_HASHED_LIMIT = 1 << 20
"""Texts a Hasher remembers. Beyond that it forgets them all and hashes them again."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


class Hasher:
    """Hashes texts and stacks of hashed locations. Safe to use from several threads."""

    def __init__(self, key: bytes) -> None:
        self._key = key[:64]
        self._known: dict[bytes, int] = {}
        self._lock = threading.Lock()
        self._seed = np.uint64(self._learn(b"\0depths"))
        self._factors = np.zeros(0, np.uint64)

    def stacks(self, location_hashes: Hashes, offsets: Numbers, words: Numbers) -> Hashes:
        """Return each stack's hash: the sum of its locations' hashes, each times one of its depth.

        That is multilinear hashing (Carter and Wegman, 1979); the key decides the factors.
        """
        offsets = offsets.astype(np.int64, copy=False)
        lengths: npt.NDArray[np.int64] = offsets[1:] - offsets[:-1]
        deepest = int(lengths.max(initial=0))
        factors = self._factors  # another thread may replace them with fewer meanwhile
        if len(factors) < deepest:
            depths = np.arange(1, 2 * deepest + 1, dtype=np.uint64)
            self._factors = factors = mix(depths * _GOLDEN + self._seed) | np.uint64(1)
        depth = np.arange(len(words))
        depth -= np.repeat(offsets[:-1], lengths)
        hashes = location_hashes.take(words)
        hashes *= factors.take(depth)
        sums = np.zeros(len(lengths), dtype=np.uint64)
        has_words = np.flatnonzero(lengths)
        if len(has_words):
            sums[has_words] = np.add.reduceat(hashes, offsets[:-1].take(has_words))
        return chain(sums, lengths)

    def texts(self, texts: Sequence[bytes]) -> Hashes:
        with contextlib.suppress(KeyError):
            return np.fromiter(map(self._known.__getitem__, texts), np.uint64, len(texts))
        hashes = list(map(self._known.get, texts))
        learned = [
            self._learn(text) if known is None else known
            for text, known in zip(texts, hashes, strict=True)
        ]
        return np.array(learned, dtype=np.uint64)

    def _learn(self, text: bytes) -> int:
        digest = blake2b(text, digest_size=8, key=self._key).digest()
        number = int.from_bytes(digest, "little")
        with self._lock:
            if len(self._known) >= _HASHED_LIMIT:
                self._known = {}
            self._known[text] = number
        return number


@functools.cache
def process_hasher() -> Hasher:
    """Return a hasher whose key only this process knows, for profiles that are in no store."""
    return Hasher(os.urandom(32))


def hash_locations(text_hashes: Hashes, locations: Numbers, named: Numbers) -> Hashes:
    """Return each location's hash. The tables are described at `storage.columns.Columns`."""
    hashes = chain(text_hashes[locations[:, 0]], locations[:, 1])
    at = np.flatnonzero(locations[:, 2])
    if len(at):
        lines = named[locations[at, 2].astype(np.int64) - 1]
        parts = [text_hashes[lines[:, i]] for i in range(3)]
        hashes[at] = chain(hashes[at], *parts, lines[:, 3], lines[:, 4])
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
