"""pprof: round trips, other people's files, other people's tools, damaged files."""

import dataclasses
import gzip
import os
import re
import zlib
from collections import Counter
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.formats import pprof, pprof_arrays
from storage.formats.limits import Limits
from storage.formats.pprof_message import ProfileMessage, decompress
from storage.hashing import Hasher
from storage.profile import Accounting, Profile, ProfileError, SchemaError, Window
from symbolizer.location import (
    AddressLocation,
    ElfAddress,
    FileOffset,
    Frame,
    Kind,
    Module,
    NamedLocation,
    bounded,
)
from tests.support import profiles as some


@given(some.profiles())
def test_what_was_encoded_comes_back(profile):
    """Counts, labels, accounting, names and modules survive, whatever they are."""
    decoded = pprof.decode(pprof.encode(profile))

    assert decoded == profile
    assert decoded.period_ns == profile.period_ns
    assert decoded.modules == profile.modules
    assert some.named_locations(decoded) == some.named_locations(profile)


def test_hostile_names_come_back():
    """Names with separators, markup and escapes are only names."""
    profile = some.hostile_profile()

    assert pprof.decode(pprof.encode(profile)) == profile


def test_the_same_profile_gives_the_same_bytes():
    """No time or random order gets into a file, so that a repeated upload is the same object."""
    assert pprof.encode(some.sample_profile()) == pprof.encode(some.sample_profile())


def message(profile: Profile):
    parsed = ProfileMessage()
    parsed.ParseFromString(gzip.decompress(pprof.encode(profile)))
    return parsed


def packed(parsed) -> bytes:
    return gzip.compress(parsed.SerializeToString())


def text(parsed, index: int) -> str:
    return parsed.string_table[index].decode()


def test_the_accounting_is_the_first_comment():
    """Scripts find every count under the names that are written down."""
    profile = some.sample_profile()
    parsed = message(profile)

    comment = text(parsed, parsed.comment[0])
    assert comment.startswith("everflame {")
    record = orjson.loads(comment.removeprefix("everflame "))
    accounting = profile.accounting
    assert record["schema"] == 1
    assert record["window"] == list(profile.window)
    assert (record["host"], record["host_id"]) == ("web-1", "00112233445566aa")
    lost = sum(record["lost"].values())
    assert record["ticks"] == record["stored"] + record["idle"] + record["filtered"] + lost
    assert record["services"] == [
        {"labels": {"service": "api", "version": "1.5"}, "present_ns": 60_000_000_000}
    ]
    assert record["agent"] == {"cpu_ns": 80_000_000, "rss_bytes": 40_000_000}
    assert record["nonidle_ns"] == accounting.nonidle_ns


def test_values_and_period_follow_the_conventions():
    """samples/count and cpu/nanoseconds, with the period and the window in their fields."""
    parsed = message(some.sample_profile())

    types = [(text(parsed, each.type), text(parsed, each.unit)) for each in parsed.sample_type]
    assert types == [("samples", "count"), ("cpu", "nanoseconds")]
    assert parsed.period == 1_000_000_000 // 99
    assert parsed.time_nanos == some.WINDOW.start_ns
    assert parsed.duration_nanos == 60_000_000_000


def test_mappings_are_segments_with_addresses_as_linked():
    """Page-aligned p_vaddr and p_offset, so that other tools find symbols in the files."""
    parsed = message(some.sample_profile())

    by_name = {text(parsed, each.filename): each for each in parsed.mapping}
    api = by_name["/srv/api"]
    assert (api.memory_start, api.file_offset) == (0x401000, 0x1000)
    assert text(parsed, api.build_id) == "feed"
    main = next(each for each in parsed.location if each.mapping_id == api.id)
    assert main.address == 0x401100
    assert by_name["[kernel.kallsyms]"].memory_start == 0xFFFFFFFF81000000
    assert "[python]" in by_name


def test_the_first_mapping_is_the_main_binary():
    """pprof names it in its header: the module that is on the stacks most often, not the kernel."""
    parsed = message(some.sample_profile())

    assert text(parsed, parsed.mapping[0].filename) == "/srv/api"


