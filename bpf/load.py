"""The parent of the child that compiles (`bpf.compile`): starts it, and waits as long as it works.

However slow the host is, a child that gets CPU time is waited for. One that dies has a reason, and
the error says the remedy: most often memory is short.
"""

import contextlib
import errno
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bpf.errors import LoadError
from bpf.memory_limit import MemoryLimit, memory_limit

_LOOK_S = 15.0
"""How often the child that compiles is looked at, which takes a second; beside a load of 20 on two
CPUs it took more than a minute."""
_TURN_S = 0.05
_STALLS_S = 600.0
"""A child that has had no CPU time for so long hangs. One that is slow is waited for."""
_NEEDS_MB = 200
"""Memory of the sampler and of LLVM beside it: 107 to 116 MB with LLVM 14, 170 with larger ones."""
_START_WITHIN_S = 60.0
"""For so long a child that cannot be started, for want of memory or processes, is tried again."""

log = logging.getLogger(__name__)


def ask_child(request: bytes, meanwhile: Callable[[], None]) -> tuple[dict[str, int], int]:
    """Return what the child has loaded: descriptors by name, and the frames of one program.

    It may take as long as it makes progress; `meanwhile` is called now and then.

    Raises:
        LoadError: it cannot; the message says what to do.
    """
    before = memory_limit()
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            child = _start_child(theirs.fileno())
        complaint = _wait_for(child, request, meanwhile)
        message, fds, _, _ = socket.recv_fds(ours, 1 << 16, 64)
    answer = json.loads(message) if message else {}
    if not answer or "memory" in answer:
        raise LoadError(
            f"cannot compile the BPF programs: {_why_it_died(child.returncode, complaint, before)}"
        )
    if os.strerror(errno.ENOMEM) in answer.get("error", ""):
        raise LoadError(f"cannot load the BPF programs: {_memory_is_short()}")
    if "error" in answer:
        lines = [line for line in complaint.splitlines() if line.strip()]
        detail = next((line for line in lines if "error" in line.lower()), "")
        raise LoadError(f"{answer['error']}{': ' if detail else ''}{detail}")
    return dict(zip(answer["descriptors"], fds, strict=True)), int(answer["frames_per_program"])


def _start_child(channel: int) -> subprocess.Popen[bytes]:
    """Start the child, which inherits the channel; a host without room for it is asked again."""
    deadline, pause_s = time.monotonic() + _START_WITHIN_S, 0.1
    while True:
        try:
            return subprocess.Popen(
                # -P: Python would look for modules in the working folder first, which may be
                # anybody's.
                [sys.executable, "-P", "-m", "bpf.compile", str(channel)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=[channel],
                process_group=0,  # a Ctrl-C is for who waits for it
                env={
                    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
                    "LC_ALL": "C.UTF-8",
                    "BCC_KERNEL_SOURCE": str(Path(__file__).parent),
                    "PYTHONPATH": str(Path(__file__).parent.parent),
                    "PYTHONDONTWRITEBYTECODE": "1" if sys.dont_write_bytecode else "",
                },
            )
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.ENOMEM) or time.monotonic() > deadline:
                raise LoadError(
                    f"cannot start the child that compiles the BPF programs: {error.strerror}"
                    " (see ulimit -u, and pids.max and the memory limit of the cgroup)"
                ) from error
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 5.0)


def _wait_for(child: subprocess.Popen[bytes], request: bytes, meanwhile: Callable[[], None]) -> str:
    """Wait until the child has ended, as long as it takes; return what it has complained of."""
    begun_s = advanced_s = looked_s = time.monotonic()
    pending: bytes | None = request
    used = 0
    while True:
        try:
            _, complaint = child.communicate(pending, timeout=min(_TURN_S, _LOOK_S))
        except subprocess.TimeoutExpired:
            meanwhile()
            pending, now_s = None, time.monotonic()
            if now_s - looked_s < _LOOK_S:
                continue
            looked_s = now_s
            if (now := _cpu_ticks(child.pid)) > used:
                used, advanced_s = now, now_s
            if now_s - advanced_s > _STALLS_S:
                _give_up(child)
                raise LoadError(
                    "cannot compile the BPF programs: the child that does it has had no CPU time"
                    f" for {_STALLS_S:.0f} s (is it stopped, or does a file system hang?)"
                ) from None
            log.warning("compiling the BPF programs since_s=%.0f", now_s - begun_s)
        else:
            return complaint.decode(errors="replace")


def _give_up(child: subprocess.Popen[bytes]) -> None:
    """Kill it, and wait a moment only: it may hang in the kernel."""
    child.kill()
    for pipe in (child.stdin, child.stderr):
        if pipe is not None:
            pipe.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(1.0)


def _cpu_ticks(pid: int) -> int:
    """Return the CPU time of a process that is not reaped yet (proc_pid_stat(5))."""
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return int(fields[11]) + int(fields[12])


def _why_it_died(status: int, complaint: str, before: MemoryLimit) -> str:
    """Return why the child has left no answer, and what to do about it."""
    is_short = any(word in complaint for word in ("out of memory", "bad_alloc", "MemoryError"))
    if is_short or status == 0 or memory_limit().kills > before.kills:
        return _memory_is_short()
    if status == -signal.SIGKILL:
        return f"the child was killed; {_memory_is_short()}, if the kernel did it (see dmesg)"
    if status < 0:
        return f"the child crashed with {signal.Signals(-status).name} (reinstall python3-bpfcc)"
    last = next((line for line in reversed(complaint.splitlines()) if line.strip()), "")
    return f"the child ended with status {status}: {last or 'it said nothing'}"


def _memory_is_short() -> str:
    limit_bytes = memory_limit().limit_bytes
    remedy = f"allow at least {_NEEDS_MB} MB"
    if limit_bytes is None:
        return f"memory is short ({remedy}; see ulimit -v)"
    return f"memory is short: the limit of this cgroup is {limit_bytes / 1e6:.0f} MB ({remedy})"
