"""Kinds of items that the tests of readers ask for: each does something to its reader."""

import os
import resource
import signal
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from profiler.agent.reader import Read


def kinds(cache: Path) -> Mapping[str, Read]:
    return {
        "echo": lambda values: {"said": values["say"], "pid": os.getpid(), "cache": str(cache)},
        "open": lambda values: Path(values["path"]).read_text(),
        "spin": lambda _: _spin(),
        "spin in a child": lambda values: _spin_in_child(values["cpu_s"]),
        "fill": lambda values: len(bytes(values["bytes"])),
        "raise": lambda _: 1 // 0,
        "die": lambda _: os.kill(os.getpid(), signal.SIGSEGV),
        "grow": lambda values: _touch(values["bytes"]),
        "privileges": lambda _: _privileges(),
    }


def _spin() -> None:
    while True:
        pass


def _spin_in_child(cpu_s: int) -> int:
    """Return how a child ended that is busy until it has used this much CPU time."""
    command = f"ulimit -t {cpu_s}; while :; do :; done"
    return subprocess.run(["sh", "-c", command], check=False).returncode


_kept: list[bytearray] = []
"""What a reader has not returned to the kernel."""


def _touch(size: int) -> int:
    content = bytearray(size)
    content[:: resource.getpagesize()] = b"x" * len(content[:: resource.getpagesize()])
    _kept.append(content)
    return len(content)


def _privileges() -> dict[str, Any]:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "interfaces": [name for _, name in socket.if_nameindex()],
        "effective": int(status["CapEff"], 16),
        "permitted": int(status["CapPrm"], 16),
        "new_privileges": status["NoNewPrivs"].strip() == "0",
        "descriptors": sorted(int(each.name) for each in Path("/proc/self/fd").iterdir()),
    }
