"""`everflame agent`: sample this host for ever, one profile for each window.

Two processes. This one samples, names, closes windows and writes them into the spool; it holds no
credentials and opens no connection. The other (`profiler.agent.uploader`) sends what lies in the
spool. So nothing that happens to the store, the network or the credentials stops the sampling.

The outer loop is the one place that survives a failure. Each stage of it fails by itself: a drain
that fails is counted as lost (`fault`), windows still close, and a stage that fails again and again
is run less often. A window that cannot be stored is counted in the next one.
"""

import contextlib
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from bpf import syscalls
from bpf.errors import SyscallError
from bpf.sampler import Sampler, SamplerConfig
from profiler.agent.cost import rss_bytes
from profiler.agent.guard import Guard
from profiler.agent.ready import announce
from profiler.agent.recorder import Recorder
from profiler.agent.signals import ENDING, Signals
from profiler.agent.status import StatusSocket, uploader_state
from profiler.agent.supervise import Child, RefusedError, host_lock
from profiler.agent.thread_names import THREAD_NAMES
from profiler.agent.window import Edges, deviation
from profiler.processes.rules import Rules
from storage.objects.keys import DEFAULT_TENANT
from storage.objects.open import default_store_url
from storage.profile import GOOD_STOPS, Accounting, Loss, Profile, add_counts
from storage.spool.spool import Spool

SCHEMA = 1
LONGEST_WINDOW_S = 3598
"""A store takes an hour, from one full second to another. Only a process that was stopped or frozen
for so long has longer ones, and they are cut."""

KEEP_S = 2 * 86400
KEEP_BYTES = 5_000_000_000
"""What a directory keeps by default, whichever comes first; a bucket has lifecycle rules."""

