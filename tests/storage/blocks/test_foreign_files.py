"""Files that are damaged, not ours, or of a later version are refused by name."""

import dataclasses
from pathlib import Path

import duckdb
import numpy as np
import pytest

from storage.blocks import parquet, reading, tables
from storage.blocks.dictionary import read_dictionary
from storage.blocks.scans import LocalFile
from storage.blocks.schema import DETAIL, SCHEMA, TABLES
from storage.formats.limits import OutOfMemoryError
from storage.profile import ProfileError, SchemaError, Window
from tests.support import profiles as some
from tests.support.blocks import ALWAYS, HASHER, files_of, read_columns, stored, write


def copied(query: str, path: Path, table: str, schema: int = SCHEMA) -> None:
    notes = f"{{'everflame.schema': '{schema}', 'everflame.table': '{table}'}}"
    duckdb.connect().execute(f"COPY ({query}) TO '{path}' (FORMAT parquet, KV_METADATA {notes})")


def refusals(file: LocalFile, files: list[LocalFile], folder: Path | None = None) -> None:
    """Who reads the table names the file, and who merges it into a folder."""
    if file.table == "samples_10m":
        asks = [lambda: reading.sum_samples([file], **ALWAYS)]
    else:
        asks = [lambda: read_columns(files, **ALWAYS)]
    if folder is not None:
        asks.append(lambda: tables.merge_parts(files, folder, HASHER))
    for ask in asks:
        with pytest.raises(ProfileError, match=str(file.path)):
            ask()


@pytest.fixture
def files(tmp_path):
    return write([stored(some.sample_profile())], tmp_path / "part")


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: b"",
        lambda _: b"PAR1",
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: content[:-8] + b"\xff\xff\xff\x7fPAR1",
        lambda content: b"PAR1" + bytes(len(content) - 8) + b"PAR1",
        lambda content: content[:4] + bytes(len(content) // 3) + content[4 + len(content) // 3 :],
        lambda _: b"not parquet" * 100,
    ],
)
def test_a_damaged_file_is_named(files, damage):
    """Whatever its table: no wrong number, and no crash."""
    for file in [each for each in files if each.table in TABLES]:
        content = file.path.read_bytes()
        file.path.write_bytes(damage(content))
        refusals(file, files)
        file.path.write_bytes(content)


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("SELECT 1 AS x", "columns"),
        ("SELECT * REPLACE (CAST(samples AS DOUBLE) AS samples) FROM old", "columns"),
        ("SELECT * EXCLUDE (value) FROM old", "columns"),
        ("SELECT *, 1 AS more FROM old", "columns"),
        ("SELECT * FROM old UNION ALL SELECT * FROM old", "rows"),
        ("SELECT * FROM old LIMIT 1", "rows"),
        (
            "SELECT * REPLACE (CASE WHEN samples > 1 THEN samples END AS samples) FROM old",
            "missing",
        ),
    ],
)
def test_another_table_is_refused(tmp_path, files, query, reason):
    """Other columns, types and numbers of rows than the manifest says, and nulls."""
    (detail,) = files_of(files, DETAIL)
    copied(
        query.replace("old", f"read_parquet('{detail.path}')"),
        tmp_path / "other.parquet",
        DETAIL,
    )
    other = detail._replace(path=tmp_path / "other.parquet")
    if reason == "columns":
        ((rows,),) = (
            duckdb.connect()
            .execute(f"SELECT num_rows FROM parquet_file_metadata('{other.path}')")
            .fetchall()
        )
        other = other._replace(rows=rows)

    with pytest.raises(ProfileError, match=reason):
        reading.sum_samples([other], **ALWAYS)
    refusals(other, [other if each is detail else each for each in files], tmp_path / "merged")


