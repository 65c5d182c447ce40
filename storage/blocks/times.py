"""Read what is known of objects, and the samples of label sets in them: all without stacks.

It is read from the tables of objects (HEADS), or from heads of ten minutes (HEADS_10M), which stand
for the objects of a host. What is asked of a fleet needs neither by itself: `Lines` says what is
added up, which DuckDB does, so that nothing here is done for each object.
"""

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import NamedTuple

import numpy as np

from storage.blocks.dictionary import clean, fetch_label_sets
from storage.blocks.heads import BUCKET_S, BUCKET_START, HOST_BITS, first_id
from storage.blocks.loading import OBJECT_COUNTS, OBJECT_MAPS, SUMS
from storage.blocks.parquet import Engine, reading_engine
from storage.blocks.scans import LocalFile, named_scan_of, of_table
from storage.blocks.schema import HEADS, HEADS_10M
from storage.blocks.slices import Slice, files_in, rows_in
from storage.blocks.tables import refuse_repeated
from storage.columns import OBJECT_FIELDS, Times
from storage.formats.limits import COUNT_LIMIT, OBJECT_COUNT_LIMIT
from storage.grouping import distinct, sort_distinct
from storage.hashing import Hashes
from storage.objects.keys import NS_PER_S
from storage.profile import Accounting, Host, Integers, Labels, ProfileError, Window, make_labels

Ids = Sequence[int] | Hashes
_OBJECTS, _OBJECTS_10M = HEADS[0], HEADS_10M[0]
_LARGEST = 2**62
"""Longer presence of a service in an object is cut, as in `storage.columns.presence_of`."""
_HOW = {
    **dict.fromkeys(("cpus", "agent_rss_bytes", "end_ns", "length_ns"), "max"),
    **dict.fromkeys(("period_ns", "start_ns"), "min"),
}
"""What of several objects stands for all; other numbers are added up."""
_FEW_IDS = 100
_LOST = "CAST(coalesce(list_sum(map_values(lost)), 0) AS BIGINT)"
_START = f"start_ns // {NS_PER_S}"
_NUMBERS = (*OBJECT_COUNTS, "period_ns", "start_ns", "end_ns")


class Lines(Enum):
    """What a line of `objects`, `times` and `presence` stands for."""

    EACH = "each object, or the ten minutes of a host where heads are read"
    HOST = "all objects of a host that start between two successive edges"
    SECOND = "all objects that start in a second, or in ten minutes, without their hosts"
    SPAN = "objects as for SECOND; a host's samples of a label set are all added up, as of object 0"
    ALL = "all objects, without their hosts"
    LABELS = "all objects: label sets are added up, and hosts are, one without the other"


class Heads(NamedTuple):
    """What is known of the objects that start in a window; `objects`, `presence` as in Columns."""

    type: str
    unit: str
    period_ns: int
    window: Window
    accounting: Accounting
    objects: Integers
    present_sets: tuple[Labels, ...]
    presence: Integers


def having_hosts(
    files: Sequence[LocalFile], hosts: Ids, check: Callable[[], None] | None = None
) -> set[LocalFile]:
    """Return those files of `times` that have samples of some hosts. `check` may end it.

    Raises:
        ProfileError: a file is damaged or not one of ours.
        SchemaError: a later version wrote one.
    """
    if not files:
        return set()
    with reading_engine(check) as opened:
        opened.check(files)
        condition = " AND ".join(is_among(opened, "host_id", "wanted_hosts", hosts))
        # A query for each file would take DuckDB 5 s to plan for those of two weeks, 4,000.
        query = f"SELECT DISTINCT filename FROM {named_scan_of(files)} WHERE {condition}"
        found = set(opened.arrays_of(query, files)["filename"].tolist())
    return {each for each in files if str(each.path) in found}


def read_heads(files: Sequence[LocalFile], *, start_s: int, end_s: int) -> Heads | None:
    """Return what is known of the objects that start in some seconds; None if none does.

    Raises:
        ProfileError: a file is damaged or not one of ours, two have one object, or objects are of
            different types or units.
        SchemaError: a later version wrote one.
    """
    slices = [Slice(tuple(files), ((start_s, end_s),))]
    with reading_engine() as opened:
        if not load_objects(opened, slices, Lines.EACH):
            return None
        return fetch_heads(opened, slices, fetch_label_sets(opened, files), Lines.EACH)


