"""Jitdumps: which records count, and how far damaged and unfinished ones are read."""

import contextlib
import struct

import hypothesis.strategies as st
import pytest
from hypothesis import given

from symbolizer.runtimes.jitdump import DamagedDump, JitDump
from tests.support.jit_programs import (
    dump_header,
    dump_lines,
    dump_load,
    dump_move,
    dump_record,
)


def read(content: bytes, dump: JitDump | None = None) -> JitDump:
    dump = dump or JitDump()
    assert dump.read(lambda at, size: content[at : at + size], len(content), lambda: False)
    return dump


@pytest.mark.parametrize("order", ["<", ">"])
def test_code_is_named_by_its_load_record(order: str):
    """The magic tells in which order the bytes of numbers are."""
    dump = read(dump_header(order) + dump_load(0x7F00, 16, b"made", order))

    assert dump.find([0x7F0F, 0x7F10]) == [(0x7F00, 0x7F10, b"made", b"", 0)]


def test_lines_are_those_of_the_record_before_the_code():
    """Code before the first line has none."""
    lines = [(0x7F04, 10, b"/a.c"), (0x7F08, 12, b"\xff"), (0x7F0C, 3, b"/b.c")]
    content = dump_lines(0x7F00, lines) + dump_load(0x7F00, 16, b"f") + dump_load(0x8000, 4, b"g")

    found = read(dump_header() + content).find([0x7F00, 0x7F05, 0x7F08, 0x7F09, 0x7F0E, 0x8000])

    assert found == [
        (0x7F00, 0x7F04, b"f", b"", 0),
        (0x7F04, 0x7F08, b"f", b"/a.c", 10),
        (0x7F08, 0x7F0C, b"f", b"/a.c", 12),
        (0x7F0C, 0x7F10, b"f", b"/b.c", 3),
        (0x8000, 0x8004, b"g", b"", 0),
    ]


def test_lines_of_other_code_do_not_count():
    content = dump_lines(0x9000, [(0x7F00, 10, b"/a.c")]) + dump_load(0x7F00, 16, b"f")

    assert read(dump_header() + content).find([0x7F00]) == [(0x7F00, 0x7F10, b"f", b"", 0)]


def test_v8_counts_an_elf_header_to_the_addresses_of_lines():
    """As perf wants it for the ELF files that it makes of the code."""
    name = b"JS:*f /a.js:1:2"
    content = dump_lines(0x7F00, [(0x7F48, 3, b"/a.js")]) + dump_load(0x7F00, 16, name)

    assert read(dump_header() + content).find([0x7F09]) == [(0x7F08, 0x7F10, name, b"/a.js", 3)]


def test_code_that_moves_takes_name_and_lines_with_it():
    content = dump_lines(0x7F00, [(0x7F04, 3, b"/a.c")]) + dump_load(0x7F00, 16, b"f")
    content += dump_move(0x7F00, 0x9000, 16) + dump_move(0x1234, 0x9100, 16)

    found = read(dump_header() + content).find([0x9004, 0x9100])

    assert found == [(0x9004, 0x9010, b"f", b"/a.c", 3)]


def test_a_record_counts_when_it_is_whole():
    """A writer may be in the middle of one, and may have made room for it with zeros."""
    content = dump_header() + dump_load(0x7F00, 16, b"first") + dump_load(0x8000, 16, b"second")
    dump = JitDump()
    seen = []
    for end in range(len(content) + 1):
        read(content[:end] + bytes(24) * (end > 200), dump)
        seen.append(len(dump.find([0x7F00, 0x8000])))

    assert seen == sorted(seen)
    assert seen[-1] == dump.records == 2


def test_records_of_other_kinds_are_passed_over():
    others = dump_record(4, bytes(99)) + dump_record(77, b"") + dump_record(0, b"short")
    dump = read(dump_header() + others + dump_load(0x7F00, 16, b"f") + dump_record(3, b""))

    assert len(dump.find([0x7F00])) == 1
    assert dump.is_closed


@pytest.mark.parametrize(
    "content",
    [
        b"\x7fELF" + bytes(60),
        struct.pack("<IIIIIIQQ", 0x4A695444, 2, 40, 62, 0, 7, 1, 0),
        dump_header() + struct.pack("<IIQ", 0, 8, 1),
    ],
    ids=["no header", "another version", "a record shorter than its head"],
)
def test_what_is_no_jitdump_is_damaged(content: bytes):
    with pytest.raises(DamagedDump):
        read(content)


def test_what_was_read_before_the_damage_holds():
    content = dump_header() + dump_load(0x7F00, 16, b"f") + struct.pack("<IIQ", 0, 8, 1)
    dump = JitDump()
    with pytest.raises(DamagedDump):
        read(content, dump)

    assert len(dump.find([0x7F00])) == 1


def test_reading_is_interrupted_and_goes_on():
    content = dump_header() + b"".join(dump_load(0x1000 * i, 16, b"f%d" % i) for i in range(1, 9))
    dump = JitDump()
    turns = 0
    while not dump.read(
        lambda at, size: content[at : at + size], len(content), iter([False, True]).__next__
    ):
        turns += 1

    assert turns == 8  # one for each record
    assert len(dump.find(range(0x1000, 0x9000, 0x1000))) == 8


@given(st.binary(max_size=200), st.integers(0, 400))
def test_nothing_in_a_jitdump_raises_anything_else(noise: bytes, at: int):
    whole = dump_header() + dump_lines(0x7F00, [(0x7F04, 3, b"/a.c")]) * 3
    whole += dump_load(0x7F00, 16, b"f") + dump_move(0x7F00, 0x9000, 16)
    content = whole[:at] + noise + whole[at + len(noise) :]
    dump = JitDump()
    with contextlib.suppress(DamagedDump):
        read(content, dump)
    dump.find([0x7F00, 0x9000])
