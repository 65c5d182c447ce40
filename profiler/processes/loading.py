"""What a command is going to map when it starts: its program, what loads that, and its libraries.

They are found before it runs, so that all that is known of files is there at its first tick.
"""

import contextlib
import mmap
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Iterable, Iterator, Mapping

from symbolizer.symbols.elf import FileSource, UnreadableElf, read_loader

_MAX_SCRIPTS = 5
"""So often an interpreter may be a script itself (execve(2))."""
_LINE_BYTES = 256
"""The kernel reads no more of a script's first line."""
_LIST_S = 5.0
# The lines of ld.so --list: `libc.so.6 => /usr/lib/libc.so.6 (0x7f01)`, `/lib64/ld.so (0x7f02)`
_LIBRARY = re.compile(rb"^\s*(?:\S+ => )?(/.*) \(0x[0-9a-f]+\)$", re.MULTILINE)


def find_loaded(command: str, environment: Mapping[str, str]) -> list[str]:
    """Return the files with code that a command maps when it starts, as far as can be told.

    What it opens later, and what it starts, are not among them. There are none if there is no such
    program.
    """
    program = _find_program(command, environment)
    return [] if program is None else [program, *_find_libraries(program, environment)]


@contextlib.contextmanager
def mapped(files: Iterable[str]) -> Iterator[None]:
    """Map files as programs are mapped, in this process and those that it forks meanwhile."""
    with contextlib.ExitStack() as opened:
        for path in files:
            # One that cannot be mapped is not known before it runs, as most programs are not.
            with contextlib.suppress(OSError, ValueError), open(path, "rb") as file:  # noqa: PTH123
                protection = mmap.PROT_READ | mmap.PROT_EXEC
                opened.enter_context(
                    mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=protection)
                )
        yield


def _find_program(command: str, environment: Mapping[str, str]) -> str | None:
    """Return the program that the kernel runs, which for a script is its interpreter."""
    search = environment.get("PATH", os.defpath)
    path = shutil.which(command, path=search)
    for _ in range(_MAX_SCRIPTS):
        if path is None or not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116
            return None
        words = _read_interpreter(path)
        if words is None:
            return path
        path = _named_by(words, search)
    return None


def _read_interpreter(path: str) -> list[str] | None:
    """Return the words behind `#!`; None if the file does not begin with it."""
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - the path may be any bytes
            line = file.read(_LINE_BYTES).partition(b"\n")[0]
    except OSError:
        return None
    return os.fsdecode(line[2:]).split() if line.startswith(b"#!") else None


def _named_by(words: list[str], search: str) -> str | None:
    """Return the interpreter of a script; `env` looks for the one that its first argument names."""
    if not words:
        return None
    path, *arguments = words
    if os.path.basename(path) != "env":  # noqa: PTH119
        return shutil.which(path, path=search)
    names = (each for each in arguments if not each.startswith("-") and "=" not in each)
    name = next(names, None)
    return None if name is None else shutil.which(name, path=search)


def _find_libraries(program: str, environment: Mapping[str, str]) -> list[str]:
    """Return the program that loads this one, and the libraries that it would load."""
    try:
        loader = _read_loader(program)
        if not loader:
            return []
        listed = subprocess.run(
            [loader, "--list", program],
            env=dict(environment), check=False, capture_output=True, stdin=subprocess.DEVNULL,
            timeout=_LIST_S,
        )  # fmt: skip
    except (OSError, ValueError, UnreadableElf, subprocess.SubprocessError):
        return []
    return [*map(os.fsdecode, dict.fromkeys([loader, *_LIBRARY.findall(listed.stdout)]))]


def _read_loader(program: str) -> bytes:
    with open(program, "rb") as file:  # noqa: PTH123
        return read_loader(FileSource(file.fileno()))
