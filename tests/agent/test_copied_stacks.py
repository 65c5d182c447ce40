"""Stacks that were copied: unwound when their tables come, counted in any case."""

import contextlib
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bpf.sampler import SamplerConfig
from bpf.samples import CopiedStack, Drain, RawSample, StopReason
from profiler.agent import copied_stacks
from profiler.agent.copied_stacks import CopiedStacks
from profiler.agent.pipeline import Pipeline
from profiler.agent.recorder import Recorder
from storage.profile import GOOD_STOPS, Profile
from symbolizer.location import Miss
from symbolizer.maps import Mapping, MappingTable, parse_maps
from symbolizer.unwind import table as unwind
from symbolizer.unwind.rules import ROW, CfaKind
from symbolizer.unwind.table import UnwindTable
from tests.support.live import sample_of, wait_for
from tests.support.targets import compile_target, running

CODE, STACK = 0x5500_0000_0000, 0x7FFC_0000_0000
STEP, END = 0, 2048
"""Addresses in a page of code: of functions whose frames are two words, and of outermost ones."""


def table_of_functions(key: str = "key") -> UnwindTable:
    pages, rows = np.zeros(1, unwind.PAGE), np.zeros(2, ROW)
    pages["count"] = 2
    rows["pc_low"], rows["cfa"] = [STEP, END], [2, 0]
    rows["cfa_kind"] = [CfaKind.RSP, CfaKind.STOP]
    return UnwindTable(key, pages, rows)


class LateTables:
    """Tables that come when a test says so; the first mapping's and all others' are two."""

    def __init__(self) -> None:
        self.answers: dict[int, UnwindTable | Miss] = {}
        self.asked: list[tuple[int, int]] = []

    def table_of(self, _: MappingTable, place: int, pid: int) -> UnwindTable | Miss:
        self.asked.append((place, pid))
        return self.answers.get(place, Miss.NOT_READ)


MAPPINGS = MappingTable.of(
    [Mapping(CODE + (i << 16), CODE + (i << 16) + 4096, 0, b"/file%d" % i) for i in range(3)]
)


def copy_of(*returns: int, pid: int = 7, words: int = 0, user: int = 1) -> CopiedStack:
    """Copy the stack of a thread at `returns[0]`; two words a frame."""
    words_then = np.full(user, CODE, np.uint64)
    walked = sample_of(pid, comm=b"a", start_ns=1, user=words_then, stop="no_process_yet")
    memory = [0] * 16 + [word for address in returns[1:] for word in (0, address)]
    registers = np.zeros(16, np.uint64)
    registers[7] = STACK
    return CopiedStack(
        walked=walked,
        registers=registers,
        pc=returns[0],
        is_return_address=False,
        start=STACK - 128,
        memory=np.array(memory + [0] * words, np.uint64),
        unreadable=0,
        is_cut=False,
    )


def drain_of(*copies: CopiedStack) -> Drain:
    return Drain([], len(copies), 0, 0, {}, copies=copies)


def taken(copied: CopiedStacks) -> list[RawSample]:
    return [sample for samples in copied.take().values() for sample in samples]


def function(mapping: int, address: int) -> int:
    return CODE + (mapping << 16) + address


def test_a_stack_waits_for_each_table_that_its_walk_comes_to():
    """Nothing is asked twice while the answer is the same; then the stack is whole."""
    tables = LateTables()
    copied = CopiedStacks(tables, lambda *_: MAPPINGS)
    copied.hold(drain_of(copy_of(function(0, 8), function(1, 8), function(0, END + 1))))

    copied.advance()
    assert (taken(copied), copied.status()["waiting"]) == ([], 1)
    tables.answers[0] = table_of_functions()
    copied.advance()
    assert taken(copied) == []
    tables.answers[1] = table_of_functions("other")
    tables.asked.clear()
    copied.advance()

    (sample,) = taken(copied)
    assert sample.stop == "root"
    assert sample.user.tolist() == [function(0, 8), function(1, 7), function(0, END)]
    assert {place for place, _ in tables.asked} == {0, 1}
    assert copied.status() == {
        "copied": 1,
        "uncopied": 0,
        "unwound": 1,
        "given_up": 0,
        "waiting": 0,
    }


