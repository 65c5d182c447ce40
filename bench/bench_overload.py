"""What an agent loses, how late it closes windows, and what it takes, beside loads it has to stand.

Each load runs beside an agent of its own, with windows of 5 s into a directory, and beside an
honest program that calls functions in a known way. Loads:

- nothing: what the figures are without a load;
- overload: 12 busy programs (the ten, and two that spin) and 10 more that spin;
- fabricated: return addresses that a program makes up on its stack, at 499 Hz;
- mappings: a process that makes 65,000 executable mappings, ends, and begins anew;
- threads: 10,000 threads, each of which renames itself again and again;
- processes: 5,000 processes that are busy now and then;
- execs: 1,000 short processes a second;
- fuse: a busy program, its working directory and another program that is started again and again,
  on a file system that stops answering;
- files: the hostile files of tests/support/hostile_files.py, executed one after the other.

A window's delay is from its end to the agent's message that it is closed; that of the last one is
part of "end", from SIGTERM to the agent's exit while the load goes on. A turn is what the sampler
does before it waits again, without closing a window; "closing" is that. Growth is of the sampler's
memory since before the load. Of the honest program: the share of whole stacks, and of samples with
a stack that it cannot have, by its source and by its root before the load began.

With `--before TREE` each load runs beside the agent of another checkout as well, which has a
`.venv` of its own, and the table shows both.

Run as root: `python bench/bench_overload.py [--seconds 30] [--before TREE] [LOAD...]`.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from load import commands_in, running, spawner
from serving import rss_mb

from storage.formats import pprof
from storage.profile import GOOD_STOPS, Accounting, Profile

INTERVAL_S = 5
QUIET_S = 2 * INTERVAL_S + 1.0
"""Before a load begins: two windows, which show what the honest program does."""
START_S, END_S = 180.0, 30.0
KILLED_S = 5.0
"""One that a file system holds in the kernel ends only with that, which is unmounted later."""
ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "tests" / "targets"
SUPPORT = ROOT / "tests" / "support"
SPIN = ["sh", "-c", "while :; do :; done"]
HONEST = r"""
#define LEVEL(name, next) __attribute__((noinline)) long name(long n) \
    { for (volatile long i = 0; i < n; i++) ; return next(n) + 1; }
static __attribute__((noinline)) long leaf(long n)
    { for (volatile long i = 0; i < n; i++) ; return n; }
LEVEL(five, leaf) LEVEL(four, five) LEVEL(three, four) LEVEL(two, three) LEVEL(one, two)
int main(void) { long n = 0; for (;;) n += one(200000) - n; }
"""
HONEST_CHAIN = ("main", "one", "two", "three", "four", "five", "leaf")
MAPPINGS = r"""
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
int main(void)
{
    for (;;) {
        if (fork() == 0) {
            int fd = open("/proc/self/exe", O_RDONLY);
            for (int i = 0; i < 65000; i++) /* of one page, so that none continues another one */
                mmap(0, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE, fd, 0);
            for (volatile long i = 0; i < 2000000000; i++) ;
            _exit(0);
        }
        wait(0);
    }
}
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
EXECUTE = r"""
/* execute FILE...: each for 0.1 s, by exec or, where the kernel refuses, by a jump into it. */
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
int main(int argc, char **argv)
{
    for (;;)
        for (int i = 1; i < argc; i++) {
            pid_t pid = fork();
            if (pid == 0) {
                execl(argv[i], argv[i], (char *)0);
                int fd = open(argv[i], O_RDONLY);
                void *code = mmap(0, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE, fd, 4096);
                if (code != MAP_FAILED)
                    ((void (*)(void))code)();
                _exit(1);
            }
            usleep(100000);
            kill(pid, SIGKILL);
            waitpid(pid, 0, 0);
        }
}
"""
JUMP_TO_ITSELF, CODE_AT, CODE_ADDRESS, ENTRY_AT = b"\xeb\xfe", 0x1000, 0x401000, 24


def compiled(folder: Path, name: str, source: str) -> list[str]:
    command = ["gcc", "-O1", "-pthread", "-x", "c", "-", "-o", folder / name]
    subprocess.run(command, input=source.encode(), check=True)
    return [str(folder / name)]


Commands = contextlib.AbstractContextManager[list[list[str]]]


@contextlib.contextmanager
def overload(folder: Path) -> Iterator[list[list[str]]]:
    programs = list(commands_in(folder).values())
    yield [*programs, *[SPIN] * (22 - len(programs))]


def program(name: str, source: str) -> Callable[[Path], Commands]:
    @contextlib.contextmanager
    def prepare(folder: Path) -> Iterator[list[list[str]]]:
        yield [compiled(folder, name, source)]

    return prepare


@contextlib.contextmanager
def nothing(_folder: Path) -> Iterator[list[list[str]]]:
    yield []


@contextlib.contextmanager
def execs(folder: Path) -> Iterator[list[list[str]]]:
    yield [spawner(folder, 1000, 600)]


