"""Sharing: equal requests wait for one computation, which ends when no request waits for it."""

import asyncio
import contextlib
import functools
import gzip
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import orjson
from starlette.requests import Request

from profiler.service.merged import Check
from profiler.service.problems import ProblemError

DEADLINE_S = 30.0
_STEP_S = 2.0
"""How much longer the last step of a computation may take."""
_WAITING_LIMIT = 200
"""Beyond so many waiting computations a new one is refused: at 0.1 s each it would time out."""
_GZIP_LEVEL = 1
"""Higher ones take longer than the bytes they save do on the way to a browser nearby."""

Body = tuple[bytes, str]
"""The content of a response, and its media type."""
Compute = Callable[[Check], Body]
"""Returns a body; runs in a thread."""


def json_body(response: object) -> Body:
    option = orjson.OPT_SERIALIZE_NUMPY
    return orjson.dumps(response, _as_array, option), "application/json"


def _as_array(value: object) -> object:
    if isinstance(value, tuple):  # orjson refuses named ones
        return tuple(value)
    raise TypeError(type(value))


def gzipped(body: Body) -> Body:
    return gzip.compress(body[0], _GZIP_LEVEL, mtime=0), body[1]


def gzipping(compute: Compute) -> Compute:
    """Compress in the thread that computes: the event loop would do nothing else meanwhile."""
    return lambda check: gzipped(compute(check))


class AbandonedError(Exception):
    """No request waits for a computation any more."""


class TooSlowError(Exception):
    """A computation did not end within its deadline."""

    def __init__(self, deadline_s: float) -> None:
        super().__init__(f"not ready after {deadline_s:g} s")
        self.deadline_s = deadline_s


class _Computation:
    """One computation, and how many requests wait for it."""

    def __init__(self, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self._deadline = time.monotonic() + deadline_s
        self._ended = threading.Event()
        self.waiting = 0
        self.future: asyncio.Future[Body]

    def end(self) -> None:
        self._ended.set()

    def check(self) -> None:
        if self._ended.is_set():
            raise AbandonedError
        if time.monotonic() > self._deadline:
            raise TooSlowError(self._deadline_s)


class SharedComputations:
    """Computes responses in threads, under a deadline; equal requests share one computation."""

    def __init__(self, deadline_s: float, threads: int, name: str) -> None:
        self._deadline_s = deadline_s
        self._pool = ThreadPoolExecutor(threads, name)
        self._computations: dict[str, _Computation] = {}
        self._running: set[Future[Body]] = set()
        self.shared = 0
        self.ended = 0

    @property
    def is_busy(self) -> bool:
        """Return whether something is being computed, or waits to be."""
        return bool(self._computations)

    def end(self) -> None:
        """Let all end, and take no new ones."""
        for computation in self._computations.values():
            computation.end()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def wait(self, within_s: float) -> bool:
        """Return whether all have ended within a time."""
        return not wait(self._running, max(0.0, within_s)).not_done

    async def result(self, key: str, compute: Compute, request: Request) -> Body:
        """Return what a computation returns, or stop waiting when the client has gone.

        Raises:
            AbandonedError: the client has gone.
            TooSlowError: it did not end within the deadline.
            ProblemError: too many computations wait.
        """
        computation = self._computations.get(key)
        if computation is None:
            computation = self._start(key, compute)
        else:
            self.shared += 1
        computation.waiting += 1
        gone = asyncio.ensure_future(_disconnected(request))
        either: set[asyncio.Future[Any]] = {computation.future, gone}
        try:
            # A computation looks at the clock between its steps; one of them may hang.
            limit_s = self._deadline_s + _STEP_S
            await asyncio.wait(either, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
            if computation.future.done():
                return computation.future.result()
            raise AbandonedError if gone.done() else TooSlowError(self._deadline_s)
        finally:
            gone.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await gone
            computation.waiting -= 1
            if computation.waiting == 0 and not computation.future.done():
                self.ended += 1
                computation.end()
                computation.future.cancel()  # one that has not begun never will
                self._computations.pop(key, None)

    def _start(self, key: str, compute: Compute) -> _Computation:
        if len(self._computations) >= _WAITING_LIMIT:
            raise ProblemError(503, "Busy", "too many requests wait for a response already")
        computation = _Computation(self._deadline_s)
        work = self._pool.submit(compute, computation.check)
        self._running.add(work)
        work.add_done_callback(self._running.discard)
        computation.future = asyncio.wrap_future(work)
        computation.future.add_done_callback(functools.partial(self._forget, key))
        self._computations[key] = computation
        return computation

    def _forget(self, key: str, future: asyncio.Future[Body]) -> None:
        computation = self._computations.get(key)
        if computation is not None and computation.future is future:
            del self._computations[key]
        if not future.cancelled():
            future.exception()  # the requests that waited have it, if there were any


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
