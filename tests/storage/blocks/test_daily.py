"""The tables of days: rare stacks are folded again, and the stacks are a tree as well."""

import dataclasses
import itertools
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from storage.blocks import daily, frame_tree, tables
from storage.blocks.block import Block
from storage.blocks.daily import DayFiles, write_day
from storage.blocks.dictionary import read_dictionary
from storage.blocks.frame_tree import EMPTY_STACK
from storage.blocks.heads import write_heads
from storage.blocks.rollup import rest_id
from storage.blocks.scans import LocalFile, of_table, scan_of
from storage.blocks.schema import DICTIONARY, NO_PARENT, SCHEMA, STACK_TREE
from storage.blocks.tables import roll_up, write_block
from storage.profile import Profile, ProfileError, Window
from storage.stack_tree import StackLists, StackTree
from tests.support import profiles as some
from tests.support.blocks import HASHER, files_of, stored
from tests.support.compaction import DAY_START_S, HOUR_S, NS, duckdb_connection

FEW = 100
"""Stacks that are not folded, in these tests."""
REST = rest_id(HASHER)


@pytest.fixture(autouse=True)
def _folds_few(monkeypatch):
    monkeypatch.setattr(tables, "FOLDED_ABOVE", FEW)
    monkeypatch.setattr(daily, "FOLDED_ABOVE", FEW)


def stacks_of(seed: int, count: int = 700) -> list[list[str]]:
    """Return stacks that share their upper parts, one of them without locations."""
    chosen = random.Random(seed)
    found: dict[tuple[str, ...], None] = {(): None}
    stack: list[str] = []
    while len(found) < count:
        stack = stack[: chosen.randint(0, len(stack))]
        while len(stack) < 9:
            stack.append(f"f{int(60 * chosen.random() ** 2)}")
            if chosen.random() < 0.2:
                break
        found[tuple(stack)] = None
    return [list(each) for each in found]


def write_hour(hour: int, stacks: list[list[str]], folder: Path) -> list[LocalFile]:
    """Write an hour with some of the stacks, few of which are common, and its rollups."""
    numbers = np.random.default_rng(hour)
    counts = 1 + numbers.pareto(0.6, len(stacks)).clip(0, 5000).astype(int)
    rows = [
        ({"service": f"s{number % 2}"}, [some.named(name) for name in stack], int(count))
        for number, (stack, count) in enumerate(zip(stacks, counts, strict=True))
        if not stack or numbers.random() < 0.6
    ]
    start_ns = (DAY_START_S + hour * HOUR_S) * NS
    made = some.build(rows, window=Window(start_ns, start_ns + 60 * NS))
    values = numbers.permutation(made.row_samples) * 1000
    return write_profile(dataclasses.replace(made, row_values=values), hour, folder)


def write_profile(made: Profile, hour: int, folder: Path) -> list[LocalFile]:
    """Write an hour of one object, and its rollups."""
    part = write_block(Block.of([stored(made)], HASHER), folder / f"{hour:02}")
    hourly = roll_up(part, folder / f"{hour:02}h")
    heads = write_heads(part, folder / f"{hour:02}h", HASHER)
    return [*hourly, *heads, *files_of(part, *DICTIONARY)]


def source_of(hours: list[list[LocalFile]], previous: list[LocalFile] = ()) -> DayFiles:
    has_tree = bool(of_table(previous, STACK_TREE))
    return DayFiles(
        [each for each in previous if not (has_tree and each.table == "stacks")],
        [each for hour in hours for each in hour if each.path.parent.name.endswith("h")],
        [each for hour in hours for each in files_of(hour, *DICTIONARY)],
    )


def rows_of(files: list[LocalFile], table: str, query: str) -> list[tuple]:
    """Return the rows of a query over the files of a table, in the order of a single file."""
    chosen = of_table(files, table)
    paths = [str(each.path) for each in chosen]
    scanned = f"read_parquet({paths}, file_row_number = true)"
    if table == "samples_1h":
        scanned = scan_of(chosen)
    with duckdb_connection() as connection:
        return connection.execute(query.replace("files", scanned)).fetchall()


def lists_of(files: list[LocalFile]) -> dict[int, tuple[int, ...]]:
    rows = rows_of(files, "stacks", "SELECT stack_id, frame_ids FROM files")
    lists = {number: tuple(stack) for number, stack in rows}
    assert len(lists) == len(rows)
    return lists


