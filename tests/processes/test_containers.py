"""Names and images of containers, from files as Docker, Podman and Kubernetes write them."""

import json
import os
from pathlib import Path

import pytest

from profiler.processes.containers import Container, ContainerMiss, Containers, workload

ID = "4f" * 32
UID = "12345678-9abc-def0-1234-56789abcdef0"


def write_docker(root: Path, container_id: str = ID, **changes: object) -> Path:
    config = {
        "ID": container_id,
        "Name": "/shop-web-1",
        "Image": "sha256:" + "ab" * 32,
        "Config": {"Image": "shop/web:1.4.2", "Env": ["SECRET=hidden"], "Labels": {}},
    } | changes
    path = root / "var/lib/docker/containers" / container_id / "config.v2.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(config))
    return path


def write_podman(root: Path) -> None:
    folder = root / "var/lib/containers/storage/overlay-containers"
    folder.mkdir(parents=True)
    metadata = {"image-name": "docker.io/library/nginx:1.25", "image-id": "cd" * 32, "name": "web"}
    (folder / "containers.json").write_text(
        json.dumps(
            [{"id": ID, "names": ["web"], "image": "cd" * 32, "metadata": json.dumps(metadata)}]
        )
    )


def write_kubernetes(root: Path, pod: str = "checkout-7d4b9c6f5d-x2x4z") -> None:
    logs = root / "var/log/containers"
    logs.mkdir(parents=True, exist_ok=True)
    folder = root / "var/log/pods" / f"shop_{pod}_{UID}"
    (folder / "app").mkdir(parents=True)
    (folder / "app/0.log").touch()
    (logs / f"{pod}_shop_app-{ID}.log").symlink_to(folder / "app/0.log")


def test_docker_names_container_and_image(tmp_path: Path) -> None:
    """config.v2.json has the name behind a slash and the image as it was asked for."""
    write_docker(tmp_path)

    found = Containers(tmp_path).find(ID, "")

    assert found == Container("shop-web-1", "", "", "shop/web:1.4.2", "sha256:" + "ab" * 32)
    assert found.version == "1.4.2"


def test_podman_names_container_and_image(tmp_path: Path) -> None:
    """containers.json lists all containers, and the image's name in JSON within JSON."""
    write_podman(tmp_path)

    found = Containers(tmp_path).find(ID, "")

    assert (found.name, found.image) == ("web", "docker.io/library/nginx:1.25")


def test_kubelet_names_pod_namespace_and_container(tmp_path: Path) -> None:
    """The link's name says all three, with the container's id."""
    write_kubernetes(tmp_path)

    found = Containers(tmp_path).find(ID, UID)

    assert found[:3] == ("app", "checkout-7d4b9c6f5d-x2x4z", "shop")


def test_pods_own_container_is_known_by_the_pods_uid(tmp_path: Path) -> None:
    """The container that only holds a pod's namespaces has no log and so no link."""
    write_kubernetes(tmp_path)

    found = Containers(tmp_path).find("b1" * 32, UID)

    assert found[:3] == ("", "checkout-7d4b9c6f5d-x2x4z", "shop")


@pytest.mark.parametrize(
    ("bundle", "prefix", "image_key"),
    [
        (
            "run/containerd/io.containerd.runtime.v2.task/k8s.io/{}",
            ("io.kubernetes.cri.container-name", "io.kubernetes.cri.sandbox-name"),
            "io.kubernetes.cri.image-name",
        ),
        (
            "run/containers/storage/overlay-containers/{}/userdata",
            ("io.kubernetes.container.name", "io.kubernetes.pod.name"),
            "io.kubernetes.cri-o.ImageName",
        ),
    ],
)
def test_bundle_has_image_and_names(
    tmp_path: Path, bundle: str, prefix: tuple[str, str], image_key: str
) -> None:
    """containerd and CRI-O write annotations before the container's first process."""
    folder = tmp_path / bundle.format(ID)
    folder.mkdir(parents=True)
    annotations = {prefix[0]: "app", prefix[1]: "db-0", image_key: "reg:5000/db@sha256:" + "1" * 64}
    (folder / "config.json").write_text(json.dumps({"annotations": annotations}))

    found = Containers(tmp_path).find(ID, UID)

    assert found[:2] == ("app", "db-0")
    assert found.version == "sha256:111111111111"


