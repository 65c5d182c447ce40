"""What compaction costs as a fleet grows: CPU an object, memory of a batch, bytes a row.

Simulated: the same number of windows of a minute of 100, 1,000 and 10,000 hosts that run one
service with 500,000 stacks (fleet.py), drawn as arrays: what decoding an object takes does not
depend on the fleet (`bench_fleet.py --only decode`). They are folded in batches of 240, by minute:
1,000 hosts have four batches a minute, 10,000 have forty. Then all parts are merged, and the merged
one is rolled up. If cost is linear, figures an object are the same for each number of hosts.

- fold: `Block.of` and `write_block`, for each batch; drawing is not counted.
- merge: `merge_parts`; while an hour goes on a part is rewritten about three times.
- roll up: `roll_up` into buckets of an hour.

Each fleet, and each stage, in a process of its own. Sums are checked after each stage.

Run: `python bench/bench_scale.py [--hosts 100 1000 10000] [--objects 2400]`.
"""

import argparse
import functools
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import compacted_fleet
from bench_blocks import Apart
from serving import Row, show

from storage.blocks.block import Block
from storage.blocks.reading import sum_samples
from storage.blocks.scans import LocalFile, of_table
from storage.blocks.schema import DETAIL, DICTIONARY, ROLLUPS
from storage.blocks.tables import merge_parts, roll_up, write_block
from storage.columns import Columns
from storage.hashing import Hasher
from storage.objects.keys import ObjectKey

BATCH = 240
HASHER = Hasher(b"scale" * 8)
FIRST_MINUTE = 12 * 60


def fold(folder: Path, hosts: int, objects: int) -> Iterator[Row]:
    """Fold windows in batches, minute by minute."""
    made = compacted_fleet.make_fleet("one", hosts)
    dictionary = made.dictionary(HASHER)
    prepared_mb = _peak_mb()

    def window(host: int, minute: int) -> tuple[ObjectKey, Columns]:
        drawn = made.draw(host, minute)
        assert drawn is not None
        key = ObjectKey("default", made.hosts[host].host_id, drawn.window.start_ns // 10**9, 60,
                        f"{(minute << 32) + host:016x}")  # fmt: skip
        return key, made.columns(drawn, dictionary)

    pairs = [(i % hosts, FIRST_MINUTE + i // hosts) for i in range(objects)]
    pairs = [pair for pair in pairs if made.draw(*pair) is not None]
    cpu_s, rows, total = 0.0, 0, 0
    files: list[LocalFile] = []
    for i in range(0, len(pairs), BATCH):
        apart, started = Apart(), time.process_time()
        makes = [functools.partial(window, *pair) for pair in pairs[i : i + BATCH]]
        block = Block.of(apart.each(makes), HASHER)
        files += write_block(block, folder / f"part-{i:08}")
        cpu_s += time.process_time() - started - apart.cpu
        rows += len(block.samples)
        total += int(block.samples.samples.sum())
    (folder / "total.json").write_text(json.dumps(total))
    _keep(files, folder, "fold")
    yield "rows an object", rows / len(pairs), "rows", None
    yield "fold: CPU an object", 1e3 * cpu_s / len(pairs), "ms", None
    yield "fold: memory of a batch", _peak_mb() - prepared_mb, "MB", None


def merge(folder: Path, hosts: int, objects: int) -> Iterator[Row]:
    del hosts
    files = _kept(folder, "fold")
    started = time.process_time()
    merged = merge_parts(files, folder / "merged", HASHER)
    cpu_s = time.process_time() - started
    peak_mb = _peak_mb()
    _check([each for each in merged if each.table in (DETAIL, "stacks")], folder)
    _keep(merged, folder, "merge")
    sizes, rows = Counter[str](), Counter[str]()
    for each in merged:
        sizes[each.table] += each.path.stat().st_size
        rows[each.table] += each.rows
    yield "merge: CPU an object", 1e3 * cpu_s / objects, "ms", None
    yield "merge: peak memory", peak_mb, "MB", None
    yield "merged: detail", sizes[DETAIL] / rows[DETAIL], "bytes a row", None
    yield "merged: all of it", sum(sizes.values()) / objects, "bytes an object", None
    yield "merged: dictionary", sum(sizes[each] for each in DICTIONARY) / 1e6, "MB", None
    yield "merged: stacks", rows["stacks"], "stacks", None


def hourly(folder: Path, hosts: int, objects: int) -> Iterator[Row]:
    del hosts
    files = of_table(_kept(folder, "merge"), ROLLUPS[600])
    started = time.process_time()
    rolled = roll_up(files, folder / "hourly")
    cpu_s = time.process_time() - started
    _check([*rolled, *of_table(files, "stacks")], folder)
    yield "roll up: CPU an object", 1e3 * cpu_s / objects, "ms", None


def _keep(files: list[LocalFile], folder: Path, stage: str) -> None:
    """Keep the names of files for the process of the next stage."""
    kept = [(table, str(path), rows) for table, path, rows in files]
    (folder / f"{stage}.json").write_text(json.dumps(kept))


def _kept(folder: Path, stage: str) -> list[LocalFile]:
    kept = json.loads((folder / f"{stage}.json").read_text())
    return [LocalFile(table, Path(path), rows) for table, path, rows in kept]


def _check(files: list[LocalFile], folder: Path) -> None:
    sums = sum_samples(files, start_s=0, end_s=(1 << 32) - 1)
    assert int(sums.samples.sum()) == json.loads((folder / "total.json").read_text())


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


STAGES = {"fold": fold, "merge": merge, "hourly": hourly}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hosts", type=int, nargs="*", default=[100, 1_000, 10_000])
    parser.add_argument("--objects", type=int, default=10 * BATCH)
    parser.add_argument("--ask", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ask:
        stage, folder = options.ask
        rows = STAGES[stage](Path(folder), options.hosts[0], options.objects)
        print(json.dumps(list(rows)))
        return 0
    for hosts in options.hosts:
        print(f"{options.objects} windows of {hosts:,} hosts")
        with tempfile.TemporaryDirectory() as folder:
            for stage in STAGES:
                command = [sys.executable, __file__, f"--hosts={hosts}"]
                command += [f"--objects={options.objects}", "--ask", stage, folder]
                answer = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
                show(tuple(row) for row in json.loads(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
