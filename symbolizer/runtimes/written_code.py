"""Read what processes have written about their own code: perf maps and jitdumps.

This opens files of others, so a reader child does it. A file counts if it is a regular one, of the
process's user or of root, and was written since the process began what it runs: maps outlive their
processes, and pids are used again. A perf map is where the process sees /tmp and by the pid that it
sees itself, a jitdump (`jit-PID.dump`) is one that it has mapped.

What was read is kept, and read on from where it was left. A file that was written anew, under the
same name or in place, is read from its beginning.
"""

import contextlib
import os
import re
import stat
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from symbolizer import maps
from symbolizer.files import OpenedFile, ProcessFiles, close_file
from symbolizer.location import Miss
from symbolizer.runtimes.code_names import location_of
from symbolizer.runtimes.jitdump import DamagedDump, JitDump
from symbolizer.runtimes.perf_map import PerfMap

LONGEST_BYTES = 64 << 20
"""Of a file. What is beyond is not read."""
TURN_CPU_S = 0.25
"""For how long one file is read at once. The rest is read when it is asked for again."""
MAX_ANSWERED = 1024
"""Ranges in one answer."""
_PART_BYTES = 256 << 10
_MAX_KEPT, _MAX_KEPT_BYTES = 32, 32 << 20
_COMPARED_PARTS = 16
"""Parts of which it is looked whether they are still as they were read."""
_SLACK_NS = 10_000_000
"""A file's time is that of the last timer tick (current_time() in the kernel)."""
_MAX_STATUS_BYTES = 64 << 10


class Outcome(StrEnum):
    """What came of looking for one file. The list is closed."""

    READ = "read"
    NO_FILE = "no_file"
    NOT_REGULAR = "not_regular"
    """A link, a FIFO, a device or a folder."""
    NOT_PERMITTED = "not_permitted"
    OTHER_OWNER = "other_owner"
    """It is of another user than the process, and not of root."""
    OUTDATED = "outdated"
    """It was last written before the process began what it runs."""
    TOO_LARGE = "too_large"
    """It was read up to the limit."""
    DAMAGED = "damaged"


class _Process(NamedTuple):
    """What is to be known of a process: by which number it knows itself, and who it is."""

    pid: int
    start_ticks: int
    own_pid: int
    users: frozenset[int]
    begin_ns: int
    """When it began what it runs, in ns since 1970."""


class _Content(Protocol):
    """What is known of a file up to a position."""

    @property
    def size_bytes(self) -> int: ...
    def read_on(self, fd: int, size: int, is_enough: Callable[[], bool]) -> bool: ...
    def is_still(self, fd: int, size: int) -> bool: ...
    def find(self, addresses: Sequence[int]) -> list[tuple[int, int, bytes, bytes, int]]: ...


