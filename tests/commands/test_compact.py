"""`everflame compact`: what it prints, its exit status, and how it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import orjson
import pytest

from profiler import cli
from storage.objects.open import open_store
from tests.support.compaction import Expected, hour_manifests, hour_name, profile, read_store
from tests.support.weed import BUCKET, Weed, using_keys

ROOT = Path(__file__).parents[2]
HOUR_S = 3600


@pytest.fixture
def expected(tmp_path, monkeypatch) -> Expected:
    """Three objects of an hour that is over, in the default store."""
    monkeypatch.setenv("EVERFLAME_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("EVERFLAME_STORE", str(tmp_path / "store"))
    expected = Expected(open_store(str(tmp_path / "store")))
    for minute in range(3):
        expected.put(profile(start_s() + 60 * minute))
    return expected


def start_s() -> int:
    return int(time.time()) // HOUR_S * HOUR_S - 2 * HOUR_S


def test_it_says_what_it_has_done_and_repeats_nothing(expected, capfd) -> None:
    """One line on stdout, the progress on stderr."""
    assert cli.main(["compact", "--workers=1"]) == 0
    first = capfd.readouterr()
    assert cli.main(["compact", "--workers=1"]) == 0
    second = capfd.readouterr()

    assert first.out == "3 objects folded into 1 part; rollups made: 1 hourly and 1 daily\n"
    hour = hour_name(start_s())
    assert first.err.splitlines() == [
        f"everflame: {hour}: objects folded: 3",
        f"everflame: {hour}: rolled up",
        f"everflame: {hour[:10]}: hours rolled up: 1",
    ]
    assert (second.out, second.err) == ("nothing to do\n", "")
    assert read_store(expected) == expected.total


def test_json_has_all_counts(expected, capfd) -> None:
    """And names what cannot be read; that is not a failure of compaction."""
    key = expected.put(profile(start_s() + 600))
    bad = key._replace(content16="0" * 16).text
    expected.store.put(bad, b"nonsense")

    assert cli.main(["compact", "--workers=1", "--json"]) == 0

    captured = capfd.readouterr()
    found = orjson.loads(captured.out)
    assert found == {
        "schema": 1,
        "tenant": "default",
        "dry_run": False,
        "objects": 4,
        "parts": 1,
        "conflicts": 0,
        "merged": 0,
        "hourly": 1,
        "daily": 1,
        "expired": {"detail": 0, "10m": 0, "1h": 0, "1d": 0},
        "deleted": {"level0": 0, "garbage": 0},
        "pinned": 0,
        "unreadable": [{"key": bad, "reason": found["unreadable"][0]["reason"]}],
        "problems": [],
    }
    counts = ("objects", "parts", "conflicts", "merged", "hourly", "daily", "pinned")
    assert {type(found[name]) for name in counts} == {int}
    assert f"cannot read {bad}: its content is not what its key says" in captured.err


def test_a_dry_run_changes_nothing(expected, capfd) -> None:
    """It says what would be done."""
    before = sorted(each.key for each in expected.store.list(""))

    assert cli.main(["compact", "--workers=1", "--dry-run"]) == 0

    assert capfd.readouterr().out == "would be done: 3 objects folded\n"
    assert sorted(each.key for each in expected.store.list("")) == before


def test_an_hour_that_cannot_be_compacted_is_named_and_fails(expected, capfd) -> None:
    """The others are compacted all the same."""
    other_s = start_s() - HOUR_S
    expected.put(profile(other_s))
    hour = hour_name(other_s)
    expected.store.put(f"v1/default/manifests/cpu/{hour}.json", b'{"schema":7}')

    assert cli.main(["compact", "--workers=1"]) == 1

    captured = capfd.readouterr()
    assert "3 objects folded" in captured.out
    assert f"cannot compact {hour}: " in captured.err
    assert "a later version of everflame wrote it (schema 7" in captured.err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--keep", "2h=3d"], "not a level and a time"),
        (["--keep", "detail"], "not a level and a time"),
        (["--keep", "detail=soon"], "not a duration"),
        (["--keep", "detail=40d,10m=30d"], "10m cannot be kept for 30 days"),
        (["--workers", "0"], "not a number of processes"),
        (["--every", "0s"], "not a duration"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(arguments, reason, capfd) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["compact", *arguments])

    assert ended.value.code == 2
    assert reason in capfd.readouterr().err


def test_a_store_that_cannot_be_used_is_one_line(tmp_path, monkeypatch, capfd) -> None:
    """The folder may not be one."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EVERFLAME_CACHE", str(tmp_path / "cache"))

    assert cli.main(["compact", "--workers=1", "--store", str(tmp_path / "file")]) == 2

    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("everflame: ")


def test_lifecycle_rules_are_for_buckets(monkeypatch, tmp_path, capfd) -> None:
    """JSON on stdout, what it cannot do on stderr; no request is sent."""
    assert (
        cli.main(["compact", "--store=s3://profiles/prod/", "--lifecycle", "--keep=1d=500d"]) == 0
    )
    captured = capfd.readouterr()
    rules = orjson.loads(captured.out)["Rules"]
    assert rules[1] == {
        "ID": "everflame-default-blocks",
        "Status": "Enabled",
        "Filter": {"Prefix": "prod/v1/default/blocks/"},
        "Expiration": {"Days": 508},
    }
    assert "cannot express detail, 10m and 1h" in captured.err.replace("\n", " ")

    assert cli.main(["compact", f"--store={tmp_path}", "--lifecycle"]) == 2
    assert "lifecycle rules are for buckets" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_repeated_it_takes_what_comes_and_ends_cleanly(number, weed: Weed, tmp_path) -> None:
    """With a bucket and two workers; the hour is over, so few objects do not wait."""
    with using_keys():
        url = f"s3://{BUCKET}/{tmp_path.name}"
        expected = Expected(open_store(url, weed.endpoint))
        expected.put(profile(start_s()))
        command = [
            sys.executable,
            "-c",
            "import sys; from profiler.cli import main; sys.exit(main())",
        ]
        command += ["compact", f"--store={url}", f"--s3-endpoint={weed.endpoint}", "--every=0.2s"]
        command += ["--workers=2", "--json"]
        environment = {**os.environ, "EVERFLAME_CACHE": str(tmp_path / "cache")}
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:

            def compacted() -> int:
                manifests = hour_manifests(expected.store).values()
                return sum(part["objects"] for each in manifests for part in each["parts"])

            assert process.stdout is not None
            first = process.stdout.readline()
            assert compacted() == 1
            expected.put(profile(start_s() - HOUR_S))
            process.send_signal(number)
            _, err = process.communicate(timeout=60)

        assert process.returncode == 0, err
        assert b"Traceback" not in err
        assert orjson.loads(first)["objects"] == 1
        assert read_store(expected) == expected.total
