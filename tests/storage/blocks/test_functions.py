"""Series of functions: their sums are those of the stacks, however these were split and merged."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from storage.blocks import folded_leaves, functions, tables
from storage.blocks.block import ROLLUP_LABELS, labels_id
from storage.blocks.dictionary import read_dictionary
from storage.blocks.functions import (
    FUNCTIONS_1D,
    FUNCTIONS_1H,
    FUNCTIONS_10M,
    GROUPS_1D,
    GROUPS_1H,
    HOST_GROUPS,
    OF_DAY,
    OF_HOUR,
    write_day,
    write_hour,
)
from storage.blocks.parquet import engine
from storage.blocks.scans import LocalFile, of_table
from storage.blocks.schema import FUNCTIONS, OLDER, TABLES
from storage.blocks.tables import merge_parts
from storage.columns import Columns, Texts
from storage.location_functions import LocationFunctions, functions_of_stacks
from storage.merging import adopt_names, merge_columns
from storage.objects.keys import NS_PER_S
from storage.profile import Host, ProfileError, Window
from storage.query.function_totals import FunctionTotals
from tests.support import profiles as some
from tests.support import python_profiles
from tests.support.blocks import HASHER, Decoded, files_of, stored, write

SLOW = settings(
    max_examples=4,
    phases=[Phase.generate],
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
HOUR_S = 3600
SELF = ("samples", "value")
NAMES = ("value", "total_value", "samples", "total_samples")
"""As `FunctionTotals.counts` has them."""


@st.composite
def objects(draw: st.DrawFn) -> list[Decoded]:
    """Some objects of two hours."""
    made = []
    for profile in draw(st.lists(some.profiles(), min_size=1, max_size=5)):
        start_ns = draw(st.integers(0, 2 * HOUR_S - 1)) * NS_PER_S
        window = Window(start_ns, start_ns + draw(st.integers(1, 60 * NS_PER_S)))
        hosts = draw(st.sampled_from([(), ("web-1",), ("web-2",), ("web-1", "web-2")]))
        accounting = dataclasses.replace(
            profile.accounting, hosts=tuple(Host(name, f"{len(name):016x}") for name in hosts)
        )
        made.append(stored(dataclasses.replace(profile, window=window, accounting=accounting)))
    return list({key.content16: (key, columns) for key, columns in made}.values())


def rows_of(files: Sequence[LocalFile], table: str) -> list[tuple[Any, ...]]:
    chosen = of_table(files, table)
    with engine() as opened:
        opened.check(chosen)
        columns = ", ".join(f'"{name}"' for name in {**TABLES, **OLDER}[table])
        opened.load("found", f"SELECT {columns} FROM {{files}}", chosen)
        return opened.rows("SELECT * FROM found ORDER BY ALL")


def expected_lines(
    columns: Columns, who: Callable[[int], int] | None, ts: int
) -> Counter[tuple[tuple[int, ...], str]]:
    """Return the counts of functions by (ts, host or group, set, function) and by their name."""
    totals = FunctionTotals.of(columns, HASHER)
    lines: Counter[tuple[tuple[int, ...], str]] = Counter()
    for (labels, function), counts in zip(
        totals.rows.tolist(), totals.counts.tolist(), strict=True
    ):
        of_set = totals.service_sets[labels]
        host = labels_id(tuple(pair for pair in of_set if pair[0] == "host"), HASHER)
        rolled = labels_id(tuple(pair for pair in of_set if pair[0] in ROLLUP_LABELS), HASHER)
        place = () if who is None else (who(host),)
        key = (ts, *place, rolled, int(totals.function_hashes[function]))
        for name, count in zip(
            ("value", "total_value", "samples", "total_samples"), counts, strict=True
        ):
            lines[key, name] += count
    return lines


def found_lines(
    files: Sequence[LocalFile], table: str, names: Sequence[str]
) -> Counter[tuple[tuple[int, ...], str]]:
    lines: Counter[tuple[tuple[int, ...], str]] = Counter()
    rows = rows_of(files, table)
    assert len({row[: -len(names)] for row in rows}) == len(rows), f"{table}: a line is there twice"
    for row in rows:
        for name, count in zip(names, row[-len(names) :], strict=True):
            lines[row[: -len(names)], name] += count
    return lines


def selves(lines: Counter[tuple[tuple[int, ...], str]]) -> Counter[tuple[tuple[int, ...], str]]:
    return Counter({key: n for key, n in lines.items() if n and key[1] in ("samples", "value")})


def named(made: Sequence[Decoded], files: Sequence[LocalFile]) -> list[Columns]:
    """Return objects one by one, with the names that the files have for their locations."""
    whole = read_dictionary(files)
    return [
        dataclasses.replace(
            adopt_names(columns, [whole], columns.location_hashes), modules=whole.modules
        )
        for _, columns in made
    ]


@SLOW
@given(objects(), st.data())
def test_series_have_the_sums_of_the_stacks(tmp_path_factory, made, data):
    """Of any split into parts: by host and ten minutes, by group, and totals of all hosts."""
    folder = tmp_path_factory.mktemp("functions")
    hours: dict[int, list[Decoded]] = {}
    for each in made:
        hours.setdefault(each[0].start_s // HOUR_S, []).append(each)
    written = {}
    for hour, objects_of in hours.items():
        parts = data.draw(
            st.lists(st.integers(0, 1), min_size=len(objects_of), max_size=len(objects_of))
        )
        files = [
            file
            for number in set(parts)
            for file in write(
                [each for each, part in zip(objects_of, parts, strict=True) if part == number],
                folder / f"{hour}-{number}",
            )
        ]
        if data.draw(st.booleans()):
            files = merge_parts(files, folder / f"{hour}-merged", HASHER)
        written[hour] = write_hour(files, folder / f"{hour}-functions", HASHER)
        assert {each.table for each in written[hour]} == set(OF_HOUR)

        by_host, by_group, totals = Counter(), Counter(), Counter()
        columns_of = named(objects_of, files)
        for (key, _), columns in zip(objects_of, columns_of, strict=True):
            bucket = key.start_s - key.start_s % 600
            by_host += selves(expected_lines(columns, lambda host: host, bucket))
            grouped = expected_lines(columns, lambda host: host % HOST_GROUPS, hour * HOUR_S)
            by_group += selves(grouped)
            totals += expected_lines(columns, None, hour * HOUR_S)
        assert selves(found_lines(written[hour], FUNCTIONS_10M, SELF)) == by_host
        assert selves(found_lines(written[hour], GROUPS_1H, SELF)) == by_group
        names = (*SELF, "total_samples", "total_value")
        assert +found_lines(written[hour], FUNCTIONS_1H, names) == +totals
        assert_functions_are_those_of(written[hour], columns_of)

    every = [file for files in written.values() for file in files]
    whole = write_day(every, folder / "day")
    so_far: list[LocalFile] = []
    for hour in data.draw(st.permutations(sorted(written))):
        so_far = write_day([*so_far, *written[hour]], folder / f"day-until-{hour}")
    assert {each.table for each in whole} == set(OF_DAY)
    for table in OF_DAY:
        assert rows_of(so_far, table) == rows_of(whole, table)
    for daily, finer in ((FUNCTIONS_1D, FUNCTIONS_10M), (GROUPS_1D, GROUPS_1H)):
        sums: Counter[tuple[tuple[int, ...], str]] = Counter()
        for (key, name), count in found_lines(every, finer, SELF).items():
            sums[(0, *key[1:]), name] += count
        assert found_lines(whole, daily, SELF) == sums


def assert_functions_are_those_of(files: Sequence[LocalFile], columns: Sequence[Columns]) -> None:
    totals = FunctionTotals.of(merge_columns(columns), HASHER)
    used = np.unique(totals.rows[:, 1])
    expected = {
        int(totals.function_hashes[number]): (*frame[:3], frame.file)
        for number, frame in zip(used.tolist(), totals.frames(used), strict=True)
    }
    assert {row[0]: row[1:5] for row in rows_of(files, FUNCTIONS)} == expected


def test_what_interpreters_add_to_stacks_is_no_function(tmp_path, monkeypatch):
    """Python functions have the time of the loop, and as many samples are there as before."""
    made = [stored(python_profiles.shop_profile())]
    files = write(made, tmp_path / "part")
    expected = expected_lines(made[0][1], None, made[0][0].start_s // HOUR_S * HOUR_S)

    whole = write_hour(files, tmp_path / "whole", HASHER)
    monkeypatch.setattr(functions, "_WORDS_AT_ONCE", 4)
    monkeypatch.setattr(folded_leaves, "_WORDS_AT_ONCE", 4)
    pieces = write_hour(files, tmp_path / "pieces", HASHER)

    for each in (whole, pieces):
        names = (*SELF, "total_samples", "total_value")
        assert +found_lines(each, FUNCTIONS_1H, names) == +expected
        shown = {row[1] for row in rows_of(each, FUNCTIONS)}
        assert {"Shop.price", "PyLong_Add", "dot"} <= shown
        assert shown.isdisjoint({python_profiles.LOOP, "slot_tp_call", "list_sort"})
        total = sum(
            count
            for (_, name), count in found_lines(each, FUNCTIONS_10M, SELF).items()
            if name == "samples"
        )
        assert total == made[0][1].total_samples


def test_functions_say_how_well_they_are_known(tmp_path):
    """How many source files a function has, and which of its locations have no real name."""
    other = some.named("handler", file="other.py")
    profile = some.build([({}, [some.HANDLER, other, some.STRIPPED], 1)])
    _, columns = made = stored(profile)
    unnamed = columns.location_hashes[columns.locations[:, 1] > 0].tolist()

    files = write_hour(write([made], tmp_path / "part"), tmp_path / "hour", HASHER)

    found = {row[1]: row[4:] for row in rows_of(files, FUNCTIONS)}
    assert found == {
        "handler": ("", 2, []),
        "[libc.so.6]": ("", 0, unnamed),
    }


def test_large_tables_are_several_files(tmp_path, monkeypatch):
    """A store takes no object of more than 64 MB."""
    made = [stored(some.build([({}, [some.named(f"f{i}")], i + 1) for i in range(40)], {}, {}))]
    files = write(made, tmp_path / "part")
    whole = write_hour(files, tmp_path / "whole", HASHER)
    monkeypatch.setattr(tables, "PIECE_BYTES", 1500)

    pieces = write_hour(files, tmp_path / "pieces", HASHER)

    assert len(of_table(pieces, FUNCTIONS_10M)) > 1
    assert len({each.path for each in pieces}) == len(pieces)
    for table in OF_HOUR:
        assert rows_of(pieces, table) == rows_of(whole, table)


def test_functions_of_files_that_do_not_belong_together_are_refused(tmp_path):
    """Samples whose stacks are in another file would be lost without a word."""
    one, other = (
        write([stored(some.build([({}, [some.named(name)], 1)], {}, {}))], tmp_path / name)
        for name in ("one", "other")
    )
    mixed = [file for file in one if file.table != "stacks"] + files_of(other, "stacks")

    with pytest.raises(ProfileError, match="cannot"):
        write_hour(mixed, tmp_path / "hour", HASHER)


def test_totals_do_not_depend_on_how_much_is_added_up_at_once(tmp_path, monkeypatch):
    """Few pairs of a label set and a function have a table, many are sorted."""
    rows = [
        ({"service": f"s{i % 3}"}, [some.MAIN, some.WORK, some.MAIN, some.READ][: 1 + i % 4], 1 + i)
        for i in range(12)
    ]
    files = write([stored(some.build(rows, {}))], tmp_path / "part")

    whole = write_hour(files, tmp_path / "whole", HASHER)
    monkeypatch.setattr(functions, "_WORDS_AT_ONCE", 4)
    pieces = write_hour(files, tmp_path / "pieces", HASHER)

    for table in OF_HOUR:
        assert rows_of(whole, table) == rows_of(pieces, table)
        assert rows_of(whole, table)


def test_functions_of_many_stacks_are_those_of_few():
    """Numbers of a stack and a function are 32 bits wide together, or 64 if needed."""
    count = 1 << 13
    locations = LocationFunctions(
        Texts.of([]),
        np.arange(count, dtype=np.uint64),
        np.zeros((count, 4), np.int64),
        np.arange(count + 1),
        np.arange(count)[::-1].copy(),
    )
    words = np.array([count - 1, 0, 0, 5, 5])
    for empty in (0, 1 << 20):
        offsets = np.concatenate([np.zeros(1 + empty, np.int64), [3, 5]])

        found, numbers = functions_of_stacks(offsets, words, locations)

        assert found[empty:].tolist() == [0, 2, 3]
        assert numbers.tolist() == [0, count - 1, count - 6]
