"""Labels of samples: real processes in real cgroups, files of runtimes as they write them."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bpf.sampler import Sampler, SamplerConfig
from profiler.processes import instances
from profiler.processes.generations import boottime_ns
from profiler.processes.labels import MAX_CACHED_LABELS, Labeler
from profiler.processes.rules import make_rule
from tests.processes.test_containers import ID, UID, write_docker, write_kubernetes, write_podman
from tests.support.cgroup_trees import CgroupTree, cgroup_tree, outside_of_units
from tests.support.labelers import labeler_reading_at_once, labels_of, labels_of_instance
from tests.support.live import (
    TICK_NS,
    has_execed,
    sample_of,
    start_ns_of,
    started,
    stat_fields,
    wait_for,
)
from tests.support.targets import compile_target

if TYPE_CHECKING:
    from bpf.samples import RawSample
    from storage.profile import Labels

pytestmark = pytest.mark.kernel

PYTHON = Path(sys.executable).resolve()
CLEAN = {"PATH": os.environ["PATH"]}
SECRET = "hunter2-in-the-environment"
UID_ = UID.replace("-", "_")
DOCKER = f"system.slice/docker-{ID}.scope"
POD = f"kubepods.slice/kubepods-pod{UID_}.slice/cri-containerd-{ID}.scope"
SECOND_NS = 1_000_000_000
WITHIN_NS = 3 * SECOND_NS
"""More than any of these tests takes from one line to the next."""


@pytest.fixture
def labeler(tmp_path: Path) -> Iterator[Labeler]:
    """A labeler for which this process is no part of the profiler."""
    with contextlib.closing(
        labeler_reading_at_once(root=tmp_path, own_pid=0, host="node-1")
    ) as labeler:
        yield labeler


@pytest.fixture
def copy_sleep(tmp_path: Path) -> Callable[[str], Path]:
    """Return `sleep` under a name of its own, which no other process of this machine has."""

    def copy(name: str) -> Path:
        path = tmp_path / name
        path.write_bytes(Path("/bin/sleep").read_bytes())
        path.chmod(0o755)
        return path

    return copy


@pytest.fixture(params=["v2", "name=systemd", "pids"])
def tree(request: pytest.FixtureRequest) -> Iterator[CgroupTree]:
    with cgroup_tree(request.param) as tree:
        yield tree


@pytest.fixture(autouse=True, scope="module")
def nowhere() -> Iterator[None]:
    with outside_of_units():
        yield


def service_of(labeler: Labeler, pid: int, **changes: object) -> str:
    return dict(labels_of(labeler, sample_of(pid, **changes)))["service"]


def instance_of(labeler: Labeler, pid: int) -> dict[str, str]:
    return dict(labels_of_instance(labeler, pid, start_ns_of(pid)))


def gone(*command: str | Path) -> int:
    """Return the pid of a process that has ended and was waited for."""
    process = subprocess.Popen(command)
    process.wait()
    return process.pid


def test_thread_and_process_are_labelled(labeler: Labeler, copy_sleep) -> None:
    """comm is the leader's name, thread the thread's, pid the process."""
    with started(copy_sleep("quiet"), "60") as process:
        labels = dict(
            labels_of(labeler, sample_of(process.pid, leader_comm=b"quiet", comm=b"worker"))
        )

    assert labels.pop("version")
    assert labels == {
        "service": "quiet",
        "comm": "quiet",
        "thread": "worker",
        "pid": str(process.pid),
    }


def test_labels_are_sorted_and_the_same_object_every_time(labeler: Labeler, copy_sleep) -> None:
    """They are a key of the profile."""
    with started(copy_sleep("quiet"), "60") as process:
        sample = sample_of(process.pid)

        labels = labels_of(labeler, sample)

        assert labels == tuple(sorted(labels))
        assert labels_of(labeler, sample._replace(samples=3)) == labels


def test_unit_names_the_service(labeler: Labeler, tree: CgroupTree) -> None:
    """In v1 and in v2 a process of a unit is the unit's, whatever it runs."""
    with started("sleep", "60") as process:
        tree.move(process.pid, "system.slice/api.service/workers")

        labels = dict(labels_of(labeler, sample_of(process.pid)))

    assert (labels["service"], labels["unit"]) == ("api", "api.service")


