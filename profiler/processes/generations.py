"""A process generation, that is a process from one exec to the next, as /proc describes it."""

import os
import time
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from profiler.processes.cgroups import Place
from profiler.processes.facts import Sources
from profiler.processes.programs import Program
from storage.profile import Labels

if TYPE_CHECKING:
    from profiler.processes.instance import Instance

TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
"""The unit of times in /proc/PID/stat and /proc/stat."""

_MAX_BYTES = 64 << 10
_INITIAL_TIME_NAMESPACE = 0xEFFFFFFA  # PROC_TIME_INIT_INO in include/linux/proc_ns.h
_PF_KTHREAD = 0x0020_0000  # include/linux/sched.h


def boottime_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def clock_offsets() -> dict[str, int]:
    """Return by how many seconds this process's clocks differ from the kernel's; empty if by none.

    They do in a time namespace (time_namespaces(7)): what /proc says and what samples and records
    carry are then different times, and no sample finds its process.
    """
    try:
        content = Path("/proc/self/timens_offsets").read_text()
        is_own = Path("/proc/self/ns/time").stat().st_ino != _INITIAL_TIME_NAMESPACE
    except OSError:  # a kernel without time namespaces
        return {}
    if not is_own:
        return {}
    lines = [line.split() for line in content.splitlines()]
    return {name: int(seconds) for name, seconds, ns in lines if int(seconds) or int(ns)}


class Stat(NamedTuple):
    """What /proc/PID/stat says (proc_pid_stat(5)). `stack` is 0 where that is not permitted.

    `is_exited`: its first thread has exited; `is_dead`: so have all others.
    """

    start_ticks: int
    stack: int
    is_dead: bool
    is_exited: bool
    is_kernel: bool
    parent_pid: int
    comm: bytes

    @property
    def identity(self) -> tuple[int, int, bool]:
        """What stays the same until the process execs or ends."""
        return self[:3]


def parse_stat(content: bytes) -> Stat:
    before, _, after = content.rpartition(b")")
    fields = after.split()
    is_exited = fields[0] in (b"Z", b"X")
    return Stat(
        start_ticks=int(fields[19]),
        stack=int(fields[25]),
        is_dead=is_exited and int(fields[17]) <= 1,
        is_exited=is_exited,
        is_kernel=bool(int(fields[6]) & _PF_KTHREAD),
        parent_pid=int(fields[1]),
        comm=before.partition(b"(")[2],
    )


class Generation:
    """A process from one exec to the next.

    Attributes:
        place: of its cgroups; `named`: its service by a rule, or empty; `exe`: a path, or empty.
        exec_id, cgroup_id: those of its samples; None and 0 as long as it has had none.
        begin_ns, left_ns, read_ns: on CLOCK_BOOTTIME.
        instance: None for kernel threads and the dead, until its facts are there, and once it has
            ended.
        is_waiting: it has been asked for what it says about itself.
        sources: what it says of its version.
    """

    __slots__ = (
        "_last_labels",
        "begin_ns",
        "cgroup_id",
        "cgroups",
        "exe",
        "exec_id",
        "inode",
        "instance",
        "is_own",
        "is_waiting",
        "left_ns",
        "named",
        "parent",
        "pid",
        "place",
        "program",
        "read_ns",
        "sources",
        "stat",
    )

    def __init__(self, pid: int, inode: int, stat: Stat, cgroups: bytes, read_ns: int) -> None:
        self.pid = pid
        self.inode = inode
        self.stat = stat
        self.cgroups = cgroups
        self.read_ns = read_ns
        self.begin_ns = stat.start_ticks * TICK_NS
        self.left_ns = 0
        self.exec_id: int | None = None
        self.cgroup_id = 0
        self.place = Place()
        self.program = Program("")
        self.named = self.exe = ""
        self.is_own = False
        self.is_waiting = False
        self.sources = Sources()
        self.parent: Generation | None = None
        self.instance: Instance | None = None
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

    @property
    def key(self) -> tuple[int, int]:
        return self.pid, self.stat.start_ticks

    def end(self) -> None:
        self._last_labels = self.labels
        self.instance = self.parent = None


