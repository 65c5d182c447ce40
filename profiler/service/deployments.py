"""Deployments: when services began to run another version."""

from typing import Any

from profiler.comparison.deployments import deployments_in
from profiler.service.merged import Check, MergedProfiles, PanelRequest
from profiler.service.responses import NAMED_SERVICES, SCHEMA, query_text, window_ms

_MOST_DEPLOYMENTS = 1_000


def deployments(profiles: MergedProfiles, request: PanelRequest, check: Check) -> dict[str, Any]:
    """Return the response to `deployments`: those that began in the window, newest first."""
    query = profiles.query.interruptible(check)
    found = deployments_in(profiles.store, query, request.window, request.selector, check)
    shown = found.records()[:_MOST_DEPLOYMENTS]
    empty = {"reason": found.reason, "services": found.services[:NAMED_SERVICES]}
    return {
        "schema": SCHEMA,
        "window": window_ms(request.window),
        "query": query_text(request),
        "deployments": shown,
        "rest": len(found.deployments) - len(shown),
        "empty": empty if found.reason else None,
        "skipped": [{"key": key, "reason": reason} for key, reason in found.skipped],
    }
