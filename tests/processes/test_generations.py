"""What /proc says of processes and threads, also when the first thread has exited."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from profiler.processes.generations import (
    is_running,
    living_thread,
    process_of,
    read_stat,
)
from symbolizer.files import ProcessFiles
from tests.support.live import started, wait_for
from tests.support.targets import compile_target, running

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("targets") / "first_thread_exits"
    return compile_target("first_thread_exits.c", output, "-O1", "-pthread")


@pytest.fixture
def headless(program: Path) -> Iterator[int]:
    """Return a process whose first thread exits after 0.1 s, and all others after 60."""
    with running(program, "60", "0.1") as process:
        wait_for(lambda: read_stat(process.pid).is_exited)
        yield process.pid


def test_process_runs_while_any_thread_does(headless: int, program: Path) -> None:
    """What its own folder in /proc does not show any more, that of another thread does."""
    tid = living_thread(headless)

    assert is_running(headless)
    assert tid not in (0, headless)
    assert process_of(tid) == process_of(headless) == headless
    assert read_stat(headless).stack == read_stat(tid).stack != 0
    with ProcessFiles(headless) as files:
        assert files.link("exe") == os.fsencode(program)
        assert files.read("cmdline", 4096).split(b"\0")[1:3] == [b"60", b"0.1"]
        opened = files.open_executable()
        assert opened is not None
        os.close(opened.fd)


def test_process_has_ended_when_all_threads_have(program: Path) -> None:
    """Although nobody has waited for it."""
    with running(program, "0.2", "0.1") as process:
        wait_for(lambda: not is_running(process.pid))

        assert living_thread(process.pid) == 0
        assert read_stat(process.pid).is_dead
    assert not is_running(process.pid)
    assert process_of(process.pid) is None


def test_process_of_a_process_is_itself() -> None:
    """Its first thread has its number."""
    with started("sleep", "60") as process:
        assert process_of(process.pid) == living_thread(process.pid) == process.pid
