"""Cluster: an executor whose work is done by the workers of a Dask cluster, on any machines.

What is handed in are plain functions that read and write the store themselves: those of compaction
(`storage.blocks.work`) send back names of files, those of queries (`storage.query.wide`) merged
profiles. These come pickled, as Dask sends all results: who asks trusts the workers. Each needs
Everflame in the same version, the store by the same URL (a directory must be a shared folder), and
the store's credentials in its own environment. It keeps its files where it keeps its cache
(EVERFLAME_CACHE), not where this process does.

Dask gives the work of a worker that dies to another one. Work during which several have died raises
BrokenExecutor, as it does in a pool of processes. Whoever may hand in work can run any code on the
workers, so a scheduler belongs into a private network, or behind TLS (`tls://`, with the
certificates that Dask's own configuration names).
"""

import contextlib
import functools
import hashlib
import logging
import pickle
import platform
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future, InvalidStateError
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

from storage.blocks.work import clean
from storage.objects.tenant_key import read_tenant_key
from storage.query.cache import default_folder
from storage.query.workers import MEMORY_BYTES, LoneWorker, NoWorkersError, Place

_PACKAGES = ("everflame", "distributed", "duckdb", "numpy")
"""Those whose versions must be the same everywhere, beside Python's: they send each other arrays
and functions, or make the files that all others read."""
_ANSWER_S = 10.0
_RETRY_S = 30.0
_KNOWN_S = 10.0
"""For how long the list of workers is believed."""
_SAME = "install the same version of everflame[cluster] everywhere"

_log = logging.getLogger(__name__)
_Done = TypeVar("_Done")
_Versions = dict[str, str]


class ClusterError(Exception):
    """A cluster cannot be used; the message says why, and what to do."""


