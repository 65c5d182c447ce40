"""`everflame import`: profiles of other tools into a store, one object per file.

Read are pprof, folded text, speedscope and what `perf script` prints. A file says little about
itself: its window, host and labels are given on the command line where it has none. Samples of
unknown length count as ticks of a given rate, so that they merge with ours.

`perf script` (default fields) prints one sample as a line and a line per frame, leaf first:

    COMM PID/TID [CPU] SECONDS.FRACTION: PERIOD EVENT:
        ADDRESS SYMBOL+0xOFFSET (MODULE)

COMM is any 15 bytes of a process's choice and SYMBOL any text of a file's: both are taken at their
word only where the fields around them fit. Lines that fit nothing are counted and left out.
"""

import dataclasses
import hashlib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from profiler.formats import export
from profiler.text import counted
from profiler.times import NS_PER_S, TimeError, parse_time
from storage.formats import folded, pprof
from storage.formats.pprof_message import COUNT_LIMIT
from storage.objects.keys import LONGEST_WINDOW_S
from storage.objects.tenant import TenantStore
from storage.profile import (
    Accounting,
    Host,
    Labels,
    Profile,
    ProfileBuilder,
    ProfileError,
    Window,
    make_labels,
)
from storage.query.function_totals import PROCESS_LABELS
from symbolizer.location import Frame, Kind, NamedLocation, unnamed
from symbolizer.text import readable

DEFAULT_HOST = "imported"
_SNIFFED_BYTES = 64 * 1024
_LINE_LIMIT_BYTES = 64 * 1024
"""A longer line of perf's is no line of perf's."""
_WALL_CLOCK_S = 1_000_000_000
"""perf's times are seconds since boot; from here on (2001) they are those of a wall clock."""
_TIME_EVENTS = ("cpu-clock", "task-clock")
"""Events whose period is in nanoseconds."""

_HEADER = re.compile(
    rb" *(?P<comm>\S.{0,14}) +(?P<pid>-?\d{1,10})(?:/(?P<tid>-?\d{1,10}))? +"
    rb"(?:\[\d{1,5}\] +)?(?P<s>\d{1,12})\.(?P<fraction>\d{1,9}): +"
    rb"(?:(?P<period>\d{1,18}) +)?(?P<event>[^\s:]\S{0,127}?):[a-zA-Z]{0,8}:?(?: +(?P<rest>.*))?"
)
_FRAME = re.compile(rb"\s+(?P<address>[0-9a-f]{1,16}) (?P<symbol>.*) \((?P<module>.*)\)")
_OFFSET = re.compile(rb"\+0x[0-9a-f]+\Z")
_DELETED = b" (deleted)"
_KERNEL_ADDRESS = 1 << 63


class IncompleteFileError(ValueError):
    """A file that cannot be imported as it was asked for; the message says what to give."""


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """What the command line adds to what files say."""

    window: str = ""
    """START..END, or START alone for a file that knows how long it took."""
    host: str = ""
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    frequency_hz: int = 99


class Imported(NamedTuple):
    """A file as a profile; what of it could not be parsed was left out and counted."""

    profile: Profile
    has_start: bool
    """The file says when it was taken."""
    unparsed_lines: int = 0
    other_events: int = 0
    """Samples of other events than the first."""


def run(files: Sequence[str], store: TenantStore, options: ImportOptions, now_ns: int) -> int:
    """Put each file into the store and say under which key; what was left out goes to stderr.

    Raises:
        IncompleteFileError: a file lacks what the options do not give.
        ProfileError: a file is damaged.
        StoreError: the store did not take it.
    """
    for file in files:
        imported = read(file, options.frequency_hz)
        profile = complete(imported, file, options, now_ns)
        content = pprof.encode(profile)
        key, is_new = store.put_profile(profile, content)
        print(key.text)
        samples = counted(profile.total_samples, "sample")
        print(f"{file}: {samples}{'' if is_new else ', was there already'}", file=sys.stderr)
        if imported.unparsed_lines:
            lines = counted(imported.unparsed_lines, "line")
            print(f"{file}: left out {lines} that could not be parsed", file=sys.stderr)
        if imported.other_events:
            others = counted(imported.other_events, "sample")
            print(f"{file}: left out {others} of other events than the first", file=sys.stderr)
        if profile.type != "cpu":
            print(
                f"{file}: its values are {profile.type} in {profile.unit}, not CPU time;"
                " flame graphs of cpu leave it out",
                file=sys.stderr,
            )
    return 0


