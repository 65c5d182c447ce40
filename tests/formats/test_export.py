"""Exports: the ending says the format, all formats agree, files appear complete or not at all."""

import os
import threading

import orjson
import pytest
from hypothesis import given

from profiler.flamegraph import flamegraph
from profiler.formats import export
from profiler.formats.export import ExportError
from profiler.formats.readers.result import UnsupportedFormatError
from profiler.formats.reading import read, read_bytes
from storage.columns import Columns
from storage.formats import folded, pprof
from storage.profile import ProfileError
from symbolizer.location import Kind
from tests.support import profiles as some

READ_ENDINGS = (".pb.gz", ".folded", ".speedscope.json")
ENDINGS = (".pb.gz", ".folded", ".speedscope.json", ".json", ".svg")


@given(some.profiles())
def test_all_exports_of_a_profile_agree_to_the_last_count(profile):
    """Samples and value are the same in every format, also per process."""
    tree = orjson.loads(export.encode(profile, "p.json"))
    by_pprof = pprof.decode(export.encode(profile, "p.pb.gz"))
    by_folded = read_bytes(export.encode(profile, "p.folded")).profile
    by_speedscope = read_bytes(export.encode(profile, "p.speedscope.json")).profile

    samples = {tree["samples"], by_pprof.total_samples, by_folded.total_samples,
               by_speedscope.total_samples}  # fmt: skip
    values = {tree["total"], by_pprof.total_value, by_speedscope.total_value}
    assert samples == {profile.total_samples}
    assert values == {profile.total_value}


def test_functions_agree_between_formats():
    """Self and total of every function are equal, read back from each format."""
    profile = some.sample_profile()

    def table(decoded):
        return {
            row.frame.function: (row.self_samples, row.total_samples)
            for row in flamegraph.top_functions(Columns.of(decoded))
            if row.frame.kind is not Kind.LABEL
        }

    expected = table(profile)
    for ending in READ_ENDINGS:
        decoded = read_bytes(export.encode(profile, f"p{ending}", by=())).profile
        assert table(decoded) == expected, ending


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_ending_chooses_the_format(tmp_path, ending):
    """`.speedscope.json` is not mistaken for `.json`; nothing else is left in the folder."""
    file = tmp_path / f"cpu.v1{ending}"

    export.write(some.sample_profile(), str(file))

    starts = {
        ".pb.gz": b"\x1f\x8b",
        ".folded": b"api;main",
        ".speedscope.json": b'{"$schema"',
        ".json": b'{"coverage"',
        ".svg": b"<svg",
    }
    assert file.read_bytes().startswith(starts[ending])
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("ending", READ_ENDINGS)
def test_what_was_written_is_read_again(tmp_path, ending):
    """Every format that holds stacks goes in both directions."""
    file = str(tmp_path / f"cpu{ending}")

    export.write(some.sample_profile(), file)

    assert read(file).profile.total_samples == 16


def test_the_json_has_the_shape_of_the_page():
    """The same record as the service gives: parallel arrays in preorder, frames beside them."""
    tree = orjson.loads(export.encode(some.sample_profile(), "p.json", by=("service",)))

    assert tree["schema"] == 1
    assert tree["window"] == {"from_ms": 1_780_000_000_000, "until_ms": 1_780_000_060_000}
    assert tree["coverage"] == {
        "hosts": 1, "ticks": 23, "idle": 5, "filtered": 0, "stored": 16, "lost": {"map_full": 2},
        "stops": {"complete": 16}, "skipped": [],
    }  # fmt: skip
    nodes = tree["nodes"]
    assert set(map(len, nodes.values())) == {len(nodes["frame"])}
    assert nodes["depth"][0] == 0
    assert nodes["total"][0] == tree["total"]
    assert ["api", "", "label", "", 0] in tree["frames"]
    assert tree["host_seconds"] == 60
    assert tree["rest"] == {"nodes": 0, "total": 0}


@pytest.mark.parametrize("file", ["cpu", "cpu.txt", "cpu.pb", "folded", "dir/svg"])
def test_an_unknown_ending_names_those_that_exist(file):
    """The error is made before anything is measured, and lists the choices."""
    for act in (export.check_output, lambda f: export.encode(some.build([]), f)):
        with pytest.raises(ExportError, match=r"\.folded"):
            act(file)


@pytest.mark.parametrize("ending", [".svg", ".json"])
def test_drawings_cannot_be_read_back(tmp_path, ending):
    """A drawing is not a profile: the error says what it is and what to give instead."""
    file = tmp_path / f"cpu{ending}"
    export.write(some.sample_profile(), str(file))

    with pytest.raises(UnsupportedFormatError, match=r"cpu\.(svg|json): .* a drawing .*; "):
        read(str(file))


@pytest.mark.parametrize("name", ["out", "out.svg"])
def test_a_directory_is_named_as_such(tmp_path, name):
    """Whatever its name ends in."""
    (tmp_path / name).mkdir()
    with pytest.raises(IsADirectoryError, match=f"cannot write .*{name}: it is a directory"):
        export.check_output(str(tmp_path / name))


def test_a_folder_that_does_not_exist_is_noticed_early(tmp_path):
    """Not after a minute of recording."""
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        export.check_output(str(tmp_path / "none" / "p.svg"))
    export.check_output(str(tmp_path / "p.svg"))
    export.check_output("-")


def test_a_damaged_file_is_named_in_the_error(tmp_path):
    """With several files on a command line, it matters which one."""
    file = tmp_path / "broken.folded"
    file.write_text("main;f\n;; 99999999999999999999\n")

    with pytest.raises(ProfileError, match=r"broken\.folded: .*line 1"):
        read(str(file))


def test_an_existing_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    """A write that fails leaves the old file and no rubbish."""
    file = tmp_path / "p.folded"
    file.write_text("old 1\n")
    monkeypatch.setattr("pathlib.Path.replace", fail)

    with pytest.raises(OSError, match="disk"):
        export.write(some.sample_profile(), str(file))

    assert file.read_text() == "old 1\n"
    assert list(tmp_path.iterdir()) == [file]


def fail(*_: object) -> None:
    raise OSError("disk is full")


def test_standard_output_gets_folded_text(capfdbinary):
    """`-` is for other programs, which read folded text."""
    export.write(some.sample_profile(), "-", by=())

    assert capfdbinary.readouterr().out == folded.encode(Columns.of(some.sample_profile()), by=())


def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path):
    """A named pipe is not replaced by a file."""
    pipe = tmp_path / "p.folded"
    os.mkfifo(pipe)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()

    export.write(some.sample_profile(), str(pipe))
    reader.join(timeout=10)

    assert read == [folded.encode(Columns.of(some.sample_profile()))]
    assert pipe.is_fifo()
