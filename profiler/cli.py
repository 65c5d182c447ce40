"""The `everflame` command: parses what is asked for and calls the module that does it.

Data go to stdout, talk goes to stderr. Exit codes: 0 fine, 1 a check failed, 2 usage or I/O.
Modules are imported by the command that needs them, so that `--help` does not wait for numpy.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import re
import signal
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from profiler.agent.agent import AgentOptions
    from profiler.commands.selection import Selection
    from storage.profile import Profile

    # argparse has no public name for what add_subparsers gives.
    _Commands = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001

_UNITS_S = {"ms": 0.001, "s": 1, "": 1, "m": 60, "h": 3600, "d": 86400}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status. No traceback without --debug."""
    environment = dict(os.environ)
    # One thread is enough for sums over a few thousand integers; each other costs memory.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    arguments = list(sys.argv[1:] if argv is None else argv)
    arguments, command = _split_command(arguments)
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="everflame: %(message)s")
    options.command = command
    options.environment = environment
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if options.debug or not _is_expected(error):
            raise
        print(f"everflame: {error}", file=sys.stderr)
        return 2


def _is_expected(error: Exception) -> bool:
    """Return what a user can do something about from what is a defect of ours."""
    return isinstance(error, (OSError, ValueError)) or type(error).__module__.split(".")[0] in (
        "bpf",
        "profiler",
        "storage",
        "symbolizer",
    )


def _split_command(arguments: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """Cut `-- COMMAND …` off `record`; argparse would look for options in it.

    The dashes of `diff BEFORE… -- AFTER…` part two lists, and options may follow.
    """
    if arguments[:1] == ["diff"] and "--" in arguments:
        at = arguments.index("--")
        return [*arguments[:at], "--after", *arguments[at + 1 :]], ()
    if arguments[:1] == ["record"] and "--" in arguments:
        at = arguments.index("--")
        if at + 1 == len(arguments):
            _parser().error("record --: name the command to run")
        return arguments[:at], tuple(arguments[at + 1 :])
    return arguments, ()


def duration_s(text: str) -> float:
    """Parse `30s`, `2m`, `1.5h`, `90` (seconds)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h|d|)", text)
    if not match or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration (try 30s, 2m or 1h)")
    return float(match[1]) * _UNITS_S[match[2]]


def frequency_hz(text: str) -> int:
    from bpf.sampler import MAX_FREQUENCY_HZ  # noqa: PLC0415

    if not text.isdecimal() or not 1 <= int(text) <= MAX_FREQUENCY_HZ:
        raise argparse.ArgumentTypeError(f"{text!r} is no frequency (1 to {MAX_FREQUENCY_HZ} Hz)")
    return int(text)


def run_count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of runs (1 to 1000)")
    return int(text)


def interval_s(text: str) -> int:
    """Parse the length of a window, whole seconds."""
    seconds = duration_s(text)
    if not 5 <= seconds <= 1800 or seconds != int(seconds):
        raise argparse.ArgumentTypeError(f"{text!r} is no interval (whole seconds, 5s to 30m)")
    return int(seconds)


def size_bytes(text: str) -> int:
    """Parse `512MB`, `5GB`, `1000000` (bytes); units are decimal."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(kB|MB|GB|TB|)", text)
    if not match or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size (try 512MB or 5GB)")
    return int(float(match[1]) * 1000 ** ("", "kB", "MB", "GB", "TB").index(match[2]))


