"""Connections to the real service: clients that never finish, too many, too much, and the end."""

import asyncio
import contextlib
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import h11
import pytest
import uvicorn
from packaging.requirements import Requirement
from starlette.responses import Response
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from profiler.service import connections
from profiler.service.connections import ConnectionSlots, Server
from tests.commands.test_up import descendants_of, is_running
from tests.support.live import wait_for
from tests.support.services import Client, profile_of, service
from tests.support.stores import directory, minutes

FROM, UNTIL = (ns // 1_000_000 for ns in minutes(0, 60))
GRAPH = f"/api/v1/flamegraph?from={FROM}&until={UNTIL}"
SLOW_CLIENTS = 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("connections")
    directory(folder / "store", *(profile_of(minute) for minute in range(5)))
    return folder


@pytest.fixture(scope="module")
def client(folder):
    with service(folder) as (_, client):
        yield client


def connect(client: Client) -> socket.socket:
    return socket.create_connection(("127.0.0.1", client.port), 20)


def say(client: Client, request: bytes) -> bytes:
    """Return the whole response to some bytes."""
    with connect(client) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def is_cut_off(connection: socket.socket) -> bool:
    try:
        return connection.recv(1, socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def trickle(some: bytes, *connections: socket.socket) -> None:
    for connection in connections:
        with contextlib.suppress(OSError):
            connection.sendall(some)


@contextlib.contextmanager
def slow_clients(client: Client, count: int) -> Iterator[list[socket.socket]]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4096)), hard))
    with contextlib.ExitStack() as stack:
        connections = [connect(client) for _ in range(count)]
        stack.callback(lambda: [connection.close() for connection in connections])
        yield connections
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_slow_clients_do_not_keep_others_from_a_response(client):
    """Of 300 that send a few bytes of a request and wait, those beyond the limit go at once, the
    others when their time is up, also when they send a byte now and then."""
    with slow_clients(client, SLOW_CLIENTS) as connections:
        trickle(b"GET /api/v1/status HTTP/1.1\r\nHost: 127", *connections)
        wait_for(lambda: sum(map(is_cut_off, connections)) >= SLOW_CLIENTS // 10)
        responses = [client.get("/api/v1/flamegraph", width=w)[0] for w in range(500, 505)]
        wait_for(lambda: all(map(is_cut_off, connections)) or trickle(b"x", *connections))

    assert responses == [200] * 5
    assert client.get("/healthz")[0] == 200


def test_a_body_that_never_comes_does_not_hold_a_connection(client):
    """A GET with a body gets its response; its connection is cut off if no body follows."""
    with connect(client) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n")
        assert b" 200 " in connection.recv(1 << 16)
        wait_for(lambda: is_cut_off(connection))


async def large(scope, receive, send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(64):
        await send({"type": "http.response.body", "body": bytes(1 << 20), "more_body": True})
    await send({"type": "http.response.body"})


@pytest.mark.parametrize(("pause_s", "is_cut"), [(0.02, False), (None, True)])
def test_a_client_that_reads_nothing_of_a_response_is_cut_off(monkeypatch, pause_s, is_cut):
    """One that reads a little now and then is not."""
    monkeypatch.setattr(connections, "_STALL_S", 2.0)
    slots = ConnectionSlots(Response(status_code=503), Response(status_code=400))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        server = Server(large, slots)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener.dup()]})
        thread.start()
        with socket.create_connection(("127.0.0.1", port), 20) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            taken = 0
            if pause_s is None:
                wait_for(lambda: slots.cut == 1)
            else:
                while some := connection.recv(1 << 20):
                    taken += len(some)
                    time.sleep(pause_s)
        server.should_exit = True
        thread.join(20)

    assert not thread.is_alive()
    assert (slots.cut == 1) == is_cut
    assert (taken > 64 << 20) == (not is_cut)


