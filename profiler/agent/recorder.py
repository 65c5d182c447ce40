"""From ticks to profiles: what every recording command runs.

Each second what the kernel has counted is drained, and goes through the stages of the `Pipeline`
into the open window. A window ends where it is asked to end, also when the drain comes later.
"""

import contextlib
import gc
import logging
import math
import os
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from bpf.errors import SyscallError
from bpf.sampler import SamplerConfig
from bpf.samples import Drain
from bpf.tracers import find_tracers
from profiler.agent import priority
from profiler.agent.cost import return_freed_pages, return_large_blocks
from profiler.agent.host import allow_open_files, default_cache, refuse_time_namespace
from profiler.agent.pipeline import Pipeline
from profiler.agent.signals import Signals
from profiler.agent.window import (
    SHORTEST_DRAIN_PERIOD_S,
    BusyTime,
    Clocks,
    Edge,
    OpenWindow,
    drain_period_s,
    split_drain,
)
from profiler.processes.rules import Rules
from profiler.text import listed
from storage.profile import Accounting, Loss, Profile
from symbolizer.text import readable

log = logging.getLogger(__name__)

_NAME_TRACERS_EVERY_NS = 600 * 10**9
_TRACERS_NAMED = 5
_FORGET = 0.9
"""How much of the longest delay of a drain, and of the most work, still counts after one more."""
_TABLES_S, _LAST_TABLES_S = 1.0, 5.0
"""How long the closing of a window waits for the tables that its copied stacks need, and how long
after the last tick, when nothing is late."""


class _Part(NamedTuple):
    """A drain, or what came of one after an edge."""

    drain: Drain
    ended: Clocks


class _Held(NamedTuple):
    """What was counted after an edge, while the window that ends there is still open."""

    at: Clocks
    parts: list[_Part]


