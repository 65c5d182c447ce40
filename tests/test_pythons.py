"""Interpreters that tests and benches run, wherever they come from."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import debian_roots, pythons
from tests.support.debian_roots import CannotFetchError, fetch_root
from tests.support.pythons import Interpreter, interpreters, need

SCRIPT = """
import json, sys
mapped = {line.split()[-1] for line in open("/proc/self/maps")} if sys.argv[1:] == ["maps"] else []
print(json.dumps([sys.version_info[:3], __file__, sorted(mapped)]))
"""


def run(interpreter: Interpreter, script: Path, *arguments: str) -> list[object]:
    command = interpreter.command(script, *arguments)
    output = subprocess.run(command, check=True, capture_output=True, timeout=60).stdout
    told: list[object] = json.loads(output)
    return told


def test_each_interpreter_runs_a_script_in_its_own_root(tmp_path: Path) -> None:
    """The script is there under the name that the process is said to know it by."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    for interpreter in interpreters():
        version, file, _ = run(interpreter, script)

        assert tuple(version) == interpreter.version
        assert file == str(interpreter.inside(script))


def test_the_runtime_is_in_the_file_that_is_named(tmp_path: Path) -> None:
    """It is mapped by a process that runs: the executable, or libpython."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    for interpreter in pythons.installed():
        _, _, mapped = run(interpreter, script, "maps")

        assert str(interpreter.runtime_file) in mapped, interpreter


def test_the_python_of_these_tests_is_among_them() -> None:
    """At least one interpreter is there on every machine."""
    versions = {each.version for each in pythons.installed()}

    assert sys.version_info[:3] in versions


def test_debians_come_with_the_runtime_inside_and_as_a_library() -> None:
    """These are the two ways in which a process has it."""
    inside, library = need("3.14-sid"), need("3.14-sid-library")

    assert inside.libpython is None
    assert library.libpython is not None
    assert library.version == inside.version
    assert inside.runtime_file.is_file()
    assert library.runtime_file.is_file()


def test_what_cannot_be_fetched_is_said_at_once_the_second_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests that are skipped for it do not wait for a mirror each."""
    monkeypatch.setattr(debian_roots, "CACHE", tmp_path / "cache")
    with pytest.raises(CannotFetchError) as first:
        fetch_root("none", "no-such-release", ["python3"])
    monkeypatch.setenv("PATH", "")

    with pytest.raises(CannotFetchError) as second:
        fetch_root("none", "no-such-release", ["python3"])

    assert str(second.value) == str(first.value)
    assert not (tmp_path / "cache/none").exists()
