"""`/metrics` for Prometheus: the agent's status, asked from its socket for each request.

It is served by the uploader, which has the network; the sampler opens no port.
"""

import http.server
import socket
import socketserver
import threading
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

from profiler import exposition
from profiler.agent import status
from profiler.exposition import Metric, labelled, single

_REQUEST_TIMEOUT_S = 10.0
_PARTS = (
    "readers",
    "files",
    "mappings",
    "labels",
    "cpython",
    "thread_names",
    "perf_map",
    "jitdump",
    "jit_locations",
)
_MOST_REQUESTS = 8
"""Requests at a time, each with a thread: Prometheus has one. Further connections are closed."""


class MetricsError(Exception):
    """The address cannot be listened on; the message says which and why."""


def serve(address: str, run_folder: Path) -> None:
    """Serve from a thread of its own for as long as the process lives.

    Raises:
        AddressError: it is not an address.
        MetricsError: it is taken, or not one of this host.
    """
    host, port = exposition.parse_address(address)
    try:
        server = _Server((host, port), run_folder)
    except OSError as error:
        raise MetricsError(f"cannot listen on {address}: {error.strerror}") from error
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()


def metrics_of(status: Mapping[str, Any]) -> Iterator[Metric]:
    """Return what the agent's status says as metrics."""
    upload, spool = status["uploader"], status["spool"]
    counters = {
        "ticks": status["ticks"],
        "idle_ticks": status["idle"],
        "filtered_ticks": status["filtered"],
        # A counter never falls: what a full spool dropped later was stored, and is lost as well.
        "stored_samples": status["stored"] + spool["lost_samples"],
        "windows_closed": status["windows"],
        "faults": status["faults"],
        "spool_windows_given_up": spool["given_up"],
        "uploader_starts": upload["starts"],
        "unwind_builds_interrupted": status["unwinding"]["builds_interrupted"],
        "unwind_mappings_without_number": status["unwinding"]["mappings_without_number"],
        "files_misclaimed": status["files"]["misclaimed_build_ids"],
        "files_beyond_limit": status["files"]["beyond_limit"],
        "readers_answered": status["readers"]["answered"],
        "instances_uncounted": status["labels"]["instances_uncounted"],
    }
    gauges = {
        "alarm": int(status["alarm"]),
        "uptime_seconds": status["uptime_s"],
        "bpf_seconds_per_tick": status["bpf_ns_per_tick"] / 1e9,
        "unwind_processes": status["unwinding"]["processes"],
        "unwind_tables": status["unwinding"]["tables"],
        "unwind_tables_waiting": status["unwinding"]["tables_waiting"],
        "unwind_kernel_bytes": status["unwinding"]["kernel_bytes"],
        "files": status["files"]["files"],
        "files_failed": status["files"]["failed"],
        "mounts_hung": status["files"]["mounts_hung"],
        "readers": status["readers"]["children"],
        "readers_left_behind": status["readers"]["left_behind"],
        "spool_windows": spool["profiles"],
        "spool_bytes": spool["size_bytes"],
        "spool_limit_bytes": spool["limit_bytes"],
        "spool_unwritten_ticks": spool["unwritten_ticks"],
    }
    for name, value in counters.items():
        yield single(f"everflame_{name}_total", "counter", value)
    for name, value in gauges.items():
        yield single(f"everflame_{name}", "gauge", value)
    cpu_s = {part: ns / 1e9 for part, ns in status["cpu_ns"].items()}
    rss_bytes = {
        "sampler": status["sampler"]["rss_bytes"],
        "uploader": upload.get("rss_bytes", 0),
    }
    figures = {name: value for name, value in upload.items() if isinstance(value, int | float)}
    for part in _PARTS:
        yield labelled(f"everflame_{part}", "gauge", "figure", status.get(part, {}))
    yield labelled("everflame_lost_ticks_total", "counter", "cause", status["lost"])
    yield labelled("everflame_stack_ends_total", "counter", "reason", status["stops"])
    yield labelled("everflame_cpu_seconds_total", "counter", "part", cpu_s)
    yield labelled("everflame_resident_memory_bytes", "gauge", "process", rss_bytes)
    yield labelled("everflame_upload", "gauge", "figure", figures)


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], run_folder: Path) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.run_folder = run_folder
        self._slots = threading.BoundedSemaphore(_MOST_REQUESTS)
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """Bind; HTTPServer would also look up the host's name, which may wait for DNS."""
        socketserver.TCPServer.server_bind(self)

    def process_request(
        self, request: socket.socket | tuple[bytes, socket.socket], client_address: Any
    ) -> None:
        if not self._slots.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be started
            self._slots.release()
            raise

    def process_request_thread(
        self, request: socket.socket | tuple[bytes, socket.socket], client_address: Any
    ) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()


class _Handler(http.server.BaseHTTPRequestHandler):
    timeout = _REQUEST_TIMEOUT_S
    server: _Server

    def do_GET(self) -> None:
        if self.path != "/metrics":
            self._respond(HTTPStatus.NOT_FOUND, b"there is only /metrics\n")
            return
        try:
            content = exposition.encode(metrics_of(status.ask(self.server.run_folder)))
        except status.NoAgentError as error:
            self._respond(HTTPStatus.SERVICE_UNAVAILABLE, f"{error}\n".encode())
            return
        self._respond(HTTPStatus.OK, content)

    def _respond(self, code: HTTPStatus, content: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", exposition.CONTENT_TYPE)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Log nothing: there is a request every few seconds."""
