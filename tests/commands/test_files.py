"""FILE arguments of all commands: one door, the same options, warnings on stderr."""

import gzip
import shutil
from pathlib import Path

import orjson
import pytest

from profiler import cli
from profiler.formats import export
from storage.columns import Columns
from storage.formats import folded
from storage.objects.open import DirectoryStore
from tests.support import profiles as some
from tests.support.python_profiles import shop_profile

FILES = Path(__file__).parents[1] / "formats" / "files"
TWO_EVENTS = FILES / "perf-two-probes.perf.txt"
TWO_SIDES = FILES / "folded-two-columns.folded"


def as_folded(capfd, *arguments) -> str:
    assert cli.main(["export", *map(str, arguments), "-o", "-", "--by", ""]) == 0
    return capfd.readouterr().out


@pytest.mark.parametrize("name", ["cpu.prof", "cpu.json", "cpu"])
@pytest.mark.parametrize("ending", [".pb.gz", ".folded", ".speedscope.json"])
def test_every_command_reads_a_file_under_any_name(tmp_path, capfd, monkeypatch, ending, name):
    """What was exported is imported, drawn, verified and compared, whatever it is called."""
    file = tmp_path / name
    file.write_bytes(gzip.compress(export.encode(some.sample_profile(), f"x{ending}", by=())))
    store = str(tmp_path / "store")

    assert as_folded(capfd, file).encode() == folded.encode(
        Columns.of(some.sample_profile()), by=()
    )
    for command in (
        ["flamegraph", str(file)],
        ["verify", str(file)],
        ["diff", str(file), "--", str(file)],
        ["import", str(file), "--store", store, "--window", "now-5m..now"],
    ):
        assert cli.main(command) == 0, capfd.readouterr().err
    assert len(list(DirectoryStore(tmp_path / "store").list("v1/default/l0/"))) == 1


def test_an_option_chooses_a_part_of_a_file(tmp_path, capfd):
    """The event, the sample type or the side."""
    assert as_folded(capfd, TWO_EVENTS, "--event", "kmem:kfree") == "main;leaf 1\n"
    assert as_folded(capfd, TWO_SIDES, "--side", "after") == "main;f 12\n"
    assert as_folded(capfd, FILES / "pprof-cpu-ms.pb.gz", "--sample-type", "samples") == (
        "main 3\nmain;work 7\n"
    )
    imported = ["--store", str(tmp_path / "store"), "--window", "now-5m..now"]
    assert cli.main(["import", str(TWO_SIDES), "--side", "before", *imported]) == 0
    assert "13 samples" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["flamegraph", TWO_SIDES], "choose one with --side before or --side after"),
        (["import", TWO_SIDES, "--window", "now-5m..now"], "choose one with --side before"),
        (["flamegraph", TWO_EVENTS, "--event", "cycles"], "there are kmem:kmalloc, kmem:kfree"),
        (["flamegraph", FILES / "pprof-cpu-ms.pb.gz", "--sample-type", "wall"], "there are "),
        (["diff", FILES / "folded-tab.folded"], "holds one side: name both"),
        (["flamegraph", "no-such-file"], "everflame: cannot read no-such-file: no such file"),
        (["flamegraph", shutil.which("true")], "a program or library (ELF)"),
    ],
)
def test_what_must_be_chosen_is_said(tmp_path, capfd, monkeypatch, arguments, problem):
    """Exit status 2, one line, and nothing is stored."""
    monkeypatch.setenv("EVERFLAME_STORE", str(tmp_path / "store"))

    assert cli.main([str(argument) for argument in arguments]) == 2

    err = capfd.readouterr().err
    assert problem in err
    assert err.count("\n") == 1
    assert not list(tmp_path.rglob("*.pb.gz"))


def test_a_comparison_in_one_file_is_compared(tmp_path, capfd):
    """`diff` reads both sides of what difffolded.pl, and it itself, writes."""
    assert cli.main(["diff", str(TWO_SIDES), "--json"]) == 0
    told = orjson.loads(capfd.readouterr().out)
    assert (told["before"]["samples"], told["after"]["samples"]) == (13, 12)

    for ending in (".folded", ".speedscope.json"):
        both = tmp_path / f"both{ending}"
        assert cli.main(["diff", str(TWO_SIDES), "-o", str(both)]) == 0
        capfd.readouterr()
        assert cli.main(["diff", str(both), "--json"]) == 0
        told = orjson.loads(capfd.readouterr().out)
        assert (told["before"]["samples"], told["after"]["samples"]) == (13, 12)


def test_an_export_of_lines_has_their_numbers(tmp_path, capfd):
    """Not those of the functions they are in, which two lines of one share."""
    file = tmp_path / "shop.pb.gz"
    file.write_bytes(export.encode(shop_profile(), "x.pb.gz"))

    for group, line in (("function", 20), ("line", 27)):
        written = tmp_path / f"{group}.json"
        assert cli.main(["export", str(file), "--group", group, "-o", str(written)]) == 0
        frames = orjson.loads(written.read_bytes())["frames"]
        assert [each[4] for each in frames if each[0] == "Shop.price"] == [line]
    assert "shop.pricing.Shop.price:27;" in as_folded(capfd, file, "--group=line")


def test_warnings_go_to_stderr(capfd):
    """Standard output has only what was asked for."""
    file = FILES / "folded-badline.folded"

    assert cli.main(["export", str(file), "-o", "-", "--by", ""]) == 0

    out, err = capfd.readouterr()
    assert out == "main;f 3\nmain;g 4\n"
    assert err == f"{file}: left out 1 line: line 3 does not end in a count: 'nonsense'\n"
