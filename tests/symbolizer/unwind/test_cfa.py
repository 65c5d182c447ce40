"""Unwind rules from call frame programs: as readelf and pyelftools interpret them."""

import functools
import io
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from elftools.dwarf.callframe import CallFrameInfo
from elftools.dwarf.structs import DWARFStructs
from hypothesis import example, given, settings
from hypothesis import strategies as st

from symbolizer.symbols.elf import MemorySource
from symbolizer.unwind import build as build_module
from symbolizer.unwind import cfa
from symbolizer.unwind.build import build
from symbolizer.unwind.cie import RBX
from symbolizer.unwind.rules import (
    RBX_MAX,
    RBX_SAME,
    RBX_SHIFT,
    RBX_UNKNOWN,
    CfaKind,
    RbpKind,
)
from tests.support.elf_files import build as compile_text
from tests.support.elf_files import read_symbols
from tests.support.frame_files import CODE, FRAMES, FrameSection, block, cie, make_elf, sleb, uleb
from tests.support.readelf_frames import read_rows
from tests.support.unwind_tables import (
    PROGRAM,
    assert_equals_readelf,
    needs,
    read_unwind_table,
    rule_at,
)

THROWING = """
#include <stdexcept>
#include <string>
#include <vector>
__attribute__((noinline)) int parse(const std::string &text) {
  std::vector<int> digits;
  for (char c : text) {
    if (c < '0' || c > '9') throw std::runtime_error("no digit: " + text);
    digits.push_back(c - '0');
  }
  return digits.at(0);
}
int main(int argc, char **argv) {
  try { return parse(argv[argc - 1]); } catch (const std::exception &e) { return e.what()[0]; }
}
"""


@pytest.mark.parametrize(
    "flags",
    [
        *[(level,) for level in ("-O0", "-O1", "-O2", "-O3", "-Os")],
        ("-O2", "-no-pie"),
        ("-O2", "-static"),
        ("-O2", "-static-pie"),
        ("-O2", "-fno-omit-frame-pointer"),
        ("-O2", "-mavx2", "-mstackrealign"),
        ("-O2", "-mcmodel=large", "-fPIC"),
        ("-O2", "-fcf-protection=full", "-Wl,-z,ibtplt"),
        ("-O2", "-fno-plt", "-Wl,-z,now"),
        ("-O2", "-Wl,--no-eh-frame-hdr"),
        ("-O2", "-Wl,-z,noseparate-code"),
        ("-O2", "-fno-asynchronous-unwind-tables", "-g"),
        ("-O2", "-fno-asynchronous-unwind-tables", "-g", "-gz=zlib", "-static"),
        ("-O2", "-ffunction-sections", "-Wl,--gc-sections"),
        pytest.param(("-O2", "-fuse-ld=gold"), marks=needs("ld.gold", "binutils")),
        pytest.param(("-O2", "-fuse-ld=lld"), marks=needs("ld.lld", "lld")),
        pytest.param(("-O2", "-fuse-ld=lld", "-static"), marks=needs("ld.lld", "lld")),
    ],
    ids=" ".join,
)
def test_rows_equal_those_of_readelf(tmp_path, flags):
    """At the first and last address of each row of readelf, ours has the same rule."""
    path = compile_text(tmp_path / "program", PROGRAM, *flags)

    assert_equals_readelf(path, at_least=30)


@pytest.mark.parametrize("flags", [("-O0",), ("-O2",), ("-O2", "-static")], ids=" ".join)
def test_rows_of_code_with_exceptions_equal_those_of_readelf(tmp_path, flags):
    """CIEs with a personality and FDEs with language specific data are skipped correctly."""
    path = compile_text(tmp_path / "program", THROWING, *flags, language="c++")

    assert_equals_readelf(path, at_least=40)


