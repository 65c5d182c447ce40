"""Programs whose frames of an interpreter are made up: they harm only their own names."""

import contextlib
import json
import resource
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bpf.frames import Chain, split_frames
from bpf.interpreters import ChainEnd
from bpf.sampler import Sampler, SamplerConfig
from bpf.samples import MAX_USER_WORDS, PythonFrame, RawSample
from profiler.agent.mapped_files import FileKey, MappedFile
from profiler.agent.python_code import PythonCode
from profiler.agent.runtimes import Runtimes
from symbolizer.location import NamedLocation, Segment
from symbolizer.symbols.elf import FileSource, read_elf
from tests.support.elf_files import build
from tests.support.python_images import imitation, known_image_of
from tests.support.pythons import need
from tests.support.targets import SOURCES, running

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(400)]

FEW, LONGEST_S = 20, 120
FRAMES = 300
"""Of the program's chain."""
CUT_SHORT = frozenset({ChainEnd.TRUNCATED, ChainEnd.UNREADABLE, ChainEnd.NO_CODE})
MIB = 1 << 20


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = imitation() + "#include <stddef.h>\n" + (SOURCES / "hostile_frames.c").read_text()
    path = tmp_path_factory.mktemp("hostile") / "hostile"
    return build(path, source, "-no-pie", "-pthread")


class Reading:
    """Frames of programs that the kernel knows by their file, before it knows their mappings."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self.runtimes = Runtimes(sampler, set)
        self.python = PythonCode(self.runtimes.interpreters)

    def add(self, path: Path) -> None:
        image, _ = known_image_of(path)
        status = path.stat()
        file = MappedFile(FileKey(("", 0), "", (0, 0), status.st_ino, bytes(path)))
        file.inode = (status.st_dev, status.st_ino)
        with path.open("rb") as opened:
            segments = read_elf(FileSource(opened.fileno())).segments
        file.segments = tuple(Segment(*segment) for segment in segments)
        self.runtimes.take(str(path), image)
        self.runtimes.add_program(str(path), file)

    def drain(self) -> list[RawSample]:
        """Return samples; each tick is one, or known to be lost or of somebody else."""
        drain = self.sampler.drain()
        self.python.take(self.sampler.take_codes())
        stored = sum(sample.samples for sample in drain.samples) + len(drain.copies)
        ended = drain.idle + drain.filtered + sum(drain.lost.values())
        assert stored + ended == drain.ticks
        assert not drain.lost.keys() & {"map_full", "fault"}
        return drain.samples

    def until(self, is_enough: Callable[[list[RawSample]], bool]) -> list[RawSample]:
        end_s, samples = time.monotonic() + LONGEST_S, self.drain()
        while not is_enough(samples):
            assert time.monotonic() < end_s
            time.sleep(0.2)  # ticks are what is waited for
            samples += self.drain()
        return samples

    def of(self, pid: int, least: int = FEW) -> list[RawSample]:
        """Return samples of a process, from now on."""
        self.sampler.select([pid])
        self.drain()
        samples = self.until(lambda found: sum(each.pid == pid for each in found) >= least)
        return [sample for sample in samples if sample.pid == pid]

    def places(self, sample: RawSample) -> tuple[list[NamedLocation], Chain | None]:
        frames, chain = split_frames(sample.user)
        found = [
            self.python.locate(sample.generation, frame)
            for frame in frames
            if isinstance(frame, PythonFrame)
        ]
        return [place for place in found if place is not None], chain


@pytest.fixture(scope="module")
def reading(hostile: Path) -> Iterator[Reading]:
    with Sampler(SamplerConfig(frequency_hz=499, pids=frozenset())) as sampler:
        reading = Reading(sampler)
        reading.add(hostile)
        sampler.start()
        yield reading


@contextlib.contextmanager
def started(hostile: Path, mode: str) -> Iterator[int]:
    with running(hostile, mode, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process.pid


@pytest.mark.parametrize(
    ("mode", "end", "frames"),
    [
        ("plain", ChainEnd.WHOLE, range(FRAMES - 1, FRAMES)),
        ("itself", ChainEnd.TRUNCATED, range(500, MAX_USER_WORDS // 2)),
        ("cycle", ChainEnd.TRUNCATED, range(500, MAX_USER_WORDS // 2)),
        ("entries", ChainEnd.TRUNCATED, range(1)),
        ("nowhere", ChainEnd.UNREADABLE, range(10, 11)),
        ("no code", ChainEnd.NO_CODE, range(9, 10)),
        ("wild code", ChainEnd.UNREADABLE, range(9, 10)),
        ("no state", ChainEnd.OTHER_THREAD, range(1)),
        ("wild state", ChainEnd.UNREADABLE, range(1)),
    ],
)
def test_a_chain_that_leads_nowhere_ends_and_says_why(
    reading: Reading, hostile: Path, mode: str, end: ChainEnd, frames: range
) -> None:
    with started(hostile, mode) as pid:
        samples = reading.of(pid)

    for sample in samples:
        places, chain = reading.places(sample)
        assert chain is not None
        assert chain.end == end
        assert chain.frames in frames
        mark = [f"[{end.label}]".replace("_", " ")] * (end in CUT_SHORT)
        assert [place.function for place in places] == ["plain"] * chain.frames + mark


@pytest.mark.parametrize("mode", ["names", "changing", "lines"])
def test_names_and_lines_of_any_bytes_are_readable_and_short(
    reading: Reading, hostile: Path, mode: str
) -> None:
    with started(hostile, mode) as pid:
        samples = reading.of(pid, 4 * FEW)
        samples += reading.of(pid)

    functions: Counter[str] = Counter()
    for sample in samples:
        for place in reading.places(sample)[0]:
            functions[place.function] += 1
            for text in (place.function, place.file, place.module):
                assert text.isprintable()
                assert len(text) <= 1024
                text.encode()
            assert 0 <= place.line < 1 << 32
    assert functions["plain"]
    if mode == "names":
        assert functions["[python]"]  # whose name cannot be read
        assert any(name.startswith(r"a\n\x00;\x1b[31m") for name in functions)
        assert any(r"\ud800" in name and r"\u202e" in name for name in functions)
        assert any(name.startswith("mmmm") and name.endswith("…") for name in functions)


def test_a_program_with_ever_other_functions_takes_no_more_than_its_share(
    reading: Reading, hostile: Path
) -> None:
    """It names what it likes; others are named all the same, and memory is bounded."""
    with started(hostile, "passing") as pid, started(hostile, "plain") as other:
        reading.sampler.select([other])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        reading.of(pid, 300)
        samples = reading.of(other)

    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10 < before + 256 * MIB
    assert reading.python.status()["code_objects_beyond_budget"]
    named = [place.function for sample in samples for place in reading.places(sample)[0]]
    assert named.count("plain") > 0.9 * len(named)


NAMES = {
    "": "<unnamed>",
    "a;b\n\x1b[31m": r"a;b\n\x1b[31m",
    "\udc80\ud800x": r"\udc80\ud800x",
    "\u202egnp": r"\u202egnp",
    "long" * (1 << 14): "long" * 16,
}
RENAMES_ITSELF = """\
import ctypes, itertools, json, os, sys, time
def spin():
    end = time.thread_time() + 0.004
    while time.thread_time() < end: pass
