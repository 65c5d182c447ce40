"""Go's own table of functions, which stripped programs still have."""

import struct

import pytest

from symbolizer.location import Miss
from symbolizer.symbols.elf import FileSource, MemorySource, UnreadableElf, read_elf
from symbolizer.symbols.gopclntab import open_go_table
from tests.support.elf_files import build_go, read_symbols
from tests.support.frame_files import CODE, make_elf

PROGRAM = """
package main
import ("fmt"; "os")
//go:noinline
func work(n int) int { return n*7 + n>>3 }
func main() { fmt.Println(work(len(os.Args))) }
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Return a stripped program and the same program with its symbols."""
    folder = tmp_path_factory.mktemp("go")
    stripped = build_go(folder / "stripped", PROGRAM, is_stripped=True)
    return stripped, build_go(folder / "whole", PROGRAM)


def read_functions(path):
    """Return the names of functions by address as linked, as readelf prints them."""
    with path.open("rb") as file:
        table = open_go_table(read_elf(FileSource(file.fileno())))
        text, strings = table.find_text(), b"".join(table.strings())
    starts, names = table.functions.starts.tolist(), table.functions.names.tolist()
    return {
        text + start: strings[name : strings.index(b"\0", name)].split()[0]
        for start, name in zip(starts[:-1], names, strict=True)
    }


def test_stripped_program_has_the_names_of_the_whole_one(programs):
    """Each function in .symtab has the same address and name in Go's table."""
    stripped, whole = programs
    functions = read_functions(stripped)
    names = {
        symbol.address: symbol.name.removesuffix(b".abi0")
        for symbol in read_symbols(whole)
        # The linker spells generated functions of types in .symtab without the middle dot.
        if symbol.address in functions and not symbol.name.startswith(b"type:")
    }

    assert {b"main.work", b"main.main", b"runtime.goexit"} <= set(names.values())
    assert len(names) > 1000
    assert {address: functions[address] for address in names} == names


def test_functions_are_found_by_name(programs):
    """Only names that are equal count, not those that contain the name."""
    with programs[0].open("rb") as file:
        table = open_go_table(read_elf(FileSource(file.fileno())))
        found = table.find_named([b"main.work", b"main.wor", b"ain.work"])
        text = table.find_text()
    work = next(s.address for s in read_symbols(programs[1]) if s.name == b"main.work")

    assert list(found) == [b"main.work"]
    assert [text + int(table.functions.starts[n]) for n in found[b"main.work"]] == [work]


def test_program_without_a_known_table_has_none():
    """It is not a Go program, or the version of its table is unknown."""
    version = b"\xff\xff\xff\x7f\0\0\1\x08" + bytes(100)

    assert open_go_table(read_elf(MemorySource(make_elf({})))) is None
    assert open_go_table(read_elf(MemorySource(make_elf({b".gopclntab": version})))) is None


@pytest.mark.parametrize("count", [0, 1 << 21])
def test_impossible_number_of_functions_is_refused(count):
    """It is checked before memory is allocated for them."""
    header = b"\xf1\xff\xff\xff\0\0\1\x08" + count.to_bytes(8, "little") + bytes(100)

    with pytest.raises(UnreadableElf) as raised:
        open_go_table(read_elf(MemorySource(make_elf({b".gopclntab": header}))))

    assert raised.value.reason == Miss.TOO_LARGE


def make_goexit_table(start: int) -> bytes:
    """Write a table of two functions of 16 bytes from `start` on, of which one calls the other."""
    names = b"\0runtime.goexit\0runtime.goexit1\0"
    functions_at = 72 + len(names)
    records_at = 4 * 5
    words = (2, 0, 0, 72, functions_at, 0, 0, functions_at)
    pairs = struct.pack("<5I", start, records_at, start + 16, records_at + 48, start + 32)
    records = [struct.pack("<Ii", 0, 1 + name).ljust(48, b"\0") for name in (0, 15)]
    header = b"\xf1\xff\xff\xff\0\0\1\x08" + struct.pack("<8Q", *words)
    return header + names + pairs + b"".join(records)


@pytest.mark.parametrize("start", [0x100, 0x7FFFFF00])
def test_code_that_would_begin_before_address_0_is_damaged(start):
    """The distance of Go's first function from its code can only be believed up to there."""
    section = make_goexit_table(start)
    elf = make_elf({b".gopclntab": section}, code=b"\x90\xe8\x0a\0\0\0\x90".ljust(64, b"\xcc"))
    table = open_go_table(read_elf(MemorySource(elf)))

    if start < CODE:
        assert table.find_text() == CODE - start
        return
    with pytest.raises(UnreadableElf) as raised:
        table.find_text()

    assert raised.value.reason == Miss.DAMAGED


@pytest.mark.parametrize("word", [3, 4, 6, 7])
def test_part_that_is_beyond_the_section_is_damaged(word):
    """Whichever part: one that few readers need would be noticed later, by something else."""
    section = bytearray(make_goexit_table(0x100))
    struct.pack_into("<Q", section, 8 + 8 * word, 1 << 40)

    with pytest.raises(UnreadableElf) as raised:
        open_go_table(read_elf(MemorySource(make_elf({b".gopclntab": bytes(section)}))))

    assert raised.value.reason == Miss.DAMAGED


def test_table_that_is_cut_short_is_damaged():
    """Positions beyond the section are not read."""
    header = b"\xf1\xff\xff\xff\0\0\1\x08" + (1000).to_bytes(8, "little") + bytes(100)

    with pytest.raises(UnreadableElf) as raised:
        open_go_table(read_elf(MemorySource(make_elf({b".gopclntab": header}))))

    assert raised.value.reason == Miss.DAMAGED
