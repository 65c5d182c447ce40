"""Read tables of blocks back into arrays: sums of samples, the dictionary, objects, whole Columns.

Functions take files of any parts together and choose those of the tables that they need. What they
return equals what `storage.merging` makes of the decoded objects without DROPPED_LABELS, row by
row; locations may have better names, from objects of the same parts outside the window.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from storage.blocks.block import Samples
from storage.blocks.dictionary import clean, fetch_dictionary, fetch_label_sets
from storage.blocks.loading import OBJECT_COUNTS, OBJECT_MAPS, SUMS
from storage.blocks.parquet import DETAIL, ROLLUPS, Engine, LocalFile, of_table, reading_engine
from storage.blocks.tables import refuse_repeated
from storage.columns import OBJECT_FIELDS, Columns, Times
from storage.formats.limits import COUNT_LIMIT, OBJECT_COUNT_LIMIT
from storage.grouping import HashIndex, add_groups, distinct, group_keys, sort_distinct
from storage.hashing import Hashes, Numbers
from storage.objects.keys import NS_PER_S
from storage.profile import Accounting, Host, Integers, Labels, ProfileError, Window, make_labels

Ids = Sequence[int] | Hashes
_SAMPLES = (DETAIL, *ROLLUPS.values())
_LARGEST = 2**62
"""Longer presence of a service in an object is cut, as in `storage.columns.presence_of`."""


def seconds_of(window: Window) -> tuple[int, int]:
    """Return the seconds in which objects start that count for a window, half-open."""
    return -(-window.start_ns // NS_PER_S), -(-window.end_ns // NS_PER_S)


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
    _register_ids(opened, "wanted_sets", sets)
    _register_ids(opened, "wanted_hosts", hosts)
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
    kinds = (np.uint32, np.uint64, np.uint64, np.uint64, np.int64, np.int64)
    joined = {
        name: np.concatenate([np.zeros(0, kind), *(each[name] for each in found)])
        for name, kind in zip(names, kinds, strict=True)
    }
    opened.register("several", joined)
    query = f"SELECT ts, host_id, set_id, stack_id, {SUMS} FROM several GROUP BY ALL"
    return opened.arrays(query)


def _register_ids(opened: Engine, name: str, ids: Ids | None) -> None:
    if ids is not None:
        opened.register(name, {"id": sort_distinct(np.array(ids, dtype=np.uint64))})


class Heads(NamedTuple):
    """What is known of the objects that start in a window; `objects`, `presence` as in Columns."""

    type: str
    unit: str
    period_ns: int
    window: Window
    accounting: Accounting
    objects: Integers
    contents: tuple[str, ...]
    """The start of each object's SHA-256, in the order of `objects`: by start, host and length."""
    present_sets: tuple[Labels, ...]
    presence: Integers


def read_contents(files: Sequence[LocalFile]) -> set[str]:
    """Return the `content16` of all objects in the files.

    Raises:
        ProfileError: a file is damaged or not one of ours.
        SchemaError: a later version wrote one.
    """
    chosen = of_table(files, "objects")
    if not chosen:
        return set()
    with reading_engine() as opened:
        opened.check(chosen)
        return set(opened.arrays_of("SELECT content16 FROM {files}", chosen)["content16"].tolist())


def read_heads(files: Sequence[LocalFile], *, start_s: int, end_s: int) -> Heads | None:
    """Return what is known of the objects that start in some seconds; None if none does.

    Raises:
        ProfileError: a file is damaged or not one of ours, two have one object, or objects are of
            different types or units.
        SchemaError: a later version wrote one.
    """
    if not of_table(files, "objects"):
        return None
    with reading_engine() as opened:
        if not _load_objects(opened, files, start_s, end_s):
            return None
        return _heads_of(opened, files, fetch_label_sets(opened, files))


