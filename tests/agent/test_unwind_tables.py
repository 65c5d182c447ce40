"""Unwinding of real processes: each frame is the one that the debugger finds, none is missing."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from bpf.sampler import Sampler, SamplerConfig
from bpf.samples import RawSample
from bpf.tables import SHARD_BYTES
from profiler.agent import mapped_files, table_loading
from profiler.agent import unwind_tables as unwinding
from profiler.agent.reader_child import Failure
from profiler.agent.readers import Readers
from profiler.agent.recorder import Recorder
from symbolizer.location import Miss
from symbolizer.maps import MappingTable, parse_maps
from symbolizer.symbols.elf import FileSource, read_elf
from symbolizer.unwind.table import PagedRows
from tests.support.elf_files import build, build_go, read_symbols
from tests.support.file_systems import fill, small
from tests.support.live import has_execed, stat_fields, wait_for
from tests.support.targets import compile_target, running

pytestmark = pytest.mark.kernel

PARKED = (
    *("recursion", "callback", "tail_call", "signal", "another_stack", "alloca", "aligned"),
    *("variable_length", "large_frame", "longjmp", "call_at_the_end"),
)
Places = tuple[tuple[int, str], ...]
"""A stack, leaf first: where each address is in its page, and the name of its file."""
CHANGING = ("-O2", "-fno-plt", "-fno-optimize-sibling-calls", "-fomit-frame-pointer")
NO_FRAME_POINTERS = ("-fomit-frame-pointer", "-fasynchronous-unwind-tables")

# Callers are looked up one byte before their return address; what a signal interrupted is not.
GDB_SCRIPT = """set backtrace past-main on
set backtrace past-entry on
python
import gdb, json
def words_of(pid):
    gdb.execute(f"attach {pid}", to_string=True)
    words, frame, newer = [], gdb.newest_frame(), None
    while frame is not None:
        if frame.type() in (gdb.NORMAL_FRAME, gdb.SIGTRAMP_FRAME):  # not inlined, not jumped out of
            is_exact = newer is None or newer.type() == gdb.SIGTRAMP_FRAME
            words.append(frame.pc() if is_exact else frame.pc() - 1)
            newer = frame
        frame = frame.older()
    gdb.execute("detach", to_string=True)
    return words
