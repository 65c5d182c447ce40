"""perf script: fields that are missing, hostile names, several events, odd lines."""

import re
import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiler.flamegraph import flamegraph
from profiler.formats.readers import perf_script
from profiler.formats.readers.result import ChoiceError
from profiler.formats.reading import Reading, ReadOptions, read_bytes
from storage.columns import Columns
from storage.formats import folded
from storage.profile import Profile, ProfileError, Window
from symbolizer.location import Kind

SCRIPT = b"""# ========
# captured on    : Sat Nov 21 10:00:00 2026
#
perl 12345/12346 [001]  1234.567890:   10101010 cpu-clock:pppH:\x20
\tffffffff81000010 do_syscall_64+0x1 ([kernel.kallsyms])
\t    7f0000002000 [unknown] (/usr/lib/libc.so.6 (deleted))
\t    7f0000001000 Perl_runops(int, (anonymous namespace)::x) const+0x12 (/usr/bin/perl)

      my worker 1 77/77 [000]  1235.567890:   10101010 cpu-clock:pppH:\x20
\t    7f0000001000 a;b\xff+0x1 (/tmp/perf-77.map)
\t    7f0000001001 clamp (inlined)
\t    7f0000001001 main+0x1 (/srv/api)

"""


def stacks(profile: Profile) -> dict[str, int]:
    return {
        line.rpartition(" ")[0]: int(line.rpartition(" ")[2])
        for line in folded.encode(Columns.of(profile), by=("comm", "pid")).decode().splitlines()
    }


def read(*lines: bytes, event: str = "") -> Reading:
    return read_bytes(b"\n".join(lines), ReadOptions(event=event))


def labels(reading: Reading) -> list[dict[str, str]]:
    return [dict(each) for each in reading.profile.label_sets]


FRAME = b"\t401136 f+0x6 (/usr/bin/prog)"


def test_perf_script_is_read_with_kernel_frames_and_hostile_names():
    """Names with spaces, digits, semicolons, parentheses; deleted files; frames without symbols."""
    found = read_bytes(SCRIPT)

    assert stacks(found.profile) == {
        "perl;12345;Perl_runops(int, (anonymous namespace)::x) const;[libc.so.6];"
        "do_syscall_64_[k]": 1,
        "my worker 1;77;main;clamp_[i];a\\x3bb\\xff_[j]": 1,
    }
    assert found.profile.total_value == 2 * 10_101_010
    assert found.warnings == ()
    modules = {frame.module for frame in flamegraph.build(Columns.of(found.profile)).frames}
    assert modules == {"", "perl", "libc.so.6", "[kernel.kallsyms]", "[jit]", "api"}


def test_perf_script_without_call_chains_is_read():
    """One line per sample, with the address at its end."""
    line = (
        b"swapper     0 [000] 12.000000: 1 cycles:  ffffffff81 native_halt+0xb ([kernel.kallsyms])"
    )

    found = read(line, line)

    assert stacks(found.profile) == {"swapper;0;native_halt_[k]": 2}
    assert found.profile.type == "samples"


