"""The real BPF program on the real kernel: what it counts, whom it samples, what it leaves."""

import contextlib
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bpf import perf_event, syscalls
from bpf.errors import BpfError
from bpf.sampler import Sampler, SamplerConfig
from bpf.samples import (
    MAX_NATIVE_WORDS,
    MAX_SHORT_WORDS,
    Counter,
    Drain,
    RawSample,
    StopReason,
)
from storage.profile import Loss
from tests.support.live import spinning, wait_for
from tests.support.targets import compile_target, running

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_target("split.c", tmp_path_factory.mktemp("targets") / "split")


@pytest.fixture(scope="module")
def loaded() -> Iterator[Sampler]:
    """Programs that are loaded once, for tests that look at no process but their own."""
    with Sampler(SamplerConfig(frequency_hz=999, pids=frozenset())) as sampler:
        yield sampler


@pytest.fixture
def sampler_of(loaded: Sampler) -> Iterator[Callable[[subprocess.Popen[bytes]], Sampler]]:
    """Return the sampler, told to sample a process from now on."""

    def select(process: subprocess.Popen[bytes]) -> Sampler:
        loaded.select([process.pid])
        return loaded

    yield select
    loaded.stop()
    loaded.drain()


@pytest.fixture(scope="module")
def loaded_for_all() -> Iterator[Sampler]:
    """Programs that are loaded once, for tests that look at all processes."""
    with Sampler(SamplerConfig(frequency_hz=999)) as sampler:
        yield sampler


@pytest.fixture
def sampler_of_all(loaded_for_all: Sampler) -> Iterator[Sampler]:
    yield loaded_for_all
    loaded_for_all.stop()
    loaded_for_all.drain()


@pytest.fixture
def busy(split: Path) -> Iterator[subprocess.Popen[bytes]]:
    with spinning(split, "60") as process:
        yield process


def drain_for(sampler: Sampler, seconds: float) -> Drain:
    """Sample for a while and drain once."""
    sampler.start()
    time.sleep(seconds)
    sampler.stop()
    return sampler.drain()


def mismatch(drain: Drain) -> int:
    stored = sum(sample.samples for sample in drain.samples)
    return drain.ticks - stored - drain.idle - drain.filtered - sum(drain.lost.values())


def test_every_tick_is_stored_idle_filtered_or_lost(busy, sampler_of_all) -> None:
    """Law 1, over many drains while the machine works."""
    sampler_of_all.start()
    drains = []
    for _ in range(20):
        time.sleep(0.05)
        drains.append(sampler_of_all.drain())
    sampler_of_all.stop()
    drains.append(sampler_of_all.drain())

    assert sum(drain.ticks for drain in drains) > 500
    assert [mismatch(drain) for drain in drains] == [0] * 21


SHORT_LIVES = """
import os, sys, time
for _ in range(int(sys.argv[1])):
    if not (pid := os.fork()):
        while time.thread_time() < 0.003: pass
        os._exit(0)
    os.waitpid(pid, 0)
"""


def test_a_full_map_is_counted_as_lost(busy) -> None:
    """Without draining, the maps fill up at 999 Hz; each further tick says `map_full`."""
    config = SamplerConfig(frequency_hz=999, drain_period_s=0.001)  # the smallest maps
    with Sampler(config) as sampler:
        sampler.start()
        processes, drains = 400, []
        while not any(drain.lost for drain in drains) and processes < 8000:
            subprocess.run([sys.executable, "-c", SHORT_LIVES, str(processes)], check=True)
            drains.append(sampler.drain())
            processes *= 2

    assert drains[-1].lost["map_full"] > 0
    assert [mismatch(drain) for drain in drains] == [0] * len(drains)


def test_the_loss_causes_are_those_that_profiles_know(busy) -> None:
    """bpf returns strings; each must be in storage's closed list."""
    causes = {Counter.MAP_FULL.name.lower(), Counter.MAP_BUSY.name.lower()}

    assert causes <= {loss.value for loss in Loss}


def test_a_pid_filter_leaves_everything_else_filtered(busy) -> None:
    """What is not selected is counted apart, and nothing of it is stored."""
    with Sampler(SamplerConfig(pids=frozenset({busy.pid}))) as sampler:
        drain = drain_for(sampler, 1.0)

    assert {sample.pid for sample in drain.samples} == {busy.pid}
    assert mismatch(drain) == 0


def test_children_of_a_selected_process_are_selected(split, sampler_of) -> None:
    """Also grandchildren, from their first instruction on, whether they exec or not."""
    script = (
        f"import os, subprocess; child = os.fork(); subprocess.run(['{split}', '1']);"
        " child and os.wait()"
    )
    gate = f"import sys; sys.stdin.read(1)\n{script}"
    with running(sys.executable, "-c", gate, stdin=subprocess.PIPE) as parent:
        sampler = sampler_of(parent)
        sampler.start()
        parent.communicate(b"!")
        sampler.stop()
        drain = sampler.drain()

    by_name = {sample.comm for sample in drain.samples}
    assert b"split" in by_name
    assert len({sample.pid for sample in drain.samples if sample.comm == b"split"}) == 2
    assert mismatch(drain) == 0


