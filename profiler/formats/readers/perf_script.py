"""Read what `perf script` prints, and programs that print alike (simpleperf's report_sample.py).

A sample is a line, then a line per frame, leaf first, and an empty line:

    COMM PID/TID [CPU] SECONDS.FRACTION: PERIOD EVENT: FIELDS
        ADDRESS SYMBOL+0xOFFSET (MODULE)

Each field may be missing (`perf script -F`), and any white space may separate them. COMM is any
text of a process's choice and SYMBOL any text of a file's: both are taken at their word only where
the fields around them fit.

- A lone number, which is the default, is the id of a thread: its process, and so its service, is
  known only if another line of the file says so (PID/TID, `--show-task-events`).
- A process is called as its main thread is; while that was not sampled, as its oldest thread.
- `cpu_core/cycles/` and `cpu_atom/cycles/` are one event, on the two kinds of cores of a CPU.
- `A->B->C` in a module of just-in-time code is perf-map-agent's form of calls inlined into A.

Samples of one event are read: the one that is asked for, else CPU time (`cpu-clock`, `cycles`),
else the first. Lines that fit nothing are left out and named.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from profiler.formats.readers.perf_tasks import Processes, Task, task_of
from profiler.formats.readers.result import (
    ChoiceError,
    LeftOut,
    Reading,
    ReadOptions,
)
from profiler.text import counted, listed
from profiler.times import NS_PER_S
from storage.profile import (
    Accounting,
    Labels,
    ProfileBuilder,
    ProfileError,
    Window,
)
from symbolizer.location import Frame, Kind, NamedLocation, unnamed
from symbolizer.text import readable

NAME = "perf script"

_LINE_LIMIT_BYTES = 64 * 1024
"""perf writes no longer lines."""
_WALL_CLOCK_S = 1_000_000_000
"""perf's times are seconds since boot; from here on (2001) they are those of a wall clock."""
_TIME_EVENTS = ("cpu-clock", "task-clock")
"""Events whose period is in nanoseconds."""
_LONGEST_PERIOD_NS = 60 * NS_PER_S
_SHOWN_EVENTS = 8
_KEPT_FRAMES = 65_536
"""Lines that are parsed only once, 20 MB of them."""
_FRAMES_LIMIT = 65_536
"""Frames of one sample; the kernel's own limit is 127 unless it is raised."""
_ROW_BYTES, _FRAME_BYTES, _LINE_BYTES, _PERIOD_BYTES = 800, 16, 800, 120
"""Memory for a distinct stack of a task, for each of its frames, for a distinct line of a frame
besides its text, and for a distinct period."""

_WS = rb"[ \t]++"
_TASK = rb"(?P<id>-?\d{1,10})(?:/(?P<tid>-?\d{1,10}))?" + _WS
_CPU = rb"(?:\[(?P<cpu>\d{1,6})\]" + _WS + rb")"
_MISC = rb"(?:[A-Z]{1,4}" + _WS + rb")?"
_TIME = rb"(?P<s>\d{1,12})\.(?P<fraction>\d{1,9}):"
_EVENT = rb"(?P<event>(?!\d+:(?:\s|\Z))[^\s:]\S{0,255}):(?=\s|\Z)"
_VALUE = rb"(?:(?P<period>\d{1,18})" + _WS + rb")?"
_REST = rb"(?:" + _WS + rb"(?P<rest>.*))?"
# The kernel's names have at most 15 bytes. Among those the longest that fits is taken, because the
# fields stand behind it; longer ones (simpleperf's) end where the first fields fit. Neither ends in
# white space, or a line with a long run of it would be tried at every place of the run.
_COMMS = (
    rb"(?:(?P<comm>\S(?:.{0,13}\S)?)" + _WS + rb")?",
    rb"(?:(?P<comm>\S(?:.{0,1022}?\S)??)" + _WS + rb")?",
)
_TIMED = tuple(
    re.compile(
        rb"[ \t]*+" + comm + task + _MISC + _TIME + rb"(?:" + _WS + _VALUE + _EVENT + _REST + rb")?"
    )
    for task in (_TASK + _CPU + rb"?", _CPU)
    for comm in _COMMS
)
_WITHOUT_ID = re.compile(
    rb"[ \t]*+" + _COMMS[1] + _MISC + _TIME + rb"(?:" + _WS + _VALUE + _EVENT + _REST + rb")"
)
_UNTIMED = re.compile(
    rb"[ \t]*+" + _COMMS[1] + _TASK + _CPU + rb"?" + _MISC + _VALUE + _EVENT + _REST
)
_BARE = re.compile(
    rb"[ \t]*+" + _COMMS[1] + rb"(?P<id>\d{1,10})/(?P<tid>\d{1,10})(?:[ \t]+\[\d+\])?[ \t]*"
)

