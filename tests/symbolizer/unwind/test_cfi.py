"""Reading CIEs and FDEs: where they are, how addresses are encoded, and what is left out."""

import os
import struct
import subprocess
import tracemalloc
import zlib
from pathlib import Path

import pytest

from symbolizer.location import Miss
from symbolizer.symbols.elf import FileSource, MemorySource, UnreadableElf
from symbolizer.unwind.build import build
from symbolizer.unwind.rules import CfaKind
from tests.support.elf_files import build as compile_text
from tests.support.elf_files import strip
from tests.support.frame_files import CODE, FRAMES, FrameSection, cie, make_elf
from tests.support.readelf_frames import read_rows
from tests.support.unwind_tables import PROGRAM, fdes, rule_at


@pytest.mark.parametrize(
    ("encoding", "form", "is_relative"),
    [
        (0x1B, "<i", True),
        (0x1C, "<q", True),
        (0x14, "<Q", True),
        (0x00, "<Q", False),
        (0x03, "<I", False),
        (0x04, "<Q", False),
        (0x0B, "<i", False),
        (0x0C, "<q", False),
    ],
)
def test_addresses_are_read_in_the_encoding_of_their_cie(encoding, form, is_relative):
    """A CIE says how wide the addresses of its FDEs are, and what they are relative to."""
    section = FrameSection()
    section.add_cie(cie(data=bytes([encoding])))
    if form == "<Q" and is_relative:
        form = "<q"  # the same bytes
    section.add_fde(CODE + 64, 32, b"\x44\x0e\x20", form=form, is_relative=is_relative)

    table = build(MemorySource(make_elf({b".eh_frame": section.content})))

    assert rule_at(table, CODE + 63) == (CfaKind.HOLE, 0, 0, 0)
    assert rule_at(table, CODE + 64) == (CfaKind.RSP, 1, 0, 0)
    assert rule_at(table, CODE + 67) == (CfaKind.RSP, 1, 0, 0)
    assert rule_at(table, CODE + 68) == (CfaKind.RSP, 4, 0, 0)
    assert rule_at(table, CODE + 96) == (CfaKind.HOLE, 0, 0, 0)


@pytest.mark.parametrize("encoding", [0x01, 0x1A + 0x20, 0x9B, 0xFF, 0x50])
def test_fdes_with_unreadable_addresses_are_left_out(encoding):
    """They leave a hole; FDEs of other CIEs are read."""
    section = FrameSection()
    section.add_cie(cie(data=bytes([encoding])))
    section.add_fde(CODE, 32)
    section.add_cie()
    section.add_fde(CODE + 64, 32)

    table = build(MemorySource(make_elf({b".eh_frame": section.content})))

    assert rule_at(table, CODE)[0] == CfaKind.HOLE
    assert rule_at(table, CODE + 64)[0] == CfaKind.RSP


@pytest.mark.parametrize(
    ("augmentation", "data", "is_read"),
    [
        (b"", b"", True),
        (b"zPLR", b"\x9b\1\2\3\4\x1b\x1b", True),
        (b"zRS", b"\x1b", True),
        (b"zRB", b"\x1b", True),
        (b"zR", b"\x1b\x3e\x3e", True),
        (b"zRX", b"\x1b\0", False),
        (b"eh", b"", False),
        (b"zP", b"\x0f", False),
    ],
)
def test_augmentations_are_skipped_if_they_are_known(augmentation, data, is_read):
    """Data of known letters is skipped; an unknown letter may have any data."""
    section = FrameSection()
    section.add_cie(cie(augmentation=augmentation, data=data))
    if augmentation.startswith(b"z"):
        section.add_fde(CODE, 32)
    else:
        section.add_fde(CODE, 32, form="<Q", is_relative=False, data=b"")

    table = build(MemorySource(make_elf({b".eh_frame": section.content})))

    assert (rule_at(table, CODE) == (CfaKind.RSP, 1, 0, 0)) == is_read


@pytest.mark.parametrize(
    "changes",
    [
        {"return_register": 8},
        {"code_alignment": 0},
        {"code_alignment": 1000},
        {"code_alignment": 1 << 69},
        {"data_alignment": 1 << 68, "program": b"\x12\x07\x05"},
        {"program": b"\x3e"},
    ],
)
def test_fdes_of_unsupported_cies_are_unsupported(changes):
    """Their addresses are known but not their rules, so they are not holes."""
    section = FrameSection()
    section.add_cie(cie(**changes))
    section.add_fde(CODE, 32)

    table = build(MemorySource(make_elf({b".eh_frame": section.content})))

    assert rule_at(table, CODE) == (CfaKind.UNSUPPORTED, 0, 0, 0)
    assert rule_at(table, CODE + 32)[0] == CfaKind.HOLE


def test_zeros_do_not_end_the_section():
    """Terminators that linkers leave in the middle are skipped."""
    section = FrameSection()
    section.add_cie()
    section.add_fde(CODE, 32)
    section.content += b"\0" * 4
    section.add_fde(CODE + 64, 32)
    section.content += b"\0" * 20
    section.add_cie()
    section.add_fde(CODE + 128, 32)
    section.content += b"\0" * 4

    table = build(MemorySource(make_elf({b".eh_frame": section.content})))

    assert [rule_at(table, CODE + n)[0] for n in (0, 64, 128)] == [CfaKind.RSP] * 3


def test_truncated_record_is_left_out():
    """It may lack instructions that change its rules; the records before it are complete."""
    section = FrameSection()
    section.add_cie()
    section.add_fde(CODE, 32)
    section.add_fde(CODE + 64, 32)

    table = build(MemorySource(make_elf({b".eh_frame": section.content[:-4]})))

    assert rule_at(table, CODE)[0] == CfaKind.RSP
    assert rule_at(table, CODE + 64)[0] == CfaKind.HOLE


