"""Files of Python programs: pprof has everything, all others what a person wants to see."""

from collections import Counter
from xml.etree import ElementTree

import orjson
import pytest

from profiler.flamegraph import flamegraph
from profiler.flamegraph.stacks import Group
from profiler.flamegraph.views import View
from profiler.formats import export
from profiler.formats.reading import read_bytes
from profiler.text import fit_name
from storage.columns import Columns
from storage.formats import pprof, pprof_arrays
from storage.hashing import process_hasher
from storage.profile import Profile
from symbolizer.location import Frame, Kind, NamedLocation
from tests.support.profiles import build
from tests.support.python_profiles import LINES, LOOP, profile_of, shop_profile

FOLDED_ENDINGS = (".folded", ".speedscope.json", ".svg", ".json")


@pytest.mark.parametrize("ending", FOLDED_ENDINGS)
def test_the_interpreters_own_frames_are_in_a_file_if_they_are_asked_for(ending):
    """Whatever the format; the counts are the same."""
    without = export.encode(shop_profile(), f"p{ending}")
    with_them = export.encode(shop_profile(), f"p{ending}", python_native=True)

    assert b"_PyEval_EvalFrameDefault" not in without
    assert b"_PyEval_EvalFrameDefault" in with_them
    assert b"PyDict_GetItem" in without


def test_pprof_keeps_everything():
    """What is read back is equal, location by location."""
    profile = shop_profile()

    content = export.encode(profile, "p.pb.gz")

    assert pprof.decode(content) == profile
    hasher = process_hasher()
    assert pprof_arrays.decode(content, hasher).to_profile() == profile


def test_pprof_has_files_and_lines_of_python_functions(go, tmp_path):
    """Other people's tools show them: each line of a function with its own cost."""
    profile = shop_profile()
    (tmp_path / "p.pb.gz").write_bytes(export.encode(profile, "p.pb.gz"))

    shown = go("tool", "pprof", "-symbolize=none", "-nodefraction=0", "-top", "-lines", "p.pb.gz")
    raw = go("tool", "pprof", "-symbolize=none", "-raw", "p.pb.gz")

    for function, (_, line) in LINES.items():
        assert f"{function} /srv/shop/shop.py:{line}" in shown
    assert "[python]" in raw
    assert f"s={LINES['Shop.price'][0]}" in raw


def test_folded_text_names_the_module_of_a_python_function():
    """As `module.qualname`, so that two functions of one name are two."""
    lines = export.encode(shop_profile(), "p.folded").decode().splitlines()

    main = "python3;_start;shop.pricing.<module>;shop.pricing.main;shop.pricing.Shop.price"
    assert f"{main} 35" in lines
    assert f"{main};PyDict_GetItem 12" in lines
    assert sum(int(line.rpartition(" ")[2]) for line in lines) == shop_profile().total_samples


@pytest.mark.parametrize(
    ("group", "line"),
    [
        (Group.LINE, "shop.pricing.main:75;shop.pricing.Shop.price:27;PyDict_GetItem 12"),
        (Group.FILE, "python3.11;/srv/shop/shop.py;python3.11 20"),
        (Group.MODULE, "python3.11;shop.pricing;python3.11 20"),
    ],
)
def test_folded_text_of_other_boxes_names_these(group, line):
    """A module is not named twice."""
    shown = View(group=group).shown(Columns.of(shop_profile()))

    lines = export.encode(shown.profile, "p.folded", by_line=shown.by_line).decode().splitlines()

    assert any(each.endswith(line) for each in lines), lines


def test_speedscope_has_the_file_and_the_first_line_of_python_functions():
    """Its viewer shows both; one function stays one frame, whatever its lines."""
    stacks = [((LOOP, f"py:{name}"), 1) for name in LINES]
    document = orjson.loads(export.encode(profile_of(stacks), "p.speedscope.json"))

    frames = {frame["name"]: frame for frame in document["shared"]["frames"]}

    for function, (first, _) in LINES.items():
        frame = frames[f"shop.pricing.{function}"]
        assert (frame["file"], frame["line"]) == ("/srv/shop/shop.py", first)


def test_a_speedscope_file_is_read_as_it_was_written():
    """Names have no module in front then, so they equal those of pprof files."""
    read = read_bytes(export.encode(shop_profile(), "p.speedscope.json", by=())).profile

    functions = {location.function for location in read.locations}
    assert {"main", "Shop.price", "<module>"} <= functions
    assert {location.module for location in read.locations if location.function == "main"} == {
        "shop.pricing"
    }


def two_lines_profile() -> Profile:
    """Return a profile of one function at two of its lines."""
    lines = [NamedLocation("main", "shop", Kind.PYTHON, "shop.py", 3, line) for line in (4, 7)]
    return build([({}, [lines[0]], 5), ({}, [lines[1]], 2)])


def boxes_in(content: bytes, ending: str) -> list[tuple[str, int]]:
    """Return the functions and lines of the boxes of the two lines, as a file shows them."""
    if ending == ".svg":
        svg = ElementTree.fromstring(content)
        titles = [each.text or "" for each in svg.iter("{http://www.w3.org/2000/svg}title")]
        found = [title.split("\n") for title in titles if title.startswith("main\n")]
        return [(lines[0], int(lines[1].rpartition(":")[2])) for lines in found]
    document = orjson.loads(content)
    if ending == ".json":
        return [(frame[0], frame[4]) for frame in document["frames"] if frame[2] == "python"]
    return [(each["name"], each["line"]) for each in document["shared"]["frames"]]


