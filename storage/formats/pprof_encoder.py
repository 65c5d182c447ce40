"""Encode profiles as pprof, by the conventions that `pprof` describes."""

import itertools
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from storage.formats.pprof_comments import accounting_comment, modules_comment
from storage.formats.pprof_message import ProfileMessage
from storage.profile import Labels, Profile
from symbolizer.location import (
    AddressLocation,
    FileOffset,
    Frame,
    Kind,
    Module,
    NamedLocation,
    Segment,
    is_bounded,
)

_PAGE_BYTES = 4096
_SAMPLES_AT_ONCE = 256
_LOCATION_ID, _VALUE, _SAMPLE = b"\x0a", b"\x12", b"\x12"
"""Tags: the first and the second field of a sample, and the second one of a profile."""
_ALL_BITS = (1 << 64) - 1
_NUMBER_LABELS = frozenset({"pid", "tid"})


class Encoder:
    """The tables of one pprof message while they grow."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self._message = ProfileMessage()
        self._strings: dict[str, int] = {"": 0}
        self._functions: dict[tuple[str, str, str, int], int] = {}
        self._mappings: dict[tuple[str, str, Segment | None], Any] = {}

    def encode(self) -> bytes:
        profile, out, head = self._profile, self._message, ProfileMessage()
        for type_, unit in (("samples", "count"), (profile.type, profile.unit)):
            head.sample_type.add(type=self._string(type_), unit=self._string(unit))
        out.period_type.type = self._string(profile.type)
        out.period_type.unit = self._string(profile.unit)
        out.period = profile.period_ns
        out.default_sample_type = self._string(profile.type)
        out.time_nanos = profile.window.start_ns
        out.duration_nanos = profile.window.end_ns - profile.window.start_ns
        for comment in (accounting_comment(profile), modules_comment(profile.modules)):
            out.comment.append(self._string(comment))
        for module in _by_presence(profile):
            for segment in module.segments or (None,):
                self._mapping(module.build_id, module.path, segment)
        for number in range(len(profile.locations)):
            self._add_location(number)
        label_sets = [self._labels(labels) for labels in profile.label_sets]
        out.string_table.extend(text.encode("utf-8", "replace") for text in self._strings)
        deflater = zlib.compressobj(1, zlib.DEFLATED, wbits=31)  # writes no time: deterministic
        # Concatenated messages are one message; sample messages are released once serialized.
        messages = itertools.chain([_serialize(head)], self._samples(label_sets), [_serialize(out)])
        parts = [deflater.compress(each) for each in messages]
        return b"".join(parts) + deflater.flush()

    def _string(self, text: str) -> int:
        return self._strings.setdefault(text, len(self._strings))

    def _mapping(self, build_id: str, path: str, segment: Segment | None) -> Any:
        """Return the mapping of a segment; None stands for the whole file, by file offsets."""
        key = (build_id, path, segment)
        if key not in self._mappings:
            start, offset, limit = 0, 0, 0
            if segment is not None:
                start = segment.p_vaddr - segment.p_vaddr % _PAGE_BYTES
                offset = segment.p_offset - segment.p_offset % _PAGE_BYTES
                limit = segment.p_vaddr + segment.p_filesz
            self._mappings[key] = self._message.mapping.add(
                id=len(self._mappings) + 1,
                memory_start=start,
                memory_limit=min(limit, 2**64 - 1),
                file_offset=offset,
                filename=self._string(path),
                build_id=self._string(build_id),
                has_functions=True,
                has_filenames=True,
                has_line_numbers=True,
            )
        return self._mappings[key]

    def _add_location(self, number: int) -> None:
        location = self._profile.locations[number]
        if isinstance(location, NamedLocation):
            address, place = 0, f"[{location.kind}]"
            mapping = self._mapping("", place, None)
            frames: Sequence[Frame] = self._profile.frames(number)
            kind, module_name, first_line = location.kind, place, location.first_line
        else:
            module = self._profile.modules.get(location.build_id)
            address, frames = location.offset, self._profile.names[number]
            kind, module_name, first_line = Kind.NATIVE, location.build_id, 0
            segment = None
            path = ""
            if module is not None:
                address = module.elf_address(location.offset)
                kind, module_name, path = module.kind, module.name, module.path
                segment = _segment_of(module, location.offset)
            mapping = self._mapping(location.build_id, path, segment)
            if address >= mapping.memory_limit:
                # The size of the whole file is unknown. A power of two is the same for most
                # profiles of it, and tools merge mappings only when their sizes are equal.
                mapping.memory_limit = min(max(_PAGE_BYTES, 1 << address.bit_length()), 2**64 - 1)
        added = self._message.location.add(id=number + 1, mapping_id=mapping.id, address=address)
        for i, frame in enumerate(frames):
            usual = (Kind.INLINED if i < len(frames) - 1 else kind, module_name)
            added.line.add(function_id=self._function(frame, usual, first_line), line=frame.line)
        mapping.has_functions &= bool(frames) and not is_bounded(frames[0])
        mapping.has_filenames &= bool(frames) and all(frame.file for frame in frames)
        mapping.has_line_numbers &= bool(frames) and all(frame.line for frame in frames)
        mapping.has_inline_frames |= len(frames) > 1

    def _function(self, frame: Frame, usual: tuple[Kind, str], first_line: int) -> int:
        system_name = frame.function
        if (frame.kind, frame.module) != usual:
            system_name = f"{frame.kind} {frame.module}"
            if system_name == frame.function:
                system_name = " " + system_name
        key = (frame.function, system_name, frame.file, first_line)
        if key not in self._functions:
            self._functions[key] = len(self._functions) + 1
            self._message.function.add(
                id=self._functions[key],
                name=self._string(frame.function),
                system_name=self._string(system_name),
                filename=self._string(frame.file),
                start_line=first_line,
            )
        return self._functions[key]

    def _samples(self, label_sets: Sequence[bytes]) -> Iterator[bytes]:
        """Return the samples as protobuf writes them, a few hundred at once.

        To make messages of them takes six times as long.
        """
        profile = self._profile
        numbers = [_varint(number) for number in range(len(profile.locations) + 1)]
        leaf_first = profile.stack_locations[::-1] + 1
        # Reversed as a whole, a stack that ended at `end` starts at `len - end`, leaf first.
        starts = (len(leaf_first) - profile.stack_offsets[1:]).tolist()
        ends = (len(leaf_first) - profile.stack_offsets[:-1]).tolist()
        columns = (profile.row_labels, profile.row_stacks, profile.row_samples, profile.row_values)
        for begin in range(0, len(profile.row_stacks), _SAMPLES_AT_ONCE):
            parts: list[bytes] = []
            rows = (column[begin : begin + _SAMPLES_AT_ONCE].tolist() for column in columns)
            for labels, stack, samples, value in zip(*rows, strict=True):
                stack_ids = leaf_first[starts[stack] : ends[stack]].tolist()
                packed = b"".join([numbers[number] for number in stack_ids])
                location_id = _delimited(_LOCATION_ID, packed) if packed else b""
                values = _delimited(_VALUE, _varint(samples) + _varint(value))
                parts.append(_delimited(_SAMPLE, location_id + values + label_sets[labels]))
            yield b"".join(parts)

    def _labels(self, labels: Labels) -> bytes:
        """Return what a sample with these labels ends with."""
        sample = ProfileMessage().sample.add()
        for name, value in labels:
            number = _label_number(value) if name in _NUMBER_LABELS else 0
            content = {"num": number} if number else {"str": self._string(value)}
            sample.label.add(key=self._string(name), **content)
        return _serialize(sample)


def _serialize(message: Any) -> bytes:
    content: bytes = message.SerializeToString(deterministic=True)
    return content


def _varint(number: int) -> bytes:
    """Return a number of 64 bits as protobuf writes it, a negative one as its complement."""
    number &= _ALL_BITS
    written = bytearray()
    while number > 0x7F:
        written.append(number & 0x7F | 0x80)
        number >>= 7
    written.append(number)
    return bytes(written)


def _delimited(tag: bytes, content: bytes) -> bytes:
    """Return a field that has a length."""
    size = len(content)
    length = _SHORT_LENGTHS[size] if size < len(_SHORT_LENGTHS) else _varint(size)
    return tag + length + content


_SHORT_LENGTHS = [_varint(size) for size in range(1024)]


def _by_presence(profile: Profile) -> list[Module]:
    """Order modules by how often they are on a stack, the kernel's last.

    The first mapping is the main binary, which pprof names in its header.
    """
    numbers = {build_id: i for i, build_id in enumerate(profile.modules)}
    owners = np.array(
        [
            numbers.get(place.build_id, -1) if isinstance(place, AddressLocation) else -1
            for place in profile.locations
        ],
        dtype=np.int64,
    )
    samples = np.zeros(len(profile.stack_offsets) - 1, dtype=np.int64)
    np.add.at(samples, profile.row_stacks, profile.row_samples)
    on_stacks = np.repeat(samples, np.diff(profile.stack_offsets))
    presence = np.zeros(len(numbers) + 1, dtype=np.int64)  # the last one is for all the others
    np.add.at(presence, owners[profile.stack_locations], on_stacks)
    return sorted(
        profile.modules.values(),
        key=lambda module: (module.kind is Kind.KERNEL, -presence[numbers[module.build_id]]),
    )


def _segment_of(module: Module, offset: FileOffset) -> Segment | None:
    for segment in module.segments:
        if segment.p_offset <= offset < segment.p_offset + segment.p_filesz:
            return segment
    return None


def _label_number(value: str) -> int:
    """Return the number a label's value spells, 0 for anything else.

    A zero cannot be told from an unset field: it stays a string.
    """
    if not (value.isascii() and value.isdigit() and len(value) < 19):
        return 0
    return int(value) if not value.startswith("0") else 0
