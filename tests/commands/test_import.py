"""Imports: pprof, folded and perf script become objects; what does not parse is counted."""

import shutil
import subprocess

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiler import cli
from profiler.commands import import_
from profiler.commands.import_ import IncompleteFileError, parse_perf_script
from profiler.flamegraph import flamegraph
from storage.formats import folded, pprof
from storage.objects.directory import DirectoryStore
from storage.objects.keys import ObjectKey
from storage.profile import Profile, ProfileError, Window
from symbolizer.location import Kind
from tests.support import profiles as some

NOW_NS = 1_780_000_000_000_000_000
SCRIPT = b"""# ========
# captured on    : Sat Nov 21 10:00:00 2026
#
perl 12345/12346 [001]  1234.567890:   10101010 cpu-clock:pppH:\x20
\tffffffff81000010 do_syscall_64+0x1 ([kernel.kallsyms])
\t    7f0000002000 [unknown] (/usr/lib/libc.so.6 (deleted))
\t    7f0000001000 Perl_runops(int, (anonymous namespace)::x) const+0x12 (/usr/bin/perl)

      my worker 1 77 [000]  1235.567890:   10101010 cpu-clock:pppH:\x20
\t    7f0000001000 a;b\xff+0x1 (/tmp/perf-77.map)
\t    7f0000001001 clamp (inlined)
\t    7f0000001001 main+0x1 (/srv/api)

"""


def stacks(profile: Profile) -> dict[str, int]:
    return {
        line.rpartition(" ")[0]: int(line.rpartition(" ")[2])
        for line in folded.encode(profile, by=("comm", "pid")).decode().splitlines()
    }


def imported(folder, *arguments):
    """Run the command and return the objects that it made."""
    store = DirectoryStore(folder / "store")
    assert cli.main(["import", "--store", str(store.root), *map(str, arguments)]) == 0
    keys = [each.key for each in store.list("v1/")]
    return [(ObjectKey.parse(key), pprof.decode(store.get(key))) for key in keys]


def test_perf_script_is_read_with_kernel_frames_and_hostile_names():
    """Names with spaces, digits, semicolons, parentheses; deleted files; frames without symbols."""
    found = parse_perf_script(SCRIPT.splitlines(), 99)

    assert stacks(found.profile) == {
        "perl;12345;Perl_runops(int, (anonymous namespace)::x) const;[libc.so.6];"
        "do_syscall_64_[k]": 1,
        "my worker 1;77;main;clamp_[i];a\\x3bb\\xff_[j]": 1,
    }
    assert found.profile.total_value == 2 * 10_101_010
    assert found.unparsed_lines == 0
    modules = {frame.module for frame in flamegraph.build(found.profile).frames}
    assert modules == {"", "perl", "libc.so.6", "[kernel.kallsyms]", "[jit]", "api"}


def test_perf_script_without_call_chains_is_read():
    """One line per sample, with the address at its end."""
    line = (
        b"swapper     0 [000] 12.000000: 1 cycles:  ffffffff81 native_halt+0xb ([kernel.kallsyms])"
    )

    found = parse_perf_script([line, line], 100)

    assert stacks(found.profile) == {"swapper;0;native_halt_[k]": 2}
    assert found.profile.total_value == 2 * 10_000_000


def test_samples_of_other_events_are_counted_apart():
    """Cycles and page faults do not add up."""
    lines = [b"a 1 1.0: 5 cycles: ", b"\t12 f (/x)", b"", b"a 1 1.0: 5 faults: ", b"\t12 f (/x)"]

    found = parse_perf_script(lines, 99)

    assert found.profile.total_samples == 1
    assert found.other_events == 1


def test_a_process_that_is_named_like_a_sample_is_only_a_process():
    """A name of 15 bytes may look like the fields that follow it."""
    line = b"1 2.0: 3 x: 9 9 88 [001] 7.500000: 4 cpu-clock: "

    (labels,) = parse_perf_script([line, b"\t12 1 2.0: 3 y: (/x)"], 99).profile.label_sets

    assert dict(labels)["comm"] == "1 2.0: 3 x: 9 9"
    assert dict(labels)["pid"] == "88"


