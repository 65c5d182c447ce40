"""Services of processes that are gone, and when they ran: real processes and the kernel's records.

Nothing is read here but what a scan or a sample finds: all else the records tell.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bpf.records import Rings
from bpf.samples import RawSample
from profiler.processes.address_spaces import AddressSpaces
from profiler.processes.facts import Facts, request
from profiler.processes.facts_reader import FactsReader
from profiler.processes.generations import boottime_ns, read_stat
from profiler.processes.gone import Kin
from profiler.processes.labels import with_instance
from profiler.processes.lifetimes import Lifetimes
from profiler.processes.rules import make_rule
from tests.support.cgroup_trees import cgroup_tree, outside_of_units
from tests.support.labelers import labeler_reading_at_once, labels_of_instance, labels_of_subject
from tests.support.live import sample_of, started, wait_for
from tests.support.targets import compile_target, running

pytestmark = pytest.mark.kernel

PYTHON = Path(sys.executable).resolve()
CLEAN = {"PATH": os.environ["PATH"]}
MS = 1_000_000


class Watched:
    """A labeler that the kernel's records are handed to, and which nobody has told anything."""

    def __init__(self, rules: tuple = (), **options: object) -> None:
        self.rings = Rings()
        self.lifetimes = Lifetimes()
        self.spaces = AddressSpaces(self.rings, lifetimes=self.lifetimes)
        self.labeler = labeler_reading_at_once(
            rules,
            own_pid=0,
            lifetimes=self.lifetimes,
            parent_of=self.spaces.parent_of,
            **options,
        )
        self.labeler.scan()
        self.begin_ns = boottime_ns()

    def note(self, *samples: RawSample) -> list[dict[str, str]]:
        self.spaces.poll()
        subjects = self.labeler.note(samples)
        return [dict(labels_of_subject(self.labeler, subject)) for subject in subjects]

    def present(self) -> dict[str, int]:
        """Return how long each service ran since the last call."""
        self.note()
        begin_ns, self.begin_ns = self.begin_ns, boottime_ns()
        services = self.labeler.present(begin_ns, self.begin_ns)
        present: dict[str, int] = {}
        for labels, duration_ns in services.items():
            service = dict(labels)["service"]
            present[service] = present.get(service, 0) + duration_ns
        return present

    def close(self) -> None:
        self.labeler.close()
        self.rings.close()


@pytest.fixture
def watched() -> Iterator[Watched]:
    with contextlib.closing(Watched()) as watched:
        yield watched


@pytest.fixture(autouse=True, scope="module")
def nowhere() -> Iterator[None]:
    with outside_of_units():
        yield


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[str, str], Path]:
    """Return a program under a name of its own, which no other process of this machine has."""

    def copy(program: str, name: str) -> Path:
        path = tmp_path / name
        path.write_bytes(Path(program).resolve().read_bytes())
        path.chmod(0o755)
        return path

    return copy


def gone(watched: Watched, *command: str | Path) -> tuple[RawSample, int]:
    """Run a program to its end; return a sample of it, and how long that took.

    It is run again if its records are lost, because the test got no CPU while the buffer filled.
    """
    deadline_s = time.monotonic() + 60
    while True:
        watched.spaces.poll()
        begin_ns = boottime_ns()
        with subprocess.Popen(command) as process:
            process.wait()
        took_ns = boottime_ns() - begin_ns
        watched.spaces.poll()
        if lives := watched.lifetimes._past.get(process.pid):
            break
        assert time.monotonic() < deadline_s, "its records were lost"
    life = lives[-1]
    at_ns = (life.begin_ns + life.end_ns) // 2 - (boottime_ns() - time.monotonic_ns())
    name = os.fsencode(Path(command[0]).name)[:15]
    sample = sample_of(
        process.pid, start_ns=life.start_ns, comm=name, first_ns=at_ns, last_ns=at_ns
    )
    return sample, took_ns