def test_only_a_mapping_whose_locations_are_all_named_has_functions():
    """One address without a name is a reason for other tools to look it up."""
    parsed = message(some.sample_profile())

    has = {text(parsed, each.filename): each.has_functions for each in parsed.mapping}
    assert has["/srv/api"]
    assert not has["/usr/lib/x86_64-linux-gnu/libc.so.6"]


def test_function_known_by_its_fde_range_may_be_looked_up_by_others():
    """Its start stands where a name would, and other tools may know the name."""
    place = some.native(some.LIBC, 0x30000)
    in_range = bounded("libc.so.6", Kind.NATIVE, ElfAddress(0x2FF00))
    profile = some.build([({}, [place], 1)], {place: (in_range,)})

    parsed = message(profile)

    assert [text(parsed, each.name) for each in parsed.function] == ["libc.so.6+0x2ff00"]
    has = {text(parsed, each.filename): each.has_functions for each in parsed.mapping}
    assert not has["/usr/lib/x86_64-linux-gnu/libc.so.6"]
    assert pprof.decode(pprof.encode(profile)).frames(0) == (in_range,)


def test_process_ids_are_numbers_and_names_are_text():
    """pid is a number label, service a text label, as pprof's own filters expect them."""
    parsed = message(some.sample_profile())

    labels = {text(parsed, label.key): label for label in parsed.sample[0].label}
    assert labels["pid"].num == 77
    assert text(parsed, labels["service"].str) == "api"


def test_files_of_ours_that_another_tool_merged_add_up(go, tmp_path):
    """Several accountings in one file are summed, as their samples are."""
    first = some.sample_profile()
    second = dataclasses.replace(
        first,
        window=Window(first.window.end_ns, first.window.end_ns + 60_000_000_000),
    )
    for name, profile in (("1.pb.gz", first), ("2.pb.gz", second)):
        (tmp_path / name).write_bytes(pprof.encode(profile))

    go("tool", "pprof", "-symbolize=none", "-proto", "-output=both.pb.gz", "1.pb.gz", "2.pb.gz")

    both = pprof.decode((tmp_path / "both.pb.gz").read_bytes())
    assert both == some.merge([first, second])
    assert both.accounting.mismatch == 0


def test_go_tool_pprof_counts_the_same_functions(go, tmp_path):
    """Self and total of every function agree with pprof's own to the last nanosecond."""
    profile = some.sample_profile()
    (tmp_path / "p.pb.gz").write_bytes(pprof.encode(profile))

    shown = go("tool", "pprof", "-symbolize=none", "-unit=ns", "-nodefraction=0", "-top", "p.pb.gz")

    rows = re.findall(
        r"^ *(\d+)(?:ns)? +[\d.]+% +[\d.]+% +(\d+)(?:ns)? +[\d.]+%  (.+)$", shown, re.M
    )
    theirs = {name.removesuffix(" (inline)"): (int(flat), int(cum)) for flat, cum, name in rows}
    assert theirs == totals(profile)


def totals(profile: Profile) -> dict[str, tuple[int, int]]:
    """Count self and total by function name, the slow and obvious way."""
    own: Counter[str] = Counter()
    total: Counter[str] = Counter()
    shown = some.named_locations(profile)
    for row in profile.rows():
        names = [frame.function for place in row.stack for frame in reversed(shown[place])]
        own[names[-1]] += row.value
        total.update(dict.fromkeys(set(names), row.value))
    return {name: (own[name], total[name]) for name in total}


def test_go_tool_pprof_reads_addresses_labels_and_lines(go, tmp_path):
    """The raw dump shows the same samples, in pprof's order, with lines and inlined calls."""
    (tmp_path / "p.pb.gz").write_bytes(pprof.encode(some.sample_profile()))

    raw = go("tool", "pprof", "-symbolize=none", "-raw", "p.pb.gz")

    assert "samples/count cpu/nanoseconds" in raw
    # Columns are printed since Go 1.21.
    lines = r"0x401200 M=\d+ clamp clamp.h:7(:0)? s=0\n +work api.c:22(:0)? s=0"
    assert re.search(lines, raw)
    assert re.search(r"^ +5 +50505050: \d+ \d+ *$", raw, re.M)
    assert "pid:[77]" in raw
    assert "[kernel.kallsyms] 4b4b" in raw


