"""Code of running processes is named, whatever happens to their files."""

import contextlib
import mmap
import os
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest

from symbolizer.identify import FileReader, Identifier
from symbolizer.location import Frame, Kind, Miss
from symbolizer.maps import Mapping, MappingTable
from symbolizer.symbolizer import Symbolizer
from symbolizer.symbols.elf import FileSource, read_elf
from symbolizer.unwind.table import UnwindCache
from tests.support.elf_files import build, read_symbols, strip
from tests.support.file_systems import hanging
from tests.support.naming import (
    NO_PROCESS,
    Naming,
    code_file,
    mapping_of_file,
    mappings_of,
    request,
)

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
def naming(tmp_path):
    naming = Naming(tmp_path / "cache")
    yield naming
    naming.close()


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
def test_running_function_is_named(tmp_path, naming, flags):
    """The address that a process prints for its function has the name of that function."""
    path = build(tmp_path / "program", PROGRAM, *flags)

    with running(path) as (pid, (work, _, _)):
        found = naming.name(pid, work)

    assert found.frames == (Frame("work", "program", Kind.NATIVE),)
    linked = next(s.address for s in read_symbols(path) if s.name == b"work")
    assert found.module.elf_address(found.offset) == linked
    assert found.module.path == str(path)


def test_name_is_known_after_process_and_file_are_gone(tmp_path, naming, program):
    """The table of its content is kept, also for a later profiler."""
    with running(program) as (pid, (work, _, _)):
        found = naming.name(pid, work)
        mapping = next(m for m in mappings_of(pid).mappings if m.start <= work < m.end)
        identity = naming.identify(pid, mapping)
    program.unlink()

    again = Naming(tmp_path / "cache")
    (place,) = again.symbolizer.names(code_file(identity), [found.offset]).places

    again.close()
    assert place.frames(found.module) == found.frames == (Frame("work", "program", Kind.NATIVE),)


@needs_map_files
def test_deleted_file_is_read_through_its_mapping(naming, program):
    """Deployments replace files while they run."""
    with running(program) as (pid, (work, _, _)):
        program.unlink()

        assert naming.name(pid, work).function == "work"


@needs_map_files
def test_replaced_file_does_not_name_the_running_one(tmp_path, naming, program):
    """Another file is at the path now; the mapped file is still found."""
    other = build(tmp_path / "other", PROGRAM.replace("work", "elsewhere"))
    with running(program) as (pid, (work, _, _)):
        table = mappings_of(pid)
        other.rename(program)

        assert naming.name(pid, work, table).function == "work"


def test_replaced_file_of_an_exited_process_is_a_miss(tmp_path, naming, program):
    """After the process has exited, only the very same file may be used."""
    other = build(tmp_path / "other", PROGRAM.replace("work", "elsewhere"))
    with running(program) as (pid, (work, _, _)):
        table = mappings_of(pid)
    other.rename(program)

    assert naming.name(pid, work, table).miss == Miss.FILE_REPLACED


def test_unchanged_file_of_an_exited_process_is_read(naming, program):
    """A file with the same path, device and inode is the same file."""
    with running(program) as (pid, (work, _, _)):
        table = mappings_of(pid)

    assert naming.name(pid, work, table).function == "work"


def test_file_with_another_build_id_is_not_used(naming, program):
    """The build id of the record overrules path, device and inode."""
    with running(program) as (pid, (work, _, _)):
        mapped = next(m for m in mappings_of(pid).mappings if m.path == bytes(program))
        claimed = Mapping(*mapped_range(mapped), mapped.path, build_id="00" * 20)

        found = naming.name(pid, work, MappingTable.of([claimed]))

    assert found.miss == Miss.FILE_REPLACED
    assert found.module.path == str(program)


def mapped_range(mapping):
    return mapping.start, mapping.end, mapping.file_offset


def test_missing_file_keeps_its_build_id(naming):
    """Its locations can be named later, where the file exists."""
    mapping = Mapping(0x1000, 0x9000, 0x2000, b"/no/such/file", build_id="abcd" * 10)

    found = naming.name(NO_PROCESS, 0x1234, MappingTable.of([mapping]))

    assert (found.module.build_id, found.offset) == ("abcd" * 10, 0x2234)
    assert (found.frames, found.miss) == ((), Miss.NO_FILE)


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "socket"])
def test_only_regular_files_are_opened(tmp_path, naming, kind):
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

    assert naming.name(os.getpid(), 0x1234, table).miss == Miss.NOT_REGULAR


@pytest.mark.skipif(os.geteuid() != 0, reason="chroot needs root")
def test_links_are_followed_inside_the_root_of_the_process(tmp_path, naming):
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

        assert naming.name(pid, work, MappingTable.of([by_inode])).function == "inside"
        assert naming.name(pid, work, MappingTable.of([by_build_id])).function == "inside"
        assert naming.name(pid, work, MappingTable.of([lying])).function is None


def mapping_seen_by(mapping, path):
    """Return a mapping as in a perf record: the path in the process's root, and the inode."""
    status = path.stat()
    device = (os.major(status.st_dev), os.minor(status.st_dev))
    return Mapping(*mapped_range(mapping), b"/program", device, status.st_ino)


