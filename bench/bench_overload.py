"""What an agent loses, how late it closes windows, and what it takes, beside loads it has to stand.

Each load runs beside an agent of its own, with windows of 5 s into a directory. A window's delay is
from its end to the agent's message that it is closed. Loads:

- overload: 12 busy programs (the ten, and two that spin) and 10 more that spin;
- fabricated: return addresses that a program makes up on its stack, at 499 Hz;
- mappings: a process with 65,000 executable mappings;
- threads: 10,000 threads, each of which renames itself again and again;
- processes: 5,000 processes that are busy now and then;
- execs: 1,000 short processes a second.

Run as root: `python bench/bench_overload.py [--seconds 30] [LOAD...]`.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from load import commands_in, running, spawner
from serving import EVERFLAME, Row, rss_mb, show

from storage.formats import pprof
from storage.profile import Accounting

INTERVAL_S = 5
START_UP_S = 10.0
SOURCES = Path(__file__).parent.parent / "tests" / "targets"
SPIN = ["sh", "-c", "while :; do :; done"]
MAPPINGS = """
import ctypes, os
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
fd = os.open("/proc/self/exe", os.O_RDONLY)
for _ in range(65000):  # of the same page, so that none continues another one
    libc.mmap(None, ctypes.c_size_t(4096), 5, 2, fd, ctypes.c_long(0))
while True:
    pass
"""
THREADS = r"""
#include <pthread.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <unistd.h>
static void *rename_often(void *argument)
{
    char name[16];
    for (unsigned number = 0;; number++) {
        snprintf(name, sizeof(name), "t%ld-%u", (long)argument, number);
        prctl(PR_SET_NAME, name);
        for (volatile int i = 0; i < 100000; i++)
            ;
        usleep(1000000);
    }
}
int main(void)
{
    pthread_attr_t small;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, 65536);
    for (long number = 0; number < 10000; number++) {
        pthread_t thread;
        pthread_create(&thread, &small, rename_often, (void *)number);
    }
    pause();
}
"""
PROCESSES = r"""
#include <unistd.h>
int main(void)
{
    for (int number = 0; number < 4999; number++)
        if (fork() == 0)
            break;
    for (;;) {
        for (volatile int i = 0; i < 200000; i++)
            ;
        usleep(1000000);
    }
}
"""


def compiled(folder: Path, name: str, source: str) -> list[str]:
    command = ["gcc", "-O1", "-pthread", "-x", "c", "-", "-o", folder / name]
    subprocess.run(command, input=source.encode(), check=True)
    return [str(folder / name)]


def overload(folder: Path) -> list[list[str]]:
    programs = list(commands_in(folder).values())
    return [*programs, *[SPIN] * (22 - len(programs))]


def fabricated(folder: Path) -> list[list[str]]:
    return [compiled(folder, "fabricate", (SOURCES / "fabricated_stacks.c").read_text())]


class Load(NamedTuple):
    commands: Callable[[Path], list[list[str]]]
    frequency_hz: int = 99
    most_mb: float | None = None


LOADS = {
    "overload": Load(overload),
    "fabricated": Load(fabricated, 499),
    "mappings": Load(lambda _: [[sys.executable, "-c", MAPPINGS]]),
    "threads": Load(lambda folder: [compiled(folder, "threads", THREADS)]),
    "processes": Load(lambda folder: [compiled(folder, "processes", PROCESSES)]),
    "execs": Load(lambda folder: [spawner(folder, 1000, 600)]),
}


class Agent:
    """An agent that runs, when it closed its windows, and the most memory its sampler took."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.closed_s: list[float] = []
        self.rss_mb: list[float] = []
        self._process = process
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def _read(self) -> None:
        assert self._process.stderr
        for line in self._process.stderr:
            if b"closed a window" in line:
                self.closed_s.append(time.time())

    def watch(self, seconds: float) -> None:
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            self.rss_mb.append(rss_mb(self._process.pid))
            time.sleep(0.5)

    def end(self) -> None:
        self._process.terminate()
        self._process.wait()
        self._reading.join()


@contextlib.contextmanager
def agent(folder: Path, frequency_hz: int) -> Iterator[Agent]:
    environment = {
        **os.environ,
        "EVERFLAME_RUN": str(folder / "run"),
        "EVERFLAME_CACHE": str(folder / "cache"),
    }
    command = [
        *(EVERFLAME, "agent", f"--frequency={frequency_hz}", f"--interval={INTERVAL_S}s"),
        *(f"--store={folder / 'store'}", f"--spool={folder / 'spool'}"),
    ]
    # A session of its own, as a service has: what shares a session shares its part of the CPUs.
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        running_agent = Agent(process)
        try:
            yield running_agent
        finally:
            running_agent.end()


def measure(name: str, seconds: float) -> Iterator[Row]:
    load = LOADS[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        commands = load.commands(folder)
        with agent(folder, load.frequency_hz) as watched:
            watched.watch(START_UP_S)
            before_mb = watched.rss_mb[-1]
            with contextlib.ExitStack() as stack:
                for command in commands:
                    stack.enter_context(running(command))
                watched.watch(seconds)
        objects = (folder / "store").rglob("*.pb.gz")
        profiles = sorted(
            (pprof.decode(path.read_bytes()) for path in objects), key=lambda each: each.window
        )
    counts = Accounting()
    for profile in profiles:
        counts = counts.merge(profile.accounting)
    ends_s = [profile.window.end_ns / 1e9 for profile in profiles]
    late_s = [closed - end for closed, end in zip(watched.closed_s, ends_s, strict=False)]
    complete = sum(counts.stops.get(each, 0) for each in ("root", "kernel_thread"))
    yield f"{name}: ticks, not idle", counts.ticks - counts.idle, "", None
    yield f"{name}: lost", 100 * sum(counts.lost.values()) / counts.ticks, "%", 0.1
    yield f"{name}: mismatch", counts.mismatch, "ticks", 0
    yield f"{name}: longest delay of a window", max(late_s), "s", 2.0
    yield f"{name}: whole stacks", 100 * complete / max(1, counts.stored), "%", None
    yield f"{name}: sampler, most RSS", max(watched.rss_mb), "MB", None
    yield f"{name}: sampler, growth", max(watched.rss_mb) - before_mb, "MB", None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("loads", nargs="*", choices=[*LOADS, []], metavar="LOAD")
    options = parser.parse_args()
    missed = 0
    for name in options.loads or LOADS:
        missed += show(measure(name, options.seconds))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
