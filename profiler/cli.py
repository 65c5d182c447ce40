"""The `everflame` command: parses what is asked for and calls the module that does it.

Data go to stdout, talk goes to stderr. Exit codes: 0 fine, 1 a check failed, 2 usage or I/O.

Each command is a module of `profiler.commands` with `add_arguments(parser)` and `run(options)`.
Only that of the command on the command line is imported, so that `--help` does not wait for numpy.
One that gives `--` a meaning of its own has `split_arguments(arguments)` as well, which returns the
arguments that argparse is to read and the values of those that it is not.
"""

import argparse
import contextlib
import importlib
import keyword
import logging
import os
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from importlib.metadata import version
from typing import Any

COMMANDS = {
    "record": "sample this machine, processes or a command, and write the profile",
    "top": "show live which functions the CPUs spend their time in",
    "flamegraph": "draw the flame graph of a file, in the terminal or into a file",
    "export": "write a profile in another format, a file's or that of a window of the store",
    "ls": "list what a store holds: hosts, windows, sizes, services, versions",
    "deployments": "list when services began to run another version, and announce it",
    "import": "put profiles of other tools into a store: pprof, folded, perf script",
    "verify": "prove that every tick of files or of a whole store is accounted for",
    "diff": "tell what costs more than before, and how certain that is",
    "up": "profile this host and serve its flame graphs: the agent and its page",
    "agent": "profile this host for ever, one object per window into a directory or S3",
    "serve": "serve the page and its API over a store",
    "status": "tell how the agent of this host fares",
    "doctor": "check what this host offers a profiler, with a remedy beside every failure",
    "completion": "print a script that completes commands and options in a shell",
}
"""What each does, in the order of `--help`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status. No traceback without --debug."""
    environment = dict(os.environ)
    # One thread is enough for sums over a few thousand integers; each other costs memory.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if "_ARGCOMPLETE" in environment:
        import argcomplete  # noqa: PLC0415 - only a shell that completes a word waits for it

        argcomplete.autocomplete(command_line(environment["COMP_LINE"].split()))  # ends the process
    options = command_line().parse_args(argv)
    logging.basicConfig(format="everflame: %(message)s")
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


class _CommandParser(argparse.ArgumentParser):
    """The parser of a command, whose arguments come with its module when it is first used."""

    module = ""
    _split: Callable[[Sequence[str]], tuple[list[str], dict[str, Any]]] | None = None

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        # SUPPRESS: the default stands at the main parser, and must not be reset here.
        self.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )

    def load(self) -> None:
        """Import the module of the command, if that is still to be done."""
        if not self.module:
            return
        with _ctrl_c_just_ends():
            module = importlib.import_module(f"profiler.commands.{self.module}")
        self.module = ""
        self._split = getattr(module, "split_arguments", None)
        module.add_arguments(self)
        self.set_defaults(run=module.run)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.load()
        if self._split and args:
            try:
                args, values = self._split(args)
            except ValueError as error:
                self.error(str(error))
            self.set_defaults(**values)
        return super().parse_known_args(args, namespace)


@contextlib.contextmanager
def _ctrl_c_just_ends() -> Iterator[None]:
    """Let Ctrl-C end the process at once: in the middle of an import it shows as a crash of it."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)


def command_line(loaded: Collection[str] = ()) -> argparse.ArgumentParser:
    """Return the parser of the whole command line; the `loaded` commands have their arguments."""
    parser = argparse.ArgumentParser(
        prog="everflame",
        description="Sample what the CPUs do, and look at it as a flame graph.",
        epilog="example: everflame record -a --for 20s -o cpu.svg",
    )
    parser.add_argument("--version", action="version", version=f"everflame {version('everflame')}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_CommandParser)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(
            name, help=summary, description=summary[0].upper() + summary[1:] + "."
        )
        # `import` is a word of Python's.
        command.module = f"{name}_" if keyword.iskeyword(name) else name
        if name in loaded:
            command.load()
    return parser
