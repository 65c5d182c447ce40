"""One host's last hour from a real S3 server over HTTP: one request, and fifty clients at once.

Workload: the objects of bench_query.py, sixty of one minute each that end now, as an agent leaves
them, in a bucket of SeaweedFS on this machine that asks for keys; `everflame serve`'s real process
over it. The window begins inside an hour, so a response reads two hours, of which some parts may
still change. Server, service, its workers and the clients share this machine's CPUs.

Cold: a new process with an empty cache. Restarted: a new process over the cache of the one before.
Again: the same process asked for the same again. Medians of several runs; every response is checked
against the sum of what was put in. The page sends four requests, each over its own connection.

Then, when the page was opened once, fifty clients, each with a connection of its own, ask what
people at it ask: the hour, zooms into its boxes, single services, searches, the table, the
timeline, labels. First each about once a second, then all as fast as responses come. Memory is
that of afterwards: the service's own, and with all of its processes, those that decode included,
what they share counted once (PSS).

Run: `python bench/bench_service.py [--runs 5] [--seconds 20]`.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import bench_query
from bench_query import HOUR_NS, MINUTE_NS
from serving import Row, Serving, rss_mb, serving, show

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))

from profiler.flamegraph import flamegraph  # noqa: E402
from storage.objects.directory import DirectoryStore  # noqa: E402
from storage.objects.keys import ObjectStore  # noqa: E402
from storage.objects.open import open_store  # noqa: E402
from storage.objects.tenant import TenantStore  # noqa: E402
from storage.profile import Window  # noqa: E402
from storage.query.query import Query  # noqa: E402
from tests.support.weed import BUCKET, Weed, using_keys  # noqa: E402

CLIENTS = 50
STORE = f"s3://{BUCKET}/bench"
WIDTH_PX = 1200
ZOOMS = 200
"""Different boxes that are zoomed into, the largest ones."""

Hour = dict[str, int]


def fill(folder: Path, store: ObjectStore) -> tuple[Window, int]:
    """Put the hour that ends now into a store; return it, and its number of samples."""
    end_ns = time.time_ns() // MINUTE_NS * MINUTE_NS
    bench_query.fill(folder, hosts=1, hours=1, start_ns=end_ns - HOUR_NS)
    made = DirectoryStore(folder)
    for stored in made.list(""):
        assert store.put(stored.key, made.get(stored.key))
    return Window(end_ns - HOUR_NS, end_ns), json.loads(folder.with_suffix(".json").read_text())


def ask_hour(service: Serving, hour: Hour, samples: int) -> float:
    reply = service.get("/api/v1/flamegraph", width=WIDTH_PX, **hour)
    graph = json.loads(reply.plain)
    assert (reply.status, graph["samples"]) == (200, samples)
    assert graph["coverage"]["objects"] == 60
    return reply.took_s


def ask_page(service: Serving, hour: Hour) -> float:
    """Send the requests of a page that is opened, all at once, and wait for the last response."""
    asked = (
        ("flamegraph", {"width": WIDTH_PX}),
        ("timeline", {}),
        ("labels/service/values", {}),
        ("top", {}),
    )
    started = time.perf_counter()
    with ThreadPoolExecutor(len(asked)) as pool:
        replies = [pool.submit(service.get, f"/api/v1/{p}", **hour, **more) for p, more in asked]
        assert {reply.result().status for reply in replies} == {200}
    return time.perf_counter() - started


def single(endpoint: str, folder: Path, hour: Hour, samples: int, runs: int) -> Iterator[Row]:
    """Send one request at a time."""
    took: dict[str, list[float]] = {"cold": [], "restarted": [], "again": []}
    pages: dict[str, list[float]] = {"cold": [], "again": []}
    for run in range(runs):
        with serving(STORE, folder / f"page-{run}", f"--s3-endpoint={endpoint}") as service:
            pages["cold"].append(ask_page(service, hour))
            pages["again"] += [ask_page(service, hour) for _ in range(5)]
        cache = folder / f"cache-{run}"
        with serving(STORE, cache, f"--s3-endpoint={endpoint}") as service:
            took["cold"].append(ask_hour(service, hour, samples))
        with serving(STORE, cache, f"--s3-endpoint={endpoint}") as service:
            took["restarted"].append(ask_hour(service, hour, samples))
            took["again"] += [ask_hour(service, hour, samples) for _ in range(5)]
    for name, limit in (("cold", 1.0), ("restarted", None), ("again", 0.2)):
        yield f"flame graph of the hour, {name}", statistics.median(took[name]), "s", limit
        yield f"    longest of {len(took[name])}", max(took[name]), "s", None
    for name, times in pages.items():
        yield f"all that the page asks for at once, {name}", statistics.median(times), "s", None


def targets(hour: Hour, nodes: list[str], seed: int) -> Iterator[str]:
    """Return the request targets of one person, without end."""
    choice = random.Random(seed)
    while True:
        service = f'{{service="service-{choice.randrange(4)}"}}'
        zoom = {"node": choice.choice(nodes)}
        name = f"f_{choice.randrange(100)}"
        kinds: list[tuple[int, str, dict[str, object]]] = [
            (20, "flamegraph", {}),
            (25, "flamegraph", zoom),
            (10, "flamegraph", {"query": service}),
            (5, "flamegraph", {"search": name}),
            (3, "flamegraph", {"invert": 1}),
            (15, "top", {}),
            (2, "top", {"query": service}),
            (12, "timeline", {}),
            (3, "timeline", {"by": "comm"}),
            (5, "labels/service/values", {}),
        ]
        weights = [weight for weight, _, _ in kinds]
        _, path, parameters = choice.choices(kinds, weights)[0]
        if path == "flamegraph":
            parameters = {"width": WIDTH_PX, **parameters}
        yield f"/api/v1/{path}?{urllib.parse.urlencode({**hour, **parameters})}"


@dataclass(slots=True)
class Load:
    """What many clients saw."""

    took_s: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    span_s: float = 0.0

    def rows(self, name: str) -> Iterator[Row]:
        cuts = statistics.quantiles(self.took_s, n=100, method="inclusive")
        yield (
            f"{CLIENTS} clients, {name}: responses",
            len(self.took_s) / self.span_s,
            "a second",
            None,
        )
        yield "    half of them within (p50)", 1000 * cuts[49], "ms", None
        yield "    all but a hundredth within (p99)", 1000 * cuts[98], "ms", None
        yield "    errors", sum(self.statuses.values()) - self.statuses[200], "", 0


async def run_clients(
    service: Serving, hour: Hour, nodes: list[str], pause_s: float, seconds: float
) -> Load:
    load = Load()
    started = time.perf_counter()
    end = started + seconds
    clients = (
        run_client(service, targets(hour, nodes, seed), load, pause_s, end)
        for seed in range(CLIENTS)
    )
    await asyncio.gather(*clients)
    load.span_s = time.perf_counter() - started
    return load


async def run_client(
    service: Serving, asked: Iterator[str], load: Load, pause_s: float, end: float
) -> None:
    address = urllib.parse.urlsplit(service.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    pause = random.Random(address.port)
    for target in asked:
        if pause_s:
            await asyncio.sleep(pause.uniform(0, 2 * pause_s))
        started = time.perf_counter()
        if started > end:
            break
        request = f"GET {target} HTTP/1.1\r\nHost: {address.netloc}\r\nAccept-Encoding: gzip"
        writer.write(f"{request}\r\n\r\n".encode())
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = next(
            int(line.split(":")[1])
            for line in head.splitlines()
            if line.startswith("content-length")
        )
        await reader.readexactly(length)
        load.took_s.append(time.perf_counter() - started)
        load.statuses[int(head.split(" ", 2)[1])] += 1
    writer.close()


def many(
    endpoint: str, folder: Path, hour: Hour, nodes: list[str], seconds: float
) -> Iterator[Row]:
    """Ask from many sides at once, then look at what memory it took."""
    with serving(STORE, folder / "cache-many", f"--s3-endpoint={endpoint}") as service:
        ask_page(service, hour)
        for name, pause_s in (("a request a second each", 1.0), ("without a pause", 0.0)):
            load = asyncio.run(run_clients(service, hour, nodes, pause_s, seconds))
            yield from load.rows(name)
            unexpected = {code: n for code, n in load.statuses.items() if code != 200}
            if unexpected:
                print(f"    by status: {unexpected}")
        own, together = service.memory_mb()
        yield "the service, RSS", own, "MB", 300
        yield "the service and all its processes, PSS", together, "MB", 300
        yield "the service, peak RSS", rss_mb(service.pid, "VmHWM"), "MB", None


def find_nodes(folder: Path, hour: Window) -> list[str]:
    """Return the ids of the largest boxes of the hour."""
    profile = (
        Query(TenantStore(DirectoryStore(folder / "made")), folder / "cache").profile(hour).profile
    )
    graph = flamegraph.build(profile, ("service",), screen=flamegraph.Screen(WIDTH_PX))
    by_size = sorted(range(1, len(graph)), key=lambda node: -int(graph.total[node]))
    rest = {i for i, frame in enumerate(graph.frames) if frame.kind == "rest"}
    ids = graph.ids().tolist()
    return [f"{ids[node]:016x}" for node in by_size if graph.frame[node] not in rest][:ZOOMS]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, using_keys():
        folder = Path(name)
        weed = Weed(folder / "weed")
        weed.start()
        try:
            window, samples = fill(folder / "made", open_store(STORE, weed.endpoint))
            hour = {"from": window.start_ns // 10**6, "until": window.end_ns // 10**6}
            missed = show(single(weed.endpoint, folder, hour, samples, options.runs))
            nodes = find_nodes(folder, window)
            missed += show(many(weed.endpoint, folder, hour, nodes, options.seconds))
        finally:
            weed.stop()
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
