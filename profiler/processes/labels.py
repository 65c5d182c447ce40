"""What a sample is selected by: its thread, its process, its service instance.

A pid identifies a process only together with its start: the sample's is in ns, that of
/proc/PID/stat in ticks of 10 ms, and the two must agree. Generations of one process differ in the
sample's `exec_id` and in the place of the stack (`startstack` in proc_pid_stat(5)), which every
exec puts elsewhere.

Samples of processes that were gone before they could be read get the labels of their cgroup, else
of their nearest living ancestor, else their `comm` as the service.
"""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from bpf.samples import RawSample
from profiler.processes.cgroups import CgroupIds, Place, place_of
from profiler.processes.containers import ContainerMiss
from profiler.processes.generations import TICK_NS, Generation, boottime_ns, parent_in_proc
from profiler.processes.instances import MAX_ANCESTORS, Instances, drop_oldest
from profiler.processes.presence import Interval
from profiler.processes.rules import ServiceRule
from storage.profile import Labels, make_labels
from symbolizer.text import readable

MAX_CACHED_LABELS = 4_096
"""Label sets by thread name and process. The oldest go; a process that still runs is not read
again for them. They take some 600 bytes each."""

_UNKNOWN_PLACE = Place()


class Labeler:
    """Labels samples, and counts how long each service instance ran. Not thread-safe.

    Attributes:
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
        self._instances = Instances(
            rules,
            root=root,
            version_variables=version_variables,
            own_pid=own_pid,
            commands=commands,
            host=host,
        )
        self._cgroup_ids = CgroupIds()
        self._parent_of = parent_of or parent_in_proc
        self._labels: dict[tuple[object, ...], _Labeled] = {}
        self._relabellings = 0

    @property
    def reads(self) -> int:
        """How many processes were read."""
        return self._instances.reads

    @property
    def misses(self) -> Counter[ContainerMiss]:
        return self._instances.containers.misses

    def status(self) -> dict[str, int]:
        """Return what the agent's status shows of it: how many instances had no `present_ns`."""
        return {"instances_uncounted": self._instances.uncounted}

    def close(self) -> None:
        self._cgroup_ids.close()

    def labels(self, sample: RawSample) -> Labels:
        """Return what is known of the sample's thread, process and service instance."""
        key = (sample.generation, sample.cgroup_id, sample.leader_comm, sample.comm)
        self._drop_outdated()
        labeled = self._labels.get(key)
        if labeled is None:
            labeled = self._label(sample)
            self._drop_outdated()
            if len(self._labels) >= MAX_CACHED_LABELS:
                drop_oldest(self._labels, MAX_CACHED_LABELS // 2)
            self._labels[key] = labeled
        if labeled.seen is not None:
            labeled.seen.end_ns = max(
                labeled.seen.end_ns, sample.last_ns + self._instances.asleep_ns
            )
        return labeled.labels

    def instance(self, pid: int, start_ns: int) -> Labels:
        """Return the labels of the service instance alone; nothing if the process is not known."""
        process = self._instances.find(pid, start_ns)
        if process is None:
            return ()
        return self._instances.kernel if process.is_kernel else process.labels

    def scan(self) -> None:
        """Take in processes that have come and gone. To be called every few seconds."""
        self._instances.scan()

    def present(self, window_start_ns: int, window_end_ns: int) -> dict[Labels, int]:
        """Return how long each instance ran within a window, as `Instances.present` does."""
        return self._instances.present(window_start_ns, window_end_ns)

    def _drop_outdated(self) -> None:
        """Empty the cache if an instance has got other labels, as a name that is known later."""
        if self._relabellings != self._instances.relabellings:
            self._relabellings = self._instances.relabellings
            self._labels.clear()

    def _label(self, sample: RawSample) -> "_Labeled":
        seen = None
        if sample.stop == "kernel_thread":
            instance = self._instances.kernel
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

    def _current(self, sample: RawSample) -> Generation | None:
        """Return the process as it was when the sample was taken, if it can still be known."""
        reads = self.reads
        process = self._instances.find(sample.pid, sample.start_ns)
        if process is None or not process.labels:
            return None
        has_moved = process.cgroup_id not in (0, sample.cgroup_id)
        has_execed = process.exec_id is not None and process.exec_id < sample.exec_id
        is_unsure = process.exec_id is None and self.reads == reads
        if process.is_live and (
            has_moved or has_execed or (is_unsure and not self._instances.is_unchanged(process))
        ):
            self._instances.leave(process, boottime_ns())
            process = self._instances.find(sample.pid, sample.start_ns)
            if process is None or not process.labels:
                return None
        if process.exec_id is None:
            was_read_later = process.read_ns > sample.first_ns + self._instances.asleep_ns
            if was_read_later and process.comm != sample.leader_comm:
                return None  # it may have exec'd in between
            process.exec_id = sample.exec_id
        process.cgroup_id = sample.cgroup_id
        return process if process.exec_id == sample.exec_id else None

    def _inherited(self, sample: RawSample) -> tuple[Labels, Interval | None]:
        """Return the labels of the cgroup or the ancestors, and count the time that was seen."""
        path = self._cgroup_ids.path(sample.cgroup_id)
        place = place_of([path]) if path else _UNKNOWN_PLACE
        found = (
            self._instances.labels_of_place(place)
            if place.key
            else self._labels_of_ancestors(sample)
        )
        labels = found or make_labels({"service": readable(sample.leader_comm)})
        if sample.pid in self._instances.live:  # whose time is counted already, under whatever name
            return labels, None
        presence = self._instances.presence(labels)
        return labels, presence.add(
            sample.start_ns, sample.last_ns + self._instances.asleep_ns
        ) if presence else None

    def _labels_of_ancestors(self, sample: RawSample) -> Labels:
        pid: int | None = sample.pid
        current = self._instances.live.get(sample.pid)
        if current is not None and current.stat.start_ticks != sample.start_ns // TICK_NS:
            return ()  # the parent that is known now is that of a later process
        for _ in range(MAX_ANCESTORS):
            pid = self._parent_of(pid) if pid else None
            if not pid or pid == 1:
                break
            if pid not in self._instances.live:
                self._instances.read_with_ancestors(pid)
            parent = self._instances.live.get(pid)
            if parent is None or not parent.labels:
                continue
            if parent.stat.start_ticks > sample.start_ns // TICK_NS:
                break  # a later use of the pid
            if sample.cgroup_id > 1:
                paths = parent.place.paths or ("",)
                parent_id = parent.cgroup_id or self._cgroup_ids.find(paths[0])
                if parent_id not in (0, sample.cgroup_id):
                    break  # another service's process has started it
            return parent.labels
        return ()


class _Labeled(NamedTuple):
    """`seen`: of a process that was gone when it was first sampled; its samples lengthen it."""

    labels: Labels
    seen: Interval | None
