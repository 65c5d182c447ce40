"""`everflame top` over a store: which functions, modules or services of a fleet use the CPUs.

What it prints is computed by `profiler.fleet`, as the page's view of a fleet is.
"""

import argparse
import sys

import orjson

from profiler.commands import terminal
from profiler.commands.selection import NothingSelectedError, in_cluster, selected
from profiler.fleet import FleetTop, Line, read_top
from profiler.text import cells, counted, fit, pad, percent
from profiler.times import from_until


def run(options: argparse.Namespace) -> int:
    """Print the table of a window, by default of the last hour.

    Raises:
        ValueError, StoreError: as `selected`; NothingSelectedError if there is no sample.
    """
    by = tuple(options.by or ())
    with in_cluster(options) as executor:
        selection = selected(options, "now-1h", executor)
        top = read_top(selection.query(), selection.window, selection.selector, options.group, by)
        if not top.now.whole:
            raise NothingSelectedError(selection.why_nothing())
    if options.json:
        sys.stdout.buffer.write(_as_json(top, options) + b"\n")
        return 0
    print(_table(top, options, terminal.width(sys.stdout)))
    skipped = len(top.now.coverage.skipped)
    if skipped:
        print(f"everflame: {counted(skipped, 'object')} could not be read", file=sys.stderr)
    return 0


def _as_json(top: FleetTop, options: argparse.Namespace) -> bytes:
    def record(line: Line) -> dict[str, object]:
        return {
            "labels": dict(line.labels),
            **line.name._asdict(),
            "self_ns": line.self_ns,
            "total_ns": line.total_ns if options.group != "service" else line.self_ns,
            "cores": line.cores,
            "share": line.share,
            "cores_week_before": line.cores_week_before,
        }

    now = top.now
    lines, count = top.lines(limit=options.limit)
    return orjson.dumps(
        {
            "schema": 1,
            "window": {
                "from_ms": now.window.start_ns // 1_000_000,
                "until_ms": now.window.end_ns // 1_000_000,
            },
            "query": options.query,
            "group": options.group,
            "cores": now.cores(now.whole),
            "rows": list(map(record, lines)),
            "more": count - len(lines),
        }
    )


def _table(top: FleetTop, options: argparse.Namespace, width: int) -> str:
    now, group = top.now, options.group
    names = sorted({name for labels in now.label_sets for name, _ in labels})
    texts = [name.upper() for name in names]
    texts += {"function": ["FUNCTION", "MODULE"], "module": ["MODULE"], "service": []}[group]
    head = ["CORES", "SELF", "TOTAL", "WEEK"]
    if group != "function":
        del head[2]
    table = [(head, texts)]
    lines, count = top.lines(limit=options.limit)
    for line in lines:
        numbers = [f"{line.cores:,.3f}", percent(line.self_ns, now.whole)]
        if group == "function":
            numbers.append(percent(line.total_ns or 0, now.whole))
        numbers.append(_trend_text(line.trend))
        values = [dict(line.labels).get(name, "") for name in names]
        function, module, _ = line.name
        values += {"function": [function, module], "module": [module], "service": []}[group]
        table.append((numbers, values))
    widths = [max(cells(left[i]) for left, _ in table) for i in range(len(head))]
    room = max(20, width - sum(widths) - 2 * len(widths))
    texts_of = [f"{now.cores(now.whole):,.2f} cores used {from_until(now.window)}", ""]
    sizes = _sizes([right for _, right in table], room)
    for left, right in table:
        parts = [text.rjust(size) for text, size in zip(left, widths, strict=True)]
        parts += [pad(fit(text, size), size) for text, size in zip(right, sizes, strict=True)]
        texts_of.append(fit("  ".join(parts).rstrip(), width))
    if count > len(lines):
        texts_of.append(f"and {counted(count - len(lines), 'more ' + group)}")
    if top.before is None:
        texts_of.append("no trend: the store has too little of the week before")
    return "\n".join(texts_of)


def _sizes(rows: list[list[str]], room: int) -> list[int]:
    """Return the widths of columns of text: as wide as needed, or equal shares of the room."""
    wanted = [max(map(cells, column)) for column in zip(*rows, strict=True)]
    room -= 2 * (len(wanted) - 1)
    sizes = [0] * len(wanted)
    for left, i in enumerate(sorted(range(len(wanted)), key=lambda i: wanted[i])):
        share = (room - sum(sizes)) // (len(wanted) - left)
        sizes[i] = max(1, min(wanted[i], share))
    return sizes


def _trend_text(trend: float | None) -> str:
    if trend is None:
        return ""
    return "new" if trend == float("inf") else f"{100 * trend:+.0f} %"
