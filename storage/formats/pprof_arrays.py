"""Decode our own pprof objects straight into arrays, ten times as fast as `pprof.decode`.

A host-minute has 12,000 locations and 120,000 words of stacks. `pprof.decode` makes Python objects
of them, because a foreign file may hold anything. Our encoder writes its fields in a fixed order,
so numpy can decode all messages at once (see `pprof_wire`).

Files in any other form are left to `pprof.decode`, which reads every form and names what is wrong
with a damaged file. Both return the same profile; a test compares them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from google.protobuf import message

from storage.columns import Columns, Texts, object_of, presence_of, rank_names, times_of
from storage.formats import pprof
from storage.formats.limits import COUNT_LIMIT, OBJECT, Limits, exhaustion_named
from storage.formats.pprof_comments import Ours, read_comments
from storage.formats.pprof_message import (
    ProfileMessage,
    check_parts,
    decompress,
    message_class,
)
from storage.formats.pprof_wire import (
    Bytes,
    Pairs,
    UnusualError,
    is_ascending,
    numbers_at,
    numbers_from,
    require,
    require_tags,
)
from storage.grouping import ranges
from storage.hashing import Hasher, Hashes, hash_locations
from storage.profile import Indices, Integers, Labels, make_labels
from symbolizer.location import Kind, Module
from symbolizer.text import READABLE_LIMIT, readable

# protobuf makes classes at run time, so they have no types: Any, here and below.
_LeanMessage: Any = message_class(
    "everflame.wire", unread=frozenset({"Sample", "Location", "Function"})
)

_NUMBER_LIMIT = 2**31
"""Files with larger lines or ids are left to `pprof.decode`."""

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
        check_parts(plain, limits)
        try:
            return _decode_ours(plain, hasher)
        except (UnusualError, message.DecodeError):
            return Columns.of(pprof.decode_checked(plain), hasher)


def _decode_ours(content: bytes, hasher: Hasher) -> Columns:
    parsed = _LeanMessage()
    parsed.ParseFromString(content)
    raw = list(parsed.string_table)
    require(all(0 < i < len(raw) for i in parsed.comment) and raw[:1] == [b""])
    ours = read_comments(raw[i] for i in parsed.comment)
    if ours is None:
        raise UnusualError
    types = [(_text(raw, t.type), _text(raw, t.unit)) for t in parsed.sample_type]
    require(len(types) == 2 and types[0] == ("samples", "count") and types[1][0] == ours.type)
    require((ours.type, types[1][1]) == ("cpu", "nanoseconds"))
    strings = _Strings(raw, hasher)
    functions = _read_functions(list(parsed.function), len(raw))
    places = _read_locations(list(parsed.location), parsed.mapping, functions, ours, strings)
    stacks = _read_samples(list(parsed.sample), len(places.locations))
    label_sets, label_numbers = _read_labels(stacks.labels, strings)
    texts = strings.texts
    hashes = hash_locations(strings.hashes, places.locations, places.named)
    ordered = np.sort(hashes)
    require((ordered[1:] != ordered[:-1]).all())
    stack_hashes = hasher.stacks(hashes, stacks.offsets, stacks.words)
    offsets, words = stacks.offsets, stacks.words
    ordered, first, which = np.unique(stack_hashes, return_index=True, return_inverse=True)
    if len(first) < len(stack_hashes):  # several label sets have one stack
        rows = np.stack([label_numbers, which], axis=1)
        require(len(np.unique(rows[:, 0] * (len(first) + 1) + rows[:, 1])) == len(rows))
        lengths = offsets[first + 1] - offsets[first]
        words = words[ranges(offsets[first], lengths)]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        stack_hashes = ordered
    else:
        rows = np.stack([label_numbers, np.arange(len(stack_hashes))], axis=1)
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
        stack_offsets=offsets,
        stack_words=words,
        rows=rows,
        counts=stacks.counts,
        objects=object_of(ours.window, ours.accounting),
        times=times,
        time_counts=time_counts,
        present_sets=present_sets,
        presence=presence,
    )


def _text(raw: Sequence[bytes], index: int) -> str:
    require(0 <= index < len(raw))
    return readable(raw[index])


class _Strings:
    """The file's strings as a table of texts; texts that are not in the file are added to it."""

    def __init__(self, raw: Sequence[bytes], hasher: Hasher) -> None:
        self._texts = _make_readable(raw)
        self._hasher = hasher
        self._numbers: dict[bytes, int] = {}
        self.count = len(self._texts)
        self._base = hasher.texts(self._texts)

    def __getitem__(self, index: int) -> str:
        return self._texts[index].decode()

    def require_distinct(self) -> None:
        ordered = np.sort(self._base)
        require((ordered[1:] != ordered[:-1]).all())

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


