"""Perf maps: which lines count, however they are cut into pieces."""

import hypothesis.strategies as st
from hypothesis import given

from symbolizer.runtimes.perf_map import LONGEST_LINE_BYTES, PerfMap

LINES = b"""7f00 10 JS:*node /srv/a.js:1:2
0x7f20 0x10 void jdk.Class.method(int)
7F40 1F py::python:/srv/a.py

no numbers here
7f60 zz neither
7f70 10
12345678901234567 10 too large
7f00 8 reused
"""


def read(*parts: bytes) -> PerfMap:
    perf_map = PerfMap()
    for part in parts:
        perf_map.feed(part)
    return perf_map


def test_lines_of_all_runtimes_are_read_and_others_passed_over():
    """Numbers have 0x or not; the last line for an address holds."""
    found = read(LINES).find(range(0x7F00, 0x7F80))

    assert found == [
        (0x7F00, 0x7F08, b"reused"),
        (0x7F08, 0x7F10, b"JS:*node /srv/a.js:1:2"),
        (0x7F20, 0x7F30, b"void jdk.Class.method(int)"),
        (0x7F40, 0x7F5F, b"py::python:/srv/a.py"),
    ]


@given(st.lists(st.integers(0, len(LINES)), max_size=8).map(sorted))
def test_it_does_not_matter_how_a_map_is_cut(cuts):
    parts = [LINES[a:b] for a, b in zip([0, *cuts], [*cuts, len(LINES)], strict=True)]

    assert read(*parts).find(range(0x7F00, 0x7F80)) == read(LINES).find(range(0x7F00, 0x7F80))


def test_a_line_counts_when_it_is_whole():
    """Its name may go on."""
    perf_map = read(b"7f00 10 begun")
    before = perf_map.find([0x7F00])

    perf_map.feed(b"AndEnded\n")

    assert before == []
    assert perf_map.find([0x7F00]) == [(0x7F00, 0x7F10, b"begunAndEnded")]


def test_a_line_that_is_too_long_is_passed_over_and_the_next_one_read():
    endless = b"x" * LONGEST_LINE_BYTES

    perf_map = read(b"7f00 10 before\n7f10 10 a", *[endless] * 3, b"b\n7f20 10 after\n")

    names = [name for *_, name in perf_map.find(range(0x7F00, 0x7F30))]
    assert names == [b"before", b"after"]
    assert perf_map.size_bytes < LONGEST_LINE_BYTES


@given(st.lists(st.binary(max_size=60), max_size=10))
def test_nothing_in_a_map_raises(parts):
    read(*parts, b"\n7f00 10 name\n").find([0, 0x7F00, 2**64])