@pytest.mark.parametrize(
    ("header", "comm", "pid"),
    [
        (b"prog  100/100  [000]   500.000000:   10101010 cpu-clock:ppp: ", "prog", "100"),
        (b"prog 100/100 500.000000: 10101010 cpu-clock:ppp:", "prog", "100"),
        (b"prog\t100/100 [007] 500.500000:\t\t1000000 task-clock:u:", "prog", "100"),
        (b"prog 100/100 [000] 500.000000000: cycles: ", "prog", "100"),
        (b"prog 100/100 [000] U 500.000000: 1 cycles: ", "prog", "100"),
        (b"prog 100/100 [000] cycles: ", "prog", "100"),
        (b"prog 100/100 1000 cycles: ", "prog", "100"),
        (b"prog 100/100 cycles: ", "prog", "100"),
        (b"prog 100/100 [000] 500.000000: ", "prog", "100"),
        (b"prog 100/100", "prog", "100"),
        (b"prog  100/100  ", "prog", "100"),
        (b"prog 100 cycles: ", "prog", None),
        (b"prog 100 [000] 500.000000: cycles: ", "prog", None),
        (b"prog  3276.069048: cpu-clock: ", "prog", None),
        (b"prog [000] 500.000000: cycles: ", "prog", None),
        (b"com.example.app.background  7/8 [007] 5.5: 201198 cpu-clock: ",
         "com.example.app.background", "7"),
        (b"a name of several words, and long 7/8 [007] 5.5: 1 cycles: ",
         "a name of several words, and long", "7"),
        (b"#worker 7/7 [007] 5.5: 1 cycles: ", "#worker", "7"),
        (b"# 7/7 [007] 5.5: 1 cycles: ", "#", "7"),
        (b"a:b: 7/7 [007] 5.5: 1 cycles: ", "a:b:", "7"),
        (b"kworker/0:1-eve 7/7 [007] 5.5: 1 cycles: ", "kworker/0:1-eve", "7"),
        (b":7 7/7 [007] 5.5: 1 cycles: ", ":7", "7"),
        (b"  7/7 [007] 5.5: 1 cycles: ", None, "7"),
        (b"Web Content 7/7 [007] 5.5: 1 cycles: ", "Web Content", "7"),
        (b"1 2.0: 3 x: 9 9 88/88 [001] 7.500000: 4 cpu-clock: ", "1 2.0: 3 x: 9 9", "88"),
    ],
)  # fmt: skip
def test_fields_may_be_missing_and_names_hold_anything(header, comm, pid):
    """perf script -F chooses fields; a process may call itself as it likes."""
    found = read(header, FRAME, b"", header, FRAME)

    (found_labels,) = labels(found)
    assert (found_labels.get("comm"), found_labels.get("pid")) == (comm, pid)
    assert stack_names(found) == {("f",): 2}
    assert not any("left out" in warning for warning in found.warnings)


def stack_names(reading: Reading) -> dict[tuple[str, ...], int]:
    counts: dict[tuple[str, ...], int] = {}
    for row in reading.profile.rows():
        stack = tuple(place.function for place in row.stack)
        counts[stack] = counts.get(stack, 0) + row.samples
    return counts


@pytest.mark.parametrize(
    ("line", "function", "module", "kind"),
    [
        (b"\t401136 f+0x6 (/usr/bin/prog)", "f", "prog", Kind.NATIVE),
        (b"        b3cea6c4\tLock::unlock() (/system/lib/libc.so)", "Lock::unlock()", "libc.so",
         Kind.NATIVE),
        (b"\t401136 f+0x6", "f", "", Kind.NATIVE),
        (b"\t401136 f", "f", "", Kind.NATIVE),
        (b"\t0x401136 f (/usr/bin/prog)", "f", "prog", Kind.NATIVE),
        (b"\t401136 (/usr/bin/prog)", "[prog]", "prog", Kind.NATIVE),
        (b"\t401136 f+0x6 (/opt/my app (x86)/prog)", "f", "prog", Kind.NATIVE),
        (b"\t401136 f+0x6 (/usr/bin/prog+0x1136)", "f", "prog", Kind.NATIVE),
        (b"\t401136 f+0x6 (/usr/bin/prog (deleted))", "f", "prog", Kind.NATIVE),
        (b"\t401136 [unknown] ([unknown])", "[unknown]", "", Kind.NATIVE),
        (b"\tffff80001000 f ([guest.kernel.kallsyms])", "f", "[guest.kernel.kallsyms]",
         Kind.KERNEL),
        (b"\tffffffffc0001000 f+0x1 ([nf_tables])", "f", "[nf_tables]", Kind.KERNEL),
        (b"\tc0001000 f+0x1 (/lib/modules/6.1/kernel/x.ko)", "f", "x.ko", Kind.KERNEL),
        (b"\t401136 f+0x6 (/tmp/jitted-7-3.so)", "f", "[jit]", Kind.JIT),
        (b"\t401136 std::unique_ptr<T>::operator->()+0x6 (/tmp/perf-7.map)",
         "std::unique_ptr<T>::operator->()", "[jit]", Kind.JIT),
        (b"\t401136 f(A->B)+0x6 (/usr/bin/prog)", "f(A->B)", "prog", Kind.NATIVE),
        (b"\t401136 fn(i32) -> i32+0x6 (/tmp/perf-7.map)", "fn(i32) -> i32", "[jit]", Kind.JIT),
    ],
)  # fmt: skip
def test_frames_have_many_forms(line, function, module, kind):
    """With and without offset, symbol and module, of programs, the kernel and JIT compilers."""
    found = read(b"a 1/1 1.0: 5 cycles: ", line, b"")

    (place,) = found.profile.locations
    assert (place.function, place.module, place.kind) == (function, module, kind)
    assert found.warnings == ()


