"""Which unwind rule an address of an ELF file gets."""

import contextlib
import functools
import io
import os
import shutil
import struct
import subprocess
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from elftools.dwarf.callframe import CallFrameInfo
from elftools.dwarf.structs import DWARFStructs
from hypothesis import example, given, settings
from hypothesis import strategies as st

from symbolizer.location import Miss
from symbolizer.symbols.elf import FileSource, MemorySource, UnreadableElf
from symbolizer.unwind import cfa
from symbolizer.unwind.rules import CfaKind, RbpKind
from symbolizer.unwind.table import PAGE_BITS, UnwindTable, build, functions
from tests.support.elf_files import build as compile_text
from tests.support.elf_files import read_plt, read_symbols, strip
from tests.support.frame_files import CODE, FRAMES, FrameSection, block, cie, make_elf, sleb, uleb
from tests.support.readelf_frames import compare, read_rows

PROGRAM = """
#include <alloca.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

__attribute__((noipa)) void use(void *);
static int compare(const void *a, const void *b) { return *(int *)a - *(int *)b; }

__attribute__((noinline)) int early(int n) {
  char text[100];
  if (n == 3) { use(text); return 1; }
  if (n == 5) { use(text); use(text); return 2; }
  use(text + n);
  return text[n % 7] + early(n - 1);
}
__attribute__((noinline)) int variable(int n) { char *p = alloca(n + 9); use(p); return p[n]; }
__attribute__((noinline)) int large(int n) {
  char text[600000];
  use(text);
  return text[n];
}
__attribute__((noinline)) int medium(int n) { char text[500000]; use(text); return text[n]; }
__attribute__((noinline)) int aligned(int n) {
  _Alignas(64) float values[64];
  char *p = alloca(n);
  use(values);
  use(p);
  return values[n];
}
__attribute__((noinline)) int many(int a, int b, int c, int d, int e, int f, int g, ...) {
  return a + b + c + d + e + f + g;
}
void use(void *p) { memset(p, 1, 1); }
static void on_signal(int number) { (void)number; }
int main(int argc, char **argv) {
  int numbers[] = {3, 1, argc};
  signal(SIGUSR1, on_signal);
  qsort(numbers, 3, sizeof(int), compare);
  puts(argv[0]);
  return early(argc) + variable(argc) + large(argc) + medium(argc) + aligned(argc) +
         many(1, 2, 3, 4, 5, 6, 7, 8, 9) + numbers[0];
}
"""

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


def needs(program: str, package: str):
    return pytest.mark.skipif(not shutil.which(program), reason=f"no {program}: install {package}")


def read(path: Path | str) -> UnwindTable:
    fd = os.open(path, os.O_RDONLY)
    try:
        return build(FileSource(fd))
    finally:
        os.close(fd)


def rule_at(table: UnwindTable, address: int) -> tuple[int, int, int, int]:
    """Return cfa_kind, cfa, rbp_kind, rbp."""
    _, operand, kind, rbp_kind, rbp = table.find(np.array([address], dtype=np.uint64)).tolist()[0]
    return kind, operand, rbp_kind, rbp


def address_of(path: Path, name: bytes) -> int:
    return next(symbol.address for symbol in read_symbols(path) if symbol.name == name)


def assert_equals_readelf(path: Path, at_least: int = 1) -> None:
    found = compare(path, read(path))

    assert not found.different[:10]
    assert found.rows >= at_least


# Against binutils


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
def test_rows_are_those_of_readelf(tmp_path, flags):
    """First and last address of every row that readelf prints have that rule."""
    path = compile_text(tmp_path / "program", PROGRAM, *flags)

    assert_equals_readelf(path, at_least=30)


@pytest.mark.parametrize("flags", [("-O0",), ("-O2",), ("-O2", "-static")], ids=" ".join)
def test_rows_of_code_with_exceptions_are_those_of_readelf(tmp_path, flags):
    """CIEs that name a personality and FDEs with language specific data are read past."""
    path = compile_text(tmp_path / "program", THROWING, *flags, language="c++")

    assert_equals_readelf(path, at_least=40)


CLANG = shutil.which("clang") or shutil.which("clang-14")


@pytest.mark.skipif(not CLANG, reason="no clang: install clang")
@pytest.mark.parametrize("flags", [("-O0",), ("-O2", "-mavx2"), ("-O2", "-static")], ids=" ".join)
def test_rows_of_clang_are_those_of_readelf(tmp_path, flags):
    """Another compiler writes other programs."""
    path = tmp_path / "program"
    command = [CLANG, *flags, "-x", "c", "-", "-o", path]
    subprocess.run(command, input=PROGRAM.encode(), check=True, timeout=60, capture_output=True)

    assert_equals_readelf(path, at_least=30)


