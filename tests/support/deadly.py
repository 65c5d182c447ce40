"""Workers that are killed by chosen objects, as by one that takes more memory than there is."""

import os
import signal
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from storage.objects.keys import ObjectKey
from storage.query.workers import LoneWorker, Workers


class DeadlyWorkers(Workers):
    """Workers that the kernel kills as soon as they have the object that starts at `start_s`."""

    def __init__(self, count: int, start_s: int) -> None:
        super().__init__(count)
        self._start_s = start_s

    def submit(self, act: Callable[..., Any], /, *things: Any, **more: Any) -> Future[Any]:
        return super().submit(act_or_die, self._start_s, act, *things, **more)

    def lone_worker(self) -> LoneWorker:
        return _DeadlyLoneWorker(self._start_s)


class _DeadlyLoneWorker(LoneWorker):
    def __init__(self, start_s: int) -> None:
        super().__init__()
        self._start_s = start_s

    def run(self, act: Callable[..., Any], /, *things: Any) -> Any:
        return super().run(act_or_die, self._start_s, act, *things)


def act_or_die(start_s: int, act: Callable[..., Any], *things: Any) -> Any:
    """Run in the worker."""
    listed = [each for thing in things if isinstance(thing, list) for each in thing]
    keys = [each if isinstance(each, ObjectKey) else each[0] for each in listed]
    if any(key.start_s == start_s for key in keys):
        os.kill(os.getpid(), signal.SIGKILL)
    return act(*things)
