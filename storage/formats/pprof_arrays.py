"""Decode our own pprof objects straight into arrays, ten times as fast as `pprof.decode`.

A host-minute has 12,000 locations and 120,000 words of stacks. `pprof.decode` makes Python objects
of them, because a foreign file may hold anything. Our encoder writes its fields in a fixed order,
so numpy can decode all messages at once (see `pprof_wire`).

Files in any other form are left to `pprof.decode`, which reads every form and names what is wrong
with a damaged file. Both return the same profile; a test compares them.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from google.protobuf import message

from storage.columns import Columns, Texts, object_of, presence_of, rank_names, times_of
from storage.formats import pprof
from storage.formats.limits import COUNT_LIMIT, OBJECT, Limits, exhaustion_named
from storage.formats.pprof_comments import Ours, read_comments
from storage.formats.pprof_message import ProfileMessage, check_parts, decompress, split
from storage.formats.pprof_wire import (
    Bytes,
    Flags,
    Messages,
    UnusualError,
    numbers_from,
    numbers_in,
    require,
)
from storage.hashing import Hasher, Hashes, Numbers, hash_locations
from storage.profile import Integers, Labels, make_labels
from storage.stack_tree import StackLists
from symbolizer.location import Kind, Module
from symbolizer.text import READABLE_LIMIT, readable

_NUMBER_LIMIT = 2**31
"""Files with larger lines or ids are left to `pprof.decode`."""

_REMEMBERED_BYTES = 4096
"""Longer strings are made readable again in each object that has them."""

_LINES_LIMIT = 256
"""Lines of a location: each is read with those of all other locations."""

_Sample: Any = type(ProfileMessage().sample.add())
"""protobuf makes classes at run time, so they have no types: Any, here and below."""

_NO_USUAL = (Kind.REST, "\n")
"""Not equal to any kind and module of a file: names contain no line ends."""


def decode(content: bytes, hasher: Hasher, limits: Limits = OBJECT) -> Columns:
    """Return pprof, gzipped or not, as arrays: ours fast, any other by `pprof.decode`.

    Raises:
        ProfileError: the bytes are damaged, are not a profile, or exceed a limit.
        SchemaError: a later version of this program wrote them.
    """
    with exhaustion_named():
        plain = decompress(content, limits)
        parts = check_parts(plain, limits)
        try:
            return _decode_ours(plain, hasher, parts)
        except (UnusualError, message.DecodeError):
            return Columns.of(pprof.decode_checked(plain), hasher)


def _decode_ours(content: bytes, hasher: Hasher, parts: Any = None) -> Columns:
    parts = split(content) if parts is None else parts
    raw: list[bytes] = list(parts.string_table)
    comments = numbers_in(np.frombuffer(b"".join(parts.comment), np.uint8))[0].tolist()
    require(all(0 < i < len(raw) for i in comments) and raw[:1] == [b""])
    ours = read_comments(raw[i] for i in comments)
    if ours is None:
        raise UnusualError
    parsed = _parse_heads(parts)
    types = [(_text(raw, t.type), _text(raw, t.unit)) for t in parsed.sample_type]
    require(len(types) == 2 and types[0] == ("samples", "count") and types[1][0] == ours.type)
    require((ours.type, types[1][1]) == ("cpu", "nanoseconds"))
    strings = _Strings(raw, hasher, frozenset(comments))
    functions = _read_functions(list(parts.function), len(raw))
    require(all((functions[:, 1:4] != i).all() for i in comments))
    places = _read_locations(list(parts.location), parsed.mapping, functions, ours, strings)
    stacks = _read_samples(list(parts.sample), len(places.locations))
    label_sets, label_numbers = _read_labels(stacks.labels, strings)
    texts = strings.texts
    hashes = hash_locations(strings.hashes, places.locations, places.named)
    stack_hashes = hasher.stacks(hashes, stacks.offsets, stacks.words)
    require(_are_distinct(hashes) and _are_distinct(stack_hashes))
    rows = np.stack([label_numbers, stacks.numbers], axis=1)
    require(_are_distinct(rows[:, 0] * (len(stack_hashes) + 1) + rows[:, 1]))
    times, time_counts = times_of(rows, stacks.counts)
    present_sets, presence = presence_of(ours.accounting)
    ranks, named_s = rank_names(texts, places.frame_offsets, places.frames, ours.window)
    return Columns(
        type=ours.type,
        unit=types[1][1],
        period_ns=ours.period_ns,
        window=ours.window,
        accounting=ours.accounting,
        modules=ours.modules,
        label_sets=label_sets,
        texts=texts,
        location_hashes=hashes,
        locations=places.locations,
        named=places.named,
        frame_offsets=places.frame_offsets,
        frames=places.frames,
        name_ranks=ranks,
        named_s=named_s,
        stack_hashes=stack_hashes,
        stacks=StackLists(stacks.offsets, stacks.words.astype(np.int32)),
        rows=rows,
        counts=stacks.counts,
        objects=object_of(ours.window, ours.accounting),
        times=times,
        time_counts=time_counts,
        present_sets=present_sets,
        presence=presence,
    )


def _are_distinct(numbers: Numbers) -> bool:
    ordered = np.sort(numbers)
    return bool((ordered[1:] != ordered[:-1]).all())


def _parse_heads(parts: Any) -> Any:
    """Return a message with the types of values and the mappings, which are few."""
    require(len(parts.sample_type) == 2)
    parsed = ProfileMessage()
    for content in parts.sample_type:
        parsed.sample_type.add().ParseFromString(content)
    for content in parts.mapping:
        parsed.mapping.add().ParseFromString(content)
    return parsed


def _text(raw: Sequence[bytes], index: int) -> str:
    require(0 <= index < len(raw))
    return readable(raw[index])


class _Strings:
    """The file's strings as a table of texts; texts that are not in the file are added to it.

    Comments are left out: that of the accounting is different in every file, and a Hasher would
    remember it. No name may be the same string.
    """

    def __init__(self, raw: Sequence[bytes], hasher: Hasher, comments: frozenset[int]) -> None:
        self._comments = comments
        names = list(raw)
        for i in comments:
            names[i] = b""
        self._texts = make_readable(names)
        for i in comments:
            self._texts[i] = b"\n%d" % i  # no readable text has a line end
        self._hasher = hasher
        self._numbers: dict[bytes, int] = {}
        self.count = len(self._texts)
        self._base = hasher.texts(self._texts)

    def __getitem__(self, index: int) -> str:
        require(0 <= index < self.count and index not in self._comments)
        return self._texts[index].decode()

    def require_distinct(self) -> None:
        require(_are_distinct(self._base))

    def number(self, text: str) -> int:
        """Return the number of a text; a new one is added."""
        content = text.encode()
        if content not in self._numbers:
            self._numbers[content] = len(self._texts)
            self._texts.append(content)
        return self._numbers[content]

    @property
    def texts(self) -> Texts:
        return Texts.of(self._texts)

    @property
    def hashes(self) -> Hashes:
        added = self._hasher.texts(self._texts[self.count :])
        return np.concatenate([self._base, added])


@functools.lru_cache(maxsize=1024)
def _readable(name: bytes) -> bytes:
    return readable(name).encode()


def make_readable(raw: Sequence[bytes]) -> list[bytes]:
    """Apply `readable` to each string; short plain ASCII needs no call."""
    lengths = np.fromiter(map(len, raw), np.int64, len(raw))
    content = np.frombuffer(b"".join(raw), np.uint8)
    odd_at = np.flatnonzero(content - np.uint8(0x20) > 0x7E - 0x20)  # below 0x20 it wraps
    is_odd = lengths > READABLE_LIMIT
    is_odd[np.searchsorted(np.cumsum(lengths), odd_at, side="right")] = True
    texts = list(raw)
    for i in np.flatnonzero(is_odd).tolist():
        make = _readable if lengths[i] < _REMEMBERED_BYTES else _readable.__wrapped__
        texts[i] = make(raw[i])
    return texts


def _read_functions(contents: Sequence[bytes], strings: int) -> Integers:
    """Return a line (id, name, system name, file, first line) by id; ids count from 1."""
    messages = Messages.of(contents)
    fields = [messages.number(tag) for tag in (0x08, 0x10, 0x18, 0x20, 0x28)]
    messages.require_read()
    table = np.zeros((len(messages) + 1, 5), dtype=np.int64)
    for i, numbers in enumerate(fields):
        require((numbers < _NUMBER_LIMIT).all())
        table[1:, i] = numbers
    require(np.array_equal(table[:, 0], np.arange(len(table))))
    require((table[:, 1:4] < strings).all())
    return table


class _Places(NamedTuple):
    """The tables of locations; the fields are those of Columns."""

    locations: Hashes
    named: Integers
    frame_offsets: Integers
    frames: Integers


def _read_locations(
    contents: Sequence[bytes],
    mappings: Sequence[Any],
    functions: Integers,
    ours: Ours,
    strings: _Strings,
) -> _Places:
    messages = Messages.of(contents)
    ids, mapping, address = (messages.number(tag) for tag in (0x08, 0x10, 0x18))
    require(np.array_equal(ids, np.arange(1, len(messages) + 1, dtype=np.uint64)))
    lines, owner = _read_lines(messages, len(functions))
    messages.require_read()
    require((mapping <= len(mappings)).all())
    counts = np.bincount(owner, minlength=len(messages))
    first_line = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    locator = _Locator(mappings, functions, ours, strings)
    return locator.locate(mapping.astype(np.int64), address, lines, first_line)


def _read_lines(messages: Messages, functions: int) -> tuple[Integers, Integers]:
    """Return (function id, line) for every line of every location, in their order, and of which."""
    lines, owners = [np.zeros((0, 2), np.int64)], [np.zeros(0, np.int64)]
    for _ in range(_LINES_LIMIT):
        left = messages.unread()
        if len(left) == 0:
            break
        inner = messages.inner(0x22, left)
        function, line = inner.number(0x08), inner.number(0x10)
        inner.require_read()
        require(((function > 0) & (function < functions)).all() and (line < _NUMBER_LIMIT).all())
        lines.append(np.stack([function, line], axis=1).astype(np.int64))
        owners.append(left)
    owner = np.concatenate(owners)
    order = np.argsort(owner, kind="stable")
    return np.concatenate(lines)[order], owner[order]


class _Locator:
    """Turns all of pprof's locations into ours at once; `pprof._Decoder` does it one by one."""

    def __init__(
        self, mappings: Sequence[Any], functions: Integers, ours: Ours, strings: _Strings
    ) -> None:
        self._functions = functions
        self._modules: Mapping[str, Module] = ours.modules
        self._strings = strings
        by_id = {mapping.id: mapping for mapping in mappings}
        require(len(by_id) == len(mappings) and sorted(by_id) == list(range(1, len(by_id) + 1)))
        self._mappings = [by_id[i] for i in sorted(by_id)]

    def locate(
        self, mapping_ids: Integers, address: Hashes, lines: Integers, first_line: Integers
    ) -> _Places:
        require((mapping_ids > 0).all())
        mapping = mapping_ids - 1
        described = [self._describe(each) for each in self._mappings]
        build_ids, kinds, modules = np.array(described, np.int64).reshape(-1, 3).T
        starts, offsets = (
            np.array([getattr(each, name) for each in self._mappings], dtype=np.uint64)
            for name in ("memory_start", "file_offset")
        )
        is_named = build_ids[mapping] < 0
        start = starts[mapping]
        offset = np.where(address >= start, address - start + offsets[mapping], address)
        line_counts = np.diff(first_line)
        owner = np.repeat(np.arange(len(mapping)), line_counts)
        frames = self._frames(lines, owner, first_line, kinds[mapping], modules[mapping])
        at = np.flatnonzero(is_named)
        require((line_counts[at] == 1).all())
        theirs = first_line[at]
        function = self._functions[lines[theirs, 0]]
        locations = np.zeros((len(mapping), 3), dtype=np.uint64)
        locations[:, 0] = np.where(is_named, 0, build_ids[mapping])
        locations[:, 1] = np.where(is_named, np.uint64(0), offset)
        locations[at, 0] = frames[theirs, 0]
        locations[at, 2] = np.arange(1, len(at) + 1)
        named = np.stack(
            [frames[theirs, 1], frames[theirs, 2], frames[theirs, 3], function[:, 4],
             lines[theirs, 1]], axis=1,
        )  # fmt: skip
        counts = np.where(is_named, 0, line_counts)
        return _Places(
            locations,
            named,
            np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]),
            frames[~is_named[owner]],
        )

    def _describe(self, mapping: Any) -> tuple[int, int, int]:
        """Return the texts of a mapping's build id (-1: named code), kind and module."""
        build_id = self._strings[mapping.build_id] if self._is_string(mapping.build_id) else ""
        has_place = self._is_string(mapping.filename)
        if build_id:
            module = self._modules.get(build_id)
            kind, name = (module.kind, module.name) if module else (Kind.NATIVE, build_id)
            return mapping.build_id, self._strings.number(kind), self._strings.number(name)
        place = self._strings[mapping.filename] if has_place else ""
        require(place.strip("[]") in set(Kind))
        return -1, self._strings.number(place.strip("[]")), self._strings.number(place)

    def _is_string(self, index: int) -> bool:
        require(0 <= index < self._strings.count)
        return index > 0

    def _frames(
        self,
        lines: Integers,
        owner: Integers,
        first_line: Integers,
        kinds: Integers,
        modules: Integers,
    ) -> Integers:
        """Return (function, module, kind, file, line) for each line."""
        name, system_name, file = self._functions[lines[:, 0], 1:4].T
        inlined = self._strings.number(Kind.INLINED)
        is_last = np.arange(len(lines)) == first_line[owner + 1] - 1
        kind = np.where(is_last, kinds[owner], inlined)
        module = modules[owner]
        odd = np.flatnonzero((system_name != name) & (system_name != 0))
        if len(odd):
            # A text that is in the file twice has two numbers, which would look like two names.
            self._strings.require_distinct()
        for number in np.unique(system_name[odd]).tolist():
            at = odd[system_name[odd] == number]
            # The first word is a kind; the mapping's kind and module then do not matter.
            described = pprof.kind_and_module("", self._strings[number], _NO_USUAL)
            if described != _NO_USUAL:
                kind[at] = self._strings.number(described[0])
                module[at] = self._strings.number(described[1])
        return np.stack([name, module, kind, file, lines[:, 1]], axis=1)


