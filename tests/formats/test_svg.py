"""SVG: well-formed, self-contained, complete, hostile names harmless, seen in a real browser."""

import itertools
import re
import xml.etree.ElementTree as ET
from collections import defaultdict

import pytest
from hypothesis import given

from profiler.flamegraph import flamegraph
from profiler.formats import svg
from storage.columns import Columns
from storage.profile import Accounting, Host
from tests.support import profiles as some

NS = "{http://www.w3.org/2000/svg}"


def parse(content: bytes) -> ET.Element:
    return ET.fromstring(content)


def boxes(root: ET.Element) -> list[tuple[str, float, float, float]]:
    """Return (tooltip, x, y, width) of each box."""
    found = []
    for group in root.iter(f"{NS}g"):
        rect = group.find(f"{NS}rect")
        x, y, width = (float(rect.get(name)) for name in ("x", "y", "width"))
        found.append((group.find(f"{NS}title").text, x, y, width))
    return found


def test_every_node_is_a_box_with_its_counts_as_tooltip():
    """Full name, module, kind, file, share, time, samples and self stand in the tooltip."""
    root = parse(svg.draw(Columns.of(some.sample_profile())))

    graph = flamegraph.build(Columns.of(some.sample_profile()), ("comm",))
    tooltips = [tooltip for tooltip, *_ in boxes(root)]
    assert len(tooltips) == len(graph)
    assert tooltips[0].startswith("all\n")
    expected = "work\napi (native) api.c\n50.0 %, 80.8 ms, 8 samples, self 0 s"
    assert expected in tooltips


def test_boxes_lie_within_their_parents():
    """Each row's boxes do not overlap and none leaves the drawing."""
    root = parse(svg.draw(Columns.of(some.synthetic(300, 20))))

    rows = defaultdict(list)
    for tooltip, x, y, width in boxes(root):
        rows[y].append((x, x + width, tooltip))
        assert x >= 16
        assert x + width <= 1200 - 16 + 1
    assert len(rows) > 10
    for row in rows.values():
        ordered = sorted(row)
        for (_, end, _), (start, _, _) in itertools.pairwise(ordered):
            assert end <= start + 1  # a box is drawn at least a pixel wide


@pytest.mark.parametrize("profile", [some.hostile_profile(), some.sample_profile()])
def test_a_drawing_is_self_contained_and_has_no_scripts(profile):
    """No script, no handler, no reference to anything: it is safe to open and to send around."""
    content = svg.draw(Columns.of(profile))
    root = parse(content)

    tags = {element.tag.removeprefix(NS) for element in root.iter()}
    assert tags <= {"svg", "title", "desc", "style", "rect", "text", "g"}
    for element in root.iter():
        assert not any(name.lower().startswith("on") for name in element.attrib)
        assert not any("href" in name.lower() for name in element.attrib)
    style = next(root.iter(f"{NS}style")).text
    assert not re.search(r"url|import|expression|@font-face", style)
    assert b"<!" not in content
    assert b"<?" not in content


@given(some.profiles())
def test_any_profile_gives_well_formed_xml(profile):
    """Whatever the names, labels and counts are, a parser reads it."""
    root = parse(svg.draw(Columns.of(profile)))

    assert root.get("role") == "img"
    assert root.get("aria-label")


def test_hostile_names_are_shown_as_they_are():
    """Names are text: the tooltip holds every one of them unchanged."""
    tooltips = "\n".join(
        tooltip for tooltip, *_ in boxes(parse(svg.draw(Columns.of(some.hostile_profile()))))
    )

    for name in ("<script>alert(1)</script>", r"\x1b[31mred", r"\u202e gnp.exe", "漢字 wide 🔥"):
        assert name in tooltips


def texts(profile) -> str:
    return "\n".join(
        element.text or "" for element in parse(svg.draw(Columns.of(profile))).iter(f"{NS}text")
    )


def test_the_header_says_what_when_where_and_how_complete():
    """Host, window, total, samples, cores used and lost samples can be read off."""
    shown = texts(some.sample_profile())

    assert "CPU time on web-1" in shown
    assert "2026-05-28 20:26:40 to 20:27:40 UTC (60.0 s), 99 samples a second" in shown
    for figure in ("162 ms\nin total", "16\nsamples", "0.00 of 2\ncores used", "2\nsamples lost"):
        assert figure in shown


def test_a_profile_of_several_hosts_says_how_many():
    """A fleet has no single name and no single number of CPUs."""
    hosts = tuple(Host(f"web-{i}", f"{i:016x}") for i in range(3))
    accounting = Accounting(hosts=hosts, cpus=8, ticks=1, stored=1)

    shown = texts(some.build([({}, [some.MAIN], 1)], accounting=accounting))

    assert "CPU time on 3 hosts" in shown
    assert " of 8" not in shown


def test_what_is_too_narrow_is_counted_in_the_footer():
    """Nothing disappears without a word."""
    shown = texts(some.synthetic(5000, 20))

    assert re.search(r"[\d,]+ boxes under half a pixel are drawn as grey sums, [\d.]+ %", shown)


def test_text_is_cut_to_its_box():
    """No label is longer than its box is wide."""
    root = parse(svg.draw(Columns.of(some.hostile_profile())))

    for group in root.iter(f"{NS}g"):
        rect, text = group.find(f"{NS}rect"), group.find(f"{NS}text")
        if text is not None and text.text and text.text.isascii():
            assert 6.02 * len(text.text) <= float(rect.get("width"))


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_draws_it_without_a_complaint(browser, tmp_path, scheme):
    """Chromium parses it, follows the colour scheme, runs nothing and loads nothing."""
    file = tmp_path / "p.svg"
    file.write_bytes(svg.draw(Columns.of(some.hostile_profile())))
    with browser.new_page(color_scheme=scheme) as page:
        problems, requests = [], []
        page.on("console", lambda message: problems.append(message.text))
        page.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(file.as_uri())
        background = page.evaluate("getComputedStyle(document.querySelector('.p')).fill")
        overflowing = page.evaluate(
            """[...document.querySelectorAll('g')].filter(g => g.querySelector('text') &&
               g.querySelector('text').getComputedTextLength() >
               g.querySelector('rect').getBBox().width).length"""
        )

    assert requests == [file.as_uri()]
    assert not problems
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 28)"}[scheme]
    assert overflowing == 0