def test_a_table_that_never_comes_leaves_the_sample_of_the_tick():
    copied = CopiedStacks(LateTables(), lambda *_: MAPPINGS)
    copy = copy_of(function(0, 8), function(0, END + 1))
    copied.hold(drain_of(copy))

    samples = [sample for group in copied.take_all().values() for sample in group]

    assert samples == [copy.walked]
    assert copied.status()["given_up"] == 1
    assert copied.take_all() == {}


def test_a_process_whose_mappings_nobody_knows_leaves_the_sample_of_the_tick():
    exited = MappingTable.of([], "[exited]")
    copied = CopiedStacks(LateTables(), lambda *_: exited)
    copy = copy_of(function(0, 8))
    copied.hold(drain_of(copy))

    copied.advance()

    assert copied.take() == {exited: [copy.walked]}


@pytest.mark.parametrize("answer", [Miss.NO_FILE, UnwindTable("", *[np.zeros(0)] * 2)])
def test_a_file_without_a_table_ends_the_wait(answer):
    """Its frames are left by saved frame pointers, as at a tick; here rbp is zero."""
    tables = LateTables()
    tables.answers[0] = answer
    copied = CopiedStacks(tables, lambda *_: MAPPINGS)
    copied.hold(drain_of(copy_of(function(0, 8), function(0, END + 1))))

    copied.advance()

    (sample,) = taken(copied)
    assert sample.stop == StopReason.NO_TABLE.label
    assert sample.user.tolist() == [function(0, 8)]


def test_a_late_walk_that_finds_less_than_that_of_the_tick_is_not_taken():
    """A stack that goes on in other memory was copied only in part."""
    tables = LateTables()
    tables.answers[0] = table_of_functions()
    copied = CopiedStacks(tables, lambda *_: MAPPINGS)
    longer, shorter = (copy_of(function(0, 8), function(0, 9), user=n) for n in (5, 2))
    copied.hold(drain_of(longer, shorter))

    copied.advance()

    samples = taken(copied)
    assert samples[0] is longer.walked
    assert (samples[1].stop, len(samples[1].user)) == (StopReason.UNREADABLE.label, 2)


def test_stacks_that_wait_are_bounded(monkeypatch):
    """The oldest are counted as they were walked; those that came last wait on."""
    monkeypatch.setattr(copied_stacks, "_MAX_HELD_BYTES", 100_000)
    copied = CopiedStacks(LateTables(), lambda *_: MAPPINGS)
    copied.hold(drain_of(*(copy_of(function(0, 8), pid=pid, words=1000) for pid in range(50))))

    copied.advance()

    samples = taken(copied)
    assert [sample.pid for sample in samples] == list(range(50 - 12))
    assert copied.status()["waiting"] == 12


def test_tables_get_new_numbers_when_there_are_too_many(monkeypatch):
    monkeypatch.setattr(copied_stacks, "_MAX_TABLES", 1)
    tables = LateTables()
    copied = CopiedStacks(tables, lambda *_: MAPPINGS)
    found = []
    for key in ("one", "two", "three", "one"):
        tables.answers = dict.fromkeys(range(3), table_of_functions(key))
        tables.answers[1] = table_of_functions(f"{key} too")
        copied.hold(drain_of(copy_of(function(0, 8), function(1, END + 1))))
        copied.advance()
        found += [sample.stop for sample in taken(copied)]

    assert found == ["root"] * 4


# The real thing.


class Stages(Pipeline):
    """Keeps the samples as they go into the window, and which of them were copied stacks."""

    seen = late = ()

    def _release(self, window, **options):
        groups = super()._release(window, **options)
        self.late = [*self.late, *(sample for group in groups.values() for sample in group)]
        return groups

    def _locate(self, frames, groups):
        located = super()._locate(frames, groups)
        self.seen = [*self.seen, *located[0]]
        return located


