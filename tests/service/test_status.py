"""Status and readiness over large and slow stores: few keys are listed, few objects are read."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from storage.formats import pprof
from storage.objects.directory import DirectoryStore
from storage.objects.keys import ObjectKey, StoredObject
from storage.objects.tenant import TenantStore
from tests.support.live import wait_for
from tests.support.services import profile_of, serving
from tests.support.stores import START_NS, CountingStore, MemoryStore, at, minutes

OBJECTS = 20_000
EACH_S = 600
MINUTES = 300
"""Objects of each of 35 hosts."""


class SlowStore(MemoryStore):
    """A store that takes its time for each listing, and for each key."""

    def __init__(self, listing_s: float) -> None:
        super().__init__()
        self.listing_s = listing_s

    def list(self, prefix: str, start_after: str = "") -> Iterator[StoredObject]:
        time.sleep(self.listing_s)
        for stored in super().list(prefix, start_after):
            time.sleep(self.listing_s / 200)
            yield stored


def fill(store: MemoryStore) -> int:
    """Store a profile that ends last, and many keys before it; return when the first starts."""
    TenantStore(store).put_profile(profile_of(1), b"x")
    start_s = START_NS // 10**9
    for i in range(OBJECTS):
        key = ObjectKey("default", "00112233445566aa", start_s - (i + 1) * EACH_S, 60, "0" * 16)
        store.put(key.text, b"")
    store.listed = 0
    return start_s - OBJECTS * EACH_S


def fill_host(folder: Path, name: str, host_id: str) -> str:
    """Store one profile as those of some hours, by links; return the newest key."""
    profile = at(profile_of(0), 0, name, host_id)
    key, _ = TenantStore(DirectoryStore(folder)).put_profile(profile, pprof.encode(profile))
    for minute in range(1, MINUTES):
        earlier = folder / key._replace(start_s=key.start_s - 60 * minute).text
        earlier.parent.mkdir(parents=True, exist_ok=True)
        os.link(folder / key.text, earlier)
    return key.text


def test_status_and_readiness_list_few_keys_of_a_large_store(tmp_path):
    """Readiness one; status those of the last hour, and some to find it."""
    store = MemoryStore()
    first_s = fill(store)

    with serving(store, tmp_path) as (_, client):
        assert client.get("/readyz")[0] == 200
        assert store.listed == 1
        status = client.json("status")

    assert status["data"] == {
        "from_ms": first_s * 1000,
        "until_ms": minutes(1, 2).end_ns // 1_000_000,
    }
    assert store.listed < OBJECTS / 100


def test_status_reads_one_object_of_each_host_however_many_there_are(tmp_path):
    """Readiness reads none."""
    hosts = {f"web-{i}": f"{i:016x}" for i in range(35)}
    newest = {fill_host(tmp_path / "store", name, host_id) for name, host_id in hosts.items()}
    store = CountingStore(tmp_path / "store")

    with serving(store, tmp_path) as (_, client):
        assert client.get("/readyz")[0] == 200
        assert (store.read, store.listed) == ([], 1)
        wait_for(lambda: client.json("status")["partial"] is None)
        status = client.json("status")

    assert status["hosts"] == sorted(hosts)
    assert set(store.read) == newest


def test_nearest_data_are_found_with_few_keys_of_a_large_store(tmp_path):
    """An empty range far behind all data says where they end."""
    store = MemoryStore()
    fill(store)
    later = {"from": str(START_NS // 10**9 + 10**8), "until": str(START_NS // 10**9 + 10**8 + 60)}

    with serving(store, tmp_path) as (_, client):
        empty = client.json("flamegraph", **later)["empty"]

    assert [each["until_ms"] for each in empty["nearest"]] == [minutes(1, 2).end_ns // 1_000_000]
    assert store.listed < OBJECTS / 100


def test_a_status_ends_with_its_deadline(tmp_path):
    """The listing stops once the client has got its 504."""
    store = SlowStore(0.2)
    fill(store)

    with serving(store, tmp_path, deadline_s=0.5) as (service, client):
        code, _, body = client.get("/api/v1/status")
        began_s = time.monotonic()
        has_ended = service.end(10)

    problem = json.loads(body)
    assert (code, problem["title"]) == (504, "Took too long")
    assert problem["detail"].startswith("the store memory did not respond within 0.5 s; check")
    assert has_ended
    assert time.monotonic() - began_s < 3


def test_a_host_whose_clock_is_ahead_does_not_hide_the_others(tmp_path):
    """The hosts are those of the last hour before now that has data."""
    store = MemoryStore()
    now_minute = 100
    for minute, name in ((now_minute, "on time"), (now_minute + 6000, "ahead")):
        profile = at(profile_of(0), minute, name, f"{minute:016x}")
        TenantStore(store).put_profile(profile, pprof.encode(profile))

    with serving(store, tmp_path, now_ns=lambda: minutes(now_minute + 1, 0).start_ns) as (
        _,
        client,
    ):
        wait_for(lambda: client.json("status")["partial"] is None)
        assert client.json("status")["hosts"] == ["on time"]


def test_a_late_panel_says_what_was_asked_for_and_what_to_do(tmp_path):
    """As it was asked, so that it can be found in a log or a script."""
    store = SlowStore(0.2)
    fill(store)
    asked = {"from": "1", "until": "now", "query": '{service="api"}'}
    window = 'of {service="api"} from 1 until now'
    late = "was not ready after 0.5 s; ask again"

    with serving(store, tmp_path, deadline_s=0.5) as (_, client):

        def detail(path: str, **more: str) -> str:
            code, _, body = client.get(path, **asked, **more)
            assert code == 504, body
            return json.loads(body)["detail"]

        assert detail("/api/v1/flamegraph").startswith(f"the flame graph {window} {late}")
        values = detail("/api/v1/labels/service/values")
        assert values.startswith(f"the list of values of the label 'service' {window} {late}")
        export = detail("/api/v1/export/cpu.svg", before_from="0", before_until="1")
        assert export.startswith(f"the file cpu.svg {window} (before: from 0, until 1) {late}")
