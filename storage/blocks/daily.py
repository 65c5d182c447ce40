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

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from storage.blocks import functions
from storage.blocks.frame_tree import FrameTree, fold_tree
from storage.blocks.loading import SUMS, insert_stacks
from storage.blocks.manifest import DAY_S, HOUR_S
from storage.blocks.parquet import (
    DEFAULT_MEMORY_BYTES,
    Arrays,
    Engine,
    LocalFile,
    engine,
    numbered_scan_of,
    of_table,
    scan_of,
)
from storage.blocks.rollup import FOLDED_ABOVE, Stacks, keep_common, rest_id
from storage.blocks.schema import DICTIONARY, FUNCTIONS, HEADS_10M, NO_PARENT, ROLLUPS, STACK_TREE
from storage.blocks.tables import (
    PIECE_BYTES,
    bucket_of,
    fetch_stacks,
    merge_dictionaries,
    write_in_pieces,
)
from storage.grouping import sort_distinct
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
_STACKS_AT_ONCE = 1 << 16
"""Stacks that are fetched at a time, 20 MB, and four times as much until they are a tree."""


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

    The table STACK_TREE is left out if its file would be too large for readers, or if there is a
    stack without locations, which no agent writes: a tree has no node for it.

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
    empty = int(hasher.stacks(np.zeros(0, np.uint64), np.zeros(2, np.int64), np.zeros(0, int))[0])
    wanted = totals["stack_id"]
    has_empty = bool((wanted == np.uint64(empty)).any())
    wanted = wanted[wanted != np.uint64(empty)]
    with engine(memory_bytes, folder) as opened:
        tree = _read_stacks(opened, known, wanted)
    with engine(memory_bytes, folder) as opened:
        tree = _fold(opened, tree, totals, hasher)
        made = _write_samples(opened, source, folder)
        for table in HEADS_10M:
            chosen = of_table(files, table)
            opened.check(chosen)
            made += write_in_pieces(opened, table, "SELECT * FROM {files}", folder, chosen)
        sets = _label_sets_of(opened, made)
    if of_table(files, FUNCTIONS):
        made += functions.write_day(files, folder, memory_bytes)
    with engine(memory_bytes, folder) as opened:
        made += [] if has_empty else _write_tree(opened, tree, folder)
        made += _write_stacks(opened, tree, [empty] if has_empty else [], folder)
    frames = sort_distinct(tree.frame_ids)
    rest = rest_id(hasher)
    meanings = merge_dictionaries(known, folder, frames, sets, rest=rest, memory_bytes=memory_bytes)
    return [*made, *meanings]


def read_tree(opened: Engine, file: LocalFile) -> FrameTree:
    """Return the tree of a file of STACK_TREE.

    Raises:
        ProfileError: it is damaged or not one of ours.
        SchemaError: a later version wrote it.
    """
    opened.check([file])
    rows = opened.arrays_of("SELECT * FROM {files}", [file])
    parents = rows["parent"].astype(np.int64)
    parents[parents == NO_PARENT] = -1
    try:
        return FrameTree.checked(
            parents.astype(np.int32), rows["frame_id"], rows["stack_id"], rows["is_stack"]
        )
    except ProfileError as error:
        raise ProfileError(f"cannot read {file.path}: {error}") from error


def read_lists(opened: Engine, file: LocalFile, wanted: Hashes) -> FrameTree:
    """Return those stacks of a file of `stacks` that are wanted, as a tree. Not all may be there.

    Raises:
        ProfileError: it is damaged or not one of ours.
        SchemaError: a later version wrote it.
    """
    opened.check([file])
    opened.register("wanted", {"stack_id": wanted})
    pieces = [FrameTree.empty()]
    for first in range(0, file.rows, _STACKS_AT_ONCE):
        query = (
            f"SELECT stack_id, frame_ids FROM {numbered_scan_of(file)}"
            " SEMI JOIN wanted USING (stack_id)"
            f" WHERE file_row_number >= {first} AND file_row_number < {first + _STACKS_AT_ONCE}"
        )
        opened.load("fetched", query, [file])
        pieces.append(FrameTree.of(fetch_stacks(opened)))
    return FrameTree.joined(pieces)


def _totals_of(opened: Engine, source: DayFiles) -> Arrays:
    """Return the sums of a day's stacks."""
    files = [each for each in (*source.previous, *source.rollups) if each.table in (HOURLY, DAILY)]
    opened.check(files)
    table = HOURLY if source.replaced else DAILY
    query = f"SELECT stack_id, {SUMS} FROM {_rows_of(source, table)} GROUP BY stack_id"
    opened.load("totals", query, files)
    return opened.arrays("SELECT * FROM totals ORDER BY stack_id")


