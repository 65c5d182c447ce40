"""`everflame deployments`: which there were, and over which windows each is compared."""

import sys
from collections.abc import Sequence

import orjson

from profiler.commands.selection import Selection
from profiler.comparison.deployments import Found, deployments_in
from profiler.comparison.rollouts import (
    Deployment,
)
from profiler.text import in_columns, listed
from profiler.times import from_until, whole_second
from storage.profile import Window
from storage.query.listing import nearest_objects

_NAMED = 8

ADVICE = (
    "a version is found in SERVICE_VERSION, DD_VERSION or GIT_SHA of a process, in"
    " service.version of OTEL_RESOURCE_ATTRIBUTES, in an image's tag or a release's folder;"
    " or say it with: everflame deployments add --service NAME --version VERSION"
)


def run(selection: Selection, *, as_json: bool) -> int:
    """Print the deployments; 2 when there is nothing that could tell of any."""
    found = deployments_in(selection.store, selection.query(), selection.window, selection.selector)
    if as_json:
        sys.stdout.buffer.write(_json(selection, found) + b"\n")
    elif found.deployments:
        print(_table(found.deployments))
    for key, reason in found.skipped:
        print(f"everflame: skipped {key}: {reason}", file=sys.stderr)
    if found.reason:
        print(f"everflame: {explain(selection, found)}", file=sys.stderr)
    return 2 if found.reason in {"no_data_in_range", "nothing_matches"} else 0


def _json(selection: Selection, found: Found) -> bytes:
    return orjson.dumps(
        {
            "schema": 1,
            "window": {
                "from_ms": selection.window.start_ns // 1_000_000,
                "until_ms": selection.window.end_ns // 1_000_000,
            },
            "query": str(selection.selector) if selection.selector.matchers else "",
            "deployments": found.records(),
            "skipped": [{"key": key, "reason": reason} for key, reason in found.skipped],
        }
    )


def explain(selection: Selection, found: Found) -> str:
    """Say why there are none."""
    window = from_until(selection.window)
    if found.reason == "no_data_in_range":
        nearest = [
            from_until(Window(key.start_ns, key.end_ns))
            for key in nearest_objects(selection.store, selection.window)
        ]
        where = (
            f"the nearest data are from {' and '.join(nearest)}"
            if nearest
            else f"the store {selection.store} is empty"
        )
        return f"nothing selected: nothing was profiled from {window}; {where}"
    if found.reason == "nothing_matches":
        return f"nothing selected: no service from {window} is of {selection.selector}"
    names = listed(found.services, _NAMED)
    if found.reason == "no_versions":
        return f"no deployments: no version is known of {names}; {ADVICE}"
    return f"no deployments from {window}: no other version of {names} began to run"


def _table(deployments: Sequence[Deployment]) -> str:
    rows = [("BEGAN", "SETTLED", "SERVICE", "VERSION", "BEFORE", "KIND", "HOSTS", "SOURCE")]
    rows += [
        (
            whole_second(each.first_ns),
            whole_second(each.settled_ns),
            each.service,
            each.version,
            each.previous or "-",
            each.kind,
            str(len(each.hosts)) if each.hosts else "-",
            each.source,
        )
        for each in deployments
    ]
    lines = []
    for line, deployment in zip(in_columns(rows), [None, *deployments], strict=True):
        lines.append(line)
        if deployment is not None and deployment.hosts_before:
            lines.append(f"    {deployment.version} on {listed(deployment.hosts, _NAMED)}")
            lines.append(
                f"    {deployment.previous} still on {listed(deployment.hosts_before, _NAMED)}"
            )
    return "\n".join(lines)
