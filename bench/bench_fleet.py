"""What an hour of a fleet costs: to make, to keep, to read; level 0 beside other ways to store it.

Workload: an hour of N hosts of fleet.py (10 by default, 600 objects of 1,500 stacks), as level-0
objects in a directory, and the same rows in one Parquet file with the stack as folded text. The
question is the whole hour as one profile. All answers must have the same samples.

- `Query` over level 0: what the service does today, with nothing cached, and a worker per CPU.
- `protobuf`: each object is parsed and its samples are added up by location and label, as
  `pprof -proto` merges files.
- `pprof`: Go's own `go tool pprof -proto` merges the files, if there is Go.
- the compacted store (`everflame compact`, workers and all), read by `Query` with nothing cached.
- `DuckDB`: SELECT stack, SUM(samples) GROUP BY stack, over the Parquet file of folded text.

Each is measured in a process of its own; the files are in the page cache. Peak memory is that of
all its processes.

Run: `python bench/bench_fleet.py [--hosts 10] [--minutes 60] [--folder FOLDER] [--only NAME ...]`.
"""

import argparse
import contextlib
import gzip
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import fleet
import numpy as np
from serving import EVERFLAME, Row, all_pids, pss_mb, rss_mb, show

from storage.blocks.manifest import Manifests
from storage.blocks.retention import LEVELS
from storage.blocks.schema import DETAIL, DICTIONARY
from storage.columns import Columns
from storage.formats import pprof, pprof_arrays
from storage.formats.pprof_message import ProfileMessage, decompress
from storage.hashing import Hasher
from storage.objects.directory import DirectoryStore
from storage.objects.keys import CPU, DEFAULT_TENANT, NS_PER_S, ObjectKey, hour_of
from storage.objects.tenant import TenantStore
from storage.objects.tenant_key import read_tenant_key
from storage.profile import ALWAYS, Profile, Window
from storage.query.decoding import decode_object
from storage.query.query import Query
from storage.query.workers import start_workers
from symbolizer.location import Frame, Location

MAKE_MS, DECODE_MS, COMPACT_MS = 5.0, 4.0, 400e3 / 60e3
"""CPU time that an object may take: an hour of 1,000 hosts are 60,000, to be read in 400 s."""
_DECODED = 600
_FIRST_MINUTE = 60 * fleet.HOUR
_PARQUET = "folded.parquet"


def objects_in(folder: Path) -> Iterator[tuple[ObjectKey, bytes]]:
    store = TenantStore(DirectoryStore(folder / "store"))
    for key, stored in store.list_window(ALWAYS):
        yield key, store.store.get(stored.key)


def hasher_of(folder: Path) -> Hasher:
    return Hasher(read_tenant_key(DirectoryStore(folder / "store"), "default"))


def check() -> None:
    """Assert of a small fleet that its objects are what its arrays say, and read fast."""
    small = fleet.Fleet(4, stacks=4_000)
    hasher = Hasher(b"k" * 32)
    dictionary = small.dictionary(hasher)
    shapes = set()
    for host in range(4):
        for minute in range(_FIRST_MINUTE + 10, _FIRST_MINUTE + 50):
            drawn = small.draw(host, minute)
            if drawn is None or drawn.running in shapes:
                continue
            shapes.add(drawn.running)
            content = small.encode(drawn)
            mine = small.columns(drawn, dictionary).to_profile()
            read = decode_object(small.key(drawn, content), content, hasher).to_profile()
            assert read == mine
            assert _names(read) == _names(mine)
            fast = pprof_arrays._decode_ours(decompress(content), hasher)  # noqa: SLF001 - not the other
            assert fast.to_profile() == pprof.decode(content)
            assert mine.accounting.mismatch == 0
            assert mine.accounting.stored == mine.total_samples
    assert len(shapes) > 4, "no deployment was seen"