@needs("rustc", "rustc")
def test_rows_of_rust_are_those_of_readelf(tmp_path):
    """Rust's own code and what it links statically."""
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
def test_rows_of_distribution_files_are_those_of_readelf(path):
    """Hand-written assembly of libc and OpenSSL included."""
    if not Path(path).exists():
        pytest.skip(f"no {path}")

    assert_equals_readelf(Path(path), at_least=1000)


def test_chunks_do_not_show(monkeypatch):
    """Programs are run in pieces that bound the memory, and rules do not depend on them."""
    whole = read("/bin/bash")

    monkeypatch.setattr(cfa, "_CHUNK_BYTES", 200)
    pieces = read("/bin/bash")

    assert (pieces.rows == whole.rows).all()
    assert (pieces.pages == whole.pages).all()


# Against pyelftools, for programs that no compiler writes


def numbers(low: int, high: int, step: int = 1):
    return st.integers(low, high).map(lambda n: uleb(n * step))


def instruction(*parts):
    """Return bytes drawn from parts that are bytes or strategies for bytes."""
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
    """Return instructions of one FDE; register and offset change only where the CFA is those."""
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
    """Interpret the only FDE with the other implementation: locations and rules."""
    structs = DWARFStructs(little_endian=True, dwarf_format=32, address_size=8)
    stream = io.BytesIO(section)
    entries = CallFrameInfo(stream, len(section), FRAMES, structs, True).get_entries()
    fde = entries[1]
    fde.header["initial_location"] = start
    return [(line["pc"], expected_rule(line)) for line in fde.get_decoded().table]


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
@example(b"\x09\x10\x00", 1, -8)  # the return address is in rax
@example(b"\x09\x10\x10\x0e\x80\x01", 1, -8)  # in itself, which says nothing
def test_rules_are_those_of_pyelftools(program, code_alignment, data_alignment):
    """An interpreter that goes instruction by instruction comes to the same rules."""
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
    # One page, one row for each change.
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
    """The limits of a row, and what pyelftools and readelf get wrong or do not tell."""
    section = FrameSection()
    section.add_cie()
    section.add_fde(CODE, 64, b"\x41" + program)

    table = build(MemorySource(make_elf({b".eh_frame": section.content})))

    assert rule_at(table, CODE) == (CfaKind.RSP, 1, 0, 0)
    assert rule_at(table, CODE + 1) == rule


# What is in the section, and where


@pytest.mark.parametrize(
    ("encoding", "form", "is_relative"),
    [
        (0x1B, "<i", True),
        (0x1C, "<q", True),
        (0x14, "<Q", True),
        (0x00, "<Q", False),
        (0x03, "<I", False),
        (0x04, "<Q", False),
        (0x0B, "<i", False),
        (0x0C, "<q", False),
    ],
)
def test_encodings_of_addresses(encoding, form, is_relative):
    """Addresses of an FDE are of the width and relative to what its CIE says."""
    section = FrameSection()
    section.add_cie(cie(data=bytes([encoding])))
    if form == "<Q" and is_relative:
        form = "<q"  # the same bytes
    section.add_fde(CODE + 64, 32, b"\x44\x0e\x20", form=form, is_relative=is_relative)

    table = build(MemorySource(make_elf({b".eh_frame": section.content})))

    assert rule_at(table, CODE + 63) == (CfaKind.HOLE, 0, 0, 0)
    assert rule_at(table, CODE + 64) == (CfaKind.RSP, 1, 0, 0)
    assert rule_at(table, CODE + 67) == (CfaKind.RSP, 1, 0, 0)
    assert rule_at(table, CODE + 68) == (CfaKind.RSP, 4, 0, 0)
    assert rule_at(table, CODE + 96) == (CfaKind.HOLE, 0, 0, 0)


@pytest.mark.parametrize("encoding", [0x01, 0x1A + 0x20, 0x9B, 0xFF, 0x50])
def test_fdes_whose_addresses_cannot_be_read_are_left_out(encoding):
    """They are a hole; those of other CIEs are not."""
    section = FrameSection()
    section.add_cie(cie(data=bytes([encoding])))
    section.add_fde(CODE, 32)
    section.add_cie()
    section.add_fde(CODE + 64, 32)

    table = build(MemorySource(make_elf({b".eh_frame": section.content})))

    assert rule_at(table, CODE)[0] == CfaKind.HOLE
    assert rule_at(table, CODE + 64)[0] == CfaKind.RSP


