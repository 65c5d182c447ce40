"""Parquet files of blocks, and DuckDB, which reads and writes them.

Each file holds one table of `storage.blocks.schema`. Its key-value metadata hold the number of its
schema and the table's name. Before anything is read of a file, its
schema, columns and number of rows are checked against what this version writes and against what the
manifest says. DuckDB runs in this process with a connection per call, within a memory limit, and
moves to a temporary folder what does not fit.

Numbers are exact: sums of 64 bits that overflow are errors.
"""

import atexit
import contextlib
import ctypes
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import duckdb
import numpy as np
import numpy.ma
import numpy.typing as npt

from storage.blocks.scans import (
    REFERS,
    LocalFile,
    literal,
    no_values,
    paths_of,
    plain_rows_of,
    scan_of,
)
from storage.blocks.schema import (
    FUNCTIONS,
    OLDER,
    ORDER,
    ORDER_BY_ID,
    ROLLUPS,
    SCHEMA,
    STACK_TREE,
    TABLES,
)
from storage.blocks.scratch import ScratchFolder
from storage.formats.limits import OutOfMemoryError
from storage.profile import ProfileError, SchemaError

_SCHEMA_KEY, _TABLE_KEY = "everflame.schema", "everflame.table"

DEFAULT_MEMORY_BYTES = 512 << 20
"""What DuckDB may take at once. What is fetched as arrays comes on top."""
_TEMPORARY_BYTES = 16 << 30
"""What DuckDB may move to a disk at once: most of what is free, if it may choose."""
_ROW_LIMIT = 1 << 31
"""Rows of one file. An hour of 10,000 hosts has half as many."""
VALUE_LIMIT = 1 << 27
"""Values of a column of lists. A few kilobytes may stand for as many; a million stacks have 30
million frames."""
_ROW_GROUP_ROWS = 122_880
"""Rows may be hundreds of bytes long, and a host's rows of detail are few."""
_OPTIONS = {
    # Ascending numbers take some bits each as differences, which the first version has not.
    **dict.fromkeys((*REFERS, ROLLUPS[86400], STACK_TREE), ", PARQUET_VERSION v2"),
    # Neighbours begin alike, which zstd finds, but not if a dictionary's numbers have 17 bits each.
    "stacks": ", DICTIONARY_SIZE_LIMIT 1",
}
"""How tables are written that take most of the space."""

_LEVELS = dict.fromkeys(("stacks", "frames", FUNCTIONS), 9)
"""Of zstd: these take most of what a host leaves. Of stacks it is 9 % less than by level 3, in 1.5
times the time; level 12 takes another 1.7 times as long for 1 %."""

Arrays = Mapping[str, npt.NDArray[Any]]
_Fetched = TypeVar("_Fetched")