functions = []
for name in json.loads(sys.argv[1]):
    code = spin.__code__.replace(co_name=name, co_qualname=name, co_filename=name + ".py")
    functions.append(type(spin)(code, globals()))
os.write(1, b"ready\\n")
for number in itertools.count():
    for function in functions:
        # co_firstlineno of 3.11: where line tables begin to count
        ctypes.c_int.from_address(id(function.__code__) + 72).value = number * 7919 - (1 << 20)
        function()
"""


def test_python_functions_that_rename_themselves_are_readable(reading: Reading) -> None:
    """Lone surrogates, control characters, 64 KB; and lines that cannot be."""
    python = need("3.11-system")
    reading.add(python.runtime_file)
    command = python.command("-S", "-c", RENAMES_ITSELF, json.dumps([*NAMES]))
    with running(*command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        samples = reading.of(process.pid, 12 * FEW)

    functions: Counter[str] = Counter()
    for sample in samples:
        for place in reading.places(sample)[0]:
            assert place.function.isprintable()
            assert place.file.isprintable()
            assert 0 <= place.line < 1 << 31
            functions[place.function] += 1
    for name in NAMES.values():
        assert any(function.startswith(name) for function in functions), (name, functions)
    assert max(map(len, functions)) <= 513


LOOP = """\
import os, sys
def work():
    for _ in range(20000): pass
work()
if int(sys.argv[1]) < 60:
    if os.fork():
        os.wait()
        sys.exit()
    work()
    command = [sys.executable, "-S", "-c", sys.argv[2], str(int(sys.argv[1]) + 1), sys.argv[2]]
    os.execv(sys.executable, command)
"""


def test_programs_that_fork_and_exec_python_without_end_do_no_harm(
    reading: Reading, hostile: Path
) -> None:
    python = need("3.11-system")
    reading.add(python.runtime_file)
    with started(hostile, "plain") as other:
        reading.sampler.select([other])
        with running(*python.command("-S", "-c", LOOP, "0", LOOP)) as process:
            reading.sampler.select([process.pid])
            samples = reading.until(
                lambda found: (
                    len({each.pid for each in found}) > 10
                    and sum(each.pid == other for each in found) >= FEW
                )
            )

    functions: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for sample in samples:
        places, _ = reading.places(sample)
        functions[sample.pid == other].update(place.function for place in places)
    assert set(functions[True]) == {"plain"}
    assert functions[False]["work"]
    assert "plain" not in functions[False]
