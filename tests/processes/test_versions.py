"""Versions of services, from real processes, executables, work trees and release folders."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from profiler.processes.programs import Program, describe
from profiler.processes.versions import Versions
from symbolizer.files import ProcessFiles
from symbolizer.symbols.elf import FileSource, read_elf
from symbolizer.symbols.gobuild import read_go_build
from tests.support.live import started, wait_for

PYTHON = Path(sys.executable).resolve()
SLEEP = "import time; time.sleep(60)\n"
CLEAN = {"PATH": os.environ["PATH"]}
NATIVE = Program("sleep")


def find(
    pid: int, *, image: str = "", variables: tuple[str, ...] = (), is_first: bool = True
) -> str:
    with ProcessFiles(pid) as files:
        arguments = (files.read("cmdline", 4096) or b"").rstrip(b"\0").split(b"\0")
        program = describe(files.link("exe"), arguments, b"", files.link("cwd"))
        return Versions(variables).read(files, program).version(image, is_first=is_first)


def version_with(**environment: str) -> str:
    with started("sleep", "60", env=CLEAN | environment) as process:
        return find(process.pid, variables=("RELEASE",))


def build_id(path: Path) -> str:
    with path.open("rb") as file:
        return read_elf(FileSource(file.fileno())).build_id


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder whose own path looks like no release."""
    return tmp_path


def commit(folder: Path) -> str:
    """Make the folder a work tree with one commit and return its hash."""
    who = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null", "HOME": "/"}
    who |= {
        f"GIT_{role}_{what}": "a@b"
        for role in ("AUTHOR", "COMMITTER")
        for what in ("NAME", "EMAIL")
    }
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", *command], cwd=folder, check=True, env=CLEAN | who, timeout=20)
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=folder, check=True, env=CLEAN | who, capture_output=True
    )
    return head.stdout.decode().strip()


@pytest.fixture(scope="module")
def git() -> None:
    if not shutil.which("git"):
        pytest.skip("no git")


def test_environment_is_asked_in_its_order() -> None:
    """OpenTelemetry's attribute, then the usual names, then those that were configured."""
    names = ["SERVICE_VERSION", "DD_VERSION", "GIT_SHA", "RELEASE"]
    all_of_them = {name: name.lower() for name in names}
    otel = {"OTEL_RESOURCE_ATTRIBUTES": "service.name=x,service.version=1%2E2,a=b"}

    assert version_with(**all_of_them, **otel) == "1.2"
    for position, name in enumerate(names):
        rest = {key: all_of_them[key] for key in names[position:]}
        assert version_with(**rest) == name.lower()


def test_empty_variables_say_nothing() -> None:
    """A variable that is set to nothing does not hide the next one."""
    assert version_with(SERVICE_VERSION="", DD_VERSION=" ", GIT_SHA="abc") == "abc"


def test_variable_counts_by_its_whole_name() -> None:
    """MY_GIT_SHA is another variable, and a value may look like one."""
    assert version_with(MY_GIT_SHA="no", A="GIT_SHA=no", GIT_SHA="yes") == "yes"


def test_hostile_value_is_made_readable_and_short() -> None:
    """A version cannot break a line, and has at most 200 characters."""
    version = version_with(GIT_SHA="a\n\x1b\u202e" + "x" * 5000)

    assert version.startswith(r"a\n\x1b\u202ex")
    assert len(version) <= 200


def test_image_comes_after_the_environment() -> None:
    """What the process says itself is nearer than what it was shipped in."""
    with started("sleep", "60", env=CLEAN | {"GIT_SHA": "abc"}) as process:
        assert find(process.pid, image="1.2") == "abc"
    with started("sleep", "60", env=CLEAN) as process:
        assert find(process.pid, image="1.2") == "1.2"


def test_native_program_has_its_build_id() -> None:
    """A program of which nothing else is known has its build id as version."""
    with started("sleep", "60", env=CLEAN, cwd="/") as process:
        assert find(process.pid) == build_id(Path("/bin/sleep"))


