"""What an interpreter's file says about it: where it runs bytecode, and where its frames are.

An image is found once for each file (cpython.py) and stored in the file of its unwind table. It has
all that is needed to read the frames of a process from its memory. Addresses are the file's own.
"""

import enum
import struct
from typing import NamedTuple

NONE = 0xFFFF
"""In a layout: this interpreter has no such field."""

MAX_OFFSET = 4096
MAX_CODE_BYTES = 256
MAX_RANGES = 16
MAX_IMAGE_BYTES = 1024


class Style(enum.IntEnum):
    """How a chain of frames shows where each evaluation, a call of the loop in C, ends."""

    FRAME_PER_CALL = 1
    """To 3.10: each evaluation has one frame."""
    ENTRY_FLAG = 2
    """3.11: the outermost frame of an evaluation is marked."""
    ENTRY_FRAME = 3
    """From 3.12 on: the outermost frame of an evaluation has one without code behind it."""


class Layout(NamedTuple):
    """Offsets in the interpreter's structures, in bytes.

    All fields fit into 16 bits; NONE if there is no such field. The order is that of the programs
    in the kernel.

    Attributes:
        style: a Style.
        state_thread_id: PyThreadState.thread_id, which is pthread_self().
        state_frame: of the current frame, or of the pointer to the cframe.
        cframe_frame: CFrame.current_frame (3.11, 3.12); NONE if `state_frame` is the frame's.
        cframe_previous: CFrame.previous (3.10 to 3.12).
        state_cframe: 3.10, whose cframe does not have the frame: the pointer to it in the state.
        frame_code: the code object; from 3.14 on with `code_tag_bits`.
        frame_previous: the caller's frame.
        frame_instruction: to 3.10, an int, f_lasti; later a pointer to an instruction.
        frame_entry: the byte that marks an entry (is_entry, owner).
        entry_least: an entry has at least this in that byte.
        code_tag_bits: mask of the bits of a code object's pointer in a frame that are not address.
        frame_tlbc: free-threaded from 3.14 on: which copy of the bytecode `frame_instruction` is
            in, 4 bytes.
        code_tlbc: and the pointer to the array of these copies.
        code_bytes: how much of a code object has all fields that are named here.
        code_instructions: where the first instruction is (3.11 on).
        object_type: ob_type of any object.
        code_name: co_qualname, or co_name to 3.10.
        code_file: co_filename.
        code_lines: co_linetable, or co_lnotab to 3.9.
        code_first_line: co_firstlineno, 4 bytes.
        str_length: of unicode objects: the number of characters.
        str_state: the word of bits that say what kind of string it is.
        str_ascii: where the characters of a compact ASCII string begin.
        str_compact: where those of other compact strings begin.
        bytes_size: of bytes objects: the size.
        bytes_data: where the bytes begin.
        str_kind_bit: the lowest of the 3 bits of `str_state` that are the width of a character; the
            next is `compact`, and then `ascii`. Free-threaded from 3.14 on: 8.
    """

    style: int
    state_thread_id: int
    state_frame: int
    cframe_frame: int
    cframe_previous: int
    state_cframe: int
    frame_code: int
    frame_previous: int
    frame_instruction: int
    frame_entry: int
    entry_least: int
    code_tag_bits: int
    frame_tlbc: int
    code_tlbc: int
    code_bytes: int
    code_instructions: int
    object_type: int
    code_name: int
    code_file: int
    code_lines: int
    code_first_line: int
    str_length: int
    str_state: int
    str_ascii: int
    str_compact: int
    bytes_size: int
    bytes_data: int
    str_kind_bit: int = 2

    @property
    def is_sound(self) -> bool:
        """Return whether reading by it touches only a bounded part of each object."""
        return (
            self.style in Style.__members__.values()
            and all(0 <= offset < MAX_OFFSET or offset == NONE for offset in self)
            and 0 < self.code_bytes <= MAX_CODE_BYTES
        )


class Refusal(enum.StrEnum):
    """Why the frames of an interpreter cannot be read."""

    NONE = ""
    UNKNOWN_VERSION = "unknown version"
    UNKNOWN_DEBUG_OFFSETS = "unknown debug offsets"
    UNKNOWN_BUILD = "unknown build options"
    NO_EVALUATION_LOOP = "no evaluation loop"
    NO_THREAD_STATE = "no thread state"
    UNSUPPORTED_LIBC = "unsupported libc"
    NO_CODE_TYPE = "no code type"


