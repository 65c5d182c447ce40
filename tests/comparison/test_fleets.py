"""Comparisons of fleets: read from series by groups of hosts, they judge as those of hosts do."""

import dataclasses
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest

from profiler.comparison import comparison, report, sides
from profiler.comparison.comparison import Comparison
from profiler.comparison.gate import Gate, verdict_of
from profiler.comparison.sides import Operand
from profiler.comparison.verdict import NoiseSource
from storage.blocks.functions import FUNCTIONS_1H, GROUPS_1H
from storage.blocks.schema import DETAIL
from storage.objects.directory import DirectoryStore
from storage.objects.keys import DEFAULT_TENANT, NS_PER_S
from storage.objects.tenant import TenantStore
from storage.objects.tenant_key import KEY_BYTES
from storage.profile import Host, Profile, Window
from storage.query import function_series
from storage.query.query import Query
from storage.selector import Selector
from tests.support import profiles as some
from tests.support.compacted import compact, delete, level0
from tests.support.stores import put

HOSTS, FUNCTIONS, HOURS = 14, 20, 16
API = Selector.parse('{service="api"}')
START_S = 20_000 * 86_400
RATES = 3000 / np.arange(1, FUNCTIONS + 1)


def window(first: int, last: int) -> Window:
    """Return hours of the day as a window."""
    return Window((START_S + 3600 * first) * NS_PER_S, (START_S + 3600 * last) * NS_PER_S)


def hour_of_host(rng: np.random.Generator, hour: int, host: int, factor: float) -> Profile:
    """Half an hour of a service whose functions vary by 5 %, on hosts of different sizes."""
    rates = (1 + host % 3) * RATES * np.exp(rng.normal(0, 0.05, FUNCTIONS))
    rates[3] *= factor
    labels = {"service": "api", "version": "1"}
    stacks = [
        (labels, [some.named("main"), some.named(f"function_{i}")], int(samples))
        for i, samples in enumerate(rng.poisson(rates))
    ]
    start_ns = window(hour, hour + 1).start_ns + 600 * NS_PER_S
    made = some.build(stacks, window=Window(start_ns, start_ns + 1800 * NS_PER_S))
    accounting = dataclasses.replace(
        made.accounting,
        hosts=(Host(f"web-{host}", f"{host:016x}"),),
        services={some.make_labels(labels): 1800 * NS_PER_S},
    )
    return dataclasses.replace(made, accounting=accounting)


CHANGES_NS = [window(1, 2).start_ns]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[DirectoryStore, DirectoryStore]:
    """Return a fleet's store without compaction, and one in which all is compacted."""
    folder = tmp_path_factory.mktemp("stores")
    plain, compacted = DirectoryStore(folder / "plain"), DirectoryStore(folder / "compacted")
    rng = np.random.default_rng(7)
    for store in (plain, compacted):
        store.put(f"v1/{DEFAULT_TENANT}/key", b"k" * KEY_BYTES)
    for hour in range(HOURS):
        for host in range(HOSTS):
            made = hour_of_host(rng, hour, host, 1.5 if hour in (1, HOURS - 1) else 1.0)
            for store in (plain, compacted):
                put(store, made)
    compact(compacted, folder / "work", has_rollups=True)
    delete(compacted, level0(compacted))
    return plain, compacted


def compared(
    stores: tuple[DirectoryStore, DirectoryStore], folder: Path, *asked: Operand
) -> tuple[Comparison, Comparison]:
    """Return a comparison of both stores."""
    one, other = (
        comparison.of_store(Query(TenantStore(each), folder / each.root.name), *asked, CHANGES_NS)
        for each in stores
    )
    return one, other


class OpenedFiles(DirectoryStore):
    """A directory that notes which files of blocks are opened."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.opened: list[str] = []

    def open(self, key: str) -> AbstractContextManager[BinaryIO]:
        self.opened.append(key)
        return super().open(key)


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a store of a few hosts be one of a fleet."""
    monkeypatch.setattr(function_series, "_MANY_ROWS", 0)
    monkeypatch.setattr(sides, "_MOST_ALONE", 8)


@pytest.mark.usefixtures("fleet")
@pytest.mark.parametrize(
    ("first", "source"), [(0, NoiseSource.GROUPS), (HOURS - 2, NoiseSource.HISTORY)]
)
def test_groups_of_hosts_judge_as_hosts_do(stores, tmp_path, first, source):
    """What changed is found, nothing else is, and costs and cores are those of all hosts."""
    asked = Operand(API, window(first, first + 1)), Operand(API, window(first + 1, first + 2))

    by_host, by_group = compared(stores, tmp_path, *asked)

    assert by_group.source is source
    if source is NoiseSource.GROUPS:
        assert (by_host.source, by_host.positions) == (NoiseSource.HOSTS, HOSTS)
        assert 8 <= by_group.positions < HOSTS
    else:
        assert by_group.positions == by_host.positions
    costs = [
        {each.frame: (each.self, each.total, each.change) for each in found.functions}
        for found in (by_host, by_group)
    ]
    assert costs[0] == costs[1]
    changed = {each.frame.function for each in comparison.changed(by_group.functions)}
    assert changed == {"function_3"}
    for one, other in ((by_host.before, by_group.before), (by_host.after, by_group.after)):
        assert one.hosts == other.hosts
        assert one.cores == pytest.approx(other.cores)
        assert one.coverage.accounting == other.coverage.accounting


@pytest.mark.usefixtures("fleet")
def test_a_fleet_is_compared_without_its_stacks(stores, tmp_path):
    """Series are read, and what is known of objects; also where there are no data."""
    store = OpenedFiles(stores[1].root)
    asked = Operand(API, window(0, 1)), Operand(API, window(1, 2))

    comparison.of_store(Query(TenantStore(store), tmp_path / "cache"), *asked, CHANGES_NS)

    tables = {key.rsplit("/", 1)[1].split("-")[1] for key in store.opened}
    assert {FUNCTIONS_1H, GROUPS_1H} <= tables
    assert tables.isdisjoint({DETAIL, "samples_10m", "stacks", "frames"})


@pytest.mark.usefixtures("fleet")
def test_a_report_says_that_hosts_are_compared_in_groups(stores, tmp_path):
    """How many groups tell the noise; the sides still name how many hosts they have."""
    asked = Operand(API, window(0, 1)), Operand(API, window(1, 2))
    _, found = compared(stores, tmp_path, *asked)
    gate = Gate.parse("relative>=10%")

    text = report.as_text(found, verdict_of(found, gate), gate)

    assert f"differences between {found.positions} groups of hosts" in text
    assert f"{HOSTS} hosts" in text
