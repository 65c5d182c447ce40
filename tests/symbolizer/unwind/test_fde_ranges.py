"""FDE ranges of real and of damaged files, read from the index and from the section."""

import contextlib
import dataclasses
import struct
import time
import tracemalloc
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from symbolizer.symbols.candidates import IN_FDE_RANGE
from symbolizer.symbols.elf import FileSource, MemorySource, UnreadableElf, read_elf
from symbolizer.symbols.functions import read_functions
from symbolizer.unwind.cfi import read_eh_frame
from symbolizer.unwind.fde_ranges import read_fde_ranges
from tests.support.elf_files import (
    REAL_FILES,
    build,
    real_file,
    strip,
)
from tests.support.frame_files import CODE, FrameSection, make_elf

PROGRAM = """
#define FUNCTION static __attribute__((noipa)) int
FUNCTION first(int n) { return n * 7 + (n >> 3); }
FUNCTION second(int n) { for (int i = 0; i < n; i++) n ^= first(i); return n; }
int main(int argc, char **argv) { return first(argc) + second(argc); }
"""
OWN = {b"first", b"second", b"main"}


@pytest.mark.parametrize("pattern", REAL_FILES)
def test_index_and_section_of_real_files_agree(pattern):
    """The header's table and a walk over all of .eh_frame find the same functions."""
    path = real_file(pattern)
    with path.open("rb") as file:
        elf = read_elf(FileSource(file.fileno()))
        starts, ends = read_fde_ranges(dataclasses.replace(elf, sections=()))
        walked = read_eh_frame(elf)
    order = np.argsort(starts)

    assert len(starts) > 1000
    assert np.array_equal(starts[order], walked.starts)
    assert np.array_equal(ends[order], walked.ends)


class Stripped(NamedTuple):
    """A file, and where in it .eh_frame_hdr and .eh_frame are."""

    content: bytes
    header: int
    count: int
    frames: int
    end: int

    def with_table(self, change) -> bytes:
        """Return the file with its .eh_frame_hdr's table of (first address, FDE) changed."""
        begin, end = self.header + 12, self.header + 12 + 8 * self.count
        table = np.frombuffer(self.content[begin:end], "<i4").reshape(-1, 2)
        changed = np.asarray(change(table), dtype="<i4").tobytes()
        assert len(changed) == end - begin
        return self.content[:begin] + changed + self.content[end:]

    def with_bytes(self, at: int, content: bytes) -> bytes:
        return self.content[:at] + content + self.content[at + len(content) :]


@pytest.fixture(scope="module")
def stripped(tmp_path_factory):
    path = strip(build(tmp_path_factory.mktemp("fde_ranges") / "program", PROGRAM))
    with path.open("rb") as file:
        elf = read_elf(FileSource(file.fileno()))
    sections = {section.name: section for section in elf.sections}
    header, frames = sections[b".eh_frame_hdr"], sections[b".eh_frame"]
    content = path.read_bytes()
    (count,) = struct.unpack_from("<I", content, header.offset + 8)
    return Stripped(content, header.offset, count, frames.offset, frames.offset + frames.size)


def unnamed_ranges(content: bytes) -> list[tuple[int, int]]:
    """Return the unnamed ranges in the symbol table, whatever function they are part of."""
    elf = read_elf(MemorySource(content))
    functions, _ = read_functions(elf)
    starts, ends = functions.starts.astype(np.int64), functions.ends.astype(np.int64)
    assert (starts < ends).all()
    assert (ends[:-1] <= starts[1:]).all()
    limit = max(segment.p_offset + segment.p_filesz for segment in elf.segments)
    assert not len(ends) or functions.base + ends[-1] <= limit
    is_unnamed = functions.names >> 30 == 1
    first = functions.names[is_unnamed] & ~IN_FDE_RANGE
    assert (first < len(starts)).all()
    assert (functions.starts[first] <= functions.starts[is_unnamed]).all()
    return list(zip(starts[is_unnamed].tolist(), ends[is_unnamed].tolist(), strict=True))


def test_order_of_the_table_does_not_matter(stripped):
    """The linker sorts it for the C++ runtime; we do not rely on it."""
    whole = unnamed_ranges(stripped.content)
    assert len(whole) >= len(OWN)

    assert unnamed_ranges(stripped.with_table(lambda table: table[::-1])) == whole


def test_row_that_contradicts_its_fde_is_ignored(stripped):
    """A function begins where both copies of its address say so."""
    whole = unnamed_ranges(stripped.content)
    twisted = stripped.with_table(lambda table: np.column_stack([table[:, 0], table[::-1, 1]]))
    moved = stripped.with_table(lambda table: np.add(table, [1, 0]))

    assert set(unnamed_ranges(twisted)) <= set(whole)
    # No row is valid, so .eh_frame itself is read.
    assert unnamed_ranges(moved) == whole


@pytest.mark.parametrize(
    ("at", "content"),
    [
        (0, b"\2"),  # an unknown version
        (1, b"\xff"),  # no .eh_frame
        (2, b"\xff"),  # no count
        (3, b"\xff"),  # no table
        (4, b"\xff\xff\xff\x7f"),  # .eh_frame is outside of the file
        (8, b"\xff\xff\xff\xff"),  # more rows than there are bytes
        (8, b"\0\0\0\0"),
    ],
)
def test_section_is_read_if_the_header_is_unusable(stripped, at, content):
    damaged = stripped.with_bytes(stripped.header + at, content)

    assert unnamed_ranges(damaged) == unnamed_ranges(stripped.content)


