"""Flame graphs: shape, order, totals, pruning, ids, the table of functions."""

from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiler.flamegraph import flamegraph
from profiler.flamegraph.flamegraph import FlameGraph, Screen
from profiler.flamegraph.stacks import Group
from storage.columns import Columns
from storage.profile import Profile
from symbolizer.location import Frame, Kind, NamedLocation
from tests.support import profiles as some


def drawn(graph: FlameGraph) -> list[tuple[int, str, int]]:
    """Return (depth, function, samples) of each node."""
    return [
        (depth, graph.frames[frame].function, samples)
        for depth, frame, samples in zip(
            graph.depth.tolist(), graph.frame.tolist(), graph.samples.tolist(), strict=True
        )
    ]


def check(graph: FlameGraph) -> None:
    """Hold every invariant that a graph has, node by node."""
    children = np.zeros(len(graph), dtype=np.int64)
    np.add.at(children, graph.parent[1:], graph.total[1:])
    assert (graph.self + children == graph.total).all()
    assert (graph.self >= 0).all()
    assert graph.depth[0] == graph.parent[0] == 0
    for node in range(1, len(graph)):
        parent = graph.parent[node]
        assert parent < node < graph.end[node] <= graph.end[parent]
        assert graph.depth[node] == graph.depth[parent] + 1
    siblings = defaultdict(list)
    for node in range(1, len(graph)):
        frame = graph.frames[graph.frame[node]]
        siblings[graph.parent[node]].append((frame.kind is Kind.REST, -graph.total[node], frame))
    for group in siblings.values():
        assert group == sorted(group)
        assert len(group) == len({frame for _, _, frame in group})


def test_a_profile_becomes_a_tree_with_the_largest_siblings_first():
    """Inlined calls are boxes of their own; addresses without a name are their module's box."""
    graph = flamegraph.build(Columns.of(some.sample_profile()))

    assert drawn(graph) == [
        (0, "all", 16),
        (1, "main", 11),
        (2, "work", 8),
        (3, "clamp", 8),
        (4, "work", 3),
        (5, "clamp", 3),
        (6, "memcpy", 3),
        (2, "vfs_read", 2),
        (2, "[libc.so.6]", 1),
        (1, "handler", 5),
        (2, "square", 4),
        (2, "handler", 1),
    ]
    kinds = {frame.function: frame.kind for frame in graph.frames}
    assert kinds["clamp"] is Kind.INLINED
    assert kinds["vfs_read"] is Kind.KERNEL


def slow_tree(profile: Profile, by: tuple[str, ...], invert: bool) -> Counter[tuple[Frame, ...]]:
    """Total by path, the slow and obvious way, for labels that every row has."""
    totals: Counter[tuple[Frame, ...]] = Counter()
    shown = some.named_locations(profile)
    for row in profile.rows():
        frames = [
            (frame.function, frame.module, frame.kind)
            for place in row.stack
            for frame in reversed(shown[place])
        ]
        head = [(dict(row.labels)[name], "", Kind.LABEL) for name in by]
        path = head + (frames[::-1] if invert else frames)
        for end in range(len(path) + 1):
            totals[tuple(path[:end])] += row.value
    return totals


@given(some.profiles(), st.booleans(), st.booleans())
def test_every_path_has_the_total_of_its_stacks(profile, labelled, invert):
    """The vectorised tree equals one built stack by stack, inverted or not."""
    by = tuple(
        name
        for name in ("comm", "service")
        if labelled and all(dict(labels).get(name) for labels in profile.label_sets)
    )
    graph = flamegraph.build(Columns.of(profile), by, invert=invert)

    check(graph)
    totals = {
        tuple((f.function, f.module, f.kind) for f in graph.path(node)): int(graph.total[node])
        for node in range(len(graph))
    }
    expected = slow_tree(profile, by, invert) or {(): 0}
    assert totals == expected