class StateKind(enum.IntEnum):
    """Where a thread has the pointer to its PyThreadState."""

    NONE = 0
    KEY = 1
    """pthread_getspecific() of the key whose int is at `state_address`; glibc has the value at
    fs:0x310 + 16 * key + 8, for keys below 32."""
    STATIC_TLS = 2
    """At the fs base + `state_offset`."""
    DYNAMIC_TLS = 3
    """`state_offset` into the TLS block of the module whose number is in the GOT slot at
    `state_address`: glibc has its address at *(fs:8) + 16 * number."""
    GOT_TLS = 4
    """At the fs base + the word in the GOT slot at `state_address` + `state_offset`."""
    HOLDER = 5
    """At `state_address` is that of the thread that holds the lock, which may be another one."""


class Image(NamedTuple):
    """An interpreter's file.

    Attributes:
        version: as PY_VERSION_HEX; 0 if not known.
        free_threaded: it was built without the global lock.
        layout: None if it is refused.
        refusal: why its frames cannot be read, empty if they can.
        evaluation: first addresses and ends of the code whose frames are evaluations, sorted: the
            parts of the loop, or what calls the functions that it is split into.
        code_type: PyCode_Type.
        state_kind: a StateKind, with what it says of `state_address` and `state_offset`.
        detached_kind: the same for where a thread keeps its state while it does not hold the lock:
            then it is not where the other fields say. This is the state of PyGILState. A thread may
            have others, one for each interpreter that it has run: to 3.11 this is the first, later
            the one that held the lock last.
        is_split: the loop is split into functions: in `evaluation` is what may be no evaluation.
        runtime: _PyRuntime.
        code_shift: what the addresses of the segment in which `evaluation` begins are higher than
            its file offsets. A mapping of that segment at `start` from `file_offset` on loads the
            file's address A at start - file_offset - code_shift + A.
    """

    version: int
    free_threaded: bool
    layout: Layout | None
    refusal: Refusal
    evaluation: tuple[tuple[int, int], ...] = ()
    code_type: int = 0
    state_kind: StateKind = StateKind.NONE
    state_address: int = 0
    state_offset: int = 0
    code_shift: int = 0
    detached_kind: StateKind = StateKind.NONE
    detached_address: int = 0
    detached_offset: int = 0
    is_split: bool = False
    runtime: int = 0

    def pack(self) -> bytes:
        """Return it as bytes, at most MAX_IMAGE_BYTES."""
        head = _HEAD.pack(
            self.version,
            self.free_threaded,
            _REFUSALS.index(self.refusal),
            self.state_kind,
            self.detached_kind,
            self.layout is not None,
            self.is_split,
            len(self.evaluation),
            self.code_type,
            self.state_address,
            self.state_offset,
            self.code_shift,
            self.detached_address,
            self.detached_offset,
            self.runtime,
        )
        ranges = b"".join(_RANGE.pack(*each) for each in self.evaluation)
        return head + ranges + (b"" if self.layout is None else _LAYOUT.pack(*self.layout))

    @classmethod
    def unpack(cls, content: bytes) -> "Image | None":
        """Return the image of packed bytes; None if they are damaged."""
        try:
            return cls._unpack(content)
        except (struct.error, ValueError, IndexError):
            return None

    @classmethod
    def _unpack(cls, content: bytes) -> "Image":
        head = _HEAD.unpack_from(content)
        version, free_threaded, refusal, kind, detached_kind, *flags, ranges = head[:8]
        has_layout, is_split = flags
        layout_at = _HEAD.size + ranges * _RANGE.size
        if ranges > MAX_RANGES or len(content) != layout_at + has_layout * _LAYOUT.size:
            raise ValueError("wrong size")
        code_type, state_address, state_offset, code_shift, at, offset, runtime = head[8:]
        layout = Layout(*_LAYOUT.unpack_from(content, layout_at)) if has_layout else None
        if layout is not None and not layout.is_sound:
            raise ValueError("wild offsets")
        return cls(
            version,
            bool(free_threaded),
            layout,
            _REFUSALS[refusal],
            tuple(_RANGE.iter_unpack(content[_HEAD.size : layout_at])),
            code_type,
            StateKind(kind),
            state_address,
            state_offset,
            code_shift,
            StateKind(detached_kind),
            at,
            offset,
            is_split,
            runtime,
        )


_REFUSALS = list(Refusal)
_HEAD = struct.Struct("<I?BBB??BQQqqQqQ")
_RANGE = struct.Struct("<QQ")
_LAYOUT = struct.Struct(f"<{len(Layout._fields)}H")