@pytest.mark.parametrize(
    "request_",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100_000,
        b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\r\n\0\r\n\r\n",
    ],
)
def test_what_is_no_request_is_a_problem_and_ends_the_connection(client, request_):
    response = say(client, request_)

    head, _, body = response.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"application/problem+json" in head
    assert b"default-src 'none'" in head
    assert json.loads(body)["status"] == 400


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("/nothing", 404),
        ("/healthz/", 404),
        ("//", 404),
        ("/[", 404),
        ("http://[::1/", 404),
        ("*", 404),
        ("/web/../../../etc/passwd", 404),
        ("/web/%2e%2e/serve.py", 404),
        ("/%ff", 404),
        ("/api/v1/labels/%ff/values", 400),
        ("/api/v1/labels/%00/values", 400),
        ("/api/v1/labels/" + "x" * 300 + "/values", 400),
        ("/api/v1/export/..", 404),
        ("/api/v1/export/-", 404),
        ("/api/v1/export/cpu.exe", 404),
        ("/api/v1/export/%2e%2e%2fcpu.svg", 404),
        ("/api/v1/export/a%0d%0ab.svg", 404),
        ("/api/v1/export/a%22b.svg", 404),
        ("/api/v1/export/" + "x" * 300 + ".svg", 404),
    ],
)
def test_paths_that_lead_nowhere_are_problems(client, target, status):
    request = f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"

    head, _, body = say(client, request.encode()).partition(b"\r\n\r\n")

    assert head.startswith(f"HTTP/1.1 {status} ".encode())
    assert b"application/problem+json" in head
    assert json.loads(body)["status"] == status


@pytest.mark.parametrize("ending", ["folded", "pb.gz", "speedscope.json", "svg", "json"])
def test_a_name_may_be_nothing_but_its_ending(client, ending):
    """Neither needs anything before it."""
    status, headers, _ = client.get(f"/api/v1/export/.{ending}")

    assert status == 200
    assert headers["content-disposition"] == f'attachment; filename=".{ending}"'


@pytest.mark.parametrize(
    "method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "CONNECT"]
)
@pytest.mark.parametrize("path", ["/", GRAPH, "/api/v1/export/cpu.svg", "/healthz"])
def test_nothing_but_get_and_head_is_allowed(client, method, path):
    request = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"

    head, _, body = say(client, request.encode()).partition(b"\r\n\r\n")

    assert head.startswith(b"HTTP/1.1 405 ")
    assert b"allow: GET, HEAD" in head
    assert json.loads(body)["status"] == 405


@pytest.mark.parametrize("path", ["/", GRAPH, "/healthz", "/metrics"])
def test_head_gives_the_headers_of_get_and_no_body(client, path):
    request = f"HEAD {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"

    head, _, body = say(client, request.encode()).partition(b"\r\n\r\n")

    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"content-length: " in head
    assert body == b""


def test_the_response_to_a_range_is_the_whole(client):
    """Responses have no parts, and no `accept-ranges` says otherwise."""
    for value in ("bytes=0-1", "bytes=-5", "bytes=9-1,2-", "lines=1"):
        status, headers, body = client.get("/healthz", {"Range": value})
        assert (status, body, headers["accept-ranges"]) == (200, b"ok\n", None)


def test_pipelined_requests_are_answered_in_order(client):
    """Pipelined; the last one ends the connection."""
    one = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    last = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"

    response = say(client, one * 3 + last)

    assert re.findall(rb"HTTP/1.1 (\d+)", response) == [b"200"] * 4
    assert b"everflame_service_requests_total" in response


def test_responses_under_way_are_completed_before_the_service_ends(folder):
    """SIGTERM: the response still comes, complete; then all processes end."""
    with service(folder) as (process, client), connect(client) as connection:
        workers = descendants_of(process.pid)
        connection.sendall(f"GET {GRAPH}&width=777 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        wait_for(lambda: b'endpoint="metrics"' in client.get("/metrics")[2])
        process.send_signal(signal.SIGTERM)
        response = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        assert process.wait(20) == 0

    assert response.startswith(b"HTTP/1.1 200 ")
    assert response.endswith(b"}")
    assert len(workers) >= 2
    wait_for(lambda: not any(map(is_running, workers)))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_service_ends_without_waiting_for_clients(folder, number):
    """Neither for slow ones nor for those that read no response; nothing is printed about it."""
    with service(folder) as (process, client), slow_clients(client, 20) as connections:
        trickle(b"GET /", *connections[:10])
        trickle(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2000, *connections[10:])
        process.send_signal(number)
        assert process.wait(20) == 0

    assert len((folder / "talk").read_text().splitlines()) == 1


def test_a_store_that_hangs_fills_all_connections_but_the_service_still_ends(tmp_path):
    """A store that takes a connection and says nothing: who comes when all wait for it is told so
    politely, and the service ends all the same."""
    asked = b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"--s3-endpoint=http://127.0.0.1:{silent.getsockname()[1]}"
        keys = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}
        with (
            service(tmp_path, "--store=s3://bucket", endpoint, environment=keys) as (_, client),
            slow_clients(client, 256) as connections,
        ):
            trickle(asked, *connections)

            def is_full() -> bool:
                # A client that connects before all of these were read replaces one of them.
                connections.append(connect(client))
                trickle(asked, connections[-1])
                return client.get("/healthz")[0] == 503

            wait_for(is_full)
            _, headers, body = client.get("/healthz")

    assert headers["retry-after"] == "5"
    assert headers["content-type"] == "application/problem+json"
    assert headers["content-security-policy"].startswith("default-src 'none'")
    assert json.loads(body)["title"] == "Busy"
    assert "does not respond; the page shows this until it does" in (tmp_path / "talk").read_text()


