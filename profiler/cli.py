"""The `everflame` command: parses the command line and runs the command that it names.

Data go to stdout, messages to stderr. Exit codes: 0 fine, 1 a regression or a failed check,
2 usage, I/O or nothing selected, 3 inconclusive (only with --strict).

Each command is a module of `profiler.commands` with `add_arguments(parser)` and `run(options)`.
Only that of the command on the command line is imported, so that `--help` does not wait for numpy.
A command for which `--` means something else has `split_arguments(arguments)` as well, which
returns the arguments that argparse is to read and the values of those that it is not.
"""

import argparse
import contextlib
import errno
import importlib
import io
import keyword
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from importlib.metadata import version
from typing import Any, TextIO

COMMANDS = {
    "record": "sample this machine, some processes or a command, and write a profile",
    "top": "show which functions use the CPUs: live, or of all hosts in a store",
    "flamegraph": "draw a profile as a flame graph, in the terminal or into a file",
    "export": "convert a profile, or write a time range of a store into a file",
    "ls": "list the hosts, windows, services and versions in a store",
    "deployments": "list or announce deployments: when services changed their version",
    "watch": "follow deployments, and call a webhook or command when one is a regression",
    "import": "store profiles of other tools: pprof, folded, speedscope, perf script",
    "verify": "check that files or a store account for every tick",
    "diff": "compare two profiles or time ranges: which functions cost more",
    "up": "profile this host and serve its flame graphs (agent and page)",
    "agent": "profile this host continuously into a directory or S3",
    "serve": "serve the flame graphs of a store: the page and its API",
    "compact": "turn a store's profiles into few columnar files, and delete what has expired",
    "pin": "keep a window of a store from everything that deletes; list and remove pins",
    "status": "show the status of this host's agent",
    "doctor": "check whether this host can be profiled, and how to fix what is missing",
    "completion": "print a script that completes commands and options in a shell",
}
"""What each command does, in the order of `--help`."""


_SURROGATES = re.compile("[\udc80-\udcff]")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status. No traceback without --debug."""
    _replace_closed_streams()
    if sys.stderr is sys.__stderr__:
        sys.stderr = _messages()
    try:
        status = _run(argv)
    except SystemExit:  # argparse ends the process: it has printed help or an error
        if not _is_flushed():
            return 2
        raise
    return status if _is_flushed() else 2


def _is_flushed() -> bool:
    """Write what is still in the buffer of standard output; say if that fails."""
    try:
        sys.stdout.flush()
    except OSError as error:
        _not_written(error)
        return False
    return True


def _not_written(error: OSError) -> int:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter would try again
    print(f"everflame: cannot write to standard output: {error.strerror}", file=sys.stderr)
    return 2


def _run(argv: Sequence[str] | None) -> int:
    environment = dict(os.environ)
    # One thread is enough for sums over a few thousand integers; each other costs memory.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if "_ARGCOMPLETE" in environment:
        import argcomplete  # noqa: PLC0415 - only a shell that completes a word waits for it

        argcomplete.autocomplete(command_line(environment["COMP_LINE"].split()))  # ends the process
    try:
        options = command_line().parse_args(argv)
    except OSError as error:  # of help
        return _not_written(error)
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
        # Frames hold what was read so far; where memory is short, a message needs some of it.
        error.__traceback__ = error.__cause__ = error.__context__ = None
        print(f"everflame: {_shown(_text_of(error))}", file=sys.stderr)
        return 2


class _Messages(io.FileIO):
    """Standard error as a file that drops what cannot be written: messages stop no command.

    The terminal may have gone (EIO), the reader of a pipe (EPIPE), or the disk may be full.
    """

    def write(self, content: Any) -> int:
        try:
            written = super().write(content)
        except OSError:
            written = None
        return len(content) if written is None else written


def _messages() -> TextIO:
    raw = _Messages(2, "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw), sys.stderr.encoding, "backslashreplace", line_buffering=True
    )


class _ClosedOutput(io.TextIOBase):
    """Standard output that the caller has closed: only what writes to it fails."""

    @property
    def buffer(self) -> "_ClosedOutput":
        return self

    def write(self, _: object) -> int:
        raise OSError("cannot write to standard output: it is closed")


def _replace_closed_streams() -> None:
    """Stand in for streams that the caller has closed (`>&-`), which Python shows as None.

    Their descriptors are taken, here and in child processes, or the next file to be opened would
    get one. Messages are dropped if stderr is closed: `print` writes them to stdout otherwise.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if stream is None:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdout is None:
        sys.stdout = _ClosedOutput()
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123 - as long as the process


def _text_of(error: Exception) -> str:
    """Return what an expected error says, without Python's own words for it (`[Errno 21]`)."""
    if isinstance(error, RecursionError | MemoryError):
        from profiler.text import limit_of  # noqa: PLC0415 - as the commands, when it is needed

        return f"cannot do that: {limit_of(error)}"
    text = str(error)
    if not isinstance(error, OSError) or not text.startswith("[Errno "):
        return text
    if error.errno == errno.ENOSPC and not error.filename:
        return f"cannot write the output: {error.strerror}"
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if name]
    return f"{' -> '.join(names)}: {error.strerror}" if names else f"{error.strerror}"


def _shown(text: str) -> str:
    r"""Write the bytes of a path that is not UTF-8 as `\xNN`, not as Python's surrogates."""
    return _SURROGATES.sub(lambda found: f"\\x{ord(found[0]) - 0xDC00:02x}", text)


def _is_expected(error: Exception) -> bool:
    """Return whether the user can fix it; everything else is a defect of this program.

    Input from outside may be nested more deeply, or be larger, than this process has room for.
    """
    return isinstance(error, (OSError, ValueError, RecursionError, MemoryError)) or type(
        error
    ).__module__.split(".")[0] in (
        "bpf",
        "profiler",
        "storage",
        "symbolizer",
    )


class _CommandParser(argparse.ArgumentParser):
    """The parser of a command; it takes its arguments from the module when it is first used."""

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
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:  # here, as the main parser would show its own usage
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown


@contextlib.contextmanager
def _ctrl_c_just_ends() -> Iterator[None]:
    """Let Ctrl-C end the process at once: an import that is interrupted prints a traceback."""
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
        description="Profile CPUs, and show where their time goes as a flame graph.",
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
