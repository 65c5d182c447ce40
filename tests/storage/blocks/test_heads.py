"""Heads of ten minutes: what they say is what the objects that they stand for say, added up."""

import dataclasses
import random
from collections import Counter, defaultdict

import pytest

from storage.blocks.block import ROLLUP_LABELS
from storage.blocks.heads import write_heads
from storage.blocks.loading import OBJECT_COUNTS
from storage.blocks.schema import HEADS_10M
from storage.profile import Accounting, Host, ProfileError, Window, make_labels
from tests.support import profiles as some
from tests.support.blocks import HASHER, files_of, stored, write
from tests.support.compaction import DAY_START_S, NS, duckdb_connection

START_S = DAY_START_S + 9 * 3600
LABELS = (
    {},
    {"service": "api", "version": "1", "container": "c", "pid": "7"},
    {"service": "api", "version": "1", "thread": "t"},
    {"service": "api", "version": "2"},
    {"service": "", "namespace": "n' \" é"},
    {"comm": "none of the three"},
)
COUNTS = [name for name in OBJECT_COUNTS if name not in {"cpus", "agent_rss_bytes"}]


def rolled_up(labels):
    return tuple(pair for pair in make_labels(dict(labels)) if pair[0] in ROLLUP_LABELS)


def object_of(chance, start_s, host):
    """Return an object with odd labels, counts and causes; some have no stacks or no host."""
    rows = [
        (labels, [some.MAIN, chance.choice([some.WORK, some.READ])], chance.randint(1, 50))
        for labels in chance.sample(LABELS, chance.randint(0, 3))
    ]
    made = some.build(rows, window=Window(start_s * NS, (start_s + 60) * NS))
    services = chance.sample(LABELS, chance.randint(0, 3))
    accounting = Accounting(
        hosts=(Host(f"host-{host}", f"{host:016x}"),) if host else (),
        **{name: chance.randint(0, 1000) for name in OBJECT_COUNTS},
        lost={name: chance.randint(1, 9) for name in chance.sample(["a", "b", "é"], 2)},
        stops={"complete": 3} if chance.random() < 0.5 else {},
        misses={},
        services={make_labels(labels): chance.randint(0, 60) * NS for labels in services},
    )
    return dataclasses.replace(made, accounting=accounting)


def expected_of(objects):
    """Return counts, times and presence by host and ten minutes, without any of our tables."""
    heads = defaultdict(Counter)
    times, presence = Counter(), Counter()
    for each in objects:
        accounting = each.accounting
        host = accounting.hosts[0].name if accounting.hosts else ""
        start_s = each.window.start_ns // NS
        at = (start_s - start_s % 600, host)
        heads[at].update({name: getattr(accounting, name) for name in COUNTS})
        heads[at].update({f"lost {name}": count for name, count in accounting.lost.items()})
        heads[at].update({f"stops {name}": count for name, count in accounting.stops.items()})
        heads[at]["objects"] += 1
        for name in ("cpus", "agent_rss_bytes"):
            heads[at][name] = max(heads[at][name], getattr(accounting, name))
        for row in each.rows():
            times[(at, rolled_up(row.labels), "samples")] += row.samples
            times[(at, rolled_up(row.labels), "value")] += row.value
        for labels, present_ns in accounting.services.items():
            presence[(at, rolled_up(labels))] += present_ns
    return {at: +counts for at, counts in heads.items()}, +times, +presence


def found_in(files):
    """Return the same of the files, by plain SQL."""
    connection = duckdb_connection()
    rows = {
        each.table: connection.execute(f"SELECT * FROM read_parquet('{each.path}')").fetchall()
        for each in files
    }
    names = {
        each.table: [
            row[0]
            for row in connection.execute(
                f"DESCRIBE SELECT * FROM read_parquet('{each.path}')"
            ).fetchall()
        ]
        for each in files
    }
    labels = {number: tuple(sorted(pairs.items())) for number, pairs in rows["label_sets"]}
    heads, places = {}, {}
    for row in rows["objects_10m"]:
        head = dict(zip(names["objects_10m"], row, strict=True))
        at = places[head["object_id"]] = (head["start_s"], head["host"])
        counts = Counter({name: head[name] for name in (*OBJECT_COUNTS, "objects")})
        for table in ("lost", "stops"):
            counts.update({f"{table} {name}": count for name, count in head[table].items()})
        heads[at] = +counts
        assert (head["content16"], head["length_s"]) == ("", 600)
        assert labels[head["host_id"]] == ((("host", head["host"]),) if head["host"] else ())
        assert head["object_id"] >> 41 == head["start_s"] // 600
    times, presence = Counter(), Counter()
    for object_id, host_id, set_id, samples, value in rows["times_10m"]:
        at = places[object_id]
        assert labels[host_id] == ((("host", at[1]),) if at[1] else ())
        times[(at, labels[set_id], "samples")] += samples
        times[(at, labels[set_id], "value")] += value
    for object_id, set_id, present_ns in rows["presence_10m"]:
        presence[(places[object_id], labels[set_id])] += present_ns
    return heads, +times, +presence


@pytest.mark.parametrize("seed", range(4))
def test_heads_add_up_what_objects_say(seed, tmp_path):
    """Counts, losses, samples by label set and presence; whatever parts the objects are in."""
    chance = random.Random(seed)
    objects = [
        object_of(chance, START_S + 60 * chance.randrange(60), chance.randrange(4))
        for _ in range(30)
    ]
    parts = [objects[:7], objects[7:8], objects[8:]]
    files = [
        file
        for number, part in enumerate(parts)
        for file in write(list(map(stored, part)), tmp_path / str(number))
    ]
    chance.shuffle(files)

    made = write_heads(files, tmp_path / "made", HASHER)

    assert [each.table for each in made] == [*HEADS_10M, "label_sets"]
    assert found_in(made) == expected_of(objects)
    again = write_heads(files[::-1], tmp_path / "again", HASHER)
    assert [each.rows for each in again] == [each.rows for each in made]
    for one, other in zip(made, again, strict=True):
        assert one.path.read_bytes() == other.path.read_bytes()


def test_an_object_that_is_in_two_parts_has_no_heads(tmp_path):
    """It would count twice."""
    made = stored(object_of(random.Random(1), START_S, 1))
    files = [file for name in "ab" for file in write([made], tmp_path / name)]

    with pytest.raises(ProfileError, match="twice"):
        write_heads(files_of(files, "objects", "times", "presence", "label_sets"), tmp_path, HASHER)


def test_heads_of_objects_without_any_labels_are_written(tmp_path):
    """Their rolled up label set is empty, and there is no other."""
    made = some.build([({}, [some.MAIN], 3)], window=Window(START_S * NS, (START_S + 60) * NS))
    accounting = Accounting(hosts=(Host("web-1", "1" * 16),))
    part = write([stored(dataclasses.replace(made, accounting=accounting))], tmp_path / "part")

    heads = write_heads(part, tmp_path / "heads", HASHER)

    assert [each.rows for each in files_of(heads, "times_10m")] == [1]
