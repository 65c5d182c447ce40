"""The door for files: what people have, under any name, plain or in gzip."""

import gzip
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiler.formats import export
from profiler.formats.reading import ChoiceError, Reading, ReadOptions, read, read_bytes
from storage.columns import Columns
from storage.formats import folded
from storage.profile import ProfileError
from tests.support import profiles as some

FILES = Path(__file__).parent / "files"
CASES = sorted(file.name for file in FILES.iterdir())


def lines(reading: Reading) -> dict[str, int]:
    text = folded.encode(Columns.of(reading.profile), by=()).decode()
    pairs = (line.rpartition(" ") for line in text.splitlines())
    return {stack: int(count) for stack, _, count in pairs}


@pytest.mark.parametrize(
    ("file", "expected", "told"),
    [
        ("folded-badline.folded", {"main;f": 3, "main;g": 4}, "left out 1 line: line 3 "),
        ("folded-comment.folded", {"main;f": 3}, ""),
        ("folded-empty.folded", {}, "the profile is empty"),
        ("folded-fraction.folded", {"main;f": 7, "main;g": 3}, "multiplied by 2"),
        ("folded-tab.folded", {"main;f": 3}, ""),
        ("folded-trailing-space.folded", {"main;f": 3}, ""),
        ("perf-no-time.perf.txt", {"main;leaf": 1}, "without a process id"),
        ("perf-tabs.perf.txt", {"Lock::unlock()": 1}, "without a process id"),
        ("perf-leading-warning.perf.txt", {"main;leaf": 1}, "left out 2 lines"),
        ("perf-long-comm.perf.txt", {"main;leaf": 2}, ""),
        ("perf-tid-as-pid.perf.txt", {"a": 3}, "2 samples without a process id"),
        ("perf-two-probes.perf.txt", {"main;leaf": 1}, "left out kmem:kfree (1 sample)"),
        ("perf-hybrid.perf.txt", {"main;leaf": 3}, ""),
        ("perf-bom.perf.txt", {"main;leaf": 2}, ""),
        ("perf-arrow-inline.perf.txt", {"main;A::a_[j];B::b_[i];C::c_[i]": 1}, ""),
        ("pprof-samples-period.pb.gz", {"main": 300, "main;work": 700}, ""),
        ("pprof-cpu-ms.pb.gz", {"main": 3, "main;work": 7}, ""),
        ("speedscope-weights.speedscope.json", {"main;slow": 90, "main;fast": 10}, ""),
        ("speedscope-fractions.speedscope.json", {"main;slow": 4, "main;fast": 3}, "by 10"),
    ],
)
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_a_file_is_what_its_content_says(tmp_path, file, expected, told, compress):
    """Under any name, in gzip or not."""
    content = compress((FILES / file).read_bytes())
    for name in ("x", "x.pprof", "x.prof", "x.json", "x.folded", "x.pb.gz"):
        named = tmp_path / name
        named.write_bytes(content)

        found = read(str(named))

        assert lines(found) == expected
        assert [told in warning for warning in found.warnings] == ([True] if told else [])


def test_no_case_is_forgotten():
    """Every file in the folder can be read, but one that holds two sides."""
    refused = []
    for file in CASES:
        try:
            read(str(FILES / file))
        except ChoiceError:
            refused.append(file)
    assert refused == ["folded-two-columns.folded"]


@pytest.mark.parametrize("ending", [".pb.gz", ".folded", ".speedscope.json"])
@given(some.profiles())
def test_what_is_written_is_read_again(ending, profile):
    """Samples of every stack, and the time where the format holds it."""
    found = read_bytes(export.encode(profile, f"x{ending}", by=()))
    again = read_bytes(export.encode(found.profile, f"x{ending}", by=()))

    assert lines(again) == lines(found)
    assert found.profile.total_samples == profile.total_samples
    if ending != ".folded":
        assert found.profile.total_value == profile.total_value
    assert [warning for warning in found.warnings if "empty" not in warning] == []


@pytest.mark.parametrize("ending", [".folded", ".speedscope.json"])
@pytest.mark.parametrize("file", CASES)
def test_every_file_can_be_written_and_read_again(ending, file):
    """With the shares that it had."""
    side = "after" if "two-columns" in file else ""
    found = read_bytes((FILES / file).read_bytes(), ReadOptions(side=side))

    again = read_bytes(export.encode(found.profile, f"x{ending}", by=()))

    assert lines(again) == lines(found)


@pytest.mark.parametrize(
    ("file", "options", "problem"),
    [
        ("folded-tab.folded", {"event": "cycles"}, "--event is not for folded text"),
        ("folded-tab.folded", {"sample_type": "cpu"}, "--sample-type is not for folded text"),
        ("perf-bom.perf.txt", {"side": "after"}, "--side is not for perf script"),
        ("pprof-cpu-ms.pb.gz", {"event": "cycles"}, "--event is not for pprof"),
    ],
)
def test_an_option_that_is_for_another_format_is_refused(file, options, problem):
    """It would be ignored otherwise."""
    with pytest.raises(ChoiceError, match=f"{file}: {problem}"):
        read(str(FILES / file), ReadOptions(**options))


@given(st.data())
def test_a_mutated_file_is_a_profile_or_an_error(data):
    """Bytes that are changed, cut out or doubled; of every kind of file."""
    content = bytearray((FILES / data.draw(st.sampled_from(CASES))).read_bytes())
    if content[:2] == b"\x1f\x8b":
        content = bytearray(gzip.decompress(content))
    for _ in range(data.draw(st.integers(1, 5))):
        start = data.draw(st.integers(0, len(content)))
        end = start + data.draw(st.integers(0, 20))
        content[start:end] = data.draw(st.binary(max_size=20) | st.just(bytes(content[start:])))
    message, mismatch = "", 0
    try:
        mismatch = read_bytes(bytes(content)).profile.accounting.mismatch
    except ProfileError as error:
        message = str(error)
    assert "Error" not in message
    assert mismatch == 0


@pytest.mark.parametrize("name", ["missing", "."])
def test_a_file_that_cannot_be_opened_is_named(tmp_path, name):
    """Without the numbers of the system."""
    with pytest.raises(OSError, match=r"^cannot read /.*: (no such file|is a directory)"):
        read(str(tmp_path / name))
