"""Ticks whose stacks cannot be walked yet: what is copied of them, and how much."""

import bisect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bpf import sampler as sampler_module
from bpf.sampler import Sampler, SamplerConfig
from bpf.samples import CopiedStack, Drain, RawSample, StopReason
from tests.support.live import wait_for
from tests.support.targets import compile_target, running

pytestmark = pytest.mark.kernel

PAGE = 4096
SOURCE = """
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
volatile long n;
__attribute__((noinline)) void spin(void) { for (;;) n++; }
__attribute__((noinline)) void down(int depth)
{
    if (depth) down(depth - 1); else spin();
    n++;
}
__attribute__((noinline)) void hole(void)
{
    volatile char buffer[9 * 4096];
    buffer[0] = 1;
    spin();
    n += buffer[0];
}
static void *thread(void *depth) { if (depth) down((long)depth); else hole(); return 0; }
int main(int count, char **values)
{
    long depth = atoi(values[2]);
    pthread_t started;
    if (!strcmp(values[1], "thread")) {
        pthread_create(&started, 0, thread, (void *)depth);
        pthread_join(started, 0);
    } else if (!strcmp(values[1], "hole")) {
        hole();
    } else {
        down(depth);
    }
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("targets")
    (folder / "stacks.c").write_text(SOURCE)
    return compile_target(str(folder / "stacks.c"), folder / "stacks", "-O1", "-pthread")


@pytest.fixture(scope="module")
def loaded() -> Iterator[Sampler]:
    config = SamplerConfig(frequency_hz=199, pids=frozenset(), copied_bytes_per_s=64 << 20)
    with Sampler(config) as sampler:
        sampler.start()
        yield sampler


@pytest.fixture(scope="module")
def loaded_for_all() -> Iterator[Sampler]:
    with Sampler(SamplerConfig(frequency_hz=999, copied_bytes_per_s=16 << 20)) as sampler:
        yield sampler


@pytest.fixture
def sampler_of_all(loaded_for_all: Sampler) -> Iterator[Sampler]:
    """A sampler that copies the stacks of all processes, and ticks."""
    loaded_for_all.start()
    yield loaded_for_all
    loaded_for_all.stop()
    loaded_for_all.drain()


def mismatch(drain: Drain) -> int:
    ended = sum(sample.samples for sample in drain.samples) + len(drain.copies)
    return drain.ticks - ended - drain.idle - drain.filtered - sum(drain.lost.values())


def copy_of(sampler: Sampler, pid: int, tid: int) -> tuple[CopiedStack, CopiedStack]:
    """Return two copies of a thread that spins below all the calls that it makes."""
    sampler.select([pid])
    found: list[CopiedStack] = []

    def are_alike() -> bool:
        drain = sampler.drain()
        assert mismatch(drain) == 0
        of_thread = (copy for copy in drain.copies if copy.walked.tid == tid)
        found.extend(copy for copy in of_thread if not len(copy.walked.kernel))
        return len(found) > 1 and found[-1].start == found[-2].start

    wait_for(are_alike)
    return found[-2], found[-1]


def memory_of(pid: int, copy: CopiedStack) -> np.ndarray:
    with Path(f"/proc/{pid}/mem").open("rb", 0) as memory:
        memory.seek(copy.start)
        return np.frombuffer(memory.read(copy.memory.nbytes), np.uint64)


def test_a_copy_is_what_the_process_has_in_its_registers_and_its_stack(program, loaded):
    """From the red zone below the stack pointer up to where the main thread's stack began."""
    with running(program, "down", "100") as process:
        first, copy = copy_of(loaded, process.pid, process.pid)
        memory = memory_of(process.pid, copy)
        maps = Path(f"/proc/{process.pid}/maps").read_text().splitlines()

    code = next(line for line in maps if " r-xp " in line and line.endswith("/stacks"))
    stack = next(line for line in maps if line.endswith("[stack]"))
    low, high = (int(address, 16) for address in code.split()[0].split("-"))
    end = int(stack.split()[0].split("-")[1], 16)
    assert low <= copy.pc < high
    assert not copy.is_return_address
    assert copy.start == (int(copy.registers[7]) - 128) & ~7
    assert 100 * 16 < copy.memory.nbytes < end - copy.start
    assert copy.memory[-1] == 3  # argc
    assert copy.memory.tolist() == memory.tolist()
    assert (copy.unreadable, copy.is_cut) == (0, False)
    assert (copy.walked.pid, copy.walked.tid, copy.walked.samples) == (process.pid, process.pid, 1)
    assert copy.walked.stop == StopReason.NO_PROCESS_YET.label
    assert int(copy.walked.user[0]) == copy.pc
    assert first.walked.first_ns < copy.walked.first_ns == copy.walked.last_ns


