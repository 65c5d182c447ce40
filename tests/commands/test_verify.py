"""verify: law 1 over files and stores, gaps, and objects that cannot be read."""

import dataclasses
import shutil
import tempfile
import time

import duckdb
import orjson
import pytest

from profiler import cli
from profiler.commands import verify
from profiler.commands.verify import find_gaps, verify_store
from profiler.times import rfc3339
from storage.blocks.manifest import Manifests, block_key
from storage.blocks.schema import SCHEMA, STACK_TREE
from storage.formats import pprof
from storage.objects.directory import DirectoryStore
from storage.objects.keys import CPU, DEFAULT_TENANT, content16, hour_of, object_key
from storage.objects.tenant import TenantStore
from storage.profile import ALWAYS, Window
from tests.support import profiles as some
from tests.support.compacted import change_hour, compact, delete, level0, merge, replace
from tests.support.stores import MINUTE_NS, START_NS, MemoryStore, at, directory, minutes, put


def test_a_sound_store_adds_up(tmp_path):
    """The sums are those of all objects; nothing is missing."""
    store = directory(tmp_path, *(at(some.sample_profile(), i) for i in range(3)))

    found = verify_store(TenantStore(store), ALWAYS)

    assert found.is_ok
    assert (found.objects, found.sums.ticks, found.sums.stored) == (3, 69, 48)
    assert found.sums.lost == {"map_full": 6}
    assert found.gaps == []


def test_a_profile_under_both_of_its_keys_counts_once(tmp_path):
    """With its type in the key and without, as keys were once; the key of the tenant is none."""
    store = directory(tmp_path, *(at(some.sample_profile(), i) for i in range(3)))
    keys = [key for key, _ in TenantStore(store).list_window(ALWAYS)]
    store.put(keys[0].text.replace("/l0/cpu/", "/l0/"), store.get(keys[0].text))
    store.put("v1/default/key", bytes(32))

    found = verify_store(TenantStore(store), ALWAYS)

    assert found.is_ok
    assert (found.objects, found.sums.ticks) == (3, 69)


@pytest.mark.parametrize("change", [{"ticks": 24}, {"stored": 15, "idle": 6}])
def test_an_object_that_does_not_add_up_is_named(tmp_path, change):
    """Ticks that went nowhere; rows that are more than was stored."""
    good = at(some.sample_profile(), 0)
    bad = at(some.sample_profile(), 1)
    bad = dataclasses.replace(bad, accounting=dataclasses.replace(bad.accounting, **change))
    store = directory(tmp_path, good)
    key = put(store, bad)

    found = verify_store(TenantStore(store), ALWAYS)

    assert not found.is_ok
    (mismatch,) = found.mismatches
    assert mismatch["key"] == key.text
    assert mismatch["ticks"] != mismatch["sum"] or change == {"stored": 15, "idle": 6}


def test_a_file_that_cannot_be_read_is_named_once(tmp_path, capfd):
    """Not as the key and again in the reason."""
    file = tmp_path / "cpu.svg"
    file.write_text("<svg></svg>")

    assert cli.main(["verify", str(file)]) == 1

    out = capfd.readouterr().out
    assert f"UNREADABLE {file}: cannot read it: it is a drawing (SVG)" in out
    assert out.count(str(file)) == 1


def test_what_is_no_readable_profile_is_named(tmp_path):
    """Damaged objects, and names among the profiles that are none of ours."""
    store = directory(tmp_path, at(some.sample_profile(), 0))
    content = b"\x1f\x8b damaged"
    key = object_key(at(some.sample_profile(), 1), content, DEFAULT_TENANT).text
    store.put(key, content)
    store.put("v1/default/l0/2026-05-28T20/README", b"?")
    store.put("v1/default/manifest", b"of no concern here")

    found = verify_store(TenantStore(store), ALWAYS)

    assert {each["key"] for each in found.unreadable} == {key, "v1/default/l0/2026-05-28T20/README"}
    assert found.objects == 1
    assert not found.is_ok


def test_a_window_limits_what_is_read(tmp_path):
    """Objects outside of it are not looked at."""
    store = directory(tmp_path, *(at(some.sample_profile(), i) for i in range(5)))

    assert verify_store(TenantStore(store), minutes(1, 3)).objects == 2


