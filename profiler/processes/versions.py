"""The version of a service, read from a process: what changes from one deployment to the next.

In this order, and the first that says something counts:

1. the environment: `service.version` of OTEL_RESOURCE_ATTRIBUTES, SERVICE_VERSION, DD_VERSION,
   GIT_SHA, variables the operator names. Nothing else of an environment is looked at or kept.
2. the tag of the container's image, or its digest
3. the revision in Go's build info, or its module's version
4. the release's folder that the working directory or the script's link leads to, `NAME` or
   `NAME+COMMIT` where it is a git work tree; for a script in a work tree the commit alone
5. the build id of the executable, for programs that are a service's own code: never that of an
   interpreter or of a program that starts others

A folder is a release's when it lies in `releases` or the like, or when the link `current` next to
it or the script's own link leads there and its name has a digit. Folders of the distribution (/usr)
are none. Scripts and folders are looked up in the process's own root.
"""

import os
import re
from collections.abc import Sequence
from posixpath import basename, dirname, join, normpath
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

from profiler.processes.facts import MAX_VERSION, Sources
from profiler.processes.programs import Program
from symbolizer.files import ProcessFiles, close_file
from symbolizer.symbols.elf import FileSource, UnreadableElf, read_elf
from symbolizer.symbols.gobuild import read_go_build
from symbolizer.text import readable

_VARIABLES = ("SERVICE_VERSION", "DD_VERSION", "GIT_SHA")
_OTEL = "OTEL_RESOURCE_ATTRIBUTES"

_MAX_ENVIRON_BYTES = 256 << 10
_MAX_VALUE_BYTES = 4096
_MAX_HEAD_BYTES = 4096
_MAX_PACKED_REFS_BYTES = 1 << 20
_MAX_EXECUTABLES = 1024
_MAX_FOLDERS = 6
"""How far up from a script its git work tree is looked for."""

_COMMIT = re.compile(rb"[0-9a-f]{40}(?:[0-9a-f]{24})?")
_RELEASES = frozenset({b"releases", b"release", b"versions", b"deploys", b"deployments", b"builds"})
_FOLDERS_OF_CODE = frozenset({b"bin", b"sbin", b"src", b"lib", b"dist", b"build", b"app"})
_OF_DISTRIBUTION = (
    b"/usr/",
    b"/lib/",
    b"/lib32/",
    b"/lib64/",
    b"/bin/",
    b"/sbin/",
    b"/proc/",
    b"/sys/",
    b"/dev/",
)


class _Executable(NamedTuple):
    build_id: str = ""
    go: str = ""


class Versions:
    """Finds versions. What executables say is kept for the last _MAX_EXECUTABLES of them."""

    def __init__(self, variables: Sequence[str] = ()) -> None:
        self._names = [name.encode() for name in (*_VARIABLES, *variables)]
        self._executables: dict[tuple[int, ...], _Executable] = {}

    def read(self, files: ProcessFiles, program: Program) -> Sources:
        """Return what there is, up to the first that decides."""
        if found := self._from_environment(files):
            return Sources(found[:MAX_VERSION])
        executable = self._read_executable(files) if program.is_own_code else _Executable()
        if executable.go:
            return Sources(go=executable.go[:MAX_VERSION], build_id=executable.build_id)
        release = _from_release(files, program)[:MAX_VERSION]
        return Sources(release=release, build_id=executable.build_id)

    def _from_environment(self, files: ProcessFiles) -> str:
        environ = files.read("environ", _MAX_ENVIRON_BYTES) or b""
        if len(environ) == _MAX_ENVIRON_BYTES:  # the last one may be cut short
            environ = environ[: environ.rfind(b"\0") + 1]
        for attribute in _value(environ, _OTEL.encode()).split(b","):
            name, _, value = attribute.partition(b"=")
            if name.strip() == b"service.version" and (text := _text(unquote_to_bytes(value))):
                return text
        for variable in self._names:
            if text := _text(_value(environ, variable)):
                return text
        return ""

    def _read_executable(self, files: ProcessFiles) -> _Executable:
        opened = files.open_executable()
        if opened is None:
            return _Executable()
        try:
            status = os.fstat(opened.fd)
            key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            executable = self._executables.get(key)
            if executable is None:
                while len(self._executables) >= _MAX_EXECUTABLES:
                    del self._executables[next(iter(self._executables))]
                executable = self._executables[key] = _parse_executable(opened.fd)
        except OSError:  # its file system has ended
            return _Executable()
        finally:
            close_file(opened.fd)
        return executable


def _value(environ: bytes, name: bytes) -> bytes:
    """Return the first value of a variable, as getenv(3) does, without copying any other."""
    mark = name + b"="
    start = 0 if environ.startswith(mark) else environ.find(b"\0" + mark) + 1
    if start == 0 and not environ.startswith(mark):
        return b""
    start += len(mark)
    end = environ.find(b"\0", start)
    return environ[start : min(end if end >= 0 else len(environ), start + _MAX_VALUE_BYTES)]