@needs("clang", "clang")
@pytest.mark.parametrize("flags", [("-O0",), ("-O2", "-mavx2"), ("-O2", "-static")], ids=" ".join)
def test_rows_of_clang_equal_those_of_readelf(tmp_path, flags):
    """Another compiler writes other programs."""
    path = tmp_path / "program"
    command = ["clang", *flags, "-x", "c", "-", "-o", path]
    subprocess.run(command, input=PROGRAM.encode(), check=True, timeout=60, capture_output=True)

    assert_equals_readelf(path, at_least=30)


@needs("rustc", "rustc")
def test_rows_of_rust_equal_those_of_readelf(tmp_path):
    """Rust's own code, and what it links statically."""
    (tmp_path / "main.rs").write_text('fn main() { println!("{:?}", std::env::args()); }')
    command = ["rustc", "-O", "-o", "program", "main.rs"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=100, capture_output=True)

    assert_equals_readelf(tmp_path / "program", at_least=1000)


@pytest.mark.parametrize(
    "path",
    [
        "/bin/bash",
        "/lib/x86_64-linux-gnu/libc.so.6",
        "/lib64/ld-linux-x86-64.so.2",
        "/usr/lib/x86_64-linux-gnu/libcrypto.so.3",
        "/usr/bin/perl",
    ],
)
def test_rows_of_distribution_files_equal_those_of_readelf(path):
    """These include handwritten assembly of libc and OpenSSL."""
    if not Path(path).exists():
        pytest.skip(f"no {path}")

    assert_equals_readelf(Path(path), at_least=1000)


def test_rules_do_not_depend_on_the_size_of_chunks(monkeypatch):
    """Programs are run in chunks only to limit memory."""
    whole = read_unwind_table("/bin/bash")

    monkeypatch.setattr(cfa, "_CHUNK_BYTES", 200)
    pieces = read_unwind_table("/bin/bash")

    assert (pieces.rows == whole.rows).all()
    assert (pieces.pages == whole.pages).all()


def numbers(low: int, high: int, step: int = 1):
    return st.integers(low, high).map(lambda n: uleb(n * step))


def instruction(*parts):
    """Return a strategy that joins its parts, which are bytes or strategies for bytes."""
    drawn = [st.just(part) if isinstance(part, bytes) else part for part in parts]
    return st.tuples(*drawn).map(b"".join)


def one_of(opcodes: bytes):
    return st.sampled_from([bytes([opcode]) for opcode in opcodes])


REGISTERS = (3, 6, 7, 10, 12, 16)
REGISTER = st.sampled_from([uleb(register) for register in REGISTERS])
SIGNED = st.integers(-40, 40).map(sleb)
EXPRESSION = st.sampled_from(
    [
        *(bytes([0x76]) + sleb(offset) for offset in (-8, 0, 1024)),
        *(bytes([0x77]) + sleb(offset) for offset in (8, 120, -16, 7)),
        *(bytes([0x77]) + sleb(offset) + b"\x06" for offset in (40, 1016, 1024)),
        *(bytes([0x76]) + sleb(offset) + b"\x06" for offset in (-8, -1024, -1032)),
        *(bytes([0x77, 0x08, 0x06, 0x23]) + uleb(addend) for addend in (8, 2040, 2048, 4)),
        *(bytes.fromhex(f"770880003f1a{lit}2a332422") for lit in ("3b", "3a", "39", "38")),
        b"",
        b"\x06",
    ]
).map(block)

