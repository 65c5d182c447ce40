"""Formats by their content: those that are read, and those that are refused by their name."""

import contextlib
import cProfile
import gzip
import marshal
import time

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiler.formats.readers.detect import Format, detect
from profiler.formats.readers.result import UnsupportedFormatError
from profiler.formats.readers.source import HEAD_BYTES
from profiler.formats.reading import read_bytes
from storage.formats import pprof
from storage.profile import ProfileError
from tests.support import profiles as some

PERF = b"prog 1/1 [000] 1.0: 5 cycles: \n\t401136 f (/x)\n\n"
OURS = gzip.decompress(pprof.encode(some.sample_profile()))


@pytest.mark.parametrize(
    ("content", "format_"),
    [
        (OURS, Format.PPROF),
        (OURS[:40], Format.PPROF),
        (PERF, Format.PERF_SCRIPT),
        (b"# ========\n# captured on : x\n#\n" + PERF, Format.PERF_SCRIPT),
        (b"\xef\xbb\xbf" + PERF, Format.PERF_SCRIPT),
        (b"a;b;c 3\n", Format.FOLDED),
        (b"main 3\n", Format.FOLDED),
        (b"[main tid=7];java/lang/Thread.run_[j] 3\n", Format.FOLDED),
        (b"[unknown] 3\n", Format.FOLDED),
        (b"<main>;f 3\n", Format.FOLDED),
        (b"MZ;f 3\n", Format.FOLDED),
        (b"%PDF;f 3\n", Format.FOLDED),
        (b"heap profile:;f 3\n<svg 4\n", Format.FOLDED),
        (b'["a"];f 3\n', Format.FOLDED),
        (b"std::map<int, int>::at;operator() 3\n", Format.FOLDED),
        (b"P1;T2;main.py:run:12 3\n", Format.FOLDED),
        (b"a text before it: 1 of 2\na;b 3\n", Format.FOLDED),
        (b"\x07;b 3\n", Format.FOLDED),
        (b"", Format.FOLDED),
        (b"# mode: wall\n", Format.FOLDED),
        (b'{"shared": {}}', Format.JSON),
        (b' \n{ "shared": {}}', Format.JSON),
        (b"[]", Format.JSON),
    ],
)
def test_the_content_says_the_format(content, format_):
    """Nothing else does."""
    assert detect(content) is format_


def cprofile() -> bytes:
    profiler = cProfile.Profile()
    profiler.runcall(sorted, [3, 1, 2])
    profiler.create_stats()
    return marshal.dumps(profiler.stats)


