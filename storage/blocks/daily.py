"""Write the tables of a day, of those that it had before and those of hours that are over.

Hours are only added: what a day holds of an hour cannot be taken back, so a day of which an hour
has changed is written anew of all its hours. Totals stay equal, and no order shows.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from storage.blocks import functions
from storage.blocks.manifest import DAY_S, HOUR_S
from storage.blocks.parquet import DEFAULT_MEMORY_BYTES, LocalFile, engine, of_table
from storage.blocks.schema import DICTIONARY, FUNCTIONS, HEADS_10M, ROLLUPS
from storage.blocks.tables import merge_dictionaries, roll_up, write_in_pieces
from storage.grouping import sort_distinct
from storage.hashing import Hashes

HOURLY, DAILY = ROLLUPS[HOUR_S], ROLLUPS[DAY_S]
_REFERENCES = (
    (HOURLY, "stack_id", True),
    (HOURLY, "set_id", False),
    ("times_10m", "set_id", False),
    ("times_10m", "host_id", False),
    ("objects_10m", "host_id", False),
    ("presence_10m", "set_id", False),
)
"""Columns of a table that refer to stacks, or else to label sets."""


def write_day(
    previous: Sequence[LocalFile],
    rollups: Sequence[LocalFile],
    dictionary: Sequence[LocalFile],
    folder: Path,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
) -> list[LocalFile]:
    """Write all tables of a day: its previous files and the rollups of more hours together.

    `rollups` are the `hourly` files of these hours, and `dictionary` says what is in them: files of
    DICTIONARY that may hold much else.

    Raises:
        ProfileError: a file is damaged or not one of ours, something is missing that they refer to,
            or sums exceed 64 bits.
        SchemaError: a later version wrote one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [*previous, *rollups]
    hourly = of_table(files, HOURLY)
    daily = [*of_table(previous, DAILY), *of_table(rollups, HOURLY)]
    made = [
        *roll_up(hourly, HOUR_S, folder, memory_bytes),
        *roll_up(daily, DAY_S, folder, memory_bytes),
    ]
    with engine(memory_bytes, folder) as opened:
        for table in HEADS_10M:
            chosen = of_table(files, table)
            opened.check(chosen)
            made += write_in_pieces(opened, table, "SELECT * FROM {files}", folder, chosen)
    if of_table(files, FUNCTIONS):
        made += functions.write_day(files, folder, memory_bytes)
    known = [each for each in (*files, *dictionary) if each.table in DICTIONARY]
    stacks, sets = _wanted(made, folder, memory_bytes)
    return [*made, *merge_dictionaries(known, folder, memory_bytes, stacks, sets)]


def _wanted(made: Sequence[LocalFile], folder: Path, memory_bytes: int) -> tuple[Hashes, Hashes]:
    """Return the stacks and the label sets that rows refer to, sorted."""
    stacks: list[Hashes] = []
    sets: list[Hashes] = []
    with engine(memory_bytes, folder) as opened:
        for table, column, is_stack in _REFERENCES:
            query = f"SELECT DISTINCT {column} AS id FROM {{files}}"
            ids = opened.arrays_of(query, of_table(made, table))["id"]
            (stacks if is_stack else sets).append(ids)
    return sort_distinct(np.concatenate(stacks)), sort_distinct(np.concatenate(sets))
