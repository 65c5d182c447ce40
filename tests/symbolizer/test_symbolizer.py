"""Addresses of running processes are located and named, whatever happens to their files."""

import contextlib
import os
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest

from symbolizer.location import AddressLocation, Frame, Kind, Miss, NamedLocation
from symbolizer.maps import Mapping, MappingTable, parse_maps
from symbolizer.symbolizer import Symbolizer
from tests.support.elf_files import build, read_symbols, strip

PROGRAM = """
#include <stdio.h>
#include <sys/mman.h>
#include <time.h>
__attribute__((noinline)) int work(int n) { return n * 7 + (n >> 3); }
int main(int argc, char **argv) {
    int access = PROT_READ | PROT_WRITE | PROT_EXEC;
    void *code = mmap(0, 4096, access, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    printf("%p %p %p\\n", work, code, (void *)puts);
    fflush(stdout);
    return work(getchar());
}
"""

needs_map_files = pytest.mark.skipif(
    os.geteuid() != 0, reason="/proc/PID/map_files needs CAP_CHECKPOINT_RESTORE: run as root"
)


@pytest.fixture
def symbolizer(tmp_path):
    symbolizer = Symbolizer(tmp_path / "cache")
    yield symbolizer
    symbolizer.close()


@pytest.fixture
def program(tmp_path):
    return build(tmp_path / "program", PROGRAM)


