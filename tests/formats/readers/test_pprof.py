"""pprof of other programs: sample types, units, periods, and Go's own tool."""

import functools
import gzip

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiler.formats.readers.result import ChoiceError
from profiler.formats.readers.units import unit_scale
from profiler.formats.reading import Reading, ReadOptions, read_bytes
from storage.columns import Columns
from storage.formats import folded, pprof
from storage.formats.pprof_message import ProfileMessage
from storage.profile import ProfileError
from tests.support import profiles as some

pack = functools.partial(gzip.compress, mtime=0)  # names of tests must not differ from run to run

GO = ("samples/count", "cpu/nanoseconds")
HEAP = ("alloc_objects/count", "alloc_space/bytes", "inuse_objects/count", "inuse_space/bytes")


def file_of(
    types, *samples: tuple[str, tuple[int, ...]], period=0, period_type="", default=""
) -> bytes:
    """Return pprof with samples of one function each."""
    out = ProfileMessage()
    texts: dict[str, int] = {"": 0}

    def number(text: str) -> int:
        return texts.setdefault(text, len(texts))

    for each in types:
        name, _, unit = each.partition("/")
        out.sample_type.add(type=number(name), unit=number(unit))
    for i, (function, values) in enumerate(samples, start=1):
        out.function.add(id=i, name=number(function))
        out.location.add(id=i).line.add(function_id=i)
        out.sample.add(location_id=[i], value=values)
    out.period = period
    name, _, unit = period_type.partition("/")
    out.period_type.type, out.period_type.unit = number(name), number(unit)
    out.default_sample_type = number(default)
    out.time_nanos = 1_780_000_000_000_000_000
    out.string_table.extend(text.encode() for text in texts)
    return pack(out.SerializeToString())


def read(content: bytes, **options) -> Reading:
    return read_bytes(content, ReadOptions(**options))


def values(reading: Reading) -> dict[str, tuple[int, int]]:
    rows = reading.profile.rows()
    return {row.stack[-1].function: (row.samples, row.value) for row in rows}


@pytest.mark.parametrize(
    ("types", "value", "kwargs", "expected"),
    [
        (GO, (3, 30), {}, ("cpu", "nanoseconds", 3, 30)),
        (GO[::-1], (30, 3), {}, ("cpu", "nanoseconds", 3, 30)),
        (("sample/count", "wall/nanoseconds", "cpu/nanoseconds"), (3, 90, 30), {},
         ("cpu", "nanoseconds", 3, 30)),
        (("cpu-samples/count", "cpu-time/nanoseconds", "wall-time/nanoseconds"), (3, 30, 90), {},
         ("cpu", "nanoseconds", 3, 30)),
        (("samples/count", "wall/nanoseconds"), (3, 90), {}, ("wall", "nanoseconds", 3, 90)),
        (("contentions/count", "delay/nanoseconds"), (3, 90), {}, ("delay", "nanoseconds", 3, 90)),
        (HEAP, (1, 10, 2, 20), {}, ("inuse_space", "bytes", 2, 20)),
        (HEAP, (1, 10, 2, 20), {"default": "alloc_space"}, ("alloc_space", "bytes", 1, 10)),
        (("alloc_objects/count", "x/other", "cpu/nanoseconds"), (7, 7, 30), {},
         ("cpu", "nanoseconds", 1, 30)),
        (("cpu/milliseconds",), (70,), {"period": 10, "period_type": "cpu/milliseconds"},
         ("cpu", "nanoseconds", 7, 70_000_000)),
        (("samples/count",), (7,), {"period": 10, "period_type": "cpu/milliseconds"},
         ("cpu", "nanoseconds", 7, 70_000_000)),
        (("samples/count",), (7,), {"period": 512, "period_type": "space/bytes"},
         ("samples", "count", 7, 7)),
        (("samples/count",), (7,), {}, ("samples", "count", 7, 7)),
        (("events/count",), (7,), {}, ("samples", "count", 7, 7)),
        (("Näme of/a thing",), (7,), {}, ("n_me_of", "a thing", 1, 7)),
        (("cpu/cores",), (7,), {}, ("cpu_cores", "cores", 1, 7)),
        (("space/kB",), (7,), {}, ("space", "bytes", 1, 7 * 1024)),
    ],
)  # fmt: skip
def test_cpu_time_is_read_where_there_is_one(types, value, kwargs, expected):
    """Else what `go tool pprof` shows: the default, or the last."""
    profile = read(file_of(types, ("f", value), **kwargs)).profile

    found = (profile.type, profile.unit, profile.total_samples, profile.total_value)
    assert found == expected


