"""Real processes that have got as far as a test needs them, and samples of them."""

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from bpf.samples import ProcessGeneration, RawSample
from tests.support.targets import running

TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")

_NO_WORDS = np.zeros(0, dtype=np.uint64)


_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.001, 0.05


def wait_for(
    condition: Callable[[], object], timeout_s: float = 100, what: str = "the condition"
) -> None:
    """Ask again and again, less and less often: others need the CPU meanwhile."""
    deadline, pause_s = time.monotonic() + timeout_s, _FIRST_PAUSE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def stat_fields(pid: int) -> list[bytes]:
    """Return /proc/PID/stat from its third field on."""
    return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()


def cpu_s(pid: int) -> float:
    """Return the CPU time that a process has used (fields 14 and 15, utime and stime)."""
    fields = stat_fields(pid)
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def has_execed(pid: int) -> bool:
    """Return whether arguments and environment of the program are in place (field 51, env_end).

    Popen returns a moment before that: the kernel lets the parent of a vfork go on early.
    """
    return stat_fields(pid)[48] != b"0"


@contextlib.contextmanager
def started(*command: str | Path, **options: object) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program for the length of the block, which begins when it has its arguments."""
    with running(*command, **options) as process:
        wait_for(lambda: has_execed(process.pid))
        yield process


@contextlib.contextmanager
def spinning(*command: str | Path, **options: object) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program for the length of the block, which begins when its start is long over.

    On a busy machine a program may have its arguments for seconds before it reaches its main loop.
    The loader takes some milliseconds of CPU time.
    """
    with running(*command, **options) as process:
        wait_for(lambda: cpu_s(process.pid) >= 0.05)
        yield process


def start_ns_of(pid: int) -> int:
    """Return a start that a sample of this process may have: /proc knows it to 10 ms."""
    return int(stat_fields(pid)[19]) * TICK_NS + 1_234_567


def generation_of(pid: int) -> ProcessGeneration:
    """Return the generation that `sample_of` would be of."""
    return ProcessGeneration(pid, start_ns_of(pid), 1)


def sample_of(pid: int, **changes: object) -> RawSample:
    """Return a sample as the kernel would have taken it now."""
    now_ns = time.monotonic_ns()
    comm = changes.pop("comm", None) or Path(f"/proc/{pid}/comm").read_bytes().rstrip(b"\n")
    sample = RawSample(
        pid=pid,
        tid=pid,
        start_ns=changes.pop("start_ns", None) or start_ns_of(pid),
        exec_id=1,
        cgroup_id=1,
        comm=comm,
        leader_comm=comm,
        first_ns=now_ns,
        last_ns=now_ns,
        samples=1,
        stop="root",
        user=_NO_WORDS,
        kernel=_NO_WORDS,
    )
    return sample._replace(**changes)
