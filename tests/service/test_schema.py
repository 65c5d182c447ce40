"""openapi.json against the running service: all that it says, and what must be refused by it."""

import json
import time
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from schemathesis.specs.openapi.checks import negative_data_rejection

from profiler.flamegraph import flamegraph
from profiler.service.parameters import schemas_of
from profiler.service.schema import ENDPOINTS, document
from profiler.times import rfc3339
from storage.columns import Columns
from storage.profile import Profile, Window, make_labels
from tests.support.services import profile_of, service
from tests.support.stores import directory

NOW_S = int(time.time()) // 60 * 60
LABELS = ("service", "comm", "host", "version", "ünïcode", "no such")
VALUES = ("api", "jobs", "a.*", "", '"', "\\", "\u202e", "😀")

GRAPH = flamegraph.build(Columns.of(profile_of(0)), ("service",))
FUNCTIONS = [frame.function for frame in GRAPH.frames]
EXAMPLES = {
    "node": [f"{node:016x}" for node in GRAPH.ids().tolist()],
    "callers": FUNCTIONS,
    "search": FUNCTIONS,
    "focus": [[function] for function in FUNCTIONS],
    "hide": [[function] for function in FUNCTIONS],
}
"""Of what is there; chance alone would seldom meet it."""


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def selectors() -> st.SearchStrategy[str]:
    pairs = st.tuples(st.sampled_from(LABELS), st.sampled_from(("=", "!=", "=~", "!~")))
    matcher = st.builds(
        lambda pair, value: f"{quoted(pair[0])}{pair[1]}{quoted(value)}",
        pairs,
        st.sampled_from([value for value in VALUES if value != "\\"]),
    )
    return st.lists(matcher, max_size=4).map(lambda each: "{" + ",".join(each) + "}")


def moments(first_min: int, last_min: int) -> st.SearchStrategy[str]:
    """Return times so many minutes ago, as people write them."""
    seconds = st.integers(NOW_S - first_min * 60, NOW_S - last_min * 60)
    ago = st.integers(last_min, first_min)
    return st.one_of(
        seconds.map(str),
        seconds.map(lambda second: f"{second}123"),
        seconds.map(lambda second: rfc3339(second * 10**9)),
        ago.map(lambda minutes: f"now-{minutes}m"),
    )


# No two of them make an empty window, whether both are given or only one is, and also where an hour
# of other tests has passed since NOW_S.
schemathesis.openapi.format("from moment", moments(160, 100))
schemathesis.openapi.format("until moment", moments(30, 0))
schemathesis.openapi.format("before_from moment", moments(400, 330))
schemathesis.openapi.format("before_until moment", moments(250, 221))
schemathesis.openapi.format("selector", selectors())
schemathesis.openapi.format("gate", st.sampled_from(("relative>=5%", "share>=1pp,relative>=0%")))
schemathesis.openapi.format("step", st.sampled_from(("4s", "60s", "1m30s", "5000", "1h")))


def strict(schema: Any) -> Any:
    """Return a schema whose objects have only the fields it names, and whose windows are not empty.

    Which of two times comes first cannot be said in a schema.
    """
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    copied = {name: strict(each) for name, each in schema.items()}
    name = copied["name"] if "in" in copied else ""
    if name in ("from", "until", "before_from", "before_until"):
        copied["schema"] = {"type": "string", "format": f"{name} moment"}
    elif name in EXAMPLES:
        copied["examples"] = {str(i): {"value": each} for i, each in enumerate(EXAMPLES[name])}
    if "properties" in copied:
        copied.setdefault("additionalProperties", False)
    return copied


schema = schemathesis.openapi.from_dict(strict(document("1")))


def recent(minute: int) -> Profile:
    """Return the profile of so many minutes ago."""
    start_ns = (NOW_S - minute * 60) * 10**9
    profile = profile_of(minute)
    present = {make_labels({"service": service}): 60 * 10**9 for service in ("api", "jobs")}
    accounting = replace(profile.accounting, services=present)
    window = Window(start_ns, start_ns + 60 * 10**9)
    return replace(profile, window=window, accounting=accounting)


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    folder = tmp_path_factory.mktemp("openapi")
    directory(folder / "store", *map(recent, range(5, 240, 5)))
    with service(folder) as (_, client):
        yield client


def described(endpoint: str):
    """Return the test of an endpoint: a function of its own, as workers tell tests by their names.

    Schemathesis calls those of all endpoints by one.
    """

    @schema.include(operation_id=endpoint).parametrize()
    @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
    def test_endpoint(case, client):
        """Responses match their schema, wrong parameters are refused, and nothing is a 500."""
        response = case.call(base_url=client.url)
        sent = parse_qsl(urlsplit(response.request.url).query, keep_blank_values=True)
        # An empty value counts as none; what a schema forbids may be sent as one.
        has_empty = any(value == "" for _, value in sent)
        case.validate_response(response, excluded_checks=[negative_data_rejection] * has_empty)

    return test_endpoint


for each in ENDPOINTS:
    globals()[f"test_{each}_is_as_its_description_says"] = described(each)


