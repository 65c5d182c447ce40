"""Names, files and lines of Go programs, from the table that stripped programs still have."""

import struct
import subprocess

import pytest

from tests.support.elf_files import build_go, names_at, read_symbols, read_table

PROGRAM = """
package main
import ("fmt"; "os")
//go:noinline
func work(n int) int { return n*7 + n>>3 }
type shape[T any] struct { side T }
//go:noinline
func (s *shape[T]) area() T { return s.side }
func main() { s := shape[int]{len(os.Args)}; fmt.Println(work(s.area())) }
"""
CGO = """
package main
// #include <stdlib.h>
// __attribute__((noinline)) int from_c(int n) { return abs(n) * 3; }
import "C"
import "fmt"
//go:noinline
func work(n int) int { return n*7 + n>>3 }
func main() { fmt.Println(work(int(C.from_c(-4)))) }
"""


def places(path):
    """Return where each named function is defined, by name."""
    table = read_table(path)
    return {table.name(number): table.place(number) for number in range(len(table))}


def without_section_headers(path):
    """Remove the section headers of a copy, as sstrip and some packers do."""
    content = bytearray(path.read_bytes())
    struct.pack_into("<Q", content, 40, 0)
    struct.pack_into("<HHH", content, 58, 0, 0, 0)
    bare = path.with_name(path.name + ".bare")
    bare.write_bytes(content)
    return bare


def with_other_names(path):
    renamed = path.with_name(path.name + ".renamed")
    flags = ("--rename-section", ".gopclntab=.other", "--rename-section", ".text=.code")
    subprocess.run(["objcopy", *flags, path, renamed], check=True, timeout=60)
    return renamed


@pytest.fixture(scope="module", params=[False, True], ids=["exe", "pie"])
def programs(request, tmp_path_factory):
    """Return a stripped program and the same program with its symbols."""
    folder = tmp_path_factory.mktemp("go")
    stripped = build_go(folder / "stripped", PROGRAM, is_stripped=True, is_pie=request.param)
    return stripped, build_go(folder / "whole", PROGRAM, is_pie=request.param)


def sampled(path):
    """Return Go's functions in .symtab with the addresses of their first and last bytes."""
    for symbol in read_symbols(path):
        if (
            symbol.kind == "FUNC"
            and symbol.size
            and symbol.name.startswith((b"main.", b"runtime."))
        ):
            yield symbol.name.removesuffix(b".abi0"), symbol.address
            yield symbol.name.removesuffix(b".abi0"), symbol.address + symbol.size - 1


@pytest.mark.parametrize("change", [None, without_section_headers, with_other_names])
def test_stripped_go_has_the_names_of_the_whole_program(programs, change):
    """Also if no section header says where Go's table is."""
    stripped, whole = programs
    table = read_table(change(stripped) if change else stripped)
    names, addresses = zip(*sampled(whole), strict=True)

    assert len(names) > 1000
    assert names_at(table, addresses) == list(names)


def test_functions_of_go_have_the_file_and_line_of_their_definition(programs):
    """Whether the program is stripped or not."""
    for path in programs:
        found = places(path)
        source = bytes(path.with_suffix(".go"))

        assert found[b"main.work"] == (source, 5)
        assert found[b"main.main"] == (source, 9)
        assert found[b"main.(*shape[go.shape.int]).area"] == (source, 8)
        assert found[b"runtime.gopanic"][0].endswith(b"/runtime/panic.go")
        assert found[b"runtime.gopanic"][1] > 1


def test_every_function_has_a_file_and_a_line(programs):
    """Except what the linker wrote itself."""
    found = places(programs[0])

    assert len(found) > 1000
    unknown = [name for name, (file, line) in found.items() if not file or not line]
    assert [name for name in unknown if not name.startswith((b"_start", b"go:"))] == []


def test_stripped_program_with_c_code_keeps_both(tmp_path):
    """C functions that other modules see are named by .dynsym, Go's by their table."""
    path = build_go(tmp_path / "program", CGO, is_stripped=True, cgo=True)
    whole = build_go(tmp_path / "whole", CGO, cgo=True)
    found = places(path)

    assert found[b"main.work"] == (bytes(path.with_suffix(".go")), 8)
    assert b"abs@plt" in found or b"malloc@plt" in found
    in_c = next(symbol for symbol in read_symbols(whole) if symbol.name == b"from_c")
    assert places(whole)[b"from_c"] == (b"", 0)
    assert names_at(read_table(whole), [in_c.address]) == [b"from_c"]