@pytest.mark.parametrize(
    ("unit", "nanoseconds"),
    [
        ("ns", 1), ("nanoseconds", 1), ("nanosecond", 1), ("Nanoseconds", 1),
        ("us", 10**3), ("µs", 10**3), ("μs", 10**3), ("microseconds", 10**3),
        ("ms", 10**6), ("milliseconds", 10**6), ("millisecond", 10**6),
        ("s", 10**9), ("sec", 10**9), ("seconds", 10**9), ("second", 10**9),
        ("min", 60 * 10**9), ("mins", 60 * 10**9), ("minutes", 60 * 10**9),
        ("h", 3600 * 10**9), ("hr", 3600 * 10**9), ("hrs", 3600 * 10**9), ("hours", 3600 * 10**9),
    ],
)  # fmt: skip
def test_every_unit_of_time_is_converted_exactly(unit, nanoseconds):
    """Of values and of the period; the object can be read by our own reader."""
    content = file_of(
        ("samples/count", f"cpu/{unit}"), ("f", (2, 3)), period=1, period_type=f"cpu/{unit}"
    )

    profile = read(content).profile

    assert unit_scale(unit) == (nanoseconds, "nanoseconds")
    assert (profile.unit, profile.total_value) == ("nanoseconds", 3 * nanoseconds)
    assert profile.period_ns == nanoseconds
    assert pprof.decode(pprof.encode(profile)).total_value == 3 * nanoseconds


def test_another_type_is_chosen_by_name():
    """With its unit or without; what was not read is told unless it was asked for."""
    content = file_of(HEAP, ("f", (1, 10, 2, 20)))

    assert read(content).warnings == (
        "read inuse_space/bytes, not alloc_space/bytes (--sample-type chooses)",
    )
    for asked in ("alloc_space", "alloc_space/bytes"):
        found = read(content, sample_type=asked)
        assert (found.profile.total_samples, found.profile.total_value) == (1, 10)
        assert found.warnings == ()
    objects = read(content, sample_type="alloc_objects").profile
    assert (objects.type, objects.unit, objects.total_value) == ("alloc_objects", "count", 1)
    with pytest.raises(ChoiceError, match="no such type in it; there are alloc_objects/count, "):
        read(content, sample_type="cpu")


def test_our_own_files_have_one_type():
    """And are read as they were written."""
    profile = some.sample_profile()

    assert read(pprof.encode(profile)).profile == profile
    assert read(gzip.decompress(pprof.encode(profile))).profile == profile
    assert read(pprof.encode(profile), sample_type="cpu").profile == profile
    with pytest.raises(ChoiceError, match="there is only cpu"):
        read(pprof.encode(profile), sample_type="wall")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (file_of(GO, ("f", (1,))), "too many values or too few"),
        (file_of(GO, ("f", (1, -1))), "a negative value, so this is a difference"),
        (file_of((), ("f", ())), "does not say what its values are"),
        (file_of(("samples/count", "cpu/hours"), ("f", (1, 2**40))), "add up to more than 2"),
        (file_of(GO, ("f", (1, 1)), period=2**40, period_type="cpu/hours"), "its period is more"),
        (pack(gzip.decompress(file_of(GO, ("f", (1, 1))))[:-3]), "damaged"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(content, problem):
    """In words of ours."""
    with pytest.raises(ProfileError, match=f"cannot read pprof: .*{problem}"):
        read(content)


@given(st.data())
def test_a_mutated_file_is_a_profile_or_an_error(data):
    """Whatever byte is changed; the same for a file that is cut off."""
    content = bytearray(gzip.decompress(file_of(HEAP, ("f", (1, 10, 2, 20)), ("g", (1, 1, 1, 1)))))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = read(bytes(content[: data.draw(st.integers(0, len(content)))]))
    except ProfileError:
        return
    assert found.profile.total_samples >= 0


@pytest.mark.timeout(600)  # of which Go's first build may take some minutes on a busy machine
@pytest.mark.parametrize("types", [GO, HEAP, ("samples/count", "wall/ms"), ("cpu/ms",)])
def test_go_shows_the_same_function_shares(go, tmp_path, types):
    """`go tool pprof` reads the file, and what we export of it, with equal shares."""
    samples = (("f", (3,) * len(types)), ("g", (1,) * len(types)))
    theirs, ours = tmp_path / "theirs.pb.gz", tmp_path / "ours.pb.gz"
    theirs.write_bytes(file_of(types, *samples))
    found = read(theirs.read_bytes())
    ours.write_bytes(pprof.encode(found.profile))

    shown = [go("tool", "pprof", "-top", file) for file in (theirs, ours)]

    for text in shown:
        shares = {line.split()[-1]: line.split()[1] for line in text.splitlines() if "%" in line}
        assert (shares["f"], shares["g"]) == ("75.00%", "25.00%")
    assert folded.encode(Columns.of(found.profile)).count(b"\n") == 2
