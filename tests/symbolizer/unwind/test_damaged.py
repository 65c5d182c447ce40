"""Damaged and crafted files: they cost bounded memory, and raise nothing but UnreadableElf."""

import contextlib
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from symbolizer.symbols.elf import MemorySource, UnreadableElf
from symbolizer.unwind.build import build
from symbolizer.unwind.rules import CfaKind
from tests.support.elf_files import build as compile_text
from tests.support.elf_files import strip
from tests.support.frame_files import CODE, FrameSection, cie, make_elf, uleb
from tests.support.unwind_tables import (
    PROGRAM,
    fdes,
    rule_at,
)


@pytest.fixture(scope="module")
def small_program(tmp_path_factory):
    path = compile_text(tmp_path_factory.mktemp("small") / "program", PROGRAM, "-O2", "-mavx2")
    return strip(path).read_bytes()


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damaged_files_raise_only_unreadable_elf(small_program, data):
    """Any bytes yield a table or a reason."""
    content = bytearray(small_program)
    frames = content.find(b"\x14\0\0\0\0\0\0\0\x01zR\0")
    for _ in range(data.draw(st.integers(1, 20))):
        near = data.draw(st.booleans())
        low, high = (frames, frames + 1200) if near else (0, len(content) - 1)
        content[data.draw(st.integers(low, high))] = data.draw(st.integers(0, 255))
    if data.draw(st.integers(0, 5)) == 0:
        del content[data.draw(st.integers(0, len(content))) :]
    source = MemorySource(bytes(content))

    try:
        table = build(source)
        starts, ends = fdes(source)
    except UnreadableElf:
        return

    table.find(np.arange(0x1000, 0x2000, dtype=np.uint64))
    assert (starts < ends).all()


@settings(max_examples=300, deadline=None)
@given(section=st.binary(max_size=400), name=st.sampled_from([b".eh_frame", b".debug_frame"]))
def test_random_sections_raise_nothing(section, name):
    """None of these sections is well-formed."""
    build(MemorySource(make_elf({name: section})))


@settings(max_examples=300, deadline=None)
@given(program=st.binary(max_size=120), initial=st.binary(max_size=30))
def test_random_programs_raise_nothing(program, initial):
    """Any bytes are run as a program, and the next function keeps its rule."""
    section = FrameSection()
    section.add_cie(cie(initial))
    section.add_fde(CODE, 64, program)
    section.add_cie()
    section.add_fde(CODE + 64, 64)

    table = build(MemorySource(make_elf({b".eh_frame": section.content})))

    assert rule_at(table, CODE + 64) == (CfaKind.RSP, 1, 0, 0)


def section_of(programs: list[bytes]) -> bytes:
    section = FrameSection()
    section.add_cie()
    for number, program in enumerate(programs):
        section.add_fde(CODE + 16 * number, 16, program)
    return bytes(section.content)


@pytest.mark.parametrize(
    "section",
    [
        pytest.param(bytes(20 << 20), id="zeros"),
        pytest.param(section_of([b"\x41\x0e\x10" * 30_000] * 20), id="long programs"),
        pytest.param(section_of([b"\x0a" * 60_000 + b"\x0b" * 60_000] * 8), id="deep states"),
        pytest.param(section_of([b"\x0a\x41\x0b" * 40_000] * 8), id="chains of states"),
        pytest.param(section_of([b"\x0f\xff\xff\xff\xff\x0f" * 20_000] * 20), id="expressions"),
        pytest.param(section_of([b"\x0e" + b"\x80" * 120_000] * 20), id="long numbers"),
        pytest.param(section_of([b"\x44" * 1_000_000]), id="beyond the limit"),
        pytest.param(cie()[:8] * 400_000, id="records without content"),
        pytest.param(b"".join(cie(uleb(n)) for n in range(60_000)), id="many CIEs"),
    ],
)
def test_memory_is_bounded_by_the_size_of_the_section(section):
    """Crafted sections take at most a few times their size."""
    source = MemorySource(make_elf({b".eh_frame": section}, code=b"\x90" * 0x100000))
    tracemalloc.start()

    with contextlib.suppress(UnreadableElf):
        build(source)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 8 * len(section) + (64 << 20)
