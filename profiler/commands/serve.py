"""`everflame serve`: the page and its API for one store, on loopback.

It only reads: it needs neither root nor any credentials but those of the store.
"""

import argparse
import contextlib
import ctypes
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, SimpleQueue
from socket import socket

from profiler.agent import status
from profiler.cluster import ClusterIfThere
from profiler.commands import arguments
from profiler.commands.selection import is_missing
from profiler.service import addresses
from profiler.service.app import Service
from profiler.service.connections import Server
from profiler.service.merged import MergedProfiles
from profiler.service.status import About
from profiler.service.watch import StateFile, Watch, WatchError, state_path, watching
from profiler.service.webhook import Webhook
from storage.objects.keys import StoredObject, StoreError, StoreRefused
from storage.objects.open import default_store_url, default_tenant, open_tenant
from storage.objects.tenant import TenantStore
from storage.query.cache import default_folder
from storage.query.query import Query
from storage.query.workers import start_workers
from storage.selector import EMPTY

_CHECK_WITHIN_S = 5.0
_END_WITHIN_S = 2.0
"""How long the end waits for computations that are still running."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "examples:\n"
        "  everflame serve\n"
        "  everflame serve --store s3://profiles/prod --listen 127.0.0.1:4040\n\n"
        "The service only reads the store. With --webhook it looks for deployments once a minute,\n"
        "as `everflame watch` does, and calls when one becomes a regression.\n"
        "Without its cluster it reads by itself, and says so\n"
        "on stderr. To see the page from another machine:\n"
        "  ssh -L 4040:127.0.0.1:4040 USER@HOST"
    )
    arguments.add_store(parser)
    arguments.add_page(parser)
    arguments.add_webhook(parser)
    arguments.add_cluster(parser)


def run(options: argparse.Namespace) -> int:
    asked = [f"--store={options.store}", f"--s3-endpoint={options.s3_endpoint}"]
    asked += [f"--tenant={options.tenant}", f"--listen={options.listen}"]
    return main([*asked, f"--cluster={options.cluster}", f"--webhook={options.webhook}"])


def serve(
    listener: socket,
    store: TenantStore,
    about: About,
    cache: Path,
    *,
    cluster: ClusterIfThere | None = None,
    webhook: str = "",
    is_quiet: bool = False,
) -> int:
    """Serve until SIGINT or SIGTERM; call a webhook of regressions unless it is empty."""
    _settle_memory()
    workers = start_workers(min(4, os.cpu_count() or 1))
    profiles = MergedProfiles(store, Query(store, cache, workers=workers, executor=cluster))
    service = Service(profiles, about)
    page = f"http://{addresses.shown(listener.getsockname()[:2])}"
    if not is_quiet:
        _tell(f"the page is at {page}/")
    try:
        with _watching(service, profiles, cache, webhook, page):
            Server(service.app(), service.slots).run(sockets=[listener])
    finally:
        has_ended = service.end(_END_WITHIN_S)
        if cluster is not None:
            cluster.shutdown(wait=has_ended)
        workers.shutdown(wait=has_ended, cancel_futures=True)
    if not has_ended:
        sys.stderr.flush()
        os._exit(0)  # a thread hangs in a request to the store, and exit would wait for it
    return 0


@contextlib.contextmanager
def _watching(
    service: Service, profiles: MergedProfiles, cache: Path, webhook: str, page: str
) -> Iterator[None]:
    """Follow the deployments of the store for the length of the block, if there is a webhook."""
    if not webhook:
        yield
        return
    path = state_path(cache, profiles.store, EMPTY, [webhook])
    state = StateFile(path, "leave out --webhook, or set EVERFLAME_CACHE")
    watch = Watch(
        store=profiles.store,
        query=profiles.query,
        verdicts=service.verdicts,
        state=state,
        callers=[Webhook(webhook)],
        page=page,
    )
    with contextlib.closing(state), watching(watch):
        yield


def _settle_memory() -> None:
    """Make malloc return the memory of a response to the system, with a single arena.

    With an arena for each thread, much of the process was unused memory: 208 MB instead of 157
    after fifty clients (bench/bench_service.py). Small arrays stay, for they are needed again.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # musl has none
        arena_max, mmap_threshold, trim_threshold = -8, -3, -1  # malloc.h
        libc.mallopt(arena_max, 1)
        libc.mallopt(mmap_threshold, 4 << 20)
        libc.mallopt(trim_threshold, 1 << 20)


