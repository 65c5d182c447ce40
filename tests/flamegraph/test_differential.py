"""The union of two flame graphs: its sums, its widths, its symmetry, and what is coloured in it."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profiler.comparison import comparison
from profiler.comparison.verdict import Change, NoiseSource
from profiler.flamegraph import flamegraph
from profiler.flamegraph.differential import VERDICTS, Pair, UnionGraph
from profiler.flamegraph.flamegraph import Screen
from profiler.flamegraph.paths import Paths
from profiler.flamegraph.stacks import Group
from profiler.flamegraph.views import View, path_to
from storage.columns import Columns
from storage.merging import merge_columns
from storage.profile import Profile
from symbolizer.location import Frame
from tests.support import profiles as some

API = {"service": "api", "comm": "api"}
FUNCTIONS = [some.named(name) for name in ("main", "handle", "parse", "copy", "send")]
MIRRORED = {"more": "less", "less": "more", "new": "gone", "gone": "new"}
VIEWS = (
    View(),
    View(("service",)),
    View(("service",), invert=True),
    View(group=Group.MODULE),
    View(group=Group.LINE),
    View(focus=("parse",)),
    View(("service",), hide=("handle",)),
    View(callers="copy"),
)

stacks = st.lists(
    st.tuples(
        st.sampled_from([API, {"service": "jobs", "comm": "jobs"}]),
        st.lists(st.sampled_from(FUNCTIONS), min_size=1, max_size=4),
        st.integers(1, 500),
    ),
    min_size=1,
    max_size=12,
)
sides = stacks.map(some.build)


def pair_of(before: Profile, after: Profile, runs: int = 4) -> Pair:
    """Compare runs of two profiles that vary a little, in the same way on both sides."""
    sides = [replicates(profile, runs) for profile in (before, after)]
    return Pair(comparison.of_profiles(*sides), *map(merge_columns, sides))


def replicates(profile: Profile, runs: int) -> list[Columns]:
    return [
        Columns.of(
            dataclasses.replace(profile, row_samples=samples, row_values=samples * some.PERIOD_NS)
        )
        for factor in (1.05, 0.95, 1.03, 0.97)[:runs]
        for samples in [np.rint(profile.row_samples * factor).astype(np.int64)]
    ]


def drawn(pair: Pair, view: View, screen: Screen | None = None) -> UnionGraph:
    return pair.draw(pair.view(view), [], screen)


def by_path(graph: UnionGraph) -> dict[tuple[Frame, ...], int]:
    """Return the number of each node by its path; files are no part of a box."""
    paths: list[tuple[Frame, ...]] = []
    for i, frame in enumerate(graph.frame.tolist()):
        above = paths[graph.parent[i]] if i else ()
        paths.append((*above, graph.frames[frame]))
    return {path: i for i, path in enumerate(paths)}


def verdicts(graph: UnionGraph) -> dict[str, str]:
    """Return what is said of nodes that something is said of, by the names that lead there."""
    found = {path: VERDICTS[graph.verdict[i]] for path, i in by_path(graph).items()}
    return {
        ";".join(frame.function for frame in path[1:]): verdict
        for path, verdict in found.items()
        if verdict != "unchanged"
    }


@settings(max_examples=50)
@given(before=sides, after=sides)
def test_each_side_is_its_own_flame_graph(before, after):
    """A node of the union has on each side the total that it has in that side's graph, or none."""
    pair = pair_of(before, after, runs=1)

    for view in VIEWS:
        graph = drawn(pair, view)
        # The root of a function's callers has a place only where the function is.
        nodes = {path[1:]: i for path, i in by_path(graph).items()}
        for profile, totals, samples in (
            (pair.before, graph.before, graph.before_samples),
            (pair.after, graph.after, graph.after_samples),
        ):
            paths = view.of(Paths.of(profile, view.by, view.group))
            alone = flamegraph.draw(paths)
            where = [nodes[path[1:]] for path in by_path(alone)]
            assert totals[where].tolist() == alone.total.tolist()
            assert samples[where].tolist() == alone.samples.tolist()
            others = np.setdiff1d(np.arange(len(graph)), where)
            assert not totals[others].any()


