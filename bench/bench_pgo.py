"""Measure what `go build -pgo` makes of a profile of ours, beside one of Go's own runtime.

    python bench/bench_pgo.py [--turns 7] [--seconds 10] [--only gofmt | --only calls]

Two programs: gofmt from Go's own sources (or another release's), which formats the sources of
packages of the standard library, and tests/targets/pgo, which does nothing but call methods of an
interface. Each is built without a profile and recorded twice while it does its work over and over:
by `everflame record` at 99 Hz, stripped as it would be in production, and by its own runtime/pprof
at 100 Hz. Both profiles are built with (`go build -pgo`), and the three programs run in turns.
Printed are the CPU seconds (user) of each, medians and their spread, as ratios to the program
without a profile; the hot calls that the profiles have in common, as Go's `preprofile` reads them,
and for comparison what two profiles of Go's own have (some of these are of runtime.asyncPreempt,
which no code calls); and the decisions that Go's compiler says it took. Needs root, and Go 1.23 or
later.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
EVERFLAME = Path(sys.executable).with_name("everflame")
PACKAGES = ("net/http", "go/types", "crypto/tls", "cmd/compile/internal/ssa")
_LARGEST_BYTES = 300_000
"""Generated files of megabytes take a gofmt of their own."""
_HOT = 0.01


class Workload(NamedTuple):
    """A program: what `go build` builds, its arguments, and how it profiles itself into a file."""

    sources: list[str]
    arguments: list[str]
    profiled: Callable[[str], tuple[list[str], dict[str, str]]]


def gofmt() -> Workload:
    root = Path(run("go", "env", "GOROOT").stdout.strip())
    files = sorted(
        str(file)
        for package in PACKAGES
        for file in (root / "src" / package).glob("*.go")
        if file.stat().st_size < _LARGEST_BYTES
    )
    return Workload(["cmd/gofmt"], ["-l", *files], lambda file: (["-cpuprofile", file], {}))


def calls() -> Workload:
    folder = ROOT / "tests" / "targets" / "pgo"
    sources = [str(folder / "main.go"), str(folder / "cpuprofile.go")]
    return Workload(sources, ["1000"], lambda file: ([], {"CPUPROFILE": file}))


WORKLOADS = {"gofmt": gofmt, "calls": calls}


def run(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=True, capture_output=True, text=True, **options)  # type: ignore[call-overload]  # only env


def build(workload: Workload, output: Path, profile: Path | None) -> str:
    """Build a program, stripped, and return what the compiler says of all of its packages."""
    flags = [f"-pgo={profile or 'off'}", "-ldflags=-s -w", "-gcflags=all=-m"]
    environment = {**os.environ, "CGO_ENABLED": "0"}
    return run("go", "build", *flags, "-o", output, *workload.sources, env=environment).stderr


def cpu_s(command: Sequence[str | Path]) -> float:
    """Run a program and return the user CPU seconds that it took."""
    environment = {**os.environ, "GOMAXPROCS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, command
    return usage.ru_utime


def record(program: Path, workload: Workload, seconds: float, profile: Path) -> None:
    """Profile a program as a user does: record it while it works, then export."""
    recorded = profile.with_suffix(".pb.gz")
    rounds = 'end=$((SECONDS + $1)); shift; while [ $SECONDS -lt $end ]; do "$@" >&2; done'
    command = [program, *workload.arguments]
    run(
        *(EVERFLAME, "record", "-o", recorded, "--"),
        *("bash", "-c", rounds, "bash", str(round(seconds)), *command),
    )
    said = run(EVERFLAME, "export", recorded, "--for", "go-pgo", "-o", profile).stderr
    print(f"  everflame: {said.splitlines()[-1].partition(': ')[2]}")


def profile_itself(program: Path, workload: Workload, seconds: float, profile: Path) -> None:
    """Let a program profile itself for as long, and add up the profiles."""
    parts = []
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        part = profile.with_suffix(f".{len(parts)}")
        options, environment = workload.profiled(str(part))
        run(program, *options, *workload.arguments, env={**os.environ, **environment})
        parts.append(part)
    with profile.open("wb") as file:
        subprocess.run(["go", "tool", "pprof", "-proto", *parts], check=True, stdout=file)


def edges(profile: Path) -> dict[tuple[str, str, str], float]:
    """Return the share of each call in a profile, as Go's compiler reads it."""
    _, *lines = run("go", "tool", "preprofile", "-i", profile).stdout.splitlines()
    weights = {}
    for caller, callee, numbers in zip(lines[::3], lines[1::3], lines[2::3], strict=True):
        line, weight = numbers.split()
        weights[caller, callee, line] = int(weight)
    return {edge: weight / sum(weights.values()) for edge, weight in weights.items()}


def describe(
    mine: dict[tuple[str, str, str], float], theirs: dict[tuple[str, str, str], float]
) -> str:
    shared = sum(min(share, theirs.get(edge, 0.0)) for edge, share in mine.items())
    hot = [edge for edge, share in theirs.items() if share >= _HOT]
    found = sum(edge in mine for edge in hot)
    return (
        f"{len(mine)} and {len(theirs)} calls, {shared:.0%} of their weight in common;"
        f" {found} of the {len(hot)} with {_HOT:.0%} and more in the second are in the first"
    )


def measure(name: str, folder: Path, turns: int, seconds: float) -> None:
    print(f"{name}:")
    workload = WORKLOADS[name]()
    programs = {each: folder / each for each in ("without", "everflame", "runtime/pprof")}
    programs["runtime/pprof"] = folder / "own"
    profiles = {"everflame": folder / "everflame.pgo", "runtime/pprof": folder / "own.pgo"}
    said = {"without": build(workload, programs["without"], None)}
    record(programs["without"], workload, seconds, profiles["everflame"])
    profile_itself(programs["without"], workload, seconds, profiles["runtime/pprof"])
    again = folder / "again.pgo"
    profile_itself(programs["without"], workload, seconds, again)
    own = edges(profiles["runtime/pprof"])
    print(f"  everflame and runtime/pprof: {describe(edges(profiles['everflame']), own)}")
    print(f"  runtime/pprof, another time: {describe(edges(again), own)}")
    for each, profile in profiles.items():
        said[each] = build(workload, programs[each], profile)
    for each, text in said.items():
        devirtualized = len(re.findall("PGO devirtualizing", text))
        inlined = len(re.findall("inlining call to", text))
        print(f"  {each}: {inlined} calls inlined, {devirtualized} devirtualized")
    taken: dict[str, list[float]] = {each: [] for each in programs}
    for _ in range(turns):
        for each, program in programs.items():
            taken[each].append(cpu_s([program, *workload.arguments]))
    for each, times in taken.items():
        ratios = sorted(a / b for a, b in zip(times, taken["without"], strict=True))
        print(
            f"  {each:14} {statistics.median(times):.3f} s of CPU,"
            f" {statistics.median(ratios):.3f} of that without"
            f" ({ratios[0]:.3f} to {ratios[-1]:.3f} in {turns} turns)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=WORKLOADS, action="append")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args()
    for name in options.only or WORKLOADS:
        with tempfile.TemporaryDirectory() as folder:
            measure(name, Path(folder), options.turns, options.seconds)


if __name__ == "__main__":
    main()
