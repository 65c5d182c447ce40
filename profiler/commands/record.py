"""`everflame record`: sample for a while, then write the profile and a summary of it.

Whatever ends the recording (time, Ctrl-C, SIGTERM, the end of the processes), the ticks that were
counted are folded and written.
"""

import argparse
import math
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, TextIO

from bpf.sampler import SamplerConfig
from profiler.agent.guard import Guard
from profiler.agent.ready import announce
from profiler.agent.recorder import Recorder
from profiler.agent.signals import ENDING, Signals
from profiler.agent.supervise import RefusedError
from profiler.agent.window import deviation
from profiler.commands import arguments, outputs
from profiler.commands.targets import Command, Processes, Target, target_of
from profiler.formats import export
from profiler.text import StatusLine, counted, lost_to, path_text, tell
from storage.profile import Accounting, Profile

_LONGEST_PAUSE_S = 1.0
"""A step that fails does not end the recording: what was counted before it is written."""
_GRACE_S = 5.0
"""How long a command may take to end when asked to, before the recording ends without it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "examples:\n"
        "  everflame record -a --for 20s -o cpu.svg\n"
        "  everflame record -p 1234 --for 1m -o api.speedscope.json -o api.pb.gz\n"
        "  everflame record -F 499 -- make -j2\n"
        "  everflame record --repeat 5 -o new.pb.gz -- ./benchmark\n\n"
        "Without -o it prints a table of functions and writes ./everflame-UTC.pb.gz, where UTC is\n"
        "the time."
    )
    parser.usage = "everflame record [-a | -p PID | -- COMMAND ...] [--for TIME] [-o FILE] ..."
    arguments.add_sampling(parser)
    arguments.add_ready(parser)
    arguments.add_outputs(parser)
    arguments.add_by(parser)
    arguments.add_python_native(parser, " (.pb.gz has them in any case)")
    parser.set_defaults(command=())
    parser.add_argument(
        "--repeat",
        type=run_count,
        default=0,
        metavar="N",
        help="run COMMAND N times and write FILE-1 to FILE-N, replicates for everflame diff",
    )


def split_arguments(given: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Cut off `-- COMMAND ...`, in which argparse would look for options."""
    if "--" not in given:
        return list(given), {}
    at = given.index("--")
    if at + 1 == len(given):
        raise ValueError("name the command to run after --")
    return list(given[:at]), {"command": tuple(given[at + 1 :])}


def run_count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of runs (1 to 1000)")
    return int(text)


def run(options: argparse.Namespace) -> int:
    if options.command and (options.pids or options.all):
        raise ValueError("record: choose one of -a, -p PID and -- COMMAND")
    asked = RecordOptions(
        pids=tuple(options.pids),
        command=options.command,
        frequency_hz=options.frequency,
        hardware=options.hardware,
        duration_s=options.duration_s,
        outputs=tuple(options.outputs),
        by=options.by,
        python_native=options.python_native,
        ready_fd=options.ready_fd,
    )
    if not options.repeat:
        return record(asked, options.environment)
    if not options.command or "-" in options.outputs:
        raise ValueError(
            "record: --repeat runs a command and writes a file for each run: add -- COMMAND, and"
            " name no stdout (-o -)"
        )
    return record_repeatedly(asked, options.environment, options.repeat)


@dataclass(frozen=True, slots=True)
class RecordOptions:
    """The options of `everflame record`.

    `pids` and `command` are empty to record all CPUs; `duration_s` is infinite without --for; `by`
    is None for the default of the format. `ready_fd` is told when sampling has begun.
    """

    pids: tuple[int, ...]
    command: tuple[str, ...]
    frequency_hz: int
    hardware: bool
    duration_s: float
    outputs: tuple[str, ...]
    by: tuple[str, ...] | None
    ready_fd: int | None = None
    python_native: bool = False


def record(options: RecordOptions, environment: dict[str, str]) -> int:
    """Record and write; return the exit status."""
    files = options.outputs or (f"./everflame-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.pb.gz",)
    outputs.check(files)
    with Signals() as signals:
        target = (
            Command(options.command, environment, signals.ignored)
            if options.command
            else target_of(options.pids)
        )
        config = SamplerConfig(options.frequency_hz, options.hardware, target.pids)
        commands = target.pids if isinstance(target, Command) else None
        for note in target.notes:
            tell(f"everflame: {note}")
        with Recorder(config, commands=commands or ()) as recorder:
            ending = _sample(recorder, target, options, signals)
            profile = recorder.cut_window()
            unselected = recorder.sampler.unselected
    written, error = outputs.write(profile, files, options.by, python_native=options.python_native)
    if not options.outputs:
        # Memory that sampling does not need.
        from profiler.commands import terminal  # noqa: PLC0415
        from storage.columns import Columns  # noqa: PLC0415

        width = terminal.width(sys.stdout)
        table = terminal.function_table(
            Columns.of(profile), width=width, limit=25, python_native=options.python_native
        )
        print(table)
    talk = [*ending, *summary(profile, config)]
    if unselected:
        left_out = counted(unselected, "process", "processes")
        talk.append(f"warning: left out {left_out}: too many were started")
    talk += [f"wrote {path_text(file)}" for file in written if file != export.STDOUT]
    tell(*talk)
    if error:
        raise error
    return target.exit_status()


