"""Imports: files of other tools become objects, with windows, hosts, labels and CPU time."""

from pathlib import Path

import orjson
import pytest

from profiler import cli
from profiler.commands import import_
from profiler.formats.reading import read
from storage.formats import pprof
from storage.objects.directory import DirectoryStore
from storage.objects.keys import ObjectKey
from tests.formats.readers.test_perf_script import SCRIPT
from tests.support import profiles as some

FILES = Path(__file__).parents[1] / "formats" / "files"
NOW_NS = 1_780_000_000_000_000_000


def imported(folder, *arguments):
    """Run the command and return the objects that it made."""
    store = DirectoryStore(folder / "store")
    assert cli.main(["import", "--store", str(store.root), *map(str, arguments)]) == 0
    keys = [each.key for each in store.list("v1/default/l0/")]
    return [(ObjectKey.parse(key), pprof.decode(store.get(key))) for key in keys]


def test_perf_times_of_a_wall_clock_are_the_window(tmp_path, capfd):
    """`perf record -k CLOCK_REALTIME`; otherwise they count from the boot, and must be given."""
    script = SCRIPT.replace(b"1234.567890", b"1780000000.5").replace(
        b"1235.567890", b"1780000059.5"
    )
    file = tmp_path / "perf.txt"
    file.write_bytes(script)
    ((key, _),) = imported(tmp_path, file)
    assert (key.start_s, key.length_s) == (1_780_000_000, 60)

    file.write_bytes(SCRIPT)
    assert cli.main(["import", str(file), "--store", str(tmp_path / "other")]) == 2
    assert "give --window START" in capfd.readouterr().err
    asked = import_.ImportOptions(window="now-1h")
    found = import_.complete(read(str(file)).profile, "f", asked, NOW_NS)
    assert found.window.start_ns == NOW_NS - 3_600_000_000_000
    assert found.window.end_ns - found.window.start_ns == 1_000_000_000 + 10_101_010


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


def test_names_on_the_command_line_may_be_any_bytes(tmp_path):
    """As those in files are; Python passes bytes that are no text as surrogates."""
    file = tmp_path / "f.folded"
    file.write_text("main;f 3\n")

    ((_, profile),) = imported(
        tmp_path, file, "--window=now-1m..now", "--host=w\udcff", "--label=service=a\udcfe"
    )

    assert profile.accounting.hosts[0].name == "w\\xff"
    assert dict(profile.label_sets[0])["service"] == "a\\xfe"


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
        (["--window", "now-2h..now"], "--window now-2h..now is longer than an hour"),
        (["--window", "yesterday..now"], "'yesterday' is not a time"),
        (["--label", "service"], "is not a label"),
        (["-F", "0"], "is not a rate"),
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


def cpu_seconds(folder, content: bytes, *arguments) -> tuple[int, float]:
    """Return the samples and the CPU time of the object that an import makes."""
    file = folder / "input"
    file.write_bytes(content)
    window = ("--window", "1780000000..1780000060")
    ((_, profile),) = imported(folder, file, *window, *arguments)
    assert (profile.type, profile.unit) == ("cpu", "nanoseconds")
    return profile.total_samples, profile.total_value / 1e9


def test_fractions_are_scaled_but_their_time_is_not(tmp_path):
    """5 samples at 100 Hz are 50 ms, whatever they are multiplied by."""
    content = b"main;f 3.5\nmain;g 1.5\n"

    assert cpu_seconds(tmp_path, content, "-F", "100") == (10, 0.05)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("pprof-samples-period.pb.gz", (1000, 1.0)),
        ("pprof-cpu-ms.pb.gz", (10, 0.1)),
        ("perf-tabs.perf.txt", (1, 0.001)),
        ("perf-no-time.perf.txt", (1, 0.01)),
        ("perf-hybrid.perf.txt", (3, 0.03)),
        ("folded-tab.folded", (3, 0.03)),
        ("speedscope-weights.speedscope.json", (100, 1.0)),
        ("speedscope-fractions.speedscope.json", (7, 0.007)),
    ],
)
def test_the_time_of_a_sample_is_the_files_own(tmp_path, file, expected):
    """-F is for files that do not say how long a sample is."""
    assert cpu_seconds(tmp_path, (FILES / file).read_bytes(), "-F", "100") == expected


def test_the_time_of_austin_is_imported_as_it_is(tmp_path):
    """400 µs are not 400 samples."""
    header = b"# austin: 3.6.0\n# interval: 100\n# mode: cpu\n\n"

    assert cpu_seconds(tmp_path, header + b"P1;T1;f 400\n") == (4, 0.0004)


def test_a_file_without_samples_is_not_stored(tmp_path, capfd):
    """The others are; exit status 2."""
    empty, full = tmp_path / "empty.folded", tmp_path / "full.folded"
    empty.write_bytes(b"")
    full.write_bytes(b"main;f 3\n")
    store = DirectoryStore(tmp_path / "store")
    window = ["--window", "now-5m..now"]

    assert cli.main(["import", str(empty), str(full), "--store", str(store.root), *window]) == 2

    assert len(list(store.list("v1/default/l0/"))) == 1
    assert f"{empty}: the profile is empty: it contains no samples" in capfd.readouterr().err


def test_a_file_that_cannot_be_imported_does_not_stop_the_others(tmp_path, capfd):
    """Each one is reported; exit status 2."""
    good, damaged, other = (tmp_path / name for name in ("a.folded", "bad.gz", "c.folded"))
    good.write_bytes(b"main;f 3\n")
    damaged.write_bytes(b"\x1f\x8b" + b"x" * 30)
    other.write_bytes(b"main;g 4\n")
    missing = tmp_path / "missing.folded"
    store = DirectoryStore(tmp_path / "store")
    files = [str(each) for each in (good, damaged, missing, other)]

    assert cli.main(["import", *files, "--store", str(store.root), "--window", "now-5m..now"]) == 2

    out, err = capfd.readouterr()
    assert len(out.splitlines()) == len(list(store.list("v1/default/l0/"))) == 2
    assert f"everflame: {damaged}: cannot read it: damaged gzip data" in err
    assert f"everflame: cannot read {missing}: no such file" in err


def test_a_window_that_is_none_is_reported_once(tmp_path, capfd):
    """It is a mistake of the command line, not of each file."""
    file = tmp_path / "a.folded"
    file.write_bytes(b"main;f 3\n")

    assert cli.main(["import", str(file), str(file), "--store", str(tmp_path / "store"),
                     "--window", "yesterday..now"]) == 2  # fmt: skip

    assert capfd.readouterr().err.count("is not a time") == 1


def test_lines_that_are_left_out_are_told(tmp_path, capfd):
    """On stderr; stdout has the key alone."""
    imported(tmp_path, FILES / "folded-badline.folded", "--window", "now-5m..now")

    out, err = capfd.readouterr()
    assert out.startswith("v1/")
    assert len(out.splitlines()) == 1
    assert "left out 1 line: line 3 does not end in a count: 'nonsense'" in err


def test_what_the_store_could_not_read_is_not_stored(tmp_path, monkeypatch, capfd):
    """An object is decoded before it is put."""
    file = tmp_path / "a.folded"
    file.write_bytes(b"main;f 3\n")
    store = DirectoryStore(tmp_path / "store")
    monkeypatch.setattr(pprof, "encode", lambda _: b"\x1f\x8b damaged")
    options = import_.ImportOptions(window="now-5m..now")

    assert import_.import_files([str(file)], store, options, NOW_NS) == 2

    assert f"{file}: cannot be kept as an object" in capfd.readouterr().err
    assert not list(store.list(""))


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
