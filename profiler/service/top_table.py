"""The top table: functions by their cost, sorted and filtered from the full data."""

from collections.abc import Callable
from typing import Any

from profiler.flamegraph.flamegraph import ROOT_ID
from profiler.service.merged import Check, FunctionRow, MergedProfiles, PanelRequest
from profiler.service.responses import empty_reason, head
from storage.query.query import Functions

_SORTS: dict[str, Callable[[FunctionRow], tuple[object, ...]]] = {
    "self": lambda row: (-row[1][0], -row[1][1], row[0]),
    "total": lambda row: (-row[1][1], -row[1][0], row[0]),
    "name": lambda row: (row[0].function.casefold(), row[0]),
    "module": lambda row: (row[0].module.casefold(), -row[1][0], row[0]),
}
SORTS = tuple(_SORTS)


def top_table(
    profiles: MergedProfiles, request: PanelRequest, sort: str, limit: int, check: Check
) -> dict[str, Any]:
    """Return the response to `top`.

    Raises:
        NoSuchNodeError: the request's node is not there.
    """
    is_sorted = False
    if request.needs_no_stacks and not profiles.has(request):
        table = profiles.query.interruptible(check).functions(
            request.window, request.selector, (), request.type
        )
        rows = _rows_of(table)
        unit, total, samples = table.unit, table.total, table.samples
        coverage = table.coverage
    else:
        merged = profiles.select(request, check)
        view = merged.view(request)
        check()
        if request.node == ROOT_ID:
            rows = view.rows()
        else:
            paths = view.paths.through([box for _, box in view.path_to(request)])
            rows = [(row.frame, row[1:]) for row in paths.functions() if row.total]
        is_sorted = sort == "self"
        profile, coverage = merged.answer.profile, merged.answer.coverage
        unit, total, samples = profile.unit, profile.total_value, profile.total_samples
    check()
    if request.search:
        text = request.search.casefold()
        rows = [
            row
            for row in rows
            if text in row[0].function.casefold() or text in row[0].module.casefold()
        ]
    if not is_sorted:
        rows = sorted(rows, key=_SORTS[sort])
    return {
        **head(request, coverage),
        "unit": unit,
        "total": total,
        "samples": samples,
        "functions": [
            {
                "function": frame.function,
                "module": frame.module,
                "kind": frame.kind,
                "file": frame.file,
                "self": counts[0],
                "total": counts[1],
                "self_samples": counts[2],
                "total_samples": counts[3],
            }
            for frame, counts in rows[:limit]
        ],
        "rows": len(rows),
        "empty": empty_reason(profiles, request, coverage, samples),
    }


def _rows_of(table: Functions) -> list[FunctionRow]:
    return [
        (row.frame, (row.self, row.total, row.self_samples, row.total_samples))
        for row in table.rows
    ]