GO_PROGRAM = """
package main

import ("os"; "runtime"; "runtime/pprof"; "time")

//go:noinline
func spin(until time.Time) int { n := 0; for time.Now().Before(until) { n++ }; return n }

var kept [][]byte

//go:noinline
func grow() { for i := 0; i < 64; i++ { kept = append(kept, make([]byte, 1<<20)) } }

func main() {
	cpu, _ := os.Create("cpu.pb.gz")
	pprof.StartCPUProfile(cpu)
	spin(time.Now().Add(700 * time.Millisecond))
	pprof.StopCPUProfile()
	grow()
	runtime.GC()
	heap, _ := os.Create("heap.pb.gz")
	pprof.WriteHeapProfile(heap)
	heap.Close()
}
"""


def test_profiles_of_go_programs_are_read(go, tmp_path):
    """A CPU profile gives time with Go's functions; a heap profile gives the bytes in use."""
    (tmp_path / "main.go").write_text(GO_PROGRAM)
    go("run", "main.go")

    cpu = pprof.decode((tmp_path / "cpu.pb.gz").read_bytes())
    heap = pprof.decode((tmp_path / "heap.pb.gz").read_bytes())

    assert (cpu.type, cpu.unit) == ("cpu", "nanoseconds")
    assert cpu.total_value == cpu.total_samples * cpu.period_ns
    assert totals(cpu)["main.spin"][1] > 0.5 * cpu.total_value
    frames = [frame for shown in some.named_locations(cpu).values() for frame in shown]
    assert any(frame.function == "main.spin" and frame.kind is Kind.GO for frame in frames)
    assert (heap.type, heap.unit) == ("inuse_space", "bytes")
    assert totals(heap)["main.grow"][1] > 30 << 20
    assert pprof.decode(pprof.encode(cpu)) == cpu
    assert pprof.decode(pprof.encode(heap)) == heap


def foreign(types, *, samples, locations=(), functions=(), mappings=()):
    """Write a file as some other profiler would: strings are given in place."""
    table: dict[str, int] = {"": 0}
    parsed = ProfileMessage()

    def index(name: str) -> int:
        return table.setdefault(name, len(table))

    for type_, unit in types:
        parsed.sample_type.add(type=index(type_), unit=index(unit))
    for ids, values in samples:
        parsed.sample.add(location_id=ids, value=values)
    for id_, name, file in functions:
        parsed.function.add(id=id_, name=index(name), filename=index(file))
    for id_, start, limit, offset, name, build_id in mappings:
        parsed.mapping.add(
            id=id_,
            memory_start=start,
            memory_limit=limit,
            file_offset=offset,
            filename=index(name),
            build_id=index(build_id),
        )
    for id_, mapping, address, lines in locations:
        location = parsed.location.add(id=id_, mapping_id=mapping, address=address)
        for function, line in lines:
            location.line.add(function_id=function, line=line)
    parsed.string_table.extend(name.encode() for name in table)
    return parsed


CPU = (("samples", "count"), ("cpu", "nanoseconds"))
ONE_FUNCTION = {
    "samples": [([1], [2, 20])],
    "locations": [(1, 0, 0x10, [(1, 5)])],
    "functions": [(1, "f", "f.c")],
}


