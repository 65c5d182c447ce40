"""`everflame compact`: turn a store's profiles into few columnar files, delete what has expired.

Any number of compactors may run on a store at the same time. With --every it runs until a signal
ends it; `everflame up` starts it every ten minutes (`profiler.service.compaction`).
"""

import argparse
import contextlib
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor

import orjson

from profiler.cluster import ClusterError, ClusterExecutor
from profiler.commands import arguments
from profiler.commands.selection import opened
from profiler.text import counted, tell
from storage.blocks.budget import MemoryBudget, budget_of
from storage.blocks.compactor import Compactor, Report
from storage.blocks.retention import LEVELS, Keep, KeepError, lifecycle, lifecycle_limits
from storage.blocks.rounds import Rounds
from storage.objects.keys import StoreError, StoreUnavailable
from storage.objects.open import default_store_url, open_store
from storage.objects.tenant import TenantStore, list_tenants
from storage.query.cache import default_folder
from storage.query.workers import Workers

DEFAULT_MEMORY_BYTES = 1_000_000_000
PATIENCE_S = 600.0
"""With --every, few new objects wait so long for others."""
_SHOWN_UNREADABLE = 5
_WORKER_BYTES = 3 << 30
"""What a worker may reserve. It uses some 1 GB: DuckDB, which has a limit of its own, reserves more
than it uses."""
_MOST_AT_ONCE = 64
"""Hours that are compacted at once in a cluster, a thread each that waits for its workers. Each has
several pieces of work under way."""
_LEAST_LEVEL0_S = 3600.0
"""A reader that has looked for compacted hours just before must still find their objects."""
_DEFAULTS = "level0=2d,detail=14d,10m=30d,1h=90d,1d=400d"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "examples:\n"
        "  everflame compact --dry-run\n"
        "  everflame compact --store s3://profiles/prod --every 60s\n"
        "  everflame compact --keep detail=30d,1d=800d\n"
        "  everflame compact --store s3://profiles --cluster tcp://scheduler:8786\n"
        "  everflame compact --store s3://profiles --lifecycle > rules.json\n"
        "  aws s3api put-bucket-lifecycle-configuration --bucket profiles \\\n"
        "    --lifecycle-configuration file://rules.json\n\n"
        "Agents upload an object per host and window (level 0). This command turns those of an\n"
        "hour into a few Parquet files in the same store, sums them into buckets of ten minutes,\n"
        "an hour and a day, and deletes what is older than --keep. Queries read both. It needs\n"
        "the right to write and delete in the store, and may run anywhere, several times at once,\n"
        "and be killed at any moment.\n\n"
        "Levels of --keep: level0 (counted from compaction), detail (by host and window), and the\n"
        "sums 10m, 1h and 1d (counted from the end of the hour or day). Queries use the finest\n"
        "level that is left. A coarser level is kept at least as long as the finer ones.\n\n"
        "The exit status is 1 if an hour or day could not be compacted (objects that cannot be\n"
        "read are named and do not count), and 2 if the store cannot be used."
    )
    arguments.add_json(parser)
    arguments.add_store(parser)
    parser.add_argument(
        "--all-tenants",
        action="store_true",
        help="compact the profiles of every tenant in the store, one after the other",
    )
    parser.add_argument(
        "--every",
        type=arguments.duration_s,
        default=0.0,
        metavar="TIME",
        help="repeat after this time, such as 60s, until a signal ends it (default: run once)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="change nothing, and show what would be done"
    )
    parser.add_argument(
        "--keep",
        type=keep,
        default=Keep.of({}),
        metavar="LEVEL=TIME,...",
        help=f"how long levels are kept; those not named keep their default ({_DEFAULTS})",
    )
    parser.add_argument(
        "--lifecycle",
        action="store_true",
        help="print lifecycle rules for the bucket of --store as JSON, and do nothing else",
    )
    parser.add_argument(
        "--workers",
        type=workers,
        default=min(4, os.cpu_count() or 1),
        metavar="N",
        help="processes that decode and merge (default: one per CPU, at most 4)",
    )
    parser.add_argument(
        "--memory",
        type=arguments.size_bytes,
        default=DEFAULT_MEMORY_BYTES,
        metavar="SIZE",
        help="memory that all processes together should take, which is some 500MB at least; with"
        " more, more of a large fleet is done at once (default: 1GB; workers of --cluster have"
        " limits of their own)",
    )
    arguments.add_cluster(parser, "decode and merge in place of --workers")


