"""Detect a file's format by its content, never by its name.

Formats that are read are a `Format`. Formats that are known and not read are refused by their name
and with the way to a format that is read, because "not a profile" helps nobody who has a recording
in their hands.
"""

import re
from collections.abc import Sequence
from enum import Enum
from typing import Any, NamedTuple

from profiler.formats.readers import folded, perf_script
from profiler.formats.readers.result import UnsupportedFormatError

_SPEEDSCOPE = "open it in https://www.speedscope.app and export it there (Ctrl+S)"
_PPROF_TOOL = "convert it: go tool pprof -proto PROGRAM FILE > cpu.pb.gz"
_READ = "pprof, speedscope, folded stacks and the text of perf script are read"

# Words of 64 or 32 bits, in either byte order: 0, 3 words follow, version 0.
_GPERFTOOLS = rb"|".join(
    (
        rb"\0{8}\x03\0{7}\0{8}",
        rb"\0{8}\0{7}\x03\0{8}",
        rb"\0{4}\x03\0{3}\0{4}",
        rb"\0{4}\0{3}\x03\0{4}",
    )
)


class Format(Enum):
    """A format that is read; the value is its name in messages."""

    PPROF = "pprof"
    JSON = "JSON"
    PERF_SCRIPT = "perf script"
    FOLDED = "folded text"


class _Known(NamedTuple):
    """A format that is known by how its files begin."""

    pattern: re.Pattern[bytes]
    name: str
    way_out: str


def _known(pattern: bytes, name: str, way_out: str) -> _Known:
    # `*+` keeps white space that was skipped, or a long run of it would be tried at every place.
    return _Known(
        re.compile(rb"\s*+(?:" + pattern + rb")", re.DOTALL | re.IGNORECASE), name, way_out
    )


_MAGIC = tuple(
    _Known(re.compile(pattern, re.DOTALL), name, way_out)
    for pattern, name, way_out in (
        (
            rb"PERFILE2|2ELIFREP|PERFFILE",
            "a recording of perf (perf.data)",
            "run perf script on it: perf script -F +pid -i FILE > perf.txt",
        ),
        (
            rb"FLR\0",
            "a Java Flight Recorder recording (JFR)",
            "convert it with async-profiler: jfrconv -o collapsed FILE cpu.folded",
        ),
        (
            rb"JAVA PROFILE 1\.\d(?:\.\d)?\0",
            "a Java heap dump (hprof)",
            "it holds objects, not CPU time; record with async-profiler: asprof -o collapsed",
        ),
        (
            rb"JAVA PROFILE 1\.",
            "a text of Java's old hprof agent",
            "record with async-profiler: asprof -o collapsed",
        ),
        (rb"\x7fELF", "a program or library (ELF)", "give the profile that was taken of it"),
        (
            rb"[\xce\xcf]\xfa\xed\xfe|\xfe\xed\xfa[\xce\xcf]|\xca\xfe\xba\xbe",
            "a program of macOS (Mach-O) or Java class",
            "give the profile that was taken of it",
        ),
        (rb"MZ[^\n]{0,58}\0", "a program of Windows (PE)", "give the profile that was taken of it"),
        (
            rb"MOJ[\x00-\x20]",
            "austin's binary format (MOJO)",
            "convert it: mojo2austin FILE out.austin",
        ),
        (
            rb"Nettrace\x14\0",
            ".NET's trace (nettrace)",
            "dotnet-trace convert --format Speedscope FILE",
        ),
        (
            rb"SIMPLEPERF[\x00-\x1f]",
            "a report of simpleperf",
            "write text instead: report_sample.py",
        ),
        (rb"\x17\x08\x44tracing", "a recording of trace-cmd", "record with perf: perf record -g"),
        (
            rb"go 1\.\d\d trace\0",
            "an execution trace of Go",
            "record a CPU profile instead (/debug/pprof/profile)",
        ),
        (rb"\x28\xb5\x2f\xfd", "zstd data", "decompress it first: zstd -d FILE"),
        (rb"\xfd7zXZ\0", "xz data", "decompress it first: xz -d FILE"),
        (rb"BZh[1-9]1AY&SY", "bzip2 data", "decompress it first: bzip2 -d FILE"),
        (rb"\x04\x22\x4d\x18", "lz4 data", "decompress it first: lz4 -d FILE"),
        (rb"PK\x03\x04", "a zip archive", "unpack it first: unzip FILE"),
        (rb".{257}ustar", "a tar archive", "unpack it first: tar xf FILE"),
        (rb"SQLite format 3\0", "an SQLite database", _READ),
        (rb"PAR1[\x00-\x1f]", "a Parquet file", _READ),
        (rb"\x89PNG|\xff\xd8\xff|GIF8", "a picture", "give the profile that it was drawn from"),
        (rb"%PDF", "a PDF", "give the profile that it was drawn from"),
        (
            rb"[{\xfb][\xa9)(]\x03",
            "a profile of Python's cProfile",
            "it has no stacks; record with py-spy: py-spy record -f raw -o cpu.folded",
        ),
        (
            _GPERFTOOLS,
            "a CPU profile of gperftools (the format before pprof's)",
            _PPROF_TOOL,
        ),
        (
            rb"\xff\xfe|\xfe\xff|[ -~]\0[ -~\r\n]\0[ -~\r\n]\0|\0[ -~]\0[ -~\r\n]\0[ -~\r\n]",
            "text in UTF-16 (PowerShell's > writes it)",
            "convert it: iconv -f UTF-16 -t UTF-8 FILE",
        ),
    )
)

