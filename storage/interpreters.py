"""Interpreters: leave CPython's own C frames out of stacks that have Python frames.

A Python function is evaluated by C functions of the interpreter: between two Python frames stand
calls such as `_PyEval_EvalFrameDefault`, `_PyObject_MakeTpCall`, `slot_tp_call`. They are stored,
and left out where stacks are shown or added up by function, unless they are asked for. In a stack
that has a Python frame

- the evaluation loop is left out everywhere: a Python function's own byte code is its self time;
- the interpreter's other functions are left out as far as they called a Python frame. What a Python
  function calls last stays, such as `list_sort` or `PyDict_GetItem`: it says where time goes;
- trampolines are left out as the loop is: with `-X perf` each Python function is called through
  code of its own, which the perf map names as the function. In a profile without a Python frame of
  that function they stand for it;
- so are the frames by which a thread of the interpreter starts, but for the first one. In a
  program that embeds the interpreter they stay, as do all frames of other files: C extensions.

The interpreter is the file that the loop is in, whatever it is called. The loop is known by its
name, and by those of the handlers it is split into when it is compiled with tail calls.

Stacks stay as many and in their order, so counts are the same; several may become equal.
"""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from storage.columns import Columns, Texts
from storage.grouping import distinct
from storage.hashing import Hashes, mix, process_hasher
from storage.profile import Indices, Integers
from storage.stack_tree import ROOT, StackLists, Stacks, StackTree, tree_of_nodes
from symbolizer.location import Kind
from symbolizer.runtimes.code_names import PYTHON_MODULE

Roles = npt.NDArray[np.uint8]
"""By location, what it is of a stack: a sum of these."""
PYTHON, LOOP, INTERPRETER, START = 1, 2, 4, 8

LOOP_PREFIXES = ("_PyEval_EvalFrameDefault", "_TAIL_CALL_")
_LOOP = re.compile(rb"_PyEval_EvalFrameDefault(?:[. ].*)?|_TAIL_CALL_.*", re.DOTALL)
"""Compilers split functions into parts such as `.cold`. An `@plt` is of a file that calls it."""
_LIBC = re.compile(rb"(?:libc|libpthread|ld-musl)[-.].*", re.DOTALL)
_START = frozenset({b"_start", b"main", b"clone", b"clone3", b"__clone", b"__clone3"})
"""Frames above an interpreter's own, as are all of the C library: some of its have no symbol."""
_WORDS_AT_ONCE = 1 << 20
"""Words of stacks that are folded at a time: each takes some 60 bytes meanwhile."""


def fold_interpreters(profile: Columns) -> Columns:
    """Return a profile without the frames that interpreters add to their stacks.

    It is the same one if there are none.
    """
    folded = fold_stacks(profile)
    if folded is profile.stacks:
        return profile
    return replace(profile, stacks=folded, stack_hashes=_hash_stacks(profile, folded))


def fold_stacks(profile: Columns) -> Stacks:
    """Return the stacks of a profile without the frames that interpreters add to them."""
    roles = roles_of(profile)
    return profile.stacks if roles is None else fold(profile.stacks, roles)


def roles_of(profile: Columns) -> Roles | None:
    """Return what the locations of a profile are; None if there is nothing to be left out."""
    if not _has_python(profile):
        return None
    shown = profile.shown_frames()
    # Of inlined calls, what they were inlined into is in the stack.
    function, module, kind, file = shown.table[shown.offsets[1:] - 1, :4].T
    is_python = _is_text(shown.texts, kind, lambda text: text == Kind.PYTHON.encode())
    is_trampoline = _is_text(shown.texts, module, lambda text: text == PYTHON_MODULE.encode())
    functions = function * len(shown.texts) + file
    is_trampoline &= np.isin(functions, functions[is_python & ~is_trampoline]) & is_python
    is_native = _is_text(shown.texts, kind, lambda text: text == Kind.NATIVE.encode())
    is_loop = _is_text(shown.texts, function, lambda text: bool(_LOOP.fullmatch(text))) & is_native
    if not is_loop.any() and not is_trampoline.any():
        return None
    files = {text for text in shown.texts.take(np.unique(module[is_loop])) if text}
    is_interpreter = _is_text(shown.texts, module, files.__contains__) & is_native
    is_start = _is_text(shown.texts, function, _START.__contains__)
    is_start |= _is_text(shown.texts, module, lambda text: bool(_LIBC.fullmatch(text)))
    roles: Roles = np.zeros(len(function), dtype=np.uint8)
    for role, is_it in (
        (PYTHON, is_python & ~is_trampoline),
        (LOOP, is_loop | is_trampoline),
        (INTERPRETER, is_interpreter | is_trampoline),
        (START, is_start & is_native),
    ):
        roles[is_it] |= role
    return roles


