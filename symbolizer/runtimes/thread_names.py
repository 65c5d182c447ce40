"""Read how Python calls the threads of a process, from its memory.

To 3.13 only Python itself knows: module `threading` has them in `_active`, and each has its name in
`_name` and the kernel's number in `_native_id`, which is that of the process's own pid namespace. A
name counts if all that leads to it is what it should be, and if the number is that of a thread that
runs now. Later versions tell the kernel (prctl(2), PR_SET_NAME).
"""

import contextlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from symbolizer.files import ProcessFiles
from symbolizer.runtimes.layouts import DEBUG_OFFSETS_BYTES
from symbolizer.runtimes.object_layouts import ObjectLayout, object_layout
from symbolizer.runtimes.process_memory import (
    NotPermittedError,
    ProcessMemory,
    TooMuchError,
    UnreadableMemoryError,
)
from symbolizer.runtimes.python_objects import PythonObjects

MAX_THREADS = 4096
"""Of a process. One with more has no names."""
_MAX_INTERPRETERS = 16
_MAX_STATUS_BYTES = 64 << 10


class Outcome(StrEnum):
    """What came of looking for the names of a process's threads. The list is closed."""

    READ = "read"
    NO_MODULE = "no_module"
    """It has not imported `threading`, so it has no thread of Python's but the first."""
    NOT_PERMITTED = "not_permitted"
    UNKNOWN_VERSION = "unknown_version"
    """The layout of its objects is not known, or it is a free-threaded build."""
    UNREADABLE = "unreadable"
    """Something was not what it should be: it changes just now, or it is damaged."""
    TOO_LARGE = "too_large"


class Names(NamedTuple):
    """What came of it, and the names by the kernel's number of each thread."""

    outcome: Outcome
    names: Mapping[int, str]


class _Process(NamedTuple):
    """A process as /proc has it: a thread that runs, and its own numbers of all its threads.

    `own_pid` is its number for itself.
    """

    living: int
    own_pid: int
    threads: Mapping[int, int]


