"""What a process runs: the program, or for an interpreter what it interprets.

An interpreter's name says nothing of a service: `python3 /srv/shop.py` is `shop`. What is named:

- the script, without its folder and ending (`index.js` and `__main__.py` by their folder)
- the module (`python -m http.server`), the main class (`java -cp … org.shop.Main`), the JAR
  (`shop-1.4.2.jar` is `shop`: a version in the name would make each deployment a new service)
- the application that a server runs: `gunicorn shop.wsgi:app`, `uvicorn shop.main:app`,
  `celery -A shop`, also from the titles that such servers set for themselves

Arguments are whatever the process says. They choose a name, nothing else.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
_UNNAMED = frozenset({b"index", b"__main__"})
_FOLDERS_OF_CODE = frozenset({b"dist", b"build", b"src", b"lib", b"bin", b"out"})

_SERVERS = frozenset(
    {b"gunicorn", b"uvicorn", b"hypercorn", b"daphne", b"granian", b"waitress-serve"}
)
_APPLICATION = re.compile(rb"([A-Za-z_][\w.]*):[A-Za-z_][^/]*")
_MODULE = re.compile(rb"[A-Za-z_][\w.]*")
_TITLE = re.compile(rb"(?:gunicorn|puma|unicorn)[ :][^\[]*\[([^\]]+)\]")

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
    """What an interpreter runs, by its arguments."""

    name: bytes = b""
    script: bytes = b""
    is_part_of_parent: bool = False


_NOTHING = _Target()


def describe(exe: bytes, arguments: Sequence[bytes], comm: bytes, cwd: bytes) -> Program:
    """Name what runs. `exe` and `cwd` are paths, empty where not known."""
    first = arguments[0] if arguments else b""
    program = basename(exe.removesuffix(b" (deleted)"))
    if program.startswith(b"memfd:") or program.isdigit():  # started through a descriptor
        program = comm
    if not program:
        program = basename(first.split(b" ", 1)[0]).removeprefix(b"-") or comm
    if match := _TITLE.match(first):
        return Program(readable(match[1].partition(b":")[0]), is_own_code=False)
    if _STARTERS.fullmatch(program):
        return Program(readable(program), is_own_code=False)
    read = _reader(program)
    if read is None:
        return Program(readable(program))
    if len(arguments) == 1 and b" " in first:  # a title in place of arguments
        arguments = first.split()
    target = read(arguments[1:])
    name = target.name or (_script_name(target.script, cwd) if target.script else b"")
    if not name and program == b"busybox":
        name = comm
    return Program(
        readable(name or program),
        target.script,
        is_own_code=False,
        is_part_of_parent=target.is_part_of_parent,
    )


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
            return _Target(script=argument)
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
    name = _ENDINGS.sub(b"", basename(script.rstrip(b"/")))
    if name not in _UNNAMED:
        return name
    folder = dirname(normpath(join(cwd, script)))
    while basename(folder) in _FOLDERS_OF_CODE:
        folder = dirname(folder)
    return basename(folder) or name
