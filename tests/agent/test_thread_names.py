"""The thread label of Python's threads in what is recorded."""

import contextlib
import os
import subprocess
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import orjson
import pytest

from bpf.samples import RawSample
from profiler.agent import python_code
from profiler.agent.readers import Readers
from profiler.agent.thread_names import Placed, ThreadNames
from storage.profile import Profile
from symbolizer.maps import MappingTable
from tests.support.file_systems import hanging
from tests.support.jit_programs import child_of
from tests.support.live import sample_of
from tests.support.naming import mappings_of
from tests.support.python_images import known_image_of
from tests.support.python_recordings import Recording, recording
from tests.support.python_threads import program, question, tids_of
from tests.support.pythons import VERSIONS, Interpreter, need_python

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(600)]

FEW = 20
SPINNING = """
start("ingest-3", "Gr\\u00fc\\u00dfe \\u540d", "a name longer than fifteen bytes", target=spin)
pool = ThreadPoolExecutor(1)
pool.submit(spin)
tell("ready")
spin()
"""
NAMES = {"ingest-3", "Grüße 名", "a name longer than fifteen bytes", "ThreadPoolExecutor-0_0"}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recording]:
    with recording(tmp_path_factory.mktemp("cache")) as recorded:
        yield recorded


def threads_of(profiles: Iterable[Profile], pid: int) -> Counter[str]:
    """Return the samples of a process by their thread label."""
    found: Counter[str] = Counter()
    for profile in profiles:
        for labels, samples in zip(
            profile.row_labels.tolist(), profile.row_samples.tolist(), strict=True
        ):
            label_set = dict(profile.label_sets[labels])
            if label_set.get("pid") == str(pid):
                found[label_set["thread"]] += samples
    return found


def record(recorded: Recording, pid: int, names: Iterable[str]) -> Counter[str]:
    """Return the samples by thread when each of some has enough of them."""
    profiles = recorded.until(
        lambda found: all(threads_of(found, pid)[name] >= FEW for name in names), f"{names}"
    )
    return threads_of(profiles, pid)


def comm_of(pid: int) -> str:
    """Return what the kernel calls a process, which has to run its program by now."""
    return Path(f"/proc/{pid}/comm").read_text().strip()


def start(recorded: Recording, process: subprocess.Popen[bytes]) -> None:
    process.stdout.readline()
    recorded.settle(process.pid)


@pytest.mark.parametrize("version", VERSIONS, ids="{0[0]}.{0[1]}".format)
def test_samples_have_pythons_names_of_threads(
    recorded: Recording, version: tuple[int, int]
) -> None:
    """From 3.14 on they are the kernel's, which have 15 bytes at most."""
    python = need_python(version)
    names = NAMES if version < (3, 14) else {name.encode()[:15].decode() for name in NAMES}
    with program(python, SPINNING) as process:
        start(recorded, process)
        comm = comm_of(process.pid)
        found = record(recorded, process.pid, names)

    assert found.keys() == {*names, comm}


@pytest.mark.parametrize("version", [(3, 8), (3, 13)], ids="{0[0]}.{0[1]}".format)
def test_names_are_there_in_the_first_window(recorded: Recording, version: tuple[int, int]) -> None:
    """What was sampled before they were read has them as well."""
    with program(need_python(version), SPINNING) as other:
        start(recorded, other)  # the interpreter is known
        with program(need_python(version), SPINNING) as process:
            process.stdout.readline()
            recorded.recorder.close_window()
            recorded.recorder.sampler.select([process.pid])
            found = threads_of([recorded.for_a_while(2.0)], process.pid)
        comm = comm_of(other.pid)

    assert found.keys() <= {*NAMES, comm}
    named = found.total() - found[comm]
    assert named >= 0.5 * found.total() > FEW


def test_threads_that_start_later_have_their_names(recorded: Recording) -> None:
    script = "start('first', target=spin)\ntell('ready')\n"
    script += "for line in sys.stdin: start(line.strip(), target=spin)"
    with program(need_python((3, 11)), script) as process:
        start(recorded, process)
        record(recorded, process.pid, ["first"])
        for name in ("second", "third"):
            process.stdin.write(f"{name}\n".encode())
            process.stdin.flush()
            found = record(recorded, process.pid, ["first", name])

    assert found.keys() >= {"first", "second", "third"}


