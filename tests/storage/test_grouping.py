"""Grouping: hashes are found however they are spread."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from storage.grouping import HashIndex, sort_distinct

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