def read_times(
    slices: Sequence[Slice],
    lines: Lines = Lines.EACH,
    *,
    sets: Ids | None = None,
    hosts: Ids | None = None,
    edges_s: Sequence[int] = (),
    check: Callable[[], None] | None = None,
) -> Times | None:
    """Return the Times of the objects that start in the seconds of slices; None if none does.

    `sets` and `hosts` choose lines by id. Objects of other hosts are left out. `edges_s` are those
    of Lines.HOST. `check` may end it, as in `reading_engine`.

    Raises:
        ProfileError: as `read_heads`.
        SchemaError: a later version wrote a file.
    """
    with reading_engine(check) as opened:
        if not load_objects(opened, slices, lines, hosts, edges_s):
            return None
        label_sets = fetch_label_sets(opened, files_in(slices, "label_sets"))
        heads = fetch_heads(opened, slices, label_sets, lines, hosts, edges_s=edges_s)
        return fetch_times(
            opened, slices, heads, label_sets, lines, sets=sets, hosts=hosts, edges_s=edges_s
        )


def register_ids(opened: Engine, name: str, ids: Ids | None) -> None:
    if ids is not None:
        opened.register(name, {"id": sort_distinct(np.array(ids, dtype=np.uint64))})


def is_among(opened: Engine, column: str, name: str, ids: Ids | None) -> list[str]:
    """Return the condition that a column is one of some ids, which are registered; none for all.

    A few stand in the query itself: so DuckDB skips what a file's index says has none of them.
    """
    register_ids(opened, name, ids)
    if ids is None:
        return []
    if 0 < len(ids) <= _FEW_IDS:
        return [f"{column} IN ({', '.join(str(int(each)) for each in ids)})"]
    return [f"{column} IN (SELECT id FROM {name})"]


def load_objects(
    opened: Engine,
    slices: Sequence[Slice],
    lines: Lines,
    hosts: Ids | None = None,
    edges_s: Sequence[int] = (),
) -> bool:
    """Make a table `chosen` of the objects of slices, numbered; return whether there are any.

    Its `number` is that of the line which an object is a part of. With `hosts` objects of others
    are left out.
    """
    opened.check(files_in(slices, *HEADS, *HEADS_10M))
    files = files_in(slices, _OBJECTS, _OBJECTS_10M)
    if not files:
        return False
    if of_table(files, _OBJECTS):
        refuse_repeated(opened, files)
    register_ids(opened, "wanted_hosts", hosts)
    is_chosen = "true"
    if hosts is not None:
        is_chosen = "(host_id IN (SELECT id FROM wanted_hosts) OR len(hosts) <> 1"
        # Rows may name a host of their own, as those of imported profiles do.
        named = _rows(slices, "times", "object_id", "host_id IN (SELECT id FROM wanted_hosts)")
        if named:
            opened.load("having_host", f"SELECT DISTINCT object_id FROM ({named})", files)
            is_chosen += " OR object_id IN (SELECT object_id FROM having_host)"
        is_chosen += ")"
    order = "start_s, host_key, length_s, content16"
    number = {
        Lines.EACH: f"row_number() OVER (ORDER BY {order}, object_id)",
        Lines.HOST: f"dense_rank() OVER (ORDER BY {_passed(edges_s, _START)}, host)",
        Lines.SECOND: "dense_rank() OVER (ORDER BY start_s)",
        Lines.SPAN: "dense_rank() OVER (ORDER BY start_s)",
    }.get(lines, "1")
    kept = f"object_id, host, type, unit, {', '.join(_NUMBERS)}, {_LOST} AS lost"
    found = rows_in(
        slices,
        {
            _OBJECTS: f"{kept}, {order}, 1::BIGINT AS objects, end_ns - start_ns AS length_ns",
            _OBJECTS_10M: f"{kept}, {order}, objects, 0::BIGINT AS length_ns",
        },
        _starts_inside,
        is_chosen,
    )
    left_out = "EXCLUDE (host_key, length_s, content16)"
    if _are_apart(slices, lines, hosts, edges_s):
        sums = ", ".join(
            f"{_HOW.get(name, 'sum')}({name})::BIGINT AS {name}"
            for name in (*_NUMBERS, "lost", "objects", "length_ns")
        )
        kept, keys, left_out = "start_s", "start_s", ""
        if lines is Lines.HOST:
            kept, keys = f"{_host_line(edges_s)}, any_value(host) AS host", "edges, host_bits"
            number = f"row_number() OVER (ORDER BY {keys})"
        found = f"SELECT type, unit, {kept}, {sums} FROM ({found}) GROUP BY type, unit, {keys}"
    opened.load("chosen", f"SELECT * {left_out}, {number} - 1 AS number FROM ({found})", files)
    return opened.rows("SELECT count(*) FROM chosen") != [(0,)]


