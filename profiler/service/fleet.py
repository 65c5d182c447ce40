"""The fleet: its services, functions or modules by the cores they use, and their trend.

What a window cost is kept for as long as its data stay the same, so that another order, a search or
the trend, which the page asks for after the rest, is answered from memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from msgspec import Meta

from profiler.fleet import Costs, FleetTop, Group, Line, Order, read_costs, week_before
from profiler.service.merged import Check, Kept, MergedProfiles, PanelRequest, ProfileKey
from profiler.service.responses import Count, Panel, Positive, WindowMs, panel_fields
from storage.profile import Window
from storage.query.threads import Turns

ServiceOrder = Literal["cores", "growth", "hosts", "name"]
FunctionOrder = Literal["self", "total", "growth", "name"]
FunctionGroup = Literal["function", "module"]

_KEPT_WORDS = 2_000_000
"""Lines and names of kept costs, some 12 to 20 bytes each: a dozen windows of a large fleet."""
_NAMED_VERSIONS = 10

Share = Annotated[float, Meta(ge=0, le=1)]
WeekBefore = Annotated[
    Positive | None,
    Meta(description="cores at the same time a week before; null if there is no trend"),
]


@dataclass(frozen=True)
class ServiceVersion:
    version: str
    cpu_ns: Count
    cores: Positive


@dataclass(frozen=True)
class FleetService:
    labels: Annotated[
        Mapping[str, str], Meta(description="service, if it has this label, and those of `by`")
    ]
    cpu_ns: Count
    cores: Positive
    share: Share
    cores_week_before: WeekBefore
    hosts: Count
    versions: Annotated[
        Sequence[ServiceVersion], Meta(description=f"the largest, at most {_NAMED_VERSIONS}")
    ]
    more_versions: Count


@dataclass(frozen=True)
class FleetFunction:
    labels: Mapping[str, str]
    function: Annotated[str, Meta(description="empty for a module")]
    module: str
    kind: str
    self_ns: Count
    total_ns: Annotated[Count | None, Meta(description="null for a module")]
    cores: Positive
    share: Share
    cores_week_before: WeekBefore


@dataclass(frozen=True, kw_only=True)
class FleetPanel(Panel):
    """What the tables of a fleet have in common."""

    covered_ns: Annotated[
        int, Meta(ge=0, description="for how long there are data; cores are CPU time per this time")
    ]
    cpu_ns: Count
    samples: Count
    cores: Positive
    cores_week_before: WeekBefore
    week_before: Annotated[
        WindowMs | None,
        Meta(description="what the trend compares with; null without trend, or with too few data"),
    ]
    rows: Annotated[int, Meta(ge=0, description="how many there are, shown or not")]


@dataclass(frozen=True, kw_only=True)
class FleetServices(FleetPanel):
    services: Sequence[FleetService]


@dataclass(frozen=True, kw_only=True)
class FleetFunctions(FleetPanel):
    functions: Sequence[FleetFunction]


@dataclass(frozen=True, slots=True)
class FleetRequest:
    """Which lines of a fleet's table are asked for, and in which order."""

    panel: PanelRequest
    group: Group
    order: ServiceOrder | FunctionOrder
    limit: int
    has_trend: bool


class Fleet:
    """The costs of the whole fleet, some of them kept. Safe to use from several threads."""

    def __init__(self, profiles: MergedProfiles) -> None:
        self._profiles = profiles
        self._kept: Kept[tuple[ProfileKey, Group, tuple[str, ...]], Costs] = Kept(_KEPT_WORDS)
        self._reading = Turns()

    def services(self, request: FleetRequest, check: Check) -> FleetServices:
        """Return the services of a fleet, at most `limit` of them."""
        top, lines, fields = self._read(request, check)
        return FleetServices(**fields, services=[_service_of(top.now, line) for line in lines])

    def functions(self, request: FleetRequest, check: Check) -> FleetFunctions:
        """Return the functions or modules of a fleet, at most `limit` of them."""
        _, lines, fields = self._read(request, check)
        return FleetFunctions(**fields, functions=list(map(_function_of, lines)))

    def _read(
        self, request: FleetRequest, check: Check
    ) -> tuple[FleetTop, list[Line], dict[str, Any]]:
        panel = request.panel
        query = self._profiles.query.interruptible(check)
        now, before = self._costs(panel, request.group, panel.window, check), None
        earlier = week_before(query, panel.window) if request.has_trend and now.whole else None
        if earlier is not None:
            costs = self._costs(panel, request.group, earlier, check)
            before = costs if costs.is_covered else None
        check()
        top = FleetTop(now, before)
        order: Order = "self" if request.order == "cores" else request.order
        lines, rows = top.lines(order, request.limit, panel.search)
        fields = {
            **panel_fields(query, panel, now.coverage, now.unit, now.samples),
            "covered_ns": now.covered_ns,
            "cpu_ns": now.whole,
            "samples": now.samples,
            "cores": now.cores(now.whole),
            "cores_week_before": None if before is None else before.cores(before.whole),
            "week_before": None if before is None else WindowMs.of(before.window),
            "rows": rows,
        }
        return top, lines, fields

    def _costs(self, panel: PanelRequest, group: Group, window: Window, check: Check) -> Costs:
        objects = self._profiles.query.fingerprint(window, panel.type, panel.labels)
        key = ((objects, str(panel.selector), panel.type), group, panel.by)
        with self._reading.of(repr(key), check):
            known = self._kept.get(key)
            if known is not None:
                return known
            query = self._profiles.query.interruptible(check)
            costs = read_costs(query, window, panel.selector, group, panel.by, type=panel.type)
            if costs.coverage.is_lasting:
                self._kept.put(key, costs)
            return costs


def _service_of(now: Costs, line: Line) -> FleetService:
    assert line.spread is not None  # it is a service
    versions = line.spread.versions
    return FleetService(
        labels=dict(line.labels),
        cpu_ns=line.self_ns,
        cores=line.cores,
        share=line.share,
        cores_week_before=line.cores_week_before,
        hosts=line.spread.hosts,
        versions=[
            ServiceVersion(version, cpu_ns, now.cores(cpu_ns))
            for version, cpu_ns in versions[:_NAMED_VERSIONS]
        ],
        more_versions=max(0, len(versions) - _NAMED_VERSIONS),
    )


def _function_of(line: Line) -> FleetFunction:
    return FleetFunction(
        dict(line.labels),
        *line.name,
        self_ns=line.self_ns,
        total_ns=line.total_ns,
        cores=line.cores,
        share=line.share,
        cores_week_before=line.cores_week_before,
    )
