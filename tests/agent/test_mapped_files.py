"""Mapped files: known by their content, through whoever lives, without being opened here."""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bpf.records import Rings
from profiler.agent.mapped_files import MappedFile, MappedFiles, State
from profiler.agent.readers import Readers
from profiler.processes.address_spaces import AddressSpaces
from symbolizer.location import Miss
from symbolizer.maps import Mapping, MappingTable, parse_maps
from symbolizer.symbols.elf import FileSource, read_elf
from tests.support.elf_files import build, strip
from tests.support.file_systems import drop_caches, hanging
from tests.support.live import has_execed, wait_for
from tests.support.targets import running

pytestmark = pytest.mark.kernel

ID = "00112233445566778899aabbccddeeff00112233"
SPIN = "volatile long n; int {name}(void) {{ while (n >= 0) n++; return 1; }}"
MAIN = " int main(void) {{ return {name}() + {number}; }}"
PREFORK = """
#include <stdio.h>
#include <sys/wait.h>
#include <unistd.h>
int main(void) {
  for (;;) {
    pid_t pid = fork();
    if (!pid) { usleep(10000); _exit(0); }
    printf("%d\\n", pid);
    fflush(stdout);
    waitpid(pid, 0, 0);
  }
}
"""


@pytest.fixture(scope="module")
def readers(tmp_path_factory) -> Iterator[Readers]:
    """Readers that all tests share: starting one takes longer than most answers."""
    readers = Readers(tmp_path_factory.mktemp("cache"), children=2)
    yield readers
    readers.close()


@pytest.fixture
def address_spaces() -> Iterator[AddressSpaces]:
    rings = Rings()
    yield AddressSpaces(rings)
    rings.close()


@pytest.fixture
def files(readers: Readers, address_spaces: AddressSpaces) -> MappedFiles:
    return MappedFiles(readers, address_spaces)


@pytest.fixture
def wait(readers: Readers, files: MappedFiles) -> Callable[[Callable[[], bool]], None]:
    """Return what waits for answers, and lets what may be asked again be asked."""

    def wait(is_done: Callable[[], bool]) -> None:
        def is_done_by_now() -> bool:
            files.ask_again()
            readers.poll()
            return is_done()

        wait_for(is_done_by_now)

    return wait


def spinning(folder: Path, file: str, name: str = "spin", number: int = 1, *flags: str) -> Path:
    source = (SPIN + MAIN).format(name=name, number=number)
    return build(folder / file, source, "-O1", *(flags or (f"-Wl,--build-id=0x{ID}",)))


def mapped(pid: int, program: Path | str) -> tuple[MappingTable, int]:
    """Return the mappings of a process, and which of them is its program's."""
    wait_for(lambda: has_execed(pid))
    table = MappingTable.of(parse_maps(Path(f"/proc/{pid}/maps").read_bytes()))
    path = os.fsencode(program)
    return table, next(i for i, m in enumerate(table.mappings) if m.file_path.endswith(path))


def identified(files: MappedFiles, wait: Callable[..., None], program: Path) -> MappedFile:
    """Run a program for as long as it takes to identify it."""
    with running(program) as process:
        file = files.file(*mapped(process.pid, program), process.pid)
        assert file is not None
        assert file.state == State.PENDING
        assert file.miss == Miss.NOT_READ
        wait(lambda: file.state != State.PENDING)
    return file


def test_a_file_is_known_by_what_a_reader_finds_in_it(files, wait, tmp_path):
    program = spinning(tmp_path, "program")

    file = identified(files, wait, program)

    with program.open("rb") as opened:
        elf = read_elf(FileSource(opened.fileno()))
    assert (file.state, file.miss) == (State.IDENTIFIED, None)
    assert (file.build_id, file.segments, file.owner) == (ID, elf.segments, os.getuid())
    assert file.has_symbols
    assert file.has_table
    assert files.changed() == [file]
    assert not files.changed()


def test_a_file_that_stacks_go_through_is_read_before_those_that_are_only_mapped(
    address_spaces, tmp_path
):
    table = MappingTable.of(parse_maps(Path("/proc/self/maps").read_bytes()))
    known: list[MappedFile] = []
    with contextlib.closing(Readers(tmp_path, children=1)) as readers:
        files = MappedFiles(readers, address_spaces)
        found = [files.file(table, place, os.getpid()) for place in range(len(table.mappings))]
        mapped = list(dict.fromkeys(file for file in found if file is not None))

        def are_known() -> bool:
            readers.poll()
            known.extend(files.changed())
            return len(known) == len(mapped)

        files.want(mapped[-1])
        files.want(mapped[-1])  # once is enough
        wait_for(are_known)

    assert len(mapped) > 10
    assert known[:2] == [mapped[0], mapped[-1]]