def check_tree(files: list[LocalFile]) -> None:
    """Check that a day's tree has the stacks of its lists, in the order that is said of it."""
    assert len(of_table(files, STACK_TREE)) == 1
    query = "SELECT parent, frame_id, stack_id, is_stack FROM files ORDER BY file_row_number"
    nodes = rows_of(files, STACK_TREE, query)
    paths: list[tuple[int, ...]] = []
    lists: dict[int, tuple[int, ...]] = {}
    for number, (parent, frame, stack, is_stack) in enumerate(nodes):
        assert parent < number or parent == NO_PARENT
        paths.append((*(() if parent == NO_PARENT else paths[parent]), frame))
        assert is_stack or stack == 0
        if is_stack:
            lists[stack] = paths[-1]
    order = [
        (len(path), -1 if parent == NO_PARENT else parent, frame)
        for path, (parent, frame, _, _) in zip(paths, nodes, strict=True)
    ]
    assert order == sorted(set(order))
    assert {*paths} == {path[:n] for path in lists.values() for n in range(1, len(path) + 1)}
    expected = lists_of(files)
    if EMPTY_STACK in expected:
        assert expected.pop(EMPTY_STACK) == ()
    assert lists == expected


def check_reading(files: list[LocalFile], wanted: set[int]) -> None:
    """Check that the tree is read as what the lists are read as."""
    ids = np.array(sorted(wanted), dtype=np.uint64)
    meanings = files_of(files, "frames", "names", "modules")
    read = []
    for table in (STACK_TREE, "stacks"):
        columns = read_dictionary([*of_table(files, table), *meanings], ids)
        expected = StackTree if table == STACK_TREE and wanted else StackLists
        assert isinstance(columns.stacks, expected)
        frames = columns.location_hashes.take(columns.stack_words).tolist()
        bounds = itertools.pairwise(columns.stack_offsets.tolist())
        lists = [tuple(frames[first:past]) for first, past in bounds]
        read.append(dict(zip(columns.stack_hashes.tolist(), lists, strict=True)))
    assert read[0] == read[1] == lists_of(files)


def check_day(files: list[LocalFile], hours: list[list[LocalFile]]) -> Counter:
    """Check sums, stacks and what is folded of a day; return samples and value of its stacks."""
    query = "SELECT ts, set_id, sum(samples), sum(value) FROM files GROUP BY ALL ORDER BY ALL"
    every = [file for hour in hours for file in hour]
    assert rows_of(files, "samples_1h", query) == rows_of(every, "samples_1h", query)
    query = "SELECT stack_id, set_id, sum(samples), sum(value) FROM files GROUP BY ALL ORDER BY ALL"
    sums = rows_of(files, "samples_1d", query)
    assert rows_of(files, "samples_1h", query) == sums
    query = "SELECT ts, set_id, stack_id FROM files GROUP BY ALL HAVING count(*) > 1"
    assert not rows_of(files, "samples_1h", query)
    lists = lists_of(files)
    assert {row[0] for row in sums} == lists.keys()
    query = "SELECT DISTINCT frame_id FROM files"
    frames = {frame for (frame,) in rows_of(files, "frames", query)}
    assert frames == {frame for stack in lists.values() for frame in stack}
    whole, folded = np.zeros(2), np.zeros(2)
    for stack, _, samples, value in sums:
        whole += (samples, value)
        folded += (samples, value) if lists[stack][-1:] == (REST,) else (0, 0)
    assert (folded <= whole / 100).all()
    check_tree(files)
    check_reading(files, lists_of(files).keys())
    return Counter({row[0]: row[2] for row in sums})


def test_days_that_are_renewed_keep_99_of_100_samples_and_all_sums(tmp_path):
    """Hour by hour or at once; each hour folds other stacks, and the day has fewer for that."""
    stacks = stacks_of(1)
    hours = [write_hour(hour, stacks, tmp_path) for hour in range(3)]
    assert all(REST in {s[-1] for s in lists_of(hour).values() if s} for hour in hours)
    of_hours = {
        number
        for hour in hours
        for (number,) in rows_of(hour, "samples_1h", "SELECT DISTINCT stack_id FROM files")
    }
    day: list[LocalFile] = []
    for number, hour in enumerate(hours):
        day = write_day(source_of([hour], day), tmp_path / f"day-{number}", HASHER)
        renewed = check_day(day, hours[: number + 1])

    at_once = check_day(write_day(source_of(hours), tmp_path / "at-once", HASHER), hours)

    assert len(renewed) < len(of_hours)
    assert len(at_once) < len(of_hours)


