"""Verdicts of deployments over HTTP: computed in the background, kept by what was compared."""

import time
from pathlib import Path

import numpy as np
import pytest

from profiler.comparison import deployment_verdicts
from profiler.comparison.deployment_verdicts import MOST_JUDGED, DeploymentVerdicts
from profiler.comparison.deployments import deployments_in
from profiler.service.verdicts import BackgroundVerdicts
from profiler.times import rfc3339
from storage.objects.directory import DirectoryStore
from storage.objects.tenant import TenantStore
from storage.query.query import Query
from storage.selector import EMPTY
from tests.support.deployments import (
    ALL,
    HOSTILE,
    MINUTES,
    NEW_AT,
    SHOWN_HOSTILE,
    calm_minutes,
    fill,
    minute_of,
)
from tests.support.live import wait_for
from tests.support.services import Client, service
from tests.support.stores import minutes, put

TIMES = {"from": rfc3339(ALL.start_ns), "until": rfc3339(ALL.end_ns)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verdicts")
    fill(folder / "store")
    return folder


def ready(client: Client, **more: str) -> dict[str, dict]:
    """Ask until no verdict is pending; return the deployments by service."""
    found: list[dict] = []

    def is_ready() -> bool:
        found[:] = client.json("deployments", **(TIMES | more))["deployments"]
        return not any(each["pending"] for each in found)

    wait_for(is_ready, 60)
    return {each["service"]: each for each in found}


def test_an_answer_does_not_wait_for_verdicts_and_has_them_later(folder):
    """First they are pending, then each has its word and what explains it."""
    with service(folder) as (_, client):
        first = client.json("deployments", **TIMES)["deployments"]
        found = ready(client)

    comparable = [each for each in first if each["compare"]]
    assert {each["service"] for each in comparable} == {"slower", "faster", "calm"}
    assert all(each["pending"] and each["verdict"] is None for each in comparable)
    assert {name: each["verdict"] for name, each in found.items()} == {
        "slower": "regression",
        "faster": "improvement",
        "calm": "unchanged",
        "fresh": None,
    }
    slow, new = found["slower"]["functions"]
    assert (slow["function"], slow["change"]) == ("parse", "more")
    assert 0.4 < slow["growth"] < 0.8
    assert (new["function"], new["change"], new["growth"]) == (SHOWN_HOSTILE, "new", None)
    assert HOSTILE != SHOWN_HOSTILE
    (fast,) = found["faster"]["functions"]
    assert fast["growth"] < -0.4
    assert found["calm"]["functions"] == []
    assert not any(each["provisional"] for each in found.values())


def test_without_a_verdict_there_is_a_reason(folder):
    """That of the windows that cannot be compared."""
    with service(folder) as (_, client):
        fresh = ready(client)["fresh"]

    assert fresh["verdict"] is None
    assert fresh["verdict_reason"] == fresh["compare_reason"] != ""


def test_a_verdict_is_that_of_the_comparison_when_it_is_opened(folder):
    """The same windows over /api/v1/diff."""
    with service(folder) as (_, client):
        for each in ready(client).values():
            if each["compare"] is None:
                continue
            before, after = each["compare"]["before"], each["compare"]["after"]
            opened = client.json(
                "diff",
                query=after["query"],
                **{"from": after["from_ms"], "until": after["until_ms"]},
                before_query=before["query"],
                before_from=before["from_ms"],
                before_until=before["until_ms"],
            )
            assert opened["verdict"] == each["verdict"]


def compared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the services that are compared from now on, one by one."""
    services: list[str] = []
    of_store = deployment_verdicts.of_store

    def noted(query, before, after, changes_ns):
        services.append(str(after.selector))
        return of_store(query, before, after, changes_ns)

    monkeypatch.setattr(deployment_verdicts, "of_store", noted)
    return services


@pytest.fixture
def own(folder, tmp_path):
    """A store of one's own, its query, and what finds its deployments."""
    rng = np.random.default_rng(3)
    store = DirectoryStore(tmp_path / "store")
    for number in range(NEW_AT + 8):
        put(store, minute_of(rng, number))
    tenant = TenantStore(store)
    query = Query(tenant, tmp_path / "cache")
    return store, tenant, query, rng


def test_a_verdict_is_kept_by_the_objects_of_its_windows(own, monkeypatch):
    """Nothing is compared twice; a late object of a window makes another verdict."""
    store, tenant, query, rng = own
    services = compared(monkeypatch)
    verdicts = DeploymentVerdicts(tenant, query)
    found = deployments_in(tenant, query, ALL, EMPTY)
    pairs = list(zip(found.deployments, found.matches, strict=True))

    first = [verdicts.of(each.service, match) for each, match in pairs]
    again = [verdicts.of(each.service, match) for each, match in pairs]

    assert again == first
    assert len(services) == len(set(services)) == sum(m.before is not None for _, m in pairs)
    put(store, minute_of(rng, NEW_AT + 5, host=1))
    assert [verdicts.of(each.service, match).word for each, match in pairs] == [
        each.word for each in first
    ]
    assert len(services) == 2 * len(set(services))


def test_a_verdict_stays_while_that_of_longer_windows_is_computed(own):
    """It is shown and pending, so that whoever asks does not see it vanish."""
    store, tenant, query, rng = own
    background = BackgroundVerdicts(DeploymentVerdicts(tenant, query), lambda: False)

    def asked():
        found = deployments_in(tenant, query, ALL, EMPTY)
        return {
            each.service: verdict
            for each, verdict in zip(found.deployments, background.of(found), strict=True)
        }

    asked()
    wait_for(lambda: asked()["slower"].word == "regression" and not asked()["slower"].is_pending)
    for number in range(NEW_AT + 8, MINUTES):
        put(store, minute_of(rng, number))
    longer = asked()["slower"]
    background.end()

    assert (longer.word, longer.is_pending) == ("regression", True)
    assert background.wait(20)


def test_the_newest_deployments_are_compared_first_and_only_so_many(tmp_path, monkeypatch):
    """Older ones say so."""
    rng = np.random.default_rng(5)
    store = DirectoryStore(tmp_path / "store")
    for profile in calm_minutes(rng, versions=MOST_JUDGED + 3):
        put(store, profile)
    tenant = TenantStore(store)
    query = Query(tenant, tmp_path / "cache")
    found = deployments_in(tenant, query, minutes(0, 600), EMPTY)
    services = compared(monkeypatch)
    background = BackgroundVerdicts(DeploymentVerdicts(tenant, query), lambda: False)

    wait_for(lambda: not any(each.is_pending for each in background.of(found)))

    verdicts = background.of(found)
    assert len(verdicts) == MOST_JUDGED + 2
    assert [each.reason for each in verdicts[MOST_JUDGED:]] == [
        f"only the newest {MOST_JUDGED} deployments of a time range are compared"
    ] * 2
    versions = [int(each.rpartition('version="')[2].rstrip('"}')) for each in services]
    assert versions == sorted(versions, reverse=True)
    assert background.wait(20)


def test_a_comparison_that_takes_too_long_is_given_up(own):
    """With a reason; the others follow."""
    _, tenant, query, _ = own
    background = BackgroundVerdicts(DeploymentVerdicts(tenant, query), lambda: False, limit_s=0)
    found = deployments_in(tenant, query, ALL, EMPTY)

    wait_for(lambda: not any(each.is_pending for each in background.of(found)))

    reasons = {each.reason for each in background.of(found)}
    assert "the comparison took longer than 0 s" in reasons


def test_the_end_of_the_service_does_not_wait_for_verdicts(folder, tmp_path):
    """One that is asked to end in the middle of it ends at once, without an error."""
    with service(folder, f"--cache={tmp_path / 'fresh'}") as (process, client):
        client.json("deployments", **TIMES)
        begun_s = time.monotonic()
        process.terminate()
        assert process.wait(20) == 0
        assert time.monotonic() - begun_s < 15
