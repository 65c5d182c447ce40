"""From ticks to profiles: the pipeline that every recording command runs.

Each second: drain the kernel's maps, bring the processes up to date, find out where each address
lies, and count the stack. What others own is read by reader children: labels and names are asked
for when something is first seen, and are there when the window is closed, or in the next one.

The module is long because it is the only one that knows all stages; each does its work elsewhere.
"""

import contextlib
import logging
import math
import os
import select
import socket
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np

from bpf import perf_event
from bpf.errors import SyscallError
from bpf.records import Rings
from bpf.sampler import Sampler, SamplerConfig
from bpf.samples import Drain, RawSample
from bpf.tracers import find_tracers
from profiler.agent import priority
from profiler.agent.copied_stacks import ByMappings, CopiedStacks
from profiler.agent.cost import Cost, return_large_blocks
from profiler.agent.frames import FrameNumbers, Numbers
from profiler.agent.mapped_files import MappedFiles
from profiler.agent.names import CACHE_BYTES, Names
from profiler.agent.readers import Answer, Readers
from profiler.agent.supervise import RefusedError
from profiler.agent.unwind_tables import Unwinding
from profiler.agent.window import BusyTime, Clocks, Edge, OpenWindow, drain_period_s, split_drain
from profiler.processes.activity import Activity
from profiler.processes.address_spaces import AddressSpaces
from profiler.processes.facts import Facts, request
from profiler.processes.generations import clock_offsets, owner_of, parent_in_proc
from profiler.processes.labels import Labeler, Subject, with_instance
from profiler.processes.lifetimes import Lifetimes
from profiler.processes.rules import Rules
from profiler.text import listed
from storage.profile import Accounting, Host, Loss, Profile
from symbolizer.digest import blake2b
from symbolizer.maps import MappingTable
from symbolizer.symbols.kernel import Program
from symbolizer.symbols.table import SymbolCache
from symbolizer.text import readable
from symbolizer.unwind.table import UnwindCache

log = logging.getLogger(__name__)

_NAME_TRACERS_EVERY_NS = 600 * 10**9
_TRACERS_NAMED = 5
_FORGET_LATE = 0.9
"""How much of the longest delay of a drain still counts after one more."""

_SCAN_PERIOD_S = 5.0
"""How often new services are looked for in /proc. Their first seconds are found all the same: a
process's start is known."""

_LIKELY_PROCESSES = 32
"""Their files are asked for before it is known which processes are busy."""
_MAX_BUSY_PROCESSES = 256
_PREPARE_S, _FOLLOW_S = 4.0, 0.4
"""How long the start waits for tables that are built, and for processes to be sampled."""
_TABLES_S = 0.5
"""How long the closing of a window waits for the tables that its copied stacks need."""
_READERS_S = 1.0
"""For how long the closing of a window waits for labels and names that are being read."""
_NEXT_ANSWER_S = 5.0


