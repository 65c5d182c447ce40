"""The page: what people do on it, by mouse and by keyboard alone, and every state it can be in."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Route, expect

from profiler.commands import demo
from storage.objects.directory import DirectoryStore
from storage.objects.keys import ObjectKey
from storage.profile import Accounting
from symbolizer.location import Kind, NamedLocation
from tests.support import profiles as some
from tests.support.browser import (
    NARROW,
    Service,
    View,
    barriers,
    changes,
    outside,
    serving,
    unseen_in,
    walk_focus,
)
from tests.support.stores import START_NS, at, put
from tests.support.targets import compile_target, running

pytestmark = [pytest.mark.browser, pytest.mark.kernel, pytest.mark.timeout(300)]

EVERFLAME = Path(sys.executable).with_name("everflame")
RECORDED_S = 12
"""Long enough for three windows, however it lies to their edges; two CPUs are busy meanwhile."""
INDIA_S = 5 * 3600 + 1800  # ahead of UTC, the whole year
HOSTILE_NAMES = (
    "right-to-left \u202e gnp.exe",
    "isolate \u2066 \u2069 mark \u200f",
    "zero\u200bwidth\u2060\ufeff",
    "nul \0 escape \x1b[31m bell \x07 c1 \x9b",
    "two\nlines\u2028three\ttab",
    '<img src=x onerror="window.hacked = 1">',
    "</script><script>window.hacked = 1</script>",
    "javascript:window.hacked=1",
    "__proto__",
    "constructor",
    "toString",
    'it\'s "quoted" `so` \\ {service="x"}',
    "%3Cimg%3E &lt;b&gt; ${1} {{1}}",
    "x" * 3000,
    "long words " * 80,
    "\U0001f525 emoji \U0001f469\u200d\U0001f467",
    "\u05e2\u05d1\u05e8\u05d9\u05ea \u0645\u0631\u062d\u0628\u0627",
    "Z\u0351\u036b\u0343\u036a\u0302\u0363\u034b\u0366a\u0334\u035f",
    "\ud83d".encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace"),
    " ",
)
WINDOW_S = 5


@dataclass(frozen=True)
class Recording:
    """What a real agent stored of programs that ran here, in windows of some seconds."""

    store: Path
    keys: tuple[ObjectKey, ...]

    @property
    def from_s(self) -> int:
        return self.keys[0].start_s // WINDOW_S * WINDOW_S - 2 * WINDOW_S

    @property
    def until_s(self) -> int:
        return self.keys[-1].start_s // WINDOW_S * WINDOW_S + 4 * WINDOW_S

    @property
    def address(self) -> str:
        """The page's address of all of it, with times that stay."""
        return f"/?from={self.from_s}000&until={self.until_s}000"


def record(folder: Path) -> Path:
    """Run the demo and a program with a call chain under a real agent; return its store."""
    chain = compile_target("chain.c", folder / "chain")
    environment = {**os.environ, "EVERFLAME_RUN": str(folder / "run")}
    # Its windows are to end at their edges, which they do not where it waits 2 s for a CPU.
    command = ["/usr/bin/nice", "-n", "-15", EVERFLAME, "agent"]
    command += [f"--interval={WINDOW_S}s", f"--for={RECORDED_S}s"]
    command += [f"--store={folder / 'store'}", f"--spool={folder / 'spool'}"]
    niced = ["/usr/bin/nice", "-n", "-5", chain, "99"]  # whatever else the machine has to do
    shop = subprocess.Popen(demo.command("nobody"))
    try:
        with (
            running(*niced, env={"SERVICE_VERSION": "1.0"}),
            running(*niced, "kernel", env={"SERVICE_VERSION": "2.0"}),
        ):
            subprocess.run(command, env=environment, check=True, capture_output=True, timeout=100)
    finally:
        shop.terminate()
        shop.wait()
    return folder / "store"


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> Recording:
    store = record(tmp_path_factory.mktemp("recording"))
    names = (str(path.relative_to(store)) for path in store.rglob("*.pb.gz"))
    keys = sorted(filter(None, map(ObjectKey.parse, names)), key=lambda key: key.start_s)
    assert len(keys) >= 3
    return Recording(store, tuple(keys))


@pytest.fixture(scope="module")
def service(recording, tmp_path_factory) -> Iterator[Service]:
    with serving(recording.store, tmp_path_factory.mktemp("service")) as service:
        yield service


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Iterator[Service]:
    """A service over a store in which every name is hostile."""
    folder = tmp_path_factory.mktemp("hostile")
    stacks = []
    for i, name in enumerate(HOSTILE_NAMES):
        function = NamedLocation(name, name, Kind.PYTHON, name, i, i)
        labels = {"service": name, "version": name, "comm": name, "pod": name}
        stacks.append((labels, [some.HANDLER, function, some.SQUARE], 5 + i))
    plain = [some.named(name) for name in ["", *(f"function_{i:03}" for i in range(300))]]
    stacks += [({"service": "plain"}, [function], 1) for function in plain]
    profile = some.build(stacks)
    causes = dict.fromkeys(HOSTILE_NAMES, 2)
    accounting = replace(profile.accounting, lost=causes, stops=causes)
    profile = replace(profile, accounting=accounting)
    for minute in range(3):
        put(DirectoryStore(folder / "store"), at(profile, minute, HOSTILE_NAMES[0]))
    with serving(folder / "store", folder) as service:
        yield service


@dataclass(frozen=True)
class Step:
    """A step of the timeline of a whole recording; `part` is where its middle is, of the width."""

    number: int
    from_ms: int
    until_ms: int
    part: float
    samples: int
    has_data: bool


def steps_of(service: Service, recording: Recording) -> list[Step]:
    """Return the steps that the page should show; a busy machine makes some windows longer."""
    from_ms, until_ms = recording.from_s * 1000, recording.until_s * 1000
    line = json.loads(service.get("/api/v1/timeline", **{"from": from_ms, "until": until_ms}))
    steps = []
    for number, profiled_ns in enumerate(line["totals"]["profiled_ns"]):
        start = max(from_ms, line["start_ms"] + number * line["step_ms"])
        end = min(until_ms, line["start_ms"] + (number + 1) * line["step_ms"])
        part = ((start + end) / 2 - from_ms) / (until_ms - from_ms)
        samples = sum(series["samples"][number] for series in line["series"])
        steps.append(Step(number, start, end, part, samples, profiled_ns > 0))
    return steps


