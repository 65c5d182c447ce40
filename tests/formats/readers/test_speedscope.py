"""Speedscope files of other programs: units, fractions, evented profiles, damage."""

import contextlib
import json
import re
import time

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiler.formats import speedscope as writer
from profiler.formats.readers.result import ChoiceError
from profiler.formats.reading import ReadOptions, read_bytes
from storage.columns import Columns
from storage.formats import folded
from storage.profile import Profile, ProfileError
from tests.support import profiles as some


def decode(content: bytes, **options) -> Profile:
    return read_bytes(content, ReadOptions(**options)).profile


def file_of(profile: dict, frames: int = 3) -> bytes:
    shared = {"frames": [{"name": name} for name in "abc"[:frames]]}
    return orjson.dumps({"$schema": "x", "shared": shared, "profiles": [profile]})


SAMPLED = {
    "type": "sampled", "name": "t", "unit": "milliseconds", "startValue": 0, "endValue": 3,
    "samples": [[0, 1], [0, 2]], "weights": [1, 2.5],
}  # fmt: skip


def test_sampled_files_of_other_programs_are_read():
    """Times become nanoseconds; a sample is the largest time that divides all weights."""
    profile = decode(file_of(SAMPLED))

    assert (profile.type, profile.unit) == ("cpu", "nanoseconds")
    counts = {tuple(place.function for place in row.stack): row.value for row in profile.rows()}
    assert counts == {("a", "b"): 1_000_000, ("a", "c"): 2_500_000}
    assert (profile.total_samples, profile.period_ns) == (2 + 5, 500_000)


@pytest.mark.parametrize(
    ("unit", "factor"),
    [
        ("nanoseconds", 1),
        ("microseconds", 1_000),
        ("milliseconds", 1_000_000),
        ("seconds", 1_000_000_000),
        ("ms", 1_000_000),
    ],
)
def test_every_unit_of_time_is_converted_exactly(unit, factor):
    """And the shares are the same in samples, which folded text shows, as in time."""
    profile = decode(file_of({**SAMPLED, "unit": unit, "weights": [90, 10]}))

    assert profile.total_value == 100 * factor
    assert folded.encode(Columns.of(profile)) == b"a;b 9\na;c 1\n"


def test_weights_of_equal_length_are_one_sample_each():
    """As py-spy writes them."""
    profile = decode(file_of({**SAMPLED, "unit": "seconds", "weights": [0.01, 0.01]}))

    assert (profile.total_samples, profile.period_ns) == (2, 10_000_000)


def test_weights_without_a_unit_are_counts_of_samples():
    """Nothing in the file says how long a sample is."""
    reading = read_bytes(file_of({**SAMPLED, "unit": "none", "weights": [90, 10]}))

    profile = reading.profile
    assert (profile.type, profile.unit, profile.total_value) == ("samples", "count", 100)
    assert folded.encode(Columns.of(profile)) == b"a;b 90\na;c 10\n"
    assert (reading.scale, reading.warnings) == (1, ())


def test_fractions_without_a_unit_keep_their_shares():
    """All are multiplied by one factor, which is said."""
    reading = read_bytes(file_of({**SAMPLED, "unit": "none", "weights": [0.4, 0.3]}))

    assert folded.encode(Columns.of(reading.profile)) == b"a;b 4\na;c 3\n"
    assert reading.scale == 10
    assert "multiplied by 10" in reading.warnings[0]


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=2).filter(sum))
def test_any_fractions_keep_their_shares(weights):
    """Also those that have no short form, to twelve digits of the sum."""
    profile = decode(file_of({**SAMPLED, "unit": "none", "weights": weights}))

    counts = {row.stack[-1].function: row.samples for row in profile.rows()}
    for name, weight in zip("bc", weights, strict=True):
        share = counts.get(name, 0) / profile.total_samples
        assert share == pytest.approx(weight / sum(weights), abs=1e-12)


