"""Code in anonymous memory: when readers are asked for its names, and what it is called then."""

import contextlib
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from bpf.records import Rings
from profiler.agent import jit_names
from profiler.agent.budgets import BoundedProfile, Limits
from profiler.agent.jit_names import JitNames
from profiler.agent.mapped_files import MappedFiles
from profiler.agent.names import CACHE_BYTES, Named, Names
from profiler.agent.readers import Readers
from profiler.processes.address_spaces import AddressSpaces
from storage.profile import ProfileBuilder
from symbolizer.location import AddressLocation, Kind, Location, Miss, NamedLocation
from symbolizer.maps import Mapping, MappingTable
from symbolizer.symbols.table import SymbolCache
from tests.support.file_systems import hanging
from tests.support.jit_programs import jit_program, map_of, write_as
from tests.support.live import generation_of, started, wait_for
from tests.support.naming import mappings_of
from tests.support.targets import compile_target, running

pytestmark = pytest.mark.kernel

ANONYMOUS = MappingTable.of([Mapping(0x10000, 0x7F0000000000, 0, b"//anon")])


def made(function: str, file: str = "", first_line: int = 0, line: int = 0) -> NamedLocation:
    return NamedLocation(function, "[jit]", Kind.JIT, file, first_line, line)


class Agent:
    """The part of a recorder that names what is sampled, and when processes began what they run."""

    def __init__(self, folder: Path, rings: Rings) -> None:
        self.readers = Readers(folder)
        self.begins = {}
        files = MappedFiles(self.readers, AddressSpaces(rings))
        self.jit = JitNames(
            self.readers, lambda generation: self.begins.get(generation, generation.start_ns)
        )
        self.names = Names(self.readers, files, SymbolCache(folder, CACHE_BYTES), self.jit)

    def locate(
        self, pid: int, addresses: Sequence[int], mappings: MappingTable | None = None
    ) -> list[Location]:
        table = mappings or mappings_of(pid)
        words = np.array(addresses, np.uint64)
        return self.names.locate(generation_of(pid), table, words)

    def close(self, locations: Sequence[Location]) -> Named:
        return self.names.name(
            dict.fromkeys(locations),
            lambda is_done: self.readers.wait(time.monotonic() + 20, is_done),
        )

    def names_of(
        self, pid: int, addresses: Sequence[int], mappings: MappingTable | None = None
    ) -> list[Location]:
        """Return what addresses are in a window that is closed at once."""
        located = self.locate(pid, addresses, mappings)
        named = self.close(located)
        return [named.locations[each] for each in located]


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    with contextlib.closing(Rings()) as rings:
        agent = Agent(tmp_path, rings)
        try:
            yield agent
        finally:
            agent.readers.close()


@pytest.fixture(scope="module")
def jit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_target("jit.c", tmp_path_factory.mktemp("jit") / "jit")


@pytest.fixture
def sleeper() -> Iterator[int]:
    with started("sleep", "100") as process:
        try:
            yield process.pid
        finally:
            map_of(process.pid).unlink(missing_ok=True)


def test_code_of_a_process_is_what_its_map_says(agent: Agent, jit: Path):
    with jit_program(jit, "map") as program:
        found = agent.names_of(program.pid, [program.leaf + 3, program.caller, program.leaf + 99])

    assert found == [made("made_leaf"), made("made_caller"), ("[jit]", program.leaf + 99)]
    status = agent.jit.status()
    assert status["perf_map"] == {"asked": 1, "read": 1}
    assert status["jitdump"] == {"asked": 0}
    assert (status["jit_locations"]["named"], status["jit_locations"]["unnamed"]) == (2, 1)


def test_code_of_a_process_is_what_its_jitdump_says(agent: Agent, jit: Path, tmp_path: Path):
    """It is found among what the process has mapped."""
    with jit_program(jit, "dump", tmp_path) as program:
        found = agent.names_of(program.pid, [program.leaf, program.leaf + 6, program.caller + 4])

    file = "/srv/made.src"
    assert found == [
        made("dumped_leaf", file, 0, 10),
        made("dumped_leaf", file, 0, 11),
        made("dumped_caller", file, 0, 21),
    ]
    assert agent.jit.status()["jitdump"] == {"asked": 1, "read": 1}


def test_code_at_one_address_is_each_process_s_own(agent: Agent, sleeper: int):
    """Forked workers share their mappings, and make code of their own in them."""
    with running("sleep", "100") as other:
        try:
            map_of(sleeper).write_bytes(b"20000 10 one\n")
            map_of(other.pid).write_bytes(b"20000 10 other\n")
            located = [agent.locate(pid, [0x20000], ANONYMOUS)[0] for pid in (sleeper, other.pid)]
            named = agent.close(located)
        finally:
            map_of(other.pid).unlink()

    assert [named.locations[each].function for each in located] == ["one", "other"]


def test_python_and_node_functions_are_split_into_name_file_and_line(agent: Agent, sleeper: int):
    map_of(sleeper).write_bytes(b"20000 10 JS:*f /a.js:3:1\n20010 10 py::A.g:/a.py\n")

    assert agent.names_of(sleeper, [0x20000, 0x20010], ANONYMOUS) == [
        made("f", "/a.js", 3, 3),
        NamedLocation("A.g", "[python]", Kind.PYTHON, "/a.py", 0, 0),
    ]


