"""Compaction in tests: objects with known sums, and a reader of stores that shares no code.

What it reads is what the format says: manifests as JSON, files by DuckDB's own SQL.
"""

import contextlib
import dataclasses
import functools
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import duckdb
import orjson

from storage.blocks.compactor import Compactor
from storage.formats import pprof
from storage.objects.keys import ObjectKey, ObjectStore, hour_of
from storage.objects.tenant import TenantStore
from storage.profile import Accounting, Host, Profile, Window, make_labels
from tests.support import profiles as some

MINUTE_S, HOUR_S, DAY_S = 60, 3600, 86400
DAY_START_S = 1_780_000_000 // DAY_S * DAY_S
NS = 1_000_000_000

_Done = TypeVar("_Done")


class Inline(Executor):
    """Does work at once, in the thread that hands it in."""

    def submit(self, act: Callable[..., _Done], /, *things: Any, **more: Any) -> "Future[_Done]":
        future: Future[_Done] = Future()
        try:
            future.set_result(act(*things, **more))
        except Exception as error:  # noqa: BLE001 - the future has it
            future.set_exception(error)
        return future


def profile(start_s: int, host: int = 1, seed: int = 0, length_s: int = MINUTE_S) -> Profile:
    """Return a window of a host with a few stacks, whose counts depend on all three numbers."""
    counts = [1 + (start_s // 60 + 7 * host + seed) % 5, 2 + seed % 3, 1 + host % 4]
    labels = [{"service": f"s{host % 3}", "pid": str(host)}, {"service": "jobs", "comm": "job"}]
    stacks = [[some.MAIN, some.WORK], [some.MAIN, some.READ], [some.HANDLER, some.SQUARE]]
    if seed % 2:
        stacks[0] = [some.MAIN, some.WORK, some.WORK, some.MEMCPY]
    window = Window(start_s * NS, (start_s + length_s) * NS)
    made = some.build(
        [
            (labels[i % 2], stack, count)
            for i, (stack, count) in enumerate(zip(stacks, counts, strict=True))
        ],
        some.NAMES,
        window=window,
    )
    hosts = (Host(f"host-{host}", f"{host:016x}"),)
    ticks = made.total_samples + 7 + seed  # no two of equal content
    accounting = dataclasses.replace(
        made.accounting, hosts=hosts, ticks=ticks, idle=5 + seed, profiled_ns=length_s * NS
    )
    return dataclasses.replace(made, accounting=accounting)


def tombstone(start_s: int, host: int = 1, lost: int = 99) -> Profile:
    """Return a window without stacks, all of whose ticks are lost."""
    window = Window(start_s * NS, (start_s + MINUTE_S) * NS)
    accounting = Accounting(
        hosts=(Host(f"host-{host}", f"{host:016x}"),),
        ticks=lost,
        lost={"spool_full": lost},
        services={make_labels({"service": "api"}): MINUTE_S * NS},
    )
    return some.build([], window=window, accounting=accounting)


class Sums(NamedTuple):
    objects: int
    samples: int
    value: int


class Expected:
    """What was put into a store, by content16."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store
        self.tenant = TenantStore(store)
        self.sums: dict[str, tuple[int, int]] = {}

    def put(self, made: Profile) -> ObjectKey:
        key, _ = self.tenant.put_profile(made, pprof.encode(made))
        self.sums[key.content16] = made.total_samples, made.total_value
        return key

    @property
    def total(self) -> Sums:
        return total_of(self.sums)


def total_of(sums: dict[str, tuple[int, int]]) -> Sums:
    return Sums(len(sums), sum(s for s, _ in sums.values()), sum(v for _, v in sums.values()))


def hour_manifests(store: ObjectStore, type_: str = "cpu") -> dict[str, Any]:
    prefix = f"v1/default/manifests/{type_}/"
    keys = [each.key for each in store.list(prefix) if "T" in each.key[len(prefix) :]]
    return {key[len(prefix) : -5]: orjson.loads(store.get(key)) for key in keys}


def day_manifest(store: ObjectStore, day: str, type_: str = "cpu") -> Any:
    return orjson.loads(store.get(f"v1/default/manifests/{type_}/{day}.json"))


@functools.cache
def _database() -> duckdb.DuckDBPyConnection:
    return duckdb.connect(config={"threads": 1, "enable_external_file_cache": False})


def duckdb_connection() -> duckdb.DuckDBPyConnection:
    """Return a connection of its own: to open a database for each takes 25 ms of CPU time."""
    return _database().cursor()


@contextlib.contextmanager
def reading(
    store: ObjectStore, files: list[Any]
) -> Iterator[Callable[[list[Any], str], list[tuple[Any, ...]]]]:
    """Return a function that runs a query over some of the files, which manifests name.

    `files` in the query stands for their rows; `filename` is the key of each row's file.
    """
    with tempfile.TemporaryDirectory() as name, duckdb_connection() as connection:
        paths = {file["key"]: f"{name}/{number}" for number, file in enumerate(files)}
        for key, path in paths.items():
            Path(path).write_bytes(store.get(key))

        def rows_of(some_files: list[Any], query: str) -> list[tuple[Any, ...]]:
            if not some_files:
                return []
            chosen = [paths[file["key"]] for file in some_files]
            query = query.replace("files", f"read_parquet({chosen}, filename=true)")
            keys = {path: key for key, path in paths.items()}
            rows = connection.execute(query).fetchall()
            return [tuple(keys.get(value, value) for value in row) for row in rows]

        yield rows_of


def queried(store: ObjectStore, files: list[Any], query: str) -> list[tuple[Any, ...]]:
    """Return the rows of a query over all of some files."""
    with reading(store, files) as rows_of:
        return rows_of(files, query)


def sums_of(store: ObjectStore, files: list[Any]) -> tuple[int, int]:
    if not files:
        return 0, 0
    query = "SELECT coalesce(sum(samples), 0)::BIGINT, coalesce(sum(value), 0)::BIGINT FROM files"
    ((samples, value),) = queried(store, files, query)
    return samples, value


def files_of(parts: list[Any], table: str) -> list[Any]:
    return [file for part in parts for file in part["files"] if file["table"] == table]


def read_store(expected: Expected, type_: str = "cpu") -> Sums:
    """Return the sums that the format stands for, and check what must hold in between.

    Each object is in one part at most, parts and rollups have the samples that they claim, and days
    have their stacks as a tree.
    """
    store = expected.store
    manifests = hour_manifests(store, type_)
    parts = [part for manifest in manifests.values() for part in manifest["parts"]]
    rollups: list[tuple[list[Any], list[Any]]] = []

    def add(parts: list[Any], files: list[Any], *tables: str) -> None:
        rollups.extend((parts, files_of([{"files": files}], table)) for table in tables)

    for manifest in manifests.values():
        hourly = manifest["hourly"]
        if hourly and sorted(hourly["parts"]) == sorted(part["id"] for part in manifest["parts"]):
            add(manifest["parts"], hourly["files"], "samples_1h", "times_10m")
    prefix = f"v1/default/manifests/{type_}/"
    for each in [each.key for each in store.list(prefix) if "T" not in each.key[len(prefix) :]]:
        day = orjson.loads(store.get(each))
        add([day], day["files"], "samples_1h", "samples_1d", "times_10m")
        check_tree(store, day)
        names = {name[11:]: manifest for name, manifest in manifests.items() if day["day"] in name}
        ids = {hour: sorted(part["id"] for part in each["parts"]) for hour, each in names.items()}
        if all(ids.get(hour) == held for hour, held in day["hours"].items()):
            inside = [part for hour in day["hours"] for part in names[hour]["parts"]]
            add(inside, day["files"], "samples_1d")
    detail, ten = files_of(parts, "samples_detail"), files_of(parts, "samples_10m")
    longer = list({file["key"]: file for _, files in rollups for file in files}.values())
    with reading(store, [*files_of(parts, "objects"), *detail, *ten, *longer]) as rows_of:
        query = "SELECT filename, sum(samples)::BIGINT, sum(value)::BIGINT FROM files GROUP BY ALL"
        sums = {name: (s, v) for name, s, v in rows_of([*detail, *ten, *longer], query)}
        query = "SELECT filename, content16 FROM files"
        contents = list(rows_of(files_of(parts, "objects"), query))
    seen = Counter(content for _, content in contents)
    counts = Counter(name for name, _ in contents)

    def claimed(parts: list[Any]) -> tuple[int, int]:
        return sum(part["samples"] for part in parts), sum(part["value"] for part in parts)

    def found(files: list[Any]) -> tuple[int, int]:
        each = [sums.get(file["key"], (0, 0)) for file in files]
        return sum(s for s, _ in each), sum(v for _, v in each)

    for part in parts:
        assert sum(counts[file["key"]] for file in files_of([part], "objects")) == part["objects"]
        assert found(files_of([part], "samples_detail")) == claimed([part])
        assert found(files_of([part], "samples_10m")) == claimed([part])
    for inside, files in rollups:
        assert found(files) == claimed(inside), [file["key"] for file in files]
    twice = [content for content, times in seen.items() if times > 1]
    assert not twice, f"counted twice: {twice}"
    at_level0 = {
        key.content16
        for stored in store.list("v1/default/l0/")
        if (key := ObjectKey.parse(stored.key)) is not None
    }
    more = total_of(
        {
            content: sums
            for content, sums in expected.sums.items()
            if content in at_level0 and content not in seen
        }
    )
    samples, value = claimed(parts)
    return Sums(len(seen) + more.objects, samples + more.samples, value + more.value)


def check_tree(store: ObjectStore, day: Any) -> None:
    """Check that a day's stacks as a tree are those that it has as lists."""
    query = "SELECT stack_id FROM files WHERE is_stack ORDER BY ALL"
    in_tree = queried(store, files_of([day], "stack_tree"), query)
    query = "SELECT stack_id FROM files WHERE len(frame_ids) > 0 ORDER BY ALL"
    assert in_tree == queried(store, files_of([day], "stacks"), query)


def files_in(store: ObjectStore) -> set[str]:
    return {each.key for each in store.list("v1/default/blocks/")}


def named_files(store: ObjectStore) -> set[str]:
    prefix = "v1/default/manifests/"
    found: set[str] = set()
    for each in store.list(prefix):
        manifest = orjson.loads(store.get(each.key))
        groups = [part["files"] for part in manifest.get("parts", ())]
        groups += [manifest["hourly"]["files"]] if manifest.get("hourly") else []
        groups += [manifest["files"]] if "files" in manifest else []
        found |= {file["key"] for files in groups for file in files}
    return found


class Clock:
    """A clock that is set."""

    def __init__(self, now_s: float) -> None:
        self.now_s = now_s

    def __call__(self) -> int:
        return round(self.now_s * NS)


def compactor_of(store: ObjectStore, folder: Path, now_s: float, **options: Any) -> Compactor:
    return Compactor(TenantStore(store), folder, Inline(), now_ns=Clock(now_s), **options)


def hour_name(start_s: int) -> str:
    return hour_of(start_s)


def minutes_of(start_s: int, count: int) -> Iterator[int]:
    return iter(range(start_s, start_s + count * MINUTE_S, MINUTE_S))