def this_host() -> Host:
    """Return the name of this host and an id that stays over restarts (from machine-id(5))."""
    name = socket.gethostname()
    seed = name
    for path in (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id")):
        if path.is_file() and (text := path.read_text().strip()):
            seed = text
            break
    # machine-id(5) asks for a keyed hash wherever the id leaves the host.
    return Host(name, blake2b(seed.encode(), digest_size=8, key=b"everflame").hexdigest())


def default_cache() -> Path:
    """Return where symbol tables are kept from one run to the next."""
    if chosen := os.environ.get("EVERFLAME_CACHE"):
        return Path(chosen)
    if os.geteuid() == 0:
        return Path("/var/cache/everflame")
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "everflame"


def _open_cache(folder: Path) -> tuple[Path, "tempfile.TemporaryDirectory[str] | None"]:
    """Return the cache folder, or a temporary one if it cannot be written to."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder, None
    except OSError as error:
        log.warning(
            "cannot write to the cache folder %s: %s; symbols and unwind tables will be built again"
            " next time (set EVERFLAME_CACHE to a folder that can be written)",
            folder,
            error.strerror,
        )
        temporary = tempfile.TemporaryDirectory(prefix="everflame-")
        return Path(temporary.name), temporary


class _Part(NamedTuple):
    """A drain, or what came of one after an edge."""

    drain: Drain
    ended: Clocks


class _Held(NamedTuple):
    """What was counted after an edge, while the window that ends there is still open."""

    at: Clocks
    parts: list[_Part]


Subjects = dict[str, Subject]


class Recorder:
    """Samples until it is closed; `step` now and then, `close_window` whenever a profile is due.

    Raises:
        BpfError, RefusedError: on construction, when this host cannot be sampled; the message says
            what to do.
    """

    copied_bytes_per_s = 4 << 20
    """Of stacks that the kernel cannot walk yet, on each CPU: at 99 Hz for 42 KB each."""

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
        return_large_blocks()
        self.config = config
        self.period_ns = 1_000_000_000 // config.frequency_hz
        self.cost = Cost()
        self._host = this_host()
        self._commands = commands
        self._next_scan_s = 0.0
        self._longest_ns = None if math.isinf(longest_window_s) else round(longest_window_s * 1e9)
        self._closed: list[Profile] = []
        self._is_sampling = False
        self._closing_until_s = 0.0
        self._edge: Edge | None = None
        self._held: _Held | None = None
        self._late_s = 0.0
        self._names_tracers_ns = 0
        self.tracers: tuple[str, ...] = ()
        """BPF programs of others during which ticks may have been skipped, when last seen."""
        self._busy = BusyTime()
        with contextlib.ExitStack() as opened:
            self._load((cache or default_cache()).absolute(), rules or Rules(), opened)
            self._window = OpenWindow(self.period_ns, self._clocks)
            self._subjects: Subjects = {}
            self._frames = self._number_frames()
            self._drained = self._window.begun
            self._opened = opened.pop_all()

    def _load(self, cache: Path, rules: Rules, opened: contextlib.ExitStack) -> None:
        """Load what must be closed, and enter it into `opened` as soon as it is there."""
        # The records first: what maps before the first tick must be known at the first tick.
        self._rings = Rings()
        opened.callback(self._rings.close)
        self._lifetimes = Lifetimes()
        self.address_spaces = AddressSpaces(self._rings, lifetimes=self._lifetimes)
        cache, temporary = _open_cache(cache)
        if temporary:
            opened.callback(temporary.cleanup)
        self.readers = Readers(cache)
        opened.callback(self.readers.close)
        self.files = MappedFiles(self.readers, self.address_spaces)
        # Readers open the files of what runs already while the programs are compiled.
        self._activity = Activity(self.config.pids)
        self.address_spaces.poll()
        self.files.ask_for_all(self._activity.busiest(_LIKELY_PROCESSES))
        config = replace(self.config, copied_bytes_per_s=self.copied_bytes_per_s)
        self.sampler = opened.enter_context(Sampler(config, self._read_meanwhile))
        self.names = Names(self.readers, self.files, SymbolCache(cache, CACHE_BYTES))
        self.unwinding = Unwinding(
            *(self.sampler, self.address_spaces, self.files, self.readers),
            UnwindCache(cache / "unwind"),
        )
        self.copied = CopiedStacks(self.unwinding, self.address_spaces.mappings)
        self._wakes = opened.enter_context(select.epoll())
        for fd in (self._rings.fileno(), self.unwinding.fileno(), self.readers.fileno()):
            self._wakes.register(fd, select.EPOLLIN)
        self.labeler = Labeler(
            rules.services,
            parent_of=self._parent_of,
            commands=self._commands,
            ask=self._ask_for_facts,
            lifetimes=self._lifetimes,
        )
        self._variables = rules.version_variables
        self._wants_commands = any(rule.command is not None for rule in rules.services)
        opened.callback(self.labeler.close)

    def _read_meanwhile(self) -> None:
        self.address_spaces.poll()
        self.readers.poll()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def _parent_of(self, pid: int) -> int | None:
        return self.address_spaces.parent_of(pid) or parent_in_proc(pid)

    def _ask_for_facts(self, pid: int, start_ticks: int) -> None:
        def learn(answer: Answer) -> None:
            self.labeler.learn(pid, start_ticks, Facts.of_json(answer.result))

        values = request(pid, start_ticks, self._variables, wants_command=self._wants_commands)
        self.readers.ask("process", values, learn, turn=0, group=owner_of(pid))

    def _clocks(self) -> Clocks:
        return Clocks.now(self._busy.read(), self.readers.cpu_ns)

    def _scan(self) -> None:
        """Look for new services now and then, whether they are sampled or not."""
        if time.monotonic() >= self._next_scan_s:
            with self.cost.of("labels"):
                self.labeler.scan()
            self._next_scan_s = time.monotonic() + _SCAN_PERIOD_S

    def start(self) -> None:
        """Begin to tick. A command that still waits to exec is not looked at as what it is now."""
        if not self._commands:
            self._scan()
        self._warm_up()
        self._window = OpenWindow(self.period_ns, self._clocks)
        self._subjects = {}
        self._frames = self._number_frames()
        self._drained = self._window.begun
        self._opened.enter_context(priority.raised(priority.chosen_nice(os.environ)))
        if not self.sampler.counts_skipped:
            log.warning("ticks that the kernel skips beside other BPF programs are not counted")
        self.sampler.start()
        self._is_sampling = True

    def _warm_up(self) -> None:
        """Load the tables of what runs already, so that stacks are whole from the first tick on.

        Processes get known to the kernel when they are sampled: some ticks before the start do not
        count.
        """
        pids = self._activity.since(_MAX_BUSY_PROCESSES)
        if not pids:
            return
        self.address_spaces.poll()
        self.unwinding.prepare(pids)
        self._catch_up_until(self.unwinding.is_prepared, _PREPARE_S)
        self.sampler.start()
        self._catch_up_until(lambda: self.unwinding.follows(pids), _FOLLOW_S)
        self.sampler.stop()
        self.sampler.drain()

    def _catch_up_until(self, is_done: Callable[[], bool], timeout_s: float) -> None:
        until_s = time.monotonic() + timeout_s
        while not is_done() and time.monotonic() < until_s:
            select.select([self._wakes], [], [], 0.02)
            self.catch_up()

    def stop(self) -> None:
        """End ticking; `close_window` still returns what was counted."""
        self._is_sampling = False
        self.readers.hasten()
        self.sampler.stop()
        self._window.end()

    @property
    def counts(self) -> Accounting:
        """Where the ticks of the open window have gone up to the last step."""
        return self._window.accounting(self._host, {})

    @property
    def drain_period_s(self) -> float:
        """How long a step may wait if nobody watches: fewer, larger steps cost less.

        It is shorter where drains come late, so that the maps are not full before.
        """
        return drain_period_s(self.config.lasts_s(len(perf_event.online_cpus())), self._late_s)

    def fileno(self) -> int:
        """Return a descriptor, readable when `catch_up` should not wait for the next step."""
        return self._wakes.fileno()

    def catch_up(self) -> None:
        """Read the kernel's records of processes, and answer the requests of its walks."""
        with self.cost.of("drain"):
            self.sampler.collect()
        with self.cost.of("processes"):
            self.address_spaces.poll()
        with self.cost.of("unwind"):
            self.unwinding.catch_up()
            self.copied.advance()
        self.readers.poll()
        with self.cost.of("symbolize"):
            self.names.ask()

    def step(self) -> None:
        """Take in what was counted since the last step. To be called every `drain_period_s`."""
        with self.cost.of("drain"):
            self.sampler.refresh_cpus()
            self._rings.refresh()
        self.drain()
        self._scan()

    def split_at(self, edge: Edge | None) -> None:
        """Set the moment at which the open window is to end.

        What was counted after it waits for `cut_window`, and then belongs to the next window.
        """
        self._edge = edge

    def drain(self) -> None:
        """Take in what was counted, without looking for new CPUs and services."""
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
        late_s = ended.since(begun) / 1e9 - self.drain_period_s
        self._late_s = max(0.0, late_s, self._late_s * _FORGET_LATE)
        if self._held is not None:
            self._held.parts.append(_Part(drain, ended))
        elif self._edge and begun.monotonic_ns <= self._edge.monotonic_ns < ended.monotonic_ns:
            at = begun.at(ended, self._edge.monotonic_ns)
            before, after = split_drain(drain, [each.monotonic_ns for each in (begun, at, ended)])
            self._held = _Held(at, [_Part(after, ended)])
            self._fold_until(before, begun, at)
        else:
            self._fold_until(drain, begun, ended)

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
        log.warning(
            "ticks are skipped while BPF programs of others run suspects=%s",
            listed(self.tracers, _TRACERS_NAMED) or "unknown",
        )

    def _fold_until(self, drain: Drain, begun: Clocks, ended: Clocks) -> None:
        """Count a drain in the open window; cut that if it has become longer than one may be."""
        cuts = self._window.begun.cuts(ended, self._longest_ns) if self._longest_ns else []
        if not cuts:
            self._fold(drain)
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
                self._fold(part)
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
        self._catch_up_until(lambda: not self.copied.is_waiting, _TABLES_S)
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
        window, frames = self._window, self._frames
        self._window = successor
        subjects, self._subjects = self._subjects, {}
        self._frames = self._number_frames()
        window.end(successor, edge_ns)
        self._closing_until_s = time.monotonic() + _READERS_S
        try:
            self._add(window, frames, subjects, self._release(window, is_closed=True))
            window.settle()
            with self.cost.of("labels"):
                self._label(window, subjects)
            with self.cost.of("symbolize"):
                return self._name(window)
        except BaseException:
            window.settle()
            self.lose(window.counts)
            raise

    def _label(self, window: OpenWindow, subjects: Mapping[str, Subject]) -> None:
        """Replace what stood for the labels of a window. What is not read by then comes later."""
        sampled = subjects.values()
        self._wait_for_readers(lambda: self.labeler.is_complete(sampled))
        instances = {each.source: self.labeler.instance_of(each) for each in sampled}
        window.builder.relabel(lambda key: with_instance(key, instances))

    def _name(self, window: OpenWindow) -> Profile:
        builder = window.builder
        named = self.names.name(builder.unnamed_locations(), self._wait_for_readers)
        builder.replace_locations(named.locations)
        for location, frames in named.frames:
            window.bounded.name(location, frames)
        window.bounded.add_modules(named.modules)
        misses = Counter(named.misses)
        misses.update({str(reason): number for reason, number in self.labeler.misses.items()})
        self.labeler.misses.clear()
        accounting = window.accounting(self._host, misses)
        services = self.labeler.present(*window.boottime_ns)
        return builder.build(window.window, replace(accounting, services=services))

    def _wait_for_readers(self, is_done: Callable[[], bool]) -> None:
        """Wait for what a window lacks: a second in all, after the last tick while answers come."""
        if self.readers.wait(self._closing_until_s, is_done) or self._is_sampling:
            return
        answered = -1
        while answered != self.readers.answered:
            answered = self.readers.answered
            if self.readers.wait(time.monotonic() + _NEXT_ANSWER_S, is_done):
                return

    def close(self) -> None:
        self._opened.close()

    def _fold(self, drain: Drain) -> None:
        window = self._window
        self.copied.hold(drain)
        window.count(drain)
        try:
            with self.cost.of("processes"):
                self.address_spaces.poll()
                self.names.add_kernel_programs(
                    [
                        Program(readable(name), start, size)
                        for start, size, name in self._rings.take_kernel_symbols()
                    ]
                )
                groups = self._by_mappings(drain.samples)
            with self.cost.of("unwind"):
                self.unwinding.note(groups)
                self.unwinding.catch_up()
                self.copied.advance()
            for mappings, samples in self._release(window).items():
                groups[mappings] += samples
            self._add(window, self._frames, self._subjects, groups)
            with self.cost.of("labels"):  # while they can be read: these may wait for long
                self._note(self.copied.waiting, self._subjects)
        finally:
            window.settle()
            self.address_spaces.expire(time.monotonic_ns())

    def _release(self, window: OpenWindow, *, is_closed: bool = False) -> ByMappings:
        """Take the copied stacks that wait no more, or all; their ticks are to be added now."""
        groups = self.copied.take_all() if is_closed else self.copied.take()
        window.release(sum(map(len, groups.values())))
        return groups

    def _add(
        self,
        window: OpenWindow,
        frames: FrameNumbers,
        subjects: Subjects,
        groups: Mapping[MappingTable, list[RawSample]],
    ) -> None:
        with self.cost.of("symbolize"):
            samples, stacks = self._locate(frames, groups)
            self.names.ask()
        with self.cost.of("labels"):
            noted = self._note(samples, subjects)
        with self.cost.of("fold"):
            for sample, stack, subject in zip(samples, stacks, noted, strict=True):
                window.add(sample, stack, subject.key)

    def _note(self, samples: Sequence[RawSample], subjects: Subjects) -> list[Subject]:
        if not samples:
            return []
        noted = self.labeler.note(samples)
        subjects.update({subject.source: subject for subject in noted})
        return noted

    def _by_mappings(self, samples: Sequence[RawSample]) -> dict[MappingTable, list[RawSample]]:
        groups: dict[MappingTable, list[RawSample]] = defaultdict(list)
        for sample in samples:
            table = self.address_spaces.mappings(sample.pid, sample.last_ns, sample.start_ns)
            groups[table].append(sample)
        return groups

    def _locate(
        self, frames: FrameNumbers, groups: Mapping[MappingTable, list[RawSample]]
    ) -> tuple[list[RawSample], list[Numbers]]:
        """Return the samples group by group and their stacks as location numbers, root first."""
        samples = [sample for group in groups.values() for sample in group]
        user = [stack for table, group in groups.items() for stack in frames.user(table, group)]
        kernel = frames.kernel([sample.kernel for sample in samples])
        # Leaf first becomes root first, here and nowhere else.
        return samples, [
            np.concatenate([user_part[::-1], kernel_part[::-1]])
            for user_part, kernel_part in zip(user, kernel, strict=True)
        ]

    def _number_frames(self) -> FrameNumbers:
        """Return numbers for the open window: they are those of its builder."""
        bounded = self._window.bounded
        return FrameNumbers(
            self._window.builder.location,
            self.names.locate,
            self.names.locate_kernel,
            bounded.rest,
            bounded.locations,
        )


def refuse_time_namespace() -> None:
    """Refuse to sample where the clocks differ from those that samples carry.

    Raises:
        RefusedError: they do.
    """
    if offsets := clock_offsets():
        differ = " and ".join(f"{name} by {seconds} s" for name, seconds in offsets.items())
        raise RefusedError(
            f"cannot sample in a time namespace: its clocks differ from the kernel's ({differ});"
            " start the profiler outside it"
        )
