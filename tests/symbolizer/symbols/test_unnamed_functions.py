"""Functions that have an FDE but no name: each is one box, and nothing else is in it."""

import contextlib
import dataclasses
import os
import shutil
import struct
import subprocess
import time
import tracemalloc
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from profiler.flamegraph import flamegraph
from storage.profile import Accounting, ProfileBuilder
from symbolizer.location import Frame, Kind, Miss
from symbolizer.maps import Mapping, MappingTable
from symbolizer.symbolizer import Symbolizer
from symbolizer.symbols.candidates import IN_FDE_RANGE
from symbolizer.symbols.elf import FileSource, MemorySource, UnreadableElf, read_elf
from symbolizer.symbols.functions import read_functions
from symbolizer.unwind.cfi import read_eh_frame
from symbolizer.unwind.fde_ranges import read_fde_ranges
from tests.support.elf_files import (
    REAL_FILES,
    build,
    names_at,
    read_symbols,
    read_table,
    real_file,
    starts_at,
    strip,
)
from tests.support.frame_files import CODE, FrameSection, make_elf
from tests.support.profiles import PERIOD_NS, WINDOW

PROGRAM = """
#include <stdio.h>
#define FUNCTION static __attribute__((noipa)) int
FUNCTION first(int n) { return n * 7 + (n >> 3); }
FUNCTION second(int n) { for (int i = 0; i < n; i++) n ^= first(i); return n; }
FUNCTION third(int n) { printf("%d\\n", n); return second(n) - 5; }
FUNCTION fourth(int n) { return n > 9 ? third(n) : first(n) + second(n); }
int main(int argc, char **argv) { return fourth(argc) + third(argc); }
"""
OWN = {b"first", b"second", b"third", b"fourth", b"main"}

LIBRARY = """
#define HIDDEN static __attribute__((noipa)) int
HIDDEN before(int n) { return n * 7 + (n >> 3); }
int shown(int n) { return before(n) + 1; }
HIDDEN between(int n) { return n * 9 + (n >> 5); }
int offered(int n) { return between(n) + before(n); }
HIDDEN after(int n) { return n * 11 + (n >> 7); }
int given(int n) { return after(n) + between(n); }
"""

# What an exported function of hand-written assembly looks like: no size, but call frame
# information; behind it functions with and without. And one that a compiler has left empty.
ASSEMBLER = """
    .text
    .globl unsized, unframed, inner, empty
unsized:
    .cfi_startproc
    nop; nop; nop; nop
    .cfi_endproc
    .type neighbour, @function
neighbour:
    .cfi_startproc
    nop; nop; nop; nop
    .cfi_endproc
    nop; nop; nop; nop                      # belongs to nobody
unframed: nop; nop; nop; nop
    .type around, @function
around:
    .cfi_startproc
    nop; nop
    .type inner, @function
inner: nop; nop
    .size inner, 2
    nop; nop
    .cfi_endproc
    .type empty, @function
empty:
    .cfi_startproc
    .cfi_endproc
    .size empty, 0
    .type behind, @function
behind:
    .cfi_startproc
    nop; nop
    .cfi_endproc
    .globl short
    .type short, @function
short:
    .cfi_startproc
    nop; nop; nop
    .size short, 1
    .cfi_endproc
"""

LLD = pytest.param(
    ("-fuse-ld=lld",),
    marks=pytest.mark.skipif(not shutil.which("ld.lld"), reason="no ld.lld: install lld"),
)


def own_functions(path, names):
    return [symbol for symbol in read_symbols(path) if symbol.name in names and symbol.size]


