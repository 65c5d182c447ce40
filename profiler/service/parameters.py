"""Parameters: what the query string of a request may ask for, one type for each endpoint.

`openapi.json` describes these types, and requests are checked against them: a parameter that is
unknown, given twice or not as described is a problem.
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import parse_qsl

import msgspec
from msgspec import UNSET, Meta, UnsetType

from profiler.comparison.gate import DEFAULT_GATE, Gate
from profiler.comparison.sides import Operand
from profiler.flamegraph.flamegraph import ROOT_ID
from profiler.flamegraph.stacks import Group
from profiler.service.exports import NAME_PATTERN
from profiler.service.fleet import FleetRequest, FunctionGroup, FunctionOrder, ServiceOrder
from profiler.service.merged import PanelRequest
from profiler.service.problems import ProblemError, bad_parameter, bad_request
from profiler.service.top_table import Sort
from profiler.text import fit
from profiler.times import parse_time, parse_window, rfc3339
from storage.profile import Window
from storage.selector import Selector

_FIELDS_LIMIT = 100
"""Parameters of one request; more are refused before they are looked at."""
_TEXT_LIMIT = 4096
"""Characters of a parameter's value."""
_MOST_LABELS = 8
"""So many labels may be drawn above the stacks."""
_MOST_REPEATED = 40
"""So many functions may be in focus, and as many hidden."""
_SHOWN_CELLS = 200
"""Of a query in a message."""
_LABEL_LIMIT = 200
"""Characters of a label's name in a path."""

_Parameters = TypeVar("_Parameters")


def _format(name: str) -> dict[str, Any]:
    return {"format": name}


Text = Annotated[str, Meta(max_length=_TEXT_LIMIT, pattern=r"^[^\u0000]*$")]
_Functions = Annotated[tuple[Text, ...], Meta(max_length=_MOST_REPEATED)]
_Flag = Literal["0", "1"]
_Moment = Annotated[str, Meta(extra_json_schema=_format("moment"))]
_Selector = Annotated[str, Meta(extra_json_schema=_format("selector"))]
Limit = Annotated[int, Meta(ge=1, le=10_000, description="rows of the table")]
Width = Annotated[int, Meta(ge=100, le=10_000, description="of the screen in pixels")]
Search = Annotated[Text, Meta(description="part of a function or module, in any case")]
Labels = Annotated[
    str,
    Meta(
        title=f"at most {_MOST_LABELS} labels with commas between them",
        description=f"labels drawn above the stacks, with commas between, at most {_MOST_LABELS}",
        max_length=_TEXT_LIMIT,
        pattern=rf"^([^,\u0000]*,){{0,{_MOST_LABELS - 1}}}[^,\u0000]*$",
    ),
]
Split = Annotated[
    str,
    Meta(
        title=f"at most {_MOST_LABELS} labels with commas between them",
        description=f"labels that tell rows apart, with commas between, at most {_MOST_LABELS}",
        max_length=_TEXT_LIMIT,
        pattern=rf"^([^,\u0000]*,){{0,{_MOST_LABELS - 1}}}[^,\u0000]*$",
    ),
]
FailOver = Annotated[
    str,
    Meta(
        description=f"a function that costs this much more fails, as {DEFAULT_GATE}",
        extra_json_schema=_format("gate"),
    ),
]


@dataclass(frozen=True)
class NoParameters:
    """Of an endpoint that takes none."""


@dataclass(frozen=True, kw_only=True)
class RangeParameters:
    """Which part of the store. A trailing `_` is not in the parameter's name."""

    query: Annotated[
        _Selector, Meta(description='labels to keep, as {service="api",version=~"1\\\\.5.*"}')
    ] = ""
    from_: Annotated[
        _Moment, Meta(description="now-1h, RFC 3339, Unix seconds or milliseconds")
    ] = "now-1h"
    until: Annotated[_Moment, Meta(description="as from")] = "now"


@dataclass(frozen=True, kw_only=True)
class TypeParameters(RangeParameters):
    type: Annotated[Literal["cpu", "samples"], Meta(description="what is counted")] = "cpu"


