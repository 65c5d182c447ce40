"""What a question to the store costs: an hour's flame graph, a day's timeline and functions.

Workload: objects of one minute, each of 4,186 stacks of 30 frames, drawn from a host's 60,000
stacks in 6,000 locations so that few stacks are in nearly every minute and many in one; 20
processes of 4 services. (A real minute of ten programs on two busy CPUs: 3,461 rows over 2,376
locations.) An hour of one host (60 objects), and a day of three hosts (4,320 objects,
made from 60 distinct minutes per host), in a directory.

Cold: nothing is in the cache of decoded objects; the files of the store are in the page cache.
Warm: a new process, only the cache on disk is there. Every answer is checked against the sums of
what was put in. Each line is the median of several runs, each in a process of its own.

With --cluster instead a day of one host, of which nothing is compacted, cold: read by this process
with a process for each CPU, and by the workers of a Dask cluster on the same machine, one and two.
CPU time is that of all processes, and of the one that asks. All find the same.

Run: `python bench/bench_query.py [--day | --cluster] [--folder FOLDER]`. The day takes minutes to
make.
"""

import argparse
import contextlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np

from profiler.flamegraph import flamegraph
from storage.formats import pprof
from storage.formats.pprof_message import decompress
from storage.objects.directory import DirectoryStore
from storage.objects.keys import DEFAULT_TENANT, NS_PER_S, ObjectKey, content16
from storage.objects.tenant import TenantStore
from storage.profile import Accounting, Host, ProfileBuilder, Window, make_labels
from storage.query.listing import HOUR_NS
from storage.query.query import Query
from storage.query.workers import start_workers
from symbolizer.location import AddressLocation, FileOffset, Frame, Kind, Module

START_NS = 1_780_000_000_000_000_000 // (24 * HOUR_NS) * (24 * HOUR_NS)
MINUTE_NS = 60_000_000_000
PERIOD_NS = 1_000_000_000 // 99
STACKS, DEPTH, POOL, LOCATIONS, FUNCTIONS = 4_186, 30, 60_000, 6_000, 4_000
HOSTS = ("web-1", "web-2", "web-3")
RUNS = 5


def make_minutes(host: str, count: int) -> list[bytes]:
    """Return the encoded windows of one host, all at the same time."""
    random = np.random.default_rng(len(host) + ord(host[-1]))
    stacks = np.empty((POOL, DEPTH), dtype=np.int64)
    stack = np.zeros(DEPTH, dtype=np.int64)
    for i in range(POOL):
        keep = random.integers(0, DEPTH)
        fresh = LOCATIONS * random.random(DEPTH - keep) ** 3
        stack = np.concatenate([stack[:keep], fresh.astype(np.int64)])
        stacks[i] = stack
    # Rank-frequency as a power law: some stacks are in every minute, most in few.
    weights = 1 / (np.arange(POOL) + 50)
    weights /= weights.sum()
    return [make_minute(host, stacks, weights, random) for _ in range(count)]


def make_minute(
    host: str, stacks: np.ndarray, weights: np.ndarray, random: np.random.Generator
) -> bytes:
    chosen = np.sort(random.choice(POOL, STACKS, replace=False, p=weights))
    builder = ProfileBuilder(PERIOD_NS)
    modules = [Module(f"{i:040x}", f"/usr/lib/x86_64/libpart{i}.so.{i}") for i in range(30)]
    builder.modules.update({module.build_id: module for module in modules})
    used = np.unique(stacks[chosen])
    numbers = np.zeros(LOCATIONS, dtype=np.int64)
    for place in used.tolist():
        module = modules[place % 30]
        function = f"ns{place % 17}::module_{place % FUNCTIONS % 400}::f_{place % FUNCTIONS}"
        frame = Frame(function, module.name, Kind.NATIVE, f"/src/{place % 400}.cc", place % 999)
        numbers[place] = builder.location(
            AddressLocation(module.build_id, FileOffset(4096 + 16 * place)), (frame,)
        )
    stored = 0
    for i in chosen.tolist():
        process = i % 20
        labels = {
            "service": f"service-{process % 4}",
            "version": "1.5.2",
            "comm": f"worker-{process}",
            "pid": str(1000 + process),
            "thread": f"pool-{i % 3}",
        }
        samples = 1 + int(random.exponential(1.8))
        stored += samples
        builder.add(make_labels(labels), numbers[stacks[i]], samples)
    accounting = Accounting(
        hosts=(Host(host, f"{HOSTS.index(host):016x}"),),
        cpus=2,
        ticks=stored,
        stored=stored,
        profiled_ns=MINUTE_NS,
        services={
            make_labels({"service": f"service-{i}", "version": "1.5.2"}): MINUTE_NS
            for i in range(4)
        },
        nonidle_ns=stored * PERIOD_NS,
    )
    return pprof.encode(builder.build(Window(START_NS, START_NS + MINUTE_NS), accounting))


