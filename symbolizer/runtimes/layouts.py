"""The layouts of CPython's structures, by version.

To 3.12 they are from a table, made with each version's headers. From 3.13 on the file has most of
the offsets itself, in `_Py_DebugOffsets` at the start of .PyRuntime (Include/internal/
pycore_debug_offsets.h; in 3.13 pycore_runtime.h), so that a build with another layout needs no
change here. What stands where in that structure differs by minor version, and in betas and release
candidates; within final releases of a minor version it stays. tests/symbolizer/runtimes compiles
programs that say the same of the headers that are there.

Debug offsets do not say, and these are known by the minor version:

- where evaluations end: `_PyInterpreterFrame.owner` is FRAME_OWNED_BY_CSTACK, 3, in 3.13, and
  FRAME_OWNED_BY_INTERPRETER, 3, or FRAME_OWNED_BY_CSTACK, 4, later (pycore_frame.h,
  pycore_interpframe_structs.h);
- the tags of references in frames, from 3.14 on (pycore_stackref.h, Py_TAG_BITS);
- sizeof(PyCompactUnicodeObject), which has two words more than PyASCIIObject (cpython/
  unicodeobject.h), and where the bits of a string's state begin: in free-threaded builds from 3.14
  on, `interned` is a byte of its own;
- that from 3.13 on the state points to the frame itself (cpython/pystate.h).
"""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from symbolizer.runtimes.image import NONE, Layout, Refusal, Style

FIRST_WITH_DEBUG_OFFSETS = 13
DEBUG_OFFSETS_COOKIE = b"xdebugpy"
DEBUG_OFFSETS_BYTES = 1024
"""More than what is used of `_Py_DebugOffsets` in any version; _PyRuntime has 280 KB."""

_TO_3_10 = Layout(
    style=Style.FRAME_PER_CALL,
    state_thread_id=176,
    state_frame=24,
    cframe_frame=NONE,
    cframe_previous=NONE,
    state_cframe=NONE,
    frame_code=32,
    frame_previous=24,
    frame_instruction=104,
    frame_entry=NONE,
    entry_least=1,
    code_tag_bits=0,
    frame_tlbc=NONE,
    code_tlbc=NONE,
    code_bytes=128,
    code_instructions=NONE,
    object_type=8,
    code_name=112,
    code_file=104,
    code_lines=120,
    code_first_line=40,
    str_length=16,
    str_state=32,
    str_ascii=48,
    str_compact=72,
    bytes_size=16,
    bytes_data=32,
)
_3_11 = _TO_3_10._replace(
    style=Style.ENTRY_FLAG,
    state_thread_id=152,
    state_frame=56,
    cframe_frame=8,
    cframe_previous=16,
    frame_previous=48,
    frame_instruction=56,
    frame_entry=68,
    code_bytes=144,
    code_instructions=184,
    code_name=128,
    code_file=112,
    code_lines=136,
    code_first_line=72,
)
_3_12 = _3_11._replace(
    style=Style.ENTRY_FRAME,
    state_thread_id=136,
    cframe_frame=0,
    cframe_previous=8,
    frame_code=0,
    frame_previous=8,
    frame_entry=70,
    entry_least=3,
    code_instructions=192,
    code_first_line=68,
    str_ascii=40,
    str_compact=56,
)
LAYOUTS: Mapping[int, Layout] = MappingProxyType(
    {
        8: _TO_3_10,
        9: _TO_3_10,
        10: _TO_3_10._replace(state_cframe=48, cframe_previous=8, frame_instruction=96),
        11: _3_11,
        12: _3_12,
    }
)
"""By minor version; those of all releases of a version are alike."""

KEYS: Mapping[int, int] = MappingProxyType({8: 1392, 9: 584, 10: 584, 11: 592})
"""By minor version: _PyRuntimeState.gilstate.autoTSSkey, a Py_tss_t."""
HOLDERS: Mapping[int, int] = MappingProxyType({8: 1368, 9: 568, 10: 568, 11: 576})
"""By minor version: _PyRuntimeState.gilstate.tstate_current, of the thread that holds the lock."""

DEBUG_WORDS: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {
        "version": (1, 1, 1),
        "free_threaded": (2, 2, 2),
        "thread_state.current_frame": (23, 26, 26),
        "thread_state.thread_id": (24, 27, 30),
        "interpreter_frame.previous": (29, 32, 40),
        "interpreter_frame.executable": (30, 33, 41),
        "interpreter_frame.instr_ptr": (31, 34, 42),
        "interpreter_frame.owner": (33, 36, 44),
        "interpreter_frame.tlbc_index": (NONE, 38, 46),
        "code_object.filename": (35, 40, 48),
        "code_object.qualname": (37, 42, 50),
        "code_object.linetable": (38, 43, 51),
        "code_object.firstlineno": (39, 44, 52),
        "code_object.co_code_adaptive": (43, 48, 56),
        "code_object.co_tlbc": (NONE, 49, 57),
        "pyobject.size": (44, 50, 58),
        "pyobject.ob_type": (45, 51, 59),
        "bytes_object.ob_size": (65, 75, 87),
        "bytes_object.ob_sval": (66, 76, 88),
        "unicode_object.state": (68, 78, 90),
        "unicode_object.length": (69, 79, 91),
        "unicode_object.asciiobject_size": (70, 80, 92),
    }
)
"""Which word of `_Py_DebugOffsets` is which offset, in 3.13, 3.14 and 3.15."""
_COLUMNS = 3
_FIRST_WITH_TAGS = 14


