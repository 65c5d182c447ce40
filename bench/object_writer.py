"""Write level-0 objects fast: pprof as our own encoder has it, from arrays, some ms an object.

`storage.formats.pprof_encoder` takes Python objects, 80 ms for a minute of a host; here numpy makes
all messages of a kind at once. Objects of one shape (the services of a host, each in a version)
have most functions in common: those of the hottest stacks are encoded and compressed once per
shape, as the first blocks of the deflate stream (RFC 1951), whether an object's stacks need all of
them or not. The rest follows in blocks that do not look back. pprof's tables may be in pieces, as a
repeated field of protobuf may.
"""

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from call_trees import SITES
from code_tables import Code

from storage.formats.pprof_comments import accounting_comment, modules_comment
from storage.formats.pprof_message import ProfileMessage
from storage.grouping import ranges
from storage.profile import Accounting, Indices, Integers, Labels, Profile, Window
from symbolizer.location import Module

PERIOD_NS = 1_000_000_000 // 99

_LEVEL = 1
"""As the encoder of the agent does."""
_GZIP_HEAD = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x04\xff"
_NUMBER_LABELS = frozenset({"pid", "tid"})
_PAGE_BYTES = 4096
_SAMPLE, _LOCATION, _FUNCTION, _STRING = 0x12, 0x22, 0x2A, 0x32
"""Tags of Profile's fields with messages or bytes."""

_Bytes = np.ndarray


class Messages:
    """Messages of one kind while their fields are added, one line of bytes for each."""

    def __init__(self, count: int) -> None:
        self._columns: list[_Bytes] = []
        self._present: list[_Bytes] = []
        self._every = np.ones(count, dtype=bool)
        self._sizes = np.zeros(count, dtype=np.int64)

    def byte(self, value: int, present: _Bytes | None = None) -> None:
        self._columns.append(np.full(len(self._every), value, np.uint8))
        self._add(self._every if present is None else present)

    def number(self, values: Integers, present: _Bytes | None = None) -> None:
        """Add a variable-length integer to each message, or to those where it is present."""
        present = self._every if present is None else present
        largest = int(values.max(initial=0))
        has_more = present
        while True:
            self._add(has_more)
            low = (values & 0x7F).astype(np.uint8)
            if largest < 0x80:
                self._columns.append(low)
                return
            has_more = has_more & (values >= 0x80)
            self._columns.append(low | (has_more.view(np.uint8) << np.uint8(7)))
            values, largest = values >> 7, largest >> 7

    def encoded(self) -> tuple[_Bytes, Integers]:
        """Return all messages' bytes, and how many each has."""
        # Of two dimensions, a mask takes three times as long as what it chooses.
        chosen = np.flatnonzero(np.stack(self._present, axis=1))
        return np.stack(self._columns, axis=1).reshape(-1).take(chosen), self._sizes

    def _add(self, present: _Bytes) -> None:
        self._present.append(present)
        self._sizes += present


def number_sizes(values: Integers) -> Integers:
    """Return how many bytes each takes as a variable-length integer."""
    sizes = np.ones(len(values), dtype=np.int64)
    limit, largest = 0x80, int(values.max(initial=0))
    while limit <= largest:
        sizes += values >= limit
        limit <<= 7
    return sizes


@dataclass(slots=True)
class _Numbers:
    """Which number each thing has in an object, 0 for none, and how many are numbered."""

    of: Indices
    count: int = 0

    def add(self, things: Integers) -> Integers:
        """Number things that have no number yet; return these."""
        new = things[self.of[things] == 0]
        self.of[new] = np.arange(self.count + 1, self.count + 1 + len(new))
        self.count += len(new)
        return new

    def forget(self, things: Integers) -> None:
        """Take back the numbers of what was added last."""
        self.of[things] = 0
        self.count -= len(things)


