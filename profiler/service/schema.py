"""Schema: the API as a table of endpoints, their parameters and responses; and openapi.json.

Requests are checked by it, and a test holds a running service to all of it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from profiler.service.exports import NAME_PATTERN

WIDTH_PX = (100, 10_000)
ROWS = (1, 10_000)
SERIES = (1, 100)
MOST_LABELS = 8
"""So many labels may be drawn above the stacks."""
MAX_REPEATED = 40
"""So many functions may be in focus, and as many hidden."""
TEXT_LIMIT = 4096
"""Characters of a parameter's value."""
LABEL_LIMIT = 200
"""Characters of a label's name in a path."""

_Schema = dict[str, Any]

_SHARED = ("query", "from", "until", "type")
_VIEW = ("by", "group", "node", "invert", "callers", "focus", "hide")
_BEFORE_SIDE = ("before_query", "before_from", "before_until")
_COMPARED = ("query", "from", "until", *_BEFORE_SIDE)
BEFORE = frozenset(_BEFORE_SIDE)
"""A request with one of them asks for a comparison."""


class Endpoint(NamedTuple):
    path: str
    summary: str
    parameters: tuple[str, ...]
    responses: Mapping[str, _Schema]
    """Schemas by media type."""
    problems: tuple[int, ...] = (400, 421, 503, 504)

    @property
    def repeatable(self) -> frozenset[str]:
        return frozenset({"focus", "hide"}.intersection(self.parameters))


def _object(fields: Mapping[str, _Schema], optional: Sequence[str] = ()) -> _Schema:
    required = [name for name in fields if name not in optional]
    return {"type": "object", "properties": dict(fields), "required": required}


def _array(items: _Schema, **more: Any) -> _Schema:
    return {"type": "array", "items": items, **more}


def _or_null(schema: _Schema) -> _Schema:
    return {**schema, "type": [schema["type"], "null"]}


def _ref(name: str) -> _Schema:
    return {"$ref": f"#/components/schemas/{name}"}


