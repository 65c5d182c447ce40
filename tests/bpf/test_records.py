"""Records of processes: what is decoded, what a ring returns, and what is reported as lost.

Most tests write into a ring as the kernel does; those at the end let the kernel do it.
"""

import ctypes
import mmap
import os
import select
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bpf import perf_event, syscalls
from bpf.records import (
    PERF_RECORD_COMM,
    PERF_RECORD_EXIT,
    PERF_RECORD_FORK,
    PERF_RECORD_KSYMBOL,
    PERF_RECORD_KSYMBOL_FLAGS_UNREGISTER,
    PERF_RECORD_LOST,
    PERF_RECORD_MISC_COMM_EXEC,
    PERF_RECORD_MISC_MMAP_BUILD_ID,
    PERF_RECORD_MMAP2,
    Gap,
    KernelSymbol,
    Record,
    Rings,
    Task,
    _map_ring,
    _Ring,
    decode_comm,
    decode_mmap2,
    decode_task,
)

PAGE = mmap.PAGESIZE
CPU1 = Path("/sys/devices/system/cpu/cpu1/online")
CAP_IPC_LOCK = 14


def make(type_: int, body: bytes, time_ns: int, misc: int = 0) -> bytes:
    body += b"\0" * (-len(body) % 8) + struct.pack("=Q", time_ns)
    return struct.pack("=IHH", type_, misc, 8 + len(body)) + body


def make_fork(pid: int, time_ns: int, tid: int | None = None, parent_pid: int = 1) -> bytes:
    body = struct.pack("=IIIIQ", pid, parent_pid, tid or pid, parent_pid, time_ns)
    return make(PERF_RECORD_FORK, body, time_ns)


def make_exit(pid: int, time_ns: int, tid: int | None = None) -> bytes:
    body = struct.pack("=IIIIQ", pid, 1, tid or pid, 1, time_ns)
    return make(PERF_RECORD_EXIT, body, time_ns)


def make_comm(pid: int, time_ns: int, comm: bytes, misc: int) -> bytes:
    return make(PERF_RECORD_COMM, struct.pack("=II", pid, pid) + comm + b"\0", time_ns, misc)


def make_mmap2(file: bytes, path: bytes, misc: int = 0, time_ns: int = 5) -> bytes:
    body = struct.pack("=IIQQQ", 7, 8, 0x1000, 0x2000, 0x3000) + file
    body += struct.pack("=II", 5, 2) + path + b"\0"
    return make(PERF_RECORD_MMAP2, body, time_ns, misc)


def make_lost(count: int, time_ns: int) -> bytes:
    return make(PERF_RECORD_LOST, struct.pack("=QQ", 1, count), time_ns)


def record_of(raw: bytes) -> Record:
    type_, misc, _, pid = struct.unpack_from("=IHHI", raw)
    return Record(int.from_bytes(raw[-8:], "little"), type_, misc, pid, raw)


class Writer:
    """The kernel's side of a ring."""

    def __init__(self, cpu: int, pages: int = 2) -> None:
        self._memory = mmap.mmap(-1, (1 + pages) * PAGE)
        self._size = pages * PAGE
        self.head = 0
        self.ring = _Ring(cpu, os.open("/dev/null", os.O_RDONLY), self._memory, 0)

    def write(self, *records: bytes) -> None:
        for byte in b"".join(records):
            self._memory[PAGE + self.head % self._size] = byte
            self.head += 1
        struct.pack_into("=Q", self._memory, 1024, self.head)

    @property
    def tail(self) -> int:
        return int(struct.unpack_from("=Q", self._memory, 1032)[0])


class Clock:
    def __init__(self) -> None:
        self.now_ns = 1_000_000

    def __call__(self) -> int:
        return self.now_ns


