"""JavaScript tests under pytest: each has its own outcome, and none can get lost."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAD = 'import assert from "node:assert/strict";\nimport { test } from "node:test";\n'


@pytest.fixture
def run(tmp_path):
    """Return a function that runs a JavaScript file under pytest and returns what it printed."""

    def run_file(code: str, *options: str) -> str:
        (tmp_path / "package.json").write_text('{"type": "module"}')
        (tmp_path / "one.test.js").write_text(code)
        command = [sys.executable, "-m", "pytest", "-p", "tests.support.javascript", "-rA"]
        done = subprocess.run(
            [*command, f"--rootdir={tmp_path}", "-p", "no:cacheprovider", *options, "one.test.js"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.stdout

    return run_file


def test_each_test_has_an_outcome_and_a_message_of_its_own(run):
    """One that fails says why, and those beside it pass."""
    code = HEAD + 'test("one is \\"one\\"", () => assert.equal(1, 1));\n'
    code += 'test("a wrong sum", () => assert.equal(1 + 1, 3, "two <& not three"));\n'
    code += 'test("later", { skip: "not yet" }, () => {});\n'

    said = run(code)

    assert 'PASSED one.test.js::one is "one"' in said
    assert "FAILED one.test.js::a wrong sum" in said
    assert "two <& not three" in said
    assert ": not yet" in said
    assert "1 failed, 1 passed, 1 skipped" in said


def test_tests_can_be_chosen_by_name(run):
    """As any others: by -k."""
    code = HEAD + 'test("one", () => {});\ntest("other", () => assert.fail());\n'

    assert "1 passed, 1 deselected" in run(code, "-k", "one.test.js and not other")


def test_a_file_that_does_not_load_fails_each_of_its_tests(run):
    """And shows what node says of it."""
    said = run(
        'import "./nowhere.js";\n' + HEAD + 'test("one", () => {});\ntest("two", () => {});\n'
    )

    assert "2 failed" in said
    assert "ERR_MODULE_NOT_FOUND" in said


def test_a_file_without_tests_is_an_error(run):
    """A test that is commented out, or a file that lost them, does not pass unseen."""
    said = run(HEAD + "assert.ok(true);\n")

    assert "one.test.js has no test" in said
    assert "1 error" in said


def test_a_test_that_was_not_read_from_the_file_fails_it(run):
    """A name that is computed, for instance: it would run, and nobody would hear of it."""
    code = HEAD + 'test("one", () => {});\nfor (const name of ["two"]) test(name, () => {});\n'

    said = run(code)

    assert "1 failed" in said
    assert "ran 2 tests of 1" in said


def test_two_tests_of_one_name_are_an_error(run):
    said = run(HEAD + 'test("one", () => {});\ntest("one", () => {});\n')

    assert "several tests called 'one'" in said


def test_code_that_fails_outside_of_a_test_fails_the_file(run):
    """The tests have passed by then, and the file has not."""
    code = HEAD + 'test("one", () => {});\nprocess.on("exit", () => { process.exitCode = 3; });\n'

    said = run(code)

    assert "1 failed" in said
    assert "ended with status 3" in said