def test_a_day_without_samples_has_a_tree_without_nodes(tmp_path):
    """All ticks of its hours were lost; what they were is in its heads."""
    start_ns = DAY_START_S * NS
    made = some.build([], window=Window(start_ns, start_ns + 60 * NS))
    hour = write_profile(made, 0, tmp_path)

    day = write_day(source_of([hour]), tmp_path / "day", HASHER)

    check_day(day, [hour])
    assert [each.rows for each in files_of(day, STACK_TREE, "stacks", "objects_10m")] == [1, 0, 0]
    check_day(write_day(source_of([], day), tmp_path / "again", HASHER), [hour])


def test_the_order_of_files_does_not_show(tmp_path):
    """Of equal renewals equal files are made, byte by byte."""
    hours = [write_hour(hour, stacks_of(2), tmp_path) for hour in range(3)]

    one = write_day(source_of(hours), tmp_path / "one", HASHER)
    other = write_day(source_of(hours[::-1]), tmp_path / "other", HASHER)

    assert [each.table for each in one] == [each.table for each in other]
    for mine, others in zip(one, other, strict=True):
        assert mine.path.read_bytes() == others.path.read_bytes(), mine.table


def test_an_hour_is_replaced_in_a_day_that_is_folded(tmp_path):
    """What the others have is taken from the day: parts may have nothing of it any more."""
    stacks = stacks_of(3)
    hours = [write_hour(hour, stacks, tmp_path) for hour in range(3)]
    before = write_day(source_of(hours), tmp_path / "before", HASHER)
    changed = write_hour(1, stacks_of(4), tmp_path / "changed")
    everything = source_of([hours[0], changed, hours[2]])

    source = DayFiles(
        files_of(before, "samples_1h", STACK_TREE, "frames", "names", "modules", "label_sets"),
        [
            each
            for each in everything.rollups
            if each.table != "samples_1h" or "changed" in str(each.path)
        ],
        files_of(changed, *DICTIONARY),
        [DAY_START_S + HOUR_S],
    )
    after = write_day(source, tmp_path / "after", HASHER)

    check_day(after, [hours[0], changed, hours[2]])


@pytest.mark.parametrize("left_out", ["too large", "too deep", "too many nodes", "too many words"])
def test_a_day_may_lack_the_tree_and_gets_it_later(left_out, tmp_path, monkeypatch):
    """As one that an older version has made does."""
    hours = [write_hour(hour, stacks_of(5), tmp_path) for hour in range(2)]
    with monkeypatch.context() as patch:
        if left_out == "too large":
            patch.setattr(daily, "PIECE_BYTES", 400)
        elif left_out == "too many nodes":
            patch.setattr(frame_tree, "NODE_LIMIT", 50)
        elif left_out == "too many words":
            patch.setattr(frame_tree, "VALUE_LIMIT", 50)
        else:
            patch.setattr(frame_tree, "DEEPEST", 7)
        before = write_day(source_of(hours[:1]), tmp_path / "before", HASHER)
    assert not of_table(before, STACK_TREE)
    query = "SELECT stack_id FROM files"
    stacks = {number for (number,) in rows_of(before, "samples_1d", query)}
    assert stacks == lists_of(before).keys()

    day = write_day(source_of(hours[1:], before), tmp_path / "day", HASHER)

    check_day(day, hours)


def test_a_tree_that_is_damaged_is_refused(tmp_path):
    """Whatever its file says of itself; the day is then made of its hours again."""
    hours = [write_hour(hour, stacks_of(6, 60), tmp_path) for hour in range(2)]
    day = write_day(source_of(hours[:1]), tmp_path / "day", HASHER)
    (file,) = of_table(day, STACK_TREE)
    content = file.path.read_bytes()
    below = f"CAST(if(parent = {NO_PARENT}, parent, {file.rows} - parent) AS UINTEGER)"
    changes = {
        "a parent is below": f"{below} AS parent, frame_id, stack_id, is_stack",
        "siblings are the same": "parent, min(frame_id) OVER () AS frame_id, stack_id, is_stack",
        "stacks are the same": "parent, frame_id, 7::UBIGINT AS stack_id, is_stack",
    }
    for what, columns in changes.items():
        changed = tmp_path / "changed.parquet"
        with duckdb_connection() as connection:
            connection.execute(
                f"COPY (SELECT {columns} FROM '{file.path}') TO '{changed}' (FORMAT parquet,"
                f" KV_METADATA {{'everflame.schema': '{SCHEMA}',"
                f" 'everflame.table': '{STACK_TREE}'}})"
            )
        changed.replace(file.path)
        with pytest.raises(ProfileError):
            write_day(source_of(hours[1:], day), tmp_path / what, HASHER)
        file.path.write_bytes(content)
    write_day(source_of(hours[1:], day), tmp_path / "good", HASHER)
