"""The kernel's records of processes: who forked, executed, mapped and exited, and when.

`Rings` holds one perf event with its own ring per online CPU. Its `read` costs little per record,
because most records belong to processes nobody will ever ask about: it looks at the fixed head
and leaves the rest as bytes, for `decode` to read when it is needed. Records are those of
perf_event_open(2) and include/uapi/linux/perf_event.h; times are CLOCK_MONOTONIC ns.

What was lost is reported as a `Gap`: an interval in which anything may have happened unseen.
"""

import errno
import logging
import mmap
import os
import select
import time
from collections.abc import Callable
from operator import itemgetter
from struct import Struct
from typing import NamedTuple

from bpf import perf_event
from bpf.errors import PerfEventError

log = logging.getLogger(__name__)

PERF_RECORD_LOST = 2
PERF_RECORD_COMM = 3
PERF_RECORD_EXIT = 4
PERF_RECORD_FORK = 7
PERF_RECORD_MMAP2 = 10
PERF_RECORD_KSYMBOL = 17

PERF_RECORD_KSYMBOL_FLAGS_UNREGISTER = 1
PERF_RECORD_MISC_COMM_EXEC = 1 << 13
PERF_RECORD_MISC_MMAP_BUILD_ID = 1 << 14

RING_PAGES = 128
"""A ring of 512 KiB bridges a second at 1,000 execs a second, and is what perf_event_mlock_kb (516
by default) grants without CAP_IPC_LOCK."""

_PAGE = mmap.PAGESIZE
# Words of struct perf_event_mmap_page, the ring's first page.
_DATA_HEAD, _DATA_TAIL = 1024 // 8, 1032 // 8
# An MMAP2 record with a path of PATH_MAX is the largest there is; a LOST record precedes it.
_LARGEST_RECORD = 72 + 4096 + 8 + 32
_SMALLEST_RECORD = 24
_SMALLEST = {
    PERF_RECORD_LOST: 32,
    PERF_RECORD_COMM: 32,
    PERF_RECORD_EXIT: 40,
    PERF_RECORD_FORK: 40,
    PERF_RECORD_MMAP2: 88,
    PERF_RECORD_KSYMBOL: 40,
}
_TASKS = frozenset((PERF_RECORD_FORK, PERF_RECORD_EXIT))

# type, misc, size; then pid and two words whose meaning depends on the type.
_HEAD = Struct("=IHHIII")
_TIME = Struct("=Q")
_LOST = Struct("=8x8xQ")
_MMAP2 = Struct("=8xIIQQQ24xII")
START = slice(16, 24)
"""Of the raw bytes of an MMAP2 record: the first address."""
_DEVICE = Struct("=40xIIQ")
_KSYMBOL = Struct("=8xQIHH")
_MOST_RECORDS_PER_S = 100_000
"""1,000 execs are 7,000 records. So many take a tenth of a second to read."""
_MAX_KERNEL_SYMBOLS = 10_000
"""So many are kept for who takes them; later ones are left out."""


class Record(NamedTuple):
    """A record as it lies in the ring: `raw` is all of it, with header and time."""

    time_ns: int
    type: int
    misc: int
    pid: int
    raw: bytes


class Gap(NamedTuple):
    """Records are missing after `start_ns` and up to `end_ns`, of any process."""

    start_ns: int
    end_ns: int


class Batch(NamedTuple):
    """What `Rings.read` returns: records sorted by time, and the gaps that were found."""

    records: list[Record]
    gaps: list[Gap]


class Mmap2(NamedTuple):
    """A process mapped executable memory, or made mapped memory executable.

    Either `build_id` (hex) is known or the device and the inode are. `path` is as the process sees
    it, in raw bytes; `//anon` for anonymous memory, brackets for the kernel's own.
    """

    pid: int
    tid: int
    start: int
    size: int
    file_offset: int
    device: tuple[int, int]
    inode: int
    build_id: str
    prot: int
    flags: int
    path: bytes


class Comm(NamedTuple):
    """A thread got a new name; with `is_exec` because the process started another program."""

    pid: int
    tid: int
    is_exec: bool
    comm: bytes


class Task(NamedTuple):
    """FORK: `parent_pid` made the thread. EXIT: the thread ended, as the child of `parent_pid`."""

    pid: int
    parent_pid: int
    tid: int
    parent_tid: int


