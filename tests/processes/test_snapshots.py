"""How often what a process has mapped is read again."""

from profiler.processes.snapshots import Doubts

S = 1_000_000_000


def test_a_process_that_always_seems_wrong_is_looked_at_less_and_less_often() -> None:
    doubts = Doubts()

    looks = [second for second in range(300) if doubts.is_due(7, 0, second * S)]

    assert looks == [0, 1, 3, 7, 15, 31, 63, 123, 183, 243]


def test_a_process_does_not_wait_for_another_that_had_its_pid() -> None:
    doubts = Doubts()
    for second in range(100):
        doubts.is_due(7, 0, second * S)

    assert not doubts.is_due(7, 0, 100 * S)
    assert doubts.is_due(7, 100 * S, 100 * S)