def test_a_sample_names_its_process_and_thread(busy, sampler_of) -> None:
    sampler = sampler_of(busy)
    before = time.monotonic_ns()
    drain = drain_for(sampler, 0.5)
    after = time.monotonic_ns()

    fields = Path(f"/proc/{busy.pid}/stat").read_text().rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    assert drain.samples
    for sample in drain.samples:
        assert (sample.pid, sample.tid) == (busy.pid, busy.pid)
        assert (sample.comm, sample.leader_comm) == (b"split", b"split")
        assert abs(sample.start_ns / 1e9 - started) < 0.02
        assert before <= sample.first_ns <= sample.last_ns <= after


def test_frame_pointers_lead_from_the_leaf_to_main(busy, split, sampler_of) -> None:
    """A stack of the target lies in its own text up to main, then in the C library."""
    drain = drain_for(sampler_of(busy), 1.0)

    inside = mapped_range(busy.pid, split)
    deep = [sample for sample in drain.samples if len(sample.user) >= 2]
    own = [sample for sample in deep if int(sample.user[0]) in inside]
    assert count(deep) > 0.9 * count(drain.samples)
    assert count(own) > 0.9 * count(drain.samples)  # now and then it asks for the time


def count(samples: list[RawSample]) -> int:
    return sum(sample.samples for sample in samples)


def mapped_range(pid: int, path: Path) -> range:
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    line = next(line for line in lines if " r-xp " in line and line.endswith(str(path)))
    start, _, end = line.split()[0].partition("-")
    return range(int(start, 16), int(end, 16))


def test_a_system_call_shows_both_stacks(tmp_path, sampler_of) -> None:
    """Reading from /dev/zero is kernel work that a user stack asked for."""
    chain = compile_target("chain.c", tmp_path / "chain")
    with spinning(chain, "60", "kernel") as process:
        drain = drain_for(sampler_of(process), 1.0)

    both = [sample for sample in drain.samples if len(sample.kernel) and len(sample.user) >= 3]
    assert count(both) > 0.5 * count(drain.samples)
    assert all(int(sample.kernel[0]) >> 63 for sample in both)


@pytest.mark.parametrize(
    ("size_bytes", "length", "reason"),
    [(32, 4, StopReason.KERNEL_TRUNCATED), (12, 0, StopReason.KERNEL_FAILED)],
)
def test_a_kernel_stack_that_is_not_whole_says_why(size_bytes, length, reason, tmp_path) -> None:
    """It is deeper than the room for it, or the kernel refuses: 12 bytes are no whole words."""
    chain = compile_target("chain.c", tmp_path / "chain")
    with spinning(chain, "60", "kernel") as process:
        config = SamplerConfig(999, pids=frozenset({process.pid}), kernel_stack_bytes=size_bytes)
        with Sampler(config) as sampler:
            drain = drain_for(sampler, 1.0)

    cut = [sample for sample in drain.samples if sample.kernel_stop]
    assert count(cut) > 0.3 * count(drain.samples)
    assert {(len(each.kernel), each.kernel_stop) for each in cut} == {(length, reason.label)}
    assert mismatch(drain) == 0


def test_a_whole_kernel_stack_has_no_reason(tmp_path, sampler_of) -> None:
    chain = compile_target("chain.c", tmp_path / "chain")
    with spinning(chain, "60", "kernel") as process:
        drain = drain_for(sampler_of(process), 1.0)

    assert any(len(sample.kernel) for sample in drain.samples)
    assert {sample.kernel_stop for sample in drain.samples} == {""}


def compile_deep(folder: Path) -> Path:
    """Compile a program that spins as many calls deep as its argument says."""
    source = folder / "deep.c"
    source.write_text(
        "#include <stdlib.h>\nvolatile long n; __attribute__((noinline)) void down(int d)"
        "{ if (d) down(d - 1); else for (;;) n++; n++; }"
        "int main(int c, char **v) { down(atoi(v[1])); }"
    )
    return compile_target(str(source), folder / "deep", "-O1", "-fno-omit-frame-pointer")


