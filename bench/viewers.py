"""Chromium without a window, and other people's viewers in it: speedscope and d3-flame-graph."""

import contextlib
import functools
import http.server
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

from playwright.sync_api import Error, sync_playwright
from serving import all_pids, rss_mb

LIMIT_S = 120.0
PACKAGES = ("speedscope@1.25.0", "d3-flame-graph@5.0.0", "d3@7.9.0")
_ARGUMENTS = (
    "--no-sandbox",  # it is run by root
    "--disable-gpu",
    "--enable-unsafe-swiftshader",  # WebGL without a GPU, which speedscope needs
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-quic",
    "--disable-sync",
    "--no-first-run",
)
_SCREEN = {"width": 1280, "height": 1024}

_WATCH = """
window.bench = {
  clicks: [],

  painted(name) {
    return performance.getEntriesByName(name).map(({startTime, duration}) =>
      ({duration, end: startTime + duration}));
  },

  /** When the last byte of an answer of the service had come, by its place among them. */
  arrived(place) {
    return performance.getEntriesByType("resource")
      .filter(({name}) => name.includes("/api/v1/flamegraph")).at(place).responseEnd;
  },

  isReady(name) {
    return document.documentElement.dataset.state === "ready" && this.painted(name).length > 0;
  },

  clear() {
    performance.clearMeasures();
    this.clicks.length = 0;
  },

  /** Event Timing: from the event until the browser has put the next frame on the screen. */
  longest(type) {
    const events = this.clicks.filter(({name}) => name === type);
    return Math.max(0, ...events.map(({duration}) => duration));
  },

  /** A message that is posted in an animation frame comes after what that frame paints. */
  afterPaint(done) {
    requestAnimationFrame(() => {
      const {port1, port2} = new MessageChannel();
      port1.onmessage = () => done(performance.now());
      port2.postMessage(null);
    });
  },

  /** Note when the first frame is painted in which `condition` holds. */
  noteFirst(condition) {
    if (!condition()) return requestAnimationFrame(() => this.noteFirst(condition));
    this.afterPaint((at) => {
      const files = performance.getEntriesByType("resource");
      this.first = at - files.find(({name}) => name.includes(".json")).responseEnd;
    });
  },

  /** Note when the frame after the next event of this type is painted. */
  noteNext(type) {
    addEventListener(type, ({timeStamp}) => this.afterPaint((at) => {
      this.next = at - timeStamp;
    }), {capture: true, once: true});
  },
};
new PerformanceObserver((list) => bench.clicks.push(...list.getEntries()))
  .observe({type: "event", durationThreshold: 16, buffered: true});
"""

_D3_PAGE = """<!doctype html><meta charset="utf-8"><title>d3-flame-graph</title>
<body style="margin: 0"><div id="chart"></div>
<script src="/node_modules/d3/dist/d3.min.js"></script>
<script src="/node_modules/d3-flame-graph/dist/d3-flamegraph.umd.min.js"></script>
<script>
const chart = flamegraph.default().width(innerWidth).inverted(true).minFrameSize(0.5)
  .transitionDuration(0);
fetch(location.hash.slice(1)).then((response) => response.json()).then((data) => {
  d3.select("#chart").datum(data).call(chart);
  window.isDrawn = true;
});
</script>
"""


class GaveUpError(Exception):
    """It has not painted within the limit, or has crashed."""


class Seen(NamedTuple):
    """What a viewer took until it had painted, after the file had come and after a click."""

    first_s: float
    zoom: str
    heap_mb: float
    peak_mb: float


