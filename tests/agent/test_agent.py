"""`everflame agent` as a service runs it: windows, the lock, the status, signals, and the clock."""

import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson
import pytest

from profiler.agent.agent import BpfCost, WholeCost
from profiler.agent.status import NoAgentError, ask
from profiler.agent.window import Edges
from storage.formats import pprof
from storage.objects.keys import ObjectKey
from storage.profile import Accounting, Profile
from tests.support.live import stat_fields, wait_for
from tests.support.targets import compile_target, running

EVERFLAME = Path(sys.executable).with_name("everflame")
SECOND = 1_000_000_000
SKIPPED = {"draining", "other_tracer"}
"""Ticks that the kernel skips while anybody reads BPF maps, as other tests do."""
POLL_OR_ITS_RESTART = ("7", "219")


@dataclass
class Place:
    """Folders of an agent that disturbs no other."""

    root: Path

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "EVERFLAME_RUN": str(self.root / "run")}

    def command(self, *arguments: str) -> list[str]:
        folders = [f"--store={self.root / 'store'}", f"--spool={self.root / 'spool'}"]
        return [str(EVERFLAME), "agent", "--interval=5s", *folders, *arguments]

    def preferred(self, command: Sequence[str]) -> list[str]:
        """Return a command that gets a CPU at once, however many other tests run.

        A window that closes 2 s late does not end at its edge, as it should there.
        """
        return ["nice", "-n", "-15", *command]

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [EVERFLAME, *arguments],
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
            env=self.environment,
        )

    def status(self) -> dict:
        """Ask as the command does, without a process for each time that a test looks.

        An agent that is busy or waits for a CPU is asked again.
        """
        deadline = time.monotonic() + 60
        while True:
            try:
                return ask(self.root / "run")
            except NoAgentError as error:
                if "no agent runs" in str(error) or time.monotonic() > deadline:
                    return {}

    def objects(self) -> dict[ObjectKey, Profile]:
        found = {}
        for path in sorted((self.root / "store").rglob("*.pb.gz")):
            key = ObjectKey.parse(str(path.relative_to(self.root / "store")))
            assert key is not None, path
            found[key] = pprof.decode(path.read_bytes())
        return found


