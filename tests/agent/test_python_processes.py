"""Python functions of processes that fork, exec, hide, end, and whose files and code change."""

import contextlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.profile import Profile
from symbolizer.location import Kind
from tests.support.python_recordings import Recording, frames_of, recording, stacks_of
from tests.support.python_stacks import PythonStack, busy, judge, tree_of
from tests.support.pythons import Interpreter, installed, interpreters, need_build, need_python
from tests.support.targets import running

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(600)]

FEW = 40
RIGHT_PERCENT = 99.5
EVALUATION = "_PyEval_EvalFrameDefault"

FORKING = """
import os, sys
def make(name, line):
    text = "\\n" * line + f"def {name}(count):\\n    while count: count -= 1\\n"
    made = {}
    exec(compile(text, f"/srv/{name}.py", "exec"), made)
    return made[name]
make("warm_up", 5)
parent = os.getpid()
for name, line in (("red__", 100), ("green", 200), ("blue_", 300)):
    if os.fork() == 0:
        function = make(name, line)
        os.write(1, f"{os.getpid()} {id(function.__code__)} {name} {line}\\n".encode())
        while os.getppid() == parent:
            function(10_000)
        os._exit(0)
sys.stdin.read()
"""

ONE_FUNCTION = """
import os, sys
def {name}(count):
    while count: count -= 1
os.write(1, b"{name}\\n")
while {goes_on}:
    {name}(10_000)
{then}
"""

RENAMING = """
import os
number = 0
os.write(1, b"ready\\n")
while True:
    number = number % 400 + 1
    text = "\\n" * number + f"def made_{number:03}(count):\\n    while count: count -= 1\\n"
    made = {}
    exec(compile(text, f"/srv/{number:03}.py", "exec"), made)
    made.popitem()[1](8_000)
"""
SHORT = "import time\nwhile time.process_time() < 0.1: sum(i & 3 for i in range(1000))\n"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recording]:
    with recording(tmp_path_factory.mktemp("cache")) as recorded:
        yield recorded


def leaves(profiles: list[Profile], pid: int) -> set[tuple[str, str, int]]:
    """Return where a process was, as function, file and line."""
    return {(stack or (None,))[-1] for stack in stacks_of(profiles, pid)}


def count(profiles: list[Profile], pid: int) -> int:
    return stacks_of(profiles, pid).total()


def of_each_style() -> list[Interpreter]:
    return [need_python(version) for version in ((3, 10), (3, 11), (3, 13))]


