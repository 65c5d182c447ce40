"""Python functions by their code objects, as the kernel program saw them.

The program sends a code object when it first meets it, so its names are those of the moment of the
sample and are there when the process is gone. They are kept by process generation: an address means
nothing in another process, nor after an exec.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from typing import NamedTuple
from weakref import WeakValueDictionary

from bpf.interpreters import ChainEnd, CodeContent
from bpf.samples import ProcessGeneration, PythonFrame
from profiler.agent.allowance import Allowance
from symbolizer.location import Kind, NamedLocation
from symbolizer.runtimes.code_objects import CodeObject, Parts, parse_code
from symbolizer.runtimes.image import Layout
from symbolizer.runtimes.python_modules import module_of

CPYTHON = "cpython"
"""What its counts are called."""
PYTHON = "[python]"
UNKNOWN = NamedLocation(PYTHON, PYTHON, Kind.PYTHON, "", 0, 0)
"""A Python function whose code object was not read."""
_MARKS = {
    end.mark: UNKNOWN._replace(function=f"[{end.label.replace('_', ' ')}]") for end in ChainEnd
}
"""In place of functions that a stack does not have: by the reason, such as `[truncated]`."""
_CLEANUP = "__init__"
"""The file, by its name, of what the interpreter runs below each `__init__` since 3.13."""

_OF_PROCESS, _OF_CGROUP = (4000, 200), (12_000, 600)
"""Code objects at once and per second: a program that makes ever new ones names what it likes, but
does not keep the agent busy, nor do many together. Each takes 50 us. What is beyond comes again
after a minute (`bpf.interpreters.SEEN_SHIFT`)."""
_LINES_OF_ONE = 512
"""So many bytes of a line table count as much as a code object."""
_MAX_BYTES, _MAX_BYTES_OF_PROCESS = 32 << 20, 8 << 20
"""What is kept. Beyond it those go that were sampled longest ago: of the same process, or of that
process. They come again after a minute as well."""
_CODE_BYTES, _LINE_BYTES = 600, 9
"""What Python needs for one, besides its names, and for a byte of its line table."""


class Interpreter(NamedTuple):
    """What is needed to read a code object: of which version, and where it has what.

    `is_split` says that native frames may be taken for the interpreter's loop that are not;
    `runtime` is the address of `_PyRuntime`, as linked.
    """

    version: int
    layout: Layout
    is_split: bool = False
    runtime: int = 0


class _Codes:
    """The code objects of a process by address and checksum, the longest unused first."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self._codes: OrderedDict[tuple[int, int], CodeObject] = OrderedDict()

    def __len__(self) -> int:
        return len(self._codes)

    def __contains__(self, key: tuple[int, int]) -> bool:
        return key in self._codes

    def add(self, key: tuple[int, int], code: CodeObject) -> None:
        self._codes[key] = code
        self.size_bytes += _size_of(code)
        while self.size_bytes > _MAX_BYTES_OF_PROCESS:
            self.size_bytes -= _size_of(self._codes.popitem(last=False)[1])

    def use(self, key: tuple[int, int]) -> CodeObject | None:
        if key in self._codes:
            self._codes.move_to_end(key)
        return self._codes.get(key)


class PythonCode:
    """Not to be used from several threads at once.

    Attributes:
        counts: samples of threads of interpreters, what was found of their frames, and code
            objects, since the start.
    """

    def __init__(self, interpreters: Mapping[int, Interpreter]) -> None:
        """`interpreters` are those that the kernel was told of, by number."""
        self.counts: Counter[str] = Counter()
        self._interpreters = interpreters
        self._codes: OrderedDict[ProcessGeneration, _Codes] = OrderedDict()
        """The longest unused first."""
        self._processes, self._cgroups = Allowance(*_OF_PROCESS), Allowance(*_OF_CGROUP)
        # Forked processes have the same functions, at the same addresses.
        self._same: WeakValueDictionary[tuple[object, ...], CodeObject] = WeakValueDictionary()

    def status(self) -> dict[str, int]:
        """Return what the agent's status shows of it."""
        return {**self.counts, "code_objects_kept": sum(map(len, self._codes.values()))}

    def take(self, contents: Iterable[CodeContent]) -> None:
        """Take in what the program has sent."""
        self._processes.refill()
        self._cgroups.refill()
        for content in contents:
            key = (content.address, content.checksum)
            if key in self._codes.get(content.generation, ()):
                continue
            self.counts["code_objects"] += 1
            if not self._afford(content):
                self.counts["code_objects_beyond_budget"] += 1
                continue
            code = self._parse(content)
            if code is None:
                self.counts["code_objects_unreadable"] += 1
                continue
            self._codes.setdefault(content.generation, _Codes()).add(key, code)
        kept = sum(codes.size_bytes for codes in self._codes.values())
        while kept > _MAX_BYTES:
            kept -= self._codes.popitem(last=False)[1].size_bytes

    def _afford(self, content: CodeContent) -> bool:
        """Charge a code object, if its process and its cgroup may still have it."""
        cost = 1 + len(content.lines) / _LINES_OF_ONE
        charged = (
            (self._processes, content.generation),
            (self._cgroups, content.cgroup_id),
        )
        if not all(allowance.has(who, cost) for allowance, who in charged):
            return False
        for allowance, who in charged:
            allowance.spend(who, cost)
        return True

    def _parse(self, content: CodeContent) -> CodeObject | None:
        interpreter = self._interpreters.get(content.interpreter)
        if interpreter is None:
            return None
        parts = Parts(content.code, content.name, content.file, content.lines)
        code = parse_code(interpreter.version, interpreter.layout, parts)
        return code and self._same.setdefault(_identity(code), code)

    def locate(self, generation: ProcessGeneration, frame: PythonFrame) -> NamedLocation | None:
        """Return where a frame is; UNKNOWN if its code object was not read.

        None for a frame that is not a function's, and that the interpreter itself does not show.
        """
        if not frame.code:
            return _MARKS.get(frame, UNKNOWN)
        codes = self._codes.get(generation)
        code = codes.use((frame.code, frame.checksum)) if codes else None
        if code is None:
            self.counts["frames_unnamed"] += 1
            return UNKNOWN
        self._codes.move_to_end(generation)
        if code.file == _CLEANUP:
            return None
        return NamedLocation(
            code.name,
            module_of(code.file),
            Kind.PYTHON,
            code.file,
            code.first_line,
            code.line(frame.instruction) or code.first_line,
        )


def _identity(code: CodeObject) -> tuple[object, ...]:
    return (code.version_hex, code.name, code.file, code.first_line, code.line_table)


def _size_of(code: CodeObject) -> int:
    lines = code.line_table or b""
    return _CODE_BYTES + len(code.name) + len(code.file) + _LINE_BYTES * len(lines)