class Walk:
    """A person's steps through the page, which Back undoes one by one."""

    def __init__(self, hand: "Mouse") -> None:
        self.view = hand.view
        self.steps = hand.steps
        self.seen: list[dict[str, list]] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        before = self.view.seen()
        yield
        assert [self.view.page.evaluate("location.search")] != before["address"]
        self.seen.append(before)

    def undo(self) -> None:
        """Go back to where it began, and see at each step what was there before it."""
        for before in self.seen[::-1]:
            for _ in range(self.steps):
                self.view.back()
                seen = self.view.seen()
                if seen["address"] == before["address"]:
                    break
            assert changes(before, seen) == []

    def restore(self, view: View) -> None:
        """Open addresses of this walk elsewhere, at least one with each parameter there was."""
        origin, known = self.view.page.url.partition("?")[0], set()
        for seen in self.seen[::-1]:
            names = set(re.findall(r"[?&](\w+)=", seen["address"][0]))
            if names - known and "now-" not in seen["address"][0]:
                known |= names
                view.page.goto(origin + seen["address"][0])
                assert changes(seen, view.seen()) == []


class Mouse:
    """Does with the pointer what one can do on the page."""

    name = "mouse"
    steps = 1

    def __init__(self, view: View) -> None:
        self.view, self.page = view, view.page

    def press(self, target: Locator | str) -> None:
        (self.page.locator(target) if isinstance(target, str) else target).click()
        self.view.settle()

    def choose(self, target: str, value: str) -> None:
        self.page.select_option(target, value)
        self.view.settle()

    def switch(self, group: str, value: str) -> None:
        self.page.locator(f"{group} label", has=self.page.locator(f"[value={value}]")).click()
        self.view.settle()

    def type_selector(self, *choices: tuple[str, str]) -> None:
        self.page.locator("#selector-input").click()
        for typed, choice in choices:
            self.page.keyboard.type(typed)
            self.option(choice).click()
        self.view.settle()

    def option(self, choice: str) -> Locator:
        name = re.compile(f"^{re.escape(choice)}")
        return self.page.locator("#selector-list").get_by_role("option", name=name)

    def clear_selector(self) -> None:
        self.press("#selector-clear")

    def type_range(self, from_: str, until: str) -> None:
        self.page.locator("#custom-from").fill(from_)
        self.page.locator("#custom-until").fill(until)
        self.press("#custom-range [type=submit]")

    def select_steps(self, first: Step, last: Step) -> None:
        (left, y), (right, _) = self.place_of_step(first), self.place_of_step(last)
        self.page.mouse.move(left - 8, y)
        self.page.mouse.down()
        self.page.mouse.move(right + 8, y, steps=4)
        self.page.mouse.up()
        self.view.settle()

    def place_of_step(self, step: Step) -> tuple[float, float]:
        size = self.page.locator("#timeline .chart").bounding_box()
        axis = 40  # what the chart keeps clear for its numbers
        x = size["x"] + axis + (size["width"] - axis) * step.part
        return x, size["y"] + size["height"] / 2

    def aim(self, *names: str) -> None:
        """Go to a box, if it takes steps to get there."""

    def zoom(self, *names: str) -> None:
        self.view.click_box(*names)

    def search(self, text: str) -> None:
        self.page.locator("#search").fill(text)
        self.view.wait(lambda: self.view.parameters().get("search", "") == text)
        self.view.settle()

    def step_match(self, direction: int) -> None:
        self.press("#find-next" if direction > 0 else "#find-previous")

    def filter(self, text: str) -> None:
        self.page.locator("#table-filter").fill(text)
        self.view.wait(lambda: self.view.parameters().get("filter", "") == text)
        self.view.settle()

    def choose_row(self, function: str) -> None:
        self.press(self.row(function))

    def row(self, function: str) -> Locator:
        """Return the row of a function of the program with the call chain."""
        name = self.page.get_by_role("button", name=function, exact=True)
        rows = self.page.locator("#pane-table tr", has=name)
        return rows.filter(has=self.page.get_by_text("chain", exact=True))

    def point_at(self, *names: str) -> None:
        self.view.canvas.hover(position=self.view.place_of(self.view.box(*names)))

    def point_at_row(self, function: str) -> None:
        self.row(function).hover()

    def point_at_step(self, step: Step) -> None:
        self.page.mouse.move(*self.place_of_step(step))

    def press_or(self, _key: str, target: Locator | str) -> None:
        """Press what can be clicked, or the key for it."""
        self.press(target)


