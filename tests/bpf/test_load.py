"""The child that compiles: why it has ended without an answer, and what the error says to do."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bpf import load
from bpf.errors import LoadError
from bpf.memory_limit import memory_limit
from bpf.sampler import Sampler, SamplerConfig
from tests.support.live import wait_for

ROOT = Path(__file__).parents[2]
LOAD = "from bpf.sampler import *\nwith Sampler(SamplerConfig()): pass"


@contextlib.contextmanager
def limited_cgroup(controller: str, names: tuple[str, str], limit: int) -> Iterator[list[Path]]:
    """Make a cgroup with a limit in whichever hierarchy this host has.

    `names` are the limit's in the older hierarchy and in the unified one. Returns the files of the
    processes and of the limit.
    """
    mount = Path("/sys/fs/cgroup")
    if (mount / controller).is_dir():
        folder, name = mount / controller / f"everflame-test-{os.getpid()}", names[0]
    elif controller in (mount / "cgroup.subtree_control").read_text().split():
        folder, name = mount / f"everflame-test-{os.getpid()}", names[1]
    else:
        pytest.skip(f"no controller of {controller} in a cgroup hierarchy of this host")
    folder.mkdir()
    try:
        (folder / name).write_text(str(limit))
        yield [folder / "cgroup.procs", folder / name]
    finally:
        wait_for(lambda: not (folder / "cgroup.procs").read_text())
        folder.rmdir()


def start_in(processes: Path) -> subprocess.Popen[str]:
    script = f"echo $$ > {processes}; exec {sys.executable} -c '{LOAD}'"
    one_thread = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # as the command sets it
    return subprocess.Popen(
        ["sh", "-c", script], cwd=ROOT, env=one_thread, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.kernel
def test_a_host_without_room_for_a_process_is_asked_again() -> None:
    """Of the limit of 1 the sampler is one; the child starts when there is room."""
    with (
        limited_cgroup("pids", ("pids.max", "pids.max"), 1) as (processes, limit),
        start_in(processes) as child,
    ):
        refusals = limit.with_name("pids.events")
        wait_for(lambda: "max 0" not in refusals.read_text(), what="a refused start")
        limit.write_text("10")
        _, talk = child.communicate(timeout=90)

    assert child.returncode == 0, talk


@pytest.mark.kernel
def test_a_memory_limit_that_is_too_low_is_named_with_a_remedy() -> None:
    """The kernel kills the child for it, not the process that waits."""
    limit_bytes = 64 << 20
    names = "memory.limit_in_bytes", "memory.max"
    with (
        limited_cgroup("memory", names, limit_bytes) as (processes, _),
        start_in(processes) as child,
    ):
        _, talk = child.communicate(timeout=90)

    limit = f"the limit of this cgroup is {limit_bytes / 1e6:.0f} MB (allow at least 200 MB)"
    assert f"BPF programs: memory is short: {limit}" in talk.splitlines()[-1]


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("number", "told"),
    [
        (signal.SIGKILL, "the child was killed; memory is short"),
        (signal.SIGSEGV, "the child crashed with SIGSEGV"),
        (signal.SIGSTOP, "has had no CPU time for 1 s"),
    ],
)
def test_a_child_that_ends_or_hangs_without_an_answer_has_a_reason(
    number: signal.Signals, told: str, monkeypatch
) -> None:
    """Killed by somebody, crashed, or stopped: a child that only is slow is waited for."""
    monkeypatch.setattr(load, "_LOOK_S", 0.1)
    monkeypatch.setattr(load, "_STALLS_S", 1.0)

    def strike() -> None:
        wait_for(children)
        os.kill(children()[0], number)

    striker = threading.Thread(target=strike)
    striker.start()
    try:
        with pytest.raises(LoadError, match=re.escape(told)), Sampler(SamplerConfig()):
            pass
    finally:
        striker.join()


def children() -> list[int]:
    path = Path(f"/proc/self/task/{os.getpid()}/children")
    return [
        pid
        for pid in map(int, path.read_text().split())
        if b"bpf.compile" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


def test_the_memory_limit_of_this_process_is_a_size_or_none() -> None:
    limit = memory_limit()

    assert limit.limit_bytes is None or limit.limit_bytes > 0
    assert limit.kills >= 0
