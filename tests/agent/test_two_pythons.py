"""Processes with two of Python's libraries: functions of one are shown, never as the other's."""

import subprocess
from collections import Counter
from pathlib import Path

import pytest

from storage.profile import Profile
from symbolizer.location import Kind
from tests.support.python_recordings import frames_of, recording
from tests.support.pythons import need
from tests.support.targets import compile_target, running

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(600)]

FEW = 40
PROGRAM = """\
import sys
def {0}_leaf():
    for i in range(10000): pass
def {0}_work():
    sys.stdout.write("ready\\n"); sys.stdout.flush()
    while True:
        {0}_leaf()
{0}_work()
"""
MARK = "[other stack]"


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first", "last"])
@pytest.mark.parametrize("how", ["beside", "inside"])
def test_of_two_interpreters_in_a_process_one_is_shown_and_the_other_marked(
    tmp_path: Path, how: str, order: tuple[int, int]
) -> None:
    program = compile_target("two_pythons.c", tmp_path / "two_pythons", "-O1", "-pthread", "-ldl")
    names = [("eleven", need("3.11-pyenv")), ("twelve", need("3.12-pyenv"))]
    arguments = [how]
    for name, python in (names[place] for place in order):
        arguments += [str(python.runtime_file), PROGRAM.format(name), name]
    lines = 2 if how == "beside" else 1
    with (
        recording(tmp_path / "cache") as recorded,
        running(program, *arguments, stdout=subprocess.PIPE) as process,
    ):
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(lines)] == [b"ready\n"] * lines
        recorded.settle(process.pid)
        profiles = recorded.until(
            lambda found: all(of(found, process.pid, name) >= FEW for name in (MARK, "<module>")),
            "functions of one, and marks of the other",
        )

    for stack in functions_of(profiles, process.pid):
        assert len({name.partition("_")[0] for name in stack} & {"eleven", "twelve"}) < 2
        assert how == "inside" or not {MARK, "<module>"} <= {*stack}
    counted = sum(each.accounting.runtimes["cpython"].get("other_stack", 0) for each in profiles)
    assert counted >= of(profiles, process.pid, MARK)


def functions_of(profiles: list[Profile], pid: int) -> Counter[tuple[str, ...]]:
    """Return the Python functions of stacks, root first, with samples."""
    found: Counter[tuple[str, ...]] = Counter()
    for stack, samples in frames_of(profiles, pid):
        found[tuple(frame.function for frame in stack if frame.kind is Kind.PYTHON)] += samples
    return found


def of(profiles: list[Profile], pid: int, name: str) -> int:
    stacks = functions_of(profiles, pid)
    return sum(samples for stack, samples in stacks.items() if name in stack)
