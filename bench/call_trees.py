"""Stacks of a program as a random call tree: what a service's hosts run all day.

The stacks are the leaves of one tree, in the order of a walk through it. Two neighbours share most
of their frames, so half a million stacks of 30 frames have some five frames each that no other has:
few near the start, where main and the frameworks are, and most near the leaf. All are grown at
once, level by level.

A frame is a place in a function (SITES of them), and a place calls always the same function. Own
functions are in layers and call deeper ones, so a stack goes through main, frameworks, handlers and
helpers; now and then one calls a library or the kernel, and from the kernel none returns.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from storage.profile import Indices, Integers

SITES = 32
"""Places of a function that are on stacks: calls in it, and instructions at which ticks come."""

_LAYERS = 40
_MEAN_DEPTH, _DEPTH_SD = 30, 7
_SHALLOWEST, _DEEPEST = 6, 62
_SHARING = 6.0
"""How much of their frames neighbours share: of depth d a part of (d / 30) ** 6 are not shared."""
_LIBRARY_SHARE, _KERNEL_SHARE = 0.06, 0.025
"""Of the places of own functions, those that call a library, and the kernel."""
_KERNEL_OF_LIBRARY = 0.08
_HOT_SITES = 24.0
"""How much the first places of a function are on stacks more often than its last."""
_FAVOURITE = 8.0
"""Of how much the first functions of a layer are called more often than its last."""


class Zones(NamedTuple):
    """How many functions a program has of its own, of libraries and of the kernel, in this order.

    A program without own functions or libraries is one of the kernel's threads.
    """

    own: int
    libraries: int
    kernel: int

    @property
    def total(self) -> int:
        return self.own + self.libraries + self.kernel


@dataclass(frozen=True, slots=True)
class CallTree:
    """Stack i is `words[offsets[i]:offsets[i + 1]]`, leaf first, as pprof has it.

    A word is a function's number times SITES, plus the place in it. `threads` is which of the
    tree's roots the stack begins at. `by_rank` are the stacks, the hottest first: what is below a
    hot frame is hot.
    """

    offsets: Integers
    words: Indices
    threads: Integers
    by_rank: Integers

    def __len__(self) -> int:
        return len(self.threads)


def grow(random: np.random.Generator, zones: Zones, stacks: int, roots: int) -> CallTree:
    """Return a call tree with so many stacks, all different, below so many roots."""
    callees = _callees(random, zones)
    depths = random.normal(_MEAN_DEPTH, _DEPTH_SD, stacks).astype(np.int64)
    if not zones.own:
        depths //= 2
    depths = np.clip(depths, _SHALLOWEST, _DEEPEST)
    kept = _kept(random, depths, roots)
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(depths)])
    words = np.zeros(int(starts[-1]), dtype=np.int32)
    place = np.zeros(stacks, dtype=np.int64)
    node = np.zeros(stacks, dtype=np.int64)
    threads = np.zeros(stacks, dtype=np.int64)
    heat = np.zeros(stacks)
    for level in range(int(depths.max())):
        alive = np.flatnonzero(depths > level)
        is_new = kept[alive] <= level
        first = alive[is_new]
        if level == 0:
            function, parents = np.arange(len(first)), np.arange(len(first))
            threads[alive] = np.cumsum(is_new) - 1
        else:
            function, parents = callees[place[first]], node[first]
        # Siblings are neighbours: the n-th has the n-th place after a random one, most often the
        # function's first. So they differ, and some places of a function are hot. If a function
        # has too few places for all, its caller also calls the next function.
        siblings = np.arange(len(first)) - np.searchsorted(parents, parents)
        chance = random.random(int(parents[-1]) + 1) ** _HOT_SITES
        sites = (siblings + (SITES * chance).astype(np.int64)[parents]) % SITES
        function = (function + siblings // SITES) % zones.total
        of_node = np.cumsum(is_new) - 1
        node[alive] = of_node
        heat[alive] += random.normal(0, 1, len(first))[of_node]
        place[alive] = (function * SITES + sites)[of_node]
        words[starts[alive + 1] - 1 - level] = place[alive]
    return CallTree(starts, words, threads, np.argsort(-heat / np.sqrt(depths)))


def _kept(random: np.random.Generator, depths: Integers, roots: int) -> Integers:
    """Return how many frames each stack shares with the one before it, from the root on."""
    stacks = len(depths)
    bounds = np.minimum(depths, np.concatenate([depths[:1], depths[:-1]])) - 1
    kept = (bounds * random.random(stacks) ** (1 / _SHARING) + 0.5).astype(np.int64)
    # The first roots have more than the last.
    begins = (stacks * np.linspace(0, 1, roots, endpoint=False) ** 0.5).astype(np.int64)
    kept = np.clip(kept, 1, bounds)
    kept[begins] = 0
    return kept


def _callees(random: np.random.Generator, zones: Zones) -> Integers:
    """Return which function each place calls."""
    total = zones.total * SITES
    callees = np.zeros(total, dtype=np.int64)
    own, libraries = zones.own * SITES, (zones.own + zones.libraries) * SITES
    if zones.own:
        callees[:own] = _deeper(random, zones.own)
    to_library = np.zeros(total, dtype=bool)
    to_library[:own] = random.random(own) < _LIBRARY_SHARE
    to_library[own:libraries] = True
    to_library &= zones.libraries > 0
    to_kernel = np.zeros(total, dtype=bool)
    to_kernel[:own] = random.random(own) < _KERNEL_SHARE
    to_kernel[own:libraries] = random.random(libraries - own) < _KERNEL_OF_LIBRARY
    to_kernel[libraries:] = True
    chance = random.random(total) ** _FAVOURITE
    callees[to_library] = zones.own + (chance * zones.libraries).astype(np.int64)[to_library]
    first = zones.own + zones.libraries
    callees[to_kernel] = first + (chance * zones.kernel).astype(np.int64)[to_kernel]
    return callees


def _deeper(random: np.random.Generator, functions: int) -> Integers:
    """Return for each place of own functions one of the next layers; the last ones recurse."""
    # Few functions near the start, most in the middle and deeper.
    weights = np.minimum(np.arange(1, _LAYERS + 1) ** 1.5, 2.0 * _LAYERS)
    bounds = np.ceil(np.cumsum(weights) / weights.sum() * functions).astype(np.int64)
    first = np.concatenate([[0], bounds])
    layer = np.searchsorted(bounds, np.arange(functions), side="right")
    steps = random.choice((1, 2, 3), (functions, SITES), p=(0.8, 0.15, 0.05))
    to = np.minimum(layer[:, None] + steps, _LAYERS - 1)
    low, high = first[to], np.maximum(first[to + 1], first[to] + 1)
    chance = random.random((functions, SITES)) ** _FAVOURITE
    return np.minimum(low + (chance * (high - low)).astype(np.int64), functions - 1).reshape(-1)