def test_lines_that_fit_nothing_are_counted_and_left_out():
    """With the frames that follow them; the samples around them are kept."""
    lines = SCRIPT.split(b"\n")
    lines[8:8] = [b"what is this", b"\t12 lost (/x)", b"", b"\tzz not a frame", b""]

    found = parse_perf_script(lines, 99)

    assert found.unparsed_lines == 2
    assert found.profile.total_samples == 2
    assert not any("lost" in stack for stack in stacks(found.profile))


@given(st.lists(st.binary(max_size=60), max_size=10), st.integers(0, 10))
def test_any_lines_between_samples_leave_the_others_whole(noise, place):
    """Whatever stands in between, both samples are there, unless it belongs to them."""
    blocks = SCRIPT.split(b"\n\n")[:2]
    clean = [line for raw in noise for line in raw.split(b"\n") if b": " not in line]
    lines = [*blocks[0].split(b"\n"), b"", *clean, b"", *blocks[1].split(b"\n"), b""]

    found = parse_perf_script(lines, 99)

    assert stacks(found.profile) == stacks(parse_perf_script(SCRIPT.splitlines(), 99).profile)


@given(st.binary(max_size=300))
def test_any_bytes_are_samples_or_an_error(content):
    """Nothing else comes out."""
    try:
        found = parse_perf_script(content.split(b"\n"), 99)
    except ProfileError:
        return
    assert found.profile.total_samples > 0


def test_perf_times_of_a_wall_clock_are_the_window(tmp_path):
    """`perf record -k CLOCK_REALTIME`; otherwise they count from the boot, and must be given."""
    script = SCRIPT.replace(b"1234.567890", b"1780000000.5").replace(
        b"1235.567890", b"1780000059.5"
    )
    file = tmp_path / "perf.txt"
    file.write_bytes(script)
    ((key, _),) = imported(tmp_path, file)
    assert (key.start_s, key.length_s) == (1_780_000_000, 60)

    file.write_bytes(SCRIPT)
    with pytest.raises(IncompleteFileError, match="give --window START"):
        import_.complete(import_.read(str(file), 99), "f", import_.ImportOptions(), NOW_NS)
    asked = import_.ImportOptions(window="now-1h")
    found = import_.complete(import_.read(str(file), 99), "f", asked, NOW_NS)
    assert found.window.start_ns == NOW_NS - 3_600_000_000_000
    assert found.window.end_ns - found.window.start_ns == 1_000_000_000 + 1_000_000_000 // 99


def test_folded_text_becomes_cpu_time_of_the_given_rate(tmp_path):
    """So that it merges with what was sampled here; labels and host are as asked for."""
    file = tmp_path / "out.txt"
    file.write_text("main;work 3\nmain 1\n")

    ((key, profile),) = imported(
        tmp_path, file, "--window", "1780000000..1780000060", "--host", "db-1",
        "--label", "service=db", "--label", "version=2", "-F", "50",
    )  # fmt: skip

    assert (profile.type, profile.total_samples, profile.total_value) == ("cpu", 4, 4 * 20_000_000)
    assert profile.label_sets == ((("service", "db"), ("version", "2")),)
    assert [host.name for host in profile.accounting.hosts] == ["db-1"]
    assert key.host_id == profile.accounting.hosts[0].host_id
    assert profile.accounting.mismatch == 0


def test_pprof_keeps_its_own_window_and_host(tmp_path):
    """Ours or foreign; labels are added to those of its samples."""
    file = tmp_path / "cpu.pb.gz"
    file.write_bytes(pprof.encode(some.sample_profile()))

    ((_, profile),) = imported(tmp_path, file, "--label", "team=core")

    assert profile.window == some.WINDOW
    assert profile.accounting.hosts == some.sample_profile().accounting.hosts
    assert profile.total_samples == 16
    assert all(dict(labels)["team"] == "core" for labels in profile.label_sets)


