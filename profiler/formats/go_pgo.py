"""Write what `go build -pgo` takes: a CPU profile of a Go program as Go's own runtime makes it.

Go's compiler looks at the two innermost Locations of each stack, with the inlined calls in them. It
knows a call by the names of both functions and by its line, counted from where the calling function
begins (cmd/internal/pgo, internal/profile/graph.go in Go's sources). A profile of ours has neither:
its Go frames are addresses, with the names of functions. Functions, lines and inlined calls are
read from the program itself, by `symbolizer.symbols.golines`; a stripped program has them, too.

As in a profile of runtime/pprof

- a stack has Go functions only: what the kernel, the vDSO or C code does counts as done by the Go
  function that has called it, and the stack begins where Go code was last called by other code;
- wrappers, which the compiler made to call a method or what is deferred, are left out, and so is
  runtime.goexit: the compiler looks for the call of the method itself;
- a Location is an address; its Lines are the inlined calls there, innermost first, and each
  Function says where it begins.

A stack that ends in `[rest]` is left out: nobody knows which function was running. A function that
is just returning stands alone: its caller is missing in stacks of ours (`symbolizer.unwind.go`).
"""

import contextlib
import os
import re
import stat
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from profiler.text import counted, listed, path_text, percent
from storage.columns import Columns
from storage.formats.pprof_message import ProfileMessage
from storage.profile import Integers
from symbolizer.location import FileOffset, Module
from symbolizer.symbols.elf import Elf, FileSource, UnreadableElf, read_elf
from symbolizer.symbols.golines import GoCall, GoLines
from symbolizer.symbols.gopclntab import open_go_table

_OUTERMOST = b"runtime.goexit"
_GO_FILE = re.compile(rb"\.go$")
_GO_FUNCTION = re.compile(rb"^runtime\.(main|goexit|mcall|mstart|systemstack)(\.abi0)?$")
"""Where files are not known."""
_REST = "[rest]"
"""The build id of what stands for parts of stacks that were too many to be kept."""
_PAGE_BYTES = 4096
_SHOWN = 4
_SHOWN_ID = 16


class GoPgoError(ValueError):
    """A profile or a program that cannot be used; the message says why, and what to do."""


class GoProfile(NamedTuple):
    """A profile for `go build`, and sentences about what is in it and what was left out."""

    content: bytes
    remarks: list[str]


class _Build(NamedTuple):
    """One build of a Go program in a profile, and its samples, also by service."""

    module: Module
    samples: int
    services: Counter[str]

    def described(self, samples: int) -> str:
        shown = self.module.build_id[:_SHOWN_ID]
        return f"{self.module.name} (build id {shown}, {percent(self.samples, samples)})"


class _Program(NamedTuple):
    """A program on this machine."""

    path: str
    elf: Elf
    lines: GoLines


def encode(profile: Columns, binaries: Sequence[str] = ()) -> GoProfile:
    """Return the samples of one Go program, as gzipped pprof.

    The program is read from `binaries`, which also select it, by its build id; or from its own
    path, if that build is there on this machine.

    Raises:
        GoPgoError: there is no Go code, there are several programs, or the program is not found.
    """
    if (profile.type, profile.unit) != ("cpu", "nanoseconds"):
        raise GoPgoError(f"go build takes CPU profiles, but this is a profile of {profile.type}")
    with contextlib.ExitStack() as files:
        named = {each.elf.build_id: each for each in (_open(file, files) for file in binaries)}
        builds = _find_builds(profile, named)
        chosen = _choose(builds, named, profile)
        found = {
            each.module.build_id: named.get(each.module.build_id) or _find(each.module, files)
            for each in chosen
        }
        programs = {build_id: program for build_id, program in found.items() if program}
        missing = [each for each in chosen if each.module.build_id not in programs]
        if not programs:
            raise GoPgoError(
                "go build needs the lines of calls, which are read from the program:"
                f" {_where_missing(missing, chosen)}"
            )
        encoder = _Encoder(profile, programs)
        content = encoder.encode()
    share = percent(encoder.samples, profile.total_samples)
    counts = counted(encoder.samples, "sample")
    remarks = [f"{counts} of {chosen[0].module.name}, {share} of all that are selected"]
    if encoder.folded:
        remarks.append(f"left out {counted(encoder.folded, 'sample')} whose stacks end in {_REST}")
    if missing:
        remarks.append(f"left out builds: {_where_missing(missing, chosen)}")
    others = {each.module.name for each in builds} - {each.module.name for each in chosen}
    if others:
        remarks.append(f"left out other Go programs: {listed(sorted(others), _SHOWN)}")
    return GoProfile(content, remarks)


