"""`everflame watch`: follow the deployments of a store, and call when one is a regression."""

import argparse
import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from profiler.commands import arguments
from profiler.commands.selection import Selection
from profiler.comparison.deployment_verdicts import DeploymentVerdicts
from profiler.service.watch import LOOKBACK, StateFile, Watch, state_path
from profiler.service.webhook import Caller, Command, Webhook
from profiler.service.webhook_url import parse_webhook
from profiler.times import parse_window
from storage.query.cache import default_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "examples:\n"
        "  everflame watch --store s3://profiles/prod --webhook https://chat.example/hook\n"
        "  everflame watch -q '{service=\"api\"}' --run 'notify-send regression'\n"
        "  everflame watch --once --webhook https://chat.example/hook   # from cron\n\n"
        "A line is printed for each deployment since --from, those before the start included, and\n"
        "whenever its verdict changes. When one is a regression, the webhook gets JSON by POST:\n"
        "service, version, previous, verdict, provisional, functions and, with --page, link.\n"
        "--run gets the same on its standard input and as EVERFLAME_SERVICE, EVERFLAME_VERSION\n"
        "and so on; a shell is used only if you write sh -c '...'. Each is called once for each\n"
        "deployment, and again when a provisional regression is confirmed. If one is withdrawn\n"
        "instead, a line says so, and nobody is called. A call that fails is logged, and repeated\n"
        "later.\n"
        "The exit status is 0, or 1 with --once if a new regression was reported."
    )
    arguments.add_store(parser)
    arguments.add_query(parser)
    parser.add_argument(
        "--from",
        dest="start",
        metavar="TIME",
        default=LOOKBACK,
        help="how far back deployments are looked for (default now-1d)",
    )
    parser.add_argument(
        "--every",
        type=arguments.duration_s,
        default=60.0,
        metavar="TIME",
        help="time between two looks at the store (default 60s)",
    )
    parser.add_argument("--once", action="store_true", help="look once and exit, as for cron")
    arguments.add_webhook(parser)
    parser.add_argument(
        "--run",
        dest="run_command",  # `run` is what the command line sets
        metavar="COMMAND",
        default="",
        help="run this command when a deployment becomes a regression; it has 60 s",
    )
    parser.add_argument(
        "--page", metavar="URL", default="", help="address of the page, for links to comparisons"
    )
    parser.add_argument(
        "--provisional",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also call for regressions that more data may change; they say so (the default)",
    )
    parser.add_argument(
        "--state",
        type=Path,
        metavar="FILE",
        help="file in which is kept what was reported, so that a restart does not repeat it"
        " (default: in the folder of the cache)",
    )


def run(options: argparse.Namespace) -> int:
    parse_window(options.start, "now", time.time_ns())  # raises if it is not a time
    selection = Selection.parse(
        options.store, options.s3_endpoint, tenant=options.tenant, query=options.query
    )
    callers: list[Caller] = [Webhook(options.webhook)] if options.webhook else []
    callers += [Command(options.run_command)] if options.run_command else []
    state = StateFile(options.state or _default_state(selection, options))
    with contextlib.closing(state), _ended_by_signals() as ended:
        watch = _watch(options, selection, callers, state, ended)
        if options.once:
            return int(watch.look_once())
        watch.follow(options.every)
    return 0


def _watch(
    options: argparse.Namespace,
    selection: Selection,
    callers: list[Caller],
    state: StateFile,
    ended: threading.Event,
) -> Watch:
    query = selection.query()
    return Watch(
        store=selection.store,
        query=query,
        verdicts=DeploymentVerdicts(selection.store, query),
        state=state,
        selector=selection.selector,
        callers=callers,
        lookback=options.start,
        page=parse_webhook(options.page).geturl() if options.page else "",
        has_provisional=options.provisional,
        tell=_print_line,
        ended=ended,
    )


def _default_state(selection: Selection, options: argparse.Namespace) -> Path:
    called = [options.webhook, options.run_command]
    return state_path(default_folder(), selection.store, selection.selector, called)


def _print_line(line: str) -> None:
    print(line, flush=True)


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[threading.Event]:
    """Return an event that SIGINT and SIGTERM set."""
    ended = threading.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {each: signal.signal(each, lambda *_: ended.set()) for each in numbers}
    try:
        yield ended
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
