"""Demangle C++ and Rust names with a `c++filt` child process.

The child parses names from other users' files: its memory and CPU time are limited, and it is
restarted when it exits or hangs. A name that it fails on stays mangled. The limits are CPU time, so
that names do not depend on how busy the host is.
"""

import contextlib
import os
import re
import resource
import select
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

# Itanium C++ (and legacy Rust) and Rust v0, nothing else: c++filt would take other words for names
# of compilers of the past. Suffixes are those of clones, such as .cold and .isra.0.
_MANGLED = re.compile(rb"(?:_Z[A-Za-z0-9_]|_R[A-Z0-9])[A-Za-z0-9_.$]{1,4095}")

# c++filt takes about 10 us per name; 1,000 template-heavy ones 0.1 s.
_BATCH = 512
# CPU time of the children in one call, and of one batch, so that one name does not use up all.
_CALL_CPU_S = 1.0
_BATCH_CPU_S = 0.5
# A child that is asleep after so long has read all and has nothing to answer: it hangs.
_LOOK_S = 0.5
# Of a call, whatever the children do. On a busy host they need many times their CPU time.
_CALL_S = 20.0
# Substitutions let a name of a few hundred bytes expand to any length.
_MEMORY_BYTES = 256 << 20
_MAX_OUTPUT_BYTES = 4 << 20
# Of one child, for about a million names. It may be busy with one when its parent is killed.
_CPU_S = 10
_RESTARTS_PER_CALL = 8
_CPUCLOCK_SCHED = 2  # include/linux/posix-timers.h

# rustc makes names unique with hashes that differ from build to build. They are removed, so that a
# function has the same name after a deployment.
_RUST_LEGACY_HASH = re.compile(rb"::h[0-9a-f]{16}(?= |$)")
_RUST_CRATE_HASH = re.compile(rb"(?<=\w)\[[0-9a-f]{1,16}\]")


class Demangler:
    def __init__(self, program: str = "c++filt") -> None:
        self._program: str | None = program
        self._child: subprocess.Popen[bytes] | None = None
        self._batches = 0

    def demangle(self, names: Sequence[bytes]) -> list[bytes]:
        """Return each name demangled, or unchanged if that fails. Never raises."""
        result = list(names)
        waiting = [i for i, name in enumerate(names) if _MANGLED.fullmatch(_without_plt(name))]
        give_up_at = time.monotonic() + _CALL_S
        left_cpu_s = _CALL_CPU_S
        restarts = 0
        while waiting and restarts <= _RESTARTS_PER_CALL and left_cpu_s > 0:
            batch = waiting[:_BATCH]
            child = self._running_child()
            if child is None or time.monotonic() > give_up_at:
                break
            before_s = _cpu_s(child)
            until_s = before_s + min(_BATCH_CPU_S, left_cpu_s)
            lines = self._ask(child, [_without_plt(names[i]) for i in batch], until_s, give_up_at)
            left_cpu_s -= _cpu_s(child) - before_s
            for i, line in zip(batch, lines, strict=False):
                shown = _drop_build_hashes(names[i], line)
                result[i] = shown + b"@plt" if names[i].endswith(b"@plt") else shown
            if len(lines) < len(batch):
                self.close()
                restarts += 1
            # The name it stopped at stays mangled, so that it cannot block the others.
            waiting = waiting[len(lines) + (len(lines) < len(batch)) :]
        return result

    def close(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        child.wait()

    def _ask(
        self,
        child: subprocess.Popen[bytes],
        names: list[bytes],
        until_cpu_s: float,
        give_up_at: float,
    ) -> list[bytes]:
        """Return the names that came back complete and within the limits, beginning with the first.

        The child may run until its CPU time is `until_cpu_s`.
        """
        assert child.stdin is not None
        assert child.stdout is not None
        # It is returned unchanged, and proves that each line belongs to its name.
        self._batches += 1
        mark = b"%d" % self._batches
        question = memoryview(b"\n".join([*names, mark, b""]))
        answer = bytearray()
        poll = select.poll()
        poll.register(child.stdout, select.POLLIN)
        poll.register(child.stdin, select.POLLOUT)
        try:
            while (
                answer.count(b"\n") <= len(names)
                and len(answer) < _MAX_OUTPUT_BYTES
                and _cpu_s(child) < until_cpu_s
                and time.monotonic() < give_up_at
            ):
                ready = dict(poll.poll(_LOOK_S * 1000))
                if not ready and _is_asleep(child) and not poll.poll(0):
                    break
                if question and child.stdin.fileno() in ready:
                    question = question[os.write(child.stdin.fileno(), question[:4096]) :]
                    if not question:
                        poll.unregister(child.stdin)
                if child.stdout.fileno() in ready:
                    chunk = os.read(child.stdout.fileno(), 65_536)
                    if not chunk:
                        break
                    answer += chunk
        except OSError:  # it exited during the write
            pass
        *lines, _ = bytes(answer).split(b"\n")
        if len(lines) > len(names) and lines[len(names) :] != [mark]:
            return []
        return lines[: len(names)]

    def _running_child(self) -> subprocess.Popen[bytes] | None:
        if self._child is None and self._program is not None:
            try:
                self._child = subprocess.Popen(
                    [self._program],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    bufsize=0,
                    env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"},
                    start_new_session=True,
                )
            except OSError:  # binutils is not installed: names stay mangled
                self._program = None
                return None
            os.set_blocking(self._child.stdin.fileno(), False)  # type: ignore[union-attr]  # a pipe
            with contextlib.suppress(OSError, ValueError):
                limits = (_MEMORY_BYTES, _MEMORY_BYTES)
                resource.prlimit(self._child.pid, resource.RLIMIT_AS, limits)
                resource.prlimit(self._child.pid, resource.RLIMIT_CPU, (_CPU_S, _CPU_S))
        return self._child


def _cpu_s(process: subprocess.Popen[bytes]) -> float:
    """Return the CPU time of a child that has not been waited for, by clock_getcpuclockid(3)."""
    with contextlib.suppress(OSError):
        return time.clock_gettime(~process.pid << 3 | _CPUCLOCK_SCHED)
    return 0.0  # there is no such clock in some sandboxes


def _is_asleep(process: subprocess.Popen[bytes]) -> bool:
    """Return whether a process waits for an event: neither for a CPU nor for a disk."""
    stat = Path(f"/proc/{process.pid}/stat").read_bytes()
    return stat.rpartition(b")")[2].split()[0] == b"S"


def _without_plt(name: bytes) -> bytes:
    return name.removesuffix(b"@plt")


def _drop_build_hashes(name: bytes, demangled: bytes) -> bytes:
    if name.startswith(b"_R"):
        return _RUST_CRATE_HASH.sub(b"", demangled)
    if b"17h" in name:
        return _RUST_LEGACY_HASH.sub(b"", demangled)
    return demangled
