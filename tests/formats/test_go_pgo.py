"""Profiles for `go build -pgo`: what Go's own tools read in them, and what else is said."""

import dataclasses
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from profiler import cli
from profiler.formats import go_pgo
from profiler.formats.go_pgo import GoPgoError
from profiler.formats.reading import read
from storage.columns import Columns
from storage.formats import pprof
from storage.formats.pprof_message import ProfileMessage, decompress
from symbolizer.location import AddressLocation, FileOffset, Frame, Kind, Location, Module
from symbolizer.symbols.elf import MemorySource, read_elf
from symbolizer.symbols.golines import GoCall, GoLines
from symbolizer.symbols.gopclntab import open_go_table
from tests.support import profiles as some
from tests.support import stores
from tests.support.elf_files import read_symbols
from tests.support.go_programs import MAIN, build, need_go, read_edges
from tests.support.targets import running

REST = AddressLocation("[rest]", FileOffset(0))
SOURCE = MAIN.read_text().splitlines()


class Program:
    """A Go program, and where in it its calls are."""

    def __init__(self, path: Path) -> None:
        self.path = path
        elf = read_elf(MemorySource(path.read_bytes()))
        self.module = Module(elf.build_id, str(path), segments=elf.segments)
        self._lines = GoLines(elf, open_go_table(elf))
        self._symbols = {symbol.name.decode(): symbol for symbol in read_symbols(path)}

    def place(self, function: str, line: int = 0) -> AddressLocation:
        """Return an address in a function, at a line of the function that is not inlined."""
        symbol = self._symbols[function]
        for address in range(symbol.address, symbol.address + symbol.size):
            calls = self._lines.calls(address)
            if not line or calls[-1].line == line:
                return self._location(address)
        raise AssertionError(f"{function} has no code of line {line}")

    def inlined(self, *names: str) -> tuple[AddressLocation, tuple[GoCall, ...]]:
        """Return an address with these calls inlined, innermost first, and the calls."""
        symbol = self._symbols[names[-1]]
        for address in range(symbol.address, symbol.address + symbol.size):
            calls = self._lines.calls(address)
            if [call.function.decode() for call in calls] == list(names):
                return self._location(address), calls
        raise AssertionError(f"nowhere is {names}")

    def returning(self, function: str) -> AddressLocation:
        """Return the address at which a function with a frame returns."""
        symbol = self._symbols[function]
        addresses = range(symbol.address, symbol.address + symbol.size)
        return self._location(next(filter(self._lines.lacks_frame, addresses)))

    def _location(self, address: int) -> AddressLocation:
        for segment in self.module.segments:
            if 0 <= address - segment.p_vaddr < segment.p_filesz:
                offset = FileOffset(address - segment.p_vaddr + segment.p_offset)
                return AddressLocation(self.module.build_id, offset)
        raise AssertionError(f"no code at {address:#x}")


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Program:
    need_go(20)
    path = tmp_path_factory.mktemp("go") / "api"
    build(path)
    return Program(path)


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Program:
    """Another program, which is the same one with another build id."""
    need_go(20)
    path = tmp_path_factory.mktemp("go") / "worker"
    build(path, "-ldflags=-X main.unused=1 -B 0x1234567890abcdef1234567890abcdef12345678")
    return Program(path)


def line_of(text: str) -> int:
    (line,) = [i for i, each in enumerate(SOURCE, start=1) if text in each]
    return line


def profile_of(*stacks, programs=(), labels=None) -> Columns:
    """Fold (root first stack, samples), or (labels, stack, samples), with names as we keep them."""
    rows = [each if len(each) == 3 else (labels or {"service": "api"}, *each) for each in stacks]
    names: dict[Location, tuple[Frame, ...]] = {}
    of_go = {each.module.build_id for each in programs}
    for _, stack, _ in rows:
        for place in stack:
            if isinstance(place, AddressLocation) and place.build_id in of_go:
                names[place] = (Frame("main.f", "api", Kind.NATIVE, str(MAIN), 1),)
    modules = (*some.MODULES, *(each.module for each in programs), Module("[rest]", "[rest]"))
    return Columns.of(some.build(rows, names, modules=modules))


