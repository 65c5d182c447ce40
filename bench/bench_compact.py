"""What compacting an hour of a fleet in a bucket takes, and what it leaves: CPU, requests, bytes.

Workload: an hour of N hosts of fleet.py (20 by default: 1,200 objects) in a bucket of SeaweedFS on
this machine. `everflame compact` compacts copies of it with one worker process and with two, and by
way of a Dask cluster (`--cluster`) with one worker and with two, each with one thread. The results
must be equal: every row of the hour by stack and labels, host included. Requests are those that the
server counted. Machine, server and workers share two CPUs, so two workers cannot halve the time.

Bytes at rest are given for a core that is busy all day, 8.6 million samples at 99 Hz, and for one
of the hosts' CPUs. Objects (level 0) go two days after they were compacted.

With `--record MINUTES` the real agent records ten programs on this machine instead, in windows of a
minute, and what it stored is compacted, with the rollup of its hour, as if that were over: all of
it, and the first half. From these two an hour is extrapolated, each table by itself: as its bytes
grew when the minutes doubled, they are taken to grow with each further doubling (a power law, such
as that by which new words of a text become rarer), at most in proportion to time. With `--recording
STORE` that is a recording made before, whose minutes are of one hour.

Run: `python bench/bench_compact.py [--hosts 20] [--minutes 60] [--cluster] [--record MINUTES]`.
"""

import argparse
import hashlib
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import costs
import fleet
import numpy as np
from bench_agent import LOADS
from bench_store import MINUTE_S, Used, compact, copy, samples_of
from bucket import Bucket, bucket_in
from serving import EVERFLAME, Row, show

from storage.blocks.compactor import Compactor
from storage.blocks.manifest import Manifests
from storage.blocks.retention import Keep
from storage.blocks.rounds import Rounds
from storage.blocks.schema import DETAIL, DICTIONARY, ROLLUPS
from storage.objects.directory import DirectoryStore
from storage.objects.keys import CPU, DEFAULT_TENANT, NS_PER_S, ObjectKey, ObjectStore
from storage.objects.open import open_store
from storage.objects.tenant import HOUR_NS, TenantStore
from storage.profile import Window
from storage.query.query import Query
from tests.support.compaction import Inline

PERIOD_S = 1 / 99
COMPACT_MS, MEMORY_MB, AT_REST_MB = 400e3 / 60e3, 1000.0, 2.0
"""Aims: CPU an object, memory of all processes, and bytes at rest of a core and day."""
HOURS_A_DAY = 24


def content(store: ObjectStore, window: Window) -> str:
    """Return a digest of every row of a window: its labels, stack and counts."""
    with tempfile.TemporaryDirectory() as cache:
        answer = Query(TenantStore(store), Path(cache)).profile(window)
    assert not answer.coverage.skipped
    columns = answer.profile
    label_sets = sorted(set(columns.label_sets))
    number = np.array([label_sets.index(each) for each in columns.label_sets], dtype=np.int64)
    sets = number[columns.rows[:, 0]]
    stacks = columns.stack_hashes[columns.rows[:, 1]]
    order = np.lexsort((stacks, sets))
    counts = np.ascontiguousarray(columns.counts.astype(np.int64)[order])
    digest = hashlib.sha256(repr(label_sets).encode())
    for array in (sets[order], stacks[order], counts):
        digest.update(array.tobytes())
    return digest.hexdigest()


class Trial:
    """Compacts copies of a store in a bucket, and compares what becomes of them."""

    def __init__(self, bucket: Bucket, source: ObjectStore, folder: Path) -> None:
        self._bucket = bucket
        self._source = source
        self._folder = folder
        self._contents: dict[str, str] = {}
        self.figures: dict[str, float] = {}
        self._keys = [
            key for stored in source.list("v1/") if (key := ObjectKey.parse(stored.key)) is not None
        ]
        self.objects = len(self._keys)
        start_s = min(key.start_s for key in self._keys)
        end_s = max(key.start_s + key.length_s for key in self._keys)
        self.window = Window(start_s * NS_PER_S, end_s * NS_PER_S)

    def run(self, name: str, act: Callable[[str], Used]) -> Iterator[Row]:
        """Have a copy compacted by `act`, which takes its URL."""
        url = self._bucket.url(f"trial-{len(self._contents)}")
        store = open_store(url, self._bucket.endpoint)
        copy(self._source, store)
        before, started = self._bucket.counts(), time.monotonic()
        used = act(url)
        took_s = time.monotonic() - started
        requests: Counter[str] = self._bucket.counts() - before
        for stored in store.list(f"v1/{DEFAULT_TENANT}/l0/"):
            store.delete(stored.key)
        if not self._contents:
            self.figures = {
                "compact_ms": 1e3 * used.cpu_s / self.objects,
                "get_an_object": requests["GET"] / self.objects,
                "put_an_object": requests["PUT"] / self.objects,
            }
        self._contents[name] = content(store, self.window)
        assert len(set(self._contents.values())) == 1, "the results differ"
        yield f"{name}: time", took_s, "s", None
        yield "    CPU an object", 1e3 * used.cpu_s / self.objects, "ms", COMPACT_MS
        yield "    peak memory of all its processes, PSS", used.peak_mb, "MB", MEMORY_MB
        for kind in ("GET", "PUT", "LIST"):
            yield f"    {kind} requests", requests[kind], "", None

    @property
    def store(self) -> ObjectStore:
        """Return the store that was compacted first, without its objects."""
        return open_store(self._bucket.url("trial-0"), self._bucket.endpoint)