@pytest.mark.parametrize(
    ("ending", "name"),
    [(".json", "main"), (".svg", "main"), (".speedscope.json", "shop.main")],
)
def test_files_have_a_box_for_each_line_or_for_each_function(ending, name):
    """A function's box is where it begins, a line's box where the sample was."""
    for hide in ((), ("other",)):  # stacks that were changed have only names
        for group, lines in ((Group.FUNCTION, [3]), (Group.LINE, [4, 7])):
            shown = View(group=group, hide=hide).shown(Columns.of(two_lines_profile()))

            content = export.encode(shown.profile, f"p{ending}", (), by_line=shown.by_line)

            is_suffixed = group is Group.LINE and ending == ".speedscope.json"
            named = [(f"{name}:{line}" if is_suffixed else name, line) for line in lines]
            assert sorted(boxes_in(content, ending)) == named


def test_a_pprof_of_lines_has_these():
    shown = View(group=Group.LINE).shown(Columns.of(two_lines_profile()))

    read = pprof.decode(export.encode(shown.profile, "p.pb.gz", by_line=shown.by_line))

    assert sorted((place.function, place.line) for place in read.locations) == [
        ("main", 4), ("main", 7),
    ]  # fmt: skip


def test_boxes_of_a_drawing_name_the_module():
    """A box alone would not tell one `main` from another."""
    svg = ElementTree.fromstring(export.encode(shop_profile(), "p.svg"))

    texts = {each.text for each in svg.iter("{http://www.w3.org/2000/svg}text")}
    assert {"shop.pricing.<module>", "shop.pricing.main", "python3"} <= texts


@pytest.mark.parametrize(
    ("width", "shown"),
    [(18, "pkg.shop.Shop.main"), (17, "shop.Shop.main"), (13, "Shop.main"), (8, "Shop.ma…")],
)
def test_a_name_is_as_long_as_fits(width, shown):
    frame = Frame("Shop.main", "pkg.shop", Kind.PYTHON)

    assert fit_name(frame, width) == shown


def test_names_of_other_code_are_those_of_their_function():
    """A module's own code has its module in each name; a box of a module is named once."""
    assert Frame("<module>", "pkg.shop", Kind.PYTHON).names() == (
        "pkg.shop.<module>",
        "shop.<module>",
    )
    assert Frame("f", "libc.so.6", Kind.NATIVE, "f.c", 3).names(with_line=True) == ("f:3",)
    assert Frame("f", "[python]", Kind.PYTHON).names() == ("f",)
    assert Frame("pkg", "pkg", Kind.PYTHON).names() == ("pkg",)


def test_lines_of_a_speedscope_file_are_those_that_all_locations_agree_on():
    """Two functions of one name in a file have none."""
    here, there = (NamedLocation("f", "m", Kind.PYTHON, "m.py", first, 9) for first in (1, 5))
    profile = build([({}, [here], 1), ({}, [there], 1)])

    document = orjson.loads(export.encode(profile, "p.speedscope.json"))

    assert [frame.get("line") for frame in document["shared"]["frames"]] == [None]


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        (Group.LINE, {("Shop.price", 27), ("Shop.key", 41), ("main", 75)}),
        (Group.FILE, {("/srv/shop/shop.py", 0), ("_fast.so", 0)}),
        (Group.MODULE, {("shop.pricing", 0), ("libc.so.6", 0), ("python3.11", 0)}),
    ],
)
def test_boxes_of_lines_files_and_modules_are_those_of_python_functions(group, expected):
    """Frames of the interpreter that are left out are in no group either."""
    profile = View().folded(Columns.of(shop_profile()))

    graph = flamegraph.build(profile, (), group)

    assert expected <= {(frame.function, frame.line) for frame in graph.frames}
    assert LOOP not in {frame.function for frame in graph.frames}
    assert int(graph.samples[0]) == shop_profile().total_samples


def test_a_file_of_a_view_has_the_stacks_that_the_view_shows():
    """Chosen by what is shown; the stacks in pprof are complete."""
    profile = Columns.of(shop_profile())
    view = View(focus=("Shop.key",))

    shown = view.shown(profile)

    chosen = pprof.decode(export.encode(shown.profile, "p.pb.gz"))
    assert chosen.total_samples == 8 + 4 + 6
    functions = Counter(chosen.frames(i)[0].function for i in range(len(chosen.locations)))
    assert functions[LOOP] > 0
    assert View(focus=(LOOP,)).shown(profile).profile.total_samples == 0
    native = View(focus=(LOOP,), python_native=True).shown(profile).profile
    assert native.total_samples > profile.total_samples // 2


def test_a_folded_file_is_read_as_it_was_written():
    """Python functions have their module in their name then."""
    read = read_bytes(export.encode(shop_profile(), "p.folded", by=())).profile

    rows = flamegraph.top_functions(Columns.of(read))
    table = {row.frame.function: row.self_samples for row in rows}
    assert table["shop.pricing.Shop.price"] == 35