def keep(text: str) -> Keep:
    """Parse `detail=30d,1h=180d`."""
    asked = {}
    for each in filter(None, text.split(",")):
        level, _, duration = each.partition("=")
        if level not in LEVELS or not duration:
            raise argparse.ArgumentTypeError(
                f"{each!r} is not a level and a time (try detail=30d; levels: {', '.join(LEVELS)})"
            )
        asked[level] = arguments.duration_s(duration)
    if "level0" in asked:
        asked["level0"] = max(asked["level0"], _LEAST_LEVEL0_S)
    try:
        return Keep.of(asked)
    except KeepError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def workers(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 64:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of processes (1 to 64)")
    return int(text)


def run(options: argparse.Namespace) -> int:
    """Compact once, or until a signal; return 1 if an hour or day could not be compacted.

    Raises:
        StoreError: the store cannot be used.
    """
    if options.all_tenants and options.tenant:
        raise ValueError("compact: name a --tenant or use --all-tenants, not both")
    if options.lifecycle:
        return _print_lifecycle(options)
    patience_s = PATIENCE_S if options.every else 0.0
    with _working(options) as executor:
        known: dict[str, Rounds] = {}

        def run_once() -> int:
            """Compact each tenant once; return the exit status."""
            status = 0
            for store in tenants(options):
                about = f"{store.tenant}: " if options.all_tenants else ""
                if store.tenant not in known:
                    tell_progress = functools.partial(_tell_about, about)
                    known[store.tenant] = make_rounds(
                        store, options, executor, patience_s, tell_progress
                    )
                report = known[store.tenant].run_once()
                status |= _show(report, options, store.tenant, about)
            return status

        return _repeat(run_once, options.every) if options.every else run_once()


def tenants(options: argparse.Namespace) -> list[TenantStore]:
    """Return whose profiles are to be compacted.

    Raises:
        StoreError: the URL names no store, or its tenants cannot be listed.
    """
    if not options.all_tenants:
        return [opened(options)]
    store = open_store(options.store, options.s3_endpoint or None)
    return [TenantStore(store, name) for name in list_tenants(store)]


def make_rounds(
    store: TenantStore,
    options: argparse.Namespace,
    executor: Executor,
    patience_s: float,
    tell_progress: Callable[[str], None],
) -> Rounds:
    """Return the rounds of a tenant, which have not begun."""
    folder = default_folder().parent / "compact"
    budget = _budget(options, executor)

    def make(type_: str) -> Compactor:
        return Compactor(
            store,
            folder,
            executor,
            type_=type_,
            patience_s=patience_s,
            budget=budget,
            is_dry=options.dry_run,
            tell=tell_progress,
        )

    at_once = options.workers
    if isinstance(executor, ClusterExecutor):
        at_once = min(max(at_once, executor.threads), _MOST_AT_ONCE)
    return Rounds(store, folder, make, options.keep, hours_at_once=at_once)


def _budget(options: argparse.Namespace, executor: Executor) -> MemoryBudget:
    """Return what work may take here. The workers of a cluster have their own limits."""
    if isinstance(executor, ClusterExecutor):
        return MemoryBudget()
    return budget_of(options.memory, options.workers)


@contextlib.contextmanager
def _working(options: argparse.Namespace) -> Iterator[Executor]:
    """Run workers for the length of the block, or use those of a cluster.

    A single worker is started for each task.

    Raises:
        ClusterError: the cluster cannot be used.
    """
    executor: Executor
    if options.cluster and not options.dry_run:  # which hands out no work
        executor = ClusterExecutor(options.cluster, memory_bytes=_WORKER_BYTES)
    else:
        executor = Workers(options.workers, memory_bytes=_WORKER_BYTES)
    try:
        if isinstance(executor, Workers) and options.workers > 1:
            executor.start()
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)


def _repeat(run_once: Callable[[], int], every_s: float) -> int:
    """Compact again and again until SIGINT or SIGTERM."""
    ends = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt_once(ends))
    try:
        while not ends.is_set():
            begun_s = time.monotonic()
            try:
                run_once()
            except (StoreUnavailable, ClusterError) as error:
                tell_line(f"{error}; trying again in {every_s:g} s")
            ends.wait(max(0.0, begun_s + every_s - time.monotonic()))
    except KeyboardInterrupt:
        pass
    return 0


def _interrupt_once(ends: threading.Event) -> Callable[[int, object], None]:
    """Return a handler that ends what goes on; nothing is lost by that."""

    def end(_number: int, _frame: object) -> None:
        if not ends.is_set():
            ends.set()
            raise KeyboardInterrupt

    return end


def tell_line(line: str) -> None:
    tell(f"everflame: {line}")


def _tell_about(about: str, line: str) -> None:
    tell_line(f"{about}{line}")