print("WORDS", json.dumps([words_of(pid) for pid in PIDS]))
"""


@pytest.fixture(scope="module")
def recorder(tmp_path_factory) -> Iterator[Recorder]:
    """A recorder that samples the processes it is told of, so that none of others takes room."""
    config = SamplerConfig(frequency_hz=499, pids=frozenset())
    with Recorder(config, tmp_path_factory.mktemp("cache")) as recorder:
        recorder.start()
        yield recorder


@contextlib.contextmanager
def all_parked(program: Path, parked: Sequence[str]) -> Iterator[dict[str, int]]:
    """Run a program for each way of being parked, all at once; return their pids.

    They are nice: together they take about what one process takes, and leave the rest to the
    recorder and the debugger.
    """
    with contextlib.ExitStack() as stack:
        nice = ("nice", "-n", "10", program)
        started = {what: stack.enter_context(running(*nice, what)) for what in parked}
        pids = {what: process.pid for what, process in started.items()}
        wait_for(lambda: all(is_parked(what, pid) for what, pid in pids.items()), timeout_s=60)
        yield pids


def is_parked(what: str, pid: int) -> bool:
    """Return whether a process spins where it is to stay: also in a handler, whose signal waits."""
    if Path(f"/proc/{pid}/comm").read_text() == "nice\n":
        return False
    fields = stat_fields(pid)
    has_spun = int(fields[11]) + int(fields[12]) >= 5
    blocked = int(fields[29])
    return has_spun and (what not in ("signal", "another_stack") or blocked != 0)


def samples_of(
    recorder: Recorder, pids: Collection[int], seconds: float = 0.5
) -> dict[int, list[RawSample]]:
    """Return the samples of processes from when the tables of all of them are loaded on."""
    recorder.sampler.select(pids)
    is_known: dict[int, bool] = {}
    found: dict[int, list[RawSample]] = {}

    def drained() -> list[RawSample]:
        return [sample for sample in recorder.sampler.drain().samples if sample.pid in pids]

    def are_known() -> bool:
        recorder.step()
        recorder.catch_up()
        time.sleep(0.2)
        samples = drained()
        is_known.update({sample.pid: True for sample in samples})
        is_known.update({sample.pid: False for sample in samples if "yet" in sample.stop})
        return len(is_known) == len(pids) and all(is_known.values())

    def are_sampled() -> bool:
        time.sleep(seconds)
        for sample in drained():
            found.setdefault(sample.pid, []).append(sample)
        return len(found) == len(pids)

    # On a busy machine not every process is on a CPU at a tick of each round.
    wait_for(are_known, timeout_s=60)
    recorder.sampler.drain()
    wait_for(are_sampled)
    return found


def stacks_by_gdb(pids: Collection[int], folder: Path) -> list[list[int]]:
    if not shutil.which("gdb"):
        pytest.skip("no gdb: apt-get install gdb")
    (folder / "script").write_text(GDB_SCRIPT.replace("PIDS", str(list(pids))))
    command = ["gdb", "-nx", "-batch", "-x", folder / "script"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith("WORDS")]
    assert found, done.stdout + done.stderr
    return json.loads(found[0].removeprefix("WORDS"))


def check_frames(recorder: Recorder, program: Path, parked: Sequence[str], folder: Path) -> None:
    with all_parked(program, parked) as pids:
        samples = samples_of(recorder, pids.values())
        expected = stacks_by_gdb(pids.values(), folder)

    for (what, pid), words in zip(pids.items(), expected, strict=True):
        assert {sample.stop for sample in samples[pid]} == {"root"}, what
        # The leaf moves within its loop; it makes no call. Where the lowest returns to is no frame.
        callers = tuple(word for word in words[1:] if word > 0)
        assert {tuple(sample.user[1:].tolist()) for sample in samples[pid]} == {callers}, what


@pytest.mark.parametrize("level", ["-O0", "-O1", "-O2", "-O3"])
def test_frames_are_those_of_the_debugger(level, recorder, tmp_path):
    """At every level of optimisation, for every way of calling that compilers know."""
    program = compile_target("parked.c", tmp_path / "parked", level, *NO_FRAME_POINTERS)

    check_frames(recorder, program, PARKED, tmp_path)


@pytest.mark.parametrize(
    "flags",
    [("-static",), ("-fno-plt",), ("-no-pie", "-fno-pie"), ("-fuse-ld=lld",), ("-fuse-ld=gold",)],
    ids=" ".join,
)
def test_frames_are_right_however_a_program_is_linked(flags, recorder, tmp_path):
    if "-fuse-ld=gold" in flags and not shutil.which("ld.gold"):
        pytest.skip("no gold: it left binutils in Debian 13")
    program = compile_target("parked.c", tmp_path / "parked", "-O2", *NO_FRAME_POINTERS, *flags)

    check_frames(recorder, program, ("recursion", "callback", "signal"), tmp_path)


@pytest.mark.parametrize(
    ("flags", "parked"),
    # The debugger loses its way where a handler returns to, when nothing says whose code that is.
    [((), ("recursion", "alloca")), (("-static",), ("recursion", "alloca", "signal"))],
    ids=["dynamic", "static"],
)
def test_frames_are_right_with_musl(flags, parked, recorder, tmp_path):
    """Another C library, whose own code has no rules: what called main is known all the same."""
    program = compile_target(
        "parked.c", tmp_path / "parked", "-O2", *NO_FRAME_POINTERS, *flags, compiler="musl-gcc"
    )

    check_frames(recorder, program, parked, tmp_path)


def stacks_by_perf(pids: Collection[int], folder: Path) -> dict[int, set[Places]]:
    """Return the distinct stacks that perf unwinds from stack copies, leaf first.

    On a busy machine not every process is on a CPU at a tick of one recording.
    """
    if not shutil.which("perf"):
        pytest.skip("no perf: apt-get install linux-perf")
    stacks: dict[int, set[Places]] = {}

    def are_recorded() -> bool:
        for pid, found in _recorded_by_perf(pids, folder).items():
            stacks[pid] = stacks.get(pid, set()) | found
        return len(stacks) == len(pids)

    wait_for(are_recorded, timeout_s=60)
    return stacks


def _recorded_by_perf(pids: Collection[int], folder: Path) -> dict[int, set[Places]]:
    data = str(folder / "perf.data")
    record = ["perf", "record", "-q", "-e", "cpu-clock:u", "-F", "99", "-o", data]
    record += ["-p", ",".join(map(str, pids)), "--call-graph", "dwarf,65528", "--", "sleep", "1"]
    subprocess.run(record, check=True, capture_output=True, timeout=60)
    script = ["perf", "script", "-i", data, "--no-inline", "-F", "pid,ip,dso"]
    script += ["--max-stack", "300"]
    text = subprocess.run(script, check=True, capture_output=True, text=True, timeout=60).stdout
    stacks: dict[int, set[Places]] = defaultdict(set)
    for block in text.split("\n\n"):
        if block.strip():
            pid, *frames = block.strip().splitlines()
            places = (line.split() for line in frames)
            stacks[int(pid)].add(
                tuple((int(at, 16) % 4096, Path(dso.strip("()")).name) for at, dso in places)
            )
    return stacks


def places_of(words: Sequence[int], maps: MappingTable) -> Places:
    """Return addresses as perf prints them: relative to something that depends on its version."""
    found = maps.find(np.array(words, dtype=np.uint64)).tolist()
    return tuple(
        (word % 4096, Path(os.fsdecode(maps.mappings[place].path)).name)
        for word, place in zip(words, found, strict=True)
    )


def test_stacks_are_those_of_perf(recorder, tmp_path):
    """perf unwinds afterwards with libdw, another reader of the same rules."""
    program = compile_target("parked.c", tmp_path / "parked", "-O2", *NO_FRAME_POINTERS)
    parked = [what for what in PARKED if what != "another_stack"]  # perf copies one only
    with all_parked(program, parked) as pids:
        samples = samples_of(recorder, pids.values())
        theirs = stacks_by_perf(pids.values(), tmp_path)
        maps = {
            pid: MappingTable.of(parse_maps(Path(f"/proc/{pid}/maps").read_bytes()))
            for pid in pids.values()
        }

    for what, pid in pids.items():
        ours = {places_of(sample.user[1:].tolist(), maps[pid]) for sample in samples[pid]}
        assert ours == {stack[1:] for stack in theirs[pid]}, what


def test_stacks_are_whole_below_the_vdso_and_in_the_kernel(recorder, tmp_path):
    program = compile_target("parked.c", tmp_path / "parked", "-O2", *NO_FRAME_POINTERS)

    with all_parked(program, ("vdso", "kernel")) as pids:
        samples = samples_of(recorder, pids.values())
        expected = stacks_by_gdb(pids.values(), tmp_path)

    for pid, words in zip(pids.values(), expected, strict=True):
        assert {sample.stop for sample in samples[pid]} == {"root"}
        assert {tuple(sample.user[-3:].tolist()) for sample in samples[pid]} == {tuple(words[-3:])}


def stops_of(recorder: Recorder, pid: int, seconds: float = 0.3) -> set[str]:
    """Return why the stacks of a process end just now, while the recorder goes on.

    None may: on a busy machine a process may have no CPU for as long, or its stacks are copied.
    """
    recorder.sampler.select([pid])
    found: set[str] = set()
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        time.sleep(0.05)
        recorder.catch_up()
        drain = recorder.sampler.drain()
        recorder.unwinding.note(recorder._stages._by_mappings(drain.samples))
        recorder.catch_up()
        found |= {sample.stop for sample in drain.samples if sample.pid == pid}
    return found


@pytest.mark.parametrize("what", ["open", "exec", "fork"])
def test_what_a_process_becomes_is_followed(what, recorder, tmp_path):
    """A library that it opens later, another program, a child: whole again within a moment."""
    library = compile_target("changing.c", tmp_path / "library.so", *CHANGING, "-shared", "-fPIC")
    program = compile_target("changing.c", tmp_path / "changing", *CHANGING)

    with running(program, what, library) as process:
        wait_for(lambda: stops_of(recorder, process.pid) == {"root"})
        process.send_signal(signal.SIGUSR1)
        pid = process.pid
        if what == "fork":
            children = Path(f"/proc/{pid}/task/{pid}/children")
            wait_for(children.read_text)
            pid = int(children.read_text())
        elif what == "exec":
            wait_for(lambda: Path(f"/proc/{pid}/comm").read_text() == "sleepless\n")
        else:
            wait_for(lambda: str(library) in Path(f"/proc/{pid}/maps").read_text())

        wait_for(lambda: stops_of(recorder, pid) == {"root"})


def test_code_that_was_moved_is_found(recorder, tmp_path):
    """The kernel writes no record of mremap."""
    program = compile_target("moved.c", tmp_path / "moved", "-O1", *NO_FRAME_POINTERS)

    with running(program) as process:

        def are_whole() -> bool:
            recorder.catch_up()
            recorder.drain()
            return stops_of(recorder, process.pid) == {"root"}

        wait_for(are_whole, timeout_s=20)


def test_a_tick_of_earlier_takes_no_mappings_from_the_walk(recorder, tmp_path):
    """One inside execve, as an example, when nothing was mapped yet."""
    program = compile_target("changing.c", tmp_path / "changing", *CHANGING)

    with running(program, "open", "none") as process:
        wait_for(lambda: stops_of(recorder, process.pid) == {"root"})
        sample = next(iter(drained_of(recorder, process.pid)))
        recorder.unwinding.note({MappingTable.of([]): [sample]})
        recorder.sampler.drain()
        later = drained_of(recorder, process.pid)

    assert {s.stop for s in later} == {"root"}


def drained_of(recorder: Recorder, pid: int) -> list[RawSample]:
    """Return the samples of a process, from the first drain that has any."""
    found: list[RawSample] = []
    wait_for(
        lambda: found.extend(s for s in recorder.sampler.drain().samples if s.pid == pid) or found
    )
    return found


FRAMES = """
volatile long n;
__attribute__((noinline)) void spin(void) { volatile char room[SIZE]; room[0] = 1;
  while (n >= 0) room[0]++; }
