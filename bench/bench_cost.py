"""What recording costs: CPU, memory and BPF run time, under a load of ten programs or of processes.

One whole-process run of `everflame record -a`, watched from outside: CPU of the process, of all its
children and of those it waited for (from /proc/PID/stat), its memory, and the run time that the
kernel itself measured for the BPF program (kernel.bpf_stats). "Steady" is what is spent after the
first 20 s.

Run as root: `python bench/bench_cost.py [--seconds 60] [--load programs|processes]`.
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
from serving import EVERFLAME, all_pids, pss_mb, rss_mb, show

from bpf import syscalls
from storage.formats import pprof

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
    deadline = time.monotonic() + 30
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--load", choices=LOADS, default="programs")
    options = parser.parse_args()
    seconds = options.seconds
    load, limit = LOADS[options.load]
    with (
        tempfile.TemporaryDirectory() as name,
        load() as programs,
        syscalls.run_time_stats(),
    ):
        output = Path(name) / "profile.pb.gz"
        command = [EVERFLAME, "record", "-a", "--for", f"{seconds}s", "-o", output]
        with subprocess.Popen(command) as process:
            program = find_program(process.pid)
            time.sleep(START_UP_S)
            first = read(all_pids(process.pid), program)
            time.sleep(seconds - START_UP_S - 3)
            last = read(all_pids(process.pid), program)
            pss = sum(map(pss_mb, all_pids(process.pid)))
            rss, peak = rss_mb(process.pid), rss_mb(process.pid, "VmHWM")
            process.wait()
        os.close(program)
        profile = pprof.decode(output.read_bytes())
    span = last.at_s - first.at_s
    own = (last.cpu_s - first.cpu_s) / span
    bpf = (last.bpf_s - first.bpf_s) / span
    counts = profile.accounting
    print(f"load: {', '.join(programs)}; {counts.cpus} CPUs, 99 Hz, {seconds} s")
    rows = [
        ("start-up CPU (first 20 s)", first.cpu_s + first.bpf_s, "s", 2.5),
        ("steady CPU, processes", 100 * own, "% of one CPU", None),
        ("steady CPU, BPF", 100 * bpf, "% of one CPU", None),
        ("steady CPU in all", 100 * (own + bpf), "% of one CPU", limit),
        (
            "BPF run time",
            1e6 * (last.bpf_s - first.bpf_s) / (last.ticks - first.ticks),
            "us a sample",
            None,
        ),
        ("RSS", rss, "MB", 50.0),
        ("peak RSS", peak, "MB", None),
        ("PSS of it and its readers", pss, "MB", 100.0),
        ("lost", sum(counts.lost.values()), "samples", 0),
        ("law 1 mismatch", counts.mismatch, "ticks", 0),
        ("samples stored", counts.stored, "", None),
    ]
    return 1 if show(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