@contextlib.contextmanager
def fuse(folder: Path) -> Iterator[list[list[str]]]:
    mount, flag = folder / "mount", folder / "hang"
    mount.mkdir()
    busy = compiled(folder, "busy", "int main(void) { for (volatile long i = 0;; i++) ; }")[0]
    server = subprocess.Popen(
        [sys.executable, SUPPORT / "hanging_fuse.py", mount, busy, flag], stdout=subprocess.PIPE
    )
    try:
        assert server.stdout
        assert server.stdout.readline() == b"mounted\n"
        hung = (
            f"{mount}/file & cd {mount}; sleep 1; touch {flag};"
            f" while :; do {folder}/busy & sleep 0.2; kill $!; done"
        )
        yield [["sh", "-c", hung]]
    finally:
        server.kill()
        server.wait()
        subprocess.run(["umount", "--lazy", mount], check=False)


@contextlib.contextmanager
def files(folder: Path) -> Iterator[list[list[str]]]:
    sys.path.insert(0, str(ROOT))
    from tests.support.hostile_files import KINDS, write_kind  # noqa: PLC0415 - needs all of numpy

    paths = []
    for number, kind in enumerate(KINDS):
        path = folder / f"hostile{number}"
        write_kind(kind, path)
        if path.stat().st_size > CODE_AT:
            with path.open("r+b") as file:
                file.seek(CODE_AT)
                file.write(JUMP_TO_ITSELF)
                file.seek(ENTRY_AT)
                file.write(CODE_ADDRESS.to_bytes(8, "little"))
        path.chmod(0o755)
        paths.append(str(path))
    yield [[*compiled(folder, "execute", EXECUTE), *paths]]


class Load(NamedTuple):
    prepare: Callable[[Path], Commands]
    frequency_hz: int = 99


LOADS = {
    "nothing": Load(nothing),
    "overload": Load(overload),
    "fabricated": Load(program("fabricate", (SOURCES / "fabricated_stacks.c").read_text()), 499),
    "mappings": Load(program("mappings", MAPPINGS)),
    "threads": Load(program("threads", THREADS)),
    "processes": Load(program("processes", PROCESSES)),
    "execs": Load(execs),
    "fuse": Load(fuse),
    "files": Load(files),
}


class Turn(NamedTuple):
    ended_s: float
    wall_s: float
    cpu_s: float
    name: str


class Agent:
    """An agent that runs, when it closed its windows, and the most memory its sampler took."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.closed_s: list[float] = []
        self.rss_mb: list[float] = []
        self.end_s = END_S
        self.said: list[str] = []
        self._process = process
        self._samples = threading.Event()
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()
        if not self._samples.wait(START_S):
            process.kill()
            sys.exit(f"the agent did not start: {self.said}")

    def _read(self) -> None:
        assert self._process.stderr
        for line in self._process.stderr:
            if b"closed a window" in line:
                self.closed_s.append(time.time())
            elif b"sampling at" in line:
                self._samples.set()
            else:
                self.said.append(line.decode(errors="replace").strip())

    def watch(self, seconds: float) -> None:
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s and self._process.poll() is None:
            self.rss_mb.append(rss_mb(self._process.pid))
            time.sleep(0.2)

    def end(self) -> None:
        begun_s = time.monotonic()
        self._process.terminate()
        try:
            self._process.wait(END_S)
            self.end_s = time.monotonic() - begun_s
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._reading.join(5.0)


@contextlib.contextmanager
def agent(folder: Path, tree: Path, frequency_hz: int) -> Iterator[Agent]:
    environment = {
        **os.environ,
        "EVERFLAME_RUN": str(folder / "run"),
        "EVERFLAME_CACHE": str(folder / "cache"),
    }
    command = [
        *(tree / ".venv" / "bin" / "python", "-P", ROOT / "bench" / "watched_agent.py"),
        *(tree, folder / "turns", f"--frequency={frequency_hz}", f"--interval={INTERVAL_S}s"),
        *(f"--store={folder / 'store'}", f"--spool={folder / 'spool'}"),
    ]
    # A session of its own, as a service has: what shares a session shares its part of the CPUs.
    process = subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        yield Agent(process)
    finally:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(KILLED_S)


Stacks = Counter[tuple[str, ...]]


def honest_stacks(profile: Profile) -> tuple[Stacks, int]:
    """Return the honest program's stacks in user mode, and how many of them are whole."""
    stacks: Stacks = Counter()
    whole = 0
    for row in range(len(profile.row_stacks)):
        labels = dict(profile.label_sets[profile.row_labels[row]])
        if labels.get("comm") != "honest":
            continue
        begin, end = profile.stack_offsets[profile.row_stacks[row] :][:2]
        frames = [
            frame
            for location in profile.stack_locations[begin:end].tolist()
            for frame in reversed(profile.frames(location))
            if frame.kind != "kernel"
        ]
        samples = int(profile.row_samples[row])
        stacks[tuple(frame.function for frame in frames)] += samples
        whole += samples * bool(frames and frames[0].function == "_start")
    return stacks, whole