class ClusterExecutor(Executor):
    """Hands work to a Dask cluster. Connects again if its scheduler was away meanwhile.

    `memory_bytes` is what a process of this machine may take that does what killed workers.

    Raises:
        ClusterError: Dask is not installed, the scheduler does not answer, it has no workers, or
            they have other versions.
    """

    def __init__(self, address: str, *, memory_bytes: int = MEMORY_BYTES) -> None:
        self._address = address
        self._memory_bytes = memory_bytes
        self._versions = versions()
        self._lock = threading.Lock()
        self._client: Any = None  # Dask is not there when types are checked
        self._known: tuple[float, list[str]] = (0.0, [])
        self.threads = sum(self._connected().nthreads().values())
        """How much the workers can do at once, when this was made."""

    @property
    def is_connected(self) -> bool:
        """Return whether work can be handed in without connecting again."""
        client = self._client
        return client is not None and client.status == "running"

    def submit(self, act: Callable[..., _Done], /, *things: Any, **more: Any) -> "Future[_Done]":
        """Have a worker act. The future raises BrokenExecutor if that has killed several.

        It raises ClusterError if the scheduler went away, or a worker cannot do this store's work.

        Raises:
            ClusterError: the scheduler does not answer.
        """
        client = self._connected()
        home = next((each.home for each in things if isinstance(each, Place)), "")
        worker = self._worker_of(client, home) if home else ""
        # Others may do it as well: a worker that has nothing to do takes work from those that have.
        at = {"workers": [worker], "allow_other_workers": True} if worker else {}
        # As bytes: Dask looks for results of other work in arguments, through all tuples and lists.
        work = pickle.dumps((act, things, more))
        task = client.submit(run_here, self._versions, work, pure=False, **at)
        future: Future[_Done] = Future()
        future.add_done_callback(functools.partial(_cancel, task))
        task.add_done_callback(functools.partial(self._hand_over, future))
        return future

    def lone_worker(self) -> LoneWorker:
        """Return a process of this machine, for what kills workers."""
        return LoneWorker(self._memory_bytes)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: ARG002
        """Leave the cluster; work that nobody waits for any more is not done."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def _worker_of(self, client: Any, home: str) -> str:
        """Return the worker that does work of a name, the same one while it is there."""
        listed_s, workers = self._known
        if not workers or time.monotonic() - listed_s > _KNOWN_S:
            workers = []
            with contextlib.suppress(OSError, ValueError):  # the scheduler is away
                workers = list(client.nthreads())
            self._known = time.monotonic(), workers

        def weight(worker: str) -> bytes:
            return hashlib.blake2b(f"{home} {worker}".encode(), digest_size=8).digest()

        return max(workers, key=weight, default="")

    def _hand_over(self, future: "Future[_Done]", task: Any) -> None:
        from distributed import KilledWorker  # noqa: PLC0415 - it is imported already

        with contextlib.suppress(InvalidStateError):  # it was cancelled
            if task.cancelled():
                future.set_exception(ClusterError(f"lost the scheduler {self._address}"))
                return
            try:
                error = task.exception()
                if error is None:
                    future.set_result(task.result())
                    return
            except OSError as lost:
                error = ClusterError(f"lost the scheduler {self._address}: {lost}")
            if isinstance(error, KilledWorker):
                error = BrokenExecutor(str(error))
            elif isinstance(error, ImportError):
                error = ClusterError(f"a worker cannot run Everflame: {error} ({_SAME})")
            future.set_exception(error)

    def _connected(self) -> Any:
        with self._lock:
            if self._client is None or self._client.status != "running":
                if self._client is not None:
                    self._client.close(timeout=1)
                self._client = _connect(self._address, self._versions)
            return self._client


class ClusterIfThere(Executor):
    """Hands work to a cluster while it can be used, and refuses it while that is away.

    So who hands in work goes on without it. What is wrong is logged once, and the cluster looked
    for again in a thread of its own: nobody who waits for an answer waits for that.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._cluster: ClusterExecutor | None = None
        self._lock = threading.Lock()
        self._told = ""
        self._has_tried = threading.Event()
        self._wakes = threading.Event()
        self._ends = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="cluster", daemon=True)

    def start(self) -> None:
        """Look for the cluster; return when it is found, or known to be away."""
        self._keeper.start()
        self._has_tried.wait()

    def submit(self, act: Callable[..., _Done], /, *things: Any, **more: Any) -> "Future[_Done]":
        """Have a worker act. The future raises NoWorkersError if the cluster is lost meanwhile.

        Raises:
            NoWorkersError: the cluster is away.
        """
        cluster = self._cluster
        if cluster is None:
            raise NoWorkersError(f"the cluster {self._address} is away")
        if not cluster.is_connected:
            raise self._lose(cluster, f"lost the scheduler {self._address}")
        try:
            task = cluster.submit(act, *things, **more)
        except (ClusterError, OSError) as error:
            raise self._lose(cluster, str(error)) from error
        future: Future[_Done] = Future()
        future.add_done_callback(lambda done: done.cancelled() and task.cancel())
        task.add_done_callback(functools.partial(self._hand_over, cluster, future))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: ARG002
        """Leave the cluster."""
        self._ends.set()
        self._wakes.set()
        if wait and self._keeper.is_alive():
            self._keeper.join(_ANSWER_S)

    def _hand_over(
        self, cluster: ClusterExecutor, future: "Future[_Done]", task: "Future[_Done]"
    ) -> None:
        with contextlib.suppress(InvalidStateError):  # it was cancelled
            if task.cancelled():
                future.cancel()
                return
            error = task.exception()
            if error is None:
                future.set_result(task.result())
            elif isinstance(error, ClusterError):
                future.set_exception(self._lose(cluster, str(error)))
            else:
                future.set_exception(error)

    def _lose(self, cluster: ClusterExecutor, reason: str) -> NoWorkersError:
        """Hand in no more work until the cluster is found again; return what says so."""
        with self._lock:
            if self._cluster is cluster:
                self._cluster = None
                self._tell(reason)
                self._wakes.set()
        return NoWorkersError(reason)

    def _tell(self, reason: str) -> None:
        if reason != self._told:
            _log.warning("cannot use the cluster: %s; reading without it", reason)
        self._told = reason

    def _keep(self) -> None:
        while not self._ends.is_set():
            try:
                cluster = ClusterExecutor(self._address)
            except ClusterError as error:
                with self._lock:
                    self._tell(str(error))
                self._has_tried.set()
                self._ends.wait(_RETRY_S)
                continue
            with self._lock:
                if self._told:
                    _log.warning("found the cluster again scheduler=%s", self._address)
                self._cluster, self._told = cluster, ""
            self._has_tried.set()
            self._wakes.wait()
            self._wakes.clear()
            with contextlib.suppress(OSError, RuntimeError):  # the scheduler is away
                cluster.shutdown()


