r"""Where a process stands among the control groups: its container, its pod, its systemd unit.

/proc/PID/cgroup has one line for each hierarchy: `0::PATH` is cgroup v2, the others are v1
(cgroups(7)); on hybrid hosts units are in `name=systemd` and containers may be in any. The names
are those that runtimes choose:

- a container ends in its id of 64 hex digits: `docker-ID.scope`, `cri-containerd-ID.scope`,
  `crio-ID.scope`, `libpod-ID.scope` with the systemd driver, `/docker/ID`, `/kubepods/…/podUID/ID`
  without. The innermost one counts: containers run in containers.
- a pod is `podUID` or `kubepods-burstable-podUID.slice`, dashes written as underscores.
- a unit is the innermost `.service` or `.scope`, within the container if there is one. What logins
  and `systemd-run` make up (`session-*.scope`, `user@*.service`, `run-u12.service`,
  `run-rUUID.scope`, `run-1234.scope`, scopes of a user), what is called by an id alone, and
  `init.scope` say nothing of a service and are no units here. Escapes are systemd's own
  (systemd-escape(1)): `my\x2dapp.service` is `my-app.service`.

A service is called by its unit without suffix, instance and ids: `worker@3.service` is one of
`worker`, and so is Nomad's `UUID.worker.scope`.
"""

import ctypes
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from symbolizer.text import readable

_CONTAINER = re.compile(r"(?:^|.*[-:_])([0-9a-f]{64})(?:\.scope)?")
_POD = re.compile(
    r"(?:.*kubepods.*-)?pod([0-9a-f]{8}(?:[-_]?[0-9a-f]{4}){3}[-_]?[0-9a-f]{12})(?:\.slice.*)?"
)
_UUID = r"[0-9a-f]{8}[-_]?(?:[0-9a-f]{4}[-_]?){3}[0-9a-f]{12}"
_NO_UNIT = re.compile(
    rf"session-.*\.scope|user@.*\.service|init\.scope|.*-conmon-.*"
    rf"|run-(?:u[0-9]+|r?{_UUID}|p?[0-9]+(?:-i?[0-9]+)*)\.(?:service|scope)"
)
_ID = re.compile(
    rf"(?<![0-9A-Za-z])(?:{_UUID}|(?=[a-f]*[0-9])[0-9a-f]{{12,64}}|dbus-:[0-9.]+)(?![0-9A-Za-z])",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"[-._][0-9]+$")
"""At the end of a scope's name: a pid or the number of a job. That of a service may be its own."""
_VIRTUAL_MACHINE = re.compile(r"machine-(?:qemu|lxc)-[0-9]+-(.+)")
"""libvirt counts its machines from each of its starts on."""
_ESCAPE = re.compile(rb"\\x([0-9a-f]{2})")
_USER_MANAGER = re.compile(r"user@.*\.service")
_TRANSIENT_OF_USER = re.compile(r".*\.scope|app-.*")

_MAX_LINES = 64  # a kernel has about a dozen v1 controllers

_FILE_HANDLE = struct.Struct("=IiQ")  # struct file_handle, open_by_handle_at(2)
_FILEID_KERNFS = 0xFE  # exportfs.h; the handle is the cgroup's id
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Place:
    """What the cgroups of a process say.

    Attributes:
        paths: one for each different path, v2's first.
        container_id: 64 hex digits, or empty.
        pod_uid: a UUID with dashes (or the 32 digits of a static pod), or empty.
        unit: unescaped and with its suffix, or empty.
        service: what the unit calls the service, or empty.
        key: the path up to the container or unit. Processes of one key are one service's; empty
            where there is neither.
    """

    paths: tuple[str, ...] = ()
    container_id: str = ""
    pod_uid: str = ""
    unit: str = ""
    service: str = ""
    key: str = ""


def parse_cgroups(content: bytes) -> Place:
    """Read /proc/PID/cgroup."""
    paths: dict[tuple[int, int], str] = {}
    for position, line in enumerate(content.split(b"\n", _MAX_LINES)[:_MAX_LINES]):
        hierarchy, _, rest = line.partition(b":")
        controllers, colon, path = rest.partition(b":")
        if colon:
            order = 0 if hierarchy == b"0" else 1 if controllers == b"name=systemd" else 2
            paths[order, position] = readable(path.removesuffix(b" (deleted)"))
    return place_of([paths[key] for key in sorted(paths)])


def place_of(paths: list[str]) -> Place:
    """Return the place from the paths of the hierarchies; an earlier one wins over a later."""
    places = [_read_path(path) for path in dict.fromkeys(paths)]
    of_container = next((place for place in places if place.container_id), None)
    of_pod = next((place for place in places if place.pod_uid), None)
    of_unit = next((place for place in places if place.unit), None)
    chosen = of_container or of_unit or of_pod or Place()
    return Place(
        paths=tuple(path for place in places for path in place.paths),
        container_id=chosen.container_id,
        pod_uid=(of_pod or chosen).pod_uid,
        unit=(of_unit or chosen).unit,
        service=(of_unit or chosen).service,
        key=chosen.key,
    )


