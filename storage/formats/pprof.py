"""pprof: a profile as one gzipped protobuf that every profiling tool reads (google/pprof).

The encoder is in `pprof_encoder`; the decoder here undoes, field by field, what it does.

Follows pprof's own conventions, so that other people's tools agree with ours:

- two values per sample, `samples/count` and the profile's own (`cpu/nanoseconds`);
- one Mapping per executable segment of a module, with addresses as linked; several Lines of one
  Location are inlined calls, innermost first;
- stacks are leaf first. Only the encoder, the decoder and `bpf` reverse stacks;
- interpreted and JIT code has a Mapping named after its kind (`[python]`) without a build id.

What pprof has no field for is in comments (see `pprof_comments`) and in a Function's system_name:
its name, or `KIND MODULE` if the frame's kind or module is not the mapping's.

Files are foreign input. Names pass through `readable`, references and counts are checked, and any
error is a ProfileError that names it.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from google.protobuf import message

from storage.formats.limits import COUNT_LIMIT, OBJECT, Limits, exhaustion_named
from storage.formats.pprof_comments import Ours, read_comments
from storage.formats.pprof_encoder import Encoder
from storage.formats.pprof_message import ProfileMessage, check_parts, decompress
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
)
from symbolizer.text import readable

_INLINED_LIMIT = 1 << 25
"""Inlined calls on all stacks of a foreign file; 500,000 stacks have fewer than 30 million. If a
location has many and is many times on a stack, a file of 20 KB would fill the memory."""
_NS_PER_UNIT = {
    "nanoseconds": 1,
    "microseconds": 1_000,
    "milliseconds": 1_000_000,
    "seconds": 1_000_000_000,
}


def encode(profile: Profile) -> bytes:
    """Return a profile as gzipped pprof; equal profiles have equal bytes."""
    return Encoder(profile).encode()


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
    parsed = ProfileMessage()
    try:
        parsed.ParseFromString(plain)
    except message.DecodeError:
        raise ProfileError("cannot read pprof: this is not a profile, or a damaged one") from None
    return _Decoder(parsed).decode()


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