def test_instances_of_a_template_are_one_service(labeler: Labeler) -> None:
    """`worker@1` and `worker@2` differ in the unit."""
    with cgroup_tree("v2") as tree, started("sleep", "60") as process:
        tree.move(process.pid, "system.slice/system-worker.slice/worker@2.service")

        assert instance_of(labeler, process.pid)["service"] == "worker"
        assert instance_of(labeler, process.pid)["unit"] == "worker@2.service"


@pytest.mark.parametrize(
    "path",
    [
        "user.slice/user-1000.slice/session-3.scope",
        "user.slice/user-1000.slice/user@1000.service/init.scope",
        "init.scope",
    ],
)
def test_sessions_are_no_services(labeler: Labeler, copy_sleep, path: str) -> None:
    """What someone runs in a login is called by its program."""
    with cgroup_tree("v2") as tree, started(copy_sleep("quiet"), "60") as process:
        tree.move(process.pid, path)
        instance = instance_of(labeler, process.pid)

    assert instance["service"] == "quiet"
    assert "unit" not in instance


def test_docker_container_names_the_service(
    labeler: Labeler, tree: CgroupTree, tmp_path: Path
) -> None:
    """Docker's own file names the container and its image's tag is the version."""
    write_docker(tmp_path)
    with started("sleep", "60", env=CLEAN) as process:
        tree.move(process.pid, DOCKER)

        instance = instance_of(labeler, process.pid)

    assert instance == {"service": "shop-web-1", "version": "1.4.2", "container": "shop-web-1"}


def test_podman_container_names_the_service(labeler: Labeler, tmp_path: Path) -> None:
    """The same for Podman."""
    write_podman(tmp_path)
    with cgroup_tree("v2") as tree, started("sleep", "60", env=CLEAN) as process:
        tree.move(process.pid, f"machine.slice/libpod-{ID}.scope/container")
        instance = instance_of(labeler, process.pid)

    assert instance == {"service": "web", "version": "1.25", "container": "web"}


def test_pod_names_the_service(labeler: Labeler, tree: CgroupTree, tmp_path: Path) -> None:
    """The workload is the service; pod, namespace and container are further labels."""
    write_kubernetes(tmp_path)
    with started("sleep", "60", env=CLEAN | {"DD_VERSION": "7"}) as process:
        tree.move(process.pid, POD)

        instance = instance_of(labeler, process.pid)

    assert instance == {
        "service": "checkout",
        "version": "7",
        "container": "app",
        "pod": "checkout-7d4b9c6f5d-x2x4z",
        "namespace": "shop",
    }


def test_container_that_nothing_names_keeps_12_digits(labeler: Labeler, tree: CgroupTree) -> None:
    """As its runtime would show it."""
    with started("sleep", "60") as process:
        tree.move(process.pid, DOCKER)

        instance = instance_of(labeler, process.pid)

    assert (instance["service"], instance["container"]) == (ID[:12], ID[:12])


def test_name_that_is_written_later_is_taken_then(labeler: Labeler, tmp_path: Path) -> None:
    """The kubelet links a container's log after the container has started."""
    with cgroup_tree("v2") as tree, started("sleep", "60") as process:
        tree.move(process.pid, POD)
        assert service_of(labeler, process.pid) == ID[:12]

        write_kubernetes(tmp_path)
        labeler.scan()

        assert service_of(labeler, process.pid) == "checkout"


def test_systemd_in_a_container_gives_unit_and_container(labeler: Labeler) -> None:
    """The container is the service, its unit is a label."""
    with cgroup_tree("v2") as tree, started("sleep", "60") as process:
        tree.move(process.pid, f"{DOCKER}/system.slice/nginx.service")
        instance = instance_of(labeler, process.pid)

    assert (instance["service"], instance["unit"]) == (ID[:12], "nginx.service")


