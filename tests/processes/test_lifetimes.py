"""When processes ran, by the kernel's own records: real processes and real records."""

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bpf.records import Rings
from profiler.processes.generations import boottime_ns, read_stat
from profiler.processes.lifetimes import Lifetime, Lifetimes
from tests.support.live import generation_of, wait_for
from tests.support.targets import compile_target, running

pytestmark = pytest.mark.kernel

MS = 1_000_000


class Recorded:
    """Lifetimes that take what a machine's rings hold."""

    def __init__(self) -> None:
        self.rings = Rings()
        self.lifetimes = Lifetimes()

    def poll(self) -> None:
        records, _ = self.rings.read()
        self.lifetimes.take(records, self.rings.last_exits)
        self.rings.last_exits.clear()

    def ended(self, pid: int) -> list[Lifetime]:
        """Return the lifetimes of a process that have ended since the last call."""
        self.poll()
        return [life for life in self.lifetimes.take_ended() if life.pid == pid]


def run(program: str | Path) -> int:
    """Return the pid of a process that has ended."""
    with subprocess.Popen([program]) as process:
        process.wait()
    return process.pid


@pytest.fixture
def recorded() -> Iterator[Recorded]:
    recorded = Recorded()
    with contextlib.closing(recorded.rings):
        yield recorded


def test_lifetimes_end_with_an_exec_and_with_the_process(recorded: Recorded) -> None:
    """Each is exact, and says who began it and what it executed."""
    begin_ns = boottime_ns()
    with subprocess.Popen(["sh", "-c", "read x; exec sleep 0.05"], stdin=subprocess.PIPE) as shell:
        wait_for(lambda: b"sh" in Path(f"/proc/{shell.pid}/comm").read_bytes())
        assert shell.stdin is not None
        shell.stdin.close()
        shell.wait()
    end_ns = boottime_ns()

    forked, first, second = recorded.ended(shell.pid)

    assert begin_ns < forked.begin_ns < forked.end_ns == first.begin_ns
    assert first.end_ns == second.begin_ns < second.end_ns < end_ns
    assert second.end_ns - second.begin_ns == pytest.approx(50 * MS, abs=40 * MS)
    assert [life.execution.comm for life in (first, second)] == [b"sh", b"sleep"]
    assert os.path.realpath(second.execution.program[0]) == os.path.realpath(b"/bin/sleep")
    assert len(second.execution.program[1]) == 40
    assert {life.parent_pid for life in (forked, first, second)} == {os.getpid()}
    assert forked.start_ns == second.start_ns


def test_script_is_called_by_its_own_name(recorded: Recorded, tmp_path: Path) -> None:
    """The executable is the interpreter, comm the script that names it."""
    script = tmp_path / "backup.sh"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)

    life = recorded.ended(run(script))[-1]

    assert life.execution.comm == b"backup.sh"
    assert b"sh" in os.path.basename(life.execution.program[0])  # noqa: PTH119 - bytes


def test_forked_worker_shares_what_its_parent_executed(recorded: Recorded) -> None:
    """Whether the exec is older than the records or not."""
    if not (pid := os.fork()):
        os._exit(0)
    os.waitpid(pid, 0)

    life = recorded.ended(pid)[0]

    assert recorded.lifetimes.is_of(os.getpid(), life.execution)
    assert not recorded.lifetimes.is_of(1, life.execution)


def test_process_lasts_until_its_last_thread_exits(recorded: Recorded, tmp_path: Path) -> None:
    """The first thread's exit ends nothing while others run."""
    program = compile_target("first_thread_exits.c", tmp_path / "headless", "-O1", "-pthread")
    with running(program, "0.5", "0.1") as process:
        wait_for(lambda: read_stat(process.pid).is_exited)
        assert not [life for life in recorded.ended(process.pid) if life.execution.is_known]
        wait_for(lambda: read_stat(process.pid).is_dead)
        end_ns = boottime_ns()

        life = recorded.ended(process.pid)[-1]

    assert life.end_ns - life.begin_ns > 450 * MS
    assert end_ns - 200 * MS < life.end_ns < end_ns


def test_lifetime_of_a_time_is_found_for_a_while(recorded: Recorded) -> None:
    """Samples are drained when their process is gone."""
    pid = run("true")
    life = recorded.ended(pid)[-1]

    assert recorded.lifetimes.find(pid, life.begin_ns) is life
    assert recorded.lifetimes.find(pid, life.end_ns) is None


def test_end_that_was_not_recorded_is_found_by_a_sweep() -> None:
    """Records are lost now and then; nothing goes on for ever for that."""
    recorded = Recorded()
    with running("sleep", "60") as process:
        recorded.poll()
        recorded.rings.close()
        assert recorded.lifetimes.find(process.pid, boottime_ns()) is not None
    now_ns = boottime_ns()
    recorded.lifetimes.sweep([os.getpid()], now_ns, now_ns)

    assert process.pid in {life.pid for life in recorded.lifetimes.take_ended()}


def test_thousand_processes_a_second_take_bounded_memory(recorded: Recorded) -> None:
    """What has ended is handed out once, and forgotten after some seconds."""
    for _ in range(300):
        os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)
        recorded.poll()
    ended = recorded.lifetimes.take_ended()
    assert len(ended) >= 600
    late_ns = time.monotonic_ns() + 60_000 * MS
    recorded.lifetimes._clocks_ns = lambda: (late_ns, late_ns)
    recorded.lifetimes.take([])

    assert not recorded.lifetimes.take_ended()
    assert recorded.lifetimes.find(ended[-1].pid, ended[-1].begin_ns) is None


def test_a_process_begins_what_it_runs_with_its_last_exec(recorded: Recorded) -> None:
    """Before an exec, and of a process that is older than the records, it is its start."""
    with subprocess.Popen(["sh", "-c", "read x; exec sleep 100"], stdin=subprocess.PIPE) as shell:
        generation = generation_of(shell.pid)
        recorded.poll()
        first_ns = recorded.lifetimes.begin_of(generation)
        before_ns = boottime_ns()
        assert shell.stdin is not None
        shell.stdin.write(b"go on\n")
        shell.stdin.close()
        wait_for(lambda: b"sleep" in Path(f"/proc/{shell.pid}/comm").read_bytes())
        recorded.poll()
        execed_ns = recorded.lifetimes.begin_of(generation)
        shell.kill()

    assert generation.start_ns <= first_ns < before_ns < execed_ns < boottime_ns()
    own = generation_of(os.getpid())
    assert recorded.lifetimes.begin_of(own) == own.start_ns
