"""Whether an agent grows: half an hour at 999 Hz while processes come and go.

The agent runs with windows of 10 s into a directory, beside loops that start programs all the time
(xz, sort and g++ of the ten programs, and 100 tiny processes a second). Every 15 s its memory and
its descriptors are read; the slope is that of a straight line through what was read after the first
third. Afterwards the kernel must hold nothing of it: BPF programs and maps are counted before it
starts and after it has ended.

Run as root: `python bench/bench_soak.py [--minutes 30]`.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from load import commands_in, running, spawner
from serving import EVERFLAME, all_pids, pss_mb, rss_mb, show

from bpf import syscalls
from storage.formats import pprof
from storage.profile import Accounting

FREQUENCY_HZ = 999
INTERVAL_S = 10
READ_EVERY_S = 15.0
CHURN = ("xz", "sort", "g++")
SETTLE_S = 30.0


class Reading(NamedTuple):
    at_s: float
    rss_mb: float
    pss_mb: float
    descriptors: int


def read(pid: int) -> Reading:
    descriptors = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    return Reading(time.monotonic(), rss_mb(pid), sum(map(pss_mb, all_pids(pid))), descriptors)


def slope(readings: list[Reading], name: str) -> float:
    """Return the growth per hour, by least squares."""
    hours = np.array([each.at_s for each in readings]) / 3600
    return float(np.polyfit(hours - hours[0], [getattr(each, name) for each in readings], 1)[0])


def held_by_kernel() -> int:
    """Return how many BPF programs and maps there are, of whomever."""
    return len(syscalls.program_ids()) + len(syscalls.map_ids())


def wait_until_gone(before: int) -> int:
    """Return what is left of an agent in the kernel, which frees programs a moment later."""
    deadline_s = time.monotonic() + SETTLE_S
    while held_by_kernel() > before and time.monotonic() < deadline_s:
        time.sleep(0.1)
    return max(0, held_by_kernel() - before)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    seconds = 60 * parser.parse_args().minutes
    before = held_by_kernel()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = {
            **os.environ,
            "EVERFLAME_RUN": str(folder / "run"),
            "EVERFLAME_CACHE": str(folder / "cache"),
        }
        command = [
            *(EVERFLAME, "agent", f"--frequency={FREQUENCY_HZ}", f"--interval={INTERVAL_S}s"),
            *(f"--store={folder / 'store'}", f"--spool={folder / 'spool'}"),
        ]
        programs = commands_in(folder)
        tiny = spawner(folder, 100, round(seconds) + 60)
        with (
            running(programs[CHURN[0]]),
            running(programs[CHURN[1]]),
            running(programs[CHURN[2]]),
            running(tiny),
            subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as agent,
        ):
            readings = []
            try:
                end_s = time.monotonic() + seconds
                while time.monotonic() < end_s:
                    time.sleep(min(READ_EVERY_S, max(0.0, end_s - time.monotonic())))
                    readings.append(read(agent.pid))
            finally:
                agent.terminate()
                agent.wait()
        counts = Accounting()
        for path in (folder / "store").rglob("*.pb.gz"):
            counts = counts.merge(pprof.decode(path.read_bytes()).accounting)
    late = readings[len(readings) // 3 :]
    descriptors = [each.descriptors for each in late]
    rows = [
        ("run", seconds / 60, "minutes", None),
        ("sampler, RSS at the end", readings[-1].rss_mb, "MB", None),
        ("sampler, growth of RSS", slope(late, "rss_mb"), "MB an hour", 1.0),
        ("all processes, growth of PSS", slope(late, "pss_mb"), "MB an hour", None),
        ("descriptors, most less fewest", max(descriptors) - min(descriptors), "", None),
        ("descriptors, growth", slope(late, "descriptors"), "an hour", 1.0),
        ("left in the kernel", wait_until_gone(before), "programs and maps", 0),
        ("ticks", counts.ticks, "", None),
        ("lost", 100 * sum(counts.lost.values()) / counts.ticks, "%", 0.1),
        ("law 1 mismatch", counts.mismatch, "ticks", 0),
    ]
    return 1 if show(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
