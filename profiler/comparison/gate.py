"""Gate: the verdict of a whole comparison, and which changes fail a pipeline.

Only functions that cost more can fail.
"""

import re
from typing import NamedTuple

from profiler.comparison.comparison import Comparison, Function
from profiler.comparison.verdict import Change, NoiseSource

REGRESSION, INCONCLUSIVE = 1, 3
"""Exit codes; the second only with `--strict`."""
DEFAULT_GATE = "relative>=10%,share>=0.5pp"
_WORSE = (Change.MORE, Change.NEW)
_CONDITION = re.compile(r"(relative|share)>=(\d+(?:\.\d+)?)(%|pp)")


class Gate(NamedTuple):
    """A function fails if it grew by at least this ratio and by this part of the total."""

    relative: float
    share: float

    @classmethod
    def parse(cls, text: str) -> "Gate":
        """Read `relative>=10%,share>=0.5pp`, or one of the two.

        Raises:
            ValueError: it is something else.
        """
        least = {"relative": 0.0, "share": 0.0}
        for part in text.replace(" ", "").split(","):
            found = _CONDITION.fullmatch(part)
            if not found or (found[1] == "relative") != (found[3] == "%"):
                raise ValueError(
                    f"cannot read the condition {text!r}: give relative>=PERCENT%,"
                    f" share>=POINTSpp or both, as in {DEFAULT_GATE!r}"
                )
            least[found[1]] = float(found[2]) / 100
        return cls(**least)

    def fails(self, function: Function) -> bool:
        is_worse = function.change in _WORSE
        grown = function.change == Change.NEW or function.relative[0] >= self.relative
        return is_worse and grown and function.share[0] >= self.share


class Verdict(NamedTuple):
    word: str
    exit_code: int
    is_provisional: bool = False
    """More data make it final, or withdraw it."""


def verdict_of(found: Comparison, gate: Gate, *, is_strict: bool = False) -> Verdict:
    """Return the verdict; if `is_strict`, one that is not final exits as one that is missing."""
    word = _word(found, gate)
    exit_code = REGRESSION if word == "regression" else 0
    if is_strict and (word == "inconclusive" or found.is_provisional):
        exit_code = INCONCLUSIVE
    return Verdict(word, exit_code, found.is_provisional)


def _word(found: Comparison, gate: Gate) -> str:
    if found.source == NoiseSource.NONE:
        return "inconclusive"
    changes = {function.change for function in found.functions}
    if any(map(gate.fails, found.functions)):
        return "regression"
    if changes & {Change.LESS, Change.GONE} and not changes & set(_WORSE):
        return "improvement"
    return "unchanged"