def places_in(symbol):
    return [symbol.address, symbol.address + symbol.size // 2, symbol.address + symbol.size - 1]


@pytest.mark.parametrize(
    "flags",
    [
        ("-pie",),
        ("-no-pie",),
        ("-static",),
        ("-static-pie",),
        ("-Wl,-z,noseparate-code",),
        ("-Wl,--no-eh-frame-hdr",),
        LLD,
    ],
)
def test_every_function_of_a_stripped_program_has_its_start(tmp_path, flags):
    """All bytes of a function lead to the address that readelf told of the unstripped twin."""
    path = build(tmp_path / "program", PROGRAM, *flags)
    symbols = own_functions(path, OWN)
    assert {symbol.name for symbol in symbols} == OWN

    table = read_table(strip(path))

    for symbol in symbols:
        assert starts_at(table, places_in(symbol)) == [symbol.address] * 3
        assert names_at(table, places_in(symbol)) == [None] * 3


def test_functions_of_a_complete_file_have_no_fde_ranges(tmp_path):
    """Where .symtab says what there is, FDEs add nothing."""
    table = read_table(build(tmp_path / "program", PROGRAM))

    assert (table.unnamed_starts(np.arange(len(table))) == -1).all()


def test_exported_functions_keep_their_names_and_no_more(tmp_path):
    """In a stripped library exported and hidden functions take turns."""
    path = build(tmp_path / "library", LIBRARY, "-shared", "-fPIC")
    exported = own_functions(path, {b"shown", b"offered", b"given"})
    hidden = own_functions(path, {b"before", b"between", b"after"})
    assert len(hidden) == 3

    table = read_table(strip(path))

    for symbol in exported:
        assert names_at(table, places_in(symbol)) == [symbol.name] * 3
    for symbol in hidden:
        assert names_at(table, places_in(symbol)) == [None] * 3
        assert starts_at(table, places_in(symbol)) == [symbol.address] * 3


@pytest.fixture
def assembled(tmp_path):
    flags = ("-nostdlib", "-shared")
    path = build(tmp_path / "library", ASSEMBLER, *flags, language="assembler")
    address = {symbol.name.decode(): symbol.address for symbol in read_symbols(path)}
    return read_table(strip(path)), address


def test_exported_function_without_a_size_ends_with_its_fde(assembled):
    """Neither its neighbour nor the bytes behind that are its own."""
    table, address = assembled
    start = address["unsized"]

    assert names_at(table, range(start, start + 12)) == [b"unsized"] * 4 + [None] * 8
    assert starts_at(table, range(start + 4, start + 12)) == [start + 4] * 4 + [None] * 4


def test_exported_function_without_a_size_and_fde_has_no_name(assembled):
    """Nothing says where it ends."""
    table, address = assembled

    assert names_at(table, [address["unframed"]]) == [None]
    assert starts_at(table, [address["unframed"]]) == [None]


def test_empty_function_does_not_name_the_one_behind_it(assembled):
    """Both begin at one address: the body of the first cannot be reached, so it has none."""
    table, address = assembled
    assert address["empty"] == address["behind"]

    assert names_at(table, [address["behind"], address["behind"] + 1]) == [None] * 2
    assert starts_at(table, [address["behind"] + 1]) == [address["behind"]]


def test_name_inside_of_an_fde_range_leaves_the_rest_one_function(assembled):
    """The bytes before and behind it lead to the same start."""
    table, address = assembled
    start = address["around"]

    assert names_at(table, range(start, start + 6)) == [None] * 2 + [b"inner"] * 2 + [None] * 2
    assert starts_at(table, range(start, start + 6)) == [start] * 2 + [None] * 2 + [start] * 2


def test_fde_range_begins_behind_a_name_that_is_shorter(assembled):
    """A start that has a name of its own would be taken for that function."""
    table, address = assembled
    start = address["short"]

    assert names_at(table, range(start, start + 3)) == [b"short", None, None]
    assert starts_at(table, range(start, start + 3)) == [None, start + 1, start + 1]


@pytest.mark.parametrize(("begin", "end"), [(".cfi_startproc", ".cfi_endproc; nop; nop"), ("", "")])
def test_start_ends_with_its_fde_or_before_the_next(tmp_path, begin, end):
    """The entry point is bounded by what the file says, not by how long it usually is."""
    source = f"""
    .globl _start
_start:
    {begin}
    call _start
    nop; nop
    {end}
    .type next, @function
next:
    .cfi_startproc
    nop; nop
    .cfi_endproc
    .fill 64, 1, 0x90
    """
    path = build(tmp_path / "program", source, "-nostdlib", "-static", language="assembler")
    address = {symbol.name: symbol.address for symbol in read_symbols(path)}
    start, behind = address[b"_start"], address[b"next"]

    table = read_table(strip(path))

    assert names_at(table, range(start, behind)) == [b"_start"] * 7 + [None] * (behind - start - 7)
    assert starts_at(table, [start, behind - 1, behind, behind + 2]) == [None, None, behind, None]


@pytest.mark.parametrize("pattern", REAL_FILES)
def test_index_and_section_of_real_files_agree(pattern):
    """The header's table and a walk over all of .eh_frame find the same functions."""
    path = real_file(pattern)
    with path.open("rb") as file:
        elf = read_elf(FileSource(file.fileno()))
        starts, ends = read_fde_ranges(dataclasses.replace(elf, sections=()))
        walked = read_eh_frame(elf)
    order = np.argsort(starts)

    assert len(starts) > 1000
    assert np.array_equal(starts[order], walked.starts)
    assert np.array_equal(ends[order], walked.ends)


def test_real_library_agrees_with_readelf():
    """Each FDE's addresses lead to its start or have a name of their own."""
    libc = Path(os.path.realpath("/lib/x86_64-linux-gnu/libc.so.6"))
    command = ["readelf", "--wide", "--debug-dump=frames", libc]
    output = subprocess.run(command, check=False, capture_output=True, timeout=60).stdout
    ranges = [
        tuple(int(word, 16) for word in line.rpartition(b"pc=")[2].split(b".."))
        for line in output.splitlines()
        if b" FDE " in line
    ]
    table = read_table(libc)
    chance = np.random.default_rng(5)
    chosen = [ranges[i] for i in chance.choice(len(ranges), 1500, replace=False).tolist()]
    places = [int(chance.integers(start, end)) for start, end in chosen]

    names, starts = names_at(table, places), starts_at(table, places)

    found = 0
    named = {symbol.address + symbol.size for symbol in read_symbols(libc)}
    for (fde_start, _), name, start in zip(chosen, names, starts, strict=True):
        assert (name is None) != (start is None)
        # Behind a name that is shorter than its FDE, that is where the rest begins.
        assert start in (None, fde_start) or start in named
        found += start == fde_start
    assert found > 300


# Damage.


class Stripped(NamedTuple):
    """A file, where its header for .eh_frame is and where its .eh_frame is."""

    content: bytes
    header: int
    count: int
    frames: int
    end: int

    def with_table(self, change) -> bytes:
        """Return the file with another table of (first address, FDE) in its header."""
        begin, end = self.header + 12, self.header + 12 + 8 * self.count
        table = np.frombuffer(self.content[begin:end], "<i4").reshape(-1, 2)
        changed = np.asarray(change(table), dtype="<i4").tobytes()
        assert len(changed) == end - begin
        return self.content[:begin] + changed + self.content[end:]

    def with_bytes(self, at: int, content: bytes) -> bytes:
        return self.content[:at] + content + self.content[at + len(content) :]


@pytest.fixture(scope="module")
def stripped(tmp_path_factory):
    path = strip(build(tmp_path_factory.mktemp("fde_ranges") / "program", PROGRAM))
    with path.open("rb") as file:
        elf = read_elf(FileSource(file.fileno()))
    sections = {section.name: section for section in elf.sections}
    header, frames = sections[b".eh_frame_hdr"], sections[b".eh_frame"]
    content = path.read_bytes()
    (count,) = struct.unpack_from("<I", content, header.offset + 8)
    return Stripped(content, header.offset, count, frames.offset, frames.offset + frames.size)


def unnamed_ranges(content: bytes) -> list[tuple[int, int]]:
    """Return the ranges without a name that are in the table, whatever function they belong to."""
    elf = read_elf(MemorySource(content))
    functions, _ = read_functions(elf)
    starts, ends = functions.starts.astype(np.int64), functions.ends.astype(np.int64)
    assert (starts < ends).all()
    assert (ends[:-1] <= starts[1:]).all()
    limit = max(segment.p_offset + segment.p_filesz for segment in elf.segments)
    assert not len(ends) or functions.base + ends[-1] <= limit
    is_unnamed = functions.names >> 30 == 1
    first = functions.names[is_unnamed] & ~IN_FDE_RANGE
    assert (first < len(starts)).all()
    assert (functions.starts[first] <= functions.starts[is_unnamed]).all()
    return list(zip(starts[is_unnamed].tolist(), ends[is_unnamed].tolist(), strict=True))


def test_table_in_any_order_gives_the_same_fde_ranges(stripped):
    """The order is the linker's promise to the C++ runtime; it is not needed here."""
    whole = unnamed_ranges(stripped.content)
    assert len(whole) >= len(OWN)

    assert unnamed_ranges(stripped.with_table(lambda table: table[::-1])) == whole


def test_row_that_its_fde_denies_gives_nothing(stripped):
    """A function begins where both copies of the address say so."""
    whole = unnamed_ranges(stripped.content)
    twisted = stripped.with_table(lambda table: np.column_stack([table[:, 0], table[::-1, 1]]))
    moved = stripped.with_table(lambda table: np.add(table, [1, 0]))

    assert set(unnamed_ranges(twisted)) <= set(whole)
    # No row is left, so .eh_frame itself is read.
    assert unnamed_ranges(moved) == whole


@pytest.mark.parametrize(
    ("at", "content"),
    [
        (0, b"\2"),  # a version that nobody has written yet
        (1, b"\xff"),  # no .eh_frame
        (2, b"\xff"),  # no count
        (3, b"\xff"),  # no table
        (4, b"\xff\xff\xff\x7f"),  # .eh_frame is outside of the file
        (8, b"\xff\xff\xff\xff"),  # more rows than there are bytes
        (8, b"\0\0\0\0"),
    ],
)
def test_section_is_read_where_the_header_is_of_no_use(stripped, at, content):
    damaged = stripped.with_bytes(stripped.header + at, content)

    assert unnamed_ranges(damaged) == unnamed_ranges(stripped.content)


def test_table_may_end_early(stripped):
    """What it does not list is left out."""
    shorter = stripped.with_bytes(stripped.header + 8, struct.pack("<I", stripped.count - 2))

    found = unnamed_ranges(shorter)

    assert found
    assert set(found) < set(unnamed_ranges(stripped.content))


def with_sizes(stripped: Stripped, change) -> bytes:
    """Return the file with other sizes in its FDEs, by the rows of the header's table."""
    content = bytearray(stripped.content)
    for row in range(stripped.count):
        _, distance = struct.unpack_from("<ii", content, stripped.header + 12 + 8 * row)
        at = stripped.header + distance + 12
        (size,) = struct.unpack_from("<I", content, at)
        struct.pack_into("<I", content, at, change(row, size))
    return bytes(content)


def test_fde_that_reaches_into_the_next_ends_before_it(stripped):
    """Each function has its own start, however long the one before it claims to be."""
    whole = unnamed_ranges(stripped.content)

    last = stripped.count - 1  # which would reach out of the code
    found = unnamed_ranges(with_sizes(stripped, lambda row, size: size + 24 * (row < last)))

    assert {start for start, _ in whole} <= {start for start, _ in found}
    assert found != whole


@pytest.mark.parametrize("size", [0, 0x7FFFFFFF, 0xFFFFFFFF])
def test_fde_that_reaches_out_of_the_code_counts_for_nothing(stripped, size):
    """Nor does an empty one; the others stay."""
    whole = unnamed_ranges(stripped.content)
    row = stripped.count - 1

    found = unnamed_ranges(with_sizes(stripped, lambda i, old: size if i == row else old))

    assert len(found) == len(whole) - 1
    assert set(found) < set(whole)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_damaged_headers_and_frames_raise_nothing(stripped, data):
    """Whatever their bytes are, ranges stay disjoint and inside of the code."""
    content = bytearray(stripped.content)
    for _ in range(data.draw(st.integers(1, 30))):
        inside = (stripped.header, stripped.end - 1)
        fields = (stripped.header, stripped.header + 40)
        at = data.draw(st.integers(*inside) | st.integers(*fields))
        content[at] = data.draw(st.integers(0, 255) | st.sampled_from([0, 0x7F, 0x80, 0xFF]))

    unnamed_ranges(bytes(content))


@settings(max_examples=200, deadline=None)
@given(section=st.binary(max_size=400))
@example(section=b"\xff" * 400)
def test_random_frames_raise_nothing(section):
    """No section is well-formed here, and there is no header."""
    unnamed_ranges(make_elf({b".eh_frame": section}))


def test_overlapping_fdes_become_disjoint():
    """The later start wins, and of several with one start the longest."""
    section = FrameSection()
    section.add_cie()
    for start, size in ((256, 32), (0, 300), (64, 16), (64, 32), (0x2FF0, 0x100)):
        section.add_fde(CODE + start, size)

    found = unnamed_ranges(make_elf({b".eh_frame": section.content}))

    assert found == [(0, 64), (64, 96), (256, 288)]


def add_index(content: bytes, section: bytes, rows: int) -> bytes:
    """Turn the last program header into one of an .eh_frame_hdr that has as many rows as asked."""
    index = struct.pack("<4BiI", 1, 0x1B, 3, 0x3B, -4, rows) + section
    phoff, offset = 64 + 56, len(content)
    address = 0x10000000
    phdr = struct.pack(
        "<IIQQQQQQ", 0x6474E550, 4, offset, address, address, len(index), len(index), 4
    )
    return content[:phoff] + phdr + content[phoff + 56 :] + index


def test_many_rows_cost_little(tmp_path):
    """A table of a million rows on one FDE, and one beyond the limit, end soon."""
    content = make_elf({b".eh_frame": b"\xff" * 64}, code_addresses=(CODE, CODE))
    outcomes = []

    started = time.monotonic()
    for rows in (1 << 20, 1 << 21):
        path = tmp_path / f"{rows}"
        path.write_bytes(add_index(content, bytes(8 * rows), rows))
        with path.open("rb") as file:
            elf = read_elf(FileSource(file.fileno()))
            elf = dataclasses.replace(elf, loaded=(*elf.loaded, elf.eh_frame_hdr))
            tracemalloc.start()
            with contextlib.suppress(UnreadableElf):
                outcomes.append(len(read_fde_ranges(elf)[0]))
            functions, _ = read_functions(elf)
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert not len(functions.starts)
        assert peak < 96 << 20

    assert outcomes == [0]  # the second is TOO_LARGE
    assert time.monotonic() - started < 20


def test_large_section_without_an_index_is_left_unread(tmp_path):
    """It would have to be walked, inside of the sampling process."""
    section = FrameSection()
    section.add_cie()
    section.add_fde(CODE, 64)
    assert unnamed_ranges(make_elf({b".eh_frame": section.content})) == [(0, 64)]

    assert unnamed_ranges(make_elf({b".eh_frame": section.content + bytes(3 << 20)})) == []


# What is shown.


def map_file(path: Path, base: int = 0x7F0000000000) -> MappingTable:
    status = path.stat()
    device = (os.major(status.st_dev), os.minor(status.st_dev))
    mapping = Mapping(base, base + status.st_size, 0, bytes(path), device, status.st_ino)
    return MappingTable.of([mapping])


@pytest.fixture
def symbolizer(tmp_path):
    symbolizer = Symbolizer(tmp_path / "cache")
    yield symbolizer
    symbolizer.close()


def locate(symbolizer, path, elf_addresses):
    """Locate addresses as linked in a process that cannot exist."""
    with path.open("rb") as file:
        (segment,) = read_elf(FileSource(file.fileno())).segments
    offsets = [address - segment.p_vaddr + segment.p_offset for address in elf_addresses]
    places = np.array(offsets, dtype=np.uint64) + np.uint64(0x7F0000000000)
    return symbolizer.locate(2**22 + 1, map_file(path), places)


@pytest.mark.parametrize("flags", [("-pie",), ("-no-pie",)])
def test_addresses_of_a_stripped_function_are_one_box(tmp_path, symbolizer, flags):
    """Different locations, one frame, named after the function's address as linked."""
    path = build(tmp_path / "program", PROGRAM, *flags)
    functions = own_functions(path, OWN)
    strip(path)
    places = locate(symbolizer, path, [a for f in functions for a in places_in(f)])
    builder = ProfileBuilder(PERIOD_NS)
    builder.modules.update(symbolizer.modules)

    for place, frames in zip(places, symbolizer.names(places), strict=True):
        builder.add((), [builder.location(place, frames)], 1)
    profile = builder.build(WINDOW, Accounting(ticks=len(places), stored=len(places)))
    graph = flamegraph.build(profile)

    assert len(set(places)) == 3 * len(OWN)
    boxes = {graph.path(node) for node in range(1, len(graph))}
    assert boxes == {(Frame(f"program+{f.address:#x}", "program", Kind.NATIVE),) for f in functions}
    assert sorted(graph.total.tolist()[1:]) == [3 * PERIOD_NS] * len(OWN)


def test_place_outside_of_fde_ranges_has_no_frame(tmp_path, symbolizer):
    """It stays in its module's box, and all that has no name is counted, extent or not."""
    path = build(tmp_path / "program", PROGRAM)
    (first,) = own_functions(path, {b"first"})
    (init,) = [s.address for s in read_symbols(path) if s.name == b"_init"]
    places = locate(symbolizer, strip(path), [first.address, first.address + 1, init])

    frames = symbolizer.names(places)

    assert frames[0] == frames[1] != ()
    assert frames[2] == ()
    assert symbolizer.misses == {Miss.NO_SYMBOL: 3}


def test_file_without_any_name_says_so(tmp_path, symbolizer):
    """Extents are no symbols."""
    source = ".type f, @function\nf: .cfi_startproc; nop; .cfi_endproc; nop"
    path = build(tmp_path / "lib", source, "-nostdlib", "-shared", language="assembler")
    start = next(symbol.address for symbol in read_symbols(path) if symbol.name == b"f")
    places = locate(symbolizer, strip(path), [start, start + 1])

    frames = symbolizer.names(places)

    assert frames == [(Frame(f"lib+{start:#x}", "lib", Kind.NATIVE),), ()]
    assert symbolizer.misses == {Miss.STRIPPED: 2}


def test_fde_ranges_are_kept_in_the_cache(tmp_path, symbolizer):
    """With a build id in the record, a later profiler shows the same without the file."""
    path = build(tmp_path / "program", PROGRAM)
    (first,) = own_functions(path, {b"first"})
    places = locate(symbolizer, strip(path), [first.address])
    expected = symbolizer.names(places)
    path.unlink()
    mapping = Mapping(0x1000, 1 << 40, 0, bytes(path), build_id=places[0].build_id)
    again = Symbolizer(tmp_path / "cache")

    address = np.array([0x1000 + places[0].offset], dtype=np.uint64)
    found = again.names(again.locate(2**22 + 1, MappingTable.of([mapping]), address))

    again.close()
    assert found == expected == [(Frame(f"program+{first.address:#x}", "program", Kind.NATIVE),)]
