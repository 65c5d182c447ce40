"""A receiver of webhooks: a real HTTP server that responds as a test says and keeps what it got."""

import contextlib
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.support.live import wait_for


@dataclass
class Received:
    """A request."""

    method: str
    path: str
    headers: dict[str, str]
    content: bytes


@dataclass
class Receiver:
    """Responds to each request with the next of `responses`, and with the last one from then on.

    A response is a status, (status, location), or a function that gets the handler.
    """

    url: str = ""
    responses: list[object] = field(default_factory=lambda: [204])
    received: list[Received] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def wait_for(self, number: int) -> None:
        wait_for(lambda: len(self.received) >= number, 60, f"{number} calls")


def hang(receiver: Receiver) -> Callable[[BaseHTTPRequestHandler], None]:
    """Return a response that never comes."""
    return lambda _: receiver.ended.wait(60) and None


def drip(receiver: Receiver) -> Callable[[BaseHTTPRequestHandler], None]:
    """Return a response that comes byte by byte, and never ends."""

    def respond(handler: BaseHTTPRequestHandler) -> None:
        with contextlib.suppress(OSError):
            handler.wfile.write(b"HTTP/1.1 200 ")
            while not receiver.ended.wait(0.05):
                handler.wfile.write(b"x")

    return respond


@contextlib.contextmanager
def receiving(certificate: Path | None = None) -> Iterator[Receiver]:
    """Run a receiver on loopback for the length of the block, with TLS if it has a certificate."""
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            found = Received(self.command, self.path, dict(self.headers), content)
            receiver.received.append(found)
            number = min(len(receiver.received), len(receiver.responses)) - 1
            response = receiver.responses[number]
            if callable(response):
                response(self)
                return
            status, location = response if isinstance(response, tuple) else (response, "")
            self.send_response(status)
            if location:
                self.send_header("Location", location)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_GET(self) -> None:
            receiver.received.append(Received("GET", self.path, dict(self.headers), b""))
            self.send_error(405)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        scheme = "https" if certificate else "http"
        receiver.url = f"{scheme}://127.0.0.1:{server.server_address[1]}/hook/secret-token"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield receiver
        finally:
            receiver.ended.set()
            server.shutdown()
            thread.join(20)