class _Parts:
    """Checksums of parts of a file, to see whether it was written anew."""

    def __init__(self) -> None:
        self._sums: list[tuple[int, int, int]] = []

    def add(self, at: int, part: bytes) -> None:
        """Take note of what was read; short parts that follow each other become one."""
        if self._sums:
            before, size, crc = self._sums[-1]
            if before + size == at and size + len(part) <= _PART_BYTES:
                self._sums[-1] = (before, size + len(part), zlib.crc32(part, crc))
                return
        self._sums.append((at, len(part), zlib.crc32(part)))

    def hold(self, fd: int) -> bool:
        """Return whether parts spread over the file are as they were, its first and last ones."""
        step = max(1, -(-len(self._sums) // _COMPARED_PARTS))
        compared = {*self._sums[::step], *self._sums[-1:]}
        return all(zlib.crc32(os.pread(fd, size, at)) == was for at, size, was in compared)


class _PerfMapFile:
    def __init__(self) -> None:
        self._map = PerfMap()
        self._parts = _Parts()
        self._position = 0

    @property
    def size_bytes(self) -> int:
        return self._map.size_bytes

    def read_on(self, fd: int, size: int, is_enough: Callable[[], bool]) -> bool:
        end = min(size, LONGEST_BYTES)
        while self._position < end:
            part = os.pread(fd, min(_PART_BYTES, end - self._position), self._position)
            if not part:
                break
            self._parts.add(self._position, part)
            self._position += len(part)
            self._map.feed(part)
            if is_enough():
                return False
        return True

    def is_still(self, fd: int, size: int) -> bool:
        return size >= self._position and self._parts.hold(fd)

    def find(self, addresses: Sequence[int]) -> list[tuple[int, int, bytes, bytes, int]]:
        return [(start, end, name, b"", 0) for start, end, name in self._map.find(addresses)]


class _JitDumpFile:
    def __init__(self) -> None:
        self._dump = JitDump()
        self._parts = _Parts()

    @property
    def size_bytes(self) -> int:
        return self._dump.size_bytes

    def read_on(self, fd: int, size: int, is_enough: Callable[[], bool]) -> bool:
        dump, begin = self._dump, self._dump.position

        def is_full() -> bool:
            return dump.read_bytes >= LONGEST_BYTES

        try:
            is_whole = dump.read(
                lambda offset, length: os.pread(fd, length, offset),
                size,
                lambda: is_full() or is_enough(),
            )
        finally:
            if dump.position > begin:
                # Where it was read on is as good as all: the code itself is not looked at.
                self._parts.add(begin, os.pread(fd, min(4096, dump.position - begin), begin))
        return is_whole or is_full()

    def is_still(self, fd: int, size: int) -> bool:
        return size >= self._dump.position and self._parts.hold(fd)

    def find(self, addresses: Sequence[int]) -> list[tuple[int, int, bytes, bytes, int]]:
        return self._dump.find(addresses)


class _Kept(NamedTuple):
    """What was read of a file, and which one that was."""

    content: _Content
    inode: tuple[int, int]


class WrittenCode:
    """Answers requests for the names of code, and keeps what it has read."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[int, int, str], _Kept] = OrderedDict()

    def read(self, values: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return what is at `addresses` of a process; None if it has ended.

        `pid`, `start_ticks` say which process it is, `begin_ns` (CLOCK_BOOTTIME) when it began what
        it runs, `dumps` are its mappings of jitdumps. The answer has the outcome of each kind of
        file by its name, `ranges` of (start, end, the fields of a NamedLocation), those of a
        jitdump last and better, and `is_partial`: whether there is more to read.
        """
        with ProcessFiles(values["pid"]) as files:
            process = _process_of(files, values)
            if process is None:
                return None
            wanted = list(map(int, values["addresses"]))
            dump = self._look(files, process, "jitdump", values["dumps"], wanted)
            perf_map = self._look(files, process, "perf_map", (), wanted)
        found = [*perf_map.found, *dump.found][-MAX_ANSWERED:]
        return {
            "jitdump": dump.outcome,
            "perf_map": perf_map.outcome,
            "is_partial": not (dump.is_whole and perf_map.is_whole),
            "ranges": [
                (start, end, *location_of(name, file, line))
                for start, end, name, file, line in found
            ],
        }

    def _look(
        self,
        files: ProcessFiles,
        process: _Process,
        kind: str,
        dumps: Sequence[Mapping[str, Any]],
        wanted: Sequence[int],
    ) -> "_Look":
        files.failure = Miss.NO_FILE
        candidates = (
            _open_dumps(files, process, dumps) if kind == "jitdump" else _open_map(files, process)
        )
        outcome = Outcome.NO_FILE
        for opened in candidates:
            try:
                status = os.fstat(opened.fd)
                outcome = _judge(status, process)
                if outcome == Outcome.READ:
                    return self._read(opened.fd, status, process, kind, wanted)
            finally:
                close_file(opened.fd)
        self._kept.pop((process.pid, process.start_ticks, kind), None)
        if outcome == Outcome.NO_FILE:
            outcome = _OUTCOMES.get(files.failure, Outcome.NO_FILE)
        return _Look(outcome, [], True)

    def _read(
        self, fd: int, status: os.stat_result, process: _Process, kind: str, wanted: Sequence[int]
    ) -> "_Look":
        key, inode = (process.pid, process.start_ticks, kind), (status.st_dev, status.st_ino)
        kept = self._kept.pop(key, None)
        content = _CONTENTS[kind]()
        if kept and kept.inode == inode and kept.content.is_still(fd, status.st_size):
            content = kept.content
        until_s = time.thread_time() + TURN_CPU_S
        outcome, is_whole = Outcome.READ, True
        try:
            is_whole = content.read_on(fd, status.st_size, lambda: time.thread_time() >= until_s)
        except DamagedDump:
            outcome = Outcome.DAMAGED
        if is_whole and outcome == Outcome.READ and status.st_size > LONGEST_BYTES:
            outcome = Outcome.TOO_LARGE
        found = content.find(wanted)
        self._kept[key] = _Kept(content, inode)
        self._forget()
        return _Look(outcome, found, is_whole)

    def _forget(self) -> None:
        """Forget what was not asked for for longest; one file is always kept."""
        size_bytes = sum(kept.content.size_bytes for kept in self._kept.values())
        while len(self._kept) > _MAX_KEPT or (len(self._kept) > 1 and size_bytes > _MAX_KEPT_BYTES):
            _, oldest = self._kept.popitem(last=False)
            size_bytes -= oldest.content.size_bytes


class _Look(NamedTuple):
    """What came of one file: ranges with name, file and line; whether its end was reached."""

    outcome: Outcome
    found: list[tuple[int, int, bytes, bytes, int]]
    is_whole: bool


_CONTENTS: Mapping[str, Callable[[], _Content]] = {
    "perf_map": _PerfMapFile,
    "jitdump": _JitDumpFile,
}
_OUTCOMES = {
    Miss.NOT_REGULAR: Outcome.NOT_REGULAR,
    Miss.NOT_PERMITTED: Outcome.NOT_PERMITTED,
}


def _judge(status: os.stat_result, process: _Process) -> Outcome:
    if not stat.S_ISREG(status.st_mode):
        return Outcome.NOT_REGULAR
    if status.st_uid not in process.users:
        return Outcome.OTHER_OWNER
    if status.st_mtime_ns < process.begin_ns - _SLACK_NS:
        return Outcome.OUTDATED
    return Outcome.READ


def _open_map(files: ProcessFiles, process: _Process) -> Iterator[OpenedFile]:
    opened = files.open_file(b"/tmp/perf-%d.map" % process.own_pid, may_be_link=False)
    if opened is not None:
        yield opened


def _open_dumps(
    files: ProcessFiles, process: _Process, dumps: Sequence[Mapping[str, Any]]
) -> Iterator[OpenedFile]:
    """Open the process's own jitdump: a fork has its parent's mapped as well.

    JavaScriptCore writes the number of a thread before that of the process.
    """
    name = re.compile(rb".*/jit-(\d+-)?%d\.dump" % process.own_pid, re.DOTALL)
    for dump in dumps:
        mapping = maps.Mapping(
            start=dump["start"],
            end=dump["end"],
            file_offset=dump["offset"],
            path=os.fsencode(dump["path"]),
            device=(dump["device"][0], dump["device"][1]),
            inode=dump["inode"],
        )
        if not name.fullmatch(mapping.file_path):
            continue
        for opened in files.candidates_inside(mapping):
            status = os.fstat(opened.fd)
            device = (os.major(status.st_dev), os.minor(status.st_dev))
            if opened.is_certain or (device, status.st_ino) == (mapping.device, mapping.inode):
                yield opened
            else:
                close_file(opened.fd)


def _process_of(files: ProcessFiles, values: Mapping[str, Any]) -> _Process | None:
    """Return the process that is asked for; None if it has ended."""
    try:  # `files` may be of another thread than the first one, which started later
        content = Path(f"/proc/{values['pid']}/stat").read_bytes()
    except OSError:
        return None
    status = files.read("status", _MAX_STATUS_BYTES) or b""
    if int(content.rpartition(b")")[2].split()[19]) != values["start_ticks"]:
        return None
    lines = dict(line.split(b":", 1) for line in status.splitlines() if b":" in line)
    with contextlib.suppress(KeyError, ValueError, IndexError):
        real, effective, _, file_system = map(int, lines[b"Uid"].split())
        since_boot_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - values["begin_ns"]
        return _Process(
            pid=values["pid"],
            start_ticks=values["start_ticks"],
            own_pid=int((lines.get(b"NStgid") or lines[b"Tgid"]).split()[-1]),
            users=frozenset((0, real, effective, file_system)),
            begin_ns=time.time_ns() - since_boot_ns,
        )
    return None