def parse(content: bytes):
    parsed = ProfileMessage()
    parsed.ParseFromString(decompress(content))
    return parsed


def stacks_in(content: bytes) -> dict[tuple[tuple[str, ...], ...], tuple[int, ...]]:
    """Return the values by stack, leaf first: a tuple of `function+first line:line` a location."""
    parsed = parse(content)
    texts = [text.decode() for text in parsed.string_table]
    functions = {f.id: f"{texts[f.name]}+{f.start_line}" for f in parsed.function}
    places = {
        each.id: tuple(f"{functions[line.function_id]}:{line.line}" for line in each.line)
        for each in parsed.location
    }
    return {
        tuple(places[number] for number in sample.location_id): tuple(sample.value)
        for sample in parsed.sample
    }


def test_calls_are_what_go_build_sees_them_as(program, tmp_path):
    """Names of symbols, the call's line in the caller, and how often: of the two innermost."""
    need_go(23)
    total, start = line_of("sum += each.score"), line_of("func total")
    caller = program.place("main.total", total)
    main = program.place("main.main", line_of("sum += total"))
    leaf = program.place("main.(*mixing).score")
    profile = profile_of(
        ([some.MEMCPY, main, caller, leaf], 700),
        ([main, caller, leaf, some.READ], 40),  # the kernel, which it has called
        ([main, caller, leaf, some.STRIPPED, some.MEMCPY], 2),
        ([main, caller], 30),
        ([some.MEMCPY, some.READ], 1000),
        programs=[program],
    )

    written = go_pgo.encode(profile)
    (tmp_path / "default.pgo").write_bytes(written.content)

    edges = read_edges(tmp_path / "default.pgo")
    in_main = line_of("sum += total") - line_of("func main()")
    assert edges == {
        ("main.total", "main.(*mixing).score", total - start): 742,
        ("main.main", "main.total", in_main): 30,
    }
    assert written.remarks == ["772 samples of api, 43.6 % of all that are selected"]


def test_a_profile_of_go_itself_keeps_all_of_its_calls(tmp_path):
    """Read back as any pprof file, and written from its addresses alone."""
    need_go(24)  # since then programs have the build id that profiles name
    path, file = tmp_path / "api", tmp_path / "cpu.pprof"
    build(path, source=(MAIN, MAIN.with_name("cpuprofile.go")))
    subprocess.run([path, "400"], env={"CPUPROFILE": str(file)}, check=True, timeout=60,
                   stdout=subprocess.DEVNULL)  # fmt: skip

    written = go_pgo.encode(Columns.of(read(str(file)).profile))
    (tmp_path / "default.pgo").write_bytes(written.content)

    edges = read_edges(file)
    assert ("main.total", "main.(*mixing).score") in {edge[:2] for edge in edges}
    assert read_edges(tmp_path / "default.pgo") == edges


def test_the_stacks_are_those_of_go_alone(program):
    """Leaf first; code before Go was entered is cut, and what is folded counts for nobody."""
    caller = program.place("main.total", line_of("sum += each.score"))
    leaf = program.place("main.(*mixing).score")
    main = program.place("main.main")
    goexit = program.place("runtime.goexit.abi0")
    profile = profile_of(
        ([goexit, main, caller, leaf], 5),
        ([some.HANDLER, main, some.MEMCPY, caller, leaf], 3),  # Go calls C, which calls Go
        ([main, caller, REST], 7),
        ([main, some.READ], 2),
        programs=[program],
    )

    written = go_pgo.encode(profile)

    found = stacks_in(written.content)
    functions = {
        tuple(re.sub(r"\+.*", "", line) for place in stack for line in place): values[0]
        for stack, values in found.items()
    }
    assert functions == {
        ("main.(*mixing).score", "main.total", "main.main"): 5,
        ("main.(*mixing).score", "main.total"): 3,
        ("main.main",): 2,
    }
    assert "left out 7 samples whose stacks end in [rest]" in written.remarks


