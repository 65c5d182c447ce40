"""One recording of a real Python program, and what a user sees of it: files, page and counts.

The agent records until it has as many samples of the program as the tests need, however long that
takes on a busy machine. What the program says of its own functions is what is compared with.
"""

import re
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import orjson
import pytest
from playwright.sync_api import expect

from storage.formats import pprof
from storage.profile import Profile
from symbolizer.location import Frame, Kind, NamedLocation
from tests.agent.test_agent import Place, fetch
from tests.support.browser import View, serving
from tests.support.live import wait_for
from tests.support.python_recordings import frames_of
from tests.support.targets import SOURCES, running

pytestmark = [pytest.mark.kernel, pytest.mark.browser, pytest.mark.timeout(900)]

SCRIPT = SOURCES / "pricing.py"
MODULE = "pricing"
HOT = ("parse", "Shop.total", "Shop.ranked", "Shop.key")
"""Each takes more than a tenth of the time."""
SAMPLES = 300
_LONGEST_S = 600
ENDINGS = (".pb.gz", ".folded", ".speedscope.json", ".svg", ".json")


@dataclass(frozen=True)
class Recorded:
    """What was recorded of one process, and what the agent said of all meanwhile.

    Attributes:
        lines: by qualname, the first line and all lines of the program's functions.
        exports: by ending, the process's samples as `everflame export` writes them.
        sums: of the objects' counts of Python frames, before and after the agent was asked.
    """

    place: Place
    pid: int
    lines: dict[str, tuple[int, list[int]]]
    window: tuple[int, int]
    exports: dict[str, bytes]
    told: dict[str, int]
    text: str
    metrics: str
    sums: tuple[Counter[str], Counter[str]]

    @property
    def profile(self) -> Profile:
        return pprof.decode(self.exports[".pb.gz"])