@pytest.mark.parametrize(
    ("augmentation", "data", "is_read"),
    [
        (b"", b"", True),
        (b"zPLR", b"\x9b\1\2\3\4\x1b\x1b", True),
        (b"zRS", b"\x1b", True),
        (b"zRB", b"\x1b", True),
        (b"zR", b"\x1b\x3e\x3e", True),
        (b"zRX", b"\x1b\0", False),
        (b"eh", b"", False),
        (b"zP", b"\x0f", False),
    ],
)
def test_augmentations(augmentation, data, is_read):
    """What a letter announces is skipped; an unknown letter may announce anything."""
    section = FrameSection()
    section.add_cie(cie(augmentation=augmentation, data=data))
    if augmentation.startswith(b"z"):
        section.add_fde(CODE, 32)
    else:
        section.add_fde(CODE, 32, form="<Q", is_relative=False, data=b"")

    table = build(MemorySource(make_elf({b".eh_frame": section.content})))

    assert (rule_at(table, CODE) == (CfaKind.RSP, 1, 0, 0)) == is_read


@pytest.mark.parametrize(
    "changes",
    [{"return_register": 8}, {"code_alignment": 0}, {"code_alignment": 1000}, {"program": b"\x3e"}],
)
def test_cies_beyond_us_say_so(changes):
    """Their FDEs' addresses are known, their rules are not: unsupported, no hole."""
    section = FrameSection()
    section.add_cie(cie(**changes))
    section.add_fde(CODE, 32)

    table = build(MemorySource(make_elf({b".eh_frame": section.content})))

    assert rule_at(table, CODE) == (CfaKind.UNSUPPORTED, 0, 0, 0)
    assert rule_at(table, CODE + 32)[0] == CfaKind.HOLE


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
def test_a_broken_program_breaks_its_function_only(program):
    """All of the function is unsupported, the next one is as it was."""
    section = FrameSection()
    section.add_cie()
    section.add_fde(CODE, 32, program)
    section.add_fde(CODE + 32, 32, b"\x41\x0e\x10")

    table = build(MemorySource(make_elf({b".eh_frame": section.content})))

    assert rule_at(table, CODE) == (CfaKind.UNSUPPORTED, 0, 0, 0)
    assert rule_at(table, CODE + 31) == (CfaKind.UNSUPPORTED, 0, 0, 0)
    assert rule_at(table, CODE + 32) == (CfaKind.RSP, 1, 0, 0)
    assert rule_at(table, CODE + 33) == (CfaKind.RSP, 2, 0, 0)


def test_zeros_do_not_end_the_section():
    """Terminators that joined files leave in the middle are walked over."""
    section = FrameSection()
    section.add_cie()
    section.add_fde(CODE, 32)
    section.content += b"\0" * 4
    section.add_fde(CODE + 64, 32)
    section.content += b"\0" * 20
    section.add_cie()
    section.add_fde(CODE + 128, 32)
    section.content += b"\0" * 4

    table = build(MemorySource(make_elf({b".eh_frame": section.content})))

    assert [rule_at(table, CODE + n)[0] for n in (0, 64, 128)] == [CfaKind.RSP] * 3


def test_a_record_cut_short_is_left_out():
    """It may have lost what changes its rules; those before it are whole."""
    section = FrameSection()
    section.add_cie()
    section.add_fde(CODE, 32)
    section.add_fde(CODE + 64, 32)

    table = build(MemorySource(make_elf({b".eh_frame": section.content[:-4]})))

    assert rule_at(table, CODE)[0] == CfaKind.RSP
    assert rule_at(table, CODE + 64)[0] == CfaKind.HOLE


def test_several_sections_are_one():
    """Positions in the second do not count from the first."""
    first, second = FrameSection(), FrameSection()
    for section, start in ((first, CODE), (second, CODE + 64)):
        section.add_cie()
        section.add_fde(start, 32)
    second = FrameSection(FRAMES + len(first.content))
    second.add_cie()
    second.add_fde(CODE + 64, 32)
    elf = make_elf({b".eh_frame": first.content, b".eh_framE": second.content})

    table = build(MemorySource(elf.replace(b".eh_framE", b".eh_frame")))

    assert [rule_at(table, CODE + n)[0] for n in (0, 64)] == [CfaKind.RSP] * 2


