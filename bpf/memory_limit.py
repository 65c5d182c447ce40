"""The memory that this process may take: the limits of its cgroup, and whether they were reached.

Both hierarchies are read, the unified one (memory.max, memory.events: cgroup-v2.rst) and the older
one (memory.limit_in_bytes, memory.oom_control: cgroup-v1/memory.rst). What cannot be read limits
nothing.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_MOUNT = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60
"""The older hierarchy has no word for it, but the largest multiple of a page."""


class MemoryLimit(NamedTuple):
    """The lowest limit, None without one, and how often the kernel has killed for it."""

    limit_bytes: int | None
    kills: int


def memory_limit() -> MemoryLimit:
    """Return the lowest limit of this process's cgroup and those above it, and its kills."""
    limits, kills = [], 0
    for folder, limit_file, events_file in _groups():
        text = _read(folder / limit_file).strip()
        if text.isdecimal() and int(text) < _UNLIMITED:
            limits.append(int(text))
        for line in _read(folder / events_file).splitlines():
            name, _, number = line.partition(" ")
            if name == "oom_kill" and number.isdecimal():
                kills += int(number)
    return MemoryLimit(min(limits, default=None), kills)


def _groups() -> Iterator[tuple[Path, str, str]]:
    """Return the folder of each cgroup from this process's up, and its two files."""
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            root = _MOUNT if (_MOUNT / "cgroup.controllers").exists() else _MOUNT / "unified"
            files = "memory.max", "memory.events"
        elif "memory" in controllers.split(","):
            root = _MOUNT / controllers
            files = "memory.limit_in_bytes", "memory.oom_control"
        else:
            continue
        # A container sees the host's path without a cgroup namespace, and its own group as root.
        for folder in (root / path.strip("/"), *(root / path.strip("/")).parents):
            if folder.is_relative_to(root):
                yield folder, *files


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
