"""Answers from what is kept: the same as from the store, whatever was asked before."""

from dataclasses import replace

import pytest

from profiler.flamegraph import flamegraph
from profiler.service.responses import Answers, NoSuchNodeError, Question
from storage.objects.tenant import TenantStore
from storage.profile import merge
from storage.query.query import Query
from storage.selector import Selector
from tests.support import profiles as some
from tests.support.stores import at, directory, minutes

HOUR = minutes(0, 60)
ALL = Question(HOUR, Selector(), by=("service",))
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


def profiles():
    for minute in range(4):
        yield at(stacks(minute), minute)
        yield at(stacks(9), minute, "web-2", "00112233445566bb")


@pytest.fixture
def new_answers(tmp_path):
    """Return answers that have nothing merged yet, over the same store and cache."""
    store = directory(tmp_path / "store", *profiles())
    return lambda: Answers(TenantStore(store), Query(TenantStore(store), tmp_path / "cache"))


def asked(answers: Answers, question: Question):
    """Return all that is said about a selection, as plain values."""
    graph = answers.flamegraph(question, go_on)
    graph["nodes"] = {name: column.tolist() for name, column in graph["nodes"].items()}
    return graph, answers.top(question, "self", 100, go_on)


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("view", [{}, {"by": ()}, {"invert": True}, {"search": "work"}])
def test_a_selection_of_what_is_merged_is_what_would_be_read(new_answers, selector, view):
    """To choose a service of a page that is there gives the answer of a link to it."""
    question = replace(ALL, selector=Selector.parse(selector), **view)
    answers = new_answers()
    answers.flamegraph(ALL, go_on)

    for _ in range(2):
        assert asked(answers, question) == asked(new_answers(), question)


def test_a_box_is_found_whatever_was_drawn_before(new_answers, monkeypatch):
    """Ids lead to their boxes when their graph is forgotten, and when it was never drawn."""
    monkeypatch.setattr("profiler.service.responses._KEPT_GRAPHS", 1)
    answers = new_answers()
    answers.flamegraph(ALL, go_on)
    graph = flamegraph.build(merge(list(profiles())), ("service",))

    for node, graph_id in enumerate(graph.ids().tolist()):
        answer = answers.flamegraph(replace(ALL, node=graph_id), go_on)
        assert answer["nodes"]["total"][0] == graph.total[node]
        names = [each["frame"][0] for each in answer["path"]]
        assert names == [frame.function for frame in graph.path(node)]
    with pytest.raises(NoSuchNodeError):
        answers.flamegraph(replace(ALL, node=12345), go_on)
