"""Write speedscope's file format: one `sampled` profile that its viewer opens.

The viewer's limits are kept: frames deeper than DEPTH_LIMIT and stacks beyond STACK_LIMIT are
folded into frames of kind `rest` that say so, weights are integers whose sum a JavaScript number
holds, frames have no empty files. The viewer shows a box's name alone, so that of a Python function
begins with its module; its line is the one on which it begins, if boxes are functions. Our own
files carry extra keys, which the schema allows and the viewer ignores: a frame's function without
its module, its module and kind, and the samples of each stack. Files are read by
`profiler.formats.readers.speedscope`.
"""

from collections.abc import Sequence

import orjson

from profiler.flamegraph.flamegraph import DEEPER
from profiler.flamegraph.paths import Rows
from profiler.flamegraph.stacks import Group, Stacks
from storage.columns import Columns
from storage.profile import Window, label_frames
from symbolizer.location import Frame, Kind

DEPTH_LIMIT = 1024
"""The viewer recurses over a stack's depth."""

STACK_LIMIT = 50_000
"""The viewer takes a minute and gigabytes for more. The smallest are folded into one frame."""

WEIGHT_LIMIT = 2**53
"""The largest integer up to which JavaScript numbers are exact; a larger sum counts samples."""

SMALLER = Frame("(smaller stacks)", "", Kind.REST)

_SCHEMA = "https://www.speedscope.app/file-format-schema.json"

_Counted = Sequence[tuple[tuple[Frame, ...], tuple[int, int]]]
"""Stacks, root first, each with its samples and its value."""


def encode(profile: Columns, by: Sequence[str] = ("comm",), *, by_line: bool = False) -> bytes:
    """Write the stacks as one profile, the labels in `by` as their first frames.

    `by_line` tells the source lines of functions apart.
    """
    frames = _Frames(by_line)
    stacks = _largest(profile, label_frames(profile.label_sets, by), frames)
    hosts = " ".join(host.name for host in profile.accounting.hosts[:3])
    name = f"{profile.type} {hosts}".rstrip()
    return _document(name, [(name, profile, stacks)], profile.window, frames)


def encode_pair(
    before: Columns, after: Columns, by: Sequence[str] = ("comm",), *, by_line: bool = False
) -> bytes:
    """Write two profiles over one table of frames, called before and after; this one is shown."""
    heads = label_frames((*before.label_sets, *after.label_sets), by)
    middle = len(before.label_sets)
    frames = _Frames(by_line)
    sides = [
        ("before", before, _largest(before, heads[:middle], frames)),
        ("after", after, _largest(after, heads[middle:], frames)),
    ]
    name = f"{after.type} before and after"
    return _document(name, sides, before.window.union(after.window), frames, active=1)


class _Frames:
    """Frames by what tells them apart in the viewer: two of one key would be two boxes of a name.

    Attributes:
        group: what each stands for, functions or lines of them.
    """

    def __init__(self, by_line: bool) -> None:
        self.group = Group.LINE if by_line else Group.FUNCTION
        self._known: dict[tuple[str, str], Frame] = {}

    def adopt(self, frame: Frame) -> Frame:
        """Return the first frame that the viewer does not tell from this one."""
        return self._known.setdefault(self._identity(frame), frame)

    def record(self, frame: Frame) -> dict[str, str | int]:
        """Return a frame as the file has it."""
        name, file = self._identity(frame)
        record: dict[str, str | int] = {
            "name": name,
            "function": frame.function if frame.function != name else "",
            "kind": frame.kind,
            "module": frame.module,
            "file": file,
            "line": frame.line,
        }
        return {key: value for key, value in record.items() if value}

    def _identity(self, frame: Frame) -> tuple[str, str]:
        name = frame.names(with_line=self.group is Group.LINE)[0]
        return (name or "[unknown]", frame.file or frame.module)


def _largest(profile: Columns, heads: Sequence[Sequence[Frame]], known: _Frames) -> _Counted:
    boxes = Stacks.of([profile], known.group)
    frames = [known.adopt(frame) for frame in boxes.frames]
    stacks: dict[tuple[Frame, ...], tuple[int, int]] = {}
    bounds, words = boxes.lists.offsets.tolist(), boxes.lists.words.tolist()
    rows = Rows.of(profile)
    columns = (rows.labels, rows.stacks, rows.samples, rows.values)
    for labels, stack, samples, value in zip(*(c.tolist() for c in columns), strict=True):
        inner = (frames[word] for word in words[bounds[stack] : bounds[stack + 1]])
        root_first = (*(known.adopt(head) for head in heads[labels]), *inner)
        if len(root_first) > DEPTH_LIMIT:
            root_first = (*root_first[: DEPTH_LIMIT - 1], DEEPER)
        before = stacks.get(root_first, (0, 0))
        stacks[root_first] = (before[0] + samples, before[1] + value)
    largest = sorted(stacks.items(), key=lambda each: (-each[1][1], each[0]))
    if len(largest) > STACK_LIMIT:
        cut = [counts for _, counts in largest[STACK_LIMIT - 1 :]]
        rest = (sum(samples for samples, _ in cut), sum(value for _, value in cut))
        largest = [*largest[: STACK_LIMIT - 1], ((SMALLER,), rest)]
    return largest


def _document(
    name: str,
    sides: Sequence[tuple[str, Columns, _Counted]],
    window: Window,
    frames: _Frames,
    active: int = 0,
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
        "shared": {"frames": [frames.record(frame) for frame in numbers]},
        "profiles": profiles,
        "everflame": {
            "type": profile.type,
            "unit": profile.unit,
            "period_ns": profile.period_ns,
            "window": window,
        },
    }
    return orjson.dumps(document, default=list)