class WrittenRings(Rings):
    """Rings of two CPUs that the test writes."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.writers = [Writer(0), Writer(1)]
        super().__init__(clock_ns=self.clock)

    def _open_missing(self, online: tuple[int, ...]) -> list[int]:  # noqa: ARG002
        self._rings = {writer.ring.cpu: writer.ring for writer in self.writers}
        return []

    def _close_ring(self, ring: _Ring) -> None:
        ring.close()


@pytest.fixture
def rings() -> Iterator[WrittenRings]:
    rings = WrittenRings()
    yield rings
    rings.close()


def test_mapping_with_a_build_id_has_no_inode() -> None:
    """The misc bit says which of the two lies in the union; the path ends at its NUL."""
    file = struct.pack("=BBH20s", 20, 0, 0, bytes(range(20)))
    raw = make_mmap2(file, b"/bin/true", PERF_RECORD_MISC_MMAP_BUILD_ID)

    mapping = decode_mmap2(record_of(raw))

    assert (mapping.pid, mapping.tid, mapping.prot, mapping.flags) == (7, 8, 5, 2)
    assert (mapping.start, mapping.size, mapping.file_offset) == (0x1000, 0x2000, 0x3000)
    assert (mapping.build_id, mapping.inode) == (bytes(range(20)).hex(), 0)
    assert mapping.path == b"/bin/true"


def test_mapping_without_a_build_id_has_device_and_inode() -> None:
    """Files without a note, and anonymous memory."""
    raw = make_mmap2(struct.pack("=IIQQ", 254, 1, 4711, 2), b"//anon")

    mapping = decode_mmap2(record_of(raw))

    assert (mapping.device, mapping.inode, mapping.build_id) == ((254, 1), 4711, "")


def test_size_of_a_build_id_is_never_believed_beyond_its_field() -> None:
    """A length of 255 is read as the 20 bytes that there are."""
    file = struct.pack("=BBH20s", 255, 0, 0, b"\xab" * 20)
    raw = make_mmap2(file, b"/bin/true", PERF_RECORD_MISC_MMAP_BUILD_ID)

    assert decode_mmap2(record_of(raw)).build_id == "ab" * 20


@pytest.mark.parametrize("path", [b"/a\nb", b"/x (deleted)", b"/\xff\xfe", b"/" + b"p" * 4000])
def test_path_is_kept_byte_by_byte(path: bytes) -> None:
    """Nothing in a file name ends or changes it."""
    assert decode_mmap2(record_of(make_mmap2(bytes(24), path))).path == path


def test_exec_is_told_from_a_rename() -> None:
    """Both are COMM records; one bit differs."""
    executed = decode_comm(record_of(make_comm(7, 5, b"true", PERF_RECORD_MISC_COMM_EXEC)))
    renamed = decode_comm(record_of(make_comm(7, 5, b"worker 1", 0)))

    assert (executed.comm, executed.is_exec) == (b"true", True)
    assert (renamed.comm, renamed.is_exec) == (b"worker 1", False)


def test_fork_names_both_sides() -> None:
    """The parent is the process that called fork, by its pid."""
    record = record_of(make_fork(9, 5, tid=10, parent_pid=4))

    assert decode_task(record) == Task(pid=9, parent_pid=4, tid=10, parent_tid=4)


@given(st.binary(max_size=120), st.integers(0, 0xFFFF))
def test_short_records_are_refused_not_over_read(raw: bytes, misc: int) -> None:
    """Whatever the bytes, a decoder returns a value or raises ValueError."""
    record = Record(0, 0, misc, 0, raw)
    for decode in (decode_mmap2, decode_comm, decode_task):
        try:
            decode(record)
        except ValueError:
            assert len(raw) < 88


def test_records_of_all_cpus_come_in_the_order_of_their_times(rings: WrittenRings) -> None:
    """A process that moved between CPUs keeps its order."""
    rings.writers[0].write(make_fork(10, 100), make_exit(10, 400))
    rings.writers[1].write(make_fork(11, 200), make_exit(11, 300))

    records, gaps = rings.read()

    assert [(r.time_ns, r.type) for r in records] == [(100, 7), (200, 7), (300, 4), (400, 4)]
    assert gaps == []


def test_record_younger_than_the_read_waits_for_the_next(rings: WrittenRings) -> None:
    """Another CPU may still be writing an earlier one, and order holds over all reads."""
    rings.writers[0].write(make_fork(10, 100), make_fork(12, rings.clock.now_ns + 2))
    first = rings.read()
    rings.writers[1].write(make_fork(11, rings.clock.now_ns + 1))
    rings.clock.now_ns += 10
    second = rings.read()

    assert [record.pid for record in first.records] == [10]
    assert [record.pid for record in second.records] == [11, 12]


def test_mappings_of_muted_processes_are_left_out_until_they_exec(rings: WrittenRings) -> None:
    """One that may have lost some after its exec, as it moved between CPUs, is told."""
    file = bytes(24)
    rings.muted |= {7, 12}
    rings.writers[0].write(make_mmap2(file, b"/a", time_ns=5), make_fork(10, 6))
    first, _ = rings.read()
    rings.writers[1].write(make_comm(7, 4, b"true", PERF_RECORD_MISC_COMM_EXEC), make_fork(12, 7))
    rings.read()
    doubtful = rings.take_doubtful()
    rings.writers[0].write(make_mmap2(file, b"/b", time_ns=8))
    third, _ = rings.read()

    assert [record.pid for record in first] == [10]
    assert doubtful == [7]
    assert rings.muted == set()
    assert [record.pid for record in third] == [7]
    assert rings.take_doubtful() == []


def test_threads_and_renames_are_left_out(rings: WrittenRings) -> None:
    """They change nothing of what a process has mapped."""
    rings.writers[0].write(
        make_fork(10, 1, tid=11),
        make_exit(10, 2, tid=11),
        make_comm(10, 3, b"worker", 0),
        make_comm(10, 4, b"true", PERF_RECORD_MISC_COMM_EXEC),
    )

    records, _ = rings.read()

    assert [record.time_ns for record in records] == [4]
    assert rings.records == 4


def test_records_that_wrap_around_the_end_of_the_ring_are_whole(rings: WrittenRings) -> None:
    """Ten rounds through the ring, with records that do not divide its size."""
    writer = rings.writers[0]
    paths = []
    for number in range(1000):
        writer.write(make_mmap2(bytes(24), b"/lib/%d" % number, time_ns=number))
        paths += [decode_mmap2(record).path for record in rings.read().records]

    assert paths == [b"/lib/%d" % number for number in range(1000)]
    assert writer.head == writer.tail > 10 * 2 * PAGE


def test_lost_records_make_a_gap_between_their_neighbours(rings: WrittenRings) -> None:
    """It starts at the record before and ends where the kernel found room again."""
    rings.writers[0].write(make_fork(10, 100), make_lost(3, 250), make_fork(12, 251))

    records, gaps = rings.read()

    assert [record.pid for record in records] == [10, 12]
    assert gaps == [Gap(100, 250)]
    assert rings.lost == 3


def test_lost_record_that_comes_first_refers_to_the_read_before(rings: WrittenRings) -> None:
    """The last time of the same CPU is remembered, also when that record was left out."""
    rings.writers[0].write(make_fork(10, 100), make_exit(10, 150, tid=11))
    rings.read()
    rings.writers[0].write(make_lost(1, 400))

    assert rings.read().gaps == [Gap(150, 400)]


def test_full_ring_is_a_gap_before_the_kernel_says_so(rings: WrittenRings) -> None:
    """LOST comes with the next record only; until then names would be wrong."""
    filler = make_mmap2(bytes(24), b"/" + b"p" * 900, time_ns=77)
    rings.writers[0].write(*[filler] * 6)
    first = rings.read()
    rings.writers[0].write(make_lost(2, 900), make_fork(12, 901))
    second = rings.read()

    assert first.gaps == [Gap(77, rings.clock.now_ns)]
    assert second.gaps == []
    assert rings.lost == 2


@pytest.mark.parametrize("size", [0, 7, 16, 24, 4096, 65535])
def test_damaged_size_costs_one_read_and_is_a_gap(rings: WrittenRings, size: int) -> None:
    """What stood before it is kept, and the ring goes on afterwards."""
    damaged = bytearray(make_fork(11, 200))
    struct.pack_into("=H", damaged, 6, size)
    rings.writers[0].write(make_fork(10, 100), bytes(damaged))
    first = rings.read()
    rings.writers[0].write(make_fork(12, 300))
    second = rings.read()

    assert [record.pid for record in first.records] == [10]
    assert first.gaps == [Gap(100, rings.clock.now_ns)]
    assert rings.damaged == 1
    assert [record.pid for record in second.records] == [12]


@given(st.binary(min_size=8, max_size=2000))
def test_any_bytes_in_a_ring_are_survived(junk: bytes) -> None:
    """Reading ends, takes everything, and every record handed out can be decoded."""
    rings = WrittenRings()
    try:
        rings.clock.now_ns = 1 << 64
        rings.writers[0].write(junk)
        decoders = {PERF_RECORD_MMAP2: decode_mmap2, PERF_RECORD_COMM: decode_comm}
        for record in rings.read().records:
            decoders.get(record.type, decode_task)(record)

        assert rings.writers[0].tail == len(junk)
    finally:
        rings.close()


def records_of(rings: Rings, pid: int, last_type: int, timeout_s: float = 10) -> list[Record]:
    """Read until a record of the type has come from the process."""
    found: list[Record] = []
    deadline = time.monotonic() + timeout_s
    while not any(record.type == last_type for record in found):
        assert time.monotonic() < deadline, "no such record"
        found += [record for record in rings.read().records if record.pid == pid]
    return found


def run_on(cpu: int) -> int:
    """Run /bin/true on one CPU and return its pid."""
    command = f"import os; os.sched_setaffinity(0, {{{cpu}}}); os.execv('/bin/true', ['true'])"
    with subprocess.Popen(["/usr/bin/python3", "-c", command]) as process:
        process.wait(timeout=20)
    return process.pid


@pytest.mark.kernel
def test_life_of_a_program_is_recorded_in_order() -> None:
    """Fork, exec, its mappings with build ids, and exit."""
    rings = Rings()
    try:
        with subprocess.Popen(["/bin/true"]) as process:
            process.wait(timeout=20)
        records = records_of(rings, process.pid, PERF_RECORD_EXIT)
    finally:
        rings.close()

    types = [record.type for record in records]
    mappings = [decode_mmap2(r) for r in records if r.type == PERF_RECORD_MMAP2]
    own = next(m for m in mappings if m.path == os.fsencode(Path("/bin/true").resolve()))
    assert types[:2] == [PERF_RECORD_FORK, PERF_RECORD_COMM]
    assert types[-1] == PERF_RECORD_EXIT
    assert decode_task(records[0]).parent_pid == os.getpid()
    assert len(own.build_id) == 40


@pytest.mark.kernel
def test_descriptor_becomes_readable_when_a_ring_is_half_full() -> None:
    """So that the owner need not poll on a clock while bursts come."""
    rings = Rings(pages=1)
    try:
        deadline = time.monotonic() + 20
        while not select.select([rings], [], [], 0)[0]:
            assert time.monotonic() < deadline, "never readable"
            subprocess.run(["/bin/true"], check=True)
    finally:
        rings.close()


@pytest.mark.kernel
def test_overflow_is_counted_and_told_as_a_gap() -> None:
    """A ring of one page cannot hold twenty execs."""
    rings = Rings(pages=1)
    try:
        start_ns = time.monotonic_ns()
        for _ in range(40):
            subprocess.run(["/bin/true"], check=True)
        first = rings.read()
        for cpu in perf_event.online_cpus():
            run_on(cpu)
        rings.read()
    finally:
        rings.close()

    assert first.gaps
    assert all(gap.end_ns > gap.start_ns > start_ns for gap in first.gaps)
    assert rings.lost > 0


@pytest.mark.kernel
@pytest.mark.alone
@pytest.mark.skipif(not os.access(CPU1, os.W_OK), reason="CPU 1 cannot be taken offline")
def test_cpu_that_was_offline_for_a_moment_is_followed_again() -> None:
    """Between two refreshes nothing but its event shows it; the other CPU's records stay."""
    rings = Rings()
    try:
        rings.refresh()
        early = run_on(0)
        try:
            CPU1.write_text("0")
        finally:
            CPU1.write_text("1")
        rings.refresh()
        late = run_on(1)
        rings.refresh()
        records, gaps = rings.read()
    finally:
        rings.close()

    assert len([r for r in records if (r.pid, r.type) == (early, PERF_RECORD_EXIT)]) == 1
    assert len([r for r in records if (r.pid, r.type) == (late, PERF_RECORD_EXIT)]) == 1
    assert len(gaps) == 1


