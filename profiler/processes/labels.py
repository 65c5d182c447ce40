"""What a sample is selected by: its thread, its process, its service instance.

A pid identifies a process only together with its start: the sample's is in ns, that of
/proc/PID/stat in ticks of 10 ms, and the two must agree. Generations of one process differ in the
sample's `exec_id` and in the place of the stack (`startstack` in proc_pid_stat(5)), which every
exec puts elsewhere.

Samples are noted when they are drained. What a process says about itself is read by others and
comes later (`facts`), so labels are asked for when the window closes. By then nothing may be known
of a process, because it was gone or cannot be read: then its kin tell (`gone`).
"""

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from bpf.samples import RawSample
from profiler.processes.cgroups import CgroupIds
from profiler.processes.containers import ContainerMiss
from profiler.processes.facts import Ask, Facts
from profiler.processes.generations import Generation, boottime_ns, parent_in_proc
from profiler.processes.gone import GoneProcesses, Kin
from profiler.processes.instances import Instances
from profiler.processes.lifetimes import Lifetimes
from profiler.processes.rules import ServiceRule
from storage.profile import Labels, make_labels
from symbolizer.text import readable

MAX_CACHED_LABELS = 4_096
"""Label sets by thread name and process, some 1,000 bytes each. Those go that no window has used
since the last one; a process that still runs is not read again for them."""

_Key = TypeVar("_Key", bound=Hashable)
_Value = TypeVar("_Value")


_SOURCE, _KERNEL = "", "kernel"


class Labeler:
    """Labels samples, and counts how long each service instance ran. Not thread-safe.

    Attributes:
        misses: files of container runtimes that could not be used, by the reason.
    """

    def __init__(
        self,
        rules: Sequence[ServiceRule] = (),
        *,
        ask: Ask,
        root: Path = Path("/"),
        parent_of: Callable[[int], int | None] | None = None,
        own_pid: int | None = None,
        commands: Collection[int] = (),
        host: str | None = None,
        lifetimes: Lifetimes | None = None,
        thread_of: Callable[[RawSample], str | None] | None = None,
    ) -> None:
        """Take what is known of this host; nothing is read before the first `scan`.

        `ask` has the facts of a process read, for `learn`, which it may call at once.
        `lifetimes` are those of all processes, as far as the kernel's records tell of them.
        `root` is where container runtimes' files are. `parent_of` returns the parent of a process
        that may have exited. `own_pid` is the profiler's first process, by default this one;
        `commands` are children of it that are not its own: the commands that it records.
        `thread_of` returns what stands for a thread's name if that is not the kernel's.
        """
        self._instances = Instances(
            rules,
            root=root,
            own_pid=own_pid,
            commands=commands,
            host=host,
            ask=ask,
            lifetimes=lifetimes,
        )
        self._lifetimes = lifetimes or Lifetimes()
        self._thread_of = thread_of or (lambda _: None)
        self._cgroup_ids = CgroupIds()
        self._gone = GoneProcesses(self._instances, self._cgroup_ids, parent_of or parent_in_proc)
        self._instances.on_join = self._gone.learn
        self._subjects: _Recent[tuple[object, ...], Subject] = _Recent(MAX_CACHED_LABELS)
        self._sources: _Recent[Generation | Kin, str] = _Recent(MAX_CACHED_LABELS)
        self._noted = 0

    @property
    def reads(self) -> int:
        """How many processes were read."""
        return self._instances.reads

    @property
    def misses(self) -> Counter[ContainerMiss]:
        return self._instances.containers.misses

    def status(self) -> dict[str, int]:
        """Return what the agent's status shows of it: how much had no `present_ns`."""
        return {
            "instances_uncounted": self._instances.uncounted,
            "processes_uncounted": self._gone.uncounted + self._lifetimes.uncounted,
            "processes_awaited": self._instances.awaited,
        }

    def close(self) -> None:
        self._cgroup_ids.close()

    def note(self, samples: Sequence[RawSample]) -> list["Subject"]:
        """Return what each sample is of, to ask for its labels when the window closes."""
        subjects = [self._note(sample) for sample in samples]
        self._gone.settle()
        return subjects

    def learn(self, pid: int, start_ticks: int, facts: Facts | None) -> None:
        """Take what was asked for; None if a process has ended or cannot be read."""
        self._instances.learn(pid, start_ticks, facts)

    def is_complete(self, subjects: Iterable["Subject"]) -> bool:
        """Return whether no facts are awaited of these."""
        return not any(
            subject.process is not None and subject.process.is_waiting for subject in subjects
        )

    def instance_of(self, subject: "Subject") -> Labels:
        """Return what is known by now of a process's service instance."""
        if subject.is_kernel:
            return self._instances.kernel
        process = subject.process
        if process is not None and process.labels:
            return process.labels
        labels: Labels = ()
        if process is not None and process.place.key:
            labels = self._instances.labels_of_place(process.place)
        labels = labels or self._gone.labels(subject.kin) or subject.nameless
        if process is not None and process.is_waiting:
            presence = self._instances.presence(labels)
            if presence is not None:
                presence.add(process.begin_ns, process.left_ns or boottime_ns())
        return labels

    def scan(self) -> bool:
        """Take in processes that have come and gone; see `Instances.scan`."""
        return self._instances.scan()

    def present(self, window_start_ns: int, window_end_ns: int) -> dict[Labels, int]:
        """Return how long each instance ran within a window, as `Instances.present` does.

        Ask for the labels of the window first: they settle whose time it was.
        """
        self._gone.settle()
        self._gone.assign()
        self._subjects.age()
        self._sources.age()
        return self._instances.present(window_start_ns, window_end_ns)

    def _note(self, sample: RawSample) -> "Subject":
        # All of `generation`, too, which takes as long to make as the rest.
        thread = self._thread_of(sample)
        key = (
            *(sample.pid, sample.start_ns, sample.exec_id, sample.cgroup_id),
            *(sample.leader_comm, sample.comm, thread),
        )
        subject = self._subjects.get(key)
        if subject is None:
            subject = self._subject(sample, thread)
            self._subjects.add(key, subject)
        if subject.is_gone and sample.pid not in self._instances.live:
            last_ns = sample.last_ns + self._instances.asleep_ns
            self._gone.count(subject.kin, subject.begin_ns, max(last_ns, subject.begin_ns))
        return subject

    def _subject(self, sample: RawSample, thread: str | None) -> "Subject":
        if sample.stop == "kernel_thread":
            return Subject(_KERNEL, sample)
        process = self._current(sample)
        if process is not None:
            subject = Subject(self._source_of(process), sample, process, thread)
            if process.labels:
                return subject
        kin, begin_ns = self._kin(sample)
        if process is None:
            subject = Subject(self._source_of(kin), sample, thread=thread)
        subject.kin, subject.begin_ns = kin, begin_ns
        return subject

    def _kin(self, sample: RawSample) -> tuple[Kin, int]:
        """Return what is known of a process that was not read, and when it began."""
        asleep_ns = self._instances.asleep_ns
        life = self._lifetimes.find(sample.pid, sample.first_ns + asleep_ns)
        if life is None or not life.start_ns:
            kin = self._gone.kin_without_records(
                sample.pid, sample.start_ns, sample.leader_comm, sample.cgroup_id
            )
            return kin, sample.start_ns
        life.cgroup_id = sample.cgroup_id
        kin = self._gone.kin(life)
        return (kin if kin.comm else kin._replace(comm=sample.leader_comm)), life.begin_ns

    def _source_of(self, process: Generation | Kin) -> str:
        """Return a number: one for all processes that are of one service for certain."""
        source = self._sources.get(process)
        if source is None:
            self._noted += 1
            source = str(self._noted)
            self._sources.add(process, source)
        return source

    def _current(self, sample: RawSample) -> Generation | None:
        """Return the process as it was when the sample was taken, if it can still be known."""
        reads = self.reads
        process = self._instances.find(sample.pid, sample.start_ns)
        if process is None or not (process.labels or process.is_waiting):
            return None
        has_moved = process.cgroup_id not in (0, sample.cgroup_id)
        has_execed = process.exec_id is not None and process.exec_id < sample.exec_id
        is_unsure = process.exec_id is None and self.reads == reads
        if (process.is_live or process.is_waiting) and (
            has_moved or has_execed or (is_unsure and not self._instances.is_unchanged(process))
        ):
            self._instances.leave(process, boottime_ns())
            process = self._instances.find(sample.pid, sample.start_ns)
            if process is None or not (process.labels or process.is_waiting):
                return None
        if process.exec_id is None:
            was_read_later = process.read_ns > sample.first_ns + self._instances.asleep_ns
            if was_read_later and process.comm != sample.leader_comm:
                return None  # it may have exec'd in between
            process.exec_id = sample.exec_id
        process.cgroup_id = sample.cgroup_id
        return process if process.exec_id == sample.exec_id else None


