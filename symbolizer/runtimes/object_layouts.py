"""The layouts of CPython's objects from the runtime down to the attributes of an instance.

To 3.12 they are from a table, made with each version's headers. 3.13 has most of them in its debug
offsets (see `layouts`). From 3.14 on nobody needs them: threads tell the kernel their names.
"""

import enum
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from symbolizer.runtimes.image import MAX_OFFSET, Layout, Refusal
from symbolizer.runtimes.layouts import (
    DEBUG_OFFSETS_BYTES,
    FIRST_WITH_DEBUG_OFFSETS,
    LAYOUTS,
    is_final,
    minor_of,
    read_debug_offsets,
)

LAST_WITHOUT_NAMES = 13
"""The minor version up to which threads do not tell the kernel their names."""


class Attributes(enum.Enum):
    """Where an instance of a class without slots has its attributes."""

    DICT = enum.auto()
    """To 3.10: in a dictionary, at the type's tp_dictoffset."""
    VALUES_OR_DICT = enum.auto()
    """3.11: one of two pointers before the object is to values, the other to a dictionary."""
    TAGGED = enum.auto()
    """3.12: one pointer before the object; if its lowest bit is set, it is to values."""
    INLINE = enum.auto()
    """3.13: a dictionary at a pointer before the object, or values behind it."""


class ObjectLayout(NamedTuple):
    """Offsets in bytes.

    Attributes:
        interpreters: _PyRuntimeState.interpreters.head, behind which is `main`.
        next_interpreter, modules: of PyInterpreterState.
        type: ob_type of any object.
        type_flags, type_dict_offset, type_keys: of PyTypeObject and PyHeapTypeObject; the last is
            ht_cached_keys, the keys that instances share.
        module_dict, dict_keys, dict_values: of PyModuleObject and PyDictObject.
        values: where values begin in what `dict_values` points to.
        keys_header: of PyDictKeysObject: where the indices begin. The entries stand behind them.
        keys_count: dk_nentries.
        int_size, int_digits: of PyLongObject.
        one_digit: what `int_size` is of a positive number of one digit, which has 30 bits.
        attributes: see there.
        text: where strings have what.
    """

    interpreters: int
    next_interpreter: int
    modules: int
    type: int
    type_flags: int
    type_dict_offset: int
    type_keys: int
    module_dict: int
    dict_keys: int
    dict_values: int
    values: int
    keys_header: int
    keys_count: int
    int_size: int
    int_digits: int
    one_digit: int
    attributes: Attributes
    text: Layout


_3_8 = ObjectLayout(
    interpreters=32,
    next_interpreter=0,
    modules=56,
    type=8,
    type_flags=168,
    type_dict_offset=288,
    type_keys=872,
    module_dict=16,
    dict_keys=32,
    dict_values=40,
    values=0,
    keys_header=40,
    keys_count=32,
    int_size=16,
    int_digits=24,
    one_digit=1,
    attributes=Attributes.DICT,
    text=LAYOUTS[8],
)
_3_11 = _3_8._replace(
    interpreters=40,
    modules=888,
    keys_header=32,
    keys_count=24,
    attributes=Attributes.VALUES_OR_DICT,
    text=LAYOUTS[11],
)
_3_12 = _3_11._replace(
    modules=944, type_keys=880, one_digit=8, attributes=Attributes.TAGGED, text=LAYOUTS[12]
)
_3_13 = _3_12._replace(
    interpreters=632,
    next_interpreter=7264,
    modules=7656,
    values=8,
    attributes=Attributes.INLINE,
)
OBJECT_LAYOUTS: Mapping[int, ObjectLayout] = MappingProxyType(
    {
        8: _3_8,
        9: _3_8._replace(modules=856, type_keys=864, text=LAYOUTS[9]),
        10: _3_8._replace(modules=856, text=LAYOUTS[10]),
        11: _3_11,
        12: _3_12,
        13: _3_13,
    }
)
"""By minor version; what 3.13's debug offsets have is that of 3.13.0."""

OBJECT_WORDS: Mapping[str, int] = MappingProxyType(
    {
        "runtime_state.interpreters_head": 5,
        "interpreter_state.next": 8,
        "interpreter_state.imports_modules": 11,
        "type_object.tp_flags": 49,
        "dict_object.ma_keys": 57,
        "dict_object.ma_values": 58,
        "long_object.lv_tag": 62,
        "long_object.ob_digit": 63,
    }
)
"""Which word of 3.13's debug offsets is which offset."""
_MAX_STATE_OFFSET = 1 << 20
"""Of the runtime and of interpreters, which are large: 400 KB in 3.13."""


def object_layout(version: int, debug_offsets: bytes) -> ObjectLayout | None:
    """Return the layout of a version, as PY_VERSION_HEX; None if it is not known.

    `debug_offsets` are DEBUG_OFFSETS_BYTES from the runtime on, which are used from 3.13 on.
    """
    minor = minor_of(version)
    if not is_final(version) or minor not in OBJECT_LAYOUTS:
        return None
    if minor < FIRST_WITH_DEBUG_OFFSETS:
        return OBJECT_LAYOUTS[minor]
    read = read_debug_offsets(debug_offsets, version)
    if isinstance(read, Refusal):
        return None
    is_free_threaded, text = read
    layout = None if is_free_threaded else _derive(debug_offsets, OBJECT_LAYOUTS[minor])
    return layout and layout._replace(text=text)


def _derive(content: bytes, layout: ObjectLayout) -> ObjectLayout | None:
    """Return the layout with what debug offsets say; None if an offset cannot be one."""
    numbers = np.frombuffer(content, "<u8", DEBUG_OFFSETS_BYTES // 8).tolist()
    words = {name: numbers[word] for name, word in OBJECT_WORDS.items()}
    states = {
        "interpreters": words["runtime_state.interpreters_head"],
        "next_interpreter": words["interpreter_state.next"],
        "modules": words["interpreter_state.imports_modules"],
    }
    objects = {
        "type_flags": words["type_object.tp_flags"],
        "dict_keys": words["dict_object.ma_keys"],
        "dict_values": words["dict_object.ma_values"],
        "int_size": words["long_object.lv_tag"],
        "int_digits": words["long_object.ob_digit"],
    }
    is_bounded = max(states.values()) < _MAX_STATE_OFFSET and max(objects.values()) < MAX_OFFSET
    return layout._replace(**states, **objects) if is_bounded else None
