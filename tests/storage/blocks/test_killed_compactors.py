"""Compactors that are killed: whatever they were doing, every sample is there, and once.

`bench/kill_compactors.py` runs hundreds of rounds.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.weed import BUCKET, KEYS, Weed

ROOT = Path(__file__).parents[3]
ROUNDS = 6
TIMEOUT_S = 400
"""Half a minute on an idle machine."""
pytestmark = pytest.mark.timeout(TIMEOUT_S + 20)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Return a folder in memory: what is killed here is a process, not the machine."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


def place_of(request: pytest.FixtureRequest, kind: str, folder: Path) -> list[str]:
    options = [f"--folder={folder / 'work'}"]
    if kind == "directory":
        return [f"--store={folder / 'store'}", *options]
    weed: Weed = request.getfixturevalue("weed")
    return [f"--store=s3://{BUCKET}/{folder.name}", f"--s3-endpoint={weed.endpoint}", *options]


def run_rounds(*options: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.compaction_rounds", *options],
        cwd=ROOT,
        env={**os.environ, **KEYS, "AWS_EC2_METADATA_DISABLED": "true"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("kind", ["directory", "s3"])
def test_several_compactors_killed_at_any_moment_lose_and_repeat_nothing(kind, request, folder):
    """Two to four at once, at random moments and changes, while objects arrive."""
    said = run_rounds(*place_of(request, kind, folder), f"--rounds={ROUNDS}", "--seed=7")

    assert "all exact" in said


def test_a_compactor_killed_before_any_of_its_changes_loses_and_repeats_nothing(request, folder):
    """The next one finds what it has left, and more objects."""
    said = run_rounds(*place_of(request, "directory", folder), "--every-change=2")

    assert "all exact" in said
