"""The flame graph: the tree of a window, cut for a screen, and the path to the zoomed box."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from profiler.flamegraph.paths import Paths
from profiler.service.merged import Check, MergedProfiles, PanelRequest, PathToNode
from profiler.service.responses import (
    Count,
    Counts,
    FrameRow,
    ModuleFile,
    NodeId,
    Panel,
    files_of,
    panel_fields,
)


@dataclass(frozen=True)
class Nodes:
    frame: Counts
    depth: Counts
    total: Counts
    self: Counts
    samples: Counts


@dataclass(frozen=True)
class CutNodes:
    nodes: Count
    total: Count


@dataclass(frozen=True)
class Ancestor:
    id: NodeId
    frame: FrameRow
    total: Count
    samples: Count


@dataclass(frozen=True)
class SearchTotals:
    text: str
    total: Count
    samples: Count
    functions: Count


@dataclass(frozen=True, kw_only=True)
class FlameGraph(Panel):
    total: Count
    samples: Count
    frames: Sequence[FrameRow]
    modules: Sequence[ModuleFile]
    nodes: Annotated[Nodes, Meta(description="in preorder, the root first")]
    rest: CutNodes
    path: Sequence[Ancestor]
    search: SearchTotals | None


def flame_graph(profiles: MergedProfiles, request: PanelRequest, check: Check) -> FlameGraph:
    """Return the flame graph that a request asks for.

    Raises:
        NoSuchNodeError: the request's node is not there.
    """
    merged = profiles.select(request, check)
    view = merged.view(request)
    paths = view.paths
    check()
    path = view.path_to(request)
    check()
    graph = view.draw(request, path)
    check()
    below = paths.below([box for _, box in path]) if request.search else None
    found = below.search(request.search) if below else None
    profile, coverage = merged.answer.profile, merged.answer.coverage
    query = profiles.query.interruptible(check)
    above = _ancestors(paths, path)
    modules = {frame[1] for frame in (*graph.frames, *(each.frame for each in above))}
    return FlameGraph(
        **panel_fields(query, request, coverage, profile.unit, profile.total_samples),
        total=profile.total_value,
        samples=profile.total_samples,
        frames=graph.frames,
        modules=files_of(profile, modules),
        nodes=Nodes(graph.frame, graph.depth, graph.total, graph.self, graph.samples),
        rest=CutNodes(graph.cut_nodes, graph.cut_total),
        path=above,
        search=SearchTotals(request.search, *found) if found else None,
    )


def _ancestors(paths: Paths, path: PathToNode) -> list[Ancestor]:
    """Return the boxes that lead to the zoomed one, itself last, each with its cost."""
    sums = paths.sums_along([box for _, box in path])
    return [
        Ancestor(f"{node:016x}", paths.frames[box], total, samples)
        for (node, box), (total, samples) in zip(path, sums, strict=True)
    ]