@contextlib.contextmanager
def running(*command, **options):
    """Run a process; return its pid, and the addresses in it of `work`, anonymous code and puts."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options)
    try:
        yield process.pid, [int(word, 16) for word in process.stdout.readline().split()]
    finally:
        process.kill()
        process.communicate()


def mappings_of(pid):
    return MappingTable.of(parse_maps(Path(f"/proc/{pid}/maps").read_bytes()))


def name_one(symbolizer, pid, address, mappings=None):
    addresses = np.array([address], dtype=np.uint64)
    locations = symbolizer.locate(pid, mappings or mappings_of(pid), addresses)
    frames = symbolizer.names(locations)[0]
    return frames[0].function if frames else None


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("-no-pie",),
        ("-static",),
        ("-static-pie",),
        ("-Wl,-z,noseparate-code",),
        pytest.param(
            ("-fuse-ld=lld",),
            marks=pytest.mark.skipif(not shutil.which("ld.lld"), reason="no ld.lld: install lld"),
        ),
    ],
)
def test_running_function_is_named(tmp_path, symbolizer, flags):
    """The address that a process prints for its function has the name of that function."""
    path = build(tmp_path / "program", PROGRAM, *flags)

    with running(path) as (pid, (work, _, _)):
        location = symbolizer.locate(pid, mappings_of(pid), np.array([work], dtype=np.uint64))[0]

    assert symbolizer.names([location]) == [(Frame("work", "program", Kind.NATIVE),)]
    module = symbolizer.modules[location.build_id]
    linked = next(s.address for s in read_symbols(path) if s.name == b"work")
    assert module.elf_address(location.offset) == linked
    assert module.path == str(path)


def test_addresses_outside_files_have_a_reason(symbolizer, program):
    """Anonymous code, unmapped addresses and exited processes are locations without a name."""
    with running(program) as (pid, (_, code, _)):
        table = mappings_of(pid)
        places = symbolizer.locate(pid, table, np.array([code, 8], dtype=np.uint64))
    gone = symbolizer.locate(pid, MappingTable.of([], "[exited]"), np.array([8], dtype=np.uint64))

    assert places == [AddressLocation("[jit]", code), AddressLocation("[unknown]", 8)]
    assert gone == [AddressLocation("[exited]", 8)]
    assert symbolizer.names([*places, *gone, *gone]) == [(), (), (), ()]
    assert symbolizer.misses == {Miss.ANONYMOUS: 1, Miss.NO_MAPPING: 1, Miss.EXITED: 1}
    assert symbolizer.modules["[jit]"].kind == Kind.JIT


def test_name_is_known_after_process_and_file_are_gone(symbolizer, program):
    """`locate` keeps what `names` needs."""
    with running(program) as (pid, (work, _, _)):
        locations = symbolizer.locate(pid, mappings_of(pid), np.array([work], dtype=np.uint64))
    program.unlink()

    assert symbolizer.names(locations)[0][0].function == "work"


def test_name_survives_a_restart_of_the_profiler(tmp_path, symbolizer, program):
    """With a build id in the record, the cache has the names of a deleted file."""
    with running(program) as (pid, (work, _, _)):
        location = symbolizer.locate(pid, mappings_of(pid), np.array([work], dtype=np.uint64))[0]
    program.unlink()
    mapping = Mapping(0x1000, 1 << 40, 0, bytes(program), build_id=location.build_id)
    again = Symbolizer(tmp_path / "cache")

    name = name_one(again, pid, 0x1000 + location.offset, MappingTable.of([mapping]))

    again.close()
    assert name == "work"


@needs_map_files
def test_deleted_file_is_read_through_its_mapping(symbolizer, program):
    """Deployments replace files while they run."""
    with running(program) as (pid, (work, _, _)):
        program.unlink()

        assert name_one(symbolizer, pid, work) == "work"


@needs_map_files
def test_replaced_file_does_not_name_the_running_one(tmp_path, symbolizer, program):
    """Another file is at the path now; the mapped file is still found."""
    other = build(tmp_path / "other", PROGRAM.replace("work", "elsewhere"))
    with running(program) as (pid, (work, _, _)):
        table = mappings_of(pid)
        other.rename(program)

        assert name_one(symbolizer, pid, work, table) == "work"


def test_replaced_file_of_an_exited_process_is_a_miss(tmp_path, symbolizer, program):
    """After the process has exited, only the very same file may be used."""
    other = build(tmp_path / "other", PROGRAM.replace("work", "elsewhere"))
    with running(program) as (pid, (work, _, _)):
        table = mappings_of(pid)
    other.rename(program)

    assert name_one(symbolizer, pid, work, table) is None
    assert symbolizer.misses == {Miss.FILE_REPLACED: 1}


def test_unchanged_file_of_an_exited_process_is_read(symbolizer, program):
    """A file with the same path, device and inode is the same file."""
    with running(program) as (pid, (work, _, _)):
        table = mappings_of(pid)

    assert name_one(symbolizer, pid, work, table) == "work"


def test_file_with_another_build_id_is_not_used(symbolizer, program):
    """The build id of the record overrules path, device and inode."""
    with running(program) as (pid, (work, _, _)):
        mapped = next(m for m in mappings_of(pid).mappings if m.path == bytes(program))
        claimed = Mapping(*mapped_range(mapped), mapped.path, build_id="00" * 20)

        name = name_one(symbolizer, pid, work, MappingTable.of([claimed]))

    assert name is None
    assert symbolizer.misses == {Miss.FILE_REPLACED: 1}
    assert symbolizer.modules["00" * 20].path == str(program)


def mapped_range(mapping):
    return mapping.start, mapping.end, mapping.file_offset


def test_missing_file_keeps_path_and_build_id(symbolizer):
    """Its locations can be named later, where the file exists."""
    mapping = Mapping(0x1000, 0x9000, 0x2000, b"/no/such\x1bfile", build_id="abcd" * 10)

    table = MappingTable.of([mapping])
    location = symbolizer.locate(2**22 + 1, table, np.array([0x1234], dtype=np.uint64))[0]

    assert location == AddressLocation("abcd" * 10, 0x2234)
    assert symbolizer.modules["abcd" * 10].path == r"/no/such\x1bfile"
    assert symbolizer.names([location]) == [()]
    assert symbolizer.misses == {Miss.NO_FILE: 1}


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "socket"])
def test_only_regular_files_are_opened(tmp_path, symbolizer, kind):
    """Opening a FIFO would block, and opening a device can have any effect."""
    path = tmp_path / "thing"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        os.mknod(path, 0o600 | 0o140000)
    else:
        path.mkdir()
    table = MappingTable.of([Mapping(0x1000, 0x9000, 0, bytes(path), build_id="ab" * 20)])

    assert name_one(symbolizer, os.getpid(), 0x1234, table) is None
    assert symbolizer.misses == {Miss.NOT_REGULAR: 1}


@pytest.mark.skipif(os.geteuid() != 0, reason="chroot needs root")
def test_links_are_followed_inside_the_root_of_the_process(tmp_path, symbolizer):
    """A link in a container leads to the container's file, not to the host's."""
    outside = build(tmp_path / "outside", PROGRAM.replace("work", "outside"), "-static")
    root = tmp_path / "root"
    inside = root / str(outside)[1:]
    inside.parent.mkdir(parents=True)
    build(inside, PROGRAM.replace("work", "inside"), "-static")
    (root / "program").symlink_to(outside)
    inside_id = build_id_of(inside)
    with running("/program", preexec_fn=lambda: os.chroot(root)) as (pid, (work, _, _)):
        here = next(m for m in mappings_of(pid).mappings if m.start <= work < m.end)

        by_inode = mapping_seen_by(here, inside)
        by_build_id = Mapping(*mapped_range(here), b"/program", build_id=inside_id)
        lying = Mapping(*mapped_range(here), b"/program", build_id=build_id_of(outside))

        assert name_one(symbolizer, pid, work, MappingTable.of([by_inode])) == "inside"
        assert name_one(symbolizer, pid, work, MappingTable.of([by_build_id])) == "inside"
        assert name_one(symbolizer, pid, work, MappingTable.of([lying])) is None


def mapping_seen_by(mapping, path):
    """Return a mapping as in a perf record: the path in the process's root, and the inode."""
    status = path.stat()
    device = (os.major(status.st_dev), os.minor(status.st_dev))
    return Mapping(*mapped_range(mapping), b"/program", device, status.st_ino)