ENDLESS = "{" + ",".join(['service="a"'] * 2000) + "}"
BAD = {
    "query": [
        *("{", "service", "{service}", "{service=~}", "\0", "{" * 4000),
        *('{service=~"("}', '{a=~"(a{999}){999}"}', '{"\0"="a"}', '{a="\\ud800"}'),
        *('{a=~"' + "x" * 4000 + '"}', ENDLESS),
    ],
    "from": [
        *("yesterday", "-1", "nan", "inf", "1e3", "9" * 13, "9" * 4000, "now-", "now+1y", "0x10"),
        *("2026-02-30T00:00:00Z", "2026-01-01T00:00:00", "now-999999999w", "٣", "now\0"),
    ],
    "before_from": ["yesterday", "-1", "now+1w", "2026-02-30T00:00:00Z", "now\0"],
    "before_until": ["yesterday", "0", "NaN", "99999999999999"],
    "fail_over": ["10%", "relative>=10pp", "share>=-1pp", "relative>10%", "x" * 5000, "\0"],
    "until": [
        "yesterday",
        "0",
        "now-2h",
        "now-1h",
        "-1",
        "NaN",
        "99999999999999",
        "now+999999999w",
    ],
    "before_query": ["{", "service", "{service=~}", "\0", ENDLESS],
    "type": ["CPU", "memory", "cpu,samples", "\0"],
    "by": ["a,b,c,d,e,f,g,h,i", "\0", "x" * 5000],
    "group": ["thread", "FUNCTION", "function,line"],
    "node": ["xyz", "0" * 15, "0" * 17, "CBF29CE484222325", "-000000000000001", "٣" * 16, "0x" * 8],
    "invert": ["yes", "2", "-1", "true"],
    "python_native": ["yes", "2", "-1", "true"],
    "callers": ["x" * 5000, "\0"],
    "focus": ["x" * 5000, "a\0b"],
    "hide": ["x" * 5000, "a\0b", ["a"] * 41],
    "search": ["x" * 5000, "\0"],
    "width": ["0", "99", "10001", "-1", "1e3", "nan", "inf", "1200.5", "9" * 30, "٣٣٣", " 500 px"],
    "sort": ["cpu", "SELF", "self,total"],
    "trend": ["yes", "2", "-1", "true"],
    "limit": ["0", "-1", "10001", "nan", "inf", "1e2", "9" * 30, "٣"],
    "step": ["0", "-1", "-60s", "nan", "inf", "60 s", "1y", "0s", "9" * 4000, "999999999w", "٣"],
}


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_values_that_mean_nothing_are_refused(endpoint, client):
    """By every endpoint that takes the parameter, which is named; so are others, and any twice."""
    path = ENDPOINTS[endpoint].path.replace("{name}", "cpu.folded")
    taken = schemas_of(ENDPOINTS[endpoint].parameters)
    wrong = [(name, value) for name in taken for value in BAD[name]]
    wrong += [("unknown", "1"), ("QUERY", "{}"), ("query[]", "{}"), ("", ""), ("\u202e", "")]
    wrong += [(name, ["1", "1"]) for name in taken if name not in ("focus", "hide")]

    for name, value in wrong:
        status, headers, body = client.get(path, **{name: value})

        assert (status, headers["content-type"]) == (400, "application/problem+json"), (name, value)
        problem = json.loads(body)
        about = {name, name.replace("until", "from")}
        assert problem["parameter"] in about, (name, value)
        assert problem["detail"]


@pytest.mark.parametrize(
    "query", ["query=%ff", "%ff=1", "focus=%c3%28", "&".join(["focus=a"] * 101)]
)
def test_query_strings_that_are_no_text_or_too_many_are_refused(query, client):
    status, headers, body = client.get("/api/v1/flamegraph", raw_query=query)

    assert (status, headers["content-type"]) == (400, "application/problem+json")
    assert json.loads(body)["title"] == "Bad request"


@pytest.mark.parametrize(
    "parameters",
    [
        {"from": "0", "until": "9223372036"},
        {"from": "0.000000001", "until": "0.000000002"},
        {"width": "10000", "by": "a,b,c,d,e,f,g,h", "search": "x" * 4096},
        {"by": ",,,service,,,", "callers": "", "focus": "", "hide": "", "search": ""},
        {"focus": ["main", "work"] * 20, "hide": ["handler"] * 40},
        {"query": '{service=~"' + "(a|b)*" * 100 + '"}'},
        {"query": '{"\u202e"!="\u202e",service!~"^$"}'},
    ],
)
@pytest.mark.parametrize("endpoint", ["flamegraph", "top", "timeline", "export"])
def test_extreme_values_that_are_valid_are_accepted(endpoint, parameters, client):
    taken = schemas_of(ENDPOINTS[endpoint].parameters)
    path = ENDPOINTS[endpoint].path.replace("{name}", "cpu.folded")

    status, _, _ = client.get(path, **{k: v for k, v in parameters.items() if k in taken})

    assert status == 200
