"""What a process runs: the program, or for an interpreter what it interprets.

An interpreter's name says nothing of a service: `python3 /srv/shop.py` is `shop`. What is named:

- the script, without its folder and ending (`index.js` and `__main__.py` by their folder)
- the module (`python -m http.server`), the main class (`java -cp … org.shop.Main`), the JAR
  (`shop-1.4.2.jar` is `shop`: a version in the name would make each deployment a new service)
- the application that a server runs: `gunicorn shop.wsgi:app`, `uvicorn shop.main:app`,
  `celery -A shop`
- the folder of the package that a package manager runs: `npm run start` in /srv/shop is `shop`
- the title that a program has written over its arguments: its application where it names one in
  brackets, else its first word (`next-server (v14.1.0)` is `next-server`)

A name has no version: it would make each upgrade a new service.

Arguments are whatever the process says. They choose a name, nothing else.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from posixpath import basename, dirname, join, normpath

from symbolizer.text import readable

_PYTHON = re.compile(rb"(?:python|pypy)[0-9.]*[a-z]*")
_NODE = re.compile(rb"node|nodejs|bun|deno")
_JAVA = re.compile(rb"java")
_SHELL = re.compile(rb"bash|dash|sh|zsh|ksh|mksh|ash|fish|busybox")
_SCRIPTING = re.compile(rb"(?:ruby|perl|lua|luajit|tclsh|wish|guile|Rscript|R)[0-9.]*")
_PHP = re.compile(rb"php[0-9.]*")
_STARTERS = re.compile(
    rb"tini|tini-static|dumb-init|docker-init|catatonit|s6-.*|runsv|runsvdir|su|sudo|runuser"
    rb"|setpriv|env|nice|timeout|systemd|systemd-executor|init"
)
"""Programs that run others: a version of theirs is not that of the service."""

_ENDINGS = re.compile(rb"\.(?:pyc?|pyz|[mc]?[jt]s|jar|war|rb|pl|php|sh|bash|lua|tcl|R)$")
_JAR_VERSION = re.compile(rb"[-_]v?[0-9]+(?:\.[0-9]+)*(?:[.-].*)?$")
_VERSION = re.compile(rb"(?:[-_]v?|(?<=[A-Za-z])|@v?)[0-9]+(?:\.[0-9]+)+(?:[-.+_][\w.+-]*)?$")
"""With a point: a number alone tells programs or shards apart (`cc1`, `worker-2`)."""
_DESCRIPTOR = re.compile(
    rb"/dev/fd/[0-9]+|/proc/[^/]+(?:/task/[^/]+)?/fd/[0-9]+|/dev/std(?:in|out|err)"
)
"""A script that comes through a pipe has no name: `bash <(curl …)` runs /dev/fd/63."""
_UNNAMED = frozenset({b"index", b"__main__"})
_FOLDERS_OF_CODE = frozenset({b"dist", b"build", b"src", b"lib", b"bin", b"out"})

_SERVERS = frozenset(
    {b"gunicorn", b"uvicorn", b"hypercorn", b"daphne", b"granian", b"waitress-serve"}
)
_APPLICATION = re.compile(rb"([A-Za-z_][\w.]*):[A-Za-z_][^/]*")
_MODULE = re.compile(rb"[A-Za-z_][\w.]*")
_TITLE = re.compile(rb"(?:gunicorn|puma|unicorn)[ :][^\[]*\[([^\]]+)\]")
_SIDEKIQ = re.compile(rb"sidekiq [0-9][^ ]* +([^ \[]+) +\[[0-9]+ of [0-9]+ busy\]")
_PASSENGER = re.compile(rb"Passenger [A-Za-z]+: ([^ ]+)")
_RELEASE = re.compile(rb"[0-9._-]+|[0-9a-f]{7,64}")
"""Folders of one release: servers that call their application by its folder show them."""
_RELEASES = frozenset({b"releases", b"release", b"versions", b"current"})

_PACKAGE_MANAGERS = frozenset(
    {b"npm", b"npm-cli", b"npx", b"npx-cli", b"yarn", b"yarnpkg", b"pnpm", b"pnpx", b"bunx"}
)
_RUNS_COMMAND = frozenset({b"exec", b"x", b"dlx"})

_NODE_VALUES = frozenset(
    {b"-r", b"--require", b"--import", b"--loader", b"--experimental-loader", b"-C"}
)
_NODE_CODE = frozenset({b"-e", b"--eval", b"-p", b"--print", b"-pe"})
_JAVA_VALUES = frozenset(
    b"-cp -classpath --class-path -p --module-path --add-modules --upgrade-module-path"
    b" --limit-modules --add-exports --add-opens --add-reads --source".split()
)
_SCRIPTING_VALUES = frozenset({b"-I", b"-r", b"-c", b"-d", b"-M"})
_SCRIPTING_CODE = frozenset({b"-e", b"-E", b"-S"})


@dataclass(frozen=True, slots=True)
class Program:
    """What a process runs.

    Attributes:
        name: to show.
        script: path of what is interpreted, as it stands on the command line.
        is_own_code: the executable is the service's, not an interpreter or a starter of others.
        is_part_of_parent: a helper that only the parent's name describes.
    """

    name: str
    script: bytes = b""
    is_own_code: bool = True
    is_part_of_parent: bool = False


@dataclass(frozen=True, slots=True)
class _Target:
    """What an interpreter runs, by its arguments; `rest` are those after the script."""

    name: bytes = b""
    script: bytes = b""
    rest: Sequence[bytes] = ()
    is_part_of_parent: bool = False


_NOTHING = _Target()


def describe(exe: bytes, arguments: Sequence[bytes], comm: bytes, cwd: bytes) -> Program:
    """Name what runs. `exe` and `cwd` are paths, empty where not known."""
    first = arguments[0] if arguments else b""
    program = _executable_name(exe, first, comm)
    read = _reader(program)
    application = _application_in_title(first, cwd)
    title = application
    if len(arguments) == 1 and not (exe and read is None):
        title = title or _title(first, cwd)
    if title:
        return Program(readable(title), is_own_code=read is None and not application)
    if _STARTERS.fullmatch(program):
        return Program(readable(program), is_own_code=False)
    if read is None:
        return Program(readable(_without_version(program)))
    if len(arguments) == 1 and b" " in first:  # all arguments as one, as PM2 shows them
        arguments = first.split()
    target = read(arguments[1:])
    name = target.name or (_script_name(target.script, cwd) if target.script else b"")
    if name in _PACKAGE_MANAGERS:
        name = _package_name(target.rest, cwd)
    if _PYTHON.fullmatch(program):  # its programs are python3.11, python3.11d, pypy3.10
        program = program.partition(b".")[0]
    if not name and program == b"busybox":
        name = comm
    return Program(
        readable(name or _without_version(program)),
        target.script,
        is_own_code=False,
        is_part_of_parent=target.is_part_of_parent,
    )


def _executable_name(exe: bytes, first: bytes, comm: bytes) -> bytes:
    name = basename(exe.removesuffix(b" (deleted)"))
    if name.startswith(b"memfd:") or name.isdigit():  # started through a descriptor
        return comm
    called = basename(first.split(b" ", 1)[0]).removeprefix(b"-")
    return name or called.rstrip(b":") or comm


def _title(title: bytes, cwd: bytes) -> bytes:
    """Return what a title that stands for all arguments names; nothing if it is a command line."""
    words = title.removeprefix(b"-").lstrip(b"[( ").split()
    if not words:
        return b""
    first = words[0].partition(b":")[0]
    word = basename(first.rstrip(b"/")) or first
    if word in _PACKAGE_MANAGERS:
        return _package_name(words[1:], cwd) or word
    if _reader(word) is not None or _STARTERS.fullmatch(word) or b"=" in word:
        return b""
    for option, value in pairwise(words):
        if word.startswith(b"celery") and option in (b"-A", b"--app"):
            return value.rstrip(b")").partition(b":")[0]
    name = _without_version(_ENDINGS.sub(b"", word))
    return name.lower() if name.isupper() else name


def _application_in_title(title: bytes, cwd: bytes) -> bytes:
    """Return the application that a server names in its title: `puma 6.4 (tcp://…) [shop]`."""
    if match := _TITLE.match(title) or _SIDEKIQ.match(title):
        name = match[1].partition(b":")[0]
        if not _RELEASE.fullmatch(name):
            return name
        return _folder_name(cwd) or title.partition(b" ")[0].rstrip(b":")
    if match := _PASSENGER.match(title):
        return _folder_name(match[1])
    return b""


def _without_version(name: bytes) -> bytes:
    return _VERSION.sub(b"", name) or name


def _package_name(arguments: Sequence[bytes], cwd: bytes) -> bytes:
    """Return what a package manager runs: a package's command, or else the package it is in."""
    words = [argument for argument in arguments if not argument.startswith(b"-")]
    if len(words) > 1 and words[0] in _RUNS_COMMAND:
        package = words[1]
        return _without_version(basename(package[:1] + package[1:].partition(b"@")[0]))
    return _folder_name(cwd)