def test_a_status_that_hangs_does_not_block_other_requests(tmp_path):
    """Each way to ask for it is a computation of its own; others go on meanwhile."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"--s3-endpoint=http://127.0.0.1:{silent.getsockname()[1]}"
        keys = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}
        arguments = ("--store=s3://bucket", endpoint)
        host = b" HTTP/1.1\r\nHost: localhost\r\n"
        status = b"GET /api/v1/status" + host
        hanging = [b"GET /readyz" + host, status + b"Accept-Encoding: gzip\r\n", status, status]
        with (
            service(tmp_path, *arguments, environment=keys) as (_, client),
            slow_clients(client, len(hanging)) as connections,
        ):
            for request, connection in zip(hanging, connections, strict=True):
                connection.sendall(request + b"\r\n")
            wait_for(lambda: b"shared_total 1" in client.get("/metrics")[2], 60)
            began_s = time.monotonic()
            responded = client.get("/api/v1/openapi.json")[0]
            took_s = time.monotonic() - began_s

    assert responded == 200
    assert took_s < 5


def has_mapped(pid: int, name: str) -> bool:
    return name in Path(f"/proc/{pid}/maps").read_text()


STEPS = {
    "its imports": lambda pid: has_mapped(pid, "orjson"),
    "more of them": lambda pid: has_mapped(pid, "_multiarray_umath"),
    "its first worker": descendants_of,
    "its workers": lambda pid: len(descendants_of(pid)) > 2,
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_service_may_be_ended_while_it_starts(folder, number, step):
    """As by a Ctrl-C that comes too soon, which all of its processes get."""
    command = [sys.executable, "-c", "from profiler.cli import main; raise SystemExit(main())"]
    command += ["serve", f"--store={folder / 'store'}", "--listen=127.0.0.1:0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, process_group=0) as process:
        wait_for(lambda: STEPS[step](process.pid))
        os.killpg(process.pid, number)
        talk = process.communicate(timeout=20)[1].decode()

    assert process.returncode in {0, 130, -number}
    assert [line for line in talk.splitlines() if not line.startswith("everflame: ")] == []


INTERNALS = {
    H11Protocol: (
        "connection_made",
        "data_received",
        "connection_lost",
        "pause_writing",
        "resume_writing",
        "on_response_complete",
        "send_400_response",
    ),
    uvicorn.Server: ("main_loop", "on_tick", "shutdown", "handle_exit"),
}
"""What our classes override, or call, of uvicorn's."""


@pytest.mark.parametrize("base", INTERNALS)
def test_uvicorn_has_the_methods_that_our_classes_override(base):
    """uvicorn would not call one that it no longer has, and its deadline would not be kept."""
    assert [name for name in INTERNALS[base] if not callable(getattr(base, name, None))] == []


def test_a_connection_of_uvicorn_has_what_our_class_reads():
    """uvicorn documents none of it."""

    async def connect() -> H11Protocol:
        config = uvicorn.Config(large, ws="none", loop="asyncio", lifespan="off")
        return H11Protocol(config, ServerState(), {})

    connection = asyncio.run(connect())

    names = ("app", "conn", "connections", "cycle", "loop", "transport")
    assert [name for name in names if not hasattr(connection, name)] == []
    assert connection.conn.their_state is h11.IDLE
    assert connection.connections is connection.server_state.connections


def test_the_versions_of_uvicorn_are_bounded_to_those_tested():
    """Another one may have other internals."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    (uvicorn_,) = (
        each for each in map(Requirement, project["dependencies"]) if each.name == "uvicorn"
    )

    assert {each.operator for each in uvicorn_.specifier} == {">=", "<"}
    assert version("uvicorn") in uvicorn_.specifier
