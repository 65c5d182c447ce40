"""CPython interpreters for tests and benches: those of this machine, and others that are fetched.

What is installed differs by machine, so a test asks for a version with `need_python` or a variant
with `need`, and is skipped where there is none. Debian's newest release has three versions, each as
a program that carries the runtime in itself, and, as `...-sid-library`, one of ours that has it
from libpython. They run with their own C library in a root of their own. Builds as uv installs them
are called `standalone`, and `standalone-library` where one of our programs has libpython of them. A
`built` one is free-threaded and compiled here, from Debian's source, as no package has one.

`python -m tests.support.pythons` lists what there is, with those that are fetched and compiled.
"""

import contextlib
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile

from tests.support.built_pythons import SOURCES, compile_free_threaded, find_free_threaded
from tests.support.debian_roots import CannotFetchError, fetch_root
from tests.support.standalone_pythons import RELEASES, fetch_standalone, link_embedder

OLDEST, NEWEST = (3, 8), (3, 15)
VERSIONS = [(3, minor) for minor in range(OLDEST[1], NEWEST[1] + 1)]
FETCHED = ("3.13", "3.14", "3.15")
"""The versions in Debian's newest release."""
FOLDER_VARIABLE = "EVERFLAME_PYTHONS"
"""Names a folder with installations of one's own, such as free-threaded builds."""

_PROBE = """
import json, sys
print(json.dumps({
    "implementation": sys.implementation.name,
    "version": sys.version_info[:3],
    "executable": sys.executable,
    "prefix": sys.base_prefix,
    "is_free_threaded": "t" in sys.abiflags,
    "is_debug": hasattr(sys, "gettotalrefcount"),
}))
"""


@dataclass(frozen=True, slots=True)
class Interpreter:
    """One installation.

    Attributes:
        name: of the version and where it is from, such as `3.12.1-pyenv` or `3.14.2t-own`.
        executable: as processes in its root see it, symbolic links followed.
        root: the root folder of its processes, mostly `/`.
        libpython: the shared library that has the runtime, seen from its root; None if the
            executable has it.
        is_stripped: whether the file with the runtime has no .symtab.
    """

    name: str
    version: tuple[int, int, int]
    executable: Path
    root: Path
    libpython: Path | None
    is_free_threaded: bool
    is_debug: bool
    is_stripped: bool

    @property
    def runtime_file(self) -> Path:
        """Where this process finds the file with the runtime."""
        return self.outside(self.libpython or self.executable)

    def outside(self, path: Path) -> Path:
        """Return how this process calls a file that the interpreter's processes call `path`."""
        return _outside(self.root, path)

    def inside(self, script: Path) -> Path:
        """Return how the interpreter's processes call a file; it is copied into another root."""
        if self.root == Path("/"):
            return script
        content = script.read_bytes()
        digest = hashlib.sha256(content).hexdigest()[:16]
        path = Path("/tmp/scripts", digest, script.name)
        if not self.outside(path).exists():
            self.outside(path).parent.mkdir(parents=True, exist_ok=True)
            unfinished = self.outside(path).with_suffix(f".{os.getpid()}")
            unfinished.write_bytes(content)
            unfinished.rename(self.outside(path))
        return path

    def command(self, *arguments: str | Path) -> list[str]:
        """Return a command that runs this interpreter, in the process that starts it.

        Of the arguments, paths are files to copy into the root; strings are left as they are.
        """
        words = [str(self.inside(each)) if isinstance(each, Path) else each for each in arguments]
        return [*_entering(self.root), str(self.executable), *words]


@functools.cache
def installed() -> tuple[Interpreter, ...]:
    """Return the interpreters of this machine, the oldest first."""
    found: dict[Path, Interpreter] = {}
    for source, executable in _candidates():
        interpreter = _probe(executable, Path("/"), source)
        if interpreter is not None:
            found.setdefault(interpreter.executable, interpreter)
    return tuple(sorted(found.values(), key=lambda each: (each.version, each.name)))


