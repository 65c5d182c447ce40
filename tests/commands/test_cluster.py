"""`everflame compact --cluster`: the same result from the workers of a Dask cluster, or an error.

The scheduler and its workers are processes of this machine. This process imports no Dask.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pytest

from storage.objects.keys import ObjectStore
from storage.objects.open import open_store
from storage.objects.tenant_key import KEY_BYTES
from tests.support.compaction import (
    DAY_S,
    HOUR_S,
    Expected,
    Sums,
    hour_manifests,
    profile,
    queried,
    read_store,
)
from tests.support.dask_clusters import DaskCluster, dask_cluster
from tests.support.live import wait_for
from tests.support.weed import BUCKET, KEYS, Weed, using_keys

ROOT = Path(__file__).parents[2]
COMMAND = """
import sys
from profiler import cli, cluster
cluster._ANSWER_S = 2.0
sys.exit(cli.main(sys.argv[1:]))
"""
SCRIPT = """
import os, sys, time
from concurrent.futures import BrokenExecutor
from profiler import cluster

executor = cluster.ClusterExecutor(sys.argv[1], memory_bytes=1 << 30)
cluster._ANSWER_S = 2.0

def error_of(act, *things):
    try:
        sys.exit(f"no error, but {executor.submit(act, *things).result(60)}")
    except Exception as error:
        return error

assert isinstance(error_of(os._exit, 3), BrokenExecutor)
assert executor.submit(os.getpid).result(60) != os.getpid()
assert executor.lone_worker().run(os.getpid) != os.getpid()
assert isinstance(error_of(int, "x"), ValueError)
cancelled = [executor.submit(time.sleep, 0.1) for _ in range(3)]
assert cancelled[-1].cancel()
assert cancelled[0].result(60) is None
waiting = executor.submit(time.sleep, 100)
os.kill(int(sys.argv[2]), 9)
try:
    waiting.result(60)
except cluster.ClusterError as error:
    assert "lost the scheduler tcp://" in str(error), error
assert "does not answer" in str(error_of(os.getpid))
executor.shutdown()
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[DaskCluster]:
    """Two workers, which have the credentials of the bucket in their environment."""
    with dask_cluster(tmp_path_factory.mktemp("dask") / "cluster") as cluster:
        for _ in range(2):
            cluster.add_worker(environment=KEYS)
        yield cluster


@pytest.fixture(params=["directory", "s3"])
def shared(request, tmp_path) -> Iterator[tuple[ObjectStore, list[str]]]:
    """Return a store that workers reach as well, and the options that name it."""
    if request.param == "directory":
        url = str(tmp_path / "shared")
        yield open_store(url), ["--store", url]
        return
    weed: Weed = request.getfixturevalue("weed")
    with using_keys():
        url = f"s3://{BUCKET}/{tmp_path.name}"
        yield open_store(url, weed.endpoint), ["--store", url, "--s3-endpoint", weed.endpoint]


START_S = int(time.time()) // DAY_S * DAY_S - 2 * DAY_S


def fill(store: ObjectStore, hours: int = 2) -> Expected:
    """Store the same objects and the same key each time."""
    expected = Expected(store)
    store.put("v1/default/key", b"k" * KEY_BYTES)
    for hour in range(hours):
        for host in range(1, 4):
            for minute in range(3):
                expected.put(profile(START_S + hour * HOUR_S + 60 * minute, host, minute))
    return expected


def compact(folder: Path, *arguments: str, code: str = COMMAND, cwd: Path = ROOT) -> Any:
    command = [sys.executable, "-c", code, "compact", *arguments]
    environment = {**os.environ, "EVERFLAME_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, env=environment, cwd=cwd, capture_output=True, text=True, check=False
    )


def contents_of(store: ObjectStore) -> dict[tuple[str, str], list[tuple[Any, ...]]]:
    """Return the rows of all tables of all hours and days."""
    found = {}
    prefix = "v1/default/manifests/cpu/"
    for each in store.list(prefix):
        manifest = orjson.loads(store.get(each.key))
        files = manifest.get("files", [])
        files += [file for part in manifest.get("parts", []) for file in part["files"]]
        files += (manifest.get("hourly") or {}).get("files", [])
        for table in {file["table"] for file in files}:
            some = [file for file in files if file["table"] == table]
            rows = queried(store, some, "SELECT COLUMNS(* EXCLUDE (filename))::VARCHAR FROM files")
            found[each.key, table] = sorted(rows, key=repr)
    return found


