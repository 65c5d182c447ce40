"""Python functions of threads that run at the same time, in interpreters without a global lock.

Such a thread has its own copy of each function's bytecode, and lines are counted from its start.
"""

import subprocess
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from storage.profile import Profile
from tests.support.python_recordings import Recording, recording, stacks_of
from tests.support.python_stacks import PROGRAM, PythonFrame, judge, python_stack, tree_of
from tests.support.pythons import need
from tests.support.targets import running

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(600)]

BUILD = "3.14-built"
COPIES = pytest.mark.parametrize("copies", ["tlbc=1", "tlbc=0"])
"""With a copy of the bytecode for each thread, and with one for all."""
FEW = 40
RIGHT_PERCENT = 99.5

LANES = 4
SHARED = """
import os, threading, time
def spin(count):
    while count: count -= 1
def shared(lane, end):
    while time.monotonic() < end:
{branches}
def repeat():
    while True:
        arguments = ({lanes}, time.monotonic() + 0.02)
        thread = threading.Thread(target=shared, args=arguments, name="repeated")
        thread.start()
        thread.join()
for lane in range({lanes}):
    threading.Thread(target=shared, args=(lane, float("inf")), name=f"lane {{lane}}").start()
os.write(1, b"ready\\n")
repeat()
"""
BRANCHES = [f"        if lane == {lane}: spin(20_000)" for lane in range(LANES + 1)]
SPIN_LINES = {3, 4}
FIRST_LANE_LINE = 7

MAKERS = 3
REMAKING = """
import os, threading
def remake(maker):
    number = 0
    while True:
        number = number % 400 + 1
        name = f"made_{{maker}}_{{number:03}}"
        text = "\\n" * number + f"def {{name}}(count):\\n    while count: count -= 1\\n"
        made = {{}}
        exec(compile(text, f"/srv/{{maker}}/{{number:03}}.py", "exec"), made)
        made.popitem()[1](8_000)
for maker in range({makers}):
    threading.Thread(target=remake, args=(maker,)).start()
os.write(1, b"ready\\n")
"""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recording]:
    with recording(tmp_path_factory.mktemp("cache")) as recorded:
        yield recorded


@COPIES
def test_stacks_of_threads_in_parallel_are_those_that_the_program_can_have(
    recorded: Recording, copies: str
) -> None:
    """Generators, callbacks from C, tasks, recursion and all else in four threads."""
    python = need(BUILD)
    tree = recorded.meanwhile(lambda: tree_of(python, "parallel"))
    command = python.command("-X", copies, PROGRAM, "parallel")

    profiles = record(recorded, command, lambda found: stacks_of(found).total() >= 10 * FEW)

    verdict = judge(tree, stacks_of(profiles).items())
    assert verdict.percent >= RIGHT_PERCENT, verdict


@COPIES
def test_each_thread_is_at_its_own_line_of_a_function_that_all_run(
    recorded: Recording, copies: str
) -> None:
    """Threads that end leave their copies to those that start."""
    branches = "\n".join(BRANCHES)
    script = SHARED.format(branches=branches, lanes=LANES)
    expected = {("repeated", LANES), *((f"lane {lane}", lane) for lane in range(LANES))}
    command = need(BUILD).command("-X", copies, "-c", script)

    profiles = record(
        recorded,
        command,
        lambda found: min(Counter(lanes_of(found))[each] for each in expected) >= FEW,
    )

    assert set(lanes_of(profiles)) == expected


def lanes_of(profiles: list[Profile]) -> Iterator[tuple[str, int]]:
    """Yield of each sample in a lane's loop the name of the thread and the lane by its line."""
    for row in (row for profile in profiles for row in profile.rows()):
        stack = python_stack(row.stack)
        if stack and stack[-1].function == "spin":
            assert stack[-1].line in SPIN_LINES, stack
            thread = dict(row.labels)["thread"]
            yield from row.samples * [(thread, stack[-2].line - FIRST_LANE_LINE)]


def test_functions_that_threads_make_and_drop_are_not_taken_for_each_other(
    recorded: Recording,
) -> None:
    """Name, file and line of each are in what it was made from."""
    command = need(BUILD).command("-c", REMAKING.format(makers=MAKERS))

    profiles = record(recorded, command, lambda found: len(made_in(found)) >= 100)

    made = made_in(profiles)
    for function, file, line in made:
        maker, number = function.removeprefix("made_").split("_")
        assert file == f"/srv/{maker}/{number}.py"
        assert line - int(number) in {1, 2}
    assert {each.function.split("_")[1] for each in made} == {str(k) for k in range(MAKERS)}


def made_in(profiles: list[Profile]) -> set[PythonFrame]:
    frames = {frame for stack in stacks_of(profiles) for frame in stack}
    return {frame for frame in frames if frame.function.startswith("made_")}


def record(
    recorded: Recording, command: list[str], is_enough: Callable[[list[Profile]], bool]
) -> list[Profile]:
    """Record a program, from when its functions are known until it is enough."""
    with running(*command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        recorded.settle(process.pid)
        profiles = recorded.until(is_enough, "samples")
    assert all(each.accounting.mismatch == 0 for each in profiles)
    return profiles
