"""The service as a process of its own, and a client that asks it over HTTP."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from profiler.service.app import Service
from profiler.service.connections import Server
from profiler.service.merged import MergedProfiles
from profiler.service.status import About
from storage.objects.keys import ObjectStore
from storage.objects.tenant import TenantStore
from storage.profile import Profile
from storage.query.query import Query
from tests.support import profiles as some
from tests.support.live import wait_for
from tests.support.stores import at
from tests.support.targets import ending_with_us


class Client:
    def __init__(self, url: str) -> None:
        self.url = url
        self.port = int(url.rpartition(":")[2])

    def get(self, path: str, headers=None, raw_query: str = "", **parameters):
        """Return (status, headers, body)."""
        query = raw_query or urllib.parse.urlencode(parameters, doseq=True)
        request = urllib.request.Request(f"{self.url}{path}?{query}", headers=headers or {})
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return response.status, response.headers, response.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers, error.read()

    def json(self, path: str, **parameters):
        status, _, body = self.get(f"/api/v1/{path}", **parameters)
        assert status == 200, body
        return json.loads(body)


@contextlib.contextmanager
def service(
    folder: Path,
    *arguments: str,
    environment: Mapping[str, str] = MappingProxyType({}),
    run: Sequence[str] = ("-m", "profiler.commands.serve"),
) -> Iterator[tuple[subprocess.Popen[bytes], Client]]:
    """Run a service over `folder/store`; its standard error is in `folder/talk`.

    It must end without an error, unless the block has ended it.
    """
    command = [sys.executable, *run, "--listen=127.0.0.1:0"]
    command += [f"--store={folder / 'store'}", f"--cache={folder / 'cache'}"]
    command += [f"--run-folder={folder}", *arguments]
    command = ending_with_us(*command, signal="TERM")
    with (
        (folder / "talk").open("wb") as talk,
        subprocess.Popen(command, stderr=talk, env={**os.environ, **environment}) as process,
    ):
        try:
            page = "the page is at "
            wait_for(lambda: page in (folder / "talk").read_text() or process.poll())
            (url,) = re.findall(f"{page}(http://[^/]*)", (folder / "talk").read_text())
            yield process, Client(url)
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                assert process.wait(20) == 0
        finally:
            if process.poll() is None:
                process.kill()
    assert "Traceback" not in (folder / "talk").read_text()


def profile_of(minute: int) -> Profile:
    return at(
        some.build(
            [
                ({"service": "api", "comm": "api"}, [some.MAIN, some.WORK], minute + 1),
                ({"service": "jobs", "comm": "jobs"}, [some.HANDLER, some.named("job")], 2),
            ],
            some.NAMES,
        ),
        minute,
    )


@contextlib.contextmanager
def serving(
    store: ObjectStore, folder: Path, deadline_s: float = 30, now_ns=time.time_ns
) -> Iterator[tuple[Service, Client]]:
    profiles = TenantStore(store)
    service = Service(
        MergedProfiles(profiles, Query(profiles, folder / "cache")),
        About("memory", folder),
        now_ns=now_ns,
        deadline_s=deadline_s,
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = Server(service.app(), service.slots)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener.dup()]})
        thread.start()
        yield service, Client(f"http://127.0.0.1:{listener.getsockname()[1]}")
        server.should_exit = True
        thread.join(30)
