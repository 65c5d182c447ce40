"""The demo: services that our labels tell apart, bounded, and gone when their parent is."""

import os
import pwd
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from profiler.commands import demo
from tests.commands.test_up import UpPlace, descendants_of, is_running, needs_service
from tests.support.live import cpu_s, stat_fields, wait_for
from tests.support.targets import running

SERVICES = {("shop", "1.4.0"), ("shop", "1.5.0"), ("search", "2026.1"), ("report", "7.2")}

PARENT = """
import subprocess, sys
from profiler.commands import demo
subprocess.run(demo.command(sys.argv[1]))
"""


@pytest.fixture
def parent() -> Iterator[subprocess.Popen[bytes]]:
    user = "nobody" if os.geteuid() == 0 else ""
    with running(sys.executable, "-c", PARENT, user, start_new_session=True) as process:
        wait_for(lambda: len(programs_of(process.pid)) == 4)
        yield process


def programs_of(pid: int) -> dict[str, int]:
    """Return the four programs by their script, once each runs what it is for."""
    found = {}
    for child in descendants_of(pid):
        try:
            arguments = Path(f"/proc/{child}/cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if len(arguments) > 1 and arguments[1].endswith(("shop.py", "search.py", "report.pl")):
            found[arguments[1].partition("everflame-demo-")[2].partition("/")[2]] = child
    return found


def test_each_program_takes_a_bounded_share_and_is_nice(parent) -> None:
    """At most 60 % of one CPU for each service, its versions together, however busy the host is."""
    programs = programs_of(parent.pid)
    begun_s, before = time.monotonic(), {name: cpu_s(pid) for name, pid in programs.items()}
    time.sleep(2)  # what is measured is a rate
    wait_for(lambda: all(cpu_s(pid) > before[name] for name, pid in programs.items()))
    passed_s = time.monotonic() - begun_s

    used: dict[str, float] = {}
    for name, pid in programs.items():
        service = name.partition("/")[0]
        used[service] = used.get(service, 0) + (cpu_s(pid) - before[name]) / passed_s
    assert used.keys() == {"shop", "search", "report"}
    assert all(0 < share < 0.6 for share in used.values())
    assert all(int(stat_fields(pid)[16]) == 10 for pid in programs.values())


@pytest.mark.kernel
def test_started_by_root_it_is_not_root(parent) -> None:
    nobody = pwd.getpwnam("nobody").pw_uid

    assert {Path(f"/proc/{pid}").stat().st_uid for pid in programs_of(parent.pid).values()} == {
        nobody
    }


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_all_end_with_the_parent(parent, number) -> None:
    """And the folder that they lay in is gone."""
    processes = descendants_of(parent.pid)
    shop = programs_of(parent.pid)["shop/releases/1.4.0/shop.py"]
    script = Path(Path(f"/proc/{shop}/cmdline").read_bytes().decode().split("\0")[1])
    assert script.exists()

    parent.send_signal(number)
    parent.wait()

    assert len(processes) == 5
    wait_for(lambda: not any(map(is_running, processes)))
    assert not script.parents[3].exists()


def test_no_parent_no_demo() -> None:
    """It may have died before the kernel was asked to tell."""
    command = [*demo.command("nobody" if os.geteuid() == 0 else "")[:-1], "--parent=1"]

    assert subprocess.run(command, check=False, timeout=10).returncode == 0


def test_both_versions_of_the_shop_give_the_same_prices() -> None:
    """They differ in time alone."""
    prices = {"tea": 300, "cake": 450}

    for article in prices:
        assert demo.price_by_search(prices, article) == demo.price_by_key(prices, article)
    assert demo.render_receipt(["tea", "cake", "tea"], 1050) == "1 x cake\n2 x tea\ntotal 10.50"


def test_the_best_documents_come_first() -> None:
    documents = [demo.Counter("aab"), demo.Counter("xyz"), demo.Counter("aaa")]

    assert demo.rank(documents, ["a"]) == [2, 0, 1]


@needs_service
@pytest.mark.kernel
def test_labels_tell_the_services_and_their_versions_apart(tmp_path) -> None:
    place = UpPlace(tmp_path)
    with place.start("--demo", "--for", "8s") as process:
        wait_for(lambda: len(programs_of(process.pid)) == 4)
        descendants = descendants_of(process.pid)
        assert process.wait(60) == 0

    labels = [dict(row.labels) for profile in place.objects().values() for row in profile.rows()]
    assert {(each["service"], each.get("version", "")) for each in labels} >= SERVICES
    wait_for(lambda: not any(map(is_running, descendants)))