def read_thread_names(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """Answer a request: return how Python calls the threads of a process, None if it has ended.

    `pid`, `start_ticks` say which process it is, `version` (as PY_VERSION_HEX) and `runtime`, the
    address of `_PyRuntime`, which interpreter it runs. The answer has the `outcome`, and `names`:
    pairs of the kernel's number and a name. Without its first thread, which has no name of its own
    but MainThread.
    """
    pid, start_ticks = values["pid"], values["start_ticks"]
    with ProcessFiles(pid) as files:
        process = _read_process(pid, files)
        if process is None or _start_of(pid) != start_ticks:
            return None
        found = _read(process, values["version"], values["runtime"])
    if _start_of(pid) != start_ticks:
        return None
    return {"outcome": found.outcome, "names": sorted(found.names.items())}


def _read(process: _Process, version: int, runtime: int) -> Names:
    memory = ProcessMemory(process.living)
    try:
        layout = object_layout(version, memory.read([runtime], DEBUG_OFFSETS_BYTES)[0])
        if layout is None:
            return Names(Outcome.UNKNOWN_VERSION, {})
        found = _read_all(PythonObjects(memory, layout), layout, runtime)
    except NotPermittedError:
        return Names(Outcome.NOT_PERMITTED, {})
    except TooMuchError:
        return Names(Outcome.TOO_LARGE, {})
    except UnreadableMemoryError:
        return Names(Outcome.UNREADABLE, {})
    if isinstance(found, Outcome):
        return Names(found, {})
    return Names(Outcome.READ, _by_thread(found, process))


def _by_thread(found: Iterable[tuple[int, str]], process: _Process) -> dict[int, str]:
    """Return names by the kernel's numbers; a number that two threads claim is nobody's.

    A greenlet may have that of the thread that runs it.
    """
    claims = Counter(number for number, _ in found)
    return {
        process.threads[number]: name
        for number, name in found
        if claims[number] == 1 and number in process.threads and number != process.own_pid
    }


def _read_all(
    objects: PythonObjects, layout: ObjectLayout, runtime: int
) -> list[tuple[int, str]] | Outcome:
    """Return the threads of all interpreters, by number and name.

    Raises:
        UnreadableMemoryError: see its kinds.
    """
    threads: list[int] = []
    outcomes = []
    for interpreter in _interpreters(objects, layout, runtime):
        found = _threads_of(objects, layout, interpreter)
        outcomes.append(found if isinstance(found, Outcome) else Outcome.READ)
        threads += [] if isinstance(found, Outcome) else found
    if Outcome.READ not in outcomes:
        return outcomes[0] if outcomes else Outcome.UNREADABLE
    if len(threads) > MAX_THREADS:
        raise TooMuchError
    before = _look_up(objects, threads)
    names, numbers = objects.texts(before.names), objects.numbers(before.numbers)
    # What has not been replaced meanwhile was not freed, and is no other object by now.
    after = _look_up(objects, threads)
    return [
        (number, name)
        for number, name, *addresses in zip(numbers, names, *before, *after, strict=True)
        if number and name and addresses[:2] == addresses[2:]
    ]


class _Attributes(NamedTuple):
    """Addresses of what Thread objects have, in their order."""

    names: list[int]
    numbers: list[int]


def _look_up(objects: PythonObjects, threads: list[int]) -> _Attributes:
    attributes = objects.attributes(threads)
    return _Attributes(objects.find(attributes, b"_name"), objects.find(attributes, b"_native_id"))


def _interpreters(objects: PythonObjects, layout: ObjectLayout, runtime: int) -> list[int]:
    """Return the main interpreter and others; the list is one that may be made to have no end."""
    at = runtime + layout.interpreters
    head, main = objects.words([at, at + 8])
    chain: list[int] = []
    while head and head not in chain and len(chain) < _MAX_INTERPRETERS:
        chain.append(head)
        (head,) = objects.words([head + layout.next_interpreter])
    return [each for each in dict.fromkeys((main, *chain)) if each]


def _threads_of(
    objects: PythonObjects, layout: ObjectLayout, interpreter: int
) -> list[int] | Outcome:
    """Return the Thread objects of an interpreter."""
    modules = objects.tables(objects.words([interpreter + layout.modules]))
    if modules == [None]:
        return Outcome.UNREADABLE
    (module,) = objects.find(modules, b"threading")
    if not module:
        return Outcome.NO_MODULE
    names = objects.tables(objects.words([module + layout.module_dict]))
    (active,) = objects.tables(objects.find(names, b"_active"))
    if active is None:
        return Outcome.UNREADABLE
    return [each for each in active.values if each]


def _read_process(pid: int, files: ProcessFiles) -> _Process | None:
    """Return what /proc says; None if the process has ended."""
    fields = _fields_of(files.read("status", _MAX_STATUS_BYTES) or b"")
    with contextlib.suppress(KeyError, ValueError, IndexError, OSError):
        own_pid = int((fields.get(b"NStgid") or fields[b"Tgid"]).split()[-1])
        tids = [int(tid) for tid in os.listdir(f"/proc/{pid}/task")]  # noqa: PTH208 - may be many
        is_apart = len(fields.get(b"NSpid", b"").split()) > 1
        threads = _own_numbers(pid, tids) if is_apart else {tid: tid for tid in tids}
        return _Process(int(fields[b"Pid"]), own_pid, threads)
    return None


def _own_numbers(pid: int, tids: Iterable[int]) -> dict[int, int]:
    """Return threads by their numbers in the pid namespace of their process."""
    own = {}
    for tid in [*tids][:MAX_THREADS]:
        with contextlib.suppress(OSError, KeyError, ValueError, IndexError):
            fields = _fields_of(Path(f"/proc/{pid}/task/{tid}/status").read_bytes())
            own[int(fields[b"NSpid"].split()[-1])] = tid
    return own


def _fields_of(status: bytes) -> dict[bytes, bytes]:
    lines = (line.partition(b":") for line in status.splitlines())
    return {name: value for name, _, value in lines}


def _start_of(pid: int) -> int:
    """Return when a process started, in ticks; 0 if it has ended."""
    try:
        content = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return 0
    return int(content.rpartition(b")")[2].split()[19])
