"""Workers: processes that decode objects, beside the threads of this one.

Python runs one thread at a time, so decoding in threads takes one CPU. Workers receive data, and
send arrays back.
"""

import ctypes
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from multiprocessing import resource_tracker
from typing import Any, TypeVar

_LATE_AFTER = 6
"""Chunks that are decoded before workers are started: a second's work."""
_REST_S = 2.0
"""A worker that does nothing for so long gives memory back."""
_ENDING = {signal.SIGINT, signal.SIGTERM}

_Done = TypeVar("_Done")


def start_workers(count: int) -> Executor:
    """Start processes that decode objects. They are ready when this returns.

    What they are sent is data, what they send back are arrays; a worker that dies costs only time.
    """
    context = multiprocessing.get_context("spawn")
    # A Ctrl-C reaches all processes of a terminal; these end with their parent, and only so. The
    # tracker is started first: whoever starts it finds both signals unblocked (Python 3.11).
    resource_tracker.ensure_running()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    workers = ProcessPoolExecutor(count, context, initializer=_settle_in)
    try:
        for started in [workers.submit(os.getpid) for _ in range(count)]:
            started.result()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)  # what came meanwhile is raised here
    except BaseException:
        workers.shutdown()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        raise
    return workers


class LateWorkers(Executor):
    """Workers for who may have little to decode: they are started once it is much.

    A start takes half a second and each of them 60 MB. Until they are ready what is submitted is
    refused, and a Query decodes it itself.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._refused = 0
        self._lock = threading.Lock()
        self._workers: Executor | None = None

    def submit(self, act: Callable[..., _Done], /, *things: Any, **more: Any) -> "Future[_Done]":
        """Have a worker act.

        Raises:
            RuntimeError: there are none yet.
        """
        if self._workers is not None:
            return self._workers.submit(act, *things, **more)
        with self._lock:
            self._refused += 1
            if self._refused == _LATE_AFTER and self._count > 1:
                threading.Thread(target=self._start, name="workers", daemon=True).start()
        raise RuntimeError("there are no workers yet")

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        if self._workers is not None:
            self._workers.shutdown(wait, cancel_futures=cancel_futures)

    def _start(self) -> None:
        self._workers = start_workers(self._count)
        threading.Event().wait()  # they end with the thread that started them


def _settle_in() -> None:
    """Make this process a worker, which ends with its parent, however that ends.

    malloc keeps what is freed, as a third of decoding was the kernel's zeroing of pages, until
    there has been nothing to decode for a while: that is 25 MB.
    """
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # forgets one that came to all
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # with which the executor ends it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    libc = ctypes.CDLL(None)
    pr_set_pdeathsig = 1  # prctl(2)
    libc.prctl(pr_set_pdeathsig, int(signal.SIGKILL), 0, 0, 0)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:
        os._exit(0)  # it has died before this line
    if hasattr(libc, "mallopt"):  # musl has none
        mmap_threshold, trim_threshold = -3, -1
        libc.mallopt(mmap_threshold, 1 << 28)
        libc.mallopt(trim_threshold, 1 << 28)
        threading.Thread(target=_give_back, args=(libc.malloc_trim,), daemon=True).start()


def _give_back(trim: Callable[[int], int]) -> None:
    used_s = given_s = time.process_time()
    while True:
        time.sleep(_REST_S)
        before_s, used_s = used_s, time.process_time()
        is_resting = used_s - before_s < _REST_S / 100
        if is_resting and used_s - given_s > _REST_S / 100:
            trim(0)
            given_s = time.process_time()
