"""Functions that have an FDE but no name: each is shown as one box of its own."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from profiler.flamegraph import flamegraph
from storage.columns import Columns
from storage.profile import Accounting, ProfileBuilder
from symbolizer.location import AddressLocation, Frame, Kind, Miss
from symbolizer.maps import MappingTable
from symbolizer.symbols.elf import FileSource, read_elf
from tests.support.elf_files import (
    build,
    names_at,
    read_symbols,
    read_table,
    starts_at,
    strip,
)
from tests.support.naming import NO_PROCESS, Naming, mapping_of_file
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

# An exported function of handwritten assembly: no size, but call frame information. After it,
# functions with and without FDEs, and one that a compiler has left empty.
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
    nop; nop; nop; nop                      # not part of any function
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
    """All bytes of a function lead to the address that readelf prints for the unstripped file."""
    path = build(tmp_path / "program", PROGRAM, *flags)
    symbols = own_functions(path, OWN)
    assert {symbol.name for symbol in symbols} == OWN

    table = read_table(strip(path))

    for symbol in symbols:
        assert starts_at(table, places_in(symbol)) == [symbol.address] * 3
        assert names_at(table, places_in(symbol)) == [None] * 3


def test_functions_without_a_symbol_are_unnamed_even_beside_a_symtab(tmp_path):
    """strip(1) may have been told to keep some symbols."""
    path = build(tmp_path / "program", PROGRAM)
    main = next(symbol for symbol in read_symbols(path) if symbol.name == b"main")
    others = [s for s in read_symbols(path) if s.kind == "FUNC" and s.size and s.name != b"main"]
    strip(path, "-K", "main")
    table = read_table(path)

    assert names_at(table, [main.address]) == [b"main"]
    lost = [s.address for s in others if main.address - 200 < s.address < main.address]
    assert lost
    assert starts_at(table, lost) == lost


def test_names_of_exported_functions_do_not_cover_hidden_ones(tmp_path):
    """In a stripped library, exported and hidden functions alternate."""
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
    """Neither its neighbour nor the bytes after that are part of it."""
    table, address = assembled
    start = address["unsized"]

    assert names_at(table, range(start, start + 12)) == [b"unsized"] * 4 + [None] * 8
    assert starts_at(table, range(start + 4, start + 12)) == [start + 4] * 4 + [None] * 4


def test_exported_function_without_size_and_fde_has_no_name(assembled):
    """Nothing says where it ends."""
    table, address = assembled

    assert names_at(table, [address["unframed"]]) == [None]
    assert starts_at(table, [address["unframed"]]) == [None]


def test_empty_function_does_not_name_the_next_one(assembled):
    """Both begin at one address; compilers emit unreachable functions empty."""
    table, address = assembled
    assert address["empty"] == address["behind"]

    assert names_at(table, [address["behind"], address["behind"] + 1]) == [None] * 2
    assert starts_at(table, [address["behind"] + 1]) == [address["behind"]]


def test_name_inside_an_fde_range_leaves_the_rest_one_function(assembled):
    """The bytes before and after it lead to the same start."""
    table, address = assembled
    start = address["around"]

    assert names_at(table, range(start, start + 6)) == [None] * 2 + [b"inner"] * 2 + [None] * 2
    assert starts_at(table, range(start, start + 6)) == [start] * 2 + [None] * 2 + [start] * 2


def test_unnamed_function_begins_after_a_name_that_is_shorter_than_its_fde(assembled):
    """A start with a name of its own would be taken for that function."""
    table, address = assembled
    start = address["short"]

    assert names_at(table, range(start, start + 3)) == [b"short", None, None]
    assert starts_at(table, range(start, start + 3)) == [None, start + 1, start + 1]


@pytest.mark.parametrize(("begin", "end"), [(".cfi_startproc", ".cfi_endproc; nop; nop"), ("", "")])
def test_start_ends_with_its_fde_or_before_the_next(tmp_path, begin, end):
    """The file limits the entry point, not its usual size."""
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


def test_fde_ranges_of_a_real_library_agree_with_readelf():
    """Each FDE's addresses lead to its start or have a name."""
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
        # If a name is shorter than its FDE, the unnamed rest begins after it.
        assert start in (None, fde_start) or start in named
        found += start == fde_start
    assert found > 300


@pytest.fixture
def naming(tmp_path):
    naming = Naming(tmp_path / "cache")
    yield naming
    naming.close()


def name(naming, path, elf_addresses):
    """Name addresses, given as linked, in a process that cannot exist."""
    with path.open("rb") as file:
        (segment,) = read_elf(FileSource(file.fileno())).segments
    mapping = mapping_of_file(path)
    places = [mapping.start + a - segment.p_vaddr + segment.p_offset for a in elf_addresses]
    return naming.addresses(NO_PROCESS, places, MappingTable.of([mapping]))


@pytest.mark.parametrize("flags", [("-pie",), ("-no-pie",)])
def test_addresses_of_an_unnamed_function_are_one_box(tmp_path, naming, flags):
    """Different locations have one frame, named after the function's address as linked."""
    path = build(tmp_path / "program", PROGRAM, *flags)
    functions = own_functions(path, OWN)
    strip(path)
    named = name(naming, path, [a for f in functions for a in places_in(f)])
    builder = ProfileBuilder(PERIOD_NS)

    for each in named:
        builder.modules[each.module.build_id] = each.module
        place = AddressLocation(each.module.build_id, each.offset)
        builder.add((), [builder.location(place, each.frames)], 1)
    profile = builder.build(WINDOW, Accounting(ticks=len(named), stored=len(named)))
    graph = flamegraph.build(Columns.of(profile))

    assert len({each.offset for each in named}) == 3 * len(OWN)
    boxes = {graph.path(node) for node in range(1, len(graph))}
    assert boxes == {(Frame(f"program+{f.address:#x}", "program", Kind.NATIVE),) for f in functions}
    assert sorted(graph.total.tolist()[1:]) == [3 * PERIOD_NS] * len(OWN)


def test_address_outside_fde_ranges_has_no_frame(tmp_path, naming):
    """It is in its module's box. All unnamed addresses count as misses, in an FDE range or not."""
    path = build(tmp_path / "program", PROGRAM)
    (first,) = own_functions(path, {b"first"})
    (init,) = [s.address for s in read_symbols(path) if s.name == b"_init"]

    found = name(naming, strip(path), [first.address, first.address + 1, init])

    assert found[0].frames == found[1].frames != ()
    assert found[2].frames == ()
    assert [each.miss for each in found] == [Miss.NO_SYMBOL] * 3


def test_file_without_any_name_counts_as_stripped(tmp_path, naming):
    """FDE ranges are not symbols."""
    source = ".type f, @function\nf: .cfi_startproc; nop; .cfi_endproc; nop"
    path = build(tmp_path / "lib", source, "-nostdlib", "-shared", language="assembler")
    start = next(symbol.address for symbol in read_symbols(path) if symbol.name == b"f")

    found = name(naming, strip(path), [start, start + 1])

    frame = Frame(f"lib+{start:#x}", "lib", Kind.NATIVE)
    assert [each.frames for each in found] == [(frame,), ()]
    assert [each.miss for each in found] == [Miss.STRIPPED] * 2
