"""Text: quantities as people write them."""

import pytest

from profiler.text import accounted, counted, lost_to


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


def test_no_estimate_is_called_an_account_of_every_tick():
    assert accounted({}) == "every tick accounted for"
    assert accounted({"skipped": 1200}) == (
        "the counts add up, but 1,200 of the lost are an estimate (skipped)"
    )
    assert lost_to("map_full", 1, {"skipped"}) == "1 tick lost: map_full"
    assert lost_to("skipped", 2, {"skipped"}) == "about 2 ticks lost: skipped (an estimate)"