def test_the_private_map_of_another_user_s_process_is_read(agent: Agent):
    """Python writes its maps for nobody else to read."""
    user = 12345
    with started("setpriv", f"--reuid={user}", "--clear-groups", "sleep", "100") as process:
        wait_for(lambda: Path(f"/proc/{process.pid}").stat().st_uid == user)
        write_as(user, map_of(process.pid), b"20000 10 private\n")
        map_of(process.pid).chmod(0o600)
        try:
            found = agent.names_of(process.pid, [0x20000], ANONYMOUS)
        finally:
            map_of(process.pid).unlink()

    assert found == [made("private")]


def reasons_of(named: Named) -> dict[str, int]:
    return dict(named.misses)


def test_code_without_a_name_has_a_reason(agent: Agent, sleeper: int):
    """There is no map; it does not hold the address; it is another user's."""
    absent = agent.close(agent.locate(sleeper, [0x20000, 0x20001], ANONYMOUS))
    with running("sleep", "100") as other, running("sleep", "100") as third:
        try:
            map_of(other.pid).write_bytes(b"30000 10 elsewhere\n")
            beside = agent.close(agent.locate(other.pid, [0x20000], ANONYMOUS))
            write_as(12345, map_of(third.pid), b"20000 10 lies\n")
            refused = agent.close(agent.locate(third.pid, [0x20000], ANONYMOUS))
        finally:
            map_of(other.pid).unlink()
            map_of(third.pid).unlink()

    assert reasons_of(absent) == {Miss.ANONYMOUS: 2}
    assert reasons_of(beside) == {Miss.NOT_IN_MAP: 1}
    assert reasons_of(refused) == {Miss.MAP_REFUSED: 1}
    assert absent.modules["[jit]"].kind is Kind.JIT
    counts = agent.jit.status()["perf_map"]
    assert counts == {"asked": 3, "no_file": 1, "read": 1, "other_owner": 1}


def test_a_process_that_has_exited_says_so(agent: Agent):
    with running("sleep", "100") as process:
        generation = generation_of(process.pid)
    located = agent.names.locate(generation, ANONYMOUS, np.array([0x20000], np.uint64))

    assert reasons_of(agent.close(located)) == {Miss.EXITED: 1}


def test_names_that_come_later_in_the_window_apply(agent: Agent, sleeper: int, monkeypatch):
    """A compiler makes code before it says so."""
    monkeypatch.setattr(jit_names, "_PAUSE_S", 0.1)
    map_of(sleeper).write_bytes(b"")
    located = agent.locate(sleeper, [0x20000], ANONYMOUS)
    agent.names.ask()
    agent.readers.wait(time.monotonic() + 20, lambda: agent.readers.is_idle)
    before = agent.jit.status()["perf_map"]
    with map_of(sleeper).open("ab") as file:
        file.write(b"20000 10 late\n")

    def is_named() -> bool:
        agent.names.ask()
        return agent.jit.find(located[0]) is not None

    # There is nothing to poll between two questions.
    until_s = time.monotonic() + 20
    while not is_named() and time.monotonic() < until_s:
        time.sleep(0.01)
        agent.readers.poll()

    assert before == {"asked": 1, "read": 1}
    assert agent.close(located).locations[located[0]] == made("late")


def test_the_name_of_a_window_is_that_of_its_end(agent: Agent, sleeper: int):
    """Compilers use memory again: what was known in an earlier window is asked for again."""
    map_of(sleeper).write_bytes(b"20000 10 first\n")
    (first,) = agent.names_of(sleeper, [0x20000], ANONYMOUS)
    with map_of(sleeper).open("ab") as file:
        file.write(b"20000 10 second\n")

    assert first == made("first")
    assert agent.names_of(sleeper, [0x20000], ANONYMOUS) == [made("second")]


def test_a_process_that_has_ended_keeps_the_names_it_had(agent: Agent):
    """Its last ticks are named by what was read before."""
    with started("sleep", "100") as process:
        generation = generation_of(process.pid)
        map_of(process.pid).write_bytes(b"20000 10 was_here\n")
        first = agent.names.locate(generation, ANONYMOUS, np.array([0x20000], np.uint64))
        agent.names.ask()
        agent.readers.wait(time.monotonic() + 20, lambda: agent.readers.is_idle)
    map_of(process.pid).unlink()
    later = agent.names.locate(generation, ANONYMOUS, np.array([0x20008], np.uint64))
    named = agent.close([*first, *later])

    assert [named.locations[each] for each in (*first, *later)] == [made("was_here")] * 2


