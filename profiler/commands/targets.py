"""What is recorded: all CPUs, some processes, or a command that is started for it."""

import os
import shlex
import signal
import sys
from collections.abc import Iterable, Sequence
from typing import Protocol

from profiler.agent.supervise import RefusedError
from profiler.processes.generations import is_running, list_processes, process_of, read_stat
from profiler.processes.loading import find_loaded, mapped
from profiler.text import listed, path_text

_NAMED = 5
"""So many processes are named in a message."""


class Target(Protocol):
    """What is recorded: which processes, and when they have ended.

    Attributes:
        pids: None for all.
        name: as in "sampling NAME".
        notes: what the user must know before it begins.
    """

    pids: frozenset[int] | None
    name: str
    notes: Sequence[str]

    def start(self) -> None: ...
    def has_ended(self) -> bool: ...
    def ask_to_end(self, met: signal.Signals) -> None: ...
    def exit_status(self) -> int: ...


def target_of(pids: Sequence[int]) -> Target:
    """Return these processes as a target, or all CPUs if there are none."""
    return Processes(pids) if pids else AllCpus()


class AllCpus:
    pids: frozenset[int] | None = None
    name = "all CPUs"
    notes: Sequence[str] = ()

    def start(self) -> None:
        pass

    def has_ended(self) -> bool:
        return False

    def ask_to_end(self, met: signal.Signals) -> None:
        pass

    def exit_status(self) -> int:
        return 0


class Processes(AllCpus):
    """Running processes and their descendants; a thread stands for its process.

    Raises:
        RefusedError: one of them does not exist, or has ended.
    """

    def __init__(self, given: Sequence[int]) -> None:
        self._start_ticks: dict[int, int] = {}
        notes = []
        for number in given:
            pid = process_of(number)
            stat = read_stat(pid) if pid is not None else None
            if pid is None or stat is None:
                raise RefusedError(f"cannot record process {number}: there is no such process")
            if stat.is_dead:
                raise RefusedError(f"cannot record process {number}: it has ended")
            if pid != number:
                notes.append(f"{number} is a thread: its whole process, {pid}, is recorded")
            self._start_ticks[pid] = stat.start_ticks
        self.notes = notes
        self.name = f"{'process' if len(self._start_ticks) == 1 else 'processes'} " + listed(
            list(map(str, self._start_ticks)), _NAMED
        )
        self.pids = frozenset(_with_descendants(self._start_ticks))

    def has_ended(self) -> bool:
        return not any(is_running(pid, ticks) for pid, ticks in self._start_ticks.items())


class Command:
    """A program that is forked at once but waits for `start` before it execs."""

    def __init__(
        self,
        command: Sequence[str],
        environment: dict[str, str],
        ignored: Iterable[signal.Signals] = (),
    ) -> None:
        gate, self._open_gate = os.pipe()
        try:
            # The child has what the command will map, so it is prepared for as if it ran.
            with mapped(find_loaded(command[0], environment)):
                self._pid = os.fork()
                if self._pid == 0:
                    _become(command, environment, ignored, gate, self._open_gate)
        except OSError as error:
            raise RefusedError(
                f"cannot start {command[0]}: {error.strerror} (see ulimit -u, and pids.max and the"
                " memory limit of the cgroup)"
            ) from error
        os.close(gate)
        self._status: int | None = None
        self.name = path_text(shlex.join(command))
        self.notes: Sequence[str] = ()
        self.pids: frozenset[int] | None = frozenset({self._pid})

    def start(self) -> None:
        os.write(self._open_gate, b"!")
        os.close(self._open_gate)

    def has_ended(self) -> bool:
        if self._status is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            self._status = status if pid else None
        return self._status is not None

    def ask_to_end(self, met: signal.Signals) -> None:
        # A Ctrl-C at the terminal has reached the command already: it is in the same group.
        if not self.has_ended() and not (met == signal.SIGINT and _is_foreground()):
            os.kill(self._pid, met)

    def exit_status(self) -> int:
        """Wait for the command and return its status as a shell does: 128 + n for signal n."""
        if not self.has_ended():
            _, self._status = os.waitpid(self._pid, 0)
        code = os.waitstatus_to_exitcode(self._status or 0)
        return code if code >= 0 else 128 - code


def _become(
    command: Sequence[str],
    environment: dict[str, str],
    ignored: Iterable[signal.Signals],
    gate: int,
    other: int,
) -> None:
    """Turn the forked child into the command; never returns."""
    try:
        os.close(other)
        if os.read(gate, 1):
            # Python ignores these two, and what is ignored stays so over an exec.
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            for number in ignored:
                signal.signal(number, signal.SIG_IGN)
            os.execvpe(command[0], list(command), environment)  # noqa: S606 - it is what was asked
    except OSError as error:
        sys.stderr.write(f"everflame: cannot run {command[0]}: {error.strerror}\n")
        sys.stderr.flush()
    finally:
        os._exit(127)


def _is_foreground() -> bool:
    try:
        return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except (OSError, ValueError):
        return False


def _with_descendants(roots: Iterable[int]) -> set[int]:
    children: dict[int, list[int]] = {}
    for pid in list_processes():
        if stat := read_stat(pid):
            children.setdefault(stat.parent_pid, []).append(pid)
    found: set[int] = set()
    pending = list(roots)
    while pending:
        pid = pending.pop()
        if pid not in found:
            found.add(pid)
            pending += children.get(pid, [])
    return found