def _open(file: str, files: contextlib.ExitStack) -> _Program:
    return _program(file, _open_elf(file, files))


def _find(module: Module, files: contextlib.ExitStack) -> _Program | None:
    """Return the program where it ran, or as it still runs, if the same build is there."""
    for path in _candidates(module.path):
        try:
            elf = _open_elf(path, files)
        except GoPgoError:
            continue
        if elf.build_id == module.build_id:
            return _program(path, elf)
    return None


def _candidates(path: str) -> Iterator[str]:
    """Return the path, and what runs by it: in a container, or a file that was replaced since."""
    yield path
    for exe in Path("/proc").glob("[0-9]*/exe"):
        with contextlib.suppress(OSError):  # it has exited, or is another user's
            if str(exe.readlink()).removesuffix(" (deleted)") == path:
                yield str(exe)


def _open_elf(file: str, files: contextlib.ExitStack) -> Elf:
    """Open a file, which stays open as long as `files`; it may be anything: paths are foreign."""
    try:
        fd = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise GoPgoError(f"cannot read {path_text(file)}: {reason}") from error
    files.callback(os.close, fd)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise GoPgoError(f"cannot read {path_text(file)}: not a regular file")
    try:
        return read_elf(FileSource(fd))
    except UnreadableElf as error:
        raise GoPgoError(f"cannot read {path_text(file)}: {error.reason}") from error


def _program(file: str, elf: Elf) -> _Program:
    try:
        table = open_go_table(elf)
        if table is None:
            raise GoPgoError(f"{path_text(file)} is not a Go program")
        if not table.has_first_lines:
            raise GoPgoError(
                f"{path_text(file)} was built by Go before 1.20, which does not record the lines"
                " that go build -pgo needs"
            )
        return _Program(file, elf, GoLines(elf, table))
    except UnreadableElf as error:
        raise GoPgoError(f"cannot read {path_text(file)}: {error.reason}") from error


def _find_builds(profile: Columns, named: Collection[str]) -> list[_Build]:
    """Return the builds of Go programs in a profile, the one with most samples first."""
    build_ids = sorted({*_go_build_ids(profile), *named})
    runs = _Runs.of(profile, _owners(profile, build_ids))
    owners = runs.owners[profile.rows[:, 1].astype(np.int64)]
    services: list[Counter[str]] = [Counter() for _ in build_ids]
    names = [dict(labels).get("service", "") for labels in profile.label_sets]
    rows = zip(
        owners.tolist(), profile.rows[:, 0].tolist(), profile.counts[:, 0].tolist(), strict=True
    )
    for owner, labels, samples in rows:
        if owner >= 0:
            services[owner][names[labels]] += samples
    builds = [
        _Build(profile.modules.get(build_id) or Module(build_id, build_id), each.total(), each)
        for build_id, each in zip(build_ids, services, strict=True)
        if each
    ]
    return sorted(builds, key=lambda build: (-build.samples, build.module.build_id))


def _go_build_ids(profile: Columns) -> list[str]:
    """Return the build ids of what has functions in Go's files, or Go's runtime."""
    functions, files = profile.frames[:, [0, 3]].T.astype(np.int64)
    is_go = np.zeros((len(profile.texts), 2), dtype=bool)
    for i, (texts, pattern) in enumerate(((functions, _GO_FUNCTION), (files, _GO_FILE))):
        used = np.unique(texts)
        is_go[used, i] = [bool(pattern.search(text)) for text in profile.texts.take(used)]
    offsets = profile.frame_offsets.astype(np.int64)
    lengths = offsets[1:] - offsets[:-1]
    places = np.repeat(np.arange(len(lengths)), lengths)[is_go[functions, 0] | is_go[files, 1]]
    texts = profile.texts.take(np.unique(profile.locations[places, 0].astype(np.int64)))
    return [text.decode() for text in texts]


def _owners(profile: Columns, build_ids: Sequence[str]) -> Integers:
    """Return which of the builds each location belongs to, by its place among them; else -1."""
    numbers = {build_id.encode(): i for i, build_id in enumerate(build_ids)}
    texts = profile.locations[:, 0].astype(np.int64)
    used = np.unique(texts)
    by_text = np.full(len(profile.texts), -1, dtype=np.int64)
    by_text[used] = [numbers.get(text, -1) for text in profile.texts.take(used)]
    return np.where(profile.locations[:, 2] == 0, by_text[texts], -1)