def _passed(edges_s: Sequence[int], second: str) -> str:
    """Return how many edges are not after a second."""
    return " + ".join(f"({second} >= {edge:d})::INTEGER" for edge in edges_s) or "0"


def _host_line(edges_s: Sequence[int]) -> str:
    """Return what an `object_id` of heads says of the line of a host that it belongs to."""
    return f"{_passed(edges_s, BUCKET_START)} AS edges, {HOST_BITS} AS host_bits"


def _are_apart(
    slices: Sequence[Slice], lines: Lines, hosts: Ids | None, edges_s: Sequence[int] = ()
) -> bool:
    """Return whether lines can be added up table by table, without joining those of an object.

    So it is for heads of all hosts, whose ids tell when they are from, and of which host.
    """
    if lines is Lines.EACH or any(edge % BUCKET_S for edge in edges_s):
        return False
    return _are_all(slices, hosts)


def _are_all(slices: Sequence[Slice], hosts: Ids | None) -> bool:
    """Return whether all rows of slices count whose ids are inside of them."""
    return hosts is None and not files_in(slices, _OBJECTS)


def _joined(rows: str, *, lines: Lines, edges_s: Sequence[int], are_apart: bool) -> str:
    """Return what selects rows of a table of HEADS with the `number` of their lines."""
    if not are_apart:
        return f"({rows}) JOIN chosen USING (object_id)"
    if lines is Lines.HOST:
        marked = f"(SELECT *, {_host_line(edges_s)} FROM ({rows}))"
        return (
            f"{marked} JOIN (SELECT edges, host_bits, number FROM chosen) USING (edges, host_bits)"
        )
    if lines is not Lines.SECOND:
        return f"(SELECT *, 0 AS number FROM ({rows}))"
    starts = f"(SELECT *, {BUCKET_START} AS start_s FROM ({rows}))"
    return f"{starts} JOIN (SELECT DISTINCT start_s, number FROM chosen) USING (start_s)"


def _rows(slices: Sequence[Slice], table: str, columns: str, condition: str = "") -> str:
    """Return a query for rows of a table of HEADS, and of heads of ten minutes inside of slices."""
    return rows_in(slices, {table: columns, f"{table}_10m": columns}, _has_id_inside, condition)


def _starts_inside(_table: str, start_s: int, end_s: int) -> str:
    return f"(start_s >= {start_s:d} AND start_s < {end_s:d})"


def _has_id_inside(table: str, start_s: int, end_s: int) -> str:
    """Return a condition for heads: a day may have some that do not count. Else objects tell."""
    if table not in HEADS_10M:
        return ""
    return f"(object_id >= {first_id(start_s):d} AND object_id < {first_id(end_s):d})"


