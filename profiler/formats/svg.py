"""SVG: a profile as one drawing to send around, self-contained and without scripts.

An icicle: the root on top, callees below. Colours say the kind of code and vary with the module; a
style sheet inside holds them for light and dark screens. Text is cut to its box by the widths of a
fixed-width font, so it needs no clipping paths. Every box has its full name and counts as a
tooltip. What is narrower than half a pixel is summed into grey boxes.
"""

import colorsys
import zlib
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import NamedTuple
from xml.sax.saxutils import escape

import numpy as np

from profiler.flamegraph import flamegraph
from profiler.flamegraph.flamegraph import FlameGraph
from profiler.flamegraph.stacks import Group
from profiler.text import counted, fit, fit_name, percent, quantity
from storage.columns import Columns
from storage.profile import Window
from symbolizer.location import Frame, Kind

WIDTH_PX = 1200
MARGIN_PX = 16
INNER_PX = WIDTH_PX - 2 * MARGIN_PX
_HEADER_PX = 132
FOOTER_PX = 34
ROW_PX = 18
_CELL_PX = 6.63
"""Width of a character: 11 px of the widest common fixed-width font, DejaVu Sans Mono (0.602)."""
_TEXT_LEAST_PX = 3 * _CELL_PX
_VARIANTS = 6


class _Shade(NamedTuple):
    """A kind's colour: hue in degrees, saturation and lightness for light and for dark screens."""

    hue: float
    saturation: float
    light: float
    dark_saturation: float
    dark: float


_SHADES = {
    Kind.NATIVE: _Shade(34, 0.92, 0.74, 0.52, 0.34),
    Kind.KERNEL: _Shade(8, 0.78, 0.75, 0.44, 0.36),
    Kind.INLINED: _Shade(54, 0.80, 0.74, 0.42, 0.29),
    Kind.PYTHON: _Shade(212, 0.76, 0.77, 0.42, 0.37),
    Kind.JIT: _Shade(142, 0.46, 0.71, 0.36, 0.29),
    Kind.GO: _Shade(186, 0.58, 0.71, 0.50, 0.29),
    Kind.LABEL: _Shade(220, 0.14, 0.87, 0.12, 0.27),
    Kind.REST: _Shade(220, 0.04, 0.90, 0.04, 0.20),
}

_STYLE = """
svg{background:#fff;color-scheme:light dark}
text{font:11px ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace;fill:#1b1f24}
.p{fill:#fff}.h{font:600 18px system-ui,"DejaVu Sans",sans-serif}
.s,.c,.l{font:12px system-ui,"DejaVu Sans",sans-serif;fill:#59636e}
.v{font:600 17px system-ui,"DejaVu Sans",sans-serif}.l{fill:#1b1f24}.e{text-anchor:end}
.w{fill:#b42318}rect{shape-rendering:crispEdges}g:hover>rect{stroke:#1b1f24}g>text{pointer-events:none}
"""
_DARK_STYLE = """
svg{background:#14171c}text,.l{fill:#e8eaed}.p{fill:#14171c}.s,.c{fill:#9aa4b2}
.w{fill:#ff8b7e}g:hover>rect{stroke:#fff}
"""


def draw(profile: Columns, by: Sequence[str] = ("comm",), *, by_line: bool = False) -> bytes:
    """Draw a profile, with the labels in `by` as boxes below the root.

    `by_line` draws a box for each source line of a function.
    """
    whole = flamegraph.build(profile, by, Group.LINE if by_line else Group.FUNCTION)
    graph = whole.prune(INNER_PX)
    height = _HEADER_PX + (int(graph.depth.max()) + 1) * ROW_PX + FOOTER_PX
    title = _title(profile)
    summary = "; ".join(f"{value} {caption}" for value, caption, _ in _figures(profile))
    classes: dict[str, tuple[Kind, int | None]] = {}
    boxes = "\n".join(_boxes(graph, classes, by_line=by_line))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{attribute(title)}"',
        f' viewBox="0 0 {WIDTH_PX} {height}" width="{WIDTH_PX}" height="{height}">',
        f"<title>{escape(title)}</title>",
        f"<desc>{escape(f'{_subtitle(profile)}; {summary}')}</desc>",
        f"<style>{_STYLE}{_colours(classes, is_dark=False)}",
        f"@media (prefers-color-scheme:dark){{{_DARK_STYLE}{_colours(classes, is_dark=True)}}}",
        "</style>",
        f'<rect class="p" width="{WIDTH_PX}" height="{height}"/>',
        *_header(profile, title),
        *_legend(whole),
        boxes,
        footer(
            "Hover over a box for its full name and counts.",
            graph.cut_nodes,
            percent(graph.cut_total, int(graph.total[0])),
            height,
        ),
        "</svg>\n",
    ]
    return "\n".join(parts).encode()


