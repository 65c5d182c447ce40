"""What processes have written about their code: whose files count, and which are read anew."""

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from symbolizer.maps import Mapping
from symbolizer.runtimes import written_code
from symbolizer.runtimes.written_code import LONGEST_BYTES, Outcome, WrittenCode
from tests.support.jit_programs import (
    child_of,
    dump_header,
    dump_lines,
    dump_load,
    jit_program,
    map_of,
    own_pid,
    question,
    write_as,
)
from tests.support.live import started, wait_for
from tests.support.naming import mapping_of_file, mappings_of
from tests.support.targets import compile_target, running

USER, OTHER = 12345, 12346


@pytest.fixture(scope="module")
def jit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jit")
    folder.chmod(0o755)
    return compile_target("jit.c", folder / "jit")


@contextlib.contextmanager
def sleeping(user: int = 0) -> Iterator[int]:
    """Run a process of a user that writes nothing; remove what a test writes in its name."""
    command = ["setpriv", f"--reuid={user}", "--clear-groups", "sleep", "100"]
    with started(*command) as process:
        wait_for(lambda: Path(f"/proc/{process.pid}/comm").read_text() == "sleep\n")
        try:
            yield process.pid
        finally:
            map_of(process.pid).unlink(missing_ok=True)


def outcome_of(pid: int, reader: WrittenCode | None = None) -> Outcome:
    return (reader or WrittenCode()).read(question(pid, [0x7F00]))["perf_map"]


def names_of(pid: int, reader: WrittenCode, *addresses: int) -> list[str]:
    ranges = reader.read(question(pid, addresses))["ranges"]
    return [function for _, _, function, *_ in ranges]


def test_a_program_s_own_map_names_its_code(jit: Path):
    with jit_program(jit, "map") as program:
        answer = WrittenCode().read(question(program.pid, [program.leaf + 5, program.caller, 5]))

    assert answer == {
        "jitdump": "no_file",
        "perf_map": "read",
        "is_partial": False,
        "ranges": [
            (program.leaf, program.leaf + 17, "made_leaf", "[jit]", "jit", "", 0, 0),
            (program.caller, program.caller + 11, "made_caller", "[jit]", "jit", "", 0, 0),
        ],
    }


def dumps_of(pid: int) -> list[Mapping]:
    return [each for each in mappings_of(pid).mappings if each.file_path.endswith(b".dump")]


def test_a_program_s_own_jitdump_names_its_code_and_lines(jit: Path, tmp_path: Path):
    """The writer maps it executable, for profilers to see it."""
    with jit_program(jit, "dump", tmp_path) as program:
        asked = question(program.pid, [program.leaf + 5], dumps_of(program.pid))
        answer = WrittenCode().read(asked)

    assert (answer["jitdump"], answer["perf_map"]) == (Outcome.READ, Outcome.NO_FILE)
    assert answer["ranges"] == [
        (program.leaf + 4, program.leaf + 17, "dumped_leaf", "[jit]", "jit", "/srv/made.src", 0, 11)
    ]


def test_a_jitdump_that_was_deleted_is_read_through_its_mapping(jit: Path, tmp_path: Path):
    with jit_program(jit, "dump", tmp_path) as program:
        (tmp_path / f"jit-{program.pid}.dump").unlink()
        answer = WrittenCode().read(question(program.pid, [program.leaf], dumps_of(program.pid)))

    assert [function for _, _, function, *_ in answer["ranges"]] == ["dumped_leaf"]


def test_a_jitdump_with_another_s_pid_in_its_name_does_not_count(jit: Path, tmp_path: Path):
    """A fork has that of its parent mapped, who writes on about other code."""
    with jit_program(jit, "dump", tmp_path) as program, sleeping() as other:
        asked = question(other, [program.leaf], dumps_of(program.pid))

        assert WrittenCode().read(asked)["jitdump"] == Outcome.NO_FILE


