"""Views: files hold what the screen shows, to the last count, in every format."""

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiler.flamegraph import flamegraph
from profiler.flamegraph.paths import Paths
from profiler.flamegraph.stacks import Group
from profiler.flamegraph.views import NoSuchNodeError, View
from profiler.formats import export
from profiler.formats.reading import read_bytes
from storage.columns import Columns
from storage.formats import pprof
from symbolizer.location import AddressLocation, Kind
from tests.support import profiles as some

PROFILE = Columns.of(some.sample_profile())
FUNCTIONS = tuple(row.frame.function for row in flamegraph.top_functions(PROFILE))
names = st.sampled_from((*FUNCTIONS, "no such function"))
views = st.builds(
    View,
    by=st.sampled_from(((), ("comm",), ("service", "comm"))),
    group=st.sampled_from(Group),
    invert=st.booleans(),
    callers=st.one_of(st.just(""), names),
    focus=st.lists(names, max_size=2).map(tuple),
    hide=st.lists(names, max_size=2).map(tuple),
)


def graph_of(view: View) -> flamegraph.FlameGraph:
    return flamegraph.draw(view.of(Paths.of(PROFILE, view.by, view.group)))


def tree(graph: flamegraph.FlameGraph, at: int = 0) -> dict:
    """Return what can be compared: totals by the functions that lead to them."""
    return {
        tuple(frame.function for frame in graph.path(node)): int(graph.total[node])
        for node in range(len(graph))
        if at in lineage(graph, node)
    }


def lineage(graph: flamegraph.FlameGraph, node: int) -> set[int]:
    found = {node}
    while node:
        node = int(graph.parent[node])
        found.add(node)
    return found


@given(views)
def test_the_graph_of_what_is_shown_is_the_graph_that_is_shown(view: View) -> None:
    """Whatever is hidden, turned, grouped: a file draws the same tree, root of callers included."""
    graph = graph_of(view)

    shown = view.shown(PROFILE)
    drawn = flamegraph.build(shown.profile, shown.by)

    first = (view.callers,) if view.callers and graph.total[0] else ()
    expected = {(*first, *path): total for path, total in tree(graph).items()}
    expected.setdefault((), int(graph.total[0]))
    assert tree(drawn) == expected


@given(views, st.integers(0, 10**6))
def test_a_node_keeps_what_goes_through_it(view: View, number: int) -> None:
    """With what stands above it, so that nobody has to guess where it was."""
    graph = graph_of(view)
    node = number % len(graph)

    shown = view.shown(PROFILE, int(graph.ids()[node]))

    assert shown.profile.total_value == graph.total[node]
    drawn = flamegraph.build(shown.profile, shown.by)
    first = (view.callers,) if view.callers and graph.total[0] else ()
    for path, total in tree(graph, node).items():
        assert tree(drawn)[(*first, *path)] == total


def test_a_node_that_is_not_there_is_told() -> None:
    with pytest.raises(NoSuchNodeError, match="0000000000000001"):
        View().shown(PROFILE, 1)


@pytest.mark.parametrize("view", [View(), View(focus=(FUNCTIONS[0],))])
def test_stacks_that_are_kept_keep_their_addresses(view: View) -> None:
    """And pprof their build ids and labels; the accounting stays that of all that was sampled."""
    shown = view.shown(PROFILE).profile.to_profile()

    counts = PROFILE.to_profile().counts()
    assert shown.counts().items() <= counts.items()
    assert any(isinstance(place, AddressLocation) for place in shown.locations)
    assert pprof.decode(pprof.encode(shown)) == shown
    assert shown.accounting == PROFILE.accounting


@given(views)
def test_all_formats_agree_on_a_view(view: View) -> None:
    """Samples and values are those of the screen in every file."""
    graph = graph_of(view)
    shown = view.shown(PROFILE)

    def read(ending: str) -> bytes:
        return export.encode(shown.profile, f"cpu.{ending}", shown.by)

    by_json = orjson.loads(read("json"))
    assert by_json["total"] == pprof.decode(read("pb.gz")).total_value == graph.total[0]
    assert read_bytes(read("speedscope.json")).profile.total_value == graph.total[0]
    assert read_bytes(read("folded")).profile.total_samples == graph.samples[0]
    assert read("svg").startswith(b"<svg")
    hidden = {(name, kind) for name in view.hide for kind in set(Kind) - {Kind.LABEL}}
    if view.group is Group.FUNCTION and not view.callers:
        assert not hidden & {(frame[0], Kind(frame[2])) for frame in by_json["frames"]}


def test_a_view_of_nothing_is_nothing() -> None:
    empty = Columns.of(some.build([], some.NAMES))

    for view in (View(focus=("a",)), View(callers="a"), View(hide=("a",), invert=True)):
        shown = view.shown(empty).profile
        assert shown.total_samples == 0
        assert np.array_equal(shown.stack_offsets, [0])