class _Recent(Generic[_Key, _Value]):
    """What was used since `age` was called the last time but one; at most `limit` values."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._new: dict[_Key, _Value] = {}
        self._old: dict[_Key, _Value] = {}

    def __len__(self) -> int:
        return len(self._new) + len(self._old)

    def get(self, key: _Key) -> _Value | None:
        value = self._new.get(key)
        if value is None and key in self._old:
            value = self._old.pop(key)
            self.add(key, value)
        return value

    def add(self, key: _Key, value: _Value) -> None:
        if len(self._new) >= self._limit // 2:
            self.age()
        self._new[key] = value

    def age(self) -> None:
        self._old, self._new = self._new, {}


class Subject:
    """What samples are of: a thread of a process, in one generation and one cgroup.

    Attributes:
        key: its labels, with `source` in place of those of its service instance.
        process: None if it was gone before it could be read.
        kin: what is known of it else.
    """

    __slots__ = ("begin_ns", "key", "kin", "process", "source")

    def __init__(
        self,
        source: str,
        sample: RawSample,
        process: Generation | None = None,
        thread: str | None = None,
    ) -> None:
        self.source = source
        self.process = process
        self.kin = Kin(None, False, (b"", ""), sample.leader_comm, sample.cgroup_id)
        self.begin_ns = sample.start_ns
        self.key: Labels = (
            (_SOURCE, source),
            ("comm", readable(sample.leader_comm)),
            ("pid", str(sample.pid)),
            ("thread", thread or readable(sample.comm)),
        )

    @property
    def nameless(self) -> Labels:
        """The labels of its service instance if nothing is known."""
        return make_labels({"service": dict(self.key)["comm"]})

    @property
    def is_kernel(self) -> bool:
        return self.source == _KERNEL

    @property
    def is_gone(self) -> bool:
        return self.process is None and not self.is_kernel


def with_instance(key: Labels, instances: Mapping[str, Labels]) -> Labels:
    """Return the labels that a key stands for, given those of the instance of each source."""
    (name, source), *others = key
    # As make_labels would, but with the instance's pairs themselves: thousands share them.
    return tuple(sorted((*instances[source], *others))) if name == _SOURCE else key