@functools.cache
def fetched() -> tuple[Interpreter, ...]:
    """Return those of Debian's newest release, fetched on the first call of all.

    Raises:
        CannotFetchError: they cannot be had here.
    """
    packages = [
        package
        for version in FETCHED
        for package in (
            f"python{version}-minimal",
            f"libpython{version}-stdlib",
            f"libpython{version}",
        )
    ]
    root = fetch_root("sid", "sid", packages)
    found = []
    for version in FETCHED:
        found.append(_probe(Path("/usr/bin", f"python{version}"), root, "sid"))
        embedder = _embed(root, version)
        if embedder is not None:
            found.append(_probe(embedder, root, "sid-library"))
    return tuple(each for each in found if each is not None)


@functools.cache
def standalone() -> tuple[Interpreter, ...]:
    """Return those of python-build-standalone, fetched on the first call of all.

    Raises:
        CannotFetchError: they cannot be had here.
    """
    found = []
    for version in RELEASES:
        folder = fetch_standalone(version)
        program = _probe(folder / "bin/python3", Path("/"), "standalone")
        found.append(program)
        if program is not None and program.libpython is None:
            found.append(_probe(folder / "bin/embedded", Path("/"), "standalone-library"))
    return tuple(each for each in found if each is not None)


@functools.cache
def built() -> tuple[Interpreter, ...]:
    """Return the free-threaded ones, compiled by this module's `main`.

    Raises:
        CannotFetchError: that has not been done.
    """
    executables = [find_free_threaded(version) / "bin/python3" for version in SOURCES]
    found = [_probe(each, Path("/"), "built") for each in executables]
    return tuple(each for each in found if each is not None)


def interpreters() -> tuple[Interpreter, ...]:
    """Return all that there are here."""
    found = list(installed())
    for others in (fetched, standalone, built):
        with contextlib.suppress(CannotFetchError):
            found += others()
    return tuple(found)


def need_python(version: tuple[int, int]) -> Interpreter:
    """Return an interpreter of a version, with the GIL; skip the test where there is none."""
    for interpreter in installed():
        if interpreter.version[:2] == version and not interpreter.is_free_threaded:
            return interpreter
    return need("{}.{}-sid".format(*version))


def need(variant: str) -> Interpreter:
    """Return an interpreter by version and source, such as `3.14-sid-library`, or skip the test."""
    version, _, source = variant.partition("-")
    sources = {"sid": fetched, "standalone": standalone, "built": built}
    reason = "nor is it in Debian's newest release"
    try:
        known = sources.get(source.partition("-")[0], installed)()
    except CannotFetchError as error:
        known, reason = (), f"nor can it be fetched: {error}"
    for interpreter in known:
        name, _, its_source = interpreter.name.partition("-")
        if its_source == source and (name == version or name.startswith(f"{version}.")):
            return interpreter
    pytest.skip(f"Python {variant} is not installed, {reason}")


def need_build(name: str) -> Interpreter:
    """Return an interpreter of a version, such as `3.8`, or a variant of one, or skip the test."""
    major, _, minor = name.partition(".")
    return need(name) if "-" in name else need_python((int(major), int(minor)))


def _candidates() -> Iterator[tuple[str, Path]]:
    """Return executables, with a word for where each is from."""
    own = os.environ.get(FOLDER_VARIABLE)
    if own:
        for path in sorted(Path(own).glob("*/bin/python3")):
            yield "own", path
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    for path in sorted(pyenv.glob("versions/*/bin/python3")):
        yield "pyenv", path
    names = ["python3", *(f"python{major}.{minor}" for major, minor in VERSIONS)]
    for name in names:
        yield "system", Path("/usr/bin", name)
    for name in names:
        path = shutil.which(name)
        if path:
            yield "path", Path(path)
    yield "path", Path(sys.executable)