def test_all_mappings_of_a_file_are_one_file(files, readers, wait):
    """Also of a process with 65,000 of them."""
    real = next(m for m in parse_maps(Path("/proc/self/maps").read_bytes()) if m.inode)
    many = [
        Mapping(at << 12, (at + 1) << 12, 0, real.path, real.device, real.inode)
        for at in range(1 << 20, (1 << 20) + 65_000)
    ]
    table = MappingTable(tuple(many), MappingTable.of(()).starts, MappingTable.of(()).ends)

    before = readers.answered
    found = {files.file(table, place, os.getpid()) for place in range(len(many))}
    file = found.pop()
    wait(lambda: file.state == State.IDENTIFIED)

    assert not found
    assert files.status()["files"] == readers.answered - before == 1


def test_memory_without_a_file_has_none(files):
    """Anonymous memory, and what the kernel maps; the vDSO is an object file in memory."""
    paths = (b"", b"//anon", b"[heap]", b"[vsyscall]", b"[uprobes]")
    table = MappingTable.of(Mapping(i << 12, i + 1 << 12, 0, p) for i, p in enumerate(paths, 1))

    assert [files.file(table, place, os.getpid()) for place in range(5)] == [None] * 5


def test_the_vdso_is_one_file_for_all_processes(files, wait, readers):
    own = MappingTable.of(parse_maps(Path("/proc/self/maps").read_bytes()))
    place = next(i for i, m in enumerate(own.mappings) if m.path == b"[vdso]")
    before = readers.answered
    with running("sleep", "60") as process:
        other, theirs = mapped(process.pid, "[vdso]")
        file = files.file(own, place, os.getpid())

        assert files.file(other, theirs, process.pid) is file
        wait(lambda: file.state == State.IDENTIFIED)

    assert readers.answered == before + 1


def test_a_build_id_belongs_to_one_content(files, wait, tmp_path):
    """What another file claims it for is known by its own content instead."""
    first = identified(files, wait, spinning(tmp_path, "first"))
    other_code = identified(files, wait, spinning(tmp_path, "code", number=2))
    other_name = identified(files, wait, spinning(tmp_path, "name", name="spun"))

    assert first.build_id == ID
    assert {other_code.build_id[:5], other_name.build_id[:5]} == {"hash-"}
    assert other_code.build_id != other_name.build_id
    assert other_name.table_key == first.table_key
    assert files.status()["misclaimed_build_ids"] == 2


@pytest.mark.parametrize("is_whole_first", [True, False])
def test_variants_of_one_build_share_its_build_id(is_whole_first, files, wait, tmp_path):
    """However much of the symbols was stripped, and whichever is seen first."""
    programs = [spinning(tmp_path, "whole")]
    for name, flags in (
        *(("debug", ["-g"]), ("all", ["-s"]), ("one", ["--strip-all", "-K", "spin"])),
        *(("unneeded", ["--strip-unneeded"]), ("sections", ["--remove-section=.comment"])),
    ):
        shutil.copy(programs[0], tmp_path / name)
        programs.append(strip(tmp_path / name, *flags))
    programs = programs if is_whole_first else programs[::-1]

    variants = [identified(files, wait, program) for program in programs]

    assert {file.build_id for file in variants} == {ID}
    assert len({file.code_key for file in variants}) == 1
    assert len({file.table_key for file in variants}) == 1
    assert len({file.content_key for file in variants}) >= 4


@pytest.mark.parametrize("is_stripped_first", [True, False])
def test_names_are_not_shared_with_whom_anybody_could_have_written(
    is_stripped_first, files, wait, tmp_path
):
    """A stripped program of root takes no names from another user's file of the same code."""
    shutil.copy(spinning(tmp_path, "lying"), tmp_path / "stripped")
    programs = [strip(tmp_path / "stripped", "-s"), tmp_path / "lying"]
    os.chown(tmp_path / "lying", 65534, 65534)

    variants = [
        identified(files, wait, program)
        for program in (programs if is_stripped_first else programs[::-1])
    ]

    assert variants[0].build_id == ID
    assert variants[1].build_id.startswith("hash-")


def test_a_deleted_program_is_opened_through_its_process(files, wait, tmp_path):
    program = spinning(tmp_path, "program")
    with running(program) as process:
        wait_for(lambda: has_execed(process.pid))
        program.unlink()
        file = files.file(*mapped(process.pid, program), process.pid)

        wait(lambda: file.state != State.PENDING)

    assert (file.state, file.build_id) == (State.IDENTIFIED, ID)


def test_a_replaced_program_is_not_taken_for_the_one_that_runs(files, wait, tmp_path):
    """The process is gone: only another file is at its path."""
    program = spinning(tmp_path, "program")
    with running(program) as process:
        table, place = mapped(process.pid, program)
    spinning(tmp_path, "other", "spin", 1, "-Wl,--build-id=0x1234").replace(program)

    file = files.file(table, place, process.pid)
    wait(lambda: file.state != State.PENDING)

    assert (file.state, file.miss) == (State.FAILED, Miss.FILE_REPLACED)