def label_names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="everflame",
        description="Sample what the CPUs do, and look at it as a flame graph.",
        epilog="example: everflame record -a --for 20s -o cpu.svg",
    )
    parser.add_argument("--version", action="version", version=f"everflame {version('everflame')}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_record(commands)
    _add_top(commands)
    _add_flamegraph(commands)
    _add_export(commands)
    _add_ls(commands)
    _add_deployments(commands)
    _add_import(commands)
    _add_verify(commands)
    _add_diff(commands)
    _add_up(commands)
    _add_agent(commands)
    _add_serve(commands)
    _add_status(commands)
    _add_doctor(commands)
    return parser


def _add_command(
    commands: _Commands,
    name: str,
    summary: str,
    example: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # SUPPRESS: the default stands at the main parser, and must not be reset here.
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )
    return parser


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    target = parser.add_mutually_exclusive_group()
    target.add_argument("-a", "--all", action="store_true", help="sample all CPUs (the default)")
    target.add_argument(
        "-p",
        "--pid",
        dest="pids",
        metavar="PID",
        type=int,
        action="append",
        default=[],
        help="sample this process and what it starts; may be repeated",
    )
    _add_frequency(parser)


def _add_frequency(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-F",
        "--frequency",
        type=frequency_hz,
        default=99,
        metavar="HZ",
        help="samples per second and CPU, 1 to 999 (default 99)",
    )
    parser.add_argument(
        "--hardware",
        action="store_true",
        help="tick on CPU cycles instead of time, where the CPU offers that",
    )
    parser.add_argument(
        "--for",
        dest="duration_s",
        type=duration_s,
        default=math.inf,
        metavar="TIME",
        help="end by itself after 30s, 2m, 1h (default: at Ctrl-C)",
    )


def _add_record(commands: _Commands) -> None:
    parser = _add_command(
        commands,
        "record",
        "sample this machine, processes or a command, and write the profile",
        "examples:\n"
        "  everflame record -a --for 20s -o cpu.svg\n"
        "  everflame record -p 1234 --for 1m -o api.speedscope.json -o api.pb.gz\n"
        "  everflame record -F 499 -- make -j2\n"
        "  everflame record --repeat 5 -o new.pb.gz -- ./benchmark\n\n"
        "Without -o: a table on the terminal, and ./everflame-UTC.pb.gz.",
    )
    parser.usage = "everflame record [-a | -p PID | -- COMMAND ...] [--for TIME] [-o FILE] ..."
    _add_sampling(parser)
    _add_outputs(parser)
    _add_by(parser)
    parser.add_argument(
        "--repeat",
        type=run_count,
        default=0,
        metavar="N",
        help="run the COMMAND so often, into FILE-1 to FILE-N: replicates for everflame diff",
    )
    parser.set_defaults(run=_run_record)


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o",
        "--output",
        dest="outputs",
        metavar="FILE",
        action="append",
        default=[],
        help="where to write; the ending says how: .svg .pb.gz .speedscope.json .folded .json;"
        " - is stdout (folded); may be repeated",
    )


def _add_by(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--by",
        type=label_names,
        default=None,
        metavar="LABEL,...",
        help="labels drawn as frames above the root (default comm): comm, thread, pid",
    )


def _run_record(options: argparse.Namespace) -> int:
    from profiler.commands import record  # noqa: PLC0415

    if options.command and (options.pids or options.all):
        raise ValueError("record: choose one of -a, -p PID and -- COMMAND")
    asked = record.RecordOptions(
        pids=tuple(options.pids),
        command=options.command,
        frequency_hz=options.frequency,
        hardware=options.hardware,
        duration_s=options.duration_s,
        outputs=tuple(options.outputs),
        by=options.by,
    )
    if not options.repeat:
        return record.run(asked, options.environment)
    if not options.command or "-" in options.outputs:
        raise ValueError(
            "record: --repeat runs a COMMAND again and again, into numbered files: add -- COMMAND,"
            " and name no stdout"
        )
    return record.run_repeatedly(asked, options.environment, options.repeat)


def _add_top(commands: _Commands) -> None:
    parser = _add_command(
        commands,
        "top",
        "show live which functions the CPUs spend their time in",
        "examples:\n  everflame top\n  everflame top -p 1234 --interval 5s",
    )
    _add_sampling(parser)
    parser.add_argument(
        "--interval", type=duration_s, default=2.0, metavar="TIME", help="redraw this often (2s)"
    )
    parser.set_defaults(run=_run_top)