def _folder_name(folder: bytes) -> bytes:
    """Return the name of the folder that holds an application, not that of a release or of code."""
    folder = normpath(folder)
    while (name := basename(folder)) in _FOLDERS_OF_CODE | _RELEASES or _RELEASE.fullmatch(name):
        folder = dirname(folder)
    return name


def _reader(program: bytes) -> Callable[[Sequence[bytes]], _Target] | None:
    for pattern, read in (
        (_PYTHON, _python),
        (_NODE, _node),
        (_JAVA, _java),
        (_SHELL, _shell),
        (_SCRIPTING, _scripting),
        (_PHP, _php),
    ):
        if pattern.fullmatch(program):
            return read
    return None


def _python(arguments: Sequence[bytes]) -> _Target:
    """Follow "Command line and environment" of Python's documentation: -c, -m, a script."""
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        rest = arguments[position + 1 :]
        position += 1
        if not argument.startswith(b"-"):
            return _python_script(argument, rest)
        if argument.startswith(b"--"):
            position += argument == b"--check-hash-based-pycs"
            continue
        at = next((i for i, c in enumerate(argument) if c in b"cmWX"), 0)
        if not at:
            continue
        value = argument[at + 1 :] or (rest[0] if rest else b"")
        after = rest if argument[at + 1 :] else rest[1:]
        option = argument[at : at + 1]
        if option == b"m":
            return _Target(_application(value, after) or value.removesuffix(b".__main__"))
        if option == b"c":
            return _Target(is_part_of_parent=b"from multiprocessing" in value)
        position += not argument[at + 1 :]
    return _NOTHING


