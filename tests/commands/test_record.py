"""`everflame record` as a user runs it: real processes in, files out, whatever happens."""

import os
import pty
import re
import resource
import select
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest

from bpf.sampler import SamplerConfig
from profiler.agent.recorder import Recorder
from profiler.formats.reading import read_bytes
from storage.formats import pprof
from storage.profile import Profile
from tests.support.live import wait_for
from tests.support.targets import compile_target, running

pytestmark = pytest.mark.kernel

EVERFLAME = Path(sys.executable).with_name("everflame")
TALK = "ticks = "  # a part of what record says when it is done


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_target("split.c", tmp_path_factory.mktemp("targets") / "split")


def everflame(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    options = {"timeout": 100, "capture_output": True, "text": True, **options}
    return subprocess.run([EVERFLAME, *arguments], check=False, **options)


def functions(profile: Profile) -> Counter[str]:
    """Count samples by every function that stands in a stack."""
    found: Counter[str] = Counter()
    names = {
        place: [frame.function for frame in profile.frames(i)]
        for i, place in enumerate(profile.locations)
    }
    for row in profile.rows():
        for name in {name for place in row.stack for name in names[place]}:
            found[name] += row.samples
    return found


def modules(profile: Profile) -> set[str]:
    return {frame.module for i in range(len(profile.locations)) for frame in profile.frames(i)}


def test_a_process_is_recorded_as_long_as_any_thread_runs(tmp_path) -> None:
    """Its first one may have ended before; that leaves a zombie in its place."""
    program = compile_target("generations.c", tmp_path / "program", "-O2", "-pthread")
    with running(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdin.write(b"leave-to-thread\n")
        process.stdin.flush()
        assert int(process.stdout.readline()) == process.pid

        result = everflame("record", "-p", f"{process.pid}", "--for", "2s", "-o", "x.pb.gz",
                           cwd=tmp_path)  # fmt: skip

    assert result.returncode == 0, result.stderr
    assert read_bytes((tmp_path / "x.pb.gz").read_bytes()).profile.accounting.profiled_ns > 2e9


def test_every_format_holds_the_same_profile_and_it_adds_up(split, tmp_path) -> None:
    """One recording, five files, one total. Law 1 holds in the file, and `verify` says so."""
    outputs = [
        tmp_path / f"x{ending}"
        for ending in (".pb.gz", ".folded", ".speedscope.json", ".json", ".svg")
    ]
    options = [part for output in outputs for part in ("-o", output)]

    result = everflame("record", "-F", "499", *options, "--", split, "2")

    assert result.returncode == 0, result.stderr
    recorded = pprof.decode(outputs[0].read_bytes())
    total = recorded.total_samples
    assert total > 900
    assert {"spends_sixty", "spends_thirty", "spends_ten", "main"} <= functions(recorded).keys()
    assert read_bytes(outputs[1].read_bytes()).profile.total_samples == total
    speedscope = orjson.loads(outputs[2].read_bytes())["profiles"][0]
    assert sum(speedscope["weights"]) == recorded.total_value
    assert orjson.loads(outputs[3].read_bytes())["samples"] == total
    assert "spends_sixty" in outputs[4].read_text()

    verified = everflame("verify", "--json", outputs[0])

    found = orjson.loads(verified.stdout)
    assert verified.returncode == 0
    assert found["ok"]
    lost = sum(found["lost"].values())
    assert found["ticks"] == found["stored"] + found["idle"] + found["filtered"] + lost
    assert found["stored"] == total


def test_without_an_output_a_table_and_a_file_are_given(split, tmp_path) -> None:
    """In any folder: modules of another user in it are not imported."""
    tmp_path.joinpath("bpf.py").write_text("raise SystemExit('of another user')")

    result = everflame("record", "--", split, "1", cwd=tmp_path)

    assert "spends_sixty" in result.stdout
    files = list(tmp_path.glob("*.pb.gz"))
    assert [re.sub(r"\d", "0", file.name) for file in files] == ["everflame-00000000T000000Z.pb.gz"]
    assert f"wrote ./{files[0].name}" in result.stderr


def test_a_cache_folder_that_cannot_be_made_costs_no_names(split, tmp_path) -> None:
    """A warning says what to do; names and whole stacks are as always, alone on stdout."""
    (tmp_path / "file").touch()
    cache = {**os.environ, "EVERFLAME_CACHE": str(tmp_path / "file" / "cache")}

    child = everflame("record", "-o", "-", "--", split, "1", env=cache)

    assert child.returncode == 0
    assert child.stderr.count("cannot write to the cache folder") == 1
    assert "Traceback" not in child.stderr
    assert "main;" in child.stdout
    assert all(re.fullmatch(r"\S.* \d+", line) for line in child.stdout.splitlines())
    assert TALK in child.stderr


@pytest.mark.parametrize(
    ("command", "status"),
    [("kill -9 $$", 137), ("exec no-such-program", 127)],
)
def test_the_status_is_that_of_the_command(command, status, tmp_path) -> None:
    result = everflame("record", "-o", tmp_path / "x.folded", "--", "sh", "-c", command)

    assert result.returncode == status


def test_repeated_runs_are_files_with_numbers_before_the_ending(split, tmp_path) -> None:
    outputs = ["-o", tmp_path / "v1.5.pb.gz", "-o", tmp_path / "v1.5.speedscope.json"]

    result = everflame("record", "--repeat", "2", *outputs, "--", split, "0.3")
    refused = everflame("record", "--repeat", "2", "-o", "-", "--", split, "0.3")

    assert result.returncode == 0, result.stderr
    endings = ("pb.gz", "speedscope.json")
    expected = {f"v1.5-{number}.{ending}" for number in (1, 2) for ending in endings}
    assert {path.name for path in tmp_path.iterdir()} == expected
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "stdout" in refused.stderr


def test_a_command_that_cannot_run_says_so(tmp_path) -> None:
    result = everflame("record", "-o", tmp_path / "x.folded", "--", "./no-such-program")

    assert result.returncode == 127
    assert "cannot run ./no-such-program: No such file or directory" in result.stderr


def test_the_command_keeps_its_environment_and_gets_signals_as_usual(tmp_path) -> None:
    """Nothing that everflame sets for itself is inherited: no variables, no blocked signals.

    Its exit status is that of the recording.
    """
    script = "env | grep OPENBLAS; grep -E 'Sig(Blk|Ign)' /proc/self/status; exit 7"
    given = {name: value for name, value in os.environ.items() if "OPENBLAS" not in name}
    result = everflame("record", "-o", tmp_path / "x.folded", "--", "sh", "-c", script, env=given)

    alone = subprocess.run(["sh", "-c", script], env=given, check=False, stdout=subprocess.PIPE)
    assert result.returncode == alone.returncode == 7
    assert result.stdout == alone.stdout.decode()
    assert f"SigBlk:\t{0:016x}\n" in result.stdout


def test_what_a_script_starts_in_the_background_ignores_interrupts_as_usual(tmp_path) -> None:
    output = tmp_path / "status"
    command = f"exec grep SigIgn /proc/self/status > {output}"
    recording = [str(EVERFLAME), "record", "-o", tmp_path / "x.folded", "--", "sh", "-c", command]
    script = f"{shlex.join(map(str, recording))} & wait $!"
    subprocess.run(["sh", "-c", script], check=True, capture_output=True, timeout=60)

    assert int(output.read_text().split()[1], 16) >> (signal.SIGINT - 1) & 1


@pytest.fixture
def recording(split, tmp_path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A recording of a busy process that would go on for a minute, with its first second taken."""
    file = tmp_path / "x.pb.gz"
    with running(split, "60") as busy:
        command = [EVERFLAME, "record", "-p", str(busy.pid), "--for", "60s", "-o", file]
        with running(*command, stderr=subprocess.PIPE) as process:
            wait_for(lambda: has_events(process.pid), 200)  # it compiles and reads tables first
            begun = cpu_s(busy.pid)
            wait_for(lambda: cpu_s(busy.pid) > begun + 0.5)
            yield process, file


def has_events(pid: int) -> bool:
    links = [link_of(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
    # One that ticks and two for the records of processes, on each CPU.
    return links.count("anon_inode:[perf_event]") >= 3 * len(os.sched_getaffinity(0))


def link_of(path: Path) -> str:
    try:
        return str(path.readlink())
    except FileNotFoundError:  # closed since the folder was listed
        return ""


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("met", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_recording_and_the_file_is_written(met, recording) -> None:
    process, file = recording

    process.send_signal(met)
    _, talk = process.communicate(timeout=100)

    assert process.returncode == 0
    assert TALK in talk.decode()
    assert functions(pprof.decode(file.read_bytes()))["spends_sixty"] > 10, talk.decode()


def test_a_terminal_that_goes_ends_the_recording_and_the_file_is_written(tmp_path) -> None:
    """As when an ssh connection ends: SIGHUP, and what is written to the terminal fails."""
    file = tmp_path / "x.pb.gz"
    pid, terminal = pty.fork()
    if not pid:
        os.execv(EVERFLAME, [EVERFLAME, "record", "-F", "499", "--for", "60s", "-o", file])
    shown = b""
    while b" samples " not in shown:  # of the line that is rewritten each second
        assert select.select([terminal], [], [], 60)[0]
        shown += os.read(terminal, 4096)
    os.close(terminal)

    _, status = os.waitpid(pid, 0)

    assert os.waitstatus_to_exitcode(status) == 0
    assert pprof.decode(file.read_bytes()).total_samples


def test_a_fault_in_a_step_does_not_take_what_was_counted_before(tmp_path) -> None:
    """For a second no file can be opened; the ticks that were drained then are counted as lost."""
    file = tmp_path / "x.pb.gz"
    with running(EVERFLAME, "record", "-o", file, stderr=subprocess.PIPE) as process:
        assert process.stderr.readline().startswith(b"sampling all CPUs ")
        limits = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        wait_for(lambda: cpu_s(process.pid) > 0)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (4, limits[1]))
        told = next(line for line in process.stderr if b"survived a fault" in line)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, limits)
        process.terminate()
        _, talk = process.communicate(timeout=100)

    counts = pprof.decode(file.read_bytes()).accounting
    assert process.returncode == 0
    assert told.startswith(b"everflame: survived a fault stage=recording error=OSError: ")
    assert b"Traceback" not in talk
    assert counts.ticks > 0
    assert counts.mismatch == 0


def test_sigkill_leaves_nothing_behind(recording) -> None:
    """No child, no loaded program, no half-written file."""
    process, file = recording
    children = [
        int(pid)
        for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]
    programs = {
        number
        for path in Path(f"/proc/{process.pid}/fdinfo").iterdir()
        for number in re.findall(r"^prog_id:\t(\d+)$", path.read_text(), re.MULTILINE)
    }

    process.kill()
    process.communicate()

    assert programs
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children))
    wait_for(lambda: not any(is_loaded(int(number)) for number in programs))
    assert list(file.parent.iterdir()) == []


def is_loaded(program: int) -> bool:
    from bpf import syscalls

    try:
        os.close(syscalls.program_by_id(program))
    except syscalls.SyscallError:
        return False
    return True


def test_a_recording_ends_when_its_processes_have_ended(split, tmp_path) -> None:
    """Before its time is over, and says so."""
    with running(split, "60") as process:
        command = ["record", "-p", f"{process.pid}", "--for", "10m", "-o", tmp_path / "x.folded"]
        with running(EVERFLAME, *command, stderr=subprocess.PIPE) as recording:
            assert recording.stderr.readline().startswith(b"sampling process ")
            process.kill()
            process.wait()
            _, talk = recording.communicate(timeout=100)

    assert recording.returncode == 0
    ended = rf"^stopped after \d+\.\d s: process {process.pid} ended$"
    assert re.search(ended, talk.decode(), re.M)


def test_a_thread_stands_for_its_process(tmp_path) -> None:
    script = (
        "import threading, time\n"
        "def work():\n"
        "    print(threading.get_native_id(), flush=True)\n"
        "    while True: pass\n"
        "threading.Thread(target=work).start()"
    )
    with running(sys.executable, "-c", script, stdout=subprocess.PIPE) as process:
        tid = int(process.stdout.readline())
        result = everflame("record", "-p", f"{tid}", "--for", "1s", "-o", "-")

    assert result.returncode == 0, result.stderr
    assert result.stdout
    assert f"{tid} is a thread: its whole process, {process.pid}, is recorded" in result.stderr


def test_a_process_that_ends_before_sampling_begins_is_an_error(tmp_path) -> None:
    """Not a recording without samples."""
    with running("sleep", "60") as process:
        command = [EVERFLAME, "record", "-p", str(process.pid), "-o", tmp_path / "x.folded"]
        with running(*command, stderr=subprocess.PIPE) as recording:
            children = Path(f"/proc/{recording.pid}/task/{recording.pid}/children")
            wait_for(children.read_text, what="the child that compiles")
            process.kill()
            process.wait()
            _, talk = recording.communicate(timeout=100)

    assert recording.returncode == 2
    assert talk.decode() == (
        f"everflame: cannot record process {process.pid}: ended before sampling began\n"
    )


def test_who_waits_is_told_when_the_first_tick_can_be_counted(split, tmp_path) -> None:
    """By a line on stderr, which is no terminal, and on the descriptor; the command comes after."""
    reads, writes = os.pipe()
    with (tmp_path / "talk").open("wb") as talk:
        command = ["record", f"--ready-fd={writes}", "-o", tmp_path / "x.folded", "--", split, "2"]
        process = subprocess.Popen([EVERFLAME, *command], stderr=talk, pass_fds=[writes])
    os.close(writes)
    with process, os.fdopen(reads) as ready:
        told = ready.read()
        counts = has_events(process.pid)

        assert process.wait(60) == 0
    assert told == "ready\n"
    assert counts
    assert (tmp_path / "talk").read_text().startswith(f"sampling {split} 2 at 99 Hz\n")


def test_one_output_on_a_full_disk_leaves_the_other(tmp_path) -> None:
    full, good = tmp_path / "full", tmp_path / "x.folded"
    full.mkdir()
    script = (
        f"mount -t tmpfs -o size=4k none {full} && {{ head -c 4096 /dev/zero > {full}/x; }}"
        f" && exec {EVERFLAME} record --for 1s -o {full}/x.folded -o {good}"
    )
    result = subprocess.run(
        ["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, check=False
    )

    assert result.returncode == 2
    assert good.read_text()
    problem = f"everflame: cannot write {full}/x.folded: No space left on device"
    assert result.stderr.splitlines()[-1] == problem


def test_threads_are_told_apart_by_their_names(tmp_path) -> None:
    script = (
        "import threading, ctypes\n"
        "def work():\n"
        "    ctypes.CDLL(None).prctl(15, b'worker', 0, 0, 0)\n"
        "    sum(range(5 * 10**7))\n"
        "thread = threading.Thread(target=work); thread.start(); thread.join()"
    )
    file = tmp_path / "x.pb.gz"

    everflame("record", "-o", file, "--", sys.executable, "-c", script)

    labels = [dict(row.labels) for row in pprof.decode(file.read_bytes()).rows()]
    assert "worker" in {label["thread"] for label in labels}
    assert "worker" not in {label["comm"] for label in labels}


def test_a_program_replaced_while_it_runs_keeps_its_own_names(split, tmp_path) -> None:
    """The file at its path is another program by now; the running one is a deleted file."""
    program = tmp_path / "program"
    program.write_bytes(split.read_bytes())
    program.chmod(0o755)
    file = tmp_path / "x.pb.gz"
    with running(program, "60") as process:
        other = compile_target("chain.c", tmp_path / "other")
        other.rename(program)

        everflame("record", "-F", "499", "-p", str(process.pid), "--for", "2s", "-o", file)

    found = functions(pprof.decode(file.read_bytes()))
    assert found["spends_sixty"] > 10
    assert not {"outer", "middle", "inner"} & found.keys()


def test_a_program_in_another_root_is_named_from_that_root(split, tmp_path) -> None:
    """As in a container: its mount namespace has another program at the same path."""
    decoy = compile_target("chain.c", tmp_path / "program")
    inside = tmp_path / "inside"
    inside.mkdir()
    file = tmp_path / "x.pb.gz"
    script = (
        f"mount -t tmpfs none {inside} && cp {split} {inside}/program"
        f" && mount --bind {inside}/program {decoy} && exec {decoy} 60"
    )
    with running("unshare", "-m", "sh", "-c", script) as process:
        wait_for(lambda: exe_of(process.pid).name == "program")

        everflame("record", "-F", "499", "-p", str(process.pid), "--for", "2s", "-o", file)

    found = functions(pprof.decode(file.read_bytes()))
    assert found["spends_sixty"] > 10
    assert "outer" not in found


def exe_of(pid: int) -> Path:
    return Path(f"/proc/{pid}/exe").readlink()


HOSTILE = b"a;b\n<script>\x1b[31m\xff"


def test_hostile_names_reach_every_output_in_a_harmless_form(tmp_path) -> None:
    """A thread's name and a file's name with a separator, a newline, markup, escapes, no UTF-8."""
    program = bytes(tmp_path) + b"/" + HOSTILE.replace(b"/", b"") + "\u202e".encode()
    source = tmp_path / "hostile.c"
    source.write_text(
        "#include <sys/prctl.h>\nvolatile long n; int main(void) {"
        ' prctl(PR_SET_NAME, "a;b\\n<script>\\x1b\\xff"); for (n = 0; n < 1000000000; n++); }'
    )
    compile_target(str(source), Path(os.fsdecode(program)), "-s", "-O1", "-fno-omit-frame-pointer")
    outputs = [
        tmp_path / f"x{ending}"
        for ending in (".pb.gz", ".folded", ".speedscope.json", ".json", ".svg")
    ]
    options = [part for output in outputs for part in ("-o", output)]

    result = subprocess.run(
        [os.fsencode(EVERFLAME), b"record", *map(os.fsencode, options), b"--", program],
        capture_output=True,
        timeout=60,
        check=True,
    )
    drawn = everflame("flamegraph", outputs[0]).stdout

    for text in (*(output.read_bytes() for output in outputs[1:]), result.stdout, drawn.encode()):
        assert b"\x1b[31m" not in text
        assert "\u202e".encode() not in text
        text.decode("utf-8")
    assert b"<script" not in outputs[4].read_bytes().lower()
    lines = outputs[1].read_bytes().splitlines()
    assert lines
    assert all(re.fullmatch(rb"[^\x00-\x1f]+ \d+", line) for line in lines)
    assert all(line.startswith(rb"a\x3bb\n<script>") or b"script" not in line for line in lines)


def test_what_cannot_be_done_is_one_line_that_says_what_to_do(tmp_path) -> None:
    cases = {
        ("record", "-p", "999999999"): "there is no such process",
        ("record", "-F", "1000"): "1 to 999",
        ("record", "--for", "soon"): "try 30s, 2m or 1h",
        ("record", "-o", "x.docx"): ".svg",
        ("record", "-o", "/no/such/folder/x.svg"): "/no/such/folder",
        ("flamegraph", "/no/such/file.pb.gz"): "no such file",
        ("export", __file__, "-o", "x.svg"): "text of no format",
    }
    for arguments, remedy in cases.items():
        result = everflame(*arguments, cwd=tmp_path)

        assert result.returncode == 2, arguments
        assert remedy in result.stderr.splitlines()[-1], arguments
        assert "Traceback" not in result.stderr


def test_without_rights_it_says_which_are_missing(tmp_path) -> None:
    """Without any capability: one line that says what to do, and nothing written."""
    file = tmp_path / "x.svg"

    result = subprocess.run(
        [
            "setpriv",
            "--bounding-set=-all,+dac_override",
            EVERFLAME,
            "record",
            "--for",
            "1s",
            "-o",
            file,
        ],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert result.returncode == 2
    assert "root" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not file.exists()


def test_top_prints_one_table_after_another_where_there_is_no_terminal(split) -> None:
    with running(split, "60") as process:
        result = everflame("top", "-p", str(process.pid), "--for", "2s", "--interval", "1s")

    assert result.stdout.count("everflame top") == 2
    assert result.stdout.count("spends_sixty") >= 2


@pytest.mark.alone
def test_short_windows_of_an_idle_machine_can_be_read(tmp_path) -> None:
    """The kernel rounds idle times: together they may be longer than the time there was."""
    with Recorder(SamplerConfig(frequency_hz=99), tmp_path) as recorder:
        recorder.start()
        for _ in range(60):
            time.sleep(0.03)
            written = pprof.encode(recorder.close_window())
            assert pprof.decode(written).accounting.profiled_ns > 0
