"""Supervise: one agent a host, and the child processes that it restarts."""

import contextlib
import errno
import fcntl
import logging
import os
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from signal import SIGKILL, SIGTERM

_RESTART_S = (1.0, 60.0)
"""How soon a child that has died is started again: at first, and at most. One that has run for
longer than that begins anew."""
_LOOK_S = 0.05
"""How often a child that was asked to end is looked at."""

log = logging.getLogger(__name__)


class RefusedError(Exception):
    """What was asked for cannot be done; the message says what to do instead."""


def make_run_folder(folder: Path) -> None:
    """Make the folder of the agent's lock and socket, which nobody else may be able to change.

    A user without a session has it in /tmp, where anybody may have made it before, or a link.

    Raises:
        RefusedError: somebody else could put files or links there.
    """
    for path in (*reversed(folder.absolute().parents), folder.absolute()):
        try:
            with contextlib.suppress(FileExistsError):
                path.mkdir(mode=0o755)
            _check_folder(path, path.lstat(), is_own=path == folder.absolute())
        except OSError as error:
            raise RefusedError(
                f"cannot use the run folder {folder}: {path}: {error.strerror} (choose another one"
                " with EVERFLAME_RUN)"
            ) from error


def _check_folder(path: Path, found: os.stat_result, *, is_own: bool) -> None:
    """Check one folder on the way to the run folder, or that itself (`is_own`)."""
    if stat.S_ISLNK(found.st_mode):
        if is_own or found.st_uid != 0:
            raise RefusedError(f"cannot use {path} for the agent's lock: it is a link (remove it)")
        found = path.stat()
    if not stat.S_ISDIR(found.st_mode):
        raise RefusedError(
            f"cannot use {path} for the agent's lock: it is not a folder (remove it)"
        )
    if found.st_uid not in ({os.geteuid()} if is_own else {0, os.geteuid()}):
        raise RefusedError(
            f"cannot use {path} for the agent's lock: it belongs to user {found.st_uid} (remove it,"
            " or choose another folder with EVERFLAME_RUN)"
        )
    is_sticky = found.st_mode & stat.S_ISVTX and not is_own
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not is_sticky:
        raise RefusedError(
            f"cannot use {path} for the agent's lock: others may write there (chmod go-w {path})"
        )


@contextlib.contextmanager
def host_lock(run_folder: Path) -> Iterator[None]:
    """Hold the lock that one agent of a host holds.

    Raises:
        RefusedError: another agent holds it, or the folder is not this user's alone.
    """
    make_run_folder(run_folder)
    fd = _open_lock(run_folder / "agent.lock")
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(fd, 20).decode(errors="replace").strip() or "unknown"
            raise RefusedError(
                f"cannot start: an agent runs on this host already (pid {pid};"
                " see everflame status; everflame serve draws what it stores)"
            ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(fd)


def _open_lock(path: Path) -> int:
    """Open the lock's own file: a link to another one would have it emptied."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(path, flags, 0o644)
    except OSError as error:
        reason = "it is a link" if error.errno == errno.ELOOP else error.strerror
        raise RefusedError(f"cannot lock {path}: {reason} (remove it)") from error
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1 or found.st_uid != os.geteuid():
        os.close(fd)
        raise RefusedError(f"cannot lock {path}: it is not this user's own file (remove it)")
    return fd


def how_it_ended(status: int) -> str:
    """Say how a process ended, by its exit status; a negative one is a signal's number."""
    if status >= 0:
        return f"ended with status {status}"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    # The kernel's way where memory is short; see memory.max and dmesg.
    return f"was killed by {name}{' (is memory short?)' if -status == SIGKILL else ''}"


class Child:
    """Another process, started again whenever it has died. What it starts is in its group.

    Attributes:
        pid: 0 when it does not run.
        starts: how often it was started.
        failed_starts: how often it could not be, for want of memory or processes.
        status: with which it last ended, None as long as it has not.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        monotonic_s: Callable[[], float] = time.monotonic,
        *,
        unblocks_sigterm: bool = False,
    ) -> None:
        """With `unblocks_sigterm` it starts with SIGTERM blocked, and unblocks it when it can end.

        Else SIGTERM kills a child that has not got as far as to handle it.
        """
        self._name = name
        self._command = command
        self._environment = environment
        self._monotonic_s = monotonic_s
        self._blocked = {SIGTERM} if unblocks_sigterm else set[signal.Signals]()
        self._restart_s = _RESTART_S[0]
        self._restart_at = 0.0
        self._started_at = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._is_asked = False
        self.starts = self.failed_starts = 0
        self.status: int | None = None

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0

    def state(self) -> dict[str, int]:
        """Return what stands of it in the agent's status."""
        return {"pid": self.pid, "starts": self.starts, "failed_starts": self.failed_starts}

    def supervise(self) -> None:
        """Start it if it does not run and its time has come."""
        now = self._monotonic_s()
        if self._process and self._has_ended(self._process.pid):
            self.status = self._end_group(self._process)
            log.warning("lost the %s: it %s", self._name, how_it_ended(self.status))
            if now - self._started_at > _RESTART_S[1]:
                self._restart_s = _RESTART_S[0]
            self._pause(now)
        if self._process is None and now >= self._restart_at:
            self._start(now)

    def _pause(self, now: float) -> None:
        self._restart_at = now + self._restart_s
        self._restart_s = min(2 * self._restart_s, _RESTART_S[1])

    def _start(self, now: float) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, self._blocked)  # children inherit it
        try:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, env=self._environment, process_group=0
            )
        except OSError as error:  # no process or no memory is left: there may be later
            self.failed_starts += 1
            log.warning("cannot start the %s: %s", self._name, error.strerror)
            self._pause(now)
            return
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._started_at = now
        self.starts += 1

    def ask_to_end(self) -> None:
        """Ask once: a second SIGTERM would come in the middle of what the first one began."""
        if self._process is not None and not self._is_asked:
            self._is_asked = True
            os.kill(self._process.pid, SIGTERM)  # `terminate` would reap it

    def end(self, within_s: float) -> None:
        """Let it finish what it does, for a while."""
        if self._process is None:
            return
        self.ask_to_end()
        self._has_ended(self._process.pid, within_s)
        self._end_group(self._process)

    @staticmethod
    def _has_ended(pid: int, within_s: float = 0.0) -> bool:
        """Return whether it ends within a time. Its pid, and so its group, stays taken."""
        deadline_s = time.monotonic() + within_s
        while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                return False
            time.sleep(min(_LOOK_S, left_s))
        return True

    def _end_group(self, process: subprocess.Popen[bytes]) -> int:
        """Take what it has left behind with it: workers do not notice that their parent is dead.

        It is reaped last and its status returned: from then on another group may have its number.
        """
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, SIGKILL)
        self._process = None
        return process.wait()