def _has_python(profile: Columns) -> bool:
    is_used = np.zeros(len(profile.texts), dtype=bool)
    is_used[profile.named[:, 1]] = True
    is_used[profile.frames[:, 2]] = True
    return Kind.PYTHON.encode() in profile.texts.take(np.flatnonzero(is_used))


def _is_text(
    texts: Texts, numbers: Integers, is_asked: Callable[[bytes], bool]
) -> npt.NDArray[np.bool_]:
    """Return by number of a text whether it is asked for; each text is looked at once."""
    used, which = distinct(numbers, len(texts))
    found = np.fromiter(map(is_asked, texts.take(used)), bool, len(used))
    is_it: npt.NDArray[np.bool_] = found.take(which)
    return is_it


def _hash_stacks(profile: Columns, folded: Stacks) -> Hashes:
    """Return a number by stack that equal ones share, for merging."""
    if isinstance(folded, StackLists):
        words = folded.words
        return process_hasher().stacks(profile.location_hashes, folded.offsets, words)
    # Equal stacks end at one node. Those of other profiles are not found to be equal.
    ends = folded.ends.astype(np.int64).view(np.uint64)
    return mix(ends + np.uint64(int.from_bytes(os.urandom(8), "little")))


def fold(stacks: Stacks, roles: Roles) -> Stacks:
    """Return stacks without what `roles` say is left out; their words are numbers of roles."""
    if isinstance(stacks, StackTree):
        return _fold_tree(stacks, roles)
    lengths, words = [np.zeros(1, np.int64)], [stacks.words[:0]]
    for part in _parts(stacks):
        kept = ~_dropped(part, roles)
        counts = np.concatenate([np.zeros(1, np.int64), np.cumsum(kept)])
        lengths.append(np.diff(counts[part.offsets]))
        words.append(part.words[kept])
    return StackLists(np.cumsum(np.concatenate(lengths)), np.concatenate(words))


def _parts(stacks: StackLists) -> Iterator[StackLists]:
    """Cut stacks into pieces with so many words, but for one long stack."""
    offsets = stacks.offsets.astype(np.int64)
    first = 0
    while first < len(stacks):
        past = int(np.searchsorted(offsets, offsets[first] + _WORDS_AT_ONCE, "right")) - 1
        past = max(past, first + 1)
        bounds = offsets[first : past + 1]
        yield StackLists(bounds - bounds[0], stacks.words[bounds[0] : bounds[-1]])
        first = past


def _dropped(stacks: StackLists, roles: Roles) -> npt.NDArray[np.bool_]:
    """Return which words are left out."""
    role = roles.take(stacks.words)
    starts, lengths = stacks.offsets[:-1], np.diff(stacks.offsets)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    at = np.flatnonzero(role & PYTHON)
    first = np.full(len(lengths), -1, dtype=np.int64)
    last = first.copy()
    last[owner[at]] = at  # of several, the one written last stays
    first[owner[at[::-1]]] = at[::-1]
    place = np.arange(len(role))
    is_top = (place == starts.take(owner)) & (role & START > 0)
    is_own = (role & (LOOP | INTERPRETER) > 0) & ~is_top
    # How many frames of other files than those that start an interpreter stand before each word.
    others = np.concatenate([[0], np.cumsum(role & (INTERPRETER | START) == 0)])
    filled = np.flatnonzero(first >= 0)
    is_plain = np.zeros(len(lengths), dtype=bool)
    after_root = np.minimum(starts[filled] + 1, first[filled])
    is_plain[filled] = others[first[filled]] == others[after_root]
    is_dropped: npt.NDArray[np.bool_] = is_own & (place < last.take(owner))
    is_dropped |= (role & LOOP > 0) & (last.take(owner) >= 0) & ~is_top
    is_dropped |= (
        is_plain.take(owner)
        & (role & START > 0)
        & (place > starts.take(owner))
        & (place < first.take(owner))
    )
    return is_dropped