def test_a_later_schema_is_refused(tmp_path, files):
    """It is not guessed what it means; a file without a schema is not ours."""
    (detail,) = files_of(files, DETAIL)
    later, foreign = tmp_path / "later.parquet", tmp_path / "foreign.parquet"
    query = f"SELECT * FROM read_parquet('{detail.path}')"
    copied(query, later, DETAIL, SCHEMA + 1)
    duckdb.connect().execute(f"COPY ({query}) TO '{foreign}' (FORMAT parquet)")

    with pytest.raises(SchemaError, match=f"later.parquet.*schema is {SCHEMA + 1}"):
        reading.sum_samples([detail._replace(path=later)], **ALWAYS)
    with pytest.raises(ProfileError, match=r"foreign\.parquet: it is not a table"):
        reading.sum_samples([detail._replace(path=foreign)], **ALWAYS)
    with pytest.raises(ProfileError, match="not a table stacks"):
        read_dictionary([detail._replace(table="stacks")])


def test_a_file_of_too_many_rows_or_values_is_refused(files, monkeypatch):
    """A few bytes may stand for billions of them: they are counted before they are read."""
    (stacks,) = files_of(files, "stacks")
    monkeypatch.setattr(parquet, "VALUE_LIMIT", 3)
    with pytest.raises(ProfileError, match="too many values"):
        read_dictionary([stacks])
    monkeypatch.undo()
    monkeypatch.setattr(parquet, "_ROW_LIMIT", stacks.rows - 1)
    with pytest.raises(ProfileError, match="rows"):
        read_dictionary([stacks])


def test_memory_is_bounded(tmp_path):
    """What takes more than the limit ends with an error that says so, and not with the process."""
    made = [
        stored(dataclasses.replace(some.synthetic(3000, 40, seed=i), window=Window(i, i + 1)))
        for i in range(3)
    ]
    parts = [write([each], tmp_path / str(i)) for i, each in enumerate(made)]

    with pytest.raises(OutOfMemoryError, match="memory"):
        tables.merge_parts(
            [file for part in parts for file in part], tmp_path / "m", HASHER, 4 << 20
        )


def test_sums_beyond_64_bits_are_refused(tmp_path, files):
    """They are never cut."""
    (detail,) = files_of(files, DETAIL)
    path = tmp_path / "large.parquet"
    equal = f"{2**62} AS value, 0::UINTEGER AS stack"
    copied(f"SELECT * REPLACE ({equal}) FROM read_parquet('{detail.path}')", path, DETAIL)

    with pytest.raises(ProfileError, match=r"large\.parquet"):
        reading.sum_samples([detail._replace(path=path), *files_of(files, "stacks")], **ALWAYS)


def test_samples_without_their_stacks_are_refused(tmp_path, files):
    """Their frames are in no file."""
    other = write([stored(dataclasses.replace(some.hostile_profile()))], tmp_path / "other")
    swapped = [each for each in files if each.table != "stacks"] + files_of(
        other, "stacks", "frames"
    )

    with pytest.raises(ProfileError, match="missing"):
        read_columns(swapped, **ALWAYS)


def test_a_path_with_odd_characters_is_only_a_path(tmp_path):
    """Quotes, wildcards and `key=value` in the name of a folder mean nothing to DuckDB."""
    folder = tmp_path / "it's [a]*?" / "type=cpu {x}"
    files = write([stored(some.sample_profile())], folder)

    found = read_columns(files, **ALWAYS)

    assert found is not None
    assert found.total_samples == some.sample_profile().total_samples


def test_duckdb_reads_only_what_it_is_given():
    """No variables of ours, nothing of the network, no extensions; what it writes is bounded."""
    variable = {"x": np.arange(3)}
    asked = [
        "SELECT * FROM variable",
        "SELECT * FROM read_parquet('http://127.0.0.1:9/x.parquet')",
        "SELECT * FROM read_parquet('s3://bucket/x.parquet')",
        "LOAD httpfs",
    ]

    with parquet.reading_engine() as opened:
        for query in asked:
            with pytest.raises(ProfileError):
                opened.rows(query)
        opened.register("variable", variable)
        assert opened.rows(asked[0]) == [(0,), (1,), (2,)]
        limit = opened.rows("SELECT current_setting('max_temp_directory_size')")
    assert limit == [("16.0 GiB",)]