class Objects:
    """The objects of a store, each decoded once."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self.profiles: dict[Path, Profile] = {}

    def read(self) -> list[Profile]:
        for path in (self._place.root / "store").rglob("*.pb.gz"):
            if path not in self.profiles:
                self.profiles[path] = pprof.decode(path.read_bytes())
        return list(self.profiles.values())

    def has_enough(self, pid: int) -> bool:
        found = functions_of(frames_of(self.read(), pid))
        return found.total() >= SAMPLES and all(found[name] for name in HOT)

    def counts(self) -> Counter[str]:
        """Return what was counted of reading Python frames."""
        each = (profile.accounting.runtimes.get("cpython", {}) for profile in self.read())
        return sum(map(Counter, each), Counter())


def functions_of(stacks: Iterator[tuple[tuple[Frame, ...], int]]) -> Counter[str]:
    """Return the samples of Python functions, each as the innermost of its stack."""
    found: Counter[str] = Counter()
    for stack, samples in stacks:
        python = [frame.function for frame in stack if frame.kind is Kind.PYTHON]
        if python:
            found[python[-1]] += samples
    return found


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    place, objects = Place(tmp_path_factory.mktemp("python")), None
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = place.command("--frequency=499", f"--metrics-listen=127.0.0.1:{port}")
    with (
        running(*place.preferred(command), env=place.environment) as agent,
        running(sys.executable, SCRIPT, stdout=subprocess.PIPE) as program,
    ):
        lines = orjson.loads(program.stdout.readline())
        objects = Objects(place)
        wait_for(lambda: objects.has_enough(program.pid), _LONGEST_S, "samples of the program")
        before = objects.counts()
        told, text = place.status()["cpython"], place.run("status").stdout
        metrics = fetch(port, "/metrics").decode()
        agent.send_signal(signal.SIGTERM)
        assert agent.wait(_LONGEST_S) == 0
    windows = [profile.window for profile in objects.read()]
    window = (min(each.start_ns for each in windows), max(each.end_ns for each in windows))
    exports = export(place, program.pid, window)
    sums = (before, objects.counts())
    return Recorded(place, program.pid, lines, window, exports, told, text, metrics, sums)


def export(place: Place, pid: int, window: tuple[int, int], *more: str) -> dict[str, bytes]:
    """Export the samples of a process as a user would, in all formats."""
    files = [place.root / f"x{ending}" for ending in ENDINGS]
    done = place.run(
        "export",
        f"--store={place.root / 'store'}",
        f'-q={{pid="{pid}"}}',
        f"--from={window[0] // 10**9}",
        f"--until={-(-window[1] // 10**9)}",
        *(part for file in files for part in ("-o", str(file))),
        *more,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(ENDINGS, (file.read_bytes() for file in files), strict=True))


def of_script(profile: Profile) -> Counter[tuple[str, int]]:
    """Return the samples with each function and line of the script, once a sample."""
    found: Counter[tuple[str, int]] = Counter()
    for stack, samples in frames_of([profile]):
        for place in {(each.function, each.line) for each in stack if each.file == str(SCRIPT)}:
            found[place] += samples
    return found


def test_functions_and_lines_are_those_that_the_program_has(recorded: Recorded) -> None:
    """The lines of samples, and the lines on which functions begin."""
    places = of_script(recorded.profile)

    assert {function for function, _ in places} >= {"<module>", "main", *HOT}
    for function, line in places:
        assert line in recorded.lines[function][1], (function, line)
    begins = {
        (place.function, place.first_line)
        for place in recorded.profile.locations
        if isinstance(place, NamedLocation) and place.file == str(SCRIPT)
    }
    assert begins == {(name, recorded.lines[name][0]) for name, _ in begins}
    spent = functions_of(frames_of([recorded.profile]))
    assert set(HOT) <= {name for name, _ in spent.most_common(6)}


def test_folded_text_has_the_same_counts(recorded: Recorded) -> None:
    """By the module and the qualname of functions."""
    lines = recorded.exports[".folded"].decode().splitlines()

    counts: Counter[str] = Counter()
    for line in lines:
        stack, _, count = line.rpartition(" ")
        for name in set(stack.split(";")):
            counts[name] += int(count)
    assert sum(int(line.rpartition(" ")[2]) for line in lines) == recorded.profile.total_samples
    expected: Counter[str] = Counter()
    for stack, samples in frames_of([recorded.profile]):
        for name in {each.function for each in stack if each.file == str(SCRIPT)}:
            expected[f"{MODULE}.{name}"] += samples
    assert {name: counts[name] for name in expected} == expected


def test_drawings_and_speedscope_say_where_functions_begin(recorded: Recorded) -> None:
    """SVG in tooltips, speedscope and JSON in their frames."""
    begins = {name: recorded.lines[name][0] for name in HOT}

    svg = ElementTree.fromstring(recorded.exports[".svg"])
    titles = "\n".join(each.text or "" for each in svg.iter("{http://www.w3.org/2000/svg}title"))
    speedscope = orjson.loads(recorded.exports[".speedscope.json"])["shared"]["frames"]
    drawn = orjson.loads(recorded.exports[".json"])["frames"]

    for name, line in begins.items():
        assert f"{name}\n{MODULE} (python) {SCRIPT}:{line}\n" in titles
        assert [name, MODULE, "python", str(SCRIPT), line] in drawn
    found = {each["name"]: (each.get("file"), each.get("line")) for each in speedscope}
    assert {name: found[f"{MODULE}.{name}"] for name in HOT} == {
        name: (str(SCRIPT), line) for name, line in begins.items()
    }


def test_an_export_of_lines_has_those_that_were_sampled(recorded: Recorded) -> None:
    exports = export(recorded.place, recorded.pid, recorded.window, "--group=line")

    drawn = orjson.loads(exports[".json"])["frames"]
    lines = {(each[0], each[4]) for each in drawn if each[3] == str(SCRIPT)}
    assert lines <= of_script(recorded.profile).keys()
    assert lines >= {place for place, samples in of_script(recorded.profile).most_common(4)}


def test_pprof_lists_the_source_with_its_cost(
    recorded: Recorded, go: Callable[..., str], tmp_path: Path
) -> None:
    """Other people's tool shows the script's own lines, and what each costs."""
    (tmp_path / "x.pb.gz").write_bytes(recorded.exports[".pb.gz"])
    source = SCRIPT.read_text().splitlines()
    sampled = {line for function, line in of_script(recorded.profile) if function == "parse"}

    listed = go("tool", "pprof", "-symbolize=none", "-sample_index=samples", "-list=^parse$",
                "x.pb.gz")  # fmt: skip

    assert f"ROUTINE ======================== parse in {SCRIPT}" in listed
    rows = re.findall(r"^ +(\S+) +(\S+) +(\d+):(.*)$", listed, re.MULTILINE)
    costly = {int(line): text for _, cost, line, text in rows if cost != "."}
    assert costly.keys() == sampled
    for line, text in costly.items():
        assert text.strip() == source[line - 1].strip()


def test_the_counts_of_reading_frames_add_up_everywhere(recorded: Recorded) -> None:
    """In the status, the metrics and the objects: attempts, frames, and why some are missing."""
    before, after = recorded.sums
    told = recorded.told

    python = sum(
        samples
        for stack, samples in frames_of(Objects(recorded.place).read())
        if any(each.kind is Kind.PYTHON for each in stack)
    )
    reasons = after.total() - after["attempts"] - after["frames"]
    assert after["attempts"] - reasons <= python + reasons
    assert after["frames"] >= python - reasons
    for what in ("attempts", "frames"):
        assert 0 < before[what] <= told[what] <= after[what]
    assert re.search(r"^python +[0-9,]+ frames in [0-9,]+ samples$", recorded.text, re.MULTILINE)
    measured = dict(re.findall(r'^everflame_cpython\{figure="(\w+)"\} (\S+)$', recorded.metrics,
                               re.MULTILINE))  # fmt: skip
    for what in ("attempts", "frames"):
        assert told[what] <= float(measured[what]) <= after[what]


def test_the_page_shows_functions_places_and_counts(
    recorded: Recorded, visit: Callable[..., View], tmp_path: Path
) -> None:
    """In a real browser, over a real service: the panel of a function, and the coverage."""
    # The page may round a window to the objects in it: one that is larger has all of them.
    first, last = (recorded.window[0] // 10**6 - 60_000, recorded.window[1] // 10**6 + 60_000)
    with serving(recorded.place.root / "store", tmp_path) as service:
        query = f"q=%7Bpid%3D%22{recorded.pid}%22%7D"
        view = visit(f"{service.url}/?from={first}&until={last}&{query}")

        view.click_box("parse")

        panel = view.page.locator("#panel")
        expect(panel).to_contain_text(f"{SCRIPT}:{recorded.lines['parse'][0]}")
        expect(panel).to_contain_text(MODULE)
        view.page.locator("#coverage summary").click()
        coverage = view.page.locator("#coverage")
        for what in ("attempts", "frames"):
            expect(coverage).to_contain_text(f"{recorded.sums[1][what]:,}")
            expect(coverage).to_contain_text(f"cpython, {what}")
