"""Sampler: the perf events of all CPUs, the BPF program on them, and the draining of its maps.

Typical use: `with Sampler(SamplerConfig()) as sampler: sampler.start(); …; sampler.drain()` once a
second. All of it happens in the caller's thread; nothing here starts one.
"""

import contextlib
import errno
import json
import math
import mmap
import os
import struct
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from bpf import interpreters, perf_event, syscalls, tables
from bpf.compile import MAX_WALK_PROGRAMS
from bpf.constants import kernel_constants
from bpf.decoding import GENERATION_AT, KernelStacks, read_copy, read_samples
from bpf.errors import PerfEventError, SyscallError
from bpf.interpreters import CodeContent, Interpreters, KnownPrograms, read_code
from bpf.load import ask_child
from bpf.ring import RingBuffer
from bpf.samples import (
    COUNT,
    COUNT_KEY,
    KERNEL_STACK,
    LONG_STACK,
    MAX_KERNEL_WORDS,
    MAX_NATIVE_WORDS,
    USER_STACK,
    CopiedStack,
    Counter,
    Drain,
    RawSample,
)

MAX_FREQUENCY_HZ = 999
_SELECTED_CAPACITY = 32768
_MAP_GENERATIONS = (0, 1)
_MAPS_BYTES = 16 << 20
"""What the maps of stacks may take in the kernel for drains that come late."""
_ENTRY_BYTES = 2 * (
    COUNT_KEY.itemsize
    + COUNT.itemsize
    + LONG_STACK.itemsize // 2
    + USER_STACK.itemsize // 4
    + KERNEL_STACK.itemsize
)
_COPY_RING_BYTES, _MAX_COPY_RING_BYTES = 1 << 20, 1 << 24
"""Of each CPU, and of all: room for what the budget allows in a drain's period."""
_TIMER_MAPS = ("expiries", "expired_in", "tick_program")


@dataclass(frozen=True, slots=True)
class SamplerConfig:
    """What to sample.

    Attributes:
        frequency_hz: ticks per second and CPU, 1 to 999.
        hardware: tick on CPU cycles instead of the CPU clock.
        pids: only these processes and what they start; None samples everything.
        drain_period_s: how long a map generation must last without overflowing.
        tables_limit_bytes: what unwind tables and address spaces may take in the kernel.
        frames_per_program: how many frames one program leaves before it calls the next; the first
            number that the kernel's verifier takes is used. Verifying 24 took 0.8 s of CPU time, 12
            half of that.
        kernel_stack_bytes: what the kernel may write of its own stack; a deeper one is cut.
        copied_bytes_per_s: of stacks that cannot be walked yet, on each CPU; for an owner that
            unwinds the copies.
        compiling_nice: the priority of the child that compiles, where that is permitted.
    """

    frequency_hz: int = 99
    hardware: bool = False
    pids: frozenset[int] | None = None
    drain_period_s: float = 1.0
    tables_limit_bytes: int = tables.DEFAULT_LIMIT_BYTES
    frames_per_program: tuple[int, ...] = (14, 8, 5)
    kernel_stack_bytes: int = 8 * MAX_KERNEL_WORDS
    copied_bytes_per_s: int = 0
    compiling_nice: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.frequency_hz <= MAX_FREQUENCY_HZ:
            raise ValueError(
                f"cannot sample at {self.frequency_hz} Hz: choose 1 to {MAX_FREQUENCY_HZ}"
            )

    def capacity(self, cpus: int) -> int:
        """Return the entries of each map: a drain may come twice as late before one is full.

        Eight times as late, as on a host with far more work than CPUs, if all maps together then
        take no more than 16 MB. They cannot grow later.
        """
        needed = self._needed(cpus)
        affordable = _MAPS_BYTES // _ENTRY_BYTES
        return max(1024, needed, min(4 * needed, 1 << (affordable.bit_length() - 1)))

    def _needed(self, cpus: int) -> int:
        needed = int(2 * self.frequency_hz * cpus * self.drain_period_s)
        return 1 << (needed - 1).bit_length()

    def lasts_s(self, cpus: int) -> float:
        """Return how long the maps last with as much to spare: `drain_period_s` or longer.

        Even the smallest maps are larger than a small host needs.
        """
        return self.capacity(cpus) / (2 * self.frequency_hz * cpus)


