"""Names of addresses in ELF files: the right one, or none."""

import random
import shutil
import subprocess
import time
import tracemalloc

import numpy as np
import pytest

from symbolizer.location import Miss
from symbolizer.symbols.elf import UnreadableElf
from tests.support.elf_files import (
    REAL_FILES,
    build,
    file_offset,
    names_at,
    read_elf_header,
    read_plt,
    read_symbols,
    read_table,
    real_file,
    strip,
)

PROGRAM = """
#include <stdio.h>
#include <stdlib.h>
static __attribute__((noinline)) int hidden(int n) { return n * 7 + (n >> 3); }
__attribute__((noinline)) int shown(int n) { return hidden(n) - 5; }
int main(int argc, char **argv) { puts(argv[0]); srand(9); return shown(argc) + rand(); }
"""

LLD = pytest.param(
    "-fuse-ld=lld",
    marks=pytest.mark.skipif(not shutil.which("ld.lld"), reason="no ld.lld: install lld"),
)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return build(tmp_path_factory.mktemp("elf") / "program", PROGRAM)


def code_symbols(path):
    """Return symbols that have a size and are in executable segments."""
    table = read_table(path)
    for symbol in read_symbols(path):
        if symbol.size:
            try:
                file_offset(table, symbol.address)
            except ValueError:
                continue
            yield symbol


@pytest.mark.parametrize(
    "flags",
    [
        ("-pie",),
        ("-no-pie",),
        ("-static",),
        ("-static-pie",),
        ("-Wl,-z,noseparate-code",),
        ("-m64", "-Wl,-Ttext-segment=0x10000000", "-no-pie"),
    ],
)
def test_every_byte_of_a_function_has_its_name(tmp_path, flags):
    """First and last byte of each function have one of the names of that function."""
    path = build(tmp_path / "program", PROGRAM, *flags)
    symbols = list(code_symbols(path))

    for place in (0, -1):
        addresses = [s.address + (s.size - 1 if place else 0) for s in symbols]
        for address, name in zip(addresses, names_at(read_table(path), addresses), strict=True):
            assert name in {s.name for s in symbols if s.address <= address < s.address + s.size}


@pytest.mark.parametrize("linker", [LLD])
def test_layout_of_lld_is_read(tmp_path, linker):
    """lld puts segments on pages of their own, with offsets that differ from their addresses."""
    path = build(tmp_path / "program", PROGRAM, linker)
    table = read_table(path)
    address = {s.name: s.address for s in read_symbols(path)}

    assert names_at(table, [address[b"main"], address[b"hidden"]]) == [b"main", b"hidden"]
    assert all(s.p_vaddr != s.p_offset for s in table.segments)


def test_hidden_function_of_a_stripped_file_has_no_name(tmp_path):
    """Without .symtab only exported functions have names; the one before is not used."""
    path = build(tmp_path / "program", PROGRAM, "-rdynamic")
    address = {symbol.name: symbol.address for symbol in read_symbols(path)}

    table = read_table(strip(path))

    assert names_at(table, [address[b"shown"], address[b"main"]]) == [b"shown", b"main"]
    assert names_at(table, [address[b"hidden"]]) == [None]


@pytest.mark.parametrize("flags", [("-pie",), ("-no-pie",), ("-static",), ("-static-pie",)])
def test_entry_point_of_a_stripped_program_is_start(tmp_path, flags):
    """The header says where `_start` begins, and its code says where it ends."""
    path = build(tmp_path / "program", PROGRAM, *flags)
    start = next(s for s in read_symbols(path) if s.name == b"_start")

    table = read_table(strip(path))

    inside = [start.address, start.address + start.size - 1]
    assert names_at(table, inside) == [b"_start"] * 2
    assert names_at(table, [start.address + start.size]) == [None]


def test_indirect_function_has_a_name(tmp_path):
    """An IFUNC's symbol is at its resolver, and its stub has the same name."""
    source = """
    static int fast(int n) { return n + 1; }
    static int (*choose(void))(int) { return fast; }
    int chosen(int n) __attribute__((ifunc("choose")));
    int main(int argc, char **argv) { return chosen(argc); }
    """
    path = build(tmp_path / "program", source, "-static")
    symbols = [s for s in read_symbols(path) if s.name in (b"chosen", b"fast")]

    table = read_table(path)

    assert names_at(table, [s.address for s in symbols]) == [s.name for s in symbols]
    assert b"chosen@plt" in [table.name(number) for number in range(len(table))]


@pytest.mark.parametrize(
    "flags",
    [
        ("-Wl,-z,lazy", "-fcf-protection=none"),
        ("-Wl,-z,now", "-fcf-protection=none"),
        ("-Wl,-z,lazy", "-fcf-protection=full", "-Wl,-z,ibtplt"),
        ("-Wl,-z,now", "-fcf-protection=full", "-Wl,-z,ibtplt"),
        ("-no-pie",),
    ],
)
def test_stub_is_named_after_the_function_it_calls(tmp_path, flags):
    """Stubs of every layout are named `name@plt`, as by objdump, stripped or not."""
    path = build(tmp_path / "program", PROGRAM, *flags)
    stubs = {a: n for a, n in read_plt(path).items() if n != b"*ABS*"}
    assert {b"puts", b"srand", b"rand"} <= set(stubs.values())
    # In the layout with two tables, objdump gives both stubs one name; code calls only one of them.
    called = {name: address for address, name in sorted(stubs.items())}

    for table in (read_table(path), read_table(strip(path))):
        found = names_at(table, list(called.values()))
        assert found == [name + b"@plt" for name in called]