def _run_top(options: argparse.Namespace) -> int:
    from profiler.commands import top  # noqa: PLC0415

    return top.run(
        pids=tuple(options.pids),
        frequency_hz=options.frequency,
        hardware=options.hardware,
        duration_s=options.duration_s,
        interval_s=options.interval,
    )


def _add_flamegraph(commands: _Commands) -> None:
    parser = _add_command(
        commands,
        "flamegraph",
        "draw the flame graph of a file, in the terminal or into a file",
        "examples:\n"
        "  everflame flamegraph cpu.pb.gz\n"
        "  everflame flamegraph cpu.pb.gz -o cpu.svg --by comm,thread",
    )
    parser.add_argument("file", metavar="FILE", help=".pb.gz, .folded or .speedscope.json")
    _add_outputs(parser)
    _add_by(parser)
    parser.set_defaults(run=_run_flamegraph)


def _run_flamegraph(options: argparse.Namespace) -> int:
    from profiler.commands import terminal  # noqa: PLC0415
    from profiler.formats import export  # noqa: PLC0415

    profile = export.read(options.file)
    if not options.outputs:
        by = export.DEFAULT_BY if options.by is None else options.by
        print(terminal.flame_chart(profile, by, sys.stdout))
    return _write_all(options, profile)


def _write_all(
    options: argparse.Namespace, profile: Profile, by: tuple[str, ...] | None = None
) -> int:
    from profiler.formats import export  # noqa: PLC0415

    for output in options.outputs:
        export.write(profile, output, by=options.by if by is None else by)
        if output != "-":
            print(f"wrote {output}", file=sys.stderr)
    return 0


def _add_export(commands: _Commands) -> None:
    parser = _add_command(
        commands,
        "export",
        "write a profile in another format, a file's or that of a window of the store",
        "examples:\n"
        "  everflame export cpu.pb.gz -o cpu.speedscope.json\n"
        "  everflame export cpu.pb.gz -o - --by '' | flamegraph.pl > cpu.svg\n"
        "  everflame export -o api.svg --from now-1h -q '{service=\"api\"}'\n"
        "  everflame export -o parse.folded --focus parse --hide memcpy\n\n"
        "Without FILE it reads the store, by default the last hour.",
    )
    parser.add_argument(
        "file", metavar="FILE", nargs="?", help=".pb.gz, .folded or .speedscope.json"
    )
    _add_outputs(parser)
    _add_by(parser)
    _add_view(parser)
    _add_store(parser)
    _add_window(parser)
    _add_query(parser)
    parser.set_defaults(run=_run_export)


def node_id(text: str) -> int:
    if not re.fullmatch(r"[0-9a-f]{16}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no node (16 hex digits, as in a link)")
    return int(text, 16)


def _add_view(parser: argparse.ArgumentParser) -> None:
    """Add what a link to the page has in it, too: the file is then what the page shows."""
    for name, summary in (
        ("--focus", "only stacks with this function; may be repeated"),
        ("--hide", "take this function out of all stacks; may be repeated"),
    ):
        parser.add_argument(name, metavar="FUNCTION", action="append", default=[], help=summary)
    parser.add_argument(
        "--callers", metavar="FUNCTION", default="", help="what called this function, it first"
    )
    parser.add_argument("--invert", action="store_true", help="from the leaves")
    parser.add_argument(
        "--group",
        choices=("function", "line", "file", "module"),
        default="function",
        help="what a box is (default function)",
    )
    parser.add_argument(
        "--node", metavar="ID", type=node_id, help="only what goes through this box of the page"
    )


