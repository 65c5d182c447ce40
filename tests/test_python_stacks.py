"""The judge of Python stacks, by a program that is asked in two ways what it is doing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.python_stacks import (
    MODES,
    PROGRAM,
    PythonFrame,
    PythonStack,
    judge,
    parked,
    tree_of,
)
from tests.support.pythons import VERSIONS, Interpreter, need_build, need_python

PY_SPY = Path(sys.executable).with_name("py-spy")
BUILDS = [*map("{0[0]}.{0[1]}".format, VERSIONS), "3.14-built"]
FEW_PLACES = ("recursion", "deep", "threads")
LINES = PROGRAM.read_text().splitlines()
SPINNING = PythonFrame("spin", "", LINES.index("def spin(count):") + 4)
"""Where a thread is without `--park`: in a loop four lines below."""


def stacks_of(interpreter: Interpreter, mode: str) -> list[PythonStack]:
    """Return stacks that a mode has, by the program's own word."""
    found = []
    with parked(interpreter, mode, 1 if mode in FEW_PLACES else 4) as (_, threads):
        for thread in threads:
            *callers, parking, _ = thread.stack
            found.append((*callers, SPINNING._replace(file=parking.file)))
    return found


@pytest.mark.parametrize("build", BUILDS)
def test_stacks_of_parked_threads_are_in_the_tree(build: str) -> None:
    """The one comes from walking the frames, the other from the hook for profilers."""
    interpreter = need_build(build)
    for mode in set(MODES) - {"deep", "split"}:  # the one takes a second, the other only has leaves
        stacks = [(each, 1) for each in stacks_of(interpreter, mode)]

        verdict = judge(tree_of(interpreter, mode), stacks)

        assert verdict.right == len(stacks) > 0, (mode, verdict.wrong)


def test_stacks_that_lack_a_frame_or_have_a_wrong_line_are_wrong() -> None:
    """Each frame and each line of a stack counts."""
    interpreter = need_python(sys.version_info[:2])
    tree = tree_of(interpreter, "callbacks")
    stack = stacks_of(interpreter, "callbacks")[-1]
    assert tree.fault_of(stack) == ""

    for depth, frame in enumerate(stack):
        above, below = stack[:depth], stack[depth + 1 :]
        moved = frame._replace(line=frame.line + 1000)

        # Without the last frame it is one of the moment before the call.
        assert (tree.fault_of((*above, *below)) == "") == (not below)
        assert tree.fault_of((*above, moved, *below)) != ""
        assert tree.fault_of((*above, frame._replace(function="other"), *below)) != ""
    assert tree.fault_of(()) == "no Python frame"


def test_the_tree_is_as_deep_as_the_recursion() -> None:
    """Stacks of more than 600 frames are among those that the judge knows."""
    assert tree_of(need_python(sys.version_info[:2]), "deep").depth > 700


@pytest.mark.skipif(os.geteuid() != 0, reason="py-spy needs root to read another process")
@pytest.mark.parametrize("mode", ["callbacks", "deep", "tasks", "threads"])
@pytest.mark.parametrize("version", VERSIONS, ids="{0[0]}.{0[1]}".format)
def test_py_spy_sees_what_a_parked_program_says_of_itself(
    version: tuple[int, int], mode: str
) -> None:
    """A reader that shares nothing with the program agrees about names, files and lines."""
    with parked(need_python(version), mode) as (pid, threads):
        output = subprocess.run(
            [PY_SPY, "dump", "--json", "--pid", str(pid)],
            check=True, capture_output=True, timeout=60,
        ).stdout  # fmt: skip
        seen = {each["os_thread_id"]: each["frames"] for each in json.loads(output)}

        for thread in threads:
            frames = [(each["name"], each["filename"], each["line"]) for each in seen[thread.tid]]
            assert frames[::-1] == list(thread.stack)
