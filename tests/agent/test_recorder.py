"""What a recorder loses when the machine refuses it something, and how that is counted."""

import contextlib
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bpf.sampler import Sampler, SamplerConfig
from profiler.agent import host, reader_budget
from profiler.agent.agent import BpfCost
from profiler.agent.reader_child import Failure
from profiler.agent.recorder import Recorder
from profiler.agent.window import Clocks
from tests.support.labelers import labels_of_instance
from tests.support.live import has_execed, start_ns_of, wait_for
from tests.support.targets import running

EVERFLAME = Path(sys.executable).with_name("everflame")


def spin_until(is_true) -> None:
    deadline = time.monotonic() + 30
    while not is_true():
        assert time.monotonic() < deadline, "waited in vain"


@pytest.mark.kernel
def test_ticks_that_were_drained_are_counted_although_no_file_can_be_opened(tmp_path: Path) -> None:
    """They are not in the kernel any more: a fault has lost them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Recorder(SamplerConfig(frequency_hz=499), tmp_path) as recorder:
        recorder.start()
        began = time.thread_time()
        spin_until(lambda: time.thread_time() - began > 0.5)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                recorder.close_window()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

        counts = recorder.close_window().accounting

    assert counts.lost["fault"] > 0
    assert counts.mismatch == 0


def test_what_sampling_has_to_open_is_allowed_or_refused_with_the_remedy(monkeypatch) -> None:
    """A limit of the process itself is raised; one that is set for it is named."""
    monkeypatch.setattr(host.os, "cpu_count", lambda: 16)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, before[1]))
        host.allow_open_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (320, before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)

    with running(
        *("bash", "-c", 'ulimit -n 64; exec "$@"', "limited"),
        *(EVERFLAME, "record", "--for", "1s", "-o", "-"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        written, told = process.communicate(timeout=60)

    assert (process.returncode, written) == (2, b"")
    assert b"may open only 64 files" in told
    assert b"ulimit -n" in told
    assert b"Traceback" not in told


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


class BrokenRecorder(Recorder):
    """Fails once everything is loaded."""

    def _clocks(self) -> Clocks:
        raise OSError("too late")


@pytest.mark.kernel
def test_a_recorder_that_cannot_be_made_leaves_nothing_open(tmp_path: Path) -> None:
    """Whoever tries again would hold the programs, their maps and the rings twice."""
    before = descriptors()

    with pytest.raises(OSError, match="too late"):
        BrokenRecorder(SamplerConfig(frequency_hz=499), tmp_path)

    assert descriptors() == before


@pytest.mark.kernel
def test_measuring_bpf_leaves_nothing_open_when_it_fails() -> None:
    """As long as the kernel measures, every BPF program of the host costs more."""
    before = descriptors()
    with Sampler(SamplerConfig(frequency_hz=499)) as sampler:
        cost = BpfCost(sampler)
        cost.begin()
        cost.begin()  # the end between them has failed
        sampler.start()
        began = time.thread_time()
        spin_until(lambda: time.thread_time() - began > 0.5)
        cost.end()
    with pytest.raises(KeyError):
        cost.begin()  # the sampler is closed

    assert cost.ns_per_tick > 0
    assert descriptors() == before


@pytest.mark.kernel
def test_what_container_runtimes_left_damaged_is_in_the_window(tmp_path: Path) -> None:
    """Their containers have no names then, and the object says why."""
    damaged = tmp_path / "config.v2.json"
    damaged.write_text("{")
    with Recorder(SamplerConfig(), tmp_path / "cache") as recorder:
        recorder.start()
        recorder.labeler._instances.containers.load(damaged, 1_000)

        misses = [recorder.close_window().accounting.misses for _ in range(2)]

    assert [each.get("damaged runtime file") for each in misses] == [1, None]


MANY_MAPPINGS = """
import ctypes, os, sys
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
fd = os.open("/proc/self/exe", os.O_RDONLY)
for _ in range(int(sys.argv[1])):  # of the same page, so that none continues another one
    libc.mmap(None, ctypes.c_size_t(4096), 5, 2, fd, ctypes.c_long(0))
print("mapped", flush=True)
while True:
    pass
"""


@pytest.mark.kernel
def test_a_process_that_maps_without_end_takes_no_room_from_others(tmp_path: Path) -> None:
    """Some thousand mappings are followed, tens of thousands are not."""
    with contextlib.ExitStack() as stack:
        some, many = (
            stack.enter_context(
                running(sys.executable, "-c", MANY_MAPPINGS, number, stdout=subprocess.PIPE)
            )
            for number in ("2000", "20000")
        )
        for process in (some, many):
            assert process.stdout.readline() == b"mapped\n"
        recorder = stack.enter_context(Recorder(SamplerConfig(frequency_hz=199), tmp_path))
        recorder.start()
        recorder.catch_up()
        spin_until(lambda: recorder.step() or some.pid in recorder.unwinding._known)
        began_s = time.monotonic()
        spin_until(lambda: recorder.step() or time.monotonic() - began_s > 1)

        known = recorder.unwinding._known
        stops = recorder.close_window().accounting.stops

    assert some.pid in known
    assert many.pid not in known
    assert stops["no_process_yet"] > 0


@pytest.mark.kernel
def test_processes_of_a_user_are_read_from_the_budget_of_that_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they say about themselves can be made to take long, and there can be many of them."""
    monkeypatch.setattr(reader_budget, "_PART_S", 0.0)
    user = ("setpriv", "--reuid=61234", "--clear-groups", "sleep", "600")
    commands: set[int] = set()
    with Recorder(SamplerConfig(), tmp_path, commands=commands) as recorder:

        def version_of(process: subprocess.Popen[bytes]) -> str:
            commands.add(process.pid)
            comm = Path(f"/proc/{process.pid}/comm")
            wait_for(lambda: comm.read_text() == "sleep\n" and has_execed(process.pid))
            start_ns = start_ns_of(process.pid)

            def is_known() -> bool:
                recorder.labeler.scan()
                recorder.readers.poll()
                return bool(labels_of_instance(recorder.labeler, process.pid, start_ns))

            wait_for(is_known)
            labels = dict(labels_of_instance(recorder.labeler, process.pid, start_ns))
            return labels.get("version", "")

        versions = []
        for command in (user, user, ("sleep", "600")):
            with running(*command, env={**os.environ, "SERVICE_VERSION": "1.5"}) as process:
                versions.append(version_of(process))

        assert versions == ["1.5", "", "1.5"]
        assert recorder.readers.failures[Failure.BUDGET] >= 1