def test_weights_in_bytes_stay_bytes():
    """They are memory, not CPU time."""
    profile = decode(file_of({**SAMPLED, "unit": "bytes", "weights": [4096, 1024]}))

    assert (profile.type, profile.unit, profile.total_value) == ("space", "bytes", 5120)
    assert folded.encode(Columns.of(profile)) == b"a;b 4\na;c 1\n"


def test_a_profile_in_another_unit_is_told_and_can_be_chosen():
    """The one that the viewer shows first is read."""
    content = orjson.loads(file_of(SAMPLED))
    memory = {**SAMPLED, "unit": "bytes", "name": "memory", "weights": [5, 5]}
    content["profiles"].append(memory)

    reading = read_bytes(orjson.dumps(content))

    assert reading.profile.type == "cpu"
    assert reading.warnings == ("left out 1 profile in bytes (--sample-type chooses)",)
    for asked in ("bytes", "space", "memory"):
        assert decode(orjson.dumps(content), sample_type=asked).total_value == 10
    with pytest.raises(ChoiceError, match="no such unit or profile in it; there are bytes, mill"):
        decode(orjson.dumps(content), sample_type="wall")
    content["activeProfileIndex"] = 1
    assert decode(orjson.dumps(content)).type == "space"


def test_both_sides_of_our_own_files_are_not_added_up():
    """A file of a comparison says so and asks which side."""
    before, after = some.sample_profile(), some.hostile_profile()
    content = writer.encode_pair(Columns.of(before), Columns.of(after))

    with pytest.raises(ChoiceError, match="--side before"):
        decode(content)
    assert decode(content, side="before").total_value == before.total_value
    assert decode(content, side="after").total_value == after.total_value
    with pytest.raises(ChoiceError, match="does not hold two sides"):
        decode(file_of(SAMPLED), side="after")


def test_evented_files_become_the_time_between_events():
    """Calls and returns give each stack the time until the next of them."""
    at = [("O", 0, 0), ("O", 1, 2), ("C", 1, 7), ("C", 0, 8)]
    events = [{"type": type_, "frame": frame, "at": time} for type_, frame, time in at]
    profile = decode(
        file_of({"type": "evented", "name": "t", "unit": "none", "startValue": 0, "endValue": 8,
                 "events": events})
    )  # fmt: skip

    counts = {tuple(place.function for place in row.stack): row.value for row in profile.rows()}
    assert counts == {("a",): 3, ("a", "b"): 5}


def test_calls_that_never_return_last_until_the_end():
    """The time outside of all calls is nobody's."""
    at = [("O", 0, 5), ("C", 0, 6), ("O", 0, 8), ("O", 1, 9.5)]
    events = [{"type": type_, "frame": frame, "at": time} for type_, frame, time in at]
    profile = decode(
        file_of({"type": "evented", "name": "t", "unit": "microseconds", "startValue": 0,
                 "endValue": 12, "events": events})
    )  # fmt: skip

    counts = {tuple(place.function for place in row.stack): row.value for row in profile.rows()}
    assert counts == {("a",): 2_500, ("a", "b"): 2_500}


def test_a_recursion_takes_memory_and_time_in_proportion_to_its_file():
    """Each call is one event, and its stack all the calls around it."""

    def recursion(depth: int) -> bytes:
        calls = [{"type": "O", "frame": 0, "at": at} for at in range(depth)]
        returns = [{"type": "C", "frame": 0, "at": depth + at} for at in range(depth)]
        return file_of({"type": "evented", "name": "t", "unit": "nanoseconds", "startValue": 0,
                        "endValue": 2 * depth, "events": calls + returns})  # fmt: skip

    begin_s = time.process_time()

    assert decode(recursion(1_000)).total_value == 1_999
    with pytest.raises(ProfileError, match="too deep and too many for a file of its size"):
        decode(recursion(50_000))
    assert time.process_time() - begin_s < 10