class Here(NamedTuple):
    """What a compaction by this machine alone says and makes."""

    said: str
    total: Sums
    contents: dict[tuple[str, str], list[tuple[Any, ...]]]


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Here:
    folder = tmp_path_factory.mktemp("here")
    expected = fill(open_store(str(folder / "store")))
    alone = compact(folder, "--store", str(folder / "store"), "--workers=1")
    assert alone.returncode == 0, alone.stderr
    return Here(alone.stdout, expected.total, contents_of(expected.store))


def test_a_cluster_makes_the_same_as_this_machine(cluster, shared, here, tmp_path) -> None:
    """To the last row of every table, in a directory and in a bucket."""
    store, where = shared
    by_cluster = fill(store)

    done = compact(tmp_path, *where, "--cluster", cluster.address)

    assert done.returncode == 0, done.stderr
    assert done.stdout == here.said
    assert read_store(by_cluster) == by_cluster.total == here.total
    assert contents_of(by_cluster.store) == here.contents


def test_the_work_of_a_killed_worker_is_done_by_another(cluster, tmp_path) -> None:
    """Nothing is lost, and nothing counts twice."""
    expected = fill(open_store(str(tmp_path / "store")), hours=4)
    asked = ["compact", "--store", str(tmp_path / "store"), "--cluster", cluster.address]
    cluster.add_worker()
    environment = {**os.environ, "EVERFLAME_CACHE": str(tmp_path / "cache")}

    with subprocess.Popen(
        [sys.executable, "-c", COMMAND, *asked],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    ) as process:
        wait_for(lambda: next(expected.store.list("v1/default/blocks/"), None) is not None)
        cluster.workers[-1].kill()
        assert process.wait(100) == 0

    assert read_store(expected) == expected.total
    assert all(each["hourly"] for each in hour_manifests(expected.store).values())


def test_what_goes_wrong_is_told_as_a_pool_tells_it(tmp_path) -> None:
    """Work that kills workers breaks the pool, so a compactor finds out what does; a scheduler that
    goes away ends what waits, with an error that names it."""
    environment = {"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "0"}
    with dask_cluster(tmp_path / "cluster", environment) as cluster:
        cluster.add_worker("--nanny")
        command = [sys.executable, "-c", SCRIPT, cluster.address, str(cluster.scheduler.pid)]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=100
        )

    assert (done.returncode, done.stderr) == (0, "")


def test_a_cluster_that_cannot_be_used_is_said(tmp_path) -> None:
    """Before anything is compacted, with what to do about it.

    To a worker that does not share the folder all objects would be gone, and it would write files
    where nobody reads them.
    """
    fill(open_store(str(tmp_path / "store")))
    where = ["--store", str(tmp_path / "store"), "--cluster"]
    without_dask = "import sys; sys.modules['distributed'] = None\n" + COMMAND

    missing = compact(tmp_path, *where, "tcp://127.0.0.1:1", code=without_dask)
    away = compact(tmp_path, *where, "tcp://127.0.0.1:1")
    wrong = compact(tmp_path, *where, "scheduler:8786")
    dry = compact(tmp_path, *where, "tcp://127.0.0.1:1", "--dry-run")
    with dask_cluster(tmp_path / "cluster") as cluster:
        empty = compact(tmp_path, *where, cluster.address)
        (tmp_path / "other/duckdb-0.0.1.dist-info").mkdir(parents=True)
        metadata = tmp_path / "other/duckdb-0.0.1.dist-info/METADATA"
        metadata.write_text("Metadata-Version: 2.1\nName: duckdb\nVersion: 0.0.1\n")
        cluster.add_worker(environment={"PYTHONPATH": str(tmp_path / "other")})
        differs = compact(tmp_path, *where, cluster.address)
        cluster.workers[0].kill()
        cluster.workers[0].wait()
        cluster.add_worker(working_folder=tmp_path / "other")
        own_folder = ["--store", "/proc/self/cwd/store", "--cluster", cluster.address]
        apart = compact(tmp_path, *own_folder, cwd=tmp_path)

    for done, reason in (
        (missing, "Dask is not installed (pip install 'everflame[cluster]')"),
        (away, "the scheduler tcp://127.0.0.1:1 does not answer"),
        (wrong, "'scheduler:8786' is not the address of a scheduler"),
        (empty, "has no workers (start one on each machine: dask worker tcp://"),
        (differs, "has duckdb 0.0.1, and whoever hands in work duckdb "),
        (apart, "a worker does not see the same store as /proc/self/cwd/store"),
    ):
        assert (done.returncode, reason in done.stderr) == (2, True), (reason, done.stderr)
        assert "Traceback" not in done.stderr
    assert dry.returncode == 0
    assert not (tmp_path / "other/store").exists()
    assert hour_manifests(open_store(str(tmp_path / "store"))) == {}
