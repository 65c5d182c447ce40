"""Lines and inlined calls of Go programs, compared with what Go's own runtime says of itself."""

import itertools
import os
import random
import re
import subprocess
from pathlib import Path

import pytest

from symbolizer.location import FileOffset
from symbolizer.symbols.elf import FileSource, MemorySource, UnreadableElf, read_elf
from symbolizer.symbols.golines import GoLines
from symbolizer.symbols.gopclntab import open_go_table
from tests.support.elf_files import build_go, read_symbols, strip
from tests.support.go_programs import need_go

# It says of addresses as linked what runtime.CallersFrames says: all inlined calls, without
# wrappers.
ORACLE = """
package main
%(import)s
import ("bufio"; "fmt"; "os"; "reflect"; "runtime"; "strconv")
type shape[T any] struct { side T }
//go:noinline
func (s *shape[T]) area() T { return s.side }
type sized interface { size() int }
type pair struct { a, b int }
func (p pair) size() int { return len(fmt.Sprint(p.a, p.b)) }
//go:noinline
func sizes(of []sized) (sum int) { for _, each := range of { sum += each.size() }; return }
func main() {
	s := shape[int]{sizes([]sized{pair{1, 2}, &pair{3, 4}})}
	linked, _ := strconv.ParseUint(os.Args[1], 10, 64)
	slide := uint64(reflect.ValueOf(main).Pointer()) - linked + uint64(s.area() - s.area())
	in, out := bufio.NewScanner(os.Stdin), bufio.NewWriter(os.Stdout)
	defer out.Flush()
	for in.Scan() {
		address, _ := strconv.ParseUint(in.Text(), 10, 64)
		frames := runtime.CallersFrames([]uintptr{uintptr(address + slide) + 1, 0})
		for more := true; more; {
			var frame runtime.Frame
			frame, more = frames.Next()
			start := reflect.ValueOf(frame).FieldByName("startLine").Int()
			fmt.Fprintf(out, "%%s|%%s|%%d|%%d\\t", frame.Function, frame.File, start, frame.Line)
		}
		fmt.Fprintln(out)
	}
}
%(code)s
"""
WITHOUT_C = {"import": "", "code": ""}
WITH_C = {
    "import": '// #include <stdlib.h>\nimport "C"',
    "code": "func init() { C.free(C.malloc(1)) }",
}


@pytest.fixture(autouse=True)
def _new_enough() -> None:
    need_go(21)


def open_lines(path: Path) -> GoLines:
    elf = read_elf(MemorySource(path.read_bytes()))
    table = open_go_table(elf)
    assert table is not None
    assert table.has_first_lines
    return GoLines(elf, table)


def addresses_in(path: Path) -> list[int]:
    """Return some addresses of each of Go's functions.

    Without last bytes: the runtime is asked for the address after an instruction, which would be
    the next function's.
    """
    elf = read_elf(MemorySource(path.read_bytes()))
    table = open_go_table(elf)
    starts = (table.functions.starts + table.find_text()).tolist()
    chance = random.Random(1)
    return [
        address
        for start, end in itertools.pairwise(starts)
        if end > start + 1
        for address in {start, *(chance.randrange(start, end - 1) for _ in range(4))}
    ]


def without_types(function: bytes) -> str:
    return re.sub(r"\[.*\]", "[...]", function.decode())


def shown(calls) -> list[str]:
    """Return calls as Go's runtime shows them: without type arguments and wrappers."""
    return [
        f"{without_types(call.function)}|{call.file.decode() or '?'}|{call.first_line}|{call.line}"
        for i, call in enumerate(calls)
        if i == 0 or not call.is_wrapper
    ]


def is_unknown(expected: str) -> bool:
    """Return whether Go's runtime knows no name, as of what is first in its table, or no line."""
    return expected.startswith("|") or expected.endswith("|0|0\t")


