r"""What the names of perf maps and jitdumps mean: function, file and line, as runtimes put them.

JS:*size /srv/app.js:12:3                   V8 (Node, Deno); marks say which compiler it was
JS:size-4-turbofan                          V8, of WebAssembly
JSC-FTL: size#A2fGtS                        JavaScriptCore (Bun)
py::Box.size:/srv/app.py                    CPython with -X perf
int app.Box.size(java.util.List)            HotSpot
Lapp/Box;::size(I)I                         agents of HotSpot
int32 [App] App.Box::Size(string)[Tier1]    .NET
App.Box:Size (string)                       Mono
$box:size/1, box:size/1                     Erlang and Elixir, perf map and jitdump
JIT$App\Box::size, TRACE-3$App\Box::size$12 PHP
TRACE_3::/srv/app.lua:12                    LuaJIT
[JIT] Box#size                              Ruby

What changes from run to run, or as a function is compiled anew, is left out, so that it is one
function in all views and comparisons. All other names are kept as they are.
"""

import re
from typing import NamedTuple

from symbolizer.location import Kind, NamedLocation
from symbolizer.text import readable

JIT_MODULE, PYTHON_MODULE = "[jit]", "[python]"
_ANONYMOUS = "(anonymous)"
_EVALUATED = "<anonymous>"
"""The file of code without one, as V8 has it in stack traces."""
_FILE_URL = "file://"
_LINE = r"\d{1,9}"
_LINE_DIGITS = 9

# `o` is code that was entered in the middle of a loop (on-stack replacement).
_V8 = re.compile(r"(?:LazyCompile|Function|JS|Script|Eval|Module|Callback):(?:o?[*~^+-]'?)?")
# A file may have blanks in its path, and a function in its name: these begin a file.
_V8_FILE = re.compile(r" (?=/|file://|node:|https?://|[A-Za-z]:[\\/])")
_WASM = re.compile(r"(?:JS|Function):[*~]?(?P<function>.+)-\d+-(?:liftoff|turbofan)")
_REGEXP = re.compile(
    r"RegExp:(?P<old>.+)|RegExp\.[<>] src: '(?P<new>.+)' flags: '\w*'|JSC-YarrJIT: /(?P<jsc>.+)/\w*"
)
_JSC = re.compile(r"JSC-(?:Baseline|DFG|FTL): (?P<function>.*)#(?P<hash>\w{6})")
_PYTHON = re.compile(r"py::(?P<function>[^:]+):(?P<file>.*)")
_JAVA = re.compile(r"[^ ():]+ (?P<method>(?:[^ (.:]+\.)+[^ (.:]+\([^()]*\))")
_HIDDEN_CLASS = re.compile(r"(?:(\$\$Lambda)(?:\$\d+)?)?[/+]0x[0-9a-f]{8,16}\b")
_AGENT = re.compile(r"L(?P<type>[^;:() ]+);(?:::)?(?P<method>[^;:() ]+)(?:\((?P<types>.*)\)\S+)?")
_DESCRIPTOR = re.compile(r"(?P<arrays>\[*)(?:(?P<letter>[ZBCSIJFD])|L(?P<type>[^;]+);)")
_PRIMITIVE_TYPES = {
    "Z": "boolean",
    "B": "byte",
    "C": "char",
    "S": "short",
    "I": "int",
    "J": "long",
    "F": "float",
    "D": "double",
}
_DOTNET = re.compile(r"[^ ] \[[^\][ ]+\] ")
_DOTNET_TIER = re.compile(r"\[[\w-]+\]")
_DOTNET_STUB = re.compile(r"stub<\d+> (?P<function>\w+)<\w*>")
_MONO = re.compile(r"(?P<type>[^ :()]+):(?P<method>[^ :()]+) \((?P<types>[^()]*)\)")
_ERLANG = re.compile(r"\$?(?P<module>[a-z]\w*|'[^']+'):(?P<function>.+/\d+)(?:-CodeInfoPrologue)?")
_ERLANG_OWN = re.compile(r"\$(?P<function>[a-z]\w*::\w+)")
_ELIXIR = "Elixir."
_PHP = re.compile(rf"(?:JIT|TRACE-\d+)\$(?P<function>[^$].*?)(?:\$(?P<line>{_LINE}))?")
_LUA = re.compile(rf"TRACE_\d+::(?P<file>.+):(?P<line>{_LINE})")
_RUBY = re.compile(r"\[JIT\] (?P<function>.+)")