_TEXT: _Schema = {"type": "string"}
_COUNT: _Schema = {"type": "integer", "minimum": 0}
_FLAG: _Schema = {"type": "boolean"}
_SHARE: _Schema = {"type": ["number", "null"], "minimum": 0, "maximum": 1}
_POSITIVE: _Schema = {"type": "number", "minimum": 0}
_COUNTS = _array(_COUNT)
_COUNTS_BY_NAME: _Schema = {"type": "object", "additionalProperties": _COUNT}
_TEXTS_BY_NAME: _Schema = {"type": "object", "additionalProperties": _TEXT}
_NODE_ID: _Schema = {"type": "string", "pattern": "^[0-9a-f]{16}$"}
_SCHEMA: _Schema = {"const": 1}
_WINDOW = _object({"from_ms": _COUNT, "until_ms": _COUNT})
_OPERAND = _object({"query": _TEXT, "from_ms": _COUNT, "until_ms": _COUNT})
_FRAME: _Schema = {
    "type": "array",
    "description": "function, module, kind, file, line (0: unknown)",
    "prefixItems": [_TEXT, _TEXT, _TEXT, _TEXT, _COUNT],
    "minItems": 5,
    "maxItems": 5,
}
_COVERAGE = _object(
    {
        "hosts": _COUNT,
        "host_names": _array(_TEXT),
        "objects": _COUNT,
        "cpus": _COUNT,
        "ticks": _COUNT,
        "idle": _COUNT,
        "filtered": _COUNT,
        "stored": _COUNT,
        "lost": _COUNTS_BY_NAME,
        "stops": _COUNTS_BY_NAME,
        "complete": _SHARE,
        "nonidle_ns": _COUNT,
        "profiled_ns": _COUNT,
        "skipped": _array(_object({"key": _TEXT, "reason": _TEXT})),
    }
)
_EMPTY = _or_null(
    _object(
        {
            "reason": {"enum": ["no_data_ever", "no_data_in_range", "nothing_matches"]},
            "nearest": _array(_ref("Window")),
            "services": _array(_TEXT),
        }
    )
)
_HEAD = {
    "schema": _SCHEMA,
    "type": _TEXT,
    "unit": _TEXT,
    "window": _ref("Window"),
    "query": _TEXT,
    "host_seconds": {"type": "number", "minimum": 0},
    "coverage": _ref("Coverage"),
    "agent": _object({"cpu_ns": _COUNT, "rss_bytes": _COUNT}),
    "empty": _ref("Empty"),
}
_MODULES = _array(
    {
        "type": "array",
        "description": "a frame's module, the path and build id of such a file",
        "items": _TEXT,
        "minItems": 3,
        "maxItems": 3,
    }
)
_NODES = _object(dict.fromkeys(("frame", "depth", "total", "self", "samples"), _COUNTS))
_TOTALS = ("profiled_ns", "nonidle_ns", "ticks", "idle", "filtered", "stored", "lost")
_NUMBER: _Schema = {"type": "number"}
_OR_ENDLESS: _Schema = {"type": ["number", "null"]}
_ESTIMATE = _array(_OR_ENDLESS, minItems=3, maxItems=3)
"""An estimate and the ends of its 95 % interval; null is no end."""
_BOTH_SIDES = {"before": _COUNT, "after": _COUNT}
_BOTH_COSTS = {"before": _POSITIVE, "after": _POSITIVE}
_CHANGE: _Schema = {"enum": ["more", "less", "new", "gone", "unchanged", "too little data"]}
_NAMED = dict.fromkeys(("function", "module", "kind"), _TEXT)
_COMPARED_SIDE = _object(
    {
        "query": _TEXT,
        "window": _ref("Window"),
        "versions": _array(_TEXT),
        "hosts": _array(_TEXT),
        "samples": _COUNT,
        "cores": {**_POSITIVE, "description": "mean cores a host"},
        "coverage": _ref("Coverage"),
        "host_seconds": _POSITIVE,
    }
)
_COMPARISON = {
    "schema": _SCHEMA,
    "type": _TEXT,
    "unit": _TEXT,
    "verdict": {"enum": ["regression", "improvement", "unchanged", "inconclusive"]},
    "exit_code": _COUNT,
    "before": _ref("ComparedSide"),
    "after": _ref("ComparedSide"),
    "scale": {
        **_object(_BOTH_COSTS),
        "description": "times the nanoseconds of a side it is cores a host",
    },
    "noise": _object(
        {
            "source": {"enum": ["history", "hosts", "replicates", "none"]},
            "positions": _COUNT,
            "df": _POSITIVE,
        }
    ),
    "common_change": _object(
        {
            "relative": _NUMBER,
            "low": _OR_ENDLESS,
            "high": _OR_ENDLESS,
            "verdict": _CHANGE,
        }
    ),
    "warnings": _array(_TEXT),
}
_SCHEMAS: dict[str, _Schema] = {
    "Problem": _object(
        {
            "type": _TEXT,
            "title": _TEXT,
            "status": {"type": "integer", "minimum": 400, "maximum": 599},
            "detail": _TEXT,
            "parameter": _TEXT,
            "node": _NODE_ID,
            "side": {"enum": ["before", "after"]},
            "reason": {"enum": ["no_data_ever", "no_data_in_range", "nothing_matches"]},
            "nearest": _array(_ref("Window")),
            "services": _array(_TEXT),
            "versions": _array(_TEXT),
        },
        optional=("parameter", "node", "side", "reason", "nearest", "services", "versions"),
    ),
    "ComparedSide": _COMPARED_SIDE,
    "Diff": _object(
        {
            **_COMPARISON,
            "totals": _object(_BOTH_SIDES),
            "verdicts": _array(_TEXT, description="names of what nodes' verdicts are numbers of"),
            "frames": _array(_ref("Frame")),
            "modules": _MODULES,
            "nodes": {
                **_object(
                    dict.fromkeys(
                        (
                            *("frame", "depth", "before", "after"),
                            *("before_samples", "after_samples", "verdict"),
                        ),
                        _COUNTS,
                    )
                ),
                "description": "in preorder, the root first; the width is (before + after) / 2"
                " after both are scaled",
            },
            "rest": _object({"nodes": _COUNT, **_BOTH_SIDES}),
            "path": _array(
                _object(
                    {
                        "id": _NODE_ID,
                        "frame": _ref("Frame"),
                        **_BOTH_SIDES,
                        "before_samples": _COUNT,
                        "after_samples": _COUNT,
                    }
                )
            ),
        }
    ),
    "DiffTop": _object(
        {
            **_COMPARISON,
            "rows": _COUNT,
            "functions": _array(
                _object(
                    {
                        **_NAMED,
                        "self": _object(_BOTH_COSTS),
                        "total": _object(
                            {
                                **_BOTH_COSTS,
                                "because": _array(
                                    _object({**_NAMED, **_BOTH_SIDES}),
                                    description="changed functions below it, and what they cost"
                                    " there",
                                ),
                            }
                        ),
                        **dict.fromkeys(("cores", "share", "relative"), _ESTIMATE),
                        "p": _NUMBER,
                        "q": _NUMBER,
                        "verdict": _CHANGE,
                        "because": _TEXT,
                        "fails": _FLAG,
                        "moved": {**_FLAG, "description": "from some callers to others"},
                    }
                ),
                description="what changed first, then by cost",
            ),
        }
    ),
    "Window": _WINDOW,
    "Frame": _FRAME,
    "Coverage": _COVERAGE,
    "Empty": _EMPTY,
    "FlameGraph": _object(
        {
            **_HEAD,
            "total": _COUNT,
            "samples": _COUNT,
            "frames": _array(_ref("Frame")),
            "modules": _MODULES,
            "nodes": {**_NODES, "description": "in preorder, the root first"},
            "rest": _object({"nodes": _COUNT, "total": _COUNT}),
            "path": _array(
                _object(
                    {"id": _NODE_ID, "frame": _ref("Frame"), "total": _COUNT, "samples": _COUNT}
                )
            ),
            "search": _or_null(
                _object({"text": _TEXT, "total": _COUNT, "samples": _COUNT, "functions": _COUNT})
            ),
        }
    ),
    "Top": _object(
        {
            **_HEAD,
            "total": _COUNT,
            "samples": _COUNT,
            "rows": _COUNT,
            "functions": _array(
                _object(
                    {
                        **dict.fromkeys(("function", "module", "kind", "file"), _TEXT),
                        **dict.fromkeys(("self", "total", "self_samples", "total_samples"), _COUNT),
                    }
                )
            ),
        }
    ),
    "Timeline": _object(
        {
            **_HEAD,
            "start_ms": _COUNT,
            "step_ms": _COUNT,
            "series": _array(
                _object(
                    {"labels": _TEXTS_BY_NAME, "rest": _FLAG, "values": _COUNTS, "samples": _COUNTS}
                )
            ),
            "totals": _object(dict.fromkeys(_TOTALS, _COUNTS)),
            "covered_ns": _COUNTS,
        }
    ),
    "Labels": _object(
        {
            "schema": _SCHEMA,
            "window": _ref("Window"),
            "labels": _array(_object({"name": _TEXT, "values": _COUNT, "samples": _COUNT})),
        }
    ),
    "LabelValues": _object(
        {
            "schema": _SCHEMA,
            "window": _ref("Window"),
            "name": _TEXT,
            "values": _array(_object({"value": _TEXT, "samples": _COUNT})),
        }
    ),
    "Deployments": _object(
        {
            "schema": _SCHEMA,
            "window": _ref("Window"),
            "query": _TEXT,
            "deployments": _array(
                _object(
                    {
                        **dict.fromkeys(("service", "version", "previous"), _TEXT),
                        **dict.fromkeys(("first_ms", "last_ms", "settled_ms"), _COUNT),
                        **dict.fromkeys(("hosts", "hosts_before"), _array(_TEXT)),
                        "kind": {"enum": ["rollout", "rollback", "canary"]},
                        "source": {"enum": ["found", "announced"]},
                        "compare": {
                            **_or_null(_object({"before": _OPERAND, "after": _OPERAND})),
                            "description": "the matched windows, or null, and compare_reason why",
                        },
                        "compare_reason": _TEXT,
                    }
                ),
                description="newest first; previous is empty where it is not known",
            ),
            "rest": {**_COUNT, "description": "older ones that are beyond the limit"},
            "empty": _or_null(
                _object(
                    {
                        "reason": {
                            "enum": [
                                "no_data_in_range",
                                "nothing_matches",
                                "no_versions",
                                "no_change",
                            ]
                        },
                        "services": _array(_TEXT),
                    }
                )
            ),
            "skipped": _array(_object({"key": _TEXT, "reason": _TEXT})),
        }
    ),
    "Status": _object(
        {
            "schema": _SCHEMA,
            "version": _TEXT,
            "store": _TEXT,
            "type": _TEXT,
            "now_ms": _COUNT,
            "started_ms": _COUNT,
            "keep": _or_null(_object({"seconds": _COUNT, "bytes": _COUNT})),
            "data": {"oneOf": [_ref("Window"), {"type": "null"}]},
            "hosts": _array(_TEXT),
            "agent": {"type": ["object", "null"], "description": "as everflame status --json"},
            "ahead": {
                **_or_null(
                    _object(
                        {
                            **dict.fromkeys(("decoded", "waiting", "cpu_ns", "at_ms"), _COUNT),
                            "error": _TEXT,
                        }
                    )
                ),
                "description": "objects decoded before anybody asked, since the start",
            },
        }
    ),
}