@pytest.mark.parametrize(
    ("name", "expected"),
    [("jit-4711-{}.dump", "read"), ("jit-{}-4711.dump", "no_file"), ("jit-1{}.dump", "no_file")],
)
def test_a_jitdump_may_have_a_thread_s_number_before_its_process_s(
    tmp_path: Path, name: str, expected: str
):
    """JavaScriptCore names it so."""
    with sleeping() as pid:
        path = tmp_path / name.format(pid)
        path.write_bytes(dump_header() + dump_load(0x7F00, 16, b"f"))

        asked = question(pid, [0x7F00], [mapping_of_file(path)])
        assert WrittenCode().read(asked)["jitdump"] == expected


def test_a_jitdump_that_is_not_mapped_does_not_count(tmp_path: Path):
    """Its path alone proves nothing: what is there now may be another file."""
    with sleeping() as pid:
        path = tmp_path / f"jit-{pid}.dump"
        path.write_bytes(dump_header() + dump_load(0x7F00, 16, b"f"))
        mapping = mapping_of_file(path)
        path.rename(tmp_path / "before")
        path.write_bytes(dump_header() + dump_load(0x7F00, 16, b"g"))

        assert WrittenCode().read(question(pid, [0x7F00], [mapping]))["jitdump"] == "no_file"


def test_lines_of_jitdumps_come_before_perf_maps(jit: Path, tmp_path: Path):
    """The better ranges are last: whoever takes them in lets later ones replace earlier ones."""
    with jit_program(jit, "dump", tmp_path) as program:
        map_of(program.pid).write_bytes(b"%x 11 mapped_leaf\n" % program.leaf)
        answer = WrittenCode().read(question(program.pid, [program.leaf], dumps_of(program.pid)))

    assert [each[2] for each in answer["ranges"]] == ["mapped_leaf", "dumped_leaf"]


def test_a_damaged_jitdump_is_said_to_be_one(tmp_path: Path):
    with sleeping() as pid:
        path = tmp_path / f"jit-{pid}.dump"
        path.write_bytes(b"x" * 100)
        answer = WrittenCode().read(question(pid, [0x7F00], [mapping_of_file(path)]))

    assert answer["jitdump"] == Outcome.DAMAGED


OWNERS = [(USER, "read"), (0, "read"), (OTHER, "other_owner")]


@pytest.mark.parametrize(("owner", "expected"), OWNERS)
def test_a_map_counts_if_it_is_its_process_s_or_root_s(owner: int, expected: str):
    """Anybody may put a file into /tmp."""
    with sleeping(USER) as pid:
        write_as(owner, map_of(pid), b"7f00 10 f\n")

        assert outcome_of(pid) == expected


def test_a_user_s_map_does_not_name_root_s_code():
    with sleeping() as pid:
        write_as(USER, map_of(pid), b"7f00 10 f\n")

        assert outcome_of(pid) == Outcome.OTHER_OWNER


def test_a_fifo_is_not_opened():
    """Whoever opens one waits for its other end."""
    with sleeping() as pid:
        os.mkfifo(map_of(pid))

        assert outcome_of(pid) == Outcome.NOT_REGULAR


def test_a_link_is_not_followed(tmp_path: Path):
    with sleeping() as pid:
        (tmp_path / "map").write_bytes(b"7f00 10 f\n")
        map_of(pid).symlink_to(tmp_path / "map")

        assert outcome_of(pid) == Outcome.NOT_REGULAR


def test_a_folder_is_no_map():
    with sleeping() as pid:
        map_of(pid).mkdir()
        try:
            assert outcome_of(pid) == Outcome.NOT_REGULAR
        finally:
            map_of(pid).rmdir()


def test_a_map_of_an_earlier_process_with_that_pid_does_not_count():
    """Maps outlive their processes."""
    with sleeping() as pid:
        map_of(pid).write_bytes(b"7f00 10 f\n")
        an_hour_ago = time.time() - 3600
        os.utime(map_of(pid), (an_hour_ago, an_hour_ago))

        assert outcome_of(pid) == Outcome.OUTDATED