class _Samples(NamedTuple):
    offsets: Integers
    words: Integers
    """The distinct stacks, root first: stack i is `words[offsets[i]:offsets[i + 1]]`."""
    numbers: Integers
    """Each sample's stack."""
    counts: Integers
    labels: list[bytes]
    """Each sample's labels, as encoded in the file."""


def _read_samples(messages: Sequence[bytes], locations: int) -> _Samples:
    content = b"".join(messages)
    data = np.frombuffer(content, np.uint8)
    lengths = np.fromiter(map(len, messages), np.int64, len(messages))
    require((lengths >= 4).all())
    ends = np.cumsum(lengths)
    at = ends - lengths
    # location_id, if the stack is not empty: a tag, a length, and as many bytes of numbers.
    has_stack = data[at] == 0x0A
    length, first = _lengths_from(data, at + has_stack, has_stack)
    past = first + length
    require((past < ends).all())
    require((data[past] == 0x12).all())
    # The two values, then labels.
    each = np.ones(len(at), dtype=bool)
    length, value_at = _lengths_from(data, past + 1, each)
    values_end = value_at + length
    require((values_end <= ends).all())
    samples, value_at = numbers_from(data, value_at, each)
    values, value_at = numbers_from(data, value_at, each)
    require(np.array_equal(value_at, values_end))
    counts = np.stack([samples, values], axis=1)
    require((counts < np.uint64(COUNT_LIMIT)).all() and (samples | values).all())
    require((counts.sum(axis=0, dtype=np.float64) < 2.0**61).all())
    # Samples of several processes or threads have one stack, which then has the same bytes.
    stacks: dict[bytes, int] = {}
    bounds = zip(first.tolist(), past.tolist(), strict=True)
    numbers = [stacks.setdefault(content[start:end], len(stacks)) for start, end in bounds]
    offsets, words = _read_words(list(stacks))
    require(((words >= 1) & (words <= locations)).all())
    bounds = zip(values_end.tolist(), ends.tolist(), strict=True)
    return _Samples(
        offsets,
        words - 1,
        np.array(numbers, dtype=np.int64),
        counts.astype(np.int64),
        [content[start:end] for start, end in bounds],
    )