__attribute__((noinline)) void middle(void) { volatile char room[SIZE]; room[1] = 2; spin();
  room[1] = 3; }
int main(void) { middle(); return n; }
"""


def test_a_program_that_was_built_again_has_its_own_rules(recorder, tmp_path):
    """Without a build id, in the same inode, under the same name: it looks like the old one."""
    (tmp_path / "frames.c").write_text(FRAMES)
    program = tmp_path / "program"
    for size in (64, 4096):
        flags = ("-O1", *NO_FRAME_POINTERS, "-Wl,--build-id=none", f"-DSIZE={size}")
        built = compile_target(str(tmp_path / "frames.c"), tmp_path / "built", *flags)
        with program.open("ab") as file:  # not replaced
            file.truncate(0)
            file.write(built.read_bytes())
        program.chmod(0o755)
        with running(program) as process:
            wait_for(lambda pid=process.pid: stops_of(recorder, pid) == {"root"})


def with_rows(folder: Path, name: str, count: int) -> Path:
    """Compile a program that spins, and has a table of so many rows besides."""
    rules = "".join(f"nop\n.cfi_def_cfa_offset {8 * i}\n" for i in range(2, 9))
    (folder / f"{name}.s").write_text(
        f".text\n.rept {count // 8}\n.cfi_startproc\n{rules}nop\n.cfi_endproc\n.endr\n"
        ".section .note.GNU-stack\n"
    )
    return compile_target(
        "parked.c", folder / name, "-O2", *NO_FRAME_POINTERS, str(folder / f"{name}.s")
    )


def test_a_program_that_got_other_names_is_looked_at_again_when_it_is_sampled(
    recorder, tmp_path, monkeypatch
):
    """Its build id, its path and its inode are the same: the linker hashes no names."""
    monkeypatch.setattr(mapped_files, "_SEEN_AGAIN_S", 0.0)
    program = tmp_path / "program"

    def functions_of(pid: int) -> set[str]:
        recorder.sampler.select({pid})
        recorder.step()
        recorder.catch_up()
        time.sleep(0.2)
        names = recorder.close_window().names
        return {frame.function for frames in names for frame in frames}

    for name in ("before", "after"):
        source = f"volatile long n; int {name}() {{ while (n >= 0) n++; return 1; }}"
        built = build(
            tmp_path / name,
            f"{source} int main() {{ return {name}() + 1; }}",
            *("-O1", "-Wl,--build-id=0x00112233445566778899aabbccddeeff00112244"),
        )
        program.touch(mode=0o755)
        program.write_bytes(built.read_bytes())
        with running(program) as process:
            wait_for(lambda name=name, pid=process.pid: name in functions_of(pid))


def test_tables_in_use_stay_and_those_that_are_not_make_room(tmp_path, monkeypatch):
    """Where two do not fit, the second waits, says so, and comes in when the first is unused."""
    monkeypatch.setattr(table_loading, "_UNUSED_S", 1.0)
    monkeypatch.setattr(unwinding, "_SWEEP_S", 0.2)
    monkeypatch.setattr(table_loading, "_WAIT_S", 3.0)
    first, second = (with_rows(tmp_path, name, n) for name, n in (("a", 200_000), ("b", 202_000)))

    with running(first, "recursion") as one, running(second, "recursion") as two:
        two.send_signal(signal.SIGSTOP)
        with Sampler(SamplerConfig()) as empty:
            fixed_bytes = empty.tables.memory_bytes - SHARD_BYTES
        config = SamplerConfig(
            frequency_hz=499,
            pids=frozenset({one.pid, two.pid}),  # nobody else's tables come in between
            tables_limit_bytes=fixed_bytes + 2 * SHARD_BYTES - 1,
        )
        with Recorder(config, tmp_path / "cache") as recorder:
            recorder.start()
            wait_for(lambda: stops_of(recorder, one.pid) == {"root"})
            two.send_signal(signal.SIGCONT)
            wait_for(lambda: stops_of(recorder, two.pid) == {"no_room"})
            stops: set[str] = set()
            wait_for(lambda: stops.update(stops_of(recorder, one.pid)) or stops)
            assert stops == {"root"}
            assert recorder.unwinding.status()["tables_waiting"] == 1
            one.send_signal(signal.SIGSTOP)
            wait_for(lambda: stops_of(recorder, two.pid) == {"root"})
            status = recorder.unwinding.status()

    assert status["tables_evicted"] >= 1
    assert status["tables_waiting"] == 0
    assert status["kernel_bytes"] <= config.tables_limit_bytes


def builds_interrupted(recorder: Recorder) -> int:
    return recorder.unwinding.status()["builds_interrupted"]


def test_a_table_that_a_reader_fails_at_is_tried_again_and_then_given_up(tmp_path, monkeypatch):
    """A lack of memory or time passes; a table at which readers fail again and again costs them."""
    monkeypatch.setattr(table_loading, "_WAIT_S", 1.0)
    crashing = partial(Readers, kinds="tests.support.crashing_kinds")
    monkeypatch.setattr("profiler.agent.pipeline.Readers", crashing)
    first, second = (with_rows(tmp_path, name, n) for name, n in (("a", 400_000), ("b", 402_000)))
    config = SamplerConfig(frequency_hz=499, pids=frozenset())

    with Recorder(config, tmp_path / "cache") as recorder:
        crash = tmp_path / "cache" / "crash"
        crash.touch()
        recorder.start()
        with running(first, "recursion") as process:
            wait_for(lambda: stops_of(recorder, process.pid) and builds_interrupted(recorder) >= 1)
            crash.unlink()
            wait_for(lambda: stops_of(recorder, process.pid) == {"root"})
        until = builds_interrupted(recorder) + 3
        crash.touch()
        with running(second, "recursion") as process:
            wait_for(
                lambda: stops_of(recorder, process.pid) and builds_interrupted(recorder) == until
            )
            stops_of(recorder, process.pid, seconds=3)  # several times as long as the pause
            wait_for(lambda: stops_of(recorder, process.pid) == {"no_table"})

        assert builds_interrupted(recorder) == until


def test_tables_are_built_once_the_disk_of_the_cache_has_room_again(tmp_path, monkeypatch, caplog):
    """However long it was full: what ran meanwhile has whole stacks again, and the log says why."""
    monkeypatch.setattr(table_loading, "_WAIT_S", 0.2)
    parked = compile_target("parked.c", tmp_path / "parked", "-O2", *NO_FRAME_POINTERS)
    config = SamplerConfig(frequency_hz=499, pids=frozenset())
    with small(tmp_path / "cache", 8 << 20) as cache, Recorder(config, cache) as recorder:
        filler = cache / "filler"
        fill(filler)
        recorder.start()
        with running(parked, "recursion") as process:
            failures = recorder.readers.failures
            wait_for(lambda: stops_of(recorder, process.pid) and failures[Failure.UNWRITTEN] > 20)
            is_whole_without = "root" in stops_of(recorder, process.pid)
            filler.unlink()

            wait_for(lambda: stops_of(recorder, process.pid) == {"root"})

    assert not is_whole_without
    assert "No space left on device" in caplog.text
    assert builds_interrupted(recorder) == 0


def test_a_table_that_cannot_be_used_is_built_again(tmp_path):
    """One that another version of this program has left in the cache, or a disk has damaged."""
    version_at, rows_at = 8, -1
    config = SamplerConfig(frequency_hz=499, pids=frozenset())
    parked = compile_target("parked.c", tmp_path / "parked", "-O2", *NO_FRAME_POINTERS)
    cache = tmp_path / "cache"
    for place in (version_at, rows_at, None):
        with running(parked, "recursion") as process, Recorder(config, cache) as recorder:
            recorder.start()
            wait_for(lambda pid=process.pid, r=recorder: stops_of(r, pid) == {"root"}, timeout_s=30)
        for file in (cache / "unwind").iterdir() if place is not None else ():
            content = bytearray(file.read_bytes())
            if not content:  # a reader that was ended has begun it
                continue
            content[place] ^= 1
            file.write_bytes(content)


def test_files_for_which_no_number_is_left_are_counted(tmp_path, monkeypatch):
    """The kernel knows so many at a time; stacks through others may be cut short."""
    monkeypatch.setattr(unwinding, "EXECUTABLES_CAPACITY", 2)
    program = compile_target("parked.c", tmp_path / "parked", "-O2", *NO_FRAME_POINTERS)

    with (
        Recorder(SamplerConfig(frequency_hz=499, pids=frozenset()), tmp_path / "cache") as recorder,
        running(program, "recursion") as process,
    ):
        recorder.start()
        assert recorder.unwinding.status()["mappings_without_number"] == 0
        wait_for(lambda: stops_of(recorder, process.pid))
        wait_for(
            lambda: (
                stops_of(recorder, process.pid)
                and recorder.unwinding.status()["mappings_without_number"] > 0
            )
        )


@pytest.mark.parametrize("seed", range(4))
def test_damaged_call_frame_information_harms_nobody_else(seed, recorder, tmp_path):
    """A file whose .eh_frame is noise: its own stacks may be cut short, and nothing more."""
    honest = compile_target("parked.c", tmp_path / "honest", "-O2", *NO_FRAME_POINTERS)
    damaged = tmp_path / "damaged"
    content = bytearray(honest.read_bytes())
    start, size = place_of(honest, ".eh_frame")
    noise = random.Random(seed)
    for at in range(start, start + size):
        if noise.random() < (0.02, 0.1, 0.5, 1)[seed]:
            content[at] = noise.randrange(256)
    damaged.write_bytes(content)
    damaged.chmod(0o755)

    with running(damaged, "recursion") as process, running(honest, "recursion") as other:
        wait_for(lambda: not any("yet" in stop for stop in stops_of(recorder, process.pid)))
        wait_for(lambda: stops_of(recorder, other.pid) == {"root"})


def place_of(path: Path, section: str) -> tuple[int, int]:
    elf = read_elf(FileSource(os.open(path, os.O_RDONLY)))
    (found,) = (each for each in elf.sections if each.name == section.encode())
    return found.offset, found.size


def drained(recorder: Recorder) -> int:
    """Take in what was counted; return how many samples the open window has."""
    recorder.drain()
    return recorder.counts.stored


def test_stacks_are_whole_from_the_first_tick_that_counts(tmp_path):
    """What runs already is known at the start, though no cache has a table of it."""
    program = compile_target("parked.c", tmp_path / "parked", "-O2", *NO_FRAME_POINTERS)

    with all_parked(program, ("recursion", "callback", "alloca")) as pids:
        config = SamplerConfig(frequency_hz=499, pids=frozenset(pids.values()))
        with Recorder(config, tmp_path / "cache") as recorder:
            recorder.start()
            wait_for(lambda: drained(recorder) >= 50)
            stops = dict(recorder.counts.stops)

    assert set(stops) == {"root"}


def test_tables_are_there_for_stacks_that_are_unwound_later(recorder, tmp_path, monkeypatch):
    """Also of a process that is gone, and after the cache on disk has lost them."""
    program = compile_target("parked.c", tmp_path / "parked", "-O2", *NO_FRAME_POINTERS)
    with running(program, "recursion") as process:
        wait_for(lambda: has_execed(process.pid))
        recorder.address_spaces.poll()
        mappings = recorder.address_spaces.mappings(process.pid, time.monotonic_ns())
    place = next(i for i, m in enumerate(mappings.mappings) if m.path == os.fsencode(program))

    def table() -> PagedRows | Miss:
        recorder.catch_up()
        return recorder.unwinding.table_of(mappings, place, process.pid)

    assert table() == Miss.NOT_READ
    wait_for(lambda: not isinstance(table(), Miss))
    first = table()
    kept = recorder.unwinding._loader._kept
    recorder.unwinding._loader.note_use([])
    assert first.key in kept
    monkeypatch.setattr(table_loading, "_KEPT_S", -1.0)
    recorder.unwinding._loader.note_use([])
    assert not kept  # nor a descriptor of what nobody uses
    for cached in recorder.unwinding._loader._cache._files.folder.iterdir():
        cached.unlink()
    assert table() == Miss.NOT_READ
    wait_for(lambda: not isinstance(table(), Miss))

    assert first.row_count
    again = table()
    for page in range(len(first.pages)):
        assert np.array_equal(again.rows_of(page), first.rows_of(page))


COLLECTING = """
package main
import "runtime"
type node struct { left, right *node }
//go:noinline
func grow(depth int) *node {
  if depth == 0 { return nil }
  return &node{grow(depth - 1), grow(depth - 1)}
}
func main() {
  tree := grow(18)
  for { runtime.GC(); runtime.KeepAlive(tree) }
}
"""


def test_go_stacks_go_on_where_a_function_was_called_on_another_stack(recorder, tmp_path):
    """The garbage collector marks on the threads' own stacks, which lie anywhere."""
    program = build_go(tmp_path / "collecting", COLLECTING)
    symbols = {symbol.name: symbol for symbol in read_symbols(program)}
    switch = next(s for name, s in symbols.items() if name.startswith(b"runtime.systemstack.abi0"))

    def is_through(sample: RawSample) -> bool:
        low, high = (np.uint64(switch.address + size) for size in (0, switch.size))
        return bool(((sample.user[1:] >= low) & (sample.user[1:] < high)).any())

    found: list[RawSample] = []
    with running("nice", program) as process:
        while len(found) < 20:
            samples = samples_of(recorder, {process.pid})[process.pid]
            # While a table or mappings are being written, ticks are walked by frame pointers.
            found += [each for each in samples if is_through(each) and "yet" not in each.stop]

    assert {sample.stop for sample in found} == {"root"}
