"""Text: quantities as people write them."""

import pytest

from profiler.text import counted


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