def fill(folder: Path, hosts: int, hours: int, start_ns: int = START_NS) -> None:
    """Make a store; the note beside it says how many samples it holds."""
    store = DirectoryStore(folder)
    samples = 0
    for host in HOSTS[:hosts]:
        contents = [decompress(each) for each in make_minutes(host, 60)]
        counts = [pprof.decode(each).total_samples for each in contents]
        for minute in range(60 * hours):
            put(store, host, contents[minute % 60], start_ns + minute * MINUTE_NS)
            samples += counts[minute % 60]
    folder.with_suffix(".json").write_text(json.dumps(samples))


def put(store: DirectoryStore, host: str, content: bytes, start_ns: int) -> None:
    """Store a profile at another minute: its window stands once, in a JSON comment."""
    here, there = (
        f'"window":[{start},{start + MINUTE_NS}]'.encode() for start in (START_NS, start_ns)
    )
    assert content.count(here) == 1
    deflater = zlib.compressobj(1, zlib.DEFLATED, wbits=31)
    encoded = deflater.compress(content.replace(here, there)) + deflater.flush()
    key = ObjectKey(
        DEFAULT_TENANT,
        f"{HOSTS.index(host):016x}",
        start_ns // NS_PER_S,
        MINUTE_NS // NS_PER_S,
        content16(encoded),
    )
    # Without fsync, which is not what is measured here.
    path = store.root / key.text
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded)


