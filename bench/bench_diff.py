"""What a comparison costs: two windows of an hour, three hosts, and twelve hours before them.

The store is that of bench_query.py, whose services say which version they are and that they were
there. Asked is what the page asks the service for, `diff` with 1,200 pixels and `diff/top`, of the
last hour and the one that ended ten minutes before it; the noise comes from the past.

Cold: a new process. What was decoded is on disk, as the service keeps it by decoding ahead. Warm:
the same asked again in that process. First ever: nothing was decoded. Each line but that is the
median of several processes.

Run: `python bench/bench_diff.py [--folder FOLDER]`. The store takes minutes to make.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import orjson
from bench_query import START_NS, fill

from profiler.answers import Answers, Question
from profiler.comparison import Operand
from profiler.diff import DEFAULT_GATE, Gate
from storage.objects import DirectoryStore
from storage.profile import Window
from storage.query import HOUR_NS, Query, start_workers
from storage.selector import Selector

HOSTS, HOURS = 3, 16
END_NS = START_NS + HOURS * HOUR_NS
GAP_NS = HOUR_NS // 6
AFTER = Window(END_NS - HOUR_NS, END_NS)
BEFORE = Window(AFTER.start_ns - GAP_NS - HOUR_NS, AFTER.start_ns - GAP_NS)
SELECTOR = Selector.parse('{service="service-1"}')
RUNS = 5
GOALS_S = {"cold": 2.0, "warm": 0.5}


def ask(folder: Path, cache: Path) -> dict[str, float]:
    """Ask twice in this process, and give what it took."""
    workers = start_workers(os.cpu_count() or 1)
    store = DirectoryStore(folder)
    gate, before = Gate.parse(DEFAULT_GATE), Operand(SELECTOR, BEFORE)
    question = Question(AFTER, SELECTOR)
    took: dict[str, float] = {}
    began_s = time.perf_counter()
    answers = Answers(store, Query(store, cache, workers=workers))
    for name in GOALS_S:
        graph = answers.diff(question, before, gate, lambda: None)
        table = answers.diff_top(question, before, gate, 100, lambda: None)
        took["bytes"] = sum(
            len(orjson.dumps(each, option=orjson.OPT_SERIALIZE_NUMPY)) for each in (graph, table)
        )
        took[name] = time.perf_counter() - began_s
        began_s = time.perf_counter()
    took["positions"] = graph["noise"]["positions"]
    took["boxes"] = len(graph["nodes"]["frame"])
    took["mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    workers.shutdown()
    return took


def prepare(folder: Path, cache: Path) -> None:
    workers = start_workers(os.cpu_count() or 1)
    query = Query(DirectoryStore(folder), cache, workers=workers)
    for _ in query.prepare(Window(START_NS, END_NS)):
        pass
    workers.shutdown()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where the store is kept for another run")
    parser.add_argument("--ask", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ask:
        print(json.dumps(ask(*options.ask)))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)) / "store"
        if not folder.with_suffix(".json").exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            fill(folder, HOSTS, HOURS)

        def asked(cache: Path) -> dict[str, float]:
            command = [sys.executable, __file__, "--ask", str(folder), str(cache)]
            return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)

        first = asked(Path(temporary) / "empty")
        cache = Path(temporary) / "cache"
        prepare(folder, cache)
        runs = [asked(cache) for _ in range(RUNS)]
    missed = 0
    print(
        f"two windows of an hour, {HOSTS} hosts, {first['positions']:.0f} earlier positions,"
        f" {first['boxes']:.0f} boxes, {first['bytes'] / 1e3:.0f} kB of JSON"
    )
    for name, goal_s in GOALS_S.items():
        took_s = statistics.median(run[name] for run in runs)
        missed += took_s > goal_s
        word = "MISSED" if took_s > goal_s else "ok"
        print(f"{name:6} {took_s:8.3f} s (at most {goal_s} s: {word})")
    print(f"first ever {first['cold']:.1f} s, of which most is decoding")
    print(f"memory {statistics.median(run['mb'] for run in runs):.0f} MB without the workers")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
