"""The page's files, and the protection of responses from other origins.

Other pages in a browser must not be able to read responses: the Host header must name this
machine's loopback (against DNS rebinding), nothing is shared across origins, and the page can load
only its own files.
"""

import gzip
import hashlib
import re
from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from profiler.service.problems import ProblemError

_LOOPBACK = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d{1,5})?", re.ASCII | re.I)
_NO_WEIGHT = re.compile(r"q *= *0(\.0*)?")
GZIPPED = {"content-encoding": "gzip", "vary": "Accept-Encoding"}
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
}


class Guard:
    """Refuses foreign Host headers and adds the headers that every response has."""

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
            problem = ProblemError(
                421, "Wrong host", "this service only responds to the names of loopback addresses"
            )
            await problem.response()(scope, receive, send_with_headers)
            return
        await self._app(scope, receive, send_with_headers)


def last_response(problem: ProblemError) -> Response:
    """Return a response that closes the connection and has all headers without the application."""
    response = problem.response()
    response.headers.update({**HEADERS, "cache-control": "no-store", "connection": "close"})
    return response


def accepts_gzip(request: Request) -> bool:
    """Return whether the client takes gzip: a weight of 0 refuses it (RFC 9110, 12.5.3)."""
    is_taken: dict[str, bool] = {}
    for each in ",".join(request.headers.getlist("accept-encoding")).split(","):
        coding, *parameters = (part.strip().lower() for part in each.split(";"))
        is_taken[coding] = not any(_NO_WEIGHT.fullmatch(part) for part in parameters)
    return is_taken.get("gzip", is_taken.get("*", False))


def page_routes(folder: Path) -> list[Route]:
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
        if accepts_gzip(request):
            return Response(packed, headers={**headers, **GZIPPED}, media_type=media_type)
        return Response(content, headers=headers, media_type=media_type)

    return respond
