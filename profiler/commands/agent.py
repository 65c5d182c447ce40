"""`everflame agent`: profile this host continuously, one object per window into a store."""

import argparse
import logging
from pathlib import Path

from profiler.agent import agent, status
from profiler.commands import arguments
from profiler.exposition import AddressError, parse_address
from profiler.processes.rules import Rules, load_rules
from storage.objects.open import checked_tenant


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "examples:\n"
        "  everflame agent\n"
        "  everflame agent --store s3://profiles/prod --interval 60s\n"
        "  everflame agent --store /srv/profiles --keep 7d --keep-bytes 20GB\n\n"
        "S3 credentials come from the usual variables (AWS_ACCESS_KEY_ID,\n"
        "AWS_SECRET_ACCESS_KEY, ...)."
    )
    add_always_on(parser)


def run(options: argparse.Namespace) -> int:
    logging.getLogger().setLevel(logging.INFO)
    agent.run(agent_options(options))
    return 0


def add_always_on(parser: argparse.ArgumentParser) -> None:
    """Add the options of the agent, which `up` has, too."""
    arguments.add_frequency(parser)
    arguments.add_ready(parser)
    parser.add_argument(
        "--interval",
        type=interval_s,
        default=60,
        metavar="TIME",
        help="length of a window, 5s to 30m (default 60s)",
    )
    arguments.add_store(parser)
    parser.add_argument(
        "--keep",
        type=arguments.duration_s,
        metavar="TIME",
        help="delete windows older than this from a directory (default 2d)",
    )
    parser.add_argument(
        "--keep-bytes",
        type=arguments.size_bytes,
        metavar="SIZE",
        help="delete the oldest windows of a directory that exceeds this size (default 5GB)",
    )
    parser.add_argument(
        "--spool",
        metavar="DIR",
        help="where windows wait for upload (default: EVERFLAME_SPOOL, else /var/spool/everflame"
        " for root and ~/.local/state/everflame for others)",
    )
    parser.add_argument(
        "--spool-limit",
        type=arguments.size_bytes,
        default=512_000_000,
        metavar="SIZE",
        help="size of the spool; beyond it the oldest windows lose their stacks but keep their"
        " counts (default 512MB)",
    )
    parser.add_argument(
        "--unwind-memory",
        type=arguments.size_bytes,
        default=48_000_000,
        metavar="SIZE",
        help="kernel memory for unwind tables; beyond it unused ones are evicted (default 48MB)",
    )
    parser.add_argument(
        "--metrics-listen",
        type=metrics_address,
        default="",
        metavar="HOST:PORT",
        help="address of Prometheus metrics (default: off)",
    )
    parser.add_argument(
        "--config", metavar="FILE", help="TOML file with rules that name services (see the README)"
    )


def interval_s(text: str) -> int:
    """Parse the length of a window, whole seconds."""
    seconds = arguments.duration_s(text)
    if not 5 <= seconds <= 1800 or seconds != int(seconds):
        raise argparse.ArgumentTypeError(f"{text!r} is not an interval (whole seconds, 5s to 30m)")
    return int(seconds)


def metrics_address(text: str) -> str:
    """Check an address of metrics: the process that listens there is started later.

    Empty is off; argparse checks the default as well.
    """
    try:
        if text:
            parse_address(text)
    except AddressError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def agent_options(options: argparse.Namespace) -> agent.AgentOptions:
    """Return the options of the agent, with the defaults of this host."""
    spool = Path(options.spool) if options.spool else status.default_spool()
    return agent.AgentOptions(
        frequency_hz=options.frequency,
        hardware=options.hardware,
        interval_s=options.interval,
        duration_s=options.duration_s,
        ready_fd=options.ready_fd,
        spool=spool.absolute(),
        spool_limit_bytes=options.spool_limit,
        tables_limit_bytes=options.unwind_memory,
        run_folder=status.default_run_folder(),
        store=options.store,
        endpoint=options.s3_endpoint,
        tenant=checked_tenant(options.tenant),
        keep_s=options.keep,
        keep_bytes=options.keep_bytes,
        metrics_listen=options.metrics_listen,
        rules=load_rules(Path(options.config)) if options.config else Rules(),
    )
