"""The tables of a fleet: services and functions of all hosts, with hosts, versions and trend."""

import pytest

from tests.support import profiles as some
from tests.support.services import serving
from tests.support.stores import at, directory, minutes

WEEK_MINUTES = 7 * 24 * 60
MINUTES = 6
API = {"service": "api", "version": "2"}


def fleet(work: int, *more):
    rows = [
        (API, [some.MAIN, some.WORK], work),
        ({"service": "db", "version": "9"}, [some.MAIN, some.MEMCPY], 100),
        *more,
    ]
    return some.build(rows, some.NAMES)


def window(first_minute: int) -> dict[str, str]:
    chosen = minutes(first_minute, first_minute + MINUTES)
    names = ("from", "until")
    return {name: str(ns // 10**6) for name, ns in zip(names, chosen, strict=True)}


NOW, BEFORE = window(WEEK_MINUTES), window(0)


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """Two hosts in two weeks: api doubles its work, a part in another version, and jobs are new."""
    folder = tmp_path_factory.mktemp("fleet")
    profiles = []
    for host in (1, 2):
        canary = ({"service": "api", "version": "3"}, [some.MAIN, some.WORK], 100 * (host == 2))
        jobs = ({"service": "jobs"}, [some.HANDLER], 50 * (host == 1))
        present = [each for each in (canary, jobs) if each[2]]
        for minute in range(MINUTES):
            place = (f"web-{host}", f"{host:016x}")
            profiles.append(at(fleet(200), minute, *place))
            profiles.append(at(fleet(350, *present), WEEK_MINUTES + minute, *place))
    with serving(directory(folder / "store", *profiles), folder) as (_, client):
        yield client


def by_service(found):
    return {row["labels"].get("service"): row for row in found["services"]}


def test_services_have_cores_hosts_versions_and_a_trend(client):
    """Of all hosts together, per second that there are data of."""
    found = client.json("fleet/services", **NOW)
    rows = by_service(found)

    assert [row["labels"]["service"] for row in found["services"]] == ["api", "db", "jobs"]
    # 800 ticks of a 99th of a second in a minute.
    assert rows["api"]["cores"] == pytest.approx(800 / 99 / 60, rel=1e-3)
    assert rows["api"]["cores_week_before"] == pytest.approx(rows["api"]["cores"] / 2)
    assert rows["jobs"]["cores_week_before"] == 0
    assert {name: row["hosts"] for name, row in rows.items()} == {"api": 2, "db": 2, "jobs": 1}
    assert [each["version"] for each in rows["api"]["versions"]] == ["2", "3"]
    assert rows["api"]["versions"][1]["cores"] == pytest.approx(rows["api"]["cores"] / 8)
    assert rows["jobs"]["versions"] == []
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1)
    assert found["cores"] == pytest.approx(sum(row["cores"] for row in rows.values()))
    assert found["week_before"]["from_ms"] == int(BEFORE["from"])
    assert found["cores_week_before"] == pytest.approx(600 / 99 / 60, rel=1e-3)


@pytest.mark.parametrize(
    ("path", "parameters", "first", "rows"),
    [
        ("services", {"sort": "growth"}, "api", 3),
        ("services", {"sort": "name", "limit": 1}, "api", 3),
        ("services", {"sort": "hosts", "query": '{service!="api"}'}, "db", 2),
        ("services", {"search": "JOB"}, "jobs", 1),
        ("services", {"search": "nobody"}, None, 0),
        ("services", {"by": "version", "search": "3"}, "api", 1),
        ("top", {"by": "service"}, "api", 6),
        ("top", {"by": "service", "search": "db"}, "db", 2),
        ("top", {"by": "service", "sort": "growth", "query": '{service!="api"}'}, "jobs", 3),
        ("top", {"by": "service", "group": "module", "query": '{service="db"}'}, "db", 1),
    ],
)
def test_rows_are_sorted_searched_and_limited(client, path, parameters, first, rows):
    """By the service, from all data; what is left out is counted."""
    found = client.json(f"fleet/{path}", **NOW, **parameters)
    shown = found["services" if path == "services" else "functions"]

    assert found["rows"] == rows
    assert len(shown) == min(rows, parameters.get("limit", 200))
    assert (shown[0]["labels"]["service"] if shown else None) == first


def test_functions_are_those_of_all_services(client):
    """As `everflame top` prints them; a module is the sum of its functions."""
    functions = client.json("fleet/top", **NOW)
    modules = client.json("fleet/top", group="module", **NOW)

    first = functions["functions"][0]
    assert first["labels"] == {}
    assert first["function"] == "clamp"
    assert first["total_ns"] == first["self_ns"]
    assert first["cores_week_before"] == pytest.approx(first["cores"] / 2)
    assert sum(each["self_ns"] for each in functions["functions"]) == functions["cpu_ns"]
    assert sum(each["self_ns"] for each in modules["functions"]) == functions["cpu_ns"]
    assert {each["function"] for each in modules["functions"]} == {""}
    assert modules["functions"][0]["total_ns"] is None


def test_the_trend_can_be_left_out_and_asked_for_later(client):
    """The rest is the same."""
    plain = client.json("fleet/services", trend="0", **NOW)
    found = client.json("fleet/services", **NOW)

    assert {row["cores_week_before"] for row in plain["services"]} == {None}
    assert (plain["week_before"], plain["cores_week_before"]) == (None, None)
    assert [row["cores"] for row in plain["services"]] == [
        row["cores"] for row in found["services"]
    ]


def test_without_a_week_before_there_is_no_trend(client):
    found = client.json("fleet/services", sort="growth", **BEFORE)

    assert found["week_before"] is None
    assert [row["labels"]["service"] for row in found["services"]] == ["api", "db"]


def test_a_window_without_data_says_where_they_are(client):
    for path in ("services", "top"):
        found = client.json(f"fleet/{path}", **window(300))

        assert found["rows"] == 0
        assert found["cores"] == 0
        assert found["empty"]["reason"] == "no_data_in_range"
        assert len(found["empty"]["nearest"]) == 2