def test_threads_of_one_file_become_a_label():
    """py-spy and others write a profile per thread."""
    content = orjson.loads(file_of(SAMPLED))
    content["profiles"].append({**content["profiles"][0], "name": "u"})

    profile = decode(orjson.dumps(content))

    assert set(profile.label_sets) == {(("thread", "t"),), (("thread", "u"),)}
    assert profile.total_value == 2 * 3_500_000


@pytest.mark.parametrize(
    "content",
    [
        b'{"shared":{"frames":[]},"profiles":[]}',
        file_of(SAMPLED, frames=2),
        file_of({**SAMPLED, "weights": [1]}),
        file_of({**SAMPLED, "weights": [1, -2]}),
        file_of({**SAMPLED, "weights": [1, "2"]}),
        file_of({**SAMPLED, "samples": [[0, -1], [0]]}),
        file_of({**SAMPLED, "samples": [[0, "1"], [0]]}),
        file_of({**SAMPLED, "samples": 5}),
        file_of({**SAMPLED, "weights": [1, 1e300]}),
        file_of({**SAMPLED, "type": "evented"}),
        file_of({**SAMPLED, "type": ["evented"]}),
        file_of({**SAMPLED, "unit": "parsecs"}),
        file_of({**SAMPLED, "name": 7}),
    ],
)
def test_damaged_files_are_profile_errors(content):
    """Every wrong shape ends in one kind of error, with a message that says where."""
    with pytest.raises(ProfileError, match="cannot read speedscope: ") as raised:
        decode(content)
    assert not re.search(r"Error|object|'NoneType'|Traceback", str(raised.value))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"{", "damaged or cut off at line 1, column"),
        (b'{"shared": {},\n"profiles": [}', "damaged or cut off at line 2, column"),
        (b"[]", "not of speedscope"),
    ],
)
def test_other_json_is_not_called_speedscope(content, problem):
    """What is damaged is told by its place, in words of ours."""
    with pytest.raises(ProfileError, match=problem):
        decode(content)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 5) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@given(st.data())
def test_any_json_in_any_place_is_a_profile_or_a_profile_error(data):
    """Foreign values of any type surface as nothing else."""
    content = orjson.loads(writer.encode(Columns.of(some.sample_profile())))
    place = content
    for _ in range(data.draw(st.integers(0, 4))):
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        inner = [key for key in keys if isinstance(place[key], dict | list) and place[key]]
        if not inner:
            break
        place = place[data.draw(st.sampled_from(inner))]
    keys = list(place) if isinstance(place, dict) else list(range(len(place)))
    place[data.draw(st.sampled_from(keys))] = data.draw(json_values)

    with contextlib.suppress(ProfileError):
        decode(json.dumps(content).encode())


@pytest.mark.parametrize(
    ("members", "missing"),
    [
        ({"profiles": []}, "it has no shared"),
        ({"profiles": [], "shared": {}}, "shared has no frames"),
        ({"profiles": [], "shared": []}, "shared has no frames"),
        ({"shared": {"frames": []}}, "it has no profiles"),
        ({"shared": {"frames": []}, "profiles": {}}, "profiles of it is not a list"),
    ],
)
def test_a_file_whose_schema_is_speedscopes_is_told_what_it_lacks(members, missing):
    """It is not called JSON of something else."""
    schema = "https://www.speedscope.app/file-format-schema.json"
    with pytest.raises(ProfileError, match=f"cannot read speedscope: {missing}"):
        read_bytes(orjson.dumps({"$schema": schema, **members}))


def test_an_event_of_an_unknown_type_is_named():
    """It neither opens a frame nor closes one."""
    events = [{"type": "O", "at": 0, "frame": 0}, {"type": "X", "at": 1, "frame": 0}]
    document = {
        "shared": {"frames": [{"name": "f"}]},
        "profiles": [{"type": "evented", "unit": "none", "events": events}],
    }
    with pytest.raises(ProfileError, match=r"the type of profiles\[0\]\.events\[1\] is neither O"):
        read_bytes(orjson.dumps(document))
