"""Which service instance each process belongs to, and how long each instance runs.

A process is looked at once per exec: its stat and cgroup in /proc, which the kernel alone writes,
at once, and then its facts, which others read (`facts`). Its service is the first of: the
operator's rules, its pod's workload or its container's name, its systemd unit, what it runs. Kernel
threads are `[kernel]`, the profiler and its children `everflame`.

A **service instance** is what one version runs in: a container, a unit, or the processes that
descend from one another and run the same. Its version comes from its oldest process and holds for
all of them; when that one ends, from the oldest that is left. When all have ended, the next one in
the same cgroup is a new instance.

What processes say about themselves can mislead those who look at that process, and nobody else.
"""

import os
import socket
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar

from profiler.processes.cgroups import Place, parse_cgroups
from profiler.processes.containers import Container, Containers, workload
from profiler.processes.facts import Ask, Facts
from profiler.processes.generations import (
    TICK_NS,
    Generation,
    boottime_ns,
    is_alive,
    list_processes,
    order_of,
    parent_in_proc,
    read_cgroups,
    read_stat,
)
from profiler.processes.instance import SHORT_ID, Instance, instance_labels, own_version
from profiler.processes.lifetimes import Lifetime, Lifetimes
from profiler.processes.presence import Presence
from profiler.processes.programs import describe
from profiler.processes.rules import ServiceRule
from storage.profile import Labels, make_labels
from symbolizer.files import ProcessFiles
from symbolizer.text import readable

KERNEL_SERVICE = "[kernel]"
OWN_SERVICE = "everflame"

MAX_ANCESTORS = 32

_MAX_READ_PER_SCAN = 250  # after the first scan; 0.13 ms each
_MAX_ENDED = 1_024  # processes that were read and have ended, for their late samples and children
_MAX_WAITING = 4_096  # of those that have ended, too
_MAX_PLACES = 1_024
"""Paths of cgroups that are kept parsed, up to 6 KB each. Parsing one takes 0.1 ms."""
_NAMES_WITHIN_NS = 60_000_000_000
"""For how long after its first process a container's name is looked for on disk."""

_MAX_PRESENCES = 16_384
"""Instances whose time is counted. Beyond it new ones have no `present_ns`, but are counted."""

_RECHECKED_PER_SCAN = 64
"""Processes that a scan looks at again, in turn, for an exec or a new cgroup without a sample."""
_YOUNG_NS = 2_000_000_000
"""A process read so soon after its start is looked at again: it may not have exec'd yet."""

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


