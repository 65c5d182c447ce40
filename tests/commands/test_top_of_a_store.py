"""top --store: what a fleet spends its CPUs on, and what has grown in a week."""

import orjson
import pytest

from profiler import cli
from profiler.times import rfc3339
from tests.support import profiles as some
from tests.support.stores import START_NS, at, directory, minutes

WEEK_MINUTES = 7 * 24 * 60
HOUR = minutes(WEEK_MINUTES, WEEK_MINUTES + 60)


def fleet(work: int, *more):
    rows = [
        ({"service": "api", "version": "2"}, [some.MAIN, some.WORK], work),
        ({"service": "db", "version": "9"}, [some.MAIN, some.MEMCPY], 100),
        *more,
    ]
    return some.build(rows, some.NAMES)


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Two hosts for an hour in two weeks: api doubles its work, and jobs are new."""
    monkeypatch.setenv("EVERFLAME_CACHE", str(tmp_path / "cache"))
    jobs = ({"service": "jobs", "version": "1"}, [some.HANDLER], 50)
    profiles = []
    for host in (1, 2):
        for minute in range(60):
            place = (f"web-{host}", f"{host:016x}")
            profiles.append(at(fleet(200), minute, *place))
            profiles.append(at(fleet(400, jobs), WEEK_MINUTES + minute, *place))
    store = directory(tmp_path / "store", *profiles)
    monkeypatch.setenv("EVERFLAME_STORE", str(store.root))


def top(capfd, *arguments):
    """Return the answer for the hour of the second week."""
    window = (f"--from={rfc3339(HOUR.start_ns)}", f"--until={rfc3339(HOUR.end_ns)}")
    assert cli.main(["top", *window, *arguments]) == 0
    return capfd.readouterr().out


def test_functions_are_those_of_all_hosts_with_their_trend(store, capfd):
    answer = orjson.loads(top(capfd, "--json"))
    text = top(capfd, "--limit", "2").splitlines()

    cores = {row["function"]: row["cores"] for row in answer["rows"]}
    # 400 ticks of a 99th of a second in a minute, on two hosts.
    assert cores["clamp"] == pytest.approx(2 * 400 / 99 / 60, rel=1e-3)
    assert answer["cores"] == pytest.approx(sum(cores.values()))
    before = {row["function"]: row["cores_week_before"] for row in answer["rows"]}
    assert before["clamp"] == pytest.approx(cores["clamp"] / 2)
    assert before["handler"] == 0
    assert "+100 %" in text[3]
    assert "clamp" in text[3]
    assert "more function" in text[-1]


@pytest.mark.parametrize(
    ("arguments", "largest"),
    [
        (["--by", "service,version"], {"service": "api", "version": "2"}),
        (["--group", "service"], {"service": "api"}),
        (["--group", "module", "--by", "host"], {"host": "web-1"}),
        (["-q", '{service="db"}', "--by", "service"], {"service": "db"}),
    ],
)
def test_lines_are_told_apart_as_asked(store, capfd, arguments, largest):
    answer = orjson.loads(top(capfd, "--json", *arguments))

    assert answer["rows"][0]["labels"] == largest
    total = sum(row["cores"] for row in answer["rows"])
    assert total == pytest.approx(answer["cores"])


def test_without_a_week_before_there_is_no_trend(store, capfd):
    start_ns = START_NS
    window = (f"--from={rfc3339(start_ns)}", f"--until={rfc3339(minutes(0, 60).end_ns)}")

    assert cli.main(["top", *window]) == 0
    assert "no trend" in capfd.readouterr().out


def test_what_cannot_be_asked_is_an_error(store, capfd):
    assert cli.main(["top", "--json"]) == 2
    assert "need --store or --from" in capfd.readouterr().err
    assert cli.main(["top", "-p", "1", "--from", "now-1h"]) == 2
    assert cli.main(["top", "--from", rfc3339(minutes(200, 201).start_ns), "--until",
                     rfc3339(minutes(200, 201).end_ns)]) == 2  # fmt: skip
    assert "the nearest data are from" in capfd.readouterr().err
