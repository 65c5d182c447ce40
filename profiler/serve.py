"""`everflame serve`: the page and its API over one store, on loopback.

It is a process of its own that only reads: it needs no root and no credentials but the store's.
"""

import argparse
import ipaddress
import os
import socket
import sys
from pathlib import Path

import uvicorn

from profiler import metrics, status
from profiler.answers import Answers
from profiler.service import About, Service
from storage.cache import default_folder
from storage.objects import default_store_url, open_store
from storage.query import Query, start_workers


class ListenError(ValueError):
    """The address cannot be listened on; the message says which, why, and what to do."""


def bind(listen: str) -> socket.socket:
    """Give a socket that is bound to a loopback address.

    Raises:
        ListenError: it is none, or somebody has it.
    """
    host, port = metrics.parse_address(listen)
    address = "127.0.0.1" if host == "localhost" else host
    try:
        is_loopback = ipaddress.ip_address(address).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback:
        raise ListenError(
            f"cannot listen on {listen}: only loopback is served, as 127.0.0.1:4040;"
            " reach it from elsewhere with ssh -L 4040:127.0.0.1:4040"
        )
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address, port))
        listener.listen(128)  # from here on nobody is refused, however long the start takes
    except OSError as error:
        listener.close()
        raise ListenError(
            f"cannot listen on {listen}: {error.strerror} (choose another with --listen)"
        ) from error
    return listener


def run(listener: socket.socket, store_url: str, endpoint: str, about: About, cache: Path) -> int:
    """Serve until SIGINT or SIGTERM."""
    store = open_store(store_url, endpoint or None)
    workers = start_workers(min(4, os.cpu_count() or 1))
    service = Service(Answers(store, Query(store, cache, workers=workers)), about)
    config = uvicorn.Config(
        service.app(),
        access_log=False,
        log_level="warning",
        lifespan="off",
        server_header=False,
        timeout_keep_alive=30,
        limit_concurrency=200,
    )
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"everflame: the page is at http://{shown}:{port}/", file=sys.stderr, flush=True)
    try:
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        service.close()
        workers.shutdown(cancel_futures=True)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Be the service that `everflame up` starts."""
    parser = argparse.ArgumentParser(prog="python -m profiler.serve")
    parser.add_argument("--store", default="")
    parser.add_argument("--s3-endpoint", default="")
    parser.add_argument("--listen", default="127.0.0.1:4040")
    parser.add_argument("--run-folder", type=Path)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--keep-s", type=int, default=0)
    parser.add_argument("--keep-bytes", type=int, default=0)
    options = parser.parse_args(argv)
    store = options.store or default_store_url()
    about = About(
        store=store,
        run_folder=options.run_folder or status.default_run_folder(),
        keep_s=options.keep_s,
        keep_bytes=options.keep_bytes,
    )
    try:
        listener = bind(options.listen)
        return run(listener, store, options.s3_endpoint, about, options.cache or default_folder())
    except (ValueError, metrics.MetricsError) as error:
        print(f"everflame: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