@pytest.fixture
def place(tmp_path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def agent(place) -> Iterator[subprocess.Popen[bytes]]:
    command = place.preferred(place.command())
    with running(*command, env=place.environment, stderr=subprocess.PIPE) as process:
        wait_for(lambda: place.status().get("ticks", 0) > 0)
        yield process


@pytest.mark.kernel
def test_windows_are_aligned_and_every_tick_is_in_one(agent, place) -> None:
    """Two closed windows and the rest at SIGTERM: no gap, no overlap, law 1, nothing waiting."""
    wait_for(lambda: place.status().get("windows", 0) >= 2)
    agent.send_signal(signal.SIGTERM)
    agent.communicate(timeout=60)

    objects = place.objects()
    windows = sorted(profile.window for profile in objects.values())
    assert agent.returncode == 0
    assert len(windows) >= 3
    assert all(window.start_ns % (5 * SECOND) == 0 for window in windows[1:])
    assert all(a.end_ns == b.start_ns for a, b in itertools.pairwise(windows))
    assert all(profile.accounting.mismatch == 0 for profile in objects.values())
    assert all(key.start_ns // SECOND == p.window.start_ns // SECOND for key, p in objects.items())
    assert not list((place.root / "spool" / "waiting").iterdir())


@pytest.mark.kernel
def test_a_second_agent_of_the_host_says_so_in_one_line(agent, place) -> None:
    result = place.run(*place.command()[1:])

    assert result.returncode == 2
    last = result.stderr.splitlines()[-1]
    assert f"an agent runs on this host already (pid {agent.pid};" in last


@pytest.mark.kernel
def test_status_tells_what_the_agent_does_and_costs(agent, place) -> None:
    wait_for(lambda: place.run("status", "--json").returncode == 0)
    status = orjson.loads(place.run("status", "--json").stdout)

    lost = sum(status["lost"].values())
    assert status["ticks"] == status["stored"] + status["idle"] + status["filtered"] + lost
    assert {"drain", "processes", "symbolize", "fold", "sampler"} <= status["cpu_ns"].keys()
    assert 10e6 < status["sampler"]["rss_bytes"] < 100e6
    text = place.run("status").stdout
    assert f"pid {agent.pid}" in text
    assert "stored" in text


@pytest.mark.kernel
def test_who_waits_is_told_when_sampling_begins_and_a_hangup_stores_the_window(place) -> None:
    """Told on a descriptor, in the log and on the socket of the service manager."""
    reads, writes = os.pipe()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, os.fdopen(reads) as ready:
        manager.bind(str(place.root / "notify"))
        manager.settimeout(60)
        environment = place.environment | {"NOTIFY_SOCKET": str(place.root / "notify")}
        command = place.command(f"--ready-fd={writes}")
        with running(
            *command, env=environment, stderr=subprocess.PIPE, pass_fds=[writes]
        ) as process:
            os.close(writes)
            told = ready.read()
            wait_for(lambda: place.status().get("ticks", 0) > 0)
            process.send_signal(signal.SIGHUP)
            _, talk = process.communicate(timeout=60)
        assert manager.recv(100) == b"READY=1"

    assert told == "ready\n"
    assert b"everflame: sampling at 99 Hz, one object every 5 s into " in talk
    assert process.returncode == 0
    assert sum(each.accounting.ticks for each in place.objects().values()) > 0


@pytest.mark.kernel
def test_windows_account_for_sampler_bpf_and_uploader(agent, place) -> None:
    """What the page shows as the agent's cost is the sum of all parts, none left out."""
    wait_for(lambda: place.status().get("uploader", {}).get("uploaded"))
    # A first window that ended at once had no tick to measure BPF with.
    wait_for(lambda: place.status().get("cpu_ns", {}).get("bpf"))
    status = place.status()
    agent.send_signal(signal.SIGTERM)
    agent.communicate(timeout=60)

    counts = [profile.accounting for profile in place.objects().values()]
    parts = status["cpu_ns"]["sampler"], status["cpu_ns"]["bpf"], status["uploader"]["cpu_ns"]
    sampler_ns, *others_ns = parts
    assert all(parts)
    # The status counts what comes before the first window, too.
    assert sum(each.agent_cpu_ns for each in counts) > (sampler_ns + sum(others_ns)) / 2
    resident = status["sampler"]["rss_bytes"] + status["uploader"]["rss_bytes"]
    assert max(each.agent_rss_bytes for each in counts) > 0.8 * resident


def test_the_run_time_of_bpf_never_falls() -> None:
    """Each tick costs what was measured last; those before the first measurement are not free."""
    cost = BpfCost(None)

    totals = [cost.charge(10)]
    for ns_per_tick, ticks in ((5.0, 10), (5.0, 20), (1.0, 20), (1.0, 30), (3.0, 25), (0.5, 31)):
        cost.ns_per_tick = ns_per_tick
        totals.append(cost.charge(ticks))

    assert totals == [0, 50, 100, 100, 110, 110, round(110.5)]


@pytest.mark.kernel
def test_what_a_full_spool_dropped_is_not_stored(place) -> None:
    """The status says it is lost, as the tombstones do, and counts every tick once."""
    command = place.command("--spool-limit=20kB")
    away = ["--store=s3://away", "--s3-endpoint=http://127.0.0.1:1"]
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    with running(*command, *away, env={**place.environment, **keys}, stderr=subprocess.PIPE):
        wait_for(lambda: place.status().get("spool", {}).get("lost_samples", 0) > 0, 60)
        status = place.status()

    lost = status["lost"]
    assert lost["spool_full"] == status["spool"]["lost_samples"]
    whole = status["stored"] + status["idle"] + status["filtered"] + sum(lost.values())
    assert status["ticks"] == whole


def test_a_window_costs_what_sampler_bpf_and_uploader_took() -> None:
    """The uploader's since the last window; a new one begins at zero, an old one is not counted."""
    cost = WholeCost({"pid": 6, "cpu_ns": 9_000, "rss_bytes": 10})
    window = Accounting(ticks=100, agent_cpu_ns=50_000, agent_rss_bytes=30)
    states = [
        {"pid": 6, "cpu_ns": 9_000, "rss_bytes": 10},  # not yet written by ours
        {"pid": 7, "cpu_ns": 600, "rss_bytes": 20},
        {"pid": 7, "cpu_ns": 650, "rss_bytes": 21},
        {"pid": 8, "cpu_ns": 700, "rss_bytes": 22},
        {},
        {"pid": 8, "cpu_ns": 720, "rss_bytes": 22},
    ]

    found = [cost.complete(window, 2.5, state) for state in states]

    assert [each.agent_cpu_ns - 50_000 - 250 for each in found] == [0, 600, 50, 700, 0, 20]
    assert [each.agent_rss_bytes - 30 for each in found] == [10, 20, 21, 22, 0, 22]


@pytest.mark.kernel
def test_the_sampler_imports_no_client_no_compiler_no_parser_and_no_server(agent) -> None:
    """Neither boto3 nor bcc, LLVM or a web server is mapped into it; it reads no ELF files."""
    maps = Path(f"/proc/{agent.pid}/maps").read_text()
    script = (
        "import sys, profiler.agent.agent, profiler.agent.recorder\n"
        "import storage.spool.spool, storage.formats.pprof\n"
        "unwanted = {'bcc', 'boto3', 'botocore', 'duckdb', 'starlette', 'ssl', 'elftools'}\n"
        "unwanted |= {'symbolizer.symbols.elf', 'symbolizer.symbols.demangle'}\n"
        "print(unwanted & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)

    assert not re.search(r"LLVM|_ssl|libssl", maps)
    assert found.stdout == b"set()\n"


@pytest.mark.kernel
def test_an_uploader_that_was_killed_is_started_again(agent, place) -> None:
    first = place.status()["uploader"]["pid"]

    os.kill(first, signal.SIGKILL)

    wait_for(lambda: place.status().get("uploader", {}).get("starts") == 2)
    wait_for(lambda: place.status().get("windows", 0) >= 1)
    wait_for(lambda: len(place.objects()) >= 1)


@pytest.mark.kernel
def test_a_killed_agent_leaves_its_closed_windows_to_the_next(agent, place) -> None:
    """SIGKILL to both: what was closed is stored once, by the next agent at the latest."""
    wait_for(lambda: place.status().get("windows", 0) >= 1)
    status = place.status()
    agent.kill()
    agent.wait()
    wait_for(lambda: not Path(f"/proc/{status['uploader']['pid']}").exists())

    with running(*place.command("--for", "1s"), env=place.environment) as second:
        assert second.wait(60) == 0

    objects = place.objects()
    assert len({key.host_id for key in objects}) == 1
    assert len({profile.window for profile in objects.values()}) == len(objects)
    assert len(objects) >= status["windows"] + 1


@pytest.mark.kernel
def test_metrics_are_served_from_loopback(place) -> None:
    """Prometheus reads them; every line is a comment or a name, labels and a number."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = place.command(f"--metrics-listen=127.0.0.1:{port}")
    with running(*command, env=place.environment):
        wait_for(lambda: b'cpu_seconds_total{part="drain"}' in fetch(port, "/metrics"))

        lines = fetch(port, "/metrics").decode().splitlines()

    sample = re.compile(r'# TYPE .*|everflame_[a-z_]+(\{[a-z]+="[a-z_]+"\})? -?[0-9.e+-]+')
    assert [line for line in lines if not sample.fullmatch(line)] == []
    assert any(line.startswith("everflame_ticks_total ") for line in lines)
    assert any(line.startswith('everflame_perf_map{figure="asked"} ') for line in lines)


def fetch(port: int, path: str) -> bytes:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return answer.read()
    except OSError:
        return b""


@pytest.mark.kernel
def test_the_profiler_and_what_it_profiles_have_labels(place, tmp_path) -> None:
    """A service that runs, sampled or not, has its present_ns; the agent is service everflame."""
    split = compile_target("split.c", tmp_path / "split")
    with running(split, "60"), running("sleep", "60", env={"SERVICE_VERSION": "1.2.3"}):
        subprocess.run(place.command("--for", "7s"), check=True, env=place.environment)

    present: dict[str, int] = {}
    versions: dict[str, set[str]] = {}
    services: set[str] = set()
    for profile in place.objects().values():
        for labels, present_ns in profile.accounting.services.items():
            named = dict(labels)
            present[named["service"]] = present.get(named["service"], 0) + present_ns
            versions.setdefault(named["service"], set()).add(named.get("version", ""))
        services |= {dict(row.labels).get("service", "") for row in profile.rows()}
    assert {"split", "everflame"} <= services
    assert "1.2.3" in versions["sleep"]
    assert present["split"] > 5 * SECOND
    assert present["sleep"] > 5 * SECOND


STEPPED = """
import sys, time
from pathlib import Path
real_ns, offset = time.time_ns, Path(sys.argv.pop(1))
time.time_ns = lambda: real_ns() + int(offset.read_text()) * 1_000_000_000
from profiler.cli import main
sys.exit(main())
"""


@pytest.mark.kernel
def test_a_clock_that_steps_by_an_hour_loses_no_tick(place) -> None:
    """Forwards, then back: each window closes at once, and has the length that really passed."""
    offset = place.root / "offset"

    def set_clock(to_s: int) -> None:
        offset.with_suffix(".new").write_text(str(to_s))
        offset.with_suffix(".new").rename(offset)

    set_clock(0)
    program = [sys.executable, "-c", STEPPED, str(offset), *place.command()[1:]]
    command = place.preferred(program)
    with running(*command, env=place.environment, stderr=subprocess.DEVNULL) as agent:
        wait_for(lambda: place.status().get("ticks", 0) > 0)
        for to_s in (3600, 0):
            closed = place.status().get("windows", 0)
            set_clock(to_s)
            # The first may have been closed at its own edge, the second was opened at the new time.
            wait_for(lambda at=closed: place.status().get("windows", 0) > at + 1)
        last = place.status()
        agent.terminate()
        assert agent.wait(60) == 0

    profiles = sorted(place.objects().values(), key=lambda profile: profile.window)
    counts = [profile.accounting for profile in profiles]
    starts_s = [profile.window.start_ns // SECOND for profile in profiles]
    assert len(profiles) >= 3
    assert sum(abs(start_s - starts_s[0] - 3600) < 60 for start_s in starts_s) >= 1
    assert all(0 < p.window.end_ns - p.window.start_ns <= 6 * SECOND for p in profiles)
    assert all(each.mismatch == 0 and set(each.lost) <= SKIPPED for each in counts)
    assert sum(each.ticks for each in counts) >= last["ticks"]
    assert last["faults"] == 0


FAULTY = """
import sys
name, sys.argv[1:2] = sys.argv[1], []
from bpf.sampler import Sampler
from profiler.agent import agent
from profiler.agent.pipeline import Pipeline
from profiler.agent.recorder import Recorder
from profiler.agent.status import StatusSocket
from storage.spool.spool import Spool

def fail(*_):
    raise RuntimeError("as broken as can be")

def fail_once(add):
    def add_second(self, profile):
        Spool.add = add
        fail()
    return add_second

def fail_every_third(drain):
    calls = []
    def drain_some(self, generation):
        calls.append(1)
        taken = drain(self, generation)
        return fail() if len(calls) % 3 == 0 else taken
    return drain_some

if name == "processes":
    Recorder.catch_up = fail
elif name == "status":
    StatusSocket.answer = fail
elif name == "drain":
    Sampler.drain = fail
elif name == "maps":
    Sampler._take_samples = fail_every_third(Sampler._take_samples)
elif name == "spool":
    Spool.add = fail_once(Spool.add)
elif name == "name":
    Pipeline._name = fail
elif name == "pause":
    agent.LONGEST_WINDOW_S = 4
from profiler.cli import main
sys.exit(main())
"""


def faulty(place: Place, what: str, *arguments: str) -> list[str]:
    """Return the command of an agent in which one part fails, in which way `FAULTY` says."""
    return [sys.executable, "-c", FAULTY, what, *place.command(*arguments)[1:]]


@pytest.mark.kernel
@pytest.mark.parametrize("stage", ["processes", "status", "drain"])
def test_a_stage_that_always_fails_neither_spins_nor_stops_the_windows(stage, place) -> None:
    """A descriptor that nobody reads stays readable: the loop must not run for it."""
    command = faulty(place, stage, "--for", "12s")
    with running(*command, env=place.environment, stderr=subprocess.PIPE) as agent:
        if stage == "status":
            with socket.socket(socket.AF_UNIX) as asking:  # waits for an answer all the time
                path = str(place.root / "run" / "agent.sock")
                wait_for(lambda: asking.connect_ex(path) == 0)
                _, talk = agent.communicate(timeout=90)
        else:
            _, talk = agent.communicate(timeout=90)

    assert agent.returncode == 0
    assert 1 <= talk.count(b"Traceback") <= 2
    assert talk.count(b"survived a fault") < 10
    profiles = list(place.objects().values())
    assert len(profiles) >= 2
    assert all(profile.accounting.mismatch == 0 for profile in profiles)


@pytest.mark.kernel
def test_ticks_of_a_drain_that_failed_are_lost_by_fault(place) -> None:
    subprocess.run(faulty(place, "maps", "--for", "8s"), check=True, env=place.environment)

    counts = [profile.accounting for profile in place.objects().values()]
    assert sum(each.lost.get("fault", 0) for each in counts) > 0
    assert all(each.mismatch == 0 for each in counts)


@pytest.mark.kernel
@pytest.mark.parametrize("what", ["spool", "name"])
def test_a_window_that_cannot_be_stored_is_counted_in_the_next(what, place) -> None:
    """Its ticks are lost by a fault, in the next object and in the status."""
    with running(*faulty(place, what), env=place.environment) as agent:
        wait_for(lambda: place.status().get("lost", {}).get("fault", 0) > 0, 60)
        status = place.status()
        if what == "spool":
            wait_for(lambda: place.status().get("windows", 0) >= 1)
        agent.terminate()
        assert agent.wait(60) == 0

    assert status["faults"] >= 1
    assert status["ticks"] == status["stored"] + status["idle"] + status["filtered"] + sum(
        status["lost"].values()
    )
    if what == "spool":
        counts = [profile.accounting for profile in place.objects().values()]
        assert sum(each.lost.get("fault", 0) for each in counts) > 0
        assert all(each.mismatch == 0 for each in counts)


@pytest.mark.kernel
def test_an_agent_that_was_stopped_tells_the_truth_about_its_windows(place) -> None:
    """A pause longer than a window may be (4 s here, an hour in life): parts, each with its ticks.

    No window claims to be shorter than the time its ticks took.
    """
    with running(*place.preferred(faulty(place, "pause")), env=place.environment) as agent:
        wait_for(lambda: place.status().get("ticks", 0) > 0)
        stop_where_it_waits(agent)
        time.sleep(14)  # the pause that is tested
        agent.send_signal(signal.SIGCONT)
        wait_for(lambda: place.status().get("windows", 0) >= 3)
        status = place.status()
        agent.terminate()
        assert agent.wait(60) == 0

    profiles = sorted(place.objects().values(), key=lambda profile: profile.window)
    windows = [profile.window for profile in profiles]
    assert status["faults"] == 0
    assert len(windows) >= 3
    assert windows[-1].end_ns - windows[0].start_ns > 14 * SECOND
    for profile in profiles:
        span_s = (profile.window.end_ns - profile.window.start_ns) / SECOND
        assert span_s <= 5.5  # those that were not cut end at an edge
        most = 1.1 * 99 * (os.cpu_count() or 1) * (span_s + 2)  # by so much an edge may be late
        assert profile.accounting.ticks <= most
        assert profile.accounting.mismatch == 0
    assert all(abs(a.end_ns - b.start_ns) < SECOND // 10 for a, b in itertools.pairwise(windows))


def stop_where_it_waits(process: subprocess.Popen[bytes]) -> None:
    """Stop an agent in poll(2): in a drain, ticks of the pause would get a time before it."""
    deadline = time.monotonic() + 60
    while True:
        process.send_signal(signal.SIGSTOP)
        wait_for(lambda: stat_fields(process.pid)[0] == b"T")
        if Path(f"/proc/{process.pid}/syscall").read_text().split()[0] in POLL_OR_ITS_RESTART:
            return
        assert time.monotonic() < deadline, "it never waits"
        process.send_signal(signal.SIGCONT)
        time.sleep(0.01)


@pytest.mark.kernel
def test_nobody_to_ask_is_one_line(place) -> None:
    result = place.run("status")

    assert result.returncode == 2
    assert "start one with: everflame agent" in result.stderr


class Clocks:
    """A wall clock that can be set, and a monotonic one that cannot."""

    def __init__(self, wall_ns: int) -> None:
        self.offset_ns = wall_ns
        self.passed_ns = 0

    def wall_ns(self) -> int:
        return self.offset_ns + self.passed_ns

    def monotonic_ns(self) -> int:
        return self.passed_ns


@pytest.fixture
def clocks() -> Clocks:
    return Clocks(1_795_258_443 * SECOND)


def test_a_window_ends_at_the_next_multiple_of_the_interval(clocks) -> None:
    edges = Edges(60, clocks.wall_ns, clocks.monotonic_ns)
    assert edges.edge_ns == 1_795_258_500 * SECOND

    clocks.passed_ns = 57 * SECOND - 1
    assert not edges.is_reached
    clocks.passed_ns += 1
    assert edges.is_reached


def test_an_edge_that_is_too_near_is_passed_over(clocks) -> None:
    """A window of milliseconds would be an object for nothing."""
    clocks.offset_ns = 1_795_258_500 * SECOND - 1000
    edges = Edges(60, clocks.wall_ns, clocks.monotonic_ns)

    assert edges.edge_ns == 1_795_258_560 * SECOND


@pytest.mark.parametrize("step_s", [3600, -3600])
def test_a_clock_that_was_set_ends_the_window(step_s, clocks) -> None:
    """Forwards or back: the window closes at once and the next one takes the new time."""
    edges = Edges(60, clocks.wall_ns, clocks.monotonic_ns)
    clocks.passed_ns = 10 * SECOND
    assert not edges.is_stepped

    clocks.offset_ns += step_s * SECOND
    assert edges.is_stepped
    edges.begin()

    assert not edges.is_stepped
    assert edges.edge_ns == (1_795_258_500 + step_s) * SECOND