class CodeName(NamedTuple):
    """A function of a runtime, where it begins and where code of it does; empty and 0: unknown."""

    function: str
    file: str = ""
    first_line: int = 0
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
        place, line = code.file, code.line or code.first_line
    return NamedLocation(code.function, module, code.kind, place, code.first_line, line)


def split_name(name: bytes) -> CodeName:
    """Return what a name says, every part of it readable."""
    text = readable(name)
    for split in _RUNTIMES:
        code = split(text)
        if code is not None:
            return code
    return CodeName(text)


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
    if at < 0:
        return None
    file = named[at + 1 :].removeprefix(_FILE_URL) or _EVALUATED
    return CodeName(named[:at].strip() or _ANONYMOUS, file, int(position[0][:_LINE_DIGITS]))


def _split_javascript(text: str) -> CodeName | None:
    """WebAssembly, regular expressions, and JavaScriptCore, which has no files."""
    if regexp := _REGEXP.fullmatch(text):
        return CodeName(f"RegExp /{regexp['old'] or regexp['new'] or regexp['jsc']}/")
    if wasm := _WASM.fullmatch(text):
        return CodeName(wasm["function"])
    if found := _JSC.fullmatch(text):
        return CodeName(found["function"] or f"{_ANONYMOUS}#{found['hash']}")
    return None


def _split_python(text: str) -> CodeName | None:
    found = _PYTHON.fullmatch(text)
    return CodeName(found["function"], found["file"], kind=Kind.PYTHON) if found else None


def _split_java(text: str) -> CodeName | None:
    """Without what a method returns, and without the addresses that hidden classes are named by."""
    if found := _JAVA.fullmatch(text):
        return CodeName(_HIDDEN_CLASS.sub(r"\1", found["method"]))
    found = _AGENT.fullmatch(text)
    if found is None:
        return None
    types = "" if found["types"] is None else f"({_java_types(found['types'])})"
    return CodeName(f"{found['type'].replace('/', '.')}.{found['method']}{types}")


def _java_types(descriptors: str) -> str:
    """Return the types of parameters as Java has them (JVM specification, 4.3.2)."""
    return ", ".join(
        (_PRIMITIVE_TYPES.get(each["letter"] or "") or each["type"].replace("/", "."))
        + "[]" * len(each["arrays"])
        for each in _DESCRIPTOR.finditer(descriptors)
    )


def _split_dotnet(text: str) -> CodeName | None:
    """Without what a method returns, its assembly and the compiler's tier; Mono's alike."""
    if stub := _DOTNET_STUB.fullmatch(text):
        return CodeName(f"stub {stub['function']}")
    if mono := _MONO.fullmatch(text):
        return CodeName(f"{mono['type']}.{mono['method']}({_spaced(mono['types'])})")
    assembly = _DOTNET.search(text)
    if assembly is None:
        return None
    named, _, types = text[assembly.end() :].partition("(")
    types, end, tier = types.rpartition(")")
    if "::" not in named or not end or (tier and not _DOTNET_TIER.fullmatch(tier)):
        return None
    return CodeName(f"{named.replace('::', '.')}({_spaced(types)})")


def _spaced(types: str) -> str:
    return re.sub(r",(?! )", ", ", types)


def _split_erlang(text: str) -> CodeName | None:
    if own := _ERLANG_OWN.fullmatch(text):
        return CodeName(own["function"])
    found = _ERLANG.fullmatch(text)
    if found is None:
        return None
    module, function = found["module"], found["function"]
    elixir = module.strip("'")
    if elixir.startswith(_ELIXIR):
        return CodeName(f"{elixir.removeprefix(_ELIXIR)}.{function}")
    return CodeName(f"{module}:{function}")


def _split_php(text: str) -> CodeName | None:
    found = _PHP.fullmatch(text)
    if found is None:
        return None
    function, line = found["function"], int(found["line"] or 0)
    if function.startswith("/"):  # the code of a file that is in no function
        return CodeName("{main}", function, 0, line)
    return CodeName(function, "", 0, line)


def _split_lua(text: str) -> CodeName | None:
    """A trace goes through many functions: it is where it begins."""
    found = _LUA.fullmatch(text)
    if found is None:
        return None
    file, line = found["file"], found["line"]
    return CodeName(f"{file.rpartition('/')[2]}:{line}", file, 0, int(line))


def _split_ruby(text: str) -> CodeName | None:
    found = _RUBY.fullmatch(text)
    return CodeName(found["function"]) if found else None


_RUNTIMES = (
    _split_v8,
    _split_javascript,
    _split_python,
    _split_java,
    _split_dotnet,
    _split_erlang,
    _split_php,
    _split_lua,
    _split_ruby,
)
