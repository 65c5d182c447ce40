"""Arguments that several commands take, and the types of their values.

A type raises `argparse.ArgumentTypeError` with a message that shows what would be accepted.
"""

import argparse
import fcntl
import math
import os
import re

_LIMIT = 2**63
"""Times are 64-bit ns and sizes 64-bit bytes: 292 years and 9.2 million TB."""
_UNITS_S = {"ms": 0.001, "s": 1, "": 1, "m": 60, "h": 3600, "d": 86400}


Container = argparse._ActionsContainer  # noqa: SLF001 - what parsers and their groups have in common


def duration_s(text: str) -> float:
    """Parse `30s`, `2m`, `1.5h`, `90` (seconds)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h|d|)", text)
    seconds = float(match[1]) * _UNITS_S[match[2]] if match else 0.0
    if not 0 < seconds * 1e9 < _LIMIT:
        raise argparse.ArgumentTypeError(f"{text!r} is not a duration (try 30s, 2m or 1h)")
    return seconds


def frequency_hz(text: str) -> int:
    # Only commands that sample call this, and they import the sampler anyway.
    from bpf.sampler import MAX_FREQUENCY_HZ  # noqa: PLC0415

    if not text.isdecimal() or not 1 <= int(text) <= MAX_FREQUENCY_HZ:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a frequency (1 to {MAX_FREQUENCY_HZ} Hz)"
        )
    return int(text)


def size_bytes(text: str) -> int:
    """Parse `512MB`, `5GB`, `1000000` (bytes); units are decimal."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(kB|MB|GB|TB|)", text)
    scale = 1000 ** ("", "kB", "MB", "GB", "TB").index(match[2]) if match else 0
    if not match or not 1 <= float(match[1]) * scale < _LIMIT:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size (try 512MB or 5GB)")
    return int(float(match[1]) * scale)


def process_id(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text[:20]) < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a process id")
    return int(text)


def ready_fd(text: str) -> int:
    """Parse a descriptor that this process has got and can write to; no child of it gets it."""
    fd = int(text) if text.isdecimal() and len(text) < 10 else -1
    try:
        if fd > 2 and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY:
            os.set_inheritable(fd, False)
            return fd
    except OSError:
        pass
    raise argparse.ArgumentTypeError(
        f"{text!r} is not an open descriptor to write to (3 or higher, as in --ready-fd 3 3>FIFO)"
    )