def test_rule_comes_before_all(copy_sleep, tmp_path: Path) -> None:
    """The operator knows best. The first rule that matches sets the name."""
    rules = [
        make_rule("no", unit="x.service"),
        make_rule("by-unit", unit="api*.service"),
        make_rule("by-exe", exe=f"{tmp_path}/*"),
        make_rule("by-command", command=r"sleep 6[1-9]\b"),
    ]
    labeler = labeler_reading_at_once(rules, own_pid=0)
    with cgroup_tree("v2") as tree, started(copy_sleep("quiet"), "61") as one:
        assert service_of(labeler, one.pid) == "by-exe"
        with started("sleep", "61") as two, started("sleep", "60") as three:
            tree.move(three.pid, "system.slice/api-1.service")
            assert service_of(labeler, two.pid) == "by-command"
            assert service_of(labeler, three.pid) == "by-unit"
            assert dict(labels_of(labeler, sample_of(three.pid)))["unit"] == "api-1.service"


def test_kernel_threads_are_one_service(labeler: Labeler) -> None:
    """With the kernel's release as the version."""
    kthreadd = sample_of(2, stop="kernel_thread")

    labels = dict(labels_of(labeler, kthreadd))

    assert labels == {
        "service": "[kernel]",
        "version": os.uname().release,
        "comm": "kthreadd",
        "thread": "kthreadd",
        "pid": "2",
    }


def test_paths_of_cgroups_take_a_few_megabytes(labeler: Labeler) -> None:
    """Who may make cgroups can make any number of them, with paths of 4 KB."""
    tracemalloc.start()
    try:
        for number in range(4_096):
            part = b"%06d.scope-%0200d" % (number, number)
            labeler._instances._place(b"0::/" + b"/".join([part] * 18) + b"\n")
        kept_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert kept_bytes < 10 << 20


def test_profiler_and_its_children_are_one_service(copy_sleep) -> None:
    """Except for the commands that it records."""
    with (
        started(copy_sleep("quiet"), "60") as child,
        started(copy_sleep("recorded"), "60") as command,
    ):
        labeler = labeler_reading_at_once(commands={command.pid})
        labeler.scan()

        assert service_of(labeler, os.getpid()) == "everflame"
        assert service_of(labeler, child.pid) == "everflame"
        assert service_of(labeler, command.pid) == "recorded"


def test_version_is_that_of_the_oldest_process_of_a_unit(labeler: Labeler) -> None:
    """Its later processes inherit it, whatever their own environments say."""
    with contextlib.ExitStack() as stack:
        tree = stack.enter_context(cgroup_tree("v2"))
        environments = [CLEAN | {"GIT_SHA": "first"}, CLEAN | {"GIT_SHA": "second"}, CLEAN]
        pids = []
        for environment in environments:
            pids.append(stack.enter_context(started("sleep", "60", env=environment)).pid)
            tree.move(pids[-1], "system.slice/api.service")
            time.sleep(2 * TICK_NS / SECOND_NS)

        labeler.scan()

        assert {instance_of(labeler, pid)["version"] for pid in pids} == {"first"}


def test_older_process_that_is_seen_later_settles_the_version(labeler: Labeler) -> None:
    """A worker may be sampled before its master is known."""
    with (
        cgroup_tree("v2") as tree,
        started("sleep", "60", env=CLEAN | {"GIT_SHA": "old"}) as master,
    ):
        time.sleep(2 * TICK_NS / SECOND_NS)
        with started("sleep", "60", env=CLEAN | {"GIT_SHA": "young"}) as worker:
            for process in (master, worker):
                tree.move(process.pid, "system.slice/api.service")
            assert dict(labels_of(labeler, sample_of(worker.pid)))["version"] == "young"

            labeler.scan()

            assert dict(labels_of(labeler, sample_of(worker.pid)))["version"] == "old"


