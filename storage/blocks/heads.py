"""Heads of ten minutes: what is known of each host, added up over the objects of ten minutes.

They are made of the tables `objects`, `times` and `presence` of an hour's parts (HEADS), when the
hour is rolled up: a tenth of the rows, and label sets reduced to ROLLUP_LABELS. So a reader need
not look at each object for how many ticks there were, for a timeline, or for how long a service was
there. Counts and samples stay exact.

A line of `objects_10m` stands for the objects of one host that start in the same ten minutes of the
clock. Its `object_id` holds the number of these ten minutes since 1970 in the upper 23 bits, so
that rows sorted by it are sorted by time, and a hash of the host in the lower 41.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from storage.blocks.block import ROLLUP_LABELS, LabelIds
from storage.blocks.dictionary import clean
from storage.blocks.loading import OBJECT_COUNTS, OBJECT_MAPS, SUMS, load_label_sets
from storage.blocks.parquet import DEFAULT_MEMORY_BYTES, Engine, engine
from storage.blocks.scans import LocalFile, of_table
from storage.blocks.schema import HEADS, HEADS_10M
from storage.blocks.tables import one_of_each, refuse_repeated
from storage.hashing import Hasher
from storage.profile import make_labels

BUCKET_S = 600
_HOST_BITS = 41
BUCKET_START = f"CAST((object_id >> {_HOST_BITS}) * {BUCKET_S} AS UINTEGER)"
"""When the ten minutes of an `object_id` start."""
HOST_BITS = f"(object_id & {(1 << _HOST_BITS) - 1})"
"""What tells the host of an `object_id`."""
_LARGEST_OF = frozenset({"cpus", "agent_rss_bytes"})
"""Counts of which the largest stands for all; others are added up."""


def write_heads(
    files: Sequence[LocalFile],
    folder: Path,
    hasher: Hasher,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
) -> list[LocalFile]:
    """Write the heads of ten minutes of some parts, and the label sets that they refer to.

    Returns a file of each table of HEADS_10M and one of `label_sets`.

    Raises:
        ProfileError: a file is damaged or not one of ours, two parts hold the same object, or sums
            exceed 64 bits.
        SchemaError: a later version wrote one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with engine(memory_bytes, folder) as opened:
        opened.check([each for each in files if each.table in (*HEADS, "label_sets")])
        refuse_repeated(opened, files)
        object_id = (
            f"CAST(start_s // {BUCKET_S} AS UBIGINT) * {1 << _HOST_BITS}"
            f" + (md5_number_lower(host_key || ' ' || host) >> {64 - _HOST_BITS})"
        )
        query = f"SELECT {object_id} AS head_id, * FROM {{files}}"
        opened.load("heads", query, of_table(files, "objects"))
        for table in ("times", "presence"):
            opened.load(table, "SELECT * FROM {files}", of_table(files, table))
        labels = _load_rolled_sets(opened, of_table(files, "label_sets"), hasher)
        _add_up_objects(opened)
        opened.run(
            "CREATE TEMP TABLE times_10m AS"
            f" SELECT head_id AS object_id, times.host_id, rolled_id AS set_id, {SUMS}"
            " FROM times JOIN heads USING (object_id) JOIN rolled USING (set_id) GROUP BY ALL"
        )
        opened.run(
            "CREATE TEMP TABLE presence_10m AS SELECT head_id AS object_id, rolled_id AS set_id,"
            " CAST(sum(present_ns) AS BIGINT) AS present_ns"
            " FROM presence JOIN heads USING (object_id) JOIN rolled USING (set_id) GROUP BY ALL"
        )
        load_label_sets(opened, labels)
        opened.run(
            "INSERT INTO label_sets SELECT * FROM known_sets SEMI JOIN ("
            "SELECT host_id AS set_id FROM times_10m UNION SELECT host_id FROM objects_10m)"
            " USING (set_id) ANTI JOIN label_sets USING (set_id)"
        )
        return [
            opened.write(table, f"SELECT * FROM {table}", folder)
            for table in (*HEADS_10M, "label_sets")
        ]


