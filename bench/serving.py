"""The real service as a process of its own, asked over HTTP, its memory, and figures printed."""

import contextlib
import gzip
import http.client
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

EVERFLAME = Path(sys.executable).with_name("everflame")


class Least(float):
    """An aim that a figure has to reach."""


Row = tuple[str, float, str, float | None]
"""A figure: what it is, its value and unit, and the most that it may be, or its `Least`."""


def show(rows: Iterable[Row]) -> int:
    """Print figures as they come; return how many missed their aim."""
    missed = 0
    for what, value, unit, bound in rows:
        aim = ""
        if bound is not None:
            is_least = isinstance(bound, Least)
            is_met = value >= bound if is_least else value <= bound
            missed += not is_met
            verdict = "ok" if is_met else "MISSED"
            aim = f"  (at {'least' if is_least else 'most'} {bound:g}: {verdict})"
        print(f"{what:46} {value:10,.3f} {unit}{aim}", flush=True)
    return missed


class Reply(NamedTuple):
    """What came back: its status, its body as it was sent, and how long all of it took."""

    status: int
    body: bytes
    took_s: float

    @property
    def plain(self) -> bytes:
        return gzip.decompress(self.body)


@dataclass(frozen=True, slots=True)
class Serving:
    """A service that listens."""

    url: str
    pid: int

    def get(self, path: str, **parameters: object) -> Reply:
        """Ask as a browser does, which takes gzip, over a connection of its own."""
        address = urllib.parse.urlsplit(self.url)
        query = urllib.parse.urlencode(parameters, doseq=True)
        started = time.perf_counter()
        connection = http.client.HTTPConnection(address.hostname, address.port, timeout=120)
        with contextlib.closing(connection):
            connection.request("GET", f"{path}?{query}", headers={"Accept-Encoding": "gzip"})
            response = connection.getresponse()
            body = response.read()
        return Reply(response.status, body, time.perf_counter() - started)

    def memory_mb(self) -> tuple[float, float]:
        """Return the RSS of the service itself, and the PSS of it and all of its workers."""
        return rss_mb(self.pid), sum(map(pss_mb, all_pids(self.pid)))


@contextlib.contextmanager
def serving(store: str, cache: Path, *arguments: str) -> Iterator[Serving]:
    """Run `everflame serve` over a store for the length of the block."""
    command = [EVERFLAME, "serve", "--listen=127.0.0.1:0", f"--store={store}", *arguments]
    folders = {"EVERFLAME_CACHE": str(cache), "EVERFLAME_RUN": str(cache)}
    with (
        tempfile.NamedTemporaryFile() as said,
        subprocess.Popen(command, env={**os.environ, **folders}, stderr=said) as process,
    ):
        try:
            url = _wait_for_url(Path(said.name), process)
            yield Serving(url, process.pid)
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_for_url(said: Path, process: subprocess.Popen[bytes]) -> str:
    while process.poll() is None:
        found = re.search(r"http://127\.0\.0\.1:\d+(?=/\n)", said.read_text())
        if found:
            return found[0]
        time.sleep(0.02)
    raise RuntimeError(f"the service has not started: {said.read_text()}")


def all_pids(pid: int) -> list[int]:
    """Return a process and all that descend from it."""
    children = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            children += task.read_text().split()
    return [pid, *(each for child in children for each in all_pids(int(child)))]


def pss_mb(pid: int) -> float:
    return _kilobytes(f"/proc/{pid}/smaps_rollup", "Pss") / 1024


def rss_mb(pid: int, field: str = "VmRSS") -> float:
    return _kilobytes(f"/proc/{pid}/status", field) / 1024


def _kilobytes(file: str, name: str) -> int:
    """Return a field of a file in /proc; 0 for a process that has ended."""
    try:
        text = Path(file).read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    match = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(match[1]) if match else 0