_FRAME = re.compile(rb"[ \t]+(?:0x)?(?P<address>[0-9a-f]{1,16})[ \t](?P<rest>.*)")
_LIKELY_FRAME = re.compile(rb"[ \t]+[0-9a-f]{4,16}[ \t]+\S")
_WITH_OFFSET = re.compile(rb"(?P<symbol>.*\+0x[0-9a-f]+)[ \t]+\((?P<module>.*)\)")
_WITH_MODULE = re.compile(rb"(?:(?P<symbol>.*)[ \t])?\((?P<module>.*)\)")
_OFFSET = re.compile(rb"\+0x[0-9a-f]+\Z")
_SOURCE_LINE = re.compile(rb"[ \t]+(?P<file>[^\s:?][^:]*):(?P<line>\d{1,9})(?: \(.*\))?")
_NO_SOURCE_LINE = re.compile(rb"[ \t]+(?:\?\?:\d+|.*\[[0-9a-f]+\])")
_DELETED = b" (deleted)"
_KERNEL_ADDRESS = 1 << 63
_JIT = re.compile(rb"(?:.*/)?(?:perf-\d+\.map|jitted-\d+-\d+\.so)|\[?JIT\]? tid \d+|//anon")
_JIT_MEMORY = (b"[anon:", b"/memfd:", b"/dev/ashmem/")
_KERNEL = re.compile(rb"\[kernel|\[guest\.kernel|(?:.*/)?vmlinux\b|.*\.ko(?:\.\w+)?\Z")
_INLINED = re.compile(rb"(?<=[^\s-])(?<!operator)->(?=[^\s>])")
_RECORD = re.compile(rb"[ \t]PERF_RECORD_\w+")
"""perf script --show-task-events, --show-mmap-events: not a sample."""
_HYBRID = re.compile(r"(?:cpu_\w+|armv\d\w*|apple_\w+|cpu)/([^/]+)/(\w*)")
_PRECISION = "pPHGDSWeI"
"""Modifiers that say how exactly an event is counted, not what."""


def is_perf_script(lines: Sequence[bytes]) -> bool:
    """Return whether samples are among these lines; a warning may stand before them."""
    for i, line in enumerate(lines[:2000]):
        if len(line) > _LINE_LIMIT_BYTES:
            continue
        header = _parse_header(line.rstrip(b"\r"))
        if header is None:
            continue
        following = lines[i + 1].rstrip(b"\r") if i + 1 < len(lines) else b""
        # A header without a time could be any text: it counts with a frame behind it.
        if header.at_ns >= 0 or header.inline or _LIKELY_FRAME.match(following):
            return True
    return False


class _Header(NamedTuple):
    task: Task
    at_ns: int
    """-1 where the line has no time."""
    period: int
    event: str
    inline: NamedLocation | None = None
    """The only frame, of a sample without a call chain."""


class _Sample(NamedTuple):
    header: _Header
    leaf_first: list[NamedLocation]


@dataclass(slots=True)
class _Event:
    """What the samples of one event add up to."""

    counts: Counter[tuple[Task, tuple[int, ...]]]
    values: Counter[tuple[Task, tuple[int, ...]]]
    periods: Counter[int]
    first_ns: int = 2**63 - 1
    last_ns: int = -1
    is_time: bool = True
    """Every sample says for how many nanoseconds it stands."""