def test_a_function_that_is_returning_has_no_caller(program):
    """By frame pointers, main.main seems to have called it."""
    leaf = program.returning("main.(*mixing).score")
    profile = profile_of(
        ([program.place("main.main"), leaf], 4),
        ([program.place("main.main"), leaf, some.READ], 1),
        programs=[program],
    )

    (stack,) = stacks_in(go_pgo.encode(profile).content).items()

    assert stack[1] == (5, 5 * some.PERIOD_NS)
    assert [line.partition("+")[0] for place in stack[0] for line in place] == [
        "main.(*mixing).score"
    ]


def test_inlined_calls_are_lines_of_one_location_and_wrappers_are_none(program):
    """A method of a value is called by a wrapper, which Go's own profiles leave out as well."""
    leaf, calls = program.inlined("main.parity.score", "main.(*parity).score")
    wrapper = program.place("main.(*parity).score")
    caller = program.place("main.total", line_of("sum += each.score"))
    assert calls[-1].is_wrapper
    stacks = [[caller, leaf], [caller, wrapper, leaf]]

    written = go_pgo.encode(profile_of(*((each, 1) for each in stacks), programs=[program]))

    (inner, outer), *more = stacks_in(written.content)
    assert more == []  # both stacks are one
    first = line_of("func (p parity) score")
    assert inner == (f"main.parity.score+{first}:{calls[0].line}",)
    assert outer == (f"main.total+{line_of('func total')}:{line_of('sum += each.score')}",)