class Sampler:
    """Owns the programs, maps and events.

    Raises:
        LoadError: on construction, when the programs cannot be compiled or loaded.
    """

    def __init__(self, config: SamplerConfig, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Compile and load; `meanwhile` is called now and then as long as that takes."""
        self.config = config
        possible = Path("/sys/devices/system/cpu/possible").read_text()
        self._possible_cpus = len(perf_event.parse_cpus(possible))
        self._fds, frames = _load(config, self._possible_cpus, meanwhile)
        self.deepest_stack = min(MAX_NATIVE_WORDS, frames * MAX_WALK_PROGRAMS)
        """Native frames that are followed: as many as fit, unless the verifier is strict."""
        self._events: dict[int, tuple[int, int]] = {}
        """By CPU: the event, and the CPU's `online_id` when it was opened."""
        self._tracepoints: list[int] = []
        self._generation = 0
        self._counted = {
            generation: np.zeros(len(Counter), np.uint64) for generation in _MAP_GENERATIONS
        }
        self._expired = {g: np.zeros(2, np.uint64) for g in _MAP_GENERATIONS}
        self._failed: set[int] = set()
        self._copied: tuple[list[bytes], list[bytes]] = ([], [])
        """By map generation: records that were taken from the ring and are not drained yet."""
        with contextlib.ExitStack() as opened:
            opened.callback(self._close_descriptors)
            self._open(config, opened)
            self._opened = opened.pop_all()

    def _open(self, config: SamplerConfig, opened: contextlib.ExitStack) -> None:
        """Open what must be closed, and enter it into `opened` as soon as it is there."""
        self.tables = tables.Tables(self._fds, config.tables_limit_bytes, self._possible_cpus)
        opened.callback(self.tables.close)
        self.interpreters = Interpreters(self._fds["interpreters"])
        self.known_programs = KnownPrograms(self._fds["known_programs"])
        self._codes = RingBuffer(self._fds["codes"], interpreters.CODE_RING_BYTES)
        opened.callback(self._codes.close)
        self._copies = RingBuffer(self._fds["copies"], _copy_ring_bytes(self._possible_cpus))
        opened.callback(self._copies.close)
        self._counts = self._readers("counts", COUNT_KEY, COUNT)
        self._user_stacks = self._readers("user_stacks", np.dtype(np.uint64), LONG_STACK)
        self._deep_stacks = self._readers("deep_stacks", np.dtype(np.uint64), USER_STACK)
        self._kernel_stacks = self._readers("kernel_stacks", np.dtype(np.uint64), KERNEL_STACK)
        self._barrier_inner = syscalls.create_map(syscalls.MAP_TYPE_ARRAY, 4, 4, 1)
        opened.callback(os.close, self._barrier_inner)
        self._barrier = syscalls.create_map(
            syscalls.MAP_TYPE_ARRAY_OF_MAPS, 4, 4, 1, inner_map_fd=self._barrier_inner
        )
        opened.callback(os.close, self._barrier)
        self.counts_skipped = self._count_expiries()
        """Whether ticks that the kernel skips, beside other BPF programs, are counted."""
        if config.pids is not None:
            for name, program in (
                ("sched_process_fork", "on_fork"),
                ("sched_process_free", "on_free"),
            ):
                self._tracepoints.append(syscalls.attach_raw_tracepoint(name, self._fds[program]))
            self.select(config.pids)

    def _count_expiries(self) -> bool:
        """Count how often timers expire, whether or not a tick follows; False if that fails."""
        if self.config.hardware or "on_expire" not in self._fds:
            return False
        number = syscalls.ProgramInfo(self._fds["on_tick"]).id
        syscalls.update(self._fds["tick_program"], 0, struct.pack("<I", number))
        try:
            link = syscalls.attach_raw_tracepoint("hrtimer_expire_entry", self._fds["on_expire"])
        except SyscallError:
            return False
        self._tracepoints.append(link)
        return True

    def _readers(
        self, name: str, key: np.dtype[np.generic], value: np.dtype[np.generic]
    ) -> list[syscalls.BatchReader]:
        return [
            syscalls.BatchReader(self._fds[f"{name}_{g}"], key, value) for g in _MAP_GENERATIONS
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def start(self) -> None:
        """Begin to tick on every online CPU."""
        self.refresh_cpus()

    @property
    def cpus(self) -> int:
        """How many CPUs tick."""
        return len(self._events)

    def refresh_cpus(self) -> bool:
        """Follow CPUs that have come or gone; True if there were any.

        A CPU that was off and on again needs a new event: the old one stays blind.
        """
        online = set(perf_event.online_cpus())
        gone = [
            cpu
            for cpu, (fd, opened_id) in self._events.items()
            if cpu not in online or perf_event.has_gone(fd, cpu, opened_id)
        ]
        for cpu in gone:
            os.close(self._events.pop(cpu)[0])
        come = sorted(online - self._events.keys())
        attr = perf_event.sampling_attr(self.config.frequency_hz, self.config.hardware)
        opened: dict[int, tuple[int, int]] = {}
        for cpu in come:
            opened_id = perf_event.online_id(cpu)  # before: it may go while the event is opened
            if (fd := _open_if_online(attr, cpu)) is not None:
                opened[cpu] = fd, opened_id
        self._events |= opened
        for fd, _ in opened.values():
            perf_event.set_bpf(fd, self._fds["on_tick"])
        for fd, _ in opened.values():
            perf_event.enable(fd)
        return bool(gone or come)

    def stop(self) -> None:
        """End ticking. What was counted is still there for one more drain."""
        for fd, _ in self._events.values():
            os.close(fd)
        self._events.clear()

    def select(self, pids: Iterable[int]) -> None:
        """Sample these processes and what they start from now on.

        Raises:
            SyscallError: there are more than 32,768 of them.
        """
        for pid in pids:
            syscalls.update(self._fds["selected"], pid, struct.pack("<Q", 0))

    @property
    def unselected(self) -> int:
        """Processes that should have been sampled and found no room in the selection."""
        if self.config.pids is None:
            return 0
        return int.from_bytes(syscalls.lookup(self._fds["unselected"], 0, 8), sys.byteorder)

    def run_stats(self) -> syscalls.ProgramInfo:
        """Ask for the tick program's run time; counts only inside `syscalls.run_time_stats`."""
        return syscalls.ProgramInfo(self._fds["on_tick"])

    def drain(self) -> Drain:
        """Flip the map generations and empty the one that has become idle.

        What a drain that fails has taken already is lost: `fault`, in a later drain.
        """
        idle_generation = self._generation
        self._generation ^= 1
        flip_begun_ns = time.monotonic_ns()
        syscalls.update(self._fds["active"], 0, struct.pack("<I", self._generation))
        flipped_ns = time.monotonic_ns()
        self.wait_for_programs()  # nobody writes to the old one any more
        self._take_copies()
        totals = self._read_counters(idle_generation)
        try:
            samples, copies = self._take_samples(idle_generation)
        except BaseException:
            self._failed.add(idle_generation)  # its counts come with its next drain
            raise
        expired = self._read_expiries(idle_generation)
        new = totals - self._counted[idle_generation]
        self._counted[idle_generation] = totals
        expired_now = expired - self._expired[idle_generation]
        self._expired[idle_generation] = expired
        counts = {counter: int(new[counter]) for counter in Counter}
        lost = {
            cause.name.lower(): counts[cause]
            for cause in (Counter.MAP_FULL, Counter.MAP_BUSY)
            if counts[cause]
        }
        if idle_generation in self._failed:
            self._failed.discard(idle_generation)
            ended = counts[Counter.IDLE] + counts[Counter.FILTERED] + sum(lost.values())
            stored = sum(sample.samples for sample in samples) + len(copies)
            lost["fault"] = counts[Counter.TICKS] - ended - stored
        skipped = self._skipped(expired_now, counts)
        # If this process was stopped while it flipped them, the last tick says on which side.
        latest_ns = max(
            (
                *(sample.last_ns for sample in samples),
                *(copy.walked.last_ns for copy in copies),
            ),
            default=0,
        )
        return Drain(
            samples=samples,
            ticks=counts[Counter.TICKS] + sum(skipped.values()),
            idle=counts[Counter.IDLE],
            filtered=counts[Counter.FILTERED],
            lost=lost | skipped,
            ended_ns=min(max(flip_begun_ns, latest_ns), flipped_ns),
            copies=copies,
            uncopied=counts[Counter.UNCOPIED],
            counts_skipped=self.counts_skipped,
        )

    def wait_for_programs(self) -> None:
        """Return when no program runs any more that was running at the call.

        The kernel answers an update of a map of maps only then (maybe_wait_bpf_programs, 4.18).
        """
        syscalls.update(self._barrier, 0, struct.pack("<I", self._barrier_inner))
        self.tables.settle()

    def _read_counters(self, generation: int) -> np.ndarray:
        """Return the counters of a map generation, of all CPUs together, since the start."""
        size = 8 * len(Counter) * self._possible_cpus
        raw = syscalls.lookup(self._fds["counters"], generation, size)
        by_cpu = np.frombuffer(raw, np.uint64).reshape(-1, len(Counter))
        totals: np.ndarray = by_cpu.sum(axis=0, dtype=np.uint64)
        return totals

    def _read_expiries(self, generation: int) -> np.ndarray:
        """Return how often timers of busy CPUs expired since the start: in all, in this process."""
        if not self.counts_skipped:
            return np.zeros(2, np.uint64)
        raw = syscalls.lookup(self._fds["expiries"], generation, 16 * self._possible_cpus)
        totals: np.ndarray = np.frombuffer(raw, np.uint64).reshape(-1, 2).sum(0, dtype=np.uint64)
        return totals

    def _skipped(self, expired: np.ndarray, counts: Mapping[Counter, int]) -> dict[str, int]:
        """Return how many ticks the kernel skipped, by the cause."""
        if not self.counts_skipped:
            return {}
        number, own = expired.tolist()
        draining = max(0, own - counts[Counter.OWN])
        busy = counts[Counter.TICKS] - counts[Counter.IDLE]
        others = max(0, number - busy - draining)
        causes = {"draining": draining, "other_tracer": others}
        return {cause: ticks for cause, ticks in causes.items() if ticks}

    def collect(self) -> float:
        """Make room for further copies, now and then between two drains.

        Returns which part of the room was taken.
        """
        before = self._copies.consumed
        for record in self._copies.take():
            self._copied[record[GENERATION_AT] & 1].append(record)
        return (self._copies.consumed - before) / self._copies.size_bytes

    def take_codes(self) -> list[CodeContent]:
        """Return the code objects that were seen for the first time since the last call.

        Those of a sample are there when it is drained, unless there were too many for the ring.
        """
        return [read_code(record) for record in self._codes.take()]

    def _take_copies(self) -> None:
        """Take all records that had been begun, those of the other map generation as well.

        One that is still being written, on another CPU, stands before complete ones.
        """
        end = self._copies.produced
        self.collect()
        while self._copies.consumed < end:
            self.wait_for_programs()
            self.collect()

    def _take_samples(self, generation: int) -> tuple[list[RawSample], list[CopiedStack]]:
        # Taken first, as what they refer to is gone afterwards, whether or not this fails.
        records = [*self._copied[generation]]
        self._copied[generation].clear()
        counts = self._counts[generation].take_all()
        long = self._user_stacks[generation].take_all()
        deep = self._deep_stacks[generation].take_all()
        kernel = KernelStacks.of(*self._kernel_stacks[generation].take_all())
        samples = read_samples(*counts, long, deep, kernel)
        return samples, [read_copy(record, kernel) for record in records]

    def close(self) -> None:
        """Detach and free everything; safe to call twice."""
        self.stop()
        self._opened.close()

    def _close_descriptors(self) -> None:
        for fd in (*self._tracepoints, *self._fds.values()):
            os.close(fd)
        self._tracepoints.clear()
        self._fds.clear()


def _open_if_online(attr: perf_event.PerfEventAttr, cpu: int) -> int | None:
    try:
        return perf_event.open_event(attr, cpu=cpu)
    except PerfEventError as error:
        if error.errno == errno.ENODEV:  # it went offline a moment ago
            return None
        raise


def _copy_ring_bytes(cpus: int) -> int:
    return min(_MAX_COPY_RING_BYTES, _COPY_RING_BYTES << (cpus - 1).bit_length())


def _load(
    config: SamplerConfig, cpus: int, meanwhile: Callable[[], None]
) -> tuple[dict[str, int], int]:
    """Compile and load in a child; return descriptors of programs and maps by name."""
    constants = kernel_constants() | {
        "CAPACITY": config.capacity(cpus),
        "LONG_CAPACITY": max(1024, config.capacity(cpus) // 2),
        "DEEP_CAPACITY": config.capacity(cpus) // 4,
        "KERNEL_STACK_BYTES": config.kernel_stack_bytes,
        "COPY_RING_PAGES": _copy_ring_bytes(cpus) // mmap.PAGESIZE,
        "CODE_RING_PAGES": interpreters.CODE_RING_BYTES // mmap.PAGESIZE,
        "COPY_NS_PER_BYTE": round(1e9 / (config.copied_bytes_per_s or math.inf)),
        "CPUS": cpus,
        "SAMPLER_PID": os.getpid(),
    }
    # As the enumeration in sampler.bpf.c has them.
    calls = ["on_walk", "on_copy", "on_chain", "on_codes"]
    programs = dict.fromkeys(("on_tick", *calls), "PERF_EVENT")
    programs["on_expire"] = "RAW_TRACEPOINT"
    # An array of programs is emptied when nobody holds it.
    maps = ["active", "counters", "programs", "copies", *_TIMER_MAPS, *tables.MAPS]
    maps += interpreters.MAPS
    for name in ("counts", "user_stacks", "deep_stacks", "kernel_stacks"):
        maps += [f"{name}_{generation}" for generation in _MAP_GENERATIONS]
    if config.pids is not None:
        constants["SELECTED_CAPACITY"] = _SELECTED_CAPACITY
        programs |= {"on_fork": "RAW_TRACEPOINT", "on_free": "RAW_TRACEPOINT"}
        maps += ["selected", "unselected"]
    request = {
        "constants": constants,
        "programs": programs,
        "maps": maps,
        "calls": calls,
        "frames_per_program": config.frames_per_program,
        "timer_programs": ["on_expire"],
        "timer_maps": _TIMER_MAPS,
        "nice": config.compiling_nice,
    }
    return ask_child(json.dumps(request).encode(), meanwhile)
