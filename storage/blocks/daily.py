"""Write the tables of a day, of those that it had before and those of hours that are over.

Hours are added, or one that has changed is replaced: `samples_1h` tells them apart. Totals of an
hour and a label set stay exact. A day with many stacks folds rare ones again: each of its hours has
folded others, so together they would have several times the stacks that matter.

Of the samples of a day and of their value, 99 % keep their stacks, however often it is renewed and
whatever of it was folded before; or, if agents have folded more, all but that. Only if an hour is
replaced can it be less, by 1 % of what that hour had. Which stacks are rare depends on what a day
has when it is renewed: of one that is made hour by hour other stacks may be folded than of one that
is made at once, but as much; `storage.blocks.day` makes it at once when it is over. Equal renewals
make equal files, in whatever order files are given.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from storage.blocks import functions
from storage.blocks.frame_tree import (
    EMPTY_STACK,
    FrameTree,
    Locations,
    read_lists,
    read_locations,
    read_tree,
)
from storage.blocks.loading import SUMS, insert_stacks
from storage.blocks.manifest import DAY_S, HOUR_S
from storage.blocks.parquet import DEFAULT_MEMORY_BYTES, Arrays, Engine, engine
from storage.blocks.rollup import FOLDED_ABOVE, Stacks, keep_common, rest_id
from storage.blocks.scans import LocalFile, of_table, scan_of
from storage.blocks.schema import DICTIONARY, FUNCTIONS, HEADS_10M, ROLLUPS, STACK_TREE
from storage.blocks.tables import (
    PIECE_BYTES,
    bucket_of,
    merge_dictionaries,
    write_in_pieces,
)
from storage.grouping import find_hashes, sort_distinct
from storage.hashing import Hasher, Hashes
from storage.profile import ProfileError

HOURLY, DAILY = ROLLUPS[HOUR_S], ROLLUPS[DAY_S]
_LABEL_SETS = (
    (HOURLY, "set_id"),
    ("times_10m", "set_id"),
    ("times_10m", "host_id"),
    ("objects_10m", "host_id"),
    ("presence_10m", "set_id"),
)
"""Columns of a table that refer to label sets."""


class DayFiles(NamedTuple):
    """What a day is made of: files of what it was before, and of hours that are added.

    `rollups` are the `hourly` files of these hours, and `dictionary` says what is in them: files of
    DICTIONARY that may hold much else. Of the hours `replaced`, by when they start in seconds, the
    previous files do not count: then these are only HOURLY and what says what is in it, `rollups`
    has no HOURLY of hours that stay, and all other tables of all hours.
    """

    previous: Sequence[LocalFile]
    rollups: Sequence[LocalFile]
    dictionary: Sequence[LocalFile]
    replaced: Sequence[int] = ()


def write_day(
    source: DayFiles, folder: Path, hasher: Hasher, memory_bytes: int = DEFAULT_MEMORY_BYTES
) -> list[LocalFile]:
    """Write all tables of a day: its previous files and the rollups of more hours together.

    The table STACK_TREE is left out if it would be too large for readers, or if a stack has
    more than DEEPEST locations. Such stacks are not folded.

    Raises:
        ProfileError: a file is damaged or not one of ours, something is missing that they refer to,
            or sums exceed 64 bits.
        SchemaError: a later version wrote one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [*source.previous, *source.rollups]
    with engine(memory_bytes, folder) as opened:
        totals = _totals_of(opened, source)
    known = [
        each for each in (*files, *source.dictionary) if each.table in (*DICTIONARY, STACK_TREE)
    ]
    rest = rest_id(hasher)
    with engine(memory_bytes, folder) as opened:
        locations = read_locations(opened, known, rest)
        tree, others = _read_stacks(opened, known, totals["stack_id"], locations)
    with engine(memory_bytes, folder) as opened:
        tree = _fold(opened, tree, totals, rest, hasher)
        made = _write_samples(opened, source, folder)
        for table in HEADS_10M:
            chosen = of_table(files, table)
            opened.check(chosen)
            made += write_in_pieces(opened, table, "SELECT * FROM {files}", folder, chosen)
        sets = _label_sets_of(opened, made)
    if of_table(files, FUNCTIONS):
        made += functions.write_day(files, folder, memory_bytes)
    with engine(memory_bytes, folder) as opened:
        if not len(others.frame_ids):
            made += _write_tree(opened, tree, folder)
        made += _write_stacks(opened, tree, others, folder)
    frames = np.concatenate([tree.used_locations(), others.frame_ids])
    meanings = merge_dictionaries(known, folder, frames, sets, rest=rest, memory_bytes=memory_bytes)
    return [*made, *meanings]


