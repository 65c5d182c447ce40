"""What a command is going to map: real programs, scripts, and files that are neither."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from profiler.processes.loading import find_loaded, mapped
from tests.support.targets import compile_target

PYTHON = Path(sys.executable).resolve()
ENVIRONMENT = {"PATH": "/usr/bin:/bin"}


def mapped_by(*command: str | Path) -> set[Path]:
    """Return the files that a process has mapped with execute permission when it runs."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.read(1)
        lines = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
        process.stdin.close()
    fields = [line.split(maxsplit=5) for line in lines]
    return {Path(f[5]) for f in fields if "x" in f[1] and len(f) == 6 and f[5][0] == "/"}


def resolved(files: list[str]) -> set[Path]:
    return {Path(file).resolve() for file in files}


def test_a_program_its_loader_and_libraries_are_those_that_it_maps() -> None:
    # -S -I: so that it imports no extensions.
    waits = "import os; os.write(1, b'.'); os.read(0, 1)"

    assert resolved(find_loaded(str(PYTHON), ENVIRONMENT)) == mapped_by(
        PYTHON, "-S", "-I", "-c", waits
    )


@pytest.mark.parametrize(
    "first_line",
    ["#!{python}", "#! {python} -B", "#!/usr/bin/env {name}", "#!/usr/bin/env -S A=1 {name} -B"],
)
def test_a_script_is_run_by_the_program_that_it_names(first_line, tmp_path) -> None:
    script = tmp_path / "script"
    script.write_text(first_line.format(python=PYTHON, name=PYTHON.name) + "\n")
    script.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{PYTHON.parent}"}

    assert find_loaded("script", environment)[0] == str(PYTHON)


def test_scripts_that_run_each_other_have_no_program(tmp_path) -> None:
    script = tmp_path / "script"
    script.write_text(f"#!{script}\n")
    script.chmod(0o755)

    assert find_loaded(str(script), ENVIRONMENT) == []


def test_a_program_that_is_linked_statically_is_alone(tmp_path) -> None:
    program = compile_target("split.c", tmp_path / "split", "-static")

    assert find_loaded(str(program), ENVIRONMENT) == [str(program)]


@pytest.mark.parametrize("content", [b"", b"#!", b"#!/usr/bin/env\n", b"text", b"\x7fELF damaged"])
def test_of_what_is_no_program_there_is_nothing_but_itself(content, tmp_path) -> None:
    file = tmp_path / "file"
    file.write_bytes(content)
    file.chmod(0o755)

    assert find_loaded(str(file), ENVIRONMENT) in ([], [str(file)])


def test_a_pipe_in_place_of_a_program_is_not_waited_for(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o755)

    assert find_loaded(str(tmp_path / "pipe"), ENVIRONMENT) == []
    assert find_loaded("there-is-no-such-program", ENVIRONMENT) == []


def test_what_is_mapped_is_there_until_it_is_left(tmp_path) -> None:
    program = shutil.copy(PYTHON, tmp_path / "program")
    maps = Path("/proc/self/maps")

    with mapped([str(program), str(tmp_path / "nothing")]):
        assert str(program) in maps.read_text()
    assert str(program) not in maps.read_text()
