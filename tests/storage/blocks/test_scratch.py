"""Temporary folders go with their process, and forked children have a database of their own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from storage.blocks.scratch import ScratchFolder

READ = """
import os, sys
from storage.blocks.parquet import reading_engine
def read():
    with reading_engine() as opened:
        assert opened.rows("SELECT sum(i) FROM range(300000) t(i)") == [(44999850000,)]
read()
"""


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


def test_a_killed_process_leaves_nothing_for_long(temporary):
    """The next one removes its folder, and none of a process that runs."""
    waiting = READ + "print('ready', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", waiting]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as killed, subprocess.Popen(command, **pipes) as other:
        assert killed.stdout.readline() == other.stdout.readline() == b"ready\n"
        assert len(list(temporary.iterdir())) == 2
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        mine = ScratchFolder()
        left = set(temporary.iterdir())
        assert len(left) == 2
        assert mine.path in left
        other.stdin.close()
        assert other.wait(30) == 0
    assert list(temporary.iterdir()) == [mine.path]
    mine.close()
    assert list(temporary.iterdir()) == []


def test_a_forked_child_reads_and_ends(temporary):
    """It does not wait for threads that it does not have, nor removes its parent's folder."""
    forking = READ + (
        "import glob, tempfile\n"
        "pid = os.fork()\n"
        "read()\n"
        "if pid:\n"
        "    assert os.waitpid(pid, 0)[1] == 0\n"
        "    assert len(glob.glob(tempfile.gettempdir() + '/*')) == 1\n"
        "    read()\n"
    )

    subprocess.run([sys.executable, "-W", "ignore", "-c", forking], check=True, timeout=60)


def test_readers_work_where_nothing_can_be_written(tmp_path):
    """Only what does not fit in memory needs a folder."""
    environment = {**os.environ, "TMPDIR": "/proc/nothing"}
    reading = (
        "import tempfile, pathlib\n"
        "tempfile._candidate_tempdir_list = lambda: ['/proc/nothing']\n" + READ
    )

    subprocess.run([sys.executable, "-c", reading], check=True, timeout=60, env=environment)