@pytest.mark.parametrize("build", ["3.10", "3.11", "3.13", "3.14-built"])
def test_forked_workers_have_their_own_functions_at_the_same_addresses(
    recorded: Recording, build: str
) -> None:
    command = need_build(build).command("-c", FORKING)
    with running(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        told = [process.stdout.readline().split() for _ in range(3)]
        pids = {int(pid): (name.decode(), int(line)) for pid, _, name, line in told}
        recorded.settle(*pids)
        profiles = recorded.until(
            lambda found: all(count(found, pid) >= FEW for pid in pids), "samples"
        )

    assert len({address for _, address, *_ in told}) == 1
    for pid, (name, line) in pids.items():
        stacks = [stack for stack in stacks_of(profiles, pid) if len(stack) > 1]
        assert {stack[1][:2] for stack in stacks} == {(name, f"/srv/{name}.py")}
        assert {stack[1].line for stack in stacks} <= {line + 1, line + 2}


def test_a_process_has_the_functions_of_what_it_has_become(
    recorded: Recording, tmp_path: Path
) -> None:
    """Another script in the same interpreter, then another version: pid and start stay."""
    first, *others = [each for each in installed() if each.version[:2] >= (3, 8)]
    programs = [(first, "before_"), (first, "between"), *((each, "after__") for each in others)]
    scripts = [tmp_path / f"{number}.py" for number in range(len(programs) + 1)]
    then = ""
    for (python, name), script in reversed([*zip(programs, scripts, strict=False)]):
        text = ONE_FUNCTION.format(name=name, goes_on="not select()", then=then)
        helper = "import select as s\nselect = lambda: s.select([0], [], [], 0)[0]\n"
        script.write_text(helper + text)
        command = [str(python.executable), str(script)]
        then = f"os.read(0, 1); os.execv({command[0]!r}, {command!r})"
    with running(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        for (_, name), script in zip(programs, scripts, strict=False):
            assert process.stdout.readline().decode() == f"{name}\n"
            recorded.settle(process.pid)
            profiles = recorded.until(lambda found: count(found, process.pid) >= FEW, "samples")
            seen = stacks_of(profiles, process.pid)

            functions = {frame[:2] for stack in seen for frame in stack}
            assert (name, str(script)) in functions
            assert {file for _, file in functions} == {str(script)}
            process.stdin.write(b"x")
            process.stdin.flush()


def test_a_process_in_another_mount_and_pid_namespace_has_its_functions(
    recorded: Recording, tmp_path: Path
) -> None:
    """Its interpreter and its script are where nobody else can open them.

    The file has the content of another one that is known already, as in containers of one image.
    """
    python = need_python((3, 11))
    script = tmp_path / "hidden.py"
    script.write_text(ONE_FUNCTION.format(name="hidden", goes_on="True", then=""))
    folder = tmp_path / "mounted"
    folder.mkdir()
    commands = (
        f"mount -t tmpfs none {folder} && cp {python.executable} {folder}/python && "
        f"cp {script} {folder} && exec {folder}/python {folder}/hidden.py"
    )
    unshare = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
    with busy(python, "split") as known:
        recorded.settle(known.pid)
    with running(*unshare, "sh", "-c", commands, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"hidden\n"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        pid = int(children.read_text())
        assert not any(folder.iterdir())
        recorded.settle(pid)
        profiles = recorded.until(lambda found: count(found, pid) >= FEW, "samples")
        os.kill(pid, 9)

    stacks = stacks_of(profiles, pid)
    assert all(stack[0][:2] == ("<module>", f"{folder}/hidden.py") for stack in stacks)
    assert {stack[1].function for stack in stacks if len(stack) > 1} == {"hidden"}


@pytest.mark.parametrize("has_library", [False, True])
def test_scripts_of_a_tenth_of_a_second_have_their_functions(
    has_library: bool, recorded: Recording, tmp_path: Path
) -> None:
    """The program is known by then, as those of cron jobs and hooks are."""
    script = tmp_path / "short.py"
    script.write_text(SHORT)
    python = next((p for p in interpreters() if bool(p.libpython) == has_library), None)
    if python is None:
        pytest.skip(f"no interpreter {'with' if has_library else 'without'} a library")
    command = shlex.join(python.command(script))
    loop = f"while :; do {command}; done"
    with busy(python, "split") as known:
        recorded.settle(known.pid)
    with running("sh", "-c", loop) as shell:
        recorded.recorder.sampler.select([shell.pid])
        profiles = recorded.until(lambda found: len(evaluating(found)) >= 300, "samples")

    stacks = evaluating(profiles)
    with_functions = sum(stacks)
    assert with_functions >= 0.9 * len(stacks)


def test_scripts_become_known_though_none_of_them_runs_for_long(tmp_path: Path) -> None:
    """Each is gone before it is taken in; the interpreter is in a library."""
    script = tmp_path / "shorter.py"
    script.write_text(SHORT.replace("0.1", "0.03"))
    python = next((p for p in interpreters() if p.libpython), None)
    if python is None:
        pytest.skip("no interpreter with a library")
    loop = f"while :; do {shlex.join(python.command(script))}; done"
    with recording(tmp_path / "cache") as recorded, running("sh", "-c", loop) as shell:
        recorded.recorder.sampler.select([shell.pid])

        def is_known(profiles: list[Profile]) -> bool:
            stacks = evaluating(profiles[-3:])
            return len(stacks) >= 20 and sum(stacks) >= 0.8 * len(stacks)

        recorded.until(is_known, "functions of scripts of 30 ms")


def evaluating(profiles: list[Profile]) -> list[bool]:
    """Return of each sample that runs Python code whether its functions are known."""
    found = []
    for stack, samples in frames_of(profiles):
        functions = [frame.function for frame in stack if frame.kind is Kind.PYTHON]
        if functions or any(frame.function.startswith(EVALUATION) for frame in stack):
            found += samples * [bool(functions) and "[python]" not in functions]
    return found


def test_an_interpreter_that_is_replaced_on_disk_keeps_its_functions(
    recorded: Recording, tmp_path: Path
) -> None:
    """As an upgrade does it: another version takes the file's place."""
    new, old = need_python((3, 13)), need_python((3, 11))
    folder = tmp_path / "installed"
    for name in ("bin", "lib"):
        (folder / name).mkdir(parents=True)
    copy = shutil.copy2(old.executable, folder / "bin" / "python3.11")
    replaced = [Path(copy)]
    if old.libpython:
        replaced.append(Path(shutil.copy2(old.libpython, folder / "lib" / old.libpython.name)))
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(folder / "lib"),
        "PYTHONHOME": str(old.executable.parents[1]),
    }
    tree = recorded.meanwhile(lambda: tree_of(old, "methods"))
    script = Path(__file__).parents[1] / "targets" / "python_calls.py"
    with running(copy, script, "methods", stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout.readline() == b"ready\n"
        for path in replaced:
            other = new.libpython or new.executable
            unfinished = path.with_suffix(".new")
            shutil.copy2(other, unfinished)
            unfinished.rename(path)
        recorded.settle(process.pid)
        profiles = recorded.until(lambda found: count(found, process.pid) >= FEW, "samples")

    verdict = judge(tree, stacks_of(profiles, process.pid).items())
    assert verdict.percent >= RIGHT_PERCENT, verdict


def test_functions_that_take_the_place_of_others_are_not_taken_for_them(
    recorded: Recording,
) -> None:
    """Each is freed before the next one is made, mostly at the same address."""
    with contextlib.ExitStack() as started:
        pids = []
        for python in of_each_style():
            command = python.command("-c", RENAMING)
            process = started.enter_context(running(*command, stdout=subprocess.PIPE))
            assert process.stdout.readline() == b"ready\n"
            pids.append(process.pid)
        recorded.settle(*pids)
        profiles = recorded.until(
            lambda found: all(len(names(found, pid)) >= 30 for pid in pids), "functions"
        )

    for pid in pids:
        for stack in stacks_of(profiles, pid):
            assert not fault_of(stack), stack


def names(profiles: list[Profile], pid: int) -> set[str]:
    stacks = stacks_of(profiles, pid)
    return {stack[1].function for stack in stacks if len(stack) == 2}


def fault_of(stack: PythonStack) -> str:
    """Return what cannot be in a stack of the program that makes ever new functions."""
    for frame in stack[1:]:
        number = int(frame.function.removeprefix("made_") if frame.function != "<module>" else 0)
        if number and frame.file != f"/srv/{number:03}.py":
            return "not the function of this file"
        if number and frame.line not in {number + 1, number + 2}:
            return "not a line of this function"
    return ""
