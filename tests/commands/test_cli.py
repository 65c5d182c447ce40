"""The command line as a whole: what every command has in common."""

import os
import subprocess
import sys
from pathlib import Path

import orjson
import pytest

from profiler import cli

RUN = "from profiler.cli import main; raise SystemExit(main())"
EVERY_COMMAND = pytest.mark.parametrize("command", cli.COMMANDS)


def test_help_does_not_wait_for_the_libraries_of_the_commands() -> None:
    """No command is imported to list them all."""
    script = (
        "import sys\n"
        "from profiler import cli\n"
        "try:\n    cli.main(['--help'])\n"
        "except SystemExit:\n    pass\n"
        "print(*{'numpy', 'orjson', 'boto3', 'duckdb'} & set(sys.modules), file=sys.stderr)\n"
    )

    child = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )

    assert child.stderr.strip() == ""
    assert set(cli.COMMANDS) <= set(child.stdout.split())


@EVERY_COMMAND
def test_every_command_explains_itself_with_an_example(command: str, capsys) -> None:
    """`--help` works for each, and shows how it is called."""
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])

    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert text.startswith(f"usage: everflame {command}")
    assert f"everflame {command}" in text.partition("examples:")[2]


def test_options_before_the_command_go_with_the_dashes_of_diff(tmp_path: Path, capsys) -> None:
    """`--debug` may stand anywhere; the dashes part the two sides all the same."""
    sides = [tmp_path / "before.folded", tmp_path / "after.folded"]
    for side in sides:
        side.write_text("main;work 100\n")
    before, after = map(str, sides)

    assert cli.main(["--debug", "diff", before, "--", after, "--json"]) == 0

    assert orjson.loads(capsys.readouterr().out)["after"]["samples"] == 100


def test_options_before_the_command_go_with_the_command_of_record(tmp_path: Path) -> None:
    """What follows the dashes is the command's: an option of ours is none there."""
    with pytest.raises(ValueError, match="choose one of"):
        cli.main(["--debug", "record", "-a", "--", "true", "--for", "1s"])


def test_dashes_without_a_command_are_refused(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["record", "--for", "1s", "--"])

    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith("error: name the command to run after --\n")


@pytest.mark.parametrize("arguments", [[], ["--metrics-listen="]])
def test_without_an_address_there_are_no_metrics(arguments: list[str]) -> None:
    for command in ("agent", "up"):
        assert cli.command_line().parse_args([command, *arguments]).metrics_listen == ""


@pytest.mark.parametrize("address", ["zz", "127.0.0.1", "127.0.0.1:", "[::1]:x", ":70000"])
def test_what_is_no_address_of_metrics_is_refused(address: str, capsys) -> None:
    """The agent does not run without them for days until somebody looks."""
    with pytest.raises(SystemExit) as ended:
        cli.command_line().parse_args(["agent", f"--metrics-listen={address}"])

    assert ended.value.code == 2
    assert "give HOST:PORT, as 127.0.0.1:9100\n" in capsys.readouterr().err


@pytest.mark.parametrize("pid", ["0", "-1", "x", "1.5", "9" * 20])
def test_what_is_not_a_process_id_is_refused_in_our_own_words(pid: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["top", f"--pid={pid}"])

    assert ended.value.code == 2
    assert "is not a process id\n" in capsys.readouterr().err


@pytest.mark.parametrize("time", ["0", "0.0ms", "9" * 400, f"{'9' * 400}d", "107000d"])
def test_a_time_that_no_clock_can_count_is_refused(time: str, capsys) -> None:
    """Nor is it a traceback."""
    for arguments in (["top", "--for"], ["agent", "--keep"]):
        with pytest.raises(SystemExit) as ended:
            cli.command_line().parse_args([*arguments, time])

        assert ended.value.code == 2
        assert "is not a duration" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["0", "0.5", "0.0001kB", "1GiB", "-1", "", "9" * 400, "1" * 20])
def test_a_size_that_is_not_even_a_byte_is_refused(size: str, capsys) -> None:
    """It is not taken for no limit."""
    with pytest.raises(SystemExit) as ended:
        cli.command_line().parse_args(["agent", f"--keep-bytes={size}"])

    assert ended.value.code == 2
    assert f"{size!r} is not a size" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("everflame ex", {"export"}),
        ("everflame record --rep", {"--repeat"}),
        ("everflame --debug diff --mark", {"--markdown"}),
        ("everflame export --group f", {"function", "file"}),
        ("everflame deployments ad", {"add"}),
    ],
)
def test_a_shell_completes_commands_options_and_choices(
    line: str, expected: set[str], tmp_path: Path
) -> None:
    """Asked as argcomplete's script in bash asks: the words come in a file."""
    words = tmp_path / "words"
    asked = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(words),
        "_ARGCOMPLETE_IFS": "\n",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    command = [sys.executable, "-c", RUN]

    subprocess.run(command, env=os.environ | asked, check=True)

    assert {word.strip() for word in words.read_text().split("\n")} == expected


def test_bash_takes_the_script_that_completes() -> None:
    command = [sys.executable, "-c", RUN, "completion", "bash"]
    script = subprocess.run(command, capture_output=True, text=True, check=True).stdout

    shell = ["bash", "-c", f"{script}\ncomplete -p everflame"]

    told = subprocess.run(shell, capture_output=True, text=True, check=True).stdout
    assert told.startswith("complete ")


