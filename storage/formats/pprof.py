"""pprof: a profile as one gzipped protobuf that every profiling tool reads (google/pprof).

Follows pprof's own conventions, so that other people's tools agree with ours:

- two values per sample, `samples/count` and the profile's own (`cpu/nanoseconds`);
- one Mapping per executable segment of a module, with addresses as linked; several Lines of one
  Location are inlined calls, innermost first;
- stacks are leaf first. This file and `bpf` are the only places that turn them round;
- interpreted and JIT code has a Mapping named after its kind (`[python]`) without a build id.

What pprof has no field for lies where other tools do not look. `comment[0]` is `everflame ` and
the accounting as JSON, `comment[1]` `everflame-modules ` and each module's kind and segments. A
Function's system_name is its name; where the frame's kind or module is not the mapping's, it is
`KIND MODULE` instead.

Files are foreign input. Names pass through `readable`, references and counts are checked, and
whatever is wrong is a ProfileError that says what.
"""

import functools
import importlib.metadata
import itertools
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import orjson
from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

from storage.profile import (
    Accounting,
    Host,
    Labels,
    Profile,
    ProfileBuilder,
    ProfileError,
    SchemaError,
    Window,
    make_labels,
)
from symbolizer.location import (
    AddressLocation,
    ElfAddress,
    FileOffset,
    Frame,
    Kind,
    Module,
    NamedLocation,
    Segment,
    is_bounded,
)
from symbolizer.text import readable

SCHEMA = 1

SIZE_LIMIT_BYTES = 64 * 1024 * 1024
"""Decompressed size of a profile. 200,000 stacks of 30 frames take 16 MB. A larger one is refused,
because a few hundred kilobytes of gzip could otherwise fill the memory: protobuf makes 25 times as
much of a file that is nothing but empty samples."""

COUNT_LIMIT = 2**62
"""Sum of a file's samples or values. A larger one is refused: the columns are 64 bits wide."""

_ACCOUNTING = "everflame "
_MODULES = "everflame-modules "
_PAGE_BYTES = 4096
_SAMPLES_AT_ONCE = 256
_NUMBER_LABELS = frozenset({"pid", "tid"})
_NS_PER_UNIT = {
    "nanoseconds": 1,
    "microseconds": 1_000,
    "milliseconds": 1_000_000,
    "seconds": 1_000_000_000,
}

# Field numbers of google/pprof's profile.proto, in order from 1. A capital is a message type; `*`
# marks a repeated field. The string table is declared as bytes, which is the same on the wire:
# protobuf refuses a whole file for one string that is not UTF-8, and writers in Go and C++ do not
# check theirs.
_SCHEMA = {
    "Profile": "*sample_type:ValueType *sample:Sample *mapping:Mapping *location:Location"
    " *function:Function *string_table:bytes drop_frames:int64 keep_frames:int64 time_nanos:int64"
    " duration_nanos:int64 period_type:ValueType period:int64 *comment:int64"
    " default_sample_type:int64",
    "ValueType": "type:int64 unit:int64",
    "Sample": "*location_id:uint64 *value:int64 *label:Label",
    "Label": "key:int64 str:int64 num:int64 num_unit:int64",
    "Mapping": "id:uint64 memory_start:uint64 memory_limit:uint64 file_offset:uint64"
    " filename:int64 build_id:int64 has_functions:bool has_filenames:bool has_line_numbers:bool"
    " has_inline_frames:bool",
    "Location": "id:uint64 mapping_id:uint64 address:uint64 *line:Line is_folded:bool",
    "Line": "function_id:uint64 line:int64",
    "Function": "id:uint64 name:int64 system_name:int64 filename:int64 start_line:int64",
}


