"""Code maps: of entries that overlap the later one holds, and limits are kept."""

import time

import hypothesis.strategies as st
from hypothesis import given

from symbolizer.runtimes.code_map import CodeMap

ENTRIES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 25)), max_size=40)


@given(ENTRIES, st.lists(st.integers(0, 90), max_size=6), st.integers(1, 9))
def test_the_last_entry_that_holds_an_address_names_it(entries, asked, every):
    """Also when what was there before has been put into place already."""
    code: CodeMap[int] = CodeMap()
    truth = {}
    for number, (start, size) in enumerate(entries):
        code.add(start, size, number, 1)
        truth.update(dict.fromkeys(range(start, start + size), number))
        if number % every == 0:
            code.find([0])

    found = code.find(asked)

    assert {a: v for s, e, v in found for a in asked if s <= a < e} == {
        a: truth[a] for a in asked if a in truth
    }
    assert all(truth[a] == v for start, end, v in found for a in range(start, end))


def test_a_range_ends_where_a_later_entry_begins():
    code: CodeMap[str] = CodeMap()
    code.add(100, 100, "old", 3)
    code.add(140, 20, "new", 3)

    assert code.find([100, 150, 199]) == [(100, 140, "old"), (140, 160, "new"), (160, 200, "old")]


def test_beyond_a_limit_the_oldest_entries_go_and_are_counted():
    code: CodeMap[int] = CodeMap(max_ranges=10)
    for number in range(25):
        code.add(100 * number, 10, number, 1)

    assert [value for *_, value in code.find(range(0, 2500, 100))] == list(range(15, 25))
    assert code.dropped == 15


def test_values_take_no_more_than_their_limit():
    code: CodeMap[int] = CodeMap(max_value_bytes=1000)
    for number in range(25):
        code.add(100 * number, 10, number, 100)

    assert [value for *_, value in code.find(range(0, 2500, 100))] == list(range(15, 25))


def test_code_that_was_replaced_takes_no_room():
    """A compiler that runs for weeks uses the same memory a million times."""
    code: CodeMap[int] = CodeMap(max_ranges=100)
    for number in range(1000):
        code.add(10 * (number % 50), 10, number, 1)

    assert [value for *_, value in code.find(range(0, 500, 10))] == list(range(950, 1000))
    assert code.dropped == 0


def test_ranges_that_cannot_be_are_left_out():
    code: CodeMap[str] = CodeMap()
    for start, size in [(-1, 5), (5, 0), (2**63, 1), (2**63 - 5, 2**63), (0, 2**64)]:
        code.add(start, size, "impossible", 10)
    code.add(10, 5, "possible", 8)

    assert code.find([-1, 0, 5, 12, 2**63, 2**64]) == [(10, 15, "possible")]


def test_entries_that_all_overlap_take_no_longer_than_others():
    """Nested ones would be quadratic if each were cut by each."""
    code: CodeMap[int] = CodeMap()
    begun_s = time.thread_time()
    for number in range(100_000):
        code.add(number, 2 * (100_000 - number), number, 8)

    (found,) = code.find([99_999])

    assert found == (99_999, 100_001, 99_999)
    assert time.thread_time() - begun_s < 5  # a quarter of a second where nothing else runs
