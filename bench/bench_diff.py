"""What a comparison costs: two windows of an hour, three hosts, and twelve hours before them.

The store is that of bench_query.py, whose accountings say which versions of the services ran. The
questions are those of the page, `diff` with 1,200 pixels and `diff/top`, about the last hour and
the one that ended ten minutes before it; the noise comes from the past.

Cold: a new process, and on disk nothing but what the service has decoded ahead by then. Between:
as cold, of windows that begin some minutes after what is kept does. Warm: the same asked again in
that process. First ever: nothing was decoded. Each line but that is the median of several
processes, each with a cache of its own.

Run: `python bench/bench_diff.py [--folder FOLDER]`. The store takes minutes to make.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_query import START_NS, fill

from profiler.commands.diff import DEFAULT_GATE, Gate
from profiler.comparison.sides import Operand
from profiler.service.comparisons import Comparisons
from profiler.service.diff import diff_graph, diff_table
from profiler.service.merged import MergedProfiles, PanelRequest
from profiler.service.sharing import json_body
from storage.objects.directory import DirectoryStore
from storage.objects.tenant import TenantStore
from storage.profile import Window
from storage.query.listing import HOUR_NS
from storage.query.query import Query
from storage.query.workers import start_workers
from storage.selector import Selector

HOSTS, HOURS = 3, 16
END_NS = START_NS + HOURS * HOUR_NS
GAP_NS = HOUR_NS // 6
NOW_NS = END_NS + HOUR_NS // 10
"""Everything has arrived, and is taken for recent."""
AFTER = Window(END_NS - HOUR_NS, END_NS)
BEFORE = Window(AFTER.start_ns - GAP_NS - HOUR_NS, AFTER.start_ns - GAP_NS)
SELECTOR = Selector.parse('{service="service-1"}')
RUNS = 5
GOALS_S = {"cold": 2.0, "warm": 0.5}


def ask(folder: Path, cache: Path, shift_min: int) -> dict[str, float]:
    """Ask twice in this process, and return what it took."""
    workers = start_workers(os.cpu_count() or 1)
    store = TenantStore(DirectoryStore(folder))
    windows = (Window(*(ns - shift_min * HOUR_NS // 60 for ns in each)) for each in (BEFORE, AFTER))
    before_window, after_window = windows
    gate, before = Gate.parse(DEFAULT_GATE), Operand(SELECTOR, before_window)
    request = PanelRequest(after_window, SELECTOR)
    took: dict[str, float] = {}
    began_s = time.perf_counter()
    query = Query(store, cache, workers=workers, now_ns=lambda: NOW_NS)
    comparisons = Comparisons(MergedProfiles(store, query))
    for name in ("cold", "warm"):
        compared = comparisons.compare(request, before, lambda: None)
        graph = diff_graph(compared, request, gate, lambda: None)
        table = diff_table(compared, request, gate, 100, lambda: None)
        took["bytes"] = sum(len(json_body(each)[0]) for each in (graph, table))
        took[name] = time.perf_counter() - began_s
        began_s = time.perf_counter()
    took["positions"] = graph.noise.positions
    took["boxes"] = len(graph.nodes.frame)
    took["mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    workers.shutdown()
    return took


def prepare(folder: Path, cache: Path) -> None:
    workers = start_workers(os.cpu_count() or 1)
    query = Query(
        TenantStore(DirectoryStore(folder)), cache, workers=workers, now_ns=lambda: NOW_NS
    )
    window = Window(START_NS, END_NS)
    query.profile(window)
    query.functions(window)
    for _ in query.self_samples([window]):
        pass
    workers.shutdown()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where the store is kept for another run")
    parser.add_argument("--ask", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ask:
        store, cache, shift_min = options.ask
        print(json.dumps(ask(Path(store), Path(cache), int(shift_min))))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)) / "store"
        if not folder.with_suffix(".json").exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            fill(folder, HOSTS, HOURS)

        def asked(cache: Path, shift_min: int = 0) -> dict[str, float]:
            command = [sys.executable, __file__, "--ask", str(folder), str(cache), str(shift_min)]
            return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)

        first = asked(Path(temporary) / "empty")
        cache = Path(temporary) / "cache"
        prepare(folder, cache)
        runs = []
        for i in range(RUNS):
            copy = Path(temporary) / f"copy-{i}"
            shutil.copytree(cache, copy, copy_function=os.link)
            runs.append(asked(copy))
            runs[-1]["between"] = asked(copy, 3 + i)["cold"]
    missed = 0
    print(
        f"two windows of an hour, {HOSTS} hosts, {first['positions']:.0f} earlier positions,"
        f" {first['boxes']:.0f} boxes, {first['bytes'] / 1e3:.0f} kB of JSON"
    )
    for name, goal_s in GOALS_S.items():
        took_s = statistics.median(run[name] for run in runs)
        missed += took_s > goal_s
        word = "MISSED" if took_s > goal_s else "ok"
        print(f"{name:8} {took_s:8.3f} s (at most {goal_s} s: {word})")
    between_s = statistics.median(run["between"] for run in runs)
    print(f"between  {between_s:8.3f} s, {HOSTS * 20} objects of which are decoded")
    print(f"first ever {first['cold']:.1f} s, of which most is decoding")
    print(f"memory {statistics.median(run['mb'] for run in runs):.0f} MB without the workers")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
