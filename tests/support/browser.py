"""The page in a real browser over the real service: actions, what is shown, and complaints.

A test fails if the browser complains in any page that was opened here: an error or a warning on the
console, a violation of the policy, an exception, a request to another origin.
"""

import contextlib
import difflib
import json
import re
import signal
import socket
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import (
    Browser,
    BrowserContext,
    Error,
    Locator,
    Page,
    Request,
    sync_playwright,
)

from tests.support.live import wait_for
from tests.support.targets import ending_with_us

CHROMIUM = "/usr/bin/chromium-headless-shell"
"""Draws what Debian's `chromium` draws, in half the CPU time: it has no window of its own."""
ARGUMENTS = (
    "--no-sandbox",  # tests run as root
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-quic",
    "--disable-sync",
    "--no-first-run",
    "--renderer-process-limit=1",  # tabs of one context share a process: see Contexts
)
FLAME_PARAMETERS = (
    *("query", "from", "until", "by", "group", "node"),
    *("invert", "callers", "focus", "hide", "python_native"),
)
ROW_PX = 20
WIDE = {"width": 1280, "height": 900}
NARROW = {"width": 400, "height": 800}

# The console has policy violations too, but only the event says what was refused.
WATCH = """
addEventListener("securitypolicyviolation", (event) => console.error(
  `policy violation: ${event.effectiveDirective} ${event.blockedURI} ${event.sample}`));
"""

# The previous view is shown after the event.
BACK = """() => new Promise((done) => {
  addEventListener("popstate", () => setTimeout(done), {once: true});
  history.back();
})"""

LIES_BEHIND = """(it) =>
  (it.compareDocumentPosition(document.activeElement) & Node.DOCUMENT_POSITION_FOLLOWING) !== 0"""

STATE = "document.documentElement.dataset.state"
IS_SETTLED = """(() => {
  const { state, verdicts } = document.documentElement.dataset;
  return state !== "loading" && verdicts !== "pending";
})()"""

SEEN = """async () => {
  // Two frames: what depends on sizes is drawn one frame after they are known.
  for (let i = 0; i < 2; i += 1) await new Promise((done) => requestAnimationFrame(done));
  const shown = (element) => element.checkVisibility();
  const lines = (name) => document.querySelector(name).innerText.split(/\\n+/);
  const values = [...document.querySelectorAll("input, select")].filter(shown).map((each) =>
    [each.id || each.name, each.value, each.checked]);
  const outlines = [...document.querySelectorAll(".flame-selected")].map((each) =>
    each.hidden ? "none" : each.getAttribute("style"));
  const chart = document.querySelector("#timeline .chart svg")?.innerHTML ?? "";
  const canvas = document.querySelector("#graph canvas");
  const bytes = new TextEncoder().encode(shown(canvas) ? canvas.toDataURL() : "");
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  const tooltips = document.querySelectorAll(".flame-tooltip, .tooltip");
  for (const each of tooltips) each.style.visibility = "hidden";
  const seen = {
    address: [location.search],
    title: [document.title],
    header: lines("header"),
    main: lines("main"),
    footer: lines("footer"),
    values,
    outlines,
    chart: [chart.replace(/<line class="cursor".*/, "")],
    canvas: [...digest.slice(0, 8)],
  };
  for (const each of tooltips) each.style.visibility = "";
  return seen;
}"""


# Line breaks of index.html are not part of a name; an option's value is not shown.
UNSEEN = r"""() => {
  const unseen = /[\p{C}\p{Zl}\p{Zp}\u034f\u115f\u1160\u3164\ufe00-\ufe0f]/u;
  const texts = [document.title];
  const shown = ["title", "placeholder", "aria-label", "aria-valuetext", "aria-description"];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_ALL);
  for (let node = walker.currentNode; node; node = walker.nextNode()) {
    if (node.nodeType === Node.TEXT_NODE) texts.push(node.data.replace(/\n */g, ""));
    else texts.push(...shown.map((name) => node.getAttribute?.(name) ?? ""));
  }
  return texts.filter((text) => unseen.test(text));
}"""