def test_arrows_of_perf_map_agent_are_inlined_calls():
    """The outer function first, then what was inlined into it."""
    found = read(b"a 1/1 1.0: 5 cycles: ", b"\t12 A::a->B::b->C::c+0x6 (/tmp/perf-7.map)", FRAME)

    (row,) = found.profile.rows()
    assert [(place.function, place.kind) for place in row.stack] == [
        ("f", Kind.NATIVE),
        ("A::a", Kind.JIT),
        ("B::b", Kind.INLINED),
        ("C::c", Kind.INLINED),
    ]


def test_source_lines_belong_to_the_frame_above():
    """perf script -F +srcline."""
    found = read(b"a 1/1 1.0: 5 cycles: ", FRAME, b"  prog.c:12", FRAME, b"  ??:0", FRAME,
                 b"  [kernel.kallsyms][ffffffff82200809]", b"")  # fmt: skip

    assert {(place.file, place.line) for place in found.profile.locations} == {
        ("prog.c", 12),
        ("", 0),
    }
    assert found.warnings == ()


def test_an_event_is_chosen_by_any_of_its_names():
    """As perf prints it, without precision, and without its only side."""
    lines = (b"a 1/1 1.0: 1 faults: ", FRAME, b"", b"a 1/1 1.0: 9 cycles:uppp: ", FRAME, b"")

    for name in ("cycles:uppp", "cycles:u", "cycles"):
        assert read(*lines, event=name).profile.total_samples == 1
    with pytest.raises(ChoiceError, match="there are faults, cycles:u"):
        read(*lines, event="cycles:k")


def test_cpu_time_is_read_where_there_is_one():
    """It may not be the first of several events."""
    found = read(
        b"a 1/1 1.0: 1 page-faults: ", FRAME, b"",
        b"a 1/1 1.0: 1000 cpu-clock:u: ", FRAME, b"",
    )  # fmt: skip

    assert (found.profile.type, found.profile.total_value) == ("cpu", 1000)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (b"kmem:kmalloc: call_site=ffffffff8100 bytes_req=8", b"kmem:kfree: call_site=ffffffff81"),
        (b"5 cycles: ", b"5 faults: "),
        (b"5 cycles:u: ", b"5 cycles:k: "),
        (b"probe:f: (401136)", b"probe:g: (401136)"),
        (b"sched:sched_switch: prev_comm=1 2.0: x: next", b"5 faults: "),
    ],
)
def test_samples_of_two_events_do_not_add_up(one, other):
    """The first is read, the other one is told, and --event chooses."""
    lines = (b"a 1/1 1.0: " + one, FRAME, b"", b"a 1/1 2.0: " + other, FRAME, b"",
             b"a 1/1 3.0: " + other, FRAME, b"")  # fmt: skip
    first, second = (re.search(rb"[a-z]\S*(?=:)", each)[0].decode() for each in (one, other))

    found = read(*lines)

    assert found.profile.total_samples == 1
    assert found.warnings == (
        f"read the event {first}; left out {second} (2 samples) (--event chooses another)",
    )
    assert read(*lines, event=second).profile.total_samples == 2
    with pytest.raises(ChoiceError, match=f"no such event in it; there are {first}, {second}"):
        read(*lines, event="instructions")


