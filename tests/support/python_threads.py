"""Programs of Python with threads that have names, and what a reader says of them."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.live import stat_fields
from tests.support.python_images import Process, known_image_of
from tests.support.pythons import Interpreter
from tests.support.targets import running

BEGIN = """
import ctypes, os, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
held = threading.Event()
def start(*names, target=held.wait, of=threading.Thread, **options):
    threads = [of(target=target, name=name, daemon=True, **options) for name in names]
    for thread in threads: thread.start()
    return threads
def tell(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())
def stay():
    sys.stdin.read()
    os._exit(0)
def spin():
    while not held.is_set(): sum(i & 3 for i in range(1000))
"""
"""What programs of tests begin with."""


@contextlib.contextmanager
def program(
    python: Interpreter, script: str, *before: str | Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a script, by way of the command `before` if there is one."""
    command = [*before, *python.command("-c", BEGIN + script)]
    with running(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield process


def question(python: Interpreter, pid: int) -> dict[str, Any]:
    """Return what a reader is asked for the names of a process's threads."""
    file = python.runtime_file
    image, _ = known_image_of(file)
    bias = Process(pid, 0).bias(file, image.code_shift)
    return {
        "pid": pid,
        "start_ticks": int(stat_fields(pid)[19]),
        "version": image.version,
        "runtime": image.runtime + bias,
    }


def tids_of(pid: int) -> set[int]:
    """Return the kernel's numbers of the threads of a process."""
    return {int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()}
