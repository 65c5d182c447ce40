"""What a window counts, how busy CPUs were in it, and how a drain that came late is divided."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bpf.sampler import SamplerConfig
from bpf.samples import CopiedStack, Drain
from profiler.agent.recorder import Recorder
from profiler.agent.window import (
    BusyTime,
    Clocks,
    Edge,
    Edges,
    OpenWindow,
    drain_period_s,
    split_drain,
)
from storage.formats import pprof
from storage.profile import Accounting, Host, Profile
from tests.support.live import sample_of

SECOND = 1_000_000_000
HOST = Host("web-1", "00112233445566aa")
SAMPLE = sample_of(1, start_ns=7)


def stat(**idle_s: float) -> str:
    """Return a /proc/stat in which these CPUs have been idle for so long since the boot."""
    lines = [f"{cpu} 50 0 50 {round(s * 100)} 0 0 0 0 0 0" for cpu, s in idle_s.items()]
    return "\n".join(["cpu  1 2 3 4 5 6 7 8 9 10", *lines, "intr 5 1", "ctxt 6"])


def test_busy_time_is_what_passed_less_what_was_idle():
    busy = BusyTime()
    busy.add(1_000 * SECOND, stat(cpu0=400, cpu1=500))

    assert busy.add(1_010 * SECOND, stat(cpu0=402, cpu1=510)) == 8 * SECOND
    assert busy.add(1_020 * SECOND, stat(cpu0=402, cpu1=520)) == 18 * SECOND


def test_a_cpu_that_comes_online_brings_nothing_from_before():
    """It was away since the boot: only what is busy from now on counts."""
    busy = BusyTime()
    busy.add(7_000 * SECOND, stat(cpu0=400))
    before_ns = busy.add(7_001 * SECOND, stat(cpu0=401))

    assert busy.add(7_002 * SECOND, stat(cpu0=402, cpu1=3)) == before_ns == 0
    assert busy.add(7_003 * SECOND, stat(cpu0=403, cpu1=3.25)) == round(0.75 * SECOND)


def test_a_cpu_that_goes_offline_keeps_what_it_was_busy():
    busy = BusyTime()
    busy.add(7_000 * SECOND, stat(cpu0=400, cpu1=50))
    busy.add(7_001 * SECOND, stat(cpu0=401, cpu1=50))

    assert busy.add(7_002 * SECOND, stat(cpu0=402)) == SECOND
    assert busy.add(7_003 * SECOND, stat(cpu0=403, cpu1=50)) == SECOND


@pytest.mark.parametrize("idle_s", [0, 5_000])
def test_a_cpu_whose_idle_time_jumps_begins_anew(idle_s):
    """Whatever a kernel makes of a CPU that was away and back between two readings."""
    busy = BusyTime()
    busy.add(7_000 * SECOND, stat(cpu0=400, cpu1=50))

    assert busy.add(7_001 * SECOND, stat(cpu0=401, cpu1=idle_s)) == 0


@pytest.fixture
def second_cpu() -> Iterator[Path]:
    """The switch of CPU 1, which is on again afterwards whatever happens."""
    switch = Path("/sys/devices/system/cpu/cpu1/online")
    if not switch.exists():
        pytest.skip("this machine has no second CPU that can be taken offline")
    yield switch
    switch.write_text("1")


@pytest.mark.kernel
@pytest.mark.alone
def test_no_real_cpu_is_busy_for_longer_than_the_time_that_passes(second_cpu):
    """Off and on again, seen and unseen."""
    busy = BusyTime()
    busy.read()
    begun_ns = time.monotonic_ns()
    for state in ("0", "1", "0", "1"):
        second_cpu.write_text(state)
        busy.read()
    second_cpu.write_text("0")
    second_cpu.write_text("1")
    nonidle_ns = busy.read()

    assert -0.1 * SECOND < nonidle_ns <= 2 * (time.monotonic_ns() - begun_ns) + 0.1 * SECOND


@pytest.mark.kernel
def test_a_window_that_was_opened_after_its_edge_ends_when_it_is_closed(tmp_path):
    """As where the process waits for a CPU between the two; it would end before its start."""
    with Recorder(SamplerConfig(pids=frozenset()), tmp_path) as recorder:
        recorder.start()
        late = recorder.close_window(edge_at(-5))
        following = recorder.close_window()

    assert late.window.start_ns < late.window.end_ns
    assert abs(late.window.end_ns - following.window.start_ns) < SECOND // 10
    assert pprof.decode(pprof.encode(late)).window == late.window


def edge_at(seconds: float) -> Edge:
    ns = round(seconds * SECOND)
    return Edge(time.time_ns() + ns, time.monotonic_ns() + ns)


def spin(seconds: float) -> None:
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        pass


def own(profile: Profile) -> int:
    """Return the samples of this process."""
    pid = ("pid", str(os.getpid()))
    return sum(row.samples for row in profile.rows() if pid in row.labels)


def check_against_clocks(profile: Profile, hz: int) -> None:
    """Its busy ticks are those of its time, which is no longer than the window."""
    counts = profile.accounting
    expected = hz * counts.nonidle_ns / SECOND
    assert counts.profiled_ns <= profile.window.end_ns - profile.window.start_ns
    # At an edge within a drain the clocks are interpolated, but busy time does not pass evenly.
    assert abs(counts.ticks - counts.idle - expected) < 0.1 * expected + 0.3 * hz
    assert counts.mismatch == 0


@pytest.fixture(scope="module")
def started(tmp_path_factory) -> Iterator[Recorder]:
    with Recorder(SamplerConfig(frequency_hz=499), tmp_path_factory.mktemp("cache")) as recorder:
        recorder.start()
        yield recorder


@pytest.fixture
def recorder(started) -> Recorder:
    """A recorder of all processes, whose window has just begun."""
    started.close_window()
    return started


@pytest.mark.kernel
@pytest.mark.alone
def test_a_window_that_is_closed_late_ends_at_its_edge(recorder):
    """Its ticks as well: those after the edge belong to the next one."""
    edge = edge_at(1)
    recorder.split_at(edge)
    spin(0.5)
    recorder.step()
    spin(1.2)
    recorder.drain()
    recorder.drain()
    first = recorder.cut_window(edge)
    spin(0.3)
    second = recorder.close_window()

    assert first.window.end_ns == second.window.start_ns == edge.utc_ns
    assert first.accounting.profiled_ns > 0.95 * SECOND
    assert own(first) > 0
    assert own(second) > 0
    for profile in (first, second):
        check_against_clocks(profile, 499)


@pytest.mark.kernel
@pytest.mark.alone
def test_a_window_that_ends_elsewhere_keeps_what_came_after_the_edge(recorder):
    """As when it turns out that somebody has set the clock."""
    recorder.split_at(edge_at(0.3))
    spin(0.6)
    recorder.drain()
    whole = recorder.cut_window()

    assert whole.accounting.profiled_ns > 0.55 * SECOND
    check_against_clocks(whole, 499)


class StoppedRecorder(Recorder):
    """Stops for a while when it has drained and is about to read the clocks."""

    is_stopped = False

    def _clocks(self) -> Clocks:
        if self.is_stopped:
            spin(1.0)
        return super()._clocks()


@pytest.mark.kernel
@pytest.mark.alone
def test_a_pause_within_a_drain_is_in_the_window_that_has_its_ticks(tmp_path):
    with StoppedRecorder(SamplerConfig(frequency_hz=499), tmp_path) as recorder:
        recorder.start()
        spin(0.3)
        recorder.is_stopped = True
        first = recorder.close_window()
        recorder.is_stopped = False
        second = recorder.close_window()

    assert first.accounting.profiled_ns < 0.8 * SECOND
    assert second.accounting.profiled_ns > 0.9 * SECOND
    for profile in (first, second):
        check_against_clocks(profile, 499)


moments = st.integers(0, 1000)


@st.composite
def drains(draw) -> Drain:
    samples = []
    for number in draw(st.lists(st.integers(1, 50), max_size=6)):
        first_ns, last_ns = sorted((draw(moments), draw(moments)))
        if number == 1:
            last_ns = first_ns
        samples.append(SAMPLE._replace(samples=number, first_ns=first_ns, last_ns=last_ns))
    idle, filtered, full = (draw(st.integers(0, 100)) for _ in range(3))
    stored = sum(sample.samples for sample in samples)
    return Drain(samples, stored + idle + filtered + full, idle, filtered, {"map_full": full})


@pytest.mark.parametrize(("exact", "uncounted"), [(True, 0), (False, 1)])
def test_a_window_says_that_skipped_ticks_were_not_counted(exact, uncounted):
    window = OpenWindow(10_000_000, lambda: clocks(60))

    for part in split_drain(Drain([], 2, 2, 0, {}, counts_skipped=exact), [0, 500, 1001]):
        window.count(part)

    assert window.counts.uncounted == uncounted


@given(drains(), st.lists(moments, max_size=5))
def test_the_parts_of_a_drain_are_the_drain(drain, cuts):
    """Every count, the law of conservation in each part, and each sample within its part."""
    edges = [0, *sorted(cuts), 1001]

    parts = split_drain(drain, edges)

    assert len(parts) == len(edges) - 1
    assert sum(part.ticks for part in parts) == drain.ticks
    assert sum(part.idle for part in parts) == drain.idle
    assert sum(part.filtered for part in parts) == drain.filtered
    assert sum(part.lost.get("map_full", 0) for part in parts) == drain.lost["map_full"]
    for part, start_ns, end_ns in zip(parts, edges, edges[1:], strict=False):
        stored = sum(sample.samples for sample in part.samples)
        assert part.ticks == stored + part.idle + part.filtered + sum(part.lost.values())
        assert all(start_ns <= s.first_ns <= s.last_ns < end_ns for s in part.samples)


def test_samples_go_where_they_were_taken():
    early = SAMPLE._replace(samples=9, first_ns=10, last_ns=20)
    spread = SAMPLE._replace(samples=100, first_ns=50, last_ns=149)

    first, second = split_drain(Drain([early, spread], 129, 20, 0, {}), [0, 100, 200])

    assert [sample.samples for sample in first.samples] == [9, 50]
    assert [sample.samples for sample in second.samples] == [50]
    assert abs(first.ticks - second.ticks) <= 1


def test_what_a_full_map_lost_came_last():
    """Ticks come evenly: where fewer samples are, more were lost."""
    early = SAMPLE._replace(samples=100, first_ns=0, last_ns=99)

    parts = split_drain(Drain([early], 200, 0, 0, {"map_full": 100}), [0, 100, 200])

    assert [part.ticks for part in parts] == [100, 100]
    assert [part.lost for part in parts] == [{}, {"map_full": 100}]


@pytest.mark.parametrize(
    ("lasts_s", "late_s", "period_s"),
    [(9, 0, 2), (9, 6, 2), (9, 8, 1), (1.2, 0, 1.2), (1.2, 0.7, 0.5), (1.2, 60, 0.25)],
)
def test_drains_are_more_frequent_where_they_come_so_late_that_maps_fill_up(
    lasts_s, late_s, period_s
):
    assert drain_period_s(lasts_s, late_s) == pytest.approx(period_s)


@pytest.mark.parametrize(("work", "period_s"), [(0.01, 2), (0.05, 1), (0.1, 0.5), (0.9, 0.25)])
def test_drains_that_are_much_work_are_more_frequent(work, period_s):
    assert drain_period_s(9, 0, work) == pytest.approx(period_s)


def clocks(at_s: int) -> Clocks:
    return Clocks(at_s * SECOND, at_s * SECOND, at_s * SECOND, at_s * 10, at_s)


def test_two_hours_are_cut_into_equal_parts_that_can_be_kept():
    cuts = clocks(0).cuts(clocks(7200), 3598 * SECOND)

    assert cuts == [clocks(2400), clocks(4800)]
    assert clocks(0).cuts(clocks(3598), 3598 * SECOND) == []


def test_clocks_between_two_readings_are_interpolated():
    """But for the wall clock, which was set by an hour in between."""
    later = Clocks(3610 * SECOND, 10 * SECOND, 20 * SECOND, 60, 80)

    assert Clocks(0, 0, 0, 20, 40).at(later, 4 * SECOND) == Clocks(
        3604 * SECOND, 4 * SECOND, 8 * SECOND, 36, 56
    )


def test_a_window_that_is_closed_long_after_its_edge_ends_now():
    """As after SIGSTOP: the ticks since the edge are in it."""
    passed_ns = [0]
    edges = Edges(60, lambda: 120 * SECOND + passed_ns[0], lambda: passed_ns[0])
    assert edges.true_edge is None  # it is not reached

    passed_ns[0] = 61 * SECOND
    assert edges.true_edge.utc_ns == 180 * SECOND
    passed_ns[0] = 7200 * SECOND
    assert edges.true_edge is None


def test_the_ticks_of_a_window_that_was_not_stored_are_lost_in_the_next():
    window = OpenWindow(10_000_000, lambda: clocks(60))
    counts = Accounting(ticks=10, stored=4, idle=3, filtered=1, lost={"map_full": 2})

    window.take_lost(counts)

    taken = window.accounting(HOST, {})
    assert taken.mismatch == 0
    assert (taken.ticks, taken.idle, taken.filtered, taken.stored) == (10, 3, 1, 0)
    assert taken.lost == {"map_full": 2, "fault": 4}


def test_counts_need_no_clock():
    """Reading one may be what has failed."""
    readings = iter([clocks(60)])
    window = OpenWindow(10_000_000, lambda: next(readings))

    window.count(Drain([SAMPLE], SAMPLE.samples + 3, 1, 2, {}))
    window.settle()

    counts = window.counts
    assert (counts.ticks, counts.idle, counts.filtered) == (SAMPLE.samples + 3, 1, 2)
    assert counts.lost == {"fault": SAMPLE.samples}
    assert counts.mismatch == 0


@pytest.mark.parametrize(
    ("stop", "kernel_stop", "counted"),
    [
        ("root", "", "root"),
        ("root", "kernel_truncated", "kernel_truncated"),
        ("kernel_thread", "kernel_failed", "kernel_failed"),
        ("no_table", "kernel_failed", "no_table"),
    ],
)
def test_each_sample_has_one_reason(stop, kernel_stop, counted):
    """A kernel stack that is not whole counts where the user's part is."""
    window = OpenWindow(10_000_000, lambda: clocks(60))
    sample = SAMPLE._replace(samples=3, stop=stop, kernel_stop=kernel_stop)

    window.count(Drain([sample], 3, 0, 0, {}))
    window.add(sample, np.zeros(0, np.int32), ())

    assert window.accounting(HOST, {}).stops == {counted: 3}