def check(tenant: TenantStore) -> None:
    """Report what is wrong with a tenant's store, so that nobody wonders about an empty page.

    Raises:
        StoreRefused: it cannot be read until somebody fixes it.
    """
    store = tenant.store
    found: SimpleQueue[StoredObject | StoreError | None] = SimpleQueue()

    def ask() -> None:
        try:
            found.put(next(iter(store.list(f"v1/{tenant.tenant}/")), None))
        except StoreError as error:
            found.put(error)

    # A daemon: the process must not wait at its end for one that hangs in a request.
    threading.Thread(target=ask, name="check", daemon=True).start()
    try:
        first = found.get(timeout=_CHECK_WITHIN_S)
    except Empty:
        _tell(f"{store} does not respond; the page shows this until it does")
        return
    if isinstance(first, StoreRefused):
        raise first
    if isinstance(first, StoreError):
        _tell(f"{first}; the page shows this until it is over")
    elif first is None:
        _tell(_why_empty(tenant))


def _why_empty(tenant: TenantStore) -> str:
    store = tenant.store
    command = f"everflame agent --store {shlex.quote(str(store))}"
    if tenant.tenant != default_tenant():
        command += f" --tenant {tenant.tenant}"
    if is_missing(store):
        return (
            f"the folder {store} does not exist; the page stays empty until an agent creates it:"
            f" check --store, or run {command}"
        )
    return f"{tenant} is empty; run {command} to fill it"


def _tell(line: str) -> None:
    print(f"everflame: {line}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Serve with these options; return the exit status."""
    options = _parse_options(argv)
    url = options.store or default_store_url()
    about = About(
        store=url,
        tenant=options.tenant or default_tenant(),
        run_folder=options.run_folder or status.default_run_folder(),
        keep_s=options.keep_s,
        keep_bytes=options.keep_bytes,
    )
    # Before and after the server handles them, both signals act as Ctrl-C.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        listener = addresses.bind(options.listen)
        store = open_tenant(url, options.s3_endpoint or None, options.tenant)
        if not options.quiet:
            check(store)
        cache = options.cache or default_folder()
        cluster = ClusterIfThere(options.cluster) if options.cluster else None
        if cluster is not None:
            cluster.start()
        return serve(
            listener,
            store,
            about,
            cache,
            cluster=cluster,
            webhook=options.webhook,
            is_quiet=options.quiet,
        )
    except (addresses.ListenError, StoreError, WatchError) as error:
        _tell(str(error))
        return 2
    except KeyboardInterrupt:
        return 0


def _parse_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m profiler.commands.serve")
    parser.add_argument("--store", default="")
    parser.add_argument("--s3-endpoint", default="")
    parser.add_argument("--tenant", default="")
    parser.add_argument("--listen", default="127.0.0.1:4040")
    parser.add_argument("--cluster", type=arguments.cluster_address, default="")
    arguments.add_webhook(parser)
    parser.add_argument("--run-folder", type=Path)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--keep-s", type=int, default=0)
    parser.add_argument("--keep-bytes", type=int, default=0)
    parser.add_argument("--quiet", action="store_true", help="print errors only")
    return parser.parse_args(argv)


if __name__ == "__main__":
    # Each worker would import the main module, and with it the service, which none of them needs:
    # multiprocessing finds it by these two (Python 3.11-3.14, `spawn.get_preparation_data`).
    sys.modules[__name__].__spec__ = None
    del sys.modules[__name__].__file__
    sys.exit(main())
