"""Tasks of `perf script`: the process of each thread and the name of each process."""

import re
from typing import NamedTuple

from storage.profile import Labels, make_labels
from symbolizer.text import readable

_RECORD_TASKS = (
    re.compile(rb"PERF_RECORD_FORK\((?P<pid>\d{1,10}):(?P<tid>\d{1,10})\):(?P<comm>)"),
    re.compile(rb"PERF_RECORD_COMM(?: exec)?: (?P<comm>.*):(?P<pid>\d{1,10})/(?P<tid>\d{1,10})"),
    re.compile(rb"PERF_RECORD_MMAP2? (?P<pid>\d{1,10})/(?P<tid>\d{1,10}):(?P<comm>)"),
)


class Task(NamedTuple):
    """Who was sampled: process and thread id, -1 where they are not known, and the name."""

    pid: int
    tid: int
    comm: str


def task_of(comm: str, first: bytes | None, tid: bytes | None) -> Task:
    if tid is not None and first is not None:
        return Task(int(first), int(tid), comm)
    return Task(-1, int(first) if first is not None else -1, comm)


class Processes:
    """The process of each thread and the name of each process, learned from the lines of a file."""

    def __init__(self) -> None:
        self._pids: dict[int, int] = {0: 0}
        """Process by thread id. Thread 0 is the idle task of process 0."""
        self._main: dict[int, str] = {}
        self._oldest: dict[int, tuple[int, str]] = {}

    def add_record(self, line: bytes) -> None:
        """Learn from a line about a task that was started, named, or mapped a file."""
        for pattern in _RECORD_TASKS:
            if match := pattern.search(line):
                comm = readable(match["comm"])
                task = Task(int(match["pid"]), int(match["tid"]), comm)
                if comm:
                    self.add(task)
                else:
                    self._pids[task.tid] = task.pid

    def add(self, task: Task) -> None:
        if task.pid < 0:
            return
        self._pids[task.tid] = task.pid
        if task.pid == task.tid:
            self._main[task.pid] = task.comm
        oldest = self._oldest.get(task.pid)
        if oldest is None or task.tid < oldest[0]:
            self._oldest[task.pid] = (task.tid, task.comm)

    def pid_of(self, task: Task) -> int | None:
        return task.pid if task.pid >= 0 else self._pids.get(task.tid)

    def labels_of(self, task: Task) -> Labels:
        labels = {"comm": task.comm, "thread": task.comm}
        pid = self.pid_of(task)
        if pid is not None:
            name = task.comm
            if pid != task.tid:  # a main thread's own name, which exec may have changed, is its
                name = self._main.get(pid) or self._oldest.get(pid, (0, task.comm))[1]
            labels |= {"comm": name, "service": name, "pid": str(pid)}
        return make_labels({name: value for name, value in labels.items() if value})
