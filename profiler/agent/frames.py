"""Frames: from the words of stacks to numbers of locations.

Each different frame is located once in a window. Code of a file is the same for all processes that
have the same mappings, as forked workers do, so they share its numbers. All else is in a process's
own memory (the heap of a runtime, compiled code in anonymous memory): its numbers are those of one
process generation.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, chain, pairwise
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from bpf.samples import ProcessGeneration, RawFrame, RawSample, Words, split_frames
from symbolizer.location import Location
from symbolizer.maps import MappingTable, is_anonymous

Numbers = npt.NDArray[np.int32]
"""A stack as numbers of locations."""

Locate = Callable[[int, MappingTable, Words], list[Location]]
"""Where native addresses lie: pid, its mappings, addresses."""


class FrameNumbers:
    """Numbers of the frames of one window. Not thread-safe.

    `locate` finds native code and `locate_kernel` the kernel's; `number` returns the number that a
    location has in the window's profile.
    """

    def __init__(
        self,
        number: Callable[[Location], int],
        locate: Locate,
        locate_kernel: Callable[[Words], list[Location]],
    ) -> None:
        self._number = number
        self._locate = locate
        self._locate_kernel = locate_kernel
        self._shared: WeakKeyDictionary[MappingTable, dict[RawFrame, int]] = WeakKeyDictionary()
        self._own: dict[ProcessGeneration, dict[RawFrame, int]] = {}
        self._is_own: WeakKeyDictionary[MappingTable, npt.NDArray[np.bool_]] = WeakKeyDictionary()

    def user(self, mappings: MappingTable, samples: Sequence[RawSample]) -> list[Numbers]:
        """Return each sample's user stack, leaf first. The samples have these mappings."""
        numbered: dict[int, Numbers] = {}
        by_generation: dict[ProcessGeneration, list[int]] = {}
        for place, sample in enumerate(samples):
            by_generation.setdefault(sample.generation, []).append(place)
        for generation, places in by_generation.items():
            stacks = [split_frames(samples[place].user) for place in places]
            numbered.update(zip(places, self._stacks(generation, mappings, stacks), strict=True))
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
        self,
        generation: ProcessGeneration,
        mappings: MappingTable,
        stacks: Sequence[Sequence[RawFrame]],
    ) -> list[Numbers]:
        shared = self._shared.setdefault(mappings, {})
        own = self._own.get(generation, {})
        new = {f for stack in stacks for f in stack if f not in shared and f not in own}
        if new:
            self._find(generation, mappings, new)
            own = self._own.get(generation, {})
        frames = chain.from_iterable(stacks)
        if not own:
            return _as_numbers(stacks, map(shared.__getitem__, frames))
        return _as_numbers(stacks, (own[f] if f in own else shared[f] for f in frames))

    def _find(
        self, generation: ProcessGeneration, mappings: MappingTable, frames: Iterable[RawFrame]
    ) -> None:
        """Locate frames, and keep their numbers for as long as they mean the same."""
        # No runtime has a reader yet: a frame of one is where address 0 is, nowhere.
        frames = list(frames)
        addresses = [frame if isinstance(frame, int) else 0 for frame in frames]
        words = np.array(addresses, dtype=np.uint64)
        numbers = map(self._number, self._locate(generation.pid, mappings, words))
        for frame, number, is_own in zip(
            frames, numbers, self._lies_in_process(mappings, words), strict=True
        ):
            if is_own or not isinstance(frame, int):
                self._own.setdefault(generation, {})[frame] = number
            else:
                self._shared[mappings][frame] = number

    def _lies_in_process(self, mappings: MappingTable, addresses: Words) -> list[bool]:
        is_own = self._is_own.get(mappings)
        if is_own is None:  # the last one is for addresses outside of all mappings
            kinds = [*(is_anonymous(mapping.path) for mapping in mappings.mappings), False]
            is_own = self._is_own[mappings] = np.array(kinds)
        kept: list[bool] = is_own[mappings.find(addresses)].tolist()
        return kept


def _as_numbers(stacks: Sequence[Sequence[RawFrame]], numbers: Iterable[int]) -> list[Numbers]:
    """Cut numbers, one per frame, into stacks as long as these."""
    ends = list(accumulate(map(len, stacks)))
    joined = np.fromiter(numbers, np.int32, ends[-1] if ends else 0)
    return [joined[start:end] for start, end in pairwise([0, *ends])]
