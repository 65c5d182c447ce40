"""verify: law 1 over files and stores, gaps, and objects that cannot be read."""

import dataclasses

import orjson
import pytest

from profiler import cli
from profiler.commands import verify
from profiler.commands.verify import find_gaps, verify_store
from profiler.times import rfc3339
from storage.objects.keys import DEFAULT_TENANT, object_key
from storage.objects.tenant import TenantStore
from storage.profile import ALWAYS, Window
from tests.support import profiles as some
from tests.support.stores import MINUTE_NS, START_NS, at, directory, minutes, put


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