def read(lines: Iterable[bytes], options: ReadOptions, keep: Callable[[int], None]) -> Reading:
    """Read the samples of one event. Labels: thread; comm, service and pid of a known process.

    `keep` counts the memory that it takes.

    Raises:
        ChoiceError: `--event` names an event that is not there.
        ProfileError: it contains no samples.
    """
    left_out = LeftOut()
    builder = ProfileBuilder(period_ns=1, type="samples", unit="count")
    events: dict[str, _Event] = {}
    names: dict[str, str] = {}
    processes = Processes()
    locations = 0
    for sample in _ScriptReader(left_out, processes, keep).read(lines):
        header = sample.header
        key = names.get(header.event) or names.setdefault(header.event, event_key(header.event))
        event = events.setdefault(key, _Event(Counter(), Counter(), Counter()))
        processes.add(header.task)
        stack = tuple(_number(builder, place) for place in reversed(sample.leaf_first))
        if (known := max(stack, default=-1) + 1) > locations:
            keep(_LINE_BYTES * (known - locations))
            locations = known
        row = (header.task, stack)
        is_time = key.startswith(_TIME_EVENTS) and 0 < header.period < _LONGEST_PERIOD_NS
        event.is_time &= is_time
        if row not in event.counts:
            keep(_ROW_BYTES + _FRAME_BYTES * len(stack) + 4 * len(header.task.comm))
        if header.period not in event.periods:
            keep(_PERIOD_BYTES)
        event.counts[row] += 1
        event.values[row] += header.period
        event.periods[header.period] += 1
        if header.at_ns >= 0:
            event.first_ns = min(event.first_ns, header.at_ns)
            event.last_ns = max(event.last_ns, header.at_ns)
    if not events:
        more = f" ({left_out.first})" if left_out.lines else ""
        raise ProfileError(f"cannot read perf script: it contains no samples{more}")
    chosen = _choose(events, names, options.event)
    warnings = [left_out.warning] if left_out.lines else []
    if len(events) > 1:
        warnings.append(_other_events(events, chosen))
    unknown = sum(
        count
        for (task, _), count in events[chosen].counts.items()
        if processes.pid_of(task) is None
    )
    if unknown:
        warnings.append(
            f"{counted(unknown, 'sample')} without a process id, so without pid and service"
            " (perf script -F +pid prints it; import --label service=NAME names the service)"
        )
    return _as_reading(builder, events[chosen], processes, warnings)


def _as_reading(
    builder: ProfileBuilder, event: _Event, processes: Processes, warnings: list[str]
) -> Reading:
    period_ns = 1
    if event.is_time:
        builder.type, builder.unit = "cpu", "nanoseconds"
        period_ns = builder.period_ns = event.periods.most_common(1)[0][0]
    labels: dict[Task, Labels] = {}
    for (task, stack), count in event.counts.items():
        if task not in labels:
            labels[task] = processes.labels_of(task)
        value = event.values[task, stack] if event.is_time else count
        builder.add(labels[task], stack, count, value)
    stored = event.counts.total()
    window = Window(0, 0)
    if event.last_ns >= 0:
        # The last sample stands for the time until the next one.
        window = Window(event.first_ns, event.last_ns + period_ns)
    if window.start_ns < _WALL_CLOCK_S * NS_PER_S:
        window = Window(0, window.end_ns - window.start_ns)
    profile = builder.build(window, Accounting(ticks=stored, stored=stored))
    return Reading(profile, NAME, tuple(warnings))


def event_key(event: str) -> str:
    """Return the name under which samples of an event are added up.

    The part of a hybrid CPU that counted it and the precision are left out; whether only the
    user's or the kernel's side was counted (`:u`, `:k`) stays.
    """
    match = _HYBRID.fullmatch(event)
    name, _, modifiers = event.rpartition(":")
    if match:
        name, modifiers = match[1], match[2]
    elif not name or not set(modifiers) <= {*_PRECISION, *"ukhb"} or ":" in name:
        return event
    elif name.startswith(("probe", "sdt_")):
        return event  # `probe:up` is a probe's name
    kept = "".join(sorted(set(modifiers) - set(_PRECISION)))
    return f"{name}:{kept}" if kept else name


