"""What runtimes leave on disk about a container: its name, its pod, its image.

No runtime is asked, so none has to be reachable. What is known, in this order:

- kubelet's links /var/log/containers/POD_NAMESPACE_CONTAINER-ID.log, and for containers without
  logs (a pod's own) its folders /var/log/pods/NAMESPACE_POD_UID
- Docker's /var/lib/docker/containers/ID/config.v2.json
- the bundles of containerd and CRI-O (config.json under /run), with their annotations
- Podman's /var/lib/containers/storage/overlay-containers/containers.json

Limits: containers of users without root (Podman's files in their homes) and runtimes with another
data root are not found; they keep the first 12 digits of their id.
"""

import errno
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

import orjson

from symbolizer.text import readable

_LOG = re.compile(
    r"(?P<pod>[^_]+)_(?P<namespace>[^_]+)_(?P<container>.+)-(?P<id>[0-9a-f]{64})\.log"
)
_LOG_FOLDER = re.compile(r"(?P<namespace>[^_]+)_(?P<pod>[^_]+)_(?P<uid>[0-9a-f-]+)")
_K8S_NAME = re.compile(r"k8s_(?P<container>[^_]+)_(?P<pod>[^_]+)_(?P<namespace>[^_]+)_.*")

# As real ones are: 10 KB for a container, 2 KB for each container in a list, 250 pods on a node.
_MAX_CONTAINER_BYTES = 1 << 20
_MAX_LIST_BYTES = 16 << 20
_MAX_LINKS = 16_384

_BUNDLES = (
    "run/containerd/io.containerd.runtime.v2.task/k8s.io/{}/config.json",
    "run/containers/storage/overlay-containers/{}/userdata/config.json",
)
_PODMAN_LISTS = ("containers.json", "volatile-containers.json")
_ANNOTATIONS = {
    "container": ("io.kubernetes.cri.container-name", "io.kubernetes.container.name"),
    "pod": ("io.kubernetes.cri.sandbox-name", "io.kubernetes.pod.name"),
    "namespace": ("io.kubernetes.cri.sandbox-namespace", "io.kubernetes.pod.namespace"),
    "image": ("io.kubernetes.cri.image-name", "io.kubernetes.cri-o.ImageName"),
}


class ContainerMiss(StrEnum):
    """Why a runtime's file has no name. A missing file is not a miss."""

    DAMAGED = "damaged runtime file"
    TOO_LARGE = "runtime file too large"
    NOT_READABLE = "runtime file not readable"


class Container(NamedTuple):
    """Names are empty where they are not known. `image_id` is a digest, `sha256:…`."""

    name: str = ""
    pod: str = ""
    namespace: str = ""
    image: str = ""
    image_id: str = ""

    def filled(self, other: "Container") -> "Container":
        """Fill what is empty here from another description of the same container."""
        return Container(*(mine or theirs for mine, theirs in zip(self, other, strict=True)))

    @property
    def is_complete(self) -> bool:
        return bool(self.name and self.image)

    @property
    def version(self) -> str:
        """Return the image's tag, else its digest. `latest` is not a version."""
        name, _, digest = self.image.partition("@")
        tag = name.rpartition("/")[2].partition(":")[2]
        if name.startswith("sha256:"):
            tag, digest = "", name
        if tag and tag != "latest":
            return tag
        digest = digest or self.image_id
        algorithm, colon, digits = digest.partition(":")
        return f"{algorithm}:{digits[:12]}" if colon and digits else ""


class Containers:
    """Descriptions of this host's containers, below `root`. `misses` counts what was wrong."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.misses: Counter[ContainerMiss] = Counter()
        self._root = root
        self._logs = _Folder(root / "var/log/containers", _LOG, "id")
        self._pods = _Folder(root / "var/log/pods", _LOG_FOLDER, "uid")
        storage = root / "var/lib/containers/storage/overlay-containers"
        self._lists = [_List(storage / name, self) for name in _PODMAN_LISTS]

    def find(self, container_id: str, pod_uid: str) -> Container:
        """Look up a container by what its cgroup says. Either may be empty."""
        found = Container()
        if container_id:
            if log := self._logs.get(container_id):
                found = Container(log["container"], log["pod"], log["namespace"])
            docker = self._root / "var/lib/docker/containers" / container_id / "config.v2.json"
            found = found.filled(_of_docker(self.load(docker, _MAX_CONTAINER_BYTES)))
            for bundle in _BUNDLES:
                if not found.is_complete:
                    config = self.load(
                        self._root / bundle.format(container_id), _MAX_CONTAINER_BYTES
                    )
                    found = found.filled(_of_annotations(_table(config, "annotations")))
            for podman in self._lists:
                if not found.is_complete:
                    found = found.filled(podman.get(container_id))
        if not found.pod and pod_uid and (folder := self._pods.get(pod_uid)):
            found = found.filled(Container("", folder["pod"], folder["namespace"]))
        return found

    def load(self, path: Path, limit_bytes: int) -> object:
        """Parse a JSON file; None, and a miss, where that is not possible."""
        try:
            content = _read(path, limit_bytes)
            return orjson.loads(content) if content is not None else None
        except orjson.JSONDecodeError:
            self.misses[ContainerMiss.DAMAGED] += 1
        except OSError as error:
            is_large = error.errno == errno.EFBIG
            self.misses[ContainerMiss.TOO_LARGE if is_large else ContainerMiss.NOT_READABLE] += 1
        return None


def _read(path: Path, limit_bytes: int) -> bytes | None:
    """Read a regular file; None if there is none. EFBIG says that it is larger than the limit."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        content = file.read(limit_bytes + 1)
    if len(content) > limit_bytes:
        raise OSError(errno.EFBIG, "too large")
    return content


