"""Which service a sample belongs to, and everything else that samples are selected by.

A process is looked at once per exec: /proc/PID/stat, cgroup, exe, cmdline. Its service is the first
of: the operator's rules, its pod's workload or its container's name, its systemd unit, what it
runs. Kernel threads are `[kernel]`, the profiler and its children `everflame`.

A **service instance** is what one version runs in: a container, a unit, or the processes that
descend from one another and run the same. Its version comes from its oldest process and holds for
all of them; when that one ends, from the oldest that is left. When all have ended, the next one in
the same cgroup is a new instance.

A pid is nothing without the start of its process: the sample's is in ns, that of /proc/PID/stat in
ticks of 10 ms, and the two must agree. Generations of one process differ in the sample's `exec_id`
and in the place of the stack (`startstack` in proc_pid_stat(5)), which every exec puts elsewhere.

Samples of processes that were gone before they could be read get the labels of their cgroup, else
of their nearest living ancestor, else their `comm` as the service.

What processes say about themselves is read in bounded pieces and made readable. It can mislead
those who look at that process, and nobody else. Reading /proc/PID/cmdline and environ may wait for
memory that the process has put on a file system of its own (FUSE).
"""

import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple, TypeVar

from bpf.samples import RawSample
from profiler.processes.cgroups import CgroupIds, Place, parse_cgroups, place_of
from profiler.processes.containers import Container, ContainerMiss, Containers, workload
from profiler.processes.presence import Interval, Presence
from profiler.processes.programs import Program, describe
from profiler.processes.rules import ServiceRule
from profiler.processes.versions import Versions
from storage.profile import Labels, make_labels
from symbolizer.files import ProcessFiles
from symbolizer.text import readable

KERNEL_SERVICE = "[kernel]"
OWN_SERVICE = "everflame"

MAX_CACHED_LABELS = 4_096
"""Label sets by thread name and process. The oldest go; a process that still runs is not read
again for them. They take some 600 bytes each."""

_MAX_ENDED = 2_048  # processes that were read and have ended, for their late samples and children
_MAX_PLACES = 4_096
_NAMES_WITHIN_NS = 60_000_000_000
"""For how long after its first process a container's name is looked for on disk."""

_MAX_PRESENCES = 16_384
"""Instances whose time is counted. Beyond it new ones have no `present_ns`."""

_RECHECKED_PER_SCAN = 64
"""Processes that a scan looks at again, in turn, for an exec or a new cgroup without a sample."""
_YOUNG_NS = 2_000_000_000
"""A process read so soon after its start is looked at again: it may not have exec'd yet."""

_MAX_ANCESTORS = 32
_MAX_CMDLINE_BYTES = 128 << 10
_MAX_ARGUMENTS = 512
_MAX_COMMAND_BYTES = 4_096  # of what rules are matched against
_MAX_STAT_BYTES = 4_096
_MAX_CGROUP_BYTES = 64 << 10

_TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
_PF_KTHREAD = 0x0020_0000  # include/linux/sched.h

_UNKNOWN_PLACE = Place()
_UNKNOWN_PROGRAM = Program("")
_SHORT_ID = 12  # as runtimes show them

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


