"""What recording costs: CPU, memory and BPF run time, under a load of ten programs or of processes.

One whole-process run of `everflame record -a`, watched from outside: CPU of the process, of all its
children and of those it waited for (from /proc/PID/stat), its memory, and the run time that the
kernel itself measured for the BPF program (kernel.bpf_stats). "Steady" is what is spent after the
first 20 s. All is run twice, with a cache folder of its own that is empty at first; figures are
those of the second time where nothing else is said. With `--before TREE` another checkout, which
has a `.venv` of its own, records by turns with this one.

Run as root: `python bench/bench_cost.py [--seconds 60] [--load LOAD] [--before TREE]`.
"""

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from load import ten_programs, thousand_processes
from serving import all_pids, pss_mb, rss_mb, show

from bpf import syscalls
from storage.formats import pprof

ROOT = Path(__file__).resolve().parent.parent
START_UP_S = 20
LOADS = {"programs": (ten_programs, 1.0), "processes": (thousand_processes, 10.0)}
"""Each with the CPU, in per cent of one, that profiling it may take."""
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class Reading(NamedTuple):
    at_s: float
    cpu_s: float
    bpf_s: float
    ticks: int


def cpu_seconds(pids: Iterable[int]) -> float:
    """Return the CPU time of processes and of the children that they have waited for."""
    ticks = 0
    for pid in pids:
        with contextlib.suppress(FileNotFoundError):  # its parent waits for it just now
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:15]))
    return ticks * TICK_S


def read(pids: Iterable[int], program_fd: int) -> Reading:
    info = syscalls.ProgramInfo(program_fd)
    cpu_s = cpu_seconds(pids)
    return Reading(time.monotonic(), cpu_s, info.run_time_ns / 1e9, info.run_count)


def find_program(pid: int) -> int:
    """Return a descriptor of the tick program of process `pid`, when it has loaded it."""
    deadline = time.monotonic() + 120  # compiling takes long beside ten programs
    while time.monotonic() < deadline:
        for path in Path(f"/proc/{pid}/fdinfo").iterdir():
            try:
                text = path.read_text()
            except FileNotFoundError:  # closed since the folder was listed
                continue
            kind = re.search(r"^prog_type:\s+7$", text, re.MULTILINE)
            number = re.search(r"^prog_id:\s+(\d+)$", text, re.MULTILINE)
            if kind and number:
                return syscalls.program_by_id(int(number[1]))
        time.sleep(0.05)
    raise SystemExit("the recording process has loaded no perf_event program")


class Cost(NamedTuple):
    """What one recording took: CPU in seconds and in per cent of one CPU, memory in MB."""

    startup_s: float
    processes: float
    bpf: float
    us_a_sample: float
    rss: float
    peak: float
    pss: float

    @property
    def steady(self) -> float:
        return self.processes + self.bpf


def measure(tree: Path, seconds: int, output: Path, cache: Path) -> Cost:
    """Record this machine for `seconds` with the checkout `tree`, and watch it from outside."""
    command = [tree / ".venv/bin/everflame", "record", "-a", "--for", f"{seconds}s", "-o", output]
    environment = {**os.environ, "EVERFLAME_CACHE": str(cache)}
    with subprocess.Popen(command, env=environment, cwd=tree) as process:
        program = find_program(process.pid)
        time.sleep(START_UP_S)
        first = read(all_pids(process.pid), program)
        time.sleep(seconds - START_UP_S - 3)
        last = read(all_pids(process.pid), program)
        pss = sum(map(pss_mb, all_pids(process.pid)))
        rss, peak = rss_mb(process.pid), rss_mb(process.pid, "VmHWM")
        process.wait()
    os.close(program)
    span = last.at_s - first.at_s
    bpf_s = last.bpf_s - first.bpf_s
    return Cost(
        first.cpu_s + first.bpf_s,
        100 * (last.cpu_s - first.cpu_s) / span,
        100 * bpf_s / span,
        1e6 * bpf_s / (last.ticks - first.ticks),
        rss,
        peak,
        pss,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--load", choices=LOADS, default="programs")
    parser.add_argument("--before", type=Path, metavar="TREE")
    options = parser.parse_args()
    load, limit = LOADS[options.load]
    trees = {"before": options.before.resolve()} if options.before else {}
    costs: dict[str, list[Cost]] = {}
    with tempfile.TemporaryDirectory() as name, load() as programs, syscalls.run_time_stats():
        output = Path(name) / "profile.pb.gz"
        for _ in range(2):  # the first has to build its unwind tables, the second finds them
            for tree, root in (trees | {"now": ROOT}).items():
                cache = Path(name) / tree
                costs.setdefault(tree, []).append(measure(root, options.seconds, output, cache))
        counts = pprof.decode(output.read_bytes()).accounting
    print(f"load: {', '.join(programs)}; {counts.cpus} CPUs, 99 Hz, {options.seconds} s, twice")
    empty, cost = costs["now"]
    rows = [
        ("start-up CPU (first 20 s), nothing cached", empty.startup_s, "s", None),
        ("start-up CPU (first 20 s), tables on disk", cost.startup_s, "s", 2.5),
        ("steady CPU, processes", cost.processes, "% of one CPU", None),
        ("steady CPU, BPF", cost.bpf, "% of one CPU", None),
        ("steady CPU in all", cost.steady, "% of one CPU", limit),
        ("BPF run time", cost.us_a_sample, "us a sample", None),
        ("RSS", cost.rss, "MB", 50.0),
        ("peak RSS", cost.peak, "MB", None),
        ("PSS of it and its readers", cost.pss, "MB", 100.0),
        ("lost", sum(counts.lost.values()), "samples", 0),
        ("law 1 mismatch", counts.mismatch, "ticks", 0),
        ("samples stored", counts.stored, "", None),
    ]
    for before in costs.get("before", [])[1:]:
        rows += [
            ("before: start-up CPU, tables on disk", before.startup_s, "s", None),
            ("before: steady CPU in all", before.steady, "% of one CPU", None),
            ("before: BPF run time", before.us_a_sample, "us a sample", None),
            ("steady CPU, now against before", cost.steady / before.steady, "times", None),
        ]
    return 1 if show(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
