"""Grouping: hashes are found however they are spread."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from storage.grouping import HashIndex, find_firsts, sort_distinct

_LARGEST = 2**64 - 1
hashes = st.lists(
    st.one_of(
        st.integers(0, _LARGEST),
        st.integers(0, 100),  # as only somebody who chooses them would spread them
        st.sampled_from([0, 2**63, _LARGEST]),
    ),
    max_size=60,
).map(lambda numbers: np.array(numbers, dtype=np.uint64))


@given(hashes, hashes)
def test_an_index_finds_what_is_there(some, others):
    """And nothing else, at the ends as well."""
    ordered = sort_distinct(some)

    found = HashIndex(ordered).find(np.concatenate([some, others]))

    places = {number: i for i, number in enumerate(ordered.tolist())}
    wanted = [*some.tolist(), *others.tolist()]
    assert ordered.tolist() == sorted(set(some.tolist()))
    assert found.tolist() == [places.get(number, -1) for number in wanted]


@given(st.lists(st.integers(0, 20), max_size=60), st.sampled_from([21, 10_000]))
def test_firsts_are_found_whatever_the_keys_may_be(keys, limit):
    """Where each is first, in the order of the keys, and which of them stands in each place."""
    firsts, which = find_firsts(np.array(keys, dtype=np.int64), limit)

    ordered = sorted(set(keys))
    assert firsts.tolist() == [keys.index(each) for each in ordered]
    assert [ordered[number] for number in which.tolist()] == keys