def boottime_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class Labeler:
    """Labels samples, and counts how long each service instance ran. Not thread-safe.

    Attributes:
        reads: how many processes were read.
        misses: files of container runtimes that could not be used, by the reason.
    """

    def __init__(
        self,
        rules: Sequence[ServiceRule] = (),
        *,
        root: Path = Path("/"),
        parent_of: Callable[[int], int | None] | None = None,
        version_variables: Sequence[str] = (),
        own_pid: int | None = None,
        commands: Collection[int] = (),
        host: str | None = None,
    ) -> None:
        """Take what is known of this host; nothing is read before the first `scan`.

        `root` is where container runtimes' files are. `parent_of` returns the parent of a process
        that may have exited. `own_pid` is the profiler's first process, by default this one;
        `commands` are children of it that are not its own: the commands that it records.
        """
        self.reads = 0
        self._rules = tuple(rules)
        self._containers = Containers(root)
        self._versions = Versions(version_variables)
        self._cgroup_ids = CgroupIds()
        self._parent_of = parent_of or parent_in_proc
        self._own_pid = os.getpid() if own_pid is None else own_pid
        self._commands = commands
        self._host = socket.gethostname() if host is None else host
        self._live: dict[int, _Process] = {}
        self._ended: dict[tuple[int, int], _Process] = {}
        self._instances: dict[tuple[object, ...], _Instance] = {}
        self._nameless: set[_Instance] = set()
        self._places: dict[bytes, Place] = {}
        self._labels: dict[tuple[object, ...], _Labeled] = {}
        self._presences: dict[Labels, Presence] = {}
        self._young: list[_Process] = []
        self._turn: list[int] = []
        self._scanned_ns = 0
        self._asleep_ns = _asleep_ns()
        self._own_version = _own_version()
        release = os.uname().release
        self._kernel = make_labels({"service": KERNEL_SERVICE, "version": release})
        self._presences[self._kernel] = Presence()
        self._presences[self._kernel].open(0)

    @property
    def misses(self) -> Counter[ContainerMiss]:
        return self._containers.misses

    def close(self) -> None:
        self._cgroup_ids.close()

    def labels(self, sample: RawSample) -> Labels:
        """Return what is known of the sample's thread, process and service instance."""
        key = (
            sample.pid,
            sample.start_ns,
            sample.exec_id,
            sample.cgroup_id,
            sample.leader_comm,
            sample.comm,
        )
        labeled = self._labels.get(key)
        if labeled is None:
            labeled = self._label(sample)
            if len(self._labels) >= MAX_CACHED_LABELS:
                _drop_oldest(self._labels, MAX_CACHED_LABELS // 2)
            self._labels[key] = labeled
        if labeled.seen is not None:
            labeled.seen.end_ns = max(labeled.seen.end_ns, sample.last_ns + self._asleep_ns)
        return labeled.labels

    def instance(self, pid: int, start_ns: int) -> Labels:
        """Return the labels of the service instance alone; nothing if the process is not known."""
        process = self._find(pid, start_ns)
        if process is None:
            return ()
        return self._kernel if process.is_kernel else process.labels

    def scan(self) -> None:
        """Take in processes that have come and gone. To be called every few seconds."""
        now_ns = boottime_ns()
        inodes = _list_processes()
        gone_ns = (
            (self._scanned_ns or now_ns) + now_ns
        ) // 2  # it ended at some moment since the last scan
        for pid in self._live.keys() - inodes.keys():
            self._leave(self._live[pid], gone_ns)
        new: list[int] = []
        changed: dict[int, _Process] = {}
        for pid, inode in inodes.items():
            process = self._live.get(pid)
            if process is None:
                new.append(pid)
            elif process.inode != inode:  # another process, or the kernel had forgotten the number
                process.inode = inode
                changed[pid] = process
        young, self._young = self._young, []
        changed.update({process.pid: process for process in (*young, *self._next_turn())})
        for process in changed.values():
            if self._live.get(process.pid) is process and not self._is_unchanged(process):
                self._leave(process, gone_ns)
                new.append(process.pid)
        self._read_all(new, inodes)
        self._find_names()
        self._scanned_ns = now_ns
        self._asleep_ns = _asleep_ns()

    def present(self, window_start_ns: int, window_end_ns: int) -> dict[Labels, int]:
        """Return for how long at least one process of each instance ran within a window.

        Times are CLOCK_BOOTTIME. Starts are exact to 10 ms; ends lie between two scans and are
        taken to be midway. A process that no scan saw counts from its start to its last sample.
        Ask for windows in their order: what ended before one is forgotten.
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

    def _label(self, sample: RawSample) -> "_Labeled":
        seen = None
        if sample.stop == "kernel_thread":
            instance = self._kernel
        elif (process := self._current(sample)) is not None:
            instance = process.labels
        else:
            instance, seen = self._inherited(sample)
        thread = (
            ("comm", readable(sample.leader_comm)),
            ("thread", readable(sample.comm)),
            ("pid", str(sample.pid)),
        )
        # As make_labels would, but with the instance's pairs themselves: thousands share them.
        return _Labeled(tuple(sorted((*instance, *thread))), seen)

    def _current(self, sample: RawSample) -> "_Process | None":
        """Return the process as it was when the sample was taken, if it can still be known."""
        reads = self.reads
        process = self._find(sample.pid, sample.start_ns)
        if process is None or not process.labels:
            return None
        has_moved = process.cgroup_id not in (0, sample.cgroup_id)
        has_execed = process.exec_id is not None and process.exec_id < sample.exec_id
        is_unsure = process.exec_id is None and self.reads == reads
        if process.is_live and (
            has_moved or has_execed or (is_unsure and not self._is_unchanged(process))
        ):
            self._leave(process, boottime_ns())
            process = self._find(sample.pid, sample.start_ns)
            if process is None or not process.labels:
                return None
        if process.exec_id is None:
            was_read_later = process.read_ns > sample.first_ns + self._asleep_ns
            if was_read_later and process.comm != sample.leader_comm:
                return None  # it may have exec'd in between
            process.exec_id = sample.exec_id
        process.cgroup_id = sample.cgroup_id
        return process if process.exec_id == sample.exec_id else None

    def _find(self, pid: int, start_ns: int) -> "_Process | None":
        """Return the process with this start, reading it if need be."""
        ticks = start_ns // _TICK_NS
        process = self._live.get(pid)
        if process is not None and process.stat.start_ticks < ticks:
            self._leave(process, start_ns)
            process = None
        if process is None:
            self._read_with_ancestors(pid)
            process = self._live.get(pid)
        if process is not None and process.stat.start_ticks == ticks:
            return process
        return self._ended.get((pid, ticks))

    def _inherited(self, sample: RawSample) -> tuple[Labels, Interval | None]:
        """Return the labels of the cgroup or the ancestors, and count the time that was seen."""
        path = self._cgroup_ids.path(sample.cgroup_id)
        place = place_of([path]) if path else _UNKNOWN_PLACE
        found = self._labels_of_place(place) if place.key else self._labels_of_ancestors(sample)
        labels = found or make_labels({"service": readable(sample.leader_comm)})
        if sample.pid in self._live:  # whose time is counted already, under whatever name
            return labels, None
        presence = self._presence(labels)
        return labels, presence.add(
            sample.start_ns, sample.last_ns + self._asleep_ns
        ) if presence else None

    def _labels_of_place(self, place: Place) -> Labels:
        named = self._named_by_rule(place, None, "")
        instance = self._instances.get((place.key, named))
        if instance is not None:
            return instance.labels
        container = self._containers.find(place.container_id, place.pod_uid)
        service = named or self._service(place, container, "")
        return _instance_labels(place, container, service, container.version)

    def _labels_of_ancestors(self, sample: RawSample) -> Labels:
        pid: int | None = sample.pid
        current = self._live.get(sample.pid)
        if current is not None and current.stat.start_ticks != sample.start_ns // _TICK_NS:
            return ()  # the parent that is known now is that of a later process
        for _ in range(_MAX_ANCESTORS):
            pid = self._parent_of(pid) if pid else None
            if not pid or pid == 1:
                break
            if pid not in self._live:
                self._read_with_ancestors(pid)
            parent = self._live.get(pid)
            if parent is None or not parent.labels:
                continue
            if parent.stat.start_ticks > sample.start_ns // _TICK_NS:
                break  # a later use of the pid
            if sample.cgroup_id > 1:
                paths = parent.place.paths or ("",)
                parent_id = parent.cgroup_id or self._cgroup_ids.find(paths[0])
                if parent_id not in (0, sample.cgroup_id):
                    break  # another service's process has started it
            return parent.labels
        return ()

    def _read_with_ancestors(self, pid: int) -> None:
        """Read a process, its unknown ancestors first: their service may be its own."""
        chain = [pid]
        while len(chain) < _MAX_ANCESTORS:
            parent = parent_in_proc(chain[-1])
            if not parent or parent in self._live or parent in chain:
                break
            chain.append(parent)
        self._read_all(chain, {})

    def _read_all(self, pids: Iterable[int], inodes: Mapping[int, int]) -> None:
        """Read processes, the oldest first: parents before children, which inherit versions."""
        starts = [(stat.start_ticks, pid) for pid in pids if (stat := _read_stat(pid))]
        for _, pid in sorted(starts):
            if pid not in self._live:
                self._read(pid, inodes.get(pid, 0))

    def _read(self, pid: int, inode: int) -> None:
        read_ns = boottime_ns()
        with ProcessFiles(pid) as files:
            content = files.read("stat", _MAX_STAT_BYTES)
            cgroups = files.read("cgroup", _MAX_CGROUP_BYTES)
            if not content or cgroups is None:
                return
            process = _Process(pid, inode, _parse_stat(content), cgroups, read_ns)
            self.reads += 1
            self._live[pid] = process
            if not process.is_kernel and not process.stat.is_dead:
                self._describe(process, files)
                self._join(process, files)
        if read_ns - process.begin_ns < _YOUNG_NS:
            self._young.append(process)

    def _describe(self, process: "_Process", files: ProcessFiles) -> None:
        exe = files.link("exe")
        cmdline = (files.read("cmdline", _MAX_CMDLINE_BYTES) or b"").rstrip(b"\0")
        arguments = cmdline.split(b"\0", _MAX_ARGUMENTS)[:_MAX_ARGUMENTS]
        process.place = self._place(process.cgroups)
        process.program = describe(exe, arguments, process.stat.comm, files.link("cwd"))
        parent = self._live.get(process.stat.parent_pid)
        if parent is not None and parent.stat.start_ticks <= process.stat.start_ticks:
            process.parent = parent
        process.is_own = process.pid == self._own_pid or (
            process.parent is not None
            and process.parent.is_own
            and process.pid not in self._commands
        )
        if process.is_own:
            process.named = OWN_SERVICE
        elif process.is_part_of_parent and process.parent is not None:
            process.named = process.parent.named
        else:
            command = cmdline[:_MAX_COMMAND_BYTES].replace(b"\0", b" ").decode(errors="replace")
            process.named = self._named_by_rule(process.place, exe, command)

    def _place(self, cgroups: bytes) -> Place:
        place = self._places.get(cgroups)
        if place is None:
            if len(self._places) >= _MAX_PLACES:
                _drop_oldest(self._places, _MAX_PLACES // 2)
            place = self._places[cgroups] = parse_cgroups(cgroups)
        return place

    def _named_by_rule(self, place: Place, exe: bytes | None, command: str) -> str:
        """Return the name by the operator's rules, or nothing. No `exe`: no process."""
        path = readable(exe.removesuffix(b" (deleted)")) if exe and self._rules else ""
        for rule in self._rules:
            if (exe is not None or not rule.needs_process) and rule.matches(
                place.paths, place.unit, path, command
            ):
                return rule.name
        return ""

    def _service(self, place: Place, container: Container, program: str) -> str:
        if container.pod:
            return workload(container.pod, self._host)
        if place.container_id:
            return container.name or place.container_id[:_SHORT_ID]
        return _unit_name(place.unit) or program

    def _join(self, process: "_Process", files: ProcessFiles) -> None:
        """Make it a member of its instance, which gets its version if that is not known."""
        key = self._instance_key(process)
        instance = self._instances.get(key)
        while instance is not None and not _is_alive(instance.oldest):
            self._leave(instance.oldest, boottime_ns())
            instance = self._instances.get(key)
        if instance is None:
            instance = self._create(key, process)
        is_oldest = process.order <= instance.oldest.order
        if is_oldest:
            instance.oldest = process
        if is_oldest or not instance.version:
            self._find_version(instance, process, files, is_oldest=is_oldest)
        self._relabel(instance)
        instance.members[process.pid] = process
        process.instance = instance
        before = self._ended.get((process.pid, process.stat.start_ticks))
        process.begin_ns = before.left_ns if before else process.begin_ns
        instance.open(process.begin_ns)

    def _instance_key(self, process: "_Process") -> tuple[object, ...]:
        if process.place.key:
            return process.place.key, process.named
        parent = process.parent
        if parent is not None and parent.instance is not None and not parent.place.key:
            service = process.named or process.program.name
            if process.is_part_of_parent or service == parent.instance.service:
                return parent.instance.key
        return "", process.named, process.pid, process.stat.start_ticks

    def _create(self, key: tuple[object, ...], process: "_Process") -> "_Instance":
        place = process.place
        container = self._containers.find(place.container_id, place.pod_uid)
        service = process.named or self._service(place, container, process.program.name)
        instance = _Instance(key, place, container, service, process)
        self._instances[key] = instance
        if instance.is_nameless:
            self._nameless.add(instance)
        return instance

    def _settle_version(self, instance: "_Instance") -> None:
        """Find the version again, from the process that is the oldest now."""
        with ProcessFiles(instance.oldest.pid) as files:
            if _is_alive(instance.oldest):
                self._find_version(instance, instance.oldest, files, is_oldest=True)

    def _find_version(
        self, instance: "_Instance", process: "_Process", files: ProcessFiles, *, is_oldest: bool
    ) -> None:
        if process.is_own:
            found = self._own_version
        else:
            image = instance.container.version
            found = self._versions.find(files, process.program, image, is_first=is_oldest)
        instance.version = found or instance.version

    def _relabel(self, instance: "_Instance") -> None:
        """Bring its labels up to date. What was counted under other labels stays so."""
        labels = _instance_labels(
            instance.place, instance.container, instance.service, instance.version
        )
        if labels == instance.labels:
            return
        now_ns = boottime_ns()
        for _ in instance.members:
            instance.close(now_ns)
        instance.labels = labels
        instance.presence = self._presence(labels)
        for _ in instance.members:
            instance.open(now_ns)
        if instance.members:
            self._labels.clear()

    def _leave(self, process: "_Process", at_ns: int) -> None:
        """Take note that a process has ended, or that it has become another one."""
        del self._live[process.pid]
        instance = process.instance
        if instance is None:
            return
        process.left_ns = max(at_ns, process.begin_ns)
        process.end()
        self._ended.pop((process.pid, process.stat.start_ticks), None)
        if len(self._ended) >= _MAX_ENDED:
            _drop_oldest(self._ended, _MAX_ENDED // 2)
        self._ended[process.pid, process.stat.start_ticks] = process
        del instance.members[process.pid]
        instance.close(process.left_ns)
        if not instance.members:
            del self._instances[instance.key]
            self._nameless.discard(instance)
        elif instance.oldest is process:
            instance.oldest = min(instance.members.values(), key=_order_of)
            self._settle_version(instance)
            self._relabel(instance)

    def _is_unchanged(self, process: "_Process") -> bool:
        """Return whether it still runs the same program in the same cgroups; takes in its name."""
        stat = _read_stat(process.pid)
        if stat is None or stat.identity != process.stat.identity:
            return False
        if not stat.stack and stat.comm != process.stat.comm:
            return False  # only those who may trace it see where its stack is
        process.stat = stat
        return process.is_kernel or process.cgroups == _read_proc(process.pid, "cgroup")

    def _next_turn(self) -> "list[_Process]":
        if not self._turn:
            self._turn = list(self._live)
        pids = self._turn[-_RECHECKED_PER_SCAN:]
        del self._turn[-_RECHECKED_PER_SCAN:]
        return [self._live[pid] for pid in pids if pid in self._live]

    def _find_names(self) -> None:
        """Look again for names that runtimes write after they have started a container."""
        now_ns = boottime_ns()
        for instance in list(self._nameless):
            place = instance.place
            container = self._containers.find(place.container_id, place.pod_uid)
            if container != instance.container:
                named = instance.oldest.named
                instance.container = container
                instance.service = named or self._service(place, container, instance.service)
                self._settle_version(instance)
                self._relabel(instance)
            if not instance.is_nameless or now_ns - instance.begin_ns > _NAMES_WITHIN_NS:
                self._nameless.discard(instance)

    def _presence(self, labels: Labels) -> Presence | None:
        presence = self._presences.get(labels)
        if presence is None and len(self._presences) < _MAX_PRESENCES:
            presence = self._presences[labels] = Presence()
        return presence


class _Stat(NamedTuple):
    """What /proc/PID/stat says (proc_pid_stat(5)). `stack` is 0 where that is not permitted."""

    start_ticks: int
    stack: int
    is_dead: bool
    is_kernel: bool
    parent_pid: int
    comm: bytes

    @property
    def identity(self) -> tuple[int, int, bool]:
        """What stays the same until the process execs or ends."""
        return self[:3]


def _parse_stat(content: bytes) -> _Stat:
    before, _, after = content.rpartition(b")")
    fields = after.split()
    return _Stat(
        start_ticks=int(fields[19]),
        stack=int(fields[25]),
        is_dead=fields[0] in (b"Z", b"X") and int(fields[17]) <= 1,
        is_kernel=bool(int(fields[6]) & _PF_KTHREAD),
        parent_pid=int(fields[1]),
        comm=before.partition(b"(")[2],
    )


class _Process:
    """A process from one exec to the next.

    Attributes:
        place: of its cgroups; `named`: its service by a rule, or empty.
        exec_id, cgroup_id: those of its samples; None and 0 as long as it has had none.
        begin_ns, left_ns, read_ns: on CLOCK_BOOTTIME.
        instance: None for kernel threads and the dead, and once it has ended.
    """

    __slots__ = (
        "_last_labels",
        "begin_ns",
        "cgroup_id",
        "cgroups",
        "exec_id",
        "inode",
        "instance",
        "is_own",
        "left_ns",
        "named",
        "parent",
        "pid",
        "place",
        "program",
        "read_ns",
        "stat",
    )

    def __init__(self, pid: int, inode: int, stat: _Stat, cgroups: bytes, read_ns: int) -> None:
        self.pid = pid
        self.inode = inode
        self.stat = stat
        self.cgroups = cgroups
        self.read_ns = read_ns
        self.begin_ns = stat.start_ticks * _TICK_NS
        self.left_ns = 0
        self.exec_id: int | None = None
        self.cgroup_id = 0
        self.place = _UNKNOWN_PLACE
        self.program = _UNKNOWN_PROGRAM
        self.named = ""
        self.is_own = False
        self.parent: _Process | None = None
        self.instance: _Instance | None = None
        self._last_labels: Labels = ()

    @property
    def order(self) -> tuple[int, int]:
        return self.stat.start_ticks, self.pid

    @property
    def comm(self) -> bytes:
        return self.stat.comm

    @property
    def is_kernel(self) -> bool:
        return self.stat.is_kernel

    @property
    def is_part_of_parent(self) -> bool:
        return self.program.is_part_of_parent

    @property
    def is_live(self) -> bool:
        return self.instance is not None

    @property
    def labels(self) -> Labels:
        return self.instance.labels if self.instance is not None else self._last_labels

    def end(self) -> None:
        self._last_labels = self.labels
        self.instance = self.parent = None


_order_of = attrgetter("order")


class _Instance:
    """What one version of a service runs in. `members` live; `oldest` is one of them."""

    def __init__(
        self,
        key: tuple[object, ...],
        place: Place,
        container: Container,
        service: str,
        oldest: _Process,
    ) -> None:
        self.key = key
        self.place = place
        self.container = container
        self.service = service
        self.version = ""
        self.oldest = oldest
        self.members: dict[int, _Process] = {}
        self.labels: Labels = ()
        self.presence: Presence | None = None
        self.begin_ns = boottime_ns()

    @property
    def is_nameless(self) -> bool:
        return bool(self.place.container_id or self.place.pod_uid) and not self.container.name

    def open(self, at_ns: int) -> None:
        if self.presence is not None:
            self.presence.open(at_ns)

    def close(self, at_ns: int) -> None:
        if self.presence is not None:
            self.presence.close(at_ns)


class _Labeled(NamedTuple):
    """`seen`: of a process that was gone when it was first sampled; its samples lengthen it."""

    labels: Labels
    seen: Interval | None


def _instance_labels(place: Place, container: Container, service: str, version: str) -> Labels:
    names = {
        "service": service,
        "version": version,
        "container": container.name or place.container_id[:_SHORT_ID],
        "pod": container.pod,
        "namespace": container.namespace,
        "unit": place.unit,
    }
    return make_labels({name: value for name, value in names.items() if value})


def _unit_name(unit: str) -> str:
    """Return a unit's name without suffix and instance: `worker@3.service` is one of `worker`."""
    return unit.rpartition(".")[0].partition("@")[0]


def _list_processes() -> dict[int, int]:
    """Return each process with the inode of its folder.

    It stays as long as the process runs, unless the kernel has dropped it from its caches.
    """
    with os.scandir("/proc") as entries:
        return {int(entry.name): entry.inode() for entry in entries if entry.name.isdecimal()}


def _read_proc(pid: int, name: str) -> bytes | None:
    try:
        fd = os.open(f"/proc/{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return os.read(fd, _MAX_CGROUP_BYTES)
    except OSError:
        return None
    finally:
        os.close(fd)


def _read_stat(pid: int) -> _Stat | None:
    content = _read_proc(pid, "stat")
    return _parse_stat(content) if content else None


def _is_alive(process: _Process) -> bool:
    stat = _read_stat(process.pid)
    return stat is not None and not stat.is_dead and stat.start_ticks == process.stat.start_ticks


def parent_in_proc(pid: int) -> int | None:
    stat = _read_stat(pid)
    return stat.parent_pid if stat else None


def _asleep_ns() -> int:
    """Return what CLOCK_BOOTTIME is ahead of CLOCK_MONOTONIC: the machine's time asleep."""
    return boottime_ns() - time.monotonic_ns()


def _own_version() -> str:
    try:
        return version("everflame")
    except PackageNotFoundError:  # run from its sources
        return ""


def _drop_oldest(cache: dict[_Key, _Value], count: int) -> None:
    for key in list(islice(cache, count)):
        del cache[key]
