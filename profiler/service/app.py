"""The HTTP service: the API of one window, its exports, and the page that shows them.

Every answer is computed in a thread, under a deadline. Requests that ask the same share one
computation, and it ends when nobody waits for it any more. Errors are problem+json (RFC 9457);
a parameter that is unknown or stands twice is one.

Whoever can make a browser send requests must not be able to read the answers: the Host header has
to name this machine's loopback (against DNS rebinding), nothing is shared across origins, and the
page may load nothing but its own files.
"""

import asyncio
import contextlib
import functools
import gzip
import hashlib
import logging
import math
import re
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote_to_bytes

import orjson
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from profiler.agent import status
from profiler.comparison.comparison import Operand
from profiler.comparison.gate import DEFAULT_GATE, Gate
from profiler.flamegraph.flamegraph import ROOT_ID
from profiler.flamegraph.paths import Group
from profiler.flamegraph.views import NoSuchNodeError
from profiler.formats import export
from profiler.service.connections import Places
from profiler.service.responses import (
    MOST_STEPS,
    SORTS,
    Answers,
    Check,
    NothingToCompareError,
    Question,
)
from profiler.service.schema import (
    BEFORE,
    ENDPOINTS,
    EXPORT_NAME,
    LABEL_LIMIT,
    MAX_REPEATED,
    MOST_LABELS,
    ROWS,
    SERIES,
    TEXT_LIMIT,
    WIDTH_PX,
    document,
)
from profiler.times import parse_time, parse_window, rfc3339
from storage.objects.keys import StoreError
from storage.selector import Selector

DEADLINE_S = 30.0
_STEP_S = 2.0
"""So much longer may the last step of a computation take."""
_WORKERS = 2
"""Computations at a time: they are bound by the CPU."""
_WAITING_LIMIT = 200
"""Beyond so many waiting computations a new one is refused: at 0.1 s each it would time out."""
_GZIP_LEVEL = 1
"""Higher ones take longer than the bytes they save do on the way to a browser nearby."""
_PACKED = {"content-encoding": "gzip", "vary": "Accept-Encoding"}
_FIELDS_LIMIT = 100
"""Parameters of one request; more are refused before they are looked at."""
_LOOPBACK = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d{1,5})?", re.ASCII | re.I)
_EXPORT_NAME = re.compile(EXPORT_NAME, re.ASCII)

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self';"
    " img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".json": "application/json",
    ".folded": "text/plain; charset=utf-8",
    ".gz": "application/octet-stream",
}

log = logging.getLogger(__name__)


class ProblemError(Exception):
    """An answer that is an error: its status, what is wrong, and more fields of the answer."""

    def __init__(self, code: int, title: str, detail: str, **more: object) -> None:
        super().__init__(detail)
        self.code, self.title, self.detail, self.more = code, title, detail, more

    def response(self) -> Response:
        body = {"type": "about:blank", "title": self.title, "status": self.code}
        content = orjson.dumps({**body, "detail": self.detail, **self.more})
        headers = {"retry-after": "5"} if self.code == 503 else None
        return Response(content, self.code, headers, "application/problem+json")

    def last_response(self) -> Response:
        """Return one that has all headers, and closes the connection: no application is asked."""
        response = self.response()
        response.headers.update({**HEADERS, "cache-control": "no-store", "connection": "close"})
        return response


class EndedError(Exception):
    """A computation that nobody waits for any more."""


@dataclass(frozen=True, slots=True)
class About:
    """What the service tells of itself and of the agent beside it."""

    store: str
    run_folder: Path
    keep_s: int = 0
    keep_bytes: int = 0


