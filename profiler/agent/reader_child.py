"""A reader child as the sampler sees it: what it was asked for, what it answered, how it fares."""

import enum
import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from profiler.agent.reader import LONGEST_MESSAGE_BYTES
from profiler.processes.generations import read_proc

_ITEM_S = 30.0
"""An item takes two seconds of CPU time at most; a busy host takes longer for them."""
_PART_BYTES = 32 << 10
"""Received at once. Python allocates as much for each call, and glibc maps more than 64 KB anew."""
_SEND_TIMEOUT = struct.pack("ll", 1, 0)
"""How long a child may take no request (struct timeval): it reads all the time when it is idle."""


class Failure(enum.StrEnum):
    """Why there is no result."""

    ERROR = "error"
    """The reader raised an exception."""
    UNWRITTEN = "unwritten"
    """What was read cannot be kept: the cache cannot be written just now."""
    MEMORY = "memory"
    TIME = "time"
    """It took more CPU time than an item may."""
    HUNG = "hung"
    CRASHED = "crashed"
    SET_ASIDE = "set_aside"
    """Something of the same group hung a while ago."""
    BUDGET = "budget"
    """What its owner has took so much CPU time lately that nothing more of it is read for now."""


class Answer(NamedTuple):
    """What became of an item: a result, or the failure."""

    result: Any = None
    failure: Failure | None = None


Take = Callable[[Answer], None]


class Item(NamedTuple):
    kind: str
    values: Mapping[str, Any]
    take: Take
    group: str
    owner: str
    asked_s: float
    place: int
    """In `_waiting`."""


class Patience(NamedTuple):
    """How often children are looked at, and after how long without progress they hang."""

    look_s: float
    hangs_after_s: float


class ReaderChild:
    """One reader, and the items that it was asked for and has not answered."""

    def __init__(self, kinds: str, cache: Path) -> None:
        self._ours, theirs = socket.socketpair()
        # A timeout of Python's own would take two more calls for each message.
        self._ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _SEND_TIMEOUT)
        self._received = bytearray()
        self._items: deque[Item] = deque()
        self._is_asked = False
        self.owner = ""
        self.since_s = self._progress_s = self._looked_s = time.monotonic()
        self.cpu_s = self._counted_s = 0.0
        with theirs:
            try:
                self.process = subprocess.Popen(
                    [
                        *(sys.executable, "-P", "-m", "profiler.agent.reader"),
                        *(str(theirs.fileno()), kinds, str(cache)),
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    process_group=0,  # a Ctrl-C is for who waits for it
                    env={
                        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
                        "LC_ALL": "C.UTF-8",
                        "OPENBLAS_NUM_THREADS": "1",
                        "PYTHONPATH": str(Path(__file__).parent.parent.parent),
                        "PYTHONDONTWRITEBYTECODE": "1" if sys.dont_write_bytecode else "",
                    },
                )
            except OSError:
                self._ours.close()
                raise

    def fileno(self) -> int:
        return self._ours.fileno()

    @property
    def is_idle(self) -> bool:
        return not self._is_asked

    @property
    def is_patient(self) -> bool:
        """Whether it may be busy for long, with nothing that comes first."""
        return any(item.place for item in self._items)

    @property
    def group(self) -> str:
        """The group of what it reads now."""
        return self._items[0].group if self._items else ""

    def ask(self, items: list[Item]) -> bool:
        """Send items of one kind and owner; return whether the child takes them."""
        request = {"kind": items[0].kind, "items": [item.values for item in items]}
        content = json.dumps(request).encode()
        self._items.extend(items)
        self.owner = items[0].owner
        self._is_asked = True
        self.since_s = self._progress_s = self._looked_s = time.monotonic()
        try:
            self._ours.sendall(len(content).to_bytes(4, "little") + content)
        except OSError:
            return False
        return True

    def receive(self) -> bool:
        """Take in what has arrived; return whether the child still runs."""
        try:
            while part := self._ours.recv(_PART_BYTES, socket.MSG_DONTWAIT):
                self._received += part
                if len(self._received) > 2 * LONGEST_MESSAGE_BYTES:
                    return False
                if len(part) < _PART_BYTES:  # there is no more for now
                    return True
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def messages(self) -> Iterator[dict[str, Any]]:
        """Return the whole messages that have arrived; one that cannot be read ends them."""
        while len(self._received) >= 4:
            size = int.from_bytes(self._received[:4], "little")
            if len(self._received) < 4 + size:
                return
            content = bytes(self._received[4 : 4 + size])
            del self._received[: 4 + size]
            self._progress_s = time.monotonic()
            try:
                message = json.loads(content)
            except (ValueError, RecursionError):
                message = None
            yield message if isinstance(message, dict) else {"error": "unreadable"}

    def answered(self) -> Item | None:
        return self._items.popleft() if self._items else None

    def unanswered(self) -> list[Item]:
        items = list(self._items)
        self._items.clear()
        return items

    def used(self) -> float:
        """Return the CPU time, as of the last look, since the last call."""
        since_s, self._counted_s = self.cpu_s - self._counted_s, self.cpu_s
        return since_s

    def rest(self) -> None:
        self._is_asked = False
        self.since_s = time.monotonic()

    def hangs(self, now_s: float, patience: Patience) -> bool:
        """Return whether it makes no progress; to be called now and then while it is asked."""
        if now_s - self._looked_s < patience.look_s:
            return False
        self._looked_s = now_s
        before_s = self.cpu_s
        if self.look() or self.cpu_s != before_s:
            self.since_s = now_s
        return now_s - self.since_s > patience.hangs_after_s or now_s - self._progress_s > _ITEM_S

    def look(self) -> bool:
        """Read its CPU time; return whether it, or a child of it, runs or waits for a CPU."""
        pid = self.process.pid
        fields = _stat_of(pid)
        if not fields:
            return False
        self.cpu_s = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
        if fields[0] == b"R":
            return True
        children = (read_proc(pid, f"task/{pid}/children") or b"").split()
        return any(_stat_of(int(child))[:1] == [b"R"] for child in children)

    def close(self) -> None:
        self._ours.close()


def _stat_of(pid: int) -> list[bytes]:
    """Return the fields of a process's stat from its state on; none if it is gone."""
    return (read_proc(pid, "stat") or b"").rpartition(b")")[2].split()
