"""The agent's metrics over HTTP: what a strange network or client can do to the uploader."""

import contextlib
import socket
import threading
from pathlib import Path

import pytest

from profiler.agent import metrics
from tests.support.live import wait_for

REQUEST = b"GET /metrics HTTP/1.0\r\n\r\n"


@pytest.fixture
def address(tmp_path: Path) -> tuple[str, int]:
    """Serve metrics of an agent that does not run."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    metrics.serve(f"127.0.0.1:{port}", tmp_path)
    return "127.0.0.1", port


def respond(address: tuple[str, int]) -> bytes:
    with socket.create_connection(address, 30) as client:
        client.sendall(REQUEST)
        return client.recv(1000)


def test_the_name_of_the_host_is_not_looked_up(tmp_path: Path, monkeypatch) -> None:
    """That would wait for DNS, and profiles would wait with it."""
    looked_up: list[str] = []
    monkeypatch.setattr(socket, "getfqdn", lambda name: looked_up.append(name) or name)

    metrics.serve("127.0.0.1:0", tmp_path)

    assert looked_up == []


def test_connections_take_a_bounded_number_of_threads(address: tuple[str, int]) -> None:
    """Those that are too many are closed at once; when the others are gone, there is room again."""
    before = threading.active_count()
    with contextlib.ExitStack() as opened:
        clients = [opened.enter_context(socket.create_connection(address, 30)) for _ in range(20)]
        refused = [client for client in clients[8:] if client.recv(1) == b""]
        count = threading.active_count() - before

    assert len(refused) == 12
    assert count == 8
    wait_for(lambda: threading.active_count() == before)
    assert b"503" in respond(address)
