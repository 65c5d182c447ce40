"""Unwind rules of code without call frame information: stubs, entry points, signal returns."""

import re
import subprocess
from pathlib import Path

import pytest

from symbolizer.symbols.elf import MemorySource
from symbolizer.unwind.build import build
from symbolizer.unwind.rules import CfaKind
from tests.support.elf_files import build as compile_text
from tests.support.elf_files import read_plt, read_symbols
from tests.support.frame_files import CODE, make_elf
from tests.support.unwind_tables import (
    PROGRAM,
    address_of,
    assert_equals_readelf,
    needs,
    read_unwind_table,
    rule_at,
)

PLT = [
    pytest.param(("-Wl,-z,lazy", "-fcf-protection=none"), CfaKind.PLT, 11),
    pytest.param(("-Wl,-z,lazy,-z,ibtplt", "-fcf-protection"), CfaKind.PLT_LAZY, 9),
]
WITH_LLD = [
    (("-fuse-ld=lld",), CfaKind.PLT, 11),
    (("-fuse-ld=lld", "-Wl,-z,force-ibt"), CfaKind.PLT_LAZY, 9),
]
PLT += [pytest.param(*values, marks=needs("ld.lld", "lld")) for values in WITH_LLD]


@pytest.mark.parametrize(("flags", "kind", "pushed_at"), PLT)
def test_plt_stubs_have_rules(tmp_path, flags, kind, pushed_at):
    """lld's stubs have no call frame information, but consist of the same instructions."""
    path = compile_text(tmp_path / "program", PROGRAM, *flags)
    table = read_unwind_table(path)
    sections = subprocess.run(["readelf", "-SW", path], check=True, capture_output=True, text=True)
    fields = next(line for line in sections.stdout.splitlines() if " .plt " in line).split("]")[1]
    start, _, size = (int(field, 16) for field in fields.split()[2:5])

    assert rule_at(table, start) == (CfaKind.RSP, 2, 0, 0)
    assert rule_at(table, start + 6) == (CfaKind.RSP, 3, 0, 0)
    assert rule_at(table, start + 16) == (kind, pushed_at, 0, 0)
    assert rule_at(table, start + size - 1) == (kind, pushed_at, 0, 0)
    for stub in read_plt(path):
        if not start <= stub < start + size:
            assert rule_at(table, stub) == (CfaKind.RSP, 1, 0, 0)


def disassemble(path: Path, *options: str) -> list[tuple[int, str, str]]:
    """Return address, name and operands of each instruction."""
    command = ["objdump", "-d", "--no-show-raw-insn", *options, path]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.findall(r"^ *([0-9a-f]+):\s+(\S+) *(.*)$", listing, re.MULTILINE)
    return [(int(address, 16), name, operands) for address, name, operands in found]


COMPILERS = [
    pytest.param(("gcc",), id="glibc"),
    pytest.param(("gcc", "-static"), id="static"),
    pytest.param(("gcc", "-fuse-ld=lld"), id="lld", marks=needs("ld.lld", "lld")),
    pytest.param(("musl-gcc", "-static"), id="musl", marks=needs("musl-gcc", "musl-tools")),
]


@pytest.mark.parametrize("compiler", COMPILERS)
def test_init_and_fini_have_rules(tmp_path, compiler):
    """C libraries write them in assembly; they move the stack pointer by a word and back again."""
    path = tmp_path / "program"
    command = [*compiler, "-x", "c", "-", "-o", path]
    subprocess.run(command, input=PROGRAM.encode(), check=True, timeout=60, capture_output=True)
    table = read_unwind_table(path)
    lines = disassemble(path, "-j", ".init", "-j", ".fini")

    words = 1
    for address, name, operands in lines:
        assert rule_at(table, address) == (CfaKind.RSP, words, 0, 0)
        words += (name == "push" or (name, operands) == ("sub", "$0x8,%rsp")) - (
            name == "pop" or (name, operands) == ("add", "$0x8,%rsp")
        )
    assert [name for _, name, _ in lines].count("ret") == 2
    assert words == 1


