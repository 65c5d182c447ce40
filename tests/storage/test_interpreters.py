"""What an interpreter adds to stacks is left out of them, and nothing else."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage import interpreters
from storage.columns import Columns
from storage.interpreters import (
    INTERPRETER,
    PYTHON,
    START,
    fold,
    fold_interpreters,
    fold_stacks,
    roles_of,
)
from storage.merging import merge_columns
from storage.stack_tree import StackLists, StackTree, lists_of
from symbolizer.location import Kind, Location, NamedLocation
from tests.support.profiles import build, sample_profile, synthetic
from tests.support.python_profiles import (
    CALL,
    LOOP,
    MAIN,
    MODULES,
    locations,
    names_of,
    profile_of,
    shop_profile,
)

_ROLES = np.array(
    [
        0,
        PYTHON,
        PYTHON,
        interpreters.LOOP | INTERPRETER,
        INTERPRETER,
        INTERPRETER | START,
        START,
        interpreters.LOOP,
    ],
    dtype=np.uint8,
)
_stacks = st.lists(st.lists(st.integers(0, len(_ROLES) - 1), max_size=9), max_size=12)


def _fold_one(stack: Sequence[int]) -> list[int]:
    """Do what the module says, frame by frame."""
    roles = [int(_ROLES[word]) for word in stack]
    python = [i for i, role in enumerate(roles) if role & PYTHON]
    if not python:
        return list(stack)
    between = roles[1 : python[0]]
    is_plain = all(role & (INTERPRETER | START) for role in between)
    left = []
    for i, (word, role) in enumerate(zip(stack, roles, strict=True)):
        is_top = i == 0 and role & START
        calls_python = i < python[-1]
        starts = 0 < i < python[0] and role & START and is_plain
        is_own = role & interpreters.LOOP or (
            role & (INTERPRETER | interpreters.LOOP) and calls_python
        )
        if is_top or not (is_own or starts):
            left.append(word)
    return left


def _lists(stacks: Sequence[Sequence[int]]) -> StackLists:
    words = np.array([word for stack in stacks for word in stack], dtype=np.int32)
    return StackLists(np.cumsum([0, *map(len, stacks)]), words)


def _as_lists(stacks: StackLists | StackTree) -> list[list[int]]:
    lists = lists_of(stacks)
    return [part.tolist() for part in np.split(lists.words, lists.offsets[1:-1])]


@given(_stacks)
def test_lists_and_trees_leave_out_the_same_frames(stacks: list[list[int]]) -> None:
    """Both leave out what the rules say, stack by stack and in their order."""
    lists = _lists(stacks)
    tree = StackTree.of(lists)
    assert tree is not None

    folded, folded_tree = fold(lists, _ROLES), fold(tree, _ROLES)

    if stacks:
        assert _as_lists(folded) == list(map(_fold_one, stacks))
        assert _as_lists(folded_tree) == list(map(_fold_one, stacks))


@given(_stacks)
def test_a_folded_tree_is_one_that_files_may_hold(stacks: list[list[int]]) -> None:
    """Siblings that became equal are one node, and no node is without a stack."""
    tree = StackTree.of(_lists(stacks))
    assert tree is not None

    folded = fold(tree, _ROLES)

    assert isinstance(folded, StackTree)
    folded.check()
    assert len(folded.take(np.arange(len(folded))).parents) == len(folded.parents)


def _folded(*stacks: Sequence[str]) -> list[list[str]]:
    """Return the names in stacks that were folded."""
    return _names(fold_interpreters(Columns.of(profile_of([(stack, 1) for stack in stacks]))))


def _names(folded: Columns) -> list[list[str]]:
    profile = folded.to_profile()
    return [
        [profile.frames(i)[-1].function for i in part.tolist()]
        for part in np.split(profile.stack_locations, profile.stack_offsets[1:-1])
    ]


def test_what_a_python_function_called_last_stays() -> None:
    """The C function at the leaf says where time goes; those that called Python code do not."""
    stack = (*MAIN, LOOP, "py:<module>", "py:main", LOOP, "list_sort", *CALL)
    stack = (*stack, LOOP, "py:key", "PyNumber_Add", "PyLong_Add")

    assert _folded(stack) == [["_start", "<module>", "main", "key", "PyNumber_Add", "PyLong_Add"]]


def test_the_time_of_the_loop_is_the_time_of_the_function_it_evaluates() -> None:
    """Whichever part of the loop is at the leaf, below the Python frame or above it."""
    before = ("_start", "main", "Py_BytesMain")
    parts = (LOOP, f"{LOOP}.cold", f"{LOOP}.constprop.0 [clone .isra.0]", "_TAIL_CALL_LOAD_FAST")

    for part in parts:
        assert _folded((*before, part, "py:f")) == [["_start", "f"]]
        assert _folded((*before, LOOP, "py:f", part)) == [["_start", "f"]]


def test_frames_of_extensions_stay() -> None:
    """Only those of the interpreter's file are left out between Python frames."""
    stack = (*MAIN, LOOP, "py:f", "cfunction_call", "_fast.so:visit", *CALL, LOOP, "py:g")

    assert _folded(stack) == [["_start", "f", "visit", "g"]]


