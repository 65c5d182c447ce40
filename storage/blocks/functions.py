"""Functions: the series of what each function cost, written when hours and days are rolled up.

Tables of functions and comparisons are answered from these instead of stacks:

- `functions_10m` and `functions_1d`: self samples and self value by host, per ten minutes and day.
- `functions_1h`: self and total of all hosts together. A total counts a stack once, however often
  the function is on it.
- `function_groups_1h` and `function_groups_1d`: self by group of hosts. A host's group is its id
  modulo HOST_GROUPS. A fleet of thousands of hosts is compared by these: a comparison needs
  replicates, and 32 of them tell the noise as well as thousands do, in a thirtieth of the rows.
- `functions`: what the function ids mean. `files` is the number of source files that are known of a
  function, 2 for several; `file` is the only one.

Label sets are those of rollups (`ROLLUP_LABELS`). All are made of detail and therefore exact: no
stack is folded. Stacks without frames have no function and are left out, as from function totals.
So is what interpreters add to stacks (`storage.interpreters`).

A function has the best names that the parts of its hour know. One without a real name lists its
locations (`weak_ids`): they lead whoever reads the files to `frames`, and to the `names` that other
hours may have for them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from storage.blocks import folded_leaves
from storage.blocks.block import ROLLUP_LABELS, labels_id
from storage.blocks.dictionary import fetch_label_sets, fetch_locations
from storage.blocks.loading import SUMS
from storage.blocks.parquet import DEFAULT_MEMORY_BYTES, Arrays, Engine, engine
from storage.blocks.scans import LocalFile, numbered_scan_of, of_table
from storage.blocks.schema import DETAIL, FUNCTIONS
from storage.blocks.tables import STACKS_OF_PARTS, fetch_stacks, write_in_pieces
from storage.columns import Columns
from storage.grouping import HashIndex, distinct, group_keys, number_groups, ranges
from storage.hashing import Hasher
from storage.interpreters import fold, roles_of
from storage.location_functions import FILES_DIFFER, LocationFunctions, functions_of_stacks
from storage.profile import Integers, NameRank, ProfileError
from storage.stack_tree import StackLists, lists_of

FUNCTIONS_10M, FUNCTIONS_1H, FUNCTIONS_1D = "functions_10m", "functions_1h", "functions_1d"
GROUPS_1H, GROUPS_1D = "function_groups_1h", "function_groups_1d"
OF_HOUR = (FUNCTIONS_10M, FUNCTIONS_1H, GROUPS_1H, FUNCTIONS)
"""The tables that `write_hour` writes."""
OF_DAY = (FUNCTIONS_1H, FUNCTIONS_1D, GROUPS_1D, FUNCTIONS)
"""The tables that `write_day` writes."""
SERIES = frozenset({*OF_HOUR, *OF_DAY})

HOST_GROUPS = 32

_WORDS_AT_ONCE = 1 << 21
"""Frames of stacks whose functions are added up at a time: each takes some 100 bytes meanwhile."""
TOTALS = (
    "CAST(sum(total_samples) AS BIGINT) AS total_samples,"
    " CAST(sum(total_value) AS BIGINT) AS total_value"
)
_GROUPED = (
    "SELECT CAST(ts - ts % 3600 AS UINTEGER) AS ts,"
    f" CAST(host_id % {HOST_GROUPS} AS UTINYINT) AS group_id, set_id, function_id, {SUMS}"
    " FROM self_10m GROUP BY ALL"
)
_ONE_OF_EACH = (
    "SELECT function_id, function, module, kind, CASE WHEN files = 1 THEN file ELSE '' END AS file,"
    " files, weak_ids FROM (SELECT function_id, min(function) AS function, min(module) AS module,"
    " min(kind) AS kind, max(file) AS file,"
    " greatest(max(files), least(count(DISTINCT file) FILTER (file <> ''), 2)) AS files,"
    " list_sort(list_distinct(flatten(list(weak_ids)))) AS weak_ids"
    " FROM {files} GROUP BY function_id)"
)


def write_hour(
    files: Sequence[LocalFile],
    folder: Path,
    hasher: Hasher,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
) -> list[LocalFile]:
    """Write the tables OF_HOUR of all parts of an hour; of large ones several files.

    `files` are those of detail and of the dictionary of all parts.

    Raises:
        ProfileError: a file is damaged or not one of ours, or something is missing.
        SchemaError: a later version wrote one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    detail = [each for each in of_table(files, DETAIL) if each.table == DETAIL]
    chosen = of_table(files, "stacks")
    with engine(memory_bytes, folder) as opened:
        opened.check([*detail, *chosen])
        locations = fetch_locations(opened, files)
        functions = LocationFunctions.of(locations, hasher)
        _load_sets(opened, files, hasher)
        opened.register(
            "leaves",
            {
                "frame_id": locations.location_hashes,
                "function_id": functions.hashes[functions.innermost],
            },
        )
        opened.load("stacks", STACKS_OF_PARTS, chosen)
        folded, leaf = "", "frame_ids[-1]"
        if folded_leaves.load_of_hour(opened, locations):
            folded, leaf = "LEFT JOIN folded_leaves USING (stack_id)", f"coalesce(leaf, {leaf})"
        opened.load(
            "placed",
            "SELECT part, stack, stack_id, function_id"
            f" FROM {{files}} {folded} LEFT JOIN leaves ON {leaf} = frame_id",
            chosen,
        )
        placed = "FROM {files} JOIN placed USING (part, stack) JOIN sets USING (set_id)"
        opened.load(
            "self_10m",
            "SELECT CAST(ts - ts % 600 AS UINTEGER) AS ts, host_id, rolled_id AS set_id,"
            f" function_id, {SUMS} {placed} WHERE function_id IS NOT NULL GROUP BY ALL",
            detail,
        )
        opened.load(
            "stack_sums",
            "SELECT CAST(min(ts - ts % 3600) AS UINTEGER) AS ts, rolled_id AS set_id, stack_id,"
            f" {SUMS} {placed} GROUP BY rolled_id, stack_id",
            detail,
        )
        _check_complete(opened, detail)
        _load_totals(opened, locations, functions)
        ((part,),) = opened.rows("SELECT coalesce(min(part), 0) FROM placed")
        opened.run(
            f"CREATE TEMP TABLE self_1h AS SELECT set_id, function_id, {SUMS} FROM self_10m"
            " GROUP BY ALL"
        )
        _load_functions(opened, locations, functions)
        query = f"SELECT *, {part} AS part FROM functions SEMI JOIN totals USING (function_id)"
        known = opened.write(FUNCTIONS, query, folder)
        opened.run(
            "CREATE TEMP TABLE numbered AS"
            " SELECT function_id, part, file_row_number AS function_row"
            f" FROM {numbered_scan_of(known)}"
        )
        queries = {
            FUNCTIONS_10M: "SELECT * FROM self_10m",
            FUNCTIONS_1H: "SELECT ts, set_id, function_id, coalesce(samples, 0) AS samples,"
            " coalesce(value, 0) AS value, total_samples, total_value"
            " FROM totals LEFT JOIN self_1h USING (set_id, function_id)",
            GROUPS_1H: _GROUPED,
        }
        made = [
            file
            for table, rows in queries.items()
            for file in write_in_pieces(
                opened, table, f"SELECT * FROM ({rows}) JOIN numbered USING (function_id)", folder
            )
        ]
        return [*made, known]