def fetch_heads(
    opened: Engine,
    slices: Sequence[Slice],
    label_sets: Mapping[int, Labels],
    lines: Lines,
    hosts: Ids | None = None,
    *,
    edges_s: Sequence[int] = (),
) -> Heads:
    """Return what is known of the objects in the table `chosen`.

    It was made for the same `lines`, `hosts` and `edges_s`.
    """
    are_apart = _are_apart(slices, lines, hosts, edges_s)
    kinds = opened.rows("SELECT DISTINCT type, unit FROM chosen")
    if len(kinds) != 1:
        raise ProfileError("cannot read blocks: their objects are of different types or units")
    _check_numbers(opened, is_each=not files_in(slices, _OBJECTS_10M))
    sums = ", ".join(f"{_HOW.get(name, 'sum')}({name})" for name in OBJECT_COUNTS)
    # Python's integers: the counts of many objects may exceed 64 bits, and the merge has them so.
    (row,) = opened.rows(f"SELECT min(period_ns), min(start_ns), max(end_ns), {sums} FROM chosen")
    counts = dict(zip(OBJECT_COUNTS, map(int, row[3:]), strict=True))
    files = files_in(slices, _OBJECTS, _OBJECTS_10M)
    described = f"object_id, hosts, {', '.join(OBJECT_MAPS)}"
    opened.load(
        "described",
        f"SELECT {described} FROM"
        f" ({_rows(slices, _OBJECTS, described)})"
        f"{'' if _are_all(slices, hosts) else ' SEMI JOIN chosen USING (object_id)'}",
        files,
    )
    maps = {
        name: {
            clean(text): int(count)
            for text, count in opened.rows(
                "SELECT pair.key, sum(greatest(coalesce(pair.value, 0), 0)) FROM"
                f" (SELECT unnest(map_entries({name})) AS pair FROM described) GROUP BY pair.key"
            )
        }
        for name in OBJECT_MAPS
    }
    named = opened.rows(
        "SELECT DISTINCT host.name, host.host_id FROM (SELECT unnest(hosts) AS host FROM described)"
    )
    opened.run("DROP TABLE described")
    present = _rows(slices, "presence", "object_id, set_id, present_ns") or _NO_PRESENCE
    lines_present = lines if lines is Lines.HOST else Lines.ALL
    joined = _joined(present, lines=lines_present, edges_s=edges_s, are_apart=are_apart)
    kept_ns, grouped = "sum(present_ns) AS present_ns", " GROUP BY ALL"
    if lines is Lines.EACH:
        kept_ns, grouped = "present_ns", ""
    elif lines is Lines.HOST:
        kept_ns = f"least(sum(greatest(present_ns, 0)), {_LARGEST})::BIGINT AS present_ns"
    opened.load("present", f"SELECT number, set_id, {kept_ns} FROM {joined}{grouped}", files)
    services: dict[Labels, int] = {}
    for set_id, present_ns in opened.rows(
        "SELECT set_id, sum(present_ns) FROM present GROUP BY set_id"
    ):
        services[labels_of(label_sets, set_id)] = int(present_ns)
    present_sets: tuple[Labels, ...] = ()
    presence: Integers = np.zeros((0, 3), np.int64)
    if lines in (Lines.EACH, Lines.HOST):
        present_sets, presence = _fetch_presence(opened, label_sets)
    return Heads(
        type=clean(kinds[0][0]),
        unit=clean(kinds[0][1]),
        period_ns=int(row[0]),
        window=Window(int(row[1]), int(row[2])),
        accounting=Accounting(
            hosts=tuple(sorted(Host(clean(name), clean(host_id)) for name, host_id in named)),
            services=services,
            **counts,
            lost=maps["lost"],
            stops=maps["stops"],
            misses=maps["misses"],
        ),
        objects=_fetch_objects(opened),
        present_sets=present_sets,
        presence=presence,
    )


def _check_numbers(opened: Engine, *, is_each: bool) -> None:
    """Check the numbers of the table `chosen`.

    Raises:
        ProfileError: one is impossible.
    """
    names = (*_NUMBERS, "objects", "length_ns")
    (row,) = opened.rows(f"SELECT {', '.join(f'min({n}), max({n})' for n in names)} FROM chosen")
    for name, least, most in zip(names, row[::2], row[1::2], strict=True):
        if least is None:
            raise ProfileError("cannot read blocks: a value is missing")
        limit = OBJECT_COUNT_LIMIT if is_each and name in OBJECT_COUNTS else _LARGEST
        first = 1 if name in {"period_ns", "objects"} else 0
        if name != "length_ns" and not first <= least <= most <= limit:
            raise ProfileError(f"cannot read blocks: an object has an impossible {name}")


def _fetch_objects(opened: Engine) -> Integers:
    """Return `objects` of Columns."""
    sums = ", ".join(
        f"CAST({_HOW.get(name, 'sum')}({name}) AS BIGINT) AS {name}" for name in OBJECT_FIELDS
    )
    columns = opened.arrays(f"SELECT {sums} FROM chosen GROUP BY number ORDER BY number")
    return np.stack([columns[name].astype(np.int64) for name in OBJECT_FIELDS], axis=1)


def _fetch_presence(
    opened: Engine, label_sets: Mapping[int, Labels]
) -> tuple[tuple[Labels, ...], Integers]:
    """Return `present_sets` and `presence` of Columns, with the label `host` of each object."""
    lines = opened.arrays("SELECT * FROM present ORDER BY number, set_id")
    of_line = "SELECT any_value(host) AS host FROM chosen GROUP BY number ORDER BY number"
    host_of = opened.arrays(of_line)["host"]
    hosts, of_object = np.unique(host_of, return_inverse=True)
    numbers = Pairs.of(of_object[lines["number"]].astype(np.uint64), lines["set_id"])
    present_sets = []
    for host, set_id in numbers.pairs:
        name, labels = str(hosts[host]), labels_of(label_sets, set_id)
        labelled = make_labels({"host": clean(name), **dict(labels)}) if name else labels
        present_sets.append(labelled)
    present_ns = np.clip(lines["present_ns"], 0, _LARGEST)
    presence = np.stack([lines["number"], numbers.of_line, present_ns], axis=1)
    return tuple(present_sets), presence.astype(np.int64)


