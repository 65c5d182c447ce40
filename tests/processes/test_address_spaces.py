"""What processes had mapped at moments that have passed, with real processes and real records.

A wrong name is worse than none: where the truth cannot be known, the table must say so.
"""

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bpf.records import Rings
from profiler.processes import address_spaces as module
from profiler.processes import snapshots
from profiler.processes.address_spaces import RETENTION_NS, AddressSpaces
from profiler.processes.generations import is_running, read_stat
from symbolizer import maps
from symbolizer.files import ProcessFiles
from symbolizer.maps import Mapping, MappingTable
from tests.support.live import wait_for
from tests.support.targets import compile_target

pytestmark = pytest.mark.kernel

SLEEP = os.fsencode(Path("/bin/sleep").resolve())
TRUE = os.fsencode(Path("/bin/true").resolve())
CPU1 = Path("/sys/devices/system/cpu/cpu1/online")
ADDRESS = 0x10_0000_0000
TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")

now = time.monotonic_ns


class Target:
    """tests/targets/generations.c, which takes commands."""

    def __init__(self, program: Path) -> None:
        self.path = os.fsencode(program)
        self._process = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.pid = self.ask("hello")

    def ask(self, command: str) -> int:
        """Return the pid that the command is answered with."""
        self.command(command)
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())

    def command(self, command: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(os.fsencode(command) + b"\n")
        self._process.stdin.flush()

    def become(self, command: str, program: bytes) -> None:
        """Start another program and wait for its libraries."""
        self.command(f"{command} {os.fsdecode(program)}")
        maps = Path(f"/proc/{self.pid}/maps")
        wait_for(lambda: program in (text := maps.read_bytes()) and b"libc" in text)

    def close(self) -> None:
        for pid in {self._process.pid, self.pid}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.communicate()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("targets")
    return compile_target("generations.c", folder / "generations", "-O2", "-pthread")


@pytest.fixture
def start(program: Path) -> Iterator[Callable[[], Target]]:
    with contextlib.ExitStack() as stack:

        def start_target() -> Target:
            return stack.enter_context(contextlib.closing(Target(program)))

        yield start_target


@pytest.fixture
def older(start: Callable[[], Target]) -> Target:
    """A process that was there before the rings. To be asked for before `processes`."""
    return start()


@pytest.fixture
def rings() -> Iterator[Rings]:
    with contextlib.closing(Rings()) as rings:
        yield rings


@pytest.fixture
def spaces(rings: Rings) -> AddressSpaces:
    return AddressSpaces(rings)


def run(path: bytes | str) -> tuple[int, int]:
    """Run a program to its end and return its pid and a time at which it had its libraries."""
    with subprocess.Popen([path]) as process:
        process.wait(timeout=20)
    return process.pid, now()


def paths(table: MappingTable) -> set[bytes]:
    return {mapping.path for mapping in table.mappings}


def path_at(table: MappingTable, address: int) -> bytes | None:
    return next((m.path for m in table.mappings if m.start <= address < m.end), None)


def later(spaces: AddressSpaces, seconds: float = 60) -> None:
    """Let everything that has ended expire."""
    spaces.poll()
    spaces.expire(now() + int(seconds * 1e9))


def start_ns_of(pid: int) -> int:
    stat = Path(f"/proc/{pid}/stat").read_bytes()
    return int(stat.rpartition(b")")[2].split()[19]) * TICK_NS


@contextlib.contextmanager
def running(path: bytes) -> Iterator[int]:
    """Run a copy of sleep(1), from the time on when it has its libraries."""
    process = subprocess.Popen([path, "60"])
    try:
        maps = Path(f"/proc/{process.pid}/maps")
        wait_for(lambda: b"libc.so" in maps.read_bytes())
        yield process.pid
    finally:
        process.kill()
        process.wait()


def copy(program: bytes, path: bytes) -> None:
    with open(path, "wb") as file:  # noqa: PTH123 - bytes
        file.write(Path(os.fsdecode(program)).read_bytes())
    os.chmod(path, 0o755)  # noqa: PTH101 - bytes


def two_files(folder: Path) -> tuple[Path, Path]:
    one, other = folder / "one", folder / "other"
    one.write_bytes(b"1" * 8192)
    other.write_bytes(b"2" * 8192)
    return one, other


def test_program_that_exited_before_the_poll_is_known(spaces: AddressSpaces) -> None:
    """All of its mappings come from records, with build ids, and nothing from /proc."""
    pid, at_ns = run("/bin/true")
    spaces.poll()

    table = spaces.mappings(pid, at_ns)

    own = next(mapping for mapping in table.mappings if mapping.path == TRUE)
    assert any(b"/libc.so" in path for path in paths(table))
    assert (len(own.build_id), table.missing) == (40, "[unknown]")
    assert spaces.snapshots == 0


def test_table_stays_the_same_object_while_nothing_changes(
    start: Callable[[], Target], spaces: AddressSpaces, tmp_path: Path
) -> None:
    """The symbolizer caches for each object; a new mapping makes a new one."""
    target = start()
    one, _ = two_files(tmp_path)
    spaces.poll()
    first = spaces.mappings(target.pid, now())
    target.ask("hello")
    spaces.poll()
    second = spaces.mappings(target.pid, now())
    target.ask(f"map {one} {ADDRESS:x}")
    spaces.poll()
    third = spaces.mappings(target.pid, now())

    assert first is second
    assert third is not first
    assert paths(third) - paths(first) == {os.fsencode(one)}


@pytest.mark.parametrize("command", ["exec", "thread-exec"])
def test_exec_divides_the_time_between_two_programs(
    start: Callable[[], Target], spaces: AddressSpaces, command: str
) -> None:
    """Whichever thread called it: before there is the one, afterwards only the other."""
    target = start()
    before_ns = now()
    target.become(command, SLEEP)
    spaces.poll()

    before = paths(spaces.mappings(target.pid, before_ns))
    after = paths(spaces.mappings(target.pid, now()))

    assert target.path in before
    assert SLEEP not in before
    assert SLEEP in after
    assert target.path not in after


def test_mapping_over_another_counts_from_its_moment(
    start: Callable[[], Target], spaces: AddressSpaces, tmp_path: Path
) -> None:
    """A library closed and another opened at its address: the truth at each time, in one drain."""
    target = start()
    one, other = two_files(tmp_path)
    times = [now()]
    for file in (one, other, one):
        target.ask(f"map {file} {ADDRESS:x}")
        times.append(now())
    spaces.poll()

    seen = [path_at(spaces.mappings(target.pid, at_ns), ADDRESS) for at_ns in times]

    assert seen == [None, os.fsencode(one), os.fsencode(other), os.fsencode(one)]


def test_child_has_what_its_parent_had_at_its_fork(
    start: Callable[[], Target], spaces: AddressSpaces, tmp_path: Path
) -> None:
    """And nothing of what the parent mapped afterwards."""
    target = start()
    one, other = two_files(tmp_path)
    target.ask(f"map {one} {ADDRESS:x}")
    child = target.ask("fork")
    target.ask(f"map {other} {ADDRESS:x}")
    spaces.poll()

    assert path_at(spaces.mappings(child, now()), ADDRESS) == os.fsencode(one)
    assert path_at(spaces.mappings(target.pid, now()), ADDRESS) == os.fsencode(other)


@pytest.mark.parametrize("expiring", [False, True])
def test_last_of_a_chain_of_forks_has_what_the_first_had(
    start: Callable[[], Target], rings: Rings, tmp_path: Path, expiring: bool
) -> None:
    """All its ancestors are dead, and in one case forgotten too; there is no /proc to look at."""
    spaces = AddressSpaces(rings, tmp_path)
    target = start()
    for _ in range(300):
        target.pid = target.ask("become-child")
    at_ns = now()
    if expiring:
        later(spaces)
    spaces.poll()

    assert target.path in paths(spaces.mappings(target.pid, at_ns))


def test_chain_of_forks_leaves_no_chain_in_memory(
    start: Callable[[], Target], spaces: AddressSpaces
) -> None:
    """A living process that inherits is settled when its ancestors expire."""
    target = start()
    for _ in range(50):
        target.pid = target.ask("become-child")
    later(spaces)

    assert spaces._current[target.pid].parent is None
    assert not spaces._past


def test_older_process_is_read_from_proc_once(older: Target, spaces: AddressSpaces) -> None:
    """One that was there before the rings; a sample may be older than the snapshot."""
    at_ns = now()
    spaces.poll()
    first = spaces.mappings(older.pid, at_ns, start_ns_of(older.pid))
    second = spaces.mappings(older.pid, now(), start_ns_of(older.pid))

    assert older.path in paths(first)
    assert first is second
    assert spaces.snapshots == 1


@pytest.mark.parametrize("polled", [False, True])
def test_older_process_that_has_changed_its_program_is_not_guessed(
    older: Target, spaces: AddressSpaces, polled: bool
) -> None:
    """Also when the exec comes after the poll, and only the snapshot could see it."""
    before_ns = now()
    if polled:
        spaces.poll()
    older.become("exec", SLEEP)
    if not polled:
        spaces.poll()

    before = spaces.mappings(older.pid, before_ns)
    after = spaces.mappings(older.pid, now())

    assert (paths(before), before.missing) == (set(), "[exited]")
    assert SLEEP in paths(after)


def test_what_an_older_process_mapped_after_the_sample_hides_nothing_wrongly(
    older: Target, spaces: AddressSpaces, tmp_path: Path
) -> None:
    """The snapshot shows the later file at an address that held an unknown one before."""
    one, other = two_files(tmp_path)
    older.ask(f"map {one} {ADDRESS:x}")
    at_ns = now()
    older.ask(f"map {other} {ADDRESS:x}")
    spaces.poll()

    before = spaces.mappings(older.pid, at_ns)
    after = spaces.mappings(older.pid, now())

    assert path_at(before, ADDRESS) in (None, os.fsencode(one))
    assert older.path in paths(before)
    assert path_at(after, ADDRESS) == os.fsencode(other)


def test_child_of_an_older_parent_that_died_is_known(older: Target, spaces: AddressSpaces) -> None:
    """Nobody saw what the parent had, but the child is there to ask."""
    older.pid = older.ask("become-child")
    at_ns = now()
    spaces.poll()

    assert older.path in paths(spaces.mappings(older.pid, at_ns))


def test_child_of_an_older_parent_that_both_died_is_exited(
    older: Target, spaces: AddressSpaces
) -> None:
    """There is nothing to know it from."""
    older.pid = child = older.ask("become-child")
    at_ns = now()
    os.kill(child, signal.SIGKILL)
    wait_for(lambda: not Path(f"/proc/{child}").exists())
    spaces.poll()

    table = spaces.mappings(child, at_ns)

    assert (paths(table), table.missing) == (set(), "[exited]")


def test_process_nobody_has_heard_of_is_exited(spaces: AddressSpaces) -> None:
    """It was there before the rings and is gone."""
    pid = 4_000_000
    spaces.poll()

    assert spaces.mappings(pid, now()).missing == "[exited]"


def test_snapshot_of_a_later_process_is_refused(older: Target, spaces: AddressSpaces) -> None:
    """The start time of the sampled process is not that of the one in /proc."""
    spaces.poll()

    table = spaces.mappings(older.pid, now(), start_ns_of(older.pid) - 10 * TICK_NS)

    assert (paths(table), table.missing) == (set(), "[exited]")


def test_two_processes_with_one_pid_are_kept_apart(
    start: Callable[[], Target], spaces: AddressSpaces
) -> None:
    """Each has its own program at its own time, and before both there is none."""
    target = start()
    pid = free_pid()
    times = [now()]
    for file in (TRUE, SLEEP):
        assert target.ask(f"spawn-as {pid} {os.fsdecode(file)}") == pid
        times.append(now())
    spaces.poll()

    none, first, second = (spaces.mappings(pid, at_ns) for at_ns in times)

    assert (paths(none), none.missing) == (set(), "[exited]")
    assert paths(first) & {TRUE, SLEEP} == {TRUE}
    assert paths(second) & {TRUE, SLEEP} == {SLEEP}


def free_pid() -> int:
    highest = int(Path("/proc/sys/kernel/pid_max").read_text())
    return next(p for p in range(highest - 1, 0, -1) if not Path(f"/proc/{p}").exists())


def test_process_goes_on_when_only_its_first_thread_has_exited(
    start: Callable[[], Target], spaces: AddressSpaces, tmp_path: Path
) -> None:
    """The kernel writes the same EXIT record as for a whole process."""
    target = start()
    one, _ = two_files(tmp_path)
    target.ask("leave-to-thread")
    later(spaces)
    target.ask(f"map {one} {ADDRESS:x}")
    spaces.poll()

    table = spaces.mappings(target.pid, now())

    assert {target.path, os.fsencode(one)} <= paths(table)
    assert not spaces._current[target.pid].exit_ns


def test_older_process_without_its_first_thread_is_read_from_another(
    older: Target, spaces: AddressSpaces
) -> None:
    """/proc/PID/maps is empty then."""
    older.ask("leave-to-thread")
    spaces.poll()

    assert older.path in paths(spaces.mappings(older.pid, now()))


def test_program_replaced_on_disk_keeps_the_build_id_that_ran(
    spaces: AddressSpaces, tmp_path: Path
) -> None:
    """The path leads to another file by now; the build id shows it."""
    file, other = os.fsencode(tmp_path / "program"), os.fsencode(tmp_path / "other")
    copy(SLEEP, file)
    copy(TRUE, other)
    with running(file) as pid, running(SLEEP) as sleep:
        os.replace(other, file)  # noqa: PTH105 - bytes
        spaces.poll()
        tables = [spaces.mappings(p, now()) for p in (pid, sleep)]

    ran, original = (
        next(m for m in table.mappings if m.path == path)
        for table, path in zip(tables, (file, SLEEP), strict=True)
    )
    assert ran.build_id == original.build_id != ""


def test_older_program_replaced_on_disk_is_marked_as_deleted(tmp_path: Path) -> None:
    """/proc knows no build id; the mark says that the path leads elsewhere."""
    file, other = os.fsencode(tmp_path / "program"), os.fsencode(tmp_path / "other")
    copy(SLEEP, file)
    copy(TRUE, other)
    with running(file) as pid, contextlib.closing(Rings()) as rings:
        os.replace(other, file)  # noqa: PTH105 - bytes
        spaces = AddressSpaces(rings)
        spaces.poll()
        table = spaces.mappings(pid, now())

    assert [m.file_path for m in table.mappings if m.path.endswith(b" (deleted)")] == [file]


def test_kernel_threads_have_no_mappings(spaces: AddressSpaces) -> None:
    """They are there, so they have not exited."""
    spaces.poll()

    table = spaces.mappings(2, now())

    assert (paths(table), table.missing) == (set(), "[unknown]")


@pytest.mark.parametrize(
    "name", [b"new\nline", b"name (deleted)", b"\xff\xfe\x80", b"  two  ", b"n" * 255]
)
@pytest.mark.parametrize("is_older", [False, True])
def test_hostile_file_names_arrive_byte_by_byte(
    rings: Rings, tmp_path: Path, name: bytes, is_older: bool
) -> None:
    """From records and from /proc alike."""
    file = os.path.join(os.fsencode(tmp_path), name)  # noqa: PTH118 - bytes
    copy(SLEEP, file)
    with contextlib.ExitStack() as stack:
        if is_older:
            pid = stack.enter_context(running(file))
            rings = stack.enter_context(contextlib.closing(Rings()))
            spaces = AddressSpaces(rings)
        else:
            spaces = AddressSpaces(rings)
            pid = stack.enter_context(running(file))
        spaces.poll()
        table = spaces.mappings(pid, now())

    assert file in paths(table)
    assert spaces.snapshots == is_older


def test_paths_of_an_older_process_are_as_it_sees_them(tmp_path: Path) -> None:
    """Inside a changed root, as those in records are."""
    compile_target("generations.c", tmp_path / "static", "-O2", "-pthread", "-static")
    with subprocess.Popen(
        ["chroot", tmp_path, "/static"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"hello\n")
        process.stdin.flush()
        process.stdout.readline()
        with contextlib.closing(Rings()) as rings:
            spaces = AddressSpaces(rings)
            spaces.poll()
            table = spaces.mappings(process.pid, now())
        process.stdin.close()

    assert b"/static" in paths(table)


def test_thousand_short_processes_are_all_known(rings: Rings, spaces: AddressSpaces) -> None:
    """None is lost when the owner wakes for half full rings; expired logs are gone."""
    runs = []
    for _ in range(1000):
        pid = os.posix_spawn(TRUE, [TRUE], {})
        os.waitpid(pid, 0)
        runs.append((pid, now()))
        if select.select([rings], [], [], 0)[0]:
            spaces.poll()
    spaces.poll()

    known = [TRUE in paths(spaces.mappings(pid, at_ns)) for pid, at_ns in runs]
    later(spaces)

    assert all(known)
    assert not {pid for pid, _ in runs} & spaces._current.keys()
    assert spaces.snapshots == 0


def test_ended_processes_are_kept_for_a_while(spaces: AddressSpaces) -> None:
    """Their samples come later than their exits."""
    pid, at_ns = run("/bin/true")
    spaces.poll()
    spaces.expire(at_ns + RETENTION_NS // 2)

    assert TRUE in paths(spaces.mappings(pid, at_ns))


def test_process_that_had_exited_before_the_records_is_not_kept(spaces: AddressSpaces) -> None:
    """As one that exits within a gap: nothing would ever tell of its end."""
    pid, _ = run("/bin/true")
    later(spaces)

    table = spaces.mappings(pid, spaces._trusted_ns - 1)

    assert table.missing == "[exited]"
    assert pid not in spaces._current


def overflow(spaces: AddressSpaces) -> int:
    """Run programs until records are lost, and return a time in the gap."""
    spaces.poll()
    gaps = spaces.gaps
    for _ in range(100):
        run("/bin/true")
    at_ns = now()
    spaces.poll()
    assert spaces.gaps > gaps
    assert at_ns < spaces._trusted_ns
    return at_ns


@pytest.fixture
def small_rings() -> Iterator[Rings]:
    """Rings that hold some programs' records; those of other tests would fill them as well."""
    with contextlib.closing(Rings(pages=2)) as rings:
        yield rings


@pytest.mark.alone
def test_process_that_outlives_a_gap_is_named_before_in_and_after_it(
    start: Callable[[], Target], small_rings: Rings
) -> None:
    """From its log, from what both sides have in common, and from /proc."""
    spaces = AddressSpaces(small_rings)
    target = start()
    spaces.poll()
    before_ns = now()
    within_ns = overflow(spaces)

    tables = [spaces.mappings(target.pid, t) for t in (before_ns, within_ns, now())]

    assert all(target.path in paths(table) for table in tables)
    assert spaces.snapshots == 1
    assert spaces.mappings(target.pid, within_ns) is tables[1]


@pytest.mark.alone
def test_process_that_changed_in_a_gap_is_not_guessed_within_it(
    start: Callable[[], Target], small_rings: Rings
) -> None:
    """It had the one program before, has the other afterwards, and nobody saw when."""
    spaces = AddressSpaces(small_rings)
    target = start()
    spaces.poll()
    before_ns = now()
    for _ in range(50):
        run("/bin/true")
    target.become("exec", SLEEP)
    within_ns = overflow(spaces)
    spaces.poll()

    before, within, after = (spaces.mappings(target.pid, t) for t in (before_ns, within_ns, now()))

    assert target.path in paths(before)
    assert not {target.path, SLEEP} & paths(within)
    assert SLEEP in paths(after)


@pytest.mark.alone
def test_process_forked_in_a_gap_is_known_afterwards(
    start: Callable[[], Target], small_rings: Rings
) -> None:
    """Its records are lost, but /proc has it."""
    spaces = AddressSpaces(small_rings)
    for _ in range(50):
        run("/bin/true")
    target = start()
    within_ns = overflow(spaces)

    within, after = (spaces.mappings(target.pid, t) for t in (within_ns, now()))

    assert (paths(within), within.missing) == (set(), "[exited]")
    assert target.path in paths(after)


def test_dropped_log_needs_a_snapshot_and_names_nothing_older(
    start: Callable[[], Target], spaces: AddressSpaces, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is bounded: what is dropped is counted, and /proc takes over."""
    monkeypatch.setattr(module, "MAX_LOG_BYTES", 1000)
    target = start()
    before_ns = now()
    run("/bin/true")
    spaces.poll()

    before, after = (spaces.mappings(target.pid, t) for t in (before_ns, now()))

    assert paths(before) == set()
    assert target.path in paths(after)
    assert spaces.dropped_logs > 0
    spaces.poll()  # others have run programs meanwhile
    assert spaces.log_bytes <= 1000


def test_endless_mapping_is_folded_into_the_base(
    start: Callable[[], Target], spaces: AddressSpaces, tmp_path: Path
) -> None:
    """As JIT compilers do. The log shrinks, the table stays right."""
    target = start()
    one, other = two_files(tmp_path)
    target.ask(f"remap {one} {ADDRESS:x} 1001")
    target.ask(f"map {other} {ADDRESS + 4096:x}")
    spaces.poll()
    before = spaces.mappings(target.pid, now())
    full_bytes = spaces.log_bytes
    later(spaces)
    after = spaces.mappings(target.pid, now())

    assert spaces.log_bytes < full_bytes - 200_000
    assert before.mappings == after.mappings
    assert path_at(after, ADDRESS) == os.fsencode(one)
    assert path_at(after, ADDRESS + 4096) == os.fsencode(other)
    assert target.path in paths(after)


@pytest.mark.alone
@pytest.mark.skipif(not os.access(CPU1, os.W_OK), reason="CPU 1 cannot be taken offline")
def test_program_on_a_cpu_that_was_offline_is_known(rings: Rings, spaces: AddressSpaces) -> None:
    """Its ring is opened again, and what lived before is still named."""
    pid = os.getpid()
    spaces.poll()
    own = paths(spaces.mappings(pid, now()))
    try:
        CPU1.write_text("0")
    finally:
        CPU1.write_text("1")
    rings.refresh()
    affinity = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {1})
        child, at_ns = run("/bin/true")
    finally:
        os.sched_setaffinity(0, affinity)
    spaces.poll()

    assert TRUE in paths(spaces.mappings(child, at_ns))
    assert own <= paths(spaces.mappings(pid, now()))
    assert spaces.gaps == 1


def test_process_whose_first_thread_has_exited_long_ago_is_read(older: Target) -> None:
    """Its own folder in /proc shows no mappings, and no record tells why."""
    older.ask("leave-to-thread")
    wait_for(lambda: read_stat(older.pid).is_exited)
    with contextlib.closing(Rings()) as rings:
        spaces = AddressSpaces(rings)
        spaces.poll()
        table = spaces.mappings(older.pid, now())

    with ProcessFiles(older.pid) as files:
        own = next(m for m in table.mappings if m.path == older.path)
        opened = list(files.candidates(own))
    assert os.fstat(opened[0].fd).st_ino == own.inode
    for each in opened:
        os.close(each.fd)


def test_the_parent_answers_for_children_that_have_exited(
    start: Callable[[], Target], spaces: AddressSpaces
) -> None:
    """It shares their table, although it was never sampled itself."""
    target = start()
    child = target.ask("fork")
    spaces.poll()
    table = spaces.mappings(child, now())
    before = spaces.living(table)
    os.kill(child, signal.SIGKILL)
    wait_for(lambda: not is_running(child))
    spaces.poll()

    assert set(before) == {child, target.pid}
    assert spaces.living(table) == [target.pid]
    target.become("exec", SLEEP)
    spaces.poll()
    assert spaces.living(table) == []


class Mapper:
    """tests/targets/many_mappings.c."""

    def __init__(self, program: Path, file: Path, executable: int, other: int) -> None:
        command = [program, file, str(executable), str(other)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.pid = self._process.pid
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    def go_on(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"x")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == b"done\n"

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def many_mappings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mappings")
    (folder / "file").write_bytes(b"1" * 8192)
    return compile_target("many_mappings.c", folder / "many_mappings", "-O2")


@pytest.mark.parametrize("is_older", [False, True])
def test_process_with_too_many_mappings_is_degraded(
    many_mappings: Path, rings: Rings, start: Callable[[], Target], is_older: bool
) -> None:
    """Its table says so, it is counted, it costs little, and others are not affected."""
    spaces = AddressSpaces(rings)
    other = start()
    spaces.poll()
    with contextlib.closing(Mapper(many_mappings, many_mappings.parent / "file", 65_000, 0)) as it:
        if is_older:
            it.go_on()
            rings = Rings()
            spaces = AddressSpaces(rings)
        else:
            wait_for(lambda: spaces.poll() or spaces.mappings(it.pid, now()).mappings)
            it.go_on()
        begin_ns = time.thread_time_ns()
        spaces.poll()
        table = spaces.mappings(it.pid, now())
        spaces.poll()
        again = spaces.mappings(it.pid, now())
        elapsed_ns = time.thread_time_ns() - begin_ns
        others = paths(spaces.mappings(other.pid, now()))
    if is_older:
        rings.close()

    assert (len(table.mappings), table.missing) == (0, "[too many mappings]")
    assert again is table
    assert spaces.degraded >= 1
    assert spaces.log_bytes < 4 << 20
    assert other.path in others
    assert elapsed_ns < 1_000_000_000  # 0.1 s where nothing else runs, see bench/


def test_process_with_too_many_mappings_is_itself_again_after_an_exec(
    start: Callable[[], Target], spaces: AddressSpaces, tmp_path: Path, monkeypatch
) -> None:
    """What it had mapped is gone."""
    monkeypatch.setattr(module, "MAX_MAPPINGS", 3)
    monkeypatch.setattr(module, "MAX_RECORDS", 3)
    target = start()
    one, _ = two_files(tmp_path)
    target.ask(f"remap {one} {ADDRESS:x} 70")
    spaces.poll()
    before = spaces.mappings(target.pid, now())
    monkeypatch.undo()
    target.become("exec", SLEEP)
    spaces.poll()

    assert before.missing == "[too many mappings]"
    assert SLEEP in paths(spaces.mappings(target.pid, now()))


@pytest.mark.alone
def test_process_with_too_many_mappings_stays_degraded_over_a_gap(
    many_mappings: Path, start: Callable[[], Target], small_rings: Rings, monkeypatch
) -> None:
    """Its maps are not read again, unless it runs another program by then."""
    spaces = AddressSpaces(small_rings)
    read_of: list[int] = []
    maps_of = module.maps_of
    monkeypatch.setattr(
        module, "maps_of", lambda pid, *a: (read_of.append(pid), maps_of(pid, *a))[1]
    )
    target = start()
    with contextlib.closing(Mapper(many_mappings, many_mappings.parent / "file", 65_000, 0)) as it:
        it.go_on()
        wait_for(lambda: is_degraded(spaces, it.pid))
        overflow(spaces)
        del read_of[:]
        wait_for(lambda: is_degraded(spaces, it.pid))
    monkeypatch.setattr(snapshots, "read_maps", too_many)
    wait_for(lambda: is_degraded(spaces, target.pid))
    monkeypatch.undo()
    target.become("exec", SLEEP)
    overflow(spaces)

    assert it.pid not in read_of
    wait_for(lambda: spaces.poll() or SLEEP in paths(spaces.mappings(target.pid, now())))


def is_degraded(spaces: AddressSpaces, pid: int) -> bool:
    spaces.poll()
    return spaces.mappings(pid, now()).missing == "[too many mappings]"


def too_many(_fd: int) -> list[Mapping]:
    raise maps.TooManyMappings


def test_many_mappings_that_are_not_executable_hide_nothing(many_mappings: Path) -> None:
    """Databases map 65,000 files: the program's own code is still found."""
    with contextlib.closing(Mapper(many_mappings, many_mappings.parent / "file", 3, 65_000)) as it:
        it.go_on()
        with contextlib.closing(Rings()) as rings:
            spaces = AddressSpaces(rings)
            spaces.poll()
            table = spaces.mappings(it.pid, now())
        asked = maps.read_maps
        with Path(f"/proc/{it.pid}/maps").open("rb", 0) as file:
            by_text = maps.parse_maps(b"".join(maps._executable_lines(file.fileno(), b"\n")))
        with Path(f"/proc/{it.pid}/maps").open("rb", 0) as file:
            by_query = asked(file.fileno())

    assert os.fsencode(many_mappings) in paths(table)
    assert [m for m in by_text if m.path != b"[vsyscall]"] == by_query
    assert list(table.mappings) == by_query


@pytest.mark.alone
def test_table_outlives_a_gap_in_which_nothing_changed(
    start: Callable[[], Target], small_rings: Rings
) -> None:
    """Somebody who floods the rings does not make everybody's tables new each second."""
    spaces = AddressSpaces(small_rings)
    target = start()
    spaces.poll()
    before = spaces.mappings(target.pid, now())
    overflow(spaces)
    spaces.poll()

    assert spaces.mappings(target.pid, now()) is before