def only_other_thread(pid: int) -> int:
    tasks = Path(f"/proc/{pid}/task")
    wait_for(lambda: len(list(tasks.iterdir())) == 2)
    return max(int(path.name) for path in tasks.iterdir())


def test_a_thread_s_stack_is_read_as_far_as_it_goes(program, loaded):
    """Its thread-local memory lies above it."""
    with running(program, "thread", "100") as process:
        _, copy = copy_of(loaded, process.pid, only_other_thread(process.pid))
        memory = memory_of(process.pid, copy)

    assert 100 * 16 <= copy.memory.nbytes < 100 * 16 + 2 * PAGE
    assert copy.memory.tolist() == memory.tolist()
    assert (copy.unreadable, copy.is_cut) == (0, False)


def test_a_stack_deeper_than_there_is_room_for_is_cut(program, loaded):
    with running(program, "down", "20000") as process:
        _, copy = copy_of(loaded, process.pid, process.pid)
        memory = memory_of(process.pid, copy)

    assert copy.is_cut
    assert 15 * PAGE <= copy.memory.nbytes <= 16 * PAGE
    assert copy.memory.tolist() == memory.tolist()


@pytest.mark.parametrize("thread", ["main", "other"])
def test_pages_that_were_never_touched_leave_no_gap_in_a_stack(thread, program, loaded):
    """They cannot be read at a tick; the frames above them lie where they lay."""
    with running(program, "hole" if thread == "main" else "thread", "0") as process:
        tid = process.pid if thread == "main" else only_other_thread(process.pid)
        _, copy = copy_of(loaded, process.pid, tid)
        memory = memory_of(process.pid, copy)

    pages = (np.arange(len(memory)) * 8 + copy.start % PAGE) // PAGE
    is_read = (copy.unreadable >> pages) & 1 == 0
    assert 3 <= copy.unreadable.bit_count() <= 9
    assert not copy.is_cut
    assert thread == "other" or copy.memory[-1] == 3
    assert is_read[-1]
    assert copy.memory[is_read].tolist() == memory[is_read].tolist()


def test_beyond_the_budget_a_tick_is_counted_as_it_was_walked(program):
    """A thousand bytes a second are less than one stack; no tick is lost or counted twice."""
    config = SamplerConfig(frequency_hz=999, copied_bytes_per_s=1000)
    with Sampler(config) as sampler, running(program, "down", "300"):
        sampler.start()
        drains = []
        for _ in range(20):
            subprocess.run([sys.executable, "-c", ""], check=True)
            drains.append(sampler.drain())
        sampler.stop()
        drains.append(sampler.drain())

    walked = sum(s.samples for drain in drains for s in drain.samples if s.stop == "no_process_yet")
    assert [mismatch(drain) for drain in drains] == [0] * len(drains)
    assert sum(drain.uncopied for drain in drains) >= walked > 100
    assert 0 < sum(len(drain.copies) for drain in drains) < 0.2 * walked


