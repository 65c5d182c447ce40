"""Measure time and memory of building unwind tables, and count rows that differ from readelf's.

Each table is built in fresh processes, as by the agent, with a warm page cache. Time is the best of
`--repeat`: the work is fixed, and any more time is due to other load; `cpu` is the process's own.
The peak is the resident memory of the whole process; `growth` excludes the imports. `load` is
reading the saved table, including its checksum.

Then the first and the last address of each row of `readelf --debug-dump=frames-interp` are looked
up. Files that are not installed are skipped.

Run: `python bench/bench_unwind_tables.py [--repeat 7] [--no-compare] [FILE...]`.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from symbolizer.unwind.table import UnwindTable  # noqa: E402
from tests.support.readelf_frames import compare  # noqa: E402

LARGEST = Path("/usr/lib/x86_64-linux-gnu/libLLVM-14.so.1")
FILES = (
    LARGEST,
    Path("/lib/x86_64-linux-gnu/libc.so.6"),
    Path("/usr/bin/python3.11"),
    Path("/bin/bash"),
    Path("/usr/bin/perl"),
    Path("/usr/bin/node"),
    Path("/usr/lib/x86_64-linux-gnu/libcrypto.so.3"),
    Path("/usr/lib/x86_64-linux-gnu/libstdc++.so.6"),
    Path("/usr/lib/llvm-14/bin/clang"),
    Path("/usr/lib/gcc/x86_64-linux-gnu/12/cc1plus"),
    Path("/usr/lib/chromium/chromium"),
    Path("/usr/local/go/bin/go"),
)
MOST_SECONDS, MOST_MB = 0.4, 100
MOST_DIFFERENT = 1e-5

BUILD = """
import os, pathlib, sys, time
sys.path.insert(0, sys.argv[1])
from symbolizer.symbols.elf import FileSource
from symbolizer.unwind.build import build

def memory_kb(field):
    text = pathlib.Path("/proc/self/status").read_text()
    return int(text.partition(field + ":")[2].split()[0])

pathlib.Path("/proc/self/clear_refs").write_text("5")
before, wall, cpu = memory_kb("VmRSS"), time.perf_counter(), time.process_time()
table = build(FileSource(os.open(sys.argv[2], os.O_RDONLY)))
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
peak = memory_kb("VmHWM")
with open(sys.argv[3], "wb") as file:
    table.write(file)
print(wall, cpu, peak / 1024, (peak - before) / 1024, table.key)
"""


class Built(NamedTuple):
    """Best times and largest memory of all runs."""

    seconds: float
    cpu_seconds: float
    peak_mb: float
    growth_mb: float
    load_seconds: float
    table: UnwindTable


def measure(path: Path, repeat: int) -> Built:
    runs = []
    loads = []
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "table"
        for _ in range(repeat):
            command = [sys.executable, "-c", BUILD, ROOT, path, saved]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            *figures, key = output.split()
            runs.append([float(figure) for figure in figures])
            start = time.perf_counter()
            table = UnwindTable.read(saved.read_bytes(), key)
            loads.append(time.perf_counter() - start)
            assert table is not None, "the saved table was not read back"
    walls, cpus, peaks, growths = zip(*runs, strict=True)
    return Built(min(walls), min(cpus), max(peaks), max(growths), min(loads), table)


def verdict(value: float, most: float, unit: str) -> str:
    return f"(at most {most:g}{unit}: {'ok' if value <= most else 'MISSED'})"


def report(path: Path, built: Built) -> bool:
    """Print the measurements; return whether the limits hold, which apply to the largest file."""
    table = built.table
    is_judged = path == LARGEST
    time_verdict = verdict(built.seconds, MOST_SECONDS, " s") if is_judged else ""
    memory_verdict = verdict(built.peak_mb, MOST_MB, " MB") if is_judged else ""
    size_bytes = table.pages.nbytes + table.rows.nbytes
    print(f"{path}: {table.row_count} rows, {size_bytes / 2**20:.2f} MB")
    print(f"  build {built.seconds:.3f} s {time_verdict} cpu {built.cpu_seconds:.3f} s")
    print(f"  peak {built.peak_mb:.0f} MB {memory_verdict} growth {built.growth_mb:.0f} MB")
    print(f"  load {1000 * built.load_seconds:.1f} ms", flush=True)
    return "MISSED" not in time_verdict + memory_verdict


def report_comparison(path: Path, table: UnwindTable) -> bool:
    found = compare(path, table)
    if not found.rows:
        print("  readelf prints no rows", flush=True)
        return True
    share = len(found.different) / found.rows
    print(
        f"  {found.rows} rows of readelf's, {len(found.different)} differ "
        f"{verdict(share, MOST_DIFFERENT, '')}, {found.unsupported} unsupported",
        flush=True,
    )
    for row, ours in found.different[:10]:
        print(f"    {row.start:#x}..{row.end:#x} cfa {row.cfa} rbp {row.rbp} ra {row.ra}: {ours}")
    return share <= MOST_DIFFERENT


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--no-compare", action="store_true")
    args = parser.parse_args()
    holds = True
    for path in args.files or [path for path in FILES if path.exists()]:
        built = measure(path, args.repeat)
        holds &= report(path, built)
        if not args.no_compare:
            holds &= report_comparison(path, built.table)
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
