"""Folded text and drawings of two sides: both counts, what changed, hostile names harmless."""

import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
from hypothesis import given, settings

from profiler.comparison import comparison, report
from profiler.comparison.gate import DEFAULT_GATE, Gate, verdict_of
from profiler.comparison.verdict import NoiseSource
from profiler.flamegraph.differential import VERDICTS, Pair
from profiler.flamegraph.views import View
from profiler.formats import export, svg_diff
from profiler.formats.reading import read_bytes
from profiler.formats.svg_diff import COLOURS
from storage.columns import Columns
from storage.formats import folded
from tests.flamegraph.test_differential import COPY, MAIN, PARSE, SEND, drawn, pair_of, steady
from tests.formats.test_svg import NS, parse
from tests.support import profiles as some

CHANGED = steady(
    ([MAIN, PARSE], 1000, 3000),
    ([MAIN, COPY], 4000, 1000),
    ([MAIN, some.named("fresh")], 0, 1500),
    ([MAIN, some.named("former")], 1500, 0),
    ([MAIN, PARSE, some.named("shared")], 2000, 100),
    ([MAIN, SEND, some.named("shared")], 0, 1900),
)
HOSTILE = pair_of(some.hostile_profile(), some.hostile_profile(), runs=1)


def svg_of(pair) -> bytes:
    return svg_diff.draw(pair, drawn(pair, View(("comm",)), svg_diff.SCREEN))


def lines_of(content: bytes) -> dict[str, tuple[int, int]]:
    """Read three columns as flamegraph.pl does: the last two words of a line are counts."""
    found = {}
    for line in content.decode().splitlines():
        stack, before, after = line.rsplit(" ", 2)
        assert stack not in found
        found[stack] = (int(before), int(after))
    return found


@settings(max_examples=50)
@given(some.profiles(), some.profiles())
def test_folded_lines_hold_the_counts_of_both_files(before, after):
    """A line is one of either side's own file; what a side lacks is 0."""
    lines = lines_of(folded.encode_pair(Columns.of(before), Columns.of(after), ()))

    for i, profile in enumerate((before, after)):
        alone = dict(
            line.rsplit(" ", 1)
            for line in folded.encode(Columns.of(profile), ()).decode().splitlines()
        )
        assert {stack: counts[i] for stack, counts in lines.items() if stack in alone} == {
            stack: int(count) for stack, count in alone.items()
        }
        assert not any(counts[i] for stack, counts in lines.items() if stack not in alone)


def test_a_label_that_one_side_lacks_is_drawn_on_both():
    """Else no stack of one side would be one of the other's."""
    before = some.build([({"comm": "api"}, [MAIN], 3)])
    after = some.build([({}, [MAIN], 4), ({"comm": "api"}, [MAIN], 5)])
    unlabelled = some.build([({}, [MAIN], 4)])

    assert lines_of(folded.encode_pair(Columns.of(before), Columns.of(after))) == {
        "api;main": (3, 5),
        "[no comm];main": (0, 4),
    }
    assert lines_of(folded.encode_pair(Columns.of(before), Columns.of(unlabelled))) == {
        "api;main": (3, 0),
        "[no comm];main": (0, 4),
    }


def drawn_as(content: bytes) -> dict[str, set[str]]:
    """Return the classes in which boxes are drawn, by the first line of their tooltips."""
    found: dict[str, set[str]] = {}
    for group in parse(content).iter(f"{NS}g"):
        name = group.find(f"{NS}title").text.split("\n")[0]
        found.setdefault(name, set()).add(group.find(f"{NS}rect").get("class"))
    return found


def test_only_what_changed_is_drawn_in_colour():
    """Every change as the legend shows it; all else, ancestors too, as unchanged."""
    drawn_boxes = drawn_as(svg_of(CHANGED))

    expected = {"parse": "more", "copy": "less", "fresh": "new", "former": "gone"}
    expected |= {"shared": "moved", "main": "unchanged", "steady_3": "unchanged"}
    for name, verdict in expected.items():
        assert drawn_boxes[name] == {f"d{VERDICTS.index(verdict)}"}, name
    legend = parse(svg_of(pair_of(some.sample_profile(), some.sample_profile())))
    words = {text.text for text in legend.iter(f"{NS}text")}
    assert {"costs more", "costs less", "new", "gone", "other callers", "unchanged"} <= words


def test_a_tooltip_tells_both_costs_and_what_is_said_of_them():
    tooltips = [title.text for title in parse(svg_of(CHANGED)).iter(f"{NS}title")]

    (parse_box,) = (each for each in tooltips if each.startswith("parse\n"))
    assert "before" in parse_box
    assert "12,400 samples" in parse_box  # of four runs: 1,000 + 2,000 of `shared`, and 100 later
    assert parse_box.endswith("\nmore")


