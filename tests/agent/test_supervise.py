"""The run folder and its lock: one agent a host, and no file of anybody else."""

import os
import select
import signal
import socket
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from profiler.agent import status
from profiler.agent.status import NoAgentError, StatusSocket
from profiler.agent.supervise import Child, RefusedError, host_lock, how_it_ended
from tests.support.live import stat_fields


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "everflame-1000" / "everflame"


def test_the_lock_is_in_a_folder_of_this_user_alone(folder):
    mask = os.umask(0)
    try:
        with host_lock(folder):
            modes = [path.stat().st_mode & 0o777 for path in (folder.parent, folder)]
            assert int((folder / "agent.lock").read_text()) == os.getpid()
    finally:
        os.umask(mask)

    assert modes == [0o755, 0o755]


def test_one_agent_at_a_time(folder):
    with (
        host_lock(folder),
        pytest.raises(RefusedError, match=f"pid {os.getpid()}"),
        host_lock(folder),
    ):
        pass
    with host_lock(folder):
        pass


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_link_in_the_place_of_the_lock_is_not_followed(link, folder, tmp_path):
    """What it leads to keeps its content."""
    precious = tmp_path / "precious"
    precious.write_text("do not empty")
    folder.mkdir(parents=True)
    link(precious, folder / "agent.lock")

    with pytest.raises(RefusedError, match="remove it"), host_lock(folder):
        pass

    assert precious.read_text() == "do not empty"


def test_a_pipe_in_the_place_of_the_lock_does_not_hang(folder):
    folder.mkdir(parents=True)
    os.mkfifo(folder / "agent.lock")

    with pytest.raises(RefusedError, match="remove it"), host_lock(folder):
        pass


def test_a_link_in_the_place_of_the_folder_is_refused(folder, tmp_path):
    """Also one on the way there, unless root has made it."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder.parent.mkdir()
    folder.symlink_to(elsewhere)

    with pytest.raises(RefusedError, match="it is a link"), host_lock(folder):
        pass

    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize("is_parent", [False, True])
def test_a_folder_that_others_may_write_to_is_refused(is_parent, folder):
    folder.mkdir(parents=True)
    open_one = folder.parent if is_parent else folder
    open_one.chmod(0o777)

    with pytest.raises(RefusedError, match=f"chmod go-w {open_one}"), host_lock(folder):
        pass

    open_one.chmod(0o755)
    with host_lock(folder):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a folder away")
@pytest.mark.parametrize("is_parent", [False, True])
def test_a_folder_of_another_user_is_refused(is_parent, folder):
    folder.mkdir(parents=True)
    os.chown(folder.parent if is_parent else folder, 65534, 65534)

    with pytest.raises(RefusedError, match="belongs to user 65534"), host_lock(folder):
        pass


def test_the_socket_is_private_from_the_start(folder):
    with host_lock(folder), StatusSocket(folder):
        assert (folder / "agent.sock").stat().st_mode & 0o777 == 0o600


def test_the_folder_may_have_a_long_path(folder):
    """Longer than the address of a socket can be."""
    with host_lock(folder / ("a" * 120)), StatusSocket(folder / ("a" * 120)) as listening:
        asking = ThreadPoolExecutor(1).submit(status.ask, folder / ("a" * 120))
        assert select.select([listening], [], [], 30)[0]
        listening.answer(lambda: {"pid": 1})

        assert asking.result(30) == {"pid": 1}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to listen as somebody else")
def test_an_agent_of_another_user_is_not_believed():
    """It listens where this user's agent would: what it says is not shown."""
    with tempfile.TemporaryDirectory() as name, socket.socket(socket.AF_UNIX) as server:
        tmp_path = Path(name)
        tmp_path.chmod(0o755)
        server.bind(str(tmp_path / "agent.sock"))
        (tmp_path / "agent.sock").chmod(0o666)
        child = os.fork()
        if not child:
            os.seteuid(0)
            os.setresuid(4242, 4242, 4242)
            server.listen()
            client, _ = server.accept()
            client.close()
            os._exit(0)
        other = os.fork()
        if not other:
            os.setresuid(4243, 4243, 4243)
            code = 1
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                try:
                    status.ask(tmp_path)
                except NoAgentError as error:
                    if "belongs to user 4242" in str(error):
                        code = 0
                        break
                    time.sleep(0.02)
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(other, 0)[1])
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)

    assert code == 0


@pytest.mark.parametrize("how", ["supervise", "end", "ask and end"])
def test_the_group_of_a_dead_child_is_killed_before_another_can_have_its_number(how, monkeypatch):
    """As long as the child is not reaped, its pid names no other group."""
    child, states = Child("child", ["sh", "-c", "sleep 60 & exec sleep 60"]), []
    killpg = os.killpg

    def watched(group: int, number: int) -> None:
        states.append(stat_fields(group)[0])
        killpg(group, number)

    monkeypatch.setattr(os, "killpg", watched)
    child.supervise()
    os.kill(child.pid, signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    if how == "supervise":
        child.supervise()
        assert child.status == -signal.SIGKILL
    elif how == "ask and end":
        child.ask_to_end()
    child.end(1)

    assert states == [b"Z"]
    assert not child.pid


def test_a_child_that_cannot_be_started_is_tried_again(tmp_path, caplog):
    """As where no process is left: counted, said, and never fatal."""
    now_s = 0.0
    program = tmp_path / "program"
    child = Child("child", [str(program)], monotonic_s=lambda: now_s)

    child.supervise()
    child.supervise()
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    now_s = 1.0
    child.supervise()
    running = child.pid
    child.end(0)

    assert running
    assert (child.starts, child.failed_starts) == (1, 1)
    assert [record.getMessage() for record in caplog.records] == [
        "cannot start the child: No such file or directory"
    ]


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (1, "ended with status 1"),
        (-9, "was killed by SIGKILL (is memory short?)"),
        (-11, "was killed by SIGSEGV"),
        (-40, "was killed by signal 40"),
    ],
)
def test_how_a_child_ended_is_said_in_words(status, told):
    assert how_it_ended(status) == told


def test_a_child_that_dies_at_once_is_started_less_and_less_often():
    """And soon again once it has run for a while: it may die for another reason every day."""
    now_s = 0.0
    child = Child("child", ["sleep", "60"], monotonic_s=lambda: now_s)

    def pause_after(run_s: float) -> float:
        """Let it run for so long and die; return how long it takes until it is started again."""
        nonlocal now_s
        now_s += run_s
        starts, died_s = child.starts, now_s
        os.kill(child.pid, signal.SIGKILL)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        while child.starts == starts:
            child.supervise()
            now_s += 0.5
        return now_s - 0.5 - died_s

    child.supervise()
    try:
        assert [pause_after(1) for _ in range(8)] == [1, 2, 4, 8, 16, 32, 60, 60]
        assert [pause_after(3_600), pause_after(3_600), pause_after(1)] == [1, 1, 2]
    finally:
        child.end(0)