# Elements inside a scrolling container can be scrolled to.
OUTSIDE = """() => {
  const {scrollWidth, clientWidth} = document.documentElement;
  const controls = document.querySelectorAll("a, button, input, select, summary, h3, canvas, p");
  const isBeyond = (each) => {
    const {left, right, width} = each.getBoundingClientRect();
    return width > 1 && (left < -1 || right > clientWidth + 1);
  };
  const scrolls = (each) => {
    for (let at = each.parentElement; at && at !== document.body; at = at.parentElement) {
      if (["auto", "scroll"].includes(getComputedStyle(at).overflowX)) return true;
    }
    return false;
  };
  const beyond = [...controls].filter((each) => each.checkVisibility() && isBeyond(each));
  return [
    ...(scrollWidth > clientWidth ? [`${scrollWidth} px in ${clientWidth}`] : []),
    ...beyond.filter((each) => !scrolls(each)).map((each) => each.outerHTML.slice(0, 200)),
  ];
}"""


# The focus may be shown by an element around the control, as by a radio button's label.
FOCUSED = """() => {
  const control = document.activeElement;
  if (control === document.body) return null;
  const number = [...document.querySelectorAll("*")].indexOf(control);
  const name = control.id ? `#${control.id}` : `${control.localName} ${number}`;
  const around = control.closest("label, .flame-scroller") ?? control;
  const {x, y, width, height} = around.getBoundingClientRect();
  const [left, top] = [Math.max(0, x - 6), Math.max(0, y - 6)];
  const seen = Math.min(height + 12, innerHeight - top);
  return {name, x: left, y: top, width: width + 12, height: seen};
}"""


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Run the distribution's browser, without a window."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        try:
            yield browser
        finally:
            browser.close()


class Service:
    """The service process over one store; it can be stopped and started at the same address."""

    def __init__(self, store: Path, folder: Path) -> None:
        self.store, self.folder = store, folder
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.port = server.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "profiler.commands.serve",
            f"--listen=127.0.0.1:{self.port}",
        ]
        command += [f"--store={self.store}", f"--cache={self.folder / 'cache'}"]
        command += [f"--run-folder={self.folder / 'run'}"]
        command = ending_with_us(*command, signal="TERM")
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        said = []
        for line in self.process.stderr:
            said.append(line)
            if self.url in line:
                return
        raise AssertionError("".join(said))

    def stop(self) -> None:
        with self.process:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(20)
            finally:
                self.process.kill()

    def get(self, path: str, **parameters: object) -> bytes:
        address = f"{self.url}{path}?{urllib.parse.urlencode(parameters, doseq=True)}"
        with urllib.request.urlopen(address, timeout=30) as response:
            return response.read()


@contextlib.contextmanager
def serving(store: Path, folder: Path) -> Iterator[Service]:
    service = Service(store, folder)
    try:
        service.start()
        yield service
    finally:
        service.stop()


@dataclass(frozen=True)
class Box:
    """A box of the flame graph as the page should draw it, from the service's response.

    It extends from `start` to `end` of the `width` that the graph's values have; `row` counts from
    the root.
    """

    name: str
    module: str
    kind: str
    row: int
    start: int
    end: int
    width: int
    total: int
    samples: int

    @property
    def share(self) -> float:
        return (self.end - self.start) / self.width

    def stands_on(self, other: "Box") -> bool:
        """Return whether the other is one of its callers."""
        return other.row < self.row and other.start <= self.start < other.end


def boxes_of(response: dict) -> list[Box]:
    """Return the boxes of a response in preorder, those above the zoomed one first."""
    whole = response["nodes"]["total"][0]
    path = response["path"]
    above = [(["all", "", "label"], response["total"], response["samples"])] if path else []
    above += [(each["frame"], each["total"], each["samples"]) for each in path[:-1]]
    boxes = [
        Box(*frame[:3], row, 0, whole, whole, total, samples)
        for row, (frame, total, samples) in enumerate(above)
    ]
    ends = [0] * 5000
    nodes = [response["nodes"][name] for name in ("frame", "depth", "total", "samples")]
    for number, depth, total, samples in zip(*nodes, strict=True):
        start = ends[depth]
        ends[depth] = start + total
        ends[depth + 1] = start
        name, module, kind = response["frames"][number][:3]
        row = depth + len(above)
        boxes.append(Box(name, module, kind, row, start, start + total, whole, total, samples))
    return boxes