def test_a_thread_with_a_name_in_the_kernel_keeps_that(recorded: Recording) -> None:
    script = """
def renamed():
    ctypes.CDLL(None).prctl(15, b"kernel's", 0, 0, 0)
    spin()
start("python's", target=renamed)
start("other", target=spin)
tell("ready")
held.wait()
"""
    with program(need_python((3, 11)), script) as process:
        start(recorded, process)
        found = record(recorded, process.pid, ["kernel's", "other"])

    assert "python's" not in found


def test_threads_in_another_pid_namespace_have_their_names(recorded: Recording) -> None:
    unshare = ("unshare", "--pid", "--mount", "--mount-proc", "--fork", "--kill-child")
    with program(need_python((3, 11)), SPINNING, *unshare) as process:
        process.stdout.readline()
        pid = child_of(process.pid)
        recorded.settle(pid)
        found = record(recorded, pid, NAMES)
        os.kill(pid, 9)

    assert found.keys() >= NAMES


def test_forked_workers_have_the_names_of_their_own_threads(recorded: Recording) -> None:
    script = """
start("of parent", target=spin)
if os.fork() == 0:
    start("of child", target=spin)
    tell(os.getpid())
held.wait()
"""
    with program(need_python((3, 12)), script) as process:
        child = int(process.stdout.readline())
        try:
            recorded.settle(process.pid, child)
            profiles = recorded.until(
                lambda found: (
                    threads_of(found, child)["of child"] >= FEW
                    and threads_of(found, process.pid)["of parent"] >= FEW
                ),
                "both",
            )
        finally:
            os.kill(child, 9)

    assert "of parent" not in threads_of(profiles, child)
    assert "of child" not in threads_of(profiles, process.pid)


def asked(recorded: Recording) -> int:
    return recorded.recorder.threads.status()["asked"]


def test_nothing_is_asked_when_no_thread_is_new(recorded: Recording) -> None:
    with program(need_python((3, 11)), SPINNING) as process:
        start(recorded, process)
        record(recorded, process.pid, NAMES)
        before = asked(recorded)
        found = threads_of([recorded.for_a_while(3.0)], process.pid)
        after = asked(recorded)

    assert found.total() > FEW
    assert after == before


def test_ever_new_threads_are_asked_for_a_few_times(recorded: Recording) -> None:
    """Those that are not known have the name of the program."""
    script = """
tell("ready")
while True:
    for thread in start(*["short"] * 4, target=lambda: sum(range(1_000_000))): thread.join()
"""
    with program(need_python((3, 11)), script) as process:
        before = asked(recorded)
        start(recorded, process)
        comm = comm_of(process.pid)
        found = threads_of([recorded.for_a_while(5.0)], process.pid)
        after = asked(recorded)

    assert found.keys() <= {"short", comm}
    assert 0 < after - before <= 12


def test_a_program_with_one_thread_is_not_asked(recorded: Recording) -> None:
    with program(need_python((3, 11)), "tell('ready')\nspin()") as process:
        before = asked(recorded)
        start(recorded, process)
        found = threads_of([recorded.for_a_while(1.0)], process.pid)

    assert found.total() > FEW
    assert asked(recorded) == before


def test_counts_say_what_came_of_it(recorded: Recording) -> None:
    script = "start('one', target=spin)\nthreading._active = None\ntell('ready')\nspin()"
    python = need_python((3, 11))
    before = recorded.recorder.threads.status().get("unreadable", 0)
    with program(python, script) as process:
        start(recorded, process)
        found = threads_of([recorded.for_a_while(2.0)], process.pid)
        comm = comm_of(process.pid)

    assert found.keys() == {comm}
    assert before < recorded.recorder.threads.status()["unreadable"] <= before + 8


Groups = dict[MappingTable, list[RawSample]]