@pytest.mark.parametrize("kind", ["exe", "pie", "cgo", "cgo-pie"])
def test_every_address_has_the_calls_that_go_itself_says(kind, tmp_path):
    """Function, file, first line and line of all inlined calls; the file may be stripped."""
    need_go(23)  # before, it was not asked for all of them that way
    program = build_go(
        tmp_path / "program", ORACLE % (WITH_C if "cgo" in kind else WITHOUT_C),
        is_pie="pie" in kind, cgo="cgo" in kind,
    )  # fmt: skip
    main = next(s.address for s in read_symbols(program) if s.name == b"main.main")
    addresses = addresses_in(program)
    expected = subprocess.run(
        [program, str(main)], input="\n".join(map(str, addresses)), capture_output=True, text=True,
        check=True, timeout=60,
    ).stdout.splitlines()  # fmt: skip
    lines = open_lines(strip(program))

    found = [shown(lines.calls(address)) for address in addresses]

    assert len(addresses) > 5000
    wrong = [
        (hex(address), mine, theirs)
        for address, mine, theirs in zip(addresses, found, expected, strict=True)
        if mine != theirs.split("\t")[:-1] and not is_unknown(theirs)
    ]
    assert wrong == []
    assert max(map(len, found)) > 3
    assert any(call.is_wrapper for a in addresses for call in lines.calls(a))


def test_what_is_no_go_code_has_no_calls(tmp_path):
    """C code in the same file, and addresses that are not in it."""
    program = build_go(tmp_path / "program", ORACLE % WITH_C, cgo=True)
    lines = open_lines(program)
    in_c = next(s.address for s in read_symbols(program) if s.name == b"_start")

    assert lines.calls(in_c) == lines.calls(0) == lines.calls(1 << 40) == ()
    assert lines.address(FileOffset(1 << 40)) is None


def test_damaged_tables_are_refused(tmp_path):
    """Whatever is wrong in them, it is said, and nothing else happens."""
    program = build_go(tmp_path / "program", ORACLE % WITHOUT_C, is_stripped=True)
    content = program.read_bytes()
    elf = read_elf(MemorySource(content))
    section = next(s for s in elf.sections if s.name == b".gopclntab")
    addresses = addresses_in(program)[:2000:20]
    chance = random.Random(2)
    refused = 0
    for _ in range(12):
        damaged = bytearray(content)
        for _ in range(section.size // 50):
            damaged[section.offset + chance.randrange(64, section.size)] = chance.randrange(256)
        try:
            damaged_elf = read_elf(MemorySource(bytes(damaged)))
            lines = GoLines(damaged_elf, open_go_table(damaged_elf))
            for address in addresses:
                lines.calls(address)
        except UnreadableElf:
            refused += 1

    assert refused > 6


def test_a_file_is_read_from_a_descriptor(tmp_path):
    """As the export does; the offset of an address is translated as the program was linked."""
    program = build_go(tmp_path / "program", ORACLE % WITHOUT_C, is_pie=True)
    fd = os.open(program, os.O_RDONLY)
    try:
        elf = read_elf(FileSource(fd))
        lines = GoLines(elf, open_go_table(elf))
        symbol = next(s for s in read_symbols(program) if s.name == b"main.sizes")
        (segment,) = [s for s in elf.segments if 0 <= symbol.address - s.p_vaddr < s.p_filesz]

        address = lines.address(FileOffset(symbol.address - segment.p_vaddr + segment.p_offset))

        assert address == symbol.address
        assert lines.calls(address)[-1].function == b"main.sizes"
    finally:
        os.close(fd)


def test_a_function_lacks_its_frame_from_its_return_on(tmp_path):
    """Behind that is what lets the stack grow; instructions are as objdump lists them."""
    program = build_go(tmp_path / "program", ORACLE % WITHOUT_C)
    lines = open_lines(program)
    command = ["objdump", "-d", "--no-show-raw-insn", "--disassemble=main.sizes", program]
    listed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    code = re.findall(r"^ +([0-9a-f]+):\t(\w+)", listed, re.MULTILINE)
    (end,) = [i for i, (_, name) in enumerate(code) if name == "ret"]

    found = [lines.lacks_frame(int(address, 16)) for address, _ in code]

    assert found == [False] * end + [True] * (len(code) - end)
    assert not lines.lacks_frame(0)
