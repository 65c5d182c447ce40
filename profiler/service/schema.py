"""Schema: the API as a table of endpoints; openapi.json (OpenAPI 3.1) describes it.

The descriptions come from the types of parameters and responses themselves. A test holds a running
service to all of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta

from profiler.service import parameters as p
from profiler.service.deployments import Deployments
from profiler.service.diff import Diff, DiffTop
from profiler.service.flame_graph import FlameGraph
from profiler.service.fleet import FleetFunctions, FleetServices
from profiler.service.labels import Labels, LabelValues
from profiler.service.problems import Problem
from profiler.service.status import Status
from profiler.service.timeline import TimelinePanel
from profiler.service.top_table import Top


@dataclass(frozen=True)
class Ready:
    ready: Literal[True]


class Endpoint(NamedTuple):
    path: str
    summary: str
    parameters: type
    responses: Mapping[str, Any]
    """Types by media type."""
    problems: tuple[int, ...] = (400, 421, 503, 504)
    path_parameters: type = p.NoParameters


def _json(response: Any) -> dict[str, Any]:
    return {"application/json": response}


_OR_MISSING = (400, 404, 421, 503, 504)
_WITHOUT_STORE = (400, 421, 503)

ENDPOINTS = {
    "flamegraph": Endpoint(
        "/api/v1/flamegraph",
        "The flame graph of a window, cut for a screen of a width",
        p.FlameGraphParameters,
        _json(FlameGraph),
        _OR_MISSING,
    ),
    "top": Endpoint(
        "/api/v1/top",
        "The table of functions, from the full data",
        p.TopParameters,
        _json(Top),
        _OR_MISSING,
    ),
    "diff": Endpoint(
        "/api/v1/diff",
        "A window compared with one before it, as one flame graph cut for a screen of a width",
        p.DiffGraphParameters,
        _json(Diff),
        _OR_MISSING,
    ),
    "diff_top": Endpoint(
        "/api/v1/diff/top",
        "A window compared with one before it, function by function",
        p.DiffTopParameters,
        _json(DiffTop),
        _OR_MISSING,
    ),
    "fleet_services": Endpoint(
        "/api/v1/fleet/services",
        "The services of a fleet by the cores they use, with hosts, versions and trend",
        p.FleetServicesParameters,
        _json(FleetServices),
    ),
    "fleet_top": Endpoint(
        "/api/v1/fleet/top",
        "The functions or modules of a fleet by the cores they use, with their trend",
        p.FleetTopParameters,
        _json(FleetFunctions),
    ),
    "timeline": Endpoint(
        "/api/v1/timeline", "CPU time per step", p.TimelineParameters, _json(TimelinePanel)
    ),
    "deployments": Endpoint(
        "/api/v1/deployments",
        "When services began to run another version",
        p.RangeParameters,
        _json(Deployments),
    ),
    "labels": Endpoint("/api/v1/labels", "The names of labels", p.TypeParameters, _json(Labels)),
    "label_values": Endpoint(
        "/api/v1/labels/{name}/values",
        "The values of a label",
        p.TypeParameters,
        _json(LabelValues),
        _OR_MISSING,
        p.LabelPath,
    ),
    "export": Endpoint(
        "/api/v1/export/{name}",
        "A file for other tools, in the format that the ending of its name says; with before_query,"
        " before_from or before_until of a comparison",
        p.ExportParameters,
        {
            "application/json": dict[str, Any],
            "text/plain": str,
            "image/svg+xml": str,
            "application/octet-stream": Annotated[
                str, Meta(extra_json_schema={"contentMediaType": "application/gzip"})
            ],
        },
        _OR_MISSING,
        p.ExportPath,
    ),
    "status": Endpoint(
        "/api/v1/status", "What this service and its store are", p.NoParameters, _json(Status)
    ),
    "openapi": Endpoint(
        "/api/v1/openapi.json", "This document", p.NoParameters, _json(dict[str, Any])
    ),
    "healthz": Endpoint(
        "/healthz",
        "Whether the service runs",
        p.NoParameters,
        {"text/plain": str},
        _WITHOUT_STORE,
    ),
    "readyz": Endpoint("/readyz", "Whether the store responds", p.NoParameters, _json(Ready)),
    "metrics": Endpoint(
        "/metrics",
        "Figures of the service for Prometheus",
        p.NoParameters,
        {"text/plain": str},
        _WITHOUT_STORE,
    ),
}

_PROBLEMS = {
    400: "the request cannot be understood",
    404: "there is no such node, file or label, or nothing to compare",
    421: "the Host header names another machine",
    503: "the store cannot be reached, or too many requests wait; try again",
    504: "it took too long; try again, or ask for a shorter time",
}


def document(version: str) -> dict[str, Any]:
    """Return the description of the API in OpenAPI 3.1."""
    described = [
        (name, media_type, response)
        for name, endpoint in ENDPOINTS.items()
        for media_type, response in endpoint.responses.items()
    ]
    schemas, components = msgspec.json.schema_components(
        [*(response for _, _, response in described), Problem],
        schema_hook=_array_schema,
        ref_template="#/components/schemas/{name}",
    )
    contents: dict[str, dict[str, Any]] = {name: {} for name in ENDPOINTS}
    for (name, media_type, _), schema in zip(described, schemas, strict=False):
        contents[name][media_type] = {"schema": schema}
    problem = {"application/problem+json": {"schema": schemas[-1]}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Everflame", "version": version},
        "paths": {
            endpoint.path: {"get": _operation(name, endpoint, contents[name], problem)}
            for name, endpoint in ENDPOINTS.items()
        },
        "components": {"schemas": components},
    }


def _operation(
    name: str, endpoint: Endpoint, content: Mapping[str, Any], problem: Mapping[str, Any]
) -> dict[str, Any]:
    problems = {
        str(code): {"description": _PROBLEMS[code], "content": problem}
        for code in endpoint.problems
    }
    return {
        "operationId": name,
        "summary": endpoint.summary,
        "parameters": [
            *_parameters(endpoint.parameters, {"in": "query"}),
            *_parameters(endpoint.path_parameters, {"in": "path", "required": True}),
        ],
        "responses": {"200": {"description": "the response", "content": content}, **problems},
    }


def _parameters(parameters: type, place: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = []
    for name, schema in p.schemas_of(parameters).items():
        rest = {key: value for key, value in schema.items() if key != "description"}
        found.append({"name": name, **place, "description": schema["description"], "schema": rest})
    return found


def _array_schema(kind: type) -> dict[str, Any]:
    """Describe an array of a response, which holds counts."""
    assert kind is np.ndarray
    return {"type": "array", "items": {"type": "integer", "minimum": 0}}