def build_id_of(path):
    output = subprocess.run(["readelf", "-n", path], check=True, capture_output=True).stdout
    return output.partition(b"Build ID: ")[2].split()[0].decode()


@pytest.mark.skipif(os.geteuid() != 0, reason="a mount namespace needs root")
def test_file_in_another_mount_namespace_is_read(tmp_path, naming, program):
    """The file is on a file system that only the process sees."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    script = f"mount -t tmpfs none {folder} && cp {program} {folder}/p && exec {folder}/p"
    with running("unshare", "--mount", "sh", "-c", script) as (pid, (work, _, _)):
        assert not (folder / "p").exists()

        assert naming.name(pid, work).function == "work"
        # Without map_files, as after the range was split.
        moved = [
            Mapping(m.start, m.end, m.file_offset, m.path, m.device, m.inode, build_id_of(program))
            for m in mappings_of(pid).mappings
        ]
        again = Naming(tmp_path / "other cache")
        assert again.name(pid, work, MappingTable.of(moved)).function == "work"
        again.close()


def test_address_in_a_stripped_file_has_a_reason(tmp_path, naming):
    """A miss keeps module, build id and offset."""
    path = build(tmp_path / "program", PROGRAM, "-fno-asynchronous-unwind-tables")
    with running(strip(path)) as (pid, (work, _, _)):
        found = naming.name(pid, work)

    assert (found.frames, found.miss) == ((), Miss.NO_SYMBOL)
    assert found.module.build_id == build_id_of(path)


def test_unnamed_function_of_a_running_program_is_named_after_its_start(tmp_path, naming):
    """The frame has its address as linked, wherever it is mapped; it is still a miss."""
    path = build(tmp_path / "program", PROGRAM)
    linked = next(s.address for s in read_symbols(path) if s.name == b"work")
    with running(strip(path)) as (pid, (work, _, _)):
        found = naming.addresses(pid, [work, work + 1])

    frame = Frame(f"program+{linked:#x}", "program", Kind.NATIVE)
    assert [each.frames for each in found] == [(frame,), (frame,)]
    assert [each.miss for each in found] == [Miss.NO_SYMBOL, Miss.NO_SYMBOL]


def test_address_in_a_damaged_file_has_a_reason(tmp_path, naming, program):
    """Mapped files can be damaged, too."""
    content = bytearray(program.read_bytes())
    content[32:40] = b"\xff" * 8  # e_phoff
    program.write_bytes(content)
    status = program.stat()
    device = (os.major(status.st_dev), os.minor(status.st_dev))
    mapping = Mapping(0x1000, 0x9000, 0x1000, bytes(program), device, status.st_ino)

    found = naming.name(NO_PROCESS, 0x1100, MappingTable.of([mapping]))

    assert found.miss == Miss.DAMAGED


def test_address_in_a_text_file_has_a_reason(tmp_path, naming):
    """Any file can be mapped executable."""
    path = tmp_path / "text"
    path.write_bytes(b"hello\n" * 1000)
    status = path.stat()
    device = (os.major(status.st_dev), os.minor(status.st_dev))
    mapping = Mapping(0x1000, 0x2000, 0, bytes(path), device, status.st_ino)

    found = naming.name(NO_PROCESS, 0x1100, MappingTable.of([mapping]))

    assert found.miss == Miss.NOT_ELF


def test_vdso_has_names_and_a_build_id(naming):
    """It exists in memory only; its build id is that of the kernel's image of it."""
    table = mappings_of(os.getpid())
    vdso = next((m for m in table.mappings if m.path == b"[vdso]"), None)
    if vdso is None:
        pytest.skip("this kernel maps no vDSO")

    found = naming.addresses(os.getpid(), range(vdso.start, vdso.end, 8))

    names = {each.function for each in found}
    assert "clock_gettime" in names or "__vdso_clock_gettime" in names
    assert found[0].module.path == "[vdso]"
    assert not found[0].module.build_id.startswith("[")


def test_hostile_names_are_made_readable(tmp_path, naming):
    """Symbols may contain a newline, an escape sequence, and bytes that are not UTF-8."""
    hostile = b"bad\n\x1b[31m\xff;\xe2\x80\xaename"
    placeholder = "w" * len(hostile)
    path = build(tmp_path / "a\nb\x1b", PROGRAM.replace("work", placeholder))
    path.write_bytes(path.read_bytes().replace(placeholder.encode(), hostile))

    with running(path) as (pid, (work, _, _)):
        found = naming.name(pid, work)

    assert found.function == r"bad\n\x1b[31m\xff;\u202ename"


def test_mangled_names_are_demangled(tmp_path, naming):
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
        found = naming.addresses(pid, there)

    assert [each.function for each in found] == list(mangled.values())


