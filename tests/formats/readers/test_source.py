"""Bytes of foreign files: gzip in all its forms, bounds of growth, long lines, pipes."""

import functools
import gzip
import io
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiler.formats.readers import source
from profiler.formats.readers.source import LINE_LIMIT_BYTES, Source
from profiler.formats.reading import read, read_bytes
from storage.profile import ProfileError

pack = functools.partial(gzip.compress, mtime=0)  # names of tests must not differ from run to run
FOLDED = b"main;f 3\nmain;g 4\n"


@pytest.mark.parametrize(
    "content",
    [
        FOLDED,
        pack(FOLDED),
        pack(pack(FOLDED)),
        pack(pack(pack(FOLDED))),
        pack(FOLDED[:9]) + pack(FOLDED[9:]),
        pack(FOLDED) + b"\0" * 512,
        pack(FOLDED) + pack(b""),
    ],
)
def test_gzip_is_undone_however_it_was_applied(content):
    """Twice, in several members, filled up with zeros."""
    assert Source(io.BytesIO(content)).content() == FOLDED
    assert list(Source(io.BytesIO(content)).lines()) == [b"main;f 3", b"main;g 4"]


@given(
    st.lists(st.binary(max_size=40)), st.integers(1, 30), st.sampled_from([b"\n", b"\r\n", b"\r"])
)
def test_lines_are_those_of_the_text(lines, chunk_bytes, end):
    """Wherever the pieces end in which it is read, and whatever is in them."""
    content = end.join(line.replace(b"\r", b"").replace(b"\n", b"") for line in lines)

    class Slow(io.BytesIO):
        def read(self, _size=-1):
            return super().read(chunk_bytes)

    expected = content.split(end)
    if expected[-1] == b"":
        expected.pop()
    if not content.startswith((b"\x1f\x8b", b"\xef\xbb\xbf")):
        assert list(Source(Slow(content)).lines()) == expected


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r\r\n", b"\r"])
def test_a_line_end_may_lie_across_two_reads(end):
    """It is one all the same: an empty line would end a sample of perf script."""
    for length in range(source.HEAD_BYTES - 6, source.HEAD_BYTES + 1):
        content = end.join((b"a" * length, b"b", b"c"))

        assert [line[:1] for line in Source(io.BytesIO(content)).lines()] == [b"a", b"b", b"c"]


def test_a_line_without_an_end_is_cut():
    """It takes no more memory than its limit."""
    text = b"x" * (5 * LINE_LIMIT_BYTES) + b"\nshort\n"

    long, short = Source(io.BytesIO(text)).lines()

    assert LINE_LIMIT_BYTES < len(long) <= LINE_LIMIT_BYTES + 2 * source.HEAD_BYTES
    assert short == b"short"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (pack(FOLDED)[:-9], "end too early"),
        (pack(FOLDED)[:-1], "end too early"),
        (b"\x1f\x8b" + b"x" * 30, "damaged gzip data"),
        (pack(FOLDED) + b"tail", "something else follows"),
        (pack(FOLDED)[:-5] + b"\0" * 5, "damaged gzip data"),
    ],
)
def test_damaged_gzip_is_named(content, problem):
    """In words of ours."""
    with pytest.raises(ProfileError, match=problem):
        read_bytes(content)