def changes(before: dict[str, list], after: dict[str, list]) -> list[str]:
    """Return the first lines by which two views differ, with the part of the page they are in."""
    differing = [
        f"{part}: {line}"
        for part in before
        for line in difflib.ndiff([*map(str, before[part])], [*map(str, after[part])])
        if line[0] in "+-"
    ]
    return differing[:16]


@dataclass
class View:
    """One page of the browser."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        page = self.page
        page.set_default_timeout(10_000)
        page.add_init_script(WATCH)
        page.on("console", lambda message: self._on_console(message.type, message.text))
        page.on("pageerror", self._on_exception)
        page.on("request", self._on_request)

    def _on_console(self, kind: str, text: str) -> None:
        if kind in {"error", "warning", "assert"}:
            self.complaints.append(f"console {kind}: {text}")

    def _on_exception(self, error: Error) -> None:
        self.complaints.append(f"exception: {error.stack or error.message}")

    def _on_request(self, request: Request) -> None:
        if not request.url.startswith(("http://127.0.0.1:", "data:", "blob:")):
            self.complaints.append(f"request to {request.url}")

    def expect(self, pattern: str) -> None:
        """Allow a complaint of the browser, as of a failed request on its console."""
        self.expected.append(pattern)

    def unexpected(self) -> list[str]:
        return [
            each
            for each in self.complaints
            if not any(re.search(pattern, each) for pattern in self.expected)
        ]

    # What is shown

    def settle(self) -> None:
        """Wait until the page has shown all responses, and the verdicts of deployments."""
        if not self.page.evaluate(IS_SETTLED):
            settled = "html:not([data-state=loading], [data-verdicts=pending])"
            self.page.locator(settled).wait_for(state="attached")

    def seen(self) -> dict[str, list]:
        """Return what is shown, except what follows the pointer, as lists to compare."""
        while True:
            self.settle()
            seen = self.page.evaluate(SEEN)
            if self.page.evaluate(STATE) != "loading":
                return seen

    def state(self) -> str:
        self.settle()
        return self.page.evaluate(STATE)

    def parameters(self) -> dict[str, str]:
        return dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(self.page.url).query))

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text()

    def boxes(self) -> list[Box]:
        """Return the service's boxes for the page's address, whose times must be fixed."""
        self.settle()
        address = urllib.parse.urlsplit(self.page.url)
        chosen = {"by": ["service"]}
        chosen |= urllib.parse.parse_qs(address.query, keep_blank_values=True)
        chosen["query"] = chosen.get("q", [""])
        asked = {name: chosen[name] for name in FLAME_PARAMETERS if name in chosen}
        size = self.canvas.bounding_box()
        asked["width"] = [str(round(size["width"]) if size else 1200)]
        query = urllib.parse.urlencode(asked, doseq=True)
        url = f"http://{address.netloc}/api/v1/flamegraph?{query}"
        with urllib.request.urlopen(url, timeout=30) as response:
            return boxes_of(json.loads(response.read()))

    def box(self, *names: str) -> Box:
        """Return the widest box of this name; with several, the one below the others."""
        self.settle()
        boxes, found = self.boxes(), None
        for name in names:
            inside = [
                each
                for each in boxes
                if each.name == name and (found is None or each.stands_on(found))
            ]
            assert inside, f"no box {name!r} among {sorted({each.name for each in boxes})}"
            found = max(inside, key=lambda each: each.share)
        assert found is not None
        return found

    # Actions

    def button(self, name: str, within: str = "body") -> Locator:
        return self.page.locator(within).get_by_role("button", name=name, exact=True)

    def chip(self, service: str) -> Locator:
        name = self.page.get_by_text(service, exact=True)
        return self.page.locator("#services button", has=name)

    @property
    def canvas(self) -> Locator:
        return self.page.locator("#graph canvas")

    def place_of(self, box: Box) -> dict[str, float]:
        """Return the middle of a box on the canvas."""
        size = self.canvas.bounding_box()
        assert size is not None
        rows = self.page.locator(".flame-space").bounding_box()["height"] / ROW_PX
        is_flame = self.page.locator("#view [value=flame]").is_checked()
        row = rows - 1 - box.row if is_flame else box.row
        scrolled = self.page.evaluate("document.querySelector('.flame-scroller').scrollTop")
        return {
            "x": (box.start + box.end) / 2 / box.width * size["width"],
            "y": (row + 0.5) * ROW_PX - scrolled,
        }

    def click_box(self, *names: str) -> Box:
        box = self.box(*names)
        self.canvas.click(position=self.place_of(box))
        self.settle()
        return box

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)
        self.settle()

    def tab_to(self, target: Locator | str, most: int = 150) -> Locator:
        """Press Tab until the element has the focus, or Shift and Tab if it comes before."""
        element = self.page.locator(target) if isinstance(target, str) else target
        handle = element.element_handle()
        key = "Shift+Tab" if self.page.evaluate(LIES_BEHIND, handle) else "Tab"
        for _ in range(most):
            if self.page.evaluate("(it) => it === document.activeElement", handle):
                return element
            self.page.keyboard.press(key)
        raise AssertionError(f"{target} cannot be reached with {key}")

    def back(self) -> None:
        self.page.evaluate(BACK)
        self.settle()

    def wait(self, is_true: Callable[[], object]) -> None:
        """Wait while the browser's events are handled."""
        wait_for(lambda: self.page.wait_for_timeout(10) or is_true(), 10)


