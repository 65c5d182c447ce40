"""Scans: what stands in a query for the rows of some files, whatever schema wrote them.

Rows that refer to others by number, or that an older schema wrote, are read as if they were not:
with ids, and with the columns that their table has now.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from storage.blocks.schema import DETAIL, FUNCTIONS, NAMES, OLDER, ROLLUPS, TABLES

_STACKS, _FUNCTIONS = ("stacks", "stack", "stack_id"), (FUNCTIONS, "function_row", "function_id")
REFERS = {
    **dict.fromkeys((DETAIL, ROLLUPS[600], ROLLUPS[3600]), _STACKS),
    **dict.fromkeys(("functions_10m", "functions_1h", "function_groups_1h"), _FUNCTIONS),
}
"""Tables whose rows refer to rows of another one, by the number of their part and of the row: that
table, the column with the number, and the id that is there."""


class LocalFile(NamedTuple):
    """A Parquet file of one table on this machine; `rows` is what the manifest says."""

    table: str
    path: Path
    rows: int


def of_table(files: Iterable[LocalFile], table: str) -> list[LocalFile]:
    """Return the files of one table, sorted by their names, so that no order shows.

    With those of tables that number stacks or functions come all of these, by which `scan_of` knows
    their ids. Names are in `frames` as well.
    """
    known = list(files)
    chosen = _named(known, table)
    if table == NAMES:
        return [*chosen, *_named(known, "frames")]
    return [*chosen, *_named(known, REFERS[table][0])] if table in REFERS and chosen else chosen


def _named(files: Iterable[LocalFile], table: str) -> list[LocalFile]:
    return sorted((each for each in files if each.table == table), key=lambda each: each.path.name)


def scan_of(files: Sequence[LocalFile]) -> str:
    """Return what stands in a query for the rows of files of one table.

    Rows that number stacks or functions have `part` and the number. If those of all their parts are
    among the files they have the id as well, null if what it means is missing. Rows of stacks have
    their number `stack`. Rows of `frames` that schema 1 wrote have no `names`, and those of NAMES
    have little else.
    """
    if any(each.table in {"frames", NAMES} for each in files):
        rows = _mixed_rows_of(files, {**OLDER[NAMES], **TABLES["frames"]})
        return f"(SELECT * EXCLUDE (frames) REPLACE (coalesce(names, frames) AS names) FROM {rows})"
    numbering = [each for each in files if each.table in REFERS]
    tables = {each.table for each in files}
    if tables == {"stacks"}:
        return _numbered_rows_of(files, "stack", "stack_id, frame_ids")
    if tables == {FUNCTIONS}:
        return _mixed_rows_of(files, TABLES[FUNCTIONS])
    if not numbering:
        return plain_rows_of(files)
    target, number, id_ = REFERS[numbering[0].table]
    rows = plain_rows_of(numbering)
    if numbering[0].table in OLDER:
        rows = _mixed_rows_of(numbering, {**TABLES[numbering[0].table], id_: "UBIGINT"})
    targets = [each for each in files if each.table == target]
    if not targets:
        return rows
    chosen, found = f"part, {number}", f"known.{id_}"
    if numbering[0].table in OLDER:
        chosen, found = f"{chosen}, {id_}", f"coalesce(rows.{id_}, known.{id_})"
    return (
        f"(SELECT rows.* EXCLUDE ({chosen}), {found} AS {id_} FROM {rows} AS rows"
        f" LEFT JOIN {_numbered_rows_of(targets, number, id_)} AS known"
        f" ON rows.part = known.part AND rows.{number} = known.{number})"
    )


def _numbered_rows_of(files: Sequence[LocalFile], number: str, columns: str) -> str:
    """Return what stands for the rows of files, with their parts and their numbers in the file."""
    return (
        f"(SELECT part, CAST(file_row_number AS UINTEGER) AS {number}, {columns} FROM"
        f" (SELECT {no_values({'part': 'UBIGINT'})} WHERE false UNION ALL BY NAME SELECT * FROM"
        f" read_parquet({paths_of(files)}, hive_partitioning = false, union_by_name = true,"
        " file_row_number = true)))"
    )


def _mixed_rows_of(files: Sequence[LocalFile], columns: Mapping[str, str]) -> str:
    """Return what stands for the rows of files that have some of these columns, else null."""
    return (
        f"(SELECT {no_values(columns)} WHERE false"
        f" UNION ALL BY NAME SELECT * FROM {plain_rows_of(files, are_alike=False)})"
    )


def plain_rows_of(files: Sequence[LocalFile], *, are_alike: bool = True) -> str:
    options = "" if are_alike else ", union_by_name = true"
    return f"read_parquet({paths_of(files)}, hive_partitioning = false{options})"


def no_values(columns: Mapping[str, str]) -> str:
    """Return a null of each of some columns, to be selected."""
    return ", ".join(f'CAST(NULL AS {type_}) AS "{name}"' for name, type_ in columns.items())


def numbered_scan_of(file: LocalFile) -> str:
    """Return what stands for the rows of a file, which then have a `file_row_number`."""
    return f"read_parquet({paths_of([file])}, hive_partitioning = false, file_row_number = true)"


def named_scan_of(files: Sequence[LocalFile]) -> str:
    """Return what stands for the rows of files, which then have the path as `filename`."""
    return f"read_parquet({paths_of(files)}, hive_partitioning = false, filename = true)"


def paths_of(files: Sequence[LocalFile]) -> str:
    return f"[{', '.join(literal(each.path) for each in files)}]"


def literal(path: Path) -> str:
    text = str(path).replace("'", "''")
    return f"'{text}'"