@pytest.mark.parametrize("linker", [LLD])
def test_stubs_of_lld_are_named(tmp_path, linker):
    """It writes no separate stubs for -z now, and sections that objdump does not decode."""
    table = read_table(build(tmp_path / "program", PROGRAM, linker))

    names = [table.name(number) for number in range(len(table))]

    assert {b"puts@plt", b"srand@plt", b"rand@plt"} <= set(names)


def test_program_without_plt_has_no_stubs(tmp_path):
    """With -fno-plt callers jump through the table, and their code is not taken for stubs."""
    table = read_table(build(tmp_path / "program", PROGRAM, "-fno-plt"))

    names = [table.name(number) for number in range(len(table))]

    assert b"puts@plt" not in names
    assert b"main" in names


ASSEMBLER = """
    .text
    .globl sized
    .type sized, @function
sized: nop; nop; nop; nop
    .size sized, 4
    nop; nop; nop; nop                      # not part of any function
    .globl unsized
unsized: nop; nop; nop; nop
    .type around, @function
around: nop; nop
    .type inner, @function
inner: nop; nop
    .size inner, 2
label: nop; nop; nop; nop
    .size around, 8
    .globl best, __GI_best, __best
    .weak weak_best
__best:
__GI_best:
weak_best:
local_best:
best_of_all:
best: nop; nop; nop; nop
    .size best, 4
    .size __GI_best, 4
    .size __best, 4
    .size weak_best, 4
    .size local_best, 4
    .size best_of_all, 4
    .type best, @function
    .type short, @function
    .type longer, @function
    .globl short
short:
longer: nop; nop; nop; nop
    .size short, 1
    .size longer, 4
    .type last, @function
last: nop; nop
    .section .text.other, "ax", @progbits
    nop; nop
"""


@pytest.fixture
def assembled(tmp_path):
    flags = ("-nostdlib", "-shared", "-Wl,--build-id")
    path = build(tmp_path / "library", ASSEMBLER, *flags, language="assembler")
    address = {symbol.name.decode(): symbol.address for symbol in read_symbols(path)}
    return path, read_table(path), address


def name_of(assembled, symbol, offset=0):
    _, table, address = assembled
    return names_at(table, [address[symbol] + offset])[0]


def test_symbol_ends_where_its_size_says(assembled):
    """Bytes after a function are not part of it."""
    assert name_of(assembled, "sized", 3) == b"sized"
    assert name_of(assembled, "sized", 4) is None


def test_symbol_without_size_ends_at_the_next(assembled):
    """Handwritten assembly often has no sizes."""
    assert name_of(assembled, "unsized", 3) == b"unsized"
    assert name_of(assembled, "around", -1) == b"unsized"


def test_function_inside_another_has_its_own_name(assembled):
    """The outer one has the bytes before and after the inner one; a label has none."""
    names = [name_of(assembled, "around", offset) for offset in (0, 1, 2, 3, 4, 7)]

    assert names == [b"around", b"around", b"inner", b"inner", b"around", b"around"]


def test_best_of_several_names_is_chosen(assembled):
    """Global before weak before local; not __GI_; fewer underscores."""
    assert name_of(assembled, "best") == b"best"


def test_longer_alias_names_the_rest(assembled):
    """Where the better name ends first, the other one continues."""
    assert [name_of(assembled, "short", k) for k in range(4)] == [b"short"] + [b"longer"] * 3


def test_symbol_without_size_has_no_end_in_a_stripped_file(assembled):
    """The next exported symbol does not say where it ends."""
    path, _, address = assembled

    table = read_table(strip(path))

    assert names_at(table, [address["sized"], address["unsized"]]) == [b"sized", None]


def test_symbol_ends_with_its_section(tmp_path):
    """A wrong size does not name the code of other sections."""
    source = """
    .text
    .globl huge
    .type huge, @function
huge: nop; nop
    .size huge, 0x7fffffffffffffff
    .section other, "ax", @progbits
    .globl behind
behind: nop
    """
    flags = ("-nostdlib", "-shared")
    path = build(tmp_path / "library", source, *flags, language="assembler")
    address = {symbol.name: symbol.address for symbol in read_symbols(path)}

    table = read_table(strip(path))

    assert names_at(table, [address[b"huge"], address[b"behind"]]) == [b"huge", None]


def test_symbol_version_is_not_part_of_a_name(tmp_path):
    """.symtab has `name@@VERSION`."""
    source = """
    int original(int n) { return n; }
    __asm__(".symver original, offered@@V1");
    """
    script = tmp_path / "versions"
    script.write_text("V1 { global: offered; local: *; };")
    flags = ("-shared", "-fPIC", f"-Wl,--version-script={script}")
    path = build(tmp_path / "library", source, *flags)

    table = read_table(path)

    assert all(b"@V" not in table.name(number) for number in range(len(table)))
    assert b"offered" in [table.name(number) for number in range(len(table))]