@pytest.mark.parametrize(
    ("event", "key"),
    [
        ("cycles", "cycles"),
        ("cycles:ppp", "cycles"),
        ("cycles:P", "cycles"),
        ("cpu-clock:pppH", "cpu-clock"),
        ("cycles:u", "cycles:u"),
        ("cycles:uppp", "cycles:u"),
        ("cpu_core/cycles/P", "cycles"),
        ("cpu_atom/cycles/", "cycles"),
        ("cpu_atom/cycles/u", "cycles:u"),
        ("armv8_cortex_a53/cycles/", "cycles"),
        ("apple_firestorm_pmu/cycles/", "cycles"),
        ("kmem:kfree", "kmem:kfree"),
        ("probe:up", "probe:up"),
        ("mem:0x1234:rw", "mem:0x1234:rw"),
        ("cpu/event=0x3c,umask=0x0/u", "event=0x3c,umask=0x0:u"),
    ],
)
def test_precision_and_kinds_of_cores_do_not_part_an_event(event, key):
    """What is counted does, as tracepoints and the user's side alone."""
    assert perf_script.event_key(event) == key


def test_a_hybrid_cpu_counts_one_event():
    """Half of the samples come from the other kind of core."""
    found = read(
        b"p 7/7 1.0: 9 cpu_core/cycles/P: ", FRAME, b"",
        b"p 7/7 2.0: 9 cpu_atom/cycles/P: ", FRAME, b"",
    )  # fmt: skip

    assert found.profile.total_samples == 2
    assert found.warnings == ()


def test_a_lone_number_is_a_thread():
    """Its process is known only from a sample that names both."""
    found = read(
        b"java 101 [000] 5.0: 1 cycles: ", FRAME, b"",
        b"GC Thread#0 102 [000] 5.0: 1 cycles: ", FRAME, b"",
        b"java 100/103 [000] 5.0: 1 cycles: ", FRAME, b"",
        b"java 100/101 [000] 5.0: 1 cycles: ", FRAME, b"",
    )  # fmt: skip

    by_thread = {each["thread"]: each for each in labels(found)}
    java = {"comm": "java", "service": "java", "thread": "java", "pid": "100"}
    assert by_thread["java"] == java
    assert by_thread["GC Thread#0"] == {"comm": "GC Thread#0", "thread": "GC Thread#0"}
    assert found.warnings[0].startswith("1 sample without a process id")


def test_a_process_is_called_as_its_main_thread():
    """Or as its oldest, while that was not sampled; a thread keeps its own name beside it."""
    found = read(
        b"C2 CompilerThre 100/120 [000] 5.0: 1 cycles: ", FRAME, b"",
        b"java 100/101 [000] 5.0: 1 cycles: ", FRAME, b"",
        b"worker 200/201 [000] 5.0: 1 cycles: ", FRAME, b"",
        b"api 200/200 [000] 5.0: 1 cycles: ", FRAME, b"",
    )  # fmt: skip

    assert {each["thread"]: each["service"] for each in labels(found)} == {
        "C2 CompilerThre": "java",
        "java": "java",
        "worker": "api",
        "api": "api",
    }


def test_records_that_are_no_samples_are_not_read():
    """perf script --show-mmap-events, --show-task-events."""
    found = read(
        b"a 1/1 1.0: PERF_RECORD_COMM: a:1/1",
        b"a     1/1     1.0: PERF_RECORD_MMAP2 1/1: [0x1(0x2) @ 0 fd:01 1 0]: r-xp /bin/a",
        b"a 1/1 1.0: PERF_RECORD_FORK(" + b"1" * 5_000 + b":1):(1:1)",
        b"a 1/1 1.0: 5 cycles: ", FRAME, b"",
    )  # fmt: skip

    assert found.profile.total_samples == 1
    assert found.warnings == ()


def test_records_tell_the_process_of_a_thread():
    """perf script prints only threads by default; with --show-task-events also processes."""
    found = read(
        b"java 100 1.0: PERF_RECORD_COMM exec: java:100/100",
        b"java 100 1.0: PERF_RECORD_FORK(100:102):(100:100)",
        b"java 100 1.0: PERF_RECORD_COMM: GC Thread#0:100/102",
        b"GC Thread#0 102 1.0: 5 cycles: ", FRAME, b"",
    )  # fmt: skip

    assert labels(found) == [
        {"comm": "java", "pid": "100", "service": "java", "thread": "GC Thread#0"}
    ]
    assert found.warnings == ()