def test_version_follows_a_restart(labeler: Labeler) -> None:
    """When all processes of a unit have gone the next one is a new instance, scan or not."""
    with cgroup_tree("v2") as tree:
        versions = []
        for sha in ("one", "two"):
            with started("sleep", "60", env=CLEAN | {"GIT_SHA": sha}) as process:
                tree.move(process.pid, "system.slice/api.service")
                versions.append(dict(labels_of(labeler, sample_of(process.pid)))["version"])

    assert versions == ["one", "two"]


def test_version_follows_when_the_oldest_process_ends(labeler: Labeler) -> None:
    """A server that is replaced without an interruption leaves the cgroup to its successor."""
    with cgroup_tree("v2") as tree, contextlib.ExitStack() as stack:
        with started("sleep", "60", env=CLEAN | {"GIT_SHA": "one"}) as old:
            tree.move(old.pid, "system.slice/api.service")
            labeler.scan()
            new = stack.enter_context(started("sleep", "60", env=CLEAN | {"GIT_SHA": "two"}))
            tree.move(new.pid, "system.slice/api.service")
            assert instance_of(labeler, new.pid)["version"] == "one"
        labeler.scan()

        assert instance_of(labeler, new.pid)["version"] == "two"


def test_children_inherit_version_outside_of_units(labeler: Labeler, tmp_path: Path) -> None:
    """Processes that descend from one another and run the same are one instance."""
    script = tmp_path / "forker.py"
    script.write_text(
        "import os, time\nif not (child := os.fork()): os.environ.clear()\ntime.sleep(60)\n"
    )
    with started(PYTHON, script, env=CLEAN | {"GIT_SHA": "abc"}) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        wait_for(children.read_text)
        child = int(children.read_text())
        labeler.scan()

        assert instance_of(labeler, child) == {"service": "forker", "version": "abc"}
        assert labels_of_instance(labeler, child, start_ns_of(child)) is labels_of_instance(
            labeler, process.pid, start_ns_of(process.pid)
        )
        os.kill(child, signal.SIGKILL)


def test_exec_changes_the_service(labeler: Labeler, copy_sleep) -> None:
    """The new program is another service from its first sample on; the old samples stay."""
    command = ("sh", "-c", f"read x; exec {copy_sleep('quiet')} 60")
    with started(*command, stdin=subprocess.PIPE) as process:
        before = sample_of(process.pid, exec_id=7)
        assert dict(labels_of(labeler, before))["service"] in ("sh", "dash", "bash")

        process.stdin.write(b"\n")
        process.stdin.flush()
        wait_for(lambda: Path(f"/proc/{process.pid}/exe").readlink().name == "quiet")
        wait_for(lambda: has_execed(process.pid))

        assert service_of(labeler, process.pid, exec_id=8) == "quiet"
        assert dict(labels_of(labeler, before))["service"] != "quiet"


def test_exec_without_samples_is_seen_by_the_scan(labeler: Labeler, copy_sleep) -> None:
    """A process that was read between fork and exec does not keep its parent's name."""
    command = ("sh", "-c", f"read x; exec {copy_sleep('quiet')} 60")
    with started(*command, stdin=subprocess.PIPE) as process:
        labeler.scan()
        process.stdin.write(b"\n")
        process.stdin.flush()
        wait_for(lambda: Path(f"/proc/{process.pid}/exe").readlink().name == "quiet")
        wait_for(lambda: has_execed(process.pid))

        labeler.scan()

        assert instance_of(labeler, process.pid)["service"] == "quiet"


def test_sample_from_before_an_exec_does_not_name_the_new_program(
    labeler: Labeler, copy_sleep
) -> None:
    """When it is drained the process runs something else already: its parent's name is nearer."""
    with started(copy_sleep("quiet"), "60") as process:
        early = sample_of(process.pid, comm=b"forked", first_ns=1, last_ns=2)

        assert service_of(labeler, process.pid, comm=b"forked", first_ns=1) != "quiet"
        assert dict(labels_of(labeler, early))["comm"] == "forked"
        assert service_of(labeler, process.pid, exec_id=2) == "quiet"