@pytest.mark.parametrize(
    ("types", "values", "expected"),
    [
        (CPU, [2, 20], ("cpu", "nanoseconds", 2, 20)),
        ([("cpu", "milliseconds")], [20], ("cpu", "nanoseconds", 1, 20_000_000)),
        ([("waits", "count"), ("delay", "nanoseconds")], [3, 9], ("delay", "nanoseconds", 3, 9)),
        ([("wall", "microseconds"), ("cpu", "nanoseconds")], [7, 9], ("cpu", "nanoseconds", 1, 9)),
        ([("alloc_objects", "count"), ("alloc_space", "bytes"), ("inuse_objects", "count"),
          ("inuse_space", "bytes")], [1, 2, 3, 4], ("inuse_space", "bytes", 3, 4)),
        ([("cycles_sample", "count"), ("cycles_event", "count")], [5, 500],
         ("cycles_event", "count", 5, 500)),
    ],
)  # fmt: skip
def test_the_value_of_a_foreign_file_is_chosen_sensibly(types, values, expected):
    """cpu in time first, then any time, then the last; its count is the nearest before it."""
    parsed = foreign(types, **(ONE_FUNCTION | {"samples": [([1], values)]}))

    profile = pprof.decode(packed(parsed))

    assert (profile.type, profile.unit, profile.total_samples, profile.total_value) == expected
    assert profile.accounting == Accounting(ticks=expected[2], stored=expected[2])


def test_addresses_of_a_foreign_file_become_file_offsets():
    """Two runs under address randomisation give one location."""

    def run(start: int) -> Profile:
        parsed = foreign(
            CPU,
            samples=[([1], [1, 10])],
            locations=[(1, 1, start + 0x234, [])],
            mappings=[(1, start, start + 0x1000, 0x2000, "/usr/bin/prog", "abcd")],
        )
        return pprof.decode(packed(parsed))

    one, other = run(0x55550000), run(0x7FFF0000)

    assert one.locations == other.locations == (AddressLocation("abcd", FileOffset(0x2234)),)
    assert one.modules == {"abcd": Module("abcd", "/usr/bin/prog")}
    assert one.frames(0)[0].function == "[prog]"


def test_names_without_an_address_are_their_own_identity():
    """Interpreters write functions without addresses; inlined lines become frames of a stack."""
    parsed = foreign(
        CPU,
        samples=[([1], [1, 10]), ([2], [1, 10])],
        locations=[(1, 0, 0, [(1, 3), (2, 7)]), (2, 0, 0, [(2, 8)])],
        functions=[(1, "inner", "a.py"), (2, "outer", "a.py")],
    )

    profile = pprof.decode(packed(parsed))

    stacks = sorted(tuple(place.function for place in row.stack) for row in profile.rows())
    assert stacks == [("outer",), ("outer", "inner")]
    kinds = {place.function: place.kind for place in profile.locations}
    assert kinds == {"inner": Kind.INLINED, "outer": Kind.PYTHON}
    assert pprof.decode(pprof.encode(profile)) == profile


def test_one_address_with_two_names_stays_two_locations():
    """Some writers keep build ids but leave out addresses or repeat them."""
    parsed = foreign(
        CPU,
        samples=[([1], [1, 10]), ([2], [1, 10])],
        locations=[(1, 1, 0x10, [(1, 3)]), (2, 1, 0x10, [(2, 7)])],
        functions=[(1, "f", ""), (2, "g", "")],
        mappings=[(1, 0, 0x1000, 0, "/bin/x", "abcd")],
    )

    profile = pprof.decode(packed(parsed))

    assert totals(profile) == {"f": (10, 10), "g": (10, 10)}


def test_names_of_a_foreign_file_are_made_readable():
    """Bytes that are not UTF-8 and control characters do not get any further."""
    parsed = foreign(CPU, **ONE_FUNCTION)
    at = list(parsed.string_table).index(b"f")
    parsed.string_table[at] = b"\xff\x1b[31m\nf"

    profile = pprof.decode(packed(parsed))

    assert profile.frames(0)[0].function == r"\xff\x1b[31m\nf"


def test_uncompressed_and_split_gzip_files_are_read():
    """Both occur: pprof accepts plain protobuf, and gzip files may have several members."""
    profile = some.sample_profile()
    plain = gzip.decompress(pprof.encode(profile))
    members = gzip.compress(plain[:100]) + gzip.compress(plain[100:])

    assert pprof.decode(plain) == profile
    assert pprof.decode(members) == profile


