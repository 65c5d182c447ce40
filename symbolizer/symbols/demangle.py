"""Demangle C++ and Rust names with a `c++filt` child process.

The child parses names from other users' files: its memory and CPU time are limited, it gets names
in batches with a deadline, and it is restarted when it exits or hangs. A name that it fails on
stays mangled.
"""

import contextlib
import os
import re
import resource
import select
import subprocess
import time
from collections.abc import Sequence

# Itanium C++ (and legacy Rust) and Rust v0, nothing else: c++filt would take other words for names
# of compilers of the past. Suffixes are those of clones, such as .cold and .isra.0.
_MANGLED = re.compile(rb"(?:_Z[A-Za-z0-9_]|_R[A-Z0-9])[A-Za-z0-9_.$]{1,4095}")

# c++filt takes about 10 us per name; 1,000 template-heavy ones 0.1 s.
_BATCH = 512
_BATCH_DEADLINE_S = 1.0
# Less than the time without progress after which a reader is taken for one that hangs.
_CALL_DEADLINE_S = 1.5
# Substitutions let a name of a few hundred bytes expand to any length.
_MEMORY_BYTES = 256 << 20
_MAX_OUTPUT_BYTES = 4 << 20
# Of one child, for about a million names. It may be busy with one when its parent is killed.
_CPU_S = 10
_RESTARTS_PER_CALL = 8

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
        give_up_at = time.monotonic() + _CALL_DEADLINE_S
        restarts = 0
        while waiting and restarts <= _RESTARTS_PER_CALL and time.monotonic() < give_up_at:
            batch = waiting[:_BATCH]
            lines = self._ask([_without_plt(names[i]) for i in batch], give_up_at)
            for i, line in zip(batch, lines, strict=False):
                shown = _drop_build_hashes(names[i], line)
                result[i] = shown + b"@plt" if names[i].endswith(b"@plt") else shown
            if len(lines) < len(batch):
                self.close()
                restarts += 1
                if self._program is None:
                    break
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

    def _ask(self, names: list[bytes], give_up_at: float) -> list[bytes]:
        """Return the names that came back complete and in time, beginning with the first."""
        child = self._running_child()
        if child is None:
            return []
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
        deadline = min(time.monotonic() + _BATCH_DEADLINE_S, give_up_at)
        try:
            while answer.count(b"\n") <= len(names) and len(answer) < _MAX_OUTPUT_BYTES:
                ready = dict(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
                if not ready:
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


def _without_plt(name: bytes) -> bytes:
    return name.removesuffix(b"@plt")


def _drop_build_hashes(name: bytes, demangled: bytes) -> bytes:
    if name.startswith(b"_R"):
        return _RUST_CRATE_HASH.sub(b"", demangled)
    if b"17h" in name:
        return _RUST_LEGACY_HASH.sub(b"", demangled)
    return demangled