# protobuf's classes are made at run time and have no types: Any, here and below.
def message_class(package: str, unread: frozenset[str] = frozenset()) -> Any:
    """Build the class of a profile from the table above.

    Generated code would be tied to a version of protobuf. Messages of the types in `unread` stay
    bytes, for a reader that goes through thousands of them at once.
    """
    types = descriptor_pb2.FieldDescriptorProto
    scalars = {
        "int64": types.TYPE_INT64,
        "uint64": types.TYPE_UINT64,
        "bool": types.TYPE_BOOL,
        "bytes": types.TYPE_BYTES,
    }
    file = descriptor_pb2.FileDescriptorProto(
        name=f"{package}.proto", package=package, syntax="proto3"
    )
    for name, fields in _SCHEMA.items():
        described = file.message_type.add(name=name)
        for number, declared in enumerate(fields.split(), start=1):
            field_name, kind = declared.lstrip("*").split(":")
            added = described.field.add(name=field_name, number=number)
            repeated = declared.startswith("*")
            added.label = types.LABEL_REPEATED if repeated else types.LABEL_OPTIONAL
            added.type = scalars.get("bytes" if kind in unread else kind, types.TYPE_MESSAGE)
            if added.type == types.TYPE_MESSAGE:
                added.type_name = f".{package}.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.Profile"))


_ProfileMessage = message_class("everflame.pprof")


def encode(profile: Profile) -> bytes:
    """Write a profile as gzipped pprof. The same profile always gives the same bytes."""
    return _Encoder(profile).encode()


def decode(content: bytes, size_limit_bytes: int = SIZE_LIMIT_BYTES) -> Profile:
    """Read pprof, gzipped or not, ours or that of another profiler.

    A foreign file may hold several values: `cpu/nanoseconds` is taken, else the first that is a
    time, else the default or last one. Times become nanoseconds. Its samples count as stored ticks.

    Raises:
        ProfileError: the bytes are damaged, are not a profile, or hold more than
            `size_limit_bytes` when decompressed.
        SchemaError: a later version of this program wrote them.
    """
    parsed = _ProfileMessage()
    try:
        parsed.ParseFromString(decompress(content, size_limit_bytes))
    except message.DecodeError as error:
        raise ProfileError("cannot read pprof: this is not a profile, or a damaged one") from error
    return _Decoder(parsed).decode()


def decompress(content: bytes, limit_bytes: int) -> bytes:
    parts: list[bytes] = []
    room = limit_bytes
    while content.startswith(b"\x1f\x8b"):  # a gzip file may have several members (RFC 1952)
        inflater = zlib.decompressobj(wbits=31)
        try:
            parts.append(inflater.decompress(content, room + 1))
        except zlib.error as error:
            raise ProfileError(f"cannot read pprof: damaged gzip ({error})") from error
        room -= len(parts[-1])
        if room < 0:
            break
        if not inflater.eof:
            raise ProfileError("cannot read pprof: the gzip data end too early")
        content = inflater.unused_data
    if room < 0 or (not parts and len(content) > limit_bytes):
        raise ProfileError(f"cannot read pprof: it holds more than {limit_bytes} bytes")
    if parts and content:
        raise ProfileError("cannot read pprof: there is something else after the gzip data")
    return b"".join(parts) or content


@functools.cache
def _producer() -> str:
    try:
        return f"everflame/{importlib.metadata.version('everflame')}"
    except importlib.metadata.PackageNotFoundError:
        return "everflame"


