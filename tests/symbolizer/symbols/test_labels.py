"""Symbols without a size, in files that were partly stripped."""

import pytest

from tests.support.elf_files import build, names_at, read_symbols, read_table, strip

PROGRAM = """
volatile unsigned long sink;
__attribute__((noinline)) void before(void) { for (int i = 0; i < 1000; i++) sink += i; }
asm(".text\\n.globl asm_helper\\nasm_helper: mov $1,%eax\\n ret\\n");
int asm_helper(void);
__attribute__((noinline)) void after(void) { for (int i = 0; i < 500; i++) sink += i * 3; sink++; }
__attribute__((noinline)) void last(void) { for (int i = 0; i < 500; i++) sink ^= i; }
int main(int argc, char **argv) { before(); asm_helper(); after(); last(); return argc; }
"""
ASSEMBLY = """
.text
.globl _start
_start: call first
  call second
  mov $60, %eax
  syscall
first: mov $7, %ecx
0: dec %ecx
  jnz 0b
  ret
  .balign 16
second: jmp first
"""
WITHOUT_FDES = ("-fno-asynchronous-unwind-tables", "-fno-unwind-tables")


@pytest.mark.parametrize("level", ["-O1", "-O2", "-Os"])
@pytest.mark.parametrize("flags", [(), WITHOUT_FDES], ids=["FDEs", "calls only"])
def test_symbol_without_a_size_ends_at_the_next_function(tmp_path, flags, level):
    """A function that lost its symbol is not called by the name of the last label before it."""
    # Without toplevel reordering, the functions stay in the order of the text.
    order = "-fno-toplevel-reorder"
    path = build(tmp_path / "program", PROGRAM, level, order, *flags)
    found = {symbol.name: symbol for symbol in read_symbols(path) if symbol.name}
    strip(path, "-K", "asm_helper")
    table = read_table(path)
    lost = (found[b"before"], found[b"after"], found[b"last"])
    inside = [symbol.address + symbol.size // 2 for symbol in lost]

    helper = found[b"asm_helper"].address
    assert names_at(table, [helper, helper + 5]) == [b"asm_helper"] * 2
    assert b"asm_helper" not in names_at(table, inside)
    assert b"asm_helper" not in names_at(table, [symbol.address for symbol in lost])


def test_assembly_with_all_its_symbols_is_named_throughout(tmp_path):
    """Labels reach up to the next one, over the padding between them."""
    path = build(tmp_path / "program", ASSEMBLY, "-nostdlib", "-static", language="assembler")
    first, second = (
        next(symbol.address for symbol in read_symbols(path) if symbol.name == name)
        for name in (b"first", b"second")
    )

    assert second % 16 == 0
    assert names_at(read_table(path), range(first, second)) == [b"first"] * (second - first)
    assert names_at(read_table(path), [second, second + 1]) == [b"second"] * 2