def _title(profile: Columns) -> str:
    hosts = profile.accounting.hosts
    what = "CPU time" if profile.type == "cpu" else profile.type.capitalize()
    if not hosts:
        return what
    return f"{what} on {hosts[0].name}" if len(hosts) == 1 else f"{what} on {len(hosts)} hosts"


def span_text(window: Window) -> str:
    """Say when a window was, and how long it is."""
    start_ns, end_ns = window
    if end_ns <= start_ns:
        return "window not known"
    start, end = (datetime.fromtimestamp(ns // 10**9, UTC) for ns in (start_ns, end_ns))
    until = f"{end:%H:%M:%S}" if start.date() == end.date() else f"{end:%Y-%m-%d %H:%M:%S}"
    length = quantity(end_ns - start_ns, "nanoseconds")
    return f"{start:%Y-%m-%d %H:%M:%S} to {until} UTC ({length})"


def _subtitle(profile: Columns) -> str:
    window = span_text(profile.window)
    if profile.type != "cpu" or profile.window.end_ns <= profile.window.start_ns:
        return window
    return f"{window}, {round(1e9 / profile.period_ns)} samples a second and CPU"


def _figures(profile: Columns) -> list[tuple[str, str, bool]]:
    """Return the header's figures: value, caption, and whether it is a warning."""
    accounting, length_ns = profile.accounting, profile.window.end_ns - profile.window.start_ns
    figures = [
        (quantity(profile.total_value, profile.unit), "in total", False),
        (f"{profile.total_samples:,}", "samples", False),
    ]
    if profile.unit == "nanoseconds" and length_ns > 0:
        of = f" of {accounting.cpus}" if accounting.cpus and len(accounting.hosts) == 1 else ""
        cores = profile.total_value / length_ns
        figures.append((f"{cores:.{2 if cores < 10 else 1}f}{of}", "cores used", False))
    if accounting.hosts:
        lost = sum(accounting.lost.values())
        share = f" ({percent(lost, accounting.ticks)} of all)" if lost else ""
        figures.append((f"{lost:,}", f"samples lost{share}", lost > 0))
    return figures


def _header(profile: Columns, title: str) -> Iterator[str]:
    yield f'<text class="h" x="{MARGIN_PX}" y="32">{escape(fit(title, 100))}</text>'
    yield f'<text class="s" x="{MARGIN_PX}" y="52">{escape(_subtitle(profile))}</text>'
    x = float(MARGIN_PX)
    for value, caption, is_warning in _figures(profile):
        warning = " w" if is_warning else ""
        yield f'<text class="v{warning}" x="{x:.0f}" y="86">{escape(value)}</text>'
        yield f'<text class="c" x="{x:.0f}" y="104">{escape(caption)}</text>'
        x += 36 + max(len(value) * 10.5, len(caption) * 6.8)


def _legend(graph: FlameGraph) -> Iterator[str]:
    """List the kinds by their share of self time, on the right."""
    frame_kinds = np.array([list(Kind).index(frame.kind) for frame in graph.frames])
    own = dict.fromkeys(Kind, 0)
    for i, kind in enumerate(Kind):
        own[kind] = int(graph.self[frame_kinds[graph.frame] == i].sum())
    drawn = {frame.kind for frame in graph.frames} - {Kind.LABEL, Kind.REST}
    shown = [(kind, own[kind]) for kind in Kind if kind in drawn]
    shown.sort(key=lambda each: -each[1])
    for i, (kind, total) in enumerate(shown):
        column, row = divmod(i, 4)
        x, y = WIDTH_PX - MARGIN_PX - 150 * (column + 1), 26 + 21 * row
        yield f'<rect class="{_class(kind)}" x="{x}" y="{y - 11}" width="14" height="14"/>'
        yield f'<text class="l" x="{x + 22}" y="{y}">{kind}</text>'
        share = percent(total, int(graph.total[0]))
        yield f'<text class="s e" x="{x + 150}" y="{y}">{share}</text>'


def _boxes(
    graph: FlameGraph, classes: dict[str, tuple[Kind, int | None]], *, by_line: bool
) -> Iterator[str]:
    """Draw every node, and collect the classes that the style sheet must hold."""
    scale = INNER_PX / max(1, int(graph.total[0]))
    left = graph.left()
    for kind in Kind:
        classes[_class(kind)] = (kind, None)
    columns = (graph.frame, graph.depth, graph.total, graph.self, graph.samples)
    nodes = zip(left.tolist(), *(column.tolist() for column in columns), strict=True)
    for start, number, depth, total, own, samples in nodes:
        frame = graph.frames[number]
        variant = zlib.crc32(frame.module.encode()) % _VARIANTS if frame.module else None
        class_name = _class(frame.kind, variant)
        classes[class_name] = (frame.kind, variant)
        place = Place(start * scale, _HEADER_PX + depth * ROW_PX, total * scale)
        tooltip = _tooltip(frame, graph, total, own, samples)
        yield box(frame, place, class_name, tooltip, by_line=by_line)


class Place(NamedTuple):
    """Where a box is, in pixels: left edge from the margin on, upper edge, width."""

    left: float
    top: int
    width: float


def box(frame: Frame, place: Place, class_name: str, tooltip: str, *, by_line: bool) -> str:
    """Draw a box of a flame graph, with its name where there is room for it."""
    x, y, width = MARGIN_PX + place.left, place.top, place.width
    is_rest = frame.kind is Kind.REST
    gap = 1 if width > 3 else 0
    # Crisp edges snap to whole pixels: narrower than one, a box might not show at all.
    drawn = width - gap if is_rest else max(1.0, width - gap)
    label = ""
    if width >= _TEXT_LEAST_PX and not is_rest:
        name = escape(fit_name(frame, int((width - 6) / _CELL_PX), with_line=by_line))
        label = f'<text x="{x + 3:.2f}" y="{y + 12.5}">{name}</text>'
    return (
        f'<g><title>{escape(tooltip)}</title><rect class="{class_name}" x="{x:.2f}" y="{y}" '
        f'width="{drawn:.2f}" height="{ROW_PX - 1}"/>{label}</g>'
    )


def _tooltip(frame: Frame, graph: FlameGraph, total: int, own: int, samples: int) -> str:
    share = percent(total, int(graph.total[0]))
    counts = f"{share}, {quantity(total, graph.unit)}, {counted(samples, 'sample')}"
    return f"{what_it_is(frame)}\n{counts}, self {quantity(own, graph.unit)}"


def what_it_is(frame: Frame) -> str:
    """Return the first lines of a tooltip: the function, and where it is."""
    place = f"{frame.file}:{frame.line}" if frame.line else frame.file
    where = " ".join(filter(None, (frame.module, f"({frame.kind})", place)))
    return f"{frame.function}\n{where}"


def footer(said: str, cut_nodes: int, cut_share: str, height: int) -> str:
    """Draw the last line: what it says, and how much was too narrow and is drawn as grey boxes."""
    if cut_nodes:
        are = "box under half a pixel is" if cut_nodes == 1 else "boxes under half a pixel are"
        said = f"{said} {cut_nodes:,} {are} drawn as grey sums, {cut_share} of the total."
    return f'<text class="s" x="{MARGIN_PX}" y="{height - 12}">{escape(said)}</text>'


def _class(kind: Kind, variant: int | None = None) -> str:
    return f"k{list(Kind).index(kind)}{'' if variant is None else f'v{variant}'}"


def _colours(classes: dict[str, tuple[Kind, int | None]], is_dark: bool) -> str:
    rules = []
    for name, (kind, variant) in sorted(classes.items()):
        shade = _SHADES[kind]
        saturation = shade.dark_saturation if is_dark else shade.saturation
        lightness = shade.dark if is_dark else shade.light
        hue = shade.hue
        if variant is not None:
            # Modules differ in hue and a little in lightness, never as far as the next kind.
            hue += 3.4 * (variant - (_VARIANTS - 1) / 2)
            lightness += 0.014 * ((variant * 5) % _VARIANTS - (_VARIANTS - 1) / 2)
        rgb = colorsys.hls_to_rgb(hue / 360 % 1, lightness, saturation)
        rules.append(f".{name}{{fill:#{''.join(f'{round(255 * part):02x}' for part in rgb)}}}")
    return "".join(rules)


def attribute(text: str) -> str:
    return escape(text, {'"': "&quot;"})
