"""The command line as a whole: what every command has in common."""

import subprocess
import sys

import pytest

from profiler import cli

EVERY_COMMAND = pytest.mark.parametrize("command", cli.COMMANDS)


def test_help_does_not_wait_for_the_libraries_of_the_commands() -> None:
    """No command is imported to list them all."""
    script = (
        "import sys\n"
        "from profiler import cli\n"
        "try:\n    cli.main(['--help'])\n"
        "except SystemExit:\n    pass\n"
        "print(*{'numpy', 'orjson', 'boto3'} & set(sys.modules), file=sys.stderr)\n"
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