def test_process_that_renames_itself_keeps_its_service(labeler: Labeler, tmp_path: Path) -> None:
    """comm is a process's own choice at any time, and no exec."""
    script = tmp_path / "renamer.py"
    script.write_text(
        "import sys, time\nsys.stdin.readline()\n"
        "open('/proc/self/comm', 'w').write('busy')\ntime.sleep(60)\n"
    )
    with started(PYTHON, script, stdin=subprocess.PIPE) as process:
        labeler.scan()
        process.stdin.write(b"\n")
        process.stdin.flush()
        wait_for(lambda: Path(f"/proc/{process.pid}/comm").read_text() == "busy\n")

        labels = dict(labels_of(labeler, sample_of(process.pid)))

    assert (labels["service"], labels["comm"]) == ("renamer", "busy")


@pytest.mark.alone
def test_reused_pid_is_another_process(labeler: Labeler, copy_sleep) -> None:
    """A pid that is used again takes no label with it, in either direction."""
    with started(copy_sleep("first"), "60") as process:
        first = sample_of(process.pid)
        assert dict(labels_of(labeler, first))["service"] == "first"
        labeler.scan()
    pid = process.pid
    time.sleep(2 * TICK_NS / SECOND_NS)  # in /proc, starts within one tick look the same
    with contextlib.ExitStack() as stack:
        for _ in range(50):
            Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
            second = stack.enter_context(started(copy_sleep("second"), "60"))
            if second.pid == pid:
                break
        else:
            pytest.skip("another process took the pid every time")

        assert service_of(labeler, pid) == "second"
        assert dict(labels_of(labeler, first._replace(comm=b"late")))["service"] == "first"
        assert labels_of_instance(labeler, pid, first.start_ns) != labels_of_instance(
            labeler, pid, start_ns_of(pid)
        )
        labeler.scan()
        assert instance_of(labeler, pid)["service"] == "second"


def test_processes_that_come_at_once_are_taken_in_part_by_part(
    labeler: Labeler, copy_sleep, monkeypatch
) -> None:
    """Thousands would keep the sampler from its drains."""
    monkeypatch.setattr(instances, "_MAX_READ_PER_SCAN", 3)
    program = copy_sleep("crowd")
    assert labeler.scan()
    with contextlib.ExitStack() as stack:
        crowd = [stack.enter_context(started(program, "60")) for _ in range(10)]
        calls = 1
        while not labeler.scan():
            calls += 1
        services = {instance_of(labeler, process.pid)["service"] for process in crowd}

    assert calls >= 4
    assert services == {"crowd"}


def test_earlier_process_of_a_pid_is_not_taken_for_the_running_one(
    labeler: Labeler, copy_sleep
) -> None:
    """A sample of a process that was never read, whose pid has another one now."""
    with started(copy_sleep("quiet"), "60") as process:
        labeler.scan()
        sample = sample_of(
            process.pid, start_ns=start_ns_of(process.pid) - SECOND_NS, comm=b"older"
        )

        assert dict(labels_of(labeler, sample))["service"] == "older"
        assert service_of(labeler, process.pid) == "quiet"


def test_exited_process_is_of_its_cgroup(labeler: Labeler) -> None:
    """Its cgroup's id leads to the unit's labels, with the version of those who live there."""
    with (
        cgroup_tree("v2") as tree,
        started("sleep", "60", env=CLEAN | {"GIT_SHA": "abc"}) as main,
    ):
        cgroup_id = tree.move(main.pid, "system.slice/api.service")
        labeler.scan()
        sample = sample_of(gone("true"), start_ns=boottime_ns(), cgroup_id=cgroup_id, comm=b"x")

        labels = dict(labels_of(labeler, sample))

    assert (labels["service"], labels["version"], labels["unit"]) == ("api", "abc", "api.service")


