"""SVG of a comparison: two flame graphs as one drawing, in the manner of profiler.formats.svg.

Only what has changed is coloured, orange where it costs more and blue where it costs less, which
people with any colour blindness can tell apart. Colour is never the only sign: new is hatched,
what is gone is dashed, what moved is dotted, and a legend that is always there says so. Boxes are
as wide as the mean of both sides in cores a host.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple
from xml.sax.saxutils import escape

from profiler.comparison.sides import Side
from profiler.comparison.verdict import NoiseSource
from profiler.flamegraph.differential import VERDICTS, Pair, UnionGraph
from profiler.flamegraph.flamegraph import Screen, lefts
from profiler.formats.svg import (
    FOOTER_PX,
    INNER_PX,
    MARGIN_PX,
    ROW_PX,
    WIDTH_PX,
    Place,
    attribute,
    box,
    footer,
    span_text,
    what_it_is,
)
from profiler.text import counted, fit, percent, quantity
from symbolizer.location import Kind

SCREEN = Screen(INNER_PX)
_HEADER_PX = 156
_LINE_PX = 18
_MOST_WARNINGS = 5


class Paint(NamedTuple):
    """A fill, and what is drawn over it: stripes or an edge."""

    fill: str
    mark: str = ""


COLOURS: Mapping[str, Mapping[str, Paint]] = {
    "light": {
        "unchanged": Paint("#e3e6ea"),
        "more": Paint("#f5a04c"),
        "less": Paint("#7fb2f0"),
        "new": Paint("#fbd3a8", "#f0974a"),
        "gone": Paint("#dbe9fb", "#1d5fb4"),
        "moved": Paint("#e3e6ea", "#4a5360"),
        "too little data": Paint("#e3e6ea"),
        "rest": Paint("#f0f1f3"),
        "text": Paint("#1b1f24"),
    },
    "dark": {
        "unchanged": Paint("#333a44"),
        "more": Paint("#9a4f00"),
        "less": Paint("#1f5fa8"),
        "new": Paint("#6e3a10", "#a4530f"),
        "gone": Paint("#16324f", "#7fb2f0"),
        "moved": Paint("#333a44", "#b4bdc9"),
        "too little data": Paint("#333a44"),
        "rest": Paint("#262b32"),
        "text": Paint("#e8eaed"),
    },
}
"""By what is said of a box. Text on each, stripes too, has a contrast of 4.5:1 or more (WCAG 2.2,
1.4.3); the page has the same (profiler/web/colour.js)."""
_LEGEND = {
    "more": "costs more",
    "less": "costs less",
    "new": "new",
    "gone": "gone",
    "moved": "other callers",
    "unchanged": "unchanged",
}
_STYLE = """
svg{background:#fff;color-scheme:light dark}
text{font:11px ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace;fill:#1b1f24}
.p{fill:#fff}.h{font:600 18px system-ui,"DejaVu Sans",sans-serif}
.s,.c,.l{font:12px system-ui,"DejaVu Sans",sans-serif;fill:#59636e}
.v{font:600 17px system-ui,"DejaVu Sans",sans-serif}.l{fill:#1b1f24}
.w{font:12px system-ui,"DejaVu Sans",sans-serif;fill:#b42318}
rect{shape-rendering:crispEdges}g:hover>rect{stroke:#1b1f24}g>text{pointer-events:none}
"""
_DARK_STYLE = """
svg{background:#14171c}text,.l{fill:#e8eaed}.p{fill:#14171c}.s,.c{fill:#9aa4b2}
.w{fill:#ff8b7e}g:hover>rect{stroke:#fff}
"""
_HATCHES = (
    '<defs><pattern id="new" width="6" height="6" patternUnits="userSpaceOnUse"'
    ' patternTransform="rotate(45)"><rect class="n" width="6" height="6"/>'
    '<rect class="m" width="2" height="6"/></pattern></defs>'
)
_NOISE = {
    NoiseSource.HISTORY: "judged by {} earlier positions",
    NoiseSource.WITHIN: "judged by {} comparisons of parts of both times and of hosts",
    NoiseSource.FLEET: "judged by what is usual for {} other services on the host",
    NoiseSource.PRIOR: "judged by what is usual for functions of services",
    NoiseSource.HOSTS: "judged by {} hosts",
    NoiseSource.GROUPS: "judged by {} groups of hosts",
    NoiseSource.REPLICATES: "judged by {} runs",
    NoiseSource.NONE: "too little data for a verdict",
}


def draw(pair: Pair, graph: UnionGraph, *, by_line: bool = False) -> bytes:
    """Draw a graph of a comparison, cut for SCREEN. Its boxes are functions, or lines of them."""
    warnings = pair.found.warnings[:_MOST_WARNINGS]
    top = _HEADER_PX + _LINE_PX * len(warnings)
    height = top + (int(graph.depth.max()) + 1) * ROW_PX + FOOTER_PX
    title = _title(pair)
    summary = "; ".join(f"{value} {caption}" for value, caption in _figures(pair))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{attribute(title)}"',
        f' viewBox="0 0 {WIDTH_PX} {height}" width="{WIDTH_PX}" height="{height}">',
        f"<title>{escape(title)}</title>",
        f"<desc>{escape(summary)}</desc>",
        f"<style>{_STYLE}{_rules('light')}",
        f"@media (prefers-color-scheme:dark){{{_DARK_STYLE}{_rules('dark')}}}",
        "</style>",
        _HATCHES,
        f'<rect class="p" width="{WIDTH_PX}" height="{height}"/>',
        *_header(pair, title),
        *_legend(),
        *(
            f'<text class="w" x="{MARGIN_PX}" y="{_HEADER_PX + _LINE_PX * i}">'
            f"{escape(fit(warning, 160))}</text>"
            for i, warning in enumerate(warnings)
        ),
        *_boxes(pair, graph, top, by_line=by_line),
        footer(
            "Hover over a box for its full name and both costs.",
            graph.cut_nodes,
            _cut_share(pair, graph),
            height,
        ),
        "</svg>\n",
    ]
    return "\n".join(parts).encode()


def _title(pair: Pair) -> str:
    what = "CPU time" if pair.after.type == "cpu" else pair.after.type.capitalize()
    query = pair.found.after.query
    return f"{what} before and after{f' of {query}' if query not in ('', '{}') else ''}"


def _side_text(side: Side) -> str:
    parts = [span_text(side.window), counted(round(float(side.samples.sum())), "sample")]
    if side.hosts and not side.hosts[0].startswith("file "):
        parts.append(counted(len(side.hosts), "host"))
    if side.versions:
        parts.append(f"version {', '.join(side.versions[:4])}")
    return ", ".join(parts)


def _costs(pair: Pair) -> tuple[str, str]:
    if pair.after.unit == "nanoseconds":
        found = pair.found
        return f"{found.before.cores:.3g} → {found.after.cores:.3g}", "cores a host"
    totals = (quantity(side.total_value, side.unit) for side in (pair.before, pair.after))
    return " → ".join(totals), "in total"


def _figures(pair: Pair) -> list[tuple[str, str]]:
    found = pair.found
    changes = Counter(str(function.change) for function in found.functions)
    more, less = (
        changes[one] + changes[other] for one, other in (("more", "new"), ("less", "gone"))
    )
    return [
        _costs(pair),
        (f"{more:,}", "functions cost more"),
        (f"{less:,}", "functions cost less"),
        (f"{found.common.relative:+.1%}", "all in common"),
        (f"{len(pair.moved):,}", "moved between callers"),
    ]


def _header(pair: Pair, title: str) -> Iterator[str]:
    yield f'<text class="h" x="{MARGIN_PX}" y="32">{escape(fit(title, 100))}</text>'
    sides = (("before", pair.found.before), ("after", pair.found.after))
    for i, (name, side) in enumerate(sides):
        judged = f"; {_judged(pair)}" if i else ""
        text = fit(f"{name}: {_side_text(side)}{judged}", 160)
        yield f'<text class="s" x="{MARGIN_PX}" y="{52 + _LINE_PX * i}">{escape(text)}</text>'
    x = float(MARGIN_PX)
    for value, caption in _figures(pair):
        yield f'<text class="v" x="{x:.0f}" y="100">{escape(value)}</text>'
        yield f'<text class="c" x="{x:.0f}" y="117">{escape(caption)}</text>'
        x += 36 + max(len(value) * 10.5, len(caption) * 6.8)


def _judged(pair: Pair) -> str:
    provisional = ", provisional" if pair.found.is_provisional else ""
    return _NOISE[pair.found.source].format(pair.found.positions) + provisional


def _legend() -> Iterator[str]:
    """Say what is drawn how, whatever there is of it."""
    x = float(MARGIN_PX)
    for verdict, words in _LEGEND.items():
        yield f'<rect class="{_class(verdict)}" x="{x:.0f}" y="128" width="22" height="12"/>'
        yield f'<text class="l" x="{x + 28:.0f}" y="139">{words}</text>'
        x += 56 + len(words) * 6.8


def _boxes(pair: Pair, graph: UnionGraph, top: int, *, by_line: bool) -> Iterator[str]:
    widths = graph.widths(pair.scale)
    scale = INNER_PX / max(float(widths[0]), 1e-300)
    left = lefts(graph.depth, graph.parent, widths)
    columns = (graph.frame, graph.depth, graph.verdict, left * scale, widths * scale)
    nodes = zip(*(column.tolist() for column in columns), strict=True)
    for i, (number, depth, code, start, width) in enumerate(nodes):
        frame = graph.frames[number]
        class_name = "r" if frame.kind is Kind.REST else _class(VERDICTS[code])
        place = Place(start, top + depth * ROW_PX, width)
        yield box(frame, place, class_name, _tooltip(pair, graph, i), by_line=by_line)


def _tooltip(pair: Pair, graph: UnionGraph, i: int) -> str:
    frame = graph.frames[graph.frame[i]]
    lines = [what_it_is(frame)]
    for name, totals, samples, scale in (
        ("before", graph.before, graph.before_samples, pair.scale.before),
        ("after", graph.after, graph.after_samples, pair.scale.after),
    ):
        said = [
            f"{name} {percent(int(totals[i]), int(totals[0]))}",
            quantity(int(totals[i]), pair.after.unit),
            counted(int(samples[i]), "sample"),
        ]
        if pair.after.unit == "nanoseconds":
            said.append(f"{totals[i] * scale:.3g} cores a host")
        lines.append(", ".join(said))
    return "\n".join([*lines, VERDICTS[graph.verdict[i]]])


def _cut_share(pair: Pair, graph: UnionGraph) -> str:
    cut = graph.cut_before * pair.scale.before + graph.cut_after * pair.scale.after
    return percent(round(1e6 * cut), round(1e6 * 2 * float(graph.widths(pair.scale)[0])))


def _class(verdict: str) -> str:
    return f"d{VERDICTS.index(verdict)}"


def _rules(theme: str) -> str:
    paints = COLOURS[theme]
    rules = [f".{_class(name)}{{fill:{paints[name].fill}}}" for name in VERDICTS]
    rules.append(f".r{{fill:{paints['rest'].fill}}}")
    rules.append(f".n{{fill:{paints['new'].fill}}}.m{{fill:{paints['new'].mark}}}")
    rules.append(f".{_class('new')}{{fill:url(#new)}}")
    for name, dashes in (("gone", "4 2"), ("moved", "1 2")):
        edge = f"stroke:{paints[name].mark};stroke-width:1.5;stroke-dasharray:{dashes}"
        rules.append(f".{_class(name)}{{{edge}}}")
    return "".join(rules)
