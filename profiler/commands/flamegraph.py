"""`everflame flamegraph`: the flame graph of a file, in the terminal or in another file."""

import argparse
import sys

from profiler.commands import arguments, outputs, terminal
from profiler.commands.files import FILE_HELP, add_reading_options, read_file, reading_options
from profiler.formats import export
from storage.columns import Columns


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "examples:\n"
        "  everflame flamegraph cpu.pb.gz\n"
        "  everflame flamegraph cpu.pb.gz -o cpu.svg --by comm,thread"
    )
    parser.add_argument("file", metavar="FILE", help=FILE_HELP)
    arguments.add_outputs(parser)
    arguments.add_by(parser)
    arguments.add_python_native(parser)
    add_reading_options(parser)


def run(options: argparse.Namespace) -> int:
    outputs.check(options.outputs)
    profile = read_file(options.file, reading_options(options))
    if not options.outputs:
        by = export.DEFAULT_BY if options.by is None else options.by
        chart = terminal.flame_chart(
            Columns.of(profile), by, sys.stdout, python_native=options.python_native
        )
        print(chart)
    outputs.write_all(profile, options.outputs, options.by, python_native=options.python_native)
    return 0