@pytest.mark.parametrize("pair", [CHANGED, HOSTILE])
def test_a_drawing_is_self_contained_and_has_no_scripts(pair):
    """No script, no handler, no reference but to its own hatches."""
    content = svg_of(pair)
    root = parse(content)

    tags = {element.tag.removeprefix(NS) for element in root.iter()}
    assert tags == {"svg", "title", "desc", "style", "defs", "pattern", "rect", "text", "g"}
    for element in root.iter():
        assert not any(name.lower().startswith("on") for name in element.attrib)
        assert not any("href" in name.lower() for name in element.attrib)
    style = next(root.iter(f"{NS}style")).text
    assert {part.split(")")[0] for part in style.split("url(")[1:]} == {"#new"}
    assert b"<!" not in content
    assert b"<?" not in content


@settings(max_examples=50)
@given(some.profiles(), some.profiles())
def test_any_two_profiles_give_well_formed_xml(before, after):
    try:
        pair = pair_of(before, after, runs=1)
    except ValueError:
        return  # a side without samples, or of another type
    root = ET.fromstring(svg_of(pair))

    assert root.get("aria-label")


def test_hostile_names_are_shown_as_they_are():
    tooltips = "\n".join(title.text for title in parse(svg_of(HOSTILE)).iter(f"{NS}title"))

    for name in ("<script>alert(1)</script>", r"\x1b[31mred", r"\u202e gnp.exe", "漢字 wide 🔥"):
        assert name in tooltips
    text = folded.encode_pair(HOSTILE.before, HOSTILE.after).decode()
    assert r"a\x3bb" in text
    assert len(lines_of(text.encode())) == len(some.HOSTILE_NAMES)


def test_what_is_no_time_is_not_shown_as_cores():
    """Folded text counts samples, and says nothing of how long it took."""
    counted = Columns.of(read_bytes(b"main;work 60\nmain 40\n").profile)
    pair = Pair(comparison.of_profiles([counted], [counted]), counted, counted)
    drawing = svg_of(pair).decode()

    assert "cores" not in drawing
    assert "before 60.0 %, 60, 60 samples\n" in drawing


def test_warnings_stand_in_the_drawing():
    found = replace(CHANGED.found, warnings=("left out, only on the after side: <web-3>",))
    texts = [text.text for text in parse(svg_of(replace(CHANGED, found=found))).iter(f"{NS}text")]

    assert "left out, only on the after side: <web-3>" in texts


@pytest.mark.parametrize("source", NoiseSource)
def test_a_drawing_says_by_what_it_was_judged(source):
    """Each source has words, in the reports as well."""
    found = replace(CHANGED.found, source=source, is_provisional=True)
    judged = replace(CHANGED, found=found)

    assert b", provisional<" in svg_of(judged)
    gate = Gate.parse(DEFAULT_GATE)
    assert "(provisional)" in report.as_text(found, verdict_of(found, gate), gate)


def luminance(colour: str) -> float:
    parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", COLOURS)
@pytest.mark.parametrize("verdict", [*VERDICTS, "rest"])
def test_text_on_every_colour_can_be_read(theme, verdict):
    """WCAG 2.2, 1.4.3: 4.5 to 1; on stripes too. An edge is no ground for text."""
    paint, text = COLOURS[theme][verdict], COLOURS[theme]["text"].fill
    grounds = [paint.fill, *([paint.mark] if verdict == "new" else [])]

    for ground in grounds:
        low, high = sorted((luminance(ground), luminance(text)))
        assert (high + 0.05) / (low + 0.05) >= 4.5


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_draws_it_without_a_complaint(browser, tmp_path, scheme):
    """Chromium follows the colour scheme, runs nothing and loads nothing; hatches are drawn."""
    (tmp_path / "d.svg").write_bytes(svg_of(CHANGED))
    requests: list[str] = []
    problems: list[str] = []
    with browser.new_page(color_scheme=scheme) as page:
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: problems.append(message.text))
        page.goto((tmp_path / "d.svg").as_uri())
        fills = {
            verdict: page.evaluate(
                f"getComputedStyle(document.querySelector('g>.d{VERDICTS.index(verdict)}')).fill"
            )
            for verdict in ("more", "less", "new")
        }

    assert not problems
    assert len(requests) == 1
    for verdict in ("more", "less"):
        rgb = [int(COLOURS[scheme][verdict].fill[i : i + 2], 16) for i in (1, 3, 5)]
        assert fills[verdict] == f"rgb({rgb[0]}, {rgb[1]}, {rgb[2]})"
    assert fills["new"].startswith("url(")


@pytest.mark.parametrize("file", ["x.pb.gz", "x.txt", "x"])
def test_an_ending_that_holds_no_two_sides_is_refused(file):
    with pytest.raises(export.ExportError, match=r"\.speedscope\.json"):
        export.pair_ending(file)