@pytest.mark.parametrize("screen", [None, Screen(100, 20)])
@given(before=sides, after=sides)
def test_the_union_nests_and_stands_in_order(screen, before, after):
    """Own time and children make a node on both sides; siblings stand by width, the rest last."""
    pair = pair_of(before, after, runs=1)
    graph = drawn(pair, View(("service",)), screen)

    assert graph.before[0] == pair.before.total_value
    assert graph.after[0] == pair.after.total_value
    children: dict[int, list[int]] = {}
    for i in range(1, len(graph)):
        children.setdefault(int(graph.parent[i]), []).append(i)
    widths = graph.before * pair.scale.before + graph.after * pair.scale.after
    for parent in range(len(graph)):
        below = children.get(parent, [])
        for total, own in ((graph.before, graph.before_self), (graph.after, graph.after_self)):
            assert total[parent] == own[parent] + total[below].sum()
            assert own[parent] >= 0
        drawn_ones = [i for i in below if graph.frames[graph.frame[i]] != flamegraph.REST]
        assert below[: len(drawn_ones)] == drawn_ones
        for one, other in itertools.pairwise(drawn_ones):
            names = [graph.frames[graph.frame[i]] for i in (one, other)]
            assert (-widths[one], names[0]) < (-widths[other], names[1])
        if screen:
            least = widths[0] * screen.least_px / screen.width_px
            assert all(widths[i] >= least for i in drawn_ones)


@settings(max_examples=25)
@given(profile=sides)
def test_nothing_has_changed_in_what_is_compared_with_itself(profile):
    pair = pair_of(profile, profile)

    for view in VIEWS:
        assert not drawn(pair, view).verdict.any()
    assert not pair.moved
    assert not pair.reasons(pair.found.functions)


@settings(max_examples=25)
@given(before=sides, after=sides)
def test_swapped_sides_are_mirrored(before, after):
    """More becomes less, new becomes gone, moved stays; the shape is the same."""
    one, other = pair_of(before, after), pair_of(after, before)

    assert one.moved == other.moved
    for view in VIEWS:
        graph, mirror = drawn(one, view), drawn(other, view)
        assert {k: MIRRORED.get(v, v) for k, v in verdicts(graph).items()} == verdicts(mirror)
        assert graph.before.tolist() == mirror.after.tolist()
        assert graph.after.tolist() == mirror.before.tolist()


@settings(max_examples=25)
@given(before=sides, after=sides)
def test_verdicts_are_those_of_functions_and_go_the_same_way(before, after):
    """What is coloured is its function's own change, on nodes whose own time went that way."""
    pair = pair_of(before, after)
    graph = drawn(pair, View(("service",)))

    changes = {each.frame[:3]: each.change for each in pair.found.functions}
    common = 1 + pair.found.common.relative
    own = (
        graph.before_self * pair.scale.before * common,
        graph.after_self * pair.scale.after,
    )
    for i, verdict in enumerate(VERDICTS[number] for number in graph.verdict.tolist()):
        if verdict == "moved":
            assert graph.frames[graph.frame[i]][:3] in pair.moved
        elif verdict != "unchanged":
            assert verdict == changes[graph.frames[graph.frame[i]][:3]]
            assert (own[1][i] > own[0][i]) == (verdict in ("more", "new"))


def steady(*changed: tuple[list[some.Location], int, int]) -> Pair:
    """Compare two profiles of 20 functions that cost the same, and some stacks that do not."""
    both = [(API, [FUNCTIONS[0], FUNCTIONS[1], some.named(f"steady_{i}")], 2000) for i in range(20)]
    sides = [
        some.build(
            [*both, *((API, stack, counts[side]) for stack, *counts in changed if counts[side])]
        )
        for side in (0, 1)
    ]
    return pair_of(*sides)


MAIN, HANDLE, PARSE, COPY, SEND = FUNCTIONS


def test_only_the_changed_function_itself_is_coloured():
    """Its ancestors are not, and neither is what it calls."""
    pair = steady(([MAIN, PARSE], 1000, 3000), ([MAIN, PARSE, COPY], 800, 800))

    assert verdicts(drawn(pair, View())) == {"main;parse": "more"}
    assert verdicts(drawn(pair, View(invert=True))) == {"parse": "more"}
    assert verdicts(drawn(pair, View(callers="parse"))) == {"": "more"}


def test_new_and_gone_functions_are_said_to_be():
    pair = steady(([MAIN, PARSE], 0, 1500), ([MAIN, COPY], 1500, 0))

    assert verdicts(drawn(pair, View())) == {"main;parse": "new", "main;copy": "gone"}


