"""Interpreter frames stand in a stack where the interpreter called and was called."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bpf.frames import Chain, leaf_address, split_frames, with_native
from bpf.interpreters import ChainEnd
from bpf.samples import FRAME_WORDS, TAG_SHIFT, PythonFrame, Tag

LOOP, EXTENSION, START = 0x40_0000, 0x50_0000, 0x60_0000


def words(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint64)


def loop(cfa: int, address: int = LOOP) -> tuple[int, int]:
    return Tag.EVALUATION << TAG_SHIFT | address, cfa


def python(code: int, tag: Tag = Tag.PYTHON) -> tuple[int, int]:
    return tag << TAG_SHIFT | code, code << 32 | 2 * code


def entry(address: int) -> int:
    return Tag.ENTRY << TAG_SHIFT | address


def reason(why: ChainEnd) -> int:
    return Tag.REASON << TAG_SHIFT | why


def frame(code: int) -> PythonFrame:
    return PythonFrame(code, code, 2 * code)


def test_a_native_stack_has_a_frame_per_word():
    assert split_frames(words(START, LOOP)) == ([START, LOOP], None)


def test_frames_stand_before_the_native_frame_that_evaluates_them():
    """Leaf first: the interpreter calls an extension, which calls the interpreter again."""
    stack = words(
        *loop(100), EXTENSION, *loop(300), START,
        *python(1), *python(2), entry(90), *python(3), entry(290),
    )  # fmt: skip

    frames, chain = split_frames(stack)

    assert frames == [frame(1), frame(2), LOOP, EXTENSION, frame(3), LOOP, START]
    assert chain == Chain(3, ChainEnd.WHOLE)


def test_a_loop_that_has_not_entered_its_frame_has_none():
    """What the thread has is that of the loop further out, as its address says."""
    stack = words(*loop(100), EXTENSION, *loop(300), START, *python(3), entry(290))

    frames, _ = split_frames(stack)

    assert frames == [LOOP, EXTENSION, frame(3), LOOP, START]


def test_frames_that_are_each_an_evaluation_follow_each_other_as_the_loops_do():
    stack = words(*loop(100), *loop(200), START, *python(1, Tag.ALONE), *python(2, Tag.ALONE))

    assert split_frames(stack)[0] == [frame(1), LOOP, frame(2), LOOP, START]


def test_of_these_the_innermost_loop_may_have_none():
    stack = words(*loop(100), *loop(200), START, *python(2, Tag.ALONE))

    assert split_frames(stack)[0] == [LOOP, frame(2), LOOP, START]


def test_frames_without_a_loop_are_further_out_than_what_was_walked():
    stack = words(*loop(100), EXTENSION, *python(1), entry(90), *python(2), entry(900))

    assert split_frames(stack)[0] == [frame(1), LOOP, EXTENSION, frame(2)]


@pytest.mark.parametrize("end", [ChainEnd.TRUNCATED, ChainEnd.UNREADABLE, ChainEnd.NO_CODE])
def test_a_chain_that_ends_early_says_why_and_where(end):
    stack = words(*loop(100), START, *python(1), *python(2), reason(end))

    frames, chain = split_frames(stack)

    assert frames == [frame(1), frame(2), end.mark, LOOP, START]
    assert chain == Chain(2, end)


def test_an_evaluation_that_was_not_read_to_its_end_is_of_the_next_loop():
    stack = words(
        *loop(100), *loop(200), *loop(300), START,
        *python(1), entry(90), *python(2), reason(ChainEnd.NO_CODE),
    )  # fmt: skip

    frames, _ = split_frames(stack)

    assert frames == [frame(1), LOOP, frame(2), ChainEnd.NO_CODE.mark, LOOP, LOOP, START]


def test_nothing_is_known_of_loops_further_out_than_where_a_chain_ends_early():
    """Then it is not the innermost ones that have no frames."""
    stack = words(
        *loop(100), *loop(200), *loop(300), START,
        *python(1, Tag.ALONE), reason(ChainEnd.UNREADABLE),
    )  # fmt: skip

    frames, chain = split_frames(stack)

    assert frames == [frame(1), LOOP, ChainEnd.UNREADABLE.mark, LOOP, LOOP, START]
    assert chain == Chain(1, ChainEnd.UNREADABLE)


OTHER = ChainEnd.OTHER_STACK


def test_loops_of_another_interpreter_have_a_mark():
    """It called that which the thread runs now, or was called by it; several loops have one."""
    stack = words(
        *(EXTENSION, EXTENSION, EXTENSION, *loop(100), *loop(200)),
        *(EXTENSION, *loop(300), *loop(400), START),
        *(*python(1), entry(290)),
    )  # fmt: skip

    frames, chain = split_frames(stack)

    assert frames == [
        *(EXTENSION, EXTENSION, EXTENSION, OTHER.mark, LOOP, LOOP, EXTENSION),
        *(frame(1), LOOP, OTHER.mark, LOOP, START),
    ]
    assert chain == Chain(1, OTHER)


def test_frames_without_addresses_are_those_of_the_innermost_of_many_loops():
    """So are those of an interpreter, or a greenlet, that others called."""
    loops = (*loop(100), EXTENSION, *loop(200), *loop(300))
    stack = words(*loops, START, *python(1, Tag.ALONE))

    frames, chain = split_frames(stack)

    assert frames == [frame(1), LOOP, EXTENSION, OTHER.mark, LOOP, LOOP, START]
    assert chain == Chain(1, OTHER)


def test_frames_of_a_thread_s_first_interpreter_are_those_of_its_outermost_loops():
    """What was found without the lock is never shown as what another interpreter runs."""
    loops = (EXTENSION, EXTENSION, START, *loop(100), EXTENSION, *loop(200))
    stack = words(*loops, START, Tag.DETACHED << TAG_SHIFT, *python(1, Tag.ALONE))

    frames, chain = split_frames(stack)

    assert frames == [
        EXTENSION,
        EXTENSION,
        START,
        OTHER.mark,
        LOOP,
        EXTENSION,
        frame(1),
        LOOP,
        START,
    ]
    assert chain == Chain(1, OTHER)


def test_what_may_be_no_loop_has_no_mark():
    """Of interpreters whose loop is split into functions more is taken for it than is."""
    stack = words(
        EXTENSION, EXTENSION, EXTENSION, *loop(100), *loop(200), START, *python(1), entry(190)
    )

    frames, chain = split_frames(stack, is_loop_certain=False)

    assert frames == [EXTENSION, EXTENSION, EXTENSION, LOOP, frame(1), LOOP, START]
    assert chain == Chain(1, ChainEnd.WHOLE)


def test_loops_of_a_thread_without_a_state_are_of_another_interpreter():
    stack = words(EXTENSION, EXTENSION, START, *loop(100), START, reason(ChainEnd.NO_PYTHON))

    frames, chain = split_frames(stack)

    assert frames == [EXTENSION, EXTENSION, START, OTHER.mark, LOOP, START]
    assert chain == Chain(0, OTHER)


def test_loops_without_frames_say_why_these_were_not_found():
    end = ChainEnd.OTHER_THREAD
    stack = words(EXTENSION, EXTENSION, START, *loop(100), START, reason(end))

    frames, chain = split_frames(stack)

    assert frames == [EXTENSION, EXTENSION, START, end.mark, LOOP, START]
    assert chain == Chain(0, end)


def test_a_thread_without_python_has_a_chain_without_frames():
    stack = words(START, reason(ChainEnd.NO_PYTHON))

    assert split_frames(stack) == ([START], Chain(0, ChainEnd.NO_PYTHON))


@pytest.mark.parametrize(
    "cut", [(Tag.PYTHON << TAG_SHIFT | 1,), (9 << TAG_SHIFT,), (Tag.REASON << TAG_SHIFT | 99,)]
)
def test_words_that_mean_nothing_are_left_out(cut):
    assert split_frames(words(START, *cut)) == ([START], None)


VALUES = st.integers(0, 9).flatmap(
    lambda tag: st.integers(0, 12).map(lambda low: tag << TAG_SHIFT | low)
)


@given(st.lists(VALUES, max_size=60))
def test_any_words_keep_their_frames_in_order(values):
    """Native frames, and those of the interpreter, each from the leaf to the root."""
    frames, chain = split_frames(words(*values))

    native, python, at = [], [], 0
    while at < len(values):
        tag, low = values[at] >> TAG_SHIFT, values[at] & 0xFF
        size = FRAME_WORDS.get(tag, 1)
        if tag in {Tag.NATIVE, Tag.EVALUATION}:
            native.append(low)
        elif tag in {Tag.PYTHON, Tag.ALONE} and at + 1 < len(values):
            python.append(low)
        at += size
    assert [frame for frame in frames if isinstance(frame, int)] == native
    found = [frame for frame in frames if isinstance(frame, PythonFrame) and frame.code]
    assert [frame.code for frame in found] == [code for code in python if code]
    assert chain is None or chain.frames == len(python)


def test_a_later_walk_of_the_same_tick_keeps_the_interpreters_frames():
    at_tick = words(EXTENSION, *loop(7), *python(1), entry(90))
    addresses = words(EXTENSION, LOOP, START)

    stack = with_native(at_tick, addresses, [(1, 100)])

    assert stack.tolist() == [EXTENSION, *loop(100), START, *python(1), entry(90)]


def test_the_leaf_has_no_tag():
    assert leaf_address(words(*loop(7), START)).tolist() == [LOOP]
    assert leaf_address(words()).tolist() == []


def test_loops_of_an_interpreter_that_is_not_known_yet_are_counted():
    stack = words(EXTENSION, EXTENSION, START, *loop(100), START)

    frames, chain = split_frames(stack)

    assert frames == [EXTENSION, EXTENSION, START, LOOP, START]
    assert chain == Chain(0, ChainEnd.UNKNOWN_INTERPRETER)