def test_table_may_end_early(stripped):
    """Functions that it does not list are left out."""
    shorter = stripped.with_bytes(stripped.header + 8, struct.pack("<I", stripped.count - 2))

    found = unnamed_ranges(shorter)

    assert found
    assert set(found) < set(unnamed_ranges(stripped.content))


def with_sizes(stripped: Stripped, change) -> bytes:
    """Return the file with the sizes in its FDEs changed, by row of the header's table."""
    content = bytearray(stripped.content)
    for row in range(stripped.count):
        _, distance = struct.unpack_from("<ii", content, stripped.header + 12 + 8 * row)
        at = stripped.header + distance + 12
        (size,) = struct.unpack_from("<I", content, at)
        struct.pack_into("<I", content, at, change(row, size))
    return bytes(content)


def test_fde_that_overlaps_the_next_ends_before_it(stripped):
    """Each function has its own start, however long the one before it claims to be."""
    whole = unnamed_ranges(stripped.content)

    last = stripped.count - 1  # it would extend beyond the code
    found = unnamed_ranges(with_sizes(stripped, lambda row, size: size + 24 * (row < last)))

    assert {start for start, _ in whole} <= {start for start, _ in found}
    assert found != whole


@pytest.mark.parametrize("size", [0, 0x7FFFFFFF, 0xFFFFFFFF])
def test_fde_that_extends_beyond_the_code_is_ignored(stripped, size):
    """So is an empty one; the others stay."""
    whole = unnamed_ranges(stripped.content)
    row = stripped.count - 1

    found = unnamed_ranges(with_sizes(stripped, lambda i, old: size if i == row else old))

    assert len(found) == len(whole) - 1
    assert set(found) < set(whole)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_damaged_headers_and_frames_raise_nothing(stripped, data):
    """With any bytes, ranges stay disjoint and inside the code."""
    content = bytearray(stripped.content)
    for _ in range(data.draw(st.integers(1, 30))):
        inside = (stripped.header, stripped.end - 1)
        fields = (stripped.header, stripped.header + 40)
        at = data.draw(st.integers(*inside) | st.integers(*fields))
        content[at] = data.draw(st.integers(0, 255) | st.sampled_from([0, 0x7F, 0x80, 0xFF]))

    unnamed_ranges(bytes(content))


@settings(max_examples=200, deadline=None)
@given(section=st.binary(max_size=400))
@example(section=b"\xff" * 400)
def test_random_frames_raise_nothing(section):
    """None of these sections is well-formed, and there is no header."""
    unnamed_ranges(make_elf({b".eh_frame": section}))


def test_overlapping_fdes_become_disjoint():
    """The later start wins; of several with one start, the longest."""
    section = FrameSection()
    section.add_cie()
    for start, size in ((256, 32), (0, 300), (64, 16), (64, 32), (0x2FF0, 0x100)):
        section.add_fde(CODE + start, size)

    found = unnamed_ranges(make_elf({b".eh_frame": section.content}))

    assert found == [(0, 64), (64, 96), (256, 288)]


def add_index(content: bytes, section: bytes, rows: int) -> bytes:
    """Replace the last program header by one of an .eh_frame_hdr with so many rows."""
    index = struct.pack("<4BiI", 1, 0x1B, 3, 0x3B, -4, rows) + section
    phoff, offset = 64 + 56, len(content)
    address = 0x10000000
    phdr = struct.pack(
        "<IIQQQQQQ", 0x6474E550, 4, offset, address, address, len(index), len(index), 4
    )
    return content[:phoff] + phdr + content[phoff + 56 :] + index


def test_many_rows_cost_little(tmp_path):
    """A table of a million rows for one FDE, and one beyond the limit, are read quickly."""
    content = make_elf({b".eh_frame": b"\xff" * 64}, code_addresses=(CODE, CODE))
    outcomes = []

    started = time.monotonic()
    for rows in (1 << 20, 1 << 21):
        path = tmp_path / f"{rows}"
        path.write_bytes(add_index(content, bytes(8 * rows), rows))
        with path.open("rb") as file:
            elf = read_elf(FileSource(file.fileno()))
            elf = dataclasses.replace(elf, loaded=(*elf.loaded, elf.eh_frame_hdr))
            tracemalloc.start()
            with contextlib.suppress(UnreadableElf):
                outcomes.append(len(read_fde_ranges(elf)[0]))
            functions, _ = read_functions(elf)
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert not len(functions.starts)
        assert peak < 96 << 20

    assert outcomes == [0]  # the second is TOO_LARGE
    assert time.monotonic() - started < 20


def test_large_section_without_an_index_is_not_read(tmp_path):
    """It would have to be walked inside the sampling process."""
    section = FrameSection()
    section.add_cie()
    section.add_fde(CODE, 64)
    assert unnamed_ranges(make_elf({b".eh_frame": section.content})) == [(0, 64)]

    assert unnamed_ranges(make_elf({b".eh_frame": section.content + bytes(3 << 20)})) == []