def test_a_process_without_a_map_is_asked_for_less_and_less_often(agent: Agent, sleeper: int):
    """Each window has new addresses, and none is a reason to look again."""
    clock = [1000.0]
    jit = JitNames(agent.readers, lambda generation: generation.start_ns, lambda: clock[0])
    asked = []
    for second in range(300):
        clock[0] += 1
        _, new = jit.place(generation_of(sleeper), ANONYMOUS)
        new.add(0x20000 + second)
        before = jit.status()["perf_map"]["asked"]
        jit.ask(is_due=second % 60 == 59)
        agent.readers.wait(time.monotonic() + 20, lambda: agent.readers.is_idle)
        if jit.status()["perf_map"]["asked"] > before:
            asked.append(second)
        if second % 60 == 59:
            jit.end_window()

    assert asked[:5] == [0, 6, 18, 42, 90]
    assert len(asked) <= 9


def test_after_an_exec_nothing_more_is_asked_of_what_ran_before(agent: Agent, sleeper: int):
    """The process of that pid has other code now, at the same addresses maybe."""
    generation = generation_of(sleeper)
    located = agent.names.locate(generation, ANONYMOUS, np.array([0x20000], np.uint64))
    map_of(sleeper).write_bytes(b"20000 10 of_the_next_program\n")
    agent.begins[generation] = generation.start_ns + 5_000_000_000

    named = agent.close(located)

    assert named.locations[located[0]] == AddressLocation("[jit]", 0x20000)
    assert agent.jit.status()["perf_map"] == {"asked": 0}


def test_a_map_of_many_names_is_asked_for_piece_by_piece(agent: Agent, sleeper: int):
    count = 3000
    map_of(sleeper).write_bytes(b"".join(b"%x 10 f%d\n" % (i << 4, i) for i in range(4096, 8192)))

    found = agent.names_of(sleeper, [i << 4 for i in range(4096, 4096 + count)], ANONYMOUS)

    assert found == [made(f"f{i}") for i in range(4096, 4096 + count)]
    assert agent.jit.status()["jit_locations"]["ranges"] == count


def test_what_is_kept_is_bounded(agent: Agent, monkeypatch):
    """The processes that were sampled longest ago are forgotten first."""
    monkeypatch.setattr(jit_names, "_MAX_RANGES", 25)
    for _ in range(4):
        with running("sleep", "100") as process:
            map_of(process.pid).write_bytes(
                b"".join(b"%x 10 f\n" % (i << 4) for i in range(4096, 4106))
            )
            try:
                agent.names_of(process.pid, [i << 4 for i in range(4096, 4106)], ANONYMOUS)
            finally:
                map_of(process.pid).unlink()

    status = agent.jit.status()["jit_locations"]
    assert (status["processes"], status["ranges"]) == (2, 20)


def test_names_beyond_the_budget_of_a_window_are_left_out():
    """A process may give each of its functions a name of a thousand letters."""
    bounded = BoundedProfile(ProfileBuilder(1), 1, Limits(module_names_bytes=3000))
    places = {AddressLocation("jit 0", i): made(f"{i:0900d}") for i in range(5)}

    kept = list(bounded.affordable(places).values())

    assert kept == [*list(places.values())[:3], *[("[jit]", 0)] * 2]
    assert set(bounded.affordable({made("x"): AddressLocation("aa", 5)}).values()) == {("aa", 5)}


def test_a_reader_that_a_file_has_taken_over_is_not_believed(agent: Agent, sleeper: int):
    """Whatever it answers raises nothing here, and its names are readable."""
    located = agent.locate(sleeper, [0x20000], ANONYMOUS)
    process = agent.jit._process_of(located[0].build_id)
    ranges = [[0x20000, 0x20010, "\x1b[2J", "[jit]", "jit", "f", 1e3, -5], [5, 4, *"123456"]]
    answers = [
        {},
        {"jitdump": "read", "perf_map": "what?"},
        {"jitdump": "read", "perf_map": "read", "ranges": [[1, 2]], "is_partial": False},
        {"jitdump": "read", "perf_map": "read", "ranges": ranges, "is_partial": False},
    ]
    for result in answers:
        agent.jit._take(process, process.new, jit_names.Answer(result))

    assert agent.jit.find(located[0]) == made(r"\x1b[2J", "f", 1000, 0)


def test_a_map_that_does_not_answer_costs_its_own_names_alone(
    agent: Agent, sleeper: int, tmp_path: Path
):
    """Its file system hangs whoever opens it; another process is named in the same window."""
    (tmp_path / "content").write_bytes(b"20000 10 never_read\n")
    map_of(sleeper).touch()
    with (
        hanging(tmp_path / "mount", tmp_path / "content") as system,
        started("sleep", "100") as other,
        contextlib.ExitStack() as mounted,
    ):
        subprocess.run(["mount", "--bind", system.file, map_of(sleeper)], check=True)
        mounted.callback(subprocess.run, ["umount", "--lazy", map_of(sleeper)], check=False)
        system.flag.touch()
        map_of(other.pid).write_bytes(b"20000 10 other\n")
        mounted.callback(map_of(other.pid).unlink)
        located = [agent.locate(pid, [0x20000], ANONYMOUS)[0] for pid in (sleeper, other.pid)]
        with system.ending():
            named = agent.close(located)

    assert named.locations[located[1]] == made("other")
    assert reasons_of(named) == {Miss.NO_ANSWER: 1}
    assert agent.jit.status()["perf_map"] == {"asked": 2, "failed_hung": 1, "read": 1}