class _Encoder:
    """The tables of one pprof message while they grow."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self._message = _ProfileMessage()
        self._strings: dict[str, int] = {"": 0}
        self._functions: dict[tuple[str, str, str, int], int] = {}
        self._mappings: dict[tuple[str, str, Segment | None], Any] = {}

    def encode(self) -> bytes:
        profile, out, head = self._profile, self._message, _ProfileMessage()
        for type_, unit in (("samples", "count"), (profile.type, profile.unit)):
            head.sample_type.add(type=self._string(type_), unit=self._string(unit))
        out.period_type.type = self._string(profile.type)
        out.period_type.unit = self._string(profile.unit)
        out.period = profile.period_ns
        out.default_sample_type = self._string(profile.type)
        out.time_nanos = profile.window.start_ns
        out.duration_nanos = profile.window.end_ns - profile.window.start_ns
        for comment in (_accounting_comment(profile), _modules_comment(profile.modules)):
            out.comment.append(self._string(comment))
        for module in _by_presence(profile):
            for segment in module.segments or (None,):
                self._mapping(module.build_id, module.path, segment)
        for number in range(len(profile.locations)):
            self._add_location(number)
        label_sets = [self._labels(labels) for labels in profile.label_sets]
        out.string_table.extend(text.encode("utf-8", "replace") for text in self._strings)
        deflater = zlib.compressobj(1, zlib.DEFLATED, wbits=31)  # writes no time: deterministic
        # Messages one after the other are one: what is serialized of the samples is given back.
        messages = itertools.chain([head], self._samples(label_sets), [out])
        parts = [deflater.compress(each.SerializeToString(deterministic=True)) for each in messages]
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
                # The end of a whole file is not known. A power of two is the same for most
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

    def _samples(self, label_sets: Sequence[list[dict[str, int]]]) -> Iterator[Any]:
        """Return the samples in messages of a few hundred: all at once take megabytes."""
        profile = self._profile
        leaf_first = profile.stack_locations[::-1] + 1
        # Reversed as a whole, a stack that ended at `end` starts at `len - end`, leaf first.
        starts = (len(leaf_first) - profile.stack_offsets[1:]).tolist()
        ends = (len(leaf_first) - profile.stack_offsets[:-1]).tolist()
        columns = (profile.row_labels, profile.row_stacks, profile.row_samples, profile.row_values)
        for begin in range(0, len(profile.row_stacks), _SAMPLES_AT_ONCE):
            out = _ProfileMessage()
            rows = (column[begin : begin + _SAMPLES_AT_ONCE].tolist() for column in columns)
            for labels, stack, samples, value in zip(*rows, strict=True):
                location_id = leaf_first[starts[stack] : ends[stack]].tolist()
                sample = out.sample.add(location_id=location_id, value=(samples, value))
                for label in label_sets[labels]:
                    sample.label.add(**label)
            yield out

    def _labels(self, labels: Labels) -> list[dict[str, int]]:
        fields = []
        for name, value in labels:
            number = _label_number(value) if name in _NUMBER_LABELS else 0
            content = {"num": number} if number else {"str": self._string(value)}
            fields.append({"key": self._string(name), **content})
        return fields


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


def _accounting_comment(profile: Profile) -> str:
    accounting = profile.accounting
    host = accounting.hosts[0] if len(accounting.hosts) == 1 else Host("", "")
    record = {
        "schema": SCHEMA,
        "producer": _producer(),
        "type": profile.type,
        "window": profile.window,
        "host": host.name,
        "host_id": host.host_id,
        "hosts": accounting.hosts,
        "cpus": accounting.cpus,
        "nonidle_ns": accounting.nonidle_ns,
        "profiled_ns": accounting.profiled_ns,
        "period_ns": profile.period_ns,
        "ticks": accounting.ticks,
        "idle": accounting.idle,
        "filtered": accounting.filtered,
        "stored": accounting.stored,
        "lost": dict(accounting.lost),
        "stops": dict(accounting.stops),
        "misses": dict(accounting.misses),
        "services": [
            {"labels": dict(labels), "present_ns": present_ns}
            for labels, present_ns in accounting.services.items()
        ],
        "agent": {"cpu_ns": accounting.agent_cpu_ns, "rss_bytes": accounting.agent_rss_bytes},
    }
    # The default turns a NamedTuple, which orjson does not know, into a list. Sorted keys, because
    # equal mappings may differ in order and equal profiles are to give equal bytes.
    return _ACCOUNTING + orjson.dumps(record, default=list, option=orjson.OPT_SORT_KEYS).decode()


def _modules_comment(modules: Mapping[str, Module]) -> str:
    records = {
        module.build_id: {"kind": module.kind, "path": module.path, "segments": module.segments}
        for module in modules.values()
    }
    return _MODULES + orjson.dumps(records, default=list).decode()


class _Line(NamedTuple):
    """A line of a location, with its function's fields."""

    name: str
    system_name: str
    file: str
    first_line: int
    line: int = 0


@dataclass(frozen=True, slots=True)
class Ours:
    """What our comments say: everything that pprof has no field for."""

    type: str
    period_ns: int
    window: Window
    accounting: Accounting
    modules: dict[str, Module] = field(default_factory=dict)