def _load_objects(
    opened: Engine,
    files: Sequence[LocalFile],
    start_s: int,
    end_s: int,
    hosts: Ids | None = None,
) -> bool:
    """Make a table `chosen` of the objects of a window, numbered; return whether there are any.

    With `hosts` those of other hosts are left out.
    """
    some = [*of_table(files, "objects"), *of_table(files, "presence"), *of_table(files, "times")]
    opened.check(some)
    refuse_repeated(opened, files)
    _register_ids(opened, "wanted_hosts", hosts)
    of_host = "host_id IN (SELECT id FROM wanted_hosts)"
    # Rows may name a host of their own, as those of imported profiles do.
    if hosts is not None and of_table(files, "times"):
        query = f"SELECT DISTINCT object_id FROM {{files}} WHERE {of_host}"
        opened.load("having_host", query, of_table(files, "times"))
        of_host += " OR object_id IN (SELECT object_id FROM having_host)"
    is_chosen = f"{of_host} OR len(hosts) <> 1"
    opened.load(
        "chosen",
        "SELECT *, row_number() OVER (ORDER BY start_s, host_key, length_s, content16) - 1"
        f" AS number FROM {{files}} WHERE start_s >= {int(start_s)} AND start_s < {int(end_s)}"
        f"{'' if hosts is None else f' AND ({is_chosen})'} ORDER BY number",
        of_table(files, "objects"),
    )
    return opened.rows("SELECT count(*) FROM chosen") != [(0,)]


def _heads_of(
    opened: Engine, files: Sequence[LocalFile], label_sets: Mapping[int, Labels]
) -> Heads:
    kinds = opened.rows("SELECT DISTINCT type, unit FROM chosen")
    if len(kinds) != 1:
        raise ProfileError("cannot read blocks: their objects are of different types or units")
    counts = ", ".join((*OBJECT_COUNTS, "period_ns", "start_ns", "end_ns"))
    columns = opened.arrays(
        f"SELECT content16, host, {counts},"
        " CAST(coalesce(list_sum(map_values(lost)), 0) AS BIGINT) AS lost"
        " FROM chosen ORDER BY number"
    )
    for name in (*OBJECT_COUNTS, "period_ns", "start_ns", "end_ns"):
        least = 1 if name == "period_ns" else 0
        limit = OBJECT_COUNT_LIMIT if name in OBJECT_COUNTS else _LARGEST
        if not least <= columns[name].min() <= columns[name].max() <= limit:
            raise ProfileError(f"cannot read blocks: an object has an impossible {name}")
    # Python's integers: the counts of many objects may exceed 64 bits, and the merge has them so.
    sums = {name: sum(columns[name].tolist()) for name in OBJECT_COUNTS}
    sums["cpus"] = int(columns["cpus"].max())
    sums["agent_rss_bytes"] = int(columns["agent_rss_bytes"].max())
    maps = {
        name: {
            clean(text): int(count)
            for text, count in opened.rows(
                "SELECT pair.key, sum(greatest(coalesce(pair.value, 0), 0)) FROM"
                f" (SELECT unnest(map_entries({name})) AS pair FROM chosen) GROUP BY pair.key"
            )
        }
        for name in OBJECT_MAPS
    }
    hosts = opened.rows(
        "SELECT DISTINCT host.name, host.host_id FROM (SELECT unnest(hosts) AS host FROM chosen)"
    )
    opened.load(
        "present",
        "SELECT number, set_id, present_ns FROM {files} JOIN chosen USING (object_id)",
        of_table(files, "presence"),
    )
    services = {
        _labels_of(label_sets, set_id): int(present_ns)
        for set_id, present_ns in opened.rows(
            "SELECT set_id, sum(present_ns) FROM present GROUP BY set_id"
        )
    }
    lines = opened.arrays("SELECT * FROM present ORDER BY number, set_id")
    present_sets, presence = _presence_of(lines, columns["host"], label_sets)
    return Heads(
        type=clean(kinds[0][0]),
        unit=clean(kinds[0][1]),
        period_ns=int(columns["period_ns"].min()),
        window=Window(int(columns["start_ns"].min()), int(columns["end_ns"].max())),
        accounting=Accounting(
            hosts=tuple(sorted(Host(clean(name), clean(host_id)) for name, host_id in hosts)),
            services=services,
            **sums,
            lost=maps["lost"],
            stops=maps["stops"],
            misses=maps["misses"],
        ),
        objects=np.stack([columns[name].astype(np.int64) for name in OBJECT_FIELDS], axis=1),
        contents=tuple(columns["content16"].tolist()),
        present_sets=present_sets,
        presence=presence,
    )