def is_final(version: int) -> bool:
    """Return whether a PY_VERSION_HEX is that of a final release, of Python 3."""
    return version >> 24 == 3 and version & 0xFF == 0xF0


def minor_of(version: int) -> int:
    return version >> 16 & 0xFF


def read_debug_offsets(content: bytes, version: int) -> tuple[bool, Layout] | Refusal:
    """Return whether a build is free-threaded, and its layout, from the start of .PyRuntime.

    `version` is that of Py_Version, which has to be the same.
    """
    column = minor_of(version) - FIRST_WITH_DEBUG_OFFSETS
    if not is_final(version) or not 0 <= column < _COLUMNS:
        return Refusal.UNKNOWN_VERSION
    if not content.startswith(DEBUG_OFFSETS_COOKIE) or len(content) < DEBUG_OFFSETS_BYTES:
        return Refusal.UNKNOWN_DEBUG_OFFSETS
    numbers = np.frombuffer(content, "<u8", DEBUG_OFFSETS_BYTES // 8).tolist()
    words = {name: by_minor[column] for name, by_minor in DEBUG_WORDS.items()}
    offsets = {name: numbers[word] for name, word in words.items() if word != NONE}
    if offsets["version"] != version or offsets["free_threaded"] > 1:
        return Refusal.UNKNOWN_DEBUG_OFFSETS
    is_free_threaded = bool(offsets["free_threaded"])
    layout = _derive(offsets, minor_of(version), is_free_threaded)
    if layout is None or not layout.is_sound or not _has_known_objects(offsets):
        return Refusal.UNKNOWN_DEBUG_OFFSETS
    return is_free_threaded, layout


def _derive(offsets: Mapping[str, int], minor: int, is_free_threaded: bool) -> Layout | None:
    """Return the layout; None if an offset cannot be one."""
    has_copies = is_free_threaded and minor >= _FIRST_WITH_TAGS
    fields = {
        "state_thread_id": offsets["thread_state.thread_id"],
        "state_frame": offsets["thread_state.current_frame"],
        "frame_code": offsets["interpreter_frame.executable"],
        "frame_previous": offsets["interpreter_frame.previous"],
        "frame_instruction": offsets["interpreter_frame.instr_ptr"],
        "frame_entry": offsets["interpreter_frame.owner"],
        "code_instructions": offsets["code_object.co_code_adaptive"],
        "object_type": offsets["pyobject.ob_type"],
        "code_name": offsets["code_object.qualname"],
        "code_file": offsets["code_object.filename"],
        "code_lines": offsets["code_object.linetable"],
        "code_first_line": offsets["code_object.firstlineno"],
        "str_length": offsets["unicode_object.length"],
        "str_state": offsets["unicode_object.state"],
        "str_ascii": offsets["unicode_object.asciiobject_size"],
        "str_compact": offsets["unicode_object.asciiobject_size"] + 16,
        "bytes_size": offsets["bytes_object.ob_size"],
        "bytes_data": offsets["bytes_object.ob_sval"],
    }
    if has_copies:
        fields["frame_tlbc"] = offsets["interpreter_frame.tlbc_index"]
        fields["code_tlbc"] = offsets["code_object.co_tlbc"]
    if max(fields.values()) >= NONE:
        return None
    last = max(fields[name] for name in _IN_CODE_OBJECT if name in fields)
    return _3_12._replace(
        **fields,
        cframe_frame=NONE,
        cframe_previous=NONE,
        code_tag_bits=3 if minor >= _FIRST_WITH_TAGS else 0,
        code_bytes=last + 8,
        str_kind_bit=8 if has_copies else 2,
    )


_IN_CODE_OBJECT = ("code_name", "code_file", "code_lines", "code_first_line", "code_tlbc")


def _has_known_objects(offsets: Mapping[str, int]) -> bool:
    """Return whether strings and bytes begin as they do in all versions: so the words are right."""
    size = offsets["pyobject.size"]
    return (
        offsets["pyobject.ob_type"] == size - 8
        and offsets["bytes_object.ob_size"] == size
        and offsets["bytes_object.ob_sval"] == size + 16
        and offsets["unicode_object.length"] == size
        and offsets["unicode_object.state"] == size + 16
        and offsets["unicode_object.asciiobject_size"] == size + 24
    )
