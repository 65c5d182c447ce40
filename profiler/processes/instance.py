"""Service instance: what one version of a service runs in, and its labels."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from profiler.processes.cgroups import Place
from profiler.processes.containers import Container
from profiler.processes.generations import Generation, boottime_ns
from storage.profile import Labels, make_labels

if TYPE_CHECKING:
    from profiler.processes.presence import Presence

SHORT_ID = 12
"""Digits of a container's id, as runtimes show them."""


class Instance:
    """`members` live, or are about to be taken out again; `oldest` is one of them."""

    def __init__(
        self,
        key: tuple[object, ...],
        place: Place,
        container: Container,
        service: str,
        oldest: Generation,
    ) -> None:
        self.key = key
        self.place = place
        self.container = container
        self.service = service
        self.version = ""
        self.oldest = oldest
        self.members: dict[Generation, None] = {}
        self.labels: Labels = ()
        self.presence: Presence | None = None
        self.begin_ns = boottime_ns()

    @property
    def is_nameless(self) -> bool:
        return bool(self.place.container_id or self.place.pod_uid) and not self.container.name

    def open(self, at_ns: int) -> None:
        if self.presence is not None:
            self.presence.open(at_ns)

    def close(self, at_ns: int) -> None:
        if self.presence is not None:
            self.presence.close(at_ns)


def instance_labels(place: Place, container: Container, service: str, version: str) -> Labels:
    names = {
        "service": service,
        "version": version,
        "container": container.name or place.container_id[:SHORT_ID],
        "pod": container.pod,
        "namespace": container.namespace,
        "unit": place.unit,
    }
    return make_labels({name: value for name, value in names.items() if value})


def own_version() -> str:
    try:
        return version("everflame")
    except PackageNotFoundError:  # run from its sources
        return ""
