"""Folded text: marks, names that would break a line, round trips, damaged lines."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.formats import folded
from storage.profile import Accounting, ProfileError
from symbolizer.location import Frame, Kind, NamedLocation
from tests.support import profiles as some


def test_lines_are_root_first_with_flamegraph_marks():
    """One line per stack and comm, sorted, kernel, inlined and JIT frames marked."""
    assert folded.encode(some.sample_profile()).decode().splitlines() == [
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

    assert folded.encode(profile, by=("service", "pid")).startswith(b"api;77;main;")
    assert folded.encode(profile, by=()).startswith(b"handler;handler 1\n")
    assert folded.encode(profile, by=("pod",)) == folded.encode(profile, by=())


def test_a_stack_without_frames_is_still_counted():
    """A line needs a frame, so an empty stack gets one."""
    assert folded.encode(some.build([({}, [], 3)])) == b"[unknown] 3\n"


@pytest.mark.parametrize(
    "name", ["a;b", "x_[k]", "x_[i]", r"\x3b", "\\;", "\\", r"\x5c\x5cx3b", "a b 3"]
)
def test_names_come_back_as_they_were(name):
    """Separators and what looks like our escapes or marks stay part of the name."""
    place = NamedLocation(name, "", Kind.KERNEL, "", 0, 0)
    profile = some.build([({}, [place, some.HANDLER], 2)])

    decoded = folded.decode(folded.encode(profile))

    assert decoded.frames(0) == (Frame(name, "", Kind.KERNEL),)
    assert decoded.total_samples == 2


@given(some.profiles())
def test_a_second_round_trip_changes_nothing(profile):
    """What folded text can hold, it holds: text, profile and text again are equal."""
    once = folded.encode(profile)
    decoded = folded.decode(once)

    assert folded.encode(decoded, by=()) == once
    assert decoded.total_samples == profile.total_samples


def test_no_name_can_break_a_line():
    """Every hostile name gives one line with one count, which any splitter finds at the end."""
    text = folded.encode(some.hostile_profile()).decode()

    lines = text.removesuffix("\n").split("\n")
    assert len(lines) == len(some.HOSTILE_NAMES)
    assert all(line.count(";") == 2 for line in lines)
    assert sum(int(line.rpartition(" ")[2]) for line in lines) == sum(
        range(1, len(some.HOSTILE_NAMES) + 1)
    )


def test_text_of_other_programs_is_read():
    """Windows line ends, empty lines, spaces in names and repeated stacks occur."""
    profile = folded.decode(b"main;operator new(int) 3\r\n\nmain;operator new(int) 4\nmain 1")

    counts = {tuple(place.function for place in row.stack): row.samples for row in profile.rows()}
    assert counts == {("main", "operator new(int)"): 7, ("main",): 1}
    assert (profile.type, profile.unit) == ("samples", "count")
    assert profile.accounting == Accounting(ticks=8, stored=8)


def test_foreign_names_are_made_readable():
    """Bytes that are not UTF-8 and escape codes do not get any further."""
    profile = folded.decode(b"\xff;\x1b[31mred 1\n")

    assert [place.function for place in profile.locations] == [r"\xff", r"\x1b[31mred"]


def test_an_escaped_line_end_is_not_turned_back_into_one():
    r"""`\x0a` in a file would otherwise put a newline into a name."""
    profile = folded.decode(b"two\\x0alines 1\n")

    assert profile.locations[0].function == r"two\nlines"


@pytest.mark.parametrize(
    "line", [b"main", b"main x", b"main 1.5", b"main -2", b" 3", b"3", b"main 99999999999999999999"]
)
def test_a_damaged_line_is_named_by_its_number(line):
    """The error says where to look."""
    with pytest.raises(ProfileError, match="line 3"):
        folded.decode(b"a 1\nb 2\n" + line + b"\n")


@given(st.binary(max_size=60))
def test_any_bytes_are_a_profile_or_a_profile_error(content):
    """No input surfaces as another kind of error."""
    try:
        folded.decode(content)
    except ProfileError as error:
        assert "line" in str(error)  # noqa: PT017 - both outcomes are fine
