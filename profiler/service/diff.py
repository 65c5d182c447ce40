"""The diff: two windows as one flame graph, and as a table of functions."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import msgspec
import orjson
from msgspec import Meta

from profiler.comparison.comparison import Function
from profiler.comparison.gate import Gate, verdict_of
from profiler.comparison.report import as_json
from profiler.comparison.verdict import Change, NoiseSource
from profiler.flamegraph.differential import VERDICTS
from profiler.service.comparisons import Compared
from profiler.service.merged import Check, PanelRequest
from profiler.service.responses import (
    Count,
    Counts,
    DataCoverage,
    FrameRow,
    ModuleFile,
    NodeId,
    Positive,
    WindowMs,
    files_of,
)

Estimate = Annotated[
    tuple[float | None, float | None, float | None],
    Meta(description="an estimate and the ends of its 95 % interval; null if it has no end"),
]


@dataclass(frozen=True)
class ComparedSide:
    query: str
    window: WindowMs
    versions: Sequence[str]
    hosts: Sequence[str]
    samples: Count
    cores: Annotated[float, Meta(ge=0, description="mean cores a host")]
    coverage: DataCoverage
    host_seconds: Positive


@dataclass(frozen=True)
class BothCosts:
    before: Positive
    after: Positive


@dataclass(frozen=True)
class Noise:
    source: NoiseSource
    positions: Count
    df: Positive


@dataclass(frozen=True)
class CommonChange:
    relative: float
    low: float | None
    high: float | None
    verdict: Change


@dataclass(frozen=True, kw_only=True)
class DiffPanel:
    """What both responses say about a comparison."""

    schema: Literal[1]
    type: str
    unit: str
    verdict: Literal["regression", "improvement", "unchanged", "inconclusive"]
    provisional: Annotated[bool, Meta(description="more data make it final, or withdraw it")]
    exit_code: Count
    before: ComparedSide
    after: ComparedSide
    scale: Annotated[
        BothCosts, Meta(description="times the nanoseconds of a side it is cores a host")
    ]
    noise: Noise
    common_change: CommonChange
    warnings: Sequence[str]


@dataclass(frozen=True)
class DiffNodes:
    frame: Counts
    depth: Counts
    before: Counts
    after: Counts
    before_samples: Counts
    after_samples: Counts
    verdict: Counts


@dataclass(frozen=True)
class BothTotals:
    before: Count
    after: Count


@dataclass(frozen=True)
class DiffCutNodes:
    nodes: Count
    before: Count
    after: Count


@dataclass(frozen=True)
class DiffAncestor:
    id: NodeId
    frame: FrameRow
    before: Count
    after: Count
    before_samples: Count
    after_samples: Count


@dataclass(frozen=True, kw_only=True)
class Diff(DiffPanel):
    totals: BothTotals
    verdicts: Annotated[
        Sequence[str], Meta(description="names; the nodes' verdicts are their numbers")
    ]
    frames: Sequence[FrameRow]
    modules: Sequence[ModuleFile]
    nodes: Annotated[
        DiffNodes,
        Meta(
            description="in preorder, the root first; the width is (before + after) / 2"
            " after both are scaled"
        ),
    ]
    rest: DiffCutNodes
    path: Sequence[DiffAncestor]


@dataclass(frozen=True)
class CostBelow:
    function: str
    module: str
    kind: str
    before: Count
    after: Count


@dataclass(frozen=True)
class TotalCosts:
    before: Positive
    after: Positive
    because: Annotated[
        Sequence[CostBelow], Meta(description="changed functions below it, and their costs there")
    ]


@dataclass(frozen=True)
class DiffFunction:
    function: str
    module: str
    kind: str
    self: BothCosts
    total: TotalCosts
    cores: Estimate
    share: Estimate
    relative: Estimate
    p: float
    q: float
    verdict: Change
    because: str
    needs: Annotated[
        str,
        Meta(
            description="of the largest differences that are not certain yet: what it takes until"
            " they are; else empty"
        ),
    ]
    fails: bool
    moved: Annotated[bool, Meta(description="from some callers to others")]


@dataclass(frozen=True, kw_only=True)
class DiffTop(DiffPanel):
    rows: Count
    functions: Annotated[
        Sequence[DiffFunction], Meta(description="changed functions first, then by cost")
    ]


def diff_graph(compared: Compared, request: PanelRequest, gate: Gate, check: Check) -> Diff:
    """Return the union of both sides' graphs.

    Raises:
        NoSuchNodeError: the request's node is on neither side.
    """
    pair = compared.pair
    shown, path, graph = compared.draw(request, check)
    check()
    boxes = [box for _, box in path]
    frames = shown.paths.frames
    modules = {frame.module for frame in (*graph.frames, *(frames[box] for box in boxes))}
    files = (files_of(profile, modules) for profile in (pair.before, pair.after))
    summary = _summary(compared, gate)
    del summary["functions"]
    fields = {
        **summary,
        "totals": BothTotals(pair.before.total_value, pair.after.total_value),
        "verdicts": VERDICTS,
        "frames": graph.frames,
        "modules": sorted({file for side in files for file in side}),
        "nodes": DiffNodes(
            frame=graph.frame,
            depth=graph.depth,
            before=graph.before,
            after=graph.after,
            before_samples=graph.before_samples,
            after_samples=graph.after_samples,
            verdict=graph.verdict,
        ),
        "rest": DiffCutNodes(graph.cut_nodes, graph.cut_before, graph.cut_after),
        "path": [
            DiffAncestor(f"{node:016x}", frames[box], **sums)
            for (node, box), sums in zip(path, shown.sums_along(boxes), strict=True)
        ],
    }
    return msgspec.convert(fields, Diff)


def diff_table(
    compared: Compared, request: PanelRequest, gate: Gate, limit: int, check: Check
) -> DiffTop:
    """Return the compared functions in the order of `Comparison.functions`; at most `limit`."""
    pair, text = compared.pair, request.search.casefold()
    functions = [each for each in pair.found.functions if each.frame.matches(text)]
    shown = functions[:limit]
    summary = _summary(compared, gate, shown)
    check()
    moved, reasons = compared.reasons(shown)
    for record in summary["functions"]:
        key = (record["function"], record["module"], record["kind"])
        record["moved"] = key in moved
        record["total"]["because"] = [
            CostBelow(*each.frame[:3], each.before, each.after) for each in reasons.get(key, ())
        ]
    return msgspec.convert({**summary, "rows": len(functions)}, DiffTop)


def _summary(compared: Compared, gate: Gate, functions: Sequence[Function] = ()) -> dict[str, Any]:
    """Return the fields of `DiffPanel`, and the records of some functions."""
    pair = compared.pair
    verdict = verdict_of(pair.found, gate)
    chosen = replace(pair.found, functions=tuple(functions))
    summary: dict[str, Any] = orjson.loads(as_json(chosen, verdict, gate))
    for name, coverage in zip(("before", "after"), compared.coverages, strict=True):
        summary[name]["coverage"] = DataCoverage.of(coverage)
        summary[name]["host_seconds"] = coverage.accounting.profiled_ns / 1e9
    return {
        **summary,
        "type": pair.after.type,
        "unit": pair.after.unit,
        "scale": BothCosts(*pair.scale),
    }
