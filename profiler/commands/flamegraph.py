"""`everflame flamegraph`: the flame graph of a file, in the terminal or in another file."""

import argparse
import sys

from profiler.commands import arguments, terminal
from profiler.formats import export


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "examples:\n"
        "  everflame flamegraph cpu.pb.gz\n"
        "  everflame flamegraph cpu.pb.gz -o cpu.svg --by comm,thread"
    )
    parser.add_argument("file", metavar="FILE", help=".pb.gz, .folded or .speedscope.json")
    arguments.add_outputs(parser)
    arguments.add_by(parser)


def run(options: argparse.Namespace) -> int:
    profile = export.read(options.file)
    if not options.outputs:
        by = export.DEFAULT_BY if options.by is None else options.by
        print(terminal.flame_chart(profile, by, sys.stdout))
    for output in options.outputs:
        export.write(profile, output, by=options.by)
        if output != "-":
            print(f"wrote {output}", file=sys.stderr)
    return 0
