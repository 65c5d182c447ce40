from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from symbolizer.maps import Mapping, MappingTable, parse_maps

LINES = rb"""00400000-00452000 r-xp 00001000 08:02 173521      /usr/bin/dbus-daemon
00651000-00652000 r--p 00051000 08:02 173521      /usr/bin/dbus-daemon
35b1800000-35b1820000 r-xp 00000000 fd:0c 135522  /opt/two words\012and a line (deleted)
7f0000000000-7f0000001000 rwxp 00000000 00:00 0
7fff000000-7fff001000 r-xp 00000000 00:00 0 [vdso]
"""


def test_only_executable_mappings_are_read():
    """Data mappings contain no instructions; a path may be missing or contain blanks."""
    mappings = parse_maps(LINES)

    assert [mapping.path for mapping in mappings] == [
        b"/usr/bin/dbus-daemon",
        b"/opt/two words\nand a line (deleted)",
        b"",
        b"[vdso]",
    ]
    assert mappings[0] == Mapping(
        0x400000, 0x452000, 0x1000, b"/usr/bin/dbus-daemon", (8, 2), 173521
    )


def test_deleted_file_keeps_its_path():
    """` (deleted)` is not a part of the path to open."""
    mapping = parse_maps(LINES)[1]

    assert mapping.path.endswith(b" (deleted)")
    assert mapping.file_path == b"/opt/two words\nand a line"


def test_carriage_return_in_a_path_does_not_begin_a_line():
    """The kernel escapes newlines only; a file's name could otherwise forge a mapping."""
    path = b"/tmp/a\r00500000-00501000 r-xp 00000000 08:02 7 /usr/bin/other"

    mappings = parse_maps(b"00400000-00401000 r-xp 00000000 08:02 9 " + path + b"\n")

    assert [(mapping.start, mapping.path) for mapping in mappings] == [(0x400000, path)]


def test_truncated_line_is_left_out():
    """If the process exits meanwhile, its maps may end anywhere."""
    for end in range(len(LINES)):
        assert len(parse_maps(LINES[:end])) <= 4


def test_own_maps_contain_own_code():
    """The first mapping of this interpreter is found by its addresses."""
    table = MappingTable.of(parse_maps(Path("/proc/self/maps").read_bytes()))

    inside = np.array([table.starts[0], table.ends[0] - 1, 1], dtype=np.uint64)

    assert table.find(inside).tolist() == [0, 0, -1]
    interpreter = bytes(Path("/proc/self/exe").readlink())
    assert interpreter in [mapping.path for mapping in table.mappings]


def test_empty_table_finds_nothing():
    """For a process that exited early, the table says which module stands for it."""
    table = MappingTable.of([], missing="[exited]")

    assert table.find(np.array([1, 2], dtype=np.uint64)).tolist() == [-1, -1]
    assert table.missing == "[exited]"


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), max_size=12))
def test_later_mapping_replaces_earlier_ones(ranges):
    """Each address belongs to the last mapping over it, at the file offset it had there."""
    mappings = [
        Mapping(start, start + length, 1000 * number + start, b"/%d" % number)
        for number, (start, length) in enumerate(ranges)
    ]
    table = MappingTable.of(mappings)

    found = table.find(np.arange(100, dtype=np.uint64)).tolist()

    for address, number in enumerate(found):
        truth = [m for m in mappings if m.start <= address < m.end]
        if not truth:
            assert number == -1
            continue
        mapping = table.mappings[number]
        assert mapping.path == truth[-1].path
        expected = truth[-1].file_offset + address - truth[-1].start
        assert mapping.file_offset + address - mapping.start == expected
