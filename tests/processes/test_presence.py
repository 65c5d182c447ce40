"""The union of intervals, against counting every ns."""

from hypothesis import given
from hypothesis import strategies as st

from profiler.processes import presence as module
from profiler.processes.presence import Presence

MS = 1_000_000
moments = st.integers(0, 60).map(lambda ms: ms * 2 * MS)  # apart from one another, or the same
intervals = st.tuples(moments, moments).map(lambda pair: (min(pair), max(pair)))


def covered_ms(spans: list[tuple[int, int]], start_ns: int, end_ns: int) -> int:
    milliseconds = {ms for start, end in spans for ms in range(start // MS, end // MS)}
    return sum(start_ns <= ms * MS < end_ns for ms in milliseconds)


@given(st.lists(intervals, max_size=8), st.lists(intervals, max_size=8), intervals)
def test_present_time_is_the_union_of_intervals(
    counted: list[tuple[int, int]], opened: list[tuple[int, int]], window: tuple[int, int]
) -> None:
    """However they overlap, and in whatever order they are seen."""
    presence = Presence()
    for start_ns, end_ns in counted:
        presence.add(start_ns, end_ns)
    events = [(start_ns, 1) for start_ns, _ in opened] + [(end_ns, -1) for _, end_ns in opened]
    for at_ns, change in sorted(events, key=lambda event: (event[0], -event[1])):
        presence.open(at_ns) if change > 0 else presence.close(at_ns)

    assert presence.within(*window) == covered_ms(counted + opened, *window) * MS


def test_open_life_lasts_to_the_end_of_the_window() -> None:
    """What has not been seen to end goes on."""
    presence = Presence()
    presence.open(10)

    assert presence.within(0, 100) == 90
    assert presence.within(0, 5) == 0


def test_life_seen_late_reaches_back() -> None:
    """An older process may be found after a younger one."""
    presence = Presence()
    presence.open(50)
    presence.open(10)

    assert presence.within(0, 100) == 90


def test_past_is_forgotten() -> None:
    """Windows are asked for in their order, so nobody asks for it again."""
    presence = Presence()
    presence.add(0, 10)
    presence.forget(10)

    assert presence.is_empty


def test_intervals_are_bounded() -> None:
    """Intervals far apart from one another and never asked for take bounded memory."""
    presence = Presence()
    for number in range(module._MAX_INTERVALS * 2):
        presence.add(number * 10 * MS, number * 10 * MS + 1)

    assert len(presence) <= module._MAX_INTERVALS


def test_intervals_that_overlap_are_joined_before_any_is_forgotten() -> None:
    """A thousand short processes a second, beside one that runs for an hour and is gone as well."""
    presence = Presence()
    presence.add(0, 3_600_000_000_000)

    for number in range(module._MAX_INTERVALS * 2):
        presence.add(number * 5_000_000, number * 5_000_000 + 1_000)

    assert presence.within(0, 3_600_000_000_000) == 3_600_000_000_000


def test_short_gaps_are_no_presence() -> None:
    """A thousand processes a second that run for a tenth of the time."""
    presence = Presence()
    for number in range(60_000):
        presence.add(number * MS, number * MS + MS // 10)

    assert presence.within(0, 60_000 * MS) == 6_000 * MS


def test_of_too_many_intervals_the_nearest_are_joined() -> None:
    """None is forgotten, and what lies far apart stays apart."""
    presence = Presence()
    for number in range(module._MAX_INTERVALS):
        presence.add(number * 10, number * 10 + 9)
    far_ns = module._MAX_INTERVALS * 10 + 3600 * 1000 * MS
    presence.add(far_ns, far_ns + 1)

    assert len(presence) < module._MAX_INTERVALS
    assert presence.within(0, far_ns + 1) == module._MAX_INTERVALS * 10 - 1 + 1
