"""Compile real ELF files for tests, and read their symbols with binutils."""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from symbolizer.location import FileOffset, Module
from symbolizer.symbols import elf
from symbolizer.symbols.elf import FileSource, read_elf
from symbolizer.symbols.functions import read_functions
from symbolizer.symbols.table import SymbolCache, SymbolTable

REAL_FILES = (
    "/lib/x86_64-linux-gnu/libc.so.6",
    "/lib/x86_64-linux-gnu/libcrypto.so.3",
    "/usr/bin/python3",
    "/usr/lib/x86_64-linux-gnu/libLLVM*.so*",  # what bcc links, under whichever version
)


def real_file(pattern: str) -> Path:
    """Return the distribution's file, or skip the test if it is not installed."""
    path = min(Path("/").glob(pattern[1:]), default=None)
    if path is None:
        pytest.skip("it is not installed")
    return path


def build(output: Path, source: str, *flags: str, language: str = "c") -> Path:
    """Compile a source text to `output`; `language` is c, c++ or assembler."""
    compiler = "g++" if language == "c++" else "gcc"
    command = [compiler, "-O1", "-x", language, "-", "-o", output, *flags]
    subprocess.run(command, input=source.encode(), check=True, timeout=60, capture_output=True)
    return output


def build_go(
    output: Path, source: str, *, is_stripped: bool = False, is_pie: bool = False, cgo: bool = False
) -> Path:
    """Compile a Go program of one file, or skip the test if Go is not installed."""
    if not shutil.which("go"):
        pytest.skip("no go: install golang-go")
    main = output.with_suffix(".go")
    main.write_text(source)
    flags = "-ldflags=-s -w" if is_stripped else "-ldflags="
    environment = {**os.environ, "CGO_ENABLED": str(int(cgo)), "GOFLAGS": "-mod=mod"}
    mode = "-buildmode=pie" if is_pie else "-buildmode=exe"
    command = ["go", "build", mode, flags, "-o", output, main.name]
    subprocess.run(command, cwd=output.parent, env=environment, check=True, timeout=110)
    return output


def strip(path: Path, *flags: str) -> Path:
    subprocess.run(["strip", *flags, path], check=True, timeout=60)
    return path


def read_table(path: Path) -> SymbolTable:
    """Return a file's symbol table as the symbolizer does. Raises UnreadableElf."""
    fd = os.open(path, os.O_RDONLY)
    try:
        headers = read_elf(FileSource(fd))
        functions, strings = read_functions(headers)
        return SymbolCache(None, 0).store("", functions, headers.segments, strings)
    finally:
        os.close(fd)


def read_elf_header(path: Path) -> elf._Header:
    """Read the fields of the ELF header."""
    with path.open("rb") as file:
        return elf._read_header(FileSource(file.fileno()))


def names_at(table: SymbolTable, elf_addresses: Sequence[int]) -> list[bytes | None]:
    """Return the names of addresses as linked, which is what binutils print; None without one."""
    numbers = table.find(np.array([file_offset(table, a) for a in elf_addresses], dtype=np.uint64))
    named = numbers >= 0
    named[named] = table.unnamed_starts(numbers[named]) < 0
    return [
        table.name(number) if is_named else None
        for number, is_named in zip(numbers.tolist(), named.tolist(), strict=True)
    ]


def starts_at(table: SymbolTable, elf_addresses: Sequence[int]) -> list[int | None]:
    """Return the start of the unnamed function at each address, both as linked; None if named."""
    numbers = table.find(np.array([file_offset(table, a) for a in elf_addresses], dtype=np.uint64))
    starts = np.full(len(numbers), -1)
    starts[numbers >= 0] = table.unnamed_starts(numbers[numbers >= 0])
    return [elf_address(table, start) if start >= 0 else None for start in starts.tolist()]


def file_offset(table: SymbolTable, elf_address: int) -> int:
    for p_vaddr, p_offset, p_filesz in table.segments:
        if p_vaddr <= elf_address < p_vaddr + p_filesz:
            return elf_address - p_vaddr + p_offset
    raise ValueError(f"{elf_address:#x} is not executable")


def elf_address(table: SymbolTable, offset: int) -> int:
    module = Module("", "", segments=table.segments)
    return module.elf_address(FileOffset(offset))


class Symbol(NamedTuple):
    address: int
    size: int
    kind: str
    name: bytes


def read_symbols(path: Path) -> list[Symbol]:
    """Return the defined code symbols of both tables from readelf, without symbol versions."""
    command = ["readelf", "--wide", "--syms", "--dyn-syms", path]
    output = subprocess.run(command, check=True, timeout=60, capture_output=True).stdout
    pattern = re.compile(
        rb"^ *\d+: ([0-9a-f]+) +(0x[0-9a-f]+|\d+) (FUNC|IFUNC|NOTYPE) +\w+ +\w+ +(\d+) ([^@\s]+)",
        re.MULTILINE,
    )
    return [
        Symbol(int(address, 16), int(size, 0), kind.decode(), name)
        for address, size, kind, _, name in pattern.findall(output)
    ]


def read_plt(path: Path) -> dict[int, bytes]:
    """Return the names of PLT stubs by address from objdump."""
    command = ["objdump", "-d", "-j.plt", "-j.plt.sec", "-j.plt.got", path]
    output = subprocess.run(command, check=False, timeout=60, capture_output=True).stdout
    pattern = re.compile(rb"^([0-9a-f]+) <([^>*]+)@plt>:$", re.MULTILINE)
    return {int(address, 16): name for address, name in pattern.findall(output)}
