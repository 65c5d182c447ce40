"""Blocks: what is written as tables is read back exactly, however it was split and merged."""

import dataclasses
import itertools
from collections.abc import Sequence

import duckdb
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.blocks.block import ROLLUP_LABELS, Block, labels_id
from storage.blocks.dictionary import read_label_sets
from storage.blocks.hosts import read_contents
from storage.blocks.reading import sum_samples
from storage.blocks.scans import of_table
from storage.blocks.schema import DETAIL
from storage.blocks.slices import seconds_of
from storage.blocks.tables import merge_parts, roll_up
from storage.blocks.times import read_heads
from storage.columns import Columns, Times
from storage.merging import merge_columns
from storage.objects.keys import NS_PER_S
from storage.profile import (
    Host,
    Labels,
    ProfileError,
    Window,
    make_labels,
)
from symbolizer.location import AddressLocation, Frame, Location
from tests.support import profiles as some
from tests.support.blocks import (
    ALWAYS,
    HASHER,
    Decoded,
    files_of,
    read_columns,
    read_times,
    stored,
    without_processes,
    write,
)


def sum_times(times: Times | Columns) -> dict[tuple[tuple[int, ...], Labels], tuple[int, int]]:
    sums: dict[tuple[tuple[int, ...], Labels], tuple[int, int]] = {}
    for (number, label_set), counts in zip(
        times.times.tolist(), times.time_counts.tolist(), strict=True
    ):
        line = (tuple(times.objects[number].tolist()), times.label_sets[label_set])
        samples, value = sums.get(line, (0, 0))
        sums[line] = samples + counts[0], value + counts[1]
    return sums


def presence_lines(times: Times | Columns) -> list[tuple[tuple[int, ...], Labels, int]]:
    return sorted(
        (tuple(times.objects[number].tolist()), times.present_sets[labels], present_ns)
        for number, labels, present_ns in times.presence.tolist()
    )


def assert_equal(found: Columns, expected: Columns) -> None:
    """Compare everything but the names and modules of locations, and the order of lines."""
    assert found.to_profile() == expected.to_profile()
    assert found.period_ns == expected.period_ns
    assert sorted(found.objects.tolist()) == sorted(expected.objects.tolist())
    assert sum_times(found) == sum_times(expected)
    assert presence_lines(found) == presence_lines(expected)


@st.composite
def objects(draw: st.DrawFn) -> list[Decoded]:
    """Some profiles of an hour, with hosts as agents and other programs have them."""
    drawn = draw(st.lists(some.profiles(), min_size=1, max_size=4))
    made = []
    for profile in drawn:
        start_ns = draw(st.integers(0, 3600)) * NS_PER_S + draw(st.sampled_from([0, 5]))
        window = Window(start_ns, start_ns + draw(st.integers(1, 60 * NS_PER_S)))
        hosts = draw(st.sampled_from([(), ("web-1",), ("web-2",), ("",), ("web-1", "web-2")]))
        accounting = dataclasses.replace(
            profile.accounting, hosts=tuple(Host(name, f"{len(name):016x}") for name in hosts)
        )
        made.append(stored(dataclasses.replace(profile, window=window, accounting=accounting)))
    return list({key.content16: (key, columns) for key, columns in made}.values())


SLOW = settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@SLOW
@given(objects(), st.data())
def test_what_is_written_and_merged_is_read_back(tmp_path_factory, made, data):
    """Rows, accounting, objects, times and presence, of one part, of many and of their merge."""
    folder = tmp_path_factory.mktemp("blocks")
    expected = without_processes(merge_columns([columns for _, columns in made]))
    part_of = data.draw(st.lists(st.integers(0, 2), min_size=len(made), max_size=len(made)))
    parts = [
        write(
            [each for each, part in zip(made, part_of, strict=True) if part == number],
            folder / str(number),
        )
        for number in sorted(set(part_of))
    ]
    files = [file for part in parts for file in part]
    merged = merge_parts(files, folder / "merged", HASHER)

    for chosen in (files, merged):
        found = read_columns(chosen, **ALWAYS)
        assert found is not None
        assert_equal(found, merge_columns([expected]))
        times = read_times(chosen, **ALWAYS)
        assert times is not None
        assert sum_times(times) == sum_times(expected)
        assert presence_lines(times) == presence_lines(expected)
        assert times.accounting == expected.accounting
        assert read_contents(chosen) == {key.content16 for key, _ in made}