class Watching(Recorder):
    stages = Stages

    @property
    def seen(self):
        return self._stages.seen

    @seen.setter
    def seen(self, samples):
        self._stages.seen = samples

    @property
    def late(self):
        return self._stages.late


@pytest.fixture(scope="module")
def recorder(tmp_path_factory) -> Iterator[Watching]:
    config = SamplerConfig(frequency_hz=499, pids=frozenset())
    with Watching(config, tmp_path_factory.mktemp("cache")) as recorder:
        recorder.start()
        yield recorder


@pytest.fixture(scope="module")
def parked(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("targets")
    return compile_target("parked.c", folder / "parked", "-O2", "-fomit-frame-pointer")


def close(recorder: Watching) -> Profile:
    recorder.seen = []
    profile = recorder.close_window()
    counts = profile.accounting
    ended = counts.stored + counts.idle + counts.filtered + sum(counts.lost.values())
    assert counts.ticks == ended
    return profile


GATE = "import os, sys; sys.stdin.read(1); os.execv(sys.argv[1], sys.argv[1:])"


@contextlib.contextmanager
def sampled(recorder: Recorder, *command: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program that is sampled from its first instruction on."""
    with running("python3", "-c", GATE, *command, stdin=subprocess.PIPE) as process:
        assert process.stdin
        recorder.sampler.select([process.pid])
        process.stdin.write(b"!")
        process.stdin.close()
        yield process


@pytest.mark.kernel
@pytest.mark.parametrize("way", ["recursion", "callback", "alloca", "aligned"])
def test_first_ticks_have_the_frames_that_later_ones_have(way, parked, recorder):
    """Walked here and walked by the kernel, a thread that stays in one place has one stack."""
    close(recorder)
    with sampled(recorder, parked, way) as process:

        def own(seen: list[RawSample]) -> list[RawSample]:
            return [s for s in seen if s.pid == process.pid and s.comm == b"parked"]

        def is_walked_by_the_kernel() -> bool:
            recorder.catch_up()
            recorder.drain()
            return sum(sample.samples for sample in own(recorder.seen)) > 300

        late_before = recorder.copied.status()["unwound"]
        wait_for(is_walked_by_the_kernel)
        late = recorder.copied.status()["unwound"] - late_before
        samples = own(recorder.seen)

    assert late > 0
    stacks = Counter(tuple(s.user[1:].tolist()) for s in samples for _ in range(s.samples))
    (callers, often), *_ = stacks.most_common()
    assert len(callers) >= 3
    assert often > 0.9 * sum(s.samples for s in samples if not len(s.kernel)), stacks
    assert {s.stop for s in samples} <= GOOD_STOPS
    close(recorder)


@pytest.fixture(scope="module")
def lazy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lazy")
    library = folder / "liblazy.so"
    compile_target("lazy.c", library, "-O2", "-DLIBRARY", "-shared", "-fPIC")
    linked = ("-Wl,-z,lazy", "-Wl,--no-as-needed", f"-Wl,-rpath,{folder}", str(library))
    return compile_target("lazy.c", folder / "lazy", "-O2", "-fomit-frame-pointer", *linked)


@pytest.mark.kernel
def test_stacks_through_lazy_binding_are_whole(lazy, recorder):
    """The dynamic linker aligns the stack there, and finds its way back by rbx, which those that it
    calls save: walked here and walked by the kernel, main() and its callers are above it."""
    callees: dict[str, list[list[str]]] = {"here": [], "kernel": []}  # By who walked the stack.

    def is_walked_by_both() -> bool:
        """Run the program once more: how many of its stacks are copied depends on the host."""
        close(recorder)
        with sampled(recorder, lazy) as process:

            def own(samples: list[RawSample]) -> list[RawSample]:
                return [s for s in samples if s.pid == process.pid and s.comm == b"lazy"]

            def is_walked_by_the_kernel() -> bool:
                recorder.catch_up()
                recorder.drain()
                return sum(s.samples for s in own(recorder.seen)) > 300 + len(own(recorder.late))

            wait_for(is_walked_by_the_kernel)
            mappings = MappingTable.of(parse_maps(Path(f"/proc/{process.pid}/maps").read_bytes()))
            late = own(recorder.late)
            at_once = [s for s in own(recorder.seen) if not any(s is each for each in late)]

        for walked_by, samples in (("here", late), ("kernel", at_once)):
            assert {s.stop for s in samples} <= GOOD_STOPS
            for sample in samples:
                places = mappings.find(sample.user).tolist()
                files = [Path(os.fsdecode(mappings.mappings[n].path)).name for n in places]
                if files.count("lazy") > 1:  # of main(), not of what is before it
                    assert files[-4:] == ["lazy", "libc.so.6", "libc.so.6", "lazy"]
                    callees[walked_by].append(files[:-4])
        return all(sum(len(files) > 2 for files in each) > 3 for each in callees.values())

    wait_for(is_walked_by_both)
    for each in callees.values():
        assert {name for files in each for name in files[1:]} == {"ld-linux-x86-64.so.2"}
    close(recorder)


@pytest.mark.kernel
def test_processes_that_are_gone_when_their_ticks_are_drained_are_whole(recorder):
    """Programs of some 20 ms each, none of which is known before it ends."""
    script = "for i in 1 2 3 4 5 6 7 8 9 10; do perl -e 'for (1..200000) { $n += $_ }'; done"
    gaps = -1
    while gaps != recorder.address_spaces.gaps:  # a busy host may lose records of processes
        close(recorder)
        gaps = recorder.address_spaces.gaps
        with sampled(recorder, "/bin/sh", "-c", script) as process:
            process.wait()
        recorder.drain()
        wait_for(lambda: recorder.catch_up() or not recorder.copied.is_waiting)
        profile = close(recorder)

    stops = profile.accounting.stops
    whole = sum(stops.get(reason, 0) for reason in GOOD_STOPS)
    assert sum(stops.values()) > 20
    assert whole > 0.95 * sum(stops.values()), stops


@pytest.mark.kernel
def test_a_window_has_the_ticks_that_fell_into_it_though_their_stacks_waited(parked, recorder):
    """Those of a process that nobody knows yet stand in the window that is closed next."""
    close(recorder)
    before = recorder.copied.status()["copied"]
    with sampled(recorder, parked, "recursion"):
        wait_for(lambda: recorder.drain() or recorder.copied.status()["copied"] > before)
        first = close(recorder)

    assert first.total_samples == first.accounting.stored > 0
    assert recorder.copied.status()["waiting"] == 0


REPLACED = """
import mmap, os, time
memory = mmap.mmap(-1, 300 << 20)
memory.madvise(mmap.MADV_NOHUGEPAGE)
memory[::4096] = bytes(300 << 8)
end = time.monotonic() + 2
while time.monotonic() < end:
    pass
os.execv("/bin/sleep", ["sleep", "30"])
"""


@pytest.mark.kernel
def test_a_known_program_that_execs_has_no_user_stack_while_its_memory_is_freed(recorder):
    """The registers are still those of its execve, and the memory is the next program's."""
    close(recorder)
    with sampled(recorder, sys.executable, "-c", REPLACED) as process:

        def is_replaced() -> bool:
            recorder.catch_up()
            recorder.drain()
            return Path(f"/proc/{process.pid}/comm").read_bytes() == b"sleep\n"

        wait_for(is_replaced)
        recorder.drain()
        wait_for(lambda: recorder.catch_up() or not recorder.copied.is_waiting)
        samples = [sample for sample in recorder.seen if sample.pid == process.pid]

    ended = [s for s in samples if s.stop == StopReason.NO_PROGRAM.label and len(s.kernel)]
    assert sum(sample.samples for sample in ended) > 2
    assert {sample.stop for sample in samples} <= GOOD_STOPS
    close(recorder)
