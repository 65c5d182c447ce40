"""Frames of a user stack: its words taken apart, with interpreter frames where they belong.

The native walk and the chain of interpreter frames come one after the other. Each evaluation, a
run of interpreter frames, belongs to the native frame of the interpreter's loop in which it
happens: the word that ends the evaluation is an address inside that native frame.
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bpf.interpreters import ChainEnd
from bpf.samples import CUT_OFF, FRAME_WORDS, TAG_SHIFT, PythonFrame, RawFrame, Tag, Words

_ADDRESS, _LOW = (1 << TAG_SHIFT) - 1, (1 << 32) - 1

_NATIVE, _EVALUATION, _PYTHON = int(Tag.NATIVE), int(Tag.EVALUATION), int(Tag.PYTHON)
_ENTRY, _REASON, _ALONE = int(Tag.ENTRY), int(Tag.REASON), int(Tag.ALONE)

_ENDS = {end.value: end for end in ChainEnd}


class _Evaluation(NamedTuple):
    """Interpreter frames, innermost first; `entry` is 0 if no address says where they belong."""

    frames: list[RawFrame]
    entry: int


class Chain(NamedTuple):
    """How many interpreter frames there are, and why there are no more."""

    frames: int
    end: ChainEnd


def split_frames(words: Words, *, is_whole: bool) -> tuple[list[RawFrame], Chain | None]:
    """Return the frames of a user stack, leaf first; the chain is None if it was not asked for.

    `is_whole` says that the native walk has come to the outermost frame. Words of unknown tags, and
    reasons of unknown numbers, are left out.
    """
    values: list[int] = words.tolist()
    if not values or not max(values) >> TAG_SHIFT:  # all native, as nearly all stacks are
        return [*values], None
    parts = _Parts()
    at = 0
    while at < len(values):
        tag = values[at] >> TAG_SHIFT
        size = FRAME_WORDS.get(tag, 1)
        parts.add(tag, values[at] & _ADDRESS, values[at + 1 : at + size])
        at += size
    if parts.frames:  # the rest of its evaluation is not known
        parts.end_evaluation(0)
    return parts.interleave(is_whole=is_whole), parts.chain


class _Parts:
    """A stack taken apart: native frames, those of an interpreter's loop, and evaluations.

    Attributes:
        frames: those of the evaluation that has not ended.
    """

    def __init__(self) -> None:
        self.frames: list[RawFrame] = []
        self._native: list[int] = []
        self._loops: list[tuple[int, int]] = []
        """Places in `_native`, and CFAs."""
        self._evaluations: list[_Evaluation] = []
        self._found = 0
        self._end: ChainEnd | None = None

    @property
    def chain(self) -> Chain | None:
        if self._end is None and not self._found:
            return Chain(0, ChainEnd.UNKNOWN_INTERPRETER) if self._loops else None
        return Chain(self._found, self._end or ChainEnd.WHOLE)

    def add(self, tag: int, word: int, more: Sequence[int]) -> None:
        """Take a word, without its tag, and those that belong to it."""
        if tag == _NATIVE:
            self._native.append(word)
        elif tag == _EVALUATION:
            self._loops += [(len(self._native), cfa) for cfa in more]
            self._native.append(word)
        elif tag == _ENTRY:
            self.end_evaluation(word)
        elif tag == _REASON:
            self._end = _ENDS.get(word)
            if self._end is ChainEnd.TRUNCATED:
                self.frames.append(CUT_OFF)
        elif tag in (_PYTHON, _ALONE) and more:
            self.frames.append(PythonFrame(word, more[0] >> 32, more[0] & _LOW))
            self._found += 1
            if tag == _ALONE:
                self.end_evaluation(0)

    def end_evaluation(self, entry: int) -> None:
        self._evaluations.append(_Evaluation(self.frames, entry))
        self.frames = []

    def interleave(self, *, is_whole: bool) -> list[RawFrame]:
        """Put the frames of each evaluation before the native frame of its loop: that called them.

        Evaluations without an address follow each other as the loops do. Then the innermost loop
        may have none: it has not entered its frame yet, or has left it, which shows where the stack
        is whole. Evaluations without a loop are further out than what was walked.
        """
        evaluations = deque(self._evaluations)
        is_ordered = bool(evaluations) and not evaluations[0].entry
        idle = len(self._loops) - len(evaluations) if is_ordered and is_whole else 0
        frames: list[RawFrame] = []
        at = 0
        for number, (place, cfa) in enumerate(self._loops):
            frames += self._native[at:place]
            at = place
            if is_ordered:
                if evaluations and number >= idle:
                    frames += evaluations.popleft().frames
            else:
                while evaluations and 0 < evaluations[0].entry < cfa:
                    frames += evaluations.popleft().frames
        frames += self._native[at:]
        for evaluation in evaluations:
            frames += evaluation.frames
        return frames


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
