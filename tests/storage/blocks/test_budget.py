"""Memory budget: pieces of work that would take too much together run one after the other."""

import multiprocessing
import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest

from storage.blocks.budget import FOLD_BYTES, MemoryBudget, budget_of, expected_bytes
from storage.blocks.merges import roll_up
from storage.blocks.retention import Keep
from storage.blocks.rounds import Rounds
from storage.blocks.work import fold_objects
from storage.objects.directory import DirectoryStore
from storage.objects.tenant import TenantStore
from tests.support.compaction import (
    DAY_START_S,
    HOUR_S,
    Expected,
    compactor_of,
    hour_manifests,
    profile,
    read_store,
)

WITHIN_S = 30.0


def test_a_piece_waits_until_there_is_memory_and_its_turn_has_come():
    """A small one that would fit does not overtake a large one, which would wait for ever."""
    budget = MemoryBudget(100)
    order = []

    def run(size_bytes):
        with budget.taking(size_bytes):
            order.append(size_bytes)

    held = budget.take(50)
    waiting = []
    for count, size_bytes in enumerate((80, 20), 1):
        waiting.append(threading.Thread(target=run, args=(size_bytes,)))
        waiting[-1].start()
        while len(budget._waiting) < count:
            waiting[-1].join(0.001)
    assert not order
    budget.give_back(held)
    for each in waiting:
        each.join(WITHIN_S)

    assert order == [80, 20]
    assert budget.take(100) == 100


def test_a_piece_larger_than_all_runs_alone_and_frees_all_after_an_error():
    budget = MemoryBudget(100)

    def fail():
        with budget.taking(1000):
            assert budget._taken_bytes == 100
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert budget.take(100) == 100
    assert MemoryBudget().take(1000) == 0


@pytest.mark.parametrize("total_bytes", [100, None])
def test_no_work_begins_after_the_end(total_bytes):
    """Neither what waits nor what comes later."""
    budget = MemoryBudget(total_bytes)
    held = budget.take(60)
    with ThreadPoolExecutor(1) as pool:
        if total_bytes is not None:
            waiting = pool.submit(budget.take, 60)
            while not budget._waiting:
                threading.Event().wait(0.001)
        budget.end()
        if total_bytes is not None:
            assert isinstance(waiting.exception(WITHIN_S), CancelledError)
    budget.give_back(held)
    with pytest.raises(CancelledError):
        budget.take(1)


def test_an_interrupted_round_begins_no_further_work(tmp_path):
    """It does not do all of the hours that have begun first; what was done is kept."""
    store, budget = DirectoryStore(tmp_path / "store"), MemoryBudget()
    expected = Expected(store)
    for hour in range(3):
        expected.put(profile(DAY_START_S + hour * HOUR_S))

    def interrupt(line):
        assert "folded" in line
        raise KeyboardInterrupt

    def make(type_):
        now_s = DAY_START_S + 5 * HOUR_S
        folder = tmp_path / "work"
        return compactor_of(store, folder, now_s, type_=type_, budget=budget, tell=interrupt)

    with pytest.raises(KeyboardInterrupt):
        Rounds(TenantStore(store), tmp_path / "work", make, Keep.of({})).run_once()
    with pytest.raises(CancelledError):
        budget.take(1)
    assert hour_manifests(store)
    assert read_store(expected) == expected.total


@pytest.mark.parametrize("workers", [1, 2, 4, 64])
def test_large_work_of_any_number_of_workers_fits_in_what_all_may_take(workers):
    """DuckDB has what arrays leave to it; a small hour takes little, so several run at once."""
    most = 512 << 20
    budget = budget_of(1_000_000_000, workers)
    for read_bytes in (1 << 10, 1 << 20, 24 << 20, 200 << 20, 2 << 30):
        engine_bytes = budget.engine_bytes(read_bytes, most)
        assert 128 << 20 <= engine_bytes <= most
        if workers <= 4:
            assert expected_bytes(read_bytes, engine_bytes) <= budget.total_bytes
    assert budget.total_bytes >= min(workers, 2 if workers <= 4 else 1) * FOLD_BYTES
    assert 4 * expected_bytes(1 << 20, most) < budget_of(1_000_000_000, 4).total_bytes
    assert MemoryBudget().engine_bytes(2 << 30, most) == most


class Foldless(ThreadPoolExecutor):
    """Does nothing but fold."""

    def submit(self, act, /, *things, **more):
        assert act is fold_objects
        return super().submit(act, *things, **more)


def test_large_work_is_done_by_a_process_that_ends_after_it(tmp_path, monkeypatch):
    """A worker would keep much of its memory."""
    monkeypatch.setattr("storage.blocks.budget._APART_BYTES", 0)
    store = DirectoryStore(tmp_path / "store")
    expected = Expected(store)
    expected.put(profile(DAY_START_S))
    compactor = compactor_of(store, tmp_path, DAY_START_S + 2 * HOUR_S, budget=MemoryBudget(1))
    (hour,) = compactor.occupied_hours()
    before = set(multiprocessing.active_children())
    with Foldless() as compactor._executor:
        compactor.fold(hour)
        assert roll_up(compactor, hour)

    assert not MemoryBudget().is_apart(1 << 40)
    assert set(multiprocessing.active_children()) <= before
    assert read_store(expected) == expected.total


class Crowded(ThreadPoolExecutor):
    """Notes how many pieces of work there are at once; each waits a little for a second one."""

    def __init__(self):
        super().__init__(4)
        self.most = self._now = 0
        self._counted = threading.Condition()

    def submit(self, act, /, *things, **more):
        def count_and_act():
            with self._counted:
                self._now += 1
                self.most = max(self.most, self._now)
                self._counted.notify_all()
                self._counted.wait_for(lambda: self.most > 1, 0.2)
            try:
                return act(*things, **more)
            finally:
                with self._counted:
                    self._now -= 1

        return super().submit(count_and_act)


@pytest.mark.parametrize(("budget_bytes", "is_crowded"), [(1 << 20, False), (None, True)])
def test_compactors_hand_out_work_as_memory_permits(tmp_path, budget_bytes, is_crowded):
    """Folding, merging, rolling up and days; several hours at once only if there is enough."""
    store = DirectoryStore(tmp_path / "store")
    expected = Expected(store)
    for hour in range(3):
        expected.put(profile(DAY_START_S + hour * HOUR_S))
    budget = MemoryBudget(budget_bytes)
    with Crowded() as executor:

        def make(type_):
            compactor = compactor_of(store, tmp_path, DAY_START_S + 5 * HOUR_S, type_=type_)
            compactor._executor, compactor._budget = executor, budget
            return compactor

        keep = Keep.of({"level0": 1e9, "detail": 1e9, "10m": 1e9, "1h": 1e9, "1d": 1e9})
        report = Rounds(TenantStore(store), tmp_path, make, keep, hours_at_once=3).run_once()

    assert not report.problems
    assert report["objects"] == report["hourly"] == 3
    assert report["daily"] == 1
    assert (executor.most > 1) == is_crowded
    assert budget._taken_bytes == 0
    assert all(hour["hourly"] for hour in hour_manifests(store).values())
    assert read_store(expected) == expected.total
