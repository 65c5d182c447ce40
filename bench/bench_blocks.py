"""What the tables of blocks cost: bytes and CPU seconds per row written, merged, summed and read.

Workload: objects of one minute, each of 1,500 stacks of 30 frames in 4 services, drawn from a
pool that all hosts share, so that few stacks are in nearly every minute and many in one. `--hosts`
times `--minutes` of them become parts of `--objects` each, and the parts one. Then rollup rows are
made up: 5 million of 500,000 (set, stack), to be summed, and a dictionary of 500,000 stacks.

Each line is one run, its CPU time over all threads, and the process's peak of memory so far. What
is read back is checked against the sums of what was put in.

Run: `python bench/bench_blocks.py [--hosts 100] [--minutes 10] [--objects 200]`.
"""

import argparse
import functools
import resource
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import duckdb
import numpy as np

from storage.blocks.block import Block
from storage.blocks.dictionary import read_dictionary, read_label_sets
from storage.blocks.loading import insert_stacks
from storage.blocks.parquet import engine
from storage.blocks.reading import Stored, read_columns, sum_samples
from storage.blocks.rollup import Stacks
from storage.blocks.scans import LocalFile, of_table
from storage.blocks.schema import DETAIL
from storage.blocks.slices import Slice
from storage.blocks.tables import merge_parts, roll_up, write_block
from storage.columns import Columns
from storage.formats import pprof
from storage.hashing import Hasher
from storage.objects.keys import NS_PER_S, ObjectKey, object_key
from storage.profile import Accounting, Host, ProfileBuilder, Window, make_labels
from storage.query.decoding import decode_object
from symbolizer.location import AddressLocation, FileOffset, Frame, Kind, Module

START_S = 1_780_000_000 // 3600 * 3600
PERIOD_NS = NS_PER_S // 99
STACKS, DEPTH, POOL, LOCATIONS = 1_500, 30, 200_000, 20_000
SERVICES = ("search", "checkout", "gateway", "ledger")
HASHER = Hasher(b"bench" * 8)
Made = TypeVar("Made")