@pytest.mark.kernel
@pytest.mark.alone
@pytest.mark.skipif(not os.access(CPU1, os.W_OK), reason="CPU 1 cannot be taken offline")
def test_records_of_a_cpu_that_went_offline_are_kept() -> None:
    """What it had written is handed out, and its going makes no gap."""
    rings = Rings()
    try:
        pid = run_on(1)
        try:
            CPU1.write_text("0")
            rings.refresh()
            records, gaps = rings.read()
        finally:
            CPU1.write_text("1")
    finally:
        rings.close()

    assert [r.type for r in records if r.pid == pid][-1] == PERF_RECORD_EXIT
    assert gaps == []


@pytest.mark.kernel
def test_ring_shrinks_until_the_kernel_grants_the_memory() -> None:
    """Without CAP_IPC_LOCK 64 MiB are refused, and a smaller ring is taken."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        size = -1
        try:
            drop_capability(CAP_IPC_LOCK)
            fd = perf_event.open_event(perf_event.lifecycle_attr(PAGE), cpu=0)
            size = len(_map_ring(fd, 16384))
        finally:
            os.write(writer, str(size // PAGE - 1).encode())
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        pages = int(pipe.read())
    os.waitpid(child, 0)

    assert pages in [1 << power for power in range(14)]


def drop_capability(number: int) -> None:
    """capget(2) and capset(2), version 3 of their structures."""
    libc = ctypes.CDLL(None)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    sets[0] &= ~(1 << number)
    assert libc.capset(header, sets) == 0


def make_ksymbol(start: int, name: bytes, flags: int = 0) -> bytes:
    return make(PERF_RECORD_KSYMBOL, struct.pack("=QIHH", start, 64, 1, flags) + name + b"\0", 5)


def test_code_that_the_kernel_makes_is_handed_out_once(rings: WrittenRings) -> None:
    """Apart from the records of processes; code that goes is not told."""
    rings.writers[0].write(
        make_ksymbol(0xFFFFFFFFC0001000, b"bpf_prog_1"),
        make_ksymbol(0xFFFFFFFFC0001000, b"bpf_prog_1", PERF_RECORD_KSYMBOL_FLAGS_UNREGISTER),
    )

    assert rings.read().records == []
    assert rings.take_kernel_symbols() == [KernelSymbol(0xFFFFFFFFC0001000, 64, b"bpf_prog_1")]
    assert rings.take_kernel_symbols() == []


@pytest.mark.kernel
def test_the_kernel_records_the_programs_that_are_loaded() -> None:
    """By the names that /proc/kallsyms has for them."""
    if Path("/proc/sys/net/core/bpf_jit_enable").read_text().strip() == "0":
        pytest.skip("this kernel does not compile BPF programs")
    rings = Rings(pages=8)
    fd = syscalls.load_program(bytes.fromhex("b7000000000000009500000000000000"))
    try:
        rings.read()
        names = {symbol.name for symbol in rings.take_kernel_symbols()}
        known = Path("/proc/kallsyms").read_bytes()
    finally:
        os.close(fd)
        rings.close()

    assert any(name.startswith(b"bpf_prog_") and name in known for name in names)


@pytest.mark.kernel
def test_a_flood_of_records_wakes_the_reader_only_now_and_then() -> None:
    """Threads that rename themselves without end."""
    clock = Clock()
    rings = Rings(pages=1, clock_ns=clock, most_records_per_s=50)

    def rename() -> None:
        for _ in range(200):
            Path("/proc/self/comm").write_text("renamed")

    before = Path("/proc/self/comm").read_text()
    try:
        rename()
        woken = select.select([rings], [], [], 0)[0]
        rings.read()
        rings.read()
        rename()
        muted = select.select([rings], [], [], 0)[0]
        clock.now_ns += 2_000_000_000
        rings.read()
        rename()
        again = select.select([rings], [], [], 0)[0]
    finally:
        rings.close()
        Path("/proc/self/comm").write_text(before)

    assert (woken, muted, again) == ([rings], [], [rings])