def test_cost_that_changes_callers_is_moved_not_new():
    """A function that costs the same, under a new caller: both places say so."""
    pair = steady(([MAIN, PARSE, COPY], 2000, 100), ([MAIN, SEND, COPY], 0, 1900))

    assert verdicts(drawn(pair, View())) == {
        "main;parse;copy": "moved",
        "main;send;copy": "moved",
    }
    assert {name for name, *_ in pair.moved} == {"copy"}
    assert verdicts(drawn(pair, View(invert=True))) == {"copy": "moved"}


def test_cost_that_varies_between_callers_is_not_moved():
    """Every function divides its time a little differently: that is no news of one of them."""
    varying = []
    for i in range(30):
        more, less = (1300, 700) if i % 2 else (700, 1300)
        varying.append(([MAIN, PARSE, some.named(f"shared_{i}")], 1000, more))
        varying.append(([MAIN, SEND, some.named(f"shared_{i}")], 1000, less))

    assert steady(*varying[:2]).moved
    assert not steady(*varying).moved
    assert verdicts(drawn(steady(*varying), View())) == {}


def test_a_new_caller_that_all_others_make_room_for_is_not_moved():
    """Each of them may be noise: what moved must be seen to leave as well as to arrive."""
    callers = [some.named(f"caller_{i}") for i in range(10)]
    pair = steady(
        *(([MAIN, caller, COPY], 1000, 800) for caller in callers), ([MAIN, SEND, COPY], 0, 2000)
    )

    assert {each.frame.function: each.change for each in pair.found.functions}[
        "copy"
    ] == "unchanged"
    assert not pair.moved


def test_an_ancestor_knows_whose_change_its_own_is():
    """The largest first; the changed function itself has no such reason."""
    pair = steady(
        ([MAIN, HANDLE, PARSE], 1000, 4000),
        ([MAIN, HANDLE, COPY], 500, 2000),
        ([MAIN, SEND], 3000, 3000),
    )

    reasons = pair.reasons(pair.found.functions)

    named = {key[0]: [each.frame.function for each in found] for key, found in reasons.items()}
    assert named == {"main": ["parse", "copy"], "handle": ["parse", "copy"]}
    parse = reasons[MAIN.function, MAIN.module, MAIN.kind][0]
    assert (parse.before, parse.after) == (4000 * some.PERIOD_NS, 16_000 * some.PERIOD_NS)
    assert not pair.reasons([])


def test_too_little_data_is_said_of_every_node():
    pair = pair_of(some.sample_profile(), some.sample_profile(), runs=1)

    assert pair.found.source == NoiseSource.NONE
    assert set(drawn(pair, View()).verdict.tolist()) == {VERDICTS.index("too little data")}


def test_boxes_are_as_wide_as_both_sides_together_a_host():
    """A side that was observed twice as long weighs half as much."""
    pair = steady()
    twice = dataclasses.replace(pair.found.after, present_s=pair.found.after.present_s * 2)
    pair = Pair(dataclasses.replace(pair.found, after=twice), pair.before, pair.after)

    assert pair.scale.before == pytest.approx(2 * pair.scale.after)
    assert pair.scale.before * 1e9 * pair.found.before.present_s.sum() == pytest.approx(1)


def test_a_zoom_shows_what_stands_on_the_node():
    """It is found by the id that the node has in a flame graph of one side."""
    pair = steady(([MAIN, PARSE], 1000, 3000), ([MAIN, PARSE, COPY], 800, 800))
    alone = flamegraph.build(pair.before)
    node = next(i for i in range(len(alone)) if alone.frames[alone.frame[i]].function == "parse")
    shown = pair.view(View())

    path = path_to(shown.paths, int(alone.ids()[node]))
    graph = pair.draw(shown, [box for _, box in path], None)

    assert [graph.frames[i].function for i in graph.frame.tolist()] == ["parse", "copy"]
    assert graph.before_samples.tolist() == [7200, 3200]
    assert graph.after_samples.tolist() == [15_200, 3200]
    assert [VERDICTS[i] for i in graph.verdict.tolist()] == ["more", "unchanged"]
    assert shown.sums_along([box for _, box in path])[-1]["after_samples"] == 15_200


@pytest.mark.parametrize("change", Change)
def test_every_change_has_its_name_in_graphs(change):
    assert change in VERDICTS