def _python_script(script: bytes, rest: Sequence[bytes]) -> _Target:
    launcher = basename(script).removesuffix(b".py")
    return _Target(_application(launcher, rest), script)


def _application(launcher: bytes, arguments: Sequence[bytes]) -> bytes:
    """Return the module of the application that a known server runs, else nothing."""
    if launcher in (b"celery", b"flask"):
        options = (b"-A", b"--app")
        for position, argument in enumerate(arguments):
            option, equals, value = argument.partition(b"=")
            if option in options:
                value = value if equals else b"".join(arguments[position + 1 : position + 2])
                return value.partition(b":")[0]
        return b""
    if launcher not in _SERVERS:
        return b""
    for argument in arguments:
        if match := _APPLICATION.fullmatch(argument):
            return match[1]
    # Without `:app` it is the first or the last one, unless that is an option's value.
    for position in (0, len(arguments) - 1):
        is_value = position > 0 and arguments[position - 1].startswith(b"-")
        if arguments and not is_value and _MODULE.fullmatch(arguments[position]):
            return arguments[position]
    return b""


def _node(arguments: Sequence[bytes]) -> _Target:
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        position += 1
        if argument in _NODE_CODE:
            return _NOTHING
        if argument in _NODE_VALUES:
            position += 1
        elif not argument.startswith(b"-") and argument != b"run":
            return _Target(script=argument, rest=arguments[position:])
    return _NOTHING


def _java(arguments: Sequence[bytes]) -> _Target:
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        value = b"".join(arguments[position + 1 : position + 2])
        position += 1
        if argument == b"-jar":
            jar = _ENDINGS.sub(b"", basename(value))
            return _Target(_JAR_VERSION.sub(b"", jar) or jar, value)
        if argument in (b"-m", b"--module"):
            return _Target(value.partition(b"/")[0])
        if argument in _JAVA_VALUES:
            position += 1
        elif argument.endswith(b".java"):
            return _Target(basename(argument).removesuffix(b".java"), argument)
        elif not argument.startswith((b"-", b"@")):
            return _Target(argument)
    return _NOTHING


def _shell(arguments: Sequence[bytes]) -> _Target:
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        position += 1
        if argument.startswith(b"-") and not argument.startswith(b"--") and b"c" in argument:
            return _NOTHING
        if argument in (b"-o", b"+o", b"-O", b"+O", b"--rcfile", b"--init-file"):
            position += 1
        elif not argument.startswith((b"-", b"+")):
            return _Target(script=argument)
    return _NOTHING


def _php(arguments: Sequence[bytes]) -> _Target:
    """To the others -r names a library."""
    return _scripting(arguments, _SCRIPTING_CODE | {b"-r"})


def _scripting(arguments: Sequence[bytes], code: frozenset[bytes] = _SCRIPTING_CODE) -> _Target:
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        position += 1
        if argument in code:
            return _NOTHING
        if argument in _SCRIPTING_VALUES:
            position += 1
        elif not argument.startswith(b"-"):
            return _Target(script=argument)
    return _NOTHING


def _script_name(script: bytes, cwd: bytes) -> bytes:
    """Return the name of a script; nothing for one that comes through a descriptor."""
    if _DESCRIPTOR.fullmatch(script):
        return b""
    name = _without_version(_ENDINGS.sub(b"", basename(script.rstrip(b"/"))))
    if name not in _UNNAMED:
        return name
    folder = dirname(normpath(join(cwd, script)))
    while basename(folder) in _FOLDERS_OF_CODE:
        folder = dirname(folder)
    return basename(folder) or name
