"""What the paths of cgroups say, as systemd and container runtimes write them."""

import pytest

from profiler.processes.cgroups import CgroupIds, parse_cgroups
from tests.support.cgroup_trees import cgroup_tree
from tests.support.targets import running

ID = "4f" * 32
OTHER = "a0" * 32
UID = "12345678-9abc-def0-1234-56789abcdef0"
UID_ = UID.replace("-", "_")


@pytest.mark.parametrize(
    "path",
    [
        f"/docker/{ID}",
        f"/system.slice/docker-{ID}.scope",
        f"/machine.slice/libpod-{ID}.scope",
        f"/machine.slice/libpod-{ID}.scope/container",
        f"/libpod_parent/libpod-{ID}",
        f"/docker/{OTHER}/docker/{ID}",
        f"/default/kata_{ID}",
        f"/../../docker/{ID}",
        f"/system.slice/docker-{ID}.scope/init.scope",
    ],
)
def test_container_is_found_in_any_runtimes_path(path: str) -> None:
    """The innermost id of 64 hex digits is the container, whatever stands before and after it."""
    place = parse_cgroups(b"0::" + path.encode() + b"\n")

    assert (place.container_id, place.pod_uid, place.unit) == (ID, "", "")
    assert place.key.endswith((ID, f"{ID}.scope"))


@pytest.mark.parametrize(
    "path",
    [
        f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{UID_}.slice/cri-containerd-{ID}.scope",
        f"/kubepods.slice/kubepods-pod{UID_}.slice/crio-{ID}.scope",
        f"/kubepods.slice/kubepods-pod{UID_}.slice/docker-{ID}.scope",
        f"/kubepods/besteffort/pod{UID}/{ID}",
        f"/docker/{OTHER}/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{UID_}.slice/cri-containerd-{ID}.scope",
        f"/system.slice/containerd.service/kubepods-burstable-pod{UID_}.slice:cri-containerd:{ID}",
    ],
)
def test_pod_is_found_beside_the_container(path: str) -> None:
    """Both drivers' paths hold the pod's UID with dashes, also in a cluster within a container."""
    place = parse_cgroups(b"0::" + path.encode() + b"\n")

    assert (place.container_id, place.pod_uid) == (ID, UID)


@pytest.mark.parametrize(
    ("path", "unit"),
    [
        ("/system.slice/api.service", "api.service"),
        ("/system.slice/system-worker.slice/worker@3.service", "worker@3.service"),
        ("/system.slice/api.service/workers", "api.service"),
        ("/user.slice/user-1000.slice/user@1000.service/app.slice/sync.service", "sync.service"),
        (f"/system.slice/docker-{ID}.scope/system.slice/nginx.service", "nginx.service"),
        (f"/system.slice/web.service/libpod-payload-{ID}", "web.service"),
        ("/user.slice/user-1000.slice/session-3.scope", ""),
        ("/user.slice/user-1000.slice/user@1000.service/init.scope", ""),
        ("/user.slice/user-1000.slice/user@1000.service/app.slice/app-term-12.scope", ""),
        ("/user.slice/user-1000.slice/user@1000.service/app.slice/vte-spawn-1b.scope", ""),
        ("/init.scope", ""),
        ("/system.slice/run-u12.service", ""),
        (f"/machine.slice/libpod-conmon-{ID}.scope", ""),
        ("/", ""),
    ],
)
def test_unit_is_the_innermost_that_names_a_service(path: str, unit: str) -> None:
    """Sessions, user managers and what is made up for one run are no units of a service."""
    place = parse_cgroups(b"0::" + path.encode() + b"\n")

    assert place.unit == unit


@pytest.mark.parametrize(
    ("unit", "service"),
    [
        ("run-backup.service", "run-backup"),
        ("run-u12.service", ""),
        (f"run-r{ID[:32]}.scope", ""),
        (f"run-r{UID}.scope", ""),
        ("run-1234.scope", ""),
        ("run-p1234-i5678.scope", ""),
        (r"my\x2dapp.service", "my-app"),
        (r"caf\xc3\xa9@a\x2db.service", "café"),
        ("__site.service", "_site"),
        (f"{UID}.web.scope", "web"),
        (f"{UID}.scope", ""),
        (f"snap.shop.web.{UID}.scope", "snap.shop.web"),
        (f"snap.shop.web-{UID}.scope", "snap.shop.web"),
        (f"worker-{ID[:32]}.service", "worker"),
        ("worker-3.service", "worker-3"),
        ("vscode-1234.scope", "vscode"),
        (r"machine-qemu\x2d12\x2dshop.scope", "shop"),
        ("dbus-:1.2-org.shop.Api@0.service", "org.shop.Api"),
        ("fade.service", "fade"),
    ],
)
def test_ids_are_no_part_of_a_services_name(unit: str, service: str) -> None:
    """Each allocation, run and connection would be a service of its own; real units are kept."""
    place = parse_cgroups(f"0::/system.slice/{unit}\n".encode())

    assert place.service == service
    assert bool(place.unit) is bool(service)
    assert "\\x" not in place.unit


def test_conmon_is_not_in_the_container_it_watches() -> None:
    """A container's monitor carries the id in its cgroup's name and is no part of it."""
    place = parse_cgroups(f"0::/machine.slice/libpod-conmon-{ID}.scope\n".encode())

    assert (place.container_id, place.key) == ("", "")


def test_hierarchies_complete_one_another() -> None:
    """On a hybrid host units are in name=systemd and a container may be in any v1 hierarchy."""
    content = f"12:pids:/docker/{ID}\n1:name=systemd:/system.slice/api.service\n0::/\n".encode()

    place = parse_cgroups(content)

    assert (place.container_id, place.unit) == (ID, "api.service")
    assert place.paths == ("/", "/system.slice/api.service", f"/docker/{ID}")


def test_removed_cgroup_keeps_its_name() -> None:
    """The kernel marks the path of a cgroup that was removed under its last processes."""
    place = parse_cgroups(b"0::/system.slice/api.service (deleted)\n")

    assert place.unit == "api.service"


def test_damaged_lines_are_passed_over() -> None:
    """Whatever stands in the file, the lines that can be read count."""
    place = parse_cgroups(b"\n::\nnonsense\n0:x\n0::/a\xff\x1b[2J/b.service\n" + b"9:a:/b\n" * 500)

    assert place.unit == "b.service"
    assert "\x1b" not in place.paths[0]
    assert len(place.paths) <= 64


@pytest.mark.kernel
def test_path_is_found_by_id() -> None:
    """The id in a sample leads to the path of a cgroup without any process in it."""
    with cgroup_tree("v2") as tree:
        with running("sleep", "60") as process:
            cgroup_id = tree.move(process.pid, "system.slice/api.service")
        ids = CgroupIds()

        assert ids.path(cgroup_id) == tree.path("system.slice/api.service")
        tree.remove("system.slice")
        assert ids.path(cgroup_id) == ""
        assert ids.path(1) == ""
        ids.close()
        assert ids.path(cgroup_id) == ""
