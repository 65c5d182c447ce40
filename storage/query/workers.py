"""Workers: processes that decode objects, as well as the threads of this one.

Python runs one thread at a time, so decoding in threads takes one CPU. Workers receive data and
send arrays back.

A worker's memory is bounded: some object may take more than there is. The kernel may kill one all
the same, for want of memory above all. `ProcessPoolExecutor` is then broken for
good, so the whole pool is replaced; with a growing delay, as what killed one may kill the next.
"""

import contextlib
import ctypes
import functools
import logging
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self, TypeVar, runtime_checkable

from storage.objects.keys import CPU, ObjectStore

LATE_AFTER = 6
"""Chunks that are decoded before workers are started: a second's work."""
_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.1, 60.0
"""Before a pool is replaced: twice as long each time, until one has lived for _STEADY_S."""
_STEADY_S = 600.0
MEMORY_BYTES = 1 << 30
"""What a worker may take in addition to what it starts with; beyond it Python raises MemoryError.
The largest object within the limits takes 0.8 GB, a usual chunk 0.2."""
_REST_S = 2.0
"""A worker that does nothing for so long gives memory back."""
_ENDING = {signal.SIGINT, signal.SIGTERM}
_START_ERRORS = (OSError, RuntimeError)
"""RuntimeError: a thread could not be started, as where a container may have no more of them; or
BrokenExecutor, which is one."""

_environment = threading.Lock()
_Done = TypeVar("_Done")
_log = logging.getLogger(__name__)


class Place(NamedTuple):
    """What a piece of work needs wherever it is done."""

    store: ObjectStore
    tenant: str
    key: bytes
    """The tenant's."""
    folder: Path
    type: str = CPU
    name: str = ""
    """The hour or day that is written, as its manifest is called."""
    home: str = ""
    """Work of the same name has left files in the cache of whoever did it: best do it there."""


class NoWorkersError(RuntimeError):
    """No worker runs at the moment."""


class WorkerCounts(NamedTuple):
    pools_lost: int
    """Pools of which a worker was killed."""
    pools_started: int


class Workers(Executor):
    """A pool of processes that is replaced when one of them is killed.

    It is started by `start`, or once `late_after` submissions were refused: for a command that may
    have little to decode, as a start takes half a second and each process 60 MB. While no pool runs
    submissions are refused, and a Query decodes in its own process.
    """

    def __init__(
        self, count: int, *, late_after: int = LATE_AFTER, memory_bytes: int = MEMORY_BYTES
    ) -> None:
        self._count = count
        self._memory_bytes = memory_bytes
        self._late_after = late_after
        self._refused = 0
        self._lost = self._started = 0
        self._lock = threading.Lock()
        self._pool: ProcessPoolExecutor | None = None
        self._keeper: threading.Thread | None = None
        self._has_tried = threading.Event()
        self._wakes = threading.Event()
        self._ends = threading.Event()

    @property
    def counts(self) -> WorkerCounts:
        return WorkerCounts(self._lost, self._started)

    def start(self) -> None:
        """Start the processes; return when they are ready.

        If they cannot be started, that is logged and tried again later.
        """
        with self._lock:
            self._start_keeper()
        self._has_tried.wait()

    def submit(self, act: Callable[..., _Done], /, *things: Any, **more: Any) -> "Future[_Done]":
        """Have a worker act. The future raises BrokenExecutor if the pool loses a worker.

        Raises:
            NoWorkersError: no pool runs at the moment.
            RuntimeError: they are shut down.
        """
        pool = self._pool
        if pool is None:
            with self._lock:
                self._refused += 1
                if self._refused == self._late_after and self._count > 1:
                    self._start_keeper()
            raise NoWorkersError("there are no workers yet")
        try:
            future = pool.submit(act, *things, **more)
        except BrokenExecutor as error:
            self._replace(pool)
            raise NoWorkersError("a worker was killed, others are not yet started") from error
        future.add_done_callback(functools.partial(self._notice_loss, pool))
        return future

    def lone_worker(self) -> "LoneWorker":
        """Return a worker apart from the pool, for what may kill it."""
        return LoneWorker(self._memory_bytes)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        with self._lock:
            self._ends.set()
            pool, keeper = self._pool, self._keeper
        if pool is not None:
            pool.shutdown(wait, cancel_futures=cancel_futures)
        self._wakes.set()
        if wait and keeper is not None:
            keeper.join()

    def _start_keeper(self) -> None:
        if self._keeper is None and not self._ends.is_set():
            self._keeper = threading.Thread(target=self._keep_pool, name="workers", daemon=True)
            self._keeper.start()

    def _notice_loss(self, pool: ProcessPoolExecutor, future: "Future[Any]") -> None:
        if not future.cancelled() and isinstance(future.exception(), BrokenExecutor):
            self._replace(pool)

    def _replace(self, pool: ProcessPoolExecutor) -> None:
        with self._lock:
            if self._pool is not pool or self._ends.is_set():
                return
            self._pool = None
            self._lost += 1
        _kill_workers(pool)
        self._wakes.set()

    def _keep_pool(self) -> None:
        """Start a pool, and another one whenever it loses a worker.

        Its processes end with the thread that starts them, so this one lasts as long as they do.
        """
        delay_s = _FIRST_DELAY_S
        while True:
            started_s = time.monotonic()
            try:
                pool = _start_pool(self._count, self._memory_bytes)
            except _START_ERRORS as error:
                _log.warning("cannot start workers error=%r retry_s=%g", error, delay_s)
            else:
                with self._lock:
                    self._started += 1
                    self._pool = pool
                self._has_tried.set()
                self._wakes.wait()
                self._wakes.clear()
                pool.shutdown()
                if self._ends.is_set():
                    return
                if time.monotonic() - started_s > _STEADY_S:
                    delay_s = _FIRST_DELAY_S
                _log.warning("lost a worker: starting others in_s=%g lost=%d", delay_s, self._lost)
            self._has_tried.set()
            if self._ends.wait(delay_s):
                return
            delay_s = min(2 * delay_s, _LONGEST_DELAY_S)