def _make_readable(raw: Sequence[bytes]) -> list[bytes]:
    """Apply `readable` to each string; short plain ASCII needs no call."""
    lengths = np.fromiter(map(len, raw), np.int64, len(raw))
    content = np.frombuffer(b"".join(raw), np.uint8)
    odd_at = np.flatnonzero((content < 0x20) | (content > 0x7E))
    is_odd = lengths > READABLE_LIMIT
    is_odd[np.searchsorted(np.cumsum(lengths), odd_at, side="right")] = True
    texts = list(raw)
    for i in np.flatnonzero(is_odd).tolist():
        texts[i] = readable(raw[i]).encode()
    return texts


def _read_functions(messages: Sequence[bytes], strings: int) -> Integers:
    """Return (0, name, system name, file, first line) by id; ids count from 1, line 0 is unused."""
    pairs = Pairs.of(messages)
    require_tags(pairs.tags, (0x08, 0x10, 0x18, 0x20, 0x28))
    require(is_ascending(pairs.owner, pairs.tags))
    require((pairs.values < _NUMBER_LIMIT).all())
    table = np.zeros((len(messages) + 1, 6), dtype=np.int64)
    table[pairs.owner + 1, (pairs.tags >> np.uint64(3)).astype(np.int64)] = pairs.values
    require(np.array_equal(table[:, 1], np.arange(len(table))))
    require((table[:, 2:5] < strings).all())
    return table[:, 1:]


class _Places(NamedTuple):
    """The tables of locations; the fields are those of Columns."""

    locations: Hashes
    named: Integers
    frame_offsets: Integers
    frames: Integers


def _read_locations(
    messages: Sequence[bytes],
    mappings: Sequence[Any],
    functions: Integers,
    ours: Ours,
    strings: _Strings,
) -> _Places:
    pairs = Pairs.of(messages)
    count = len(messages)
    opens = pairs.tags == 0x22
    line_of = np.cumsum(opens) - 1
    line_at = np.flatnonzero(opens)
    line_owner = pairs.owner[line_at]
    first_line = np.searchsorted(line_owner, np.arange(count + 1))
    # A pair belongs to a line if a line of the same location opens before it.
    is_inner = ~opens & (line_of >= first_line[pairs.owner])
    is_outer = ~opens & ~is_inner
    outer = np.flatnonzero(is_outer)
    require_tags(pairs.tags[outer], (0x08, 0x10, 0x18))
    require(is_ascending(pairs.owner[outer], pairs.tags[outer]))
    table = np.zeros((count, 4), dtype=np.uint64)
    fields = (pairs.tags[outer] >> np.uint64(3)).astype(np.int64)
    table[pairs.owner[outer], fields] = pairs.values[outer]
    require(np.array_equal(table[:, 1], np.arange(1, count + 1, dtype=np.uint64)))
    lines = _read_lines(pairs, np.flatnonzero(is_inner), line_of, line_at, len(functions))
    return _Locator(mappings, functions, ours, strings).locate(table, lines, first_line)


def _read_lines(
    pairs: Pairs, inner: Integers, line_of: Integers, line_at: Integers, functions: int
) -> Integers:
    """Return (function id, line) for every line of every location, in their order."""
    require_tags(pairs.tags[inner], (0x08, 0x10))
    require(is_ascending(line_of[inner], pairs.tags[inner]))
    require((pairs.values[inner] < _NUMBER_LIMIT).all())
    owner = pairs.owner[line_at]
    # Each line's bytes must end where the next line of the location begins, or the location ends.
    ends = pairs.message_ends[owner].copy()
    same = owner[1:] == owner[:-1]
    ends[:-1][same] = pairs.starts[line_at[1:]][same]
    # A line's own length is one byte: at most two tags and numbers of five bytes.
    declared = pairs.starts[line_at] + 2 + pairs.values[line_at].astype(np.int64)
    require((pairs.values[line_at] < 0x80).all() and np.array_equal(declared, ends))
    lines = np.zeros((len(line_at), 3), dtype=np.int64)
    lines[line_of[inner], (pairs.tags[inner] >> np.uint64(3)).astype(np.int64)] = pairs.values[
        inner
    ]
    require(((lines[:, 1] > 0) & (lines[:, 1] < functions)).all())
    return lines[:, 1:]


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

    def locate(self, table: Hashes, lines: Integers, first_line: Integers) -> _Places:
        mapping = table[:, 2].astype(np.int64) - 1
        require(((mapping >= 0) & (mapping < len(self._mappings))).all())
        described = [self._describe(each) for each in self._mappings]
        build_ids, kinds, modules = np.array(described, np.int64).reshape(-1, 3).T
        starts, offsets = (
            np.array([getattr(each, name) for each in self._mappings], dtype=np.uint64)
            for name in ("memory_start", "file_offset")
        )
        is_named = build_ids[mapping] < 0
        address = table[:, 3]
        inside = address >= starts[mapping]
        offset = np.where(inside, address - starts[mapping] + offsets[mapping], address)
        line_counts = np.diff(first_line)
        owner = np.repeat(np.arange(len(table)), line_counts)
        frames = self._frames(lines, owner, first_line, kinds[mapping], modules[mapping])
        at = np.flatnonzero(is_named)
        require((line_counts[at] == 1).all())
        theirs = first_line[at]
        function = self._functions[lines[theirs, 0]]
        locations = np.zeros((len(table), 3), dtype=np.uint64)
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
    words: Indices
    counts: Integers
    labels: list[bytes]
    """Each sample's labels, as encoded in the file."""


