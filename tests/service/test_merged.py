"""Responses from merged profiles that are kept: the same as from the store."""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import orjson
import pytest

from profiler.flamegraph import flamegraph
from profiler.flamegraph.views import NoSuchNodeError
from profiler.service.flame_graph import flame_graph
from profiler.service.merged import Kept, MergedProfile, MergedProfiles, PanelRequest
from profiler.service.sharing import json_body
from profiler.service.top_table import top_table
from storage.columns import Columns
from storage.objects.tenant import TenantStore
from storage.query.query import Query
from storage.selector import Selector
from storage.stack_tree import StackTree
from tests.support import profiles as some
from tests.support.stores import at, directory, minutes

HOUR = minutes(0, 60)
ALL = PanelRequest(HOUR, Selector(), by=("service",))
SELECTORS = (
    '{service="api"}',
    '{service!="api"}',
    '{service=~"a.*|jobs",comm!=""}',
    '{service="api",host="web-1"}',
    '{host="web-2"}',
    '{service="nothing"}',
)


def go_on() -> None:
    """Interrupt nothing."""


def stacks(minute: int):
    return some.build(
        [
            ({"service": "api", "comm": "api"}, [some.MAIN, some.WORK], minute + 1),
            ({"service": "api", "comm": "api"}, [some.MAIN, some.READ], 3),
            ({"service": "jobs", "comm": "jobs"}, [some.HANDLER, some.named("job")], 2),
        ],
        some.NAMES,
    )


def stored_profiles():
    for minute in range(4):
        yield at(stacks(minute), minute)
        yield at(stacks(9), minute, "web-2", "00112233445566bb")


@pytest.fixture
def new_profiles(tmp_path):
    """Return a function that makes profiles with nothing merged, over the same store and cache."""
    store = TenantStore(directory(tmp_path / "store", *stored_profiles()))
    return lambda: MergedProfiles(store, Query(store, tmp_path / "cache"))


def responses(profiles: MergedProfiles, request: PanelRequest):
    """Return all panels of a selection, as plain values."""
    panels = flame_graph(profiles, request, go_on), top_table(profiles, request, "self", 100, go_on)
    return [orjson.loads(json_body(each)[0]) for each in panels]


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("view", [{}, {"by": ()}, {"invert": True}, {"search": "work"}])
def test_a_selection_from_a_merged_profile_equals_one_read_from_the_store(
    new_profiles, selector, view
):
    """Choosing a service on the page shows the same as opening a link to it."""
    request = replace(ALL, selector=Selector.parse(selector), **view)
    profiles = new_profiles()
    flame_graph(profiles, ALL, go_on)

    for _ in range(2):
        assert responses(profiles, request) == responses(new_profiles(), request)


def test_a_box_is_found_whatever_was_drawn_before(new_profiles, monkeypatch):
    """Ids lead to their boxes when their graph is forgotten, and when it was never drawn."""
    monkeypatch.setattr("profiler.service.merged.KEPT_GRAPHS", 1)
    profiles = new_profiles()
    flame_graph(profiles, ALL, go_on)
    graph = flamegraph.build(Columns.of(some.merge(list(stored_profiles()))), ("service",))

    for node, graph_id in enumerate(graph.ids().tolist()):
        zoomed = flame_graph(profiles, replace(ALL, node=graph_id), go_on)
        assert zoomed.nodes.total[0] == graph.total[node]
        names = [each.frame[0] for each in zoomed.path]
        assert names == [frame.function for frame in graph.path(node)]
    with pytest.raises(NoSuchNodeError):
        flame_graph(profiles, replace(ALL, node=12345), go_on)


class Sized(NamedTuple):
    number: int
    words: int


@pytest.fixture
def eager_threads():
    """Let threads take turns as often as the interpreter can."""
    usual_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual_s)


def test_what_is_kept_may_be_used_and_dropped_by_many_threads(eager_threads):
    """One thread uses a value while another drops it to make room, or adds up all of them."""
    kept: Kept[int, Sized] = Kept(limit_words=200)

    def use(thread: int) -> int:
        found = 0
        for i in range(20_000):
            key = (i * (thread + 1)) % 40
            known = kept.get(key)
            if known is None:
                kept.put(key, Sized(key, 10))
            else:
                assert known.number == key
                found += 1
        return found

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(use, range(6)))

    assert all(found)


def test_locations_take_room_as_stacks_do(new_profiles):
    """A profile of few stacks may name many locations, each as large as thirty words of stacks."""
    merged = new_profiles().merge(ALL, go_on)

    profile = merged.answer.profile
    assert merged.words >= len(profile.stack_words) + 20 * len(profile.locations)


def test_a_tree_takes_the_room_of_what_is_made_of_it(new_profiles):
    """Nodes of their own below each label, and lists that a file was made of."""
    shared = [some.named(f"shared_{i}") for i in range(40)]
    deep = Columns.of(
        some.build([({"comm": f"{i}"}, [*shared, some.named(f"leaf_{i}")], 1) for i in range(200)])
    )
    tree = replace(deep, stacks=StackTree.of(deep.stacks))
    answer = new_profiles().merge(ALL, go_on).answer
    merged = MergedProfile(replace(answer, profile=tree))
    alone = merged.words

    merged.view(ALL)
    merged.view(replace(ALL, invert=True))
    assert merged.words == alone
    merged.select(Selector.parse('{comm!=""}')).view(replace(ALL, by=("comm",)))
    labelled = merged.words
    assert labelled > alone + len(deep.stack_words)
    assert len(tree.stack_words) == len(deep.stack_words)
    assert merged.words == labelled + len(deep.stack_words)


def test_the_values_used_last_are_kept():
    """As many as there is room for, and one of any size."""
    kept: Kept[int, Sized] = Kept(limit_words=25)
    for number in (1, 2):
        kept.put(number, Sized(number, 10))

    assert kept.get(1) == Sized(1, 10)
    kept.put(3, Sized(3, 10))
    assert [kept.get(number) is not None for number in (1, 2, 3)] == [True, False, True]
    kept.put(4, Sized(4, 1000))
    assert [kept.get(number) is not None for number in (1, 3, 4)] == [False, False, True]
