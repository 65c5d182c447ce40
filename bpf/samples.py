"""What crosses from the kernel: record layouts, stop reasons, and the RawSample they become.

This file is the only place that says how the records look. The numpy types below have C's own
alignment, and the compiler asserts their sizes against the structs in sampler.bpf.h; enumerators
and limits are handed to it as -D constants, so the two sides cannot drift apart.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]

MAX_KERNEL_WORDS = 127
"""kernel.perf_event_max_stack's default: bpf_get_stack refuses a larger buffer on some kernels."""

MAX_NATIVE_WORDS = 255
"""Words of the native walk of one user stack. Deeper ones keep the leaf part: `truncated`."""

MAX_USER_WORDS = 1279
"""Words of one user stack, with those of interpreter frames: 512 of these."""

MAX_LONG_WORDS = 255
"""A longer stack stands in a map that has room for few; if that is full, it keeps its leaf part."""

MAX_SHORT_WORDS = 63
"""A user stack of so many words stands with its count; longer ones, which are few, apart."""

TAG_SHIFT = 56
"""The top byte of a frame's first word is its tag; no user address reaches it."""


class Tag(IntEnum):
    """What a word of a user stack begins. The words of the native walk come first."""

    NATIVE = 0
    """Machine code: one word, the address to look up."""
    EVALUATION = 1
    """The same of an interpreter's loop; a second word is the frame's CFA."""
    PYTHON = 2
    """A frame of CPython: the address of its code object, and a second word: that object's checksum
    (32 bits) and the instruction, in bytes from the first one (32 bits)."""
    ENTRY = 3
    """The end of an evaluation; the address lies in the native frame of its loop."""
    REASON = 4
    """Why the interpreter's frames end here: a ChainEnd."""
    ALONE = 5
    """As PYTHON, and all of an evaluation."""
    DETACHED = 6
    """Before such frames: they are of the thread's first interpreter, which may have called another
    one. Frames of other versions say themselves where they belong."""


FRAME_WORDS: Mapping[int, int] = {Tag.EVALUATION: 2, Tag.PYTHON: 2, Tag.ALONE: 2}
"""How many words follow each tag, itself included, if not one."""


class PythonFrame(NamedTuple):
    """A frame of CPython, by what the kernel program knows of it."""

    code: int
    checksum: int
    instruction: int


RawFrame = int | PythonFrame
"""One user frame: a native frame's address, or an interpreter's frame."""


class StopReason(IntEnum):
    """Why a stack ends where it does; `label` is the name outside of this package.

    All but the two of the kernel are about the user's part.
    """

    ROOT = 0
    """The outermost frame: the compiler says that it returns to nobody (DWARF 5, 6.4.4), as it does
    of a program's and of a thread's start, and we of Go's."""
    KERNEL_THREAD = 1
    """There is no user stack: the thread belongs to the kernel."""
    NO_USER_REGISTERS = 2
    """The thread has no user registers (it serves io_uring inside the kernel)."""
    NO_PROCESS_YET = 3
    """What the process has mapped was not known yet: it is young, or was never sampled before."""
    NO_TABLE_YET = 4
    """The table of a file was not here yet."""
    NO_TABLE = 5
    """The file has no unwind information, or what cannot be read, and keeps no frame pointers."""
    NO_MAPPING = 6
    """There is no code known at this address."""
    HOLE = 7
    """The file's unwind information leaves this function out, and it keeps no frame pointer."""
    UNSUPPORTED_RULE = 8
    """The rule for this instruction is of a kind that the walk cannot follow."""
    REGISTER_LOST = 9
    """The rule needs a register that only the leaf frame has for certain."""
    BAD_FRAME_POINTER = 10
    """In code without tables: the saved frame pointer does not point further up the stack, or not
    to a return address."""
    BAD_STACK_POINTER = 11
    """By its rule the frame would not lie further up the stack, or would not return to code."""
    CHAIN_END = 12
    """The return address or the saved frame pointer is zero, which marks the outermost frame of
    code that keeps frame pointers (System V ABI, 3.4.1) but may stand there by chance."""
    UNREADABLE = 13
    """The stack's memory could not be read (not mapped, or paged out)."""
    TRUNCATED = 14
    """The stack is deeper than a record has room for."""
    COMPAT = 15
    """A 32-bit program; only its leaf is kept."""
    NO_ROOM = 16
    """The file's table is larger than the room that those in use leave."""
    KERNEL_TRUNCATED = 17
    """The kernel's part of the stack is deeper than a record has room for."""
    KERNEL_FAILED = 18
    """The kernel could not walk its own part of the stack, which is missing."""
    NO_PROGRAM = 19
    """The program has ended, or another is being loaded in its place: its memory is gone, and with
    it the user's part of the stack. What the kernel does there is all there is."""

    @property
    def label(self) -> str:
        return self.name.lower()