def test_importing_twice_changes_nothing(tmp_path, capfd):
    """The same file under the same words is the same object."""
    file = tmp_path / "cpu.pb.gz"
    file.write_bytes(pprof.encode(some.sample_profile()))

    assert len(imported(tmp_path, file)) == 1
    assert len(imported(tmp_path, file)) == 1

    assert "was there already" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "give --window START..END"),
        (["--window", "now"], "does not say how long it took"),
        (["--window", "now..now-1h"], "must end after it starts"),
        (["--window", "now-2h..now"], "at most an hour"),
        (["--window", "yesterday..now"], "'yesterday' is no time"),
        (["--label", "service"], "is no label"),
        (["-F", "0"], "is no rate"),
    ],
)
def test_an_import_that_lacks_something_says_what_to_give(tmp_path, capfd, arguments, problem):
    """Exit status 2, and nothing is stored."""
    file = tmp_path / "out.folded"
    file.write_text("main 1\n")
    command = ["import", str(file), "--store", str(tmp_path / "store"), *arguments]

    try:
        status = cli.main(command)
    except SystemExit as exit_:
        status = exit_.code

    assert status == 2
    assert problem in capfd.readouterr().err
    assert not list(DirectoryStore(tmp_path / "store").list(""))


def test_a_damaged_file_is_named(tmp_path, capfd):
    """Whatever it was meant to be."""
    for name, content in (("a.pb.gz", b"\x1f\x8bx"), ("b.txt", b"no count here\n"), ("c", b"\0\0")):
        file = tmp_path / name
        file.write_bytes(content)
        assert cli.main(["import", str(file), "--store", str(tmp_path), "--window", "0..9"]) == 2
        assert name in capfd.readouterr().err


def test_what_was_imported_is_found_by_its_labels(tmp_path, monkeypatch, capfd):
    """The way of a user: import, list, export."""
    monkeypatch.setenv("EVERFLAME_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("EVERFLAME_STORE", str(tmp_path / "store"))
    file = tmp_path / "perf.txt"
    file.write_bytes(SCRIPT)
    assert cli.main(["import", str(file), "--window", "now-5m", "--host", "h"]) == 0
    capfd.readouterr()

    assert cli.main(["ls", "--json"]) == 0
    services = orjson.loads(capfd.readouterr().out)["hosts"][0]["services"]
    assert {each["service"] for each in services} == {"perl", "my worker 1"}
    assert cli.main(["export", "-o", "-", "--by", "host", "-q", '{comm="perl"}']) == 0
    assert capfd.readouterr().out.startswith("h;Perl_runops(")


@pytest.mark.kernel
def test_what_perf_itself_prints_is_read(tmp_path):
    """A real recording with call chains: every sample, and the kernel's frames as such."""
    perf = shutil.which("perf")
    if perf is None:
        pytest.skip("no perf: install linux-perf")
    recorded = subprocess.run(
        [perf, "record", "-q", "-e", "cpu-clock", "-F", "499", "-g", "-o", tmp_path / "d", "--",
         "python3", "-c", "import os\nfor i in range(200000): os.stat('/')"],
        capture_output=True, check=False,
    )  # fmt: skip
    if recorded.returncode:
        pytest.skip(f"perf cannot record here: {recorded.stderr.decode()[:200]}")
    script = subprocess.run(
        [perf, "script", "-i", tmp_path / "d"], capture_output=True, check=True
    ).stdout

    found = parse_perf_script(script.splitlines(), 499)

    assert found.unparsed_lines == 0
    assert found.profile.total_samples == script.count(b"cpu-clock")
    assert found.profile.total_samples > 20
    kinds = {frame.kind for frame in flamegraph.build(found.profile).frames}
    assert {Kind.KERNEL, Kind.NATIVE} <= kinds
    assert Window(0, 0) < found.profile.window