def build_id_of(path):
    output = subprocess.run(["readelf", "-n", path], check=True, capture_output=True).stdout
    return output.partition(b"Build ID: ")[2].split()[0].decode()


@pytest.mark.skipif(os.geteuid() != 0, reason="a mount namespace needs root")
def test_file_in_another_mount_namespace_is_read(tmp_path, symbolizer, program):
    """The file is on a file system that only the process sees."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    script = f"mount -t tmpfs none {folder} && cp {program} {folder}/p && exec {folder}/p"
    with running("unshare", "--mount", "sh", "-c", script) as (pid, (work, _, _)):
        assert not (folder / "p").exists()

        assert name_one(symbolizer, pid, work) == "work"
        # Without map_files, as after the range was split.
        moved = [
            Mapping(m.start, m.end, m.file_offset, m.path, m.device, m.inode, build_id_of(program))
            for m in mappings_of(pid).mappings
        ]
        again = Symbolizer(None)
        assert name_one(again, pid, work, MappingTable.of(moved)) == "work"
        again.close()


def test_address_in_a_stripped_file_has_a_reason(tmp_path, symbolizer):
    """A miss keeps module, build id and offset, and counts once however often it occurs."""
    path = build(tmp_path / "program", PROGRAM, "-fno-asynchronous-unwind-tables")
    with running(strip(path)) as (pid, (work, _, _)):
        location = symbolizer.locate(pid, mappings_of(pid), np.array([work], dtype=np.uint64))[0]

    assert symbolizer.names([location] * 3) == [(), (), ()]
    assert symbolizer.misses == {Miss.NO_SYMBOL: 1}
    assert location.build_id == build_id_of(path)


def test_unnamed_function_of_a_running_program_is_named_after_its_start(tmp_path, symbolizer):
    """The frame has its address as linked, wherever it is mapped; it is still a miss."""
    path = build(tmp_path / "program", PROGRAM)
    linked = next(s.address for s in read_symbols(path) if s.name == b"work")
    with running(strip(path)) as (pid, (work, _, _)):
        places = np.array([work, work + 1], dtype=np.uint64)
        locations = symbolizer.locate(pid, mappings_of(pid), places)

    frame = Frame(f"program+{linked:#x}", "program", Kind.NATIVE)
    assert symbolizer.names(locations) == [(frame,), (frame,)]
    assert symbolizer.misses == {Miss.NO_SYMBOL: 2}


def test_address_in_a_damaged_file_has_a_reason(tmp_path, symbolizer, program):
    """Mapped files can be damaged, too."""
    content = bytearray(program.read_bytes())
    content[40:48] = b"\xff" * 8  # e_shoff
    program.write_bytes(content)
    status = program.stat()
    device = (os.major(status.st_dev), os.minor(status.st_dev))
    mapping = Mapping(0x1000, 0x9000, 0x1000, bytes(program), device, status.st_ino)

    name = name_one(symbolizer, 2**22 + 1, 0x1100, MappingTable.of([mapping]))

    assert name is None
    assert symbolizer.misses == {Miss.DAMAGED: 1}


def test_address_in_a_text_file_has_a_reason(tmp_path, symbolizer):
    """Any file can be mapped executable."""
    path = tmp_path / "text"
    path.write_bytes(b"hello\n" * 1000)
    status = path.stat()
    device = (os.major(status.st_dev), os.minor(status.st_dev))
    mapping = Mapping(0x1000, 0x2000, 0, bytes(path), device, status.st_ino)

    assert name_one(symbolizer, 2**22 + 1, 0x1100, MappingTable.of([mapping])) is None
    assert symbolizer.misses == {Miss.NOT_ELF: 1}


def test_vdso_has_names_and_a_build_id(symbolizer):
    """It exists in memory only; its build id is that of the kernel's image of it."""
    table = mappings_of(os.getpid())
    vdso = next((m for m in table.mappings if m.path == b"[vdso]"), None)
    if vdso is None:
        pytest.skip("this kernel maps no vDSO")
    addresses = np.arange(vdso.start, vdso.end, 8, dtype=np.uint64)

    locations = symbolizer.locate(os.getpid(), table, addresses)

    names = {frames[0].function for frames in symbolizer.names(locations) if frames}
    assert "clock_gettime" in names or "__vdso_clock_gettime" in names
    assert symbolizer.modules[locations[0].build_id].path == "[vdso]"
    assert not locations[0].build_id.startswith("[")