def test_whoever_lives_is_asked(files, wait, tmp_path):
    """Not the first process for ever: it is gone, and its file is out of reach by its path."""
    program = spinning(tmp_path, "program")
    with running(program) as living:
        table, place = mapped(living.pid, program)
        program.unlink()
        with running("true") as dead:
            pass
        file = files.file(table, place, dead.pid)
        wait(lambda: file.state == State.FAILED)

        files.note(table, living.pid)
        wait(lambda: file.state == State.IDENTIFIED)

    assert file.build_id == ID


def test_a_program_in_its_own_mount_namespace_is_reached_when_its_children_are_gone(
    files, address_spaces, wait, tmp_path
):
    """A parent forks workers that live for 10 ms; only its mount namespace has the program."""
    program = build(tmp_path / "program", PREFORK)
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    script = (
        f"mount -t tmpfs none {hidden} && cp {program} {hidden}/prefork && exec {hidden}/prefork"
    )
    command = ["unshare", "-m", "sh", "-c", script]
    with running(*command, stdout=subprocess.PIPE) as parent:
        parent.stdout.readline()
        table, place = mapped(parent.pid, "prefork")
        child = int(parent.stdout.readline())
        wait_for(lambda: not Path(f"/proc/{child}").exists())
        address_spaces.poll()
        assert not (hidden / "prefork").exists()

        file = files.file(table, place, child)
        wait(lambda: file.state != State.PENDING)

    assert file.state == State.IDENTIFIED


def test_a_program_that_was_built_again_is_another_one(files, wait, tmp_path):
    """Without a build id, in the same inode, under the same name."""
    program, found = tmp_path / "program", []
    for number in (1, 2):
        built = spinning(tmp_path, "built", "spin", number, "-Wl,--build-id=none")
        with program.open("ab") as file:
            file.truncate(0)
            file.write(built.read_bytes())
        program.chmod(0o755)
        found.append(identified(files, wait, program))

    assert found[0].build_id != found[1].build_id
    assert {file.build_id[:5] for file in found} == {"hash-"}


def test_a_damaged_answer_costs_its_file_only(address_spaces, tmp_path):
    """A reader may be taken over by what it reads, and JSON has numbers without end."""
    (tmp_path / "garble-files").touch()
    program = spinning(tmp_path, "program")
    with (
        contextlib.closing(Readers(tmp_path, kinds="tests.support.slow_kinds")) as readers,
        running(program) as process,
    ):
        files = MappedFiles(readers, address_spaces)
        file = files.file(*mapped(process.pid, program), process.pid)
        readers.wait(time.monotonic() + 30, lambda: file.state != State.PENDING)

    assert (file.state, file.miss) == (State.FAILED, Miss.DAMAGED)


def test_what_nobody_has_mapped_any_more_is_not_asked_for_again(
    files, readers, wait, tmp_path, monkeypatch
):
    """Else every file that was ever on a file system that does not answer would be kept."""
    monkeypatch.setattr("profiler.agent.mapped_files._ASIDE_S", 0.0)
    monkeypatch.setattr("profiler.agent.mapped_files._MAX_RECENT", 0)
    namespace = Path("/proc/self/ns/mnt").readlink()
    readers._aside.add(f"{namespace} {tmp_path}", time.monotonic())
    program = spinning(tmp_path, "program")
    with running(program) as process:
        table, place = mapped(process.pid, program)
        files.file(table, place, process.pid)
        wait(lambda: files.status()["failed"] == 1)
    del table

    def is_forgotten() -> bool:
        files.changed()  # as the sampler does
        return not files.status()["files"]

    wait(is_forgotten)


def test_a_file_system_that_does_not_answer_costs_its_own_files_only(
    files, readers, wait, tmp_path, monkeypatch
):
    """The file stays unknown, its mount is set aside, all others are read as before.

    As long as a reader waits for an answer, no other one is sent there.
    """
    monkeypatch.setattr("profiler.agent.mapped_files._ASIDE_S", 0.05)
    monkeypatch.setattr("profiler.agent.readers._SET_ASIDE_S", 0.05)
    other = spinning(tmp_path, "other")
    with (
        hanging(tmp_path / "mount", Path("/bin/sleep")) as hung,
        running(hung.file, "60") as process,
        hung.ending(),
    ):
        table, place = mapped(process.pid, hung.file)
        drop_caches(hung.file)
        hung.flag.touch()
        file = files.file(table, place, process.pid)

        known = identified(files, wait, other)
        wait(lambda: file.state == State.FAILED and files.status()["mounts_hung"] == 1)
        files._hung.clear()
        begun_s = time.monotonic()
        wait(lambda: file.tries >= 3 or time.monotonic() > begun_s + 10)
        wait(lambda: readers.left_behind == 1)

    assert file.tries >= 3
    assert known.state == State.IDENTIFIED
    assert file.miss == Miss.NO_ANSWER
    wait(lambda: readers.left_behind == 0)  # it answers, if only with an error