_JITTER_SHARE = 0.2
"""Of the interval: hosts close their windows at the same moment, and must not all send then. There
is no jitter for a directory, which only this host writes to."""
_ALARM_AFTER = 3
"""So many windows in a row whose ticks differ from the kernel's own CPU times raise the alarm."""
_UPLOADER_GRACE_S = 15.0
_STAGES = ("processes", "status", "uploader", "child processes", "drain", "cost")
"""Those of the loop, besides the closing of windows."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AgentOptions:
    """What `everflame agent` was asked for. An empty `store` is the default one of this user."""

    frequency_hz: int
    hardware: bool
    interval_s: int
    duration_s: float
    spool: Path
    spool_limit_bytes: int
    tables_limit_bytes: int
    run_folder: Path
    store: str
    endpoint: str
    keep_s: float | None
    keep_bytes: int | None
    metrics_listen: str
    rules: Rules
    first_interval_s: int = 0
    """The length of windows in the first minute, 0 for that of all others."""
    ready_fd: int | None = None
    """What to tell when sampling has begun."""
    tenant: str = DEFAULT_TENANT


def uploader_command(options: AgentOptions) -> list[str]:
    """Return its command line. It is not imported, because its libraries take memory."""
    store = options.store or default_store_url()
    command = [sys.executable, "-P", "-m", "profiler.agent.uploader"]
    command += [f"--spool={options.spool}", f"--store={store}", f"--parent={os.getpid()}"]
    if options.endpoint:
        command.append(f"--endpoint={options.endpoint}")
    command.append(f"--tenant={options.tenant}")
    if not is_directory(store):
        shortest_s = options.first_interval_s or options.interval_s
        command.append(f"--jitter-s={shortest_s * _JITTER_SHARE}")
    else:
        command += kept_arguments(options)
        if options.keep_s is not None:
            # Who asks for a time wants nothing that is older; else it is the compactor's to delete.
            command.append(f"--keep-compacted-s={math.ceil(options.keep_s)}")
    if options.metrics_listen:
        command.append(f"--metrics-listen={options.metrics_listen}")
        command.append(f"--run-folder={options.run_folder}")
    return command


def is_directory(store: str) -> bool:
    return not store.startswith("s3://")


def kept_arguments(options: AgentOptions) -> list[str]:
    """Return how much of a directory is kept, as the uploader and the service are told it."""
    keep_s = math.ceil(options.keep_s or KEEP_S)  # 0 would keep everything
    return [f"--keep-s={keep_s}", f"--keep-bytes={options.keep_bytes or KEEP_BYTES}"]


class BpfCost:
    """Measures the tick program's run time in one second of each window.

    The kernel's measuring costs every BPF program of the host a little, so it is not left on.
    """

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self._stack = contextlib.ExitStack()
        self._before: syscalls.ProgramInfo | None = None
        self.ns_per_tick = 0.0
        self._total_ns = 0.0
        self._ticks = 0
        """Those in `_total_ns`."""

    def begin(self) -> None:
        self._stack.close()
        self._before = None
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(syscalls.run_time_stats())
            except SyscallError as error:
                log.debug("cannot measure BPF: %s", error)
                return
            self._before = self._sampler.run_stats()
            self._stack = stack.pop_all()

    def end(self) -> None:
        before, self._before = self._before, None
        if before is None:
            return
        with self._stack.pop_all():
            after = self._sampler.run_stats()
        ticks = after.run_count - before.run_count
        if ticks:
            self.ns_per_tick = (after.run_time_ns - before.run_time_ns) / ticks

    def charge(self, ticks: int) -> int:
        """Return the run time of all ticks since the start, of which there are so many now.

        Those since the last call cost what was measured last, so the total never falls. Those
        before the first measurement are counted after it.
        """
        if self.ns_per_tick and ticks > self._ticks:
            self._total_ns += self.ns_per_tick * (ticks - self._ticks)
            self._ticks = ticks
        return round(self._total_ns)


class WholeCost:
    """Adds BPF and the uploader to a window's cost, of which the recorder counts the sampler's."""

    def __init__(self, uploader: Mapping[str, Any]) -> None:
        """`uploader` is the state that an earlier uploader left, whose cost is not this agent's."""
        self._uploader = uploader

    def complete(
        self, counts: Accounting, bpf_ns_per_tick: float, uploader: Mapping[str, Any]
    ) -> Accounting:
        """Return the window's accounting with the cost of all parts.

        `uploader` is its state now, empty until it is written. Its CPU time counts from the last
        call on, and from zero where another process has taken its place.
        """
        is_same = uploader.get("pid") == self._uploader.get("pid")
        before_ns = self._uploader.get("cpu_ns", 0) if is_same else 0
        uploader_ns = max(0, uploader.get("cpu_ns", 0) - before_ns)
        self._uploader = uploader or self._uploader
        return replace(
            counts,
            agent_cpu_ns=counts.agent_cpu_ns + round(bpf_ns_per_tick * counts.ticks) + uploader_ns,
            agent_rss_bytes=counts.agent_rss_bytes + uploader.get("rss_bytes", 0),
        )


class ChildProcesses:
    """Child processes that an agent looks after in its loop. `everflame agent` has no others."""

    commands: Collection[int] = ()
    """Those that are not the profiler's own."""
    has_failed = False
    """Whether the agent is to end as well."""

    def start(self) -> None:
        """Start them, once the lock is held and before anything is loaded."""

    def begun(self) -> None:
        """Take note that sampling has begun. What this raises is logged."""

    def supervise(self) -> None:
        """Look after them, several times a second. What this raises is logged."""

    def note(self, profile: Profile) -> None:
        """Take note of a window that was closed."""

    def status(self) -> dict[str, Any]:
        """Return what is to stand in the agent's status."""
        return {}

    def end(self) -> None:
        """End them; called in any case, and last."""