def test_time_that_is_missing_is_a_gap(tmp_path):
    """Per host, by name: web-1 misses two minutes, web-2 none."""
    profiles = [at(some.sample_profile(), i) for i in (0, 1, 4, 5)]
    profiles += [at(some.sample_profile(), i, "web-2", "f" * 16) for i in range(6)]
    store = directory(tmp_path, *profiles)

    found = verify_store(TenantStore(store), ALWAYS)

    assert found.gaps == [("web-1", minutes(2, 4))]
    assert found.is_ok
    assert orjson.loads(found.as_json())["gaps"] == [
        {
            "host": "web-1",
            "from_ms": (START_NS + 2 * MINUTE_NS) // 1_000_000,
            "until_ms": (START_NS + 4 * MINUTE_NS) // 1_000_000,
        }
    ]


@pytest.mark.parametrize(
    ("windows", "gaps"),
    [
        ([], []),
        ([(0, 60)], []),
        ([(0, 60), (60, 120), (120, 180)], []),
        ([(0, 60), (120, 180)], [(60, 120)]),
        ([(23, 60), (60, 120), (120, 150), (155, 180)], []),
        ([(0, 60), (60, 120), (30, 90), (120, 180)], []),
        ([(0, 3600), (60, 120), (3600, 3660)], []),
        ([(0, 60), (60, 120), (151, 180)], [(120, 151)]),
    ],
)
def test_gaps_are_longer_than_a_restart(windows, gaps):
    """Short windows at start and end are none, nor are windows that overlap after a clock step."""
    found = find_gaps(Window(start, end) for start, end in windows)

    assert found == [Window(start, end) for start, end in gaps]


def test_progress_is_told_while_it_takes_long(tmp_path, monkeypatch):
    """Now and then the number of objects; a quick run says nothing."""
    store = directory(tmp_path, *(at(some.sample_profile(), i) for i in range(3)))
    told: list[int] = []

    verify_store(TenantStore(store), ALWAYS, tell=told.append)
    assert told == []
    monkeypatch.setattr(verify, "_PROGRESS_S", 0.0)
    verify_store(TenantStore(store), ALWAYS, tell=told.append)

    assert told == [1, 2, 3]


def test_the_command_reads_a_store_or_files(tmp_path, capfd):
    """Without files the store; exit status 1 when something is wrong; not both at once."""
    store = directory(
        tmp_path / "store", at(some.sample_profile(), 0), at(some.sample_profile(), 5)
    )
    url = str(store.root)

    assert cli.main(["verify", "--store", url, "--json"]) == 0
    assert orjson.loads(capfd.readouterr().out)["objects"] == 2
    assert cli.main(["verify", "--store", url]) == 0
    assert "GAP web-1: nothing from 2026-" in capfd.readouterr().out
    store.put("v1/default/l0/x", b"")
    assert cli.main(["verify", "--store", url]) == 1
    out = capfd.readouterr().out
    assert "UNREADABLE v1/default/l0/x" in out
    assert out.endswith("2 profiles: NOT OK: 1 more cannot be read\n")
    assert cli.main(["verify", "--store", url, "x.pb.gz"]) == 2
    assert "not both" in capfd.readouterr().err


def test_nothing_to_verify_is_not_sound(tmp_path, capfd):
    """A window without objects, a folder that is missing: exit status 2, and where data are."""
    store = directory(tmp_path / "store", at(some.sample_profile(), 0))
    options = ["--store", str(store.root), "--from", "0", "--until", "100"]

    assert cli.main(["verify", *options, "--json"]) == 2

    result = capfd.readouterr()
    assert orjson.loads(result.out)["objects"] == 0
    assert "nothing selected" in result.err
    assert f"the nearest data are from {rfc3339(START_NS)}" in result.err
    assert cli.main(["verify", "--store", str(tmp_path / "none")]) == 2
    assert "is empty (the folder does not exist)" in capfd.readouterr().err


def test_a_file_that_is_missing_is_named_once(tmp_path, capfd):
    """As what was to be verified, not again in the reason."""
    file = tmp_path / "none.pb.gz"

    assert cli.main(["verify", str(file)]) == 1

    out = capfd.readouterr().out
    assert f"UNREADABLE {file}: cannot read it: no such file or directory\n" in out
    assert out.endswith("0 profiles: NOT OK: 1 more cannot be read\n")