def _names(profile: Profile) -> dict[Location, tuple[Frame, ...]]:
    used = np.unique(profile.stack_locations).tolist()
    return {profile.locations[i]: profile.frames(i) for i in used}


def make(folder: Path, hosts: int, minutes: int, stacks: int) -> Iterator[Row]:
    """Make the level-0 objects, after a small fleet was checked."""
    check()
    started = time.monotonic()
    made_fleet = fleet.Fleet(hosts, stacks=stacks)
    prepared = time.monotonic()
    span = range(_FIRST_MINUTE, _FIRST_MINUTE + minutes)
    made = fleet.fill(made_fleet, str(folder / "store"), span)
    took_s = time.monotonic() - prepared
    (folder / "made.json").write_text(json.dumps(made._asdict()))
    yield "make: call trees of 6 programs", prepared - started, "s", None
    yield "make: objects", made.objects, "objects", None
    yield "make: all of them", took_s, "s", None
    yield "make: CPU an object", made.cpu_s / made.objects * 1e3, "ms", MAKE_MS
    started_cpu = time.process_time()
    drawn = [made_fleet.draw(i % hosts, span[i // hosts]) for i in range(min(hosts * minutes, 200))]
    drawing = (time.process_time() - started_cpu) / len(drawn)
    yield "make: CPU an object, as arrays alone", drawing * 1e3, "ms", None
    yield "make: rows an object", made.rows / made.objects, "rows", None
    yield "make: samples an object", made.samples / made.objects, "samples", None


def decode(folder: Path) -> Iterator[Row]:
    """Decode objects one by one, in a worker as a service or a compactor has them."""
    contents = [content for _, content in itertools.islice(objects_in(folder), _DECODED)]
    key = read_tenant_key(DirectoryStore(folder / "store"), "default")
    workers = start_workers(1)
    took = workers.submit(decode_all, contents, key).result()
    workers.shutdown()
    count = len(contents)
    plain = sum(len(decompress(content)) for content in contents)
    yield "this machine: 10 million additions in Python", took["additions"], "s", None
    yield "decode: compressed object", sum(map(len, contents)) / count / 1e3, "kB", None
    yield "decode: object", plain / count / 1e3, "kB", None
    yield "decode: stacks of an object", took["stacks"] / count, "stacks", None
    yield "decode: locations of an object", took["locations"] / count, "locations", None
    yield "decode: CPU an object, texts new", took["first"] / count * 1e3, "ms", None
    yield "decode: CPU an object", took["again"] / count * 1e3, "ms", DECODE_MS
    yield "decode: of it inflating", took["inflating"] / count * 1e3, "ms", None


def decode_all(contents: list[bytes], key: bytes) -> dict[str, float]:
    """Return CPU times for all objects, and how much they hold."""
    hasher = Hasher(key)
    times = {"first": 0.0, "again": 0.0, "inflating": 0.0, "additions": 0.0}
    stacks = locations = 0
    for name in times:
        started = time.process_time()
        if name == "inflating":
            for content in contents:
                decompress(content)
        elif name == "additions":
            number = 0
            for i in range(10_000_000):
                number += i
        else:
            for content in contents:
                columns = pprof_arrays.decode(content, hasher)
                stacks += len(columns.stack_hashes)
                locations += len(columns.locations)
        times[name] = time.process_time() - started
    return {**times, "stacks": stacks / 2, "locations": locations / 2}


def query(folder: Path) -> Iterator[Row]:
    """Ask for the whole hour as the service does, with an empty cache."""
    workers = start_workers(os.cpu_count() or 1)
    store = TenantStore(DirectoryStore(folder / "store"))
    with tempfile.TemporaryDirectory() as cache:
        started = time.perf_counter()
        answer = Query(store, Path(cache), workers=workers).profile(_hour())
        took_s = time.perf_counter() - started
        started = time.perf_counter()
        again = Query(store, Path(cache), workers=workers).profile(_hour())
        again_s = time.perf_counter() - started
    peak_mb = sum(rss_mb(pid, "VmHWM") for pid in all_pids(os.getpid()))
    workers.shutdown()
    assert not answer.coverage.skipped
    assert answer.profile.total_samples == again.profile.total_samples == _samples(folder)
    yield "level 0: at rest", _size_mb(folder / "store"), "MB", None
    yield "level 0, Query: stacks", len(answer.profile.stack_hashes), "stacks", None
    yield "level 0, Query: hour, nothing cached", took_s, "s", None
    yield "level 0, Query: hour, cached", again_s, "s", None
    yield "level 0, Query: peak memory", peak_mb, "MB", None


def protobuf(folder: Path) -> Iterator[Row]:
    """Merge objects one by one, as pprof's own tool does."""
    started = time.perf_counter()
    counts: Counter[tuple[object, ...]] = Counter()
    numbers: dict[tuple[object, ...], int] = {}
    for _, content in objects_in(folder):
        _merge(counts, numbers, content)
    took_s = time.perf_counter() - started
    assert sum(counts.values()) == _samples(folder)
    yield "level 0, protobuf: rows", len(counts), "rows", None
    yield "level 0, protobuf: hour", took_s, "s", None
    yield "level 0, protobuf: peak memory", rss_mb(os.getpid(), "VmHWM"), "MB", None


def pprof_tool(folder: Path) -> Iterator[Row]:
    """Have pprof itself merge the objects, which keeps labels."""
    go, merged = shutil.which("go"), folder / "merged.pb.gz"
    if go is None:
        return
    paths = sorted(map(str, (folder / "store").rglob("*.pb.gz")))
    command = [go, "tool", "pprof", "-proto", f"-output={merged}", *paths]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    took_s = time.perf_counter() - started
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    parsed = ProfileMessage()
    parsed.ParseFromString(gzip.decompress(merged.read_bytes()))
    assert sum(sample.value[0] for sample in parsed.sample) == _samples(folder)
    yield "level 0, go tool pprof: rows", len(parsed.sample), "rows", None
    yield "level 0, go tool pprof: hour", took_s, "s", None
    yield "level 0, go tool pprof: CPU", sum(used[:2]) - sum(before[:2]), "s", None
    yield "level 0, go tool pprof: peak memory", used.ru_maxrss / 1024, "MB", None
    yield "level 0, go tool pprof: merged file", merged.stat().st_size / 1e6, "MB", None


def _merge(
    counts: Counter[tuple[object, ...]], numbers: dict[tuple[object, ...], int], content: bytes
) -> None:
    parsed = ProfileMessage()
    parsed.ParseFromString(decompress(content))
    strings = parsed.string_table
    build_ids = {mapping.id: strings[mapping.build_id] for mapping in parsed.mapping}
    names = {function.id: strings[function.name] for function in parsed.function}
    mine = {}
    for location in parsed.location:
        lines = tuple((names[line.function_id], line.line) for line in location.line)
        place = (build_ids[location.mapping_id], location.address, lines)
        mine[location.id] = numbers.setdefault(place, len(numbers))
    for sample in parsed.sample:
        labels = tuple(
            (strings[label.key], label.num or strings[label.str]) for label in sample.label
        )
        stack = tuple([mine[number] for number in sample.location_id])
        counts[stack, labels] += sample.value[0]


def write_parquet(folder: Path) -> Iterator[Row]:
    """Write the hour as folded text: a row of (minute, host, service, version, stack, samples)."""
    hasher = hasher_of(folder)
    started = time.perf_counter()
    number_of: dict[int, int] = {}
    texts: list[str] = []
    columns: dict[str, list[np.ndarray]] = {}
    for key, content in objects_in(folder):
        rows = _folded_rows(decode_object(key, content, hasher), number_of, texts)
        for name, column in rows.items():
            columns.setdefault(name, []).append(column)
    joined = {name: np.concatenate(parts) for name, parts in columns.items()}
    folded = {"number": np.arange(len(texts)), "stack": np.array(texts, dtype=object)}
    with _database(folder) as database:
        database.register("numbered", joined)
        database.register("folded", folded)
        database.sql(
            "SELECT minute, host, service, version, stack, samples FROM numbered"
            " JOIN folded ON numbered.stack_number = folded.number ORDER BY stack, host, minute"
        ).write_parquet(str(folder / _PARQUET), compression="zstd")
    yield "Parquet of text: at rest", (folder / _PARQUET).stat().st_size / 1e6, "MB", None
    yield "Parquet of text: written in", time.perf_counter() - started, "s", None


def _folded_rows(
    columns: Columns, number_of: dict[int, int], texts: list[str]
) -> dict[str, np.ndarray]:
    shown = columns.shown_frames()
    functions = [text.decode() for text in shown.texts.take(shown.table[shown.offsets[:-1], 0])]
    offsets, words = columns.stack_offsets.tolist(), columns.stack_words.tolist()
    numbers = np.zeros(len(columns.stack_hashes), dtype=np.int64)
    for i, hash_ in enumerate(columns.stack_hashes.tolist()):
        number = number_of.setdefault(hash_, len(texts))
        if number == len(texts):
            names = (functions[word] for word in words[offsets[i] : offsets[i + 1]])
            texts.append(";".join(names))
        numbers[i] = number
    labels = [dict(each) for each in columns.label_sets]
    rows = {"stack_number": numbers[columns.rows[:, 1]], "samples": columns.counts[:, 0]}
    for name in ("host", "service", "version"):
        values = np.array([each[name] for each in labels], dtype=object)
        rows[name] = values[columns.rows[:, 0]] if labels else values
    minute = columns.window.start_ns // fleet.MINUTE_NS
    return {**rows, "minute": np.full(len(columns.rows), minute)}


def group_text(folder: Path) -> Iterator[Row]:
    """Add up the samples of equal texts."""
    with _database(folder) as database:
        started = time.perf_counter()
        database.read_parquet(str(folder / _PARQUET)).create_view("hour")
        database.execute(
            "CREATE TABLE answer AS"
            " SELECT stack, CAST(SUM(samples) AS BIGINT) AS value FROM hour GROUP BY stack"
        )
        took_s = time.perf_counter() - started
        peak_mb = rss_mb(os.getpid(), "VmHWM")
        ((stacks, samples),) = database.execute(
            "SELECT COUNT(*), CAST(SUM(value) AS BIGINT) FROM answer"
        ).fetchall()
    assert samples == _samples(folder)
    yield "Parquet of text, DuckDB: stacks", stacks, "stacks", None
    yield "Parquet of text, DuckDB: hour", took_s, "s", None
    yield "Parquet of text, DuckDB: peak memory", peak_mb, "MB", None


def compacted(folder: Path) -> Iterator[Row]:
    """Compact a copy of the store as the command does, with all rollups, and ask for the hour."""
    store = folder / "compacted"
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryDirectory() as work:
        shutil.copytree(folder / "store", store, dirs_exist_ok=True)
        command = [EVERFLAME, "compact", f"--store={store}", "--json"]
        # The fleet's day is long ago: nothing of it may expire at once.
        command += [f"--keep={','.join(f'{level}=9000d' for level in LEVELS)}"]
        environment = {**os.environ, "EVERFLAME_CACHE": work}
        with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as running:
            peak_mb = 0.0
            while running.poll() is None:
                with contextlib.suppress(OSError):
                    peak_mb = max(peak_mb, sum(map(pss_mb, all_pids(running.pid))))
                time.sleep(0.2)
        assert running.returncode == 0
        cpu_s = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
        shutil.rmtree(store / "v1" / DEFAULT_TENANT / "l0")
        query = Query(TenantStore(DirectoryStore(store)), Path(cache))
        whole = _timed(lambda: query.profile(_hour()))
        rolled_up = _timed(lambda: query.profile(_hour(), labels=frozenset({"service"})))
        chart = _timed(lambda: query.timeline(_hour(), by=("service",)))
        resident_mb = rss_mb(os.getpid(), "VmHWM")
    assert not whole.value.coverage.skipped
    for each in (whole, rolled_up):
        assert each.value.profile.total_samples == _samples(folder)
    sizes = Counter[str]()
    manifest = Manifests(DirectoryStore(store), DEFAULT_TENANT, CPU).hour(
        hour_of(_hour().start_ns // NS_PER_S)
    )
    for file in manifest.files:
        sizes[file.table] += file.bytes
    rows = sum(file.rows for file in manifest.files if file.table == DETAIL)
    objects = sum(part.objects for part in manifest.parts)
    yield "compacted: at rest, hour with its rollups", sum(sizes.values()) / 1e6, "MB", None
    yield "compacted: detail", sizes[DETAIL] / rows, "bytes a row", None
    yield "compacted: stacks, frames and names", sum(sizes[t] for t in DICTIONARY) / 1e6, "MB", None
    yield "compaction: CPU an object", 1e3 * cpu_s / objects, "ms", COMPACT_MS
    yield "compaction: peak memory of all processes, PSS", peak_mb, "MB", 1000.0
    yield "compacted, Query: hour, from detail", whole.took_s, "s", None
    yield "compacted, Query: hour, by service", rolled_up.took_s, "s", None
    yield "compacted, Query: timeline of the hour", chart.took_s, "s", 0.3
    yield "compacted, Query: peak memory", resident_mb, "MB", 600.0
    shutil.rmtree(store)


class _Timed(NamedTuple):
    value: Any
    took_s: float


def _timed(act: Callable[[], Any]) -> _Timed:
    started = time.perf_counter()
    value = act()
    return _Timed(value, time.perf_counter() - started)


@contextlib.contextmanager
def _database(folder: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    with tempfile.TemporaryDirectory(dir=folder) as spill, duckdb.connect() as database:
        database.execute(f"SET temp_directory = '{spill}'")
        database.execute(f"SET threads = {os.cpu_count() or 1}")
        yield database


def _hour() -> Window:
    start_ns = fleet.DAY_NS + _FIRST_MINUTE * fleet.MINUTE_NS
    return Window(start_ns, start_ns + 60 * fleet.MINUTE_NS)


def _samples(folder: Path) -> int:
    samples: int = json.loads((folder / "made.json").read_text())["samples"]
    return samples


def _size_mb(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


MEASURED: dict[str, Callable[[Path], Iterator[Row]]] = {
    "decode": decode,
    "query": query,
    "protobuf": protobuf,
    "pprof": pprof_tool,
    "write-parquet": write_parquet,
    "parquet": group_text,
    "compacted": compacted,
}


def measure(name: str, folder: Path) -> list[Row]:
    """Measure in a process of its own, whose memory is of nothing else."""
    command = [sys.executable, __file__, "--ask", name, "--folder", str(folder)]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    return [tuple(row) for row in json.loads(answer)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hosts", type=int, default=10)
    parser.add_argument("--minutes", type=int, default=60)
    parser.add_argument("--stacks", type=int, default=fleet.STACKS, help="of a service and day")
    parser.add_argument("--folder", type=Path, help="where the store is made, and kept")
    parser.add_argument("--only", nargs="*", choices=list(MEASURED), help="what to measure")
    parser.add_argument("--ask", choices=list(MEASURED), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ask:
        print(json.dumps(list(MEASURED[options.ask](options.folder))))
        return 0
    missed = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "made.json").exists():
            missed += show(make(folder, options.hosts, options.minutes, options.stacks))
        for name in options.only or MEASURED:
            missed += show(measure(name, folder))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