class Keyboard(Mouse):
    """Does the same without a pointer: with keys, from wherever the focus is."""

    name = "keyboard"
    steps = 9
    """A choice is reached through others, each of which is a step too."""

    def press(self, target: Locator | str) -> None:
        self.view.tab_to(target)
        self.view.press("Enter")

    def choose(self, target: str, value: str) -> None:
        field = self.view.tab_to(target)
        values = field.evaluate("(it) => [...it.options].map((option) => option.value)")
        way = values.index(value) - values.index(field.input_value())
        for _ in range(abs(way)):
            self.view.press("ArrowDown" if way > 0 else "ArrowUp")
        assert field.input_value() == value

    def switch(self, group: str, value: str) -> None:
        self.view.tab_to(f"{group} input:checked")
        for _ in range(5):
            self.view.press("ArrowRight")
            if self.page.locator(f"{group} [value={value}]").is_checked():
                return
        raise AssertionError(f"{group} never was {value!r}")

    def type_selector(self, *choices: tuple[str, str]) -> None:
        self.leave()
        self.view.press("s")
        for typed, choice in choices:
            self.page.keyboard.type(typed)
            option = self.option(choice)
            expect(option).to_be_visible()
            while option.get_attribute("aria-selected") != "true":
                self.page.keyboard.press("ArrowDown")
            self.page.keyboard.press("Enter")
        self.view.settle()

    def clear_selector(self) -> None:
        self.leave()
        self.view.press("s", "Delete", "Escape", "Enter")

    def type_range(self, from_: str, until: str) -> None:
        for field, time_ in (("#custom-from", from_), ("#custom-until", until)):
            input_ = self.view.tab_to(field)
            while input_.evaluate("(it) => it === document.activeElement"):
                self.page.keyboard.press("Shift+Tab")  # each part of a time is a stop
            self.page.keyboard.press("Tab")
            year, month, day, hour, minute, second = [*map(int, re.findall(r"\d+", time_)), 0][:6]
            self.page.keyboard.type(f"{month:02}{day:02}{year:04}")
            self.page.keyboard.press("Tab")
            half = "PM" if hour >= 12 else "AM"
            self.page.keyboard.type(f"{hour % 12 or 12:02}{minute:02}{second:02}{half}")
        self.press("#custom-range [type=submit]")

    def select_steps(self, first: Step, last: Step) -> None:
        self.point_at_step(first)
        self.view.press(*["Shift+ArrowRight"] * (last.number - first.number), "Enter")

    def zoom(self, *_names: str) -> None:
        self.view.press("Enter")

    def aim(self, *names: str) -> None:
        self.leave()
        self.view.press("g", "Home", "Escape")
        is_flame = self.page.locator("#view [value=flame]").is_checked()
        box, boxes = self.view.box(*names), self.view.boxes()
        path = [each for each in boxes if box.stands_on(each)]
        keys = ["ArrowDown"]  # selects the root
        for target in [*path[1:], box]:
            keys.append("ArrowUp" if is_flame else "ArrowDown")
            row = sorted(
                (each for each in boxes if each.row == target.row), key=lambda each: each.start
            )
            inside = [each for each in row if each.start >= path[target.row - 1].start]
            keys += ["ArrowRight"] * inside.index(target)
        self.view.press(*keys)
        spoken = self.view.text(".flame-live")
        assert spoken.startswith(f"{box.name}, "), (spoken, keys, [each.name for each in path])

    def search(self, text: str) -> None:
        self.leave()
        self.view.press("/", "Control+a")
        self.page.keyboard.press("Delete")
        self.page.keyboard.type(text)
        self.view.wait(lambda: self.view.parameters().get("search", "") == text)
        self.view.settle()

    def step_match(self, direction: int) -> None:
        self.leave()
        self.view.press("n" if direction > 0 else "N")

    def filter(self, text: str) -> None:
        self.view.tab_to("#table-filter")
        self.view.press("Control+a", "Delete")
        self.page.keyboard.type(text)
        self.view.press("Enter")

    def choose_row(self, function: str) -> None:
        self.point_at_row(function)
        self.view.press("Enter")

    def point_at_row(self, function: str) -> None:
        self.view.tab_to("#pane-table .row-name[tabindex='0']")
        self.view.press("Home")
        number = self.row(function).evaluate("(row) => row.sectionRowIndex")
        self.view.press(*["ArrowDown"] * number)

    def point_at(self, *names: str) -> None:
        self.aim(*names)

    def point_at_step(self, step: Step) -> None:
        self.leave()
        self.view.press("t", "Home", *["ArrowRight"] * step.number)

    def press_or(self, key: str, _target: Locator | str) -> None:
        self.leave()
        self.view.press(key)

    def leave(self) -> None:
        """Leave a field, where keys mean letters."""
        self.page.evaluate("document.activeElement.blur()")


@pytest.fixture(params=[Mouse, Keyboard], ids=["mouse", "keyboard"])
def hand(request, visit, service, recording) -> Mouse:
    return request.param(visit(service.url + recording.address))


