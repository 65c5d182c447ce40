"""How true the profile is: ticks against the clock, and known programs against what they do.

Each workload has an answer that is known beforehand. Whole runs of `everflame record` are compared
with it, and the script fails when one is missed:

- both CPUs busy: ticks = hz x CPUs x seconds within 1 %, law 1 as integers, nothing lost;
- a program that spends 60/30/10 % in three functions, each share within 2 points;
- the same split over a call chain, with its work in user code and inside the kernel;
- two libraries at different addresses in ten processes: one box each, in the right proportion.

Run as root: `python bench/bench_sampling.py [--seconds 20]`.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from storage.formats import pprof
from storage.profile import Profile

TARGETS = Path(__file__).parent.parent / "tests" / "targets"
FRAME_POINTERS = ("-O2", "-fno-omit-frame-pointer", "-mno-omit-leaf-frame-pointer")
EVERFLAME = Path(sys.executable).with_name("everflame")


def compile_target(folder: Path, source: str, *flags: str) -> Path:
    output = folder / source.removesuffix(".c")
    subprocess.run(["gcc", *FRAME_POINTERS, "-o", output, TARGETS / source, *flags], check=True)
    return output


def record(folder: Path, *arguments: str | Path) -> Profile:
    output = folder / "profile.pb.gz"
    options, _, command = " ".join(map(str, arguments)).partition(" -- ")
    line = [EVERFLAME, "record", "-o", output, *options.split()]
    subprocess.run([*line, "--", *command.split()] if command else line, check=True)
    return pprof.decode(output.read_bytes())


def self_and_total(profile: Profile, comm: str) -> tuple[Counter[str], Counter[str], int]:
    """Return samples by function, as leaf among the process's own frames and anywhere."""
    own: Counter[str] = Counter()
    total: Counter[str] = Counter()
    samples = 0
    names = [[frame.function for frame in profile.frames(i)] for i in range(len(profile.locations))]
    numbers = {place: i for i, place in enumerate(profile.locations)}
    for row in profile.rows():
        if dict(row.labels).get("comm") != comm:
            continue
        functions = [name for place in row.stack for name in names[numbers[place]]]
        samples += row.samples
        total.update(dict.fromkeys(functions, row.samples))
        leaf = next((name for name in reversed(functions) if name in KNOWN), None)
        if leaf:
            own[leaf] += row.samples
    return own, total, samples


KNOWN = {
    *("spends_sixty", "spends_thirty", "spends_ten"),
    *("outer", "middle", "inner"),
    *("library_one", "library_two"),
}


class Report:
    """Prints a line per figure and remembers whether one was missed."""

    def __init__(self) -> None:
        self.missed = 0

    def line(self, what: str, measured: str, *, is_reached: bool) -> None:
        self.missed += not is_reached
        print(f"{'ok    ' if is_reached else 'MISSED'} {what}: {measured}", flush=True)

    def shares(self, what: str, found: Sequence[int], wanted: Sequence[float]) -> None:
        whole = sum(found)
        shares = [100 * part / whole if whole else 0.0 for part in found]
        text = " / ".join(f"{share:.1f}" for share in shares)
        aim = " / ".join(f"{share:g}" for share in wanted)
        is_near = all(abs(share - aim) <= 2 for share, aim in zip(shares, wanted, strict=True))
        self.line(what, f"{text} % of {whole:,} samples (known: {aim})", is_reached=is_near)


def check_law(report: Report, what: str, profile: Profile) -> None:
    counts = profile.accounting
    lost = sum(counts.lost.values())
    report.line(f"{what}, law 1", f"mismatch {counts.mismatch}", is_reached=counts.mismatch == 0)
    report.line(f"{what}, lost", str(lost), is_reached=lost == 0)


def ticks_against_the_clock(report: Report, folder: Path, seconds: int) -> None:
    split = compile_target(folder, "split.c")
    cpus = os.sched_getaffinity(0)
    busy = [subprocess.Popen([split, "3600"]) for _ in range(2 * len(cpus))]
    try:
        for frequency in (99, 999):
            profile = record(folder, "-a", "-F", str(frequency), "--for", f"{seconds}s")
            counts = profile.accounting
            expected = frequency * counts.cpus * counts.profiled_ns / 1e9
            ratio = counts.ticks / expected
            report.line(
                f"{frequency} Hz on {counts.cpus} busy CPUs",
                f"{counts.ticks:,} ticks of {expected:,.0f} expected ({ratio:.4f})",
                is_reached=abs(ratio - 1) <= 0.01,
            )
            check_law(report, f"{frequency} Hz", profile)
    finally:
        for process in busy:
            process.kill()
            process.wait()


def known_shares(report: Report, folder: Path, seconds: int) -> None:
    split = compile_target(folder, "split.c")
    own, _, _ = self_and_total(record(folder, "-F", "499", "--", split, str(seconds)), "split")
    functions = ("spends_sixty", "spends_thirty", "spends_ten")
    report.shares("three functions", [own[name] for name in functions], [60, 30, 10])


def known_chain(report: Report, folder: Path, seconds: int, *kernel: str) -> None:
    chain = compile_target(folder, "chain.c")
    what = "call chain with a kernel part" if kernel else "call chain"
    profile = record(folder, "-F", "499", "--", chain, str(seconds), *kernel)
    own, total, samples = self_and_total(profile, "chain")
    links = ("outer", "middle", "inner")
    report.shares(f"{what}, self", [own[name] for name in links], [60, 30, 10])
    for name, share in zip(links, (100, 40, 10), strict=True):
        found = 100 * total[name] / samples
        report.line(
            f"{what}, total of {name}",
            f"{found:.1f} % (known: {share})",
            is_reached=abs(found - share) <= 2,
        )


def known_libraries(report: Report, folder: Path, seconds: int) -> None:
    for name in ("library_one", "library_two"):
        command = ["gcc", *FRAME_POINTERS, "-shared", "-fPIC", f"-DNAME={name}"]
        output = folder / f"{name}.so"
        subprocess.run([*command, "-o", output, TARGETS / "library.c"], check=True)
    libraries = [str(folder / f"{name}.so") for name in ("library_one", "library_two")]
    program = compile_target(folder, "two_libraries.c", *libraries, f"-Wl,-rpath,{folder}")
    each = max(1, seconds * len(os.sched_getaffinity(0)) // 10)
    script = folder / "ten"
    script.write_text(f"for i in 0 1 2 3 4 5 6 7 8 9; do {program} {each} & done; wait\n")
    profile = record(folder, "-F", "499", "--", "sh", script)
    own, _, _ = self_and_total(profile, "two_libraries")
    names = ("library_one", "library_two")
    report.shares("two libraries", [own[name] for name in names], [100 * 2 / 3, 100 / 3])
    boxes = {
        frame
        for number in range(len(profile.locations))
        for frame in profile.frames(number)
        if frame.function in names
    }
    distinct = {(box.function, box.module) for box in boxes}
    report.line(
        "two libraries in ten processes", f"{len(distinct)} boxes", is_reached=len(distinct) == 2
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=20)
    seconds = parser.parse_args().seconds
    report = Report()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ticks_against_the_clock(report, folder, seconds)
        known_shares(report, folder, seconds)
        known_chain(report, folder, seconds)
        known_chain(report, folder, seconds, "kernel")
        known_libraries(report, folder, seconds)
    print(f"{report.missed} figures missed")
    return 1 if report.missed else 0


if __name__ == "__main__":
    sys.exit(main())