def _viewed(options: argparse.Namespace, profile: Profile) -> tuple[Profile, tuple[str, ...]]:
    """Return what is left of a profile, and the labels to draw above its stacks."""
    from profiler.flamegraph.flamegraph import ROOT_ID  # noqa: PLC0415
    from profiler.flamegraph.paths import Group  # noqa: PLC0415
    from profiler.flamegraph.views import NoSuchNodeError, View  # noqa: PLC0415
    from profiler.formats import export  # noqa: PLC0415

    view = View(
        by=export.DEFAULT_BY if options.by is None else options.by,
        group=Group(options.group),
        invert=options.invert,
        callers=options.callers,
        focus=tuple(options.focus),
        hide=tuple(options.hide),
    )
    try:
        shown = view.shown(profile, ROOT_ID if options.node is None else options.node)
    except NoSuchNodeError as error:
        raise ValueError(
            f"nothing selected: no stack goes through the node {error}; it is one of a view, so"
            " give --by, --group, --invert, --callers, --focus and --hide as the link does"
        ) from error
    if profile.total_samples and not shown.profile.total_samples:
        names = ", ".join(filter(None, (*options.focus, options.callers)))
        raise ValueError(f"nothing selected: there is no stack with {names}")
    return shown.profile, shown.by


def _add_window(parser: argparse.ArgumentParser) -> None:
    for name, destination in (("--from", "start"), ("--until", "end")):
        parser.add_argument(
            name,
            dest=destination,
            metavar="TIME",
            help="now-1h, RFC 3339 (2026-01-31T09:00:00Z), Unix seconds or milliseconds",
        )


def _add_query(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-q",
        "--query",
        default="",
        metavar="SELECTOR",
        help="""labels to keep, as '{service="api",version=~"1\\\\.5.*"}' (= != =~ !~)""",
    )


def _selection(options: argparse.Namespace, start: str | None = None) -> Selection:
    from profiler.commands.selection import Selection  # noqa: PLC0415

    return Selection.parse(
        options.store,
        options.s3_endpoint,
        start=options.start or start,
        end=options.end,
        query=getattr(options, "query", ""),
    )


def _run_export(options: argparse.Namespace) -> int:
    from profiler.formats import export  # noqa: PLC0415

    if not options.outputs:
        raise ValueError("export: name the file to write with -o FILE")
    if options.file is None:
        for output in options.outputs:
            export.check_output(output)
        answer = _selection(options, start="now-1h").answer()
        for key, reason in answer.coverage.skipped:
            print(f"everflame: skipped {key}: {reason}", file=sys.stderr)
        return _write_all(options, *_viewed(options, answer.profile))
    _refuse_store_words(options, "export")
    return _write_all(options, *_viewed(options, export.read(options.file)))


def _refuse_store_words(options: argparse.Namespace, command: str) -> None:
    asked = (options.store, options.start, options.end, getattr(options, "query", ""))
    if any(asked):
        raise ValueError(f"{command}: give files, or --store, --from, --until, -q; not both")


def _add_verify(commands: _Commands) -> None:
    parser = _add_command(
        commands,
        "verify",
        "prove that every tick of files or of a whole store is accounted for",
        "examples:\n  everflame verify cpu.pb.gz\n  everflame verify --store s3://profiles/prod\n\n"
        "Without FILE it reads the store, and also tells the gaps between a host's windows.\n"
        "Exit status 1 when ticks and stored + idle + filtered + lost differ, or a profile\n"
        "cannot be read.",
    )
    parser.add_argument("files", metavar="FILE", nargs="*", help="profiles (.pb.gz)")
    _add_json(parser)
    _add_store(parser)
    _add_window(parser)
    parser.set_defaults(run=_run_verify)


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON for other programs")


def _run_verify(options: argparse.Namespace) -> int:
    from profiler.commands import verify  # noqa: PLC0415

    if options.files:
        _refuse_store_words(options, "verify")
        return verify.run(options.files, as_json=options.json)
    selection = _selection(options)
    return verify.run_store(selection.store, selection.window, as_json=options.json)


