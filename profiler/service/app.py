"""The HTTP service: the API over one store, its exports, and the page that shows them.

Every response is computed in a thread, under a deadline. Errors are problem+json; a parameter that
is unknown or given twice is one.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from profiler import exposition
from profiler.comparison.deployment_verdicts import DeploymentVerdicts
from profiler.exposition import Metric, labelled, single
from profiler.flamegraph.views import NoSuchNodeError
from profiler.service import exports
from profiler.service import parameters as p
from profiler.service.comparisons import Comparisons, NothingToCompareError
from profiler.service.connections import ConnectionSlots
from profiler.service.deployments import deployments
from profiler.service.diff import diff_graph, diff_table
from profiler.service.flame_graph import flame_graph
from profiler.service.fleet import Fleet
from profiler.service.labels import label_names, label_values
from profiler.service.merged import Check, MergedProfiles
from profiler.service.page import GZIPPED, Guard, accepts_gzip, last_response, page_routes
from profiler.service.problems import ProblemError, bad_parameter, bad_request
from profiler.service.schema import ENDPOINTS, Ready, document
from profiler.service.sharing import (
    DEADLINE_S,
    AbandonedError,
    Body,
    Compute,
    SharedComputations,
    TooSlowError,
    gzipped,
    gzipping,
    json_body,
)
from profiler.service.status import About, service_status
from profiler.service.timeline import MOST_STEPS, timeline
from profiler.service.top_table import top_table
from profiler.service.verdicts import BackgroundVerdicts
from storage.objects.keys import StoreError
from storage.query.decoding import DecodeCounts
from storage.query.hosts import HostSearch


class Asked(NamedTuple):
    """What a request has in addition to its parameters."""

    now_ns: int
    """When it came, to the second, so that the panels of one page ask for one window."""
    path: Mapping[str, str]
    """The parameters in its path."""


_THREADS = 2
"""Panels computed at a time: they are bound by the CPU."""
_OWN_THREAD = ("status", "readyz")
"""They ask the store, and the agent: what hangs there must keep no panel waiting."""

Prepare = Callable[[Any, Asked], Compute | Body]
"""Takes the endpoint's parameters; returns the body, or a function that computes it in a thread."""

_OF_A_WINDOW = {
    "flamegraph": "the flame graph",
    "top": "the table of functions",
    "diff": "the comparison",
    "diff_top": "the comparison of functions",
    "fleet_services": "the list of services",
    "fleet_top": "the table of the fleet",
    "timeline": "the timeline",
    "deployments": "the list of deployments",
    "labels": "the list of labels",
    "label_values": "the list of values of the label {name!r}",
    "export": "the file {name}",
}
"""What the endpoints return that read the objects of a window."""

_METRIC = "everflame_service"

log = logging.getLogger(__name__)


