"""The status of a running agent, asked on its Unix socket, and of its uploader, from a file."""

import contextlib
import os
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson

_SOCKET = "agent.sock"
UPLOADER_STATE = "uploader.json"
"""The file in the spool in which the uploader says what it does."""
_TIMEOUT_S = 5.0
_LIMIT_BYTES = 1 << 20
"""Of an answer; ours have a few KB."""


class NoAgentError(Exception):
    """There is nobody to ask; the message says how to change that."""


def default_run_folder() -> Path:
    """Return where the agent's lock and socket are."""
    if chosen := os.environ.get("EVERFLAME_RUN"):
        return Path(chosen)
    if os.geteuid() == 0:
        return Path("/run/everflame")
    return Path(os.environ.get("XDG_RUNTIME_DIR") or f"/tmp/everflame-{os.geteuid()}") / "everflame"  # noqa: S108 - where a user without a session has nothing better


def default_spool() -> Path:
    """Return where closed windows wait for the store."""
    if chosen := os.environ.get("EVERFLAME_SPOOL"):
        return Path(chosen)
    if os.geteuid() == 0:
        return Path("/var/spool/everflame")
    return Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "everflame"


class StatusSocket:
    """Answers whoever connects with one JSON document, without ever waiting for them.

    The folder is `supervise.make_run_folder`'s: nobody else can put a link or a file there.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / _SOCKET
        self._path.unlink(missing_ok=True)  # of an agent that was killed: we hold the lock
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        mask = os.umask(0o177)  # it is never there with other rights
        try:
            with _short_path(folder) as path:
                self._socket.bind(path)
        finally:
            os.umask(mask)
        self._socket.listen(8)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._socket.close()
        self._path.unlink(missing_ok=True)

    def fileno(self) -> int:
        return self._socket.fileno()

    def answer(self, status: Callable[[], Mapping[str, Any]]) -> None:
        """Answer all who wait. Who does not take the answer at once gets what fits."""
        while True:
            try:
                client, _ = self._socket.accept()
            except BlockingIOError:
                return
            with client, contextlib.suppress(OSError):
                client.setblocking(False)
                client.send(orjson.dumps(status()))


@contextlib.contextmanager
def _short_path(folder: Path) -> Iterator[str]:
    """Return the socket's path by way of /proc: an address holds 107 bytes (unix(7))."""
    fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{_SOCKET}"
    finally:
        os.close(fd)


def ask(run_folder: Path) -> dict[str, Any]:
    """Ask the agent of this host.

    Raises:
        NoAgentError: none runs, or it does not answer.
    """
    try:
        with socket.socket(socket.AF_UNIX) as client, _short_path(run_folder) as path:
            client.settimeout(_TIMEOUT_S)
            client.connect(path)
            _check_peer(client)
            with client.makefile("rb") as stream:
                answer: dict[str, Any] = orjson.loads(stream.read(_LIMIT_BYTES))
    except PermissionError:
        raise NoAgentError("cannot ask the agent: it runs as another user (try sudo)") from None
    except (FileNotFoundError, ConnectionRefusedError):
        raise NoAgentError("no agent runs on this host (start one with: everflame agent)") from None
    except (OSError, orjson.JSONDecodeError) as error:
        raise NoAgentError(f"the agent does not answer: {error}") from None
    return answer


def _check_peer(client: socket.socket) -> None:
    """Believe an agent of root or of this user only: in /tmp anybody may listen in its place.

    Root believes any: the folder is root's alone, unless EVERFLAME_RUN names that of a user.

    Raises:
        NoAgentError: it is another user's.
    """
    credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    _, uid, _ = struct.unpack("3i", credentials)
    if uid not in (0, os.geteuid()) and os.geteuid() != 0:
        raise NoAgentError(f"cannot ask the agent: its socket belongs to user {uid} (remove it)")


def uploader_state(spool: Path) -> dict[str, Any]:
    """Read what the uploader last wrote of itself; nothing where it has not written yet."""
    try:
        state = orjson.loads((spool / UPLOADER_STATE).read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return {}
    return state if isinstance(state, dict) else {}