def _text(value: bytes) -> str:
    return readable(value.strip())


def _parse_executable(fd: int) -> _Executable:
    try:
        elf = read_elf(FileSource(fd))
    except UnreadableElf:
        return _Executable()
    try:
        build = read_go_build(elf)
    except UnreadableElf:
        build = None
    return _Executable(elf.build_id, (build.revision or build.module_version) if build else "")


def _from_release(files: ProcessFiles, program: Program) -> str:
    cwd = files.link("cwd")
    script = normpath(join(cwd, program.script)) if program.script else b""
    resolved = files.resolve(script) if script.startswith(b"/") else b""
    release = _release_of_link(script, resolved) or _release_of_folder(files, cwd)
    if not release and resolved:
        release = _release_of_folder(files, dirname(resolved))
    if release:
        name = basename(release)
        head = _git_head(files, release) or _revision_file(files, release)
        is_named_so = not head or head[:7] in name
        return _text(name if is_named_so else name + b"+" + head[:12])
    folder = dirname(resolved)
    if not program.script and program.is_own_code:
        folder = dirname(files.link("exe"))
    return _text(_work_tree_head(files, folder))


def _release_of_link(path: bytes, resolved: bytes) -> bytes:
    """Return the folder that the last link within `path` stands for, if it may be a release's."""
    if not resolved or path == resolved or resolved.startswith(_OF_DISTRIBUTION):
        return b""
    given, real = path.split(b"/"), resolved.split(b"/")
    while len(given) > 1 and len(real) > 1 and given[-1] == real[-1]:
        given.pop()
        real.pop()
    if len(real) == resolved.count(b"/") + 1:  # the script itself is the link
        real.pop()
    while len(real) > 1 and real[-1] in _FOLDERS_OF_CODE:
        real.pop()
    folder = b"/".join(real)
    if len(real) > 2 and (given[-1] == b"current" or _has_digit(real[-1]) or real[-2] in _RELEASES):
        return folder
    return b""


def _release_of_folder(files: ProcessFiles, folder: bytes) -> bytes:
    """Return the release that a resolved folder is or lies in, by its place or the link to it."""
    if folder.startswith(_OF_DISTRIBUTION):
        return b""
    for _ in range(_MAX_FOLDERS):
        parent = dirname(folder)
        if not folder.startswith(b"/") or parent == b"/":
            return b""
        if basename(parent) in _RELEASES:
            return folder
        for place in (parent, dirname(parent)):
            if files.resolve(join(place, b"current")) == folder:
                return folder
        folder = parent
    return b""


def _has_digit(name: bytes) -> bool:
    return any(48 <= byte <= 57 for byte in name)


def _work_tree_head(files: ProcessFiles, folder: bytes) -> bytes:
    if folder.startswith(_OF_DISTRIBUTION):
        return b""
    for _ in range(_MAX_FOLDERS):
        if not folder.startswith(b"/") or folder == b"/":
            return b""
        if head := _git_head(files, folder):
            return head
        folder = dirname(folder)
    return b""


def _git_head(files: ProcessFiles, folder: bytes) -> bytes:
    """Return the commit that is checked out in a folder (gitrepository-layout(5)), or nothing.

    A linked work tree has a file `.git` that names its own folder, whose `commondir` names the
    folder of the refs. Refs in a reftable are not read.
    """
    git = join(folder, b".git")
    pointer = _read_file(files, git, _MAX_HEAD_BYTES)
    if pointer.startswith(b"gitdir: "):
        git = normpath(join(folder, pointer.removeprefix(b"gitdir: ").strip()))
    head = _read_file(files, join(git, b"HEAD"), _MAX_HEAD_BYTES).strip()
    if not head.startswith(b"ref: refs/") or b".." in head:
        return head if _COMMIT.fullmatch(head) else b""
    ref = head.removeprefix(b"ref: ")
    if common := _read_file(files, join(git, b"commondir"), _MAX_HEAD_BYTES).strip():
        git = normpath(join(git, common))
    commit = _read_file(files, join(git, ref), _MAX_HEAD_BYTES).strip()
    if not commit:
        packed = _read_file(files, join(git, b"packed-refs"), _MAX_PACKED_REFS_BYTES)
        end = packed.find(b" " + ref + b"\n")
        commit = packed[packed.rfind(b"\n", 0, max(end, 0)) + 1 : max(end, 0)]
    return commit if _COMMIT.fullmatch(commit) else b""


def _revision_file(files: ProcessFiles, folder: bytes) -> bytes:
    """Return the commit that Capistrano notes in a release that it has exported."""
    commit = _read_file(files, join(folder, b"REVISION"), _MAX_HEAD_BYTES).strip()
    return commit if _COMMIT.fullmatch(commit) else b""


def _read_file(files: ProcessFiles, path: bytes, limit_bytes: int) -> bytes:
    opened = files.open_file(path)
    if opened is None:
        return b""
    try:
        with os.fdopen(opened.fd, "rb") as file:
            return file.read(limit_bytes)
    except OSError:
        return b""