def test_hostile_names_are_made_readable(tmp_path, symbolizer):
    """Symbols and paths may contain a newline, an escape sequence, and bytes that are not UTF-8."""
    hostile = b"bad\n\x1b[31m\xff;\xe2\x80\xaename"
    placeholder = "w" * len(hostile)
    path = build(tmp_path / "a\nb\x1b", PROGRAM.replace("work", placeholder))
    path.write_bytes(path.read_bytes().replace(placeholder.encode(), hostile))

    with running(path) as (pid, (work, _, _)):
        location = symbolizer.locate(pid, mappings_of(pid), np.array([work], dtype=np.uint64))[0]
    frame = symbolizer.names([location])[0][0]

    assert frame.function == r"bad\n\x1b[31m\xff;\u202ename"
    assert frame.module == r"a\nb\x1b"


def test_named_location_has_its_own_name(symbolizer):
    """Code known only by name needs no look-up."""
    place = NamedLocation("f", "m.py", Kind.PYTHON, "m.py", 3, 5)

    assert symbolizer.names([place]) == [(Frame("f", "m.py", Kind.PYTHON, "m.py", 5),)]


def test_mangled_names_are_demangled(tmp_path, symbolizer):
    """C++, and Rust without the hashes that differ from build to build."""
    mangled = {
        "_ZN5space4workEi": "space::work(int)",
        "_ZN4core3fmt9Formatter3pad17h0123456789abcdefE": "core::fmt::Formatter::pad",
        "_RNvCs1234_7mycrate3foo": "mycrate::foo",
        "_ZThis_is_none": "_ZThis_is_none",
    }
    declared = "\n".join(
        f'int f{i}(int n) __asm__("{name}"); int f{i}(int n) {{ return n + {i}; }}'
        for i, name in enumerate(mangled)
    )
    path = build(tmp_path / "program", declared + PROGRAM)
    with running(path) as (pid, (work, _, _)):
        address = {s.name.decode(): s.address for s in read_symbols(path)}
        there = [work - address["work"] + address[name] for name in mangled]
        locations = symbolizer.locate(pid, mappings_of(pid), np.array(there, dtype=np.uint64))

    assert [frames[0].function for frames in symbolizer.names(locations)] == list(mangled.values())


def test_evicted_tables_are_read_again(tmp_path, symbolizer):
    """The budget has room for one table; the others are in the cache."""
    small = Symbolizer(tmp_path / "cache", tables_bytes=1)
    table = mappings_of(os.getpid())
    addresses = np.concatenate([table.starts + np.uint64(k * 1024) for k in range(40)])

    expected = symbolizer.names(symbolizer.locate(os.getpid(), table, addresses))
    found = small.names(small.locate(os.getpid(), table, addresses))

    small.close()
    assert found == expected
    assert sum(map(bool, found)) > 100


def test_symbolizer_works_without_a_cache_directory(program):
    """Tables are kept while there is room for them."""
    symbolizer = Symbolizer(None)
    with running(program) as (pid, (work, _, puts)):
        assert name_one(symbolizer, pid, work) == "work"
        assert name_one(symbolizer, pid, puts) in ("puts", "_IO_puts")
    symbolizer.close()


def test_no_descriptor_is_left_open(tmp_path, program):
    """After `close` the process has the same open files as before."""
    before = set(Path("/proc/self/fd").iterdir())
    symbolizer = Symbolizer(tmp_path / "cache")
    with running(program) as (pid, (work, _, _)):
        name_one(symbolizer, pid, work)
        symbolizer.locate_kernel(np.array([1], dtype=np.uint64))
    symbolizer.close()

    assert set(Path("/proc/self/fd").iterdir()) == before


def test_zombie_has_no_files(symbolizer, program):
    """It has a /proc entry, but nothing in it."""
    with running(program) as (pid, (work, _, _)):
        table = mappings_of(pid)
        program.unlink()
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)

        assert name_one(symbolizer, pid, work, table) is None
    assert symbolizer.misses == {Miss.NO_FILE: 1}