def test_what_was_not_counted_is_said(tmp_path, capfd):
    profile = some.sample_profile()
    accounting = dataclasses.replace(profile.accounting, uncounted=1)
    profile = dataclasses.replace(profile, accounting=accounting)

    assert cli.main(["verify", "--store", str(directory(tmp_path, at(profile, 0)).root)]) == 0

    out = capfd.readouterr().out
    assert "1 profile: the counts add up, but ticks that the kernel skipped" in out
    assert out.endswith("could not be counted in 1 window\n")


def test_one_profile_is_singular(tmp_path, capfd):
    assert (
        cli.main(["verify", "--store", str(directory(tmp_path, at(some.sample_profile(), 0)).root)])
        == 0
    )

    assert capfd.readouterr().out.endswith("\n1 profile: every tick accounted for\n")


@pytest.mark.parametrize("content", ["", "\n\n", "# a comment\n"])
def test_a_file_without_anything_in_it_is_not_sound(content, tmp_path, capfd):
    """As a copy that was cut off; a recording of ours names its host, however short it was."""
    file = tmp_path / "cut.folded"
    file.write_text(content)

    assert cli.main(["verify", str(file)]) == 1

    assert f"UNREADABLE {file}: it is empty: it contains no samples\n" in capfd.readouterr().out


