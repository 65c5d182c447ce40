"""Doctor: each check meets the failure it is for, made for real in a child of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bpf import syscalls
from profiler.commands.doctor import (
    Check,
    Status,
    check_bcc,
    check_tracers,
    format_json,
    format_table,
)

RUN_DOCTOR = "import sys; from profiler.commands import doctor; sys.exit(doctor.main(as_json=True))"
Report = dict[str, dict[str, str]]


@pytest.fixture
def examine() -> Callable[..., tuple[int, Report]]:
    """Run doctor below a command that takes something away; return its status and its checks."""

    def run(*around: str) -> tuple[int, Report]:
        command = [*around, sys.executable, "-c", RUN_DOCTOR]
        root = Path(__file__).parents[2]
        child = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        assert child.stdout, child.stderr
        report = json.loads(child.stdout)
        assert report["schema"] == 1
        assert report["ok"] == (child.returncode == 0)
        return child.returncode, {check["name"]: check for check in report["checks"]}

    return run


def without(*capabilities: str) -> list[str]:
    return ["setpriv", "--bounding-set", ",".join(f"-{name}" for name in capabilities)]


def hiding(path: str) -> list[str]:
    script = f'mount -t tmpfs none {path} && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", script, "sh"]


@pytest.mark.kernel
def test_a_machine_that_samples_passes_every_check_that_can_fail(examine) -> None:
    """What this very test run needs is there, so doctor says so and exits with 0."""
    status, checks = examine()

    assert status == 0
    assert {name for name, check in checks.items() if check["status"] == "fail"} == set()
    assert checks["programs"]["status"] == "ok"


@pytest.mark.kernel
def test_without_the_right_to_load_programs_doctor_fails_and_names_the_capability(examine) -> None:
    """CAP_BPF and CAP_SYS_ADMIN gone: map, program and capabilities fail, each with a remedy."""
    status, checks = examine(*without("bpf", "sys_admin"))

    assert status == 1
    assert checks["capabilities"]["status"] == "fail"
    assert "CAP_BPF" in checks["capabilities"]["detail"]
    assert checks["bpf"]["status"] == "fail"
    assert "CAP_BPF" in checks["bpf"]["remedy"]


@pytest.mark.kernel
def test_a_capability_that_only_costs_names_is_a_warning(examine) -> None:
    """Without CAP_SYSLOG kernel addresses are zeros, which stops nothing."""
    status, checks = examine(*without("syslog"))

    assert status == 0
    assert checks["capabilities"]["status"] == "warn"
    assert "no CAP_SYSLOG: kernel functions" in checks["capabilities"]["detail"]
    assert checks["kallsyms"]["status"] == "warn"
    assert "CAP_SYSLOG" in checks["kallsyms"]["remedy"]


@pytest.mark.kernel
def test_sys_admin_stands_for_the_capabilities_that_were_cut_out_of_it(examine) -> None:
    """A kernel takes CAP_SYS_ADMIN in the place of CAP_BPF and CAP_PERFMON."""
    status, checks = examine(*without("bpf", "perfmon", "checkpoint_restore"))

    assert status == 0
    assert checks["capabilities"]["status"] == "ok"
    assert checks["perf_event"]["status"] == "ok"


@pytest.mark.kernel
def test_without_any_capability_every_refusal_shows(examine) -> None:
    """As for an ordinary user, and no refusal of the kernel ends in a traceback.

    The right to read every file stays: the project may lie in a home folder that root does not own.
    """
    paranoid = int(Path("/proc/sys/kernel/perf_event_paranoid").read_text())
    if paranoid < 1:
        pytest.skip(f"perf_event_paranoid is {paranoid}: everybody may sample here")

    status, checks = examine("setpriv", "--bounding-set=-all,+dac_override")

    assert status == 1
    assert checks["perf_event"]["status"] == "fail"
    assert "perf_event_paranoid is" in checks["perf_event"]["detail"]
    assert checks["bpf"]["status"] == "fail"
    assert "CAP_BPF" in checks["bpf"]["remedy"]
    assert checks["programs"]["status"] == "fail"


@pytest.mark.kernel
def test_a_kernel_without_btf_fails_with_the_option_it_lacks(examine) -> None:
    """Hidden by a tmpfs in a mount namespace of the child."""
    status, checks = examine(*hiding("/sys/kernel/btf"))

    assert status == 1
    assert checks["btf"]["status"] == "fail"
    assert "CONFIG_DEBUG_INFO_BTF" in checks["btf"]["remedy"]


@pytest.mark.kernel
def test_a_missing_sys_fails_its_checks_and_leaves_the_others(examine) -> None:
    """Doctor is for broken machines, so no missing file may end it."""
    status, checks = examine(*hiding("/sys"))

    assert status == 1
    assert checks["perf_event"]["status"] == "fail"
    assert checks["clock"]["detail"].startswith("clocksource unknown")
    assert checks["kallsyms"]["status"] == "ok"


@pytest.mark.kernel
def test_a_pid_namespace_of_its_own_is_a_failure(examine) -> None:
    """Samples carry the host's pids, which a container cannot look up."""
    status, checks = examine("unshare", "--pid", "--fork", "--mount-proc")

    assert status == 1
    assert checks["pid_namespace"]["status"] == "fail"
    assert "--pid=host" in checks["pid_namespace"]["remedy"]