class _Decoder:
    """The tables of one parsed pprof message, checked."""

    def __init__(self, parsed: Any) -> None:
        self._parsed = parsed
        self._raw_strings: Sequence[bytes] = parsed.string_table
        self._strings = [readable(text) for text in parsed.string_table]
        self._mappings = _by_id("mapping", parsed.mapping)
        self._functions: dict[int, _Line] = {}

    def decode(self) -> Profile:
        parsed = self._parsed
        ours = self._read_comments()
        samples_at, value_at = self._choose_values(ours)
        type_, unit = self._value_type(parsed.sample_type[value_at])
        scale = _NS_PER_UNIT.get(unit, 1)
        unit = "nanoseconds" if unit in _NS_PER_UNIT else unit
        period_ns = ours.period_ns if ours else self._foreign_period()
        builder = ProfileBuilder(period_ns, type_, unit)
        if ours is not None:
            builder.modules.update(ours.modules)
        self._functions = self._read_functions(is_ours=ours is not None)
        numbers = self._locations(builder, ours)
        stored, total = 0, 0
        for sample in parsed.sample:
            values = sample.value
            if len(values) != len(parsed.sample_type):
                raise ProfileError("cannot read pprof: a sample has too many values or too few")
            value = values[value_at] * scale
            # Without a count and a period, nothing says how often a stack was seen.
            derived = max(1, value // period_ns) if period_ns > 1 else 1
            samples = values[samples_at] if samples_at >= 0 else derived
            if value < 0 or samples < 0:
                raise ProfileError(
                    "cannot read pprof: a negative value, so this is a difference, not a profile"
                )
            if value == 0 and samples == 0:
                continue  # Go's heap profiles keep stacks of which nothing is in use any more
            stored, total = stored + samples, total + value
            if max(stored, total) > COUNT_LIMIT:
                raise ProfileError("cannot read pprof: its values add up to more than 2^62")
            try:
                leaf_first = [numbers[i] for i in sample.location_id]
            except KeyError as error:
                raise ProfileError(f"cannot read pprof: no location has the id {error}") from None
            root_first = [number for expanded in reversed(leaf_first) for number in expanded]
            builder.add(self._labels(sample.label), root_first, samples, value)
        if ours is not None:
            return builder.build(ours.window, ours.accounting)
        start_ns = max(0, parsed.time_nanos)
        window = Window(start_ns, start_ns + max(0, parsed.duration_nanos))
        return builder.build(window, Accounting(ticks=stored, stored=stored))

    def _string(self, index: int) -> str:
        if not 0 <= index < len(self._strings):
            if index == 0:
                return ""
            raise ProfileError(f"cannot read pprof: it has no string number {index}")
        return self._strings[index]

    def _value_type(self, value_type: Any) -> tuple[str, str]:
        return self._string(value_type.type), self._string(value_type.unit)

    def _choose_values(self, ours: Ours | None) -> tuple[int, int]:
        """Return the positions of the sample count (-1 if there is none) and of the value."""
        types = [self._value_type(value_type) for value_type in self._parsed.sample_type]
        if not types:
            raise ProfileError("cannot read pprof: it does not say what its values are")
        if ours is not None:
            if types[0] != ("samples", "count") or len(types) != 2 or types[1][0] != ours.type:
                raise ProfileError(f"cannot read pprof: unexpected values {types}")
            if ours.type == "cpu" and types[1][1] != "nanoseconds":
                raise ProfileError(f"cannot read pprof: cpu in {types[1][1]!r}, not nanoseconds")
            return 0, 1
        times = [i for i, (_, unit) in enumerate(types) if unit in _NS_PER_UNIT]
        cpu = [i for i in times if types[i][0] == "cpu"]
        default = self._string(self._parsed.default_sample_type)
        named = [i for i, (name, _) in enumerate(types) if name == default]
        value_at = [*cpu, *times, *named, len(types) - 1][0]
        counts = [i for i, (_, unit) in enumerate(types) if unit == "count"]
        before = [i for i in counts if i < value_at]
        return [*before[-1:], *counts, -1][0], value_at

    def _foreign_period(self) -> int:
        unit = self._string(self._parsed.period_type.unit)
        return max(1, int(self._parsed.period) * _NS_PER_UNIT.get(unit, 1))

    def _labels(self, labels: Iterable[Any]) -> Labels:
        values: dict[str, list[str]] = {}
        for label in labels:
            unit = self._string(label.num_unit)
            text = self._string(label.str)
            if label.num:
                text = f"{label.num} {unit}".rstrip()
            values.setdefault(self._string(label.key), []).append(text)
        return make_labels({name: ", ".join(texts) for name, texts in values.items()})

    def _locations(self, builder: ProfileBuilder, ours: Ours | None) -> dict[int, tuple[int, ...]]:
        """Give, by location id, the location's numbers in the builder, root first."""
        numbers: dict[int, tuple[int, ...]] = {}
        seen: dict[AddressLocation, list[_Line]] = {}
        for location in self._parsed.location:
            if location.id == 0 or location.id in numbers:
                raise ProfileError(f"cannot read pprof: location id {location.id} is not unique")
            lines = [self._line(line) for line in location.line]
            mapping = self._mapping_of(location)
            if ours is not None and (mapping is None or not mapping.build_id):
                numbers[location.id] = self._named(builder, mapping, lines)
                continue
            address = self._address(builder, mapping, location.address, bool(ours))
            # Some writers drop addresses but keep build ids: then one address has many names.
            is_place = location.address and mapping is not None and mapping.build_id
            if (
                ours is None
                and lines
                and not (is_place and seen.setdefault(address, lines) == lines)
            ):
                numbers[location.id] = self._foreign_named(builder, mapping, lines)
                continue
            module = builder.modules.get(address.build_id)
            frames = self._frames(lines, module, address.build_id, is_ours=ours is not None)
            numbers[location.id] = (builder.location(address, frames),)
        return numbers

    def _mapping_of(self, location: Any) -> Any | None:
        if location.mapping_id == 0:
            return None
        if location.mapping_id not in self._mappings:
            raise ProfileError(f"cannot read pprof: no mapping has the id {location.mapping_id}")
        return self._mappings[location.mapping_id]

    def _read_functions(self, is_ours: bool) -> dict[int, _Line]:
        """Give, by function id, what all of its lines share."""
        functions = {}
        for id_, function in _by_id("function", self._parsed.function).items():
            name, system_name = self._string(function.name), self._string(function.system_name)
            functions[id_] = _Line(
                name=name if is_ours else name or system_name,
                system_name=system_name,
                file=self._string(function.filename),
                first_line=max(0, function.start_line),
            )
        return functions

    def _line(self, line: Any) -> _Line:
        function = self._functions.get(line.function_id)
        if function is None:
            raise ProfileError(f"cannot read pprof: no function has the id {line.function_id}")
        return function._replace(line=line.line) if line.line > 0 else function

    def _address(
        self, builder: ProfileBuilder, mapping: Any | None, address: int, is_ours: bool
    ) -> AddressLocation:
        """Undo the encoder's translation; a foreign mapping also makes its module known."""
        path, build_id, offset = "[unknown]", "", address
        if mapping is not None:
            path = self._string(mapping.filename) or path
            build_id = self._string(mapping.build_id)
            if address >= mapping.memory_start:
                offset = address - mapping.memory_start + mapping.file_offset
        if not build_id:
            build_id = f"[{path.rpartition('/')[2].strip('[]') or 'unknown'}]"
        if not is_ours and build_id not in builder.modules:
            kind = Kind.KERNEL if path.startswith(("[kernel", "[guest.kernel")) else Kind.NATIVE
            builder.modules[build_id] = Module(build_id, path, kind)
        return AddressLocation(build_id, FileOffset(offset % 2**64))

    def _frames(
        self, lines: Sequence[_Line], module: Module | None, build_id: str, is_ours: bool
    ) -> tuple[Frame, ...]:
        module_name = module.name if module else build_id
        kind = module.kind if module else Kind.NATIVE
        frames = []
        for i, line in enumerate(lines):
            usual = (Kind.INLINED if i < len(lines) - 1 else kind, module_name)
            if is_ours:
                frame_kind, frame_module = kind_and_module(line.name, line.system_name, usual)
            else:
                frame_kind, frame_module = _foreign_kind(line.file, usual[0]), module_name
            frames.append(Frame(line.name, frame_module, frame_kind, line.file, line.line))
        return tuple(frames)

    def _named(
        self, builder: ProfileBuilder, mapping: Any | None, lines: Sequence[_Line]
    ) -> tuple[int, ...]:
        place = self._string(mapping.filename) if mapping is not None else ""
        kind_name = place.strip("[]")
        if len(lines) != 1 or kind_name not in set(Kind):
            raise ProfileError(f"cannot read pprof: a location of {place!r} is not one named line")
        (line,) = lines
        kind, module = kind_and_module(line.name, line.system_name, (Kind(kind_name), place))
        location = NamedLocation(line.name, module, kind, line.file, line.first_line, line.line)
        return (
            builder.location(location, (Frame(line.name, module, kind, line.file, line.line),)),
        )

    def _foreign_named(
        self, builder: ProfileBuilder, mapping: Any | None, lines: Sequence[_Line]
    ) -> tuple[int, ...]:
        """Make every line a location of its own: without an address there is no other identity."""
        path = self._string(mapping.filename) if mapping is not None else ""
        usual = Kind.KERNEL if path.startswith(("[kernel", "[guest.kernel")) else Kind.NATIVE
        numbers = []
        for i, line in enumerate(lines):
            kind = Kind.INLINED if i < len(lines) - 1 else _foreign_kind(line.file, usual)
            frame = Frame(line.name, path.rpartition("/")[2] or path, kind, line.file, line.line)
            location = NamedLocation(*frame[:4], line.first_line, line.line)
            numbers.append(builder.location(location, (frame,)))
        return tuple(reversed(numbers))

    def _read_comments(self) -> Ours | None:
        for index in self._parsed.comment:
            self._string(index)
        return read_comments(self._raw_strings[i] for i in self._parsed.comment if i)


def read_comments(comments: Iterable[bytes]) -> Ours | None:
    """Read our own comments, if there are any.

    A file that another tool merged out of several of ours has several: they add up.

    Raises:
        ProfileError: one of ours is damaged.
        SchemaError: a later version of this program wrote them.
    """
    found: list[Ours] = []
    modules: dict[str, Module] = {}
    for comment in comments:
        if comment.startswith(_ACCOUNTING.encode()):
            found.append(_parse_accounting(_parse_json(comment[len(_ACCOUNTING) :])))
        elif comment.startswith(_MODULES.encode()):
            modules.update(_parse_modules(comment[len(_MODULES) :]))
    if not found:
        return None
    window, accounting = found[0].window, Accounting()
    for ours in found:
        window = window.union(ours.window)
        accounting = accounting.merge(ours.accounting)
    period_ns = min(ours.period_ns for ours in found)
    return Ours(found[0].type, period_ns, window, accounting, modules)


def _by_id(name: str, messages: Iterable[Any]) -> dict[int, Any]:
    found: dict[int, Any] = {}
    for each in messages:
        if each.id == 0 or each.id in found:
            raise ProfileError(f"cannot read pprof: {name} id {each.id} is not unique")
        found[each.id] = each
    return found


def kind_and_module(name: str, system_name: str, usual: tuple[Kind, str]) -> tuple[Kind, str]:
    """Read what a Function's system_name says where it is not what the mapping says."""
    if system_name in {name, ""}:
        return usual
    kind, _, module = system_name.lstrip(" ").partition(" ")
    if kind not in set(Kind):
        return usual
    return Kind(kind), module


def _foreign_kind(file: str, usual: Kind) -> Kind:
    if usual is Kind.NATIVE:
        return {".go": Kind.GO, ".py": Kind.PYTHON}.get(file[file.rfind(".") :], usual)
    return usual


class _Record:
    """A JSON object from outside: asking for a field checks its type, others are ignored."""

    def __init__(self, fields: object) -> None:
        if not isinstance(fields, dict):
            raise ProfileError("cannot read pprof: our comment is not what it should be")
        self._fields: dict[str, object] = fields

    def integer(self, name: str) -> int:
        return _checked_integer(self._fields.get(name, 0), name)

    def text(self, name: str) -> str:
        return _checked_text(self._fields.get(name, ""), name)

    def array(self, name: str) -> list[Any]:
        value = self._fields.get(name, [])
        if not isinstance(value, list):
            raise ProfileError(f"cannot read pprof: {name!r} in our comment is not a list")
        return value

    def record(self, name: str) -> "_Record":
        return _Record(self._fields.get(name, {}))

    def counts(self, name: str) -> dict[str, int]:
        fields = self.record(name)._fields
        return {
            _checked_text(key, name): _checked_integer(count, name) for key, count in fields.items()
        }

    def names(self) -> Iterable[str]:
        return self._fields


def _checked_integer(value: object, name: str, limit: int = COUNT_LIMIT) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= limit:
        raise ProfileError(f"cannot read pprof: {name!r} in our comment is not a count")
    return value


def _checked_text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise ProfileError(f"cannot read pprof: {name!r} in our comment is not text")
    return readable(value.encode())


def _parse_json(content: bytes) -> _Record:
    try:
        return _Record(orjson.loads(content))
    except orjson.JSONDecodeError as error:
        raise ProfileError(f"cannot read pprof: our comment is damaged ({error})") from error


def _parse_accounting(record: _Record) -> Ours:
    schema = record.integer("schema")
    if schema > SCHEMA:
        raise SchemaError(
            f"cannot read pprof: it has schema {schema}, this version knows up to {SCHEMA} "
            "(a newer everflame reads it)"
        )
    bounds = [_checked_integer(bound, "window") for bound in record.array("window")]
    if len(bounds) != 2 or bounds[0] > bounds[1]:
        raise ProfileError("cannot read pprof: the window in our comment is not an interval")
    hosts = [_parse_host(host) for host in record.array("hosts")]
    if not hosts and record.text("host_id"):
        hosts = [Host(record.text("host"), record.text("host_id"))]
    services: dict[Labels, int] = {}
    for fields in record.array("services"):
        service = _Record(fields)
        labels = service.record("labels")
        key = make_labels({readable(name.encode()): labels.text(name) for name in labels.names()})
        services[key] = services.get(key, 0) + service.integer("present_ns")
    agent = record.record("agent")
    accounting = Accounting(
        hosts=tuple(sorted(hosts)),
        cpus=record.integer("cpus"),
        nonidle_ns=record.integer("nonidle_ns"),
        profiled_ns=record.integer("profiled_ns"),
        ticks=record.integer("ticks"),
        idle=record.integer("idle"),
        filtered=record.integer("filtered"),
        stored=record.integer("stored"),
        lost=record.counts("lost"),
        stops=record.counts("stops"),
        misses=record.counts("misses"),
        services=services,
        agent_cpu_ns=agent.integer("cpu_ns"),
        agent_rss_bytes=agent.integer("rss_bytes"),
    )
    return Ours(
        record.text("type"), max(1, record.integer("period_ns")), Window(*bounds), accounting
    )


def _parse_host(host: object) -> Host:
    if not isinstance(host, list) or len(host) != 2:
        raise ProfileError("cannot read pprof: 'hosts' in our comment is not a list of pairs")
    return Host(_checked_text(host[0], "hosts"), _checked_text(host[1], "hosts"))


@functools.lru_cache(maxsize=16)  # a host's modules are the same in most of its windows
def _parse_modules(content: bytes) -> Mapping[str, Module]:
    records = _parse_json(content)
    modules = {}
    for name in records.names():
        record = records.record(name)
        build_id, kind = readable(name.encode()), record.text("kind")
        segments = []
        for bounds in record.array("segments"):
            if not isinstance(bounds, list) or len(bounds) != 3:
                raise ProfileError("cannot read pprof: a segment in our comment is damaged")
            vaddr, offset, size = (
                _checked_integer(bound, "segments", 2**64 - 1) for bound in bounds
            )
            segments.append(Segment(ElfAddress(vaddr), FileOffset(offset), size))
        # A kind that a later version invented is drawn like native code.
        known = Kind(kind) if kind in set(Kind) else Kind.NATIVE
        modules[build_id] = Module(build_id, record.text("path"), known, tuple(segments))
    return modules