def _read_path(path: str) -> Place:
    parts = path.split("/")
    containers = [
        (i, match) for i, match in _matches(_CONTAINER, parts) if "conmon-" not in parts[i]
    ]
    at, container = containers[-1] if containers else (-1, None)
    pods = [match[1] for i, match in _matches(_POD, parts) if at < 0 or i <= at]
    unit_at = _find_unit(parts, at + 1)
    if unit_at < 0 and container and not pods:
        # A unit whose processes are a container: `podman run --cgroups=split`.
        unit_at = _find_unit(parts[:at], 0)
    unit = parts[unit_at] if unit_at >= 0 else ""
    end = max(at, unit_at)
    return Place(
        paths=(path,),
        container_id=container[1] if container else "",
        pod_uid=pods[-1].replace("_", "-") if pods else "",
        unit=_unescape(unit),
        service=_service_of(unit),
        key="/".join(parts[: end + 1]) if end >= 0 else f"pod {pods[-1]}" if pods else "",
    )


def _matches(pattern: re.Pattern[str], parts: list[str]) -> Iterator[tuple[int, re.Match[str]]]:
    for position, part in enumerate(parts):
        if match := pattern.fullmatch(part):
            yield position, match


def _find_unit(parts: list[str], start: int) -> int:
    """Return the position of the innermost unit from `start` on, or -1."""
    is_users = False
    found = -1
    for position in range(start, len(parts)):
        part = parts[position]
        if _USER_MANAGER.fullmatch(part):
            is_users = True
        elif part.endswith((".service", ".scope")) and not (
            _NO_UNIT.fullmatch(part)
            or _CONTAINER.fullmatch(part)
            or (is_users and _TRANSIENT_OF_USER.fullmatch(part))
            or not _service_of(part)
        ):
            found = position
    return found


def _service_of(unit: str) -> str:
    """Return a unit's name without suffix, instance and ids; nothing if it is nothing but ids."""
    name, _, suffix = unit.rpartition(".")
    name = _unescape(name.partition("@")[0])
    if machine := _VIRTUAL_MACHINE.fullmatch(name):
        return machine[1]
    named = _ID.sub("", name)
    if suffix == "scope":
        named = _NUMBER.sub("", named)
    if named != name:
        named = re.sub(r"([-._:])[-._:]+", r"\1", named).strip("-._:")
    return named


def _unescape(unit: str) -> str:
    """Undo what systemd does to a name so that it can be a path, and to a cgroup's besides."""
    escaped = unit.removeprefix("_").encode()
    return readable(_ESCAPE.sub(lambda match: bytes((int(match[1], 16),)), escaped))


class CgroupIds:
    """Paths of cgroups by their v2 id, for processes that are gone before /proc could be read."""

    def __init__(self) -> None:
        self._mount = _find_mount()
        self._mount_fd = -1
        if self._mount is not None:
            try:
                self._mount_fd = os.open(self._mount, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError:
                self._mount = None

    def close(self) -> None:
        if self._mount_fd >= 0:
            os.close(self._mount_fd)
            self._mount_fd = -1

    def find(self, path: str) -> int:
        """Return the id of the cgroup at a path within the hierarchy; 0 if it is not there."""
        if self._mount is None or not path:
            return 0
        try:
            return (self._mount / path.lstrip("/")).stat().st_ino
        except OSError:
            return 0

    def path(self, cgroup_id: int) -> str:
        """Return the path within the hierarchy; empty for the root and where it is not known.

        It is known as long as the cgroup is there, given CAP_DAC_READ_SEARCH and Linux 5.5.
        """
        if self._mount_fd < 0 or cgroup_id <= 1:
            return ""
        handle = ctypes.create_string_buffer(_FILE_HANDLE.pack(8, _FILEID_KERNFS, cgroup_id))
        fd = _libc.open_by_handle_at(self._mount_fd, handle, os.O_PATH | os.O_CLOEXEC)
        if fd < 0:
            return ""
        try:
            path = os.fsencode(Path(f"/proc/self/fd/{fd}").readlink())
        except OSError:
            return ""
        finally:
            os.close(fd)
        return readable(path.removeprefix(os.fsencode(self._mount or "")))


def _find_mount() -> Path | None:
    for line in Path("/proc/self/mountinfo").read_bytes().split(b"\n"):
        before, _, after = line.partition(b" - ")
        fields = before.split()
        if after.startswith(b"cgroup2 ") and len(fields) > 4 and fields[3] == b"/":
            return Path(os.fsdecode(fields[4].replace(rb"\040", b" ")))
    return None
