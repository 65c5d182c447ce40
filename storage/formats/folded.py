r"""Folded text: one line per stack, root first, `frame;frame;frame COUNT` (Brendan Gregg's format).

An edge format that many tools read and write. It keeps the names and the sample counts; modules,
addresses, files, times and the accounting are lost. Kernel, inlined and JIT frames carry the marks
`_[k]`, `_[i]`, `_[j]` of flamegraph.pl, all others look native when they are read back.

`;` and line ends inside a name are written as `\x3b`, `\x0a`, `\x0d`, and so is a name's own ending
that looks like a mark (`\x5b` for its bracket). A backslash is escaped (`\x5c`) only where the text
after it would otherwise be read as one of these.
"""

import itertools
import re
from collections.abc import Sequence

from storage.profile import Accounting, Profile, ProfileBuilder, ProfileError, Window, label_frames
from symbolizer.location import Frame, Kind, NamedLocation, unnamed
from symbolizer.text import readable

COUNT_LIMIT = 2**62
"""Sum of a file's counts; the columns of a profile are 64 bits wide."""

_MARKS = {Kind.KERNEL: "_[k]", Kind.INLINED: "_[i]", Kind.JIT: "_[j]"}
_KINDS = {mark: kind for kind, mark in _MARKS.items()}
_TO_ESCAPE = re.compile(r"[;\n\r]|\\(?=x(?:3b|0a|0d|5b|5c))|(?<=_)\[(?=[kij]\]\Z)")
_ESCAPED = re.compile(r"\\x(3b|0a|0d|5b|5c)")


def encode(profile: Profile, by: Sequence[str] = ("comm",)) -> bytes:
    """Write one line per stack, sorted, with the labels in `by` as its first frames.

    The number is that of samples. A label that no row has is left out.
    """
    counts = _counts(profile, label_frames(profile.label_sets, by))
    return "".join(f"{line} {count}\n" for line, count in sorted(counts.items())).encode()


def encode_pair(before: Profile, after: Profile, by: Sequence[str] = ("comm",)) -> bytes:
    """Write one line per stack of either, with two numbers: samples before and after.

    As difffolded.pl writes it, and flamegraph.pl reads it; numbers are not normalized.
    """
    heads = label_frames((*before.label_sets, *after.label_sets), by)
    first = _counts(before, heads[: len(before.label_sets)])
    second = _counts(after, heads[len(before.label_sets) :])
    lines = sorted(first.keys() | second.keys())
    return "".join(
        f"{line} {first.get(line, 0)} {second.get(line, 0)}\n" for line in lines
    ).encode()


def _counts(profile: Profile, heads_frames: Sequence[Sequence[Frame]]) -> dict[str, int]:
    """Return the samples of each line, which begins with the frames of its labels."""
    counts: dict[str, int] = {}
    shown = [
        ";".join(_escape(frame) for frame in reversed(profile.frames(number)))
        for number in range(len(profile.locations))
    ]
    heads = [[_escape(frame) for frame in frames] for frames in heads_frames]
    words = profile.stack_locations.tolist()
    bounds = profile.stack_offsets.tolist()
    stacks = [
        ";".join([shown[word] for word in words[start:end]])
        for start, end in itertools.pairwise(bounds)
    ]
    nothing = _escape(unnamed("", Kind.NATIVE))
    columns = (profile.row_labels, profile.row_stacks, profile.row_samples)
    for labels, stack, samples in zip(*(c.tolist() for c in columns), strict=True):
        line = ";".join([*heads[labels], stacks[stack] or nothing])
        counts[line] = counts.get(line, 0) + samples
    return counts


def decode(content: bytes) -> Profile:
    """Read folded text. Its counts are both the samples and the value, in samples.

    Raises:
        ProfileError: a line is damaged; the message says which.
    """
    builder = ProfileBuilder(period_ns=1, type="samples", unit="count")
    total = 0
    for number, line in enumerate(content.split(b"\n"), start=1):
        stack, _, digits = line.rstrip(b"\r").rpartition(b" ")
        if not stack and not digits:
            continue
        if not digits.isdigit() or len(digits) > 18:
            raise ProfileError(f"cannot read folded text: line {number} does not end in a count")
        if not stack:
            raise ProfileError(f"cannot read folded text: line {number} has no stack")
        total += int(digits)
        if total > COUNT_LIMIT:
            raise ProfileError(f"cannot read folded text: line {number} brings it over 2^62")
        frames = (_unescape(name) for name in stack.split(b";"))
        root_first = [
            builder.location(NamedLocation(*frame[:4], 0, 0), (frame,)) for frame in frames
        ]
        if int(digits):
            builder.add((), root_first, int(digits))
    return builder.build(Window(0, 0), Accounting(ticks=total, stored=total))


def _escape(frame: Frame) -> str:
    text = _TO_ESCAPE.sub(lambda match: f"\\x{ord(match[0]):02x}", frame.function)
    return text + _MARKS.get(frame.kind, "")


def _unescape(text: bytes) -> Frame:
    name = readable(text)
    kind = _KINDS.get(name[-4:], Kind.NATIVE)
    if kind is not Kind.NATIVE:
        name = name[:-4]
    restored = _ESCAPED.sub(lambda match: chr(int(match[1], 16)), name)
    # A line end inside a name was escaped by us; it must not come back as one.
    return Frame(readable(restored.encode()), "", kind)