def _lengths_from(data: Bytes, at: Integers, present: Flags) -> tuple[Integers, Integers]:
    """Return the lengths that begin at these bytes, 0 where none is present, and their ends."""
    lengths, ends = numbers_from(data, at, present)
    require((lengths < _NUMBER_LIMIT).all())
    return lengths.astype(np.int64), ends


def _read_words(stacks: Sequence[bytes]) -> tuple[Integers, Integers]:
    """Return the offsets and the words, root first, of stacks as they are encoded: leaf first."""
    # The last one first: reversing all words at once then makes stacks root first.
    content = np.frombuffer(b"".join(stacks[::-1]), np.uint8)
    words, ends = numbers_in(content)
    require((words < _NUMBER_LIMIT).all())
    stack_ends = np.cumsum(np.fromiter(map(len, stacks[::-1]), np.int64, len(stacks)))
    # Of empty stacks before all others, that is the last byte of all.
    require(len(content) == 0 or (content[stack_ends - 1] < 0x80).all())
    depths = np.diff(np.searchsorted(ends, stack_ends), prepend=0)[::-1]
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(depths)])
    return offsets, words[::-1].astype(np.int64)


def _read_labels(
    contents: Sequence[bytes], strings: _Strings
) -> tuple[tuple[Labels, ...], Integers]:
    """Return the distinct label sets, and each sample's number among them."""
    label_sets: dict[Labels, int] = {}
    numbers = {
        content: label_sets.setdefault(_parse_labels(content, strings), len(label_sets))
        for content in dict.fromkeys(contents)
    }
    each = np.fromiter(map(numbers.__getitem__, contents), np.int64, len(contents))
    return tuple(label_sets), each


def _parse_labels(content: bytes, strings: _Strings) -> Labels:
    # The bytes after a sample's values are a valid sample that has only labels.
    parsed = _Sample.FromString(content)
    require(not parsed.location_id and not parsed.value)
    labels: dict[str, str] = {}
    for label in parsed.label:
        key, text, number = strings[label.key], strings[label.str], label.num
        require(key not in labels and not label.num_unit)
        labels[key] = str(number) if number else text
    return make_labels(labels)