def test_several_sections_are_read():
    """Addresses in the second one are relative to where it is loaded."""
    first, second = FrameSection(), FrameSection()
    for section, start in ((first, CODE), (second, CODE + 64)):
        section.add_cie()
        section.add_fde(start, 32)
    second = FrameSection(FRAMES + len(first.content))
    second.add_cie()
    second.add_fde(CODE + 64, 32)
    elf = make_elf({b".eh_frame": first.content, b".eh_framE": second.content})

    table = build(MemorySource(elf.replace(b".eh_framE", b".eh_frame")))

    assert [rule_at(table, CODE + n)[0] for n in (0, 64)] == [CfaKind.RSP] * 2


def test_unsorted_and_overlapping_fdes_become_disjoint():
    """The later start wins; of equal starts the longest; empty FDEs cover nothing."""
    section = FrameSection()
    section.add_cie()
    section.add_fde(CODE + 256, 32, b"\x0e\x10")
    section.add_fde(CODE, 300, b"\x0e\x18")
    section.add_fde(CODE + 64, 16, b"\x0e\x20")
    section.add_fde(CODE + 64, 32, b"\x0e\x28")
    section.add_fde(CODE + 8, 0, b"\x0e\x30")

    table = build(MemorySource(make_elf({b".eh_frame": section.content})))
    starts, ends = fdes(MemorySource(make_elf({b".eh_frame": section.content})))

    assert [rule_at(table, CODE + n)[1] for n in (0, 8, 63, 64, 95, 256, 287)] == [
        *(3, 3, 3, 5, 5, 2, 2)
    ]
    assert rule_at(table, CODE + 96)[0] == CfaKind.HOLE
    assert (starts - CODE).tolist() == [0, 64, 256]
    assert (ends - CODE).tolist() == [64, 96, 288]


def test_functions_discarded_by_the_linker_are_left_out():
    """The addresses of their FDEs are zero or outside code."""
    section = FrameSection()
    section.add_cie()
    section.add_null_fde()
    section.add_fde(16, 64)
    section.add_fde(CODE - 64, 128)
    section.add_fde(CODE + 128, 32)

    starts, _ = fdes(MemorySource(make_elf({b".eh_frame": section.content})))

    assert starts.tolist() == [CODE + 128]


def test_null_is_not_a_function_even_if_code_is_linked_at_zero():
    """Position-independent files may have their headers in the executable segment."""
    section = FrameSection()
    section.add_cie()
    section.add_null_fde()
    section.add_fde(32, 32)
    elf = make_elf({b".eh_frame": section.content}, code_addresses=(0,))

    starts, _ = fdes(MemorySource(elf))

    assert starts.tolist() == [32]


def test_sections_without_headers_are_found(tmp_path):
    """A file without section headers has the same rules as with them."""
    path = compile_text(tmp_path / "program", PROGRAM)
    content = bytearray(path.read_bytes())
    with_headers = build(MemorySource(bytes(content)))
    content[0x28:0x30] = bytes(8)
    content[0x3A:0x40] = bytes(6)

    table = build(MemorySource(bytes(content)))

    assert (table.rows == with_headers.rows).all()


def test_eh_frame_hdr_does_not_affect_rules(tmp_path):
    """It may contain anything."""
    path = compile_text(tmp_path / "program", PROGRAM)
    content = bytearray(path.read_bytes())
    before = build(MemorySource(bytes(content)))
    headers = subprocess.run(
        ["readelf", "-SW", path], check=True, capture_output=True, text=True
    ).stdout
    line = next(line for line in headers.splitlines() if ".eh_frame_hdr" in line)
    offset, size = (int(field, 16) for field in line.split("]")[1].split()[3:5])
    content[offset : offset + size] = b"\xff" * size

    assert (build(MemorySource(bytes(content))).rows == before.rows).all()


def test_vdso_is_read_from_memory():
    """The kernel's own library has rules, too."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    vdso = next((line for line in maps if line.endswith("[vdso]")), None)
    if vdso is None:
        pytest.skip("no vDSO")
    start, end = (int(part, 16) for part in vdso.split()[0].split("-"))
    with Path("/proc/self/mem").open("rb", 0) as memory:
        memory.seek(start)
        image = memory.read(end - start)

    table = build(MemorySource(image))

    starts, _ = fdes(MemorySource(image))
    assert len(starts) > 3
    assert (table.find(starts)["cfa_kind"] == CfaKind.RSP).all()


def test_functions_equal_those_of_readelf(tmp_path):
    """Each FDE has the same range."""
    path = strip(compile_text(tmp_path / "program", PROGRAM))
    fd = os.open(path, os.O_RDONLY)

    starts, ends = fdes(FileSource(fd))

    os.close(fd)
    rows = list(read_rows(path))
    assert set(starts.tolist()) <= {row.start for row in rows}
    assert set(ends.tolist()) <= {row.end for row in rows}
    assert all(((starts <= row.start) & (row.end <= ends)).any() for row in rows)


def test_decompression_bomb_is_refused():
    """The size in the section's header limits how much is decompressed."""
    chdr = struct.pack("<IIQQ", 1, 0, 1 << 40, 1)
    small = struct.pack("<IIQQ", 1, 0, 100, 1)
    bomb = zlib.compress(bytes(100 << 20))
    flags = {b".debug_frame": 0x800}

    with pytest.raises(UnreadableElf) as caught:
        build(MemorySource(make_elf({b".debug_frame": chdr + bomb}, flags=flags)))
    tracemalloc.start()
    table = build(MemorySource(make_elf({b".debug_frame": small + bomb}, flags=flags)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert caught.value.reason == Miss.TOO_LARGE
    assert len(table.rows) == 0
    assert peak < 16 << 20