def test_names_of_the_kubelet_in_docker_are_taken_apart(tmp_path: Path) -> None:
    """With cri-dockerd a container's name holds container, pod and namespace."""
    write_docker(tmp_path, Name=f"/k8s_app_db-0_shop_{UID}_3")

    assert Containers(tmp_path).find(ID, UID)[:3] == ("app", "db-0", "shop")


@pytest.mark.parametrize(
    ("image", "image_id", "version"),
    [
        ("nginx:1.25", "", "1.25"),
        ("registry:5000/team/app:v2", "", "v2"),
        ("registry:5000/team/app", "sha256:" + "ab" * 32, "sha256:abababababab"),
        ("app:latest", "sha256:" + "ab" * 32, "sha256:abababababab"),
        ("app:1.4@sha256:" + "cd" * 32, "", "1.4"),
        ("app@sha256:" + "cd" * 32, "sha256:" + "ab" * 32, "sha256:cdcdcdcdcdcd"),
        ("sha256:" + "ef" * 32, "", "sha256:efefefefefef"),
        ("app:latest", "", ""),
        ("", "", ""),
    ],
)
def test_version_is_the_images_tag_or_digest(image: str, image_id: str, version: str) -> None:
    """`latest` says nothing, a registry's port is no tag."""
    assert Container("x", image=image, image_id=image_id).version == version


@pytest.mark.parametrize(
    ("pod", "name"),
    [
        ("checkout-7d4b9c6f5d-x2x4z", "checkout"),
        ("cart-service-66bfc9dd8-9kq7v", "cart-service"),
        ("fluentd-h7k2p", "fluentd"),
        ("postgres-0", "postgres"),
        ("kafka-broker-12", "kafka-broker"),
        ("backup-28473920-lq8rt", "backup"),
        ("kube-apiserver-node-1", "kube-apiserver"),
        ("web", "web"),
        ("my-nginx", "my-nginx"),
        ("billing-v2", "billing-v2"),
        ("front-end", "front-end"),
        ("api-20240101", "api-20240101"),
    ],
)
def test_workload_is_the_pods_name_without_what_controllers_append(pod: str, name: str) -> None:
    """Words stay, hashes and numbers go."""
    assert workload(pod, "node-1") == name


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"", b"[" * 5000])
def test_damaged_file_is_counted(tmp_path: Path, content: bytes) -> None:
    """A file that is not JSON has no name and counts as one miss."""
    write_docker(tmp_path).write_bytes(content)
    containers = Containers(tmp_path)

    assert containers.find(ID, "") == Container()
    assert containers.misses == {ContainerMiss.DAMAGED: 1}


@pytest.mark.parametrize(
    "content", [b"[]", b"3", b'{"Name":7,"Config":[]}', b'{"Config":{"Labels":1}}']
)
def test_json_of_another_shape_gives_no_name(tmp_path: Path, content: bytes) -> None:
    """Whatever is in the file, nothing breaks."""
    write_docker(tmp_path).write_bytes(content)

    assert Containers(tmp_path).find(ID, "") == Container()


def test_fifo_in_place_of_a_file_does_not_block(tmp_path: Path) -> None:
    """What is no regular file is a miss."""
    path = write_docker(tmp_path)
    path.unlink()
    os.mkfifo(path)
    containers = Containers(tmp_path)

    assert containers.find(ID, "") == Container()
    assert containers.misses == {ContainerMiss.NOT_READABLE: 1}


def test_too_large_file_is_not_read(tmp_path: Path) -> None:
    """Sizes are bounded."""
    write_docker(tmp_path).write_bytes(b"[" + b" " * (2 << 20) + b"]")
    containers = Containers(tmp_path)

    assert containers.find(ID, "") == Container()
    assert containers.misses == {ContainerMiss.TOO_LARGE: 1}


def test_hostile_names_are_made_readable(tmp_path: Path) -> None:
    """A name cannot break a line or steer a terminal."""
    write_docker(tmp_path, Name="/a\n\x1b[2J\u202eb")

    assert Containers(tmp_path).find(ID, "").name == r"a\n\x1b[2J\u202eb"


def test_names_that_come_later_are_found_then(tmp_path: Path) -> None:
    """Folder and list are read again when they have changed."""
    containers = Containers(tmp_path)
    assert containers.find(ID, UID) == Container()

    write_kubernetes(tmp_path)
    write_podman(tmp_path)

    assert containers.find(ID, UID).pod == "checkout-7d4b9c6f5d-x2x4z"
    assert containers.find(ID, UID).version == "1.25"
