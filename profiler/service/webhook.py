"""Calls of regressions: a POST to a webhook, or a command of the user's.

Both get the same JSON. A call says whether it is done; one that is not may succeed later. What
fails is logged and ends nothing. The log names the host of a webhook only: its path may be a
secret.
"""

import contextlib
import http.client
import logging
import os
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import NamedTuple, Protocol
from urllib.parse import SplitResult, urljoin, urlsplit

from profiler.service.webhook_url import PORTS, WebhookError, parse_webhook
from profiler.text import fit
from symbolizer.text import readable

_TIMEOUT_S = 10.0
"""For a whole request with its response, however slowly either goes."""
_PAUSES_S = (1.0, 2.0, 4.0)
"""Between attempts; the next look tries again."""
_MOST_REDIRECTS = 3
_LATER = frozenset({408, 425, 429})
"""Statuses of requests that may succeed later, as do those from 500 on."""
_REDIRECTS = frozenset({307, 308})
"""Those that keep the method and the content (RFC 9110, 15.4)."""
_RUN_LIMIT_S = 60.0
_POLL_S = 0.05
_REASON_CELLS = 200

log = logging.getLogger(__name__)


class Call(NamedTuple):
    """What is told of a regression."""

    content: bytes
    """JSON."""
    environment: Mapping[str, str]


class Caller(Protocol):
    """Something that is called when a deployment is a regression."""

    @property
    def name(self) -> str:
        """Tell it apart from the others of a watch."""
        ...

    def call(self, call: Call, ended: threading.Event) -> bool:
        """Return False if the same call should be made again later. `ended` stops it."""
        ...


class _RefusedError(Exception):
    """The receiver will not take the call later either."""


class Webhook:
    """Sends calls by HTTP or HTTPS, to the host of its URL and to no other."""

    name = "webhook"

    def __init__(
        self, url: str, *, timeout_s: float = _TIMEOUT_S, pauses_s: tuple[float, ...] = _PAUSES_S
    ) -> None:
        self._url = parse_webhook(url)
        self._timeout_s = timeout_s
        self._pauses_s = pauses_s
        self._host = readable((self._url.hostname or "").encode())

    def call(self, call: Call, ended: threading.Event) -> bool:
        for pause_s in (*self._pauses_s, None):
            try:
                self._post(call.content, ended)
            except _RefusedError as error:
                log.warning("the webhook at %s refused a call: %s", self._host, error)
                return True
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = fit(readable(str(error).encode(errors="replace")), _REASON_CELLS)
                name = reason or type(error).__name__
                log.warning("cannot call the webhook at %s: %s", self._host, name)
            else:
                return True
            if pause_s is None or ended.wait(pause_s):
                return False
        return False

    def _post(self, content: bytes, ended: threading.Event) -> None:
        """Send a call, and follow redirects within the host.

        Raises:
            _RefusedError: it was refused for good.
            OSError, HTTPException: it may succeed later.
        """
        url, until_s = self._url, time.monotonic() + self._timeout_s
        for _ in range(_MOST_REDIRECTS + 1):
            status, location = _respond(url, content, until_s, ended)
            if status in _REDIRECTS:
                url = _redirected(url, location)
            elif status >= 500 or status in _LATER:
                raise ConnectionError(f"it responded with status {status}")
            elif 200 <= status < 300:
                return
            else:
                raise _RefusedError(f"status {status}")
        raise _RefusedError("it redirects again and again")


def _respond(
    url: SplitResult, content: bytes, until_s: float, ended: threading.Event
) -> tuple[int, str]:
    """Return the status of a response, and where it redirects to.

    Each operation of a socket has a timeout of its own, which somebody who sends byte by byte never
    exceeds: a thread shuts the connection when the time is over, or the watch ends.
    """
    left_s = until_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("timed out")
    host, done, is_shut = url.hostname or "", threading.Event(), threading.Event()
    if url.scheme == "https":
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            host, url.port, timeout=left_s, context=ssl.create_default_context()
        )
    else:
        connection = http.client.HTTPConnection(host, url.port, timeout=left_s)

    def guard() -> None:
        while not done.wait(_POLL_S):
            if ended.is_set() or time.monotonic() > until_s:
                is_shut.set()
                with contextlib.suppress(OSError, AttributeError):  # it has not begun
                    connection.sock.shutdown(socket.SHUT_RDWR)

    threading.Thread(target=guard, name="webhook", daemon=True).start()
    target = (url.path or "/") + (f"?{url.query}" if url.query else "")
    headers = {"Content-Type": "application/json", "User-Agent": "everflame"}
    try:
        connection.request("POST", target, content, headers)
        response = connection.getresponse()
        # Where the connection was shut, a response that was cut there looks whole.
        if not is_shut.is_set():
            return response.status, response.getheader("Location", "")
    except (OSError, http.client.HTTPException):
        if not is_shut.is_set():
            raise
    finally:
        done.set()
        connection.close()
    raise TimeoutError("timed out")


def _redirected(url: SplitResult, location: str) -> SplitResult:
    """Return where a redirect leads.

    Raises:
        _RefusedError: to another host, or away from HTTPS.
    """
    try:
        to = urlsplit(urljoin(url.geturl(), location))
        is_same = (to.scheme, to.hostname, _port(to)) == (url.scheme, url.hostname, _port(url))
    except ValueError:
        is_same = False
    if not location or not is_same:
        raise _RefusedError("it redirects to another host, scheme or port")
    return to


def _port(url: SplitResult) -> int | None:
    return url.port or PORTS.get(url.scheme)


class Command:
    """Runs a command, without a shell, with the call on its standard input."""

    name = "run"

    def __init__(self, text: str, *, limit_s: float = _RUN_LIMIT_S) -> None:
        try:
            self._words = shlex.split(text)
        except ValueError as error:
            raise WebhookError(f"cannot read the command {text!r}: {error}") from error
        if not self._words or shutil.which(self._words[0]) is None:
            first = self._words[0] if self._words else text
            raise WebhookError(
                f"there is no program {first!r} (a shell is not used: write sh -c 'COMMAND')"
            )
        self._limit_s = limit_s

    def call(self, call: Call, ended: threading.Event) -> bool:
        environment = {**os.environ, **call.environment}
        environment.pop("EVERFLAME_WEBHOOK", None)  # its address may be a secret
        sys.stderr.flush()
        try:
            process = subprocess.Popen(
                self._words,
                stdin=subprocess.PIPE,
                stdout=2,  # standard output has the lines of deployments
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            log.warning("cannot run %s: %s", self._words[0], error.strerror)
            return True
        with process:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it need not read it
                process.stdin.write(call.content)  # fits into a pipe
                process.stdin.close()
            status = self._wait(process, ended)
            if status is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        if status is None and ended.is_set():
            return False
        if status is None:
            log.warning("ended %s: it ran for longer than %g s", self._words[0], self._limit_s)
        elif status:
            log.warning("%s ended with exit status %d", self._words[0], status)
        return True

    def _wait(self, process: subprocess.Popen[bytes], ended: threading.Event) -> int | None:
        """Return the exit status; None if the time is over or the watch ends."""
        until_s = time.monotonic() + self._limit_s
        while time.monotonic() < until_s and not ended.is_set():
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(_POLL_S)
        return None
