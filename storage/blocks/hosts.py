"""Hosts of blocks: what the tables of objects say of each host and when, without any stacks."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from storage.blocks.dictionary import clean, fetch_label_sets
from storage.blocks.parquet import reading_engine
from storage.blocks.scans import LocalFile, of_table
from storage.blocks.schema import HEADS, HEADS_10M
from storage.blocks.slices import Slice, files_in, rows_in
from storage.objects.keys import NS_PER_S
from storage.profile import Labels, Window

_TABLES = (HEADS[0], HEADS_10M[0])
_AGE = "CAST(start_s AS BIGINT) * 4096 + length_s"
"""What sorts objects by start, then by length: a window is at most an hour."""


class HostObjects(NamedTuple):
    """The objects of one host that start in some seconds, and its names in the latest of them."""

    host_id: str
    names: tuple[str, ...]
    objects: int
    window: Window
    latest_start_ns: int
    latest_id: int
    """The latest object's id in the other tables."""


def read_hosts(slices: Sequence[Slice]) -> list[HostObjects]:
    """Return the hosts with objects that start in the seconds of slices, by id.

    Raises:
        ProfileError: a file is damaged or not one of ours.
        SchemaError: a later version wrote one.
    """
    files = files_in(slices, *_TABLES)
    if not files:
        return []
    names = "object_id, host_key, hosts, start_s, length_s"
    columns = {_TABLES[0]: f"{names}, 1 AS objects", _TABLES[1]: f"{names}, objects"}
    query = (
        f"SELECT host_key, sum(objects)::BIGINT AS objects, min(start_s) AS first_s,"
        " max(start_s) AS latest_s, max(CAST(start_s AS BIGINT) + length_s) AS end_s,"
        f" arg_max(object_id, {_AGE}) AS latest_id, arg_max(hosts, {_AGE}) AS hosts"
        f" FROM ({rows_in(slices, columns, _starts_inside)}) GROUP BY host_key"
    )
    with reading_engine() as opened:
        opened.check(files)
        opened.load("theirs", query, files)
        rows = opened.rows(
            "SELECT host_key, objects, first_s, latest_s, end_s, latest_id, hosts FROM theirs"
            " ORDER BY host_key"
        )
    return [
        HostObjects(
            clean(host_id),
            tuple(clean(each["name"]) for each in hosts if each["name"]) or (clean(host_id),),
            objects,
            Window(first_s * NS_PER_S, end_s * NS_PER_S),
            latest_s * NS_PER_S,
            latest_id,
        )
        for host_id, objects, first_s, latest_s, end_s, latest_id, hosts in rows
    ]


def _starts_inside(_table: str, start_s: int, end_s: int) -> str:
    return f"(start_s >= {start_s:d} AND start_s < {end_s:d})"


def read_services(
    files: Sequence[LocalFile], object_ids: Iterable[int]
) -> dict[int, list[tuple[Labels, int]]]:
    """Return what was sampled in each of some objects: label sets without host, and samples.

    Raises: as `read_hosts`.
    """
    chosen = of_table(files, "times")
    found: dict[int, list[tuple[Labels, int]]] = {}
    if not chosen:
        return found
    with reading_engine() as opened:
        opened.check(chosen)
        opened.register("asked", {"object_id": np.unique(np.array([*object_ids], np.uint64))})
        opened.load(
            "sampled",
            "SELECT object_id, set_id, CAST(sum(samples) AS BIGINT) AS samples FROM {files}"
            " SEMI JOIN asked USING (object_id) GROUP BY object_id, set_id",
            chosen,
        )
        label_sets = fetch_label_sets(opened, files)
        for object_id, set_id, samples in opened.rows("SELECT * FROM sampled ORDER BY ALL"):
            found.setdefault(object_id, []).append((label_sets.get(set_id, ()), samples))
    return found


def read_edges(slices: Sequence[Slice]) -> tuple[Window, Window] | None:
    """Return the windows of the first and of the last object that start in the seconds of slices.

    Raises: as `read_hosts`.
    """
    files = files_in(slices, *_TABLES)
    if not files:
        return None
    rows = rows_in(slices, dict.fromkeys(_TABLES, "start_s, length_s"), _starts_inside)
    query = f"SELECT min({_AGE}) AS earliest, max({_AGE}) AS latest FROM ({rows})"
    with reading_engine() as opened:
        opened.check(files)
        opened.load("edges", query, files)
        rows_ = opened.rows(
            "SELECT earliest // 4096, earliest % 4096, latest // 4096, latest % 4096"
            " FROM edges WHERE earliest IS NOT NULL"
        )
    for first_s, first_length_s, last_s, last_length_s in rows_:
        return (
            Window(first_s * NS_PER_S, (first_s + first_length_s) * NS_PER_S),
            Window(last_s * NS_PER_S, (last_s + last_length_s) * NS_PER_S),
        )
    return None


def read_contents(files: Sequence[LocalFile]) -> set[str]:
    """Return the `content16` of all objects in the files.

    Raises:
        ProfileError: a file is damaged or not one of ours.
        SchemaError: a later version wrote one.
    """
    chosen = of_table(files, HEADS[0])
    if not chosen:
        return set()
    with reading_engine() as opened:
        opened.check(chosen)
        return set(opened.arrays_of("SELECT content16 FROM {files}", chosen)["content16"].tolist())