@given(some.profiles(), st.floats(1, 2000), st.sampled_from(list(Group)))
def test_pruning_keeps_the_total_of_every_node(profile, width, group):
    """What is cut goes into a visible rest; nothing narrower than the limit is left but rests."""
    graph = flamegraph.build(Columns.of(profile), ("comm",), group)
    pruned = graph.prune(width)

    check(pruned)
    assert pruned.total[0] == graph.total[0] == profile.total_value
    assert pruned.samples[0] == profile.total_samples
    is_kept = graph.total * width >= graph.total[0] * 0.5
    is_kept[0] = True
    assert pruned.cut_nodes == np.count_nonzero(~is_kept & is_kept[graph.parent])
    assert pruned.total[is_rest(pruned)].sum() == pruned.cut_total
    kept = pruned.total[~is_rest(pruned)][1:]
    assert (kept * width >= pruned.total[0] * 0.5).all()


@given(some.profiles(), st.floats(1, 2000), st.sampled_from(list(Group)), st.booleans())
def test_a_tree_cut_while_it_grows_is_the_pruned_tree(profile, width, group, invert):
    """Who gives the screen at once gets, box by box, what pruning the whole tree gives."""
    pruned = flamegraph.build(Columns.of(profile), ("comm",), group, invert).prune(width)
    grown = flamegraph.build(Columns.of(profile), ("comm",), group, invert, Screen(width))

    check(grown)
    for name in ("depth", "parent", "end", "total", "self", "samples", "cut_nodes", "cut_total"):
        assert np.array_equal(getattr(grown, name), getattr(pruned, name)), name
    frames = [[each.frames[i] for i in each.frame.tolist()] for each in (grown, pruned)]
    assert frames[0] == frames[1]


def is_rest(graph: FlameGraph) -> np.ndarray:
    kinds = np.array([frame.kind is Kind.REST for frame in graph.frames])
    return kinds[graph.frame]


def test_pruning_drops_frames_that_are_not_drawn():
    """The table of frames that is sent holds what the nodes use, no more."""
    pruned = flamegraph.build(Columns.of(some.synthetic(300, 12))).prune(40)

    assert set(np.unique(pruned.frame)) == set(range(len(pruned.frames)))
    assert pruned.cut_nodes > 100


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        (Group.MODULE, ["api", "libc.so.6", "[kernel.kallsyms]", "[python]", "[jit]"]),
        (Group.FILE, ["api.c", "clamp.h", "api.c", "clamp.h", "libc.so.6", "[kernel.kallsyms]",
                      "libc.so.6", "app.py", "[jit]"]),
    ],
)  # fmt: skip
def test_files_and_modules_that_follow_each_other_are_one_box(group, expected):
    """Grouped coarsely, a chain of calls within one module is one box."""
    graph = flamegraph.build(Columns.of(some.sample_profile()), group=group)

    assert [function for _, function, _ in drawn(graph)][1:] == expected
    check(graph)


def test_lines_tell_boxes_of_one_function_apart():
    """Grouped by line, two lines of a function are two boxes; by function they are one."""
    lines = [NamedLocation("f", "m", Kind.PYTHON, "f.py", 1, line) for line in (3, 4)]
    profile = some.build([({}, [lines[0]], 1), ({}, [lines[1]], 2)])

    by_line = flamegraph.build(Columns.of(profile), group=Group.LINE)
    by_function = flamegraph.build(Columns.of(profile))

    lines_of = [by_line.frames[number].line for number in by_line.frame[1:]]
    assert list(zip(lines_of, by_line.samples[1:], strict=True)) == [(4, 2), (3, 1)]
    assert drawn(by_function)[1:] == [(1, "f", 3)]
    assert by_function.frames[by_function.frame[1]].file == "f.py"