def _rows_of(source: DayFiles, table: str) -> str:
    """Return what stands in a query for the rows of a day, the previous ones being of a table."""
    rows = (
        [f"SELECT * FROM {scan_of(added)}"] if (added := of_table(source.rollups, HOURLY)) else []
    )
    if previous := of_table(source.previous, table):
        kept = f"ts NOT IN ({', '.join(map(str, source.replaced))})" if source.replaced else "true"
        rows.append(f"SELECT * FROM {scan_of(previous)} WHERE {kept}")
    if not rows:
        raise ProfileError("cannot make a day: a table is missing")
    return f"({' UNION ALL '.join(rows)})"


def _read_stacks(opened: Engine, known: Sequence[LocalFile], wanted: Hashes) -> FrameTree:
    """Return the tree of the stacks that are wanted, which ascend.

    Raises:
        ProfileError: some are not there, or are there twice.
    """
    trees = [read_tree(opened, file) for file in of_table(known, STACK_TREE)]
    missing = wanted
    if trees:
        missing = missing[trees[0].nodes_of(missing) < 0]
    # The more a file has the fewer others are needed.
    for file in sorted(of_table(known, "stacks"), key=lambda each: (-each.rows, each.path.name)):
        if len(missing):
            trees.append(read_lists(opened, file, missing))
            missing = missing[trees[-1].nodes_of(missing) < 0]
    tree = FrameTree.joined(trees or [FrameTree.empty()])
    tree = tree.only(tree.nodes_of(wanted))
    if len(missing) or np.count_nonzero(tree.is_stack) != len(wanted):
        raise ProfileError(f"cannot make a day: {len(missing):,} of its stacks are missing")
    return tree


def _fold(opened: Engine, tree: FrameTree, totals: Arrays, hasher: Hasher) -> FrameTree:
    """Fold rare stacks, if there are many; make a table `folded` that says of which became what."""
    nothing = np.zeros(0, np.uint64)
    mapping = {"stack_id": nothing, "folded_id": nothing}
    ids = totals["stack_id"]
    if len(ids) > FOLDED_ABOVE:
        nodes = tree.nodes_of(ids)
        ends_in_rest = tree.frame_ids.take(nodes) == np.uint64(rest_id(hasher))
        is_folded = ends_in_rest & (nodes >= 0)
        kept = keep_common(ids, is_folded, totals["samples"], totals["value"])
        rare, folded, tree = fold_tree(tree, kept, hasher)
        has_changed = rare != folded
        mapping = {"stack_id": rare[has_changed], "folded_id": folded[has_changed]}
    opened.register("mapping", mapping)
    opened.run("CREATE TEMP TABLE folded AS SELECT * FROM mapping")
    return tree


def _write_samples(opened: Engine, source: DayFiles, folder: Path) -> list[LocalFile]:
    """Write HOURLY and DAILY of a day, with the stacks of the table `folded` counted as others."""
    files = [each for each in (*source.previous, *source.rollups) if each.table in (HOURLY, DAILY)]
    made: list[LocalFile] = []
    for table, bucket_s in ((HOURLY, HOUR_S), (DAILY, DAY_S)):
        rows = _rows_of(source, HOURLY if source.replaced else table)
        query = (
            f"SELECT {bucket_of(bucket_s)} AS ts, set_id,"
            f" coalesce(folded_id, stack_id) AS stack_id, {SUMS}"
            f" FROM {rows} LEFT JOIN folded USING (stack_id) GROUP BY ALL"
        )
        made += write_in_pieces(opened, table, query, folder, files)
    return made


def _label_sets_of(opened: Engine, made: Sequence[LocalFile]) -> Hashes:
    """Return the label sets that rows refer to, sorted."""
    sets = [
        opened.arrays_of(f"SELECT DISTINCT {column} AS id FROM {{files}}", of_table(made, table))
        for table, column in _LABEL_SETS
    ]
    return sort_distinct(np.concatenate([each["id"] for each in sets]))


def _write_tree(opened: Engine, tree: FrameTree, folder: Path) -> list[LocalFile]:
    rows: Arrays = {
        "parent": np.where(tree.parents < 0, NO_PARENT, tree.parents).astype(np.uint32),
        "frame_id": tree.frame_ids,
        "stack_id": tree.stack_ids,
        "is_stack": tree.is_stack,
    }
    opened.register("nodes", rows)
    file = opened.write(STACK_TREE, "SELECT * FROM nodes", folder, is_sorted=True)
    if file.path.stat().st_size <= PIECE_BYTES:
        return [file]
    file.path.unlink()
    return []


def _write_stacks(
    opened: Engine, tree: FrameTree, empty: Sequence[int], folder: Path
) -> list[LocalFile]:
    """Write the stacks of a tree as lists, and those without locations."""
    opened.run("CREATE TEMP TABLE stacks (stack_id UBIGINT, frame_ids UBIGINT[])")
    ids = np.array(empty, dtype=np.uint64)
    nothing = np.zeros(0, np.uint64)
    insert_stacks(opened, Stacks(ids, np.zeros(len(ids) + 1, np.int64), nothing), are_new=True)
    for some in tree.lists():
        insert_stacks(opened, some, are_new=True)
    return write_in_pieces(opened, "stacks", "SELECT * FROM stacks", folder, is_sorted=True)