def _presence_of(
    lines: Mapping[str, Numbers], host_of: Numbers, label_sets: Mapping[int, Labels]
) -> tuple[tuple[Labels, ...], Integers]:
    """Return `present_sets` and `presence` of Columns, with the label `host` of each object."""
    hosts, of_object = np.unique(host_of, return_inverse=True)
    numbers = _Pairs.of(of_object[lines["number"]].astype(np.uint64), lines["set_id"])
    present_sets = []
    for host, set_id in numbers.pairs:
        name, labels = str(hosts[host]), _labels_of(label_sets, set_id)
        labelled = make_labels({"host": clean(name), **dict(labels)}) if name else labels
        present_sets.append(labelled)
    present_ns = np.clip(lines["present_ns"], 0, _LARGEST)
    presence = np.stack([lines["number"], numbers.of_line, present_ns], axis=1)
    return tuple(present_sets), presence.astype(np.int64)


def read_times(
    files: Sequence[LocalFile],
    *,
    start_s: int,
    end_s: int,
    sets: Ids | None = None,
    hosts: Ids | None = None,
) -> Times | None:
    """Return the Times of the objects that start in some seconds; None if none does.

    `sets` and `hosts` choose lines by id, as in `sum_samples`. Objects of other hosts are left out.

    Raises:
        ProfileError: as `read_heads`.
        SchemaError: a later version wrote a file.
    """
    if not of_table(files, "objects"):
        return None
    with reading_engine() as opened:
        if not _load_objects(opened, files, start_s, end_s, hosts):
            return None
        label_sets = fetch_label_sets(opened, files)
        heads = _heads_of(opened, files, label_sets)
        return _times_of(opened, files, heads, label_sets, sets=sets, hosts=hosts)


def _times_of(
    opened: Engine,
    files: Sequence[LocalFile],
    heads: Heads,
    label_sets: Mapping[int, Labels],
    *,
    sets: Ids | None,
    hosts: Ids | None,
) -> Times:
    """Return the lines of the objects in the table `chosen`."""
    conditions = ["true"]
    for name, column, ids in (("sets", "set_id", sets), ("hosts", "host_id", hosts)):
        _register_ids(opened, f"wanted_{name}", ids)
        if ids is not None:
            conditions.append(f"t.{column} IN (SELECT id FROM wanted_{name})")
    opened.load(
        "lines",
        "SELECT number, t.host_id AS host_id, t.set_id AS set_id, samples, value"
        " FROM {files} AS t JOIN chosen USING (object_id)"
        f" WHERE {' AND '.join(conditions)} ORDER BY ALL",
        of_table(files, "times"),
    )
    lines = opened.arrays("SELECT * FROM lines")
    for counts in (lines["samples"], lines["value"]):
        if counts.min(initial=0) < 0 or counts.sum(dtype=np.float64) > COUNT_LIMIT:
            raise ProfileError("cannot read blocks: there are negative or impossible counts")
    pairs = _Pairs.of(lines["host_id"], lines["set_id"])
    return Times(
        type=heads.type,
        unit=heads.unit,
        window=heads.window,
        accounting=heads.accounting,
        objects=heads.objects,
        label_sets=tuple(_label(label_sets, *pair) for pair in pairs.pairs),
        times=np.stack([lines["number"].astype(np.int64), pairs.of_line], axis=1),
        time_counts=np.stack([lines["samples"], lines["value"]], axis=1),
        present_sets=heads.present_sets,
        presence=heads.presence,
    )


