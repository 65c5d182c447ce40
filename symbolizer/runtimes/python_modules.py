"""Tell the dotted name of a Python module from the name of its file, as `import` would say it.

Only the process knows for certain where it looks for packages, and nothing here asks it. Below
these roots the path says it, whoever installed the package:

    site-packages, dist-packages        pip, distributions
    lib/python3.X, its lib-dynload      the standard library
    name.zip, .egg, .whl, .pyz, .pex    archives that packages are imported from
    a relative path                     bundles such as PyInstaller's: they record no root. Up to
                                        3.8 it may be the program itself, as its caller named it.
    <frozen name>                       modules inside the interpreter

Below _PROGRAM_ROOTS, where container images have their program by convention, the directories are
taken as packages. That is a guess: it says one package too many if the program started in a
directory below.

Elsewhere (a home directory, /srv) nothing tells the directories of packages from those above them,
so the name is that of the file alone: shorter than the true one, but no other. Two modules may
then share a name; the file tells them apart.
"""

import functools
import re

_PACKAGE_ROOTS = frozenset({"site-packages", "dist-packages"})
_ARCHIVE = re.compile(r".+\.(zip|egg|whl|pyz|pex)")
_LIBRARIES = frozenset({"lib", "lib64"})
_STANDARD_LIBRARY = re.compile(r"python3\.\d+t?")
_DYNAMIC = "lib-dynload"
_FROZEN = re.compile(r"<frozen (.+)>")

_PROGRAM_ROOTS = (
    ("", "app"),
    ("", "code"),
    ("", "usr", "src", "app"),  # the official images' examples
    ("", "var", "task"),  # AWS Lambda
    ("", "workspace"),  # buildpacks
)
_SOURCES = "src"
"""A directory in a program's root that holds its packages and is none itself."""

_SUFFIX = ".py"
_CUT = "…"
_FILES_KEPT = 4096


@functools.lru_cache(maxsize=_FILES_KEPT)
def module_of(file: str) -> str:
    """Return the dotted name of the module of a code object's file; empty if it cannot be told.

    A file that is not a module's (a script without `.py`, a template) is called by its name, and
    source that came from no file as the interpreter calls it: `<string>`, `<stdin>`. These are not
    `__main__`: `exec` and `namedtuple` compile a `<string>` in any module.
    """
    if file.startswith("<"):
        frozen = _FROZEN.fullmatch(file)
        return frozen[1] if frozen and _are_identifiers(frozen[1].split(".")) else file
    if file.endswith(_CUT):
        return ""
    *directories, name = file.split("/")
    stem = name.removesuffix(_SUFFIX)
    if stem == name or "." in stem:
        return name
    below = _below_root(directories)
    if below is not None:
        packages = _packages(below)
    else:
        packages = _packages(directories[-1:]) if stem in _OF_PACKAGES else []
    if stem == "__init__" and packages:
        return ".".join(packages)
    return ".".join([*packages, stem])


_OF_PACKAGES = ("__init__", "__main__")
"""Files that their directory makes sense of, wherever they are."""


def _packages(directories: list[str]) -> list[str]:
    """Return the last directories that can be packages.

    One whose name is no identifier is not imported by name, and nor is what lies above it.
    """
    for k in range(len(directories), 0, -1):
        if not directories[k - 1].isidentifier():
            return directories[k:]
    return directories


def _below_root(directories: list[str]) -> list[str] | None:
    """Return the directories below the nearest root; None if none is known."""
    for k in range(len(directories), 0, -1):
        if _ends_in_root(directories[:k]):
            return directories[k:]
    for root in _PROGRAM_ROOTS:
        if tuple(directories[: len(root)]) == root:
            below = directories[len(root) :]
            return below[1:] if below[:1] == [_SOURCES] else below
    is_relative = directories[:1] not in ([""], ["."], [".."])
    return directories if is_relative else None


def _ends_in_root(directories: list[str]) -> bool:
    last = directories[-1]
    if last in _PACKAGE_ROOTS or _ARCHIVE.fullmatch(last):
        return True
    if last == _DYNAMIC:
        return _ends_in_root(directories[:-1])
    is_library = len(directories) > 1 and directories[-2] in _LIBRARIES
    return is_library and _STANDARD_LIBRARY.fullmatch(last) is not None


def _are_identifiers(names: list[str]) -> bool:
    return all(name.isidentifier() for name in names)