class KernelSymbol(NamedTuple):
    """The kernel has made code at run time: a BPF program, a trampoline."""

    start: int
    size: int
    name: bytes


def decode_mmap2(record: Record) -> Mmap2:
    """Read an MMAP2 record.

    Raises:
        ValueError: the record is too short.
    """
    raw = record.raw
    if len(raw) < _MMAP2.size + 8:
        raise ValueError(f"cannot read an MMAP2 record of {len(raw)} bytes")
    pid, tid, start, size, file_offset, prot, flags = _MMAP2.unpack_from(raw)
    if record.misc & PERF_RECORD_MISC_MMAP_BUILD_ID:
        device, inode, build_id = (0, 0), 0, raw[44 : 44 + min(raw[40], 20)].hex()
    else:
        major, minor, inode = _DEVICE.unpack_from(raw)
        device, build_id = (major, minor), ""
    path = raw[_MMAP2.size : -8].split(b"\0", 1)[0]
    return Mmap2(pid, tid, start, size, file_offset, device, inode, build_id, prot, flags, path)


def decode_comm(record: Record) -> Comm:
    """Read a COMM record.

    Raises:
        ValueError: the record is too short.
    """
    raw = record.raw
    if len(raw) < 24:
        raise ValueError(f"cannot read a COMM record of {len(raw)} bytes")
    _, _, _, pid, tid, _ = _HEAD.unpack_from(raw)
    comm = raw[16:-8].split(b"\0", 1)[0]
    return Comm(pid, tid, bool(record.misc & PERF_RECORD_MISC_COMM_EXEC), comm)


def decode_task(record: Record) -> Task:
    """Read a FORK or EXIT record.

    Raises:
        ValueError: the record is too short.
    """
    if len(record.raw) < 40:
        raise ValueError(f"cannot read a FORK or EXIT record of {len(record.raw)} bytes")
    _, _, _, pid, parent_pid, tid = _HEAD.unpack_from(record.raw)
    return Task(pid, parent_pid, tid, int.from_bytes(record.raw[20:24], "little"))


