"""Parameters: what the query string of a request asks for; a mistake in it is a problem."""

import re
from urllib.parse import parse_qsl

from starlette.requests import Request

from profiler.comparison.comparison import Operand
from profiler.comparison.gate import DEFAULT_GATE, Gate
from profiler.flamegraph.flamegraph import ROOT_ID
from profiler.flamegraph.paths import Group
from profiler.service.merged import PanelRequest
from profiler.service.problems import bad_parameter, bad_request
from profiler.service.schema import (
    BEFORE,
    ENDPOINTS,
    MAX_REPEATED,
    MOST_LABELS,
    TEXT_LIMIT,
    WIDTH_PX,
)
from profiler.times import parse_time, parse_window, rfc3339
from storage.selector import Selector

_FIELDS_LIMIT = 100
"""Parameters of one request; more are refused before they are looked at."""


class Parameters:
    """The query string of one request: each parameter once, none that is unknown."""

    def __init__(self, request: Request, endpoint: str, now_ns: int) -> None:
        allowed = ENDPOINTS[endpoint].parameters
        self._now_ns = now_ns
        self._values: dict[str, list[str]] = {}
        for name, value in _fields(request.scope["query_string"]):
            if name not in allowed:
                known = ", ".join(allowed) or "none"
                raise bad_parameter(
                    name[:100], f"there is no parameter {name[:100]!r}; there is {known}"
                )
            self._values.setdefault(name, []).append(value)
        for name, values in self._values.items():
            if len(values) > 1 and name not in ENDPOINTS[endpoint].repeatable:
                raise bad_parameter(name, f"the parameter {name!r} is given {len(values)} times")
            if any("\0" in value or len(value) > TEXT_LIMIT for value in values):
                raise bad_parameter(name, f"the parameter {name!r} is too long or contains a NUL")

    def text(self, name: str, usual: str = "") -> str:
        return self._values.get(name, [usual])[0]

    def texts(self, name: str) -> tuple[str, ...]:
        """Return all values of a parameter, except empty ones."""
        values = self._values.get(name, ())
        if len(values) > MAX_REPEATED:
            raise bad_parameter(
                name, f"{name} may be repeated {MAX_REPEATED} times, not {len(values)}"
            )
        return tuple(filter(None, values))

    def number(self, name: str, usual: int, least: int, most: int) -> int:
        text = self.text(name, str(usual))
        if not re.fullmatch(r"\d{1,9}", text, re.ASCII) or not least <= int(text) <= most:
            raise bad_parameter(name, f"{name}={text!r} is not a number from {least} to {most}")
        return int(text)

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        text = self.text(name, choices[0])
        if text not in choices:
            raise bad_parameter(name, f"{name}={text!r} is not one of {', '.join(choices)}")
        return text

    def flag(self, name: str) -> bool:
        return self.choice(name, ("0", "1")) == "1"

    def step_ns(self) -> int:
        """Return `step` in ns: milliseconds, or a time as `60s`; 0 if it is not given."""
        text = self.text("step")
        if not text:
            return 0
        try:
            wanted = int(text) * 1_000_000 if text.isdecimal() else parse_time(f"now+{text}", 0)
        except ValueError:
            wanted = 0
        if not 1_000_000 <= wanted <= 366 * 86_400 * 10**9:
            raise bad_parameter(
                "step", f"step={text!r} is not a duration (try 60s, or milliseconds)"
            )
        return wanted

    def panel_request(self, usual_by: str = "service") -> PanelRequest:
        """Return what the parameters ask for that most endpoints share."""
        try:
            window = parse_window(
                self.text("from", "now-1h"), self.text("until", "now"), self._now_ns
            )
        except ValueError as error:
            raise bad_parameter("from", str(error)) from error
        selector = self._selector("query")
        node = self.text("node", f"{ROOT_ID:016x}")
        if not re.fullmatch(r"[0-9a-f]{16}", node):
            raise bad_parameter("node", f"node={node!r} is not 16 hex digits")
        by = tuple(name for name in self.text("by", usual_by).split(",") if name)
        if len(by) > MOST_LABELS:
            raise bad_parameter("by", f"by={self.text('by')!r} has more than {MOST_LABELS} labels")
        return PanelRequest(
            window=window,
            selector=selector,
            type=self.choice("type", ("cpu", "samples")),
            by=by,
            group=Group(self.choice("group", tuple(Group))),
            invert=self.flag("invert"),
            callers=self.text("callers"),
            focus=self.texts("focus"),
            hide=self.texts("hide"),
            node=int(node, 16),
            search=self.text("search"),
            width_px=float(self.number("width", 1200, *WIDTH_PX)),
        )

    @property
    def is_comparison(self) -> bool:
        return not BEFORE.isdisjoint(self._values)

    def before(self, request: PanelRequest) -> Operand:
        """Return the side that a request is compared with: by default the time just before it."""
        start_ns, end_ns = request.window
        end = self.text("before_until") or rfc3339(start_ns)
        try:
            until_ns = parse_time(end, self._now_ns)
            start = self.text("before_from") or rfc3339(max(0, until_ns - end_ns + start_ns))
            window = parse_window(start, end, self._now_ns)
        except ValueError as error:
            raise bad_parameter("before_from", str(error)) from error
        query = "before_query" if "before_query" in self._values else "query"
        return Operand(self._selector(query), window)

    def gate(self) -> Gate:
        try:
            return Gate.parse(self.text("fail_over") or DEFAULT_GATE)
        except ValueError as error:
            raise bad_parameter("fail_over", str(error)) from error

    def _selector(self, name: str) -> Selector:
        try:
            return Selector.parse(self.text(name))
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
