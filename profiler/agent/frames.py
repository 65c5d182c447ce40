"""Frames: from the words of stacks to numbers of locations.

Each different frame is located once in a window. Code of a file is the same for all processes that
have the same mappings, as forked workers do, so they share its numbers. All else is in a process's
own memory (the heap of a runtime, compiled code in anonymous memory): its numbers are those of one
process generation.
"""

from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, islice
from typing import TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from bpf.samples import ProcessGeneration, RawFrame, RawSample, Words, split_frames
from profiler.agent.budgets import LocationBudget, Owner
from symbolizer.location import Location
from symbolizer.maps import MappingTable, is_of_compiler

Numbers: TypeAlias = "array[int]"
"""A stack as numbers of locations (int32). Making a numpy array of each takes much longer."""

_STACKS_AT_ONCE = 64
"""Frames become Python objects, which take ten times as much as the stacks they come from."""

Locate = Callable[[ProcessGeneration, MappingTable, Words], list[Location]]
"""Where native addresses lie: whose they are, its mappings, addresses."""


class FrameNumbers:
    """Numbers of the frames of one window. Not thread-safe.

    `locate` finds native code and `locate_kernel` the kernel's; `number` returns the number that a
    location has in the window's profile, `rest` that of what is beyond the `budget` of a process.
    """

    def __init__(
        self,
        number: Callable[[Location], int],
        locate: Locate,
        locate_kernel: Callable[[Words], list[Location]],
        rest: Callable[[], int],
        budget: LocationBudget,
    ) -> None:
        self._number = number
        self._locate = locate
        self._locate_kernel = locate_kernel
        self._rest = rest
        self._budget = budget
        self._shared: WeakKeyDictionary[MappingTable, dict[RawFrame, int]] = WeakKeyDictionary()
        self._own: dict[ProcessGeneration, dict[RawFrame, int]] = {}
        self._is_own: WeakKeyDictionary[MappingTable, npt.NDArray[np.bool_]] = WeakKeyDictionary()
        self._nowhere: WeakKeyDictionary[MappingTable, int] = WeakKeyDictionary()
        self._rest_number = -1

    def user(self, mappings: MappingTable, samples: Sequence[RawSample]) -> list[Numbers]:
        """Return each sample's user stack, leaf first. The samples have these mappings.

        Addresses outside of all mappings share one number: they mean nothing, and a process can
        make up any number of them. A stack with frames beyond the budget begins with `rest`.
        """
        numbered: dict[int, Numbers] = {}
        by_owner: dict[Owner, list[int]] = {}
        for place, sample in enumerate(samples):
            by_owner.setdefault(Owner.of(sample), []).append(place)
        for owner, places in by_owner.items():
            for start in range(0, len(places), _STACKS_AT_ONCE):
                some = places[start : start + _STACKS_AT_ONCE]
                stacks = [split_frames(samples[place].user) for place in some]
                numbered.update(zip(some, self._stacks(owner, mappings, stacks), strict=True))
        return [numbered[place] for place in range(len(samples))]

    def kernel(self, stacks: Sequence[Words]) -> list[Numbers]:
        """Return kernel stacks, leaf first.

        Kernel code comes and goes at any time: what was unknown a second ago may be known now.
        """
        frames = [words.tolist() for words in stacks]
        new = list({frame for stack in frames for frame in stack})
        places = self._locate_kernel(np.array(new, dtype=np.uint64)) if new else []
        numbers = dict(zip(new, map(self._number, places), strict=True))
        return _as_numbers(frames, map(numbers.__getitem__, chain.from_iterable(frames)))

    def _stacks(
        self, owner: Owner, mappings: MappingTable, stacks: Sequence[Sequence[RawFrame]]
    ) -> list[Numbers]:
        shared = self._shared.setdefault(mappings, {})
        own = self._own.get(owner.generation, {})
        new = [
            *dict.fromkeys(
                f for stack in stacks for f in reversed(stack) if f not in shared and f not in own
            )
        ]
        others = self._find(owner, mappings, new) if new else {}
        own = self._own.get(owner.generation, {})
        frames = chain.from_iterable(stacks)
        if others:
            own = {**others, **own}
        if not own:
            return _as_numbers(stacks, map(shared.__getitem__, frames))
        numbered = _as_numbers(stacks, (own[f] if f in own else shared[f] for f in frames))
        return [self._cut(numbers) for numbers in numbered] if others else numbered

    def _find(
        self, owner: Owner, mappings: MappingTable, frames: Sequence[RawFrame]
    ) -> dict[RawFrame, int]:
        """Locate frames, and keep their numbers for as long as they mean the same.

        Returned are the numbers of those that are not kept: they lie nowhere, or are too many.
        """
        # No runtime has a reader yet: a frame of one is where address 0 is, nowhere.
        words = np.array([f if isinstance(f, int) else 0 for f in frames], dtype=np.uint64)
        is_nowhere = mappings.find(words) < 0
        others: dict[RawFrame, int] = {}
        if is_nowhere.any():
            nowhere = self._number_nowhere(owner, mappings)
            others = {frames[place]: nowhere for place in np.flatnonzero(is_nowhere).tolist()}
        places = np.flatnonzero(~is_nowhere)
        granted = self._budget.take(owner, len(places)) if len(places) else 0
        if granted < len(places):
            self._rest_number = self._rest()
            others |= {frames[place]: self._rest_number for place in places[granted:].tolist()}
        places = places[:granted]
        if granted:
            self._keep(
                owner.generation, mappings, [frames[i] for i in places.tolist()], words[places]
            )
        return others

    def _number_nowhere(self, owner: Owner, mappings: MappingTable) -> int:
        number = self._nowhere.get(mappings)
        if number is None:
            (place,) = self._locate(owner.generation, mappings, np.zeros(1, np.uint64))
            number = self._nowhere[mappings] = self._number(place)
        return number

    def _keep(
        self,
        generation: ProcessGeneration,
        mappings: MappingTable,
        frames: Sequence[RawFrame],
        words: Words,
    ) -> None:
        numbers = map(self._number, self._locate(generation, mappings, words))
        for frame, number, is_own in zip(
            frames, numbers, self._lies_in_process(mappings, words), strict=True
        ):
            if is_own:
                self._own.setdefault(generation, {})[frame] = number
            else:
                self._shared[mappings][frame] = number

    def _cut(self, leaf_first: Numbers) -> Numbers:
        """Let a stack end where the first frame from the root on is beyond the budget."""
        if self._rest_number not in leaf_first:
            return leaf_first
        return leaf_first[len(leaf_first) - 1 - leaf_first[::-1].index(self._rest_number) :]

    def _lies_in_process(self, mappings: MappingTable, addresses: Words) -> list[bool]:
        is_own = self._is_own.get(mappings)
        if is_own is None:
            kinds = [is_of_compiler(mapping.path) for mapping in mappings.mappings]
            is_own = self._is_own[mappings] = np.array(kinds)
        kept: list[bool] = is_own[mappings.find(addresses)].tolist()
        return kept


def _as_numbers(stacks: Sequence[Sequence[RawFrame]], numbers: Iterable[int]) -> list[Numbers]:
    """Cut numbers, one per frame, into stacks as long as these."""
    each = iter(numbers)
    return [array("i", islice(each, len(stack))) for stack in stacks]
