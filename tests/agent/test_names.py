"""Code of running processes is named by readers, from the content of its own file."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from bpf.records import Rings
from profiler.agent import names as names_module
from profiler.agent.jit_names import JitNames
from profiler.agent.mapped_files import MappedFiles
from profiler.agent.names import Named, Names
from profiler.agent.readers import Readers
from profiler.processes.address_spaces import AddressSpaces
from profiler.processes.generations import is_running
from storage.profile import NameRank
from symbolizer.location import AddressLocation, Kind, Location, Miss
from symbolizer.maps import MappingTable
from symbolizer.symbols.kernel import KERNEL_NAME
from symbolizer.symbols.table import SymbolCache
from tests.support.elf_files import build, read_symbols, strip
from tests.support.file_systems import hanging
from tests.support.live import generation_of, wait_for
from tests.support.naming import mappings_of
from tests.support.targets import running

pytestmark = pytest.mark.kernel

NOBODY = 65534
SLOW = "tests.support.slow_kinds"
BUILD_ID = f"0x{'5a' * 20}"
FUNCTIONS = ("first", "second", "third")


def source(*functions: str) -> str:
    """Return a program that prints where its functions are, and waits."""
    defined = "\n".join(
        f"__attribute__((noinline)) int {name}(int n) {{ return n * {7 + i} + (n >> 3); }}"
        for i, name in enumerate(functions)
    )
    printed = "".join(f'printf("%p ", {name});' for name in functions)
    called = " + ".join(f"{name}(n)" for name in functions)
    return f"""#include <stdio.h>
{defined}
int main(void) {{ {printed} printf("\\n"); fflush(stdout); int n = getchar(); return {called}; }}
"""


class Process(NamedTuple):
    pid: int
    functions: list[int]


@contextlib.contextmanager
def started(path: Path) -> Iterator[Process]:
    with running(path, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield Process(process.pid, [int(word, 16) for word in process.stdout.readline().split()])


class Window:
    """What is sampled in one window, and what it is called when that is closed."""

    def __init__(self, agent: "Agent") -> None:
        self._agent = agent
        self._located: list[Location] = []
        self._of: dict[tuple[int, int], Location] = {}
        self.named = Named({}, [], {}, Counter())

    def sample(self, process: Process, addresses: Sequence[int] | None = None) -> None:
        addresses = process.functions if addresses is None else addresses
        table = self._agent.mappings(process.pid)
        found = self._agent.names.locate(
            generation_of(process.pid), table, np.array(addresses, np.uint64)
        )
        self._located += found
        self._of.update(zip([(process.pid, a) for a in addresses], found, strict=True))
        self._agent.names.ask()

    def close(self) -> None:
        self.named = self._agent.names.name(dict.fromkeys(self._located), self._agent.wait)

    def final(self, process: Process, address: int) -> Location:
        location = self._of[process.pid, address]
        return self.named.locations.get(location, location)

    def functions(self, process: Process) -> list[str | None]:
        """Return the names of a process's functions, the best of each."""
        names: dict[Location, str] = {}
        for location, frames in sorted(self.named.frames, key=lambda each: NameRank.of(each[1])):
            if frames:
                names[location] = frames[0].function
        return [names.get(self.final(process, address)) for address in process.functions]

    def module(self, process: Process) -> str:
        location = self.final(process, process.functions[0])
        assert isinstance(location, AddressLocation)
        return location.build_id


class Agent:
    """The part of a recorder that names what is sampled."""

    def __init__(self, cache: Path, rings: Rings, kinds: str) -> None:
        self.cache = cache
        self.readers = Readers(cache, kinds=kinds)
        self.names = self.start_names(AddressSpaces(rings))
        self._tables: dict[int, MappingTable] = {}

    def start_names(self, spaces: AddressSpaces) -> Names:
        files = MappedFiles(self.readers, spaces)
        jit = JitNames(self.readers, lambda generation: generation.start_ns)
        return Names(self.readers, files, SymbolCache(self.cache, names_module.CACHE_BYTES), jit)

    def mappings(self, pid: int) -> MappingTable:
        return self._tables.setdefault(pid, mappings_of(pid))

    def window(self) -> Window:
        return Window(self)

    def wait(self, is_done: Callable[[], bool]) -> None:
        self.readers.wait(time.monotonic() + 1, is_done)

    def settle(self) -> None:
        """Wait until nothing is asked for, however long this host takes."""

        def is_done() -> bool:
            self.names.ask(is_due=True)
            return self.readers.is_idle

        assert self.readers.wait(time.monotonic() + 30, is_done)

    def kernel(self, addresses: Sequence[int]) -> Named:
        """Return a closed window in which these addresses of the kernel were sampled."""
        places = self.names.locate_kernel(np.array(addresses, np.uint64))
        self.settle()
        return self.names.name(places, self.wait)

    def evict(self) -> None:
        """Remove all tables, and the children that have some in memory."""
        for path in self.cache.glob("*.symbols"):
            path.unlink()
        for child in Path("/proc/self/task").glob("*/children"):
            for pid in child.read_text().split():
                if b"profiler.agent.reader" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(int(pid), signal.SIGKILL)
                    wait_for(lambda pid=int(pid): not is_running(pid))

    def name(self, *processes: Process) -> Window:
        """Return a closed window in which these were sampled, one after the other."""
        window = self.window()
        for process in processes:
            window.sample(process)
            self.settle()
        window.close()
        return window


