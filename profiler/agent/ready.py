"""Readiness: tell whoever started the profiler that sampling has begun.

A script gives a descriptor (`--ready-fd`) and reads from it; a service manager gives a socket
(NOTIFY_SOCKET, see sd_notify(3)).
"""

import contextlib
import os
import socket
from collections.abc import Mapping


def announce(ready_fd: int | None, environment: Mapping[str, str]) -> None:
    """Tell it once: `ready` and the end of the file on the descriptor, READY=1 on the socket.

    A reader that has gone is not waited for, and a service manager that does not listen neither.
    """
    if ready_fd is not None:
        with contextlib.suppress(OSError):
            os.write(ready_fd, b"ready\n")
        with contextlib.suppress(OSError):
            os.close(ready_fd)
    if address := environment.get("NOTIFY_SOCKET", ""):
        # A leading @ stands for a null byte: an abstract socket (unix(7)).
        path = f"\0{address[1:]}" if address.startswith("@") else address
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as manager,
        ):
            manager.sendto(b"READY=1", path)