@pytest.mark.parametrize("flags", [(), ("-no-pie",), ("-shared", "-fPIC"), ("-static",)])
def test_functions_of_crtbegin_have_rules(tmp_path, flags):
    """GCC's start and end of each file; the one that saves rbp has a frame pointer then."""
    path = compile_text(tmp_path / "program", PROGRAM, *flags)
    table = read_unwind_table(path)
    named = [b"deregister_tm_clones", b"register_tm_clones", b"__do_global_dtors_aux"]
    named += [b"frame_dummy"] * ("-static" not in flags)  # which registers call frames there
    symbols = {symbol.name: symbol for symbol in read_symbols(path)}
    starts = sorted(symbol.address for symbol in symbols.values())

    for name in named:
        start = symbols[name].address
        end = min(address for address in starts if address > start)
        options = (f"--start-address={start}", f"--stop-address={end}")
        is_pushed = has_frame = False
        for address, opcode, operands in disassemble(path, *options):
            if opcode in ("nop", "nopl", "nopw", "cs", "xchg", "data16"):
                continue
            kind, rbp = (
                (CfaKind.RBP if has_frame else CfaKind.RSP),
                (1, -2) if is_pushed else (0, 0),
            )
            assert rule_at(table, address) == (kind, 2 if is_pushed else 1, *rbp), (name, operands)
            is_pushed = opcode == "push" or (is_pushed and opcode != "pop")
            has_frame = operands == "%rsp,%rbp" or (has_frame and opcode != "pop")


def test_start_stops(tmp_path):
    """_start has no caller, and its rules say so."""
    path = compile_text(tmp_path / "program", PROGRAM)

    assert rule_at(read_unwind_table(path), address_of(path, b"_start")) == (CfaKind.STOP, 0, 0, 0)


def test_return_from_a_signal_is_recognised(tmp_path):
    """glibc's trampoline describes the ucontext; the rule begins one byte before it."""
    path = compile_text(tmp_path / "program", PROGRAM, "-static")
    table = read_unwind_table(path)
    code = path.read_bytes()
    symbol = next(s for s in read_symbols(path) if s.name == b"__restore_rt")

    assert rule_at(table, symbol.address) == (CfaKind.SIGNAL, 0, 0, 0)
    assert rule_at(table, symbol.address - 1) == (CfaKind.SIGNAL, 0, 0, 0)
    assert b"\x48\xc7\xc0\x0f\0\0\0\x0f\x05" in code


@needs("musl-gcc", "musl-tools")
def test_musl_has_rules_for_entry_point_and_signal_return(tmp_path):
    """They have no call frame information in musl."""
    path = tmp_path / "program"
    command = ["musl-gcc", "-O2", "-static", "-x", "c", "-", "-o", path]
    subprocess.run(command, input=PROGRAM.encode(), check=True, timeout=60, capture_output=True)
    table = read_unwind_table(path)
    symbols = {symbol.name: symbol for symbol in read_symbols(path)}

    start, restore = symbols[b"_start"].address, symbols[b"__restore_rt"].address
    behind = min(s.address for s in symbols.values() if s.address > start)

    assert rule_at(table, start) == (CfaKind.STOP, 0, 0, 0)
    assert rule_at(table, behind)[0] != CfaKind.STOP
    assert rule_at(table, restore) == (CfaKind.SIGNAL, 0, 0, 0)
    assert rule_at(table, restore - 1) == (CfaKind.SIGNAL, 0, 0, 0)
    assert_equals_readelf(path, at_least=30)


def test_stripped_program_stops_at_its_entry_point():
    """Without symbols, the header's address is enough; `hlt` after the call ends the function."""
    code = bytearray(b"\x90" * 0x3000)
    code[0x100:0x110] = bytes.fromhex("4831ed4889e74883e4f0e800000000")[:15] + b"\xf4"

    table = build(MemorySource(make_elf({}, code=bytes(code), entry=CODE + 0x100)))

    assert rule_at(table, CODE + 0x100) == (CfaKind.STOP, 0, 0, 0)
    assert rule_at(table, CODE + 0x10F) == (CfaKind.STOP, 0, 0, 0)
    assert rule_at(table, CODE + 0x110)[0] == CfaKind.HOLE
    assert rule_at(table, CODE + 0xFF)[0] == CfaKind.HOLE