class Instances:
    """The running processes and their service instances. Not thread-safe.

    Attributes:
        reads: how many processes were read.
        live: running processes by pid, as they were last read.
        kernel: the labels of kernel threads.
        containers: what container runtimes' files say.
        on_join: called with each process whose service is known now.
        asleep_ns: what CLOCK_BOOTTIME was ahead of CLOCK_MONOTONIC at the last scan.
    """

    def __init__(
        self,
        rules: Sequence[ServiceRule],
        *,
        root: Path,
        own_pid: int | None,
        commands: Collection[int],
        host: str | None,
        ask: Ask,
        lifetimes: Lifetimes | None,
    ) -> None:
        """Take what is known of this host, as `Labeler` does."""
        self.reads = 0
        self.live: dict[int, Generation] = {}
        self.containers = Containers(root)
        self.uncounted = 0
        self.on_join: Callable[[Generation], None] = lambda _: None
        self.asleep_ns = _asleep_ns()
        self._rules = tuple(rules)
        self._ask = ask
        self.lifetimes = lifetimes
        self._own_pid = os.getpid() if own_pid is None else own_pid
        self.commands = commands
        self._host = socket.gethostname() if host is None else host
        self._ended: dict[tuple[int, int], Generation] = {}
        self._waiting: dict[tuple[int, int], Generation] = {}
        self._blocked: dict[tuple[int, int], list[Generation]] = {}
        self._missed: set[Generation] = set()
        self._instances: dict[tuple[object, ...], Instance] = {}
        self._nameless: set[Instance] = set()
        self._places: dict[bytes, Place] = {}
        self._presences: dict[Labels, Presence] = {}
        self._young: list[Generation] = []
        self._turn: list[int] = []
        self._scanned_ns = 0
        self._own_version = own_version()
        release = os.uname().release
        self.kernel = make_labels({"service": KERNEL_SERVICE, "version": release})
        self._presences[self.kernel] = Presence()
        self._presences[self.kernel].open(0)

    def scan(self) -> bool:
        """Take in processes that have come and gone. To be called every few seconds.

        Return whether all were: of thousands that come at once each call takes in a part.
        """
        now_ns = boottime_ns()
        inodes = list_processes()
        gone_ns = ((self._scanned_ns or now_ns) + now_ns) // 2  # at some moment since the last scan
        self._leave_missing(inodes, gone_ns)
        new: list[int] = []
        changed: dict[int, Generation] = {}
        for pid, inode in inodes.items():
            process = self.live.get(pid)
            if process is None:
                new.append(pid)
            elif process.inode != inode:  # another process, or the kernel had forgotten the number
                process.inode = inode
                changed[pid] = process
        young, self._young = self._young, []
        changed.update({process.pid: process for process in (*young, *self._next_turn())})
        for process in changed.values():
            if self.live.get(process.pid) is process and not self.is_unchanged(process):
                self.leave(process, gone_ns)
                new.append(process.pid)
        if is_all := not self._scanned_ns or len(new) <= _MAX_READ_PER_SCAN:
            self._read_all(new, inodes)
        else:
            for pid in new[:_MAX_READ_PER_SCAN]:
                self.read_with_ancestors(pid, inodes)
        self._find_names()
        self._scanned_ns = now_ns
        self.asleep_ns = _asleep_ns()
        return is_all

    def _leave_missing(self, running: Collection[int], gone_ns: int) -> None:
        """Let go of processes that are not there; when they ended, a record may still tell."""
        missing = {self.live[pid] for pid in self.live.keys() - running}
        for process in missing:
            if self.lifetimes is None or process in self._missed or process.is_kernel:
                self.leave(process, gone_ns)
        self._missed = {process for process in missing if self.live.get(process.pid) is process}
        if self.lifetimes is not None:
            self.lifetimes.sweep(running, self._scanned_ns, gone_ns)

    def find(self, pid: int, start_ns: int) -> Generation | None:
        """Return the process with this start, reading it if need be."""
        ticks = start_ns // TICK_NS
        process = self.live.get(pid)
        if process is not None and process.stat.start_ticks < ticks:
            self.leave(process, start_ns)
            process = None
        if process is None:
            self.read_with_ancestors(pid)
            process = self.live.get(pid)
        if process is not None and process.stat.start_ticks == ticks:
            return process
        return self._ended.get((pid, ticks))

    def present(self, window_start_ns: int, window_end_ns: int) -> dict[Labels, int]:
        """Return for how long at least one process of each instance ran within a window.

        Times are CLOCK_BOOTTIME, and exact as far as the kernel's records go. Without them starts
        are exact to 10 ms, and ends lie between two scans and are taken to be midway. Ask for
        windows in their order: what ended before one is forgotten.
        """
        present = {}
        for labels, presence in list(self._presences.items()):
            duration_ns = presence.within(window_start_ns, window_end_ns)
            if duration_ns > 0:
                present[labels] = duration_ns
            presence.forget(window_start_ns)
            if presence.is_empty:
                del self._presences[labels]
        return present

    def has_counted(self, life: Lifetime) -> bool:
        """Return whether a lifetime is that of a process that was read and has been let go."""
        ticks = life.start_ns // TICK_NS
        ended = (self._ended.get((life.pid, each)) for each in (ticks, ticks - 1))
        return any(process is not None and life.holds(process.read_ns) for process in ended)

    def labels_of_place(self, place: Place) -> Labels:
        named = self.named_by_rule(place, None, "")
        instance = self._instances.get((place.key, named))
        if instance is not None:
            return instance.labels
        container = self.containers.find(place.container_id, place.pod_uid)
        service = named or self._service(place, container, "")
        return instance_labels(place, container, service, container.version)

    def read_with_ancestors(self, pid: int, inodes: Mapping[int, int] | None = None) -> None:
        """Read a process, its unknown ancestors first: their service may be its own."""
        chain = [pid]
        while len(chain) < MAX_ANCESTORS:
            parent = parent_in_proc(chain[-1])
            if not parent or parent in self.live or parent in chain:
                break
            chain.append(parent)
        self._read_all(chain, inodes or {})

    def leave(self, process: Generation, at_ns: int) -> None:
        """Take note that a process has ended, or that it has become another one."""
        del self.live[process.pid]
        process.left_ns = max(at_ns, process.begin_ns)
        if process.instance is not None:
            self._end(process)
        elif process.is_waiting and len(self._waiting) > _MAX_WAITING:
            self._give_up(process)

    def _end(self, process: Generation) -> None:
        """Take a process that has left out of its instance."""
        instance = process.instance
        assert instance is not None
        process.end()
        self._ended.pop((process.pid, process.stat.start_ticks), None)
        if len(self._ended) >= _MAX_ENDED:
            drop_oldest(self._ended, _MAX_ENDED // 8)
        self._ended[process.pid, process.stat.start_ticks] = process
        del instance.members[process]
        instance.close(process.left_ns)
        if not instance.members:
            del self._instances[instance.key]
            self._nameless.discard(instance)
        elif instance.oldest is process:
            instance.oldest = min(instance.members, key=order_of)
            self._find_version(instance, instance.oldest, is_oldest=True)
            self._relabel(instance)

    def is_unchanged(self, process: Generation) -> bool:
        """Return whether it still runs the same program in the same cgroups; takes in its name."""
        stat = read_stat(process.pid)
        if stat is None or stat.identity != process.stat.identity:
            return False
        if not stat.stack and stat.comm != process.stat.comm:
            return False  # only those who may trace it see where its stack is
        process.stat = stat
        return process.is_kernel or process.cgroups == read_cgroups(process.pid, stat)

    def _read_all(self, pids: Iterable[int], inodes: Mapping[int, int]) -> None:
        """Read processes, the oldest first: parents before children, which inherit versions."""
        starts = [(stat.start_ticks, pid) for pid in pids if (stat := read_stat(pid))]
        for _, pid in sorted(starts):
            if pid not in self.live:
                self._read(pid, inodes.get(pid, 0))

    def _read(self, pid: int, inode: int) -> None:
        read_ns = boottime_ns()
        stat = read_stat(pid)
        cgroups = read_cgroups(pid, stat) if stat else None
        if stat is None or cgroups is None:
            return
        process = Generation(pid, inode, stat, cgroups, read_ns)
        self.reads += 1
        self.live[pid] = process
        if read_ns - process.begin_ns < _YOUNG_NS:
            self._young.append(process)
        if process.is_kernel or process.stat.is_dead:
            return
        process.place = self._place(cgroups)
        parent = self.live.get(stat.parent_pid)
        if parent is not None and parent.stat.start_ticks <= stat.start_ticks:
            process.parent = parent
        process.is_own = pid == self._own_pid or (
            process.parent is not None and process.parent.is_own and pid not in self.commands
        )
        if process.is_own:
            self._describe(process, Facts(stat.stack))
            self._proceed(process)
            return
        if before := self._waiting.get(process.key):  # it has exec'd since
            self._give_up(before)
        process.is_waiting = True
        self._waiting[process.key] = process
        self._ask(*process.key)

    def learn(self, pid: int, start_ticks: int, facts: Facts | None) -> None:
        """Take the facts of a process; None if they could not be read."""
        process = self._waiting.get((pid, start_ticks))
        if process is None or not process.is_waiting:
            return
        is_stale = facts is not None and facts.stack != process.stat.stack
        if facts is None or is_stale:
            if self.live.get(pid) is not process:
                self._give_up(process)
                return
            if not self.is_unchanged(process):  # it has exec'd, or has ended
                self._give_up(process)
                self.leave(process, boottime_ns())
                self._read(pid, process.inode)
                return
            if is_stale:  # what was asked for before its exec; the next answer is about it
                return
        facts = facts or self._facts_of_kernel(process)
        self._describe(process, facts)
        self._proceed(process)

    def _facts_of_kernel(self, process: Generation) -> Facts:
        """Return what the kernel alone knows, of a process that cannot be read."""
        with ProcessFiles(process.pid) as files:
            exe = files.link("exe")
        program = describe(exe, (), process.comm, b"")
        return Facts(process.stat.stack, readable(exe.removesuffix(b" (deleted)")), program)

    @property
    def awaited(self) -> int:
        """How many processes have been asked for their facts."""
        return len(self._waiting)

    def _give_up(self, process: Generation) -> None:
        process.is_waiting = False
        self._waiting.pop(process.key, None)
        for child in self._blocked.pop(process.key, ()):
            self._proceed(child)

    def _proceed(self, process: Generation) -> None:
        """Make a process a member of its instance, when its parent is that of its own."""
        ready = [process]
        while ready:
            process = ready.pop()
            parent = process.parent
            if parent is not None and parent.is_waiting and not process.is_own:
                self._blocked.setdefault(parent.key, []).append(process)
                continue
            process.is_waiting = False
            self._waiting.pop(process.key, None)
            self._join(process)
            ready += self._blocked.pop(process.key, ())

    def _describe(self, process: Generation, facts: Facts) -> None:
        process.program, process.sources, process.exe = facts.program, facts.sources, facts.exe
        if process.is_own:
            process.named = OWN_SERVICE
        elif process.is_part_of_parent and process.parent is not None:
            process.named = process.parent.named
        else:
            process.named = self.named_by_rule(process.place, facts.exe, facts.command)

    def _place(self, cgroups: bytes) -> Place:
        place = self._places.get(cgroups)
        if place is None:
            if len(self._places) >= _MAX_PLACES:
                drop_oldest(self._places, _MAX_PLACES // 2)
            place = self._places[cgroups] = parse_cgroups(cgroups)
        return place

    def named_by_rule(self, place: Place, exe: str | None, command: str) -> str:
        """Return the name by the operator's rules, or nothing. No `exe`: no process."""
        for rule in self._rules:
            if (exe is not None or not rule.needs_process) and rule.matches(
                place.paths, place.unit, exe or "", command
            ):
                return rule.name
        return ""

    def _service(self, place: Place, container: Container, program: str) -> str:
        if container.pod:
            return workload(container.pod, self._host)
        if place.container_id:
            return container.name or place.container_id[:SHORT_ID]
        return place.service or program

    def _join(self, process: Generation) -> None:
        """Make it a member of its instance, which gets its version if that is not known."""
        key = self._instance_key(process)
        instance = self._instances.get(key)
        while instance is not None and not is_alive(instance.oldest):
            if self.live.get(instance.oldest.pid) is not instance.oldest:
                break
            self.leave(instance.oldest, boottime_ns())
            instance = self._instances.get(key)
        if instance is None:
            instance = self._create(key, process)
        is_oldest = process.order <= instance.oldest.order
        if is_oldest:
            instance.oldest = process
        if is_oldest or not instance.version:
            self._find_version(instance, process, is_oldest=is_oldest)
        self._relabel(instance)
        instance.members[process] = None
        process.instance = instance
        before = self._ended.get(process.key)
        life = self.lifetimes.find(process.pid, process.read_ns) if self.lifetimes else None
        if life is not None and life.begin_ns:
            process.begin_ns = life.begin_ns
        elif before is not None:
            process.begin_ns = before.left_ns
        instance.open(process.begin_ns)
        self.on_join(process)
        if self.live.get(process.pid) is not process:  # it has ended meanwhile
            self._end(process)

    def _instance_key(self, process: Generation) -> tuple[object, ...]:
        if process.place.key:
            return process.place.key, process.named
        parent = process.parent
        if parent is not None and parent.instance is not None and not parent.place.key:
            service = process.named or process.program.name
            if process.is_part_of_parent or service == parent.instance.service:
                return parent.instance.key
        return "", process.named, process.pid, process.stat.start_ticks

    def _create(self, key: tuple[object, ...], process: Generation) -> Instance:
        place = process.place
        container = self.containers.find(place.container_id, place.pod_uid)
        service = process.named or self._service(place, container, process.program.name)
        instance = Instance(key, place, container, service, process)
        self._instances[key] = instance
        if instance.is_nameless:
            self._nameless.add(instance)
        return instance

    def _find_version(self, instance: Instance, process: Generation, *, is_oldest: bool) -> None:
        if process.is_own:
            found = self._own_version
        else:
            found = process.sources.version(instance.container.version, is_first=is_oldest)
        instance.version = found or instance.version

    def _relabel(self, instance: Instance) -> None:
        """Bring its labels up to date. What was counted under other labels stays so."""
        labels = instance_labels(
            instance.place, instance.container, instance.service, instance.version
        )
        if labels == instance.labels:
            return
        now_ns = boottime_ns()
        for _ in instance.members:
            instance.close(now_ns)
        instance.labels = labels
        instance.presence = self.presence(labels)
        for _ in instance.members:
            instance.open(now_ns)

    def _next_turn(self) -> list[Generation]:
        if not self._turn:
            self._turn = list(self.live)
        pids = self._turn[-_RECHECKED_PER_SCAN:]
        del self._turn[-_RECHECKED_PER_SCAN:]
        return [self.live[pid] for pid in pids if pid in self.live]

    def _find_names(self) -> None:
        """Look again for names that runtimes write after they have started a container."""
        now_ns = boottime_ns()
        for instance in list(self._nameless):
            place = instance.place
            container = self.containers.find(place.container_id, place.pod_uid)
            if container != instance.container:
                named = instance.oldest.named
                instance.container = container
                instance.service = named or self._service(place, container, instance.service)
                self._find_version(instance, instance.oldest, is_oldest=True)
                self._relabel(instance)
            if not instance.is_nameless or now_ns - instance.begin_ns > _NAMES_WITHIN_NS:
                self._nameless.discard(instance)

    def presence(self, labels: Labels) -> Presence | None:
        presence = self._presences.get(labels)
        if presence is None:
            if len(self._presences) >= _MAX_PRESENCES:
                self.uncounted += 1
                return None
            presence = self._presences[labels] = Presence()
        return presence


def _asleep_ns() -> int:
    """Return what CLOCK_BOOTTIME is ahead of CLOCK_MONOTONIC: the machine's time asleep.

    What passes between the two readings makes it less.
    """
    return max(boottime_ns() - time.monotonic_ns() for _ in range(3))


def drop_oldest(cache: dict[_Key, _Value], count: int) -> None:
    for key in list(islice(cache, count)):
        del cache[key]
