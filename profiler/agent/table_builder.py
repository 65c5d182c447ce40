"""Table builder: unwind tables of files, built in child processes, one after the other.

Files are others' and large ones take memory: a child builds, writes into the cache, and exits.
"""

import contextlib
import ctypes
import logging
import os
import resource
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import NamedTuple, NoReturn

from symbolizer.maps import MappingTable
from symbolizer.symbolizer import Symbolizer
from symbolizer.symbols.elf import Source, UnreadableElf
from symbolizer.unwind.table import UnwindCache

log = logging.getLogger(__name__)

_BUILD_S = 60
_BUILD_CPU_S = 20
_BUILD_BYTES = 1 << 30
"""Of memory, beyond what the child begins with. The largest tables take 100 MB."""
_FAILED = 3
_PR_SET_PDEATHSIG = 1  # prctl(2)


class MappedFile(NamedTuple):
    """A mapped file as the kernel describes it, without a look at the file itself.

    Without a build id it looks like any later file with its inode and its name, so each address
    space has one of its own: `space` is its number, else 0.
    """

    device: tuple[int, int]
    inode: int
    build_id: str
    path: bytes
    space: int


@dataclass(slots=True)
class Executable:
    """A file under one number, in how many spaces it is, and a mapping of it to open it by."""

    file: MappedFile
    mappings: MappingTable
    place: int
    uses: int = 0


class BuildOutcome(Enum):
    """What became of a table: it is in the cache, it cannot be, or the file was out of reach.

    It may succeed later if it was interrupted: the child was killed, out of time or memory.
    """

    BUILT = "built"
    FAILED = "failed"
    INTERRUPTED = "interrupted"
    UNREACHABLE = "unreachable"


@contextlib.contextmanager
def opened(symbolizer: Symbolizer, pid: int, executable: Executable) -> Iterator[Source | None]:
    """Open the file of a mapping; None for what has no code of a file, or is out of reach."""
    build_id = symbolizer.identify(pid, executable.mappings, executable.place)
    module = symbolizer.modules.get(build_id)
    if not build_id or module is None or not module.segments:
        yield None
        return
    with symbolizer.opened(pid, executable.mappings.mappings[executable.place], build_id) as source:
        yield source


class BuildRequest(NamedTuple):
    key: str
    pid: int
    executable: Executable
    symbolizer: Symbolizer
    cache: UnwindCache


class TableBuilder:
    """Builds tables in children, one after the other."""

    def __init__(self) -> None:
        self._waiting: dict[str, BuildRequest] = {}
        self._child = 0
        self._key = ""
        self._deadline_s = 0.0
        self._finished: list[tuple[str, BuildOutcome]] = []

    def ask(self, request: BuildRequest) -> None:
        if request.key != self._key:
            self._waiting.setdefault(request.key, request)
        if not self._child:
            self._start_next()

    def finished(self) -> list[tuple[str, BuildOutcome]]:
        """Return what became of the tables that were asked for since the last call, by key."""
        if self._child:
            pid, status = os.waitpid(self._child, os.WNOHANG)
            if not pid and time.monotonic() > self._deadline_s:
                os.kill(self._child, signal.SIGKILL)
                pid, status = os.waitpid(self._child, 0)
            if pid:
                self._finished.append((self._key, _outcome(status)))
                self._child, self._key = 0, ""
                self._start_next()
        finished, self._finished = self._finished, []
        return finished

    def close(self) -> None:
        if self._child:
            os.kill(self._child, signal.SIGKILL)
            os.waitpid(self._child, 0)
            self._child = 0

    def _start_next(self) -> None:
        while self._waiting and not self._child:
            request = self._waiting.pop(next(iter(self._waiting)))
            with opened(request.symbolizer, request.pid, request.executable) as source:
                if source is None:
                    self._finished.append((request.key, BuildOutcome.UNREACHABLE))
                    continue
                parent = os.getpid()
                self._child = os.fork()
                if not self._child:
                    _build(parent, source, request)
            self._key = request.key
            self._deadline_s = time.monotonic() + _BUILD_S


def _outcome(status: int) -> BuildOutcome:
    """Return what a child's wait status says."""
    if os.WIFSIGNALED(status):
        return BuildOutcome.INTERRUPTED
    return BuildOutcome.FAILED if status else BuildOutcome.BUILT


def _build(parent: int, source: Source, request: BuildRequest) -> NoReturn:
    """Be the child: build, write, and end without running anything of the parent's."""
    status = _FAILED
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        # It holds the programs' descriptors, which must not outlive the parent.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        resource.setrlimit(resource.RLIMIT_CPU, (_BUILD_CPU_S, _BUILD_CPU_S))
        limit_bytes = _address_space_bytes() + _BUILD_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
        if os.getppid() == parent:
            request.cache.build(source)
            status = 0
    except UnreadableElf:
        pass
    except BaseException:  # whatever it is, the parent goes on
        log.exception("cannot build an unwind table key=%s", request.key)
    finally:
        os._exit(status)


def _address_space_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_bytes().split()[0])
    return pages * resource.getpagesize()