def _json(name: str) -> dict[str, _Schema]:
    return {"application/json": _ref(name)}


ENDPOINTS = {
    "flamegraph": Endpoint(
        "/api/v1/flamegraph",
        "The flame graph of a window, cut for a screen of a width",
        (*_SHARED, *_VIEW, "search", "width"),
        _json("FlameGraph"),
        (400, 404, 421, 503, 504),
    ),
    "top": Endpoint(
        "/api/v1/top",
        "The table of functions, from the full data",
        (*_SHARED, *_VIEW, "search", "sort", "limit"),
        _json("Top"),
        (400, 404, 421, 503, 504),
    ),
    "diff": Endpoint(
        "/api/v1/diff",
        "A window compared with one before it, as one flame graph cut for a screen of a width",
        (*_COMPARED, *_VIEW, "width", "fail_over"),
        _json("Diff"),
        (400, 404, 421, 503, 504),
    ),
    "diff_top": Endpoint(
        "/api/v1/diff/top",
        "A window compared with one before it, function by function",
        (*_COMPARED, "search", "limit", "fail_over"),
        _json("DiffTop"),
        (400, 404, 421, 503, 504),
    ),
    "timeline": Endpoint(
        "/api/v1/timeline",
        "CPU time per step",
        (*_SHARED, "by", "step", "limit"),
        _json("Timeline"),
    ),
    "deployments": Endpoint(
        "/api/v1/deployments",
        "When services began to run another version",
        ("query", "from", "until"),
        _json("Deployments"),
    ),
    "labels": Endpoint("/api/v1/labels", "The names of labels", _SHARED, _json("Labels")),
    "label_values": Endpoint(
        "/api/v1/labels/{name}/values",
        "The values of a label",
        _SHARED,
        _json("LabelValues"),
        (400, 404, 421, 503, 504),
    ),
    "export": Endpoint(
        "/api/v1/export/{name}",
        "A file for other tools, in the format that the ending of its name says; with before_query,"
        " before_from or before_until of a comparison",
        (*_SHARED, *_VIEW, *_BEFORE_SIDE, "fail_over"),
        {
            "application/json": {"type": "object"},
            "text/plain": _TEXT,
            "image/svg+xml": _TEXT,
            "application/octet-stream": {"type": "string", "contentMediaType": "application/gzip"},
        },
        (400, 404, 421, 503, 504),
    ),
    "status": Endpoint(
        "/api/v1/status", "What this service and its store are", (), _json("Status")
    ),
    "openapi": Endpoint(
        "/api/v1/openapi.json", "This document", (), {"application/json": {"type": "object"}}
    ),
    "healthz": Endpoint(
        "/healthz", "Whether the service runs", (), {"text/plain": _TEXT}, (400, 421, 503)
    ),
    "readyz": Endpoint(
        "/readyz",
        "Whether the store responds",
        (),
        {"application/json": _object({"ready": {"const": True}})},
    ),
    "metrics": Endpoint(
        "/metrics",
        "Figures of the service for Prometheus",
        (),
        {"text/plain": _TEXT},
        (400, 421, 503),
    ),
}