class Apart:
    """Makes things when they are asked for, and adds up the time that takes."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def each(self, makes: Iterable[Callable[[], Made]]) -> Iterator[Made]:
        for make in makes:
            wall, cpu = time.perf_counter(), time.process_time()
            made = make()
            self.wall += time.perf_counter() - wall
            self.cpu += time.process_time() - cpu
            yield made


def measure(name: str, make: Callable[[], Made], rows: int = 0, apart: Apart | None = None) -> Made:
    """Print what a call takes, without what was made apart."""
    apart = apart or Apart()
    wall, cpu = time.perf_counter(), time.process_time()
    made = make()
    wall = time.perf_counter() - wall - apart.wall
    cpu = time.process_time() - cpu - apart.cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    each = f", {cpu * 1e6 / rows:.2f} s per million rows" if rows else ""
    print(f"{name}: {wall:.2f} s, CPU {cpu:.2f} s{each}, peak {peak} MB", flush=True)
    return made


class Fleet:
    """Makes minutes of hosts from one pool of stacks."""

    def __init__(self) -> None:
        self._random = random = np.random.default_rng(1)
        stacks = np.empty((POOL, DEPTH), dtype=np.int64)
        stack = np.zeros(DEPTH, dtype=np.int64)
        for i in range(POOL):
            keep = int(DEPTH * random.random() ** 0.3)
            fresh = LOCATIONS * random.random(DEPTH - keep) ** 3
            stack = np.concatenate([stack[:keep], fresh.astype(np.int64)])
            stacks[i] = stack
        self._stacks = stacks
        self._module = Module("ab" * 20, "/srv/server/bin/server")
        self._order = random.permutation(POOL)

    def minute(self, host: int, minute: int) -> tuple[ObjectKey, Columns]:
        """Return a decoded object."""
        random = self._random
        picks = np.unique((POOL * random.random(8 * STACKS) ** 8).astype(np.int64))
        picks = random.permutation(picks)[:STACKS]
        chosen = self._order[picks]
        builder = ProfileBuilder(PERIOD_NS)
        builder.modules[self._module.build_id] = self._module
        numbers: dict[int, int] = {}
        samples = random.geometric(0.6, len(chosen)).tolist()
        labels = [
            make_labels({"service": name, "version": "1.2", "comm": f"{name}-{i}"})
            for name in SERVICES
            for i in range(4)
        ]
        for row, count in zip(chosen.tolist(), samples, strict=True):
            words = []
            for place in self._stacks[row].tolist():
                if place not in numbers:
                    frame = Frame(
                        f"function_{place}_of_something", "server", Kind.NATIVE, "a.cc", 7
                    )
                    location = AddressLocation(
                        self._module.build_id, FileOffset(0x1000 + 16 * place)
                    )
                    numbers[place] = builder.location(location, (frame,))
                words.append(numbers[place])
            builder.add(labels[row % len(labels)], words, count)
        start_ns = (START_S + 60 * minute) * NS_PER_S
        stored = sum(samples)
        accounting = Accounting(
            hosts=(Host(f"host-{host}", f"{host:016x}"),),
            cpus=8,
            ticks=stored + 9,
            idle=9,
            stored=stored,
            profiled_ns=60 * NS_PER_S,
            stops={"root": stored},
            services={
                make_labels({"service": name, "version": "1.2"}): 60 * NS_PER_S for name in SERVICES
            },
        )
        profile = builder.build(Window(start_ns, start_ns + 60 * NS_PER_S), accounting)
        content = pprof.encode(profile)
        key = object_key(profile, content, "default")
        return key, decode_object(key, content, HASHER)


def bench_parts(hosts: int, minutes: int, objects: int, folder: Path) -> None:
    fleet = Fleet()
    parts: list[list[LocalFile]] = []
    pairs = [(host, minute) for host in range(hosts) for minute in range(minutes)]
    total, rows = 0, 0
    for i in range(0, len(pairs), objects):
        some, apart = pairs[i : i + objects], Apart()
        makes = [functools.partial(fleet.minute, *pair) for pair in some]
        make = functools.partial(Block.of, apart.each(makes), HASHER)
        mine = len(some) * STACKS
        block = measure(f"block of {len(some)} objects", make, mine, apart)
        assert len(block.samples) == mine
        total += int(block.samples.samples.sum())
        rows += mine
        write = functools.partial(write_block, block, folder / f"part-{i}")
        parts.append(measure("  written", write, mine))
    show(parts[0], "a part")
    files = [file for part in parts for file in part]
    merged = measure(
        f"{len(parts)} parts merged", lambda: merge_parts(files, folder / "merged", HASHER), rows
    )
    show(merged, "the merged part")
    detail = of_table(merged, DETAIL)
    start_s, end_s = START_S, START_S + 3600
    sums = measure(
        f"sum of {detail[0].rows} rows of detail",
        lambda: sum_samples(detail, start_s=start_s, end_s=end_s),
        rows,
    )
    assert sums.samples.sum() == total
    detail_of = Slice(tuple(detail), ((start_s, end_s),))
    whole = Slice(tuple(merged), ((start_s, end_s),))
    columns = measure(
        "columns of all of it",
        lambda: read_columns([whole], read_label_sets(merged), lambda: Stored([detail_of], merged)),
        rows,
    )
    assert columns is not None
    assert columns.total_samples == total


def show(files: list[LocalFile], name: str) -> None:
    for file in files:
        size = file.path.stat().st_size
        each = size / max(1, file.rows)
        print(f"  {name}: {file.table} {size:,} bytes, {file.rows:,} rows, {each:.2f} bytes a row")


def bench_sums(folder: Path) -> None:
    """Sum 5 million rollup rows, of an hour's buckets each, into 500,000 (set, stack)."""
    random = np.random.default_rng(2)
    stacks = random.integers(0, 2**63, 500_000, dtype=np.uint64)
    which = random.integers(0, len(stacks), 5_000_000)
    samples = random.geometric(0.5, len(which))
    with engine(folder=folder) as opened:
        opened.register(
            "made",
            {
                "ts": (START_S + 600 * random.integers(0, 144, len(which))).astype(np.uint32),
                "part": np.full(len(which), 1, dtype=np.uint64),
                "set_id": (which % 20).astype(np.uint64),
                "stack": which,
                "samples": samples,
                "value": samples * PERIOD_NS,
            },
        )
        opened.register("ids", {"stack_id": stacks})
        query = "SELECT stack_id, []::UBIGINT[] AS frame_ids FROM ids"
        numbered = opened.write("stacks", query, folder, part=1, is_sorted=True)
        file = opened.write("samples_10m", "SELECT * FROM made", folder)
    show([file], "rollup")
    sums = measure(
        "sum of 5 million rollup rows",
        lambda: sum_samples([file, numbered], start_s=START_S, end_s=START_S + 86400),
        len(which),
    )
    assert len(sums) == len(np.unique(which))
    assert sums.samples.sum() == samples.sum()
    measure("rolled up to hours", lambda: roll_up([file, numbered], folder), len(which))