def test_processes_between_two_scans_are_present_for_as_long_as_they_ran(
    watched: Watched, copy_of
) -> None:
    """Never sampled, never read: their records alone tell, to within a tick."""
    brief = copy_of("/bin/sleep", "brief-one")
    took_ns = sum(gone(watched, brief, "0.15")[1] for _ in range(3))

    brief_ns = watched.present()["brief-one"]

    assert 450 * MS <= brief_ns <= took_ns
    assert "brief-one" not in watched.present()


def test_process_that_was_read_ends_when_its_exit_says(watched: Watched, copy_of) -> None:
    """Not midway between two scans."""
    with running(copy_of("/bin/sleep", "known-one"), "60") as process:
        wait_for(lambda: Path(f"/proc/{process.pid}/comm").read_text() == "known-one\n")
        watched.note()
        watched.labeler.scan()
        time.sleep(0.2)
        killed_ns = boottime_ns()
        process.kill()
        process.wait()
        waited_ns = boottime_ns()
    time.sleep(0.2)
    watched.labeler.scan()

    begin_ns = watched.begin_ns
    known_ns = watched.present()["known-one"]

    assert killed_ns - begin_ns - 150 * MS <= known_ns <= waited_ns - begin_ns
    assert known_ns >= 200 * MS


def test_exec_divides_the_time_between_two_services(watched: Watched, copy_of) -> None:
    """Although no sample and no scan saw the exec."""
    other = copy_of("/bin/sleep", "second-one")
    gone(
        watched,
        copy_of("/bin/bash", "first-one"),
        "-c",
        f"read -t 0.2 < <(sleep 9); exec {other} 0.1",
    )

    present = watched.present()

    assert present["second-one"] == pytest.approx(100 * MS, abs=50 * MS)
    assert 190 * MS <= present["first-one"] < 2_000 * MS


def test_gone_process_is_what_it_executed_and_not_its_parent(watched: Watched, copy_of) -> None:
    """Sampled or not, and whether others of its kind were read makes no difference."""
    program = copy_of("/bin/sleep", "lone-one")
    maker = copy_of("/bin/bash", "maker-one")
    command = (maker, "-c", f"for i in 1 2 3; do {program} 0.05; done; sleep 60")
    with running(*command):
        sample, _ = gone(watched, program, "0.05")
        early = watched.note(sample)[0]
        with started(program, "60") as process:
            living = watched.note(sample_of(process.pid))[0]
        sample, _ = gone(watched, program, "0.05")
        late = watched.note(sample)[0]
        present = watched.present()

    names = [{name: labels[name] for name in ("service", "version")} for labels in (early, late)]
    assert names == [{"service": "lone-one", "version": living["version"]}] * 2
    assert present["lone-one"] >= 100 * MS


def test_gone_process_has_what_a_sibling_says(watched: Watched, copy_of) -> None:
    """Same parent, same executable: the version is that of the one that was read."""
    program = copy_of("/bin/sleep", "sibling-one")
    with started(program, "60", env=CLEAN | {"GIT_SHA": "abc"}) as process:
        watched.note(sample_of(process.pid))
        sample, _ = gone(watched, program, "0.01")
        labels = watched.note(sample)[0]

    assert (labels["service"], labels["version"]) == ("sibling-one", "abc")


def test_gone_script_is_called_by_its_own_name(watched: Watched, tmp_path: Path) -> None:
    """The kernel says what was executed: an interpreter for a script that names it."""
    script = tmp_path / "nightly.py"
    script.write_text(f"#!{PYTHON}\n")
    script.chmod(0o755)
    sample, took_ns = gone(watched, script)

    labels = watched.note(sample)[0]

    assert labels["service"] == "nightly"
    assert 0 < watched.present()["nightly"] <= took_ns


def test_gone_interpreter_is_itself(watched: Watched, copy_of) -> None:
    """What it interpreted is not recorded; that is no reason to give its time to the parent."""
    sample, _ = gone(watched, copy_of("/bin/bash", "bash"), "-c", ":")

    assert watched.note(sample)[0]["service"] == "bash"