def record_repeatedly(options: RecordOptions, environment: dict[str, str], times: int) -> int:
    """Record a command several times, each run into its own files: `NAME-1.pb.gz` and so on.

    Stop after the first run that fails, and return its exit status.

    Raises:
        ExportError: the ending of an output names no format.
    """
    files = options.outputs or ("everflame.pb.gz",)
    for number in range(1, times + 1):
        numbered = tuple(_numbered(file, number) for file in files)
        status = record(replace(options, outputs=numbered), environment)
        if status:
            return status
        options = replace(options, ready_fd=None)  # closed when the first run began
    return 0


def _numbered(output: str, number: int) -> str:
    ending = export.ending_of(output)
    return f"{output.removesuffix(ending)}-{number}{ending}"


def _sample(
    recorder: Recorder, target: Target, options: RecordOptions, signals: Signals
) -> list[str]:
    """Sample until the end; return what is to be said of how it came.

    Raises:
        RefusedError: the processes have ended before sampling began.
    """
    progress = Progress(sys.stderr, options.duration_s)
    recorder.watch(signals)
    recorder.start()
    if isinstance(target, Processes) and target.has_ended():
        raise RefusedError(f"cannot record {target.name}: ended before sampling began")
    tell(f"sampling {target.name} at {options.frequency_hz} Hz")
    announce(options.ready_fd, {})
    target.start()
    begun = time.monotonic()
    deadline = begun + options.duration_s
    next_step = begun + recorder.drain_period_s
    asked = False
    ending: list[str] = []
    guard = Guard("recording", _LONGEST_PAUSE_S, has_traceback=False)
    while not target.has_ended():
        until_s = min(next_step, deadline)
        # What a fault has left unread keeps its descriptor readable.
        met = (
            signals.wait(min(until_s, guard.resumes_s), only_signals=True)
            if guard.is_paused
            else signals.wait(until_s, rest_until_s=recorder.rests_until_s)
        )
        now = time.monotonic()
        if now < next_step:  # a step does the same, and more
            guard.run(recorder.catch_up)
        if met in ENDING or now >= deadline:
            if asked or not isinstance(target, Command):
                break
            asked = True
            target.ask_to_end(met if met in ENDING else signal.SIGTERM)
            deadline = now + _GRACE_S
        if now >= next_step:
            guard.resume()
            if guard.run(recorder.step):
                guard.run(lambda: progress.show(time.monotonic() - begun, recorder.counts))
            next_step = max(next_step + recorder.drain_period_s, now)
    else:
        if isinstance(target, Processes):
            ending.append(f"stopped after {time.monotonic() - begun:.1f} s: {target.name} ended")
    progress.clear()
    for step in (recorder.stop, recorder.drain):
        guard.resume()
        guard.run(step)
    return ending


class Progress:
    """One line that is rewritten each second; only on a terminal."""

    def __init__(self, out: TextIO, duration_s: float) -> None:
        self._line = StatusLine(out)
        self._of = "" if math.isinf(duration_s) else f" of {duration_s:g}"

    def show(self, seconds: float, counts: Accounting) -> None:
        lost = sum(counts.lost.values())
        self._line.show(
            f"{seconds:.0f}{self._of} s  {counted(counts.stored, 'sample')}  {lost:,} lost"
            "  (Ctrl-C stops and writes)"
        )

    def clear(self) -> None:
        self._line.clear()


def summary(profile: Profile, config: SamplerConfig) -> list[str]:
    """Summarize in a few lines what a profile contains and what recording it cost."""
    counts = profile.accounting
    seconds = counts.profiled_ns / 1e9
    lost = sum(counts.lost.values())
    busy = profile.total_value / counts.profiled_ns if counts.profiled_ns else 0.0
    cost = counts.agent_cpu_ns / max(1, counts.profiled_ns)
    rate = f"{seconds:.1f} s on {counted(counts.cpus, 'CPU')} at {config.frequency_hz} Hz"
    parts = f"{counts.stored:,} stored + {counts.idle:,} idle + {counts.filtered:,} filtered"
    lines = [
        f"{rate}: {counted(counts.stored, 'sample')}, {lost:,} lost; {busy:.2f} cores used",
        f"{counted(counts.ticks, 'tick')} = {parts} + {lost:,} lost",
        f"the profiler took {cost:.1%} of one CPU and {counts.agent_rss_bytes / 1e6:.0f} MB",
    ]
    lines += [f"warning: {lost_to(cause, number)}" for cause, number in counts.lost.items()]
    if warning := deviation(counts, config):
        lines.append(warning)
    return lines
