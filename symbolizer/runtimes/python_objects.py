"""Read CPython's objects from the memory of a process: dictionaries, attributes, strings, numbers.

The interpreter changes them meanwhile, and frees them. So the type of each is looked at, counts are
bounded, and what does not fit is no object: 0 or None in its place. Objects are given by their
addresses, many at once, as each read of memory is a system call.

Formats: Objects/dict-common.h to 3.10, then pycore_dict.h; cpython/unicodeobject.h; longintrepr.h.
"""

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from symbolizer.runtimes.code_objects import form_of, read_text
from symbolizer.runtimes.object_layouts import Attributes, ObjectLayout
from symbolizer.runtimes.process_memory import ProcessMemory, TooMuchError

MAX_ENTRIES = 65_536
"""Of a dictionary, deleted ones included."""
MAX_CHARACTERS = 100
"""Of a string; what is beyond is cut."""
_MAX_KEYS = 200_000
"""That are compared in all. Threads of one class mostly share theirs; 1,500 with 15 attributes
each, in dictionaries of their own, take 180,000."""
_CHUNK = 512
"""Keys that are compared at once, as the one that is looked for is often among the first."""
_WORD = 8
_BEFORE = 4 * _WORD
"""What is read before an object: there are the pointers to its attributes from 3.11 on."""
_OBJECT_BYTES = 2 * _WORD
_MAX_DICT_OFFSET = 1 << 20
"""An object is as large as that at most, if it is one of a class."""
_VALID = 3
"""The byte of inline values that says whether they are in use (pycore_dict.h, _dictvalues)."""

# Include/object.h, Py_TPFLAGS_...
_INLINE_VALUES, _MANAGED_DICT = 1 << 2, 1 << 4
INT, TEXT, DICT = 1 << 24, 1 << 28, 1 << 29


class Table(NamedTuple):
    """The keys of a dictionary and its values, in the same order; a deleted one has the value 0."""

    keys: Sequence[int]
    values: Sequence[int]


class _Type(NamedTuple):
    flags: int
    dict_offset: int
    keys: int


class _Place(NamedTuple):
    """A dictionary's keys, and its values if these stand apart, else 0."""

    keys: int
    values: int


class _Home(NamedTuple):
    """Where an instance has its attributes: values, a dictionary, or a pointer to one."""

    values: _Place | None = None
    dict: int = 0
    pointer: int = 0


