"""Comparisons over HTTP: a real service, a fleet whose last minutes run another version."""

import dataclasses
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from profiler.comparison.announcements import announce
from profiler.comparison.gate import Gate
from profiler.comparison.sides import Operand
from profiler.flamegraph import flamegraph
from profiler.flamegraph.stacks import Stacks
from profiler.service import merged
from profiler.service.comparisons import Comparisons
from profiler.service.diff import diff_graph
from profiler.service.merged import MergedProfiles, PanelRequest
from profiler.service.sharing import json_body
from storage.columns import Columns
from storage.objects.directory import DirectoryStore
from storage.objects.keys import StoredObject
from storage.objects.tenant import TenantStore
from storage.profile import Integers, Profile
from storage.query.query import Query
from storage.selector import Selector
from tests.support import profiles as some
from tests.support.live import wait_for
from tests.support.services import service
from tests.support.stores import MINUTE_NS, START_NS, at, directory, minutes, put

EVERFLAME = Path(sys.executable).with_name("everflame")
LENGTH, END = 4, 60
API = {"query": '{service="api"}'}
MAIN, OLD, NEW, SHARED = map(some.named, ("main", "old_path", "new_path", "shared"))


def times(first: int, last: int, prefix: str = "") -> dict[str, str]:
    """Return the parameters of a window in minutes."""
    start_ms, end_ms = ((START_NS + each * MINUTE_NS) // 1_000_000 for each in (first, last))
    return {f"{prefix}from": str(start_ms), f"{prefix}until": str(end_ms)}


AFTER, BEFORE = times(END - LENGTH, END), times(END - 2 * LENGTH, END - LENGTH, "before_")
BOTH = {**API, **AFTER, **BEFORE}


def minute(rng, number: int, host: int) -> Profile:
    """A minute of a service: from the last ones on `function_3` costs half as much again, and
    `shared` has another caller."""
    is_new = number >= END - LENGTH
    version = "2" if is_new else "1"
    rates = 3000 / np.arange(1, 25) * np.exp(rng.normal(0, 0.05, 24))
    rates[3] *= 1.5 if is_new else 1
    api = {"service": "api", "version": version, "comm": "api"}
    stacks = [
        (api, [MAIN, some.named(f"function_{i}")], int(samples))
        for i, samples in enumerate(rng.poisson(rates))
    ]
    stacks.append((api, [MAIN, NEW if is_new else OLD, SHARED], int(rng.poisson(800))))
    if host == 0 or is_new:
        stacks.append(({"service": "edge", "version": "7", "comm": "edge"}, [MAIN], 300 + host))
    if host == 0:
        stacks.append(({"service": "jobs", "version": "5", "comm": "jobs"}, [MAIN], 200))
    profile = some.build([stack for stack in stacks if stack[2]])
    present = {
        some.make_labels({k: labels[k] for k in ("service", "version")}): MINUTE_NS
        for labels, *_ in stacks
    }
    accounting = dataclasses.replace(profile.accounting, services=present)
    return at(
        dataclasses.replace(profile, accounting=accounting), number, f"web-{host}", f"{host:016x}"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    rng = np.random.default_rng(7)
    folder = tmp_path_factory.mktemp("diff")
    directory(folder / "store", *(minute(rng, i, host) for i in range(END) for host in range(2)))
    return folder


@pytest.fixture(scope="module")
def client(folder):
    with service(folder) as (_, client):
        yield client


def problem(client, status: int, **parameters):
    code, headers, body = client.get("/api/v1/diff", **parameters)
    assert (code, headers["content-type"]) == (status, "application/problem+json"), body
    return json.loads(body)


def coloured(graph) -> dict[str, str]:
    """Return what is said of nodes that something is said of, by the names that lead there."""
    nodes, path, found = graph["nodes"], [], {}
    for frame, depth, verdict in zip(nodes["frame"], nodes["depth"], nodes["verdict"], strict=True):
        path[depth:] = [graph["frames"][frame][0]]
        if graph["verdicts"][verdict] != "unchanged":
            found[";".join(path[1:])] = graph["verdicts"][verdict]
    return found


def command(
    folder: Path, *arguments: str, query: str = API["query"]
) -> subprocess.CompletedProcess[bytes]:
    sides = [
        f"{query}@{window[f'{prefix}from']}..{window[f'{prefix}until']}"
        for prefix, window in (("before_", BEFORE), ("", AFTER))
    ]
    return subprocess.run(
        [EVERFLAME, "diff", sides[0], "--", sides[1], f"--store={folder / 'store'}", *arguments],
        check=False,
        capture_output=True,
        timeout=60,
    )


def test_both_sides_are_those_of_their_own_flame_graphs(client):
    """Totals, samples, coverage; and at every node the sums of what stands on it."""
    graph = client.json("diff", **BOTH)

    before = {name.removeprefix("before_"): value for name, value in BEFORE.items()}
    alone = [client.json("flamegraph", **API, **window) for window in (before, AFTER)]
    nodes = graph["nodes"]
    for name, side in zip(("before", "after"), alone, strict=True):
        assert graph["totals"][name] == nodes[name][0] == side["total"]
        assert graph[name]["samples"] == nodes[f"{name}_samples"][0] == side["samples"]
        assert graph[name]["coverage"] == side["coverage"]
        assert graph[name]["window"] == side["window"]
        assert graph[name]["hosts"] == ["web-0", "web-1"]
        # Cores a host: the scale times the nanoseconds.
        assert graph["scale"][name] * graph["totals"][name] == pytest.approx(graph[name]["cores"])
    assert (graph["before"]["versions"], graph["after"]["versions"]) == (["1"], ["2"])
    assert {tuple(frame) for side in alone for frame in side["frames"]} == set(
        map(tuple, graph["frames"])
    )


def test_what_changed_is_coloured_and_nothing_else(client):
    """The slower function, and the one whose callers are others."""
    graph = client.json("diff", **BOTH)

    assert (graph["verdict"], graph["exit_code"]) == ("regression", 1)
    assert graph["noise"]["source"] == "history"
    assert coloured(graph) == {
        "api;main;function_3": "more",
        "api;main;old_path;shared": "moved",
        "api;main;new_path;shared": "moved",
    }
    inverted = client.json("diff", invert="1", **BOTH)
    assert coloured(inverted) == {"api;function_3": "more", "api;shared": "moved"}


def test_the_other_way_round_it_is_an_improvement(client):
    swapped = {
        **API,
        **times(END - 2 * LENGTH, END - LENGTH),
        **times(END - LENGTH, END, "before_"),
    }

    graph = client.json("diff", **swapped)

    assert graph["verdict"] == "improvement"
    assert coloured(graph) == {
        "api;main;function_3": "less",
        "api;main;old_path;shared": "moved",
        "api;main;new_path;shared": "moved",
    }


def test_the_table_is_that_of_the_command_and_says_whose_change_a_total_is(client, folder):
    table = client.json("diff/top", limit="1000", **BOTH)

    said = json.loads(command(folder, "--json").stdout)
    moved = {row["function"]: row.pop("moved") for row in table["functions"]}
    because = {row["function"]: row["total"].pop("because") for row in table["functions"]}
    assert table["functions"] == said["functions"]
    assert table["rows"] == len(said["functions"])
    for name in ("verdict", "exit_code", "noise", "common_change", "warnings"):
        assert table[name] == said[name]
    assert [name for name, has_moved in moved.items() if has_moved] == ["shared"]
    (reason,) = because["main"]
    (slower,) = (row for row in said["functions"] if row["function"] == "function_3")
    assert reason["function"] == "function_3"
    assert {name: reason[name] for name in ("before", "after")} == slower["self"]
    assert not because["function_3"]


def test_the_table_is_searched_and_cut(client):
    whole = client.json("diff/top", limit="1000", search="FUNCTION_1", **BOTH)
    cut = client.json("diff/top", limit="2", search="function_1", **BOTH)

    assert len(whole["functions"]) == whole["rows"] == cut["rows"] == 11
    assert cut["functions"] == whole["functions"][:2]


def test_an_announced_deployment_ends_the_unchanged_past(client, folder, tmp_path):
    """Nothing else shows it, as the version stays; one of another service does not count."""
    jobs = {**BOTH, "query": '{service="jobs"}'}
    usual = client.json("diff", **jobs)
    shutil.copytree(folder / "store", tmp_path / "store")
    store = TenantStore(DirectoryStore(tmp_path / "store"))
    announce(store, "edge", "8", START_NS + 21 * MINUTE_NS + 1)
    announce(store, "jobs", "6", START_NS + 30 * MINUTE_NS + 1)

    with service(tmp_path) as (_, other):
        found = other.json("diff", **jobs)
        everything = other.json("diff", **AFTER, **BEFORE)

    # One earlier position less is one too few.
    assert (usual["noise"]["source"], found["noise"]["source"]) == ("history", "within")
    assert (usual["provisional"], found["provisional"]) == (False, True)
    assert everything["noise"] == client.json("diff", **AFTER, **BEFORE)["noise"]
    said = json.loads(command(tmp_path, "--json", query=jobs["query"]).stdout)
    assert said["noise"] == found["noise"]


def test_without_a_side_before_it_is_the_time_just_before(client):
    """As long as the other, and of the same selection; each part can be said by itself."""
    usual = client.json("diff", **API, **AFTER)

    assert usual == client.json("diff", **BOTH)
    half = client.json("diff", **API, **AFTER, before_from=BEFORE["before_from"])
    assert half == usual
    other = client.json("diff", before_query='{service="jobs"}', **API, **AFTER)
    assert other["before"]["query"] == '{service="jobs"}'
    assert other["before"]["window"] == usual["before"]["window"]


def test_the_gate_decides_what_fails(client):
    graph = client.json("diff", fail_over="relative>=100%", **BOTH)

    assert (graph["verdict"], graph["exit_code"]) == ("unchanged", 0)


def test_a_host_on_one_side_only_is_left_out_of_the_graph(client):
    """And said so: both sides are of the same hosts."""
    graph = client.json("diff", **{**BOTH, "query": '{service="edge"}'})

    alone = client.json("flamegraph", query='{service="edge",host="web-0"}', **AFTER)
    assert graph["totals"]["after"] == alone["total"]
    assert graph["after"]["hosts"] == ["web-0"]
    assert any("web-1" in warning for warning in graph["warnings"])


def test_too_little_data_is_an_answer(client):
    """Not an error: both sides are drawn, and nothing is called changed."""
    early = {**times(1, 2), **times(1, 2, "before_")}

    graph = client.json("diff", **API, **early)

    assert (graph["verdict"], graph["noise"]["source"]) == ("inconclusive", "none")
    assert {graph["verdicts"][i] for i in graph["nodes"]["verdict"]} == {"too little data"}


def test_a_zoom_keeps_what_leads_there(client):
    """Its ancestors with both costs, and the totals of the whole; the id is that of any graph."""
    some_minute = minute(np.random.default_rng(1), END, 0)
    api = some.having(some_minute, lambda labels: labels["service"] == "api")
    alone = flamegraph.build(Columns.of(api), ("service",))
    index = [alone.frames[i].function for i in alone.frame.tolist()].index("new_path")

    zoomed = client.json("diff", node=f"{alone.ids()[index]:016x}", **BOTH)

    assert [each["frame"][0] for each in zoomed["path"]] == ["api", "main", "new_path"]
    assert zoomed["path"][-1]["after"] == zoomed["nodes"]["after"][0] > 0
    assert zoomed["path"][-1]["before"] == zoomed["nodes"]["before"][0] == 0
    assert zoomed["totals"] == client.json("diff", **BOTH)["totals"]
    assert coloured(zoomed) == {"shared": "moved"}


def test_a_node_on_neither_side_is_not_found(client):
    assert problem(client, 404, node="0123456789abcdef", **BOTH)["node"] == "0123456789abcdef"


def test_an_empty_side_says_why_and_what_there_is(client):
    """Which side it is, the versions and services there, or where the nearest data are."""
    no_version = {**BOTH, "before_query": '{service="api",version="9"}'}
    found = problem(client, 404, **no_version)
    assert (found["side"], found["reason"]) == ("before", "nothing_matches")
    assert found["versions"] == ["1"]
    assert "api" in found["services"]
    assert "api" in found["detail"]

    found = problem(client, 404, **{**BOTH, **times(900, 960)})
    assert (found["side"], found["reason"]) == ("after", "no_data_in_range")
    last_ms = START_NS // 1_000_000 + END * 60_000
    assert found["nearest"] == [{"from_ms": last_ms - 60_000, "until_ms": last_ms}]
    assert "the nearest data are from" in found["detail"]


def test_sides_without_a_common_host_are_compared_as_a_whole(client):
    one = {**BOTH, "query": '{host="web-1"}', "before_query": '{host="web-0"}'}
    found = client.json("diff", **one)

    assert (found["before"]["hosts"], found["after"]["hosts"]) == (["web-0"], ["web-1"])
    assert "no host is on both sides: they are compared as a whole" in found["warnings"]


@pytest.mark.parametrize(
    "parameters",
    [
        {"before_from": "now", "before_until": "now-1h"},
        {"before_from": "yesterday"},
        {"before_query": "{"},
        {"fail_over": "much"},
        {"search": "x"},
        {"type": "cpu"},
    ],
)
def test_what_cannot_be_compared_is_a_problem_with_a_detail(client, parameters):
    found = problem(client, 400, **{**BOTH, **parameters})

    assert found["parameter"] in parameters
    assert found["detail"]


def test_what_has_arrived_since_is_in_the_next_answer(tmp_path):
    """A comparison that is kept is one of the same objects."""
    rng = np.random.default_rng(3)
    directory(tmp_path / "store", *(minute(rng, i, 0) for i in range(2 * LENGTH - 1)))
    sides = {**API, **times(LENGTH, 2 * LENGTH), **times(0, LENGTH, "before_")}
    with service(tmp_path) as (_, client):
        first = client.json("diff", **sides)
        put(DirectoryStore(tmp_path / "store"), minute(rng, 2 * LENGTH - 1, 0))
        asked = [first]

        def has_arrived() -> bool:
            asked.append(client.json("diff", **sides))
            return asked[-1]["after"]["samples"] > first["after"]["samples"]

        wait_for(has_arrived)

    assert asked[-1]["after"]["coverage"]["objects"] == LENGTH
    assert asked[-1]["totals"]["before"] == first["totals"]["before"]


class EnoughError(Exception):
    """The client has gone."""


def test_a_comparison_may_end_at_any_step(folder, tmp_path):
    """The next request gets the same as if there had been none before."""
    store = DirectoryStore(folder / "store")
    sides = [
        Operand(Selector.parse(API["query"]), minutes(END - (i + 1) * LENGTH, END - i * LENGTH))
        for i in range(2)
    ]
    after = PanelRequest(sides[0].window, sides[0].selector, by=("service",))

    def comparisons(cache: str) -> Comparisons:
        profiles = TenantStore(store)
        return Comparisons(MergedProfiles(profiles, Query(profiles, tmp_path / cache)))

    def ask(comparisons: Comparisons, steps: float) -> bytes:
        done = itertools.count()

        def check() -> None:
            if next(done) >= steps:
                raise EnoughError

        compared = comparisons.compare(after, sides[1], check)
        found = diff_graph(compared, after, Gate(0.1, 0.005), check)
        assert next(done) > 20
        return json_body(found)[0]

    expected = ask(comparisons("cache"), math.inf)
    other = comparisons("other")
    steps = 1
    while True:
        try:
            found = ask(other, steps)
            break
        except EnoughError:
            steps *= 2

    assert steps > 16
    assert found == expected


class ListedStore(DirectoryStore):
    """A directory that notes what is listed."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.listed: list[str] = []

    def list(self, prefix: str, **asked: Any) -> Iterator[StoredObject]:
        self.listed.append(prefix)
        return super().list(prefix, **asked)


def test_a_comparison_takes_no_step_twice(folder, tmp_path, monkeypatch):
    """It lists each side and makes their stacks once; the table waits while the graph is drawn."""
    store = ListedStore(folder / "store")
    profiles = TenantStore(store)
    query = Query(profiles, tmp_path / "cache")
    monkeypatch.setattr(merged, "_BELIEVED_S", 1e-9)
    comparisons = Comparisons(MergedProfiles(profiles, query))
    sides = [
        Operand(Selector.parse(API["query"]), minutes(END - (i + 1) * LENGTH, END - i * LENGTH))
        for i in range(2)
    ]
    list(profiles.list_window(sides[0].window, "cpu"))
    of_window, store.listed = store.listed, []

    made: list[Stacks] = []
    numbered = Stacks.numbered

    def note(stacks: Stacks) -> tuple[Integers, int]:
        made.append(stacks)
        return numbered(stacks)

    monkeypatch.setattr(Stacks, "numbered", note)
    request = PanelRequest(*sides[0][::-1])

    compared = comparisons.compare(request, sides[1], lambda: None)
    diff_graph(compared, request, Gate(0.1, 0.005), lambda: None)

    assert len(made) == 1
    # Each side and their past in two pieces: the hour before a window may reach into it.
    assert all(store.listed.count(prefix) <= 8 for prefix in of_window)
    with compared.lock, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(compared.reasons, compared.pair.found.functions)
        with pytest.raises(TimeoutError):
            waiting.result(0.2)
        compared.lock.release()
        moved, _ = waiting.result(30)
        compared.lock.acquire()
    assert {function for function, *_ in moved} == {"shared"}


def test_metrics_count_comparisons_by_endpoint(client):
    client.json("diff", **BOTH)
    client.json("diff/top", **BOTH)

    _, _, body = client.get("/metrics")

    for endpoint in ("diff", "diff_top"):
        assert re.search(
            rf'requests_total{{endpoint="{endpoint}",status="200"}} [1-9]', body.decode()
        )


@pytest.mark.parametrize("ending", ["svg", "folded", "speedscope.json", "json"])
def test_downloads_are_those_of_the_command(client, folder, tmp_path, ending):
    """The same bytes by HTTP and by `-o`; JSON from the service also has the coverage."""
    status, headers, body = client.get(f"/api/v1/export/diff.{ending}", **BOTH)

    assert status == 200
    assert headers["content-disposition"] == f'attachment; filename="diff.{ending}"'
    file = tmp_path / f"diff.{ending}"
    done = command(folder, "-o", str(file))
    assert done.returncode == 1
    assert b"moved   from some callers to others: shared\n" in done.stdout
    written = file.read_bytes()
    if ending == "json":
        said, graph = json.loads(written), json.loads(body)
        assert coloured(graph) == coloured(said)
        assert said["nodes"] == graph["nodes"]
        assert said["verdict"] == graph["verdict"]
    elif ending == "speedscope.json":
        assert json.loads(written) == json.loads(body)
    else:
        assert written == body


def test_a_download_of_a_view_is_of_that_view(client):
    """What is in focus on both sides; a node that one side lacks has no stacks there."""
    _, _, folded = client.get("/api/v1/export/d.folded", focus="new_path", **BOTH)

    (line,) = folded.decode().splitlines()
    stack, before, after = line.rsplit(" ", 2)
    assert stack == "api;main;new_path;shared"
    assert before == "0"
    assert int(after) > 0
    _, _, drawing = client.get("/api/v1/export/d.svg", focus="new_path", **BOTH)
    names = {text.text for text in ET.fromstring(drawing).iter("{http://www.w3.org/2000/svg}text")}
    assert "new_path" in names
    assert "function_1" not in names


def test_pprof_of_both_sides_is_refused(client):
    """It holds one side; the formats that hold two are named."""
    status, _, body = client.get("/api/v1/export/diff.pb.gz", **BOTH)

    assert status == 404
    assert "pprof holds one side" in json.loads(body)["detail"]
    assert ".speedscope.json" in json.loads(body)["detail"]