def best_names(columns: Sequence[Columns]) -> dict[Location, set[tuple[Frame, ...]]]:
    """Return the names of each location that are as good as any, by rank and then by time."""
    best: dict[Location, tuple[tuple[int, int], set[tuple[Frame, ...]]]] = {}
    for each in columns:
        keys = zip(each.name_ranks.tolist(), each.named_s.tolist(), strict=True)
        profile = each.to_profile()
        for place, names, key in zip(profile.locations, profile.names, keys, strict=True):
            known, among = best.get(place, ((0, 0), set()))
            if key >= known:
                best[place] = key, {*(among if key == known else ()), names}
    return {place: names for place, (_, names) in best.items()}


@SLOW
@given(objects())
def test_names_are_the_best_of_any_object(tmp_path_factory, made):
    """Of each location: by rank, then by when it was known; in whichever part that is."""
    folder = tmp_path_factory.mktemp("blocks")
    parts = [write([each], folder / str(i)) for i, each in enumerate(made)]
    files = [file for part in parts for file in part]
    expected = merge_columns([columns for _, columns in made]).to_profile()
    best = best_names([columns for _, columns in made])
    merged = merge_parts(files[::-1], folder / "merged", HASHER)

    for chosen in (files, merged, write(made, folder / "whole")):
        found = read_columns(chosen, **ALWAYS).to_profile()
        assert set(found.locations) == set(expected.locations)
        assert found.modules == expected.modules
        for place, names in zip(found.locations, found.names, strict=True):
            if isinstance(place, AddressLocation):
                assert names in best[place]


def test_a_window_counts_the_objects_that_start_in_it(tmp_path):
    """As queries do: whole objects, by the second in which they start."""
    minutes = [
        stored(
            some.build(
                [({"service": "a", "pid": str(i)}, [some.MAIN], i + 1)],
                window=Window(i * 60 * NS_PER_S, (i + 1) * 60 * NS_PER_S),
            )
        )
        for i in range(5)
    ]
    files = write(minutes, tmp_path / "part")
    start_s, end_s = seconds_of(Window(60 * NS_PER_S - 1, 180 * NS_PER_S + 1))

    found = read_columns(files, start_s=start_s, end_s=end_s)

    assert found.total_samples == 2 + 3 + 4
    assert_equal(
        found, merge_columns([without_processes(merge_columns([c for _, c in minutes[1:4]]))])
    )
    assert read_columns(files, start_s=4000, end_s=5000) is None


def test_hosts_and_sets_can_be_chosen(tmp_path):
    """A selection has its rows and times; what is known of the objects stays that of all."""
    hosts = [("web-1", "0" * 16), ("web-2", "1" * 16)]
    made = []
    for i, host in enumerate(hosts):
        profile = some.sample_profile()
        accounting = dataclasses.replace(profile.accounting, hosts=(Host(*host),), cpus=i + 1)
        made.append(stored(dataclasses.replace(profile, accounting=accounting)))
    files = write(made, tmp_path / "part")
    host_id = labels_id(make_labels({"host": "web-2"}), HASHER)
    jobs = [
        number
        for number, labels in read_label_sets(files).items()
        if ("service", "jobs") in labels and ("comm", "python3") in labels
    ]

    of_host = read_columns(files, **ALWAYS, hosts=[host_id])
    of_set = read_columns(files, **ALWAYS, sets=jobs)

    assert of_host.total_samples == made[0][1].total_samples
    assert {dict(labels)["host"] for labels in of_host.label_sets} == {"web-2"}
    assert of_host.accounting.hosts == (Host("web-2", "1" * 16),)
    assert of_set.accounting.hosts == (Host("web-1", "0" * 16), Host("web-2", "1" * 16))
    assert of_set.total_samples == 2 * 5
    assert sum(counts[0] for counts in sum_times(of_set).values()) == 10
    assert (
        sum_samples(of_table(files, DETAIL), **ALWAYS, sets=[], hosts=[host_id]).samples.sum() == 0
    )


def test_any_engine_joins_detail_and_stacks(tmp_path):
    """By `part` and `stack`, of several parts at once; a host's rows stand together."""
    made = [
        stored(dataclasses.replace(some.synthetic(50, 9, seed=i), window=Window(i, i + 1)))
        for i in range(3)
    ]
    parts = [write([each], tmp_path / str(i)) for i, each in enumerate(made)]
    merged = merge_parts([*parts[0], *parts[1]], tmp_path / "merged", HASHER)
    files = [*merged, *parts[2]]
    detail, stacks = ([str(each.path) for each in files_of(files, t)] for t in (DETAIL, "stacks"))

    rows = duckdb.execute(
        "SELECT stack_id, len(frame_ids), CAST(sum(samples) AS BIGINT) FROM read_parquet($detail)"
        " JOIN (SELECT part, file_row_number AS stack, stack_id, frame_ids"
        " FROM read_parquet($stacks, file_row_number = true)) USING (part, stack)"
        " GROUP BY ALL ORDER BY stack_id",
        {"detail": detail, "stacks": stacks},
    ).fetchall()
    hosts = duckdb.execute("SELECT host_id FROM read_parquet($1)", [detail[0]]).fetchall()

    expected = merge_columns([columns for _, columns in made])
    by_stack = dict.fromkeys(expected.stack_hashes.tolist(), 0)
    for (_, stack), (samples, _) in zip(
        expected.rows.tolist(), expected.counts.tolist(), strict=True
    ):
        by_stack[int(expected.stack_hashes[stack])] += samples
    assert [(id_, samples) for id_, _, samples in rows] == sorted(by_stack.items())
    assert hosts == sorted(hosts)


