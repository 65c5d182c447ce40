"""Unwind tables: pages and rows, limits, and the file they are stored in."""

import dataclasses
import io
import struct
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from symbolizer.location import Miss
from symbolizer.runtimes.image import Image, Refusal, StateKind
from symbolizer.runtimes.layouts import LAYOUTS
from symbolizer.symbols.elf import MemorySource, UnreadableElf
from symbolizer.unwind.build import build
from symbolizer.unwind.rules import CfaKind
from symbolizer.unwind.table import PAGE_BITS, StoredTable, UnwindCache, UnwindTable
from tests.support.frame_files import CODE, FrameSection, cie, make_elf
from tests.support.unwind_tables import read_unwind_table, rule_at


def test_padding_between_functions_has_no_row():
    """It is never executed; a gap large enough for an aligned function is a hole."""
    section = FrameSection()
    section.add_cie()
    section.add_fde(CODE, 30)
    section.add_fde(CODE + 32, 30)
    section.add_fde(CODE + 80, 30)

    table = build(MemorySource(make_elf({b".eh_frame": section.content})))

    kinds = [rule_at(table, CODE + n)[0] for n in (30, 31, 61, 62, 79, 110, 127)]
    assert kinds == [*[CfaKind.RSP] * 3, *[CfaKind.HOLE] * 4]
    # The first function (also at the page's start), a hole, the third function, a hole.
    assert len(table.rows) == 4


def test_pages_repeat_the_rule_in_force():
    """A look-up stays in the page of its address; pages without rules are omitted."""
    section = FrameSection()
    section.add_cie()
    section.add_fde(CODE + 0x100, 0x3000, b"\x0e\x20")
    elf = make_elf({b".eh_frame": section.content}, code=b"\x90" * 0x6000)

    table = build(MemorySource(elf))

    first = CODE >> PAGE_BITS
    assert table.pages["number"].tolist() == [first, first + 1, first + 2, first + 3]
    assert table.pages["count"].tolist() == [2, 1, 1, 2]
    assert table.pages["first"].tolist() == [0, 2, 3, 4]
    assert (table.rows["pc_low"][table.pages["first"]] == 0).all()
    assert rule_at(table, CODE + 0x3100) == (CfaKind.HOLE, 0, 0, 0)
    assert rule_at(table, CODE + 0x30FF) == (CfaKind.RSP, 4, 0, 0)
    assert rule_at(table, 0x500000) == (CfaKind.HOLE, 0, 0, 0)


def test_file_without_any_rules_has_an_empty_table():
    """This is not an error, and the table takes no memory."""
    table = build(MemorySource(make_elf({})))

    assert (table.row_count, len(table.pages)) == (0, 0)
    assert rule_at(table, CODE) == (CfaKind.HOLE, 0, 0, 0)


def far_apart(*addresses: int) -> MemorySource:
    section = FrameSection()
    section.add_cie(cie(data=b"\x00"))
    for address in addresses:
        section.add_fde(address, 32, form="<Q", is_relative=False)
    return MemorySource(make_elf({b".eh_frame": section.content}, code_addresses=addresses))


def test_code_at_high_addresses_has_rules():
    """Up to the highest page number; by file offset, at any address."""
    address, highest = (1 << 44) - (1 << 16), (1 << 47) - (1 << 16)

    assert rule_at(build(far_apart(address)), address)[0] == CfaKind.RSP
    by_place = build(far_apart(highest), by_file_offset=True)
    assert by_place.rows["cfa_kind"][:2].tolist() == [CfaKind.RSP, CfaKind.HOLE]


@pytest.mark.parametrize(
    "addresses", [(1 << 44,), (1 << 48,), ((1 << 63) - (1 << 20),), (CODE, 1 << 36)]
)
def test_code_beyond_the_address_limits_is_refused(addresses):
    """Page numbers have 32 bits, and a crafted file must not need 4 billion pages."""
    with pytest.raises(UnreadableElf) as caught:
        build(far_apart(*addresses))

    assert caught.value.reason == Miss.TOO_LARGE


