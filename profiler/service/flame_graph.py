"""The flame graph: the tree of a window, cut for a screen, and the path to the zoomed box."""

from collections.abc import Sequence
from typing import Any

from profiler.flamegraph.paths import Paths
from profiler.service.merged import Check, MergedProfiles, PanelRequest
from profiler.service.responses import empty_reason, files_of, head


def flame_graph(profiles: MergedProfiles, request: PanelRequest, check: Check) -> dict[str, Any]:
    """Return the response to `flamegraph`.

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
    profile = merged.answer.profile
    above = _ancestors(paths, path)
    modules = {frame[1] for frame in (*graph.frames, *(each["frame"] for each in above))}
    return {
        **head(request, merged.answer.coverage),
        "unit": profile.unit,
        "total": profile.total_value,
        "samples": profile.total_samples,
        "frames": [list(frame) for frame in graph.frames],
        "modules": files_of(profile, modules),
        "nodes": {
            "frame": graph.frame,
            "depth": graph.depth,
            "total": graph.total,
            "self": graph.self,
            "samples": graph.samples,
        },
        "rest": {"nodes": graph.cut_nodes, "total": graph.cut_total},
        "path": above,
        "search": {"text": request.search, **found._asdict()} if found else None,
        "empty": empty_reason(profiles, request, merged.answer.coverage, profile.total_samples),
    }


def _ancestors(paths: Paths, path: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """Return the boxes that lead to the zoomed one, itself last, each with its cost."""
    sums = paths.sums_along([box for _, box in path])
    return [
        {
            "id": f"{node:016x}",
            "frame": list(paths.frames[box]),
            "total": total,
            "samples": samples,
        }
        for (node, box), (total, samples) in zip(path, sums, strict=True)
    ]