def test_parts_are_told_apart_whatever_the_ids_of_their_objects(tmp_path):
    """Ids are hashes of contents: whoever uploads many can choose some that cancel each other."""
    made = []
    for i, number in enumerate((1, 2, 3, 4, 8, 12)):
        profile = dataclasses.replace(some.synthetic(50, 9, seed=i), window=Window(i, i + 1))
        key, columns = stored(profile)
        made.append((key._replace(content16=f"{number:016x}"), columns))
    parts = [write(made[:3], tmp_path / "one"), write(made[3:], tmp_path / "other")]

    merged = merge_parts([*parts[0], *parts[1]], tmp_path / "merged", HASHER)

    (detail,) = files_of(merged, DETAIL)
    total = f"SELECT CAST(sum(samples) AS BIGINT) FROM '{detail.path}'"
    expected = sum(columns.total_samples for _, columns in made)
    assert duckdb.execute(total).fetchall() == [(expected,)]


def test_other_types_keep_value_beside_samples(tmp_path):
    """Bytes of an allocation are no multiple of its samples."""
    profile = some.sample_profile()
    heap = dataclasses.replace(
        some.with_values(profile, [2**52 - i for i in range(len(profile.row_values))]),
        type="alloc-space",
        unit="bytes",
    )
    heap = dataclasses.replace(heap, row_values=heap.row_values // 8)
    key, columns = stored(heap)

    found = read_columns(write([(key, columns)], tmp_path / "part"), **ALWAYS)

    assert (found.type, found.unit) == ("alloc-space", "bytes")
    assert found.total_value == heap.total_value
    assert_equal(found, merge_columns([without_processes(columns)]))
    with pytest.raises(ValueError, match="different types"):
        Block.of([(key, columns), stored(profile)], HASHER)


def test_the_order_of_parts_does_not_show(tmp_path):
    """The merged files of any order of parts are equal, byte by byte."""
    parts = []
    for i in range(3):
        window = Window((i + 1) * 60 * NS_PER_S, (i + 2) * 60 * NS_PER_S)
        profile = dataclasses.replace(some.sample_profile(), window=window)
        parts.append(write([stored(profile)], tmp_path / f"part-{i}"))
    contents = set()
    for n, order in enumerate(itertools.permutations(parts)):
        files = merge_parts([file for part in order for file in part], tmp_path / f"m{n}", HASHER)
        contents.add(tuple(each.path.read_bytes() for each in files))

    assert len(contents) == 1


def test_an_object_in_two_parts_is_refused(tmp_path):
    """It would count twice."""
    one, other = (write([stored(some.sample_profile())], tmp_path / name) for name in "ab")

    with pytest.raises(ProfileError, match="is there twice"):
        merge_parts([*one, *other], tmp_path / "merged", HASHER)
    with pytest.raises(ProfileError, match="is there twice"):
        read_heads([*one, *other], **ALWAYS)


def test_rollups_keep_totals_by_service(tmp_path):
    """Ten minutes and an hour sum up to the samples, without host and process."""
    made = []
    for i in range(4):
        window = Window(i * 400 * NS_PER_S, (i * 400 + 60) * NS_PER_S)
        made.append(stored(dataclasses.replace(some.sample_profile(), window=window)))
    files = write(made, tmp_path / "part")
    hour = [*roll_up(files, tmp_path / "hour"), *files_of(files, "stacks")]
    expected = merge_columns([columns for _, columns in made])
    label_sets = read_label_sets(files)

    for known, bucket_s, times in ((files, 600, {0, 600, 1200}), (hour, 3600, {0})):
        rollups = of_table(known, {600: "samples_10m", 3600: "samples_1h"}[bucket_s])
        sums = sum_samples(rollups, **ALWAYS, bucket_s=bucket_s)
        assert set(sums.ts.tolist()) == times
        assert sums.samples.sum() == expected.total_samples
        assert sums.values.sum() == expected.total_value
        kept = {name for number in sums.sets.tolist() for name, _ in label_sets[number]}
        assert kept <= set(ROLLUP_LABELS)
    with pytest.raises(ValueError, match="hosts"):
        sum_samples(of_table(files, "samples_10m"), **ALWAYS, by_host=True)