@pytest.fixture
def folded(tmp_path: Path) -> Path:
    file = tmp_path / "in.folded"
    file.write_text("main;work 100\n")
    return file


def shell(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a line of a shell in a folder; `$E` is everflame."""
    command = ["sh", "-c", script.replace("$E", f"{sys.executable} -c '{RUN}'")]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_a_directory_is_refused_as_an_output_before_anything_is_done(tmp_path: Path) -> None:
    """Before recording, and before a file is read: there is none here."""
    (tmp_path / "out.svg").mkdir()

    for command in ("record --for 60s", "export none.folded", "flamegraph none.folded"):
        child = shell(f"$E {command} -o out.svg", tmp_path)

        assert child.returncode == 2
        assert child.stderr == "everflame: cannot write out.svg: it is a directory\n"


def test_closed_stdout_is_one_line_and_only_if_it_is_needed(folded: Path) -> None:
    for command in ("export in.folded -o - >&-", "record --for 60s -o - >&-", "ls --json >&-"):
        child = shell(f"EVERFLAME_STORE=. $E {command}", folded.parent)

        assert child.returncode == 2
        assert child.stderr == "everflame: cannot write to standard output: it is closed\n"

    child = shell("$E export in.folded -o out.svg >&-", folded.parent)

    assert (child.returncode, child.stderr) == (0, "wrote out.svg\n")


def test_a_full_stdout_is_one_line(folded: Path) -> None:
    """Of help, of what is printed, and of what a command writes."""
    for command in ("--help", "completion bash", "export in.folded -o -"):
        child = shell(f"$E {command} > /dev/full", folded.parent)

        assert child.returncode == 2
        assert child.stderr.startswith("everflame: cannot write")
        assert child.stderr.endswith(": No space left on device\n")
        assert child.stderr.count("\n") == 1


def test_nothing_but_data_is_on_stdout_if_stderr_is_closed(folded: Path) -> None:
    child = shell('$E export in.folded -o out.svg -o - --by "" 2>&-', folded.parent)

    assert (child.returncode, child.stdout) == (0, "main;work 100\n")


def test_messages_that_cannot_be_written_stop_nothing(folded: Path) -> None:
    """A terminal that has gone, a full disk, a pipe that nobody reads: the command goes on."""
    child = shell("$E export in.folded -o out.folded -o x.svg 2> /dev/full; echo $?", folded.parent)

    assert child.stdout == "0\n"
    assert (folded.parent / "x.svg").is_file()


def test_a_path_that_is_not_utf_8_is_shown_by_its_bytes(folded: Path) -> None:
    """Not by the surrogates that Python has for them: whoever copies `\\xff` finds the file."""
    child = shell("$E export in.folded -o $(printf 'z\\377').svg", folded.parent)

    assert (child.returncode, child.stderr) == (0, "wrote z\\xff.svg\n")

    child = shell("$E export $(printf 'no\\377').folded -o out.svg", folded.parent)

    assert child.returncode == 2
    assert "no\\xff.folded" in child.stderr
    assert "udc" not in child.stderr


def test_one_output_on_a_full_disk_leaves_the_others(folded: Path) -> None:
    """/dev/full is as a full disk is; the error names the file."""
    (folded.parent / "full.folded").symlink_to("/dev/full")

    child = shell("$E export in.folded -o full.folded -o out.svg", folded.parent)

    assert child.returncode == 2
    assert child.stderr == (
        "wrote out.svg\neverflame: cannot write full.folded: No space left on device\n"
    )
    assert (folded.parent / "out.svg").is_file()


SHORT_OF_MEMORY = """
import resource, sys
from pathlib import Path
from profiler import cli
cli.main(sys.argv[1:] + ["first.folded"])  # all that it imports is there
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (8 << 20),) * 2)
raise SystemExit(cli.main(sys.argv[1:] + ["large.json"]))
"""


@pytest.mark.parametrize(
    "command",
    [["verify"], ["flamegraph"], ["export", "-o", "-"], ["import", "--store=store"]],
    ids=lambda command: command[0],
)
def test_a_file_that_is_larger_than_memory_is_one_line(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "first.folded").write_text("main;work 1\n")
    with (tmp_path / "large.json").open("w") as large:
        large.write('{"name": "')
        large.truncate(64 << 20)

    child = subprocess.run(
        [sys.executable, "-c", SHORT_OF_MEMORY, *command],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )

    assert child.returncode == (1 if command == ["verify"] else 2), child.stderr
    assert "Traceback" not in child.stderr
    assert "cannot read it: that takes more memory than there is\n" in child.stdout + child.stderr


def test_input_that_is_nested_too_deeply_is_no_defect_of_this_program() -> None:
    def fall() -> None:
        fall()

    with pytest.raises(RecursionError) as fallen:
        fall()

    assert cli._is_expected(fallen.value)
    assert cli._text_of(fallen.value) == "cannot do that: it is nested too deeply"


def test_an_unknown_argument_shows_the_usage_of_its_command(folded: Path) -> None:
    child = shell("$E ls --nope", folded.parent)

    assert child.returncode == 2
    assert child.stderr.startswith("usage: everflame ls ")
    assert child.stderr.endswith("everflame ls: error: unrecognized arguments: --nope\n")