_TEXT = (
    _known(
        rb"(?:#[^\n]*\n\s*)*(?:#\s*callgrind format|version:\s*+\d+[ \t\r]*+\n\s*+creator:"
        rb"|(?:[a-z][a-z ]*:[^\n]*\n\s*)*events:\s*\w+)",
        "a profile of callgrind",
        _SPEEDSCOPE,
    ),
    _known(
        rb"heap profile:|heap_v2/|MemProfile|--- heapz? ?---|--- growthz?|# runtime\.MemStats",
        "a heap profile in text (the format before pprof's)",
        "it holds memory, not CPU time; to read that, convert it:"
        " go tool pprof -proto PROGRAM FILE > heap.pb.gz",
    ),
    _known(
        rb"--- (?:contention|mutex|symbol|thread|profile)|cycles/second *=|--- \w+ ---"
        rb"|goroutine profile:|threadcreate profile:|goroutine \d+ \[",
        "a text profile of gperftools or Go (the format before pprof's)",
        f"{_PPROF_TOOL} (of Go's /debug/pprof without debug=1)",
    ),
    _known(
        rb"(?:<\?xml[^>]*>\s*)?(?:<!doctype svg[^>]*>\s*)?(?:<!--(?:(?!-->).)*-->\s*)*<svg\b",
        "a drawing (SVG)",
        "give the folded or pprof file that it was drawn from",
    ),
    _known(
        rb"<!doctype html|<html\b|<head\b|<!--.{0,2000}<html\b",
        "a page (HTML)",
        "give the profile behind it; of async-profiler's pages: jfrconv -o collapsed FILE"
        " cpu.folded",
    ),
    _known(rb"<\?xml", "XML", _READ),
    _known(
        rb"(?:#[^\n]*\n\s*)*?#\s*mode:\s*full",
        "a profile of austin in full mode, with three values a line",
        "record without -f",
    ),
    _known(
        rb"sample:[ \t\r]*+\n\s++event_type:",
        "the text of simpleperf report-sample",
        "write it with simpleperf's report_sample.py",
    ),
    _known(
        rb"(?:File: [^\n]*\n)?(?:Build ID: [^\n]*\n)?(?:Type: \w+\s|PeriodType: )",
        "a report of pprof",
        "give the file that it was made of, or write go tool pprof -proto FILE > cpu.pb.gz",
    ),
    _known(
        rb"Analysis of sampling ",
        "the report of macOS's sample",
        "fold it: stackcollapse-sample.awk FILE > cpu.folded",
    ),
    _known(
        rb"Attaching \d+ probe|@\w*\[",
        "the output of bpftrace",
        "fold it: stackcollapse-bpftrace.pl FILE > cpu.folded",
    ),
    _known(
        rb"(?:#[^\n]*\n\s*)*#\s*(?:Children\s+Self|Overhead)\s+",
        "the report of perf",
        "write the samples instead: perf script > perf.txt",
    ),
    _known(rb"# tracer: ", "the text of ftrace", "record with perf: perf record -g"),
    _known(
        rb"desc: .{0,4000}\btime_unit:",
        "a heap profile of massif",
        "it holds memory, not CPU time",
    ),
    _known(
        rb"Flat profile:|%\s+cumulative\s+self",
        "the report of gprof",
        "record with perf: perf record -g",
    ),
    _known(
        rb"version https://git-lfs", "a pointer of Git LFS", "get the file itself: git lfs pull"
    ),
)

_JSON_LIKE = re.compile(rb"\s*(?:\{\s*(?:[\"}]|\Z)|\[\s*(?:[\[{\"\]]|\Z))")
_LINE_END = re.compile(rb"\r*\n|\r")
_CONTROLS = re.compile(rb"[\x00-\x08\x0e-\x1a]")