@dataclass(frozen=True, kw_only=True)
class ViewParameters(RangeParameters):
    by: Labels = "service"
    group: Annotated[Group, Meta(description="what a box is")] = Group.FUNCTION
    node: Annotated[
        str,
        Meta(
            title="16 hex digits",
            description="the node to zoom into",
            pattern="^[0-9a-f]{16}$",
            min_length=16,
            max_length=16,
        ),
    ] = f"{ROOT_ID:016x}"
    invert: Annotated[_Flag, Meta(description="1: from the leaves")] = "0"
    callers: Annotated[Text, Meta(description="a function whose callers are shown")] = ""
    focus: Annotated[
        _Functions, Meta(description="only stacks with this function; may be repeated")
    ] = ()
    hide: Annotated[_Functions, Meta(description="a function to leave out; may be repeated")] = ()
    python_native: Annotated[
        _Flag, Meta(description="1: with the interpreter's own frames around Python functions")
    ] = "0"


@dataclass(frozen=True, kw_only=True)
class DiffParameters(RangeParameters):
    """The range is the side after."""

    before_query: (
        Annotated[
            _Selector,
            Meta(description="labels to keep of the side before; by default those of query"),
        ]
        | UnsetType
    ) = UNSET
    before_from: (
        Annotated[
            _Moment,
            Meta(description="start of the side before; by default it is as long as the other"),
        ]
        | UnsetType
    ) = UNSET
    before_until: (
        Annotated[
            _Moment, Meta(description="end of the side before; by default the start of the other")
        ]
        | UnsetType
    ) = UNSET
    fail_over: FailOver = DEFAULT_GATE

    @property
    def is_comparison(self) -> bool:
        """Return whether any parameter of the side before is given."""
        sides = (self.before_query, self.before_from, self.before_until)
        return any(each is not UNSET for each in sides)

    def before(self, request: PanelRequest, now_ns: int) -> Operand:
        """Return the side that a request is compared with: by default the time just before it."""
        start_ns, end_ns = request.window
        end = self.before_until or rfc3339(start_ns)
        until_ns = _parse_moment("before_until", end, now_ns)
        start = self.before_from or rfc3339(max(0, until_ns - end_ns + start_ns))
        window = _parse_window(("before_from", "before_until"), start, end, now_ns)
        if self.before_query is UNSET:
            return Operand(request.selector, window)
        return Operand(_parse_selector("before_query", self.before_query), window)

    def gate(self) -> Gate:
        try:
            return Gate.parse(self.fail_over or DEFAULT_GATE)
        except ValueError as error:
            raise bad_parameter("fail_over", str(error)) from error


@dataclass(frozen=True, kw_only=True)
class FlameGraphParameters(TypeParameters, ViewParameters):
    search: Search = ""
    width: Width = 1200


@dataclass(frozen=True, kw_only=True)
class TopParameters(TypeParameters, ViewParameters):
    search: Search = ""
    sort: Annotated[Sort, Meta(description="of the table")] = "self"
    limit: Limit = 200


@dataclass(frozen=True, kw_only=True)
class DiffGraphParameters(DiffParameters, ViewParameters):
    width: Width = 1200


@dataclass(frozen=True, kw_only=True)
class DiffTopParameters(DiffParameters):
    search: Search = ""
    limit: Limit = 200


@dataclass(frozen=True, kw_only=True)
class TimelineParameters(TypeParameters):
    by: Labels = "service"
    step: Annotated[
        str,
        Meta(
            description="60s, or milliseconds; by default there are up to 180 steps",
            extra_json_schema=_format("step"),
        ),
    ] = ""
    limit: Annotated[
        int, Meta(ge=1, le=100, description="series; the others are summed in one")
    ] = 8

    def step_ns(self) -> int:
        """Return the step in ns; 0 if none is given."""
        if not self.step:
            return 0
        try:
            is_ms = self.step.isdecimal()
            step_ns = int(self.step) * 1_000_000 if is_ms else parse_time(f"now+{self.step}", 0)
        except ValueError:
            step_ns = 0
        if not 1_000_000 <= step_ns <= 366 * 86_400 * 10**9:
            raise bad_parameter(
                "step", f"step={self.step!r} is not a duration (try 60s, or milliseconds)"
            )
        return step_ns