INSTRUCTIONS = {
    "advance": st.one_of(
        instruction(one_of(bytes(range(0x40, 0x80)))),
        instruction(b"\x02", st.binary(min_size=1, max_size=1)),
        instruction(b"\x03", st.integers(0, 300).map(lambda n: struct.pack("<H", n))),
        instruction(b"\x04", st.integers(0, 300).map(lambda n: struct.pack("<I", n))),
    ),
    "register": st.one_of(
        instruction(one_of(bytes(0x80 | register for register in REGISTERS)), numbers(0, 40)),
        instruction(one_of(bytes(0xC0 | register for register in REGISTERS))),
        instruction(one_of(b"\x05\x14\x09"), REGISTER, numbers(0, 40)),
        instruction(one_of(b"\x06\x07\x08"), REGISTER),
        instruction(one_of(b"\x11\x15"), REGISTER, SIGNED),
        instruction(one_of(b"\x10\x16"), REGISTER, EXPRESSION),
    ),
    "define": instruction(b"\x0c", REGISTER, numbers(0, 600_000)),
    "define by expression": instruction(b"\x0f", EXPRESSION),
    "change": st.one_of(
        instruction(b"\x0d", REGISTER),
        instruction(b"\x0e", numbers(0, 70_000, 8)),
        instruction(b"\x0e", numbers(0, 100)),
        instruction(b"\x13", SIGNED),
    ),
    "remember": st.just(b"\x0a"),
    "restore": st.just(b"\x0b"),
}


@st.composite
def frame_programs(draw):
    """Return the program of an FDE; it changes register or offset only of a CFA that has them."""
    program = b""
    is_sum = True
    remembered: list[bool] = []
    for _ in range(draw(st.integers(0, 25))):
        kinds = ["advance", "advance", "register", "define", "define by expression", "remember"]
        kinds += ["change"] * 2 if is_sum else []
        kinds += ["restore"] * 2 if remembered else []
        kind = draw(st.sampled_from(kinds))
        program += draw(INSTRUCTIONS[kind])
        if kind.startswith("define"):
            is_sum = kind == "define"
        elif kind == "remember":
            remembered.append(is_sum)
        elif kind == "restore":
            is_sum = remembered.pop()
    return program


def rules_of_pyelftools(section: bytes, start: int) -> list[tuple[int, tuple[int, int, int, int]]]:
    """Return the locations and rules of the only FDE, as pyelftools interprets it.

    They say where rbx is if the CFA is based on it anywhere.
    """
    structs = DWARFStructs(little_endian=True, dwarf_format=32, address_size=8)
    stream = io.BytesIO(section)
    entries = CallFrameInfo(stream, len(section), FRAMES, structs, True).get_entries()
    fde = entries[1]
    fde.header["initial_location"] = start
    lines = fde.get_decoded().table
    rules = [(line["pc"], expected_rule(line)) for line in lines]
    end = start + fde.header["address_range"]
    kinds = {rule[0] for pc, rule in dict(rules).items() if pc < end}
    if CfaKind.REGISTER + RBX not in kinds:
        return rules
    return [
        (pc, (kind, operand, rbp_kind | expected_rbx(kind, line.get(RBX)) << RBX_SHIFT, rbp))
        for line, (pc, (kind, operand, rbp_kind, rbp)) in zip(lines, rules, strict=True)
    ]


def expected_rbx(kind: int, rule) -> int:
    if kind in (CfaKind.STOP, CfaKind.UNSUPPORTED) or kind >= CfaKind.RETURN_REGISTER:
        return RBX_UNKNOWN
    if rule is None or rule.type == "SAME_VALUE":
        return RBX_SAME
    is_saved = rule.type == "OFFSET" and rule.arg % 8 == 0 and -8 * RBX_MAX <= rule.arg < -8
    return -rule.arg // 8 if is_saved else RBX_UNKNOWN


def expected_rule(line) -> tuple[int, int, int, int]:
    ra = line.get(16)
    if ra is not None and ra.type == "UNDEFINED":
        return CfaKind.STOP, 0, 0, 0
    kind, operand = expected_cfa(line["cfa"])
    if ra is not None and ra.type == "REGISTER" and ra.arg < 16 and kind == CfaKind.RSP:
        return CfaKind.RETURN_REGISTER + ra.arg, operand, *expected_rbp(line.get(6))
    if kind == CfaKind.UNSUPPORTED or ra is None or (ra.type, ra.arg) != ("OFFSET", -8):
        return CfaKind.UNSUPPORTED, 0, 0, 0
    return kind, operand, *expected_rbp(line.get(6))