class Contexts:
    """The contexts of a browser, one for each set of options.

    Each has a tab that stays, and with it the renderer process: to start one for each test takes a
    third of the CPU time of opening the page.
    """

    def __init__(self, browser: Browser) -> None:
        self._browser = browser
        self._kept: dict[str, BrowserContext] = {}

    def new_page(self, **options: object) -> Page:
        name = repr(sorted(options.items()))
        if name not in self._kept:
            usual = {"viewport": WIDE, "locale": "en-US", "timezone_id": "Asia/Kolkata"}
            self._kept[name] = self._browser.new_context(**usual | options)
        return self._kept[name].new_page()

    def keep_process(self, page: Page) -> None:
        """Open the tab that stays, on the site of a page, unless its context has one."""
        if len(page.context.pages) == 1:
            page.context.new_page().goto(urllib.parse.urljoin(page.url, "/healthz"))

    def forget(self) -> None:
        """Undo what a test has allowed the page, and what the page has stored."""
        for context in self._kept.values():
            context.clear_permissions()
            context.clear_cookies()


@contextlib.contextmanager
def visiting(contexts: Contexts) -> Iterator[Callable[..., View]]:
    """Open addresses, each in a tab of its own; complaints fail the test."""
    views = []

    def open_view(address: str, **options: object) -> View:
        view = View(contexts.new_page(**options))
        views.append(view)
        view.page.goto(address)
        view.settle()
        contexts.keep_process(view.page)
        return view

    yield open_view
    complaints = [each for view in views for each in view.unexpected()]
    for view in views:
        with contextlib.suppress(Error):  # where opening failed, the page has no storage
            view.page.evaluate("localStorage.clear()")
        view.page.close()
    contexts.forget()
    assert complaints == []


def unseen_in(view: View) -> list[str]:
    """Return texts anywhere in the document that contain invisible characters."""
    return view.page.evaluate(UNSEEN)


def barriers(view: View) -> list[str]:
    """Return what axe-core finds serious; what is passed, and why, is not sent here."""
    view.settle()
    options = {"resultTypes": ["violations"]}
    if view.page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches"):
        options["runOnly"] = ["color-contrast"]
    if not view.page.evaluate("'axe' in window"):
        view.page.evaluate(Axe().axe_script)
    found = view.page.evaluate("(options) => axe.run(options).then((it) => it.violations)", options)
    return [
        f"{each['impact']} {each['id']}: {node['target']} {node['failureSummary']}"
        for each in found
        if each["impact"] in {"serious", "critical"}
        for node in each["nodes"]
    ]


def outside(view: View) -> list[str]:
    return view.page.evaluate(OUTSIDE)


def walk_focus(view: View) -> list[str]:
    """Press Tab until the focus is back; return what had it. Each must look different with it."""
    page, reached = view.page, []
    while True:
        page.keyboard.press("Tab")
        place = page.evaluate(FOCUSED)
        if place is None or place["name"] in reached:
            return reached
        reached.append(place["name"])
        clip = {name: place[name] for name in ("x", "y", "width", "height")}
        focused = page.screenshot(clip=clip, caret="hide")
        page.evaluate("window.focused = document.activeElement; document.activeElement.blur()")
        assert page.screenshot(clip=clip, caret="hide") != focused, place["name"]
        page.evaluate("window.focused.focus({focusVisible: true, preventScroll: true})")