class Asking:
    """The part of a recorder that names the threads of processes."""

    def __init__(self, folder: Path, python: Interpreter) -> None:
        self.readers = Readers(folder)
        self.now_s = 0.0
        self._python = python
        self._placed: dict[MappingTable, Placed] = {}
        self.threads = ThreadNames(self.readers, self._placed.get, lambda: self.now_s)

    def samples(self, pid: int, runtime: int) -> Groups:
        """Return a sample of each thread but the first of a process."""
        image, layout = known_image_of(self._python.runtime_file)
        table = mappings_of(pid)
        interpreter = python_code.Interpreter(image.version, layout, runtime=runtime)
        self._placed[table] = Placed(interpreter, 0)
        return {table: [sample_of(pid, tid=tid) for tid in sorted(tids_of(pid) - {pid})]}

    def window(self, groups: Groups) -> list[str | None]:
        """Return the names of samples in a window that ends when all was answered."""
        self.threads.note(groups)
        labels = [self.threads.label(each) for samples in groups.values() for each in samples]
        self.readers.wait(time.monotonic() + 30, self.threads.is_complete)
        named = [label and self.threads.with_names((("thread", label),)) for label in labels]
        self.threads.end_window()
        return [each[0][1] if each else None for each in named]


def test_a_changed_name_is_seen_after_ten_minutes(tmp_path: Path) -> None:
    python = need_python((3, 11))
    script = """
one, = start("one")
tell("ready")
sys.stdin.readline()
one.name = "changed"
tell("ready")
stay()
"""
    asking = Asking(tmp_path, python)
    with contextlib.closing(asking.readers), program(python, script) as process:
        process.stdout.readline()
        groups = asking.samples(process.pid, question(python, process.pid)["runtime"])
        first = asking.window(groups)
        process.stdin.write(b"\n")
        process.stdin.flush()
        process.stdout.readline()
        names = [first]
        for asking.now_s in (599.0, 601.0, 602.0):
            names.append(asking.window(groups))
            asking.readers.wait(time.monotonic() + 30, lambda: asking.readers.is_idle)

    assert names == [["one"], ["one"], ["one"], ["changed"]]
    assert asking.threads.status()["asked"] == 2


def test_threads_beyond_what_a_window_has_room_for_have_names_in_the_next(tmp_path: Path) -> None:
    python = need_python((3, 11))
    script = "start(*(f'worker {n}' for n in range(100)))\ntell('ready')\nstay()"
    asking = Asking(tmp_path, python)
    with contextlib.closing(asking.readers), program(python, script) as process:
        process.stdout.readline()
        groups = asking.samples(process.pid, question(python, process.pid)["runtime"])
        first, second = asking.window(groups), asking.window(groups)

    assert len({*first} - {None}) == 64
    assert {*second} == {f"worker {n}" for n in range(100)}
    assert asking.threads.status()["asked"] == 1


def test_memory_that_does_not_answer_costs_its_own_names_alone(tmp_path: Path) -> None:
    """A page of it is of a file system that hangs whoever reads it."""
    python = need_python((3, 11))
    (tmp_path / "content").write_bytes(bytes(8192))
    script = f"""
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_size_t
libc.mmap.argtypes = [ctypes.c_size_t] * 6
path = {str(tmp_path / "mount" / "file")!r}
start("hung")
tell(libc.mmap(0, 8192, 1, 2, os.open(path, os.O_RDONLY), 0))
stay()
"""
    asking = Asking(tmp_path, python)
    with (
        contextlib.closing(asking.readers),
        hanging(tmp_path / "mount", tmp_path / "content") as system,
        program(python, script) as hung,
        program(python, "start('other')\ntell('ready')\nstay()") as other,
    ):
        page = int(hung.stdout.readline())
        other.stdout.readline()
        system.flag.touch()
        groups = asking.samples(hung.pid, page)
        groups |= asking.samples(other.pid, question(python, other.pid)["runtime"])
        with system.ending():
            names = asking.window(groups)

    assert names == ["python3.11", "other"]
    status = asking.threads.status()
    assert orjson.loads(orjson.dumps(status)) == status  # as it is told
    assert (status["failed_hung"], status["read"]) == (1, 1)