def fetch_times(
    opened: Engine,
    slices: Sequence[Slice],
    heads: Heads,
    label_sets: Mapping[int, Labels],
    lines: Lines,
    *,
    sets: Ids | None,
    hosts: Ids | None,
    edges_s: Sequence[int] = (),
) -> Times:
    """Return the lines of the objects in the table `chosen`, which was made for them."""
    are_apart = _are_apart(slices, lines, hosts, edges_s)
    conditions = [
        "true",
        *is_among(opened, "set_id", "wanted_sets", sets),
        *is_among(opened, "host_id", "wanted_hosts", hosts),
    ]
    found = _rows(
        slices, "times", "object_id, host_id, set_id, samples, value", " AND ".join(conditions)
    )
    grouped = {
        Lines.EACH: ("number, host_id, set_id", "ALL"),
        Lines.HOST: ("number, host_id, set_id", "ALL"),
        Lines.SECOND: ("number, 0::UBIGINT AS host_id, set_id", "ALL"),
        Lines.SPAN: ("0 AS number, host_id, set_id", "ALL"),
        Lines.ALL: ("number, 0::UBIGINT AS host_id, set_id", "ALL"),
        Lines.LABELS: (
            "number, coalesce(host_id, 0) AS host_id, coalesce(set_id, 0) AS set_id",
            "GROUPING SETS ((number, host_id), (number, set_id))",
        ),
    }[lines]
    joined = _joined(found or _NO_TIMES, lines=lines, edges_s=edges_s, are_apart=are_apart)
    opened.load(
        "lines",
        f"SELECT {grouped[0]}, {SUMS}, min(samples) AS least, min(value) AS least_value"
        f" FROM {joined}"
        f" GROUP BY {grouped[1]}"
        " ORDER BY number, host_id, set_id",
        files_in(slices, *HEADS, *HEADS_10M),
    )
    of_line = opened.arrays("SELECT * FROM lines")
    for name, least in (("samples", "least"), ("value", "least_value")):
        counts = of_line[name]
        if of_line[least].min(initial=0) < 0 or counts.sum(dtype=np.float64) > COUNT_LIMIT:
            raise ProfileError("cannot read blocks: there are negative or impossible counts")
    pairs = Pairs.of(of_line["host_id"], of_line["set_id"])
    is_apart = lines is Lines.LABELS
    return Times(
        type=heads.type,
        unit=heads.unit,
        window=heads.window,
        accounting=heads.accounting,
        objects=heads.objects,
        label_sets=tuple(label(label_sets, *pair, is_apart=is_apart) for pair in pairs.pairs),
        times=np.stack([of_line["number"].astype(np.int64), pairs.of_line], axis=1),
        time_counts=np.stack([of_line["samples"], of_line["value"]], axis=1),
        present_sets=heads.present_sets,
        presence=heads.presence,
    )


_NO_PRESENCE = (
    "SELECT 0::UBIGINT AS object_id, 0::UBIGINT AS set_id, 0::BIGINT AS present_ns LIMIT 0"
)
_NO_TIMES = (
    "SELECT 0::UBIGINT AS object_id, 0::UBIGINT AS host_id, 0::UBIGINT AS set_id,"
    " 0::BIGINT AS samples, 0::BIGINT AS value LIMIT 0"
)


class Pairs(NamedTuple):
    """The distinct ones of pairs of ids, and for each line the number of its pair."""

    pairs: list[tuple[int, int]]
    of_line: Integers

    @classmethod
    def of(cls, ones: Hashes, others: Hashes) -> "Pairs":
        one, of_one = np.unique(ones, return_inverse=True)
        other, of_other = np.unique(others, return_inverse=True)
        used, of_line = distinct(of_one * len(other) + of_other, len(one) * len(other))
        left, right = np.divmod(used, max(1, len(other)))
        return cls(list(zip(one[left].tolist(), other[right].tolist(), strict=True)), of_line)


def label(
    label_sets: Mapping[int, Labels], host_id: int, set_id: int, *, is_apart: bool = False
) -> Labels:
    """Return the labels of a set and a host; host 0 adds none. If they are apart, one of both."""
    host = labels_of(label_sets, host_id) if host_id else ()
    if is_apart and not set_id:
        return host
    return make_labels(dict((*labels_of(label_sets, set_id), *host)))


def labels_of(label_sets: Mapping[int, Labels], set_id: int) -> Labels:
    try:
        return label_sets[set_id]
    except KeyError:
        raise ProfileError("cannot read blocks: a label set is missing") from None
