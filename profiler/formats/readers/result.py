"""What the readers of foreign formats are asked, and what they return."""

import math
from dataclasses import dataclass
from fractions import Fraction

from profiler.text import counted
from storage.profile import Profile, ProfileError
from symbolizer.text import readable

COUNT_LIMIT = 2**62
"""Sum of a file's counts or values; the columns of a profile are 64 bits wide."""

_EXACT_LIMIT = 2**53
"""Counts are scaled up to at most this sum. Beyond it no writer keeps fractions apart, because a
floating-point number has 53 bits."""

_SHOWN_BYTES = 60


class UnsupportedFormatError(ProfileError):
    """A file in a format that is known but not read, or in none that is known."""


class ChoiceError(ProfileError):
    """A file of several events, types or sides, of which an option must choose another one."""


class OneSideError(ChoiceError):
    """A file does not hold both sides of a comparison, of which one is asked for."""


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """Which part of a file is asked for, where it holds several."""

    event: str = ""
    """perf script: the event whose samples are read."""
    sample_type: str = ""
    """pprof: a sample type; speedscope: a unit or the name of a profile."""
    side: str = ""
    """`before` or `after`, for a file that holds both sides of a comparison."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A profile as it was read, and what a user must know about it.

    A profile of type `samples` only counts: nothing in the file says how long a sample is.
    """

    profile: Profile
    format: str
    warnings: tuple[str, ...] = ()
    scale: int = 1
    """Counts were fractions and are multiplied by this number."""


@dataclass(slots=True)
class LeftOut:
    """Lines that are left out: how many, and the first one with the reason."""

    lines: int = 0
    first: str = ""

    def add(self, number: int, line: bytes, reason: str) -> None:
        self.lines += 1
        if not self.first:
            self.first = f"line {number:,} {reason}: {quoted(line)}"

    @property
    def warning(self) -> str:
        first = self.first if self.lines == 1 else f"the first, {self.first}"
        return f"left out {counted(self.lines, 'line')}: {first}"


def quoted(text: bytes) -> str:
    """Return the beginning of foreign text in quotes, with everything invisible escaped."""
    more = "…" if len(text) > _SHOWN_BYTES else ""
    return f"'{readable(text[:_SHOWN_BYTES])}{more}'"


def whole_factor(numbers: list[Fraction], total: Fraction) -> tuple[Fraction, bool]:
    """Return the smallest factor that makes all numbers whole, and whether it does so exactly.

    Numbers with too many digits get the largest power of ten that keeps their sum within 53 bits.
    """
    factor = 1
    for number in numbers:
        factor = math.lcm(factor, number.denominator)
        if factor * total > _EXACT_LIMIT:
            break
    else:
        return Fraction(factor), True
    power = Fraction(1)
    while power * total * 10 <= _EXACT_LIMIT:
        power *= 10
    return power, False


def scale_warning(factor: int, *, is_exact: bool, what: str = "counts") -> str:
    """Say that fractions were made whole."""
    rounded = "" if is_exact else " and rounded"
    return f"its {what} are fractions: all are multiplied by {factor:,}{rounded}, shares are kept"
