"""What is known of CPython's interpreters, against their processes.

The frames of a stopped process are read from its memory by nothing but the image of its file, as
the program in the kernel reads them.
"""

import contextlib
import os
import signal
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from symbolizer.runtimes.cpython import NONE, Image, Layout, Style
from tests.support.python_images import Process, image_of, known_image_of
from tests.support.pythons import VERSIONS, Interpreter, installed, need_build
from tests.support.unwind_tables import needs, read_unwind_table

PROGRAM = """\
import sys, threading

def λέξις():
    print(threading.get_native_id(), threading.get_ident(), flush=True)
    if sys.argv[1] == "waits":
        sys.stdin.read()
    while True:
        pass

class Tree:
    def größer(self, value):
        def nested(each):
            λέξις()
        return sorted([value], key=nested)

def begin():
    Tree().größer(1)

thread = threading.Thread(target=begin, daemon=True)
thread.start()
sys.stdin.read()
"""
# Qualified names up to 3.10 are not in code objects.
FUNCTIONS = [("λέξις", 3), ("Tree.größer.<locals>.nested", 12), ("Tree.größer", 11), ("begin", 16)]
BUILDS = [
    *(f"3.{minor}" for _, minor in VERSIONS),
    *(f"3.{minor}-{source}" for minor in (13, 14, 15) for source in ("sid", "sid-library")),
    *("3.10-standalone", "3.11-standalone", "3.14-standalone", "3.14-standalone-library"),
    "3.14-built",
]
SIGNAL_TIMEOUT_S = 20
MAX_FRAMES = 100


@contextlib.contextmanager
def stopped(interpreter: Interpreter, how: str, folder: Path) -> Iterator[Process]:
    """Run the program until its thread waits without the lock, or runs with it; then stop it."""
    script = folder / "program.py"
    script.write_text(PROGRAM)
    command = interpreter.command("-X", "utf8", script, how)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    child = subprocess.Popen(command, **pipes)
    try:
        assert child.stdout is not None
        tid, ident = map(int, child.stdout.readline().split())
        wait_for_state(f"{child.pid}/task/{tid}", "S" if how == "waits" else "R")
        os.kill(child.pid, signal.SIGSTOP)
        wait_for_state(f"{child.pid}/task/{tid}", "T")
        yield Process(child.pid, ident)
    finally:
        child.kill()
        child.communicate()


def wait_for_state(task: str, state: str) -> None:
    deadline = time.monotonic() + SIGNAL_TIMEOUT_S
    while state_of(task) != state:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def state_of(task: str) -> str:
    return Path(f"/proc/{task}/stat").read_text().rpartition(")")[2].split()[0]


class Frame(NamedTuple):
    """`instruction` is an offset in the code; `is_last` of its evaluation, if that can be told."""

    name: str
    file: str
    first_line: int
    instruction: int
    is_last: bool


def read_frames(process: Process, image: Image, layout: Layout, bias: int) -> list[Frame]:
    state = process.thread_state(image, bias) or process.detached_state(image, bias)
    assert process.word(state + layout.state_thread_id) == process.thread_id
    holder = state if layout.cframe_frame == NONE else process.word(state + layout.state_frame)
    offset = layout.state_frame if layout.cframe_frame == NONE else layout.cframe_frame
    frame = process.word(holder + offset)
    frames: list[Frame] = []
    while frame and len(frames) < MAX_FRAMES:
        entry = 0 if layout.frame_entry == NONE else process.word(frame + layout.frame_entry, "B")
        is_entry = layout.frame_entry != NONE and entry >= layout.entry_least
        if layout.style == Style.ENTRY_FRAME and is_entry:
            frames[-1] = frames[-1]._replace(is_last=True)
        else:
            frames.append(read_frame(process, image, layout, bias, frame, is_last=is_entry))
        frame = process.word(frame + layout.frame_previous)
    return frames


def read_frame(
    process: Process, image: Image, layout: Layout, bias: int, frame: int, *, is_last: bool
) -> Frame:
    code = process.word(frame + layout.frame_code) & ~layout.code_tag_bits
    content = process.read(code, layout.code_bytes)

    def pointer(offset: int) -> int:
        return int.from_bytes(content[offset : offset + 8], "little")

    assert pointer(layout.object_type) == image.code_type + bias
    lines = pointer(layout.code_lines)
    assert 0 < process.word(lines + layout.bytes_size) < 1000
    assert process.read(lines + layout.bytes_data, 1)
    if layout.code_instructions == NONE:
        instruction = process.word(frame + layout.frame_instruction, "i")
    else:
        instruction = process.word(frame + layout.frame_instruction)
        instruction -= find_bytecode(process, layout, code, frame)
    (first_line,) = struct.unpack_from("<i", content, layout.code_first_line)
    return Frame(
        read_string(process, layout, pointer(layout.code_name)),
        read_string(process, layout, pointer(layout.code_file)),
        first_line,
        instruction,
        is_last,
    )


