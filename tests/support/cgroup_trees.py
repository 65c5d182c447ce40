"""Control groups that a test makes, in the hierarchies of this host, and removes again."""

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from profiler.processes.cgroups import parse_cgroups


def hierarchies() -> dict[str, Path]:
    """Return the mount points: `v2`, and v1's by controllers (`pids`, `name=systemd`, …)."""
    mounts = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        kind, _, options = rest.split(" ", 2)
        root, mount = fields.split()[3:5]
        if root == "/" and kind == "cgroup2":
            mounts["v2"] = Path(mount)
        elif root == "/" and kind == "cgroup":
            names = options.rpartition(" ")[2].split(",")
            mounts.update({name: Path(mount) for name in names if name not in ("rw", "ro")})
    return mounts


class CgroupTree:
    """A folder of the test's own in one hierarchy."""

    def __init__(self, mount: Path) -> None:
        self._top = Path(tempfile.mkdtemp(prefix="everflame-test-", dir=mount))

    def move(self, pid: int, path: str) -> int:
        """Move a process into a cgroup below the folder and return the cgroup's id."""
        folder = self._top / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cgroup.procs").write_text(str(pid))
        return folder.stat().st_ino

    def path(self, path: str) -> str:
        return f"/{self._top.name}/{path}"

    def remove(self, path: str = "") -> None:
        """Remove a cgroup with those below it, once their processes have gone."""
        deadline = time.monotonic() + 10
        for folder, _, _ in os.walk(self._top / path, topdown=False):
            while True:
                try:
                    Path(folder).rmdir()
                    break
                except OSError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.01)


@contextlib.contextmanager
def outside_of_units() -> Iterator[None]:
    """Take this process out of its unit or container, so that what it starts has none."""
    content = Path("/proc/self/cgroup").read_text()
    if not parse_cgroups(content.encode()).key:
        yield
        return
    with contextlib.ExitStack() as trees:
        for line in content.splitlines():
            number, names, path = line.split(":", 2)
            for name in ["v2"] if number == "0" else names.split(","):
                if path != "/" and name in hierarchies():
                    tree = trees.enter_context(cgroup_tree(name))
                    tree.move(os.getpid(), "tests")
                    home = hierarchies()[name] / path.lstrip("/") / "cgroup.procs"
                    trees.callback(home.write_text, str(os.getpid()))
        yield


@contextlib.contextmanager
def cgroup_tree(hierarchy: str) -> Iterator[CgroupTree]:
    """Make a tree. The processes in it have to have ended at the end of the block."""
    mount = hierarchies().get(hierarchy)
    if mount is None:
        pytest.skip(f"no cgroup hierarchy {hierarchy} on this machine")
    try:
        tree = CgroupTree(mount)
    except OSError as error:
        pytest.skip(f"cannot make cgroups in {mount}: {error.strerror}")
    try:
        yield tree
    finally:
        tree.remove()