class Recorder:
    """Samples until it is closed; `step` now and then, `close_window` whenever a profile is due.

    Raises:
        BpfError, RefusedError: on construction, when this host cannot be sampled; the message says
            what to do.
    """

    copied_bytes_per_s = 4 << 20
    """Of stacks that the kernel cannot walk yet, on each CPU: at 99 Hz for 42 KB each."""
    stages: Callable[..., Pipeline] = Pipeline
    """Makes the stages; whoever wants to watch them makes others."""

    def __init__(
        self,
        config: SamplerConfig,
        cache: Path | None = None,
        rules: Rules | None = None,
        commands: Collection[int] = (),
        longest_window_s: float = math.inf,
    ) -> None:
        """Load everything; nothing is sampled yet.

        `rules` name services, `commands` are children of this process that are not the profiler's
        own: the commands that it records. If this process was stopped for hours, the window is cut
        into parts of at most `longest_window_s`: see `take_closed`.
        """
        refuse_time_namespace()
        allow_open_files()
        return_large_blocks()
        self.config = config
        self.period_ns = 1_000_000_000 // config.frequency_hz
        self._commands = commands
        self._longest_ns = None if math.isinf(longest_window_s) else round(longest_window_s * 1e9)
        self._closed: list[Profile] = []
        self._is_sampling = False
        self._edge: Edge | None = None
        self._held: _Held | None = None
        self._late_s = self._work = 0.0
        self._names_tracers_ns = 0
        self.tracers: tuple[str, ...] = ()
        """BPF programs of others during which ticks may have been skipped, when last seen."""
        self._busy = BusyTime()
        nice = priority.chosen_nice(os.environ)
        with contextlib.ExitStack() as opened:
            # Some seconds of work come before the first tick: a busy host must not wait a minute.
            opened.enter_context(priority.raised(nice))
            sampled = replace(
                config, copied_bytes_per_s=self.copied_bytes_per_s, compiling_nice=nice
            )
            folder = (cache or default_cache()).absolute()
            stages = self._stages = self.stages(sampled, folder, rules or Rules(), commands)
            opened.callback(stages.close)
            self.sampler, self.readers, self.files = stages.sampler, stages.readers, stages.files
            self.address_spaces, self.labeler = stages.address_spaces, stages.labeler
            self.unwinding, self.copied = stages.unwinding, stages.copied
            self.python, self.threads = stages.python, stages.threads
            self.names, self.jit, self.cost = stages.names, stages.jit, stages.cost
            self._counted = stages.open(OpenWindow(self.period_ns, self._clocks))
            self._drained = self._window.begun
            self._opened = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def _window(self) -> OpenWindow:
        return self._counted.window

    def _clocks(self) -> Clocks:
        return Clocks.now(self._busy.read(), self.readers.cpu_ns)

    def start(self) -> None:
        """Begin to tick. A command that still waits to exec is not looked at as what it is now."""
        if not self._commands:
            self._stages.scan()
        try:
            self._stages.warm_up()
        except Exception as error:  # noqa: BLE001 - it only makes the first stacks better
            log.warning("cannot load tables before the first tick error=%r", error)
        # What is there now stays: each full collection would look at it again, for 30 ms.
        gc.collect()
        gc.freeze()
        self._opened.callback(gc.unfreeze)
        return_freed_pages()  # the kernel's symbols and the first tables took some megabytes
        self._counted = self._stages.open(OpenWindow(self.period_ns, self._clocks))
        self._drained = self._window.begun
        if not self.sampler.counts_skipped:
            log.warning("ticks that the kernel skips beside other BPF programs are not counted")
        self.sampler.start()
        self._is_sampling = True

    def stop(self) -> None:
        """End ticking; `close_window` still returns what was counted."""
        self._is_sampling = False
        self.readers.hasten()
        self.sampler.stop()
        self._window.end()

    @property
    def counts(self) -> Accounting:
        """Where the ticks of the open window have gone up to the last step."""
        return self._window.accounting(self._stages.host, {})

    @property
    def drain_period_s(self) -> float:
        """How long a step may wait if nobody watches: fewer, larger steps cost less.

        It is shorter where drains come late, so that the maps are not full before, and where they
        are much work.
        """
        lasts_s = self.config.lasts_s(max(1, self.sampler.cpus))
        return drain_period_s(lasts_s, self._late_s, self._work)

    def fileno(self) -> int:
        """Return a descriptor, readable when `catch_up` should not wait for the next step."""
        return self._stages.fileno()

    def watch(self, signals: Signals) -> None:
        """Let a loop be woken when `catch_up` is to be called; see `rests_until_s`."""
        signals.watch(self._stages.fileno(), may_rest=True)
        signals.watch(self._stages.urgent_fd)

    @property
    def rests_until_s(self) -> float:
        """For `Signals.wait`: until then requests and answers gather, to be met at once."""
        return self._stages.rests_until_s

    def catch_up(self) -> None:
        """Read the kernel's records of processes, and answer the requests of its walks."""
        self._stages.catch_up()

    def step(self) -> None:
        """Take in what was counted since the last step. To be called every `drain_period_s`."""
        self._stages.refresh()
        self.drain()
        self._stages.scan()

    def split_at(self, edge: Edge | None) -> None:
        """Set the moment at which the open window is to end.

        What was counted after it waits for `cut_window`, and then belongs to the next window.
        """
        self._edge = edge

    def drain(self) -> None:
        """Take in what was counted, without looking for new CPUs and services."""
        cpu_s = time.thread_time()
        with self.cost.of("drain"):
            drain = self.sampler.drain()
        try:
            now = self._clocks()
        except BaseException:  # the kernel does not have these ticks any more
            self._window.count(drain)
            self._window.settle()
            self.copied.hold(drain)
            raise
        if Loss.OTHER_TRACER in drain.lost:
            self._name_tracers(now.monotonic_ns)
        begun = self._drained
        ended = self._drained = begun.at(now, drain.ended_ns)
        span_s = ended.since(begun) / 1e9
        self._late_s = max(0.0, span_s - self.drain_period_s, self._late_s * _FORGET)
        if self._held is not None:
            self._held.parts.append(_Part(drain, ended))
        elif self._edge and begun.monotonic_ns <= self._edge.monotonic_ns < ended.monotonic_ns:
            at = begun.at(ended, self._edge.monotonic_ns)
            before, after = split_drain(drain, [each.monotonic_ns for each in (begun, at, ended)])
            self._held = _Held(at, [_Part(after, ended)])
            self._fold_until(before, begun, at)
        else:
            self._fold_until(drain, begun, ended)
        work = (time.thread_time() - cpu_s) / max(span_s, SHORTEST_DRAIN_PERIOD_S)
        self._work = max(work, self._work * _FORGET)

    def _name_tracers(self, now_ns: int) -> None:
        """Say now and then which programs of others may have kept ours from running."""
        if now_ns < self._names_tracers_ns:
            return
        self._names_tracers_ns = now_ns + _NAME_TRACERS_EVERY_NS
        try:
            tracers = find_tracers()
        except SyscallError as error:
            log.debug("cannot list BPF programs: %s", error)
            return
        self.tracers = tuple(
            f"{readable(each.name) or f'program {each.number}'} ({each.kind})" for each in tracers
        )
        if self.tracers:
            suspects = listed(self.tracers, _TRACERS_NAMED)
            log.warning("ticks are skipped while BPF programs of others run suspects=%s", suspects)
        else:
            log.info("ticks were skipped while this agent read its maps, or by what has ended")

    def _fold_until(self, drain: Drain, begun: Clocks, ended: Clocks) -> None:
        """Count a drain in the open window; cut that if it has become longer than one may be."""
        cuts = self._window.begun.cuts(ended, self._longest_ns) if self._longest_ns else []
        if not cuts:
            self._stages.fold(self._counted, drain)
            return
        moments = (self._window.begun, *cuts, ended)
        edges_ns = [max(begun.monotonic_ns, moment.monotonic_ns) for moment in moments]
        *parts, last = split_drain(drain, edges_ns)
        span_s = ended.since(self._window.begun) / 1e9
        log.warning("drained late span_s=%.0f windows=%d", span_s, len(edges_ns) - 1)
        first, start_ns = self._window.begun, self._window.start_ns
        errors = []
        for part, cut in (*zip(parts, cuts, strict=True), (last, None)):
            try:
                self._stages.fold(self._counted, part)
            except Exception as error:  # noqa: BLE001 - raised below: the other parts come first
                errors.append(error)
            if cut is None:
                break
            edge_ns = start_ns + cut.since(first)
            successor = OpenWindow(self.period_ns, self._clocks, begun=cut, edge_ns=edge_ns)
            try:
                self._closed.append(self._cut(successor, edge_ns))
            except Exception as error:  # noqa: BLE001
                errors.append(error)
        if errors:
            raise errors[0]

    def take_closed(self) -> list[Profile]:
        """Return the windows that ended without being asked for, each once, the oldest first."""
        closed, self._closed = self._closed, []
        return closed

    def close_window(self, edge: Edge | None = None) -> Profile:
        """Return the profile since `start` or the last call, named as well as this host can.

        `edge` is the moment, a while ago, at which this window ends and the next begins, where
        windows are to be aligned; by default it is that of the last drain.
        """
        self.split_at(edge)
        self.drain()
        return self.cut_window(edge)

    def cut_window(self, edge: Edge | None = None) -> Profile:
        """Return the profile up to an edge that `split_at` was told, or up to the last drain."""
        if edge is not None and edge.utc_ns <= self._window.start_ns:
            # The window was opened so late that the edge it was to end at had passed.
            edge = None
        waits_s = _TABLES_S if self._is_sampling else _LAST_TABLES_S
        self._stages.catch_up_until(lambda: not self.copied.is_waiting, waits_s)
        held, self._held, self._edge = self._held, None, None
        if edge is None:
            self._fold_held(held)
            return self._cut(OpenWindow(self.period_ns, self._clocks, begun=self._drained), None)
        begun = held.at if held else self._drained
        successor = OpenWindow(self.period_ns, self._clocks, begun=begun, edge_ns=edge.utc_ns)
        try:
            return self._cut(successor, edge.utc_ns)
        finally:
            self._fold_held(held)

    def _fold_held(self, held: "_Held | None") -> None:
        if held is None:
            return
        begun = held.at
        for part in held.parts:
            self._fold_until(part.drain, begun, part.ended)
            begun = part.ended

    def lose(self, counts: Accounting) -> None:
        """Count the ticks of a window that could not be stored in the one that is open."""
        self._window.take_lost(counts)

    def _cut(self, successor: OpenWindow, edge_ns: int | None) -> Profile:
        counted, self._counted = self._counted, self._stages.open(successor)
        window = counted.window
        window.end(successor, edge_ns)
        try:
            return self._stages.finish(counted, is_last=not self._is_sampling)
        except BaseException:
            window.settle()
            self.lose(window.counts)
            raise
        finally:
            return_freed_pages()

    def close(self) -> None:
        self._opened.close()