def test_exited_process_of_a_cgroup_without_others_is_of_its_unit(labeler: Labeler) -> None:
    """The path is enough for the service."""
    with cgroup_tree("v2") as tree:
        with started("sleep", "60") as process:
            cgroup_id = tree.move(process.pid, "system.slice/job.service")
        sample = sample_of(process.pid, start_ns=boottime_ns(), cgroup_id=cgroup_id, comm=b"x")

        assert dict(labels_of(labeler, sample))["service"] == "job"


def test_exited_process_is_of_its_ancestors(tmp_path: Path, copy_sleep) -> None:
    """Through parents that are gone as well, as far as they are remembered."""
    with started(copy_sleep("maker"), "60") as process:
        parent, child = gone("true"), gone("true")
        family = {child: parent, parent: process.pid}
        labeler = labeler_reading_at_once(own_pid=0, parent_of=family.get)
        sample = sample_of(child, start_ns=boottime_ns(), comm=b"cc1")

        labels = dict(labels_of(labeler, sample))

    assert (labels["service"], labels["comm"]) == ("maker", "cc1")


def test_exited_process_without_relatives_is_its_name(labeler: Labeler) -> None:
    """comm is all that a sample has."""
    sample = sample_of(gone("true"), start_ns=boottime_ns(), comm=b"a\n\xff")

    assert dict(labels_of(labeler, sample))["service"] == r"a\n\xff"


def test_process_that_was_read_keeps_its_labels_after_its_end(labeler: Labeler, copy_sleep) -> None:
    """The last samples are drained when it is gone."""
    with started(copy_sleep("quiet"), "60") as process:
        sample = sample_of(process.pid)
        labeler.scan()
    labeler.scan()

    assert dict(labels_of(labeler, sample))["service"] == "quiet"


def test_ancestors_of_another_cgroup_lend_no_name(copy_sleep) -> None:
    """A shell that starts a container is not the container's service."""
    with cgroup_tree("v2") as tree, started(copy_sleep("shim"), "60") as shim:
        elsewhere = tree.move(shim.pid, "a")
        pid = gone("true")
        labeler = labeler_reading_at_once(own_pid=0, parent_of={pid: shim.pid}.get)
        sample = sample_of(pid, start_ns=boottime_ns(), comm=b"x", cgroup_id=elsewhere + 1000)

        assert dict(labels_of(labeler, sample))["service"] == "x"


def reachable(root: object) -> Iterator[object]:
    seen, todo = set(), [root]
    while todo:
        thing = todo.pop()
        if id(thing) not in seen and not isinstance(thing, type) and not callable(thing):
            seen.add(id(thing))
            todo.extend(gc.get_referents(thing))
            yield thing


def test_nothing_else_of_an_environment_is_kept(labeler: Labeler) -> None:
    """A secret next to the version is nowhere in the labeler, in whatever form."""
    environment = CLEAN | {"PASSWORD": SECRET, "GIT_SHA": "abc", "OTEL_RESOURCE_ATTRIBUTES": SECRET}
    with started("sleep", "60", env=environment) as process:
        labeler.scan()
        labels_of(labeler, sample_of(process.pid))
        labeler.present(0, boottime_ns())

        kept = [thing for thing in reachable(labeler) if isinstance(thing, str | bytes)]

    assert "abc" in kept
    assert [t for t in kept if SECRET in (t if isinstance(t, str) else t.decode("latin-1"))] == []


HOSTILE = ["a\nb", "a\x1b[2Jb", "a\u202eb", "a\udcff\udc80b", "a\x7fb"]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_made_readable(labeler: Labeler, copy_sleep, name: str) -> None:
    """Programs, cgroups and arguments may be called anything that a file may."""
    with cgroup_tree("v2") as tree, started(copy_sleep(name), "60") as process:
        by_program = service_of(labeler, process.pid)
        if "\n" not in name:  # which cgroups may not have
            tree.move(process.pid, f"{name}.service")
        by_unit = service_of(labeler, process.pid, exec_id=2)
        values = [v for labels in labeler.present(0, boottime_ns()) for _, v in labels]

    for text in (by_program, by_unit, *values):
        assert text.isprintable()
        assert text.encode()