def test_a_subtree_is_a_graph_of_its_own():
    """Zooming gives the node as the root, with the nodes below it."""
    graph = flamegraph.build(Columns.of(some.sample_profile()))
    handler = next(node for node, each in enumerate(drawn(graph)) if each[1] == "handler")

    subtree = graph.subtree(handler)

    assert drawn(subtree) == [(0, "handler", 5), (1, "square", 4), (1, "handler", 1)]
    check(subtree)
    check(subtree.prune(1))


def test_left_edges_tile_the_parent():
    """Siblings stand side by side from their parent's left edge on."""
    graph = flamegraph.build(Columns.of(some.sample_profile())).prune(1000)
    left = graph.left()

    expected, taken = [0] * len(graph), [0] * len(graph)
    for node in range(1, len(graph)):
        parent = graph.parent[node]
        expected[node] = expected[parent] + taken[parent]
        taken[parent] += graph.total[node]
    assert left.tolist() == expected


def fnv1a(content: bytes) -> int:
    state = 0xCBF29CE484222325
    for byte in content:
        state = (state ^ byte) * 0x100000001B3 % 2**64
    return state


@given(some.profiles())
def test_ids_are_fnv_of_the_path(profile):
    """A link names a node by its path, so that it is found in newer data."""
    graph = flamegraph.build(Columns.of(profile), ("comm",))

    expected = [
        fnv1a(
            b"\x01".join(f"{f.function}\0{f.module}\0{f.kind}".encode() for f in graph.path(node))
        )
        for node in range(len(graph))
    ]
    assert graph.ids().tolist() == expected


def test_a_stack_deeper_than_the_limit_ends_in_a_visible_node(monkeypatch):
    """Beyond the limit the frames are one node of kind rest, and no count is lost."""
    monkeypatch.setattr(flamegraph, "DEPTH_LIMIT", 5)
    places = [some.named(f"f{i}") for i in range(9)]
    graph = flamegraph.build(Columns.of(some.build([({}, places, 2), ({}, places[:5], 1)])))

    assert drawn(graph)[-2:] == [(5, "(deeper)", 2), (5, "f4", 1)]
    assert graph.depth.max() == 5
    assert graph.samples[0] == 3


def test_an_empty_profile_is_a_root_alone():
    """A window in which nothing ran is drawn, not refused."""
    graph = flamegraph.build(Columns.of(some.build([])), ("comm",))

    assert drawn(graph) == [(0, "all", 0)]
    assert flamegraph.top_functions(Columns.of(some.build([]))) == []
    assert len(graph.prune(100)) == 1
    assert graph.ids().tolist() == [0xCBF29CE484222325]


@given(some.profiles())
def test_recursion_counts_once_in_the_table(profile):
    """A function's total is the time of the stacks it is in, however often it is in them."""
    own: Counter = Counter()
    total: Counter = Counter()
    shown = some.named_locations(profile)
    for row in profile.rows():
        boxes = [
            (frame.function, frame.module, frame.kind)
            for place in row.stack
            for frame in reversed(shown[place])
        ]
        if boxes:
            own[boxes[-1]] += row.value
        total.update(dict.fromkeys(boxes, row.value))

    table = flamegraph.top_functions(Columns.of(profile))

    got = {(r.frame.function, r.frame.module, r.frame.kind): (r.self, r.total) for r in table
           if r.total}  # fmt: skip
    assert got == {box: (own[box], total[box]) for box in total}
    assert [row.self for row in table] == sorted((row.self for row in table), reverse=True)


def test_values_beyond_floats_are_exact():
    """Totals above 2^53 are not rounded."""
    places = [some.named(f"f{i}") for i in range(3)]
    profile = some.build([({}, [places[0]], 1), ({}, [places[0], places[1]], 1)])
    large = some.with_values(profile, [2**60 + 1, 2**60 + 2])
    graph = flamegraph.build(Columns.of(large))

    assert graph.total[0] == 2**61 + 3
    assert flamegraph.top_functions(Columns.of(large))[0].total in {2**61 + 3, 2**60 + 1, 2**60 + 2}
    check(graph)
