"""Responses: the types that the responses of several panels have in common.

Each panel's module holds the type of its response: a dataclass that orjson writes as it is, and
that `openapi.json` describes (`profiler.service.schema`). They have no slots: orjson writes those
without eight times as fast. Times out are Unix milliseconds; arrays are counts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from msgspec import Meta

from profiler.service.merged import PanelRequest
from storage.columns import Columns
from storage.profile import GOOD_STOPS, Window
from storage.query.coverage import Coverage
from storage.query.query import Query

SCHEMA: Literal[1] = 1

NAMED_SERVICES = 50
_NAMED_HOSTS = 100
_NAMED_MODULES = 1_000

Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[float, Meta(ge=0)]
Counts = npt.NDArray[np.integer[Any]]
NodeId = Annotated[str, Meta(pattern="^[0-9a-f]{16}$")]
FrameRow = Annotated[
    tuple[str, str, str, str, Count],
    Meta(
        description="function, module, kind, file, line (0: unknown); a function's line is the one"
        " on which it begins"
    ),
]
ModuleFile = Annotated[
    tuple[str, str, str],
    Meta(description="a frame's module, and the path and build id of a file of that name"),
]


@dataclass(frozen=True)
class WindowMs:
    from_ms: Count
    until_ms: Count

    @classmethod
    def of(cls, window: Window) -> "WindowMs":
        return cls(window.start_ns // 1_000_000, window.end_ns // 1_000_000)


@dataclass(frozen=True)
class SkippedObject:
    key: str
    reason: str


@dataclass(frozen=True)
class DataCoverage:
    """The accounting of the objects that a response is made of."""

    hosts: Count
    host_names: Sequence[str]
    objects: Count
    cpus: Count
    ticks: Count
    idle: Count
    filtered: Count
    stored: Count
    lost: Mapping[str, Count]
    stops: Mapping[str, Count]
    uncounted: Count
    runtimes: Mapping[str, Mapping[str, Count]]
    complete: Annotated[float, Meta(ge=0, le=1)] | None
    nonidle_ns: Count
    profiled_ns: Count
    skipped: Sequence[SkippedObject]

    @classmethod
    def of(cls, coverage: Coverage) -> "DataCoverage":
        accounting = coverage.accounting
        stops = {str(reason): count for reason, count in accounting.stops.items()}
        good = sum(count for reason, count in stops.items() if reason in GOOD_STOPS)
        ended = sum(stops.values())
        return cls(
            hosts=len(accounting.hosts),
            host_names=[host.name for host in accounting.hosts[:_NAMED_HOSTS]],
            objects=coverage.objects,
            cpus=accounting.cpus,
            ticks=accounting.ticks,
            idle=accounting.idle,
            filtered=accounting.filtered,
            stored=accounting.stored,
            lost={str(cause): count for cause, count in accounting.lost.items()},
            stops=stops,
            uncounted=accounting.uncounted,
            runtimes=accounting.runtimes,
            complete=good / ended if ended else None,
            nonidle_ns=accounting.nonidle_ns,
            profiled_ns=accounting.profiled_ns,
            skipped=[SkippedObject(*each) for each in coverage.skipped],
        )


@dataclass(frozen=True)
class AgentCost:
    cpu_ns: Count
    rss_bytes: Count


EmptyReason = Literal["no_data_ever", "no_data_in_range", "nothing_matches"]


@dataclass(frozen=True)
class Empty:
    """Why there are no samples, and what there is instead."""

    reason: EmptyReason
    nearest: Sequence[WindowMs]
    services: Sequence[str]

    @classmethod
    def of(
        cls, query: Query, request: PanelRequest, coverage: Coverage, samples: int
    ) -> "Empty | None":
        """Return why there are no samples; None if there are some."""
        if samples:
            return None
        has_objects = coverage.objects or (
            request.selector.matchers and query.has_data(request.window)
        )
        if has_objects:
            services = query.label_values(request.window, "service")
            return cls("nothing_matches", [], list(services)[:NAMED_SERVICES])
        nearest = [WindowMs.of(each) for each in query.nearest(request.window)]
        return cls("no_data_in_range" if nearest else "no_data_ever", nearest, [])


@dataclass(frozen=True, kw_only=True)
class Panel:
    """What the panels of a window have in common."""

    schema: Literal[1]
    type: str
    unit: str
    window: WindowMs
    query: str
    host_seconds: Positive
    coverage: DataCoverage
    agent: AgentCost
    empty: Empty | None


def panel_fields(
    query: Query, request: PanelRequest, coverage: Coverage, unit: str, samples: int
) -> dict[str, Any]:
    """Return the fields of `Panel`."""
    accounting = coverage.accounting
    return {
        "schema": SCHEMA,
        "type": request.type,
        "unit": unit,
        "window": WindowMs.of(request.window),
        "query": query_text(request),
        "host_seconds": accounting.profiled_ns / 1e9,
        "coverage": DataCoverage.of(coverage),
        "agent": AgentCost(accounting.agent_cpu_ns, accounting.agent_rss_bytes),
        "empty": Empty.of(query, request, coverage, samples),
    }


def query_text(request: PanelRequest) -> str:
    return str(request.selector) if request.selector.matchers else ""


def files_of(profile: Columns, modules: set[str]) -> list[tuple[str, str, str]]:
    """Return (module, path, build id) of the files behind frames; names may repeat."""
    files = (file for file in profile.modules.values() if file.name in modules)
    return sorted((file.name, file.path, file.build_id) for file in files)[:_NAMED_MODULES]