def _add_ls(commands: _Commands) -> None:
    parser = _add_command(
        commands,
        "ls",
        "list what a store holds: hosts, windows, sizes, services, versions",
        "examples:\n"
        "  everflame ls\n"
        "  everflame ls --from now-1h -q '{service=~\"api.*\"}' --json\n\n"
        "Without --from, --until and -q only the latest object of each host is read.",
    )
    _add_json(parser)
    _add_store(parser)
    _add_window(parser)
    _add_query(parser)
    parser.set_defaults(run=_run_ls)


def _run_ls(options: argparse.Namespace) -> int:
    from profiler.commands import ls  # noqa: PLC0415

    return ls.run(_selection(options), as_json=options.json)


def _add_diff(commands: _Commands) -> None:
    parser = _add_command(
        commands,
        "diff",
        "tell what costs more than before, and how certain that is",
        "examples:\n"
        "  everflame diff '{service=\"api\"}@now-3h..now-2h' -- '{service=\"api\"}@now-1h..now'\n"
        "  everflame diff old-*.pb.gz -- new-*.pb.gz --markdown\n"
        "  everflame diff --last-deploy -q '{service=\"api\"}'\n\n"
        "A window of a store is judged by what its service did in the day before it, files by\n"
        "what differs between those of one side, of which there must be three or more.\n"
        "Exit codes: 0 fine, 1 regression, 2 nothing to compare, 3 inconclusive (with --strict).",
    )
    parser.usage = (
        "everflame diff [OPTIONS] BEFORE... -- AFTER...\n"
        "       everflame diff [OPTIONS] --last-deploy -q SELECTOR"
    )
    parser.add_argument(
        "before", metavar="BEFORE", nargs="*", help="a file, or a window: {selector}@FROM..UNTIL"
    )
    parser.add_argument(
        "--last-deploy",
        action="store_true",
        help="compare before and after the last deployment that -q, --from and --until select"
        " (default: of the last 7 days), over windows that match",
    )
    _add_query(parser)
    _add_window(parser)
    parser.add_argument("--after", nargs="+", default=[], help=argparse.SUPPRESS)
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        default="",
        help="write the graph of both sides as well, in the format of its ending: .svg, .folded"
        " (as difffolded.pl), .speedscope.json, .json; - is stdout",
    )
    _add_json(parser)
    parser.add_argument("--markdown", action="store_true", help="as Markdown, for a merge request")
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="tell how often the same rule is wrong about the service's unchanged past",
    )
    parser.add_argument(
        "--strict", action="store_true", help="exit with 3 where there is too little data"
    )
    parser.add_argument(
        "--fail-over",
        metavar="GATE",
        default="relative>=10%,share>=0.5pp",
        help="which functions that cost more fail: those that grew by so much and by so many"
        " points of the total (default %(default)s)",
    )
    _add_store(parser)
    parser.set_defaults(run=_run_diff)


def _run_diff(options: argparse.Namespace) -> int:
    from profiler.commands import diff  # noqa: PLC0415
    from profiler.comparison.gate import Gate  # noqa: PLC0415

    before, after = options.before, options.after
    if not after and len(before) == 2:
        before, after = before[:1], before[1:]
    if options.last_deploy and before:
        raise ValueError("diff: give either two sides or --last-deploy")
    if not options.last_deploy:
        if not after:
            raise ValueError(
                "diff: name both sides: everflame diff BEFORE... -- AFTER... (or --last-deploy)"
            )
        if options.query or options.start or options.end:
            raise ValueError("diff: -q, --from and --until are for --last-deploy")
    settings = diff.Options(
        store=options.store,
        endpoint=options.s3_endpoint,
        gate=Gate.parse(options.fail_over),
        strict=options.strict,
        as_json=options.json,
        as_markdown=options.markdown,
        last_deploy=_selection(options, start="now-7d") if options.last_deploy else None,
        calibrate=options.calibrate,
        output=options.output,
    )
    return diff.run(before, after, settings, time.time_ns())