def write_day(
    files: Sequence[LocalFile], folder: Path, memory_bytes: int = DEFAULT_MEMORY_BYTES
) -> list[LocalFile]:
    """Write the tables OF_DAY from those of some hours and of the day so far.

    `files` are the tables OF_HOUR of hours that the day does not hold yet, and the tables OF_DAY of
    those that it holds, if there are any. Other tables are left out.

    Raises:
        ProfileError: a file is damaged or not one of ours.
        SchemaError: a later version wrote one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = [each for each in files if each.table in SERIES]
    with engine(memory_bytes, folder) as opened:
        opened.check(known)
        for daily, finer in ((FUNCTIONS_1D, FUNCTIONS_10M), (GROUPS_1D, GROUPS_1H)):
            _load_days(opened, f"sums_{daily}", of_table(known, daily), of_table(known, finer))
        opened.load("hours", "SELECT * FROM {files}", of_table(known, FUNCTIONS_1H))
        opened.load(FUNCTIONS, _ONE_OF_EACH, of_table(known, FUNCTIONS))
        return [
            *write_in_pieces(opened, FUNCTIONS_1H, "SELECT * FROM hours", folder, by_id=True),
            *write_in_pieces(opened, FUNCTIONS_1D, f"SELECT * FROM sums_{FUNCTIONS_1D}", folder),
            *write_in_pieces(opened, GROUPS_1D, f"SELECT * FROM sums_{GROUPS_1D}", folder),
            opened.write(FUNCTIONS, f"SELECT *, 0 AS part FROM {FUNCTIONS}", folder),
        ]


def one_of_each_function(files: int) -> str:
    """Return a query for what is known of the functions in `{files}`, each once."""
    return _ONE_OF_EACH if files > 1 else "SELECT * FROM {files}"


def _load_sets(opened: Engine, files: Sequence[LocalFile], hasher: Hasher) -> None:
    """Make a table `sets`: by label set the id of what rollups keep of it."""
    label_sets = fetch_label_sets(opened, files)
    rolled = [
        labels_id(tuple(pair for pair in labels if pair[0] in ROLLUP_LABELS), hasher)
        for labels in label_sets.values()
    ]
    opened.register(
        "sets",
        {
            "set_id": np.array(list(label_sets), dtype=np.uint64),
            "rolled_id": np.array(rolled, dtype=np.uint64),
        },
    )


def _check_complete(opened: Engine, detail: Sequence[LocalFile]) -> None:
    """Check that the sums are those of all detail, but for stacks without frames.

    Raises:
        ProfileError: they are not: a label set, stack or location is missing.
    """
    opened.load("whole", f"SELECT {SUMS} FROM {{files}}", detail)
    opened.run(
        "CREATE TEMP TABLE frameless AS SELECT * FROM stack_sums"
        " SEMI JOIN (SELECT stack_id FROM stacks WHERE len(frame_ids) = 0) USING (stack_id)"
    )
    whole, by_stack, of_functions, frameless = (
        opened.rows(f"SELECT coalesce(sum(samples), 0), coalesce(sum(value), 0) FROM {rows}")[0]
        for rows in ("whole", "stack_sums", "self_10m", "frameless")
    )
    found = tuple(one + other for one, other in zip(of_functions, frameless, strict=True))
    if not whole == by_stack == found:
        raise ProfileError(
            f"cannot add up functions: samples and value are {found}, those of all stacks {whole}"
        )


def _load_totals(opened: Engine, locations: Columns, functions: LocationFunctions) -> None:
    """Make a table `totals` of the totals of functions, from `stack_sums` and `stacks`."""
    opened.run(
        "CREATE TEMP TABLE totals (ts UINTEGER, set_id UBIGINT, function_id UBIGINT,"
        " total_samples BIGINT, total_value BIGINT)"
    )
    words = opened.rows("SELECT coalesce(sum(len(frame_ids)), 0) FROM stacks")[0][0]
    pieces = 1 + int(words) // _WORDS_AT_ONCE
    index, roles = HashIndex(locations.location_hashes), roles_of(locations)
    # Ids are spread evenly, so that their last digits cut stacks into pieces of one size.
    for piece in range(pieces):
        is_chosen = f"stack_id % {pieces} = {piece}"
        opened.run(f"CREATE TEMP TABLE fetched AS SELECT * FROM stacks WHERE {is_chosen}")
        stacks = fetch_stacks(opened)
        sums = opened.arrays(f"SELECT * FROM stack_sums WHERE {is_chosen} ORDER BY stack_id")
        if not len(stacks.ids) or not len(sums["stack_id"]):
            continue
        order = np.argsort(stacks.ids)
        at = order[HashIndex(stacks.ids[order]).find(sums["stack_id"])]
        lists = StackLists(stacks.offsets, index.find(stacks.frame_ids))
        if roles is not None:
            lists = lists_of(fold(lists, roles))
        rows = _sum_totals(lists, functions, sums, at)
        opened.register("added", rows)
        opened.run("INSERT INTO totals SELECT * FROM added")
    opened.run(
        "CREATE OR REPLACE TEMP TABLE totals AS"
        f" SELECT min(ts) AS ts, set_id, function_id, {TOTALS} FROM totals"
        " GROUP BY set_id, function_id"
    )


def _sum_totals(
    stacks: StackLists, functions: LocationFunctions, sums: Arrays, at: Integers
) -> dict[str, Any]:
    """Return lines of `totals`; line i of the sums is of stack `at[i]`."""
    offsets, numbers = functions_of_stacks(stacks.offsets, stacks.words, functions)
    lengths = offsets[at + 1] - offsets[at]
    sets, of_line = np.unique(sums["set_id"], return_inverse=True)
    count = len(functions.hashes)
    keys = np.repeat(of_line * count, lengths) + numbers[ranges(offsets[at], lengths)]
    # A service has a fraction of all functions, so a table of all pairs is not much larger.
    is_dense = len(sets) * count <= _WORDS_AT_ONCE
    found, which = distinct(keys, len(sets) * count) if is_dense else _distinct_sorted(keys)
    totals = np.zeros((2, len(found)), dtype=np.int64)
    for total, name in zip(totals, ("samples", "value"), strict=True):
        np.add.at(total, which, np.repeat(sums[name], lengths))
    set_numbers, function_numbers = np.divmod(found, count)
    return {
        "ts": np.full(len(found), sums["ts"].min(), dtype=np.uint32),
        "set_id": sets[set_numbers],
        "function_id": functions.hashes[function_numbers],
        "total_samples": totals[0],
        "total_value": totals[1],
    }


def _distinct_sorted(keys: Integers) -> tuple[Integers, Integers]:
    firsts, order = group_keys(keys)
    return keys[order[firsts]], number_groups(firsts, order)


def _load_functions(opened: Engine, locations: Columns, functions: LocationFunctions) -> None:
    """Make a table `functions` of all functions that locations stand for."""
    table = functions.table
    files = np.minimum(table[:, 3], FILES_DIFFER + 1)
    has_file = files > FILES_DIFFER
    texts = [functions.texts.take(table[:, i]) for i in range(3)]
    of_file = functions.texts.take(np.where(has_file, table[:, 3] - 2, 0))
    names = [[text.decode() for text in column] for column in texts]
    shown = [text.decode() if known else "" for text, known in zip(of_file, has_file, strict=True)]
    opened.register(
        "known_functions",
        {
            "function_id": functions.hashes,
            "function": np.array(names[0], dtype=object),
            "module": np.array(names[1], dtype=object),
            "kind": np.array(names[2], dtype=object),
            "file": np.array(shown, dtype=object),
            # None, one or several, as they are counted in the table.
            "files": np.array([0, 2, 1], dtype=np.uint8)[files],
        },
    )
    is_weak = (locations.name_ranks < NameRank.REAL) & (locations.locations[:, 2] == 0)
    weak = np.flatnonzero(is_weak)
    opened.register(
        "weak",
        {
            "function_id": functions.hashes[functions.innermost[weak]],
            "frame_id": locations.location_hashes[weak],
        },
    )
    opened.run(
        "CREATE TEMP TABLE functions AS SELECT known_functions.*,"
        " coalesce(weak_ids, []::UBIGINT[]) AS weak_ids FROM known_functions LEFT JOIN"
        " (SELECT function_id, list(frame_id ORDER BY frame_id) AS weak_ids FROM weak"
        " GROUP BY function_id) USING (function_id)"
    )


def _load_days(opened: Engine, name: str, *some: Sequence[LocalFile]) -> None:
    """Make a table of the sums by day of several kinds of files that have equal columns."""
    kinds = [files for files in some if files]
    for i, files in enumerate(kinds):
        query = (
            "SELECT CAST(ts - ts % 86400 AS UINTEGER) AS ts, * EXCLUDE (ts, samples, value),"
            f" {SUMS} FROM {{files}} GROUP BY ALL"
        )
        opened.load(f"{name}_{i}", query, files)
    rows = " UNION ALL ".join(f"SELECT * FROM {name}_{i}" for i in range(len(kinds)))
    opened.run(
        f"CREATE TEMP TABLE {name} AS SELECT * EXCLUDE (samples, value), {SUMS} FROM ({rows})"
        " GROUP BY ALL"
    )
