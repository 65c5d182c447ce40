"""`everflame top`: which functions used the CPUs in the last seconds, redrawn over and over.

With a store or a time it is a table of what the store holds: see `profiler.commands.fleet_top`.
"""

import argparse
import shutil
import sys
import time

from bpf.sampler import SamplerConfig
from profiler.agent.recorder import Recorder
from profiler.agent.signals import ENDING, Signals
from profiler.commands import arguments, fleet_top, terminal
from profiler.commands.targets import target_of
from profiler.fleet import GROUPS
from profiler.text import counted, tell
from storage.columns import Columns
from storage.profile import Profile

# Alternate screen and hidden cursor, and back: what was on the terminal is there again at the end.
_ENTER, _LEAVE, _HOME = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l", "\x1b[H\x1b[J"

_SIZE = (100, 30)
"""Columns and lines where the terminal does not say how many it has, or there is none."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "examples:\n"
        "  everflame top\n"
        "  everflame top -p 1234 --interval 5s\n"
        "  everflame top --store s3://profiles --from now-24h\n"
        "  everflame top --from now-1h --by service,version -q '{service=~\"api.*\"}'\n"
        "  everflame top --from now-24h --group service"
    )
    arguments.add_sampling(parser)
    parser.add_argument(
        "--interval",
        type=arguments.duration_s,
        default=2.0,
        metavar="TIME",
        help="time between redraws (default 2s)",
    )
    arguments.add_python_native(parser)
    fleet = parser.add_argument_group(
        "of a store, in place of this machine (with --store, --from, --until or -q)"
    )
    arguments.add_store(fleet)
    arguments.add_window(fleet)
    arguments.add_query(fleet)
    arguments.add_cluster(fleet)
    fleet.add_argument(
        "--by",
        type=arguments.label_names,
        metavar="LABEL,...",
        help="labels to tell apart, such as service,version,host (default: none)",
    )
    fleet.add_argument(
        "--group",
        choices=GROUPS,
        default="function",
        help="what a line stands for (default function)",
    )
    fleet.add_argument(
        "--limit",
        type=arguments.positive,
        default=40,
        metavar="N",
        help="lines to print (default 40)",
    )
    arguments.add_json(fleet)


def run(options: argparse.Namespace) -> int:
    """Draw until Ctrl-C, the end of `--for`, or the exit of all processes that were named.

    If stdout is not a terminal, print one table after the other.
    """
    named = (options.store, options.s3_endpoint, options.tenant, options.cluster)
    if any((*named, options.start, options.end, options.query)):
        if options.pids:
            raise ValueError("top: -p is for this machine; use -q to select from a store")
        if options.python_native:
            raise ValueError(
                "top: --python-native is for this machine: a store keeps no table with the"
                " interpreter's functions (the page shows one, and so does export)"
            )
        return fleet_top.run(options)
    if options.by or options.json or options.group != "function":
        raise ValueError("top: --by, --group and --json need --store or --from")
    is_screen = sys.stdout.isatty()
    with Signals() as signals:
        target = target_of(options.pids)
        config = SamplerConfig(options.frequency, options.hardware, target.pids)
        for note in target.notes:
            tell(f"everflame: {note}")
        with Recorder(config) as recorder:
            recorder.watch(signals)
            recorder.start()
            end = time.monotonic() + options.duration_s
            try:
                sys.stdout.write(_ENTER if is_screen else "")
                going = True
                while going and not target.has_ended() and (now := time.monotonic()) < end:
                    going = _sample(recorder, signals, min(now + options.interval, end))
                    sys.stdout.write(_HOME if is_screen else "")
                    profile = recorder.close_window()
                    drawn = screen(
                        profile, is_screen=is_screen, python_native=options.python_native
                    )
                    print(drawn, flush=True)
            finally:
                sys.stdout.write(_LEAVE if is_screen else "")
                sys.stdout.flush()
    if target.has_ended():
        tell(f"stopped: {target.name} ended")
    return 0


def _sample(recorder: Recorder, signals: Signals, until: float) -> bool:
    """Sample until then; return False if a signal asks to end."""
    next_step = time.monotonic() + recorder.drain_period_s
    while time.monotonic() < until:
        met = signals.wait(min(next_step, until), rest_until_s=recorder.rests_until_s)
        recorder.catch_up()
        if met in ENDING:
            return False
        if time.monotonic() >= next_step:
            recorder.step()
            next_step = time.monotonic() + recorder.drain_period_s
    return True


def screen(profile: Profile, *, is_screen: bool, python_native: bool = False) -> str:
    """Lay out one redraw for the terminal's size."""
    counts = profile.accounting
    # Serial consoles, and terminals without a window, say that they have no lines and no columns.
    columns, lines = shutil.get_terminal_size(_SIZE) if is_screen else _SIZE
    seconds = counts.profiled_ns / 1e9
    cores = profile.total_value / counts.profiled_ns if counts.profiled_ns else 0.0
    head = (
        f"everflame top  {time.strftime('%H:%M:%S')}  last {seconds:.1f} s:"
        f" {cores:.2f} of {counted(counts.cpus, 'core')} used, {counted(counts.stored, 'sample')},"
        f" {sum(counts.lost.values()):,} lost"
    )
    table = terminal.function_table(
        Columns.of(profile),
        width=columns,
        limit=max(1, lines - 5),
        python_native=python_native,
    )
    return f"{head[:columns]}\n\n{table}"