class Browser:
    """One Chromium with one page at a time."""

    def __enter__(self) -> Self:
        program = shutil.which("chromium")
        if program is None:
            raise SystemExit("there is no chromium: apt-get install chromium")
        self._stack = contextlib.ExitStack()
        playwright = self._stack.enter_context(sync_playwright())
        self._browser = playwright.chromium.launch(executable_path=program, args=list(_ARGUMENTS))
        self._stack.callback(self._browser.close)
        self._page: Any = None
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def open(self, url: str) -> None:
        if self._page is not None:
            self._page.close()
        self._page = self._browser.new_page(viewport=_SCREEN)
        self._page.set_default_timeout(1000 * LIMIT_S)
        self._page.add_init_script(_WATCH)
        self._page.goto(url, wait_until="commit")

    def evaluate(self, script: str) -> Any:
        return self._page.evaluate(script)

    def wait_for(self, condition: str) -> None:
        """Wait until a script is true.

        Raises:
            GaveUpError: it was not within the limit, or the page has crashed.
        """
        # What is asked of a page whose main thread is busy is answered when it is free: never, if
        # it stays so. Without its process there is an answer.
        end = threading.Timer(LIMIT_S, self._kill_renderers)
        end.start()
        try:
            while end.is_alive():
                if self._page.evaluate(condition):
                    return
                time.sleep(0.02)
        except Error as error:
            if not end.is_alive():
                raise GaveUpError("it had not painted") from error
            raise GaveUpError(f"its page crashed: {str(error).splitlines()[0]}") from error
        finally:
            end.cancel()
        raise GaveUpError("it had not painted")

    def _kill_renderers(self) -> None:
        for pid in self._renderers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _renderers(self) -> Iterator[int]:
        for pid in all_pids(os.getpid()):
            with contextlib.suppress(OSError):
                if b"--type=renderer" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    yield pid

    def click(self, selector: str, share: float, down_px: float, count: int = 1) -> None:
        """Click (or double-click) an element at a share of its width, so many pixels down."""
        element = self._page.locator(selector).first
        element.scroll_into_view_if_needed()
        box = element.bounding_box()
        self._page.mouse.click(
            box["x"] + share * box["width"], box["y"] + down_px, click_count=count
        )

    def press(self, key: str) -> None:
        self._page.keyboard.press(key)

    def heap_mb(self) -> float:
        """Return what JavaScript holds after a garbage collection, array buffers included."""
        session = self._page.context.new_cdp_session(self._page)
        session.send("HeapProfiler.collectGarbage")
        usage = session.send("Runtime.getHeapUsage")
        session.detach()
        return (usage["usedSize"] + usage.get("backingStorageSize", 0)) / 1e6

    def peak_mb(self) -> float:
        """Return the largest peak of memory of the processes that draw pages."""
        return max((rss_mb(pid, "VmHWM") for pid in self._renderers()), default=0.0)


class Viewer(NamedTuple):
    """A viewer: where it is, the files it reads, when it has drawn and how one zooms in it."""

    name: str
    url: str
    reads: str
    is_drawn: str
    zoom_event: str
    zoom: Callable[[Browser, float], None]
    """Into the box at a share of the width, in the sixth row or so."""

    def draw(self, name: str, share: float) -> Seen:
        """Open a file and zoom once, at a share of the width.

        Raises:
            GaveUpError: see there.
        """
        with Browser() as browser:
            browser.open(self.url.format(file=f"/files/{name}.{self.reads}"))
            browser.evaluate(f"bench.noteFirst(() => {self.is_drawn})")
            browser.wait_for("bench.first")
            first_s = browser.evaluate("bench.first") / 1000
            heap_mb = browser.heap_mb()
            browser.evaluate(f"bench.noteNext('{self.zoom_event}')")
            try:
                self.zoom(browser, share)
                browser.wait_for("bench.next")
                zoom = f"{browser.evaluate('bench.next'):,.0f} ms"
            except (GaveUpError, Error) as error:
                zoom = f"not within the limit ({str(error).splitlines()[0]})"
            return Seen(first_s, zoom, heap_mb, browser.peak_mb())


@contextlib.contextmanager
def other_viewers(files: Path) -> Iterator[list[Viewer]]:
    """Fetch the two, and serve them and the files on loopback for the length of the block."""
    root = files.parent
    npm = [str(Path(sys.executable).parent / "npm"), "install", "--prefix", str(root)]
    options = ["--ignore-scripts", "--no-audit", "--no-fund", "--no-save", "--loglevel=error"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    command = [*npm, *options, *PACKAGES]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    (root / "d3.html").write_text(_D3_PAGE)
    handler = functools.partial(_Quiet, directory=str(root))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        base = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield [
                Viewer(
                    "speedscope",
                    f"{base}/node_modules/speedscope/dist/release/index.html"
                    "#view=left-heavy&profileURL={file}",
                    "speedscope.json",
                    # The flame graph and its map lie on the one for WebGL.
                    "document.querySelectorAll('canvas').length >= 3",
                    "dblclick",
                    lambda browser, share: browser.click("canvas >> nth=0", share, 300, count=2),
                ),
                Viewer(
                    "d3-flame-graph",
                    f"{base}/d3.html#{{file}}",
                    "nested.json",
                    "window.isDrawn",
                    "click",
                    lambda browser, share: browser.click("#chart svg", share, 6 * 18 + 9),
                ),
            ]
        finally:
            server.shutdown()
            thread.join()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass
