"""Frames of a user stack: its words taken apart, with interpreter frames where they belong.

The native walk and the chain of interpreter frames come one after the other. Each evaluation, a
run of interpreter frames, belongs to the native frame of the interpreter's loop in which it
happens: the word that ends the evaluation is an address inside that native frame.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bpf.interpreters import ChainEnd
from bpf.samples import FRAME_WORDS, TAG_SHIFT, PythonFrame, RawFrame, Tag, Words

_ADDRESS, _LOW = (1 << TAG_SHIFT) - 1, (1 << 32) - 1

_NATIVE, _EVALUATION = int(Tag.NATIVE), int(Tag.EVALUATION)
_FIRST_TAGGED = 1 << TAG_SHIFT
_FIRST_PYTHON, _BEHIND_PYTHON = Tag.PYTHON << TAG_SHIFT, (Tag.PYTHON + 1) << TAG_SHIFT
_ENTRY, _REASON = int(Tag.ENTRY), int(Tag.REASON)
_ALONE, _DETACHED = int(Tag.ALONE), int(Tag.DETACHED)

_new = tuple.__new__

_ENDS = {end.value: end for end in ChainEnd}
_CUT_SHORT = frozenset({ChainEnd.UNREADABLE, ChainEnd.NO_CODE, ChainEnd.TRUNCATED})
"""Further frames were there, but were not read."""
_NOT_FOUND = frozenset({ChainEnd.NO_STATE, ChainEnd.OTHER_THREAD})
_DEEPEST_AT_EDGE = 2
"""Native frames above a loop that calls functions of its own at its beginning or end: up to 3.10 it
checks the result when its frame is gone, and that asks for an exception."""


class _Evaluation(NamedTuple):
    """Interpreter frames, innermost first; `entry` is 0 if no address says where they belong."""

    frames: list[RawFrame]
    entry: int


class _Loop(NamedTuple):
    """A native frame of an interpreter's loop: its place among these, and its CFA."""

    place: int
    cfa: int


class Chain(NamedTuple):
    """How many interpreter frames there are, and why there are no more."""

    frames: int
    end: ChainEnd


def split_frames(
    words: Words, *, is_loop_certain: bool = True
) -> tuple[list[RawFrame], Chain | None]:
    """Return the frames of a user stack, leaf first; the chain is None if it was not asked for.

    `is_loop_certain` says that each native frame that is marked as one of the interpreter's loop is
    one: only then it is known where frames are missing.
    Words of unknown tags, and reasons of unknown numbers, are left out.
    """
    values: list[int] = words.tolist()
    if not values or max(values) < _FIRST_TAGGED:  # all native, as nearly all stacks are
        return [*values], None
    parts = _Parts()
    parts.take(values)
    if parts.frames:  # the rest of its evaluation is not known
        parts.end_evaluation(0)
    return parts.interleave(is_loop_certain=is_loop_certain), parts.chain