def copied_at(*moments_ns: int) -> list[CopiedStack]:
    none = np.zeros(0, np.uint64)
    samples = (SAMPLE._replace(samples=1, first_ns=ns, last_ns=ns) for ns in moments_ns)
    return [CopiedStack(sample, none, 0, False, 0, none, 0, False) for sample in samples]


def test_copied_stacks_go_where_they_were_taken():
    """They are ticks like others: what is lost or idle fills up what lacks beside them."""
    drain = Drain([], 10, 4, 0, {}, copies=copied_at(50, 99, 100, 150, 199, 200))

    first, second = split_drain(drain, [0, 100, 201])

    assert [copy.walked.first_ns for copy in first.copies] == [50, 99]
    assert [copy.walked.first_ns for copy in second.copies] == [100, 150, 199, 200]
    assert (first.ticks, second.ticks) == (2 + first.idle, 4 + second.idle)
    assert first.idle + second.idle == 4


def test_ticks_whose_stacks_wait_count_when_they_are_released():
    """So that each tick of a window is stored or lost, whenever it is asked."""
    window = OpenWindow(10_000_000, lambda: clocks(60))
    window.count(Drain([], 5, 1, 1, {}, copies=copied_at(1, 2, 3)))
    before = window.counts

    window.release(3)
    window.add(SAMPLE._replace(samples=1), np.zeros(0, np.int32), ())
    window.settle()

    counts = window.counts
    assert (before.ticks, before.idle, before.filtered) == (2, 1, 1)
    assert (counts.ticks, counts.stored, counts.lost) == (5, 1, {"fault": 2})