def test_a_profile_of_a_later_schema_is_refused_by_name():
    """It is not guessed at: the error says which schema and what reads it."""
    parsed = message(some.sample_profile())
    replace_comment(parsed, b'"schema":1', b'"schema":2')

    with pytest.raises(SchemaError, match="schema 2"):
        pprof.decode(packed(parsed))


def test_unknown_fields_of_the_accounting_are_ignored():
    """Later versions may add fields within a schema."""
    parsed = message(some.sample_profile())
    replace_comment(parsed, b'"schema":1', b'"schema":1,"weather":["fine"]')

    assert pprof.decode(packed(parsed)) == some.sample_profile()


def replace_comment(parsed, old: bytes, new: bytes, number: int = 0) -> None:
    index = parsed.comment[number]
    assert old in parsed.string_table[index]
    parsed.string_table[index] = parsed.string_table[index].replace(old, new)


def add_comment(parsed, old: bytes, new: bytes) -> None:
    """Add the first comment again, with other content, as a tool that merges files does."""
    comment = parsed.string_table[parsed.comment[0]]
    assert old in comment
    parsed.comment.append(len(parsed.string_table))
    parsed.string_table.append(comment.replace(old, new))


def test_a_gzip_bomb_is_refused_before_it_fills_the_memory():
    """The limit is on the size after decompression, and it is named."""
    bomb = gzip.compress(bytes(50_000_000))

    with pytest.raises(ProfileError, match="more than 1,000,000 bytes"):
        pprof.decode(bomb, Limits(size_bytes=1_000_000))


def test_inlined_calls_cannot_multiply_without_bound():
    """A location of 3,000 inlined calls, 12,000 times on a stack, is refused: 36 million frames."""
    lines = [(1, number) for number in range(3_000)]
    bomb = foreign(
        CPU,
        samples=[([1] * 12_000, [1, 10])],
        locations=[(1, 0, 0, lines)],
        functions=[(1, "f", "f.c")],
    )

    with pytest.raises(ProfileError, match="more than 33,554,432 inlined calls"):
        pprof.decode(packed(bomb))


def test_a_foreign_window_ends_where_times_end():
    """Start and duration of 63 bits each have a sum that no integer column holds."""
    late = foreign(CPU, **ONE_FUNCTION)
    late.time_nanos = late.duration_nanos = 2**63 - 1

    assert pprof.decode(packed(late)).window == Window(2**63 - 1, 2**63 - 1)
    assert pprof_arrays.decode(packed(late), Hasher(b"key")).objects[0, 1] == 2**63 - 1


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda p: p.sample[0].location_id.append(99), "no location has the id 99"),
        (lambda p: setattr(p.location[0], "mapping_id", 99), "no mapping has the id 99"),
        (lambda p: setattr(p.location[0].line[0], "function_id", 99), "no function has the id 99"),
        (lambda p: setattr(p.location[1], "id", 1), "location id 1 is not unique"),
        (lambda p: setattr(p.function[0], "id", 0), "function id 0 is not unique"),
        (lambda p: setattr(p.function[0], "name", 10**6), "no string number 1000000"),
        (lambda p: setattr(p.function[0], "name", -1), "no string number -1"),
        (lambda p: p.comment.insert(0, -5), "no string number -5"),
        (lambda p: p.sample[0].value.__setitem__(1, -1), "negative value"),
        (lambda p: p.sample[0].value.append(1), "too many values or too few"),
        (lambda p: p.sample[0].value.__setitem__(1, 2**63 - 1), "more than 2\\^62"),
        (lambda p: p.ClearField("sample_type"), "unexpected values|what its values are"),
        (lambda p: setattr(p.sample_type[1], "unit", p.sample_type[0].unit), "not nanoseconds"),
        (lambda p: replace_comment(p, b"{", b"["), "our comment is damaged"),
        (lambda p: replace_comment(p, b'"ticks":23', b'"ticks":-3'), "'ticks'"),
        (lambda p: replace_comment(p, b'"ticks":23', b'"ticks":"x"'), "'ticks'"),
        (lambda p: replace_comment(p, b'"lost":{', b'"lost":[{'), "damaged"),
        (lambda p: replace_comment(p, b"[155648,", b"[%d," % (2**64 - 1), 1), "is too long"),
        (lambda p: add_comment(p, b'"ticks":23', b'"ticks":%d' % 2**62), "more than 2\\^62"),
        (lambda p: replace_comment(p, b'"host_id":"', b'"host_id":7,"x":"'), None),
        (lambda p: replace_comment(p, b'"window":[', b'"window":[9,'), "not an interval"),
    ],
)
def test_damaged_references_and_counts_are_named(change, complaint):
    """Every check has its own message, and none ends in another kind of error."""
    parsed = message(some.sample_profile())
    change(parsed)

    if complaint is None:
        pprof.decode(packed(parsed))
        return
    with pytest.raises(ProfileError, match=complaint):
        pprof.decode(packed(parsed))