@dataclass(frozen=True, kw_only=True)
class FleetParameters(TypeParameters):
    """What is asked of a whole fleet."""

    by: Split = ""
    search: Annotated[
        Text, Meta(description="part of a function, module or label's value, in any case")
    ] = ""
    trend: Annotated[_Flag, Meta(description="0: without the week before, in less time")] = "1"
    limit: Limit = 200


@dataclass(frozen=True, kw_only=True)
class FleetServicesParameters(FleetParameters):
    sort: Annotated[
        ServiceOrder, Meta(description="of the table; growth: most cores more than a week before")
    ] = "cores"

    def request(self, now_ns: int) -> FleetRequest:
        panel = panel_request(self, now_ns)
        return FleetRequest(panel, "service", self.sort, self.limit, self.trend == "1")


@dataclass(frozen=True, kw_only=True)
class FleetTopParameters(FleetParameters):
    group: Annotated[FunctionGroup, Meta(description="what a row is")] = "function"
    sort: Annotated[
        FunctionOrder, Meta(description="of the table; growth: most cores more than a week before")
    ] = "self"

    def request(self, now_ns: int) -> FleetRequest:
        panel = panel_request(self, now_ns)
        return FleetRequest(panel, self.group, self.sort, self.limit, self.trend == "1")


@dataclass(frozen=True, kw_only=True)
class ExportParameters(TypeParameters, DiffParameters, ViewParameters):
    by: Labels = "comm"


@dataclass(frozen=True)
class LabelPath:
    name: Annotated[
        str,
        Meta(
            title=f"a label of at most {_LABEL_LIMIT} characters without NUL",
            description="a label",
            min_length=1,
            max_length=_LABEL_LIMIT,
            pattern=r"^[^/\u0000]+$",
        ),
    ]


@dataclass(frozen=True)
class ExportPath:
    name: Annotated[
        str,
        Meta(
            description="the name of the file, with .speedscope.json, .folded, .pb.gz, .svg or"
            " .json",
            extra_json_schema={"pattern": f"^{NAME_PATTERN}$"},
        ),
    ]


def panel_request(parameters: RangeParameters, now_ns: int) -> PanelRequest:
    """Return what parameters ask for.

    Raises:
        ProblemError: a selector or a time means nothing.
    """
    names = ("from", "until")
    window = _parse_window(names, parameters.from_, parameters.until, now_ns)
    request = PanelRequest(window, _parse_selector("query", parameters.query))
    if isinstance(parameters, TypeParameters):
        request = replace(request, type=parameters.type)
    if isinstance(parameters, ViewParameters):
        request = replace(
            request,
            group=parameters.group,
            invert=parameters.invert == "1",
            callers=parameters.callers,
            focus=tuple(filter(None, parameters.focus)),
            hide=tuple(filter(None, parameters.hide)),
            node=int(parameters.node, 16),
            python_native=parameters.python_native == "1",
        )
    if isinstance(parameters, ViewParameters | TimelineParameters | FleetParameters):
        request = replace(request, by=tuple(filter(None, parameters.by.split(","))))
    searching = FlameGraphParameters | TopParameters | DiffTopParameters | FleetParameters
    if isinstance(parameters, searching):
        request = replace(request, search=parameters.search)
    if isinstance(parameters, FlameGraphParameters | DiffGraphParameters):
        request = replace(request, width_px=float(parameters.width))
    return request


def described(parameters: RangeParameters) -> str:
    """Return which part of the store was asked for, as it was asked."""
    text = f"from {parameters.from_} until {parameters.until}"
    if parameters.query:
        text = f"of {fit(parameters.query, _SHOWN_CELLS)} {text}"
    if not isinstance(parameters, DiffParameters) or not parameters.is_comparison:
        return text
    before = {
        "query": parameters.before_query,
        "from": parameters.before_from,
        "until": parameters.before_until,
    }
    shown = (f"{name} {value}" for name, value in before.items() if value is not UNSET)
    return f"{text} (before: {', '.join(shown)})"


