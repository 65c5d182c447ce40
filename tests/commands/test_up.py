"""`everflame up`: three processes that begin and end together, and the first minute."""

import contextlib
import importlib.util
import os
import pwd
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from profiler.agent.agent import AgentOptions, kept_arguments, uploader_command
from profiler.agent.supervise import RefusedError
from profiler.agent.window import Edges
from profiler.commands.up import (
    ServiceAndDemo,
    compaction_command,
    directions,
    free_address,
    hand_over,
    service_environment,
    service_user,
)
from profiler.processes.rules import Rules
from storage.profile import Accounting, Profile, ProfileBuilder, Window
from tests.agent.test_agent import EVERFLAME, SECOND, Clocks, Place
from tests.support.live import wait_for
from tests.support.services import Client
from tests.support.targets import running

ROOT = Path(__file__).parents[2]

needs_service = pytest.mark.skipif(
    importlib.util.find_spec("profiler.commands.serve") is None,
    reason="there is no profiler.commands.serve yet",
)


class UpPlace(Place):
    """Folders of an `up` that disturbs no other, and what it says."""

    @property
    def environment(self) -> dict[str, str]:
        return super().environment | {"EVERFLAME_CACHE": str(self.root / "cache")}

    @property
    def talk(self) -> str:
        return (self.root / "talk").read_text()

    def arguments(self, *arguments: str) -> list[str]:
        folders = [f"--store={self.root / 'store'}", f"--spool={self.root / 'spool'}"]
        return ["up", "--interval=5s", "--listen=127.0.0.1:0", *folders, *arguments]

    @contextlib.contextmanager
    def start(self, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
        command = [EVERFLAME, *self.arguments(*arguments)]
        with (
            (self.root / "talk").open("wb") as talk,
            running(*command, env=self.environment, stderr=talk) as process,
        ):
            yield process

    def wait_for_page(self) -> None:
        wait_for(lambda: "http://" in self.talk)


@pytest.fixture
def place(tmp_path) -> UpPlace:
    return UpPlace(tmp_path)


@pytest.fixture
def up(place) -> Iterator[subprocess.Popen[bytes]]:
    with place.start() as process:
        place.wait_for_page()
        wait_for(lambda: place.status().get("uploader", {}).get("pid"))
        started = descendants_of(process.pid)
        yield process
        process.terminate()
        process.wait(60)
        for pid in filter(is_running, started):  # of a test that has killed it
            os.kill(pid, signal.SIGKILL)


def children_of(pid: int) -> dict[str, int]:
    """Return the children of `up` by what they are."""
    names = {
        "profiler.agent.uploader": "uploader",
        "profiler.commands.serve": "service",
        "profiler.service.compaction": "compactor",
        "demo.py": "demo",
    }
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_bytes().rpartition(b")")[2].split()[1])
            command = (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        # Helpers as c++filt come and go.
        if parent == pid and (name := next((names[each] for each in names if each in command), "")):
            found[name] = int(folder.name)
    return found


def descendants_of(pid: int) -> set[int]:
    found: set[int] = set()
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found |= {int(child) for child in path.read_text().split()}
    return found.union(*(descendants_of(child) for child in found))


def commands_below(pid: int) -> list[str]:
    commands = []
    for each in descendants_of(pid):
        with contextlib.suppress(OSError):
            commands.append(Path(f"/proc/{each}/cmdline").read_bytes().decode())
    return commands


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except OSError:
        return False


def processes_of(place: UpPlace) -> list[str]:
    """Return the command lines that have this place's folders in them."""
    commands = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            commands.append(path.read_bytes().replace(b"\0", b" ").decode())
    return [each for each in commands if f"{place.root}/" in each and "profiler." in each]


def refusal(place: UpPlace, *arguments: str) -> str:
    """Return the one line with which it refuses."""
    result = place.run(*place.arguments(*arguments))
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


@needs_service
@pytest.mark.kernel
def test_a_run_ends_by_itself_and_tells_what_it_stored(place) -> None:
    with place.start("--for", "12s") as process:
        wait_for(place.objects)
        children, descendants = children_of(process.pid), descendants_of(process.pid)
        assert process.wait(60) == 0
        assert not any(map(is_running, children.values()))

    objects = place.objects()
    talk = place.talk
    assert all(profile.accounting.mismatch == 0 for profile in objects.values())
    ticks = sum(profile.accounting.ticks for profile in objects.values())
    assert f"stored {len(objects)} windows" in talk
    assert f"{ticks:,} ticks = " in talk
    assert re.search(r"the sampler took \d+\.\d% of one CPU", talk)
    assert "kept 2 days or 5 GB" in talk
    assert "export it:" in talk
    wait_for(lambda: not any(map(is_running, descendants)))


def responds(place: UpPlace) -> bool:
    (url,) = re.findall(r"http://[\d.]+:\d+", place.talk)
    try:
        return Client(url).get("/healthz")[0] == 200
    except OSError:
        return False


def is_confined(pid: int) -> bool:
    """Return whether a process has become the command that its launcher starts."""
    with contextlib.suppress(OSError):
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        return b"profiler.service.confine" not in command and b"compaction" in command
    return False


def check_rights(up: int, children: dict[str, int]) -> None:
    """The one that answers strangers is nobody, has one capability and can get no other.

    The one that compacts root's store is root, and has no capability at all.
    """
    service, compactor = status_of(children["service"]), status_of(children["compactor"])
    assert children.keys() == {"uploader", "service", "compactor"}
    assert set(compactor["Uid"].split()) == {"0"}
    assert {int(compactor[name], 16) for name in ("CapInh", "CapPrm", "CapEff")} == {0}
    assert compactor["NoNewPrivs"] == "1"
    assert set(service["Uid"].split()) == {str(pwd.getpwnam(service_user()).pw_uid)}
    assert service["Groups"] == ""
    assert {int(service[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd")} == {1 << 2}
    assert service["NoNewPrivs"] == "1"
    assert status_of(up)["Uid"].split()[0] == "0"
    assert status_of(children["uploader"])["Uid"].split()[0] == "0"


@needs_service
@pytest.mark.kernel
def test_children_that_are_killed_are_started_again_with_the_same_rights(up, place) -> None:
    """The service may only read, the first one as well as those after it."""
    wait_for(lambda: is_confined(children_of(up.pid).get("compactor", up.pid)))
    first = children_of(up.pid)
    check_rights(up.pid, first)

    for pid in first.values():
        os.kill(pid, signal.SIGKILL)

    wait_for(lambda: len(children_of(up.pid).keys() & first.keys()) == 3)
    wait_for(lambda: place.status().get("service", {}).get("starts") == 2)
    wait_for(lambda: responds(place))  # by then it has given up its rights
    wait_for(lambda: is_confined(children_of(up.pid)["compactor"]))
    second = children_of(up.pid)
    assert not set(first.values()) & set(second.values())
    check_rights(up.pid, second)


@needs_service
@pytest.mark.kernel
def test_a_second_one_is_refused_and_all_children_end_when_the_first_is_killed(up, place) -> None:
    """Also what they have started. The refusal is one line, and changes nothing."""
    children, descendants = children_of(up.pid), descendants_of(up.pid)

    line = refusal(place)

    assert f"an agent runs on this host already (pid {up.pid};" in line
    assert children_of(up.pid) == children

    up.kill()
    up.wait()

    assert children.keys() == {"uploader", "service", "compactor"}
    assert descendants > set(children.values())
    wait_for(lambda: not any(map(is_running, descendants)))


@needs_service
@pytest.mark.kernel
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_closes_and_stores_the_last_window(number, up, place) -> None:
    wait_for(lambda: place.status().get("ticks", 0) > 0)
    children, descendants = children_of(up.pid), descendants_of(up.pid)

    up.send_signal(number)

    assert up.wait(60) == 0
    assert "sampling at 99 Hz, one object every 5 s into " in place.talk
    assert place.talk.count("http://") == 1  # the address is told once
    assert not any(map(is_running, children.values()))
    wait_for(lambda: not any(map(is_running, descendants)))
    assert not list((place.root / "spool" / "waiting").iterdir())
    assert sum(each.accounting.ticks for each in place.objects().values()) > 0


@needs_service
@pytest.mark.kernel
def test_a_ctrl_c_while_it_starts_ends_it_as_later(place) -> None:
    """It reaches all processes of the terminal, and the one that compiles would die of it."""
    command = [EVERFLAME, *place.arguments()]
    with (
        (place.root / "talk").open("wb") as talk,
        running(*command, env=place.environment, stderr=talk, process_group=0) as process,
    ):
        wait_for(lambda: any("bpf.compile" in each for each in commands_below(process.pid)))
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 0

    assert "Traceback" not in place.talk
    assert "stored " in place.talk


@pytest.mark.kernel
def test_a_taken_port_is_one_line_with_a_remedy(place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refusal(place, f"--listen=127.0.0.1:{port}")

    assert line == (
        f"everflame: cannot listen on 127.0.0.1:{port}: the port is taken"
        f" (choose another one, as with --listen 127.0.0.1:{port + 1})"
    )
    assert list(place.root.iterdir()) == []
    assert not processes_of(place)


@pytest.mark.kernel
def test_a_store_that_cannot_be_written_is_one_line_with_a_remedy(place) -> None:
    (place.root / "file").touch()

    line = refusal(place, f"--store={place.root / 'file' / 'store'}")

    assert line.startswith("everflame: cannot write ")
    assert line.endswith("(use another --store)")
    assert not (place.root / "spool").exists()
    assert not processes_of(place)


@pytest.mark.kernel
@pytest.mark.parametrize("listen", ["0.0.0.0:4040", "[::]:4040", "192.0.2.1:4040"])
def test_an_address_that_is_not_loopback_is_one_line_with_a_remedy(listen, place) -> None:
    line = refusal(place, f"--listen={listen}")

    assert "only loopback is served" in line
    assert "ssh -L 4040:127.0.0.1:4040" in line
    assert list(place.root.iterdir()) == []


@pytest.mark.kernel
def test_a_spool_that_cannot_be_made_is_one_line_with_a_remedy(place) -> None:
    talk = place.run(*place.arguments("--spool=/proc/everflame")).stderr

    assert talk.splitlines()[-1] == (
        "everflame: cannot keep windows in /proc/everflame: No such file or directory"
        " (choose another --spool)"
    )
    assert "Traceback" not in talk
    assert not processes_of(place)


@pytest.mark.parametrize("listen", ["4040", "127.0.0.1:", "127.0.0.1:http", "127.0.0.1:99999"])
def test_what_is_no_address_is_refused(listen, place) -> None:
    line = refusal(place, f"--listen={listen}")

    assert "give HOST:PORT, as 127.0.0.1:4040" in line


def test_a_port_of_zero_becomes_a_free_one() -> None:
    host, port = free_address("[::1]:0")

    assert host == "::1"
    assert port > 1023


def test_who_came_by_ssh_is_told_how_to_see_the_page() -> None:
    connection = {"SSH_CONNECTION": "192.0.2.9 50000 192.0.2.1 22", "SUDO_USER": "dev"}
    lines = directions("127.0.0.1", 4040, connection)

    assert "ssh -L 4040:127.0.0.1:4040 dev@192.0.2.1" in "\n".join(lines)
    other = connection | {"SSH_CONNECTION": "192.0.2.9 50000 192.0.2.1 2222"}
    assert "-p 2222 dev@192.0.2.1" in "\n".join(directions("127.0.0.1", 4040, other))
    assert len(directions("127.0.0.1", 4040, {})) == 1


@pytest.mark.parametrize(("busy", "is_told"), [(0.03, True), (0.2, False)])
def test_an_idle_machine_is_told_so_once(busy, is_told, tmp_path, capsys) -> None:
    """By the windows after the first one, in which everything here starts."""
    options = agent_options(tmp_path)
    children = ServiceAndDemo(options, ("127.0.0.1", 4040), has_demo=False)

    for share in (0.9, busy, busy, 0.0):
        children.note(window(nonidle_ns=round(2 * 5 * SECOND * share)))

    told = "this machine is 97% idle" in (talk := capsys.readouterr().err)
    assert told == is_told
    assert talk.count("./quickstart --demo") == is_told


def window(nonidle_ns: int) -> Profile:
    accounting = Accounting(cpus=2, profiled_ns=5 * SECOND, nonidle_ns=nonidle_ns)
    return ProfileBuilder(10).build(Window(0, 5 * SECOND), accounting)


def agent_options(folder: Path) -> AgentOptions:
    return AgentOptions(
        frequency_hz=99,
        hardware=False,
        interval_s=60,
        duration_s=20,
        spool=folder / "spool",
        spool_limit_bytes=1_000_000,
        tables_limit_bytes=48_000_000,
        run_folder=folder / "run",
        store=str(folder / "store"),
        endpoint="",
        keep_s=None,
        keep_bytes=None,
        metrics_listen="",
        rules=Rules(),
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a folder away")
def test_a_link_in_the_place_of_the_cache_is_not_handed_over(tmp_path) -> None:
    """What it leads to stays as it is; a folder becomes the service's alone."""
    nobody = pwd.getpwnam("nobody")
    precious, cache = tmp_path / "precious", tmp_path / "cache"
    precious.mkdir(mode=0o755)
    (tmp_path / "link").symlink_to(precious)
    cache.mkdir(mode=0o755)

    hand_over(cache, nobody)
    with pytest.raises(RefusedError, match="it is a link"):
        hand_over(tmp_path / "link", nobody)

    assert (cache.stat().st_uid, cache.stat().st_mode & 0o777) == (nobody.pw_uid, 0o700)
    assert (precious.stat().st_uid, precious.stat().st_mode & 0o777) == (0, 0o755)


def test_less_than_a_second_is_not_for_ever(tmp_path) -> None:
    """The uploader and the service take 0 s for no limit at all."""
    options = replace(agent_options(tmp_path), keep_s=0.5)

    assert kept_arguments(options) == ["--keep-s=1", "--keep-bytes=5000000000"]


def test_a_time_to_keep_is_also_that_of_what_is_compacted(tmp_path: Path) -> None:
    """If it was asked for; else it is the compactor's. In a bucket nothing is deleted."""
    usual = agent_options(tmp_path)
    for options, arguments in (
        (usual, []),
        (replace(usual, keep_s=3600.5), ["--keep-compacted-s=3601"]),
        (replace(usual, keep_s=3600.5, store="s3://profiles"), []),
    ):
        found = [each for each in uploader_command(options) if "compacted" in each]
        assert found == arguments


def test_secrets_of_the_environment_stay_with_the_uploader(tmp_path, monkeypatch) -> None:
    """A bucket's keys are the service's too; without a bucket it gets none."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("DATABASE_PASSWORD", "secret")
    options = agent_options(tmp_path)
    bucket = replace(options, store="s3://profiles/prod")

    assert "secret" not in service_environment(options, tmp_path).values()
    assert service_environment(bucket, tmp_path)["AWS_SECRET_ACCESS_KEY"] == "secret"
    assert "DATABASE_PASSWORD" not in service_environment(bucket, tmp_path)


def test_a_time_to_keep_is_that_of_every_level(tmp_path) -> None:
    """Who asks for seven days wants nothing that is older, in whatever detail."""
    usual = agent_options(tmp_path)

    command = compaction_command(replace(usual, keep_s=604800.0), tmp_path, is_root=False)

    kept = [each for each in command if each.startswith("--keep=")]
    levels = ("detail", "10m", "1h", "1d")
    assert kept == [",".join(["--keep=level0=172800s", *(f"{each}=604800s" for each in levels)])]
    assert not any("--keep" in each for each in compaction_command(usual, tmp_path, is_root=False))


CONFINED = """
import os, sys
store, cache = sys.argv[1:]
for path in (store + "/object", "/etc/shadow", "/root"):
    try:
        os.listdir(path) if path == "/root" else open(path).read()
        print("read", path)
    except OSError:
        pass
for path in (store + "/object", store + "/new", cache + "/new", "/tmp/everflame-confined"):
    try:
        open(path, "a").write("x")
        print("wrote", path)
    except OSError:
        pass
"""


@pytest.mark.kernel
def test_what_is_confined_reads_the_store_and_writes_its_cache(tmp_path) -> None:
    """Neither other files of root's, although it may pass by their modes, nor /tmp."""
    store, cache = tmp_path / "store", tmp_path / "cache"
    for folder in (store, cache):
        folder.mkdir(mode=0o700)
    (store / "object").write_text("content")
    (store / "object").chmod(0o600)
    os.chown(cache, pwd.getpwnam("nobody").pw_uid, -1)
    confine = [
        sys.executable,
        "-m",
        "profiler.service.confine",
        f"--parent={os.getpid()}",
        "--user=nobody",
    ]
    folders = [f"--read={store}", f"--write={cache}"]
    program = [sys.executable, "-c", CONFINED, str(store), str(cache)]

    child = subprocess.run(
        [*confine, *folders, "--", *program], check=False, capture_output=True, text=True
    )

    if "no Landlock" in child.stderr:
        pytest.skip("this kernel has no Landlock")
    assert child.stdout.splitlines() == [f"read {store}/object", f"wrote {cache}/new"]


@needs_service
@pytest.mark.kernel
def test_quickstart_sets_up_and_runs_it(place) -> None:
    """The main job of a new user's first minute: it ends by itself and says what it has stored."""
    if not (ROOT / ".venv" / "made-for").exists():
        pytest.skip("no .venv that check made: run ./check")
    arguments = place.arguments("--for", "6s")[1:]

    child = subprocess.run(
        [ROOT / "quickstart", *arguments],
        check=False,
        env=place.environment,
        capture_output=True,
        text=True,
        timeout=100,
    )

    assert child.returncode == 0
    assert f"in {place.root / 'store'}" in child.stderr
    assert len(place.objects()) >= 1


def windows_of(edges: Edges, clocks: Clocks, until_s: float) -> list[float]:
    """Return when windows end, in seconds of the wall clock's minute, for so long."""
    ends = []
    while clocks.passed_ns < until_s * SECOND:
        clocks.passed_ns = round(edges.edge_monotonic_s * SECOND)
        ends.append(edges.edge_ns / SECOND % 3600)
        edges.begin()
    return ends


def test_windows_of_the_first_minute_are_short_and_aligned() -> None:
    clocks = Clocks(1_795_258_800 * SECOND + 3 * SECOND)
    edges = Edges(60, clocks.wall_ns, clocks.monotonic_ns, first_interval_s=5)

    assert windows_of(edges, clocks, 200) == [*range(5, 70, 5), 120, 180, 240]


def test_short_windows_do_not_straddle_the_edges_of_long_ones() -> None:
    """7 s is no multiple of 5 s: windows end at multiples of both."""
    clocks = Clocks(0)
    edges = Edges(7, clocks.wall_ns, clocks.monotonic_ns, first_interval_s=5)

    ends = windows_of(edges, clocks, 100)

    assert ends[:8] == [5, 7, 10, 14, 15, 20, 21, 25]
    assert all(end % 7 == 0 for end in ends if end > 65)
