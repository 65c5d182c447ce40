"""The service over stores of which all or a part is compacted: its responses are the same."""

import itertools
import json

from profiler.times import rfc3339
from tests.support import profiles as some
from tests.support.compacted import compact, delete, level0
from tests.support.services import serving
from tests.support.stores import START_NS, at, directory, minutes, put

WINDOWS = [(7, 133), (300, 400)]
SELECTORS = ["", '{service="api",host="web-1"}', '{service="none"}']
PANELS = {
    "flamegraph": {"by": "host,service"},
    "top": {"by": "service"},
    "fleet/services": {"by": "version"},
    "fleet/top": {"by": "service", "sort": "name"},
    "timeline": {"by": "service"},
    "deployments": {},
    "labels/service/values": {},
    "diff": {"before_from": rfc3339(START_NS), "before_until": rfc3339(minutes(0, 60).end_ns)},
    "export/cpu.folded": {},
}


def profiles():
    """Two hosts for three hours; a version is deployed in between, on one after the other."""
    for host, minute in itertools.product((1, 2), range(0, 180, 12)):
        version = "1.1" if minute > 60 + 12 * host else "1.0"
        api = {"service": "api", "version": version, "comm": "api"}
        jobs = {"service": "jobs", "comm": "jobs"}
        rows = [
            (api, [some.MAIN, some.WORK], minute % 7 + 3),
            (jobs, [some.HANDLER, some.named(f"job_{minute % 3}")], 2),
        ]
        names = some.NAMES if minute % 24 else {}
        yield at(some.build(rows, names), minute, f"web-{host}", f"{host:016x}")


def responses(client):
    """Return what each panel responds, without the order of lines of a file."""
    for (first, last), query in itertools.product(WINDOWS, SELECTORS):
        start, end = (rfc3339(minutes(each, each).start_ns) for each in (first, last))
        for path, parameters in PANELS.items():
            asked = {"from": start, "until": end, "query": query, **parameters}
            status, _, body = client.get(f"/api/v1/{path}", **asked)
            assert status in {200, 404}
            is_json = body.startswith(b"{")
            yield path, asked, json.loads(body) if is_json else sorted(body.splitlines())


def test_responses_are_those_of_the_objects(tmp_path):
    """All panels and the status, with level 0 deleted and with half of it never compacted."""
    every = list(profiles())
    stores = {name: directory(tmp_path / name) for name in ("plain", "whole", "half")}
    for name, store in stores.items():
        for profile in every[:: 2 if name == "half" else 1]:
            put(store, profile)
        if name != "plain":
            compact(store, tmp_path / f"work-{name}", has_rollups=name == "whole")
            delete(store, level0(store))
    for profile in every[1::2]:
        put(stores["half"], profile)

    found = {}
    for name, store in stores.items():
        folder = tmp_path / f"cache-{name}"
        with serving(store, folder, now_ns=lambda: minutes(0, 181).end_ns) as (_, client):
            found[name] = [("status", {}, client.json("status")), *responses(client)]
            assert client.get("/metrics")[0] == 200

    assert found["plain"][0][2]["hosts"] == ["web-1", "web-2"]
    for compacted, plain in itertools.product((found["whole"], found["half"]), [found["plain"]]):
        for one, other in zip(compacted, plain, strict=True):
            assert one == other
