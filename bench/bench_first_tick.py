"""How many stacks are whole when none is left out by age, and what copying stacks costs.

Shares: each load runs under a recorder at 99 Hz, for some seconds before the window, so that the
tables of its files are there. Every sample of the window counts: the first ticks of each process,
those of processes that exit, and those of whatever else runs. Two loads are native programs that
run for long; the others are nothing but beginnings: programs of 100 ms in a shell loop, `make -j4`
of a small C project, 200 short Python scripts a minute, g++ in a loop. Each load runs with copied
stacks, and without.

Start: the ten programs run already when a recorder starts with an empty cache folder. Each second
from the first tick on counts by itself; the first tick comes when the tables of what runs are
loaded, for as long as that does not take too long. What building tables costs is what the start
takes more than one with the tables on disk.

Cost: 1,000 processes a second, with copied stacks and without, in turns in one run. CPU time of
the recorder, of the readers that it waited for, and of its programs (kernel.bpf_stats).

Run as root: `python bench/bench_first_tick.py [--only shares|start|cost] [--seconds 15]`.
"""

import argparse
import contextlib
import resource
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from load import commands_in, running, spawner, ten_programs

from bpf import syscalls
from bpf.sampler import SamplerConfig
from profiler.agent.recorder import Recorder
from profiler.agent.signals import Signals
from storage.profile import GOOD_STOPS, Profile

SHORT, NATIVE = 99.5, 99.95
START, START_S, WATCHED_S = 99.0, 5.0, 10.0
COST_PERCENT = 5.0
ROUNDS = 3

SPIN = """
#include <time.h>
static volatile unsigned long n;
__attribute__((noinline)) static void spin(void) { while (clock() < 100000) n++; }
int main(void) { spin(); }
"""
PART = """
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
int part{i}(int x) {{ char text[99]; sprintf(text, "%d", x); return strlen(text) + {i}; }}
"""


class WithoutCopies(Recorder):
    copied_bytes_per_s = 0


def record(recorder: Recorder, seconds: float) -> None:
    """Record as `everflame record` does."""
    end_s, next_step_s = time.monotonic() + seconds, time.monotonic() + 1
    with Signals() as signals:
        recorder.watch(signals)
        while time.monotonic() < end_s:
            signals.wait(min(end_s, next_step_s), rest_until_s=recorder.rests_until_s)
            recorder.catch_up()
            if time.monotonic() >= next_step_s:
                recorder.step()
                next_step_s = time.monotonic() + recorder.drain_period_s


def share_of(profile: Profile) -> float:
    counts = profile.accounting
    assert counts.mismatch == 0
    return 100 * sum(counts.stops.get(stop, 0) for stop in GOOD_STOPS) / max(1, counts.stored)


def loads_in(folder: Path) -> dict[str, tuple[float, list[str]]]:
    """Return the loads by name: which share of whole stacks they should have, and a command."""
    import_ = "import json, re, decimal; re.compile('a|b*').findall('abab' * 9999)"
    python = f'while :; do python3 -c "{import_}"; sleep 0.15; done'
    (folder / "spin.c").write_text(SPIN)
    for i in range(60):
        (folder / f"part{i}.c").write_text(PART.format(i=i))
    objects = " ".join(f"part{i}.o" for i in range(60))
    (folder / "Makefile").write_text(f"all: {objects}\nclean:\n\trm -f *.o\n")
    make = f"cd {folder}; while :; do make -s -j4 all; make -s clean; done"
    spin = f"gcc -O2 -o {folder}/spin {folder}/spin.c; while :; do {folder}/spin; done"
    ten = commands_in(folder)
    loads = {
        "programs of 100 ms": (SHORT, ["sh", "-c", spin]),
        "make -j4": (SHORT, ["sh", "-c", make]),
        "Python scripts": (SHORT, ["sh", "-c", python]),
        "g++ in a loop": (SHORT, ten.get("g++", [])),
        "openssl": (NATIVE, ten.get("openssl", [])),
        "xz": (NATIVE, ten.get("xz", [])),
    }
    return {name: load for name, load in loads.items() if load[1]}