def test_stacks_that_just_fit_beside_their_count_are_whole(tmp_path, loaded, sampler_of) -> None:
    """Longer ones stand in a map of their own: each call deeper is one word more, whichever."""
    deep = compile_deep(tmp_path)
    depths = range(MAX_SHORT_WORDS - 5, MAX_SHORT_WORDS + 3)
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(running(deep, str(depth))) for depth in depths]
        pids = [process.pid for process in processes]
        for process in processes:
            sampler_of(process)
        stacks: dict[int, set[tuple[int, ...]]] = {}

        def are_seen() -> bool:
            for sample in drain_for(loaded, 0.5).samples:
                if not len(sample.kernel):
                    stacks.setdefault(sample.pid, set()).add(tuple(sample.user.tolist()[1:]))
            return len(stacks) == len(pids)

        wait_for(are_seen)

    callers = [max(stacks[pid], key=len) for pid in pids]  # it may begin to spin only later
    assert [len(each) - len(callers[0]) for each in callers] == list(range(len(depths)))
    assert len(callers[0]) < MAX_SHORT_WORDS - 1 < len(callers[-1])
    assert all(len(set(each[:50])) == 1 for each in callers)  # down() calls itself in one place


def test_a_deeper_stack_than_there_is_room_for_is_marked_truncated(tmp_path, sampler_of) -> None:
    with spinning(compile_deep(tmp_path), "1000") as process:
        drain = drain_for(sampler_of(process), 0.5)

    stacks = [sample for sample in drain.samples if not len(sample.kernel)]
    assert {sample.stop for sample in stacks} == {StopReason.TRUNCATED.label}
    assert {len(sample.user) for sample in stacks} == {MAX_NATIVE_WORDS}


def test_smaller_programs_are_tried_where_the_verifier_refuses(tmp_path) -> None:
    """One that leaves 100,000 frames is refused by any kernel; one of 8 goes on in itself."""
    with spinning(compile_deep(tmp_path), "1000") as process:
        config = SamplerConfig(pids=frozenset({process.pid}), frames_per_program=(100_000, 8))
        with Sampler(config) as sampler:
            stacks = [each for each in drain_for(sampler, 0.5).samples if not len(each.kernel)]

            assert 100 < sampler.deepest_stack < MAX_NATIVE_WORDS
            assert {len(each.user) for each in stacks} == {sampler.deepest_stack}
            assert {each.stop for each in stacks} == {StopReason.TRUNCATED.label}


def test_kernel_threads_have_no_user_stack(sampler_of_all, tmp_path) -> None:
    """Writing back a file makes kernel threads work; none of them gets a user word."""
    sampler_of_all.start()
    deadline = time.monotonic() + 20
    found = []
    while not found and time.monotonic() < deadline:
        (tmp_path / "file").write_bytes(os.urandom(1 << 24))
        os.sync()
        drain = sampler_of_all.drain()
        kernel = StopReason.KERNEL_THREAD.label
        found = [sample for sample in drain.samples if sample.stop == kernel]

    assert found
    assert all(len(sample.user) == 0 and len(sample.kernel) > 0 for sample in found)


@pytest.fixture
def second_cpu() -> Iterator[Path]:
    """The switch of CPU 1, which is on again afterwards whatever happens."""
    switch = Path("/sys/devices/system/cpu/cpu1/online")
    if not switch.exists():
        pytest.skip("this machine has no second CPU that can be taken offline")
    yield switch
    switch.write_text("1")


@pytest.mark.alone
@pytest.mark.parametrize("is_seen_offline", [True, False])
def test_a_cpu_that_was_away_is_sampled_again(is_seen_offline, second_cpu) -> None:
    """Its old event stays blind for ever, also when nobody looked while it was away."""
    with Sampler(SamplerConfig(frequency_hz=999)) as sampler:
        sampler.start()
        second_cpu.write_text("0")
        if is_seen_offline:
            assert sampler.refresh_cpus()
            assert perf_event.online_cpus() == (0,)
        second_cpu.write_text("1")
        assert sampler.refresh_cpus()
        assert not sampler.refresh_cpus()
        sampler.drain()
        with running("taskset", "-c", "1", "sh", "-c", "while :; do :; done") as loop:
            time.sleep(0.5)
            drain = sampler.drain()

    on_loop = sum(sample.samples for sample in drain.samples if sample.pid == loop.pid)
    assert on_loop > 20  # a blind CPU has none
    assert mismatch(drain) == 0


REFRESHES = 2_000


def interrupts(kind: str) -> list[int]:
    """Return how many interrupts of a kind each CPU has had (/proc/interrupts)."""
    lines = Path("/proc/interrupts").read_text().splitlines()
    line = next(line for line in lines if line.split()[0] == f"{kind}:")
    return [int(field) for field in line.split()[1:] if field.isdecimal()]