def _totals_of(opened: Engine, source: DayFiles) -> Arrays:
    """Return the sums of a day's stacks."""
    files = _samples_of(source)
    opened.check(files)
    table = HOURLY if source.replaced else DAILY
    query = f"SELECT stack_id, {SUMS} FROM {_rows_of(source, table)} GROUP BY stack_id"
    opened.load("totals", query, files)
    return opened.arrays("SELECT * FROM totals ORDER BY stack_id")


def _samples_of(source: DayFiles) -> list[LocalFile]:
    """Return the files that `_rows_of` reads."""
    previous = [each for each in source.previous if each.table in (HOURLY, DAILY)]
    return [*previous, *_added_of(source)]


def _added_of(source: DayFiles) -> list[LocalFile]:
    """Return the samples of the hours that are added, and the stacks that they number."""
    return of_table([*source.rollups, *source.dictionary], HOURLY)


def _rows_of(source: DayFiles, table: str) -> str:
    """Return what stands in a query for the rows of a day, the previous ones being of a table."""
    columns = "ts, set_id, stack_id, samples, value"
    rows = []
    if added := _added_of(source):
        rows.append(f"SELECT {columns} FROM {scan_of(added)}")
    if previous := [each for each in source.previous if each.table == table]:
        left_out = ", ".join(map(str, source.replaced))
        kept = f"WHERE ts NOT IN ({left_out})" if left_out else ""
        rows.append(f"SELECT {columns} FROM {scan_of(previous)} {kept}")
    if not rows:
        raise ProfileError("cannot make a day: a table is missing")
    return f"({' UNION ALL '.join(rows)})"


def _read_stacks(
    opened: Engine, known: Sequence[LocalFile], wanted: Hashes, locations: Locations
) -> tuple[FrameTree, Stacks]:
    """Return the stacks that are wanted, which ascend, as a tree, and those that can be in none.

    Raises:
        ProfileError: some are not there.
    """
    trees = [read_tree(opened, file, locations) for file in of_table(known, STACK_TREE)]
    others = [Stacks.joined([])]
    missing = wanted
    if (missing == np.uint64(EMPTY_STACK)).any():
        others.append(Stacks(np.array([EMPTY_STACK], np.uint64), np.zeros(2, np.int64), wanted[:0]))
    for ids in (others[-1].ids, *(tree.ids for tree in trees)):
        missing = missing[find_hashes(ids, missing) < 0]
    # The more a file has the fewer others are needed.
    for file in sorted(of_table(known, "stacks"), key=lambda each: (-each.rows, each.path.name)):
        if len(missing):
            tree, more = read_lists(opened, file, locations, missing)
            trees.append(tree)
            others.append(more)
            missing = missing[find_hashes(np.concatenate([tree.ids, more.ids]), missing) < 0]
    if len(missing):
        raise ProfileError(f"cannot make a day: {len(missing):,} of its stacks are missing")
    tree = FrameTree.joined(locations, trees)
    is_wanted = find_hashes(wanted, tree.ids) >= 0
    if not is_wanted.all():
        tree = tree.only(np.flatnonzero(is_wanted))
    return tree, Stacks.joined(others)


