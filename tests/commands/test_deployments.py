"""Deployments: found in what ran where, announced by pipelines, listed by command and service."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiler.commands import ls
from profiler.commands.selection import Selection
from profiler.comparison.announcements import Announcement, announce, list_announcements
from profiler.comparison.deployments import deployments_in
from profiler.comparison.rollouts import (
    PAUSE_NS,
    Deployment,
    DeploymentKind,
    DeploymentSource,
    Instance,
    Sightings,
    find_deployments,
    merge_announcements,
)
from profiler.times import rfc3339
from storage.objects.directory import DirectoryStore
from storage.objects.keys import content16
from storage.objects.open import open_store
from storage.objects.tenant import TenantStore
from storage.profile import ALWAYS, Profile, make_labels
from storage.query.query import Query
from storage.selector import Selector
from tests.support import profiles as some
from tests.support.deployments import ALL, SHOWN_HOSTILE, fill
from tests.support.live import wait_for
from tests.support.services import service
from tests.support.stores import MINUTE_NS, START_NS, at, directory, minutes
from tests.support.weed import BUCKET, Weed, using_keys

PAUSE = PAUSE_NS // MINUTE_NS
LONG = 3 * PAUSE
"""Minutes that are far longer than a rollout."""


def sightings(*lines: str, service_of: str = "api") -> Sightings:
    """Read lines such as `web-1  1*10 -*3 1+2 2*5`: the versions of a host, window by window."""
    numbers: dict[Instance, int] = {}
    rows = []
    for line in lines:
        host, *steps = line.split()
        minute = 0
        for step in steps:
            versions, _, times = step.partition("*")
            for _ in range(int(times or 1)):
                for version in versions.split("+"):
                    if version != "-":
                        instance = Instance(service_of, version, host)
                        number = numbers.setdefault(instance, len(numbers))
                        window = minutes(minute, minute + 1)
                        rows.append((window.start_ns, window.end_ns, number))
                minute += 1
    return Sightings(tuple(numbers), np.array(rows, np.int64).reshape(-1, 3))


def minute(at_ns: int) -> float:
    return (at_ns - START_NS) / MINUTE_NS


def found(*lines: str) -> list[tuple[object, ...]]:
    """Return (kind, previous, version, first, last, settled, hosts, hosts before) of each."""
    return [
        (
            str(each.kind), each.previous, each.version,
            minute(each.first_ns), minute(each.last_ns), minute(each.settled_ns),
            " ".join(each.hosts), " ".join(each.hosts_before),
        )
        for each in find_deployments(sightings(*lines))
    ]  # fmt: skip


def test_a_new_version_is_a_deployment():
    """It begins with the first window that has it and settles two windows after that."""
    assert found("a 1*10 2*10") == [("rollout", "1", "2", 10, 11, 13, "a", "")]


def test_a_window_with_both_versions_is_the_one_in_which_the_host_changed():
    """The first window without the old version is the one after it."""
    assert found("a 1*10 1+2 2*10") == [("rollout", "1", "2", 10, 11, 13, "a", "")]


def test_the_version_before_may_take_a_while_to_end():
    """A host has changed when it runs the new version alone."""
    assert found("a 1*10 1+2*4 2*10") == [("rollout", "1", "2", 10, 14, 16, "a", "")]


def test_a_rollout_lasts_until_the_last_host_has_changed():
    """Hosts change one after the other."""
    assert found("a 1*10 2*40", "b 1*15 2*35", "c 1*31 2*19") == [
        ("rollout", "1", "2", 10, 32, 34, "a b c", "")
    ]


def test_an_earlier_version_that_comes_back_is_a_rollback():
    """A deployment of its own."""
    assert found("a 1*10 2*8 1*10") == [
        ("rollout", "1", "2", 10, 11, 13, "a", ""),
        ("rollback", "2", "1", 18, 19, 21, "a", ""),
    ]


def test_a_version_that_comes_again_after_a_rollback_is_another_rollout():
    """However soon that is."""
    assert [each[0] for each in found("a 1*10 2*8 1*4 2*10", "b 1*20 2*20")] == [
        "rollout", "rollback", "rollout",
    ]  # fmt: skip


def test_a_rollback_ends_the_rollout_to_what_is_left():
    """Hosts that change after it belong to the next deployment of that version."""
    first, back, again = found("a 1*10 2*5 1*5 2*20", "b 1*22 2*20")

    assert first[6:] == ("a", "b")
    assert back[6] == "a"
    assert again[3:5] + again[6:] == (20, 23, "a b", "")


def test_a_canary_runs_beside_the_version_before_for_longer_than_a_rollout():
    """It names who runs which version."""
    rest = f"1*{10 + LONG}"

    assert found(f"a 1*10 2*{LONG}", f"b {rest}", f"c {rest}") == [
        ("canary", "1", "2", 10, 11, 13, "a", "b c")
    ]


def test_side_by_side_for_as_long_as_a_rollout_is_none_yet():
    """Nobody knows how it goes on; the hosts are named all the same."""
    rest = f"1*{10 + PAUSE}"

    assert found(f"a 1*10 2*{PAUSE}", f"b {rest}")[0][0::6] == ("rollout", "a")


def test_what_is_taken_back_soon_is_no_canary():
    """The other host stays on its version, but side by side they were for minutes."""
    assert [each[0] for each in found(f"a 1*10 2*8 1*{LONG}", f"b 1*{LONG + 18}")] == [
        "rollout", "rollback",
    ]  # fmt: skip


def test_a_host_with_both_versions_at_the_end_of_the_data_has_not_ended_the_first():
    """It is among those that still run it."""
    assert found("a 1*10 1+2*5") == [("rollout", "1", "2", 10, 11, 13, "a", "a")]


def test_a_canary_may_run_on_the_host_of_the_version_before():
    """Two processes of one service: the host has both."""
    assert found(f"a 1*10 1+2*{LONG}") == [("canary", "1", "2", 10, 11, 13, "a", "a")]


def test_a_canary_that_ends_is_a_rollback_of_its_host():
    """The others have not changed."""
    assert found(f"a 1*10 2*{LONG} 1*10", f"b 1*{LONG + 20}")[1] == (
        "rollback", "2", "1", 10 + LONG, 11 + LONG, 13 + LONG, "a", "",
    )  # fmt: skip


def test_a_canary_that_is_taken_on_is_followed_by_a_rollout():
    """Of the hosts that had stayed."""
    lines = [f"a 1*10 2*{LONG + 10}", *(f"{host} 1*{10 + LONG} 2*10" for host in "bc")]

    assert found(*lines) == [
        ("canary", "1", "2", 10, 11, 13, "a", "b c"),
        ("rollout", "1", "2", 10 + LONG, 11 + LONG, 13 + LONG, "b c", ""),
    ]


def test_a_version_of_one_window_is_none():
    """Neither is what comes back after it a rollback."""
    assert found("a 1*10 2 1*10", "b 1*10 1+2 1*10") == []
    assert found("a 1*10 2 3*10") == [("rollout", "1", "3", 11, 12, 14, "a", "")]
    assert len(found("a 1*10 2*2 1*10")) == 2


@pytest.mark.parametrize("gap", [1, 5, LONG])
def test_time_off_is_no_change(gap):
    """Whatever its length; a version that is new after it is one."""
    assert found(f"a 1*10 -*{gap} 1*10", f"b 1*{20 + gap}") == []
    assert found(f"a 1*10 -*{gap} 2*10") == [
        ("rollout", "1", "2", 10 + gap, 11 + gap, 13 + gap, "a", "")
    ]


def test_a_restart_with_the_same_version_is_none():
    """Also beside a process of another version that goes on."""
    assert found("a 1*10 - 1*5 -*2 1*5") == []
    assert len(found(f"a 1*10 1+2*{LONG} 1*4 1+2*9")) == 1


def test_a_new_host_with_the_version_of_today_is_none():
    """Also when the rollout to it is just over."""
    assert found("a 1*40", "b -*20 1*20") == []
    assert found("a 1*10 2*30", "b -*20 2*20")[0][6] == "a"


def test_new_hosts_with_a_new_version_are_a_deployment():
    """The old ones go, as where hosts are never changed but replaced."""
    assert found("a 1*11", "b 1*13", "c -*10 2*30", "d -*12 2*30") == [
        ("rollout", "1", "2", 10, 13, 15, "c d", "")
    ]


def test_what_was_there_from_the_beginning_is_none():
    """Nothing is known of what was there before; agents begin one after the other."""
    assert found("a 1*10", "b 2*10", "c - 3*10") == []


def test_services_are_looked_at_one_by_one():
    """A version of one is no change of another."""
    api, jobs = sightings("a 1*10 2*10"), sightings("a 2*12 3*8", service_of="jobs")
    rows = np.add(jobs.rows, [0, 0, len(api.instances)])
    both = Sightings((*api.instances, *jobs.instances), np.concatenate([rows, api.rows]))

    assert [(each.service, each.version) for each in find_deployments(both)] == [
        ("api", "2"), ("jobs", "3"),
    ]  # fmt: skip


hosts_over_time = st.lists(
    st.lists(
        st.tuples(st.sampled_from(["1", "2", "3", "-", "1+2", "2+3"]), st.integers(1, 50)),
        min_size=1,
        max_size=6,
    ),
    min_size=1,
    max_size=5,
).map(lambda hosts: [" ".join(f"{v}*{n}" for v, n in steps) for steps in hosts])


@given(hosts_over_time, st.randoms(use_true_random=False))
def test_the_order_of_objects_does_not_matter(hosts, random_):
    """Nor how often one is there, nor a shorter one beside it."""
    seen = sightings(*(f"host-{i} {steps}" for i, steps in enumerate(hosts)))
    order, numbers = list(range(len(seen.rows))), list(range(len(seen.instances)))
    random_.shuffle(order)
    random_.shuffle(numbers)
    instances = tuple(seen.instances[each] for each in np.argsort(numbers))
    rows = seen.rows[order]
    if len(rows):
        rows[:, 2] = np.array(numbers)[rows[:, 2]]
    shorter = rows[:9] - [0, MINUTE_NS // 2, 0]
    shuffled = Sightings(instances, np.concatenate([shorter, rows, rows[:3]]))

    assert find_deployments(shuffled) == find_deployments(seen)


@given(hosts_over_time, st.randoms(use_true_random=False))
def test_the_names_of_hosts_do_not_matter(hosts, random_):
    """Renamed hosts give the same deployments, with the other names."""
    names = [f"host-{i}" for i in range(len(hosts))]
    others = names.copy()
    random_.shuffle(others)
    renamed = dict(zip(names, others, strict=True))

    def swap(deployment: Deployment) -> Deployment:
        return dataclasses.replace(
            deployment,
            hosts=tuple(sorted(renamed[host] for host in deployment.hosts)),
            hosts_before=tuple(sorted(renamed[host] for host in deployment.hosts_before)),
        )

    def key(deployment: Deployment) -> str:
        return repr(deployment)

    one = find_deployments(sightings(*map(" ".join, zip(names, hosts, strict=True))))
    other = find_deployments(sightings(*map(" ".join, zip(others, hosts, strict=True))))

    assert sorted(map(swap, one), key=key) == sorted(other, key=key)


@given(hosts_over_time)
def test_every_deployment_is_one_of_hosts_that_ran_both_versions_or_are_new(hosts):
    """Times are in order, the version before is another one, hosts are named once."""
    seen = sightings(*(f"host-{i} {steps}" for i, steps in enumerate(hosts)))

    for each in find_deployments(seen):
        ran = {(i.host, i.version) for i in seen.instances}
        assert START_NS < each.first_ns < each.last_ns < each.settled_ns
        assert each.version != each.previous
        assert each.hosts
        assert {(host, each.version) for host in each.hosts} <= ran
        assert len({*each.hosts}) == len(each.hosts)


def rollout(first: float, last: float, version: str = "2") -> Deployment:
    first_ns, last_ns = (int(START_NS + each * MINUTE_NS) for each in (first, last))
    settled_ns = last_ns + 2 * MINUTE_NS
    return Deployment("api", version, "1", first_ns, last_ns, settled_ns, ("a",), ())


def said(at_minute: float, version: str = "2", service_of: str = "api") -> Announcement:
    return Announcement(service_of, version, int(START_NS + at_minute * MINUTE_NS))


@pytest.mark.parametrize(("at_minute", "first"), [(10.5, 10.5), (9.2, 9.2), (20, 10), (12, 10)])
def test_an_announcement_gives_the_exact_begin(at_minute, first):
    """Unless it came after the first window of the version: that began without it."""
    (merged,) = merge_announcements([rollout(10, 15)], [said(at_minute)])

    assert minute(merged.first_ns) == first
    assert (merged.source, merged.hosts, minute(merged.last_ns)) == (
        DeploymentSource.ANNOUNCED,
        ("a",),
        15,
    )


@pytest.mark.parametrize(
    "alone", [said(10, "3"), said(10, service_of="jobs"), said(10 + 3 * PAUSE), said(-PAUSE)]
)
def test_an_announcement_of_something_else_stands_alone(alone):
    """Another service, another version, or far away."""
    merged = merge_announcements([rollout(10, 15)], [alone])

    assert [each.source for each in merged].count(DeploymentSource.FOUND) == 1
    (told,) = [each for each in merged if each.source is DeploymentSource.ANNOUNCED]
    assert (told.service, told.version, told.first_ns) == alone
    assert (told.hosts, told.previous, told.kind) == ((), "", DeploymentKind.ROLLOUT)


def test_what_is_announced_repeatedly_is_one_deployment():
    """The first time counts."""
    merged = merge_announcements([rollout(10, 15)], [said(10.7), said(10.2)])
    assert [minute(each.first_ns) for each in merged] == [10.2]

    merged = merge_announcements([], [said(4), said(2), said(2 + 3 * PAUSE)])
    assert [minute(each.first_ns) for each in merged] == [2, 2 + 3 * PAUSE]


def test_an_announcement_belongs_to_the_nearest_deployment():
    """A version may come twice within a short time."""
    first, second = merge_announcements([rollout(10, 12), rollout(30, 32)], [said(30.4)])

    assert (first.source, second.source) == (DeploymentSource.FOUND, DeploymentSource.ANNOUNCED)


def running(version: str, at_minute: int, host: int = 1, service_of: str = "api") -> Profile:
    """Make an object in which a service was there but never sampled."""
    profile = some.build([({"service": "other"}, [some.MAIN], 1)])
    labels = {"service": service_of, "pod": f"p{host}"} | ({"version": version} if version else {})
    accounting = dataclasses.replace(
        profile.accounting, services={make_labels(labels): 60_000_000_000}
    )
    moved = dataclasses.replace(profile, accounting=accounting)
    return at(moved, at_minute, f"web-{host}", f"{host:016x}")


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> Path:
    """A folder with a store and the cache of what was read of it.

    Two hosts over 80 minutes: version 1, from minute 70 on 2; jobs has no version.
    """
    folder = tmp_path_factory.mktemp("filled")
    profiles = [
        running("1" if each < 70 else "2", each, host)
        for host in (1, 2)
        for each in range(40, 80, 2)
    ]
    jobs = [running("", each, 3, "jobs") for each in range(40, 80, 4)]
    directory(folder / "store", *profiles, *jobs)
    return folder


@pytest.fixture
def store(filled, monkeypatch) -> DirectoryStore:
    """The store that all tests read."""
    monkeypatch.setenv("EVERFLAME_CACHE", str(filled / "cache"))
    monkeypatch.delenv("EVERFLAME_STORE", raising=False)
    return DirectoryStore(filled / "store")


@pytest.fixture
def own_store(filled, tmp_path, monkeypatch) -> DirectoryStore:
    """A copy for a test that writes, with a cache of its own."""
    monkeypatch.setenv("EVERFLAME_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("EVERFLAME_STORE", raising=False)
    return DirectoryStore(shutil.copytree(filled / "store", tmp_path / "store"))


def asked(store, selector: str = "", window=None):
    query = Query(TenantStore(store), Path(os.environ["EVERFLAME_CACHE"]))
    parsed = Selector.parse(selector)
    return deployments_in(TenantStore(store), query, window or minutes(60, 80), parsed)


def test_deployments_are_found_in_a_store(store):
    """In services that were there, sampled or not."""
    (one,) = asked(store).deployments

    assert (one.service, one.previous, one.version) == ("api", "1", "2")
    assert (minute(one.first_ns), minute(one.last_ns), minute(one.settled_ns)) == (70, 71, 73)
    assert one.hosts == ("web-1", "web-2")


def test_what_was_there_before_the_window_is_looked_at(store):
    """Else nothing at its beginning would be new; what began outside is not in it."""
    assert len(asked(store, window=minutes(70, 71)).deployments) == 1
    assert asked(store, window=minutes(71, 80)).deployments == ()
    assert asked(store, window=minutes(40, 70)).deployments == ()


@pytest.mark.parametrize(
    ("selector", "hosts"),
    [
        ('{service="api"}', ("web-1", "web-2")),
        ('{version="2"}', ("web-1", "web-2")),
        ('{service=~"a.*",version!="1"}', ("web-1", "web-2")),
        ('{host="web-2"}', ("web-2",)),
        ('{pod="p1"}', ("web-1",)),
        ('{version="1"}', None),
        ('{service="jobs"}', None),
    ],
)
def test_a_selector_says_which(store, selector, hosts):
    """A version is that of the deployment: the one before it is needed to find it."""
    found_hosts = [each.hosts for each in asked(store, selector).deployments]

    assert found_hosts == ([] if hosts is None else [hosts])


@pytest.mark.parametrize(
    ("selector", "window", "reason"),
    [
        ("", None, ""),
        ("", minutes(40, 60), "no_change"),
        ('{service="jobs"}', None, "no_versions"),
        ('{service="none"}', None, "nothing_matches"),
        ('{host="none"}', None, "nothing_matches"),
        ("", minutes(500, 600), "no_data_in_range"),
        ("", minutes(85, 90), "no_data_in_range"),
    ],
)
def test_there_is_a_reason_for_none(store, selector, window, reason):
    """Which of them people are told."""
    assert asked(store, selector, window).reason == reason


def test_an_announcement_is_read_back(own_store):
    """Saying it again changes nothing; another time is another announcement."""
    names = [announce(TenantStore(own_store), "api", "2", START_NS + 5)] * 2
    names.append(announce(TenantStore(own_store), "api", "2", START_NS + 5))
    announce(TenantStore(own_store), "api", "2", START_NS - 1)

    assert list_announcements(TenantStore(own_store), minutes(0, 1)).announcements == names[:1]
    assert list_announcements(TenantStore(own_store), minutes(-1, 1)).announcements == [
        ("api", "2", START_NS - 1), ("api", "2", START_NS + 5),
    ]  # fmt: skip
    assert list_announcements(TenantStore(own_store), minutes(-1, 1)).skipped == []


@pytest.mark.parametrize("at_ns", [0, START_NS, 2**63 - 1])
def test_announcements_of_any_time_are_found(tmp_path, at_ns):
    """At the begin of a month, of time, and at its end."""
    store = DirectoryStore(tmp_path)
    announce(TenantStore(store), "api", "2", at_ns)

    assert len(list_announcements(TenantStore(store), ALWAYS).announcements) == (
        at_ns < ALWAYS.end_ns
    )


def test_an_announcement_makes_a_found_deployment_exact(own_store):
    """And one of a service without versions stands alone."""
    announce(TenantStore(own_store), "api", "2", START_NS + 70 * MINUTE_NS + 12 * 10**9)
    announce(TenantStore(own_store), "jobs", "7", START_NS + 75 * MINUTE_NS)

    jobs, api = asked(own_store).deployments

    assert (jobs.service, jobs.source, jobs.hosts) == ("jobs", "announced", ())
    assert (api.source, minute(api.first_ns), api.hosts) == ("announced", 70.2, ("web-1", "web-2"))
    assert [each.version for each in asked(own_store, '{service="jobs"}').deployments] == ["7"]
    assert [each.version for each in asked(own_store, '{host="web-3"}').deployments] == ["7"]
    assert [each.version for each in asked(own_store, '{host="web-1"}').deployments] == ["2"]


def test_announcements_disturb_nothing_else(own_store, capfd):
    """Neither listings nor what is deleted when it is old."""
    before = [key for key, _ in TenantStore(own_store).list_window(ALWAYS)]
    selection = Selection.parse(str(own_store.root))
    listed = ls.list_hosts(selection).as_json()

    announce(TenantStore(own_store), "api", "2", START_NS)

    assert [key for key, _ in TenantStore(own_store).list_window(ALWAYS)] == before
    assert ls.list_hosts(selection).as_json() == listed
    done = everflame("verify", f"--store={own_store.root}", "--json")
    assert json.loads(done.stdout)["unreadable"] == []
    assert len(list(TenantStore(own_store).expire(START_NS // 10**9 + 10**6, 60, 0))) == len(before)
    assert [each.key.split("/")[2] for each in own_store.list("")] == ["deployments"]


HOSTILE = {
    b"?": "not JSON",
    b"[1]": "not a JSON object",
    b'{"schema":2}': "later version",
    b'{"schema":1,"service":"api","version":2,"at_ns":5}': "no service, version and at_ns",
    b'{"schema":1,"service":"api","version":"2","at_ns":true}': "no service, version and at_ns",
    b'{"schema":1,"service":"","version":"2","at_ns":5}': "is empty",
    b'{"schema":1,"service":"api","version":"2","at_ns":-5}': "not a time",
    b'{"schema":1,"service":"\\u001b[31m","version":"2","at_ns":5}': "not safe",
    b'{"schema":1,"service":"api","version":"%s","at_ns":5}' % (b"v" * 999): "too long",
    b'{"schema":1,"service":"api","version":"2","at_ns":99}': "another service or time",
    b" " * 100_000: "longer than",
    b"[" * 10_000: "not JSON",
}


@pytest.mark.parametrize(("content", "reason"), HOSTILE.items())
def test_a_hostile_announcement_is_named_and_passed_over(own_store, content, reason):
    """With why; what else was announced is there."""
    month = rfc3339(START_NS)[:7]
    key = f"v1/default/deployments/{month}/{'a' * 16}-{START_NS // 10**6}-{content16(content)}.json"
    own_store.put(key, content)
    announce(TenantStore(own_store), "jobs", "7", START_NS)

    told = list_announcements(TenantStore(own_store), minutes(0, 1))

    assert [each.service for each in told.announcements] == ["jobs"]
    assert [skipped.key for skipped in told.skipped] == [key]
    assert reason in told.skipped[0].reason
    assert (key, told.skipped[0].reason) in asked(own_store, window=minutes(0, 1)).skipped


def test_a_damaged_or_foreign_object_is_named_and_passed_over(own_store):
    """Cut short, or under a key that no announcement has."""
    announce(TenantStore(own_store), "api", "2", START_NS)
    (stored,) = own_store.list("v1/default/deployments/")
    path = own_store.root / stored.key
    path.write_bytes(path.read_bytes()[:-9])
    month = rfc3339(START_NS)[:7]
    own_store.put(f"v1/default/deployments/{month}/readme.txt", b"hello")

    told = list_announcements(TenantStore(own_store), minutes(0, 1))

    assert told.announcements == []
    assert {skipped.key: skipped.reason.partition(":")[0] for skipped in told.skipped} == {
        stored.key: "its content is not what its key says",
        f"v1/default/deployments/{month}/readme.txt": "its key is not that of an announcement",
    }


@given(st.text(min_size=1, max_size=2000), st.text(min_size=1, max_size=2000))
def test_any_name_can_be_announced(tmp_path_factory, name, version):
    """It is made safe to show, and read back."""
    if not name.strip() or not version.strip():
        return
    store = DirectoryStore(tmp_path_factory.mktemp("store"))

    told = announce(TenantStore(store), name, version, START_NS)

    assert list_announcements(TenantStore(store), minutes(0, 1)) == ([told], [])
    assert (told.service + told.version).isprintable()


def test_announcements_lie_in_a_bucket_too(weed: Weed, tmp_path):
    """A real S3 server: put, and found by month."""
    with using_keys():
        store = open_store(f"s3://{BUCKET}/{tmp_path.name}", weed.endpoint)
        for month in range(3):
            announce(TenantStore(store), "api", str(month), START_NS + month * 31 * 86400 * 10**9)

        told = list_announcements(TenantStore(store), minutes(31 * 1440 - 1, 31 * 1440 + 1))

        assert [each.version for each in told.announcements] == ["1"]
        assert told.skipped == []
        assert list(TenantStore(store).list_window(ALWAYS)) == []


def everflame(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).with_name("everflame"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def listed(store, *arguments: str) -> subprocess.CompletedProcess[str]:
    window = minutes(60, 80)
    times = (f"--from={rfc3339(window.start_ns)}", f"--until={rfc3339(window.end_ns)}")
    return everflame("deployments", f"--store={store.root}", *times, *arguments)


def test_the_command_prints_a_table(own_store):
    """For people: newest first, with who stayed."""
    at_text = rfc3339(START_NS + 75 * MINUTE_NS)
    told = everflame(
        "deployments", f"--store={own_store.root}", "add",
        "--service=jobs", "--version=7", f"--at={at_text}",
    )  # fmt: skip

    done = listed(own_store)

    assert (told.returncode, told.stdout) == (0, "")
    assert told.stderr == f"announced jobs 7 at {at_text} in {own_store.root}\n"
    assert (done.returncode, done.stderr) == (0, "")
    head, jobs, _, api, _ = [line.split() for line in done.stdout.splitlines()]
    assert head == [
        "BEGAN", "SETTLED", "SERVICE", "VERSION", "BEFORE", "KIND", "HOSTS", "SOURCE", "VERDICT",
    ]  # fmt: skip
    assert jobs[2:] == ["jobs", "7", "-", "rollout", "-", "announced", "-"]
    assert api == [
        rfc3339(START_NS + 70 * MINUTE_NS), rfc3339(START_NS + 73 * MINUTE_NS),
        "api", "2", "1", "rollout", "2", "found", "-",
    ]  # fmt: skip


def test_the_command_prints_json(store):
    """In Unix ms, for other programs."""
    answer = json.loads(listed(store, "--json", "--no-verdicts", "-q", '{service="api"}').stdout)

    (deployment,) = answer.pop("deployments")
    compare = deployment.pop("compare")
    assert compare["before"]["query"] == '{service="api",version="1"}'
    assert compare["before"]["until_ms"] == deployment["first_ms"]
    assert compare["after"]["from_ms"] == deployment["settled_ms"]
    lengths = {side["until_ms"] - side["from_ms"] for side in compare.values()}
    assert len(lengths) == 1
    assert deployment == {
        "compare_reason": "",
        "service": "api",
        "version": "2",
        "previous": "1",
        "first_ms": (START_NS + 70 * MINUTE_NS) // 10**6,
        "last_ms": (START_NS + 71 * MINUTE_NS) // 10**6,
        "settled_ms": (START_NS + 73 * MINUTE_NS) // 10**6,
        "hosts": ["web-1", "web-2"],
        "hosts_before": [],
        "kind": "rollout",
        "source": "found",
    }
    assert (answer["schema"], answer["skipped"]) == (1, [])
    assert answer["query"] == '{service="api"}'


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["-q", '{service="jobs"}'], 0, "the version of jobs is not known; a version is read"),
        (["-q", '{service="none"}'], 2, 'nothing selected: no service from'),
        (["--until", "now"], 0, ""),
        (["--from", "now-1h", "--until", "now"], 2, "the nearest data are from"),
        (["--until", rfc3339(START_NS + 69 * MINUTE_NS)], 0, "the version of api, jobs did"),
        (["--from", "yesterday"], 2, "is not a time"),
        (["add", "--service", "a", "--version", "1"], 2, "remove --from"),
        (["add", "--service", "a"], 2, "--version"),
        (["remove"], 2, "remove"),
    ],
)  # fmt: skip
def test_the_command_says_why_there_is_nothing(store, arguments, code, message):
    """And exits as everything here: 0 fine, 2 usage or nothing selected."""
    done = listed(store, *arguments)

    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("name", "at_text", "message"),
    [(" ", "now", "the name of the service is empty"), ("a", "soon", "time")],
)
def test_what_cannot_be_announced_is_said(tmp_path, name, at_text, message):
    """Nothing is written."""
    store = DirectoryStore(tmp_path / "store")

    done = everflame(
        "deployments", "add", "--service", name, "--version=1", "--at", at_text,
        f"--store={store.root}",
    )  # fmt: skip

    assert done.returncode == 2
    assert message in done.stderr
    assert list(store.list("")) == []


def test_the_service_answers_and_says_why_there_is_nothing(own_store, tmp_path):
    """The same over HTTP; parameters that it does not know are errors."""
    announce(TenantStore(own_store), "jobs", "7", START_NS + 75 * MINUTE_NS)
    (own_store.root / "v1/default/deployments" / rfc3339(START_NS)[:7] / "x").write_bytes(b"?")
    times = {"from": rfc3339(minutes(60, 80).start_ns), "until": rfc3339(minutes(60, 80).end_ns)}
    with service(tmp_path) as (_, client):
        answer: dict = {}

        def is_ready() -> bool:
            answer.update(client.json("deployments", **times))
            return not any(each["pending"] for each in answer["deployments"])

        wait_for(is_ready)
        none = client.json("deployments", query='{service="none"}', **times)
        recent = client.json("deployments")
        status, _, body = client.get("/api/v1/deployments", by="service")

    told = json.loads(listed(own_store, "--json").stdout)
    assert answer.pop("deployments") == told["deployments"]
    assert [each["service"] for each in told["deployments"]] == ["jobs", "api"]
    assert answer["empty"] is None
    assert answer["rest"] == 0
    assert [each["reason"] for each in answer["skipped"]] == [
        "its key is not that of an announcement"
    ]
    assert none["empty"] == {"reason": "nothing_matches", "services": []}
    assert recent["empty"]["reason"] == "no_data_in_range"
    assert (status, json.loads(body)["parameter"]) == (400, "by")


@pytest.fixture(scope="module")
def judged(tmp_path_factory) -> DirectoryStore:
    """A store of services that became slower, became faster and stayed as they were."""
    return fill(tmp_path_factory.mktemp("judged") / "store")


def of_all(store, *arguments: str) -> subprocess.CompletedProcess[str]:
    times = (f"--from={rfc3339(ALL.start_ns)}", f"--until={rfc3339(ALL.end_ns)}")
    return everflame("deployments", f"--store={store.root}", *times, *arguments)


def test_the_command_prints_verdicts(judged, tmp_path, monkeypatch):
    """Each deployment's, with the functions that explain it, or why there is none."""
    monkeypatch.setenv("EVERFLAME_CACHE", str(tmp_path / "cache"))

    done = of_all(judged)

    assert (done.returncode, done.stderr) == (0, "")
    _, fresh, why, slower, parse, new, faster, less, calm = done.stdout.splitlines()
    assert [line.split()[-1] for line in (fresh, slower, faster, calm)] == [
        "-", "regression", "improvement", "unchanged",
    ]  # fmt: skip
    assert "not comparable: it has settled only at" in why
    assert re.fullmatch(r"    parse \(\[python\]\) \+[56]\d%", parse)
    assert new.startswith(f"    {SHOWN_HOSTILE}"[:40])
    assert new.endswith(" new")
    assert re.fullmatch(r"    parse \(\[python\]\) -[45]\d%", less)


def test_the_command_prints_verdicts_as_json(judged, tmp_path, monkeypatch):
    """Under the names that the service uses."""
    monkeypatch.setenv("EVERFLAME_CACHE", str(tmp_path / "cache"))

    (found,) = json.loads(of_all(judged, "--json", "-q", '{service="slower"}').stdout)[
        "deployments"
    ]

    assert (found["verdict"], found["provisional"], found["pending"]) == (
        "regression",
        False,
        False,
    )
    assert [each["function"] for each in found["functions"]] == ["parse", SHOWN_HOSTILE]
    assert found["verdict_reason"] == ""


def test_verdicts_can_be_left_out(judged, tmp_path, monkeypatch):
    """Then nothing is compared."""
    monkeypatch.setenv("EVERFLAME_CACHE", str(tmp_path / "cache"))

    done = of_all(judged, "--no-verdicts")

    assert len(done.stdout.splitlines()) == 5
    assert "VERDICT" not in done.stdout
    for each in json.loads(of_all(judged, "--no-verdicts", "--json").stdout)["deployments"]:
        assert "verdict" not in each
