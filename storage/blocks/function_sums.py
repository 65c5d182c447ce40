"""Read series of functions (`storage.blocks.functions`), and the same from the detail of an hour.

Lines are added up while they are read, so what comes back has a line for each host or group and
function, however long the window is.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from storage.blocks import folded_leaves
from storage.blocks.dictionary import clean, fetch_locations
from storage.blocks.functions import (
    FUNCTIONS_1D,
    FUNCTIONS_1H,
    FUNCTIONS_10M,
    GROUPS_1D,
    GROUPS_1H,
    HOST_GROUPS,
    TOTALS,
    one_of_each_function,
)
from storage.blocks.loading import SUMS
from storage.blocks.parquet import reading_engine
from storage.blocks.scans import LocalFile, of_table
from storage.blocks.schema import DETAIL, FUNCTIONS
from storage.blocks.slices import Slice, files_in, rows_in
from storage.blocks.times import Ids, register_ids
from storage.columns import Columns, Texts
from storage.grouping import sort_distinct
from storage.hashing import Hashes
from storage.location_functions import FILES_DIFFER, NO_FILE
from storage.profile import Integers, ProfileError
from symbolizer.location import Kind

_BY_HOST = (FUNCTIONS_10M, FUNCTIONS_1D)
_BY_GROUP = (GROUPS_1H, GROUPS_1D)
SELF = (*_BY_HOST, *_BY_GROUP)
"""Tables of self samples by host or group."""
_SETS_NAMED = 64
"""So many label sets are named in a query, which then leaves out the pieces of files of others."""


class FunctionSums(NamedTuple):
    """Sums of functions, a line in each array, in any order.

    A unit is a host's id, or the number of its group; 0 where all hosts are added up. `counts` has
    a line (samples, value), and of totals also (total samples, total value).
    """

    units: Hashes
    sets: Hashes
    functions: Hashes
    counts: Integers


class KnownFunctions(NamedTuple):
    """What function ids mean: `table` as that of `LocationFunctions`, a line for each hash."""

    texts: Texts
    hashes: Hashes
    table: Integers

    @classmethod
    def nameless(cls, functions: Hashes) -> "KnownFunctions":
        """Return some functions whose names are not known, and all empty here."""
        ids = sort_distinct(functions)
        return cls(Texts.of([b""]), ids, np.zeros((len(ids), 4), np.int64))


class LeafSums(NamedTuple):
    """Self samples by leaf location, and what is known of these locations; sorted by second.

    `locations` are Columns without stacks, and a line of `leaves` is the number of one of theirs.
    The seconds are 0 where all are added up.
    """

    seconds: Integers
    hosts: Hashes
    sets: Hashes
    leaves: Integers
    counts: Integers
    locations: Columns


def read_self(
    slices: Sequence[Slice],
    *,
    is_grouped: bool,
    sets: Ids | None = None,
    hosts: Ids | None = None,
    check: Callable[[], None] | None = None,
) -> FunctionSums:
    """Add up the self samples of functions by host, or grouped: by group of hosts.

    The slices have files of the tables SELF, those of groups only if it is grouped and no hosts are
    chosen. All label sets chosen are added up.

    Raises:
        ProfileError: a file is damaged or not one of ours, or a sum exceeds 64 bits.
        SchemaError: a later version wrote one.
    """
    files = files_in(slices, *SELF)
    if (not is_grouped or hosts is not None) and any(each.table in _BY_GROUP for each in files):
        raise ValueError("cannot tell the hosts of groups apart")
    host = f"host_id % {HOST_GROUPS}" if is_grouped else "host_id"
    columns = {
        **dict.fromkeys(_BY_HOST, f"{host} AS unit, function_id, samples, value"),
        **dict.fromkeys(_BY_GROUP, "group_id AS unit, function_id, samples, value"),
    }
    return _fetch(
        slices, columns, "unit, 0::UBIGINT AS set_id", SUMS, sets=sets, hosts=hosts, check=check
    )


def read_totals(
    slices: Sequence[Slice],
    *,
    sets: Ids | None = None,
    check: Callable[[], None] | None = None,
) -> FunctionSums:
    """Add up self and total of functions of all hosts, by label set.

    Raises: as `read_self`.
    """
    columns = {FUNCTIONS_1H: "set_id, function_id, samples, value, total_samples, total_value"}
    keys, sums = "0::UBIGINT AS unit, set_id", f"{SUMS}, {TOTALS}"
    return _fetch(slices, columns, keys, sums, sets=sets, hosts=None, check=check)


def _fetch(
    slices: Sequence[Slice],
    columns: Mapping[str, str],
    keys: str,
    sums: str,
    *,
    sets: Ids | None,
    hosts: Ids | None,
    check: Callable[[], None] | None,
) -> FunctionSums:
    files = files_in(slices, *columns, FUNCTIONS)
    conditions = []
    if sets is not None:
        chosen = np.unique(np.array(sets, dtype=np.uint64)).tolist()
        named = ", ".join(map(str, chosen)) or "NULL"
        is_short = len(chosen) <= _SETS_NAMED
        conditions.append(f"set_id IN ({named if is_short else 'SELECT id FROM wanted_sets'})")
    if hosts is not None:
        conditions.append("host_id IN (SELECT id FROM wanted_hosts)")
    rows = rows_in(slices, columns, _starts_inside, " AND ".join(conditions))
    if not rows:
        nothing = np.zeros(0, np.uint64)
        return FunctionSums(nothing, nothing, nothing, np.zeros((0, 2), np.int64))
    with reading_engine(check) as opened:
        opened.check(files)
        register_ids(opened, "wanted_sets", sets)
        register_ids(opened, "wanted_hosts", hosts)
        opened.load(
            "function_sums", f"SELECT {keys}, function_id, {sums} FROM ({rows}) GROUP BY ALL", files
        )
        found = opened.arrays("SELECT * FROM function_sums")
    names = [name for name in found if name not in ("unit", "set_id", "function_id")]
    counts = np.stack([found[name].astype(np.int64) for name in names], axis=1)
    if counts.min(initial=0) < 0:
        raise ProfileError("cannot read blocks: there are negative counts")
    return FunctionSums(
        found["unit"].astype(np.uint64),
        found["set_id"].astype(np.uint64),
        found["function_id"],
        counts,
    )


def _starts_inside(_table: str, start_s: int, end_s: int) -> str:
    return f"(ts >= {start_s:d} AND ts < {end_s:d})"


def read_functions(
    files: Sequence[LocalFile],
    wanted: Hashes,
    check: Callable[[], None] | None = None,
) -> KnownFunctions:
    """Return what some function ids mean, in their order.

    Raises:
        ProfileError: a file is damaged or not one of ours, or there is none of some function.
        SchemaError: a later version wrote one.
    """
    ids = sort_distinct(wanted)
    chosen = of_table(files, FUNCTIONS)
    if not chosen and not len(ids):
        return KnownFunctions(Texts.of([]), ids, np.zeros((0, 4), np.int64))
    with reading_engine(check) as opened:
        opened.check(chosen)
        opened.register("wanted_functions", {"function_id": ids})
        rows = "(SELECT * FROM {files} SEMI JOIN wanted_functions USING (function_id))"
        query = one_of_each_function(len(chosen)).replace("{files}", rows)
        opened.load("known_functions", query, chosen)
        found = opened.arrays(
            "SELECT function_id, function, module, kind, file, files FROM known_functions"
            " ORDER BY function_id"
        )
    if not np.array_equal(found["function_id"], ids):
        raise ProfileError("cannot read blocks: a function is missing, or is there twice")
    if not set(found["kind"].tolist()) <= {str(kind) for kind in Kind}:
        raise ProfileError("cannot read blocks: there are unknown kinds of functions")
    numbers: dict[str, int] = {}
    table = np.zeros((len(ids), 4), dtype=np.int64)
    for i, name in enumerate(("function", "module", "kind", "file")):
        table[:, i] = [numbers.setdefault(text, len(numbers)) for text in found[name].tolist()]
    files_known = found["files"]
    table[:, 3] = np.where(
        files_known == 1, table[:, 3] + 2, np.where(files_known == 0, NO_FILE, FILES_DIFFER)
    )
    return KnownFunctions(Texts.of([clean(text).encode() for text in numbers]), ids, table)


def read_leaves(
    files: Sequence[LocalFile],
    span: tuple[int, int],
    *,
    by_second: bool = False,
    sets: Ids | None = None,
    hosts: Ids | None = None,
    check: Callable[[], None] | None = None,
) -> LeafSums:
    """Add up self samples of detail between two seconds by host, label set and leaf.

    What interpreters add to stacks is left out (`storage.interpreters`).

    The files are those of detail and of its dictionary.

    Raises:
        ProfileError: as `read_self`, or a stack or location is missing.
    """
    conditions = [f"ts >= {span[0]:d}", f"ts < {span[1]:d}"]
    if sets is not None:
        conditions.append("set_id IN (SELECT id FROM wanted_sets)")
    if hosts is not None:
        conditions.append("host_id IN (SELECT id FROM wanted_hosts)")
    details, stacks = of_table(files, DETAIL), of_table(files, "stacks")
    second = "ts" if by_second else "0"
    with reading_engine(check) as opened:
        opened.check([*details, *stacks])
        register_ids(opened, "wanted_sets", sets)
        register_ids(opened, "wanted_hosts", hosts)
        opened.load(
            "stack_sums",
            f"SELECT CAST({second} AS BIGINT) AS second, host_id, set_id, stack_id, {SUMS}"
            f" FROM {{files}} WHERE {' AND '.join(conditions)} GROUP BY ALL",
            details,
        )
        # An empty stack has no leaf and counts for no function.
        opened.load(
            "leaf_of",
            "SELECT stack_id, any_value(coalesce(frame_ids[-1], 0)) AS leaf,"
            " any_value(len(frame_ids) > 0) AS has_leaf FROM {files}"
            " SEMI JOIN stack_sums USING (stack_id) GROUP BY stack_id",
            stacks,
        )
        if folded_leaves.load_of_files(opened, files):
            opened.run(
                "CREATE OR REPLACE TEMP TABLE leaf_of AS SELECT stack_id, has_leaf,"
                " coalesce(folded_leaves.leaf, leaf_of.leaf) AS leaf"
                " FROM leaf_of LEFT JOIN folded_leaves USING (stack_id)"
            )
        missing = opened.rows("SELECT count(*) FROM stack_sums ANTI JOIN leaf_of USING (stack_id)")
        if missing != [(0,)]:
            raise ProfileError("cannot read blocks: a stack is missing")
        sums = opened.arrays(
            f"SELECT second, host_id, set_id, leaf, {SUMS} FROM stack_sums"
            " JOIN leaf_of USING (stack_id) WHERE has_leaf GROUP BY ALL ORDER BY ALL"
        )
        leaves = sort_distinct(sums["leaf"])
        locations = fetch_locations(opened, files, leaves)
    counts = np.stack([sums["samples"], sums["value"]], axis=1)
    if counts.min(initial=0) < 0:
        raise ProfileError("cannot read blocks: there are negative counts")
    at = np.searchsorted(locations.location_hashes, sums["leaf"])
    return LeafSums(sums["second"], sums["host_id"], sums["set_id"], at, counts, locations)
