"""The diff: two windows as one flame graph, and as a table of functions."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import orjson

from profiler.comparison.comparison import Function
from profiler.comparison.gate import Gate, verdict_of
from profiler.comparison.report import as_json
from profiler.flamegraph.differential import fields_of_pair
from profiler.service.comparisons import Compared
from profiler.service.merged import Check, PanelRequest
from profiler.service.responses import coverage_of, files_of


def diff_graph(
    compared: Compared, request: PanelRequest, gate: Gate, check: Check
) -> dict[str, Any]:
    """Return the response to `diff`: the union of both sides' graphs.

    Raises:
        NoSuchNodeError: the request's node is on neither side.
    """
    pair = compared.pair
    shown, path, graph = compared.draw(request, check)
    check()
    boxes = [box for _, box in path]
    modules = {
        frame.module for frame in (*graph.frames, *map(shown.paths.frames.__getitem__, boxes))
    }
    files = (files_of(profile, modules) for profile in (pair.before, pair.after))
    summary = _summary(compared, gate)
    summary.pop("functions")
    return {
        **summary,
        **fields_of_pair(pair, graph),
        "modules": sorted({tuple(file): file for side in files for file in side}.values()),
        "path": [
            {"id": f"{node:016x}", "frame": list(shown.paths.frames[box]), **sums}
            for (node, box), sums in zip(path, shown.sums_along(boxes), strict=True)
        ],
    }


def diff_table(
    compared: Compared, request: PanelRequest, gate: Gate, limit: int, check: Check
) -> dict[str, Any]:
    """Return the response to `diff/top`: changed functions first, then by cost."""
    pair, text = compared.pair, request.search.casefold()
    functions = [
        each
        for each in pair.found.functions
        if text in each.frame.function.casefold() or text in each.frame.module.casefold()
    ]
    shown = functions[:limit]
    summary = _summary(compared, gate, shown)
    check()
    moved, reasons = pair.moved, pair.reasons(shown)
    for function, row in zip(shown, summary["functions"], strict=True):
        key = (function.frame.function, function.frame.module, function.frame.kind)
        row["moved"] = key in moved
        row["total"]["because"] = [
            {
                "function": each.frame.function,
                "module": each.frame.module,
                "kind": each.frame.kind,
                "before": each.before,
                "after": each.after,
            }
            for each in reasons.get(key, ())
        ]
    return {**summary, "rows": len(functions)}


def _summary(compared: Compared, gate: Gate, functions: Sequence[Function] = ()) -> dict[str, Any]:
    """Return what both responses say about a comparison, and the records of some functions."""
    pair = compared.pair
    verdict = verdict_of(pair.found, gate)
    told = replace(pair.found, functions=tuple(functions))
    record: dict[str, Any] = orjson.loads(as_json(told, verdict, gate))
    for name, coverage in zip(("before", "after"), compared.coverages, strict=True):
        record[name]["coverage"] = coverage_of(coverage)
        record[name]["host_seconds"] = coverage.accounting.profiled_ns / 1e9
    return {
        **record,
        "type": pair.after.type,
        "unit": pair.after.unit,
        "scale": pair.scale._asdict(),
    }
