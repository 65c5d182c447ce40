"""The top table: functions by their cost, sorted and filtered from the full data."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from profiler.flamegraph.flamegraph import ROOT_ID
from profiler.service.merged import Check, FunctionRow, MergedProfiles, PanelRequest
from profiler.service.responses import Count, Panel, panel_fields
from storage.query.query import Functions

Sort = Literal["self", "total", "name", "module"]
_SORTS: dict[Sort, Callable[[FunctionRow], tuple[object, ...]]] = {
    "self": lambda row: (-row[1][0], -row[1][1], row[0]),
    "total": lambda row: (-row[1][1], -row[1][0], row[0]),
    "name": lambda row: (row[0].function.casefold(), row[0]),
    "module": lambda row: (row[0].module.casefold(), -row[1][0], row[0]),
}


@dataclass(frozen=True)
class TopFunction:
    function: str
    module: str
    kind: str
    file: str
    self: Count
    total: Count
    self_samples: Count
    total_samples: Count


@dataclass(frozen=True, kw_only=True)
class Top(Panel):
    total: Count
    samples: Count
    rows: Count
    functions: Sequence[TopFunction]


def top_table(
    profiles: MergedProfiles, request: PanelRequest, sort: Sort, limit: int, check: Check
) -> Top:
    """Return the table of functions that a request asks for, at most `limit` rows.

    Raises:
        NoSuchNodeError: the request's node is not there.
    """
    query, is_sorted = profiles.query.interruptible(check), False
    if request.needs_no_stacks and not profiles.has(request):
        table = query.functions(request.window, request.selector, (), request.type)
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
        rows = [row for row in rows if row[0].matches(text)]
    if not is_sorted:
        rows = sorted(rows, key=_SORTS[sort])
    return Top(
        **panel_fields(query, request, coverage, unit, samples),
        total=total,
        samples=samples,
        rows=len(rows),
        functions=[
            TopFunction(frame.function, frame.module, frame.kind, frame.file, *counts)
            for frame, counts in rows[:limit]
        ],
    )


def _rows_of(table: Functions) -> list[FunctionRow]:
    return [
        (row.frame, (row.self, row.total, row.self_samples, row.total_samples))
        for row in table.rows
    ]
