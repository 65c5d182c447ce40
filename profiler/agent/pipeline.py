"""The stages that each drain goes through, from samples to stacks in a window.

They bring the processes up to date, find out where each address lies, and count the stack. What
others own is read by reader children: labels and names are asked for when something is first seen,
and are there when the window is closed, or in the next one.
"""

import contextlib
import select
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from bpf.frames import leaf_address
from bpf.records import Rings
from bpf.sampler import Sampler, SamplerConfig
from bpf.samples import Drain, RawSample, StopReason
from profiler.agent.copied_stacks import ByMappings, CopiedStacks
from profiler.agent.cost import Cost
from profiler.agent.frames import FrameNumbers, Locators, Numbering, Numbers
from profiler.agent.host import open_cache, this_host
from profiler.agent.jit_names import JitNames
from profiler.agent.mapped_files import MappedFiles
from profiler.agent.names import CACHE_BYTES, Names
from profiler.agent.python_code import CPYTHON, PythonCode
from profiler.agent.reader_child import Answer
from profiler.agent.readers import Readers
from profiler.agent.thread_names import ThreadNames
from profiler.agent.unwind_tables import Unwinding
from profiler.agent.window import OpenWindow
from profiler.processes.activity import Activity
from profiler.processes.address_spaces import AddressSpaces
from profiler.processes.facts import Facts, request
from profiler.processes.generations import owner_of, parent_in_proc
from profiler.processes.labels import Labeler, Subject, with_instance
from profiler.processes.lifetimes import Lifetimes
from profiler.processes.rules import Rules
from storage.profile import Profile, runtime_counts
from symbolizer.maps import MappingTable
from symbolizer.symbols.kernel import Program
from symbolizer.symbols.table import SymbolCache
from symbolizer.text import readable
from symbolizer.unwind.table import UnwindCache

_SCAN_PERIOD_S = 5.0
"""How often new services are looked for in /proc. Their first seconds are found all the same: a
process's start is known."""

_LIKELY_PROCESSES = 32
"""Their files are asked for before it is known which processes are busy."""
_MAX_BUSY_PROCESSES = 256
_PREPARE_S, _FOLLOW_S = 4.0, 0.4
"""How long the start waits for tables that are built, and for processes to be sampled."""
_REST_S, _SHORT_REST_S = 0.25, 0.05
"""For how long what comes is left to gather: each look costs half a millisecond, and ticks that
cannot be walked until then are copied. It is shorter while readers have been asked for something or
copies take much of their room; there is none while more waits for the readers, as a child is given
the next table when it has answered with the last one."""
_MUCH_COPIED = 0.05
_READERS_S = 0.7
"""For how long the closing of a window waits for labels and names that are being read."""
_NEXT_ANSWER_S, _LAST_S = 5.0, 15.0
"""After the last tick: how long the next answer is waited for, and how long all of them."""
_NO_MAPPING = StopReason.NO_MAPPING.label

Subjects = dict[str, Subject]


class Counted(NamedTuple):
    """An open window, what numbers its frames, and what its samples are of."""

    window: OpenWindow
    frames: FrameNumbers
    subjects: Subjects


