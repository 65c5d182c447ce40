"""Dask clusters on this machine: a scheduler and some workers, each a process of its own."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from tests.support.live import wait_for
from tests.support.targets import ending_with_us

_DASK = [str(Path(sys.executable).with_name("dask"))]
NOTHING: Mapping[str, str] = MappingProxyType({})


class DaskCluster:
    """A scheduler, and the workers that `add_worker` starts. They end with `end`."""

    def __init__(self, folder: Path, environment: Mapping[str, str] = NOTHING) -> None:
        self.folder = folder
        self.workers: list[subprocess.Popen[bytes]] = []
        self._file = folder / "scheduler.json"
        asked = ["--host=127.0.0.1", "--port=0", f"--scheduler-file={self._file}"]
        self.scheduler = self._start("scheduler", asked, environment)
        wait_for(self._read_address, what=f"a scheduler in {folder}")
        self.address = self._read_address()

    def _read_address(self) -> str:
        with contextlib.suppress(FileNotFoundError, ValueError):  # it is about to be written
            return str(json.loads(self._file.read_bytes())["address"])
        return ""

    def add_worker(
        self,
        *arguments: str,
        environment: Mapping[str, str] = NOTHING,
        working_folder: Path | None = None,
    ) -> None:
        """Start a worker with a cache of its own, and wait until the scheduler knows it."""
        name = f"worker{len(self.workers)}"
        own = {"EVERFLAME_CACHE": str(self.folder / name), **environment}
        asked = [f"--scheduler-file={self._file}", "--nthreads=1", "--memory-limit=0"]
        asked += [f"--local-directory={self.folder / name}", *(arguments or ("--no-nanny",))]
        self.workers.append(self._start(name, asked, own, "worker", working_folder))
        wait_for(lambda: "Registered to" in self.log(name))

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def end(self) -> None:
        for process in (*self.workers, self.scheduler):
            process.kill()
            process.wait()

    def _start(
        self,
        name: str,
        asked: list[str],
        environment: Mapping[str, str],
        kind: str = "scheduler",
        working_folder: Path | None = None,
    ) -> subprocess.Popen[bytes]:
        command = ending_with_us(*_DASK, kind, "--no-dashboard", *asked)
        with (self.folder / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env={**os.environ, **environment},
                cwd=working_folder,
            )


@contextlib.contextmanager
def dask_cluster(folder: Path, environment: Mapping[str, str] = NOTHING) -> Iterator[DaskCluster]:
    """Start a scheduler for the length of the block."""
    folder.mkdir()
    cluster = DaskCluster(folder, environment)
    try:
        yield cluster
    finally:
        cluster.end()