class _Copies(NamedTuple):
    """Nodes of a tree twice: as they are above the last Python frame of a stack, and below it.

    The arrays have a line for ROOT at the end. Copy i of the first kind is node i, `count` + i is
    the other one of it.
    """

    parents: Indices
    """The copy that each stands below, once those left out are gone."""
    depths: Indices
    ends: Indices
    """By node, the copy at which stacks end that end at it."""


def _fold_tree(tree: StackTree, roles: Roles) -> StackTree:
    """Do what `_dropped` says with a tree, whose nodes are of stacks of both kinds."""
    copies = _copy(tree, roles)
    count = len(tree.parents)
    ends = copies.ends.take(tree.ends)
    is_used = np.zeros(2 * count + 1, dtype=bool)
    is_used[ends] = True
    for level in reversed(tree.levels):
        for first in (count, 0):  # the upper copies have lower ones below them
            mine = slice(first + level.start, first + level.stop)
            is_used[copies.parents[mine][is_used[mine]]] = True
    is_used[ROOT] = False
    kept = np.flatnonzero(is_used)
    numbers = np.full(2 * count + 1, ROOT, dtype=np.int32)
    numbers[kept] = np.arange(len(kept), dtype=np.int32)
    return tree_of_nodes(
        numbers.take(copies.parents[kept]),
        tree.words.take(kept % max(1, count)),
        copies.depths[kept],
        numbers.take(ends),
    )


def _copy(tree: StackTree, roles: Roles) -> _Copies:
    count = len(tree.parents)
    role = np.append(roles.take(tree.words), np.uint8(0))
    parents = np.full(2 * count + 1, ROOT, dtype=np.int32)
    depths = np.zeros(2 * count + 1, dtype=np.int32)
    # By node: the nearest copy of each kind that is kept, from it upwards.
    above = np.full(count + 1, ROOT, dtype=np.int32)
    below = above.copy()
    tops = above.copy()
    has_python = np.zeros(count + 1, dtype=bool)
    is_plain = np.ones(count + 1, dtype=bool)
    for depth, level in enumerate(tree.levels):
        up, mine = tree.parents[level], role[level]
        node = np.arange(level.start, level.stop, dtype=np.int32)
        is_python = mine & PYTHON > 0
        was_python = has_python.take(up)
        has_python[level] = was_python | is_python
        is_first = is_python & ~was_python & is_plain.take(up)
        over = np.where(is_first, tops.take(up), above.take(up))
        is_top = (mine & START > 0) & (depth == 0)
        is_kept = (mine & (LOOP | INTERPRETER) == 0) | is_top
        above[level] = np.where(is_kept, node, over)
        under = below.take(up)
        is_kept = (mine & LOOP == 0) | ~was_python | is_top
        below[level] = np.where(is_python, node, np.where(is_kept, node + count, under))
        for copy, parent in (
            (level, over),
            (slice(level.start + count, level.stop + count), under),
        ):
            parents[copy] = parent
            depths[copy] = np.where(parent == ROOT, 0, depths.take(parent) + 1)
        if depth:
            tops[level] = tops.take(up)
            is_plain[level] = is_plain.take(up) & (mine & (INTERPRETER | START) > 0)
        else:
            tops[level] = above[level]
    return _Copies(parents, depths, below)
