"""`--cluster` of commands that read: a Dask cluster's workers find what this machine does.

The scheduler and its workers are processes of this machine.
"""

import contextlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.objects.directory import DirectoryStore
from tests.support import wide_stores
from tests.support.dask_clusters import DaskCluster, dask_cluster
from tests.support.live import wait_for
from tests.support.services import Client, service
from tests.support.wide_stores import DAY

pytestmark = pytest.mark.timeout(300)  # each of several processes starts for itself

ROOT = Path(__file__).parents[2]
AWAY = "tcp://127.0.0.1:1"
RUN = """
import sys
from profiler import cluster
from storage.query import wide
if "{away}" in " ".join(sys.argv):
    cluster._ANSWER_S = 2.0
wide.LEAST_OBJECTS = 40
from profiler import cli
from profiler.commands import serve
sys.exit({main}.main(sys.argv[1:]))
"""
DAY_TEXT = [f"--from={DAY.start_ns // 10**9}", f"--until={DAY.end_ns // 10**9}"]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> DirectoryStore:
    folder = tmp_path_factory.mktemp("wide")
    return wide_stores.fill(folder / "store", folder / "work")


@pytest.fixture
def cluster(tmp_path) -> Iterator[DaskCluster]:
    with dask_cluster(tmp_path / "dask") as cluster:
        for _ in range(2):
            cluster.add_worker()
        yield cluster


def start(folder: Path, store: DirectoryStore, command: str, *arguments: str) -> subprocess.Popen:
    """Start a command with a cache of its own."""
    asked = [
        sys.executable,
        "-c",
        RUN.format(main="cli", away=AWAY),
        command,
        f"--store={store.root}",
        *arguments,
    ]
    environment = {**os.environ, "EVERFLAME_CACHE": str(folder), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        asked, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def output(folder: Path, store: DirectoryStore, command: str, *arguments: str) -> tuple[str, str]:
    with start(folder, store, command, *arguments) as process:
        out, talk = process.communicate(timeout=110)
    assert process.returncode == 0, talk
    return out, talk


def has_read(cluster: DaskCluster, name: str) -> bool:
    """Return whether a worker has read anything of a store."""
    return any((cluster.folder / name / "cluster").glob("decoded-*/*"))


EDGES_S = [DAY.start_ns // 10**9 + 3600 * hours for hours in (2, 9, 15)]
SIDES = [f"{{}}@{start}..{end}" for start, end in itertools.pairwise(EDGES_S)]
COMMANDS = [
    ["export", "-o-", "--by=host,comm,pid", *DAY_TEXT],
    ["top", "--json", "--by=host", *DAY_TEXT],
    ["diff", "--json", SIDES[0], "--", SIDES[1]],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_cluster_reads_what_this_machine_does(cluster, store, tmp_path, command):
    """Workers have caches of their own, on other machines as well."""
    name, *arguments = command

    here = output(tmp_path / "here", store, *command)
    there = output(tmp_path / "there", store, name, f"--cluster={cluster.address}", *arguments)

    assert there == here
    assert has_read(cluster, "worker0") or has_read(cluster, "worker1")


def test_what_a_killed_worker_was_to_read_is_read_by_another(cluster, store, tmp_path):
    """Dask gives it to another one; the answer is the same."""
    expected = output(tmp_path / "here", store, "export", "-o-", *DAY_TEXT)
    asked = ["-o-", *DAY_TEXT, f"--cluster={cluster.address}"]

    with start(tmp_path / "there", store, "export", *asked) as process:
        wait_for(lambda: has_read(cluster, "worker0") or process.poll() is not None)
        cluster.workers[0].kill()
        found = process.communicate(timeout=110)

    assert (process.returncode, found) == (0, expected)


def test_a_command_says_that_its_cluster_is_away(store, tmp_path):
    """And reads nothing: whoever names a cluster may leave it out."""
    with start(tmp_path, store, "export", "-o-", *DAY_TEXT, f"--cluster={AWAY}") as process:
        out, talk = process.communicate(timeout=110)

    assert (process.returncode, out) == (2, "")
    assert f"the scheduler {AWAY} does not answer within 2 s" in talk
    assert "Traceback" not in talk


def total(client: Client, **parameters: str) -> int:
    """Return the sum of a flame graph; on a busy machine the first answers may come too late."""
    found: list[int] = []

    def ask() -> bool:
        with contextlib.suppress(TimeoutError):
            status, _, body = client.get("/api/v1/flamegraph", **parameters)
            if status == 200:
                found.append(json.loads(body)["total"])
            assert status in {200, 504}, body
        return bool(found)

    wait_for(ask)
    return found[0]


def test_the_service_reads_by_itself_while_its_cluster_is_away(store, tmp_path):
    """It says so once, and uses the cluster as soon as it is there."""
    (tmp_path / "store").symlink_to(store.root)
    run = ("-c", RUN.format(main="serve", away=AWAY))
    whole = {"from": str(DAY.start_ns // 10**9), "until": str(DAY.end_ns // 10**9)}
    part = {**whole, "until": str(DAY.end_ns // 10**9 - 15 * 3600)}  # half of level 0
    with dask_cluster(tmp_path / "dask") as cluster:
        cluster.add_worker()
        asked = f"--cluster={cluster.address}"
        with service(tmp_path, asked, run=run) as (_, client):
            found = total(client, **part)
            assert has_read(cluster, "worker0")
            cluster.end()

            again = total(client, **whole)

            talk = (tmp_path / "talk").read_text()
        with service(tmp_path, f"--cluster={AWAY}", f"--cache={tmp_path / 'other'}", run=run) as (
            _,
            client,
        ):
            assert total(client, **part) == found
            assert total(client, **whole) == again
            away = (tmp_path / "talk").read_text()
    assert talk.count("cannot use the cluster: lost the scheduler tcp://") == 1
    assert away.count(f"cannot use the cluster: the scheduler {AWAY} does not answer") == 1
    assert again > found > 0
