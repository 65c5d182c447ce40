"""Python functions of real programs that make it hard: names, lines, and what they cost."""

import ctypes
import sys
import time
from collections import Counter
from collections.abc import Iterator
from functools import cache
from types import CodeType

import pytest

from bpf.interpreters import CodeContent
from bpf.samples import ProcessGeneration, PythonFrame
from profiler.agent.python_code import UNKNOWN, Interpreter, PythonCode
from profiler.agent.recorder import Recorder
from storage.profile import Profile
from symbolizer.location import Kind, NamedLocation
from symbolizer.runtimes.cpython import Image, Layout
from tests.support.python_images import known_image_of
from tests.support.python_recordings import recording
from tests.support.pythons import need_python
from tests.support.targets import running

GENERATED = """
import sys, time

clock = time.thread_time
while True:
    for source in sys.argv[1:]:
        names = {}
        exec(compile(source, "generated.py", "exec"), names)
        names.popitem()[1](clock, clock() + 0.004)
"""
LOOP = "    while clock() < end: pass"


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorder]:
    """A recorder that samples the processes it is told of: to start one takes seconds of CPU."""
    with recording(tmp_path_factory.mktemp("cache")) as recorded:
        yield recorded.recorder


def leaves_of(profile: Profile) -> Counter[tuple[str, int]]:
    """Return the samples of each innermost Python function of generated.py and its line."""
    found: Counter[tuple[str, int]] = Counter()
    rows = zip(profile.row_stacks.tolist(), profile.row_samples.tolist(), strict=True)
    for number, samples in rows:
        for location in reversed(profile.stack(number)):
            if isinstance(location, NamedLocation) and location.kind is Kind.PYTHON:
                if location.file == "generated.py":
                    found[location.function, location.line] += samples
                break
    return found


def record_leaves(recorder: Recorder, least: int) -> Counter[tuple[str, int]]:
    found: Counter[tuple[str, int]] = Counter()
    deadline = time.monotonic() + 90
    while found.total() < least and time.monotonic() < deadline:
        for _ in range(3):
            time.sleep(0.5)  # ticks are what is waited for
            recorder.step()
        found += leaves_of(recorder.close_window())
    return found


@pytest.mark.kernel
@pytest.mark.timeout(300)
@pytest.mark.parametrize("version", [(3, 8), (3, 11), (3, 12)], ids=str)
def test_functions_that_follow_each_other_in_the_same_memory_are_told_apart(
    recorder: Recorder, version: tuple[int, int]
):
    """The allocator hands out the same memory for each: the object, its name, its line table."""
    leaves = [("same", 2), ("same", 9), ("aaaaaaaa", 2), ("bbbbbbbb", 2)]
    sources = [f"def {name}(clock, end):\n" + "\n" * (line - 2) + LOOP for name, line in leaves]
    command = need_python(version).command("-c", GENERATED, *sources)
    recorder.close_window()
    with running(*command) as process:
        recorder.sampler.select([process.pid])
        found = record_leaves(recorder, 400)

    for leaf in leaves:
        assert found[leaf] > 0.15 * found.total(), found


@cache
def own_image() -> tuple[Image, Layout]:
    return known_image_of(need_python(sys.version_info[:2]).runtime_file)


def content_of(code: CodeType, generation: ProcessGeneration, number: int = 0) -> CodeContent:
    """Return what the program sends of a code object; `number` tells one from the others."""
    layout = own_image()[1]
    lines = ctypes.string_at(id(code.co_linetable), layout.bytes_data + len(code.co_linetable))
    return CodeContent(
        generation,
        cgroup_id=1,
        address=id(code) + number,
        checksum=number,
        interpreter=1,
        code=ctypes.string_at(id(code), layout.code_bytes),
        name=ctypes.string_at(id(code.co_qualname), layout.str_ascii + len(code.co_qualname)),
        file=ctypes.string_at(id(code.co_filename), layout.str_ascii + len(code.co_filename)),
        lines=lines[:4096],
    )


def python_code() -> PythonCode:
    image, layout = own_image()
    return PythonCode({1: Interpreter(image.version, layout)})


def code_of(lines: int, name: str = "long") -> CodeType:
    """Return the code object of a function of so many lines."""
    names: dict[str, object] = {}
    exec(f"def {name}():\n" + "    x = 1\n" * lines, names)
    code = names[name].__code__
    assert isinstance(code, CodeType)
    return code


def is_named(python: PythonCode, content: CodeContent) -> bool:
    frame = PythonFrame(content.address, content.checksum, 0)
    return python.locate(content.generation, frame) != UNKNOWN


@pytest.mark.parametrize("processes", [1, 10])
def test_what_is_kept_of_programs_that_make_ever_new_functions_is_bounded(
    monkeypatch: pytest.MonkeyPatch, processes: int
):
    """In all and of each process; what is used stays, as do the functions of others."""
    now_s = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    python, code = python_code(), code_of(1000)
    other = content_of(code_of(1), ProcessGeneration(1, 1, 0))
    python.take([other])
    for number in range(2000):
        now_s += 1.0
        assert is_named(python, other)
        generation = ProcessGeneration(2 + number % processes, 1, 0)
        distinct = code.replace(co_name=f"name_{number}", co_qualname=f"name_{number}")
        python.take([content_of(distinct, generation, number)])

    kept = python.status()["code_objects_kept"]
    assert 100 < kept < 1000
    assert is_named(python, other)


def test_many_processes_of_a_cgroup_cannot_keep_the_agent_busy(monkeypatch: pytest.MonkeyPatch):
    """Each has its own allowance, and all of a cgroup have one; other cgroups have theirs."""
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    python, code = python_code(), code_of(1)
    for pid in range(2, 12):
        generation = ProcessGeneration(pid, 1, 0)
        python.take(content_of(code, generation, number) for number in range(5000))

    read = python.status()["code_objects_kept"]
    assert 11_000 < read <= 12_000
    other = content_of(code, ProcessGeneration(1, 1, 0))._replace(cgroup_id=2)
    python.take([other])
    assert is_named(python, other)


def test_a_code_object_that_was_beyond_the_budget_is_named_when_it_comes_again(
    monkeypatch: pytest.MonkeyPatch,
):
    now_s = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    python, code = python_code(), code_of(1)
    generation = ProcessGeneration(2, 1, 0)
    contents = [content_of(code, generation, number) for number in range(5000)]
    python.take(contents)
    assert not is_named(python, contents[-1])

    now_s += 69.0
    python.take(contents)

    assert is_named(python, contents[-1])
    assert is_named(python, contents[0])