def ask(question: str, folder: Path, cache: Path) -> dict[str, float | int]:
    """Answer one question in this process and return what it took."""
    # As the service does, once, when it starts.
    workers = start_workers(os.cpu_count() or 1)
    started = time.perf_counter()
    query = Query(TenantStore(DirectoryStore(folder)), cache, workers=workers)
    hour = Window(START_NS, START_NS + HOUR_NS)
    # The same length, but across two hours: these objects are kept one by one.
    moving = Window(START_NS + HOUR_NS // 2, START_NS + 3 * HOUR_NS // 2)
    day = Window(START_NS, START_NS + 24 * HOUR_NS)
    took = {}
    if question in {"hour", "moving"}:
        answer = query.profile(hour if question == "hour" else moving)
        took["objects"], took["samples"] = answer.coverage.objects, answer.profile.total_samples
        took["stacks"] = len(answer.profile.stack_offsets) - 1
        took["locations"] = len(answer.profile.locations)
        took["profile_s"] = time.perf_counter() - started
        graph = flamegraph.build(answer.profile, ("service",), screen=flamegraph.Screen(1200))
        assert graph.total[0] == answer.profile.total_value
        took["with_graph_s"] = time.perf_counter() - started
    else:
        timeline = query.timeline(day, step_ns=5 * MINUTE_NS, by=("service",))
        took["timeline_s"] = time.perf_counter() - started
        functions = query.functions(day, limit=1000)
        took["both_s"] = time.perf_counter() - started
        took["objects"], took["samples"] = timeline.coverage.objects, functions.samples
        assert sum(int(each.samples.sum()) for each in timeline.series) == functions.samples
    workers.shutdown()
    took["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return took


def ask_wide(folder: Path, cache: Path, cluster: str) -> dict[str, float | int]:
    """Read a day in this process, or by a cluster; return what it took."""
    from profiler.cluster import ClusterExecutor  # noqa: PLC0415 - needs the extra cluster

    workers = None if cluster else start_workers(os.cpu_count() or 1)
    executor = ClusterExecutor(cluster) if cluster else None
    started, before_s = time.perf_counter(), time.process_time()
    query = Query(TenantStore(DirectoryStore(folder)), cache, workers=workers, executor=executor)
    answer = query.profile(Window(START_NS, START_NS + 24 * HOUR_NS))
    took = {"took_s": time.perf_counter() - started, "own_s": time.process_time() - before_s}
    for each in (workers, executor):
        if each is not None:
            each.shutdown()
    counts = answer.profile.counts.sum(axis=0)
    stacks = np.sort(answer.profile.stack_hashes)
    return {
        **took,
        "objects": answer.coverage.objects,
        "samples": answer.profile.total_samples,
        "content": zlib.crc32(stacks.tobytes(), int(counts[1]) % 2**32),
    }


def measure_wide(folder: Path) -> None:
    """Print what a day takes by this machine alone, and by clusters of one and two workers."""
    from tests.support.dask_clusters import dask_cluster  # noqa: PLC0415 - likewise

    found = []
    for workers in (0, 1, 2):
        with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
            before_s = children_s()
            command = [sys.executable, __file__, "--ask", "wide", "--folder", str(folder)]
            command += ["--cache", f"{name}/cache"]
            if workers:
                cluster = dask_cluster(Path(name) / "dask")
                running = stack.enter_context(cluster)
                for _ in range(workers):
                    running.add_worker()
                command += ["--address", running.address]
            # The repository is where tests.support is.
            environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
            done = subprocess.run(command, check=True, capture_output=True, env=environment)
            found.append(json.loads(done.stdout))
            stack.close()
            found[-1]["all_s"] = children_s() - before_s
    assert len({(each["samples"], each["objects"], each["content"]) for each in found}) == 1
    assert found[0]["samples"] == json.loads(folder.with_suffix(".json").read_text())
    print(f"a day of {found[0]['objects']:,} objects, nothing compacted, nothing cached")
    names = ("by itself", "a cluster of one worker", "a cluster of two workers")
    for name, each in zip(names, found, strict=True):
        cpu = f"CPU {each['all_s']:.1f} s, {each['own_s']:.1f} s of it where it is asked"
        print(f"  {name}: {each['took_s']:.1f} s, {cpu}")
    print(f"  two workers against one: {found[2]['took_s'] / found[1]['took_s']:.2f} of the time")


def children_s() -> float:
    used = os.times()
    return used.children_user + used.children_system


def measure(question: str, folder: Path, cache: Path, is_cold: bool, runs: int) -> None:
    answers = []
    for _ in range(runs):
        if is_cold:
            shutil.rmtree(cache, ignore_errors=True)
        command = [sys.executable, __file__, "--ask", question, "--folder", str(folder)]
        command += ["--cache", str(cache)]
        answers.append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
    shown = []
    for name in answers[0]:
        values = sorted(answer[name] for answer in answers)
        if name.endswith("_s"):
            shown.append(
                f"{name} {statistics.median(values):.3f} ({values[0]:.3f}..{values[-1]:.3f})"
            )
        else:
            shown.append(f"{name} {values[-1]:,}")
    whole = json.loads(folder.with_suffix(".json").read_text())
    expected = {"day": whole, "hour": whole // 2, "moving": whole // 2}[question]
    assert {answer["samples"] for answer in answers} == {expected}
    size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    print(f"{question} {'cold' if is_cold else 'warm'}: {', '.join(shown)}, cache {size >> 20} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--day", action="store_true", help="also 24 hours of 3 hosts")
    parser.add_argument("--cluster", action="store_true", help="a day, also by a Dask cluster")
    parser.add_argument("--folder", type=Path, help="where the stores are made and kept")
    parser.add_argument("--ask", help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--address", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ask == "wide":
        print(json.dumps(ask_wide(options.folder, options.cache, options.address)))
        return
    if options.ask:
        print(json.dumps(ask(options.ask, options.folder, options.cache)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if options.cluster:
            if not (folder / "wide").exists():
                fill(folder / "wide", hosts=1, hours=24)
            measure_wide(folder / "wide")
            return
        hour, day = folder / "hour", folder / "day"
        if not hour.exists():
            fill(hour, hosts=1, hours=2)
        for question in ("hour", "moving"):
            measure(question, hour, folder / f"cache-{question}", True, RUNS)
            measure(question, hour, folder / f"cache-{question}", False, RUNS)
        if options.day:
            if not day.exists():
                fill(day, hosts=3, hours=24)
            measure("day", day, folder / "cache-day", True, 1)
            measure("day", day, folder / "cache-day", False, RUNS)


if __name__ == "__main__":
    main()