HOURS = [hour_of(START_NS // 10**9 + 3600 * i) for i in range(3)]


def fleet(folder):
    """Two hosts for three hours; web-2 misses its last twenty minutes but one."""
    profiles = [at(some.sample_profile(), i) for i in range(0, 180, 20)]
    profiles += [
        at(some.sample_profile(), i, "web-2", "f" * 16) for i in range(0, 180, 20) if i != 140
    ]
    return directory(folder, *profiles)


def test_what_is_compacted_counts_once(tmp_path):
    """With rollups, whether or not level 0 is still there; a late object is only there."""
    store = fleet(tmp_path / "store")
    keys = level0(store)
    late = at(some.sample_profile(), 5)
    put(store, late)
    windows = (ALWAYS, minutes(60, 141))
    expected = [verify_store(TenantStore(store), window).as_json() for window in windows]
    assert [orjson.loads(each)["objects"] for each in expected] == [18, 9]
    delete(store, [key for key in level0(store) if key not in keys])
    compact(store, tmp_path / "work", has_rollups=True)
    put(store, late)

    for gone in ([], keys[::2], keys):
        delete(store, gone)
        found = [verify_store(TenantStore(store), window).as_json() for window in windows]
        assert found == expected


def test_a_compacted_object_that_does_not_add_up_is_named_once(tmp_path, capfd):
    """By its own key."""
    store = fleet(tmp_path / "store")
    bad = at(some.sample_profile(), 1)
    bad = dataclasses.replace(bad, accounting=dataclasses.replace(bad.accounting, ticks=24))
    key = put(store, bad)
    before = verify_store(TenantStore(store), ALWAYS)
    compact(store, tmp_path / "work")

    assert verify_store(TenantStore(store), ALWAYS).as_json() == before.as_json()
    delete(store, level0(store))
    assert verify_store(TenantStore(store), ALWAYS).as_json() == before.as_json()
    assert cli.main(["verify", "--store", str(store.root)]) == 1
    assert f"MISMATCH {key.text}: 24 ticks, sum 23" in capfd.readouterr().out


def take_file(table):
    """Let the parts and rollups of an hour name another hour's file of a table."""

    def change(store, hours):
        others = Manifests(store, DEFAULT_TENANT, CPU).hour(hours[1]).files
        (other,) = [file for file in others if file.table == table]

        def taken(holder):
            files = tuple(other if f.table == table else f for f in holder.files)
            return replace(holder, files=files)

        def edit(manifest):
            parts = tuple(map(taken, manifest.parts))
            return replace(manifest, parts=parts, hourly=taken(manifest.hourly))

        change_hour(store, hours[0], edit)

    return change


def take_leaf(store, hours):
    """Let the tree of a day lack the last stack, in a file that is sound by itself."""
    manifests = Manifests(store, DEFAULT_TENANT, CPU)
    (file,) = manifests.day(hours[0][:10]).files_of(STACK_TREE)
    path, changed = store.root / file.key, store.root.parent / "changed.parquet"
    with duckdb.connect() as connection:
        connection.execute(
            f"COPY (SELECT * FROM '{path}' LIMIT {file.rows - 1}) TO '{changed}' (FORMAT parquet,"
            f" KV_METADATA {{'everflame.schema': '{SCHEMA}', 'everflame.table': '{STACK_TREE}'}})"
        )
    content = changed.read_bytes()
    key = block_key(DEFAULT_TENANT, CPU, hours[0][:10], STACK_TREE, content16(content))
    store.put(key, content)
    other = replace(file, key=key, bytes=len(content), rows=file.rows - 1)

    def edit(day):
        return replace(day, files=tuple(other if f == file else f for f in day.files))

    manifests.change_day(hours[0][:10], edit)


def change_part(**change):
    def edit(store, hours):
        def changed(manifest):
            return replace(
                manifest, parts=tuple(replace(part, **change) for part in manifest.parts)
            )

        change_hour(store, hours[0], changed)

    return edit


def damage(pattern, edit):
    def change(store, _hours):
        path = min(store.root.rglob(pattern))
        edit(path)

    return change


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


DAMAGES = {
    "a file is missing": damage("*-samples_detail-*", lambda path: path.unlink()),
    "a file is cut": damage("*-frames-*", cut),
    "the objects are missing": damage("*-objects-*", lambda path: path.unlink()),
    "a rollup is cut": damage("*-samples_1h-*", cut),
    "a day is cut": damage("dd-samples_1d-*", cut),
    "a manifest is damaged": damage("*T*.json", cut),
    "a later manifest": damage("*T*.json", lambda path: path.write_text('{"schema": 99}')),
    "other samples": change_part(samples=1),
    "another value": change_part(value=1),
    "other stacks": take_file("stacks"),
    "another hour": take_file("samples_1h"),
    "heads are cut": damage("*-presence_10m-*", cut),
    "heads of another hour": take_file("objects_10m"),
    "times of another hour": take_file("times_10m"),
    "functions of another hour": take_file("functions_1h"),
    "a tree is cut": damage("dd-stack_tree-*", cut),
    "a tree lacks a stack": take_leaf,
    "heads of a day are missing": damage("dd-objects_10m-*", lambda path: path.unlink()),
    "fewer objects": change_part(objects=1),
}


@pytest.fixture(scope="module")
def compacted(tmp_path_factory):
    """A store of two hours of which all is compacted, with rollups, and level 0 deleted."""
    folder = tmp_path_factory.mktemp("compacted")
    profiles = [at(some.sample_profile(), i) for i in (0, 1)]
    profiles.append(at(some.build([({"service": "other"}, [some.named("x")], 5)]), 61))
    store = directory(folder / "store", *profiles)
    compact(store, folder / "work", has_rollups=True)
    delete(store, level0(store))
    assert verify_store(TenantStore(store), ALWAYS).is_ok
    return store.root


@pytest.mark.parametrize("what", DAMAGES)
def test_damaged_compacted_files_are_named(compacted, tmp_path, capfd, what):
    """Each by its key, once; and no path of a copy shows."""
    store = DirectoryStore(shutil.copytree(compacted, tmp_path / "store"))

    DAMAGES[what](store, HOURS)

    found = verify_store(TenantStore(store), ALWAYS)
    assert not found.is_ok
    assert verify._report(found, as_json=False) == 1
    out = capfd.readouterr().out
    named = [each["key"] for each in (*found.unreadable, *found.mismatches)]
    assert all(key.startswith("v1/default/") and out.count(key) == 1 for key in named)
    assert str(tmp_path) not in out


def test_an_object_that_could_not_be_compacted_is_named_once(tmp_path):
    """By the manifest, also after it was deleted, or because it is still there."""
    store = directory(tmp_path / "store", at(some.sample_profile(), 0))
    content = b"\x1f\x8b damaged"
    key = object_key(at(some.sample_profile(), 1), content, DEFAULT_TENANT).text
    store.put(key, content)
    compact(store, tmp_path / "work")

    for _ in range(2):
        found = verify_store(TenantStore(store), ALWAYS)
        assert [each["key"] for each in found.unreadable] == [key]
        assert found.objects == 1
        assert verify_store(TenantStore(store), minutes(5, 9)).is_ok
        store.delete(key)


def test_two_parts_with_one_object_are_named(tmp_path):
    """It would count twice."""
    store = directory(tmp_path / "store", at(some.sample_profile(), 0))
    compact(store, tmp_path / "work")

    def twice(manifest):
        (part,) = manifest.parts
        return replace(manifest, parts=(part, replace(part, id="f" * 16)))

    change_hour(store, HOURS[0], twice)

    (problem,) = verify_store(TenantStore(store), ALWAYS).unreadable
    assert problem["key"] == f"v1/default/manifests/cpu/{HOURS[0]}.json"


def test_a_store_is_sound_after_its_oldest_hours_have_expired(tmp_path):
    """By size, with all that is compacted of them; what is left counts as before."""
    store = fleet(tmp_path / "store")
    compact(store, tmp_path / "work", has_rollups=True)
    tenant = TenantStore(store)
    size_bytes = sum(each.size_bytes for each in store.list("v1/default/") if "key" not in each.key)
    in_three_hours_s = time.time_ns() // 10**9 + 3 * 3600

    assert list(tenant.expire(in_three_hours_s, 0, size_bytes)) == []
    removed = list(tenant.expire(in_three_hours_s, 0, size_bytes // 2))

    assert sum(each.size_bytes for each in removed) >= size_bytes // 2
    found = verify_store(tenant, ALWAYS)
    assert found.is_ok
    assert 0 < found.objects < 17
    delete(store, level0(store))
    assert verify_store(tenant, ALWAYS).as_json() == found.as_json()


def test_compacted_files_of_a_bucket_are_checked_as_copies(tmp_path, monkeypatch):
    """Which are named by their keys, and gone afterwards."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    store = MemoryStore()
    tenant = TenantStore(store)
    for minute in (0, 70):
        profile = at(some.sample_profile(), minute)
        tenant.put_profile(profile, pprof.encode(profile))
    compact(store, tmp_path / "work", has_rollups=True)
    delete(store, level0(store))
    assert verify_store(tenant, ALWAYS).is_ok
    (detail, rolled, *_) = [each.key for each in store.list("") if "-samples" in each.key]
    content = store.get(rolled)
    for key in (detail, rolled):
        store.delete(key)
    store.put(rolled, content[:-4])

    found = verify_store(tenant, ALWAYS)

    assert {each["key"] for each in found.unreadable} == {detail, rolled}
    assert not any(str(tmp_path) in each["reason"] for each in found.unreadable)
    assert list((tmp_path / "temporary").glob("everflame-verify-*")) == []


def test_hours_of_which_levels_have_expired_are_sound(compacted, tmp_path):
    """Detail, then the finer rollups, and then all but the rollup of the day."""
    store = DirectoryStore(shutil.copytree(compacted, tmp_path / "store"))
    before = verify_store(TenantStore(store), ALWAYS).as_json()

    for tables in ({"samples_detail"}, {"samples_detail", "samples_10m"}):

        def expire(manifest, tables=tables):
            parts = tuple(
                replace(part, files=tuple(f for f in part.files if f.table not in tables))
                for part in manifest.parts
            )
            return replace(manifest, parts=parts)

        change_hour(store, HOURS[0], expire)
        assert verify_store(TenantStore(store), ALWAYS).as_json() == before
    for hour in HOURS:
        store.delete(f"v1/default/manifests/cpu/{hour}.json")
    assert verify_store(TenantStore(store), ALWAYS).is_ok
    damage("dd-samples_1d-*", cut)(store, HOURS)
    assert not verify_store(TenantStore(store), ALWAYS).is_ok


def test_what_is_merged_meanwhile_is_checked_anew(tmp_path):
    """A compactor replaces the files of an hour after its manifest was read."""
    store = directory(tmp_path / "store", at(some.sample_profile(), 0))
    compact(store, tmp_path / "work")
    put(store, at(some.sample_profile(), 1))
    compact(store, tmp_path / "work")
    delete(store, level0(store))
    expected = verify_store(TenantStore(store), ALWAYS).as_json()

    class MergedMeanwhile(DirectoryStore):
        reads = 0

        def get_tagged(self, key):
            found = super().get_tagged(key)
            self.reads += 1
            if self.reads == 2:
                merge(store, tmp_path / "work", HOURS[0])
            return found

    watched = MergedMeanwhile(store.root)
    assert verify_store(TenantStore(watched), ALWAYS).as_json() == expected
    assert watched.reads > 2
