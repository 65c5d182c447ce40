"""Hosts of blocks: what the tables of objects say of each host and when, without any stacks."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from storage.blocks.dictionary import clean, fetch_label_sets
from storage.blocks.parquet import LocalFile, of_table, reading_engine
from storage.objects.keys import NS_PER_S
from storage.profile import Labels, Window

_IS_INSIDE = "start_s >= {} AND start_s < {}"
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


def read_hosts(files: Sequence[LocalFile], *, start_s: int, end_s: int) -> list[HostObjects]:
    """Return the hosts with objects that start in some seconds, by id.

    Raises:
        ProfileError: a file is damaged or not one of ours.
        SchemaError: a later version wrote one.
    """
    chosen = of_table(files, "objects")
    if not chosen:
        return []
    query = (
        f"SELECT host_key, count(*) AS objects, min(start_s) AS first_s, max(start_s) AS latest_s,"
        " max(CAST(start_s AS BIGINT) + length_s) AS end_s,"
        f" arg_max(object_id, {_AGE}) AS latest_id, arg_max(hosts, {_AGE}) AS hosts"
        f" FROM {{files}} WHERE {_IS_INSIDE.format(int(start_s), int(end_s))} GROUP BY host_key"
    )
    with reading_engine() as opened:
        opened.check(chosen)
        opened.load("theirs", query, chosen)
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


def read_edges(
    files: Sequence[LocalFile], *, start_s: int, end_s: int
) -> tuple[Window, Window] | None:
    """Return the windows of the first and of the last object that start in some seconds.

    Raises: as `read_hosts`.
    """
    chosen = of_table(files, "objects")
    if not chosen:
        return None
    query = (
        f"SELECT min({_AGE}) AS earliest, max({_AGE}) AS latest FROM {{files}}"
        f" WHERE {_IS_INSIDE.format(int(start_s), int(end_s))}"
    )
    with reading_engine() as opened:
        opened.check(chosen)
        opened.load("edges", query, chosen)
        rows = opened.rows(
            "SELECT earliest // 4096, earliest % 4096, latest // 4096, latest % 4096"
            " FROM edges WHERE earliest IS NOT NULL"
        )
    for first_s, first_length_s, last_s, last_length_s in rows:
        return (
            Window(first_s * NS_PER_S, (first_s + first_length_s) * NS_PER_S),
            Window(last_s * NS_PER_S, (last_s + last_length_s) * NS_PER_S),
        )
    return None
