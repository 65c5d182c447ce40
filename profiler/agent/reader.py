"""Reader: a child process that opens and parses what belongs to others, for `Readers`.

Files, and what processes say about themselves, may be damaged, hostile or on a file system that
does not answer. So the sampler looks at none of them: it asks a child, which may be killed. The
child has limits on memory and CPU, no network, and no privileges besides those for reading. It
exits when its socket is closed or its parent has died.

Run as `python -P -m profiler.agent.reader FD KINDS CACHE`, where FD is one end of a Unix stream
socket, KINDS names a module that defines `kinds(cache)` and CACHE is the folder for tables. A
message is its length in 4 bytes, little-endian, and JSON. A request has a `kind` and `items`; the
answer is one message per item in their order, `{"result": …}` or `{"error": "…"}`, and then
`{"is_last": …}`: whether it exits now.
"""

import contextlib
import ctypes
import importlib
import json
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from profiler.agent.cost import rss_bytes
from symbolizer.file_cache import UnwrittenError

Read = Callable[[Mapping[str, Any]], Any]
"""Reads one item: the values that it was asked with in, what JSON can hold out."""

LONGEST_MESSAGE_BYTES = 16 << 20
_ITEM_CPU_S = 2.0
"""CPU time for one item. The largest real files take about one second."""
_DATA_BYTES = 384 << 20
"""Private memory. The largest real files take about 170 MB."""
_KEPT_BYTES = 96 << 20
"""A child that has grown beyond this exits, as Python returns little of what it has freed."""

_CLONE_NEWNET = 0x4000_0000  # unshare(2)
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_CAPBSET_DROP = 1, 38, 24  # prctl(2)
_CAP_DAC_READ_SEARCH, _CAP_SYS_PTRACE, _CAP_CHECKPOINT_RESTORE = 2, 19, 40
_CAPABILITIES = (_CAP_DAC_READ_SEARCH, _CAP_SYS_PTRACE, _CAP_CHECKPOINT_RESTORE)
_CAPABILITY_VERSION_3 = 0x2008_0522  # capset(2)

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    parent = os.getppid()
    _libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it died before the line above
        return
    limit_privileges()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    kinds: Mapping[str, Read] = importlib.import_module(sys.argv[2]).kinds(Path(sys.argv[3]))
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    # The user's own limit may be lower (ulimit -d), and cannot be raised without privileges.
    data_bytes = _DATA_BYTES if hard == resource.RLIM_INFINITY else min(hard, _DATA_BYTES)
    resource.setrlimit(resource.RLIMIT_DATA, (data_bytes, data_bytes))
    with contextlib.suppress(ConnectionError):  # nobody waits for the answer any more
        _answer(channel, kinds)


def _answer(channel: socket.socket, kinds: Mapping[str, Read]) -> None:
    while (request := receive(channel)) is not None:
        for item in request["items"]:
            send(channel, _read(kinds[request["kind"]], item))
        # Not ru_maxrss, which begins with the memory of the sampler that has forked this process.
        is_last = rss_bytes() > _KEPT_BYTES
        send(channel, {"is_last": is_last})
        if is_last:
            return


def _read(read: Read, item: Mapping[str, Any]) -> dict[str, Any]:
    # The default action of SIGPROF ends the process, whatever it is doing.
    signal.setitimer(signal.ITIMER_PROF, _ITEM_CPU_S)
    try:
        return {"result": read(item)}
    except (MemoryError, RecursionError) as error:
        return {"error": type(error).__name__}
    except UnwrittenError as error:
        return {"error": UnwrittenError.__name__, "reason": error.strerror}
    except Exception as error:  # noqa: BLE001 - the next item has nothing to do with it
        return {"error": f"{type(error).__name__}: {error}"[:1000]}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def limit_privileges() -> None:
    """Give up the network and all capabilities that reading does not need, as far as possible."""
    _libc.unshare(_CLONE_NEWNET)
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    last = 63
    with contextlib.suppress(OSError, ValueError):
        last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    for capability in range(last + 1):
        if capability not in _CAPABILITIES:
            _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    held = (ctypes.c_uint32 * 6)()
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    if _libc.capget(header, held):
        return
    # effective, permitted, inheritable: of capabilities 0 to 31, then of those from 32 on
    for word in range(6):
        wanted = sum(1 << (c & 31) for c in _CAPABILITIES if c >> 5 == word // 3)
        held[word] &= wanted
    _libc.capset(header, held)


def send(channel: socket.socket, message: Mapping[str, Any]) -> None:
    content = json.dumps(message).encode()
    channel.sendall(len(content).to_bytes(4, "little") + content)


def receive(channel: socket.socket) -> Any:
    """Return the next message; None when the other side has closed the socket."""
    head = _receive_bytes(channel, 4)
    content = _receive_bytes(channel, int.from_bytes(head, "little")) if head else b""
    return json.loads(content) if content else None


def _receive_bytes(channel: socket.socket, size: int) -> bytes:
    parts = []
    while size and (part := channel.recv(min(size, 1 << 20))):
        parts.append(part)
        size -= len(part)
    return b"" if size else b"".join(parts)


if __name__ == "__main__":
    main()
