"""The service, as the real process over a real store, asked over real HTTP."""

import gzip
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from profiler.flamegraph import flamegraph
from profiler.formats.reading import read_bytes
from profiler.service.schema import ENDPOINTS
from profiler.service.timeline import default_step_ns
from storage.columns import Columns
from storage.formats import pprof
from storage.objects.directory import DirectoryStore
from storage.objects.tenant import TenantStore
from storage.profile import Window
from storage.query.query import Query
from tests.commands.test_up import descendants_of
from tests.support import profiles as some
from tests.support.live import wait_for
from tests.support.services import profile_of, service
from tests.support.stores import START_NS, directory, minutes

FROM, UNTIL = (str(ns // 1_000_000) for ns in minutes(0, 60))
HOUR = {"from": FROM, "until": UNTIL}


def whole():
    return some.merge([profile_of(minute) for minute in range(5)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("service")


@pytest.fixture(scope="module")
def client(folder):
    directory(folder / "store", *(profile_of(minute) for minute in range(5)))
    with service(folder) as (_, client):
        yield client


def test_a_flame_graph_holds_every_count_of_its_window(client):
    """It equals the tree of what was stored, with services above."""
    shown = client.json("flamegraph", **HOUR)

    assert shown["total"] == whole().total_value
    assert shown["nodes"]["total"][0] == shown["total"]
    graph = flamegraph.build(Columns.of(whole()), ("service",))
    assert shown["nodes"]["total"] == graph.total.tolist()
    names = [shown["frames"][i][0] for i in shown["nodes"]["frame"]]
    assert names == [graph.frames[i].function for i in graph.frame.tolist()]
    assert shown["empty"] is None
    assert shown["modules"] == [["api", "/srv/api", "feed"]]


def test_a_node_leads_to_its_subtree_and_its_path(client):
    """Ids are those of the graph; a node that is not there is a 404 that says so."""
    graph = flamegraph.build(Columns.of(whole()), ("service",))
    node = next(i for i in range(len(graph)) if graph.depth[i] == 2)
    node_id = f"{int(graph.ids()[node]):016x}"

    shown = client.json("flamegraph", node=node_id, **HOUR)

    assert shown["nodes"]["total"][0] == graph.total[node]
    assert [each["frame"][0] for each in shown["path"]] == [f.function for f in graph.path(node)]
    assert shown["path"][-1]["id"] == node_id
    status, headers, body = client.get("/api/v1/flamegraph", node="0" * 16, **HOUR)
    assert status == 404
    assert headers["content-type"] == "application/problem+json"
    assert json.loads(body)["node"] == "0" * 16


def test_a_view_counts_what_it_says(client):
    """Callers, focus, hide, inversion and search, each from the full data."""
    function = some.NAMES[some.WORK][-1].function
    work = sum(minute + 1 for minute in range(5))

    assert client.json("flamegraph", focus=function, **HOUR)["nodes"]["samples"][0] == work
    assert client.json("flamegraph", callers=function, **HOUR)["nodes"]["samples"][0] == work
    hidden = client.json("flamegraph", hide=function, **HOUR)
    assert function not in {frame[0] for frame in hidden["frames"]}
    assert hidden["nodes"]["total"][0] == hidden["total"]
    both = client.json("flamegraph", focus=function, hide=function, **HOUR)
    assert function not in {frame[0] for frame in both["frames"]}
    assert both["nodes"]["samples"][0] == work
    assert client.json("flamegraph", search="JOB", **HOUR)["search"]["samples"] == 10
    inverted = client.json("flamegraph", invert="1", by="", **HOUR)
    assert inverted["nodes"]["total"][0] == inverted["total"]


def test_the_table_and_the_timeline_add_up_to_the_whole(client):
    """Self times are all of it; steps without data are gaps, shown by profiled_ns."""
    table = client.json("top", **HOUR)
    line = client.json("timeline", step="60s", **HOUR)

    assert sum(row["self"] for row in table["functions"]) == whole().total_value
    assert sum(sum(series["values"]) for series in line["series"]) == whole().total_value
    assert [i for i, ns in enumerate(line["totals"]["profiled_ns"]) if ns] == list(range(5))
    few = client.json("timeline", limit="1", **HOUR)
    assert [series["rest"] for series in few["series"]] == [False, True]
    assert len(client.json("top", limit="1", sort="total", search="job", **HOUR)["functions"]) == 1


def test_a_timelines_own_step_is_no_shorter_than_an_object(client):
    """Five minutes of one-minute objects have five steps, none a gap and none too full."""
    from_ms, until_ms = (ns // 1_000_000 for ns in minutes(0, 5))

    line = client.json("timeline", **{"from": str(from_ms), "until": str(until_ms)})

    assert line["step_ms"] == 60_000
    assert line["totals"]["profiled_ns"] == [60 * 10**9] * 5
    odd = Window(0, 1_000 * 10**9)
    assert [default_step_ns(odd, s * 10**9) // 10**9 for s in (0, 45, 60)] == [10, 900, 60]


def test_labels_and_their_values_are_listed(client):
    """What a selector can be completed with."""
    names = {each["name"] for each in client.json("labels", **HOUR)["labels"]}
    values = client.json("labels/service/values", **HOUR)["values"]

    assert {"service", "comm", "host"} <= names
    assert values == [{"value": "api", "samples": 15}, {"value": "jobs", "samples": 10}]


def test_workers_do_not_import_the_service(folder, tmp_path):
    """They decode; msgspec and DuckDB are the service's alone: a start takes half of their CPU."""
    (tmp_path / "store").symlink_to(folder / "store")
    with service(tmp_path) as (process, client):
        client.json("flamegraph", **HOUR)

        workers = [
            Path(f"/proc/{pid}")
            for pid in descendants_of(process.pid)
            if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        assert "msgspec" in Path(f"/proc/{process.pid}/maps").read_text()
        assert workers
        for each in workers:
            loaded = (each / "maps").read_text()
            assert "msgspec" not in loaded
            assert "duckdb" not in loaded


ENDINGS = ("folded", "pb.gz", "speedscope.json", "svg", "json")


def exported(folder, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from profiler.cli import main; raise SystemExit(main())"]
    command += ["export", f"--store={folder / 'store'}", f"--from={FROM}", f"--until={UNTIL}"]
    return subprocess.run(
        [*command, *arguments],
        env={**os.environ, "EVERFLAME_CACHE": str(folder / "cli-cache")},
        check=False,
        capture_output=True,
        text=True,
    )


def files_of(folder, to: Path, *arguments: str) -> dict[str, bytes]:
    """Return what the command writes, in each format: all by one process."""
    files = {ending: to / f"cpu.{ending}" for ending in ENDINGS}
    outputs = [word for file in files.values() for word in ("-o", str(file))]

    done = exported(folder, *outputs, *arguments)

    assert done.returncode == 0, done.stderr
    return {ending: file.read_bytes() for ending, file in files.items()}


def test_exports_over_http_are_those_of_the_command(client, folder, tmp_path):
    """Byte by byte what `everflame export` writes for the same window."""
    files = files_of(folder, tmp_path)

    for ending, content in files.items():
        status, headers, body = client.get(f"/api/v1/export/cpu.{ending}", **HOUR)
        assert status == 200
        assert headers["content-disposition"] == f'attachment; filename="cpu.{ending}"'
        assert body == content, ending
    assert read_bytes(files["folded"]).profile.total_samples == whole().total_samples
    assert pprof.decode(files["pb.gz"]).total_value == whole().total_value


WORK = some.NAMES[some.WORK][-1].function
MAIN = some.NAMES[some.MAIN][-1].function
NODE = f"{int(flamegraph.build(Columns.of(whole()), ('comm',)).ids()[3]):016x}"


def flags(parameters: dict[str, str | list[str]]) -> list[str]:
    """Return the flags of `everflame export` for parameters of the service."""
    pairs = [
        (name, each)
        for name, value in parameters.items()
        for each in (value if isinstance(value, list) else [value])
    ]
    return [f"--{name}" if name == "invert" else f"--{name}={value}" for name, value in pairs]


@pytest.mark.parametrize(
    "parameters",
    [
        {"query": '{service="api"}'},
        {"focus": WORK, "by": "comm"},
        {"hide": [WORK, MAIN]},
        {"callers": WORK},
        {"invert": "1", "by": "service"},
        {"group": "module", "by": ""},
        {"node": NODE},
    ],
)
def test_downloads_of_a_view_are_those_of_the_command(client, folder, tmp_path, parameters):
    """And hold as much as the screen shows."""
    screen = client.json("flamegraph", **HOUR, **{"by": "comm", **parameters})

    files = files_of(folder, tmp_path, *flags(parameters))

    for ending, content in files.items():
        _, _, body = client.get(f"/api/v1/export/cpu.{ending}", **HOUR, **parameters)
        assert body == content, ending
    assert pprof.decode(files["pb.gz"]).total_value == screen["nodes"]["total"][0]


def test_a_download_of_a_node_that_is_not_there_is_refused(client, folder, tmp_path):
    """As its view is; the command says what a node is one of."""
    status, _, body = client.get("/api/v1/export/cpu.svg", node="0" * 16, **HOUR)
    output = ("-o", str(tmp_path / "cpu.svg"))
    done = exported(folder, *output, "--node", "0" * 16)
    nothing = exported(folder, *output, "--focus", "no such function")

    assert (status, json.loads(body)["node"]) == (404, "0" * 16)
    assert done.returncode == nothing.returncode == 2
    assert "no stack goes through the node 0000000000000000" in done.stderr
    assert "nothing selected: there is no stack with no such function" in nothing.stderr


def test_every_empty_response_says_why(client):
    """No data in the range comes with the nearest, a selector that fits nothing with services."""
    later = {"from": str(START_NS // 10**9 + 86_400), "until": str(START_NS // 10**9 + 90_000)}
    outside = client.json("flamegraph", **later)["empty"]
    unmatched = client.json("flamegraph", query='{service="none"}', **HOUR)["empty"]

    assert outside["reason"] == "no_data_in_range"
    assert outside["nearest"][0]["until_ms"] == minutes(0, 5).end_ns // 1_000_000
    assert unmatched["reason"] == "nothing_matches"
    assert unmatched["services"] == ["api", "jobs"]


@pytest.mark.parametrize(
    "parameters",
    [
        {"unknown": "1"},
        {"from": "yesterday"},
        {"from": "now", "until": "now-1h"},
        {"query": "{service=}"},
        {"node": "xyz"},
        {"width": "1"},
        {"group": "thread"},
        {"invert": "yes"},
        {"query": ["{}", "{}"]},
        {"search": "x" * 5000},
    ],
)
def test_invalid_parameters_are_a_problem_with_a_detail(client, parameters):
    """400, problem+json, and words that name the parameter."""
    status, headers, body = client.get("/api/v1/flamegraph", **parameters)

    assert status == 400
    assert headers["content-type"] == "application/problem+json"
    assert json.loads(body)["detail"]


def test_an_unknown_parameter_is_told_those_that_there_are(client):
    """Or that there are none."""
    for path, text in (("labels", "there are query, from, until, type"), ("status", "takes none")):
        status, _, body = client.get(f"/api/v1/{path}", colour="red")

        assert status == 400
        assert "there is no parameter 'colour'; " in json.loads(body)["detail"]
        assert json.loads(body)["detail"].endswith(text)


@pytest.mark.parametrize(
    ("parameters", "wrong"),
    [
        ({"until": "2026-13-01T00:00:00Z"}, "until"),
        ({"from": "2026-13-01T00:00:00Z", "until": "never"}, "from"),
        ({"from": "now", "until": "now-1h"}, "from"),
        ({"before_until": "never"}, "before_until"),
        ({"before_from": "never"}, "before_from"),
    ],
)
def test_a_problem_names_the_time_that_is_wrong(client, parameters, wrong):
    """Not the start for an end that is none; a window that is empty is laid to its start."""
    status, _, body = client.get("/api/v1/diff", **parameters)

    assert (status, json.loads(body)["parameter"]) == (400, wrong)
    assert "month" not in json.loads(body)["detail"]


def test_every_response_has_the_security_headers(client):
    """No script but our own, nothing shared across origins, no foreign Host header."""
    for path in ("/api/v1/status", "/healthz", "/nothing"):
        _, headers, _ = client.get(path)
        assert headers["content-security-policy"].startswith("default-src 'none'")
        assert headers["x-content-type-options"] == "nosniff"
    for host in ("evil.example", "127.0.0.1.evil.example", ""):
        assert client.get("/api/v1/status", {"Host": host})[0] == 421
    for host in ("localhost:9999", "127.0.0.1", "[::1]:4040"):
        assert client.get("/api/v1/status", {"Host": host})[0] == 200


def test_responses_are_compressed_on_request(client):
    """gzip on request, the same bytes inside."""
    plain = client.get("/api/v1/openapi.json")[2]
    _, headers, body = client.get("/api/v1/openapi.json", {"Accept-Encoding": "gzip"})

    assert headers["content-encoding"] == "gzip"
    assert gzip.decompress(body) == plain
    assert {each.path for each in ENDPOINTS.values()} == set(json.loads(plain)["paths"])


@pytest.mark.parametrize(
    ("accepted", "is_gzipped"),
    [
        ("gzip;q=0", False),
        ("br, gzip; Q=0.000", False),
        ("*;q=0", False),
        ("gzip;q=0, *", False),
        ("notgzip", False),
        ("br;q=1.0, gzip;q=0.5", True),
        ("*", True),
    ],
)
def test_responses_are_not_compressed_for_who_refuses_it(client, accepted, is_gzipped):
    """A weight of 0 means: not that one (RFC 9110)."""
    for path in ("/", "/healthz"):
        _, headers, _ = client.get(path, {"Accept-Encoding": accepted})

        assert (headers["content-encoding"] == "gzip") == is_gzipped


def test_health_and_metrics_are_served(client):
    """Ready means that the store responds."""
    assert client.get("/healthz")[0] == client.get("/readyz")[0] == 200
    assert b'endpoint="readyz",status="200"' in client.get("/metrics")[2]


def test_metrics_count_pools_of_workers_that_were_lost(tmp_path):
    """The kernel kills workers for want of memory: each is replaced, and nobody else would see."""

    def lost() -> bytes:
        (line,) = re.findall(rb"workers_pools_lost_total (\d+)", client.get("/metrics")[2])
        return line

    directory(tmp_path / "store", profile_of(0))
    with service(tmp_path) as (process, client):
        before = lost()
        worker = next(
            pid
            for pid in descendants_of(process.pid)
            if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
        )
        os.kill(worker, signal.SIGKILL)

        assert client.json("flamegraph", **HOUR)["samples"] == profile_of(0).total_samples
        wait_for(lambda: lost() == b"1")

    assert before == b"0"


def without_keys() -> dict[str, str]:
    """Return this environment without the keys that other tests may have put there."""
    return {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}


def refusal(*arguments: str, **environment: str) -> str:
    """Return the one line with which `everflame serve` refuses."""
    command = [sys.executable, "-c", "from profiler.cli import main; raise SystemExit(main())"]
    done = subprocess.run(
        [*command, "serve", *arguments],
        env={**without_keys(), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "192.0.2.1", "example.org"])
def test_only_loopback_is_served(tmp_path, host):
    """Listening elsewhere is refused with the way to get there all the same."""
    line = refusal(f"--listen={host}:4040", f"--store={tmp_path}")

    assert "only loopback is served" in line
    assert "ssh -L 4040:127.0.0.1:4040" in line


def test_a_taken_port_is_one_line_with_a_remedy(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refusal(f"--listen=127.0.0.1:{port}", f"--store={tmp_path}")

    assert line == (
        f"everflame: cannot listen on 127.0.0.1:{port}: the port is taken"
        f" (choose another one, as with --listen 127.0.0.1:{port + 1})"
    )


def test_a_store_that_cannot_be_read_is_one_line_with_a_remedy(tmp_path):
    """A file; a bucket without keys."""
    (tmp_path / "file").touch()
    is_file = refusal("--listen=127.0.0.1:0", f"--store={tmp_path / 'file'}")
    none = {"AWS_SHARED_CREDENTIALS_FILE": "/dev/null", "AWS_EC2_METADATA_DISABLED": "true"}
    no_keys = refusal("--listen=127.0.0.1:0", "--store=s3://bucket", **none)

    assert is_file.startswith("everflame: cannot list ")
    assert is_file.endswith("Not a directory (use another --store)")
    assert "AWS_ACCESS_KEY_ID" in no_keys


def test_responses_do_not_depend_on_earlier_requests(folder, client):
    """The same request after many others, and from a fresh cache, has the same counts."""
    first = client.json("flamegraph", **HOUR)
    for group in ("line", "file", "module"):
        assert client.json("flamegraph", group=group, **HOUR)["total"] == first["total"]
    again = client.json("flamegraph", **HOUR)

    assert again["nodes"] == first["nodes"]
    fresh = Query(TenantStore(DirectoryStore(Path(folder) / "store")), folder / "fresh")
    assert fresh.profile(minutes(0, 60)).profile.total_value == first["total"]