def bench_dictionary(folder: Path) -> None:
    """Read 500,000 stacks of 30 frames in 100,000 locations, and a tenth of them."""
    random = np.random.default_rng(3)
    frames = 100_000
    words = np.empty((500_000, DEPTH), dtype=np.int64)
    stack = np.zeros(DEPTH, dtype=np.int64)
    for i in range(len(words)):
        keep = int(DEPTH * random.random() ** 0.3)
        fresh = frames * random.random(DEPTH - keep) ** 3
        stack = np.concatenate([stack[:keep], fresh.astype(np.int64)])
        words[i] = stack
    words = np.unique(words, axis=0)
    ids = random.integers(0, 2**63, frames, dtype=np.uint64)
    stack_ids = random.integers(0, 2**63, len(words), dtype=np.uint64)
    offsets = np.arange(len(words) + 1) * DEPTH
    with engine(2 << 30, folder) as opened:
        opened.run("CREATE TEMP TABLE stacks (stack_id UBIGINT, frame_ids UBIGINT[])")
        stacks = Stacks(stack_ids, offsets, ids[words.reshape(-1)])
        measure("lists of stacks", lambda: insert_stacks(opened, stacks), len(words))
        opened.register("ids", {"frame_id": ids, "number": np.arange(frames)})
        queries = {
            "stacks": "SELECT * FROM stacks",
            "frames": "SELECT frame_id, 'ab' AS build_id, 16 * number AS frame_offset,"
            " '' AS function, '' AS module, 'address' AS kind, '' AS file, 0 AS first_line,"
            " 0 AS line, 2 AS name_rank, 1 AS named_s, [{'function':"
            " 'some::name::of_function_' || number, 'module': 'server', 'kind': 'native',"
            " 'file': 'src/a.cc', 'line': number % 1000}] AS names FROM ids",
            "modules": "SELECT 'ab' AS build_id, '/srv/server' AS path, 'native' AS kind,"
            " [] AS segments",
        }
        files = [
            measure(f"  {table} written", lambda t=table, q=query: opened.write(t, q, folder))
            for table, query in queries.items()
        ]
    show(files, "dictionary")
    columns = measure("dictionary read", lambda: read_dictionary(files), len(words))
    assert len(columns.stack_hashes) == len(words)
    some = np.sort(stack_ids)[::10]
    measure("a tenth of it read", lambda: read_dictionary(files, some), len(some))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hosts", type=int, default=100)
    parser.add_argument("--minutes", type=int, default=10)
    parser.add_argument("--objects", type=int, default=200)
    arguments = parser.parse_args()
    print(f"duckdb {duckdb.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("parts", "sums", "dictionary"):
            (Path(folder) / name).mkdir()
        bench_parts(arguments.hosts, arguments.minutes, arguments.objects, Path(folder) / "parts")
        bench_sums(Path(folder) / "sums")
        bench_dictionary(Path(folder) / "dictionary")


if __name__ == "__main__":
    main()
