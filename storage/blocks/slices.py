"""Slices: which rows of some files count, by the seconds that they are from.

A window of a store is made of whole hours, read from rollups, and of ragged edges, read from finer
tables: each is a slice, and a query adds up the rows of all of them at once.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from storage.blocks.scans import LocalFile, of_table, scan_of
from storage.objects.keys import NS_PER_S
from storage.profile import Window

Spans = tuple[tuple[int, int], ...]
"""Half-open intervals of seconds."""


class Slice(NamedTuple):
    """Files of some tables, and the seconds whose rows count."""

    files: tuple[LocalFile, ...]
    spans: Spans


def seconds_of(window: Window) -> tuple[int, int]:
    """Return the seconds in which objects start that count for a window, half-open."""
    return -(-window.start_ns // NS_PER_S), -(-window.end_ns // NS_PER_S)


def join_spans(spans: Iterable[tuple[int, int]]) -> Spans:
    """Return intervals in order, joined where they meet."""
    joined: list[tuple[int, int]] = []
    for span in sorted(spans):
        if joined and joined[-1][1] >= span[0]:
            start, end = joined.pop()
            joined.append((start, max(end, span[1])))
        else:
            joined.append(span)
    return tuple(joined)


def files_in(slices: Sequence[Slice], *tables: str) -> list[LocalFile]:
    """Return the files of some tables, each once."""
    files = (each for slice_ in slices for each in slice_.files if each.table in tables)
    return list(dict.fromkeys(files))


def rows_in(
    slices: Sequence[Slice],
    columns: Mapping[str, str],
    is_inside: Callable[[str, int, int], str],
    condition: str = "",
) -> str:
    """Return a query for the rows of slices: of each table the columns named.

    `is_inside` returns a condition for the rows of a table between two seconds; empty for all.
    Empty if no slice has any of the tables.
    """
    queries = []
    for files, spans in slices:
        for table, chosen in columns.items():
            mine = of_table(files, table)
            if not mine:
                continue
            inside = [is_inside(table, *span) for span in spans]
            conditions = [f"({' OR '.join(inside) or 'false'})"] if all(inside) else []
            conditions += [condition] if condition else []
            where = f" WHERE {' AND '.join(conditions)}" if conditions else ""
            queries.append(f"SELECT {chosen} FROM {scan_of(mine)}{where}")
    return " UNION ALL ".join(queries)
