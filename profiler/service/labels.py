"""Labels: their names, and the values of one, each with its number of samples."""

from typing import Any

from profiler.service.merged import Check, MergedProfiles, PanelRequest
from profiler.service.responses import SCHEMA, window_ms


def label_names(profiles: MergedProfiles, request: PanelRequest, check: Check) -> dict[str, Any]:
    """Return the response to `labels`: the names, how many values and samples each has."""
    found = profiles.query.interruptible(check).labels(request.window, request.selector)
    names = [
        {"name": name, "values": len(values), "samples": sum(values.values())}
        for name, values in sorted(found.items())
    ]
    return {"schema": SCHEMA, "window": window_ms(request.window), "labels": names}


def label_values(
    profiles: MergedProfiles, request: PanelRequest, name: str, check: Check
) -> dict[str, Any]:
    """Return the response to `labels/{name}/values`, most samples first."""
    query = profiles.query.interruptible(check)
    values = query.label_values(request.window, name, request.selector)
    return {
        "schema": SCHEMA,
        "window": window_ms(request.window),
        "name": name,
        "values": [{"value": value, "samples": count} for value, count in values.items()],
    }