def test_every_tick_is_stored_or_copied_while_many_processes_come_and_go(program, sampler_of_all):
    """Law 1 with copies, also of those that are written while the ring is read."""
    loop = ["sh", "-c", "while :; do /bin/true; done"]
    with running(*loop), running(program, "down", "2000"):
        drains = []

        def are_enough() -> bool:
            drains.append(sampler_of_all.drain())
            return sum(len(drain.copies) for drain in drains) > 500

        wait_for(are_enough)
        sampler_of_all.stop()
        drains.append(sampler_of_all.drain())

    copies = [copy for drain in drains for copy in drain.copies]
    moments = [(copy.walked.tid, copy.walked.first_ns) for copy in copies]
    assert [mismatch(drain) for drain in drains] == [0] * len(drains)
    assert len(set(moments)) == len(copies)


def test_a_drain_that_fails_loses_its_copies_and_no_later_ones(loaded, monkeypatch):
    """Their kernel stacks go with it. What it has taken is counted as lost: `fault`."""
    read_samples = sampler_module.read_samples

    def fail(*_: object) -> list[RawSample]:
        monkeypatch.setattr(sampler_module, "read_samples", read_samples)
        raise MemoryError

    with running("dd", "if=/dev/zero", "of=/dev/null", "bs=64k") as process:
        loaded.select([process.pid])
        wait_for(lambda: loaded.collect() > 0)
        monkeypatch.setattr(sampler_module, "read_samples", fail)
        with pytest.raises(MemoryError):
            loaded.drain()

        drains = [loaded.drain() for _ in range(2)]

    assert [mismatch(drain) for drain in drains] == [0, 0]
    assert sum(drain.lost.get("fault", 0) for drain in drains) > 0


def test_a_program_that_has_ended_or_is_being_loaded_has_no_user_stack(sampler_of_all):
    """Its memory is gone: what the kernel does there is all there is, and nothing is copied."""
    loop = ["sh", "-c", "while :; do /bin/true; done"]
    found, copied = [], []
    with running(*loop):

        def are_seen() -> bool:
            drain = sampler_of_all.drain()
            assert mismatch(drain) == 0
            copied.extend(drain.copies)
            ended = StopReason.NO_PROGRAM.label
            found.extend(sample for sample in drain.samples if sample.stop == ended)
            return len(found) > 50

        wait_for(are_seen)

    assert b"true" in {sample.comm for sample in found}
    assert {len(sample.user) for sample in found} == {0}
    assert min(len(sample.kernel) for sample in found) > 0
    assert StopReason.NO_PROGRAM.label not in {copy.walked.stop for copy in copied}
    loading = range(*extent_in_kernel("load_elf_binary"))
    loads = [any(at in loading for at in copy.walked.kernel.tolist()) for copy in copied]
    assert sum(loads) < len(found) / 3  # before the old program goes, and after its end


def test_a_program_that_has_not_begun_is_at_its_first_instruction(sampler_of_all):
    """The kernel returns there from execve, but no call precedes it."""
    entry = int.from_bytes(Path("/lib64/ld-linux-x86-64.so.2").read_bytes()[24:32], "little")
    begun: list[CopiedStack] = []
    with running("sh", "-c", "while :; do /bin/true; done"):

        def are_seen() -> bool:
            copies = sampler_of_all.drain().copies
            begun.extend(
                copy
                for copy in copies
                if len(copy.walked.kernel) and (copy.pc - entry) % PAGE == 0
                if copy.walked.comm == b"true"
            )
            return len(begun) > 3

        wait_for(are_seen)

    assert not any(copy.is_return_address for copy in begun)


def extent_in_kernel(name: str) -> tuple[int, int]:
    lines = Path("/proc/kallsyms").read_text().splitlines()
    addresses = sorted({int(line.split()[0], 16) for line in lines})
    start = next(int(line.split()[0], 16) for line in lines if line.split()[2] == name)
    return start, addresses[bisect.bisect_right(addresses, start)]
