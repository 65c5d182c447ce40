"""perf_event_open without a library: what it opens, and what it says when the kernel refuses."""

import errno
import fcntl
import os
import select
import time

import pytest

from bpf import perf_event
from bpf.errors import BpfError, PerfEventError


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("0\n", (0,)), ("0-3\n", (0, 1, 2, 3)), ("0,2-3,8\n", (0, 2, 3, 8)), ("\n", ())],
)
def test_cpu_lists_are_read_as_the_kernel_writes_them(text: str, cpus: tuple[int, ...]) -> None:
    """Single CPUs and ranges, separated by commas; an empty list has none."""
    assert perf_event.parse_cpus(text) == cpus


def test_online_cpus_are_those_the_scheduler_counts() -> None:
    """The list is never shorter than what this process may run on."""
    assert set(perf_event.online_cpus()) >= os.sched_getaffinity(0)


def test_frequency_and_period_share_their_place() -> None:
    """A frequency is only a frequency because `freq` says so (perf_event_open(2))."""
    attr = perf_event.sampling_attr(99, hardware=False)

    assert (attr.sample_period, attr.freq) == (99, 1)
    assert attr.config == perf_event.PERF_COUNT_SW_CPU_CLOCK


@pytest.mark.kernel
def test_enabled_time_grows_only_while_the_event_is_enabled() -> None:
    """It stands still before `enable`, and after the kernel was told to disable it."""
    fd = perf_event.open_event(perf_event.sampling_attr(99, hardware=False), cpu=0)
    try:
        before = perf_event.enabled_ns(fd)
        perf_event.enable(fd)
        start_ns = time.monotonic_ns()
        while time.monotonic_ns() - start_ns < 1_000_000:
            pass
        fcntl.ioctl(fd, 0x2401)  # PERF_EVENT_IOC_DISABLE
        after = perf_event.enabled_ns(fd)

        assert before == 0
        assert 1_000_000 <= after == perf_event.enabled_ns(fd)
    finally:
        os.close(fd)


@pytest.mark.kernel
def test_event_is_closed_on_exec() -> None:
    """No descriptor leaks into programs that the profiler starts."""
    fd = perf_event.open_event(perf_event.sampling_attr(99, hardware=False), cpu=0)
    try:
        assert not os.get_inheritable(fd)
    finally:
        os.close(fd)


@pytest.mark.kernel
def test_event_without_a_ring_reports_a_hang_up() -> None:
    """Which is why Rings maps first and waits then."""
    fd = perf_event.open_event(perf_event.lifecycle_attr(4096), cpu=0)
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)

        assert poll.poll(0) == [(fd, select.POLLHUP)]
    finally:
        os.close(fd)


@pytest.mark.kernel
def test_cpu_that_does_not_exist_is_named() -> None:
    """The message names the CPU and what to look at; the number is kept for the caller."""
    with pytest.raises(PerfEventError, match="cannot attach to CPU 4000: there is no such") as got:
        perf_event.open_event(perf_event.sampling_attr(99, hardware=False), cpu=4000)

    assert got.value.errno in (errno.EINVAL, errno.ENODEV)


@pytest.mark.kernel
def test_program_that_is_none_is_refused_with_a_verb_and_an_object() -> None:
    """Errors of ioctl name what was tried on which event, and are a BpfError."""
    fd = perf_event.open_event(perf_event.sampling_attr(99, hardware=False), cpu=0)
    try:
        with pytest.raises(BpfError, match=f"cannot attach the BPF program to perf event {fd}: "):
            perf_event.set_bpf(fd, 9999)
    finally:
        os.close(fd)


@pytest.mark.kernel
def test_missing_privilege_is_explained_with_its_remedy() -> None:
    """A child that gave up root is refused, and the error names perf_event_paranoid."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        message = "no error"
        try:
            os.setgid(65534)
            os.setuid(65534)
            perf_event.open_event(perf_event.sampling_attr(99, hardware=False), cpu=0)
        except PerfEventError as error:
            message = str(error)
        finally:
            os.write(writer, message.encode())
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        message = pipe.read()
    os.waitpid(child, 0)

    assert message.startswith("cannot attach to CPU 0: perf_event_paranoid is ")
    assert message.endswith("(run as root, or set it to -1)")