@pytest.fixture(scope="module")
def rings() -> Iterator[Rings]:
    rings = Rings()
    yield rings
    rings.close()


@contextlib.contextmanager
def running_agent(
    cache: Path, rings: Rings, kinds: str = "profiler.agent.reader_kinds"
) -> Iterator[Agent]:
    cache.mkdir(exist_ok=True)
    agent = Agent(cache, rings, kinds)
    try:
        yield agent
    finally:
        agent.readers.close()


@pytest.fixture
def agent(tmp_path, rings) -> Iterator[Agent]:
    with running_agent(tmp_path / "cache", rings) as agent:
        yield agent


@pytest.fixture
def program(tmp_path) -> Path:
    return build(tmp_path / "program", source(*FUNCTIONS))


@pytest.fixture
def variant(tmp_path):
    """Return programs of one build id."""

    def make(name: str, *functions: str, owner: int = 0) -> Path:
        path = build(tmp_path / name, source(*functions), f"-Wl,--build-id={BUILD_ID}")
        os.chown(path, owner, -1)
        return path

    return make


def test_more_of_known_code_is_asked_for_by_one_request(agent, program):
    """Small requests at each wake would cost more than the answers: they wait for each other."""
    with started(program) as process:
        window = agent.window()
        window.sample(process, process.functions[:1])
        agent.settle()
        answered = agent.readers.answered
        for function in process.functions[1:]:
            window.sample(process, [function])
            assert agent.readers.is_idle
        window.close()

        assert window.functions(process) == list(FUNCTIONS)
        assert agent.readers.answered == answered + 1


def test_a_window_without_new_code_asks_nothing(agent, program):
    """What was named is kept; another address of the same function needs no answer either."""
    with started(program) as process:
        first = agent.name(process)
        answered = agent.readers.answered
        again = agent.window()
        again.sample(process)
        again.sample(process, [address + 1 for address in process.functions])
        again.close()

    assert first.functions(process) == again.functions(process) == list(FUNCTIONS)
    assert agent.readers.answered == answered
    assert not again.named.misses
    assert agent.names.slowest()[0]["path"] == str(program)
    module = first.named.modules[first.module(process)]
    linked = next(s.address for s in read_symbols(program) if s.name == b"first")
    assert module.elf_address(first.final(process, process.functions[0]).offset) == linked


def test_names_that_no_window_uses_are_forgotten(agent, program):
    """A host that runs something else each day holds those of the last hour."""
    with started(program) as process:
        agent.name(process)
        held = agent.names._kept
        for _ in range(names_module._UNUSED_WINDOWS + names_module._FORGET_EVERY):
            again = agent.window()
            again.sample(process, process.functions[:1])
            again.close()
        forgotten = held - agent.names._kept
        answered = agent.readers.answered
        last = agent.name(process)

    assert [frames[0].function for _, frames in again.named.frames] == [FUNCTIONS[0]]
    assert forgotten == held - 1
    assert last.functions(process) == list(FUNCTIONS)
    assert agent.readers.answered > answered


