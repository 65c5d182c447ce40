"""Interpreters in the kernel: what its programs need to read the frames of an interpreter's stack.

The owner says where an interpreter's structures have what, and which processes have it, and takes
the content of code objects, which the programs send when they first see one. All of it is plain
integers and bytes: what they mean is not known here. Structures are those of chain.bpf.h.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from bpf import syscalls
from bpf.samples import ProcessGeneration, PythonFrame

ABSENT = 0xFFFF
"""In place of an offset: this version has no such member."""

LAYOUT_FIELDS = (
    *("style", "state_thread_id", "state_frame", "cframe_frame", "cframe_previous"),
    *("frame_bytes", "frame_code", "frame_previous", "frame_instruction", "frame_entry"),
    *("entry_least", "frame_tlbc", "code_tlbc", "code_bytes", "code_instructions", "object_type"),
    *("code_name", "code_file", "code_lines", "code_first_line", "str_length", "str_state"),
    *("str_kind_bit", "str_ascii", "str_compact", "bytes_size", "bytes_data"),
)
"""Of struct layout, in its order; `frame_bytes` is at most 120 and `code_bytes` 248."""


class Style(IntEnum):
    """How frames belong to evaluations, each of which is a call of the interpreter's loop."""

    FRAME_PER_CALL = 1
    ENTRY_FLAG = 2
    """The outermost frame of an evaluation says so."""
    ENTRY_FRAME = 3
    """Behind it is one that lies on the thread's stack."""


class StateKind(IntEnum):
    """Where a thread has the pointer to its state."""

    NONE = 0
    KEY = 1
    """Under a pthread key; at `state_address` is its number."""
    STATIC_TLS = 2
    """At `state_offset` from the thread's base."""
    DYNAMIC_TLS = 3
    """In the block of a module, whose number is at `state_address`."""
    GOT_TLS = 4
    """At the offset from the thread's base that is at `state_address`, and `state_offset`."""
    HOLDER = 5
    """At `state_address`, if the thread that is meant there is this one."""


class ChainEnd(IntEnum):
    """Why a chain of frames is not longer; the kernel says all of these but the first and last."""

    WHOLE = 0
    NO_PYTHON = 1
    """The thread runs none, or has not begun to."""
    NO_STATE = 2
    """It was not found where the thread should have its state."""
    OTHER_THREAD = 3
    """What was found there is not this thread's."""
    UNREADABLE = 4
    """A structure is not in memory, or is none."""
    NO_CODE = 5
    """A frame is not of a code object."""
    TRUNCATED = 6
    """There is no room for more frames."""
    OTHER_STACK = 7
    """Further frames of the thread are not on this chain: they are of another interpreter, which
    called this one or which it called, or of a greenlet."""
    UNKNOWN_INTERPRETER = 8
    """The interpreter was not known yet: its process or its file is new."""

    @property
    def mark(self) -> PythonFrame:
        """Return what stands in a stack in place of the frames that are missing there."""
        return PythonFrame(0, self.value, 0)

    @property
    def label(self) -> str:
        return self.name.lower()


_PLACE = np.dtype([("address", "u8"), ("offset", "i4"), ("kind", "u4")])
INTERPRETER = np.dtype(
    [
        *(("state", _PLACE), ("detached", _PLACE), ("code_type", "u8")),
        *((name, "u2") for name in LAYOUT_FIELDS),
        ("unused", "u2", (5,)),
    ]
)
RUNTIME = np.dtype([("bias", "u8"), ("interpreter", "u4"), ("unused", "u4")])
PROGRAM_KEY = np.dtype([("inode", "u8"), ("device", "u4"), ("unused", "u4")])
PROGRAM = np.dtype(
    [
        *(("start_code", "u8"), ("debug", "u8"), ("dynamic", "u8")),
        *(("interpreter", "u4"), ("unused", "u4")),
    ]
)
CODE_RECORD = np.dtype(
    [
        *(("start_ns", "u8"), ("exec_id", "u8"), ("cgroup_id", "u8")),
        *(("code", "u8"), ("pid", "u4"), ("interpreter", "u4")),
        *(("checksum", "u4"), ("sizes", "u2", (4,))),
        ("unused2", "u4"),
    ]
)
"""What stands before the content of a code object."""

INTERPRETERS_CAPACITY = 1024
PROGRAMS_CAPACITY = 1024
SEEN_PLACES = 1 << 16
SEEN_SHIFT = 36
"""After so long (2^36 ns, 69 s) a code object is sent again."""
NEW_CODES = 64
"""Code objects that are new, of one tick."""
CODES_PER_PROGRAM = 16
CHAIN_FRAMES, CHAIN_PROGRAMS = 74, 7
"""Frames that one program reads, and how many of these may follow each other."""
CODE_CONTENT, CODE_PIECE, CODE_STRING = 8192, 4096, 512
CODE_RING_BYTES = 1 << 20

MAPS = ("interpreters", "known_programs", "seen_codes", "codes", "code_records")


class Runtime(NamedTuple):
    """The interpreter of a process, by its number, and what its addresses are higher as linked."""

    interpreter: int
    bias: int


