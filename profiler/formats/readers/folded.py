r"""Read folded text: one stack a line, root first, then a count (`frame;frame;frame COUNT`).

Written by the stackcollapse scripts, inferno, py-spy, austin, async-profiler, rbspy and others, and
read as flamegraph.pl reads it, with these rules for what they write differently:

- spaces or tabs stand before and may stand after the count;
- lines that begin with `#` before the first stack are comments, and so is `# …` anywhere;
- counts may be fractions (`3.5`, `1e-3`): all counts of a file are then multiplied by one factor;
- a count without a stack is a sample without frames, as py-spy writes them;
- two counts on most lines are before and after, as difffolded.pl writes them;
- `_[k]`, `_[i]`, `_[j]` at the end of a name mark kernel, inlined and JIT frames; `\x3b` and what
  else `storage.formats.folded` escapes is restored.
- austin's values are not counts: its header says whether they are microseconds of wall or CPU
  time, or bytes, and at which interval it sampled.

A line that ends in no count is left out and named.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

from profiler.formats.readers.result import (
    COUNT_LIMIT,
    ChoiceError,
    LeftOut,
    OneSideError,
    Reading,
    ReadOptions,
    scale_warning,
    whole_factor,
)
from profiler.formats.readers.source import LINE_LIMIT_BYTES
from storage.formats.folded import frame_of
from storage.profile import Accounting, ProfileBuilder, ProfileError, Window
from symbolizer.location import NamedLocation

NAME = "folded text"

_NUMBER = rb"\d+(?:\.\d*)?(?:[eE][-+]?\d{1,2})?|\.\d+"
_LINE = re.compile(rb"(?P<stack>|.*[^ \t])[ \t]+(?P<count>" + _NUMBER + rb")[ \t]*", re.DOTALL)
_NEGATIVE = re.compile(rb".*[^ \t][ \t]+-\d[\d.]*[ \t]*", re.DOTALL)
_LONGEST_COUNT = 18
"""Digits of a count; more do not fit a column."""
_LONGEST_NUMBER = 400
"""Digits of a fraction: the longest float that is written out, 1e-323, has fewer."""
_COMMENT = re.compile(rb"#(?:[ \t=]|$)")

_STACK_BYTES, _FRAME_BYTES = 300, 32
"""Memory for a distinct stack and for each of its frames, besides its text."""

_HEADER = re.compile(rb"#[ \t]*(?P<name>austin|mode|interval):[ \t]*(?P<value>\S+)[ \t]*")
_NS_PER_US = 1_000

_Number = int | Fraction


class _Measure(NamedTuple):
    """What the numbers of a file are, where its header says so."""

    type: str
    unit: str
    scale: int
    """Of one in the file, in `unit`."""
    interval: int
    """Of one sample, as the file counts; 0 if it is not known."""


def _measure(header: Mapping[bytes, bytes]) -> _Measure | None:
    """Return what austin's header says; None if the file is not austin's."""
    if b"austin" not in header:
        return None
    mode = header.get(b"mode", b"wall")
    if mode == b"memory":
        return _Measure("space", "bytes", 1, 0)
    digits = header.get(b"interval", b"")
    interval = int(digits) if digits.isdigit() and len(digits) <= _LONGEST_COUNT else 0
    type_ = "cpu" if mode == b"cpu" else "wall"
    return _Measure(type_, "nanoseconds", _NS_PER_US, interval)


def is_folded(lines: Sequence[bytes], *, is_strict: bool = False) -> bool:
    """Return whether most of these lines end in a count, or one is a stack of several frames.

    Strictly, there is such a line, and no other.
    """
    stacks = others = 0
    for line in lines[:-1] or lines:  # the last one may be cut
        if not line.strip() or line.startswith(b"#"):
            continue
        match = _LINE.fullmatch(line.rstrip(b"\r"))
        if match is None:
            others += 1
        else:
            stacks += 1 + 10 * (b";" in match["stack"])
    return stacks > 0 == others if is_strict else stacks >= others


class _Counts:
    """What the lines of a file add up to, before it is known whether it has one side or two."""

    def __init__(self) -> None:
        self.left_out = LeftOut()
        self._totals: dict[bytes, list[_Number]] = {}
        """By the line without its last count: the sum of that count, the number of lines, and
        the first of them."""
        self._header: dict[bytes, bytes] = {}
        self._lines = 0
        self._lines_of_two = 0

    def read(self, lines: Iterable[bytes], keep: Callable[[int], None]) -> None:
        for number, line in enumerate(lines, start=1):
            if not line.strip() or self._is_comment(line):
                continue
            count = _count_of(match["count"]) if (match := _LINE.fullmatch(line)) else None
            if match is None or count is None or len(line) > LINE_LIMIT_BYTES:
                self.left_out.add(number, line, _why_not(line, is_count=match is not None))
                continue
            stack = match["stack"]
            totals = self._totals.get(stack)
            if totals is None:
                keep(len(stack) + _STACK_BYTES + _FRAME_BYTES * stack.count(b";"))
                totals = self._totals[stack] = [0, 0, number]
            totals[0] += count
            totals[1] += 1
            self._lines += 1
            self._lines_of_two += stack[-1:].isdigit() and _LINE.fullmatch(stack) is not None

    def _is_comment(self, line: bytes) -> bool:
        if not line.startswith(b"#"):
            return False
        if not self._totals and (match := _HEADER.fullmatch(line)):
            self._header.setdefault(match["name"], match["value"])
        if _COMMENT.match(line):
            return True
        return not self._totals and not (b";" in line and _LINE.fullmatch(line))

    @property
    def has_two_sides(self) -> bool:
        return 2 * self._lines_of_two > self._lines

    @property
    def measure(self) -> _Measure | None:
        return _measure(self._header)

    def lines_of(self, stack: bytes) -> int:
        """Return how many lines have this stack."""
        return int(self._totals[stack][1]) if stack in self._totals else 1

    def of_one_side(self) -> dict[bytes, _Number]:
        return {stack: total for stack, (total, *_) in self._totals.items()}

    def of_side(self, *, is_after: bool) -> dict[bytes, _Number]:
        """Return the counts of the first column or of the second."""
        counts: dict[bytes, _Number] = {}
        for line, (after, lines, first) in self._totals.items():
            match = _LINE.fullmatch(line)
            before = _count_of(match["count"]) if match else None
            if match is None or before is None:
                self.left_out.add(int(first), line, "has one count, not two")
                continue
            count = after if is_after else before * lines
            counts[match["stack"]] = counts.get(match["stack"], 0) + count
        return counts


def read(lines: Iterable[bytes], options: ReadOptions, keep: Callable[[int], None]) -> Reading:
    """Read folded text as a profile of type `samples`, or of what austin's header says.

    `keep` counts the memory that it takes.

    Raises:
        ChoiceError: it holds two sides and none is chosen, or the other way round.
        ProfileError: no line of it can be read, or its counts add up to too much.
    """
    found = _Counts()
    found.read(lines, keep)
    if found.has_two_sides:
        if not options.side:
            raise ChoiceError(
                "it has two counts a line, before and after: choose one with --side before or"
                " --side after (everflame diff FILE reads both)"
            )
        counts = found.of_side(is_after=options.side == "after")
    elif options.side:
        raise OneSideError(f"--side {options.side}: it has one count a line, not two")
    else:
        counts = found.of_one_side()
    if found.left_out.lines and not counts:
        raise ProfileError(f"cannot read folded text: {found.left_out.first}")
    if (measure := found.measure) is not None:
        return _as_measured(counts, found, measure)
    left_out = found.left_out
    del found  # frees its sums before the profile is built, where memory is at its peak
    return _as_reading(counts, left_out)


def _as_measured(counts: dict[bytes, _Number], found: _Counts, measure: _Measure) -> Reading:
    """Return a profile of time or bytes, in which a sample is an interval of the profiler.

    Without an interval each line is a sample.
    """
    period_ns = max(1, measure.interval * measure.scale)
    builder = ProfileBuilder(period_ns, measure.type, measure.unit)
    numbers: dict[bytes, int] = {}
    stored = total = 0
    for stack, count in counts.items():
        value = round(count * measure.scale)
        if not value:
            continue
        interval = measure.interval
        samples = max(1, round(count / interval)) if interval else found.lines_of(stack)
        stored += samples
        total += value
        if total > COUNT_LIMIT:
            raise ProfileError("cannot read folded text: its values add up to more than 2^62")
        _add(builder, numbers, stack, samples, value)
    warnings = (found.left_out.warning,) if found.left_out.lines else ()
    profile = builder.build(Window(0, 0), Accounting(ticks=stored, stored=stored))
    return Reading(profile, NAME, warnings)


def _as_reading(counts: dict[bytes, _Number], left_out: LeftOut) -> Reading:
    warnings = [left_out.warning] if left_out.lines else []
    sum_ = Fraction(sum(counts.values()))
    fractions = [each for each in counts.values() if isinstance(each, Fraction)]
    factor, is_exact = whole_factor(fractions, sum_) if fractions else (Fraction(1), True)
    if factor != 1 or not is_exact:
        warnings.append(scale_warning(int(factor), is_exact=is_exact))
    builder = ProfileBuilder(period_ns=1, type="samples", unit="count")
    numbers: dict[bytes, int] = {}
    total = 0
    for stack, count in counts.items():
        samples = round(count * factor) if fractions else int(count)
        total += samples
        if total > COUNT_LIMIT:
            raise ProfileError("cannot read folded text: its counts add up to more than 2^62")
        if samples:
            _add(builder, numbers, stack, samples)
    profile = builder.build(Window(0, 0), Accounting(ticks=total, stored=total))
    return Reading(profile, NAME, tuple(warnings), int(factor))


def _add(
    builder: ProfileBuilder,
    numbers: dict[bytes, int],
    stack: bytes,
    samples: int,
    value: int | None = None,
) -> None:
    names = stack.split(b";") if stack else []
    builder.add((), [_location(builder, numbers, name) for name in names], samples, value)


def _location(builder: ProfileBuilder, numbers: dict[bytes, int], name: bytes) -> int:
    number = numbers.get(name)
    if number is None:
        frame = frame_of(name)
        number = builder.location(NamedLocation(*frame[:4], 0, 0), (frame,))
        numbers[name] = number
    return number


def _count_of(digits: bytes) -> _Number | None:
    """Return a count, or None for one that is too large or has too many digits."""
    if digits.isdigit():
        return int(digits) if len(digits) <= _LONGEST_COUNT else None
    if len(digits) > _LONGEST_NUMBER:
        return None
    number = Fraction(digits.decode())
    if number > 10**_LONGEST_COUNT:
        return None
    return int(number) if number.denominator == 1 else number


def _why_not(line: bytes, *, is_count: bool) -> str:
    if len(line) > LINE_LIMIT_BYTES:
        return f"is longer than {LINE_LIMIT_BYTES >> 20} MiB"
    if is_count:
        return "has a count that is too large or too long"
    if _NEGATIVE.fullmatch(line):
        return "has a negative count"
    if re.fullmatch(_NUMBER, line.strip()):
        return "has no stack"
    return "does not end in a count"