def _read_samples(messages: Sequence[bytes], locations: int) -> _Samples:
    """Return the samples, last one first: reversing all words at once makes stacks root first."""
    content = b"".join(messages)
    data = np.frombuffer(content, np.uint8)
    lengths = np.fromiter(map(len, messages), np.int64, len(messages))
    require((lengths >= 4).all())
    ends = np.cumsum(lengths)
    at = ends - lengths
    # location_id, if the stack is not empty: a tag, a length, and as many bytes of numbers.
    has_stack = data[at] == 0x0A
    length, first = _lengths_from(data, at + 1, has_stack)
    first = np.where(has_stack, first, at)
    past = first + length
    require((past < ends).all())
    require((data[past] == 0x12).all())
    # The two values, then labels.
    length, value_at = _lengths_from(data, past + 1, np.ones(len(at), dtype=bool))
    values_end = value_at + length
    require((values_end <= ends).all())
    samples, value_at = numbers_from(data, value_at)
    values, value_at = numbers_from(data, value_at)
    require(np.array_equal(value_at, values_end))
    counts = np.stack([samples, values], axis=1)
    require((counts < np.uint64(COUNT_LIMIT)).all())
    require((counts.sum(axis=0, dtype=np.float64) < 2.0**61).all())
    words, depths = _read_words(data, first, past)
    require(((words >= 1) & (words <= locations)).all())
    kept = np.flatnonzero(counts.any(axis=1))[::-1]
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(depths[::-1])])
    words = words[::-1]
    if len(kept) < len(counts):
        mine = len(counts) - 1 - kept
        words = words[ranges(offsets[mine], depths[kept])]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(depths[kept])])
    bounds = zip(values_end[kept].tolist(), ends[kept].tolist(), strict=True)
    labels = [content[start:end] for start, end in bounds]
    return _Samples(offsets, words - 1, counts[kept].astype(np.int64), labels)


def _lengths_from(
    data: Bytes, at: Integers, present: npt.NDArray[np.bool_]
) -> tuple[Integers, Integers]:
    """Return the lengths that begin at these bytes, 0 where none is present, and their ends."""
    lengths, ends = numbers_from(data, at)
    lengths[~present] = 0
    require((lengths < _NUMBER_LIMIT).all())
    return lengths.astype(np.int64), ends


def _read_words(data: Bytes, first: Integers, past: Integers) -> tuple[Indices, Integers]:
    """Return the numbers within these bounds, concatenated, and how many are in each."""
    is_end = data < 0x80
    require(is_end[past[past > first] - 1].all())
    bounds = np.stack([first, past], axis=1).reshape(-1)
    between = np.diff(bounds, prepend=0, append=len(data))
    ends = np.flatnonzero(is_end & np.repeat(np.arange(len(between)) % 2 == 1, between))
    words = numbers_at(data, ends)
    require((words < _NUMBER_LIMIT).all())
    return words.astype(np.int32), np.diff(np.searchsorted(ends, past), prepend=0)


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
    parsed = ProfileMessage(sample=[{}]).sample[0]
    parsed.ParseFromString(content)
    require(not parsed.location_id and not parsed.value)
    labels: dict[str, str] = {}
    for label in parsed.label:
        require(max(label.key, label.str) < strings.count and min(label.key, label.str) >= 0)
        key = strings[label.key]
        require(key not in labels and not label.num_unit)
        labels[key] = str(label.num) if label.num else strings[label.str]
    return make_labels(labels)