def _probe(executable: Path, root: Path, source: str) -> Interpreter | None:
    """Return what an executable says of itself; None if it is no CPython that we know."""
    told = _ask(executable, root)
    if told is None or told["implementation"] != "cpython":
        return None
    version = tuple(told["version"])
    if not OLDEST <= version[:2] <= NEWEST:
        return None
    real = _resolve(root, Path(told["executable"]))
    libpython = _find_libpython(root, real, Path(told["prefix"]))
    tags = "t" * told["is_free_threaded"] + "d" * told["is_debug"]
    return Interpreter(
        name=f"{'.'.join(map(str, version))}{tags}-{source}",
        version=version,
        executable=real,
        root=root,
        libpython=libpython,
        is_free_threaded=told["is_free_threaded"],
        is_debug=told["is_debug"],
        is_stripped=_is_stripped(_outside(root, libpython or real)),
    )


def _ask(executable: Path, root: Path) -> dict[str, Any] | None:  # JSON of different types
    command = [*_entering(root), str(executable), "-I", "-S", "-c", _PROBE]
    try:
        child = subprocess.run(
            command, capture_output=True, check=True, timeout=20, stdin=subprocess.DEVNULL
        )
        told: dict[str, Any] = json.loads(child.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return told


def _entering(root: Path) -> list[str]:
    """Return what stands before a command that is to run in a root folder."""
    if root == Path("/"):
        return []
    # Only root may change the root, others within a user namespace of their own.
    return ["chroot", str(root)] if os.geteuid() == 0 else ["unshare", "-rR", str(root)]


def _outside(root: Path, path: Path) -> Path:
    return root / path.relative_to("/")


def _resolve(root: Path, path: Path) -> Path:
    """Follow symbolic links as a process in `root` would."""
    for _ in range(10):
        outside = _outside(root, path)
        if not outside.is_symlink():
            break
        path = path.parent / outside.readlink()
    return path.resolve() if root == Path("/") else path


def _find_libpython(root: Path, executable: Path, prefix: Path) -> Path | None:
    for needed in _needed(_outside(root, executable)):
        name = Path(needed).name  # some builds have a path, from the executable's folder on
        if name.startswith("libpython"):
            folders = (prefix / "lib", Path("/usr/lib/x86_64-linux-gnu"), Path("/usr/local/lib"))
            for folder in folders:
                if _outside(root, folder / name).exists():
                    return _resolve(root, folder / name)
    return None


def _needed(path: Path) -> list[str]:
    with path.open("rb") as file:
        dynamic = ELFFile(file).get_section_by_name(".dynamic")
        tags = dynamic.iter_tags("DT_NEEDED") if dynamic else ()
        return [tag.needed for tag in tags]


def _is_stripped(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            return ELFFile(file).get_section_by_name(".symtab") is None
        except ELFError:
            return True


def _embed(root: Path, version: str) -> Path | None:
    """Return a program in `root` that has its Python from libpython; None without a compiler."""
    path = Path("/opt", f"embedded{version}")
    outside = _outside(root, path)
    library = root / f"usr/lib/x86_64-linux-gnu/libpython{version}.so.1.0"
    if not outside.exists():
        outside.parent.mkdir(exist_ok=True)
        unfinished = outside.with_suffix(f".{os.getpid()}")
        # The library needs a newer C library than the compiler's, but the program does not.
        try:
            link_embedder(library, unfinished, "-Wl,--unresolved-symbols=ignore-in-shared-libs")
        except (OSError, subprocess.SubprocessError):
            return None
        unfinished.rename(outside)
    return path


def main() -> int:
    sources: Mapping[str, Callable[[], object]] = {
        "Debian's": fetched,
        "standalone builds": standalone,
        "free-threaded builds": compile_free_threaded,
    }
    for what, have in sources.items():
        try:
            have()
        except CannotFetchError as error:
            print(f"{what} cannot be had: {error}")
    for each in interpreters():
        kind = each.libpython or "in the executable"
        symbols = "stripped" if each.is_stripped else "with symbols"
        print(f"{each.name:22} {each.outside(each.executable)}  {kind}, {symbols}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
