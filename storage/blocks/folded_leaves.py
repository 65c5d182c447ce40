"""Folded leaves: where stacks of blocks end once what interpreters add to them is left out.

Only a stack that ends in an evaluation loop ends elsewhere then (`storage.interpreters`). So only
these are fetched, and none where there is no Python frame.
"""

from collections.abc import Sequence

import numpy as np

from storage.blocks.dictionary import fetch_locations
from storage.blocks.frame_tree import Locations
from storage.blocks.parquet import Engine
from storage.blocks.scans import LocalFile, of_table
from storage.blocks.schema import NAMES
from storage.blocks.tables import fetch_stacks
from storage.columns import Columns
from storage.hashing import Hashes
from storage.interpreters import LOOP, LOOP_PREFIXES, Roles, fold, roles_of
from storage.stack_tree import StackLists, lists_of
from symbolizer.location import Kind

_WORDS_AT_ONCE = 1 << 21
"""Frames of stacks that are fetched at a time."""


def load_of_hour(opened: Engine, locations: Columns) -> bool:
    """Make a table `folded_leaves` (stack_id, leaf) of those of the table `stacks`, if any.

    `locations` are those of all stacks. Return whether there are any.
    """
    roles = roles_of(locations)
    if roles is None:
        return False
    _load_ending(opened, "stacks", "frame_ids[-1]", locations.location_hashes[roles & LOOP > 0])
    return _load(opened, locations, roles)


def load_of_files(opened: Engine, files: Sequence[LocalFile]) -> bool:
    """Make the same table of the stacks of files that the table `leaf_of` has.

    The files are those of a dictionary. Return whether there are any.

    Raises:
        ProfileError: a file is damaged or not one of ours, or a location is missing.
    """
    loops = _find_loops(opened, files)
    if not len(loops):
        return False
    opened.load(
        "leaf_stacks",
        "SELECT stack_id, leaf, any_value(frame_ids) AS frame_ids FROM {files}"
        " JOIN leaf_of USING (stack_id) GROUP BY ALL",
        of_table(files, "stacks"),
    )
    _load_ending(opened, "leaf_stacks", "leaf", loops)
    used = opened.arrays("SELECT DISTINCT unnest(frame_ids) AS frame_id FROM ending ORDER BY 1")
    locations = fetch_locations(opened, files, used["frame_id"])
    roles = roles_of(locations)
    return roles is not None and _load(opened, locations, roles)


def _find_loops(opened: Engine, files: Sequence[LocalFile]) -> Hashes:
    """Return the locations of evaluation loops; none where there are no Python frames."""
    chosen = of_table(files, NAMES)
    opened.check(chosen)
    is_loop = " OR ".join(f"starts_with(name, '{prefix}')" for prefix in LOOP_PREFIXES)
    opened.load(
        "of_runtimes",
        f"SELECT frame_id, kind = '{Kind.PYTHON}' AS is_python FROM (SELECT frame_id,"
        ' coalesce(names[-1]."function", "function") AS name,'
        " coalesce(names[-1].kind, kind) AS kind FROM {files})"
        f" WHERE kind = '{Kind.PYTHON}' OR {is_loop}",
        chosen,
    )
    ((count,),) = opened.rows("SELECT count(*) FROM of_runtimes WHERE is_python")
    if not count:
        return np.zeros(0, np.uint64)
    loops = opened.arrays("SELECT DISTINCT frame_id FROM of_runtimes WHERE NOT is_python")
    found: Hashes = loops["frame_id"]
    return found


def _load_ending(opened: Engine, table: str, leaf: str, loops: Hashes) -> None:
    """Make a table `ending` of the stacks of a table that end in a loop."""
    opened.register("loops", {"loop_id": loops})
    opened.run(
        f"CREATE OR REPLACE TEMP TABLE ending AS SELECT stack_id, frame_ids FROM {table}"
        f" SEMI JOIN loops ON {leaf} = loop_id"
    )


def _load(opened: Engine, locations: Columns, roles: Roles) -> bool:
    known = Locations.of(locations.location_hashes)
    ids, leaves = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint64)]
    words = opened.rows("SELECT coalesce(sum(len(frame_ids)), 0) FROM ending")[0][0]
    pieces = 1 + int(words) // _WORDS_AT_ONCE
    for piece in range(pieces):
        is_chosen = f"stack_id % {pieces} = {piece}"
        opened.run(f"CREATE TEMP TABLE fetched AS SELECT * FROM ending WHERE {is_chosen}")
        stacks = fetch_stacks(opened)
        lists = StackLists(stacks.offsets, known.find(stacks.frame_ids))
        folded = lists_of(fold(lists, roles))
        ids.append(stacks.ids)
        leaves.append(known.ids[folded.words[folded.offsets[1:] - 1]])
    opened.register(
        "folded_leaves", {"stack_id": np.concatenate(ids), "leaf": np.concatenate(leaves)}
    )
    return bool(words)
