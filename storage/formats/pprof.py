"""pprof: a profile as one gzipped protobuf that every profiling tool reads (google/pprof).

Encoder and decoder are in one file because each undoes what the other does, field by field.

Follows pprof's own conventions, so that other people's tools agree with ours:

- two values per sample, `samples/count` and the profile's own (`cpu/nanoseconds`);
- one Mapping per executable segment of a module, with addresses as linked; several Lines of one
  Location are inlined calls, innermost first;
- stacks are leaf first. Only this file and `bpf` reverse stacks;
- interpreted and JIT code has a Mapping named after its kind (`[python]`) without a build id.

What pprof has no field for is in comments (see `pprof_comments`) and in a Function's system_name:
its name, or `KIND MODULE` if the frame's kind or module is not the mapping's.

Files are foreign input. Names pass through `readable`, references and counts are checked, and any
error is a ProfileError that names it.
"""

import itertools
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from google.protobuf import message

from storage.formats.limits import COUNT_LIMIT, OBJECT, Limits, exhaustion_named
from storage.formats.pprof_comments import Ours, accounting_comment, modules_comment, read_comments
from storage.formats.pprof_message import check_parts, decompress, message_class
from storage.profile import (
    ALWAYS,
    Accounting,
    Labels,
    Profile,
    ProfileBuilder,
    ProfileError,
    Window,
    make_labels,
)
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
from symbolizer.text import readable

_PAGE_BYTES = 4096
_SAMPLES_AT_ONCE = 256
_INLINED_LIMIT = 1 << 25
"""Inlined calls on all stacks of a foreign file; 500,000 stacks have fewer than 30 million. If a
location has many and is many times on a stack, a file of 20 KB would fill the memory."""
_NUMBER_LABELS = frozenset({"pid", "tid"})
_NS_PER_UNIT = {
    "nanoseconds": 1,
    "microseconds": 1_000,
    "milliseconds": 1_000_000,
    "seconds": 1_000_000_000,
}

_ProfileMessage = message_class("everflame.pprof")


def encode(profile: Profile) -> bytes:
    """Return a profile as gzipped pprof; equal profiles have equal bytes."""
    return _Encoder(profile).encode()


def decode(content: bytes, limits: Limits = OBJECT) -> Profile:
    """Read pprof, gzipped or not, ours or that of another profiler.

    Of the values in a foreign file, `cpu/nanoseconds` is chosen, else the first time, else the
    default or last one. Times become nanoseconds. Its samples count as stored ticks.

    Raises:
        ProfileError: the bytes are damaged, are not a profile, or exceed a limit.
        SchemaError: a later version of this program wrote them.
    """
    with exhaustion_named():
        plain = decompress(content, limits)
        check_parts(plain, limits)
        return decode_checked(plain)


def decode_checked(plain: bytes) -> Profile:
    """Read decompressed pprof whose parts were counted, as `decode` does."""
    parsed = _ProfileMessage()
    try:
        parsed.ParseFromString(plain)
    except message.DecodeError:
        raise ProfileError("cannot read pprof: this is not a profile, or a damaged one") from None
    return _Decoder(parsed).decode()


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


class _Line(NamedTuple):
    """A line of a location, with its function's fields."""

    name: str
    system_name: str
    file: str
    first_line: int
    line: int = 0


class _Decoder:
    """The tables of one parsed pprof message, checked."""

    def __init__(self, parsed: Any) -> None:
        self._parsed = parsed
        self._raw_strings: Sequence[bytes] = parsed.string_table
        self._strings = [readable(text) for text in parsed.string_table]
        self._mappings = _by_id("mapping", parsed.mapping)
        self._functions: dict[int, _Line] = {}
        self._inlined = 0

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
            root_first = self._root_first(sample.location_id, numbers)
            builder.add(self._labels(sample.label), root_first, samples, value)
        if ours is not None:
            return builder.build(ours.window, ours.accounting)
        start_ns = max(0, parsed.time_nanos)
        end_ns = min(start_ns + max(0, parsed.duration_nanos), ALWAYS.end_ns)
        window = Window(start_ns, end_ns)
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
        """Return, by location id, the location's numbers in the builder, root first."""
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
            # Some writers drop addresses but keep build ids: one address then has many names.
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

    def _root_first(
        self, leaf_first: Sequence[int], numbers: Mapping[int, tuple[int, ...]]
    ) -> list[int]:
        """Return a stack as the builder's numbers, from the ids of its locations."""
        try:
            expanded = [numbers[i] for i in reversed(leaf_first)]
        except KeyError as error:
            raise ProfileError(f"cannot read pprof: no location has the id {error}") from None
        self._inlined += sum(map(len, expanded)) - len(expanded)
        if self._inlined > _INLINED_LIMIT:
            raise ProfileError(
                f"cannot read pprof: its stacks have more than {_INLINED_LIMIT:,} inlined calls"
            )
        return [number for each in expanded for number in each]

    def _mapping_of(self, location: Any) -> Any | None:
        if location.mapping_id == 0:
            return None
        if location.mapping_id not in self._mappings:
            raise ProfileError(f"cannot read pprof: no mapping has the id {location.mapping_id}")
        return self._mappings[location.mapping_id]

    def _read_functions(self, is_ours: bool) -> dict[int, _Line]:
        """Return, by function id, the fields that all of its lines share."""
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
        """Return the location of an address, undoing the encoder's translation.

        A foreign mapping also adds its module to the builder.
        """
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
        """Return a location for each line: without an address, its name is its identity."""
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


def _by_id(name: str, messages: Iterable[Any]) -> dict[int, Any]:
    found: dict[int, Any] = {}
    for each in messages:
        if each.id == 0 or each.id in found:
            raise ProfileError(f"cannot read pprof: {name} id {each.id} is not unique")
        found[each.id] = each
    return found


def kind_and_module(name: str, system_name: str, usual: tuple[Kind, str]) -> tuple[Kind, str]:
    """Return a function's kind and module: of its system_name, else of the mapping."""
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
