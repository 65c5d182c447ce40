"""What the names of perf maps and jitdumps mean: function, file and line, as runtimes put them.

JS:*size /srv/app.js:12:3            V8; a mark says which compiler it was
LazyCompile:~ file:///srv/app.js:1:2
py::Box.size:/srv/app.py             CPython with -X perf
void java.util.List.add(Object)      all others are kept as they are
"""

import re
from typing import NamedTuple

from symbolizer.location import Kind, NamedLocation
from symbolizer.text import readable

JIT_MODULE, PYTHON_MODULE = "[jit]", "[python]"
_ANONYMOUS = "(anonymous)"
_FILE_URL = "file://"
_LINE_DIGITS = 9

_V8 = re.compile(r"(?:LazyCompile|Function|JS|Script|Eval|Module|Callback):(?:[*~^+-]'?)?")
# A file may have blanks in its path, and a function in its name: these begin a file.
_V8_FILE = re.compile(r" (?=/|file://|node:|https?://|[A-Za-z]:[\\/])")
_PYTHON = re.compile(r"py::(?P<function>[^:]+):(?P<file>.*)")


class CodeName(NamedTuple):
    """A function of a runtime. `line` is where it begins; empty and 0 if they are unknown."""

    function: str
    file: str = ""
    line: int = 0
    kind: Kind = Kind.JIT


def location_of(name: bytes, file: bytes = b"", line: int = 0) -> NamedLocation:
    """Return the location of a function, at a line of a file if that is known.

    In V8's optimised code a line may be one of an inlined function, and in its baseline code the
    file is a dangling pointer: a line counts if it is in the file that the name says.
    """
    code = split_name(name)
    place = readable(file).removeprefix(_FILE_URL)
    module = PYTHON_MODULE if code.kind is Kind.PYTHON else JIT_MODULE
    if not file or code.file not in ("", place):
        place, line = code.file, code.line
    return NamedLocation(code.function, module, code.kind, place, code.line, line)


def split_name(name: bytes) -> CodeName:
    """Return what a name says, every part of it readable."""
    text = readable(name)
    if python := _PYTHON.fullmatch(text):
        return CodeName(python["function"], python["file"], kind=Kind.PYTHON)
    return _split_v8(text) or CodeName(text)


def is_v8(name: bytes) -> bool:
    """Return whether a name is one of V8's, of a function with a file."""
    return _split_v8(readable(name)) is not None


def _split_v8(text: str) -> CodeName | None:
    tag = _V8.match(text)
    if tag is None:
        return None
    named, *position = text[tag.end() :].rsplit(":", 2)
    if len(position) != 2 or not all(map(str.isdecimal, position)):
        return None
    begin = _V8_FILE.search(named)
    at = begin.start() if begin else named.rfind(" ")
    if at < 0 or at + 1 == len(named):
        return None
    file = named[at + 1 :].removeprefix(_FILE_URL)
    line = int(position[0][:_LINE_DIGITS])
    return CodeName(named[:at].strip() or _ANONYMOUS, file, line)
