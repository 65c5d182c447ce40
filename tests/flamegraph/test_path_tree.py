"""Paths of a tree: whatever is asked of them, the answer is that of lists of the same stacks."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profiler.flamegraph import flamegraph, views
from profiler.flamegraph.differential import Pair, UnionGraph
from profiler.flamegraph.flamegraph import FlameGraph, Screen
from profiler.flamegraph.path_lists import PathLists
from profiler.flamegraph.path_tree import PathClimbs, PathTree
from profiler.flamegraph.paths import Paths
from profiler.flamegraph.stacks import Group, Stacks
from profiler.flamegraph.views import View
from storage.columns import Columns
from storage.profile import Profile
from storage.stack_tree import DEEPEST, StackLists, StackTree
from symbolizer.location import Frame, Kind
from tests.flamegraph.test_differential import pair_of
from tests.support import profiles as some

# Several locations are one function, file or module; some are several functions.
FRAMES = [
    Frame(name, module, Kind.NATIVE, file, line)
    for name, module, file, line in (
        ("main", "api", "main.c", 1),
        ("main", "api", "main.c", 2),
        ("work", "api", "work.c", 3),
        ("copy", "libc", "", 0),
        ("copy", "api", "", 0),
    )
]
INLINED = Frame("clamp", "api", Kind.INLINED, "clamp.h", 4)
NAMES = {
    some.native(some.API, 0x1000 + 16 * i): (*inlined, frame)
    for i, (frame, inlined) in enumerate(
        (frame, inlined)
        for frame in FRAMES
        for inlined in ((), (INLINED,), (INLINED, INLINED._replace(function="work")))
    )
}
PLACES = [*NAMES, some.STRIPPED]
rows = st.tuples(
    st.fixed_dictionaries(
        {"service": st.sampled_from("ab")}, optional={"comm": st.sampled_from("xyz")}
    ),
    st.lists(st.sampled_from(PLACES), max_size=8),
    st.integers(1, 50),
)
profiles, filled = (
    st.lists(rows, max_size=14).map(lambda stacks, more=more: some.build([*more, *stacks], NAMES))
    for more in ([], [({"service": "a"}, PLACES[:1], 1)])
)
words = st.sampled_from(("main", "work", "copy", "clamp", "api", "libc", "a", "zz", ""))
asked = st.builds(
    View,
    by=st.sampled_from(((), ("comm",), ("service", "comm"))),
    group=st.sampled_from(Group),
    invert=st.booleans(),
    callers=st.sampled_from(("", "", "work")),
    focus=st.sampled_from(((), (), ("work",), ("copy", "main"))),
    hide=st.sampled_from(((), (), ("main",), ("clamp", "work"))),
)
screens = st.sampled_from((None, Screen(100, 20), Screen(1000)))


def as_tree(profile: Columns) -> Columns:
    """Return the same profile with its stacks as a tree."""
    assert isinstance(profile.stacks, StackLists)
    tree = StackTree.of(profile.stacks)
    assert tree is not None
    return dataclasses.replace(profile, stacks=tree)


def both(profile: Profile, view: View, wanted: Sequence[int] | None = None) -> list[Paths]:
    """Return what a view leaves of lists and of a tree of the same stacks, or of some rows."""
    columns = Columns.of(profile)
    found = []
    for each in (columns, as_tree(columns)):
        chosen = each if wanted is None else each.with_rows(np.array(wanted, np.int64))
        found.append(Paths.of(chosen, view.by, view.group))
    assert isinstance(found[0].shape, PathLists)
    assert isinstance(found[1].shape, PathTree)
    return [view.of(paths) for paths in found]


def listed(paths: Paths) -> list[tuple[tuple[Frame, ...], int, int]]:
    lists = paths.shape.lists
    boxes = [
        tuple(paths.frames[box] for box in lists.boxes[start:end])
        for start, end in zip(lists.starts.tolist(), lists.ends.tolist(), strict=True)
    ]
    return list(zip(boxes, paths.values.tolist(), paths.samples.tolist(), strict=True))


def fields_of(graph: FlameGraph | UnionGraph) -> dict[str, object]:
    found = {each.name: getattr(graph, each.name) for each in dataclasses.fields(graph)}
    return {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in found.items()
    }


def assert_same_answers(lists: Paths, tree: Paths, text: str, screen: Screen | None) -> None:
    assert listed(lists) == listed(tree)
    for name in ("unit", "frames", "functions_count", "root", "heads"):
        assert getattr(lists, name) == getattr(tree, name)
    assert fields_of(flamegraph.draw(lists, screen)) == fields_of(flamegraph.draw(tree, screen))
    assert lists.search(text) == tree.search(text)
    assert lists.functions() == tree.functions()
    whole = flamegraph.draw(lists)
    assert whole.total[0] == tree.total
    for depth in (None, 0, 1, 3):
        nodes = [
            flamegraph.grow(each, (each.values,), lambda t: t[0], screen, depth).nodes().tolist()
            for each in (lists, tree)
        ]
        assert nodes[0] == nodes[1]


@settings(max_examples=120)
@given(profiles, asked, words, screens, st.data())
def test_a_tree_answers_as_lists_do(profile, view, text, screen, data):
    """Drawn whole and cut, searched, added up, zoomed, in any view, of all rows and of some."""
    wanted = None
    if data.draw(st.booleans()):
        wanted = [i for i in range(len(profile.row_stacks)) if data.draw(st.booleans())]
    lists, tree = both(profile, view, wanted)

    assert isinstance(tree.shape, PathClimbs if view.invert or view.callers else PathTree)
    assert_same_answers(lists, tree, text, screen)
    paths = sorted({boxes for boxes, _, _ in listed(lists) if boxes})
    if not paths:
        return
    numbers = {frame: i for i, frame in enumerate(lists.frames)}
    boxes = data.draw(st.sampled_from(paths))
    path = [numbers[frame] for frame in boxes[: data.draw(st.integers(0, len(boxes)))]]
    assert lists.sums_along(path) == tree.sums_along(path)
    assert_same_answers(lists.below(path), tree.below(path), text, screen)
    assert_same_answers(lists.through(path), tree.through(path), text, screen)
    if len(path) > 1:
        halves = path[:1], path[1:]
        again = [each.below(halves[0]).below(halves[1]) for each in (lists, tree)]
        assert_same_answers(*again, text, screen)


@given(some.profiles(), st.sampled_from(Group), words, screens)
def test_any_profile_is_drawn_as_a_tree(profile, group, text, screen):
    """Also with names, labels and inlined calls of any kind."""
    lists, tree = both(profile, View(("service", "comm"), group))

    assert_same_answers(lists, tree, text, screen)


@given(profiles, asked, st.integers(0, 10**6))
def test_files_of_a_tree_are_those_of_lists(profile, view, number):
    """What a view leaves of a profile for a file, and of a node of it."""
    columns = Columns.of(profile)
    graph = flamegraph.draw(view.of(Paths.of(columns, view.by, view.group)))
    node = int(graph.ids()[number % len(graph)])

    lists, tree = (view.shown(each, node) for each in (columns, as_tree(columns)))

    assert lists.by == tree.by
    assert lists.profile.to_profile() == tree.profile.to_profile()


@settings(max_examples=60)
@given(before=filled, after=filled, view=asked, screen=screens, data=st.data())
def test_a_pair_of_trees_is_drawn_as_one_of_lists(before, after, view, screen, data):
    """The union, its verdicts and reasons; one side may be lists."""
    lists = pair_of(before, after)
    shapes = [as_tree, data.draw(st.sampled_from((as_tree, lambda profile: profile)))]
    if data.draw(st.booleans()):
        shapes.reverse()
    tree = Pair(lists.found, shapes[0](lists.before), shapes[1](lists.after))

    assert isinstance(Stacks.of([tree.before, tree.after], view.group).stacks, StackTree)
    assert lists.moved == tree.moved
    functions = lists.found.functions
    assert lists.reasons(functions) == tree.reasons(functions)
    shown = [each.view(view) for each in (lists, tree)]
    graph = lists.draw(shown[0], [], screen)
    assert fields_of(graph) == fields_of(tree.draw(shown[1], [], screen))
    alone = flamegraph.draw(shown[0].paths)
    node = data.draw(st.sampled_from(alone.ids().tolist()))
    path = [box for _, box in views.path_to(shown[0].paths, node)]
    assert path == [box for _, box in views.path_to(shown[1].paths, node)]
    zoomed = [
        pair.draw(each, path, screen) for pair, each in zip((lists, tree), shown, strict=True)
    ]
    assert fields_of(zoomed[0]) == fields_of(zoomed[1])
    assert shown[0].sums_along(path) == shown[1].sums_along(path)


def test_a_tree_deeper_than_the_limit_ends_in_a_visible_node(monkeypatch):
    """As lists do: what goes on beyond the limit is apart from what ends there."""
    monkeypatch.setattr(flamegraph, "DEPTH_LIMIT", 5)
    places = [some.named(f"f{i}") for i in range(9)]
    profile = some.build([({}, places, 2), ({}, places[:5], 1), ({}, places[:3], 4)])

    lists, tree = both(profile, View(("comm",)))

    assert_same_answers(lists, tree, "f1", None)
    assert flamegraph.DEEPER in flamegraph.draw(tree).frames


@pytest.mark.parametrize("group", Group)
def test_inlined_calls_that_make_a_tree_too_deep_are_drawn_from_lists(group):
    """A foreign file may have locations of any number of frames."""
    place = some.native(some.API, 0x1000)
    frames = tuple(Frame(f"f{i}", "api", Kind.INLINED) for i in range(DEEPEST // 2))
    profile = as_tree(Columns.of(some.build([({}, [place] * 3, 1)], {place: frames})))

    stacks = Stacks.of([profile], group)

    assert isinstance(stacks.stacks, StackLists)
    assert flamegraph.build(profile, group=group).samples[0] == 1