def test_addresses_outside_files_have_a_reason(agent, program):
    """Anonymous code, unmapped addresses and exited processes are locations without a name."""
    table = MappingTable.of([], "[exited]")
    with started(program) as process:
        window = agent.window()
        window.sample(process, [8])
        gone = agent.names.locate(generation_of(process.pid), table, np.array([8], np.uint64))
        named = agent.names.name([window.final(process, 8), *gone], agent.wait)

    assert named.locations == {place: place for place in named.locations}
    assert named.misses == {str(Miss.NO_MAPPING): 1, str(Miss.EXITED): 1}
    assert named.modules.keys() == {"[unknown]", "[exited]"}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_programs_of_one_build_id_have_their_own_names(tmp_path, rings, variant, order):
    """Another user's program with a copied build id changes no name, whoever is sampled first."""
    victim = variant("victim", "check_password", "second", "third")
    attacker = variant("attacker", "innocent_lies", "second", "third", owner=NOBODY)
    with (
        running_agent(tmp_path / "cache", rings) as agent,
        started(victim) as good,
        started(attacker) as bad,
    ):
        sampled = [good, bad]
        both = agent.name(*(sampled[place] for place in order))
        alone = agent.name(good)

    assert both.functions(good) == ["check_password", "second", "third"]
    assert both.functions(bad) == ["innocent_lies", "second", "third"]
    assert both.module(good) != both.module(bad)
    assert alone.module(good) == both.module(good)
    with running_agent(tmp_path / "cache", rings) as later, started(victim) as good:
        assert later.name(good).functions(good) == ["check_password", "second", "third"]


@pytest.mark.parametrize("flags", [(), ("-K", "second")])
@pytest.mark.parametrize("stripped_first", [True, False])
def test_the_best_table_known_names_all_variants(tmp_path, rings, variant, flags, stripped_first):
    """More or less stripped ones, in one recording, and alone in the next run."""
    whole = variant("whole", *FUNCTIONS)
    stripped = Path(shutil.copy2(whole, tmp_path / "stripped"))
    strip(stripped, *flags)
    with (
        running_agent(tmp_path / "cache", rings) as agent,
        started(whole) as full,
        started(stripped) as less,
    ):
        both = agent.name(*((less, full) if stripped_first else (full, less)))

    assert both.functions(less) == both.functions(full) == list(FUNCTIONS)
    assert both.module(less) == both.module(full)
    assert both.final(less, less.functions[0]) == both.final(full, full.functions[0])
    with running_agent(tmp_path / "cache", rings) as later, started(stripped) as less:
        assert later.name(less).functions(less) == list(FUNCTIONS)


def test_names_get_better_from_when_they_are_known(agent, tmp_path, variant):
    """The better table comes in a later window; then the process runs on with good names."""
    whole = variant("whole", *FUNCTIONS)
    stripped = strip(Path(shutil.copy2(whole, tmp_path / "stripped")))
    with started(stripped) as less:
        before = agent.name(less)
        with started(whole) as full:
            agent.name(full)
        after = agent.name(less)

    assert not set(before.functions(less)) & set(FUNCTIONS)
    assert before.named.misses == {str(Miss.NO_SYMBOL): 3}
    assert after.functions(less) == list(FUNCTIONS)
    assert after.final(less, less.functions[0]) == before.final(less, less.functions[0])


def test_a_file_of_another_user_names_no_stripped_program(tmp_path, rings, variant):
    """Whoever can read a program can write other names into a copy; root's are believed."""
    whole = variant("whole", "lie", "second", "third", owner=NOBODY)
    stripped = strip(Path(shutil.copy(whole, tmp_path / "stripped")))
    theirs = Path(shutil.copy(stripped, tmp_path / "theirs"))
    os.chown(theirs, NOBODY, -1)
    with (
        running_agent(tmp_path / "cache", rings) as agent,
        started(whole) as liar,
        started(stripped) as good,
        started(theirs) as own,
    ):
        window = agent.name(liar, good, own)

    assert window.functions(liar)[0] == "lie"
    assert "lie" not in window.functions(good)
    assert window.functions(own)[0] == "lie" or window.module(own) == window.module(good)


def test_a_file_whose_owner_a_user_makes_up_names_no_stripped_program(tmp_path, rings, variant):
    """Who serves a file system by FUSE may say that its files are root's."""
    whole = variant("whole", "lie", "second", "third")
    stripped = strip(Path(shutil.copy(whole, tmp_path / "stripped")))
    with (
        hanging(tmp_path / "mount", whole) as served,
        running_agent(tmp_path / "cache", rings) as agent,
        started(served.file) as liar,
        started(stripped) as good,
    ):
        window = agent.name(liar, good)

    assert window.functions(liar)[0] == "lie"
    assert "lie" not in window.functions(good)


def test_evicted_tables_are_built_again(agent, program):
    """As long as a process runs, its file can be read. The kernel's symbols can be, too."""
    kernel = kernel_functions()
    with started(program) as process:
        agent.window().sample(process, process.functions[:1])
        agent.kernel(kernel[:1])
        agent.settle()
        agent.evict()
        functions = agent.name(process).functions(process)
        at_first = agent.kernel(kernel[1:])
        then = agent.kernel(kernel[1:])

    assert functions == list(FUNCTIONS)
    assert at_first.misses == {str(Miss.NOT_KEPT): len(kernel) - 1}
    assert not then.misses
    assert len(then.frames) == len(kernel) - 1


