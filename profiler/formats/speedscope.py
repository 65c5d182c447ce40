"""Write speedscope's file format: one `sampled` profile that its viewer opens.

The viewer's limits are kept: frames deeper than DEPTH_LIMIT and stacks beyond STACK_LIMIT are
folded into frames of kind `rest` that say so, weights are integers whose sum a JavaScript number
holds, frames have no empty files. Python functions have the line on which they begin. Our own files
carry extra keys, which the schema
allows and the viewer ignores: a frame's module and kind, and the samples of each stack. Files are
read by `profiler.formats.readers.speedscope`.
"""

from collections.abc import Sequence

import numpy as np
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
_Shown = dict[tuple[str, str], Frame]
"""Frames by what the viewer identifies them by: two of one key would be two boxes of one name.
Their line is the first of the function, 0 if it is not known."""


def encode(profile: Columns, by: Sequence[str] = ("comm",)) -> bytes:
    """Write the stacks as one profile, the labels in `by` as their first frames."""
    stacks = _largest(profile, label_frames(profile.label_sets, by), {})
    hosts = " ".join(host.name for host in profile.accounting.hosts[:3])
    name = f"{profile.type} {hosts}".rstrip()
    return _document(name, [(name, profile, stacks)], profile.window)


def encode_pair(before: Columns, after: Columns, by: Sequence[str] = ("comm",)) -> bytes:
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


def _largest(profile: Columns, heads: Sequence[Sequence[Frame]], shown: _Shown) -> _Counted:
    boxes = Stacks.of([profile], Group.FUNCTION)
    lines = _first_lines(profile)
    begun = (frame._replace(line=lines.get(frame[:4], 0)) for frame in boxes.frames)
    frames = [shown.setdefault(_identity(frame), frame) for frame in begun]
    stacks: dict[tuple[Frame, ...], tuple[int, int]] = {}
    bounds, words = boxes.lists.offsets.tolist(), boxes.lists.words.tolist()
    rows = Rows.of(profile)
    columns = (rows.labels, rows.stacks, rows.samples, rows.values)
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
        rest = (sum(samples for samples, _ in cut), sum(value for _, value in cut))
        largest = [*largest[: STACK_LIMIT - 1], ((SMALLER,), rest)]
    return largest


def _first_lines(profile: Columns) -> dict[tuple[str, str, Kind, str], int]:
    """Return where Python functions begin, if all that have one name agree on it."""
    texts = profile.texts
    found: dict[tuple[str, str, Kind, str], int] = {}
    places = profile.locations[profile.locations[:, 2] > 0]
    named = profile.named[places[:, 2].astype(np.int64) - 1]
    is_python = np.array([text == Kind.PYTHON.encode() for text in texts.take(named[:, 1])], bool)
    at = np.flatnonzero(is_python)
    columns = (places[at, 0], named[at, 0], named[at, 2])
    names = zip(*([text.decode() for text in texts.take(each)] for each in columns), strict=True)
    for (function, module, file), line in zip(names, named[at, 3].tolist(), strict=True):
        key = (function, module, Kind.PYTHON, file)
        found[key] = line if found.get(key, line) == line else 0
    return found


def _identity(frame: Frame) -> tuple[str, str]:
    return (frame.function or "[unknown]", frame.file or frame.module)


def _document(
    name: str, sides: Sequence[tuple[str, Columns, _Counted]], window: Window, active: int = 0
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


def _frame_record(frame: Frame) -> dict[str, str | int]:
    name, file = _identity(frame)
    record: dict[str, str | int] = {
        "name": name,
        "kind": frame.kind,
        "module": frame.module,
        "file": file,
        "line": frame.line,
    }
    return {key: value for key, value in record.items() if value}