def in_cluster(workers: int, folder: Path, bucket: Bucket, url: str) -> Used:
    """Compact by the workers of a Dask cluster; CPU time is that of all of its processes."""
    from tests.support.dask_clusters import dask_cluster  # noqa: PLC0415 - needs the extra cluster

    before = _cpu_of_children()
    with dask_cluster(folder / f"dask-{workers}-{time.monotonic_ns()}") as cluster:
        for _ in range(workers):
            cluster.add_worker()
        pids = [each.pid for each in (cluster.scheduler, *cluster.workers)]
        asked = f"--cluster={cluster.address}"
        used = compact(url, bucket.endpoint, folder, asked, beside=pids)
    return used._replace(cpu_s=_cpu_of_children() - before)


def _cpu_of_children() -> float:
    used = os.times()
    return used.children_user + used.children_system


def sizes_of(store: ObjectStore) -> Counter[str]:
    """Return the bytes of all files of hours, by table."""
    sizes = Counter[str]()
    for hour in Manifests(store, DEFAULT_TENANT, CPU).list().hours.values():
        for file in hour.files:
            sizes[file.table] += file.bytes
    return sizes


def at_rest(store: ObjectStore, objects: int, cpus: int) -> Iterator[Row]:
    """Show what the tables of a store's hours take."""
    sizes = sizes_of(store)
    hours = Manifests(store, DEFAULT_TENANT, CPU).list().hours.values()
    rows = sum(file.rows for hour in hours for file in hour.files if file.table == DETAIL)
    busy_days = sum(samples_of(store).values()) * PERIOD_S / 86_400
    for table, size in sizes.most_common():
        yield f"at rest, {table}", size / 1e3, "kB", None
    for level, tables in _levels(sizes).items():
        size_mb = sum(sizes[table] for table in tables) / 1e6
        yield f"at rest, {level}", size_mb, "MB", None
        yield "    of a core busy all day", size_mb / busy_days, "MB", None
    whole_mb = sum(sizes.values()) / 1e6
    yield "at rest, all of it", whole_mb, "MB", None
    yield "    of a core busy all day", whole_mb / busy_days, "MB", AT_REST_MB
    if cpus:
        each_mb = whole_mb / cpus * HOURS_A_DAY
        yield "    of one of the hosts' CPUs, a day", each_mb, "MB", AT_REST_MB
    yield "    an object", whole_mb * 1e6 / objects, "bytes", None
    yield "detail", sizes[DETAIL] / max(1, rows), "bytes a row", None


def _levels(sizes: Counter[str]) -> dict[str, list[str]]:
    known = {
        "detail": [DETAIL, "objects", "times", "presence"],
        "stacks, frames and names": list(DICTIONARY),
        "buckets of ten minutes": [ROLLUPS[600]],
        "buckets of an hour": [ROLLUPS[3600]],
    }
    others = sizes.keys() - {table for tables in known.values() for table in tables}
    return {**known, "functions and heads": sorted(others)}


def fleet_hour(bucket: Bucket, folder: Path, options: argparse.Namespace) -> Iterator[Row]:
    source = DirectoryStore(folder / "objects")
    made = fleet.fill(
        fleet.Fleet(options.hosts, stacks=options.stacks),
        str(source.root),
        range(60 * fleet.HOUR, 60 * fleet.HOUR + options.minutes),
    )
    trial = Trial(bucket, source, folder)
    yield "objects", trial.objects, "objects", None
    yield "samples", made.samples, "samples", None
    yield "objects (level 0)", made.size_bytes / 1e6, "MB", None
    for workers in (1, 2):
        name = f"workers: {workers}"
        yield from trial.run(
            name,
            lambda url: compact(url, bucket.endpoint, folder, f"--workers={workers}"),  # noqa: B023 - it is called at once
        )
    if options.cluster:
        for workers in (1, 2):
            yield from trial.run(
                f"Dask cluster, workers: {workers}",
                lambda url: in_cluster(workers, folder, bucket, url),  # noqa: B023 - likewise
            )
    figures = {**trial.figures, "object_bytes": made.size_bytes / made.objects}
    costs.keep(options.figures, figures)
    cpus = options.hosts * fleet.CPUS * options.minutes / 60
    yield from at_rest(trial.store, trial.objects, cpus)


