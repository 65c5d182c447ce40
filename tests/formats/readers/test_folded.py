"""Folded text of other programs: separators, comments, fractions, two counts, odd lines."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiler.formats.readers.result import ChoiceError
from profiler.formats.reading import Reading, ReadOptions, read_bytes
from storage.columns import Columns
from storage.formats import folded
from storage.profile import Accounting, Profile, ProfileError
from symbolizer.location import Frame, Kind, NamedLocation
from tests.support import profiles as some


def decode(content: bytes) -> Profile:
    return read_bytes(content).profile


def counts(reading: Reading) -> dict[tuple[str, ...], int]:
    rows = reading.profile.rows()
    return {tuple(place.function for place in row.stack): row.samples for row in rows}


@pytest.mark.parametrize(
    "name",
    [
        "a;b",
        "x_[k]",
        "x_[i]",
        r"\x3b",
        "\\;",
        "\\",
        r"\x5c\x5cx3b",
        "a b 3",
        "#a",
        " a",
        "a 1 ",
        "7",
    ],
)
@pytest.mark.parametrize("is_leaf", [False, True])
def test_names_come_back_as_they_were(name, is_leaf):
    """Separators and what looks like our escapes or marks stay part of the name."""
    place = NamedLocation(name, "", Kind.KERNEL, "", 0, 0)
    stack = [some.HANDLER, place] if is_leaf else [place, some.HANDLER]

    decoded = decode(folded.encode(Columns.of(some.build([({}, stack, 2)]))))

    assert decoded.frames(int(is_leaf)) == (Frame(name, "", Kind.KERNEL),)
    assert decoded.total_samples == 2


@given(some.profiles())
def test_a_second_round_trip_changes_nothing(profile):
    """What folded text can hold, it holds: text, profile and text again are equal."""
    once = folded.encode(Columns.of(profile))
    decoded = decode(once)

    assert folded.encode(Columns.of(decoded), by=()) == once
    assert decoded.total_samples == profile.total_samples


def test_text_of_other_programs_is_read():
    """Windows line ends, empty lines, spaces in names and repeated stacks occur."""
    reading = read_bytes(b"main;operator new(int) 3\r\n\nmain;operator new(int) 4\nmain 1")

    assert counts(reading) == {("main", "operator new(int)"): 7, ("main",): 1}
    assert (reading.profile.type, reading.profile.unit) == ("samples", "count")
    assert reading.profile.accounting == Accounting(ticks=8, stored=8)
    assert reading.warnings == ()


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r", b"\r\r\n"])
def test_any_line_end_ends_a_line(end):
    r"""Also the lone `\r`, which is no part of a name."""
    lines = (b"# a comment", b"main;f 3", b"main;g", b"main;h 1", b"")

    reading = read_bytes(end.join(lines))

    assert counts(reading) == {("main", "f"): 3, ("main", "h"): 1}
    assert reading.warnings == ("left out 1 line: line 3 does not end in a count: 'main;g'",)


@pytest.mark.parametrize(
    "line",
    [b"a;b\t3", b"a;b 3 ", b"a;b   3", b"a;b 3\t", b"a;b\t 3\r", b"a;b 3.0", b"a;b 3.", b"a;b 3e0",
     b"\xef\xbb\xbfa;b 3"],
)  # fmt: skip
def test_white_space_and_the_form_of_a_count_do_not_matter(line):
    """One stack of two frames, three samples."""
    assert counts(read_bytes(line + b"\n")) == {("a", "b"): 3}


@pytest.mark.parametrize(
    "content",
    [
        b"# mode: wall\nmain;f 3\n",
        b"# other: 3.6.0\n# interval: 10000\n# mode: cpu\n\nmain;f 3\n\n# duration: 1000\n",
        b"#comment without a space 5\nmain;f 3\n",
        b"#\n# ========\nmain;f 3\n#\n# saturation: 0/100\n",
    ],
)
def test_comments_are_no_stacks(content):
    """As some programs write them, before the first stack and after the last."""
    reading = read_bytes(content)

    assert counts(reading) == {("main", "f"): 3}
    assert reading.warnings == ()


AUSTIN = b"# austin: 3.6.0\n# interval: 100\n# mode: %s\n\n%s\n# duration: 1000\n"


@pytest.mark.parametrize(("mode", "type_"), [(b"wall", "wall"), (b"cpu", "cpu")])
def test_the_values_of_austin_are_microseconds(mode, type_):
    """Samples are its interval, at least one a stack."""
    reading = read_bytes(AUSTIN % (mode, b"P1;T1;f 260\nP1;T1;f 140\nP1;T1;g 7\nP1;T1;h 0\n"))

    profile = reading.profile
    assert (profile.type, profile.unit, profile.period_ns) == (type_, "nanoseconds", 100_000)
    assert counts(reading) == {("P1", "T1", "f"): 4, ("P1", "T1", "g"): 1}
    assert profile.total_value == 407_000
    assert profile.accounting == Accounting(ticks=5, stored=5)
    assert reading.warnings == ()


def test_the_values_of_austin_are_bytes_in_memory_mode():
    """Each line is a sample."""
    reading = read_bytes(AUSTIN % (b"memory", b"P1;T1;f 4096\nP1;T1;f 4096\nP1;T1;g 1\n"))

    profile = reading.profile
    assert (profile.type, profile.unit, profile.total_value) == ("space", "bytes", 8193)
    assert counts(reading) == {("P1", "T1", "f"): 2, ("P1", "T1", "g"): 1}


def test_austin_without_an_interval_has_a_sample_a_line():
    """Its default mode is wall time."""
    reading = read_bytes(b"# austin: 3.6.0\nP1;T1;f 260\nP1;T1;f 140\n")

    assert counts(reading) == {("P1", "T1", "f"): 2}
    assert (reading.profile.type, reading.profile.total_value) == ("wall", 400_000)


def test_a_count_without_a_stack_is_a_sample_without_frames():
    """py-spy writes it for a thread of which it saw nothing."""
    reading = read_bytes(b"main;f 3\n 1\n")

    assert counts(reading) == {("main", "f"): 3, (): 1}
    assert folded.encode(Columns.of(reading.profile)) == b"[unknown] 1\nmain;f 3\n"
    assert reading.warnings == ()


def test_a_stack_may_begin_with_the_sign_of_a_comment():
    """Behind the first stack, or where a whole stack follows the sign."""
    assert counts(read_bytes(b"#worker;f 1\n#other 2\n")) == {("#worker", "f"): 1, ("#other",): 2}


@pytest.mark.parametrize(
    ("lines", "expected", "scale"),
    [
        (b"main;f 3.5\nmain;g 1.5\n", {"f": 7, "g": 3}, 2),
        (b"main;f 0.1\nmain;g 0.25\n", {"f": 2, "g": 5}, 20),
        (b"main;f 1e-3\nmain;g 2\n", {"f": 1, "g": 2000}, 1000),
        (b"main;f .5\nmain;f .5\nmain;g 1\n", {"f": 1, "g": 1}, 1),
    ],
)
def test_fractions_are_multiplied_by_one_factor(lines, expected, scale):
    """Their shares stay exact, and the factor is said."""
    reading = read_bytes(lines)

    assert {stack[-1]: count for stack, count in counts(reading).items()} == expected
    assert reading.scale == scale
    assert [f"multiplied by {scale:,}" in warning for warning in reading.warnings] == (
        [True] if scale > 1 else []
    )


def test_fractions_beyond_a_float_are_rounded_and_told():
    """Their shares stay, to fifteen digits."""
    reading = read_bytes(b"main;f 0.30000000000000000004\nmain;g 0.7\n")

    found = counts(reading)
    assert found["main", "f"] / sum(found.values()) == pytest.approx(0.3, abs=1e-14)
    assert "and rounded" in reading.warnings[0]


TWO = b"main;f 10 12\nmain;g 3 0\nmain;f 1 1\n"


def test_two_counts_a_line_are_a_comparison():
    """Never a function `f 10`: the side is asked for."""
    with pytest.raises(ChoiceError, match=r"--side before or --side after .*reads both"):
        read_bytes(TWO)
    assert counts(read_bytes(TWO, ReadOptions(side="before"))) == {
        ("main", "f"): 11,
        ("main", "g"): 3,
    }
    assert counts(read_bytes(TWO, ReadOptions(side="after"))) == {("main", "f"): 13}
    with pytest.raises(ChoiceError, match="one count a line"):
        read_bytes(b"main;f 1\n", ReadOptions(side="after"))


def test_a_name_that_ends_in_a_number_is_a_name():
    """Where the other lines of a file have one count."""
    reading = read_bytes(b"main;thread 1 12\nmain;f 3\nmain;g 3\n")

    assert counts(reading)["main", "thread 1"] == 12


def test_a_line_with_one_count_is_left_out_of_a_comparison():
    """It does not say which side."""
    reading = read_bytes(TWO + b"main;h 5\n", ReadOptions(side="before"))

    assert ("main", "h") not in counts(reading)
    assert reading.warnings == ("left out 1 line: line 4 has one count, not two: 'main;h'",)


def test_both_sides_that_we_write_are_read_again():
    """`diff -o both.folded`."""
    before, after = some.sample_profile(), some.hostile_profile()
    content = folded.encode_pair(Columns.of(before), Columns.of(after))

    for side, profile in (("before", before), ("after", after)):
        reading = read_bytes(content, ReadOptions(side=side))
        assert folded.encode(Columns.of(reading.profile), by=()) == folded.encode(
            Columns.of(profile)
        )


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"main", "does not end in a count: 'main'"),
        (b"main x", "does not end in a count: 'main x'"),
        (b"main -2", "has a negative count: 'main -2'"),
        (b"3", "has no stack: '3'"),
        (b"main 99999999999999999999", "has a count that is too large"),
        (b"main 1e99", "has a count that is too large"),
        (b"main 1." + b"0" * 5_000, "has a count that is too large or too long"),
        (b"\x1b[2J\xff", r"does not end in a count: '\x1b[2J\xff'"),
        (b"x" * 3_000_000, "is longer than 1 MiB: 'xxx"),
    ],
)
def test_an_odd_line_is_left_out_and_named(line, reason):
    """The others are read; how many are left out is said, and of the first which and why."""
    reading = read_bytes(b"a;x 1\nb;x 2\n" + line + b"\nc;x 4\n" + line + b"\n")

    assert reading.profile.total_samples == 7
    (warning,) = reading.warnings
    assert warning.startswith(f"left out 2 lines: the first, line 3 {reason}")
    assert len(warning) < 200


def test_a_first_line_of_any_length_does_not_refuse_the_others():
    """A stack of 20,000 frames is a stack; one that is longer than a line may be is left out."""
    deep = b";".join(b"f%d" % i for i in range(20_000))

    found = counts(read_bytes(deep + b" 3\nmain;g 4\n"))
    assert {len(stack): count for stack, count in found.items()} == {20_000: 3, 2: 4}

    reading = read_bytes(deep * 10 + b" 3\nmain;g 4\n")
    assert counts(reading) == {("main", "g"): 4}
    (warning,) = reading.warnings
    assert warning.startswith("left out 1 line: line 1 is longer than 1 MiB: 'f0;f1;")


def test_a_file_of_odd_lines_only_is_refused():
    """There is nothing to read in it."""
    with pytest.raises(ProfileError, match="cannot read folded text: line 2 has a count"):
        read_bytes(b"# folded\nmain;f 99999999999999999999\n")


def test_counts_beyond_what_a_profile_holds_are_refused():
    """Above 2^62, in many lines."""
    content = b"".join(b"main;f%d 999999999999999999\n" % i for i in range(5))
    with pytest.raises(ProfileError, match="more than 2\\^62"):
        read_bytes(content)


def test_foreign_names_are_made_readable():
    """Bytes that are not UTF-8 and escape codes do not get any further."""
    profile = decode(b"\xff;\x1b[31mred 1\n")

    assert [place.function for place in profile.locations] == [r"\xff", r"\x1b[31mred"]


def test_an_escaped_line_end_is_not_turned_back_into_one():
    r"""`\x0a` in a file would otherwise put a newline into a name."""
    profile = decode(b"two\\x0alines 1\n")

    assert profile.locations[0].function == r"two\nlines"


@pytest.mark.parametrize("content", [b"", b"\n\n", b" \t\r\n", b"# a comment\n", b"main;f 0\n"])
def test_an_empty_file_is_an_empty_profile_with_a_warning(content):
    """Nothing was running is an answer, but seldom the one that was asked for."""
    reading = read_bytes(content)

    assert reading.profile.total_samples == 0
    assert reading.warnings == ("the profile is empty: it contains no samples",)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_profile_or_an_error(content):
    """Nothing else comes out."""
    try:
        profile = decode(b"main;f 1\n" + content)
    except ProfileError:
        return
    assert profile.accounting.stored == profile.total_samples
