"""quickstart and check: what they say and how they end where something is missing or wrong."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "quickstart"


def run(*command: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=os.environ | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def refusal(child: subprocess.CompletedProcess[str]) -> str:
    """Return the one line with which a script refuses."""
    assert child.returncode == 2
    assert child.stdout == ""
    (line,) = child.stderr.splitlines()
    return line


def path_with(folder: Path, *programs: str) -> str:
    """Make a PATH on which only these programs are found."""
    for program in programs:
        (folder / program).symlink_to(shutil.which(program) or program)
    return str(folder)


@pytest.fixture
def readable_quickstart() -> Iterator[Path]:
    """A copy that any user may run; pytest's own folders are closed to others."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(shutil.copy(QUICKSTART, folder))


def test_another_architecture_is_refused_in_one_line() -> None:
    """setarch makes uname(2) say i686."""
    line = refusal(run("setarch", "i686", QUICKSTART))

    assert line == "quickstart: Linux on i686 is not supported: run this on Linux on x86_64"


def test_an_old_kernel_is_refused_in_one_line() -> None:
    """setarch makes uname(2) say 2.6."""
    line = refusal(run("setarch", "--uname-2.6", QUICKSTART))

    assert line.startswith("quickstart: kernel 2.6.")
    assert line.endswith("is too old: boot 5.15 or newer")


@pytest.mark.kernel
def test_a_kernel_without_btf_is_refused_in_one_line() -> None:
    """Hidden by a tmpfs in a mount namespace of the child."""
    hide = 'mount -t tmpfs none /sys/kernel/btf && exec "$0"'

    line = refusal(run("unshare", "--mount", "sh", "-c", hide, QUICKSTART))

    assert "CONFIG_DEBUG_INFO_BTF=y" in line


@pytest.mark.kernel
def test_a_user_without_sudo_is_told_to_become_root(readable_quickstart, tmp_path: Path) -> None:
    """Nothing is installed before the rights are there."""
    as_nobody = ("setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups")
    folder = readable_quickstart.parent / "bin"
    folder.mkdir()
    path = path_with(folder, "bash", "dirname", "readlink", "uname", "id")

    line = refusal(run(*as_nobody, "env", f"PATH={path}", "bash", readable_quickstart))

    assert "run this as root" in line
    assert sorted(p.name for p in readable_quickstart.parent.iterdir()) == ["bin", "quickstart"]


@pytest.mark.kernel
def test_a_system_without_apt_is_refused_in_one_line(tmp_path: Path) -> None:
    """Another distribution than those it is made for."""
    path = path_with(tmp_path, "bash", "dirname", "readlink", "uname", "id")

    line = refusal(run("bash", QUICKSTART, PATH=path))

    assert "there is no apt-get to install python3-bpfcc" in line
    assert line.endswith("use Debian 12, Debian 13 or Ubuntu 24.04")


@pytest.mark.kernel
def test_setting_up_what_is_set_up_says_nothing() -> None:
    """The folder of this very test run has been set up by check."""
    if not (ROOT / ".venv" / "made-for").exists():
        pytest.skip("no .venv that check made: run ./check")
    repeat = f'. "{QUICKSTART}"; set_up dev "${{packages[@]}}"'

    child = run("bash", "-c", repeat)

    assert (child.returncode, child.stdout, child.stderr) == (0, "", "")


@pytest.mark.kernel
def test_arguments_are_those_of_the_main_job(tmp_path: Path) -> None:
    """They go to `everflame up`, from whatever folder; its exit status comes back."""
    if not (ROOT / ".venv" / "made-for").exists():
        pytest.skip("no .venv that check made: run ./check")

    child = subprocess.run(
        [QUICKSTART, "--help"], cwd=tmp_path, capture_output=True, text=True, check=False
    )

    assert child.returncode == 0
    assert "usage: everflame up" in child.stdout
    assert child.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_check_ends_with_one_line_of_counts(tmp_path: Path) -> None:
    """Scripts read the last line; what failed is named before it, and is the exit code."""
    three = (
        "import pytest\n"
        "def test_one(): ...\n"
        "def test_two(): assert False\n"
        "def test_three(): pytest.skip('no reason')\n"
    )
    pytest_command = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider")
    for name, content in (("alone", three), ("beside", "def test_four(): ...\n")):
        tests = tmp_path / f"test_{name}.py"
        tests.write_text(content)
        xml = tmp_path / f"tests-{name}.xml"
        run(*pytest_command, f"--rootdir={tmp_path}", f"--junit-xml={xml}", tests)
    script = f'. "{ROOT}/check"; stage lint true; stage types false; report "{tmp_path}"'

    child = run("bash", "-c", script)

    assert child.returncode == 1
    assert child.stdout.splitlines()[-2:] == ["failed: types", "2 passed, 1 failed, 1 skipped"]


def test_check_shows_what_a_failed_tool_said_and_hides_what_a_good_one_says() -> None:
    """Quiet unless something is wrong."""
    script = f'. "{ROOT}/check"; stage good echo fine; stage bad sh -c "echo broken; false"'

    child = run("bash", "-c", script)

    assert child.stdout.splitlines() == ["good: ok", "broken", "bad: failed"]
