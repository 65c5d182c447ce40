"""Measure what hostile files cost a reader: CPU time, memory, and the size of their symbol tables.

Each file of tests/support/hostile_files.py is read in a child process as an agent's reader does:
its identity, its unwind table, its symbols, Go's build information. A file that takes more than
1 s or 200 MB, or that a reader does not survive, fails the run. Peaks are the whole process's and
include 30 MB for Python and numpy.

Run: `python bench/bench_hostile.py [WORD...]`; with words, only the kinds that contain one of them.
"""

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.support.hostile_files import KINDS, Cost, measure  # noqa: E402

MOST_SECONDS, MOST_BYTES, MOST_STORED_BYTES = 1.0, 200_000_000, 150_000_000
HEADER = f"{'kind':60} {'CPU s':>6} {'peak MB':>8} {'table MB':>9}  outcome"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="WORD")
    words = parser.parse_args().words
    kinds = [kind for kind in KINDS if not words or any(word in kind for word in words)]
    costs: dict[str, Cost] = {}
    print(HEADER)
    with tempfile.TemporaryDirectory() as folder:
        for kind, cost in measure(kinds, Path(folder)):
            costs[kind] = cost
            print_row(kind, cost)
    print(f"\nThe worst of {len(costs)} kinds:")
    for column in ("cpu_s", "peak_bytes", "stored_bytes"):
        worst = max(costs, key=lambda kind: getattr(costs[kind], column))
        print_row(worst, costs[worst])
    beyond = [kind for kind, cost in costs.items() if not is_within(cost)]
    print(f"\n{len(beyond)} of {len(costs)} beyond the limits: {', '.join(beyond) or 'none'}")
    return bool(beyond)


def is_within(cost: Cost) -> bool:
    return (
        cost.is_read
        and cost.cpu_s <= MOST_SECONDS
        and cost.peak_bytes <= MOST_BYTES
        and cost.stored_bytes <= MOST_STORED_BYTES
    )


def print_row(kind: str, cost: Cost) -> None:
    memory, stored = cost.peak_bytes / 1e6, cost.stored_bytes / 1e6
    outcome = cost.outcome if cost.is_read else f"DIED: {cost.outcome}"
    print(f"{kind:60} {cost.cpu_s:6.2f} {memory:8.0f} {stored:9.1f}  {outcome}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
