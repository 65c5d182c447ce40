"""`everflame agent`: sample this host for ever, one profile for each window.

Two processes. This one samples, names, closes windows and writes them into the spool; it holds no
credentials and opens no connection. The other (`profiler.uploader`) sends what lies in the spool.
What happens to the store, the network or the credentials is therefore nothing to the sampling.

The outer loop is the one place that survives a failure of any step: the drain in hand is counted as
lost (`fault`), logged, and the next second is sampled as usual.
"""

import contextlib
import fcntl
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bpf import syscalls
from bpf.errors import SyscallError
from bpf.sampler import SamplerConfig
from profiler.record import RefusedError, deviation
from profiler.recorder import DRAIN_PERIOD_S, Recorder, rss_bytes
from profiler.rules import Rules
from profiler.signals import ENDING, Signals
from profiler.status import StatusSocket, uploader_state
from storage.objects import default_store_url
from storage.profile import Accounting, Profile
from storage.spool import Spool

SCHEMA = 1
MIN_INTERVAL_S = 5
MAX_INTERVAL_S = 1800

KEEP_S = 2 * 86400
KEEP_BYTES = 5_000_000_000
"""What a directory keeps by default, whichever comes first; a bucket has lifecycle rules."""

_JITTER_SHARE = 0.2
"""Of the interval: hosts close their windows at the same moment, and must not all send then."""
_STEP_NS = 500_000_000
"""A larger difference between the wall clock and the monotonic one is a step, not a drift."""
_ALARM_AFTER = 3
"""Windows in a row whose ticks differ from the kernel's own account of busy time."""
_UPLOADER_GRACE_S = 15.0
_RESTART_S = (1.0, 60.0)
"""How soon an uploader that has died is started again: at first, and at most."""

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
    run_folder: Path
    store: str
    endpoint: str
    keep_s: float | None
    keep_bytes: int | None
    metrics_listen: str
    rules: Rules