class Rings:
    """The rings of all online CPUs.

    Open it before the sampler starts: what a process did before is read from /proc. `refresh`
    follows CPUs that come and go.

    Attributes:
        opened_ns: from here on records are complete, but for the gaps.
        records: how many were read, including those that were skipped.
        lost: how many the kernel says it had no room for.
        damaged: how many could not be read. Each is a gap too.
        last_exits: when a thread that is not the first one of its process exited last, by process,
            in what was read since the owner emptied it.
        muted: processes whose MMAP2 records are left out, until they exec or another one gets the
            pid. For the owner to add to, and to clear where that may have been missed.
    """

    def __init__(
        self,
        pages: int = RING_PAGES,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        most_records_per_s: int = _MOST_RECORDS_PER_S,
    ) -> None:
        self.records = 0
        self.lost = 0
        self.damaged = 0
        self.last_exits: dict[int, int] = {}
        self.muted: set[int] = set()
        self._left_out: tuple[set[int], set[int]] = set(), set()  # by this `read`, and the last one
        self._unmuted: set[int] = set()
        self._pages = pages
        self._clock_ns = clock_ns
        self._rings: dict[int, _Ring] = {}
        self._most_records_per_s = most_records_per_s
        self._second_ns = self._second_records = 0
        self._is_muted = False
        self._held_back: list[Record] = []
        self._gaps: list[Gap] = []
        self._kernel_symbols: list[KernelSymbol] = []
        self._epoll = select.epoll()
        try:
            self._open_missing(perf_event.online_cpus())
        except BaseException:
            self.close()
            raise
        self.opened_ns = self._refreshed_ns = clock_ns()

    def fileno(self) -> int:
        """Return a descriptor that becomes readable when a ring is half full.

        After a second's worth of records has been read, it does so again a second later.
        """
        return self._epoll.fileno()

    def read(self) -> Batch:
        """Take what the kernel has written so far.

        Left out are forks and exits of single threads and renames that are no exec. Records are
        handed out in the order of their times over all calls: what was written after this call
        began waits for the next one, as an earlier record may still arrive from another CPU.
        """
        cutoff_ns = self._clock_ns()
        self._limit_wakes(cutoff_ns)
        self._left_out = (set(), self._left_out[0])
        merged = self._held_back
        self._held_back = []
        for ring in self._rings.values():
            self._read_ring(ring, cutoff_ns, merged)
        merged.sort(key=itemgetter(0))
        keep = len(merged)
        while keep and merged[keep - 1][0] > cutoff_ns:
            keep -= 1
        self._held_back = merged[keep:]
        del merged[keep:]
        gaps, self._gaps = self._gaps, []
        return Batch(merged, gaps)

    def take_kernel_symbols(self) -> list[KernelSymbol]:
        """Return the code that the kernel was seen to make up to the last `read`, each once."""
        symbols, self._kernel_symbols = self._kernel_symbols, []
        return symbols

    def take_doubtful(self) -> list[int]:
        """Return processes that are not `muted` any more, of whose records some may be missing.

        They have begun a program, and mappings of them were left out a moment before or after: a
        process may write into several rings, which are read one after the other.
        """
        doubtful = list(self._unmuted)
        self._unmuted.clear()
        return doubtful

    def refresh(self) -> None:
        """Follow CPUs that went offline or came online. To be called about every second.

        What happened on a CPU between its start and this call was not recorded: a gap.
        """
        now_ns = self._clock_ns()
        online = perf_event.online_cpus()
        stopped = [
            c
            for c, ring in self._rings.items()
            if c not in online or perf_event.has_gone(ring.fd, c, ring.opened_id)
        ]
        for cpu in stopped:
            ring = self._rings.pop(cpu)
            self._read_ring(ring, now_ns, self._held_back)
            self._close_ring(ring)
        opened = self._open_missing(online)
        if stopped or opened:
            log.info("followed CPUs stopped=%s opened=%s", stopped, opened)
        if opened:
            self._gaps.append(Gap(self._refreshed_ns, self._clock_ns()))
        self._refreshed_ns = now_ns

    def close(self) -> None:
        for ring in self._rings.values():
            self._close_ring(ring)
        self._rings.clear()
        self._epoll.close()

    def _limit_wakes(self, now_ns: int) -> None:
        """Let nothing wake the reader for the rest of a second that has had too many records.

        A process that renames its threads a million times a second would keep it busy.
        """
        if now_ns - self._second_ns > 1_000_000_000:
            self._second_ns, self._second_records = now_ns, self.records
        is_muted = self.records - self._second_records > self._most_records_per_s
        if is_muted != self._is_muted:
            self._is_muted = is_muted
            for ring in self._rings.values():
                self._epoll.modify(ring.fd, 0 if is_muted else select.EPOLLIN)

    def _open_missing(self, online: tuple[int, ...]) -> list[int]:
        opened = []
        for cpu in online:
            if cpu in self._rings:
                continue
            try:
                ring = _open_ring(cpu, self._pages, self._clock_ns())
            except PerfEventError as error:
                if error.errno == errno.ENODEV:  # it went offline a moment ago
                    continue
                raise
            self._rings[cpu] = ring
            self._epoll.register(ring.fd, 0 if self._is_muted else select.EPOLLIN)
            opened.append(cpu)
        return opened

    def _close_ring(self, ring: "_Ring") -> None:
        self._epoll.unregister(ring.fd)
        ring.close()

    def _read_ring(  # noqa: C901, PLR0912 - one loop, as it runs for every record of the host
        self, ring: "_Ring", cutoff_ns: int, merged: list[Record]
    ) -> None:
        unread, is_full = ring.take()
        muted, left_out = self.muted, self._left_out[0]
        smallest = _SMALLEST.get
        unpack_head, unpack_time, append = _HEAD.unpack_from, _TIME.unpack_from, merged.append
        position, end, count = 0, len(unread), 0
        while position + _SMALLEST_RECORD <= end:
            type_, misc, size, pid, _, third = unpack_head(unread, position)
            if size < smallest(type_, _SMALLEST_RECORD) or position + size > end:
                break
            start, position = position, position + size
            count += 1
            if type_ in _TASKS:
                if third != pid:
                    if type_ == PERF_RECORD_EXIT:
                        (time_ns,) = unpack_time(unread, position - 8)
                        self.last_exits[pid] = max(time_ns, self.last_exits.get(pid, 0))
                    continue
                if type_ == PERF_RECORD_FORK:
                    self._unmute(pid)
            elif type_ == PERF_RECORD_COMM:
                if not misc & PERF_RECORD_MISC_COMM_EXEC:
                    continue
                self._unmute(pid)
            elif type_ == PERF_RECORD_MMAP2:
                if pid in muted:
                    left_out.add(pid)
                    continue
            else:
                if type_ == PERF_RECORD_LOST:
                    self._note_lost(ring, unread, start, position)
                elif type_ == PERF_RECORD_KSYMBOL:
                    self._note_kernel_symbol(unread[start:position])
                continue
            (time_ns,) = unpack_time(unread, position - 8)
            append(Record(time_ns, type_, misc, pid, unread[start:position]))
        self.records += count
        if position:
            (ring.last_ns,) = unpack_time(unread, position - 8)
        if position < end:
            self.damaged += 1
            log.warning("cannot read records cpu=%d bytes=%d", ring.cpu, end - position)
        ring.was_full = is_full or position < end
        if ring.was_full:
            self._gaps.append(Gap(ring.last_ns, cutoff_ns))

    def _unmute(self, pid: int) -> None:
        self.muted.discard(pid)
        if any(pid in pids for pids in self._left_out):
            self._unmuted.add(pid)

    def _note_lost(self, ring: "_Ring", unread: bytes, start: int, end: int) -> None:
        """Count a LOST record, which stands where the lost ones would have stood.

        At the start of what was read from a ring that was full the last time, it is the gap that is
        known already: reading made room.
        """
        (lost,) = _LOST.unpack_from(unread, start)
        self.lost += lost
        if start == 0 and ring.was_full:
            return
        before_ns = _TIME.unpack_from(unread, start - 8)[0] if start else ring.last_ns
        self._gaps.append(Gap(before_ns, _TIME.unpack_from(unread, end - 8)[0]))

    def _note_kernel_symbol(self, raw: bytes) -> None:
        start, size, _, flags = _KSYMBOL.unpack_from(raw)
        if flags & PERF_RECORD_KSYMBOL_FLAGS_UNREGISTER:
            return
        if len(self._kernel_symbols) < _MAX_KERNEL_SYMBOLS:
            name = raw[_KSYMBOL.size : -8].split(b"\0", 1)[0]
            self._kernel_symbols.append(KernelSymbol(start, size, name))


