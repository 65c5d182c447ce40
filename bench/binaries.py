"""Functions of real programs on this machine: names, files, lines and where their code lies.

Native ones are read by our own symbolizer: C++ with templates, C, Go with files and lines. Python's
are those of the standard library, the kernel's those of kallsyms. Which there are depends on the
machine; of one machine it is always the same.
"""

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import CodeType
from typing import NamedTuple

import numpy as np

from symbolizer.location import ElfAddress, Kind, Module, bounded
from symbolizer.symbols.candidates import IN_FDE_RANGE
from symbolizer.symbols.demangle import Demangler
from symbolizer.symbols.elf import FileSource, UnreadableElf, read_elf
from symbolizer.symbols.functions import read_functions
from symbolizer.symbols.table import SymbolCache
from symbolizer.text import readable

LEAST_BYTES = 64
"""Of a function's code: so many of its instructions can be told apart."""

_NAMES_AT_ONCE = 512
_NAMED_SHARE = 0.95
"""Of the functions of a file, if it has so many with names: others are known by their FDE range."""
_LIBRARIES = "/usr/lib/*-linux-gnu*"
PROGRAMS = {
    "search": [f"{_LIBRARIES}/libLLVM-1*.so.1", f"{_LIBRARIES}/libLLVM*.so.*"],
    "gateway": ["/usr/bin/node", "/usr/local/bin/node", f"{_LIBRARIES}/libnode.so.*"],
    "billing": ["/usr/local/bin/docker", "/usr/bin/docker", "/usr/lib/go*/bin/go"],
    "orders-db": ["/usr/lib/postgresql/*/bin/postgres", f"{_LIBRARIES}/libcrypto.so.*"],
}
"""Where there may be a program like that of a service: in C++, of JavaScript, in Go, in C."""
SHARED = ([f"{_LIBRARIES}/libc.so.6"], [f"{_LIBRARIES}/libstdc++.so.6"])


class Function(NamedTuple):
    """A function, as its frames are shown. Its code is at [start, end) of the file, if any."""

    name: str
    file: str = ""
    line: int = 0
    start: int = 0
    end: int = 0


class Binary(NamedTuple):
    """A file with code and some of its functions, in the order of their code."""

    module: Module
    functions: list[Function]

    @property
    def is_named(self) -> bool:
        """Return whether its locations have names instead of addresses."""
        return self.module.kind is Kind.PYTHON


def find_file(patterns: Sequence[str]) -> Path | None:
    """Return the first file that a pattern matches, in the order of the patterns."""
    for pattern in patterns:
        found = sorted(Path("/").glob(pattern.lstrip("/")))
        files = [each.resolve() for each in found if each.is_file()]
        if files:
            return files[0]
    return None


def read_native(path: Path, count: int, random: np.random.Generator) -> Binary | None:
    """Return a file with up to `count` of its functions; None if it has none to read."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        elf = read_elf(FileSource(descriptor))
        functions, strings = read_functions(elf)
        table = SymbolCache(None, 0).store("", functions, elf.segments, strings)
    except UnreadableElf:
        return None
    finally:
        os.close(descriptor)
    with_code = random.permutation(np.flatnonzero(functions.ends - functions.starts >= LEAST_BYTES))
    is_named = functions.names[with_code] & IN_FDE_RANGE == 0
    named = with_code[is_named][: int(count * _NAMED_SHARE)]
    chosen = np.sort(np.concatenate([named, with_code[~is_named]])[:count])
    kind = Kind.GO if len(functions.files) else Kind.NATIVE
    module = Module(elf.build_id, str(path), kind, elf.segments)
    names = _demangled([table.name(number) for number in chosen.tolist()])
    found = []
    for number, name, (start, end) in zip(
        chosen.tolist(), names, table.ranges(chosen).tolist(), strict=True
    ):
        file, line = table.place(number)
        # Known by its FDE range only, as most of what distributions ship.
        shown = (
            readable(name)
            or bounded(module.name, kind, ElfAddress(module.elf_address(start))).function
        )
        found.append(Function(shown, readable(file), line, start, end))
    table.close()
    return Binary(module, found) if found else None


def _demangled(names: list[bytes]) -> list[bytes]:
    demangler = Demangler()
    try:
        shown: list[bytes] = []
        # Each call has a limit of CPU time.
        for start in range(0, len(names), _NAMES_AT_ONCE):
            shown += demangler.demangle(names[start : start + _NAMES_AT_ONCE])
        return shown
    finally:
        demangler.close()


def read_python(count: int, random: np.random.Generator) -> Binary:
    """Return functions of Python's standard library, as interpreted code: by name alone."""
    folder = Path(os.__file__).parent
    found: dict[tuple[str, str, int], Function] = {}
    for path in sorted(folder.glob("*.py")) + sorted(folder.glob("*/[a-z]*.py")):
        if len(found) >= 2 * count:
            break
        try:
            code = compile(path.read_bytes(), str(path), "exec", dont_inherit=True)
        except (SyntaxError, ValueError):  # some are made to be wrong
            continue
        for each in _codes(code):
            key = (each.co_qualname, str(path), each.co_firstlineno)
            found[key] = Function(each.co_qualname, str(path), each.co_firstlineno)
    functions = sorted(found.values())
    chosen = np.sort(random.permutation(len(functions))[:count])
    return Binary(Module("", "[python]", Kind.PYTHON), [functions[i] for i in chosen.tolist()])


def _codes(code: CodeType) -> Iterator[CodeType]:
    waiting = [code]
    while waiting:
        one = waiting.pop()
        yield one
        waiting += [each for each in one.co_consts if isinstance(each, CodeType)]


def read_kernel(count: int, random: np.random.Generator) -> Binary:
    """Return functions of the running kernel. Their offsets are in its order, and made up."""
    with Path("/proc/kallsyms").open("rb") as lines:
        fields = [line.split() for line in lines]
    names = [each[2] for each in fields if len(each) == 3 and each[1] in b"tT"]
    names = sorted(set(names)) or [b"schedule"]
    chosen = np.sort(random.permutation(len(names))[:count])
    build_id = hashlib.sha1(os.uname().release.encode(), usedforsecurity=False).hexdigest()
    functions = [
        Function(readable(names[i]), "", 0, 0x1000 + 256 * i, 0x1100 + 256 * i)
        for i in chosen.tolist()
    ]
    return Binary(Module(build_id, "[kernel.kallsyms]", Kind.KERNEL), functions)


def interpreter() -> Path:
    """Return the program that runs this, which every machine has."""
    return Path(sys.executable).resolve()
