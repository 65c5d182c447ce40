"""A Go program of ours, and Go's tools for profiles; a test is skipped where Go is too old."""

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.support.targets import SOURCES

MAIN = SOURCES / "pgo" / "main.go"
Edge = tuple[str, str, int]
"""Caller, callee, and the call's line, counted from the caller's first."""


@functools.cache
def go_version() -> tuple[int, int]:
    """Return Go's version, (0, 0) without Go."""
    if not shutil.which("go"):
        return (0, 0)
    text = subprocess.run(
        ["go", "version"], check=True, capture_output=True, text=True, timeout=60
    ).stdout
    found = re.search(r"go1\.(\d+)", text)
    return (1, int(found[1]) if found else 0)


def need_go(minor: int) -> None:
    """Skip the test without Go 1.`minor`."""
    if go_version() < (1, minor):
        pytest.skip(f"no Go 1.{minor} or later: install golang-go")


def build(output: Path, *flags: str, source: Sequence[Path] = (MAIN,)) -> str:
    """Compile a program, and return what the compiler says."""
    environment = {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-mod=mod"}
    child = subprocess.run(
        ["go", "build", *flags, "-o", output, *source],
        env=environment, cwd=output.parent, check=False, capture_output=True, text=True,
        timeout=110,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    return child.stderr


def read_edges(profile: Path) -> Mapping[Edge, int]:
    """Return the weights of calls as Go's compiler sees them; needs Go 1.23."""
    command = ["go", "tool", "preprofile", "-i", profile]
    text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=110).stdout
    header, *lines = text.splitlines()
    assert header == "GO PREPROFILE V1"
    edges = {}
    for caller, callee, numbers in zip(lines[::3], lines[1::3], lines[2::3], strict=True):
        line, weight = map(int, numbers.split())
        edges[caller, callee, line] = weight
    return edges