def test_unsorted_and_overlapping_fdes():
    """The later start wins, the longest of equal ones, and the empty one holds nowhere."""
    section = FrameSection()
    section.add_cie()
    section.add_fde(CODE + 256, 32, b"\x0e\x10")
    section.add_fde(CODE, 300, b"\x0e\x18")
    section.add_fde(CODE + 64, 16, b"\x0e\x20")
    section.add_fde(CODE + 64, 32, b"\x0e\x28")
    section.add_fde(CODE + 8, 0, b"\x0e\x30")

    table = build(MemorySource(make_elf({b".eh_frame": section.content})))
    starts, ends = functions(MemorySource(make_elf({b".eh_frame": section.content})))

    assert [rule_at(table, CODE + n)[1] for n in (0, 8, 63, 64, 95, 256, 287)] == [
        *(3, 3, 3, 5, 5, 2, 2)
    ]
    assert rule_at(table, CODE + 96)[0] == CfaKind.HOLE
    assert (starts - CODE).tolist() == [0, 64, 256]
    assert (ends - CODE).tolist() == [64, 96, 288]


def test_functions_thrown_away_by_the_linker_are_left_out():
    """Their FDEs were set to zero, or point outside of code."""
    section = FrameSection()
    section.add_cie()
    section.add_null_fde()
    section.add_fde(16, 64)
    section.add_fde(CODE - 64, 128)
    section.add_fde(CODE + 128, 32)

    starts, _ = functions(MemorySource(make_elf({b".eh_frame": section.content})))

    assert starts.tolist() == [CODE + 128]


def test_null_is_no_function_where_code_is_linked_at_zero():
    """Position independent files may be, with their header in the executable segment."""
    section = FrameSection()
    section.add_cie()
    section.add_null_fde()
    section.add_fde(32, 32)
    elf = make_elf({b".eh_frame": section.content}, code_addresses=(0,))

    starts, _ = functions(MemorySource(elf))

    assert starts.tolist() == [32]


def test_padding_between_functions_gets_no_row():
    """Nobody executes it; a gap that could hold an aligned function is a hole."""
    section = FrameSection()
    section.add_cie()
    section.add_fde(CODE, 30)
    section.add_fde(CODE + 32, 30)
    section.add_fde(CODE + 80, 30)

    table = build(MemorySource(make_elf({b".eh_frame": section.content})))

    kinds = [rule_at(table, CODE + n)[0] for n in (30, 31, 61, 62, 79, 110, 127)]
    assert kinds == [*[CfaKind.RSP] * 3, *[CfaKind.HOLE] * 4]
    # The first function, at the head of the page, the hole, the third function, the hole.
    assert len(table.rows) == 4


def test_pages_repeat_the_rule_in_force():
    """A look-up never leaves the page of its address; pages without rules are not there."""
    section = FrameSection()
    section.add_cie()
    section.add_fde(CODE + 0x100, 0x3000, b"\x0e\x20")
    elf = make_elf({b".eh_frame": section.content}, code=b"\x90" * 0x6000)

    table = build(MemorySource(elf))

    first = CODE >> PAGE_BITS
    assert table.pages["number"].tolist() == [first, first + 1, first + 2, first + 3]
    assert table.pages["count"].tolist() == [2, 1, 1, 2]
    assert table.pages["first"].tolist() == [0, 2, 3, 4]
    assert (table.rows["pc_low"][table.pages["first"]] == 0).all()
    assert rule_at(table, CODE + 0x3100) == (CfaKind.HOLE, 0, 0, 0)
    assert rule_at(table, CODE + 0x30FF) == (CfaKind.RSP, 4, 0, 0)
    assert rule_at(table, 0x500000) == (CfaKind.HOLE, 0, 0, 0)


def test_sections_without_headers_are_found(tmp_path):
    """A file without section headers has the rules of the one with them."""
    path = compile_text(tmp_path / "program", PROGRAM)
    content = bytearray(path.read_bytes())
    with_headers = build(MemorySource(bytes(content)))
    content[0x28:0x30] = bytes(8)
    content[0x3A:0x40] = bytes(6)

    table = build(MemorySource(bytes(content)))

    assert (table.rows == with_headers.rows).all()


def test_header_is_not_believed(tmp_path):
    """.eh_frame_hdr may hold anything."""
    path = compile_text(tmp_path / "program", PROGRAM)
    content = bytearray(path.read_bytes())
    before = build(MemorySource(bytes(content)))
    headers = subprocess.run(
        ["readelf", "-SW", path], check=True, capture_output=True, text=True
    ).stdout
    line = next(line for line in headers.splitlines() if ".eh_frame_hdr" in line)
    offset, size = (int(field, 16) for field in line.split("]")[1].split()[3:5])
    content[offset : offset + size] = b"\xff" * size

    assert (build(MemorySource(bytes(content))).rows == before.rows).all()


