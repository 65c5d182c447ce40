"""`everflame top` over a store: which functions, modules or services of a fleet use the CPUs.

Cores are CPU seconds per second of the time that data cover. The trend compares them with those of
the same time a week before.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import orjson

from profiler.commands import terminal
from profiler.commands.selection import NothingSelectedError, Selection, selected
from profiler.text import cells, counted, fit, pad, percent
from profiler.times import NS_PER_S, from_until
from storage.profile import Labels, Window
from storage.query.function_totals import FunctionTotal
from storage.query.query import Query

GROUPS = ("function", "module", "service")
_WEEK_NS = 7 * 86_400 * NS_PER_S
_LEAST_COVERED = 0.5
"""A week before there must be data for so much of the time, or there is no trend."""

Key = tuple[Labels, str, str, str]
"""Labels, function, module and kind; a module or service has no function."""


class Cost(NamedTuple):
    """CPU time in ns: of a function itself, and with all that it calls; None where unknown."""

    self: int
    total: int | None


@dataclass(frozen=True, slots=True)
class Costs:
    """What ran in a window, and for how many ns of it there are data."""

    window: Window
    covered_ns: int
    whole: int
    rows: dict[Key, Cost]
    skipped: int

    @property
    def is_covered(self) -> bool:
        length_ns = self.window.end_ns - self.window.start_ns
        return self.covered_ns >= _LEAST_COVERED * length_ns

    def cores(self, value: int) -> float:
        return value / max(1, self.covered_ns)


def run(options: argparse.Namespace) -> int:
    """Print the table of a window, by default of the last hour.

    Raises:
        ValueError, StoreError: as `selected`; NothingSelectedError if there is no sample.
    """
    selection = selected(options, start="now-1h")
    query = selection.query()
    read = _READERS[options.group]
    by = tuple(options.by or ())
    now = read(query, selection, selection.window, by)
    if not now.whole:
        raise NothingSelectedError(selection.why_nothing())
    before = None
    if selection.window.start_ns >= _WEEK_NS:
        earlier = Window(*(at - _WEEK_NS for at in selection.window))
        if query.has_data(earlier):
            before = read(query, selection, earlier, by)
            before = before if before.is_covered else None
    if options.json:
        sys.stdout.buffer.write(_as_json(now, before, options) + b"\n")
        return 0
    print(_table(now, before, options, terminal.width(sys.stdout)))
    if now.skipped:
        print(f"everflame: {counted(now.skipped, 'object')} could not be read", file=sys.stderr)
    return 0


def _functions(query: Query, selection: Selection, window: Window, by: tuple[str, ...]) -> Costs:
    found = query.functions(window, selection.selector, by)
    rows = {_key(row): Cost(row.self, row.total) for row in found.rows if row.total}
    skipped = len(found.coverage.skipped)
    return Costs(window, _covered_ns(query, selection, window), found.total, rows, skipped)


def _modules(query: Query, selection: Selection, window: Window, by: tuple[str, ...]) -> Costs:
    functions = _functions(query, selection, window, by)
    rows: dict[Key, Cost] = {}
    for (labels, _, module, kind), cost in functions.rows.items():
        key = (labels, "", module, kind)
        rows[key] = Cost(cost.self + rows.get(key, Cost(0, None)).self, None)
    used = {key: cost for key, cost in rows.items() if cost.self}
    return Costs(window, functions.covered_ns, functions.whole, used, functions.skipped)


def _services(query: Query, selection: Selection, window: Window, by: tuple[str, ...]) -> Costs:
    length_ns = window.end_ns - window.start_ns
    labels = ("service", *(name for name in by if name != "service"))
    found = query.timeline(window, selection.selector, step_ns=length_ns, by=labels)
    rows = {
        (each.labels, "", "", ""): Cost(int(each.values.sum()), int(each.values.sum()))
        for each in found.series
    }
    whole = sum(cost.self for cost in rows.values())
    skipped = len(found.coverage.skipped)
    return Costs(window, int(found.covered_ns.sum()), whole, rows, skipped)


_Reader = Callable[[Query, Selection, Window, tuple[str, ...]], Costs]
_READERS: dict[str, _Reader] = {
    "function": _functions,
    "module": _modules,
    "service": _services,
}


def _covered_ns(query: Query, selection: Selection, window: Window) -> int:
    length_ns = window.end_ns - window.start_ns
    found = query.timeline(window, selection.selector, step_ns=length_ns)
    return int(found.covered_ns.sum())


def _key(row: FunctionTotal) -> Key:
    return (row.labels, row.frame.function, row.frame.module, str(row.frame.kind))


def _largest(rows: Iterable[tuple[Key, Cost]]) -> list[tuple[Key, Cost]]:
    return sorted(rows, key=lambda row: (-row[1].self, -(row[1].total or 0), row[0]))


def _trend(key: Key, cost: Cost, now: Costs, before: Costs | None) -> float | None:
    """Return by which part the cores of a row have grown in a week; None if that is unknown.

    Infinity: there was none of it.
    """
    if before is None:
        return None
    earlier = before.rows.get(key)
    if earlier is None or not earlier.self:
        return float("inf") if cost.self else None
    return now.cores(cost.self) / before.cores(earlier.self) - 1


def _as_json(now: Costs, before: Costs | None, options: argparse.Namespace) -> bytes:
    def record(key: Key, cost: Cost) -> dict[str, object]:
        labels, function, module, kind = key
        earlier = before.rows.get(key, Cost(0, 0)) if before else None
        return {
            "labels": dict(labels),
            "function": function,
            "module": module,
            "kind": kind,
            "self_ns": cost.self,
            "total_ns": cost.total,
            "cores": now.cores(cost.self),
            "share": cost.self / now.whole,
            "cores_week_before": before.cores(earlier.self) if before and earlier else None,
        }

    rows = _largest(now.rows.items())
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
            "rows": [record(*row) for row in rows[: options.limit]],
            "more": max(0, len(rows) - options.limit),
        }
    )


def _table(now: Costs, before: Costs | None, options: argparse.Namespace, width: int) -> str:
    rows = _largest(now.rows.items())
    names = sorted({name for (labels, *_), _ in rows for name, _ in labels})
    texts = [name.upper() for name in names]
    texts += {"function": ["FUNCTION", "MODULE"], "module": ["MODULE"], "service": []}[
        options.group
    ]
    head = ["CORES", "SELF", "TOTAL", "WEEK"]
    if options.group != "function":
        del head[2]
    table = [(head, texts)]
    for key, cost in rows[: options.limit]:
        labels, function, module, _ = key
        numbers = [f"{now.cores(cost.self):,.3f}", percent(cost.self, now.whole)]
        if options.group == "function":
            numbers.append(percent(cost.total or 0, now.whole))
        numbers.append(_trend_text(_trend(key, cost, now, before)))
        values = [dict(labels).get(name, "") for name in names]
        values += {"function": [function, module], "module": [module], "service": []}[options.group]
        table.append((numbers, values))
    widths = [max(cells(left[i]) for left, _ in table) for i in range(len(head))]
    room = max(20, width - sum(widths) - 2 * len(widths))
    lines = [f"{now.cores(now.whole):,.2f} cores used {from_until(now.window)}", ""]
    sizes = _sizes([right for _, right in table], room)
    for left, right in table:
        parts = [text.rjust(size) for text, size in zip(left, widths, strict=True)]
        parts += [pad(fit(text, size), size) for text, size in zip(right, sizes, strict=True)]
        lines.append(fit("  ".join(parts).rstrip(), width))
    if len(rows) > options.limit:
        lines.append(f"and {counted(len(rows) - options.limit, 'more ' + options.group)}")
    if before is None:
        lines.append("no trend: the store has too little of the week before")
    return "\n".join(lines)


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