def test_build_id_of_a_later_process_is_not_the_services() -> None:
    """A service's tools have build ids of their own."""
    with started("sleep", "60", env=CLEAN, cwd="/") as process:
        assert find(process.pid, is_first=False) == ""


def test_interpreter_never_gives_its_own_build_id(work: Path) -> None:
    """All Python programs of a host would have the same version."""
    (work / "shop.py").write_text(SLEEP)

    with started(PYTHON, work / "shop.py", env=CLEAN, cwd="/") as process:
        assert find(process.pid) == ""


@pytest.fixture(scope="module")
def go_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which("go") or not shutil.which("git"):
        pytest.skip("no go, or no git")
    folder = tmp_path_factory.mktemp("go")
    (folder / "main.go").write_text(
        'package main\nimport "time"\nfunc main() { time.Sleep(60e9) }\n'
    )
    (folder / "go.mod").write_text("module shop\n\ngo 1.18\n")
    (folder / "revision").write_text(commit(folder))
    environment = os.environ | {"GOFLAGS": "-buildvcs=true", "GOTOOLCHAIN": "local"}
    environment |= {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory"}
    environment |= {"GIT_CONFIG_VALUE_0": "*"}
    command = ["go", "build", "-ldflags=-s -w", "-o", "shop", "."]
    subprocess.run(command, cwd=folder, check=True, env=environment, timeout=100)
    return folder / "shop"


def test_go_program_has_the_revision_it_was_built_from(go_program: Path) -> None:
    """Go's build info survives stripping."""
    with started(go_program, env=CLEAN, cwd="/") as process:
        assert find(process.pid) == (go_program.parent / "revision").read_text()


def test_damaged_build_info_is_no_version(go_program: Path, work: Path) -> None:
    """Whatever the section holds, there is an answer without delay."""
    content = bytearray(go_program.read_bytes())
    start = content.index(b"\xff Go buildinf:")
    for at in (start + 32, start + 33, start + 60):
        damaged = content.copy()
        damaged[at : at + 8] = b"\xff" * 8
        (work / "x").write_bytes(damaged)
        with (work / "x").open("rb") as file:
            build = read_go_build(read_elf(FileSource(file.fileno())))
        assert build is not None
        assert len(build.revision) <= 256


def test_program_that_go_did_not_link_has_no_build_info() -> None:
    """The section is looked for by its name."""
    with Path("/bin/sleep").open("rb") as file:
        assert read_go_build(read_elf(FileSource(file.fileno()))) is None


def deploy(work: Path, name: str) -> Path:
    """Lay out a release as deployment tools do, with the link `current` to it."""
    release = work / "releases" / name
    release.mkdir(parents=True)
    (release / "shop.py").write_text(SLEEP)
    (work / "current").unlink(missing_ok=True)
    (work / "current").symlink_to(f"releases/{name}")
    return release


def test_working_directory_gives_the_release(work: Path) -> None:
    """A process started in `current` runs in the folder that it led to then."""
    deploy(work, "20240501")

    with started("sleep", "60", env=CLEAN, cwd=work / "current") as process:
        deploy(work, "20240502")

        assert find(process.pid) == "20240501"


def test_scripts_link_gives_the_release_with_its_commit(work: Path, git: None) -> None:
    """The path of the script goes through the link, the version is what it leads to."""
    head = commit(deploy(work, "42"))

    with started(PYTHON, work / "current/shop.py", env=CLEAN, cwd="/") as process:
        assert find(process.pid) == f"42+{head[:12]}"


def test_release_named_by_its_commit_is_not_named_twice(work: Path, git: None) -> None:
    """Many tools name the folder by the commit."""
    release = deploy(work, "x")
    head = commit(release)
    release.rename(release.with_name(head))
    (work / "current").unlink()
    (work / "current").symlink_to(f"releases/{head}")

    with started("sleep", "60", env=CLEAN, cwd=work / "current") as process:
        assert find(process.pid) == head


def test_exported_release_has_the_commit_in_a_file(work: Path) -> None:
    """Capistrano writes REVISION where it leaves no work tree."""
    (deploy(work, "42") / "REVISION").write_text("ab" * 20 + "\n")

    with started("sleep", "60", env=CLEAN, cwd=work / "current") as process:
        assert find(process.pid) == "42+abababababab"


def test_script_in_a_work_tree_has_its_commit(work: Path, git: None) -> None:
    """Without releases it is the commit that is checked out around the script."""
    head = commit(work)
    (work / "app").mkdir()
    (work / "app/shop.py").write_text(SLEEP)

    with started(PYTHON, "shop.py", env=CLEAN, cwd=work / "app") as process:
        assert find(process.pid) == head
    subprocess.run(["git", "pack-refs", "--all"], cwd=work, check=True, timeout=20)
    with started(PYTHON, "shop.py", env=CLEAN, cwd=work / "app") as process:
        assert find(process.pid) == head


def test_tool_run_in_a_work_tree_does_not_take_its_commit(work: Path, git: None) -> None:
    """The commit says nothing about /bin/sleep."""
    commit(work)

    with started("sleep", "60", env=CLEAN, cwd=work) as process:
        assert find(process.pid) == build_id(Path("/bin/sleep"))


def test_links_of_the_distribution_are_no_releases(work: Path) -> None:
    """/bin/x and /usr/bin/x are one, and its version is not `usr`."""
    if not Path("/bin").is_symlink():
        pytest.skip("/bin is no link")
    script = next((p for p in Path("/bin").iterdir() if p.read_bytes()[:9] == b"#!/bin/sh"), None)
    assert script is not None

    with started("sleep", "60", env=CLEAN, cwd="/") as process, ProcessFiles(process.pid) as files:
        program = Program("x", os.fsencode(script), is_own_code=False)

        assert Versions().read(files, program).version("", is_first=True) == ""


@pytest.mark.parametrize("kind", ["fifo", "device", "outward link", "large", "garbage", "folder"])
def test_hostile_work_tree_gives_no_version(work: Path, kind: str) -> None:
    """What lies in the place of HEAD is neither waited for nor believed."""
    (work / ".git").mkdir()
    head = work / ".git/HEAD"
    match kind:
        case "fifo":
            os.mkfifo(head)
        case "device":
            head.symlink_to("/dev/zero")
        case "outward link":
            head.symlink_to("/etc/passwd")
        case "large":
            head.write_bytes(b"a" * 5_000_000)
        case "garbage":
            head.write_bytes(b"ref: refs/../../../../etc/passwd\n")
        case "folder":
            head.mkdir()
    (work / "shop.py").write_text(SLEEP)

    with started(PYTHON, work / "shop.py", env=CLEAN, cwd="/") as process:
        assert find(process.pid) == ""


@pytest.mark.kernel
def test_files_are_looked_up_in_the_processs_own_root(work: Path) -> None:
    """A link in a container that leads to / leads to the container's /, not to the host's."""
    root = work / "root"
    (root / "srv/releases/7").mkdir(parents=True)
    (root / "srv/current").symlink_to("/srv/releases/7")
    (root / "srv/releases/7/REVISION").symlink_to("/../../../../../revision")
    (root / "revision").write_text("ab" * 20)
    jail = work / "jail.py"
    jail.write_text(
        f"import os, time; os.chroot({str(root)!r}); os.chdir('/srv/current'); time.sleep(60)"
    )

    with started(PYTHON, jail, env=CLEAN) as process:
        cwd = Path(f"/proc/{process.pid}/cwd")
        wait_for(lambda: cwd.readlink().name == "7")
        assert find(process.pid) == "7+abababababab"


def test_process_that_has_gone_has_no_version() -> None:
    """Nothing is raised, nothing is guessed."""
    with started("sleep", "60") as process:
        pass

    with ProcessFiles(process.pid) as files:
        assert Versions().read(files, NATIVE).version("", is_first=True) == ""
