"""Threads: act on things ahead of their reader, and let one thread at a time do one job."""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

AHEAD = 8
"""Results that may wait for their reader, where nothing else is said."""

_One = TypeVar("_One")
_Other = TypeVar("_Other")


def never_interrupt() -> None:
    """Do nothing, where a caller wants to interrupt nothing."""


def map_ahead(
    pool: ThreadPoolExecutor,
    act: Callable[[_One], _Other],
    things: Iterable[_One],
    ahead: int = AHEAD,
) -> Iterator[_Other]:
    """Return `act` of each thing in order. At most `ahead` results wait for their reader."""
    waiting: deque[Future[_Other]] = deque()
    try:
        for thing in things:
            waiting.append(pool.submit(act, thing))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def run_both(one: Callable[[], _One], other: Callable[[], _Other]) -> tuple[_One, _Other]:
    """Return what two functions return that run at the same time, the other in a thread.

    Of two exceptions the first function's is raised. Both have ended then.
    """
    with ThreadPoolExecutor(1, "other") as pool:
        waiting = pool.submit(other)
        return one(), waiting.result()


class Turns:
    """Lets one thread at a time do a named job; threads that waited find it done."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._turns: dict[str, tuple[threading.Lock, list[None]]] = {}

    def is_taken(self, name: str) -> bool:
        """Return whether a thread does this job or waits for its turn."""
        with self._lock:
            return name in self._turns

    @contextlib.contextmanager
    def of(self, name: str, check: Callable[[], None]) -> Iterator[None]:
        """Wait for the turn as long as `check` raises nothing, and hold it for the block."""
        with self._lock:
            turn, waiting = self._turns.setdefault(name, (threading.Lock(), []))
            waiting.append(None)
        try:
            while not turn.acquire(timeout=0.1):
                check()
            try:
                yield
            finally:
                turn.release()
        finally:
            with self._lock:
                waiting.pop()
                if not waiting:
                    del self._turns[name]
