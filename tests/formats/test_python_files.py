"""Files of Python programs: pprof has everything, all others what a person wants to see."""

from collections import Counter

import orjson
import pytest

from profiler.flamegraph import flamegraph
from profiler.flamegraph.stacks import Group
from profiler.flamegraph.views import View
from profiler.formats import export
from profiler.formats.reading import read_bytes
from storage.columns import Columns
from storage.formats import pprof, pprof_arrays
from storage.hashing import process_hasher
from symbolizer.location import Kind, NamedLocation
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
        (Group.LINE, "shop.pricing.main;shop.pricing.Shop.price;PyDict_GetItem 12"),
        (Group.FILE, "python3.11;/srv/shop/shop.py;python3.11 20"),
        (Group.MODULE, "python3.11;shop.pricing;python3.11 20"),
    ],
)
def test_folded_text_of_other_boxes_names_these(group, line):
    """A module is not named twice."""
    shown = View(group=group).shown(Columns.of(shop_profile()))

    lines = export.encode(shown.profile, "p.folded").decode().splitlines()

    assert any(each.endswith(line) for each in lines), lines


def test_speedscope_has_the_file_and_the_first_line_of_python_functions():
    """Its viewer shows both; one function stays one frame, whatever its lines."""
    stacks = [((LOOP, f"py:{name}"), 1) for name in LINES]
    document = orjson.loads(export.encode(profile_of(stacks), "p.speedscope.json"))

    frames = {frame["name"]: frame for frame in document["shared"]["frames"]}

    for name, (first, _) in LINES.items():
        assert (frames[name]["file"], frames[name]["line"]) == ("/srv/shop/shop.py", first)


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