class Pipeline:
    """Owns the stages. Nothing is sampled before `sampler.start`.

    Raises:
        BpfError: on construction, when this host cannot be sampled.
    """

    def __init__(
        self, config: SamplerConfig, cache: Path, rules: Rules, commands: Collection[int]
    ) -> None:
        """Load everything; see `Recorder` for the arguments."""
        self.host = this_host()
        self.cost = Cost()
        self._commands = commands
        self._next_scan_s = self._caught_up_s = self._copied_share = 0.0
        self._closing_until_s = 0.0
        self._is_last = False
        with contextlib.ExitStack() as opened:
            self._load(config, cache, rules, opened)
            self._opened = opened.pop_all()

    def close(self) -> None:
        self._opened.close()

    def _load(
        self, config: SamplerConfig, cache: Path, rules: Rules, opened: contextlib.ExitStack
    ) -> None:
        """Load what must be closed, and enter it into `opened` as soon as it is there."""
        # The records first: what maps before the first tick must be known at the first tick.
        self._rings = Rings()
        opened.callback(self._rings.close)
        self._lifetimes = Lifetimes()
        self.address_spaces = AddressSpaces(self._rings, lifetimes=self._lifetimes)
        cache, temporary = open_cache(cache)
        if temporary:
            opened.callback(temporary.cleanup)
        self.readers = Readers(cache)
        opened.callback(self.readers.close)
        self.files = MappedFiles(self.readers, self.address_spaces)
        # Readers open the files of what runs already while the programs are compiled.
        self._activity = Activity(config.pids)
        self.address_spaces.poll()
        self.files.ask_for_all([*self._commands, *self._activity.busiest(_LIKELY_PROCESSES)])
        self.sampler = opened.enter_context(Sampler(config, self._read_meanwhile))
        self.jit = JitNames(self.readers, self._lifetimes.begin_of)
        self.names = Names(self.readers, self.files, SymbolCache(cache, CACHE_BYTES), self.jit)
        self.unwinding = Unwinding(
            *(self.sampler, self.address_spaces, self.files, self.readers),
            UnwindCache(cache / "unwind"),
        )
        self.python = PythonCode(self.unwinding.runtimes.interpreters)
        self.threads = ThreadNames(self.readers, self.unwinding.interpreter_in)
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
            thread_of=self.threads.label,
        )
        self._variables = rules.version_variables
        self._wants_commands = any(rule.command is not None for rule in rules.services)
        opened.callback(self.labeler.close)

    def _read_meanwhile(self) -> None:
        self.address_spaces.poll()
        self.readers.poll()

    def _parent_of(self, pid: int) -> int | None:
        return self.address_spaces.parent_of(pid) or parent_in_proc(pid)

    def _ask_for_facts(self, pid: int, start_ticks: int) -> None:
        def learn(answer: Answer) -> None:
            self.labeler.learn(pid, start_ticks, Facts.of_json(answer.result))

        values = request(pid, start_ticks, self._variables, wants_command=self._wants_commands)
        owner = self.files.owners.of_process(pid)
        self.readers.ask("process", values, learn, turn=0, group=owner_of(pid), owner=owner)

    def fileno(self) -> int:
        """Return a descriptor, readable when `catch_up` should not wait for the next step."""
        return self._wakes.fileno()

    @property
    def rests_until_s(self) -> float:
        """When `fileno` needs to be looked at again (`time.monotonic()`); `urgent_fd` always is."""
        if self.readers.has_waiting:
            return self._caught_up_s
        is_busy = not self.readers.is_idle or self._copied_share > _MUCH_COPIED
        return self._caught_up_s + (_SHORT_REST_S if is_busy else _REST_S)

    @property
    def urgent_fd(self) -> int:
        """A descriptor that is readable when the kernel's records need their room."""
        return self._rings.fileno()

    def catch_up(self) -> None:
        """Read the kernel's records of processes, and answer the requests of its walks."""
        with self.cost.of("drain"):
            self._copied_share = self.sampler.collect()
            self.python.take(self.sampler.take_codes())
        with self.cost.of("processes"):
            self.address_spaces.poll()
        with self.cost.of("unwind"):
            self.unwinding.catch_up()
            self.copied.advance()
        with self.cost.of("symbolize"):
            self.names.ask()
        self._caught_up_s = time.monotonic()

    def catch_up_until(self, is_done: Callable[[], bool], timeout_s: float) -> None:
        """Catch up until `is_done`, or for so long."""
        until_s = time.monotonic() + timeout_s
        while not is_done() and time.monotonic() < until_s:
            select.select([self._wakes], [], [], 0.02)
            self.catch_up()

    def warm_up(self) -> None:
        """Load the tables of what runs already, so that stacks are whole from the first tick on.

        Processes get known to the kernel when they are sampled: some ticks before the start do not
        count. The kernel's symbols take a quarter of a second, which would make a drain late.
        """
        while not self.names.read_kernel():
            self.catch_up()
        pids = self._activity.since(_MAX_BUSY_PROCESSES)
        self.address_spaces.poll()
        self.unwinding.prepare([*self._commands, *pids])
        self.catch_up_until(self.unwinding.is_prepared, _PREPARE_S)
        self.unwinding.learn_interpreters(self._commands)
        if not pids:
            return
        self.sampler.start()
        self.catch_up_until(lambda: self.unwinding.follows(pids), _FOLLOW_S)
        self.sampler.stop()
        self.sampler.drain()

    def refresh(self) -> None:
        """Take in CPUs that came online."""
        with self.cost.of("drain"):
            self.sampler.refresh_cpus()
            self._rings.refresh()

    def scan(self) -> None:
        """Look for new services now and then, whether they are sampled or not."""
        if time.monotonic() >= self._next_scan_s:
            with self.cost.of("labels"):
                is_all = self.labeler.scan()
            self._next_scan_s = time.monotonic() + (_SCAN_PERIOD_S if is_all else 0.0)

    def open(self, window: OpenWindow) -> Counted:
        """Return a window to count in."""
        bounded = window.bounded
        frames = FrameNumbers(
            Numbering(window.builder.location, window.builder.knows, bounded.rest),
            Locators(
                *(self.names.locate, self.names.locate_kernel, self.python.locate),
                self.unwinding.is_loop_certain,
            ),
            bounded.locations,
        )
        return Counted(window, frames, {})

    def fold(self, counted: Counted, drain: Drain) -> None:
        """Count what was drained in an open window."""
        window = counted.window
        self.python.take(self.sampler.take_codes())
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
            self._add(counted, groups)
            self._doubt(groups)
            with self.cost.of("labels"):  # while they can be read: these may wait for long
                self._note(self.copied.waiting, counted.subjects)
        finally:
            window.settle()
            self.address_spaces.expire(time.monotonic_ns())

    def _doubt(self, groups: ByMappings) -> None:
        """Have the mappings of a process read again that was in code which they do not have."""
        for mappings, samples in groups.items():
            for sample in samples:
                if sample.stop == _NO_MAPPING and mappings.find(leaf_address(sample.user))[0] < 0:
                    self.address_spaces.doubt(sample.pid, sample.start_ns)

    def finish(self, counted: Counted, *, is_last: bool) -> Profile:
        """Return the profile of a window that has ended, named as well as this host can.

        What is being read is waited for, for a second in all; if `is_last`, up to 15 s, as long as
        answers come.
        """
        self._closing_until_s = time.monotonic() + _READERS_S
        self._is_last = is_last
        self._add(counted, self._release(counted.window, is_closed=True))
        counted.window.settle()
        with self.cost.of("labels"):
            self._label(counted)
        with self.cost.of("symbolize"):
            return self._name(counted)

    def _add(
        self,
        counted: Counted,
        groups: Mapping[MappingTable, list[RawSample]],
    ) -> None:
        with self.cost.of("symbolize"):
            samples, stacks = self._locate(counted.frames, groups)
            self.names.ask()
        with self.cost.of("labels"):
            self.threads.note(groups)
            noted = self._note(samples, counted.subjects)
        with self.cost.of("fold"):
            for sample, stack, subject in zip(samples, stacks, noted, strict=True):
                counted.window.add(sample, stack, subject.key)

    def _release(self, window: OpenWindow, *, is_closed: bool = False) -> ByMappings:
        """Take the copied stacks that wait no more, or all; their ticks are to be added now."""
        groups = self.copied.take_all() if is_closed else self.copied.take()
        window.release(sum(map(len, groups.values())))
        return groups

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
            user_part[::-1] + kernel_part[::-1]
            for user_part, kernel_part in zip(user, kernel, strict=True)
        ]

    def _label(self, counted: Counted) -> None:
        """Replace what stood for the labels of a window. What is not read by then comes later."""
        sampled = counted.subjects.values()
        self._wait_for_readers(
            lambda: self.labeler.is_complete(sampled) and self.threads.is_complete()
        )
        instances = {each.source: self.labeler.instance_of(each) for each in sampled}
        counted.window.builder.relabel(
            lambda key: with_instance(self.threads.with_names(key), instances)
        )
        self.threads.end_window()

    def _name(self, counted: Counted) -> Profile:
        window = counted.window
        builder = window.builder
        named = self.names.name(builder.unnamed_locations(), self._wait_for_readers)
        builder.replace_locations(window.bounded.affordable(named.locations))
        for location, frames in named.frames:
            window.bounded.name(location, frames)
        window.bounded.add_modules(named.modules)
        misses = Counter(named.misses)
        misses.update({str(reason): number for reason, number in self.labeler.misses.items()})
        self.labeler.misses.clear()
        misses.update(runtime_counts(CPYTHON, counted.frames.python))
        self.python.counts.update(counted.frames.python)
        accounting = window.accounting(self.host, misses)
        services = self.labeler.present(*window.boottime_ns)
        return builder.build(window.window, replace(accounting, services=services))

    def _wait_for_readers(self, is_done: Callable[[], bool]) -> None:
        """Wait for what a window lacks: a second in all, after the last tick while answers come."""
        if self.readers.wait(self._closing_until_s, is_done) or not self._is_last:
            return
        answered, last_s = -1, self._closing_until_s + _LAST_S
        while answered != self.readers.answered:
            answered = self.readers.answered
            until_s = min(time.monotonic() + _NEXT_ANSWER_S, last_s)
            if self.readers.wait(until_s, is_done) or time.monotonic() >= last_s:
                return