_NAME = r"^[^\u0000]*$"
_FREE_TEXT: _Schema = {"type": "string", "maxLength": TEXT_LIMIT, "pattern": _NAME}
_FUNCTIONS = _array(_FREE_TEXT, maxItems=MAX_REPEATED)


def _number(limits: tuple[int, int], usual: int) -> _Schema:
    return {"type": "integer", "minimum": limits[0], "maximum": limits[1], "default": usual}


_PARAMETERS: dict[str, tuple[str, _Schema]] = {
    "query": (
        'labels to keep, as {service="api",version=~"1\\\\.5.*"}',
        {"type": "string", "format": "selector"},
    ),
    "from": (
        "now-1h, RFC 3339, Unix seconds or milliseconds",
        {"type": "string", "format": "moment", "default": "now-1h"},
    ),
    "until": ("as from", {"type": "string", "format": "moment", "default": "now"}),
    "before_query": (
        "labels to keep of the side before; by default those of query",
        {"type": "string", "format": "selector"},
    ),
    "before_from": (
        "when the side before begins, as from; by default it is as long as the other",
        {"type": "string", "format": "moment"},
    ),
    "before_until": (
        "when the side before ends, as from; by default where the other begins",
        {"type": "string", "format": "moment"},
    ),
    "fail_over": (
        "what a function that costs more must reach to fail, as relative>=10%,share>=0.5pp",
        {"type": "string", "format": "gate", "default": "relative>=10%,share>=0.5pp"},
    ),
    "type": ("what is counted", {"type": "string", "enum": ["cpu", "samples"], "default": "cpu"}),
    "by": (
        f"labels drawn above the stacks, with commas between, at most {MOST_LABELS}",
        {
            **_FREE_TEXT,
            "pattern": rf"^([^,\u0000]*,){{0,{MOST_LABELS - 1}}}[^,\u0000]*$",
        },
    ),
    "group": (
        "what a box is",
        {"type": "string", "enum": ["function", "line", "file", "module"], "default": "function"},
    ),
    "node": ("the node to zoom into", _NODE_ID),
    "invert": ("1: from the leaves", {"type": "string", "enum": ["0", "1"], "default": "0"}),
    "callers": ("a function whose callers are shown", _FREE_TEXT),
    "focus": ("only stacks with this function; may be repeated", _FUNCTIONS),
    "hide": ("a function to leave out; may be repeated", _FUNCTIONS),
    "search": ("part of a function or module, in any case", _FREE_TEXT),
    "width": ("of the screen in pixels", _number(WIDTH_PX, 1200)),
    "sort": (
        "of the table",
        {"type": "string", "enum": ["self", "total", "name", "module"], "default": "self"},
    ),
    "top limit": ("rows of the table", _number(ROWS, 200)),
    "diff_top limit": ("rows of the table", _number(ROWS, 200)),
    "timeline limit": ("series; beyond it they are summed in one", _number(SERIES, 8)),
    "step": (
        "60s, or milliseconds; by default there are up to 180 steps",
        {"type": "string", "format": "step"},
    ),
    "label_values name": (
        "a label",
        {"type": "string", "minLength": 1, "maxLength": LABEL_LIMIT, "pattern": r"^[^/\u0000]+$"},
    ),
    "export name": (
        "what the file is to be called, with .speedscope.json, .folded, .pb.gz, .svg or .json",
        {"type": "string", "pattern": f"^{NAME_PATTERN}$"},
    ),
}
"""By name; by endpoint and name where endpoints differ."""