def read(file: str, frequency_hz: int) -> Imported:
    """Read a file in the format of its ending, or in the one that it looks like.

    Raises:
        ProfileError: it is damaged or nothing known; the message names the file.
        OSError: it cannot be read.
    """
    if file.endswith((".pb.gz", ".folded", ".speedscope.json")):
        return _imported(export.read(file), frequency_hz)
    with Path(file).open("rb") as opened:
        head = opened.read(_SNIFFED_BYTES)
    try:
        if _is_perf_script(head):
            with Path(file).open("rb") as opened:
                return parse_perf_script(opened, frequency_hz)
        decode = pprof.decode if b"\0" in head or head[:2] == b"\x1f\x8b" else folded.decode
        return _imported(decode(Path(file).read_bytes()), frequency_hz)
    except ProfileError as error:
        raise type(error)(f"{file}: {error}") from error


def _imported(profile: Profile, frequency_hz: int) -> Imported:
    if profile.type == "samples":
        period_ns = NS_PER_S // frequency_hz
        if profile.total_samples > COUNT_LIMIT // period_ns:
            raise ProfileError("cannot import: its samples add up to more than 2^62 ns")
        profile = dataclasses.replace(
            profile,
            type="cpu",
            unit="nanoseconds",
            period_ns=period_ns,
            row_values=profile.row_samples * period_ns,
        )
    return Imported(profile, has_start=profile.window.start_ns > 0)


def complete(imported: Imported, file: str, options: ImportOptions, now_ns: int) -> Profile:
    """Return the profile with the window, host and labels that were asked for.

    Raises:
        IncompleteFileError: it has no window, or one longer than an hour.
    """
    profile = imported.profile
    window = _window(imported, file, options.window, now_ns)
    accounting = profile.accounting
    hosts = accounting.hosts
    if options.host or len(hosts) != 1:
        name = readable((options.host or DEFAULT_HOST).encode())
        host_id = hashlib.blake2b(name.encode(), digest_size=8, key=b"everflame import")
        hosts = (Host(name, host_id.hexdigest()),)
    added = {
        readable(name.encode()): readable(value.encode()) for name, value in options.labels.items()
    }
    label_sets = tuple(make_labels({**dict(each), **added}) for each in profile.label_sets)
    length_ns = window.end_ns - window.start_ns
    services = {
        tuple(pair for pair in each if pair[0] not in PROCESS_LABELS): length_ns
        for each in label_sets
    }
    labelled = dataclasses.replace(
        profile,
        window=window,
        label_sets=label_sets,
        accounting=dataclasses.replace(
            accounting,
            hosts=hosts,
            profiled_ns=accounting.profiled_ns or length_ns,
            services=accounting.services or services,
        ),
    )
    # Label sets that have become equal are added up.
    every = sorted({name for labels in label_sets for name, _ in labels})
    return labelled.group_by(every)


def _window(imported: Imported, file: str, asked: str, now_ns: int) -> Window:
    window = imported.profile.window
    length_ns = window.end_ns - window.start_ns
    start_text, _, end_text = asked.partition("..")
    try:
        if asked:
            start_ns = parse_time(start_text, now_ns)
            end_ns = parse_time(end_text, now_ns) if end_text else start_ns + length_ns
            window = Window(start_ns, end_ns)
    except TimeError as error:
        raise IncompleteFileError(f"--window {asked}: {error}") from error
    if not asked and not imported.has_start:
        raise IncompleteFileError(
            f"{file} does not say when it was taken: give --window START..END"
            + (" or --window START" if length_ns else "")
        )
    if window.end_ns <= window.start_ns:
        if asked and end_text:
            raise IncompleteFileError(f"--window {asked}: it must end after it starts")
        if asked:
            raise IncompleteFileError(
                f"{file} does not say how long it took: give --window START..END"
            )
        window = Window(window.start_ns, window.start_ns + NS_PER_S)
    if window.end_ns - window.start_ns > LONGEST_WINDOW_S * NS_PER_S:
        raise IncompleteFileError(
            f"{file} is longer than an hour: give --window START..END, at most an hour"
        )
    return window


def _is_perf_script(head: bytes) -> bool:
    """Tell perf's text by its first line that is neither empty nor a comment."""
    for line in head.split(b"\n")[:1000]:
        if line.strip() and not line.startswith(b"#"):
            return _HEADER.fullmatch(line.rstrip(b"\r")) is not None
    return False


class _Sample(NamedTuple):
    labels: Labels
    at_ns: int
    period: int
    event: str


