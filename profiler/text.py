"""Text for terminals: widths in cells of a fixed-width font, cutting, quantities with units."""

import os
import sys
import unicodedata
from collections.abc import Sequence
from typing import TextIO

from symbolizer.location import Frame
from symbolizer.text import readable

ELLIPSIS = "…"

_TIMES = ((1e9, "s"), (1e6, "ms"), (1e3, "µs"), (1, "ns"))
_SIZES = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))


def cells(text: str) -> int:
    """Return how many cells a fixed-width font takes for it: 2 for wide characters, 0 for marks."""
    if text.isascii():
        return len(text)
    return sum(map(_cells_of, text))


def fit(text: str, width: int) -> str:
    """Cut text to at most `width` cells; what was cut ends in an ellipsis."""
    if cells(text) <= width:
        return text
    if width <= 0:
        return ""
    kept, room = [], width - 1
    for character in text:
        room -= _cells_of(character)
        if room < 0:
            break
        kept.append(character)
    return "".join(kept) + ELLIPSIS


def fit_name(frame: Frame, width: int, *, with_line: bool = False) -> str:
    """Return the longest name of a frame that fits; the shortest one is cut if none does."""
    names = frame.names(with_line=with_line)
    return next((name for name in names if cells(name) <= width), fit(names[-1], width))


def pad(text: str, width: int) -> str:
    """Cut or fill text with spaces to exactly `width` cells."""
    cut = fit(text, width)
    return cut + " " * (width - cells(cut))


def in_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a line for each row; every column is as wide as its widest text."""
    widths = [max(map(cells, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(pad(text, width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def path_text(path: str) -> str:
    """Return a path to be shown: what is invisible in it or no UTF-8 is escaped."""
    return readable(os.fsencode(path))


def quantity(value: int, unit: str) -> str:
    """Return a value with three digits or more and the unit that suits its size."""
    scales = {"nanoseconds": _TIMES, "bytes": _SIZES}.get(unit)
    if scales is None:
        return f"{value:,} {'' if unit == 'count' else unit}".rstrip()
    for scale, name in scales:
        if value >= scale:
            scaled = value / scale
            digits = 0 if scale == 1 or scaled >= 100 else 1 if scaled >= 10 else 2
            return f"{scaled:,.{digits}f} {name}"
    return "0 s" if unit == "nanoseconds" else "0 B"


def percent(part: int, whole: int) -> str:
    if whole == 0:
        return "0 %"
    share = 100 * part / whole
    return f"{share:.{1 if share < 99.95 else 0}f} %"


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return `1 sample`, `1,234 samples`; `plural` where an `s` does not make it."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def accounted(uncounted: int) -> str:
    """Return the sentence about a profile whose counts add up.

    `uncounted`: in how many windows the kernel did not let one count the ticks that it skipped.
    """
    if not uncounted:
        return "every tick accounted for"
    return (
        "the counts add up, but ticks that the kernel skipped beside other BPF programs could not"
        f" be counted in {counted(uncounted, 'window')}"
    )


def lost_to(cause: str, number: int) -> str:
    """Return `12 ticks lost: map_full`."""
    return f"{counted(number, 'tick')} lost: {cause}"


def limit_of(error: RecursionError | MemoryError) -> str:
    """Say which limit input from outside has met: Python's own words name none."""
    if isinstance(error, MemoryError):
        return "that takes more memory than there is"
    return "it is nested too deeply"


def listed(names: Sequence[str], most: int) -> str:
    """Return `a, b`, and of more than `most` names how many more there are: `a, b and 3 more`."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more:,} more" if more > 0 else "")


def _cells_of(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in {"Mn", "Me", "Cf"}:
        return 0
    return 2 if unicodedata.east_asian_width(character) in {"W", "F"} else 1


def tell(*lines: str) -> None:
    """Write lines to standard error at once: who waits for one of them must not wait longer."""
    print("\n".join(lines), file=sys.stderr, flush=True)


class StatusLine:
    """A line that is rewritten in place; only on a terminal."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._is_shown = False

    def show(self, text: str) -> None:
        if self._out.isatty():
            self._write(text)
            self._is_shown = True

    def clear(self) -> None:
        """Remove the line, so that other lines can follow."""
        if self._is_shown:
            self._write("")
            self._is_shown = False

    def _write(self, text: str) -> None:
        self._out.write(f"\r\x1b[K{text}")
        self._out.flush()