class Engine:
    """A DuckDB connection of its own, for one call. Not thread-safe."""

    def __init__(self, connection: duckdb.DuckDBPyConnection) -> None:
        self._connection = connection

    def close(self) -> None:
        self._connection.close()

    def register(self, name: str, arrays: Arrays) -> None:
        """Let a query read arrays of one length as a table. They must not change meanwhile."""
        self._connection.register(name, dict(arrays))

    def run(self, query: str) -> None:
        """Run a statement over registered arrays and tables of this connection.

        Raises:
            ProfileError: a sum exceeds 64 bits, or there is not enough memory.
        """
        with _error_of(()):
            self._connection.execute(query)

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """Return the rows of a query over registered arrays and tables, as `run` does."""
        with _error_of(()):
            return self._connection.execute(query).fetchall()

    def arrays(self, query: str) -> dict[str, npt.NDArray[Any]]:
        """Return the columns of a query over registered arrays and tables, as `run` does.

        Raises:
            ProfileError: also if a value is null.
        """
        with _error_of(()):
            return _complete(self._connection.execute(query).fetchnumpy())

    def arrays_of(self, query: str, files: Sequence[LocalFile]) -> dict[str, npt.NDArray[Any]]:
        """Return the columns of a query in which `{files}` stands for the files' rows.

        Raises:
            ProfileError: a file is damaged, or as `arrays`.
        """
        return _complete(self._over(query, files, self._connection.fetchnumpy))

    def load(self, table: str, query: str, files: Sequence[LocalFile]) -> None:
        """Make a temporary table of a query in which `{files}` stands for the files' rows.

        Raises:
            ProfileError: a file is damaged.
        """
        self._over(f"CREATE OR REPLACE TEMP TABLE {table} AS {query}", files)

    def write(
        self,
        table: str,
        query: str,
        folder: Path,
        files: Sequence[LocalFile] = (),
        *,
        part: int = 0,
        is_sorted: bool = False,
        by_id: bool = False,
    ) -> LocalFile:
        """Write what a query returns, sorted, as a file of a table, and return the file.

        In the query `{files}` stands for the rows of some files, as `scan_of` returns them. Stacks
        are those of a part if its samples refer to them. Rows that are sorted enough stay in their
        order. With `by_id` it refers to ids, as tables of days do.

        Raises:
            ProfileError: a file is damaged.
            OSError: the file cannot be written.
        """
        path = folder / f"{table}.parquet"
        columns = ", ".join(
            f'CAST("{name}" AS {type_}) AS "{name}"'
            for name, type_ in (OLDER if by_id else TABLES)[table].items()
        )
        options = (
            f"FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL {_LEVELS.get(table, 3)},"
            f" ROW_GROUP_SIZE {_ROW_GROUP_ROWS}{_OPTIONS.get(table, '')},"
            f" KV_METADATA {{'{_SCHEMA_KEY}': '{SCHEMA}', '{_TABLE_KEY}': '{table}'}}"
        )
        order = "" if is_sorted else f"ORDER BY {(ORDER_BY_ID if by_id else ORDER)[table]}"
        ordered = f"SELECT {columns} FROM ({query}) {order}"
        if table == "stacks":
            ordered = (
                f"SELECT CAST({part} AS UBIGINT) AS part, stack_id, frame_ids"
                f" FROM (SELECT stack_id, frame_ids FROM ({query}) {order})"
            )
        self._over(f"COPY ({ordered}) TO {literal(path)} ({options})", files)
        rows = self.rows(f"SELECT num_rows FROM parquet_file_metadata({literal(path)})")
        return LocalFile(table, path, int(rows[0][0]))

    def _over(
        self,
        query: str,
        files: Sequence[LocalFile],
        fetch: Callable[[], _Fetched | None] = lambda: None,
    ) -> _Fetched | None:
        if "{files}" in query:
            if not files:
                raise ProfileError("cannot read blocks: a table is missing")
            query = query.replace("{files}", scan_of(files))
        try:
            self._connection.execute(query)
            return fetch()
        except duckdb.OutOfMemoryException as error:
            raise OutOfMemoryError(f"cannot read blocks: {error}") from error
        except duckdb.Error as error:
            for each in files:
                with _error_of([each]):
                    self._fetch(f"SELECT bit_xor(hash(COLUMNS(*))) FROM {plain_rows_of([each])}")
            if isinstance(error, duckdb.IOException):
                raise OSError(str(error)) from error
            with _error_of(files):
                raise

    def check(self, files: Sequence[LocalFile]) -> None:
        """Check that files are ours, of this schema, and as long as they should be.

        Raises:
            ProfileError: one is damaged or is not what its line says.
            SchemaError: a later version wrote one.
            OSError: one is not there.
        """
        seen = {_seen(each): each for each in files}
        unseen = [each for mark, each in seen.items() if mark not in _checked]
        if not unseen:
            return
        try:
            self._check(unseen)
        except duckdb.Error:
            for each in unseen:
                with _error_of([each]):
                    self._check([each])
            raise
        if len(_checked) > _CHECKED_KEPT:
            _checked.clear()
        _checked.update(seen)

    def _check(self, files: Sequence[LocalFile]) -> None:
        """Check all files with a query for each kind of metadata: a file takes less than 1 ms."""
        paths = paths_of(files)
        notes: dict[tuple[str, str], str] = {
            (path, bytes(key).decode("utf-8", "replace")): bytes(value).decode("utf-8", "replace")
            for path, key, value in self._fetch(
                f"SELECT file_name, key, value FROM parquet_kv_metadata({paths})"
            )
        }
        rows_of = dict(
            self._fetch(f"SELECT file_name, num_rows FROM parquet_file_metadata({paths})")
        )
        columns_of = dict(
            self._fetch(
                "SELECT file_name, list([name, type, repetition_type, num_children::VARCHAR,"
                " converted_type, logical_type::VARCHAR])::VARCHAR"
                f" FROM parquet_schema({paths}) GROUP BY file_name"
            )
        )
        lacking = dict(
            self._fetch(
                f"SELECT file_name, count(*) FROM parquet_metadata({paths})"
                " WHERE NOT contains(path_in_schema, ',') AND stats_null_count IS DISTINCT FROM 0"
                " GROUP BY file_name"
            )
        )
        values_of = dict(
            self._fetch(
                "SELECT file_name, max(number) FROM (SELECT file_name, sum(num_values) AS number"
                f" FROM parquet_metadata({paths}) GROUP BY file_name, path_in_schema)"
                " GROUP BY file_name"
            )
        )
        is_known: set[tuple[str, str]] = set()
        for file in files:
            path = str(file.path)
            schema = notes.get((path, _SCHEMA_KEY), "")
            if not schema.isdecimal() or notes.get((path, _TABLE_KEY)) != file.table:
                raise ProfileError(f"cannot read {path}: it is not a table {file.table} of blocks")
            if int(schema) > SCHEMA:
                reason = f"its schema is {schema}, this version knows {SCHEMA}"
                raise SchemaError(f"cannot read {path}: {reason}")
            layout = (file.table, columns_of[path])
            if layout not in is_known:
                described = self._fetch(f"DESCRIBE SELECT * FROM {plain_rows_of([file])}")
                if [each[:2] for each in described] not in self._expected(file.table):
                    reason = f"its columns are not those of {file.table}"
                    raise ProfileError(f"cannot read {path}: {reason}")
                is_known.add(layout)
            if rows_of[path] != file.rows or file.rows > _ROW_LIMIT:
                reason = f"it has {rows_of[path]} rows, not {file.rows}"
                raise ProfileError(f"cannot read {path}: {reason}")
            if values_of.get(path, 0) > VALUE_LIMIT:
                raise ProfileError(f"cannot read {path}: its lists have too many values")
            if path in lacking:
                raise ProfileError(f"cannot read {path}: values are missing")

    def _expected(self, table: str) -> list[list[tuple[str, str]]]:
        """Return the columns and types that a table may have, as DuckDB spells them."""
        layouts = [known[table] for known in (TABLES, OLDER) if table in known]
        queries = [f"DESCRIBE SELECT {no_values(columns)}" for columns in layouts]
        return [[each[:2] for each in self._fetch(query)] for query in queries]

    def _fetch(self, query: str) -> list[tuple[Any, ...]]:
        return self._connection.execute(query).fetchall()