def test_huge_arguments_are_read_in_part(labeler: Labeler) -> None:
    """A megabyte of arguments and as much environment delay nobody."""
    arguments = ["-c", "import time; time.sleep(60)", *["x" * 100_000] * 10, *["y"] * 10_000]
    environment = CLEAN | {f"V{i}": "z" * 100_000 for i in range(5)}
    with started(PYTHON, *arguments, env=environment) as process:
        sample = sample_of(process.pid)
        begin = time.process_time()
        labels = dict(labels_of(labeler, sample))
        elapsed_s = time.process_time() - begin

    assert labels["service"].startswith("python")
    assert elapsed_s < 0.1


def test_cache_of_labels_is_bounded(labeler: Labeler) -> None:
    """A thread that renames itself for ever takes no more memory."""
    sample = sample_of(2, stop="kernel_thread")
    for number in range(MAX_CACHED_LABELS * 2):
        labels_of(labeler, sample._replace(comm=b"%d" % number))

    assert len(labeler._subjects) <= MAX_CACHED_LABELS


def test_labels_of_what_is_no_longer_sampled_are_forgotten(labeler: Labeler) -> None:
    """A host where processes come and go for weeks holds those of the last two windows."""
    stays = sample_of(2, stop="kernel_thread")
    first = labeler.note([stays])
    for number in range(10):
        assert labeler.note([stays]) == first
        labeler.note([stays._replace(comm=b"%d" % number)])
        labeler.present(0, 1)

    assert len(labeler._subjects) == 2


def present(labeler: Labeler, start_ns: int, end_ns: int) -> dict[str, int]:
    services = labeler.present(start_ns, end_ns)
    return {dict(labels)["service"]: duration_ns for labels, duration_ns in services.items()}


def test_instances_beyond_the_limit_have_no_time_and_are_counted(
    labeler: Labeler, copy_sleep, monkeypatch
) -> None:
    """Whoever looks at the status sees why services are missing."""
    labeler.scan()
    before = labeler.status()["instances_uncounted"]
    monkeypatch.setattr(instances, "_MAX_PRESENCES", 1)

    with started(copy_sleep("one-too-many"), "30") as process:
        labeler.scan()
        labels = labels_of(labeler, sample_of(process.pid))
        present = labeler.present(0, boottime_ns())

    assert dict(labels)["service"] == "one-too-many"
    assert not any(dict(each)["service"] == "one-too-many" for each in present)
    assert before == 0
    assert labeler.status()["instances_uncounted"] >= 1


def test_service_without_samples_was_present(labeler: Labeler, copy_sleep) -> None:
    """A service that did not run on any CPU was present, from its start to the window's end."""
    with started(copy_sleep("quiet"), "60") as process:
        labeler.scan()
        begin_ns = int(stat_fields(process.pid)[19]) * TICK_NS

        assert present(labeler, begin_ns - SECOND_NS, begin_ns + 1)["quiet"] == 1
        assert present(labeler, begin_ns + 10, begin_ns + 60)["quiet"] == 50


def test_overlapping_processes_count_once(labeler: Labeler, copy_sleep) -> None:
    """present_ns is the time of at least one process, not the sum of all."""
    program = copy_sleep("quiet")
    with started(program, "60") as one, started(program, "60") as two:
        labeler.scan()
        end_ns = boottime_ns()
        begin_ns = end_ns - 50

        assert labels_of_instance(labeler, one.pid, start_ns_of(one.pid)) == labels_of_instance(
            labeler, two.pid, start_ns_of(two.pid)
        )
        assert present(labeler, begin_ns, end_ns)["quiet"] == 50


