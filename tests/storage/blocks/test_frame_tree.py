"""Trees of stacks with ids: the same stacks as their lists, however they were put together."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.blocks import frame_tree
from storage.blocks.frame_tree import EMPTY_STACK, FrameTree, Locations, read_tree
from storage.blocks.parquet import engine
from storage.blocks.rollup import Stacks, fold, rest_id, sort_stacks
from storage.blocks.schema import NO_PARENT, STACK_TREE
from storage.profile import ProfileError
from tests.support.blocks import HASHER, make_stacks

locations = st.integers(1, 4)
stacks = st.lists(
    st.lists(locations, min_size=1, max_size=6).map(tuple), min_size=1, max_size=12, unique=True
)
REST = rest_id(HASHER)


def known_locations(whole: Stacks) -> Locations:
    return Locations.of(np.unique(np.append(whole.frame_ids, np.uint64(REST))))


def in_order(whole: Stacks) -> Stacks:
    _, numbers = np.unique(whole.frame_ids, return_inverse=True)
    return whole.take(sort_stacks(whole.offsets, numbers.astype(np.uint32)))


@given(stacks, st.data())
def test_a_tree_has_the_stacks_that_lists_have(words, data):
    """Whole, in part and joined of parts; as lists again they are sorted."""
    whole = make_stacks(words)
    known = known_locations(whole)
    half = data.draw(st.integers(0, len(words)))
    parts = [whole.take(np.arange(half)), whole.take(np.arange(half, len(words)))]

    tree = FrameTree.of(whole, known)
    joined = FrameTree.joined(known, [FrameTree.of(part, known) for part in parts])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frame_tree, "_LISTED_WORDS", 5)
        lists = Stacks.joined(list(tree.lists()))

    assert joined.equals(tree)
    assert tree.only(np.arange(half)).equals(FrameTree.of(parts[0], known))
    assert tree.equals(FrameTree.of(parts[0], known)) == (half == len(words))
    for name in ("ids", "offsets", "frame_ids"):
        assert getattr(lists, name).tolist() == getattr(in_order(whole), name).tolist()
    assert tree.used_locations().tolist() == sorted(set(whole.frame_ids.tolist()))


NOTHING_LEAST = (0, 0)


def ones(whole: Stacks) -> np.ndarray:
    return np.ones((len(whole.ids), 2), dtype=np.int64)


@given(stacks, st.data())
def test_a_tree_is_folded_as_lists_are(words, data):
    """And what has been folded stays so."""
    whole = in_order(make_stacks(words))
    known = known_locations(whole)
    kept = np.sort(whole.ids[[data.draw(st.booleans()) for _ in words]])
    expected = fold(whole, kept, HASHER)

    folded = FrameTree.of(whole, known).fold(kept, REST, HASHER, ones(whole), NOTHING_LEAST)

    pairs = zip(folded.rare.tolist(), folded.folded.tolist(), strict=True)
    assert dict(pairs) == dict(zip(expected.rare.tolist(), expected.folded.tolist(), strict=True))
    left = whole.take(np.flatnonzero(np.isin(whole.ids, kept)))
    assert folded.tree.equals(FrameTree.of(Stacks.joined([left, expected.stacks]), known))
    again = folded.tree.fold(
        kept, REST, HASHER, ones(make_stacks([(1,)] * len(folded.tree.ids))), NOTHING_LEAST
    )
    assert again.tree.equals(folded.tree)
    assert again.rare.tolist() == again.folded.tolist()


@given(stacks, st.data())
def test_small_rests_are_counted_further_up(words, data):
    """As far as there are enough together, or at the root; nothing below a node loses as much."""
    whole = in_order(make_stacks(words))
    known = known_locations(whole)
    is_kept = np.array([data.draw(st.booleans()) for _ in words])
    counts = np.array([data.draw(st.tuples(st.integers(0, 9), st.integers(0, 9))) for _ in words])
    least = np.array([4, 15])
    tree = FrameTree.of(whole, known)
    kept = np.sort(whole.ids[is_kept])
    near = tree.fold(kept, REST, HASHER, counts, NOTHING_LEAST)

    far = tree.fold(kept, REST, HASHER, counts, least.tolist())

    assert far.rare.tolist() == near.rare.tolist() == whole.ids[~is_kept].tolist()
    paths = {
        number: tuple(each.frame_ids[each.offsets[i] : each.offsets[i + 1]].tolist())
        for folded in (near, far)
        for each in folded.tree.lists()
        for i, number in enumerate(each.ids.tolist())
    }
    before: dict[tuple[int, ...], np.ndarray] = {}
    after: dict[tuple[int, ...], np.ndarray] = {}
    for one, other, count in zip(
        near.folded.tolist(), far.folded.tolist(), counts[~is_kept], strict=True
    ):
        assert paths[one][: len(paths[other]) - 1] == paths[other][:-1]
        assert paths[one][-1] == paths[other][-1] == REST
        for path, sums in ((paths[one][:-1], before), (paths[other][:-1], after)):
            for depth in range(len(path) + 1):
                sums[path[:depth]] = sums.get(path[:depth], 0) + count
    for path, sums in before.items():
        lost = sums - after.get(path, 0)
        assert not lost.any() or (lost < least).all()
    rests = {paths[other][:-1] for other in far.folded.tolist()}
    for rest in rests - {()}:
        is_own = np.array([paths[other][:-1] == rest for other in far.folded.tolist()])
        assert (counts[~is_kept][is_own].sum(axis=0) >= least).any()


def test_a_stack_that_is_there_twice_is_refused():
    """At one node or at two: rows would mean either."""
    whole = make_stacks([(1,), (1, 2), (3,)])
    known = known_locations(whole)
    tree = FrameTree.of(whole, known)
    same_id = Stacks(whole.ids[[0, 1, 1]], whole.offsets, whole.frame_ids)

    for bad in (FrameTree.joined(known, [tree, tree]), FrameTree.of(same_id, known)):
        with pytest.raises(ProfileError, match="twice"):
            bad.by_node()
    with pytest.raises(ProfileError, match="locations"):
        FrameTree.of(whole, Locations.of(np.sort(whole.frame_ids[:1])))


def test_the_stack_without_locations_has_one_id_under_all_keys():
    """So readers of a tree, which does not have it, know it."""
    assert make_stacks([()]).ids.tolist() == [EMPTY_STACK]


PARENTS = {
    "one stack of so many locations": (f"if(i = 0, {NO_PARENT}, i - 1)", 200_000, "too deep"),
    "deep stacks that part at the end": (
        f"if(i = 0, {NO_PARENT}, least(i, 4095) - 1)",
        60_000,
        "too many locations",
    ),
    "more nodes than any tree has": (str(NO_PARENT), frame_tree.NODE_LIMIT + 1, "nodes"),
}


@pytest.mark.parametrize(("parent", "rows", "reason"), PARENTS.values(), ids=PARENTS)
def test_some_kilobytes_do_not_become_gigabytes(parent, rows, reason, tmp_path):
    """A file says nearly the same of each row, and what is made of it would fill the memory."""
    query = (
        f"SELECT {parent} AS parent, i AS frame_id, i AS stack_id, i >= 4095 AS is_stack"
        f" FROM range({rows}) numbers(i)"
    )
    known = Locations.of(np.arange(min(rows, 200_000), dtype=np.uint64))
    with engine(folder=tmp_path) as opened:
        file = opened.write(STACK_TREE, query, tmp_path, is_sorted=True)
        assert file.path.stat().st_size < 1 << 20
        with pytest.raises(ProfileError, match=reason):
            read_tree(opened, file, known)