def _choose(events: dict[str, _Event], names: dict[str, str], asked: str) -> str:
    if not asked:
        # As with pprof, CPU time where there is one.
        for names_of_cpu in (_TIME_EVENTS, ("cycles", "cpu-cycles")):
            for key in events:
                if key.partition(":")[0] in names_of_cpu:
                    return key
        return next((key for key in events if not key.startswith("dummy")), next(iter(events)))
    for key in (asked, names.get(asked, ""), event_key(asked)):
        if key in events:
            return key
    without_side = [key for key in events if key in {f"{asked}:u", f"{asked}:k"}]
    if len(without_side) == 1:
        return without_side[0]
    found = listed(list(events), _SHOWN_EVENTS)
    raise ChoiceError(f"--event {asked}: there is no such event in it; there are {found}")


def _other_events(events: dict[str, _Event], chosen: str) -> str:
    others = [
        f"{key} ({counted(event.counts.total(), 'sample')})"
        for key, event in events.items()
        if key != chosen
    ]
    return (
        f"read the event {chosen}; left out {listed(others, _SHOWN_EVENTS)}"
        " (--event chooses another)"
    )


class _ScriptReader:
    """Puts lines together to samples."""

    def __init__(
        self, left_out: LeftOut, processes: Processes, keep: Callable[[int], None]
    ) -> None:
        self._left_out = left_out
        self._processes = processes
        self._keep = keep
        self._header: _Header | None = None
        self._frames: list[NamedLocation] = []
        self._is_open = False
        """Frames may follow, until an empty line."""
        self._parsed: dict[bytes, list[NamedLocation]] = {}
        """Frames by their line: most lines of a file occur many times."""

    def read(self, lines: Iterable[bytes]) -> Iterator[_Sample]:
        for number, line in enumerate(lines, start=1):
            yield from self._take(number, line)
        yield from self._end_sample()

    def _take(self, number: int, line: bytes) -> Iterator[_Sample]:
        if not line.strip():
            yield from self._end_sample()
            return
        if len(line) > _LINE_LIMIT_BYTES:
            self._left_out.add(number, line, f"is longer than {_LINE_LIMIT_BYTES >> 10} KiB")
            self._is_open = True
            return
        # Inside a sample a line is a frame first: a symbol may look like the start of a sample.
        frames = self._parse_frame(line) if self._is_open else []
        if not frames and _RECORD.search(line):
            yield from self._end_sample()
            self._processes.add_record(line)
            return
        if not frames:
            header = _parse_header(line)
            if header is not None:
                yield from self._end_sample()
                self._begin_sample(header)
                return
            frames = _parse_frame(line) if self._is_open else []
        if frames:
            self._add_frames(number, line, frames)
        elif self._is_open and self._frames and (match := _SOURCE_LINE.fullmatch(line)):
            file, at = readable(match["file"]), int(match["line"])
            self._frames[-1] = self._frames[-1]._replace(file=file, line=at)
        elif self._is_open and self._frames and _NO_SOURCE_LINE.fullmatch(line):
            return
        elif not line.startswith(b"#") or self._is_open:
            # What follows the unreadable first line of a sample are frames of that sample.
            self._left_out.add(number, line, "is neither a sample nor a frame")
            self._is_open = True

    def _add_frames(self, number: int, line: bytes, frames: list[NamedLocation]) -> None:
        if len(self._frames) + len(frames) > _FRAMES_LIMIT:
            reason = f"is more than {_FRAMES_LIMIT:,} frames away from its leaf"
            self._left_out.add(number, line, reason)
            return
        self._frames += frames

    def _parse_frame(self, line: bytes) -> list[NamedLocation]:
        frames = self._parsed.get(line)
        if frames is None:
            frames = _parse_frame(line, is_strict=True)
            if len(self._parsed) < _KEPT_FRAMES:
                self._keep(len(line) + _LINE_BYTES)
                self._parsed[line] = frames
        return frames

    def _begin_sample(self, header: _Header) -> None:
        self._header = header
        self._is_open = header.inline is None
        if header.inline is not None:
            self._frames.append(header.inline)

    def _end_sample(self) -> Iterator[_Sample]:
        if self._header is not None:
            yield _Sample(self._header, self._frames)
        self._header, self._frames, self._is_open = None, [], False


