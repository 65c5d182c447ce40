"""Profiles in a terminal: the table of functions, and a flame graph of coloured cells.

Everything returns text without a final line end, cut to a width in cells. Names hold no control
characters (`symbolizer.text.readable`), so what is printed cannot steer the terminal.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from typing import TextIO

from profiler.flamegraph import flamegraph
from profiler.flamegraph.flamegraph import FlameGraph
from profiler.flamegraph.paths import FunctionRow
from profiler.flamegraph.views import View
from profiler.text import cells, counted, fit, fit_name, pad, percent, quantity
from storage.columns import Columns
from symbolizer.location import Frame, Kind

_WIDTH_WITHOUT_TERMINAL = 100
_LEVELS = 60
"""Lines of a flame graph of cells; deeper levels are announced, not drawn."""
_LEAST_SHARE_PERCENT = 1.0
"""What a tree of text shows; smaller nodes are summed, and sums as small are left out."""

# 256-colour numbers, two shades each, so that neighbours of one kind can be told apart.
_COLOURS = {
    Kind.NATIVE: (215, 222),
    Kind.KERNEL: (210, 217),
    Kind.INLINED: (228, 230),
    Kind.PYTHON: (111, 153),
    Kind.JIT: (114, 157),
    Kind.GO: (80, 123),
    Kind.LABEL: (252, 249),
    Kind.REST: (245, 243),
}
_RESET = "\x1b[0m"


def width(stream: TextIO) -> int:
    """Return the terminal's width, or a fixed one if the stream is not a terminal."""
    if not stream.isatty():
        return _WIDTH_WITHOUT_TERMINAL
    return max(20, shutil.get_terminal_size((_WIDTH_WITHOUT_TERMINAL, 24)).columns)


def has_colours(stream: TextIO) -> bool:
    """Return whether to colour: on a terminal, unless NO_COLOR is set (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def function_table(profile: Columns, width: int, limit: int, *, python_native: bool = False) -> str:
    """Lay out the functions with the largest self time, with what they call in the total."""
    rows = flamegraph.top_functions(View(python_native=python_native).folded(profile))
    whole = profile.total_value
    table = [("SELF", "", "TOTAL", "", "FUNCTION", "MODULE")]
    table += [_row(row, whole, profile.unit) for row in rows[:limit]]
    numbers = [max(cells(row[i]) for row in table) for i in range(4)]
    room = max(10, width - sum(numbers) - 2 * 5)
    module_width = min(max(cells(row[5]) for row in table), max(6, room // 3))
    lines = []
    for row in table:
        left = [pad(row[0], numbers[0]) if row is table[0] else row[0].rjust(numbers[0])]
        left += [text.rjust(size) for text, size in zip(row[1:4], numbers[1:], strict=True)]
        if row is table[0]:
            left[2] = pad(row[2], numbers[2])
        line = "  ".join([*left, pad(row[4], room - module_width), fit(row[5], module_width)])
        lines.append(fit(line.rstrip(), width))
    if len(rows) > limit:
        lines.append(fit(f"and {counted(len(rows) - limit, 'more function')}", width))
    return "\n".join(lines)


def flame_chart(
    profile: Columns, by: Sequence[str], stream: TextIO, *, python_native: bool = False
) -> str:
    """Draw the flame graph as the stream can show it: in coloured cells, or as a tree of text."""
    graph = flamegraph.build(View(python_native=python_native).folded(profile), by)
    draw = icicle if has_colours(stream) else tree
    return draw(graph, width(stream))


def icicle(graph: FlameGraph, width: int) -> str:
    """Draw the root on top and callees below, in cells of 256 colours, one line per level."""
    drawn = graph.prune(width, least_px=1)
    lines: list[list[tuple[int, int, Frame]]] = [[] for _ in range(int(drawn.depth.max()) + 1)]
    for node, start, end in _spans(drawn, width):
        if end > start:
            lines[drawn.depth[node]].append((start, end, drawn.frames[drawn.frame[node]]))
    texts = [_coloured(line) for line in lines[:_LEVELS] if line]
    if len(lines) > _LEVELS:
        texts.append(fit(f"and {counted(len(lines) - _LEVELS, 'deeper level')}", width))
    return "\n".join([fit(_summary(graph), width), *texts])


def tree(graph: FlameGraph, width: int) -> str:
    """Draw the graph as indented lines with their share of the total, without any colour."""
    drawn = graph.prune(100, least_px=_LEAST_SHARE_PERCENT)
    whole = int(drawn.total[0])
    lines = [_summary(graph)]
    columns = (drawn.frame, drawn.depth, drawn.total)
    for number, depth, total in zip(*(column.tolist() for column in columns), strict=True):
        frame = drawn.frames[number]
        if frame.kind is Kind.REST and 100 * total < _LEAST_SHARE_PERCENT * whole:
            continue
        name = f"{frame.function}  [{frame.module}]" if _names_module(frame) else frame.function
        lines.append(f"{percent(total, whole):>7}  {' ' * min(depth, width // 2)}{name}")
    return "\n".join(fit(line, width) for line in lines)


def _row(row: FunctionRow, whole: int, unit: str) -> tuple[str, str, str, str, str, str]:
    frame = row.frame
    return (
        percent(row.self, whole),
        quantity(row.self, unit),
        percent(row.total, whole),
        quantity(row.total, unit),
        frame.function,
        frame.module,
    )


def _names_module(frame: Frame) -> bool:
    return bool(frame.module) and frame.module.strip("[]") != frame.function.strip("[]")


def _summary(graph: FlameGraph) -> str:
    samples = counted(int(graph.samples[0]), "sample")
    if graph.unit == "count":
        return samples
    return f"{quantity(int(graph.total[0]), graph.unit)} in {samples}"


def _spans(graph: FlameGraph, width: int) -> Iterator[tuple[int, int, int]]:
    """Return each node's first and last cell. Both edges are rounded alike, so siblings touch."""
    whole = max(1, int(graph.total[0]))
    left = graph.left().tolist()
    for node, (start, total) in enumerate(zip(left, graph.total.tolist(), strict=True)):
        yield node, round(start * width / whole), round((start + total) * width / whole)


def _coloured(line: Sequence[tuple[int, int, Frame]]) -> str:
    parts, at = [], 0
    for i, (start, end, frame) in enumerate(line):
        width = end - start
        text = pad(fit_name(frame, width) if frame.kind is not Kind.REST else "", width)
        colour = _COLOURS[frame.kind][i % 2]
        parts.append(f"{' ' * (start - at)}\x1b[38;5;16;48;5;{colour}m{text}{_RESET}")
        at = end
    return "".join(parts)