def test_life_that_ended_within_the_window_counts_up_to_its_end(
    labeler: Labeler, copy_sleep
) -> None:
    """To within half of the time between two scans."""
    with started(copy_sleep("quiet"), "60"):
        labeler.scan()
        begin_ns = boottime_ns()
        time.sleep(0.1)
        labeler.scan()
    ended_ns = boottime_ns()
    labeler.scan()
    scanned_ns = boottime_ns()
    time.sleep(0.1)

    quiet_ns = present(labeler, begin_ns, boottime_ns())["quiet"]

    assert 0.1 * SECOND_NS <= quiet_ns <= scanned_ns - begin_ns
    assert "quiet" not in present(labeler, scanned_ns, boottime_ns())
    assert ended_ns < scanned_ns


def test_process_that_no_scan_saw_counts_to_its_last_sample(labeler: Labeler) -> None:
    """From its start on, which every sample carries."""
    asleep_ns = labeler._instances.asleep_ns
    start_ns = boottime_ns()
    sample = sample_of(gone("true"), start_ns=start_ns, comm=b"brief", last_ns=0)
    for last_ms in (2, 5, 3):
        labels_of(labeler, sample._replace(last_ns=start_ns - asleep_ns + last_ms * 1_000_000))

    quiet_ns = present(labeler, start_ns - SECOND_NS, start_ns + SECOND_NS)["brief"]

    assert quiet_ns == pytest.approx(5_000_000, abs=1_000_000)


def test_what_is_over_is_forgotten(labeler: Labeler, copy_sleep) -> None:
    """Instances of the past take no memory once their windows are closed."""
    with started(copy_sleep("quiet"), "60"):
        labeler.scan()
    labeler.scan()
    now_ns = boottime_ns()
    labeler.present(now_ns, now_ns + 1)

    assert "quiet" not in {dict(labels)["service"] for labels in labeler._instances._presences}


def test_zombie_is_not_present(labeler: Labeler, copy_sleep) -> None:
    """A process that nobody waits for has ended all the same."""
    with started(copy_sleep("quiet"), "60") as process:
        labeler.scan()
        process.kill()
        wait_for(lambda: stat_fields(process.pid)[0] == b"Z")
        labeler.scan()
        labeler.scan()
        now_ns = boottime_ns()

        assert "quiet" not in present(labeler, now_ns, now_ns + 1)


@pytest.mark.alone
def test_scan_reads_only_what_is_new(labeler: Labeler) -> None:
    """Processes that are known already are not read again."""
    with started("sleep", "60"):
        labeler.scan()
        reads = labeler.reads
        with started("sleep", "60"):
            labeler.scan()

            assert 1 <= labeler.reads - reads < 10


def test_real_samples_are_labelled(labeler: Labeler, tmp_path: Path) -> None:
    """Start times, exec ids and cgroup ids are the kernel's own."""
    program = compile_target("split.c", tmp_path / "split")
    with cgroup_tree("v2") as tree, started(program, "60") as process:
        cgroup_id = tree.move(process.pid, "system.slice/api.service")
        with Sampler(SamplerConfig(frequency_hz=999, pids=frozenset({process.pid}))) as sampler:
            samples: list[RawSample] = []
            sampler.start()
            wait_for(lambda: samples.extend(sampler.drain().samples) or samples)
            sampler.stop()

        labels: set[Labels] = {labels_of(labeler, sample) for sample in samples}

    assert samples[0].cgroup_id == cgroup_id
    assert len(labels) == 1
    assert dict(labels.pop())["service"] == "api"
    assert labeler.reads < 30


def test_image_that_is_known_later_comes_before_the_build_id(
    labeler: Labeler, tmp_path: Path
) -> None:
    """The order of the sources holds whenever they turn up."""
    with cgroup_tree("v2") as tree, started("sleep", "60", env=CLEAN) as process:
        tree.move(process.pid, DOCKER)
        assert len(instance_of(labeler, process.pid)["version"]) == 40

        write_docker(tmp_path)
        labeler.scan()

        assert instance_of(labeler, process.pid)["version"] == "1.4.2"
