"""Prefetch: decodes new objects as they arrive, so that the first look at a day does not wait.

A process of its own, `python -m profiler.service.prefetch`, which the service keeps running and
which ends with it. It runs when nothing else needs the CPU (SCHED_IDLE), uses at most a share of
one CPU even then, and writes into the cache that the service reads. It goes back a day, which fills
most of that cache. It reports its progress as lines of JSON on its standard output.
"""

import argparse
import contextlib
import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

from storage.objects.keys import StoreError
from storage.objects.open import open_tenant
from storage.profile import Window
from storage.query.listing import HOUR_NS
from storage.query.query import Query

DEFAULT_PERCENT = 10
"""Of one CPU. A day of a busy host is then decoded in some minutes, newest first."""
_REACH_NS = 24 * HOUR_NS
_LATEST_NS = 2 * HOUR_NS
_PERIOD_S = 60.0
"""How often the latest hours are listed: agents store an object a minute."""
_WHOLE_EVERY = 10
"""One of so many rounds looks at the whole day, which takes a listing of each hour."""
_FIRST_AFTER_S = 2.0
"""A page opened at once comes first: an interpreter's start is half a second of CPU, before it can
be scheduled as SCHED_IDLE."""
_RESTART_S = 60.0
_ENVIRONMENT = {
    # Merging an hour takes arrays of 100 MB for a second; without these two malloc keeps them.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TRIM_THRESHOLD_": "131072",
}
_PR_SET_PDEATHSIG = 1  # prctl(2)

log = logging.getLogger(__name__)


class Prefetcher:
    """Keeps the process running, restarts it when it has died, and knows its last progress."""

    def __init__(self, store: str, endpoint: str, tenant: str, cache: Path, percent: int) -> None:
        self._command = [
            sys.executable,
            "-P",
            "-m",
            "profiler.service.prefetch",
            f"--parent={os.getpid()}",
        ]
        self._command += [f"--store={store}", f"--s3-endpoint={endpoint}"]
        self._command += [f"--tenant={tenant}", f"--cache={cache}", f"--percent={percent}"]
        self._percent = percent
        self._process: subprocess.Popen[bytes] | None = None
        self._has_ended = threading.Event()
        self._progress: dict[str, Any] = {}

    def start(self) -> None:
        """Start the process, unless its share is 0."""
        if self._percent > 0:
            threading.Thread(target=self._keep, name="prefetch", daemon=True).start()

    def progress(self) -> dict[str, Any]:
        """Return what the process last reported; an empty dict before its first report."""
        return self._progress

    def end(self) -> None:
        self._has_ended.set()
        if self._process is not None:
            self._process.kill()  # the cache's files appear whole or not at all

    def _keep(self) -> None:
        self._has_ended.wait(_FIRST_AFTER_S)
        while not self._has_ended.is_set():
            try:
                self._run()
            except OSError as error:  # no process or no memory is left: there may be later
                log.warning("cannot decode in advance: %s", error.strerror)
            self._has_ended.wait(_RESTART_S)

    def _run(self) -> None:
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env={**os.environ, **_ENVIRONMENT},
            process_group=0,  # a Ctrl-C is for its parent
        )
        with self._process as process:
            assert process.stdout is not None
            for line in process.stdout:
                self._progress = orjson.loads(line)


class Pace:
    """Pauses after work, so that it stays within a share of one CPU."""

    def __init__(self, share: float, rest: Callable[[float], None] = time.sleep) -> None:
        self._share = share
        self._rest = rest
        self._begun_s = time.process_time()

    def rest(self) -> None:
        spent_s = time.process_time() - self._begun_s
        self._rest(spent_s * (1 / self._share - 1))
        self._begun_s = time.process_time()


def work(query: Query, percent: int) -> None:
    """Decode without end."""
    pace = Pace(percent / 100)
    decoded, rounds = 0, 0
    while True:
        now_ns = time.time_ns()
        reach_ns = _LATEST_NS if rounds % _WHOLE_EVERY else _REACH_NS
        start_ns = (now_ns - reach_ns) // HOUR_NS * HOUR_NS
        # A clock that is a little behind those of the hosts must not hide their latest object.
        window = Window(max(0, start_ns), now_ns + HOUR_NS)
        error = ""
        try:
            for part in query.prepare(window):
                decoded += part.objects
                _report(decoded, part.left, error)
                pace.rest()
        except StoreError as gone:
            error = str(gone)
        _report(decoded, 0, error)
        pace.rest()
        rounds += not error
        time.sleep(max(0.0, _PERIOD_S - (time.time_ns() - now_ns) / 1e9))


def _report(decoded: int, waiting: int, error: str) -> None:
    line = {
        "decoded": decoded,
        "waiting": waiting,
        "cpu_ns": time.process_time_ns(),
        "at_ms": time.time_ns() // 1_000_000,
        "error": error,
    }
    sys.stdout.buffer.write(orjson.dumps(line) + b"\n")
    sys.stdout.buffer.flush()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m profiler.service.prefetch")
    parser.add_argument("--store", required=True)
    parser.add_argument("--s3-endpoint", default="")
    parser.add_argument("--tenant", default="")
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--percent", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    options = parser.parse_args()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != options.parent:
        return 0  # the parent died before prctl could report it
    with contextlib.suppress(OSError):  # where it is forbidden the share is the only bound
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    store = open_tenant(options.store, options.s3_endpoint or None, options.tenant)
    work(Query(store, options.cache), options.percent)
    return 0


if __name__ == "__main__":
    sys.exit(main())