@pytest.mark.alone
def test_following_cpus_interrupts_none_of_them() -> None:
    """Reading another CPU's event is an interrupt there, which wakes a CPU that is idle."""
    online = perf_event.online_cpus()
    if len(online) < 2:
        pytest.skip("this machine has one CPU: there is no other one to interrupt")
    script = (
        "import os, sys\n"
        "from bpf.records import Rings\n"
        "from bpf.sampler import Sampler, SamplerConfig\n"
        "from tests.bpf.test_sampler import REFRESHES, interrupts\n"
        "os.sched_setaffinity(0, {0})\n"
        "with Sampler(SamplerConfig()) as sampler:\n"
        "    rings = Rings()\n"
        "    sampler.start()\n"
        "    for _ in range(3):\n"
        "        before = sum(interrupts('CAL')[1:])\n"
        "        for _ in range(REFRESHES):\n"
        "            sampler.refresh_cpus()\n"
        "            rings.refresh()\n"
        "        print(sum(interrupts('CAL')[1:]) - before)\n"
    )

    child = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)

    # Other programs of the machine cause some, so the least of three counts.
    counts = [int(line) for line in child.stdout.split()]
    assert len(counts) == 3
    assert min(counts) < REFRESHES


def test_the_sampling_process_maps_neither_bcc_nor_llvm() -> None:
    """The compiler runs in a child that exits."""
    script = (
        "from bpf.sampler import Sampler, SamplerConfig; import sys\n"
        "sampler = Sampler(SamplerConfig()); sampler.start(); sampler.drain()\n"
        "print('bcc' in sys.modules, 'LLVM' in open('/proc/self/maps').read())"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )

    assert result.stdout.split() == ["False", "False"]


def test_closing_leaves_no_program_map_or_event_behind() -> None:
    """Descriptors of this process hold everything."""
    before = len(list(Path("/proc/self/fd").iterdir()))

    with Sampler(SamplerConfig(pids=frozenset({os.getpid()}))) as sampler:
        drain_for(sampler, 0.1)

    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_no_kernel_headers_tracefs_or_debugfs_are_needed() -> None:
    """The same in a mount namespace where all three are hidden by empty folders."""
    script = (
        "for d in /sys/kernel/tracing /sys/kernel/debug /lib/modules /usr/src; do"
        " [ ! -d $d ] || mount -t tmpfs none $d; done;"
        f" exec {shlex.quote(sys.executable)} -c 'from bpf.sampler import *;"
        " s = Sampler(SamplerConfig(pids=frozenset({1}))); s.start(); print(s.drain().lost)'"
    )

    result = subprocess.run(
        ["unshare", "-m", "sh", "-c", script], check=True, capture_output=True, text=True
    )

    assert result.stdout == "{}\n"


def test_an_environment_made_to_mislead_bcc_does_no_harm() -> None:
    script = "from bpf.sampler import *; Sampler(SamplerConfig()).close(); print('loaded')"
    misleading = {**os.environ, "ARCH": "mips", "BCC_LINUX_VERSION_CODE": "1"}

    result = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, env=misleading
    )

    assert result.stdout == "loaded\n"


def test_hardware_cycles_are_counted_or_refused_with_the_way_out(busy) -> None:
    """Virtual machines often have no cycle counter: then the message names the cpu-clock."""
    with Sampler(SamplerConfig(hardware=True)) as sampler:
        if has_cycle_counter():
            assert drain_for(sampler, 0.5).ticks > 20
        else:
            with pytest.raises(BpfError, match="use the cpu-clock"):
                sampler.start()


def has_cycle_counter() -> bool:
    command = ["perf", "stat", "-x,", "-e", "cycles", "true"]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return "not supported" not in result.stderr


def test_run_time_statistics_are_those_of_the_tick_program(busy) -> None:
    with syscalls.run_time_stats(), Sampler(SamplerConfig(frequency_hz=999)) as sampler:
        drain = drain_for(sampler, 0.5)
        info = sampler.run_stats()

    assert info.run_count == drain.ticks - sum(drain.lost.values())  # those the kernel skipped
    assert info.run_time_ns > 0


@pytest.mark.parametrize("frequency_hz", [0, -1, 1000])
def test_a_frequency_outside_of_the_limits_is_refused(frequency_hz: int) -> None:
    with pytest.raises(ValueError, match="choose 1 to 999"):
        SamplerConfig(frequency_hz=frequency_hz)


def test_maps_of_a_small_host_last_longer_than_they_must():
    config = SamplerConfig()

    assert config.lasts_s(2) > 2.0
    assert config.lasts_s(128) >= config.drain_period_s
    assert config.capacity(128) >= config.lasts_s(128) * 99 * 128


@pytest.mark.kernel
def test_a_sampler_that_cannot_be_made_leaves_nothing_open() -> None:
    """Programs and maps were loaded by then; each try would hold them once more."""
    before = len(list(Path("/proc/self/fd").iterdir()))

    with pytest.raises(BpfError):
        Sampler(SamplerConfig(pids=frozenset(range(1, 40_000))))  # more than there is room for

    assert len(list(Path("/proc/self/fd").iterdir())) == before