def utc(seconds: int) -> str:
    """Return a time as a field for times has it: without seconds where they are zero."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)).removesuffix(":00")


def test_a_selection_is_made_undone_and_sent_as_an_address(hand, visit, service, recording):
    """Services, the selector with completion, the range, the timeline: each is a step."""
    view, page = hand.view, hand.page
    walk = Walk(hand)
    services = page.locator("#services .chip-text").all_inner_texts()
    second = next(service for service in services if service != "chain")

    with walk.step():
        hand.press(view.chip("chain"))
    assert view.parameters()["q"] == '{service="chain"}'
    assert [box.name for box in view.boxes() if box.row == 1] == ["chain"]
    expect(view.chip("chain")).to_have_attribute("aria-pressed", "true")

    with walk.step():
        hand.press(view.chip(second))
    assert [box.name for box in view.boxes() if box.row == 1] == [second]

    with walk.step():
        hand.press(page.locator("#matchers button"))
    assert "q" not in view.parameters()

    with walk.step():
        hand.type_selector(("ver", "version"), ("1.5", "1.5.0"))
    assert view.parameters()["q"] == '{version="1.5.0"}'
    assert [box.name for box in view.boxes() if box.row == 1] == ["shop"]

    with walk.step():
        hand.clear_selector()
    assert "q" not in view.parameters()

    with walk.step():
        hand.press("#range-button")
        hand.press(view.button("Last 15 minutes"))
    assert view.parameters()["from"] == "now-15m"
    assert view.state() == "ready"

    with walk.step():
        hand.press("#range-button")
        hand.type_range(utc(recording.from_s), utc(recording.until_s))
    expected = {"from": f"{recording.from_s}000", "until": f"{recording.until_s}000"}
    assert view.parameters() == expected

    steps = steps_of(service, recording)
    first, last = [step for step in steps if step.has_data][-2:]
    with walk.step():
        hand.select_steps(first, last)
    assert view.parameters() == {
        "from": f"{first.from_ms}",
        "until": f"{last.until_ms}",
        "over": f"{recording.from_s}000..{recording.until_s}000",
    }
    assert view.box("all").samples == first.samples + last.samples

    with walk.step():
        hand.press("#timeline-zoom")
    assert "over" not in view.parameters()

    left, right = replace(first, number=0, part=0.25), replace(last, number=1, part=0.75)
    with walk.step():
        hand.select_steps(left, left)
    with walk.step():
        hand.select_steps(right, right)
    assert view.parameters()["from"] == f"{last.from_ms}"
    with walk.step():
        hand.press("#timeline-whole")
    assert view.parameters()["from"] == f"{first.from_ms}"

    with walk.step():
        hand.switch("#series", "version")
    expect(page.locator("#legend")).to_contain_text("2.0")

    if hand.name == "mouse":
        walk.restore(visit(service.url))
    walk.undo()


def test_a_flame_graph_is_zoomed_and_searched(hand, visit, service):
    """Zoom and its path are steps; a search counts all matches and steps from box to box."""
    view, page = hand.view, hand.page
    walk = Walk(hand)
    crumbs = page.locator("#crumbs")

    hand.aim("chain", "outer")
    with walk.step():
        hand.zoom("chain", "outer")
    assert crumbs.inner_text().split()[:2] == ["all", "chain"]
    assert view.box("outer").share == 1
    hand.aim("outer", "middle")
    with walk.step():
        hand.zoom("outer", "middle")
    expect(crumbs).to_contain_text("middle")
    assert page.title().startswith("All services")
    with walk.step():
        hand.press(view.button("chain", "#crumbs"))
    assert view.box("chain").share == 1
    with walk.step():
        hand.press(view.button("Reset zoom"))
    expect(crumbs).to_be_hidden()

    hand.search("ksys_read")
    found = page.locator("#found")
    several = sum("ksys_read" in box.name for box in view.boxes())
    expect(found).to_have_text(re.compile(rf"^{several} boxes, \d+\.\d % of CPU$"))
    hand.step_match(1)
    expect(found).to_have_text(re.compile(rf"^1 of {several},"))
    hand.step_match(-1)
    expect(found).to_have_text(re.compile(rf"^{several} of {several},"))
    hand.search("")
    expect(found).to_have_text("")

    if hand.name == "mouse":
        walk.restore(visit(service.url))
    walk.undo()


def test_view_options_change_the_flame_graph(hand, visit, service):
    """Inversion, levels, grouping, colours, direction: each is a step."""
    view, page = hand.view, hand.page
    walk = Walk(hand)
    names = lambda: {box.name for box in view.boxes()}  # noqa: E731

    with walk.step():
        hand.press_or("i", page.locator("label", has_text="Inverted"))
    assert view.box("chain").row == 1
    assert view.box("outer", "main").row == view.box("outer").row + 1
    with walk.step():
        hand.press_or("i", page.locator("label", has_text="Inverted"))
    with walk.step():
        hand.choose("#by", "version")
    assert {"1.0", "2.0", "1.5.0"} <= names()
    with walk.step():
        hand.choose("#by", "")
    assert view.box("outer", "middle").row == view.box("outer").row + 1
    for group, name in (("line", "outer"), ("file", "chain"), ("module", "chain")):
        with walk.step():
            hand.choose("#group", group)
        assert name in names()
        assert "middle" in names() or group != "line"
    with walk.step():
        hand.choose("#group", "function")
    for colour in ("module", "self"):
        with walk.step():
            hand.choose("#color", colour)
        assert view.seen()["canvas"] != walk.seen[-1]["canvas"]
    with walk.step():
        hand.switch("#view", "flame")
    hand.aim("outer", "middle")
    with walk.step():
        hand.zoom("outer", "middle")
    assert view.box("middle").share == 1
    with walk.step():
        hand.press_or("0", view.button("Reset zoom"))

    if hand.name == "mouse":
        walk.restore(visit(service.url))
    walk.undo()


def test_stacks_are_chosen_by_their_functions(hand, visit, service):
    """Focus, hide and callers: each is a step, and can be removed."""
    view, page = hand.view, hand.page
    walk = Walk(hand)
    names = lambda: {box.name for box in view.boxes()}  # noqa: E731

    hand.aim("outer", "middle")
    with walk.step():
        hand.zoom("outer", "middle")
    middle = view.box("middle")
    with walk.step():
        hand.press(view.button("Focus", "#panel"))
    expect(page.locator("#modifiers")).to_contain_text("focus on middle")
    with walk.step():
        hand.press_or("0", view.button("Reset zoom"))
    assert view.box("outer").total == middle.total
    hand.aim("middle", "inner")
    with walk.step():
        hand.zoom("middle", "inner")
    with walk.step():
        hand.press(view.button("Hide", "#panel"))
    assert "middle" in names()
    assert "inner" not in names()
    for name in ("hide inner", "focus on middle"):
        with walk.step():
            hand.press(view.button(f"Remove: {name}"))
    expect(page.locator("#modifiers")).to_be_hidden()
    for action, operator in (("Only service shop", "="), ("Exclude", "!=")):
        hand.aim("shop")
        with walk.step():
            hand.zoom("shop")
        with walk.step():
            hand.press(view.button(action, "#panel"))
        assert view.parameters()["q"] == f'{{service{operator}"shop"}}'
        assert ("chain" in names()) == (operator == "!=")
        with walk.step():
            hand.press(page.locator("#matchers button"))
    hand.aim("outer", "middle")
    with walk.step():
        hand.zoom("outer", "middle")
    with walk.step():
        hand.press(view.button("Callers", "#panel"))
    assert [box.name for box in view.boxes()][:3] == ["middle", "outer", "main"]
    with walk.step():
        hand.press(view.button("Remove: callers of middle"))

    if hand.name == "mouse":
        walk.restore(visit(service.url))
    walk.undo()


def test_the_table_and_the_graph_lead_to_each_other(hand, visit, service):
    """Sorting, filtering, rows and boxes of one function, and the panel."""
    view, page = hand.view, hand.page
    rows = page.locator("#pane-table tbody tr")
    panel = page.locator("#panel")
    walk = Walk(hand)

    with walk.step():
        hand.switch("#tab", "table")
    expect(page.locator("#graph")).to_be_hidden()
    shares = [float(row.split()[0].lstrip("<")) for row in rows.all_inner_texts()]
    assert shares == sorted(shares, reverse=True)
    with walk.step():
        hand.press(page.get_by_role("columnheader", name="Function").get_by_role("button"))
    names = [name.casefold() for name in page.locator(".row-name").all_inner_texts()]
    assert names == sorted(names)
    expect(page.get_by_role("columnheader", name="Function")).to_have_attribute(
        "aria-sort", "ascending"
    )
    with walk.step():
        hand.press(page.get_by_role("columnheader", name="Total", exact=True).get_by_role("button"))
    assert rows.first.locator(".row-name").inner_text() != names[0]

    hand.filter("CHAIN")
    shown = rows.all_inner_texts()
    assert all("chain" in row.casefold() for row in shown)
    expect(page.locator("#pane-table .table-head")).to_contain_text(f"{len(shown)} functions")
    hand.filter("no such function")
    expect(rows).to_have_text("No function matches “no such function”")
    hand.filter("")

    with walk.step():
        hand.switch("#tab", "both")
    canvas = view.seen()["canvas"]
    hand.choose_row("middle")
    expect(page.locator("tr.marked .row-name")).to_have_text("middle")
    expect(panel.get_by_role("heading")).to_have_text("middle")
    expect(panel).to_contain_text("chain")
    assert view.seen()["canvas"] != canvas
    hand.choose_row("middle")
    expect(panel).to_be_hidden()

    hand.aim("outer", "middle", "inner")
    with walk.step():
        hand.zoom("outer", "middle", "inner")
    expect(page.locator("tr.marked .row-name")).to_have_text("inner")
    for fact in ("Module", "Kind", "Total", "Self", "Cores", "Samples"):
        expect(panel.locator("dt").get_by_text(fact, exact=True)).to_be_visible()
    assert f"{view.box('inner').samples:,}" in panel.inner_text()
    expect(panel).to_contain_text(re.compile(r"Path/\S+/chain\s*Build id[0-9a-f]{40}"))
    with walk.step():
        hand.press_or("0", view.button("Reset zoom"))
    hand.choose_row("inner")
    with walk.step():
        hand.press(view.button("Callers", "#panel"))
    assert [box.name for box in view.boxes()][:3] == ["inner", "middle", "outer"]
    expect(panel).to_be_hidden()
    hand.choose_row("middle")
    hand.press(view.button("Find in graph", "#panel"))
    expect(page.locator("#search")).to_have_value("middle")
    expect(page.locator("#found")).to_have_text(re.compile("^1 box, "))
    with walk.step():
        hand.switch("#tab", "graph")

    if hand.name == "mouse":
        walk.restore(visit(service.url))
    walk.undo()


def test_back_restores_text_fields(visit, service, recording):
    """A search and a filter belong to the step in which they were typed, wherever the focus is."""
    view = visit(f"{service.url}{recording.address}&tab=both")
    mouse = Mouse(view)
    mouse.press(view.chip("chain"))
    for type_, text, name in (
        (mouse.search, "middle", "#search"),
        (mouse.filter, "outer", "#table-filter"),
    ):
        type_(text)
        expect(view.page.locator(name)).to_be_focused()
        view.back()
        expect(view.page.locator(name)).to_have_value("")
        view.page.go_forward()
        expect(view.page.locator(name)).to_have_value(text)


def test_a_range_is_read_in_the_zone_that_is_chosen(hand, recording):
    """UTC or the browser's own; a range that ends before it starts is refused where it is typed."""
    view, page = hand.view, hand.page
    from_, until = utc(recording.from_s), utc(recording.until_s)

    hand.press("#range-button")
    presets = page.locator("#ranges button").all_inner_texts()
    assert presets[:1] + presets[-1:] == ["Last 15 minutes", "Last 7 days"]
    assert page.locator("#custom-from").input_value() == from_
    hand.type_range(until, from_)
    expect(page.locator("#custom-problem")).to_have_text("The range must end after it starts.")
    hand.switch("#zone", "local")
    local = utc(recording.from_s + INDIA_S)
    assert page.locator("#custom-from").input_value() == local
    expect(page.locator("#timeline-range")).to_contain_text(local[11:16])
    hand.type_range(local, utc(recording.until_s + INDIA_S - 1))

    assert view.parameters() == {
        "from": f"{recording.from_s}000",
        "until": f"{recording.until_s - 1}000",
        "tz": "local",
    }
    expect(page.locator("#range-name")).to_contain_text("local")