def _parse_header(line: bytes) -> _Header | None:
    match = None
    is_comment = line.lstrip().startswith(b"#")
    if b":" in line:
        match = next(filter(None, (pattern.fullmatch(line) for pattern in _TIMED)), None)
        if match is None and not is_comment:
            match = _WITHOUT_ID.fullmatch(line)
        if match is None and not is_comment:
            match = _UNTIMED.fullmatch(line)
            # Words behind the event are of a tracepoint, or it is some other text.
            if match and match["rest"] and not (match["tid"] or match["cpu"]):
                match = match if _parse_frame(b" " + match["rest"].strip()) else None
    if match is None and b"/" in line and not is_comment:
        match = _BARE.fullmatch(line)
    if match is None:
        return None
    found = {name: text for name, text in match.groupdict().items() if text is not None}
    at_ns = -1
    if "s" in found:
        at_ns = int(found["s"]) * NS_PER_S + int(found["fraction"].ljust(9, b"0"))
    rest = found.get("rest", b"").strip()
    inline = _parse_frame(b" " + rest, is_strict=True) if rest else []
    return _Header(
        task=task_of(readable(found.get("comm", b"").strip()), found.get("id"), found.get("tid")),
        at_ns=at_ns,
        period=int(found.get("period", 0)),
        event=readable(found.get("event", b"")),
        inline=inline[0] if len(inline) == 1 else None,
    )


def _parse_frame(line: bytes, *, is_strict: bool = False) -> list[NamedLocation]:
    """Return a line's frames, leaf first: none if it is not a frame, several if calls are inlined.

    Strictly, a frame ends in its module.
    """
    match = _FRAME.fullmatch(line)
    if match is None:
        return []
    rest = match["rest"].rstrip()
    if rest.endswith(_DELETED + b")"):
        rest = rest[: -len(_DELETED) - 1] + b")"
    symbol, path = rest, b""
    if rest.endswith(b")"):
        parts = _WITH_OFFSET.fullmatch(rest) or _WITH_MODULE.fullmatch(rest)
        if parts is not None:
            symbol, path = parts["symbol"] or b"", parts["module"]
        elif is_strict:
            return []
    elif is_strict:
        return []
    path = path.removesuffix(_DELETED)
    if not path.startswith(b"["):
        path = _OFFSET.sub(b"", path)
    return _locations(symbol.strip(), path, int(match["address"], 16))


def _locations(symbol: bytes, path: bytes, address: int) -> list[NamedLocation]:
    kind = _kind(path, address)
    module = "[jit]" if kind is Kind.JIT else readable(path.rpartition(b"/")[2] or path)
    if path in {b"inlined", b"[unknown]"}:
        module = ""
    name = _OFFSET.sub(b"", symbol)
    if name in {b"[unknown]", b""}:
        return [NamedLocation(*unnamed(module, kind)[:4], 0, 0)]
    outer_first = _INLINED.split(name) if kind is Kind.JIT else [name]
    return [
        NamedLocation(readable(each), module, Kind.INLINED if i else kind, "", 0, 0)
        for i, each in reversed(list(enumerate(outer_first)))
    ]


def _kind(path: bytes, address: int) -> Kind:
    if path == b"inlined":
        return Kind.INLINED
    if _KERNEL.match(path) or address >= _KERNEL_ADDRESS:
        return Kind.KERNEL
    is_jit = _JIT.fullmatch(path) or (path.startswith(_JIT_MEMORY) and b"jit" in path)
    return Kind.JIT if is_jit else Kind.NATIVE


def _number(builder: ProfileBuilder, place: NamedLocation) -> int:
    return builder.location(place, (Frame(*place[:4], place.line),))
