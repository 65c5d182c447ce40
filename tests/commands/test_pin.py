"""`everflame pin`: what it keeps, and that all commands that delete or list show it."""

import time

import orjson
import pytest

from profiler import cli
from profiler.commands import doctor
from profiler.times import rfc3339
from storage.objects.open import open_store
from tests.support.compaction import DAY_S, HOUR_S, Expected, hour_name, profile

NS = 1_000_000_000
START_S = int(time.time()) // DAY_S * DAY_S - 20 * DAY_S
DAMAGED = "v1/default/pins/cpu/00000000010-00000000020-0123456789abcdef.json"


@pytest.fixture
def expected(tmp_path, monkeypatch) -> Expected:
    """Three objects of an hour whose details are due to expire, in the default store."""
    monkeypatch.setenv("EVERFLAME_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("EVERFLAME_STORE", str(tmp_path / "store"))
    expected = Expected(open_store(str(tmp_path / "store")))
    for minute in range(3):
        expected.put(profile(START_S + 60 * minute))
    return expected


def run(capfd, *arguments: str) -> tuple[int, str, str]:
    status = cli.main(list(arguments))
    captured = capfd.readouterr()
    return status, captured.out, captured.err


def pin(capfd, *arguments: str) -> tuple[int, str, str]:
    window = ("--from", rfc3339(START_S * NS), "--until", rfc3339((START_S + 60) * NS))
    return run(capfd, "pin", *window, *arguments)


def test_a_window_is_pinned_shown_everywhere_and_released(expected, capfd) -> None:
    """Its hour keeps all its detail until the pin is removed."""
    until = rfc3339((START_S + 60) * NS)
    status, out, err = pin(capfd, "--name", "incident", "--note", "slow checkout")
    assert (status, out) == (0, "")
    assert f"until {until}, 0 compacted hours and 1 object, " in err
    assert err.rstrip().endswith("; kept until everflame pin --remove incident")

    status, out, _ = run(capfd, "compact", "--workers=1")
    assert (status, out) == (
        0,
        "3 objects folded into 1 part; rollups made: 1 hourly and 1 daily; kept by pins: 1 hour\n",
    )
    assert "kept by pins: 1 hour" in run(capfd, "compact", "--workers=1", "--dry-run")[1]
    assert f"pinned: incident, cpu {rfc3339(START_S * NS)} until {until}" in run(capfd, "ls")[1]
    assert run(capfd, "ls", "--from=now-1d")[0] == 2
    listed = orjson.loads(run(capfd, "ls", "--json")[1])["pins"]
    assert [(each["name"], each["note"]) for each in listed] == [("incident", "slow checkout")]
    status, out, _ = run(capfd, "verify")
    assert status == 0
    assert "PINNED incident: 1 profile from " in out
    verified = orjson.loads(run(capfd, "verify", "--json")[1])["pins"]
    assert [(each["name"], each["objects"]) for each in verified] == [("incident", 1)]
    (row,) = run(capfd, "pin", "--list")[1].splitlines()[1:]
    assert row.split()[:4] == ["incident", "cpu", rfc3339(START_S * NS), until]
    found = orjson.loads(run(capfd, "pin", "--list", "--json")[1])
    assert [(each["hours"], each["objects"]) for each in found["pins"]] == [(1, 1)]

    status, _, err = run(capfd, "pin", "--remove", "incident")
    assert status == 0
    assert "removed the pin incident of " in err
    assert run(capfd, "compact", "--workers=1")[1] == "expired: detail of 1 hours\n"


def test_repeating_is_harmless_and_names_have_defaults(expected, capfd) -> None:
    for _ in range(2):
        assert pin(capfd)[0] == 0

    (found,) = orjson.loads(run(capfd, "pin", "--list", "--json")[1])["pins"]
    assert found["name"] == f"{rfc3339(START_S * NS)}..{rfc3339((START_S + 60) * NS)}"
    assert run(capfd, "pin", "--remove", found["key"])[0] == 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "name a window with --from"),
        (["--until", "now"], "name a window with --from"),
        (["--list", "--from", "now-1h"], "take no --from"),
        (["--remove", "x", "--note", "y"], "take no --from"),
        (["--remove", "x"], "there is no pin 'x' (there are: none)"),
        (["--from", "now-2h", "--until", "now-3h"], "it must end after it starts"),
        (["--from", "now-2h", "--until", "now-1h"], "the nearest data are from "),
        (["--from", "now-99d", "--type", "heap"], "nothing selected: no heap from "),
        (["--from", "now-99d", "--type", "He ap"], "not a type of profiles"),
        (["--from", "now-99d", "--name", "a\nb"], "cannot be the name of a pin"),
    ],
)
def test_what_cannot_be_pinned_is_refused(expected, capfd, arguments, reason) -> None:
    """With 2; so is a window of the past that holds nothing."""
    status, out, err = run(capfd, "pin", *arguments)

    assert (status, out) == (2, "")
    assert reason in err


def test_what_is_still_to_come_can_be_pinned(expected, capfd) -> None:
    status, _, err = run(capfd, "pin", "--from=now-1m", f"--until={int(time.time()) + HOUR_S}")

    assert status == 0
    assert "where there is nothing yet" in err
    assert "1 window pinned" in {c.name: c for c in checks(expected)}["store_pins"].detail


def checks(expected: Expected) -> list[doctor.Check]:
    return doctor.store_checks(str(expected.store))


def test_a_damaged_pin_is_named(expected, capfd) -> None:
    """By verify, which fails, by --list and by doctor; and so is one whose data are gone."""
    pin(capfd, "--name", "gone")
    expected.store.put(DAMAGED, b"{")
    for each in list(expected.store.list("v1/default/l0/")):
        expected.store.delete(each.key)

    assert "store_pins" in {c.name for c in checks(expected) if c.status is doctor.Status.WARN}
    status, out, _ = run(capfd, "verify")
    assert status == 1
    assert f"UNREADABLE {DAMAGED}: it is damaged" in out
    assert f"{DAMAGED}: it is damaged" in run(capfd, "pin", "--list")[2]
    assert run(capfd, "pin", "--remove", DAMAGED)[0] == 0
    (found,) = [c for c in checks(expected) if c.status is doctor.Status.WARN]
    assert found.detail == "nothing is left of what is pinned as gone"


def test_lifecycle_rules_say_that_they_ignore_pins(capfd) -> None:
    status, out, err = run(
        capfd, "compact", "--lifecycle", "--store=s3://profiles/x", "--tenant=team"
    )

    assert status == 0
    assert "They ignore pins" in err
    prefixes = [rule["Filter"]["Prefix"] for rule in orjson.loads(out)["Rules"]]
    assert prefixes[0] == "x/v1/team/l0/"


def test_the_hour_of_a_pin_is_named_like_hours_of_the_store(expected, capfd) -> None:
    expected.put(profile(START_S + HOUR_S))
    pin(capfd, "--name", "x")

    run(capfd, "compact", "--workers=1")

    hours = {
        each.key
        for each in expected.store.list("v1/default/manifests/")
        if b"samples_detail" in expected.store.get(each.key)
    }
    assert hours == {f"v1/default/manifests/cpu/{hour_name(START_S)}.json"}
