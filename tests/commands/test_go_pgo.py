"""From a running Go program to a faster one: record, export, `go build -pgo`."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.go_programs import build, go_version, need_go, read_edges

pytestmark = pytest.mark.kernel

EVERFLAME = Path(sys.executable).with_name("everflame")
DECISIONS = (
    "PGO devirtualizing interface call each.score to (*mixing).score",
    "inlining call to combine",
)


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True, timeout=100)


def test_go_build_takes_the_profile_of_a_stripped_program_and_uses_it(tmp_path) -> None:
    """The call of the interface becomes one of the method, and the hot function is inlined."""
    need_go(21)
    program, flags = tmp_path / "program", ("-gcflags=-m",)
    said_before = build(program, "-ldflags=-s -w", "-pgo=off", *flags)

    run(EVERFLAME, "record", "-F", "499", "-o", "cpu.pb.gz", "--", program, "600", cwd=tmp_path)
    exported = run(
        *(EVERFLAME, "export", "cpu.pb.gz", "--for", "go-pgo", "-o", "default.pgo"), cwd=tmp_path
    )
    # As `go build -pgo` does, but for this package only: libraries need not be compiled again.
    said_after = build(
        tmp_path / "faster", "-pgo=off", f"-gcflags=-m -pgoprofile={tmp_path / 'default.pgo'}"
    )

    assert "samples of program" in exported.stderr
    if go_version() >= (1, 23):
        edges = read_edges(tmp_path / "default.pgo")
        # Which call is the hottest depends on the CPU; this one is hot on each.
        assert edges["main.total", "main.(*mixing).score", 4] > 0.1 * sum(edges.values())
    for decision in DECISIONS:
        assert decision not in said_before
        assert decision in said_after
    assert run(program, "3", cwd=tmp_path).stdout == run("./faster", "3", cwd=tmp_path).stdout