def expected_cfa(rule) -> tuple[int, int]:
    if rule.expr is not None:
        return expected_expression(bytes(rule.expr))
    kinds = {7: CfaKind.RSP, 6: CfaKind.RBP}
    if rule.reg >= 16 or rule.offset % 8 or not 0 <= rule.offset <= 8 * 0xFFFF:
        return CfaKind.UNSUPPORTED, 0
    return kinds.get(rule.reg, CfaKind.REGISTER + rule.reg), rule.offset // 8


@functools.cache
def expected_expression(expression: bytes) -> tuple[int, int]:
    for at, kind in ((9, CfaKind.PLT_LAZY), (10, CfaKind.PLT_LAZY), (11, CfaKind.PLT)):
        if expression == bytes.fromhex(f"770880003f1a{0x30 + at:02x}2a332422"):
            return kind, at
    for number, kind in ((0x76, CfaKind.DEREF_RBP), (0x77, CfaKind.DEREF_RSP)):
        for low in range(-128, 128):
            for high in range(256) if b"\x23" in expression else (None,):
                encoded = bytes([number]) + sleb(8 * low) + b"\x06"
                encoded += b"\x23" + uleb(8 * high) if high is not None else b""
                if encoded == expression:
                    return kind, low & 0xFF | (high or 0) << 8
    return CfaKind.UNSUPPORTED, 0


def expected_rbp(rule) -> tuple[int, int]:
    if rule is None or rule.type == "SAME_VALUE":
        return RbpKind.SAME, 0
    if rule.type == "OFFSET" and rule.arg % 8 == 0:
        return RbpKind.AT_CFA, rule.arg // 8
    if rule.type == "EXPRESSION":
        for number, kind in ((0x76, RbpKind.DEREF_RBP), (0x77, RbpKind.DEREF_RSP)):
            for offset in (-16, -8, 0, 8, 120, 1024):
                if bytes(rule.arg) == bytes([number]) + sleb(offset):
                    return kind, offset // 8
    return RbpKind.UNDEFINED, 0


@settings(max_examples=300, deadline=None)
@given(
    program=frame_programs(),
    code_alignment=st.sampled_from([1, 1, 2, 4]),
    data_alignment=st.sampled_from([-8, -8, 8, -4]),
)
@example(b"\x83\x04\x0c\x03\x20\x44\xc3\x44\x0c\x07\x08", 1, -8)  # rbx was saved, and is the CFA
@example(b"\x0c\x03\x00\x40\x0d\x06", 1, -8)  # rbx is the CFA, but for no byte of the code
@example(b"g\x02\xf4\x03\xe5\x00\x0c\x03\x00", 4, -8)  # only from the end of the code on
@example(b"\x09\x10\x00", 1, -8)  # the return address is in rax
@example(b"\x09\x10\x10\x0e\x80\x01", 1, -8)  # it is in itself, which says nothing
def test_rules_equal_those_of_pyelftools(program, code_alignment, data_alignment):
    """An interpreter that executes each instruction computes the same rules."""
    section = FrameSection()
    section.add_cie(cie(code_alignment=code_alignment, data_alignment=data_alignment))
    section.add_fde(CODE + 16, 0x800, program)
    table = build(MemorySource(make_elf({b".eh_frame": section.content})))

    rows = rules_of_pyelftools(section.content, CODE + 16)

    ends = [pc for pc, _ in rows[1:]] + [CODE + 16 + 0x800]
    for (pc, rule), end in zip(rows, ends, strict=True):
        last = min(end, CODE + 16 + 0x800) - 1
        if pc <= last:
            assert rule_at(table, pc) == rule
            assert rule_at(table, last) == rule
    assert rule_at(table, CODE + 15) == (0, 0, 0, 0)
    assert rule_at(table, CODE + 16 + 0x800) == (0, 0, 0, 0)
    # There is one page, with one row for each change.
    assert (np.diff(table.rows["pc_low"].astype(int)) > 0).all()
    assert (
        table.rows[["cfa", "cfa_kind", "rbp_kind", "rbp"]][1:]
        != table.rows[:-1][["cfa", "cfa_kind", "rbp_kind", "rbp"]]
    ).all()


