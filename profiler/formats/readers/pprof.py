"""Read pprof of other programs; a file of ours is left to `storage.formats.pprof`.

A pprof file says what its values are: `samples/count`, `cpu/nanoseconds`, `inuse_space/bytes`. One
of them is read:

- the one that `--sample-type` names (`cpu`, or `cpu/nanoseconds` with its unit);
- else CPU time where there is one, whatever it is called (`cpu`, `cpu-time`);
- else what `go tool pprof` shows: the file's default, or the last.

Times become nanoseconds and sizes bytes, exactly. Counts of samples become CPU time by the period
of the file if that is a CPU time, as a file that has only counts is meant.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from google.protobuf import message

from profiler.formats.readers.result import (
    COUNT_LIMIT,
    ChoiceError,
    Reading,
    ReadOptions,
)
from profiler.formats.readers.units import unit_scale
from profiler.text import listed
from storage.formats import pprof
from storage.formats.limits import FILE
from storage.formats.pprof_message import ProfileMessage, check_parts
from storage.profile import ProfileError
from symbolizer.text import readable

NAME = "pprof"

_OURS = b"everflame "
_EMPTY_SAMPLES_LIMIT = 1_000_000
_CPU = re.compile(r"(?:cpu|process_cpu)(?:[-_ ]?(?:time|nanos|nanoseconds))?", re.IGNORECASE)
_SAMPLES = re.compile(r"(?:cpu[-_])?samples?", re.IGNORECASE)
_TYPE = re.compile(r"[^a-z0-9_.-]+")


class _Type(NamedTuple):
    """A sample type: its name, what one of its unit is of the base unit, and that base unit."""

    name: str
    written_unit: str
    scale: int
    unit: str

    @property
    def is_cpu(self) -> bool:
        return self.unit == "nanoseconds" and _CPU.fullmatch(self.name) is not None


@dataclass(frozen=True, slots=True)
class _Choice:
    """Which values are read, and how."""

    value_at: int
    samples_at: int
    """Where the number of samples stands; -1 if nowhere."""
    name: str
    unit: str
    scale: int
    period: int
    """Of one sample, in `unit`; 0 if it is not known."""


def read(content: bytes, options: ReadOptions) -> Reading:
    """Read a decompressed pprof file.

    Raises:
        ChoiceError: `--sample-type` names a type that is not there.
        ProfileError: it is damaged.
        SchemaError: a later version of this program wrote it.
    """
    if content.count(b"\x12\0") > _EMPTY_SAMPLES_LIMIT:
        raise ProfileError(
            f"cannot read pprof: it holds more than {_EMPTY_SAMPLES_LIMIT:,} empty samples"
        )
    check_parts(content, FILE)
    parsed = ProfileMessage()
    try:
        parsed.ParseFromString(content)
    except message.DecodeError:
        raise ProfileError("cannot read pprof: this is not a profile, or a damaged one") from None
    strings = parsed.string_table
    if any(0 < i < len(strings) and strings[i].startswith(_OURS) for i in parsed.comment):
        profile = pprof.decode_checked(content)
        asked = options.sample_type
        if asked and asked not in {profile.type, f"{profile.type}/{profile.unit}"}:
            raise ChoiceError(f"--sample-type {asked}: there is only {profile.type}")
        return Reading(profile, NAME)
    types = [_type(strings, each) for each in parsed.sample_type]
    if not types:
        raise ProfileError("cannot read pprof: it does not say what its values are")
    choice = _choose(parsed, types, options.sample_type)
    _rewrite(parsed, choice, len(types))
    warnings = []
    others = [f"{t.name}/{t.written_unit}" for t in types if t.unit != "count"]
    if len(others) > 1 and not options.sample_type:
        chosen = f"{types[choice.value_at].name}/{types[choice.value_at].written_unit}"
        names = listed([name for name in others if name != chosen], 8)
        warnings.append(f"read {chosen}, not {names} (--sample-type chooses)")
    profile = pprof.decode_checked(parsed.SerializeToString())
    return Reading(profile, NAME, tuple(warnings))


def _type(strings: Sequence[bytes], value_type: Any) -> _Type:
    name, written = _string(strings, value_type.type), _string(strings, value_type.unit)
    scale, unit = unit_scale(written)
    return _Type(name, written, scale, unit)


def _string(strings: Sequence[bytes], number: int) -> str:
    if number == 0:
        return ""
    if not 0 < number < len(strings):
        raise ProfileError(f"cannot read pprof: it has no string number {number}")
    return readable(strings[number])


def _choose(parsed: Any, types: Sequence[_Type], asked: str) -> _Choice:
    value_at = _asked(types, asked) if asked else _default(parsed, types)
    value = types[value_at]
    samples_at = _samples_at(types, value_at)
    period_scale, period_unit = unit_scale(_string(parsed.string_table, parsed.period_type.unit))
    period_name = _string(parsed.string_table, parsed.period_type.type)
    period = max(0, parsed.period) * period_scale
    if period > COUNT_LIMIT:
        raise ProfileError("cannot read pprof: its period is more than 2^62")
    is_of_cpu = period_unit == "nanoseconds" and _CPU.fullmatch(period_name) is not None
    is_count = value_at == samples_at and (_SAMPLES.fullmatch(value.name) or len(types) == 1)
    if is_count:
        if is_of_cpu and period:
            return _Choice(value_at, samples_at, "cpu", "nanoseconds", period, period)
        return _Choice(value_at, samples_at, "samples", "count", 1, 1)
    name = "cpu" if value.is_cpu else _TYPE.sub("_", value.name.lower())[:64].strip("_.")
    if name == "cpu" and value.unit != "nanoseconds":  # `cpu/cores` is not a time
        name = "cpu_" + (_TYPE.sub("_", value.unit.lower())[:32] or "value")
    known = period if period_unit == value.unit else 0
    return _Choice(value_at, samples_at, name or "value", value.unit, value.scale, known)


def _asked(types: Sequence[_Type], asked: str) -> int:
    for i, each in enumerate(types):
        if asked in {each.name, f"{each.name}/{each.written_unit}", f"{each.name}/{each.unit}"}:
            return i
    found = listed([f"{each.name}/{each.written_unit}" for each in types], 16)
    raise ChoiceError(f"--sample-type {asked}: there is no such type in it; there are {found}")


def _default(parsed: Any, types: Sequence[_Type]) -> int:
    cpu = [i for i, each in enumerate(types) if each.is_cpu]
    default = _string(parsed.string_table, parsed.default_sample_type)
    named = [i for i, each in enumerate(types) if default and each.name == default]
    return [*cpu, *named, len(types) - 1][0]


def _samples_at(types: Sequence[_Type], value_at: int) -> int:
    """Return which values count the samples of the chosen one: those called so, or before it."""
    if types[value_at].unit == "count" and _SAMPLES.fullmatch(types[value_at].name):
        return value_at
    counts = [i for i, each in enumerate(types) if each.unit == "count"]
    if types[value_at].unit != "count":
        named = [i for i in counts if _SAMPLES.fullmatch(types[i].name)]
        return [*named, *(i for i in counts if i == value_at - 1), -1][0]
    return value_at


def _rewrite(parsed: Any, choice: _Choice, types: int) -> None:
    """Leave two values to each sample, its number of samples and the chosen one, in base units."""
    period = choice.period if choice.unit == "nanoseconds" else 0
    total = 0
    for sample in parsed.sample:
        if len(sample.value) != types:
            raise ProfileError("cannot read pprof: a sample has too many values or too few")
        value = sample.value[choice.value_at] * choice.scale
        samples = (
            sample.value[choice.samples_at]
            if choice.samples_at >= 0
            else max(1, round(value / choice.period))
            if choice.period > 1 and value
            else int(value != 0)
        )
        if value < 0 or samples < 0:
            raise ProfileError(
                "cannot read pprof: a negative value, so this is a difference, not a profile"
            )
        total += value
        if total > COUNT_LIMIT:
            raise ProfileError("cannot read pprof: its values add up to more than 2^62")
        sample.value[:] = (samples, value)
    strings = parsed.string_table
    texts = {text: len(strings) + i for i, text in enumerate((b"samples", b"count"))}
    strings.extend(texts)
    for text in (choice.name.encode(), choice.unit.encode()):
        if text not in texts:
            texts[text] = len(strings)
            strings.append(text)
    del parsed.sample_type[:]
    name, unit = texts[choice.name.encode()], texts[choice.unit.encode()]
    parsed.sample_type.add(type=texts[b"samples"], unit=texts[b"count"])
    parsed.sample_type.add(type=name, unit=unit)
    parsed.default_sample_type = name
    parsed.period = period
    parsed.period_type.type, parsed.period_type.unit = name, unit
