"""Read speedscope's file format, of its viewer and of the programs that write it.

A file holds one or several profiles over one table of frames. A `sampled` profile is a list of
stacks with a weight each, an `evented` one calls and returns. Profiles of the same kind of unit
as the one that the viewer shows first are added up; where they are several, as one per thread,
their names become the label `thread`.

- Weights in a unit of time become nanoseconds of CPU time, weights in bytes stay bytes.
- Weights without a unit (`none`) are counts of samples. Fractions are multiplied by one factor.
- How many samples a weight stands for is not said, so a sample is the largest time (or size) that
  divides all weights: shares stay exact whether they are counted in samples or in time.

Our own files say more (`profiler.formats.speedscope`), which is kept.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import orjson

from profiler.formats.readers.result import (
    COUNT_LIMIT,
    ChoiceError,
    OneSideError,
    Reading,
    ReadOptions,
    scale_warning,
    whole_factor,
)
from profiler.formats.readers.units import unit_scale
from profiler.text import counted, listed
from storage.profile import Accounting, Labels, Profile, ProfileBuilder, ProfileError, Window
from symbolizer.location import Frame, Kind, NamedLocation
from symbolizer.text import readable

NAME = "speedscope"

_GUESSES = {"nanoseconds": "cpu", "bytes": "space", "count": "samples"}
"""What is measured, by its unit."""

_MEMORY = (100 * 1024 * 1024, 60)
"""Parsed JSON may take so many bytes, plus so many for each byte on disk."""
_LIST_BYTES, _RECORD_BYTES, _VALUE_BYTES = 64, 232, 40
_FRAME_BYTES = 16
"""Of a frame in a stack that calls and returns describe: a file of them names each call only once,
and a recursion of 100,000 calls has stacks of 5 billion frames."""

_Number = int | Fraction
_Stack = tuple[int, ...]
_Rows = dict[tuple[Labels, _Stack], tuple[_Number, int]]
"""The weight and our own count of samples (0 in files of others) by labels and stack."""


def parse(content: bytes, disk_bytes: int) -> Any:  # parsed JSON may be anything
    """Return what a JSON text holds.

    Raises:
        ProfileError: it is damaged, or would take far more memory than a file of its size.
    """
    memory = (
        content.count(b"[") * _LIST_BYTES
        + content.count(b"{") * _RECORD_BYTES
        + content.count(b",") * _VALUE_BYTES
    )
    if memory > _MEMORY[0] + _MEMORY[1] * disk_bytes:
        raise ProfileError(
            f"cannot read JSON: {disk_bytes:,} bytes would take {memory >> 20:,} MiB of memory"
        )
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise ProfileError(
            "cannot read JSON: it is damaged or cut off"
            f" at line {error.lineno:,}, column {error.colno:,}"
        ) from None


def is_speedscope(document: Any) -> bool:
    """Return whether it is speedscope's, which may be damaged where it says so itself."""
    if not isinstance(document, dict):
        return False
    if "speedscope" in str(document.get("$schema")):
        return True
    return isinstance(document.get("profiles"), list) and isinstance(document.get("shared"), dict)


def read(document: Any, options: ReadOptions, disk_bytes: int) -> Reading:
    """Read a parsed file, which has so many bytes on disk.

    Raises:
        ChoiceError: `--sample-type` or `--side` names what is not there.
        ProfileError: it is damaged, or would take far more memory than a file of its size.
    """
    base_bytes, per_byte = _MEMORY
    return _Reader(document, options, base_bytes + per_byte * disk_bytes).read()


@dataclass(frozen=True, slots=True)
class _Part:
    """One of the profiles of a file."""

    record: dict[str, Any]
    where: str
    name: str
    written_unit: str
    scale: int
    unit: str