def test_gone_worker_is_of_the_service_that_forked_it(watched: Watched, tmp_path: Path) -> None:
    """It runs what its parent runs."""
    script = tmp_path / "forker.py"
    script.write_text(
        "import os, sys, time\ntime.sleep(0.2)\n"
        "if not (pid := os.fork()): time.sleep(0.05); os._exit(0)\n"
        "os.waitpid(pid, 0)\nprint(pid, flush=True)\ntime.sleep(60)\n"
    )
    with started(PYTHON, script, stdout=subprocess.PIPE) as process:
        watched.note(sample_of(process.pid))
        worker = int(process.stdout.readline())
        last_ns = time.monotonic_ns()
        sample = sample_of(
            worker, start_ns=boottime_ns(), comm=b"x", first_ns=last_ns - 40 * MS, last_ns=last_ns
        )
        labels = watched.note(sample)[0]

    assert labels["service"] == "forker"


def test_gone_process_is_of_the_unit_it_was_sampled_in(watched: Watched) -> None:
    """Its samples carry the cgroup; its presence is counted there as well."""
    with cgroup_tree("v2") as tree:
        with running("sleep", "60") as process:
            cgroup_id = tree.move(process.pid, "system.slice/job.service")
        sample, _ = gone(watched, "/bin/true")
        labels = watched.note(sample._replace(cgroup_id=cgroup_id))[0]
        present = watched.present()

    assert labels["service"] == "job"
    assert 0 < present["job"] < 2_000 * MS


def test_process_without_its_first_thread_is_a_service_as_before(
    watched: Watched, tmp_path: Path
) -> None:
    """Found after its first thread has exited, it is named by the executable, and present."""
    program = compile_target("first_thread_exits.c", tmp_path / "headless", "-O1", "-pthread")
    with running(program, "60", "0.1") as process:
        wait_for(lambda: read_stat(process.pid).is_exited)
        labels = watched.note(sample_of(process.pid, leader_comm=b"x"))[0]
        watched.labeler.scan()
        time.sleep(0.1)
        assert watched.present()["headless"] >= 100 * MS

    assert (labels["service"], len(labels["version"])) == ("headless", 40)


def test_gone_process_follows_a_rule_for_its_executable(copy_of) -> None:
    """The operator's rules hold for what the records say."""
    program = copy_of("/bin/true", "ruled-one")
    with contextlib.closing(Watched((make_rule("chosen", exe="*/ruled-*"),))) as watched:
        sample, _ = gone(watched, program)

        assert watched.note(sample)[0]["service"] == "chosen"


def test_the_build_of_a_program_is_known_however_many_others_there_were() -> None:
    """The kernel does not say it of a file that is not in the page cache."""
    labeler = labeler_reading_at_once()

    def labels_of_build(number: int, build_id: str) -> dict[str, str]:
        kin = Kin(None, False, (b"/srv/%d" % number, build_id), b"program", 0)
        return dict(labeler._gone.labels(kin))

    for number in range(5_000):
        labels_of_build(number, f"{number:040x}")

    assert labels_of_build(4_999, "")["version"] == f"{4_999:040x}"
    labeler.close()


