"""Compaction beside an agent: again and again, confined to the store, and never left behind."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from profiler.commands.up import compaction_command, service_environment
from storage.objects.open import open_store
from tests.commands.test_up import agent_options
from tests.support.compaction import Expected, hour_manifests, profile
from tests.support.live import wait_for

HOUR_S = 3600


@pytest.fixture
def expected(tmp_path):
    return Expected(open_store(str(tmp_path / "store")))


def compacted(expected):
    manifests = hour_manifests(expected.store).values()
    return sum(part["objects"] for each in manifests for part in each["parts"])


def command_of(tmp_path, parent):
    """Return what `up` runs, without its pauses."""
    options = replace(agent_options(tmp_path), store=str(tmp_path / "store"))
    cache = tmp_path / "cache"
    cache.mkdir(exist_ok=True)
    command = compaction_command(options, cache, is_root=os.geteuid() == 0)
    at = command.index("profiler.service.compaction") + 1
    paced = [*command[:at], "--first-after-s=0", "--period-s=0.2", *command[at:]]
    shown = [f"--parent={parent}" if each.startswith("--parent=") else each for each in paced]
    return shown, service_environment(options, cache)


@pytest.mark.kernel
def test_what_has_arrived_is_compacted_again_and_again(expected, tmp_path) -> None:
    """By the command line of `up`, with its rights: those to the store and to its cache."""
    start_s = int(time.time()) // HOUR_S * HOUR_S - 2 * HOUR_S
    expected.put(profile(start_s))
    command, environment = command_of(tmp_path, os.getpid())

    with subprocess.Popen(command, env=environment) as process:
        try:
            wait_for(lambda: compacted(expected) == 1)
            expected.put(profile(start_s - HOUR_S))
            wait_for(lambda: compacted(expected) == 2)
        finally:
            process.kill()


PARENT = """
import os, subprocess, sys
command = [each.replace("PARENT", str(os.getpid())) for each in sys.argv[1:]]
print(subprocess.Popen(command).pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.kernel
def test_it_ends_with_its_parent_and_what_it_has_started_with_it(expected, tmp_path) -> None:
    """However that ends."""
    command, environment = command_of(tmp_path, "PARENT")
    at = command.index("profiler.commands.compact")
    command = [*command[: at - 2], "-c", "import time; time.sleep(100)"]
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, *command],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        wait_for(lambda: children_of(pid))
        (child,) = children_of(pid)
        parent.send_signal(signal.SIGKILL)

    wait_for(lambda: not is_running(pid))
    wait_for(lambda: not is_running(child))


def children_of(pid):
    paths = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for path in paths for child in path.read_text().split()]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except OSError:
        return False