class Edges:
    """When windows end: at multiples of the interval on the wall clock, by the monotonic one."""

    def __init__(
        self,
        interval_s: int,
        wall_ns: Callable[[], int] = time.time_ns,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._interval_ns = interval_s * 1_000_000_000
        self._wall_ns, self._monotonic_ns = wall_ns, monotonic_ns
        self.begin()

    def begin(self) -> None:
        """Look for the next edge; one that is less than a second away is left to the window."""
        self._begun_ns, self._begun_monotonic_ns = self._wall_ns(), self._monotonic_ns()
        soonest_ns = self._begun_ns + min(1_000_000_000, self._interval_ns // 10)
        self.edge_ns = -(-soonest_ns // self._interval_ns) * self._interval_ns

    @property
    def edge_monotonic_s(self) -> float:
        return (self._begun_monotonic_ns + self.edge_ns - self._begun_ns) / 1e9

    @property
    def is_reached(self) -> bool:
        return self._monotonic_ns() / 1e9 >= self.edge_monotonic_s

    @property
    def is_stepped(self) -> bool:
        """Tell whether somebody has set the wall clock since the window began."""
        passed_ns = self._monotonic_ns() - self._begun_monotonic_ns
        return abs(self._wall_ns() - self._begun_ns - passed_ns) > _STEP_NS


@contextlib.contextmanager
def host_lock(run_folder: Path) -> Iterator[None]:
    """Hold the lock that one agent of a host holds.

    Raises:
        RefusedError: another agent holds it.
    """
    run_folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    fd = os.open(run_folder / "agent.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(fd, 20).decode(errors="replace").strip() or "unknown"
            raise RefusedError(
                f"cannot start: an agent runs on this host already (pid {pid};"
                " everflame status tells how it fares)"
            ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(fd)


class UploaderProcess:
    """The other process, started again whenever it has died."""

    def __init__(self, options: AgentOptions) -> None:
        self._command = _uploader_command(options)
        self._restart_s = _RESTART_S[0]
        self._restart_at = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self.starts = 0

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0

    def supervise(self) -> None:
        """Start it if it does not run and its time has come."""
        now = time.monotonic()
        if self._process and self._process.poll() is not None:
            log.warning("lost the uploader status=%s", self._process.returncode)
            self._process = None
            self._restart_at = now + self._restart_s
            self._restart_s = min(2 * self._restart_s, _RESTART_S[1])
        if self._process is None and now >= self._restart_at:
            self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL)
            self.starts += 1

    def end(self) -> None:
        """Let it send what is waiting, for a while."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(_UPLOADER_GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _uploader_command(options: AgentOptions) -> list[str]:
    """Give its command line. It is not imported: what it needs is memory that sampling does not."""
    store = options.store or default_store_url()
    command = [sys.executable, "-m", "profiler.uploader"]
    command += [f"--spool={options.spool}", f"--store={store}", f"--parent={os.getpid()}"]
    command += [f"--jitter-s={options.interval_s * _JITTER_SHARE}"]
    if options.endpoint:
        command.append(f"--endpoint={options.endpoint}")
    if is_directory(store):
        command.append(f"--keep-s={int(options.keep_s or KEEP_S)}")
        command.append(f"--keep-bytes={options.keep_bytes or KEEP_BYTES}")
    if options.metrics_listen:
        command.append(f"--metrics-listen={options.metrics_listen}")
        command.append(f"--run-folder={options.run_folder}")
    return command


def is_directory(store: str) -> bool:
    return not store.startswith("s3://")


class BpfCost:
    """Measures the tick program's run time in one second of each window.

    The kernel's measuring costs every BPF program of the host a little, so it is not left on.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._stack = contextlib.ExitStack()
        self._before: syscalls.ProgramInfo | None = None
        self.ns_per_tick = 0.0

    def begin(self) -> None:
        try:
            self._stack.enter_context(syscalls.run_time_stats())
        except SyscallError as error:
            log.debug("cannot measure BPF: %s", error)
            return
        self._before = self._recorder.sampler.run_stats()

    def end(self) -> None:
        if self._before is None:
            return
        after = self._recorder.sampler.run_stats()
        ticks = after.run_count - self._before.run_count
        if ticks:
            self.ns_per_tick = (after.run_time_ns - self._before.run_time_ns) / ticks
        self._before = None
        self._stack.close()


class Agent:
    """Runs the loop. Everything it owns is handed in, and closed by whoever made it."""

    def __init__(
        self,
        options: AgentOptions,
        recorder: Recorder,
        spool: Spool,
        uploader: UploaderProcess,
    ) -> None:
        self._options = options
        self._recorder = recorder
        self._spool = spool
        self._uploader = uploader
        self._bpf = BpfCost(recorder)
        self._edges = Edges(options.interval_s)
        self._begun_s = time.monotonic()
        self._begun_cpu_ns = time.process_time_ns()
        self._totals = Accounting()
        self._windows = 0
        self._faults = 0
        self._deviating = 0

    def run(self, signals: Signals, socket: StatusSocket) -> None:
        """Sample until a signal or the end of the asked time; the last window is closed."""
        end_s = self._begun_s + self._options.duration_s
        self._recorder.start()
        self._edges.begin()
        self._bpf.begin()
        next_step = time.monotonic() + DRAIN_PERIOD_S
        while time.monotonic() < end_s:
            met = signals.wait(min(next_step, self._edges.edge_monotonic_s, end_s))
            if met in ENDING:
                break
            with self._surviving():
                self._recorder.catch_up()
                socket.answer(self.status)
                self._uploader.supervise()
                if time.monotonic() >= next_step:
                    next_step = max(next_step + DRAIN_PERIOD_S, time.monotonic())
                    self._recorder.step()
                    self._bpf.end()
            if self._edges.is_reached or self._edges.is_stepped:
                with self._surviving():
                    self._close_window()
        self._recorder.stop()
        self._bpf.end()
        self._close_window()

    @contextlib.contextmanager
    def _surviving(self) -> Iterator[None]:
        try:
            yield
        except Exception:  # the single place that survives: the next second is sampled again
            self._faults += 1
            log.exception("survived a fault")

    def _close_window(self) -> None:
        is_aligned = self._edges.is_reached and not self._edges.is_stepped
        edge_ns = self._edges.edge_ns if is_aligned else None
        self._edges.begin()
        profile = self._recorder.close_window(edge_ns)
        with self._recorder.cost.of("encode"):
            self._spool.add(profile)
        self._bpf.begin()
        self._note(profile)

    def _note(self, profile: Profile) -> None:
        counts = profile.accounting
        self._windows += 1
        self._totals = self._totals.merge(replace(counts, services={}, misses={}))
        lost = sum(counts.lost.values())
        log.info("closed a window samples=%d lost=%d idle=%d", counts.stored, lost, counts.idle)
        if lost:
            log.warning("lost ticks=%d causes=%s", lost, dict(counts.lost))
        warning = deviation(counts, self._recorder.config)
        self._deviating = self._deviating + 1 if warning else 0
        if self._deviating >= _ALARM_AFTER:
            log.warning("%s (%d windows in a row)", warning, self._deviating)

    def status(self) -> dict[str, Any]:
        """Give what `everflame status --json` prints."""
        recorder, counts = self._recorder, self._totals.merge(self._recorder.counts)
        spool = self._spool.status()
        return {
            "schema": SCHEMA,
            "pid": os.getpid(),
            "host": counts.hosts[0].name,
            "host_id": counts.hosts[0].host_id,
            "uptime_s": round(time.monotonic() - self._begun_s, 3),
            "interval_s": self._options.interval_s,
            "frequency_hz": self._options.frequency_hz,
            "windows": self._windows,
            "faults": self._faults,
            "alarm": self._deviating >= _ALARM_AFTER,
            "ticks": counts.ticks,
            "idle": counts.idle,
            "filtered": counts.filtered,
            "stored": counts.stored,
            "lost": dict(counts.lost),
            "stops": dict(counts.stops),
            "cpu_ns": {
                **recorder.cost.cpu_ns,
                "bpf": round(self._bpf.ns_per_tick * counts.ticks),
                "sampler": time.process_time_ns() - self._begun_cpu_ns,
            },
            "bpf_ns_per_tick": round(self._bpf.ns_per_tick),
            "sampler": {"pid": os.getpid(), "rss_bytes": rss_bytes()},
            "uploader": {"pid": self._uploader.pid, "starts": self._uploader.starts}
            | uploader_state(self._options.spool),
            "spool": spool._asdict(),
            "slowest_binaries": recorder.symbolizer.slowest(),
        }


def run(options: AgentOptions) -> int:
    """Be the agent of this host until it is told to end."""
    config = SamplerConfig(options.frequency_hz, options.hardware)
    with (
        host_lock(options.run_folder),
        Signals() as signals,
        StatusSocket(options.run_folder) as socket,
    ):
        spool = Spool(options.spool, options.spool_limit_bytes)
        uploader = UploaderProcess(options)
        log.info("%s", _greeting(options))
        with Recorder(config, rules=options.rules) as recorder:
            signals.watch(recorder.fileno())
            signals.watch(socket.fileno())
            try:
                Agent(options, recorder, spool, uploader).run(signals, socket)
            finally:
                uploader.end()
    return 0


def _greeting(options: AgentOptions) -> str:
    """Say at the start what goes where, and how long it is kept."""
    store = options.store or default_store_url()
    kept = "for ever (set a lifecycle rule in the bucket to change that)"
    if is_directory(store):
        days = (options.keep_s or KEEP_S) / 86400
        kept = f"{days:g} days or {(options.keep_bytes or KEEP_BYTES) / 1e9:g} GB"
    return (
        f"sampling at {options.frequency_hz} Hz, one object every {options.interval_s} s into"
        f" {store}, kept {kept}; waiting ones lie in {options.spool}"
    )
