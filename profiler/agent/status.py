"""The status of a running agent: on its Unix socket, as a table, in Prometheus' text format."""

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson

_SOCKET = "agent.sock"
_UPLOADER_STATE = "uploader.json"
_TIMEOUT_S = 5.0
_LIMIT_BYTES = 1 << 20


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
    """Answers whoever connects with one JSON document, without ever waiting for them."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / _SOCKET
        self._path.unlink(missing_ok=True)  # of an agent that was killed: we hold the lock
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._socket.bind(str(self._path))
        self._path.chmod(0o600)
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


def ask(run_folder: Path) -> dict[str, Any]:
    """Ask the agent of this host.

    Raises:
        NoAgentError: none runs, or it does not answer.
    """
    path = run_folder / _SOCKET
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(_TIMEOUT_S)
            client.connect(str(path))
            content = b"".join(iter(lambda: client.recv(1 << 16), b""))
        answer: dict[str, Any] = orjson.loads(content[:_LIMIT_BYTES])
    except PermissionError:
        raise NoAgentError("cannot ask the agent: it runs as another user (try sudo)") from None
    except (FileNotFoundError, ConnectionRefusedError):
        raise NoAgentError("no agent runs on this host (start one with: everflame agent)") from None
    except (OSError, orjson.JSONDecodeError) as error:
        raise NoAgentError(f"the agent does not answer: {error}") from None
    return answer


def uploader_state(spool: Path) -> dict[str, Any]:
    """Read what the uploader last wrote of itself; nothing where it has not written yet."""
    try:
        state = orjson.loads((spool / _UPLOADER_STATE).read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return {}
    return state if isinstance(state, dict) else {}


def run(run_folder: Path, *, as_json: bool) -> int:
    """Print the status of this host's agent."""
    status = ask(run_folder)
    if as_json:
        sys.stdout.buffer.write(orjson.dumps(status, option=orjson.OPT_INDENT_2) + b"\n")
    else:
        print(table(status))
    return 0


def table(status: Mapping[str, Any]) -> str:
    """Lay the status out for a person."""
    lost = sum(status["lost"].values())
    upload, spool = status["uploader"], status["spool"]
    rate = f"{status['frequency_hz']} Hz, a window every {status['interval_s']} s"
    ticks = f"{status['ticks']:,} = {status['stored']:,} stored + {status['idle']:,} idle"
    own_mb = _megabytes(status["sampler"]["rss_bytes"])
    used_mb, limit_mb = _megabytes(spool["size_bytes"]), _megabytes(spool["limit_bytes"])
    waiting = f"{spool['profiles']:,} windows wait, {used_mb} of {limit_mb}"
    lines = [
        ("agent", f"pid {status['pid']} on {status['host']}, up {_duration(status['uptime_s'])}"),
        ("sampling", f"{rate}, {status['windows']:,} closed, {status['faults']:,} faults"),
        ("ticks", f"{ticks} + {status['filtered']:,} filtered + {lost:,} lost"),
        *((f"  {cause}", f"{number:,} lost") for cause, number in status["lost"].items()),
        *_stops(status["stops"], status["complete"]),
        *_costs(status["cpu_ns"], status["uptime_s"]),
        ("bpf", f"{status['bpf_ns_per_tick'] / 1000:.1f} us a tick"),
        *_unwinding(status["unwinding"]),
        ("memory", f"sampler {own_mb}, uploader {_megabytes(upload.get('rss_bytes', 0))}"),
        ("spool", f"{waiting}, {spool['given_up']:,} given up"),
        *_upload(upload),
    ]
    if status["alarm"]:
        lines.append(("alarm", "ticks and the kernel's own CPU times do not agree"))
    lines += [
        ("slow binary", f"{binary['ms']:.0f} ms  {binary['path']}")
        for binary in status["slowest_binaries"]
    ]
    wide = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:{wide}}  {text}".rstrip() for name, text in lines)


def _upload(upload: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if not upload.get("store"):
        yield "uploader", "has not reported yet"
        return
    last_ns = upload["last_upload_ns"]
    last = f"{_duration(time.time() - last_ns / 1e9)} ago" if last_ns else "never"
    yield "uploader", f"pid {upload['pid']}, started {upload['starts']:,} times"
    yield "  store", f"{upload['store']}, last upload {last}"
    failed = f"{upload['failed']:,} attempts failed, {upload['damaged']:,} files damaged"
    size_mb = _megabytes(upload["uploaded_bytes"])
    yield "  sent", f"{upload['uploaded']:,} windows, {size_mb}; {failed}"
    if upload["expired"]:
        yield "  removed", f"{upload['expired']:,} old windows"
    if upload["last_error"]:
        yield "  error", upload["last_error"]


def _unwinding(state: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    processes = f"{state['processes']:,} processes, {state['tables']:,} unwind tables"
    waiting = state["tables_waiting"]
    yield (
        "unwinding",
        f"{processes} in {_megabytes(state['kernel_bytes'])} of the kernel's memory,"
        f" {state['tables_evicted']:,} made room"
        + (f", {waiting:,} wait for room (see --unwind-memory)" if waiting else ""),
    )


def _stops(stops: Mapping[str, int], complete: int) -> Iterator[tuple[str, str]]:
    whole = sum(stops.values())
    if whole:
        yield "stacks", f"{complete / whole:.1%} complete"
    for reason, number in sorted(stops.items(), key=lambda item: -item[1]):
        yield f"  {reason}", f"{number / whole:.1%} of stacks end so"


def _costs(cpu_ns: Mapping[str, int], uptime_s: float) -> Iterator[tuple[str, str]]:
    for part, spent_ns in cpu_ns.items():
        yield f"cpu, {part}", f"{spent_ns / 1e9:.2f} s, {spent_ns / 1e7 / uptime_s:.2f} % of one"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB"
