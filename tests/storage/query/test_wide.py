"""Wide windows: other processes read them, and the answer is the same to the last row."""

import multiprocessing
import os
import threading
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from pathlib import Path

import pytest

from storage.objects.directory import DirectoryStore
from storage.objects.tenant import TenantStore
from storage.profile import Window
from storage.query import blocks, wide
from storage.query.query import Query
from storage.query.readers import Asked
from storage.query.workers import Place, start_workers
from storage.selector import EMPTY, Selector
from tests.support import wide_stores
from tests.support.compaction import Inline
from tests.support.wide_stores import BEFORE, DAY, OBJECTS, RAGGED, answers

pytestmark = pytest.mark.timeout(300)  # each has processes start, and asks for all there is

WHOLE = Window(BEFORE.start_ns, DAY.end_ns)


@pytest.fixture(autouse=True)
def _few_are_many(monkeypatch) -> None:
    monkeypatch.setattr(wide, "LEAST_OBJECTS", 40)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> DirectoryStore:
    folder = tmp_path_factory.mktemp("wide")
    return wide_stores.fill(folder / "store", folder / "work")


@pytest.fixture(scope="module")
def processes():
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as executor:
        executor.submit(os.getpid).result()
        yield executor


class Elsewhere(Executor):
    """Has another executor do the work in a folder of its own, as a machine of its own would."""

    def __init__(self, executor: Executor, folder: Path, store: DirectoryStore | None = None):
        self.executor = executor
        self.folder = folder
        self.store = store
        self.acts: list[str] = []
        self.has_sent_names = False

    def submit(self, act, /, place: Place, *things, **more):
        self.acts.append(act.__name__)
        self.has_sent_names |= any(isinstance(each, Asked) and bool(each.names) for each in things)
        place = place._replace(folder=self.folder, store=self.store or place.store)
        return self.executor.submit(act, place, *things, **more)


def ask(store: DirectoryStore, folder: Path, executor: Executor | None = None) -> Query:
    return Query(TenantStore(store), folder, executor=executor)


@pytest.mark.parametrize("selector", wide_stores.SELECTORS, ids=str)
def test_other_processes_find_what_this_one_does(store, processes, tmp_path, selector):
    """In days summed up, hours compacted, level 0 and a damaged object; then it is all kept."""
    expected = answers(ask(store, tmp_path / "here"), RAGGED, selector)
    elsewhere = Elsewhere(processes, tmp_path / "there")

    assert answers(ask(store, tmp_path / "cache", elsewhere), RAGGED, selector) == expected

    assert elsewhere.acts
    assert elsewhere.has_sent_names or "pid" in selector.names
    elsewhere.acts.clear()
    assert answers(ask(store, tmp_path / "cache", elsewhere), RAGGED, selector) == expected
    assert elsewhere.acts == []


@pytest.mark.parametrize("selector", wide_stores.SELECTORS[1:3], ids=str)
def test_large_hours_are_read_by_day_or_by_hour(store, processes, tmp_path, monkeypatch, selector):
    """As those of a fleet: rollups or detail, as the whole window's size and labels say."""
    monkeypatch.setattr(blocks, "_MANY_ROWS", -1)
    expected = answers(ask(store, tmp_path / "here"), WHOLE, selector)
    elsewhere = Elsewhere(processes, tmp_path / "there")

    assert answers(ask(store, tmp_path / "cache", elsewhere), WHOLE, selector) == expected

    assert "read_hours" in elsewhere.acts


def test_the_damage_of_one_hour_is_what_it_is_here(tmp_path, processes, monkeypatch):
    """It is named, and the other hours of the day are read one by one."""
    monkeypatch.setattr(blocks, "_MANY_ROWS", -1)
    store = wide_stores.fill(tmp_path / "store", tmp_path / "work")
    for path in store.root.rglob("*-samples_1d-*.parquet"):
        path.write_bytes(b"damaged")
    damaged = sorted(store.root.rglob("02-samples_1h-*.parquet"))
    assert damaged
    damaged[0].write_bytes(b"damaged")
    expected = answers(ask(store, tmp_path / "here"), WHOLE, EMPTY)
    elsewhere = Elsewhere(processes, tmp_path / "there")

    assert answers(ask(store, tmp_path / "cache", elsewhere), WHOLE, EMPTY) == expected

    (_, coverage), (_, rolled_up) = (
        expected[f"profile {labels}"] for labels in (None, frozenset({"service"}))
    )
    assert len(rolled_up.skipped) > len(coverage.skipped)


def test_few_objects_are_read_here(store, tmp_path):
    """To hand them out takes longer."""
    elsewhere = Elsewhere(Inline(), tmp_path / "there")
    hour = Window(DAY.start_ns + 180 * 60 * 10**9, DAY.start_ns + 240 * 60 * 10**9)

    answers(ask(store, tmp_path / "cache", elsewhere), hour, EMPTY)

    assert elsewhere.acts == []


def test_what_workers_cannot_read_is_read_here(store, tmp_path):
    """As where one has no credentials, or sees another folder: nothing is missing."""
    expected = answers(ask(store, tmp_path / "here"), DAY, EMPTY)
    apart = Elsewhere(Inline(), tmp_path / "there", DirectoryStore(tmp_path / "empty"))

    assert answers(ask(store, tmp_path / "cache", apart), DAY, EMPTY) == expected

    assert apart.acts


def test_killed_workers_cost_only_time(store, tmp_path):
    """What they had in their hands is read here, and what is left if there are none."""
    expected = answers(ask(store, tmp_path / "here"), DAY, EMPTY)
    workers = start_workers(2)
    try:
        query = ask(store, tmp_path / "cache", Elsewhere(workers, tmp_path / "there"))
        killed = threading.Event()

        def kill(_objects: int) -> None:
            if not killed.is_set():
                killed.set()
                for process in multiprocessing.active_children():
                    process.kill()

        assert answers(query.watched(kill), DAY, EMPTY) == expected
        assert killed.is_set()
        assert workers.counts.pools_lost
    finally:
        workers.shutdown()


class Never(Executor):
    """Takes work and does none, as a cluster whose workers have all gone."""

    def __init__(self) -> None:
        self.futures: list[Future] = []

    def submit(self, act, /, *things, **more):  # noqa: ARG002
        self.futures.append(Future())
        return self.futures[-1]


class StoppedError(Exception):
    pass


def test_a_request_ends_while_workers_read_for_it(store, tmp_path):
    """Work that nobody waits for any more is cancelled."""
    never = Never()

    def check() -> None:
        if len(never.futures) > 3:
            raise StoppedError

    query = ask(store, tmp_path / "cache", never).interruptible(check)

    with pytest.raises(StoppedError):
        query.profile(DAY, Selector.parse('{service="api"}'))

    assert never.futures
    assert all(future.cancelled() for future in never.futures)


def test_progress_counts_what_workers_have_read(store, processes, tmp_path):
    """Each object once, and the end of each reading."""
    counted: list[int] = []
    elsewhere = Elsewhere(processes, tmp_path / "there")

    ask(store, tmp_path / "cache", elsewhere).watched(counted.append).profile(DAY)

    assert sum(counted) == OBJECTS
    assert counted[-1] == 0
