"""`everflame deployments`: which there were, and over which windows each is compared."""

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from profiler.commands.selection import Selection, nearest_objects
from profiler.comparison.announcements import list_announcements
from profiler.comparison.deployments import (
    PAUSE_NS,
    Deployment,
    Sightings,
    find_deployments,
    merge_announcements,
)
from profiler.comparison.matching import Match, lives_of, match
from profiler.text import in_columns, listed
from profiler.times import from_until, whole_second
from storage.objects.open import ObjectStore
from storage.profile import Window
from storage.query.query import Query, Skipped
from storage.selector import Selector

AROUND_NS = 2 * PAUSE_NS
"""So much is read before and behind a window: what was there before it, and how it went on."""
_LATEST_NS = 2**63 - 1
_NAMED = 8

ADVICE = (
    "a version is found in SERVICE_VERSION, DD_VERSION or GIT_SHA of a process, in"
    " service.version of OTEL_RESOURCE_ATTRIBUTES, in an image's tag or a release's folder;"
    " or say it with: everflame deployments add --service NAME --version VERSION"
)


@dataclass(frozen=True, slots=True)
class Found:
    """The deployments of a part of a store, newest first, and what explains that there are none."""

    deployments: tuple[Deployment, ...]
    matches: tuple[Match, ...]
    """Of each, over which windows it is compared."""
    all_ns: tuple[int, ...]
    """When any of these services was deployed, also before and behind what is asked for."""
    has_objects: bool
    """Something was profiled in the window, or there are deployments."""
    services: tuple[str, ...]
    """Those that were there and are asked for."""
    has_versions: bool
    """Any of them has one."""
    skipped: tuple[Skipped, ...]

    def records(self) -> list[dict[str, Any]]:
        pairs = zip(self.deployments, self.matches, strict=True)
        return [{**each.as_json(), **found.as_json()} for each, found in pairs]

    @property
    def reason(self) -> str:
        """Why there is none; empty where there are some."""
        if self.deployments:
            return ""
        if not self.has_objects:
            return "no_data_in_range"
        if not self.services:
            return "nothing_matches"
        return "no_change" if self.has_versions else "no_versions"


def deployments_in(
    store: ObjectStore,
    query: Query,
    window: Window,
    selector: Selector,
    check: Callable[[], None] = lambda: None,
) -> Found:
    """Return the deployments that began in a window. `check` is called while the store is listed.

    Of the selector, `version` says which deployments; everything else says which services and
    hosts are looked at.
    """
    around = Window(max(0, window.start_ns - AROUND_NS), min(_LATEST_NS, window.end_ns + AROUND_NS))
    of_version = Selector(tuple(each for each in selector.matchers if each.name == "version"))
    of_service = Selector(tuple(each for each in selector.matchers if each.name == "service"))
    of_others = Selector(tuple(each for each in selector.matchers if each.name != "version"))
    presence = query.presence(around, of_others)
    services = {dict(labels).get("service", "") for labels in presence.label_sets} - {""}
    sightings = Sightings.of(presence)
    told = list_announcements(store, around, check=check)
    # Nobody announces for a host: what is asked for by more than the service has to be there.
    is_wider = len(of_others.matchers) > len(of_service.matchers)
    announcements = [
        each
        for each in told.announcements
        if of_service.accepts({"service": each.service})
        and (not is_wider or each.service in services)
    ]
    merged = merge_announcements(find_deployments(sightings), announcements)
    chosen = [
        each
        for each in merged
        if window.start_ns <= each.first_ns < window.end_ns
        and of_version.accepts({"version": each.version})
    ]
    chosen.reverse()
    lives = lives_of(presence)

    @functools.cache  # deployments of one day look at the same hours
    def has_data(window: Window) -> bool:
        return any(True for _ in query.objects(window))

    def matched(each: Deployment) -> Match:
        same = [other for other in merged if other.service == each.service]
        return match(each, same, of_others, lives.get(each.service), has_data)

    return Found(
        deployments=tuple(chosen),
        matches=tuple(map(matched, chosen)),
        all_ns=tuple(each.first_ns for each in merged),
        has_objects=bool(chosen) or any(True for _ in query.objects(window)),
        services=tuple(sorted(services)),
        has_versions=bool(sightings.instances),
        skipped=(*presence.coverage.skipped, *told.skipped),
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