def _fold(opened: Engine, tree: FrameTree, totals: Arrays, rest: int, hasher: Hasher) -> FrameTree:
    """Fold rare stacks, if there are many; make a table `folded` that says of which became what.

    Stacks that others became are in it as well.
    """
    rare, folded = np.zeros((2, 0), np.uint64)
    ids = totals["stack_id"]
    if len(ids) > FOLDED_ABOVE:
        is_folded = find_hashes(tree.ids[tree.ends_in(rest)], ids) >= 0
        # All of what may be folded yet: nothing is made of days.
        common = keep_common(ids, is_folded, totals["samples"], totals["value"], share=1.0)
        counts = np.stack([totals["samples"], totals["value"]], axis=1)
        counts = counts[find_hashes(ids, tree.ids)]
        rare, folded, tree = tree.fold(common.ids, rest, hasher, counts, common.least)
        has_changed = rare != folded
        rests = sort_distinct(folded[has_changed])
        rare, folded = (np.concatenate([each[has_changed], rests]) for each in (rare, folded))
    opened.register("mapping", {"stack_id": rare, "folded_id": folded})
    opened.run("CREATE TEMP TABLE folded AS SELECT * FROM mapping")
    return tree


def _write_samples(opened: Engine, source: DayFiles, folder: Path) -> list[LocalFile]:
    """Write HOURLY and DAILY of a day, with the stacks of the table `folded` counted as others."""
    files = _samples_of(source)
    rows = _rows_of(source, HOURLY)
    by_hour = (
        # All other rows are of different hours, label sets or stacks: they need not be added up.
        f"SELECT * FROM {rows} ANTI JOIN folded USING (stack_id) UNION ALL BY NAME"
        f" SELECT ts, set_id, folded_id AS stack_id, {SUMS}"
        f" FROM {rows} JOIN folded USING (stack_id) GROUP BY ALL"
    )
    rows = _rows_of(source, HOURLY if source.replaced else DAILY)
    by_day = (
        f"SELECT {bucket_of(DAY_S)} AS ts, set_id, coalesce(folded_id, stack_id) AS stack_id,"
        f" {SUMS} FROM {rows} LEFT JOIN folded USING (stack_id) GROUP BY ALL"
    )
    return [
        *write_in_pieces(opened, HOURLY, by_hour, folder, files, by_id=True),
        *write_in_pieces(opened, DAILY, by_day, folder, files),
    ]


def _label_sets_of(opened: Engine, made: Sequence[LocalFile]) -> Hashes:
    """Return the label sets that rows refer to, sorted."""
    sets = [
        opened.arrays_of(f"SELECT DISTINCT {column} AS id FROM {{files}}", of_table(made, table))
        for table, column in _LABEL_SETS
    ]
    return sort_distinct(np.concatenate([each["id"] for each in sets]))


def _write_tree(opened: Engine, tree: FrameTree, folder: Path) -> list[LocalFile]:
    stack_ids, is_stack = tree.by_node()
    if not tree.is_readable:
        return []
    # As a number without a sign ROOT is NO_PARENT.
    rows: Arrays = {
        "parent": tree.tree.parents.view(np.uint32),
        "frame_id": tree.locations.ids.take(tree.tree.words),
        "stack_id": stack_ids,
        "is_stack": is_stack,
    }
    opened.register("nodes", rows)
    file = opened.write(STACK_TREE, "SELECT * FROM nodes", folder, is_sorted=True)
    if file.path.stat().st_size <= PIECE_BYTES:
        return [file]
    file.path.unlink()
    return []


def _write_stacks(opened: Engine, tree: FrameTree, others: Stacks, folder: Path) -> list[LocalFile]:
    """Write the stacks of a tree and others as lists."""
    opened.run("CREATE TEMP TABLE stacks (stack_id UBIGINT, frame_ids UBIGINT[])")
    for some in itertools.chain([others], tree.lists()):
        insert_stacks(opened, some, are_new=True)
    return write_in_pieces(opened, "stacks", "SELECT * FROM stacks", folder, is_sorted=True)
