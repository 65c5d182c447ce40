"""Deployments: when services began to run another version."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from profiler.comparison.deployments import deployments_in
from profiler.service.merged import Check, MergedProfiles, PanelRequest
from profiler.service.responses import (
    NAMED_SERVICES,
    SCHEMA,
    Count,
    SkippedObject,
    WindowMs,
    query_text,
)

_MOST_DEPLOYMENTS = 1_000


@dataclass(frozen=True)
class ComparedWindow:
    query: str
    from_ms: Count
    until_ms: Count


@dataclass(frozen=True)
class MatchedWindows:
    before: ComparedWindow
    after: ComparedWindow


@dataclass(frozen=True)
class Deployment:
    service: str
    version: str
    previous: Annotated[str, Meta(description="empty if it is not known")]
    first_ms: Count
    last_ms: Count
    settled_ms: Count
    hosts: Sequence[str]
    hosts_before: Sequence[str]
    kind: Literal["rollout", "rollback", "canary"]
    source: Literal["found", "announced"]
    compare: Annotated[
        MatchedWindows | None,
        Meta(description="the windows to compare; if null, compare_reason says why"),
    ]
    compare_reason: str


@dataclass(frozen=True)
class NoDeployments:
    reason: Literal["no_data_in_range", "nothing_matches", "no_versions", "no_change"]
    services: Sequence[str]


@dataclass(frozen=True)
class Deployments:
    schema: Literal[1]
    window: WindowMs
    query: str
    deployments: Annotated[Sequence[Deployment], Meta(description="newest first")]
    rest: Annotated[int, Meta(ge=0, description="older ones beyond the limit")]
    empty: NoDeployments | None
    skipped: Sequence[SkippedObject]


def deployments(profiles: MergedProfiles, request: PanelRequest, check: Check) -> Deployments:
    """Return the deployments that began in a window, newest first."""
    query = profiles.query.interruptible(check)
    found = deployments_in(profiles.store, query, request.window, request.selector, check)
    shown = found.records()[:_MOST_DEPLOYMENTS]
    empty = {"reason": found.reason, "services": found.services[:NAMED_SERVICES]}
    return Deployments(
        schema=SCHEMA,
        window=WindowMs.of(request.window),
        query=query_text(request),
        deployments=msgspec.convert(shown, list[Deployment]),
        rest=len(found.deployments) - len(shown),
        empty=msgspec.convert(empty, NoDeployments) if found.reason else None,
        skipped=[SkippedObject(*each) for each in found.skipped],
    )
