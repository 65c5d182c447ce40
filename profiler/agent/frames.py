"""Frames: from the words of stacks to numbers of locations.

Each different frame is located once in a window. Code of a file is the same for all processes that
have the same mappings, as forked workers do, so they share its numbers. All else is in a process's
own memory (the heap of a runtime, compiled code in anonymous memory): its numbers are those of one
process generation.
"""

from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from bpf.frames import split_frames
from bpf.interpreters import ChainEnd
from bpf.samples import ProcessGeneration, PythonFrame, RawFrame, RawSample, Words
from profiler.agent.budgets import LocationBudget, Owner
from symbolizer.location import Location
from symbolizer.maps import MappingTable, is_of_compiler

Numbers: TypeAlias = "array[int]"
"""A stack as numbers of locations (int32). Making a numpy array of each takes much longer."""

_STACKS_AT_ONCE = 64
"""Frames become Python objects, which take ten times as much as the stacks they come from."""

_FRAMES_OF_A_LOCATION = 4
"""Frames that take as much as a location, if that is known: processes have many in common."""

_MOST_KNOWN = 10_000
"""Frames that one process has twice in memory."""

_NO_NUMBERS: Numbers = array("i")
_NO_FRAME = -2
"""In place of a number: this is not shown."""

ATTEMPTS, FRAMES = "attempts", "frames"


class Numbering(NamedTuple):
    """The numbers of a window's locations, and that of what is beyond the budget of a process."""

    number: Callable[[Location], int]
    is_known: Callable[[Location], bool]
    rest: Callable[[], int]


class Locators(NamedTuple):
    """Where frames lie: native addresses of a process, the kernel's, an interpreter's.

    `is_loop_certain` says whether each native frame that is taken for one of an interpreter's loop
    in processes with these mappings is one.
    """

    native: Callable[[ProcessGeneration, MappingTable, Words], list[Location]]
    kernel: Callable[[Words], list[Location]]
    python: Callable[[ProcessGeneration, PythonFrame], Location | None]
    is_loop_certain: Callable[[MappingTable], bool]