_PROBLEMS = {
    400: "the request cannot be understood",
    404: "there is no such node, file or label, or nothing to compare",
    421: "the Host header names another machine",
    503: "the store cannot be reached, or too many requests wait; try again",
    504: "it took too long",
}


def document(version: str) -> dict[str, Any]:
    """Return the description of the API in OpenAPI 3.1."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "Everflame", "version": version},
        "paths": {
            endpoint.path: {"get": _operation(name, endpoint)}
            for name, endpoint in ENDPOINTS.items()
        },
        "components": {"schemas": _SCHEMAS},
    }


def _operation(name: str, endpoint: Endpoint) -> dict[str, Any]:
    parameters = [_parameter(name, each, "query") for each in endpoint.parameters]
    if "{name}" in endpoint.path:
        parameters.append(_parameter(name, "name", "path"))
    return {
        "operationId": name,
        "summary": endpoint.summary,
        "parameters": parameters,
        "responses": {
            "200": {
                "description": "the response",
                "content": {kind: {"schema": each} for kind, each in endpoint.responses.items()},
            },
            **{str(code): _problem(_PROBLEMS[code]) for code in endpoint.problems},
        },
    }


def _parameter(endpoint: str, name: str, place: str) -> dict[str, Any]:
    known = _PARAMETERS.get(f"{endpoint} {name}") or _PARAMETERS[name]
    required = {"required": True} if place == "path" else {}
    return {"name": name, "in": place, "description": known[0], "schema": known[1], **required}


def _problem(description: str) -> dict[str, Any]:
    content = {"application/problem+json": {"schema": _ref("Problem")}}
    return {"description": description, "content": content}