def test_tooltips_describe_what_the_pointer_is_on(hand, service, recording):
    """A box, also for screen readers, and a step of the timeline with its services."""
    view, page = hand.view, hand.page
    tooltip = page.locator(".flame-tooltip")
    expect(tooltip).to_be_hidden()

    hand.point_at("outer", "middle")

    middle = view.box("middle")
    expect(tooltip).to_contain_text(re.compile(r"^middlechain · native.*Total.*Self.*Average"))
    expect(tooltip).to_contain_text(f"Samples{middle.samples:,}")
    if hand.name == "mouse":
        page.mouse.move(5, 5)
    else:
        expect(page.locator(".flame-live")).to_have_text(re.compile(r"^middle, \d+\.\d % of CPU"))
        view.press("Tab")
    expect(tooltip).to_be_hidden()

    canvas = view.seen()["canvas"]
    hand.point_at_row("middle")
    assert view.seen()["canvas"] != canvas
    if hand.name == "mouse":
        hand.point_at("outer", "middle", "inner")
        expect(page.locator("tr.marked .row-name")).to_have_text("inner")

    step = page.locator("#timeline .tooltip")
    hand.point_at_step([each for each in steps_of(service, recording) if each.has_data][-2])
    expect(step).to_contain_text("chain")
    expect(step).to_contain_text(re.compile(r"all\d\.\d\d cores"))
    if hand.name == "keyboard":
        step = page.get_by_role("slider")
        expect(step).to_have_attribute("aria-valuetext", re.compile(r"UTC, \d\.\d\d cores$"))


def test_a_download_is_what_the_command_exports(hand, recording, tmp_path):
    """Every format of the menu, for the window and the selector that are shown, byte by byte."""
    page = hand.page
    selector = '{service=~"chain|shop"}'
    query = f"&q={urllib.parse.quote(selector)}"
    page.goto(f"{page.url}{query}")
    hand.view.settle()
    button = hand.view.button("Download this flame graph")
    links = page.locator("#downloads a")
    environment = {**os.environ, "EVERFLAME_CACHE": str(tmp_path / "cache")}
    command = [EVERFLAME, "export", f"--store={recording.store}", "--by=service", "-q", selector]
    command += [f"--from={recording.from_s}", f"--until={recording.until_s}"]
    endings = [".speedscope.json", ".folded", ".pb.gz", ".svg", ".json"]

    hand.press(button)
    assert links.count() == len(endings)
    for link, ending in zip(links.all(), endings, strict=True):
        with page.expect_download() as caught:
            hand.press(link)
        name = caught.value.suggested_filename
        assert name.endswith(ending)
        command += ["-o", str(tmp_path / name)]
        caught.value.save_as(tmp_path / "downloaded" / name)
    page.keyboard.press("Escape")
    expect(links.first).to_be_hidden()
    expect(button).to_be_focused()

    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=60)
    for path in sorted((tmp_path / "downloaded").iterdir()):
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


@pytest.mark.parametrize(
    "view", [["focus=inner", "hide=outer"], ["callers=inner"], ["invert=1", "group=module"]]
)
def test_a_download_is_what_the_graph_shows(visit, service, recording, tmp_path, view):
    """Hidden, inverted or grouped stacks are so in the file too; the menu says it."""
    page = visit("&".join([f"{service.url}{recording.address}", *view])).page
    flags = [f"--{each}" if each != "invert=1" else "--invert" for each in view]
    command = [EVERFLAME, "export", f"--store={recording.store}", "--by=service", *flags]
    command += [f"--from={recording.from_s}", f"--until={recording.until_s}"]
    environment = {**os.environ, "EVERFLAME_CACHE": str(tmp_path / "cache")}
    downloaded = {}
    for link in page.locator("#downloads a").all():
        response = page.request.get(urllib.parse.urljoin(page.url, link.get_attribute("href")))
        downloaded[link.get_attribute("download")] = response.body()

    outputs = [word for name in downloaded for word in ("-o", str(tmp_path / name))]
    subprocess.run(
        [*command, *outputs], env=environment, check=True, capture_output=True, timeout=60
    )

    assert len(downloaded) == 5
    for name, content in downloaded.items():
        assert content == (tmp_path / name).read_bytes(), name
    expect(page.locator("#downloads .note")).to_have_text(
        "The files contain what the graph shows, not the whole range."
    )