_Mark = tuple[LocalFile, int, int, int, int]
_checked: set[_Mark] = set()
"""Files that have been checked, with what shows that one was changed since."""
_CHECKED_KEPT = 8192
_CHECKED_EVERY_S = 0.1
"""Whether a query is to be interrupted."""


def _seen(file: LocalFile) -> _Mark:
    status = file.path.stat()
    return (file, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _complete(columns: Arrays | None) -> dict[str, npt.NDArray[Any]]:
    assert columns is not None
    if any(numpy.ma.is_masked(each) for each in columns.values()):
        raise ProfileError("cannot read blocks: a value is missing")
    return {name: np.asarray(each) for name, each in columns.items()}


def _connect(temporary: str, memory_bytes: int, threads: int) -> duckdb.DuckDBPyConnection:
    return duckdb.connect(
        config={
            "threads": threads,
            "memory_limit": f"{memory_bytes >> 10}KiB",
            "temp_directory": temporary,
            "max_temp_directory_size": f"{_TEMPORARY_BYTES >> 20}MiB",
            "python_enable_replacements": False,  # a table that is missing is no variable of ours
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "allow_unsigned_extensions": False,
            "allow_community_extensions": False,
        }
    )


class _Shared:
    """The database of all readers of this process, whose memory is bounded together.

    To open one takes 10 ms, and another connection to it a hundredth of that.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._database: duckdb.DuckDBPyConnection | None = None

    def connection(self) -> duckdb.DuckDBPyConnection:
        with self._lock:
            if self._database is None:
                self._database = _connect(
                    _temporary(), DEFAULT_MEMORY_BYTES, threads=min(4, os.cpu_count() or 1)
                )
            return self._database.cursor()

    def forget(self) -> None:
        """Begin anew in a forked child: the threads of the database are not there.

        It is not closed, which would wait for them for ever.
        """
        if self._database is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._database))
        self._database, self._lock = None, threading.Lock()


def _temporary() -> str:
    """Return a folder for what does not fit in memory; none if it cannot be made."""
    try:
        scratch = ScratchFolder()
    except OSError:
        return ""
    atexit.register(scratch.close)
    return str(scratch.path)


_shared = _Shared()
os.register_at_fork(after_in_child=_shared.forget)


@contextlib.contextmanager
def reading_engine(check: Callable[[], None] | None = None) -> Iterator[Engine]:
    """Open a connection to read with, beside those of other threads.

    `check` is called all the time from another thread: what it raises interrupts the query that
    runs, and is raised here.
    """
    connection = _shared.connection()
    opened = Engine(connection)
    watch = contextlib.nullcontext() if check is None else _interrupting(connection, check)
    try:
        with watch:
            yield opened
    finally:
        opened.close()


@contextlib.contextmanager
def _interrupting(
    connection: duckdb.DuckDBPyConnection, check: Callable[[], None]
) -> Iterator[None]:
    raised: list[BaseException] = []
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(_CHECKED_EVERY_S):
            try:
                check()
            except BaseException as error:  # noqa: BLE001 - it is raised where the block ends
                raised.append(error)
                # Between two queries nothing is interrupted: the next one is.
                while not is_over.wait(_CHECKED_EVERY_S):
                    connection.interrupt()
                return

    watching = threading.Thread(target=watch, name="watch", daemon=True)
    watching.start()
    try:
        yield
    except Exception:
        if not raised:
            raise
    finally:
        is_over.set()
        watching.join()
    if raised:
        raise raised[0]


@contextlib.contextmanager
def engine(
    memory_bytes: int = DEFAULT_MEMORY_BYTES, folder: Path | None = None
) -> Iterator[Engine]:
    """Open a database to write with, that moves what does not fit to a folder inside `folder`.

    It has one thread: a compactor has a worker for each CPU, and each thread takes memory.
    """
    with tempfile.TemporaryDirectory(prefix="everflame-blocks-", dir=folder) as temporary:
        opened = Engine(_connect(temporary, memory_bytes, threads=1))
        try:
            yield opened
        finally:
            opened.close()


@contextlib.contextmanager
def _error_of(files: Sequence[LocalFile]) -> Iterator[None]:
    """Turn DuckDB's errors into ProfileErrors that name the files."""
    names = ", ".join(str(each.path) for each in files) or "blocks"
    try:
        yield
    except duckdb.OutOfMemoryException as error:
        raise OutOfMemoryError(f"cannot read {names}: {error}") from error
    except duckdb.Error as error:
        raise ProfileError(f"cannot read {names}: {error}") from error