def test_a_map_from_before_an_exec_does_not_count():
    with sleeping() as pid:
        map_of(pid).write_bytes(b"7f00 10 f\n")
        a_second_later_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME) + 1_000_000_000
        asked = question(pid, [0x7F00], begin_ns=a_second_later_ns)

        assert WrittenCode().read(asked)["perf_map"] == Outcome.OUTDATED


def test_there_is_no_answer_for_another_process_with_that_pid():
    with sleeping() as pid:
        asked = question(pid, [0x7F00])
        another = asked | {"start_ticks": asked["start_ticks"] + 1}

        assert WrittenCode().read(another) is None
    assert WrittenCode().read(asked) is None


def test_a_map_is_read_on_from_where_it_was_left(monkeypatch):
    with sleeping() as pid:
        reader = WrittenCode()
        with map_of(pid).open("wb", buffering=0) as file:
            file.write(b"7f00 10 first\n" + b"8f00 10 much more\n" * 50_000 + b"7f20 10 sec")
            assert names_of(pid, reader, 0x7F00, 0x7F20) == ["first"]

            file.write(b"ond\n7f00 8 again\n")
            begun_s = time.thread_time()
            assert names_of(pid, reader, 0x7F00, 0x7F0F, 0x7F20) == ["again", "first", "second"]
            on_s = time.thread_time() - begun_s
        begun_s = time.thread_time()
        names_of(pid, WrittenCode(), 0x7F00)

        assert on_s < (time.thread_time() - begun_s) / 2


@pytest.mark.parametrize("content", [b"7f20 10 new\n", b"7f20 10 new\n" * 3, b"7f20 10 new\n" * 9])
def test_a_map_that_is_written_again_in_place_is_read_again(content: bytes):
    """As `jcmd Compiler.perfmap` does, whether it is shorter, as long or longer then."""
    with sleeping() as pid:
        reader = WrittenCode()
        map_of(pid).write_bytes(b"7f00 10 old\n" * 3)
        assert names_of(pid, reader, 0x7F00, 0x7F20) == ["old"]
        map_of(pid).write_bytes(content)

        assert names_of(pid, reader, 0x7F00, 0x7F20) == ["new"]


def test_a_map_in_place_of_another_is_read_from_its_beginning():
    """It begins as the other one did."""
    with sleeping() as pid:
        reader = WrittenCode()
        map_of(pid).write_bytes(b"7f00 10 old\n")
        names_of(pid, reader, 0x7F00)
        map_of(pid).rename(map_of(pid).with_suffix(".old"))
        map_of(pid).with_suffix(".old").unlink()
        map_of(pid).write_bytes(b"7f00 10 new\n7f20 10 more\n")

        assert names_of(pid, reader, 0x7F00, 0x7F20) == ["new", "more"]


def test_a_gigabyte_is_read_up_to_the_limit_and_turn_by_turn():
    """No turn takes much CPU time, and what was read by then is there."""
    with sleeping() as pid:
        reader = WrittenCode()
        with map_of(pid).open("wb") as file:
            file.write(b"7f00 10 first\n" * 10)
            file.truncate(1 << 30)
            file.seek(LONGEST_BYTES + 100)
            file.write(b"\n7f20 10 beyond\n")
        turns, answer = 0, {"is_partial": True}
        while answer["is_partial"]:
            begun_s = time.thread_time()
            answer = reader.read(question(pid, [0x7F00, 0x7F20]))
            turns += 1
            assert time.thread_time() - begun_s < 1.5
            assert turns < 100

        assert answer["perf_map"] == Outcome.TOO_LARGE
        assert [each[2] for each in answer["ranges"]] == ["first"]