@pytest.mark.kernel
def test_a_time_namespace_with_other_clocks_is_a_failure(examine, tmp_path: Path) -> None:
    """Samples carry the kernel's times, and no process would be found; nothing is recorded."""
    around = ("unshare", "--time", "--fork", "--boottime", "100000")
    status, checks = examine(*around)
    everflame = Path(sys.executable).with_name("everflame")
    recorded = subprocess.run(
        [*around, everflame, "record", "--for", "1s", "-o", tmp_path / "x.folded"],
        capture_output=True,
        text=True,
        check=False,
    )

    assert status == 1
    assert checks["time_namespace"]["status"] == "fail"
    assert "boottime differs by 100000 s" in checks["time_namespace"]["detail"]
    assert recorded.returncode == 2
    assert recorded.stderr.startswith("everflame: cannot sample in a time namespace: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.kernel
def test_programs_of_other_tracers_are_named() -> None:
    """The kernel runs no other one on a CPU while a program of a tracepoint is active there."""
    instructions = bytes.fromhex("b7000000000000009500000000000000")
    fd = syscalls.load_program(instructions, syscalls.PROG_TYPE_TRACEPOINT)
    try:
        described = Path(f"/proc/self/fdinfo/{fd}").read_text()
        number = described.partition("prog_id:")[2].split()[0]
        check = check_tracers()
    finally:
        os.close(fd)

    assert check.status is Status.WARN
    assert f"program {number} (tracepoint)" in check.detail


@pytest.mark.kernel
def test_a_missing_cppfilt_only_costs_names(examine, tmp_path: Path) -> None:
    """An empty PATH has no c++filt; the compiling child has a PATH of its own."""
    status, checks = examine("env", f"PATH={tmp_path}")

    assert status == 0
    assert checks["cppfilt"]["status"] == "warn"
    assert "binutils" in checks["cppfilt"]["remedy"]


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that does not see the distribution's packages."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return folder / "bin" / "python"


def test_an_interpreter_without_bcc_is_told_to_see_the_distributions(bare_python: Path) -> None:
    """Most often a virtual environment made without --system-site-packages."""
    check = check_bcc(str(bare_python))

    assert check.status is Status.FAIL
    assert "No module named 'bcc'" in check.detail
    assert "apt-get install python3-bpfcc" in check.remedy
    assert "--system-site-packages" in check.remedy


def test_another_program_named_bcc_is_not_taken_for_bcc(bare_python: Path) -> None:
    """PyPI's bcc computes lattices: it imports well and has no BPF."""
    (folder,) = bare_python.parent.parent.glob("lib/python3*/site-packages")
    (folder / "bcc.py").write_text("class Lattice: ...\n")

    check = check_bcc(str(bare_python))

    assert check.status is Status.FAIL
    assert "another program of the same name" in check.detail
    assert "pip uninstall bcc" in check.remedy


def test_table_shows_the_remedy_below_what_is_not_well() -> None:
    """A human reads down; the last line sums up."""
    checks = [
        Check("kernel", Status.OK, "6.1"),
        Check("bcc", Status.FAIL, "it is missing", "install it"),
    ]

    lines = format_table(checks).splitlines()

    assert lines == [
        "ok    kernel  6.1",
        "fail  bcc     it is missing",
        "              -> install it",
        "This machine cannot be profiled yet: bcc.",
    ]


@pytest.mark.parametrize(("status", "is_fit"), [("ok", True), ("warn", True), ("fail", False)])
def test_only_a_failure_makes_a_machine_unfit(status: str, is_fit: bool) -> None:
    """The shape that scripts read."""
    report = json.loads(format_json([Check("bcc", Status(status), "found", "none")]))

    assert report == {
        "schema": 1,
        "ok": is_fit,
        "checks": [{"name": "bcc", "status": status, "detail": "found", "remedy": "none"}],
    }
