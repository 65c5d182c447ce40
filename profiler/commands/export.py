"""`everflame export`: convert a profile, or write a time range of a store into a file."""

import argparse
import re
import sys

from profiler.commands import arguments, outputs
from profiler.commands.files import FILE_HELP, add_reading_options, read_file, reading_options
from profiler.commands.selection import in_cluster, selected
from profiler.flamegraph.flamegraph import ROOT_ID
from profiler.flamegraph.stacks import Group
from profiler.flamegraph.views import NoSuchNodeError, Shown, View
from profiler.formats import export
from profiler.text import path_text
from storage.columns import Columns


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "examples:\n"
        "  everflame export cpu.pb.gz -o cpu.speedscope.json\n"
        "  everflame export cpu.pb.gz -o - --by '' | flamegraph.pl > cpu.svg\n"
        "  everflame export -o api.svg --from now-1h -q '{service=\"api\"}'\n"
        "  everflame export -o parse.folded --focus parse --hide memcpy\n"
        "  everflame export -o week.svg --from now-7d --cluster tcp://scheduler:8786\n"
        "  everflame export --for go-pgo -q '{service=\"api\"}' --from now-1d -o default.pgo\n\n"
        "Without FILE it reads the store, by default the last hour."
    )
    parser.add_argument("file", metavar="FILE", nargs="?", help=FILE_HELP)
    arguments.add_outputs(parser)
    arguments.add_by(parser)
    _add_view(parser)
    arguments.add_store(parser)
    arguments.add_window(parser)
    arguments.add_query(parser)
    arguments.add_cluster(parser)
    add_reading_options(parser)
    _add_purpose(parser)


def _add_purpose(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("profile-guided optimization")
    group.add_argument(
        "--for",
        dest="purpose",
        choices=("go-pgo",),
        help="write what `go build -pgo=FILE` takes, whatever the file is called: the samples of"
        " one Go program, with the lines of calls",
    )
    group.add_argument(
        "--binary",
        dest="binaries",
        metavar="FILE",
        action="append",
        default=[],
        help="the program that was sampled, stripped or not; its build id is compared (default:"
        " the file at the path where it ran); may be repeated, for several builds",
    )


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
    arguments.add_python_native(
        parser,
        "; .pb.gz has them in any case, unless --group, --hide, --callers or --invert"
        " changes its stacks",
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
    _check(options)
    if options.file is None:
        with in_cluster(options) as executor:
            answer = selected(options, "now-1h", executor).answer()
        for key, reason in answer.coverage.skipped:
            print(f"everflame: skipped {key}: {reason}", file=sys.stderr)
        whole = answer.profile
    else:
        arguments.refuse_store(options, "export")
        read = read_file(options.file, reading_options(options))
        whole = Columns.of(read)
    if options.purpose:
        _write_go_pgo(whole, options)
        return 0
    shown = _viewed(options, whole)
    outputs.write_all(
        shown.profile,
        options.outputs,
        shown.by,
        by_line=shown.by_line,
        python_native=options.python_native,
    )
    return 0


def _check(options: argparse.Namespace) -> None:
    """Fail early, before anything is read.

    Raises:
        ValueError: an option has nothing to do with what is written.
        OSError: a file cannot be written.
    """
    if not options.purpose:
        if options.binaries:
            raise ValueError("export: --binary is for --for go-pgo")
        for file in options.outputs:
            if file.endswith(".pgo"):
                raise ValueError(f"export: to write {path_text(file)}, add --for go-pgo")
        outputs.check(options.outputs)
        return
    drawn = ("by", "focus", "hide", "callers", "invert", "node", "python_native")
    used = [name.replace("_", "-") for name in drawn if getattr(options, name)]
    if options.group != Group.FUNCTION:
        used.append("group")
    if used:
        raise ValueError(f"export: --for go-pgo takes whole stacks: leave out --{used[0]}")
    outputs.check_places(options.outputs)


def _write_go_pgo(profile: Columns, options: argparse.Namespace) -> None:
    from profiler.formats import go_pgo  # noqa: PLC0415 - other exports parse no ELF files

    written = go_pgo.encode(profile, options.binaries)
    outputs.put_all(written.content, options.outputs)
    for remark in written.remarks:
        print(f"everflame: {remark}", file=sys.stderr)


def _viewed(options: argparse.Namespace, profile: Columns) -> Shown:
    """Return the selected part of a profile, as it is to be drawn."""
    view = View(
        by=export.DEFAULT_BY if options.by is None else options.by,
        group=Group(options.group),
        invert=options.invert,
        callers=options.callers,
        focus=tuple(options.focus),
        hide=tuple(options.hide),
        python_native=options.python_native,
    )
    try:
        shown = view.shown(profile, ROOT_ID if options.node is None else options.node)
    except NoSuchNodeError as error:
        raise ValueError(
            f"nothing selected: no stack goes through the node {error}; its id depends on --by,"
            " --group, --invert, --callers, --focus, --hide and --python-native: give them as in"
            " the link"
        ) from error
    if profile.total_samples and not shown.profile.total_samples:
        names = ", ".join(filter(None, (*options.focus, options.callers)))
        raise ValueError(f"nothing selected: there is no stack with {names}")
    return shown