def test_a_map_of_many_lines_is_read_turn_by_turn(monkeypatch):
    """Each turn goes on where the last one ended."""
    monkeypatch.setattr(written_code, "TURN_CPU_S", 0.01)
    with sleeping() as pid:
        reader = WrittenCode()
        with map_of(pid).open("wb") as file:
            file.writelines(b"%x 10 function_%d\n" % (i << 4, i) for i in range(50_000))
        turns, answer = 0, {"is_partial": True}
        while answer["is_partial"]:
            answer = reader.read(question(pid, [49_999 << 4]))
            turns += 1

        assert turns > 1
        assert [each[2] for each in answer["ranges"]] == ["function_49999"]


def test_what_is_kept_is_bounded(monkeypatch):
    """The maps that were not asked for for longest are read again."""
    monkeypatch.setattr(written_code, "_MAX_KEPT_BYTES", 10_000)
    reader = WrittenCode()
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            pid = stack.enter_context(sleeping())
            map_of(pid).write_bytes(b"".join(b"%x 8 %0*d\n" % (8 * i, 90, i) for i in range(40)))
            names_of(pid, reader, 0)
        kept = [each.content.size_bytes for each in reader._kept.values()]

    assert len(kept) == 1
    assert sum(kept) < 10_000


NAMESPACES = [["--pid", "--fork"], ["--mount"], ["--pid", "--fork", "--mount"]]


@pytest.mark.kernel
@pytest.mark.parametrize("options", NAMESPACES)
def test_a_map_is_where_the_process_sees_it(jit: Path, options: list[str]):
    """In a namespace of its own it has another /tmp, and another pid for itself."""
    mount = "mount -t tmpfs none /tmp &&" if "--mount" in options else ""
    script = f'cp {jit} /run/jit-test.$$ && {mount} exec "/run/jit-test.$$" map'
    made = set(Path("/run").glob("jit-test.*"))
    command = ["unshare", *options, "sh", "-c", script]
    with running(*command, stdout=subprocess.PIPE) as process:
        leaf, caller = (int(word, 16) for word in process.stdout.readline().split())
        pid = child_of(process.pid) if "--fork" in options else process.pid
        own = own_pid(pid)
        try:
            answer = WrittenCode().read(question(pid, [leaf, caller]))
        finally:
            os.kill(pid, 9)
            if "--mount" not in options:
                map_of(own).unlink()
            for path in set(Path("/run").glob("jit-test.*")) - made:
                path.unlink()

    assert [each[2] for each in answer["ranges"]] == ["made_leaf", "made_caller"]
    assert (own == pid) == ("--pid" not in options)


@pytest.mark.kernel
def test_links_in_the_root_of_a_process_do_not_lead_out_of_it(jit: Path, tmp_path: Path):
    """Its /tmp may be a link, which is one in its own root."""
    root = tmp_path / "root"
    (root / "elsewhere").mkdir(parents=True)
    (root / "tmp").symlink_to("/elsewhere")
    static = compile_target("jit.c", root / "jit", "-O1", "-static")
    with running("chroot", root, "/jit", "map", stdout=subprocess.PIPE) as process:
        leaf, _ = (int(word, 16) for word in process.stdout.readline().split())
        answer = WrittenCode().read(question(process.pid, [leaf]))
        is_inside = (root / "elsewhere" / map_of(process.pid).name).exists()

    assert static.exists()
    assert is_inside
    assert [each[2] for each in answer["ranges"]] == ["made_leaf"]


def test_a_jitdump_is_read_turn_by_turn(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(written_code, "TURN_CPU_S", 0.01)
    with sleeping() as pid:
        path = tmp_path / f"jit-{pid}.dump"
        line = dump_lines(0x7F00, [(0x7F00 + i, i, b"/a.c") for i in range(50)])
        content = (line + dump_load(0x7F00, 64, b"f")) * 400
        path.write_bytes(dump_header() + content + dump_load(0x9000, 64, b"last"))
        mapping, reader = mapping_of_file(path), WrittenCode()
        turns, answer = 0, {"is_partial": True}
        while answer["is_partial"]:
            answer = reader.read(question(pid, [0x9000], [mapping]))
            turns += 1

    assert turns > 1
    assert [each[2] for each in answer["ranges"]] == ["last"]