def test_a_window_does_not_wait_long_for_names(tmp_path, rings, program):
    """What comes too late is counted and named in the next window. Nothing is waited for twice."""
    with running_agent(tmp_path / "cache", rings, SLOW) as agent, started(program) as process:
        hold = agent.cache / "hold"
        hold.touch()
        spans_s = []
        windows = []
        for _ in range(2):
            windows.append(agent.window())
            windows[-1].sample(process)
            begun_s = time.monotonic()
            windows[-1].close()
            spans_s.append(time.monotonic() - begun_s)
        hold.unlink()
        windows.append(agent.name(process))

    first, second, third = windows
    assert first.functions(process) == second.functions(process) == [None] * 3
    assert first.named.misses == second.named.misses == {str(Miss.NOT_READ): 3}
    assert third.functions(process) == list(FUNCTIONS)
    assert spans_s[0] < 10
    assert spans_s[1] < 0.5
    places = [first.final(process, address) for address in process.functions]
    build_id = third.module(process)
    identified = [place for place in places if place.build_id == build_id]
    assert [place.offset for place in places] == [
        third.final(process, address).offset for address in process.functions
    ]
    assert identified in ([], places)  # this host may be too slow even for that


@pytest.mark.parametrize("garbled", ['{"places": [["x"]]}', '{"named": Infinity}'])
def test_a_damaged_answer_costs_the_names_of_its_file_only(tmp_path, rings, program, garbled):
    """A reader may be taken over by what it reads."""
    with running_agent(tmp_path / "cache", rings, SLOW) as agent, started(program) as process:
        (agent.cache / "garble").write_text(garbled)
        window = agent.name(process)

    assert window.functions(process) == [None] * 3
    assert window.named.misses == {str(Miss.DAMAGED): 3}
    assert window.module(process) in window.named.modules


def test_copies_of_a_file_are_one_module(agent, tmp_path, program):
    """Its name is that of one path in boxes with names and without, whichever was first."""
    strip(program)
    copy = shutil.copy(program, tmp_path / "another")
    with started(program) as first, started(copy) as second:
        window = agent.name(first, second)

    module = window.named.modules[window.module(first)]
    assert window.module(second) == window.module(first)
    assert module.path == str(copy)
    assert {frames[0].module for _, frames in window.named.frames} == {"another"}


def test_names_of_the_running_kernel_agree_with_kallsyms(agent):
    """Thousands of addresses inside functions have the name of a symbol at their start."""
    code = sorted(kernel_symbols())
    named = {name: address for address, name in code}
    addresses = np.unique([a for a, _ in code if named["_text"] <= a < named["_etext"]])
    chosen = np.random.default_rng(5).choice(len(addresses) - 1, 3000)
    wanted = (addresses[chosen] + (addresses[chosen + 1] - addresses[chosen]) // 3).tolist()

    places = agent.names.locate_kernel(np.array(wanted, np.uint64))
    agent.settle()
    frames = dict(agent.names.name(places, agent.wait).frames)

    for start, place in zip(addresses[chosen].tolist(), places, strict=True):
        (frame,) = frames[place]
        assert (frame.kind, frame.module) == (Kind.KERNEL, KERNEL_NAME)
        at = {name for address, name in at_address(code, start)}
        assert frame.function in at or all(name.startswith("__pfx_") for name in at)
        assert place.offset < named["_etext"] - named["_text"]


def at_address(code, address):
    place = bisect_left(code, (address, ""))
    while place < len(code) and code[place][0] == address:
        yield code[place]
        place += 1


def test_unknown_kernel_address_has_a_reason(agent):
    """Outside all images nothing is guessed."""
    kernel_symbols()

    named = agent.kernel([0xFFFFFFFFFFFFF000])

    assert not named.frames
    assert named.misses == {str(Miss.KERNEL_UNKNOWN): 1}


def kernel_symbols() -> list[tuple[int, str]]:
    symbols = [line.split() for line in Path("/proc/kallsyms").read_text().splitlines()]
    code = [(int(line[0], 16), line[2]) for line in symbols if len(line) == 3 and line[1] in "tTwW"]
    if not any(address for address, _ in code):
        pytest.skip("kallsyms shows no addresses: run as root")
    return code


def kernel_functions() -> list[int]:
    core = {name: address for address, name in kernel_symbols()}
    inside = [a for a in core.values() if core["_text"] <= a < core["_etext"]]
    return sorted(set(inside))[1000:1010]
