"""Deployments: when services began to run another version."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from profiler.comparison.deployments import deployments_in
from profiler.comparison.verdict import Change
from profiler.service.merged import Check, MergedProfiles, PanelRequest
from profiler.service.responses import (
    NAMED_SERVICES,
    SCHEMA,
    Count,
    SkippedObject,
    WindowMs,
    query_text,
)
from profiler.service.verdicts import BackgroundVerdicts

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
class ChangedFunction:
    function: str
    module: str
    change: Change
    growth: Annotated[float | None, Meta(description="0.5 is 50 % more; null if it is new or gone")]


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
    verdict: Annotated[
        Literal["regression", "improvement", "unchanged", "inconclusive"] | None,
        Meta(description="of the comparison; null if there is none (yet)"),
    ]
    provisional: Annotated[
        bool, Meta(description="more data may change the verdict: it rests on little")
    ]
    functions: Annotated[
        Sequence[ChangedFunction],
        Meta(description="at most three that explain the verdict, largest change first"),
    ]
    verdict_reason: Annotated[str, Meta(description="why there is no verdict")]
    pending: Annotated[
        bool,
        Meta(description="the verdict, or one of more data, is being computed: ask again"),
    ]


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


def deployments(
    profiles: MergedProfiles, verdicts: BackgroundVerdicts, request: PanelRequest, check: Check
) -> Deployments:
    """Return the deployments that began in a window, newest first, and the verdicts so far."""
    query = profiles.query.interruptible(check)
    found = deployments_in(profiles.store, query, request.window, request.selector, check)
    shown = found.records(verdicts.of(found))[:_MOST_DEPLOYMENTS]
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
