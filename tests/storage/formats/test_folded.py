"""Folded text as it is written: marks, labels, names that would break a line."""

import pytest

from storage.columns import Columns
from storage.formats import folded
from symbolizer.location import Kind, NamedLocation
from tests.support import profiles as some


def test_lines_are_root_first_with_flamegraph_marks():
    """One line per stack and comm, sorted, kernel, inlined and JIT frames marked."""
    assert folded.encode(Columns.of(some.sample_profile())).decode().splitlines() == [
        "api;main;[libc.so.6] 1",
        "api;main;vfs_read_[k] 2",
        "api;main;work;clamp_[i] 5",
        "api;main;work;clamp_[i];work;clamp_[i];memcpy 3",
        "python3;handler;handler 1",
        "python3;handler;square_[j] 4",
    ]


def test_labels_asked_for_are_the_first_frames():
    """`by` chooses the labels and their order; without any, stacks of all processes add up."""
    profile = some.sample_profile()

    assert folded.encode(Columns.of(profile), by=("service", "pid")).startswith(b"api;77;main;")
    assert folded.encode(Columns.of(profile), by=()).startswith(b"handler;handler 1\n")
    assert folded.encode(Columns.of(profile), by=("pod",)) == folded.encode(
        Columns.of(profile), by=()
    )


def test_a_stack_without_frames_is_still_counted():
    """A line needs a frame, so an empty stack gets one."""
    assert folded.encode(Columns.of(some.build([({}, [], 3)]))) == b"[unknown] 3\n"


def test_no_name_can_break_a_line():
    """Every hostile name becomes one line with one count, which any splitter finds at the end."""
    text = folded.encode(Columns.of(some.hostile_profile())).decode()

    lines = text.removesuffix("\n").split("\n")
    assert len(lines) == len(some.HOSTILE_NAMES)
    assert all(line.count(";") == 2 for line in lines)
    assert sum(int(line.rpartition(" ")[2]) for line in lines) == sum(
        range(1, len(some.HOSTILE_NAMES) + 1)
    )


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("#kworker", rb"\x23kworker 1"),
        (" idle", rb"\x20idle 1"),
        ("thread 12", rb"thread\x2012 1"),
        ("thread 1.5", rb"thread\x201.5 1"),
        ("ends in space ", rb"ends in space\x20 1"),
        ("f(a, 2)", rb"f(a, 2) 1"),
    ],
)
def test_a_line_cannot_be_taken_for_a_comment_or_for_two_counts(name, line):
    """What would be read as something else at a line's start or end is escaped."""
    place = NamedLocation(name, "", Kind.NATIVE, "", 0, 0)

    assert folded.encode(Columns.of(some.build([({}, [place], 1)]))) == line + b"\n"