order_of = attrgetter("order")


def list_processes() -> dict[int, int]:
    """Return each process with the inode of its folder.

    It stays as long as the process runs, unless the kernel has dropped it from its caches.
    """
    with os.scandir("/proc") as entries:
        return {int(entry.name): entry.inode() for entry in entries if entry.name.isdecimal()}


def read_proc(pid: int, name: str) -> bytes | None:
    return _read_file(f"/proc/{pid}/{name}")


def _read_file(path: str) -> bytes | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return os.read(fd, _MAX_BYTES)
    except OSError:
        return None
    finally:
        os.close(fd)


def read_stat(pid: int, proc: str = "/proc") -> Stat | None:
    """Read what /proc says of a process, its stack from another thread if the first has exited."""
    stat = _read_task_stat(f"{proc}/{pid}")
    if stat is None or not stat.is_exited or stat.is_dead:
        return stat
    thread = _read_task_stat(f"{proc}/{living_thread(pid, proc)}")
    return stat._replace(stack=thread.stack) if thread else stat


def _read_task_stat(folder: str) -> Stat | None:
    content = _read_file(f"{folder}/stat")
    return parse_stat(content) if content else None


def is_alive(process: Generation) -> bool:
    stat = read_stat(process.pid)
    return stat is not None and not stat.is_dead and stat.start_ticks == process.stat.start_ticks


def is_running(pid: int, start_ticks: int | None = None) -> bool:
    """Return whether any thread of the process runs, though its first one may have exited.

    With `start_ticks`, of `Stat`, another process that has got the same number does not count.
    """
    stat = read_stat(pid)
    if stat is None or stat.is_dead:
        return False
    return start_ticks is None or start_ticks == stat.start_ticks


def process_of(tid: int) -> int | None:
    """Return the process of a thread, which is itself if it is the first one; None if it is gone.

    /proc has a folder for every thread, but lists only those of first threads (proc(5)).
    """
    content = read_proc(tid, "status") or b""
    fields = content.partition(b"\nTgid:")[2].split(maxsplit=1)
    return int(fields[0]) if fields else None


def living_thread(pid: int, proc: str = "/proc") -> int:
    """Return a thread of a process that has not exited, the first one if possible; 0 if none.

    /proc/PID has no mappings, no executable and no working directory any more when the first thread
    has exited; /proc/TID of any other thread has.
    """
    stat = _read_task_stat(f"{proc}/{pid}")
    if stat is None or stat.is_dead:
        return 0
    if not stat.is_exited:
        return pid
    for tid in other_threads(pid, proc):
        thread = _read_task_stat(f"{proc}/{pid}/task/{tid}")
        if thread is not None and not thread.is_exited:
            return int(tid)
    return 0


def other_threads(pid: int, proc: str = "/proc") -> list[str]:
    """Return the ids of all threads but the first one."""
    try:  # a thousand times a second, so without pathlib
        tids = os.listdir(f"{proc}/{pid}/task")  # noqa: PTH208
    except OSError:
        return []
    return [tid for tid in tids if tid != str(pid)]


def owner_of(pid: int) -> str:
    """Return the user whose process it is, as a key; of each of root's own processes another."""
    try:
        uid = os.stat(f"/proc/{pid}").st_uid  # noqa: PTH116 - for each process
    except OSError:
        uid = 0
    return f"user {uid}" if uid else f"process {pid}"


def read_cgroups(pid: int, stat: Stat) -> bytes | None:
    """Read /proc/PID/cgroup; in v1 that of a thread that has exited says nothing."""
    return read_proc(living_thread(pid) if stat.is_exited else pid, "cgroup")


def parent_in_proc(pid: int) -> int | None:
    stat = read_stat(pid)
    return stat.parent_pid if stat else None