def test_vdso_is_read_from_memory():
    """The kernel's own library has rules too."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    vdso = next((line for line in maps if line.endswith("[vdso]")), None)
    if vdso is None:
        pytest.skip("no vDSO")
    start, end = (int(part, 16) for part in vdso.split()[0].split("-"))
    with Path("/proc/self/mem").open("rb", 0) as memory:
        memory.seek(start)
        image = memory.read(end - start)

    table = build(MemorySource(image))

    starts, _ = functions(MemorySource(image))
    assert len(starts) > 3
    assert (table.find(starts)["cfa_kind"] == CfaKind.RSP).all()


def test_functions_are_those_of_readelf(tmp_path):
    """Each FDE's range, in order."""
    path = strip(compile_text(tmp_path / "program", PROGRAM))
    fd = os.open(path, os.O_RDONLY)

    starts, ends = functions(FileSource(fd))

    os.close(fd)
    rows = list(read_rows(path))
    assert set(starts.tolist()) <= {row.start for row in rows}
    assert set(ends.tolist()) <= {row.end for row in rows}
    assert all(((starts <= row.start) & (row.end <= ends)).any() for row in rows)


# Rules with a meaning of their own


def test_functions_that_align_the_stack(tmp_path):
    """Their CFA was saved below rbp, and rbp at it."""
    path = compile_text(tmp_path / "program", PROGRAM, "-O2", "-mavx2")
    table = read(path)

    rows = [row for row in read_rows(path) if row.cfa == "exp" and row.rbp == "exp"]

    assert rows
    for row in rows:
        kind, operand, rbp_kind, rbp = rule_at(table, row.start)
        assert (kind, operand >> 8) == (CfaKind.DEREF_RBP, 0)
        assert operand & 0xFF >= 0x80
        assert (rbp_kind, rbp) == (RbpKind.DEREF_RBP, 0)


def test_frames_too_large_for_a_row_are_unsupported(tmp_path):
    """524,280 bytes are the most; a frame of 500,000 has its rule."""
    path = compile_text(tmp_path / "program", PROGRAM, "-O2", "-fno-stack-protector")
    table = read(path)

    for name, kind in ((b"large", CfaKind.UNSUPPORTED), (b"medium", CfaKind.RSP)):
        symbol = next(symbol for symbol in read_symbols(path) if symbol.name == name)
        addresses = np.arange(symbol.address, symbol.address + symbol.size, dtype=np.uint64)
        found = table.find(addresses)
        assert kind in found["cfa_kind"]
        assert (found["cfa"] >= 62_500).any() == (kind == CfaKind.RSP)


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
def test_stubs_have_rules(tmp_path, flags, kind, pushed_at):
    """Those of lld have no call frame information, and are made of the same instructions."""
    path = compile_text(tmp_path / "program", PROGRAM, *flags)
    table = read(path)
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


def test_start_stops(tmp_path):
    """Nobody has called _start, and its rules say so."""
    path = compile_text(tmp_path / "program", PROGRAM)

    assert rule_at(read(path), address_of(path, b"_start")) == (CfaKind.STOP, 0, 0, 0)


def test_return_from_a_signal_is_recognised(tmp_path):
    """glibc's trampoline describes the ucontext; the rule begins one byte before it."""
    path = compile_text(tmp_path / "program", PROGRAM, "-static")
    table = read(path)
    code = path.read_bytes()
    symbol = next(s for s in read_symbols(path) if s.name == b"__restore_rt")

    assert rule_at(table, symbol.address) == (CfaKind.SIGNAL, 0, 0, 0)
    assert rule_at(table, symbol.address - 1) == (CfaKind.SIGNAL, 0, 0, 0)
    assert b"\x48\xc7\xc0\x0f\0\0\0\x0f\x05" in code


