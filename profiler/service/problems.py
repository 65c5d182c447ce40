"""Problems: the responses that are errors, as problem+json (RFC 9457)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType
from starlette.responses import Response

from profiler.service.responses import EmptyReason, NodeId, WindowMs

_RETRY_AFTER_S = 5


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The body of an error response."""

    type: str = "about:blank"
    title: str
    status: Annotated[int, Meta(ge=400, le=599)]
    detail: str
    parameter: str | UnsetType = UNSET
    node: NodeId | UnsetType = UNSET
    side: Literal["before", "after"] | UnsetType = UNSET
    reason: EmptyReason | UnsetType = UNSET
    nearest: Sequence[WindowMs] | UnsetType = UNSET
    services: Sequence[str] | UnsetType = UNSET
    versions: Sequence[str] | UnsetType = UNSET


class ProblemError(Exception):
    """An error response: its status, title and detail, and more fields of `Problem`."""

    def __init__(self, code: int, title: str, detail: str, **more: Any) -> None:
        super().__init__(detail)
        self.problem = Problem(title=title, status=code, detail=detail, **more)

    def response(self) -> Response:
        code = self.problem.status
        headers = {"retry-after": str(_RETRY_AFTER_S)} if code == 503 else None
        content = msgspec.json.encode(self.problem)
        return Response(content, code, headers, "application/problem+json")


def bad_request(detail: str, **more: Any) -> ProblemError:
    return ProblemError(400, "Bad request", detail, **more)


def bad_parameter(parameter: str, detail: str) -> ProblemError:
    return bad_request(detail, parameter=parameter)
