"""Free-threaded builds of CPython (PEP 703): no package installs one, so they are compiled.

The source is that of Debian's package, from the mirror in the machine's own sources; apt checks it
by its SHA-256. Mirrors keep no old versions: where it is gone, the tests are skipped. A build has
what the programs of the tests import and no more, all of it in the executable, and little is
optimized: that takes 93 s of CPU on a busy machine, a third of it configure; all by -O1 took 143 s.
"""

import os
import re
import shutil
import tarfile
from pathlib import Path
from typing import NamedTuple

from tests.support.debian_roots import CACHE, CannotFetchError, fetch_once, mirror, run


class _Source(NamedTuple):
    path: str
    sha256: str


SOURCES = {
    "3.14": _Source(
        "pool/main/p/python3.14/python3.14_3.14.7.orig.tar.xz",
        "3b48dac8fb59f62eaa67ac83c1eb12bda1b7a08406dd286e252c11a66be27f81",
    ),
}
_APT_HELPER = "/usr/lib/apt/apt-helper"
_MODULES = (
    *("_asyncio", "_bisect", "_ctypes", "_heapq", "_json", "_posixsubprocess", "_random", "_sha2"),
    *("_socket", "_struct", "array", "binascii", "fcntl", "math", "select", "unicodedata"),
    "zlib",
)
"""Of C, beside those that each interpreter has."""
_OPTIMIZED = ("Python/ceval.o", "Python/pystate.o")
"""The evaluation loop, and what tells where a thread has its state: what a sampler reads."""
_NOT_NEEDED = ("test", "idlelib", "tkinter", "turtledemo", "ensurepip", "pydoc_data")
_OPTIONS = ("--disable-gil", "--without-ensurepip", "--without-doc-strings")
_DOWNLOAD_S, _CONFIGURE_S, _MAKE_S = 120, 600, 1800
"""The last two for a machine whose CPUs others use, too."""


def find_free_threaded(version: str) -> Path:
    """Return the folder of an installation, whose executable is bin/python3.

    Raises:
        CannotFetchError: nobody has compiled it yet: no test waits for that.
    """
    folder = CACHE / f"built-{version}"
    if not folder.exists():
        raise CannotFetchError("`python -m tests.support.pythons` compiles it")
    return folder


def compile_free_threaded() -> None:
    """Make those that are not there yet.

    Raises:
        CannotFetchError: they cannot be had here.
    """
    for version in SOURCES:
        fetch_once(f"built-{version}", lambda folder, version=version: _make(folder, version))


def _make(folder: Path, version: str) -> None:
    work, unfinished = (folder.with_name(f"{folder.name}.{each}") for each in ("work", "new"))
    for each in (work, unfinished):
        shutil.rmtree(each, ignore_errors=True)
    try:
        source = _fetch(SOURCES[version], work)
        _compile(source)
        _install(source, unfinished, f"python{version}t")
        unfinished.rename(folder)
    finally:
        for each in (work, unfinished):
            shutil.rmtree(each, ignore_errors=True)


def _fetch(source: _Source, work: Path) -> Path:
    """Return the folder with the source."""
    work.mkdir()
    archive, address = work / Path(source.path).name, f"{mirror().rstrip('/')}/{source.path}"
    run([_APT_HELPER, "download-file", address, archive, f"SHA256:{source.sha256}"], _DOWNLOAD_S)
    with tarfile.open(archive) as content:
        content.extractall(work)
    return next(work.glob("Python-*"))


def _compile(source: Path) -> None:
    known = (source / "Modules/Setup.stdlib.in").read_text()
    names = set(re.findall(r"^@MODULE_\w+@(\w+)", known, re.MULTILINE))
    disabled = " ".join(sorted(names.difference(_MODULES)))
    (source / "Modules/Setup.local").write_text(f"*disabled*\n{disabled}\n")
    flags = ("MODULE_BUILDTYPE=static", "OPT=-DNDEBUG -O0")
    run(["./configure", "--quiet", *_OPTIONS, *flags], _CONFIGURE_S, source)
    with (source / "Makefile").open("a") as makefile:
        makefile.writelines(f"{each}: OPT = -DNDEBUG -O1\n" for each in _OPTIMIZED)
    jobs = f"--jobs={os.cpu_count()}"
    run(["nice", "make", "--silent", jobs, "python"], _MAKE_S, source)


def _install(source: Path, folder: Path, name: str) -> None:
    (folder / "bin").mkdir(parents=True)
    shutil.copy2(source / "python", folder / "bin" / name)
    (folder / "bin/python3").symlink_to(name)
    ignored = shutil.ignore_patterns(*_NOT_NEEDED, "__pycache__")
    shutil.copytree(source / "Lib", folder / "lib" / name, ignore=ignored)
    # Without this folder the interpreter warns that it does not find its modules.
    (folder / "lib" / name / "lib-dynload").mkdir()