def _add_deployments(commands: _Commands) -> None:
    parser = _add_command(
        commands,
        "deployments",
        "list when services began to run another version, and announce it",
        "examples:\n"
        "  everflame deployments\n"
        "  everflame deployments --from now-7d -q '{service=\"api\"}' --json\n"
        "  everflame deployments add --service api --version 1.6\n\n"
        "They are found by the versions that hosts ran, by default in the last 24 hours. Of the\n"
        "selector, version says which deployments; all else which services and hosts. KIND is\n"
        "rollout, rollback (to a version that was there before) or canary (some hosts stay on\n"
        "the version before for longer than half an hour). SETTLED is two windows after the\n"
        "last host changed. Exit status 2 when nothing is selected.",
    )
    _add_json(parser)
    _add_store(parser)
    _add_window(parser)
    _add_query(parser)
    parser.set_defaults(run=_run_deployments)
    actions = parser.add_subparsers(metavar="[add]")
    add = _add_command(
        actions,
        "add",
        "announce a deployment, as from a pipeline",
        "examples:\n"
        "  everflame deployments add --service api --version 1.6 --store s3://profiles/prod\n"
        "  everflame deployments add --service api --version 1.6 --at 2026-01-31T09:00:00Z\n\n"
        "It gives the exact begin of a deployment that is found by itself, and is how one of a\n"
        "service without a version is known. To say the same twice does no harm.",
    )
    add.add_argument("--service", required=True, help="as its label says")
    add.add_argument("--version", required=True, help="the one that begins to run")
    add.add_argument(
        "--at", metavar="TIME", default="now", help="when it begins, as --from (default now)"
    )
    _add_store(add, usual=argparse.SUPPRESS)  # else it would undo what stands before `add`
    add.set_defaults(run=_run_deployments_add)


def _run_deployments(options: argparse.Namespace) -> int:
    from profiler.commands import deployments  # noqa: PLC0415

    start = None if options.end else "now-24h"
    return deployments.run(_selection(options, start=start), as_json=options.json)


def _run_deployments_add(options: argparse.Namespace) -> int:
    from profiler.comparison.announcements import announce  # noqa: PLC0415
    from profiler.times import parse_time, rfc3339  # noqa: PLC0415
    from storage.objects.open import open_tenant  # noqa: PLC0415

    if options.start or options.end or options.query or options.json:
        raise ValueError("deployments add: it takes no --from, --until, -q and --json")
    store = open_tenant(options.store, options.s3_endpoint or None)
    at_ns = parse_time(options.at, time.time_ns())
    said = announce(store, options.service, options.version, at_ns)
    print(
        f"announced {said.service} {said.version} at {rfc3339(said.at_ns)} in {store}",
        file=sys.stderr,
    )
    return 0


def label_pair(text: str) -> tuple[str, str]:
    name, is_pair, value = text.partition("=")
    if not is_pair or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is no label (try service=api)")
    return name, value


