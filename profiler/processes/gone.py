"""Services of processes that were gone before anybody could read them.

Of them there is what the kernel has recorded (who started them, what they executed, when they ran),
and of those that were sampled the cgroup. Their service is the first of

1. that of the profiler, of the kernel, or of their cgroup, else of their parent's cgroup if they
   were never sampled;
2. their parent's, where they run what it runs (a forked worker);
3. that of a process which was read and had the same executable and the same parent, or a parent of
   the same service; of an interpreter only if all such processes are of one service;
4. what they executed: the executable's name, of a script that names its interpreter the script's;
5. their nearest known ancestor's, if nothing is recorded of what they executed.

Nothing of it depends on when they were looked for. It is worked out when a window closes, when
others of their kind may have been read.
"""

from collections.abc import Callable
from posixpath import basename
from typing import NamedTuple

from profiler.processes.cgroups import CgroupIds, Place, place_of
from profiler.processes.generations import TICK_NS, Generation
from profiler.processes.instances import MAX_ANCESTORS, Instances, drop_oldest
from profiler.processes.lifetimes import Lifetime, Lifetimes
from profiler.processes.presence import Presence
from profiler.processes.programs import describe
from storage.profile import Labels, make_labels
from symbolizer.text import readable

_MAX_KNOWN = 4_096
"""Executables whose service is known, and kinds of processes that ended in one window."""
_INIT = 1
_ANYONE = "", ""


class Kin(NamedTuple):
    """What is known of a process that was never read. Those that are equal are of one service.

    Attributes:
        anchor: its nearest ancestor that was read.
        is_same_program: it runs what the anchor runs.
        program: path and build id of what it executed; the path is empty if that is not known.
        comm: what the kernel called that, or its samples call it.
        cgroup_id: 0 if it was not sampled.
    """

    anchor: Generation | None
    is_same_program: bool
    program: tuple[bytes, str]
    comm: bytes
    cgroup_id: int