class _Ring:
    """One CPU's event and the memory it shares with the kernel.

    The kernel writes `data_head`, we write `data_tail`; both only grow. x86_64 keeps loads, and
    loads before stores, in order, and a one-word memoryview access is one move, so no barrier is
    needed between reading the head, copying, and writing the tail.
    """

    def __init__(
        self, cpu: int, fd: int, memory: mmap.mmap, now_ns: int, opened_id: int = 0
    ) -> None:
        self.cpu = cpu
        self.fd = fd
        self.opened_id = opened_id
        self.last_ns = now_ns
        self.was_full = False
        self._memory = memory
        self._words = memoryview(memory).cast("Q")
        self._size = len(memory) - _PAGE

    def take(self) -> tuple[bytes, bool]:
        """Return what is unread, and whether the ring may have been too full for another record."""
        head, tail = self._words[_DATA_HEAD], self._words[_DATA_TAIL]
        if head == tail:
            return b"", False
        start, end = tail % self._size + _PAGE, head % self._size + _PAGE
        if start < end:
            unread = self._memory[start:end]
        else:
            unread = self._memory[start:] + self._memory[_PAGE:end]
        self._words[_DATA_TAIL] = head
        return unread, self._size - (head - tail) < _LARGEST_RECORD

    def close(self) -> None:
        self._words.release()
        self._memory.close()
        os.close(self.fd)


def _open_ring(cpu: int, pages: int, now_ns: int) -> _Ring:
    """Open, map and start; a smaller ring where the kernel refuses to lock that much memory."""
    opened_id = perf_event.online_id(cpu)  # before: it may go while the event is opened
    fd = perf_event.open_event(perf_event.lifecycle_attr(pages * _PAGE // 2), cpu=cpu)
    try:
        memory = _map_ring(fd, pages)
        perf_event.enable(fd)
    except BaseException:
        os.close(fd)
        raise
    return _Ring(cpu, fd, memory, now_ns, opened_id)


def _map_ring(fd: int, pages: int) -> mmap.mmap:
    while True:
        try:
            return mmap.mmap(fd, (1 + pages) * _PAGE)
        except PermissionError:
            if pages == 1:
                raise
            pages //= 2
