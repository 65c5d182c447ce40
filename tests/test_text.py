"""Text: quantities as people write them."""

import pytest

from profiler.text import accounted, counted


@pytest.mark.parametrize(
    ("number", "nouns", "text"),
    [
        (0, ("sample",), "0 samples"),
        (1, ("sample",), "1 sample"),
        (1234, ("sample",), "1,234 samples"),
        (1, ("process", "processes"), "1 process"),
        (2, ("process", "processes"), "2 processes"),
    ],
)
def test_one_of_a_thing_is_singular(number, nouns, text):
    assert counted(number, *nouns) == text


def test_what_was_not_counted_is_no_account_of_every_tick():
    assert accounted(0) == "every tick accounted for"
    assert accounted(2).startswith("the counts add up, but ticks that the kernel skipped")
    assert accounted(2).endswith("could not be counted in 2 windows")
