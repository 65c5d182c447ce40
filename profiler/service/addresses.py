"""Addresses: the loopback addresses to listen on, and what is wrong with others.

The sampling process imports it too, so it imports nothing large.
"""

import errno
import ipaddress
import os
import socket
from urllib.parse import urlsplit

_BACKLOG = 512
"""Connections that may wait while the service starts."""


class ListenError(ValueError):
    """The address cannot be listened on; the message says which, why, and what to do."""


def bind(listen: str) -> socket.socket:
    """Return a socket that listens on a loopback address: HOST:PORT, a port of 0 is any free one.

    Raises:
        ListenError: it is not such an address, or is in use.
    """
    host, port = _parse(listen)
    try:
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ListenError(f"cannot listen on {listen}: {error.strerror}") from error
    try:
        # The address may still have connections of a service that has just ended.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise ListenError(f"cannot listen on {listen}: {_reason(error, listen, port)}") from error
    return listener


def shown(address: tuple[str, int]) -> str:
    """Return an address as it is written in a URL."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _parse(listen: str) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{listen}")
        host, port = parts.hostname or "127.0.0.1", parts.port
    except ValueError:
        port = None
    if port is None or parts.netloc != listen or parts.username is not None:
        raise ListenError(f"cannot listen on {listen!r}: give HOST:PORT, as 127.0.0.1:4040")
    host = "127.0.0.1" if host == "localhost" else host
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback:
        raise ListenError(
            f"cannot listen on {listen}: only loopback is served, as 127.0.0.1:{port}"
            f" (reach it from elsewhere with ssh -L {port}:127.0.0.1:{port})"
        )
    return host, port


def _reason(error: OSError, listen: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        other = f"{listen.rpartition(':')[0]}:{port + 1 if port < 65535 else 0}"
        return f"the port is taken (choose another one, as with --listen {other})"
    return f"{os.strerror(error.errno or 0)} (choose another address with --listen)"