@given(st.data())
def test_a_damaged_file_is_a_profile_error_or_a_profile(data):
    """Flipped and missing bytes never surface as an error of the parser's."""
    plain = bytearray(gzip.decompress(pprof.encode(some.sample_profile())))
    for _ in range(data.draw(st.integers(1, 6))):
        plain[data.draw(st.integers(0, len(plain) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(plain[: data.draw(st.integers(0, len(plain)))])

    try:
        profile = pprof.decode(cut)
    except ProfileError:
        return
    assert profile.total_samples >= 0


@pytest.mark.parametrize("keep", [3, 17, -9, -1])
def test_a_cut_gzip_file_is_named(keep):
    """A half-written upload is damaged, not empty."""
    with pytest.raises(ProfileError, match="gzip"):
        pprof.decode(pprof.encode(some.sample_profile())[:keep])


def test_gzip_of_more_members_than_any_tool_writes_is_refused():
    """Each costs time that its content does not show."""
    content = gzip.compress(b"x") + gzip.compress(b"") * 99

    assert decompress(content, Limits(members=100)) == b"x"
    with pytest.raises(ProfileError, match="more than 99 gzip members"):
        decompress(content, Limits(members=99))


def test_gzip_with_a_wrong_checksum_or_a_tail_is_damaged():
    """What gzip itself can notice is noticed."""
    content = bytearray(pprof.encode(some.sample_profile()))
    content[-8] ^= 1
    with pytest.raises(ProfileError, match="damaged gzip"):
        pprof.decode(bytes(content))
    with pytest.raises(ProfileError, match="after the gzip data"):
        pprof.decode(pprof.encode(some.sample_profile()) + b"tail")


@pytest.mark.parametrize("content", [b"", b"hello", b"\x00" * 40, zlib.compress(b"x")])
def test_something_else_is_not_a_profile(content):
    """Any other file is refused with a message, also an empty one."""
    with pytest.raises(ProfileError):
        pprof.decode(content)


def test_the_golden_file_has_not_changed():
    """Files written by the first version are read for ever (regenerate: UPDATE_GOLDEN=1)."""
    golden = Path(__file__).parents[2] / "golden" / "sample.pb.gz"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_bytes(pprof.encode(some.sample_profile()))

    profile = pprof.decode(golden.read_bytes())

    assert profile == some.sample_profile()
    assert some.named_locations(profile) == some.named_locations(some.sample_profile())


def test_kinds_and_modules_that_differ_from_the_mapping_survive():
    """A frame may belong to another module or kind than the file it was found in."""
    odd = Frame("native Foo", "other", Kind.GO, "x.go", 3)
    profile = some.build(
        [({}, [some.MAIN, NamedLocation("go other", "other", Kind.GO, "", 0, 0)], 1)],
        {some.MAIN: (odd,)},
    )

    decoded = pprof.decode(pprof.encode(profile))

    assert some.named_locations(decoded) == some.named_locations(profile)