class PythonObjects:
    """The objects of one process. Not thread-safe."""

    def __init__(self, memory: ProcessMemory, layout: ObjectLayout) -> None:
        self._memory = memory
        self._layout = layout
        self._types: dict[int, _Type] = {0: _Type(0, 0, 0)}
        self._keys_left = _MAX_KEYS
        self._shared: dict[int, Table] = {}
        """Keys that instances of a class share, by their address; the values are none."""
        self._compared: dict[bytes, dict[int, bool]] = {}
        """By a name: which addresses are known to be of it, or not."""

    def words(self, addresses: Sequence[int]) -> list[int]:
        """Return the word at each address; 0 if it is not there."""
        return [_word(content, 0) for content in self._memory.read(addresses, _WORD)]

    def tables(self, dicts: Sequence[int]) -> list[Table | None]:
        """Return what dictionaries hold."""
        layout = self._layout
        contents = self._memory.read(dicts, layout.dict_values + _WORD)
        are_dicts = self._are(contents, DICT)
        return self._tables(
            [
                _Place(_word(content, layout.dict_keys), _word(content, layout.dict_values))
                if is_dict
                else None
                for content, is_dict in zip(contents, are_dicts, strict=True)
            ]
        )

    def attributes(self, instances: Sequence[int]) -> list[Table | None]:
        """Return the attributes of instances, as far as they are not in slots."""
        contents = self._memory.read([each - _BEFORE for each in instances], _BEFORE + 2 * _WORD)
        types = [_word(content, _BEFORE + self._layout.type) for content in contents]
        self._read_types(types)
        homes = [
            self._home(instance, content, self._types[type_])
            for instance, content, type_ in zip(instances, contents, types, strict=True)
        ]
        pointed = self.words([home.pointer for home in homes])
        in_values = self._tables(self._without_invalid([home.values for home in homes]))
        in_dicts = self.tables(
            [home.dict or each for home, each in zip(homes, pointed, strict=True)]
        )
        return [mine or other for mine, other in zip(in_values, in_dicts, strict=True)]

    def _home(self, instance: int, content: bytes, of_type: _Type) -> "_Home":
        """Return where an instance has its attributes; `content` ends with its first words."""
        if self._layout.attributes == Attributes.DICT or not of_type.flags & _MANAGED_DICT:
            has_pointer = 0 < of_type.dict_offset < _MAX_DICT_OFFSET
            return _Home(pointer=instance + of_type.dict_offset if has_pointer else 0)
        in_dict, values = self._managed(content)
        if not in_dict and of_type.flags & _INLINE_VALUES:
            values = instance + _OBJECT_BYTES
        return _Home(_Place(of_type.keys, values) if values else None, in_dict)

    def _managed(self, content: bytes) -> tuple[int, int]:
        """Return the dictionary and the values that pointers before an instance are to."""
        first, second = _word(content, 0), _word(content, _WORD)
        if self._layout.attributes == Attributes.VALUES_OR_DICT:
            return second, first
        if self._layout.attributes == Attributes.TAGGED and second & 1:
            return 0, second + 1
        return second, 0

    def _without_invalid(self, places: list[_Place | None]) -> list[_Place | None]:
        """Leave out inline values that are not in use: they are in a dictionary then."""
        if self._layout.attributes != Attributes.INLINE:
            return places
        asked = [place.values + _VALID if place else 0 for place in places]
        are_valid = self._memory.read(asked, 1)
        return [
            place if valid == b"\1" else None
            for place, valid in zip(places, are_valid, strict=True)
        ]

    def find(self, tables: Sequence[Table | None], name: bytes) -> list[int]:
        """Return what has a name in each table; 0 if there is none. The name is ASCII.

        Raises:
            TooMuchError: there are too many keys.
        """
        keys = {id(table.keys): table.keys for table in tables if table}
        if len(keys) > 1:
            self._compare((key for each in keys.values() for key in each), name)
        places = {number: self._find(each, name) for number, each in keys.items()}
        return [
            table.values[place] if table and (place := places[id(table.keys)]) >= 0 else 0
            for table in tables
        ]

    def _find(self, keys: Sequence[int], name: bytes) -> int:
        """Return the place of a name among keys; -1 if it is not there."""
        for start in range(0, len(keys), _CHUNK):
            some = keys[start : start + _CHUNK]
            known = self._compare(some, name)
            for place, key in enumerate(some, start):
                if known.get(key):
                    return place
        return -1

    def texts(self, strings: Sequence[int]) -> list[str]:
        """Return strings, cut and readable; "" for what is no string."""
        layout = self._layout.text
        heads = self._memory.read(strings, layout.str_ascii)
        places = [
            self._characters(head) if is_text else (0, 0)
            for head, is_text in zip(heads, self._are(heads, TEXT), strict=True)
        ]
        contents = self._memory.read_pieces(
            [(each + start, size) for each, (start, size) in zip(strings, places, strict=True)]
        )
        parts = zip(heads, places, contents, strict=True)
        texts = [read_text(layout, head.ljust(at, b"\0") + rest) for head, (at, _), rest in parts]
        return [
            text.text if text and content else ""
            for text, content in zip(texts, contents, strict=True)
        ]

    def _characters(self, head: bytes) -> tuple[int, int]:
        """Return where the characters of a string begin, and how many bytes of them to read."""
        layout = self._layout.text
        form = form_of(layout, _word(head, layout.str_state, 4))
        if form is None:
            return 0, 0
        length = min(_word(head, layout.str_length), MAX_CHARACTERS)
        return layout.str_ascii if form.is_ascii else layout.str_compact, length * form.width

    def numbers(self, ints: Sequence[int]) -> list[int]:
        """Return positive numbers below 2^30; 0 for what is none."""
        layout = self._layout
        contents = self._memory.read(ints, layout.int_digits + 4)
        return [
            _word(content, layout.int_digits, 4)
            if is_int and _word(content, layout.int_size) == layout.one_digit
            else 0
            for content, is_int in zip(contents, self._are(contents, INT), strict=True)
        ]

    def _are(self, objects: Sequence[bytes], kind: int) -> list[bool]:
        """Return which objects, as read, are of a kind: what their types' flags say."""
        types = [_word(content, self._layout.type) for content in objects]
        self._read_types(types)
        return [bool(self._types[each].flags & kind) for each in types]

    def _read_types(self, types: Iterable[int]) -> None:
        layout = self._layout
        new = [each for each in dict.fromkeys(types) if each not in self._types]
        offsets = (layout.type_flags, layout.type_dict_offset, layout.type_keys)
        found = self.words([each + offset for each in new for offset in offsets])
        for place, each in enumerate(new):
            self._types[each] = _Type(*found[3 * place : 3 * place + 3])

    def _compare(self, keys: Iterable[int], name: bytes) -> dict[int, bool]:
        """Find out which keys are a name; return it by address."""
        layout = self._layout.text
        known = self._compared.setdefault(name, {0: False})
        looked_at = [*islice(keys, self._keys_left + 1)]
        self._keys_left -= len(looked_at)
        if self._keys_left < 0:
            raise TooMuchError
        new = [key for key in dict.fromkeys(looked_at) if key not in known]
        # With its last zero byte, as much as the string takes for which it is looked.
        contents = self._memory.read(new, layout.str_ascii + len(name) + 1)
        equal = [self._is_equal(content, name) for content in contents]
        for key, is_equal, is_text in zip(new, equal, self._are(contents, TEXT), strict=True):
            known[key] = is_equal and is_text
        return known

    def _is_equal(self, content: bytes, name: bytes) -> bool:
        layout = self._layout.text
        if _word(content, layout.str_length) != len(name):
            return False
        form = form_of(layout, _word(content, layout.str_state, 4))
        is_ascii = form is not None and form.is_ascii
        return is_ascii and content[layout.str_ascii :] == name + b"\0"

    def _tables(self, places: Sequence[_Place | None]) -> list[Table | None]:
        apart = [place.keys for place in places if place and place.values]
        self._shared.update(self._read_keys(each for each in apart if each not in self._shared))
        own = self._read_keys(place.keys for place in places if place and not place.values)
        shared = [
            self._shared.get(place.keys) if place and place.values else None for place in places
        ]
        pieces = [
            (place.values + self._layout.values, _WORD * len(table.keys))
            if place and table
            else (0, 0)
            for place, table in zip(places, shared, strict=True)
        ]
        contents = self._memory.read_pieces(pieces)
        return [
            Table(table.keys, np.frombuffer(content, "<u8").tolist())
            if table and content
            else own.get(place.keys if place and not place.values else 0)
            for place, table, content in zip(places, shared, contents, strict=True)
        ]

    def _read_keys(self, keys: Iterable[int]) -> dict[int, Table]:
        """Return what stands behind the headers of keys: the entries of dictionaries."""
        new = [*dict.fromkeys(keys)]
        shapes = [self._shape(head) for head in self._memory.read(new, self._layout.keys_header)]
        pieces = [
            (each + start, count * width)
            for each, (start, count, width) in zip(new, shapes, strict=True)
        ]
        contents = self._memory.read_pieces(pieces)
        found = {}
        for each, (_, count, width), content in zip(new, shapes, contents, strict=True):
            if content:
                # A hash, or none where all keys are strings; key; value.
                entries = np.frombuffer(content, "<u8").reshape(count, width // _WORD)
                found[each] = Table(entries[:, -2].tolist(), entries[:, -1].tolist())
        return found

    def _shape(self, head: bytes) -> tuple[int, int, int]:
        """Return where entries begin, how many these are and their size; zeros if implausible."""
        layout = self._layout
        count = _word(head, layout.keys_count)
        if layout.attributes == Attributes.DICT:
            size, width = _word(head, _WORD), 3 * _WORD
            is_sound = size.bit_count() == 1 and size < 1 << 40
            index = next((n for n in (1, 2, 4) if size < 1 << 8 * n), 8)
            index_bytes = size * index
        else:
            log2_size, log2_bytes, kind = head[8:11] if head else (64, 64, 0)
            width = (2 if kind else 3) * _WORD
            growth = next((n for n in (0, 1, 2) if log2_size < 8 << n), 3)
            is_sound = log2_size < 40 and kind < 3 and log2_bytes == log2_size + growth
            size, index_bytes = (1 << log2_size, 1 << log2_bytes) if is_sound else (0, 0)
        if not is_sound or count > size:
            return 0, 0, 0
        if count > MAX_ENTRIES:
            raise TooMuchError
        return layout.keys_header + index_bytes, count, width


def _word(content: bytes, at: int, size: int = _WORD) -> int:
    """Return a number; 0 if it was not read."""
    return int.from_bytes(content[at : at + size], "little")