class LoneWorker:
    """One process, started when it is needed and again after it was killed. Not for threads.

    The process ends with the thread that uses it, or when the block ends.
    """

    def __init__(self, memory_bytes: int = MEMORY_BYTES) -> None:
        self._memory_bytes = memory_bytes
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def run(self, act: Callable[..., _Done], /, *things: Any) -> _Done:
        """Return what the process makes of the arguments.

        Raises:
            BrokenExecutor: the process was killed meanwhile.
            NoWorkersError: it cannot be started.
        """
        if self._pool is None:
            try:
                self._pool = _start_pool(1, self._memory_bytes)
            except _START_ERRORS as error:
                raise NoWorkersError(f"cannot start a worker: {error}") from error
        try:
            return self._pool.submit(act, *things).result()
        except BrokenExecutor:
            self.__exit__()
            raise


@runtime_checkable
class HasLoneWorker(Protocol):
    """An executor that says which process does what may kill its workers."""

    def lone_worker(self) -> LoneWorker:
        """Return one, which is not started yet."""


def start_workers(count: int) -> Workers:
    """Start processes that decode objects. They are ready when this returns."""
    workers = Workers(count)
    try:
        workers.start()
    except BaseException:  # an interrupt while they start
        workers.shutdown()
        raise
    return workers


def _start_pool(count: int, memory_bytes: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    # A Ctrl-C reaches all processes of a terminal, but workers end with their parent alone: they
    # start with both signals blocked. The tracker is started first: starting it unblocks them in
    # this thread (Python 3.11).
    with _safe_path():
        resource_tracker.ensure_running()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        pool = ProcessPoolExecutor(count, context, initializer=_settle_in, initargs=(memory_bytes,))
        try:
            with _safe_path():
                ready = [pool.submit(os.getpid) for _ in range(count)]
            for started in ready:
                started.result()
        except BaseException:
            _kill_workers(pool)  # those that still start would forget a SIGTERM
            with contextlib.suppress(RuntimeError):  # its thread could not be started
                pool.shutdown()
            raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return pool


@contextlib.contextmanager
def _safe_path() -> Iterator[None]:
    """Keep Python processes that start now from importing out of the working folder.

    It may be anybody's, and a `multiprocessing.py` there would run in place of Python's own.
    """
    with _environment:
        before = os.environ.get("PYTHONSAFEPATH", "")
        os.environ["PYTHONSAFEPATH"] = "1"
        try:
            yield
        finally:
            os.environ["PYTHONSAFEPATH"] = before  # empty is as good as unset: python(1)


def _kill_workers(pool: ProcessPoolExecutor) -> None:
    """End the other workers of a pool that lost one.

    The executor sends them SIGTERM, which a worker that is still starting forgets, and then waits
    for them without end. (Python 3.14 has `kill_workers` for this.)
    """
    for process in list((pool._processes or {}).values()):  # noqa: SLF001 - there is no other way
        process.kill()


def _settle_in(memory_bytes: int) -> None:
    """Make this process a worker, which ends with the thread that started it, however that ends.

    malloc keeps what is freed (25 MB) until the worker rests: a third of decoding was the kernel's
    zeroing of pages.
    """
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # forgets one that came to all
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # with which the executor ends it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    _limit_memory(memory_bytes)
    libc = ctypes.CDLL(None)
    pr_set_pdeathsig = 1  # prctl(2)
    libc.prctl(pr_set_pdeathsig, int(signal.SIGKILL), 0, 0, 0)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:
        os._exit(0)  # the parent has died before this line
    if hasattr(libc, "mallopt"):  # musl has none
        mmap_threshold, trim_threshold = -3, -1
        libc.mallopt(mmap_threshold, 1 << 28)
        libc.mallopt(trim_threshold, 1 << 28)
        threading.Thread(target=_trim_when_resting, args=(libc.malloc_trim,), daemon=True).start()


def _limit_memory(more_bytes: int) -> None:
    """Let this process take so much more memory of its own (RLIMIT_DATA in getrlimit(2))."""
    pages = int(Path("/proc/self/statm").read_text().split()[5])  # data and stack
    limit_bytes = pages * resource.getpagesize() + more_bytes
    _, hardest_bytes = resource.getrlimit(resource.RLIMIT_DATA)
    if hardest_bytes != resource.RLIM_INFINITY:
        limit_bytes = min(limit_bytes, hardest_bytes)
    resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, hardest_bytes))


def _trim_when_resting(trim: Callable[[int], int]) -> None:
    used_s = given_s = time.process_time()
    while True:
        time.sleep(_REST_S)
        before_s, used_s = used_s, time.process_time()
        is_resting = used_s - before_s < _REST_S / 100
        if is_resting and used_s - given_s > _REST_S / 100:
            trim(0)
            given_s = time.process_time()