def first_id(start_s: int) -> int:
    """Return the least `object_id` of the ten minutes that start at a second or later."""
    return -(-start_s // BUCKET_S) << _HOST_BITS


def _load_rolled_sets(opened: Engine, files: Sequence[LocalFile], hasher: Hasher) -> LabelIds:
    """Make the tables `known_sets` and `rolled` (set_id, rolled_id); return the rolled up sets."""
    opened.load("known_sets", one_of_each("label_sets", len(files)), files)
    kept = ", ".join(f"labels['{name}'] AS kept_{i}" for i, name in enumerate(ROLLUP_LABELS))
    names = ", ".join(f"kept_{i}" for i in range(len(ROLLUP_LABELS)))
    opened.run(
        f"CREATE TEMP TABLE kept AS SELECT set_id, {kept} FROM known_sets SEMI JOIN"
        " (SELECT set_id FROM times UNION SELECT set_id FROM presence) USING (set_id)"
    )
    opened.run(
        "CREATE TEMP TABLE distinct_kept AS SELECT row_number() OVER () AS number, *"
        f" FROM (SELECT DISTINCT {names} FROM kept)"
    )
    labels = LabelIds(hasher)
    numbers, ids = [], []
    for number, *texts in opened.rows("SELECT * FROM distinct_kept"):
        pairs = zip(ROLLUP_LABELS, texts, strict=True)
        numbers.append(number)
        ids.append(labels.id(make_labels({k: clean(v) for k, v in pairs if v is not None})))
    opened.register(
        "rolled_ids",
        {"number": np.array(numbers, np.int64), "rolled_id": np.array(ids, np.uint64)},
    )
    same = " AND ".join(
        f"kept.kept_{i} IS NOT DISTINCT FROM distinct_kept.kept_{i}"
        for i in range(len(ROLLUP_LABELS))
    )
    opened.run(
        "CREATE TEMP TABLE rolled AS SELECT set_id, rolled_id FROM kept"
        f" JOIN distinct_kept ON {same} JOIN rolled_ids USING (number)"
    )
    return labels


def _add_up_objects(opened: Engine) -> None:
    """Make the table `objects_10m` of `heads`."""
    counts = ", ".join(
        f"max({name}) AS {name}"
        if name in _LARGEST_OF
        else f"CAST(sum({name}) AS BIGINT) AS {name}"
        for name in OBJECT_COUNTS
    )
    lists = [("hosts", "host", "SELECT DISTINCT head_id, unnest(hosts) AS host FROM heads")]
    for name in OBJECT_MAPS:
        pairs = f"SELECT head_id, unnest(map_entries({name})) AS pair FROM heads"
        sums = (
            "SELECT head_id, pair.key AS key, CAST(sum(pair.value) AS BIGINT) AS number"
            f" FROM ({pairs}) GROUP BY ALL"
        )
        lists.append((name, "{'k': key, 'v': number}", sums))
    joins = " ".join(
        f"LEFT JOIN (SELECT head_id, list({element} ORDER BY {element}) AS {name} FROM ({rows})"
        " GROUP BY head_id) USING (head_id)"
        for name, element, rows in lists
    )
    maps = ", ".join(f"map_from_entries(coalesce({name}, [])) AS {name}" for name in OBJECT_MAPS)
    opened.run(
        "CREATE TEMP TABLE objects_10m AS SELECT * EXCLUDE (head_id, hosts, lost, stops, misses),"
        f" head_id AS object_id, coalesce(hosts, []) AS hosts, {maps} FROM ("
        "SELECT head_id, '' AS content16, min(type) AS type, min(unit) AS unit,"
        f" min(start_s) // {BUCKET_S} * {BUCKET_S} AS start_s, {BUCKET_S} AS length_s,"
        " min(host_key) AS host_key, min(host) AS host, min(host_id) AS host_id,"
        " min(start_ns) AS start_ns, max(end_ns) AS end_ns, min(period_ns) AS period_ns,"
        f" {counts}, count(*) AS objects FROM heads GROUP BY head_id) {joins}"
    )