def bomb(start: bytes, unit: bytes, size_bytes: int) -> bytes:
    """Return gzip in gzip of a text that begins with `start` and repeats `unit`."""
    outer = zlib.compressobj(9, zlib.DEFLATED, 31)
    inner = zlib.compressobj(1, zlib.DEFLATED, 31)
    block = unit * (8 * 1024 * 1024 // len(unit))
    parts = [outer.compress(inner.compress(start))]
    inner_block = inner.compress(block) + inner.flush(zlib.Z_FULL_FLUSH)
    parts.append(outer.compress(inner_block))
    # After a full flush a block is compressed to the same bytes again.
    again = inner.compress(block) + inner.flush(zlib.Z_FULL_FLUSH)
    parts += [outer.compress(again) for _ in range(size_bytes // len(block))]
    return b"".join((*parts, outer.flush()))


CHECK = """
import resource, sys
from profiler.formats.reading import read
from storage.profile import ProfileError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read(sys.argv[1])
except ProfileError as error:
    print(error)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) // 1024)
"""


def check(file: Path) -> tuple[str, int]:
    """Return what another process says of a file, and the memory that reading took, in MiB."""
    result = subprocess.run(
        [sys.executable, "-c", CHECK, file],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    message, cost_mib = result.stdout.strip().rsplit("\n", 1)
    return message, int(cost_mib)


@pytest.mark.parametrize(
    ("start", "unit"),
    [
        (b"main;f 1\n", b"main;f 1\n"),
        (b"", b"a" * 1024),
        (b'{"shared":{"frames":[]},"profiles":[', b"[],"),
        (b'{"shared":{"frames":[', b'{"name":"a"},'),
        (b"\x0a\x04\x08\x01\x10\x02", b"\x12\0"),
        (b"\x0a\x04\x08\x01\x10\x02", b"\x12\x02\x0a\0"),
        (b"prog 1/1 1.0: 5 cycles: \n", b"\t401136 f (/x)\n"),
    ],
)
def test_a_few_bytes_do_not_grow_into_gigabytes(tmp_path, start, unit):
    """Gzip in gzip of 1.7 GB costs less than 200 MB, and is refused in words of ours."""
    file = tmp_path / "bomb.gz"
    file.write_bytes(bomb(start, unit, 1_700_000_000))
    assert file.stat().st_size < 300_000

    message, cost_mib = check(file)

    assert cost_mib < 200
    assert "bomb.gz: cannot read" in message


def distinct_stacks(frames: int) -> bytes:
    """Return gzip of folded text whose stacks differ in their last frame only."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, 31)
    start = b"main;" * frames
    lines = (start + b"f%d 1\n" % i for i in range(100_000_000 // len(start)))
    return b"".join((*map(compressor.compress, lines), compressor.flush()))


@pytest.mark.parametrize("frames", [100, 10_000])
def test_distinct_stacks_are_bounded_by_the_size_on_disk(tmp_path, frames):
    """Their text is short in gzip, and all of it is kept."""
    file = tmp_path / "stacks.gz"
    file.write_bytes(distinct_stacks(frames))

    message, cost_mib = check(file)

    assert cost_mib < 200
    assert "stacks.gz: cannot read it: the stacks and names in" in message


def test_repetitive_text_is_read_however_small_gzip_makes_it():
    """A program of one stack, deep in a recursion, sampled for a long time."""
    frame = b"\t    7f0000001000 visit(std::vector<Node*> const&)+0x1c (/srv/api)\n"
    sample = b"api 7/7 [000] 1.500000:   10101010 cpu-clock: \n" + frame * 60 + b"\n"
    script = sample * 10_000
    folded = (b"visit(std::vector<Node*> const&);" * 60 + b"leaf 1\n") * 20_000

    for text, samples in ((script, 10_000), (folded, 20_000)):
        content = pack(text)
        assert len(text) > 150 * len(content) + 16 * 1024 * 1024
        assert read_bytes(content).profile.total_samples == samples


WRITE = "import sys; open(sys.argv[1], 'wb').write(bytes.fromhex(sys.argv[2]))"


@pytest.mark.parametrize("compress", [pack, bytes])
def test_a_pipe_is_read_once(tmp_path, compress):
    """`everflame flamegraph <(perf script)` cannot be opened twice."""
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    writer = subprocess.Popen([sys.executable, "-c", WRITE, fifo, compress(FOLDED).hex()])

    assert read(str(fifo)).profile.total_samples == 7
    assert writer.wait(timeout=30) == 0
