"""Judges Python stacks of tests/targets/python_calls.py by what the program knows of itself."""

import contextlib
import itertools
import json
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from storage.profile import Stack
from symbolizer.location import Kind, NamedLocation
from tests.support.pythons import Interpreter
from tests.support.targets import SOURCES, running

PROGRAM = SOURCES / "python_calls.py"
MODES = (
    "methods", "generators", "callbacks", "recursion", "deep", "generated", "exceptions", "tasks",
    "threads", "parallel", "split",
)  # fmt: skip
THREADS = {"threads": 3, "parallel": 4}
"""Of modes that start some; of the others one counts."""
SHARES = {"hot": 60.0, "warm": 30.0, "cool": 10.0}
"""Of the mode `split`, in per cent: where its samples end."""
_EXAMPLES = 5


class PythonFrame(NamedTuple):
    function: str
    """Qualified, from Python 3.11 on."""
    file: str
    line: int


LEAST_FRAMES = 400
"""So many frames are kept of a stack that is deeper than a record."""
PythonStack = tuple[PythonFrame, ...]
"""Root first."""


class _Function(NamedTuple):
    name: str
    file: str
    first_line: int
    lines: frozenset[int]
    is_generator: bool


@dataclass(frozen=True, slots=True)
class CallTree:
    """All stacks that a mode of the program can have, but for the line of the last frame.

    Attributes:
        function_of: of each node.
        children: nodes by parent (-1: none) and the line of the call in it (0 without a parent).
    """

    function_of: Sequence[_Function]
    children: Mapping[tuple[int, int], Sequence[int]]

    @property
    def depth(self) -> int:
        depths = {-1: 0}
        for (parent, _), nodes in self.children.items():
            depths |= dict.fromkeys(nodes, depths[parent] + 1)
        return max(depths.values())

    def fault_of(self, stack: PythonStack) -> str:
        """Return why the program can never have had this stack; empty if it can."""
        if not stack:
            return "no Python frame"
        nodes, line = [-1], 0
        is_cut = stack[0].function == "[truncated]" and len(stack) > LEAST_FRAMES
        for depth, frame in enumerate(stack):
            if is_cut and depth < 2:  # its first frame may be anywhere
                known = list(range(len(self.function_of)))
                nodes = [child for child in known if depth == 0 or self._is_function(child, frame)]
                line = frame.line
                continue
            known = [child for node in nodes for child in self.children.get((node, line), ())]
            nodes = [child for child in known if self._is_function(child, frame)]
            if not nodes and depth == len(stack) - 1 and self._is_being_made(frame):
                return ""
            if not nodes:
                caller = f"{stack[depth - 1].function}:{line}" if depth else "the root"
                return f"frame {depth}: {caller} does not call {frame.function} ({frame.file})"
            line = frame.line
        if not any(line in self.function_of[node].lines for node in nodes):
            return f"frame {depth}: {frame.function} has no line {line}"
        return ""

    def _is_being_made(self, frame: PythonFrame) -> bool:
        """Return whether a generator is called that has not begun: no hook tells of that."""
        return any(
            each.is_generator and (each.name, each.file, each.first_line) == tuple(frame)
            for each in self.function_of
        )

    def _is_function(self, node: int, frame: PythonFrame) -> bool:
        function = self.function_of[node]
        return (function.name, function.file) == (frame.function, frame.file)


@dataclass(slots=True)
class Verdict:
    """How many samples have a stack that the program can have, and examples of others."""

    samples: int = 0
    right: int = 0
    wrong: list[tuple[int, str, PythonStack]] = field(default_factory=list)
    """Samples, their fault, and a stack that has it: the most frequent first."""

    @property
    def percent(self) -> float:
        return 100 * self.right / max(1, self.samples)


def tree_of(interpreter: Interpreter, mode: str) -> CallTree:
    """Ask the program, run by an interpreter, which stacks it can have."""
    command = interpreter.command(PROGRAM, mode, "--tree")
    child = subprocess.run(command, check=True, capture_output=True, timeout=100)
    return parse_tree(child.stdout)


def parse_tree(text: bytes) -> CallTree:
    told = json.loads(text)
    functions = [
        _Function(name, file, first_line, frozenset(lines), is_generator)
        for name, file, first_line, lines, is_generator in told["functions"]
    ]
    children: dict[tuple[int, int], list[int]] = {}
    for node, (parent, line, _) in enumerate(told["nodes"]):
        children.setdefault((parent, line), []).append(node)
    return CallTree([functions[number] for _, _, number in told["nodes"]], children)


@dataclass(frozen=True, slots=True)
class Parked:
    """A thread that stays at one place, and what it says of itself."""

    tid: int
    name: str
    stack: PythonStack


@contextlib.contextmanager
def parked(
    interpreter: Interpreter, mode: str, place: int = 1
) -> Iterator[tuple[int, list[Parked]]]:
    """Run the program until its threads are at a place of a mode, for the length of the block.

    Gives the process id and the threads: none if the mode has fewer places.
    """
    command = interpreter.command(PROGRAM, mode, f"--park={place}")
    count = THREADS.get(mode, 1)
    with running(*command, stdout=subprocess.PIPE) as process:
        lines = itertools.islice(process.stdout or (), count)
        yield process.pid, [_parse_parked(line) for line in lines]


@contextlib.contextmanager
def busy(interpreter: Interpreter, mode: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run rounds of a mode for the length of the block: each stack is in the tree from then on.

    At a lower priority: others that compute beside it come first.
    """
    command = ["nice", "-n", "10", *interpreter.command(PROGRAM, mode)]
    with running(*command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process


def _parse_parked(line: bytes) -> Parked:
    told = json.loads(line)
    stack = tuple(itertools.starmap(PythonFrame, told["stack"]))
    return Parked(told["tid"], told["name"], stack)


def python_stack(stack: Stack) -> PythonStack:
    """Return the Python frames of a stack of a profile."""
    return tuple(
        PythonFrame(location.function, location.file, location.line)
        for location in stack
        if isinstance(location, NamedLocation) and location.kind is Kind.PYTHON
    )


def judge(tree: CallTree, stacks: Iterable[tuple[PythonStack, int]]) -> Verdict:
    """Count which of stacks and their samples the program can have had."""
    verdict = Verdict()
    faults: Counter[str] = Counter()
    examples: dict[str, PythonStack] = {}
    for stack, samples in stacks:
        verdict.samples += samples
        fault = tree.fault_of(stack)
        if fault:
            faults[fault] += samples
            examples.setdefault(fault, stack)
        else:
            verdict.right += samples
    verdict.wrong = [
        (samples, fault, examples[fault]) for fault, samples in faults.most_common(_EXAMPLES)
    ]
    return verdict