class Asked:
    """Asks nobody: a test answers."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def __call__(self, pid: int, start_ticks: int) -> None:
        self.asked.append((pid, start_ticks))

    def read(self, pid: int) -> tuple[int, int, Facts | None]:
        """Read what was asked of a process, as a reader child would, and send it through JSON."""
        pid, start_ticks = next(each for each in self.asked if each[0] == pid)
        values = request(pid, start_ticks, (), wants_command=False)
        return pid, start_ticks, Facts.of_json(FactsReader().read(values))


def test_labels_are_known_when_the_answer_comes(tmp_path: Path) -> None:
    """The samples were noted before, under a key that stands for their labels."""
    script = tmp_path / "late.py"
    script.write_text("import time; time.sleep(60)")
    ask = Asked()
    with (
        contextlib.closing(Watched(ask=ask)) as watched,
        started(PYTHON, script, env=CLEAN | {"GIT_SHA": "abc"}) as process,
    ):
        subject = watched.labeler.note([sample_of(process.pid)])[0]
        is_complete = watched.labeler.is_complete([subject])
        for pid, start_ticks in ask.asked:
            if pid != process.pid:  # its ancestors
                watched.labeler.learn(pid, start_ticks, None)
        watched.labeler.learn(*ask.read(process.pid))
        labels = labels_of_subject(watched.labeler, subject)
        instances = {subject.source: watched.labeler.instance_of(subject)}

        assert not is_complete
        assert watched.labeler.is_complete([subject])
        assert (dict(labels)["service"], dict(labels)["version"]) == ("late", "abc")
        assert with_instance(subject.key, instances) == labels
        assert watched.present()["late"] > 0


def test_process_that_is_not_read_in_time_is_named_by_its_kin(copy_of) -> None:
    """And present under that name: no service has samples without presence."""
    program = copy_of("/bin/sleep", "slow-one")
    ask = Asked()
    with contextlib.closing(Watched(ask=ask)) as watched, started(program, "60") as process:
        labels = watched.note(sample_of(process.pid))[0]
        present = watched.present()
        watched.labeler.learn(*ask.read(process.pid))
        later = watched.note(sample_of(process.pid))[0]

    assert labels["service"] == later["service"] == "slow-one"
    assert present["slow-one"] > 0


def test_process_that_cannot_be_read_is_its_executable(copy_of) -> None:
    """Its reader hangs: what the kernel knows has to do."""
    program = copy_of("/bin/sleep", "hung-one")
    ask = Asked()
    with contextlib.closing(Watched(ask=ask)) as watched, started(program, "60") as process:
        subject = watched.labeler.note([sample_of(process.pid)])[0]
        for pid, start_ticks in ask.asked:
            watched.labeler.learn(pid, start_ticks, None)

        assert dict(labels_of_subject(watched.labeler, subject))["service"] == "hung-one"
        assert watched.labeler.is_complete([subject])


def test_answer_about_the_program_before_an_exec_is_not_believed(copy_of) -> None:
    """It comes late; the process is asked for again as what it is now."""
    program = copy_of("/bin/sleep", "after-one")
    ask = Asked()
    command = ("bash", "-c", f"read x; exec {program} 60")
    with (
        contextlib.closing(Watched(ask=ask)) as watched,
        started(*command, stdin=subprocess.PIPE) as process,
    ):
        watched.note(sample_of(process.pid))
        early = ask.read(process.pid)
        process.stdin.write(b"\n")
        process.stdin.flush()
        wait_for(lambda: Path(f"/proc/{process.pid}/cmdline").read_bytes().endswith(b"\x0060\0"))
        ask.asked.clear()
        watched.note(sample_of(process.pid, exec_id=2))
        watched.labeler.learn(*early)
        between = labels_of_instance(watched.labeler, process.pid, sample_of(process.pid).start_ns)
        watched.labeler.learn(*ask.read(process.pid))
        labels = watched.note(sample_of(process.pid, exec_id=2))[0]

    assert between == ()
    assert labels["service"] == "after-one"


@pytest.mark.parametrize(
    "answer", [None, [], {}, {"name": "x"}, {"name": 7, "stack": 1}, {"name": "", "stack": 1}]
)
def test_answer_of_another_shape_is_none(answer: object) -> None:
    """A reader that was taken over says what it likes."""
    assert Facts.of_json(answer) is None


def test_command_is_only_read_for_rules() -> None:
    """Arguments may hold secrets."""
    with started("sleep", "60") as process:
        ticks = read_stat(process.pid).start_ticks
        answers = [
            FactsReader().read(request(process.pid, ticks, (), wants_command=wants))
            for wants in (False, True)
        ]

    assert [answer["command"] for answer in answers] == ["", "sleep 60"]