@pytest.mark.parametrize(
    ("program", "rule"),
    [
        (b"\x12\x06" + sleb(-3), (CfaKind.RBP, 3, 0, 0)),
        (b"\x13" + sleb(-3), (CfaKind.RSP, 3, 0, 0)),
        (b"\x13" + sleb(3), (CfaKind.UNSUPPORTED, 0, 0, 0)),
        (b"\x0e" + uleb(12), (CfaKind.UNSUPPORTED, 0, 0, 0)),
        (b"\x0e" + uleb(524_280), (CfaKind.RSP, 65_535, 0, 0)),
        (b"\x0e" + uleb(524_288), (CfaKind.UNSUPPORTED, 0, 0, 0)),
        (b"\x0e" + uleb(1 << 60), (CfaKind.UNSUPPORTED, 0, 0, 0)),
        (b"\x0e\x90\x80\x80\x00", (CfaKind.RSP, 2, 0, 0)),
        (b"\x2e\x40\x0e\x10", (CfaKind.RSP, 2, 0, 0)),
        (b"\x2f\x06\x02", (CfaKind.RSP, 1, RbpKind.AT_CFA, 2)),
        (b"\x2f\x10\x01", (CfaKind.UNSUPPORTED, 0, 0, 0)),
        (b"\x86\x02", (CfaKind.RSP, 1, RbpKind.AT_CFA, -2)),
        (b"\x86" + uleb(32_768), (CfaKind.RSP, 1, RbpKind.AT_CFA, -32_768)),
        (b"\x86" + uleb(32_769), (CfaKind.RSP, 1, RbpKind.UNDEFINED, 0)),
        (b"\x90\x02", (CfaKind.UNSUPPORTED, 0, 0, 0)),
        (b"\x0f" + block(b"\x77" + sleb(1016) + b"\x06"), (CfaKind.DEREF_RSP, 127, 0, 0)),
        (b"\x0f" + block(b"\x77" + sleb(1024) + b"\x06"), (CfaKind.UNSUPPORTED, 0, 0, 0)),
        (b"\x0f" + block(b"\x76" + sleb(-1024) + b"\x06"), (CfaKind.DEREF_RBP, 128, 0, 0)),
        (b"\x0f" + block(b"\x76" + sleb(-1032) + b"\x06"), (CfaKind.UNSUPPORTED, 0, 0, 0)),
        (b"\x0d\x06\x0a\x0e\x40\x0b", (CfaKind.RBP, 1, 0, 0)),
        (b"\x0c\x0a\x00", (CfaKind.REGISTER + 10, 0, 0, 0)),
        (b"\x0c\x10\x08", (CfaKind.UNSUPPORTED, 0, 0, 0)),
        (b"\x0c\x11\x08", (CfaKind.UNSUPPORTED, 0, 0, 0)),
    ],
    ids=lambda value: value.hex() if isinstance(value, bytes) else "",
)
def test_single_instructions(program, rule):
    """Limits of a row, and instructions that pyelftools and readelf get wrong or do not print."""
    section = FrameSection()
    section.add_cie()
    section.add_fde(CODE, 64, b"\x41" + program)

    table = build(MemorySource(make_elf({b".eh_frame": section.content})))

    assert rule_at(table, CODE) == (CfaKind.RSP, 1, 0, 0)
    assert rule_at(table, CODE + 1) == rule


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(b"\x0b", id="restores nothing"),
        pytest.param(b"\x0a\x0b\x41\x0b", id="restores twice"),
        pytest.param(b"\x41\x0f\x7f\x01\x01\x01", id="expression behind the end"),
        pytest.param(b"\x41\x3f\x41", id="unknown instruction"),
        pytest.param(b"\x01" + b"\x01" * 8, id="absolute advance"),
    ],
)
def test_broken_program_breaks_only_its_function(program):
    """The whole function is unsupported; the next one keeps its rules."""
    section = FrameSection()
    section.add_cie()
    section.add_fde(CODE, 32, program)
    section.add_fde(CODE + 32, 32, b"\x41\x0e\x10")

    table = build(MemorySource(make_elf({b".eh_frame": section.content})))

    assert rule_at(table, CODE) == (CfaKind.UNSUPPORTED, 0, 0, 0)
    assert rule_at(table, CODE + 31) == (CfaKind.UNSUPPORTED, 0, 0, 0)
    assert rule_at(table, CODE + 32) == (CfaKind.RSP, 1, 0, 0)
    assert rule_at(table, CODE + 33) == (CfaKind.RSP, 2, 0, 0)


