"""The sampler's priority, and that its children do not inherit it."""

import os
import subprocess
import sys

import pytest

from profiler.agent.priority import DEFAULT_NICE, chosen_nice, raised

NICE_OF_CHILD = [sys.executable, "-c", "import os; print(os.getpriority(os.PRIO_PROCESS, 0))"]


@pytest.mark.parametrize(
    ("text", "nice"),
    [("", DEFAULT_NICE), ("-5", -5), ("0", 0), ("19", 19), ("-21", -10), ("x", -10)],
)
def test_the_variable_chooses_the_nice_value(text, nice):
    assert chosen_nice({"EVERFLAME_NICE": text}) == nice


@pytest.mark.kernel
def test_the_priority_is_raised_for_this_process_alone():
    """A recorded command, a reader and the uploader run as they would without it."""
    before = os.getpriority(os.PRIO_PROCESS, 0)

    with raised(before - 3):
        mine = os.getpriority(os.PRIO_PROCESS, 0)
        childs = int(subprocess.check_output(NICE_OF_CHILD))

    assert mine == before - 3
    assert childs == max(0, before - 3)
    assert os.getpriority(os.PRIO_PROCESS, 0) == before
    assert int(subprocess.check_output(NICE_OF_CHILD)) == before


def test_what_is_not_permitted_is_left_as_it_is():
    """By a user who may lower its priority only."""
    program = (
        "import os\n"
        "from profiler.agent.priority import raised\n"
        "before = os.getpriority(os.PRIO_PROCESS, 0)\n"
        "os.geteuid() or os.setuid(65534)\n"
        "with raised(before - 3):\n"
        "    assert os.getpriority(os.PRIO_PROCESS, 0) == before\n"
    )

    subprocess.run([sys.executable, "-c", program], check=True)
