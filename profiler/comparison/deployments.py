"""Deployments: those in a part of a store, with the windows over which each is compared."""

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from profiler.comparison.announcements import list_announcements
from profiler.comparison.comparison import Comparison, Function, changed
from profiler.comparison.gate import Gate, verdict_of
from profiler.comparison.matching import Match, match, service_spans
from profiler.comparison.noise import history
from profiler.comparison.rollouts import (
    PAUSE_NS,
    Deployment,
    Sightings,
    find_deployments,
    merge_announcements,
)
from profiler.comparison.verdict import Change
from profiler.text import fit
from storage.objects.tenant import TenantStore
from storage.profile import Window
from storage.query.coverage import Skipped
from storage.query.query import Query
from storage.selector import Selector

AROUND_NS = 2 * PAUSE_NS
"""How much is read before and after a window, to see the versions before and the hosts after."""
_LATEST_NS = 2**63 - 1
_NAMED_FUNCTIONS = 3
"""Of a verdict; the comparison itself has all of them."""
_NAME_CELLS = 200
"""A name of a function or module in a verdict is cut to so many."""


class ChangedFunction(NamedTuple):
    """A function that explains a verdict."""

    function: str
    module: str
    change: Change
    growth: float | None
    """0.5 is 50 % more; None if the function is new or gone."""

    def text(self, width: int = 2 * _NAME_CELLS) -> str:
        """Return `parse (app) +52%`, the name cut to a width."""
        name = f"{self.function} ({self.module})" if self.module else self.function
        growth = self.change if self.growth is None else f"{self.growth:+.0%}"
        return f"{fit(name, width)} {growth}"


@dataclass(frozen=True, slots=True)
class DeploymentVerdict:
    """What the comparison of the time before and after a deployment says, or why there is none."""

    word: str = ""
    """regression, improvement, unchanged or inconclusive; empty if there is no verdict."""
    is_provisional: bool = False
    functions: tuple[ChangedFunction, ...] = ()
    """The first ones that explain it; none if it is unchanged or inconclusive."""
    reason: str = ""
    """Why there is no verdict."""
    is_pending: bool = False
    """The verdict, or one of more data, is being computed."""

    @property
    def text(self) -> str:
        """`regression (provisional)`; empty if there is no verdict."""
        return f"{self.word} (provisional)" if self.is_provisional else self.word

    def as_json(self) -> dict[str, Any]:
        return {
            "verdict": self.word or None,
            "provisional": self.is_provisional,
            "functions": [each._asdict() for each in self.functions],
            "verdict_reason": self.reason,
            "pending": self.is_pending,
        }


def deployment_verdict(found: Comparison, gate: Gate) -> DeploymentVerdict:
    """Return the verdict of a comparison, with the functions that explain it."""
    word = verdict_of(found, gate).word
    reasons: list[Function] = []
    if word == "regression":
        reasons = [each for each in found.functions if gate.fails(each)]
    elif word == "improvement":
        reasons = changed(found.functions)
    return DeploymentVerdict(
        word, found.is_provisional, tuple(map(_named, reasons[:_NAMED_FUNCTIONS]))
    )


def _named(function: Function) -> ChangedFunction:
    has_both = function.change not in (Change.NEW, Change.GONE)
    return ChangedFunction(
        function=fit(function.frame.function, _NAME_CELLS),
        module=fit(function.frame.module, _NAME_CELLS),
        change=function.change,
        growth=function.relative[0] if has_both else None,
    )


@dataclass(frozen=True, slots=True)
class FoundDeployments:
    """The deployments in a part of a store, newest first, and why there are none."""

    deployments: tuple[Deployment, ...]
    matches: tuple[Match, ...]
    """The windows over which each is compared."""
    all_ns: tuple[int, ...]
    """When any of these services was deployed, also before and after the window."""
    has_objects: bool
    """Something was profiled in the window, or there are deployments."""
    services: tuple[str, ...]
    """The selected services that ran."""
    has_versions: bool
    """At least one of them has a version."""
    skipped: tuple[Skipped, ...]

    def records(self, verdicts: Sequence[DeploymentVerdict] = ()) -> list[dict[str, Any]]:
        """Return each deployment with its windows, and with its verdict if there are some."""
        pairs = zip(self.deployments, self.matches, strict=True)
        records = [{**each.as_json(), **found.as_json()} for each, found in pairs]
        for record, verdict in zip(records, verdicts, strict=False):
            record.update(verdict.as_json())
        return records

    @property
    def reason(self) -> str:
        """Why there are no deployments; empty if there are some."""
        if self.deployments:
            return ""
        if not self.has_objects:
            return "no_data_in_range"
        if not self.services:
            return "nothing_matches"
        return "no_change" if self.has_versions else "no_versions"


def deployments_in(
    store: TenantStore,
    query: Query,
    window: Window,
    selector: Selector,
    check: Callable[[], None] = lambda: None,
) -> FoundDeployments:
    """Return the deployments that began in a window. `check` is called while the store is listed.

    In the selector, `version` selects deployments; all other labels select services and hosts.
    """
    around = Window(max(0, window.start_ns - AROUND_NS), min(_LATEST_NS, window.end_ns + AROUND_NS))
    of_version = Selector(tuple(each for each in selector.matchers if each.name == "version"))
    of_service = Selector(tuple(each for each in selector.matchers if each.name == "service"))
    of_others = Selector(tuple(each for each in selector.matchers if each.name != "version"))
    presence = query.presence(around, of_others)
    services = {dict(labels).get("service", "") for labels in presence.label_sets} - {""}
    sightings = Sightings.of(presence)
    announced = list_announcements(store, around, check=check)
    # Announcements name no host: if the selector names more than the service, it must have run.
    is_wider = len(of_others.matchers) > len(of_service.matchers)
    announcements = [
        each
        for each in announced.announcements
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
    spans = service_spans(presence)

    @functools.cache  # deployments of one day look at the same hours
    def has_data(window: Window) -> bool:
        return query.has_data(window)

    def matched(each: Deployment) -> Match:
        same = [other for other in merged if other.service == each.service]
        return match(each, same, of_others, spans.get(each.service), has_data)

    return FoundDeployments(
        deployments=tuple(chosen),
        matches=tuple(map(matched, chosen)),
        all_ns=tuple(each.first_ns for each in merged),
        has_objects=bool(chosen) or query.has_data(window),
        services=tuple(sorted(services)),
        has_versions=bool(sightings.instances),
        skipped=(*presence.coverage.skipped, *announced.skipped),
    )


def announced_ns(
    store: TenantStore,
    services: Collection[str],
    before: Window,
    after: Window,
    check: Callable[[], None] = lambda: None,
) -> tuple[int, ...]:
    """Return when the service of two sides was deployed in their past, as far as it was announced.

    A comparison sees changes of the label version itself, so that a listing is enough. Among
    several services one is deployed again and again: then none of these times count.

    Raises:
        StoreError: the store cannot be listed.
    """
    named = set(services) - {""}
    if len(named) != 1:
        return ()
    found = list_announcements(store, history(before, after), check, named.pop())
    return tuple(each.at_ns for each in found.announcements)