SAVES_RBX = bytes.fromhex("410e10 8302 41c3 41837f 41830b 418320 4108030c0708")
"""Six places of rbx, one for each byte of code from the second on: 2 words below the CFA, where it
was, 127 words below the CFA, 11, 32, and where it was."""


@pytest.mark.parametrize(
    ("other", "limit", "places"),
    [
        (b"\x0c\x03\x20", 1 << 16, [RBX_SAME, 2, RBX_SAME, RBX_UNKNOWN, 11, RBX_UNKNOWN, RBX_SAME]),
        (b"\x0c\x0a\x20", 1 << 16, [RBX_UNKNOWN] * 7),
        (b"\x0c\x03\x20", 4, [RBX_UNKNOWN] * 7),
    ],
    ids=["a CFA is based on rbx", "on r10", "the file is large"],
)
def test_rules_say_where_rbx_is_if_another_function_needs_it(monkeypatch, other, limit, places):
    """Then those of all functions do; else a table has no row that it would not have without."""
    monkeypatch.setattr(build_module, "_MAX_ROWS_WITH_RBX", limit)
    section = FrameSection()
    section.add_cie()
    section.add_fde(CODE, 32, SAVES_RBX)
    section.add_fde(CODE + 32, 32, b"\x41" + other)

    table = build(MemorySource(make_elf({b".eh_frame": section.content})))

    rules = [rule_at(table, CODE + n) for n in range(7)]
    assert [rbp_kind >> RBX_SHIFT for _, _, rbp_kind, _ in rules] == places
    assert all(rbp_kind & 7 == RbpKind.SAME for _, _, rbp_kind, _ in rules)
    assert [words for _, words, _, _ in rules] == [1, *[2] * 5, 1]
    assert len(table.rows) == (9 if RBX_SAME in places else 5)


def test_functions_that_align_the_stack_have_rules(tmp_path):
    """Their CFA is saved below rbp, and the caller's rbp at rbp."""
    path = compile_text(tmp_path / "program", PROGRAM, "-O2", "-mavx2")
    table = read_unwind_table(path)

    rows = [row for row in read_rows(path) if row.cfa == "exp" and row.rbp == "exp"]

    assert rows
    for row in rows:
        kind, operand, rbp_kind, rbp = rule_at(table, row.start)
        assert (kind, operand >> 8) == (CfaKind.DEREF_RBP, 0)
        assert operand & 0xFF >= 0x80
        assert (rbp_kind, rbp) == (RbpKind.DEREF_RBP, 0)


def test_frames_too_large_for_a_row_are_unsupported(tmp_path):
    """The largest frame has 524,280 bytes; one of 500,000 has its rule."""
    path = compile_text(tmp_path / "program", PROGRAM, "-O2", "-fno-stack-protector")
    table = read_unwind_table(path)

    for name, kind in ((b"large", CfaKind.UNSUPPORTED), (b"medium", CfaKind.RSP)):
        symbol = next(symbol for symbol in read_symbols(path) if symbol.name == name)
        addresses = np.arange(symbol.address, symbol.address + symbol.size, dtype=np.uint64)
        found = table.find(addresses)
        assert kind in found["cfa_kind"]
        assert (found["cfa"] >= 62_500).any() == (kind == CfaKind.RSP)
