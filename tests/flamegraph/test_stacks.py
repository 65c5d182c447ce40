"""Stacks: boxes numbered by arrays, held to boxes made of Python frames one by one."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiler.flamegraph.stacks import Group, Stacks, _combine
from storage.columns import Columns
from storage.profile import Profile
from symbolizer.location import Frame, Kind, NamedLocation
from tests.support import profiles as some

Boxes = list[tuple[Frame, ...]]


def box_of(frame: Frame, outermost: Frame, group: Group) -> Frame:
    """Return the box of a frame; in boxes of files and modules it counts as the outermost code."""
    if group is Group.FUNCTION:
        return frame._replace(file="", line=0)
    if group is Group.LINE:
        return frame
    if group is Group.FILE and frame.file:
        return Frame(frame.file, frame.module, outermost.kind, frame.file)
    return Frame(frame.module or "[unknown]", frame.module, outermost.kind)


def boxes_of(profiles: Sequence[Profile], group: Group) -> Boxes:
    """Return the boxes of each stack, the slow and obvious way."""
    files: dict[Frame, set[str]] = {}
    begins: dict[Frame, set[int]] = {}
    for profile in profiles:
        for number, place in enumerate(profile.locations):
            for frame in profile.frames(number):
                key = frame._replace(file="", line=0)
                first = place.first_line if isinstance(place, NamedLocation) else 0
                files.setdefault(key, set()).update({frame.file} - {""})
                begins.setdefault(key, set()).update({first} - {0})
    found: Boxes = []
    for profile in profiles:
        places = {place: profile.frames(i) for i, place in enumerate(profile.locations)}
        for number in range(len(profile.stack_offsets) - 1):
            boxes = []
            for place in profile.stack(number):
                frames = places[place]
                boxes += [box_of(each, frames[-1], group) for each in reversed(frames)]
            if group is Group.FUNCTION:  # a file and a line are shown where all agree on them
                boxes = [box._replace(**place_of(files[box], begins[box])) for box in boxes]
            if group in {Group.FILE, Group.MODULE}:
                boxes = [box for box, _ in itertools.groupby(boxes)]
            found.append(tuple(boxes))
    return found


def place_of(files: set[str], begins: set[int]) -> dict[str, str | int]:
    if len(files) != 1:
        return {"file": "", "line": 0}
    return {"file": next(iter(files)), "line": next(iter(begins)) if len(begins) == 1 else 0}


def listed(stacks: Stacks) -> Boxes:
    bounds = itertools.pairwise(stacks.lists.offsets.tolist())
    boxes = stacks.lists.words.tolist()
    return [tuple(stacks.frames[box] for box in boxes[start:end]) for start, end in bounds]


def check(profiles: Sequence[Profile], group: Group) -> Stacks:
    stacks = Stacks.of([Columns.of(each) for each in profiles], group)
    assert listed(stacks) == boxes_of(profiles, group)
    assert list(stacks.frames) == sorted(set(stacks.frames))
    return stacks


@given(st.lists(some.profiles(), min_size=1, max_size=3), st.sampled_from(list(Group)))
def test_boxes_of_arrays_are_those_of_frames(profiles, group):
    """Inlined calls, addresses without names, any names, of one profile and of several."""
    check(profiles, group)


@pytest.mark.parametrize("group", Group)
def test_every_kind_of_frame_has_its_box(group):
    check([some.sample_profile(), some.hostile_profile(), some.build([])], group)
    check([some.build([])], group)
    check([some.build([({}, [], 1)])], group)


def test_texts_that_are_equal_are_one_box():
    """The name of a module's addresses may also stand in the table as that of a function."""
    bracketed = Frame("[libc.so.6]", "libc.so.6", Kind.NATIVE)
    place = some.native(some.LIBC, 0x26600)
    profile = some.build([({}, [some.STRIPPED, place], 1)], {place: (bracketed,)})
    shown = Columns.of(profile).shown_frames()
    assert shown.texts.take(shown.table[:, 0]) == [b"[libc.so.6]"] * 2
    assert len(set(shown.table[:, 0].tolist())) == 2

    for group in Group:
        assert len(set(check([profile], group).frames)) == 1


def test_a_file_is_shown_where_all_frames_agree():
    """Of both sides of a comparison; a frame without a file says nothing against it."""

    def profile(*files: str) -> Profile:
        places = [some.native(some.API, 0x1000 + 16 * i) for i in range(len(files))]
        frames = [(Frame("work", "api", Kind.NATIVE, file, 1),) for file in files]
        return some.build([({}, places, 1)], dict(zip(places, frames, strict=True)))

    for files, expected in (
        ((["a.c", ""], ["a.c"]), "a.c"),
        ((["a.c"], ["b.c"]), ""),
        ((["a.c", "b.c"], ["b.c"]), ""),
        (([""], ["b.c"]), "b.c"),
        (([""], [""]), ""),
    ):
        (frame,) = set(check([profile(*each) for each in files], Group.FUNCTION).frames)
        assert frame.file == expected


def test_lines_of_any_size_are_told_apart():
    """A foreign file may name any line."""
    lines = [0, 1, 2**31, 2**62]
    places = [some.native(some.API, 0x1000 + 16 * i) for i in range(len(lines))]
    names = {
        place: (Frame("f", "api", Kind.NATIVE, "f.c", line),)
        for place, line in zip(places, lines, strict=True)
    }

    stacks = check([some.build([({}, places, 1)], names)], Group.LINE)

    assert [frame.line for frame in stacks.frames] == lines


@given(
    st.lists(
        st.tuples(*[st.sampled_from([0, 1, 2, 2**20, 2**31 - 1])] * 5), min_size=1, max_size=30
    )
)
def test_combined_columns_are_in_the_order_of_their_lines(lines):
    """Also where the product of what they may hold is beyond 64 bits."""
    keys = _combine(np.array(lines, dtype=np.int64).T).tolist()

    assert sorted(set(lines)) == [line for _, line in sorted(set(zip(keys, lines, strict=True)))]
    assert len(set(keys)) == len(set(lines))