def detect(head: bytes, *, is_cut: bool = False) -> Format:
    """Return the format of a file that begins with `head`, and goes on if that is cut.

    Raises:
        UnsupportedFormatError: it is a format that is not read, or none that is known.
    """
    start = head.removeprefix(b"\xef\xbb\xbf")
    lines = _LINE_END.split(start)
    # A name may begin as another format does: `%PDF;f 3`.
    if folded.is_folded(lines, is_strict=True):
        return Format.FOLDED
    for known in _MAGIC:
        if known.pattern.match(start):
            raise refusal(known.name, known.way_out)
    if _CONTROLS.search(start) and _is_pprof(start):
        return Format.PPROF
    for known in _TEXT:
        if known.pattern.match(start):
            raise refusal(known.name, known.way_out)
    if _JSON_LIKE.match(start):
        return Format.JSON
    if perf_script.is_perf_script(lines):
        return Format.PERF_SCRIPT
    if folded.is_folded(lines) or (is_cut and _is_start_of_stack(lines)):
        return Format.FOLDED
    kind = "binary data" if _CONTROLS.search(start) else "text"
    raise UnsupportedFormatError(f"cannot read it: {kind} of no format that is known; {_READ}")


def _is_start_of_stack(lines: Sequence[bytes]) -> bool:
    """Return whether there is one line, of which the end is not known, and it could be a stack."""
    return len(lines) == 1 and b";" in lines[0] and not _CONTROLS.search(lines[0])


def refusal(name: str, way_out: str) -> UnsupportedFormatError:
    return UnsupportedFormatError(f"cannot read it: it is {name}; {way_out}")


def _is_pprof(head: bytes) -> bool:
    """Return whether the bytes are fields of pprof's Profile, the first of them at least.

    A file that is damaged further on is pprof all the same, and is then refused as such.
    """
    position, fields = 0, 0
    while position < len(head) and fields < 100:
        field, wire_type = head[position] >> 3, head[position] & 7
        # sample_type to string_table, comment: messages, texts, packed numbers; the rest: numbers.
        is_known = (wire_type == 2 and field in {*range(1, 7), 11, 13}) or (
            wire_type == 0 and field in {7, 8, 9, 10, 12, 13, 14, 15}
        )
        if not is_known:
            break
        number, position = _varint(head, position + 1)
        if wire_type == 2:
            position += number
        fields += 1
    return fields > 1 or (fields == 1 and position == len(head))


def _varint(content: bytes, position: int) -> tuple[int, int]:
    number = shift = 0
    while position < len(content) and shift < 70:
        byte = content[position]
        position += 1
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
    return number, position


def refuse_json(document: Any) -> UnsupportedFormatError:
    """Return the refusal of a JSON document that is not speedscope's, by what it looks like."""
    for is_it, name, way_out in (
        (
            _has(document, "schema", "frames", "nodes"),
            "a drawing that everflame wrote (.json)",
            "it cannot be read back; export .pb.gz or .speedscope.json as well",
        ),
        (_has(document, "snapshot", "nodes"), "a heap snapshot of V8", "it holds no CPU time"),
        (
            _has(document, "nodes") and isinstance(document["nodes"], list),
            "a .cpuprofile of V8",
            _SPEEDSCOPE,
        ),
        (
            _has(document, "head") and _has(document["head"], "callFrame"),
            "a .heapprofile or an old .cpuprofile of V8",
            _SPEEDSCOPE,
        ),
        (_has(document, "traceEvents"), "a trace of Chrome", _SPEEDSCOPE),
        (
            isinstance(document, list) and bool(document) and _has(document[0], "ph"),
            "a trace of Chrome",
            _SPEEDSCOPE,
        ),
        (_has(document, "meta", "threads"), "a profile of Firefox or samply", _SPEEDSCOPE),
        (_has(document, "frames", "raw"), "a dump of stackprof", _SPEEDSCOPE),
        (_has(document, "frames", "mode"), "a dump of stackprof", _SPEEDSCOPE),
        (
            _has(document, "root_frame"),
            "a session of pyinstrument",
            "convert it: pyinstrument --load FILE -r speedscope",
        ),
        (_has(document, "resourceProfiles"), "OpenTelemetry's profile as JSON", _READ),
        (_has(document, "flamebearer"), "a flame graph of Pyroscope", "download it as pprof"),
    ):
        if is_it:
            return refusal(name, way_out)
    return UnsupportedFormatError(
        f"cannot read it: it is JSON, but not of speedscope (it has no shared frames); {_READ}"
    )


def _has(document: Any, *names: str) -> bool:
    return isinstance(document, dict) and all(name in document for name in names)
