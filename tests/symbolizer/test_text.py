import pytest
from hypothesis import given
from hypothesis import strategies as st

from symbolizer.text import READABLE_LIMIT, readable


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (b"main", "main"),
        ("größe<T>".encode(), "größe<T>"),
        (b"a\nb\x00c\x1b[31m", r"a\nb\x00c\x1b[31m"),
        (b"\xff\xfe", r"\xff\xfe"),
        (b"\xed\xa0\x80", r"\xed\xa0\x80"),
        ("a\u202eb\u200bc\u2028d\u2029e\ufefff".encode(), r"a\u202eb\u200bc\u2028d\u2029e\ufefff"),
        ("a\u3164b\u034f".encode(), r"a\u3164b\u034f"),
        (b"", ""),
    ],
)
def test_invisible_characters_are_escaped(name, expected):
    """What is readable stays; everything else is shown as an escape."""
    assert readable(name) == expected


def test_long_names_are_cut_and_stay_different():
    """Two names that differ only beyond the limit stay different."""
    one, other = readable(b"x" * 100_000 + b"1"), readable(b"x" * 100_000 + b"2")

    assert len(one) == READABLE_LIMIT
    assert one != other


@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda t: t.encode("utf-8", "replace")))
def test_result_is_one_printable_line(name):
    """For any bytes, the result is printable, encodes to UTF-8 and is bounded."""
    text = readable(name)

    assert text.isprintable()
    assert len(text.encode()) <= 4 * READABLE_LIMIT