def test_truncated_file_has_no_wrong_names(program, tmp_path):
    """However much is missing, an address has its name or none."""
    whole = program.read_bytes()
    symbols = [s for s in read_symbols(program) if s.size and s.kind == "FUNC"]
    truth = names_at(read_table(program), [s.address for s in symbols])
    path = tmp_path / "cut"
    outcomes = set()

    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        try:
            table = read_table(path)
        except UnreadableElf as error:
            outcomes.add(error.reason)
            continue
        outcomes.add("read")
        for symbol, name in zip(symbols, truth, strict=True):
            try:
                found = names_at(table, [symbol.address])[0]
            except ValueError:
                continue
            assert found in (name, None)

    assert outcomes >= {Miss.NOT_ELF, Miss.DAMAGED}


def test_damaged_bytes_raise_only_unreadable_elf(program, tmp_path):
    """Hundreds of damaged files yield a table or a reason, within 32 MB."""
    whole = bytearray(program.read_bytes())
    header = read_elf_header(program)
    chance = random.Random(7)
    path = tmp_path / "damaged"
    # Damage matters most in the headers.
    headers = [*range(64 + 56 * header.phnum), *range(header.shoff, len(whole))]
    outcomes = []

    tracemalloc.start()
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(chance.choice((1, 1, 4, 40))):
            place = (
                chance.choice(headers) if chance.random() < 0.7 else chance.randrange(len(whole))
            )
            damaged[place] = chance.choice((0, 0x7F, 0x80, 0xFF, chance.randrange(256)))
        path.write_bytes(damaged)
        try:
            table = read_table(path)
            table.find(np.arange(0, 70_000, 16, dtype=np.uint64))
            for number in range(len(table)):
                table.name(number)
            table.close()
            outcomes.append("read")
        except UnreadableElf as error:
            outcomes.append(error.reason)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert set(outcomes) >= {"read", Miss.DAMAGED}
    assert peak < 32 << 20


def test_too_many_large_sections_are_refused(program, tmp_path):
    """16,000 sections that each claim the same 128 MB are refused before they are read."""
    header = read_elf_header(program)
    content = bytearray(program.read_bytes())
    shdrs = np.frombuffer(content, "<u8", 8 * header.shnum, header.shoff).reshape(-1, 8)
    relocations = shdrs[shdrs[:, 0] >> np.uint64(32) == 4][:1].copy()
    relocations[0, 3:5] = 0, 128 << 20  # sh_offset, sh_size
    path = tmp_path / "endless"
    shoff = 128 << 20
    content[40:48] = shoff.to_bytes(8, "little")
    content[60:62] = (16_000).to_bytes(2, "little")
    with path.open("wb") as file:
        file.write(content)
        file.seek(shoff)
        file.write(shdrs.tobytes())
        file.write(np.repeat(relocations, 16_000 - header.shnum, axis=0).tobytes())

    started = time.monotonic()
    tracemalloc.start()
    with pytest.raises(UnreadableElf) as raised:
        read_table(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert raised.value.reason == Miss.TOO_LARGE
    assert time.monotonic() - started < 10
    assert peak < 64 << 20


@pytest.mark.parametrize("pattern", REAL_FILES)
def test_names_in_real_files_agree_with_readelf(pattern):
    """Each of thousands of addresses has a name that covers it, or that of a stub."""
    path = real_file(pattern)
    symbols = sorted(code_symbols(path))
    starts = np.array([s.address for s in symbols])
    ends = np.array([s.address + s.size for s in symbols])
    table = read_table(path)
    chance = np.random.default_rng(3)
    chosen = chance.choice(len(symbols), 1500)
    addresses = [int(chance.integers(starts[i], ends[i])) for i in chosen]
    for p_vaddr, _, p_filesz in table.segments:
        addresses += chance.integers(p_vaddr, p_vaddr + p_filesz, 1500).tolist()

    named = names_at(table, addresses)

    for address, name in zip(addresses, named, strict=True):
        around = np.flatnonzero((starts <= address) & (address < ends))
        allowed = {symbols[i].name for i in around}
        assert (
            name in allowed
            if allowed
            else name is None or name in (b"_start", b"_init", b"_fini") or name.endswith(b"@plt")
        )


def test_names_agree_with_addr2line(tmp_path):
    """In a program with all its symbols, every 5 bytes."""
    path = build(tmp_path / "program", PROGRAM, "-g")
    table = read_table(path)
    functions = [s for s in read_symbols(path) if s.name in (b"main", b"hidden", b"shown")]
    addresses = [a for s in functions for a in range(s.address, s.address + s.size, 5)]
    command = ["addr2line", "-f", "-e", path, *map(hex, addresses)]

    output = subprocess.run(command, check=True, capture_output=True, timeout=60).stdout

    assert names_at(table, addresses) == output.splitlines()[::2]
