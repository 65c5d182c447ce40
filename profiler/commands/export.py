"""`everflame export`: convert a profile, or write a time range of a store into a file."""

import argparse
import re
import sys

from profiler.commands import arguments, outputs
from profiler.commands.files import FILE_HELP, add_reading_options, read_file, reading_options
from profiler.commands.selection import selected
from profiler.flamegraph.flamegraph import ROOT_ID
from profiler.flamegraph.stacks import Group
from profiler.flamegraph.views import NoSuchNodeError, View
from profiler.formats import export
from storage.columns import Columns


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "examples:\n"
        "  everflame export cpu.pb.gz -o cpu.speedscope.json\n"
        "  everflame export cpu.pb.gz -o - --by '' | flamegraph.pl > cpu.svg\n"
        "  everflame export -o api.svg --from now-1h -q '{service=\"api\"}'\n"
        "  everflame export -o parse.folded --focus parse --hide memcpy\n\n"
        "Without FILE it reads the store, by default the last hour."
    )
    parser.add_argument("file", metavar="FILE", nargs="?", help=FILE_HELP)
    arguments.add_outputs(parser)
    arguments.add_by(parser)
    _add_view(parser)
    arguments.add_store(parser)
    arguments.add_window(parser)
    arguments.add_query(parser)
    add_reading_options(parser)


def _add_view(parser: argparse.ArgumentParser) -> None:
    """Add the parameters that a link to the page has, so that the file shows the same."""
    for name, summary in (
        ("--focus", "keep only stacks that contain this function; may be repeated"),
        ("--hide", "remove this function from all stacks; may be repeated"),
    ):
        parser.add_argument(name, metavar="FUNCTION", action="append", default=[], help=summary)
    parser.add_argument(
        "--callers", metavar="FUNCTION", default="", help="show what calls this function"
    )
    parser.add_argument(
        "--invert", action="store_true", help="invert the graph: start from the leaves"
    )
    parser.add_argument(
        "--group",
        choices=("function", "line", "file", "module"),
        default="function",
        help="what a box of the graph stands for (default function)",
    )
    parser.add_argument(
        "--node",
        metavar="ID",
        type=node_id,
        help="keep only stacks through this box, by its id in a link to the page",
    )


def node_id(text: str) -> int:
    if not re.fullmatch(r"[0-9a-f]{16}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a node (16 hex digits, as in a link)")
    return int(text, 16)


def run(options: argparse.Namespace) -> int:
    """Write the profile into every output; return the exit status."""
    if not options.outputs:
        raise ValueError("export: name the file to write with -o FILE")
    outputs.check(options.outputs)
    if options.file is None:
        answer = selected(options, start="now-1h").answer()
        for key, reason in answer.coverage.skipped:
            print(f"everflame: skipped {key}: {reason}", file=sys.stderr)
        profile, by = _viewed(options, answer.profile)
    else:
        arguments.refuse_store(options, "export")
        read = read_file(options.file, reading_options(options))
        profile, by = _viewed(options, Columns.of(read))
    outputs.write_all(profile, options.outputs, by)
    return 0


def _viewed(options: argparse.Namespace, profile: Columns) -> tuple[Columns, tuple[str, ...]]:
    """Return the selected part of a profile, and the labels to draw above its stacks."""
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
            f"nothing selected: no stack goes through the node {error}; its id depends on --by,"
            " --group, --invert, --callers, --focus and --hide: give them as in the link"
        ) from error
    if profile.total_samples and not shown.profile.total_samples:
        names = ", ".join(filter(None, (*options.focus, options.callers)))
        raise ValueError(f"nothing selected: there is no stack with {names}")
    return shown.profile, shown.by