class _Runs(NamedTuple):
    """By stack, the innermost frames that are of one build and follow each other directly.

    Attributes:
        starts, ends: their range in `Columns.stack_words`.
        owners: which build's they are, -1 if the stack has none.
    """

    starts: Integers
    ends: Integers
    owners: Integers

    @classmethod
    def of(cls, profile: Columns, owners: Integers) -> "_Runs":
        offsets = profile.stack_offsets.astype(np.int64)
        by_word = owners[profile.stack_words.astype(np.int64)]
        stacks = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        last = np.full(len(offsets) - 1, -1, dtype=np.int64)
        owned = np.flatnonzero(by_word >= 0)
        last[stacks[owned]] = owned  # of equal stacks the last one is assigned
        mine = np.where(last >= 0, by_word[last] if len(by_word) else -1, -1)
        starts = offsets[:-1].copy()
        others = np.flatnonzero(by_word != mine[stacks])
        others = others[others < last[stacks[others]]]
        starts[stacks[others]] = others + 1
        return cls(starts, last + 1, mine)

    def cut_after(self, profile: Columns, is_last: npt.NDArray[np.bool_]) -> "_Runs":
        """Return them so that nothing is around an innermost frame at one of these locations."""
        innermost = np.flatnonzero(self.owners >= 0)
        innermost = innermost[is_last[profile.stack_words[self.ends[innermost] - 1]]]
        starts = self.starts.copy()
        starts[innermost] = self.ends[innermost] - 1
        return self._replace(starts=starts)


def _choose(
    builds: Sequence[_Build], named: Mapping[str, _Program], profile: Columns
) -> list[_Build]:
    """Return the builds of the program that is meant, the one with most samples first."""
    if not builds:
        raise GoPgoError(f"nothing selected: there is no Go code in {_code_in(profile)}")
    samples = sum(build.samples for build in builds)
    if named:
        chosen = [build for build in builds if build.module.build_id in named]
        if not chosen:
            there = listed([build.described(samples) for build in builds], _SHOWN)
            files = ", ".join(
                f"{path_text(program.path)} (build id {build_id[:_SHOWN_ID]})"
                for build_id, program in named.items()
            )
            raise GoPgoError(f"no sample is of {files}; the Go programs there: {there}")
        return chosen
    services: Counter[str] = Counter()
    programs: Counter[str] = Counter()
    for build in builds:
        services.update(build.services)
        programs[build.module.name] += build.samples
    if len(programs) > 1 and len(services) > 1:
        shares = [
            f"{service or '[no service]'} {percent(count, samples)}"
            for service, count in services.most_common()
        ]
        raise GoPgoError(
            f"there is Go code of {len(services)} services: {listed(shares, _SHOWN)}; select one"
            " with -q, or name the program with --binary FILE"
        )
    ((program, _),) = programs.most_common(1)
    return [build for build in builds if build.module.name == program]


def _code_in(profile: Columns) -> str:
    names = sorted({module.name for module in profile.modules.values()})
    return listed(names, _SHOWN) or "a profile without addresses"


def _where_missing(missing: Sequence[_Build], chosen: Sequence[_Build]) -> str:
    samples = sum(build.samples for build in chosen)
    shown = listed([build.described(samples) for build in missing], _SHOWN)
    path = path_text(missing[0].module.path)
    return f"{shown} not found at {path}, nor running here; name the program with --binary FILE"