class _Reader:
    def __init__(self, document: dict[str, Any], options: ReadOptions, memory_bytes: int) -> None:
        self._frames_left = memory_bytes // _FRAME_BYTES
        self._frames = [
            _parse_frame(record, f"shared.frames[{i}]")
            for i, record in enumerate(_list(_member(document, "shared", "it"), "frames", "shared"))
        ]
        self._ours = document.get("everflame")
        self._warnings: list[str] = []
        parts = [_part(each, i) for i, each in enumerate(_list(document, "profiles", "it"))]
        if not parts:
            raise ProfileError("cannot read speedscope: it holds no profile")
        active = document.get("activeProfileIndex")
        if not isinstance(active, int) or not 0 <= active < len(parts):
            active = 0
        self._parts = self._choose(parts, parts[active], options)

    def _choose(
        self, parts: Sequence[_Part], active: _Part, options: ReadOptions
    ) -> Sequence[_Part]:
        is_pair = self._ours is not None and [part.name for part in parts] == ["before", "after"]
        if is_pair and options.side:
            return [part for part in parts if part.name == options.side]
        if is_pair:
            raise ChoiceError(
                "it holds two profiles, before and after: choose one with --side before or"
                " --side after (everflame diff FILE reads both)"
            )
        if options.side:
            raise OneSideError(f"--side {options.side}: it does not hold two sides")
        asked = options.sample_type
        chosen = [part for part in parts if part.unit == active.unit]
        if asked:
            chosen = [part for part in parts if part.name == asked] or [
                part
                for part in parts
                if asked in {part.written_unit, part.unit, _GUESSES[part.unit]}
            ]
            if not chosen:
                found = listed(sorted({part.written_unit for part in parts}), 8)
                raise ChoiceError(
                    f"--sample-type {asked}: there is no such unit or profile in it;"
                    f" there are {found}"
                )
            unit = chosen[0].unit
            chosen = [part for part in chosen if part.unit == unit]
        elif len(chosen) < len(parts):
            others = sorted({part.written_unit for part in parts if part.unit != active.unit})
            self._warnings.append(
                f"left out {counted(len(parts) - len(chosen), 'profile')} in {listed(others, 8)}"
                " (--sample-type chooses)"
            )
        return chosen

    def read(self) -> Reading:
        rows: _Rows = {}
        for part in self._parts:
            labels: Labels = (("thread", part.name),) if len(self._parts) > 1 else ()
            if part.record.get("type") == "evented":
                calls = _evented(part)
                self._frames_left -= calls.depths
                if self._frames_left < 0:
                    raise ProfileError(
                        "cannot read speedscope: its stacks are too deep and too many for a file"
                        f" of its size: {calls.depths:,} frames"
                    )
                pieces = calls.stacks()
            else:
                pieces = _sampled(part)
            for stack, weight, samples in pieces:
                value, count = rows.get((labels, stack), (0, 0))
                rows[labels, stack] = (value + weight, count + samples)
        if self._ours is not None:
            return Reading(self._our_profile(rows, self._ours), NAME, tuple(self._warnings))
        return self._foreign(rows)

    def _our_profile(self, rows: _Rows, ours: Any) -> Profile:
        """Build a profile from one of our own files, which says what the viewer does not need."""
        unit = self._parts[0].unit
        type_, written = _member(ours, "type", "everflame"), _member(ours, "unit", "everflame")
        if self._parts[0].written_unit not in ("none", written):
            raise ProfileError("cannot read speedscope: its unit is not that of everflame's record")
        # A sum too large for the viewer was written as samples; then the value is that count.
        is_count = unit == "count" and written in {"nanoseconds", "bytes"}
        builder = ProfileBuilder(
            max(1, _whole(ours.get("period_ns", 1), "everflame.period_ns")),
            type="samples" if is_count else _text(type_, "everflame.type"),
            unit="count" if is_count else _text(written, "everflame.unit"),
        )
        bounds = ours.get("window", (0, 0))
        if not isinstance(bounds, Sequence) or len(bounds) != 2:
            raise ProfileError("cannot read speedscope: everflame.window is not an interval")
        window = Window(*(_whole(bound, "everflame.window") for bound in bounds))
        whole = {key: (round(weight), samples) for key, (weight, samples) in rows.items() if weight}
        return self._build(builder, whole, window)

    def _foreign(self, rows: _Rows) -> Reading:
        unit = self._parts[0].unit
        factor, is_exact = Fraction(1), True
        if unit != "nanoseconds":
            weights = [each for each, _ in rows.values() if isinstance(each, Fraction)]
            sum_ = Fraction(sum(weight for weight, _ in rows.values()))
            if weights:
                factor, is_exact = whole_factor(weights, sum_)
        if factor != 1 or not is_exact:
            warning = scale_warning(int(factor), is_exact=is_exact, what="weights")
            self._warnings.append(warning)
        values = {key: round(weight * factor) for key, (weight, _) in rows.items()}
        period = 1 if unit == "count" else math.gcd(*values.values()) or 1
        builder = ProfileBuilder(period, _GUESSES[unit], unit)
        whole = {key: (value, value // period) for key, value in values.items() if value}
        profile = self._build(builder, whole, Window(0, 0))
        return Reading(profile, NAME, tuple(self._warnings), int(factor))

    def _build(
        self,
        builder: ProfileBuilder,
        rows: Mapping[tuple[Labels, _Stack], tuple[int, int]],
        window: Window,
    ) -> Profile:
        total = sum(value for value, _ in rows.values())
        stored = sum(samples for _, samples in rows.values())
        if max(total, stored) > COUNT_LIMIT:
            raise ProfileError("cannot read speedscope: its weights add up to more than 2^62")
        numbers = [
            builder.location(NamedLocation(*frame[:4], 0, frame.line), (frame,))
            for frame in self._frames
        ]
        for (labels, stack), (value, samples) in rows.items():
            if stack and not 0 <= min(stack) <= max(stack) < len(numbers):
                raise ProfileError(
                    "cannot read speedscope: a stack names a frame that is not in shared.frames"
                )
            builder.add(labels, [numbers[frame] for frame in stack], samples, value)
        return builder.build(window, Accounting(ticks=stored, stored=stored))


def _part(record: Any, number: int) -> _Part:
    where = f"profiles[{number}]"
    if not isinstance(record, dict):
        raise ProfileError(f"cannot read speedscope: {where} is not a profile")
    kind = record.get("type", "sampled")
    if kind not in ("sampled", "evented"):
        raise ProfileError(f"cannot read speedscope: {where} is neither sampled nor evented")
    written = _text(record.get("unit") or "none", f"{where}.unit")
    scale, unit = unit_scale(written)
    if unit not in _GUESSES:
        raise ProfileError(f"cannot read speedscope: the unit {written!r} of {where} is not known")
    name = _text(record.get("name") or "", f"{where}.name")
    return _Part(record, where, name, written, scale, unit)


def _sampled(part: _Part) -> Iterator[tuple[_Stack, _Number, int]]:
    stacks = _list(part.record, "samples", part.where)
    weights = part.record.get("weights")
    weights = [1] * len(stacks) if weights is None else _list(part.record, "weights", part.where)
    counts = part.record.get("counts")
    counts = [0] * len(stacks) if counts is None else _list(part.record, "counts", part.where)
    if not len(stacks) == len(weights) == len(counts):
        raise ProfileError(
            f"cannot read speedscope: samples and weights of {part.where} differ in number"
        )
    for i, (stack, weight, count) in enumerate(zip(stacks, weights, counts, strict=True)):
        if not isinstance(stack, list) or not all(type(frame) is int for frame in stack):
            where = f"{part.where}.samples[{i}]"
            raise ProfileError(f"cannot read speedscope: {where} is not a list of frame numbers")
        value = _scaled(_number(weight, f"{part.where}.weights[{i}]"), part)
        yield tuple(stack), value, _whole(count, f"{part.where}.counts[{i}]")


class _Calls:
    """The stacks of calls and returns, each with its time.

    A stack is a number, as is the one of its caller: an event takes the same time at any depth.
    """

    def __init__(self) -> None:
        self.stack = 0
        """That of the calls that have not returned; 0 is the empty one."""
        self._callers = [0]
        self._frames = [-1]
        self._depths = [0]
        self._called: dict[tuple[int, int], int] = {}
        self._times: dict[int, _Number] = {}

    def call(self, frame: int) -> None:
        caller = self.stack
        self.stack = self._called.setdefault((caller, frame), len(self._frames))
        if self.stack == len(self._frames):
            self._callers.append(caller)
            self._frames.append(frame)
            self._depths.append(self._depths[caller] + 1)

    def end(self, frame: int) -> bool:
        """Return from the innermost call; False if that is of another frame."""
        is_innermost = self._frames[self.stack] == frame and self.stack > 0
        self.stack = self._callers[self.stack]
        return is_innermost

    def add(self, time: _Number) -> None:
        self._times[self.stack] = self._times.get(self.stack, 0) + time

    @property
    def depths(self) -> int:
        """Return how many frames all stacks with a time have together."""
        return sum(self._depths[stack] for stack in self._times)

    def stacks(self) -> Iterator[tuple[_Stack, _Number, int]]:
        for stack, time in self._times.items():
            leaf_first: list[int] = []
            at = stack
            while at:
                leaf_first.append(self._frames[at])
                at = self._callers[at]
            yield tuple(reversed(leaf_first)), time, 0


def _evented(part: _Part) -> _Calls:
    """Turn calls and returns into the time between them."""
    calls = _Calls()
    before: _Number | None = None
    for i, event in enumerate(_list(part.record, "events", part.where)):
        where = f"{part.where}.events[{i}]"
        at = _number(_member(event, "at", where), f"{where}.at", is_signed=True)
        if before is not None and at < before:
            raise ProfileError(f"cannot read speedscope: {where} goes back in time")
        if before is not None and at > before and calls.stack:  # no time passes outside of calls
            calls.add(_scaled(at - before, part))
        before = at
        frame = _member(event, "frame", where)
        if type(frame) is not int:
            raise ProfileError(f"cannot read speedscope: {where}.frame is not a frame number")
        if event.get("type") not in ("O", "C"):
            raise ProfileError(
                f"cannot read speedscope: the type of {where} is neither O (open) nor C (close)"
            )
        if event["type"] == "O":
            calls.call(frame)
        elif not calls.end(frame):
            raise ProfileError(
                f"cannot read speedscope: {where} ends a frame that is not the innermost"
            )
    end = part.record.get("endValue")
    if calls.stack and before is not None and end is not None:
        at = _number(end, f"{part.where}.endValue", is_signed=True)
        if at > before:
            calls.add(_scaled(at - before, part))
    return calls


def _scaled(number: _Number, part: _Part) -> _Number:
    scaled = number * part.scale
    # A fraction of a nanosecond is noise of the number's form.
    return round(scaled) if part.unit == "nanoseconds" else scaled


def _parse_frame(record: Any, where: str) -> Frame:  # parsed JSON may be anything
    kind = record.get("kind", "") if isinstance(record, dict) else ""
    name = _text(_member(record, "name", where), f"{where}.name")
    file = _text(record.get("file") or "", f"{where}.file")
    module = _text(record.get("module") or "", f"{where}.module")
    function = _text(record.get("function") or "", f"{where}.function")
    return Frame(
        function=function or name,
        module=module,
        kind=Kind(kind) if isinstance(kind, str) and kind in set(Kind) else Kind.NATIVE,
        file="" if file == module else file,
        line=_whole(record.get("line") or 0, f"{where}.line"),
    )


def _member(record: Any, name: str, where: str) -> Any:
    if not isinstance(record, dict) or name not in record:
        raise ProfileError(f"cannot read speedscope: {where} has no {name}")
    return record[name]


def _list(record: Any, name: str, where: str) -> list[Any]:
    found = _member(record, name, where)
    if not isinstance(found, list):
        raise ProfileError(f"cannot read speedscope: {name} of {where} is not a list")
    return found


def _number(number: Any, where: str, *, is_signed: bool = False) -> _Number:
    """Return a number exactly as its digits say."""
    if type(number) is int and (number >= 0 or is_signed) and abs(number) < COUNT_LIMIT:
        return number
    if type(number) is float and (number >= 0 or is_signed) and abs(number) < COUNT_LIMIT:
        return int(number) if number.is_integer() else Fraction(repr(number))
    raise ProfileError(f"cannot read speedscope: {where} is not a count or a duration")


def _whole(number: Any, where: str) -> int:
    return round(_number(number, where))


def _text(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise ProfileError(f"cannot read speedscope: {where} is not a text")
    return readable(text.encode("utf-8", "backslashreplace"))