def read_columns(
    files: Sequence[LocalFile],
    *,
    start_s: int,
    end_s: int,
    sets: Ids | None = None,
    hosts: Ids | None = None,
    samples_of: Sequence[LocalFile] | None = None,
) -> Columns | None:
    """Return the Columns of the objects that start in some seconds; None if none does.

    Rows are those of detail, or of `samples_of`: files of any samples tables that together have
    each sample once. The label `host` is among the labels of rows from detail. With `sets` or
    `hosts` only these rows and their times. Objects of other hosts are left out; else what is known
    of them stays that of all, as in `Columns.filter`.

    Raises:
        ProfileError: a file is damaged or not one of ours, or as `read_heads`.
        SchemaError: a later version wrote one.
    """
    if not of_table(files, "objects"):
        return None
    with reading_engine() as opened:
        if not _load_objects(opened, files, start_s, end_s, hosts):
            return None
        label_sets = fetch_label_sets(opened, files)
        heads = _heads_of(opened, files, label_sets)
        times = _times_of(opened, files, heads, label_sets, sets=sets, hosts=hosts)
        rows_of = of_table(files, DETAIL) if samples_of is None else samples_of
        samples = _fetch_rows(opened, rows_of, start_s=start_s, end_s=end_s, sets=sets, hosts=hosts)
        dictionary = fetch_dictionary(opened, files, samples.stacks)
    return make_columns(heads, samples, dictionary, label_sets, times)


def _fetch_rows(
    opened: Engine,
    files: Sequence[LocalFile],
    *,
    start_s: int,
    end_s: int,
    sets: Ids | None,
    hosts: Ids | None,
) -> Samples:
    """Return the rows of files over all times, by host where they are detail."""
    detail = [each for each in files if each.table == DETAIL]
    rollups = [each for each in files if each.table != DETAIL]
    if rollups and hosts is not None:
        raise ProfileError("cannot tell hosts apart: the detail has expired")
    found = [
        _fetch_sums(
            opened,
            some,
            start_s=start_s,
            end_s=end_s,
            sets=sets,
            hosts=hosts,
            by_host=some is detail,
            bucket_s=None,
        )
        for some in (detail, rollups)
        if some or some is detail
    ]
    names = [field.name for field in fields(Samples)]
    return Samples(*(np.concatenate([getattr(each, n) for each in found]) for n in names))


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
    pairs = _Pairs.of(samples.hosts, samples.sets)
    numbers: dict[Labels, int] = {}
    of_pair = np.array(
        [numbers.setdefault(_label(label_sets, *pair), len(numbers)) for pair in pairs.pairs],
        dtype=np.int64,
    )
    stacks = HashIndex(dictionary.stack_hashes).find(samples.stacks)
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


class _Pairs(NamedTuple):
    """The distinct ones of pairs of ids, and for each line the number of its pair."""

    pairs: list[tuple[int, int]]
    of_line: Integers

    @classmethod
    def of(cls, ones: Hashes, others: Hashes) -> "_Pairs":
        one, of_one = np.unique(ones, return_inverse=True)
        other, of_other = np.unique(others, return_inverse=True)
        used, of_line = distinct(of_one * len(other) + of_other, len(one) * len(other))
        left, right = np.divmod(used, max(1, len(other)))
        return cls(list(zip(one[left].tolist(), other[right].tolist(), strict=True)), of_line)


def _label(label_sets: Mapping[int, Labels], host_id: int, set_id: int) -> Labels:
    host = _labels_of(label_sets, host_id) if host_id else ()
    return make_labels(dict((*_labels_of(label_sets, set_id), *host)))


def _labels_of(label_sets: Mapping[int, Labels], set_id: int) -> Labels:
    try:
        return label_sets[set_id]
    except KeyError:
        raise ProfileError("cannot read blocks: a label set is missing") from None