def find_bytecode(process: Process, layout: Layout, code: int, frame: int) -> int:
    """Return where the first instruction is, in the copy that the frame's thread has."""
    copy = 0 if layout.frame_tlbc == NONE else process.word(frame + layout.frame_tlbc, "i")
    if copy == 0:
        return code + layout.code_instructions
    return process.word(process.word(code + layout.code_tlbc) + 8 * (1 + copy))


def read_string(process: Process, layout: Layout, address: int) -> str:
    bits = process.word(address + layout.str_state, "I") >> layout.str_kind_bit
    width, is_compact, is_ascii = bits & 7, bits >> 3 & 1, bits >> 4 & 1
    assert is_compact
    data = address + (layout.str_ascii if is_ascii else layout.str_compact)
    content = process.read(data, width * process.word(address + layout.str_length))
    return content.decode({1: "latin-1", 2: "utf-16-le", 4: "utf-32-le"}[width])


@pytest.mark.parametrize("how", ["waits", "runs"])
@pytest.mark.parametrize("build", BUILDS)
def test_frames_of_a_thread_are_read_by_the_image_of_its_interpreter(build, how, tmp_path):
    """Names, files, lines, evaluations: of a thread that has the lock, and of one that waits."""
    interpreter = need_build(build)
    image, layout = known_image_of(interpreter.runtime_file)

    with stopped(interpreter, how, tmp_path) as process:
        bias = process.bias(interpreter.runtime_file, image.code_shift)
        frames = read_frames(process, image, layout, bias)

    has_qualified = interpreter.version >= (3, 11)
    assert [(f.name, f.first_line) for f in frames[: len(FUNCTIONS)]] == [
        (name if has_qualified else name.rpartition(".")[2], line) for name, line in FUNCTIONS
    ]
    assert {Path(frame.file).name for frame in frames[: len(FUNCTIONS)]} == {"program.py"}
    assert all(-2 <= frame.instruction < 1000 for frame in frames)
    assert len(frames) < MAX_FRAMES
    if layout.style != Style.FRAME_PER_CALL:
        # sorted() is C, and calls the loop anew for its key.
        assert [frame.is_last for frame in frames[:3]] == [False, True, False]
        assert frames[-1].is_last


@pytest.mark.parametrize("build", BUILDS)
def test_an_image_has_the_version_of_its_interpreter(build):
    interpreter = need_build(build)
    image, _ = known_image_of(interpreter.runtime_file)

    version = image.version

    assert (version >> 24, version >> 16 & 255, version >> 8 & 255) == interpreter.version
    assert image.free_threaded == interpreter.is_free_threaded


@pytest.mark.parametrize("build", BUILDS)
def test_a_thread_that_waits_has_its_state_where_pygilstate_keeps_it(build, tmp_path):
    """What holds the state of the thread with the lock is null, or another's, without it."""
    interpreter = need_build(build)
    image, layout = known_image_of(interpreter.runtime_file)

    with stopped(interpreter, "waits", tmp_path) as process:
        bias = process.bias(interpreter.runtime_file, image.code_shift)
        attached = process.thread_state(image, bias)
        detached = process.detached_state(image, bias)
        state_of_thread = process.word((attached or detached) + layout.state_thread_id)

    assert state_of_thread == process.thread_id
    assert not attached
    assert detached


@needs("strip", "binutils")
@pytest.mark.parametrize("build", BUILDS)
def test_a_stripped_interpreter_has_the_same_image(build, tmp_path):
    """Parts of the loop are found without their names, except those that no jump leads to."""
    interpreter = need_build(build)
    stripped = tmp_path / "stripped"
    subprocess.run(["strip", "-o", stripped, interpreter.runtime_file], check=True)
    image, _ = known_image_of(interpreter.runtime_file)

    without_symbols, _ = known_image_of(stripped)

    reached = tuple(part for part in image.evaluation if part[1] - part[0] > 16)
    assert without_symbols.evaluation == reached
    assert without_symbols._replace(evaluation=()) == image._replace(evaluation=())


@pytest.mark.parametrize("build", BUILDS)
def test_an_image_is_what_its_unwind_table_has(build):
    interpreter = need_build(build)

    table = read_unwind_table(interpreter.runtime_file)

    assert table.image == image_of(interpreter.runtime_file)


def test_a_program_that_only_loads_the_interpreter_is_none():
    interpreter = next((each for each in installed() if each.libpython is not None), None)
    if interpreter is None:
        pytest.skip("no interpreter has its runtime in a library")

    assert image_of(interpreter.executable) is None