def versions() -> _Versions:
    """Return the versions of what must be the same everywhere."""
    python = ".".join(platform.python_version_tuple()[:2])
    return {"Python": python, **{name: _version_of(name) for name in _PACKAGES}}


def _version_of(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(none)"


def run_here(expected: _Versions, work: bytes) -> Any:
    """Do work in this process, a worker's.

    Raises:
        ClusterError: this worker has other versions, or does not see the same store.
    """
    _compare(expected, versions(), "this worker")
    act, things, more = pickle.loads(work)  # noqa: S301 - Dask has run this function in just that way
    return act(*map(_placed_here, things), **more)


def _placed_here(thing: Any) -> Any:
    """Return an argument; the place of work with this worker's own folder."""
    if not isinstance(thing, Place):
        return thing
    _check_store(thing)
    folder = default_folder().parent / "cluster"
    _clean_once(folder)
    return thing._replace(folder=folder)


_clean_once = functools.lru_cache(maxsize=1)(clean)


_seen: set[tuple[str, str, bytes]] = set()
"""Stores that this worker sees: their URL, a tenant of them, and its key."""


def _check_store(place: Place) -> None:
    """Check that the store is the one of whoever handed in the work, as its tenant's key is.

    In another one objects would seem to be gone, and files would be written where nobody reads.
    """
    store = (str(place.store), place.tenant, place.key)
    if store in _seen:
        return
    if read_tenant_key(place.store, place.tenant) != place.key:
        raise ClusterError(
            f"a worker does not see the same store as {place.store}, tenant {place.tenant}: a"
            " directory must be a folder that all machines share, by the same path"
        )
    _seen.add(store)


def _cancel(task: Any, future: "Future[Any]") -> None:
    if future.cancelled():
        with contextlib.suppress(OSError, RuntimeError):  # the scheduler is away
            task.cancel()


def _connect(address: str, own: _Versions) -> Any:
    """Return a client of the scheduler, which has workers that can do our work.

    Raises:
        ClusterError: there is none.
    """
    try:
        from distributed import Client  # noqa: PLC0415 - an extra, and 0.6 s
    except ImportError as error:
        raise ClusterError(
            "cannot use a cluster: Dask is not installed (pip install 'everflame[cluster]')"
        ) from error
    for chatty in ("distributed", "distributed.client", "tornado"):
        logging.getLogger(chatty).setLevel(logging.CRITICAL)  # what it logs becomes our errors
    client = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its own about versions: ours say what to do
            client = Client(address, timeout=_ANSWER_S, set_as_default=False, name="everflame")
            client.wait_for_workers(1, timeout=_ANSWER_S)
            found = client.run(versions, on_error="return")
    except (OSError, ValueError) as error:
        if client is None:
            raise ClusterError(
                f"the scheduler {address} does not answer within {_ANSWER_S:g} s (start it with"
                " dask scheduler, and name the address that it prints)"
            ) from error
        client.close(timeout=1)
        raise ClusterError(
            f"the scheduler {address} has no workers (start one on each machine: dask worker"
            f" {address} --nthreads 1)"
        ) from error
    for worker, other in found.items():
        try:
            if isinstance(other, Exception):
                raise ClusterError(f"{worker} cannot run Everflame: {other} ({_SAME})")
            _compare(own, other, worker)
        except ClusterError:
            client.close(timeout=1)
            raise
    return client


def _compare(expected: _Versions, found: _Versions, whose: str) -> None:
    differing = [name for name in expected if found.get(name) != expected[name]]
    if differing:
        theirs = ", ".join(f"{name} {found.get(name, 'unknown')}" for name in differing)
        ours = ", ".join(f"{name} {expected[name]}" for name in differing)
        raise ClusterError(f"{whose} has {theirs}, and whoever hands in work {ours} ({_SAME})")