def _show(report: Report, options: argparse.Namespace, tenant: str, about: str) -> int:
    """Print what was done: a line that begins with `about`, or JSON. Return the exit status."""
    has_done = any(number for name, number in report.counts.items() if name != "pinned")
    if options.json:
        sys.stdout.buffer.write(as_json(report, tenant, is_dry=options.dry_run) + b"\n")
        sys.stdout.buffer.flush()
    elif not options.every or has_done:
        print(f"{about}{summary(report, is_dry=options.dry_run)}", flush=True)
    for key, reason in list(report.unreadable.items())[:_SHOWN_UNREADABLE]:
        tell_line(f"cannot read {key}: {reason}")
    more = len(report.unreadable) - _SHOWN_UNREADABLE
    if more > 0:
        tell_line(f"{about}and {counted(more, 'more object')} that cannot be read")
    for name, reason in report.problems.items():
        tell_line(f"{about}cannot compact {name}: {reason}")
    return 1 if report.problems else 0


def summary(report: Report, *, is_dry: bool) -> str:
    """Return a line that says what was done, or would be."""
    count = report.counts
    done = []
    if count["objects"]:
        into = "" if is_dry else f" into {counted(count['parts'], 'part')}"
        done.append(f"{counted(count['objects'], 'object')} folded{into}")
    if count["merged"]:
        done.append(f"{counted(count['merged'], 'part')} merged")
    rollups = [f"{count[name]:,} {name}" for name in ("hourly", "daily") if count[name]]
    if rollups:
        done.append(f"rollups made: {' and '.join(rollups)}")
    expired = [f"{level} of {count[level]:,}" for level in ("detail", "10m", "1h") if count[level]]
    if expired:
        done.append(f"expired: {', '.join(expired)} hours")
    if count["1d"]:
        done.append(f"expired: {counted(count['1d'], 'day')}")
    deleted = []
    if count["level0"]:
        deleted.append(counted(count["level0"], "level-0 object"))
    if count["garbage"]:
        deleted.append(counted(count["garbage"], "unused file"))
    if deleted:
        done.append(f"deleted: {' and '.join(deleted)}")
    text = f"{'would be done: ' if is_dry else ''}{'; '.join(done)}" if done else "nothing to do"
    if count["pinned"]:
        text += f"; kept by pins: {counted(count['pinned'], 'hour')}"
    return text


def as_json(report: Report, tenant: str, *, is_dry: bool) -> bytes:
    """Return the shape of `compact --json`."""
    count = report.counts
    return orjson.dumps(
        {
            "schema": 1,
            "tenant": tenant,
            "dry_run": is_dry,
            **{
                name: count[name]
                for name in ("objects", "parts", "conflicts", "merged", "hourly", "daily")
            },
            "expired": {level: count[level] for level in LEVELS[1:]},
            "deleted": {name: count[name] for name in ("level0", "garbage")},
            "pinned": count["pinned"],
            "unreadable": [{"key": k, "reason": v} for k, v in report.unreadable.items()],
            "problems": [{"name": k, "reason": v} for k, v in report.problems.items()],
        }
    )


def _print_lifecycle(options: argparse.Namespace) -> int:
    """Print the rules for the bucket of the store.

    Raises:
        ValueError: the store is a directory.
    """
    url = options.store or default_store_url()
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    if not url.startswith("s3://") or not bucket:
        raise ValueError(
            f"lifecycle rules are for buckets, and {url!r} is none (try --store s3://)"
        )
    prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
    names = [store.tenant for store in tenants(options)]
    rules = {"Rules": [rule for n in names for rule in lifecycle(prefix, options.keep, n)["Rules"]]}
    sys.stdout.buffer.write(orjson.dumps(rules, option=orjson.OPT_INDENT_2) + b"\n")
    tell_line(lifecycle_limits(options.keep))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Compact once as part of `everflame up`: patiently, with one process, and few words."""
    parser = argparse.ArgumentParser(prog="python -m profiler.commands.compact")
    parser.add_argument("--store", required=True)
    parser.add_argument("--s3-endpoint", default="")
    parser.add_argument("--tenant", default="")
    parser.add_argument("--keep", type=keep, default=Keep.of({}))
    options = parser.parse_args(argv)
    options.dry_run, options.workers, options.cluster = False, 1, ""
    options.memory = DEFAULT_MEMORY_BYTES
    try:
        with _working(options) as executor:
            rounds = make_rounds(opened(options), options, executor, PATIENCE_S, lambda _: None)
            report = rounds.run_once()
    except (StoreError, OSError, RuntimeError, MemoryError) as error:  # there is another time
        tell_line(f"cannot compact: {error}")
        return 2
    for name, reason in report.problems.items():
        tell_line(f"cannot compact {name}: {reason}")
    return 0


if __name__ == "__main__":
    # As in `profiler.commands.serve`: workers need not import this module.
    sys.modules[__name__].__spec__ = None
    del sys.modules[__name__].__file__
    sys.exit(main())