@pytest.mark.skipif(os.geteuid() != 0, reason="chown: run as root")
def test_symbols_of_a_file_that_has_changed_name_nothing(tmp_path, program):
    """Its owner can write through a mapping, which leaves the file's times as they are."""
    copy = Path(shutil.copy(program, tmp_path / "copy"))
    os.chown(copy, 65534, -1)
    identifier = Identifier()
    files = FileReader(UnwindCache(tmp_path / "unwind"), identifier)
    symbolizer = Symbolizer(tmp_path / "cache", identifier=identifier)
    with running(program) as (pid, (work, *_)):
        table = mappings_of(pid)
        place = table.mappings[table.find(np.array([work], np.uint64))[0]]
        offset = work - place.start + place.file_offset

    asked, program_asked = (request(NO_PROCESS, mapping_of_file(file)) for file in (copy, program))
    with copy.open("r+b") as file, mmap.mmap(file.fileno(), 0) as content:
        at = content.find(b"\0work\0") + 1
        content[at : at + 4] = b"work"  # from now on the page counts as written
        identity = code_file(files.identify(asked))
        content[at : at + 4] = b"lies"

        changed = symbolizer.names(identity, [offset], asked)
        again = symbolizer.names(identity, [offset])
    of_root = code_file(files.identify(program_asked))
    named = symbolizer.names(of_root, [offset], program_asked)
    symbolizer.close()

    assert (changed.failure, again.failure) == (Miss.FILE_REPLACED, Miss.NOT_KEPT)
    assert of_root.content == identity.content
    assert named.places[0].calls[0].function == "work"


@pytest.mark.skipif(os.geteuid() != 0, reason="chown: run as root")
def test_symbols_of_a_users_file_name_no_other_users_file(tmp_path, naming, program):
    """They are read again from a file of that other user with the same content."""
    os.chown(program, 65534, -1)
    mapping = mapping_of_file(program)
    asked = request(NO_PROCESS, mapping)
    identity = code_file(naming.identify(NO_PROCESS, mapping))

    of_owner = naming.symbolizer.names(identity, [0], asked)
    of_another = naming.symbolizer.names(identity._replace(owner=0), [0], asked)

    assert (of_owner.failure, of_another.failure) == (None, Miss.FILE_REPLACED)


@pytest.mark.skipif(os.geteuid() != 0, reason="chown: run as root")
def test_unwind_rules_of_a_file_that_has_changed_are_not_kept(tmp_path, program):
    """They would hold for all files that have what it had."""
    copy = Path(shutil.copy(program, tmp_path / "copy"))
    os.chown(copy, 65534, -1)
    identifier = Identifier()
    asked = request(NO_PROCESS, mapping_of_file(copy))
    with copy.open("r+b") as file, mmap.mmap(file.fileno(), 0) as content:
        elf = read_elf(FileSource(file.fileno()))
        at = next(section.offset for section in elf.sections if section.name == b".eh_frame")
        content[at] = content[at]  # from now on the page counts as written
        identity = FileReader(UnwindCache(tmp_path / "first"), identifier).identify(asked)
        content[at : at + 64] = bytes(64)

        cache = UnwindCache(tmp_path / "second")
        answer = FileReader(cache, identifier).build_table(asked)

    assert identity["has_table"]
    assert (answer, cache.holds(identity["table_key"])) == ("", False)


@pytest.mark.kernel
def test_what_a_server_sends_is_shared_with_nothing(tmp_path, program):
    """A file system of FUSE may send one content to be hashed, and another one to be read."""
    files = FileReader(UnwindCache(tmp_path / "unwind"))
    with hanging(tmp_path / "mount", program) as served, served.ending():
        theirs, ours = (
            files.identify(request(NO_PROCESS, mapping_of_file(file)))
            for file in (served.file, program)
        )

    assert theirs["code_key"] == ours["code_key"]
    assert theirs["table_key"] != ours["table_key"]
    assert theirs["content_key"] != ours["content_key"]


def test_tables_beyond_the_budget_are_read_from_the_cache_again(tmp_path, naming):
    """The budget has room for none of them."""
    small = Naming(tmp_path / "cache", tables_bytes=1)
    table = mappings_of(os.getpid())
    code = [m for m in table.mappings if m.path.startswith(b"/")]
    offsets = {m: [m.file_offset + k * 1024 for k in range(40)] for m in code}

    expected = [naming.names(os.getpid(), m, offsets[m]).places for m in code]
    found = [small.names(os.getpid(), m, offsets[m]) for m in code]

    small.close()
    assert [each.places for each in found] == expected
    assert sum(bool(place.calls) for each in found for place in each.places) > 100
    assert not any(each.build_ms for each in found)


def test_no_descriptor_is_left_open(tmp_path, program):
    """After `close` the process has the same open files as before."""
    before = set(Path("/proc/self/fd").iterdir())
    naming = Naming(tmp_path / "cache")
    with running(program) as (pid, (work, _, _)):
        assert naming.name(pid, work).function == "work"
    naming.close()

    assert set(Path("/proc/self/fd").iterdir()) == before


def test_zombie_has_no_files(naming, program):
    """It has a /proc entry, but nothing in it."""
    with running(program) as (pid, (work, _, _)):
        table = mappings_of(pid)
        program.unlink()
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)

        assert naming.name(pid, work, table).miss == Miss.NO_FILE