class Agent:
    """Runs the loop. Everything it owns is handed in, and closed by whoever made it."""

    def __init__(
        self,
        options: AgentOptions,
        recorder: Recorder,
        spool: Spool,
        uploader: Child,
        children: ChildProcesses,
    ) -> None:
        self._options = options
        self._recorder = recorder
        self._spool = spool
        self._uploader = uploader
        self._children = children
        self._bpf = BpfCost(recorder.sampler)
        self._cost = WholeCost(uploader_state(options.spool))
        self._edges = Edges(options.interval_s, first_interval_s=options.first_interval_s)
        self._begun_s = time.monotonic()
        self._begun_cpu_ns = time.process_time_ns()
        self._totals = Accounting()
        self._windows = 0
        self._guards = {stage: Guard(stage) for stage in _STAGES}
        self._closing = Guard("window", longest_pause_s=0)  # windows close, whatever happens
        self._deviating = 0

    def run(self, signals: Signals, socket: StatusSocket) -> None:
        """Sample until a signal or the end of the asked time; the last window is closed."""
        self._recorder.start()
        end_s = time.monotonic() + self._options.duration_s
        log.info("%s", greeting(self._options))
        announce(self._options.ready_fd, os.environ)
        self._run("child processes", self._children.begun)
        self._edges.begin()
        self._recorder.split_at(self._edges.edge)
        self._bpf.begin()
        next_step = time.monotonic() + self._recorder.drain_period_s
        while time.monotonic() < end_s and not self._children.has_failed:
            until_s = min(next_step, self._edges.edge_monotonic_s, end_s)
            # What a stage left unread keeps its descriptor readable: that must not wake the loop.
            paused = [guard.resumes_s for guard in self._guards.values() if guard.is_paused]
            met = (
                signals.wait(min(until_s, *paused), only_signals=True)
                if paused
                else signals.wait(until_s, rest_until_s=self._recorder.rests_until_s)
            )
            if met in ENDING:
                break
            is_due = time.monotonic() >= next_step
            if not is_due:  # a step does the same, and more
                self._run("processes", self._recorder.catch_up)
            self._run("status", lambda: socket.answer(self.status))
            self._run("uploader", self._uploader.supervise)
            self._run("child processes", self._children.supervise)
            if is_due:
                next_step = max(next_step + self._recorder.drain_period_s, time.monotonic())
                self._run("drain", self._recorder.step)
                self._run("cost", self._bpf.end)
            if self._edges.is_reached or self._edges.is_stepped:
                self._close_window()
        self._guards["drain"].resume()
        self._run("drain", self._recorder.stop)
        self._guards["drain"].resume()
        self._close_window()
        self._run("cost", self._bpf.end)

    def _run(self, stage: str, run: Callable[[], object]) -> None:
        self._guards[stage].run(run)

    def _close_window(self) -> None:
        edge = self._edges.true_edge
        self._edges.begin()
        self._run("drain", self._recorder.drain)
        self._run("cost", self._bpf.end)
        cut: list[Profile] = []
        self._closing.run(lambda: cut.append(self._recorder.cut_window(edge)))
        self._recorder.split_at(self._edges.edge)
        for profile in (*self._recorder.take_closed(), *cut):
            self._closing.run(partial(self._store, profile))
        self._run("cost", self._bpf.begin)

    def _store(self, profile: Profile) -> None:
        try:
            uploader = uploader_state(self._options.spool)
            counts = self._cost.complete(profile.accounting, self._bpf.ns_per_tick, uploader)
            profile = replace(profile, accounting=counts)
            with self._recorder.cost.of("encode"):
                self._spool.add(profile)
        except BaseException:
            self._recorder.lose(profile.accounting)
            raise
        self._note(profile)

    def _note(self, profile: Profile) -> None:
        counts = profile.accounting
        self._windows += 1
        self._totals = self._totals.merge(replace(counts, services={}, misses={}))
        self._bpf.charge(self._totals.ticks)
        lost = sum(counts.lost.values())
        log.info("closed a window samples=%d lost=%d idle=%d", counts.stored, lost, counts.idle)
        if lost:
            log.warning("lost ticks=%d causes=%s", lost, dict(counts.lost))
        warning = deviation(counts, self._recorder.config)
        self._deviating = self._deviating + 1 if warning else 0
        if self._deviating >= _ALARM_AFTER:
            log.warning("%s (%d windows in a row)", warning, self._deviating)
        self._children.note(profile)

    def _faults(self) -> int:
        return sum(guard.faults for guard in (*self._guards.values(), self._closing))

    def status(self) -> dict[str, Any]:
        """Return what `everflame status --json` prints."""
        recorder, spool = self._recorder, self._spool.status()
        counts = self._totals.merge(recorder.counts)
        if spool.lost_samples:  # they were stored when their windows were closed
            dropped = {Loss.SPOOL_FULL.value: spool.lost_samples}
            counts = replace(
                counts,
                stored=counts.stored - spool.lost_samples,
                lost=add_counts(counts.lost, dropped),
            )
        return {
            "schema": SCHEMA,
            "pid": os.getpid(),
            "host": counts.hosts[0].name,
            "host_id": counts.hosts[0].host_id,
            "tenant": self._options.tenant,
            "uptime_s": round(time.monotonic() - self._begun_s, 3),
            "interval_s": self._options.interval_s,
            "frequency_hz": self._options.frequency_hz,
            "windows": self._windows,
            "faults": self._faults(),
            "alarm": self._deviating >= _ALARM_AFTER,
            "ticks": counts.ticks,
            "idle": counts.idle,
            "filtered": counts.filtered,
            "stored": counts.stored,
            "lost": dict(counts.lost),
            "stops": dict(counts.stops),
            "complete": sum(counts.stops.get(reason, 0) for reason in GOOD_STOPS),
            "cpu_ns": {
                **recorder.cost.cpu_ns,
                "bpf": self._bpf.charge(counts.ticks),
                "sampler": time.process_time_ns() - self._begun_cpu_ns,
                "readers": recorder.readers.cpu_ns,
            },
            "bpf_ns_per_tick": round(self._bpf.ns_per_tick),
            "sampler": {"pid": os.getpid(), "rss_bytes": rss_bytes()},
            "uploader": self._uploader.state() | uploader_state(self._options.spool),
            "spool": spool._asdict(),
            "tracers": list(recorder.tracers),
            "counts_skipped": recorder.sampler.counts_skipped,
            "unwinding": recorder.unwinding.status(),
            "files": recorder.files.status(),
            "readers": recorder.readers.status(),
            "mappings": recorder.address_spaces.status(),
            "copied_stacks": recorder.copied.status(),
            "labels": recorder.labeler.status(),
            "cpython": {**recorder.unwinding.runtimes.status(), **recorder.python.status()},
            THREAD_NAMES: recorder.threads.status(),
            **recorder.jit.status(),
            "slowest_binaries": recorder.names.slowest(),
            **self._children.status(),
        }