def words(size: int, order: str) -> bytes:
    return b"".join(word.to_bytes(size, order) for word in (0, 3, 0, 10_000, 0, 1, 2, 0x401136, 9))


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"PERFILE2" + b"\0" * 96, "perf.data.*perf script"),
        (b"2ELIFREP" + b"\0" * 96, "perf.data.*perf script"),
        (b"FLR\0\0\2\0\1" + b"\0" * 60, "Flight Recorder.*jfrconv"),
        (b"JAVA PROFILE 1.0.2\0\0\0\0\x08" + b"\0" * 60, "Java heap dump"),
        (b"JAVA PROFILE 1.0.1, created Sat\n", "hprof"),
        (b"\x7fELF\2\1\1" + b"\0" * 60, "ELF"),
        (b"\xcf\xfa\xed\xfe" + b"\0" * 60, "Mach-O"),
        (b"MZ\x90\0\3\0\0\0" + b"\0" * 60, "PE"),
        (b"MOJ\3\1", "austin.*mojo2austin"),
        (b"Nettrace\x14\0\0\0!FastSerialization.1", "nettrace.*dotnet-trace convert"),
        (b"go 1.22 trace\0\0\0", "execution trace of Go"),
        (b"\x28\xb5\x2f\xfd\0\0\0", "zstd -d"),
        (b"\xfd7zXZ\0\0\0", "xz -d"),
        (b"BZh91AY&SY\0\0", "bzip2 -d"),
        (b"PK\3\4\x14\0\0\0", "unzip"),
        pytest.param(cprofile(), "cProfile", id="cprofile"),  # differs from run to run
        (words(8, "little"), "gperftools.*go tool pprof -proto"),
        (words(8, "big"), "gperftools.*go tool pprof -proto"),
        (words(4, "little"), "gperftools.*go tool pprof -proto"),
        (words(4, "big"), "gperftools.*go tool pprof -proto"),
        ("main;f 3\n".encode("utf-16"), "UTF-16.*iconv"),
        ("main;f 3\n".encode("utf-16-le"), "UTF-16.*iconv"),
        ("main;f 3\n".encode("utf-16-be"), "UTF-16.*iconv"),
        (b"# callgrind format\nversion: 1\ncreator: callgrind-3.19.0\n", "callgrind.*speedscope"),
        (b"version: 1\ncreator: callgrind-3.19.0\npid: 1\n", "callgrind"),
        (b"cmd: ./a\npart: 1\n\nevents: Ir\nfn=(1) main\n", "callgrind"),
        (b"heap profile: 1: 2 [ 3: 4] @ heapprofile\n", r"heap profile.* > heap\.pb\.gz"),
        (b"heap_v2/524288\n t*: 1: 2 [0: 0]\n", "heap profile"),
        (b"--- contentionz 1 ---\ncycles/second = 1\n", "gperftools or Go"),
        (b"--- symbol\nbinary=/bin/a\n---\n", "gperftools or Go"),
        (b"goroutine profile: total 3\n1 @ 0x1 0x2\n", "gperftools or Go"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'></svg>", "SVG"),
        (b'<?xml version="1.0" standalone="no"?>\n<!DOCTYPE svg PUBLIC "x" "y">\n<svg>', "SVG"),
        (b"<!-- a --><!-- b -->\n<svg>", "SVG"),
        (b"<!DOCTYPE html>\n<html lang='en'>", "HTML"),
        (b"  <html><head>", "HTML"),
        (b"Analysis of sampling prog (pid 1) every 1 millisecond\n", "stackcollapse-sample"),
        (b"Attaching 1 probe...\n@[\n    f+1\n]: 12\n", "stackcollapse-bpftrace"),
        (b"@[\n    f+1\n]: 12\n", "stackcollapse-bpftrace"),
        (b"# To display the perf.data header info\n#\n# Overhead  Command\n", "report of perf"),
        (
            b"# austin: 3.6.0\n# interval: 100\n# mode: full\n\nP1;T1;f 1,0,2\n",
            "austin in full mode",
        ),
        (b"sample:\n  event_type: cpu-cycles\n", "simpleperf report-sample"),
        (b"File: prog\nType: cpu\nTime: May 1\n", "report of pprof"),
        (b"PeriodType: cpu nanoseconds\nPeriod: 10000000\n", "report of pprof"),
        (b"Flat profile:\n\nEach sample counts as 0.01 seconds.\n", "gprof"),
        (b'{"nodes":[{"id":1}],"startTime":1,"endTime":2,"samples":[]}', "cpuprofile.*speedscope"),
        (b'{"head":{"callFrame":{}},"samples":[]}', "heapprofile"),
        (b'{"traceEvents":[]}', "trace of Chrome"),
        (b'[{"ph":"X","name":"a"}]', "trace of Chrome"),
        (b'{"meta":{"version":1},"threads":[]}', "Firefox"),
        (b'{"mode":"cpu","frames":{},"raw":[]}', "stackprof"),
        (b'{"root_frame":{}}', "pyinstrument.*speedscope"),
        (orjson.dumps({"schema": 1, "frames": [], "nodes": {}}), "drawing that everflame wrote"),
        (b'{"a":1}', "JSON, but not of speedscope"),
        (b"Dear all,\nplease find the profile of yesterday below.\n", "text of no format"),
        (b"\0\0", "binary data of no format"),
        (bytes(range(256)), "binary data of no format"),
    ],
)
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_other_formats_are_refused_by_their_name(content, named, compress):
    """And with the way to one that is read, also where they are in gzip."""
    with pytest.raises(UnsupportedFormatError, match=f"cannot read it: .*{named}"):
        read_bytes(compress(content))


@pytest.mark.parametrize(
    "unit",
    [b"<!-- --> ", b"a: b\n  ", b"# x\n", b"1 1.0: ", b"a 1 [0] ", b"a/", b"-> ", b" 1 ", b"a;b",
     b"+0x1 (", b"\n\t12 x (", b"<!DOCTYPE svg ", b"--- ", b"\0" * 8, b"\x12\x7f", b"{", b"[["],
)  # fmt: skip
def test_no_text_takes_long(unit):
    """Patterns could try every way to cut it in pieces."""
    content = (unit * HEAD_BYTES)[:HEAD_BYTES]
    begin_s = time.process_time()

    for end in (b"", b"x", b"\n"):
        with contextlib.suppress(ProfileError):
            read_bytes(content + end)

    assert time.process_time() - begin_s < 10


@pytest.mark.parametrize(
    ("before", "run"),
    [(b"", b" "), (b"", b"\n"), (b"x", b" "), (b"x 1 ", b" "), (b"x 1/1 [0]", b"\t"),
     (b"sample:", b"\n"), (b"version: 1", b"\n"), (b"% ", b" "), (b"# ", b" ")],
)  # fmt: skip
def test_no_run_of_white_space_takes_long(before, run):
    """Patterns could try every place of it as the end of a field."""
    content = before + run * (HEAD_BYTES - 1_000)
    begin_s = time.process_time()

    for end in (b"y: :", b"hello", b""):
        with contextlib.suppress(ProfileError):
            read_bytes(content + end)

    assert time.process_time() - begin_s < 10


@given(st.binary(max_size=400))
def test_any_bytes_are_a_profile_or_refused(content):
    """In words of ours, and in one line."""
    message = "cannot read"
    try:
        read_bytes(content)
    except ProfileError as error:
        message = str(error)
    assert "cannot read" in message or "choose" in message
    assert "\n" not in message