class Service:
    """The endpoints over one store."""

    def __init__(
        self,
        profiles: MergedProfiles,
        about: About,
        now_ns: Callable[[], int] = time.time_ns,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        self._profiles = profiles
        self._comparisons = Comparisons(profiles)
        self._fleet = Fleet(profiles)
        self._hosts = HostSearch(profiles.store, blocks=profiles.query.blocks)
        self._about = about
        self._now_ns = now_ns
        self._started_ns = now_ns()
        panels = SharedComputations(deadline_s, _THREADS, "panels")
        others = {name: SharedComputations(deadline_s, 1, name) for name in _OWN_THREAD}
        self._computations = {name: others.get(name, panels) for name in ENDPOINTS}
        self.verdicts = DeploymentVerdicts(profiles.store, profiles.query)
        self._background = BackgroundVerdicts(self.verdicts, lambda: panels.is_busy)
        # Responses of connections that reach no application.
        self.slots = ConnectionSlots(
            busy=last_response(ProblemError(503, "Busy", "all connections are in use")),
            malformed=last_response(bad_request("this is not an HTTP/1.1 request, or too long")),
        )
        self._requests: Counter[tuple[str, int]] = Counter()
        self._seconds: dict[str, float] = {}

    def app(self) -> Starlette:
        handlers: dict[str, Prepare] = {
            "flamegraph": self._flamegraph,
            "top": self._top,
            "diff": self._diff,
            "diff_top": self._diff_top,
            "fleet_services": self._fleet_services,
            "fleet_top": self._fleet_top,
            "timeline": self._timeline,
            "deployments": self._deployments,
            "labels": self._labels,
            "label_values": self._label_values,
            "export": self._export,
            "status": self._status,
            "openapi": self._openapi,
            "healthz": self._healthz,
            "readyz": self._readyz,
            "metrics": self._metrics,
        }
        routes = [
            Route(endpoint.path, self._route(name, handlers[name]))
            for name, endpoint in ENDPOINTS.items()
        ]
        app = Starlette(
            routes=[*routes, *page_routes(Path(__file__).parent.parent / "web")],
            middleware=[Middleware(Guard)],
            exception_handlers={404: _not_found, 405: _not_allowed},
        )
        app.router.redirect_slashes = False  # to an address made of what a client has sent
        return app

    def end(self, within_s: float) -> bool:
        """Let computations end and take no new ones; return whether all of them have ended."""
        deadline_s = time.monotonic() + within_s
        every: set[SharedComputations | BackgroundVerdicts] = {*self._computations.values()}
        every.add(self._background)
        for each in every:
            each.end()
        return all(each.wait(deadline_s - time.monotonic()) for each in every)

    def _route(self, endpoint: str, prepare: Prepare) -> Callable[[Request], Awaitable[Response]]:
        async def respond(request: Request) -> Response:
            started = time.monotonic()
            try:
                response = await self._respond(request, endpoint, prepare)
            except ProblemError as problem:
                response = problem.response()
            except AbandonedError:
                response = Response(status_code=499)  # the client has gone
            except Exception:  # the outermost place that knows which request it was
                log.exception("failed to respond to %s", _target(request))
                detail = "this is a bug in the service; its log has the details"
                response = ProblemError(500, "Defect", detail).response()
            self._requests[endpoint, response.status_code] += 1
            took_s = time.monotonic() - started
            self._seconds[endpoint] = self._seconds.get(endpoint, 0.0) + took_s
            return response

        return respond

    async def _respond(self, request: Request, endpoint: str, prepare: Prepare) -> Response:
        _check_path(request)
        asked = Asked(self._now_ns() // 10**9 * 10**9, request.path_params)
        given: Any = p.parse_query(request.scope["query_string"], ENDPOINTS[endpoint].parameters)
        try:
            compute = prepare(given, asked)
        except exports.NoSuchFileError as error:
            raise ProblemError(404, "No such file", str(error)) from error
        is_gzipped = accepts_gzip(request) and not request.url.path.endswith(".gz")
        headers = GZIPPED if is_gzipped else None
        if not callable(compute):
            content, media_type = gzipped(compute) if is_gzipped else compute
            return Response(content, headers=headers, media_type=media_type)
        at = "" if endpoint in _OWN_THREAD else asked.now_ns
        key = f"{at} {'gzip ' if is_gzipped else ''}{_target(request)}"
        try:
            content, media_type = await self._computations[endpoint].result(
                key, gzipping(compute) if is_gzipped else compute, request
            )
        except NoSuchNodeError as error:
            raise ProblemError(
                404, "No such frame", "the frame is not in this range", node=str(error)
            ) from error
        except NothingToCompareError as error:
            empty = {name: getattr(error.empty, name) for name in ("reason", "nearest", "services")}
            raise ProblemError(
                404,
                "Nothing to compare",
                str(error),
                side=error.side,
                versions=error.versions,
                **empty,
            ) from error
        except StoreError as error:
            raise ProblemError(503, "Store away", str(error)) from error
        except (MemoryError, RecursionError):
            what = _asked_for(endpoint, given, asked)
            detail = f"{what} takes more memory than there is; ask for a shorter time"
            raise ProblemError(503, "Too large", detail) from None
        except TooSlowError as error:
            detail = self._why_late(endpoint, given, asked, error)
            raise ProblemError(504, "Took too long", detail) from error
        response = Response(content, headers=headers, media_type=media_type)
        if endpoint == "export":
            name = request.path_params["name"]
            response.headers["content-disposition"] = f'attachment; filename="{name}"'
        return response

    def _why_late(self, endpoint: str, given: Any, asked: Asked, error: TooSlowError) -> str:
        """Say what was not ready in time, and what to do."""
        if endpoint == "openapi":
            return "other requests take all of the service's time; try again later"
        if endpoint in _OWN_THREAD:
            return (
                f"the store {self._about.store} did not respond within {error.deadline_s:g} s;"
                " check its disk or network, then try again"
            )
        return (
            f"{_asked_for(endpoint, given, asked)} was {error}; ask again (decoded objects are"
            " kept, so each request gets further) or ask for a shorter time"
        )

    def _flamegraph(self, given: p.FlameGraphParameters, asked: Asked) -> Compute:
        request = p.panel_request(given, asked.now_ns)
        return lambda check: json_body(flame_graph(self._profiles, request, check))

    def _top(self, given: p.TopParameters, asked: Asked) -> Compute:
        request = p.panel_request(given, asked.now_ns)
        return lambda check: json_body(
            top_table(self._profiles, request, given.sort, given.limit, check)
        )

    def _diff(self, given: p.DiffGraphParameters, asked: Asked) -> Compute:
        request, gate = p.panel_request(given, asked.now_ns), given.gate()
        before = given.before(request, asked.now_ns)

        def compute(check: Check) -> Body:
            compared = self._comparisons.compare(request, before, check)
            return json_body(diff_graph(compared, request, gate, check))

        return compute

    def _diff_top(self, given: p.DiffTopParameters, asked: Asked) -> Compute:
        request, gate = p.panel_request(given, asked.now_ns), given.gate()
        before = given.before(request, asked.now_ns)

        def compute(check: Check) -> Body:
            compared = self._comparisons.compare(request, before, check)
            return json_body(diff_table(compared, request, gate, given.limit, check))

        return compute

    def _fleet_services(self, given: p.FleetServicesParameters, asked: Asked) -> Compute:
        request = given.request(asked.now_ns)
        return lambda check: json_body(self._fleet.services(request, check))

    def _fleet_top(self, given: p.FleetTopParameters, asked: Asked) -> Compute:
        request = given.request(asked.now_ns)
        return lambda check: json_body(self._fleet.functions(request, check))

    def _timeline(self, given: p.TimelineParameters, asked: Asked) -> Compute:
        request, step_ns = p.panel_request(given, asked.now_ns), given.step_ns()
        length_ns = request.window.end_ns - request.window.start_ns
        if step_ns and math.ceil(length_ns / step_ns) > MOST_STEPS:
            raise bad_parameter("step", f"this makes more than {MOST_STEPS} steps: use longer ones")
        return lambda check: json_body(
            timeline(self._profiles, request, step_ns, given.limit, check)
        )

    def _deployments(self, given: p.RangeParameters, asked: Asked) -> Compute:
        request = p.panel_request(given, asked.now_ns)
        return lambda check: json_body(
            deployments(self._profiles, self._background, request, check)
        )

    def _labels(self, given: p.TypeParameters, asked: Asked) -> Compute:
        request = p.panel_request(given, asked.now_ns)
        return lambda check: json_body(label_names(self._profiles, request, check))

    def _label_values(self, given: p.TypeParameters, asked: Asked) -> Compute:
        request = p.panel_request(given, asked.now_ns)
        name = p.convert(asked.path, p.LabelPath).name
        return lambda check: json_body(label_values(self._profiles, request, name, check))

    def _export(self, given: p.ExportParameters, asked: Asked) -> Compute:
        name, request = asked.path["name"], p.panel_request(given, asked.now_ns)
        gate = given.gate()
        exports.check_name(name, is_comparison=given.is_comparison)
        if not given.is_comparison:
            return lambda check: exports.export_profile(self._profiles, request, name, check)
        before = given.before(request, asked.now_ns)

        def compute(check: Check) -> Body:
            compared = self._comparisons.compare(request, before, check)
            check()
            return exports.export_comparison(compared, request, gate, name, check)

        return compute

    def _status(self, _given: p.NoParameters, _asked: Asked) -> Compute:
        def compute(check: Check) -> Body:
            query = self._profiles.query.interruptible(check)
            return json_body(
                service_status(
                    query,
                    self._hosts,
                    self._about,
                    started_ns=self._started_ns,
                    now_ns=self._now_ns(),
                )
            )

        return compute

    def _openapi(self, _given: p.NoParameters, _asked: Asked) -> Compute:
        return lambda _check: json_body(document(version("everflame")))

    def _readyz(self, _given: p.NoParameters, _asked: Asked) -> Compute:
        def compute(_check: Check) -> Body:
            # Raises if the store cannot be reached.
            store = self._profiles.store
            next(store.store.list(f"v1/{store.tenant}/"), None)
            return json_body(Ready(True))

        return compute

    def _healthz(self, _given: p.NoParameters, _asked: Asked) -> Body:
        return b"ok\n", "text/plain"

    def _metrics(self, _given: p.NoParameters, _asked: Asked) -> Body:
        seconds = {name: round(seconds, 6) for name, seconds in self._seconds.items()}
        requests: dict[tuple[str, ...], float] = {
            (name, str(code)): count for (name, code), count in self._requests.items()
        }
        computations = set(self._computations.values())
        metrics = [
            Metric(f"{_METRIC}_requests_total", "counter", requests, ("endpoint", "status")),
            labelled(f"{_METRIC}_seconds_total", "counter", "endpoint", seconds),
            single(f"{_METRIC}_shared_total", "counter", sum(each.shared for each in computations)),
            single(f"{_METRIC}_ended_total", "counter", sum(each.ended for each in computations)),
            *_worker_metrics(self._profiles.query.counts),
        ]
        return exposition.encode(metrics), exposition.CONTENT_TYPE


def _worker_metrics(counts: DecodeCounts) -> list[Metric]:
    """Return what happened to the workers that decode: a pool that dies again and again shows."""
    return [
        single(f"{_METRIC}_workers_{name}_total", "counter", value)
        for name, value in counts._asdict().items()
    ]


def _asked_for(endpoint: str, given: Any, asked: Asked) -> str:
    if endpoint not in _OF_A_WINDOW:
        return "the answer"
    return f"{_OF_A_WINDOW[endpoint].format(**asked.path)} {p.described(given)}"


def _target(request: Request) -> str:
    """Return the request's target as it was sent, in ASCII. Not every one is a valid URL."""
    scope = request.scope
    return f"{scope['raw_path'].decode('ascii')}?{scope['query_string'].decode('ascii')}"


def _check_path(request: Request) -> None:
    try:
        unquote_to_bytes(request.scope["raw_path"]).decode()
    except UnicodeDecodeError as error:
        raise bad_request("the path is not UTF-8") from error


async def _not_found(request: Request, _error: Exception) -> Response:
    path = request.scope["path"][:200]
    detail = f"there is nothing at {path!r}; the API is described at /api/v1/openapi.json"
    return ProblemError(404, "Not found", detail).response()


async def _not_allowed(_request: Request, _error: Exception) -> Response:
    problem = ProblemError(405, "Method not allowed", "only GET and HEAD are allowed")
    response = problem.response()
    response.headers["allow"] = "GET, HEAD"
    return response
