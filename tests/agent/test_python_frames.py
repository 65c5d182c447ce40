"""Python functions in stacks, from real interpreters to the windows of a recorder."""

import contextlib
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.columns import Columns
from storage.interpreters import fold_interpreters
from storage.profile import Profile
from symbolizer.location import Kind
from tests.support.python_recordings import Recording, frames_of, recording, stacks_of
from tests.support.python_stacks import LEAST_FRAMES, busy, judge, parked, tree_of
from tests.support.pythons import interpreters, need, need_python
from tests.support.targets import running

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(600)]

SHALLOW = (
    "methods", "generators", "callbacks", "recursion", "generated", "exceptions", "tasks",
    "threads",
)  # fmt: skip
EVALUATION = "_PyEval_EvalFrameDefault"
FEW = 40
"""Samples of one process."""
RIGHT_PERCENT = 99.5
"""Of some moments no hook for profilers tells, such as when a generator is being closed."""

C_THREAD = b"""
#include <pthread.h>
static volatile unsigned long count;
static void *spins_in_c(void *nothing) { for (;;) count++; return nothing; }
int start(void) { pthread_t thread; return pthread_create(&thread, 0, spins_in_c, 0); }
"""
NAMED_THREADS = """
import threading
def spin():
    while True: pass
for name in ("first", "gr\u00f6\u00dfer"):
    threading.Thread(target=spin, name=name).start()
"""
STARTS_A_THREAD = """
import ctypes, os, sys
def spins_in_python():
    total = 0
    for i in range(10_000):
        total += i
assert ctypes.CDLL(sys.argv[1]).start() == 0
os.write(1, b"ready\\n")
while True:
    spins_in_python()
"""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recording]:
    with recording(tmp_path_factory.mktemp("cache")) as recorded:
        yield recorded


def count(profiles: list[Profile], pid: int) -> int:
    return stacks_of(profiles, pid).total()


def functions_of(profiles: list[Profile], pid: int) -> set[str]:
    return {frame.function for stack, _ in frames_of(profiles, pid) for frame in stack}


def test_stacks_of_all_interpreters_are_those_that_the_programs_can_have(
    recorded: Recording,
) -> None:
    """All at once, so that none is taken for another: Debian's newest three share a root.

    Each runs one mode here, and all of them in bench_python.py.
    """
    modes = {each: SHALLOW[place % len(SHALLOW)] for place, each in enumerate(interpreters())}
    trees = recorded.meanwhile(lambda: {each: tree_of(each, modes[each]) for each in modes})
    with contextlib.ExitStack() as started:
        pids = recorded.meanwhile(
            lambda: {each: started.enter_context(busy(each, modes[each])).pid for each in modes}
        )
        recorded.settle(*pids.values())
        profiles = recorded.until(
            lambda found: all(count(found, pid) >= FEW for pid in pids.values()), "samples"
        )

    samples = right = 0
    for interpreter, pid in pids.items():
        verdict = judge(trees[interpreter], stacks_of(profiles, pid).items())
        assert verdict.samples >= FEW
        wrong = verdict.samples - verdict.right
        assert wrong <= 1 or verdict.percent >= RIGHT_PERCENT, (interpreter.name, verdict)
        samples, right = samples + verdict.samples, right + verdict.right
    assert 100 * right / samples >= RIGHT_PERCENT
    for profile in profiles:
        assert profile.accounting.mismatch == 0
        assert profile.accounting.runtimes["cpython"]["frames"] > 0


@pytest.mark.parametrize("build", ["3.11-standalone", "3.14-standalone", "3.14-standalone-library"])
def test_folded_stacks_of_standalone_builds_have_no_frames_of_the_interpreter(
    recorded: Recording, build: str
) -> None:
    """Not between Python's functions, and few at the leaf: the loop has its name in all its parts.

    These are stripped, and the newest runs each kind of instruction by a function of its own.
    """
    interpreter = need(build)
    file = interpreter.runtime_file.name
    tree = recorded.meanwhile(lambda: tree_of(interpreter, "callbacks"))
    with busy(interpreter, "callbacks") as process:
        recorded.settle(process.pid)
        recorded.until(lambda found: EVALUATION in functions_of(found[-1:], process.pid), "names")
        profiles = recorded.until(lambda found: count(found, process.pid) >= 10 * FEW, "samples")
    folded = [fold_interpreters(Columns.of(profile)).to_profile() for profile in profiles]

    ends: Counter[str] = Counter()
    for stack, samples in frames_of(folded, process.pid):
        last = max(place for place, frame in enumerate(stack) if frame.kind is Kind.PYTHON)
        inner = [frame for frame in stack[1:last] if frame.module == file]
        assert not inner, [frame.function for frame in stack]
        ends["python" if last == len(stack) - 1 else "native"] += samples
    assert ends["python"] > ends["native"]
    verdict = judge(tree, stacks_of(folded, process.pid).items())
    assert verdict.percent >= RIGHT_PERCENT, verdict