NO_RUNTIME = Runtime(0, 0)


class Program(NamedTuple):
    """A program's interpreter, by its number; all addresses are as linked.

    Attributes:
        start_code: what the kernel says of a process whose program is loaded where it is linked
            (`mm->start_code`).
        debug: where the program has the address of the dynamic loader's list of files, in which the
            library with the interpreter is; 0 if the program is the interpreter.
        dynamic: this library's dynamic section.
    """

    interpreter: int
    start_code: int
    debug: int
    dynamic: int


NO_PROGRAM = Program(0, 0, 0, 0)


class StatePlace(NamedTuple):
    """Where a thread has the pointer to its state: a StateKind, and what that needs."""

    kind: int
    address: int
    offset: int


class CodeContent(NamedTuple):
    """A code object as it was in memory when it was first seen.

    Attributes:
        interpreter: the number of the interpreter that it was read as one of.
        code, name, file, lines: the object, and the strings and bytes that it refers to, from their
            headers on. They are empty if they could not be read, and may be cut.
    """

    generation: ProcessGeneration
    cgroup_id: int
    address: int
    checksum: int
    interpreter: int
    code: bytes
    name: bytes
    file: bytes
    lines: bytes


def constants() -> dict[str, int]:
    """Return what the programs are compiled with."""
    return {
        "INTERPRETER_SIZE": INTERPRETER.itemsize,
        "PROGRAM_SIZE": PROGRAM.itemsize,
        "CODE_RECORD_SIZE": CODE_RECORD.itemsize,
        "ABSENT": ABSENT,
        "INTERPRETERS_CAPACITY": INTERPRETERS_CAPACITY,
        "PROGRAMS_CAPACITY": PROGRAMS_CAPACITY,
        "SEEN_PLACES": SEEN_PLACES,
        "SEEN_SHIFT": SEEN_SHIFT,
        "NEW_CODES": NEW_CODES,
        "CODES_PER_PROGRAM": CODES_PER_PROGRAM,
        "CHAIN_FRAMES": CHAIN_FRAMES,
        "CHAIN_PROGRAMS": CHAIN_PROGRAMS,
        "CODE_CONTENT": CODE_CONTENT,
        "CODE_PIECE": CODE_PIECE,
        "CODE_STRING": CODE_STRING,
        **{f"STYLE_{style.name}": style.value for style in Style},
        **{f"STATE_{kind.name}": kind.value for kind in StateKind},
        **{f"CHAIN_{end.name}": end.value for end in ChainEnd},
    }


def read_code(record: bytes) -> CodeContent:
    """Return the code object of a record of the ring."""
    head = np.frombuffer(record, CODE_RECORD, 1)[0]
    start_ns, exec_id, cgroup, code, pid, interpreter, checksum, sizes, _ = head.tolist()
    pieces, at = [], CODE_RECORD.itemsize
    for size in sizes:
        pieces.append(record[at : at + size])
        at += size
    generation = ProcessGeneration(pid, start_ns, exec_id)
    return CodeContent(generation, cgroup, code, checksum, interpreter, *pieces)


class Interpreters:
    """The interpreters that the kernel knows. The descriptor stays the caller's."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def put(
        self,
        number: int,
        layout: Mapping[str, int],
        state: StatePlace,
        detached: StatePlace,
        code_type: int,
    ) -> None:
        """Take in an interpreter, by a number from 1 to INTERPRETERS_CAPACITY - 1.

        `layout` has all of LAYOUT_FIELDS; addresses are as linked.
        """
        value = np.zeros(1, INTERPRETER)
        for name in LAYOUT_FIELDS:
            value[name] = layout[name]
        for name, place in (("state", state), ("detached", detached)):
            value[name] = (place.address, place.offset, place.kind)
        value["code_type"] = code_type
        syscalls.update(self._fd, number, value.tobytes())


class KnownPrograms:
    """Programs by their files, for processes that are not known yet. The descriptor is borrowed.

    The kernel forgets those that were unused for longest when there are too many.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._known: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        """Those that were put last: they are surely there."""

    def put(self, device: int, inode: int, program: Program) -> None:
        """Say which interpreter a program has; NO_PROGRAM for none.

        The file is known by its inode and device, as the kernel has it (MKDEV: major << 20 |
        minor).
        """
        fields = (program.start_code, program.debug, program.dynamic, program.interpreter, 0)
        value = np.array([fields], PROGRAM).tobytes()
        key = (inode, device)
        if self._known.get(key) == value:
            return
        self._write(key, value)
        self._known[key] = value
        self._known.move_to_end(key)
        while len(self._known) > PROGRAMS_CAPACITY // 2:
            self._known.popitem(last=False)

    def _write(self, key: tuple[int, int], value: bytes) -> None:
        keys = np.array([(*key, 0)], PROGRAM_KEY)
        syscalls.update_batch(self._fd, keys, np.frombuffer(value, PROGRAM))


def runtime_words(runtime: Runtime) -> Sequence[int]:
    """Return a runtime as the words that it is in memory."""
    return (runtime.bias % (1 << 64), runtime.interpreter)