class FrameNumbers:
    """Numbers of the frames of one window. Not thread-safe.

    `number` returns the number that a
    location has in the window's profile, `rest` that of what is beyond the `budget` of a process.

    Attributes:
        python: samples of threads of interpreters, the frames found in all of them, and samples
            whose frames are not all there, by the reason.
    """

    def __init__(
        self,
        numbering: Numbering,
        locate: Locators,
        budget: LocationBudget,
    ) -> None:
        self._numbering = numbering
        self._locate = locate
        self._budget = budget
        self.python: Counter[str] = Counter()
        self._shared: WeakKeyDictionary[MappingTable, dict[RawFrame, int]] = WeakKeyDictionary()
        self._own: dict[ProcessGeneration, dict[RawFrame, int]] = {}
        self._known: WeakKeyDictionary[MappingTable, dict[ProcessGeneration, _Known]] = (
            WeakKeyDictionary()
        )
        self._has_no_frames = False
        self._is_own: WeakKeyDictionary[MappingTable, npt.NDArray[np.bool_]] = WeakKeyDictionary()
        self._nowhere: WeakKeyDictionary[MappingTable, int] = WeakKeyDictionary()
        self._rest_number = -1

    def user(self, mappings: MappingTable, samples: Sequence[RawSample]) -> list[Numbers]:
        """Return each sample's user stack, leaf first. The samples have these mappings.

        Addresses outside of all mappings share one number: they mean nothing, and a process can
        make up any number of them. A stack with frames beyond the budget begins with `rest`.
        """
        shared = self._shared.setdefault(mappings, {})
        numbered: list[Numbers] = [_NO_NUMBERS] * len(samples)
        is_loop_certain = self._locate.is_loop_certain(mappings)
        for start in range(0, len(samples), _STACKS_AT_ONCE):
            new: dict[Owner, dict[int, list[RawFrame]]] = {}
            for place, sample in enumerate(samples[start : start + _STACKS_AT_ONCE], start):
                frames = self._frames_of(sample, is_loop_certain)
                known = self._known_of(sample.generation, mappings) if self._own else shared
                try:  # one look-up a frame, where all have been located before
                    numbered[place] = array("i", map(known.__getitem__, frames))
                except KeyError:
                    new.setdefault(Owner.of(sample), {})[place] = frames
            for owner, stacks in new.items():
                found = self._stacks(owner, mappings, [*stacks.values()])
                for place, numbers in zip(stacks, found, strict=True):
                    numbered[place] = numbers
        return [*map(_without_no_frames, numbered)] if self._has_no_frames else numbered

    def kernel(self, stacks: Sequence[Words]) -> list[Numbers]:
        """Return kernel stacks, leaf first.

        Kernel code comes and goes at any time: what was unknown a second ago may be known now.
        """
        frames = [words.tolist() for words in stacks]
        new = list({frame for stack in frames for frame in stack})
        places = self._locate.kernel(np.array(new, dtype=np.uint64)) if new else []
        numbers = dict(zip(new, map(self._numbering.number, places), strict=True))
        return [array("i", map(numbers.__getitem__, stack)) for stack in frames]

    def _frames_of(self, sample: RawSample, is_loop_certain: bool) -> list[RawFrame]:
        frames, chain = split_frames(sample.user, is_loop_certain=is_loop_certain)
        if chain is not None:
            number = sample.samples
            self.python[ATTEMPTS] += number
            self.python[FRAMES] += number * chain.frames
            if chain.end != ChainEnd.WHOLE:
                self.python[chain.end.label] += number
        return frames

    def _stacks(
        self, owner: Owner, mappings: MappingTable, stacks: Sequence[Sequence[RawFrame]]
    ) -> list[Numbers]:
        shared = self._shared[mappings]
        own = self._own.get(owner.generation, {})
        unknown = {  # from the root on: the budget may end among them
            frame: None
            for stack in stacks
            for frame in reversed(stack)
            if frame not in shared and frame not in own
        }
        others = self._find(owner, mappings, [*unknown]) if unknown else {}
        known = self._known_of(owner.generation, mappings)
        if not others:
            return [array("i", map(known.__getitem__, stack)) for stack in stacks]
        number = others.get
        return [
            self._cut(
                array("i", [known[f] if (other := number(f)) is None else other for f in stack])
            )
            for stack in stacks
        ]

    def _known_of(
        self, generation: ProcessGeneration, mappings: MappingTable
    ) -> dict[RawFrame, int]:
        """Return the numbers of all frames of a process that have been located."""
        own, shared = self._own.get(generation), self._shared[mappings]
        if own is None:
            return shared
        of_mappings = self._known.setdefault(mappings, {})
        known = of_mappings.get(generation)
        if known is None:
            known = of_mappings[generation] = _Known(own, shared)
        return known

    def _find(
        self, owner: Owner, mappings: MappingTable, frames: Sequence[RawFrame]
    ) -> dict[RawFrame, int]:
        """Locate frames, and keep their numbers for as long as they mean the same.

        Returned are the numbers of those that are not kept: they lie nowhere, or are too many.
        """
        native = [frame for frame in frames if isinstance(frame, int)]
        others = self._find_native(owner, mappings, native) if native else {}
        if len(native) < len(frames):
            python = [frame for frame in frames if isinstance(frame, PythonFrame)]
            others |= self._find_python(owner, python)
        return others

    def _find_native(
        self, owner: Owner, mappings: MappingTable, frames: Sequence[int]
    ) -> dict[RawFrame, int]:
        words = np.array(frames, dtype=np.uint64)
        lie_in = mappings.find(words)
        is_nowhere = lie_in < 0
        others: dict[RawFrame, int] = {}
        if is_nowhere.any():
            nowhere = self._number_nowhere(owner, mappings)
            others = {frames[place]: nowhere for place in np.flatnonzero(is_nowhere).tolist()}
            words, lie_in = words[~is_nowhere], lie_in[~is_nowhere]
        afforded = self._afford(owner, len(words))
        others |= self._as_rest(words[afforded:].tolist())
        if not afforded:
            return others
        found = self._locate.native(owner.generation, mappings, words[:afforded])
        are_own = self._are_of_process(mappings)[lie_in[:afforded]].tolist()
        own, shared = self._own.setdefault(owner.generation, {}), self._shared[mappings]
        numbers = self._number_all(owner, found)
        for frame, number, is_own in zip(words[:afforded].tolist(), numbers, are_own, strict=True):
            if number is None:
                others |= self._as_rest([frame])
            else:
                (own if is_own else shared)[frame] = number
        return others

    def _find_python(self, owner: Owner, frames: Sequence[PythonFrame]) -> dict[RawFrame, int]:
        """Locate an interpreter's frames; those that are no functions have no number."""
        afforded = self._afford(owner, len(frames))
        others = self._as_rest(frames[afforded:])
        own = self._own.setdefault(owner.generation, {})
        shown: dict[PythonFrame, Location] = {}
        for frame in frames[:afforded]:
            place = self._locate.python(owner.generation, frame)
            if place is None:
                own[frame] = _NO_FRAME
                self._has_no_frames = True
            else:
                shown[frame] = place
        numbers = self._number_all(owner, [*shown.values()])
        for frame, number in zip(shown, numbers, strict=True):
            if number is None:
                others |= self._as_rest([frame])
            else:
                own[frame] = number
        return others

    def _afford(self, owner: Owner, frames: int) -> int:
        """Charge as many frames as a process may still have; return how many these are."""
        wanted = -(-frames // _FRAMES_OF_A_LOCATION)
        granted = self._budget.take(owner, wanted) if wanted else 0
        return min(frames, granted * _FRAMES_OF_A_LOCATION)

    def _number_all(self, owner: Owner, found: Sequence[Location]) -> list[int | None]:
        """Number locations; the first process that has one is charged for it, if it can be."""
        new = [*dict.fromkeys(each for each in found if not self._numbering.is_known(each))]
        granted = self._budget.take(owner, len(new)) if new else 0
        refused = frozenset(new[granted:])
        number = self._numbering.number
        return [None if each in refused else number(each) for each in found]

    def _as_rest(self, frames: Sequence[RawFrame]) -> dict[RawFrame, int]:
        if frames:
            self._rest_number = self._numbering.rest()
        return dict.fromkeys(frames, self._rest_number)

    def _number_nowhere(self, owner: Owner, mappings: MappingTable) -> int:
        number = self._nowhere.get(mappings)
        if number is None:
            (place,) = self._locate.native(owner.generation, mappings, np.zeros(1, np.uint64))
            number = self._nowhere[mappings] = self._numbering.number(place)
        return number

    def _cut(self, leaf_first: Numbers) -> Numbers:
        """Let a stack end where the first frame from the root on is beyond the budget."""
        if self._rest_number not in leaf_first:
            return leaf_first
        return leaf_first[len(leaf_first) - 1 - leaf_first[::-1].index(self._rest_number) :]

    def _are_of_process(self, mappings: MappingTable) -> npt.NDArray[np.bool_]:
        """Return of each mapping whether its code is of the process alone."""
        are_own = self._is_own.get(mappings)
        if are_own is None:
            kinds = [is_of_compiler(mapping.path) for mapping in mappings.mappings]
            are_own = self._is_own[mappings] = np.array(kinds, np.bool_)
        return are_own


class _Known(dict[RawFrame, int]):
    """Numbers of a process that has frames of its own, kept here with the shared ones it used.

    So each frame takes one look-up, which no Python function sees.
    """

    def __init__(self, own: dict[RawFrame, int], shared: dict[RawFrame, int]) -> None:
        super().__init__()
        self._own, self._shared = own, shared

    def __missing__(self, frame: RawFrame) -> int:
        number = self._own.get(frame)
        if number is None:
            number = self._shared[frame]
        if len(self) >= _MOST_KNOWN:
            self.clear()
        self[frame] = number
        return number


def _without_no_frames(numbers: Numbers) -> Numbers:
    if _NO_FRAME not in numbers:
        return numbers
    return array("i", [number for number in numbers if number != _NO_FRAME])
