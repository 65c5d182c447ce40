import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from symbolizer import maps
from symbolizer.maps import Mapping, MappingTable, parse_maps, read_maps
from tests.support.elf_files import build, file_offset, read_symbols, read_table

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


HUGE = """
#define _GNU_SOURCE
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
__attribute__((noinline, section(".hot"), aligned(4096))) void hot(void) { pause(); }
__attribute__((noinline, section(".hot"))) void end_of_hot(void) { for (;;) pause(); }
static long raw(long n, long a, long b, long c, long d, long e, long f) {
  long r;
  register long r10 asm("r10") = d; register long r8 asm("r8") = e; register long r9 asm("r9") = f;
  asm volatile("syscall" : "=a"(r) : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
               : "rcx", "r11", "memory");
  return r;
}
int main(int argc, char **argv) {
  char *text = (char *)hot, *copy;
  copy = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  memcpy(copy, text, 4096);
  mprotect(copy, 4096, PROT_READ | PROT_EXEC);
  if (argv[1][0] == 'r') raw(SYS_mremap, (long)copy, 4096, 4096, 3, (long)text, 0);
  if (argv[1][0] == 'm') {
    mmap(text, 4096, PROT_READ | PROT_WRITE | PROT_EXEC,
         MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    memcpy(text, copy, 4096);
  }
  write(1, "x", 1);
  hot();
  end_of_hot();
}
"""


@pytest.mark.parametrize("mode", ["r", "m"])
@pytest.mark.parametrize("flags", [("-static",), ("-pie",)], ids=["static", "pie"])
def test_code_that_a_program_moved_to_other_memory_is_that_of_its_file(tmp_path, mode, flags):
    """As programs do to have it on huge pages: by mremap(2), or by mmap(2) and a copy."""
    program = build(tmp_path / "program", HUGE, *flags)
    hot = next(s for s in read_symbols(program) if s.name == b"hot")
    offset = file_offset(read_table(program), hot.address)
    with subprocess.Popen([program, mode], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.read(1) == b"x"
            with Path(f"/proc/{process.pid}/maps").open("rb", buffering=0) as file:
                text = file.read(1 << 20)
                file.seek(0)
                every = [parse_maps(text), read_maps(file.fileno()), query_maps(file.fileno())]
        finally:
            process.kill()

    assert re.search(rb"(?m)^\S+ r.xp 00000000 00:00 0 *$", text)
    for mappings in every:
        own = [mapping for mapping in mappings if mapping.path == bytes(program)]
        shifts = {mapping.start - mapping.file_offset for mapping in own}
        assert len(shifts) == 1
        at = shifts.pop() + offset
        assert [m.file_offset <= offset for m in own if m.start <= at < m.end] == [True]


def query_maps(fd):
    """Ask for executable mappings only, as for processes with very many others."""
    try:
        return maps._query_maps(fd)
    except OSError:  # an older kernel
        return read_maps(fd)


PROGRAM = Mapping(0x400000, 0x500000, 0x1000, b"/bin/program", (8, 2), 7, "ab")
LIBRARY = Mapping(0x7F0000000000, 0x7F0000100000, 0x1000, b"/lib/library.so", (8, 2), 8, "cd")


@pytest.mark.parametrize(
    ("start", "end"), [(0x400000, 0x500000), (0x400000, 0x480000), (0x440000, 0x500000)]
)
def test_anonymous_memory_mapped_over_a_program_is_its_text(start, end):
    """Records tell that it was mapped, and the program's file was there before."""
    table = MappingTable.of([PROGRAM, Mapping(start, end, 0, b"//anon")])

    assert table.mappings == (PROGRAM,)


def test_anonymous_memory_mapped_where_a_library_was_is_compiled_code():
    """Nothing tells that the library was unmapped, unless parts of it are left on both sides."""
    at_end = Mapping(LIBRARY.start + 0x80000, LIBRARY.end, 0, b"//anon")
    beyond = Mapping(PROGRAM.start + 0x80000, PROGRAM.end + 0x1000, 0, b"//anon")
    inside = Mapping(LIBRARY.start + 0x40000, LIBRARY.start + 0x80000, 0, b"//anon")

    assert MappingTable.of([LIBRARY, at_end]).mappings[-1] == at_end
    assert MappingTable.of([PROGRAM, beyond]).mappings[-1] == beyond
    assert MappingTable.of([LIBRARY, inside]).mappings == (LIBRARY,)


AROUND = b"""00400000-00401000 r--p 00000000 08:02 7      /bin/program
00401000-00600000 r-xp 00000000 00:00 0
00600000-00800000 rwxp 00000000 00:00 0
00800000-00801000 r--p %08x 08:02 %d      /bin/program
"""


def test_text_that_was_moved_as_a_whole_is_known_by_the_data_around_it():
    """If that agrees on where the file is; memory between other files is compiled code."""
    assert parse_maps(AROUND % (0x400000, 7)) == [
        Mapping(0x401000, 0x600000, 0x1000, b"/bin/program", (8, 2), 7),
        Mapping(0x600000, 0x800000, 0x200000, b"/bin/program", (8, 2), 7),
    ]
    assert [m.path for m in parse_maps(AROUND % (0x3FF000, 7))] == [b"", b""]
    assert [m.path for m in parse_maps(AROUND % (0x400000, 9))] == [b"", b""]
