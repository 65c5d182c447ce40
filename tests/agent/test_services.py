"""Processes that are hard to catch, in a whole recording: names, labels and presence."""

import select
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest

from bpf.sampler import SamplerConfig
from profiler.agent.recorder import Recorder
from profiler.processes.generations import read_stat
from storage.profile import Profile
from tests.support.live import wait_for
from tests.support.targets import compile_target, running

pytestmark = pytest.mark.kernel

MS = 1_000_000
ALL = "all"


def names_of(profile: Profile, service: str) -> Counter[str]:
    """Return how many samples of a service have each function, and how many there are."""
    found: Counter[str] = Counter()
    names = dict(zip(profile.locations, profile.names, strict=True))
    for row in profile.rows():
        if dict(row.labels)["service"] == service:
            seen = {frame.function for location in row.stack for frame in names[location]}
            found.update(dict.fromkeys([*seen, ALL], row.samples))
    return found


def wait_for_names(recorder: Recorder, functions: Mapping[str, str]) -> bool:
    """Close windows until most samples of services are in these functions."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        select.select([recorder], [], [], 1.0)
        recorder.catch_up()
        recorder.step()
        profile = recorder.close_window()
        names = {service: names_of(profile, service) for service in functions}
        if all(names[s][f] >= 0.5 * names[s][ALL] > 0 for s, f in functions.items()):
            return True
    return False


@pytest.mark.alone
def test_processes_that_are_hard_to_catch_are_named_and_counted(tmp_path: Path) -> None:
    """First thread gone; forked without exec; gone before anybody looks."""
    headless = compile_target("first_thread_exits.c", tmp_path / "headless-one", "-O1", "-pthread")
    prefork = compile_target("prefork.c", tmp_path / "prefork-one", "-O1")
    brief = Path(shutil.copy("/bin/sleep", tmp_path / "brief-one"))
    loop = f"read x; for i in 1 2 3 4 5; do {brief} 0.1; done"
    with (
        running(headless, "600", "0.1") as first,
        running(prefork, "600", "0.01", "0") as second,
        running("bash", "-c", loop, stdin=subprocess.PIPE) as third,
    ):
        wait_for(lambda: read_stat(first.pid).is_exited)
        commands = {first.pid, second.pid, third.pid}
        with Recorder(SamplerConfig(frequency_hz=199), tmp_path, commands=commands) as recorder:
            recorder.start()
            begin_ns = time.monotonic_ns()
            third.stdin.close()
            while third.poll() is None:
                select.select([recorder], [], [], 0.1)
                recorder.catch_up()
            took_ns = time.monotonic_ns() - begin_ns
            recorder.step()
            profile = recorder.close_window()
            functions = {"headless-one": "spin_worker", "prefork-one": "child_work"}
            named = wait_for_names(recorder, functions)

    present = {dict(labels)["service"]: ns for labels, ns in profile.accounting.services.items()}
    sampled = {dict(labels)["service"] for labels in profile.label_sets}
    assert named
    assert 500 * MS <= present["brief-one"] <= took_ns
    assert sampled <= present.keys()