def label_names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add which processes to sample, how often and for how long."""
    target = parser.add_mutually_exclusive_group()
    target.add_argument("-a", "--all", action="store_true", help="sample all CPUs (the default)")
    target.add_argument(
        "-p",
        "--pid",
        dest="pids",
        metavar="PID",
        type=process_id,
        action="append",
        default=[],
        help="sample this process, or that of this thread, and its descendants; may be repeated",
    )
    add_frequency(parser)


def add_frequency(parser: argparse.ArgumentParser) -> None:
    """Add how often to sample, by which clock, and for how long."""
    parser.add_argument(
        "-F",
        "--frequency",
        type=frequency_hz,
        default=99,
        metavar="HZ",
        help="samples per second on each CPU, 1 to 999 (default 99)",
    )
    parser.add_argument(
        "--hardware",
        action="store_true",
        help="sample on CPU cycles instead of time, if the CPU supports it",
    )
    parser.add_argument(
        "--for",
        dest="duration_s",
        type=duration_s,
        default=math.inf,
        metavar="TIME",
        help="stop after this time, such as 30s, 2m or 1h (default: at Ctrl-C)",
    )


def add_ready(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ready-fd",
        type=ready_fd,
        metavar="N",
        help="write `ready` to this descriptor and close it when sampling has begun",
    )


def add_outputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o",
        "--output",
        dest="outputs",
        metavar="FILE",
        action="append",
        default=[],
        help="file to write; the ending selects the format: .svg, .pb.gz (pprof),"
        " .speedscope.json, .folded or .json; - writes folded stacks to stdout; may be repeated",
    )


def add_by(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--by",
        type=label_names,
        default=None,
        metavar="LABEL,...",
        help="labels to draw as frames above the root, such as comm,thread,pid (default comm)",
    )


def add_python_native(parser: Container, more: str = "") -> None:
    """Add the option to show what interpreters add to stacks."""
    parser.add_argument(
        "--python-native",
        action="store_true",
        help="show the Python interpreter's own C functions around Python functions" + more,
    )


def add_store(parser: Container, usual: str = "") -> None:
    parser.add_argument(
        "--store",
        default=usual,
        metavar="URL",
        help="path, file:///path or s3://bucket/prefix (default: EVERFLAME_STORE, else"
        " /var/lib/everflame for root and ~/.local/share/everflame for others)",
    )
    parser.add_argument(
        "--s3-endpoint",
        default=usual,
        metavar="URL",
        help="URL of an S3 server other than Amazon's",
    )
    parser.add_argument(
        "--tenant",
        default=usual,
        metavar="NAME",
        help="whose profiles, if several tenants share the store (default: EVERFLAME_TENANT, else"
        " `default`)",
    )


def add_window(parser: Container) -> None:
    parser.add_argument(
        "--from",
        dest="start",
        metavar="TIME",
        help="start of the time range: now-1h, RFC 3339 (2026-01-31T09:00:00Z), or Unix seconds"
        " or milliseconds",
    )
    parser.add_argument(
        "--until", dest="end", metavar="TIME", help="end of the time range (default now)"
    )


def add_query(parser: Container) -> None:
    parser.add_argument(
        "-q",
        "--query",
        default="",
        metavar="SELECTOR",
        help="""select by labels, as in '{service="api",version=~"1\\\\.5.*"}' (= != =~ !~)""",
    )


def cluster_address(text: str) -> str:
    """Check the address of a scheduler; argparse checks the default, which is empty, as well."""
    if text and not re.fullmatch(r"(tcp|tls)://[^/\s]+:\d{1,5}", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not the address of a scheduler (try tcp://HOST:8786)"
        )
    return text


def add_cluster(parser: Container, what: str = "read long time ranges") -> None:
    """Add a cluster that does what this process would do else."""
    parser.add_argument(
        "--cluster",
        type=cluster_address,
        default="",
        metavar="tcp://HOST:PORT",
        help=f"scheduler of a Dask cluster whose workers {what}; they must reach the store by"
        " the same --store",
    )


def refuse_store(options: argparse.Namespace, command: str) -> None:
    """Refuse the options that select from a store, because files were named.

    Raises:
        ValueError: one of them is there.
    """
    query = getattr(options, "query", "")
    cluster = getattr(options, "cluster", "")
    asked = (options.store, options.tenant, options.start, options.end, query, cluster)
    if any(asked):
        raise ValueError(
            f"{command}: name files, or use --store, --tenant, --from, --until, -q; not both"
        )


def add_json(parser: Container) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def webhook_url(text: str) -> str:
    """Check the URL of a webhook; argparse checks the default, which may be empty, as well."""
    # Only commands that may call one.
    from profiler.service.webhook_url import WebhookError, parse_webhook  # noqa: PLC0415

    try:
        if text:
            parse_webhook(text)
    except WebhookError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def add_webhook(parser: Container) -> None:
    parser.add_argument(
        "--webhook",
        type=webhook_url,
        default=os.environ.get("EVERFLAME_WEBHOOK", ""),
        metavar="URL",
        help="POST JSON to this URL when a deployment becomes a regression (default:"
        " EVERFLAME_WEBHOOK, which hides the URL from other users of this host)",
    )


def add_page(parser: argparse.ArgumentParser) -> None:
    """Add the address of the page."""
    parser.add_argument(
        "--listen",
        default="127.0.0.1:4040",
        metavar="HOST:PORT",
        help="address of the page (default 127.0.0.1:4040)",
    )