class _Folder:
    """The names in a folder, by one of their parts. Read again when the folder has changed."""

    def __init__(self, path: Path, pattern: re.Pattern[str], key: str) -> None:
        self._path = path
        self._pattern = pattern
        self._key = key
        self._changed_ns = -1
        self._names: dict[str, Mapping[str, str]] = {}

    def get(self, key: str) -> Mapping[str, str] | None:
        try:
            changed_ns = self._path.stat().st_mtime_ns
            if changed_ns != self._changed_ns:
                self._names = dict(self._read())
                self._changed_ns = changed_ns
        except OSError:
            self._names, self._changed_ns = {}, -1
        return self._names.get(key)

    def _read(self) -> Iterable[tuple[str, Mapping[str, str]]]:
        with os.scandir(self._path) as entries:
            for number, entry in enumerate(entries):
                if number >= _MAX_LINKS:  # those beyond keep their ids
                    return
                if match := self._pattern.fullmatch(entry.name):
                    groups = match.groupdict()
                    yield groups[self._key], {k: _text(v) for k, v in groups.items()}


class _List:
    """Podman's list of all containers. Parsed again when the file has changed."""

    def __init__(self, path: Path, containers: Containers) -> None:
        self._path = path
        self._containers = containers
        self._seen: tuple[int, int, int] | None = None
        self._by_id: dict[str, Container] = {}

    def get(self, container_id: str) -> Container:
        try:
            status = self._path.stat()
            seen = (status.st_ino, status.st_size, status.st_mtime_ns)
        except OSError:
            self._by_id, self._seen = {}, None
            return Container()
        if seen != self._seen:
            self._seen = seen
            self._by_id = _of_podman(self._containers.load(self._path, _MAX_LIST_BYTES))
        return self._by_id.get(container_id, Container())


def _of_docker(config: object) -> Container:
    inner = _table(config, "Config")
    labels = _table(inner, "Labels")
    of_pod = Container(
        _field(labels, "io.kubernetes.container.name"),
        _field(labels, "io.kubernetes.pod.name"),
        _field(labels, "io.kubernetes.pod.namespace"),
        image=_field(inner, "Image"),
        image_id=_field(config, "Image"),
    )
    return of_pod.filled(_from_name(_field(config, "Name").removeprefix("/")))


def _of_annotations(annotations: object) -> Container:
    texts = {
        part: next((text for key in keys if (text := _field(annotations, key))), "")
        for part, keys in _ANNOTATIONS.items()
    }
    return Container(texts["container"], texts["pod"], texts["namespace"], texts["image"])


def _of_podman(parsed: object) -> dict[str, Container]:
    containers = {}
    for table in parsed if isinstance(parsed, list) else []:
        names = _table(table, "names")
        name = names[0] if isinstance(names, list) and names else ""
        metadata = _table(table, "metadata")  # JSON within JSON
        try:
            metadata = orjson.loads(metadata) if isinstance(metadata, str) else None
        except orjson.JSONDecodeError:
            metadata = None
        image_id = _field(table, "image")
        containers[_field(table, "id")] = Container(
            image=_field(metadata, "image-name"),
            image_id=f"sha256:{image_id}" if image_id else "",
        ).filled(_from_name(_text(name) if isinstance(name, str) else ""))
    return containers


def _from_name(name: str) -> Container:
    """Take a container's name apart where it is one that the kubelet composes."""
    match = _K8S_NAME.fullmatch(name)
    return (
        Container(match["container"], match["pod"], match["namespace"])
        if match
        else Container(name)
    )


def _table(parsed: object, key: str) -> object:
    return parsed.get(key) if isinstance(parsed, dict) else None


def _field(parsed: object, key: str) -> str:
    value = _table(parsed, key)
    return _text(value) if isinstance(value, str) else ""


def _text(name: str) -> str:
    return readable(
        os.fsencode(name) if name.isascii() else name.encode("utf-8", "surrogateescape")
    )


_POD_OF_DEPLOYMENT = re.compile(r"(.+?)-(?=[a-f]*[0-9])[0-9a-f]{6,10}-[0-9a-z]{5}")
_POD_OF_SET = re.compile(r"(.+)-[bcdfghjklmnpqrstvwxz2456789]{5}")
_POD_OF_STATEFUL_SET = re.compile(r"(.+)-[0-9]{1,4}")


def workload(pod: str, host: str = "") -> str:
    """Return the name of what a pod is one of: its name without what controllers append.

    Deployments append `-HASH-RANDOM` (CronJobs `-TIME-RANDOM`), DaemonSets, Jobs and ReplicaSets
    `-RANDOM`, StatefulSets `-NUMBER`, static pods `-HOST`. RANDOM is 5 of the 27 characters that
    Kubernetes uses (k8s.io/apimachinery/pkg/util/rand): no vowels, so hardly any word is mistaken
    for one. A pod of its own whose name ends that way (`http2`) does lose that part.
    """
    if host and pod.endswith(f"-{host}"):
        return pod.removesuffix(f"-{host}")
    for pattern in (_POD_OF_DEPLOYMENT, _POD_OF_SET, _POD_OF_STATEFUL_SET):
        if match := pattern.fullmatch(pod):
            return match[1]
    return pod
