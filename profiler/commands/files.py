"""Files that commands read: the options that choose a part of them, and what is said about them."""

import argparse
import sys

from profiler.formats.reading import ReadOptions, read
from storage.profile import Profile

FILE_HELP = "pprof, speedscope, folded stacks or perf script text, plain or gzipped"


def add_reading_options(parser: argparse.ArgumentParser, *, has_sides: bool = True) -> None:
    """Add what chooses a part of a file that holds several."""
    group = parser.add_argument_group("files that hold several profiles")
    group.add_argument(
        "--event",
        default="",
        metavar="NAME",
        help="perf script: the event whose samples are read (default: cpu-clock or"
        " cycles, else the first)",
    )
    group.add_argument(
        "--sample-type",
        default="",
        metavar="TYPE",
        help="pprof: the sample type (default: cpu; else what go tool pprof shows, the file's"
        " default or the last); speedscope: a unit or the name of a profile",
    )
    if has_sides:
        group.add_argument(
            "--side",
            default="",
            choices=("before", "after"),
            help="the side to read of a file that holds a comparison",
        )


def reading_options(options: argparse.Namespace) -> ReadOptions:
    return ReadOptions(options.event, options.sample_type, getattr(options, "side", ""))


def read_file(file: str, options: ReadOptions | None = None, *, is_quiet: bool = False) -> Profile:
    """Read a profile. Unless quiet, what a user must know about it goes to stderr.

    Raises:
        ProfileError: it is damaged, or of no format that is read; the message names the file.
        OSError: it cannot be read.
    """
    reading = read(file, options or ReadOptions())
    for warning in () if is_quiet else reading.warnings:
        print(f"{file}: {warning}", file=sys.stderr)
    return reading.profile