class _Encoder:
    """The tables of the pprof message while they grow."""

    def __init__(self, profile: Columns, programs: Mapping[str, _Program]) -> None:
        self._profile = profile
        self._programs = list(programs.values())
        self._build_ids = list(programs)
        self._message = ProfileMessage()
        self._strings: dict[bytes, int] = {b"": 0}
        self._functions: dict[tuple[bytes, bytes, int], int] = {}
        self._locations = 0
        self.samples = 0
        """How many samples were encoded; `folded` is how many ended in `[rest]`."""
        self.folded = 0

    def encode(self) -> bytes:
        out, profile = self._message, self._profile
        for type_, unit in (("samples", "count"), ("cpu", "nanoseconds")):
            out.sample_type.add(type=self._text(type_), unit=self._text(unit))
        out.period_type.type, out.period_type.unit = self._text("cpu"), self._text("nanoseconds")
        out.period = profile.period_ns
        out.time_nanos = profile.window.start_ns
        out.duration_nanos = profile.window.end_ns - profile.window.start_ns
        for number in range(len(self._programs)):
            self._add_mapping(number)
        self._add_samples()
        out.string_table.extend(self._strings)
        deflater = zlib.compressobj(6, zlib.DEFLATED, wbits=31)  # writes no time: deterministic
        content = deflater.compress(out.SerializeToString(deterministic=True))
        return content + deflater.flush()

    def _text(self, text: str) -> int:
        return self._string(text.encode("utf-8", "replace"))

    def _string(self, text: bytes) -> int:
        return self._strings.setdefault(text, len(self._strings))

    def _add_mapping(self, number: int) -> None:
        segments = self._programs[number].elf.segments
        p_vaddr, p_offset, p_filesz = segments[0] if segments else (0, 0, 0)
        self._message.mapping.add(
            id=number + 1,
            memory_start=p_vaddr - p_vaddr % _PAGE_BYTES,
            memory_limit=p_vaddr + p_filesz,
            file_offset=p_offset - p_offset % _PAGE_BYTES,
            filename=self._text(self._programs[number].path),
            build_id=self._text(self._build_ids[number]),
            has_functions=True,
            has_filenames=True,
            has_line_numbers=True,
            has_inline_frames=True,
        )

    def _add_samples(self) -> None:
        """Add up the values of stacks that are equal in Go's code, the largest first."""
        profile = self._profile
        owners = _owners(profile, self._build_ids)
        ids = np.zeros(len(owners), dtype=np.int64)
        lack_frames = np.zeros(len(owners), dtype=np.bool_)
        for number in np.flatnonzero(owners >= 0).tolist():
            place = int(owners[number]), int(profile.locations[number, 1])
            ids[number], lack_frames[number] = self._add_location(*place)
        owners[ids < 0] = -1  # C code in the same file
        runs = _Runs.of(profile, owners)
        if profile.accounting.stops:  # stacks of ours
            runs = runs.cut_after(profile, lack_frames)
        is_folded = self._folded_stacks()
        values = np.zeros(len(runs.owners), dtype=np.int64)
        stacks = profile.rows[:, 1].astype(np.int64)
        np.add.at(values, stacks, profile.counts[:, 1].astype(np.int64))
        is_mine = runs.owners >= 0
        is_counted = (is_mine & ~is_folded)[stacks]
        self.samples = int(profile.counts[is_counted, 0].sum())
        self.folded = int(profile.counts[(is_mine & is_folded)[stacks], 0].sum())
        words = ids[profile.stack_words.astype(np.int64)]
        sums: Counter[tuple[int, ...]] = Counter()
        for stack in np.flatnonzero(is_mine & ~is_folded & (values > 0)).tolist():
            root_first = words[runs.starts[stack] : runs.ends[stack]].tolist()
            sums[tuple(filter(None, reversed(root_first)))] += int(values[stack])
        for leaf_first, value in sorted(sums.items(), key=lambda each: (-each[1], each[0])):
            # Hosts may have been sampled at different rates: the time is what counts.
            samples = max(1, round(value / profile.period_ns))
            self._message.sample.add(location_id=leaf_first, value=(samples, value))

    def _folded_stacks(self) -> npt.NDArray[np.bool_]:
        profile = self._profile
        offsets = profile.stack_offsets.astype(np.int64)
        is_rest = _owners(profile, [_REST]) == 0
        is_folded = np.zeros(len(offsets) - 1, dtype=np.bool_)
        stacks = np.repeat(np.arange(len(is_folded)), np.diff(offsets))
        is_folded[stacks[is_rest[profile.stack_words.astype(np.int64)]]] = True
        return is_folded

    def _add_location(self, program: int, offset: int) -> tuple[int, bool]:
        """Return the id of an address's Location, and whether its function lacks a frame there.

        The id is 0 if none is shown, -1 if it is no Go code.
        """
        lines = self._programs[program].lines
        address = lines.address(FileOffset(offset))
        try:
            calls = lines.calls(address) if address is not None else ()
            lacks_frame = address is not None and lines.lacks_frame(address)
        except UnreadableElf as error:
            path = path_text(self._programs[program].path)
            raise GoPgoError(f"cannot read {path}: {error.reason}") from error
        if not calls:
            return -1, False
        shown = [call for call in calls if not call.is_wrapper and call.function != _OUTERMOST]
        if not shown:
            return 0, lacks_frame
        self._locations += 1
        added = self._message.location.add(
            id=self._locations, mapping_id=program + 1, address=address
        )
        for call in shown:
            added.line.add(function_id=self._function(call), line=call.line)
        return self._locations, lacks_frame

    def _function(self, call: GoCall) -> int:
        key = (call.function, call.file, call.first_line)
        if key not in self._functions:
            self._functions[key] = len(self._functions) + 1
            self._message.function.add(
                id=self._functions[key],
                name=self._string(call.function),
                system_name=self._string(call.function),
                filename=self._string(call.file),
                start_line=call.first_line,
            )
        return self._functions[key]