def test_a_thread_begins_with_one_frame() -> None:
    """That of the C library, whose other functions may have no symbol."""
    stack = ("libc.so.6:", "libc.so.6:start_thread", "pythread_wrapper", "thread_run")

    assert _folded((*stack, LOOP, "py:run")) == [["[libc.so.6]", "run"]]


TRAMPOLINES = {
    each: NamedLocation(each, "[python]", Kind.PYTHON, "/srv/shop/shop.py", 0, 0)
    for each in ("<module>", "main", "Shop.price")
}


def _with_trampolines(*stack: str) -> list[Location]:
    """Return the locations of a stack, in which `-X:main` is the trampoline of `main`."""
    return [
        TRAMPOLINES[name.removeprefix("-X:")] if name.startswith("-X:") else locations(name)[0]
        for name in stack
    ]


@pytest.mark.parametrize("is_tree", [False, True])
def test_trampolines_are_left_out_where_their_python_frames_are(is_tree: bool) -> None:
    """They are of the stacks of `python -X perf`, two frames of one name for each function."""
    module = (*MAIN, "-X:<module>", LOOP, "py:<module>")
    main = (*module, "-X:main", LOOP, "py:main")
    stacks = [
        (*main, "-X:Shop.price"),  # its frame is not there yet, nor in any other stack
        (*main, "PyDict_GetItem"),
        (*module, "-X:main"),
        (*MAIN, "-X:<module>", LOOP),
    ]
    rows = [({}, _with_trampolines(*stack), 1) for stack in stacks]
    profile = Columns.of(build(rows, dict(names_of(_without_trampolines(stacks))), MODULES))
    if is_tree:
        tree = StackTree.of(lists_of(profile.stacks))
        assert tree is not None
        profile = replace(profile, stacks=tree)

    assert _names(fold_interpreters(profile)) == [
        ["_start", "<module>", "main", "Shop.price"],
        ["_start", "<module>", "main", "PyDict_GetItem"],
        ["_start", "<module>"],
        [*map(_named, MAIN), "<module>", LOOP],
    ]


def _without_trampolines(stacks: Sequence[Sequence[str]]) -> list[list[str]]:
    return [[name for name in stack if not name.startswith("-X:")] for stack in stacks]


def _named(name: str) -> str:
    file, colon, function = name.rpartition(":")
    return function or f"[{file}]" if colon else name


def test_trampolines_alone_are_the_python_frames_of_a_stack() -> None:
    """As where the interpreter is not one whose frames can be read."""
    stack = (*MAIN, "-X:<module>", LOOP, *CALL, "-X:main", LOOP, "PyDict_GetItem")
    names = dict(names_of(_without_trampolines([stack])))
    profile = Columns.of(build([({}, _with_trampolines(*stack), 1)], names, MODULES))

    assert _names(fold_interpreters(profile)) == [["_start", "<module>", "main", "PyDict_GetItem"]]


def test_a_program_that_embeds_the_interpreter_keeps_its_frames() -> None:
    """Its native stacks and those with Python frames begin alike."""
    start = ("_fast.so:_start", "libc.so.6:__libc_start_main", "_fast.so:serve")

    assert _folded((*start, "PyObject_Call", LOOP, "py:f"), (*start, "_fast.so:poll")) == [
        ["_start", "__libc_start_main", "serve", "f"],
        ["_start", "__libc_start_main", "serve", "poll"],
    ]


def test_stacks_without_python_frames_stay_as_they_are() -> None:
    """So a call of the loop whose Python frames could not be read is seen to be one."""
    stack = (*MAIN, LOOP, "PyDict_GetItem")

    with_python, without = _folded((*MAIN, LOOP, "py:f"), stack)

    assert with_python == ["_start", "f"]
    assert len(without) == len(stack)


def test_stacks_that_become_equal_are_merged() -> None:
    """Their samples are added up, and no sample is lost."""
    profile = Columns.of(shop_profile())

    for stacks in (profile.stacks, StackTree.of(lists_of(profile.stacks))):
        assert stacks is not None
        folded = merge_columns([fold_interpreters(replace(profile, stacks=stacks))])
        assert folded.total_samples == profile.total_samples
        leaves = Counter({row.stack[-1]: 0 for row in folded.to_profile().rows()})
        assert len(folded.stacks) == len(profile.stacks) - 1
        assert len(leaves) == len(folded.stacks) - 1


def test_profiles_without_an_interpreter_are_not_touched() -> None:
    """Neither without Python frames nor without a loop is anything computed or copied."""
    for profile in (synthetic(20, 5), sample_profile()):
        columns = Columns.of(profile)

        assert roles_of(columns) is None
        assert fold_interpreters(columns) is columns
        assert fold_stacks(columns) is columns.stacks