def record(folder: Path, minutes: int, load: str) -> DirectoryStore:
    """Run the real agent beside a load until it has stored so many windows of a minute."""
    environment = {**os.environ, "EVERFLAME_RUN": str(folder / "run")}
    command = [EVERFLAME, "agent", f"--store={folder / 'real'}", f"--spool={folder / 'spool'}"]
    with (
        LOADS[load](),
        (folder / "agent.log").open("wb") as log,
        subprocess.Popen(command, env=environment, stderr=log) as agent,
    ):
        deadline_s = time.monotonic() + 60 * minutes + 150
        while len(list((folder / "real").rglob("*-60-*.pb.gz"))) < minutes:
            assert agent.poll() is None, (folder / "agent.log").read_text()
            assert time.monotonic() < deadline_s, "no object was stored"
            time.sleep(1)
        agent.terminate()
    return DirectoryStore(folder / "real")


def compact_later(store: ObjectStore, folder: Path) -> None:
    """Compact a store in this process as if its hours had been over for a day."""

    def make(type_: str) -> Compactor:
        later_ns = time.time_ns() + 24 * HOUR_NS
        return Compactor(tenant, folder, Inline(), type_=type_, now_ns=lambda: later_ns)

    tenant = TenantStore(store)
    forever_s = 9000.0 * 86_400
    report = Rounds(tenant, folder, make, Keep(*[forever_s] * 5)).run_once()
    assert not report.problems, report.problems


def real_agent(bucket: Bucket, folder: Path, source: DirectoryStore, minutes: int) -> Iterator[Row]:
    """Extrapolate an hour of this machine from a few minutes of it."""
    whole = sorted(
        (key.start_s, stored.key)
        for stored in source.list("v1/")
        if (key := ObjectKey.parse(stored.key)) is not None and key.length_s == MINUTE_S
    )[:minutes]
    sizes: dict[int, Counter[str]] = {}
    for count in (minutes // 2, minutes):
        url = bucket.url(f"real-{count}")
        store = open_store(url, bucket.endpoint)
        store.put(f"v1/{DEFAULT_TENANT}/key", source.get(f"v1/{DEFAULT_TENANT}/key"))
        for _, key in whole[:count]:
            store.put(key, source.get(key))
        compact_later(store, folder)
        sizes[count] = sizes_of(store)
        samples = sum(samples_of(store).values())
    yield from at_rest(store, minutes, 0)
    level0 = sum(len(source.get(key)) for _, key in whole) / minutes
    half, all_of_it = sizes[minutes // 2], sizes[minutes]
    doublings = math.log2(60 / minutes) / math.log2(minutes / (minutes // 2))
    hour_bytes = sum(
        size * min(size / max(1, half[table]), minutes / (minutes // 2)) ** doublings
        for table, size in all_of_it.items()
    )
    cores = samples * PERIOD_S / (60 * minutes)
    yield "real agent: busy cores", cores, "cores", None
    yield "    an object of a minute", level0 / 1e3, "kB", None
    yield "    a core and day at level 0", level0 * 1440 / cores / 1e6, "MB", None
    for count, tables in sizes.items():
        yield f"    {count} minutes compacted", sum(tables.values()) / 1e3, "kB", None
    yield "    an hour compacted, extrapolated", hour_bytes / 1e3, "kB", None
    yield "    a core and day compacted, extrapolated", hour_bytes * 24 / cores / 1e6, "MB", 2.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hosts", type=int, default=20)
    parser.add_argument("--minutes", type=int, default=60)
    parser.add_argument("--stacks", type=int, default=fleet.STACKS, help="of a service and day")
    parser.add_argument("--cluster", action="store_true", help="also by a Dask cluster")
    parser.add_argument("--record", type=int, default=0, metavar="MINUTES")
    parser.add_argument("--recording", type=Path, help="a store for --record that is there")
    parser.add_argument("--figures", type=Path, help="a file for costs.py")
    parser.add_argument("--load", choices=LOADS, default="programs", help="beside --record")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, bucket_in(Path(name) / "weed") as bucket:
        if options.record:
            source = DirectoryStore(options.recording or Path(name) / "real")
            if not options.recording:
                source = record(Path(name), options.record, options.load)
            return 1 if show(real_agent(bucket, Path(name), source, options.record)) else 0
        return 1 if show(fleet_hour(bucket, Path(name), options)) else 0


if __name__ == "__main__":
    sys.exit(main())