class GoneProcesses:
    """Names processes by their kin, and counts when they ran. Not thread-safe."""

    def __init__(
        self,
        instances: Instances,
        cgroup_ids: CgroupIds,
        parent_of: Callable[[int], int | None],
    ) -> None:
        self.uncounted = 0
        self._instances = instances
        self._lifetimes = instances.lifetimes or Lifetimes()
        self._cgroup_ids = cgroup_ids
        self._parent_of = parent_of
        self._known: dict[tuple[object, str, str, str], Generation | None] = {}
        """By relative, executable, build id and script; None where they differ in service."""
        self._builds: dict[str, str] = {}
        self._counted: dict[Kin, Presence] = {}

    def kin(self, life: Lifetime) -> Kin:
        """Return what its relatives say of a lifetime."""
        if not isinstance(life.kin, Kin) or life.kin.cgroup_id != life.cgroup_id:
            anchor = self._anchor(life.pid, life.parent_pid, life.start_ns)
            execution = life.execution
            is_same = anchor is not None and self._lifetimes.is_of(anchor.pid, execution)
            life.kin = Kin(anchor, is_same, execution.program, execution.comm, life.cgroup_id)
        return life.kin

    def kin_without_records(self, pid: int, start_ns: int, comm: bytes, cgroup_id: int) -> Kin:
        """Return what is known of a process that no record tells of."""
        current = self._instances.live.get(pid)
        if current is not None and current.stat.start_ticks != start_ns // TICK_NS:
            # The parent that is known now is that of a later process.
            return Kin(None, False, (b"", ""), comm, cgroup_id)
        anchor = self._anchor(pid, self._parent_of(pid) or 0, start_ns, is_read=True)
        return Kin(anchor, False, (b"", ""), comm, cgroup_id)

    def count(self, kin: Kin, begin_ns: int, end_ns: int) -> None:
        """Count when a process ran (CLOCK_BOOTTIME)."""
        presence = self._counted.get(kin)
        if presence is None:
            if len(self._counted) >= _MAX_KNOWN:
                self.uncounted += 1
                return
            presence = self._counted[kin] = Presence()
        presence.add(begin_ns, end_ns)

    def settle(self) -> None:
        """Take in which processes have ended. Call it when their samples were noted."""
        live = self._instances.live
        for life in self._lifetimes.take_ended():
            process = live.get(life.pid)
            if process is not None and life.holds(process.read_ns):
                self._instances.leave(process, life.end_ns)
                if process.labels:
                    continue
            if life.begin_ns and not self._instances.has_counted(life):
                self.count(self.kin(life), life.begin_ns, life.end_ns)

    def assign(self) -> None:
        """Add what was counted to the services that it is known to be of by now."""
        counted, self._counted = self._counted, {}
        for kin, presence in counted.items():
            labels = self.labels(kin)
            whole = self._instances.presence(labels) if labels else None
            if whole is not None:
                for start_ns, end_ns in presence.intervals:
                    whole.add(start_ns, end_ns)

    def learn(self, process: Generation) -> None:
        """Remember the service of a process that was read, for others of its kind."""
        life = self._lifetimes.find(process.pid, process.read_ns)
        execution = life.execution if life else None
        path, build_id = execution.program if execution else (b"", "")
        program = (readable(path), build_id) if path else (process.exe, "")
        if not program[0] or process.is_own:
            return
        script = _script(program[0], readable(execution.comm) if execution else "")
        for relative in (*_relatives(process.parent), _ANYONE):
            kind = (relative, *program, script)
            known = self._known.pop(kind, process)
            is_one = known is not None and _service_of(known) == _service_of(process)
            if len(self._known) >= _MAX_KNOWN:
                drop_oldest(self._known, _MAX_KNOWN // 2)
            self._known[kind] = process if is_one or process.program.is_own_code else None

    def labels(self, kin: Kin) -> Labels:
        """Return the labels of the service instance; nothing if it cannot be known."""
        anchor = kin.anchor
        if anchor is not None and anchor.is_own:
            return anchor.labels
        if anchor is not None and anchor.is_kernel and kin.is_same_program:
            return self._instances.kernel
        place = self._place(kin)
        if place.key:
            return self._instances.labels_of_place(place)
        return self._labels_without_place(kin, place)

    def _labels_without_place(self, kin: Kin, place: Place) -> Labels:
        anchor = kin.anchor
        if kin.is_same_program and anchor is not None and anchor.labels:
            return anchor.labels
        if kin.program[0]:
            return self._labels_of_program(kin, place)
        if anchor is not None and anchor.labels and self._is_near(anchor, kin.cgroup_id):
            return anchor.labels
        return make_labels({"service": readable(kin.comm)}) if kin.comm else ()

    def _place(self, kin: Kin) -> Place:
        if kin.cgroup_id:
            path = self._cgroup_ids.path(kin.cgroup_id)
            return place_of([path]) if path else Place()
        # It begins in its parent's cgroup, and only who starts services puts it elsewhere.
        return kin.anchor.place if kin.anchor is not None else Place()

    def _labels_of_program(self, kin: Kin, place: Place) -> Labels:
        path, build_id = readable(kin.program[0]), kin.program[1]
        if not build_id:  # its file was not in the page cache
            build_id = self._builds.get(path, "")
        else:
            self._builds.pop(path, None)
            if len(self._builds) >= _MAX_KNOWN:
                drop_oldest(self._builds, _MAX_KNOWN // 2)
            self._builds[path] = build_id
        script = _script(path, readable(kin.comm))
        for relative in (*_relatives(kin.anchor), _ANYONE):
            for build in (build_id, ""):
                process = self._known.get((relative, path, build, script))
                if process is not None and process.labels and not process.place.key:
                    is_sure = relative != _ANYONE or script or process.program.is_own_code
                    if is_sure:
                        return process.labels
        if not kin.cgroup_id and kin.anchor is not None and kin.anchor.pid == _INIT:
            return ()  # init starts services in cgroups of their own
        program = describe(kin.program[0], (), kin.comm, b"")
        name = program.name
        if not program.is_own_code and script:
            name = describe(kin.program[0], (b"", kin.comm), kin.comm, b"").name
        named = self._instances.named_by_rule(place, path, "")
        labels = {"service": named or name}
        if program.is_own_code and build_id:
            labels["version"] = build_id
        return make_labels(labels)

    def _anchor(
        self, pid: int, parent_pid: int, start_ns: int, *, is_read: bool = False
    ) -> Generation | None:
        """Return the nearest ancestor that was read and runs, or is read now (`is_read`)."""
        live = self._instances.live
        for _ in range(MAX_ANCESTORS):
            if pid in self._instances.commands or not parent_pid:
                return None
            if is_read and parent_pid not in live:
                self._instances.read_with_ancestors(parent_pid)
            process = live.get(parent_pid)
            if process is not None:
                if start_ns and process.stat.start_ticks > start_ns // TICK_NS:
                    return None  # a later use of the pid
                if process.labels or process.is_waiting or process.is_kernel:
                    return process
            pid, parent_pid = parent_pid, self._parent_of(parent_pid) or 0
        return None

    def _is_near(self, anchor: Generation, cgroup_id: int) -> bool:
        """Return whether an ancestor is no other service's process that has started it."""
        if anchor.pid == _INIT or anchor.is_kernel:
            return False
        if cgroup_id <= 1:
            return True
        paths = anchor.place.paths or ("",)
        return (anchor.cgroup_id or self._cgroup_ids.find(paths[0])) in (0, cgroup_id)


def _service_of(process: Generation | None) -> str:
    return dict(process.labels).get("service", "") if process is not None else ""


def _relatives(parent: Generation | None) -> list[object]:
    """Return what makes processes siblings, the nearest first."""
    return [parent.key, _service_of(parent)] if parent is not None else []


def _script(path: str, comm: str) -> str:
    """Return comm where it is the name of a script that names its interpreter, else nothing."""
    return "" if basename(path).startswith(comm) else comm
