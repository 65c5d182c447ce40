"""Threads that run several interpreters: what is shown is what each of them runs, or a mark."""

import contextlib
import itertools
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.python_recordings import Recording, recording, stacks_of
from tests.support.pythons import VERSIONS, Interpreter, need_python
from tests.support.targets import running

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(600)]

PROGRAM = """\
import sys, threading
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters

def create():
    if sys.argv[1] == "thread inside" and sys.version_info < (3, 12):
        try:
            return interpreters.create(isolated=False)
        except TypeError:
            pass
    return interpreters.create()

def calls():
    interpreters.run_string(create(), sys.argv[2])

def outer():
    calls()

if sys.argv[1] == "in a thread":
    threading.Thread(target=outer, name="outer").start()
else:
    outer()
"""
INNER = """\
import os, threading, zlib
data = os.urandom(1 << 14)

def leaf():
    for i in range(20000):
        pass

def released():
    zlib.compress(data, 9)

def work():
    os.write(1, b"ready\\n")
    while True:
        leaf()
        released()

"""
STARTS_A_THREAD = "thread = threading.Thread(target=work)\nthread.start()\nthread.join()\n"
MODES = ("in main", "in a thread", "thread inside")
FEW = 40
RIGHT_PERCENT = 99.5

OUTER = ("outer", "calls")
THREAD = ("_bootstrap", "_bootstrap_inner", "run")
MARK = "[other stack]"
LINES = {"leaf": {4, 5, 6}, "released": {8, 9}, "work": {12, 13, 14, 15}}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recording]:
    with recording(tmp_path_factory.mktemp("cache")) as recorded:
        yield recorded


@contextlib.contextmanager
def busy(interpreter: Interpreter, mode: str, folder: Path) -> Iterator[int]:
    script = folder / "program.py"
    script.write_text(PROGRAM)
    source = INNER + (STARTS_A_THREAD if mode == "thread inside" else "work()\n")
    command = interpreter.command(script, mode, source)
    with running(*command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process.pid


def possible(interpreter: Interpreter, mode: str) -> set[tuple[str, ...]]:
    """Return the functions of stacks, root first; there is no mark if native frames are missing.

    Up to 3.11 a thread without the lock does not tell which of its interpreters it runs.
    """
    if mode == "thread inside":
        inner = {(*THREAD, "work", *leaf) for leaf in ((), ("leaf",), ("released",))}
        outer: set[tuple[str, ...]] = set()
    else:
        inner = {(MARK, "<module>", "work", *leaf) for leaf in ((), ("leaf",), ("released",))}
        begin = THREAD if mode == "in a thread" else ("<module>",)
        outer = {(*begin, *OUTER, MARK)}
    return inner if interpreter.version >= (3, 12) else inner | outer


@pytest.mark.parametrize("turn", range(len(MODES)))
def test_threads_of_several_interpreters_show_what_they_run(
    recorded: Recording, tmp_path: Path, turn: int
) -> None:
    modes = {
        need_python(version): MODES[(place + turn) % len(MODES)]
        for place, version in enumerate(VERSIONS)
    }
    with contextlib.ExitStack() as started:
        pids = recorded.meanwhile(
            lambda: {e: started.enter_context(busy(e, modes[e], tmp_path)) for e in modes}
        )
        recorded.settle(*pids.values())
        profiles = recorded.until(
            lambda found: all(stacks_of(found, pid).total() >= FEW for pid in pids.values()),
            "samples",
        )

    for interpreter, pid in pids.items():
        stacks = stacks_of(profiles, pid)
        functions: Counter[tuple[str, ...]] = Counter()
        for stack, samples in stacks.items():
            functions[tuple(name_of(frame.function) for frame in stack)] += samples
        allowed = possible(interpreter, modes[interpreter])
        known = {without_mark(names) for names in allowed}
        right = sum(functions[names] for names in functions if without_mark(names) in known)
        told = (interpreter.name, modes[interpreter], functions)
        assert 100 * right >= RIGHT_PERCENT * functions.total(), told
        assert functions.keys() & allowed, told
        assert {names[-1] for names in functions} >= {"leaf"}, told
        for frame in itertools.chain.from_iterable(stacks):
            assert frame.line in LINES.get(frame.function, {frame.line})
    assert any(each.accounting.runtimes["cpython"].get("other_stack") for each in profiles)


def name_of(function: str) -> str:
    """Return a function's name as versions to 3.10 have it."""
    return function.rpartition(".")[2]


def without_mark(functions: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in functions if name != MARK)
