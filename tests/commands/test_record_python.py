"""`everflame record -- COMMAND` where the command is a Python program: named from its beginning."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from storage.formats import pprof
from symbolizer.location import Kind
from tests.support.pythons import need, need_python

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(300)]

EVERFLAME = Path(sys.executable).with_name("everflame")
SCRIPT = """
import time
def spend():
    while time.process_time() < 1.0:
        sum(i & 3 for i in range(1000))
spend()
"""
MOST = 0.9
"""The rest is the start of the interpreter."""


def share_of(function: str, file: Path) -> float:
    """Return the share of samples with a Python function in their stacks."""
    profile = pprof.decode(file.read_bytes())
    has_it = {
        place: any(f.kind is Kind.PYTHON and f.function == function for f in profile.frames(number))
        for number, place in enumerate(profile.locations)
    }
    found = sum(row.samples for row in profile.rows() if any(map(has_it.__getitem__, row.stack)))
    assert profile.total_samples > 100
    return found / profile.total_samples


def record(folder: Path, *command: str) -> Path:
    """Record a command with an empty cache."""
    output = folder / "x.pb.gz"
    subprocess.run(
        [EVERFLAME, "record", "-F", "499", "-o", output, "--", *command],
        env={**os.environ, "EVERFLAME_CACHE": str(folder / "cache")},
        check=True, capture_output=True, timeout=200,
    )  # fmt: skip
    return output


@pytest.mark.parametrize("version", [(3, 8), (3, 11), (3, 12), (3, 13)])
def test_functions_are_named_from_the_first_tick_on(version, tmp_path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    output = record(tmp_path, *need_python(version).command(script))

    assert share_of("spend", output) > MOST


@pytest.mark.parametrize("first_line", ["#!{python}", "#!/usr/bin/env -S {name} -B"])
def test_a_script_names_its_interpreter(first_line, tmp_path, monkeypatch) -> None:
    python = need("3.11-system").executable
    script = tmp_path / "script.py"
    script.write_text(first_line.format(python=python, name=python.name) + SCRIPT)
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{python.parent}:/usr/bin:/bin")

    assert share_of("spend", record(tmp_path, str(script))) > MOST
