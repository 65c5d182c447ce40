"""What it costs to know every process's mappings while about 1,000 of them start every second.

Workload: a C program runs a tiny other one by posix_spawn and waits for it, at a fixed rate, for
`--seconds`. The rings are read once a second, and when one is half full. Once a second 198 of the
processes that ended in it (as many as 2 CPUs at 99 Hz can sample) are asked for their mappings,
and what is old expires: what the profiler does, without the samples. CPU is that of this thread
in per cent of one CPU. The answer is asserted: a mapping of the tiny program must be in at least
99 % of the tables.

Run as root: `python bench/bench_processes.py [--rate 1000] [--seconds 10]`.
"""

import argparse
import os
import resource
import select
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from load import spawner

from bpf.records import PERF_RECORD_COMM, PERF_RECORD_EXIT, Batch, Rings, decode_comm
from profiler.processes.address_spaces import AddressSpaces

SAMPLED = 198


class NotingRings(Rings):
    """Rings that also remember which of the tiny programs ended since they were last asked."""

    def __init__(self) -> None:
        super().__init__()
        self.exits: list[tuple[int, int]] = []
        self._running: set[int] = set()
        self.noting_ns = 0

    def read(self) -> Batch:
        batch = super().read()
        begin_ns = time.thread_time_ns()
        for record in batch.records:
            if record.type == PERF_RECORD_COMM and decode_comm(record).comm == b"tiny":
                self._running.add(record.pid)
            elif record.type == PERF_RECORD_EXIT and record.pid in self._running:
                self._running.remove(record.pid)
                self.exits.append((record.pid, record.time_ns))
        self.noting_ns += time.thread_time_ns() - begin_ns
        return batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", type=int, default=1000)
    parser.add_argument("--seconds", type=int, default=10)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = spawner(Path(folder), arguments.rate, arguments.seconds)
        measure(command, os.fsencode(command[1]))


def poll_for_a_second(spaces: AddressSpaces, rings: NotingRings) -> int:
    """Poll after a second, and earlier when a ring is half full; return the CPU time in ns."""
    cpu_ns, end_s, is_over = 0, time.monotonic() + 1, False
    while not is_over:
        readable, _, _ = select.select([rings], [], [], max(0, end_s - time.monotonic()))
        is_over = not readable
        noted_ns, begin_ns = rings.noting_ns, time.thread_time_ns()
        spaces.poll()
        cpu_ns += time.thread_time_ns() - begin_ns - (rings.noting_ns - noted_ns)
    return cpu_ns


def measure(command: list[str], tiny: bytes) -> None:
    rings = NotingRings()
    spaces = AddressSpaces(rings)
    poll_ns, table_ns, expire_ns, tables_us = 0, 0, 0, []
    asked, found, ended = 0, 0, 0
    wall_ns = time.monotonic_ns()
    with subprocess.Popen(command) as running:
        while running.poll() is None:
            poll_ns += poll_for_a_second(spaces, rings)
            exits, rings.exits = rings.exits, []
            ended += len(exits)
            for pid, exit_ns in exits[:: max(1, len(exits) // SAMPLED)][:SAMPLED]:
                begin_ns = time.thread_time_ns()
                table = spaces.mappings(pid, exit_ns)
                tables_us.append((time.thread_time_ns() - begin_ns) / 1000)
                asked += 1
                found += any(mapping.path == tiny for mapping in table.mappings)
            table_ns = int(sum(tables_us) * 1000)
            begin_ns = time.thread_time_ns()
            spaces.expire(time.monotonic_ns())
            expire_ns += time.thread_time_ns() - begin_ns
            rings.refresh()
    wall_ns = time.monotonic_ns() - wall_ns
    rings.close()
    total_ns = poll_ns + table_ns + expire_ns
    print(f"processes {ended}, {ended * 1e9 / wall_ns:.0f} a second; records {rings.records}")
    print(f"lost {rings.lost}, gaps {spaces.gaps}, snapshots {spaces.snapshots}")
    print(
        f"poll {poll_ns / 1000 / ended:.1f} us, expire {expire_ns / 1000 / ended:.1f} us a process"
    )
    spread = statistics.quantiles(tables_us, n=20)
    print(f"mappings median {spread[9]:.0f} us, 95th percentile {spread[18]:.0f} us")
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"CPU {total_ns / wall_ns:.2%} of one, peak memory {peak_mb} MB")
    print(f"own executable in {found} of {asked} tables")
    assert found >= 0.99 * asked, "processes went unnamed"


if __name__ == "__main__":
    main()
