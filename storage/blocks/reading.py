"""Read tables of blocks back into arrays: sums of samples, and whole Columns.

Functions take files of any parts together and choose those of the tables that they need. What they
return equals what `storage.merging` makes of the decoded objects without DROPPED_LABELS, row by
row; locations may have better names, from objects of the same parts outside the window. What is
known of objects is read by `storage.blocks.times`.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from storage.blocks.block import Samples
from storage.blocks.dictionary import fetch_dictionary
from storage.blocks.loading import SUMS
from storage.blocks.parquet import Engine, reading_engine
from storage.blocks.scans import LocalFile, of_table
from storage.blocks.schema import DETAIL, ROLLUPS
from storage.blocks.slices import Slice, files_in, rows_in
from storage.blocks.times import (
    Heads,
    Ids,
    Lines,
    Pairs,
    fetch_heads,
    fetch_times,
    is_among,
    label,
    load_objects,
    register_ids,
)
from storage.columns import Columns, Times
from storage.formats.limits import COUNT_LIMIT
from storage.grouping import add_groups, find_hashes, group_keys
from storage.profile import Labels, ProfileError

_SAMPLES = (DETAIL, *ROLLUPS.values())
_FEW_ROWS = 1_000_000
_KINDS = (np.uint32, np.uint64, np.uint64, np.uint64, np.int64, np.int64)
"""Of the columns of Samples."""


def sum_samples(
    files: Sequence[LocalFile],
    *,
    start_s: int,
    end_s: int,
    sets: Ids | None = None,
    hosts: Ids | None = None,
    by_host: bool = False,
    bucket_s: int | None = None,
) -> Samples:
    """Add up the rows of all samples tables among the files that start in some seconds.

    `sets` and `hosts` choose by id. Without `by_host` hosts are added up, without `bucket_s` times
    are; with it `ts` is the start of each bucket. Sorted by set, stack, host and time.

    Raises:
        ValueError: rollups are among the files, which have no hosts, and hosts are asked for.
        ProfileError: a file is damaged or not one of ours, or sums exceed 64 bits.
        SchemaError: a later version wrote one.
    """
    with reading_engine() as opened:
        return _fetch_sums(
            opened,
            files,
            start_s=start_s,
            end_s=end_s,
            sets=sets,
            hosts=hosts,
            by_host=by_host,
            bucket_s=bucket_s,
        )


def _fetch_sums(
    opened: Engine,
    files: Sequence[LocalFile],
    *,
    start_s: int,
    end_s: int,
    sets: Ids | None,
    hosts: Ids | None,
    by_host: bool,
    bucket_s: int | None,
) -> Samples:
    needs_host = by_host or hosts is not None
    chosen = {table: some for table in _SAMPLES if (some := of_table(files, table))}
    if needs_host and chosen.keys() - {DETAIL}:
        raise ValueError("cannot tell hosts apart in rollups")
    ts = f"CAST(ts - ts % {int(bucket_s)} AS UINTEGER)" if bucket_s else "0::UINTEGER"
    host = "host_id" if by_host else "0::UBIGINT"
    conditions = [f"ts >= {int(start_s)}", f"ts < {int(end_s)}"]
    if sets is not None:
        conditions.append("set_id IN (SELECT id FROM wanted_sets)")
    if hosts is not None:
        conditions.append("host_id IN (SELECT id FROM wanted_hosts)")
    query = (
        f"SELECT {ts} AS ts, {host} AS host_id, set_id, stack_id, {SUMS} FROM {{files}}"
        f" WHERE {' AND '.join(conditions)} GROUP BY ALL"
    )
    found = []
    register_ids(opened, "wanted_sets", sets)
    register_ids(opened, "wanted_hosts", hosts)
    for some in chosen.values():
        opened.check(some)
        found.append(opened.arrays_of(query, some))
    if len(found) != 1:
        found = [_add_up(opened, found)]
    opened.register("sums", found[0])
    sums = opened.arrays("SELECT * FROM sums ORDER BY set_id, stack_id, host_id, ts")
    if min(sums["samples"].min(initial=0), sums["value"].min(initial=0)) < 0:
        raise ProfileError("cannot read blocks: there are negative counts")
    names = ("ts", "host_id", "set_id", "stack_id", "samples", "value")
    return Samples(*(sums[name] for name in names))


def _add_up(opened: Engine, found: Sequence[Mapping[str, npt.NDArray[Any]]]) -> Any:
    names = ("ts", "host_id", "set_id", "stack_id", "samples", "value")
    joined = {
        name: np.concatenate([np.zeros(0, kind), *(each[name] for each in found)])
        for name, kind in zip(names, _KINDS, strict=True)
    }
    opened.register("several", joined)
    query = f"SELECT ts, host_id, set_id, stack_id, {SUMS} FROM several GROUP BY ALL"
    return opened.arrays(query)


class Stored(NamedTuple):
    """Samples, and what their ids mean."""

    samples: Sequence[Slice]
    """Slices of any samples tables that together have each sample once."""
    dictionary: Sequence[LocalFile]


def read_columns(
    heads: Sequence[Slice],
    label_sets: Mapping[int, Labels],
    fetch: Callable[[], Stored],
    lines: Lines = Lines.EACH,
    *,
    sets: Ids | None = None,
    hosts: Ids | None = None,
    check: Callable[[], None] | None = None,
) -> Columns | None:
    """Return the Columns of the objects that start in the seconds of slices; None if none does.

    What is known of the objects comes from `heads` (see `storage.blocks.times`). Meanwhile `fetch`
    is called in another thread, which returns where their rows are. `label_sets` has the ids of
    both, and of hosts. The label `host` is among the labels of rows from detail if `lines` tell
    objects apart. With `sets` or `hosts` only these rows and their times. Objects of other hosts
    are left out; else what is known of them stays that of all, as in `Columns.filter`. `check` may
    end it, as in `reading_engine`.

    Raises:
        ProfileError: a file is damaged or not one of ours, or as `storage.blocks.times.read_heads`.
        SchemaError: a later version wrote one.
    """

    def read_samples() -> tuple[Samples, Columns]:
        samples, dictionary = fetch()
        with reading_engine(check) as opened:
            # All at once: that takes a few queries, however many files there are.
            opened.check([*_rows_of(samples), *dictionary])
            rows = _fetch_rows(opened, samples, sets, hosts, by_host=lines is Lines.EACH)
            return rows, fetch_dictionary(opened, dictionary, rows.stacks)

    with ThreadPoolExecutor(1) as pool, reading_engine(check) as opened:
        if not load_objects(opened, heads, lines, hosts):
            return None
        reading = pool.submit(read_samples)
        known = fetch_heads(opened, heads, label_sets, lines, hosts)
        times = fetch_times(opened, heads, known, label_sets, lines, sets=sets, hosts=hosts)
        rows, stacks = reading.result()
    return make_columns(known, rows, stacks, label_sets, times)


def _fetch_rows(
    opened: Engine,
    slices: Sequence[Slice],
    sets: Ids | None,
    hosts: Ids | None,
    *,
    by_host: bool,
) -> Samples:
    """Return the rows of slices over all times, by host where they are detail."""
    files = files_in(slices, *_SAMPLES)
    read_of = _rows_of(slices)
    opened.check(read_of)
    if hosts is not None and any(each.table != DETAIL for each in files):
        raise ProfileError("cannot tell hosts apart: the detail has expired")
    conditions = [
        *is_among(opened, "set_id", "wanted_sets", sets),
        *is_among(opened, "host_id", "wanted_hosts", hosts),
    ]
    host = "host_id" if by_host else "0::UBIGINT"
    columns = dict.fromkeys(_SAMPLES, "0::UBIGINT AS host_id, set_id, stack_id, samples, value")
    columns[DETAIL] = f"{host} AS host_id, set_id, stack_id, samples, value"
    rows = rows_in(slices, columns, _starts_inside, " AND ".join(conditions))
    if not slices:  # no file has rows of these hosts
        nothing: list[npt.NDArray[Any]] = [np.zeros(0, each) for each in _KINDS]
        return Samples(*nothing)
    if not rows:
        raise ProfileError("cannot read blocks: a table is missing")
    is_rolled_up = all(each.table != DETAIL for each in files)
    # Few rows are added up as fast by numpy, which does it in any case (`make_columns`).
    query = f"SELECT *, samples AS least, value AS least_value FROM ({rows})"
    if sum(each.rows for each in files) > _FEW_ROWS or not is_rolled_up:
        query = (
            f"SELECT host_id, set_id, stack_id, {SUMS}, min(samples) AS least, min(value) AS"
            f" least_value FROM ({rows}) GROUP BY ALL"
        )
    sums = opened.arrays_of(query, read_of)
    if min(sums["least"].min(initial=0), sums["least_value"].min(initial=0)) < 0:
        raise ProfileError("cannot read blocks: there are negative counts")
    if max(sums[name].sum(dtype=np.float64) for name in ("samples", "value")) > COUNT_LIMIT:
        raise ProfileError("cannot read blocks: there are impossible counts")
    names = ("host_id", "set_id", "stack_id", "samples", "value")
    nowhen = np.zeros(len(sums["stack_id"]), np.uint32)
    return Samples(nowhen, *(sums[name] for name in names))


def _rows_of(slices: Sequence[Slice]) -> list[LocalFile]:
    """Return the files that `_fetch_rows` reads."""
    return files_in(slices, *_SAMPLES, "stacks")


def _starts_inside(_table: str, start_s: int, end_s: int) -> str:
    return f"(ts >= {start_s:d} AND ts < {end_s:d})"


def make_columns(
    heads: Heads,
    samples: Samples,
    dictionary: Columns,
    label_sets: Mapping[int, Labels],
    times: Times | None = None,
) -> Columns:
    """Put sums of samples, a dictionary and what is known of the objects together.

    Samples of equal host, set and stack are added up. Host 0, as of rollups, adds no label.

    Raises:
        ProfileError: a stack or label set is missing.
    """
    pairs = Pairs.of(samples.hosts, samples.sets)
    numbers: dict[Labels, int] = {}
    of_pair = np.array(
        [numbers.setdefault(label(label_sets, *pair), len(numbers)) for pair in pairs.pairs],
        dtype=np.int64,
    )
    stacks = find_hashes(dictionary.stack_hashes, samples.stacks)
    if len(stacks) and int(stacks.min()) < 0:
        raise ProfileError("cannot read blocks: a stack is missing")
    count = max(1, len(dictionary.stack_hashes))
    key = of_pair[pairs.of_line] * count + stacks
    firsts, order = group_keys(key)
    rows = np.stack(np.divmod(key[order[firsts]], count), axis=1)
    counts = np.stack([samples.samples, samples.values], axis=1)
    lines, time_counts = np.zeros((0, 2), np.int64), np.zeros((0, 2), np.int64)
    if times is not None:
        mine = [numbers.setdefault(labels, len(numbers)) for labels in times.label_sets]
        lines, time_counts = times.times.astype(np.int64), times.time_counts
        lines[:, 1] = np.array(mine, dtype=np.int64)[lines[:, 1]]
    return replace(
        dictionary,
        type=heads.type,
        unit=heads.unit,
        period_ns=heads.period_ns,
        window=heads.window,
        accounting=heads.accounting,
        label_sets=tuple(numbers),
        rows=rows,
        counts=add_groups(counts[order], firsts),
        objects=heads.objects,
        times=lines,
        time_counts=time_counts,
        present_sets=heads.present_sets,
        presence=heads.presence,
    )