def run(options: AgentOptions, children: ChildProcesses | None = None) -> dict[str, Any]:
    """Run the agent of this host until it is asked to end, and return its last status."""
    children = children or ChildProcesses()
    config = SamplerConfig(
        options.frequency_hz, options.hardware, tables_limit_bytes=options.tables_limit_bytes
    )
    with (
        host_lock(options.run_folder),
        Signals() as signals,
        StatusSocket(options.run_folder) as socket,
    ):
        uploader = Child("uploader", uploader_command(options), unblocks_sigterm=True)
        try:
            children.start()
            spool = _open_spool(options)
            with Recorder(
                config,
                rules=options.rules,
                commands=children.commands,
                longest_window_s=LONGEST_WINDOW_S,
            ) as recorder:
                recorder.watch(signals)
                signals.watch(socket.fileno())
                agent = Agent(options, recorder, spool, uploader, children)
                try:
                    agent.run(signals, socket)
                finally:
                    uploader.end(_UPLOADER_GRACE_S)
                return agent.status()
        finally:
            children.end()


def _open_spool(options: AgentOptions) -> Spool:
    try:
        return Spool(options.spool, options.spool_limit_bytes, options.tenant)
    except OSError as error:
        raise RefusedError(
            f"cannot keep windows in {options.spool}: {error.strerror} (choose another --spool)"
        ) from error


def greeting(options: AgentOptions) -> str:
    """Say when it begins what goes where, and how long it is kept."""
    store = options.store or default_store_url()
    kept = "for ever (set a lifecycle rule in the bucket to change that)"
    if is_directory(store):
        days = (options.keep_s or KEEP_S) / 86400
        kept = f"{days:g} days or {(options.keep_bytes or KEEP_BYTES) / 1e9:g} GB"
    whose = "" if options.tenant == DEFAULT_TENANT else f" (tenant {options.tenant})"
    is_shorter_first = 0 < options.first_interval_s < options.interval_s
    first = f" ({options.first_interval_s} s at first)" if is_shorter_first else ""
    return (
        f"sampling at {options.frequency_hz} Hz, one object every {options.interval_s} s{first}"
        f" into {store}{whose}, kept {kept}; waiting ones lie in {options.spool}"
    )
