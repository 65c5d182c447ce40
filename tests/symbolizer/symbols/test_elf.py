"""The headers of ELF files: entry points, build ids, and files that cannot be read."""

import os
from pathlib import Path

import pytest

from symbolizer.location import Miss
from symbolizer.symbols.elf import FileSource, UnreadableElf, read_elf
from symbolizer.unwind import build as unwind_build
from tests.support.elf_files import (
    build,
    read_elf_header,
    read_table,
)


def test_entry_point_of_a_library_is_not_start():
    """libc.so.6 can be run and has an entry, but it is `__libc_main`, not `_start`."""
    libc = Path(os.path.realpath("/lib/x86_64-linux-gnu/libc.so.6"))
    fd = os.open(libc, os.O_RDONLY)

    assert read_elf(FileSource(fd)).entry is None

    os.close(fd)


def test_build_id_outside_the_segments_is_found(tmp_path):
    """A note that no segment covers is found by its section, as in Go programs."""
    path = build(tmp_path / "library", "int f(void){return 1;}", "-shared", "-Wl,--build-id=0xabcd")
    content = bytearray(path.read_bytes())
    header = read_elf_header(path)
    for number in range(header.phnum):  # call each PT_NOTE a PT_NULL
        place = header.phoff + 56 * number
        if content[place] == 4:
            content[place] = 0
    path.write_bytes(content)
    fd = os.open(path, os.O_RDONLY)

    build_id = read_elf(FileSource(fd)).build_id

    os.close(fd)
    assert build_id == "abcd"


def test_file_without_build_id_is_identified_by_its_content(tmp_path):
    """Equal files at any path are one module, different ones are two."""
    ids = []
    for number, value in enumerate((1, 1, 2)):
        source = f"int f(void){{return {value};}}"
        path = build(tmp_path / f"{number}", source, "-shared", "-Wl,--build-id=none")
        fd = os.open(path, os.O_RDONLY)
        ids.append(read_elf(FileSource(fd)).build_id)
        os.close(fd)

    assert ids[0].startswith("hash-")
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize("damage", ["elsewhere", "cut off", "odd counts"])
def test_program_without_its_section_headers_keeps_its_unwind_rules(damage, tmp_path):
    """The kernel runs it, as it looks at program headers only; so the build id stays, too."""
    path = build(tmp_path / "whole", "int main(void){return 1;}", "-Wl,--build-id=0xabcd")
    content = bytearray(path.read_bytes())
    shoff = int.from_bytes(content[0x28:0x30], "little")
    if damage == "elsewhere":
        content[0x28:0x30] = (2**63 - 8).to_bytes(8, "little")
    elif damage == "odd counts":
        content[0x28:0x30] = (2**63 - 8).to_bytes(8, "little")
        content[0x3A:0x40] = b"\x40\0\0\0\xff\xff"
    else:
        del content[shoff:]
    damaged = tmp_path / "damaged"
    damaged.write_bytes(content)

    tables = []
    for each in (path, damaged):
        fd = os.open(each, os.O_RDONLY)
        elf, table = read_elf(FileSource(fd)), unwind_build.build(FileSource(fd))
        tables.append((elf.build_id, elf.segments, table.rows.tobytes()))
        os.close(fd)

    assert tables[0] == tables[1]
    assert tables[0][0] == "abcd"
    assert tables[0][2]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", Miss.NOT_ELF),
        (b"#!/bin/sh\n", Miss.NOT_ELF),
        (b"\x7fELF", Miss.DAMAGED),
        (b"\x7fELF" + b"\xff" * 60, Miss.DAMAGED),
    ],
)
def test_file_that_is_not_a_program_has_a_reason(tmp_path, content, reason):
    path = tmp_path / "file"
    path.write_bytes(content)

    with pytest.raises(UnreadableElf) as raised:
        read_table(path)

    assert raised.value.reason == reason
