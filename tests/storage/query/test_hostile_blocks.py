"""Files whose names prove their content, which is not what this program writes.

Whoever may write to a bucket can store such files and name them in a manifest. They cost their
hour, and never a query; or what they say is impossible is not said.
"""

import hashlib
import json
import shutil
from pathlib import Path

import duckdb
import pytest

from storage.blocks.schema import SCHEMA
from storage.objects.directory import DirectoryStore
from storage.objects.keys import hour_of
from storage.objects.tenant import TenantStore
from storage.query.query import Query
from tests.storage.query.test_compacted import Compacted, small
from tests.support.stores import START_NS, at, minutes

NAMES = 'STRUCT("function" VARCHAR, "module" VARCHAR, kind VARCHAR, file VARCHAR, line BIGINT)[]'
SEGMENTS = "STRUCT(p_vaddr UBIGINT, p_offset UBIGINT, p_filesz UBIGINT)[]"
NULL_FUNCTION = (
    "[{'function': NULL, 'module': '', 'kind': 'native', 'file': '', 'line': 1}]::" + NAMES
)
LARGEST = "9223372036854775807::BIGINT"
WINDOW = minutes(0, 120)


@pytest.fixture(scope="module")
def compacted(tmp_path_factory) -> Path:
    """A store of two compacted hours."""
    folder = tmp_path_factory.mktemp("compacted")
    both = Compacted(folder)
    keys = [both.put(at(small(minute), minute)) for minute in (1, 21, 61)]
    both.compact()
    both.expire(keys)
    return both.store.root


def change(root: Path, table: str, query: str) -> None:
    """Replace a file of the first hour by what a query makes of it, in its manifest as well."""
    old = sorted(root.rglob(f"*-{table}-*.parquet"))[0]
    new = old.with_name("new")
    notes = f"{{'everflame.schema': '{SCHEMA}', 'everflame.table': '{table}'}}"
    with duckdb.connect() as opened:
        opened.execute(f"CREATE VIEW old AS FROM read_parquet('{old}')")
        opened.execute(f"COPY ({query}) TO '{new}' (FORMAT parquet, KV_METADATA {notes})")
        ((rows,),) = opened.execute(
            f"SELECT num_rows FROM parquet_file_metadata('{new}')"
        ).fetchall()
    content16 = hashlib.sha256(new.read_bytes()).hexdigest()[:16]
    named = new.rename(old.with_name(f"{old.name.rpartition('-')[0]}-{content16}.parquet"))
    path = sorted(root.rglob("manifests/cpu/*.json"))[0]
    manifest = json.loads(path.read_bytes())
    for file in manifest["parts"][0]["files"]:
        if file["table"] == table:
            file.update(key=str(named.relative_to(root)), rows=rows)
    path.write_bytes(json.dumps(manifest).encode())


@pytest.mark.parametrize(
    ("table", "column", "value"),
    [
        ("samples_detail", "samples", "-samples"),
        ("samples_detail", "ts", "5::UINTEGER"),
        ("samples_detail", "set_id", "set_id + 1::UBIGINT"),
        ("times", "samples", "-samples"),
        ("times", "value", LARGEST),
        ("times", "object_id", "1::UBIGINT"),
        ("objects", "content16", "'../../../x'"),
        ("objects", "start_s", "5::UINTEGER"),
        ("objects", "start_ns", "(-1)::BIGINT"),
        ("objects", "end_ns", LARGEST),
        ("objects", "period_ns", "0::BIGINT"),
        ("objects", "stored", LARGEST),
        ("objects", "cpus", "(-1)::BIGINT"),
        ("objects", "unit", "'bytes'"),
        ("objects", "type", "'other'"),
        ("objects", "lost", f"MAP {{'a': {LARGEST}, 'b': {LARGEST}}}"),
        ("objects", "hosts", "[{'name': NULL::VARCHAR, 'host_id': 'x'}]"),
        ("objects", "hosts", '[NULL]::STRUCT("name" VARCHAR, host_id VARCHAR)[]'),
        ("stacks", "frame_ids", "[NULL]::UBIGINT[]"),
        ("frames", "kind", "'no kind'"),
        ("frames", "line", "(-1)::BIGINT"),
        ("frames", "name_rank", "255::UTINYINT"),
        ("frames", "names", f"[NULL]::{NAMES}"),
        ("frames", "names", NULL_FUNCTION),
        ("modules", "segments", f"[NULL]::{SEGMENTS}"),
        ("label_sets", "labels", "MAP {'service': 'other'}"),
        ("label_sets", "labels", "MAP {'service': NULL::VARCHAR}"),
    ],
)
def test_a_hostile_file_costs_its_hour(tmp_path, compacted, table, column, value):
    """It is named in each answer that would need it, and the other hour is there."""
    root = tmp_path / "store"
    shutil.copytree(compacted, root)
    change(root, table, f"SELECT * REPLACE ({value} AS {column}) FROM old")
    query = Query(TenantStore(DirectoryStore(root)), tmp_path / "cache")
    hour, whole = hour_of(START_NS // 10**9), small(61).total_samples
    profile, functions = query.profile(WINDOW), query.functions(WINDOW)
    answers = [profile.coverage, functions.coverage]
    answers += [query.timeline(WINDOW).coverage, query.presence(WINDOW).coverage]

    # Read together, both have the names and modules of the other hour, which are better.
    is_named = bool(profile.coverage.skipped) or table not in {"names", "modules"}
    both = whole + small(1).total_samples + small(21).total_samples
    assert profile.profile.total_samples == (whole if is_named else both)
    assert functions.samples == whole
    assert all(hour in each.skipped[0].key for each in answers[not is_named : 2])
    if table in {"times", "objects", "label_sets"}:
        assert all(hour in each.skipped[0].key for each in answers)
    for part in query.timeline(WINDOW).series:
        assert part.samples.min() >= 0
    list(query.self_samples([WINDOW]))
    query.labels(WINDOW)


def test_presence_is_never_negative_or_without_end(tmp_path, compacted):
    """It is cut, as that of level-0 objects is."""
    root = tmp_path / "store"
    shutil.copytree(compacted, root)
    change(root, "presence", "SELECT * REPLACE ((-5)::BIGINT AS present_ns) FROM old")
    query = Query(TenantStore(DirectoryStore(root)), tmp_path / "cache")

    assert query.presence(WINDOW).rows[:, 2].min() == 0
