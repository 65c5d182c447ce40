"""The page that compares: two selections over one graph, by mouse and by keyboard alone."""

import base64
import dataclasses
import json
import re
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Locator, expect

from storage.profile import Profile
from tests.support import profiles as some
from tests.support.browser import (
    NARROW,
    ROW_PX,
    Service,
    View,
    barriers,
    changes,
    outside,
    serving,
    unseen_in,
    walk_focus,
)
from tests.support.stores import START_NS, at, directory

pytestmark = pytest.mark.browser

NEW_AT, MINUTES = 186, 200
"""The minute from which on api is another version, and where the data end."""
HOSTILE = '<img src=x onerror="window.hacked = 1">\u202e'
SHOWN_HOSTILE = '<img src=x onerror="window.hacked = 1">\\u202e'
UNCHANGED = [f"step_{i:02}" for i in range(20)]
API = '{service="api"}'
ORANGE, BLUE, GREY = (245, 160, 76), (127, 178, 240), (227, 230, 234)
"""What costs more, less and as much as before, in light colours."""


def stacks_of(service: str, is_new: bool) -> dict[tuple[str, ...], float]:
    """Return stacks and their samples a minute."""
    stacks = {("main", "serve", name): 900 / (i + 2) for i, name in enumerate(UNCHANGED)}
    grown, shrunk = (1.6, 0.5) if is_new else (1.0, 1.0)
    stacks["main", "serve", "parse"] = 600 * grown
    stacks["main", "retry", "parse"] = 200 * grown
    stacks["main", "serve", "pack"] = 500 * shrunk
    here, there = ("retry", "serve") if is_new else ("serve", "retry")
    stacks["main", here, "shift"] = 400
    stacks["main", there, "shift"] = 100
    if service == "api":
        stacks["main", "serve", HOSTILE if is_new else "legacy"] = 200
    return stacks


def minute(rng: np.random.Generator, number: int, host: int, services: dict[str, str]) -> Profile:
    """Return a minute of services and their versions on a host; functions vary by 3 %."""
    rows = []
    for service, version in services.items():
        labels = {"service": service, "version": version, "comm": service}
        found = stacks_of(service, version == "2.0")
        variation = {name: rng.normal(0, 0.03) for *_, name in found}
        for stack, rate in found.items():
            samples = int(rng.poisson(rate * np.exp(variation[stack[-1]])))
            rows.append((labels, [some.named(name) for name in stack], samples))
    profile = some.build([row for row in rows if row[2]])
    present = {
        some.make_labels({"service": service, "version": version}): 60_000_000_000
        for service, version in services.items()
    }
    accounting = dataclasses.replace(profile.accounting, services=present)
    profile = dataclasses.replace(profile, accounting=accounting)
    return at(profile, number, f"web-{host}", f"{host:016x}")


def fill(folder: Path) -> None:
    """Two hosts with a service that changes, one that stays, and one that a third host joins."""
    rng = np.random.default_rng(11)
    found = []
    for number in range(MINUTES):
        services = {"api": "2.0" if number >= NEW_AT else "1.0", "calm": "5"}
        services["fresh"] = "8" if number >= MINUTES - 3 else "7"
        found += [minute(rng, number, host, services | {"joined": "1"}) for host in range(2)]
        if number >= NEW_AT:
            found.append(minute(rng, number, 2, {"joined": "1", "young": "1"}))
    directory(folder, *found)


