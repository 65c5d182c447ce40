r"""Folded text: one line per stack, root first, `frame;frame;frame COUNT` (Brendan Gregg's format).

An edge format that many tools read and write. It keeps the names and the sample counts; modules,
addresses, files, times and the accounting are lost, but for the modules of Python functions, which
are part of the name (`package.module.Class.method`). Kernel, inlined and JIT frames carry the marks
`_[k]`, `_[i]`, `_[j]` of flamegraph.pl, all others look native when they are read back. Files of
any program are read by `profiler.formats.readers.folded`.

`;` and line ends inside a name are written as `\x3b`, `\x0a`, `\x0d`, and so is what would be read
as something else: a name's own ending that looks like a mark (`\x5b` for its bracket), a `#` at the
start of a line (`\x23`, else a comment), white space before a number at the end of a stack (`\x20`,
else a second count), white space at a line's start or a stack's end. A backslash is escaped
(`\x5c`) only where the text after it would otherwise be read as one of these.
"""

import itertools
import re
from collections.abc import Iterator, Sequence

import numpy as np

from storage.columns import Columns, ShownFrames
from storage.profile import label_frames
from symbolizer.location import Frame, Kind, unnamed
from symbolizer.text import readable

_MARKS = {Kind.KERNEL: "_[k]", Kind.INLINED: "_[i]", Kind.JIT: "_[j]"}
_KINDS = {mark: kind for kind, mark in _MARKS.items()}
_TO_ESCAPE = re.compile(r"[;\n\r]|\\(?=x(?:20|23|3b|0a|0d|5b|5c))|(?<=_)\[(?=[kij]\]\Z)")
_ESCAPED = re.compile(r"\\x(20|23|3b|0a|0d|5b|5c)")
_TO_ESCAPE_IN_LINE = re.compile(r"\A[# ]| (?=[0-9.][0-9.eE+-]*\Z)| \Z")


def encode(profile: Columns, by: Sequence[str] = ("comm",), *, by_line: bool = False) -> bytes:
    """Write one line per stack, sorted, with the labels in `by` as its first frames.

    The number is that of samples. A label that no row has is left out. `by_line` tells the source
    lines of functions apart, as `function:line`.
    """
    counts = _counts(profile, label_frames(profile.label_sets, by), by_line=by_line)
    return "".join(f"{line} {count}\n" for line, count in sorted(counts.items())).encode()


def encode_pair(
    before: Columns, after: Columns, by: Sequence[str] = ("comm",), *, by_line: bool = False
) -> bytes:
    """Write one line per stack of either, with two numbers: samples before and after.

    As difffolded.pl writes it, and flamegraph.pl reads it; numbers are not normalized.
    """
    heads = label_frames((*before.label_sets, *after.label_sets), by)
    first = _counts(before, heads[: len(before.label_sets)], by_line=by_line)
    second = _counts(after, heads[len(before.label_sets) :], by_line=by_line)
    lines = sorted(first.keys() | second.keys())
    return "".join(
        f"{line} {first.get(line, 0)} {second.get(line, 0)}\n" for line in lines
    ).encode()


def _counts(
    profile: Columns, heads_frames: Sequence[Sequence[Frame]], *, by_line: bool
) -> dict[str, int]:
    """Return the samples of each line, which begins with the frames of its labels."""
    counts: dict[str, int] = {}
    shown = profile.shown_frames()
    names = [_escape(frame.names(with_line=by_line)[0], frame.kind) for frame in _frames(shown)]
    locations = [
        ";".join(reversed(names[start:end]))
        for start, end in itertools.pairwise(shown.offsets.tolist())
    ]
    heads = [[_escape(frame.function, frame.kind) for frame in frames] for frames in heads_frames]
    words = profile.stack_words.tolist()
    bounds = profile.stack_offsets.tolist()
    stacks = [
        ";".join([locations[word] for word in words[start:end]])
        for start, end in itertools.pairwise(bounds)
    ]
    nothing = _escape(unnamed("", Kind.NATIVE).function, Kind.NATIVE)
    rows, samples_of_rows = profile.rows.tolist(), profile.counts[:, 0].tolist()
    for (labels, stack), samples in zip(rows, samples_of_rows, strict=True):
        line = ";".join([*heads[labels], stacks[stack] or nothing])
        line = _TO_ESCAPE_IN_LINE.sub(lambda match: f"\\x{ord(match[0]):02x}", line)
        counts[line] = counts.get(line, 0) + samples
    return counts


def _frames(shown: ShownFrames) -> Iterator[Frame]:
    used = np.unique(shown.table[:, 2])
    kinds = {i: Kind(each.decode()) for i, each in zip(used, shown.texts.take(used), strict=True)}
    texts = (shown.texts.take(shown.table[:, i]) for i in (0, 1, 3))
    numbers = (shown.table[:, i].tolist() for i in (2, 4))
    for function, module, file, kind, line in zip(*texts, *numbers, strict=True):
        yield Frame(function.decode(), module.decode(), kinds[kind], file.decode(), line)


def frame_of(text: bytes) -> Frame:
    """Return the frame that a name in a line stands for, without its escapes and its mark."""
    name = readable(text)
    kind = _KINDS.get(name[-4:], Kind.NATIVE)
    if kind is not Kind.NATIVE:
        name = name[:-4]
    restored = _ESCAPED.sub(lambda match: chr(int(match[1], 16)), name)
    # A line end inside a name was escaped by us; it must not come back as one.
    return Frame(readable(restored.encode()), "", kind)


def _escape(function: str, kind: Kind) -> str:
    text = _TO_ESCAPE.sub(lambda match: f"\\x{ord(match[0]):02x}", function)
    return text + _MARKS.get(kind, "")