def test_a_copied_link_keeps_its_times(hand, visit, service):
    """A relative range is copied as the absolute one that is shown."""
    view, page = hand.view, hand.page
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.goto(f"{service.url}/?from=now-24h&tab=graph")
    shown = view.seen()

    hand.press_or("c", "#copy-link")

    expect(page.locator("#toast")).to_contain_text("Copied a link with fixed times")
    link = page.evaluate("navigator.clipboard.readText()")
    times = [int(each) for each in re.findall(r"(?:from|until)=(\d{13})(?:&|$)", link)]
    assert 0 <= times[1] - times[0] - 24 * 3600 * 1000 < 600_000  # it begins with ten minutes
    assert abs(times[1] / 1000 - time.time()) < 600
    other = visit(link).seen()
    for part in ("chart", "canvas"):
        assert other[part] == shown[part]


def test_dark_and_light_and_the_keys(hand, visit, service, recording):
    """The theme follows the system or a choice that lasts; help opens and gives the focus back."""
    view, page = hand.view, hand.page
    background = "getComputedStyle(document.documentElement).backgroundColor"
    luminance = lambda of: sum(map(float, re.findall(r"[\d.]+", of.page.evaluate(background))))  # noqa: E731
    assert luminance(view) > 600
    canvas = view.seen()["canvas"]

    for name in ("light", "dark"):
        hand.press("#theme")
        expect(page.locator("#theme")).to_have_attribute("aria-label", f"Theme: {name}")
    assert luminance(view) < 300
    assert view.seen()["canvas"] != canvas
    page.reload()
    assert luminance(view) < 300
    assert luminance(visit(service.url + recording.address, color_scheme="dark")) < 300

    hand.press_or("?", "#help-button")
    dialog = page.get_by_role("dialog", name="Keyboard shortcuts")
    expect(dialog).to_contain_text("previous match")
    view.press("Escape")
    expect(dialog).to_be_hidden()
    hand.press("#help-button")
    hand.press(dialog.get_by_role("button", name="Close"))
    expect(dialog).to_be_hidden()
    expect(page.locator("#help-button")).to_be_focused()


def test_hostile_names_are_shown_as_text(visit, hostile):
    """Nothing in a name runs, hides, reorders text or becomes part of the page."""
    from_s = START_NS // 10**9
    view = visit(f"{hostile.url}/?from={from_s}&until={from_s + 180}&tab=both")
    page = view.page
    mouse = Mouse(view)

    def check() -> None:
        assert unseen_in(view) == []
        assert page.evaluate("[window.hacked, ({}).hacked, document.images.length]") == [
            None,
            None,
            0,
        ]
        assert page.evaluate("document.scripts.length") == 1

    assert view.state() == "ready"
    check()
    more = page.locator("#services").get_by_role("button", name=re.compile(r"^\d+ more$"))
    mouse.press(more)
    chips = page.locator("#services .chip-text")
    assert chips.count() == len(HOSTILE_NAMES) + 1
    assert r"right-to-left \u202e gnp.exe" in chips.all_inner_texts()
    check()
    page.locator("#coverage summary").click()
    expect(page.locator("#coverage")).to_contain_text(r"right-to-left \u202e gnp.exe")
    mouse.switch("#series", "version")
    page.locator("#timeline .chart").hover()
    check()
    mouse.switch("#series", "service")
    mouse.press("#pane-table .table-more button")
    assert page.locator("#pane-table tbody tr").count() > 300
    names = page.locator(".row-name, .chip-text").all_inner_texts()
    assert {r"\x20", "(no name)"} < set(names)
    assert all(map(str.strip, names))
    mouse.filter("handler")

    # Each function by its box, its tooltip and its panel.
    Keyboard(view).aim("handler")
    view.press("ArrowDown")
    named = set()
    for _ in HOSTILE_NAMES:
        named.add(view.text(".flame-tooltip-name"))
        check()
        view.press("ArrowRight")
    assert len(named) == len(HOSTILE_NAMES)
    for name in ("__proto__", "constructor", r"zero\u200bwidth\u2060\ufeff", HOSTILE_NAMES[5]):
        page.goto(f"{hostile.url}/?from={from_s}&until={from_s + 180}")
        mouse.press(more)
        mouse.press(chips.get_by_text(name, exact=True))
        assert [box.name for box in view.boxes()] == ["all", name, "handler", name, "square"]
        mouse.zoom("handler", name)
        expect(page.locator("#crumbs")).to_contain_text(name)
        expect(page.locator("#panel h3")).to_have_text(name)
        for action in ("Focus", "Hide"):
            mouse.press(view.button(action, "#panel"))
            expect(page.locator("#modifiers")).to_contain_text(name)
            check()
        assert [box.name for box in view.boxes()] == ["all", name, "handler", "square"]
        mouse.search(name)
        expect(page.locator("#found")).to_contain_text("1 box")
        check()

    page.goto(f"{hostile.url}/?from={from_s}&until={from_s + 180}")
    page.locator("#selector-input").fill("service=")
    expect(page.locator("#selector-list li")).to_have_count(len(HOSTILE_NAMES) + 1)
    check()


def test_a_hostile_address_is_harmless(visit, hostile):
    """A link's values are shown as text; unknown values are read as the default."""
    view = visit(hostile.url)
    view.expect("status of 400")
    name = urllib.parse.quote("<img src=x onerror=window.hacked=1>\u202e\0")
    from_s = START_NS // 10**9
    for query in (
        f"q=%7Bservice%3D%22{name}%22%7D&search={name}",
        f"callers={name}&focus={name}&hide={name}&filter={name}&tab=table",
        f"by={name}&series=__proto__&color=constructor&view=toString&tab=__proto__",
        f"node={name}&select={name}&row={name}&group={name}&sort={name}&rows=1e9&over=..",
        f"from={name}&until={name}&over={name}..{name}&tz=Mars",
    ):
        view.page.goto(f"{hostile.url}/?from={from_s}&until={from_s + 180}&{query}")
        assert view.state() in {"ready", "empty", "error"}
        assert unseen_in(view) == []
        assert view.page.evaluate("[window.hacked, document.images.length]") == [None, 0]


