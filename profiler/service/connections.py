"""Connections: uvicorn's HTTP/1.1 with a deadline for everything that a client can leave undone.

uvicorn gives clients unlimited time to send a request: a few hundred that send a byte a minute take
all connections there are. Here a request must arrive within a deadline. When all connections are in
use, the longest idle one is closed; if none is idle, a new one is refused with 503. A client that
does not read its response is cut off as well.

No Python server does all of this: uvicorn has no deadline for requests, hypercorn's starts anew
with each byte, and granian has one for headers, but none for clients that do not read, and closes
no idle connection for a new one. So this is a subclass of uvicorn's connection. Its internals are
not documented: the allowed versions are those that the tests of connections were run with.
"""

import asyncio
import contextlib
import functools
from socket import socket
from types import FrameType
from typing import Any, cast

import h11
import uvicorn
from starlette.applications import Starlette
from starlette.responses import Response
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

_REQUEST_WITHIN_S = 10.0
"""From the first byte, or from the start of the connection, until a request is complete."""
_IDLE_S = 30
"""How long a connection may wait for its next request."""
_HEAD_LIMIT_BYTES = 32 << 10
"""Of a request line and its headers; a page's URL with eight long names fits."""
_CONNECTIONS_LIMIT = 256
_STALL_S = 30.0
"""How long a client may read nothing of a response."""
_GRACE_S = 3.0
"""How long responses under way may take when the service ends."""


class ConnectionSlots:
    """How many connections may be open. `idle` ones wait for a request, the longest first."""

    def __init__(
        self, busy: Response, malformed: Response, limit: int = _CONNECTIONS_LIMIT
    ) -> None:
        self.busy, self.malformed = busy, malformed
        self.limit = limit
        self.idle: dict[Connection, None] = {}
        self.cut = 0
        self.refused = 0

    def make_room(self) -> bool:
        """Cut off the longest idle connection; return whether there was one."""
        longest = next(iter(self.idle), None)
        if longest is not None:
            longest.cut_off()
        return longest is not None


class Connection(H11Protocol):
    """One connection. Its base class reads, responds and keeps alive."""

    def __init__(
        self,
        slots: ConnectionSlots,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._slots = slots
        self._deadline: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._left_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as its base class
        super().connection_made(transport)
        if len(self.connections) > self._slots.limit and not self._slots.make_room():
            self._slots.refused += 1
            self.app = self._slots.busy
        self._await_request()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state in {h11.IDLE, h11.SEND_BODY}:
            self._await_request()
        else:
            self._stop_awaiting()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self._slots.idle[self] = None  # for as long as it is kept alive

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_awaiting()
        self.resume_writing()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._left_bytes = self.transport.get_write_buffer_size()
        self._stall = self.loop.call_later(_STALL_S, self._check_progress)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def cut_off(self) -> None:
        self._stop_awaiting()
        self._slots.cut += 1
        self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Respond to what is not HTTP, or too long, with a problem as everywhere else."""
        del msg
        if self.cycle is None or self.cycle.response_complete:
            response = self._slots.malformed
            head = h11.Response(status_code=response.status_code, headers=response.raw_headers)
            for event in (head, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _await_request(self) -> None:
        self._slots.idle.setdefault(self)
        if self._deadline is None:
            self._deadline = self.loop.call_later(_REQUEST_WITHIN_S, self.cut_off)

    def _stop_awaiting(self) -> None:
        self._slots.idle.pop(self, None)
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _check_progress(self) -> None:
        left_bytes = self.transport.get_write_buffer_size()
        if left_bytes >= self._left_bytes:
            self.cut_off()
            return
        self._left_bytes = left_bytes
        self._stall = self.loop.call_later(_STALL_S, self._check_progress)


class Server(uvicorn.Server):
    """Serves until SIGINT or SIGTERM; then finishes responses under way, for a few seconds."""

    def __init__(self, app: Starlette, slots: ConnectionSlots) -> None:
        # uvicorn calls it to get a protocol; its type allows for classes only.
        protocol = cast("type[asyncio.Protocol]", functools.partial(Connection, slots))
        config = uvicorn.Config(
            app,
            http=protocol,
            ws="none",
            loop="asyncio",
            lifespan="off",
            access_log=False,
            # Warnings are about what clients do; those are counted.
            log_level="error",
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=_IDLE_S,
            h11_max_incomplete_event_size=_HEAD_LIMIT_BYTES,
        )
        super().__init__(config)
        self._wakes = asyncio.Event()

    async def main_loop(self) -> None:
        """Tick once a second. The base class ticks ten times: most of an idle service's CPU."""
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wakes.wait(), 1.0)

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        cut = asyncio.get_running_loop().call_later(_GRACE_S, self._cut_all)
        await super().shutdown(sockets)
        cut.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End; at the second signal without waiting. The base class raises the signal when done."""
        del sig, frame
        loop = asyncio.get_running_loop()
        loop.call_soon_threadsafe(self._cut_all if self.should_exit else self._wakes.set)
        self.should_exit = True

    def _cut_all(self) -> None:
        for connection in list(self.server_state.connections):
            cast("Connection", connection).transport.abort()