def test_lines_that_fit_nothing_are_left_out_and_named():
    """With the frames that follow them; the samples around them are kept."""
    lines = SCRIPT.split(b"\n")
    lines[8:8] = [b"what is this", b"\t12 lost (/x)", b"", b"\tzz not a frame", b""]

    found = read(*lines)

    assert found.warnings == (
        "left out 2 lines: the first, line 9 is neither a sample nor a frame: 'what is this'",
    )
    assert found.profile.total_samples == 2
    assert not any("lost" in stack for stack in stacks(found.profile))


def test_a_warning_before_the_first_sample_does_not_hide_it():
    """perf writes some to where the samples go."""
    found = read(b"Warning:", b"Processed 10 events and lost 1 chunks!", b"", *SCRIPT.split(b"\n"))

    assert found.profile.total_samples == 2
    assert "left out 2 lines: the first, line 1 " in found.warnings[0]


def test_perf_without_samples_is_refused():
    """Its lines look like samples of perf, but are other records."""
    with pytest.raises(ProfileError, match="cannot read perf script: it contains no samples"):
        read(b"a 1/1 1.0: PERF_RECORD_COMM: a:1/1", b"")


def test_the_window_is_that_of_the_samples():
    """Times since boot say only how long it took; those of a wall clock also when."""
    found = read_bytes(SCRIPT)
    assert found.profile.window == Window(0, 1_010_101_010)

    wall = SCRIPT.replace(b" 1234.", b" 1780000000.").replace(b" 1235.", b" 1780000001.")
    found = read_bytes(wall)
    assert found.profile.window.start_ns == 1_780_000_000_567_890_000


@given(st.lists(st.binary(max_size=60), max_size=10))
def test_any_lines_between_samples_leave_the_others_whole(noise):
    """Whatever stands in between, both samples are there, unless it belongs to them."""
    blocks = SCRIPT.split(b"\n\n")[:2]
    clean = [line for raw in noise for line in raw.split(b"\n") if b":" not in line]
    clean = [line for line in clean if b"/" not in line]
    lines = [*blocks[0].split(b"\n"), b"", *clean, b"", *blocks[1].split(b"\n"), b""]

    assert stacks(read(*lines).profile) == stacks(read_bytes(SCRIPT).profile)


@given(st.binary(max_size=300))
def test_any_bytes_after_a_sample_are_samples_or_left_out(content):
    """Nothing else comes out."""
    found = read_bytes(SCRIPT + content)

    assert found.profile.total_samples >= 2


@pytest.mark.kernel
def test_what_perf_itself_prints_is_read(tmp_path):
    """A real recording with call chains: every sample, and the kernel's frames as such."""
    perf = shutil.which("perf")
    if perf is None:
        pytest.skip("no perf: install linux-perf")
    # perf 6.1 aborts on the notes of newer kernels: it is not shown them.
    apart = ["unshare", "-m", "sh", "-c", 'mount --bind /dev/null /sys/kernel/notes && exec "$@"']
    recorded = subprocess.run(
        [*apart, "sh", perf, "record", "-a", "-q", "-e", "cpu-clock", "-F", "499", "-g", "-o",
         tmp_path / "d", "--", "python3", "-c", "import os\nfor i in range(200000): os.stat('/')"],
        capture_output=True, check=False,
    )  # fmt: skip
    if recorded.returncode:
        pytest.skip(f"perf cannot record here: {recorded.stderr.decode()[:200]}")
    printed = subprocess.run(
        [*apart, "sh", perf, "script", "-F", "+pid", "-i", tmp_path / "d"],
        capture_output=True,
        check=False,
    )
    if printed.returncode:
        pytest.skip(f"perf cannot print here: {printed.stderr.decode()[:200]}")
    script = printed.stdout

    found = read_bytes(script)

    assert found.warnings == ()
    assert found.profile.type == "cpu"
    assert found.profile.total_samples == script.count(b"cpu-clock")
    assert found.profile.total_samples > 20
    kinds = {frame.kind for frame in flamegraph.build(Columns.of(found.profile)).frames}
    assert {Kind.KERNEL, Kind.NATIVE} <= kinds
    assert Window(0, 0) < found.profile.window