def test_a_store_without_data_says_how_to_begin(visit, recording, tmp_path):
    """Until the first object is there; looking again then shows it."""
    (tmp_path / "store").mkdir()
    with serving(tmp_path / "store", tmp_path) as service:
        view = visit(service.url)
        assert view.state() == "empty"
        expect(view.page.locator("#state")).to_contain_text("No data yet")
        expect(view.page.locator("#state")).to_contain_text("sudo everflame up")
        expect(view.page.locator("#panes")).to_be_hidden()

        shutil.copytree(recording.store, tmp_path / "store", dirs_exist_ok=True)
        Mouse(view).press(view.button("Check again"))

        assert view.state() == "ready"
        expect(view.page.locator("#state")).to_be_hidden()


@pytest.mark.parametrize("kind", [Mouse, Keyboard], ids=["mouse", "keyboard"])
def test_every_empty_or_error_state_has_a_way_out(kind, visit, service, recording):
    """No data in the range, nothing that matches, a box that is not there, a broken selector."""
    view = visit(f"{service.url}/?from=1700000000&until=1700003600")
    page, state, hand = view.page, view.page.locator("#state"), kind(view)
    expect(state).to_contain_text("No data in this range")
    hand.press(state.get_by_role("button", name=re.compile("^20..-..-.. ")).first)
    assert view.state() == "ready"
    expect(page.locator("#pane-graph")).to_be_visible()
    view.back()
    assert view.state() == "empty"

    page.goto(f"{service.url}{recording.address}&q=%7Bservice%3D%22nobody%22%7D")
    expect(state).to_contain_text("No match")
    hand.press(view.button("chain", "#state"))
    assert view.parameters()["q"] == '{service="chain"}'
    assert view.state() == "ready"
    view.back()
    expect(state).to_contain_text('none matches {service="nobody"}')
    hand.press(view.button("Clear the selector", "#state"))
    assert view.state() == "ready"

    view.expect("status of 404")
    page.goto(f"{service.url}{recording.address}&node=0123456789abcdef")
    expect(state).to_contain_text("This box is not in this range")
    hand.press(view.button("Zoom out", "#state"))
    assert view.state() == "ready"
    assert "node" not in view.parameters()
    view.back()
    assert view.state() == "error"

    view.expect("status of 400")
    page.goto(f"{service.url}{recording.address}&q=%7Bservice%3D")
    assert view.state() == "error"
    hand.press(view.button("Clear the selector", "#state"))
    assert view.state() == "ready"
    page.locator("#selector-input").fill("service=")
    page.keyboard.press("Enter")
    expect(page.locator("#selector-problem")).to_contain_text("at character")
    expect(page.locator("#selector-input")).to_have_attribute("aria-invalid", "true")
    assert "q" not in view.parameters()


def test_a_damaged_object_is_named_and_the_rest_is_shown(visit, recording, tmp_path):
    store = shutil.copytree(recording.store, tmp_path / "store")
    damaged = store / recording.keys[1].text
    damaged.write_bytes(damaged.read_bytes()[:-100])
    with serving(store, tmp_path) as service:
        view = visit(service.url + recording.address)

        assert view.state() == "ready"
        expect(view.page.locator("#coverage .fact.bad")).to_contain_text(["1 object skipped"])
        view.page.locator("#coverage summary").click()
        expect(view.page.locator("#coverage")).to_contain_text(recording.keys[1].text)


def test_the_last_graph_stays_while_the_store_is_away(visit, recording, tmp_path):
    """Dimmed, with a notice; it comes back when the store does."""
    store = shutil.copytree(recording.store, tmp_path / "store")
    with serving(store, tmp_path) as service:
        view = visit(service.url + recording.address)
        view.expect("status of 503")
        page, graph, notice = view.page, view.page.locator("#graph .flame"), "#notice"
        canvas = view.seen()["canvas"]

        store.rename(tmp_path / "away")
        page.wait_for_timeout(1000)  # a listing is believed for half a second
        Mouse(view).press("#refresh")

        assert view.state() == "error"
        expect(graph).to_have_class(re.compile("is-dim"))
        expect(page.locator(notice)).to_contain_text("Store away")
        assert view.seen()["canvas"] == canvas
        (tmp_path / "away").rename(store)
        Mouse(view).press(view.button("Retry"))
        assert view.state() == "ready"
        expect(page.locator(notice)).to_be_empty()
        expect(graph).not_to_have_class(re.compile("is-dim"))


def test_a_second_refresh_replaces_the_first(visit, service, recording):
    """Its requests have the same addresses, and their responses are shown."""
    view = visit(service.url + recording.address)
    page, held = view.page, []
    painted = "performance.getEntriesByName('everflame:first-paint').length"
    before = page.evaluate(painted)

    def hold_first(route: Route) -> None:
        if held:
            route.continue_()
        held.append(route)

    page.route("**/flamegraph?*", hold_first)
    page.keyboard.press("r")
    view.wait(lambda: held)
    page.keyboard.press("r")

    view.wait(lambda: page.evaluate(painted) == before + 1)
    assert view.state() == "ready"


MOVING = "document.getAnimations().filter((each) => each.playState === 'running').length"


@pytest.mark.parametrize("motion", ["no-preference", "reduce"])
def test_a_slow_request_shows_progress_and_can_be_cancelled(motion, visit, recording, tmp_path):
    """Without animation if reduced motion is preferred. An unavailable service is an error."""
    with serving(recording.store, tmp_path) as service:
        view = visit(service.url + recording.address, reduced_motion=motion)
        page = view.page
        cancel, notice = view.button("Cancel", "#progress"), page.locator("#notice")
        expect(cancel).to_be_hidden()
        place = page.locator("#graph .flame").bounding_box()

        service.process.send_signal(signal.SIGSTOP)
        page.locator("#refresh").click()
        expect(cancel).to_be_visible()
        assert page.locator("#graph .flame").bounding_box() == place
        assert (page.evaluate(MOVING) > 0) == (motion == "no-preference")
        cancel.click()
        expect(cancel).to_be_hidden()
        expect(page.locator("#toast")).to_contain_text("Cancelled")
        assert view.state() == "ready"
        service.process.send_signal(signal.SIGCONT)
        Mouse(view).press("#refresh")
        assert view.state() == "ready"

        if motion == "reduce":
            return
        view.expect("ERR_CONNECTION_REFUSED|ERR_CONNECTION_RESET|ERR_EMPTY_RESPONSE")
        service.stop()
        Mouse(view).press(view.chip("chain"))
        assert view.state() == "error"
        expect(notice).to_contain_text("The service does not respond")
        expect(page.locator("#graph")).to_be_visible()
        service.start()
        Mouse(view).press(view.button("Retry"))
        assert view.state() == "ready"
        assert [box.name for box in view.boxes() if box.row == 1] == ["chain"]