class Shape:
    """What objects have in common whose hosts run the same services in the same versions."""

    def __init__(
        self, code: Code, hottest: Integers, modules: Sequence[Module], texts: Sequence[str]
    ):
        """Encode the tables.

        Args:
            code: what all numbers of places refer to.
            hottest: places that are in every object.
            modules: those of all places that may occur.
            texts: those of labels.
        """
        self.modules = {each.build_id: each for each in modules}
        self._code = code
        self._strings: dict[str, int] = {"": 0}
        self._locations = _Numbers(np.zeros(len(code) * SITES, np.int32))
        self._functions = _Numbers(np.zeros(len(code), np.int32))
        self._texts = _Numbers(np.zeros(len(code.texts), np.int32))
        self._is_used = np.zeros(len(code) * SITES, dtype=bool)
        head = ["samples", "count", "cpu", "nanoseconds", modules_comment(self.modules), *texts]
        for text in head:
            self._string(text)
        self._comment = self._string(head[4])
        mappings = self._mappings()
        own = [text.encode() for text in self._strings]
        # The empty text is number 0, and stands for itself in the numbers of code's texts.
        self._texts.count = len(own) - 1
        tables, _ = self._tables(self._added(np.unique(hottest)))
        strings = ProfileMessage(string_table=own).SerializeToString()
        plain = mappings + strings + tables
        deflater = zlib.compressobj(_LEVEL, zlib.DEFLATED, wbits=-15)
        self._deflated = deflater.compress(plain) + deflater.flush(zlib.Z_FULL_FLUSH)
        self._crc, self._plain_bytes = zlib.crc32(plain), len(plain)

    def label_bytes(self, labels: Labels) -> bytes:
        """Return labels as they are in a sample."""
        fields = [
            {"key": self._strings[name], "num": int(value)}
            if name in _NUMBER_LABELS
            else {"key": self._strings[name], "str": self._strings[value]}
            for name, value in labels
        ]
        sample = ProfileMessage(sample=[{"label": fields}]).sample[0]
        content: bytes = sample.SerializeToString()
        return content

    def misses(self, places: Integers) -> int:
        """Return how many of these places have no name."""
        return int(self._code.is_bounded[places // SITES].sum())

    def used(self, words: Integers) -> Integers:
        """Return the distinct places among words, sorted."""
        self._is_used[words] = True
        places = np.flatnonzero(self._is_used)
        self._is_used[places] = False
        return places

    def encode(
        self,
        stacks: tuple[Integers, Integers],
        used: Integers,
        samples: Integers,
        labels: tuple[Sequence[bytes], Integers],
        *,
        window: Window,
        accounting: Accounting,
    ) -> bytes:
        """Return an object.

        Args:
            stacks: offsets and words: places, leaf first; one stack for each row.
            used: the distinct places among the words, sorted.
            samples: of each row.
            labels: label sets as `label_bytes` has them, and which of them each row has.
            window: from when until when.
            accounting: what the object says of itself.
        """
        added = self._added(used)
        tables, comment = self._tables(added, _comment(window, accounting))
        rows = self._samples(stacks, samples, labels)
        for numbers, things in zip(
            (self._locations, self._functions, self._texts), added, strict=True
        ):
            numbers.forget(things)
        plain = self._head(window, comment) + rows + tables
        deflater = zlib.compressobj(_LEVEL, zlib.DEFLATED, wbits=-15)
        crc = zlib.crc32(plain, self._crc)
        trailer = struct.pack("<II", crc, (self._plain_bytes + len(plain)) & 0xFFFFFFFF)
        content = [_GZIP_HEAD, self._deflated, deflater.compress(plain), deflater.flush(), trailer]
        return b"".join(content)

    def _string(self, text: str) -> int:
        return self._strings.setdefault(text, len(self._strings))

    def _mappings(self) -> bytes:
        """Return a mapping for each segment of each module, and one for named code."""
        message, code = ProfileMessage(), self._code
        numbers = {}
        # Named code is in a mapping of its kind.
        owners = dict.fromkeys([*self.modules.values(), *self._kinds()])
        for module in owners:
            for i, segment in enumerate(module.segments or (None,)):
                start = offset = 0
                limit = 1 << 40
                if segment is not None:
                    start = segment.p_vaddr - segment.p_vaddr % _PAGE_BYTES
                    offset = segment.p_offset - segment.p_offset % _PAGE_BYTES
                    limit = segment.p_vaddr + segment.p_filesz
                numbers[module.build_id, i if segment else -1] = len(numbers) + 1
                message.mapping.add(
                    id=len(numbers),
                    memory_start=start,
                    memory_limit=limit if module.build_id else 0,
                    file_offset=offset,
                    filename=self._string(module.path),
                    build_id=self._string(module.build_id),
                    has_functions=True,
                )
        segments = code.segments.tolist()
        self._mapping_of = np.array(
            [numbers.get((code.owner(i).build_id, each), 0) for i, each in enumerate(segments)],
            dtype=np.int64,
        )
        content: bytes = message.SerializeToString()
        return content

    def _kinds(self) -> list[Module]:
        named = np.flatnonzero(self._code.is_named)
        return [self._code.owner(int(named[0]))] if len(named) else []

    def _head(self, window: Window, comment: int) -> bytes:
        count, cpu = (
            {"type": self._strings[name], "unit": self._strings[unit]}
            for name, unit in (("samples", "count"), ("cpu", "nanoseconds"))
        )
        head = ProfileMessage(
            sample_type=[count, cpu],
            period_type=cpu,
            period=PERIOD_NS,
            default_sample_type=cpu["type"],
            time_nanos=window.start_ns,
            duration_nanos=window.end_ns - window.start_ns,
            comment=[comment, self._comment],
        )
        content: bytes = head.SerializeToString()
        return content

    def _added(self, used: Integers) -> tuple[Integers, Integers, Integers]:
        """Number the places that have no number yet, their functions and texts; return these."""
        code = self._code
        places = self._locations.add(used)
        functions = places // SITES
        functions = functions[np.append(True, functions[1:] != functions[:-1])[: len(functions)]]
        functions = self._functions.add(functions)
        texts = np.unique(np.concatenate([code.names[functions], code.files[functions]]))
        return places, functions, self._texts.add(texts[texts != code.empty])

    def _tables(
        self, added: tuple[Integers, Integers, Integers], last: bytes = b""
    ) -> tuple[bytes, int]:
        """Return locations, functions and texts, then a last text, with the number of that."""
        places, functions, texts = added
        code, text_of = self._code, self._texts.of
        of_place = places // SITES
        lines, functions_of = code.lines[places], self._functions.of[of_place].astype(np.int64)
        addresses = np.where(code.is_named[of_place], 0, code.addresses[places])
        numbers = self._locations.of[places].astype(np.int64)
        mappings = self._mapping_of[of_place]
        has_line, has_address = lines > 0, addresses > 0
        line_sizes = 1 + number_sizes(functions_of) + has_line * (1 + number_sizes(lines))
        sizes = 4 + number_sizes(numbers) + number_sizes(mappings) + line_sizes
        sizes += has_address * (1 + number_sizes(addresses))
        locations = Messages(len(places))
        locations.byte(_LOCATION)
        locations.number(sizes)
        locations.byte(0x08)
        locations.number(numbers)
        locations.byte(0x10)
        locations.number(mappings)
        locations.byte(0x18, has_address)
        locations.number(addresses, has_address)
        locations.byte(0x22)
        locations.number(line_sizes)
        locations.byte(0x08)
        locations.number(functions_of)
        locations.byte(0x10, has_line)
        locations.number(lines, has_line)
        names = text_of[code.names[functions]].astype(np.int64)
        files = text_of[code.files[functions]].astype(np.int64)
        return b"".join(
            [
                locations.encoded()[0].tobytes(),
                _functions(
                    self._functions.of[functions].astype(np.int64),
                    names,
                    files,
                    code.first_lines[functions],
                ),
                code.encoded_texts(texts),
                _text(last) if last else b"",
            ]
        ), self._texts.count + 1

    def _samples(
        self,
        stacks: tuple[Integers, Integers],
        samples: Integers,
        labels: tuple[Sequence[bytes], Integers],
    ) -> bytes:
        offsets, words = stacks
        if not len(samples):
            return b""
        numbers = self._locations.of.take(words)
        ids = Messages(len(numbers))
        ids.number(numbers)
        id_bytes, id_sizes = ids.encoded()
        ends = np.cumsum(id_sizes)[offsets[1:] - 1]
        stack_sizes = np.diff(ends, prepend=0)
        values = samples * PERIOD_NS
        counts = Messages(len(samples))
        counts.byte(0x12)
        counts.number(number_sizes(samples) + number_sizes(values))
        counts.number(samples)
        counts.number(values)
        count_bytes, count_sizes = counts.encoded()
        label_sets, label_of = labels
        set_sizes = np.fromiter(map(len, label_sets), np.int64, len(label_sets))
        label_sizes = set_sizes[label_of]
        set_bytes = np.frombuffer(b"".join(label_sets), np.uint8)
        set_starts = np.cumsum(set_sizes) - set_sizes
        body = 1 + number_sizes(stack_sizes) + stack_sizes + count_sizes + label_sizes
        heads = Messages(len(samples))
        heads.byte(_SAMPLE)
        heads.number(body)
        heads.byte(0x0A)
        heads.number(stack_sizes)
        head_bytes, head_sizes = heads.encoded()
        pieces = (
            (head_bytes, head_sizes),
            (id_bytes, stack_sizes),
            (count_bytes, count_sizes),
            (set_bytes[ranges(set_starts[label_of], label_sizes)], label_sizes),
        )
        total = head_sizes + stack_sizes + count_sizes + label_sizes
        at = np.cumsum(total) - total
        content = np.empty(int(total.sum()), dtype=np.uint8)
        for piece, sizes in pieces:
            content[ranges(at, sizes)] = piece
            at = at + sizes
        return content.tobytes()


def _functions(numbers: Integers, names: Integers, files: Integers, lines: Integers) -> bytes:
    has_file, has_line = files > 0, lines > 0
    sizes = 3 + number_sizes(numbers) + 2 * number_sizes(names)
    sizes += has_file * (1 + number_sizes(files)) + has_line * (1 + number_sizes(lines))
    functions = Messages(len(numbers))
    functions.byte(_FUNCTION)
    functions.number(sizes)
    functions.byte(0x08)
    functions.number(numbers)
    functions.byte(0x10)
    functions.number(names)
    functions.byte(0x18)
    functions.number(names)
    functions.byte(0x20, has_file)
    functions.number(files, has_file)
    functions.byte(0x28, has_line)
    functions.number(lines, has_line)
    return functions.encoded()[0].tobytes()


def _text(content: bytes) -> bytes:
    encoded: bytes = ProfileMessage(string_table=[content]).SerializeToString()
    return encoded


def _comment(window: Window, accounting: Accounting) -> bytes:
    """Return the comment that has the accounting of an object."""
    none, no_index = np.zeros(0, np.int64), np.zeros(0, np.int32)
    empty = Profile(
        type="cpu",
        unit="nanoseconds",
        period_ns=PERIOD_NS,
        window=window,
        accounting=accounting,
        modules={},
        locations=(),
        names=(),
        label_sets=(),
        stack_offsets=none,
        stack_locations=no_index,
        row_labels=no_index,
        row_stacks=no_index,
        row_samples=none,
        row_values=none,
    )
    return accounting_comment(empty).encode()
