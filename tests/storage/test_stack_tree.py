"""Stacks as trees say the same as lists of them, alone and merged."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.stack_tree import DEEPEST, ROOT, StackLists, StackTree, merge_trees

SOME_STACKS = st.lists(st.lists(st.integers(0, 4), max_size=6), max_size=12)
Lists = list[list[int]]


def lists(stacks: Lists) -> StackLists:
    offsets = np.cumsum([0, *map(len, stacks)])
    return StackLists(offsets, np.array([word for stack in stacks for word in stack], np.int32))


def plain(stacks: StackLists) -> Lists:
    words, offsets = stacks.words.tolist(), stacks.offsets.tolist()
    return [words[a:b] for a, b in itertools.pairwise(offsets)]


def tree(stacks: Lists) -> StackTree:
    made = StackTree.of(lists(stacks))
    assert made is not None
    made.check()
    return made


def prefixes(stacks: Lists) -> set[tuple[int, ...]]:
    return {tuple(stack[:end]) for stack in stacks for end in range(1, len(stack) + 1)}


@given(SOME_STACKS)
def test_a_tree_has_a_node_for_each_beginning_of_its_stacks(stacks: Lists) -> None:
    made = tree(stacks)
    assert plain(made.lists) == stacks
    assert made.listed_words == sum(map(len, stacks))
    assert len(made.parents) == len(prefixes(stacks))


@given(SOME_STACKS, st.data())
def test_some_of_the_stacks_keep_only_the_nodes_they_need(
    stacks: Lists, data: st.DataObject
) -> None:
    chosen = data.draw(st.permutations(range(len(stacks)))) if stacks else []
    chosen = chosen[: len(chosen) // 2]
    some = tree(stacks).take(np.array(chosen, np.int64))
    some.check()
    wanted = [stacks[i] for i in chosen]
    assert plain(some.lists) == wanted
    assert len(some.parents) == len(prefixes(wanted))


@given(st.lists(SOME_STACKS, min_size=1, max_size=3))
def test_a_merged_tree_has_all_stacks_in_their_order(parts: list[Lists]) -> None:
    moved = [np.array([3, 1, 4, 0, 2]) for _ in parts]
    merged = merge_trees([tree(part) for part in parts], moved)
    if len(parts) > 1:
        merged.check()
    renamed = [[moved[0][word] for word in stack] for part in parts for stack in part]
    assert plain(merged.lists) == renamed
    assert len(merged.parents) == len(prefixes(renamed))


def test_stacks_that_are_too_deep_make_no_tree() -> None:
    assert StackTree.of(lists([[0] * DEEPEST])) is not None
    assert StackTree.of(lists([[0] * (DEEPEST + 1)])) is None


@pytest.mark.parametrize(
    ("parents", "words"),
    [
        ([0], [0]),  # its own parent
        ([1, ROOT], [0, 0]),
        ([ROOT, 0, ROOT], [0, 0, 1]),
        ([ROOT, ROOT], [3, 3]),
        ([ROOT, 0, 0], [0, 1, 1]),
        ([ROOT, -2], [0, 1]),
        ([ROOT, *range(DEEPEST)], [0] * (DEEPEST + 1)),
    ],
)
def test_what_is_no_tree_is_found(parents: list[int], words: list[int]) -> None:
    broken = StackTree(
        np.array(parents, np.int32), np.array(words, np.int32), np.zeros(0, np.int32)
    )
    with pytest.raises(ValueError, match="tree"):
        broken.check()