class Parameters:
    """The query string of one request: each parameter once, none that is unknown."""

    def __init__(self, request: Request, endpoint: str, now_ns: int) -> None:
        allowed = ENDPOINTS[endpoint].parameters
        self._now_ns = now_ns
        self._values: dict[str, list[str]] = {}
        for name, value in _fields(request.scope["query_string"]):
            if name not in allowed:
                known = ", ".join(allowed) or "none"
                raise _bad(name[:100], f"there is no parameter {name[:100]!r}; there is {known}")
            self._values.setdefault(name, []).append(value)
        for name, values in self._values.items():
            if len(values) > 1 and name not in ENDPOINTS[endpoint].repeatable:
                raise _bad(name, f"the parameter {name!r} stands {len(values)} times")
            if any("\0" in value or len(value) > TEXT_LIMIT for value in values):
                raise _bad(name, f"the parameter {name!r} is too long or holds a NUL")

    def text(self, name: str, usual: str = "") -> str:
        return self._values.get(name, [usual])[0]

    def texts(self, name: str) -> tuple[str, ...]:
        """Return all values of a parameter; an empty one is as good as none."""
        values = self._values.get(name, ())
        if len(values) > MAX_REPEATED:
            raise _bad(name, f"{name} may be repeated {MAX_REPEATED} times, not {len(values)}")
        return tuple(filter(None, values))

    def number(self, name: str, usual: int, least: int, most: int) -> int:
        text = self.text(name, str(usual))
        if not re.fullmatch(r"\d{1,9}", text, re.ASCII) or not least <= int(text) <= most:
            raise _bad(name, f"{name}={text!r} is no number from {least} to {most}")
        return int(text)

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        text = self.text(name, choices[0])
        if text not in choices:
            raise _bad(name, f"{name}={text!r} is none of {', '.join(choices)}")
        return text

    def flag(self, name: str) -> bool:
        return self.choice(name, ("0", "1")) == "1"

    def step_ns(self) -> int:
        """Return `step` in ns: milliseconds, or a time as `60s`; 0 if it is not there."""
        text = self.text("step")
        if not text:
            return 0
        try:
            wanted = int(text) * 1_000_000 if text.isdecimal() else parse_time(f"now+{text}", 0)
        except ValueError:
            wanted = 0
        if not 1_000_000 <= wanted <= 366 * 86_400 * 10**9:
            raise _bad("step", f"step={text!r} is no time (try 60s, or milliseconds)")
        return wanted

    def question(self, usual_by: str = "service") -> Question:
        """Return what the parameters that all endpoints share ask about."""
        try:
            window = parse_window(
                self.text("from", "now-1h"), self.text("until", "now"), self._now_ns
            )
        except ValueError as error:
            raise _bad("from", str(error)) from error
        selector = self._selector("query")
        node = self.text("node", f"{ROOT_ID:016x}")
        if not re.fullmatch(r"[0-9a-f]{16}", node):
            raise _bad("node", f"node={node!r} is not 16 hex digits")
        by = tuple(name for name in self.text("by", usual_by).split(",") if name)
        if len(by) > MOST_LABELS:
            raise _bad("by", f"by={self.text('by')!r} has more than {MOST_LABELS} labels")
        return Question(
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

    def before(self, question: Question) -> Operand:
        """Return the side that a question is compared with: by default the time just before it."""
        start_ns, end_ns = question.window
        end = self.text("before_until") or rfc3339(start_ns)
        try:
            until_ns = parse_time(end, self._now_ns)
            start = self.text("before_from") or rfc3339(max(0, until_ns - end_ns + start_ns))
            window = parse_window(start, end, self._now_ns)
        except ValueError as error:
            raise _bad("before_from", str(error)) from error
        query = "before_query" if "before_query" in self._values else "query"
        return Operand(self._selector(query), window)

    def gate(self) -> Gate:
        try:
            return Gate.parse(self.text("fail_over") or DEFAULT_GATE)
        except ValueError as error:
            raise _bad("fail_over", str(error)) from error

    def _selector(self, name: str) -> Selector:
        try:
            return Selector.parse(self.text(name))
        except ValueError as error:
            raise _bad(name, str(error)) from error


def _fields(query: bytes) -> list[tuple[str, str]]:
    """Read a query string; what is no UTF-8 is refused, not replaced by something else."""
    try:
        text = query.decode("ascii")
        return parse_qsl(
            text, keep_blank_values=True, errors="strict", max_num_fields=_FIELDS_LIMIT
        )
    except UnicodeError as error:
        raise _bad_request("the query string is not UTF-8") from error
    except ValueError as error:
        raise _bad_request("there are too many parameters") from error


def _bad(parameter: str, detail: str) -> ProblemError:
    return _bad_request(detail, parameter=parameter)


def _bad_request(detail: str, **more: object) -> ProblemError:
    return ProblemError(400, "Bad request", detail, **more)


Content = tuple[bytes, str]
"""A body and its media type."""
Compute = Callable[[Check], Content]
"""Gives one in a thread: what must not wait for computations is Content at once."""
Prepare = Callable[[Parameters, Mapping[str, str]], Compute | Content]
"""Checks what is asked, and gives the answer or how to get it."""


class _Flight:
    """One computation, and how many requests wait for it."""

    def __init__(self, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self._deadline = time.monotonic() + deadline_s
        self._ended = threading.Event()
        self.waiting = 0
        self.future: asyncio.Future[Content]

    def end(self) -> None:
        self._ended.set()

    def check(self) -> None:
        if self._ended.is_set():
            raise EndedError
        if time.monotonic() > self._deadline:
            raise _too_slow(self._deadline_s)


def _too_slow(deadline_s: float) -> ProblemError:
    return ProblemError(
        504,
        "Took too long",
        f"the answer was not there after {deadline_s:.0f} s; ask for a shorter time"
        " or fewer services (what was decoded is kept, asking again goes further)",
    )


class Flights:
    """Shares computations: those who ask the same wait for the same."""

    def __init__(self, deadline_s: float = DEADLINE_S) -> None:
        self._deadline_s = deadline_s
        self._pool = ThreadPoolExecutor(_WORKERS, "answer")
        self._flights: dict[str, _Flight] = {}
        self._running: set[Future[Content]] = set()
        self.shared = 0
        self.ended = 0

    def close(self, within_s: float) -> bool:
        """End all; tell whether they have ended within a time."""
        for flight in self._flights.values():
            flight.end()
        self._pool.shutdown(wait=False, cancel_futures=True)
        return not wait(self._running, within_s).not_done

    async def answer(self, key: str, compute: Compute, request: Request) -> Content:
        """Wait for a computation, for as long as the client does."""
        flight = self._flights.get(key)
        if flight is None:
            if len(self._flights) >= _WAITING_LIMIT:
                raise ProblemError(503, "Busy", "too many questions wait for an answer already")
            flight = _Flight(self._deadline_s)
            work = self._pool.submit(compute, flight.check)
            self._running.add(work)
            work.add_done_callback(self._running.discard)
            flight.future = asyncio.wrap_future(work)
            flight.future.add_done_callback(functools.partial(self._landed, key))
            self._flights[key] = flight
        else:
            self.shared += 1
        flight.waiting += 1
        gone = asyncio.ensure_future(_disconnected(request))
        either: set[asyncio.Future[Any]] = {flight.future, gone}
        try:
            # What computes looks at the clock between its steps; one of them may hang.
            limit_s = self._deadline_s + _STEP_S
            await asyncio.wait(either, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
            if flight.future.done():
                return flight.future.result()
            raise EndedError if gone.done() else _too_slow(self._deadline_s)
        finally:
            gone.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await gone
            flight.waiting -= 1
            if flight.waiting == 0 and not flight.future.done():
                self.ended += 1
                flight.end()
                flight.future.cancel()  # where it has not begun, it never will
                self._flights.pop(key, None)

    def _landed(self, key: str, future: asyncio.Future[Content]) -> None:
        flight = self._flights.get(key)
        if flight is not None and flight.future is future:
            del self._flights[key]
        if not future.cancelled():
            future.exception()  # whoever waited has it; nobody may


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Guard:
    """Refuses foreign Host headers and adds the headers that every answer has."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("cache-control", "no-store")
            await send(message)

        host = Headers(scope=scope).get("host", "")
        if not _LOOPBACK.fullmatch(host):
            problem = ProblemError(421, "Wrong host", "this service answers to loopback names only")
            await problem.response()(scope, receive, send_with_headers)
            return
        await self._app(scope, receive, send_with_headers)


class Service:
    """The endpoints, over the answers of one store."""

    def __init__(
        self,
        answers: Answers,
        about: About,
        ahead: Callable[[], Mapping[str, Any]] = dict,
        now_ns: Callable[[], int] = time.time_ns,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        self._answers = answers
        self._about = about
        self._ahead = ahead
        self._now_ns = now_ns
        self._started_ns = now_ns()
        self._flights = Flights(deadline_s)
        # What is said where no application is asked.
        self.places = Places(
            busy=ProblemError(503, "Busy", "all connections are taken").last_response(),
            malformed=_bad_request("that is no HTTP/1.1 request, or too long").last_response(),
        )
        self._requests: Counter[tuple[str, int]] = Counter()
        self._seconds: dict[str, float] = {}

    def app(self) -> Starlette:
        api = "/api/v1"
        routes = [
            Route(f"{api}/flamegraph", self._route("flamegraph", self._flamegraph)),
            Route(f"{api}/top", self._route("top", self._top)),
            Route(f"{api}/diff", self._route("diff", self._diff)),
            Route(f"{api}/diff/top", self._route("diff_top", self._diff_top)),
            Route(f"{api}/timeline", self._route("timeline", self._timeline)),
            Route(f"{api}/deployments", self._route("deployments", self._deployments)),
            Route(f"{api}/labels", self._route("labels", self._labels)),
            Route(f"{api}/labels/{{name}}/values", self._route("label_values", self._values)),
            Route(f"{api}/export/{{name}}", self._route("export", self._export)),
            Route(f"{api}/status", self._route("status", self._status)),
            Route(f"{api}/openapi.json", self._route("openapi", self._openapi)),
            Route("/healthz", self._route("healthz", self._healthz)),
            Route("/readyz", self._route("readyz", self._readyz)),
            Route("/metrics", self._route("metrics", self._metrics)),
            *_page_routes(Path(__file__).parent.parent / "web"),
        ]
        app = Starlette(
            routes=routes,
            middleware=[Middleware(Guard)],
            exception_handlers={404: _not_found, 405: _not_allowed},
        )
        app.router.redirect_slashes = False  # to an address made of what a client has sent
        return app

    def end(self, within_s: float) -> bool:
        """Let computations end and take no new ones; tell whether all of them have ended."""
        return self._flights.close(within_s)

    def _route(self, endpoint: str, prepare: Prepare) -> Callable[[Request], Awaitable[Response]]:
        async def respond(request: Request) -> Response:
            started = time.monotonic()
            try:
                response = await self._respond(request, endpoint, prepare)
            except ProblemError as problem:
                response = problem.response()
            except EndedError:
                response = Response(status_code=499)  # nobody is there to read it
            except Exception:  # the outermost place that knows which question it was
                log.exception("failed to answer %s", _target(request))
                detail = "that is a defect of this service; it has written down where"
                response = ProblemError(500, "Defect", detail).response()
            self._requests[endpoint, response.status_code] += 1
            took_s = time.monotonic() - started
            self._seconds[endpoint] = self._seconds.get(endpoint, 0.0) + took_s
            return response

        return respond

    async def _respond(self, request: Request, endpoint: str, prepare: Prepare) -> Response:
        _check_path(request)
        # To the second, so that the panels of one page ask for one window.
        now_ns = self._now_ns() // 10**9 * 10**9
        parameters = Parameters(request, endpoint, now_ns)
        compute = prepare(parameters, request.path_params)
        is_packed = _takes_gzip(request) and not request.url.path.endswith(".gz")
        if not callable(compute):
            content, media_type = _packed(compute) if is_packed else compute
            return Response(content, headers=_PACKED if is_packed else None, media_type=media_type)
        key = f"{now_ns} {'packed ' if is_packed else ''}{_target(request)}"
        try:
            content, media_type = await self._flights.answer(
                key, _packing(compute) if is_packed else compute, request
            )
        except NoSuchNodeError as error:
            raise ProblemError(
                404, "No such frame", "the frame is not in this range", node=str(error)
            ) from error
        except NothingToCompareError as error:
            raise ProblemError(404, "Nothing to compare", str(error), **error.fields) from error
        except StoreError as error:
            raise ProblemError(503, "Store away", str(error)) from error
        response = Response(content, headers=_PACKED if is_packed else None, media_type=media_type)
        if endpoint == "export":
            name = request.path_params["name"]
            response.headers["content-disposition"] = f'attachment; filename="{name}"'
        return response

    def _flamegraph(self, parameters: Parameters, _path: Mapping[str, str]) -> Compute:
        question = parameters.question()
        return lambda check: _json(self._answers.flamegraph(question, check))

    def _top(self, parameters: Parameters, _path: Mapping[str, str]) -> Compute:
        question = parameters.question()
        sort = parameters.choice("sort", SORTS)
        limit = parameters.number("limit", 200, *ROWS)
        return lambda check: _json(self._answers.top(question, sort, limit, check))

    def _diff(self, parameters: Parameters, _path: Mapping[str, str]) -> Compute:
        question, gate = parameters.question(), parameters.gate()
        before = parameters.before(question)
        return lambda check: _json(self._answers.diff(question, before, gate, check))

    def _diff_top(self, parameters: Parameters, _path: Mapping[str, str]) -> Compute:
        question, gate = parameters.question(), parameters.gate()
        before = parameters.before(question)
        limit = parameters.number("limit", 200, *ROWS)
        return lambda check: _json(self._answers.diff_top(question, before, gate, limit, check))

    def _timeline(self, parameters: Parameters, _path: Mapping[str, str]) -> Compute:
        question, step_ns = parameters.question(), parameters.step_ns()
        length_ns = question.window.end_ns - question.window.start_ns
        if step_ns and math.ceil(length_ns / step_ns) > MOST_STEPS:
            raise _bad("step", f"that makes more than {MOST_STEPS} steps: ask for longer ones")
        limit = parameters.number("limit", 8, *SERIES)
        return lambda check: _json(self._answers.timeline(question, step_ns, limit, check))

    def _deployments(self, parameters: Parameters, _path: Mapping[str, str]) -> Compute:
        question = parameters.question()
        return lambda check: _json(self._answers.deployments(question, check))

    def _labels(self, parameters: Parameters, _path: Mapping[str, str]) -> Compute:
        question = parameters.question()
        return lambda check: _json(self._answers.labels(question, check))

    def _values(self, parameters: Parameters, path: Mapping[str, str]) -> Compute:
        question, name = parameters.question(), path["name"]
        if "\0" in name or len(name) > LABEL_LIMIT:
            raise _bad("name", "a label's name is shorter, and holds no NUL")
        return lambda check: _json(self._answers.label_values(question, name, check))

    def _export(self, parameters: Parameters, path: Mapping[str, str]) -> Compute:
        name, question = path["name"], parameters.question(usual_by="comm")
        if not _EXPORT_NAME.fullmatch(name):
            raise ProblemError(
                404,
                "No such file",
                "a name has letters, digits, . _ and -, and ends in .speedscope.json, .folded,"
                " .pb.gz, .svg or .json",
            )

        media_type, gate = _MEDIA_TYPES[f".{name.rpartition('.')[2]}"], parameters.gate()
        if parameters.is_comparison:
            try:
                ending = export.pair_ending(name)
            except export.ExportError as error:
                raise ProblemError(404, "No such file", str(error)) from error
            before = parameters.before(question)
            if ending == ".json":
                wide = replace(question, width_px=float(export.JSON_WIDTH_PX))
                return lambda check: _json(self._answers.diff(wide, before, gate, check))

            def compare(check: Check) -> Content:
                pair = self._answers.compare(question, before, check)
                check()
                view, node = question.view, question.node
                return export.encode_pair(pair, name, view, node, check=check), media_type

            return compare

        def compute(check: Check) -> Content:
            answer = self._answers.profile(question, check)
            check()
            shown = question.view.shown(answer.profile, question.node, check)
            check()
            content = export.encode(shown.profile, name, shown.by)
            return content, media_type

        return compute

    def _status(self, _parameters: Parameters, _path: Mapping[str, str]) -> Compute:
        def compute(_check: Check) -> Content:
            span, about = self._answers.span(), self._about
            agent: dict[str, Any] | None = None
            with contextlib.suppress(status.NoAgentError):
                agent = status.ask(about.run_folder)
            data = span and {
                "from_ms": span.start_ns // 1_000_000,
                "until_ms": span.end_ns // 1_000_000,
            }
            keep = {"seconds": about.keep_s, "bytes": about.keep_bytes} if about.keep_s else None
            return _json(
                {
                    "schema": 1,
                    "version": version("everflame"),
                    "store": about.store,
                    "type": "cpu",
                    "now_ms": self._now_ns() // 1_000_000,
                    "started_ms": self._started_ns // 1_000_000,
                    "keep": keep,
                    "data": data,
                    "hosts": self._answers.hosts(span),
                    "agent": agent,
                    "ahead": self._ahead() or None,
                }
            )

        return compute

    def _openapi(self, _parameters: Parameters, _path: Mapping[str, str]) -> Compute:
        return lambda _check: _json(document(version("everflame")))

    def _readyz(self, _parameters: Parameters, _path: Mapping[str, str]) -> Compute:
        def compute(_check: Check) -> Content:
            self._answers.span()  # a store that is away raises
            return _json({"ready": True})

        return compute

    def _healthz(self, _parameters: Parameters, _path: Mapping[str, str]) -> Content:
        return b"ok\n", "text/plain"

    def _metrics(self, _parameters: Parameters, _path: Mapping[str, str]) -> Content:
        lines = ["# TYPE everflame_service_requests_total counter"]
        for (endpoint, code), count in sorted(self._requests.items()):
            labels = f'endpoint="{endpoint}",status="{code}"'
            lines.append(f"everflame_service_requests_total{{{labels}}} {count}")
        lines.append("# TYPE everflame_service_seconds_total counter")
        for endpoint, seconds in sorted(self._seconds.items()):
            lines.append(f'everflame_service_seconds_total{{endpoint="{endpoint}"}} {seconds:.6f}')
        for name, value in (("shared", self._flights.shared), ("ended", self._flights.ended)):
            lines.append(f"# TYPE everflame_service_{name}_total counter")
            lines.append(f"everflame_service_{name}_total {value}")
        lines += _ahead_lines(self._ahead())
        return "\n".join([*lines, ""]).encode(), "text/plain; version=0.0.4"


def _ahead_lines(told: Mapping[str, Any]) -> list[str]:
    if not told:
        return []
    return [
        "# TYPE everflame_service_decoded_ahead_total counter",
        f"everflame_service_decoded_ahead_total {told['decoded']}",
        "# TYPE everflame_service_decode_ahead_waiting gauge",
        f"everflame_service_decode_ahead_waiting {told['waiting']}",
        "# TYPE everflame_service_decode_ahead_cpu_seconds_total counter",
        f"everflame_service_decode_ahead_cpu_seconds_total {told['cpu_ns'] / 1e9:.3f}",
    ]


def _target(request: Request) -> str:
    """Return what was asked for as it was sent, in ASCII. A URL cannot be made of all of that."""
    scope = request.scope
    return f"{scope['raw_path'].decode('ascii')}?{scope['query_string'].decode('ascii')}"


def _check_path(request: Request) -> None:
    try:
        unquote_to_bytes(request.scope["raw_path"]).decode()
    except UnicodeDecodeError as error:
        raise _bad_request("the path is not UTF-8") from error


def _json(content: object) -> Content:
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), "application/json"


def _takes_gzip(request: Request) -> bool:
    return "gzip" in request.headers.get("accept-encoding", "")


def _packed(content: Content) -> Content:
    return gzip.compress(content[0], _GZIP_LEVEL, mtime=0), content[1]


def _packing(compute: Compute) -> Compute:
    """Compress in the thread that computes: the event loop would do nothing else meanwhile."""
    return lambda check: _packed(compute(check))


def _page_routes(folder: Path) -> list[Route]:
    """Return a route for each file of the page, read once."""
    routes = []
    for file in sorted(folder.iterdir()):
        if file.suffix in _MEDIA_TYPES:
            endpoint = _file_endpoint(file.read_bytes(), _MEDIA_TYPES[file.suffix])
            path = "/" if file.name == "index.html" else f"/web/{file.name}"
            routes.append(Route(path, endpoint))
    return routes


def _file_endpoint(content: bytes, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    tag = f'"{hashlib.blake2b(content, digest_size=8).hexdigest()}"'
    headers = {"etag": tag, "cache-control": "no-cache", "vary": "Accept-Encoding"}
    packed = gzip.compress(content, mtime=0)

    async def respond(request: Request) -> Response:
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        if _takes_gzip(request):
            return Response(packed, headers={**headers, **_PACKED}, media_type=media_type)
        return Response(content, headers=headers, media_type=media_type)

    return respond


async def _not_found(request: Request, _error: Exception) -> Response:
    path = request.scope["path"][:200]
    detail = f"there is nothing at {path!r}; the API is at /api/v1/openapi.json"
    return ProblemError(404, "Not found", detail).response()


async def _not_allowed(_request: Request, _error: Exception) -> Response:
    problem = ProblemError(405, "Method not allowed", "everything here is read with GET")
    response = problem.response()
    response.headers["allow"] = "GET, HEAD"
    return response