def test_hosts_and_labels_are_added_up_and_weighed_by_time(program):
    """Equal stacks are one sample, at whatever rate each host was sampled."""
    caller, leaf = program.place("main.total"), program.place("main.(*mixing).score")
    rows = [({"service": "api", "host": f"web-{i}"}, [caller, leaf], 3) for i in "ab"]
    profile = some.build(rows, {leaf: (Frame("f", "api", Kind.NATIVE, str(MAIN)),)},
                         modules=(program.module,))  # fmt: skip
    faster = dataclasses.replace(Columns.of(profile), period_ns=some.PERIOD_NS // 10)

    (values,) = stacks_in(go_pgo.encode(Columns.of(profile)).content).values()
    (scaled,) = stacks_in(go_pgo.encode(faster).content).values()

    assert values == (6, 6 * some.PERIOD_NS)
    assert scaled == (60, 6 * some.PERIOD_NS)


def test_go_tool_pprof_reads_it(program, go, tmp_path):
    """Types, period, functions with their first lines, the program and its build id."""
    caller, leaf = program.place("main.total"), program.place("main.(*mixing).score")
    (tmp_path / "default.pgo").write_bytes(
        go_pgo.encode(profile_of(([caller, leaf], 9), programs=[program])).content
    )

    raw = go("tool", "pprof", "-raw", tmp_path / "default.pgo")

    assert "PeriodType: cpu nanoseconds" in raw
    assert "samples/count cpu/nanoseconds" in raw
    assert f"main.total {MAIN}" in raw
    assert program.module.build_id in raw
    assert re.search(rf"\b9 +{9 * some.PERIOD_NS}: 2 1\b", raw)


@pytest.fixture
def selected(program, other):
    """Return a profile of two services, each with a Go program."""
    return profile_of(
        ({"service": "api"}, [program.place("main.main")], 80),
        ({"service": "jobs"}, [other.place("main.main")], 15),
        ({"service": "db"}, [some.MEMCPY], 5),
        programs=[program, other],
    )


def test_several_services_with_go_are_refused(selected, program):
    """By name and share; a program that is named is a choice."""
    with pytest.raises(GoPgoError, match=r"Go code of 2 services: api 84\.2 %, jobs 15\.8 %"):
        go_pgo.encode(selected)

    written = go_pgo.encode(selected, [str(program.path)])

    assert written.remarks[:1] == ["80 samples of api, 80.0 % of all that are selected"]
    assert written.remarks[1:] == ["left out other Go programs: worker"]


def test_of_several_programs_of_a_service_the_largest_is_taken(program, other):
    profile = profile_of(
        ([program.place("main.main")], 1), ([other.place("main.main")], 9),
        programs=[program, other],
    )  # fmt: skip

    assert go_pgo.encode(profile).remarks == [
        "9 samples of worker, 90.0 % of all that are selected",
        "left out other Go programs: api",
    ]


@pytest.mark.parametrize("function", ["runtime.main", "runtime.goexit.abi0", "runtime.mcall"])
def test_go_is_recognized_by_its_runtime_where_no_files_are_known(function, program):
    """As in what was stored before files were read."""
    place = program.place("main.main")
    names = {place: (Frame(function, "api", Kind.NATIVE),)}

    written = go_pgo.encode(
        Columns.of(some.build([({}, [place], 3)], names, modules=(program.module,)))
    )

    assert len(stacks_in(written.content)) == 1


def test_a_program_that_is_elsewhere_is_asked_for(program, tmp_path):
    """With its build id; it is taken from where the user says it is, and never a wrong one."""
    moved = tmp_path / "moved"
    shutil.copy(program.path, moved)
    away = dataclasses.replace(program.module, path="/srv/none/api")
    place = program.place("main.main")
    profile = Columns.of(some.build([({}, [place], 3)],
                                    {place: (Frame("f", "api", Kind.NATIVE, "/m.go"),)},
                                    modules=(away,)))  # fmt: skip

    with pytest.raises(
        GoPgoError, match=r"not found at /srv/none/api, nor running here; .*--binary FILE"
    ):
        go_pgo.encode(profile)
    assert stacks_in(go_pgo.encode(profile, [str(moved)]).content)


def test_a_program_that_was_replaced_is_read_where_it_still_runs(program, tmp_path):
    """Nothing has to be named as long as a process has it."""
    path = tmp_path / "api"
    shutil.copy(program.path, path)
    moved = dataclasses.replace(program.module, path=str(path))
    place = program.place("main.main")
    profile = Columns.of(some.build([({}, [place], 3)],
                                    {place: (Frame("f", "api", Kind.NATIVE, "/m.go"),)},
                                    modules=(moved,)))  # fmt: skip

    with running(path, str(1 << 40), stdout=subprocess.DEVNULL):
        path.unlink()
        found = stacks_in(go_pgo.encode(profile).content)

    assert list(found.values()) == [(3, 3 * some.PERIOD_NS)]


def test_builds_that_are_not_there_are_left_out_and_said(program):
    """The others are enough for a profile."""
    gone = Module("dead" * 10, "/srv/none/api")
    place, missing = program.place("main.main"), AddressLocation(gone.build_id, FileOffset(0x1100))
    frame = (Frame("f", "api", Kind.NATIVE, "/m.go"),)
    profile = Columns.of(some.build([({}, [place], 3), ({}, [missing], 1)],
                                    {place: frame, missing: frame},
                                    modules=(gone, program.module)))  # fmt: skip

    written = go_pgo.encode(profile)

    where = f"not found at {gone.path}, nor running here; name the program with --binary FILE"
    assert written.remarks == [
        "3 samples of api, 75.0 % of all that are selected",
        f"left out builds: api (build id deaddeaddeaddead, 25.0 %) {where}",
    ]


def old(program, folder: Path) -> Path:
    """Return a program that says that Go 1.18 linked it."""
    content = bytearray(program.path.read_bytes())
    elf = read_elf(MemorySource(bytes(content)))
    section = next(s for s in elf.sections if s.name == b".gopclntab")
    content[section.offset] = 0xF0
    path = folder / "old"
    path.write_bytes(content)
    return path


def damaged(program, folder: Path) -> Path:
    content = program.path.read_bytes()
    path = folder / "damaged"
    path.write_bytes(content[: len(content) // 3])
    return path


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (old, "was built by Go before 1.20"),
        (damaged, "damaged ELF file"),
        (lambda *_: "/bin/true", "/bin/true is not a Go program"),
        (lambda *_: __file__, "not an ELF file"),
        (lambda *_: "/no/file", "cannot read /no/file: No such file"),
        (lambda *_: "/dev/null", "not a regular file"),
    ],
    ids=["old", "damaged", "C", "text", "none", "device"],
)
def test_a_file_that_is_no_program_of_go_is_refused(file, reason, program, tmp_path):
    profile = profile_of(([program.place("main.main")], 1), programs=[program])

    with pytest.raises(GoPgoError, match=re.escape(reason)):
        go_pgo.encode(profile, [str(file(program, tmp_path))])


def test_a_program_that_was_not_sampled_is_refused(program, other):
    """The message says which ones were."""
    profile = profile_of(([program.place("main.main")], 1), programs=[program])

    with pytest.raises(GoPgoError, match=r"no sample is of .*worker .*; .* there: api \(build id"):
        go_pgo.encode(profile, [str(other.path)])


def test_without_go_code_there_is_no_profile():
    """Nor of anything but CPU time."""
    profile = Columns.of(some.sample_profile())

    with pytest.raises(GoPgoError, match=r"nothing selected: there is no Go code in .*libc\.so\.6"):
        go_pgo.encode(profile)
    with pytest.raises(GoPgoError, match="a profile of alloc_space"):
        go_pgo.encode(dataclasses.replace(profile, type="alloc_space", unit="bytes"))


def test_the_command_writes_it_from_a_store_and_from_a_file(program, tmp_path, monkeypatch, capfd):
    """The same bytes, by the names that `go build` looks for; and it says what is in it."""
    monkeypatch.setenv("EVERFLAME_CACHE", str(tmp_path / "cache"))
    caller, leaf = program.place("main.total"), program.place("main.(*mixing).score")
    names = {leaf: (Frame("f", "api", Kind.NATIVE, str(MAIN)),)}
    profile = some.build([({"service": "api"}, [caller, leaf], 9)], names,
                         modules=(program.module,))  # fmt: skip
    store = stores.directory(tmp_path / "store", stores.at(profile, 1))
    (tmp_path / "in.pb.gz").write_bytes(pprof.encode(stores.at(profile, 1)))
    command = ["export", "--for", "go-pgo", "-o", "default.pgo"]
    monkeypatch.chdir(tmp_path)

    query = ["--store", str(store.root), "--from", "0", "-q", '{service="api"}']
    assert cli.main([*command, *query]) == 0
    from_store = Path("default.pgo").read_bytes()
    assert cli.main([*command, "in.pb.gz", "--binary", str(program.path)]) == 0

    assert stacks_in(from_store) == stacks_in(Path("default.pgo").read_bytes())
    said = capfd.readouterr().err
    assert said.count("wrote default.pgo\n") == 2
    assert said.count("9 samples of api, 100 % of all that are selected\n") == 2


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--for", "go-pgo", "--invert"], "takes whole stacks: leave out --invert"),
        (["--for", "go-pgo", "--group", "file"], "takes whole stacks: leave out --group"),
        (["--for", "go-pgo", "-o", "/"], "it is a directory"),
        (["--for", "go-pgo"], "there is no Go code"),
        (["--binary", "api"], "--binary is for --for go-pgo"),
        ([], "to write default.pgo, add --for go-pgo"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_command_line_that_asks_for_something_else_is_refused(
    arguments, reason, tmp_path, monkeypatch, capfd
):
    """With exit status 2, one line, and no file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.pb.gz").write_bytes(pprof.encode(some.sample_profile()))

    assert cli.main(["export", "in.pb.gz", "-o", "default.pgo", *arguments]) == 2

    message = capfd.readouterr().err
    assert reason in message
    assert message.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["in.pb.gz"]