def test_an_idle_machine_is_not_an_error(visit, tmp_path):
    """A range with ticks but without samples is described as idle."""
    store = DirectoryStore(tmp_path / "store")
    idle = some.build([], accounting=Accounting(cpus=2, profiled_ns=60 * 10**9, ticks=7, idle=7))
    put(store, at(idle, 0))
    with serving(tmp_path / "store", tmp_path) as service:
        view = visit(f"{service.url}/?from={START_NS // 10**9}&until={START_NS // 10**9 + 60}")

        expect(view.page.locator("#state")).to_contain_text("The CPUs were idle in this range")


def test_the_page_is_accessible(visit, service, hostile, recording):
    """axe-core finds nothing serious in any view, state, open menu or size, nor in the dark."""
    # Rows of a table are all alike: a few of them will do.
    whole = f"{service.url}{recording.address}&filter=chain"
    hostile_range = f"from={START_NS // 10**9}&until={START_NS // 10**9 + 180}"
    view = visit(whole)
    view.expect("status of 404")
    page, mouse = view.page, Mouse(view)

    assert barriers(view) == []
    page.emulate_media(color_scheme="dark")
    assert barriers(view) == []
    mouse.press("#range-button")
    assert barriers(view) == []
    page.emulate_media(color_scheme="light")
    assert barriers(view) == []
    page.keyboard.press("Escape")
    for opener in ("#download-menu button", "#help-button", "#selector-input"):
        mouse.press(opener)
        if opener == "#selector-input":
            expect(page.locator("#selector-list li").first).to_be_visible()
        assert barriers(view) == []
        page.keyboard.press("Escape")
    page.locator("#coverage summary").click()
    mouse.switch("#series", "version")
    mouse.switch("#tab", "table")
    mouse.choose_row("outer")
    assert barriers(view) == []
    for address in (
        f"{whole}&q=%7Bservice%3D%22chain%22%7D&focus=outer&hide=inner&search=middle&view=flame",
        f"{hostile.url}/?{hostile_range}&tab=both&filter=e",
    ):
        page.goto(address)
        assert barriers(view) == []
        page.emulate_media(color_scheme="dark")
        assert barriers(view) == []
        page.emulate_media(color_scheme="light")
    for address in (
        f"{service.url}/?from=1700000000&until=1700003600",
        f"{whole}&q=%7Bservice%3D%22nobody%22%7D",
        f"{whole}&node=0123456789abcdef",
    ):
        page.goto(address)
        assert barriers(view) == []
    page.set_viewport_size(NARROW)
    for address in (whole, f"{whole}&tab=table"):
        page.goto(address)
        assert barriers(view) == []


def test_the_table_lists_what_the_canvas_draws(visit, service, recording):
    """Every function is in the table too, with its shares, for those who cannot see the canvas."""
    view = visit(f"{service.url}{recording.address}&tab=table&rows=5000")
    table = view.page.get_by_role("table", name="Functions by CPU time")
    headings = table.get_by_role("columnheader").evaluate_all(
        "(all) => all.map((each) => each.ariaLabel ?? each.textContent)"
    )
    assert headings == [
        *("Self", "Self, CPU time", "Total", "Total, CPU time", "Cores"),
        *("Function", "Module"),
    ]
    listed = {}
    for row in table.locator("tbody tr").all_inner_texts()[:50]:
        self_, _, total, _, _, name, module = row.replace("\n", "").split("\t")
        listed[name, module] = [float(each.rstrip(" %").lstrip("<>")) for each in (self_, total)]

    boxes = view.boxes()
    whole = boxes[0].total
    too_narrow = sum(box.total for box in boxes if box.kind == "rest")
    for name, module in (("outer", "chain"), ("middle", "chain"), ("inner", "chain")):
        total = sum(box.total for box in boxes if (box.name, box.module) == (name, module))
        shown = listed[name, module][1]
        assert 100 * total / whole - 0.051 <= shown <= 100 * (total + too_narrow) / whole + 0.051
        assert listed[name, module][0] <= listed[name, module][1]


def test_the_page_fits_a_phone_and_large_type(visit, service, hostile, recording):
    """At 400 px, and at half of 1280 as at 200 %, no view, state or menu makes the page scroll
    sideways, and no control lies outside of it.
    """
    hostile_range = f"from={START_NS // 10**9}&until={START_NS // 10**9 + 180}"
    view = visit(service.url, viewport=NARROW)
    view.expect("status of 404")
    page, mouse = view.page, Mouse(view)
    for width in (400, 640):
        page.set_viewport_size({"width": width, "height": 800})
        for address in (
            f"{service.url}{recording.address}&over=1700000000..1900000000",
            f"{service.url}{recording.address}&tab=table",
            f"{service.url}/?from=1700000000&until=1700003600",
            f"{service.url}{recording.address}&node=0123456789abcdef",
            f"{hostile.url}/?{hostile_range}&tab=table&series=version",
            f"{hostile.url}/?{hostile_range}&focus={'x' * 999}&q=%7Bservice%21%3D%22x%22%7D",
        ):
            page.goto(address)
            view.settle()
            assert outside(view) == []
        page.goto(service.url + recording.address)
        view.settle()
        for opener in ("#range-button", "#download-menu button", "#help-button"):
            mouse.press(opener)
            assert outside(view) == []
            page.keyboard.press("Escape")
        page.locator("#coverage summary").click()
        view.click_box("chain", "outer")
        expect(page.locator("#panel")).to_be_visible()
        assert outside(view) == []


def test_the_focus_is_always_visible(visit, service, recording):
    """Tab reaches each control once, and each looks different with the focus."""
    view = visit(f"{service.url}{recording.address}&q=%7Bservice%3D%22chain%22%7D&focus=outer")
    page = view.page
    view.click_box("outer")
    page.reload()
    view.settle()
    reached = walk_focus(view)
    assert len(reached) > 40
    for name in ("#selector-input", "#range-button", "#refresh", "#copy-link", "#search", "#by"):
        assert name in reached