@needs("musl-gcc", "musl-tools")
def test_musl(tmp_path):
    """Without call frame information: the entry point stops, signals return, both in time."""
    path = tmp_path / "program"
    command = ["musl-gcc", "-O2", "-static", "-x", "c", "-", "-o", path]
    subprocess.run(command, input=PROGRAM.encode(), check=True, timeout=60, capture_output=True)
    table = read(path)
    symbols = {symbol.name: symbol for symbol in read_symbols(path)}

    start, restore = symbols[b"_start"].address, symbols[b"__restore_rt"].address
    behind = min(s.address for s in symbols.values() if s.address > start)

    assert rule_at(table, start) == (CfaKind.STOP, 0, 0, 0)
    assert rule_at(table, behind)[0] != CfaKind.STOP
    assert rule_at(table, restore) == (CfaKind.SIGNAL, 0, 0, 0)
    assert rule_at(table, restore - 1) == (CfaKind.SIGNAL, 0, 0, 0)
    assert_equals_readelf(path, at_least=30)


def test_stripped_program_stops_at_its_entry_point():
    """Where no symbol is left, the header's address is enough; a call there ends it."""
    code = bytearray(b"\x90" * 0x3000)
    code[0x100:0x110] = bytes.fromhex("4831ed4889e74883e4f0e800000000")[:15] + b"\xf4"

    table = build(MemorySource(make_elf({}, code=bytes(code), entry=CODE + 0x100)))

    assert rule_at(table, CODE + 0x100) == (CfaKind.STOP, 0, 0, 0)
    assert rule_at(table, CODE + 0x10F) == (CfaKind.STOP, 0, 0, 0)
    assert rule_at(table, CODE + 0x110)[0] == CfaKind.HOLE
    assert rule_at(table, CODE + 0xFF)[0] == CfaKind.HOLE


def test_file_without_any_rules_has_an_empty_table():
    """It is not an error, and costs nothing."""
    table = build(MemorySource(make_elf({})))

    assert (len(table.rows), len(table.pages), table.memory_bytes) == (0, 0, 0)
    assert rule_at(table, CODE) == (CfaKind.HOLE, 0, 0, 0)


def far_apart(*addresses: int) -> MemorySource:
    section = FrameSection()
    section.add_cie(cie(data=b"\x00"))
    for address in addresses:
        section.add_fde(address, 32, form="<Q", is_relative=False)
    return MemorySource(make_elf({b".eh_frame": section.content}, code_addresses=addresses))


def test_code_far_up_has_rules():
    """As far as the pages' numbers go; as places in the file, from wherever a process has it."""
    address, highest = (1 << 44) - (1 << 16), (1 << 47) - (1 << 16)

    assert rule_at(build(far_apart(address)), address)[0] == CfaKind.RSP
    by_place = build(far_apart(highest), by_file_offset=True)
    assert by_place.rows["cfa_kind"][:2].tolist() == [CfaKind.RSP, CfaKind.HOLE]


@pytest.mark.parametrize(
    "addresses", [(1 << 44,), (1 << 48,), ((1 << 63) - (1 << 20),), (CODE, 1 << 36)]
)
def test_code_that_is_too_far_away_is_refused(addresses):
    """Pages are numbered in 32 bits, and a made-up file must not need 4 billion of them."""
    with pytest.raises(UnreadableElf) as caught:
        build(far_apart(*addresses))

    assert caught.value.reason == Miss.TOO_LARGE


def test_other_machines_are_refused():
    """Nothing is read from an i386 file."""
    elf = bytearray(make_elf({b".eh_frame": b""}))
    elf[0x12:0x14] = struct.pack("<H", 3)

    with pytest.raises(UnreadableElf) as caught:
        build(MemorySource(bytes(elf)))

    assert caught.value.reason == Miss.UNSUPPORTED


# Go

GO = """
package main
import ("fmt"; "os")
//go:noinline
func leaf(a, b int) int { return a*7 + b }
//go:noinline
func framed(a int) int { var x [64]int; for i := range x { x[i] = leaf(a, i) }; return x[a&63] }
func main() { fmt.Println(framed(len(os.Args))) }
"""


