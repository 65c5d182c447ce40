"""Ticks that the kernel skips, because a BPF program of somebody else is active on that CPU."""

import os
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from bpf import perf_event, syscalls
from bpf.sampler import Sampler, SamplerConfig
from bpf.tracers import find_tracers
from tests.support.targets import running

PERF_TYPE_TRACEPOINT = 2
EXIT = bytes.fromhex("b7000000000000009500000000000000")
PID_OF_CURRENT = bytes.fromhex("850000000e0000007700000020000000")
CALL_KTIME = bytes.fromhex("8500000005000000")
CALLS = 3_000
SYSTEM_CALLS = """
import os
print("there", flush=True)
while True:
    os.getppid()
"""
READ_ID = "mount -t tracefs tracefs /mnt && cat /mnt/events/raw_syscalls/sys_enter/id"


@pytest.fixture
def calling() -> Iterator[subprocess.Popen[bytes]]:
    """A process that does little else than system calls."""
    with running(sys.executable, "-c", SYSTEM_CALLS, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"there\n"
        yield process


def trace_calls(pid: int) -> list[int]:
    """Run a program of 0.1 ms at each system call of a process; return what is to be closed."""
    command = ["unshare", "--mount", "sh", "-c", READ_ID]
    mounted = subprocess.run(command, check=False, stdout=subprocess.PIPE)
    if mounted.returncode:
        pytest.skip("this kernel has no tracefs")
    unless_it = struct.pack("<BBhi", 0x55, 0, CALLS, pid)
    code = PID_OF_CURRENT + unless_it + CALL_KTIME * CALLS + EXIT
    program = syscalls.load_program(code, syscalls.PROG_TYPE_TRACEPOINT)
    attr = perf_event.PerfEventAttr()
    attr.type, attr.config, attr.sample_period = PERF_TYPE_TRACEPOINT, int(mounted.stdout), 1
    attr.disabled = 1
    event = perf_event.open_event(attr, pid=pid)
    perf_event.set_bpf(event, program)
    perf_event.enable(event)
    return [event, program]


def cpu_s(pid: int) -> float:
    """Return the CPU time of a process with one thread, as the scheduler counts it."""
    return int(Path(f"/proc/{pid}/schedstat").read_bytes().split()[0]) / 1e9


@pytest.mark.kernel
@pytest.mark.alone  # the samplers of other tests make the kernel skip ticks, too
def test_skipped_ticks_are_counted_exactly(calling: subprocess.Popen[bytes]) -> None:
    """Those of the process and those that were skipped are as many as its CPU time has."""
    with Sampler(SamplerConfig(frequency_hz=499, pids=frozenset({calling.pid}))) as sampler:
        assert sampler.counts_skipped
        sampler.start()
        opened = trace_calls(calling.pid)
        try:
            earliest_s = cpu_s(calling.pid)
            sampler.drain()
            begun_s = cpu_s(calling.pid)
            while cpu_s(calling.pid) < begun_s + 0.5:
                pass
            ended_s = cpu_s(calling.pid)
            drain = sampler.drain()
            latest_s = cpu_s(calling.pid)
        finally:
            for fd in opened:
                os.close(fd)
        after = [sampler.drain() for _ in range(3)][1:]

    stored = sum(sample.samples for sample in drain.samples)
    skipped = drain.lost["other_tracer"]
    assert skipped > 0.5 * stored
    assert 0.9 * 499 * (ended_s - begun_s) - 5 < stored + skipped
    assert stored + skipped < 1.1 * 499 * (latest_s - earliest_s) + 5
    assert drain.ticks == stored + drain.idle + drain.filtered + sum(drain.lost.values())
    assert all("other_tracer" not in each.lost for each in after)


@pytest.fixture(scope="module")
def loaded() -> Iterator[Sampler]:
    with Sampler(SamplerConfig(frequency_hz=999)) as sampler:
        yield sampler


@pytest.fixture
def sampler(loaded: Sampler) -> Iterator[Sampler]:
    """A sampler of all processes that ticks."""
    loaded.start()
    yield loaded
    loaded.stop()
    loaded.drain()


def spin(seconds: float) -> None:
    begun = os.times().user
    while os.times().user < begun + seconds:
        pass


@pytest.mark.kernel
@pytest.mark.alone
def test_another_profilers_ticks_are_not_ours() -> None:
    """Its timers are of the same kind, and may expire far more often."""
    with (
        Sampler(SamplerConfig(frequency_hz=99)) as sampler,
        Sampler(SamplerConfig(frequency_hz=999)) as other,
    ):
        sampler.start()
        other.start()
        spin(0.5)
        drain = sampler.drain()

    assert sum(drain.lost.values()) < 0.1 * drain.ticks + 3


@pytest.mark.kernel
@pytest.mark.alone
def test_ticks_that_draining_costs_are_no_other_tracers(sampler: Sampler) -> None:
    """The kernel runs no program on a CPU on which maps are read."""
    lost: Counter[str] = Counter()
    until_s = time.monotonic() + 30
    while lost["draining"] < 5 and time.monotonic() < until_s:
        drain = sampler.drain()
        lost.update(drain.lost)
        stored = sum(sample.samples for sample in drain.samples)
        assert drain.ticks == stored + drain.idle + drain.filtered + sum(drain.lost.values())

    assert lost["draining"] > 0
    assert lost["other_tracer"] <= lost["draining"]


@pytest.mark.kernel
def test_programs_of_tracepoints_are_suspects() -> None:
    fd = syscalls.load_program(EXIT, syscalls.PROG_TYPE_TRACEPOINT)
    try:
        number = syscalls.ProgramInfo(fd).id
        found = {each.number: each.kind for each in find_tracers()}
    finally:
        os.close(fd)

    assert found[number] == "tracepoint"


@pytest.mark.kernel
@pytest.mark.alone
def test_timers_of_idle_cpus_are_no_lost_ticks(sampler: Sampler) -> None:
    """The timer of an idle CPU may expire without a tick."""
    time.sleep(1)
    drain = sampler.drain()

    assert sum(drain.lost.values()) < 50
