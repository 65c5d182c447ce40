"""Problems: the responses that are errors, as problem+json (RFC 9457)."""

import orjson
from starlette.responses import Response

RETRY_AFTER_S = 5
"""When a client that was told 503 may ask again."""


class ProblemError(Exception):
    """An error response: its status, title and detail, and more fields of its body."""

    def __init__(self, code: int, title: str, detail: str, **more: object) -> None:
        super().__init__(detail)
        self.code, self.title, self.detail, self.more = code, title, detail, more

    def response(self) -> Response:
        body = {"type": "about:blank", "title": self.title, "status": self.code}
        content = orjson.dumps({**body, "detail": self.detail, **self.more})
        headers = {"retry-after": str(RETRY_AFTER_S)} if self.code == 503 else None
        return Response(content, self.code, headers, "application/problem+json")


def bad_request(detail: str, **more: object) -> ProblemError:
    return ProblemError(400, "Bad request", detail, **more)


def bad_parameter(parameter: str, detail: str) -> ProblemError:
    return bad_request(detail, parameter=parameter)
