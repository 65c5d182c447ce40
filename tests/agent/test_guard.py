"""A stage that fails: it is counted, logged once, run less often, and taken up again."""

import logging

import pytest

from profiler.agent.guard import FIRST_PAUSE_S, LONGEST_PAUSE_S, Guard


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Stage:
    """Fails as long as it is broken, and counts its runs."""

    def __init__(self) -> None:
        self.runs = 0
        self.is_broken = True

    def __call__(self) -> None:
        self.runs += 1
        if self.is_broken:
            raise RuntimeError("no such map")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def stage() -> Stage:
    return Stage()


def test_one_fault_is_no_reason_to_pause(clock, stage):
    guard = Guard("drain", monotonic_s=clock)

    assert not guard.run(stage)
    assert not guard.is_paused


def test_a_stage_that_goes_on_failing_is_run_ever_less_often(clock, stage):
    """Ten minutes of turns, ten a second: some thirty runs."""
    guard = Guard("drain", monotonic_s=clock)
    for _ in range(6000):
        guard.run(stage)
        clock.now_s += 0.1

    assert stage.runs == guard.faults
    assert 600 / LONGEST_PAUSE_S <= stage.runs <= 600 / LONGEST_PAUSE_S + 10
    assert guard.resumes_s - clock.now_s <= LONGEST_PAUSE_S


def test_a_stage_that_works_again_is_run_at_every_turn(clock, stage):
    guard = Guard("drain", monotonic_s=clock)
    guard.run(stage)
    guard.run(stage)
    stage.is_broken = False
    clock.now_s += FIRST_PAUSE_S

    assert guard.run(stage)
    assert guard.run(stage)
    assert guard.faults == 2


def test_the_same_fault_is_logged_with_its_count_and_one_traceback(clock, stage, caplog):
    guard = Guard("drain", longest_pause_s=0, monotonic_s=clock)
    with caplog.at_level(logging.ERROR):
        for _ in range(1000):
            guard.run(stage)

    assert len([record for record in caplog.records if record.exc_info]) == 1
    assert len(caplog.records) == 10  # 1, 2, 4 … 512
    assert "times=512" in caplog.records[-1].getMessage()
    assert guard.faults == stage.runs == 1000
