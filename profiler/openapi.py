"""What each endpoint takes, as the one table that requests are checked by and openapi.json says."""

from typing import Any, NamedTuple

_SHARED = ("query", "from", "until", "type")
_VIEW = ("by", "group", "node", "invert", "callers", "focus", "hide", "search")


class Endpoint(NamedTuple):
    path: str
    summary: str
    parameters: tuple[str, ...]
    media_type: str = "application/json"


ENDPOINTS = {
    "flamegraph": Endpoint(
        "/api/v1/flamegraph",
        "The flame graph of a window, cut for a screen of a width",
        (*_SHARED, *_VIEW, "width"),
    ),
    "top": Endpoint(
        "/api/v1/top",
        "The table of functions, from the full data",
        (*_SHARED, *_VIEW, "sort", "limit"),
    ),
    "timeline": Endpoint(
        "/api/v1/timeline", "CPU time per step", (*_SHARED, "by", "step", "limit")
    ),
    "labels": Endpoint("/api/v1/labels", "The names of labels", _SHARED),
    "label_values": Endpoint("/api/v1/labels/{name}/values", "The values of a label", _SHARED),
    "export": Endpoint(
        "/api/v1/export/{name}",
        "A file: .speedscope.json, .folded, .pb.gz, .svg or .json",
        (*_SHARED, "by"),
        "application/octet-stream",
    ),
    "status": Endpoint("/api/v1/status", "What this service and its store are", ()),
    "openapi": Endpoint("/api/v1/openapi.json", "This document", ()),
    "readyz": Endpoint("/readyz", "Whether the store answers", ()),
}

_PARAMETERS: dict[str, tuple[str, dict[str, Any]]] = {
    "query": ('labels to keep, as {service="api",version=~"1\\\\.5.*"}', {"type": "string"}),
    "from": ("now-1h, RFC 3339, Unix seconds or ms (default: an hour ago)", {"type": "string"}),
    "until": ("as from (default: now)", {"type": "string"}),
    "type": ("what is counted", {"type": "string", "enum": ["cpu", "samples"]}),
    "by": ("labels drawn above the stacks, with commas between", {"type": "string"}),
    "group": ("what a box is", {"type": "string", "enum": ["function", "line", "file", "module"]}),
    "node": ("the node to zoom into", {"type": "string", "pattern": "^[0-9a-f]{16}$"}),
    "invert": ("1: from the leaves", {"type": "string", "enum": ["0", "1"]}),
    "callers": ("a function whose callers are shown", {"type": "string"}),
    "focus": ("only stacks with this function", {"type": "array", "items": {"type": "string"}}),
    "hide": ("a function to leave out", {"type": "array", "items": {"type": "string"}}),
    "search": ("part of a function or module, in any case", {"type": "string"}),
    "width": ("of the screen in pixels", {"type": "integer", "minimum": 100, "maximum": 10000}),
    "sort": ("of the table", {"type": "string", "enum": ["self", "total", "name", "module"]}),
    "limit": ("rows, or series", {"type": "integer", "minimum": 1}),
    "step": ("60s, or milliseconds", {"type": "string"}),
}


def document(version: str) -> dict[str, Any]:
    """Give the description of the API in OpenAPI 3.1."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "Everflame", "version": version},
        "paths": {
            endpoint.path: {"get": _operation(name, endpoint)}
            for name, endpoint in ENDPOINTS.items()
        },
    }


def _operation(name: str, endpoint: Endpoint) -> dict[str, Any]:
    parameters: list[dict[str, Any]] = []
    for each in endpoint.parameters:
        description, schema = _PARAMETERS[each]
        parameters.append(
            {"name": each, "in": "query", "description": description, "schema": schema}
        )
    if "{name}" in endpoint.path:
        parameters.append(
            {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
        )
    problem = {
        "description": "what is wrong",
        "content": {"application/problem+json": {"schema": {"type": "object"}}},
    }
    return {
        "operationId": name,
        "summary": endpoint.summary,
        "parameters": parameters,
        "responses": {
            "200": {
                "description": "the answer",
                "content": {endpoint.media_type: {"schema": {}}},
            },
            **dict.fromkeys(("400", "404", "421", "503", "504"), problem),
        },
    }
