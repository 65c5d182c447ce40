"""A program with many kinds of frames, and the rules in unwind tables."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from symbolizer.integers import Wide
from symbolizer.symbols.elf import FileSource, Source, read_elf
from symbolizer.unwind.build import build
from symbolizer.unwind.cfi import read_eh_frame
from symbolizer.unwind.table import UnwindTable
from tests.support.elf_files import read_symbols
from tests.support.readelf_frames import compare

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


def needs(program: str, package: str):
    return pytest.mark.skipif(not shutil.which(program), reason=f"no {program}: install {package}")


def read_unwind_table(path: Path | str) -> UnwindTable:
    fd = os.open(path, os.O_RDONLY)
    try:
        return build(FileSource(fd))
    finally:
        os.close(fd)


def rule_at(table: UnwindTable, address: int) -> tuple[int, int, int, int]:
    """Return the row at an address: cfa_kind, cfa, rbp_kind, rbp."""
    _, operand, kind, rbp_kind, rbp = table.find(np.array([address], dtype=np.uint64)).tolist()[0]
    return kind, operand, rbp_kind, rbp


def address_of(path: Path, name: bytes) -> int:
    return next(symbol.address for symbol in read_symbols(path) if symbol.name == name)


def assert_equals_readelf(path: Path, at_least: int = 1) -> None:
    found = compare(path, read_unwind_table(path))

    assert not found.different[:10]
    assert found.rows >= at_least


def fdes(source: Source) -> tuple[Wide, Wide]:
    """Return the first addresses and the ends of the FDEs in .eh_frame."""
    frames = read_eh_frame(read_elf(source))
    return frames.starts, frames.ends