def test_other_machines_are_refused():
    """Nothing is read from an i386 file."""
    elf = bytearray(make_elf({b".eh_frame": b""}))
    elf[0x12:0x14] = struct.pack("<H", 3)

    with pytest.raises(UnreadableElf) as caught:
        build(MemorySource(bytes(elf)))

    assert caught.value.reason == Miss.UNSUPPORTED


def content_of(table: UnwindTable) -> bytes:
    written = io.BytesIO()
    table.write(written)
    return written.getvalue()


def test_saved_table_is_loaded_unchanged():
    """Key, pages and rows are equal."""
    table = read_unwind_table("/bin/bash")

    loaded = UnwindTable.read(content_of(table), table.key)

    assert loaded is not None
    assert loaded.key == table.key
    assert (loaded.rows == table.rows).all()
    assert (loaded.pages == table.pages).all()


def test_empty_table_is_saved_too():
    """So its file is not read again."""
    table = build(MemorySource(make_elf({})))

    loaded = UnwindTable.read(content_of(table), table.key)

    assert loaded is not None
    assert len(loaded.rows) == 0


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_table_is_not_loaded(data):
    """One wrong byte anywhere, or a byte less, makes it count as missing, also where it is read
    in parts."""
    section = FrameSection()
    section.add_cie()
    section.add_fde(CODE, 64, b"\x41\x0e\x10")
    table = build(MemorySource(make_elf({b".eh_frame": section.content})))
    content = bytearray(content_of(table))
    place = data.draw(st.integers(-1, len(content) - 1))
    if place < 0:
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[place] ^= data.draw(st.integers(1, 255))

    assert UnwindTable.read(bytes(content), table.key) is None
    assert opened(bytes(content), table.key) is None


def opened(content: bytes, key: str) -> StoredTable | None:
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        return StoredTable.open(file, key)


def test_stored_table_is_read_page_by_page():
    """Every page has the rows it has in memory, though the file is closed and may be evicted."""
    table = read_unwind_table("/bin/bash")

    stored = opened(content_of(table), table.key)

    assert stored is not None
    assert stored.key == table.key
    assert stored.row_count == len(table.rows)
    assert (stored.pages == table.pages).all()
    for place in range(len(table.pages)):
        assert (stored.rows_of(place) == table.rows_of(place)).all()


IMAGE = Image(
    version=0x030C01F0,
    free_threaded=False,
    layout=LAYOUTS[12],
    refusal=Refusal.NONE,
    evaluation=((CODE, CODE + 8), (CODE + 32, CODE + 64)),
    code_type=1 << 47,
    state_kind=StateKind.STATIC_TLS,
    state_offset=-24,
    detached_kind=StateKind.KEY,
    detached_address=1 << 40,
    runtime=1 << 46,
)


@pytest.mark.parametrize("image", [IMAGE, Image(0, True, None, Refusal.UNKNOWN_VERSION), None])
def test_table_of_an_interpreter_has_its_image(image):
    """It is read with the table and with the part of it that is read first."""
    table = dataclasses.replace(build(MemorySource(make_elf({}))), image=image)
    content = content_of(table)

    loaded, stored = UnwindTable.read(content, table.key), opened(content, table.key)

    assert loaded is not None
    assert stored is not None
    assert loaded.image == stored.image == image


@pytest.mark.parametrize("packed", [b"x", b"\0" * 80, b"x" * 1024, b"\0" * 1025])
def test_table_with_a_damaged_image_is_not_loaded(packed, monkeypatch):
    """Whoever wrote it had a checksum for it."""
    table = dataclasses.replace(build(MemorySource(make_elf({}))), image=IMAGE)
    monkeypatch.setattr(Image, "pack", lambda _: packed)
    content = content_of(table)

    assert UnwindTable.read(content, table.key) is None
    assert opened(content, table.key) is None


def test_table_of_another_file_is_not_loaded(tmp_path):
    """A table contains its key; a missing file has no table."""
    table = read_unwind_table("/bin/bash")

    assert UnwindTable.read(content_of(table), "00" * 20) is None
    assert UnwindCache(tmp_path).load(table.key) is None
