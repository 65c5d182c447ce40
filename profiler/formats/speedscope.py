"""speedscope's file format: one `sampled` profile that its viewer opens, and reading such files.

The viewer's limits are kept: frames deeper than DEPTH_LIMIT and stacks beyond STACK_LIMIT are
folded into frames of kind `rest` that say so, weights are integers whose sum a JavaScript number
holds, frames have neither empty files nor lines. Our own files carry extra keys, which the schema
allows and the viewer ignores: a frame's module and kind, and the samples of each stack.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import orjson

from profiler.flamegraph.flamegraph import DEEPER
from profiler.flamegraph.paths import Group, Stacks
from storage.profile import (
    Accounting,
    Labels,
    Profile,
    ProfileBuilder,
    ProfileError,
    Window,
    label_frames,
)
from symbolizer.location import Frame, Kind, NamedLocation
from symbolizer.text import readable

DEPTH_LIMIT = 1024
"""The viewer recurses over a stack's depth."""

STACK_LIMIT = 50_000
"""The viewer takes a minute and gigabytes for more. The smallest are folded into one frame."""

WEIGHT_LIMIT = 2**53
"""The largest integer up to which JavaScript numbers are exact; a larger sum counts samples."""

COUNT_LIMIT = 2**62
"""Sum of a file's weights; the columns of a profile are 64 bits wide."""

SMALLER = Frame("(smaller stacks)", "", Kind.REST)

_SCHEMA = "https://www.speedscope.app/file-format-schema.json"
_NS_PER_UNIT = {
    "nanoseconds": 1,
    "microseconds": 1_000,
    "milliseconds": 1_000_000,
    "seconds": 1_000_000_000,
}


_Counted = Sequence[tuple[tuple[Frame, ...], tuple[int, int]]]
"""Stacks, root first, each with its samples and its value."""
_Shown = dict[tuple[str, str], Frame]
"""Frames that the viewer cannot tell apart are one: else it draws two boxes of one name."""


def encode(profile: Profile, by: Sequence[str] = ("comm",)) -> bytes:
    """Write the stacks as one profile, the labels in `by` as their first frames."""
    stacks = _largest(profile, label_frames(profile.label_sets, by), {})
    hosts = " ".join(host.name for host in profile.accounting.hosts[:3])
    name = f"{profile.type} {hosts}".rstrip()
    return _document(name, [(name, profile, stacks)], profile.window)


def encode_pair(before: Profile, after: Profile, by: Sequence[str] = ("comm",)) -> bytes:
    """Write two profiles over one table of frames, called before and after; this one is shown."""
    heads = label_frames((*before.label_sets, *after.label_sets), by)
    middle = len(before.label_sets)
    shown: _Shown = {}
    sides = [
        ("before", before, _largest(before, heads[:middle], shown)),
        ("after", after, _largest(after, heads[middle:], shown)),
    ]
    name = f"{after.type} before and after"
    return _document(name, sides, before.window.union(after.window), active=1)


def _largest(profile: Profile, heads: Sequence[Sequence[Frame]], shown: _Shown) -> _Counted:
    boxes = Stacks.of(profile, Group.FUNCTION)
    frames = [shown.setdefault(_identity(frame), frame) for frame in boxes.frames]
    stacks: dict[tuple[Frame, ...], tuple[int, int]] = {}
    bounds, words = boxes.offsets.tolist(), boxes.boxes.tolist()
    columns = (profile.row_labels, profile.row_stacks, profile.row_samples, profile.row_values)
    for labels, stack, samples, value in zip(*(c.tolist() for c in columns), strict=True):
        inner = (frames[word] for word in words[bounds[stack] : bounds[stack + 1]])
        root_first = (*(shown.get(_identity(head), head) for head in heads[labels]), *inner)
        if len(root_first) > DEPTH_LIMIT:
            root_first = (*root_first[: DEPTH_LIMIT - 1], DEEPER)
        before = stacks.get(root_first, (0, 0))
        stacks[root_first] = (before[0] + samples, before[1] + value)
    largest = sorted(stacks.items(), key=lambda each: (-each[1][1], each[0]))
    if len(largest) > STACK_LIMIT:
        cut = [counts for _, counts in largest[STACK_LIMIT - 1 :]]
        sums = (sum(samples for samples, _ in cut), sum(value for _, value in cut))
        largest = [*largest[: STACK_LIMIT - 1], ((SMALLER,), sums)]
    return largest


def _identity(frame: Frame) -> tuple[str, str]:
    return (frame.function or "[unknown]", frame.file or frame.module)


def _document(
    name: str, sides: Sequence[tuple[str, Profile, _Counted]], window: Window, active: int = 0
) -> bytes:
    profile = sides[active][1]
    numbers: dict[Frame, int] = {}
    unit = profile.unit if profile.unit in {"nanoseconds", "bytes"} else "none"
    is_too_large = any(
        sum(value for _, (_, value) in stacks) > WEIGHT_LIMIT for _, _, stacks in sides
    )
    profiles = []
    for title, _, stacks in sides:
        samples = [
            [numbers.setdefault(frame, len(numbers)) for frame in root_first]
            for root_first, _ in stacks
        ]
        counts = [count for _, (count, _) in stacks]
        weights = counts if is_too_large else [value for _, (_, value) in stacks]
        profiles.append(
            {
                "type": "sampled",
                "name": title,
                "unit": "none" if is_too_large else unit,
                "startValue": 0,
                "endValue": sum(weights),
                "samples": samples,
                "weights": weights,
                "counts": counts,
            }
        )
    document = {
        "$schema": _SCHEMA,
        "exporter": "everflame",
        "name": name,
        "activeProfileIndex": active,
        "shared": {"frames": [_frame_record(frame) for frame in numbers]},
        "profiles": profiles,
        "everflame": {
            "type": profile.type,
            "unit": profile.unit,
            "period_ns": profile.period_ns,
            "window": window,
        },
    }
    return orjson.dumps(document, default=list)