def positive(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1_000_000:
        raise argparse.ArgumentTypeError(f"{text!r} is no rate (1 to 1,000,000 Hz)")
    return int(text)


def _add_import(commands: _Commands) -> None:
    parser = _add_command(
        commands,
        "import",
        "put profiles of other tools into a store: pprof, folded, perf script",
        "examples:\n"
        "  everflame import cpu.pb.gz --host web-1 --label service=api\n"
        "  perf script > perf.txt && everflame import perf.txt --window 2026-01-31T09:00:00Z\n"
        "  everflame import out.folded --window now-5m..now -F 49",
    )
    parser.add_argument("files", metavar="FILE", nargs="+", help="one object is made of each")
    _add_store(parser)
    parser.add_argument(
        "--window",
        default="",
        metavar="START..END",
        help="when it was taken, for files that do not say so; START alone if they say how long",
    )
    parser.add_argument("--host", default="", help="the host it was taken on (default: imported)")
    parser.add_argument(
        "--label",
        dest="labels",
        type=label_pair,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="label of all its samples; may be repeated",
    )
    parser.add_argument(
        "-F",
        "--frequency",
        type=positive,
        default=99,
        metavar="HZ",
        help="samples per second and CPU, for files that do not say (default 99)",
    )
    parser.set_defaults(run=_run_import)


def _run_import(options: argparse.Namespace) -> int:
    from profiler.commands import import_  # noqa: PLC0415
    from storage.objects.open import open_tenant  # noqa: PLC0415

    asked = import_.ImportOptions(
        window=options.window,
        host=options.host,
        labels=dict(options.labels),
        frequency_hz=options.frequency,
    )
    store = open_tenant(options.store, options.s3_endpoint or None)
    return import_.run(options.files, store, asked, time.time_ns())


def _add_agent(commands: _Commands) -> None:
    parser = _add_command(
        commands,
        "agent",
        "profile this host for ever, one object per window into a directory or S3",
        "examples:\n"
        "  everflame agent\n"
        "  everflame agent --store s3://profiles/prod --interval 60s\n"
        "  everflame agent --store /srv/profiles --keep 7d --keep-bytes 20GB\n\n"
        "S3 keys come from the usual variables (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, ...).",
    )
    _add_always_on(parser)
    parser.set_defaults(run=_run_agent)


def _add_up(commands: _Commands) -> None:
    parser = _add_command(
        commands,
        "up",
        "profile this host and serve its flame graphs: the agent and its page",
        "examples:\n"
        "  everflame up\n"
        "  everflame up --for 20s --listen 127.0.0.1:5050\n"
        "  everflame up --demo\n\n"
        "Windows are of 5 s in the first minute. Ctrl-C closes and stores the last one.",
    )
    parser.add_argument(
        "--listen",
        default="127.0.0.1:4040",
        metavar="HOST:PORT",
        help="where the page is served (default 127.0.0.1:4040)",
    )
    parser.add_argument(
        "--demo", action="store_true", help="run a few small programs that are worth a look"
    )
    _add_decode_ahead(parser)
    _add_always_on(parser)
    parser.set_defaults(run=_run_up)


def _add_serve(commands: _Commands) -> None:
    parser = _add_command(
        commands,
        "serve",
        "serve the page and its API over a store",
        "examples:\n"
        "  everflame serve\n"
        "  everflame serve --store s3://profiles/prod --listen 127.0.0.1:4040\n\n"
        "It only reads. From elsewhere it is reached with ssh -L 4040:127.0.0.1:4040.",
    )
    _add_store(parser)
    parser.add_argument(
        "--listen",
        default="127.0.0.1:4040",
        metavar="HOST:PORT",
        help="where the page is served (default 127.0.0.1:4040)",
    )
    _add_decode_ahead(parser)
    parser.set_defaults(run=_run_serve)


def percent(text: str) -> int:
    if not text.isdecimal() or int(text) > 100:
        raise argparse.ArgumentTypeError(f"{text!r} is no share of a CPU (0 to 100)")
    return int(text)


def _add_decode_ahead(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--decode-ahead",
        type=percent,
        default=10,
        metavar="PERCENT",
        help="of one otherwise idle CPU, to decode the last day before anybody asks for it"
        " (default 10; 0: not at all)",
    )


def _run_serve(options: argparse.Namespace) -> int:
    # A Ctrl-C in the middle of an import is a crash of what is imported: until then it just ends.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from profiler.commands import serve  # noqa: PLC0415

    asked = [f"--store={options.store}", f"--s3-endpoint={options.s3_endpoint}"]
    asked += [f"--listen={options.listen}", f"--decode-ahead={options.decode_ahead}"]
    return serve.main(asked)


def _add_always_on(parser: argparse.ArgumentParser) -> None:
    _add_frequency(parser)
    parser.add_argument(
        "--interval",
        type=interval_s,
        default=60,
        metavar="TIME",
        help="length of a window, 5s to 30m (default 60s)",
    )
    _add_store(parser)
    parser.add_argument(
        "--keep",
        type=duration_s,
        metavar="TIME",
        help="in a directory, delete what is older (default 2d)",
    )
    parser.add_argument(
        "--keep-bytes",
        type=size_bytes,
        metavar="SIZE",
        help="in a directory, delete the oldest beyond this size (default 5GB)",
    )
    parser.add_argument(
        "--spool", metavar="DIR", help="where windows wait for the store (default: see status)"
    )
    parser.add_argument(
        "--spool-limit",
        type=size_bytes,
        default=512_000_000,
        metavar="SIZE",
        help="what may wait; beyond it the oldest keep their counts only (default 512MB)",
    )
    parser.add_argument(
        "--unwind-memory",
        type=size_bytes,
        default=48_000_000,
        metavar="SIZE",
        help="of the kernel, for unwind tables; those not in use make room (default 48MB)",
    )
    parser.add_argument(
        "--metrics-listen",
        default="",
        metavar="HOST:PORT",
        help="serve Prometheus metrics there (default: not at all)",
    )
    parser.add_argument(
        "--config", metavar="FILE", help="rules that name services (TOML; see the README)"
    )


def _add_store(parser: argparse.ArgumentParser, usual: str = "") -> None:
    parser.add_argument(
        "--store",
        default=usual,
        metavar="URL",
        help="file:///path, a path or s3://bucket/prefix (default EVERFLAME_STORE, else"
        " /var/lib/everflame or ~/.local/share/everflame)",
    )
    parser.add_argument(
        "--s3-endpoint", default=usual, metavar="URL", help="an S3 server other than Amazon's"
    )


def _run_agent(options: argparse.Namespace) -> int:
    from profiler.agent import agent  # noqa: PLC0415

    logging.getLogger().setLevel(logging.INFO)
    agent.run(_agent_options(options))
    return 0


def _run_up(options: argparse.Namespace) -> int:
    from profiler.commands import up  # noqa: PLC0415

    return up.run(
        _agent_options(options),
        options.listen,
        has_demo=options.demo,
        decode_ahead=options.decode_ahead,
    )


def _agent_options(options: argparse.Namespace) -> AgentOptions:
    from profiler.agent import agent, status  # noqa: PLC0415
    from profiler.processes.rules import Rules, load_rules  # noqa: PLC0415

    spool = Path(options.spool) if options.spool else status.default_spool()
    return agent.AgentOptions(
        frequency_hz=options.frequency,
        hardware=options.hardware,
        interval_s=options.interval,
        duration_s=options.duration_s,
        spool=spool.absolute(),
        spool_limit_bytes=options.spool_limit,
        tables_limit_bytes=options.unwind_memory,
        run_folder=status.default_run_folder(),
        store=options.store,
        endpoint=options.s3_endpoint,
        keep_s=options.keep,
        keep_bytes=options.keep_bytes,
        metrics_listen=options.metrics_listen,
        rules=load_rules(Path(options.config)) if options.config else Rules(),
    )


def _add_status(commands: _Commands) -> None:
    parser = _add_command(
        commands,
        "status",
        "tell how the agent of this host fares",
        "examples:\n  everflame status\n  everflame status --json",
    )
    _add_json(parser)
    parser.set_defaults(run=_run_status)


def _run_status(options: argparse.Namespace) -> int:
    from profiler.agent import status  # noqa: PLC0415

    return status.run(status.default_run_folder(), as_json=options.json)


def _add_doctor(commands: _Commands) -> None:
    parser = _add_command(
        commands,
        "doctor",
        "check what this host offers a profiler, with a remedy beside every failure",
        "examples:\n  sudo everflame doctor\n  everflame doctor --store s3://profiles/prod\n\n"
        "The store is checked when --store or EVERFLAME_STORE names one.",
    )
    _add_json(parser)
    _add_store(parser)
    parser.set_defaults(run=_run_doctor)


def _run_doctor(options: argparse.Namespace) -> int:
    from profiler.commands import doctor  # noqa: PLC0415

    store = options.store or os.environ.get("EVERFLAME_STORE")
    return doctor.main(options.json, store, options.s3_endpoint or None)