def parse_perf_script(lines: Iterable[bytes], frequency_hz: int) -> Imported:
    """Read perf's text line by line. Labels: comm and service (its name), thread, pid.

    Raises:
        ProfileError: there is no sample in it.
    """
    period_ns = NS_PER_S // frequency_hz
    builder = ProfileBuilder(period_ns)
    unparsed = other_events = stored = 0
    event = ""
    first_ns, last_ns = 2**63 - 1, 0
    for sample, leaf_first in _ScriptReader().read(lines):
        if sample is None:
            unparsed += 1
            continue
        event = event or sample.event
        if sample.event != event:
            other_events += 1
            continue
        first_ns, last_ns = min(first_ns, sample.at_ns), max(last_ns, sample.at_ns)
        is_time = event.startswith(_TIME_EVENTS) and 0 < sample.period < 60 * NS_PER_S
        numbers = [builder.location(place, (_frame_of(place),)) for place in reversed(leaf_first)]
        builder.add(sample.labels, numbers, 1, sample.period if is_time else period_ns)
        stored += 1
    if not stored:
        raise ProfileError("cannot read perf script: there is no sample in it")
    # The last sample stands for the time until the next one.
    window = Window(first_ns, last_ns + period_ns)
    profile = builder.build(window, Accounting(ticks=stored, stored=stored))
    has_start = first_ns >= _WALL_CLOCK_S * NS_PER_S
    return Imported(profile, has_start, unparsed, other_events)


class _ScriptReader:
    """Puts lines together: gives each sample with its frames, and None for what fits nothing."""

    def __init__(self) -> None:
        self._sample: _Sample | None = None
        self._frames: list[NamedLocation] = []
        self._is_open = False
        """Frames may follow, until an empty line."""

    def read(self, lines: Iterable[bytes]) -> Iterator[tuple[_Sample | None, list[NamedLocation]]]:
        for raw in lines:
            yield from self._take(raw.rstrip(b"\r\n"))
        yield from self._end_sample()

    def _take(self, line: bytes) -> Iterator[tuple[_Sample | None, list[NamedLocation]]]:
        if not line.strip():
            yield from self._end_sample()
            return
        # Inside a sample a line is a frame first: a symbol may look like the start of a sample.
        frame = _parse_frame(line) if self._is_open else None
        if frame is not None:
            self._frames.append(frame)
            return
        if line.startswith(b"#") and not self._is_open:
            return
        header = _HEADER.fullmatch(line) if len(line) <= _LINE_LIMIT_BYTES else None
        if header is None:
            # What follows the unreadable first line of a sample are frames of that sample.
            self._is_open = True
            yield None, []
            return
        yield from self._end_sample()
        self._sample = _parse_header(header)
        inline = _parse_frame(b" " + header["rest"].strip()) if header["rest"] else None
        self._is_open = inline is None
        if inline is not None:
            self._frames.append(inline)

    def _end_sample(self) -> Iterator[tuple[_Sample | None, list[NamedLocation]]]:
        if self._sample is not None:
            yield self._sample, self._frames
        self._sample, self._frames, self._is_open = None, [], False


def _parse_header(header: re.Match[bytes]) -> _Sample:
    comm = readable(header["comm"].strip())
    at_ns = int(header["s"]) * NS_PER_S + int(header["fraction"].ljust(9, b"0"))
    labels = {"comm": comm, "service": comm, "thread": comm, "pid": header["pid"].decode()}
    event = readable(header["event"])
    return _Sample(make_labels(labels), at_ns, int(header["period"] or 0), event)


def _parse_frame(line: bytes) -> NamedLocation | None:
    if len(line) > _LINE_LIMIT_BYTES or not line.endswith(b")"):
        return None
    is_deleted = line.endswith(_DELETED + b")")
    body = line[: -len(_DELETED) - 1] + b")" if is_deleted else line
    match = _FRAME.fullmatch(body)
    if match is None:
        return None
    path = match["module"]
    symbol = _OFFSET.sub(b"", match["symbol"])
    kind = _kind(path, int(match["address"], 16))
    if kind is Kind.JIT:
        path = b"[jit]"
    module = readable(path.rpartition(b"/")[2] or path)
    if path == b"inlined":
        module = ""
    if symbol in {b"[unknown]", b""}:
        return NamedLocation(*unnamed(module, kind)[:4], 0, 0)
    return NamedLocation(readable(symbol), module, kind, "", 0, 0)


def _kind(path: bytes, address: int) -> Kind:
    if path == b"inlined":
        return Kind.INLINED
    if path.startswith((b"[kernel", b"[guest.kernel")) or address >= _KERNEL_ADDRESS:
        return Kind.KERNEL
    if re.fullmatch(rb"/tmp/perf-\d+\.map|\[?JIT\]? tid \d+|//anon", path):
        return Kind.JIT
    return Kind.NATIVE


def _frame_of(place: NamedLocation) -> Frame:
    return Frame(place.function, place.module, place.kind)