def _frame_record(frame: Frame) -> dict[str, str]:
    name, file = _identity(frame)
    record = {"name": name, "kind": frame.kind, "module": frame.module, "file": file}
    return {key: value for key, value in record.items() if value}


def decode(content: bytes) -> Profile:
    """Read a file of speedscope's format, ours or that of another program.

    Profiles of the same unit as the active one are added up; where there are several, as one per
    thread, their names become the label `thread`. Times become nanoseconds.

    Raises:
        ProfileError: the file is damaged or is something else.
    """
    try:
        document = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise ProfileError(f"cannot read speedscope: this is not JSON ({error})") from error
    try:
        return _Decoder(document).decode()
    # What is missing or of a wrong type anywhere in the document surfaces as one of these.
    except (KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
        raise ProfileError(f"cannot read speedscope: the file is damaged ({error!r})") from error


class _Decoder:
    def __init__(self, document: Any) -> None:  # parsed JSON may be anything
        self._frames = [_parse_frame(record) for record in document["shared"]["frames"]]
        profiles = document["profiles"]
        active = profiles[document.get("activeProfileIndex") or 0]
        unit = active["unit"]
        self._profiles = [profile for profile in profiles if profile["unit"] == unit]
        self._scale = _NS_PER_UNIT.get(unit, 1)
        ours = document.get("everflame", {})
        guess = ("cpu", "nanoseconds") if unit in _NS_PER_UNIT else ("samples", "count")
        if unit == "bytes":
            guess = ("space", "bytes")
        self._window = Window(*map(_whole, ours.get("window", (0, 0))))
        # A sum too large for the viewer was written as samples; then the value is that count.
        is_value = unit == guess[1] or unit == ours.get("unit")
        self._builder = ProfileBuilder(
            period_ns=max(1, _whole(ours.get("period_ns", 1))),
            type=_text(ours.get("type", guess[0])) if is_value else guess[0],
            unit=guess[1] if is_value or not ours else "count",
        )
        self._stored = 0
        self._total = 0

    def decode(self) -> Profile:
        for profile in self._profiles:
            labels: Labels = ()
            if len(self._profiles) > 1:
                labels = (("thread", _text(profile.get("name", ""))),)
            rows = _sampled(profile) if profile["type"] == "sampled" else _evented(profile)
            for root_first, weight, samples in rows:
                self._add(labels, root_first, weight, samples)
        accounting = Accounting(ticks=self._stored, stored=self._stored)
        return self._builder.build(self._window, accounting)

    def _add(self, labels: Labels, root_first: Sequence[int], weight: float, samples: int) -> None:
        if any(index < 0 for index in root_first):
            raise ProfileError("cannot read speedscope: a frame number is negative")
        frames = [self._frames[index] for index in root_first]
        value = _whole(weight * self._scale)
        if value == 0:
            return
        self._stored, self._total = self._stored + samples, self._total + value
        if max(self._stored, self._total) > COUNT_LIMIT:
            raise ProfileError("cannot read speedscope: its weights add up to more than 2^62")
        numbers = [
            self._builder.location(NamedLocation(*frame[:4], 0, frame.line), (frame,))
            for frame in frames
        ]
        self._builder.add(labels, numbers, samples, value)


def _parse_frame(record: Any) -> Frame:  # parsed JSON may be anything
    kind = record.get("kind", "")
    file, module = _text(record.get("file") or ""), _text(record.get("module") or "")
    return Frame(
        function=_text(record["name"]),
        module=module,
        kind=Kind(kind) if kind in set(Kind) else Kind.NATIVE,
        file="" if file == module else file,
        line=_whole(record.get("line") or 0),
    )


def _sampled(profile: Any) -> Iterable[tuple[Sequence[int], float, int]]:
    stacks, weights = profile["samples"], profile["weights"]
    counts = profile.get("counts", [1] * len(stacks))
    if not len(stacks) == len(weights) == len(counts):
        raise ProfileError("cannot read speedscope: samples and weights differ in number")
    for stack, weight, count in zip(stacks, weights, counts, strict=True):
        yield stack, weight, _whole(count)


def _evented(profile: Any) -> Iterable[tuple[Sequence[int], float, int]]:
    """Turn calls and returns into the time between them."""
    stack: list[int] = []
    before = profile["startValue"]
    for event in profile["events"]:
        if event["at"] < before:
            raise ProfileError("cannot read speedscope: events go back in time")
        yield tuple(stack), event["at"] - before, 1
        before = event["at"]
        if event["type"] == "O":
            stack.append(event["frame"])
        elif not stack or stack.pop() != event["frame"]:
            raise ProfileError("cannot read speedscope: a frame ends that is not the innermost")


def _whole(number: Any) -> int:
    if not isinstance(number, int | float) or not 0 <= number < COUNT_LIMIT:
        raise ProfileError(f"cannot read speedscope: {number!r} is not a count or a duration")
    return round(number)


def _text(text: Any) -> str:
    if not isinstance(text, str):
        raise ProfileError(f"cannot read speedscope: {text!r} is not a name")
    return readable(text.encode())