def test_deep_stacks_keep_the_part_near_the_leaf(recorded: Recording) -> None:
    pythons = [need_python(version) for version in ((3, 10), (3, 11), (3, 13))]
    trees = recorded.meanwhile(lambda: [tree_of(each, "deep") for each in pythons])
    with contextlib.ExitStack() as started:
        pids = [started.enter_context(busy(each, "deep")).pid for each in pythons]
        recorded.settle(*pids)
        profiles = recorded.until(
            lambda found: all(count(found, pid) >= FEW for pid in pids), "samples"
        )

    for tree, pid in zip(trees, pids, strict=True):
        stacks = stacks_of(profiles, pid)
        verdict = judge(tree, stacks.items())
        assert verdict.percent >= RIGHT_PERCENT, verdict
        cut = [stack for stack in stacks if stack[0].function == "[truncated]"]
        assert cut
        assert min(map(len, cut)) > LEAST_FRAMES
    assert all(each.accounting.runtimes["cpython"]["truncated"] for each in profiles)


def test_parked_threads_are_where_they_say(recorded: Recording) -> None:
    """They have released the GIL: nothing but their own state tells of them."""
    with contextlib.ExitStack() as started:
        told = recorded.meanwhile(
            lambda: [
                started.enter_context(parked(each, mode))
                for each, mode in zip(interpreters(), 20 * ("threads", "callbacks", "tasks"))  # noqa: B905
            ]
        )
        recorded.settle(*(pid for pid, _ in told))
        profiles = recorded.until(
            lambda found: all(
                stacks_of(found, pid)[each.stack] for pid, threads in told for each in threads
            ),
            "each thread",
        )

    for pid, threads in told:
        stacks = stacks_of(profiles, pid)
        right = sum(stacks[stack] for stack in {each.stack for each in threads})
        assert right == stacks.total(), (stacks, threads)


@pytest.mark.parametrize("version", [(3, 8), (3, 11), (3, 13)], ids="{0[0]}.{0[1]}".format)
def test_threads_without_python_are_counted_with_the_reason(
    recorded: Recording, tmp_path: Path, version: tuple[int, int]
) -> None:
    """Each sample of an interpreter's process is an attempt, and each failed one says why."""
    library = tmp_path / "threads.so"
    command = ["gcc", "-O2", "-shared", "-fPIC", "-pthread", "-x", "c", "-", "-o", library]
    subprocess.run(command, input=C_THREAD, check=True, timeout=60)
    program = need_python(version).command("-c", STARTS_A_THREAD, str(library))
    with running(*program, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        recorded.settle(process.pid)
        profiles = recorded.until(
            lambda found: min(split(found, process.pid).values()) >= FEW, "samples of both"
        )

    seen = split(profiles, process.pid)
    counts = sum((Counter(each.accounting.runtimes["cpython"]) for each in profiles), Counter())
    stored = sum(each.total_samples for each in profiles)
    reasons = counts.total() - counts["attempts"] - counts["frames"]
    assert counts["attempts"] >= 0.98 * stored
    assert reasons >= seen["c"]
    assert reasons <= stored - seen["python"]
    assert counts["frames"] >= 2 * seen["python"] - FEW
    assert all(each.accounting.mismatch == 0 for each in profiles)


def test_threads_have_the_names_that_python_gives_them(recorded: Recording) -> None:
    """From 3.14 on, the interpreter tells the kernel when they start."""
    program = need_python((3, 14)).command("-c", NAMED_THREADS)
    with running(*program) as process:
        recorded.recorder.sampler.select([process.pid])
        profiles = recorded.until(
            lambda found: {"first", "größer"} <= threads_of(found, process.pid), "both names"
        )

    # Before the interpreter runs, the process is what starts it.
    starts = {Path(program[0]).name, "python3.14"}
    assert threads_of(profiles, process.pid) <= {"first", "größer", *starts}


def threads_of(profiles: list[Profile], pid: int) -> set[str]:
    labels = [dict(each) for profile in profiles for each in profile.label_sets]
    return {each.get("thread", "") for each in labels if each.get("pid") == str(pid)}


def split(profiles: list[Profile], pid: int) -> dict[str, int]:
    """Return the samples of the C thread, which must have no Python frames, and of Python's."""
    found = {"c": 0, "python": 0}
    for stack, samples in frames_of(profiles, pid):
        kinds = {frame.kind for frame in stack}
        if any(frame.function == "spins_in_c" for frame in stack):
            assert Kind.PYTHON not in kinds
            found["c"] += samples
        elif Kind.PYTHON in kinds:
            found["python"] += samples
    return found
