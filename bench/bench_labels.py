"""What labels cost: for a sample of a known process, for a new process, for a scan of a host.

Workload: `--processes` copies of sleep (500), each a service of its own by its name, in no cgroup
of theirs: every one of them needs its own stat, cgroup, exe, cmdline, environ and a version. Then

- warm: a sample of a process that is known
- fresh: the first sample of a process that is not known, with the facts that a reader would read:
  its executable seen before (copies are hard links to one file) and, apart, by a new labeler, which
  has to read the headers of the executable and the ancestors of the process, too
- scan: one in which nothing is new, over all processes of the host
- present: all instances' time in a window

Medians and the 95th percentile. The answers are asserted: each process has its own service name.

Run as root: `python bench/bench_labels.py [--processes 500]`.
"""

import argparse
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from profiler.processes.generations import boottime_ns
from tests.support.labelers import labeler_reading_at_once, labels_of
from tests.support.live import has_execed, sample_of, wait_for


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=500)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        programs = linked(Path(folder), arguments.processes)
        processes = [start(program, stack) for program in programs]
        measure([process.pid for process in processes], programs)


def linked(folder: Path, count: int) -> list[Path]:
    """Return names of one program, each of which is a service."""
    first = folder / "service-0"
    shutil.copy("/bin/sleep", first)
    others = [folder / f"service-{number}" for number in range(1, count)]
    for other in others:
        other.hardlink_to(first)
    return [first, *others]


def start(program: Path, stack: contextlib.ExitStack) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([program, "3600"])
    stack.callback(process.wait)
    stack.callback(process.kill)
    wait_for(lambda: has_execed(process.pid))
    return process


def measure(pids: Sequence[int], programs: Sequence[Path]) -> None:
    samples = [sample_of(pid) for pid in pids]
    labeler = labeler_reading_at_once(own_pid=0)
    labels_of(labeler, sample_of(os.getpid()))  # with whom they share their ancestors

    fresh = [timed(partial(labels_of, labeler, sample)) for sample in samples]
    services = [dict(labels_of(labeler, sample))["service"] for sample in samples]
    assert services == [program.name for program in programs]
    report("fresh process, executable known", fresh[1:])
    unknown = []
    for sample in samples[:50]:
        empty = labeler_reading_at_once(own_pid=0)
        unknown.append(timed(partial(labels_of, empty, sample)))
        empty.close()
    report("fresh process, ancestors and executable new", unknown)
    report("warm samples", [timed(lambda: labeler.note(samples), len(samples))])

    labeler.scan()
    report("scan, nothing new", [timed(labeler.scan) for _ in range(50)])
    now_ns = boottime_ns()
    report("present", [timed(lambda: labeler.present(now_ns, now_ns + 1)) for _ in range(50)])
    assert len(labeler.present(now_ns, now_ns + 1)) >= len(pids)
    first = labeler_reading_at_once(own_pid=0)
    report("first scan", [timed(first.scan)])
    print(f"{len(os.listdir('/proc')):>8} entries in /proc")  # noqa: PTH208


def timed(call: Callable[[], object], times: int = 1) -> float:
    """Return µs, divided by the number of things done."""
    begin_ns = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - begin_ns) / times / 1000


def report(name: str, times_us: Sequence[float]) -> None:
    high_us = statistics.quantiles(times_us, n=20)[-1] if len(times_us) > 1 else times_us[0]
    print(f"{statistics.median(times_us):>10.1f} µs, 95 % below {high_us:>10.1f}  {name}")


if __name__ == "__main__":
    main()