@pytest.fixture(scope="module", params=["-s -w", ""], ids=["stripped", "whole"])
def go_program(request, tmp_path_factory):
    if not shutil.which("go"):
        pytest.skip("no go: install golang-go")
    folder = tmp_path_factory.mktemp("go")
    (folder / "main.go").write_text(GO)
    for name, flags in (("program", request.param), ("with_names", "")):
        command = ["go", "build", f"-ldflags={flags}", "-o", name, "main.go"]
        environment = {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-mod=mod"}
        subprocess.run(command, cwd=folder, env=environment, check=True, timeout=110)
    symbols = {symbol.name: symbol for symbol in read_symbols(folder / "with_names")}
    return folder / "program", symbols


def test_go_keeps_frame_pointers_except_where_there_is_no_frame(go_program):
    """A leaf's caller is at the stack pointer, and so is that of a function that just began."""
    path, symbols = go_program
    table = read(path)

    leaf, framed = symbols[b"main.leaf"], symbols[b"main.framed"]

    assert rule_at(table, leaf.address) == (CfaKind.RSP, 1, 0, 0)
    assert rule_at(table, leaf.address + leaf.size - 1) == (CfaKind.RSP, 1, 0, 0)
    assert rule_at(table, framed.address) == (CfaKind.RSP, 1, 0, 0)
    assert rule_at(table, framed.address + framed.size // 2)[0] == CfaKind.FRAME_POINTER


@pytest.mark.parametrize(
    "name", [b"runtime.goexit.abi0", b"runtime.mstart.abi0", b"runtime.rt0_go.abi0"]
)
def test_go_stacks_stop_where_they_begin(go_program, name):
    """A goroutine's, a thread's and the program's first function."""
    path, symbols = go_program
    if name not in symbols:
        name = name.removesuffix(b".abi0")

    symbol = symbols[name]

    assert rule_at(read(path), symbol.address + symbol.size - 1) == (CfaKind.STOP, 0, 0, 0)


@pytest.mark.parametrize("name", [b"runtime.mcall", b"runtime.morestack"])
def test_go_threads_own_stacks_begin_where_they_are_taken(go_program, name):
    """Before that instruction the goroutine's stack is to be followed."""
    path, symbols = go_program
    symbol = symbols.get(name) or symbols[name + b".abi0"]
    table = read(path)

    assert rule_at(table, symbol.address)[0] != CfaKind.STOP
    assert rule_at(table, symbol.address + symbol.size - 1) == (CfaKind.STOP, 0, 0, 0)


def test_go_functions_that_switch_stacks_are_left_to_the_frame_pointer(go_program):
    """What the stack pointer was is not to be seen in them."""
    path, symbols = go_program
    name = next(n for n in symbols if n.startswith(b"runtime.systemstack.abi0"))

    rule = rule_at(read(path), symbols[name].address)

    assert rule == (CfaKind.FRAME_POINTER, 0, 0, 0)


def test_go_signal_handlers_are_crossed(go_program):
    """The handler lies on the kernel's signal frame."""
    path, symbols = go_program
    table = read(path)
    names = {name.removesuffix(b".abi0"): symbol for name, symbol in symbols.items()}

    handler, ret = names[b"runtime.sigtramp"], names[b"runtime.sigreturn__sigaction"]

    assert rule_at(table, ret.address) == (CfaKind.SIGNAL, 0, 0, 0)
    rules = [rule_at(table, handler.address + n) for n in range(0, handler.size, 4)]
    assert {kind for kind, *_ in rules} == {CfaKind.RSP}
    assert rules[0] == (CfaKind.RSP, 1, 0, 0)
    assert max(operand for _, operand, *_ in rules) > 1


# Made to hurt


@pytest.fixture(scope="module")
def small_program(tmp_path_factory):
    path = compile_text(tmp_path_factory.mktemp("small") / "program", PROGRAM, "-O2", "-mavx2")
    return strip(path).read_bytes()


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damaged_files_raise_nothing_else(small_program, data):
    """Whatever the bytes are, there is a table or a reason."""
    content = bytearray(small_program)
    frames = content.find(b"\x14\0\0\0\0\0\0\0\x01zR\0")
    for _ in range(data.draw(st.integers(1, 20))):
        near = data.draw(st.booleans())
        low, high = (frames, frames + 1200) if near else (0, len(content) - 1)
        content[data.draw(st.integers(low, high))] = data.draw(st.integers(0, 255))
    if data.draw(st.integers(0, 5)) == 0:
        del content[data.draw(st.integers(0, len(content))) :]
    source = MemorySource(bytes(content))

    try:
        table = build(source)
        starts, ends = functions(source)
    except UnreadableElf:
        return

    table.find(np.arange(0x1000, 0x2000, dtype=np.uint64))
    assert (starts < ends).all()


@settings(max_examples=300, deadline=None)
@given(section=st.binary(max_size=400), name=st.sampled_from([b".eh_frame", b".debug_frame"]))
def test_random_sections_raise_nothing_else(section, name):
    """No section is well-formed here."""
    build(MemorySource(make_elf({name: section})))


@settings(max_examples=300, deadline=None)
@given(program=st.binary(max_size=120), initial=st.binary(max_size=30))
def test_random_programs_raise_nothing_else(program, initial):
    """Any bytes are a program, and the function beside it keeps its rule."""
    section = FrameSection()
    section.add_cie(cie(initial))
    section.add_fde(CODE, 64, program)
    section.add_cie()
    section.add_fde(CODE + 64, 64)

    table = build(MemorySource(make_elf({b".eh_frame": section.content})))

    assert rule_at(table, CODE + 64) == (CfaKind.RSP, 1, 0, 0)


def section_of(programs: list[bytes]) -> bytes:
    section = FrameSection()
    section.add_cie()
    for number, program in enumerate(programs):
        section.add_fde(CODE + 16 * number, 16, program)
    return bytes(section.content)


@pytest.mark.parametrize(
    "section",
    [
        pytest.param(bytes(20 << 20), id="zeros"),
        pytest.param(section_of([b"\x41\x0e\x10" * 30_000] * 20), id="long programs"),
        pytest.param(section_of([b"\x0a" * 60_000 + b"\x0b" * 60_000] * 8), id="deep states"),
        pytest.param(section_of([b"\x0a\x41\x0b" * 40_000] * 8), id="chains of states"),
        pytest.param(section_of([b"\x0f\xff\xff\xff\xff\x0f" * 20_000] * 20), id="expressions"),
        pytest.param(section_of([b"\x0e" + b"\x80" * 120_000] * 20), id="long numbers"),
        pytest.param(section_of([b"\x44" * 1_000_000]), id="beyond the limit"),
        pytest.param(cie()[:8] * 400_000, id="records without content"),
        pytest.param(b"".join(cie(uleb(n)) for n in range(60_000)), id="many CIEs"),
    ],
)
def test_memory_is_bounded_by_the_size_of_the_section(section):
    """What is made to grow does not grow beyond a few times the file."""
    source = MemorySource(make_elf({b".eh_frame": section}, code=b"\x90" * 0x100000))
    tracemalloc.start()

    with contextlib.suppress(UnreadableElf):
        build(source)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 8 * len(section) + (64 << 20)


def test_compressed_section_that_expands_to_anything_is_refused():
    """Its header says how large it is, and does not decide how much is expanded."""
    chdr = struct.pack("<IIQQ", 1, 0, 1 << 40, 1)
    small = struct.pack("<IIQQ", 1, 0, 100, 1)
    bomb = zlib.compress(bytes(100 << 20))
    flags = {b".debug_frame": 0x800}

    with pytest.raises(UnreadableElf) as caught:
        build(MemorySource(make_elf({b".debug_frame": chdr + bomb}, flags=flags)))
    tracemalloc.start()
    table = build(MemorySource(make_elf({b".debug_frame": small + bomb}, flags=flags)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert caught.value.reason == Miss.TOO_LARGE
    assert len(table.rows) == 0
    assert peak < 16 << 20


# On disk


def test_saved_table_is_loaded_as_it_was(tmp_path):
    """Build id, pages and rows come back."""
    table = read("/bin/bash")

    table.save(tmp_path / "table")
    loaded = UnwindTable.load(tmp_path / "table", table.key)

    assert loaded is not None
    assert loaded.key == table.key
    assert (loaded.rows == table.rows).all()
    assert (loaded.pages == table.pages).all()
    assert loaded.memory_bytes == table.memory_bytes == 8 * len(table.rows) + 12 * len(table.pages)
    assert [path.name for path in tmp_path.iterdir()] == ["table"]


def test_empty_table_is_saved_too(tmp_path):
    """So that the file is not read again and again."""
    table = build(MemorySource(make_elf({})))

    table.save(tmp_path / "table")

    loaded = UnwindTable.load(tmp_path / "table", table.key)
    assert loaded is not None
    assert len(loaded.rows) == 0


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_table_is_not_loaded(tmp_path_factory, data):
    """One wrong byte anywhere, or a byte more or less, and it counts as absent."""
    path = tmp_path_factory.mktemp("damaged") / "table"
    section = FrameSection()
    section.add_cie()
    section.add_fde(CODE, 64, b"\x41\x0e\x10")
    table = build(MemorySource(make_elf({b".eh_frame": section.content})))
    table.save(path)
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(-1, len(content) - 1))
    if place < 0:
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)

    assert UnwindTable.load(path, table.key) is None


def test_table_of_another_file_is_not_loaded(tmp_path):
    """A table says whose it is; where there is none, there is none."""
    table = read("/bin/bash")
    table.save(tmp_path / "table")

    assert UnwindTable.load(tmp_path / "table", "00" * 20) is None
    assert UnwindTable.load(tmp_path / "nothing", table.key) is None