def measure_shares(folder: Path, seconds: float) -> int:
    loads = loads_in(folder)
    without = {}
    with recording(WithoutCopies, folder / "cache") as recorder:
        for name, (_, command) in loads.items():
            without[name] = share_of(profile_of(recorder, command, seconds))
    missed = 0
    with recording(Recorder, folder / "cache") as recorder:
        for name, (aim, command) in loads.items():
            profile = profile_of(recorder, command, seconds)
            share, stops = share_of(profile), Counter(profile.accounting.stops)
            bad = [f"{stop} {n}" for stop, n in stops.most_common() if stop not in GOOD_STOPS]
            verdict = "ok" if share >= aim else "MISSED"
            missed += verdict == "MISSED"
            print(
                f"{name:20} {share:6.2f} % of {profile.accounting.stored:5,} whole (at least"
                f" {aim:g}: {verdict}); without copies {without[name]:6.2f} %;"
                f" not whole: {', '.join(bad[:4]) or 'none'}",
                flush=True,
            )
        print(f"copied stacks: {recorder.copied.status()}")
    return missed


def profile_of(recorder: Recorder, command: list[str], seconds: float) -> Profile:
    """Record a load that has run for a while: its files are known then, its processes are new."""
    with running(command):
        record(recorder, 5)
        recorder.close_window()
        record(recorder, seconds)
        return recorder.close_window()


def used_s() -> float:
    """Return the CPU time of this process, and of the children that it waited for."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    theirs = resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + theirs.ru_utime + theirs.ru_stime


def cpu_s(recorder: Recorder) -> float:
    """Return the CPU time of this process, of the readers it waited for, and of its programs."""
    return used_s() + recorder.sampler.run_stats().run_time_ns / 1e9


@contextlib.contextmanager
def recording(kind: type[Recorder], cache: Path) -> Iterator[Recorder]:
    with kind(SamplerConfig(), cache) as recorder:
        recorder.start()
        record(recorder, 5)
        yield recorder


def measure_cost(folder: Path, seconds: float) -> int:
    command = spawner(folder, 1000, 600)
    costs: dict[type[Recorder], list[float]] = {WithoutCopies: [], Recorder: []}
    with running(command), syscalls.run_time_stats():
        for _ in range(ROUNDS):
            for kind, found in costs.items():
                with recording(kind, folder / "cache") as recorder:
                    begun_s, begun = cpu_s(recorder), time.monotonic()
                    record(recorder, seconds)
                    found.append(100 * (cpu_s(recorder) - begun_s) / (time.monotonic() - begun))
                    recorder.stop()
                    share = share_of(recorder.close_window())
                    copied = recorder.copied.status()
            print(f"    {share:.2f} % whole with copies: {copied}", flush=True)
    without, with_ = (statistics.median(found) for found in costs.values())
    spread = max(max(found) - min(found) for found in costs.values())
    verdict = "ok" if with_ - without <= COST_PERCENT else "MISSED"
    print(
        f"1,000 processes a second: {without:.1f} % of one CPU without copies, {with_:.1f} % with"
        f" (spread {spread:.1f}): {with_ - without:+.1f} (at most {COST_PERCENT:g}: {verdict})"
    )
    return int(verdict == "MISSED")


def measure_start(folder: Path, _: float) -> int:
    missed, costs = 0, []
    with ten_programs() as programs, syscalls.run_time_stats():
        print(f"load: {', '.join(programs)}")
        time.sleep(5)
        for cache in ("empty", "warm"):
            usage_s, begun_s = used_s(), time.monotonic()
            late, seconds = [], []
            with Recorder(SamplerConfig(), folder / "cache") as recorder:
                recorder.start()
                first_s = time.monotonic()
                while (since_s := time.monotonic() - first_s) < WATCHED_S:
                    record(recorder, 1.0)
                    share = share_of(recorder.close_window())
                    seconds.append(f"{since_s:.1f} s {share:.1f} %")
                    late += [share] if since_s >= START_S else []
                bpf_s = recorder.sampler.run_stats().run_time_ns / 1e9
            costs.append(used_s() - usage_s + bpf_s)
            least = min(late)
            is_missed = least < START
            missed += is_missed
            print(
                f"{cache} cache: first tick after {first_s - begun_s:.1f} s; whole, by the second's"
                f" start: {', '.join(seconds)}; least from {START_S:g} s on {least:.2f} %"
                f" (at least {START:g}: {'MISSED' if is_missed else 'ok'});"
                f" CPU time of the start and {WATCHED_S:g} s {costs[-1]:.2f} s",
                flush=True,
            )
    print(f"building the tables of what runs: {costs[0] - costs[1]:+.2f} CPU s")
    return missed


PARTS = {"shares": measure_shares, "start": measure_start, "cost": measure_cost}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--seconds", type=float, default=15.0)
    options = parser.parse_args()
    missed = 0
    for name, measure in PARTS.items():
        if not options.only or name in options.only:
            with tempfile.TemporaryDirectory() as folder:
                missed += measure(Path(folder), options.seconds)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