class _Parts:
    """A stack taken apart: native frames, those of an interpreter's loop, and evaluations.

    Attributes:
        frames: those of the evaluation that has not ended.
    """

    def __init__(self) -> None:
        self.frames: list[RawFrame] = []
        self._native: list[int] = []
        self._loops: list[_Loop] = []
        self._evaluations: list[_Evaluation] = []
        self._is_detached = False
        self._found = 0
        self._end: ChainEnd | None = None

    @property
    def _is_read(self) -> bool:
        """Whether the interpreter's frames were looked for."""
        return self._end is not None or self._found > 0

    @property
    def chain(self) -> Chain | None:
        if not self._is_read:
            return Chain(0, ChainEnd.UNKNOWN_INTERPRETER) if self._loops else None
        return Chain(self._found, self._end or ChainEnd.WHOLE)

    def take(self, values: Sequence[int]) -> None:
        """Take all words of a stack. Runs of the two tags that most words have are met here."""
        native, frames = self._native, self.frames
        at, end = 0, len(values)
        while at < end:
            word = values[at]
            if word < _FIRST_TAGGED:
                native.append(word)
                at += 1
            elif _FIRST_PYTHON <= word < _BEHIND_PYTHON and at + 1 < end:
                more = values[at + 1]
                # As PythonFrame(...), in half the time.
                frames.append(_new(PythonFrame, (word & _ADDRESS, more >> 32, more & _LOW)))
                self._found += 1
                at += 2
            else:
                tag = word >> TAG_SHIFT
                size = FRAME_WORDS.get(tag, 1)
                self.add(tag, word & _ADDRESS, values[at + 1 : at + size])
                frames = self.frames
                at += size

    def add(self, tag: int, word: int, more: Sequence[int]) -> None:
        """Take a word, without its tag, and those that belong to it."""
        if tag == _EVALUATION:
            self._loops += [_Loop(len(self._native), cfa) for cfa in more]
            self._native.append(word)
        elif tag == _ENTRY:
            self.end_evaluation(word)
        elif tag == _REASON:
            self._end = _ENDS.get(word)
            if self._end in _CUT_SHORT:
                self.frames.append(self._end.mark)
        elif tag == _ALONE and more:
            self.frames.append(PythonFrame(word, more[0] >> 32, more[0] & _LOW))
            self._found += 1
            self.end_evaluation(0)
        elif tag == _DETACHED:
            self._is_detached = True

    def end_evaluation(self, entry: int) -> None:
        self._evaluations.append(_Evaluation(self.frames, entry))
        self.frames = []

    def interleave(self, *, is_loop_certain: bool) -> list[RawFrame]:
        """Put the frames of each evaluation before the native frame of its loop: that called them.

        Evaluations without a loop are further out than what was walked.
        """
        evaluated, outside = self._assign()
        if is_loop_certain and self._is_read and self._end not in _CUT_SHORT:
            self._mark(evaluated)
        frames: list[RawFrame] = []
        at = 0
        for number, (place, _) in enumerate(self._loops):
            frames += self._native[at:place]
            at = place
            frames += evaluated.get(number, ())
        return [*frames, *self._native[at:], *outside]

    def _assign(self) -> tuple[dict[int, list[RawFrame]], list[RawFrame]]:
        """Return the frames of loops, by their number from the innermost on, and those of none.

        An evaluation without an address is of the loop behind that of the one before it.
        """
        evaluated: dict[int, list[RawFrame]] = {}
        outside: list[RawFrame] = []
        number = self._first_evaluated() - 1
        for frames, entry in self._evaluations:
            if not entry:
                number += 1
            else:
                number = max(number, 0)
                while number < len(self._loops) and entry >= self._loops[number].cfa:
                    number += 1
            if number < len(self._loops):
                evaluated[number] = [*evaluated.get(number, ()), *frames]
            else:
                outside += frames
        return evaluated, outside

    def _first_evaluated(self) -> int:
        """Return the innermost loop that has frames, if no address says it.

        Those further in have none: it is one that is entering its frame, or has left it; or they
        are of an interpreter that the thread's first one called.
        """
        if self._end is not None:
            return 0
        idle = max(0, len(self._loops) - len(self._evaluations))
        return idle if self._is_detached or (idle == 1 and self._is_at_edge(0)) else 0

    def _is_at_edge(self, number: int) -> bool:
        """Return whether a loop may be entering its frame or have left it: it calls little then."""
        return number == 0 and self._loops[0].place <= _DEEPEST_AT_EDGE

    def _mark(self, evaluated: dict[int, list[RawFrame]]) -> None:
        """Let stacks show where loops have no frames, although they have called something."""
        end = self._end if self._end in _NOT_FOUND else ChainEnd.OTHER_STACK
        bare = {
            number
            for number in range(len(self._loops))
            if number not in evaluated and not self._is_at_edge(number)
        }
        for number in bare:
            if number - 1 not in bare:
                evaluated[number] = [end.mark]
        if bare:
            self._end = end


def leaf_address(words: Words) -> Words:
    """Return the address of a user stack's innermost native frame; none if it has no frames."""
    return words[:1] & np.uint64(_ADDRESS)


def with_native(words: Words, addresses: Words, loops: Sequence[tuple[int, int]]) -> Words:
    """Return a user stack with other words of the native walk: a later one of the same tick.

    `loops` are places of frames of the interpreter's loop among the addresses, and their CFAs.
    """
    native: list[int] = []
    at = 0
    for place, cfa in loops:
        native += addresses[at:place].tolist()
        native += (int(addresses[place]) | _EVALUATION << TAG_SHIFT, cfa)
        at = place + 1
    native += addresses[at:].tolist()
    return np.array([*native, *_chain_of(words.tolist())], np.uint64)


def _chain_of(values: list[int]) -> list[int]:
    """Return the words behind those of the native walk."""
    at = 0
    while at < len(values) and values[at] >> TAG_SHIFT in (_NATIVE, _EVALUATION):
        at += FRAME_WORDS.get(values[at] >> TAG_SHIFT, 1)
    return values[at:]