def parse_query(query: bytes, parameters: type[_Parameters]) -> _Parameters:
    """Parse a query string.

    Raises:
        ProblemError: it has a parameter that is unknown, given twice or not as described.
    """
    known = schemas_of(parameters)  # type: ignore[arg-type] # types are hashable
    given: dict[str, list[str]] = {}
    for name, value in _fields(query):
        if name not in known:
            names = f"there are {', '.join(known)}" if known else "this address takes none"
            raise bad_parameter(name[:100], f"there is no parameter {name[:100]!r}; {names}")
        given.setdefault(name, []).append(value)
    values: dict[str, object] = {}
    for name, texts in given.items():
        if any("\0" in text or len(text) > _TEXT_LIMIT for text in texts):
            raise bad_parameter(name, f"the parameter {name!r} is too long or contains a NUL")
        kind = known[name].get("type")
        if kind == "array":
            values[name] = texts
        elif len(texts) > 1:
            raise bad_parameter(name, f"the parameter {name!r} is given {len(texts)} times")
        else:
            is_number = kind == "integer" and re.fullmatch(r"\d{1,9}", texts[0], re.ASCII)
            values[name] = int(texts[0]) if is_number else texts[0]
    return convert(values, parameters)


def convert(values: Mapping[str, object], parameters: type[_Parameters]) -> _Parameters:
    """Return values by their names as parameters.

    Raises:
        ProblemError: one is not as described.
    """
    known = schemas_of(parameters)  # type: ignore[arg-type] # types are hashable
    fields = {f"{name}_" if name == "from" else name: value for name, value in values.items()}
    try:
        return msgspec.convert(fields, parameters)
    except msgspec.ValidationError as error:
        found = re.search(r"`\$\.(\w+)", str(error))
        assert found is not None  # the values are of a mapping
        name = found[1].removesuffix("_")
        raise _mismatch(name, values[name], known[name]) from error


def _mismatch(name: str, value: object, schema: Mapping[str, Any]) -> ProblemError:
    if "enum" in schema:
        expected = f"one of {', '.join(schema['enum'])}"
    elif "maximum" in schema:
        expected = f"a number from {schema['minimum']} to {schema['maximum']}"
    elif isinstance(value, list):
        return bad_parameter(name, f"{name} may be given {schema['maxItems']} times")
    else:
        expected = schema["title"]
    return bad_parameter(name, f"{name}={value!r} is not {expected}")


@functools.cache
def schemas_of(parameters: type) -> Mapping[str, dict[str, Any]]:
    """Return the JSON schema of each parameter by its name."""
    (_,), components = msgspec.json.schema_components([parameters], ref_template="{name}")
    properties = components[parameters.__name__]["properties"]
    found = {}
    for name, schema in properties.items():
        enum = components.get(schema.get("$ref", ""), {})
        parts = {**enum, **{key: value for key, value in schema.items() if key != "$ref"}}
        if "enum" in parts:
            parts = {**parts, "type": "string"}
            parts.pop("title", None)
        found[name.removesuffix("_")] = parts
    return found


def _parse_moment(name: str, text: str, now_ns: int) -> int:
    try:
        return parse_time(text, now_ns)
    except ValueError as error:
        raise bad_parameter(name, str(error)) from error


def _parse_window(names: tuple[str, str], start: str, end: str, now_ns: int) -> Window:
    """Return the window between two parameters; the first is named if it is empty."""
    for name, text in zip(names, (start, end), strict=True):
        _parse_moment(name, text, now_ns)
    try:
        return parse_window(start, end, now_ns)
    except ValueError as error:
        raise bad_parameter(names[0], str(error)) from error


def _parse_selector(name: str, text: str) -> Selector:
    try:
        return Selector.parse(text)
    except ValueError as error:
        raise bad_parameter(name, str(error)) from error


def _fields(query: bytes) -> list[tuple[str, str]]:
    """Read a query string. One that is not UTF-8 is refused."""
    try:
        text = query.decode("ascii")
        return parse_qsl(
            text, keep_blank_values=True, errors="strict", max_num_fields=_FIELDS_LIMIT
        )
    except UnicodeError as error:
        raise bad_request("the query string is not UTF-8") from error
    except ValueError as error:
        raise bad_request("there are too many parameters") from error