Figures = dict[str, tuple[float, float | None]]
"""A value by its column, and the most that it may be."""


def measure(name: str, seconds: float, tree: Path) -> Figures:
    load = LOADS[name]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        commands = stack.enter_context(load.prepare(folder))
        stack.enter_context(running(compiled(folder, "honest", HONEST)))
        watched = stack.enter_context(agent(folder, tree, load.frequency_hz))
        watched.watch(QUIET_S)
        before_mb, begun_s, begun_ns = watched.rss_mb[-1], time.monotonic(), time.time_ns()
        for command in commands:
            stack.enter_context(running(command))
        watched.watch(seconds)
        loaded_s = time.monotonic()
        watched.end()
        objects = [*(folder / "store").rglob("*.pb.gz"), *(folder / "spool").rglob("*.pb.gz")]
        profiles = sorted(
            (pprof.decode(path.read_bytes()) for path in objects), key=lambda each: each.window
        )
        turns = [
            Turn(float(ended_s), float(wall_s), float(cpu_s), turn)
            for ended_s, wall_s, cpu_s, turn in map(
                str.split, (folder / "turns").read_text().splitlines()
            )
        ]
    if shown := [line for line in watched.said if "Traceback" in line or "Error" in line]:
        print(f"{name}: {shown[:5]}", file=sys.stderr)
    turns = [turn for turn in turns if begun_s < turn.ended_s < loaded_s]
    return figures(profiles, begun_ns, watched, turns) | {
        "growth MB": (max(watched.rss_mb) - before_mb, 10.0),
        "end s": (watched.end_s, 2.0),
    }


def figures(profiles: list[Profile], begun_ns: int, watched: Agent, turns: list[Turn]) -> Figures:
    counts = Accounting()
    before: Stacks = Counter()
    stacks: Stacks = Counter()
    whole = 0
    for profile in profiles:
        found, found_whole = honest_stacks(profile)
        if profile.window.end_ns <= begun_ns:
            before += found
            continue
        counts = counts.merge(profile.accounting)
        stacks += found
        whole += found_whole
    ends_s = [profile.window.end_ns / 1e9 for profile in profiles[:-1]]
    late_s = [closed - end for closed, end in zip(watched.closed_s, ends_s, strict=False)]
    complete = sum(counts.stops.get(each, 0) for each in GOOD_STOPS)
    deepest = max(before, key=len, default=())
    chain = (*deepest[: deepest.index("main") if "main" in deepest else 0], *HONEST_CHAIN)
    strange = sum(n for stack, n in stacks.items() if stack != chain[: len(stack)])
    honest = max(1, stacks.total())
    turn = [each for each in turns if each.name != "cut_window"]
    closing = [each for each in turns if each.name == "cut_window"]
    return {
        "ticks": (counts.ticks - counts.idle, None),
        "lost %": (100 * sum(counts.lost.values()) / max(1, counts.ticks), 0.1),
        "mismatch": (counts.mismatch, 0),
        "delay s": (max(late_s, default=0.0), 2.0),
        "turn s": (max((each.wall_s for each in turn), default=0.0), None),
        "turn CPU s": (max((each.cpu_s for each in turn), default=0.0), 0.1),
        "closing CPU s": (max((each.cpu_s for each in closing), default=0.0), None),
        "whole %": (100 * complete / max(1, counts.stored), None),
        "honest": (stacks.total(), None),
        "its whole %": (100 * whole / honest, None),
        "its wrong %": (100 * strange / honest, 1.0),
    }


def show(name: str, tree: str, found: Figures) -> int:
    missed = [
        column for column, (value, most) in found.items() if most is not None and value > most
    ]
    cells = (f"{column} {value:.6g}" for column, (value, _) in found.items())
    print(f"{name:10} {tree:6} {'  '.join(cells)}", flush=True)
    if missed:
        print(f"{'':17} MISSED: {', '.join(missed)}", flush=True)
    return len(missed)


def table(rows: list[tuple[str, str, Figures]]) -> None:
    """Print one row a load and tree, with the columns' names and aims at the top."""
    columns = list(rows[0][2])
    print(f"\n{'':18}" + "".join(f"{column:>15}" for column in columns))
    aims = (most for _, most in rows[0][2].values())
    print(f"{'at most':18}" + "".join(f"{'' if a is None else f'{a:g}':>15}" for a in aims))
    for name, tree, found in rows:
        values = (value for value, _ in found.values())
        print(f"{name:11}{tree:7}" + "".join(f"{value:15,.6g}" for value in values))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--before", type=Path, metavar="TREE")
    parser.add_argument("loads", nargs="*", choices=[*LOADS, []], metavar="LOAD")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that loads and mounts go
    trees = {"now": ROOT} | ({"before": options.before.resolve()} if options.before else {})
    missed, rows = 0, []
    for name in options.loads or LOADS:
        for tree, folder in trees.items():
            found = measure(name, options.seconds, folder)
            missed += show(name, tree, found) if tree == "now" else 0
            rows.append((name, tree, found))
    table(rows)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
