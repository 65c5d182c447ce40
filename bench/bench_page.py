"""The page on 200,000 stacks, beside speedscope and d3-flame-graph on the same profile.

Workload: the hour of page_hour.py (200,000 stacks, 3.6 million boxes, from a fixed seed) as sixty
objects in a directory, and the real service over it. All three draw the graph alone, as wide as
Chromium's page of 1280 x 1024 without a window, each in a browser of its own.

What counts for all is the time from the arrival of the last byte of the profile (resource timing's
`responseEnd`: parsing is in it) until the frame with the drawing is painted: a message that was
posted in an animation frame, which comes after that frame. A zoom counts from the click's own time
stamp, so waiting for the main thread is in it. The page's are medians of several loads and zooms;
a zoom draws at once from what is there, and again when the service's finer answer has come.

speedscope and d3-flame-graph get all stacks as a file, and as a second line what the service
exports, which folds all but the largest 50,000. speedscope shows its "left heavy" view, which is a
flame graph. d3-flame-graph leaves out boxes below half a pixel and does not animate: as shipped it
makes an SVG group for each of the 3.6 million. Whoever has not painted after 120 s has given up.

Run: `python bench/bench_page.py [--alone] [--runs 7]`. It needs Debian's `chromium`, and npm to
fetch the other two into a temporary folder.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import orjson
import page_hour
from serving import Row, Serving, serving, show
from viewers import LIMIT_S, Browser, GaveUpError, other_viewers

from profiler.flamegraph import flamegraph
from profiler.formats import speedscope
from profiler.formats.reading import read_bytes
from storage.columns import Columns
from storage.formats import pprof
from storage.merging import merge_columns
from storage.objects.directory import DirectoryStore
from storage.objects.keys import DEFAULT_TENANT, NS_PER_S, ObjectKey, content16

START_NS = 1_780_000_000_000_000_000 // (3600 * NS_PER_S) * (3600 * NS_PER_S)
HOUR = {"from": START_NS // 10**6, "until": START_NS // 10**6 + 3_600_000}
WIDTH_PX = 1200
ZOOM_SHARE = 0.02
ZOOM_ROWS = (2, 5, 8, 11)
"""Boxes that are clicked: the leftmost, which is the largest, of each of these rows."""

PAINT = "everflame:first-paint"


def fill(folder: Path) -> Columns:
    """Store the hour and return all of it as one."""
    store, minutes = DirectoryStore(folder), []
    for profile in page_hour.minutes(START_NS):
        content = pprof.encode(profile)
        (host,), start_s = profile.accounting.hosts, profile.window.start_ns // NS_PER_S
        key = ObjectKey(DEFAULT_TENANT, host.host_id, start_s, 60, content16(content))
        store.put(key.text, content)
        minutes.append(Columns.of(profile))
    return merge_columns(minutes)


def ask(service: Serving, runs: int, samples: int) -> Iterator[Row]:
    """Ask the service itself, over its own cold cache first."""
    replies = [service.get("/api/v1/flamegraph", width=WIDTH_PX, **HOUR) for _ in range(runs)]
    widths = range(WIDTH_PX + 1, WIDTH_PX + 1 + runs)
    others = [service.get("/api/v1/flamegraph", width=width, **HOUR) for width in widths]
    assert {reply.status for reply in replies} == {200}
    answer = json.loads(replies[0].plain)
    assert answer["samples"] == samples
    yield "the answer for 1,200 px", len(answer["nodes"]["frame"]), "boxes", None
    yield "the answer, gzipped", len(replies[0].body) / 1000, "kB", 150
    yield "the answer, nothing cached", replies[0].took_s, "s", None
    again = statistics.median(reply.took_s for reply in replies[1:])
    yield "the answer, again", again, "s", None
    other = statistics.median(reply.took_s for reply in others)
    yield "the answer, for another width", other, "s", None


def draw(service: Serving, runs: int) -> Iterator[Row]:
    """Load the page and zoom in it, again and again in one browser."""
    url = f"{service.url}/?from={HOUR['from']}&until={HOUR['until']}&tab=graph"
    first, clicks, answers, presented, heaps = [], [], [], [], []
    with Browser() as browser:
        for _ in range(runs):
            browser.open(url)
            browser.wait_for(f"bench.isReady('{PAINT}')")
            first.append(browser.evaluate(f"bench.painted('{PAINT}')[0].end - bench.arrived(0)"))
            heaps.append(browser.heap_mb())
            for row in ZOOM_ROWS:
                browser.evaluate("bench.clear()")
                browser.click("#graph canvas", ZOOM_SHARE, row * 20 + 10)
                browser.wait_for(f"bench.isReady('{PAINT}')")
                clicks.append(browser.evaluate("bench.painted('everflame:zoom')[0].duration"))
                answered = f"bench.painted('{PAINT}')[0].end - bench.arrived(-1)"
                answers.append(browser.evaluate(answered))
                presented.append(browser.evaluate("bench.longest('click')"))
                browser.evaluate("bench.clear()")
                browser.press("Home")
                browser.wait_for(f"bench.isReady('{PAINT}')")
        peak_mb = browser.peak_mb()
    for what, values, limit in (
        ("first paint after the answer", first, 200),
        ("a zoom, from the click", clicks, 30),
        ("its finer answer, painted", answers, 30),
    ):
        yield f"{what}, median", statistics.median(values), "ms", limit
        yield f"{what}, longest of {len(values)}", max(values), "ms", None
    yield "a zoom's click until it is on a screen", statistics.median(presented), "ms", None
    yield "JavaScript heap", statistics.median(heaps), "MB", None
    yield "renderer process, peak RSS", peak_mb, "MB", None


def as_nested(graph: flamegraph.FlameGraph) -> bytes:
    """Write a tree as d3-flame-graph takes it: {name, value, children}."""
    names = [json.dumps(frame.function) for frame in graph.frames]
    parts, depth_before = [], -1
    columns = (graph.frame, graph.depth, graph.total)
    for frame, depth, total in zip(*(column.tolist() for column in columns), strict=True):
        if depth > depth_before:
            parts.append(',"children":[' if depth else "")
        else:
            parts.append("}" + "]}" * (depth_before - depth) + ",")
        parts.append(f'{{"name":{names[frame]},"value":{total}')
        depth_before = depth
    parts.append("}" + "]}" * depth_before)
    return "".join(parts).encode()


def write_files(
    folder: Path, profile: Columns, tree: flamegraph.FlameGraph, service: Serving
) -> tuple[float, float]:
    """Write what the others read: all stacks, and what the service exports.

    Return what the export took, and the share of it that is one folded box, the leftmost.
    """
    reply = service.get("/api/v1/export/hour.speedscope.json", by="service", **HOUR)
    assert reply.status == 200
    exported = reply.plain
    (folder / "export.speedscope.json").write_bytes(exported)
    folded = flamegraph.build(Columns.of(read_bytes(exported).profile))
    (folder / "export.nested.json").write_bytes(as_nested(folded))
    speedscope.STACK_LIMIT = page_hour.STACKS + 1
    (folder / "all.speedscope.json").write_bytes(speedscope.encode(profile, ("service",)))
    (folder / "all.nested.json").write_bytes(as_nested(tree))
    document = orjson.loads((folder / "all.speedscope.json").read_bytes())
    assert sum(document["profiles"][0]["weights"]) == profile.total_value
    assert folded.frames[folded.frame[1]] == speedscope.SMALLER
    return reply.took_s, float(folded.total[1] / folded.total[0])


def compare(folder: Path, folded: float) -> None:
    """Draw the same in the others and print what they took, or that they gave up."""
    files = (("all stacks", "all", 0.0), ("what the service exports", "export", folded))
    with other_viewers(folder) as viewers:
        for viewer, (what, name, left) in itertools.product(viewers, files):
            size_mb = (folder / f"{name}.{viewer.reads}").stat().st_size / 1e6
            started = time.monotonic()
            try:
                seen = viewer.draw(name, left + ZOOM_SHARE)
            except GaveUpError as error:
                result = f"gave up after {time.monotonic() - started:.0f} s: {error}"
            else:
                result = (
                    f"first paint {seen.first_s:.2f} s, zoom {seen.zoom},"
                    f" heap {seen.heap_mb:.0f} MB, renderer's peak {seen.peak_mb:.0f} MB"
                )
            print(f"{viewer.name}, {what} ({size_mb:.0f} MB): {result}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--alone", action="store_true", help="leave the other viewers out")
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        profile = fill(folder / "store")
        tree = flamegraph.build(profile, ("service",))
        print(f"{len(profile.stack_offsets) - 1:,} stacks, {len(tree):,} boxes,"
              f" {profile.total_samples:,} samples")  # fmt: skip
        with serving(str(folder / "store"), folder / "cache") as service:
            missed = show(ask(service, options.runs, profile.total_samples))
            missed += show(draw(service, options.runs))
            if not options.alone:
                (folder / "files").mkdir()
                took_s, folded = write_files(folder / "files", profile, tree, service)
                print(f"{'the export for speedscope, by the service':42} {took_s:10.2f} s")
        if not options.alone:
            print(f"the others, at most {LIMIT_S:.0f} s each:")
            compare(folder / "files", folded)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
