"""Programs with code in anonymous memory, what readers are asked about them, and made jitdumps."""

import contextlib
import os
import struct
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from symbolizer.maps import Mapping
from tests.support.live import TICK_NS, stat_fields
from tests.support.naming import request
from tests.support.targets import running


class Program(NamedTuple):
    """A running `jit.c`, and where its two functions are."""

    pid: int
    leaf: int
    caller: int


@contextlib.contextmanager
def jit_program(path: Path, *arguments: str | Path) -> Iterator[Program]:
    with running(path, *arguments, stdout=subprocess.PIPE) as process:
        leaf, caller = (int(word, 16) for word in process.stdout.readline().split())
        try:
            yield Program(process.pid, leaf, caller)
        finally:
            map_of(process.pid).unlink(missing_ok=True)


def map_of(pid: int) -> Path:
    """Return where the perf map of a process with our /tmp and our pids is."""
    return Path(f"/tmp/perf-{pid}.map")


def question(
    pid: int, addresses: Sequence[int], dumps: Sequence[Mapping] = (), begin_ns: int | None = None
) -> dict[str, Any]:
    """Return what a reader is asked: what a process has written about these addresses."""
    start_ticks = int(stat_fields(pid)[19])
    return {
        "pid": pid,
        "start_ticks": start_ticks,
        "begin_ns": start_ticks * TICK_NS if begin_ns is None else begin_ns,
        "addresses": list(addresses),
        "dumps": [request(pid, dump) for dump in dumps],
    }


def dump_header(order: str = "<", pid: int = 7) -> bytes:
    return struct.pack(f"{order}IIIIIIQQ", 0x4A695444, 1, 40, 62, 0, pid, 1, 0)


def dump_record(kind: int, content: bytes, order: str = "<") -> bytes:
    return struct.pack(f"{order}IIQ", kind, 16 + len(content), 1) + content


def dump_load(address: int, size: int, name: bytes, order: str = "<") -> bytes:
    head = struct.pack(f"{order}IIQQQQ", 7, 7, address, address, size, 1)
    return dump_record(0, head + name + b"\0" + bytes(size), order)


def dump_move(old: int, new: int, size: int) -> bytes:
    return dump_record(1, struct.pack("<IIQQQQQ", 7, 7, new, old, new, size, 1))


def dump_lines(address: int, lines: Sequence[tuple[int, int, bytes]]) -> bytes:
    """Return the lines of a function: address, line, file."""
    content = struct.pack("<QQ", address, len(lines))
    for at, line, file in lines:
        content += struct.pack("<QiI", at, line, 0) + file + b"\0"
    return dump_record(2, content)


def own_pid(pid: int) -> int:
    """Return the pid that a process sees itself by."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("NStgid:")[2].split("\n")[0].split()[-1])


def child_of(pid: int) -> int:
    """Return the only child of a process, 0 as long as it has none."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0]) if children else 0


def write_as(user: int, path: Path, content: bytes) -> None:
    """Write a file of a user."""
    path.write_bytes(content)
    os.chown(path, user, user)