@pytest.fixture(scope="module")
def service(tmp_path_factory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("compared")
    fill(folder / "store")
    with serving(folder / "store", folder) as service:
        yield service


def ms(number: int) -> int:
    """Return a minute after the deployment."""
    return START_NS // 1_000_000 + (NEW_AT + number) * 60_000


def window(first: int, last: int, prefix: str = "") -> dict[str, str]:
    return {f"{prefix}from": f"{ms(first)}", f"{prefix}until": f"{ms(last)}"}


AROUND = window(-30, MINUTES - NEW_AT)
AFTER, BEFORE = window(2, 6), window(-4, 0, "before_")
MOVED = {
    "q": '{service="joined",host="web-2"}',
    "before_query": '{service="joined",host="web-0"}',
}
"""No host is on both sides."""


def address(service: Service, **parameters: str) -> str:
    return f"{service.url}/?{urllib.parse.urlencode(parameters)}"


def compared(service: Service, q: str = API, **more: str) -> str:
    """Return the address of a comparison of four minutes of both versions."""
    return address(service, mode="compare", q=q, **(AFTER | BEFORE | more))


class Hand:
    """Uses the page with the pointer, or with keys from wherever the focus is."""

    def __init__(self, view: View, has_pointer: bool) -> None:
        self.view, self.has_pointer = view, has_pointer

    def press(self, target: Locator) -> None:
        if self.has_pointer:
            target.click()
        else:
            self.view.tab_to(target)
            self.view.page.keyboard.press("Enter")
        self.view.settle()

    def switch(self, group: str, value: str) -> None:
        page = self.view.page
        if self.has_pointer:
            page.locator(f"{group} label", has=page.locator(f"[value='{value}']")).click()
        else:
            self.view.tab_to(f"{group} input:checked")
            while not page.locator(f"{group} [value='{value}']").is_checked():
                page.keyboard.press("ArrowRight")
        self.view.settle()

    def choose_row(self, name: str) -> None:
        if self.has_pointer:
            self.press(row(self.view, name))
            return
        number = row(self.view, name).evaluate("(it) => it.closest('tr').sectionRowIndex")
        self.view.tab_to("#pane-changes .row-name[tabindex='0']")
        self.view.press("Home", *["ArrowDown"] * number, "Enter")


@pytest.fixture(params=[True, False], ids=["mouse", "keyboard"])
def hand_of(request) -> Callable[[View], Hand]:
    return lambda view: Hand(view, request.param)


def row(view: View, name: str) -> Locator:
    return view.page.locator("#pane-changes").get_by_role("button", name=name, exact=True)


def rows(view: View) -> dict[str, str]:
    """Return the list of changes: by function what is said of it."""
    found = view.page.locator("#pane-changes tbody tr:has(.row-name)").all()
    return {
        each.locator(".row-name").inner_text(): each.locator(".verdict-cell span").inner_text()
        for each in found
    }


def headline(view: View) -> Locator:
    return view.page.locator("#verdict .headline span")


REGRESSION = re.compile(r"^Regression: .+ and 1 more; service [+\u2212±]\d+(\.\d)? % CPU$")
CHANGED = {"parse": "more", "pack": "less", SHOWN_HOSTILE: "new", "legacy": "gone"}
LISTED = CHANGED | {"shift": "moved"}


def test_one_click_compares_with_the_preceding_window(hand_of, visit, service):
    view = visit(address(service, q=API, **window(0, 4)))
    hand, page = hand_of(view), view.page
    alone = view.seen()
    expect(page.locator("#comparison")).to_be_hidden()

    hand.press(page.locator("#compare-button"))

    assert view.parameters()["mode"] == "compare"
    expect(headline(view)).to_have_text(REGRESSION)
    expect(page.locator("#before-menu .range-name")).to_contain_text("Right before: 2026-")
    expect(page.locator("#before-facts")).to_contain_text("version 1.0 · 2 hosts")
    expect(page.locator("#after-facts")).to_contain_text("version 2.0 · 2 hosts")
    expect(page.locator("#compare-button")).to_have_attribute("aria-pressed", "true")
    expect(page).to_have_title(re.compile("^Compare api"))
    assert LISTED.items() <= rows(view).items()
    view.back()
    assert changes(alone, view.seen()) == []

    view.press("d")
    expect(page.locator("#comparison")).to_be_visible()
    hand.press(page.locator("#compare-end"))
    expect(page.locator("#comparison")).to_be_hidden()
    expect(page.locator("#compare-button")).to_be_focused()
    assert "mode" not in view.parameters()


def test_the_before_side_can_be_selected(hand_of, visit, service):
    """The same time yesterday, any two times, another selector, and the other way round."""
    view = visit(compared(service))
    hand, page = hand_of(view), view.page
    menu = page.locator("#before-menu")

    hand.press(page.locator("#swap"))
    expect(headline(view)).to_have_text(REGRESSION)
    expected = {"parse": "less", "pack": "more", SHOWN_HOSTILE: "gone", "legacy": "new"}
    assert expected.items() <= rows(view).items()
    assert view.parameters()["from"] == BEFORE["before_from"]
    view.back()

    view.expect("status of 404")
    hand.press(menu.locator("button").first)
    hand.press(menu.get_by_role("button", name="Same time yesterday"))
    assert view.parameters()["before_from"] == "-1d"
    expect(page.locator("#state h3")).to_have_text("The before side is empty")
    hand.press(page.locator("#state").get_by_role("button", name=re.compile("^20")).first)
    assert view.state() == "ready"
    view.back()
    view.back()

    page.locator("#before-input").fill('{service="calm"}')
    page.keyboard.press("Enter")
    view.settle()
    assert view.parameters()["before_query"] == '{service="calm"}'
    expect(page.locator("#before-facts")).to_contain_text("version 5")
    page.locator("#before-input").fill(API)
    page.keyboard.press("Enter")
    view.settle()
    assert "before_query" not in view.parameters()


def test_a_part_of_the_timeline_becomes_a_side(visit, service):
    """A drag, or steps selected by keys, sets the selected side; both stay visible."""
    view = visit(compared(service, q=API))
    page = view.page
    names = page.locator("#timeline .chosen-name")
    expect(names).to_have_text(["before", "after"])
    edges = "(all) => all.map((each) => getComputedStyle(each).strokeDasharray)"
    assert page.locator("#timeline .chosen").evaluate_all(edges) == ["5px, 4px", "none"]

    for side, prefix in (("before", "before_"), ("after", "")):
        page.locator("#target label", has_text=side).click()
        before = view.parameters()
        place = page.locator("#timeline .chart").bounding_box()
        y = place["y"] + 60
        page.mouse.move(place["x"] + 200, y)
        page.mouse.down()
        page.mouse.move(place["x"] + 400, y, steps=3)
        page.mouse.up()
        view.settle()
        now = view.parameters()
        changed = {name for name in now if now[name] != before.get(name)} - {"over"}
        assert changed
        assert changed <= {f"{prefix}from", f"{prefix}until"}
    view.press("t", "Home", "Shift+ArrowRight", "Enter")
    assert view.parameters()["from"] != now["from"]


def pixels(view: View) -> Callable[[float, float], tuple[int, ...]]:
    """Return what reads the canvas: the colour at a place in CSS pixels."""
    view.settle()
    found = view.page.evaluate("""() => {
      const canvas = document.querySelector("#graph canvas");
      const ratio = canvas.width / parseFloat(canvas.style.width);
      const {data, width} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
      let text = "";  // bytes as letters: an array of as many numbers takes 20 times as long
      for (let i = 0; i < data.length; i += 4096) {
        text += String.fromCharCode(...data.subarray(i, i + 4096));
      }
      return {text: btoa(text), width, ratio};
    }""")
    colours = base64.b64decode(found["text"])

    def at_place(x: float, y: float) -> tuple[int, ...]:
        start = 4 * (int(y * found["ratio"]) * found["width"] + int(x * found["ratio"]))
        return tuple(colours[start : start + 3])

    return at_place


@dataclasses.dataclass(frozen=True)
class Compared:
    """A box of the union graph, from `left` to `right` of a width of 1."""

    name: str
    verdict: str
    depth: int
    left: float
    right: float


def boxes_of(service: Service, side: str) -> list[Compared]:
    """Return the boxes that the page should draw of a side; empty for the union."""
    response = json.loads(
        service.get("/api/v1/diff", query=API, by="service", **AFTER, **BEFORE, width="1000")
    )
    scale, nodes = response["scale"], response["nodes"]
    weights = {"before": (1, 0), "after": (0, 1), "": (0.5, 0.5)}[side]
    found, ends = [], [0.0] * 100
    columns = (nodes[name] for name in ("frame", "depth", "before", "after", "verdict"))
    for frame, depth, before, after, verdict in zip(*columns, strict=True):
        size = weights[0] * before * scale["before"] + weights[1] * after * scale["after"]
        start = ends[depth]
        ends[depth], ends[depth + 1] = start + size, start
        name, said = response["frames"][frame][0], response["verdicts"][verdict]
        found.append(Compared(name, said, depth, start, start + size))
    whole = found[0].right
    return [
        dataclasses.replace(each, left=each.left / whole, right=each.right / whole)
        for each in found
    ]


@pytest.mark.parametrize("side", ["", "before", "after"])
def test_only_changes_have_a_colour(visit, service, side):
    """Each box is as wide as its side says, and coloured as the one test per function decided."""
    view = visit(compared(service, side=side, tab="graph"))
    colour_at = pixels(view)
    width = view.canvas.bounding_box()["width"]
    wide = [each for each in boxes_of(service, side) if (each.right - each.left) * width > 8]
    assert {each.verdict for each in wide} >= {"unchanged", "more", "less"}
    for box in wide:
        top = box.depth * ROW_PX
        inside = {
            colour_at(box.left * width + 4 + step / 2, top + 2.5)
            for step in range(int(2 * ((box.right - box.left) * width - 8)))
        }
        if box.verdict in {"more", "less", "unchanged"}:
            expected = {"more": ORANGE, "less": BLUE, "unchanged": GREY}[box.verdict]
            assert inside == {expected}, box
        elif box.verdict == "new":  # hatched
            assert len(inside) > 1, box
        else:  # dotted below, or dashed all around: the edge has gaps
            edge_px = {"moved": 17.5, "gone": 0.5}[box.verdict]
            edge = [
                colour_at(box.left * width + 2 + step, top + edge_px)
                for step in range(int((box.right - box.left) * width - 4))
            ]
            assert len(set(edge)) > 1, box
            assert box.verdict == "gone" or GREY in inside
    drawn = {each.name for each in wide}
    assert ("legacy" in drawn) == (side != "after")
    assert (HOSTILE.replace("\u202e", "\\u202e") in drawn) == (side != "before")


def test_view_options_are_in_the_address(hand_of, visit, service):
    """Widths, direction, zoom, a row, a search: each is in the address, and steps are undone."""
    view = visit(compared(service))
    hand, page = hand_of(view), view.page
    seen = []

    for act in (
        lambda: hand.switch("#side", "after"),
        lambda: hand.switch("#view", "flame"),
        lambda: hand.press(page.locator("#changes-all")) if hand.has_pointer else toggle(view),
    ):
        seen.append(view.seen())
        act()
        assert view.seen()["canvas"] != seen[-1]["canvas"] or "changes" in view.parameters()
    assert {"side", "view", "changes"} <= set(view.parameters())
    assert set(UNCHANGED) <= set(rows(view))
    again = visit(page.url)
    assert changes(view.seen(), again.seen()) == []
    for before in reversed(seen):
        for _ in range(3):  # by keys a choice is reached through others
            if [page.evaluate("location.search")] != before["address"]:
                view.back()
        assert changes(before, view.seen()) == []
    for key, side in (("b", "before"), ("a", "after"), ("u", "")):
        page.evaluate("document.activeElement.blur()")
        view.press(key)
        assert view.parameters().get("side", "") == side


def toggle(view: View) -> None:
    view.tab_to("#changes-all")
    view.press("Space")


def test_selecting_a_change_highlights_its_boxes(hand_of, visit, service):
    """The panel shows growth with its interval, both sides and the reason; the row is marked."""
    view = visit(compared(service))
    hand, page = hand_of(view), view.page
    panel = page.locator("#panel")
    canvas = view.seen()["canvas"]

    hand.choose_row("parse")

    expect(panel.get_by_role("heading")).to_have_text("parse")
    expect(panel).to_contain_text(re.compile(r"↑ more \(fails the gate\)"))
    expect(panel).to_contain_text(re.compile(r"\+\d\d % \(\+\d\d % to \+\d\d %\)"))
    expect(panel).to_contain_text(re.compile(r"Before\s*\d+\.\d % · 0\.\d+ cores per host"))
    expect(panel).to_contain_text(re.compile(r"normal variation ±\d+ %; very certain; q <0.001"))
    expect(page.locator("#pane-changes tr.marked .row-name")).to_have_text("parse")
    assert view.seen()["canvas"] != canvas
    if hand.has_pointer:
        page.mouse.move(5, 5)
    lit = pixels(view)
    size = view.canvas.bounding_box()["width"]
    boxes = [each for each in boxes_of(service, "") if each.depth == 4]
    found = {
        each.name: lit((each.left + each.right) / 2 * size, 4 * ROW_PX + 2.5) for each in boxes
    }
    assert found["parse"] == ORANGE
    assert found["pack"] != BLUE

    assert view.parameters()["row"].startswith("parse\n")
    assert changes(view.seen(), visit(page.url).seen()) == []


def test_a_box_shows_both_sides_and_its_main_cause(visit, service):
    """In its tooltip, for screen readers, and in the panel with a button that leads there."""
    view = visit(compared(service, tab="graph"))
    page, width = view.page, view.canvas.bounding_box()["width"]
    boxes = {each.name: each for each in boxes_of(service, "")}
    tooltip = page.locator(".flame-tooltip")

    def place(name: str) -> dict[str, float]:
        box = boxes[name]
        return {"x": (box.left + box.right) / 2 * width, "y": (box.depth + 0.5) * ROW_PX}

    view.canvas.hover(position=place("pack"))
    expect(tooltip).to_contain_text(re.compile(r"Before.*cores per host.*After.*cores per host"))
    expect(tooltip).to_contain_text(re.compile(r"↓ less.*Growth\W\d\d %\W\d\d % to \W\d\d %"))
    view.canvas.hover(position=place("serve"))
    expect(tooltip).to_contain_text("Mostly due to shift")

    view.press("g", "Home")
    view.press("ArrowDown", "ArrowDown", "ArrowDown", "ArrowDown", "ArrowDown")
    expect(page.locator(".flame-live")).to_have_text(re.compile(r"^parse, more, \d+\.\d % of CPU"))

    view.canvas.click(position=place("serve"))
    view.settle()
    panel = page.locator("#panel")
    expect(panel).to_contain_text("unchanged, mostly due to shift")
    expect(page.locator("#crumbs")).to_contain_text("serve")
    Hand(view, has_pointer=True).press(panel.get_by_role("button", name="Show shift"))
    expect(panel.get_by_role("heading")).to_have_text("shift")


def test_search_and_filter_are_in_the_address(visit, service):
    view = visit(compared(service))
    page = view.page
    page.locator("#search").fill("parse")
    expect(page.locator("#found")).to_have_text("2 boxes")
    page.locator("#changes-filter").fill("pack")
    view.wait(lambda: view.parameters().get("filter") == "pack")
    assert rows(view) == {"pack": "less"}
    assert view.parameters()["search"] == "parse"
    page.locator("#changes-filter").fill("nothing like it")
    expect(page.locator("#pane-changes tbody")).to_have_text(
        "No function matches “nothing like it”"
    )


def test_a_copied_link_keeps_the_times_of_both_sides(visit, service):
    view = visit(address(service, mode="compare", q=API, **AFTER))
    page = view.page
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    shown = view.seen()

    view.press("c")

    expect(page.locator("#toast")).to_contain_text("Copied a link")
    link = page.evaluate("navigator.clipboard.readText()")
    assert f"before_from={ms(-2)}" in link
    other = visit(link).seen()
    for part in ("chart", "canvas"):
        assert other[part] == shown[part]


def test_an_unchanged_service_has_no_change(visit, service):
    view = visit(compared(service, q='{service="calm"}'))
    page = view.page
    expect(headline(view)).to_have_text(
        re.compile(r"^No certain change; service [+\u2212±]\d\.\d % CPU$")
    )
    expect(page.locator("#verdict")).to_contain_text("earlier pairs of windows of the same length")
    expect(page.locator("#verdict")).to_contain_text(
        re.compile(r"Load change[+\u2212±]\d.*not certain\); subtracted from each function")
    )
    assert page.locator("#verdict").get_attribute("data-verdict") == "unchanged"
    assert set(rows(view).values()) == {"uncertain"}

    page.locator("#changes-all").check()
    view.settle()
    assert set(rows(view).values()) == {"uncertain", "unchanged"}
    expect(sections(view)).to_have_text([UNCERTAIN, "Other functions"])
    expect(page.locator("#pane-changes tbody")).to_contain_text("normal variation ±")


UNCERTAIN = "Largest differences, not certain yet"


def sections(view: View) -> Locator:
    """Return the headings of the list of changes."""
    return view.page.locator("#pane-changes tr.section")


def test_the_largest_differences_are_listed_below_the_findings(hand_of, visit, service):
    """Hollow, in no colour of a finding, each with what it takes; the panel says so as well."""
    view = visit(compared(service))
    hand, page = hand_of(view), view.page
    expect(sections(view)).to_have_text([UNCERTAIN])
    listed = list(rows(view).items())
    findings = [name for name, said in listed if said != "uncertain"]
    assert set(findings) == set(LISTED)
    names = [name for name, _ in listed]
    assert names[: len(findings)] == findings
    assert 1 <= len(names) - len(findings) <= 5

    marks = page.locator("#pane-changes .change.uncertain")
    expect(marks).to_have_text(["?"] * (len(names) - len(findings)))
    fill = "(all) => all.map((each) => getComputedStyle(each).backgroundColor)"
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert set(marks.evaluate_all(fill)) == {"rgba(0, 0, 0, 0)"}
    reasons = page.locator("#pane-changes tr:has(.uncertain) td.name > small")
    for reason in reasons.all_inner_texts():
        assert re.match(r"would be certain at ±\d+ %; needs |within the normal variation", reason)

    open_one = names[len(findings)]
    if hand.has_pointer:
        hand.choose_row(open_one)
    else:
        hand.view.tab_to("#pane-changes .row-name[tabindex='0']")
        hand.view.press("Home", *["ArrowDown"] * len(findings), "Enter")
    panel = page.locator("#panel")
    expect(panel.get_by_role("heading")).to_have_text(open_one)
    expect(panel).to_contain_text("Not certain yet")
    expect(page.locator("#pane-changes tr.marked .row-name")).to_have_text(open_one)


def test_a_function_that_grew_is_first_though_nothing_is_certain(visit, service):
    """The service moved to another host, so nothing tells how it varies."""
    view = visit(compared(service, **MOVED))
    page = view.page
    expect(headline(view)).to_have_text(
        re.compile(
            r"^Too little data for a verdict; largest difference: \S+ [+\u2212]\d+(\.\d)? %,"
            r" not certain yet; service [+\u2212±]\d+(\.\d)? % CPU$"
        )
    )
    expect(sections(view)).to_have_text([UNCERTAIN])
    first = page.locator("#pane-changes tbody tr:has(.row-name)").first
    assert first.locator(".row-name").inner_text() in headline(view).inner_text()
    expect(first).to_contain_text("history")
    assert "No function changed" not in page.locator("#pane-changes").inner_text()


def test_too_little_data_offers_next_steps(hand_of, visit, service):
    view = visit(compared(service, **MOVED))
    hand, page = hand_of(view), view.page
    verdict = page.locator("#verdict")
    expect(headline(view)).to_have_text(re.compile("^Too little data for a verdict"))
    expect(verdict).to_contain_text("unknown: there are no data")
    expect(verdict.get_by_role("list", name="Warnings")).to_contain_text("it takes 3 on each side")
    colour_at = pixels(view)
    assert colour_at(6, ROW_PX + 2.5) == GREY

    before = view.parameters()
    hand.press(verdict.get_by_role("button", name="Compare windows half as long"))
    now = view.parameters()
    length = lambda of: int(of["until"]) - int(of["from"])  # noqa: E731
    assert length(now) * 2 == length(before)
    view.back()
    hand.press(verdict.get_by_role("button", name="Show all functions"))
    assert set(rows(view).values()) == {"too little data", "uncertain"}


def test_hosts_on_one_side_only_are_named(visit, service):
    view = visit(compared(service, q='{service="joined"}'))
    warnings = view.page.get_by_role("list", name="Warnings")
    expect(warnings).to_contain_text(re.compile("only on the after side: web-2"))


def test_an_empty_side_offers_alternatives(hand_of, visit, service):
    """An unknown version, a time without data: named with the side."""
    view = visit(service.url)
    view.expect("status of 404")
    hand, page, state = hand_of(view), view.page, view.page.locator("#state")

    page.goto(compared(service, before_query='{service="api",version="0.9"}'))
    expect(state).to_contain_text("The before side is empty")
    expect(state).to_contain_text("Available versions")
    expect(page.locator("#verdict .headline")).to_have_text("No verdict")
    hand.press(state.get_by_role("button", name="1.0", exact=True))
    assert view.state() == "ready"
    assert view.parameters()["before_query"] == '{service="api",version="1.0"}'

    page.goto(compared(service, q='{service="api",version="9"}', before_query=API))
    expect(state).to_contain_text("The after side is empty")
    hand.press(state.get_by_role("button", name="2.0", exact=True))
    assert view.state() == "ready"
    assert view.parameters()["q"] == '{service="api",version="2.0"}'
    assert view.parameters()["before_query"] == API

    page.goto(compared(service, before_from="1700000000000", before_until="1700000240000"))
    expect(state).to_contain_text("The nearest data")
    hand.press(state.get_by_role("button", name=re.compile("^20")).first)
    assert view.state() == "ready"
    view.back()
    hand.press(state.get_by_role("button", name="End the comparison"))
    assert "mode" not in view.parameters()


def test_a_selector_that_cannot_be_read_is_an_error_with_a_way_out(visit, service):
    view = visit(service.url)
    view.expect("status of 400")
    view.page.goto(compared(service, q="{service="))
    assert view.state() == "error"
    view.button("Clear the selector", "#state").click()
    assert view.state() == "ready"


def test_downloads_hold_both_sides(visit, service):
    view = visit(compared(service))
    links = view.page.locator("#downloads a").all()
    endings = [each.get_attribute("download").partition(".")[2] for each in links]
    assert endings == ["speedscope.json", "folded", "svg", "json"]
    for link in links:
        query = urllib.parse.urlsplit(link.get_attribute("href")).query
        asked = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
        assert asked["before_query"] == API
        assert {name: asked[name] for name in BEFORE} == BEFORE
        response = view.page.request.get(
            urllib.parse.urljoin(view.page.url, link.get_attribute("href"))
        )
        assert response.status == 200, response.text()


def test_hostile_names_are_only_names(visit, service):
    view = visit(compared(service, changes="all", filter="img"))
    page = view.page
    row(view, SHOWN_HOSTILE).click()
    view.settle()
    expect(page.locator("#panel h3")).to_have_text(SHOWN_HOSTILE)
    page.locator("#deployments-menu button").first.click()
    assert unseen_in(view) == []
    assert page.evaluate("[window.hacked, document.images.length]") == [None, 0]
    for query in ("mode=compare&side=%3Cimg%3E&before_query=%3Cimg%20src%3Dx%3E", "mode=x&side=y"):
        view.expect("status of 400")
        page.goto(f"{service.url}/?{query}&{urllib.parse.urlencode(AFTER)}")
        assert view.state() in {"ready", "empty", "error"}
        assert page.evaluate("[window.hacked, document.images.length]") == [None, 0]


def test_the_page_is_accessible(visit, service):
    """axe-core finds nothing serious in any state, open menu or size, nor in the dark."""
    view = visit(compared(service))
    view.expect("status of 404")
    page = view.page
    assert barriers(view) == []
    row(view, "parse").click()
    assert barriers(view) == []
    page.emulate_media(color_scheme="dark")
    assert barriers(view) == []
    page.emulate_media(color_scheme="light")
    for opener in ("#before-menu button", "#deployments-menu button", "#download-menu button"):
        page.locator(opener).first.click()
        assert barriers(view) == []
        page.keyboard.press("Escape")
    for where in (
        compared(service, **MOVED),
        compared(service, q='{service="calm"}', changes="all"),
        compared(service, before_query='{service="api",version="0.9"}'),
    ):
        page.goto(where)
        assert barriers(view) == []
    page.emulate_media(color_scheme="dark")
    assert barriers(view) == []
    page.set_viewport_size(NARROW)
    page.emulate_media(color_scheme="light")
    page.goto(compared(service))
    assert barriers(view) == []


def test_the_footer_says_what_the_agent_costs(visit, service):
    """Of one CPU, averaged over hosts, and in memory; the tooltip says of which parts."""
    view = visit(address(service, **AROUND))

    agent = view.page.locator("#foot span").first
    expect(agent).to_have_text("The agent: 0.1 % of one CPU, 38.1 MiB")
    expect(agent).to_have_attribute("title", re.compile("^Sampler, BPF program and uploader"))


def test_the_focus_is_always_visible(visit, service):
    """Tab reaches each control, the marks of the timeline and the list among them."""
    view = visit(compared(service))
    reached = walk_focus(view)

    assert {"#compare-button", "#before-input", "#swap", "#compare-end"} <= set(reached)
    assert {"#changes-filter", "#changes-all"} <= set(reached)
    marks = view.page.locator("#timeline .mark").evaluate_all(
        "(all) => all.map((each) => `button ${[...document.querySelectorAll('*')].indexOf(each)}`)"
    )
    assert marks
    assert set(marks) <= set(reached)


def test_it_fits_a_phone_and_large_type(visit, service):
    view = visit(service.url, viewport=NARROW)
    view.expect("status of 404")
    page = view.page
    for width in (400, 640, 1000):
        page.set_viewport_size({"width": width, "height": 800})
        for where in (
            compared(service, row="parse\n[python]"),
            compared(service, before_query='{service="api",version="0.9"}'),
            compared(service, q='{service="joined"}', tab="table", changes="all"),
        ):
            page.goto(where)
            view.settle()
            assert outside(view) == []
        page.goto(compared(service))
        view.settle()
        for opener in ("#before-menu button", "#deployments-menu button"):
            page.locator(opener).first.click()
            assert outside(view) == []
            page.keyboard.press("Escape")


SHIFT = """() => new Promise((done) => {
  const sum = (all) => all.reduce((shift, each) => shift + each.value, 0);
  new PerformanceObserver((list) => done(sum(list.getEntries())))
    .observe({type: "layout-shift", buffered: true});
  setTimeout(() => done(0), 1000);
})"""


def test_the_layout_does_not_move_while_a_verdict_loads(visit, service):
    """Placeholders have the size of what replaces them."""
    alone = visit(address(service, q=API, **AFTER)).page.evaluate(SHIFT)
    together = visit(compared(service)).page.evaluate(SHIFT)

    assert together <= alone + 0.02


def test_a_deployment_is_compared_by_one_press_of_its_mark(hand_of, visit, service):
    """Over the windows that match; the timeline stays with what both sides have in common, the
    list knows which one is compared.
    """
    view = visit(address(service, q=API, series="version", **AROUND))
    hand, page = hand_of(view), view.page
    alone = view.seen()
    mark = page.get_by_role("group", name="Deployments").get_by_role("button")
    expect(mark).to_have_attribute(
        "aria-label",
        re.compile(
            r"^api 2\.0 \(previously 1\.0\), rollout on 2 hosts, \d\d:\d\d UTC\."
            r" regression: parse .*\. Compare before and after$"
        ),
    )
    mark.hover() if hand.has_pointer else view.tab_to(mark)
    expect(page.locator("#timeline .tooltip")).to_contain_text("api 2.0 (previously 1.0), rollout")

    hand.press(mark)

    asked = json.loads(service.get("/api/v1/deployments", query=API, **AROUND))
    matched = asked["deployments"][0]["compare"]
    now = view.parameters()
    assert now["before_query"] == matched["before"]["query"]
    assert (now["from"], now["before_from"]) == (
        str(matched["after"]["from_ms"]),
        str(matched["before"]["from_ms"]),
    )
    expect(headline(view)).to_have_text(REGRESSION)
    assert LISTED.items() <= rows(view).items()
    expect(page.locator("#timeline .chosen-name")).to_have_text(["before", "after"])
    expect(page.locator("#legend .chip-text")).to_have_text(["1.0", "2.0"])
    hand.press(page.locator("#deployments-menu button").first)
    choice = page.get_by_role("dialog", name="Deployments").get_by_role("button")
    expect(choice).to_have_attribute("aria-current", "true")
    hand.press(choice)
    expect(page.locator("#deployments-menu button").first).to_be_focused()
    view.back()
    assert changes(alone, view.seen()) == []


def test_a_deployment_is_chosen_from_the_list(hand_of, visit, service):
    view = visit(address(service, **AROUND))
    hand, page = hand_of(view), view.page
    expect(page.locator("#deployments-count")).to_have_text("2")
    hand.press(page.locator("#deployments-menu button").first)
    dialog = page.get_by_role("dialog", name="Deployments")
    hand.press(dialog.get_by_role("button", name=re.compile("^api 2.0")))
    expect(headline(view)).to_contain_text("Regression")


def test_deployments_close_together_are_one_mark_that_opens_the_list(hand_of, visit, service):
    view = visit(address(service, **window(-24 * 60, MINUTES - NEW_AT)))
    hand, page = hand_of(view), view.page
    mark = page.locator("#timeline .mark")
    expect(mark).to_have_text("2")
    expect(mark).to_have_attribute("aria-label", re.compile(r"^api 2\.0 .*fresh 8 .*Select one$"))

    hand.press(mark)

    choices = page.get_by_role("dialog", name="Deployments").get_by_role("button")
    expect(choices).to_have_count(2)
    expect(choices.first).to_be_focused()


def test_a_deployment_that_cannot_be_compared_says_why(hand_of, visit, service):
    """A deployment of just now: its mark, the list, and what is said when either is pressed."""
    view = visit(address(service, q='{service="fresh"}', **AROUND))
    hand, page = hand_of(view), view.page
    mark = page.locator("#timeline .mark")
    expect(mark).to_have_attribute("aria-label", re.compile("not comparable: it has settled only"))
    hand.press(mark)
    expect(page.locator("#toast")).to_contain_text("wait for a few windows")
    hand.press(page.locator("#deployments-menu button").first)
    choice = page.get_by_role("dialog", name="Deployments").get_by_role("button")
    expect(choice).to_have_attribute("aria-disabled", "true")
    expect(choice).to_contain_text("wait for a few windows")
    choice.click(force=True) if hand.has_pointer else hand.press(choice)
    assert "mode" not in view.parameters()


def test_without_deployments_it_says_how_to_announce_one(hand_of, visit, service):
    view = visit(address(service, q='{service="calm"}', **window(-28, -18)))
    hand, page = hand_of(view), view.page
    hand.press(page.locator("#deployments-menu button").first)
    dialog = page.get_by_role("dialog", name="Deployments")
    expect(dialog).to_contain_text("No deployments")
    expect(dialog).to_contain_text("everflame deployments add --service NAME --version VERSION")
    view.press("Escape")
    expect(dialog).to_be_hidden()
    expect(page.locator("#timeline .mark")).to_have_count(0)
