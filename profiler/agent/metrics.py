"""`/metrics` for Prometheus: a page that asks the agent's socket each time it is fetched.

It runs in the uploader, where the network is; the sampler opens no port.
"""

import http.server
import socket
import threading
from http import HTTPStatus
from pathlib import Path
from typing import Any

from profiler.agent import status

_REQUEST_TIMEOUT_S = 10.0
_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class MetricsError(Exception):
    """The address cannot be listened on; the message says which and why."""


def parse_address(text: str) -> tuple[str, int]:
    """Parse HOST:PORT, `[::1]:9100` or `:9100`, which is loopback.

    Raises:
        MetricsError: it is none of these.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise MetricsError(f"cannot listen on {text!r}: give HOST:PORT, as 127.0.0.1:9100")
    return host.strip("[]") or "127.0.0.1", int(port)


def serve(address: str, run_folder: Path) -> None:
    """Serve from a thread of its own for as long as the process lives.

    Raises:
        MetricsError: the address is not one, or is taken.
    """
    host, port = parse_address(address)
    try:
        server = _Server((host, port), run_folder)
    except OSError as error:
        raise MetricsError(f"cannot listen on {address}: {error.strerror}") from error
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], run_folder: Path) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.run_folder = run_folder
        super().__init__(address, _Handler)


class _Handler(http.server.BaseHTTPRequestHandler):
    timeout = _REQUEST_TIMEOUT_S
    server: _Server

    def do_GET(self) -> None:
        if self.path != "/metrics":
            self._answer(HTTPStatus.NOT_FOUND, b"there is only /metrics\n")
            return
        try:
            content = status.metrics(status.ask(self.server.run_folder))
        except status.NoAgentError as error:
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, f"{error}\n".encode())
            return
        self._answer(HTTPStatus.OK, content)

    def _answer(self, code: HTTPStatus, content: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", _CONTENT_TYPE)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Say nothing: a scrape every few seconds is no news."""