class Counter(IntEnum):
    """Counters of the BPF program, one set per CPU and map generation."""

    TICKS = 0
    IDLE = 1
    FILTERED = 2
    MAP_FULL = 3
    MAP_BUSY = 4
    COPIED = 5
    UNCOPIED = 6
    """Ticks beyond the budget for copies. They stand elsewhere as well."""
    OWN = 7
    """Ticks while the process that drains ran. They stand elsewhere as well."""


COUNT_KEY = np.dtype(
    [
        ("start_ns", np.uint64),
        ("user_stack", np.uint64),
        ("kernel_stack", np.uint64),
        ("cgroup_id", np.uint64),
        ("pid", np.uint32),
        ("tid", np.uint32),
        ("exec_id", np.uint64),
        ("comm", "S16"),
    ],
    align=True,
)
COUNT = np.dtype(
    [
        ("samples", np.uint64),
        ("first_ns", np.uint64),
        ("last_ns", np.uint64),
        ("leader_comm", "S16"),
        ("length", np.uint32),
        ("stop", np.uint32),
        ("words", np.uint64, (MAX_SHORT_WORDS,)),
    ],
    align=True,
)
COPY = np.dtype(
    [
        ("key", COUNT_KEY),
        ("first_ns", np.uint64),
        ("registers", np.uint64, (16,)),
        ("pc", np.uint64),
        ("start", np.uint64),
        ("leader_comm", "S16"),
        ("size", np.uint32),
        ("unreadable", np.uint32),
        ("length", np.uint32),
        ("stop", np.uint32),
        ("generation", np.uint8),
        ("pc_is_return_address", np.uint8),
        ("is_cut", np.uint8),
        ("unused", np.uint8, (5,)),
    ],
    align=True,
)
"""What stands before a copied stack."""


def stack_dtype(max_words: int) -> np.dtype[np.void]:
    """Return the layout of one entry of a stack map."""
    return np.dtype(
        [("length", np.uint32), ("stop", np.uint32), ("words", np.uint64, (max_words,))],
        align=True,
    )


USER_STACK = stack_dtype(MAX_USER_WORDS)
LONG_STACK = stack_dtype(MAX_LONG_WORDS)
KERNEL_STACK = stack_dtype(MAX_KERNEL_WORDS)


class ProcessGeneration(NamedTuple):
    """A process from one exec to the next, told from all others on this host since its boot.

    A pid is used again, and an exec replaces all memory of a process: whatever is known of memory
    is known of one generation. `start_ns` is the process's start on CLOCK_BOOTTIME; `exec_id`
    changes with every exec.
    """

    pid: int
    start_ns: int
    exec_id: int


class RawSample(NamedTuple):
    """A stack of a thread and how often it was seen in one drain.

    Words are leaf first. Callers' addresses are already one byte before their return address.
    `user` words are for `bpf.frames`, `kernel` words are addresses. `pid` is the process (the
    kernel's tgid), `tid` the thread. `start_ns` is the process's start on CLOCK_BOOTTIME,
    `first_ns` and `last_ns` are on CLOCK_MONOTONIC. `exec_id` changes with every exec.
    """

    pid: int
    tid: int
    start_ns: int
    exec_id: int
    cgroup_id: int
    comm: bytes
    leader_comm: bytes
    first_ns: int
    last_ns: int
    samples: int
    stop: str
    user: Words
    kernel: Words
    kernel_stop: str = ""
    """Why the kernel's part is not whole; empty if it is, or if there is none."""

    @property
    def generation(self) -> ProcessGeneration:
        return ProcessGeneration(self.pid, self.start_ns, self.exec_id)


class CopiedStack(NamedTuple):
    """One tick of a thread whose stack could not be walked yet, and all that a later walk needs.

    Attributes:
        walked: the sample as it was walked at the tick, with the reason why it is not whole.
        registers: by DWARF number, when the thread was last in user mode.
        is_return_address: the thread is in a system call, which returns to `pc`.
        start: the address of the first word of `memory`; it lies below the stack pointer.
        unreadable: which pages of `memory` could not be read: a bit for each, the lowest first.
        is_cut: the stack may go on beyond `memory`.
    """

    walked: RawSample
    registers: Words
    pc: int
    is_return_address: bool
    start: int
    memory: Words
    unreadable: int
    is_cut: bool


@dataclass(frozen=True, slots=True)
class Drain:
    """One map generation: every tick of it is in exactly one of these counts.

    `ticks = sum(samples) + len(copies) + idle + filtered + sum(lost)`. Of the samples, `uncopied`
    are beyond the budget for copies.
    """

    samples: list[RawSample]
    ticks: int
    idle: int
    filtered: int
    lost: dict[str, int]
    ended_ns: int = 0
    """When the maps were flipped (CLOCK_MONOTONIC): later ticks are in the next drain."""
    copies: Sequence[CopiedStack] = ()
    uncopied: int = 0
    counts_skipped: bool = True
    """Whether ticks that the kernel has skipped beside other BPF programs are in `lost`."""
